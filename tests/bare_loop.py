"""A loop over an engine, as plain as it can be: one micro-batch to a step, and everything in it can be looked at."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peft_plus import get_model
from peft_plus.engine import Engine
from peft_plus.state_files import read_state, write_state

from .models import NUM_LABELS, batch, tiny
from .multipliers import multipliers


class BareLoop:
    """Trains one stage of a tiny model step by step, each on random rows drawn from the step's number.

    Args:
        model: from `get_model`.
        steps: of the whole run.
        start, state: where an interrupted run goes on, and what `state()` gave there.
        data: name and task of the model.
    Attributes:
        rates: of each update, see `multipliers`; they mean something under plain SGD without decay.
    """

    def __init__(
        self,
        model: Any,
        *,
        steps: int,
        per_epoch: int = 4,
        lr: float = 1e-2,
        weight_decay: float = 0.1,
        optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
        start: int = 0,
        state: Any = None,
        data: tuple[str, str] = ("bert", "SEQ_CLS"),
    ) -> None:
        self.model, self.steps, self.finished, self.lr, self.data = model, steps, start, lr, data
        self.engine = Engine(model, model.peft_plus, model.peft_plus.stages[0])
        self.optimizer = optimizer(list(self.engine.effects.tensors.values()), lr=lr, weight_decay=weight_decay)
        self.engine.adopt(self.optimizer)
        if state is not None:
            weights, moments, own = copy.deepcopy(state)
            model.load_state_dict(weights)
            self.optimizer.load_state_dict(moments)
            self.engine.load_state_dict(own)
        self.engine.begin(
            step=start, max_steps=steps, steps_per_epoch=per_epoch, optimizer=self.optimizer, lr=lr, seed=0
        )
        self.rates: list[dict[int, float]] = []

    def step(self) -> None:
        """One optimizer step."""
        engine = self.engine
        engine.step_begin(self.finished)
        self.model.train()
        engine.before_forward()
        engine.run.batch = batch(*self.data, seed=self.finished)
        self.model(**engine.run.batch).loss.backward()
        engine.after_backward()
        measure = multipliers(self.model, self.lr)
        engine.before_update()
        self.optimizer.step()
        engine.after_update()
        self.rates.append(measure())
        self.optimizer.zero_grad()
        self.finished += 1
        engine.step_end(self.finished)

    def run(self) -> BareLoop:
        """To the end."""
        while self.finished < self.steps:
            self.step()
        self.engine.prove(None)
        self.engine.close()
        return self

    def state(self) -> Any:
        """What a checkpoint would hold after this step, the plugins' state read back from its files."""
        with tempfile.TemporaryDirectory() as folder:
            write_state(Path(folder) / "state", self.engine.state_dict())
            own = read_state(Path(folder) / "state")
        return *copy.deepcopy((self.model.state_dict(), self.optimizer.state_dict())), own


def check_frozen_rests(loop: BareLoop, look: Callable[[], None] = lambda: None) -> set[int]:
    """Run to the end, and see that below the first plugin's `lowest` nothing moves or has an optimizer's state.

    Args:
        look: called after each step.
    Returns: the depths that were frozen.
    """
    params, tensors = loop.model.peft_plus.params, dict(loop.engine.effects.tensors)
    plugin = loop.model.peft_plus.plugins[0]
    frozen = set()
    while loop.finished < loop.steps:
        lowest = plugin.lowest if loop.finished else 0
        before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        loop.step()
        for name, tensor in tensors.items():
            if params[name].depth < lowest:
                assert torch.equal(tensor, before[name])
                assert not loop.optimizer.state.get(tensor)
                frozen.add(params[name].depth)
        look()
    loop.engine.prove(None)
    return frozen


def check_resume(fresh: Callable[[], nn.Module], *, steps: int = 12, **settings: Any) -> BareLoop:
    """Interrupt a run after each of its steps, and see that the resumed one ends as the whole one, bit for bit.

    Args:
        fresh: makes the model anew, with a new plan.
    Returns: the whole run.
    """
    whole = BareLoop(fresh(), steps=steps, **settings)
    states = []
    while whole.finished < steps:
        whole.step()
        states.append(whole.state())
    whole.engine.prove(None)
    timeline = list(whole.model.peft_plus.timeline)
    for start, state in enumerate(states[:-1], start=1):
        resumed = BareLoop(fresh(), steps=steps, start=start, state=state, **settings).run()
        pairs = zip(resumed.model.state_dict().items(), whole.model.state_dict().values(), strict=True)
        assert all(torch.equal(a, b) for (_, a), b in pairs), f"resumed after step {start}"
        assert resumed.model.peft_plus.timeline == timeline, f"resumed after step {start}"
        assert resumed.engine.state_dict()["plugins"].keys() == whole.engine.state_dict()["plugins"].keys()
    return whole


def on_nf4(method: Any, folder: Any) -> Any:
    """A tiny BERT whose blocks are packed into 4 bits, with adapters beside them; 64 wide, as the kernels want it."""
    tiny("bert", "FEATURE_EXTRACTION", hidden_size=64).save_pretrained(folder)
    return get_model(folder, method, task="SEQ_CLS", num_labels=NUM_LABELS, quantization="nf4")
