"""The pair rule, kernel by kernel: what CPUs without VNNI compute, held against exact integers.

Every layer comes three times: with codes of full range, with the same codes under the rule, and with the rule kept by the
pairs one further, (2k+1, 2k+2). Activations are 255 for the most part, so that pairs reach as far as they can.
"""

from __future__ import annotations

import functools
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from exporter import dynamic, graph
from exporter.correct import rounding
from exporter.numerics import pairing
from exporter.numerics.quantized import per_channel
from runtime import cpu
from runtime.kernels import trace
from tests.devices import layers
from tests.devices.layers import Array, Codes, Layer, Window
from tests.exporter import graphs

WITHOUT_VNNI = ("avx512", "avx2")
KINDS: Mapping[str, Callable[[Array], Array]] = {
    "full": lambda rows: rows,
    "kept": pairing.keep,
    "shifted": lambda rows: np.hstack([rows[:, :1], pairing.keep(rows[:, 1:])]),
}
# name: channels in, channels out, kernel, window
CONVS: Mapping[str, tuple[int, int, tuple[int, ...], Window]] = {
    "plain": (8, 16, (3, 3), Window()),
    "padded": (8, 16, (3, 3), Window(pad=1)),
    "strided": (8, 16, (3, 3), Window(pad=1, stride=2)),
    "dilated": (8, 9, (3, 3), Window(pad=2, dilation=2)),
    "1 channel": (1, 8, (3, 3), Window(pad=1)),
    "2 channels": (2, 16, (3, 3), Window(pad=1)),
    "3 channels": (3, 32, (3, 3), Window(pad=1, stride=2)),
    "5 channels": (5, 7, (3, 3), Window(pad=1)),
    "7 channels": (7, 24, (3, 3), Window(pad=1)),
    "12 channels 5x5": (12, 16, (5, 5), Window(pad=2)),
    "32 channels": (32, 48, (3, 3), Window(pad=1)),
    "2x2": (3, 16, (2, 2), Window(stride=2)),
    "1 place": (3, 16, (9, 9), Window()),
    "1x1": (16, 32, (1, 1), Window()),
    "1x1 odd": (15, 7, (1, 1), Window()),
    "1x1 strided": (12, 16, (1, 1), Window(stride=2)),
    "2 groups": (8, 16, (3, 3), Window(pad=1, groups=2)),
    "2 groups odd": (6, 10, (3, 3), Window(pad=1, groups=2)),
    "8 groups": (16, 16, (3, 3), Window(pad=1, groups=8)),
    "8 groups odd": (24, 32, (3, 3), Window(pad=1, groups=8)),
    "1-D": (5, 8, (3,), Window(pad=1)),
    "3-D": (3, 8, (3, 3, 3), Window(pad=1)),
    # a multiplier of channels is no depthwise kernel in ONNX Runtime: these pair
    "multiplier": (16, 32, (3, 3), Window(pad=1, groups=16)),
    "multiplier 5x5": (8, 16, (5, 5), Window(pad=2, groups=8)),
}
DEPTHWISE: Mapping[str, tuple[int, int, tuple[int, ...], Window]] = {
    "depthwise 3x3": (16, 16, (3, 3), Window(pad=1, groups=16)),
    "depthwise 3x3 odd": (13, 13, (3, 3), Window(pad=1, groups=13)),
    "depthwise 3x3 strided": (32, 32, (3, 3), Window(pad=1, stride=2, groups=32)),
    "depthwise 3x3 dilated": (16, 16, (3, 3), Window(pad=2, dilation=2, groups=16)),
    "depthwise 3x3 of 2": (2, 2, (3, 3), Window(pad=1, groups=2)),
    "depthwise 1 channel to 1": (1, 1, (3, 3), Window(pad=1)),
    "depthwise 5x5": (16, 16, (5, 5), Window(pad=2, groups=16)),
    "depthwise 7x7": (24, 24, (7, 7), Window(pad=3, groups=24)),
    "depthwise 2x2": (16, 16, (2, 2), Window(stride=2, groups=16)),
    "depthwise 1-D": (16, 16, (3,), Window(pad=1, groups=16)),
    "depthwise 3-D": (8, 8, (3, 3, 3), Window(pad=1, groups=8)),
}
SIZES = ((33, 1), (17, 5), (64, 16), (1, 1))  # N, M; one row is a kernel of its own
DEPTHS = (1, 2, 3, 63, 64, 65, 1025)  # K; the last is more than one block of any kernel


def full_range(random: np.random.Generator, channels: int, k: int) -> Array:
    """Codes [channels, K]: a channel of both signs, one of large positive, one of large negative codes, and so on."""
    rows = random.integers(-127, 128, (channels, k))
    large = random.integers(90, 128, (channels, k))
    sign = np.arange(channels)[:, None] % 3
    return np.where(sign == 0, rows, np.where(sign == 1, large, -large))


def mostly_255(random: np.random.Generator, shape: tuple[int, ...]) -> Array:
    x = np.where(random.random(shape) < 0.6, 255, random.integers(0, 256, shape)).astype(np.uint8)
    x[..., :4] = 255
    return x


