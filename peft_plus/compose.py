"""What the user wrote → one resolved method: a tuner, and plugins in order that fit it and each other.

Everything here happens before a base model loads, so every error is cheap.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from . import registry
from .ask import ask, origin_of
from .errors import MethodError, PluginError
from .plugin import NEEDS, Param, Plugin
from .registry import CORE_TUNERS, VARIANTS, Entry
from .settings import check_plain, check_types, make
from .stages import Stage

if TYPE_CHECKING:
    from peft import PeftConfig

    from .layers import Layers
    from .proof import Row
    from .tasks import Task
    from .timeline import Change


@dataclass(frozen=True)
class Tuner:
    """What is trained: a name, and for PEFT's tuners their config.

    Attributes:
        name: `full`, `linear_probe`, or the lower-case PeftType.
        config: a copy of the user's PEFT config, or one made from settings; None for `full` and `linear_probe`.
        origin: distribution and version, for messages.
    """

    name: str
    config: PeftConfig | None = None
    origin: str = ""

    @property
    def by_layer(self) -> bool:
        """Whether its parameters sit in the model's blocks. Prompts sit before them, a probe above them."""
        return self.name != "linear_probe" and not getattr(self.config, "is_prompt_learning", False)


@dataclass(frozen=True)
class Method:
    """A tuner (None when the user named none), plugins in the order in which they act, and the stages they plan."""

    tuner: Tuner | None
    plugins: tuple[Plugin, ...]
    origins: Mapping[str, str]
    stages: tuple[Stage, ...] = (Stage(),)


@dataclass
class Plan:
    """How one model trains: what hangs on it as `model.peft_plus`.

    Attributes:
        tuner: name of the tuner.
        plugins: the plugins, in order; copies of the user's objects, so that state belongs to this model.
        origins: plugin name → distribution and version.
        task: the task.
        layers: depth of every parameter.
        params: name → Param of every parameter that may ever train.
        stages: the stages to run.
        quantization: `nf4`, `int8`, another scheme's name, or None.
        base: name or path, class and fingerprint of the base model, for `peft_plus.json`.
        timeline: filled while training: who trained when.
        engagement: filled after training: stage → what each group declared and did.
    """

    tuner: str
    plugins: tuple[Plugin, ...]
    origins: Mapping[str, str]
    task: Task
    layers: Layers
    params: Mapping[str, Param]
    stages: tuple[Stage, ...]
    quantization: str | None = None
    base: Mapping[str, Any] = field(default_factory=dict)
    timeline: list[Change] = field(default_factory=list)
    engagement: dict[str, list[Row]] = field(default_factory=dict)

    def __str__(self) -> str:
        from .summary import summary

        return summary(self)

    def active(self, stage: Stage) -> tuple[Plugin, ...]:
        """The plugins at work in a stage."""
        return tuple(p for p in self.plugins if stage.plugins is None or p.name in stage.plugins)


def resolve(method: Any, loose: Mapping[str, Any] | None = None, task_type: str | None = None) -> Method:
    """Turn a method as the user wrote it into tuner and plugins.

    Args:
        method: a name; a PEFT config or plugin object; a list of those; or a mapping name → settings.
        loose: settings given as keyword arguments; only with a single name.
        task_type: PEFT's name of the task, for the config of a tuner given by name; some accept only one.
    Raises:
        MethodError: unknown name or setting, two tuners, a plugin twice, conflicting plugins.
        PluginError: a named plugin does not import or breaks the contract.
    """
    tuners: list[Tuner] = []
    plugins: list[Plugin] = []
    origins: dict[str, str] = {}
    for item, settings in _items(method, dict(loose or {})):
        made, origin = _build(item, settings, task_type)
        if isinstance(made, Tuner):
            tuners.append(made)
        else:
            if made.name in origins:
                raise MethodError(f"The plugin {made.name!r} is named twice; give it once, with its settings.")
            plugins.append(made)
            origins[made.name] = origin
    if len(tuners) > 1:
        names = " and ".join(repr(t.name) for t in tuners)
        raise MethodError(f"A model has at most one tuner, but the method names {names}. Keep one of them.")
    _check_conflicts(plugins, origins)
    ordered = _ordered(plugins)
    stages = plan_stages(ordered, origins)
    _check_rivals(ordered, origins, stages)
    return Method(tuners[0] if tuners else None, ordered, origins, stages)


