"""Stored images: the published pixels where that is promised, near them in fast mode, else a reason."""

import io
import json
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from cxrdist.errors import UserError
from cxrdist.shards import convert
from cxrdist.shards.convert import Pixels

GOLDEN = Path(__file__).parents[1] / "golden" / "preprocess"
SOURCES = json.loads((GOLDEN / "preprocess.json").read_text())["files"]
UNREADABLE = {name: entry["message"] for name, entry in SOURCES.items() if not entry["output_written"]}


def published(content: bytes) -> bytes:
    output = io.BytesIO()
    image = Image.open(io.BytesIO(content)).convert("RGB").resize((600, 600), Image.Resampling.BILINEAR)
    image.save(output, "JPEG", quality=95, optimize=True)
    return output.getvalue()


def rgb(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).astype(int)


def saved(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    output = io.BytesIO()
    image.save(output, kind, **options)
    return output.getvalue()


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    smooth = 120 + 60 * np.sin(x / 90) * np.cos(y / 70) + np.random.default_rng(seed).normal(0, 2, (height, width))
    return Image.fromarray(smooth.clip(0, 255).astype(np.uint8))


@pytest.mark.fast
@pytest.mark.parametrize("name", sorted(set(SOURCES) - set(UNREADABLE) - {"gray16.png"}))
def test_golden_sources_become_the_published_pixels(name: str) -> None:
    content = (GOLDEN / "src" / name).read_bytes()
    converted = convert.convert_bytes(content)
    assert isinstance(converted, convert.Converted)
    expected = Image.open(GOLDEN / "expected" / f"{Path(name).stem}.png")
    assert converted.channels == len(expected.getbands())
    tolerance = 1 if name == "rgb.jpeg" else 0  # decoders of two Pillow versions
    resized = convert.resized_to_store(content)
    assert np.abs(np.asarray(resized).astype(int) - np.asarray(expected)).max() <= tolerance
    assert np.array_equal(rgb(converted.jpeg), rgb(published(content)))


@pytest.mark.fast
@pytest.mark.parametrize("name", sorted(UNREADABLE))
def test_golden_unreadable_files_give_the_published_reason(name: str) -> None:
    reason = convert.convert(str(GOLDEN / "src" / name))
    assert isinstance(reason, str)
    assert reason in UNREADABLE[name]


@pytest.mark.fast
def test_16_bits_are_scaled_by_the_bits_in_use() -> None:
    ramp = np.linspace(0, 1, 600 * 600).reshape(600, 600)
    expected = np.round(ramp * 255)
    for bits in (16, 12):
        values = (ramp * ((1 << bits) - 1)).round().astype(np.uint16)
        stored = np.asarray(convert.resized_to_store(saved(Image.fromarray(values), "PNG")))
        assert np.abs(stored - expected).max() <= 1
    golden = np.asarray(convert.resized_to_store((GOLDEN / "src" / "gray16.png").read_bytes()))
    assert golden.mean() < 100  # clipped, as published, it is 249.8: white


@pytest.mark.fast
@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"progressive": True}])
def test_exact_equals_the_published_path_on_grey(mode: str, options: dict[str, object]) -> None:
    for height, width in ((701, 650), (300, 333)):
        content = saved(picture(height, width).convert(mode), quality=80, **options)
        converted = convert.convert_bytes(content)
        assert isinstance(converted, convert.Converted)
        assert converted.channels == 1
        assert np.array_equal(rgb(converted.jpeg), rgb(published(content)))


@pytest.mark.fast
def test_one_coloured_pixel_keeps_the_colour() -> None:
    pixels = np.asarray(picture(640, 640).convert("RGB")).copy()
    pixels[300:304, 300:304] = (200, 90, 90)
    for content in (saved(Image.fromarray(pixels), quality=95), saved(Image.fromarray(pixels), "PNG")):
        converted = convert.convert_bytes(content)
        assert isinstance(converted, convert.Converted)
        assert converted.channels == 3
        assert np.array_equal(rgb(converted.jpeg), rgb(published(content)))


@pytest.mark.parametrize(("height", "width"), [(2400, 2500), (2501, 2403)])
def test_fast_stays_within_48_db_of_exact(height: int, width: int) -> None:
    content = saved(picture(height, width), quality=80)
    exact, fast = (
        np.asarray(convert.resized_to_store(content, Pixels(mode))).astype(float) for mode in ("exact", "fast")
    )
    assert not np.array_equal(exact, fast)
    assert 10 * np.log10(255**2 / np.mean((exact - fast) ** 2)) >= 48


