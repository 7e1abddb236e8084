"""The report as one HTML page that needs no network; report.html of a bundle."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jinja2

from exporter.calibrate.enough import WORSE
from exporter.place import Plan

if TYPE_CHECKING:
    from exporter.report.value import Report

_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.PackageLoader("exporter.report", "templates"), autoescape=True, undefined=jinja2.StrictUndefined,
    trim_blocks=True, lstrip_blocks=True,
)  # fmt: skip


def render(report: Report, plan: Plan) -> str:
    """Asked, decided (every node with its reason), measured."""
    return _ENVIRONMENT.get_template("report.html").render(report=report, plan=plan, worse=WORSE)
