"""docs/algorithms.md, from the records of the algorithms and from their classes."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator

import torch
from bench.counting import flops_of

from networks.algos import ALGOS, Adapter, Additive
from networks.args.table import BY_NAME
from networks.records import ALGORITHMS, AlgoSpec
from networks.tensors.geometry import Geometry
from networks.tensors.norms import NormGeometry

from .arguments import by_algo

WIDTH, TOKENS = 1280, 1024
DIMS = {"boft": 10}  # the least that divides WIDTH; all others have 8
_HEAD = f"""# Algorithms

Made by `python scripts/docs.py`: formulas and shapes from `networks/algos/`, the rest from `networks/records/`
and from the classes themselves. `--network_module networks.lokr` names one, and `--network_args "algo=NAME"`
chooses one in any module. Which of them for what, with sources, says [which-algorithm.md](which-algorithm.md).

![The demo's task by every algorithm](../scripts/emoji/algorithms.png)

Letters: W [O, I, *kernel] is the weight of a layer and dW its change; O and I are output and input features, K
the positions of a kernel, R the rank (`network_dim`), B the size of a block. `scale` multiplies dW. In a file,
the alpha of a layer is scale x rank, so that readers which divide it by the rank get the strength that was
trained.

## What they cost

On a Linear of {WIDTH} x {WIDTH} ({WIDTH * WIDTH + WIDTH:,} values with its bias) at dim 8 (boft: {DIMS["boft"]},
the least that divides {WIDTH}). Values are those that are trained. Products are those of forward and backward,
beside the frozen layer's own (100 %), of {TOKENS} tokens; what is no product, such as a factor for each feature,
is not counted. LoRA-FA saves a sixth of what stands here, the gradient of `down`; DyLoRA's number is that of a
step in which all ranks act and learn. [cost.md](cost.md) has times and memory.
"""


def page() -> str:
    """docs/algorithms.md."""
    lines = ["| algorithm | values | of the layer's | products | scale |", "| --- | --- | --- | --- | --- |"]
    for name, cls in ALGOS.items():
        values, products = cost(cls)
        share = 100 * values / (WIDTH * WIDTH + WIDTH)
        cells = f"[{name}](#{name})", f"{values:,}", f"{share:.2f} %", f"{100 * products:.1f} %", cls.spec.about.scale
        lines.append(f"| {' | '.join(cells)} |")
    sections = ["\n".join(_section(cls)) for cls in ALGOS.values()]
    options = "## Options\n\nAll others act with all of them; [arguments.md](arguments.md) has each.\n\n"
    linked = by_algo().replace("](#", "](arguments.md#")
    return "\n".join([_HEAD, *lines, "", *sections, options + linked])


def cost(cls: type[Adapter]) -> tuple[int, float]:
    """(Values trained, products of a step over those of the frozen layer) of the layer that the page speaks of."""
    adapter = cls(_geometry(cls.spec), DIMS.get(cls.spec.name, 8), {})
    trained = sum(p.numel() for p in adapter.parameters() if p.requires_grad)
    own = 0.0 if cls.spec.family == "norm" else _products(adapter)
    return trained, own / (4 * TOKENS * WIDTH * WIDTH)


def _geometry(spec: AlgoSpec) -> Geometry:
    if spec.family == "norm":
        return NormGeometry.of(torch.nn.LayerNorm(WIDTH))  # type: ignore[return-value]
    return Geometry(WIDTH, WIDTH, bias=True)


def _products(adapter: Adapter) -> float:
    if isinstance(adapter, Additive):
        return min(adapter.flops(TOKENS))
    x = torch.randn(TOKENS, WIDTH, requires_grad=True)
    return flops_of(lambda: adapter.change(x, 1).sum().backward())  # type: ignore[operator]


def _section(cls: type[Adapter]) -> Iterator[str]:
    spec = cls.spec
    title, formulas, shapes = _of_docstring(cls)
    yield from (f"## {spec.name}", "", title, "", spec.about.use, "", "```text", *formulas, "```", "")
    if shapes:
        yield from ("Trained:", "", "```text", *shapes, "```", "")
    yield from (f"- {name}: {text}" for name, text in _facts(spec).items() if text)
    yield ""


def _facts(spec: AlgoSpec) -> dict[str, str]:
    keys = ALGORITHMS[spec.file_algo]
    absent = set() if spec.shifts else {keys.bias_name}
    absent |= {keys.core} if "use_tucker" not in spec.takes else set()
    names = [key for name, key in keys.keys.items() if name not in absent]
    more = ["`.alpha`"] * spec.saves_alpha + ["`.dora_scale` with `use_dora`"] * ("use_dora" in spec.features)
    own = sorted(spec.takes, key=list(BY_NAME).index)
    return {
        "papers": "; ".join(f"{title} ({number})" for number, title in spec.about.papers),
        "scale": spec.about.scale,
        "options that not all have": ", ".join(f"[`{name}`](arguments.md#{name})" for name in own),
        "in a file": ", ".join([*(f"`.{key}`" for key in names), *more]) + ", behind the name of a layer",
        "read as well": ", ".join(f"`.{key}`" for key in sorted(keys.more_keys)),
    }


def _of_docstring(cls: type[Adapter]) -> tuple[str, list[str], list[str]]:
    """(First line, formulas, shapes) of the text at the head of an algorithm's file."""
    text = inspect.getdoc(inspect.getmodule(cls)) or ""
    head, _, tail = text.partition("\nParameters")
    title, *paragraphs = re.split(r"\n\s*\n", head.strip())
    formulas = [line for one in paragraphs if one.startswith("    ") for line in [*one.splitlines(), ""]]
    shapes = [line for line in tail.partition("\n\n")[0].splitlines()[1:] if line.startswith("  ")]
    return " ".join(title.split()), _dedented(formulas[:-1]), _dedented(shapes)


def _dedented(lines: list[str]) -> list[str]:
    return [line.removeprefix("    ") for line in lines]
