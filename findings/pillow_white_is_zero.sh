#!/usr/bin/env bash
# Pillow 13.0.0 inverts an 8-bit grey TIFF whose zero is white (PhotometricInterpretation 0), and leaves a 16-bit and
# a float one as they are, so the same picture is read as a negative of itself. Seen for a file of zeros, which is
# white in all three: 8-bit 255, 16-bit 0, float 0.0.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet "pillow==13.0.0"
venv/bin/python - <<'PYTHON'
import io
import struct

from PIL import Image


def white(bits: int, sample_format: int) -> Image.Image:
    """A white picture of 2 x 2 zeros."""
    content = bytes(4 * bits // 8)
    tags = {256: 2, 257: 2, 258: bits, 259: 1, 262: 0, 273: 0, 277: 1, 278: 2, 279: len(content), 339: sample_format}
    tags[273] = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    file = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + content
    return Image.open(io.BytesIO(file))


seen = {name: white(*kind).getpixel((0, 0)) for name, kind in {"8": (8, 1), "16": (16, 1), "float": (32, 3)}.items()}
print(seen)
assert seen == {"8": 255, "16": 0, "float": 0.0}, seen
PYTHON
