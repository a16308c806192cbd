"""DyLoRA and LoRA-FA: what sets them apart from LoRA. The rest is in test_algo_matrix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_numeric import KINDS, assert_close, make_input, make_layer, randomise
from registry import dense_lora
from tiny_parts import draw, sd_unet
from tiny_parts import randomise as randomise_network
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import networks.dylora
import networks.lora
import networks.lora_fa
from networks.algos import ALGOS, make_adapter
from networks.files import codec, reader
from networks.files.merge import merged_weight
from networks.layers.adapted import AdaptedLayer
from networks.layers.draws import Draws
from networks.layers.runtime import Runtime
from networks.tensors.geometry import Geometry

DIM, BLOCK, SCALE = 8, 3, 0.75  # blocks end after 3, 6 and 8 ranks
ENDS = (3, 6, 8)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def single(kind: str, dora: str = "", algo: str = "dylora") -> AdaptedLayer:
    base = make_layer(kind)
    options = {"block_size": BLOCK} if algo == "dylora" else {}
    adapter = ALGOS[algo](Geometry.of(base), DIM, options).double()
    randomise(adapter)
    layer = AdaptedLayer("lora_unet_x", base, adapter, SCALE, runtime=Runtime(0.7), dora=dora).double()
    layer.load_magnitude(None)
    layer.attach()
    return layer


def cut(layer: AdaptedLayer, rank: int) -> dict[str, Tensor]:
    """The file's first ranks with the alpha as it is: what the trainers' script does."""
    tensors = codec.encode([layer])
    down, up = "lora_unet_x.lora_down.weight", "lora_unet_x.lora_up.weight"
    return tensors | {down: tensors[down][:rank], up: tensors[up][:, :rank]}


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_pass_is_the_file_cut_to_a_random_rank(kind: str) -> None:
    layer = single(kind)
    x, W = make_input(kind), layer.base.weight
    layer.eval()
    assert_close(layer.base(x), layer.base(x), "deterministic")
    layer.detach()
    plain = layer.base(x)
    layer.attach()
    updates = {}
    for rank in ENDS:
        saved = codec.decode(cut(layer, rank))[0]["lora_unet_x"]
        update = merged_weight(saved, W, 0.7) - W
        t = {key: tensor for key, tensor in saved.tensors.items()}
        assert_close(update, 0.7 * SCALE * DIM / rank * dense_lora(t, W.shape), f"alpha / {rank}")
        updates[rank] = layer.adapter.geometry.op(x, update)
    assert_close(layer.base(x) - plain, updates[DIM], "all ranks outside training")
    layer.train()
    seen = set()
    for _ in range(24):
        change = layer.base(x) - plain
        near = [rank for rank, update in updates.items() if float((change - update).detach().abs().max()) < 1e-9]
        assert len(near) == 1
        seen.update(near)
    assert seen == set(ENDS)
    for quiet in ("sampling", "for_inference"):
        setattr(layer.runtime, quiet, True)
        assert_close(layer.base(x) - plain, updates[DIM], quiet)
        setattr(layer.runtime, quiet, False)
    assert_close(layer.new_weight(W) - W, 0.7 * SCALE * layer.adapter.delta(), "weights hold all ranks")


@pytest.mark.parametrize("kind", ("linear", "conv_3x3"))
def test_only_the_drawn_block_learns(kind: str) -> None:
    layer = single(kind)
    blocks = set()
    for _ in range(24):
        layer.zero_grad()
        layer.base(make_input(kind)).square().sum().backward()
        down = layer.adapter.down.grad.flatten(1).abs().sum(1) > 0
        up = layer.adapter.up.grad.flatten(1).abs().sum(0) > 0
        assert torch.equal(down, up)
        blocks.add(tuple(down.nonzero().flatten().tolist()))
    assert blocks == {(0, 1, 2), (3, 4, 5), (6, 7)}


@pytest.mark.parametrize("side", ("output", "input"))
def test_dora_measures_the_cut_weight(side: str) -> None:
    layer = single("linear", side)
    x, W, m = make_input("linear"), layer.base.weight, 0.7
    layer.detach()
    plain = layer.base(x)
    layer.attach()
    expected = []
    for rank in ENDS:
        t = {key.partition(".")[2]: tensor for key, tensor in cut(layer, rank).items()}
        whole = W + SCALE * DIM / rank * dense_lora(t, W.shape)
        norms = whole.norm(dim=1 if side == "output" else 0, keepdim=True)
        expected.append(torch.nn.functional.linear(x, m * (whole * layer.magnitude / norms - W)))
    for _ in range(8):
        change = layer.base(x) - plain
        assert min(float((change - e).detach().abs().max()) for e in expected) < 1e-9


@pytest.mark.parametrize("reentrant", (True, False))
def test_recomputation_and_compilation_draw_the_same_block(reentrant: bool) -> None:
    layer = single("linear")
    found = []
    for run in (layer.base, lambda t: checkpoint(layer.base, t, use_reentrant=reentrant)):
        torch.manual_seed(5)
        leaf = make_input("linear") * 0 + 1
        y = run(leaf.requires_grad_())
        torch.rand(3)
        y.square().sum().backward()
        found.append([leaf.grad, layer.adapter.down.grad, layer.adapter.up.grad])
        layer.zero_grad()
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
    torch._dynamo.reset()
    compiled = torch.compile(layer.base, fullgraph=True, backend="eager")
    assert bool(compiled(make_input("linear")).isfinite().all())
    assert layer.adapter._step.mine.block is None
    torch._dynamo.reset()


def network_of(**arguments: str) -> tuple[Any, torch.nn.Module]:
    unet = sd_unet()
    network = networks.dylora.create_network(1.0, 6, 3, None, None, unet, unit="2", **arguments)
    network.apply_to(None, unet, False, True)
    network.prepare_optimizer_params(None, 1e-3, 1e-3)
    randomise_network(network)
    network.train()
    return network, unet


def learning(network: Any, unet: torch.nn.Module) -> list[int]:
    """The block that each layer learns in a pass."""
    network.zero_grad()
    draw(unet).square().sum().backward()
    return [int(layer.adapter.down.grad.flatten(1).any(1).nonzero()[0]) // 2 for layer in network.adapted_layers]


def block_of(adapter: Any) -> int:
    """The block of the pass that is under way: the last one whose ranks act."""
    acting = int((adapter.values()["up"] != 0).any(0).sum())
    return -(-acting // adapter.block_size) - 1


def test_processes_draw_the_same_blocks() -> None:
    """Whatever their generators are at; each pass of the trainer's loop its own, each layer its own."""
    (one, first), (other, second) = network_of(), network_of()
    seen = []
    for step in range(4):
        for network in (one, other):
            network.on_step_start()
        torch.manual_seed(step)
        found = learning(one, first)
        assert set(found) == {0, 1, 2}
        torch.manual_seed(100 + step)
        assert learning(other, second) == learning(other, second) == found
        seen.append(found)
    assert len({tuple(found) for found in seen}) == 4
    one.follow_step(seed=5, step=3)
    known = learning(one, first)
    one.follow_step(seed=5, step=4)
    assert learning(one, first) != known
    other.follow_step(seed=5, step=3)
    assert learning(other, second) == known
    other.follow_step(seed=6, step=3)
    assert learning(other, second) != known


