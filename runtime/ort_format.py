"""What ONNX Runtime says of an .ort file that it cannot open, in words that tell what to do."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import onnxruntime as ort

from runtime.errors import BundleError

if TYPE_CHECKING:
    from pathlib import Path

# inference_session.cc, ONNX Runtime 1.31: the file's format is not among those that this build knows
NEWER = r"ORT format model version \[(?P<found>[^\]]*)\] is not supported"
# graph.cc and session_state.cc, the same: a full build without the operator, and a reduced one without its kernel
MISSING = (
    r"(?P<found>\S+\(\d+\)) is not a registered function/op",
    r"No Op registered for (?P<found>\S+) with domain_version",
    r"(?:Could not find an implementation|Failed to find kernel) for (?P<found>[^\s:]+)",
)


def refusal(file: Path, said: str, made_by: str) -> BundleError:
    """The error to raise for an .ort file.

    Args:
        file: the .ort file.
        said: ONNX Runtime's own words.
        made_by: the version of ONNX Runtime that wrote it, as the manifest has it; may be empty.
    """
    here, maker = ort.__version__, f"onnxruntime {made_by}" if made_by else "another onnxruntime"
    if newer := re.search(NEWER, said):
        return BundleError(
            f"{file}: made for a newer onnxruntime",
            path=str(file),
            found=f"ORT format {newer['found']}, written by {maker}",
            expected=f"a format that onnxruntime {here} reads",
            do=f"install {maker} or newer on this machine, or export again with onnxruntime {here}",
        )
    for pattern in MISSING:
        if missing := re.search(pattern, said):
            return BundleError(
                f"{file}: an operator that onnxruntime {here} does not have here",
                path=str(file),
                found=missing["found"],
                expected=f"the operators of {maker}, which wrote the file",
                do="install that version, or build the reduced one with this bundle's required_operators_and_types.config",
            )
    return BundleError(
        f"{file}: ONNX Runtime {here} cannot open it",
        path=str(file),
        found=said[:300],
        expected=f"an .ort file as {maker} wrote it",
        do="copy the bundle again",
    )
