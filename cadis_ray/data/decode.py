"""From the bytes of an image file to its pixels."""

import io

import numpy as np
from PIL import Image

from cadis_ray.errors import DataError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP")  # few parsers for what strangers wrote; Pillow's for EPS runs a program
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
MODES = ("RGB", "L", "1", "P", "LA", "RGBA", "CMYK", "YCbCr")


def decode(blob: bytes, where: str, size: int | None = None) -> np.ndarray:
    """Pixels (3, H, W) uint8 of an encoded image.

    As every ImageNet loader does, grey, palette and CMYK images become RGB, alpha and EXIF rotation are ignored.
    ``size``: the papers' test transform, the shorter side to size * 256 / 224 (bilinear, antialiased), then the
    central size x size; the same pixels as torchvision's Resize and CenterCrop.

    Raises DataError, naming ``where``, if the image is broken, truncated or has more than 8 bits a channel.
    """
    image = open_image(blob, where).convert("RGB")
    if size is not None:
        image = _centre(image, size)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def open_image(blob: bytes, where: str) -> Image.Image:
    """The decoded image in its own mode, one of ``MODES``; errors as of ``decode``."""
    try:
        image = Image.open(io.BytesIO(blob), formats=FORMATS)
        image.load()
    except Exception as error:  # Pillow's parsers raise what they meet: SyntaxError, struct.error, EOFError
        text = "not a PNG, JPEG, WebP or BMP image" if "cannot identify" in str(error) else str(error)
        raise DataError(f"{where}: cannot decode its {len(blob)} bytes: {text}") from None
    if image.mode not in MODES:
        raise DataError(f"{where}: got pixels of mode {image.mode}; need 8 bits a channel")
    return image


def _centre(image: Image.Image, size: int) -> Image.Image:
    short = round(size * 256 / 224)
    width, height = image.size
    shorter = min(width, height)
    resized = (int(short * width / shorter), int(short * height / shorter))
    image = image.resize(resized, Image.Resampling.BILINEAR)
    left, top = round((resized[0] - size) / 2), round((resized[1] - size) / 2)
    return image.crop((left, top, left + size, top + size))
