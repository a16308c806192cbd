"""Files of `training_adapter`, on the models of a call: opened as every adapter file is, and made into networks."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ..args.parse import Problems, parse
from ..files import reader
from ..files.adapter_file import AdapterFile, FileTensors
from ..files.places import Allowance
from ..foreign.texts import user_path
from ..network.network import Network
from ..network.training_adapters import TrainingAdapter
from ..plan.plan import Beside, Plan, Request
from ..plan.planner import build_plan
from ..plan.walk import Bases
from .of_file import of_file

_ANY = "lora"  # the algorithm of a call whose file decides the algorithm


@dataclass(frozen=True)
class Opened:
    """One of them.

    Attributes:
        path, strength: as the call has them.
        request, plan: of its own network.
        file: its layers as the models have them.
        modules: saved name -> base modules.
    """

    path: Path
    strength: float
    request: Request
    file: AdapterFile
    plan: Plan
    modules: Mapping[str, Bases]

    @property
    def dtype(self) -> torch.dtype:
        """Of its values: that of the file where all of them have 16 bits."""
        found = {t.dtype for saved in self.file.layers.values() for t in saved.tensors.values()}
        return found.pop() if found in ({torch.bfloat16}, {torch.float16}) else torch.float32

    @property
    def planned(self) -> Beside:
        """What a plan says of it."""
        count = sum(row.parameters for row in self.plan.trained)
        return Beside(self.path.name, self.strength, len(self.plan.trained), count * self.dtype.itemsize)

    def network(self) -> TrainingAdapter:
        """Its network, with its values, to be attached with the one that is trained.

        Raises:
            ValueError: it does not fit, or too much of it has no place.
        """
        arch = self.request.arch
        roots = {part.name: model for part, model in self.request.parts}
        made = Network(
            self.plan, self.modules, roots, multiplier=self.strength, for_inference=True,
            file_format=self.plan.file_format, started=False,
        )  # fmt: skip
        made.timesteps[arch.denoiser.name] = arch.timestep
        made.allowance = Allowance(self.request.args.allow_missing)
        made.load_opened(self.file)
        made.to(self.dtype).requires_grad_(False)
        return TrainingAdapter(made, self.path.name, self.strength, _sha256(self.path), arch.denoiser.name)


def opened(request: Request, problems: Problems) -> list[Opened]:
    """Those of a call.

    Args:
        request: the call.
        problems: takes what is wrong with a file: missing, broken, or for another model.
    """
    found = []
    for given, strength in request.args.training_adapter:
        own = Problems("")
        try:
            found.append(_open(user_path(given), strength, request, own))
        except (ValueError, OSError) as error:
            own.add(str(error))
        for message in own.messages:
            problems.add(f"training_adapter={given}: {message}")
    return found


def _open(path: Path, strength: float, request: Request, problems: Problems) -> Opened:
    raw = {"allow_missing": request.args.allow_missing}
    args = parse(raw, _ANY, problems, request.args.host, {"network_dim": request.dim, "network_alpha": request.alpha})
    own, file = of_file(
        Request(request.arch, request.parts, request.dim, request.alpha, args), FileTensors(path), path.name, problems
    )
    plan, modules = build_plan(own, problems)
    return Opened(path, strength, own, file, plan, modules)


def _sha256(path: Path) -> str:
    found = hashlib.sha256()
    with reader.checked_path(path).open("rb") as stream:
        while block := stream.read(1 << 20):
            found.update(block)
    return found.hexdigest()
