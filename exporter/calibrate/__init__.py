"""Graph + batches -> Statistics -> Ranges: streaming, in memory that does not grow with the data."""

from exporter.calibrate.domain import distinguish
from exporter.calibrate.observe import gather, observe, observer
from exporter.calibrate.ranges import Range, Ranges
from exporter.calibrate.statistics import Statistics

__all__ = ["Range", "Ranges", "Statistics", "distinguish", "gather", "observe", "observer"]
