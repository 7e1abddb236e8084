from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from numpy.typing import NDArray

from exporter import bear, graph, shrink
from runtime import drift
from runtime.kernels import trace
from runtime.session import open_session
from tests.exporter import graphs

Array = NDArray[Any]
Batches = list[dict[str, Array]]

TABLE = "(int64[N,S] i) => (float[N,S,64] y) { [g] y = Gather(t, i) }"
LSTM = """(float[S,N,32] x) => (float[S,1,N,64] y) {
    [lstm] y, h, c = LSTM <hidden_size=64> (x, w, r, b)
}"""
RECURRENT_WEIGHTS = {
    "w": graphs.noise(1, 1, 256, 32) / 6,
    "r": graphs.noise(2, 1, 256, 64) / 8,
    "b": graphs.noise(3, 1, 512),
}


def shrunk(model: ir.Model, batches: Batches, **arguments: Any) -> shrink.Shrunk:
    """The weights of a float graph; it is its own reference."""
    return shrink.weights(model, [graph.runner(model)(batch) for batch in batches], batches, **arguments)


def snr_db(before: ir.Model, after: ir.Model, batches: Batches) -> float:
    return drift.measure((graph.runner(before)(b), graph.runner(after)(b)) for b in batches).worst_snr_db


def initializers(model: ir.Model) -> dict[str, Array]:
    arrays = {name: graph.constant(value) for name, value in model.graph.initializers.items()}
    return {name: array for name, array in arrays.items() if array is not None}


def optimized(model: ir.Model, folder: Path) -> onnx.GraphProto:
    """The graph as ONNX Runtime runs it."""
    open_session(graph.to_bytes(model), optimized=folder / "optimized.onnx")
    return onnx.load(folder / "optimized.onnx").graph


def indices(seed: int, rows: int, *shape: int) -> Array:
    return np.random.default_rng(seed).integers(0, rows, shape)


def test_table_becomes_codes_and_real_numbers_behind_the_gather() -> None:
    table = graphs.noise(1, 1000, 64) * np.logspace(-2, 2, 64, dtype=np.float32)
    model = graphs.model(TABLE, {"t": table})
    found = shrunk(model, [{"i": indices(2, 1000, 3, 7)}])
    assert graphs.op_types(found.int8) == ["Gather", "Cast", "Mul"]
    arrays = initializers(found.int8)
    assert {name: (str(a.dtype), a.shape) for name, a in arrays.items()} == {
        "t_codes": ("int8", (1000, 64)),
        "t_scale": ("float32", (64,)),
    }
    assert arrays["t_codes"].min() == -127 or arrays["t_codes"].max() == 127
    np.testing.assert_allclose(arrays["t_scale"], np.abs(table).max(axis=0) / 127, rtol=1e-6)
    every = np.arange(1000).reshape(1, -1)
    error = np.abs(graph.runner(found.int8)({"i": every})["y"][0] - table)
    assert (error <= arrays["t_scale"] * 0.501).all()
    (stored,) = found.stored
    assert (stored.before, stored.after, stored.kept) == (256_000, 64_000 + 4 * 64, True)
    assert str(stored) == "t, Gather g: 0.26 -> 0.06 MB, int8, a scale a column, real numbers behind the Gather"
    assert found.after_db is not None and found.after_db > 38
    assert len(graph.to_bytes(found.int8)) < 0.27 * len(graph.to_bytes(model))


def test_table_whose_columns_are_gathered_has_one_scale_a_row() -> None:
    table = graphs.noise(1, 64, 1000) * np.logspace(-2, 2, 64, dtype=np.float32)[:, None]
    model = graphs.model("(int64[N] i) => (float[64,N] y) { [g] y = Gather <axis=-1> (t, i) }", {"t": table})
    found = shrunk(model, [{"i": np.arange(1000)}])
    assert initializers(found.int8)["t_scale"].shape == (64, 1)
    assert found.after_db is not None and found.after_db > 38


def test_onnxruntime_gathers_codes(tmp_path: Path) -> None:
    """It moves a Gather and what stands around it, where they are Q/DQ."""
    text = """(int64[N,S] i) => (float[N,64,S] y) {
        [g] e = Gather(t, i)
        [turn] y = Transpose <perm=[0,2,1]> (e)
    }"""
    found = shrunk(graphs.model(text, {"t": graphs.noise(1, 1000, 64)}), [{"i": indices(2, 1000, 3, 7)}])
    assert [node.op_type for node in optimized(found.int8, tmp_path).node] == ["Gather", "Cast", "Mul", "Transpose"]


