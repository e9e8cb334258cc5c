"""Images: from the bytes of PNG, JPEG, WebP, … files to tensors."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from engram.errors import EngramError

GREY = {"1", "L", "LA"}
MODES = {1: "L", 3: "RGB"}


def decode(
    images: Sequence[bytes | Path],
    ids: Sequence[str],
    *,
    channels: int | None = None,
    size: tuple[int, int] | None = None,
) -> Tensor:
    """Images from their bytes or files, as uint8 [n, c, h, w].

    `channels`: 1 (grey) or 3 (RGB); left out, 1 if all of them are grey. `size`: (height, width), to which
    they are resized (bilinear). Raises EngramError, naming the id, for an image that cannot be read and for
    the first of another size. Cost: about 0.1 ms for a small image.
    """
    first = _pixels(images[0], ids[0], channels, size)
    found = np.empty((len(images), *first.shape), np.uint8)
    for row, (image, id) in enumerate(zip(images, ids, strict=True)):
        pixels = _pixels(image, id, channels, size)
        if pixels.shape[1:] != first.shape[1:]:
            here, there = ("×".join(map(str, array.shape[1:])) for array in (pixels, first))
            raise EngramError(
                f"the image {id!r} has {here} pixels (height × width), the first one {there}; "
                "bring all to one size with image_size= (--image-size)"
            )
        if len(pixels) > len(first):
            return decode(images, ids, channels=3, size=size)
        found[row] = pixels
    return torch.from_numpy(found)


def _pixels(image: bytes | Path, id: str, channels: int | None, size: tuple[int, int] | None) -> np.ndarray:
    """One image as uint8 [c, h, w]."""
    try:
        with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
            return np.atleast_3d(np.asarray(_upright(opened, channels, size))).transpose(2, 0, 1)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise EngramError(f"the image {id!r} cannot be read: {error}") from error
    except EngramError as error:
        raise EngramError(f"the image {id!r} {error}") from error


def _upright(image: Image.Image, channels: int | None, size: tuple[int, int] | None) -> Image.Image:
    if image.mode[0] in "IF":
        raise EngramError(f"has mode {image.mode}; give images of 8 bits a channel")
    if image.format == "JPEG":
        image = ImageOps.exif_transpose(image)
    image = image.convert(MODES[channels or (1 if image.mode in GREY else 3)])
    return image if size is None else image.resize(size[::-1], Image.Resampling.BILINEAR)
