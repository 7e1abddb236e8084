from __future__ import annotations

import math

import numpy as np
import pytest

from runtime import drift
from runtime.drift import Ground, OutputDrift
from runtime.errors import PacklightError
from runtime.judged import Judged, Part


def one(reference: object, candidate: object) -> OutputDrift:
    return drift.measure([({"y": np.asarray(reference)}, {"y": np.asarray(candidate)})]).outputs[0]


def test_numbers_by_hand() -> None:
    found = one(np.float32([[3.0, 4.0]]), np.float32([[3.0, 4.5]]))
    assert found.snr_db == pytest.approx(20.0, abs=1e-12)  # |r| = 5, |e| = 0.5
    assert found.cosine == pytest.approx((9 + 18) / (5 * math.hypot(3, 4.5)), abs=1e-12)
    assert (found.max_abs, found.mean_abs, found.same_top1, found.elements) == (0.5, 0.25, 1.0, 2)


def test_snr_is_that_of_onnxruntime() -> None:
    debug = pytest.importorskip("onnxruntime.quantization.qdq_loss_debug")
    rng = np.random.default_rng(0)
    r = rng.standard_normal((4, 100)).astype(np.float32)
    c = r + rng.standard_normal(r.shape).astype(np.float32) / 50
    theirs = debug.compute_signal_to_quantization_noice_ratio(r, c)
    assert one(r, c).snr_db == pytest.approx(theirs, abs=1e-4)  # theirs accumulates in float32


def test_batches_are_one_long_output_and_their_order_does_not_matter() -> None:
    rng = np.random.default_rng(0)
    pairs = [(r, r + rng.standard_normal(r.shape) / 9) for r in rng.standard_normal((5, 4, 6))]
    batched = drift.measure([({"y": r}, {"y": c}) for r, c in pairs])
    backwards = drift.measure([({"y": r}, {"y": c}) for r, c in reversed(pairs)])
    whole = one(np.concatenate([r for r, _ in pairs]), np.concatenate([c for _, c in pairs]))
    assert batched.batches == 5
    for found in (batched.outputs[0], backwards.outputs[0]):
        assert found.snr_db == pytest.approx(whole.snr_db, rel=1e-12)
        assert (found.max_abs, found.same_top1, found.elements) == (whole.max_abs, whole.same_top1, 120)


def test_blocks_do_not_change_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    r, c = rng.standard_normal((2, 1000))
    whole = one(r, c)
    monkeypatch.setattr(drift, "BLOCK", 7)
    assert one(r, c).snr_db == pytest.approx(whole.snr_db, rel=1e-12)


def test_equal_outputs_are_at_infinite_snr_and_cosine_one() -> None:
    found = one([[0.1, 0.7]], [[0.1, 0.7]])
    assert (found.snr_db, found.cosine, found.max_abs) == (math.inf, 1.0, 0.0)
    assert one([0.0, 0.0], [0.0, 0.0]).snr_db == math.inf


