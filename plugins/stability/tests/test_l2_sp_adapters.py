"""L2-SP on every kind of adapter: against autograd of ‖ΔW − ΔW₀‖², each ΔW formed whole, and of plain distances."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora import BdLoraConfig, LoraLayer
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM, TrainerCallback

from peft_plus import MethodError, Run, get_model
from peft_plus_stability.l2_sp import L2SP
from peft_plus_stability.low_rank_change import low_rank_changes, squared_norm
from tests.consistency import trainer_of
from tests.models import BOS, EOS, PAD, VOCAB, batch, rows_of, tiny

pytestmark = pytest.mark.usefixtures("one_accelerator_at_a_time")

ALPHA, BETA = 0.3, 0.2

Changes = Callable[[nn.Module], list[Tensor]]


@pytest.fixture(autouse=True)
def _one_thread_and_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def formed(model: nn.Module) -> list[Tensor]:
    """ΔW of every layer, as PEFT forms it to merge."""
    return [module.get_delta_weight("default") for module in model.modules() if isinstance(module, LoraLayer)]


def product_of_each_group(model: nn.Module) -> list[Tensor]:
    """ΔW of grouped convolutions, which PEFT cannot form: each group's B reads its own share of A's channels."""
    found = []
    for module in model.modules():
        if isinstance(module, LoraLayer):
            layers: tuple[Any, Any] = (module.lora_A["default"], module.lora_B["default"])
            a, b = (layer.weight.flatten(1) for layer in layers)
            rank, groups = b.shape[1], layers[1].groups
            rows = [b[o] @ a[o * groups // len(b) * rank : (o * groups // len(b) + 1) * rank] for o in range(len(b))]
            found.append(module.scaling["default"] * torch.stack(rows))
    return found


class Grouped(nn.Module):
    """A convolution in two groups, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(4, 6, 3, groups=2)
        self.head = nn.Linear(6, 2)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.head(self.convolution(pixel_values).mean((2, 3)))


def mixtral() -> nn.Module:
    shape = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"vocab_size": VOCAB, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    return MixtralForCausalLM(MixtralConfig(**shape, **ids, num_key_value_heads=2, num_local_experts=3)).eval()


def begun(model: nn.Module, method: Any, task: str | None = None, **settings: Any) -> tuple[Any, Run, L2SP]:
    """A model at the beginning of a stage."""
    model = get_model(model, [method, L2SP(**{"alpha": ALPHA, "beta": BETA, **settings})], task=task)
    plan = model.peft_plus
    run = Run(model=model, task=plan.task, num_blocks=3, params=tuple(plan.params.values()))
    (plugin,) = plan.plugins
    plugin.on_stage_begin(run)
    return model, run, plugin


def nudge(model: nn.Module) -> None:
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.requires_grad:
                tensor.add_(0.3 * torch.randn_like(tensor))


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    names, tensors = zip(*((n, t) for n, t in model.named_parameters() if t.requires_grad), strict=True)
    found = torch.autograd.grad(loss, tensors, allow_unused=True)
    return {n: g for n, g in zip(names, found, strict=True) if g is not None}


def check(model: Any, run: Run, plugin: L2SP, changes: Changes, start: list[Tensor]) -> None:
    """Value and gradient of the term: α/2 (Σ‖ΔW − ΔW₀‖² + Σ‖w − w₀‖²) + β/2 Σ‖head‖²."""
    params = model.peft_plus.params
    plain = {n: t.detach().clone() for n, t in model.named_parameters() if t.requires_grad and not is_factor(n)}
    nudge(model)
    total = torch.zeros((), dtype=torch.float64)
    for now, before in zip(changes(model), start, strict=True):
        total = total + ALPHA / 2 * (now.double() - before.double()).square().sum()
    for name, before in plain.items():
        now = model.get_parameter(name).double()
        new = params[name].part == "head"
        total = total + (BETA / 2 * now.square() if new else ALPHA / 2 * (now - before.double()).square()).sum()
    term = plugin.loss_terms(run, {}, None)["l2_sp"]
    assert term.per == "step"
    assert term.sum.dtype == torch.float32
    assert term.sum.item() == pytest.approx(total.item(), rel=1e-5)
    got, wanted = gradients(model, term.sum), gradients(model, total)
    assert got.keys() == wanted.keys() == {n for n, t in model.named_parameters() if t.requires_grad}
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient.float(), rtol=1e-4, atol=1e-5)


def is_factor(name: str) -> bool:
    return any(f".lora_{kind}" in name for kind in ("A", "B", "E", "embedding")) and not name.endswith(".bias")


