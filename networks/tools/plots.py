"""The picture of a file: where its updates are, how fast its singular values fall, and what each dim would keep."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..files.outputs import write_atomically
from .spectra import Spectra, Spectrum

KINDS = 9  # that have a colour of their own
_OTHERS = "others"


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
        figure.suptitle(f"{found.file.name}: {len(found.layers)} layers of up to {found.most} ranks")
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


def _norms(axes: Any, layers: Sequence[Spectrum], colours: dict[str, Any]) -> None:
    relative = all(layer.relative is not None for layer in layers)
    for group, members in reversed(_by_group(layers, colours).items()):
        sizes = [layer.relative if relative else layer.norm for _, layer in members]
        axes.scatter([place for place, _ in members], sizes, s=12, color=colours[group], label=group)
    axes.set(title="length of the update of each layer", xlabel="layer, by part, block and name", yscale="log")
    axes.set_ylabel("beside the length of the weight" if relative else "Frobenius norm")
    axes.grid(alpha=0.3)


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
    axes.set(title="energy that each dim would keep", xlabel="dim", ylabel="share of all squared singular values")
    axes.set_xscale("log", base=2)
    axes.set_xticks(found.dims, [str(dim) for dim in found.dims])
    axes.minorticks_off()
    axes.set_xlim(0.9, found.most * 1.5)
    axes.set_ylim(0, 1.05)
    axes.grid(alpha=0.3)


def _falling(axes: Any, found: Spectra, colours: dict[str, Any]) -> None:
    for group, members in reversed(_by_group(found.layers, colours).items()):
        for _, layer in members:
            values = [s / layer.values[0] for s in layer.values] if layer.values else []
            ranks = [*range(1, len(values) + 1)]
            mark = "." if len(values) == 1 else ""
            axes.plot(
                ranks, values, color=colours[group], alpha=max(0.05, min(0.6, 20 / len(found.layers))), marker=mark
            )
    axes.set(title="singular values of each layer, beside its largest", xlabel="rank", yscale="log")
    axes.grid(alpha=0.3)


def _effective(axes: Any, layers: Sequence[Spectrum], colours: dict[str, Any]) -> None:
    for group, members in reversed(_by_group(layers, colours).items()):
        ranks = [layer.effective_rank for _, layer in members]
        axes.scatter([place for place, _ in members], ranks, s=12, color=colours[group])
    axes.set(
        title="effective rank of each layer",
        xlabel="layer, by part, block and name",
        ylabel="as many equal directions",
    )
    axes.set_ylim(0)
    axes.grid(alpha=0.3)
