"""Rows from which nothing can be learned, or that the model cannot read: named before the first pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding, default_data_collator

from peft_plus import DataError, LossTerm, Plugin, Session, TrainingError, get_model
from peft_plus.data_limits import limits_of
from peft_plus.step_loss import UNLABELLED_IN_A_ROW
from peft_plus.token_rows import Positions, positions_of, segments_of

from .bad_inputs import Watched, built, refused, rows, same, trainer, weights
from .models import BOS, PAD, TEXT_MODELS, has_task, tiny
from .tokenizers import tiny_tokenizer

Rows = list[dict[str, Any]]


def changed(column: str, value: Any, *, only: int | None = None, task: str | None = None, name: str = "bert") -> Rows:
    """Good rows but for one column, in all or in one of them; `value` is a function of what it was."""
    return [
        {**row, column: value(row.get(column))} if only in (None, i) else row for i, row in enumerate(rows(name, task))
    ]


def ignored(old: Tensor) -> Tensor:
    return torch.full_like(old, -100)


def only_the_first(old: Tensor) -> Tensor:
    return torch.cat([old[:1], ignored(old)[1:]])


def given(made: Rows, kind: str) -> Any:
    if kind == "rows":
        return made
    return datasets.Dataset.from_list([{key: value.tolist() for key, value in row.items()} for row in made])


# ---- labels of which none counts ---------------------------------------------------------------------------------

SILENT = {
    "classes": ("bert", "SEQ_CLS", ignored),
    "tokens": ("bert", "TOKEN_CLS", ignored),
    "hidden tokens": ("bert", "MASKED_LM", ignored),
    "choices": ("bert", "MULTIPLE_CHOICE", ignored),
    "next tokens": ("llama", "CAUSAL_LM", ignored),
    "next tokens, but for the first, which nothing predicts": ("llama", "CAUSAL_LM", only_the_first),
    "an answer": ("t5", "SEQ_2_SEQ_LM", ignored),
}


@pytest.mark.parametrize("kind", ["rows", "table"])
@pytest.mark.parametrize("case", SILENT)
def test_labels_of_which_none_counts(case: str, kind: str, tmp_path: Path) -> None:
    name, task, made = SILENT[case]
    model = built("lora", name, task)
    before, watch = weights(model), Watched(model)
    data = given(changed("labels", made, task=task, name=name), kind)
    refused(trainer(model, tmp_path, data).train, DataError, "train_dataset: the loss counts no label of its 24 rows")
    assert watch.passes == 0
    assert same(model, before)


def test_one_label_is_enough(tmp_path: Path) -> None:
    one = [*changed("labels", ignored)[:-1], rows()[-1]]
    trainer(built(), tmp_path, one).train()
    trainer(built(), tmp_path, eval_dataset=changed("labels", ignored), eval_strategy="steps", eval_steps=3).train()


def test_virtual_tokens_predict_a_rows_first_label(tmp_path: Path) -> None:
    data = changed("labels", only_the_first, task="CAUSAL_LM", name="llama")
    model = built({"prompt_tuning": {"num_virtual_tokens": 2}}, "llama", "CAUSAL_LM")
    trainer(model, tmp_path, data, max_steps=1).train()


def made_late(made: list[Any]) -> Any:
    """A collator of the user's own: what it makes is known in the batch."""
    batch = default_data_collator(made)
    return {**batch, "labels": ignored(batch["labels"])}


@pytest.mark.parametrize("steps", [3, UNLABELLED_IN_A_ROW + 5])
def test_steps_without_labels_stop_a_run(steps: int, tmp_path: Path) -> None:
    model = built()
    run = trainer(model, tmp_path, data_collator=made_late, max_steps=steps)
    count = min(steps, UNLABELLED_IN_A_ROW)
    refused(run.train, TrainingError, f"last {count} steps had no label that the loss counts", "all are -100")
    assert run.state.global_step == count


class Consistency(Plugin):
    """Learns from rows without labels."""

    name = "consistency"

    def loss_terms(self, run, batch, output):
        return {"extra": LossTerm(output.logits.float().square().sum(), len(output.logits), per="example")}


