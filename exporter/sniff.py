"""What a file is that is given for a model and is none, told by its suffix and by how it begins."""

from __future__ import annotations

import re
from pathlib import Path

PICKLE = "a pickle, which runs code when it is read"
NO_MODELS = {
    **dict.fromkeys((".pt", ".pth", ".pkl", ".bin", ".ckpt", ".pickle"), PICKLE),
    ".safetensors": "weights without a model",
}
FOREIGN = {
    ".tflite": "a TensorFlow Lite file",
    ".h5": "a Keras file",
    ".keras": "a Keras file",
    ".pb": "a TensorFlow graph",
}
TF2ONNX = "export the model that it was made from to ONNX, as with tf2onnx"

# how files begin that are often given for a model: a failed download, another format
_BEGINNINGS = (
    (b"version https://git-lfs", "a Git LFS pointer and not the file: git lfs pull brings it"),
    (b"PK\x03\x04", "a zip archive, as torch.save writes, and no model that is read without running it"),
    (b"\x80\x02", PICKLE),
    (b"\x89HDF\r\n", "an HDF5 file, as Keras saves: export it with tf2onnx"),
    (b"GGUF", "a GGUF file, which is quantized already"),
    (b"\x1f\x8b", "a gzip archive: unpack it"),
)


def looks_like(path: Path) -> str:
    """What a file is that is not what its name says, in words; empty where that cannot be told."""
    try:
        with open(path, "rb") as file:
            head = file.read(512)
    except OSError:
        return ""
    if not head:
        return "an empty file"
    if re.match(rb"\s*<(!doctype|html|\?xml)", head, re.IGNORECASE):
        return "a web page, as a failed download leaves"
    if head[4:8] == b"TFL3":
        return "a TensorFlow Lite file: export the model it was made from"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 30:
        return "safetensors: weights without a model"
    return next((said for beginning, said in _BEGINNINGS if head.startswith(beginning)), "")
