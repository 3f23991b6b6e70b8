"""What `adaptive` chooses for data made by hand, and what it does while a metric goes its way."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn
from transformers import TrainerCallback, default_data_collator

import peft_plus
from peft_plus import CheckpointError, MethodError, Session, distributed, get_model, registry
from peft_plus_stability import adaptive_probe
from peft_plus_stability.adaptive import Adaptive
from peft_plus_stability.adaptive_probe import epochs_for, look_at, probe_gain
from tests.consistency import model_and_batch
from tests.evaluated_loop import EvaluatedLoop, changed, check_evaluated_resume, evaluated_session, weights
from tests.models import rows_of, tiny
from tests.training import quiet

pytestmark = pytest.mark.usefixtures("one_accelerator_at_a_time")


def run(
    folder: Path, plugin: Any, *, tuner: str = "lora", rows: int = 12, evaluates: bool = True, **settings: Any
) -> Any:
    torch.manual_seed(0)
    model, data = model_and_batch("bert", "SEQ_CLS", rows=rows)
    args = quiet(folder, **{"per_device_train_batch_size": 4, "learning_rate": 1e-2, "max_steps": -1, **settings})
    return peft_plus.Trainer(
        get_model(model, [tuner, plugin]),
        args,
        train_dataset=rows_of(data),
        eval_dataset=rows_of(data)[:4] if evaluates else None,
        data_collator=default_data_collator,
    )


class Shown(peft_plus.Run):
    """A run over data made by hand: their features and classes."""

    features: Any = None
    labels: Any = None

    def examples(self, rows: int = 1, *, limit: int | None = None) -> Any:
        for start in range(0, len(self.labels), rows):
            part = slice(start, start + rows)
            yield {"x": self.features[part], "labels": self.labels[part]}

    def hidden(self, batch: Any, depth: int, weights: Any = None) -> torch.Tensor:
        assert depth == self.num_blocks
        return batch["x"][:, None]  # of one token


def shown(labels: Any, *, steps: int = 100, evaluates: bool = True, features: Any = None, **arguments: Any) -> Any:
    plan: Any = get_model(tiny("bert"), ["lora"]).peft_plus
    params = tuple(plan.params.values())
    made = Shown(
        model=nn.Linear(1, 1), task=plan.task, num_blocks=3, params=params, depths=(4, 3, 2, 1), steps_per_epoch=steps,
        base_lr=1e-3, evaluates=evaluates,
    )  # fmt: skip
    made.labels = torch.as_tensor(labels)
    made.features = torch.zeros(len(made.labels), 1) if features is None else torch.as_tensor(features).float()
    vars(made)["arguments"] = quiet("unused", **arguments)
    return made


def planned(labels: Any, settings: Any = None, **how: Any) -> tuple[Any, Adaptive]:
    """The arguments that are chosen, and who chose them."""
    plugin = Adaptive(**{"frozen_blocks": 0, **(settings or {})})
    return plugin.plan_budget(shown(labels, **how)), plugin


def classes(*sizes: int) -> list[int]:
    """So many of each class, one class after the other."""
    return [label for label, size in enumerate(sizes) for _ in range(size)]


# ---- what is chosen --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "epochs"), [(1, 20), (30, 20), (60, 10), (100, 6), (200, 3), (5_000, 3)])
def test_few_steps_want_many_epochs(steps: int, epochs: int) -> None:
    assert epochs_for(steps) == epochs


@pytest.mark.parametrize(
    ("sizes", "epochs", "told"),
    [
        ((100, 100), 6, "200 examples, 50% of them of the largest class; 600"),  # 600 / 100
        ((158, 42), 6, "200 examples, 79% of them of the largest class; 600"),
        ((160, 40), 15, "80% of them of the largest class, which count as 80;"),  # 600 / (100 · 80 / 200)
        ((25, 160, 15), 15, "which count as 80;"),
        ((170, 30), 20, "which count as 60;"),  # 600 / 30
        ((198, 2), 20, "which count as 4;"),
        ((200,), 6, "100% of them of the largest class; 600"),
    ],
)
def test_where_one_class_holds_most_the_others_decide_how_long(sizes: Any, epochs: int, told: str) -> None:
    args, plugin = planned(classes(*sizes))
    assert args["num_train_epochs"] == epochs
    assert told in plugin.reasons[0]


def test_unlabelled_rows_are_of_no_class() -> None:
    _, plugin = planned([-100] * 50 + classes(25, 25))
    assert "100 examples, 50% of them of the largest class" in plugin.reasons[0]


def test_accuracy_of_skewed_data_is_called_a_poor_measure() -> None:
    def told(sizes: Any, metric: str) -> bool:
        _, plugin = planned(classes(*sizes), {"metric": metric})
        return "eval_accuracy is watched, a poor measure here: the largest class alone makes 90%" in plugin.reasons

    assert told((180, 20), "eval_accuracy")
    assert not told((180, 20), "eval_loss")
    assert not told((100, 100), "eval_accuracy")


def test_max_steps_of_yours_count_unless_epochs_are_given() -> None:
    args, plugin = planned(classes(6, 6), max_steps=70)
    assert not {"num_train_epochs", "max_steps"} & set(args)
    assert "70 steps, yours: max_steps is given, and epochs is not" in plugin.reasons
    args, plugin = planned(classes(6, 6), {"epochs": 2.0}, max_steps=70)
    assert (args["num_train_epochs"], args["max_steps"]) == (2.0, -1)
    assert "max_steps=70 of the arguments does not count: the number of epochs does" in plugin.reasons
    args, plugin = planned(classes(6, 6))
    assert "max_steps" not in args


@pytest.mark.parametrize(
    ("settings", "how", "wanted", "told"),
    [
        ({}, {}, "epoch", "an evaluation after each epoch: what follows"),
        ({"stop": False}, {}, "epoch", "no early stopping: as you said"),
        ({}, {"eval_strategy": "steps", "eval_steps": 5}, None, "evaluations by steps, yours"),
        ({}, {"evaluates": False}, None, "no early stopping, and nothing follows a plateau: there is nothing"),
        ({"stop": False, "lr_factor": 1.0}, {}, None, "no early stopping: as you said"),
    ],
)
def test_it_evaluates_by_epoch_only_where_nobody_said_when(settings: Any, how: Any, wanted: Any, told: str) -> None:
    args, plugin = planned(classes(6, 6), settings, **how)
    assert args.get("eval_strategy") == wanted
    assert any(reason.startswith(told) for reason in plugin.reasons)
    assert ("early_stop" in plugin.chosen) == (settings.get("stop", True) and how.get("evaluates", True))


def test_data_that_nothing_is_chosen_by_are_not_read() -> None:
    run = shown([0])
    vars(run)["examples"] = None  # a call would raise
    assert Adaptive(frozen_blocks=0, epochs=2.0).plan_budget(run)["num_train_epochs"] == 2.0


# ---- the probe -------------------------------------------------------------------------------------------------------


def test_the_sample_holds_what_stands_at_the_end_of_sorted_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adaptive_probe, "PROBED", 40)
    labels = np.array(classes(300, 300))
    known = np.stack([labels * 6.0 + np.arange(600) / 600, np.arange(600)], 1)  # the second tells which row it is
    seen = look_at(shown(labels, features=known), probe=True)
    assert seen.rows == 600
    assert seen.labels.tolist() == labels.tolist()
    assert seen.features is not None
    assert seen.of is not None
    rows = seen.features[:, 1].astype(int)
    assert len(set(rows)) == len(seen.features) == 40
    assert seen.of.tolist() == labels[rows].tolist()
    assert np.unique(seen.of, return_counts=True)[1].min() >= 10
    again = look_at(shown(labels, features=known), probe=True)
    assert again.features is not None
    assert again.features.tolist() == seen.features.tolist(), "a resumed run would choose otherwise"


def test_each_row_has_the_same_chance_to_be_in_the_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adaptive_probe, "PROBED", 8)
    counts = np.zeros(40)
    for seed in range(100):
        run = shown([0] * 40, features=np.arange(40)[:, None])
        run.seed = seed
        features = look_at(run, probe=True).features
        assert features is not None
        counts[features[:, 0].astype(int)] += 1
    assert np.abs(counts / 100 - 8 / 40).max() < 4 * (0.2 * 0.8 / 100) ** 0.5


@pytest.mark.parametrize(("other", "blocks"), [(1.0, 1), (0.9, 1), (0.7, 0)])
def test_all_processes_decide_by_the_mean_of_their_probes(
    other: float, blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This one wins all there is to win: with another's 0.7 that makes 0.85, which is too little."""
    monkeypatch.setattr(distributed, "gather", lambda value: [value, other])
    labels = np.array(classes(20, 20))
    _, plugin = planned(labels, {"frozen_blocks": None}, features=labels[:, None] * 6.0)
    assert plugin.chosen.get("freeze", {"blocks": 0}) == {"blocks": blocks}


