import math

import pytest
import torch

from longtake.diffusion import IDDPM

SHAPE = (5, 4, 2, 3, 3)
BETAS = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
POWER = (1 - BETAS).cumprod(0)


def example(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)

    def draw(channels):
        shape = (SHAPE[0], channels, *SHAPE[2:])
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    # Clean latents reach beyond [-1, 1], and every step of interest is in the batch.
    return draw(4), draw(4), draw(8), torch.tensor([0, 1, 17, 500, 999])


def posterior_by_conditioning(clean, noisy, t):
    """Mean and variance of the level before, given clean and noisy, from the joint Gaussian."""
    power_before = POWER[t - 1]
    step = (POWER[t] / power_before).sqrt()
    mean_before, variance_before = power_before.sqrt() * clean, 1 - power_before
    variance = step**2 * variance_before + BETAS[t]
    mean = mean_before + step * variance_before / variance * (noisy - step * mean_before)
    return mean, variance_before - (step * variance_before) ** 2 / variance


def loss_written_out(clean, noise, output, t):
    """The loss of one sample, step by step from the definition, with library Gaussians."""
    predicted, logits = output.chunk(2)
    noisy = POWER[t].sqrt() * clean + (1 - POWER[t]).sqrt() * noise
    believed = (noisy - (1 - POWER[t]).sqrt() * predicted) / POWER[t].sqrt()
    # At t = 0 the posterior is certain; its variance is borrowed from t = 1.
    _, smallest = posterior_by_conditioning(clean, noisy, max(t, 1))
    fraction = (logits + 1) / 2
    variance = (fraction * BETAS[t].log() + (1 - fraction) * smallest.log()).exp()
    if t == 0:
        model = torch.distributions.Normal(believed, variance.sqrt())
        above = torch.where(clean > 0.999, 1.0, model.cdf(clean + 1 / 255))
        below = torch.where(clean < -0.999, 0.0, model.cdf(clean - 1 / 255))
        bound = -(above - below).clamp(min=1e-12).log()
    else:
        mean, true_variance = posterior_by_conditioning(clean, noisy, t)
        believed_mean, _ = posterior_by_conditioning(believed, noisy, t)
        bound = torch.distributions.kl_divergence(
            torch.distributions.Normal(mean, true_variance.sqrt()),
            torch.distributions.Normal(believed_mean, variance.sqrt()),
        )
    return (predicted - noise).square().mean() + bound.mean() / math.log(2)


def test_loss_equals_the_definition_written_out():
    clean, noise, output, t = example()
    loss = IDDPM().loss(lambda *_: output, clean, noise_BCTHW=noise, t_B=t)
    assert loss.shape == (5,)
    for row in range(1, 5):
        expected = loss_written_out(clean[row], noise[row], output[row], int(t[row]))
        torch.testing.assert_close(loss[row], expected, rtol=1e-8, atol=0)


def test_loss_of_the_first_step_is_the_likelihood_of_the_bins():
    # A prediction close to the truth, as late in training: the approximate cumulative distribution
    # is then within a few parts in a thousand of the exact one.
    generator = torch.Generator().manual_seed(1)
    clean = torch.rand(SHAPE, generator=generator, dtype=torch.float64) * 3 - 1.5
    noise = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
    error = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
    output = torch.cat((noise + 0.3 * error, error), dim=1)
    t = torch.zeros(SHAPE[0], dtype=torch.int64)
    loss = IDDPM().loss(lambda *_: output, clean, noise_BCTHW=noise, t_B=t)
    for row in range(SHAPE[0]):
        expected = loss_written_out(clean[row], noise[row], output[row], 0)
        torch.testing.assert_close(loss[row], expected, rtol=5e-3, atol=5e-3)


def test_the_true_noise_and_the_true_variance_cost_nothing():
    clean, noise, _, _ = example()
    t = torch.tensor([1, 2, 100, 500, 999])
    output = torch.cat((noise, -torch.ones_like(noise)), dim=1)
    loss = IDDPM().loss(lambda *_: output, clean, noise_BCTHW=noise, t_B=t)
    torch.testing.assert_close(loss, torch.zeros_like(loss), rtol=0, atol=1e-10)


def test_the_bound_teaches_the_variance_and_never_the_noise():
    clean, noise, output, t = example()
    output.requires_grad_()
    IDDPM().loss(lambda *_: output, clean, noise_BCTHW=noise, t_B=t).sum().backward()
    assert output.grad is not None
    predicted, grad = output.detach()[:, :4], output.grad
    values_per_sample = math.prod(SHAPE[1:])
    of_squared_error = 2 * (predicted - noise) / values_per_sample
    torch.testing.assert_close(grad[:, :4], of_squared_error)
    assert (grad[1:, 4:] != 0).all()