def test_error_on_a_zero_reference_is_minus_infinity() -> None:
    found = one([0.0, 0.0], [0.0, 1e-9])
    assert (found.snr_db, found.cosine) == (-math.inf, 0.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_candidate_that_is_not_finite_is_as_bad_as_can_be(bad: float) -> None:
    found = one([[1.0, 2.0]], [[1.0, bad]])
    assert (found.snr_db, found.cosine, found.max_abs, found.mean_abs) == (-math.inf, 0.0, math.inf, math.inf)


def test_finite_candidate_where_the_reference_is_not_is_as_bad() -> None:
    assert one([1.0, math.inf], [1.0, 5.0]).snr_db == -math.inf
    assert one([math.inf], [-math.inf]).snr_db == -math.inf


def test_same_infinity_or_nan_on_both_sides_agrees() -> None:
    found = one([3.0, 4.0, -math.inf, math.nan], [3.0, 4.5, -math.inf, math.nan])
    assert found.snr_db == pytest.approx(20.0, abs=1e-12)
    assert (found.max_abs, found.elements) == (0.5, 4)


def test_integer_and_boolean_outputs_are_compared_as_numbers() -> None:
    assert one(np.int64([3, 4]), np.int64([3, 4])).snr_db == math.inf
    assert one(np.uint8([3, 4]), np.uint8([4, 4])).max_abs == 1.0  # and 3 - 4 does not wrap
    assert one(np.int64([6, 8]), np.int64([6, 7])).snr_db == pytest.approx(20.0, abs=1e-12)
    assert one(np.array([True, False]), np.array([True, True])).mean_abs == 0.5


def test_same_top1_is_the_share_of_rows_whose_argmax_agrees() -> None:
    assert (
        one(
            [[1.0, 2.0], [2.0, 1.0], [0.0, 1.0], [5.0, 1.0]], [[1.0, 2.0], [1.0, 2.0], [0.0, 9.0], [5.0, 1.0]]
        ).same_top1
        == 0.75
    )


@pytest.mark.parametrize("shape", [(4,), (4, 1), (1, 4, 2), ()])
def test_output_that_does_not_look_like_classes_has_no_top1(shape: tuple[int, ...]) -> None:
    assert one(np.ones(shape), np.ones(shape)).same_top1 is None


def test_integer_output_has_no_top1() -> None:
    assert one(np.ones((4, 3), np.int64), np.ones((4, 3), np.int64)).same_top1 is None


def test_empty_output_is_no_drift() -> None:
    found = one(np.zeros((0, 5)), np.zeros((0, 5)))
    assert (found.snr_db, found.mean_abs, found.same_top1, found.elements) == (math.inf, 0.0, None, 0)


def test_worst_snr_is_that_of_the_worst_output() -> None:
    reference = {"good": np.array([1.0]), "bad": np.array([1.0])}
    candidate = {"good": np.array([1.0]), "bad": np.array([0.9])}
    found = drift.measure([(reference, candidate)])
    assert found.worst_snr_db == pytest.approx(20.0)
    assert [output.name for output in found.outputs] == ["good", "bad"]


def test_names_shapes_and_absence_are_refused() -> None:
    y = np.zeros(2)
    with pytest.raises(PacklightError, match="no batches"):
        drift.measure([])
    with pytest.raises(PacklightError, match="batch 0: found z, expected outputs y"):
        drift.measure([({"y": y}, {"z": y})])
    with pytest.raises(PacklightError, match=r"batch 1, output y: found shape \[1, 2\], expected \[2\]"):
        drift.measure([({"y": y}, {"y": y}), ({"y": y}, {"y": y[None]})])
    found = drift.measure([({"y": y}, {"y": y}), ({"y": y}, {"y": y[:1]})]).outputs[0]
    assert (found.by, found.matched) == ("set", 1.0)  # another size: how many it has depends on the data


def whole(constant: object, *parts: Part) -> dict[str, Ground]:
    return {"y": Ground(judged=Judged(by="reals", parts=(Part(), *parts)), constant=np.asarray(constant, np.float64))}


def test_constant_part_of_an_output_is_no_signal() -> None:
    r = np.float32([[288.1, 287.9], [287.9, 288.1]])
    found = drift.measure([({"y": r}, {"y": np.full_like(r, 288.0)})], whole([[288.0, 288.0]])).outputs[0]
    assert found.snr_db > 60
    assert found.varying_db == pytest.approx(0.0, abs=1e-3)  # all of what varies is gone
    assert found.parts[0].part.varying_rms == pytest.approx(0.1, rel=1e-3)
    assert drift.Drift(outputs=(found,), batches=1).worst_snr_db == found.varying_db + drift.HIDDEN_DB


def test_part_of_an_output_is_judged_by_itself() -> None:
    r = np.float32([[600.0, 40.0, 0.9], [30.0, 500.0, 0.1]])
    c = np.float32([[600.0, 40.0, 0.0], [30.0, 500.0, 0.0]])
    boxes, scores = Part(axis=1, runs=((0, 2),)), Part(axis=1, runs=((2, 3),))
    found = drift.measure([({"y": r}, {"y": c})], whole([[300.0, 300.0, 0.5]], boxes, scores)).outputs[0]
    assert found.snr_db > 50
    assert found.worst is not None and found.worst.where == "channels 2"
    assert found.varying_db == pytest.approx(10 * math.log10(0.32 / 0.82), abs=1e-3)
    assert [part.varying_db for part in found.parts][1] == math.inf


def test_constant_output_is_judged_by_its_numbers_and_steers_nothing() -> None:
    same, moving = np.float32([[5.0], [5.0]]), np.float32([[1.0], [-1.0]])
    against = {name: Ground(judged=Judged(by="reals", parts=(Part(),)), constant=np.asarray(mean)) for name, mean in
               (("same", 5.0), ("moving", 0.0))}  # fmt: skip
    found = drift.measure([({"same": same, "moving": moving}, {"same": same * 0.9, "moving": moving * 0.999})], against)
    assert found.outputs[0].constant and found.outputs[0].varying_db == pytest.approx(20.0, abs=1e-3)
    assert found.worst_snr_db == pytest.approx(60.0, abs=1e-2)


def test_device_measures_with_what_the_export_recorded_as_the_export_did() -> None:
    rng = np.random.default_rng(0)
    r = rng.standard_normal((4, 3)).astype(np.float32) + 50
    c = r + rng.standard_normal(r.shape).astype(np.float32) / 20
    part = Part(axis=1, runs=((1, 3),))
    there = drift.measure([({"y": r}, {"y": c})], whole([[50.0, 50.0, 50.0]], part)).outputs[0]
    recorded = drift.grounds({"y": Judged(by="reals", parts=tuple(each.part for each in there.parts))})
    here = drift.measure([({"y": r}, {"y": c})], recorded).outputs[0]
    assert [each.varying_db for each in here.parts] == pytest.approx([each.varying_db for each in there.parts])
    alone = drift.measure([({"y": r[:1]}, {"y": r[:1] + np.float32(2)})], recorded).outputs[
        0
    ]  # one sample varies in nothing
    assert alone.varying_db == pytest.approx(
        20 * math.log10(min(p.part.varying_rms or 0 for p in there.parts) / 2), abs=1e-4
    )


def test_totals_of_parts_merge_to_the_bits_of_one_pass() -> None:
    rng = np.random.default_rng(0)
    pairs = [({"y": r}, {"y": r + rng.standard_normal(r.shape) / 9}) for r in rng.standard_normal((5, 4, 6)) + 7]
    against = whole(np.full((1, 6), 7.0), Part(axis=1, runs=((0, 2), (4, 6))))
    shards = [drift.total(pairs[at : at + 1], at, against) for at in (3, 0, 4, 2, 1)]
    merged = shards[0]
    for shard in shards[1:]:
        merged = drift.merge(merged, shard)
    assert merged.drift() == drift.total(pairs, against=against).drift()


def test_integers_are_judged_by_the_share_that_is_equal_and_steer_nothing() -> None:
    pair = (
        {"ids": np.int64([1, 2, 3, 4]), "y": np.float32([1.0])},
        {"ids": np.int64([1, 2, 3, 9]), "y": np.float32([1.01])},
    )
    found = drift.measure([pair])
    assert (found.outputs[0].by, found.outputs[0].equal) == ("equal", 0.75)
    assert found.worst_snr_db == pytest.approx(40.0, abs=1e-3)


def test_sets_of_other_sizes_are_compared_by_partners() -> None:
    boxes = Ground(judged=Judged(by="set", axis=0))
    r = np.float32([[10, 10, 100, 100], [300, 300, 400, 400], [0, 0, 50, 50]])
    c = np.float32([[0, 1, 51, 50], [11, 10, 101, 100]])
    found = drift.measure([({"b": r}, {"b": c})], {"b": boxes}).outputs[0]
    assert (found.matched, found.equal) == (pytest.approx(2 / 3), 0.0)
    kept = Ground(judged=Judged(by="set", axis=1))
    found = drift.measure(
        [({"k": np.int64([[0, 0], [1, 5]])}, {"k": np.int64([[0, 0, 2], [5, 4, 2]])})], {"k": kept}
    ).outputs[0]
    assert found.matched == 0.5  # columns are items: (0, 5) is there, (0, 1) is not
