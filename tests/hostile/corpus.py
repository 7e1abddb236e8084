"""The hostile corpus: every input here is refused by an error of ours, or read right, in time and in little memory.

A case makes its files in a folder of its own and gives them to what reads them. It may return, if what it read was right (it
asserts that itself), or raise a PacklightError; all else is a fault. Made by code, the random ones from seeds.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

import exporter
import runtime
from exporter import data, given
from exporter.errors import CalibrationError
from exporter.search import costs as cost_tables
from runtime import confined, explain, gate, manifest, npz, preprocess, printable, probe, strict
from runtime.errors import BundleError
from runtime.manifest import Budget, Tensor
from tests.runtime import models, test_npz, test_printable

Act = Callable[[Path], object]
IMAGE = (Tensor(name="image", dtype="float32", shape=("batch", 3, 8, 8)),)
IDS = (Tensor(name="input_ids", dtype="int64", shape=("batch", "tokens")),)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """kind: of input. act: makes it in a folder and has it read."""

    kind: str
    name: str
    act: Act


def cases(good: Path) -> list[Case]:
    """All of them; `good` is a sound bundle, which each that needs one copies."""
    kinds: dict[str, Iterator[tuple[str, Act]]] = {
        "manifest value": manifest_values(good),
        "manifest text": manifest_texts(good),
        "file name": file_names(good),
        "session entry": session_entries(good),
        "file in a bundle": files_in_a_bundle(good),
        "model": broken_models(good),
        "external data": external_data(good),
        "plan": plans(),
        "npz": archives(),
        "npy": headers(),
        "probe": probes(),
        "onnx source": onnx_sources(),
        "recipe": recipes(),
        "picture": pictures(),
        "tokenizer": tokenizers(),
        "table": tables(),
        "cost table": cost_files(),
        "command line": arguments(),
        "text for people": texts(),
    }
    return [
        Case(kind=kind, name=f"{number:03d} {name}"[:80], act=act)
        for kind, made in kinds.items()
        for number, (name, act) in enumerate(made)
    ]


# ---- bundles


def loaded(folder: Path) -> None:
    """Load; what loads is the good bundle, whatever its words are."""
    bundle = runtime.load(folder, threads=1)
    first = bundle.probes()[0]
    np.testing.assert_array_equal(bundle.run(first.inputs)["logits"], first.int8["logits"])


def edited(good: Path, change: Callable[[dict[str, Any]], object], folder: Path) -> None:
    copy = Path(shutil.copytree(good, folder / "b"))
    file = copy / manifest.MANIFEST
    root = json.loads(file.read_text(encoding="utf-8"))
    change(root)
    file.write_text(json.dumps(root), encoding="utf-8")
    loaded(copy)


VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    1e30,
    10**400,
    "",
    "\ud800",
    "x" * 5000,
    [],
    [[[[1]]]],
    {},
    {"\x1b]0;x\x07": 1},
)
PLACES = (
    "format", "name", "target", "inputs", "outputs", "files", "pair_rule", "exact_on", "recorded_on", "session", "budget",
    "judged", "preprocessing", "verdict", "versions", "inputs.0.name", "inputs.0.dtype", "inputs.0.shape", "inputs.0.shape.1",
    "files.probe.npz.size_bytes", "budget.min_snr_db",
)  # fmt: skip


def manifest_values(good: Path) -> Iterator[tuple[str, Act]]:
    for place in PLACES:
        for value in VALUES:
            *path, last = place.replace("probe.npz", "probe/npz").split(".")
            keys: list[Any] = [int(k) if k.isdigit() else k.replace("/", ".") for k in (*path, last)]

            def change(root: Any, keys: list[Any] = keys, value: Any = value) -> None:
                for key in keys[:-1]:
                    root = root[key]
                root[keys[-1]] = value

            yield f"{place} = {str(value)[:20]!r}", partial(edited, good, change)


TEXTS = (
    "", "{", "[]", "null", "1", '"x"', "[" * 100_000, '{"a":' * 50_000, "1" * 5000, "1e999999999", "NaN", '{"format": NaN}',
    '{"format": 1, "format": 1}', '{"format": 1e1}', '{"format": 99999999999999999999}', '"\\ud800"', "\ufeff{}", "{}\0",
    "// x", "{'format': 2}", '{"format": 3}', '{"format": true}', " " * 100_000,
)  # fmt: skip


def manifest_texts(good: Path) -> Iterator[tuple[str, Act]]:
    def act(content: bytes, folder: Path) -> None:
        copy = Path(shutil.copytree(good, folder / "b"))
        (copy / manifest.MANIFEST).write_bytes(content)
        loaded(copy)

    for text in TEXTS:
        yield text[:20], partial(act, text.encode())
    for content in (b"\xff\xfe", b"\x80", bytes(1000)):
        yield repr(content[:4]), partial(act, content)


NAMES = (
    "CON", "con", "nul.txt", "AUX.x.y", "COM1", "lpt9.onnx", "a.", "a..", "..", ".", "", ".hidden", "../x", "/etc/passwd", "a/b",
    "a\\b", "C:x", "a\0b", "a\nb", "a b", "a:b", "a*b", "é", "\u202ea", "x" * 129, "manifest.json", "PROBE.NPZ", "Model.int8.onnx",
    "~", "-rf", "$HOME", "a\x7f", "probe.npz ",
)  # fmt: skip


def file_names(good: Path) -> Iterator[tuple[str, Act]]:
    for name in NAMES:
        yield (
            name,
            partial(edited, good, lambda root, name=name: root["files"].update({name: root["files"]["plan.txt"]})),
        )


ENTRIES = (
    "session.optimized_model_filepath", "session.model_external_initializers_file_folder_path", "session.enable_profiling",
    "session.custom_ops_library", "ep.context_enable", "ep.context_file_path", "session.node_partition_config_file",
    "session.collect_node_memory_stats_to_file", "optimization.minimal_build_optimizations", "optimization.x", "mlas.x",
    "mlas.disable_kleidiai", "session.load_model_format", "session.use_ort_model_bytes_directly", "SESSION.DISABLE_PREPACKING",
    "session.disable_prepacking\0x", "",
)  # fmt: skip


def session_entries(good: Path) -> Iterator[tuple[str, Act]]:
    def act(key: str, value: str, folder: Path) -> None:
        edited(good, lambda root: root["session"].update({key: value}), folder)
        raise AssertionError(f"the entry {key} was taken")

    for key in ENTRIES:
        yield key, partial(act, key, "1")
    for value in ("\x1b[2J", "x" * 2000, "é", "a\nb"):
        yield value[:8], partial(act, "optimization.disable_specified_optimizers", value)


def files_in_a_bundle(good: Path) -> Iterator[tuple[str, Act]]:
    def pipe(file: Path) -> None:
        file.unlink()
        os.mkfifo(file)

    def link(file: Path) -> None:
        file.rename(file.parent.parent / "elsewhere")
        file.symlink_to(file.parent.parent / "elsewhere")

    def inner_link(file: Path) -> None:
        file.unlink()
        file.symlink_to(file.with_name("recipe.toml"))

    def loop(file: Path) -> None:
        file.unlink()
        file.symlink_to(file.name)

    def device(file: Path) -> None:
        file.unlink()
        file.symlink_to("/dev/zero")

    def folder_of_that_name(file: Path) -> None:
        file.unlink()
        file.mkdir()

    def large(file: Path) -> None:
        os.truncate(file, 1 << 40)

    def cut(file: Path) -> None:
        os.truncate(file, file.stat().st_size // 2)

    def empty(file: Path) -> None:
        os.truncate(file, 0)

    def act(change: Callable[[Path], None], name: str, folder: Path) -> None:
        copy = Path(shutil.copytree(good, folder / "b"))
        change(copy / name)
        loaded(copy)
        raise AssertionError("it was taken")

    for name in (manifest.MANIFEST, manifest.INT8, manifest.FP32, manifest.PROBE, "plan.txt"):
        for change in (pipe, link, inner_link, loop, device, folder_of_that_name, large, cut, empty):
            yield f"{change.__name__} {name}", partial(act, change, name)


def resealed(good: Path, name: str, content: bytes, folder: Path) -> Path:
    copy = Path(shutil.copytree(good, folder / "b"))
    (copy / name).write_bytes(content)
    models.seal(copy, models.manifest(Budget()))
    return copy


def broken_models(good: Path) -> Iterator[tuple[str, Act]]:
    """Models that are cut off, or are other files."""

    def act(name: str, content: bytes, folder: Path) -> None:
        copy = resealed(good, name, content, folder)
        bundle = runtime.load(copy, threads=1)
        if name == manifest.FP32:
            bundle.reference()
        raise AssertionError("it was taken")

    for name in (manifest.INT8, manifest.FP32):
        whole = (good / name).read_bytes()
        for share in range(1, 10):
            yield f"{name} cut at {share}0 %", partial(act, name, whole[: len(whole) * share // 10])
        for other in (b"", b"\0", b"MZ", b"PK\x03\x04", b"\x0a" * 5000, b"\xff" * 5000, b"ORTM" * 9, whole[1:]):
            yield f"{name} {other[:4]!r}", partial(act, name, other)


LOCATIONS = (
    "../weights.bin", "/etc/passwd", "weights.bin", "./weights.bin", "manifest.json", "probe.npz", "/dev/zero", "", ".", "..",
    "*/_ORT_MEM_ADDR_/*", "a/../../weights.bin", "\\\\host\\share", "weights.bin\0", "file:///etc/passwd", "/proc/self/mem",
)  # fmt: skip


def lying(location: str, offset: str = "0", length: str = "16") -> onnx.ModelProto:
    """y = x + w, w a weight of four numbers that lies elsewhere."""
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        weight.external_data.add(key=key, value=value)
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "g", ends[:1], ends[1:], [weight])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def external_data(good: Path) -> Iterator[tuple[str, Act]]:
    def act(name: str, location: str, folder: Path) -> None:
        np.full(64, 1e30, np.float32).tofile(folder / "weights.bin")
        bundle = runtime.load(resealed(good, name, lying(location).SerializeToString(), folder), threads=1)
        bundle.reference()
        raise AssertionError("it was taken")

    for name in (manifest.INT8, manifest.FP32):
        for location in LOCATIONS:
            yield f"{name} at {location!r}", partial(act, name, location)


def plans() -> Iterator[tuple[str, Act]]:
    head = explain.HEADER.encode() + b"\n"

    def act(content: bytes, folder: Path) -> None:
        (folder / "plan.txt").write_bytes(content)
        explain.read_plan(folder / "plan.txt")

    for content in (
        b"", b"x", head + b"a", head + b"a | b | c", head + b"\xff | b | c | d", b"\xff", head + b"\n", head[:-2], bytes(99),
        head + b"a | b | c | \x1b[2J", head + "a\u2028b | c | d | e".encode(), head + b" | " * 10**5,
    ):  # fmt: skip
        yield repr(content[-12:]), partial(act, content)


# ---- arrays


def archives() -> Iterator[tuple[str, Act]]:
    sound = test_npz.saved(x=np.arange(6.0), y=np.ones((2, 2), np.int8))

    def act(content: bytes, folder: Path) -> None:
        (folder / "x.npz").write_bytes(content)
        probe.read_arrays(folder / "x.npz")

    def calibration(content: bytes, folder: Path) -> None:
        (folder / "x.npz").write_bytes(content)
        list(data.read(str(folder / "x.npz"), IMAGE, "calibration"))

    rng = np.random.default_rng(0)
    for number in range(30):
        flipped = bytearray(sound)
        for at in rng.integers(0, len(sound), 1 + number % 4):
            flipped[at] ^= 1 << int(rng.integers(8))
        yield f"flipped {number}", partial(act, bytes(flipped))
    for share in range(1, 10):
        yield f"cut at {share}0 %", partial(calibration, sound[: len(sound) * share // 10])
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("image.npy", bytes(1 << 28))
    others = (
        b"", b"PK\x05\x06" + bytes(18), sound * 2, b"\0" + sound, sound + b"\0", test_npz.overlapping(), bomb.getvalue(),
        sound.replace(b"x.npy", b"y.npy"), sound.replace(b"x.npy", b"\0.npy"), sound.replace(b"x.npy", b"/.npy"),
        test_npz.saved(x=np.array(["text"])), test_npz.saved(x=np.array([None])), test_npz.saved(x=np.zeros(2, "V8")),
    )  # fmt: skip
    for number, content in enumerate(others):
        yield f"other {number}", partial(act, content)
        yield f"other {number}, calibration", partial(calibration, content)


def headers() -> Iterator[tuple[str, Act]]:
    def act(content: bytes, folder: Path) -> None:
        try:
            found = npz.array(content)
        except ValueError as error:  # what its callers make an error of ours of
            raise BundleError(str(error)) from error
        assert found.flags.c_contiguous and found.dtype.isnative

    def calibration(content: bytes, folder: Path) -> None:
        (folder / "x.npy").write_bytes(content)
        list(data.read(str(folder / "x.npy"), IMAGE, "calibration"))

    for shape in test_npz.SHAPES:
        made = test_npz.npy(test_npz.HEADER.format("'<f4'", "False", shape), bytes(8))
        yield f"shape {shape}"[:40], partial(act, made)
        yield f"shape {shape}, calibration"[:40], partial(calibration, made)
    for descr in test_npz.DESCRS:
        yield f"descr {descr}", partial(act, test_npz.npy(test_npz.HEADER.format(descr, "False", "(2,)"), bytes(8)))
    for text in (
        "",
        "{",
        "1",
        "{}",
        "(" * 9000,
        "9" * 5000,
        "__import__('os')",
        "{'descr': '<f4'}",
        "\0",
        "{**{}}",
        "[" * 200,
    ):
        yield f"header {text[:20]}", partial(act, test_npz.npy(text, bytes(8)))
    for version in (b"\0\0", b"\x04\0", b"\x02\0", b"\x03\0", b"\xff\xff"):
        yield f"version {version!r}", partial(act, test_npz.npy("{}", bytes(8), version))


def probes() -> Iterator[tuple[str, Act]]:
    def act(arrays: dict[str, Any], folder: Path) -> None:
        (folder / "p.npz").write_bytes(test_npz.saved(**arrays))
        probe.read_probe(folder / "p.npz")

    one = np.ones(2, np.float32)
    for key in (
        "x", "0000/x", "0000/output/x", "0000/input/", "-001/input/x", "00/input/x", "0001/input/x", "9" * 5000 + "/input/x",
        "\u0660\u0660\u0660\u0660/input/x", "0000/input/\ud7ff",
    ):  # fmt: skip
        yield f"key {key[:20]}", partial(act, {key: one})
    yield "nothing", partial(act, {})
    yield "objects", partial(act, {"0000/input/x": np.array([{}])})


# ---- what the exporter takes


def onnx_sources() -> Iterator[tuple[str, Act]]:
    def act(content: bytes, folder: Path) -> None:
        np.ones(64, np.float32).tofile(folder.parent / "weights.bin")
        (folder / "m.onnx").write_bytes(content)
        exporter.from_onnx(folder / "m.onnx")

    for location in LOCATIONS:
        yield f"weights at {location!r}", partial(act, lying(location).SerializeToString())
    for offset, length in (("-1", "16"), ("x", "16"), ("0", "-1"), ("9" * 30, "16"), ("0", "9" * 5000), ("1e9", "16")):
        yield (
            f"offset {offset[:5]} length {length[:5]}",
            partial(act, lying("m.onnx", offset, length).SerializeToString()),
        )
    for dims in ([-1], [1 << 40], [1 << 62, 4], [1 << 31, 1 << 31, 1 << 31]):
        model = lying("m.onnx")
        model.graph.initializer[0].dims[:] = dims
        yield f"dims {dims}", partial(act, model.SerializeToString())
    for kind in (0, 8, 99, 1000):
        model = lying("m.onnx")
        model.graph.initializer[0].data_type = kind
        yield f"data type {kind}", partial(act, model.SerializeToString())
    for size, index in ((1 << 45, 0), (4, 9), (4, -9), (-4, 0)):
        model = lying("m.onnx")
        values = onnx.numpy_helper.from_array(np.ones(1, np.float32), "s")
        at = onnx.numpy_helper.from_array(np.int64([index]), "i")
        model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, at, [size]))
        del model.graph.initializer[:]
        yield f"sparse {size} {index}", partial(act, model.SerializeToString())
    sound = lying("x").SerializeToString()
    yield "name that is not UTF-8", partial(act, sound.replace(b"Add", b"\xff\xfe\xfd"))
    for content in (
        b"",
        b"\xff" * 100,
        sound[:-5],
        b"{",
        b"<html>",
        b"\x80\x02",
        sound + b"\xff",
        b"PK\x03\x04",
        b"GGUF",
    ):
        yield f"bytes {content[:4]!r}", partial(act, content)

    def pipe(folder: Path) -> None:
        os.mkfifo(folder / "m.onnx")
        exporter.from_onnx(folder / "m.onnx")

    yield "pipe", pipe
    yield "device", lambda folder: exporter.from_onnx("/dev/zero")


TOML = 'format = 1\nname = "x"\ntarget = "portable"\n'
KEYS = ("images.scale", "images.std", "images.resize", "images.crop", "images.batch", "text.max_length", "text.tokenizer",
        "budget.min_snr_db", "budget.max_size_bytes", "calibrate.percentile", "probe.batches", "rules")  # fmt: skip
SETTINGS = (
    '"1e999999999"',
    "1e999999999",
    "9" * 5000,
    "nan",
    "-inf",
    "[" * 500 + "]" * 500,
    '"\\u001b[2J"',
    '"1/0"',
    "1000000000000",
)


def recipes() -> Iterator[tuple[str, Act]]:
    def act(content: bytes, folder: Path) -> None:
        (folder / "r.toml").write_bytes(content)
        exporter.load_recipe(folder / "r.toml")

    for key in KEYS:
        table, _, name = key.partition(".")
        for value in SETTINGS:
            line = f"[{table}]\n{name} = {value}\n" if name else f"{table} = {value}\n"
            yield f"{key} = {value[:20]}", partial(act, (TOML + line).encode())
    for content in (
        b"\xff",
        b"a = " + b"{a=" * 3000,
        b"a." * 3000 + b"b = 1",
        b"=",
        b'"\\ud800" = 1',
        b"a = 1\na = 2",
        bytes(9),
    ):
        yield f"text {content[:8]!r}", partial(act, content)
    yield "pipe", lambda folder: (os.mkfifo(folder / "r.toml"), exporter.load_recipe(folder / "r.toml"))
    yield "name with a NUL", lambda folder: exporter.load_recipe("a\0b.toml")


def png(width: int, height: int, pixels: bytes = b"") -> bytes:
    """A PNG that claims to be so large."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


