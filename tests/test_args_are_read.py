"""An argument that no code reads does nothing: every row of the table is read by some call."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_parts import draw, sd_unet, text_encoder
from toy_models import toy

import networks.lora
from networks.algos import ALGOS
from networks.archs import ARCHS
from networks.args import parse as parsing
from networks.args.parse import NetArgs
from networks.args.table import BY_NAME, TABLE
from networks.hosts import caller


def unread(monkeypatch: pytest.MonkeyPatch, folder: Path) -> set[str]:
    """Rows that nothing reads, over networks of every algorithm from creation to file, and plans of every architecture.

    They are read at their defaults, too, but for the dims of kinds of layers and what goes with use_dora.
    """
    calls: list[NetArgs] = []

    def recording(*args: Any, **kwargs: Any) -> NetArgs:
        calls.append(parsing.parse(*args, **kwargs))
        return calls[-1]

    monkeypatch.setattr(caller, "parse", recording)
    for algo in ALGOS:
        encoder, unet = text_encoder(), sd_unet()
        dora = {"use_dora": "True"} if algo in (BY_NAME["use_dora"].algos or ()) else {}
        network = networks.lora.create_network(1.0, 4, 1, None, encoder, unet, algo=algo, conv_dim="2", **dora)
        network.apply_to(encoder, unet, True, True)
        network.prepare_optimizer_params_with_multiple_te_lrs([1e-3], 1e-2, 1e-2)
        draw(unet)
        network.save_weights(str(folder / f"{algo}.safetensors"), None, {})
    for spec in ARCHS:
        models = toy(spec.name) if spec.name not in ("sd", "sdxl") else {"unet": sd_unet()}
        encoders = [models.get(part.name) for part in spec.text_encoders]
        kinds = {name: "2" for name, _ in (*spec.layer_dims, *spec.layer_alphas)}
        networks.lora.plan(4, 1, encoders, models[spec.denoiser.name], **kinds)
    return {arg.name for arg in parsing.TABLE}.difference(*(args.read for args in calls))


def test_every_argument_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = unread(monkeypatch, tmp_path)
    assert not rows, (
        f"no code reads {sorted(rows)}: read it where it acts, as args.NAME, or take its row out of the table"
    )


def test_a_row_that_no_code_reads_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """So the test above fails for a row that is only written into the table."""
    row = replace(BY_NAME["verbose"], name="frobnicate", aliases=())
    monkeypatch.setattr(parsing, "TABLE", (*TABLE, row))
    monkeypatch.setitem(BY_NAME, "frobnicate", row)
    assert "frobnicate" in unread(monkeypatch, tmp_path)


def test_looking_is_no_reading() -> None:
    args = NetArgs({"a": 1, "b": 2, "c": 3}, frozenset({"a"}))
    assert args.values["c"] == 3 and args.read == set()
    assert args.a == 1 and args.pick(["b"]) == {"b": 2} and args.read == {"a", "b"}
    assert replace(args, host="musubi").read is args.read
    with pytest.raises(AttributeError):
        args.d  # noqa: B018
