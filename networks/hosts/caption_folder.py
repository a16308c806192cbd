"""A folder of images, each with its caption in a text file of the same name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class CaptionedImage:
    """One training example on disk."""

    path: Path
    caption: str


def read_caption_folder(folder: Path, extension: str, option: str) -> list[CaptionedImage]:
    """Return the folder's images by name, with their captions (first line of the text file).

    Raises ValueError when the folder or its images are missing, or a caption is.
    """
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise ValueError(f"{option} {folder} {what}. Give the folder that holds the images.")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        inner = sorted({path.parent.name for path in folder.glob("*/*") if path.suffix.lower() in IMAGE_SUFFIXES})
        hint = f" Its subfolders have some ({', '.join(inner[:3])}): give one of them." if inner else ""
        raise ValueError(f"{option} {folder} holds no images ({', '.join(IMAGE_SUFFIXES)}).{hint}")
    extension = extension if extension.startswith(".") else f".{extension}"
    missing = [path.name for path in paths if not path.with_suffix(extension).is_file()]
    if missing:
        raise ValueError(
            f"{option} {folder}: {len(missing)} of {len(paths)} images have no caption file ({missing[0]} wants "
            f"{Path(missing[0]).with_suffix(extension).name}). Add them, or set --caption_extension."
        )
    return [CaptionedImage(path, _first_line(path.with_suffix(extension))) for path in paths]


def _first_line(path: Path) -> str:
    try:
        lines = path.read_text(encoding="utf-8").strip().splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"caption file {path} is not UTF-8 text ({error.reason}). Save it as UTF-8.") from error
    return lines[0].strip() if lines else ""


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
