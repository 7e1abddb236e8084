"""Graph + batches -> Statistics -> Ranges: streaming, in memory that does not grow with the data."""

from exporter.calibrate.domain import Interval, distinguish, intervals
from exporter.calibrate.observe import gather, observe, observer
from exporter.calibrate.ranges import Range, Ranges
from exporter.calibrate.statistics import Statistics

__all__ = ["Interval", "Range", "Ranges", "Statistics", "distinguish", "gather", "intervals", "observe", "observer"]
