"""Whether the tests would notice: changes one place of the code at a time and names the changes which they let pass.

    python scripts/mutate.py                 all of them: each runs some files of tests, so it takes a while
    python scripts/mutate.py dialects reader only those with these words in their names
    python scripts/mutate.py --check         only whether each still has its place

Each change is made in a copy of the checkout. A survivor wants a test; a change without its place wants a new text.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("networks", "kohya_trainer", "kohya_networks", "scripts", "tests", "presets")  # as far as they are there
FILES = ("pyproject.toml", "setup.cfg", "README.md")


@dataclass(frozen=True)
class Mutation:
    """A change which some test should notice.

    Attributes:
        name: what is wrong then.
        where: a file, or a folder of which one file has the text.
        old, new: the text, which must stand there once, and what takes its place.
        tests: what pytest is given: files, and -k with words where few of their tests are needed.
    """

    name: str
    where: str
    old: str
    new: str
    tests: tuple[str, ...]

    def place(self, root: Path) -> Path:
        """The file.

        Raises:
            ValueError: the text stands there no more, or more than once.
        """
        files = [root / self.where] if self.where.endswith(".py") else sorted((root / self.where).rglob("*.py"))
        counts = {file: file.read_text(encoding="utf-8").count(self.old) for file in files if file.is_file()}
        if sum(counts.values()) != 1:
            raise ValueError(
                f"{self.name}: {self.old!r} stands in {self.where} {sum(counts.values())} times; give the text that is "
                "there now"
            )
        return next(file for file, count in counts.items() if count)


ALGOS, LAYERS, PLAN, FILES_, NETWORK, HOSTS, TENSORS = (
    f"networks/{name}" for name in ("algos", "layers", "plan", "files", "network", "hosts", "tensors")
)
MUTATIONS: tuple[Mutation, ...] = (
    # forms over the base layer
    Mutation(
        "form: lora's gradient of down without the strength",
        f"{TENSORS}/fused_low_rank.py",
        "gA = torch.addmm(made.A, gh.t(), made.x, beta=0, alpha=made.of_A)",
        "gA = torch.addmm(made.A, gh.t(), made.x, beta=0)",
        ("tests/test_fused.py", "-k", "lora"),
    ),
    Mutation(
        "form: a whole change of the base weight is not in the input's gradient",
        f"{TENSORS}/fused_whole.py",
        "return _op_back(geometry, g, torch.add(W, change, alpha=s), shape)",
        "return _op_back(geometry, g, W, shape)",
        ("tests/test_fused.py", "-k", "full"),
    ),
    Mutation(
        "form: small changes are added to a weight in half precision",
        f"{TENSORS}/fused.py",
        "return dtype.itemsize >= 4",
        "return dtype.itemsize >= 2",
        ("tests/test_fused.py", "-k", "below_the_digits"),
    ),
    Mutation(
        "form: lokr's gradient of the first factor without the strength",
        f"{TENSORS}/fused_kronecker.py",
        ".sum(0, dtype=wide).mul_(s)",
        ".sum(0, dtype=wide)",
        ("tests/test_fused.py", "-k", "lokr"),
    ),
    Mutation(
        "form: ia3's bias is stretched, too",
        f"{TENSORS}/fused_scaling.py",
        "over is not None else t - geometry.on_outputs(b)",
        "over is not None else t",
        ("tests/test_fused.py", "-k", "ia3"),
    ),
    Mutation(
        "form: a bias that learns is scaled as the weight change is",
        f"{LAYERS}/over_base.py",
        "change = site.bias_change(y, multiplier)",
        "change = site.bias_change(y, multiplier * site.layer.scale)",
        ("tests/test_stacked.py",),
    ),
    Mutation(
        "form: a layer that takes it also without gradient for its own weight",
        f"{LAYERS}/over_base.py",
        'if weight.requires_grad or _learns(module._parameters.get("bias")):',
        "if False:",
        ("tests/test_fused.py",),
    ),
    Mutation(
        "form: second derivatives are wrong in silence",
        f"{TENSORS}/fused.py",
        "    if torch.is_grad_enabled():\n        raise RuntimeError(",
        "    if False:\n        raise RuntimeError(",
        ("tests/test_fused.py",),
    ),
    Mutation(
        "form: boft's stages are undone in the wrong order",
        f"{TENSORS}/fused_butterfly.py",
        "less = (less + other).baddbmm_(other, less)",
        "less = (less + other).baddbmm_(less, other)",
        ("tests/test_fused.py", "-k", "boft"),
    ),
    # formulas
    Mutation(
        "lora: dW twice as large",
        f"{ALGOS}/lora.py",
        "return (up_OR @ self._right(p).flatten(1)).reshape(self.geometry.weight_shape)",
        "return (2 * up_OR @ self._right(p).flatten(1)).reshape(self.geometry.weight_shape)",
        ("tests/test_algo_matrix.py",),
    ),
    Mutation(
        "loha: sum in the place of the product",
        f"{ALGOS}/loha.py",
        "return ((a1 @ b1) * (a2 @ b2)).reshape(",
        "return ((a1 @ b1) + (a2 @ b2)).reshape(",
        ("tests/test_algo_matrix.py", "-k", "loha"),
    ),
    Mutation(
        "lokr: no rank mask on the whole update",
        f"{ALGOS}/lokr.py",
        "w1, w2 = self._w1(p), self._w2(p, rank_mask_R)",
        "w1, w2 = self._w1(p), self._w2(p)",
        ("tests/test_dropout.py",),
    ),
    Mutation(
        "clock: whole numbers of ranks fall below themselves",
        f"{ALGOS}/clock.py",
        "_ROUNDING = 1e-4",
        "_ROUNDING = 0",
        ("tests/test_tlora.py", "-k", "rounding"),
    ),
    Mutation(
        "clock: the least ranks count twice",
        f"{ALGOS}/clock.py",
        "now.time**exponent * (dim - least)",
        "now.time**exponent * dim",
        ("tests/test_clock.py", "tests/test_tlora.py"),
    ),
    Mutation(
        "magnitude: a row of zeros has the factor 0",
        LAYERS,
        "return torch.where(zero, 1.0, magnitude / torch.where(zero, 1.0, norms))",
        "return torch.where(zero, 0.0, magnitude / torch.where(zero, 1.0, norms))",
        ("tests/test_dora.py",),
    ),
    Mutation(
        "magnitude: norm of the base alone",
        LAYERS,
        "norms = torch.linalg.vector_norm(whole, dim=",
        "norms = torch.linalg.vector_norm(weight, dim=",
        ("tests/test_dora.py",),
    ),
    Mutation(
        "magnitude: the multiplier scales the difference alone",
        LAYERS,
        "return weight + m * (whole * factor - weight)",
        "return weight + (whole * factor - weight)",
        ("tests/test_dora.py",),
    ),
    Mutation(
        "magnitude: the bias is scaled, too",
        LAYERS,
        "geometry.on_outputs(r - 1).to(y) * (y - site.bias(y))",
        "geometry.on_outputs(r - 1).to(y) * y",
        ("tests/test_dora.py",),
    ),
    Mutation(
        "multiplicative: the bias is changed, too",
        f"{ALGOS}/multiplicative.py",
        "plain, axis = y - base.bias(y), ",
        "plain, axis = y, ",
        ("tests/test_algo_contract.py", "tests/test_oft_entries.py"),
    ),
    Mutation(
        "multiplicative: every part has the rows of the first",
        f"{ALGOS}/multiplicative.py",
        "_changes([self._each()[i] for i in chosen], t, axis)",
        "_changes(self._each()[: len(chosen)], t, axis)",
        ("tests/test_oft_entries.py", "-k", "divided"),
    ),
    # dropouts and strength of a call
    Mutation(
        "rank_dropout: kept values are always scaled",
        LAYERS,
        "/ (1 - p if scaled else 1)",
        "/ (1 - p)",
        ("tests/test_dropout.py", "-k", "unscaled"),
    ),
    Mutation(
        "module_dropout: kept updates are scaled",
        LAYERS,
        "return multiplier * module_mask(p, x) if p else multiplier",
        "return multiplier * module_mask(p, x) / (1 - p) if p else multiplier",
        ("tests/test_dropout.py",),
    ),
    Mutation(
        "dropout: does nothing",
        LAYERS,
        "h = F.dropout(h, self.dropout)",
        "h = F.dropout(h, self.dropout, training=False)",
        ("tests/test_dropout.py",),
    ),
    Mutation(
        "dropouts: act while the trainer draws samples",
        LAYERS,
        "return self.training and not self.runtime.sampling and not self.runtime.for_inference",
        "return self.training and not self.runtime.for_inference",
        ("tests/test_dropout.py",),
    ),
    Mutation(
        "multipliers: one sample's goes to its neighbours",
        LAYERS,
        "scale.repeat(samples // values)",
        "scale.repeat_interleave(samples // values)",
        ("tests/test_dropout.py", "tests/test_algo_matrix.py", "-k", "multiplier or sample"),
    ),
    Mutation(
        "max norm: nothing shrinks",
        LAYERS,
        "layers[i].adapter.shrink_(limit / norms[i])",
        "layers[i].adapter.shrink_(1.0)",
        ("tests/test_max_norm.py",),
    ),
    # selection and values
    Mutation(
        "selection: two layers under one saved name",
        PLAN,
        "if row.trained and row.saved_name in self.modules:",
        "if False:",
        ("tests/test_plan.py", "tests/test_saved_names.py"),
    ),
    Mutation(
        "selection: a pattern matches the beginning of a name",
        PLAN,
        "any(map(self.regex.fullmatch, names))",
        "any(map(self.regex.match, names))",
        ("tests/test_plan.py", "tests/test_args.py"),
    ),
    Mutation(
        "selection: names of both libraries count at once",
        f"{PLAN}/patterns.py",
        "own=not any(map(pattern.regex.fullmatch, own))",
        "own=True",
        ("tests/test_patterns.py", "-k", "decide or whose"),
    ),
    Mutation(
        "selection: a pattern of one part means all",
        f"{PLAN}/patterns.py",
        'self.part in ("", c.part.name) and any(map(self.regex.fullmatch',
        "any(map(self.regex.fullmatch",
        ("tests/test_patterns.py", "-k", "part"),
    ),
    Mutation(
        "selection: include_patterns rescue nothing",
        PLAN,
        "rescue = call.include.first(c)",
        "rescue = None",
        ("tests/test_plan.py", "tests/test_arch_names.py"),
    ),
    Mutation(
        "values: scale by the rank under RS-LoRA",
        PLAN,
        "math.sqrt(rank) if rs_lora else rank",
        "rank",
        ("tests/test_plan.py", "tests/test_files.py"),
    ),
    Mutation(
        "values: a block at the threshold of its rate is trained",
        PLAN,
        "value <= a.block_lr_zero_threshold",
        "value < a.block_lr_zero_threshold",
        ("tests/test_blocks.py", "-k", "threshold"),
    ),
    Mutation(
        "values: a LoRA+ ratio of 0 falls back to the general one",
        PLAN,
        'return None if value is None else Found(float(value), (name, ""))',
        'return Found(float(value), (name, "")) if value else None',
        ("tests/test_plan.py",),
    ),
    Mutation(
        "values: LoRA+ for all factors",
        f"{NETWORK}/optim.py",
        "_rate(row, rates) * ratios.get(kind, 1.0)",
        "_rate(row, rates) * row.plus_ratio",
        ("tests/test_hosts.py", "-k", "rate or loraplus"),
    ),
    Mutation(
        "rules: a later reason counts in place of the first",
        f"{PLAN}/rules.py",
        "if word.out and (word.instead or not reason):",
        "if word.out:",
        ("tests/test_rules.py", "-k", "reason"),
    ),
    Mutation(
        "rules: no reason counts in place of an earlier one",
        f"{PLAN}/rules.py",
        "if word.out and (word.instead or not reason):",
        "if word.out and not reason:",
        ("tests/test_rules.py", "-k", "reason"),
    ),
    Mutation(
        "rules: what an earlier one left out stays out",
        f"{PLAN}/rules.py",
        "elif word.takes_in:",
        "elif False:",
        ("tests/test_rules.py",),
    ),
    Mutation(
        "rules: the argument that leaves out is not recorded",
        f"{PLAN}/rules.py",
        "reason, by = word.out, own",
        "reason, by = word.out, frozenset()",
        ("tests/test_plan.py",),
    ),
    Mutation(
        "rules: the argument that keeps is not recorded",
        f"{PLAN}/rules.py",
        "by |= own",
        "pass",
        ("tests/test_plan.py",),
    ),
    Mutation(
        "rules: include_patterns do not reach what the record leaves out",
        f"{PLAN}/rules.py",
        "return _kept(c, call, pattern) or Word(call.left_out[pattern], by=by)",
        "return Word(call.left_out[pattern], by=by)",
        ("tests/test_plan.py", "tests/test_arch_names.py"),
    ),
    Mutation(
        "rules: what is left out by default is left out of a file",
        f"{PLAN}/call.py",
        'Patterns("given", given & left_out.keys(), arch)',
        'Patterns("given", left_out.keys(), arch)',
        ("tests/test_rules.py", "-k", "file"),
    ),
    Mutation(
        "rules: layers outside the blocks fall to the choice of blocks",
        f"{PLAN}/rules.py",
        "if not call.of_denoiser(c) or call.extra_of(c) is not None:",
        "if not call.of_denoiser(c):",
        ("tests/test_blocks.py", "-k", "kinds"),
    ),
    Mutation(
        "values: a preset goes before the number of the block",
        f"{PLAN}/values.py",
        '    Source("block_dims, conv_block_dims", _block_dim),\n    Source("preset", _preset_dim),\n',
        '    Source("preset", _preset_dim),\n    Source("block_dims, conv_block_dims", _block_dim),\n',
        ("tests/test_rules.py", "-k", "order"),
    ),
    Mutation(
        "values: kernels go before expressions",
        f"{PLAN}/values.py",
        '    Source("network_reg_alphas", _expression_alpha),\n',
        '    Source("conv_alpha", _conv_alpha),\n    Source("network_reg_alphas", _expression_alpha),\n',
        ("tests/test_rules.py", "-k", "order"),
    ),
    Mutation(
        "values: an expression goes before a file",
        f"{PLAN}/planner.py",
        "choice = Choice(algorithm, dim, saved.alpha",
        "dim = self.call.args.network_reg_dims.get(self.call.dims.first(c) or '', dim)\n"
        "        choice = Choice(algorithm, dim, saved.alpha",
        ("tests/test_rules.py", "-k", "file"),
    ),
    Mutation(
        "values: an alpha counts as used where it is not",
        f"{PLAN}/planner.py",
        "choice.alpha_by if layout.rank is not None else None",
        "choice.alpha_by",
        ("tests/test_plan.py", "-k", "effect"),
    ),
    Mutation(
        "checks: a file's call must use the expressions of its training",
        f"{PLAN}/checks.py",
        "if request.saved is None:  # what was left out",
        "if True:  # what was left out",
        ("tests/test_rules.py", "tests/test_files.py", "-k", "file"),
    ),
    # files
    Mutation(
        "codec: alpha 0 is no strength",
        f"{FILES_}/codec.py",
        "return self.alpha / rank if rank and self.alpha else 1.0",
        "return self.alpha / rank if rank and self.alpha is not None else 1.0",
        ("tests/test_dialects.py",),
    ),
    Mutation(
        "dialects: RS-LoRA read the wrong way",
        f"{FILES_}/codec.py",
        "alpha *= math.sqrt(",
        "alpha /= math.sqrt(",
        ("tests/test_dialects.py",),
    ),
    Mutation(
        "dialects: RS-LoRA written without being asked for",
        f"{FILES_}/dialects.py",
        "if self.dialect.rs_flag and self.rs_lora and rank",
        "if self.dialect.rs_flag and rank",
        ("tests/test_dialects.py",),
    ),
    Mutation(
        "dialects: half of the alphas are suspicious",
        f"{FILES_}/dialects.py",
        "flags.suspicious[0] * 2 > flags.suspicious[1]",
        "flags.suspicious[0] * 2 >= flags.suspicious[1]",
        ("tests/test_dialects.py",),
    ),
    Mutation(
        "dialects: a flag that says nothing is none",
        f"{FILES_}/dialects.py",
        "if not flags.dialect.rs_flag and (plain or not self.dialect.rs_flag):",
        "if not flags.dialect.rs_flag:",
        ("tests/test_dialects.py",),
    ),
    Mutation(
        "strengths: an alpha of 0 disagrees with settings of the rank",
        f"{FILES_}/strengths.py",
        "float(alpha) / rank if float(alpha) else 1.0",
        "float(alpha) / rank",
        ("tests/test_adapter_file.py", "tests/test_doors.py", "-k", "strength or alpha"),
    ),
    Mutation(
        "strengths: a number in the header argues with a layer's alpha",
        f"{FILES_}/strengths.py",
        "if title != HEADER}",
        "}",
        ("tests/test_adapter_file.py", "tests/test_doors.py", "-k", "strength or alpha"),
    ),
    Mutation(
        "strengths: PEFT's settings count for names without dots",
        f"{FILES_}/strengths.py",
        "if settings is not None and dotted.has_dots(tensors):",
        "if settings is not None:",
        ("tests/test_adapter_file.py", "-k", "strength or alpha"),
    ),
    Mutation(
        "names: alpha is lost in the second factor",
        f"{FILES_}/dotted.py",
        "* (float(alpha) / tensors[DOWN].shape[0])",
        "* 1.0",
        ("tests/test_diffusers_dialect.py",),
    ),
    Mutation(
        "names: halves of rows stay as they are",
        f"{FILES_}/adapter_file.py",
        "for at in (half, 0)]",
        "for at in (0, half)]",
        ("tests/test_diffusers_dialect.py", "-k", "halves"),
    ),
    Mutation(
        "names: projections share the first's factor",
        "networks/algos/lora.py",
        'if alike(present, {*present[0]} - {"lora_up.weight"}):',
        "if present:",
        ("tests/test_joining.py", "tests/test_diffusers_dialect.py", "-k", "join or back or metadata"),
    ),
    Mutation(
        "names: what no name of the file shows is taken for its spelling",
        "networks/archs/names.py",
        "if any(map(one.flat.marks, names)))",
        "if True)",
        ("tests/test_twins.py", "tests/test_merge_layouts.py"),
    ),
    Mutation(
        "names: the largest number of layers decides, not the largest share",
        f"{FILES_}/merge.py",
        "sum(one <= there for one in names) / len(names)",
        "len(there) / 1e4",
        ("tests/test_merge_script.py",),
    ),
    Mutation(
        "names: twins are right where they are wrong",
        f"{FILES_}/twins.py",
        "wrong = marked == [True, False]",
        "wrong = marked == [False, True]",
        ("tests/test_twins.py",),
    ),
    Mutation(
        "reader: a header longer than its file",
        f"{FILES_}/reader.py",
        "if length > min(file.stat().st_size, _LONGEST):",
        "if length > _LONGEST:",
        ("tests/test_files.py", "-k", "header"),
    ),
    Mutation(
        "reader: a file that is cut off",
        f"{FILES_}/reader.py",
        "if file.stat().st_size < needed:",
        "if False:",
        ("tests/test_files.py", "tests/test_doors.py", "-k", "header or cut or damaged or read"),
    ),
    Mutation(
        "writer: alpha in the dtype of the file",
        f"{FILES_}/writer.py",
        'if not own.is_floating_point or key.endswith(".alpha"):',
        "if not own.is_floating_point:",
        ("tests/test_files.py",),
    ),
    Mutation(
        "writer: magnitudes in half precision",
        f"{FILES_}/writer.py",
        "torch.float32 if is_magnitude(key) and chosen.itemsize < torch.float32.itemsize else chosen",
        "chosen",
        ("tests/test_half_precision.py", "tests/test_dora.py", "-k", "save or file or fp32"),
    ),
    Mutation(
        "writer: values beyond fp16 become infinite",
        f"{FILES_}/writer.py",
        "not torch.finfo(chosen).max < largest < math.inf",
        "True",
        ("tests/test_files.py",),
    ),
    Mutation(
        "opening: broken values are not looked for",
        f"{FILES_}/soundness.py",
        "            _check_values(what, tensor, limited=_of_layer(suffix) and own != dotted.ALPHA)\n",
        "",
        ("tests/test_doors.py",),
    ),
    Mutation(
        "opening: tensors that a host has changed are not looked at",
        f"{FILES_}/adapter_file.py",
        "all(tensors[key] is t for key, t in self.tensors.items())",
        "True",
        ("tests/test_adapter_file.py", "-k", "handed_back"),
    ),
    Mutation(
        "places: a tenth is too much",
        f"{FILES_}/places.py",
        "if len(missing) > MOST * len(here)",
        "if len(missing) >= MOST * len(here)",
        ("tests/test_adapter_file.py", "-k", "tenth"),
    ),
    Mutation(
        "loading: some magnitudes are missing",
        f"{NETWORK}/loading.py",
        "    if missing:\n",
        "    if False:\n",
        ("tests/test_doors.py", "-k", "dora"),
    ),
    Mutation(
        "loading: magnitudes of the other side",
        f"{NETWORK}/loading.py",
        "if side and layer.side and side != layer.side:",
        "if False:",
        ("tests/test_dora.py", "tests/test_dialects.py"),
    ),
    Mutation(
        "resize: the nearest update is stronger",
        f"{FILES_}/resize.py",
        "before, after = (spec.shown_rank(each) or 1 for each in (saved.tensors, tensors))",
        "before = after = 1",
        ("tests/test_resize.py",),
    ),
    # tools for finished files
    Mutation(
        "combine: a strength below 0 is taken for one above",
        "networks/tools/combine.py",
        ".times(strength)",
        ".times(abs(strength))",
        ("tests/test_combine.py",),
    ),
    Mutation(
        "forms: a LoRA has another strength than its update",
        "networks/tools/forms.py",
        'LoRA.spec.keys["up"]: up}, float(len(s)))',
        'LoRA.spec.keys["up"]: up}, 1.0)',
        ("tests/test_forms.py",),
    ),
    Mutation(
        "convert: what is no layer is lost",
        "networks/files/keys.py",
        "if path not in self._layers for key in keys",
        "if path in () for key in keys",
        ("tests/test_convert.py",),
    ),
    Mutation(
        "files in pieces: tensors are not aligned",
        f"{FILES_}/writer.py",
        "for size in sorted(self._waiting, reverse=True):",
        "for size in sorted(self._waiting):",
        ("tests/test_tool_ground.py",),
    ),
    # merging
    Mutation(
        "network: it is merged twice",
        f"{NETWORK}/network.py",
        "if any(layer.in_weight for layer in self.adapted_layers):",
        "if False:",
        ("tests/test_acts_once.py",),
    ),
    Mutation(
        "merge: a second file starts from what the first made",
        f"{FILES_}/merged.py",
        "adapter.init_from_base(start())",
        "adapter.init_from_base(weight)",
        ("tests/test_tlora.py", "-k", "start_from_the_base"),
    ),
    Mutation(
        "merge: every layer of that name has its halves swapped",
        f"{FILES_}/weight_names.py",
        "swapped=Swap.ALWAYS if self.swapped.at(shapes[self.key]) else Swap.NEVER",
        "swapped=Swap.NEVER if self.swapped is Swap.NEVER else Swap.ALWAYS",
        ("tests/test_merge_forms.py", "-k", "halves"),
    ),
    Mutation(
        "merge: a scale beside plain numbers is ignored",
        f"{FILES_}/stored.py",
        'return form if bool((checkpoint.tensor(scale) != 1).any()) else ""',
        'return ""',
        ("tests/test_merge_forms.py", "tests/test_merge_script.py"),
    ),
    Mutation(
        "merge: fp8 overflows",
        f"{HOSTS}/key_merge.py",
        "wide.clamp_(-limit, limit)",
        "pass",
        ("tests/test_key_merge.py",),
    ),
    Mutation(
        "merge: a trainer's own hook is dropped",
        f"{HOSTS}/key_merge.py",
        "if theirs is not None:",
        "if False:",
        ("tests/test_key_merge.py", "-k", "hook"),
    ),
    Mutation(
        "merge: a loader goes on merging after its files",
        f"{HOSTS}/key_merge.py",
        "            setattr(self.module, READER, self.read)\n",
        "            pass\n",
        ("tests/test_key_merge.py",),
    ),
    Mutation(
        "merge: by key, a second file starts from what the first made",
        f"{HOSTS}/key_merge.py",
        "functools.partial(rows.piece.cut, start)",
        "own.clone",
        ("tests/test_tlora.py", "-k", "start_from_the_base"),
    ),
    # hosts
    Mutation(
        "hosts: a rate of 0 takes the default one",
        f"{HOSTS}/sd_scripts.py",
        "arch.denoiser.name: default_lr if unet_lr is None else unet_lr",
        "arch.denoiser.name: unet_lr or default_lr",
        ("tests/test_hosts.py", "-k", "rate"),
    ),
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", metavar="WORD", nargs="*", help="of names; default: all")
    parser.add_argument("--check", action="store_true", help="run no test")
    parser.add_argument("--seconds", type=int, default=900, help="for the tests of each; default: %(default)g")
    args = parser.parse_args(argv)
    chosen = [one for one in MUTATIONS if not args.words or any(word in one.name for word in args.words)]
    problems = [text for one in chosen if (text := _problem(one))]
    print("\n".join(problems or [f"{len(chosen)} changes have their place"]))
    survivors = [] if args.check else run([one for one in chosen if not _problem(one)], args.seconds)
    return 1 if survivors or problems else 0


def run(mutations: Sequence[Mutation], seconds: float) -> list[str]:
    """Make the changes and say what came of each.

    Args:
        seconds: for the tests of each.

    Returns:
        The names of those that no test noticed.
    """
    survivors = []
    with tempfile.TemporaryDirectory() as folder:
        copy = _copied(Path(folder))
        for number, one in enumerate(mutations, start=1):
            test = _noticed_by(one, copy, seconds)
            print(f"{number}/{len(mutations)} {'noticed ' if test else 'SURVIVES'} {one.name}  {test}", flush=True)
            survivors += [] if test else [one.name]
    print(f"{len(survivors)} of {len(mutations)} survive" + "".join(f"\n  {name}" for name in survivors))
    return survivors


def _problem(one: Mutation) -> str:
    try:
        one.place(ROOT)
    except ValueError as error:
        return str(error)
    return ""


def _copied(folder: Path) -> Path:
    """A copy of what the tests need."""
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, folder / name)
    return folder


def _noticed_by(one: Mutation, copy: Path, seconds: float) -> str:
    """The test that fails with the change, or what else is said of it; "" = none does.

    Raises:
        RuntimeError: pytest cannot run these tests, or the one that fails does so without the change, too.
    """
    file = one.place(copy)
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace(one.old, one.new), encoding="utf-8")
    try:
        code, said = _pytest(one.tests, copy, seconds)
    except subprocess.TimeoutExpired:
        return f"(no end after {seconds:g} s: a change that hangs, or tests that need longer)"
    finally:
        file.write_text(text, encoding="utf-8")
    if code not in (0, 1):
        raise RuntimeError(f"{one.name}: pytest did not run:\n{said[-2000:]}")
    if code == 0:
        return ""
    failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - |$)", said, re.MULTILINE)
    test = failed[1] if failed else ""
    if _pytest([test] if test else one.tests, copy, seconds)[0] != 0:
        raise RuntimeError(f"{one.name}: {test or 'a test'} fails without the change, too: mend it first")
    return test or "(a test)"


def _pytest(tests: Sequence[str], copy: Path, seconds: float) -> tuple[int, str]:
    """(exit code, what it printed)."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, timeout=seconds)
    return done.returncode, done.stdout.decode(errors="replace")


if __name__ == "__main__":
    raise SystemExit(main())
