"""64-bit ARM cores under qemu: Debian's Python for arm64 with numpy and onnxruntime, unpacked into the cache, not installed.

Nothing on this machine changes and no root is needed: apt resolves and downloads with folders of its own, dpkg-deb unpacks,
pip downloads the wheels for arm64 of the versions that run here. The suite is this machine's; so is its Python's version.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from tests.devices import guest
from tests.devices.guest import ROOT, Guest

DEBIAN = ("python3-minimal", "libpython3-stdlib", "libstdc++6", "libgcc-s1")
WHEELS = ("numpy", "onnxruntime")
LIBRARIES = ("lib/aarch64-linux-gnu", "usr/lib/aarch64-linux-gnu")


@dataclass(frozen=True, slots=True, kw_only=True)
class Core:
    """What /proc/cpuinfo says of a core: ARM's number of the part (its MIDR), and the extensions."""

    part: str
    features: str


CORES = {
    "cortex-a53": Core(part="0xd03", features="fp asimd evtstrm aes pmull sha1 sha2 crc32 cpuid"),
    "cortex-a76": Core(
        part="0xd0b",
        features="fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp",
    ),
}


@functools.cache
def emulated(name: str) -> Guest:
    """A core of CORES."""
    emulator = guest.require("qemu-aarch64", "apt-get install qemu-user")
    command = _command(emulator, _root(emulator), name)
    return Guest(command=command, environment=guest.environment({"LC_ALL": "C.UTF-8"}))


def _command(emulator: str, root: Path, core: str) -> tuple[str, ...]:
    """The guest's Python; `-E` sets what the guest sees and qemu itself does not."""
    within = {
        "PYTHONHOME": root / "usr",
        "PYTHONPATH": f"{root / 'site'}{os.pathsep}{ROOT}",
        "LD_LIBRARY_PATH": os.pathsep.join(str(root / each) for each in LIBRARIES),
    }
    settings = [word for key, value in within.items() for word in ("-E", f"{key}={value}")]
    return (emulator, "-cpu", core, "-L", str(root / "cores" / core), *settings, str(root / "usr" / "bin" / "python3"))


def _root(emulator: str) -> Path:
    """The folder with the guest's files: usr, lib, site (the wheels), cores/<name> (what qemu shows as /)."""
    for tool in ("apt-get", "dpkg-deb"):
        guest.require(tool, "the guest is made of Debian's packages; run this on Debian")
    wanted = [f"{name}=={importlib.metadata.version(name)}" for name in WHEELS]
    suite = Path("/etc/os-release").read_text(encoding="utf-8")

    def build(folder: Path) -> None:
        _unpack_debian(folder)
        _unpack_wheels(folder, wanted)
        for name, core in CORES.items():
            _show(folder, name, core)
        # keeps the bytecode of what every run imports: seconds each time
        _run([*_command(emulator, folder, next(iter(CORES))), "-c", "import numpy, onnxruntime, json, zipfile"])

    return guest.built("arm", (*wanted, suite, Path(__file__).read_bytes()), build)


def _unpack_debian(folder: Path) -> None:
    """DEBIAN and what they depend on, for arm64, from the sources this machine's apt has."""
    state = folder / "apt"
    for each in ("lists/partial", "cache/archives/partial"):
        (state / each).mkdir(parents=True)
    (state / "status").touch()
    settings = {
        "Dir::State": str(state),
        "Dir::State::lists": str(state / "lists"),
        "Dir::State::status": str(state / "status"),
        "Dir::Cache": str(state / "cache"),
        "Debug::NoLocking": "true",
        "APT::Architecture": "arm64",
        "APT::Architectures": "arm64",
        "APT::Sandbox::User": "root",  # root's apt would download as the user _apt, who cannot write here
        "APT::Install-Recommends": "false",
        "Acquire::Languages": "none",
        "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled": "false",  # application icons and the like
    }
    given = [word for key, value in settings.items() for word in ("-o", f"{key}={value}")]
    _run(["apt-get", "-q", *given, "update"])
    _run(["apt-get", "-q", *given, "install", "-y", "--download-only", *DEBIAN])
    for package in sorted((state / "cache" / "archives").glob("*.deb")):
        _run(["dpkg-deb", "-x", str(package), str(folder)])
    if not (folder / "lib").exists():  # since trixie everything is below usr
        (folder / "lib").symlink_to(Path("usr", "lib"))
    for each in (state, folder / "usr" / "share", folder / "etc", folder / "var"):
        shutil.rmtree(each, ignore_errors=True)


def _unpack_wheels(folder: Path, wanted: list[str]) -> None:
    """The wheels for the guest's Python. pip does not run in the guest."""
    version = re.sub(r"^python", "", (folder / "usr" / "bin" / "python3").readlink().name)
    platforms = [f"manylinux_2_{minor}_aarch64" for minor in range(17, 42)] + ["manylinux2014_aarch64"]
    tags = [word for each in platforms for word in ("--platform", each)]
    wheels = folder / "wheels"
    pip = (
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "--dest",
        str(wheels),
    )
    _run([*pip, "--python-version", version, "--implementation", "cp", *tags, *wanted])
    for wheel in wheels.glob("*.whl"):
        with zipfile.ZipFile(wheel) as packed:
            packed.extractall(folder / "site")
    shutil.rmtree(wheels)


def _show(folder: Path, name: str, core: Core) -> None:
    """cores/<name>: the guest's files and a /proc/cpuinfo of that core, which onnxruntime reads and qemu before 8 has not."""
    prefix = folder / "cores" / name
    (prefix / "proc").mkdir(parents=True)
    for each in ("usr", "lib"):
        (prefix / each).symlink_to(Path("..", "..", each))
    blocks = (
        f"processor\t: {number}\nBogoMIPS\t: 100.00\nFeatures\t: {core.features}\nCPU implementer\t: 0x41\n"
        f"CPU architecture: 8\nCPU variant\t: 0x0\nCPU part\t: {core.part}\nCPU revision\t: 4\n\n"
        for number in range(os.cpu_count() or 1)
    )
    (prefix / "proc" / "cpuinfo").write_text("".join(blocks), encoding="utf-8")


def _run(command: list[str]) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment["LC_ALL"] = "C"
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, f"{command[0]} ended with {done.returncode}: {(done.stderr or done.stdout)[-2000:]}"
