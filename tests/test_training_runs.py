"""What surrounds the steps of the trainer: states, caches, sizes, several processes, memory, logs."""

from __future__ import annotations

import csv
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import standin_network
import tiny_flow_models
import tiny_models
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from kohya_trainer import train as trainer
from kohya_trainer import train_options
from kohya_trainer.data.caption_folder import Buckets, bucket_size
from kohya_trainer.prior import Prior
from kohya_trainer.training_data import Order, draw_noise, seed_of
from networks.cli.command_line import parse_arguments

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def assets(tmp_path_factory):
    """Folders sd, images (square) and shapes (three shapes)."""
    folder = tmp_path_factory.mktemp("runs")
    tiny_models.make_sd(folder / "sd")
    tiny_models.make_images(folder / "images", 5)
    tiny_models.make_images(folder / "shapes", 6)
    for number, size in enumerate([(32, 32), (64, 16), (16, 64), (64, 16), (32, 32), (64, 16)]):
        path = folder / "shapes" / f"{number}.png"
        Image.open(path).resize(size).save(path)
    return folder


def arguments(assets: Path, output: Path, *more: str, steps: int = 4) -> list[str]:
    return [
        f"--pretrained_model_name_or_path={assets / 'sd'}",
        f"--train_data_dir={assets / 'images'}",
        f"--output_dir={output}",
        f"--max_train_steps={steps}",
        "--network_dim=2",
        "--train_batch_size=2",
        "--learning_rate=1e-2",
        "--seed=1",
        "--debug",
        *more,
    ]


def train(assets: Path, output: Path, *more: str, steps: int = 4) -> int:
    AcceleratorState._reset_state(reset_partial_state=True)
    return trainer.main(arguments(assets, output, *more, steps=steps))


def weights(output: Path, name: str = "last") -> dict[str, Tensor]:
    return load_file(output / f"{name}.safetensors")


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def rows(output: Path, name: str = "last") -> list[list[str]]:
    with (output / f"{name}-loss.csv").open(newline="") as file:
        return list(csv.reader(file))


# ---- interrupted and resumed ----

DROPOUT = ["--network_dropout=0.3", "--lr_scheduler=cosine", "--lr_warmup_steps=1", "--noise_offset=0.1"]


@pytest.mark.parametrize("accumulate", [1, 3])
def test_resumed_equals_uninterrupted_bit_for_bit(assets, tmp_path, accumulate):
    options = [*DROPOUT, f"--gradient_accumulation_steps={accumulate}", f"--train_data_dir={assets / 'shapes'}"]
    options += ["--enable_bucket", "--min_bucket_reso=16", "--max_bucket_reso=64", "--bucket_reso_steps=8"]
    options += ["--save_every_n_steps=3", "--save_state"]
    assert train(assets, tmp_path / "whole", *options, steps=5) == 0
    state = tmp_path / "whole" / "last-step00000003-state"
    assert train(assets, tmp_path / "again", *options, f"--resume={state}", steps=5) == 0
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "again"))
    assert not same(weights(tmp_path / "whole"), weights(tmp_path / "whole", "last-step00000003"))
    assert rows(tmp_path / "whole")[-2:] == rows(tmp_path / "again")[-2:]


def test_ctrl_c_saves_a_state_that_goes_on(assets, tmp_path):
    """The signal of Ctrl-C, in a process of its own, at a moment of its own; the seed is in the state."""
    assert train(assets, tmp_path / "whole", *DROPOUT, steps=60) == 0
    command = [sys.executable, str(ROOT / "scripts" / "train_network.py")]
    command += arguments(assets, tmp_path / "cut", *DROPOUT, steps=60)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    log = tmp_path / "cut" / "last-loss.csv"
    while process.poll() is None and not (log.is_file() and len(log.read_text().splitlines()) > 5):
        pass
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    state = tmp_path / "cut" / "last-interrupted-state"
    assert f"--resume {state}" in "".join(said)
    assert len(rows(tmp_path / "cut")) < 60
    resume = [option for option in DROPOUT if "seed" not in option]
    assert train(assets, tmp_path / "cut", *resume, f"--resume={state}", steps=60) == 0
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    assert [row[0] for row in rows(tmp_path / "cut")] == ["step", *map(str, range(61))]


