import math
from itertools import pairwise

import pytest
import torch

from longtake.diffusion.schedule import linear_schedule, schedule_of, spaced


def test_linear_schedule_has_the_published_levels():
    schedule = linear_schedule()
    assert len(schedule) == 1000
    betas = [1e-4 + (0.02 - 1e-4) * step / 999 for step in range(1000)]
    for step in (0, 1, 500, 999):
        power = math.exp(math.fsum(math.log1p(-beta) for beta in betas[: step + 1]))
        assert schedule.signal[step].item() == pytest.approx(math.sqrt(power), rel=1e-12)
        assert schedule.sigma[step].item() == pytest.approx(math.sqrt(1 - power), rel=1e-12)
        assert schedule.log_beta[step].item() == pytest.approx(math.log(betas[step]), rel=1e-9)
    # Almost nothing of the clean sample is left: ᾱ of the last step, as printed in many places.
    assert schedule.signal[999].item() ** 2 == pytest.approx(4.0358e-5, rel=1e-4)


@pytest.mark.parametrize("count", [1000, 100, 7], ids=["all", "100", "7"])
def test_posterior_is_bayes_rule(count):
    """Condition the joint Gaussian of two neighbouring levels on the noisier one."""
    schedule = linear_schedule().respaced(count)
    clean, noisier = 0.7, -1.3
    for index in {1, 2, count // 2, count - 1}:
        signal, signal_before = schedule.signal[index].item(), schedule.signal[index - 1].item()
        mean_before = signal_before * clean
        variance_before = schedule.sigma[index - 1].item() ** 2
        # One step of the chain: x -> step * x + fresh noise, so that signal = step * signal_before.
        step = signal / signal_before
        variance = step**2 * variance_before + (1 - step**2)
        covariance = step * variance_before
        expected_mean = mean_before + covariance / variance * (noisier - step * mean_before)
        expected_variance = variance_before - covariance**2 / variance

        mean = (schedule.posterior_clean[index] * clean).item()
        mean += (schedule.posterior_noisy[index] * noisier).item()
        assert mean == pytest.approx(expected_mean, rel=1e-9)
        posterior_variance = schedule.posterior_log_variance[index].exp().item()
        assert posterior_variance == pytest.approx(expected_variance, rel=1e-9)
        assert schedule.log_beta[index].exp().item() == pytest.approx(1 - step**2, rel=1e-9)


def test_posterior_of_the_first_level_is_the_clean_sample():
    schedule = linear_schedule()
    assert schedule.posterior_clean[0].item() == pytest.approx(1, rel=1e-12)
    assert schedule.posterior_noisy[0].item() == 0
    assert schedule.posterior_log_variance[0] == schedule.posterior_log_variance[1]


def test_respacing_keeps_the_levels_it_visits():
    schedule = linear_schedule()
    few = schedule.respaced(100)
    kept = few.timesteps
    assert kept.tolist() == spaced(100, 1000)
    torch.testing.assert_close(few.signal, schedule.signal[kept], rtol=1e-12, atol=0)
    torch.testing.assert_close(few.sigma, schedule.sigma[kept], rtol=1e-12, atol=0)


def test_respacing_to_all_steps_changes_nothing():
    schedule = linear_schedule()
    same = schedule.respaced(1000)
    for name in vars(schedule):
        torch.testing.assert_close(getattr(same, name), getattr(schedule, name), rtol=1e-9, atol=0)


def test_a_schedule_of_one_level_is_finite_where_it_is_used():
    schedule = linear_schedule().respaced(1)
    assert schedule.timesteps.tolist() == [999]
    assert schedule.posterior_clean.item() == pytest.approx(1)
    assert schedule.posterior_noisy.item() == 0


def test_respacing_a_respaced_schedule_keeps_the_networks_numbers():
    power = torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64)
    schedule = schedule_of(power, torch.tensor([10, 20, 30]))
    assert schedule.respaced(2).timesteps.tolist() == [10, 30]


def test_spaced_steps_are_even_and_hold_both_ends():
    assert spaced(5, 9) == [0, 2, 4, 6, 8]
    assert spaced(1000, 1000) == list(range(1000))
    assert spaced(2, 1000) == [0, 999]
    assert spaced(1, 1000) == [999]
    # The original implementation's choice for Open-Sora's 100 steps and DiT's 250 begins so.
    assert spaced(100, 1000)[:8] == [0, 10, 20, 30, 40, 50, 61, 71]
    assert spaced(250, 1000)[:6] == [0, 4, 8, 12, 16, 20]
    for count in range(2, 1000, 37):
        steps = spaced(count, 1000)
        gaps = {later - earlier for earlier, later in pairwise(steps)}
        assert (steps[0], steps[-1], len(steps)) == (0, 999, count)
        assert max(gaps) - min(gaps) <= 1
        assert min(gaps) >= 1


@pytest.mark.parametrize("count", [0, -1, 1001])
def test_spaced_rejects_impossible_counts(count):
    with pytest.raises(ValueError, match=f"steps={count} must be between 1 and the 1000 steps"):
        spaced(count, 1000)
