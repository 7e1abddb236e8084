from __future__ import annotations

from pathlib import Path

import pydantic
import pytest

from exporter import recipe, target
from exporter.errors import RecipeError
from exporter.recipe import load_recipe

WHOLE = """
format = 1
name = "mine"
target = "portable"

[calibrate]
method = "minmax"

[probe]
batches = 2
max_bytes = 1000

[[rules]]
match = "*/lstm*"
precision = "float"
why = "recurrent state"

[[rules]]
match = "Conv"
precision = "int8"
why = "layers"

[budget]
min_snr_db = 30.0
max_abs = 0.02
"""


def test_presets_are_one_a_target_and_say_so() -> None:
    assert recipe.presets() == tuple(sorted(target.TARGETS))
    for name in recipe.presets():
        found = load_recipe(name)
        assert (found.name, found.target, found.format, found.rules) == (name, name, 1, ())
        assert found.text.startswith(f"# {name}: ")
        assert found.budget.min_snr_db == 10.0


def test_presets_differ_only_where_the_hardware_does() -> None:
    portable, vnni = (load_recipe(name) for name in ("portable", "x86-vnni"))
    assert portable.model_copy(update={"name": "", "target": "", "text": ""}) == vnni.model_copy(
        update={"name": "", "target": "", "text": ""}
    )


def test_every_line_of_a_preset_has_its_reason() -> None:
    for name in recipe.presets():
        for line in load_recipe(name).text.splitlines():
            assert not line or line.startswith(("format", "name", "#", "[calibrate]")) or "#" in line, line


def test_file_is_read_whole_and_keeps_its_text(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(WHOLE)
    found = load_recipe(tmp_path / "mine.toml")
    assert [(rule.match, rule.precision, rule.why) for rule in found.rules] == [
        ("*/lstm*", "float", "recurrent state"),
        ("Conv", "int8", "layers"),
    ]
    assert (found.probe.batches, found.probe.max_bytes) == (2, 1000)
    assert (found.budget.min_snr_db, found.budget.max_abs, found.budget.min_cosine) == (30.0, 0.02, None)
    assert found.text == WHOLE
    assert recipe.parse(found.text, "again") == found


def test_equal_files_are_equal_values_that_nothing_changes() -> None:
    found = recipe.parse(WHOLE, "a.toml")
    assert found == recipe.parse(WHOLE, "b.toml") and hash(found) == hash(recipe.parse(WHOLE, "b.toml"))
    with pytest.raises(pydantic.ValidationError):
        found.target = "x86-vnni"  # type: ignore[misc]


def test_recipe_that_its_text_does_not_say_is_refused() -> None:
    portable = recipe.load_recipe("portable")
    recipe.require_own_text(portable)
    for lie in (
        portable.model_copy(update={"name": "mine"}),
        recipe.Recipe(format=1, name="mine", target="portable"),
        portable.model_copy(update={"text": "no TOML"}),
    ):
        with pytest.raises(RecipeError, match="expected the TOML it was read from; write it as TOML"):
            recipe.require_own_text(lie)
