"""Each example's noise has its distribution, and depends on no other example."""

from __future__ import annotations

import pytest
import scipy.stats
import torch

from peft_plus_stability.example_noise import example_noise


def seeded(row: int, text: int, device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(1000 * row + text)


@pytest.mark.parametrize(
    ("noise", "law"), [("uniform", scipy.stats.uniform(-0.3, 0.6)), ("normal", scipy.stats.norm(0, 0.3))]
)
def test_the_noise_has_its_distribution(noise, law):
    z = example_noise(torch.zeros(4, 50, 32), rows=4, eps=0.3, noise=noise, stream=seeded)
    assert z.dtype == torch.float32
    assert scipy.stats.kstest(z.flatten().numpy(), law.cdf).pvalue > 0.01
    if noise == "uniform":
        assert z.abs().max() <= 0.3


@pytest.mark.parametrize("noise", ["uniform", "normal"])
def test_the_noise_of_a_text_depends_on_no_neighbour(noise):
    """Not on how many there are, and not on how far they make it be padded."""
    settings = {"eps": 0.3, "noise": noise}
    many = example_noise(torch.zeros(4, 12, 32), rows=4, stream=seeded, **settings)
    alone = example_noise(
        torch.zeros(1, 8, 32), rows=1, stream=lambda row, text, device: seeded(row + 2, text, device), **settings
    )
    assert torch.equal(many[2:3, :8], alone)
    assert not torch.equal(many[0], many[1])
    # Six texts may be three examples with two choices each.
    choices = example_noise(torch.zeros(6, 8, 32), rows=3, stream=seeded, **settings)
    assert torch.equal(choices[4:5], alone)
    assert len({tuple(z.flatten().tolist()) for z in choices}) == 6