@pytest.mark.sweep(2)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seed=2"], "had --seed 1, not 2"),
        (["--network_dim=3"], "had --network_dim 2, not 3"),
        (["--train_data_dir={assets}/shapes"], "training data"),
        (["--max_train_steps=2"], "raise --max_train_steps"),
        (["--resume={assets}"], "holds no saved state"),
    ],
)
def test_a_state_of_another_run_is_refused(assets, tmp_path, capsys, options, message):
    assert train(assets, tmp_path / "a", "--save_state", steps=2) == 0
    filled = [option.format(assets=assets) for option in options]
    assert train(assets, tmp_path / "b", f"--resume={tmp_path / 'a' / 'last-state'}", *filled, steps=4) == 2
    assert message in capsys.readouterr().err


# ---- caches and sizes ----


def test_caches_change_nothing_and_are_used(assets, tmp_path, monkeypatch):
    from kohya_trainer.families.sd import StableDiffusion

    images = tiny_models.make_images(tmp_path / "images", 5)
    data = [f"--train_data_dir={images}", "--network_train_unet_only", "--optimizer_type=SGD", "--learning_rate=1"]
    disk = ["--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk"]
    assert train(assets, tmp_path / "plain", *data) == 0
    assert train(assets, tmp_path / "memory", *data, "--cache_latents") == 0
    assert train(assets, tmp_path / "disk", *data, *disk) == 0
    kinds = sorted(path.name.split("_")[1] for path in images.glob("*.safetensors"))
    assert kinds == ["latents"] * 5 + ["text"] * kinds.count("text") and "text" in kinds
    encoded = []
    monkeypatch.setattr(StableDiffusion, "encode", lambda *_: encoded.append("image"))
    monkeypatch.setattr(StableDiffusion, "encode_prompts", lambda *_: encoded.append("text"))
    assert train(assets, tmp_path / "again", *data, *disk) == 0
    assert not encoded
    monkeypatch.undo()
    for name in ("plain", "disk", "again"):
        assert same(weights(tmp_path / "memory"), weights(tmp_path / name)), name
    tiny_models.make_images(images, 5, seed=3)  # other images and captions under the same names
    assert train(assets, tmp_path / "new", *data, "--cache_latents") == 0
    assert train(assets, tmp_path / "new disk", *data, *disk) == 0
    assert same(weights(tmp_path / "new"), weights(tmp_path / "new disk"))
    assert not same(weights(tmp_path / "new"), weights(tmp_path / "plain"))


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((512, 512), (64, 64)), ((1024, 512), (88, 40)), ((100, 400), (32, 128)), ((2000, 100), (128, 32))],
)
def test_bucket_sizes(tmp_path, shape, expected):
    """Of about as many pixels as 64 x 64, and never more; sides in steps of 8 from 32 to 128."""
    height, width = shape
    Image.new("RGB", (width, height)).save(tmp_path / "x.png")
    size = bucket_size(tmp_path / "x.png", (64, 64), Buckets(32, 128, 8), multiple=4)
    assert size == expected and size[0] * size[1] <= 64 * 64


def test_bucket_follows_the_way_an_image_is_shown(tmp_path):
    image = Image.new("RGB", (400, 100))
    exif = image.getexif()
    exif[0x0112] = 6  # turned by 90 degrees
    image.save(tmp_path / "x.jpg", exif=exif)
    assert bucket_size(tmp_path / "x.jpg", (64, 64), Buckets(32, 128, 8), 4) == (128, 32)


