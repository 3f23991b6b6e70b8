"""Each task from rows to loss on tiny models, against cross-entropies computed here from the model's raw logits."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, TaskType, get_peft_model
from torch.nn import functional as F

from peft_plus.tasks.causal_lm import CausalLM
from peft_plus.tasks.feature_extraction import FeatureExtraction
from peft_plus.tasks.generic import GenericTask
from peft_plus.tasks.masked_lm import MaskedLM
from peft_plus.tasks.multiple_choice import MultipleChoice
from peft_plus.tasks.question_ans import QuestionAnswering
from peft_plus.tasks.seq_2_seq_lm import Seq2SeqLM
from peft_plus.tasks.seq_cls import SequenceClassification
from peft_plus.tasks.token_cls import TokenClassification
from tests.models import tiny
from tests.tokenizers import tiny_tokenizer

# PEFT's prompt tuners read this on every model; the warning is about its own code.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TEXTS = ["the cat works in paris", "a dog", "good good bad , the york cat is bad", "what is on the dog ?"]
CONTEXT = "the dog works in paris and the cat works in york ."
TAGS = ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]

ROWS = {
    "SEQ_CLS": [{"text": t, "label": i % 3} for i, t in enumerate(TEXTS)],
    "TOKEN_CLS": [
        {"tokens": ["alex", "works", "in", "new", "york"], "tags": ["B-PER", "O", "O", "B-LOC", "I-LOC"]},
        {"tokens": ["the", "dog"], "tags": ["O", "O"]},
        {"tokens": ["paris", "oslo", "works"], "tags": ["B-LOC", "B-LOC", "O"]},
        {"tokens": ["bo"], "tags": ["B-PER"]},
    ],
    "QUESTION_ANS": [
        {"question": "where ?", "context": CONTEXT, "answers": {"text": ["paris"], "answer_start": [17]}},
        {"question": "what works", "context": CONTEXT[:22], "answers": {"text": ["the dog"], "answer_start": [0]}},
        {"question": "is it", "context": CONTEXT, "answers": {"text": ["york"], "answer_start": [44]}},
        {"question": "what", "context": "a cat", "answers": {"text": ["cat"], "answer_start": [2]}},
    ],
    "CAUSAL_LM": [{"text": t} for t in TEXTS],
    "SEQ_2_SEQ_LM": [{"source": t, "target": t[:9]} for t in TEXTS],
    "MASKED_LM": [{"text": t} for t in TEXTS],
    "MULTIPLE_CHOICE": [
        {"prompt": t, "choices": ["good", "bad cat", "a"], "label": i % 3} for i, t in enumerate(TEXTS)
    ],
}
TASKS = {
    "SEQ_CLS": lambda: SequenceClassification(num_labels=3),
    "TOKEN_CLS": lambda: TokenClassification(label_names=TAGS),
    "QUESTION_ANS": QuestionAnswering,
    "CAUSAL_LM": CausalLM,
    "SEQ_2_SEQ_LM": Seq2SeqLM,
    "MASKED_LM": lambda: MaskedLM(mlm_probability=0.4),
    "MULTIPLE_CHOICE": MultipleChoice,
}
DECODERS = ("gpt2", "llama")
CASES = [
    *(("SEQ_CLS", m) for m in ("bert", "roberta", "distilbert", "gpt2", "llama")),
    *(("TOKEN_CLS", m) for m in ("bert", "roberta", "distilbert", "llama")),
    *(("QUESTION_ANS", m) for m in ("bert", "distilbert", "gpt2")),
    *(("CAUSAL_LM", m) for m in DECODERS),
    *(("SEQ_2_SEQ_LM", m) for m in ("t5", "bart")),
    *(("MASKED_LM", m) for m in ("bert", "roberta", "distilbert")),
    *(("MULTIPLE_CHOICE", m) for m in ("bert", "roberta")),
]


def tokenizer_for(model: str):
    return tiny_tokenizer(
        {"t5": "seq2seq", "bart": "seq2seq"}.get(model, "decoder" if model in DECODERS else "encoder")
    )


def prepared(name: str, model: str, rows=None, task=None):
    """(task, preprocessed rows, collator without the columns that the model has no use for)."""
    task, tokenizer = task or TASKS[name](), tokenizer_for(model)
    settings = {"stride": 4} if name == "QUESTION_ANS" else {}
    for key, value in settings.items():
        setattr(task, key, value)
    data = task.preprocess(Dataset.from_list(rows or ROWS[name]), tokenizer)
    if model in ("distilbert", "roberta") and "token_type_ids" in data.column_names:
        data = data.remove_columns("token_type_ids")
    return task, data, task.collator(tokenizer)


def model_for(name: str, model: str):
    return tiny(model, name, **({"num_labels": len(TAGS)} if name == "TOKEN_CLS" else {}))


def independent(name: str, output, batch) -> tuple[torch.Tensor, int]:
    """(summed loss, number of labels), from raw logits and raw labels alone."""
    if name == "QUESTION_ANS":
        start, end = (
            F.cross_entropy(x, batch[k], reduction="sum")
            for x, k in ((output.start_logits, "start_positions"), (output.end_logits, "end_positions"))
        )
        return (start + end) / 2, len(batch["start_positions"])
    logits, labels = output.logits, batch["labels"]
    total, number = torch.zeros(()), 0
    for i in torch.cartesian_prod(*(torch.arange(n) for n in labels.shape)).reshape(-1, labels.ndim).tolist():
        label = int(labels[tuple(i)])
        if label == -100 or (name == "CAUSAL_LM" and i[1] == 0):
            continue
        at = (i[0], i[1] - 1) if name == "CAUSAL_LM" else tuple(i)
        total, number = total - logits[at].log_softmax(-1)[label], number + 1
    return total, number


@pytest.mark.parametrize(("name", "model"), CASES)
def test_loss_is_the_models_own_summed(name: str, model: str) -> None:
    task, data, collate = prepared(name, model)
    net, batch = model_for(name, model), collate(list(data))
    output = net(**batch)
    term, (total, number) = task.loss(output, batch), independent(name, output, batch)
    assert number > 1
    assert int(term.count) == int(task.count(batch)) == number
    assert term.per == "label"
    assert term.sum.dtype == torch.float32
    torch.testing.assert_close(term.sum, total)
    torch.testing.assert_close(term.sum, output.loss * number)
    term.sum.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


@pytest.mark.parametrize(("name", "model"), [c for c in CASES if c[0] != "MASKED_LM"])
def test_a_big_batch_equals_its_micro_batches(name: str, model: str) -> None:
    task, data, collate = prepared(name, model)
    net, rows = model_for(name, model), list(data)
    batch = collate(rows)
    small = [collate(rows[i : i + 1]) for i in range(len(rows))]
    if name == "QUESTION_ANS":  # there padding is part of the softmax over positions, so it must be equal
        small = [{k: v[i : i + 1] for k, v in batch.items()} for i in range(len(rows))]
    with torch.no_grad():
        parts = [task.loss(net(**b), b) for b in small]
        whole = task.loss(net(**batch), batch)
    assert sum(int(p.count) for p in parts) == int(whole.count)
    torch.testing.assert_close(sum(p.sum for p in parts), whole.sum, rtol=1e-5, atol=1e-5)


def through_logits(task, output, batch) -> torch.Tensor:
    """The mean cross-entropy, from what `logits` hands out and the batch's labels."""
    pairs = task.logits(output, batch)
    if "start_positions" in batch:
        targets = [batch["start_positions"], batch["end_positions"]]
    else:
        labels = batch["labels"]
        targets = [labels[:, 1:] if labels.ndim == 2 and pairs[0][1].shape[1] < labels.shape[1] else labels]
    for logits, mask in pairs:
        assert mask.dtype == torch.bool
        assert logits.shape[:-1] == mask.shape
    losses = [F.cross_entropy(x[m], t[m]) for (x, m), t in zip(pairs, targets, strict=True)]
    return torch.stack(losses).mean()


