import math

import pytest
import torch

from longtake.diffusion import RectifiedFlow
from longtake.diffusion.flow import shift_time

SHAPE = (4, 4, 2, 3, 3)
SMALL = {"num_frames": 1, "height": 512, "width": 512}  # needs no shift


def example(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    clean, noise, velocity = torch.randn((3, *SHAPE), generator=generator, dtype=dtype)
    return clean, noise, velocity, torch.tensor([0.0, 0.25, 0.7, 1.0])


def test_loss_is_the_squared_velocity_error_and_the_model_sees_the_straight_line():
    clean, noise, velocity, t = example()
    seen = []

    def predict(noisy, network_t):
        seen.append((noisy, network_t))
        return velocity

    loss = RectifiedFlow().loss(predict, clean, noise_BCTHW=noise, t_B=t)
    [(noisy, network_t)] = seen
    for row, time in enumerate(t.tolist()):
        torch.testing.assert_close(noisy[row], clean[row] + time * (noise[row] - clean[row]))
        expected = (velocity[row] - noise[row] + clean[row]).square().mean()
        torch.testing.assert_close(loss[row], expected)
    assert torch.equal(noisy[0], clean[0])
    assert torch.equal(noisy[3], noise[3])
    assert network_t.dtype == torch.float32
    assert network_t.tolist() == [0.0, 250.0, 700.0, 1000.0]


def test_the_true_velocity_costs_nothing_and_points_to_the_noise():
    clean, noise, _, t = example()
    loss = RectifiedFlow().loss(lambda *_: noise - clean, clean, noise_BCTHW=noise, t_B=t)
    assert torch.equal(loss, torch.zeros_like(loss))


def test_low_precision_inputs_and_outputs_give_a_float32_loss():
    clean, noise, velocity, t = example()
    loss = RectifiedFlow().loss(
        lambda *_: velocity.bfloat16(), clean.bfloat16(), noise_BCTHW=noise.float(), t_B=t
    )
    assert loss.dtype == torch.float32
    error = velocity.bfloat16().double() - (noise.float() - clean.bfloat16()).double()
    torch.testing.assert_close(loss.double(), error.square().flatten(1).mean(1), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.5, 0.7), (-1.0, 2.0)])
def test_logit_normal_times_have_that_distribution(mean, std):
    objective = RectifiedFlow(timesteps="logit-normal", logit_mean=mean, logit_std=std)
    uniform = (torch.arange(10_000) + 0.5) / 10_000
    t = objective.draw_t(uniform, **SMALL)
    # Equally spaced uniforms give a histogram without chance: compare with the integrated density.
    edges = torch.linspace(0, 1, 21)
    counted = torch.histogram(t, edges).hist / 10_000
    x = torch.linspace(0, 1, 200_001, dtype=torch.float64)[1:-1]
    density = (-((x.logit() - mean) ** 2) / (2 * std**2)).exp() / (
        std * math.sqrt(2 * math.pi) * x * (1 - x)
    )
    cumulative = torch.cat((torch.zeros(1), torch.cumulative_trapezoid(density, x)))
    at_edges = torch.cat((torch.zeros(1), cumulative[9_999::10_000], torch.ones(1)))
    torch.testing.assert_close(counted.double(), at_edges.diff().double(), rtol=0, atol=3e-4)


def test_uniform_times_are_the_uniform_numbers():
    uniform = torch.rand(100, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(RectifiedFlow().draw_t(uniform, **SMALL), uniform)


@pytest.mark.parametrize("timesteps", ["uniform", "logit-normal"])
def test_the_ends_of_the_unit_interval_stay_within_it(timesteps):
    objective = RectifiedFlow(timesteps=timesteps, shift=3.7, shift_by_resolution=True)
    edges = torch.tensor([0.0, 2**-24, 1 - 2**-24])
    t = objective.draw_t(edges, num_frames=17, height=360, width=640)
    assert t.dtype == torch.float32
    assert t[0] == 0
    assert (t.diff() > 0).all()
    assert t[-1] <= 1


@pytest.mark.parametrize("shift", [0.2, 1.0, 3.0, 12.7])
def test_shift_keeps_the_ends_and_multiplies_noise_to_signal(shift):
    assert shift_time(0.0, shift) == 0.0
    assert shift_time(1.0, shift) == 1.0
    assert shift_time(torch.ones(1), shift).item() == 1.0
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    shifted = shift_time(t, shift)
    torch.testing.assert_close(shifted, shift * t / (1 + (shift - 1) * t))
    torch.testing.assert_close(shifted / (1 - shifted), shift * t / (1 - t))


def test_shifts_compose_by_multiplication_and_undo_each_other():
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    torch.testing.assert_close(shift_time(shift_time(t, 2.0), 3.5), shift_time(t, 7.0))
    torch.testing.assert_close(shift_time(shift_time(t, 4.0), 0.25), t)


@pytest.mark.parametrize(
    ("num_frames", "height", "width", "expected"),
    [(1, 512, 512, 3.0), (1, 1024, 1024, 6.0), (4, 512, 512, 6.0), (16, 256, 256, 6.0)],
)
def test_shift_grows_with_the_square_root_of_pixels_and_frames(num_frames, height, width, expected):
    objective = RectifiedFlow(shift=3.0, shift_by_resolution=True)
    assert objective.shift_of(num_frames, height, width) == pytest.approx(expected)
    assert RectifiedFlow(shift=3.0).shift_of(num_frames, height, width) == 3.0
    uniform = torch.tensor([0.3])
    drawn = objective.draw_t(uniform, num_frames=num_frames, height=height, width=width)
    torch.testing.assert_close(drawn, shift_time(uniform, expected))


def test_validation_grid_is_the_centres_of_equal_bins():
    assert RectifiedFlow(shift=5.0).grid_t(4, "cpu").tolist() == [0.125, 0.375, 0.625, 0.875]


def test_a_model_with_a_variance_is_told_so():
    clean, noise, velocity, t = example()
    message = r"\(4, 4, 2, 3, 3\).*got \(4, 8, 2, 3, 3\).*learn_sigma=False"
    with pytest.raises(ValueError, match=message):
        RectifiedFlow().loss(
            lambda *_: torch.cat((velocity, velocity), dim=1), clean, noise_BCTHW=noise, t_B=t
        )


def test_nothing_in_a_training_step_reads_a_value_back():
    objective = RectifiedFlow(timesteps="logit-normal", shift=2.0, shift_by_resolution=True)
    clean = torch.empty(SHAPE, device="meta")
    velocity = torch.empty(SHAPE, device="meta", requires_grad=True)
    t = objective.draw_t(torch.empty(4, device="meta"), num_frames=2, height=24, width=24)
    loss = objective.loss(lambda *_: velocity, clean, noise_BCTHW=clean, t_B=t)
    loss.mean().backward()
    assert loss.shape == (4,)


def test_draw_and_loss_compile_to_one_graph():
    clean, noise, velocity, t = example(torch.float32)
    objective = RectifiedFlow(timesteps="logit-normal", shift=2.0, shift_by_resolution=True)

    def loss_of(uniform):
        t = objective.draw_t(uniform, num_frames=2, height=24, width=24)
        return objective.loss(lambda *_: velocity, clean, noise_BCTHW=noise, t_B=t)

    compiled = torch.compile(loss_of, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(t), loss_of(t))
