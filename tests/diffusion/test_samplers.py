"""Samplers on data whose best predictor is known: independent Gaussians, N(MEAN, STD²) per value.

The probability flow then carries a value at one level to another by an affine map, DDPM's chain has
exact moments, and the orders of convergence can be read off.
"""

import math

import numpy as np
import pytest
import torch

from longtake.diffusion import IDDPM, RectifiedFlow, SamplerConfig, build_sampler
from longtake.diffusion.samplers import Level, flow_clean_of, sample_dpm_solver
from longtake.diffusion.schedule import linear_schedule, spaced

MEAN, STD = 0.4, 0.6
SCHEDULE = linear_schedule()
SIZE = {"num_frames": 4, "height": 256, "width": 256}  # its shift by resolution is 1
# A few values of one-channel latents, one per sample.
START = torch.tensor([-2.0, -0.3, 0.0, 1.1, 2.5], dtype=torch.float64).view(-1, 1, 1, 1, 1)


def variance_at(signal, sigma):
    return signal**2 * STD**2 + sigma**2


def exact_flow(x, level, target):
    """Where the probability flow carries x; levels are (signal, sigma)."""
    scale = math.sqrt(variance_at(*target) / variance_at(*level))
    return target[0] * MEAN + scale * (x - level[0] * MEAN)


def best_noise(x, signal, sigma):
    return sigma * (x - signal * MEAN) / variance_at(signal, sigma)


def best_clean(x, signal, sigma):
    return MEAN + signal * STD**2 * (x - signal * MEAN) / variance_at(signal, sigma)


def predict_noise(noisy, network_t):
    """The best IDDPM model of the data; its variance output is the middle of the range."""
    step = network_t.long()
    signal, sigma = (
        table[step].view(-1, 1, 1, 1, 1) for table in (SCHEDULE.signal, SCHEDULE.sigma)
    )
    predicted = best_noise(noisy, signal, sigma)
    return torch.cat((predicted, torch.zeros_like(predicted)), dim=1)


def predict_velocity(noisy, network_t):
    t = (network_t.double() / 1000).view(-1, 1, 1, 1, 1)
    return best_noise(noisy, 1 - t, t) - best_clean(noisy, 1 - t, t)


def no_noise(step):
    raise AssertionError("a deterministic sampler asked for noise")


def level_of(step):
    return SCHEDULE.signal[step].item(), SCHEDULE.sigma[step].item()


def draw(name, objective, steps, predict, start=START, step_noise=no_noise):
    config = SamplerConfig(name=name, steps=steps)
    return build_sampler(config, objective, **SIZE)(predict, start, step_noise)


def order(error, coarse, fine):
    """The observed order of convergence between two numbers of steps."""
    return math.log(error(coarse) / error(fine)) / math.log(fine / coarse)


def test_ddim_converges_to_the_probability_flow_at_first_order():
    # The last step, from 1 % noise to the clean sample, is the same for any number of steps.
    exact = best_clean(exact_flow(START, level_of(999), level_of(0)), *level_of(0))

    def error(steps):
        return (draw("ddim", IDDPM(), steps, predict_noise) - exact).abs().max().item()

    assert error(1000) < 5e-3
    # 999 = 27 * 37: these numbers of steps are spaced without rounding.
    assert order(error, 28, 112) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
def test_euler_converges_to_the_probability_flow_at_first_order(shift):
    exact = exact_flow(START, (0.0, 1.0), (1.0, 0.0))
    flow = RectifiedFlow(shift=shift)

    def error(steps):
        return (draw("euler", flow, steps, predict_velocity) - exact).abs().max().item()

    assert error(1000) < 5e-3
    assert order(error, 40, 160) == pytest.approx(1, abs=0.05)


def test_dpm_solver_is_of_second_order():
    """Between levels with both signal and noise, half the step gives a quarter of the error."""
    first, last = 0.8, 0.2

    def error(steps):
        times = [first + (last - first) * step / steps for step in range(steps + 1)]
        levels = [Level(signal=1 - t, sigma=t, network_t=1000 * t) for t in times]
        sample = sample_dpm_solver(
            predict_velocity, START, no_noise, levels=levels, clean_of=flow_clean_of
        )
        return (sample - exact_flow(START, (1 - first, first), (1 - last, last))).abs().max().item()

    assert order(error, 100, 200) == pytest.approx(2, abs=0.1)
    assert order(error, 200, 400) == pytest.approx(2, abs=0.05)


