"""The model of A1111, held to names and formulas by hand, and to its classes of layers where FORGE_PATH gives them.

Forge carries those of A1111 1.10.
"""

from __future__ import annotations

import importlib
import os
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from registry_archs import SPECS
from test_reads_comfyui import given, values
from torch import Tensor, nn

from networks.files.codec import decode
from networks.files.merge import merged_weight
from networks.files.readers import Given, a1111
from networks.files.readers.contract import STRENGTHS
from networks.files.readers.patcher import slots

READER = a1111.READERS[0]
ROOT = os.environ.get("FORGE_PATH", "")
KNOWN = {
    "sd": """
        lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q lora_unet_input_blocks_1_1_proj_in
        lora_te_text_model_encoder_layers_0_self_attn_q_proj oft_unet_input_blocks_1_1_proj_in
    """,
    "sdxl": """
        lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q oft_unet_input_blocks_4_1_proj_in
        lora_te1_text_model_encoder_layers_0_mlp_fc2 lora_te2_text_model_encoder_layers_31_self_attn_out_proj
    """,
}
UNKNOWN = """
    diffusion_model.input_blocks.1.1.proj_in unet.down_blocks.0.attentions.0.proj_in lycoris_mid_block_resnets_0_conv1
    text_encoder.text_model.encoder.layers.0.mlp.fc1
"""


@pytest.mark.parametrize("arch", a1111.MODELS)
def test_names(arch: str) -> None:
    known = slots(given(arch), a1111.MODELS[arch])
    assert set(KNOWN[arch].split()) <= known.keys()
    assert known.keys().isdisjoint(UNKNOWN.split())


def pair(*kernel: int) -> dict[str, Tensor]:
    return {"lora_up.weight": values(8, 2, *(1,) * len(kernel)), "lora_down.weight": values(2, 6, *kernel)}


ONE = torch.tensor(1.0)
# Form -> (its tensors, kernel, what becomes of it: exact, off, stays or refused).
FORMS: dict[str, tuple[Callable[[], dict[str, Tensor]], tuple[int, ...], str]] = {
    "lora": (lambda: pair() | {"alpha": ONE}, (), "exact"),
    "convolution": (lambda: pair(3, 3) | {"alpha": ONE}, (3, 3), "exact"),
    "tucker": (
        lambda: (
            {"lora_up.weight": values(8, 2, 1, 1), "lora_mid.weight": values(2, 2, 3, 3), "alpha": ONE}
            | {"lora_down.weight": values(2, 6, 1, 1)}
        ),
        (3, 3),
        "exact",
    ),
    "dora input": (lambda: pair() | {"dora_scale": 1 + values(1, 6)}, (), "exact"),
    "dora": (lambda: pair() | {"dora_scale": 1 + values(8, 1)}, (), "off"),
    "loha": (
        lambda: {f"hada_w{n}_{c}": values(*size) for n in (1, 2) for c, size in (("a", (8, 2)), ("b", (2, 6)))},
        (),
        "exact",
    ),
    "lokr": (
        lambda: {"lokr_w1": values(2, 2), "lokr_w2_a": values(4, 2), "lokr_w2_b": values(2, 3), "alpha": ONE},
        (),
        "exact",
    ),
    "lokr tucker": (
        lambda: (
            {"lokr_w1": values(2, 2), "lokr_w2_a": values(2, 4), "lokr_w2_b": values(2, 3), "alpha": ONE}
            | {"lokr_t2": values(2, 2, 3, 3)}
        ),
        (3, 3),
        "exact",
    ),
    "oft": (lambda: {"oft_blocks": values(2, 4, 4), "alpha": torch.tensor(0.0)}, (), "exact"),
    "oft with a limit": (lambda: {"oft_blocks": values(2, 4, 4), "alpha": torch.tensor(0.02)}, (), "exact"),
    "boft": (lambda: {"oft_blocks": values(2, 2, 4, 4), "alpha": torch.tensor(0.0)}, (), "exact"),
    "oft with factors": (
        lambda: {"oft_blocks": values(2, 4, 4), "rescale": 1 + values(8, 1), "alpha": torch.tensor(0.0)},
        (),
        "exact",
    ),
    "full": (lambda: {"diff": values(8, 6)}, (), "exact"),
    "glora": (
        lambda: (
            {"a1.weight": values(6, 2), "a2.weight": values(2, 6), "b1.weight": values(8, 2), "alpha": ONE}
            | {"b2.weight": values(2, 6)}
        ),
        (),
        "stays",
    ),
    "ia3": (lambda: {"weight": values(8), "on_input": torch.tensor(False)}, (), "exact"),
    "ia3 input": (lambda: {"weight": values(6), "on_input": torch.tensor(True)}, (), "exact"),
    "ia3 of a convolution": (
        lambda: {"weight": values(1, 8, 1, 1), "on_input": torch.tensor(False)},
        (3, 3),
        "stays",
    ),
    "norm without bias": (lambda: {"w_norm": values(8)}, (-1,), "refused"),
}


