"""Fake quantization of torch, as training with it leaves it, as ONNX's QuantizeLinear and DequantizeLinear.

torch's exporters have no form of it. While AsQdq() is entered each call of torch.fake_quantize_* becomes

    y = DequantizeLinear(QuantizeLinear(x, scale, zero_point), scale, zero_point)

in uint8 where quant_min >= 0, else int8; where the codes end sooner than those of the type, x is clipped to what they stand for.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.ao.quantization import FakeQuantizeBase
from torch.overrides import TorchFunctionMode

from exporter import call

VERSION = 20  # opset, trace.OPSET


def is_in(module: torch.nn.Module) -> bool:
    return any(isinstance(part, FakeQuantizeBase) for part in module.modules())


def observing_nothing(module: torch.nn.Module) -> torch.nn.Module:
    """The module whose fake quantization keeps the scales it has; it is not changed, and shares its parameters with the result."""

    def still(part: torch.nn.Module) -> torch.nn.Module:
        if not isinstance(part, FakeQuantizeBase):
            return part
        if not bool(part.fake_quant_enabled[0]):
            return torch.nn.Identity()
        made = copy.copy(part)
        made.__dict__["_buffers"] = {**part._buffers, "observer_enabled": torch.zeros_like(part.observer_enabled)}
        return made

    return call.replaced(module, still)


class AsQdq(TorchFunctionMode):
    """See this module. What is traced within has the operators; run outside, it computes them by torch."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        if func is torch.fake_quantize_per_tensor_affine:
            return _per_tensor(*args, **named)
        if func is torch.fake_quantize_per_channel_affine:
            return _per_channel(*args, **named)
        if func is torch.fused_moving_avg_obs_fake_quant:
            return _fused(*args, **named)
        return func(*args, **named)


def _per_tensor(input: Any, scale: Any, zero_point: Any, quant_min: int, quant_max: int) -> Any:  # noqa: A002 (torch calls it so)
    real = torch.as_tensor(scale, dtype=torch.float32).reshape(())
    return _qdq(input, real, torch.as_tensor(zero_point).reshape(()), None, quant_min, quant_max)


def _per_channel(input: Any, scale: Any, zero_point: Any, axis: int, quant_min: int, quant_max: int) -> Any:  # noqa: A002 (torch calls it so)
    return _qdq(input, scale, zero_point, axis, quant_min, quant_max)


def _fused(
    x: Any, observer_on: Any, fake_quant_on: Any, running_min: Any, running_max: Any, scale: Any, zero_point: Any,
    averaging_const: float, quant_min: int, quant_max: int, ch_axis: int, per_row: bool = False, symmetric: bool = False,
) -> Any:  # fmt: skip
    if per_row:
        return _per_channel(x, scale, zero_point, ch_axis, quant_min, quant_max)
    return _per_tensor(x, scale, zero_point, quant_min, quant_max)


def _qdq(x: Any, scale: Any, zero_point: Any, axis: int | None, quant_min: int, quant_max: int) -> Any:
    kind = torch.uint8 if quant_min >= 0 else torch.int8
    ends = torch.iinfo(kind)
    if (quant_min, quant_max) != (ends.min, ends.max):
        shape = [-1 if position == axis else 1 for position in range(x.dim())]
        step, zero = (scale, zero_point) if axis is None else (scale.reshape(shape), zero_point.reshape(shape))
        x = torch.maximum(torch.minimum(x, (quant_max - zero) * step), (quant_min - zero) * step)
    at: dict[str, Any] = {} if axis is None else {"axis": axis}
    codes = torch.onnx.ops.symbolic(
        "QuantizeLinear", (x, scale, zero_point.to(kind)), at, dtype=kind, shape=x.shape, version=VERSION
    )
    return torch.onnx.ops.symbolic(
        "DequantizeLinear", (codes, scale, zero_point.to(kind)), at, dtype=torch.float32, shape=x.shape, version=VERSION
    )
