import contextlib
import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from imagenet import encoded, photo
from PIL import Image

from shampax.framework.data.images import pictures
from shampax.framework.data.images.pictures import NotAnImage


def png(width, height, depth, color, content=b""):
    """Return a PNG file with a header for this size, bit depth and color type, and rows of bytes."""
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    parts = (b"IHDR", header), (b"IDAT", zlib.compress(content)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def png_that_says(width, height):
    """Return a PNG file of a few bytes whose header claims so many pixels."""
    return png(width, height, 8, 2)


@pytest.mark.parametrize(("color", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
@pytest.mark.parametrize("depth", [8, 16])
def test_all_depths_are_scaled_to_8_bits(depth, color, channels):
    """Fault: all values of 16-bit grey above 255 are white."""
    most = 2**depth - 1
    values = np.linspace(0, most, 64).round().astype(f">u{depth // 8}")
    content = b"\0" + np.repeat(values, channels).tobytes()
    pixels = pictures.decode(png(64, 1, depth, color, content))
    expected = np.repeat(values.astype(float)[:, None] * 255 / most, 3, axis=1)
    assert pixels.shape == (1, 64, 3) and pixels.dtype == np.uint8
    assert np.abs(pixels[0] - expected).max() <= 1


def test_every_kind_of_jpeg_and_png_becomes_rgb():
    """Fault: grey, palette, transparent or CMYK files, all of which ImageNet has, get another shape."""
    image = Image.fromarray(photo(1))
    for mode, kind in (("L", "JPEG"), ("CMYK", "JPEG"), ("P", "PNG"), ("RGBA", "PNG"), ("1", "PNG"), ("RGB", "PNG")):
        file = io.BytesIO()
        image.convert(mode).save(file, kind)
        pixels = pictures.decode(file.getvalue())
        assert (pixels.shape, pixels.dtype) == ((40, 56, 3), np.uint8)
    np.testing.assert_array_equal(pixels, photo(1))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "neither JPEG nor PNG"),
        (b"not an image", "neither JPEG nor PNG"),
        (encoded(photo(1), "GIF"), "neither JPEG nor PNG"),
        (encoded(photo(1), "BMP"), "neither JPEG nor PNG"),
        (encoded(photo(1))[:-20], "truncated"),
        (encoded(photo(1))[:300], "OSError: "),
        (encoded(photo(1), "PNG")[:600], "truncated"),
        (png_that_says(8_193, 8_192), "8193 x 8192 pixels are more than 67,108,864"),
        (png_that_says(30_000, 30_000), "DecompressionBombError"),
    ],
)
def test_invalid_images_are_refused(content, reason):
    """Faults: a truncated file is filled with grey; a decompression bomb exhausts the memory; other parsers read the
    file."""
    with pytest.raises(NotAnImage, match=reason):
        pictures.decode(content)


@settings(deadline=None, max_examples=100)
@given(st.sampled_from(["JPEG", "PNG"]), st.lists(st.tuples(st.integers(0, 10**6), st.binary(min_size=1, max_size=4))))
def test_damaged_files_are_decoded_or_refused(kind, damage):
    """Fault: an exception of the parser ends the run."""
    content = bytearray(encoded(photo(1, 8, 8), kind))
    for place, new in damage:
        place %= len(content)
        content[place : place + len(new)] = new
    with contextlib.suppress(NotAnImage):
        assert pictures.decode(bytes(content)).shape[2:] == (3,)


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 500), st.integers(1, 500), st.integers(0, 2**31))
def test_random_boxes_are_inside_and_have_allowed_shapes(height, width, seed):
    """Faults: a box leaves the image; height and width are swapped; areas or shapes are out of range."""
    rng = np.random.default_rng(seed)
    left, top, right, bottom = pictures.random_box(height, width, rng)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    if min(height, width) >= 100 and max(height, width) < 3 * min(height, width):
        wide, high = right - left, bottom - top
        assert 0.7 < wide / high < 1.43
        assert 0.07 < wide * high / (height * width) < 1.001


def test_random_boxes_vary_in_area_and_position(monkeypatch):
    """Faults: sides are drawn instead of areas; boxes prefer a corner."""
    monkeypatch.setattr(pictures, "_ASPECT", (1.0, 1.0))
    rng = np.random.default_rng(0)
    boxes = np.array([pictures.random_box(400, 400, rng) for _ in range(2000)])
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) / 400**2
    np.testing.assert_allclose(np.quantile(area, [0.25, 0.5, 0.75]), [0.31, 0.54, 0.77], atol=0.04)
    np.testing.assert_allclose(boxes[:, :2].mean(axis=0), 400 - boxes[:, 2:].mean(axis=0), rtol=0.1)


def test_a_strip_has_a_centred_box():
    """Faults: no box if none of ten draws fits; its shape is not allowed."""
    left, *others, bottom = pictures.random_box(10, 1_000, np.random.default_rng(0))
    np.testing.assert_allclose([left, *others, bottom], [500 - 20 / 3, 0, 500 + 20 / 3, 10])


def test_the_central_crop_equals_that_of_a_resized_image():
    """Fault: the crop is not the central 224 of an image resized to 256."""
    image = photo(3, 512, 640)
    direct = pictures.resized(image, pictures.central_box(512, 640, 0.875), 224)
    picture = Image.fromarray(image).resize((320, 256), Image.Resampling.BILINEAR).crop((48, 16, 272, 240))
    np.testing.assert_allclose(direct.astype(int), np.asarray(picture).astype(int), atol=2)


@pytest.mark.parametrize(("down", "right"), [(0, 0), (2, 0), (-1, 3), (0, -2)])
def test_shifts_fill_with_zeros(down, right):
    """Faults: pixels reappear on the other side; the shift has the opposite direction."""
    image = photo(1, 8, 9)
    moved = pictures.shifted(image, down, right)
    for row in range(8):
        for column in range(9):
            inside = 0 <= row - down < 8 and 0 <= column - right < 9
            expected = image[row - down, column - right] if inside else np.zeros(3)
            np.testing.assert_array_equal(moved[row, column], expected)


@pytest.mark.parametrize("channels", [1, 3])
def test_rand_augment_applies_all_its_operations(channels, monkeypatch):
    """Faults: an operation fails, or changes shape or type, for grey or coloured images; it takes one direction only;
    strength 0 changes an image."""
    image = photo(3, 40, 30)[..., :channels]
    for number, operation in enumerate(pictures._OPERATIONS):
        monkeypatch.setattr(pictures, "_OPERATIONS", (operation,))
        made = [pictures.rand_augmented(image, 1, 10, np.random.default_rng(seed)) for seed in range(6)]
        still = pictures.rand_augmented(image, 1, 0, np.random.default_rng(0))
        assert {(x.shape, x.dtype) for x in made} == {(image.shape, image.dtype)}
        kinds = len({x.tobytes() for x in made})
        if number in (1, 2):  # stretches the histogram
            assert kinds == 1 and made[0].max() > 250
            continue
        np.testing.assert_array_equal(still, image)
        if number in (0, 4, 5):  # have no direction
            assert kinds == 1 and (number == 0) == np.array_equal(made[0], image)
        else:
            assert kinds == (1 if number == 6 and channels == 1 else 2)  # colours of grey


def test_rand_augment_is_a_function_of_its_generator():
    """Faults: operations are drawn once; their order does not depend on the seed."""
    image = photo(3, 40, 30)
    first, again = ([pictures.rand_augmented(image, 2, 9, np.random.default_rng(n)) for n in range(20)] for _ in "ab")
    assert all(map(np.array_equal, first, again)) and len({x.tobytes() for x in first}) > 15
