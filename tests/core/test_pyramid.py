"""Block noise of the pyramid: its covariance's factor, the same on every processor."""

import pytest
import torch

from comfyui_helios.helios_core.pyramid import block_factor, block_noise

# Rows of the factor at gamma = 1/3, each the float32 nearest to the real number.
FACTOR = (
    (1.0, 0.0, 0.0, 0.0),
    (-0.3333333432674408, 0.9428090453147888, 0.0, 0.0),
    (-0.3333333432674408, -0.4714045226573944, 0.8164966106414795, 0.0),
    (-0.3333333432674408, -0.4714045226573944, -0.8164965510368347, 0.00019999999494757503),
)


def test_factor_of_the_published_gamma():
    assert block_factor(1 / 3).tolist() == [list(row) for row in FACTOR]


@pytest.mark.parametrize("gamma", [1 / 3, 0.3, 0.25, 0.1, 1e-6])
def test_factor_is_that_of_the_covariance_in_float64(gamma):
    covariance = torch.eye(4, dtype=torch.float64) * (1 + gamma + 1e-8) - gamma
    torch.testing.assert_close(block_factor(gamma), torch.linalg.cholesky(covariance).float(), rtol=2e-7, atol=0)


def test_last_pivot_at_the_edge():
    """What is left of a block once its other three values are known: 4e-8 of variance."""
    assert block_factor(1 / 3)[3, 3].item() ** 2 == pytest.approx(4e-8, rel=1e-6)


def test_noise_has_the_correlation_of_its_blocks():
    noise = block_noise(torch.Size((1, 16, 9, 64, 64)), 1 / 3, torch.Generator().manual_seed(0))
    blocks = noise.unfold(3, 2, 2).unfold(4, 2, 2).reshape(-1, 4)
    torch.testing.assert_close(torch.cov(blocks.T), torch.eye(4) * (4 / 3) - 1 / 3, rtol=0, atol=0.02)
