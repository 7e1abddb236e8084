"""Graph + batches -> Ranges: streaming, in memory bounded by one batch."""

from exporter.calibrate.observe import observe
from exporter.calibrate.ranges import Range, Ranges

__all__ = ["Range", "Ranges", "observe"]
