"""packlight, at export: a PyTorch or ONNX model -> an int8 bundle that proves itself.

Names are loaded when they are first used: a worker of a cluster that counts no values need not load torch.
"""

import importlib
import typing

if typing.TYPE_CHECKING:
    from exporter.errors import CalibrationError, QuantizeError, RecipeError, TraceError
    from exporter.pipeline import export
    from exporter.recipe import Recipe, load_recipe
    from exporter.report import Report
    from exporter.source import Source, from_module, from_onnx, from_pretrained, from_program

__all__ = [
    "CalibrationError",
    "QuantizeError",
    "Recipe",
    "RecipeError",
    "Report",
    "Source",
    "TraceError",
    "export",
    "from_module",
    "from_onnx",
    "from_pretrained",
    "from_program",
    "load_recipe",
]

_MODULE_OF = {
    **dict.fromkeys(("CalibrationError", "QuantizeError", "RecipeError", "TraceError"), "exporter.errors"),
    "export": "exporter.pipeline",
    **dict.fromkeys(("Recipe", "load_recipe"), "exporter.recipe"),
    "Report": "exporter.report",
    **dict.fromkeys(("Source", "from_module", "from_onnx", "from_pretrained", "from_program"), "exporter.source"),
}


def __getattr__(name: str) -> typing.Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_MODULE_OF[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
