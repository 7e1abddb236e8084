"""FP32 graph -> nearly equal FP32 graph whose numbers survive rounding better: one method a file, kept only if it helped."""

from exporter.correct.choose import Corrected, Correction, improve, source, under
from exporter.correct.opened import GATES, Opened
from exporter.correct.opened import improve as open_gates

__all__ = ["GATES", "Corrected", "Correction", "Opened", "improve", "open_gates", "source", "under"]
