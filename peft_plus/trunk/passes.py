"""Passes that stop behind the trunk, and passes that skip it. Neither renames, replaces or copies a module.

- *stop*: a hook on block k takes its output and leaves the forward pass there;
- *skip*: for one pass, blocks 1..k−1 hand their input on and block k gives the stored output. The model itself still
  makes its masks and position embeddings, which a list of blocks cut off at k would have to imitate.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..forward import forward_with
from ..layers import Layers, transformers_model


class Trunk:
    """The lowest blocks of the stack that reads the input: an encoder-decoder's encoder, else the only stack.

    Args:
        model: a transformers model, or a PeftModel over one.
        layers: where its parameters lie.
        depth: k ≥ 1, the depth of the last block that belongs to the trunk.
    Attributes:
        inner: the transformers model.
        blocks: its blocks, from below.
        dtype: of its last output.
        autocast: in which dtype the last pass of `features` computed, or `off`.
    Raises:
        ValueError: no block of that stack lies at or below `depth`.
    """

    def __init__(self, model: nn.Module, layers: Layers, depth: int) -> None:
        self.depth, self.autocast = depth, "off"
        self.inner = transformers_model(model)
        self.blocks = trunk_blocks(model, layers, depth)
        if not self.blocks:
            raise ValueError(f"there is no block at depth 1 to {depth} that reads the input.")
        self._all_blocks = [model.get_submodule(name) for row in layers.blocks for name in row]
        self.dtype = torch.float32
        self._sides: tuple[Any, ...] | None = None  # what a block returns beside its hidden states
        self._tuples = False  # whether it returns a tuple
        self._modules: list[nn.Module] | None = None  # what runs in the trunk

    def features(self, forward: Callable[..., Any], kwargs: Mapping[str, Any]) -> Tensor:
        """The trunk's output, in eval mode and without a gradient; nothing above the trunk runs.

        Args:
            forward: of the model.
            kwargs: its arguments.
        Returns: shape (rows, tokens, width), in the dtype in which the trunk puts it out.
        """
        ran: set[nn.Module] = set()
        with ExitStack() as stack:
            stack.enter_context(eval_mode(self.inner))
            stack.enter_context(torch.no_grad())
            if self._modules is None:
                for module in self._beside():
                    hook = module.register_forward_pre_hook(lambda module, _: ran.add(module))
                    stack.callback(hook.remove)
            # Not out here: whoever wraps a forward in autocast does so around it.
            stack.callback(self.blocks[-1].register_forward_pre_hook(self._note_autocast).remove)
            output = output_of(self.blocks[-1], forward, kwargs)
        if self._modules is None:
            inside = [module for block in self.blocks for module in block.modules()]
            self._modules = [*(module for module in self._beside() if module in ran), *self._around(), *inside]
        return self.learn(output)

    def _note_autocast(self, module: nn.Module, args: Any) -> None:
        kind = next((parameter.device.type for parameter in module.parameters()), "cpu")
        self.autocast = str(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else "off"

    def learn(self, output: Any) -> Tensor:
        """Note what the last block returns beside its hidden states; returns these."""
        self._tuples = not isinstance(output, Tensor)
        hidden, *sides = output if self._tuples else (output,)
        self._sides, self.dtype = tuple(sides), hidden.dtype
        return hidden

    def _beside(self) -> Iterator[nn.Module]:
        """The modules that neither are in a block nor hold one."""
        inside = {module for block in self._all_blocks for module in block.modules()}
        for module in self.inner.modules():
            if module not in inside and inside.isdisjoint(module.modules()):
                yield module

    def _around(self) -> Iterator[nn.Module]:
        """The modules in the model that hold the trunk's blocks: some drop out what goes into them (BART)."""
        for module in self.inner.modules():
            if module is not self.inner and module not in self.blocks and self.blocks[-1] in module.modules():
                yield module

    def rest(self) -> None:
        """Put what runs in the trunk into eval mode: its dropout would make another output each time.

        A module that runs in front of the trunk and above it, as the dropout of T5's encoder does, rests in both.
        """
        for module in self._modules or ():
            module.training = False

    @contextmanager
    def skipping(self, features: Tensor) -> Generator[None]:
        """While this is open, a forward pass computes only what lies above the trunk.

        Args:
            features: what `features` gave for the same arguments.
        Raises:
            ValueError: the last block of the trunk did not run, and so nothing was put in.
        """
        assert self._sides is not None, "features() was never called"
        sides: list[Any] = [None] * len(self._sides)
        needs_first = any(side is not None for side in self._sides)
        used = False

        def replace(place: int, native: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                nonlocal used
                if place == 0 and needs_first:  # e.g. T5: the first block makes the position bias of all others
                    with torch.no_grad(), eval_mode(self.blocks[0]):  # so that it is not checkpointed either
                        sides[:] = native(*args, **kwargs)[1:]
                if place < len(self.blocks) - 1:
                    hidden = _input(args, kwargs)
                else:
                    hidden, used = features, True
                return (hidden, *sides) if self._tuples else hidden

            return forward

        with ExitStack() as stack:
            for place, block in enumerate(self.blocks):
                stack.enter_context(instead_of_forward(block, replace(place, block.forward)))
            yield
        if not used:
            raise ValueError(
                f"block {self.depth} never ran in a pass of {type(self.inner).__name__}, so the stored output was not "
                "put in. Where it leaves out blocks by chance, set layerdrop to 0 in its config."
            )


def _input(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """The hidden states that a block was given."""
    if args:
        return args[0]
    return kwargs["hidden_states"] if "hidden_states" in kwargs else next(iter(kwargs.values()))


def trunk_blocks(model: nn.Module, layers: Layers, depth: int) -> list[nn.Module]:
    """The blocks at depth 1..`depth` of the stack that reads the input, from below.

    In an encoder-decoder these are the encoder's: the decoder's lower blocks read the encoder's output, and so change
    as long as anything in it does.
    """
    inner: Any = transformers_model(model)
    found = [model.get_submodule(name) for row in layers.blocks[:depth] for name in row]
    if not getattr(getattr(inner, "config", None), "is_encoder_decoder", False):
        return found
    encoder = set(inner.get_encoder().modules())
    return [block for block in found if block in encoder]


def hidden(
    model: nn.Module,
    layers: Layers,
    batch: Mapping[str, Any],
    depth: int,
    weights: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """See `Run.hidden`."""
    blocks = trunk_blocks(model, layers, depth)
    if not 1 <= depth <= layers.num_blocks or not blocks:
        raise ValueError(f"depth={depth}: the model's blocks have depths 1 to {layers.num_blocks}.")

    # Not `model(…)`: its hooks belong to the training pass.
    forward = forward_with(model, weights) if weights else model.forward
    with torch.no_grad(), eval_mode(model):
        output = output_of(blocks[-1], forward, batch)
    return output if isinstance(output, Tensor) else output[0]


class _Reached(Exception):
    """Not an error: carries an output out of the forward pass."""

    def __init__(self, output: Any) -> None:
        self.output = output


def output_of(block: nn.Module, forward: Callable[..., Any], kwargs: Mapping[str, Any]) -> Any:
    """What `block` puts out in `forward(**kwargs)`, which ends there.

    Raises:
        ValueError: the pass never reached the block.
    """

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        raise _Reached(output)

    hook = block.register_forward_hook(leave)
    try:
        forward(**kwargs)
    except _Reached as reached:
        return reached.output
    finally:
        hook.remove()
    raise ValueError(f"a pass of the model ended without running {type(block).__name__}.")


@contextmanager
def eval_mode(model: nn.Module) -> Generator[None]:
    """Every module in eval mode for a while; then each in the mode in which it was."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def instead_of_forward(module: nn.Module, forward: Callable[..., Any]) -> Generator[None]:
    """`module` runs `forward` for a while; its class, name, hooks and parameters stay what they are."""
    own = vars(module).get("forward")  # e.g. Accelerate's, which moves weights between devices
    module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
