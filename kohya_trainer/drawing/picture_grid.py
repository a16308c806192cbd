"""Pictures in labelled rows and columns, as one PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from networks.cli.command_line import write_atomically

if TYPE_CHECKING:
    from PIL.Image import Image

GAP, LEFT, LINE = 6, 110, 16  # pixels: between pictures, for the rows' names, for one line of a column's name
SMALLEST = 96  # side below which pictures are enlarged


def make_grid(rows: Sequence[tuple[str, Sequence[Image | None]]], columns: Sequence[str], path: Path) -> None:
    """Draw `rows` of (name, pictures); a missing picture (None) leaves its place empty. Small pictures are enlarged."""
    from PIL import Image, ImageDraw, ImageFont

    pictures = [picture for _, row in rows for picture in row if picture is not None]
    width, height = max(picture.width for picture in pictures), max(picture.height for picture in pictures)
    zoom = max(1, -(-SMALLEST // max(width, height)))
    width, height = width * zoom, height * zoom
    font = ImageFont.load_default(size=13)
    names = [_wrapped(name, width, font) for name in columns]
    top = 10 + LINE * max(name.count("\n") + 1 for name in names)
    size = (LEFT + len(columns) * (width + GAP) + GAP, top + len(rows) * (height + GAP) + GAP)
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for number, name in enumerate(names):
        middle = LEFT + GAP + number * (width + GAP) + width // 2
        pen.multiline_text((middle, top // 2), name, "black", font, anchor="mm", align="center")
    for number, (name, row) in enumerate(rows):
        y = top + GAP + number * (height + GAP)
        pen.multiline_text((10, y + height // 2), _wrapped(name, LEFT - 14, font), "black", font, anchor="lm")
        for column, picture in enumerate(row):
            x = LEFT + GAP + column * (width + GAP)
            if picture is not None:
                big = picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)
                sheet.paste(big, (x, y))
                pen.rectangle((x - 1, y - 1, x + big.width, y + big.height), outline="#dddddd")
    write_atomically(path, lambda temporary: sheet.save(temporary, optimize=True))


def _wrapped(text: str, width: int, font: object) -> str:
    """Break a name into at most three lines of `width` pixels; what does not fit is cut off."""
    length = getattr(font, "getlength")  # noqa: B009 - the two kinds of fonts share no type
    lines: list[str] = []
    for word in text.split():
        if lines and length(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    if len(lines) > 3:
        lines = [*lines[:2], lines[2] + " ..."]
    return "\n".join(lines)