def convolutions(named: Mapping[str, tuple[int, int, tuple[int, ...], Window]]) -> Iterator[tuple[str, Layer]]:
    random = np.random.default_rng(0)
    for name, (incoming, outgoing, kernel, window) in named.items():
        grouped = incoming // window.groups
        rows = full_range(random, outgoing, grouped * math.prod(kernel))
        x = mostly_255(random, (2, incoming, *[9] * len(kernel)))
        for kind, change in KINDS.items():
            by_place = change(rows).reshape(outgoing, *kernel, grouped).astype(np.int8)
            weight = np.ascontiguousarray(np.moveaxis(by_place, -1, 1))
            for codes in (Codes(x_zero=128), Codes(x_zero=0, per_channel=False)):
                yield f"QLinearConv {name} {codes} {kind}", layers.conv(x, weight, window, codes)


def products() -> Iterator[tuple[str, Layer]]:
    random = np.random.default_rng(1)
    for n, m in SIZES:
        for k in DEPTHS:
            rows, x = full_range(random, n, k), mostly_255(random, (m, k))
            for kind, change in KINDS.items():
                weight = np.ascontiguousarray(change(rows).T.astype(np.int8))
                for codes in (Codes(x_zero=17), Codes(x_zero=128, per_channel=False)):
                    size = f"K={k} N={n} M={m} {codes} {kind}"
                    yield f"MatMulInteger {size}", layers.matmul_integer(x, weight, codes)
                    yield f"QLinearMatMul {size}", layers.matmul(x, weight, codes)
                    yield f"MatMulIntegerToFloat {size}", layers.matmul_to_float(x, weight, codes)
                    yield f"QGemm {size}", layers.gemm(x, weight, codes, trans_b=False)
                    yield f"QGemm transB {size}", layers.gemm(x, weight, codes, trans_b=True)


@functools.cache
def paired_layers() -> Mapping[str, Layer]:
    """Every layer whose kernel pairs."""
    return dict(convolutions(CONVS)) | dict(products())


@functools.cache
def depthwise_layers() -> Mapping[str, Layer]:
    return dict(convolutions(DEPTHWISE))


@functools.cache
def run_all(device: str) -> Mapping[str, Array]:
    """y of every layer on the device."""
    with tempfile.TemporaryDirectory(prefix="packlight-layers-") as folder:
        return layers.outputs(device, {**paired_layers(), **depthwise_layers()}, Path(folder))


def of_kind(named: Mapping[str, Layer], kind: str) -> dict[str, Layer]:
    return {name: layer for name, layer in named.items() if name.endswith(f" {kind}")}


def wrong(found: Mapping[str, Array], expected: Mapping[str, Layer]) -> list[str]:
    return [name for name, layer in expected.items() if not np.array_equal(found[name], layer.y)]


@pytest.mark.parametrize("device", ["full", *WITHOUT_VNNI])
def test_layers_that_keep_the_rule_are_exact(device: str) -> None:
    assert wrong(run_all(device), of_kind(paired_layers(), "kept")) == []


@pytest.mark.parametrize("device", WITHOUT_VNNI)
def test_full_range_is_wrong_without_vnni_wherever_a_pair_can_saturate(device: str) -> None:
    expected = of_kind(paired_layers(), "full")
    can = [name for name, layer in expected.items() if not np.array_equal(layer.paired, layer.y)]
    assert wrong(run_all(device), expected) == can
    assert len(can) > 0.7 * len(expected)  # the others are those of one position, and of few
    assert {name.split()[0] for name in can} == {name.split()[0] for name in expected}


@pytest.mark.parametrize("device", WITHOUT_VNNI)
def test_the_rule_kept_by_the_pairs_one_further_leaves_layers_wrong(device: str) -> None:
    expected = of_kind(paired_layers(), "shifted")
    assert len(wrong(run_all(device), expected)) > 0.7 * len(expected)


@pytest.mark.parametrize("device", WITHOUT_VNNI)
def test_kernels_without_vnni_give_the_sums_of_saturated_pairs(device: str) -> None:
    found = run_all(device)
    assert [name for name, layer in paired_layers().items() if not np.array_equal(found[name], layer.paired)] == []


@pytest.mark.parametrize("device", ["full", *WITHOUT_VNNI])
def test_depthwise_is_exact_at_full_range(device: str) -> None:
    expected = of_kind(depthwise_layers(), "full")
    assert wrong(run_all(device), expected) == []
    # and would not be if its kernel paired
    assert [name for name, layer in expected.items() if np.array_equal(layer.paired, layer.y)] == []


@pytest.mark.skipif(cpu.pairs_in_int16(), reason="this CPU has no VNNI: there is nothing that full range is exact on")
def test_full_range_is_exact_with_vnni() -> None:
    assert wrong(run_all("full"), {**paired_layers(), **depthwise_layers()}) == []


