"""What rows become: columns, alignment, windows, special tokens; and that the user's data stays as it was."""

from __future__ import annotations

import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value

from peft_plus.tasks import Task
from peft_plus.tasks.answer_spans import token_span
from peft_plus.tasks.causal_lm import CausalLM
from peft_plus.tasks.masked_lm import MaskedLM
from peft_plus.tasks.multiple_choice import MultipleChoice
from peft_plus.tasks.question_ans import QuestionAnswering
from peft_plus.tasks.seq_2_seq_lm import Seq2SeqLM
from peft_plus.tasks.seq_cls import SequenceClassification
from peft_plus.tasks.token_cls import TokenClassification
from tests.models import config
from tests.tokenizers import tiny_tokenizer

ENCODER = tiny_tokenizer()


def pieces(ids) -> str:
    return " ".join(ENCODER.convert_ids_to_tokens(ids))


def classes(task: Task, rows: list[dict]):
    return task.preprocess(Dataset.from_list(rows), ENCODER)["labels"][:]


def test_pairs_are_found_and_the_dataset_stays() -> None:
    data = Dataset.from_list([{"premise": "a cat", "hypothesis": "a dog", "label": 1}]).with_format("torch")
    before = (data.column_names, data.format["type"], data[0])
    out = SequenceClassification(num_labels=2).preprocess(DatasetDict(train=data, dev=data), ENCODER)
    assert isinstance(out, DatasetDict)
    assert set(out["dev"].column_names) == {"input_ids", "token_type_ids", "attention_mask", "labels"}
    assert pieces(out["dev"][0]["input_ids"]) == "[CLS] a cat [SEP] a dog [SEP]"
    assert (data.column_names, data.format["type"], data[0]) == before


def test_string_labels_are_numbered_once() -> None:
    task = SequenceClassification(num_labels=2)
    assert classes(task, [{"text": "a", "label": "pos"}, {"text": "a", "label": "neg"}]) == [1, 0]
    assert classes(task, [{"text": "a", "label": "pos"}]) == [1]
    named = SequenceClassification(label_names=["pos", "neg"])
    assert classes(named, [{"text": "a", "label": "pos"}]) == [0]
    expected = {"id2label": {0: "pos", 1: "neg"}, "label2id": {"pos": 0, "neg": 1}}
    assert named.config_kwargs() == {"num_labels": 2, "problem_type": "single_label_classification", **expected}
    built = config("bert", **named.config_kwargs())
    assert built.num_labels == 2
    again = SequenceClassification.from_config(built)
    assert (again.num_labels, again.problem, again.label_names) == (2, "single_label", ["pos", "neg"])


def test_class_label_goes_by_name_where_both_have_names() -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["neg", "pos"])})
    data = Dataset.from_list([{"text": "a", "label": 1}], features=features)
    assert SequenceClassification(num_labels=2).preprocess(data, ENCODER)["labels"][:] == [1]
    assert SequenceClassification(label_names=["pos", "neg"]).preprocess(data, ENCODER)["labels"][:] == [0]


def test_several_labels() -> None:
    task = SequenceClassification(num_labels=3, problem="multi_label")
    rows = [{"text": "a", "label": [0, 2]}, {"text": "a", "label": []}]
    assert classes(task, rows) == [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]
    assert classes(task, [{"text": "a", "label": [0.0, 1.0, 1.0]}]) == [[0.0, 1.0, 1.0]]
    assert classes(task, [{"text": "a", "label": ["x", "z"]}, {"text": "a", "label": ["y"]}])[0] == [1.0, 0.0, 1.0]


def test_vision_configs_get_the_image_classifier() -> None:
    task = SequenceClassification(num_labels=2)
    assert task.auto_class(config("vit")).__name__ == "AutoModelForImageClassification"
    assert task.auto_class(config("bert")).__name__ == "AutoModelForSequenceClassification"


SENTENCE = {"tokens": ["alex", "works", "in", "new", "york"], "tags": ["I-PER", "O", "O", "I-LOC", "I-LOC"]}
NAMES = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]


def test_word_tags_go_to_first_sub_tokens() -> None:
    task = TokenClassification(label_names=NAMES)
    row = task.preprocess(Dataset.from_list([SENTENCE]), ENCODER)[0]
    assert pieces(row["input_ids"]) == "[CLS] a ##l ##e ##x works in n ##e ##w york [SEP]"
    assert row["labels"] == [-100, 1, -100, -100, -100, 0, 0, 3, -100, -100, 4, -100]
    every = TokenClassification(label_names=NAMES, label_all_tokens=True)
    row = every.preprocess(Dataset.from_list([SENTENCE]), ENCODER)[0]
    assert row["labels"] == [-100, 1, 2, 2, 2, 0, 0, 3, 4, 4, 4, -100]


