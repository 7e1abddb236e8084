"""Other CPUs than this one, for tests: x86 without VNNI by masked cpuid or qemu, ARM by qemu. README.md tells how.

    done = devices.run("avx2", CODE, str(bundle))

runs Python source in a guest that has numpy, onnxruntime and this repository's `runtime`; `devices.check("avx2", bundle)` is the
Verdict that a bundle gets there.
"""

from __future__ import annotations

from tests.devices.process import ARM, DEVICES, X86, check, run

__all__ = ["ARM", "DEVICES", "X86", "check", "run"]
