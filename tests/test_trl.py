"""TRL's trainers under plugins: a plain run is TRL's own, flips survive its reference pass, terms get their logits."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import datasets
import peft
import pytest
import torch
import trl
from datasets import Dataset
from torch import Tensor, nn
from transformers import TrainerCallback

import peft_plus
from peft_plus import LossTerm, MethodError, Plugin, get_model, with_plugins
from peft_plus.arguments import objective_of

from .models import tiny
from .scale import STILL, Recorder, arguments, distance
from .tokenizers import tiny_tokenizer
from .training import quiet

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # TRL says of each that it may change
    from trl.experimental.cpo import CPOConfig, CPOTrainer

pytestmark = [
    pytest.mark.filterwarnings(
        # TRL 1.16's own: deprecated settings that users still pass.
        "ignore:`(label_smoothing_factor|compute_loss_func)` is deprecated:FutureWarning"
    ),
    pytest.mark.usefixtures("_no_bars"),
]

LORA = {"r": 4, "lora_alpha": 8, "init_lora_weights": False}
FLIPS = {"lora": LORA, "gradual_unfreeze": {"every": 2}, "llrd": {}}
TEXTS = [
    "the cat is good",
    "a dog in paris is bad and good",
    "what works on the dog",
    "where is york",
    "the dog and the cat",
    "good good bad",
    "a cat works in paris and in york",
    "bad",
]
PAIRS = [
    {"prompt": "the cat", "chosen": " is good", "rejected": " is bad and bad"},
    {"prompt": "where is", "chosen": " york and paris", "rejected": " the dog"},
    {"prompt": "a dog", "chosen": " works", "rejected": " is in york on the cat"},
    {"prompt": "what", "chosen": " works on a dog", "rejected": " is"},
]


@pytest.fixture(name="_no_bars", autouse=True)
def no_bars():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def llama(task: str = "CAUSAL_LM", **settings: Any) -> nn.Module:
    return tiny("llama", task, vocab_size=len(tiny_tokenizer("decoder")), **settings)


def config(kind: type[Any], folder: Any, **settings: Any) -> Any:
    """Two rows in a micro-batch, two of those in a step; the rest is TRL's default, checkpointing too."""
    defaults = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "max_steps": 3,
        "bf16": False,
    }
    return quiet(folder, kind=kind, **{**defaults, **settings})


def trained(trainer_class: type[Any], model: nn.Module, args: Any, data: Dataset, **given: Any) -> Any:
    torch.manual_seed(0)
    given.setdefault("processing_class", tiny_tokenizer("decoder"))
    trainer = trainer_class(model=model, args=args, train_dataset=data, **given)
    trainer.train()
    return trainer


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


# ---- SFTTrainer --------------------------------------------------------------------------------------------------

CHAT = (
    "{% for m in messages %}{% if m.role == 'user' %}what {{ m.content }} {% else %}"
    "{% generation %}{{ m.content }} good{% endgeneration %} {% endif %}{% endfor %}"
)


def own_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    logits, labels = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return nn.functional.cross_entropy(logits, labels, reduction="sum") / num_items_in_batch


@dataclass(frozen=True)
class Sft:
    """One way of using SFTTrainer: settings of its config, arguments of the trainer, and the data."""

    settings: Mapping[str, Any]
    given: Mapping[str, Any]
    data: str = "text"

    def dataset(self) -> Dataset:
        match self.data:
            case "text":
                return Dataset.from_dict({"text": TEXTS})
            case "completion":
                return Dataset.from_dict({"prompt": TEXTS, "completion": [f" {text}" for text in reversed(TEXTS)]})
        turns = [[{"role": "user", "content": t}, {"role": "assistant", "content": "york"}] for t in TEXTS]
        return Dataset.from_dict({"messages": turns})

    def arguments(self) -> dict[str, Any]:
        tokenizer = tiny_tokenizer("decoder")
        tokenizer.chat_template = CHAT
        return {"processing_class": tokenizer, **self.given}


SFT: dict[str, Sft] = {
    "default": Sft({}, {}),
    "packing": Sft({"packing": True, "max_length": 24}, {}),
    "padding_free": Sft({"padding_free": True, "max_length": None}, {}),
    "completion_only_loss": Sft({"completion_only_loss": True}, {}, "completion"),
    "assistant_only_loss": Sft({"assistant_only_loss": True}, {}, "chat"),
    "label_smoothing": Sft({"label_smoothing_factor": 0.2}, {}),
    "compute_loss_func": Sft({}, {"compute_loss_func": own_loss}),
    "dft": Sft({"loss_type": "dft"}, {}),
    "no checkpointing": Sft({"gradient_checkpointing": False}, {}),
}


