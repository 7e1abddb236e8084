"""Graph + batches -> Ranges: streaming, in memory bounded by one batch."""

from exporter.calibrate.domain import distinguish
from exporter.calibrate.observe import Observed, observe
from exporter.calibrate.ranges import Range, Ranges

__all__ = ["Observed", "Range", "Ranges", "distinguish", "observe"]
