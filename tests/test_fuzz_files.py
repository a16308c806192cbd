"""Adapter files of every algorithm and form with something wrong in their tensors, keys or metadata, at every door: the
result is right by formulas of our own (fuzz_forms.py), or one ValueError that names the file and the place.

    python tests/test_fuzz_files.py --cases 10000
    python tests/test_fuzz_files.py --replay 4711

A case is a number: form, what is done to it, where, and the door follow from it.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import logging
import math
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from fuzz_forms import FORMS, REAL, Form, Meaningless, layer_outcome, outcome, weights_of
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from networks import api
from networks.cli import merge as merge_script
from networks.cli import resize as resize_script
from networks.cli import show as show_script
from networks.hosts import key_merge

Tensors = dict[str, Tensor]
SECONDS = 10.0  # which no case may take
NEAR = 3e-5  # of the largest value: fp32 against float64
LONG = "k" * 100_000


# -- what is done to a file


@dataclass
class Broken:
    """A file in the making.

    Attributes:
        any: what it means is not known to the formulas: it may be taken or refused.
        words: one of which an error has to have, beside the names in the file.
    """

    form: Form
    tensors: Tensors
    metadata: dict[str, str]
    any: bool = False
    words: list[str] = field(default_factory=list)
    key: str = ""

    def put(self, tensor: Tensor) -> None:
        self.tensors[self.key] = tensor.contiguous().clone()


Mutation = Callable[[Broken, random.Random], Any]


def _axis(tensor: Tensor, rng: random.Random) -> int:
    return rng.randrange(max(1, tensor.dim()))


def transposed(b: Broken, rng: random.Random) -> None:
    t = b.tensors[b.key]
    b.put(t.transpose(0, 1) if t.dim() > 1 else t[None])


def longer(b: Broken, rng: random.Random) -> None:
    t = b.tensors[b.key]
    b.put(torch.cat([t, t.narrow(axis := _axis(t, rng), 0, 1)], axis) if t.dim() else t.repeat(2))


def shorter(b: Broken, rng: random.Random) -> None:
    t = b.tensors[b.key]
    b.put(t.narrow(axis := _axis(t, rng), 0, t.shape[axis] - 1) if t.dim() else t.new_zeros(0))


def axis_before(b: Broken, rng: random.Random) -> None:
    b.put(b.tensors[b.key][None])


def axis_behind(b: Broken, rng: random.Random) -> None:
    b.put(b.tensors[b.key][..., None])


def axis_less(b: Broken, rng: random.Random) -> None:
    t = b.tensors[b.key]
    b.put(t.select(_axis(t, rng), 0) if t.dim() else t[None])


def flat(b: Broken, rng: random.Random) -> None:
    b.put(b.tensors[b.key].flatten())


def empty(b: Broken, rng: random.Random) -> None:
    t = b.tensors[b.key]
    b.put(t.narrow(_axis(t, rng), 0, 0) if t.dim() else t.new_zeros(0))


def empty_everywhere(b: Broken, rng: random.Random) -> None:
    """The rank of a whole layer, perhaps."""
    name = _layer(b)
    size = rng.choice([2, 3, 4])
    for key, t in b.tensors.items():
        if key.startswith(f"{name}.") and size in t.shape:
            b.tensors[key] = t.narrow(list(t.shape).index(size), 0, 0).contiguous().clone()


def number(b: Broken, rng: random.Random) -> None:
    b.put(torch.tensor(0.5))


def one_value(b: Broken, rng: random.Random) -> None:
    b.put(torch.full((1,) * rng.randrange(1, 6), 0.5))


def huge(b: Broken, rng: random.Random) -> None:
    b.put(torch.full(rng.choice([(1, 200_000), (200_000,), (50_000, 2)]), 0.1))


def many_axes(b: Broken, rng: random.Random) -> None:
    t = b.tensors[b.key]
    b.put(t.reshape(*t.shape, *[1] * 20))


def reshaped(b: Broken, rng: random.Random) -> None:
    t = b.tensors[b.key]
    sizes = [n for n in range(1, t.numel() + 1) if t.numel() % n == 0]
    b.put(t.reshape(rng.choice(sizes), -1))


def exchanged(b: Broken, rng: random.Random) -> None:
    other = rng.choice(sorted(b.tensors))
    b.tensors[b.key], b.tensors[other] = b.tensors[other], b.tensors[b.key]
    b.words += [other, b.key]


DTYPES = (
    torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8, torch.int64, torch.bool, torch.complex64,
    torch.float64, torch.float16, torch.bfloat16,
)  # fmt: skip


def as_dtype(b: Broken, rng: random.Random) -> str:
    dtype = rng.choice(DTYPES)
    b.put(b.tensors[b.key].to(dtype))
    return str(dtype)


def all_as_dtype(b: Broken, rng: random.Random) -> str:
    dtype = rng.choice(DTYPES)
    for key, t in b.tensors.items():
        b.tensors[key] = t.to(dtype)
    return str(dtype)


VALUES = (math.nan, math.inf, -math.inf, 1e300, 1e30, 1e19, 1e-300, 0.0, -1.0)


def one_wrong_value(b: Broken, rng: random.Random) -> str:
    value, t = rng.choice(VALUES), b.tensors[b.key]
    wide = t.clone().to(torch.float64 if abs(value) > 1e38 or 0 < abs(value) < 1e-38 else t.dtype)
    wide.view(-1)[rng.randrange(wide.numel())] = value
    b.put(wide)
    return str(value)


def all_wrong_values(b: Broken, rng: random.Random) -> str:
    value, t = rng.choice(VALUES), b.tensors[b.key]
    b.put(torch.full_like(t, value, dtype=torch.float64 if abs(value) > 1e38 else t.dtype))
    return str(value)


def odd_alpha(b: Broken, rng: random.Random) -> str:
    """Or a flag of the whole file."""
    keys = [key for key in b.tensors if key.endswith("alpha") or key in b.form.whole]
    b.key = rng.choice(keys) if keys else f"{_layer(b)}.alpha"
    odd = rng.choice(
        [
            torch.tensor([1.0, 2.0]), torch.ones(4, 4), torch.zeros(0), torch.tensor(1 + 2j), torch.tensor(-2.0),
            torch.tensor(1e300, dtype=torch.float64), torch.tensor(1e30), torch.tensor(0.0), torch.tensor(math.nan),
            torch.tensor(True), torch.tensor(3), torch.tensor([3.0]), torch.tensor([[3.0]]),
            torch.tensor(3.0, dtype=torch.float8_e4m3fn), torch.tensor(1e-300, dtype=torch.float64),
        ]
    )  # fmt: skip
    b.tensors[b.key] = odd
    b.any = f"{_layer(b)}.oft_R.weight" in b.tensors  # an alpha tells of an earlier form
    return str(odd).replace("\n", " ")


def lost(b: Broken, rng: random.Random) -> None:
    del b.tensors[b.key]


def lost_but_one(b: Broken, rng: random.Random) -> None:
    name = _layer(b)
    for key in [key for key in b.tensors if key.startswith(f"{name}.") and key != b.key]:
        del b.tensors[key]


def foreign_key(b: Broken, rng: random.Random) -> str:
    key = rng.choice(
        [
            "", "x", ".", "..", ".alpha", ".lora_up.weight", "lora_up.weight", "alpha", "step", "a.b.c.d",
            "lora_unet_", "lora_unet_.lora_down.weight", "läyer.lora_up.weight", "\U0001f600", "İ.lora_A.weight",
            "\x00", "x\u202ey.alpha", LONG, f"{LONG}.lora_up.weight", f"lora_unet_{LONG}.lora_down.weight",
            ".".join("ab" * 20_000), "text_encoder.", "lora_te_x.weight", "lokr_factor", "use_rslora_flag",
            "model.diffusion_model.out.2.weight", "1", "lora_unet_x_lora_down_weight",
        ]
    )  # fmt: skip
    shape = rng.choice([(), (1,), (3,), (2, 2), (0,), (2, 3, 4)])
    b.tensors[key] = torch.ones(shape) if rng.random() < 0.9 else torch.ones(shape, dtype=torch.complex64)
    b.key, b.any = key, True
    escaped = key[:60].encode("unicode_escape").decode()
    b.words += [repr(key), escaped, *filter(None, key.split(".", 2)[:1]), *["lora_unet_"] * key.startswith(".")]
    return f"{key[:40]!r} {shape}"


def unknown_suffix(b: Broken, rng: random.Random) -> str:
    suffix = rng.choice(
        [
            "x", "bias", "weight", "lora_up", "lora_E", "set_weight", "hada_w1_a", "lokr_w1", "dora_scale", "diff_b",
            "lora_mid.weight", "oft_blocks.1", "oft_blocks.7", "rescale", "on_input", "a1.weight", "w_norm", "scalar",
            "lora_up.bias", "lora_A.weight", "oft_R.terms", "oft_coft_metadata", "lokr_t2", "hada_t1", "boft_s", "",
        ]
    )  # fmt: skip
    b.key = f"{_layer(b)}.{suffix}"
    b.tensors[b.key] = torch.ones(rng.choice([(), (1,), (8,), (8, 2), (2, 2, 3, 3)]))
    b.any = True
    return suffix


def twice(b: Broken, rng: random.Random) -> str:
    """In another spelling."""
    own = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.default.weight", "diff": "w_norm"}
    suffix = next((s for s in own if b.key.endswith(f".{s}")), "")
    name = b.key.removesuffix(f".{suffix}")
    b.tensors[f"{name}.{own[suffix]}" if suffix else f"lycoris_{b.key.removeprefix('lora_unet_')}"] = b.tensors[
        b.key
    ].clone()
    b.words.append(_layer(b).replace(".", "_"))
    b.any = True
    return suffix


def renamed(b: Broken, rng: random.Random) -> str:
    """A layer which no model has."""
    name = _layer(b)
    for key in [key for key in b.tensors if key.startswith(f"{name}.")]:
        b.tensors[key.replace(name, f"{name}_x", 1)] = b.tensors.pop(key)
    b.words += [f"{name}_x", name.replace(".", "_")]
    b.any = True
    return name


def two_algorithms(b: Broken, rng: random.Random) -> str:
    """The tensors of another form under the name of a layer."""
    other = rng.choice([name for name in FORMS if name != b.form])
    place = next(iter(FORMS[other].places.items()))
    for suffix in place[1].suffixes:
        b.tensors.setdefault(f"{_layer(b)}.{suffix}", FORMS[other].tensors()[f"{place[0]}.{suffix}"])
    b.any = True
    return other


DEEP = "[" * 100_000


def odd_metadata(b: Broken, rng: random.Random) -> str:
    key = rng.choice(
        [
            "ss_network_args", "ss_network_dim", "ss_network_alpha", "ss_network_module", "alpha", "lora_alpha",
            "lora_adapter_metadata", "networks_dialect", "ss_base_model_version", "modelspec.architecture",
            "networks_health", "networks_version", "networks_resized", "ss_steps", "ss_training_finished_at",
        ]
    )  # fmt: skip
    value = rng.choice(
        [
            "", "{", DEEP, '{"a":' * 50_000, "null", "[]", "[1]", '"x"', "1e999", "nan", "-1", "four", "0", "1e300",
            "9" * 5000, '{"algo": ["x"]}', '{"algo": 1, "use_dora": {}}', '{"unet.r": "x"}', '{"unet.r": []}',
            '{"unet.alpha_pattern": {"(": 1}}', "\x00", "x" * 100_000, "portable", "True",
            '{"unet.alpha_pattern": {"(a+)+$": 1}, "unet.lora_alpha": 2}', '{"conv_dim": "1e999", "dim": null}',
        ]
    )  # fmt: skip
    b.metadata[key] = value
    b.words.append(key)
    b.key = ""
    b.any = key in ("alpha", "lora_alpha", "lora_adapter_metadata", "networks_dialect", "ss_network_args")
    return f"{key} = {value[:40]!r}"


MUTATIONS: tuple[Mutation, ...] = (
    transposed, longer, shorter, axis_before, axis_behind, axis_less, flat, empty, empty_everywhere, number, one_value,
    huge, many_axes, reshaped, exchanged, as_dtype, all_as_dtype, one_wrong_value, all_wrong_values, odd_alpha, lost,
    lost_but_one, foreign_key, unknown_suffix, twice, renamed, two_algorithms, odd_metadata,
)  # fmt: skip


def _layer(b: Broken) -> str:
    """Of the key that was chosen."""
    return next((name for name in b.form.places if b.key.startswith(f"{name}.")), next(iter(b.form.places)))


# -- the doors


@dataclass
class Visit:
    """A broken file at a door.

    Attributes:
        path: of the file.
        good: of the right one.
    """

    broken: Broken
    path: Path
    good: Path
    folder: Path
    name: str

    @property
    def form(self) -> Form:
        return self.broken.form

    def tensors(self) -> Tensors:
        return load_file(self.path)


def _create(visit: Visit, model: Any, **given: Any) -> Any:
    entry = importlib.import_module(visit.form.entry)
    return entry.create_network_from_weights(
        1.0, vae=None, text_encoder=None, unet=model, for_inference=True, **given, **visit.form.arguments
    )[0]


def _merged(network: Any, model: Any, given: Tensors | None = None) -> Tensors:
    network.merge_to(None, model, given)
    return {key: tensor for key, tensor in model.state_dict().items()}


def from_file(visit: Visit) -> Tensors:
    model = visit.form.models()
    return _merged(_create(visit, model, file=str(visit.path)), model)


def from_tensors(visit: Visit) -> Tensors:
    model = visit.form.models()
    return _merged(_create(visit, model, file=None, weights_sd=visit.tensors()), model)


def _trained(visit: Visit) -> tuple[Any, Any]:
    """A network for the right file."""
    model = visit.form.models()
    return _create(visit, model, file=str(visit.good)), model


def _reloaded(load: Callable[[Any], Any], visit: Visit) -> Tensors:
    network, model = _trained(visit)
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    try:
        load(network)
    except ValueError:
        after = network.state_dict()
        assert all(torch.equal(tensor, after[key]) for key, tensor in before.items()), (
            "a refused file changed something"
        )
        raise
    return _merged(network, model)


def load_weights(visit: Visit) -> Tensors:
    return _reloaded(lambda network: network.load_weights(str(visit.path)), visit)


def load_state_dict(visit: Visit) -> Tensors:
    tensors = visit.tensors()
    return _reloaded(lambda network: network.load_state_dict(tensors, True), visit)


def merge_to(visit: Visit) -> Tensors:
    network, model = _trained(visit)
    return _merged(network, model, visit.tensors())


def by_api(visit: Visit) -> Tensors:
    model = visit.form.models()
    network = api.load(model, visit.path)
    network.merge()
    return dict(model.state_dict())


def merge_command(visit: Visit) -> Tensors:
    model, out = visit.folder / "model.safetensors", visit.folder / "merged.safetensors"
    save_file(weights_of(visit.form.model), model)
    out.unlink(missing_ok=True)
    _command(merge_script, [str(model), str(visit.path), "--out", str(out)])
    return load_file(out)


LOADER = """
def load_safetensors_with_fp8_optimization_and_hook(files, weight_hook=None):
    return {key: weight_hook(key, weight) for key, weight in WEIGHTS.items()}
