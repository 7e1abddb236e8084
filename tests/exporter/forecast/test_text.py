from __future__ import annotations

import json
import math
from dataclasses import replace

from exporter.forecast import Clipped, Forecast, text
from runtime.drift import Drift, OutputDrift
from runtime.manifest import canonical


def drift(snr_db: float, max_abs: float, same_top1: float | None) -> Drift:
    output = OutputDrift(
        name="logits",
        snr_db=snr_db,
        cosine=0.9,
        rms=1.0,
        max_abs=max_abs,
        mean_abs=0.1,
        same_top1=same_top1,
        elements=8,
    )
    return Drift(outputs=(output,), batches=4)


CLIPPING = Forecast(
    layers=(
        Clipped(node="features/" * 9 + "conv", kernel="QLinearConv", pairs=5624, clipped=0.0126, worst=9000),
        Clipped(node="rare", kernel="MatMulIntegerToFloat", pairs=1, clipped=1e-6, worst=3),
        Clipped(node="quiet", kernel="QGemm", pairs=1, clipped=0.0, worst=0),
    ),
    drift=drift(7.47, 2.85, 0.25),
    with_vnni=drift(25.9, 0.2, 1.0),
    without_vnni=drift(7.3, 2.9, 0.25),
    rounds_here=("soft", "dot"),
)
CLEAN = replace(CLIPPING, layers=(), drift=drift(math.inf, 0.0, 1.0), without_vnni=CLIPPING.with_vnni, rounds_here=())


def test_clipping_layers_are_listed_with_share_and_what_to_do() -> None:
    said = text.render(CLIPPING, "lite0").splitlines()
    assert max(map(len, said)) <= text.WIDTH
    assert said[0] == "lite0 on x86 without VNNI (AVX2, or AVX512 alone)"
    assert [line.split()[-5:] for line in said if "QLinearConv" in line] == [
        ["features/featur…es/features/conv", "QLinearConv", "5624", "1.26", "%"]
    ]
    assert any(line.startswith("rare") and line.endswith("< 0.01 %") for line in said)
    assert not any("quiet" in line for line in said)
    whole = " ".join(" ".join(said).split())
    assert "3 can clip, for their weights break the pair rule; 2 of them did" in whole
    assert "logits: SNR 7.5 dB against those with VNNI, max abs 2.85, same top-1 25.00 %" in whole
    assert "SNR 25.9 dB with VNNI, 7.3 dB without; same top-1 100.00 %, 25.00 %" in whole
    assert "2 nodes in float round as this CPU does: soft, dot" in whole
    assert "export for target portable or x86-avx2" in whole


def test_model_that_cannot_clip_says_so_in_few_lines() -> None:
    said = " ".join(text.render(CLEAN, "lite0").split())
    assert "none can clip" in said
    assert "logits: as with VNNI, bit for bit" in said
    assert "export" not in said and "round as this CPU" not in said


def test_forecast_is_canonical_json() -> None:
    read = json.loads(canonical(CLIPPING))
    assert read["layers"][0]["clipped"] == 0.0126
    assert json.loads(canonical(CLEAN))["drift"]["outputs"][0]["snr_db"] == "inf"
