"""Make ``data/scenes/sprites.png``, the pictograms of the scenes, from the font Noto Color Emoji.

Debian has the font in ``fonts-noto-color-emoji`` (SIL Open Font License 1.1). Usage: ``python data/build/sprites.py [FONT]``.
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from probes.scenes.catalog import PICTOGRAMS  # noqa: E402
from probes.scenes.painting import COLUMNS, EDGE  # noqa: E402

FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
STRIKE = 109
"""The only size of the bitmaps in the font."""


def main(font: str = FONT) -> None:
    """Draw every pictogram, crop it to its own edges and put it into the atlas."""
    face = ImageFont.truetype(font, STRIKE)
    rows = -(-len(PICTOGRAMS) // COLUMNS)
    sheet = Image.new("RGBA", (COLUMNS * EDGE, rows * EDGE))
    for number, (name, character) in enumerate(PICTOGRAMS.items()):
        canvas = Image.new("RGBA", (160, 160))
        ImageDraw.Draw(canvas).text((12, 12), character, font=face, embedded_color=True)
        box = canvas.getbbox()
        if box is None:
            raise SystemExit(f"{font} has no picture for {name} ({character})")
        drawing = canvas.crop(box)
        edge = max(drawing.size)
        square = Image.new("RGBA", (edge, edge))
        square.paste(drawing, ((edge - drawing.width) // 2, (edge - drawing.height) // 2))
        small = square.resize((EDGE - 2, EDGE - 2), Image.Resampling.LANCZOS)
        sheet.paste(small, (number % COLUMNS * EDGE + 1, number // COLUMNS * EDGE + 1))
    target = ROOT / "data" / "scenes" / "sprites.png"
    target.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(target, optimize=True)
    print(f"{target.relative_to(ROOT)}: {len(PICTOGRAMS)} pictograms, {target.stat().st_size} bytes")


if __name__ == "__main__":
    main(*sys.argv[1:])