def pictures() -> Iterator[tuple[str, Act]]:
    def act(content: bytes, folder: Path) -> None:
        (folder / "x.png").write_bytes(content)
        preprocess.image(folder / "x.png", preprocess.Preprocessing(input="image"))

    for width, height in ((1 << 15, 1 << 15), (1 << 30, 1 << 30), (0, 0), (1, 1 << 31), (60_000, 2000), (9000, 9000)):
        yield f"{width} x {height}", partial(act, png(width, height))
    for content in (
        b"",
        b"\x89PNG",
        png(9, 9)[:40],
        b"GIF89a" + bytes(20),
        b"BM" + bytes(50),
        b"II*\0" + b"\xff" * 20,
        bytes(99),
    ):
        yield f"bytes {content[:6]!r}", partial(act, content)

    def resized(folder: Path) -> None:
        asked = preprocess.Preprocessing(input="image", resize=(65536, 65536))
        preprocess.image(np.zeros((8, 8, 3), np.uint8), asked)

    yield "resized to 4 gigapixels", resized
    yield (
        "a line resized to 65536",
        lambda folder: preprocess.image(
            np.zeros((1, 60_000, 3), np.uint8), preprocess.Preprocessing(input="image", resize=65536)
        ),
    )


def tokenizers() -> Iterator[tuple[str, Act]]:
    def act(content: bytes, folder: Path, more: str = "") -> None:
        (folder / "t.json").write_bytes(content)
        (folder / "lines.txt").write_text("hello world\n" * 3)
        (folder / "r.toml").write_text(f'{TOML}[text]\ntokenizer = "t.json"\n{more}')
        asked = exporter.load_recipe(folder / "r.toml")
        list(data.read(folder / "lines.txt", IDS, "calibration", data.Asked(text=asked.text, folder=folder)))

    vocabulary: dict[str, Any] = {"hello": 0, "world": 1, "[UNK]": 2}
    base: dict[str, Any] = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
            "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None,
            "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"}}  # fmt: skip
    changes: list[dict[str, Any]] = [
        {}, {"model": {"type": "BPE", "vocab": {}, "merges": ["a b"]}}, {"model": None},
        {"padding": {"strategy": {"Fixed": 10**12}}},
        {"truncation": {"max_length": 10**12, "strategy": "LongestFirst", "stride": 10**13, "direction": "Right"}},
        {"truncation": {"max_length": 2, "strategy": "LongestFirst", "stride": 7, "direction": "Right"}},
        {"model": {"type": "WordLevel", "vocab": {"a": -1}, "unk_token": "x"}},
        {"normalizer": {"type": "Replace", "pattern": {"Regex": "("}, "content": ""}},
        {"model": {"type": "Unigram", "unk_id": 10**9, "vocab": [["a", 0.0]]}},
        {"added_tokens": [{"id": 2**31, "content": "hello"}]},
        {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}},
        {"model": {"type": "WordLevel", "vocab": {}, "unk_token": "[UNK]"}},
    ]  # fmt: skip
    for number, change in enumerate(changes):
        yield f"change {number}", partial(act, json.dumps(base | change).encode())
    for more in (
        "max_length = 1000000000000",
        'max_length = 1048576\npadding = "max_length"\npad = "none"',
        'pad = "\\u001b"',
    ):
        yield more[:30], partial(act, json.dumps(base).encode(), more=more)
    for content in (b"", b"{", b"\xff", b"[" * 100_000, b"null", b'{"version": "9.9"}', b"1e999999999"):
        yield f"bytes {content[:6]!r}", partial(act, content)