@pytest.mark.parametrize(
    ("objective", "predict", "first", "last", "rival"),
    [
        (IDDPM(), predict_noise, level_of(999), level_of(0), "ddim"),
        (RectifiedFlow(), predict_velocity, (0.0, 1.0), (1.0, 0.0), "euler"),
        (RectifiedFlow(shift=3.0), predict_velocity, (0.0, 1.0), (1.0, 0.0), "euler"),
    ],
    ids=["iddpm", "flow", "shifted-flow"],
)
def test_dpm_solver_converges_to_the_probability_flow(objective, predict, first, last, rival):
    exact = exact_flow(START, first, last)

    def error(steps, name="dpm-solver++"):
        return (draw(name, objective, steps, predict) - exact).abs().max().item()

    # The ends, where signal or noise vanish, cost second order a logarithm.
    assert order(error, 111, 999) > 1.6
    assert error(999) < 2e-4
    assert error(20) < error(20, rival) / 4


def variance_logits(schedule, level, signal, sigma):
    """The variance output for which the model's step is the exact conditional of the data."""
    smallest = schedule.posterior_log_variance[level].item()
    largest = schedule.log_beta[level].item()
    # Law of total variance: the posterior's own, plus what is unknown about the clean value.
    unknown = STD**2 * sigma**2 / variance_at(signal, sigma)
    wanted = math.exp(smallest) + schedule.posterior_clean[level].item() ** 2 * unknown
    return 2 * (math.log(wanted) - smallest) / (largest - smallest) - 1


@pytest.mark.parametrize("steps", [2, 10, 100, 1000])
def test_ddpm_has_the_exact_moments_of_the_data(steps):
    """The chain is affine in its noises: unit vectors through it give coefficients, hence moments.

    With the best mean and the best variance every step is the exact conditional of the data, so the
    marginal at level 0 is exact, and the sample is that level's best clean prediction.
    """
    schedule = SCHEDULE.respaced(steps)
    level_by_t = {int(t): level for level, t in enumerate(schedule.timesteps.tolist())}

    def predict(noisy, network_t):
        level = level_by_t[int(network_t[0])]
        signal, sigma = level_of(int(network_t[0]))
        logits = variance_logits(schedule, level, signal, sigma) if level > 0 else 0.0
        return torch.cat((best_noise(noisy, signal, sigma), torch.full_like(noisy, logits)), dim=1)

    # Row 0: no noise at all. Row 1: only the initial noise. Row 2 + i: only the noise of step i.
    rows = torch.eye(steps + 1, dtype=torch.float64)
    start = torch.cat((torch.zeros(1), rows[:, 0])).view(-1, 1, 1, 1, 1)
    asked = []

    def step_noise(step):
        asked.append(step)
        return torch.cat((torch.zeros(1), rows[:, 1 + step])).view(-1, 1, 1, 1, 1)

    sample = draw("ddpm", IDDPM(), steps, predict, start, step_noise).flatten()
    assert asked == list(range(steps - 1))
    coefficients = sample[1:] - sample[0]
    # The chain starts from the data's own marginal at the noisiest level.
    signal_last, sigma_last = level_of(999)
    mean = sample[0] + coefficients[0] * signal_last * MEAN
    variance = coefficients[0] ** 2 * variance_at(signal_last, sigma_last)
    variance += coefficients[1:].square().sum()

    signal, sigma = level_of(0)
    gain = signal * STD**2 / variance_at(signal, sigma)
    assert mean.item() == pytest.approx(MEAN, abs=1e-9)
    assert variance.item() == pytest.approx(gain**2 * variance_at(signal, sigma), rel=1e-6)


