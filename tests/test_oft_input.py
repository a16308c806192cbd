"""Rotations of the input side (OFT v2): the files of every program turn a layer as that program turns it, in float64.

Expected weights come from formulas written out here, and from PEFT itself.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_numeric import assert_close
from peft import OFTConfig, get_peft_model
from safetensors.torch import save_file
from tiny_parts import draw, randomise, sd_unet
from torch import Tensor, nn

import networks.lora
from networks.algos import ALGOS
from networks.archs import ARCHS
from networks.files import codec, explain, reader
from networks.files.adapter_file import Naming, open_adapter
from networks.files.merge import MergeInput, merged_weight
from networks.layers.adapted import AdaptedLayer
from networks.layers.max_norm import limit_norms, update_norm
from networks.layers.runtime import Runtime
from networks.tensors.geometry import Geometry

SD = next(arch for arch in ARCHS if arch.name == "sd")
B, NAME = 4, "lora_unet_x"
KINDS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(12, 30), (2, 5, 12)),
    "conv_1x1": (lambda: nn.Conv2d(12, 30, 1), (2, 12, 3, 4)),
    "conv_3x3": (lambda: nn.Conv2d(12, 30, 3, padding=1, stride=2), (2, 12, 4, 5)),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def base_of(kind: str) -> nn.Module:
    return KINDS[kind][0]().double().requires_grad_(False)


def drawn(count: int, size: int = B) -> Tensor:
    """Triangles of a file; not small, so that the series differs from the whole transform."""
    return torch.randn(count, size * (size - 1) // 2, dtype=torch.float64) * 0.2


# -- the formulas


def generators(triangles: Tensor, size: int = B) -> list[Tensor]:
    """Q of every block: the values above its diagonal row by row, and what makes it skew-symmetric."""
    found = []
    for values in triangles.tolist():
        Q, rest = torch.zeros(size, size, dtype=torch.float64), iter(values)
        for row in range(size):
            for column in range(row + 1, size):
                Q[row, column] = next(rest)
                Q[column, row] = -Q[row, column]
        found.append(Q)
    return found


def one(Q: Tensor) -> Tensor:
    return torch.eye(len(Q), dtype=Q.dtype)


def series(Q: Tensor) -> Tensor:
    return one(Q) + 2 * Q + 2 * Q @ Q + 2 * Q @ Q @ Q + Q @ Q @ Q @ Q


def cayley(Q: Tensor) -> Tensor:
    return (one(Q) + Q) @ torch.linalg.inv(one(Q) - Q)


def sd_scripts(W: Tensor, Qs: list[Tensor]) -> Tensor:
    """networks.oft_v2 of sd-scripts, OneTrainer: a Linear gets x R, the weight of a convolution W R, over all of its
    columns; one block stands for all."""
    columns = W.flatten(1)
    R = torch.block_diag(*(series(Q) for Q in Qs * (columns.shape[1] // (len(Qs) * len(Qs[0])))))
    return (columns @ (R.T if W.dim() == 2 else R)).reshape(W.shape)


def ours_before(W: Tensor, Qs: list[Tensor]) -> Tensor:
    """The whole transform from the right, over the channels, alike at every position of a kernel."""
    return torch.einsum("oj...,ji->oi...", W, torch.block_diag(*map(cayley, Qs)))


def coft(Qs: list[Tensor], eps: float) -> list[Tensor]:
    return [Q * min(1.0, eps / math.sqrt(len(Qs)) / float(Q.norm())) for Q in Qs]


def limited(Qs: list[Tensor], limit: float) -> list[Tensor]:
    norm = math.sqrt(sum(float(Q.norm()) ** 2 for Q in Qs))
    return [Q * min(1.0, limit / norm) for Q in Qs]


def written_by(program: str, kind: str) -> tuple[dict[str, Tensor], Callable[[Tensor], Tensor]]:
    """Tensors of a layer in a file of a program, by suffix, and what that program makes of a weight."""
    channels = 12 // B
    v = drawn(channels * (9 if kind == "conv_3x3" else 1))
    if program == "sd-scripts":
        return {"oft_R.weight": v}, lambda W: sd_scripts(W, generators(v))
    if program == "shared":
        return {"oft_R.weight": v[:1]}, lambda W: sd_scripts(W, generators(v[:1]))
    if program == "OneTrainer scaled":
        mark = torch.tensor(True)
        return {"oft_R.weight": v, "oft_R.scaled_oft": mark}, lambda W: sd_scripts(
            W, [Q / (2 * math.sqrt(B - 1)) for Q in generators(v)]
        )
    if program.startswith("LTX-2 fork"):
        scaled, eps = "scaled" in program, 0.9
        tensors = {
            "oft_R.weight": v, "alpha": torch.tensor(float(B)), "oft_block_size_metadata": torch.tensor(float(B)),
            "oft_block_share_metadata": torch.tensor(0.0), "oft_coft_metadata": torch.tensor(1.0),
            "coft_eps_metadata": torch.tensor(eps, dtype=torch.float64),
            "scaled_oft_metadata": torch.tensor(float(scaled)),
        }  # fmt: skip
        tensors |= {"oft_R.scaled_oft": torch.tensor(1.0)} if scaled else {}
        factor = 2 * math.sqrt(B - 1) if scaled else 1
        return tensors, lambda W: sd_scripts(W, [Q / factor for Q in coft(generators(v), eps)])
    v = drawn(channels)
    if program == "ours before":
        return {"oft_R.weight": v, "alpha": torch.tensor(0.0)}, lambda W: ours_before(W, generators(v))
    assert program == "ours before, constrained"
    constraint = 2**-5
    return {"oft_R.weight": v, "alpha": torch.tensor(constraint)}, lambda W: ours_before(
        W, limited(generators(v), constraint * W.shape[1])
    )


PROGRAMS = [
    "sd-scripts", "shared", "OneTrainer scaled", "LTX-2 fork", "LTX-2 fork scaled", "ours before",
    "ours before, constrained",
]  # fmt: skip


def decoded(tensors: dict[str, Tensor]) -> codec.SavedLayer:
    layers, unknown = codec.decode({f"{NAME}.{suffix}": t for suffix, t in tensors.items()})
    assert not unknown
    return layers[NAME]


def live_layer(saved: codec.SavedLayer, base: nn.Module, multiplier: float = 0.7) -> AdaptedLayer:
    layer = AdaptedLayer(NAME, base, saved.build(Geometry.of(base)), 1.0, runtime=Runtime(multiplier))
    layer.set_alpha(saved.alpha)
    return layer


@every_kind
@pytest.mark.parametrize("program", PROGRAMS)
def test_a_file_turns_as_its_program_turns_it(program: str, kind: str) -> None:
    """Merged from the file alone, applied, trained on, saved again, and under a limit of its norm."""
    tensors, program_turns = written_by(program, kind)
    base = base_of(kind)
    W, x = base.weight.clone(), torch.randn(*KINDS[kind][1], dtype=torch.float64)
    saved = decoded(tensors)
    change = 0.7 * (program_turns(W) - W)
    assert_close(merged_weight(saved, W, 0.7) - W, change, "from the file alone")
    layer = live_layer(saved, base)
    assert_close(layer.new_weight(W).detach() - W, change, "new_weight")
    plain = base(x)
    layer.attach()
    y = base(x)
    y.square().sum().backward()
    layer.detach()
    base.weight.copy_(W + change)
    assert_close((y - plain).detach(), base(x) - plain, "applied")
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in layer.parameters())
    again = codec.decode(codec.encode([layer]))[0][NAME]
    assert_close(merged_weight(again, W, 0.7) - W, change, "saved again")
    before = float(update_norm(live_layer(saved, base_of(kind))))
    limit_norms([layer], before / 2)
    assert float(update_norm(layer)) <= before / 2 * (1 + 1e-5)


@every_kind
def test_what_others_wrote_is_saved_as_they_wrote_it(kind: str) -> None:
    for program in ("sd-scripts", "shared"):
        tensors, _ = written_by(program, kind)
        again = codec.encode([live_layer(decoded(tensors), base_of(kind))])
        assert again.keys() == {f"{NAME}.oft_R.weight"}
        assert torch.equal(again[f"{NAME}.oft_R.weight"], tensors["oft_R.weight"])


# -- what this package trains


def trained(kind: str, size: int = 2, **options: Any) -> AdaptedLayer:
    base = base_of(kind)
    adapter = ALGOS["diag-oft"](Geometry.of(base), size, {"train_on_input": True, "size": size, **options}).double()
    nn.init.normal_(adapter.blocks, std=0.2)
    return AdaptedLayer(NAME, base, adapter, 1.0, runtime=Runtime(0.7))


@every_kind
@pytest.mark.parametrize("constraint", [0.0, 2**-6])
def test_sd_scripts_reads_what_we_train(kind: str, constraint: float) -> None:
    """Its module takes `oft_R.weight` alone, with the blocks' size from its shape; with a constraint there is more
    beside it, which tells our own reader of it."""
    layer = trained(kind, constraint=constraint)
    W = layer.base.weight.clone()
    file = {key.removeprefix(f"{NAME}."): t for key, t in codec.encode([layer]).items()}
    assert file.keys() == {"oft_R.weight", *(("oft_R.terms", "alpha") if constraint else ())}
    size = 2 * (9 if kind == "conv_3x3" else 1)
    v = file["oft_R.weight"]
    assert v.shape == (6, size * (size - 1) // 2)
    assert_close(sd_scripts(W, generators(v, size)), layer.new_weight(W, 1.0).detach(), "theirs")
    if constraint:
        norm = math.sqrt(sum(float(Q.norm()) ** 2 for Q in generators(v, size)))
        positions = 9 if kind == "conv_3x3" else 1
        assert norm == pytest.approx(math.sqrt(positions) * constraint * 12), "the constraint acts"
    again = live_layer(decoded(file), base_of(kind))
    assert again.adapter.blocks.shape == layer.adapter.blocks.shape, "as it was trained, by channels"
    assert again.alpha == constraint
    assert_close(again.new_weight(W).detach(), layer.new_weight(W).detach(), "ours")


def test_a_kernel_whose_blocks_would_be_larger_than_the_weight_has_a_form_of_its_own() -> None:
    """12 channels in one block are 108 columns: 5,778 values for a weight of 3,240."""
    layer = trained("conv_3x3", size=12)
    W = layer.base.weight.clone()
    file = codec.encode([layer])
    assert {key.removeprefix(f"{NAME}."): tuple(t.shape) for key, t in file.items()} == {
        "oft_R.turn": (1, 66), "oft_R.terms": ()
    }  # fmt: skip
    saved = codec.decode(file)[0][NAME]
    Q = generators(file[f"{NAME}.oft_R.turn"], 12)[0]
    wanted = torch.einsum("ojkl,ji->oikl", W, series(Q))
    assert_close(merged_weight(saved, W), wanted, "from the file alone")
    assert_close(layer.new_weight(W, 1.0).detach(), wanted, "live")


@pytest.mark.parametrize("outputs", [8, 400])  # a weight smaller, and larger, than a block of columns in the file
@pytest.mark.parametrize("terms", [5, 0])
@pytest.mark.parametrize("size", [4, 6, 12])
@pytest.mark.parametrize(("kernel", "columns"), [(1, False), (3, False), (3, True)])
def test_one_block_for_all_goes_through_a_file(kernel: int, columns: bool, size: int, terms: int, outputs: int) -> None:
    """Also where the file must hold it as many times as it acts: of 12 channels, or of 12 times 9 columns."""
    base = nn.Conv2d(12, outputs, kernel).double().requires_grad_(False)
    W = base.weight.clone()
    options = {"train_on_input": True, "block_share": True, "size": size, "terms": terms, "columns": columns}
    trained, other = (ALGOS["diag-oft"](Geometry.of(base), size, options).double() for _ in range(2))
    nn.init.normal_(trained.blocks, std=0.2)
    (B,) = trained.blocks.detach()
    R = (series if terms else cayley)(B - B.T)
    by_block = (W.flatten(1) if columns else W.transpose(1, 3)).unflatten(-1, (-1, size)) @ R
    wanted = by_block.reshape(W.shape) if columns else by_block.flatten(-2).transpose(1, 3)
    file = decoded(trained.pack())
    assert_close(trained.weight_change(W).detach(), wanted - W, "live")
    assert_close(merged_weight(file, W), wanted, "from the file alone")
    other.check_fits(file.tensors)
    other.unpack_(file.tensors)
    assert_close(other.weight_change(W).detach(), wanted - W, "in a network of such blocks")


def test_groups_of_a_convolution_turn_alike() -> None:
    """Each group has its own 6 channels, and the weight has them once."""
    base = nn.Conv2d(12, 30, 3, groups=2).double().requires_grad_(False)
    adapter = ALGOS["diag-oft"](Geometry.of(base), 2, {"train_on_input": True}).double()
    nn.init.normal_(adapter.blocks, std=0.2)
    layer, x = AdaptedLayer(NAME, base, adapter, 1.0), torch.randn(2, 12, 4, 5, dtype=torch.float64)
    W, plain = base.weight.clone(), base(x)
    v = codec.encode([layer])[f"{NAME}.oft_R.weight"]
    wanted = sd_scripts(W, generators(v, 18))
    layer.attach()
    y = base(x).detach()
    layer.detach()
    base.weight.copy_(wanted)
    assert_close(y - plain, base(x) - plain, "applied")


# -- PEFT itself

TARGETS = [
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", "down_blocks.0.attentions.0.proj_in",
    "down_blocks.0.resnets.0.conv1",
]  # fmt: skip
SETTINGS: list[dict[str, Any]] = [
    {},
    {"use_cayley_neumann": False},
    {"num_cayley_neumann_terms": 1},
    {"num_cayley_neumann_terms": 2},
    {"num_cayley_neumann_terms": 3},
    {"num_cayley_neumann_terms": 4},
    {"num_cayley_neumann_terms": 7},
    {"block_share": True},
    {"block_share": True, "use_cayley_neumann": False, "oft_block_size": 16},
    {"coft": True, "eps": 0.375},  # PEFT divides it in fp32, by 2 and 6 for 4 and 36 blocks
]


def peft_folder(folder: Path, **settings: Any) -> dict[str, Tensor]:
    """What PEFT saves, and the weights it makes: name -> W'."""
    unet = sd_unet().double()
    config = OFTConfig(**{"r": 0, "oft_block_size": 4, "target_modules": TARGETS, **settings})
    model = get_peft_model(unet, config).double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "oft_R" in name:
                p.normal_(std=0.2)
    model.save_pretrained(str(folder))
    merged = model.merge_and_unload()
    return {name: merged.get_submodule(name).weight.detach() for name in TARGETS}


