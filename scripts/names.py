"""Records what is known of architectures: names of layers for the tests, outlines of released models for planning.

    python scripts/names.py                  # everything
    python scripts/names.py flux sd3         # these architectures
    python scripts/names.py --skeletons      # only networks/models/skeletons
    python scripts/names.py --check          # compare, write nothing
    python scripts/names.py wan --factory my_module:build    # names from a class that only its trainer has

Names (tests/names/ARCH.txt) come from the class that trainers load. Where that is diffusers' own, it is built here; for
another, give a function that returns its parts by name, {"dit": model, ...}, of full size; the meta device is the
default while it runs. Outlines come from the classes of diffusers and transformers, by the sizes in the record of the
architecture, or, where diffusers has no such class, from that function. What cannot be built here stays as it was
recorded, and one line says why.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # this checkout's networks, whatever is installed

from registry_archs import SPECS, ArchData, data_of  # noqa: E402
from torch import nn  # noqa: E402

import networks.lora  # noqa: E402
from networks.archs import ArchSpec  # noqa: E402
from networks.args.coerce import nearest  # noqa: E402
from networks.cli.command_line import run_program  # noqa: E402
from networks.models import outline  # noqa: E402
from networks.models.libraries import denoiser_of, encoder_of, on_meta  # noqa: E402
from networks.models.skeleton import OUTLINES  # noqa: E402

NAMES = ROOT / "tests" / "names"
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archs", nargs="*", metavar="ARCH", help=f"all, or some of: {', '.join(SPECS)}")
    parser.add_argument("--skeletons", action="store_true", help="record only the outlines of released models")
    parser.add_argument("--check", action="store_true", help="compare with what is recorded; exit 1 if it differs")
    parser.add_argument("--factory", metavar="MODULE:FUNCTION", help="builds the trainer's own class of one ARCH")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return run_program(record, build_parser(), sys.argv[1:] if argv is None else list(argv))


def record(args: argparse.Namespace) -> int:
    _check(args)
    different = []
    for arch in [SPECS[name] for name in args.archs] or SPECS.values():
        for path, text in recordings(arch, args.factory, only_skeletons=args.skeletons):
            if path.is_file() and path.read_text(encoding="utf-8") == text:
                continue
            different.append(path)
            print(f"{path.relative_to(ROOT)}: {'differs from its class' if args.check else 'recorded'}")
            if not args.check:
                path.write_text(text, encoding="utf-8", newline="\n")
    return int(args.check and bool(different))


def _check(args: argparse.Namespace) -> None:
    unknown = [name for name in args.archs if name not in SPECS]
    if unknown:
        raise ValueError(f"{unknown[0]} is no architecture; there are {', '.join(SPECS)}{nearest(unknown[0], SPECS)}")
    if args.factory and len(args.archs) != 1:
        raise ValueError(
            "--factory builds the class of one architecture: name that, as in `names.py wan --factory ...`"
        )


def recordings(arch: ArchSpec, factory: str | None = None, only_skeletons: bool = False) -> Iterator[tuple[Path, str]]:
    """File -> what belongs into it, of all that can be built here; the rest is said.

    Args:
        factory: `module:function` that builds the trainer's own class.
        only_skeletons: no names.
    """
    if not only_skeletons:
        try:
            yield NAMES / f"{arch.name}.txt", names_of(arch, data_of(arch.name), _parts(arch, factory))
        except (ValueError, ImportError) as error:
            print(f"tests/names/{arch.name}.txt stays as it is: {error}")
    for release in arch.releases:
        try:
            model = denoiser_of(release) if release.denoiser else _parts(arch, factory)[arch.denoiser.name]
            yield OUTLINES / f"{release.name}.txt", outline.write(model)
            for encoder in filter(None, release.text_encoders):
                yield OUTLINES / f"{encoder.name}.txt", outline.write(encoder_of(encoder))
        except ValueError as error:
            print(f"the outlines of {release.name} stay as they are: {error}")


def names_of(arch: ArchSpec, data: ArchData, parts: dict[str, nn.Module]) -> str:
    """Every Linear, convolution and container of a model, with the saved name and the block number that an adapter of
    it has under the arguments that train most.

    Args:
        parts: the denoiser and text encoders by the names of their parts.
    """
    denoiser = parts[arch.denoiser.name]
    for attribute, value, _ in arch.denoiser.tasks:
        setattr(denoiser, attribute, value)
    plan = networks.lora.plan(4, 1, [parts.get(one.name) for one in arch.text_encoders], denoiser, **data.widest)
    trained = {(row.part, row.dotted_name): row for row in plan.trained}
    lines = [f"# part, dotted name, class, weight shape, saved name, block: {data.source or DIFFUSERS}"]
    for part in arch.parts:
        if part.name not in parts:
            continue
        lines.append(f"{part.name}\t.\t{type(parts[part.name]).__name__}\t-\t-\t-")
        for path, module in parts[part.name].named_modules():
            row = trained.get((part.name, path))
            saved, block = (row.saved_name, row.block) if row else ("-", None)
            if isinstance(module, LAYERS):
                shape = "x".join(map(str, module.weight.shape))
                cells = path, type(module).__name__, shape, saved, "-" if block is None else str(block)
                lines.append("\t".join((part.name, *cells)))
            elif path and type(module).__name__ in part.every_container | data.bystanders:
                lines.append(f"{part.name}\t{path}\t{type(module).__name__}\t-\t-\t-")
    return "\n".join(lines) + "\n"


DIFFUSERS = "diffusers' own model"


def _parts(arch: ArchSpec, factory: str | None) -> dict[str, nn.Module]:
    if factory:
        module, _, function = factory.partition(":")
        with on_meta():
            built: dict[str, nn.Module] = getattr(importlib.import_module(module), function)()
        return built
    source = data_of(arch.name).source
    if source or not arch.releases:
        raise ValueError(f"it was recorded from {source}, which is not installed here; --factory can build it")
    release = arch.releases[0]
    encoders = zip(arch.text_encoders, release.text_encoders, strict=False)
    built = {part.name: encoder_of(encoder) for part, encoder in encoders if encoder}
    return built | {arch.denoiser.name: denoiser_of(release)}


if __name__ == "__main__":
    raise SystemExit(main())
