"""docs/presets.md, from presets/."""

from __future__ import annotations

from networks.args.presets import markdown

_HEAD = """# Presets

`preset=NAME` says which layers are trained, and with what, in every module and on every trainer:

```bash
accelerate launch sdxl_train_network.py ... --network_module networks.lokr --network_args "factor=8" "preset=attn-mlp"
```

Made by `python scripts/docs.py` from the files in `presets/`; arguments that speak of single layers
(`network_reg_dims`, `block_dims`, ...) go before a preset, and [plan.md](plan.md) has the order of all rules.

"""
_OWN = """
## One of your own

`preset=mine.toml` takes a file. Copy one of `presets/`, change it, and look at what it selects with
`kohya-networks plan sdxl --network_args preset=mine.toml`. Every layer may have its own algorithm, dim, alpha and
form:

```toml
enable_conv = false
unet_target_module = ["*", "ResnetBlock2D"]   # * = what the architecture trains anyway, also if the key is missing
unet_only_name = ["down_blocks\\\\..*"]          # and of these only such layers (text_encoder_only_name likewise)
exclude_name = [".*attn2.*"]
[module_algo_map.Attention]                   # below such modules, the innermost wins
algo = "lokr"
factor = 8
[name_algo_map."to_q"]                        # before module_algo_map
dim = 16
alpha = 8
```

The schema is that of LyCORIS, so its files work as they are; `description`, `architectures`, `unet_only_name`,
`text_encoder_only_name` and `*` are ours. An unknown key is an error.

| key | what it says |
| --- | --- |
| `description`, `architectures` | for people: what it is, and for which models it is meant |
| `enable_conv` | whether kernels above 1x1 are trained |
| `unet_target_module`, `text_encoder_target_module` | classes below which all is trained; `target_module` = both |
| `unet_target_name`, `text_encoder_target_name` | patterns of layers that join them; `target_name` = both |
| `unet_only_name`, `text_encoder_only_name` | patterns one of which every layer must match |
| `exclude_name` | patterns left out, whatever else the preset says |
| `module_algo_map` | class name -> `algo`, `dim`, `alpha` and other options of the layers below it |
| `name_algo_map` | pattern -> the same; the first that matches, before `module_algo_map` |
| `use_fnmatch` | patterns are file name patterns, `*attn*`, on the whole dotted name |
| `lora_prefix` | the denoiser's layers are `PREFIX_...` in files: `lycoris` loads everywhere, others with this preset |

A pattern is a regular expression on the whole dotted name, its beginning (as in LyCORIS) or its last components;
it may begin with a part, `text_encoder1:`.

`networks.lycoris` stands in for `lycoris.kohya`, with its default `preset=full`: see
[from-lycoris.md](from-lycoris.md).
"""


def page() -> str:
    """docs/presets.md."""
    return _HEAD + markdown() + _OWN
