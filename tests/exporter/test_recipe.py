from __future__ import annotations

from pathlib import Path
from typing import Any

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
        assert found.toml.startswith(f"# {name}: ")
        assert found.budget.min_snr_db == 10.0


def test_presets_differ_in_name_target_and_comments_only() -> None:
    said = {"name": "", "target": "", "toml": ""}
    assert len({load_recipe(name).model_copy(update=said) for name in recipe.presets()}) == 1
    for name in recipe.presets():
        lines = [line.split("#")[0].rstrip() for line in load_recipe(name).toml.splitlines()]
        assert [line for line in lines if line] == [
            "format = 1",
            f'name   = "{name}"',
            f'target = "{name}"',
            "[calibrate]",
            'method = "best"',
            "[budget]",
            "min_snr_db = 10.0",
        ]


def test_every_line_of_a_preset_has_its_reason() -> None:
    for name in recipe.presets():
        for line in load_recipe(name).toml.splitlines():
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
    assert found.toml == WHOLE
    assert recipe.parse(found.toml, "again", tmp_path) == found


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


LIMITS = {"max_size_bytes": 6_000_000, "max_ram_bytes": None, "min_integer_macs": 0.95}


def test_limit_is_added_to_the_budget_and_to_the_text() -> None:
    before = load_recipe("portable")
    found = recipe.limited(before, LIMITS)
    assert (found.budget.max_size_bytes, found.budget.max_ram_bytes, found.budget.min_integer_macs) == (
        *(6_000_000, None),
        0.95,
    )
    assert found.budget.min_snr_db == before.budget.min_snr_db == 10.0
    added = [line for line in found.toml.splitlines() if line not in before.toml.splitlines()]
    assert added == ["max_size_bytes = 6000000", "min_integer_macs = 0.95"]
    assert [line for line in found.toml.splitlines() if line not in added] == before.toml.splitlines()
    assert recipe.parse(found.toml, "again") == found
    recipe.require_own_text(found)


@pytest.mark.parametrize("end", ["", "\n", "\n[probe]\nbatches = 2\n", "\n[budget]  # mine\n", "\n[budget]"])
def test_limit_finds_its_table_or_makes_one(end: str) -> None:
    before = recipe.parse(f'format = 1\nname = "mine"\ntarget = "portable"{end}', "mine.toml")
    found = recipe.limited(before, LIMITS)
    assert (found.budget.max_size_bytes, found.budget.min_integer_macs) == (6_000_000, 0.95)
    assert found.toml.count("[budget]") == 1
    assert (found.name, found.target, found.probe) == (before.name, before.target, before.probe)
    recipe.require_own_text(found)


def test_recipe_without_a_further_limit_is_itself() -> None:
    before = load_recipe("portable")
    assert recipe.limited(before, {"max_size_bytes": None, "min_integer_macs": None}) is before


def test_limit_beside_the_recipe_is_the_one_that_holds() -> None:
    asked = recipe.limited(load_recipe("portable"), {"min_snr_db": 25.0, "metric_drops": ("top1 drop<=0.5%",)})
    assert (asked.budget.min_snr_db, asked.budget.metric_drops) == (25.0, ("top1 drop<=0.5%",))
    assert asked.toml.count("min_snr_db") == 1
    assert "min_snr_db = 25.0" in asked.toml
    recipe.require_own_text(asked)


@pytest.mark.parametrize(
    "limits", [{"min_integer_macs": 1.5}, {"max_size_bytes": 0}, {"min_integer_macs": float("nan")}]
)
def test_limit_that_is_none_is_refused(limits: dict[str, float]) -> None:
    with pytest.raises(RecipeError, match=f"portable:budget:{next(iter(limits))}"):
        recipe.limited(load_recipe("portable"), limits)


@pytest.mark.parametrize("budget", ["[ budget ]", "  [budget]  # mine", "[budget]\r"])
def test_limit_finds_its_table_however_it_is_spaced(budget: str) -> None:
    before = recipe.parse(f'format = 1\nname = "mine"\ntarget = "portable"\n{budget}\nmax_abs = 3.0\n', "mine.toml")
    found = recipe.limited(before, LIMITS)
    assert (found.budget.max_abs, found.budget.max_size_bytes) == (3.0, 6_000_000)


@pytest.mark.parametrize(
    "end",
    [
        "budget = {max_abs = 3.0}\n",
        "budget.max_abs = 3.0\n",
        '[[rules]]\nmatch = "Conv"\nprecision = "float"\nwhy = """\n[budget]\n"""\n',
    ],
)
def test_limit_is_added_however_the_table_is_written(end: str) -> None:
    before = recipe.parse(f'format = 1\nname = "mine"\ntarget = "portable"\n{end}', "mine.toml")
    found = recipe.limited(before, LIMITS)
    assert (found.budget.max_abs, found.budget.max_size_bytes) == (before.budget.max_abs, 6_000_000)
    assert found.rules == before.rules
    recipe.require_own_text(found)


@pytest.mark.parametrize("given", [None, 3, {"target": "portable"}, "a\0b"])
def test_what_is_no_name_and_no_path_is_refused(given: Any) -> None:
    with pytest.raises(RecipeError, match="expected a preset"):
        load_recipe(given)


def test_file_that_is_no_text_is_named_for_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(RecipeError, match="r.toml: found 'utf-8' codec .*, expected a TOML file in UTF-8"):
        load_recipe(tmp_path / "r.toml")
