"""docs/plan.md, from the rules of selection and the order of values."""

from __future__ import annotations

from networks.plan.render import markdown

_HEAD = """# Before you train

A plan shows every layer with its rank, real strength, learning rate and size, before a model is loaded:

```bash
kohya-networks plan sdxl --network_module networks.lokr --network_dim 8 --network_args factor=8 conv_dim=4
```

The model is a release by its name and size (`sdxl`, `flux`, `wan2.1-t2v-1.3b`: `kohya-networks plan --help` lists
all, the first line of a plan the other sizes), a diffusers folder (as far as the installed diffusers has its
class), or a release's checkpoint, of which only the header is read. HiDream-O1 has none of these. From a
checkout, `python scripts/plan.py` is the same.

Your own command line is checked without starting the trainer, read as bash, PowerShell or cmd.exe divide it and
as the trainer reads it, with its `--config_file`; all mistakes come at once:

```bash
kohya-networks plan -- accelerate launch wan_train_network.py --task t2v-1.3B ... --network_module networks.lora_wan
```

`kohya-networks plan --command_file train.ps1` reads it from a script, and `kohya-networks plan
sdxl_train_network.py --config settings.toml` from the trainer's settings. In the trainer itself `--network_args
help=True` lists the arguments that apply to this module and model, `dry_run=True` prints the plan; both end the
run there.

A plan has one line per layer: dotted name, saved name, kind, shape, rank, alpha, effective scale, learning rate,
parameters, bytes, or why it is left out; then totals. `--json` is for programs, `--host musubi` for that
trainer's defaults (convolutions, text encoders), `--readers` says which programs will not read the files. `--why
to_k` (a name, a part of one, or a regular expression; `networks.X.plan(...).why(name)` in Python) says for each
such layer what every rule below answers, and which argument gives its dim, alpha and learning rate.

## Which layers are trained, with which values

Made by `python scripts/docs.py` from the rules themselves (`networks/plan/rules.py`, `networks/plan/values.py`).

"""
_TAIL = """
[arguments.md](arguments.md) has each of these arguments, [presets.md](presets.md) what a preset may say.
"""


def page() -> str:
    """docs/plan.md."""
    return _HEAD + markdown() + _TAIL
