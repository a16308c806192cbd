"""Noise levels, losses and their weights: sd-scripts' options against formulas and draws written down here."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_flow_models
import tiny_models
import torch
from accelerate.state import AcceleratorState
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3
from safetensors import safe_open
from torch import Tensor

from kohya_trainer import loss_log
from kohya_trainer import train as trainer
from kohya_trainer.families import NoiseOptions
from kohya_trainer.families.noise import Discrete, Flow
from kohya_trainer.loss_log import LossLog
from kohya_trainer.losses import Loss, LossOptions
from kohya_trainer.training import log_name
from kohya_trainer.training_data import draw_noise

U = torch.linspace(0.02, 0.98, 49)
EPSILON = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).config
V = DDPMScheduler.from_config(EPSILON, prediction_type="v_prediction").config
TIMES = torch.tensor([1, 50, 400, 999])


def discrete(config: Any = EPSILON, **options: Any) -> Discrete:
    return Discrete(config, NoiseOptions(**options), "SD")


def flow(shift: float = 1.0, **options: Any) -> Flow:
    return Flow.of(NoiseOptions(**options), shift, 0.0)


def alphas() -> Tensor:
    """a_t of that schedule, in float64."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0)


def data() -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(0)
    return torch.randn(4, 3, 5, 5, generator=draws), torch.randn(4, 3, 5, 5, generator=draws)


# -- distances


@pytest.mark.parametrize("kind", ["l1", "l2", "huber", "smooth_l1"])
@pytest.mark.parametrize("schedule", ["snr", "exponential", "constant"])
def test_distances(kind: str, schedule: str) -> None:
    answer, target = data()
    loss = Loss(LossOptions(kind, schedule, huber_c=0.2, huber_scale=1.5), discrete())
    c = {
        "constant": [0.3] * 4,
        "exponential": [1.5 * 0.2 ** (float(t) / 1000) for t in TIMES],
        "snr": [0.8 / (1 + math.sqrt(1 / float(alphas()[t]) - 1)) ** 2 + 0.2 for t in TIMES],
    }[schedule]
    for i, found in enumerate(loss(answer, target, TIMES).tolist()):
        d = [float(x) for x in (answer[i] - target[i]).flatten()]
        one = {
            "l1": abs,
            "l2": lambda x: x * x,
            "huber": lambda x, c=c[i]: 2 * c * (math.hypot(x, c) - c),
            "smooth_l1": lambda x, c=c[i]: 2 * (math.hypot(x, c) - c),
        }[kind]
        assert found == pytest.approx(sum(map(one, d)) / len(d), rel=1e-4)


def test_flow_models_schedule_the_threshold_by_their_time() -> None:
    answer, target = data()
    times = torch.tensor([0.1, 0.4, 0.7, 1.0])
    found = Loss(LossOptions("huber", "exponential"), flow()).threshold(times)
    assert torch.allclose(found, torch.tensor([0.1**t for t in times.tolist()]))
    with pytest.raises(ValueError, match="no --huber_schedule snr"):
        Loss(LossOptions("smooth_l1"), flow())


# -- weights


WEIGHTS = {  # option -> weight of a model of noise and of one of v, from the signal-to-noise ratio r
    "min_snr_gamma": (5.0, lambda r: min(r, 5) / r, lambda r: min(r, 5) / (r + 1)),
    "debiased_estimation_loss": (True, lambda r: 1 / math.sqrt(min(r, 1000)), lambda r: 1 / (min(r, 1000) + 1)),
    "v_pred_like_loss": (0.5, lambda r: 1 + 0.5 * (min(r, 1000) + 1) / min(r, 1000), None),
    "scale_v_pred_loss_like_noise_pred": (True, None, lambda r: min(r, 1000) / (min(r, 1000) + 1)),
}


@pytest.mark.parametrize("is_v", [False, True])
@pytest.mark.parametrize("option", WEIGHTS)
def test_weights_by_signal_to_noise(option: str, is_v: bool) -> None:
    value, *formulas = WEIGHTS[option]
    options = LossOptions(**{option: value})
    if formulas[is_v] is None:
        with pytest.raises(ValueError, match=f"--{option}"):
            Loss(options, discrete(V if is_v else EPSILON))
        return
    found = Loss(options, discrete(V if is_v else EPSILON)).weights(TIMES)
    ratios = [float(alphas()[t] / (1 - alphas()[t])) for t in TIMES]
    assert found.tolist() == pytest.approx([formulas[is_v](r) for r in ratios], rel=1e-3)