@pytest.mark.parametrize(("name", "steps"), [("ddpm", 100), ("ddpm", 1000), ("ddim", 1000)])
def test_discrete_samplers_agree_with_diffusers(name, steps):
    from diffusers import DDIMScheduler, DDPMScheduler

    settings = {
        "beta_start": 1e-4,
        "beta_end": 0.02,
        "beta_schedule": "linear",
        "clip_sample": False,
        "timestep_spacing": "linspace",
    }
    if name == "ddim":
        # diffusers steps back by a fixed whole number, so only the full schedule compares.
        scheduler = DDIMScheduler(**settings, set_alpha_to_one=True)
        scheduler.set_timesteps(steps)
    else:
        scheduler = DDPMScheduler(**settings, variance_type="learned_range")
        scheduler.set_timesteps(timesteps=spaced(steps, 1000)[::-1])
    scheduler.alphas_cumprod = SCHEDULE.signal.square()  # theirs are float32

    generator = torch.Generator().manual_seed(0)
    expected = START
    for t in scheduler.timesteps:
        output = predict_noise(expected, t.expand(len(START)))
        if name == "ddim":
            output = output[:, :1]
        expected = scheduler.step(output, t, expected, generator=generator).prev_sample

    generator.manual_seed(0)

    def step_noise(step):
        return torch.randn(START.shape, generator=generator, dtype=START.dtype)

    sample = draw(name, IDDPM(), steps, predict_noise, step_noise=step_noise)
    torch.testing.assert_close(sample, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("steps", [9, 3])
def test_dpm_solver_agrees_with_diffusers(steps):
    from diffusers import DPMSolverMultistepScheduler

    # Theirs drops to first order at the end only below 15 steps or when it ends without noise.
    scheduler = DPMSolverMultistepScheduler(
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        timestep_spacing="linspace",
        final_sigmas_type="sigma_min",
    )
    scheduler.set_timesteps(steps)
    expected = START
    for t in scheduler.timesteps:
        output = predict_noise(expected, t.expand(len(START)))[:, :1]
        expected = scheduler.step(output, t, expected).prev_sample
    sample = draw("dpm-solver++", IDDPM(), steps, predict_noise)
    # Theirs computes sigmas in float32.
    torch.testing.assert_close(sample, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_euler_agrees_with_diffusers(shift):
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 30, 30).tolist())
    expected = START
    for t in scheduler.timesteps:
        output = predict_velocity(expected, t.expand(len(START)))
        expected = scheduler.step(output, t, expected, return_dict=False)[0]
    sample = draw("euler", RectifiedFlow(shift=shift), 30, predict_velocity)
    torch.testing.assert_close(sample, expected.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "objective", "predict", "expected"),
    [
        ("ddpm", IDDPM(), predict_noise, [999, 666, 333, 0]),
        ("ddim", IDDPM(), predict_noise, [999, 666, 333, 0]),
        ("dpm-solver++", IDDPM(), predict_noise, [999, 749, 500, 250]),
        ("dpm-solver++", RectifiedFlow(), predict_velocity, [1000, 750, 500, 250]),
        ("euler", RectifiedFlow(), predict_velocity, [1000, 750, 500, 250]),
        ("euler", RectifiedFlow(shift=3.0), predict_velocity, [1000, 900, 750, 500]),
    ],
)
def test_the_model_is_asked_at_these_times_in_float32(name, objective, predict, expected):
    asked = []

    def recorded(noisy, network_t):
        assert noisy.dtype == network_t.dtype == torch.float32
        assert network_t.shape == (5,)
        asked.append(network_t[0].item())
        # What a model in mixed precision returns.
        return predict(noisy, network_t).bfloat16()

    start = START.bfloat16()
    sample = draw(name, objective, 4, recorded, start, lambda step: torch.zeros_like(start))
    assert sample.dtype == torch.float32
    assert asked == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "objective", "predict"),
    [
        ("ddpm", IDDPM(), predict_noise),
        ("ddim", IDDPM(), predict_noise),
        ("dpm-solver++", IDDPM(), predict_noise),
        ("dpm-solver++", RectifiedFlow(), predict_velocity),
        ("euler", RectifiedFlow(), predict_velocity),
    ],
)
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_few_steps_give_finite_samples_that_do_not_see_their_neighbours(
    name, objective, predict, steps
):
    def step_noise(start):
        return lambda step: torch.sin(start + step)

    together = draw(name, objective, steps, predict, START, step_noise(START))
    assert together.isfinite().all()
    alone = draw(name, objective, steps, predict, START[1:2], step_noise(START[1:2]))
    assert torch.equal(alone, together[1:2])


def test_shift_by_resolution_reaches_the_sampler():
    asked = []

    def predict(noisy, network_t):
        asked.append(network_t[0].item())
        return noisy

    config = SamplerConfig(name="euler", steps=2)
    flow = RectifiedFlow(shift=1.5, shift_by_resolution=True)
    build_sampler(config, flow, num_frames=4, height=512, width=512)(predict, START, no_noise)
    assert asked == pytest.approx([1000, 750])


@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpm-solver++"])
def test_samplers_refuse_a_model_without_variance(name):
    with pytest.raises(ValueError, match="build the model with learn_sigma=True"):
        draw(name, IDDPM(), 3, lambda noisy, _: noisy)


@pytest.mark.parametrize("name", ["euler", "dpm-solver++"])
def test_samplers_refuse_a_model_with_variance(name):
    with pytest.raises(ValueError, match="build the model with learn_sigma=False"):
        draw(name, RectifiedFlow(), 3, lambda noisy, _: torch.cat((noisy, noisy), dim=1))
