"""What the user wrote → one tuner and plugins in an order that fits them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
from peft import LoraConfig, PeftType

from peft_plus import MethodError, Plugin, PluginError, Stage
from peft_plus.compose import Tuner, check_needs, plan_stages, resolve
from peft_plus.tasks.causal_lm import CausalLM
from peft_plus.tasks.seq_cls import SequenceClassification
from peft_plus_probing.lp_ft import LPFT
from peft_plus_stability.llrd import LLRD
from peft_plus_stability.r3f import R3F

CLASSES, TOKENS = SequenceClassification(num_labels=2), CausalLM()
PROMPT = resolve("prompt_tuning").tuner


def plugin(label: str, **declared: tuple[str, ...]) -> Plugin:
    """A plugin without hooks."""
    return dataclass(kw_only=True)(type(label, (Plugin,), {"name": label, **declared}))()


def order(*plugins: Plugin) -> list[str]:
    return [p.name for p in resolve(list(plugins)).plugins]


# --- resolve ---


def test_a_name() -> None:
    method = resolve("lora", {"r": 4}, "SEQ_CLS")
    assert method.plugins == ()
    assert method.tuner is not None
    assert (method.tuner.name, method.tuner.config.peft_type) == ("lora", PeftType.LORA)
    assert (method.tuner.config.r, method.tuner.config.task_type) == (4, "SEQ_CLS")
    assert method.tuner.origin.startswith("peft ")


def test_no_tuner() -> None:
    method = resolve(["llrd", "r3f"])
    assert method.tuner is None
    assert method.plugins == (LLRD(), R3F())
    assert set(method.origins) == {"llrd", "r3f"}


def test_core_tuners_have_no_config() -> None:
    for name in ("full", "linear_probe"):
        tuner = resolve(name).tuner
        assert tuner is not None
        assert (tuner.name, tuner.config) == (name, None)
        assert tuner.origin.startswith("peft-plus ")


def test_objects_are_copied() -> None:
    config, plugins = LoraConfig(target_modules=["q"]), [R3F(eps=0.1), LLRD()]
    method = resolve([config, *plugins])
    assert method.tuner is not None
    assert method.tuner.config is not config
    assert method.tuner.config == config
    assert method.plugins == tuple(plugins)
    assert all(mine is not theirs for mine, theirs in zip(method.plugins, plugins, strict=True))


def test_state_belongs_to_the_copy() -> None:
    @dataclass(kw_only=True)
    class Counting(Plugin):
        name: ClassVar[str] = "counting"
        seen: list[int] = field(init=False, default_factory=list)

    mine = Counting()
    resolve(mine).plugins[0].seen.append(1)  # type: ignore[attr-defined]
    assert mine.seen == []
    assert mine.settings() == {}


def test_origins_of_objects() -> None:
    method = resolve([R3F(), plugin("mine")])
    assert method.origins["r3f"].startswith("peft-plus-stability ")
    assert method.origins["mine"] == __name__


def test_a_subclass_is_not_taken_for_the_installed_plugin() -> None:
    @dataclass(kw_only=True)
    class Faster(LLRD):
        pass

    assert resolve(Faster()).origins["llrd"] == __name__


def test_a_config_s_task_type_is_kept() -> None:
    tuner = resolve(LoraConfig(task_type="CAUSAL_LM"), None, "SEQ_CLS").tuner
    assert tuner is not None
    assert tuner.config.task_type == "CAUSAL_LM"


def test_prompts_get_a_length() -> None:
    assert PROMPT is not None
    assert PROMPT.config.num_virtual_tokens == 20
    assert resolve("p_tuning", {"num_virtual_tokens": 3}).tuner.config.num_virtual_tokens == 3  # type: ignore[union-attr]


def test_variants_keep_other_settings() -> None:
    tuner = resolve({"dora": {"r": 2, "use_dora": True}}).tuner
    assert tuner is not None
    assert (tuner.name, tuner.config.use_dora, tuner.config.r) == ("lora", True, 2)


@pytest.mark.parametrize(("name", "by_layer"), [("lora", True), ("full", True), ("linear_probe", False)])
def test_by_layer(name: str, by_layer: bool) -> None:
    tuner = resolve(name).tuner
    assert tuner is not None
    assert tuner.by_layer == by_layer
    assert PROMPT is not None
    assert not PROMPT.by_layer


# --- order ---


def test_the_user_s_order_stands() -> None:
    a, b, c = (plugin(name) for name in "abc")
    assert order(b, c, a) == ["b", "c", "a"]


def test_after_moves_as_little_as_it_can() -> None:
    a, b, c, d = plugin("a", after=("c",)), plugin("b"), plugin("c"), plugin("d")
    assert order(a, b, c, d) == ["b", "c", "a", "d"]
    assert order(c, a, d, b) == ["c", "a", "d", "b"]


def test_after_chains_and_ignores_who_is_absent() -> None:
    a, b, c = plugin("a", after=("b", "absent")), plugin("b", after=("c",)), plugin("c")
    assert order(a, b, c) == ["c", "b", "a"]
    assert order(a) == ["a"]


def test_after_itself_is_nothing() -> None:
    assert order(plugin("a", after=("a",)), plugin("b")) == ["a", "b"]


def test_cycles() -> None:
    a, b, c = plugin("a", after=("b",)), plugin("b", after=("a",)), plugin("c")
    with pytest.raises(MethodError, match=r"\['a', 'b'\] each want to come after another"):
        order(c, a, b)


@pytest.mark.parametrize("turned", [False, True])
def test_conflicts(turned: bool) -> None:
    pair = [plugin("a", conflicts=("b",)), plugin("b")]
    with pytest.raises(MethodError, match=r"plugin 'a' \(.*\) and plugin 'b' \(.*\) cannot run together: 'a' declares"):
        order(*(reversed(pair) if turned else pair))
    assert order(pair[0]) == ["a"]


# --- needs ---


@pytest.mark.parametrize(
    ("need", "tuner", "task", "says"),
    [
        ("layers", "lora", CLASSES, ""),
        ("layers", "full", CLASSES, ""),
        ("layers", "linear_probe", CLASSES, "'linear_probe' has none: it trains only the head"),
        ("layers", "prompt_tuning", CLASSES, "'prompt_tuning' has none: it trains only its prompt"),
        ("layers", "prefix_tuning", TOKENS, "only its prompt"),
        ("body", "prompt_tuning", CLASSES, ""),
        ("body", "linear_probe", CLASSES, "'linear_probe' trains the head alone"),
        ("new_head", "lora", CLASSES, ""),
        ("new_head", "lora", TOKENS, "the task 'CAUSAL_LM' keeps the pretrained head"),
    ],
)
def test_needs(need: str, tuner: str, task: Any, says: str) -> None:
    needy = plugin("needy", needs=(need,))
    resolved = resolve(tuner).tuner
    assert resolved is not None
    if not says:
        check_needs([needy], {"needy": "my-dist 1.0"}, resolved, task)
        return
    with pytest.raises(MethodError, match=r"plugin 'needy' \(my-dist 1\.0\) needs ") as refused:
        check_needs([needy], {"needy": "my-dist 1.0"}, resolved, task)
    assert says in str(refused.value)
    assert "Drop the plugin" in str(refused.value)


def test_unknown_needs() -> None:
    with pytest.raises(PluginError, match=r"needs 'gold', which peft_plus does not know.*layers.*new_head"):
        check_needs([plugin("needy", needs=("gold",))], {}, Tuner("full"), CLASSES)


# --- stages ---


@dataclass(kw_only=True)
class Planner(Plugin):
    """Answers with what it was given."""

    name: ClassVar[str] = "planner"
    answer: Any = None

    def plan_stages(self, stages: Sequence[Stage]) -> Sequence[Stage]:
        return self.answer if self.answer is not None else stages


@dataclass(kw_only=True)
class Doubling(Plugin):
    """Runs everything twice."""

    name: ClassVar[str] = "doubling"

    def plan_stages(self, stages: Sequence[Stage]) -> Sequence[Stage]:
        return (*stages, *(Stage(name=f"{s.name}_again") for s in stages))


def test_one_plain_stage() -> None:
    assert plan_stages([], {}) == (Stage(),)
    assert plan_stages([R3F(), Planner()], {}) == (Stage(name="train", train="all", plugins=None, args={}),)


def test_planners_chain_in_order() -> None:
    assert [s.name for s in plan_stages([LPFT(), Doubling()], {})] == ["probe", "train", "probe_again", "train_again"]
    assert [s.name for s in plan_stages([Doubling(), LPFT()], {})] == ["probe", "train", "train_again"]


@pytest.mark.parametrize("answer", [(), ["train"], [Stage(), None]])
def test_what_is_no_plan(answer: Any) -> None:
    with pytest.raises(PluginError, match=r"plugin 'planner' \(here 1\.0\) returned .* from plan_stages"):
        plan_stages([Planner(answer=answer)], {"planner": "here 1.0"})


def test_stages_of_one_name() -> None:
    with pytest.raises(PluginError, match=r"one name: \['a', 'a'\]"):
        plan_stages([Planner(answer=[Stage(name="a"), Stage(name="a")])], {})
