"""A second pass of the model, perturbed where a plugin asks, or with other weights."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from .distributed import is_split
from .layers import transformers_model

if TYPE_CHECKING:
    from .trunk import TrunkService

_LABELS = ("labels", "start_positions", "end_positions", "shift_labels")
_FUSED = ("fused_lm_head", "num_items_in_batch")
"""What TRL tells a model so that it computes the loss in its head, without logits."""


PLACES = ("embeddings", "trunk")
"""Where a pass can be perturbed."""


class NoiseError(ValueError):
    """Noise cannot be added as a plugin asks, or would be lost."""


def second_pass(
    model: nn.Module,
    batch: Mapping[str, Any],
    perturb: Mapping[str, Tensor | Callable[[Tensor], Tensor]],
    trunk: TrunkService | None = None,
    weights: Mapping[str, Tensor] | None = None,
    *,
    labels: bool = False,
) -> Any:
    """Run `model` over `batch` again, adding noise inside or with other weights. See `Run.forward`.

    Args:
        trunk: keeps the output of the frozen lower blocks, where the run has any. With `weights` it must be that of
            the same batch.
        labels: whether they stay in the batch.
    """
    unknown = sorted(set(perturb) - set(PLACES))
    if unknown:
        raise ValueError(f"There is no place called {unknown[0]!r} to perturb; known: {', '.join(map(repr, PLACES))}.")
    if len(perturb) > 1:
        raise ValueError("Noise in the embeddings changes the trunk's output: perturb one place in a pass.")
    if perturb and weights is not None:
        raise ValueError("A pass is perturbed or has other weights, not both.")
    kwargs = dict(batch) if labels else _without_labels(model, batch)
    if isinstance(model, FSDPModule):
        model.unshard()  # a backward pass since the first pass, e.g. for noise, has split the outermost module again
    if weights is not None:
        return _pass_with(model, kwargs, weights, trunk)
    # `forward`, not `__call__`: Accelerate's autocast wraps `forward`, and hooks of the first pass must not run twice.
    if "trunk" in perturb:
        if trunk is None:
            raise ValueError("There is no trunk to perturb outside of a training step.")
        trunk.check_stays()
        with trunk.changed(Noise(perturb["trunk"], "the trunk's output").add):
            return model.forward(**kwargs)
    if not perturb:
        return model.forward(**kwargs)
    with perturbed(model, perturb, trunk):
        return model.forward(**kwargs)


@contextmanager
def perturbed(
    model: nn.Module,
    perturb: Mapping[str, Tensor | Callable[[Tensor], Tensor]],
    trunk: TrunkService | None = None,
) -> Generator[Noise | None]:
    """While this is open, the input embeddings' output is noised, in any pass of the model.

    Args:
        perturb: `{"embeddings": δ}`, or nothing.
        trunk: steps aside meanwhile.
    Raises:
        ValueError: another place; or no pass came by the embeddings.
    """
    if not perturb:
        yield None
        return
    if set(perturb) != {"embeddings"}:
        raise NoiseError(
            f"A pass in the place of the plain one is perturbed in the embeddings, not in {list(perturb)}."
        )
    noise = Noise(perturb["embeddings"], "the embeddings")
    with ExitStack() as stack:
        if trunk is not None:
            stack.enter_context(trunk.lifted())  # a stored output knows nothing of the noise
        for module in _embeddings(model):
            stack.callback(module.register_forward_hook(noise).remove)
        yield noise
    if not noise.used:
        raise NoiseError(
            "The input embeddings never ran in this pass, so there was nothing to perturb: the batch gives "
            "`inputs_embeds` itself. Give `input_ids`."
        )


def _pass_with(
    model: nn.Module, kwargs: Mapping[str, Any], weights: Mapping[str, Tensor], trunk: TrunkService | None
) -> Any:
    """A pass with other weights, without gradient."""
    forward = forward_with(model, weights)
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if trunk is not None and trunk.also_of(weights):
            stack.enter_context(trunk.changed(lambda output: output))
        return forward(**kwargs)


def forward_with(model: nn.Module, weights: Mapping[str, Tensor]) -> Callable[..., Any]:
    """The model's `forward` with other weights in it, past the hooks of its own passes.

    Args:
        weights: name of a parameter → what to compute with instead.
    Raises:
        ValueError: the model has no such parameter, or is split over processes.
    """
    own = dict(model.named_parameters())
    unknown = [name for name in weights if name not in own]
    if unknown:
        raise ValueError(f"The model has no parameter called {unknown[0]!r}, to compute with another value of it.")
    if is_split(model):
        raise ValueError(
            "A pass with other weights needs a model that is whole on each process, and FSDP or DeepSpeed ZeRO-3 split "
            "this one. Use DDP."
        )
    others = {f"model.{name}": other.to(own[name].device, own[name].dtype) for name, other in weights.items()}
    module = _Forward(model)
    return lambda **kwargs: torch.func.functional_call(module, others, (), kwargs)


class _Forward(nn.Module):
    """A model's `forward` as a module, so that `functional_call` runs that and not the model's hooks."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **kwargs: Any) -> Any:
        return self.model.forward(**kwargs)


