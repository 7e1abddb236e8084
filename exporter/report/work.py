"""Work: what the stages of one export returned; the report, the manifest and the bundle's files are made of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from exporter.bundle import Models, Recorded
from exporter.calibrate.enough import Enough
from exporter.collect import Collected
from exporter.correct import Corrected
from exporter.place import Plan
from exporter.prepare import Prepared
from exporter.recipe import Recipe
from exporter.search import Improved
from exporter.shrink import Shrunk
from exporter.split import Split
from exporter.target import Target
from exporter.trace import Traced


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One export, when its graph is what ships.

    name: of the source. notes: what people are told of the source and of the data.
    plan, corrected, target: as they ship, with what later steps changed of them.
    skipped: data files that were left out. untried: {optional step: why it was not taken}.
    kept: what was kept of a file that was in integers.
    """

    name: str
    notes: tuple[str, ...]
    recipe: Recipe
    target: Target
    traced: Traced
    prepared: Prepared
    split: Split
    skipped: tuple[str, ...]
    plan: Plan
    collected: Collected
    enough: Enough
    corrected: Corrected
    better: Improved
    shrunk: Shrunk
    recorded: Recorded
    models: Models
    untried: Mapping[str, str]
    kept: str
