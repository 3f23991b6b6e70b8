"""A model with a plan does what plain PEFT's does: copied, compiled, pushed, merged, switched, loaded elsewhere.

Every test makes the same model twice, plain and with a plan, does the same to both, and compares.
"""

from __future__ import annotations

import copy
import inspect
import json
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import peft
import pytest
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, PrefixTuningConfig, PromptTuningConfig
from torch import Tensor, nn

import peft_plus
from peft_plus import MethodError
from tests.models import batch, tiny

PLUGINS = ["gradual_unfreeze", "llrd"]
TASKS = {"bert": "SEQ_CLS", "llama": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM"}


def lora(name: str = "bert", **settings: Any) -> LoraConfig:
    """Weights that are not zero, so that an adapter that is lost or applied twice shows."""
    return LoraConfig(task_type=TASKS[name], init_lora_weights=False, **settings)


def pair(
    name: str = "bert", config: Callable[[str], Any] = lora, plugins: list[str] | None = None, **options: Any
) -> tuple[Any, Any]:
    """The same PeftModel twice: as plain PEFT makes it, and made through us with a plan on it."""

    def made(module: Any) -> Any:
        torch.manual_seed(0)
        return module.get_peft_model(tiny(name, TASKS[name]), config(name), **options).eval()

    return made(peft), peft_plus.attach(made(peft_plus), PLUGINS if plugins is None else plugins)


def logits(model: nn.Module, name: str = "bert") -> Tensor:
    with torch.no_grad():
        return model(**batch(name, TASKS[name])).logits


def flags(model: nn.Module) -> dict[str, bool]:
    return {name: tensor.requires_grad for name, tensor in model.named_parameters()}


def assert_same(plain: nn.Module, ours: nn.Module, name: str = "bert") -> None:
    """Equal in names, bits, what trains, and what comes out."""
    theirs, mine = plain.state_dict(), ours.state_dict()
    assert list(theirs) == list(mine)
    assert all(torch.equal(theirs[key], mine[key]) for key in theirs)
    assert flags(plain) == flags(ours)
    assert torch.equal(logits(plain, name), logits(ours, name))


@pytest.mark.parametrize("name", TASKS)
def test_the_same_seed_gives_the_same_weights(name: str, tmp_path: Path) -> None:
    """What `get_model` tries out before it loads must not use up random numbers."""
    base = tiny(name, TASKS[name])
    base.save_pretrained(tmp_path)
    torch.manual_seed(0)
    plain = peft.get_peft_model(type(base).from_pretrained(tmp_path), LoraConfig(task_type=TASKS[name]))
    torch.manual_seed(0)
    ours = peft_plus.get_model(tmp_path, ["lora", "llrd"], task=TASKS[name], num_labels=3 if name == "bert" else None)
    assert_same(plain.eval(), ours.eval(), name)


# --- Copies ---


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(duplicate: Callable[[Any], Any], tmp_path: Path) -> None:
    plain, ours = pair()
    plain_copy, our_copy = duplicate(plain), duplicate(ours)
    assert type(our_copy) is type(plain)
    assert our_copy.peft_plus is not ours.peft_plus
    for plugin, copied in zip(ours.peft_plus.plugins, our_copy.peft_plus.plugins, strict=True):
        assert copied is not plugin
        assert copied == plugin
    with torch.no_grad():
        for model in (plain_copy, our_copy):
            next(p for p in model.parameters() if p.requires_grad).zero_()
    assert_same(plain, ours)  # untouched by what was done to the copy
    assert_same(plain_copy, our_copy)
    for model, folder in ((plain_copy, "plain"), (our_copy, "ours")):
        model.save_pretrained(tmp_path / folder)
    assert (tmp_path / "ours" / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "plain" / "adapter_model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("first", ["theirs", "ours"])
def test_pickles_go_both_ways(first: str) -> None:
    """What has no plan holds not a word of us, and so opens where only PEFT is installed."""
    maker = peft_plus if first == "ours" else peft
    torch.manual_seed(0)
    config = maker.LoraConfig(task_type="SEQ_CLS", init_lora_weights=False)
    model = maker.get_peft_model(tiny("bert"), config)
    for value in (config, model):
        assert b"peft_plus" not in pickle.dumps(value)
    back = pickle.loads(pickle.dumps(model))
    assert type(back) is peft.PeftModelForSequenceClassification is peft_plus.PeftModelForSequenceClassification
    assert pickle.loads(pickle.dumps(config)) == config
    assert_same(model, back)


# --- Running ---


@pytest.mark.parametrize(("name", "backend"), [("bert", "aot_eager"), ("llama", "eager")])
def test_compiled(name: str, backend: str) -> None:
    plain, ours = pair(name)
    results = []
    for model in (plain, ours):
        torch._dynamo.reset()
        loss = torch.compile(model, backend=backend)(**batch(name, TASKS[name])).loss
        loss.backward()
        results.append((loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (loss, grads), (our_loss, our_grads) = results
    assert torch.equal(loss, our_loss)
    assert grads
    assert list(grads) == list(our_grads)
    assert all(torch.equal(grads[key], our_grads[key]) for key in grads)


@pytest.mark.filterwarnings("ignore:Position ids are not supported for parameter efficient tuning")  # PEFT's own
@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.parametrize(
    "config",
    [
        lora,
        lambda name: PromptTuningConfig(task_type=TASKS[name], num_virtual_tokens=3),
        lambda name: PrefixTuningConfig(task_type=TASKS[name], num_virtual_tokens=3),
    ],
    ids=["lora", "prompt_tuning", "prefix_tuning"],
)
def test_generate(name: str, config: Callable[[str], Any]) -> None:
    plain, ours = pair(name, config, plugins=["llrd"] if config is lora else [])
    inputs = {key: value for key, value in batch(name, TASKS[name]).items() if key != "labels"}
    greedy, sampled = ({"do_sample": False}, {"do_sample": True, "top_k": 5})
    for how in (greedy, sampled):
        texts = []
        for model in (plain, ours):
            torch.manual_seed(1)
            texts.append(model.generate(**inputs, max_new_tokens=6, **how))
        assert torch.equal(*texts)


# --- Several adapters ---


def add_second(model: Any, name: str = "bert") -> None:
    torch.manual_seed(1)
    model.add_adapter("second", lora(name, r=4))


def switch(model: Any) -> None:
    add_second(model)
    model.set_adapter("second")


def switch_back(model: Any) -> None:
    switch(model)
    model.set_adapter("default")


def disable(model: Any) -> None:
    with model.disable_adapter():
        model.found = logits(model)


def merge(model: Any) -> None:
    model.merge_adapter()


def unmerge(model: Any) -> None:
    model.merge_adapter()
    model.unmerge_adapter()


def delete(model: Any) -> None:
    switch(model)
    model.delete_adapter("default")


@pytest.mark.parametrize("change", [add_second, switch, switch_back, disable, merge, unmerge, delete])
def test_adapters_change_as_with_peft(change: Callable[[Any], None], tmp_path: Path) -> None:
    plain, ours = pair()
    for model, folder in ((plain, "plain"), (ours, "ours")):
        change(model)
        model.save_pretrained(tmp_path / folder)
    assert_same(plain, ours)
    assert plain.active_adapters == ours.active_adapters
    assert list(plain.peft_config) == list(ours.peft_config)
    if change is disable:
        assert torch.equal(plain.found, ours.found)
    weights = [path.relative_to(tmp_path / "plain") for path in (tmp_path / "plain").rglob("*.safetensors")]
    assert weights
    for path in weights:
        assert (tmp_path / "plain" / path).read_bytes() == (tmp_path / "ours" / path).read_bytes()


@pytest.mark.parametrize("combination", ["svd", "cat", "ties_svd"])
def test_weighted_sums_of_adapters(combination: str) -> None:
    plain, ours = pair("llama")
    for model in (plain, ours):
        add_second(model, "llama")
        torch.manual_seed(2)
        model.add_weighted_adapter(["default", "second"], [0.7, 0.3], "both", combination_type=combination, density=0.5)
        model.set_adapter("both")
    assert_same(plain, ours, "llama")


@pytest.mark.parametrize("leave", ["merge_and_unload", "unload"])
def test_leaving_peft(leave: str) -> None:
    plain, ours = (getattr(model, leave)() for model in pair())
    assert type(ours) is type(plain)
    assert not hasattr(ours, "peft_plus")
    assert_same(plain, ours)


def test_the_plan_of_a_deleted_adapter_says_what_to_do(tmp_path: Path) -> None:
    from tests.training import quiet

    _, ours = pair()
    delete(ours)
    assert "llrd" in str(ours.peft_plus)
    with pytest.raises(peft_plus.MethodError, match=r"no longer in the model.*Call peft_plus\.attach"):
        peft_plus.Trainer(ours, quiet(tmp_path, max_steps=1), train_dataset=[{}]).train()
    peft_plus.attach(ours, PLUGINS)
    assert all(".second." in name or "classifier" in name for name in ours.peft_plus.params)


# --- Mixed models ---


def test_mixed_models() -> None:
    plain, ours = pair(mixed=True)
    assert type(plain) is type(ours) is peft.PeftMixedModel
    for model in (plain, ours):
        torch.manual_seed(1)
        model.add_adapter("loha", LoHaConfig(target_modules=["query", "value"], init_weights=False))
        model.set_adapter(["default", "loha"])
    assert_same(plain, ours)
    alone = logits(plain)
    for model in (plain, ours):
        model.set_adapter("loha")
    assert not torch.equal(alone, logits(plain))
    assert_same(plain, ours)
    assert_same(plain.merge_and_unload(), ours.merge_and_unload())


# --- Folders ---


def saved(into: Path, config: Callable[[], LoraConfig]) -> tuple[Path, Path]:
    """A base, and the same adapter on it saved by plain PEFT and by a model with a plan."""
    base = tiny("bert")
    base.save_pretrained(into / "base")
    for name, module in (("plain", peft), ("ours", peft_plus)):
        model = type(base).from_pretrained(into / "base")
        torch.manual_seed(0)
        model = module.get_peft_model(model, config())
        if module is peft_plus:
            peft_plus.attach(model, PLUGINS)
        model.save_pretrained(into / name)
    return into / "plain", into / "ours"


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    return saved(tmp_path, lora)


def test_a_folder_is_peft_s_and_one_file_more(folders: tuple[Path, Path]) -> None:
    plain, ours = ({path.name: path for path in folder.iterdir()} for folder in folders)
    assert set(ours) - set(plain) == {"peft_plus.json"}
    for name in plain:
        if name == "adapter_config.json":  # PEFT writes its sets in any order
            theirs, mine = (json.loads(files[name].read_text()) for files in (plain, ours))
            for config in (theirs, mine):
                config["target_modules"].sort()
            assert theirs == mine
        else:
            assert plain[name].read_bytes() == ours[name].read_bytes()


@pytest.mark.parametrize("module", [peft, peft_plus])
def test_auto_classes(folders: tuple[Path, Path], module: Any) -> None:
    loader = module.AutoPeftModelForSequenceClassification
    plain, ours = (loader.from_pretrained(folder, num_labels=3).eval() for folder in folders)
    assert type(plain) is type(ours) is peft.PeftModelForSequenceClassification
    assert_same(plain, ours)


@pytest.mark.parametrize("module", [peft, peft_plus])
def test_an_adapter_without_a_task_names_the_class_of_its_base(module: Any, tmp_path: Path) -> None:
    folders = saved(tmp_path, lambda: LoraConfig(init_lora_weights=False))
    plain, ours = (module.AutoPeftModel.from_pretrained(folder).eval() for folder in folders)
    assert type(plain) is type(ours) is peft.PeftModel
    assert type(ours.get_base_model()) is type(tiny("bert"))
    assert_same(plain, ours)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")  # transformers' own way to add a second
def test_transformers_loads_what_we_saved(folders: tuple[Path, Path]) -> None:
    """transformers' own adapter methods, step by step, on the folder of each."""
    models = []
    for folder in folders:
        model: Any = tiny("bert")
        model.load_adapter(folder, adapter_name="ours")
        torch.manual_seed(1)
        model.add_adapter(lora(r=4, modules_to_save=["classifier"]), adapter_name="new")
        models.append(model.eval())
    plain, ours = models
    seen = []
    for step in (
        lambda model: None,
        lambda model: model.set_adapter("ours"),
        lambda model: model.disable_adapters(),
        lambda model: model.enable_adapters(),
        lambda model: model.delete_adapter("new"),
    ):
        for model in models:
            step(model)
        assert plain.active_adapters() == ours.active_adapters()
        assert_same(plain, ours)
        seen.append(logits(plain))
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])
    assert torch.equal(seen[1], seen[3])


@pytest.mark.parametrize("call", [peft_plus.attach, peft_plus.get_model])
def test_an_adapter_that_transformers_put_in_is_not_taken_for_a_whole_model(call: Any) -> None:
    """`add_adapter` puts the adapter into the transformers model itself, and saves it in a way of its own."""
    model: Any = tiny("bert")
    model.add_adapter(lora())
    with pytest.raises(MethodError, match=r"from transformers' add_adapter .*get_peft_model\(base, config\)"):
        call(model, ["llrd"])
    assert not hasattr(model, "peft_plus")


# --- Signatures ---


def test_save_pretrained_keeps_its_signature() -> None:
    plain, ours = pair()
    assert inspect.signature(ours.save_pretrained) == inspect.signature(plain.save_pretrained)
    inspect.signature(ours.save_pretrained).bind("folder")


# --- The hub ---


@pytest.fixture
def uploads(monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """The hub, as far as an upload needs it: the names in each commit."""
    commits: list[set[str]] = []

    def create_commit(self: Any, repo_id: str, operations: Any, **kwargs: Any) -> huggingface_hub.CommitInfo:
        commits.append({operation.path_in_repo for operation in operations})
        url = f"https://huggingface.co/{repo_id}/commit/1"
        return huggingface_hub.CommitInfo(url, commit_message="", commit_description="", oid="1")

    def create_repo(self: Any, repo_id: str, **kwargs: Any) -> huggingface_hub.RepoUrl:
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", create_commit)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    return commits


@pytest.mark.parametrize("plugins", [[], PLUGINS], ids=["no plugins", "plugins"])
def test_push_to_hub(uploads: list[set[str]], plugins: list[str]) -> None:
    for model in pair(plugins=plugins):
        model.push_to_hub("someone/adapter")
    plain, ours = uploads
    assert "adapter_model.safetensors" in plain
    assert ours == plain | {"peft_plus.json"}


@pytest.mark.parametrize("positional", [True, False])
def test_saving_and_pushing_in_one(uploads: list[set[str]], tmp_path: Path, positional: bool) -> None:
    """transformers uploads before `save_pretrained` returns; our file belongs to the upload."""
    for model, folder in ((tiny("bert"), "plain"), (peft_plus.get_model(tiny("bert"), "full"), "ours")):
        if positional:
            model.save_pretrained(tmp_path / folder, True, None, True, repo_id="someone/model")
        else:
            model.save_pretrained(tmp_path / folder, push_to_hub=True, repo_id="someone/model")
        assert "_upload_modified_files" not in vars(model)
    plain, ours = uploads
    assert "model.safetensors" in plain
    assert ours == plain | {"peft_plus.json"}


def test_only_the_main_process_writes_however_it_is_told(tmp_path: Path) -> None:
    model = peft_plus.get_model(tiny("bert"), "full")
    model.save_pretrained(tmp_path, False)
    assert list(tmp_path.iterdir()) == []


def test_configs_push_as_before(uploads: list[set[str]], tmp_path: Path) -> None:
    for module in (peft, peft_plus):
        module.IA3Config(task_type="SEQ_CLS").push_to_hub("someone/config")
    plain, ours = uploads
    assert plain == ours
    assert peft_plus.IA3Config is IA3Config


def test_a_plan_adds_no_warning(tmp_path: Path) -> None:
    def heard(model: Any, folder: Path) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model(**batch("bert"))
            model.save_pretrained(folder)
            copy.deepcopy(model).merge_and_unload()
        return [str(warning.message) for warning in caught]

    plain, ours = pair()
    assert heard(plain, tmp_path / "plain") == heard(ours, tmp_path / "ours")
