from __future__ import annotations

import os
import zipfile
from pathlib import Path

import numpy as np
import pytest

from runtime.errors import BundleError
from runtime.probe import Probe, read_arrays, read_probe, write_arrays, write_probe

X = np.arange(6, dtype=np.float32).reshape(2, 3)


def probe(scale: float) -> Probe:
    return Probe(inputs={"net/x": X * scale, "length": np.int64(3)}, fp32={"y": X.T}, int8={"y": X.T + 1})


def test_probes_come_back_in_order_with_dtype_shape_and_slashes_in_names(tmp_path: Path) -> None:
    write_probe(tmp_path / "probe.npz", [probe(scale) for scale in range(12)])
    found = read_probe(tmp_path / "probe.npz")
    assert [each.inputs["net/x"][0, 1] for each in found] == list(range(12))
    assert found[0].inputs["length"].dtype == np.int64 and found[0].inputs["length"].shape == ()
    np.testing.assert_array_equal(found[0].int8["y"], X.T + 1)


def test_equal_probes_give_equal_bytes_whatever_order_layout_and_time(tmp_path: Path) -> None:
    one, two = tmp_path / "one.npz", tmp_path / "two.npz"
    inputs = {"length": np.int64(3), "net/x": np.asfortranarray(X)}
    write_probe(one, [probe(1)])
    write_probe(two, [Probe(inputs=inputs, fp32={"y": np.ascontiguousarray(X.T)}, int8={"y": X.T + 1})])
    assert one.read_bytes() == two.read_bytes()
    with zipfile.ZipFile(one) as archive:
        assert {member.date_time for member in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_keys_are_number_role_name_and_numpy_reads_them(tmp_path: Path) -> None:
    write_probe(tmp_path / "probe.npz", [probe(1)])
    with np.load(tmp_path / "probe.npz") as arrays:
        assert arrays.files == ["0000/input/length", "0000/input/net/x", "0000/fp32/y", "0000/int8/y"]


class Trap:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("sprung",)


def test_pickled_array_is_refused_and_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez(tmp_path / "probe.npz", **{"0000/input/x": np.array([Trap()], dtype=object)})
    with pytest.raises(BundleError, match=r"probe.npz: found Python objects, where numbers are expected"):
        read_probe(tmp_path / "probe.npz")
    assert not (tmp_path / "sprung").exists()


def test_python_objects_are_never_written(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="found Python objects, expected numbers"):
        write_arrays(tmp_path / "x.npz", {"x": np.array([None])})


def test_compressed_probe_is_refused_though_compressed_inputs_are_read(tmp_path: Path) -> None:
    file = tmp_path / "probe.npz"
    np.savez_compressed(file, **{"0000/input/x": np.zeros(1 << 20)})
    with pytest.raises(BundleError, match="found compressed arrays"):
        read_probe(file)
    assert read_arrays(file)["0000/input/x"].size == 1 << 20


@pytest.mark.parametrize("key", ["x", "0000/x", "0000/output/x", "0000/input/", "-001/input/x", "00/input/x"])
def test_key_that_is_not_ours_is_refused(tmp_path: Path, key: str) -> None:
    write_arrays(tmp_path / "probe.npz", {key: X})
    with pytest.raises(BundleError, match="found an unknown key"):
        read_probe(tmp_path / "probe.npz")


def test_gap_between_batches_is_refused(tmp_path: Path) -> None:
    write_arrays(tmp_path / "probe.npz", {"0000/input/x": X, "0002/input/x": X})
    with pytest.raises(BundleError, match=r"found batches \[0, 2\]"):
        read_probe(tmp_path / "probe.npz")


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x05\x06" + bytes(18)])
def test_file_that_holds_no_probe_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "probe.npz").write_bytes(content)
    with pytest.raises(BundleError):
        read_probe(tmp_path / "probe.npz")


def test_array_that_promises_more_than_the_file_holds_is_refused(tmp_path: Path) -> None:
    header = (
        b"\x93NUMPY\x01\x00v\x00"
        + b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,), }".ljust(117)
        + b"\n"
    )
    with zipfile.ZipFile(tmp_path / "probe.npz", "w") as archive:
        archive.writestr("0000/input/x.npy", header)
    with pytest.raises(BundleError):
        read_probe(tmp_path / "probe.npz")