def test_conv_pairs_run_over_channels_before_places() -> None:
    random = np.random.default_rng(2)
    rows, x = full_range(random, 16, 45), mostly_255(random, (1, 5, 9, 9))
    by_channel = pairing.keep(rows).reshape(16, 5, 3, 3).astype(np.int8)  # (channel, place): not the kernel's
    layer = layers.conv(x, by_channel, Window(), Codes())
    with tempfile.TemporaryDirectory(prefix="packlight-layers-") as folder:
        found = layers.outputs("avx2", {"y": layer}, Path(folder))
    assert not np.array_equal(found["y"], layer.y)


@pytest.mark.parametrize("kind", KINDS)
def test_exporter_calls_a_layer_broken_where_a_kernel_can_saturate(kind: str) -> None:
    for name, layer in of_kind(paired_layers(), kind).items():
        op_type, attributes = {
            "QLinearConv": ("Conv", {}),
            "QGemm": ("Gemm", {"transB": int("transB" in name)}),
        }.get(name.split()[0], ("MatMul", {}))
        node = ir.node(op_type, [ir.Value(name="x"), ir.Value(name="w")], attributes=attributes)
        broken = rounding.breaks_pair_rule(node, layer.weight)
        if kind == "kept" or not np.array_equal(layer.paired, layer.y):
            assert broken == (kind != "kept"), name


def test_each_layer_runs_in_the_kernel_that_it_is_named_after(tmp_path: Path) -> None:
    every = of_kind(paired_layers(), "kept") | of_kind(depthwise_layers(), "kept")
    chosen = {name.partition("Codes")[0].partition(" N=")[0]: (name, layer) for name, layer in every.items()}
    for name, layer in chosen.values():
        path = tmp_path / "layer.onnx"
        path.write_bytes(layer.model)
        ran = trace(path, {"x": layer.x})
        assert [(each.kernel, each.types) for each in ran.kernels if each.macs] == [(name.split()[0], "u8s8")], name


def test_unsigned_weights_are_exact_everywhere_at_full_range(tmp_path: Path) -> None:
    random, named = np.random.default_rng(3), {}
    for n, m in SIZES:
        for k in DEPTHS:
            x, weight = mostly_255(random, (m, k)), mostly_255(random, (k, n))
            named[f"{n} {m} {k}"] = layers.matmul_integer(x, weight, Codes(x_zero=17))
            named[f"{n} {m} {k} codes"] = layers.matmul(x, weight, Codes(per_channel=False))
    for device in WITHOUT_VNNI:
        assert wrong(layers.outputs(device, named, tmp_path), named) == []


def test_dynamic_layer_under_the_rule_is_exact_and_at_full_range_is_not(tmp_path: Path) -> None:
    """x = code / 64 with codes 0 and 255 among them, so that its range gives these codes again."""
    random, named = np.random.default_rng(5), {}
    for n, m in SIZES:
        rows, codes = full_range(random, n, 65), mostly_255(random, (m, 65))
        codes[0, -1] = 0
        scale = np.geomspace(0.002, 0.004, n, dtype=np.float32)
        for kind in ("full", "kept"):
            weight = np.ascontiguousarray(KINDS[kind](rows).T.astype(np.int8))
            text = f"(float[{m},65] x) => (float[{m},{n}] y) {{ [one] y = MatMul(x, w) }}"
            model = graphs.model(text, {"w": weight.astype(np.float32)})
            laid = model.clone()
            dynamic.lay(laid, model, ["one"], {"w": per_channel(weight, scale, 1)})
            x, y = codes.astype(np.float32) / 64, codes.astype(np.int64) @ weight.astype(np.int64)
            real = y.astype(np.float32) * (np.float32(1 / 64) * scale)
            named[f"{n} {m} {kind}"] = Layer(model=graph.to_bytes(laid), x=x, weight=weight, y=real, paired=real)
    assert wrong(layers.outputs("full", named, tmp_path), of_kind(named, "kept")) == []
    for device in WITHOUT_VNNI:
        assert wrong(layers.outputs(device, named, tmp_path), named) == [*of_kind(named, "full")]


@pytest.mark.parametrize("allowed", ["0", "1"])
def test_signed_activations_saturate_only_because_onnxruntime_makes_them_unsigned(allowed: str, tmp_path: Path) -> None:
    """s8·s8 kernels widen before they multiply. But a graph's s8 becomes u8 unless session.qdqisint8allowed is 1."""
    random = np.random.default_rng(4)
    rows, x = full_range(random, 33, 64), (mostly_255(random, (5, 64)).astype(int) - 128).astype(np.int8)
    named = {
        kind: layers.between_floats(
            layers.matmul(x, np.ascontiguousarray(KINDS[kind](rows).T.astype(np.int8)), Codes(x_zero=0))
        )
        for kind in ("full", "kept")
    }
    found = layers.outputs("avx2", named, tmp_path, entries={"session.qdqisint8allowed": allowed})
    assert wrong(found, named) == (["full"] if allowed == "0" else [])


@pytest.mark.slow
def test_mask_avx2_has_the_bits_of_qemus_haswell() -> None:
    masked, emulated = run_all("avx2"), run_all("haswell")
    assert [name for name in masked if not np.array_equal(masked[name], emulated[name])] == []
