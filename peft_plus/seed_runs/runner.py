"""All runs of one training: one after another or in several processes, each result kept at once."""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Collection
from pathlib import Path
from typing import Literal

from ..errors import TrainingError
from ..watched_metric import rises
from .axis import AXES, Axis
from .call import Call
from .claim import claim, named
from .errors import CallError
from .finish_best import halve, race
from .lock import only_one
from .one_run import Evaluate, Factory
from .racing import Racing, SuccessiveHalving
from .results import SETTINGS, SeedRuns, error_file, read_results, value_of
from .several import run_all

logger = logging.getLogger(__name__)


def seeds(
    factory: Factory,
    n: int = 20,
    *,
    metric: str = "eval_loss",
    greater_is_better: bool | None = None,
    out: str | os.PathLike[str] = "out/seeds",
    base: int = 0,
    vary: Collection[Axis] = AXES,
    evaluate: Evaluate | None = None,
    racing: Racing | SuccessiveHalving | None = None,
    workers: int | Literal["auto"] = 1,
    description: str | None = None,
) -> SeedRuns:
    """Run one training under many seeds.

    ```python
    def lora(seeds):
        model = get_model("bert-base-uncased", "lora", task="SEQ_CLS", num_labels=2)
        return Trainer(model, TrainingArguments(num_train_epochs=3), train_dataset=train, eval_dataset=dev,
                       compute_metrics=model.peft_plus.task.compute_metrics)

    runs = peft_plus.seeds(lora, n=20, metric="accuracy", out="out/lora")
    print(runs.report())
    ```

    Each result is written as soon as it is there. A second call with the same `out` makes only what is missing; an
    interrupted run goes on from its newest checkpoint, where its arguments save any. A run that diverges has a result,
    and counts as failed. Runs that end by another error are recorded, and the others go on.

    Args:
        factory: `Seeds` → a Trainer, not yet trained, with a model that it builds anew each time. Torch's, NumPy's and
            Python's random numbers are seeded with `init` before each call; `output_dir`, `seed` and `data_seed` of its
            arguments are set here.
        n: runs, ≥ 2. A later call may ask for more.
        metric: of the final evaluation, e.g. `accuracy` or `eval_loss`. Another one makes no run anew.
        greater_is_better: by default less is better of a loss or an error, by its name, else more.
        out: folder for results, `run-<number>.json`, and for what runs need meanwhile.
        base: first seed.
        vary: the axes on which runs differ, of `init`, `order`, `dropout`; the others keep the seed `base`.
        evaluate: the trained Trainer → metrics; its `evaluate()` by default.
        racing: finish only the best; `Racing` needs Trainers of peft_plus, which resume bit by bit.
        workers: processes, or as many as cores and free memory allow; then factory and `evaluate` must be found by
            import, as functions of a module are. A script calls this below `if __name__ == "__main__":` then.
        description: of what is trained; runs with another one are not taken for these.
    Returns: the results.
    Raises:
        ValueError: an argument is out of its range.
        MethodError: the factory gives no Trainer, or the model of an earlier run; the metric was never logged; `out`
            holds the runs of another call, or another one works in it.
        TrainingError: runs failed, and all others were made. Finished ones are kept, and calling again goes on.
    """
    call = Call(
        factory=factory,
        out=Path(out),
        base=base,
        vary=tuple(axis for axis in AXES if axis in vary),
        metric=metric,
        greater_is_better=rises(metric, greater_is_better),
        evaluate=evaluate,
        exact=isinstance(racing, Racing),
    )
    _check(call, n, vary, racing, workers)
    with only_one(call.out):
        return _made(call, n, racing, workers, description)


def _made(
    call: Call,
    n: int,
    racing: Racing | SuccessiveHalving | None,
    workers: int | Literal["auto"],
    description: str | None,
) -> SeedRuns:
    """What is missing is made."""
    _claim(call, racing, description)
    done = {number: result for number, result in read_results(call.out).items() if number < n}
    if done:
        logger.info("%s holds %d of %d results; they are not made again.", call.out, len(done), n)
    for result in done.values():
        value_of(result, call.metric)
    if isinstance(racing, SuccessiveHalving):
        failed = halve(call, racing, n, done)
    elif isinstance(racing, Racing):
        failed = race(call, racing, n, done, workers)
    else:
        missing = [k for k in range(n) if k not in done]
        failed = run_all(call, missing, workers, lambda result: call.keep(result, done))
    results = SeedRuns(
        results=tuple(done[number] for number in sorted(done)),
        metric=call.metric,
        greater_is_better=call.greater_is_better,
        folder=call.out,
    )
    if failed:
        raise TrainingError(
            f"{len(failed)} of {n} runs failed, the first by {next(iter(failed.values()))}. The tracebacks are in "
            f"{error_file(call.out, '<number>')}, for {', '.join(map(str, failed))}; {len(done)} results are kept. "
            "Mend the cause and call again: only what is missing is made. SeedRuns.load reads what there is."
        )
    return results


def _check(
    call: Call,
    n: int,
    vary: Collection[str],
    racing: Racing | SuccessiveHalving | None,
    workers: int | Literal["auto"],
) -> None:
    if not callable(call.factory):
        raise CallError(f"seeds(factory, …): {call.factory!r} is not callable; give a function: Seeds → Trainer.")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise CallError(
            "seeds makes whole runs, one to a process: call it in a single process, not under torchrun or accelerate "
            "launch. Several runs at a time are workers=2 or more."
        )
    if n < 2:
        raise ValueError(f"n={n}: a spread needs two runs at least.")
    if call.base < 0:
        raise ValueError(f"base={call.base}: give a seed ≥ 0.")
    unknown = set(vary) - set(AXES)
    if unknown or not vary:
        raise ValueError(f"vary={tuple(vary)}: give one or more of {', '.join(AXES)}.")
    if isinstance(racing, Racing) and racing.keep >= n:
        raise ValueError(f"Racing(keep={racing.keep}) of n={n} runs leaves none out: keep fewer, or start more.")
    if workers != "auto" and workers < 1:
        raise ValueError(f"workers={workers}: give a number ≥ 1, or 'auto'.")
    if workers != 1 and isinstance(racing, SuccessiveHalving):
        raise ValueError("SuccessiveHalving judges each run by those before it: leave out workers.")
    if workers != 1:
        for name, value in (("factory", call.factory), ("evaluate", call.evaluate)):
            try:
                pickle.dumps(value)
            except (pickle.PicklingError, AttributeError, TypeError) as error:
                raise CallError(
                    f"workers={workers!r}: {name} cannot be sent to another process ({error}). Define it at the top "
                    "level of a module, not inside a function; settings of its own go in by functools.partial."
                ) from error


def _claim(call: Call, racing: Racing | SuccessiveHalving | None, description: str | None) -> None:
    """Note whose runs `out` holds, or see that they are ours."""
    body = named(call.factory) | {
        "base": call.base,
        "vary": list(call.vary),
        "racing": repr(racing),
        "description": description,
    }
    claim(call.out / SETTINGS, body, {"metric": call.metric, "greater_is_better": call.greater_is_better})
