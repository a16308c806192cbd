"""An argument without effect is a mistake, or at least worth a note: what a finished plan says about the arguments."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..algos import ALGOS
from ..args.parse import Problems
from ..args.table import BY_NAME, OWN_STYLES
from ..files.dialects import DIALECTS
from ..tensors.norms import NormGeometry

if TYPE_CHECKING:
    from .plan import Plan, PlanRow, Request

_DECIDED_BY_FILE = frozenset(
    "preset train_norm conv_dim conv_alpha block_dims block_alphas conv_block_dims conv_block_alphas network_reg_dims "
    "network_reg_alphas rs_lora algo use_tucker factor decompose_both full_matrix "
    "unbalanced_factorization init init_seed".split()
)
_OF_TIME = {"min_rank", "alpha_rank_scale", "mask_group_id"}
_TUCKER = {"mid", "t1", "t2"}


def check(plan: Plan, request: Request, deciding: set[tuple[str, str]], problems: Problems) -> list[str]:
    """Report arguments that change nothing.

    Args:
        deciding: (argument, pattern) of every expression that had its way with some layer.

    Returns:
        Notes for the user, one sentence each.
    """
    trained, args = plan.trained, request.args
    if not trained:
        if not problems.messages:
            problems.add(_nothing(plan, request))
        return []
    notes: list[str] = []
    _expressions(request, deciding, problems)
    _dropouts(trained, args, problems, notes)
    if args.bypass_mode is not None:
        form = "factored form" if args.bypass_mode else "whole weight change (layers with dropout: factored form)"
        notes.append(f"bypass_mode={args.bypass_mode}: updates act through their {form}; the same numbers")
    _loraplus(trained, request, problems, notes)
    _loraplus_mode(trained, args, problems)
    _dora(trained, args, problems, notes)
    _starts(trained, problems, notes)
    _times(trained, request, problems)
    _rotations(trained, args, notes)
    if (args.ggpo_sigma is None) != (args.ggpo_beta is None):
        problems.add("ggpo_sigma and ggpo_beta work together: give both, or neither")
    if request.saved is not None:
        decided = sorted(args.given & _DECIDED_BY_FILE)
        if decided:
            notes.append(f"{', '.join(decided)}: not used, the file decides dims, alphas and forms")
        return notes
    _norms(plan, args, problems)
    _kinds(request, deciding, problems)
    _splits(trained, request, problems)
    _forms(trained, args, ("conv_dim", "") in deciding, problems, notes)
    return notes


def _expressions(request: Request, deciding: set[tuple[str, str]], problems: Problems) -> None:
    """Every regular expression must win somewhere."""
    arguments: dict[str, Sequence[str] | Mapping[str, Any]] = {"network_reg_lrs": request.args.network_reg_lrs}
    if request.saved is None:  # what was left out when a file was made is not in it
        arguments["exclude_patterns"] = request.args.exclude_patterns
        arguments["network_reg_dims"] = request.args.network_reg_dims
        arguments["network_reg_alphas"] = request.args.network_reg_alphas
    for argument, patterns in arguments.items():
        for pattern in patterns:
            if (argument, pattern) not in deciding:
                problems.add(
                    f"{argument}: {pattern!r} decides no layer: those that it matches are left out, have no use for "
                    "it, or belong to an earlier expression (the first match wins)"
                )


def _dropouts(trained: Sequence[PlanRow], args: Any, problems: Problems, notes: list[str]) -> None:
    usual = BY_NAME["rank_dropout_scale"].default_at((args.style, args.host), {})
    if args.rank_dropout_scale != usual and not args.rank_dropout:
        problems.add(f"rank_dropout_scale={args.rank_dropout_scale} has no effect without rank_dropout")
    if not (args.dropout or args.rank_dropout):
        return
    without = sum(not row.rank_axis for row in trained)
    if without == len(trained):
        problems.add("dropout and rank_dropout have no effect: no trained layer has a rank activation")
    elif without:
        notes.append(f"{without} of {len(trained)} layers have no rank activation: no dropout, rank_dropout")


def _loraplus(trained: Sequence[PlanRow], request: Request, problems: Problems, notes: list[str]) -> None:
    denoiser, args = request.arch.denoiser.name, request.args
    parts = {row.part == denoiser for row in trained}
    ratios = ("loraplus_lr_ratio", "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio")
    given = [name for name in ratios if getattr(args, name) not in (None, 1.0)]
    alone = [row.algo for row in trained if not ALGOS[row.algo].spec.plus]
    algos, words = ", ".join(sorted(set(alone))), "such layers have no pair of factors, so one learning rate"
    if given and len(alone) == len(trained):
        problems.add(f"{given[0]} has no effect with {algos}: {words}")
    elif given and alone:
        notes.append(
            f"{given[0]} acts on {len(trained) - len(alone)} of {len(trained)} layers, not on {algos}: {words}"
        )
    for argument, here in (("loraplus_unet_lr_ratio", True), ("loraplus_text_encoder_lr_ratio", False)):
        if getattr(args, argument) not in (None, 1.0) and here not in parts:
            problems.add(f"{argument} has no effect: no layer of that part is trained")


def _loraplus_mode(trained: Sequence[PlanRow], args: Any, problems: Problems) -> None:
    if args.loraplus_mode != "reparam":
        return
    if all(row.plus_unit == 1 for row in trained):
        problems.add("loraplus_mode=reparam has no effect without a ratio: give loraplus_lr_ratio=8 or the like")
    if any(row.plus_unit == 0 for row in trained):
        problems.add("a LoRA+ ratio of 0 cannot be folded in: leave out loraplus_mode=reparam")


def _dora(trained: Sequence[PlanRow], args: Any, problems: Problems, notes: list[str]) -> None:
    on = [row for row in trained if row.dora]
    off = Counter(row.plain for row in trained if row.plain)
    reasons = ", ".join(f"{n} {reason}" for reason, n in off.items())
    if off and not on:
        problems.add(f"use_dora is left on no layer: off on {reasons}; leave one of the two out")
    elif args.use_dora and on:
        notes.append(f"DoRA on {len(on)} layers" + (f", off on {reasons}" if off else ""))
    if "wd_on_output" in args.given and not args.wd_on_output and not on:
        problems.add("wd_on_output has no effect without use_dora")
    if any(row.dora == "output" for row in on) and not DIALECTS[args.save_format].fold_flag:
        notes.append(
            "DoRA on the output side is exact in LyCORIS and PEFT; ComfyUI and Forge divide by the norm of the base "
            "weight alone, A1111 and InvokeAI misread it: wd_on_output=False is exact in all of these but PEFT, "
            "save_format=comfyui in ComfyUI"
        )


def _norms(plan: Plan, args: Any, problems: Problems) -> None:
    if args.train_norm == "false" or any(isinstance(row.geometry, NormGeometry) for row in plan.trained):
        return
    reasons = sorted({row.reason for row in plan.rows if isinstance(row.geometry, NormGeometry)})
    problems.add(
        f"train_norm={args.train_norm} has no effect: no normalisation layer is left to train"
        + (f"; the reasons: {'; '.join(reasons[:4])}" if reasons else ", this model has none")
    )


def unmergeable(plan: Plan) -> list[str]:
    """A warning if layers are trained to which no other program could add anything."""
    bare = [row for row in plan.trained if isinstance(row.geometry, NormGeometry) and not row.geometry.affine]
    if not bare:
        return []
    return [
        f"{len(bare)} of {len(plan.trained)} layers are normalisations without a weight of their own, such as "
        f"{bare[0].dotted_name}: what they learn acts where these modules apply the file, cannot be merged, and other "
        "programs leave it out; train_norm=affine trains the others only"
    ]


def _starts(trained: Sequence[PlanRow], problems: Problems, notes: list[str]) -> None:
    reasons = {(row.init, row.algo): ALGOS[row.algo].no_start(row.init, row.options) for row in trained}
    for (init, algo), reason in reasons.items():
        if reason:
            problems.add(f"init={init} does not go with algo={algo}: {reason}")
    kept = [row for row in trained if row.init == "pissa" and ALGOS[row.algo].spec.keeps_start]
    if kept:
        size = 4 * sum(row.layout.parameters for row in kept) / 2**20
        notes.append(
            f"init=pissa on {len(kept)} layers: read from the base weights when the network is applied; the start is "
            f"kept beside the parameters ({size:.1f} MiB), files hold the difference from it with twice the dim"
        )
    own = [row for row in trained if row.layout.stacked > 1 and not row.split]
    if own:
        size = 4 * sum(row.layout.parameters for row in own) / 2**20
        notes.append(
            f"{own[0].algo} on {len(own)} layers: the start is kept beside the parameters ({size:.1f} MiB), files are "
            f"{ALGOS[own[0].algo].spec.form} with {own[0].layout.stacked} times the dim"
        )


def _times(trained: Sequence[PlanRow], request: Request, problems: Problems) -> None:
    """Ranks follow the timestep in the denoiser alone."""
    timed = (
        {name for row in trained if ALGOS[row.algo].spec.timed for name in row.options} & _OF_TIME & request.args.given
    )
    denoiser = request.arch.denoiser.name
    if timed and not any(ALGOS[row.algo].spec.timed and row.part == denoiser for row in trained):
        problems.add(f"{', '.join(sorted(timed))}: no effect, text encoders are told no timestep")


def _rotations(trained: Sequence[PlanRow], args: Any, notes: list[str]) -> None:
    """How much rotations may turn, and how many there are."""
    limits = [row.options["constraint"] for row in trained if row.options.get("constraint")]
    if args.style in OWN_STYLES and limits and max(limits) >= 1:
        notes.append(
            f"network_alpha={max(limits):g} is the constraint of the rotations, and next to none: sd-scripts "
            "recommends values such as 1e-3"
        )
    fewer = [row for row in trained if row.options.get("dim_is_count") and _fewer_blocks(row)]
    if fewer:
        notes.append(
            f"{len(fewer)} of {len(trained)} layers have fewer blocks than network_dim, which does not divide their "
            f"width, such as {fewer[0].dotted_name}; sd-scripts' own modules refuse such a model, and such a file"
        )


def _fewer_blocks(row: PlanRow) -> bool:
    return any(shape[0] < row.dim for shape in row.layout.shapes.values() if len(shape) == 3)


def _splits(trained: Sequence[PlanRow], request: Request, problems: Problems) -> None:
    if "split_qkv" in request.args.given and request.args.split_qkv and not any(row.split for row in trained):
        problems.add("split_qkv has no effect: no layer with fused projections is left to train")


def _kinds(request: Request, deciding: set[tuple[str, str]], problems: Problems) -> None:
    """A dim for a kind of layer must reach one."""
    for argument in {name for name, _ in request.arch.layer_dims} & request.args.given:
        if (argument, "") not in deciding:
            problems.add(f"{argument} has no effect: no such layer is left to train, or network_reg_dims decides them")


def _forms(trained: Sequence[PlanRow], args: Any, conv: bool, problems: Problems, notes: list[str]) -> None:
    shapes = [row.layout.shapes.keys() for row in trained]
    if args.use_tucker and not any(_TUCKER & names for names in shapes):
        more = "" if args.conv_dim else "; give conv_dim to train convolutions"
        problems.add(f"use_tucker has no effect: no trained layer has a low-rank kernel above 1x1{more}")
    if "conv_dim" in args.given and args.conv_dim and not conv:
        problems.add("conv_dim has no effect: no trained layer is in a convolutional block or has a kernel above 1x1")
    if args.enable_conv and not conv:
        problems.add("enable_conv has no effect: no trained layer is in a convolutional block")
    if args.decompose_both and not any("w1_a" in names for names in shapes):
        problems.add("decompose_both has no effect: no first factor is larger than twice the dim; lower network_dim")
    above = [row for row in trained if row.layout.rank_axis and row.dim > min(row.shape[0], row.geometry.columns)]
    if above:
        notes.append(
            f"{len(above)} of {len(trained)} layers have a dim above the full rank of their weight, such as "
            f"{above[0].dotted_name} ({above[0].dim} above {min(above[0].shape[0], above[0].geometry.columns)})"
        )
    unscaled = sum(row.layout.rank is None for row in trained)
    if unscaled and args.style not in OWN_STYLES:
        whole = any("w2" in names for names in shapes) and not args.full_matrix
        hint = " (the dim reaches half of the larger factor; full_matrix=True says so openly)" if whole else ""
        what = "whole factors" if any("w2" in names for names in shapes) else "no rank"
        notes.append(
            f"{unscaled} of {len(trained)} layers have {what}, so scale 1 whatever alpha and rs_lora say{hint}"
        )


def _nothing(plan: Plan, request: Request) -> str:
    if request.saved is not None:
        theirs, ours = next(iter(request.saved), "-"), plan.rows[0].saved_name if plan.rows else "-"
        return (
            f"no layer of {request.source} belongs to this model ({request.arch.title}): the file has names like "
            f"{theirs}, the model like {ours}; choose a file of this architecture"
        )
    reasons = sorted({row.reason for row in plan.rows})
    return (
        f"no layer is left to train; the reasons: {'; '.join(reasons[:6]) or 'the model has no Linear or convolution'}"
    )
