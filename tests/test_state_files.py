"""State files give back exactly what was written, hold no pickle, and refuse what they cannot hold by its place."""

from __future__ import annotations

import json
import pickle
import struct
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor, nn
from torch.optim import lr_scheduler as lrs
from transformers import Adafactor, get_scheduler

from peft_plus.errors import CheckpointError
from peft_plus.state_files import check_state, has_state, read_state, write_state

DTYPES = [
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32),
    *(torch.uint64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
]


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().resolve_conj().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def same(a: Any, b: Any) -> bool:
    """Equal in type, order and every bit; NaNs too."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and bits(a) == bits(b)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, np.generic):
        return a.dtype == b.dtype and a.tobytes() == b.tobytes()
    if isinstance(a, float):
        return struct.pack("<d", a) == struct.pack("<d", b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return len(a) == len(b) and all(same(k, m) and same(a[k], b[m]) for k, m in zip(a, b, strict=True))
    return a == b


def there_and_back(folder: Path, tree: Any) -> Any:
    write_state(folder / "state", tree)
    return read_state(folder / "state")


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    size = torch.empty((), dtype=dtype).element_size()
    high = 2 if dtype is torch.bool else 256
    raw = torch.randint(0, high, (*shape, size), dtype=torch.uint8, generator=draw)
    return raw.view(dtype).reshape(shape)


TENSORS = st.builds(
    random_tensor, st.sampled_from(DTYPES), st.lists(st.integers(0, 3), max_size=3).map(tuple), st.integers(0, 9)
)
NUMBERS = st.sampled_from(["?", "<i1", "<i2", "<u4", "<i8", ">i4", "<f2", "<f4", "<f8", ">f8", "<c16"]).map(np.dtype)
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(min_value=2**62, max_value=2**20_000),
    st.floats(allow_nan=True, allow_infinity=True),
    st.text(st.characters()),
    st.binary(max_size=20),
    st.sampled_from(DTYPES),
    TENSORS,
    NUMBERS.flatmap(lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, min_side=0, max_dims=3, max_side=3))),
    NUMBERS.flatmap(lambda dtype: hnp.arrays(dtype, 1)).map(lambda array: array[0]),
)
KEYS = st.one_of(
    st.text(st.characters(), max_size=5), st.integers(), st.sampled_from(["$tensor", "$dict", "a.b", "__metadata__"])
)
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(KEYS, inner, max_size=4),
        st.dictionaries(KEYS, inner, max_size=3).map(OrderedDict),
    ),
    max_leaves=12,
)


@given(tree=TREES)
@settings(max_examples=150, deadline=None)
def test_every_tree_comes_back_exactly(tree: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.getbasetemp() / "trees"
    folder.mkdir(exist_ok=True)
    assert same(there_and_back(folder, tree), tree)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 3)], ids=str)
def test_every_dtype_and_shape_comes_back(dtype: torch.dtype, shape: tuple[int, ...], tmp_path: Path) -> None:
    tensor = random_tensor(dtype, shape, 1)
    assert same(there_and_back(tmp_path, {"x": tensor}), {"x": tensor})


def test_keys_that_look_alike_stay_apart(tmp_path: Path) -> None:
    one, two, three, four = (torch.full((2,), i) for i in range(4))
    tree = {"a.b": one, "a": {"b": two}, 0: three, "0": four}
    assert same(there_and_back(tmp_path, tree), tree)


def test_counters_come_back_as_counters(tmp_path: Path) -> None:
    back = there_and_back(tmp_path, {"milestones": Counter({3: 2, 1: 1})})
    assert same(back, {"milestones": Counter({3: 2, 1: 1})})


def test_one_tensor_in_two_places_is_stored_once_and_stays_one(tmp_path: Path) -> None:
    shared = torch.arange(1000.0)
    back = there_and_back(tmp_path, {"a": shared, "b": [shared, shared.clone()]})
    assert back["a"] is back["b"][0]
    assert back["a"] is not back["b"][1]
    assert (tmp_path / "state.safetensors").stat().st_size < 3 * shared.nbytes


@pytest.mark.parametrize(
    "view",
    [
        lambda x: [x.t(), x],
        lambda x: [x.view(-1), x],
        lambda x: [x[1:], x[:2]],
        lambda x: [x[:, ::2], x[0, 0]],
        lambda x: [x[:1].expand(4, 4)],
        lambda x: [torch.complex(x, x).conj(), torch.complex(x, x).conj().imag],
    ],
)
def test_views_come_back_with_their_own_values(view: Any, tmp_path: Path) -> None:
    tree = view(torch.arange(16.0).reshape(4, 4))
    back = there_and_back(tmp_path, tree)
    assert all(torch.equal(a, b) for a, b in zip(tree, back, strict=True))
    assert all(t.is_contiguous() and t.untyped_storage().nbytes() == t.nbytes for t in back)


def test_a_parameter_comes_back_as_a_plain_tensor(tmp_path: Path) -> None:
    back = there_and_back(tmp_path, nn.Parameter(torch.ones(2)))
    assert type(back) is Tensor
    assert not back.requires_grad


def test_what_was_read_does_not_hang_on_the_file(tmp_path: Path) -> None:
    back = there_and_back(tmp_path, torch.zeros(4096))
    back += 1
    assert torch.equal(read_state(tmp_path / "state"), torch.zeros(4096))
    (tmp_path / "state.safetensors").write_bytes(b"")
    assert torch.equal(back, torch.ones(4096))


def test_tensors_go_to_the_device_asked_for(tmp_path: Path) -> None:
    write_state(tmp_path / "state", {"x": torch.ones(2), "n": np.ones(2)})
    back = read_state(tmp_path / "state", "meta")
    assert back["x"].device.type == "meta"
    assert np.array_equal(back["n"], np.ones(2))


def test_a_tree_without_tensors_needs_no_safetensors_file(tmp_path: Path) -> None:
    write_state(tmp_path / "state", [torch.ones(1)])
    assert there_and_back(tmp_path, [1]) == [1]
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]
    assert has_state(tmp_path / "state")
    assert not has_state(tmp_path / "other")


# --- what is refused ---


class Text(str):
    __slots__ = ()


HOLDS_ITSELF: list[Any] = []
HOLDS_ITSELF.append(HOLDS_ITSELF)


@pytest.mark.parametrize(
    ("tree", "named"),
    [
        ({"groups": [{"f": print}]}, r"state: groups\.0\.f is a builtins\.builtin_function"),
        ({"a": {1, 2}}, "a is a builtins.set"),
        ({"a": Text("x")}, r"a is a .*Text"),
        ({"a": np.array([{}])}, r"a is a numpy\.ndarray"),
        ({"a": torch.Size([1])}, r"a is a torch\.Size"),
        ({"a": nn.Linear(1, 1)}, r"a is a torch.*Linear"),
        ({"a": torch.ones(2, 2).to_sparse()}, "a is a tensor that is sparse"),
        ({"a": torch.ones(2, device="meta")}, "a is a tensor that is sparse, quantised or without data"),
        ({"a": {(1, 2): 3}}, r"a has the key \(1, 2\)"),
        ({"a": {True: 3}}, "a has the key True"),
        (HOLDS_ITSELF, "nested more than 100 deep, or holds itself"),
        (object(), "the whole is a builtins.object"),
    ],
)
def test_what_cannot_be_saved_is_named_by_its_place(tree: Any, named: str, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=named):
        write_state(tmp_path / "state", tree)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(TypeError, match=named):
        check_state(tree, "state")


@pytest.mark.parametrize("name", ["state.json", "state.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "pickle"])
def test_a_damaged_file_is_refused(name: str, damage: str, tmp_path: Path) -> None:
    write_state(tmp_path / "state", {"x": torch.arange(100.0), "text": "some text that is long enough"})
    path = tmp_path / name
    content = path.read_bytes()
    match damage:
        case "missing":
            path.unlink()
        case "empty":
            path.write_bytes(b"")
        case "truncated":
            path.write_bytes(content[: len(content) // 2])
        case "pickle":
            path.write_bytes(pickle.dumps({"x": 1}))
    with pytest.raises(CheckpointError, match="state"):
        read_state(tmp_path / "state")


@pytest.mark.parametrize(
    "tree",
    [
        {"$array": "x", "dtype": "O", "shape": [1]},
        {"$array": "x", "dtype": "V8", "shape": [1]},
        {"$scalar": "00" * 8, "dtype": "O"},
        {"$dtype": "load"},
        {"$tensor": "not there"},
        {"$tensor": "x", "dtype": "complex128", "shape": [10**9, 10**9]},
        {"$run": "print"},
        {"$int": "print()"},
        {"$dict": 7},
    ],
)
def test_a_crafted_file_is_refused(tree: Any, tmp_path: Path) -> None:
    write_state(tmp_path / "state", {"x": torch.zeros(16, dtype=torch.uint8)})
    (tmp_path / "state.json").write_text(json.dumps({"format": 1, "tensors": 1, "tree": tree}), encoding="utf-8")
    with pytest.raises(CheckpointError, match="damaged"):
        read_state(tmp_path / "state")


def test_deep_nesting_in_a_file_is_refused(tmp_path: Path) -> None:
    deep = '{"format": 1, "tensors": 0, "tree": ' + "[" * 100_000 + "]" * 100_000 + "}"
    (tmp_path / "state.json").write_text(deep, encoding="utf-8")
    with pytest.raises(CheckpointError, match="damaged"):
        read_state(tmp_path / "state")


def test_a_later_format_asks_for_an_update(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text('{"format": 99, "tensors": 0, "tree": 1}', encoding="utf-8")
    with pytest.raises(CheckpointError, match="format 99; this peft_plus reads 1: update it"):
        read_state(tmp_path / "state")


# --- optimizers, schedulers, scalers ---

OPTIMIZERS: dict[str, Any] = {
    "sgd_momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "adamw_tensor_lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.1)),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.5),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.1),
    "lbfgs": lambda p: torch.optim.LBFGS([t for group in p for t in group["params"]], lr=0.1),
    "adafactor": lambda p: Adafactor(p, lr=0.1, relative_step=False, scale_parameter=False),
    "adafactor_relative": lambda p: Adafactor(p, lr=None),
    "torch_adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
    "adamw_8bit": lambda p: bnb.optim.AdamW8bit(p, lr=0.1, min_8bit_size=16),
    "paged_adamw_8bit": lambda p: bnb.optim.PagedAdamW8bit(p, lr=0.1, min_8bit_size=16),
    "lion_8bit": lambda p: bnb.optim.Lion8bit(p, lr=0.1, min_8bit_size=16),
}


def step(optimizer: Any, parameters: list[nn.Parameter], seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=draw).to(parameter.dtype)
    if isinstance(optimizer, torch.optim.LBFGS):
        optimizer.step(lambda: sum((p.float() ** 2).sum() for p in parameters))
    else:
        optimizer.step()


def fresh(name: str) -> tuple[list[nn.Parameter], Any]:
    draw = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(64, 32, generator=draw)), nn.Parameter(torch.randn(32, generator=draw))]
    groups = [{"params": parameters[:1], "weight_decay": 0.1}, {"params": parameters[1:]}]
    return parameters, OPTIMIZERS[name](groups)


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")  # bitsandbytes' own
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_goes_on_bit_by_bit(name: str, tmp_path: Path) -> None:
    parameters, optimizer = fresh(name)
    for seed in range(3):
        step(optimizer, parameters, seed)
    state = optimizer.state_dict()
    assert same(there_and_back(tmp_path, state), state)
    again, restored = fresh(name)
    with torch.no_grad():
        for new, old in zip(again, parameters, strict=True):
            new.copy_(old)
    restored.load_state_dict(read_state(tmp_path / "state"))
    for seed in range(3, 6):
        step(optimizer, parameters, seed)
        step(restored, again, seed)
    assert all(torch.equal(a, b) for a, b in zip(parameters, again, strict=True))


class Warmup:
    """A rate given by an object, whose attributes are the scheduler's state."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def __call__(self, step: int) -> float:
        return min(1.0, (step + 1) / self.steps)