def test_tags_over_sub_tokens_stay_valid_in_schemes_with_ends() -> None:
    task = TokenClassification(num_labels=9, scheme_out="BIOES", label_all_tokens=True)
    row = task.preprocess(Dataset.from_list([SENTENCE]), ENCODER)[0]
    names = ["O", *(f"{c}-{k}" for k in ("LOC", "PER") for c in "BIES")]
    labels = [names[i] for i in row["labels"] if i != -100]
    assert labels == ["B-PER", "I-PER", "I-PER", "E-PER", "O", "O", "B-LOC", "I-LOC", "I-LOC", "E-LOC"]


def test_words_cut_off_get_no_label() -> None:
    row = TokenClassification(label_names=NAMES, max_length=8).preprocess(Dataset.from_list([SENTENCE]), ENCODER)[0]
    assert row["labels"] == [-100, 1, -100, -100, -100, 0, 0, -100]
    assert len(row["input_ids"]) == 8


def test_class_label_tags_keep_their_numbers_or_follow_the_scheme() -> None:
    def data(names):
        features = Features({"tokens": List(Value("string")), "ner_tags": List(ClassLabel(names=names))})
        rows = [{"tokens": ["a", "york"], "ner_tags": [names.index("O"), names.index("B-LOC")]}]
        return Dataset.from_list(rows, features=features)

    mixed = ["B-PER", "I-PER", "O", "B-LOC", "I-LOC"]
    assert TokenClassification(num_labels=5).preprocess(data(mixed), ENCODER)[0]["labels"] == [-100, 2, 3, -100]
    out = TokenClassification(num_labels=5, scheme_out="BILOU", label_names=["O", "B-LOC", "I-LOC", "L-LOC", "U-LOC"])
    assert out.preprocess(data(mixed), ENCODER)[0]["labels"] == [-100, 0, 4, -100]


def test_plain_classes_need_no_scheme() -> None:
    task = TokenClassification(num_labels=2, scheme=None)
    rows = [{"tokens": ["a", "dog"], "tags": ["DET", "NOUN"]}]
    assert task.preprocess(Dataset.from_list(rows), ENCODER)[0]["labels"] == [-100, 0, 1, -100]


QA = [
    {"id": "1", "question": "where is the cat ?", "context": "the dog is in york and the cat is in paris , good cat"},
    {"id": "2", "question": "what ?", "context": "a bad dog"},
]
ANSWERS = [{"text": ["in paris"], "answer_start": [34]}, {"text": [], "answer_start": []}]
SQUAD = [{**row, "answers": answer} for row, answer in zip(QA, ANSWERS, strict=True)]


def test_long_contexts_become_windows_and_back() -> None:
    task = QuestionAnswering(max_length=16, stride=3)
    examples = Dataset.from_list(SQUAD)
    data = task.preprocess(examples, ENCODER)
    assert len(data) == 4
    assert set(data.column_names) == {
        "input_ids",
        "token_type_ids",
        "attention_mask",
        "start_positions",
        "end_positions",
    }
    spans = [pieces(r["input_ids"][r["start_positions"] : r["end_positions"] + 1]) for r in data]
    assert spans == ["[CLS]", "in paris", "[CLS]", "[CLS]"]
    start, end = torch.full((4, 16), -9.0), torch.full((4, 16), -9.0)
    start[range(4), data["start_positions"][:]] = 9.0
    end[range(4), data["end_positions"][:]] = 9.0
    assert task.answers(examples, ENCODER, start, end, null_threshold=0.0) == ["in paris", ""]
    assert task.answers(examples, ENCODER, start, end)[1] in QA[1]["context"]


def test_answer_must_lie_in_the_window_whole() -> None:
    window = [None, None, (4, 7), (8, 11), (12, 14), None]
    assert token_span(window, (8, 14)) == (3, 4)
    assert token_span(window, (5, 6)) == (2, 2)
    for outside in ((0, 7), (12, 18), (0, 2), (20, 22), None):
        assert token_span(window, outside) == (0, 0)


def test_answer_that_starts_inside_a_word_takes_the_tokens_it_touches() -> None:
    row = {"question": "what", "context": "the zqx dog", "answers": {"text": ["qx dog"], "answer_start": [5]}}
    data = QuestionAnswering(max_length=16, stride=1).preprocess(Dataset.from_list([row]), ENCODER)[0]
    assert pieces(data["input_ids"][data["start_positions"] : data["end_positions"] + 1]) == "##q ##x dog"


