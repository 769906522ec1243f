"""Whatever a picture is, it becomes upright uint8 RGB, or a typed error.

Never part of a picture.
"""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ingest_fakes import encoded, picture, write_picture
from PIL import Image, ImageOps

from ingest.pictures.headers import exif_orientation, read_header
from ingest.pictures.images import decode_rgb, decoder_versions, load_sample, probe
from ingest.records.base import PictureRecord
from warehouse.errors import PictureError, SourceError
from warehouse.format.schema import picture_arrays
from warehouse.settings import BuildSettings

LIMIT = 10_000_000


def decoded(data: bytes) -> np.ndarray:
    return decode_rgb(data, name="p", max_pixels=LIMIT)[0]


def saved(image: Image.Image, kind: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "GIF", "WEBP"])
def test_lossless_formats_give_back_their_pixels(kind):
    pixels = picture()
    if kind == "GIF":
        pixels = np.repeat((pixels[:, :, :1] > 127) * np.uint8(255), 3, axis=2)
    options = {"lossless": True} if kind == "WEBP" else {}
    np.testing.assert_array_equal(decoded(encoded(pixels, kind, **options)), pixels)


@pytest.mark.parametrize(
    "options",
    [{}, {"progressive": True}, {"subsampling": 0}],
    ids=["baseline", "progressive", "not subsampled"],
)
def test_jpeg_agrees_with_pillow(options):
    data = encoded(picture(101, 67), quality=95, **options)
    theirs = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    assert (
        np.abs(decoded(data).astype(int) - theirs).max() <= 6
    )  # two libjpegs may upsample colour differently


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_every_exif_orientation_is_applied_and_recorded(kind, orientation):
    image = Image.fromarray(picture(40, 24))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    data = saved(image, kind, exif=exif, **options)
    pixels, found = decode_rgb(data, name="p", max_pixels=LIMIT)
    header = read_header(data, "p")
    upright = image.copy()
    upright.getexif()[0x0112] = orientation
    expected = np.asarray(ImageOps.exif_transpose(upright)).astype(int)
    assert found == header.orientation == orientation
    assert (header.raw_width, header.raw_height) == (40, 24)
    assert pixels.shape == (header.height, header.width, 3) == expected.shape
    assert np.abs(pixels.astype(int) - expected).max() <= (8 if kind == "JPEG" else 0)


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA", "CMYK"])
def test_other_modes_become_rgb(mode):
    image = Image.fromarray(picture()).convert(mode)
    kind = "TIFF" if mode == "CMYK" else "PNG"
    reference = (
        image.convert("RGBA").convert("RGB") if mode in ("P", "LA") else image.convert("RGB")
    )
    np.testing.assert_array_equal(decoded(saved(image, kind)), np.asarray(reference))


def test_a_grey_jpeg_becomes_rgb():
    pixels = decoded(saved(Image.fromarray(picture()[:, :, 0]), "JPEG", quality=95))
    assert (pixels[:, :, 0] == pixels[:, :, 1]).all()
    assert np.abs(pixels[:, :, 0].astype(int) - picture()[:, :, 0]).max() < 8


def test_a_cmyk_jpeg_becomes_rgb():
    image = Image.fromarray(picture()).convert("CMYK")
    assert np.abs(decoded(saved(image, "JPEG", quality=100)).astype(int) - picture()).max() < 12


def test_the_alpha_channel_is_dropped_not_composited():
    rgba = np.dstack([picture(), np.zeros((48, 64), np.uint8)])
    np.testing.assert_array_equal(decoded(encoded(rgba, "PNG")), picture())


