"""A plan as text: what trains and how; after a run also who trained when, and what moved."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from .proof import table
from .timeline import draw

if TYPE_CHECKING:
    from .compose import Plan


def summary(plan: Plan) -> str:
    """What `print(model.peft_plus)` shows, in a few lines."""
    numbers = [math.prod(param.shape) for param in plan.params.values()]
    on = f"{plan.base.get('class', 'model')}" + (f" in {plan.quantization}" if plan.quantization else "")
    lines = [
        f"{plan.tuner} on {on}, task {plan.task.name or 'of the model'}: "
        f"{sum(numbers):,} parameters in {len(numbers)} tensors",
        *(f"  {p.name}({', '.join(f'{k}={v!r}' for k, v in p.settings().items())})" for p in plan.plugins),
    ]
    if len(plan.stages) > 1:
        lines.append("stages: " + ", ".join(f"{s.name} ({s.train})" for s in plan.stages))
    if plan.timeline:
        lines += ["", draw(plan.timeline, plan.layers.num_blocks)]
    for stage, rows in plan.engagement.items():
        lines += ["", f"{stage}: what moved", table(rows, plan.layers.num_blocks)]
    return "\n".join(lines)
