"""Plan + measured error + measured ms -> the cheapest plan that is accurate enough."""

from exporter.search.find import Found, Goal, Point, Problem, search

__all__ = ["Found", "Goal", "Point", "Problem", "search"]