def test_a_palette_with_transparent_entries_is_read_without_a_warning():
    image = Image.fromarray(picture()).quantize(16)
    data = saved(image, "PNG", transparency=bytes([0, 128] + [255] * 14))
    np.testing.assert_array_equal(decoded(data), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_not_clipped(kind):
    wide = np.linspace(0, 65535, 64 * 48).astype(np.uint16).reshape(48, 64)
    pixels = decoded(saved(Image.fromarray(wide), kind))
    np.testing.assert_array_equal(pixels[:, :, 1], np.round(wide / 257).astype(np.uint8))


def test_16_bit_colour_png_covers_the_whole_range():
    rows = b"".join(b"\0" + struct.pack(">6H", 0, 65535, 32768, 65535, 0, 257) for _ in range(2))
    data = png(2, 2, rows, bits=16, colour=2)
    assert decoded(data)[0].tolist() == [[0, 255, 128], [255, 0, 1]]


def test_float_samples_are_refused():
    with pytest.raises(PictureError, match="unreadable: p; expected 8 or 16 bits a channel"):
        decoded(saved(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"))


def test_an_animation_gives_its_first_frame():
    frames = [Image.fromarray(np.full((8, 8, 3), value, np.uint8)) for value in (0, 255)]
    assert not decoded(saved(frames[0], "GIF", save_all=True, append_images=frames[1:])).any()


def test_content_counts_and_not_the_extension(tmp_path):
    (tmp_path / "a.jpg").write_bytes(encoded(picture(), "PNG"))
    assert probe(tmp_path, "a.jpg", max_pixels=LIMIT).kind == "PNG"


def png(width: int, height: int, rows: bytes, bits: int = 8, colour: int = 2) -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        )

    head = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


JPEG_100K = encoded(picture()).replace(
    struct.pack(">HH", 48, 64), struct.pack(">HH", 50_000, 50_000), 1
)
BAD = {
    "an empty file": (b"", "empty_file"),
    "text": (b"not a picture at all, though named like one", "unreadable"),
    "a JPEG cut in half": (encoded(picture(400, 400))[:9000], "truncated"),
    "a JPEG without its last bytes": (encoded(picture())[:-40], "truncated"),
    "the first three bytes of a JPEG": (b"\xff\xd8\xff", "truncated"),
    "a PNG cut in half": (encoded(picture(200, 200), "PNG")[:5000], "truncated"),
    "a header of 100,000 x 100,000 pixels": (png(100_000, 100_000, b"\0"), "too_large"),
    "a JPEG header of 50,000 x 50,000 pixels": (JPEG_100K, "too_large"),
    "an icon, which is no accepted format": (
        saved(Image.fromarray(picture(32, 32)), "ICO"),
        "unreadable",
    ),
    "an SVG": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "unreadable"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_pictures_raise_a_picture_error_with_name_and_reason(case, tmp_path):
    data, reason = BAD[case]
    (tmp_path / "bad.jpg").write_bytes(data)
    for read in (
        lambda: decode_rgb(data, name="bad.jpg", max_pixels=LIMIT),
        lambda: probe(tmp_path, "bad.jpg", max_pixels=LIMIT),
    ):
        with pytest.raises(PictureError, match=r"bad\.jpg") as caught:
            read()
        assert caught.value.reason == reason
        assert "\n" not in str(caught.value)


def test_bytes_missing_in_the_middle_of_a_jpeg_are_noticed_when_decoded():
    data = encoded(picture(200, 200), quality=95)
    with pytest.raises(PictureError):
        decoded(data[:4000] + data[7000:])


@given(
    st.binary(max_size=300),
    st.sampled_from(
        [
            b"",
            b"\xff\xd8\xff\xe0",
            b"\x89PNG\r\n\x1a\n",
            b"GIF89a",
            b"II*\0",
            b"BM",
            b"RIFF\0\0\0\0WEBP",
        ]
    ),
)
@settings(max_examples=200, deadline=None, derandomize=True)
@pytest.mark.filterwarnings("ignore")
def test_arbitrary_bytes_give_pixels_or_a_picture_error(data, magic):
    try:
        pixels, orientation = decode_rgb(magic + data, name="p", max_pixels=100_000)
    except PictureError:
        return
    assert pixels.dtype == np.uint8
    assert orientation in range(1, 9)


@given(st.binary(max_size=64))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_arbitrary_exif_has_an_orientation(data):
    assert exif_orientation(b"Exif\0\0II*\0" + data) in range(1, 9)
    assert exif_orientation(data) in range(1, 9)


def test_decoders_are_named_with_their_versions():
    assert set(decoder_versions()) == {"simplejpeg", "pillow", "opencv-python-headless"}


def record_of(path, sha256: str) -> PictureRecord:
    boxes = np.array([[8, 4, 40, 36], [0, 0, 64, 48]], np.float64)
    return PictureRecord(
        path.name,
        "train",
        path.name,
        sha256,
        64,
        48,
        1,
        boxes,
        np.array([1, 0], np.int16),
        np.array([0, 8], np.uint8),
    )


def test_a_sample_has_exactly_the_rows_of_the_layout(tmp_path):
    import hashlib

    write_picture(tmp_path / "a.jpg")
    record = record_of(
        tmp_path / "a.jpg", hashlib.sha256((tmp_path / "a.jpg").read_bytes()).hexdigest()
    )
    chosen = BuildSettings(target_size=(32, 64), max_boxes=3)
    sample, seconds = load_sample(record, tmp_path, chosen, 2)
    assert {name: (array.shape, str(array.dtype)) for name, array in sample.items()} == {
        spec.name: (spec.shape[1:], spec.dtype) for spec in picture_arrays(1, chosen)
    }
    assert set(seconds) == {"read", "decode", "letterbox"}
    assert sample["box_mask"].tolist() == [True, True, False]
    assert sample["label"].tolist() == [1, 0, -1]
    assert sample["box_flags"].tolist() == [0, 8, 0]
    scale_x, scale_y, pad_x, pad_y, *_ = sample["letterbox"].astype(np.float64)
    pixels = sample["box"][:2].astype(np.float64) * [64, 32, 64, 32]
    np.testing.assert_allclose(
        (pixels - [pad_x, pad_y] * 2) / ([scale_x, scale_y] * 2), record.boxes_xyxy, atol=1e-4
    )


def test_a_file_that_changed_since_it_was_listed_is_refused(tmp_path):
    write_picture(tmp_path / "a.jpg")
    with pytest.raises(
        SourceError, match=r"changed while being built: a.jpg; run the same command again"
    ):
        load_sample(record_of(tmp_path / "a.jpg", "0" * 64), tmp_path, BuildSettings(), 2)


def test_a_link_out_of_the_root_is_not_followed(tmp_path):
    write_picture(tmp_path / "outside.jpg")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "a.jpg").symlink_to(tmp_path / "outside.jpg")
    with pytest.raises(SourceError, match="leads out of the input folder"):
        load_sample(
            record_of(tmp_path / "root" / "a.jpg", "0" * 64), tmp_path / "root", BuildSettings(), 2
        )
