"""docs/from-*.md: every number of their tables, measured here and in the program of its row.

LyCORIS and PEFT are installed wherever the tests run; the side of a trainer is measured where SD_SCRIPTS_PATH names a
checkout (for LoKr: of 0.11), or MUSUBI_PATH the folder src of one.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import lycoris.kohya
import pytest
import torch
from helpers_numeric import dense_update
from lycoris.modules.diag_oft import DiagOFTModule
from lycoris.modules.dylora import DyLoraModule
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from lycoris.modules.tlora import TLoraModule
from peft import LoKrConfig, LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file
from tiny_parts import sd_unet
from torch import Tensor, nn
from toy_models import toy

import networks.lora
import networks.lora_flux
import networks.lycoris
import networks.oft
from networks.algos import ALGOS
from networks.layers.adapted import AdaptedLayer
from networks.layers.dropout import Dropouts
from networks.layers.max_norm import limit_norms
from networks.tensors.norms import layer_geometry

pytestmark = pytest.mark.reference

PAGES = sorted((Path(__file__).parents[1] / "docs").glob("from-*.md"))
TABLES = [
    page.read_text(encoding="utf-8").partition("<!-- numbers:begin -->")[2].partition("<!-- numbers:end -->")[0]
    for page in PAGES
]
LINES = [line for table in TABLES for line in table.strip().splitlines()[2:]]
ROWS = [tuple(cell.strip() for cell in line.strip("|").split("|"))[:4] for line in LINES]
PLACES = {  # of a trainer's network modules, each with one that it must have
    "sd-scripts": ("SD_SCRIPTS_PATH", "networks", "dylora"),
    "sd-scripts 0.11": ("SD_SCRIPTS_PATH", "networks", "lokr"),
    "musubi-tuner": ("MUSUBI_PATH", "musubi_tuner/networks", "lokr"),
}
FOLDERS = {name: Path(os.environ.get(variable, ""), below) for name, (variable, below, _) in PLACES.items()}
PROGRAMS = {"LyCORIS", "PEFT"} | {name for name, path in FOLDERS.items() if (path / f"{PLACES[name][2]}.py").is_file()}
PROGRAMS -= {name for name, (variable, *_) in PLACES.items() if not os.environ.get(variable)}
OUT, IN = 32, 24
R, B = 8, 2  # of DyLoRA
EYE = torch.eye(IN, dtype=torch.float64)

Measure = Callable[[], float]
HERE: dict[str, Measure] = {}
THERE: dict[tuple[str, str], Measure] = {}


def here(what: str) -> Callable[[Measure], Measure]:
    """What these modules do."""

    def note(measure: Measure) -> Measure:
        HERE[what] = functools.cache(measure)
        return measure

    return note


def there(what: str, *programs: str) -> Callable[[Callable[..., float]], Callable[..., float]]:
    """What the programs do; a trainer's measure is given the import of its modules."""

    def note(measure: Callable[..., float]) -> Callable[..., float]:
        for name in programs:
            THERE[what, name] = functools.partial(measure, *([host(name)] if name in PLACES else []))
        return measure

    return note


def host(program: str) -> Callable[[str], ModuleType]:
    """Imports a trainer's network modules under a package name that is not ours; its library is stood in for."""

    def load(name: str) -> ModuleType:
        library, utils = ModuleType("library"), ModuleType("library.utils")
        unet = ModuleType("library.sdxl_original_unet")
        utils.setup_logging = lambda *args, **kwargs: None  # type: ignore[attr-defined]
        for kind in ("SdxlUNet2DConditionModel", "InferSdxlUNet2DConditionModel"):
            setattr(unet, kind, type("Other", (), {}))
        package = ModuleType("host_networks")
        package.__path__ = [str(FOLDERS[program])]
        stand_ins = {each.__name__: each for each in (library, utils, unet, package)}
        former = {key: module for key, module in sys.modules.items() if key.partition(".")[0] in ("library",)}
        sys.modules.update(stand_ins)
        try:
            return importlib.import_module(f"host_networks.{name}")
        finally:
            for key in [key for key in sys.modules if key.partition(".")[0] in ("library", "host_networks")]:
                del sys.modules[key]
            sys.modules.update(former)

    return load


