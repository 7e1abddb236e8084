from __future__ import annotations

import onnx

from exporter.numerics import formats
from exporter.numerics.formats import FLOAT, FP16, FP32, INT4, INT8, SCHEMES, UINT4, UINT8, W8A8, W8A8_DYNAMIC

FORMATS = (INT8, UINT8, INT4, UINT4, FP16, FP32)


def test_codes_of_a_format_fill_its_bits_but_for_the_lowest_of_a_narrow_one() -> None:
    ends = {str(each): (each.lowest, each.highest, each.levels, each.middle) for each in FORMATS[:4]}
    assert ends == {
        "int8": (-127, 127, 255, 0), "uint8": (0, 255, 256, 128), "int4": (-8, 7, 16, 0), "uint4": (0, 15, 16, 8),
    }  # fmt: skip


def test_every_format_is_stored_in_a_type_of_onnx() -> None:
    assert [each.storage for each in FORMATS] == ["INT8", "UINT8", "INT4", "UINT4", "FLOAT16", "FLOAT"]
    assert all(onnx.TensorProto.DataType.Value(each.storage) for each in FORMATS)


def test_bytes_are_those_of_codes_scales_and_zero_points() -> None:
    shape = (10, 64)
    assert FP16.bytes(shape) == 1280
    assert INT8.per_channel(0).bytes(shape) == 640 + 40
    assert INT4.in_blocks(1, 32).bytes(shape) == 320 + 4 * 20
    assert UINT4.in_blocks(1, 32).bytes(shape) == 320 + 4 * 20 + 10


def test_scheme_is_found_by_its_word_in_a_plan() -> None:
    assert [SCHEMES[word] for word in ("int8", "dynamic", "float")] == [W8A8, W8A8_DYNAMIC, FLOAT]
    assert {str(each) for each in SCHEMES.values() if each.in_integers} == {"int8", "dynamic"}
    assert {str(each) for each in SCHEMES.values()} == set(SCHEMES)
    assert formats.W8A8.name == "W8A8"
