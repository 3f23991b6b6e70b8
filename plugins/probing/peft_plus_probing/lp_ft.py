"""LP-FT: linear probing, then fine-tuning."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from peft_plus import Plugin, Stage


@dataclass(kw_only=True)
class LPFT(Plugin):
    """First train the head alone, then everything that the tuner trains, starting from that head.

    A random head sends large, arbitrary gradients into pretrained features and distorts them; a converged head does
    not (Kumar et al. 2022, arXiv:2202.10054). Two stages: `probe` (head only, no other plugin at work) before the
    stages that are there already. At the first fine-tuning step the logits are the probe's. Run it with
    `peft_plus.fit`.

    Args:
        probe_epochs: passes over the data for the head, > 0.
        probe_lr: learning rate of the head in that stage, > 0; a head alone stands far larger ones than fine-tuning.
    Raises:
        ValueError: a setting is not positive.
    """

    name: ClassVar[str] = "lp_ft"
    source: ClassVar[str] = "Kumar et al. 2022, arXiv:2202.10054"
    needs: ClassVar[tuple[str, ...]] = ("new_head", "body")

    probe_epochs: float = 3.0
    probe_lr: float = 1e-3

    def __post_init__(self) -> None:
        for setting in ("probe_epochs", "probe_lr"):
            if not 0 < getattr(self, setting) < math.inf:
                raise ValueError(f"{setting}={getattr(self, setting)}: give a number > 0.")

    def plan_stages(self, stages: Sequence[Stage]) -> Sequence[Stage]:
        probe = Stage(
            name="probe",
            train="head",
            plugins=(),
            # max_steps would override the epochs, so a user's value for fine-tuning must not reach the probe.
            args={"num_train_epochs": self.probe_epochs, "learning_rate": self.probe_lr, "max_steps": -1},
        )
        return (probe, *stages)