def test_codes_behind_a_gather_have_the_bits_of_a_dequantizelinear() -> None:
    found = shrunk(graphs.model(TABLE, {"t": graphs.noise(1, 1000, 64)}), [{"i": indices(2, 1000, 3, 7)}])
    arrays = initializers(found.int8)
    text = "(int64[N,S] i) => (float[N,S,64] y) { g = Gather(c, i)  y = DequantizeLinear <axis=2> (g, s) }"
    plain = graphs.model(text, {"c": arrays["t_codes"], "s": arrays["t_scale"].reshape(-1)})
    batch = {"i": indices(3, 1000, 5, 9)}
    np.testing.assert_array_equal(graph.runner(found.int8)(batch)["y"], graph.runner(plain)(batch)["y"])


def test_gather_that_is_an_output_keeps_its_name_and_shape() -> None:
    found = shrunk(graphs.model(TABLE, {"t": graphs.noise(1, 1000, 64)}), [{"i": indices(2, 1000, 1, 5)}])
    (output,) = graph.outputs(found.int8)
    assert (output.name, output.shape) == ("y", ("N", "S", 64))


def test_small_table_is_folded_at_load(tmp_path: Path) -> None:
    found = shrunk(graphs.model(TABLE, {"t": graphs.noise(1, 100, 64)}), [{"i": indices(2, 100, 1, 5)}])
    assert graphs.op_types(found.int8) == ["Cast", "Mul", "Gather"]
    assert [node.op_type for node in optimized(found.int8, tmp_path).node] == ["Gather"]
    assert found.stored[0].why == "int8, real numbers again at load"


