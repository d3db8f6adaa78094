"""Which files are images, what their pixels become, and that whatever else is refused in one sentence."""

import io
import os
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch._utils import ExceptionWrapper

from datamodules.reading import CorruptSampleError, DataError, Listing, list_folders, list_images, read_image
from tests.fuzzing import fuzz, outcome

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (20, 30), np.uint8)
COLOURS = RNG.integers(0, 256, (20, 30, 3), np.uint8)
GREY_RGB = np.repeat(GREY[..., None], 3, axis=2)


def saved(path: Path, array: np.ndarray, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def pixels(path: Path) -> np.ndarray:
    image = read_image(path)
    assert image.mode == "RGB"
    return np.asarray(image)


# pixels


@pytest.mark.parametrize("factor", [257, 256], ids=["scaled", "shifted"])
@pytest.mark.parametrize("kind", ["png", "tif", "pgm", "big-endian.tif", "int32.tif", "lzw.tif"])
def test_sixteen_bits_are_read_as_eight(tmp_path, kind, factor):
    deep = GREY.astype(np.uint16) * factor
    deep = deep.astype({"big-endian.tif": ">u2", "int32.tif": np.int32}.get(kind, np.uint16))
    path = saved(tmp_path / f"x.{kind}", deep, **{"compression": "tiff_lzw"} if "lzw" in kind else {})
    np.testing.assert_array_equal(pixels(path), GREY_RGB)


def test_other_depths(tmp_path):
    """Ten bits in a PGM, twelve in a TIFF, floats, and eight bits in a 32-bit container."""
    (tmp_path / "x.pgm").write_bytes(
        b"P5 30 20 1023\n" + (GREY.astype(np.uint16) * 4).astype(">u2").tobytes()
    )
    assert abs(pixels(tmp_path / "x.pgm").astype(int) - GREY_RGB).max() <= 1
    np.testing.assert_array_equal(pixels(saved(tmp_path / "f.tif", GREY.astype(np.float32) / 255)), GREY_RGB)
    np.testing.assert_array_equal(pixels(saved(tmp_path / "i.tif", GREY.astype(np.int32))), GREY_RGB)
    row = np.array([[0x00, 0x0F, 0xFF], [0x80, 0x01, 0x00]], np.uint8)  # 0, 4095; 2048, 256
    twelve = {258: 12, 259: 1, 262: 1, 277: 1, 339: 1}
    (tmp_path / "t.tif").write_bytes(tiff(2, 2, row.tobytes(), twelve))
    np.testing.assert_array_equal(pixels(tmp_path / "t.tif")[..., 0], [[0, 255], [128, 16]])


@pytest.mark.parametrize("kind", ["uint16", "float32"])
def test_white_is_zero(tmp_path, kind):
    """A TIFF may say that zero is white; Pillow inverts only 8-bit ones."""
    values = GREY.astype(np.uint16) * 257 if kind == "uint16" else GREY.astype(np.float32) / 255
    tags = {258: 8 * values.itemsize, 259: 1, 262: 0, 277: 1, 339: 1 if kind == "uint16" else 3}
    (tmp_path / "x.tif").write_bytes(tiff(30, 20, values.tobytes(), tags))
    np.testing.assert_array_equal(pixels(tmp_path / "x.tif"), 255 - GREY_RGB)


def tiff(width: int, height: int, content: bytes, tags: dict[int, int]) -> bytes:
    """A little-endian TIFF of one strip."""
    entries = {256: width, 257: height, **tags, 278: height, 279: len(content)}
    offset = 8 + 2 + 12 * (len(entries) + 1) + 4
    rows = sorted({**entries, 273: offset}.items())
    head = b"II*\0" + (8).to_bytes(4, "little") + len(rows).to_bytes(2, "little")
    body = b"".join(
        tag.to_bytes(2, "little") + b"\4\0\1\0\0\0" + value.to_bytes(4, "little") for tag, value in rows
    )
    return head + body + bytes(4) + content


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (np.array([[0, 70000]], np.int32), "integers go from 0 to 70000"),
        (np.array([[-1, 5]], np.int32), "integers go from -1 to 5"),
        (np.array([[0.0, 200.0]], np.float32), "floats go from 0 to 200"),
        (np.array([[-0.5, 0.5]], np.float32), "floats go from -0.5 to 0.5"),
        (np.array([[np.nan, 0.5]], np.float32), "floats go from nan to nan"),
    ],
    ids=str,
)
def test_a_range_that_cannot_be_known(tmp_path, values, said):
    path = saved(tmp_path / "x.tif", values)
    with pytest.raises(CorruptSampleError, match=rf"x\.tif \(its {said}: nothing says what is white"):
        read_image(path)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "PA", "RGBA", "CMYK", "YCbCr", "LAB", "RGBX"])
