import pytest
import torch

from longtake.training import MeanLoss

CPU = torch.device("cpu")


def test_mean_is_over_steps_and_begins_anew():
    mean = MeanLoss(CPU)
    for loss in (1.0, 7.0):
        mean.add(torch.tensor(loss, requires_grad=True))
    assert mean.report().item() == pytest.approx(4.0)
    mean.add(torch.tensor(3.0))
    result = mean.report()
    assert result.item() == 3.0
    assert result.dtype == torch.float32
    assert not result.requires_grad


def test_restored_in_the_middle_it_reports_the_same_bits():
    losses = torch.rand(7, generator=torch.Generator().manual_seed(0))
    whole = MeanLoss(CPU)
    for loss in losses:
        whole.add(loss)
    part = MeanLoss(CPU)
    for loss in losses[:3]:
        part.add(loss)
    rest = MeanLoss(CPU, **part.state_dict())
    for loss in losses[3:]:
        rest.add(loss)
    assert rest.report().equal(whole.report())
