"""Pictures for a person to look at: small pure functions over PIL."""

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from lightning.pytorch import Trainer
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image, ImageFont

BACKGROUND = "white"
INK = "#202020"
WRONG = "#c62828"
MARGIN = 8


@runtime_checkable
class PictureReader(Protocol):
    """A data module that reads the pictures it predicts on: upright, and deep ones as their 8-bit twins."""

    def picture(self, path: Path | str, index: int | None = None) -> "Image.Image":
        """RGB; the coordinates of a prediction of sample `index` are pixels of it."""
        ...


def open_picture(trainer: Trainer, path: Path | str, index: int | None = None) -> "Image.Image":
    """The picture of a prediction as the data module read it; upright where it does not say how."""
    from PIL import Image, ImageOps

    data = getattr(trainer, "datamodule", None)
    if isinstance(data, PictureReader):
        return data.picture(path, index)
    with Image.open(path) as picture:
        return ImageOps.exif_transpose(picture).convert("RGB")


def to_pil(image: Tensor) -> "Image.Image":
    """(3 or 1, height, width) in [0, 1], on any device, as an RGB picture; values outside are clipped.

    Raises:
        ValueError: another shape.
    """
    from PIL import Image

    if image.ndim != 3 or image.shape[0] not in (1, 3):
        raise ValueError(f"an image is (3 or 1, height, width), not {tuple(image.shape)}.")
    pixels = image.detach().float().clamp(0, 1).mul(255).round().byte().cpu()
    return Image.fromarray(pixels.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy())


def fit_into(picture: "Image.Image", side: int) -> "Image.Image":
    """`picture` with its longer side scaled to `side` pixels."""
    from PIL import Image

    factor = side / max(picture.size)
    width, height = (max(1, round(length * factor)) for length in picture.size)
    return picture.resize((width, height), Image.Resampling.BICUBIC)


def contact_sheet(
    images: Sequence["Tensor | Image.Image"],
    captions: Sequence[str],
    colours: Sequence[str] | None = None,
    columns: int | None = None,
    side: int = 160,
) -> "Image.Image":
    """Captioned images in a grid.

    Args:
        images: tensors as in `to_pil`, or pictures, of any sizes.
        captions: one an image; a line break starts a new line, and what is too long for the cell ends in an
            ellipsis.
        colours: of the captions and of a frame around the image, one an image; None is dark grey without
        frames.
        columns: cells in a row; None makes the sheet about four by three.
        side: pixels of a cell's picture.

    Raises:
        ValueError: no image, or the lengths differ.
    """
    from PIL import Image, ImageDraw

    if not images or len(captions) != len(images) or len(colours or images) != len(images):
        raise ValueError(
            f"a contact sheet needs images, and a caption and a colour for each: got {len(images)} images, "
            f"{len(captions)} captions, {len(colours or images)} colours."
        )
    columns = min(len(images), columns or math.ceil(math.sqrt(len(images) * 4 / 3)))
    rows = math.ceil(len(images) / columns)
    font = caption_font(13)
    line = 16
    height = side + 4 + line * max(caption.count("\n") + 1 for caption in captions)
    size = (MARGIN + columns * (side + MARGIN), MARGIN + rows * (height + MARGIN))
    sheet = Image.new("RGB", size, BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for place, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x = MARGIN + place % columns * (side + MARGIN)
        y = MARGIN + place // columns * (height + MARGIN)
        picture = fit_into(to_pil(image) if isinstance(image, Tensor) else image, side)
        left, top = x + (side - picture.width) // 2, y + (side - picture.height) // 2
        sheet.paste(picture, (left, top))
        if colours is not None and colours[place] != INK:
            frame = (left - 3, top - 3, left + picture.width + 2, top + picture.height + 2)
            draw.rectangle(frame, outline=colours[place], width=3)
        for number, text in enumerate(caption.split("\n")):
            colour = INK if colours is None else colours[place]
            draw.text((x, y + side + 4 + number * line), shortened(text, font, side), colour, font)
    return sheet


def caption_font(size: int) -> "ImageFont.FreeTypeFont | ImageFont.ImageFont":
    """Matplotlib's DejaVu Sans (Latin, Greek, Cyrillic and more) if it is installed, else Pillow's own
    font.
    """
    from PIL import ImageFont

    package = importlib.util.find_spec("matplotlib")  # looks for it without importing it
    if package is not None and package.origin is not None:
        file = Path(package.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
        if file.is_file():
            return ImageFont.truetype(str(file), size)
    return ImageFont.load_default(size)


def shortened(text: str, font: "ImageFont.FreeTypeFont | ImageFont.ImageFont", width: float) -> str:
    """`text`, or as much of its beginning as fits into `width` pixels with an ellipsis."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text.rstrip() + "..."