CONFIGS: dict[str, tuple[Callable[[], nn.Module], Any, str | None]] = {
    "lora": (lambda: tiny("bert"), peft.LoraConfig(r=4, lora_alpha=12), None),
    "rslora": (lambda: tiny("bert"), peft.LoraConfig(r=4, lora_alpha=12, use_rslora=True), None),
    "embeddings": (lambda: tiny("bert"), peft.LoraConfig(r=2, target_modules=["word_embeddings", "query"]), None),
    "transposed": (lambda: tiny("gpt2"), peft.LoraConfig(r=2, fan_in_fan_out=True), "SEQ_CLS"),
    "biases": (
        lambda: tiny("bert"),
        peft.LoraConfig(r=2, lora_bias=True, bias="lora_only", target_modules=["query"]),
        None,
    ),
    "saved modules": (lambda: tiny("bert"), peft.LoraConfig(r=2, modules_to_save=["pooler"]), None),
    "dora": (lambda: tiny("bert"), peft.LoraConfig(r=2, use_dora=True), None),
    "convolutions": (lambda: tiny("resnet"), peft.LoraConfig(r=2, target_modules=["convolution"]), None),
    "experts": (
        mixtral,
        peft.LoraConfig(
            r=2,
            target_modules=["q_proj"],
            target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        ),
        "CAUSAL_LM",
    ),
    "adalora": (lambda: tiny("bert"), peft.AdaLoraConfig(init_r=4, total_step=10), None),
    "not from zero": (lambda: tiny("bert"), peft.LoraConfig(r=4, init_lora_weights=False), None),
    "pissa": (lambda: tiny("bert"), peft.LoraConfig(r=4, init_lora_weights="pissa"), None),
    "experts, not from zero": (
        mixtral,
        peft.LoraConfig(
            r=2, target_modules=[], target_parameters=["mlp.experts.gate_up_proj"], init_lora_weights=False
        ),
        "CAUSAL_LM",
    ),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_low_rank_change_is_pulled_as_a_whole_and_the_rest_to_its_start(kind: str) -> None:
    made, config, task = CONFIGS[kind]
    model, run, plugin = begun(made(), config, task)
    start = [change.detach().clone() for change in formed(model)]
    assert start
    assert any(change.any() for change in start) == (kind in ("pissa", "not from zero", "experts, not from zero"))
    check(model, run, plugin, formed, start)


def test_a_convolution_in_groups_has_a_product_for_each() -> None:
    config = peft.LoraConfig(r=4, target_modules=["convolution"], init_lora_weights=False)
    with pytest.warns(UserWarning, match="groups > 1"):
        model = peft.get_peft_model(Grouped(), config)  # type: ignore[arg-type]
    inputs = torch.randn(2, 4, 5, 5)
    layer: Any = model.base_model.model.convolution
    (change,) = product_of_each_group(model)
    shown = layer(inputs) - layer.base_layer(inputs)
    assert torch.allclose(nn.functional.conv2d(inputs, change.view(6, 4, 3, 3)), shown, atol=1e-5)

    (found,) = low_rank_changes(model)
    norm = squared_norm(*found.factors(dict(model.named_parameters())), found.scaling)
    assert norm.item() == pytest.approx(change.square().sum().item(), rel=1e-5)


@pytest.mark.parametrize("method", ["ia3", {"prompt_tuning": {"num_virtual_tokens": 3}}, "loha", "vera"])
def test_other_adapters_are_pulled_to_their_start(method: Any) -> None:
    model, run, plugin = begun(tiny("bert"), method if isinstance(method, str) else "prompt_tuning")
    check(model, run, plugin, lambda model: [], [])


def test_factors_whose_product_is_not_the_change_are_pulled_to_their_own_start() -> None:
    """A block-diagonal A is kept as a smaller matrix."""
    blocks = BdLoraConfig(target_modules_bd_a=["query"], target_modules_bd_b=["value"], nblocks=2)
    model, run, plugin = begun(tiny("bert"), peft.LoraConfig(r=4, use_bdlora=blocks))
    start = {n: t.detach().clone() for n, t in model.named_parameters()}
    nudge(model)
    got = gradients(model, plugin.loss_terms(run, {}, None)["l2_sp"].sum)
    factors = [n for n, t in model.named_parameters() if t.requires_grad and is_factor(n)]
    assert len(factors) == 12
    for name in factors:
        wanted = ALPHA * (model.get_parameter(name).detach() - start[name])
        torch.testing.assert_close(got[name], wanted, rtol=1e-4, atol=1e-6)


def test_where_b_alone_trains_its_change_counts() -> None:
    """As in LoRA-FA, which freezes A."""
    model, run, plugin = begun(tiny("bert"), "lora")
    for name, tensor in model.named_parameters():
        if "lora_A" in name:
            tensor.requires_grad_(False)
    nudge(model)
    got = gradients(model, plugin.loss_terms(run, {}, None)["l2_sp"].sum)
    wanted = gradients(model, ALPHA / 2 * sum((d.square().sum() for d in formed(model)), torch.zeros(())))
    assert wanted
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-6)


