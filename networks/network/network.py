"""The network: all adapted layers of a model, with attach, merge, save and load. Host-neutral."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .._errors import located
from ..algos import ALGOS
from ..algos.clock import Clock, clock_of
from ..archs.detect import unwrap
from ..archs.spec import Timestep
from ..args.coerce import named
from ..files import twins, writer
from ..files.adapter_file import AdapterFile, Naming, open_adapter
from ..files.dialects import FileFormat
from ..files.places import Allowance
from ..files.strengths import ALPHA, SAID
from ..layers.adapted import LIVE_SCALE, AdaptedLayer
from ..layers.draws import Draws
from ..layers.max_norm import limit_norms
from ..layers.perturbation import Perturbation
from ..layers.region import Region, reshape_attention
from ..layers.runtime import Runtime
from ..layers.site import Site
from ..plan.plan import Plan, PlanRow
from ..plan.report import LoadReport, progress
from ..plan.walk import Bases, is_own
from ..tensors import base_weight
from ..tensors.fused import unfused as unfused  # for the API
from .average import ALSO, Average, split_state
from .diagnosis import Diagnosis
from .loading import Places, match
from .saving import Contents, Saver, start_sizes
from .training_adapters import TrainingAdapter, TrainingAdapters
from .watching import Watch, time_reader

log = logging.getLogger(__name__)

_PORTABLE = FileFormat()
_MERGED = (
    "the network is in the base weights already, and would act twice: call restore_weights first where there was a "
    "backup, otherwise load the model again and make another network"
)


class Network(nn.Module):
    """All adapters of one call.

    It acts once: in the forward pass, from `attach` to `detach`, or in the base weights, from `merge` or
    `pre_calculation` to `restore_weights`. While the weights have it, an attached network's forward pass adds nothing.
    What would make it act twice is an error: a second `merge`, or `attach` after a merge without a backup.

    Its children are the adapted layers under their saved names; base layers are never children, so its parameters and
    its state are the adapter's alone.

    Args:
        plan: what to build.
        modules: saved name -> base module, or modules and their rows, for the plan's trained rows.
        roots: part name -> the model that the host calls.
        multiplier: strength.
        for_inference: dropouts never act.
        perturbation: (sigma, beta) of GGPO, or None.
        file_format: of its files.
        started: it has start values; otherwise the load of a file that has all layers sets them.
    """

    def __init__(
        self,
        plan: Plan,
        modules: Mapping[str, nn.Module | Bases],
        roots: Mapping[str, nn.Module],
        multiplier: float = 1.0,
        for_inference: bool = False,
        perturbation: tuple[float, float] | None = None,
        file_format: FileFormat = _PORTABLE,
        started: bool = True,
    ) -> None:
        super().__init__()
        self.file_format = file_format
        self.plan = plan
        self.runtime = Runtime(for_inference=for_inference)
        self.training_adapters = TrainingAdapters(self.runtime)
        self.made_from: AdapterFile | None = None  # until it acts, since hosts hand its tensors over again
        self._saver = Saver()
        self._merged_at: float | Tensor | None = None  # the multiplier that the base weights have it at, if they do
        self.diagnosis = Diagnosis(after=0)  # a host that tells of steps gives another, and another average
        self.average = Average()
        self._average_found: dict[str, Tensor] = {}  # in the state that a wrapper is loading
        self.register_load_state_dict_post_hook(Network._take_average)
        self.allowance = Allowance()  # what of a file may be without a place
        self.resizes = False  # layers of a file with other ranks
        self._roots = dict(roots)
        self.timesteps: dict[str, Timestep] = {}  # part name -> how the forward of its root is told the time
        self.clock = Clock()
        self._hooks: list[Any] = []
        self._region_hooks: list[Any] = []
        self._layers: dict[str, tuple[PlanRow, AdaptedLayer]] = {}
        for row in plan.trained:
            name = row.saved_name
            bases = modules[name]
            pairs: Bases = ((bases, None),) if isinstance(bases, nn.Module) else bases
            sites = [Site(module, row_ranges) for module, row_ranges in pairs]
            noise = (
                Perturbation(*perturbation) if perturbation and "ggpo_sigma" in ALGOS[row.algo].spec.features else None
            )
            layer = AdaptedLayer(
                name,
                sites,
                row.make_adapter(started),
                row.scale,
                row.dropouts,
                self.runtime,
                row.dora,
                perturbation=noise,
            )
            self._layers[name] = row, layer
            self.add_module(name, layer)
        self._aliases = {row.own_saved_name: name for name, (row, _) in self._layers.items()}
        self.set_multiplier(multiplier)
        self.draws = Draws(self.adapted_layers)

    # -- layers

    @property
    def layers(self) -> list[tuple[PlanRow, AdaptedLayer]]:
        """With the plan's row of each."""
        return list(self._layers.values())

    @property
    def adapted_layers(self) -> list[AdaptedLayer]:
        return [layer for _, layer in self._layers.values()]

    def accompany(self, adapters: Sequence[TrainingAdapter]) -> None:
        """Attach these with this network, below it, for its training."""
        self.training_adapters = TrainingAdapters(self.runtime, adapters)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Network:
        """Casts and moves, from `.to()`, `.half()` and the like."""
        super()._apply(fn, recurse)
        self.training_adapters.follow(fn)
        return self

    def follow(self, plan: Plan) -> None:
        """Take the plan of the same layers of which something is known now that was not before."""
        self.plan = plan
        self._layers = {row.saved_name: (row, self._layers[row.saved_name][1]) for row in plan.trained}

    def _named(self, layer: AdaptedLayer) -> AbstractContextManager[None]:
        """Errors within begin with the layer, as patterns take it."""
        return located(self._layers[layer.lora_name][0].shown_name)

    # -- attachment

    def attach(self, parts: Sequence[str] | None = None) -> None:
        """Take over the forwards of these parts' layers; layers of other parts leave the network.

        Raises:
            ValueError: nothing is left to train, or the network is merged.
        """
        self._refuse_merged()
        if parts is not None:
            self._keep(parts)
        if not self._layers:
            raise ValueError(
                "no layer is left to train: no part of the model is both trained and targeted; train the part that the "
                "network is for, or make it for that part"
            )
        self.training_adapters.attach(parts)
        for layer in progress(self.adapted_layers, any(layer.adapter.wants_base for layer in self.adapted_layers)):
            with self._named(layer):
                layer.attach()
        self._tell_start()
        self._unhook()
        self._hook()
        self.made_from = None

    def _tell_start(self) -> None:
        """Of updates that have started beside the base model."""
        sizes = start_sizes(self.layers)
        if sizes:
            log.info(
                "%d layers start with an update of relative size %.3g to %.3g, so not at the base model",
                len(sizes), min(sizes), max(sizes),
            )  # fmt: skip

    def detach(self) -> None:
        """Give the model its own forwards back."""
        for layer in self.adapted_layers:
            layer.detach()
        self.training_adapters.detach()
        self._unhook()
        self.leave_region()

    def _keep(self, parts: Sequence[str]) -> None:
        """Layers of other parts leave the network."""
        for name in [name for name, (row, _) in self._layers.items() if row.part not in parts]:
            del self._layers[name]
            delattr(self, name)
        self.plan = self.plan.keep(parts)
        self.draws = Draws(self.adapted_layers)

    def _hook(self) -> None:
        """Watch the models' own forwards, where a layer acts otherwise in sampling, or by the time."""
        clocks = self._set_clocks()
        if not (clocks or self.average.decay or self._acts_otherwise):
            return
        used = {row.part for row, _ in self.layers} | self.training_adapters.parts
        for part in [part for part in self._roots if part in used]:
            root = unwrap(self._roots[part])
            read = time_reader(root, self.timesteps[part]) if part in self.timesteps and clocks else None
            self._hooks += Watch(self.runtime, clocks if read else (), read, self.average, self.layers).hook(root)

    @property
    def _acts_otherwise(self) -> bool:
        """Whether its passes in training and in sampling differ."""
        return bool(self.training_adapters) or any(layer.acts_otherwise for layer in self.adapted_layers)

    def _unhook(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    # -- time

    def _set_clocks(self) -> list[Clock]:
        """Layers of parts whose forward tells the time read the network's clock, or that of a group which they were
        given; all of these clocks."""
        clocks: dict[int | None, Clock] = {}
        for row, layer in self.layers:
            for adapter in layer.adapter.members() if row.part in self.timesteps else ():
                if adapter.spec.timed:
                    group = adapter.chosen.get("mask_group_id")
                    adapter.clock = clocks.setdefault(group, self.clock if group is None else clock_of(group))
        return list(clocks.values())

    def set_timestep_mask(self, mask: Tensor | None, group_id: int = 0) -> None:
        """Which ranks act, [R] or [samples, R] of 0 and 1, whatever time it is, in the passes of this thread.

        Args:
            mask: None = by the timestep again, which the denoiser's own forward tells.
            group_id: for all networks that were given this mask_group_id; 0: also for this one, if it was given none.
        """
        clock_of(group_id).set_mask(mask)
        if group_id == 0:
            self.clock.set_mask(mask)

    # -- strength

    def set_multiplier(self, multiplier: float | Sequence[float] | Tensor) -> None:
        """One strength, or one per sample (forward only).

        Raises:
            ValueError: it is no finite number.
        """
        if isinstance(multiplier, (Tensor, Sequence)) and not isinstance(multiplier, str):
            values = torch.as_tensor(multiplier, dtype=torch.float32).flatten()
            if not values.numel() or not bool(values.isfinite().all()):
                raise ValueError(
                    f"multiplier={multiplier} has no finite number for each sample; write some such as 0.8"
                )
            self.runtime.multiplier = float(values[0]) if values.numel() == 1 else values
        else:
            self.runtime.multiplier = named("multiplier", multiplier)
        if self._is_merged and not self._at_merged_strength:
            log.warning("the network is merged into the base weights, where its strength cannot be changed any more")

    # -- regional prompts

    def enter_region(
        self, index: int, mask: Tensor, roles: Mapping[str, str], attention: Iterable[tuple[str, nn.Module]] = ()
    ) -> None:
        """Act in one region of the picture from now on, see layers.region.

        Args:
            index: of the sub-prompt.
            mask: [H, W], 0 to 1.
            roles: saved name -> role.
            attention: (role, layer) of the model, from the one network that looks after its cross attention.
        """
        self.leave_region()
        self.runtime.region = Region(index, mask, roles)
        self._region_hooks = reshape_attention(attention, self.runtime.region)

    def leave_region(self) -> None:
        for hook in self._region_hooks:
            hook.remove()
        self.runtime.region, self._region_hooks = None, []

    # -- weight space

    def merge(self, device: torch.device | None = None) -> None:
        """Put every W' into the base model, rounded once; the forward pass adds nothing from then on.

        Args:
            device: where W' is computed; None = where each weight is.

        Raises:
            ValueError: the base weights have it already, or one cannot be read or written; nothing was changed.
        """
        self.refuse_second_merge()
        self._merge(self.adapted_layers, device)
        self.made_from = None

    def refuse_second_merge(self) -> None:
        """Whether the base weights are without this network.

        Raises:
            ValueError: they have it.
        """
        if any(layer.in_weight for layer in self.adapted_layers):
            raise ValueError(_MERGED)

    def _refuse_merged(self) -> None:
        if self._is_merged:
            raise ValueError(_MERGED)

    @property
    def _is_merged(self) -> bool:
        """Whether the base weights have it for good."""
        return any(layer.in_weight and not layer.has_backup for layer in self.adapted_layers)

    @property
    def _at_merged_strength(self) -> bool:
        multiplier = self.runtime.multiplier
        return not isinstance(multiplier, Tensor) and multiplier == self._merged_at

    def backup_weights(self) -> None:
        """Remember the base weights as they are for `restore_weights`; the first backup counts until then."""
        self._check_bases()
        for layer in self.adapted_layers:
            layer.backup()

    def restore_weights(self) -> None:
        """Base weights of the backup, bit for bit; adapters that are attached act in the forward pass again.

        Networks on one module share its backup: what others merged since then is gone from the weights, too, and acts
        in their forward passes.
        """
        for layer in self.adapted_layers:
            layer.restore()

    def pre_calculation(self) -> None:
        """Merge for the time being, after a backup; `restore_weights` undoes it. Again at the same multiplier, it
        changes nothing.

        Raises:
            ValueError: the base weights have the network at another multiplier, or as `merge`.
        """
        if not self._at_merged_strength:
            self.refuse_second_merge()
        self.backup_weights()
        self._merge([layer for layer in self.adapted_layers if not layer.in_weight])

    def _check_bases(self) -> None:
        """Raises ValueError for the first base weight that cannot be read and written."""
        for layer in self.adapted_layers:
            with self._named(layer):
                for site in layer.sites:
                    base_weight.check(site.module)

    def _merge(self, layers: Sequence[AdaptedLayer], device: torch.device | None = None) -> None:
        """Every base weight is looked at before one is changed, and what rounding took is told."""
        self._check_bases()
        self._merged_at = self.runtime.multiplier
        roundings = []
        for layer in layers:
            with self._named(layer):
                roundings.append(layer.merge(device=device))
        if text := base_weight.rounding_warning(roundings):
            log.warning("%s", text)

    def limit_norms(self, limit: float) -> tuple[int, float, float]:
        """Shrink every true update above `limit`; (number shrunk, mean and maximum norm afterwards)."""
        return limit_norms(self.adapted_layers, limit)

    # -- files

    def save(
        self,
        path: str | os.PathLike[str],
        dtype: torch.dtype | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Write a file in the network's form; beside it those of lower dims (`save_dims`) and in other forms
        (`save_also`). Each is written whole or not at all.

        Args:
            path: of the file.
            dtype: of its tensors; None = as they are here. What half precision would spoil stays in fp32.
            metadata: of the host; ours is added.

        Raises:
            OSError: it cannot be written. What cannot be written of `save_also` is a warning.
            ValueError: a layer has no form that the program of `save_format` computes.
        """
        file, average = writer.checked_path(path), self.average
        average.put_back()
        known = dict(metadata or {})
        known |= self.training_adapters.metadata(known)
        of = Contents(self.plan, self.layers, self.file_format, dtype, known, self.diagnosis.health())
        if not average.is_saved or average.files == ALSO:
            self._saver.write(file, of)
        if average.is_saved:
            dtype = dtype or next(self.parameters()).dtype
            with average.written(self.layers):
                of = replace(of, dtype=dtype, metadata=known | average.told())
                self._saver.write(file, of, "ema" if average.files == ALSO else "")

    @property
    def _naming(self) -> Naming:
        return Naming(self.file_format.arch, self.file_format.dialect, self._own_class)

    @property
    def _own_class(self) -> bool:
        """Whether the denoiser is of the trainer's class, as far as that matters for names."""
        root = self._roots.get(self.file_format.arch.denoiser.name) if self.file_format.arch else None
        return root is None or self.file_format.arch is None or is_own(self.file_format.arch.denoiser, root)

    def load(self, path: str | os.PathLike[str]) -> LoadReport:
        """Take over a file.

        Args:
            path: of the file, or of the folder of one that PEFT wrote.

        Raises:
            ValueError: it is unreadable, does not fit, contradicts this network, or has too little for it.
        """
        return self.load_opened(open_adapter(path, self._naming))

    def load_tensors(self, tensors: Mapping[str, Tensor], source: str = "the weights") -> LoadReport:
        """Take over the tensors of a file.

        Args:
            tensors: key -> tensor, as they stand in the file.
            source: its name, for messages.

        Raises:
            ValueError: as `load`.
        """
        if self.made_from is not None and self.made_from.is_of(tensors):
            return self.load_opened(self.made_from)
        return self.load_opened(open_adapter(tensors, self._naming, source))

    def load_opened(self, file: AdapterFile) -> LoadReport:
        """Take over an opened file.

        Raises:
            ValueError: it does not fit, contradicts this network, or has too little for it; nothing was changed.
        """
        self.file_format.check(file.flags, file.metadata, file.source)
        places = self._places()
        file = file.on(
            lambda name: places.layers[own][0].shape if (own := places.own(name)) in places.layers else None,
            lambda name: self._layers[places.own(name)][1].whole_weight(),
        )
        found, without = match(file, places)
        for text in file.assumed:
            log.info("%s: %s", file.source, text)
        for own, layer in found.items():  # only now: a file that does not fit must change nothing
            adapted = self._layers[own][1]
            adapted.adapter.unpack_(layer.tensors)
            adapted.init_from_base()
            adapted.set_alpha(layer.alpha, layer.algorithm.spec.shown_rank(layer.tensors))
            adapted.load_magnitude(layer.magnitude, layer.folded)
        self._follow_scales()
        missing = tuple(name for name in self._layers if name not in found)
        strength = "" if file.strength in (SAID[ALPHA], "") else file.strength
        report = LoadReport(file.source, tuple(found), missing, without, file.stray, strength)
        if report.incomplete:
            log.warning("%s", report)
        return report

    def _places(self) -> Places:
        prefixes = (
            {} if self.file_format.arch is None else {part.name: part.prefix for part in self.file_format.arch.parts}
        )
        held = {prefixes[row.part] for row, _ in self.layers if row.part in prefixes}
        unwanted = {name for row in self.plan.rows if row.unwanted for name in (row.saved_name, row.own_saved_name)}
        known = {*prefixes.values()}
        return Places(self._layers, self._aliases, held, known, unwanted, self.plan.title, self.allowance, self.resizes)

    def _follow_scales(self) -> None:
        """After a load: the plan states the scale that is in force, and the log says where it is another."""
        changed = {}
        for name, (row, layer) in self._layers.items():
            if not math.isclose(row.scale, layer.scale, rel_tol=1e-6):
                changed[name] = replace(row, alpha=layer.alpha, scale=layer.scale)
        if changed:
            first = next(iter(changed.values()))
            log.info(
                "%d layers take their scale from the file, not from network_alpha: %s has %g",
                len(changed), first.saved_name, first.scale,
            )  # fmt: skip
            self.follow(replace(self.plan, rows=tuple(changed.get(row.saved_name, row) for row in self.plan.rows)))

    # -- state

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Take the live state (`state_dict()`), or the keys of a file.

        Raises:
            RuntimeError: strict, and keys are missing or unexpected.
            ValueError: a file's tensors do not fit, or none belongs here.
        """
        if any(key.endswith(LIVE_SCALE) for key in state_dict):
            missing, unexpected = self._take_live(state_dict)
        else:
            report = self.load_tensors(state_dict)
            missing, unexpected = list(report.missing), list(report.unexpected)
        if strict and (missing or unexpected):
            raise RuntimeError(
                f"the weights do not match the network exactly: missing {missing[:3]} ({len(missing)}), "
                f"unexpected {unexpected[:3]} ({len(unexpected)})"
            )
        return nn.modules.module._IncompatibleKeys(missing, unexpected)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if twins.has_twins(self._layers):
            destination[prefix + twins.NAMED] = torch.tensor(True)
        destination.update((prefix + key, value) for key, value in self.average.state().items())

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """For the walk of wrappers (data-parallel, compile), which comes here before it goes to the layers."""
        found = {key.removeprefix(prefix): key for key in list(state_dict) if key.startswith(prefix)}
        own, averages = split_state(found)
        self._average_found = {name: state_dict.pop(key) for name, key in averages.items()}
        renamed = twins.renamed_state(own, self._own_class)
        values = {prefix + name: state_dict[key] for name, key in renamed.items()}
        for key in own.values():
            del state_dict[key]
        state_dict.update(values)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _take_average(self, _: object) -> None:
        """After that walk."""
        found, self._average_found = self._average_found, {}
        self.average.take_state(found, self.layers)

    def _take_live(self, state: Mapping[str, Tensor]) -> tuple[list[str], list[str]]:
        """Copy by name: torch's own walk is quadratic in the number of layers."""
        state, averages = split_state(state)
        state, own = twins.renamed_state(state, self._own_class), split_state(self.state_dict(keep_vars=True))[0]
        own.pop(twins.NAMED, None)
        before = set(state)
        for layer in self.adapted_layers:
            layer.renew_state(state, f"{layer.lora_name}.")
        if renewed := {key.partition(".")[0] for key in before ^ state.keys()}:
            log.info("the state is of an earlier version: %d layers go on as they were trained there", len(renewed))
        shared = own.keys() & state.keys()
        wrong = sorted(key for key in shared if own[key].shape != state[key].shape)
        if wrong:
            key, count = wrong[0], len(wrong)
            raise RuntimeError(
                f"the state does not fit in {count} tensors, e.g. {key}: {tuple(state[key].shape)} in the state, "
                f"{tuple(own[key].shape)} here; use the dim and arguments that it was trained with"
            )
        with torch.no_grad():
            for key in shared:
                own[key].copy_(state[key])
        for layer in self.adapted_layers:
            layer.see_state(state.get(f"{layer.lora_name}.{LIVE_SCALE}"))
        self._follow_scales()
        self.average.take_state(averages, self.layers)
        return sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