def test_order_of_data():
    """Batches of one size, every example once an epoch; processes share what one would have; a start in the middle."""
    sizes = [(8, 8)] * 5 + [(16, 4)] * 3
    one = Order(sizes, 4, seed=3, process=0, processes=1)
    whole = [[row for row, _ in batch] for batch in one]
    assert sorted(sum(whole, [])) == list(range(8))
    assert all(len({sizes[row] for row in batch}) == 1 for batch in whole)
    assert all(abs(sum(weight for _, weight in batch) - 1) < 1e-12 for batch in one)
    halves = [list(Order(sizes, 4, 3, process, 2)) for process in (0, 1)]
    for batch, mine, others in zip(whole, *halves, strict=True):
        counted = [row for row, weight in (*mine, *others) if weight]
        assert sorted(counted) == sorted(batch)
        assert sum(weight for _, weight in (*mine, *others)) == pytest.approx(2)
    one.go_to(len(whole) + 1)
    second = list(one)
    one.go_to(len(whole))
    assert list(one)[1:] == second and [[row for row, _ in batch] for batch in second] != whole[1:]


def units(order: Order, epochs: int = 2) -> list[dict[int, float]]:
    """Example -> its weight in the mean over the batches of each unit."""
    found = []
    for epoch in range(epochs):
        order.go_to(epoch * len(order.whole(0)))
        batches = list(order)
        assert len(batches) == len(order) and len(batches) % order.batches == 0
        for start in range(0, len(batches), order.batches):
            weight: dict[int, float] = {}
            for row, share in sum(batches[start : start + order.batches], []):
                weight[row] = weight.get(row, 0) + share / order.batches
            found.append({row: share for row, share in weight.items() if share})
    return found


@pytest.mark.parametrize("count", [1, 3, 4, 7, 8, 9, 11, 12, 13, 24])
def test_a_step_has_the_same_examples_however_it_is_divided(count):
    """Each once an epoch, and all of a step with the same weight."""
    sizes = [(8, 8)] * count
    expected = units(Order(sizes, 4, 3, 0, 1))
    assert sorted(row for unit in expected[: len(expected) // 2] for row in unit) == list(range(count))
    assert all(unit == pytest.approx(dict.fromkeys(unit, 1 / len(unit))) for unit in expected)
    for batch, processes, batches in [(2, 1, 2), (1, 1, 4), (2, 2, 2), (4, 2, 1), (4, 4, 1), (1, 1, 4)]:
        parts = [units(Order(sizes, batch, 3, process, processes, batches)) for process in range(processes)]
        for unit, *shares in zip(expected, *parts, strict=True):
            rows = {row: share / processes for part in shares for row, share in part.items()}
            assert rows == pytest.approx(unit)


def test_units_of_several_sizes():
    """A batch has one size; what is left over of them makes steps together, and every example comes once an epoch."""
    sizes = [(8, 8)] * 5 + [(16, 4)] * 3 + [(4, 16)] * 2 + [(4, 4)]
    order = Order(sizes, 2, 3, 0, 1, batches=2)
    for epoch in (0, 1):
        whole = order.whole(epoch)
        assert sorted(row for unit in whole for batch in unit for row in batch) == list(range(11))
        assert all(len({sizes[row] for row in batch}) == 1 for unit in whole for batch in unit)
        assert len(whole) == 4 and sum(len(unit) == 2 for unit in whole) >= 3
    found = units(order, 1)
    assert all(unit == pytest.approx(dict.fromkeys(unit, 1 / len(unit))) for unit in found)


def test_the_order_of_single_batches_is_that_of_earlier_versions():
    """So that their states go on: chunks of each size, shuffled together, from one generator."""
    sizes = [(8, 8)] * 5 + [(16, 4)] * 3
    draws = random.Random(seed_of(3, "order", 1))
    chunks = []
    for members in (list(range(5)), [5, 6, 7]):
        draws.shuffle(members)
        chunks += [members[start : start + 2] for start in range(0, len(members), 2)]
    draws.shuffle(chunks)
    assert [sum(unit, []) for unit in Order(sizes, 2, 3, 0, 1).whole(1)] == chunks


def test_workers_and_process_agree(assets, tmp_path):
    assert train(assets, tmp_path / "a") == 0
    assert train(assets, tmp_path / "b", "--max_data_loader_n_workers=2") == 0
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))


