"""What peft_plus costs beside plain PEFT: time of a step, memory of a step, checkpoints.

    python -m benchmarks.overhead

Each loop of ours takes turns, step by step and on one thread, with what a user would write without us: PEFT's model in
transformers' Trainer, and in a bare Accelerate loop. The targets: at most 2 % of a MiniLM step; not one byte more saved
for the backward pass. Where one is missed, the exit code is 1. What single plugins cost, and what is done once in a
run, is shown for information.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from examples.demo import quiet

from .turns import Loop, Turn, difference, take_turns

ROWS, TOKENS = 16, 32
TARGET = 0.02

PLUGINS: Mapping[str, Mapping[str, Any]] = {
    "gradual_unfreeze": {"every": 1},  # thawed within the steps that do not count; what stays is being asked
    "llrd": {},
    "length_buckets": {},
}
"""What is shown for information: the plugins that change no computation, so that all that is seen is their cost."""

Make = Callable[[], Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure everything, print the tables; returns how many targets were missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="pairs of steps to compare (default 60)")
    parser.add_argument(
        "--quick", action="store_true", help="the tiny model, few steps, no plugins: shows that it runs"
    )
    options = parser.parse_args(argv)
    steps = 8 if options.quick else options.steps
    bases: dict[str, Make] = {"tiny BERT": tiny}
    if not options.quick:
        bases["MiniLM-L6"] = minilm
    quiet.hide_progress_bars()
    missed: list[str] = []
    tables = (
        step_table(bases, steps, {} if options.quick else PLUGINS, missed),
        once_table(bases, 1 if options.quick else 7),
        memory_table(bases, missed),
        checkpoint_table(bases, 2 if options.quick else 16),
    )
    for table in tables:
        for line in table:
            print(line, flush=True)
        print()
    for line in missed:
        print(f"Missed: {line}")
    return len(missed)


# ---- what is compared ----------------------------------------------------------------------------------------------


def tiny() -> Any:
    """A BERT of two blocks, 64 wide: nearly all of its step is overhead of some kind."""
    from transformers import BertConfig, BertForSequenceClassification

    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    return BertForSequenceClassification(BertConfig(vocab_size=1_000, **shape))


def minilm() -> Any:
    """MiniLM-L6 with a new head."""
    from transformers import AutoModelForSequenceClassification

    from examples import inputs

    return AutoModelForSequenceClassification.from_pretrained(inputs.minilm(), num_labels=2)


def lora() -> Any:
    """The same for both sides."""
    from peft import LoraConfig

    return LoraConfig(task_type="SEQ_CLS", r=8)


def plain_model(base: Make) -> Any:
    """What plain PEFT makes."""
    import torch
    from peft import get_peft_model

    torch.manual_seed(0)
    return get_peft_model(base(), lora())


def our_model(base: Make, plugins: Mapping[str, Any]) -> Any:
    """The same through us."""
    import torch

    import peft_plus

    torch.manual_seed(0)
    return peft_plus.attach(plain_model(base), plugins) if plugins else peft_plus.get_model(base(), lora())


def rows(number: int) -> list[dict[str, Any]]:
    """Random sentences, all equally long, so that every step is the same work."""
    import torch

    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 1_000, (number, TOKENS), generator=draw)
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": int(row[0]) % 2} for row in ids]


def trainer(trainer_class: Any, model: Any, steps: int, folder: str, *callbacks: Any, **settings: Any) -> Any:
    """A Trainer that does nothing beside training."""
    from transformers import PrinterCallback, TrainingArguments, default_data_collator

    silence = {"report_to": "none", "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True}
    made = trainer_class(
        model,
        TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=ROWS, use_cpu=True, **{**silence, **settings}
        ),
        train_dataset=rows(8 * ROWS),
        data_collator=default_data_collator,
        callbacks=list(callbacks),
    )
    made.remove_callback(PrinterCallback)
    return made


def trainer_loop(trainer_class: Any, make: Make, steps: int) -> Loop:
    """One run of a Trainer as a loop that takes turns."""

    def loop(turn: Turn) -> None:
        from transformers import TrainerCallback

        class Turns(TrainerCallback):
            def on_step_begin(self, *_: Any, **__: Any) -> None:
                turn()

            def on_train_end(self, *_: Any, **__: Any) -> None:
                turn()

        with tempfile.TemporaryDirectory() as folder:
            trainer(trainer_class, make(), steps, folder, Turns()).train()

    return loop


def bare_loop(make: Make, steps: int) -> Loop:
    """The loop of Accelerate's documentation."""

    def loop(turn: Turn) -> None:
        import torch
        from accelerate import Accelerator
        from transformers import default_data_collator

        accelerator = Accelerator(cpu=True)
        model = make()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-5)
        loader = torch.utils.data.DataLoader(rows(8 * ROWS), ROWS, shuffle=True, collate_fn=default_data_collator)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        done = 0
        while done < steps:
            model.train()
            for batch in loader:
                turn()
                with accelerator.accumulate(model):
                    accelerator.backward(model(**batch).loss)
                    optimizer.step()
                    optimizer.zero_grad()
                done += 1
                if done == steps:
                    break
        turn()

    return loop


