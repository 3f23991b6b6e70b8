"""Every refusal says what was wrong, where, and the fix."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset, DatasetDict

from peft_plus.tasks.causal_lm import CausalLM
from peft_plus.tasks.feature_extraction import FeatureExtraction
from peft_plus.tasks.generic import GenericTask
from peft_plus.tasks.masked_lm import MaskedLM
from peft_plus.tasks.multiple_choice import MultipleChoice
from peft_plus.tasks.question_ans import QuestionAnswering
from peft_plus.tasks.seq_2_seq_lm import Seq2SeqLM
from peft_plus.tasks.seq_cls import SequenceClassification
from peft_plus.tasks.token_cls import TokenClassification
from tests.models import config
from tests.tokenizers import tiny_tokenizer


@pytest.mark.parametrize(
    ("cls", "settings", "message"),
    [
        (SequenceClassification, {}, "SEQ_CLS needs `num_labels`"),
        (TokenClassification, {}, "TOKEN_CLS needs `num_labels`"),
        (SequenceClassification, {"num_labels": 0}, "whole number ≥ 1, got 0"),
        (SequenceClassification, {"num_labels": True}, "whole number"),
        (SequenceClassification, {"num_labels": 2, "problem": "multi"}, "`problem` is one of"),
        (SequenceClassification, {"num_labels": 1, "problem": "single_label"}, "nothing to tell apart"),
        (SequenceClassification, {"num_labels": 3, "label_names": ["a", "b"]}, "num_labels=3 but `label_names` has 2"),
        (SequenceClassification, {"label_names": ["a", "a"]}, "different names"),
        (SequenceClassification, {"num_labels": 2, "max_length": 0}, "`max_length` must be"),
        (SequenceClassification, {"num_labels": 2, "text_pair": "b"}, "needs `text` named"),
        (TokenClassification, {"num_labels": 3, "scheme": "IOB3"}, "`scheme` is one of"),
        (TokenClassification, {"num_labels": 3, "scheme_out": "auto"}, "`scheme_out` is one of"),
        (MaskedLM, {"mlm_probability": 15}, r"lies in \(0, 1\], got 15"),
        (CausalLM, {"text": "a", "prompt": "b"}, "either `text` or `prompt`"),
        (Seq2SeqLM, {"source": "a"}, "both `source` and `target`"),
        (QuestionAnswering, {"stride": -1}, "`stride` must be"),
        (FeatureExtraction, {"keep": "label"}, r"keep=\['label'\]"),
    ],
)
def test_settings(cls, settings, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cls(**settings)


CLS = SequenceClassification(num_labels=2)
MULTI = SequenceClassification(num_labels=2, problem="multi_label")
TAGS = TokenClassification(label_names=["O", "B-X", "I-X"])
QA = QuestionAnswering(max_length=12, stride=2)
ASK = {"question": "what", "context": "a cat"}


@pytest.mark.parametrize(
    ("task", "rows", "message"),
    [
        (
            CLS,
            [{"txet": "a", "label": 0}],
            r"no column for `text`.*Did you mean 'txet'.*columns are \['txet', 'label'\]",
        ),
        (SequenceClassification(num_labels=2, text="txt"), [{"text": "a", "label": 0}], r"'txt'.*Did you mean 'text'"),
        (CLS, [{"text": "a", "sentence": "b", "label": 0}], r"\['text', 'sentence'\] could each be the text"),
        (CLS, [{"text": "a"}], "no column for `label`"),
        (CLS, [{"text": "a", "label": 0}, {"text": "b", "label": 2}], r"row 1: label 2 is outside 0..1"),
        (CLS, [{"text": "a", "label": -1}], r"row 0: label -1 is outside 0..1.*hidden"),
        (CLS, [{"text": None, "label": 0}, {"text": "b", "label": 0}], r"row 0: column 'text' holds None"),
        (CLS, [{"text": "a", "label": 0.5}], "row 0: label 0.5 is neither"),
        (CLS, [{"text": "a", "label": x} for x in "xyz"], r"labels are 3 names: \['x', 'y', 'z'\]"),
        (SequenceClassification(label_names=["good", "bad"]), [{"text": "a", "label": "goood"}], "Did you mean 'good'"),
        (SequenceClassification(num_labels=1), [{"text": "a", "label": "x"}], "regression target is 1 finite"),
        (MULTI, [{"text": "a", "label": 1}], "a multi-label row is a list"),
        (MULTI, [{"text": "a", "label": [0, 3]}], "label 3 is outside"),
        (MULTI, [{"text": "a", "label": [0, 0]}], "names a class twice.*write it as floats"),
        (MULTI, [{"text": "a", "label": [0.5, 1.0]}], "not a vector of 2 zeros and ones"),
        (TAGS, [{"tokens": ["a"], "tags": ["O", "O"]}], "row 0: 1 words but 2 tags"),
        (
            TAGS,
            [{"tokens": ["a"], "tags": ["O"]}, {"tokens": ["a", "b"], "tags": ["O", "E-X"]}],
            r"sentence 1, position 1",
        ),
        (TAGS, [{"tokens": ["a"], "tags": ["B-Y"]}], "row 0: label 'B-Y' is none of"),
        (TAGS, [{"tokens": ["a"], "tags": [7]}], "row 0: tag 7 is none of"),
        (
            TokenClassification(label_names=["O", "B-X", "I-X"], scheme="IOB2"),
            [{"tokens": ["a"], "tags": ["I-X"]}],
            "the tags are not IOB2: sentence 0, position 0: tag 'I-X'",
        ),
        (TokenClassification(num_labels=3), [{"tokens": ["a"], "tags": [1]}], "numbers without names"),
        (
            TokenClassification(num_labels=5),
            [{"tokens": ["a"], "tags": ["B-X"]}],
            r"make 3 in IOB2: \['O', 'B-X', 'I-X'\]",
        ),
        (
            QA,
            [{**ASK, "answers": {"text": ["dog"], "answer_start": [2]}}],
            "row 0: answer 'dog' is not at character 2.*'cat'",
        ),
        (QA, [{**ASK, "answers": "cat"}], "answers have the form"),
        (
            QA,
            [{**ASK, "question": "cat " * 9, "answers": {"text": ["cat"], "answer_start": [2]}}],
            "9 tokens leave 0 of max_length=12",
        ),
        (CausalLM(max_length=2), [{"prompt": "the cat", "completion": "is"}], "row 0: no token is left to learn"),
        (CausalLM(), [{"prompt": "a", "text": "b", "completion": None}], "'completion' holds None"),
        (Seq2SeqLM(), [{"a": "x"}], "no columns for.*Name them"),
        (Seq2SeqLM(), [{"source": "", "target": "a"}], None),
        (MultipleChoice(), [{"prompt": "a", "choices": ["a"], "label": 0}], "two or more texts"),
        (
            MultipleChoice(),
            [
                {"prompt": "a", "choices": ["a", "b"], "label": 0},
                {"prompt": "a", "choices": ["a", "b", "c"], "label": 0},
            ],
            "row 1: 3 choices, but row 0 has 2",
        ),
        (
            MultipleChoice(),
            [{"prompt": "a", "choices": ["a", "b"], "label": 2}],
            r"label 2 is not the number of a choice, 0..1",
        ),
        (FeatureExtraction(keep=["text"]), [{"text": "a"}], "holds text"),
    ],
)
def test_rows(task, rows, message: str | None) -> None:
    data = DatasetDict(dev=Dataset.from_list(rows))
    if message is None:
        assert len(task.preprocess(data, tiny_tokenizer("seq2seq"))["dev"]) == 1
        return
    with pytest.raises(ValueError, match=message) as caught:
        task.preprocess(data, tiny_tokenizer())
    assert task.name in str(caught.value)


def test_row_errors_name_the_split() -> None:
    data = DatasetDict(test=Dataset.from_list([{"text": "a", "label": -1}]))
    with pytest.raises(ValueError, match="SEQ_CLS, split 'test', row 0: label -1"):
        CLS.preprocess(data, tiny_tokenizer())


@pytest.mark.parametrize("data", [Dataset.from_dict({"text": [], "label": []}), DatasetDict()])
def test_empty_datasets(data) -> None:
    with pytest.raises(ValueError, match=r"no rows|no splits"):
        CLS.preprocess(data, tiny_tokenizer())


def test_other_containers() -> None:
    with pytest.raises(TypeError, match=r"not list.*from_list"):
        CLS.preprocess([{"text": "a", "label": 0}], tiny_tokenizer())


def test_texts_without_tokens() -> None:
    with pytest.raises(ValueError, match="row 0: the text gives no tokens"):
        CLS.preprocess(Dataset.from_list([{"text": "", "label": 0}]), tiny_tokenizer("decoder"))


def test_tokenizers_that_lack_something() -> None:
    tokenizer = tiny_tokenizer("decoder")
    tokenizer.padding_side = "left"
    with pytest.raises(ValueError, match="padding_side = 'right'"):
        QA.collator(tokenizer)
    tokenizer.mask_token = None
    with pytest.raises(ValueError, match="no mask token"):
        MaskedLM().collator(tokenizer)
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match=r"no pad token.*tokenizer.pad_token = tokenizer.eos_token"):
        CausalLM().collator(tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no eos token"):
        CausalLM().preprocess(Dataset.from_list([{"text": "a"}]), tokenizer)


def test_batches_and_outputs_that_do_not_fit() -> None:
    output = SimpleNamespace(loss=torch.tensor(1.0), logits=torch.zeros(2, 3, 5))
    with pytest.raises(ValueError, match=r"no 'labels', only \['input_ids'\]"):
        CLS.loss(output, {"input_ids": torch.zeros(2, 3)})
    with pytest.raises(ValueError, match="returned no loss"):
        CLS.loss({"logits": output.logits}, {"labels": torch.zeros(2, dtype=torch.long)})
    with pytest.raises(ValueError, match=r"logits of shape \(2, 3, 5\) for 4 labels"):
        TAGS.logits(output, {"labels": torch.zeros(2, 4, dtype=torch.long)})
    with pytest.raises(ValueError, match="Generated tokens"):
        Seq2SeqLM().metrics(torch.zeros(2, 4).numpy(), torch.zeros(2, 4).numpy())
    with pytest.raises(ValueError, match="not one label"):
        CausalLM().metrics(torch.zeros(1, 2, 4).numpy(), torch.full((1, 2), -100).numpy())


def test_a_model_without_a_named_task() -> None:
    task = GenericTask(shifts_labels=False)
    for call in (
        lambda: task.preprocess(None, None),
        lambda: task.collator(None),
        lambda: task.metrics(None, None),
        lambda: task.auto_class(config("bert")),
        lambda: task.count({}),
        lambda: task.logits(SimpleNamespace(), {"labels": torch.zeros(2)}),
        lambda: task.logits(SimpleNamespace(logits=torch.zeros(2, 3)), {"labels": torch.zeros(4, dtype=torch.long)}),
    ):
        with pytest.raises(ValueError, match="task="):
            call()
    with pytest.raises(ValueError, match="no metrics of its own"):
        FeatureExtraction().metrics(None, None)
