"""Decoding of image files, the crops of training and evaluation, and RandAugment.

Pillow accepts many damaged files; here a file is either decoded whole or refused with a reason.
"""

import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageFile, ImageOps

FORMATS = ("JPEG", "PNG")  # Pillow's other parsers are not used
MOST_PIXELS = 2**26  # per image: a small file may decode to gigabytes. ImageNet's largest has 2**24.5
_AREA, _ASPECT = (0.08, 1.0), (0.75, 4 / 3)  # of a training crop: share of the image, and width / height
_SHOWN = 80  # characters of another library's message

# Refuse a truncated file; Pillow could fill the rest with grey.
ImageFile.LOAD_TRUNCATED_IMAGES = False


class NotAnImage(Exception):
    """Bytes that cannot be used as an image; the message gives the reason in a few words."""


def decode(content: bytes) -> np.ndarray:
    """Return the pixels of a JPEG or PNG file, uint8 [H, W, 3].

    Grey, palette and CMYK images are converted to RGB, 16 bits to 8. Transparency and orientation tags are ignored, as
    is usual for ImageNet.

    Raises:
      NotAnImage: the file has another format or more than `MOST_PIXELS`, or is truncated or damaged.
    """
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            width, height = image.size
            if width * height > MOST_PIXELS:
                raise NotAnImage(f"{width} x {height} pixels are more than {MOST_PIXELS:,}")
            if image.mode.startswith("I"):  # 16 bits of grey, which Pillow clips
                grey = (np.asarray(image, np.uint32) + 128) // 257
                return np.stack([grey.astype(np.uint8)] * 3, axis=-1)
            return np.asarray(image.convert("RGB"))
    except NotAnImage:
        raise
    except Image.UnidentifiedImageError:
        raise NotAnImage(f"neither {' nor '.join(FORMATS)}") from None
    except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error, ...
        raise NotAnImage(f"{type(error).__name__}: {error}"[:_SHOWN]) from None


def resized(image: np.ndarray, box: tuple[float, float, float, float], size: int) -> np.ndarray:
    """Resize a box (left, top, right, bottom) of an image [H, W, C] to uint8 [size, size, C], bilinear."""
    picture = Image.fromarray(image)
    return np.asarray(picture.resize((size, size), Image.Resampling.BILINEAR, box=box))


def random_box(height: int, width: int, rng: np.random.Generator) -> tuple[float, float, float, float]:
    """Return a box of random area and shape at a random place (Szegedy et al. 2015, arXiv 1409.4842, section 6).

    Its share of the image is drawn uniformly, width / height uniformly in the logarithm. The first of ten draws that
    fits is used; if none fits, the largest centred box of the nearest allowed shape.
    """
    for _ in range(10):
        share = rng.uniform(_AREA[0], _AREA[1])
        ratio = math.exp(rng.uniform(math.log(_ASPECT[0]), math.log(_ASPECT[1])))
        wide, high = (round(math.sqrt(height * width * share * r)) for r in (ratio, 1 / ratio))
        if 0 < wide <= width and 0 < high <= height:
            left, top = int(rng.integers(width - wide + 1)), int(rng.integers(height - high + 1))
            return left, top, left + wide, top + high
    ratio = min(max(width / height, _ASPECT[0]), _ASPECT[1])
    return _centred(height, width, min(width, height * ratio), min(height, width / ratio))


def central_box(height: int, width: int, share: float) -> tuple[float, float, float, float]:
    """Return the centred square whose side is a share of the shorter side.

    Resizing it to n equals resizing the shorter side to n / share and taking the central n x n.
    """
    side = min(height, width) * share
    return _centred(height, width, side, side)


def shifted(image: np.ndarray, down: int, right: int) -> np.ndarray:
    """Return an image [H, W, C] shifted by a number of pixels, filled with black; the shape stays."""
    height, width, _ = image.shape
    margin = max(abs(down), abs(right))
    padded = np.pad(image, ((margin, margin), (margin, margin), (0, 0)))
    return padded[margin - down :, margin - right :][:height, :width]


def rand_augmented(image: np.ndarray, operations: int, magnitude: float, rng: np.random.Generator) -> np.ndarray:
    """Apply random operations one after the other: RandAugment (Cubuk et al. 2020, arXiv 1909.13719).

    The operations and their strengths are those of the paper, of which `magnitude` takes a tenth for each unit; those
    with two directions take either. What moves into the image is black.

    Args:
      image: uint8 [H, W, C], grey or RGB.
      operations: number of operations.
      magnitude: 0 to 10.
      rng: of the choice and the direction.
    """
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    for _ in range(operations):
        operation = _OPERATIONS[int(rng.integers(len(_OPERATIONS)))]
        picture = operation(picture, float(rng.choice((-1, 1))) * magnitude / _MOST_MAGNITUDE)
    return np.asarray(picture).reshape(image.shape)


def _moved(picture: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    """Return the picture whose pixel (x, y) is that at (a x + b y + c, d x + e y + f) of the given one."""
    return picture.transform(picture.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)


def _enhanced(kind: Any) -> Callable[[Image.Image, float], Image.Image]:
    return lambda picture, strength: kind(picture).enhance(1 + 0.9 * strength)


_MOST_MAGNITUDE = 10
# Operations on (picture, strength from -1 to 1). The strongest turn by 30 degrees, shear by 0.3, shift by 0.45 of a
# side, keep 4 bits of a pixel or invert all pixels, and change colours by a factor of 0.1 or 1.9.
_OPERATIONS: tuple[Callable[[Image.Image, float], Image.Image], ...] = (
    lambda picture, _: picture,
    lambda picture, _: ImageOps.autocontrast(picture),
    lambda picture, _: ImageOps.equalize(picture),
    lambda picture, strength: picture.rotate(30 * strength, Image.Resampling.BILINEAR),
    lambda picture, strength: ImageOps.solarize(picture, round(256 * (1 - abs(strength)))),
    lambda picture, strength: ImageOps.posterize(picture, 8 - round(4 * abs(strength))),
    _enhanced(ImageEnhance.Color),
    _enhanced(ImageEnhance.Contrast),
    _enhanced(ImageEnhance.Brightness),
    _enhanced(ImageEnhance.Sharpness),
    lambda picture, strength: _moved(picture, (1, 0.3 * strength, 0, 0, 1, 0)),
    lambda picture, strength: _moved(picture, (1, 0, 0, 0.3 * strength, 1, 0)),
    lambda picture, strength: _moved(picture, (1, 0, 0.45 * strength * picture.width, 0, 1, 0)),
    lambda picture, strength: _moved(picture, (1, 0, 0, 0, 1, 0.45 * strength * picture.height)),
)


def _centred(height: int, width: int, wide: float, high: float) -> tuple[float, float, float, float]:
    left, top = (width - wide) / 2, (height - high) / 2
    return left, top, left + wide, top + high
