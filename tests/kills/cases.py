"""What is killed: short runs, each with one thing more that a resume must find again."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from peft import LoraConfig

from peft_plus import Plugin, Run


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run. Dropout is on everywhere, and the last micro-batch of each epoch is smaller than the others.

    Attributes:
        method: as for `get_model`.
        epochs: passes over the data.
        accumulation: micro-batches in a step.
        save_every: steps; None: at the end of each epoch.
        limit: how many checkpoints stay; None: all.
        quantization: of the base.
        draws: the collator draws random numbers.
        stream: the data have no length, and are read through again and again for as many steps.
        workers: processes that load the data.
        arguments: more TrainingArguments, of the Trainer only.
        staged: the method runs in several stages; under the Trainer only, by `fit`.
    """

    method: Any = field(default_factory=lambda: {"lora": {"lora_dropout": 0.1}})
    epochs: int = 2
    accumulation: int = 1
    save_every: int | None = 2
    limit: int | None = 2
    quantization: str | None = None
    draws: bool = False
    stream: bool = False
    workers: int = 0
    arguments: dict[str, Any] = field(default_factory=dict)
    staged: bool = False


@dataclass(kw_only=True)
class Countdown(Plugin):
    """The rate falls with each step. Its state is kept, not derived from the step."""

    name: ClassVar[str] = "countdown"

    left: float = field(init=False, default=1.0)

    def lr_scale(self, run: Run, param: Any) -> float:
        return self.left

    def on_step_end(self, run: Run) -> None:
        self.left *= 0.9


LORA = {"lora": {"lora_dropout": 0.1}}
TOGETHER = LORA | {"gradual_unfreeze": {"every": 2}, "llrd": {"decay": 0.5}, "r3f": {"eps": 0.1}}

CASES: dict[str, Case] = {
    "plain": Case(limit=None),
    "limit 1": Case(limit=1),
    "mid-epoch": Case(save_every=5),
    "boundary": Case(save_every=None, epochs=3),
    "full": Case(method="full", limit=1),
    "gradual_unfreeze": Case(method=LORA | {"gradual_unfreeze": {"every": 2}}),
    "llrd": Case(method=LORA | {"llrd": {"decay": 0.5}}),
    "r3f": Case(method=LORA | {"r3f": {"eps": 0.1}}),
    "together": Case(method=TOGETHER),
    "two stages": Case(method=TOGETHER | {"lp_ft": {"probe_epochs": 1.0}}, epochs=1, staged=True),
    "accumulation": Case(method=TOGETHER, accumulation=4, epochs=4, save_every=1),
    "nf4": Case(quantization="nf4"),
    "stateful plugin": Case(method=[LoraConfig(task_type="SEQ_CLS", lora_dropout=0.1), Countdown()]),
    "length_buckets": Case(method=LORA | {"length_buckets": {}}),
    "random collator": Case(draws=True),
    "random collator, 2 workers": Case(draws=True, workers=2),
    "random collator, stream": Case(draws=True, stream=True),
    "random order": Case(arguments={"train_sampling_strategy": "group_by_length"}),
    "evaluation at the boundary": Case(save_every=3, arguments={"eval_strategy": "epoch"}),
    "best model": Case(
        limit=1,
        arguments={
            "eval_strategy": "steps",
            "eval_steps": 2,
            "load_best_model_at_end": True,
            "metric_for_best_model": "eval_loss",
            "greater_is_better": False,
        },
    ),
}
RUNS = [
    *(("trainer", name) for name in CASES),
    *(("session", name) for name, case in CASES.items() if not (case.arguments or case.staged)),
]
"""Every (loop, case)."""