def check_needs(plugins: Sequence[Plugin], origins: Mapping[str, str], tuner: Tuner, task: Task) -> None:
    """Raise MethodError where a plugin needs what this tuner or task does not have. Needs no model."""
    for plugin in plugins:
        for need in plugin.needs:
            if need not in NEEDS:
                raise PluginError(
                    f"{who(plugin, origins)} needs {need!r}, which peft_plus does not know: {list(NEEDS)}."
                )
            if need == "layers" and not tuner.by_layer:
                raise MethodError(
                    f"{who(plugin, origins)} needs {NEEDS['layers']}; {tuner.name!r} has none: it trains only "
                    f"{'the head' if tuner.name == 'linear_probe' else 'its prompt'}. Drop the plugin, or use a tuner "
                    "that works in every block, e.g. 'lora' or 'full'."
                )
            if need == "body" and tuner.name == "linear_probe":
                raise MethodError(
                    f"{who(plugin, origins)} needs {NEEDS['body']}; 'linear_probe' trains the head alone. Drop the "
                    "plugin, or use a tuner such as 'lora' or 'full'."
                )
            if need == "base" and tuner.name != "full":
                raise MethodError(
                    f"{who(plugin, origins)} needs {NEEDS['base']}: {tuner.name!r} keeps the base as it was loaded, "
                    "and its adapter is saved without it. Drop the plugin, or use the tuner 'full'."
                )
            if need == "new_head" and not task.new_head:
                raise MethodError(
                    f"{who(plugin, origins)} needs {NEEDS['new_head']}; the task {task.name or 'of this model'!r} "
                    "keeps the pretrained head. Drop the plugin, or use a task such as 'SEQ_CLS'."
                )


def plan_stages(plugins: Sequence[Plugin], origins: Mapping[str, str]) -> tuple[Stage, ...]:
    """Let every plugin change the plan of stages, in order; one plain stage where none does."""
    stages: tuple[Stage, ...] = (Stage(),)
    set_by: dict[tuple[str, str], Plugin] = {}
    for plugin in plugins:
        if "plan_stages" not in plugin.hooks():
            continue
        answer = ask(plugin, "plan_stages", stages)
        if not isinstance(answer, (list, tuple)) or not answer or not all(isinstance(s, Stage) for s in answer):
            raise PluginError(
                f"{who(plugin, origins)} returned {answer!r} from plan_stages; expected a list of Stages, at least one."
            )
        _check_arguments(plugin, origins, stages, answer, set_by)
        stages = tuple(answer)
        _check_stages(plugin, origins, stages, {p.name for p in plugins})
    names = [s.name for s in stages]
    if len(set(names)) < len(names):
        raise PluginError(f"Two stages of the plan have one name: {names}. Each plugin that adds stages names its own.")
    return stages


def _check_arguments(
    plugin: Plugin,
    origins: Mapping[str, str],
    before: Sequence[Stage],
    after: Sequence[Stage],
    set_by: dict[tuple[str, str], Plugin],
) -> None:
    """Raise MethodError where two plugins want different values of one training argument."""
    old = {stage.name: stage.args for stage in before}
    for stage in (stage for stage in after if isinstance(stage.args, Mapping)):
        for name, value in stage.args.items():
            there = old.get(stage.name, {})
            if name in there and there[name] == value:
                continue
            other = set_by.get((stage.name, name))
            if other is not None:
                raise MethodError(
                    f"{who(other, origins)} sets {name}={there.get(name)!r} and {who(plugin, origins)} "
                    f"{name}={value!r} in the stage {stage.name!r}. Drop one of them, or set both alike."
                )
            set_by[stage.name, name] = plugin