def session_loop(make: Make, steps: int) -> Loop:
    """The same loop in a Session."""

    def loop(turn: Turn) -> None:
        import torch
        from accelerate import Accelerator
        from transformers import default_data_collator

        from peft_plus.session import Session

        accelerator = Accelerator(cpu=True)
        session = Session(make(), accelerator, max_steps=steps)
        optimizer = session.optimizer(torch.optim.AdamW, lr=5e-5)
        loader = session.loader(rows(8 * ROWS), batch_size=ROWS, collate_fn=default_data_collator)
        for batch in session.batches(loader):
            turn()
            with accelerator.accumulate(session.model):
                accelerator.backward(session.loss(batch))
                optimizer.step()
                optimizer.zero_grad()
        turn()

    return loop


# ---- tables --------------------------------------------------------------------------------------------------------


def step_table(
    bases: Mapping[str, Make], steps: int, plugins: Mapping[str, Mapping[str, Any]], missed: list[str]
) -> Iterator[str]:
    """Time of a step, against the same without us; processor time of the thread, and by the clock."""
    import transformers

    import peft_plus

    yield from (
        f"Time of an optimizer step, {ROWS} × {TOKENS} tokens, one thread, steps in turn; target ≤ {TARGET:.0%} on "
        "MiniLM-L6.",
        "",
        "| what | against | model | step, ms | more, µs (quartiles) | share | by the clock | pairs |",
        "|---|---|---|--:|--:|--:|--:|--:|",
    )
    for title, base in bases.items():
        warm_up = 3 + base().config.num_hidden_layers  # until gradual_unfreeze has thawed everything

        made = steps + warm_up

        def ours(beside: Mapping[str, Any], base: Make = base, made: int = made) -> Loop:
            return trainer_loop(peft_plus.Trainer, lambda: our_model(base, beside), made)

        plain = trainer_loop(transformers.Trainer, lambda base=base: plain_model(base), made)
        session = session_loop(lambda base=base: our_model(base, {}), made)
        bare = bare_loop(lambda base=base: plain_model(base), made)
        cases = [
            ("PEFT + Trainer", "itself", plain, plain),  # how far apart two equal loops seem
            ("lora", "PEFT + Trainer", ours({}), plain),
            ("lora in a Session", "PEFT + Accelerate", session, bare),
        ]
        cases += [(f"+ {name}", "lora", ours({name: settings}), ours({})) for name, settings in plugins.items()]
        for name, other, loop, reference in cases:
            laps = take_turns({"theirs": reference, "ours": loop}, warm_up=warm_up)
            cpu = difference(laps["ours"].cpu, laps["theirs"].cpu)
            wall = difference(laps["ours"].wall, laps["theirs"].wall)
            yield (
                f"| {name} | {other} | {title} | {1e3 * cpu.step:.1f} | {1e6 * cpu.more:+.0f} ({1e6 * cpu.low:+.0f} to "
                f"{1e6 * cpu.high:+.0f}) | {cpu.share:+.1%} | {wall.share:+.1%} | {cpu.pairs} |"
            )
            if title == "MiniLM-L6" and not name.startswith("+") and cpu.share > TARGET:
                missed.append(f"a step of {name} on {title} takes {cpu.share:.1%} more, the target is {TARGET:.0%}.")


