"""Image files to arrays, and the crops that training and evaluation take of images.

Pillow tolerates much, and warns of more; here a file is either decoded whole or refused with a reason.
"""

import io
import math

import numpy as np
from PIL import Image, ImageFile

FORMATS = ("JPEG", "PNG")  # Pillow's other parsers see nothing of what is read
MOST_PIXELS = 2**26  # of one image; a few bytes can ask for gigabytes. ImageNet's largest has 2**24.5
_SHOWN = 80  # characters of another library's message

# A file that ends early is refused; Pillow could fill up the rest with grey.
ImageFile.LOAD_TRUNCATED_IMAGES = False


class NotAnImage(Exception):
    """Bytes that are no image to train on; the message says why, in a few words."""


def decode(content: bytes) -> np.ndarray:
    """The pixels of a JPEG or PNG file, uint8 [H, W, 3].

    Grey, palette and CMYK images are converted to RGB, transparency is dropped, and an orientation noted in the file is
    ignored, as is usual for ImageNet.

    Raises:
      NotAnImage: another format, more than `MOST_PIXELS`, cut short or damaged.
    """
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            width, height = image.size
            if width * height > MOST_PIXELS:
                raise NotAnImage(f"{width} x {height} pixels are more than {MOST_PIXELS:,}")
            return np.asarray(image.convert("RGB"))
    except NotAnImage:
        raise
    except Image.UnidentifiedImageError:
        raise NotAnImage(f"neither {' nor '.join(FORMATS)}") from None
    except Exception as error:  # its parsers raise what they like: OSError, SyntaxError, struct.error, ...
        raise NotAnImage(f"{type(error).__name__}: {error}"[:_SHOWN]) from None


def resized(image: np.ndarray, box: tuple[float, float, float, float], size: int) -> np.ndarray:
    """The part of an image [H, W, C] inside a box (left, top, right, bottom), bilinear, uint8 [size, size, C]."""
    picture = Image.fromarray(image)
    return np.asarray(picture.resize((size, size), Image.Resampling.BILINEAR, box=box))


def random_box(
    height: int, width: int, rng: np.random.Generator, *, area: tuple[float, float], aspect: tuple[float, float]
) -> tuple[float, float, float, float]:
    """A box of random area and shape at a random place in an image (Szegedy et al. 2015, arXiv 1409.4842, section 6).

    Of ten draws the first that fits is taken; without any, the largest centred box of the nearest shape allowed.

    Args:
      height: of the image.
      width: of the image.
      rng: decides everything.
      area: smallest and largest share of the image, drawn evenly.
      aspect: least and greatest width / height, drawn evenly in the logarithm.
    """
    for _ in range(10):
        share = rng.uniform(*area)
        ratio = math.exp(rng.uniform(math.log(aspect[0]), math.log(aspect[1])))
        wide, high = (round(math.sqrt(height * width * share * r)) for r in (ratio, 1 / ratio))
        if 0 < wide <= width and 0 < high <= height:
            left, top = int(rng.integers(width - wide + 1)), int(rng.integers(height - high + 1))
            return left, top, left + wide, top + high
    ratio = min(max(width / height, aspect[0]), aspect[1])
    return _centred(height, width, min(width, height * ratio), min(height, width / ratio))


def central_box(height: int, width: int, share: float) -> tuple[float, float, float, float]:
    """The centred square whose side is a share of the shorter side.

    Resizing it to n equals resizing the shorter side to n / share and taking the central n x n.
    """
    side = min(height, width) * share
    return _centred(height, width, side, side)


def shifted(image: np.ndarray, down: int, right: int) -> np.ndarray:
    """An image [H, W, C] moved by so many pixels, black where it leaves nothing; the shape stays."""
    height, width, _ = image.shape
    result = np.zeros_like(image)
    source = image[max(-down, 0) : height - max(down, 0), max(-right, 0) : width - max(right, 0)]
    result[max(down, 0) : height - max(-down, 0), max(right, 0) : width - max(-right, 0)] = source
    return result


def _centred(height: int, width: int, wide: float, high: float) -> tuple[float, float, float, float]:
    left, top = (width - wide) / 2, (height - high) / 2
    return left, top, left + wide, top + high
