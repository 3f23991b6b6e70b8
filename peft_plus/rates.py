"""At which rate everything learns: the only code that sets learning rates.

Plugins declare, this applies. A scaled rate stands in a group only during `optimizer.step()`, so schedulers never
compound it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from .ask import ask
from .compose import Plan, who
from .errors import MethodError, PluginError
from .plugin import Param, Run
from .stages import Stage


class Rates:
    """Applies a plan's `lr_scale` during one stage.

    Args:
        plan: what hangs on the model.
        stage: the stage that will run.
        param_of: tensor → what it is; None for what does not train in this stage.
    """

    def __init__(self, plan: Plan, stage: Stage, param_of: Callable[[Tensor], Param | None]) -> None:
        self._origins, self._param_of = plan.origins, param_of
        self._plugins = [p for p in plan.active(stage) if "lr_scale" in p.hooks()]
        self._schedule = next((p for p in self._plugins if p.schedule), None)

    def split(self, optimizer: Optimizer, *, scheduled: bool = False) -> None:
        """Split the optimizer's groups so that each holds one learning rate, keeping all their options.

        Args:
            optimizer: a fresh optimizer.
            scheduled: whether a scheduler was already made for its groups; then they cannot be split any more.
        Raises:
            MethodError: its groups cannot be scaled.
        """
        if not self._plugins:
            return
        if scheduled and self._schedule is not None:
            raise MethodError(
                f"{who(self._schedule, self._origins)} is a learning-rate schedule itself, but a scheduler was given. "
                "Pass optimizers=(optimizer, None)."
            )
        groups = [part for group in optimizer.param_groups for part in self._parts(group)]
        if scheduled and len(groups) != len(optimizer.param_groups):
            raise MethodError(
                f"{self._plugins[0].name!r} sets a rate for each layer, but the learning-rate scheduler was already "
                "made for the optimizer's groups. Pass optimizers=(optimizer, None), or let the Trainer make both."
            )
        optimizer.param_groups[:] = groups
        if self._schedule is not None:
            for group in groups:  # as every scheduler writes it that leaves a trace
                rate = group["lr"]
                group.setdefault("initial_lr", rate.clone() if isinstance(rate, Tensor) else rate)

    def _parts(self, group: dict[str, Any]) -> list[dict[str, Any]]:
        parts: dict[Any, list[Any]] = {}
        for tensor in group["params"]:
            param = self._param_of(tensor)
            key = tuple(ask(p, "lr_key", param) for p in self._plugins) if param else None
            parts.setdefault(key, []).append(tensor)
        return [{**group, "params": tensors} for tensors in parts.values()]

    def scale(self, optimizer: Optimizer, run: Run) -> Callable[[], None]:
        """Put the plugins' rates into the groups for one update; the returned function puts the old ones back.

        Raises:
            MethodError: a group has no learning rate to scale (Adafactor with relative steps), or a scheduler changes
                it under a plugin that is one itself.
            PluginError: a plugin answered with something that is no factor ≥ 0.
        """
        if not self._plugins:
            return lambda: None
        before = [(group, group["lr"]) for group in optimizer.param_groups]
        scaled: list[tuple[dict[str, Any], Any]] = []
        for group, rate in before:
            param = self._param_of(group["params"][0]) if group["params"] else None
            if param is None:
                continue
            if rate is None:
                raise MethodError(
                    f"{self._plugins[0].name!r} scales the learning rate, but the optimizer computes its own "
                    "(lr=None): set relative_step=False and a learning rate."
                )
            self._check_constant(group, rate, run)
            scaled.append((group, rate * self.factor(run, param)))
        for group, rate in scaled:  # once all plugins have answered, so that none that raises leaves half of them
            # Not in place: capturable optimizers keep the rate in a tensor that the scheduler still holds.
            group["lr"] = rate

        def restore() -> None:
            for group, rate in before:
                group["lr"] = rate

        return restore

    def _check_constant(self, group: dict[str, Any], rate: Any, run: Run) -> None:
        if self._schedule is not None and float(rate) != float(group.get("initial_lr", rate)):
            raise MethodError(
                f"{who(self._schedule, self._origins)} is a learning-rate schedule itself, but another one runs under "
                f"it: at step {run.step} it has changed the rate from {float(group['initial_lr']):g} to "
                f"{float(rate):g}. Leave the scheduler out, or use 'constant'."
            )

    def factor(self, run: Run, param: Param) -> float:
        """The product of all plugins' multipliers for one parameter."""
        product = 1.0
        for plugin in self._plugins:
            factor = ask(plugin, "lr_scale", run, param)
            if not (isinstance(factor, (int, float)) and math.isfinite(factor) and factor >= 0):
                raise PluginError(
                    f"{who(plugin, self._origins)}: lr_scale returned {factor!r} for {param.name} at step "
                    f"{run.step}; expected a number ≥ 0."
                )
            product *= factor
        return product
