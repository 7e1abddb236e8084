"""Where in an ONNX file names can stand: everything but the large values of its weights. A file's descriptor -> its text.

A model of 100 MB is 99.9 % weights; what is looked for in it (a domain, the name of a file) stands between them. The walk goes
along protobuf's wire format: ModelProto.graph (7), GraphProto.initializer (5), and in it the fields that hold numbers.
Source: https://protobuf.dev/programming-guides/encoding, onnx.proto.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from runtime import trusted

LARGE = 4096  # bytes of a field that are worth a step over them
BLOCK = 1 << 16
LONGEST = 256  # bytes of what is looked for
GRAPH, INITIALIZER, NUMBERS = 7, 5, frozenset({4, 5, 7, 9, 10, 11})
Span = tuple[int, int]


def found(descriptor: int, size: int, names: Collection[bytes]) -> set[bytes]:
    """Which of the names, at most LONGEST bytes each, stand in an ONNX file outside of its weights."""
    there: set[bytes] = set()
    at = 0
    for begin, end in [*_values(_Reader(descriptor), size), (size, size)]:
        for block in _blocks(descriptor, at, begin):
            there.update(name for name in names if name in block)
        at = end
    return there


def _blocks(descriptor: int, begin: int, end: int) -> Iterator[bytes]:
    """What stands from begin to end, in blocks of which each begins LONGEST bytes before the last one ended."""
    at = begin
    while at < end and (block := trusted.part(descriptor, min(BLOCK, end - at), at)):
        yield block
        at += len(block) if at + len(block) >= end else max(len(block) - LONGEST, 1)


class _Reader:
    """A file read in blocks, of which the last one is kept."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._begin, self._block = descriptor, 0, b""

    def byte(self, at: int) -> int:
        if not self._begin <= at < self._begin + len(self._block):
            self._begin, self._block = at, trusted.part(self._descriptor, BLOCK if at == 0 else LARGE, at)
            if not self._block:
                raise ValueError("the file ends within a field")
        return self._block[at - self._begin]

    def varint(self, at: int) -> Span:
        """(the number, where it ends)."""
        value = 0
        for place in range(10):
            byte = self.byte(at + place)
            value |= (byte & 0x7F) << 7 * place
            if byte < 0x80:
                return value, at + place + 1
        raise ValueError("a number of more than ten bytes")


def _values(reader: _Reader, size: int) -> list[Span]:
    """The large fields of numbers, in order; those before the first byte that is no protobuf."""
    spans: list[Span] = []
    try:
        for model in _fields(reader, 0, size):
            if model[0] != GRAPH:
                continue
            for graph in _fields(reader, *model[1]):
                if graph[0] == INITIALIZER and graph[1][1] - graph[1][0] > LARGE:
                    fields = _fields(reader, *graph[1])
                    spans += [span for number, span in fields if number in NUMBERS and span[1] - span[0] > LARGE]
    except ValueError:
        pass  # ONNX Runtime refuses it, too; what is behind is looked through whole
    return spans


def _fields(reader: _Reader, begin: int, end: int) -> Iterator[tuple[int, Span]]:
    """(number, where it stands) of each field that has a length, in order."""
    at = begin
    while at < end:
        key, at = reader.varint(at)
        kind = key & 7
        if kind == 0:
            _, at = reader.varint(at)
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
        elif kind == 2:
            length, at = reader.varint(at)
            if length > end - at:
                raise ValueError("a field that is longer than what it stands in")
            yield key >> 3, (at, at + length)
            at += length
        else:
            raise ValueError("a kind of field that ONNX does not have")
