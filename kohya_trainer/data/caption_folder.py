"""A folder of images or sounds, each with its caption in a text file of the same name."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from networks.foreign.texts import read_text

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

LYRICS = ".lyrics"  # of the file beside a sound; without one it is instrumental


@dataclass(frozen=True)
class CaptionedImage:
    """One training example on disk; the lyrics of a sound follow its caption, from the second line on."""

    path: Path
    caption: str


@dataclass(frozen=True)
class Medium:
    """What a family's examples are.

    Attributes:
        title: for people.
        suffixes: of their files.
        read_caption: of an example, from the path of its file and the ending of its caption's.
        check: raises ValueError when a file is visibly damaged.
        visible: several can be put together on a sheet.
    """

    title: str
    suffixes: tuple[str, ...]
    read_caption: Callable[[Path, str], str]
    check: Callable[[Path], None]
    visible: bool


@dataclass(frozen=True)
class Buckets:
    """Image sizes by shape: sides are multiples of `steps` between `least` and `most` pixels."""

    least: int
    most: int
    steps: int


def read_caption_folder(folder: Path, extension: str, option: str, medium: Medium) -> list[CaptionedImage]:
    """Return the folder's examples by name, with their captions.

    Args:
        folder: where they are; its subfolders do not count.
        extension: ending of the caption files, with or without its dot.
        option: of the command line, which named the folder; for messages.
        medium: what the examples are.

    Raises:
        ValueError: the folder or its examples are missing, a caption is, or an image is visibly damaged.
    """
    paths = _find(folder, option, medium)
    extension = extension if extension.startswith(".") else f".{extension}"
    missing = [path.name for path in paths if not path.with_suffix(extension).is_file()]
    if missing:
        wanted = Path(missing[0]).with_suffix(extension).name
        raise ValueError(
            f"{option} {folder}: {len(missing)} of {len(paths)} {medium.title} have no caption file ({missing[0]} "
            f"wants {wanted}). Add them, or set --caption_extension."
        )
    for path in paths:
        medium.check(path)
    return [CaptionedImage(path, medium.read_caption(path, extension)) for path in paths]


def _find(folder: Path, option: str, medium: Medium) -> list[Path]:
    if not folder.is_dir():
        state = "is a file, not a folder" if folder.exists() else "does not exist"
        raise ValueError(f"{option} {folder} {state}. Give the folder that holds the {medium.title}.")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in medium.suffixes)
    if not paths:
        inner = sorted({path.parent.name for path in folder.glob("*/*") if path.suffix.lower() in medium.suffixes})
        hint = f" Its subfolders have some ({', '.join(inner[:3])}): give one of them." if inner else " Put them there."
        raise ValueError(f"{option} {folder} holds no {medium.title} ({', '.join(medium.suffixes)}).{hint}")
    return paths


def _first_line(path: Path, extension: str) -> str:
    return _read_text(path.with_suffix(extension)).partition("\n")[0].strip()


def _with_lyrics(path: Path, extension: str) -> str:
    lyrics = path.with_suffix(LYRICS)
    return f"{_first_line(path, extension)}\n{_read_text(lyrics) if lyrics.is_file() else '[Instrumental]'}"


def _read_text(path: Path) -> str:
    try:
        return read_text(path).strip()
    except ValueError as error:
        raise ValueError(f"caption file {error}.") from error


def _verify(path: Path) -> None:
    """What can be seen of a damaged image without decoding it: its header, and the checksums of a PNG."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.verify()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"image {path} cannot be read ({error}). Replace or remove it.") from error


PICTURES = Medium("images", (".png", ".jpg", ".jpeg", ".webp", ".bmp"), _first_line, _verify, visible=True)
SOUNDS = Medium("sounds", (".wav", ".flac", ".mp3", ".ogg"), _with_lyrics, lambda path: None, visible=False)


def bucket_size(path: Path, size: tuple[int, int], buckets: Buckets, multiple: int) -> tuple[int, int]:
    """Height and width for an image: of all sizes with no more pixels than `size`, the one nearest to its shape.

    Among equally near shapes the largest wins.

    Args:
        path: of the image; only its header is read.
        size: height and width in pixels, whose product is the area.
        buckets: limits of the sides.
        multiple: sides are multiples of it, too: what the model needs.

    Raises:
        ValueError: the limits leave no size, or the image cannot be read.
    """
    step = math.lcm(buckets.steps, multiple)
    area, first = size[0] * size[1], math.ceil(buckets.least / step) * step
    sides = range(first, buckets.most // step * step + 1, step)
    known = {(height, min(area // height // step * step, sides[-1])) for height in sides} if sides else set()
    known = {(height, width) for height, width in known if width >= first}
    if not known:
        raise ValueError(
            f"--min_bucket_reso {buckets.least}, --max_bucket_reso {buckets.most}: no size in steps of {step} has "
            f"{size[1]} x {size[0]} pixels. Widen them, or lower --bucket_reso_steps."
        )
    width, height = _sides(path)
    shape = math.log(height / width)
    return min(known, key=lambda side: (round(abs(math.log(side[0] / side[1]) - shape), 6), -side[0] * side[1], side))


def _sides(path: Path) -> tuple[int, int]:
    """Width and height as shown, from the file's header."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            turned = image.getexif().get(0x0112, 1) >= 5  # stored on its side
            return (image.height, image.width) if turned else (image.width, image.height)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"image {path} cannot be read ({error}). Replace or remove it.") from error


def open_rgb(path: Path) -> Image:
    """Open an image as RGB; transparent parts become white. Raises ValueError when it cannot be read."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                image = image.convert("RGBA")
                white = Image.new("RGBA", image.size, (255, 255, 255, 255))
                image = Image.alpha_composite(white, image)
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"image {path} cannot be read ({error}). Replace or remove it.") from error


def load_pixels(path: Path, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Read one image for training at `size` = (height, width): scaled to cover it, then cropped at the centre.

    Returns pixels (3, H, W) from -1 to 1 and SDXL's time ids (6,): original height and width, crop top and left,
    target height and width.
    """
    import numpy as np
    import torch
    from PIL import Image

    image = open_rgb(path)
    height, width = size
    scale = max(height / image.height, width / image.width)
    scaled = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    left, top = (scaled[0] - width) // 2, (scaled[1] - height) // 2
    ids = torch.tensor([image.height, image.width, top, left, height, width], dtype=torch.float32)
    if scaled != image.size:
        image = image.resize(scaled, Image.Resampling.LANCZOS)
    pixels = np.asarray(image.crop((left, top, left + width, top + height)), dtype=np.float32)
    return torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1, ids
