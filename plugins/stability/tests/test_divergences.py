"""The distances between predictions, against scipy."""

from __future__ import annotations

import numpy as np
import scipy.stats
import torch

from peft_plus_stability.divergences import (
    masked_mean,
    mean_distance,
    squared_difference,
    summed_distance,
    symmetric_bernoulli_kl,
    symmetric_kl,
)


def test_symmetric_kl_against_scipy():
    a, b = torch.randn(2, 50, 7, dtype=torch.float64) * 3
    p, q = a.softmax(-1).numpy(), b.softmax(-1).numpy()
    wanted = scipy.stats.entropy(p, q, axis=-1) + scipy.stats.entropy(q, p, axis=-1)
    np.testing.assert_allclose(symmetric_kl(a, b).numpy(), wanted, rtol=2e-5)
    assert symmetric_kl(a, a).abs().max() == 0.0
    assert torch.equal(symmetric_kl(a, b), symmetric_kl(b, a))
    assert symmetric_kl(a.bfloat16(), b.bfloat16()).dtype == torch.float32


def test_symmetric_bernoulli_kl_against_scipy():
    a, b = torch.randn(2, 50, 4, dtype=torch.float64) * 2
    p, q = (torch.stack([x.sigmoid(), 1 - x.sigmoid()]).numpy() for x in (a, b))
    wanted = (scipy.stats.entropy(p, q) + scipy.stats.entropy(q, p)).mean(-1)
    np.testing.assert_allclose(symmetric_bernoulli_kl(a, b).numpy(), wanted, rtol=2e-5)


def test_squared_difference_and_masked_mean():
    a, b = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[3.0, 2.0], [0.0, 1.0]])
    assert squared_difference(a, b).tolist() == [2.0, 0.5]
    values, mask = torch.tensor([1.0, 5.0, 3.0]), torch.tensor([True, False, True])
    assert masked_mean(values, mask) == 2.0
    assert masked_mean(values, torch.zeros(3, dtype=torch.bool)) == 0.0


def test_a_span_has_two_distributions_for_one_label():
    first, second = (torch.tensor([[x], [x]]) for x in (1.0, 3.0))
    mask = torch.tensor([True, True])
    a, b = [(first, mask), (first, mask)], [(second, mask), (first, mask)]
    assert mean_distance(a, b, "real") == 2.0  # (4 + 0) / 2 for each row
    assert summed_distance(a, b, "real") == 8.0


def test_a_sum_has_no_part_of_what_does_not_count():
    a, b = torch.zeros(3, 1), torch.tensor([[1.0], [2.0], [4.0]])
    mask = torch.tensor([True, False, True])
    assert summed_distance([(a, mask)], [(b, mask)], "real") == 17.0
    assert mean_distance([(a, mask)], [(b, mask)], "real") == 8.5
