"""Plan + measured error + measured ms -> the cheapest plan that is accurate enough."""

from exporter.search.find import Found, minutes, search
from exporter.search.improve import Caps, Improved, improve, limits, unsearched
from exporter.search.score import Goal, Point, Problem, compared, frontier

__all__ = [
    "Caps",
    "Found",
    "Goal",
    "Improved",
    "Point",
    "Problem",
    "compared",
    "frontier",
    "improve",
    "limits",
    "minutes",
    "search",
    "unsearched",
]
