from __future__ import annotations

import inspect
import subprocess
import sys

import runtime

PUBLIC = {"Bundle", "BundleError", "Drift", "DriftExceeded", "InputError", "Kernels", "PacklightError", "Timing"} | {
    *("Verdict", "bench", "check", "kernels", "load"),
}


def test_public_names_are_exactly_these() -> None:
    assert set(runtime.__all__) == PUBLIC
    assert runtime.__all__ == sorted(runtime.__all__)


def test_verbs_are_functions_and_not_the_modules_of_their_name() -> None:
    assert all(inspect.isfunction(getattr(runtime, name)) for name in ("bench", "check", "kernels", "load"))


def loaded_by(package: str) -> set[str]:
    code = f"import {package}, sys; print(*sys.modules)"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_importing_runtime_loads_nothing_heavy() -> None:
    loaded = {name.split(".")[0] for name in loaded_by("runtime")}
    assert not {"torch", "onnx", "typer", "rich", "click", "exporter", "optimum"} & loaded
    assert {"numpy", "onnxruntime"} <= loaded


def test_importing_runtime_leaves_slow_parts_of_the_standard_library_for_later() -> None:
    added = loaded_by("runtime") - loaded_by("onnxruntime")
    assert not {"hashlib", "html", "numpy.typing", "pathlib", "statistics", "tempfile", "zipfile"} & added