def losses(trainer: Any, name: str = "loss") -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize("way", SFT.values(), ids=list(SFT))
def test_a_plain_lora_run_is_trls_own_bit_for_bit(way, tmp_path):
    trainers = []
    for ours in (False, True):
        torch.manual_seed(1)
        lora = peft.LoraConfig(**LORA, lora_dropout=0.1, task_type="CAUSAL_LM")
        base = llama(attention_dropout=0.1)
        trainers.append(
            trained(
                with_plugins(trl.SFTTrainer) if ours else trl.SFTTrainer,
                get_model(base, lora) if ours else peft.get_peft_model(base, lora),
                config(trl.SFTConfig, tmp_path, **way.settings),
                way.dataset(),
                **way.arguments(),
            )
        )
    theirs, mine = (weights(trainer.model) for trainer in trainers)
    assert theirs.keys() == mine.keys()
    assert not [name for name in theirs if not torch.equal(theirs[name], mine[name])]
    assert losses(trainers[0]) == losses(trainers[1])
    assert len(losses(trainers[0])) == 3


@pytest.mark.parametrize("way", SFT.values(), ids=list(SFT))
def test_all_plugins_train_and_prove(way, tmp_path):
    model = get_model(llama(), {**FLIPS, "r3f": {"eps": 0.3}})
    args = config(trl.SFTConfig, tmp_path, max_steps=6, **way.settings)
    trainer = trained(with_plugins(trl.SFTTrainer), model, args, way.dataset(), **way.arguments())
    assert [row.steps for row in model.peft_plus.engagement["train"]] == [6, 4, 2]
    assert all(row.moved == row.tensors for row in model.peft_plus.engagement["train"])
    assert len(losses(trainer, "r3f")) == 6
    assert min(losses(trainer, "r3f")) > 0


def test_r3f_over_a_fused_head_has_the_gradient_of_the_trainers(tmp_path):
    ids = [[9, 10, 11, 12, 13 + i] for i in range(8)]
    rows = [{"input_ids": x, "attention_mask": [1] * 5, "labels": [-100, -100, *x[2:]]} for x in ids]
    gradients = []
    for trainer_class, kind, more in (
        (peft_plus.Trainer, None, {}),
        (
            with_plugins(trl.SFTTrainer),
            trl.SFTConfig,
            {"bf16": False, "dataset_kwargs": {"skip_prepare_dataset": True}},
        ),
    ):
        recorder = Recorder()
        torch.manual_seed(0)
        model = get_model(llama(), {"lora": LORA, "r3f": {"eps": 0.5, "weight": 10.0}})
        settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 2, "seed": 3}
        trainer_class(
            model=model,
            args=arguments(tmp_path, **settings, **more, **({"kind": kind} if kind else {})),
            train_dataset=Dataset.from_list(rows),
            data_collator=recorder.collate,
            processing_class=tiny_tokenizer("decoder"),
            callbacks=[recorder],
            **STILL,
        ).train()
        gradients.append(recorder.gradients)
    for plain, fused in zip(*gradients, strict=True):
        assert distance(fused, plain) < 1e-5


