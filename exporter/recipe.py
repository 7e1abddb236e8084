"""What is asked, as a frozen value: a preset's name or a TOML file of your own, read strictly.

An unknown key, a wrong type or a wrong value is an error that says where, what was found, what was expected, and what
was probably meant. There is no inheritance: copy a preset and edit it. A flag may add a limit.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import pydantic
import tomlkit
from pydantic import BaseModel, ConfigDict, Field
from tomlkit.exceptions import TOMLKitError

from exporter import budget, target
from exporter.budget import Drop
from exporter.data import Asked, Columns, Images, Text
from exporter.errors import RecipeError
from exporter.numerics.formats import SCHEMES, Scheme, Word

FORMAT = 1
MOST_CHARACTERS = 1 << 20
OURS = ("toml", "folder")  # of a Recipe, and no key of its file


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Calibrate(_Table):
    """How ranges are taken from the calibration batches: docs/calibration.md.

    engine: "onnxruntime" is its own calibrators (minmax, percentile, entropy), which hold every activation in memory.
    """

    method: Literal["minmax", "moving-average", "percentile", "entropy", "mse", "best", "auto"] = "best"
    percentile: float = Field(default=99.99, gt=50, le=100)
    engine: Literal["packlight", "onnxruntime"] = "packlight"


class Rule(_Table):
    """`match` a node name or an op_type (`*`, `?`); first match wins; `why` is copied into the plan."""

    match: str = Field(min_length=1)
    precision: Word
    why: str = Field(min_length=1)

    @property
    def scheme(self) -> Scheme:
        return SCHEMES[self.precision]


class Search(_Table):
    """What accuracy may cost, where the static plan is short of the aim: docs/search.md.

    aim_snr_db: of the worst output on calibration batches. max_slower: share of the fastest plan's time; 0 searches for
    nothing but a budget that is not met.
    """

    aim_snr_db: float = 35.0
    max_slower: float = Field(default=0.15, ge=0, le=10)


class Budget(_Table):
    """Each output must meet every limit on drift, on held-out inputs; sizes in bytes, as in runtime.manifest.Budget.

    min_speedup: over FP32, on the machine that exports. metric_drops: as `--budget` says them ("top1 drop<=0.5%"), of the
    sample's own evaluate().
    """

    min_snr_db: float | None = None
    min_cosine: float | None = Field(default=None, ge=-1, le=1)
    max_abs: float | None = Field(default=None, ge=0)
    min_same_top1: float | None = Field(default=None, ge=0, le=1)
    min_integer_macs: float | None = Field(default=None, ge=0, le=1)
    max_size_bytes: int | None = Field(default=None, ge=1)
    max_ram_bytes: int | None = Field(default=None, ge=1)
    min_speedup: float | None = Field(default=None, gt=0)
    metric_drops: tuple[str, ...] = ()


class Probe(_Table):
    """How many held-out batches travel in the bundle, and how large probe.npz may become (one batch always goes)."""

    batches: int = Field(default=4, ge=1)
    max_bytes: int = Field(default=8_000_000, ge=1)


class Recipe(_Table):
    """A whole recipe. `toml` is the text it was read from, which goes into the bundle; `folder` is where it lay."""

    format: Literal[1]
    name: str = Field(min_length=1)
    target: str
    calibrate: Calibrate = Calibrate()
    search: Search = Search()
    probe: Probe = Probe()
    rules: tuple[Rule, ...] = ()
    budget: Budget = Budget()
    images: Images | None = None
    text: Text | None = None
    columns: Columns | None = None
    toml: str = Field(default="", exclude=True, repr=False)
    folder: Path = Field(default=Path(), exclude=True, repr=False)


def presets() -> tuple[str, ...]:
    folder = resources.files("exporter") / "recipes"
    return tuple(sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml")))


def load_recipe(name_or_path: str | Path) -> Recipe:
    """A preset by name (`portable`, `x86-vnni`) or a TOML file by path.

    Raises:
        RecipeError: neither a preset nor a file, no TOML, or a key or value that is not known.
    """
    known = presets()
    if not isinstance(name_or_path, str | Path):
        raise RecipeError(
            "recipe", found=type(name_or_path).__name__, expected=f"a preset ({', '.join(known)}) or a path"
        )
    if str(name_or_path) in known:
        text = (resources.files("exporter") / "recipes" / f"{name_or_path}.toml").read_text(encoding="utf-8")
        return parse(text, f"{name_or_path}.toml")
    path = Path(name_or_path)
    try:
        if path.exists() and not path.is_file():  # a pipe, which would be waited for
            raise ValueError("something that is not a file")
        return parse(path.read_text(encoding="utf-8"), path.name, path.parent)
    except (OSError, ValueError) as error:  # bytes that are not UTF-8, a path with a NUL
        if path.name and path.is_file():
            raise RecipeError(str(path), found=str(error)[:200], expected="a TOML file in UTF-8") from error
        near = difflib.get_close_matches(str(name_or_path), known, n=1, cutoff=0.4)
        raise RecipeError(
            "no such recipe",
            found=repr(str(name_or_path)),
            expected=f"a preset ({', '.join(known)}) or a TOML file",
            do=f"did you mean {near[0]!r}?" if near else "",
        ) from error


def parse(text: str, where: str, folder: Path = Path()) -> Recipe:
    """TOML text -> Recipe; `where` names it in errors, its relative paths begin at `folder`."""
    try:
        if len(text) > MOST_CHARACTERS:
            raise ValueError(f"more than {MOST_CHARACTERS} characters")
        given = tomlkit.parse(text).unwrap()
        text.encode("utf-8")
    except (TOMLKitError, ValueError, ArithmeticError, RecursionError, TypeError, AttributeError) as error:
        raise RecipeError("not TOML", found=str(error)[:200] or type(error).__name__, where=where) from error
    for name in OURS:
        if name in given:
            raise RecipeError(f"unknown key {name!r}", where=where)
    try:
        recipe = Recipe.model_validate(_frozen(given) | {"toml": text, "folder": folder})
    except pydantic.ValidationError as error:
        raise _ours(error, where) from error
    target.by_name(recipe.target, f"{where}:target")
    return recipe


def limited(recipe: Recipe, limits: Mapping[str, float | Sequence[str] | None]) -> Recipe:
    """The recipe with other limits in its budget, in its text as well; a limit of None is not asked for.

    Raises:
        RecipeError: the value is none; or the recipe was made in Python.
    """
    asked = {name: limit for name, limit in limits.items() if limit is not None}
    if not asked:
        return recipe
    require_own_text(recipe)
    document = tomlkit.parse(recipe.toml)
    budget = document.setdefault("budget", tomlkit.table())
    for name, limit in asked.items():
        budget[name] = list(limit) if isinstance(limit, Sequence) else limit
    return parse(tomlkit.dumps(document), recipe.name, recipe.folder)


def drops(recipe: Recipe, evaluate: object | None) -> tuple[Drop, ...]:
    """The limits on metrics of the user's own.

    Raises:
        RecipeError: not a limit on a metric, or there is no evaluate() to measure it.
    """
    limits, found = budget.parse(recipe.budget.metric_drops)
    if limits:
        raise RecipeError(
            "metric_drops", found=f"{', '.join(limits)}", expected='"METRIC drop<=0.5%"', where=recipe.name
        )
    if found and evaluate is None:
        raise RecipeError(
            f"budget {found[0]}", found="no evaluate()", expected="a function run -> {metric: value}",
            do="give it to export(), or write it into the sample's file", where=recipe.name,
        )  # fmt: skip
    return found


def data(recipe: Recipe) -> Asked:
    """What the recipe says of data."""
    return Asked(images=recipe.images, text=recipe.text, columns=recipe.columns, folder=recipe.folder)


def require_own_text(recipe: Recipe) -> None:
    """Refuse a recipe that is not what its text says: the text goes into the bundle, and must not lie there.

    Raises:
        RecipeError: made or changed in Python, not read from TOML.
    """
    try:
        same = parse(recipe.toml, "text", recipe.folder) == recipe
    except RecipeError:
        same = False
    if not same:
        raise RecipeError(
            f"recipe {recipe.name!r}: its text",
            found="other values than the recipe's" if recipe.toml else "nothing",
            expected="the TOML it was read from",
            do="write it as TOML and read that with load_recipe",
        )


def _frozen(given: dict[str, Any]) -> dict[str, Any]:
    """TOML's arrays as tuples: what a frozen recipe holds."""

    def frozen(value: Any) -> Any:
        if isinstance(value, dict):
            return _frozen(value)
        return tuple(map(frozen, value)) if isinstance(value, list) else value

    return {key: frozen(value) for key, value in given.items()}


