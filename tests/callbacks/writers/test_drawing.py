from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from callbacks.writers.drawing import (
    INK,
    MARGIN,
    WRONG,
    caption_font,
    contact_sheet,
    fit_into,
    open_picture,
    shortened,
    to_pil,
)
from datamodules.images import ImagesDataModule


def test_to_pil_keeps_colours_and_clips():
    image = torch.zeros(3, 2, 4)
    image[0] = 1.5
    image[2] = -0.5
    picture = to_pil(image)
    assert picture.size == (4, 2)
    assert picture.getpixel((3, 1)) == (255, 0, 0)
    assert to_pil(torch.full((1, 2, 2), 0.5)).getpixel((0, 0)) == (128, 128, 128)


def test_to_pil_refuses_a_batch():
    with pytest.raises(ValueError, match=r"not \(2, 3, 4, 4\)"):
        to_pil(torch.zeros(2, 3, 4, 4))


def test_fit_into_keeps_the_aspect():
    assert fit_into(Image.new("RGB", (40, 10)), 20).size == (20, 5)
    assert fit_into(Image.new("RGB", (1000, 1)), 20).size == (20, 1)


def test_contact_sheet_places_images_row_by_row():
    images = [torch.full((3, 8, 8), value) for value in (0.0, 0.25, 0.5, 0.75)]
    sheet = contact_sheet(images, ["a"] * 4, columns=3, side=32)
    assert sheet.width == MARGIN + 3 * (32 + MARGIN)
    step = (sheet.height - MARGIN) // 2
    for place, grey in enumerate((0, 64, 128, 191)):
        x, y = MARGIN + place % 3 * (32 + MARGIN) + 16, MARGIN + place // 3 * step + 16
        assert sheet.getpixel((x, y)) == (grey,) * 3


def test_contact_sheet_frames_what_has_a_colour():
    sheet = contact_sheet([torch.ones(3, 8, 8)] * 2, ["a", "b\nc"], [INK, WRONG], columns=2, side=32)
    pixels = np.asarray(sheet).astype(int)
    red = (pixels[..., 0] > 150) & (pixels[..., 1] < 80)
    middle = MARGIN + 32 + MARGIN // 2
    assert red[:, middle:].sum() > 300
    assert red[:, : middle - 2].sum() == 0


def test_contact_sheet_takes_pictures_of_mixed_sizes():
    pictures = [Image.new("RGB", (64, 16), "blue"), Image.new("RGB", (16, 64), "blue")]
    sheet = np.asarray(contact_sheet(pictures, ["", ""], columns=2, side=32))
    blue = (sheet == (0, 0, 255)).all(-1)
    assert blue.sum() == 2 * 32 * 8


@pytest.mark.parametrize(("images", "captions", "colours"), [(0, 0, None), (2, 1, None), (2, 2, ["red"])])
def test_contact_sheet_wants_one_caption_an_image(images, captions, colours):
    with pytest.raises(ValueError, match=f"got {images} images, {captions} captions"):
        contact_sheet([torch.ones(3, 4, 4)] * images, ["x"] * captions, colours)


def test_shortened_ends_in_an_ellipsis_and_fits():
    font = caption_font(13)
    assert shortened("cat", font, 100) == "cat"
    text = shortened("a very long class name indeed", font, 100)
    assert text.startswith("a very")
    assert text.endswith("...")
    assert font.getlength(text) <= 100


@pytest.mark.parametrize("data", ["none", "of others", "ours"])
def test_pictures_are_drawn_upright(tmp_path, blob_data, data):
    datamodule = {"none": None, "of others": blob_data(), "ours": ImagesDataModule()}[data]
    exif = Image.Exif()
    exif[0x0112] = 6  # turned a quarter: what is stored has its top on the right
    stored = np.zeros((40, 24, 3), np.uint8)
    stored[:, :4] = 255
    Image.fromarray(stored).save(tmp_path / "x.png", exif=exif)
    picture = open_picture(SimpleNamespace(datamodule=datamodule), tmp_path / "x.png")
    assert (picture.size, picture.mode) == ((40, 24), "RGB")
    assert np.asarray(picture)[:4].min() == 255


def test_a_picture_is_drawn_as_its_data_set_had_it(tmp_path):
    """Deep pictures are not white, and a data set may read in a way of its own."""
    Image.fromarray(np.full((4, 4), 100 * 257, np.uint16)).save(tmp_path / "x.png")
    data = ImagesDataModule(root=tmp_path)
    data.setup("predict")
    trainer = SimpleNamespace(datamodule=data)
    assert np.asarray(open_picture(trainer, tmp_path / "x.png")).max() == 100
    assert np.asarray(open_picture(trainer, "elsewhere", 0)).max() == 100, "the data set knows the file"