# ---- under a Trainer -------------------------------------------------------------------------------------------------


def test_the_budget_follows_the_data_and_each_choice_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = run(tmp_path, Adaptive(), gradient_accumulation_steps=2)
    with caplog.at_level(logging.WARNING):
        made.train()
    assert made.args.num_train_epochs == 20
    assert made.args.warmup_steps == 0.1
    assert made.args.learning_rate == pytest.approx(1e-2 * 3 / 20)
    share = np.bincount([int(row["labels"]) for row in made.train_dataset]).max() / 12
    assert f"20 epochs of 2 steps: 12 examples, {share:.0%} of them of the largest class; 600 steps" in caplog.text
    assert "learning rate 0.0015 instead of 0.01: yours is for 3 epochs, and in 20 the rates" in caplog.text
    assert "early stopping after 6 evaluations: there is data to evaluate on" in caplog.text
    assert "0 blocks frozen: no probe" in caplog.text


def test_what_is_given_is_not_chosen(tmp_path: Path) -> None:
    made = run(tmp_path, Adaptive(epochs=1.0, learning_rate=3e-3, frozen_blocks=1), evaluates=False)
    made.train()
    assert (made.args.num_train_epochs, made.args.learning_rate) == (1.0, 3e-3)
    plugin = made.model.peft_plus.plugins[0]
    assert plugin.chosen == {"freeze": {"blocks": 1}}
    assert "1 blocks frozen for the whole run: as you said" in plugin.reasons  # nothing is evaluated
    (row,) = [row for row in made.model.peft_plus.engagement["train"] if row.group[0] == 2][:1]
    assert row.steps
    assert all(row.group[0] != 1 for row in made.model.peft_plus.engagement["train"] if row.steps)