def tables() -> Iterator[tuple[str, Act]]:
    import pyarrow
    from pyarrow import parquet

    stream = io.BytesIO()
    parquet.write_table(pyarrow.table({"image": [[1.0] * 192] * 4}), stream)
    whole = stream.getvalue()

    def act(content: bytes, folder: Path) -> None:
        (folder / "x.parquet").write_bytes(content)
        found = list(data.read(folder / "x.parquet", IMAGE, "calibration"))
        if not found or found[0]["image"].size != 192:
            raise CalibrationError("another table")

    rng = np.random.default_rng(1)
    for number in range(25):
        flipped = bytearray(whole)
        for at in rng.integers(4, len(whole), 3):
            flipped[at] ^= 1 << int(rng.integers(8))
        yield f"flipped {number}", partial(act, bytes(flipped))
    for content in (
        b"",
        b"PAR1",
        b"PAR1" * 3,
        whole[:-9],
        whole[9:],
        b"PAR1" + b"\xff" * 99 + b"PAR1",
        b"ARROW1" + bytes(99),
    ):
        yield f"bytes {content[:4]!r} {len(content)}", partial(act, content)


def cost_files() -> Iterator[tuple[str, Act]]:
    table = {
        "format": cost_tables.FORMAT, "graph": "x", "target": "portable", "where": "here", "measured": True, "nodes": {},
        "faster": [], "timed": {}, "fp32": None, "quantize_ns": 1.0, "dequantize_ns": 1.0, "crossing_ns": 1.0,
    }  # fmt: skip
    node = {"float_ms": 1.0, "int8_ms": 1.0, "dynamic_ms": 0.0}

    def act(text: str, folder: Path) -> None:
        cost_tables.read(text, None, None, None, "costs.json")  # type: ignore[arg-type]  # refused before they are looked at

    changes: list[dict[str, Any]] = [
        {"nodes": {"a": node | {"float_ms": "1"}}}, {"nodes": {"a": node | {"int8_ms": None}}}, {"nodes": {"a": {}}},
        {"nodes": []}, {"nodes": {"a": node | {"x": 1}}}, {"fp32": "x"}, {"timed": {"a": []}}, {"quantize_ns": True},
        {"faster": [1]}, {"faster": None}, {"graph": 1}, {"format": 99}, {"unknown": 1}, {"crossing_ns": 1e300},
    ]  # fmt: skip
    for number, change in enumerate(changes):
        yield f"change {number}", partial(act, json.dumps(table | change))
    for text in ("", "[", "[" * 100_000, "null", "1" * 5000, "NaN", "[]"):
        yield f"text {text[:6]}", partial(act, text)


