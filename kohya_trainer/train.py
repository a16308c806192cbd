"""Reference trainer: network modules on diffusers folders of every family in kohya_trainer/families.

    python scripts/train_network.py --pretrained_model_name_or_path MODEL --train_data_dir IMAGES \\
        --output_dir out --output_name my-lora --network_module networks.lora --network_dim 16

It calls the network module as sd-scripts' trainer does; --help lists the options. Written to --output_dir:
NAME.safetensors, NAME-plan.txt and .json, NAME-loss.csv and .png, samples in sample/ and NAME-samples.png.
A step is decided by --seed and its number alone: several processes, or an interruption, change nothing.
Files of another run are written over with --overwrite only.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from networks.cli.command_line import INTERRUPTED, import_network_module, run_program
from networks.hosts.contract import HostNetwork

from . import TRAINING, check_libraries, model_folder, train_options
from .data.caption_folder import CaptionedImage
from .loss_log import LossLog
from .losses import Loss
from .prior import Prior
from .samples import SampleSheet, read_samples
from .sharding import check_division, check_plan, divide, take_sharding
from .state.interrupts import Interrupts
from .state.run_identity import KEY, check_outputs, identity
from .state.state_files import clean_series
from .state.training_state import Examples, Live, data_key, load_state, read_state, save_state, shared
from .training import (
    Objective,
    autocast,
    build_network,
    build_optimizer,
    make_accelerator,
    optimizer_class,
    run_metadata,
    trains_text,
    write_plan,
)
from .training_data import DiskCache, Order, TrainingData, data_summary, draw_noise, seed_of

DTYPES = {"no": torch.float32, "float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Diverged(ValueError):
    """The training went astray; what it made is not worth a file."""


class Trainer:
    """One run, from loading to the saved file."""

    def __init__(self, args: argparse.Namespace) -> None:
        images, held_out, kept, self.network_args = train_options.check_options(args)
        import_network_module(args.network_module)  # these two fail before anything slow starts
        optimizer_class(args.optimizer_type)
        self.args, self.folder, self.step, self.in_step = args, Path(args.output_dir), 0, False
        model = Path(args.pretrained_model_name_or_path)
        self.saved = read_state(args) if args.resume else None
        self.sharding = take_sharding()
        check_division(self.sharding, args, self.network_args)
        self.accelerator = make_accelerator(args)
        self.examples = Examples(
            args.train_batch_size, args.gradient_accumulation_steps, self.accelerator.num_processes
        )
        self.batches_a_unit = args.gradient_accumulation_steps
        if self.saved is not None:
            self.batches_a_unit = self.saved.batches_a_unit(self.examples)
        if args.seed is None:
            args.seed = shared(self.accelerator, random.randrange(2**32))
            self.say(f"seed {args.seed}")
        self.run_key = (
            self.saved.run if self.saved and self.saved.run else identity(args, images + kept, self.examples.processes)
        )
        check_outputs(args, self.run_key)
        from accelerate.utils import set_seed

        self.device, self.dtype = self.accelerator.device, DTYPES[args.mixed_precision]
        self.is_main = self.accelerator.is_main_process
        options = (args.sdpa, "fp8" if args.fp8_base else args.quantize, self.sharding is not None)
        self.family = model_folder.load_model(model, self.device, self.dtype, train_options.MODEL, *options)
        self.say(f"{self.family.title} from {model} on {self.device}, {str(self.dtype).removeprefix('torch.')}")
        self.loss = Loss(train_options.loss_options(args), self.family.make_noise(train_options.noise_options(args)))
        self.family.train_at_guidance(args.guidance_scale)
        self.options = train_options.data_options(args, self.family.native_size)
        self.family.check_size(*self.options.size, option="--resolution")
        self.samples = read_samples(args, self.family, self.options.size)
        self.sheet = SampleSheet(self.folder, args.output_name, self.family, args.train_batch_size)
        set_seed(args.seed)  # what the network draws its start values from
        self.network = build_network(args, self.family, self.network_args, self.dtype)
        check_plan(self.sharding, args, getattr(self.network, "plan", None))
        if args.full_bf16:
            self.network.to(torch.bfloat16)
        if self.sharding is not None:
            self.say(divide(self.sharding, self.family, self.device, args.train_batch_size))
        self.make_data(images, held_out, kept)
        self.prepare()
        self.write_plan()  # last: a run that fails before its first step leaves an earlier run's files alone

    @property
    def kept_data(self) -> TrainingData | None:
        """That on which the model shall go on as it is."""
        return self.prior.data if self.prior else None

    def say(self, text: str) -> None:
        """Print above the progress bar, once."""
        from tqdm import tqdm

        if self.accelerator.is_main_process:
            tqdm.write(text)

    # ---- preparation ----

    def write_plan(self) -> None:
        """Write what will be trained, layer by layer, before it costs anything."""
        if not self.is_main or not write_plan(self.network, self.folder / f"{self.args.output_name}-plan"):
            return
        self.say(f"plan in {self.folder / self.args.output_name}-plan.txt")

    def make_data(self, *examples: Sequence[CaptionedImage]) -> None:
        """Data, caches of what stays the same, and the loader.

        Args:
            examples: those to train on, those that are held out, and those on which the model shall go on as it is.
        """
        args = self.args
        self.data, self.held_out, kept = (TrainingData(items, self.family, self.options) for items in examples)
        self.prior = Prior(kept, self.data.sizes, args.prior_prompt is not None) if len(kept) else None
        more = f", {len(kept)} to go on as before ({data_summary(kept)})" if len(kept) else ""
        self.say(f"{len(self.data)} to train on ({data_summary(self.data)}), {len(self.held_out)} held out{more}")
        self.idle = self.make_caches()
        self.offload()
        share = (self.accelerator.process_index, self.accelerator.num_processes)
        self.order = Order(self.data.sizes, args.train_batch_size * share[1], args.seed, *share, self.batches_a_unit)
        workers = args.max_data_loader_n_workers
        self.loader = DataLoader(
            self.data,
            batch_sampler=self.order,
            num_workers=workers,
            persistent_workers=workers > 0 and args.persistent_data_loader_workers,
            pin_memory=self.device.type == "cuda" if args.pin_memory is None else args.pin_memory,
        )

    def make_caches(self) -> list[Any]:
        """What stays the same is computed once. Returns the models that are of no more use to the training."""
        args, family = self.args, self.family
        latents, text = args.cache_latents or args.cache_latents_to_disk, not trains_text(args, family)
        disk = DiskCache(family, Path(args.pretrained_model_name_or_path), self.dtype)
        with autocast(self.device, self.dtype), self.accelerator.main_process_first():
            for data in filter(None, (self.data, self.held_out, self.kept_data)):
                if latents or data is not self.data:  # the others are needed several times, and no worker reads them
                    data.cache_latents(disk if args.cache_latents_to_disk else None)
                if text:  # beside a training image there is its own caption's
                    on_disk = args.cache_text_encoder_outputs_to_disk and not (
                        data is self.kept_data and args.prior_prompt is not None
                    )
                    data.cache_texts(args.train_batch_size, disk if on_disk else None)
        return [model for model in family.helpers if (latents if model is family.vae else text)]

    def offload(self) -> None:
        """Models that have done their work leave the accelerator."""
        if self.args.offload_encoders:
            for model in self.idle:
                model.to("cpu")

    def prepare(self) -> None:
        """Optimizer, learning-rate schedule, and accelerate's wrappers."""
        from diffusers.optimization import get_scheduler

        args = self.args
        optimizer = build_optimizer(args, self.network)
        groups = [list(group["params"]) for group in optimizer.param_groups]
        self.schedule = get_scheduler(
            args.lr_scheduler,
            optimizer,
            num_warmup_steps=args.lr_warmup_steps,
            num_training_steps=args.max_train_steps,
        )
        self.network.prepare_grad_etc(self.family.text_encoder_argument, self.family.denoiser)
        self.objective = Objective(self.network, self.family, self.loss, args.prior_loss_weight or 1.0)
        self.wrapped, self.optimizer = self.accelerator.prepare(self.objective, optimizer)
        self.live = Live(self.accelerator, self.network, self.optimizer, self.schedule, groups)
        self.live.check(args.optimizer_type)
        if self.saved is not None:
            self.step = load_state(self.live, self.saved, self.data, self.kept_data)
            self.say(f"continuing after step {self.step} of {args.resume}")

    # ---- training ----

    def run(self) -> int:
        """Train, save, draw the curve. Ctrl-C saves what was trained and returns INTERRUPTED."""
        args = self.args
        csv = self.folder / f"{args.output_name}-loss.csv"
        with (
            LossLog(csv, self.step, self.loss.is_plain and not self.prior, self.is_main) as self.log,
            Interrupts() as self.signals,
        ):
            try:
                if not self.step:
                    self.log.add(0, None, None, self.validate())
                    if args.sample_at_first:
                        self.draw_samples()
                self.train()
            except KeyboardInterrupt:
                self.save_interrupted(f"interrupted after step {self.step}. To go on, repeat the command with")
                self.draw_curve()
                return INTERRUPTED
            except (ValueError, OSError, RuntimeError, MemoryError) as error:
                if self.step and not isinstance(error, Diverged):  # whatever ended the run, the steps are paid for
                    with contextlib.suppress(ValueError, OSError, RuntimeError):
                        self.save_interrupted(f"stopped after step {self.step}. To go on from there:")
                raise
            self.save("", args.save_state)
            self.draw_curve()
        self.accelerator.end_training()
        return 0

    def save_interrupted(self, told: str) -> None:
        """Save what there is; with a state where the steps are whole and all processes are at the same one.

        Args:
            told: how the state is announced.
        """
        whole = self.signals.orderly or (self.accelerator.num_processes == 1 and not self.in_step)
        state = self.save("-interrupted", with_state=whole)
        if whole:
            self.say(f"{told} --resume {state}")
        else:
            self.say(f"stopped in step {self.step + 1}: there is a file, but no state to go on from")

    def train(self) -> None:
        """Run optimizer steps up to --max_train_steps."""
        from tqdm import tqdm

        args, models = self.args, (self.family.text_encoder_argument, self.family.denoiser)
        has_step_start = hasattr(self.network, "on_step_start")
        number, losses = self.step * args.gradient_accumulation_steps, []
        with tqdm(total=args.max_train_steps, initial=self.step, desc="steps", disable=not self.is_main) as self.bar:
            while self.step < args.max_train_steps:
                self.order.go_to(number // self.order.batches)
                self.network.on_epoch_start(*models)
                for batch in self.loader:
                    with self.accelerator.accumulate(self.wrapped):
                        if has_step_start:
                            self.network.on_step_start(*models)
                        losses.append(self.train_batch(batch, number))
                    number += 1
                    if self.accelerator.sync_gradients:
                        self.finish_step(sum(losses) / len(losses))
                        losses = []
                        self.signals.check(self.accelerator)
                    if self.step >= args.max_train_steps:
                        break

    def train_batch(self, batch: dict[str, Any], number: int) -> float:
        """Forward, backward and, on the last batch of an accumulation, the optimizer's step. Returns the loss."""
        unit = number // self.order.batches
        torch.manual_seed(seed_of(self.args.seed, "dropout", number, self.accelerator.process_index))
        if hasattr(self.network, "follow_step"):
            self.network.follow_step(self.args.seed, unit)
        loss = self.batch_loss(batch, unit)
        value = float(self.accelerator.reduce(loss.detach(), reduction="mean"))
        if not math.isfinite(value):
            raise Diverged(f"the loss is {value} at step {self.step + 1}. Lower --learning_rate; nothing was saved.")
        if not self.accelerator.sync_gradients:
            self.accelerator.backward(loss)
        elif self.accelerator.state.deepspeed_plugin is not None:  # its backward pass steps, too
            with self.whole_step():
                self.accelerator.backward(loss)
        else:
            self.accelerator.backward(loss)
            self.see_gradients()
            with self.whole_step():
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
        return value

    def see_gradients(self) -> None:
        """Between the last backward pass of a step and the optimizer: clip, and let the network look."""
        looks = [name for name in ("update_grad_norms", "update_norms") if hasattr(self.network, name)]
        if self.args.max_grad_norm:
            self.accelerator.clip_grad_norm_(list(self.network.get_trainable_params()), self.args.max_grad_norm)
        elif looks and self.accelerator.scaler is not None:
            self.accelerator.unscale_gradients()
        for name in looks:
            getattr(self.network, name)()

    @contextlib.contextmanager
    def whole_step(self) -> Iterator[None]:
        """What has to be done together: the optimizer's step, and all that counts it."""
        with self.signals.held():
            self.in_step = True
            yield
            self.schedule.step()
            if self.args.scale_weight_norms:
                norms = self.network.apply_max_norm_regularization(self.args.scale_weight_norms, self.device)
                self.bar.set_postfix(scaled=norms[0], max_norm=float(norms[2]), refresh=False)
            self.step += 1
            self.in_step = False

    def batch_loss(self, batch: dict[str, Any], unit: int) -> Tensor:
        """Loss of one batch at random noise and noise levels."""
        latents = self.data.latents(batch)
        sizes, examples = (self.args.noise_offset, self.args.ip_noise_gamma), batch["index"].tolist()
        draws = draw_noise(self.args.seed, unit, examples, latents, *sizes)
        kept = self.prior.draw(self.args.seed, unit, examples, *sizes) if self.prior else None
        losses = self.wrapped(self.data, batch, latents, *draws, kept)
        return (losses * batch["weight"].to(losses)).sum()

    def finish_step(self, loss: float) -> None:
        """What happens after an optimizer step: log, validate, save, draw."""
        args = self.args

        def due(every: int | None) -> bool:
            return every is not None and self.step % every == 0

        last = self.step == args.max_train_steps
        value = self.validate() if last or due(args.validate_every_n_steps) else None
        rate = self.schedule.get_last_lr()[0]
        self.log.add(self.step, loss, rate, value)
        self.bar.set_description(f"loss {self.log.average:.4f}", refresh=False)
        self.bar.update()
        measured = {"loss": loss, "loss_average": self.log.average, "lr": rate, "loss_held_out": value}
        self.accelerator.log({key: number for key, number in measured.items() if number is not None}, self.step)
        if due(args.save_every_n_steps):
            self.save(f"-step{self.step:08d}", args.save_state)
        if due(args.sample_every_n_steps):
            self.draw_samples()

    # ---- looking at the result ----

    @contextlib.contextmanager
    def evaluating(self, drawing: bool = False) -> Iterator[None]:
        """No gradients, no dropout.

        Args:
            drawing: pictures, without the training adapters; a loss is compared with that of training, which has them.
        """
        self.network.eval()
        if drawing and isinstance(self.network, HostNetwork):
            self.network.runtime.validating = False
        try:
            with torch.no_grad(), autocast(self.device, self.dtype):
                yield
        finally:
            self.network.train()

    def validate(self) -> float | None:
        """Mean loss on the held-out data; fixed noise and levels, so that values differ by the network only."""
        if not len(self.held_out):
            return None
        losses: list[float] = []
        for batch, *inputs in self.held_out.fixed_batches(self.args.train_batch_size):
            with self.evaluating():
                losses += self.objective(self.held_out, batch, *inputs).tolist()
        mean = sum(losses) / len(losses)
        self.say(f"step {self.step}: loss on {len(self.held_out)} held out {mean:.5f}")
        return mean

    def draw_samples(self) -> None:
        """Draw --sample_prompts into sample/, and all that were drawn so far onto one sheet."""
        if self.is_main or self.sharding is not None:  # a divided model computes in all processes or in none
            for model in self.idle:
                model.to(self.device)
            with self.evaluating(drawing=True):
                self.sheet.draw(self.samples, self.step, write=self.is_main)
            self.offload()
        self.accelerator.wait_for_everyone()

    def draw_curve(self) -> None:
        """Write the loss curve beside the file."""
        if self.is_main:
            path = self.folder / f"{self.args.output_name}-loss.png"
            self.log.draw(path, f"{self.args.output_name}: {self.args.network_module}, {self.step} steps")

    def save(self, suffix: str, with_state: bool = False) -> Path:
        """Save the network; its own writer is atomic and checks what it writes. Returns the state's folder."""
        path = self.folder / f"{self.args.output_name}{suffix}.safetensors"
        state = self.folder / f"{self.args.output_name}{suffix}-state"
        if not all(bool(p.isfinite().all()) for p in self.network.parameters()):
            raise Diverged("the weights are NaN or infinite. Lower --learning_rate; earlier files are untouched.")
        if self.is_main:
            counts = {
                "ss_steps": self.step,
                "ss_num_train_images": len(self.data),
                "ss_num_validation_images": len(self.held_out),
                "ss_resolution": self.options.size[::-1],
                KEY: self.run_key,
            }
            dtype = DTYPES[self.args.save_precision] if self.args.save_precision else None
            metadata = run_metadata(self.args, self.family, self.network_args, counts)
            self.network.save_weights(str(path), dtype, metadata)
            self.say(f"saved {path} ({path.stat().st_size / 1e6:.1f} MB)")
        if with_state:
            for left in clean_series(self.folder, self.args.output_name) if self.is_main else ():
                self.say(f"removed {left}, which an ended run had left")
            content = {"current_step": self.step, "data": data_key(self.data, self.kept_data), "run": self.run_key}
            content["in_steps"] = self.order.batches == self.args.gradient_accumulation_steps
            save_state(self.live, state, self.args, content)
        return state


def run(args: argparse.Namespace) -> int:
    """One run; memory that ran out, at whatever stage, is answered with what can be switched on."""
    check_libraries(TRAINING)
    try:
        return Trainer(args).run()
    except (RuntimeError, MemoryError) as error:
        if not model_folder.is_out_of_memory(error):
            raise
        raise ValueError(train_options.memory_advice(args)) from error


def main(argv: Sequence[str] | None = None) -> int:
    """Run the trainer; returns the exit code (2 = a mistake in what was asked for, 130 = Ctrl-C)."""
    return run_program(run, train_options.build_parser(), sys.argv[1:] if argv is None else argv)