@pytest.mark.parametrize(("name", "model"), CASES)
def test_logits_and_mask_give_the_same_loss(name: str, model: str) -> None:
    task, data, collate = prepared(name, model)
    batch = collate(list(data))
    output = model_for(name, model)(**batch)
    torch.testing.assert_close(through_logits(task, output, batch), output.loss)
    generic = GenericTask(shifts_labels=name == "CAUSAL_LM")
    if name != "QUESTION_ANS":
        torch.testing.assert_close(through_logits(generic, output, batch), output.loss)
        torch.testing.assert_close(generic.loss(output, batch).sum, task.loss(output, batch).sum)
        assert int(generic.count(batch)) == int(task.count(batch))


def prompt_config(kind: str, name: str):
    common = {"task_type": TaskType(name), "num_virtual_tokens": 5}
    if kind == "prompt":
        return PromptTuningConfig(**common)
    return PromptEncoderConfig(encoder_hidden_size=16, **common) if kind == "p" else PrefixTuningConfig(**common)


PROMPTED = [
    *((k, "CAUSAL_LM", m) for k in ("prompt", "p", "prefix") for m in DECODERS),
    *((k, "SEQ_CLS", m) for k in ("prompt", "p", "prefix") for m in ("bert", "llama")),
    *((k, "SEQ_2_SEQ_LM", m) for k in ("prompt", "p", "prefix") for m in ("t5", "bart")),
    *((k, "QUESTION_ANS", m) for k in ("prompt", "p", "prefix") for m in ("bert",)),
    ("prefix", "TOKEN_CLS", "bert"),
]