def test_weights_multiply() -> None:
    answer, target = data()
    options = {"min_snr_gamma": 5.0, "v_pred_like_loss": 0.5}
    each = [Loss(LossOptions(**{name: value}), discrete()).weights(TIMES) for name, value in options.items()]
    whole = Loss(LossOptions(**options), discrete())(answer, target, TIMES)
    plain = (answer - target).square().flatten(1).mean(1)
    assert torch.allclose(whole, plain * each[0] * each[1])


@pytest.mark.parametrize("scheme", ["sigma_sqrt", "cosmap", "none", "uniform", "logit_normal", "mode"])
def test_weights_of_flow_models_are_diffusers(scheme: str) -> None:
    times = torch.tensor([0.05, 0.3, 0.9])
    found = Loss(LossOptions(weighting_scheme=scheme), flow(weighting_scheme=scheme)).weights(times)
    assert torch.allclose(found, compute_loss_weighting_for_sd3(scheme, times))


# -- levels


def check_levels(found: Flow, draws: Tensor, size: tuple[int, int] = (128, 128)) -> None:
    """The levels at u are the u-quantiles of levels drawn at random."""
    levels = found.times(U, size)
    assert bool((levels.diff() > 0).all())
    assert torch.allclose(torch.quantile(draws.double(), U.double()), levels.double(), atol=4e-3)


def shifted(s: Tensor, shift: float) -> Tensor:
    return shift * s / (1 + (shift - 1) * s)


def normal(count: int = 300_000) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(1))


def test_samplings() -> None:
    uniform = torch.rand(300_000, generator=torch.Generator().manual_seed(1))
    check_levels(flow(3.0, timestep_sampling="uniform"), uniform)
    check_levels(flow(3.0, timestep_sampling="sigmoid", sigmoid_scale=1.4), torch.sigmoid(1.4 * normal()))
    asked = flow(3.0, timestep_sampling="shift", discrete_flow_shift=2.5)
    check_levels(asked, shifted(torch.sigmoid(normal()), 2.5))
    check_levels(flow(3.0), shifted(torch.sigmoid(normal()), 3.0))  # the family's own
    s = torch.sigmoid(normal())
    for side, mu in ((32, 0.5), (128, 1.15)):  # 256 and 4096 patches
        drawn = math.exp(mu) / (math.exp(mu) + (1 / s - 1))
        check_levels(flow(timestep_sampling="flux_shift"), drawn, (side, side))


@pytest.mark.parametrize("scheme", ["none", "logit_normal", "mode"])
def test_densities_are_those_of_diffusers_with_its_scheduler(scheme: str) -> None:
    """As sd-scripts draws them: a density over the scheduler's 1000 steps, which come down from the noise."""
    torch.manual_seed(2)
    options = {"logit_mean": 0.4, "logit_std": 0.8} if scheme == "logit_normal" else {}
    options |= {"mode_scale": 1.1} if scheme == "mode" else {}
    values = {"logit_mean": None, "logit_std": None, "mode_scale": None, **options}
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=2.0)
    u = compute_density_for_timestep_sampling(scheme, 300_000, **values)
    drawn = scheduler.sigmas[(u * 1000).long().clamp(max=999)]
    asked = flow(timestep_sampling="sigma", discrete_flow_shift=2.0, weighting_scheme=scheme, **options)
    check_levels(asked, drawn)
    if options:
        alone = flow(discrete_flow_shift=2.0, weighting_scheme=scheme, **options)  # says sigma by itself
        assert torch.equal(alone.times(U), asked.times(U))


def test_zero_terminal_snr() -> None:
    roots = alphas().sqrt()
    wanted = ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2
    found = discrete(V, zero_terminal_snr=True).signal(torch.arange(1000))
    assert float(found[-1]) == 0 and torch.allclose(found.double(), wanted, atol=1e-5)
    weights = Loss(LossOptions(min_snr_gamma=5, debiased_estimation_loss=True), discrete(V, zero_terminal_snr=True))
    assert bool(weights.weights(torch.tensor([0, 999])).isfinite().all())


