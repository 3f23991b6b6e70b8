"""The two sides of a comparison: what a user writes without us, and the same through us, as loops that take turns."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from typing import Any

from .turns import Loop, Turn

ROWS, TOKENS = 16, 32

Make = Callable[[], Any]


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