@pytest.mark.parametrize(("kind", "name", "model"), PROMPTED)
def test_virtual_tokens_are_cut_off(kind: str, name: str, model: str) -> None:
    task, data, collate = prepared(name, model)
    net = get_peft_model(model_for(name, model), prompt_config(kind, name))
    batch = collate(list(data))
    output = net(**batch)
    term = task.loss(output, batch)
    if name != "QUESTION_ANS" or kind == "prefix":
        torch.testing.assert_close(through_logits(task, output, batch) * int(term.count), term.sum)
    assert int(term.count) == int(task.count(batch))
    torch.testing.assert_close(output.loss * int(term.count), term.sum)
    term.sum.backward()
    if name in ("CAUSAL_LM", "QUESTION_ANS") and kind != "prefix":
        raw = output.logits if name == "CAUSAL_LM" else output.start_logits
        assert raw.shape[1] == batch["input_ids"].shape[1] + 5


@pytest.mark.parametrize("kind", ["prompt", "p"])
def test_answers_under_virtual_tokens_are_placed_as_peft_places_them(kind: str) -> None:
    """PEFT moves the tokens and not the positions; loss and metrics agree with it, `logits` holds the real tokens."""
    task, data, collate = prepared("QUESTION_ANS", "bert")
    net = get_peft_model(model_for("QUESTION_ANS", "bert"), prompt_config(kind, "QUESTION_ANS"))
    batch = collate(list(data))
    output = net(**batch)
    truth = (batch["start_positions"], batch["end_positions"])
    raw = (output.start_logits, output.end_logits)
    expected = sum(F.cross_entropy(x, at, reduction="sum") for x, at in zip(raw, truth, strict=True)) / 2
    torch.testing.assert_close(task.loss(output, batch).sum, expected)
    for (logits, _), x in zip(task.logits(output, batch), raw, strict=True):
        torch.testing.assert_close(logits, x[:, 5:])
    sure = [F.one_hot(at, x.shape[1]).float().numpy() for x, at in zip(raw, truth, strict=True)]
    assert task.metrics(sure, [at.numpy() for at in truth]) == {"exact_match": 1.0, "f1": 1.0}


def test_under_virtual_tokens_a_first_label_counts_as_the_model_counts_it() -> None:
    net = get_peft_model(tiny("gpt2", "CAUSAL_LM"), prompt_config("prompt", "CAUSAL_LM"))
    ids = torch.randint(7, 80, (2, 6))
    labels = ids.clone()
    labels[1, 4:] = -100
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    output = net(**batch)
    expected = F.cross_entropy(
        output.logits[:, 4:-1].flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"
    )
    for task in (CausalLM(), GenericTask(shifts_labels=True)):
        term = task.loss(output, batch)
        torch.testing.assert_close(term.sum, expected)
        assert int(term.count) == 10
        assert task.logits(output, batch)[0][0].shape[:2] == (2, 5)