def layers_of(file: Path) -> dict[str, codec.SavedLayer]:
    return dict(open_adapter(file, Naming(SD)).all_read().layers)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_peft_turns_alike(settings: dict[str, Any], tmp_path: Path) -> None:
    """Linear, 1x1 and 3x3, as merge_and_unload makes them. PEFT's own forward of a 3x3 convolution is another matter:
    it adds up overlapping patches, so that not even its start is the base."""
    wanted = peft_folder(tmp_path, **settings)
    layers, unet = layers_of(tmp_path / "adapter_model.safetensors"), sd_unet().double().requires_grad_(False)
    assert len(layers) == len(TARGETS)
    for name in TARGETS:
        W = unet.get_submodule(name).weight.clone()
        saved = layers[f"lora_unet_{name}".replace(".", "_")]
        if settings.get("num_cayley_neumann_terms") == 1:
            assert torch.equal(merged_weight(saved, W), W) and torch.equal(wanted[name], W)
            continue
        assert_close(merged_weight(saved, W) - W, wanted[name] - W, name)
        layer = live_layer(saved, unet.get_submodule(name))
        assert_close(layer.new_weight(W).detach() - W, 0.7 * (wanted[name] - W), name)
        again = codec.decode(codec.encode([layer]))[0][NAME]
        assert_close(merged_weight(again, W) - W, wanted[name] - W, f"{name}, saved again")