@pytest.mark.parametrize(("name", "tuner"), [("gpt2", "full"), ("llama", "prompt_tuning")])
def test_the_labels_that_the_head_predicts_are_the_ones_counted(name, tuner, tmp_path):
    """Stock transformers counts GPT-2's first labels, which nothing predicts, not what a virtual token does."""
    torch.manual_seed(0)
    settings = {"num_virtual_tokens": 3} if tuner == "prompt_tuning" else {}
    base = tiny(name, "CAUSAL_LM", vocab_size=len(tiny_tokenizer("decoder")))
    model = get_model(base, tuner, task="CAUSAL_LM", **settings)
    untouched, recorder = copy.deepcopy(model).train(), Recorder()
    ids = [[9 + i, 10, 11, 12 + i, 13] for i in range(8)]
    trained(
        with_plugins(trl.SFTTrainer),
        model,
        config(
            trl.SFTConfig,
            tmp_path,
            max_steps=1,
            max_grad_norm=0.0,
            dataset_kwargs={"skip_prepare_dataset": True},
            remove_unused_columns=False,
        ),
        Dataset.from_list([{"input_ids": x, "attention_mask": [1] * 5, "labels": x} for x in ids]),
        data_collator=recorder.collate,
        callbacks=[recorder],
    )
    total, labels = torch.zeros(()), 0
    for data in recorder.batches[:2]:  # the loader is one ahead
        logits = untouched(**{k: v for k, v in data.items() if k != "labels"}).logits
        wanted = data["labels"] if tuner == "prompt_tuning" else data["labels"][:, 1:]
        scores = logits[:, -1 - wanted.shape[1] : -1]
        total = total + nn.functional.cross_entropy(scores.flatten(0, 1), wanted.flatten(), reduction="sum")
        labels += wanted.numel()
    (total / labels).backward()
    gradient = {n: p.grad for n, p in untouched.named_parameters() if p.grad is not None}
    assert distance(recorder.gradients[0], gradient) < 1e-5


def test_evaluation_is_trls_own(tmp_path):
    """No term, and no pass for logits that nobody asked for (of which TRL would warn)."""
    results = []
    for method in ("lora", {"lora": {}, "r3f": {"eps": 0.3}}):
        torch.manual_seed(0)
        trainer = with_plugins(trl.SFTTrainer)(
            model=get_model(llama(), method),
            args=config(trl.SFTConfig, tmp_path),
            eval_dataset=SFT["default"].dataset(),
            train_dataset=SFT["default"].dataset(),
            processing_class=tiny_tokenizer("decoder"),
        )
        results.append(trainer.evaluate()["eval_loss"])
    assert results[0] == results[1]


def test_a_quantised_model_keeps_its_flips(tmp_path):
    """SFTTrainer casts what trains of it to bf16."""
    llama().save_pretrained(tmp_path / "base")
    model = get_model(str(tmp_path / "base"), FLIPS, task="CAUSAL_LM", quantization="nf4")
    watch = Watch(model)
    args = config(trl.SFTConfig, tmp_path, max_steps=6)
    trained(with_plugins(trl.SFTTrainer), model, args, SFT["default"].dataset(), callbacks=[watch])
    assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {torch.bfloat16}
    assert watch.frozen == [{0, 1}, {0, 1}, {0}, {0}, set(), set()]
    assert not watch.moved


@dataclass(kw_only=True)
class Looks(Plugin):
    """Adds nothing; looks at the logits if told to."""

    name: ClassVar[str] = "looks"

    at_logits: bool

    def loss_terms(self, run, batch, output):
        if self.at_logits:
            assert output.logits.shape[:2] == batch["labels"].shape
            assert output.logits.requires_grad
        return {}


@pytest.mark.parametrize(
    ("way", "at_logits", "passes"),
    [
        ("default", False, 1),
        ("default", True, 2),  # the fused head's, and one of the plugin's own
        ("compute_loss_func", False, 2),  # TRL's own two
        ("compute_loss_func", True, 2),  # one of which has the logits
        ("label_smoothing", True, 2),
    ],
)
def test_a_pass_of_its_own_is_made_only_where_logits_are_missing_and_asked_for(way, at_logits, passes, tmp_path):
    model = get_model(llama(), ["full", Looks(at_logits=at_logits)])
    seen = []
    model.model.register_forward_hook(lambda *_: seen.append(1))
    settings = {**SFT[way].settings, "gradient_checkpointing": False, "max_steps": 2}
    trained(
        with_plugins(trl.SFTTrainer),
        model,
        config(trl.SFTConfig, tmp_path, **settings),
        SFT[way].dataset(),
        **SFT[way].arguments(),
    )
    assert len(seen) == passes * 2 * 2  # steps, micro-batches


@pytest.mark.parametrize("method", [["lora", "llrd"], ["full", "llrd"]])
def test_a_tuner_from_trl_on_top_of_ours_is_refused(method, tmp_path):
    """It would hide the plan inside another model, and no plugin would ever run."""
    with pytest.raises(MethodError, match=r"peft_config=LoraConfig.*method=\[LoraConfig"):
        with_plugins(trl.SFTTrainer)(
            model=get_model(llama(), method),
            args=config(trl.SFTConfig, tmp_path),
            train_dataset=SFT["default"].dataset(),
            processing_class=tiny_tokenizer("decoder"),
            peft_config=peft.LoraConfig(task_type="CAUSAL_LM"),
        )


