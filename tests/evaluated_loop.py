"""Loops that are evaluated by a script: a bare one that sees which weights each update moved, and a Trainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import TrainerCallback, default_data_collator

import peft_plus
from peft_plus import Session

from .bare_loop import BareLoop
from .multipliers import rows_of
from .training import quiet

Weights = dict[str, Tensor]


def weights(model: nn.Module) -> Weights:
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


def changed(before: Weights, after: Weights) -> set[str]:
    """The names whose bits differ."""
    return {n for n, t in before.items() if not torch.equal(t.view(torch.uint8), after[n].view(torch.uint8))}


def evaluated_session(
    model: Any, data: Any, values: Mapping[int, float], *, steps: int
) -> tuple[Session, dict[int, Weights]]:
    """A Session over batches of four that is told of evaluations.

    Args:
        values: step → the `eval_loss` that it is told after it.
    Returns: the session, and the weights after each step.
    """
    session = Session(model, Accelerator(cpu=True), max_steps=steps)
    optimizer = session.optimizer(torch.optim.AdamW, lr=1e-2)
    loader = session.loader(data, batch_size=4, collate_fn=default_data_collator)
    seen: dict[int, Weights] = {}
    for batch in session.batches(loader):
        session.accelerator.backward(session.loss(batch))
        optimizer.step()
        optimizer.zero_grad()
        seen[session.step] = weights(model)
        if session.step in values:
            session.evaluated({"eval_loss": values[session.step]})
    return session, seen


class EvaluatedLoop(BareLoop):
    """A `BareLoop` that ends when a plugin says so.

    Args:
        values: step → what the evaluation after it returns as `eval_loss`, or a mapping of metrics.
    Attributes:
        moved: for each step the names whose weights the update moved.
        measured: step → the weights that were evaluated after it.
    """

    def __init__(self, model: Any, *, values: Mapping[int, Any] | None = None, **settings: Any) -> None:
        super().__init__(model, **settings)
        self.values = values or {}
        self.moved: list[set[str]] = []
        self.measured: dict[int, Weights] = {}

    def step(self) -> None:
        before = weights(self.model)
        super().step()
        self.moved.append(changed(before, weights(self.model)))
        if self.finished in self.values:
            value = self.values[self.finished]
            self.measured[self.finished] = weights(self.model)
            self.engine.evaluated(value if isinstance(value, Mapping) else {"eval_loss": value})
            self.engine.evaluation_ended()

    def run(self) -> EvaluatedLoop:
        while self.finished < self.steps and not self.engine.stopped:
            self.step()
        self.engine.prove(None)
        self.engine.close()
        return self

    def held(self) -> set[str]:
        """The names that the optimizer holds a state for."""
        return {name for name, tensor in self.model.named_parameters() if self.optimizer.state.get(tensor)}


def check_evaluated_resume(fresh: Callable[[], nn.Module], *, steps: int, values: Mapping[int, Any]) -> EvaluatedLoop:
    """Interrupt a run after each of its steps, and see that the resumed one ends as the whole one, bit for bit."""
    whole = EvaluatedLoop(fresh(), steps=steps, values=values)
    states = []
    while whole.finished < steps and not whole.engine.stopped:
        whole.step()
        states.append(whole.state())
    whole.engine.prove(None)
    for start, state in enumerate(states, start=1):
        resumed = EvaluatedLoop(fresh(), steps=steps, values=values, start=start, state=state).run()
        assert not changed(weights(whole.model), weights(resumed.model)), f"resumed after step {start}"
        assert resumed.model.peft_plus.timeline == whole.model.peft_plus.timeline, f"resumed after step {start}"
        assert resumed.engine.state_dict()["plugins"] == whole.engine.state_dict()["plugins"]
        assert resumed.finished == whole.finished
        assert resumed.held() == whole.held()
    return whole


def scripted_trainer(
    model: nn.Module, folder: Any, values: Sequence[float], *callbacks: TrainerCallback, **settings: Any
) -> Any:
    """A Trainer that is evaluated after every second step, by a script.

    Args:
        values: what the evaluations return as `eval_score`, one after the other.
    """
    script = iter(values)
    return peft_plus.Trainer(
        model,
        quiet(folder, eval_strategy="steps", eval_steps=2, learning_rate=1e-3, **settings),
        train_dataset=rows_of(40),
        eval_dataset=rows_of(4),
        data_collator=default_data_collator,
        compute_metrics=lambda _: {"score": next(script)},
        callbacks=list(callbacks),
    )