def test_what_rests_in_this_step_does_not_count() -> None:
    model, run, plugin = begun(tiny("bert"), "lora")
    nudge(model)
    for name, tensor in model.named_parameters():
        tensor.requires_grad_(tensor.requires_grad and "layer.2" in name)
    term = plugin.loss_terms(run, {}, None)["l2_sp"].sum
    changes = [
        m.get_delta_weight("default") for n, m in model.named_modules() if isinstance(m, LoraLayer) and ".2." in n
    ]
    assert len(changes) == 2
    assert term.item() == pytest.approx(ALPHA / 2 * sum(c.square().sum().item() for c in changes), rel=1e-5)
    for tensor in model.parameters():
        tensor.requires_grad_(False)
    assert plugin.loss_terms(run, {}, None) == {}


@pytest.mark.parametrize(("name", "task"), [("llama", "CAUSAL_LM"), ("bert", "MASKED_LM")])
def test_a_pretrained_head_is_pulled_to_its_start_not_to_zero(name: str, task: str) -> None:
    model, run, plugin = begun(tiny(name, task), "full", task)
    heads = [n for n, p in model.peft_plus.params.items() if p.part == "head"]
    assert heads
    start = {n: t.detach().clone() for n, t in model.named_parameters()}
    nudge(model)
    got = gradients(model, plugin.loss_terms(run, {}, None)["l2_sp"].sum)
    for n in heads:
        wanted = ALPHA * (model.get_parameter(n).detach() - start[n])
        torch.testing.assert_close(got[n], wanted, rtol=1e-4, atol=1e-6)


def test_a_second_stage_starts_anew() -> None:
    model, run, plugin = begun(tiny("bert"), "lora")
    nudge(model)
    plugin.on_stage_begin(run)
    assert plugin.loss_terms(run, {}, None)["l2_sp"].sum.item() == pytest.approx(
        BETA / 2 * sum(t.square().sum().item() for n, t in model.named_parameters() if "classifier.modules" in n),
        rel=1e-5,
    )


class Before(TrainerCallback):
    """The weights before each step."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        self.weights.append({n: t.detach().clone() for n, t in model.named_parameters()})


def test_the_pull_is_on_the_weights_and_not_on_what_a_micro_batch_computes_with(tmp_path: Path) -> None:
    """Mixout puts the start in the place of most weights, and twice the way from it in that of others."""
    method = {"full": {}, "mixout": {"p": 0.5}, "l2_sp": {"alpha": 100.0, "beta": 0.0}}
    model, before = get_model(tiny("bert"), method), Before()
    settings = {"max_steps": 3, "logging_strategy": "steps", "logging_steps": 1}
    run = trainer_of(model, rows_of(batch("bert", rows=16)), tmp_path, [before], **settings)
    run.train()
    logged = [line["l2_sp"] for line in run.state.log_history if "l2_sp" in line]
    start, params = before.weights[0], model.peft_plus.params
    for got, now in zip(logged, before.weights, strict=True):
        way = sum((now[n] - start[n]).double().square().sum() for n, p in params.items() if p.part == "base")
        assert got == pytest.approx(float(50 * way), rel=1e-4)
    assert logged[2] > 1


# ---- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "task", "method", "settings"),
    [("llama", "CAUSAL_LM", "lora", {"alpha": 0.0}), ("bert", "SEQ_CLS", "linear_probe", {"beta": 0.0})],
)
def test_a_pull_on_nothing_that_trains_is_refused(
    name: str, task: str, method: str, settings: dict[str, float]
) -> None:
    with pytest.raises(MethodError, match=r"l2_sp.*nothing that trains would be pulled"):
        get_model(tiny(name, task), {method: {}, "l2_sp": settings}, task=task)
    get_model(tiny(name, task), {method: {}, "l2_sp": {"alpha": 0.0, "beta": 0.0}}, task=task)


def test_weights_in_pieces_are_refused() -> None:
    """As DeepSpeed ZeRO-3 marks them: their values are empty."""
    model, run, plugin = begun(tiny("bert"), "full")
    next(model.parameters()).ds_id = 0
    for refused in (lambda: plugin.on_stage_begin(run), lambda: plugin.loss_terms(run, {}, None)):
        with pytest.raises(ValueError, match=r"l2_sp needs weights that are whole.*FSDP and ZeRO-3.*Use DDP"):
            refused()
