"""Files of save_format=comfyui, read by ComfyUI itself where COMFYUI_PATH gives it: every form on every architecture.

At strengths 1 and 0.7 the weights are those that were trained, and none is missed.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_every_architecture import create, model_of
from test_save_formats import FORMS
from tiny_parts import randomise

if os.environ.get("COMFYUI_PATH"):  # tests of what is not installed are not collected
    import comfyui_program as program

    DETECTED = program.program("model_detection").model_config_from_unet_config
    ARCHS = [arch for arch in program.CONFIGS if program.has(arch) and (arch[:2] != "sd" or arch == "sd3")]
    ARCHS = [arch for arch in ARCHS if DETECTED(dict(program.CONFIGS[arch]), {}) is not None]

    @pytest.mark.sweep
    @pytest.mark.parametrize("name", FORMS)
    @pytest.mark.parametrize("arch", ARCHS)
    def test_it_makes_the_weights_that_were_trained(arch: str, name: str, tmp_path: Path) -> None:
        model = model_of(arch)
        base, where = program.of_trainer(arch, "", model)
        network = create(arch, model, save_format="comfyui", **FORMS[name])
        randomise(network)
        network.save_weights(str(tmp_path / "a.safetensors"), None, {})
        network.detach()
        widths = [weight.shape[1] for key, weight in base.items() if key.endswith("attention.qkv.weight")]
        config = {**program.CONFIGS[arch], **({"dim": widths[0], "n_layers": 2} if widths else {})}
        for strength in (1.0, 0.7):
            found, _ = program.patched(arch, load_file(tmp_path / "a.safetensors"), base, config, strength)
            for layer in network.adapted_layers:
                key, rows = where[layer.sites[0].module]
                weight = layer.whole_weight()
                wanted = layer.new_weight(weight, strength).detach()
                assert (found[key][rows] - wanted).norm() < 1e-5 * (wanted - weight).norm(), layer.lora_name
        assert found.keys() == {where[layer.sites[0].module][0] for layer in network.adapted_layers}
        assert torch.isfinite(torch.stack([weight.sum() for weight in found.values()])).all()
