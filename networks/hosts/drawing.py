"""Drawing images with a loaded model: what to draw, prompt files, batches, PNG files that say how they were made."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .command_line import nearest, write_atomically

if TYPE_CHECKING:
    from PIL.Image import Image

    from .diffusers import ModelParts


@dataclass(frozen=True)
class ImageRequest:
    """One image to draw: sizes in pixels, `multipliers` of the networks (None = as they are)."""

    prompt: str
    negative: str
    seed: int
    height: int
    width: int
    steps: int
    scale: float
    multipliers: tuple[float, ...] | None = None

    def settings(self) -> tuple[Any, ...]:
        """Requests with equal settings can be drawn in one batch."""
        return (self.height, self.width, self.steps, self.scale, self.multipliers)


# sd-scripts' sampler names -> class in diffusers and what differs from the model's own scheduler configuration
SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "lms": ("LMSDiscreteScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm_2": ("KDPM2DiscreteScheduler", {}),
    "dpm_2_a": ("KDPM2AncestralDiscreteScheduler", {}),
    "dpmsolver": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver"}),
    "dpmsolver++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpmsingle": ("DPMSolverSinglestepScheduler", {}),
}


def set_sampler(parts: ModelParts, name: str | None) -> None:
    """Give the pipeline another sampler with the model's own noise schedule; None leaves it as it is."""
    if name is None:
        return
    import diffusers

    class_name, changes = SAMPLERS[name]
    parts.pipeline.scheduler = getattr(diffusers, class_name).from_config(parts.pipeline.scheduler.config, **changes)


def _floats(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


PROMPT_OPTIONS: dict[str, tuple[str, Any]] = {
    "n": ("negative", str),
    "w": ("width", int),
    "h": ("height", int),
    "d": ("seed", int),
    "s": ("steps", int),
    "l": ("scale", float),
    "am": ("multipliers", _floats),
}


def parse_prompt_line(line: str, defaults: ImageRequest) -> ImageRequest:
    """Read `prompt --n negative --w 512 --h 512 --d seed --s steps --l scale --am multiplier,...`.

    What the line does not say comes from `defaults`. Raises ValueError for an unknown option or a bad value.
    """
    prompt, *options = re.split(r"(?:^|\s)--(?=[A-Za-z])", line.strip())
    values: dict[str, Any] = {"prompt": prompt.strip()}
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
    if min(request.steps, request.width, request.height) < 1:
        raise ValueError(f'prompt "{line}": --s, --w and --h must be at least 1.')
    return request


def read_prompt_file(path: Path, defaults: ImageRequest, option: str) -> list[ImageRequest]:
    """Read one prompt a line; empty lines and lines that start with # do not count.

    Raises ValueError when the file is missing or has no prompt.
    """
    if not path.is_file():
        raise ValueError(f"{option} {path}: there is no such file. Give a text file with one prompt a line.")
    lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
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


def draw(parts: ModelParts, requests: Sequence[ImageRequest]) -> list[Image]:
    """Draw one batch of equal settings. Each image has its own noise, so it does not depend on its neighbours."""
    import torch

    from .diffusers import decode_latents

    first = requests[0]
    with torch.no_grad():
        latents = parts.pipeline(
            prompt=[request.prompt for request in requests],
            negative_prompt=[request.negative for request in requests],
            height=first.height,
            width=first.width,
            num_inference_steps=first.steps,
            guidance_scale=first.scale,
            generator=[torch.Generator().manual_seed(request.seed) for request in requests],
            output_type="latent",
        ).images
    return decode_latents(parts, latents)


def save_png(image: Image, path: Path, request: ImageRequest, more: dict[str, str] | None = None) -> None:
    """Write a PNG whose text says how it was made."""
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
