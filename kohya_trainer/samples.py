"""Samples of a training run: what --sample_prompts asks for, a file for each in sample/, and one sheet of all."""

from __future__ import annotations

import argparse
import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .drawing.picture_grid import make_grid
from .drawing.requests import ImageRequest, batches, read_prompt_file
from .families import Family


def read_samples(args: argparse.Namespace, family: Family, size: tuple[int, int]) -> list[ImageRequest]:
    """What the trainer's --sample_prompts asks for, at `size` = (height, width) unless a line says otherwise."""
    if not args.sample_prompts:
        return []
    defaults = ImageRequest("", "", args.seed, *size, steps=30, scale=7.5)
    requests = read_prompt_file(Path(args.sample_prompts), defaults, "--sample_prompts")
    for request in requests:
        if request.multipliers is not None:
            raise ValueError("--sample_prompts: --am is for gen_img.py; samples are drawn at the full strength.")
        family.check_size(request.height, request.width, f'--sample_prompts "{request.prompt}"')
    return requests


class SampleSheet:
    """Samples of a training run: a file for each in sample/, and one sheet of all, a row for each step."""

    def __init__(self, folder: Path, name: str, family: Family, batch_size: int) -> None:
        self.folder, self.name, self.family, self.batch_size = folder, name, family, batch_size

    def draw(self, requests: Sequence[ImageRequest], step: int, write: bool = True) -> None:
        """Draw all requests with the model as it is, and the sheet anew. Without `write` only the model's work is done:
        another process has the files."""
        folder = self.folder / "sample"
        folder.mkdir(exist_ok=True)
        numbers = itertools.count()
        for batch in batches(requests, self.batch_size):
            pictures = self.family.draw(batch)
            for drawn, request in zip(pictures if write else (), batch, strict=write):
                path = folder / f"{self.name}_{step:06d}_{next(numbers):02d}{self.family.suffix}"
                self.family.save(drawn, path, request)
        if write and self.family.medium.visible:
            self._sheet(folder, [request.prompt for request in requests])

    def _sheet(self, folder: Path, prompts: Sequence[str]) -> None:
        """From the files, so that a resumed run's sheet is whole."""
        from PIL import Image

        rows: dict[int, dict[int, Any]] = {}
        for path in sorted(folder.glob("*.png")):
            found = re.fullmatch(rf"{re.escape(self.name)}_(\d+)_(\d+)", path.stem)
            if found and int(found[2]) < len(prompts):
                rows.setdefault(int(found[1]), {})[int(found[2])] = Image.open(path).convert("RGB")
        table = [(f"step {step}", [row.get(i) for i in range(len(prompts))]) for step, row in rows.items()]
        make_grid(table, prompts, self.folder / f"{self.name}-samples.png")