def test_eight_bit_modes_are_what_pillow_makes_of_them(tmp_path, mode):
    image = Image.fromarray(COLOURS)
    if mode == "LAB":
        image = Image.frombytes("LAB", image.size, COLOURS.tobytes())
    else:
        image = image.convert("LA").convert("PA") if mode == "PA" else image.convert(mode)
    path = tmp_path / ("x.jpg" if mode == "YCbCr" else "x.tif")  # Pillow 12 cannot read the TIFF it writes
    image.save(path)
    expected = np.asarray(Image.open(path).convert("RGB"))
    np.testing.assert_array_equal(pixels(path), expected)
    assert expected.std() > 10


def test_transparency_is_dropped_and_the_first_frame_taken(tmp_path):
    see_through = np.dstack([COLOURS, np.zeros((20, 30), np.uint8)])
    np.testing.assert_array_equal(pixels(saved(tmp_path / "a.png", see_through)), COLOURS)
    frames = [Image.fromarray(np.full((8, 8, 3), value, np.uint8)) for value in (0, 255, 128)]
    for suffix in ("gif", "tif", "png", "webp"):
        path = tmp_path / f"frames.{suffix}"
        frames[0].save(path, save_all=True, append_images=frames[1:])
        assert pixels(path).max() == 0, suffix


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_upright(tmp_path, suffix, orientation):
    """The red corner of a turned picture is top left, and the picture is wide."""
    upright = np.zeros((24, 40, 3), np.uint8)
    upright[:8, :8, 0] = 255
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path / f"x.{suffix}", np.ascontiguousarray(stored), exif=exif)
    result = pixels(path)
    assert result.shape == upright.shape
    assert abs(result.astype(int)[2:6, 2:6] - [255, 0, 0]).max() < 12
    assert result[12:].max() < 12


def test_damaged_metadata_do_not_spoil_the_pixels(tmp_path):
    path = saved(tmp_path / "x.png", COLOURS, exif=b"Exif\0\0MM\0*\0\0\xff\xff broken")
    np.testing.assert_array_equal(pixels(path), COLOURS)


def test_the_content_counts_and_not_the_name(tmp_path):
    saved(tmp_path / "x.png", COLOURS).rename(tmp_path / "x.jpg")
    np.testing.assert_array_equal(pixels(tmp_path / "x.jpg"), COLOURS)


# errors


def bomb() -> bytes:
    """A PNG of a few bytes that says it has 4e8 pixels."""
    buffer = io.BytesIO()
    Image.new("L", (1, 1)).save(buffer, "PNG")
    content = bytearray(buffer.getvalue())
    content[16:24] = (20000).to_bytes(4, "big") * 2
    return bytes(content)


@pytest.mark.parametrize(
    "content", [b"", b"GIF89a", b"no image", Path(__file__).read_bytes(), bomb()], ids=len
)
def test_what_cannot_be_read_is_named_in_a_sentence(tmp_path, content):
    path = tmp_path / "x.jpg"
    path.write_bytes(content)
    assert not outcome(lambda: read_image(path), path).read
    assert not outcome(lambda: read_image(tmp_path / "missing.png"), "missing.png").read


@pytest.mark.parametrize("kind", [CorruptSampleError, DataError])
def test_an_error_of_a_worker_stays_a_sentence(kind):
    try:
        try:
            raise KeyError("cause")
        except KeyError as error:
            raise kind("cannot read a.jpg (KeyError: 'cause')") from error
    except kind:
        sent = pickle.loads(pickle.dumps(ExceptionWrapper(where="in DataLoader worker process 0")))
    with pytest.raises(kind) as caught:
        sent.reraise()
    assert str(caught.value) == "cannot read a.jpg (KeyError: 'cause')"
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


FORMATS = {
    "PNG": {},
    "JPEG": {},
    "WEBP": {},
    "TIFF": {"compression": "tiff_lzw"},
    "GIF": {},
    "BMP": {},
    "PPM": {},
}


