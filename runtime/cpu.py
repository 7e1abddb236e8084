"""Which CPU this is, and the one thing about it that flags do not tell: whether its int8 kernels add products in int16."""

from __future__ import annotations

import platform
from dataclasses import dataclass

import numpy as np

from runtime.session import open_session

# Extensions that decide which int8 kernels ONNX Runtime picks, in Linux's words
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")
FAMILIES = {"AMD64": "x86_64", "amd64": "x86_64", "arm64": "aarch64", "ARM64": "aarch64"}  # Windows's and macOS's words
# MatMulInteger, a: uint8 [16, 16], b: int8 [16, 16], y: int32 [16, 16], opset 10, as ONNX stores it
MATMUL_INTEGER = bytes.fromhex(
    "08043a5c0a180a01610a0162120179220d4d61744d756c496e74656765721201675a130a0161120e0a0c080212080a0208100a0208105a13"
    "0a0162120e0a0c080312080a0208100a02081062130a0179120e0a0c080612080a0208100a02081042040a00100a"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cpu:
    """A CPU as ONNX Runtime uses it.

    name: as the system tells it. machine: see machine(). flags: those of FLAGS that the system lists; none where
        it lists none (only Linux does).
    pairs_in_int16: measured: the u8·s8 kernels that run here add pairs of products in int16, which saturates. Weights
        that do not keep the pair rule then give other outputs, without an error.
    """

    name: str
    machine: str
    flags: tuple[str, ...]
    pairs_in_int16: bool


def read() -> Cpu:
    """This CPU. Takes some milliseconds: one product of two 16x16 matrices is run."""
    return Cpu(name=name(), machine=machine(), flags=flags(), pairs_in_int16=pairs_in_int16())


def machine() -> str:
    """The family of this CPU, by one name on every system: "x86_64", "aarch64"."""
    return FAMILIES.get(platform.machine(), platform.machine())


def pairs_in_int16() -> bool:
    """Whether 16 products of 255 · 127 do not sum to 518160 here: vpmaddubsw's pairs stop at 32767, and give 262136."""
    session = open_session(MATMUL_INTEGER, threads=1)
    feed = {"a": np.full((16, 16), 255, np.uint8), "b": np.full((16, 16), 127, np.int8)}
    return bool((session.run(None, feed)[0] != 16 * 255 * 127).any())


def name() -> str:
    """The CPU's name as the system tells it: Linux's "model name", else what Python's platform module knows."""
    return _cpuinfo("model name") or platform.processor() or platform.machine() or "unknown"


def flags() -> tuple[str, ...]:
    listed = (_cpuinfo("flags") or _cpuinfo("Features")).split()  # x86, ARM
    return tuple(flag for flag in FLAGS if flag in listed)


def _cpuinfo(key: str) -> str:
    """The first value of `key` in Linux's list; empty on other systems."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            fields = (line.partition(":") for line in file)
            return next((value.strip() for found, _, value in fields if found.strip() == key), "")
    except OSError:
        return ""