def test_the_model_sees_noised_latents_and_the_steps_number():
    clean, noise, output, t = example()
    seen = []

    def predict(noisy, network_t):
        seen.append((noisy, network_t))
        return output

    IDDPM().loss(predict, clean, noise_BCTHW=noise, t_B=t)
    [(noisy, network_t)] = seen
    power = POWER[t].view(-1, 1, 1, 1, 1)
    torch.testing.assert_close(noisy, power.sqrt() * clean + (1 - power).sqrt() * noise)
    assert network_t.dtype == torch.float32
    assert network_t.tolist() == [0.0, 1.0, 17.0, 500.0, 999.0]


def test_low_precision_inputs_and_outputs_give_a_float32_loss():
    clean, noise, output, t = example()
    loss = IDDPM().loss(
        lambda *_: output.bfloat16(), clean.bfloat16(), noise_BCTHW=noise.float(), t_B=t
    )
    exact = IDDPM().loss(
        lambda *_: output.bfloat16().double(),
        clean.bfloat16().double(),
        noise_BCTHW=noise.float().double(),
        t_B=t,
    )
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=1e-4, atol=0)


def test_steps_are_drawn_uniformly_and_within_range():
    objective = IDDPM()
    size = {"num_frames": 1, "height": 8, "width": 8}
    edges = torch.tensor([0.0, 0.0009999, 0.001, 1 - 2**-24])
    assert objective.draw_t(edges, **size).tolist() == [0, 0, 1, 999]
    many = objective.draw_t((torch.arange(100_000) + 0.5) / 100_000, **size)
    assert many.dtype == torch.int64
    assert (many.bincount(minlength=1000) == 100).all()


def test_validation_grid_is_the_centres_of_equal_bins():
    objective = IDDPM()
    assert objective.grid_t(4, "cpu").tolist() == [125, 375, 625, 875]
    assert objective.grid_t(1000, "cpu").tolist() == list(range(1000))
    assert objective.grid_t(1, "cpu").tolist() == [500]


def test_a_model_without_variance_is_told_so():
    clean, noise, output, t = example()
    message = r"\(5, 8, 2, 3, 3\).*got \(5, 4, 2, 3, 3\).*learn_sigma=True"
    with pytest.raises(ValueError, match=message):
        IDDPM().loss(lambda *_: output[:, :4], clean, noise_BCTHW=noise, t_B=t)


def test_tables_move_once_even_if_first_used_in_inference():
    clean, noise, output, t = example(torch.float32)
    objective = IDDPM()
    with torch.inference_mode():
        objective.loss(lambda *_: output, clean, noise_BCTHW=noise, t_B=t)
    tables = objective._tables_like(clean)
    assert not tables.is_inference()
    assert objective._tables_like(noise) is tables
    weight = torch.ones(8, requires_grad=True)
    loss = objective.loss(
        lambda *_: output * weight.view(1, 8, 1, 1, 1), clean, noise_BCTHW=noise, t_B=t
    )
    loss.sum().backward()
    assert weight.grad is not None


def test_nothing_in_a_training_step_reads_a_value_back():
    # A tensor on the meta device has no values: reading one, or branching on it, raises.
    objective = IDDPM()
    clean = torch.empty(SHAPE, device="meta")
    output = torch.empty(5, 8, *SHAPE[2:], device="meta", requires_grad=True)
    uniform = torch.empty(5, device="meta")
    t = objective.draw_t(uniform, num_frames=2, height=24, width=24)
    loss = objective.loss(lambda *_: output, clean, noise_BCTHW=clean, t_B=t)
    loss.mean().backward()
    assert loss.shape == (5,)


def test_loss_compiles_to_one_graph_with_the_same_gradients():
    clean, noise, output, t = example()
    objective = IDDPM()

    def loss_of(output):
        return objective.loss(lambda *_: output, clean, noise_BCTHW=noise, t_B=t)

    results = []
    for run in (torch.compile(loss_of, backend="aot_eager", fullgraph=True), loss_of):
        leaf = output.clone().requires_grad_()
        loss = run(leaf)
        loss.sum().backward()
        results.append((loss.detach(), leaf.grad))
    torch.testing.assert_close(results[0], results[1])