def test_trls_own_peft_config_works_on_a_model_without_a_plan(tmp_path):
    trainer = trained(
        with_plugins(trl.SFTTrainer),
        llama(),
        config(trl.SFTConfig, tmp_path),
        SFT["default"].dataset(),
        peft_config=peft.LoraConfig(task_type="CAUSAL_LM"),
    )
    assert isinstance(trainer.model, peft.PeftModel)


# ---- a reference pass --------------------------------------------------------------------------------------------


class Watch(TrainerCallback):
    """At each step: which blocks' adapters are held frozen, and whether all that is frozen kept every bit."""

    def __init__(self, model: nn.Module) -> None:
        self.start = weights(model)
        self.frozen: list[set[int]] = []
        self.moved: list[str] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        frozen = {n for n, p in model.named_parameters() if not p.requires_grad and n in self.start}
        adapters = [name for name in frozen if "lora_" in name]
        self.frozen.append({block for block in range(3) if any(f"layers.{block}." in name for name in adapters)})
        now = {n: p for n, p in model.named_parameters() if n in frozen}
        self.moved += [n for n, p in now.items() if not torch.equal(p, self.start[n].to(p.dtype))]


def check_flips(model: nn.Module, watch: Watch) -> None:
    assert watch.frozen == [{0, 1}, {0, 1}, {0}, {0}, set(), set()]
    assert not watch.moved
    assert [row.steps for row in model.peft_plus.engagement["train"]] == [6, 4, 2]


def preference_data(kind: str) -> Dataset:
    rows = PAIRS * 2
    if kind == "kto":
        sides = [(row, side) for row in rows for side in ("chosen", "rejected")]
        rows = [{"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"} for row, side in sides]
    return Dataset.from_list(rows)


PREFERENCE: dict[str, tuple[type[Any], type[Any], dict[str, Any]]] = {
    "dpo": (trl.DPOTrainer, trl.DPOConfig, {}),
    "dpo, precomputed": (trl.DPOTrainer, trl.DPOConfig, {"precompute_ref_log_probs": True}),
    "dpo, no checkpointing": (trl.DPOTrainer, trl.DPOConfig, {"gradient_checkpointing": False}),
    "kto": (trl.KTOTrainer, trl.KTOConfig, {}),
    "cpo": (CPOTrainer, CPOConfig, {"max_length": 32}),
}


@pytest.mark.filterwarnings("ignore::UserWarning:trl.experimental")
@pytest.mark.parametrize("kind", list(PREFERENCE))
def test_flips_survive_preference_training(kind, tmp_path):
    """DPO and KTO switch adapters for their reference in each micro-batch, whereupon PEFT lets all of them train."""
    trainer_class, config_class, settings = PREFERENCE[kind]
    model = get_model(llama(), FLIPS)
    watch = Watch(model)
    trained(
        with_plugins(trainer_class),
        model,
        config(config_class, tmp_path, max_steps=6, **settings),
        preference_data(kind.split(",")[0]),
        callbacks=[watch],
    )
    check_flips(model, watch)


