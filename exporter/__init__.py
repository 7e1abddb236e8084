"""packlight, at export: a PyTorch or ONNX model -> an int8 bundle that proves itself."""

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