@pytest.mark.parametrize(
    ("settings", "more"), [({"epochs": 20.0}, {}), ({}, {"max_steps": 2}), ({}, {"num_train_epochs": 25.0})]
)
def test_a_rate_for_so_many_epochs_or_steps_stays(settings: Any, more: Any, tmp_path: Path) -> None:
    made = run(tmp_path, Adaptive(**settings), **more)
    made.train()
    assert made.args.learning_rate == 1e-2
    assert "learning rate 0.01, yours: only fresh weights" in " ".join(made.model.peft_plus.plugins[0].reasons)


def test_pretrained_weights_get_their_own_rate(tmp_path: Path) -> None:
    made = run(tmp_path, Adaptive(epochs=1.0), tuner="full")
    made.train()
    assert made.args.learning_rate == 2e-5


def test_a_probe_tells_what_is_known_from_noise() -> None:
    draw = np.random.default_rng(0)
    labels = draw.integers(0, 2, 200)
    known = draw.normal(size=(200, 8)) + 6 * labels[:, None]
    assert probe_gain(known, labels) == pytest.approx(1.0)
    assert abs(probe_gain(draw.normal(size=(200, 8)), labels)) < 0.25
    assert probe_gain(known[:20], np.array([0] * 17 + [1] * 3)) is None
    assert probe_gain(known[:20], np.zeros(20)) is None


