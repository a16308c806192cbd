"""An argument without effect is a mistake, or at least worth a note: what a finished plan says about the arguments.

Whether one had an effect is what rules, sources of values and algorithms say of the trained layers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..algos import ALGOS, OF_WEIGHT, Adapter
from ..args.parse import NetArgs, Problems
from ..args.table import BY_NAME, OWN_STYLES, STANDS_FOR
from ..tensors.norms import NormGeometry
from .call import BY_EXPRESSION
from .causes import grouped, subject
from .values import ALPHA, DIM

if TYPE_CHECKING:
    from .call import By
    from .plan import Plan, PlanRow, Request

_CONVOLUTIONS = "no trained layer is in a convolutional block or has a kernel above 1x1"
_BY_NUMBER = {
    "block_dims": "dim", "conv_block_dims": "dim", "block_alphas": "alpha", "conv_block_alphas": "alpha",
    "conv_alpha": "alpha",
}  # fmt: skip
_STANDS_FOR = {"enable_conv": "conv_dim"}
# What else than dims, alphas and options of an algorithm a file decides.
_FORM = frozenset({"algo", "preset", "train_norm", "rs_lora", "init", "init_seed", "init_lokr_norm", "resume_resize"})


def review(plan: Plan, request: Request, used: Collection[By], problems: Problems) -> list[str]:
    """Report arguments that change nothing.

    Args:
        plan: every layer decided.
        request: the call.
        used: (argument, expression) of all that decides something on a trained layer, or leaves one out.
        problems: takes the reports.

    Returns:
        Notes for the user, one sentence each.
    """
    trained, args = plan.trained, request.args
    if not trained:
        if not problems.messages:
            problems.add(_nothing(plan, request))
        return []
    notes: list[str] = []
    _expressions(request, used, problems)
    _dropouts(trained, args, problems, notes)
    if args.bypass_mode is not None:
        form = "factored form" if args.bypass_mode else "whole weight change (layers with dropout: factored form)"
        notes.append(f"bypass_mode={args.bypass_mode}: updates act through their {form}; the same numbers")
    _loraplus(trained, request, problems, notes)
    _loraplus_parts(trained, request, problems)
    _chosen_blocks(trained, request, problems)
    _loraplus_mode(trained, args, problems)
    _time(trained, request, problems)
    _average(args, problems)
    _dora(trained, args, problems)
    notes += _dora_notes(trained, args)
    _starts(trained, problems)
    notes += _start_notes(trained)
    for argument, why in _may_be_idle(request, trained).items():
        if args.asks(argument) and (_STANDS_FOR.get(argument, argument), "") not in used:
            problems.idle(argument, f": {why}")
    notes += _limits(trained, args)
    if (args.ggpo_sigma is None) != (args.ggpo_beta is None):
        problems.add("ggpo_sigma and ggpo_beta work together: give both, or neither")
    if request.saved is not None:
        decided = _decided_by_file(request, used)
        return [
            *notes,
            *([f"{', '.join(decided)}: not used, the file decides dims, alphas and forms"] if decided else []),
        ]
    _norms(plan, args, problems)
    elsewhere = (*_otherwise(trained, args), *_elsewhere(trained, args, problems))
    return [*notes, *_ranks(trained), *_remarks(trained, args), *elsewhere]


def _may_be_idle(request: Request, trained: Sequence[PlanRow]) -> dict[str, str]:
    """Arguments that must act on some layer -> why they may not."""
    trained_ones = [ALGOS[name] for name in sorted({row.algo for row in trained})]
    timed = {name: "text encoders are told no timestep" for algorithm in trained_ones for name in algorithm.spec.timed}
    if request.saved is not None:
        return timed
    preset = request.args.preset
    asked = [ALGOS[name] for name in sorted({request.args.algo, *(preset.algos if preset else ())})]
    found = dict.fromkeys(sorted(_options(asked)), "no trained layer is of an algorithm that takes it") | timed
    found |= {name: why for algorithm in asked for name, (_, why) in algorithm.spec.acts_on.items()}
    kind = "no such layer is left to train, or network_reg_dims decides them"
    found |= {name: kind for name, _ in (*request.arch.layer_dims, *request.arch.layer_alphas)}
    found |= dict.fromkeys(("conv_dim", "enable_conv"), _CONVOLUTIONS)
    found |= {name: f"no trained layer has its {what} from it" for name, what in _BY_NUMBER.items()}
    return found | {"split_qkv": "no layer with fused projections is left to train"}


def _options(algorithms: Iterable[type[Adapter]]) -> set[str]:
    return {name for algorithm in algorithms for name in algorithm.spec.options}


def _decided_by_file(request: Request, used: Collection[By]) -> list[str]:
    """Given arguments that speak of dims, alphas and forms, and decided none."""
    arch = request.arch
    own = {name for source in (*DIM, *ALPHA) for name in source.arguments} | _options(ALGOS.values()) | _FORM
    own |= {name for name, _ in (*arch.layer_dims, *arch.layer_alphas, *arch.extra_dims)}
    return sorted(request.args.given & own - {argument for argument, _ in used})


def _expressions(request: Request, used: Collection[By], problems: Problems) -> None:
    """Every regular expression must win somewhere."""
    always = ("network_reg_lrs", *BY_EXPRESSION.values())
    arguments: dict[str, Sequence[str] | Mapping[str, Any]] = {name: getattr(request.args, name) for name in always}
    if request.saved is None:  # what was left out when a file was made is not in it
        arguments["exclude_patterns"] = request.args.exclude_patterns
        arguments["network_reg_dims"] = request.args.network_reg_dims
        arguments["network_reg_alphas"] = request.args.network_reg_alphas
    for argument, patterns in arguments.items():
        idle = [pattern for pattern in patterns if (argument, pattern) not in used]
        if idle:
            problems.add(
                f"{argument}: {subject(idle, 'decides', 'decide')} no layer: those that match are left out, have no "
                "use for it, or belong to an earlier expression (the first match wins)"
            )


def _dropouts(trained: Sequence[PlanRow], args: NetArgs, problems: Problems, notes: list[str]) -> None:
    scale = _dropout_scale(args)
    if scale and not any(row.dropouts.rank_dropout for row in trained):
        problems.idle("rank_dropout_scale", " without rank_dropout", scale)
    on_rank = [row for row in trained if row.dropouts.dropout or row.dropouts.rank_dropout]
    without = sum(not row.rank_axis for row in on_rank)
    if without and without < len(on_rank):
        notes.append(f"{without} of {len(on_rank)} layers have no rank activation: no dropout, rank_dropout")
    elif without:
        _no_rank(args, scale, problems)


def _dropout_scale(args: NetArgs) -> str:
    """The argument as it is given; "" where it is the default."""
    usual = BY_NAME["rank_dropout_scale"].default_at((args.style, args.host), {})
    return f"rank_dropout_scale={args.rank_dropout_scale}" if args.rank_dropout_scale != usual else ""


def _no_rank(args: NetArgs, scale: str, problems: Problems) -> None:
    asked = {name: "" for name in ("dropout", "rank_dropout") if args.asks(name)}
    for name, shown in (asked | ({"rank_dropout_scale": scale} if scale else {})).items():
        problems.idle(name, ": no trained layer has a rank activation", shown)


def _loraplus(trained: Sequence[PlanRow], request: Request, problems: Problems, notes: list[str]) -> None:
    ratios = ("loraplus_lr_ratio", "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio")
    given = [name for name in ratios if getattr(request.args, name) not in (None, 1.0)]
    alone = [row.algo for row in trained if not ALGOS[row.algo].spec.plus]
    algos, words = ", ".join(sorted(set(alone))), "such layers have no pair of factors, so one learning rate"
    if given and len(alone) == len(trained):
        for name in given:
            problems.idle(name, f" with {algos}: {words}")
    elif given and alone:
        notes.append(
            f"{given[0]} acts on {len(trained) - len(alone)} of {len(trained)} layers, not on {algos}: {words}"
        )


def _loraplus_parts(trained: Sequence[PlanRow], request: Request, problems: Problems) -> None:
    parts = {row.part == request.arch.denoiser.name for row in trained}
    for argument, here in (("loraplus_unet_lr_ratio", True), ("loraplus_text_encoder_lr_ratio", False)):
        if getattr(request.args, argument) not in (None, 1.0) and here not in parts:
            problems.idle(argument, ": no layer of that part is trained")


def _chosen_blocks(trained: Sequence[PlanRow], request: Request, problems: Problems) -> None:
    """Blocks that are chosen by number must not all be left out by something else."""
    names = [row.trainer_name for row in trained if row.part == request.arch.denoiser.name]
    for axis in request.arch.axes:
        chosen = getattr(request.args, axis.argument) if axis.argument else None
        if chosen and not any(axis.index(name) in chosen for name in names):
            problems.idle(axis.argument, ": another argument leaves all these blocks out")


def _loraplus_mode(trained: Sequence[PlanRow], args: NetArgs, problems: Problems) -> None:
    if args.loraplus_mode != "reparam":
        return
    if all(row.plus_unit == 1 for row in trained):
        problems.idle(
            "loraplus_mode", " without a ratio: give loraplus_lr_ratio=8 or the like", "loraplus_mode=reparam"
        )
    if any(row.plus_unit == 0 for row in trained):
        problems.add("a LoRA+ ratio of 0 cannot be folded in: leave out loraplus_mode=reparam")


def _time(trained: Sequence[PlanRow], request: Request, problems: Problems) -> None:
    timed = [row.algo for row in trained if row.part == request.arch.denoiser.name and ALGOS[row.algo].spec.timed]
    if timed and not request.arch.timestep.arguments:
        problems.add(
            f"algo={timed[0]} follows the timestep, and no record says how {request.arch.title} is told it: choose "
            "another algorithm"
        )


def _average(args: NetArgs, problems: Problems) -> None:
    asked = [] if args.ema_decay else [name for name in ("ema_save", "ema_device") if args.asks(name)]
    for name in asked:
        problems.idle(name, " without ema_decay: give one, such as 0.999")


def _dora(trained: Sequence[PlanRow], args: NetArgs, problems: Problems) -> None:
    on = any(row.dora for row in trained)
    off = _plain(trained)
    if off and not on:
        problems.idle("use_dora", f": it is left on no layer, off on {off}; leave one of the two out")
    for name in ("wd_on_output", "dora_lr_ratio"):
        if args.asks(name) and not on and not off:
            problems.idle(name, " without use_dora")


def _dora_notes(trained: Sequence[PlanRow], args: NetArgs) -> list[str]:
    on, off, notes = [row for row in trained if row.dora], _plain(trained), []
    if args.use_dora and on:
        notes.append(f"DoRA on {len(on)} layers" + (f", off on {off}" if off else ""))
    return notes


def _plain(trained: Sequence[PlanRow]) -> str:
    """How many layers are without DoRA, by reason."""
    return ", ".join(f"{n} {reason}" for reason, n in Counter(row.plain for row in trained if row.plain).items())


def _norms(plan: Plan, args: NetArgs, problems: Problems) -> None:
    if args.train_norm == "false" or any(isinstance(row.geometry, NormGeometry) for row in plan.trained):
        return
    reasons = sorted({row.reason for row in plan.rows if isinstance(row.geometry, NormGeometry)})
    why = f"; the reasons: {'; '.join(reasons[:4])}" if reasons else ", this model has none"
    problems.idle("train_norm", f": no normalisation layer is left to train{why}", f"train_norm={args.train_norm}")


def unmergeable(plan: Plan) -> list[str]:
    """A warning if layers are trained to which no other program could add anything."""
    bare = [row for row in plan.trained if isinstance(row.geometry, NormGeometry) and not row.geometry.affine]
    if not bare:
        return []
    return [
        f"{len(bare)} layers are normalisations without a weight of their own, such as "
        f"{bare[0].shown_name}: what they learn acts where these modules apply the file, cannot be merged, and other "
        "programs leave it out; train_norm=affine trains the others only"
    ]


STRONG = 4  # a scale above it is more often an alpha and a dim in the wrong order than meant


def strong(plan: Plan) -> tuple[str, ...]:
    """A warning if updates act many times as strong as usual."""
    rows = [row for row in plan.trained if row.layout.rank is not None and row.alpha / row.dim > STRONG]
    if not rows:
        return ()
    row = rows[0]
    return (
        f"alpha {row.alpha:g} over dim {row.dim} makes the updates of {len(rows)} layers {row.scale:g} times as "
        "strong, which wants a learning rate so much lower: usual is an alpha of at most the dim",
    )


def _starts(trained: Sequence[PlanRow], problems: Problems) -> None:
    reasons = {(row.init, row.algo): ALGOS[row.algo].no_start(row.init, row.options) for row in trained}
    for (init, algo), reason in reasons.items():
        if reason:
            problems.add(f"init={init} does not go with algo={algo}: {reason}")
    perturbed = [row for row in trained if row.start_size is not None]
    own = [(ALGOS[row.algo].no_perturbed_start(row.layout, row.options), row.shown_name) for row in perturbed]
    for text in grouped((reason, name) for reason, name in own if reason):
        problems.add(f"init_lokr_norm: {text}")
    if perturbed and perturbed[0].init != "default":
        problems.add(f"init={perturbed[0].init} and init_lokr_norm are two starts: leave one of the two out")


def _start_notes(trained: Sequence[PlanRow]) -> list[str]:
    """What is kept beside the parameters."""
    notes = []
    for init in OF_WEIGHT:
        kept = [row for row in trained if row.init == init and ALGOS[row.algo].spec.keeps_start]
        notes += [
            f"init={init} on {len(kept)} layers: read from the base weights when the network is applied; the start is "
            f"kept beside the parameters ({_mebibytes(kept)}), files hold the difference from it with twice the dim"
        ] * bool(kept)
    sizes = [row.start_size for row in trained if row.start_size is not None]
    if sizes:
        notes.append(
            f"init_lokr_norm on {len(sizes)} layers: read from the base weights when the network is applied; the "
            f"update starts at about {max(sizes):g} of their size, a run does not begin at the base model"
        )
    own = [row for row in trained if row.layout.stacked > 1 and not row.split]
    if own:
        notes.append(
            f"{own[0].algo} on {len(own)} layers: the start is kept beside the parameters ({_mebibytes(own)}), files "
            f"are {ALGOS[own[0].algo].spec.file_algo} with {own[0].layout.stacked} times the dim"
        )
    return notes


def _mebibytes(rows: Sequence[PlanRow]) -> str:
    return f"{4 * sum(row.layout.parameters for row in rows) / 2**20:.1f} MiB"


def _limits(trained: Sequence[PlanRow], args: NetArgs) -> list[str]:
    """A note where network_alpha is a limit, as in the entries with a style of their own, and next to none."""
    if args.style not in OWN_STYLES:
        return []
    options = [(ALGOS[row.algo].spec.alpha_option, row) for row in trained]
    limit, option = max(((float(row.options.get(name) or 0), name) for name, row in options), default=(0.0, ""))
    if limit < 1:
        return []
    return [
        f"network_alpha={limit:g} is the {option} of the rotations, and next to none: sd-scripts recommends values "
        "such as 1e-3"
    ]


def _ranks(trained: Sequence[PlanRow]) -> list[str]:
    """A note on dims above the full rank."""
    above = [row for row in trained if row.layout.rank_axis and row.dim > min(row.shape[0], row.geometry.columns)]
    if not above:
        return []
    first = above[0]
    return [
        f"{len(above)} of {len(trained)} layers have a dim above the full rank of their weight, such as "
        f"{first.shown_name} ({first.dim} above {min(first.shape[0], first.geometry.columns)})"
    ]


def _remarks(trained: Sequence[PlanRow], args: NetArgs) -> list[str]:
    """What algorithms say of their layers, and which have no rank, unless alpha is a limit there, not a strength."""
    found: dict[str, list[PlanRow]] = {}
    for row in trained:
        remark = ALGOS[row.algo].remark(row.layout, row.dim, row.options)
        if not remark and row.layout.rank is None and args.style not in OWN_STYLES and not _caution(row)[0]:
            remark = _scale_1(args)
        found.setdefault(remark, []).append(row)
    return [
        f"{len(rows)} of {len(trained)} layers, such as {rows[0].shown_name}, have {remark}"
        for remark, rows in found.items()
        if remark
    ]


def _elsewhere(trained: Sequence[PlanRow], args: NetArgs, problems: Problems) -> list[str]:
    """A note on arguments that act as written, while the module that the entry stands for has a value of its own."""
    options = {name for row in trained for name in row.options}
    told = [
        f"{name}={args.values[name]} (there {value})"
        for name in sorted(args.given - problems.without_effect.keys())
        for entry, value in BY_NAME[name].elsewhere
        if entry == args.style and args.values[name] != value and (not BY_NAME[name].algos or name in options)
    ]
    module = STANDS_FOR.get(args.style, "")
    return [f"as written here, whereas {module} goes its own way: {', '.join(told)}"] if told else []


def _scale_1(args: NetArgs) -> str:
    return f"no rank, so scale 1 whatever alpha {'and rs_lora say' if args.rs_lora else 'says'}"


def _caution(row: PlanRow) -> tuple[str, str]:
    return ALGOS[row.algo].caution(row.layout, row.dim, row.options)


def cautions(plan: Plan, args: NetArgs) -> list[str]:
    """A warning for each algorithm some of whose layers are what is seldom meant."""
    warnings = []
    for algo in dict.fromkeys(row.algo for row in plan.trained):
        every = [row for row in plan.trained if row.algo == algo]
        rows = [row for row in every if _caution(row)[0]]
        if rows:
            words, advice = _caution(rows[0])
            without = f" ({_scale_1(args)})" if rows[0].layout.rank is None else ""
            warnings.append(
                f"{len(rows)} of {len(every)} {algo} layers, such as {rows[0].shown_name}, have {words}{without}: "
                f"give it {advice}"
            )
    return warnings


def _otherwise(trained: Sequence[PlanRow], args: NetArgs) -> list[str]:
    """What algorithms do otherwise than where a user may come from, unless an argument says that it is known."""
    found = []
    for algo in dict.fromkeys(row.algo for row in trained):
        of_hosts = {host: (known, text) for host, known, text in ALGOS[algo].spec.elsewhere}
        known, text = of_hosts.get(args.style or args.host, (frozenset(), ""))
        if text and not known & args.given:
            found.append(f"{algo}: {text}")
    return found


def _nothing(plan: Plan, request: Request) -> str:
    if request.saved is not None:
        ours = plan.rows[0].saved_name if plan.rows else "-"
        return (
            f"no layer of {request.source} belongs to this model ({request.arch.title}): the file has names like "
            f"{request.names_like()}, the model like {ours}; choose a file of this architecture"
        )
    reasons = sorted({row.reason for row in plan.rows})
    return (
        f"no layer is left to train; the reasons: {'; '.join(reasons[:6]) or 'the model has no Linear or convolution'}"
    )