def _ours(error: pydantic.ValidationError, where: str) -> RecipeError:
    """The first of pydantic's complaints, in our words."""
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    table = ":".join([where, *path[:-1]])
    key = path[-1] if path else ""
    if first["type"] == "extra_forbidden":
        fields = _fields(path[:-1])
        near = difflib.get_close_matches(key, fields, n=1, cutoff=0.5)
        return RecipeError(
            f"unknown key {key!r}",
            expected=f"one of {', '.join(fields)}",
            do=f"did you mean {near[0]!r}?" if near else "",
            where=table,
        )
    if first["type"] == "missing":
        return RecipeError(f"missing key {key!r}", where=table)
    expected = str(first.get("ctx", {}).get("expected", "")) or first["msg"].removeprefix("Input should be ")
    value = first["input"]
    near = difflib.get_close_matches(str(value), expected.replace("'", "").replace(" or ", ", ").split(", "), n=1)
    return RecipeError(
        "bad value",
        found=repr(value),
        expected=expected,
        do=f"did you mean {near[0]!r}?" if near else "",
        where=f"{table}:{key}",
    )


_TABLES: dict[str, type[BaseModel]] = {
    "calibrate": Calibrate,
    "search": Search,
    "probe": Probe,
    "rules": Rule,
    "budget": Budget,
    "images": Images,
    "text": Text,
    "columns": Columns,
}


def _fields(path: list[str]) -> list[str]:
    """The keys of the table at `path`."""
    table: type[BaseModel] = Recipe
    for part in path:
        if part.isdigit():
            continue
        table = _TABLES[part]
    return [name for name in table.model_fields if name not in OURS]