def test_what_needs_no_labels_may_do_without(tmp_path: Path) -> None:
    steps = UNLABELLED_IN_A_ROW + 2
    trainer(built(["lora", Consistency()]), tmp_path, changed("labels", ignored), max_steps=steps).train()

    import peft_plus

    class Mine(peft_plus.Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
            output = model(input_ids=inputs["input_ids"])
            loss = output.logits.square().mean()
            return (loss, output) if return_outputs else loss

    trainer(built(), tmp_path, changed("labels", ignored), kind=Mine, max_steps=steps).train()


def loop(model: Any, data: Any, steps: int, loss: Any = None, collate: Any = default_data_collator) -> Session:
    session = Session(model, Accelerator(cpu=True), max_steps=steps)
    optimizer = session.optimizer(torch.optim.SGD, lr=0.05)
    loader = session.loader(data, batch_size=4, shuffle=False, collate_fn=collate)
    for batch in session.batches(loader):
        with session.accelerator.accumulate(session.model):
            session.accelerator.backward(loss(session, batch) if loss else session.loss(batch))
            optimizer.step()
            optimizer.zero_grad()
    return session


def test_a_session_without_labels() -> None:
    refused(lambda: loop(built(), changed("labels", ignored), 2), DataError, "dataset: the loss counts no label")
    steps = UNLABELLED_IN_A_ROW + 1
    says = f"last {UNLABELLED_IN_A_ROW} steps had no label"
    refused(lambda: loop(built(), rows(), steps, collate=made_late), TrainingError, says)


def test_a_session_whose_loss_is_its_own_needs_none() -> None:
    def unlabelled(made: list[Any]) -> Any:
        return {key: value for key, value in default_data_collator(made).items() if key != "labels"}

    def mine(session: Session, batch: Any) -> Any:
        output = session.model(**batch)
        return session.loss(batch, output=output, loss=output.logits.square().mean())

    loop(built(), rows(), UNLABELLED_IN_A_ROW + 2, mine, unlabelled)


# ---- rows that the model cannot read -----------------------------------------------------------------------------


def long(old: Any) -> Tensor:
    return torch.full((80,), 5)


BAD: dict[str, tuple[Rows, tuple[str, ...]]] = {
    "a row past the positions": (
        [{"input_ids": long(None), "labels": torch.tensor(1)}] * 8,
        (r"train_dataset\[0\] has 80 tokens, and the model has positions for 64", "max_length=64"),
    ),
    "a mask of zeros": (
        changed("attention_mask", torch.zeros_like, only=5),
        (r"train_dataset\[5\] has an 'attention_mask' of zeros only",),
    ),
    "rows without tokens": (
        [{"input_ids": torch.zeros(0, dtype=torch.long), "labels": torch.tensor(1)}] * 8,
        (r"train_dataset\[0\] has no token",),
    ),
    "floats for tokens": (
        changed("input_ids", lambda old: old.float()),
        (r"train_dataset\[0\].*'input_ids'.*: \d+\.0 is a float",),
    ),
    "a segment too many": (
        changed("token_type_ids", lambda old: torch.tensor([0] * 6 + [1, 2])),
        (r"train_dataset\[0\].*'token_type_ids'.*: 2 is outside 0 … 1 \(type_vocab_size=2\)",),
    ),
    "true and false for classes": (
        changed("labels", lambda old: old > 0),
        ("'labels' are True and False", "whole numbers for classes"),
    ),
}


@pytest.mark.parametrize("where", ["rows", "table", "batch"])
@pytest.mark.parametrize("case", BAD)
def test_rows_that_cannot_be_read(case: str, where: str, tmp_path: Path) -> None:
    made, says = BAD[case]
    model = built()
    watch = Watched(model)
    collate: Any = (lambda rows: default_data_collator(rows)) if where == "batch" else default_data_collator
    data = given(made, "table" if where == "table" else "rows")
    refused(trainer(model, tmp_path, data, data_collator=collate).train, DataError, *says)
    assert watch.passes == 0


def test_rows_that_are_padding_do_no_harm(tmp_path: Path) -> None:
    """Empty lines of a text, which have no label either, and rows that fill up a batch."""
    data = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}, {"input_ids": [], "labels": []}] * 8
    model = built("lora", "llama", "CAUSAL_LM")
    collate = DataCollatorForSeq2Seq(tiny_tokenizer())
    for one in (data, datasets.Dataset.from_list(data)):
        trainer(model, tmp_path, one, data_collator=collate, max_steps=2).train()
    filled = changed("attention_mask", torch.zeros_like, only=3)
    filled[3]["labels"] = torch.tensor(-100)
    trainer(built(), tmp_path, filled, max_steps=2).train()