def test_every_block_has_its_share_of_the_steps() -> None:
    """Chi-squared with two degrees of freedom: above 25 once in 270,000 draws. Nor do two layers go together."""
    network, _ = network_of()
    adapters = [layer.adapter for layer in network.adapted_layers if not layer.adapter.geometry.is_conv][:12]
    x, drawn = torch.zeros(1), []
    for _ in range(1500):
        network.on_step_start()
        for adapter in adapters:
            adapter.begin(x)
        drawn.append([block_of(adapter) for adapter in adapters])
    counts = torch.tensor(drawn)
    for of_layer in counts.T:
        found = torch.bincount(of_layer, minlength=3)
        assert float((found - 500).square().sum() / 500) < 25
    together = torch.bincount(counts[:, 0] * 3 + counts[:, 1], minlength=9)
    assert float((together - 1500 / 9).square().sum() / (1500 / 9)) < 45


def test_parts_of_a_layer_have_blocks_of_their_own() -> None:
    base = torch.nn.Linear(12, 24)
    adapter = make_adapter(ALGOS["dylora"], Geometry.of(base), 4, {}, (8, 8, 8))
    randomise(adapter)
    draws = Draws([AdaptedLayer("x", base, adapter, 1.0)])
    seen = set()
    for step in range(20):
        draws.begin(0, step)
        adapter.begin(torch.zeros(1))
        seen.add(tuple(block_of(part) for part in adapter.parts))
    assert len(seen) > 15


@pytest.mark.parametrize("reentrant", (True, False))
def test_the_block_of_a_step_is_that_of_recomputation_and_of_compiled_graphs(reentrant: bool) -> None:
    network, _ = network_of()
    layer = next(layer for layer in network.adapted_layers if not layer.adapter.geometry.is_conv)
    x = torch.randn(2, layer.adapter.geometry.in_features)

    def gradient(run: Any) -> Tensor:
        network.zero_grad()
        run(x.clone().requires_grad_()).square().sum().backward()
        return layer.adapter.down.grad.clone()

    def checkpointed(t: Tensor) -> Tensor:
        return checkpoint(layer.base, t, use_reentrant=reentrant)

    torch._dynamo.reset()
    compiled = torch.compile(layer.base, fullgraph=True, backend="eager")
    blocks = set()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(6):
            network.follow_step(0, step)
            plain = gradient(layer.base)
            blocks.add(int(plain.any(1).nonzero()[0]))
            assert torch.equal(gradient(checkpointed), plain)
            again = gradient(compiled)  # by masks instead of cut factors: the same but for rounding
            assert torch.equal(again != 0, plain != 0) and torch.allclose(again, plain, rtol=1e-5, atol=1e-6)
    assert blocks == {0, 2, 4}
    torch._dynamo.reset()


