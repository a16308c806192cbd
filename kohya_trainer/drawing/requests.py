"""What is to be drawn: prompts with their options, prompt files, batches; and pictures that say how they were made."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from networks.args.coerce import finite
from networks.cli.command_line import nearest, write_atomically
from networks.foreign.texts import read_text

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class ImageRequest:
    """One image to draw: sizes in pixels, `multipliers` of the networks (None = as they are); `seconds` of music."""

    prompt: str
    negative: str
    seed: int
    height: int
    width: int
    steps: int
    scale: float
    multipliers: tuple[float, ...] | None = None
    seconds: float = 30.0

    def settings(self) -> tuple[Any, ...]:
        """Requests with equal settings can be drawn in one batch."""
        return (self.height, self.width, self.steps, self.scale, self.multipliers, self.seconds)


def _floats(text: str) -> tuple[float, ...]:
    return tuple(map(finite, text.split(",")))


PROMPT_OPTIONS: dict[str, tuple[str, Any]] = {
    "n": ("negative", str),
    "w": ("width", int),
    "h": ("height", int),
    "d": ("seed", int),
    "s": ("steps", int),
    "l": ("scale", finite),
    "am": ("multipliers", _floats),
    "sec": ("seconds", finite),
}


def parse_prompt_line(line: str, defaults: ImageRequest) -> ImageRequest:
    """Read `prompt --n negative --w 512 --h 512 --d seed --s steps --l scale --am multiplier,... --sec seconds`.

    A backslash and n in the prompt begin a new line: for music, lyrics follow the first line.
    What the line does not say comes from `defaults`. Raises ValueError for an unknown option or a bad value.
    """
    prompt, *options = re.split(r"(?:^|\s)--(?=[A-Za-z])", line.strip())
    values: dict[str, Any] = {"prompt": prompt.strip().replace("\\n", "\n")}
    for option in options:
        name, _, text = option.partition(" ")
        if name not in PROMPT_OPTIONS:
            known = ", ".join(f"--{key}" for key in PROMPT_OPTIONS)
            raise ValueError(
                f'prompt "{line}": unknown option --{name}.{nearest(name, PROMPT_OPTIONS)} Known: {known}.'
            )
        field, convert = PROMPT_OPTIONS[name]
        try:
            values[field] = convert(text.strip())
        except ValueError as error:
            raise ValueError(f'prompt "{line}": --{name} cannot be "{text.strip()}". Give a number.') from error
    request = replace(defaults, **values)
    if min(request.steps, request.width, request.height) < 1 or request.seconds <= 0:
        raise ValueError(f'prompt "{line}": --s, --w and --h must be at least 1, --sec above 0.')
    return request


def read_prompt_file(path: Path, defaults: ImageRequest, option: str) -> list[ImageRequest]:
    """Read one prompt a line; empty lines and lines that start with # do not count.

    Raises ValueError when the file is missing or has no prompt.
    """
    if not path.is_file():
        raise ValueError(f"{option} {path}: there is no such file. Give a text file with one prompt a line.")
    if path.suffix.lower() in (".toml", ".json"):
        raise ValueError(f"{option} {path}: prompts are read from plain text, one a line. Write them into a .txt file.")
    try:
        lines = [line.strip() for line in read_text(path).splitlines()]
    except ValueError as error:
        raise ValueError(f"{option} {error}.") from error
    requests = [parse_prompt_line(line, defaults) for line in lines if line and not line.startswith("#")]
    if not requests:
        raise ValueError(f"{option} {path} holds no prompt. Write one a line.")
    return requests


def batches(requests: Sequence[ImageRequest], size: int) -> Iterator[list[ImageRequest]]:
    """Group neighbours of equal settings into batches of at most `size`."""
    batch: list[ImageRequest] = []
    for request in requests:
        if batch and (len(batch) == size or batch[0].settings() != request.settings()):
            yield batch
            batch = []
        batch.append(request)
    if batch:
        yield batch


def save_png(image: Image, path: Path, request: ImageRequest, more: dict[str, str] | None = None) -> None:
    """Write a PNG whose text says how it was made, atomically.

    Args:
        image: the picture.
        path: where to.
        request: what was asked for.
        more: further texts by their keys.
    """
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    texts = {
        "prompt": request.prompt,
        "negative-prompt": request.negative,
        "seed": str(request.seed),
        "steps": str(request.steps),
        "scale": str(request.scale),
    }
    if request.multipliers is not None:
        texts["network-mul"] = ",".join(map(str, request.multipliers))
    for key, value in {**texts, **(more or {})}.items():
        info.add_itxt(key, value)
    write_atomically(path, lambda temporary: image.save(temporary, pnginfo=info))
