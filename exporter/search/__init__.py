"""Plan + measured error + measured ms -> the cheapest plan that is accurate enough."""

from exporter.search.find import Found, Goal, Point, Problem, Run, search

__all__ = ["Found", "Goal", "Point", "Problem", "Run", "search"]
