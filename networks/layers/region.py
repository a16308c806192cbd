"""Regional prompts: several networks on one picture, each with a prompt and a mask of its own.

The host splits a prompt into S sub-prompts. Of B pictures its text encoders see the rows [B unconditional] and
[B x S, picture by picture], cross attention sees text of the rows [B unconditional, B x S, B second unconditional],
every other layer of the denoiser one row per picture: [B, B, B]. Either unconditional group may be missing.

With u_s the update of network s, m_s its mask and y the base output:

    encoder   y + u_s on the rows of its sub-prompt
    text      the same, among the conditional rows: keys and values of cross attention
    plain     y + u_s
    masked    y + m_s u_s
    query     as masked; then each conditional row is repeated S times, one for each sub-prompt's keys
    out       conditional rows: sum_s m_s y_s / (sum_s m_s + 1e-4) + sum_s m_s u_s, which ends the repetition

A layer without places (a vector per picture) takes 1 / S for the mask.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Update = Callable[[Tensor, Tensor], Tensor]

ENCODER, TEXT, PLAIN, MASKED, QUERY, OUT = "encoder", "text", "plain", "masked", "query", "out"
EPSILON = 1e-4  # of the weighted mean in `out`: a place outside all masks gets no text
NEAR = 1.5  # how far the sides of a grid may be from the picture's, before a row of tokens counts as no grid


@dataclass
class Generation:
    """What the networks of one model share while a batch is drawn.

    Attributes:
        pictures, prompts: B and S.
        size: height and width of the picture, in any unit.
        masks: network's index -> [H, W], 0 to 1.
    """

    pictures: int
    prompts: int
    size: tuple[int, int]
    masks: dict[int, Tensor] = field(default_factory=dict)
    _resized: dict[Any, Tensor] = field(default_factory=dict, repr=False)

    def mask(self, index: int, like: Tensor) -> Tensor:
        """The mask at the places of an output [N, C, H, W] or [N, T, C], to be broadcast with it."""
        grid = self._grid(like)
        if index not in self.masks:
            return like.new_zeros([1] * like.dim())
        if grid is None:
            return like.new_full([1] * like.dim(), 1 / self.prompts)
        key = index, grid, like.dtype, like.device
        if key not in self._resized:
            mask = self.masks[index].float()[None, None]
            self._resized[key] = F.interpolate(mask, grid, mode="bilinear")[0, 0].to(like)
        mask = self._resized[key]
        return mask if like.dim() == 4 else mask.reshape(-1, 1)

    def _grid(self, like: Tensor) -> tuple[int, int] | None:
        """Rows and columns; of T tokens, the factors whose ratio is nearest to the picture's."""
        if like.dim() == 4:
            return like.shape[2], like.shape[3]
        if like.dim() != 3:
            return None
        tokens, (height, width) = like.shape[1], self.size
        sides = [(n, tokens // n) for n in range(1, tokens + 1) if tokens % n == 0]
        distance, grid = min((abs(math.log(a * width / (b * height))), (a, b)) for a, b in sides)
        return grid if distance < math.log(NEAR) else None

    def unconditional(self, rows: int, conditional: int) -> int:
        """How many rows stand in front of the conditional ones."""
        return min(self.pictures, max(0, rows - conditional))

    def expand(self, y: Tensor) -> Tensor:
        """Each conditional row S times."""
        start = self.unconditional(y.shape[0], self.pictures)
        end = start + self.pictures
        return torch.cat([y[:start], y[start:end].repeat_interleave(self.prompts, 0), y[end:]])

    def collapse(self, y: Tensor) -> Tensor:
        """The S rows of each picture as their mean, weighted by the masks."""
        rows = self.pictures * self.prompts
        start = self.unconditional(y.shape[0], rows)
        parts = y[start : start + rows].unflatten(0, (self.pictures, self.prompts))
        weights = [self.mask(s, y) / self.total(y) for s in range(self.prompts)]
        mean = sum((parts[:, s] * weight for s, weight in enumerate(weights)), torch.zeros_like(parts[:, 0]))
        return torch.cat([y[:start], mean, y[start + rows :]])

    def total(self, like: Tensor) -> Tensor:
        return sum((self.mask(s, like) for s in range(self.prompts)), like.new_full([1] * like.dim(), EPSILON))


@dataclass
class Region:
    """One network's place.

    Attributes:
        index: its sub-prompt.
        image: its mask [H, W], 0 to 1; one that is black everywhere stands for the whole picture.
        roles: saved name -> one of the words above; `masked` for layers without one.
        generation: of the batch that is drawn; without one, the network acts everywhere.
    """

    index: int
    image: Tensor
    roles: Mapping[str, str]
    generation: Generation | None = None

    def start(self, pictures: int, prompts: int, size: tuple[int, int], shared: dict[Any, Any]) -> None:
        """A batch begins.

        Args:
            pictures, prompts: B and S.
            size: height and width of the picture, in any unit.
            shared: the host's, the same for all networks of the batch.
        """
        generation = shared.setdefault(Generation, Generation(pictures, prompts, size))
        generation.masks[self.index] = self.image if self.image.max() > 0 else torch.ones_like(self.image)
        self.generation = generation

    def add(self, name: str, update: Update, x: Tensor, y: Tensor) -> Tensor:
        """The output of a layer.

        Args:
            update: the adapter's change for some rows of x and of y.
            x, y: input and base output.
        """
        generation, role = self.generation, self.roles.get(name) or MASKED
        if generation is None or role == PLAIN:
            return y + update(x, y)
        count, rows = generation.prompts, x.shape[0]
        conditional = generation.pictures * count
        if role in (MASKED, QUERY):
            change = update(x, y)
            return y + change * generation.mask(self.index, change)
        if role == ENCODER and count == 1:
            return y + update(x, y)  # one prompt per picture: as without regions, the negative prompt included
        if role == ENCODER and rows != conditional:
            return y  # the negative prompt
        start = generation.unconditional(rows, conditional)
        own = slice(start + self.index, start + conditional, count)
        change = update(x[own], y[own])
        if role == OUT:
            change = change * generation.total(change)  # the weighted mean that follows divides by it
        y = y.clone()
        y[own] += change
        return y


def reshape_attention(layers: Iterable[tuple[str, nn.Module]], region: Region) -> list[Any]:
    """Hooks on cross attention, whichever networks adapt it: (role, layer) of the model's `query` and `out` layers."""

    def hook(change: Callable[[Generation, Tensor], Tensor]) -> Callable[..., Tensor]:
        return lambda module, args, y: y if region.generation is None else change(region.generation, y)

    hooks = {QUERY: hook(Generation.expand), OUT: hook(Generation.collapse)}
    return [layer.register_forward_hook(hooks[role]) for role, layer in layers if role in hooks]
