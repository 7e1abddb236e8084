"""The stages' results for tests/models.py, made once a run. They are shared: clone a graph before changing it."""

from __future__ import annotations

import functools

from exporter import graph, place, prepare, trace
from exporter.place import Plan
from exporter.prepare import Prepared
from exporter.target import X86_VNNI
from exporter.trace import Traced
from tests import models


@functools.cache
def traced(name: str) -> Traced:
    return trace.to_onnx(models.source(name))


@functools.cache
def prepared(name: str) -> Prepared:
    return prepare.to_quantizable(traced(name).model, next(models.batches(name, 0, 1)))


@functools.cache
def plan(name: str) -> Plan:
    made = prepared(name).model
    return place.decide(made, X86_VNNI, (), graph.shapes(made, next(models.batches(name, 0, 1))))