def test_fast_never_decodes_below_the_target_and_keeps_colour_exact() -> None:
    small = saved(picture(1000, 2600), quality=80)
    assert np.array_equal(convert.resized_to_store(small, Pixels("fast")), convert.resized_to_store(small))
    grey = picture(2400, 2400)
    colour = saved(Image.merge("RGB", (grey, grey.point(lambda value: value // 2), grey)), quality=80)
    assert np.array_equal(convert.resized_to_store(colour, Pixels("fast")), convert.resized_to_store(colour))


@pytest.mark.fast
def test_a_bomb_is_refused_from_its_header() -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    side = 19_000  # as a file of 350 kB; what is told here is told by its header
    header = side.to_bytes(4, "big") * 2 + bytes([8, 0, 0, 0, 0])
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(side + 1)))
    start = time.monotonic()
    reason = convert.convert_bytes(bomb)
    assert isinstance(reason, str)
    assert "361000000 pixels" in reason
    assert time.monotonic() - start < 1


@pytest.mark.fast
def test_odd_modes_become_what_pillow_makes_of_them() -> None:
    grey = picture(70, 80)
    for image in (grey.convert("P"), grey.convert("1"), grey.convert("LA"), grey.convert("RGBA"), grey.convert("CMYK")):
        content = saved(image, "TIFF" if image.mode == "CMYK" else "PNG")
        converted = convert.convert_bytes(content)
        assert isinstance(converted, convert.Converted)
        assert np.array_equal(rgb(converted.jpeg), rgb(published(content)))
    floating = Image.fromarray(np.ones((9, 9), np.float32))
    assert "floating-point" in str(convert.convert_bytes(saved(floating, "TIFF")))


@pytest.mark.fast
def test_workers_give_results_in_order_and_pass_reasons_on(tmp_path: Path) -> None:
    images = []
    for number in range(12):
        path = tmp_path / f"{number}.jpg"
        path.write_bytes(saved(picture(40 + number, 50)) if number != 5 else b"")
        images.append(SimpleNamespace(path=str(path), reason="known" if number == 7 else ""))
    alone = list(convert.convert_in_order(iter(images), Pixels(), 1))
    assert list(convert.convert_in_order(iter(images), Pixels(), 2)) == alone
    assert [image for image, _ in alone] == images
    assert (alone[5][1], alone[7][1]) == ("cannot identify image file", "known")
    assert convert.convert(str(tmp_path / "none.jpg")) == "cannot be read: No such file or directory"


@pytest.mark.fast
@pytest.mark.parametrize("size", [384, 600, 1024])
def test_other_sizes_are_squashed_by_the_same_rule(size: int) -> None:
    content = saved(picture(701, 650), "PNG")
    expected = picture(701, 650).resize((size, size), Image.Resampling.BILINEAR)
    assert np.array_equal(convert.resized_to_store(content, Pixels(size_px=size)), expected)


@pytest.mark.fast
@pytest.mark.parametrize(("height", "width"), [(700, 500), (301, 640), (600, 600), (3, 4000)])
def test_pad_keeps_the_aspect_and_centres_on_black(height: int, width: int) -> None:
    for source in (picture(height, width), Image.merge("RGB", [picture(height, width, seed) for seed in range(3)])):
        stored = np.asarray(convert.resized_to_store(saved(source, "PNG"), Pixels(size_px=400, fit="pad")))
        scale = 400 / max(height, width)
        inner = source.resize((max(1, round(width * scale)), max(1, round(height * scale))), Image.Resampling.BILINEAR)
        left, top = (400 - inner.width) // 2, (400 - inner.height) // 2
        assert stored.shape[:2] == (400, 400)
        assert np.array_equal(stored[top : top + inner.height, left : left + inner.width], inner)
        outside = np.ones((400, 400), bool)
        outside[top : top + inner.height, left : left + inner.width] = False
        assert not stored[outside].any()


def test_fast_halves_where_the_stored_size_leaves_twice_as_many_pixels() -> None:
    content = saved(picture(1540, 1601), quality=80)
    for fit in ("squash", "pad"):
        exact, fast, larger, larger_exact = (
            np.asarray(convert.resized_to_store(content, Pixels(mode, size, fit))).astype(float)
            for mode, size in (("exact", 384), ("fast", 384), ("fast", 600), ("exact", 600))
        )
        assert not np.array_equal(exact, fast)
        assert 10 * np.log10(255**2 / np.mean((exact - fast) ** 2)) >= 48
        assert np.array_equal(larger, larger_exact)
    tall = saved(picture(1700, 900), quality=80)  # its shorter side alone would not allow it
    assert convert.decode(tall, Pixels("fast", 400, "pad")).image.size == (450, 850)
    assert convert.decode(tall, Pixels("fast", 400)).image.size == (900, 1700)


@pytest.mark.fast
def test_sizes_out_of_range_are_an_error() -> None:
    for size in (383, 2049):
        with pytest.raises(UserError, match="384 to 2048"):
            Pixels(size_px=size)


@pytest.mark.fast
def test_the_source_size_and_its_orientation_are_recorded_and_not_applied() -> None:
    source = picture(90, 70)
    for kind in ("JPEG", "PNG", "WEBP"):
        turned = Image.Exif()
        turned[0x0112] = 6
        plain = convert.convert_bytes(saved(source, kind))
        converted = convert.convert_bytes(saved(source, kind, exif=turned))
        assert isinstance(plain, convert.Converted)
        assert isinstance(converted, convert.Converted)
        assert (converted.width, converted.height, converted.orientation) == (70, 90, 6)
        assert (plain.width, plain.height, plain.orientation) == (70, 90, 1)
        assert converted.jpeg == plain.jpeg
        assert converted.header == {}
    damaged = convert.convert_bytes(saved(source, exif=b"Exif\0\0II*\0\xff\xff\xff\xff"))
    assert isinstance(damaged, convert.Converted)
    assert damaged.orientation == 1


@pytest.mark.fast
def test_nothing_but_pixels_is_stored() -> None:
    for kind in ("JPEG", "GIF", "PNG"):
        exif = Image.Exif()
        exif[0x010E] = "Jane Roe"  # the image's description
        content = saved(
            picture(50, 60).convert("CMYK" if kind == "JPEG" else "L"), kind, comment=b"Jane Roe", exif=exif
        )
        assert b"Jane Roe" in content
        converted = convert.convert_bytes(content)
        assert isinstance(converted, convert.Converted)
        assert b"Jane Roe" not in converted.jpeg