def arguments() -> Iterator[tuple[str, Act]]:
    for text in ("", "0", "-1GB", "9" * 400, "1e9", "1 XB", "\x1b[2J", "NaN", "∞", "1" * 5000 + "B"):
        yield f"--max-memory {text[:8]}", lambda folder, text=text: confined.size(text, "--max-memory")
        yield f"--max-size {text[:8]}", lambda folder, text=text: given.size_bytes(text, "--max-size")
    for path in ("a\0b", "\udcff", "x" * 5000, "/dev/null", "/proc/self/mem", "/dev/zero", "\u202e", "."):
        yield f"load {path[:8]!r}", lambda folder, path=path: runtime.load(path)
        yield f"from_onnx {path[:8]!r}", lambda folder, path=path: exporter.from_onnx(path)
        yield f"from_program {path[:8]!r}", lambda folder, path=path: exporter.from_program(path)
        yield f"calibration {path[:8]!r}", lambda folder, path=path: list(data.read(path, IMAGE, "calibration"))


def texts() -> Iterator[tuple[str, Act]]:
    def act(text: str, folder: Path) -> None:
        import xml.etree.ElementTree as ET

        assert printable.printable(text).isprintable() and len(printable.printable(text)) <= printable.MOST
        ET.fromstring(f'<a name="{printable.xml(text)}"/>')
        assert "\n" not in printable.code(text) and gate.coverage(1.0)
        assert str(BundleError(text, found=text, do=text)).isprintable()
        if text.isascii():
            assert strict.parse(json.dumps([text]), text) == [text]

    for text in test_printable.HOSTILE:
        yield repr(text[:12]), partial(act, text)
