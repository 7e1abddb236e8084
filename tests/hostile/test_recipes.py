"""Recipes that must be refused: each is a good one with one thing wrong, and the error says where and what was meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from exporter import recipe
from exporter.errors import RecipeError
from exporter.recipe import load_recipe

GOOD = 'format = 1\nname = "mine"\ntarget = "portable"\n'
RULE = '[[rules]]\nmatch = "Conv"\nprecision = "float"\nwhy = "because"\n'


def refusal(text: str) -> RecipeError:
    with pytest.raises(RecipeError) as error:
        recipe.parse(text, "a.toml")
    assert len(str(error.value).splitlines()) == 1
    return error.value


def test_good_recipe_is_read() -> None:
    assert recipe.parse(GOOD + RULE, "a.toml").rules[0].why == "because"


@pytest.mark.parametrize(
    ("text", "where", "says"),
    [
        (
            GOOD + 'taget = "x"\n',
            "a.toml",
            "unknown key 'taget'; expected one of format, name, target.*did you mean 'target'",
        ),
        (GOOD + '[calibrate]\nmetod = "minmax"\n', "a.toml:calibrate", "unknown key 'metod'.*did you mean 'method'"),
        (GOOD + "[budget]\nmin_snr = 3.0\n", "a.toml:budget", "unknown key 'min_snr'.*did you mean 'min_snr_db'"),
        (GOOD + "[bugdet]\nmin_snr_db = 3.0\n", "a.toml", "unknown key 'bugdet'.*did you mean 'budget'"),
        (GOOD + RULE + 'wy = "x"\n', "a.toml:rules:0", "unknown key 'wy'.*did you mean 'why'"),
        (
            GOOD + '[calibrate]\nmethod = "minmaks"\n',
            "a.toml:calibrate:method",
            "bad value: found 'minmaks'.*did you mean 'minmax'",
        ),
        (
            GOOD + RULE.replace("float", "flot"),
            "a.toml:rules:0:precision",
            "bad value: found 'flot'.*did you mean 'float'",
        ),
        (
            GOOD.replace('"portable"', '"portabel"'),
            "a.toml:target",
            "unknown target: found 'portabel'.*did you mean 'portable'",
        ),
        (GOOD.replace("format = 1", "format = 2"), "a.toml:format", "bad value: found 2"),
        (GOOD.replace("format = 1", 'format = "1"'), "a.toml:format", "bad value: found '1'"),
        (GOOD.replace('name = "mine"', "name = 3"), "a.toml:name", "bad value: found 3"),
        (GOOD.replace('name = "mine"\n', ""), "a.toml", "missing key 'name'"),
        (GOOD + RULE.replace('why = "because"\n', ""), "a.toml:rules:0", "missing key 'why'"),
        (GOOD + RULE.replace('"because"', '""'), "a.toml:rules:0:why", "bad value"),
        (GOOD + '[budget]\nmin_snr_db = "30"\n', "a.toml:budget:min_snr_db", "bad value: found '30'"),
        (GOOD + "[budget]\nmin_cosine = 1.5\n", "a.toml:budget:min_cosine", "bad value: found 1.5"),
        (GOOD + "[budget]\nmin_integer_macs = 95\n", "a.toml:budget:min_integer_macs", "bad value: found 95"),
        (GOOD + "[probe]\nbatches = 0\n", "a.toml:probe:batches", "bad value: found 0"),
        (GOOD + "[probe]\nbatches = true\n", "a.toml:probe:batches", "bad value: found True"),
        (GOOD + 'toml = "x"\n', "a.toml", "unknown key 'toml'"),
        (GOOD + 'rules = "Conv"\n', "a.toml:rules", "bad value: found 'Conv'"),
        (GOOD + "calibrate = 3\n", "a.toml:calibrate", "bad value: found 3"),
        ("format = 1\nname = ", "a.toml", "not TOML"),
        ('format = 1\nformat = 1\nname = "x"\n', "a.toml", "not TOML"),
        ("", "a.toml", "missing key"),
    ],
)
def test_wrong_recipe_is_refused_with_the_place_and_what_was_meant(text: str, where: str, says: str) -> None:
    import re

    error = refusal(text)
    assert error.where == where
    assert re.search(says.replace("; expected", ".*expected"), str(error)), str(error)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_budget_that_is_no_number_is_refused(value: str) -> None:
    assert refusal(f"{GOOD}[budget]\nmin_snr_db = {value}\n").where == "a.toml:budget:min_snr_db"


def test_recipe_that_is_not_there_suggests_the_nearest_preset(tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match="no such recipe: found 'x86-vni', expected a preset .*did you mean 'x86-vnni'"
    ):
        load_recipe("x86-vni")
    with pytest.raises(RecipeError, match="no such recipe"):
        load_recipe(tmp_path)
    (tmp_path / "latin.toml").write_bytes(GOOD.encode() + b"# \xe9\n")
    with pytest.raises(RecipeError):
        load_recipe(tmp_path / "latin.toml")