# ---- memory ----


def test_encoders_leave_the_accelerator_once_cached(assets, tmp_path, monkeypatch):
    """Watched on the meta device's place: models say where they were sent."""
    sent = []
    former = torch.nn.Module.to

    def to(self, *args, **kwargs):
        if args == ("cpu",):
            sent.append(type(self).__name__)
        return former(self, *args, **kwargs)

    monkeypatch.setattr(torch.nn.Module, "to", to)
    monkeypatch.setattr("diffusers.ModelMixin.to", to)
    monkeypatch.setattr("transformers.PreTrainedModel.to", to)
    for options, expected in [
        (["--cache_latents", "--network_train_unet_only"], {"AutoencoderKL", "CLIPTextModel"}),
        (["--network_train_unet_only"], {"CLIPTextModel"}),
        (["--cache_latents"], {"AutoencoderKL"}),
        (["--cache_latents", "--network_train_unet_only", "--no_offload_encoders"], set()),
    ]:
        sent.clear()
        assert train(assets, tmp_path, "--overwrite", *options, steps=1) == 0
        assert set(sent) == expected, options


@pytest.mark.parametrize(
    ("workers", "options", "expected"),
    [(0, [], (False, False)), (2, [], (True, False)), (2, ["--no_persistent_data_loader_workers"], (False, False))],
)
def test_loader_switches(assets, tmp_path, monkeypatch, workers, options, expected):
    """On where they help: persistent workers with workers (not under Windows), pinned memory with CUDA."""
    seen = {}
    real = trainer.DataLoader

    def loader(*args, **kwargs):
        seen.update(kwargs)
        return real(*args, **kwargs)

    monkeypatch.setattr(trainer, "DataLoader", loader)
    monkeypatch.setattr(sys, "platform", "linux")
    assert train(assets, tmp_path, f"--max_data_loader_n_workers={workers}", *options, steps=1) == 0
    assert (seen["persistent_workers"], seen["pin_memory"]) == expected
    monkeypatch.setattr(sys, "platform", "win32")
    assert not train_options.build_parser().parse_args([]).persistent_data_loader_workers


def test_checkpointing_changes_nothing(assets, tmp_path):
    """FLUX.1: in train mode its T5 would drop attention, also where dropouts are no modules."""
    model = tiny_flow_models.make_flux(tmp_path / "flux")
    options = [f"--pretrained_model_name_or_path={model}", "--resolution=32", "--optimizer_type=SGD"]
    assert train(assets, tmp_path / "on", *options) == 0
    assert train(assets, tmp_path / "off", *options, "--no_gradient_checkpointing") == 0
    on, off = weights(tmp_path / "on"), weights(tmp_path / "off")
    assert any(key.startswith("lora_te1") and bool(on[key].any()) for key in on if key.endswith("lora_up.weight"))
    for key, value in off.items():
        assert torch.allclose(on[key], value, rtol=1e-5, atol=1e-9), key


def test_out_of_memory_says_what_to_switch_on(assets, tmp_path, capsys):
    options = ["--network_module=standin_network", "--network_args", "fail=memory", "--train_batch_size=4"]
    assert train(assets, tmp_path, *options) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    for advice in ("--cache_latents", "--network_train_unet_only", "bf16", "--train_batch_size 1", "--quantize nf4"):
        assert advice in error
    assert "gradient_checkpointing" not in error  # it is on already


