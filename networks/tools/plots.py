"""The picture of a file: where its updates are, how fast its singular values fall, and what each dim would keep."""

from __future__ import annotations

import itertools
import math
import re
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..files.outputs import write_atomically
from .spectra import SHARES, Spectra, Spectrum

KINDS = 9  # that have a colour of their own
LABELS = 36  # of blocks on an axis, which can be read
SINGLE = 60  # layers of which each has a line of its own that can be seen
_OTHERS = "others"
_BLOCK = re.compile(r"[._]*(.*?)[._]*(\d+)(?:[._]|$)")


def draw(found: Spectra, out: Path) -> None:
    """Write the picture of a file, as PNG.

    Raises:
        ImportError: matplotlib is missing.
        OSError: it cannot be written.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("--plot wants matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, ((norms, kept), (falling, effective)) = pyplot.subplots(2, 2, figsize=(14, 9.5), constrained_layout=True)
    try:
        title = f"{found.file.name}: {len(found.layers)} layers of up to {found.most} ranks"
        figure.suptitle(title, parse_math=False)  # a name may have $ in it
        colours = _colours(found.layers, pyplot.get_cmap("tab10"))
        _norms(norms, found.layers, colours)
        _kept(kept, found)
        _falling(falling, found, colours)
        _effective(effective, found.layers, colours)
        handles, labels = norms.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
        write_atomically(out, lambda part: figure.savefig(part, dpi=110, format="png"))
    finally:
        pyplot.close(figure)


def _group(layer: Spectrum) -> str:
    """The part and the end of a kind's name: one colour for the same layer of all blocks and depths."""
    words = [word for word in layer.kind.removeprefix(layer.part).replace(".", "_").split("_") if word not in ("#", "")]
    return f"{layer.part}: …{'_'.join(words[-3:])}"


def _colours(layers: Sequence[Spectrum], colours: Any) -> dict[str, Any]:
    """Group -> its colour, of the groups with most energy; the others share grey."""
    energy = Counter[str]()
    for layer in layers:
        energy[_group(layer)] += layer.norm**2  # type: ignore[assignment]
    found: dict[str, Any] = {group: colours(i) for i, (group, _) in enumerate(energy.most_common(KINDS))}
    return found | ({_OTHERS: "lightgrey"} if len(energy) > len(found) else {})


def _by_group(layers: Sequence[Spectrum], colours: dict[str, Any]) -> dict[str, list[tuple[int, Spectrum]]]:
    groups: dict[str, list[tuple[int, Spectrum]]] = {group: [] for group in colours}
    for place, layer in enumerate(layers):
        group = _group(layer)
        groups[group if group in colours else _OTHERS].append((place, layer))
    return groups


def _block(layer: Spectrum) -> tuple[str, str, str]:
    """(part, what it is one of, number), of the block in a layer's name: `unet`, `double_blocks`, `7`."""
    found = _BLOCK.match(layer.name.removeprefix(layer.part))
    stem, number = found.groups() if found else ("", "")
    words = re.split("[._]", stem)
    return layer.part.removeprefix("lora_"), "_".join(words if len(words) < 4 else words[-2:]), number


def _along_blocks(axes: Any, layers: Sequence[Spectrum], values: Sequence[float]) -> None:
    """The axis of all layers: names of blocks, a line where another kind of block begins, and for each block a bar at
    the root mean square of its layers."""
    start, before, ticks = 0, ("", ""), dict[int, str]()
    for (part, stem, number), members in itertools.groupby(layers, _block):
        stop = start + len([*members])
        bar = math.sqrt(math.fsum(value**2 for value in values[start:stop]) / (stop - start))
        axes.plot([start - 0.5, stop - 0.5], [bar, bar], color="black", linewidth=1.2)
        if (part, stem) != before:
            axes.axvline(start - 0.5, color="grey", linewidth=0.6)
        if start - max(ticks, default=-len(layers)) >= len(layers) / LABELS:
            ticks[start] = " ".join(filter(None, ("" if part == before[0] else part, stem, number))) or "no block"
        start, before = stop, (part, stem)
    axes.set_xticks([*ticks], [*ticks.values()], rotation=90, fontsize=7)
    axes.set_xlim(-0.5 - 0.01 * len(layers), len(layers) * 1.01 - 0.5)
    axes.grid(alpha=0.3, axis="y")


