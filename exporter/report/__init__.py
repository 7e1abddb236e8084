"""One Report value, and text, JSON and HTML views of it."""

from exporter.report.make import files, make, manifest, timed
from exporter.report.value import FloatLayer, KernelCount, Report

__all__ = ["FloatLayer", "KernelCount", "Report", "files", "make", "manifest", "timed"]
