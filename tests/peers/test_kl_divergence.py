"""Distillation is what PyTorch and trl compute: the loss and its gradient, in both directions."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from minimoe.losses import distillation
from minimoe.losses.distillation import Settings

pytestmark = pytest.mark.torch

TEMPERATURES = [0.5, 1.0, 3.0]


def case() -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(0)
    student, teacher = 2 * rng.standard_normal((2, 6, 11))
    return student, rng.integers(11, size=6), teacher


def ours(settings: Settings) -> tuple[float, Any]:
    """The mean over tokens, and its gradient."""
    student, targets, teacher = case()
    (total, tokens), cache = distillation.forward(student, targets, teacher, settings)
    return float(total) / tokens, distillation.backward(cache, np.float64(1 / tokens))


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("hard_share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("reverse", [False, True])
def test_it_is_the_batchmean_of_torch(temperature: float, hard_share: float, reverse: bool) -> None:
    student, targets, teacher = case()
    z = torch.tensor(student, requires_grad=True)
    log_s = F.log_softmax(z / temperature, -1)
    log_t = F.log_softmax(torch.tensor(teacher) / temperature, -1)
    # kl_div(log q, log p) is KL(p‖q): the target comes second
    told, truth = (log_t, log_s) if reverse else (log_s, log_t)
    kl = F.kl_div(told, truth, reduction="batchmean", log_target=True)
    label = F.cross_entropy(z, torch.tensor(targets))
    loss = hard_share * label + (1 - hard_share) * temperature**2 * kl
    loss.backward()
    value, dz = ours(Settings(temperature, hard_share, reverse))
    assert value == pytest.approx(loss.item(), rel=1e-12)
    assert z.grad is not None
    np.testing.assert_allclose(dz, z.grad.numpy(), rtol=0, atol=1e-14)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_it_is_the_end_of_trls_generalised_jensen_shannon_divergence(temperature: float, reverse: bool) -> None:
    """β = 0 is KL(t‖s) there, and β = 1 is KL(s‖t). trl does not multiply by τ²."""
    gkd = pytest.importorskip("trl.experimental.gkd")
    student, _, teacher = case()
    z = torch.tensor(student, requires_grad=True)
    loss = gkd.GKDTrainer.generalized_jsd_loss(
        z, torch.tensor(teacher), beta=float(reverse), temperature=temperature, reduction="sum"
    )
    loss.backward()
    value, dz = ours(Settings(temperature, 0.0, reverse))
    assert value == pytest.approx(temperature**2 * loss.item() / len(student), rel=1e-9)
    assert z.grad is not None
    np.testing.assert_allclose(dz, temperature**2 * z.grad.numpy() / len(student), rtol=0, atol=1e-9)