@pytest.mark.parametrize(("op_type", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
def test_recurrent_weights_become_codes_and_the_bias_does_not(op_type: str, gates: int) -> None:
    rows = gates * 64
    text = f"""(float[S,N,64] x) => (float[S,2,N,64] y) {{
        [rnn] y = {op_type} <hidden_size=64, direction="bidirectional"> (x, w, r, b)
    }}"""
    arrays = {
        "w": graphs.noise(1, 2, rows, 64) / 8,
        "r": graphs.noise(2, 2, rows, 64) / 8,
        "b": graphs.noise(3, 2, 2 * rows),
    }
    model = graphs.model(text, arrays)
    found = shrunk(model, [{"x": graphs.noise(4, 5, 2, 64)}])
    made = initializers(found.int8)
    assert set(made) == {"w_codes", "w_scale", "r_codes", "r_scale", "b"}
    assert made["r_codes"].dtype == np.int8 and made["r_scale"].shape == (2, rows, 1)
    np.testing.assert_array_equal(made["b"], arrays["b"])
    assert [stored.why for stored in found.stored] == ["int8, computes in float"] * 2
    assert found.after_db is not None and found.after_db > 35


def test_onnxruntime_folds_the_codes_of_a_layer_at_load(tmp_path: Path) -> None:
    found = shrunk(graphs.model(LSTM, RECURRENT_WEIGHTS), [{"x": graphs.noise(4, 5, 2, 32)}])
    assert graphs.op_types(found.int8) == ["Cast", "Mul", "Cast", "Mul", "LSTM"]
    assert [node.op_type for node in optimized(found.int8, tmp_path).node] == ["LSTM"]


@pytest.mark.skipif(not onnxruntime.__version__.startswith("1.31."), reason="a fact about 1.31")
def test_onnxruntime_does_not_fold_a_dequantizelinear(tmp_path: Path) -> None:
    """Why it is a Cast and a Mul; should this fail, DequantizeLinear is the better form."""
    text = """(float[S,N,32] x) => (float[S,1,N,64] y) {
        [dq] w = DequantizeLinear <axis=1> (codes, scale)
        [lstm] y, h, c = LSTM <hidden_size=64> (x, w, r)
    }"""
    codes = np.ones((1, 256, 32), np.int8)
    model = graphs.model(text, {"codes": codes, "scale": np.ones(256, np.float32), "r": RECURRENT_WEIGHTS["r"]})
    assert [node.op_type for node in optimized(model, tmp_path).node] == ["DequantizeLinear", "LSTM"]


def test_kernels_say_that_an_lstm_with_codes_computes_in_float(tmp_path: Path) -> None:
    batch = {"x": graphs.noise(4, 5, 2, 32)}
    found = shrunk(graphs.model(LSTM, RECURRENT_WEIGHTS), [batch])
    (tmp_path / "model.onnx").write_bytes(graph.to_bytes(found.int8))
    ran = trace(tmp_path / "model.onnx", batch, runs=1)
    (lstm,) = ran.kernels
    assert (lstm.kernel, lstm.types, lstm.integer, lstm.macs) == ("LSTM", "f32", False, 5 * 2 * 256 * (32 + 64))
    assert ran.integer_macs == 0.0


@pytest.mark.parametrize(
    ("op", "w", "scales"),
    [
        ("MatMul(x, w)", (64, 96), (96,)),
        ("MatMul(w, x)", (96, 64), (96, 1)),
        ("Gemm(x, w)", (64, 96), (96,)),
        ("Gemm <transB=1> (x, w)", (96, 64), (96, 1)),
    ],
)
def test_weight_of_a_float_layer_has_one_scale_an_output(op: str, w: tuple[int, int], scales: tuple[int, ...]) -> None:
    weight = graphs.noise(1, *w) * np.where(np.ones(scales) > 0, np.geomspace(0.01, 100, 96).reshape(scales), 1)
    model = graphs.model(f"(float[64,64] x) => (float[R,C] y) {{ [fc] y = {op} }}", {"w": weight.astype(np.float32)})
    found = shrunk(model, [{"x": graphs.noise(2, 64, 64)}])
    assert initializers(found.int8)["w_scale"].shape == scales
    assert found.after_db is not None and found.after_db > 38


@pytest.mark.parametrize(("op", "channels", "scales"), [("Conv", 16, (32, 1, 1, 1)), ("ConvTranspose", 32, (16, 1, 1))])
def test_weight_of_a_float_conv_has_one_scale_a_channel(op: str, channels: int, scales: tuple[int, ...]) -> None:
    text = f"(float[N,{channels},8,8] x) => (float[N,C,H,W] y) {{ [conv] y = {op}(x, w) }}"
    model = graphs.model(text, {"w": graphs.noise(1, 32, 16, 3, 3)})
    found = shrunk(model, [{"x": graphs.noise(2, 1, channels, 8, 8)}])
    assert initializers(found.int8)["w_scale"].shape == scales
    assert found.after_db is not None and found.after_db > 38


def test_table_that_a_layer_reads_too_is_stored_once() -> None:
    text = """(int64[N] i, float[M,1000] x) => (float[N,64] y, float[M,64] z) {
        [g] y = Gather(t, i)
        [fc] z = MatMul(x, t)
    }"""
    model = graphs.model(text, {"t": graphs.noise(1, 1000, 64)})
    batch = {"i": indices(2, 1000, 9), "x": graphs.noise(3, 4, 1000)}
    found = shrunk(model, [batch])
    assert [name for name, array in initializers(found.int8).items() if array.size > 64] == ["t_codes"]
    assert found.stored[0].readers == ("g", "fc")
    assert snr_db(model, found.int8, [batch]) > 38


def test_gather_inside_a_branch_reads_the_folded_table() -> None:
    text = """(int64[N] i, bool c) => (float[N,64] y) {
        y = If (c) <
            then_branch = one () => (float[N,64] a) { [inner] a = Gather(t, i) },
            else_branch = two () => (float[N,64] b) { [other] b0 = Gather(t, i)  b = Neg(b0) }
        >
    }"""
    model = graphs.model(text, {"t": graphs.noise(1, 500, 64)})
    batches: Batches = [{"i": indices(2, 500, 9), "c": np.array(c)} for c in (True, False)]
    found = shrunk(model, batches)
    assert graphs.op_types(found.int8) == ["Cast", "Mul", "If"]
    assert found.stored[0].kept and snr_db(model, found.int8, batches) > 38


def test_weight_that_another_node_reads_stays_float_and_says_so() -> None:
    text = """(int64[N] i) => (float[N,64] y, float[100,64] z) {
        [g] y = Gather(t, i)
        [add] z = Add(t, one)
    }"""
    model = graphs.model(text, {"t": graphs.noise(1, 100, 64), "one": np.float32(1)})
    found = shrunk(model, [{"i": np.arange(3)}])
    (stored,) = found.stored
    assert (stored.kept, stored.why, stored.after) == (False, "float: Add add reads it too", 25_600)
    assert found.before_db is None and graph.to_bytes(found.int8) == graph.to_bytes(model)


def test_table_with_infinity_stays_float() -> None:
    table = graphs.noise(1, 100, 64)
    table[0, 0] = -np.inf
    found = shrunk(graphs.model(TABLE, {"t": table}), [{"i": np.ones((1, 3), np.int64)}])
    assert found.stored[0].why == "float: it holds NaN or infinity"


def test_weights_of_nodes_to_be_left_alone_stay_float() -> None:
    found = shrunk(graphs.model(TABLE, {"t": graphs.noise(1, 100, 64)}), [{"i": np.ones((1, 3), np.int64)}], left={"g"})
    assert found.stored[0].why == "float: g is to be left alone"


def test_small_weights_and_integer_tables_are_not_looked_at() -> None:
    small = graphs.model(TABLE, {"t": graphs.noise(1, 63, 64)})
    text = "(int64[N] i) => (int64[N,64] y) { [g] y = Gather(t, i) }"
    wide = graphs.model(text, {"t": np.arange(64_000).reshape(1000, 64)})
    assert shrunk(small, [{"i": np.ones((1, 3), np.int64)}]).stored == ()
    assert shrunk(wide, [{"i": np.ones(3, np.int64)}]).stored == ()


def test_column_of_zeros_stays_zero() -> None:
    table = graphs.noise(1, 100, 64)
    table[:, 5] = 0
    found = shrunk(graphs.model(TABLE, {"t": table}), [{"i": np.arange(100).reshape(1, -1)}])
    made = graph.runner(found.int8)({"i": np.arange(100).reshape(1, -1)})["y"]
    assert (made[..., 5] == 0).all() and initializers(found.int8)["t_scale"][5] == 1


# The first row of `bad` is large and meets zeros: with one scale a column nothing is left of the other rows
TWO = "(float[N,64] x) => (float[N,96] y) { [first] a = MatMul(x, good)  [second] b = MatMul(x, bad)  y = Add(a, b) }"


def two() -> tuple[ir.Model, Batches]:
    bad = graphs.noise(2, 64, 96)
    bad[0] = 1000
    batches: Batches = [{"x": graphs.noise(n, 8, 64)} for n in (3, 4)]
    for batch in batches:
        batch["x"][:, 0] = 0
    return graphs.model(TWO, {"good": graphs.noise(1, 64, 96), "bad": bad}), batches


def test_weight_that_harms_stays_float_and_the_others_become_codes() -> None:
    model, batches = two()
    found = shrunk(model, batches)
    by_name = {stored.name: stored for stored in found.stored}
    assert by_name["good"].kept and not by_name["bad"].kept
    assert by_name["bad"].alone_db is not None and by_name["bad"].alone_db < 15
    assert by_name["bad"].why == f"float: as int8 it costs too much, SNR {by_name['bad'].alone_db:.1f} dB"
    assert found.after_db == by_name["good"].alone_db == snr_db(model, found.int8, batches) > bear.AIM_DB
    assert set(initializers(found.int8)) == {"good_codes", "good_scale", "bad"}


def test_snr_that_was_asked_for_stays() -> None:
    model, batches = two()
    found = shrunk(model, batches, floor_db=60.0)
    assert not any(stored.kept for stored in found.stored)
    assert found.after_db == found.before_db and graph.to_bytes(found.int8) == graph.to_bytes(model)


def test_aim_is_as_low_as_asked() -> None:
    model, batches = two()
    assert all(stored.kept for stored in shrunk(model, batches, aim_db=1.0).stored)
    assert not any(stored.kept for stored in shrunk(model, batches, aim_db=60.0).stored)


def test_notes_tell_each_reader_of_its_weights() -> None:
    model = graphs.model(LSTM, RECURRENT_WEIGHTS)
    found = shrunk(model, [{"x": graphs.noise(4, 5, 2, 32)}])
    assert found.notes == {"lstm": "r int8, computes in float; w int8, computes in float"}


def test_snr_below_what_is_comfortable_falls_by_little() -> None:
    """Against a reference 20 dB away codes of 40 dB cost nothing, and those of a weight that ruins all are still refused."""
    model, batches = two()
    noisy = [
        {"y": y + graphs.noise(9, *y.shape) * y.std() / 10} for y in (graph.runner(model)(b)["y"] for b in batches)
    ]
    found = shrink.weights(model, noisy, batches)
    assert found.before_db is not None and found.after_db is not None
    assert 19 < found.before_db < 21 and found.after_db > found.before_db - bear.ALLOWED_DB
    assert [stored.kept for stored in found.stored] == [True, False]


def test_graph_is_not_changed_and_the_result_has_the_same_bytes_again() -> None:
    model, batches = two()
    before = graph.to_bytes(model)
    once, again = (graph.to_bytes(shrunk(model, batches).int8) for _ in range(2))
    assert graph.to_bytes(model) == before and once == again