def test_an_empty_text_with_a_class(tmp_path: Path) -> None:
    data = [{"input_ids": [5, 6, 7], "labels": 0}, {"input_ids": [], "labels": 1}] * 8
    for one in (data, datasets.Dataset.from_list(data)):
        run = trainer(built(), tmp_path, one, data_collator=DataCollatorWithPadding(tiny_tokenizer()))
        refused(run.train, DataError, r"train_dataset\[1\] has no token")


def test_what_is_made_on_the_fly_is_no_missing_column(tmp_path: Path) -> None:
    def decode(made: dict[str, list[Any]]) -> dict[str, Any]:
        return {"input_ids": torch.tensor([[5, 6]] * len(made["text"])), "labels": torch.tensor(made["labels"])}

    data = datasets.Dataset.from_dict({"text": ["a"] * 8, "labels": [0, 1] * 4}).with_transform(decode)
    trainer(built(), tmp_path, data, max_steps=1, remove_unused_columns=False).train()
    pictures = built({"lora": {"target_modules": ["q_proj"]}}, "vit")
    trainer(pictures, tmp_path, rows("vit"), max_steps=1).train()
    embedded = [{"inputs_embeds": torch.ones(4, 32), "labels": torch.tensor(1)}] * 8
    trainer(built(), tmp_path, embedded, max_steps=1).train()


# ---- positions, against the models themselves ----------------------------------------------------------------------


TUNERS = [(name, "") for name in TEXT_MODELS] + [
    (name, tuner) for name in ("bert", "gpt2", "opt", "llama") for tuner in ("prompt_tuning", "prefix_tuning")
]


@pytest.mark.parametrize(("name", "virtual"), TUNERS)
def test_the_longest_row_is_the_longest_that_the_model_runs(name: str, virtual: str) -> None:
    task = "CAUSAL_LM" if has_task(name, "CAUSAL_LM") and name not in ("bart", "xlnet") else "SEQ_CLS"
    method: Any = {virtual: {"num_virtual_tokens": 3}}
    wide = {"word_embed_proj_dim": 32} if name == "opt" else {}  # PEFT's virtual tokens are as wide as the blocks
    base = tiny(name, task, **wide)
    model: Any = base if not virtual else get_model(base, method)
    places = positions_of(model)

    def runs(length: int) -> bool:
        ids = torch.full((1, length), 5)
        ids[:, -1] = 2  # the end of the text, which T5's and BART's classifiers look for
        try:
            model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids))
        except (IndexError, RuntimeError):
            return False
        return True

    if places is None:
        assert runs(200), name
        return
    longest = places.size - places.virtual
    assert runs(longest)
    assert not runs(longest + 1)
    assert places.fault(torch.full((longest,), 5)) is None
    assert "tokens, and the model has positions for" in str(places.fault(torch.full((longest + 1,), 5)))


def test_padding_takes_no_position_where_the_model_counts_tokens() -> None:
    assert Positions(4, pad=PAD).fault(torch.tensor([BOS, 5, 6, 7, PAD, PAD])) is None
    assert Positions(4).fault(torch.tensor([BOS, 5, 6, 7, PAD])) is not None


def test_segments_are_counted_where_the_model_has_them() -> None:
    assert [segments_of(tiny(name)) for name in ("bert", "roberta", "distilbert", "gpt2")] == [2, 2, None, None]


def test_a_model_of_the_users_own_may_cut_its_rows() -> None:
    from transformers import BertForSequenceClassification

    class Windows(BertForSequenceClassification):
        pass

    model = Windows(tiny("bert").config)  # type: ignore[arg-type]
    plan = built().peft_plus
    assert limits_of(model, plan.task, own_loss=False).positions is None
    assert limits_of(model, plan.task, own_loss=False).classes == 3