def file_of(module: Any, path: Path, **arguments: str) -> tuple[Tensor, dict[str, Tensor]]:
    """A drawn picture of a randomised network, and its file."""
    unet = sd_unet()
    network = module.create_network(1.0, 6, 3, None, None, unet, **arguments)
    network.apply_to(None, unet, False, True)
    randomise_network(network)
    network.save_weights(str(path), None, None)
    network.eval()
    return draw(unet), reader.read_tensors(path)[0]


@pytest.mark.parametrize(
    ("module", "arguments"), [(networks.dylora, {"unit": "2"}), (networks.lora_fa, {})], ids=("dylora", "lora_fa")
)
def test_a_file_is_a_lora_and_trains_on_as_either(module: Any, arguments: dict[str, str], tmp_path: Path) -> None:
    picture, tensors = file_of(module, tmp_path / "a.safetensors", **arguments)
    assert {key.partition(".")[2] for key in tensors} == {"lora_down.weight", "lora_up.weight", "alpha"}
    algo = module.__name__.partition(".")[2]
    for entry, expected in ((networks.lora, "lora"), (module, algo)):
        unet = sd_unet()
        extra = arguments if entry is module else {}
        network, _ = entry.create_network_from_weights(1.0, str(tmp_path / "a.safetensors"), None, None, unet, **extra)
        network.apply_to(None, unet, False, True)
        assert {row.algo for row, _ in network.layers} == {expected}
        assert torch.equal(draw(network.eval() and unet), picture)
    unet = sd_unet()
    network = module.create_network(1.0, 6, 3, None, None, unet, **arguments)
    network.apply_to(None, unet, False, True)
    network.load_weights(str(tmp_path / "a.safetensors"))
    assert all(getattr(layer.adapter, "block_size", 2) == 2 for layer in network.adapted_layers)
    network.eval()
    assert torch.equal(draw(unet), picture)


def test_lora_fa_trains_the_up_factor_alone() -> None:
    unet = sd_unet()
    network = networks.lora_fa.create_network(1.0, 6, 3, None, None, unet)
    network.apply_to(None, unet, False, True)
    groups, _ = network.prepare_optimizer_params(None, 1e-3, 1e-3)
    trained = {id(p) for group in groups for p in group["params"]}
    network.requires_grad_(True)  # as the trainers do
    draw(unet).square().sum().backward()
    for layer in network.adapted_layers:
        assert id(layer.adapter.up) in trained and id(layer.adapter.down) not in trained
        assert layer.adapter.down.grad is None and layer.adapter.up.grad is not None
    plan = networks.lora_fa.plan(6, 3, None, unet).to_json()["totals"]
    ups = sum(layer.adapter.up.numel() for layer in network.adapted_layers)
    assert plan["training_bytes"] == 4 * plan["parameters"] + 12 * ups


def test_lora_fa_starts_as_its_paper_says_and_keeps_no_input() -> None:
    base = torch.nn.Linear(512, 256).requires_grad_(False)
    adapter = ALGOS["lora_fa"](Geometry.of(base), 64)
    assert float(adapter.down.detach().std()) == pytest.approx((2 / (512 + 64)) ** 0.5, rel=0.02)
    assert not bool(adapter.up.any())
    layer = AdaptedLayer("x", base, adapter, 1.0)
    layer.attach()
    x = torch.randn(4, 512, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        base(x)
    assert x.shape not in kept
    before = adapter.down.detach().clone()
    with torch.no_grad():
        adapter.up.fill_(1.0)
    norm = adapter.norm()
    adapter.rescale_(0.5)
    assert torch.equal(adapter.down, before)
    assert float(adapter.norm() / norm) == pytest.approx(0.5)


def test_samples_drawn_in_train_mode_have_all_ranks() -> None:
    """Hosts sample without putting the network into eval mode, and there may be no dropout that watches for it."""
    unet = sd_unet()
    network = networks.lora.create_network(1.0, 8, 1, None, None, unet, algo="dylora")
    network.apply_to(None, unet, False, True)
    randomise_network(network)
    network.train()
    with torch.no_grad():
        sampled = [draw(unet) for _ in range(3)]
    network.eval()
    assert all(torch.equal(y, draw(unet)) for y in sampled)
    network.train()
    assert not torch.equal(draw(unet), draw(unet))
