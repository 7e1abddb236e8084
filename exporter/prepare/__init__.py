"""FP32 graph -> equal FP32 graph that quantizes well: one rewrite a file, applied in the order `apply.REWRITES` lists."""

from exporter.prepare.apply import Prepared, to_quantizable

__all__ = ["Prepared", "to_quantizable"]
