"""exporter.cluster.evaluate: the drift of one process."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from exporter import cluster
from exporter.batches import Batch
from exporter.calibrate.observe import CHUNK
from exporter.cluster import Cluster
from exporter.errors import CalibrationError
from runtime import drift
from runtime import manifest as manifests
from runtime.errors import PacklightError
from runtime.session import open_session
from tests.exporter import graphs
from tests.exporter.cluster.streams import GROUP
from tests.runtime import models
from tests.runtime.conftest import bundle_folder

__all__ = ["bundle_folder"]  # a bundle that takes no export

pytest.importorskip("distributed")


def test_drift_of_a_bundle_on_a_cluster_is_that_of_one_process(connected: Cluster, bundle_folder: Path) -> None:
    listed = manifests.loads((bundle_folder / manifests.MANIFEST).read_text(), "manifest")
    fp32 = open_session(bundle_folder / manifests.FP32, threads=1)
    int8 = open_session(bundle_folder / manifests.INT8, threads=1, entries=listed.session)
    names = [output.name for output in fp32.get_outputs()]
    count = GROUP + CHUNK + 1

    def batches() -> Iterator[Batch]:
        return ({"image": graphs.noise(number, 1 + number % 2, *models.IMAGE)} for number in range(count))

    def pairs() -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        for batch in batches():
            wanted, got = (dict(zip(names, each.run(names, dict(batch)), strict=True)) for each in (fp32, int8))
            yield wanted, got

    found = cluster.evaluate(connected, bundle_folder, batches())
    assert found == drift.measure(pairs())
    some = drift.total(itertools.islice(pairs(), 5))  # a part of it here, the rest there
    paths = (bundle_folder / name for name in (manifests.FP32, manifests.INT8))
    rest = itertools.islice(batches(), 5, None)
    more = cluster.total(connected, *(path.read_bytes() for path in paths), listed.session, rest, 5)
    assert drift.merge(some, more).drift() == found
    assert found.batches == count
    assert 5 < found.worst_snr_db < 60


def test_heldout_batch_that_the_models_refuse_is_named(connected: Cluster, bundle_folder: Path) -> None:
    batches = [{"image": graphs.noise(n, 1, *models.IMAGE)} for n in range(CHUNK)]
    batches[5] = {"image": graphs.noise(0, 1, 4, 16, 16)}
    with pytest.raises(CalibrationError, match="held-out batch 5: the model cannot run on it"):
        cluster.evaluate(connected, bundle_folder, batches)
    with pytest.raises(PacklightError, match="drift of no batches"):
        cluster.evaluate(connected, bundle_folder, [])