def test_every_row_is_measured() -> None:
    assert len(PAGES) == 4 and all(TABLES)
    assert len(ROWS) == len(set(ROWS)) >= 30
    assert {what for what, *_ in ROWS} == HERE.keys()
    assert {(what, program) for what, _, _, program in ROWS if program != "-"} == THERE.keys()


@pytest.mark.parametrize(("what", "ours", "theirs", "program"), ROWS, ids=lambda cell: cell[:60])
def test_a_row(what: str, ours: str, theirs: str, program: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    assert HERE[what]() == shown(ours), f"here: {what}"
    if program in PROGRAMS:
        assert THERE[what, program]() == shown(theirs), f"{program}: {what}"


def shown(number: str) -> Any:
    """A printed number: what rounds to it is it."""
    decimals = len(number.partition(".")[2])
    return pytest.approx(float(number), abs=0.5001 * 10**-decimals if decimals else 1e-6)


# -- layers


def linear(out: int = OUT, columns: int = IN, dtype: torch.dtype = torch.float64) -> nn.Linear:
    """A frozen layer, always the same."""
    base = nn.Linear(columns, out, bias=False, dtype=dtype).requires_grad_(False)
    with torch.no_grad():
        base.weight.copy_(torch.randn(out, columns, generator=torch.Generator().manual_seed(0)) / columns**0.5)
    return base


def adapted(
    algo: str, dim: int, alpha: float, base: nn.Linear | None = None, rates: Dropouts | None = None, dora: str = "",
    **options: Any,
) -> AdaptedLayer:  # fmt: skip
    """Ours on one layer, attached.

    Args:
        algo: of our records.
        dim, alpha: as given to the trainer.
        base: the layer; None = `linear()`.
        rates: of dropouts.
        dora: side of the magnitudes; "" = none.
        options: of the algorithm.
    """
    base = base or linear()
    adapter = ALGOS[algo](layer_geometry(base), dim, options).to(base.weight.dtype)  # type: ignore[arg-type]
    rank = adapter.laid_out.rank
    layer = AdaptedLayer("lora_unet_x", base, adapter, alpha / rank if rank else 1.0, rates, dora=dora)
    layer.to(base.weight.dtype).attach()
    return layer


def random(module: nn.Module) -> Any:
    """The module with the same random values at each call."""
    own = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=own) * 0.3)
    return module


def factors() -> tuple[Tensor, Tensor]:
    """up [OUT, R] and down [R, IN] of DyLoRA."""
    own = torch.Generator().manual_seed(2)
    return (
        torch.randn(OUT, R, generator=own, dtype=torch.float64),
        torch.randn(R, IN, generator=own, dtype=torch.float64),
    )


def change(base: nn.Module, before: Tensor) -> Tensor:
    """What a call of a layer adds to its weight."""
    with torch.no_grad():
        return base(EYE).T - before


# -- DyLoRA

PASS = "DyLoRA, dim 8, `block_size=2` (`unit`): strength of a training pass with 2 ranks drawn, over that of the file"
ALL = "DyLoRA, dim 8, `block_size=2`: the same with all 8 ranks"


def strengths(base: nn.Module, cut: bool = True) -> dict[int, float]:
    """Ranks of a pass -> how often it holds the file's update of these ranks, or (not `cut`) of all."""
    up, down = factors()
    before = linear().weight
    found: dict[int, float] = {}
    for _ in range(40):
        whole = change(base, before)
        for ranks in range(B, R + 1, B) if cut else [R]:
            part = up[:, :ranks] @ down[:ranks]
            times = float((whole * part).sum() / part.square().sum())
            if torch.allclose(whole, times * part, atol=1e-6):
                found[ranks if cut else len(found)] = times
    return found


@functools.cache
def our_dylora() -> dict[int, float]:
    layer = adapted("dylora", R, R, block_size=B)
    with torch.no_grad():
        for name, value in zip(("up", "down"), factors(), strict=True):
            getattr(layer.adapter, name).copy_(value)
    layer.train()
    return strengths(layer.base)


