"""Loss terms: the sum over all micro-batches and processes is one big batch's, by arithmetic done here by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from peft_plus import LossTerm, Plugin, PluginError, Run
from peft_plus.losses import StepTotals, collect, contribution, mean


def giving(name: str, **terms: Any) -> Plugin:
    return type("Giving", (Plugin,), {"name": name, "loss_terms": lambda self, run, batch, output: terms})()


RUN = Run(model=nn.Identity(), task=None, num_blocks=0)  # type: ignore[arg-type]


def scalar(value: float) -> torch.Tensor:
    return torch.tensor(value, requires_grad=True)


# Two processes, two micro-batches each: (labels, rows, Σ of the term).
BATCHES = [[(3, 2, 6.0), (5, 4, -1.0)], [(0, 1, 0.0), (7, 3, 8.0)]]


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("per", ["label", "example"])
def test_contributions_add_up_to_the_mean_of_one_big_batch(per, processes):
    used = BATCHES[:processes]
    labels = sum(n for process in used for n, _, _ in process)
    rows = sum(r for process in used for _, r, _ in process)
    totals = StepTotals(labels=labels, examples=rows, micro_batches=2, processes=processes)
    by_process = [
        sum(
            float(contribution(LossTerm(torch.tensor(s), n if per == "label" else r, per), totals))
            for n, r, s in process
        )
        for process in used
    ]
    averaged = sum(by_process) / processes  # what DDP does to gradients
    wanted = sum(s for process in used for _, _, s in process) / (labels if per == "label" else rows)
    assert averaged == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("processes", [1, 3])
def test_a_step_term_counts_once_per_step(processes):
    totals = StepTotals(labels=10, examples=4, micro_batches=4, processes=processes)
    by_process = [
        sum(float(contribution(LossTerm(torch.tensor(2.0), 1, "step"), totals)) for _ in range(4))
    ] * processes
    assert sum(by_process) / processes == pytest.approx(2.0)


def test_the_gradient_goes_through_with_the_same_factor():
    value = scalar(3.0)
    contribution(LossTerm(value * 5, 5), StepTotals(20, 8, 4, processes=2)).backward()
    assert value.grad is not None
    assert float(value.grad) == pytest.approx(5 * 2 / 20)


@pytest.mark.parametrize("total", [0, 0.0])
@pytest.mark.parametrize("per", ["label", "example", "step"])
def test_a_step_without_labels_is_no_division_by_zero(per, total):
    value = scalar(0.0)
    part = contribution(LossTerm(value * 1, 0, per), StepTotals(total, total, 1))
    part.backward()
    assert float(part.detach()) == 0.0
    assert value.grad is not None
    assert torch.isfinite(value.grad)


def test_fewer_than_one_is_possible_only_for_zero():
    assert float(contribution(LossTerm(torch.tensor(1.0), 1), StepTotals(1, 1, 1))) == 1.0


def test_the_logged_mean_is_the_terms_own():
    assert float(mean(LossTerm(scalar(6.0), 3))) == 2.0
    assert float(mean(LossTerm(scalar(6.0), torch.tensor(3)))) == 2.0
    assert float(mean(LossTerm(scalar(6.0), 3, "step"))) == 6.0
    assert float(mean(LossTerm(scalar(0.0), torch.tensor(0)))) == 0.0
    assert not mean(LossTerm(scalar(6.0), 3)).requires_grad


def test_terms_are_collected_in_the_order_of_the_plugins():
    a, b = LossTerm(scalar(1.0), 1), LossTerm(scalar(2.0), 1)
    assert list(collect([giving("one", x=a), giving("two", y=b)], RUN, {}, None).items()) == [("x", a), ("y", b)]


def test_one_name_from_two_plugins_is_an_error_that_names_both():
    term = LossTerm(scalar(1.0), 1)
    with pytest.raises(PluginError, match=r"'one' .* and plugin 'two' .* both add a loss term called 'x'"):
        collect([giving("one", x=term), giving("two", x=term)], RUN, {}, None)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (torch.tensor(1.0), "Tensor"),
        (1.0, "float"),
        (None, "NoneType"),
        (LossTerm(torch.zeros(3), 3), r"sum \(3,\)"),
        (LossTerm(torch.zeros(1), 1), r"sum \(1,\)"),
        (LossTerm(2.0, 1), "sum float"),  # type: ignore[arg-type]
    ],
)
def test_what_is_no_summed_scalar_is_an_error(wrong, said):
    with pytest.raises(PluginError, match=f"'one'.*'x'.*{said}.*expected LossTerm"):
        collect([giving("one", x=wrong)], RUN, {}, None)


def test_a_plugin_that_raises_is_named_with_hook_and_step():
    class Broken(Plugin):
        name = "broken"

        def loss_terms(self, run, batch, output):
            raise KeyError("labels")

    RUN.step = 7
    with pytest.raises(PluginError, match=r"plugin 'broken' \(.*\) failed in loss_terms at step 7: KeyError: 'labels'"):
        collect([Broken()], RUN, {}, None)


@pytest.mark.parametrize("per", ["labels", "batch", ""])
def test_an_unknown_unit_is_an_error(per):
    with pytest.raises(PluginError, match=r"'one'.*'x'.*per="):
        collect([giving("one", x=LossTerm(scalar(1.0), 1, per))], RUN, {}, None)