def test_flips_survive_a_reference_without_adapters(tmp_path):
    """`disable_adapter()`, as where the adapter is new and the base is its reference."""

    class DisablesAdapters(trl.SFTTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            with torch.no_grad(), self.accelerator.unwrap_model(model).disable_adapter():
                model(input_ids=inputs["input_ids"])
            return loss

    model = get_model(llama(), FLIPS)
    watch = Watch(model)
    args = config(trl.SFTConfig, tmp_path, max_steps=6)
    trained(with_plugins(DisablesAdapters), model, args, SFT["default"].dataset(), callbacks=[watch])
    check_flips(model, watch)


def test_plain_dpo_is_trls_own_bit_for_bit(tmp_path):
    trainers = []
    for ours in (False, True):
        torch.manual_seed(1)
        lora = peft.LoraConfig(**LORA, lora_dropout=0.1, task_type="CAUSAL_LM")
        model = get_model(llama(), lora) if ours else peft.get_peft_model(llama(), lora)
        trainer_class = with_plugins(trl.DPOTrainer) if ours else trl.DPOTrainer
        trainers.append(trained(trainer_class, model, config(trl.DPOConfig, tmp_path), preference_data("dpo")))
    theirs, mine = (weights(trainer.model) for trainer in trainers)
    assert theirs.keys() == mine.keys()
    assert not [name for name in theirs if not torch.equal(theirs[name], mine[name])]
    assert losses(trainers[0]) == losses(trainers[1])


def test_a_reward_model_thaws_its_layers(tmp_path):
    model = get_model(tiny_reward(), FLIPS, task="SEQ_CLS", num_labels=1)
    watch = Watch(model)
    trained(
        with_plugins(trl.RewardTrainer),
        model,
        config(trl.RewardConfig, tmp_path, max_steps=6),
        preference_data("reward"),
        callbacks=[watch],
    )
    assert [row.steps for row in model.peft_plus.engagement["train"]] == [6, 4, 2, 0]
    assert not watch.moved


def tiny_reward() -> nn.Module:
    return llama("SEQ_CLS", num_labels=1)


def test_grpo_generates_and_goes_on_freezing(tmp_path):
    """Its reference pass switches adapters outside the loss."""
    model = get_model(llama(), FLIPS)
    watch = Watch(model)
    trained(
        with_plugins(trl.GRPOTrainer),
        model,
        config(
            trl.GRPOConfig,
            tmp_path,
            max_steps=6,
            num_generations=2,
            max_completion_length=4,
            beta=0.1,
        ),
        Dataset.from_dict({"prompt": TEXTS}),
        reward_funcs=lambda completions, **_: [float(len(text)) for text in completions],
        callbacks=[watch],
    )
    check_flips(model, watch)


# ---- terms under other objectives --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trainer_class", "objective"),
    [
        (peft_plus.Trainer, "supervised"),
        (trl.SFTTrainer, "supervised"),
        (trl.DPOTrainer, "preference"),
        (trl.KTOTrainer, "preference"),
        (CPOTrainer, "preference"),
        (trl.RewardTrainer, "reward"),
        (trl.GRPOTrainer, "reinforcement"),
        (trl.RLOOTrainer, "reinforcement"),
        (trl.DistillationTrainer, "distillation"),
    ],
)
def test_a_term_for_labels_is_refused_where_there_are_none(trainer_class, objective):
    """When the Trainer is built, before its data are prepared."""
    ours = with_plugins(trainer_class)
    assert objective_of(ours) == objective
    if objective != "supervised":
        model = get_model(llama(), ["lora", "r3f"])
        with pytest.raises(MethodError, match=rf"'r3f'.*supervised training, and {ours.__name__} does {objective}"):
            ours(model=model)


@dataclass(kw_only=True)
class Prefers(Plugin):
    """A term for preference training: weight · Σ of a parameter that nothing else uses, per `unit`."""

    name: ClassVar[str] = "prefers"
    objectives: ClassVar[tuple[str, ...]] = ("preference",)

    unit: str
    weight: float = 1e-6

    def loss_terms(self, run, batch, output):
        assert output.logits.shape[:2] == batch["input_ids"].shape  # chosen and rejected rows
        count = {"example": len(batch["input_ids"]), "step": 1}.get(self.unit, 3)
        free = dict(run.model.named_parameters())["free"]
        return {"prefers": LossTerm(self.weight * free.sum() * count, count, per=self.unit)}


def dpo_gradient(unit: str, folder: Any) -> dict[str, Tensor]:
    base, recorder = llama(), Recorder()
    base.register_parameter("free", nn.Parameter(torch.zeros(2)))
    trained(
        with_plugins(trl.DPOTrainer),
        get_model(base, ["full", Prefers(unit=unit)]),
        config(trl.DPOConfig, folder, max_steps=1, max_grad_norm=0.0),
        preference_data("dpo"),
        ref_model=llama(),
        callbacks=[recorder],
    )
    return recorder.gradients[0]


@pytest.mark.parametrize("unit", ["example", "step"])
def test_a_term_for_preferences_weighs_exactly_what_it_says(unit, tmp_path):
    torch.testing.assert_close(dpo_gradient(unit, tmp_path)["free"], torch.full((2,), 1e-6), rtol=1e-6, atol=0.0)


def test_a_term_for_preferences_that_counts_labels_is_told_that_there_are_none(tmp_path):
    with pytest.raises(MethodError, match=r"'prefers' counts per label.*no 'labels'.*per=\"step\" needs no count"):
        dpo_gradient("label", tmp_path)