class FirstPass:
    """The pass behind a micro-batch's loss, watched from outside: a Trainer class does not say what its model put out.

    Args:
        model: as built, not wrapped.
    Attributes:
        batch: the micro-batch, with the labels.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.begin({})

    def begin(self, batch: Any) -> None:
        """A micro-batch begins."""
        self.batch = dict(batch) if isinstance(batch, Mapping) else batch  # some Trainers take the labels out
        self._output: Any = None
        self._inputs: Mapping[str, Any] | None = None

    def keep(self, output: Any) -> None:
        """The pass gave `output`."""
        self._output = output

    def look(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """A forward hook, `with_kwargs`: keep what has logits, or else what the model was given.

        Passes without gradient, for a reference or for metrics, are not the one.
        """
        if not torch.is_grad_enabled() or self._output is not None:
            return
        if getattr(output, "logits", None) is not None:
            self._output = output
        elif self._inputs is None and not args:
            self._inputs = {name: value for name, value in kwargs.items() if name not in _FUSED}

    @property
    def output(self) -> Any:
        """What the model put out; where its fused head gave no logits, a pass of its own, made when it is asked for."""
        if self._output is not None:
            return self._output
        inputs = self.batch if self._inputs is None else self._inputs
        return DeferredOutput(lambda: second_pass(self._model, inputs, {}))


class DeferredOutput:
    """Stands for a model's output, and makes the pass only when something of it is asked for.

    Args:
        make: runs the pass.
    """

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make, self._made = make, None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copying and pickling ask; they must not start a pass
            raise AttributeError(name)
        return getattr(self._output(), name)

    def __getitem__(self, key: Any) -> Any:
        return self._output()[key]

    def _output(self) -> Any:
        if self._made is None:
            self._made = self._make()
        return self._made


class Noise:
    """Adds δ to a module's output, in fp32; a forward hook.

    Attributes:
        delta: what was added last; None before.
    """

    delta: Tensor | None = None

    def __init__(self, delta: Tensor | Callable[[Tensor], Tensor], place: str) -> None:
        self._delta, self._place = delta, place
        self.used = False

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        self.used = True
        return self.add(output)

    def add(self, output: Tensor) -> Tensor:
        """`output` + δ."""
        self.delta = delta = self._delta if isinstance(self._delta, Tensor) else self._delta(output)
        if delta.shape != output.shape:
            raise NoiseError(f"δ has shape {tuple(delta.shape)}, {self._place} {tuple(output.shape)}.")
        noised = (output.float() + delta.float()).to(output.dtype)
        if output.dtype in (torch.bfloat16, torch.float16) and _mostly_lost(noised == output, delta != 0):
            size = float(delta.detach().abs().max())
            raise NoiseError(
                f"Noise of size {size:.1e} vanishes in {self._place} in {output.dtype}. Load "
                "the model in fp32 and train with bf16=True (autocast), or use larger noise."
            )
        return noised


def _mostly_lost(unchanged: Tensor, noisy: Tensor) -> bool:
    """Whether more than half of the noise vanished; next to 0, e.g. at padding, some of it always survives."""
    return bool((unchanged & noisy).sum() * 2 > noisy.sum())


def _embeddings(model: nn.Module) -> list[nn.Module]:
    """The input embeddings: in an encoder-decoder the encoder's own, and the shared ones, which PEFT's prompts use."""
    base: Any = transformers_model(model)
    holders = [base]
    if getattr(getattr(base, "config", None), "is_encoder_decoder", False):
        holders.append(base.get_encoder())
    modules = [_own_embeddings(holder) for holder in holders]
    found = list(dict.fromkeys(module for module in modules if isinstance(module, nn.Module)))
    if not found:
        raise NoiseError(f"{type(base).__name__} has no input embeddings to perturb.")
    return found


def _own_embeddings(model: Any) -> Any:
    try:
        return model.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # no transformers model, or one without tokens and patches
        return None


def _without_labels(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Drop the labels: the second pass needs no loss. An encoder-decoder makes its decoder's input from them."""
    config = getattr(transformers_model(model), "config", None)
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" not in batch:
        return dict(batch)
    return {name: value for name, value in batch.items() if name not in _LABELS}
