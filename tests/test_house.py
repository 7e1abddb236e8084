"""The laws of the house: who may import what, what is public, what things may be called."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import onnxruntime.quantization
import pytest

import exporter
import runtime
from runtime import cli

ROOT = Path(__file__).parents[1]
STANDARD = set(sys.stdlib_module_names)
PACKAGES = ("exporter", "runtime")

# module of the runtime: what it may import besides the standard library, numpy and onnxruntime
TERMINAL = {
    "preprocess": {"PIL"},
    "language": {"tokenizers"},
    "chat": {"jinja2"},
    "cli": {"typer", "rich"},
    "gate_cli": {"typer", "rich"},
    "pytest_plugin": {"pytest"},
    "views": {"typer", "rich"},
    "__main__": {"typer", "rich"},
}
OWN_TERMINAL = {"cli", "terminal", "views"}
EXPORTERS = {
    "runtime", "torch", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "numpy", "networkx", "pydantic", "jinja2",
    "tomlkit", "optimum", "transformers", "flatbuffers", "dask", "distributed", "fsspec", "tokenizers", "pyarrow",
    "pydantic_core", "safetensors",
}  # fmt: skip

# the picture of ARCHITECTURE.md: what every stage may use, the stages in their order, and what stands above them
SHARED = {
    "errors",
    "sniff",
    "weights",
    "data",
    "optional",
    "staged",
    "progress",
    "quiet",
    "axes",
    "batches",
    "split",
    "graph",
    "ops",
    "numerics",
    "proof",
    "recipe",
    "target",
    "budget",
    "varies",
    "flat",
}
STAGES = (
    "external",
    "program",
    "source",
    "meant",
    "precision",
    "call",
    "fake_quantize",
    "blame",
    "trace",
    "prepare",
    "calibrate",
    "heldout",
    "cluster",
    "gates",
    "rulebook",
    "weight_only",
    "place",
    "bear",
    "recurrent",
    "dynamic",
    "lower",
    "widen",
    "quantize",
    "accept",
    "products",
    "kinds",
    "correct",
    "search",
    "shrink",
    "collect",
    "forecast",
    "ort_format",
    "mobile",
    "lint",
    "already",
    "bundle",
    "report",
    "pipeline",
    "causal",
    "given",
    "terminal",
    "views",
    "cli",
)


def modules(package: str) -> Iterator[Path]:
    return (path for path in sorted((ROOT / package).rglob("*.py")) if "samples" not in path.parts)


def imports(path: Path, for_types: bool = True) -> set[str]:
    """Dotted names of every import, wherever in the file it stands; `from a import b` gives a.b.

    for_types: also those under `if TYPE_CHECKING:`, which never run.
    """
    found: set[str] = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if not for_types:
        tree.body = [
            node for node in tree.body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
        ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def stage(path: Path) -> str:
    return path.relative_to(ROOT / "exporter").parts[0].removesuffix(".py")


def test_runtime_imports_numpy_and_onnxruntime_only() -> None:
    for path in modules("runtime"):
        allowed = STANDARD | {"numpy", "onnxruntime", "runtime"} | TERMINAL.get(path.stem, set())
        assert {name.split(".")[0] for name in imports(path)} <= allowed, path


def test_exporter_imports_what_its_extra_installs() -> None:
    for path in modules("exporter"):
        allowed = STANDARD | EXPORTERS | {"exporter"} | ({"typer", "rich"} if path.stem in OWN_TERMINAL else set())
        assert {name.split(".")[0] for name in imports(path)} <= allowed, path


def test_stages_import_what_is_before_them_and_never_what_is_behind() -> None:
    for path in modules("exporter"):
        here = stage(path)
        if here == "__init__":
            continue
        used = {name.split(".")[1] for name in imports(path) if name.startswith("exporter.")} - {here}
        if here in SHARED:
            assert used <= SHARED, path
        else:
            assert used <= SHARED | set(STAGES[: STAGES.index(here)]), path


def test_every_module_of_the_exporter_has_its_place_in_the_picture() -> None:
    assert {stage(path) for path in modules("exporter")} == SHARED | set(STAGES) | {"__init__"}


def test_modules_import_each_other_in_no_circle() -> None:
    names = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for p in PACKAGES
        for path in modules(p)
    }
    needs = {
        name: {used if used in names else used.rpartition(".")[0] for used in imports(path, for_types=False)}
        & names.keys() - {name}
        for name, path in names.items()
        if path.name != "__init__.py"
    }
    left = dict(needs)
    while free := [name for name, used in left.items() if not used & left.keys()]:
        for name in free:
            del left[name]
    assert left == {}


def test_importing_runtime_loads_nothing_of_the_exporter() -> None:
    code = "import runtime, sys; print(*sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = {name.split(".")[0] for name in ran.stdout.split()}
    assert not loaded & {"torch", "onnx", "onnx_ir", "onnxscript", "typer", "rich", "click", "pydantic", "exporter"}


def test_public_names_are_sorted_and_all_of_them_exist() -> None:
    for package in (exporter, runtime):
        assert package.__all__ == sorted(package.__all__)
        assert all(hasattr(package, name) for name in package.__all__)
        public = {n for n, v in vars(package).items() if not n.startswith("_") and not inspect.ismodule(v)}
        assert public - {"annotations"} == set(package.__all__) - {
            n for n in package.__all__ if inspect.ismodule(getattr(package, n))
        }


def test_surface_of_the_design_is_public() -> None:
    assert {"from_module", "from_onnx", "load_recipe", "export", "Report"} <= set(exporter.__all__)
    assert {"load", "check", "bench", "kernels"} <= set(runtime.__all__)


def test_every_command_is_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for command in cli.app.registered_commands:
        name = command.name or command.callback.__name__  # type: ignore[union-attr]
        assert f"packlight {name}" in readme, name


WORDS = {"utils", "util", "helpers", "helper", "common", "misc", "base", "manager", "handler", "wrapper"}


def test_no_module_or_class_has_a_name_that_says_nothing() -> None:
    for package in PACKAGES:
        for path in modules(package):
            assert not set(path.stem.lower().split("_")) & WORDS, path
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ClassDef):
                    words = {word.lower() for word in re.findall(r"[A-Z][a-z]*", node.name)}
                    assert not words & WORDS, f"{path}: {node.name}"


# public functions with more than six arguments: what a command line or `export` takes, and what is still to become a value
LONG = {
    "bundle.record", "cli.run", "collect.collect", "cluster.evaluate.total", "cluster.observe.observe",
    "correct.choose.improve", "correct.opened.improve", "pipeline.export", "recurrent.improve", "report.make.timed",
    "search.costs.measure", "search.faster.settle", "search.improve.improve", "search.improve.unsearched",
    "shrink.weights",
}  # fmt: skip


def test_public_functions_of_the_exporter_take_six_arguments_at_most_but_for_those_that_are_named() -> None:
    """The list may become shorter and never longer."""
    found = {}
    for path in modules("exporter"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                name = ".".join((*path.relative_to(ROOT / "exporter").with_suffix("").parts, node.name))
                found[name] = len(node.args.posonlyargs + node.args.args + node.args.kwonlyargs)
    assert {name for name, count in found.items() if count > 6} == LONG


def test_only_quantize_speaks_to_onnxruntimes_quantizer() -> None:
    users = {
        path.name
        for p in PACKAGES
        for path in modules(p)
        if any("onnxruntime.quantization" in n for n in imports(path))
    }
    assert users == {"quantize.py"}


def test_only_session_opens_a_session() -> None:
    users = {
        path.name
        for p in PACKAGES
        for path in modules(p)
        if re.search(r"InferenceSession\(", path.read_text(encoding="utf-8"))
    }
    assert users == {"session.py"}


def extra_options() -> set[str]:
    """The keys of every dict literal that quantize.py gives as extra_options."""
    tree = ast.parse((ROOT / "exporter" / "quantize.py").read_text(encoding="utf-8"))
    given = [
        keyword.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        for keyword in node.keywords
        if keyword.arg == "extra_options"
    ]
    assert given and all(isinstance(each, ast.Dict) for each in given)
    return {
        ast.literal_eval(key) for each in given if isinstance(each, ast.Dict) for key in each.keys if key is not None
    }


def test_options_that_quantize_gives_exist_in_onnxruntimes_source() -> None:
    """ORT takes unknown keys without a word (FACTS 4.4): this fails on the upgrade that renames one."""
    folder = Path(inspect.getfile(onnxruntime.quantization)).parent
    source = "".join(path.read_text(encoding="utf-8") for path in folder.rglob("*.py"))
    for option in extra_options():
        assert re.search(rf"""(get\(|\[|in )\s*["']{option}["']|["']{option}["']\s*(in |,)""", source), option


@pytest.mark.parametrize("package", [*PACKAGES, "samples", "benchmarks", "tests"])
def test_randomness_comes_from_a_generator(package: str) -> None:
    for path in modules(package):
        text = path.read_text(encoding="utf-8")
        assert not re.search(
            r"(np|numpy)\.random\.(seed|rand|randn|randint|normal|uniform|choice|shuffle|permutation)\(", text
        ), path


def test_modules_are_short_and_begin_with_what_they_are_for() -> None:
    for package in PACKAGES:
        for path in modules(package):
            text = path.read_text(encoding="utf-8")
            assert ast.get_docstring(ast.parse(text)), path
            assert len(text.splitlines()) < 450, path


def test_nothing_names_the_place_it_was_written_at() -> None:
    for path in [
        *(p for package in (*PACKAGES, "samples", "tests", "benchmarks") for p in modules(package)),
        *ROOT.glob("*.md"),
    ]:
        assert not re.search(r"/(work|tmp/dev)/", path.read_text(encoding="utf-8").replace(r"/(work|tmp/dev)/", "")), (
            path
        )


MODULE_OF = {
    "scikit-learn": "sklearn",
    "pillow": "PIL",
    "pyyaml": "yaml",
}  # where a distribution's module has another name


def test_tests_import_only_what_the_extra_dev_installs() -> None:
    """What needs more (a sample's model) asks find_spec, and skips."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *(line for name in extras if name != "hf" for line in extras[name])]
    named = [re.match(r"[\w.-]+", line)[0] for line in lines]  # type: ignore[index]
    installed = {MODULE_OF.get(name, name.replace("-", "_")) for name in named}
    for path in modules("tests"):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        found = {alias.name for node in body if isinstance(node, ast.Import) for alias in node.names}
        found |= {str(node.module) for node in body if isinstance(node, ast.ImportFrom)}
        ours = {*PACKAGES, "tests", "benchmarks"}
        assert {name.split(".")[0] for name in found} <= STANDARD | installed | ours, path


def test_ci_runs_the_readmes_commands_before_it_installs_anything_else() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"^pip install '\.\[.*?(?=  |$)", readme, re.MULTILINE) == [
        "pip install '.[demo]' && packlight demo",
        "pip install '.[dev]' && ./check",
    ]
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    first = next(number for number, line in enumerate(lines) if 'eval "$command"' in line)
    assert not [line for line in lines[:first] if line.strip().startswith("pip ")]
