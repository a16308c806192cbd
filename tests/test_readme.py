"""docs/trainers.md has a command line for each script of sd-scripts, accepted on the model that it trains. And what is
generated in all pages is up to date.
"""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest
from toy_models import toy

import docs
from networks.archs import ARCHS

TRAINERS = (Path(__file__).parents[1] / "docs" / "trainers.md").read_text(encoding="utf-8")
SPECS = {spec.name: spec for spec in ARCHS}
SCRIPTS = {
    "train_network.py": "sd",
    "sdxl_train_network.py": "sdxl",
    "flux_train_network.py": "flux",
    "flux_train_network.py --model_type chroma": "chroma",
    "sd3_train_network.py": "sd3",
    "lumina_train_network.py": "lumina",
    "hunyuan_image_train_network.py": "hunyuan_image",
    "anima_train_network.py": "anima",
}
LINES = dict(
    re.findall(r"^python (\w+_network\.py(?: --model_type \w+)?) +\.\.\. (--network_module .+)$", TRAINERS, re.M)
)


def test_there_is_a_line_for_each_script() -> None:
    assert LINES.keys() == SCRIPTS.keys()


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_line_is_accepted(script: str) -> None:
    module, *args = [word for word in shlex.split(LINES[script]) if not word.startswith("--")]
    arch = SPECS[SCRIPTS[script]]
    models = toy(arch.name, blocks=12)
    entry = importlib.import_module(module)
    encoders = [models.get(part.name) for part in arch.text_encoders]
    kwargs = dict(item.split("=", 1) for item in args)
    assert entry.plan(4, 1, encoders, models[arch.denoiser.name], **kwargs).trained


@pytest.mark.parametrize("file", (*docs.PARTS, *docs.WHOLE), ids=lambda file: file.name)
def test_what_is_generated_is_up_to_date(file: Path) -> None:
    assert docs.rendered(file) == file.read_text(encoding="utf-8"), "run python scripts/docs.py"
