"""The report as one HTML page that needs no network; report.html of a bundle."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

import jinja2

from exporter import optional
from exporter.calibrate.enough import WORSE
from exporter.place import Plan
from runtime.exported import number

if TYPE_CHECKING:
    from exporter.report.value import Report

_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.PackageLoader("exporter.report", "templates"), autoescape=True, undefined=jinja2.StrictUndefined,
    trim_blocks=True, lstrip_blocks=True,
)  # fmt: skip


def render(report: Report, plan: Plan) -> str:
    """Asked, decided (every node with its reason), measured; the report's text alone where the page cannot be made."""

    def rendered() -> str:
        return _ENVIRONMENT.get_template("report.html").render(report=report, plan=plan, worse=WORSE, number=number)

    page = optional.attempt(rendered, "")
    if not page.why:
        return page.value
    said = escape(f"{report}\n\nno more than this, because {page.why}")
    return f"<!doctype html><title>{escape(report.name)}</title><pre>{said}</pre>"
