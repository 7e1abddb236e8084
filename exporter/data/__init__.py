"""What people have -> batches: arrays, pictures, lines of text, rows of tables; on this machine or behind fsspec."""

from __future__ import annotations

from exporter.data.images import Images
from exporter.data.read import NOTHING, Asked, Stream, preprocessing, read, require, skipped, stream
from exporter.data.tables import Columns
from exporter.data.text import Text

__all__ = [
    "NOTHING",
    "Asked",
    "Columns",
    "Images",
    "Stream",
    "Text",
    "preprocessing",
    "read",
    "require",
    "skipped",
    "stream",
]