@pytest.mark.parametrize(
    ("name", "model"), [c for c in CASES if c[0] in ("TOKEN_CLS", "CAUSAL_LM", "SEQ_2_SEQ_LM", "MASKED_LM")]
)
def test_a_batch_without_labels_is_zero_with_a_graph(name: str, model: str) -> None:
    task, data, collate = prepared(name, model)
    net, batch = model_for(name, model), collate(list(data))
    if name == "SEQ_2_SEQ_LM":
        batch["decoder_input_ids"] = batch["labels"].clamp(min=0)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    output = net(**batch)
    assert output.loss.isnan()
    term = task.loss(output, batch)
    assert float(term.sum.detach()) == 0.0
    assert int(term.count) == 0
    term.sum.backward()
    assert all(p.grad is None or bool((p.grad == 0).all()) for p in net.parameters())


def test_shift_labels_are_taken_as_they_are() -> None:
    net, ids = tiny("llama", "CAUSAL_LM"), torch.randint(7, 80, (2, 6))
    shifted = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], 1)
    batch = {"input_ids": ids, "labels": ids, "shift_labels": shifted}
    output = net(**batch)
    for task in (CausalLM(), GenericTask(shifts_labels=True)):
        assert int(task.count(batch)) == 10
        (logits, mask), term = task.logits(output, batch)[0], task.loss(output, batch)
        torch.testing.assert_close(F.cross_entropy(logits[mask], shifted[mask], reduction="sum"), term.sum)


@pytest.mark.parametrize(
    ("task", "labels", "reference"),
    [
        (SequenceClassification(num_labels=1), [0.5, 2, -1.0, 3], F.mse_loss),
        (SequenceClassification(num_labels=2, problem="regression"), [[0.5, 1], [1, 2], [0, 0], [3, 1]], F.mse_loss),
        (
            SequenceClassification(num_labels=3, problem="multi_label"),
            [[0, 2], [], [1], [0, 1, 2]],
            F.binary_cross_entropy_with_logits,
        ),
    ],
)
def test_float_labels_count_every_number(task: SequenceClassification, labels, reference) -> None:
    rows = [{"text": t, "label": v} for t, v in zip(TEXTS, labels, strict=True)]
    _, data, collate = prepared("SEQ_CLS", "bert", rows, task)
    batch = collate(list(data))
    output = tiny("bert", "SEQ_CLS", **task.config_kwargs())(**batch)
    size = batch["labels"].numel()
    assert task.count(batch) == size
    total = reference(output.logits.reshape(batch["labels"].shape), batch["labels"], reduction="sum")
    torch.testing.assert_close(task.loss(output, batch).sum, total)
    assert task.distribution == ("bernoulli" if task.problem == "multi_label" else "real")
    generic = GenericTask(shifts_labels=False)
    assert generic.count(batch) == size
    torch.testing.assert_close(generic.loss(output, batch).sum, total)
    assert generic.logits(output, batch)[0][1].shape == (4,)


@pytest.mark.parametrize("kind", [None, "prompt"])
def test_feature_extraction_gives_real_tokens(kind: str | None) -> None:
    task, tokenizer = FeatureExtraction(keep=["label"]), tiny_tokenizer()
    data = task.preprocess(Dataset.from_list(ROWS["SEQ_CLS"]), tokenizer)
    assert set(data.column_names) == {"input_ids", "token_type_ids", "attention_mask", "label"}
    batch = task.collator(tokenizer)(list(data))
    net = tiny("bert", "FEATURE_EXTRACTION")
    if kind:
        net = get_peft_model(net, prompt_config(kind, "FEATURE_EXTRACTION"))
    output = net(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    ((hidden, mask),) = task.logits(output, batch)
    assert hidden.shape == (*batch["input_ids"].shape, 32)
    torch.testing.assert_close(hidden, output.last_hidden_state[:, -batch["input_ids"].shape[1] :])
    assert torch.equal(mask, batch["attention_mask"].bool())
    assert task.distribution == "real"
    assert task.count(batch) == 4
    with pytest.raises(ValueError, match=r"no loss of its own.*compute_loss_func"):
        task.loss(output, batch)


def test_seq2seq_collator_makes_decoder_inputs_when_it_knows_the_model() -> None:
    task, tokenizer = Seq2SeqLM(), tiny_tokenizer("seq2seq")
    rows = list(task.preprocess(Dataset.from_list(ROWS["SEQ_2_SEQ_LM"]), tokenizer))
    assert "decoder_input_ids" not in task.collator(tokenizer)(rows)
    assert "decoder_input_ids" in task.collator(tokenizer, tiny("t5", "SEQ_2_SEQ_LM"))(rows)