def _file(kind: str) -> bytes:
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {**FORMATS[kind], **({"exif": exif} if kind in ("PNG", "JPEG", "WEBP") else {})}
    Image.fromarray(COLOURS).save(buffer, kind, **options)
    return buffer.getvalue()


FILES = {kind: _file(kind) for kind in FORMATS}


@fuzz(150)
@given(
    kind=st.sampled_from(sorted(FORMATS)),
    edits=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=8),
    length=st.floats(0, 1),
    headed=st.booleans(),
)
def test_mutated_files_are_read_or_refused(tmp_path, kind, edits, length, headed):
    content = bytearray(FILES[kind])
    reach = min(len(content), 128) if headed else len(content)
    for place, value in edits:
        content[int(place * reach)] = value
    path = tmp_path / "x.img"
    path.write_bytes(content[: round(length * len(content))] if length < 0.5 else content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = outcome(lambda: read_image(path), path)
    assert not result.read or result.value.mode == "RGB"


# folders


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def test_one_rule_for_what_is_an_image(tmp_path):
    touch(tmp_path, "a.jpg", "b.webp", "C.TIF", "d.tiff", "e.JPEG", "deep/er/f.png", "deep/g.pgm", "h.AVIF")
    touch(tmp_path, "._a.jpg", ".hidden.png", "__MACOSX/a.jpg", ".thumbnails/t.png", "deep/@eaDir/x.jpg")
    touch(tmp_path, "Thumbs.db", "notes.txt", "jpg", "movie.mp4")
    listing = list_images(tmp_path)
    assert listing.names == [
        *("C.TIF", "a.jpg", "b.webp", "d.tiff", "deep/er/f.png", "deep/g.pgm", "e.JPEG", "h.AVIF")
    ]
    assert (listing.hidden, listing.other) == (6, 3)
    assert listing.left_out() == " (left out: 6 hidden, 3 other)"
    assert Listing([]).left_out() == ""


def test_links_are_followed_and_loops_end(tmp_path):
    touch(
        tmp_path,
        "elsewhere/poodle/1.jpg",
        "elsewhere/2.jpg",
        "set/dog/3.jpg",
        "set/dog/z/4.jpg",
        "set/cat/5.jpg",
    )
    dog = tmp_path / "set/dog"
    for name, target in (
        ("self", dog),
        ("again", dog),
        ("above", tmp_path / "set"),
        ("root", Path("/")),
        ("a-z", dog / "z"),
        ("far", tmp_path / "elsewhere/poodle"),
        ("more", tmp_path / "elsewhere"),
        ("file.jpg", tmp_path / "elsewhere/2.jpg"),
        ("gone.jpg", tmp_path / "nowhere"),
        ("loop.jpg", dog / "loop.jpg"),
    ):
        (dog / name).symlink_to(target)
    os.mkfifo(dog / "pipe.jpg")
    expected = ["3.jpg", "far/1.jpg", "file.jpg", "gone.jpg", "loop.jpg", "more/2.jpg", "z/4.jpg"]
    assert list_images(dog).names == expected
    (tmp_path / "link").symlink_to(dog)
    assert list_images(tmp_path / "link").names == expected
    for name in ("gone.jpg", "loop.jpg"):
        with pytest.raises(CorruptSampleError, match=name):
            read_image(dog / name)


def test_folders(tmp_path):
    touch(tmp_path, "set/b/x", "set/a/x", "set/.cache/x", "set/__MACOSX/x", "set/file", "other/x")
    (tmp_path / "set/self").symlink_to(tmp_path / "set")
    (tmp_path / "set/c").symlink_to(tmp_path / "other")
    assert list_folders(tmp_path / "set") == Listing(["a", "b", "c"], hidden=2, other=2)


def test_folders_that_are_none(tmp_path):
    touch(tmp_path, "file")
    for listing in (list_images, list_folders):
        with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere"):
            listing(tmp_path / "nowhere")
        with pytest.raises(DataError, match="file cannot be listed"):
            listing(tmp_path / "file")


def test_names_that_are_not_utf8(tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    saved(tmp_path / "set" / name, COLOURS)
    assert list_images(tmp_path / "set").names == [name]
    np.testing.assert_array_equal(pixels(tmp_path / "set" / name), COLOURS)