def _check_stages(plugin: Plugin, origins: Mapping[str, str], stages: Sequence[Stage], known: set[str]) -> None:
    """Raise PluginError where a stage names what there is not, before the run that would come to it."""
    for stage in stages:
        wrong = ""
        if stage.train not in ("all", "head"):
            wrong = f"train={stage.train!r}; expected 'all' or 'head'"
        elif not isinstance(stage.args, Mapping):
            wrong = f"args={stage.args!r}; expected a mapping of TrainingArguments"
        elif strangers := set(stage.plugins or ()) - known:
            wrong = f"plugins={sorted(strangers)}, which this method does not name; it has {sorted(known)}"
        if wrong:
            raise PluginError(f"{who(plugin, origins)} planned the stage {stage.name!r} with {wrong}.")


def _items(method: Any, loose: dict[str, Any]) -> list[tuple[Any, dict[str, Any]]]:
    """The method as pairs of (name or object, settings)."""
    if isinstance(method, str):
        return [(method, loose)]
    if loose:
        as_mapping = "{" + ", ".join(f"'{_label(item)}': {{…}}" for item in _names(method)) + "}"
        raise MethodError(
            f"The settings {', '.join(sorted(loose))} go with one named method, but the method is a "
            f"{type(method).__name__}. Write them into a mapping, method={as_mapping}, or into the objects."
        )
    if isinstance(method, Mapping):
        pairs: list[tuple[Any, dict[str, Any]]] = []
        for name, settings in method.items():
            if not isinstance(name, str):
                raise MethodError(f"The keys of a method mapping are names; {name!r} is a {type(name).__name__}.")
            if settings is not None and not isinstance(settings, Mapping):
                raise MethodError(
                    f"The settings of {name!r} are {settings!r}; expected a mapping such as {{'{name}': {{…}}}}."
                )
            pairs.append((name, dict(settings or {})))
        if not pairs:
            raise MethodError("The method is empty: name a tuner, e.g. method='lora'.")
        return pairs
    if isinstance(method, (list, tuple)):
        if not method:
            raise MethodError("The method is empty: name a tuner, e.g. method='lora'.")
        return [(item, {}) for item in method]
    return [(method, {})]


def _build(item: Any, settings: dict[str, Any], task_type: str | None) -> tuple[Tuner | Plugin, str]:
    if isinstance(item, str):
        entry = registry.find(item, ("tuner", "plugin"))
        if entry.kind == "plugin":
            cls = registry.load(entry)
            label = f"plugin {item!r} ({entry.origin})"
            check_plain(settings, label)
            return make(cls, settings, label), entry.origin
        return _named_tuner(entry, settings, task_type), entry.origin
    if isinstance(item, Plugin):
        return _copied_plugin(item), origin_of(item)
    if isinstance(item, type) and issubclass(item, Plugin):
        raise MethodError(f"{item.__name__} is a class; the method takes its object: {item.__name__}().")
    from peft import PeftConfig

    if isinstance(item, PeftConfig):
        # PEFT's own code appends to the config that it is given; the user's object stays as it was.
        name = getattr(item.peft_type, "value", str(item.peft_type)).lower()
        return Tuner(name, copy.deepcopy(item), "peft"), "peft"
    raise MethodError(
        f"{item!r} ({type(item).__name__}) is no method: give a name, a PEFT config, a plugin object, or a list or "
        "mapping of them."
    )


def _named_tuner(entry: Entry, settings: dict[str, Any], task_type: str | None) -> Tuner:
    if entry.name in CORE_TUNERS and not entry.target:
        if settings:
            raise MethodError(f"{entry.name!r} has no settings, but {', '.join(sorted(settings))} was given.")
        return Tuner(entry.name, None, entry.origin)
    if entry.target:
        config_class = registry.load(entry)
    else:
        name, fixed, _ = VARIANTS.get(entry.name, (entry.name, {}, ""))
        clash = sorted(k for k, v in fixed.items() if settings.get(k, v) != v)
        if clash:
            raise MethodError(
                f"{entry.name!r} means {name!r} with {dict(fixed)}; {clash[0]}={settings[clash[0]]!r} undoes it."
            )
        settings = {**settings, **fixed}
        config_class = _peft_config_class(name)
        entry = Entry(name, "tuner", entry.distribution, entry.version)
    if issubclass(config_class, _prompt_learning()):
        # PEFT has no default and fails later on None; 20 is what its own examples use.
        settings.setdefault("num_virtual_tokens", 20)
    settings.setdefault("task_type", task_type)
    return Tuner(entry.name, make(config_class, settings, f"tuner {entry.name!r} ({entry.origin})"), entry.origin)


