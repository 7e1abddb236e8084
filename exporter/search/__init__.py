"""Plan + measured error + measured ms -> the cheapest plan that is accurate enough."""

from exporter.search.find import Found, Goal, Point, Problem, frontier, search
from exporter.search.improve import Caps, Improved, improve

__all__ = ["Caps", "Found", "Goal", "Improved", "Point", "Problem", "frontier", "improve", "search"]
