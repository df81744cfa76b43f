"""Small images as PNG, the one format that every browser shows and the standard library can write."""

from __future__ import annotations

import base64
import struct
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["as_png", "is_png"]

_SIDE = 128  # pixels; a larger image is thinned
_HEAD = b"\x89PNG\r\n\x1a\n"


def as_png(sample: NDArray[Any]) -> str | None:
    """An image [H, W] or [C, H, W] with 1, 3 or 4 channels as base64 of a PNG; None for what is no image.

    Bytes are shown as they are, numbers in [0, 1] as shares of white, others from their least to their greatest.

    >>> as_png(np.zeros((2, 2), dtype=np.uint8))[:8]
    'iVBORw0K'
    """
    image = sample[None] if sample.ndim == 2 else sample
    if image.ndim != 3 or image.shape[0] not in (1, 3, 4) or 0 in image.shape or image.dtype.kind not in "biuf":
        return None
    stride = -(-max(image.shape[1:]) // _SIDE)
    pixels = _bytes(image[:, ::stride, ::stride]).transpose(1, 2, 0)
    height, width, channels = pixels.shape
    color = {1: 0, 3: 2, 4: 6}[channels]
    rows = np.zeros((height, 1 + width * channels), dtype=np.uint8)  # each row begins with its filter, none
    rows[:, 1:] = pixels.reshape(height, -1)
    parts = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, color, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows.tobytes(), 6)),
        (b"IEND", b""),
    ]
    return base64.b64encode(_HEAD + b"".join(_chunk(*part) for part in parts)).decode()


def _bytes(image: NDArray[Any]) -> NDArray[np.uint8]:
    if image.dtype == np.uint8:
        return image
    values = np.nan_to_num(image.astype(np.float64), posinf=0.0, neginf=0.0)
    low, high = float(values.min()), float(values.max())
    if low < 0.0 or high > 1.0:
        values = (values - low) / ((high - low) or 1.0)
    return np.rint(values * 255).astype(np.uint8)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def is_png(text: Any) -> bool:
    """True for what ``as_png`` may have written: a report shows nothing else as an image."""
    try:
        return isinstance(text, str) and base64.b64decode(text, validate=True).startswith(_HEAD)
    except ValueError:
        return False
