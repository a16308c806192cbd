"""What a merge takes: memory near the largest weight, every tensor read and written once, nothing kept afterwards."""

from __future__ import annotations

import gc
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from bench.counting import Watch
from helpers_numeric import randomise
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from networks.algos import ALGOS, loha, multiplicative
from networks.cli import merge as script
from networks.files.checkpoint import Checkpoint
from networks.hosts import key_merge
from networks.layers.adapted import AdaptedLayer
from networks.tensors import blocks, forms
from networks.tensors.geometry import Geometry
from networks.tools.merge import merge_checkpoint

O, I, R = 512, 384, 4
LARGEST = O * I * 4  # bytes of a weight in fp32
HEAD = "double_blocks.{}.img_attn.proj"
NAME = "lora_unet_double_blocks_{}_img_attn_proj"


class Peak(TorchDispatchMode):
    """The most bytes that large tensors had together, of those which operations made in here."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.live = {at: pair for at, pair in self.live.items() if not pair[0].expired()}
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                if storage.nbytes() > LARGEST // 16:
                    self.live[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        self.most = max(self.most, sum(size for _, size in self.live.values()))
        return made


def adapter(kind: str, count: int) -> dict[str, Tensor]:
    """The file of an algorithm, for so many layers."""
    pair: Callable[[], dict[str, Tensor]] = lambda: {  # noqa: E731
        "lora_down.weight": torch.randn(R, I), "lora_up.weight": torch.randn(O, R) * 0.1, "alpha": torch.tensor(2.0),
    }  # fmt: skip
    makers: dict[str, Callable[[], dict[str, Tensor]]] = {
        "lora": pair,
        "dora": lambda: {**pair(), "dora_scale": torch.rand(O, 1) + 1},
        "loha": lambda: {
            "hada_w1_a": torch.randn(O, R), "hada_w1_b": torch.randn(R, I), "hada_w2_a": torch.randn(O, R) * 0.1,
            "hada_w2_b": torch.randn(R, I), "alpha": torch.tensor(2.0),
        },
        "lokr": lambda: {"lokr_w1": torch.randn(8, 8), "lokr_w2": torch.randn(O // 8, I // 8) * 0.1},
        "oft": lambda: {"oft_blocks": torch.randn(O // 16, 16, 16) * 0.1},
    }  # fmt: skip
    return {f"{NAME.format(i)}.{key}": t for i in range(count) for key, t in makers[kind]().items()}


def weights(form: str, count: int) -> dict[str, Tensor]:
    """A checkpoint of so many equal layers."""
    made: dict[str, Tensor] = {}
    for i in range(count):
        key, W = HEAD.format(i), torch.randn(O, I)
        if form == "scaled":
            scale = W.abs().amax() / 448
            made[f"{key}.weight"] = (W / scale).to(torch.float8_e4m3fn)
            made[f"{key}.scale_weight"] = scale.reshape(1)
        else:
            made[f"{key}.weight"] = W.to(getattr(torch, form))
    return made


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Large weights are worked on in slices: here, those of this size."""
    torch.manual_seed(0)
    for module, name in ((loha, "CHUNK"), (multiplicative, "SLICE"), (forms, "SLICE"), (blocks, "SLICE")):
        monkeypatch.setattr(module, name, O * I // 16)
    return tmp_path


@pytest.mark.parametrize("form", ["bfloat16", "float32", "float8_e5m2", "scaled"])
def test_memory_of_every_algorithm_stays_below_three_times_the_largest_weight(form: str, folder: Path) -> None:
    save_file(weights(form, 3), folder / "m.safetensors")
    for kind, multiplier in (("lora", 1.0), ("dora", 1.0), ("dora", 0.7), ("loha", 1.0), ("lokr", 1.0), ("oft", 0.7)):
        save_file(adapter(kind, 3), folder / "a.safetensors")
        with Peak() as peak:
            merge_checkpoint(folder / "m.safetensors", {folder / "a.safetensors": multiplier}, folder / "o.safetensors",
                             overwrite=True)  # fmt: skip
        limit = 2.6 if kind == "dora" and multiplier != 1 else 1.7  # W, its stored form, and slices; there W' beside W
        assert LARGEST <= peak.most <= limit * LARGEST, f"{kind} at {multiplier}: {peak.most / LARGEST:.2f}"


def test_several_files_are_the_sequence_of_single_merges_in_one_pass(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fp64, where no rounding in between counts; every tensor is read once, and written once."""
    model = weights("float64", 2) | {"img_in.weight": torch.randn(4, 4)}
    save_file(model, folder / "m.safetensors")
    files = {}
    for kind, multiplier in (("lora", 0.5), ("dora", 1.0), ("loha", -0.3), ("oft", 0.7)):
        save_file({key: t.double() for key, t in adapter(kind, 2).items()}, folder / f"{kind}.safetensors")
        files[folder / f"{kind}.safetensors"] = multiplier
    read, written = Counter[str](), Counter[str]()
    tensor = Checkpoint.tensor
    monkeypatch.setattr(Checkpoint, "tensor", lambda self, key: read.update([key]) or tensor(self, key))

    @contextmanager
    def watched(total: int) -> Iterator[Callable[[str, int], None]]:
        yield lambda key, size: written.update([key])

    merge_checkpoint(folder / "m.safetensors", files, folder / "together.safetensors", progress=watched)
    assert written == dict.fromkeys(model, 1) and read == dict.fromkeys(model.keys() - {"img_in.weight"}, 1)
    last = folder / "m.safetensors"
    for number, (file, multiplier) in enumerate(files.items()):
        merge_checkpoint(last, {file: multiplier}, folder / f"{number}.safetensors")
        last = folder / f"{number}.safetensors"
    told = [
        Checkpoint(file).headers[file].metadata["networks_merged"] for file in (folder / "together.safetensors", last)
    ]
    assert told[0] == told[1] and len(json.loads(told[0])) == len(files)
    together, apart = load_file(folder / "together.safetensors"), load_file(last)
    for key, value in apart.items():
        assert float((together[key] - value).norm()) <= 1e-14 * float(value.norm()), key


def test_files_are_opened_once_however_many_tensors_there_are(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({f"x.{i}.weight": torch.zeros(2, 2) for i in range(50)}, folder / "m.safetensors")
    checkpoint, opened = Checkpoint(folder / "m.safetensors"), list[Path]()
    real = Path.open
    monkeypatch.setattr(Path, "open", lambda self, *args, **kw: opened.append(self) or real(self, *args, **kw))
    for key in checkpoint.shapes:
        checkpoint.tensor(key)
    assert opened == [folder / "m.safetensors"]


@pytest.mark.parametrize("kind", ["lora", "dora", "lokr"])
def test_a_trainers_merge_keeps_nothing_but_its_result(kind: str, folder: Path) -> None:
    """Without the cyclic collector, which may come late."""
    file, model = adapter(kind, 4), weights("bfloat16", 4)
    keys = set(file)
    gc.collect()
    gc.disable()
    try:
        for i in range(4):
            weight = model[f"{HEAD.format(i)}.weight"]
            with Peak() as peak:
                new = key_merge.merge_weights_to_tensor(weight, NAME.format(i), file, keys, 1.0, torch.device("cpu"))
            assert not torch.equal(new, weight) and peak.most <= 1.6 * LARGEST
            del new
            left = [size for reference, size in peak.live.values() if not reference.expired()]
            assert not left, f"{sum(left)} bytes are kept after {NAME.format(i)}"
    finally:
        gc.enable()
    assert not keys


def test_a_trainers_merge_looks_through_a_file_once(folder: Path) -> None:
    """Not with every weight; another file in the same place is another file."""

    class Watched(dict[str, Tensor]):
        walks = 0

        def __iter__(self) -> Iterator[str]:
            self.walks += 1
            return super().__iter__()

    file, keys = Watched(adapter("lora", 4)), set(adapter("lora", 4))
    weight = torch.randn(O, I)
    for i in range(4):
        key_merge.merge_weights_to_tensor(weight, NAME.format(i), file, keys, 1.0, "cpu")
    assert file.walks <= 1 and not keys
    other = adapter("lokr", 4)
    file.clear()
    file.update({key: other[key] for key in sorted(other)} | {"flag": torch.tensor(1.0)})
    keys = set(file)
    assert not torch.equal(key_merge.merge_weights_to_tensor(weight, NAME.format(0), file, keys, 1.0, "cpu"), weight)


def test_a_dry_run_tells_all_and_writes_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file(weights("bfloat16", 2), folder / "m.safetensors")
    good = adapter("lora", 2)
    save_file(good, folder / "a.safetensors")
    before = sorted(folder.iterdir())
    command = [str(folder / "m.safetensors"), str(folder / "a.safetensors"), "--out", str(folder / "o.safetensors")]
    assert script.main([*command, "--dry_run", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["out"] is None and told["dry_run"] and len(told["layers"]) == 2
    assert (told["weights_changed"], told["weights"], told["bytes"]) == (2, 2, 2 * O * I * 2)
    first = NAME.format(0)
    bad = {
        "do not fit": {**good, f"{first}.lora_up.weight": torch.randn(O + 1, R)},
        "NaN": {**good, f"{first}.lora_up.weight": torch.full((O, R), float("nan"))},
        "none of its": {key.replace("double", "triple"): t for key, t in good.items()},
    }
    for words, tensors in bad.items():
        save_file(tensors, folder / "a.safetensors")
        said = []
        for more in (["--dry_run"], []):
            assert script.main([*command, *more]) == 2
            said.append(capsys.readouterr().err)
        assert words in said[0] and said[0] == said[1]
    assert sorted(folder.iterdir()) == before
    assert script.main([*command[:2], "--out", str(folder / "m.safetensors"), "--dry_run"]) == 2


def floors(O: int, I: int) -> dict[str, tuple[str, int, str, Callable[[Tensor], object]]]:
    """Case -> algorithm, dim, side of DoRA, and the fewest operations with its change on a weight [O, I]."""
    a, b, c, d = torch.randn(O, R), torch.randn(R, I), torch.randn(O, R), torch.randn(R, I)
    w1, w2 = torch.randn(8, 1, 8, 1), torch.randn(O // 8, 1, I // 8)
    row, blocks = torch.randn(O, 1), torch.randn(O // 8, 8, 8)

    def dora(W: Tensor, axis: int) -> Tensor:
        wide = W.float().addmm_(a, b, alpha=0.5)
        return W.copy_(wide.mul_(torch.linalg.vector_norm(wide, dim=axis, keepdim=True)))

    def low_rank(W: Tensor) -> Tensor:
        return W.copy_(W.float().addmm_(a, b, alpha=0.5))

    def hadamard(W: Tensor) -> Tensor:
        return W.copy_(W.float().addcmul_(a @ b, c @ d, value=0.5))

    def kronecker(W: Tensor) -> Tensor:
        return W.copy_(W.float().view(8, O // 8, 8, I // 8).addcmul_(w1, w2, value=0.5).view(O, I))

    def rotation(W: Tensor) -> Tensor:
        wide = W.float().view(-1, 8, I)
        return W.copy_(wide.add_(blocks @ wide).view(O, I))

    same = {algo: (algo, R, "", low_rank) for algo in ("lora", "lora_fa", "dylora", "tlora", "glora")}
    return same | {
        "loha": ("loha", R, "", hadamard),
        "lokr": ("lokr", R, "", kronecker),
        "diag-oft": ("diag-oft", 8, "", rotation),
        "ia3": ("ia3", 1, "", lambda W: W.copy_(W.float().mul_(row))),
        "full": ("full", 1, "", lambda W: W.copy_(W.float().add_(torch.ones(O, I)))),
        "DoRA": ("lora", R, "output", lambda W: dora(W, 1)),
        "DoRA input": ("lora", R, "input", lambda W: dora(W, 0)),
    }


@torch.no_grad()
def test_a_merge_in_memory_is_little_more_than_cast_change_sum_and_rounding() -> None:
    """Beside them, one look for values that are not finite."""
    more = {"glora": 1.45, "ia3": 1.85}  # a product with W besides; the change apart from W
    for case, (algo, dim, side, floor) in floors(O, I).items():
        base = nn.Linear(I, O, bias=False, dtype=torch.bfloat16).requires_grad_(False)
        layer = AdaptedLayer("layer", base, ALGOS[algo](Geometry.of(base), dim), 0.5, dora=side)
        randomise(layer)
        layer.attach()
        weight = base.weight.clone()
        with Watch() as least:
            floor(weight)
        with Watch() as ours:
            layer.merge()
        counted = [sum(launch.traffic for launch in watch.launches) for watch in (ours, least)]
        assert counted[0] <= more.get(case, 1.25) * counted[1], f"{case}: traffic {counted[0] / counted[1]:.2f}"
        assert len(ours.launches) <= 16, f"{case}: {[launch.name for launch in ours.launches]}"


@torch.no_grad()
@pytest.mark.parametrize("on_input", [False, True])
def test_rotations_are_computed_once_for_all_slices_of_a_weight(
    on_input: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = nn.Linear(I, O, bias=False).requires_grad_(False)
    adapter = ALGOS["diag-oft"](Geometry.of(base), 8, {"train_on_input": on_input})
    layer = AdaptedLayer("layer", base, adapter, 1.0)
    randomise(layer)
    expected = base.weight + adapter.weight_change(base.weight, 1.0)
    layer.attach()
    monkeypatch.setattr(multiplicative, "SLICE", O * I // 8)
    with Watch() as watch:
        layer.merge()
    names = [launch.name.partition(".")[0] for launch in watch.launches]
    assert names.count("add_") == 8, names
    assert names.count("eye") == 1, names  # the 1 of a Cayley transform, or of the series for it
    torch.testing.assert_close(base.weight, expected)