def test_out_of_memory_later_keeps_the_steps(assets, tmp_path, capsys):
    standin_network.CALLS.clear()
    options = ["--network_module=standin_network", "--network_args", "fail=memory_later"]
    assert train(assets, tmp_path, *options) == 2
    said = capsys.readouterr()
    assert "out of memory. Switch on" in said.err.splitlines()[-1]
    assert f"after step 2. To go on from there: --resume {tmp_path / 'last-interrupted-state'}" in said.out + said.err
    assert (tmp_path / "last-interrupted.safetensors").is_file()


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory: you tried"), MemoryError()],
)
def test_out_of_memory_while_loading(assets, tmp_path, capsys, monkeypatch, error):
    """The model's files are not to blame."""

    def load(*_: object) -> None:
        raise error

    monkeypatch.setattr("kohya_trainer.model_folder._load_part", load)
    assert train(assets, tmp_path) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "out of memory. Switch on" in last and "truncated" not in last


# bitsandbytes is among the test requirements on Linux only
QUANTIZED = [["--quantize=nf4"], ["--quantize=int8"]] if sys.platform == "linux" else []


@pytest.mark.sweep(2)
@pytest.mark.parametrize("options", [["--fp8_base"], ["--full_bf16"], *QUANTIZED])
def test_small_formats_train(assets, tmp_path, options):
    """Near the run in bf16: the loss of the same steps, and the base model's weights take less room."""
    plain = ["--mixed_precision=bf16", "--network_train_unet_only"]
    assert train(assets, tmp_path / "plain", *plain) == 0
    assert train(assets, tmp_path / "small", *plain, *options) == 0
    for one, other in zip(rows(tmp_path / "plain")[2:], rows(tmp_path / "small")[2:], strict=True):
        assert float(one[1]) == pytest.approx(float(other[1]), rel=0.1)
    assert any(
        bool(value.any()) for key, value in weights(tmp_path / "small").items() if key.endswith("lora_up.weight")
    )


