"""Training data: what a batch holds is decided by the seed and the step alone; what does not change is cached.

Nothing depends on how many processes share a batch, on what was cached, or on where a run was interrupted:

    order of the data     (seed, epoch)
    noise and its level   (seed, number of the step, number of the example)
    the autoencoder's     (name of the file)
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler, default_collate

from .data.caption_folder import CaptionedImage
from .families import Condition, DataOptions, Family

MEASURED_LEVELS = (0.15, 0.4, 0.65, 0.9)  # where in the distribution of noise levels held-out losses are taken

Item = TypeVar("Item")
Row = tuple[int, float]
"""Number of an example, and its weight in the loss of its batch."""


def seed_of(*key: object) -> int:
    """A seed that depends on the whole key, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little") >> 1


def generator(*key: object) -> torch.Generator:
    return torch.Generator().manual_seed(seed_of(*key))


def draw_noise(
    seed: int, number: int, examples: Sequence[object], latents: Tensor, offset: float = 0.0, perturbation: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Noise of the shape (B, C, ...) of `latents`, levels u (B,), and the noise that is really added to the latents,
    for step `number` of a run.

    Args:
        examples: numbers of the batch's examples, or what else tells them apart.
        offset: size of the noise that a whole channel has in common.
        perturbation: size of more noise that is added to the latents, and that the model is not asked for (2301.11706).
    """
    u, noise, added = [], [], []
    for example in examples:
        draws = generator(seed, "noise", number, example)
        u.append(torch.rand((), generator=draws))
        noise.append(torch.randn(latents.shape[1:], generator=draws))
        if offset:
            noise[-1] += offset * torch.randn((latents.shape[1], *[1] * (latents.ndim - 2)), generator=draws)
        more = perturbation * torch.randn(latents.shape[1:], generator=draws) if perturbation else 0.0
        added.append(noise[-1] + more)
    return torch.stack(noise).to(latents), torch.stack(u), torch.stack(added).to(latents)


class TrainingData(Dataset[dict[str, Any]]):
    """Captioned examples as they are read, or as cached latents."""

    def __init__(self, items: Sequence[CaptionedImage], family: Family, options: DataOptions) -> None:
        self.items, self.family, self.read = items, family, family.read_item
        self.sizes = family.sizes(items, options)
        self.prompts = [family.prompt_of(item, size) for item, size in zip(items, self.sizes, strict=True)]
        self.cache: list[dict[str, Tensor]] = []
        self.conditions: dict[str, Condition] = {}

    def __getstate__(self) -> dict[str, Any]:
        """What a process that loads examples gets where it is not a copy of this one, as under Windows and macOS."""
        return {**self.__dict__, "family": None, "conditions": {}}

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, row: Row) -> dict[str, Any]:
        index, weight = row
        content = self.cache[index] if self.cache else self.read(self.items[index].path, self.sizes[index])
        return {"index": index, "weight": weight, **content}

    def latents(self, batch: dict[str, Any]) -> Tensor:
        """Of a collated batch: (B, C, ...), fp32, on the model's device."""
        if "latents" in batch:
            latents = batch["latents"]
        else:
            names = [self.items[index].path.name for index in batch["index"].tolist()]
            rows = zip(batch["data"].split(1), names, strict=True)  # the last bits of a convolution depend on its batch
            latents = torch.cat([self.family.encode(row, [generator("vae", name)]) for row, name in rows])
        return latents.to(self.family.device, torch.float32)

    def texts(self, batch: dict[str, Any]) -> list[Condition]:
        """Conditions of a collated batch, cached or computed."""
        prompts = [self.prompts[index] for index in batch["index"].tolist()]
        if not self.conditions:
            return self.family.encode_prompts(prompts)
        device = self.family.device
        return [{key: value.to(device) for key, value in self.conditions[prompt].items()} for prompt in prompts]

    # -- measuring

    def fixed_batches(self, size: int) -> Iterator[tuple[dict[str, Any], Tensor, Tensor, Tensor]]:
        """Every example at every level of MEASURED_LEVELS with noise that is the same for every run.

        Yields (batch, latents, noise, u) of up to `size` cases of equal shape.
        """
        cases = sorted(itertools.product(range(len(self)), MEASURED_LEVELS), key=lambda case: self.sizes[case[0]])
        for _, group in itertools.groupby(cases, key=lambda case: self.sizes[case[0]]):
            alike = list(group)
            for chunk in (alike[start : start + size] for start in range(0, len(alike), size)):
                batch: dict[str, Any] = default_collate([self[index, 1.0] for index, _ in chunk])
                latents = self.latents(batch)
                noise = [torch.randn(latents.shape[1:], generator=generator("measure", *case)) for case in chunk]
                yield batch, latents, torch.stack(noise).to(latents), torch.tensor([u for _, u in chunk])

    # -- caches

    def cache_latents(self, disk: DiskCache | None = None) -> None:
        """Encode every example once."""
        self.cache = []
        for index, (item, size) in enumerate(zip(self.items, self.sizes, strict=True)):
            key = f"{size[1]}x{size[0]}"
            found = disk.read(item, "latents", key) if disk else None
            if found is None:
                row = self.read(item.path, size)
                batch = {"index": torch.tensor([index]), "data": row.pop("data")[None]}
                found = {**row, "latents": self.latents(batch)[0].float().cpu().contiguous()}
                if disk:
                    disk.write(item, "latents", key, found)
            self.cache.append(found)

    def cache_texts(self, batch_size: int, disk: DiskCache | None = None) -> None:
        """Run the text encoders once for every caption."""
        owners = {prompt: item for prompt, item in zip(self.prompts, self.items, strict=True)}
        if disk:
            stored = {prompt: disk.read(item, "text", prompt) for prompt, item in owners.items()}
            self.conditions = {prompt: found for prompt, found in stored.items() if found is not None}
        wanted = sorted(owners.keys() - self.conditions.keys())
        for start in range(0, len(wanted), batch_size):
            chunk = wanted[start : start + batch_size]
            with torch.no_grad():
                encoded = self.family.encode_prompts(chunk)
            for prompt, condition in zip(chunk, encoded, strict=True):
                self.conditions[prompt] = {key: value.cpu().contiguous() for key, value in condition.items()}
                if disk:
                    disk.write(owners[prompt], "text", prompt, self.conditions[prompt])


class DiskCache:
    """Files beside the examples, NAME_latents_FAMILY.safetensors and NAME_text_FAMILY.safetensors.

    Each holds a fingerprint of what it was made from; a file that was made from something else is made anew.

    Args:
        model: the model's folder, whose encoders count into the fingerprint by their files' names, sizes and times.
    """

    def __init__(self, family: Family, model: Path, dtype: torch.dtype) -> None:
        files = sorted(p for p in model.rglob("*") if p.is_file() and p.parent.name != family.denoiser_name)
        parts = [(str(p.relative_to(model)), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
        self.family, self.model = family, (parts, str(dtype))

    def _path(self, item: CaptionedImage, kind: str) -> Path:
        name = self.family.base_model_version.replace("/", "-")
        return item.path.with_name(f"{item.path.stem}_{kind}_{name}.safetensors")

    def _fingerprint(self, item: CaptionedImage, kind: str, key: str) -> str:
        stat = item.path.stat()
        source = (stat.st_size, stat.st_mtime_ns) if kind == "latents" else ()
        return f"{seed_of(self.model, item.path.name, source, key):016x}"

    def read(self, item: CaptionedImage, kind: str, key: str) -> dict[str, Tensor] | None:
        """What `write` was given; None where there is no such file, or one of something else."""
        from networks.files.reader import read_tensors

        path = self._path(item, kind)
        if not path.is_file():
            return None
        try:
            tensors, metadata = read_tensors(path)
        except ValueError:
            return None  # cut off by a crash: made anew
        return tensors if metadata.get("fingerprint") == self._fingerprint(item, kind, key) else None

    def write(self, item: CaptionedImage, kind: str, key: str, tensors: dict[str, Tensor]) -> None:
        """Write one file beside an example, atomically.

        Args:
            item: the example.
            kind: latents or text.
            key: what else they were made from: the size, or the prompt.
            tensors: by their names.
        """
        from safetensors.torch import save_file

        from networks.cli.command_line import write_atomically

        metadata = {"fingerprint": self._fingerprint(item, kind, key)}
        write_atomically(self._path(item, kind), lambda path: save_file(tensors, str(path), metadata))


class Order(Sampler[list[Row]]):
    """Batches of one epoch for one process: examples of one size, shuffled by the seed.

    A unit is what a step learns from: some batches, each that of all processes together, of which each takes its rows.
    Which examples a unit has does not depend on how it is divided into batches and processes, as long as they are of
    one size; what is left over of a size is put together with that of others where units have several batches. The last
    batches may be smaller; a process for which nothing is left repeats a row with weight 0. Weights make the mean over
    a unit's batches and processes the mean over its examples.

    Args:
        batch: examples a batch, over all processes.
        batches: in a unit.
    """

    def __init__(
        self,
        sizes: Sequence[tuple[int, int]],
        batch: int,
        seed: int,
        process: int,
        processes: int,
        batches: int = 1,
    ) -> None:
        self.sizes, self.batch, self.seed, self.batches = sizes, batch, seed, batches
        self.process, self.processes = process, processes
        self.epoch = self.skip = 0

    def go_to(self, unit: int) -> None:
        """The next iteration begins with this unit of the whole run."""
        self.epoch, self.skip = divmod(unit, len(self.whole(0)))

    def whole(self, epoch: int) -> list[list[list[int]]]:
        """All units of an epoch, batch by batch, of all processes."""
        draws = random.Random(seed_of(self.seed, "order", epoch))
        numbers = sorted(range(len(self.sizes)), key=lambda number: self.sizes[number])
        units: list[list[list[int]]] = []
        loose: list[list[int]] = []
        for _, group in itertools.groupby(numbers, key=lambda number: self.sizes[number]):
            members = list(group)
            draws.shuffle(members)
            for unit in _cut(_cut(members, self.batch), self.batches):
                if len(unit) == self.batches:
                    units.append(unit)
                else:
                    loose += unit
        random.Random(seed_of(self.seed, "loose", epoch)).shuffle(loose)
        units += _cut(loose, self.batches)
        draws.shuffle(units)
        return units

    def __len__(self) -> int:
        return self.batches * (len(self.whole(self.epoch)) - self.skip)

    def __iter__(self) -> Iterator[list[Row]]:
        for unit in self.whole(self.epoch)[self.skip :]:
            weight = self.processes * self.batches / sum(map(len, unit))
            for rows in itertools.islice(itertools.chain(unit, itertools.repeat([])), self.batches):
                mine = [(row, weight) for row in rows[self.process :: self.processes]]
                yield mine or [((rows or unit[0])[0], 0.0)]


def _cut(items: list[Item], length: int) -> list[list[Item]]:
    return [items[start : start + length] for start in range(0, len(items), length)]


def data_summary(data: TrainingData) -> str:
    """`4 in 40 x 24, 2 in 32 x 32`: how many examples have which size (width x height; samples for sounds)."""
    counts: dict[tuple[int, int], int] = {}
    for size in data.sizes:
        counts[size] = counts.get(size, 0) + 1
    rows = sorted(counts.items(), key=lambda row: -row[1])
    more = f" and {len(rows) - 6} more sizes" if len(rows) > 6 else ""
    return ", ".join(f"{count} in {size[1]} x {size[0]}" for size, count in rows[:6]) + more