def once_table(bases: Mapping[str, Make], runs: int) -> Iterator[str]:
    """What is done once in a run: before the first step, and after the last."""
    import torch
    from transformers import default_data_collator

    import peft_plus
    from peft_plus.engine import Engine

    yield from (
        "Once in a run: when it begins and when it ends every weight is looked at, frozen ones too (proof of "
        f"engagement). Medians of {runs}.",
        "",
        "| model | begin, ms | end, ms |",
        "|---|--:|--:|",
    )
    for title, base in bases.items():
        times: dict[str, list[float]] = {"begin": [], "prove": []}

        class Timed(Engine):
            def begin(self, times: Any = times, **given: Any) -> None:
                start = time.perf_counter()
                super().begin(**given)
                times["begin"].append(time.perf_counter() - start)

            def prove(self, save: Any, times: Any = times) -> None:
                start = time.perf_counter()
                super().prove(save)
                times["prove"].append(time.perf_counter() - start)

        torch.set_num_threads(1)
        for _ in range(runs):
            with tempfile.TemporaryDirectory() as folder:
                made = trainer(peft_plus.Trainer, our_model(base, {}), 2, folder)
                made.data_collator = default_data_collator
                timed(made, Timed)
        begin, end = (1e3 * float(np.median(times[name])) for name in ("begin", "prove"))
        yield f"| {title} | {begin:.0f} | {end:.0f} |"


def timed(made: Any, engine_class: Any) -> None:
    """Train with another Engine."""
    from peft_plus import hf

    original, hf.Engine = hf.Engine, engine_class
    try:
        made.train()
    finally:
        hf.Engine = original


def memory_table(bases: Mapping[str, Make], missed: list[str]) -> Iterator[str]:
    """Bytes that autograd keeps from the forward to the backward pass, in the first step."""
    import transformers

    import peft_plus

    yield from (
        "Saved for the backward pass of a step.",
        "",
        "| model | loop | without us, bytes | ours, bytes | equal |",
        "|---|---|--:|--:|---|",
    )
    for title, base in bases.items():

        def stock(base: Make = base) -> Any:
            return plain_model(base)

        def planned(base: Make = base) -> Any:
            return our_model(base, {})

        loops = {
            "Trainer": (trainer_loop(transformers.Trainer, stock, 1), trainer_loop(peft_plus.Trainer, planned, 1)),
            "Accelerate": (bare_loop(stock, 1), session_loop(planned, 1)),
        }
        for name, pair in loops.items():
            plain, ours = (saved_bytes(loop) for loop in pair)
            yield f"| {title} | {name} | {plain:,} | {ours:,} | {'yes' if plain == ours else 'NO'} |"
            if plain != ours:
                missed.append(f"a step of {title} ({name}) saves {ours - plain:+,} bytes.")


def saved_bytes(loop: Loop) -> int:
    """Of a loop of one step."""
    import torch

    saved = 0

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal saved
        saved += tensor.nbytes
        return tensor

    torch.manual_seed(0)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loop(lambda: None)
    return saved


def checkpoint_table(bases: Mapping[str, Make], saves: int) -> Iterator[str]:
    """Writing a checkpoint of a running loop, and going on from it; by the clock, as much of it is the disk's."""
    yield from (
        "A training checkpoint of lora, by the clock, medians. Ours are on the disk when they are written (fsync), and "
        "hold a SHA-256 of each file, which is compared on resume.",
        "",
        "| model | | without us | ours | ratio | pairs |",
        "|---|---|--:|--:|--:|--:|",
    )
    yield from trainer_checkpoints(bases, saves)
    yield from session_checkpoints(bases, saves)


def trainer_checkpoints(bases: Mapping[str, Make], saves: int) -> Iterator[str]:
    """Rows for the Trainer."""
    import transformers

    import peft_plus

    sides = {
        "theirs": (transformers.Trainer, plain_model),
        "ours": (peft_plus.Trainer, lambda base: our_model(base, {})),
    }
    for title, base in bases.items():
        with tempfile.TemporaryDirectory() as place:
            folders = {side: os.path.join(place, side) for side in sides}
            written: dict[str, list[float]] = {side: [] for side in sides}
            loops = {
                side: saving_loop(cls, lambda make=make, base=base: make(base), folders[side], saves, written[side])
                for side, (cls, make) in sides.items()
            }
            take_turns(loops, warm_up=0)
            sizes = {side: folder_size(os.path.join(folders[side], f"checkpoint-{saves}")) for side in sides}
            read: dict[str, list[float]] = {side: [] for side in sides}
            for _ in range(min(saves, 7)):
                for side, (cls, make) in sides.items():
                    read[side].append(resume_seconds(cls, make(base), folders[side], saves))
        yield time_row(f"{title}, Trainer", "write", written)
        yield time_row(f"{title}, Trainer", "resume", read)
        yield size_row(f"{title}, Trainer", sizes)


def time_row(title: str, what: str, seconds: Mapping[str, Sequence[float]]) -> str:
    """Medians of both sides."""
    medians = {side: float(np.median(times)) for side, times in seconds.items()}
    ratio = medians["ours"] / medians["theirs"]
    cells = [f"{1e3 * medians[side]:.0f} ms" for side in ("theirs", "ours")]
    return f"| {title} | {what} | {cells[0]} | {cells[1]} | {ratio:.2f} × | {len(seconds['ours'])} |"


