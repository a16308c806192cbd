"""What the ranks of a file hold, against numpy; and that the picture of it is drawn for every kind of file."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from networks.cli.show import main
from networks.tools.opened import Opened
from networks.tools.plots import draw
from networks.tools.spectra import spectra

BLOCKS = [f"lora_unet_double_blocks_{i}_img_attn_proj" for i in range(3)]


def written(path: Path) -> dict[str, np.ndarray]:
    """A LoRA of three ranks, a LoKr and a layer of nothing; what each adds, by its definition."""
    rng = np.random.default_rng(0)
    down, up = rng.standard_normal((3, 12)), rng.standard_normal((8, 3)) * [4.0, 1.0, 0.1]
    w1, a, b = rng.standard_normal((2, 2)), rng.standard_normal((4, 1)), rng.standard_normal((1, 6))
    tensors = {
        f"{BLOCKS[0]}.lora_down.weight": down, f"{BLOCKS[0]}.lora_up.weight": up, f"{BLOCKS[0]}.alpha": np.array(6.0),
        f"{BLOCKS[1]}.lokr_w1": w1, f"{BLOCKS[1]}.lokr_w2_a": a, f"{BLOCKS[1]}.lokr_w2_b": b,
        f"{BLOCKS[1]}.alpha": np.array(0.5),
        f"{BLOCKS[2]}.lora_down.weight": down, f"{BLOCKS[2]}.lora_up.weight": 0 * up,
    }  # fmt: skip
    save_file({key: torch.tensor(value) for key, value in tensors.items()}, path)
    return {BLOCKS[0]: 2 * up @ down, BLOCKS[1]: 0.5 * np.kron(w1, a @ b), BLOCKS[2]: 0 * up @ down}


def test_against_numpy(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    truth = written(path)
    found = spectra(path)
    assert [layer.name for layer in found.layers] == [*truth]
    energies = {}
    for layer in found.layers:
        values = np.linalg.svd(truth[layer.name], compute_uv=False)
        values = values[values > 1e-7 * max(values[0], 1e-30)]
        assert layer.values == pytest.approx([*values]) and layer.norm == pytest.approx(np.linalg.norm(values))
        shares = values**2 / max((values**2).sum(), 1e-30)
        assert layer.effective_rank == pytest.approx(math.exp(-(shares * np.log(shares)).sum()) if len(values) else 0)
        energies[layer.name] = [*values**2]
        for energy in (0.9, 0.99):
            wanted = int(np.searchsorted(np.cumsum(shares), energy)) + 1 if len(values) else 0
            assert layer.rank_for(energy) == wanted
    whole = sum(map(sum, energies.values()))
    kept = {dim: sum(sum(one[:dim]) for one in energies.values()) / whole for dim in (1, 2, 3)}
    assert found.most == 3 and {dim: found.kept(dim) for dim in kept} == pytest.approx(kept)
    assert [found.dim_for(share) for share in (kept[1], kept[2], 1.0)] == [1, 2, 3]
    assert json.loads(json.dumps(found.to_dict()))["dims"].keys() == {"0.9", "0.99"}


def test_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a usual file, of one layer of nothing, and of names without blocks; the command says the same in words."""
    path, png = tmp_path / "$a_b$.safetensors", tmp_path / "a.png"
    written(path)
    monkeypatch.setattr(Opened, "weight", lambda self, name: torch.full((8, 12), 0.5))
    assert main([str(path), "--plot", str(png), "--json"]) == 0
    layers = json.loads(capsys.readouterr().out)["layers"]
    assert layers[0]["relative"] == pytest.approx(layers[0]["norm"] / (0.5 * math.sqrt(96)))
    with Image.open(png) as image:
        assert image.width > 1000 and len(image.convert("RGB").getcolors(1 << 24)) > 20
    assert main([str(path), "--plot", str(png)]) == 2 and "--overwrite" in capsys.readouterr().err
    pair = {"x.lora_down.weight": torch.ones(1, 4), "x.lora_up.weight": torch.zeros(4, 1)}
    save_file(pair, tmp_path / "b.safetensors")
    found = spectra(tmp_path / "b.safetensors")
    draw(found, tmp_path / "b.png")
    assert (tmp_path / "b.png").exists() and found.lines()