def load_safetensors_with_lora_and_fp8(model_files, lora_weights_list, lora_multipliers, calc_device):
    return load_safetensors_with_fp8_optimization_and_hook(model_files, weight_hook=None)
"""


def while_loading(visit: Visit) -> Tensors:
    """As the trainers merge while they read a checkpoint."""
    model = visit.folder / "model.safetensors"
    save_file(weights_of(visit.form.model), model)
    utils = ModuleType("lora_utils")
    vars(utils)["WEIGHTS"] = load_file(model)
    exec(LOADER, vars(utils))
    key_merge.extend(utils)
    found: Tensors = utils.load_safetensors_with_lora_and_fp8(
        [str(model)], [visit.tensors()], [1.0], calc_device=torch.device("cpu")
    )
    return found


def weight_by_weight(visit: Visit) -> Tensors:
    tensors = visit.tensors()
    left, found = set(tensors), dict(weights_of(visit.form.model))
    for name, place in visit.form.places.items():
        if name.startswith("lora_unet_"):
            key = f"{place.module}.weight"
            found[key] = key_merge.merge_weights_to_tensor(found[key], name, tensors, left, 1.0, "cpu")
    return found


def _command(script: Any, arguments: list[str]) -> str:
    """What it prints; its error as a ValueError."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = script.main(arguments)
    if code:
        lines = [line for line in err.getvalue().splitlines() if "error: " in line]
        assert code == 2 and len(lines) == 1, f"status {code}: {err.getvalue()}"
        raise ValueError(err.getvalue()[err.getvalue().index("error: ") + 7 :].rstrip("\n"))
    return out.getvalue()


