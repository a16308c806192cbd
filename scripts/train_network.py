"""Reference trainer: network modules on diffusers folders of Stable Diffusion 1.x, 2.x and SDXL.

    python scripts/train_network.py --pretrained_model_name_or_path MODEL --train_data_dir IMAGES \\
        --output_dir out --output_name my-lora --network_module networks.lora --network_dim 16

It calls the network module as sd-scripts' trainer does; --help lists the options. Written to --output_dir:
NAME.safetensors, NAME-plan.txt and .json, NAME-loss.csv and .png, and samples in sample/.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import random
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's networks, whatever is installed

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402
from train_options import build_parser, check_options, parse_resolution  # noqa: E402

from networks.hosts import diffusers as host  # noqa: E402
from networks.hosts.caption_folder import CaptionedImage  # noqa: E402
from networks.hosts.command_line import INTERRUPTED, import_network_module, run_program, write_atomically  # noqa: E402
from networks.hosts.drawing import ImageRequest, batches, draw, read_prompt_file, save_png  # noqa: E402
from networks.hosts.loss_log import LossLog  # noqa: E402
from networks.hosts.training import ImageData, build_network, build_optimizer, optimizer_class, run_metadata  # noqa: E402

DTYPES = {"no": torch.float32, "float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
VALIDATION_SEED = 0  # the same noise for every run, so that runs can be compared
VALIDATION_TIMES = (0.15, 0.4, 0.65, 0.9)  # fractions of the noise schedule at which each held-out image is tried


class Diverged(ValueError):
    """The training went astray; what it made is not worth a file."""


class Trainer:
    """One run, from loading to the saved file."""

    def __init__(self, args: argparse.Namespace) -> None:
        images, held_out, self.network_args = check_options(args)
        self.args = args
        self.folder = Path(args.output_dir)
        host.check_model_folder(Path(args.pretrained_model_name_or_path), "--pretrained_model_name_or_path")
        import_network_module(args.network_module)  # these two fail before anything slow starts
        optimizer_class(args.optimizer_type)
        if args.seed is None:
            args.seed = random.randrange(2**32)
            print(f"seed {args.seed}")
        from accelerate import Accelerator
        from accelerate.utils import set_seed

        if args.mixed_precision == "fp16" and not torch.cuda.is_available():
            raise ValueError("--mixed_precision fp16 needs a GPU. Use bf16 or no.")
        self.accelerator = Accelerator(
            mixed_precision=args.mixed_precision, gradient_accumulation_steps=args.gradient_accumulation_steps
        )
        self.device, self.dtype = self.accelerator.device, DTYPES[args.mixed_precision]
        self.is_main = self.accelerator.is_main_process
        model = Path(args.pretrained_model_name_or_path)
        print(f"model {model} on {self.device}, {str(self.dtype).removeprefix('torch.')}")
        self.parts = host.load_model(model, self.device, self.dtype, "--pretrained_model_name_or_path", args.sdpa)
        self.noise = host.make_noise_scheduler(self.parts)
        self.size = parse_resolution(args.resolution, self.parts.native_size)
        self.parts.check_size(*self.size, option="--resolution")
        self.samples = self.read_samples()
        print(f"{len(images)} images, {len(held_out)} held out, {self.size[1]} x {self.size[0]} pixels")
        set_seed(args.seed)  # also what the network draws its start values from
        self.network = build_network(args, self.parts, self.network_args, self.dtype)
        self.step = 0
        self.make_data(images, held_out)
        self.prepare()
        self.write_plan()  # last: a run that fails before its first step leaves an earlier run's files alone

    def say(self, text: str) -> None:
        """Print above the progress bar."""
        from tqdm import tqdm

        if self.is_main:
            tqdm.write(text)

    # ---- preparation ----

    def read_samples(self) -> list[ImageRequest]:
        """The images that --sample_prompts asks for."""
        if not self.args.sample_prompts:
            return []
        height, width = self.size
        defaults = ImageRequest("", "", self.args.seed, height, width, steps=30, scale=7.5)
        requests = read_prompt_file(Path(self.args.sample_prompts), defaults, "--sample_prompts")
        for request in requests:
            if request.multipliers is not None:
                raise ValueError("--sample_prompts: --am is for gen_img.py; samples are drawn at the full strength.")
            self.parts.check_size(request.height, request.width, f'--sample_prompts "{request.prompt}"')
        return requests

    def write_plan(self) -> None:
        """Write what will be trained, layer by layer, before it costs anything."""
        plan = getattr(self.network, "plan", None)
        if plan is None or not self.is_main:
            return
        text, content = plan.to_text(), json.dumps(plan.to_json(), indent=1)
        for suffix, body in ((".txt", text), (".json", content)):
            path = self.folder / f"{self.args.output_name}-plan{suffix}"
            write_atomically(path, partial(Path.write_text, data=body + "\n", encoding="utf-8"))
        print(f"plan in {self.folder / self.args.output_name}-plan.txt")

    def make_data(self, images: Sequence[CaptionedImage], held_out: Sequence[CaptionedImage]) -> None:
        """Loaders, cached latents and, when no text encoder is trained, cached prompt encodings."""
        args = self.args
        self.train_data, self.held_out = ImageData(images, self.size), ImageData(held_out, self.size)
        if args.cache_latents:
            self.train_data.cache_latents(self.parts, args.seed)
        self.held_out.cache_latents(self.parts, args.seed)  # small, and needed several times
        self.conditions: dict[str, host.Condition] = {}
        if args.network_train_unet_only:
            captions = sorted({image.caption for image in (*images, *held_out)})
            for start in range(0, len(captions), args.train_batch_size):
                chunk = captions[start : start + args.train_batch_size]
                with torch.no_grad(), self.accelerator.autocast():
                    encoded = host.encode_prompts(self.parts, chunk)
                self.conditions.update(zip(chunk, host.split_condition(encoded), strict=True))
        self.loader = DataLoader(
            self.train_data,
            batch_size=args.train_batch_size,
            shuffle=True,
            generator=torch.Generator().manual_seed(args.seed),
            num_workers=args.max_data_loader_n_workers,
            persistent_workers=args.max_data_loader_n_workers > 0,
        )

    def prepare(self) -> None:
        """Optimizer, learning-rate schedule, and accelerate's wrappers."""
        from diffusers.optimization import get_scheduler

        args = self.args
        optimizer = build_optimizer(args, self.network)
        schedule = get_scheduler(
            args.lr_scheduler,
            optimizer,
            num_warmup_steps=args.lr_warmup_steps * self.accelerator.num_processes,
            num_training_steps=args.max_train_steps * self.accelerator.num_processes,
        )
        prepared = self.accelerator.prepare(self.network, optimizer, self.loader, schedule)
        self.wrapped, self.optimizer, self.loader, self.schedule = prepared
        self.network = self.accelerator.unwrap_model(self.wrapped)
        self.network.prepare_grad_etc(self.parts.text_encoder_argument, self.parts.unet)
        self.generator = torch.Generator().manual_seed(args.seed + self.accelerator.process_index)

    # ---- training ----

    def run(self) -> int:
        """Train, save, draw the curve. Ctrl-C saves what was trained and returns INTERRUPTED."""
        args = self.args
        with LossLog(self.folder / f"{args.output_name}-loss.csv") as self.log:
            try:
                self.log.add(0, None, None, self.validate())
                if args.sample_at_first:
                    self.draw_samples()
                self.train()
            except KeyboardInterrupt:
                self.say(f"interrupted after step {self.step}; --network_weights continues from the file saved now")
                self.save("-interrupted")
                self.draw_curve()
                return INTERRUPTED
            except (ValueError, OSError) as error:
                if self.step and not isinstance(error, Diverged):  # whatever ended the run, the steps are paid for
                    with contextlib.suppress(ValueError, OSError):
                        self.save("-interrupted")
                raise
            self.save("")
            self.draw_curve()
        return 0

    def train(self) -> None:
        """Run optimizer steps up to --max_train_steps."""
        from tqdm import tqdm

        args, models = self.args, (self.parts.text_encoder_argument, self.parts.unet)
        has_step_start = hasattr(self.network, "on_step_start")
        with tqdm(total=args.max_train_steps, desc="steps", disable=not self.is_main) as bar:
            losses: list[float] = []
            while self.step < args.max_train_steps:
                self.network.on_epoch_start(*models)
                for batch in self.loader:
                    with self.accelerator.accumulate(self.wrapped):
                        if has_step_start:
                            self.network.on_step_start(*models)
                        losses.append(self.train_batch(batch))
                    if args.scale_weight_norms:
                        norms = self.network.apply_max_norm_regularization(args.scale_weight_norms, self.device)
                        bar.set_postfix(scaled=norms[0], max_norm=float(norms[2]), refresh=False)
                    if self.accelerator.sync_gradients:
                        self.finish_step(sum(losses) / len(losses))
                        bar.set_description(f"loss {self.log.average:.4f}", refresh=False)
                        bar.update()
                        losses = []
                    if self.step >= args.max_train_steps:
                        break

    def train_batch(self, batch: dict[str, Any]) -> float:
        """Forward, backward and, on the last batch of an accumulation, the optimizer's step. Returns the loss."""
        loss = self.batch_loss(batch)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise Diverged(f"the loss is {value} at step {self.step + 1}. Lower --learning_rate; nothing was saved.")
        self.accelerator.backward(loss)
        if self.accelerator.sync_gradients:
            if self.accelerator.num_processes > 1:  # the network's own forward never runs, so DDP does not do it
                for parameter in self.network.parameters():
                    if parameter.grad is not None:
                        parameter.grad = self.accelerator.reduce(parameter.grad, reduction="mean")
            if self.args.max_grad_norm:
                parameters = list(self.network.get_trainable_params())
                self.accelerator.clip_grad_norm_(parameters, self.args.max_grad_norm)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        return value

    def batch_loss(self, batch: dict[str, Any]) -> Tensor:
        """Loss of one batch at random noise and timesteps, weighted as the options say."""
        latents = (
            batch["latents"] if "latents" in batch else host.encode_images(self.parts, batch["pixels"], self.generator)
        )
        latents = latents.to(self.device, torch.float32)
        noise = torch.randn(latents.shape, generator=self.generator)
        if self.args.noise_offset:
            noise += self.args.noise_offset * torch.randn(*latents.shape[:2], 1, 1, generator=self.generator)
        count = self.noise.config.num_train_timesteps
        timesteps = torch.randint(count, (len(latents),), generator=self.generator).to(self.device)
        captions = [self.train_data.images[index].caption for index in batch["index"].tolist()]
        losses = self.sample_losses(latents, noise, timesteps, captions, batch["time_ids"])
        if self.args.min_snr_gamma:
            losses = losses * host.snr_weights(self.noise, timesteps, self.args.min_snr_gamma)
        return losses.mean()

    def sample_losses(
        self, latents: Tensor, noise: Tensor, timesteps: Tensor, captions: Sequence[str], time_ids: Tensor
    ) -> Tensor:
        """Unweighted loss of each sample: (B,)."""
        with self.accelerator.autocast():
            if self.conditions:
                condition = host.stack_conditions([self.conditions[caption] for caption in captions])
            else:
                condition = host.encode_prompts(self.parts, captions)
            return host.denoising_loss(
                self.parts, self.noise, latents, noise.to(self.device), timesteps, condition, time_ids.to(self.device)
            )

    def finish_step(self, loss: float) -> None:
        """What happens after an optimizer step: log, validate, save, draw."""
        args, self.step = self.args, self.step + 1

        def due(every: int | None) -> bool:
            return every is not None and self.step % every == 0

        last = self.step == args.max_train_steps
        value = self.validate() if last or due(args.validate_every_n_steps) else None
        self.log.add(self.step, loss, self.schedule.get_last_lr()[0], value)
        if due(args.save_every_n_steps):
            self.save(f"-step{self.step:08d}")
        if due(args.sample_every_n_steps):
            self.draw_samples()

    # ---- looking at the result ----

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """No gradients, no dropout."""
        self.network.eval()
        try:
            with torch.no_grad(), self.accelerator.autocast():
                yield
        finally:
            self.network.train()

    def validate(self) -> float | None:
        """Mean loss on the held-out images; fixed noise and timesteps, so that values differ by the network only."""
        if not len(self.held_out):
            return None
        generator = torch.Generator().manual_seed(VALIDATION_SEED)
        size, total, count = self.args.train_batch_size, 0.0, self.noise.config.num_train_timesteps
        cases = [(item, int(part * count)) for item in self.held_out.cache for part in VALIDATION_TIMES]
        with self.evaluating():
            for start in range(0, len(cases), size):
                items, times = zip(*cases[start : start + size], strict=True)
                latents = torch.stack([item["latents"] for item in items])
                noise = torch.randn(latents.shape, generator=generator)
                captions = [self.held_out.images[item["index"]].caption for item in items]
                ids = torch.stack([item["time_ids"] for item in items])
                timesteps = torch.tensor(times, device=self.device)
                total += float(self.sample_losses(latents.to(self.device), noise, timesteps, captions, ids).sum())
        self.say(f"step {self.step}: loss on {len(self.held_out)} held-out images {total / len(cases):.5f}")
        return total / len(cases)

    def draw_samples(self) -> None:
        """Draw --sample_prompts into sample/."""
        if not self.is_main:
            return
        folder = self.folder / "sample"
        folder.mkdir(exist_ok=True)
        names = itertools.count()
        with self.evaluating():
            for batch in batches(self.samples, self.args.train_batch_size):
                for image, request in zip(draw(self.parts, batch), batch, strict=True):
                    save_png(image, folder / f"{self.args.output_name}_{self.step:06d}_{next(names):02d}.png", request)

    def draw_curve(self) -> None:
        """Write the loss curve beside the file."""
        if self.is_main:
            path = self.folder / f"{self.args.output_name}-loss.png"
            self.log.draw(path, f"{self.args.output_name}: {self.args.network_module}, {self.step} steps")

    def save(self, suffix: str) -> None:
        """Save the network; its own writer is atomic and checks what it writes."""
        if not self.is_main:
            return
        path = self.folder / f"{self.args.output_name}{suffix}.safetensors"
        if not all(bool(p.isfinite().all()) for p in self.network.parameters()):
            raise Diverged("the weights are NaN or infinite. Lower --learning_rate; earlier files are untouched.")
        dtype = DTYPES[self.args.save_precision] if self.args.save_precision else None
        counts = {
            "ss_steps": self.step,
            "ss_num_train_images": len(self.train_data),
            "ss_num_validation_images": len(self.held_out),
            "ss_resolution": self.size[::-1],
        }
        metadata = run_metadata(self.args, self.parts, self.network_args, counts)
        self.network.save_weights(str(path), dtype, metadata)
        self.say(f"saved {path} ({path.stat().st_size / 1e6:.1f} MB)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the trainer; returns the exit code (2 = a mistake in what was asked for, 130 = Ctrl-C)."""
    return run_program(lambda args: Trainer(args).run(), build_parser(), sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
