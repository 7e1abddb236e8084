"""FP32 graph -> nearly equal FP32 graph whose numbers survive rounding better: one method a file, kept only if it helped."""

from exporter.correct.choose import Corrected, Correction, improve, source, under

__all__ = ["Corrected", "Correction", "improve", "source", "under"]