def size_row(title: str, sizes: Mapping[str, int]) -> str:
    """Bytes of a checkpoint on both sides."""
    ratio = sizes["ours"] / sizes["theirs"]
    return f"| {title} | bytes | {sizes['theirs']:,} | {sizes['ours']:,} | {ratio:.2f} × | |"


def saving_loop(trainer_class: Any, make: Make, folder: str, saves: int, seconds: list[float]) -> Loop:
    """A run that saves after every step; fills `seconds`."""

    def loop(turn: Turn) -> None:
        from transformers import TrainerCallback

        class Saves(TrainerCallback):
            def on_step_begin(self, *_: Any, **__: Any) -> None:
                turn()

            def on_step_end(self, *_: Any, **__: Any) -> None:
                self.start = time.perf_counter()

            def on_save(self, *_: Any, **__: Any) -> None:
                seconds.append(time.perf_counter() - self.start)

        settings = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}
        trainer(trainer_class, make(), saves, folder, Saves(), **settings).train()

    return loop


def resume_seconds(trainer_class: Any, model: Any, folder: str, steps: int) -> float:
    """From `train(resume_from_checkpoint=…)`, of the last checkpoint but one, to where its first step begins."""
    from transformers import TrainerCallback

    class Begun(TrainerCallback):
        seconds = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.seconds = self.seconds or time.perf_counter() - start

    begun = Begun()
    resumed = trainer(trainer_class, model, steps, folder, begun, save_strategy="steps", save_steps=1)
    start = time.perf_counter()
    resumed.train(resume_from_checkpoint=os.path.join(folder, f"checkpoint-{steps - 1}"))
    return begun.seconds


def session_checkpoints(bases: Mapping[str, Make], saves: int) -> Iterator[str]:
    """Rows for a bare loop: `session.save` and `resume` against Accelerate's `save_state` and `load_state`."""
    for title, base in bases.items():
        with tempfile.TemporaryDirectory() as place:
            written: dict[str, list[float]] = {"theirs": [], "ours": []}
            folders = {side: os.path.join(place, side) for side in written}
            loops = {
                "theirs": saving_bare_loop(
                    lambda base=base: plain_model(base), folders["theirs"], saves, written["theirs"]
                ),
                "ours": saving_session(lambda base=base: our_model(base, {}), folders["ours"], saves, written["ours"]),
            }
            take_turns(loops, warm_up=0)
            yield time_row(f"{title}, bare loop", "write", written)
            yield size_row(
                f"{title}, bare loop", {side: folder_size(folder) // saves for side, folder in folders.items()}
            )


def saving_bare_loop(make: Make, folder: str, saves: int, seconds: list[float]) -> Loop:
    """Accelerate's own, after every step; fills `seconds`."""

    def loop(turn: Turn) -> None:
        import torch
        from accelerate import Accelerator
        from transformers import default_data_collator

        accelerator = Accelerator(cpu=True)
        model = make()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-5)
        loader = torch.utils.data.DataLoader(rows(saves * ROWS), ROWS, collate_fn=default_data_collator)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        model.train()
        for step, batch in enumerate(loader):
            turn()
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
            start = time.perf_counter()
            accelerator.save_state(os.path.join(folder, f"checkpoint-{step}"))
            seconds.append(time.perf_counter() - start)
        turn()

    return loop


def saving_session(make: Make, folder: str, saves: int, seconds: list[float]) -> Loop:
    """A Session that saves after every step; fills `seconds`."""

    def loop(turn: Turn) -> None:
        import torch
        from accelerate import Accelerator
        from transformers import default_data_collator

        from peft_plus.session import Session

        accelerator = Accelerator(cpu=True)
        session = Session(make(), accelerator, max_steps=saves)
        optimizer = session.optimizer(torch.optim.AdamW, lr=5e-5)
        loader = session.loader(rows(saves * ROWS), batch_size=ROWS, collate_fn=default_data_collator)
        for batch in session.batches(loader):
            turn()
            accelerator.backward(session.loss(batch))
            optimizer.step()
            optimizer.zero_grad()
            start = time.perf_counter()
            session.save(folder)
            seconds.append(time.perf_counter() - start)
        turn()

    return loop


def folder_size(folder: str) -> int:
    """Bytes of all files in it."""
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    quiet.before_imports()  # main imports what this silences
    sys.exit(1 if main() else 0)
