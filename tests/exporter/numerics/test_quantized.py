from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from exporter.numerics.formats import INT4, INT8, UINT4, UINT8, Format, PerBlock, PerChannel, PerTensor
from exporter.numerics.quantized import QuantizedTensor, decode, encode, per_channel, symmetric
from runtime.session import open_session
from tests.exporter import graphs

TILES = [PerTensor(), PerChannel(0), PerChannel(1), PerBlock(1, 16), PerBlock(0, 4)]


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("form", [INT8, UINT8, INT4, UINT4], ids=str)
def test_nearest_code_is_within_half_a_step_of_its_number(
    form: Format, tile: PerTensor | PerChannel | PerBlock
) -> None:
    real = graphs.noise(0, 12, 64)
    found = encode(real, form.tiled(tile))
    assert found.codes.min() >= form.lowest and found.codes.max() <= form.highest
    step = np.broadcast_to(found.scale.max(), real.shape)
    assert (np.abs(decode(found) - real) <= 0.5001 * step + (0 if form.symmetric else step)).all()
    assert decode(encode(decode(found), form.tiled(tile))) == pytest.approx(decode(found), abs=1e-6)


@pytest.mark.parametrize("tile", TILES[1:], ids=str)
def test_smaller_tiles_lose_less_than_one_scale_for_all(tile: PerChannel | PerBlock) -> None:
    real = graphs.noise(1, 12, 64) * np.geomspace(0.01, 1, 64).astype(np.float32)
    error = [np.square(decode(encode(real, INT4.tiled(each))) - real).sum() for each in (PerTensor(), tile)]
    assert error[1] < error[0]


@pytest.mark.parametrize("form", [INT8, UINT8], ids=str)
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_real_numbers_are_those_of_onnxs_dequantizelinear(
    form: Format, tile: PerTensor | PerChannel | PerBlock
) -> None:
    found = encode(graphs.noise(2, 12, 64), form.tiled(tile))
    zero = np.zeros(found.scale.shape, found.codes.dtype) if found.zero_point is None else found.zero_point
    given = {"codes": found.codes, "scale": found.scale, "zero": zero}
    settings = {"block_size": tile.size} if isinstance(tile, PerBlock) else {}
    node = helper.make_node("DequantizeLinear", list(given), ["y"], axis=getattr(tile, "axis", 0), **settings)
    graph = helper.make_graph(
        [node], "g", [], [helper.make_tensor_value_info("y", TensorProto.FLOAT, [12, 64])],
        [numpy_helper.from_array(array, name) for name, array in given.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    (y,) = open_session(onnx.ModelProto.SerializeToString(model)).run(None, {})
    assert np.array_equal(y, decode(found))


def test_tensor_of_nothing_has_scale_one_and_stays_nothing() -> None:
    for form in (INT8.per_channel(0), UINT8.per_channel(0), UINT4.in_blocks(1, 16)):
        found = encode(np.zeros((3, 32), np.float32), form)
        assert (found.scale == 1).all() and not decode(found).any()


def test_unsigned_symmetric_codes_lie_about_the_middle() -> None:
    form = Format(bits=4, signed=False)
    codes, scale = symmetric(np.float32([[-7, 0, 3.5]]), (1,), form)
    assert (codes.tolist(), scale.tolist()) == ([[1, 8, 12]], [[1.0]])
    assert decode(QuantizedTensor(codes=codes, scale=scale[:, 0], format=form.per_channel(0))).tolist() == [[-7, 0, 4]]


def test_scales_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"scale \(3,\), expected \(4,\)"):
        per_channel(np.zeros((3, 4), np.int8), np.ones(3, np.float32), 1)
    with pytest.raises(ValueError, match="no multiple of 32"):
        encode(np.zeros((3, 33), np.float32), INT8.in_blocks(1, 32))
