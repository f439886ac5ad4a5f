"""Counts as bytes and as text."""

import base64
import zlib

import numpy as np


def pack(counts: np.ndarray) -> str:
    """Counts (N, K + 1) as text, for messages that must be JSON; ``unpack`` turns it back."""
    header = ",".join(map(str, counts.shape))
    return f"{header}:{base64.b64encode(compress(counts)).decode('ascii')}"


def unpack(text: str) -> np.ndarray:
    """The counts of ``pack``, int32 (N, K + 1). Raises ValueError or zlib.error where the text is damaged."""
    header, _, body = text.partition(":")
    images, columns = map(int, header.split(","))
    return decompress(base64.b64decode(body, validate=True), images, columns)


def compress(counts: np.ndarray) -> bytes:
    """Counts (N, K + 1) in [0, 2**31) as bytes."""
    # zlib ends in a checksum, which SQLite's pages lack: a flipped bit does not pass for a vote.
    return zlib.compress(counts.astype("<i4").tobytes(), 1)


def decompress(blob: bytes, images: int, columns: int) -> np.ndarray:
    """The counts of ``compress``, int32; ValueError or zlib.error for damaged bytes."""
    return np.frombuffer(zlib.decompress(blob), "<i4").reshape(images, columns).astype(np.int32)