def show(visit: Visit) -> None:
    _command(show_script, [str(visit.path), "--layers"])


def show_json(visit: Visit) -> None:
    json.loads(_command(show_script, [str(visit.path), "--json"]))


def show_as_args(visit: Visit) -> None:
    _command(show_script, [str(visit.path), "--as_args", "--model", "flux" if visit.form.model == "flux" else "sd15"])


def resize(visit: Visit) -> None:
    """The nearest update of rank 1, whose distance is known by the singular values."""
    _command(
        resize_script,
        [str(visit.path), "--dims", "1", "--way", "nearest", "--out_dir", str(visit.folder), "--overwrite"],
    )
    smaller = load_file(visit.folder / f"{visit.path.stem}-0001.safetensors")
    if visit.broken.any:
        return
    for name in visit.form.places:
        try:
            before, after = (_change(visit, t, name) for t in (visit.broken.tensors, smaller))
        except Meaningless:  # of the model: resize knows none
            continue
        singular = torch.linalg.svdvals(before)
        distance = float((before - after).norm())
        assert math.isclose(distance, float(singular[1:].norm()), rel_tol=1e-3, abs_tol=1e-4 * float(singular[0])), name


def _change(visit: Visit, tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """dW of a layer as a matrix, without its magnitude."""
    old = {key: tensor.double() for key, tensor in weights_of(visit.form.model).items()}
    place, form = visit.form.places[name], visit.form
    own = {
        key.removeprefix(f"{name}.").replace("lora_A", "lora_down").replace("lora_B", "lora_up"): tensor
        for key, tensor in tensors.items()
        if key.startswith(f"{name}.") and not key.endswith(("dora_scale", "magnitude_vector", "dora_layer.weight"))
    }
    rows = slice(*(place.rows or (None,)))
    key = f"{place.module}.weight"
    new = layer_outcome(own, old, place, rows, form, tensors, _said(visit.broken).get(name, 1.0))
    return (new.get(key, old[key][rows]) - old[key][rows]).flatten(1)


DOORS: tuple[Callable[[Visit], Tensors | None], ...] = (
    from_file, from_tensors, load_weights, load_state_dict, merge_to, by_api, merge_command, while_loading,
    weight_by_weight, show, show_json, show_as_args, resize,
)  # fmt: skip
RELOADED = (load_weights, load_state_dict, merge_to)
SHOWN = (show, show_json, show_as_args)  # which know released models alone
WITHOUT_METADATA = (from_tensors, load_state_dict, merge_to, while_loading, weight_by_weight)


def _fast_doors(form: Form) -> list[Callable[[Visit], Tensors | None]]:
    """Those which it can come to; a trainer asks for single layers by its own names."""
    flat = all(name.startswith("lora_unet_") for name in form.places)
    return [door for door in DOORS if door not in SHOWN and (flat or door is not weight_by_weight)]


# -- the verdict


def _said(broken: Broken) -> dict[str, float]:
    """Scales that stand beside the tensors."""
    return (
        dict.fromkeys(broken.form.places, 2.5)
        if broken.form.config or "lora_adapter_metadata" in broken.metadata
        else {}
    )


@dataclass(frozen=True)
class Case:
    """What follows from a number.

    Attributes:
        shown: the share of the doors that tell what programs make of a file, which take long.
    """

    number: int
    shown: float = 0.1

    def run(self, folder: Path) -> tuple[str, str, str, str, str]:
        """(form, mutation, door, "right" or "refused" or "taken", remark).

        Raises:
            AssertionError: neither, with how to replay it.
        """
        rng = random.Random(self.number)
        name = rng.choice(sorted(FORMS))
        mutation = rng.choice(MUTATIONS)
        door = rng.choice(SHOWN if rng.random() < self.shown else _fast_doors(FORMS[name]))
        form = (REAL if door in SHOWN else FORMS)[name]
        broken = Broken(form, form.tensors(), dict(form.metadata))
        broken.key = rng.choice(sorted(broken.tensors))
        good = _written(folder / "good", form, broken.tensors, broken.metadata)
        remark = mutation(broken, rng) or broken.key[:100]
        try:
            path = _written(folder / "broken", form, broken.tensors, broken.metadata)
        except Exception as error:  # safetensors itself has no such file
            return name, mutation.__name__, door.__name__, "no file", str(error)
        title = f"case {self.number}: {name}, {mutation.__name__} ({remark}), {door.__name__}"
        visit, start = Visit(broken, path, good, folder, name), time.process_time()
        try:
            verdict = _verdict(door, visit)
            assert time.process_time() - start < SECONDS, f"it took {time.process_time() - start:.1f} s"
        except Exception as error:
            text = traceback.format_exc(limit=-4) if not isinstance(error, AssertionError) else str(error)
            raise AssertionError(
                f"{title}\n{text}\nreplay: python tests/test_fuzz_files.py --replay {self.number}"
            ) from None
        return name, mutation.__name__, door.__name__, verdict, remark


def _verdict(door: Callable[[Visit], Tensors | None], visit: Visit) -> str:
    broken = visit.broken
    try:
        found = door(visit)
    except ValueError as error:
        _check_message(str(error), visit, door)
        return "refused"
    except RuntimeError as error:  # as torch's own, behind a load
        if door is not load_state_dict or "unexpected" not in str(error):
            raise
        return "refused"
    if found is None:
        return "taken"
    alone = door in WITHOUT_METADATA
    try:
        tensors = {**(_lost(visit) if door in RELOADED else {}), **broken.tensors}
        wanted = outcome(broken.form, tensors, {} if alone else _said(broken))
    except Meaningless as why:
        assert broken.any, f"it was taken, but {why}"
        wanted = {}
    old = weights_of(broken.form.model)
    for key, tensor in found.items():
        assert bool(torch.isfinite(tensor).all()), f"{key} is not finite"
        want = wanted.get(key, old[key].double())
        error = float((tensor.double() - want).abs().max())
        assert broken.any or error <= NEAR * max(1.0, float(want.abs().max())), f"{key} is {error:.3g} off"
    return "taken" if broken.any else "right"


def _lost(visit: Visit) -> Tensors:
    """The right tensors of layers of which the file has no factor: a network keeps what it had, and says so."""
    right, left = visit.form.tensors(), {key for key in visit.broken.tensors if not key.endswith(".alpha")}
    gone = [name for name in visit.form.places if not any(key.startswith(f"{name}.") for key in left)]
    return {key: tensor for key, tensor in right.items() if key.startswith(tuple(f"{name}." for name in gone))}


def _check_message(message: str, visit: Visit, door: Callable[[Visit], Any]) -> None:
    broken = visit.broken
    if "--prefix" in message:  # it is the checkpoint whose names are not clear
        return
    assert "\n" not in message and len(message) < 3000, f"no sentence: {message[:3000]}"
    file = (
        ["the file", "the weights", "adapter file 1 of 1"] if door in WITHOUT_METADATA else [visit.path.name, "broken"]
    )
    if door is not weight_by_weight:
        assert any(word in message for word in file), f"no file: {message}"
    layers = [*broken.form.places, *(p.module for p in broken.form.places.values())]
    layers += [p.module.replace(".", "_") for p in broken.form.places.values()]
    names = [
        *layers,
        *broken.words,
        *([broken.key[:60]] if broken.key else []),
        "its keys look like",
        "_flag' is no number",
        "ranks",
        "adapter_config",
        "--prefix",
        "has no magnitudes",
        "save_format",
    ]
    names += [key.partition(".")[2] for key in broken.words + [broken.key] if key.startswith("lora_unet_")]
    # messages about places have saved names: without the prefix of diffusers, and with underscores
    names += [name.removeprefix("transformer.").replace(".", "_") for name in names if "." in name]
    assert any(word in message for word in names), f"no place: {message}"


def _written(folder: Path, form: Form, tensors: Tensors, metadata: Mapping[str, str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "broken.safetensors" if folder.name == "broken" else folder / "good.safetensors"
    path.write_bytes(save(tensors, dict(metadata)))
    if form.config:
        (folder / "adapter_config.json").write_text(json.dumps(form.config))
    return path


def _run(numbers: range, folder: Path, shown: float = 0.1) -> tuple[Counter[tuple[str, str, str]], list[str]]:
    counts, wrong = Counter[tuple[str, str, str]](), list[str]()
    for number in numbers:
        own = folder / str(number)
        try:
            _, mutation, door, verdict, _ = Case(number, shown).run(own)
            counts[mutation, door, verdict] += 1
        except AssertionError as error:
            wrong.append(str(error))
        shutil.rmtree(own, ignore_errors=True)
    return counts, wrong


# -- tests


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def test_the_right_files_are_right(tmp_path: Path) -> None:
    """By the formulas, at every door that gives weights."""
    doors = (from_file, load_weights, merge_command, while_loading)
    for i, (name, form) in enumerate(FORMS.items()):
        whole = Broken(form, form.tensors(), dict(form.metadata))
        path = _written(tmp_path / name / "broken", form, whole.tensors, whole.metadata)
        assert _verdict(doors[i % 4], Visit(whole, path, path, tmp_path, name)) == "right", name


def test_a_broken_file_is_right_or_refused_in_one_sentence(tmp_path: Path) -> None:
    _, wrong = _run(range(150), tmp_path, shown=0)
    assert not wrong, "\n\n".join(wrong)


@pytest.mark.long
def test_many_broken_files(tmp_path: Path) -> None:
    _, wrong = _run(range(1000), tmp_path)
    assert not wrong, "\n\n".join(wrong)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--replay", type=int, nargs="*")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if args.replay is not None:
            for number in args.replay:
                print(Case(number).run(Path(folder) / str(number)))
            return 0
        counts, wrong = _run(range(args.start, args.start + args.cases), Path(folder))
    for text in wrong:
        print(text, end="\n\n")
    for column in (0, 1):
        kinds = sorted({key[column] for key in counts})
        for kind in kinds:
            told = Counter[str]()
            for key, count in counts.items():
                if key[column] == kind:
                    told[key[2]] += count
            print(f"{kind:20} " + ", ".join(f"{n} {verdict}" for verdict, n in sorted(told.items())))
    total = Counter[str]()
    for key, count in counts.items():
        total[key[2]] += count
    print(f"{args.cases} cases: {dict(total)}, {len(wrong)} wrong")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