@functools.cache
def lycoris_dylora() -> dict[int, float]:
    base = linear()
    module = DyLoraModule("x", base, 1.0, R, R, block_size=B).double()
    up, down = factors()
    with torch.no_grad():
        for i in range(R // B):
            module.up_list[i].copy_(up[:, i * B : (i + 1) * B])
            module.down_list[i].copy_(down[i * B : (i + 1) * B])
    module.apply_to()
    return strengths(base)


here(PASS)(lambda: our_dylora()[B])
here(ALL)(lambda: our_dylora()[R])
there(PASS, "LyCORIS")(lambda: lycoris_dylora()[B])
there(ALL, "LyCORIS")(lambda: lycoris_dylora()[R])


@there(PASS, "sd-scripts")
def _(load: Callable[[str], ModuleType]) -> float:
    base = linear()
    module = load("dylora").DyLoRAModule("x", base, 1.0, R, R, unit=B).double()
    up, down = factors()
    with torch.no_grad():
        for i in range(R):
            module.lora_A[i].copy_(down[i : i + 1])
            module.lora_B[i].copy_(up[:, i : i + 1])
    module.apply_to()
    return max(strengths(base, cut=False).values())  # the fewer ranks, the stronger


# -- dropouts

MEAN = "`rank_dropout=0.5`, `networks.{}`: mean of the training update, over the saved one"
MASKS = "`rank_dropout=0.5`, dim 4: different masks in one batch of 4000 samples"
DROPPED = "`dropout=0.5`, LoRA: share of the outputs that a training pass changes"
SAMPLES = 4000


@functools.cache
def drawn(entry: str) -> tuple[float, int]:
    """Strength of the mean update of many samples, and how many different ones there are."""
    unet = sd_unet()
    network = importlib.import_module(f"networks.{entry}").create_network(
        1.0, 4, 4, None, None, unet, rank_dropout="0.5", **({"preset": "attn-only"} if entry == "lycoris" else {})
    )
    layer = random(next(each for each in network.adapted_layers if isinstance(each.base, nn.Linear)).train())
    x = torch.randn(1, 1, layer.base.in_features, generator=torch.Generator().manual_seed(3)).expand(SAMPLES, -1, -1)
    with torch.no_grad():
        update, saved = layer.update(x), layer.eval().update(x[:1])
    times = float((update.mean(0) * saved[0]).sum() / saved.square().sum())
    return times, update.flatten(1).unique(dim=0).shape[0]


here(MEAN.format("lora"))(lambda: drawn("lora")[0])
here(MEAN.format("lycoris"))(lambda: drawn("lycoris")[0])
here(MASKS)(lambda: drawn("lora")[1])


def lycoris_lora(**options: Any) -> tuple[nn.Linear, Any]:
    base = linear()
    return base, random(LoConModule("x", base, 1.0, 4, 4, **options).double())


@there(MEAN.format("lycoris"), "LyCORIS")
def _() -> float:
    _, module = lycoris_lora(rank_dropout=0.5)
    with torch.no_grad():
        whole, mean = module.eval().make_weight(), sum(module.train().make_weight() for _ in range(1000)) / 1000
    return float((mean * whole).sum() / whole.square().sum())


@there(MASKS, "LyCORIS")
def _() -> float:
    base, module = lycoris_lora(rank_dropout=0.5)
    module.apply_to()
    with torch.no_grad():
        y = module.train()(torch.ones(SAMPLES, IN, dtype=torch.float64))
    return y.unique(dim=0).shape[0]


@there(MEAN.format("lora"), "sd-scripts")
def _(load: Callable[[str], ModuleType]) -> float:
    module = random(load("lora").LoRAModule("x", linear(), 1.0, 4, 4, rank_dropout=0.5).double())
    module.apply_to()
    x = torch.ones(SAMPLES, IN, dtype=torch.float64)
    with torch.no_grad():
        plain = module.org_forward(x[:1])
        update, saved = module.train()(x) - plain, module.eval()(x[:1]) - plain
    return float((update.mean(0) * saved[0]).sum() / saved.square().sum())


def share_changed(layer: nn.Module, call: Callable[[Tensor], Tensor]) -> float:
    x = torch.randn(50, IN, dtype=torch.float64)
    with torch.no_grad():
        layer.eval()
        quiet = call(x)
        layer.train()
        return float((call(x) != quiet).double().mean())


@here(DROPPED)
def _() -> float:
    layer = adapted("lora", 4, 4, rates=Dropouts(dropout=0.5))
    random(layer.adapter)
    return share_changed(layer, layer.base)


@there(DROPPED, "LyCORIS")
def _() -> float:
    base, module = lycoris_lora(dropout=0.5)
    module.apply_to()
    return share_changed(module, base)


# -- strength

ZERO = "`network_alpha=0`: strength"
WHOLE = "LoKr of two whole factors, dim 100, alpha 1: strength"
FIRST = "LoKr, width 1280, `factor=-1`: rows of the first factor"
LEAST = "LoKr, width 1280, `factor=8`: least dim with a whole second factor"
STABLE = "RS-LoRA, dim 16, alpha 8: alpha in the file"
RAW = "RS-LoRA, dim 16, alpha 8, `save_format=blissful`: alpha in the file"
SPLIT = "`split_qkv=True` on FLUX.1's `linear1`: strength by alpha / rank of the file, over the trained one"


def our_network(entry: Any, dim: int, alpha: float, **arguments: str) -> Any:
    return entry.create_network(1.0, dim, alpha, None, None, sd_unet(), **arguments)


def saved_of(network: Any) -> dict[str, Tensor]:
    """What a network writes."""
    with TemporaryDirectory() as folder:
        file = str(Path(folder, "x.safetensors"))
        network.save_weights(file, None, {})
        return {key: tensor.clone() for key, tensor in load_file(file).items()}


def an_alpha(tensors: dict[str, Tensor], part: str = "") -> tuple[float, int]:
    """Alpha and rank of the first layer with this in its name."""
    key = next(key for key in sorted(tensors) if part in key and key.endswith(".alpha"))
    return float(tensors[key]), tensors[key.replace(".alpha", ".lora_down.weight")].shape[0]


def peft_scale(config: Any) -> float:
    model = nn.Sequential(linear())
    inject_adapter_in_model(config, model)
    layer: Any = model[0]
    return float(layer.scaling["default"])


here(ZERO)(lambda: our_network(networks.lora, 4, 0).adapted_layers[0].scale)
there(ZERO, "LyCORIS")(lambda: float(LoConModule("x", linear(), 1.0, 4, 0).scale))
there(ZERO, "PEFT")(lambda: peft_scale(LoraConfig(r=4, lora_alpha=0, target_modules=["0"])))
there(ZERO, "sd-scripts")(lambda load: float(load("lora").LoRAModule("x", linear(), 1.0, 4, 0).scale))
here(WHOLE)(lambda: adapted("lokr", 100, 1).scale)
there(WHOLE, "LyCORIS")(lambda: float(LokrModule("x", linear(), 1.0, 100, 1).scale))
there(WHOLE, "sd-scripts 0.11", "musubi-tuner")(
    lambda load: float(load("lokr").LoKrModule("x", linear(), 1.0, 100, 1).scale)
)  # fmt: skip
there(WHOLE, "PEFT")(lambda: peft_scale(LoKrConfig(r=100, alpha=1, target_modules=["0"])))


def first_rows(module: Any) -> float:
    return int(module.lokr_w1.shape[0])


def least_dim(is_whole: Callable[[int], bool]) -> float:
    return next(dim for dim in range(77, 83) if is_whole(dim))


def our_shapes(dim: int, **options: Any) -> dict[str, tuple[int, ...]]:
    wide = layer_geometry(nn.Linear(1280, 1280, device="meta"))
    assert wide is not None
    return dict(ALGOS["lokr"].layout(wide, dim, **options).shapes)


here(FIRST)(lambda: our_shapes(4)["w1"][0])
there(FIRST, "LyCORIS")(lambda: first_rows(LokrModule("x", nn.Linear(1280, 1280), 1.0, 4)))
there(FIRST, "sd-scripts 0.11", "musubi-tuner")(
    lambda load: first_rows(load("lokr").LoKrModule("x", nn.Linear(1280, 1280), 1.0, 4))
)
here(LEAST)(lambda: least_dim(lambda dim: "w2" in our_shapes(dim, factor=8)))
there(LEAST, "LyCORIS")(
    lambda: least_dim(lambda dim: LokrModule("x", nn.Linear(1280, 1280), 1.0, dim, factor=8).use_w2)
)
here(STABLE)(lambda: an_alpha(saved_of(our_network(networks.lora, 16, 8, rs_lora="True")))[0])
here(RAW)(lambda: an_alpha(saved_of(our_network(networks.lora, 16, 8, rs_lora="True", save_format="blissful")))[0])
there(STABLE, "LyCORIS")(
    lambda: float(LoConModule("x", linear(), 1.0, 16, 8, rs_lora=True).custom_state_dict()["alpha"])
)


@here(SPLIT)
def _() -> float:
    flux = toy("flux")["dit"]
    network = networks.lora_flux.create_network(1.0, 4, 2, None, [None, None], flux, split_qkv="True")
    alpha, rank = an_alpha(saved_of(network), "single_blocks_0_linear1")
    trained = next(layer for layer in network.adapted_layers if layer.lora_name.endswith("linear1")).scale
    return alpha / rank / trained


@there(SPLIT, "sd-scripts")
def _(load: Callable[[str], ModuleType]) -> float:
    module, flux = load("lora_flux"), toy("flux")["dit"]
    rows = flux.get_submodule("single_blocks.0.linear1").out_features
    columns = flux.get_submodule("single_blocks.0.linear1").in_features
    sizes = [columns] * 3 + [rows - 3 * columns]
    module.LoRANetwork.get_qkv_mlp_split_dims = lambda self: sizes  # those of the small model
    network = module.create_network(
        1.0, 4, 2, None, [None, None], flux, split_qkv="True", train_blocks="single"
    )  # fmt: skip
    network.apply_to([None, None], flux, False, True)
    alpha, rank = an_alpha(network.state_dict(), "single_blocks_0_linear1")
    return alpha / rank / next(lora for lora in network.unet_loras if "linear1" in lora.lora_name).scale


# -- DoRA

COUNT = "DoRA, 32 x 24: magnitudes"
GRADIENT = "DoRA: gradient of the up factor, over PEFT's"
LEFT = "DoRA, strength 0: share of the update that is left"


@functools.cache
def doras() -> dict[str, Any]:
    """The three on the same layer with the same factors: (module, layer, up factor)."""
    layer = adapted("lora", 4, 4, dora="output")
    random(layer.adapter)
    base = linear()
    locon = LoConModule("x", base, 1.0, 4, 4, weight_decompose=True).double()
    model = nn.Sequential(linear())
    inject_adapter_in_model(LoraConfig(r=4, lora_alpha=4, target_modules=["0"], use_dora=True), model)
    peft: Any = model.double()[0]
    up: Any = layer.adapter.up
    pairs = [(locon.lora_up.weight, locon.lora_down.weight)]
    pairs += [(peft.lora_B["default"].weight, peft.lora_A["default"].weight)]
    with torch.no_grad():
        for theirs in pairs:
            theirs[0].copy_(up)
            theirs[1].copy_(layer.adapter.down)
    locon.apply_to()
    return {
        "here": (layer, layer.base, up),
        "LyCORIS": (locon, base, locon.lora_up.weight),
        "PEFT": (peft, peft, pairs[1][0]),
    }


def magnitudes(name: str) -> float:
    module: Any = doras()[name][0]
    if name == "here":
        return int(module.magnitude.numel())
    found = module.dora_scale if name == "LyCORIS" else module.lora_magnitude_vector["default"].weight
    return int(found.numel())


@functools.cache
def gradient(name: str) -> float:
    _, layer, up = doras()[name]
    weights = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    y = layer(EYE)
    assert torch.allclose(y, doras()["here"][1](EYE), atol=1e-6)  # the forward is the same in all
    (found,) = torch.autograd.grad((y.T * weights).sum(), up)
    return float(found.norm())


here(COUNT)(lambda: magnitudes("here"))
there(COUNT, "LyCORIS")(lambda: magnitudes("LyCORIS"))
there(COUNT, "PEFT")(lambda: magnitudes("PEFT"))
here(GRADIENT)(lambda: gradient("here") / gradient("PEFT"))
there(GRADIENT, "LyCORIS")(lambda: gradient("LyCORIS") / gradient("PEFT"))


@here(LEFT)
def _() -> float:
    layer, base, _ = doras()["here"]
    former, layer.runtime.multiplier = layer.runtime.multiplier, 0.0
    left = change(base, linear().weight)
    layer.runtime.multiplier = former
    return float(left.norm() / (layer.adapter.up @ layer.adapter.down).detach().norm())


@there(LEFT, "LyCORIS")
def _() -> float:
    module, base, up = doras()["LyCORIS"]
    former, module.multiplier = module.multiplier, 0.0
    left = change(base, linear().weight)
    module.multiplier = former
    return float(left.norm() / (up @ module.lora_down.weight).detach().norm())


# -- rotations

BLOCKS = "`algo=diag-oft`, network_dim 8, 128 rows: blocks"
OFT_BLOCKS = "`networks.oft`, network_dim 8, 128 rows: blocks"
LIMIT = "`algo=diag-oft`, `constraint=0.001`, 128 rows: norm of all blocks at the limit"
OFT_LIMIT = "`networks.oft`, network_alpha 0.001, 128 rows: norm of all blocks at the limit"


def tall() -> nn.Linear:
    return linear(128, IN, torch.float32)


def rotation(**options: Any) -> AdaptedLayer:
    layer = adapted("diag-oft", 8, 8, tall(), **options)
    random(layer.adapter)
    return layer


def turned(weight: Tensor, size: int) -> float:
    """Norm of Q of all blocks of a turned weight, whose rotations are (1 + Q) / (1 - Q)."""
    before, after = (each.detach().double().unflatten(0, (-1, size)) for each in (tall().weight, weight))
    rotation, one = after @ torch.linalg.pinv(before), torch.eye(size, dtype=torch.float64)
    return float(((rotation - one) @ torch.linalg.inv(rotation + one)).norm())


def count_of(layer: AdaptedLayer) -> float:
    return int(dict(layer.adapter.named_parameters())["blocks"].shape[0])


def lycoris_oft() -> Any:
    return random(DiagOFTModule("x", tall(), 1.0, 8, 0.001, constraint=0.001))


here(BLOCKS)(lambda: count_of(rotation()))
there(BLOCKS, "LyCORIS")(lambda: lycoris_oft().oft_blocks.shape[0])
here(OFT_BLOCKS)(lambda: count_of(rotation(dim_is_count=True)))
there(OFT_BLOCKS, "sd-scripts")(lambda load: load("oft").OFTModule("x", tall(), 1.0, 8, 0.001).oft_blocks.shape[0])
here(LIMIT)(lambda: turned(rotation(constraint=0.001).new_weight(tall().weight), 8))
here(OFT_LIMIT)(lambda: turned(rotation(constraint=0.001, dim_is_count=True).new_weight(tall().weight), 16))


@there(LIMIT, "LyCORIS")
def _() -> float:
    with torch.no_grad():
        return turned(lycoris_oft().make_weight(), 8)


@there(OFT_LIMIT, "sd-scripts")
def _(load: Callable[[str], ModuleType]) -> float:
    base = tall()
    module = random(load("oft").OFTModule("x", base, 1.0, 8, 0.001))
    module.apply_to()
    with torch.no_grad():
        return turned(base(torch.eye(IN)).T, 16)


# -- which layers, which rates

UNGIVEN = "`conv_dim` not given, `networks.{}`, network_dim 8: dim of 3x3 kernels"
NAMED = 'preset file with `unet_target_name = ["to_k"]`, small UNet: layers trained'
PLUS = "`loraplus_lr_ratio=4` with LoKr, small UNet: tensors at the higher rate"
PRESET = 'unet_target_module = []\nunet_target_name = ["to_k"]\ntext_encoder_target_module = []\n'
PLUS_ARGUMENTS = {"preset": "attn-mlp", "algo": "lokr", "factor": "4", "loraplus_lr_ratio": "4"}


def our_conv(entry: Any) -> float:
    rows = our_network(entry, 8, 4).plan.trained
    return next((row.dim for row in rows if row.kind == "Conv2d 3x3"), 0)


def their_conv(modules: Any) -> float:
    found = [lora for lora in modules if getattr(first(lora.org_module), "kernel_size", ()) == (3, 3)]
    return found[0].lora_dim if found else 0


def first(module: Any) -> Any:
    """LyCORIS keeps its layer in a list."""
    return module[0] if isinstance(module, list) else module


def lycoris_network(**arguments: str) -> Any:
    return lycoris.kohya.create_network(1.0, 8, 4, None, None, sd_unet(), **arguments)


def with_preset(count: Callable[[str], int]) -> float:
    with TemporaryDirectory() as folder:
        file = Path(folder, "named.toml")
        file.write_text(PRESET, encoding="utf-8")
        return count(str(file))


def at_the_higher_rate(groups: Any) -> float:
    return sum(len(list(group["params"])) for group in groups if group["lr"] > 1e-3)


here(UNGIVEN.format("lora"))(lambda: our_conv(networks.lora))
here(UNGIVEN.format("lycoris"))(lambda: our_conv(networks.lycoris))
there(UNGIVEN.format("lycoris"), "LyCORIS")(
    lambda: their_conv(lycoris_network(preset="unet-convblock-only").unet_loras)
)
there(UNGIVEN.format("lora"), "sd-scripts")(
    lambda load: their_conv(load("lora").create_network(1.0, 8, 4, None, [], sd_unet()).unet_loras)
)
here(NAMED)(lambda: with_preset(lambda file: len(our_network(networks.lycoris, 8, 4, preset=file).plan.trained)))
there(NAMED, "LyCORIS")(lambda: with_preset(lambda file: len(lycoris_network(preset=file).unet_loras)))
here(PLUS)(
    lambda: at_the_higher_rate(
        our_network(networks.lycoris, 4, 4, **PLUS_ARGUMENTS).prepare_optimizer_params(1e-3, 1e-3)[0]
    )
)


@there(PLUS, "LyCORIS")
def _() -> float:
    network = lycoris_network(**PLUS_ARGUMENTS)
    network.apply_to(None, None, False, True)
    return at_the_higher_rate(network.prepare_optimizer_params(None, 1e-3, 1e-3)[0])


# -- norms and starts

SCALED = "`--scale_weight_norms 0.1`, LoHa: norm of the update afterwards"
START = "T-LoRA, dim 16, 160 x 160: change of the weight by one step of Adam at 1e-3"
PAPER = "T-LoRA with `sig_type=last use_data_init=False`: the same"
LINE = {"sig_type": "last", "use_data_init": False}


@here(SCALED)
def _() -> float:
    layer = adapted("loha", 4, 1)
    random(layer.adapter)
    limit_norms([layer], 0.1)
    return float(dense_update(layer, 1.0).detach().norm())


@there(SCALED, "LyCORIS")
def _() -> float:
    base = linear()
    module = random(LohaModule("x", base, 1.0, 4, 1).double())
    with torch.no_grad():
        module.apply_max_norm(0.1)
    module.apply_to()
    return float(change(base, linear().weight).norm())


def a_step(base: nn.Linear, module: nn.Module) -> float:
    x = torch.randn(64, 160, generator=torch.Generator().manual_seed(3))
    adam = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], lr=1e-3)
    base(x).square().mean().backward()
    adam.step()
    with torch.no_grad():
        return float((base(torch.eye(160)).T - linear(160, 160, torch.float32).weight).norm())


def our_tlora(**options: Any) -> float:
    torch.manual_seed(0)
    layer = adapted("tlora", 16, 16, linear(160, 160, torch.float32), **options)
    layer.init_from_base()
    return a_step(layer.base, layer)  # type: ignore[arg-type]


def lycoris_tlora(**options: Any) -> float:
    torch.manual_seed(0)
    base = linear(160, 160, torch.float32)
    module = TLoraModule("x", base, 1.0, 16, 16, **options)
    module.apply_to()
    return a_step(base, module)


here(START)(our_tlora)
here(PAPER)(lambda: our_tlora(**LINE))
there(START, "LyCORIS")(lycoris_tlora)
there(PAPER, "LyCORIS")(lambda: lycoris_tlora(**LINE))