def test_a_real_eos_is_learned_even_when_it_is_the_pad_token() -> None:
    tokenizer = tiny_tokenizer("decoder")
    tokenizer.pad_token = tokenizer.eos_token
    task = CausalLM()
    data = task.preprocess(Dataset.from_list([{"text": "a cat is"}, {"text": "the"}]), tokenizer)
    batch = task.collator(tokenizer)(list(data))
    eos = tokenizer.eos_token_id
    assert batch["input_ids"][:, -1].tolist() == [eos, eos]
    assert batch["labels"][0, -1] == eos
    assert batch["labels"][1].tolist() == [-100, eos, -100, -100]
    assert int(task.count(batch)) == 4


def test_prompts_are_no_labels_unless_wanted() -> None:
    tokenizer = tiny_tokenizer("decoder")
    data = Dataset.from_list([{"prompt": "the cat", "completion": "is good"}])
    row = CausalLM().preprocess(data, tokenizer)[0]
    assert pieces(row["input_ids"]) == "the cat is good </s>"
    assert row["labels"] == [-100, -100, *row["input_ids"][2:]]
    row = CausalLM(completion_only=False, append_eos=False).preprocess(data, tokenizer)[0]
    assert row["labels"] == [-100, *row["input_ids"][1:]]
    assert pieces(row["input_ids"]) == "the cat is good"
    cut = CausalLM(max_length=4).preprocess(data, tokenizer)[0]
    assert pieces(cut["input_ids"]) == "the cat is good"


def test_an_eos_of_the_tokenizers_own_is_moved_to_the_end() -> None:
    tokenizer = tiny_tokenizer("seq2seq")
    row = CausalLM().preprocess(Dataset.from_list([{"prompt": "the cat", "completion": "is"}]), tokenizer)[0]
    assert pieces(row["input_ids"]) == "the cat is </s>"
    assert pieces(CausalLM().preprocess(Dataset.from_list([{"text": "a"}]), tokenizer)[0]["input_ids"]) == "a </s>"


def test_left_padding_keeps_labels_beside_their_tokens() -> None:
    tokenizer = tiny_tokenizer("decoder")
    tokenizer.padding_side = "left"
    task = CausalLM()
    batch = task.collator(tokenizer)(
        list(task.preprocess(Dataset.from_list([{"text": "a cat is"}, {"text": "a"}]), tokenizer))
    )
    known = batch["labels"] != -100
    assert torch.equal(batch["labels"][known], batch["input_ids"][known])
    assert known.sum() == 4


def test_targets_are_closed_and_prefixed() -> None:
    data = Dataset.from_list([{"document": "a cat", "summary": "cat"}])
    row = Seq2SeqLM(prefix="what is ").preprocess(data, tiny_tokenizer("seq2seq"))[0]
    assert pieces(row["input_ids"]) == "what is a cat </s>"
    assert pieces(row["labels"]) == "cat </s>"
    assert pieces(Seq2SeqLM().preprocess(data, tiny_tokenizer("decoder"))[0]["labels"]) == "cat </s>"


def test_grouped_texts_lose_nothing() -> None:
    data = Dataset.from_list([{"text": "the cat is good"}, {"text": "a dog"}, {"text": "bad " * 20}])
    rows = MaskedLM(group=True, max_length=8).preprocess(data, ENCODER)["input_ids"][:]
    single = [i for row in MaskedLM().preprocess(data, ENCODER)["input_ids"] for i in row]
    assert [i for row in rows for i in row] == single
    assert {len(row) for row in rows[:-1]} == {8}


def test_choices_in_columns_or_lists() -> None:
    swag = [{"sent1": "a cat", "sent2": "the dog", "ending0": "is good", "ending1": "is bad", "label": 1}]
    row = MultipleChoice(prompt="sent1", stem="sent2").preprocess(Dataset.from_list(swag), ENCODER)[0]
    assert [pieces(ids) for ids in row["input_ids"]][1] == "[CLS] a cat [SEP] the dog is bad [SEP]"
    assert row["labels"] == 1
    listed = [{"ctx": "a cat", "endings": ["is", "good"], "label": "0"}]
    row = MultipleChoice().preprocess(Dataset.from_list(listed), ENCODER)[0]
    assert len(row["input_ids"]) == 2
    assert row["labels"] == 0


def test_preprocessing_twice_gives_the_same() -> None:
    task = QuestionAnswering(max_length=16, stride=3)
    once, twice = (task.preprocess(Dataset.from_list(SQUAD), ENCODER).to_list() for _ in range(2))
    assert once == twice


@pytest.mark.parametrize("name", ["SEQ_CLS", "TOKEN_CLS"])
def test_names_survive_the_config(name: str) -> None:
    cls = {"SEQ_CLS": SequenceClassification, "TOKEN_CLS": TokenClassification}[name]
    assert cls.from_config(config("bert", num_labels=5)).label_names is None
    assert cls.from_config(config("bert", id2label=dict(enumerate(NAMES)), label2id={})).label_names == NAMES
