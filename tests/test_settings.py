"""Settings by name: which exist, which types they take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Optional, Union

import pytest
from peft import LoraConfig

from peft_plus import MethodError
from peft_plus.settings import check_plain, check_types, make

if TYPE_CHECKING:
    from decimal import Decimal


@dataclass(kw_only=True)
class Base:
    kind: ClassVar[str] = "base"

    share: float = 0.5


@dataclass(kw_only=True)
class Thing(Base):
    count: int
    flag: bool = False
    word: str = "a"
    maybe: int | None = None
    older: Optional[str] = None  # noqa: UP045 - PEFT writes it so
    oldest: Union[int, str] = 1  # noqa: UP007
    mode: Literal["one", "two"] = "one"
    every: Literal["epoch"] | int = "epoch"
    names: Sequence[str] = ()
    anything: Any = None
    unresolved: Decimal | None = None
    state: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ValueError(f"count={self.count}: give a number ≥ 0.")


GOOD: list[tuple[str, Any]] = [
    ("count", 0),
    ("share", 1),
    ("share", 0.1),
    ("flag", True),
    ("maybe", None),
    ("maybe", 3),
    ("older", "x"),
    ("oldest", "x"),
    ("mode", "two"),
    ("every", "epoch"),
    ("every", 3),
    ("names", ["a"]),
    ("anything", object()),
    ("unresolved", "unchecked"),
]
BAD: list[tuple[str, Any, str]] = [
    ("count", "1", "count='1' is str; expected int"),
    ("count", 1.0, "count=1.0 is float; expected int"),
    ("count", True, "count=True is bool; expected int"),
    ("count", None, "count=None is NoneType; expected int"),
    ("share", "0.5", "share='0.5' is str; expected float"),
    ("share", False, "share=False is bool; expected float"),
    ("flag", 1, "flag=1 is int; expected bool"),
    ("flag", "no", "flag='no' is str; expected bool"),
    ("word", 3, "word=3 is int; expected str"),
    ("maybe", 1.5, "expected int or None"),
    ("older", 1, "expected str or None"),
    ("oldest", 1.5, "expected int or str"),
    ("mode", "three", "mode='three' is str; expected 'one' or 'two'"),
    ("mode", 1, "expected 'one' or 'two'"),
    ("every", "epok", "expected 'epoch' or int"),
    ("every", True, "expected 'epoch' or int"),
]


@pytest.mark.parametrize(("name", "value"), GOOD)
def test_what_fits(name: str, value: Any) -> None:
    made = make(Thing, {"count": 1, name: value}, "thing")
    assert getattr(made, name) is value
    check_types(Thing, {name: value}, "thing")


@pytest.mark.parametrize(("name", "value", "says"), BAD)
def test_what_does_not(name: str, value: Any, says: str) -> None:
    with pytest.raises(MethodError) as refused:
        make(Thing, {"count": 1, name: value}, "thing 'x'")
    assert str(refused.value).startswith("thing 'x': ")
    assert says in str(refused.value)


def test_unknown() -> None:
    with pytest.raises(MethodError, match=r"thing has no setting 'cuont'\. Did you mean 'count'\? Its settings: any"):
        make(Thing, {"cuont": 1}, "thing")
    for name in ("state", "kind"):
        with pytest.raises(MethodError, match=f"no setting {name!r}"):
            make(Thing, {"count": 1, name: 1}, "thing")


def test_missing() -> None:
    with pytest.raises(MethodError, match="thing needs the setting 'count', which has no default"):
        make(Thing, {}, "thing")


def test_refused_by_the_class() -> None:
    with pytest.raises(MethodError, match=r"thing: count=-1: give a number ≥ 0\.") as refused:
        make(Thing, {"count": -1}, "thing")
    assert isinstance(refused.value.__cause__, ValueError)


def test_a_class_without_settings() -> None:
    @dataclass(kw_only=True)
    class Empty:
        pass

    with pytest.raises(MethodError, match="Its settings: none"):
        make(Empty, {"x": 1}, "thing")


def test_peft_s_configs() -> None:
    assert make(LoraConfig, {"r": 4, "target_modules": ["q"], "init_lora_weights": "gaussian"}, "tuner").r == 4
    assert make(LoraConfig, {"init_lora_weights": False, "bias": "all"}, "tuner").bias == "all"
    with pytest.raises(MethodError, match="lora_dropout='a' is str; expected float"):
        make(LoraConfig, {"lora_dropout": "a"}, "tuner")


def test_plain_values() -> None:
    check_plain({"a": 1, "b": [1.5, None, {"c": "d"}], "e": (1, 2)}, "thing")
    with pytest.raises(MethodError, match=r"thing: b=\{1\} cannot be saved with the model; settings are plain values"):
        check_plain({"a": 1, "b": {1}}, "thing")
