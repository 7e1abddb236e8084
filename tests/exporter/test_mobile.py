from __future__ import annotations

import logging

import numpy as np
import pytest

from exporter import mobile
from exporter.mobile import Left, Usability
from tests.exporter import graphs, int8

# two Conv, an op_type that neither takes, and a Conv again
TEXT = """(float[BATCH,3,8,8] x) => (float[BATCH,4,8,8] y) {
    [c0] a = Conv <pads=[1,1,1,1]> (x, w0)
    [c1] b = Conv <pads=[1,1,1,1]> (a, w1)
    [odd] c = Erf(b)
    [c2] y = Conv <pads=[1,1,1,1]> (c, w1)
}"""
WEIGHTS = {"w0": graphs.noise(1, 4, 3, 3, 3), "w1": graphs.noise(2, 4, 4, 3, 3)}


def judged(text: str, weights: dict[str, np.ndarray] = WEIGHTS) -> dict[str, Usability]:
    return {each.provider: each for each in mobile.judge(graphs.proto(text, weights, 17).SerializeToString())}


def test_node_without_a_converter_splits_the_graph_in_two() -> None:
    nnapi = judged(TEXT.replace("BATCH", "1"))["NNAPI"]
    assert (nnapi.nodes, nnapi.taken, nnapi.partitions) == (4, 3, 2)
    assert nnapi.left == (Left(op_type="Erf", nodes=1, reason="no converter"),)
    assert nnapi.verdict == nnapi.verdict_as_is == "no"  # 75 % in two parts; maybe wants more
    assert any(caveat.startswith("Conv:") for caveat in nnapi.caveats)


def test_graph_of_fixed_sizes_that_is_taken_whole_is_a_yes() -> None:
    whole = judged(TEXT.replace("BATCH", "1").replace("Erf", "Relu"))
    assert {each.verdict for each in whole.values()} == {"yes"}
    assert {(each.taken, each.taken_as_is, each.partitions) for each in whole.values()} == {(4, 4, 1)}


def test_named_dimension_is_taken_only_once_it_is_fixed() -> None:
    nnapi = judged(TEXT.replace("BATCH", "N").replace("Erf", "Relu"))["NNAPI"]
    assert (nnapi.verdict, nnapi.verdict_as_is, nnapi.taken, nnapi.taken_as_is) == ("yes", "no", 4, 0)


def test_weights_dequantized_are_neither_nodes_nor_taken() -> None:
    """The library counts [dw0] as one of four nodes, and with a free batch as the only one taken."""
    nnapi, *core_ml = mobile.judge(int8.matmul(np.ones((4, 4), np.int8)).SerializeToString())
    assert (nnapi.nodes, nnapi.taken, nnapi.taken_as_is) == (3, 3, 0)
    for each in core_ml:
        assert {left.op_type: left.nodes for left in each.left} == {"QuantizeLinear": 1, "DequantizeLinear": 1}
        assert (each.taken, each.verdict) == (1, "no")


def test_graph_without_nodes_that_compute_is_a_no() -> None:
    text = "(float[1] x) => (float[1] y) { [c] y = Identity(w) }"
    assert judged(text, {"w": graphs.noise(1, 1)})["NNAPI"].verdict == "no"


def test_library_stays_silent_and_leaves_logging_as_it_was(capfd: pytest.CaptureFixture[str]) -> None:
    before = logging.root.handlers[:], logging.root.level, logging.root.manager.disable
    judged(TEXT.replace("BATCH", "N"))
    assert (logging.root.handlers[:], logging.root.level, logging.root.manager.disable) == before
    assert capfd.readouterr() == ("", "")


def test_text_is_three_lines_a_provider_at_most_and_fits_80_columns() -> None:
    many = tuple(Left(op_type=f"Operator{n}", nodes=n, reason="no converter") for n in range(40))
    one = Usability(
        provider="Core ML NeuralNetwork", nodes=1000, taken=400, partitions=120, taken_as_is=0, verdict="maybe",
        verdict_as_is="no", left=many, caveats=(),
    )  # fmt: skip
    lines = mobile.render([one]).splitlines()
    assert len(lines) == 3 and max(map(len, lines)) <= 80
    assert lines[0].startswith("Core ML NeuralNetwork: maybe, 400 of 1000 nodes in 120 parts")
    assert lines[-1].endswith("...")
