"""One Report value, and text, JSON and HTML views of it."""

from exporter.report.make import files, lasting, make, manifest, pages, timed, verdict
from exporter.report.value import FloatLayer, KernelCount, Report
from exporter.report.work import Work

__all__ = [
    "FloatLayer",
    "KernelCount",
    "Report",
    "Work",
    "files",
    "lasting",
    "make",
    "manifest",
    "pages",
    "timed",
    "verdict",
]
