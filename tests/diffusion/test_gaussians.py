import math

import pytest
import torch

from longtake.diffusion.gaussians import discretized_log_likelihood, kl_divergence


@pytest.mark.parametrize(
    ("mean", "std", "of_mean", "of_std"),
    [(0.0, 1.0, 0.0, 1.0), (0.3, 0.5, -0.2, 0.8), (-1.0, 2.0, 1.0, 0.7)],
)
def test_divergence_equals_its_integral(mean, std, of_mean, of_std):
    x = torch.linspace(mean - 12 * std, mean + 12 * std, 200_001, dtype=torch.float64)
    one = torch.distributions.Normal(mean, std)
    other = torch.distributions.Normal(of_mean, of_std)
    density = one.log_prob(x).exp()
    integral = torch.trapezoid(density * (one.log_prob(x) - other.log_prob(x)), x)
    values = [torch.tensor(v, dtype=torch.float64) for v in (mean, std, of_mean, of_std)]
    divergence = kl_divergence(values[0], 2 * values[1].log(), values[2], 2 * values[3].log())
    torch.testing.assert_close(divergence, integral, rtol=1e-6, atol=1e-6)


def exact_bin_probability(value, mean, std):
    """Of the 2/255-wide bin around `value`, by the error function; the outermost bins are open."""

    def cdf(x):
        return 0.5 * (1 + math.erf((x - mean) / (std * math.sqrt(2))))

    above = 1.0 if value > 0.999 else cdf(value + 1 / 255)
    below = 0.0 if value < -0.999 else cdf(value - 1 / 255)
    return above - below


@pytest.mark.parametrize("std", [0.005, 0.01, 0.1, 1.0])
@pytest.mark.parametrize("mean", [-1.1, -0.4, 0.0, 0.9])
def test_likelihood_agrees_with_the_error_function(mean, std):
    for level in (0, 1, 60, 127, 128, 200, 254, 255):
        value = 2 * level / 255 - 1
        log_probability = discretized_log_likelihood(
            torch.tensor(value, dtype=torch.float64),
            torch.tensor(mean, dtype=torch.float64),
            torch.tensor(2 * math.log(std), dtype=torch.float64),
        )
        # The tanh approximation is within 2e-4 of the cumulative distribution at both edges.
        exact = exact_bin_probability(value, mean, std)
        assert log_probability.exp().item() == pytest.approx(exact, abs=4e-4)


@pytest.mark.parametrize("std", [0.01, 0.3])
def test_the_256_bins_hold_all_probability(std):
    values = torch.arange(256, dtype=torch.float64) * 2 / 255 - 1
    mean = torch.full_like(values, 0.123)
    log_variance = torch.full_like(values, 2 * math.log(std))
    total = discretized_log_likelihood(values, mean, log_variance).exp().sum()
    assert total.item() == pytest.approx(1, abs=1e-9)


def test_likelihood_of_the_impossible_is_finite_with_finite_gradients():
    log_variance = torch.tensor([-10.0, -10.0, -10.0, 2.0], requires_grad=True)
    value = torch.tensor([0.0, -5.0, 5.0, 30.0])
    mean = torch.tensor([50.0, 50.0, -50.0, 0.0])
    log_probability = discretized_log_likelihood(value, mean, log_variance)
    assert (log_probability >= math.log(1e-12) - 1e-5).all()
    log_probability.sum().backward()
    assert log_variance.grad is not None
    assert log_variance.grad.isfinite().all()