def _peft_config_class(name: str) -> type[Any]:
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftType

    config_class = PEFT_TYPE_TO_CONFIG_MAPPING.get(PeftType[name.upper()])
    if config_class is None:
        raise MethodError(f"The installed peft lists {name!r} but has no config for it; update peft.")
    return config_class


def _prompt_learning() -> type[Any]:
    from peft import PromptLearningConfig

    return PromptLearningConfig


def _copied_plugin(plugin: Plugin) -> Plugin:
    registry.check_plugin_class(type(plugin))
    check_types(type(plugin), plugin.settings(), f"plugin {plugin.name!r}")
    check_plain(plugin.settings(), f"plugin {plugin.name!r}")
    try:
        return copy.deepcopy(plugin)
    except Exception as error:
        raise PluginError(
            f"plugin {plugin.name!r} ({origin_of(plugin)}) cannot be copied: {type(error).__name__}: {error}. Each "
            "model gets a copy, whose state is its own: keep plain values and tensors in it."
        ) from error


def _check_conflicts(plugins: Sequence[Plugin], origins: Mapping[str, str]) -> None:
    for plugin in plugins:
        for other in plugins:
            if other.name in plugin.conflicts:
                raise MethodError(
                    f"{who(plugin, origins)} and {who(other, origins)} cannot run together: {plugin.name!r} declares "
                    "the conflict. Drop one of them."
                )


_ONE_OF = {
    "sampler": "both set the order of the data, of which there is one",
    "passes": "both make the passes of a micro-batch",
    "eval_weights": "both say which weights are evaluated and saved",
    "schedule": "are both learning-rate schedules, of which a stage has one",
}
"""What a stage has one of, a hook or a `schedule` → what two plugins would do."""


def _check_rivals(plugins: Sequence[Plugin], origins: Mapping[str, str], stages: Sequence[Stage]) -> None:
    """Raise MethodError where two plugins of one stage cannot both be right."""
    for stage in stages:
        there = [p for p in plugins if stage.plugins is None or p.name in stage.plugins]
        for kind, what in _ONE_OF.items():
            named = [p for p in there if (p.schedule if kind == "schedule" else kind in p.hooks())]
            if len(named) > 1:
                raise MethodError(f"{who(named[0], origins)} and {who(named[1], origins)} {what}. Drop one of them.")
        back = next((p for p in there if p.restores_best), None)
        others = next((p for p in there if "eval_weights" in p.hooks()), None)
        if back is not None and others is not None and back is not others:
            raise MethodError(
                f"{who(back, origins)} puts back the weights that were best when evaluated, and {who(others, origins)} "
                "has others evaluated than those that train. Drop one of them, or let the first put nothing back."
            )


def schedule_plugin(plan: Plan, stage: Stage) -> Plugin | None:
    """The plugin of a stage that is a learning-rate schedule, or None."""
    return next((plugin for plugin in plan.active(stage) if plugin.schedule), None)


def _ordered(plugins: Sequence[Plugin]) -> tuple[Plugin, ...]:
    """The user's order, changed only as far as `after` demands."""
    waiting, ordered = list(plugins), []
    while waiting:
        for plugin in waiting:
            if not any(other.name in plugin.after for other in waiting if other is not plugin):
                waiting.remove(plugin)
                ordered.append(plugin)
                break
        else:
            raise MethodError(f"The plugins {[p.name for p in waiting]} each want to come after another of them.")
    return tuple(ordered)


def who(plugin: Plugin, origins: Mapping[str, str]) -> str:
    """A plugin as messages name it: `plugin 'llrd' (peft-plus-stability 0.1.0)`."""
    return f"plugin {plugin.name!r} ({origins.get(plugin.name, type(plugin).__module__)})"


def _names(method: Any) -> list[Any]:
    return list(method) if isinstance(method, (list, tuple, Mapping)) else [method]


def _label(item: Any) -> str:
    if isinstance(item, str):
        return item
    name = getattr(item, "name", None) or getattr(getattr(item, "peft_type", None), "value", type(item).__name__)
    return str(name).lower()