def test_where_a_probe_solves_it_the_lower_half_rests(tmp_path: Path) -> None:
    """Rows of one class hold other tokens than those of the other, and the first block tells them apart."""
    made = run(tmp_path, Adaptive(epochs=1.0), rows=40)
    for row in made.train_dataset:
        row["labels"] = row["labels"] % 2
        row["input_ids"] = torch.where(row["attention_mask"] == 1, 20 + 30 * row["labels"], row["input_ids"])
    made.train()
    plugin = made.model.peft_plus.plugins[0]
    assert plugin.chosen["freeze"] == {"blocks": 1}
    frozen = "1 blocks frozen, until a plateau thaws them one by one"
    assert f"{frozen}: a linear probe wins 100% of what there is over the largest class" in plugin.reasons


class Scripted(peft_plus.Trainer):
    """Evaluates to a script."""

    losses: tuple[float, ...] = ()

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        output = super().evaluation_loop(*args, **kwargs)
        epoch = round(float(self.state.epoch or 0))
        output.metrics["eval_loss"] = self.losses[min(epoch, len(self.losses)) - 1]
        return output


class Looks(TrainerCallback):
    """The weights after each update, and what has a state in the optimizer."""

    def __init__(self) -> None:
        self.weights: dict[int, dict[str, torch.Tensor]] = {}
        self.held: set[str] = set()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, optimizer: Any, **_: Any) -> None:
        self.weights[state.global_step] = weights(model)
        self.held = {name for name, tensor in model.named_parameters() if optimizer.state.get(tensor)}

    def moved(self, step: int) -> set[str]:
        return changed(self.weights[step - 1], self.weights[step])


def scripted(
    folder: Path, losses: tuple[float, ...], plugin: Adaptive, *, tuner: str = "lora", **settings: Any
) -> tuple[Any, Looks]:
    torch.manual_seed(0)
    model, data = model_and_batch("bert", "SEQ_CLS", rows=4)
    looks = Looks()
    made = Scripted(
        get_model(model, [tuner, plugin]),
        quiet(folder, per_device_train_batch_size=4, learning_rate=1e-2, **settings),
        train_dataset=rows_of(data),
        eval_dataset=rows_of(data),
        data_collator=default_data_collator,
        callbacks=[looks],
    )
    made.losses = losses
    return made, looks


def at_depth(model: Any, *depths: int) -> set[str]:
    return {name for name, param in model.peft_plus.params.items() if param.depth in depths}


def test_the_rate_falls_on_a_plateau_and_the_run_ends_with_its_best_weights(tmp_path: Path) -> None:
    made, looks = scripted(tmp_path, (1.0, 0.5, 0.6, 0.7, 0.4, 0.5, 0.6, 0.7), Adaptive(patience=1))
    made.train()
    plugin = made.model.peft_plus.plugins[0]
    assert made.state.global_step == 8
    assert plugin.lowered == 4  # not once more where the run ends
    assert not changed(looks.weights[5], weights(made.model))


def test_without_stop_a_run_goes_to_its_end(tmp_path: Path) -> None:
    made, looks = scripted(tmp_path, (0.5, 0.6), Adaptive(patience=1, stop=False, epochs=6.0))
    made.train()
    assert made.state.global_step == 6
    assert made.model.peft_plus.plugins[0].lowered == 5
    assert not changed(looks.weights[6], weights(made.model))


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "has not improved" in record.getMessage()]