def _norms(axes: Any, layers: Sequence[Spectrum], colours: dict[str, Any]) -> None:
    relative = all(layer.relative is not None for layer in layers)
    sizes = [(layer.relative if relative else layer.norm) or 0.0 for layer in layers]
    for group, members in reversed(_by_group(layers, colours).items()):
        places = [place for place, _ in members]
        axes.scatter(places, [sizes[i] for i in places], s=12, color=colours[group], label=group)
    _along_blocks(axes, layers, sizes)
    axes.set(title="length of the update of each layer; bars: root mean square of a block")
    axes.set_yscale("log" if any(sizes) else "linear")
    axes.set_ylabel("beside the length of the weight" if relative else "Frobenius norm")


def _kept(axes: Any, found: Spectra) -> None:
    dims = [*range(1, found.most + 1)] or [1]
    axes.plot(dims, [found.kept(dim) for dim in dims], color="black")
    for dim in found.dims:
        axes.plot(dim, found.kept(dim), "o", color="black", markersize=4)
        axes.annotate(
            f"{dim}: {found.kept(dim):.1%}",
            (dim, found.kept(dim)),
            xytext=(5, -11),
            textcoords="offset points",
            fontsize=8,
        )
    enough = ", ".join(f"{share:.0%} from dim {found.dim_for(share)}" for share in SHARES)
    axes.set(title=f"energy that each dim would keep: {enough}", xlabel="dim")
    axes.set_ylabel("share of all squared singular values")
    axes.set_xscale("log", base=2)
    axes.set_xticks(found.dims, [str(dim) for dim in found.dims])
    axes.minorticks_off()
    axes.set_xlim(0.9, max(2, found.most) * 2)
    axes.set_ylim(0, 1.05)
    axes.grid(alpha=0.3)


def _falling(axes: Any, found: Spectra, colours: dict[str, Any]) -> None:
    """Each layer as a thin line; of many the median of each colour."""
    many, lowest = len(found.layers) > SINGLE, list[float]()
    style = {"linewidth": 0.5, "alpha": max(0.04, 20 / len(found.layers))} if many else {"alpha": 0.7}
    for group, members in reversed(_by_group(found.layers, colours).items()):
        lines = [[s / layer.values[0] for s in layer.values] for _, layer in members if layer.values]
        for line in lines:
            axes.plot([*range(1, len(line) + 1)], line, "." * (len(line) == 1), color=colours[group], **style)
        if many and lines:
            middle = _medians(lines)
            axes.plot([*range(1, len(middle) + 1)], middle, color=colours[group], linewidth=2)
            lowest.append(middle[-1])
    if lowest:  # a few layers far below would make all others flat
        axes.set_ylim(min(lowest) / 5, 1.5)
    shown = "thick: the median of a colour" if many else "a line for each layer"
    axes.set(title=f"singular values beside the largest of their layer; {shown}", xlabel="rank")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_yscale("log" if any(layer.values for layer in found.layers) else "linear")
    axes.grid(alpha=0.3)


def _medians(lines: Sequence[Sequence[float]]) -> list[float]:
    """At each rank, of the layers that have so many."""
    columns = itertools.zip_longest(*lines)
    return [statistics.median([s for s in column if s is not None]) for column in columns]


def _effective(axes: Any, layers: Sequence[Spectrum], colours: dict[str, Any]) -> None:
    ranks = [layer.effective_rank for layer in layers]
    for group, members in reversed(_by_group(layers, colours).items()):
        places = [place for place, _ in members]
        axes.scatter(places, [ranks[i] for i in places], s=12, color=colours[group])
    _along_blocks(axes, layers, ranks)
    axes.set(title="effective rank of each layer", ylabel="as many equal directions")
    axes.set_ylim(0)