SCHEDULERS: dict[str, Any] = {
    "lambda": lambda o: lrs.LambdaLR(o, lambda step: 0.9**step),
    "lambda_object": lambda o: lrs.LambdaLR(o, Warmup(4)),
    "multiplicative": lambda o: lrs.MultiplicativeLR(o, lambda step: 0.9),
    "step": lambda o: lrs.StepLR(o, 2),
    "multi_step": lambda o: lrs.MultiStepLR(o, [2, 4]),
    "exponential": lambda o: lrs.ExponentialLR(o, 0.9),
    "cosine": lambda o: lrs.CosineAnnealingLR(o, 10),
    "restarts": lambda o: lrs.CosineAnnealingWarmRestarts(o, 3),
    "one_cycle": lambda o: lrs.OneCycleLR(o, 1.0, total_steps=20),
    "cyclic": lambda o: lrs.CyclicLR(o, 0.01, 0.1, step_size_up=3, mode="exp_range", gamma=0.9),
    "cyclic_function": lambda o: lrs.CyclicLR(o, 0.01, 0.1, step_size_up=3, scale_fn=lambda x: 1 / x),
    "sequential": lambda o: lrs.SequentialLR(o, [lrs.ConstantLR(o, 0.1), lrs.ExponentialLR(o, 0.9)], [2]),
    "chained": lambda o: lrs.ChainedScheduler([lrs.ConstantLR(o, 0.1), lrs.ExponentialLR(o, 0.9)]),
    "plateau": lambda o: lrs.ReduceLROnPlateau(o, patience=0),
    **{
        f"transformers_{name}": lambda o, name=name: get_scheduler(name, o, num_warmup_steps=2, num_training_steps=20)
        for name in ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant_with_warmup", "inverse_sqrt")
    },
    "transformers_wsd": lambda o: get_scheduler(
        "warmup_stable_decay",
        o,
        num_warmup_steps=2,
        num_training_steps=20,
        scheduler_specific_kwargs={"num_decay_steps": 4},
    ),
    "transformers_plateau": lambda o: get_scheduler("reduce_lr_on_plateau", o),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_goes_on(name: str, tmp_path: Path) -> None:
    def fresh() -> tuple[Any, Any]:
        optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1, momentum=0.9)
        return optimizer, SCHEDULERS[name](optimizer)

    def rates(optimizer: Any, scheduler: Any, count: int) -> list[float]:
        given = []
        for i in range(count):
            optimizer.step()
            scheduler.step(*([1.0 + i] if isinstance(scheduler, lrs.ReduceLROnPlateau) else []))
            given.append(float(optimizer.param_groups[0]["lr"]))
        return given

    optimizer, scheduler = fresh()
    rates(optimizer, scheduler, 3)
    state = {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
    back = there_and_back(tmp_path, state)
    assert same(back, state)
    optimizer_2, scheduler_2 = fresh()
    optimizer_2.load_state_dict(back["optimizer"])
    scheduler_2.load_state_dict(back["scheduler"])
    assert rates(optimizer, scheduler, 8) == rates(optimizer_2, scheduler_2, 8)


def test_a_scheduler_that_holds_a_function_is_named(tmp_path: Path) -> None:
    class Mine(lrs.LRScheduler):
        def __init__(self, optimizer: Any) -> None:
            self.shape = lambda step: 0.5
            super().__init__(optimizer)

        def get_lr(self) -> list[float]:
            return [group["lr"] * self.shape(self.last_epoch) for group in self.optimizer.param_groups]

    scheduler = Mine(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1))
    with pytest.raises(TypeError, match=r"scheduler: shape is a builtins\.function, which cannot be saved without"):
        write_state(tmp_path / "scheduler", scheduler.state_dict())


def test_a_gradient_scaler_goes_on(tmp_path: Path) -> None:
    weight = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
    for _ in range(3):
        scaler.scale((weight * 2).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    state = scaler.state_dict()
    assert same(there_and_back(tmp_path, state), state)
    other = torch.amp.GradScaler("cpu")
    other.load_state_dict(read_state(tmp_path / "state"))
    assert other.get_scale() == scaler.get_scale() == 16.0