@pytest.mark.parametrize("tuner", ["lora", "full"])
def test_a_plateau_first_thaws_then_lowers_the_rate_then_ends_the_run(
    tuner: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plugin = Adaptive(patience=1, frozen_blocks=1, learning_rate=1e-2)
    made, looks = scripted(tmp_path, (1.0, 0.5, 0.6, 0.7, 0.8, 0.4), plugin, tuner=tuner)
    with caplog.at_level(logging.WARNING):
        made.train()
    lower, upper = at_depth(made.model, 0, 1), at_depth(made.model, 2)
    for step in (2, 3):
        assert not looks.moved(step) & lower
        assert looks.moved(step) & upper
    assert looks.moved(4) & lower
    assert looks.moved(5) & lower
    assert made.state.global_step == 5
    assert not changed(looks.weights[2], weights(made.model))
    block = "block 1" if tuner == "lora" else "block 1 and the embeddings"
    assert messages(caplog) == [
        f"adaptive: eval_loss has not improved for 1 evaluations, so {block} may train from now on; 0 blocks stay "
        "frozen.",
        "adaptive: eval_loss has not improved for 2 evaluations, so the rate falls to 0.5 of what it would be.",
    ]


def test_without_thaw_what_is_frozen_stays_so_and_holds_no_optimizer_state(tmp_path: Path) -> None:
    made, looks = scripted(tmp_path, (0.5, 0.6), Adaptive(patience=1, frozen_blocks=1, thaw=False))
    made.train()
    lower = at_depth(made.model, 0, 1)
    assert made.state.global_step == 4
    assert made.model.peft_plus.plugins[0].lowered == 2
    assert all(not looks.moved(step) & lower for step in (2, 3, 4))
    assert looks.held
    assert not looks.held & lower


@pytest.mark.parametrize("settings", [{}, {"frozen_blocks": 1}, {"frozen_blocks": 1, "thaw": False}])
def test_a_resumed_run_ends_bit_identical(settings: Any, tmp_path: Path) -> None:
    losses = (1.0, 0.5, 0.6, 0.7, 0.4, 0.5, 0.6, 0.7)
    whole, _ = scripted(tmp_path, losses, Adaptive(patience=1, **settings), save_strategy="epoch")
    whole.train()
    assert whole.state.global_step == 8
    for step in (2, 3, 6):
        again, _ = scripted(tmp_path, losses, Adaptive(patience=1, **settings), save_strategy="epoch")
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert not changed(weights(whole.model), weights(again.model)), step
        assert again.state.global_step == 8
        assert again.model.peft_plus.timeline == whole.model.peft_plus.timeline
        assert vars(again.model.peft_plus.plugins[0])["lowered"] == whole.model.peft_plus.plugins[0].lowered


class Breaks(TrainerCallback):
    """Ends a run as Ctrl-C does, once."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            self.step = 0
            raise KeyboardInterrupt


def learnable(folder: Path, *callbacks: Any) -> Any:
    """A run whose first probe finds nothing, and whose later ones would: labels without a rule, learned by heart."""
    draw = np.random.default_rng(0)
    data = [
        {"input_ids": torch.tensor(draw.integers(5, 90, 8)), "labels": torch.tensor(number % 2)} for number in range(48)
    ]
    made = run(folder, Adaptive(epochs=15.0, learning_rate=3e-3), tuner="full", save_strategy="steps", save_steps=50)
    made.train_dataset = made.eval_dataset = data
    for callback in callbacks:
        made.add_callback(callback)
    return made


def test_a_run_that_broke_off_is_resumed_by_its_trainer_and_by_no_other_with_its_model(tmp_path: Path) -> None:
    whole = learnable(tmp_path / "whole")
    whole.train()
    made = learnable(tmp_path / "broken", Breaks(150))
    with pytest.raises(KeyboardInterrupt):
        made.train()
    chosen = made.model.peft_plus.plugins[0].chosen
    assert "freeze" not in chosen
    other = learnable(tmp_path / "broken")
    other.model.load_state_dict(made.model.state_dict())
    with pytest.raises(CheckpointError, match="A model that has trained in this process is another one: build it anew"):
        other.train(resume_from_checkpoint=True)
    made.train(resume_from_checkpoint=True)
    assert made.model.peft_plus.plugins[0].chosen == chosen
    assert made.state.global_step == whole.state.global_step
    assert not changed(weights(whole.model), weights(made.model))


def test_a_checkpoint_of_other_choices_is_refused(tmp_path: Path) -> None:
    _, before = planned(classes(6, 6), {"frozen_blocks": 1})
    _, after = planned(classes(6, 6), {"frozen_blocks": 1, "stop": False})
    with pytest.raises(ValueError, match=r"written with chosen=.*early_stop.*go on with the data"):
        after.load_state_dict(before.state_dict())


@pytest.mark.parametrize(("rate", "told"), [(3e-3, True), (2e-5, False)])
def test_an_optimizer_of_yours_that_keeps_its_rate_is_told_of(
    rate: float, told: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, data = model_and_batch("bert", "SEQ_CLS", rows=4)
    model = get_model(model, ["full", Adaptive(epochs=1.0)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    made = peft_plus.Trainer(
        model, quiet(tmp_path), train_dataset=rows_of(data), data_collator=default_data_collator,
        optimizers=(optimizer, None),
    )  # fmt: skip
    with caplog.at_level(logging.WARNING):
        made.train()
    assert ("adaptive chose the learning rate 2e-05, but the optimizer was made with 0.003" in caplog.text) == told
    assert ("but the optimizer was made with" in caplog.text) == told


def test_a_trainer_keeps_its_own_evaluations_and_number_of_steps(tmp_path: Path) -> None:
    made = run(
        tmp_path, Adaptive(), max_steps=4, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2,
        load_best_model_at_end=True,
    )  # fmt: skip
    made.train()
    assert made.state.global_step == 4
    assert [row["step"] for row in made.state.log_history if "eval_loss" in row] == [2, 4]


# ---- in a loop of one's own ------------------------------------------------------------------------------------------

VALUES = {1: 1.0, 2: 0.5, 3: 0.6, 4: 0.7, 5: 0.8, 6: 0.4}


def looped(plugin: Adaptive, values: Any, **settings: Any) -> EvaluatedLoop:
    torch.manual_seed(0)
    model = get_model(tiny("bert", num_hidden_layers=4), ["full", plugin])
    return EvaluatedLoop(model, steps=12, values=values, optimizer=torch.optim.SGD, weight_decay=0.0, **settings).run()


def test_it_thaws_from_the_top_and_lowers_only_what_is_thawed() -> None:
    loop = looped(Adaptive(patience=1, frozen_blocks=3, stop=False), {3: 0.5, 4: 0.5, 6: 0.5, 7: 0.5, 8: 0.5, 9: 0.4})
    depth = {name: param.depth for name, param in loop.model.peft_plus.params.items()}
    lowest = [min(depth[name] for name in moved) for moved in loop.moved]
    assert lowest == [4, 4, 4, 4, 3, 3, 2, 0, 0, 0, 0, 0]
    for rates, factor in zip(loop.rates, [1.0] * 8 + [0.5] * 4, strict=True):
        assert list(rates.values()) == pytest.approx([factor] * len(rates), rel=1e-3)


def test_the_order_is_the_same_without_a_plan() -> None:
    loop = looped(Adaptive(patience=1, frozen_blocks=1), VALUES)
    lower = at_depth(loop.model, 0, 1)
    assert [bool(moved & lower) for moved in loop.moved] == [False, False, False, True, True]
    assert [next(iter(rates.values())) for rates in loop.rates] == pytest.approx([1.0] * 4 + [0.5], rel=1e-3)
    assert not changed(loop.measured[2], weights(loop.model))


@pytest.mark.parametrize("settings", [{}, {"frozen_blocks": 2}, {"frozen_blocks": 1, "thaw": False}])
def test_a_resumed_loop_ends_bit_identical(settings: Any) -> None:
    def fresh() -> Any:
        torch.manual_seed(0)
        return get_model(tiny("bert", num_hidden_layers=4), ["full", Adaptive(patience=1, **settings)])

    loop = check_evaluated_resume(fresh, steps=9, values=VALUES)
    assert loop.engine.stopped


def session_run(plugin: Adaptive, values: Any, steps: int = 8) -> tuple[Session, Any, dict[int, Any]]:
    torch.manual_seed(0)
    model = get_model(tiny("bert"), ["lora", plugin])
    _, data = model_and_batch("bert", "SEQ_CLS", rows=16)
    session, seen = evaluated_session(model, rows_of(data), values, steps=steps)
    return session, model, seen


def test_a_session_thaws_slows_down_and_ends(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        session, model, seen = session_run(Adaptive(patience=1, frozen_blocks=1, epochs=3.0), VALUES)
    lower = at_depth(model, 1)
    assert [bool(changed(seen[step - 1], seen[step]) & lower) for step in (2, 3, 4, 5)] == [False, False, True, True]
    assert session.step == 5
    assert not changed(weights(model), seen[2])
    assert ["thaws" in text or "may train" in text for text in messages(caplog)] == [True, False]
    (told,) = [record.getMessage() for record in caplog.records if "plans nothing" in record.getMessage()]
    assert told == (
        "adaptive plans nothing in a loop of your own. What acts, once session.evaluated(metrics) tells eval_loss: "
        "1 blocks are frozen; after 1 evaluations without improvement the next block thaws, later the rate is "
        "multiplied by 0.5; after 3 the run ends with its best weights. What does not: the number of epochs, the "
        "learning rate, the warm-up and the linear probe are left to your loop, and epochs=3 has no effect."
    )


def test_a_session_after_a_trainer_keeps_none_of_its_choices(tmp_path: Path) -> None:
    made, _ = scripted(tmp_path, (0.5, 0.6), Adaptive(patience=1, epochs=2.0))
    made.train()
    plugin = made.model.peft_plus.plugins[0]
    assert plugin.lowered == 1
    session = Session(made.model, Accelerator(cpu=True), max_steps=1)
    optimizer = session.optimizer(torch.optim.AdamW, lr=1e-2)
    for batch in session.batches(session.loader(made.train_dataset, batch_size=4, collate_fn=default_data_collator)):
        session.accelerator.backward(session.loss(batch))
        optimizer.step()
        optimizer.zero_grad()
    assert plugin.lowered == 0


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tuner", "task", "blocks", "match"),
    [
        ("lora", "SEQ_CLS", 4, "frozen_blocks=4 is past the depth of this model, which has 3 blocks. Give 3 at most"),
        ("linear_probe", "SEQ_CLS", 1, r"frozen_blocks=1 does not fit: nothing trains there.*depths \[4\]"),
        ("lora", "CAUSAL_LM", 3, r"frozen_blocks=3 does not fit: nothing else trains.*depths \[1, 2, 3\]"),
    ],
)
def test_a_depth_that_does_not_fit_the_model_is_refused(tuner: str, task: str, blocks: int, match: str) -> None:
    with pytest.raises(MethodError, match=match):
        get_model(tiny("llama" if task == "CAUSAL_LM" else "bert", task), [tuner, Adaptive(frozen_blocks=blocks)])


def test_a_technique_that_is_not_installed_is_named_with_its_distribution(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = registry.entries

    def without(kind: Any) -> Any:
        return {name: entry for name, entry in entries(kind).items() if name != "freeze"}

    made = run(tmp_path, Adaptive(frozen_blocks=1))
    monkeypatch.setattr(registry, "entries", without)
    with pytest.raises(MethodError, match=r"'freeze'.*pip install peft-plus-freezing"):
        made.train()
    with pytest.raises(MethodError, match=r"'freeze'.*pip install peft-plus-freezing"):
        get_model(tiny("bert"), ["lora", Adaptive(frozen_blocks=1)])


def test_beside_what_it_chooses_itself_it_is_refused() -> None:
    with pytest.raises(MethodError, match="cannot run together"):
        get_model(tiny("bert"), ["lora", Adaptive(), "early_stop"])
    with pytest.raises(MethodError, match=r"'adaptive' .* puts back the weights that were best .*'ema'"):
        get_model(tiny("bert"), ["lora", Adaptive(), "ema"])
    get_model(tiny("bert"), ["lora", Adaptive(stop=False), "ema"])
    assert isinstance(get_model(tiny("bert"), ["lora", "adaptive"]), nn.Module)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("epochs", 0.0), ("learning_rate", -1.0), ("warmup_fraction", 1.0), ("frozen_blocks", -1), ("patience", 0),
     ("lr_factor", 0.0)],
)  # fmt: skip
def test_a_setting_out_of_range_is_refused(setting: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{setting}="):
        Adaptive(**{setting: value})