@pytest.mark.parametrize("kind", ["cut", "text", "empty"])
def test_a_corrupt_image_is_named_before_the_model_is_loaded(assets, tmp_path, capsys, kind, monkeypatch):
    images = tiny_models.make_images(tmp_path / "images", 3)
    broken = images / "1.png"
    content = {"cut": broken.read_bytes()[:-20], "text": b"not an image", "empty": b""}
    broken.write_bytes(content[kind])
    monkeypatch.setattr("kohya_trainer.model_folder.load_model", lambda *_: pytest.fail("too late"))
    assert train(assets, tmp_path / "out", f"--train_data_dir={images}") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert str(broken) in error and "Replace or remove it" in error


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("prompts.toml", b'prompt = "a red square"', "plain text, one a line. Write them into a .txt"),
        ("prompts.txt", b"\xff\xfe a", "is not UTF-8 text"),
    ],
)
def test_prompts_of_another_form_are_refused(assets, tmp_path, capsys, name, content, message):
    (tmp_path / name).write_bytes(content)
    assert train(assets, tmp_path / "out", f"--sample_prompts={tmp_path / name}") == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_resolution_that_is_none_stops_before_the_model_is_loaded(assets, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("kohya_trainer.model_folder.load_model", lambda *_: pytest.fail("too late"))
    assert train(assets, tmp_path, "--resolution=abc") == 2
    assert "is not a size. Write 512" in capsys.readouterr().err.splitlines()[-1]


# ---- several processes ----


def launch(processes: int, options: list[str], *how: str) -> str:
    """Start the trainer as `accelerate launch` does; returns what it said."""
    command = [sys.executable, "-m", "accelerate.commands.launch", *(how or ["--multi_gpu"])]
    command += [
        f"--num_processes={processes}",
        "--num_machines=1",
        "--mixed_precision=no",
        "--dynamo_backend=no",
        "--main_process_port=0",
    ]
    command += [str(ROOT / "scripts" / "train_network.py"), *options]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=400, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.mark.long
def test_two_processes_are_one_with_the_doubled_batch(assets, tmp_path):
    """5 images in batches of 4: the last batch of an epoch leaves the second process without a row. DyLoRA has the same
    blocks, GGPO the same noise, and beside each image stands the same one to be kept; a state goes on with either
    number of processes."""
    options = ["--optimizer_type=SGD", "--learning_rate=1", "--optimizer_args", "momentum=0.9"]
    options += ["--save_every_n_steps=2", "--save_state"]
    options += ["--network_args", "algo=dylora", "unit=1", "ggpo_sigma=0.5", "ggpo_beta=0.5"]
    options += [f"--prior_data_dir={assets / 'shapes'}"]
    launch(2, arguments(assets, tmp_path / "two", *options))
    assert train(assets, tmp_path / "one", *options, "--train_batch_size=4") == 0
    two, one = weights(tmp_path / "two"), weights(tmp_path / "one")
    moved = [key for key in one if key.endswith("lora_up.weight") and bool(one[key].any())]
    assert any(key.startswith("lora_te") for key in moved) and any(key.startswith("lora_unet") for key in moved)
    for key in one:
        assert torch.allclose(one[key], two[key], rtol=1e-4, atol=1e-7), key
    for first, second in zip(rows(tmp_path / "one")[2:], rows(tmp_path / "two")[2:], strict=True):
        assert float(first[1]) == pytest.approx(float(second[1]), rel=1e-5)
    state = tmp_path / "two" / "last-step00000002-state"
    launch(2, arguments(assets, tmp_path / "on", *options, f"--resume={state}"))
    assert same(weights(tmp_path / "on"), two)
    assert train(assets, tmp_path / "back", *options, f"--resume={state}", "--train_batch_size=4") == 0
    for key, value in weights(tmp_path / "back").items():
        assert torch.allclose(one[key], value, rtol=1e-4, atol=1e-7), key


# ---- the model goes on as it is ----


@pytest.mark.parametrize("option", ["--prior_prompt=a green circle", "--prior_data_dir"])
def test_what_is_kept_is_held_to_the_answer_without_the_network(assets, tmp_path, option):
    """Value and gradient by the formula, with another copy of the model for the answers without it. The text encoder is
    trained, too, and the teacher's is not."""
    from diffusers import DDPMScheduler, StableDiffusionPipeline

    AcceleratorState._reset_state(reset_partial_state=True)
    given = f"{option}={assets / 'shapes'}" if option.endswith("dir") else option
    options = arguments(assets, tmp_path, given, "--prior_loss_weight=0.7", "--ip_noise_gamma=0.1")
    run = trainer.Trainer(parse_arguments(train_options.build_parser(), options))
    start = {name: p.detach().clone() for name, p in run.network.named_parameters()}
    examples = [3, 1]
    batch = torch.utils.data.default_collate([run.data[i, 0.5] for i in examples])
    bare = StableDiffusionPipeline.from_pretrained(assets / "sd", safety_checker=None)
    scheduler = DDPMScheduler.from_config(bare.scheduler.config)

    def answer(model, x, times, prompts):
        tokens = bare.tokenizer(prompts, padding="max_length", max_length=77, return_tensors="pt").input_ids
        return model.unet(x, times, model.text_encoder(tokens)[0]).sample

    def term(data, batch, names, teacher):
        latents = data.latents(batch)
        noise, u, added = draw_noise(1, 7, names, latents, 0.0, 0.1)
        times = (u * 1000).long()
        x, prompts = scheduler.add_noise(latents, added, times), [data.prompts[i] for i in batch["index"].tolist()]
        with torch.no_grad():
            target = answer(teacher, x, times, prompts) if teacher else noise
        return (answer(run.family.pipeline, x, times, prompts) - target).square().flatten(1).mean(1)

    kept = [run.prior.beside(1, 7, example) for example in examples]
    assert kept == examples or option.endswith("dir")
    assert {run.prior.data.prompts[i] for i in kept} == {"a green circle"} or option.endswith("dir")
    beside = torch.utils.data.default_collate([run.prior.data[i, 1.0] for i in kept])
    parameters = list(run.network.parameters())
    for moved in (False, True):
        if moved:
            with torch.no_grad():
                for p in parameters:
                    p.add_(torch.randn_like(p) * 0.1)
        own = (term(run.data, batch, examples, None) * batch["weight"]).sum()
        prior = (term(run.prior.data, beside, [("prior", i) for i in examples], bare) * batch["weight"]).sum()
        loss = run.batch_loss(batch, 7)
        assert float(prior) == pytest.approx(0.0, abs=1e-9) if not moved else float(prior) > 1e-4
        assert float(loss) == pytest.approx(float(own + 0.7 * prior), rel=1e-5)
        wanted = torch.autograd.grad(own + 0.7 * prior, parameters)
        found = torch.autograd.grad(loss, parameters)
        for name, ours, theirs in zip(start, found, wanted, strict=True):
            assert float((ours - theirs).norm()) <= 1e-4 * float(theirs.norm()) + 1e-7, name


def test_keeping_costs_nothing_at_first_and_goes_on_from_a_state(assets, tmp_path, capsys):
    """The first step's loss is that without it, to the last bit; a resumed run ends with the same file."""
    kept = ["--prior_data_dir", str(assets / "shapes"), "--save_every_n_steps=1", "--save_state"]
    assert train(assets, tmp_path / "plain", steps=2) == 0
    assert train(assets, tmp_path / "kept", *kept, steps=2) == 0
    plain, own = rows(tmp_path / "plain"), rows(tmp_path / "kept")
    assert plain[2] == own[2] and float(own[3][1]) != float(plain[3][1])
    assert not same(weights(tmp_path / "plain"), weights(tmp_path / "kept"))
    state = f"--resume={tmp_path / 'kept' / 'last-step00000001-state'}"
    assert train(assets, tmp_path / "on", *kept, state, steps=2) == 0
    assert same(weights(tmp_path / "on"), weights(tmp_path / "kept"))
    for others, words in (
        ([], "the training data, captions or sizes are not those"),
        ([*kept, "--prior_loss_weight=2"], "that run had --prior_loss_weight None, not 2.0"),
        (["--prior_prompt="], "that run had --prior_prompt None, not "),
    ):
        assert train(assets, tmp_path / "off", *others, state, steps=2) == 2 and words in capsys.readouterr().err


def test_what_stands_beside_a_batch_is_of_one_size():
    class Data:
        sizes = [(32, 32), (16, 64), (16, 64), (32, 32), (16, 64)]

        def __len__(self):
            return 5

    prior = Prior(Data(), [(32, 32), (64, 16), (32, 32)], themselves=False)
    drawn = {i: {prior.beside(1, unit, i) for unit in range(60)} for i in range(3)}
    assert drawn == {0: {0, 3}, 1: {1, 2, 4}, 2: {0, 3}}
    assert [prior.beside(1, 5, 0) for _ in range(3)] == [prior.beside(1, 5, 0)] * 3
    assert Prior(Data(), [(32, 32)] * 5, themselves=True).beside(1, 5, 3) == 3


@pytest.mark.parametrize(
    "options,words",
    [
        (["--prior_prompt=x", "--prior_data_dir=here"], "--prior_data_dir and --prior_prompt both say"),
        (["--prior_loss_weight=1"], "counts nothing without --prior_data_dir FOLDER or --prior_prompt TEXT"),
        (["--prior_prompt=", "--prior_loss_weight=0"], "--prior_loss_weight 0.0: it must be a number of at least"),
        (["--prior_data_dir=nowhere"], "--prior_data_dir nowhere does not exist"),
        (["--prior_prompt=", "--network_module=standin_network"], "standin_network makes networks that cannot be"),
    ],
)
def test_what_cannot_be_kept(assets, tmp_path, capsys, options, words):
    assert train(assets, tmp_path, *options) == 2 and words in capsys.readouterr().err


# ---- logs ----


def test_tensorboard_and_sheets(assets, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red square --s 2\na blue square --s 2\n")
    options = [f"--logging_dir={tmp_path / 'logs'}", f"--sample_prompts={prompts}", "--sample_every_n_steps=2"]
    assert train(assets, tmp_path, *options, "--sample_at_first") == 0
    (events,) = (tmp_path / "logs").rglob("events.out.tfevents.*")
    assert b"loss_average" in events.read_bytes() and b"lr" in events.read_bytes()
    sheet = Image.open(tmp_path / "last-samples.png")
    assert sheet.width > 2 * 96 and sheet.height > 3 * 96  # three rows: steps 0, 2 and 4


def test_the_switches_have_two_names_and_a_config_form(tmp_path):
    from networks.cli.command_line import parse_arguments

    def parse(*options: str) -> bool:
        return parse_arguments(train_options.build_parser(), list(options)).gradient_checkpointing

    assert parse() and not parse("--no_gradient_checkpointing")
    (tmp_path / "x.toml").write_text("gradient_checkpointing = false\n")
    config = f"--config_file={tmp_path / 'x.toml'}"
    assert not parse(config) and parse(config, "--gradient_checkpointing")


def test_the_commands_of_the_page_exist():
    """Every command line parses, and there is one for each family's usual module."""
    import importlib
    import shlex

    from kohya_trainer import generate
    from kohya_trainer.families import FAMILIES

    page = (ROOT / "docs" / "reference-trainer.md").read_text(encoding="utf-8")
    section = page.split("## One command per family")[1].split("\n## ")[0]
    block = section.split("```")[1].removeprefix("bash").replace("\\\n", " ")
    lines = [shlex.split(line) for line in block.strip().splitlines()]
    parsers = {"scripts/train_network.py": train_options.build_parser(), "scripts/gen_img.py": generate.build_parser()}
    for _, script, *options in lines:
        args = parsers[script].parse_args(options)
        modules = args.network_module if isinstance(args.network_module, list) else [args.network_module]
        assert all(hasattr(importlib.import_module(module), "create_network") for module in modules)
    assert sum(line[1].endswith("train_network.py") for line in lines) == len(FAMILIES)


# ---- a training adapter ----


def test_a_training_adapter_is_in_the_losses_and_in_no_picture(assets: Path, tmp_path: Path) -> None:
    """Pictures before the first step are those without it, held-out losses are not; a resumed run ends the same."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --s 2\n", encoding="utf-8")
    look = [f"--sample_prompts={prompts}", "--sample_at_first", f"--validation_data_dir={assets / 'images'}"]
    plain, beside, resumed = (tmp_path / name for name in ("plain", "beside", "resumed"))
    assert train(assets, plain, *look, steps=2) == 0
    file = {key: t * 50 if "lora_up" in key else t for key, t in weights(plain).items()}
    save_file(file, tmp_path / "a.safetensors")
    more = ["--network_args", f"training_adapter={tmp_path / 'a.safetensors'}=0.5"]
    assert train(assets, beside, *look, "--save_state", "--save_every_n_steps=1", *more, steps=2) == 0
    first = [sorted((folder / "sample").glob("*.png"))[0].read_bytes() for folder in (plain, beside)]
    assert first[0] == first[1]
    losses = [rows(folder)[1] for folder in (plain, beside)]
    assert losses[0] != losses[1]
    assert weights(plain).keys() == weights(beside).keys() and not same(weights(plain), weights(beside))
    state = beside / "last-step00000001-state"
    assert train(assets, resumed, f"--resume={state}", *look[2:], *more, steps=2) == 0
    assert same(weights(resumed), weights(beside))
    assert train(assets, tmp_path / "kept", "--prior_prompt=a red circle", *more, steps=1) == 0
    at_start = [next(row for row in rows(folder) if row[0] == "1")[1] for folder in (tmp_path / "kept", beside)]
    assert float(at_start[0]) == pytest.approx(float(at_start[1]), rel=1e-5), "the teacher has it, too"