def test_without_its_config_a_file_of_peft_is_read_by_its_defaults(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = peft_folder(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    file = tmp_path / "adapter_model.safetensors"
    unet = sd_unet()
    with caplog.at_level(logging.INFO):
        network, tensors = networks.lora.create_network_from_weights(1.0, str(file), None, None, unet)
    said = [record.message for record in caplog.records if "as PEFT writes them by default" in record.message]
    assert len(said) == 1 and "(3 layers)" in said[0]
    network.merge_to(None, unet, tensors, torch.float32, "cpu")
    for name in TARGETS:
        assert_close(unet.get_submodule(name).weight.detach().double(), wanted[name], name, 1e-6)


def test_a_broken_config_of_peft_is_an_error(tmp_path: Path) -> None:
    peft_folder(tmp_path)
    config = tmp_path / "adapter_config.json"
    settings = json.loads(config.read_text())
    for text in ("{", json.dumps({**settings, "num_cayley_neumann_terms": "many"}), "[]"):
        config.write_text(text)
        with pytest.raises(ValueError, match="adapter_config.json (cannot be read|holds no settings)"):
            layers_of(tmp_path / "adapter_model.safetensors")


# -- names


@pytest.mark.parametrize(
    ("prefix", "suffix"),
    [("lora_unet_", "oft_R.weight")]
    + [
        (p, s) for p in ("unet.", "transformer.", "base_model.model.") for s in ("oft_R.weight", "oft_R.default.weight")
    ],
)
def test_names_of_the_programs(prefix: str, suffix: str) -> None:
    """A convolution tells PEFT's files from the others'; the name of an adapter inside a key is PEFT's, too."""
    unet, tensors = sd_unet(), {}
    peft = prefix == "base_model.model." or "default" in suffix
    for name in TARGETS[:2]:
        own = name.replace(".", "_") if prefix == "lora_unet_" else name
        tensors[f"{prefix}{own}.{suffix}"] = drawn(unet.get_submodule(name).weight.shape[1] // B).float()
    network, _ = networks.lora.create_network_from_weights(1.0, None, None, None, unet, weights_sd=tensors)
    assert {row.dotted_name for row, _ in network.layers} == set(TARGETS[:2])
    for (_, layer), v in zip(network.layers, sorted_by(network, tensors), strict=True):
        W, R = layer.base.weight.detach(), torch.block_diag(*map(series, generators(v))).float()
        transposed = peft or W.dim() == 2
        wanted = (W.flatten(1) @ (R.T if transposed else R)).reshape(W.shape)
        assert_close(layer.new_weight(W).detach(), wanted, layer.lora_name, 1e-6)


def sorted_by(network: Any, tensors: dict[str, Tensor]) -> list[Tensor]:
    """The tensor of each of the network's layers."""
    names = [row.dotted_name for row, _ in network.layers]
    flat = {re.sub(r"\W", "_", key): t for key, t in tensors.items()}
    return [next(t for key, t in flat.items() if name.replace(".", "_") in key) for name in names]


def test_what_was_assumed_is_said_at_every_door(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    unet = sd_unet()
    network = networks.lora.create_network(1.0, 4, 1, None, None, unet, algo="diag-oft", train_on_input="True")
    file = tmp_path / "a.safetensors"
    network.save_weights(str(file), None, {})
    tensors, metadata = reader.read_tensors(file)
    with caplog.at_level(logging.INFO):
        networks.lora.create_arch_network_from_weights(1.0, tensors, unet=unet)
    said = [r.message for r in caplog.records if "as sd-scripts' networks.oft_v2 and OneTrainer write" in r.message]
    assert len(said) == 1 and f"({len(tensors)} layers)" in said[0]
    assert MergeInput.open(file, 1.0).assumed == [said[0].partition(": ")[2]]
    before = {**tensors, **{key.replace("oft_R.weight", "alpha"): torch.tensor(0.0) for key in tensors}}
    save_file(before, tmp_path / "before.safetensors", {**metadata, "networks_version": "0.1.0"})
    assert "earlier versions of this package" in MergeInput.open(tmp_path / "before.safetensors", 1.0).assumed[0]
    assert explain.explain(file)["layers"][0]["kind"] == "rotation of the input"


# -- what does not fit


def test_what_does_not_fit() -> None:
    layer = trained("conv_3x3", size=B)
    columns, _ = written_by("sd-scripts", "conv_3x3")
    for tensors, message in (
        (columns, "the file turns the columns of a convolution with a kernel, this network its channels"),
        ({"oft_R.weight": drawn(4)}, r"oft_R \(4, 6\) does not fit a weight of \(30, 12, 3, 3\)"),
        ({"oft_R.weight": torch.zeros(3, 5)}, r"oft_R \(3, 5\) holds no triangles of blocks"),
        (
            {"oft_R.weight": drawn(6, 2), "alpha": torch.tensor(0.0)},
            "blocks of 2 features, this network has blocks of 4",
        ),
        ({"oft_blocks": torch.zeros(15, 2, 2)}, "train_on_input=False, this network has the other"),
    ):
        saved = decoded(tensors)
        with pytest.raises(ValueError, match=message):
            layer.adapter.check_fits(saved.tensors)
    shared, one_block = written_by("shared", "linear")[0], trained("linear", size=B)
    with pytest.raises(ValueError, match="the file has 1 blocks, this network has 3"):
        one_block.adapter.check_fits(decoded(shared).tensors)


@pytest.mark.parametrize("rotation", [{"oft_R.weight": drawn(3)}, {"oft_blocks": torch.zeros(15, 2, 2)}])
def test_dora_over_a_rotation_is_refused_at_every_door(rotation: dict[str, Tensor]) -> None:
    """Some forks have it; without the magnitudes the rest is another update."""
    saved = decoded({**rotation, "dora_scale": torch.rand(30, 1)})
    with pytest.raises(ValueError, match="DoRA magnitudes of a layer of diag-oft"):
        merged_weight(saved, torch.randn(30, 12))
    tensors = {f"{NAME}.{suffix}": t for suffix, t in {**rotation, "initial_norm": torch.rand(30)}.items()}
    assert codec.decode(tensors) == ({}, [f"{NAME}.initial_norm"])


# -- live states


def network_of(**options: str) -> tuple[Any, nn.Module]:
    unet = sd_unet()
    network = networks.lora.create_network(1.0, 4, 1, None, None, unet, algo="diag-oft", conv_dim="2", **options)
    network.apply_to(None, unet, False, True)
    randomise(network)
    return network, unet


@pytest.mark.parametrize("walk", ["ours", "torch's own"])
def test_a_live_state_of_an_earlier_version_goes_on_exactly(walk: str, caplog: pytest.LogCaptureFixture) -> None:
    """It had the same blocks and no number of terms: the whole transform, from the right."""
    network, unet = network_of(train_on_input="True")
    now = network.state_dict()
    assert {int(t) for key, t in now.items() if key.endswith(".terms")} == {5}
    older = {key: t.clone() for key, t in now.items() if not key.endswith(".terms")}
    assert {key.partition(".")[2] for key in older} == {"live_scale", "adapter.blocks"}
    for _ in range(2):  # a state that was saved since then says it itself
        other, _ = network_of(train_on_input="True")
        if walk == "ours":
            with caplog.at_level(logging.INFO):
                other.load_state_dict(copy.deepcopy(older))
        else:
            nn.Module.load_state_dict(other, copy.deepcopy(older))
        for layer in other.adapted_layers:
            W = layer.base.weight.detach().double()
            blocks = now[f"{layer.lora_name}.adapter.blocks"].double()
            assert_close(layer.new_weight(W).detach(), ours_before(W, list(blocks - blocks.mT)), layer.lora_name, 1e-6)
        older = other.state_dict()
        assert {int(t) for key, t in older.items() if key.endswith(".terms")} == {0}
    said = [r.message for r in caplog.records if "of an earlier version" in r.message]
    assert len(said) == (1 if walk == "ours" else 0)
    fresh, _ = network_of(train_on_input="True")
    fresh.load_state_dict(now)
    assert {int(t) for key, t in fresh.state_dict().items() if key.endswith(".terms")} == {5}


def test_a_file_of_an_earlier_version_goes_into_a_new_network(tmp_path: Path) -> None:
    """Keys by hand, the constraint as alpha, the metadata of that version; saved again, read again."""
    network, unet = network_of(train_on_input="True")
    file, wanted = {}, {}
    for layer in network.adapted_layers:
        blocks = layer.adapter.blocks.detach().double()
        rows, columns = torch.triu_indices(*blocks.shape[1:], 1)
        Q = blocks - blocks.mT
        file[f"{layer.lora_name}.oft_R.weight"] = Q[:, rows, columns].float()
        file[f"{layer.lora_name}.alpha"] = torch.tensor(2**-6)
        W = layer.base.weight.detach().double()
        wanted[layer.lora_name] = ours_before(W, limited(list(Q), 2**-6 * W.shape[1]))
    path, again = tmp_path / "before.safetensors", tmp_path / "again.safetensors"
    save_file(file, path, {"networks_version": "0.1.0", "networks_dialect": "portable"})
    network.load_weights(str(path))
    network.save_weights(str(again), None, {})
    network.detach()
    fresh, _ = networks.lora.create_network_from_weights(1.0, str(again), None, None, unet)
    for each in (network, fresh):
        for layer in each.adapted_layers:
            assert layer.alpha == 2**-6
            W = layer.base.weight.detach().double()
            assert_close(layer.new_weight(W).detach(), wanted[layer.lora_name], layer.lora_name, 1e-6)
    assert torch.isfinite(draw(unet)).all()