def test_noise_that_is_not_asked_for() -> None:
    """ip_noise_gamma goes into the latents only, seeded by batch and example like the rest."""
    latents = torch.zeros(2, 4, 32, 32)
    plain, u, same = draw_noise(3, 7, [0, 5], latents)
    assert torch.equal(plain, same)
    noise, levels, added = draw_noise(3, 7, [0, 5], latents, 0.0, 0.1)
    assert torch.equal(noise, plain) and torch.equal(levels, u)
    more = (added - noise) / 0.1
    assert float(more.std()) == pytest.approx(1, abs=0.03) and abs(float((more * noise).mean())) < 0.03
    alone = draw_noise(3, 7, [5], latents[:1], 0.0, 0.1)[2]
    assert torch.equal(alone[0], added[1])


# -- mistakes and whole runs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sigmoid_scale": 2.0}, "--sigmoid_scale has no effect"),
        ({"timestep_sampling": "uniform", "discrete_flow_shift": 3.0}, "--discrete_flow_shift has no effect"),
        ({"timestep_sampling": "shift", "weighting_scheme": "mode"}, "--weighting_scheme has no effect"),
        ({"weighting_scheme": "mode", "logit_mean": 0.0}, "--logit_mean has no effect"),
        ({"weighting_scheme": "cosmap", "mode_scale": 1.0}, "--mode_scale has no effect"),
        ({"zero_terminal_snr": True}, "--zero_terminal_snr: for models with a numbered"),
    ],
)
def test_options_of_flow_models_without_effect(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        flow(**options)


def test_options_of_other_families() -> None:
    with pytest.raises(ValueError, match="--timestep_sampling, --logit_mean: for flow models, which SD is not"):
        discrete(timestep_sampling="shift", logit_mean=0.0)
    with pytest.raises(ValueError, match="--zero_terminal_snr needs a model that predicts v"):
        discrete(zero_terminal_snr=True)
    with pytest.raises(ValueError, match="--min_snr_gamma, --debiased_estimation_loss: for models with a numbered"):
        Loss(LossOptions(min_snr_gamma=5, debiased_estimation_loss=True), flow())


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("losses")
    tiny_models.make_images(root / "images", 3, 32)
    sd = tiny_models.make_sd(root / "sd")
    tiny_models.make_v_prediction(sd, root / "v")
    torch.manual_seed(0)
    tiny_flow_models.make_flux(root / "flux")
    return root


def train(models, tmp_path, name: str, *more: str) -> int:
    AcceleratorState._reset_state(reset_partial_state=True)
    options = {
        "pretrained_model_name_or_path": models / name, "train_data_dir": models / "images", "output_dir": tmp_path,
        "resolution": 32, "network_dim": 2, "max_train_steps": 2, "train_batch_size": 2, "learning_rate": 0.01,
        "seed": 1,
    }  # fmt: skip
    return trainer.main([*(f"--{key}={value}" for key, value in options.items()), *more])


def first_loss(tmp_path) -> float:
    return float((tmp_path / "last-loss.csv").read_text().splitlines()[2].split(",")[1])


RUNS = {
    "sd": [
        "--loss_type=huber",
        "--min_snr_gamma=0.001",
        "--v_pred_like_loss=0.3",
        "--noise_offset=0.1",
        "--ip_noise_gamma=0.1",
    ],
    "v": ["--zero_terminal_snr", "--scale_v_pred_loss_like_noise_pred", "--debiased_estimation_loss", "--loss_type=l1"],
    "flux": [
        "--timestep_sampling=flux_shift",
        "--weighting_scheme=cosmap",
        "--guidance_scale=3.5",
        "--ip_noise_gamma=0.1",
    ],
}


@pytest.mark.parametrize("name", RUNS)
def test_every_option_reaches_the_run(models, tmp_path, name) -> None:
    """Each changes the first loss; all together train, and stand in the file."""
    assert train(models, tmp_path / "plain", name) == 0
    plain = first_loss(tmp_path / "plain")
    for i, option in enumerate(RUNS[name]):
        assert train(models, tmp_path / str(i), name, option, "--max_train_steps=1") == 0
        assert first_loss(tmp_path / str(i)) != pytest.approx(plain, rel=1e-4), option
    assert train(models, tmp_path / "all", name, *RUNS[name]) == 0
    with safe_open(tmp_path / "all" / "last.safetensors", "pt") as file:
        metadata = file.metadata()
    for option in RUNS[name]:
        key, _, value = option[2:].partition("=")
        assert metadata[f"ss_{key.replace('estimation_loss', 'estimation')}"] == (value or "True")


def test_the_held_out_loss_is_the_same_for_all(models, tmp_path) -> None:
    """Whatever is minimised, so that runs can be compared: here before any step."""
    seen = []
    for more in ([], ["--loss_type=l1", "--min_snr_gamma=1", "--ip_noise_gamma=0.5"]):
        folder = tmp_path / str(len(seen))
        assert train(models, folder, "sd", f"--validation_data_dir={models / 'images'}", *more) == 0
        seen.append((folder / "last-loss.csv").read_text().splitlines()[1].split(",")[-1])
    assert seen[0] == seen[1]


def test_the_wrong_family_is_told_before_data_are_encoded(models, tmp_path, capsys) -> None:
    assert train(models, tmp_path, "flux", "--min_snr_gamma=5") == 2
    assert "--min_snr_gamma: for models with a numbered noise schedule" in capsys.readouterr().err
    assert train(models, tmp_path, "sd", "--guidance_scale=3") == 2
    assert "--guidance_scale: this Stable Diffusion 1.x / 2.x model takes no guidance" in capsys.readouterr().err


def test_music_has_no_size(models) -> None:
    from kohya_trainer.families.ace_step import AceStep

    family = AceStep(SimpleNamespace(), torch.float32)
    with pytest.raises(ValueError, match="flux_shift follows the size of pictures"):
        family.make_noise(NoiseOptions(timestep_sampling="flux_shift"))


def test_each_run_has_curves_of_its_own(tmp_path) -> None:
    assert log_name(tmp_path, "a", False) == log_name(tmp_path, "a", True) == "a"
    for wanted in ("a-2", "a-3"):
        (tmp_path / log_name(tmp_path, "a", False)).mkdir()
        assert log_name(tmp_path, "a", False) == wanted
    assert log_name(tmp_path, "a", True) == "a-2"


@pytest.mark.parametrize(
    ("options", "plain"),
    [
        ({}, True),
        ({"weighting_scheme": "mode"}, True),
        ({"weighting_scheme": "cosmap"}, False),
        ({"huber_c": 0.2}, False),
    ],
)
def test_which_losses_compare_with_held_out_ones(options: dict[str, Any], plain: bool) -> None:
    assert Loss(LossOptions(**options), flow()).is_plain is plain


def test_the_curve_has_a_second_axis_for_what_does_not_compare(tmp_path, monkeypatch) -> None:
    from matplotlib.axes import Axes

    made = []
    monkeypatch.setattr(Axes, "twinx", lambda self, twin=Axes.twinx: made.append(self) or twin(self))
    for comparable in (True, False):
        with LossLog(tmp_path / "loss.csv", 0, comparable) as log:
            log.add(0, None, None, 0.2)
            log.add(1, 0.01, 1e-3, 0.1)
            log.draw(tmp_path / "loss.png", "two kinds")
        assert len(made) == (not comparable) and (tmp_path / "loss.png").stat().st_size > 1000


def test_the_record_of_a_run_that_goes_on_is_whole_at_every_moment(tmp_path, monkeypatch) -> None:
    """It is the former one until the new one is complete; what a crash cut off, and later steps, are not in it."""
    path, seen = tmp_path / "loss.csv", []
    former = "step,loss,lr,val_loss\n0,,,0.5\n1,0.4,0.001,\n2,0.3,0.001,0.25\n3,0.2,0.001,\n4,0."
    path.write_text(former)
    write = loss_log.write_atomically

    def watched(target, body) -> None:
        write(target, lambda part: (body(part), seen.append(path.read_text()))[0])
        seen.append(path.read_text())

    monkeypatch.setattr(loss_log, "write_atomically", watched)
    with LossLog(path, resumed=2) as log:
        kept = former.partition("3,0.2")[0]
        assert seen == [former, kept] and path.read_text() == kept
        assert log.train == [(1, 0.4), (2, 0.3)] and log.validation == [(0, 0.5), (2, 0.25)]
        log.add(3, 0.1, 1e-3)
        with LossLog(path, resumed=2, writes=False) as other:  # of another process
            other.add(3, 0.1, 1e-3)
    assert path.read_text() == kept + "3,0.1,0.001,\n"


def test_what_is_no_record_is_not_written_over(tmp_path) -> None:
    path = tmp_path / "loss.csv"
    path.write_text("step,loss,lr,val_loss\n1,many,0.001,\n2,0.3,0.001,\n")
    before = path.read_text()
    with pytest.raises(ValueError, match="is no record of a run"), LossLog(path, resumed=2):
        pass
    assert path.read_text() == before