def met(form: str) -> tuple[Given, dict[str, Tensor], Tensor]:
    """A file with a layer of a form, its tensors and the base weight."""
    torch.manual_seed(0)
    make, kernel, _ = FORMS[form]
    tensors, name = {key: t.float() for key, t in make().items()}, "down_blocks.0.resnets.0.conv1"
    W = 10 * values(*((8,) if kernel == (-1,) else (8, 6, *kernel))).float()
    saved = f"lora_unet_{name}".replace(".", "_")
    file = {f"{saved}.{suffix}": tensor for suffix, tensor in tensors.items()}
    shapes = {"unet": {name: tuple(W.shape)}}
    return Given(file, {}, SPECS["sd"], shapes, decode(file)[0], lambda _: W), tensors, W


@pytest.mark.parametrize("form", FORMS)
def test_forms(form: str) -> None:
    run, tensors, W = met(form)
    reading, becomes = READER.read(run), FORMS[form][2]
    assert reading is not None and bool(reading.refused) == (becomes == "refused")
    if becomes == "refused":
        return
    (fate,) = reading.fates.values()
    assert fate.loaded == (becomes != "stays") and bool(fate.reason) == (becomes != "exact")
    if form == "dora":
        new = W + tensors["lora_up.weight"] @ tensors["lora_down.weight"]
        rows, columns = (new * tensors["dora_scale"] / new.norm(dim=i, keepdim=True) for i in (1, 0))
        error = float((columns - rows).norm() / (rows - W).norm())
        assert fate.errors == pytest.approx((error, error), rel=1e-4)


# -- its own classes


def program() -> Any:
    """Its modules by name, with stand-ins for what they import of the rest."""
    if "network" not in sys.modules:
        sys.path.append(f"{ROOT}/packages_3rdparty/webui_lora_collection")
        for name in ("modules", "modules.models", "modules.models.sd3", "modules.models.sd3.mmdit"):
            sys.modules[name] = types.ModuleType(name)
        sys.modules["modules.models.sd3.mmdit"].QkvLinear = type("QkvLinear", (), {})  # type: ignore[attr-defined]
        for name in ("sd_models", "cache", "errors", "hashes", "shared", "devices"):
            module = sys.modules[f"modules.{name}"] = types.ModuleType(f"modules.{name}")
            module.cpu, module.dtype = torch.device("cpu"), torch.float32  # type: ignore[attr-defined]
            setattr(sys.modules["modules"], name, module)
        for parent, name in (("modules", "models"), ("modules.models", "sd3"), ("modules.models.sd3", "mmdit")):
            setattr(sys.modules[parent], name, sys.modules[f"{parent}.{name}"])
    return importlib.import_module("network")


TYPES = ("lora:Lora", "hada:Hada", "ia3:Ia3", "oft:OFT", "lokr:Lokr", "full:Full", "norm:Norm", "glora:GLora")


def weight_of(tensors: dict[str, Tensor], W: Tensor, strength: float) -> Tensor | None:
    """W' as its classes have it; None if they fail."""
    network = program()
    layer: nn.Module = nn.Linear(6, 8) if W.dim() == 2 else nn.Conv2d(6, 8, tuple(W.shape[2:]), padding=1)
    layer.weight = nn.Parameter(W, requires_grad=False)
    weights = network.NetworkWeights(network_key="k", sd_key="k", w=dict(tensors), sd_module=layer)
    net = network.Network("n", None)
    net.unet_multiplier = strength
    kinds = [one.partition(":") for one in TYPES]
    found = (
        getattr(importlib.import_module(f"network_{m}"), f"ModuleType{c}")().create_module(net, weights)
        for m, _, c in kinds
    )
    module = next((one for one in found if one is not None), None)
    assert module is not None, "it stops"
    try:
        return W + module.calc_updown(W)[0]
    except RuntimeError:  # which it logs
        return None


if ROOT:  # tests of what is not installed are not collected

    @pytest.mark.parametrize("form", [form for form in FORMS if form != "norm without bias"])
    def test_its_classes_do_so(form: str) -> None:
        run, tensors, W = met(form)
        reading, (saved,) = READER.read(run), run.meant.values()
        assert reading is not None
        (fate,) = reading.fates.values()
        for strength, told in zip(STRENGTHS, fate.errors, strict=True):
            new, wanted = weight_of(tensors, W, strength), merged_weight(saved, W, strength)
            assert (new is not None) == fate.loaded
            if new is not None:
                assert float((new - wanted).norm() / (wanted - W).norm()) == pytest.approx(told, rel=1e-3, abs=1e-4)
