"""The proof of engagement: a checksum that no change escapes in practice, and verdicts on hand-made tables."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

from peft_plus import EngagementError, proof
from peft_plus.proof import Engagement, Row, check, checksum, table

BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.uint8: torch.uint8}


def sample(dtype: torch.dtype, *shape: int) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    if dtype is torch.uint8:
        return torch.randint(0, 256, shape, generator=draw, dtype=torch.uint8)
    return torch.randn(*shape, generator=draw).to(dtype)


# ---- checksum ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", BITS)
def test_every_single_bit_counts(dtype):
    tensor = sample(dtype, 5, 7)
    before = checksum(tensor)
    bits = tensor.view(-1).view(BITS[dtype])
    width = 8 * tensor.element_size()
    for element in (0, 17, 34):
        for bit in range(width):
            mask = 1 << bit
            flip = torch.tensor(mask - (1 << width) if bit == width - 1 and width > 8 else mask, dtype=BITS[dtype])
            bits[element] ^= flip
            assert checksum(tensor) != before, (element, bit)
            bits[element] ^= flip
    assert checksum(tensor) == before


@pytest.mark.parametrize("dtype", BITS)
def test_equal_bits_give_equal_sums_whatever_the_layout(dtype):
    tensor = sample(dtype, 6, 8)
    assert checksum(tensor) == checksum(tensor.clone())
    assert checksum(tensor.t()) == checksum(tensor.t().contiguous())
    assert checksum(tensor[:, ::2]) == checksum(tensor[:, ::2].clone())


@pytest.mark.parametrize("dtype", BITS)
def test_an_exchange_of_two_values_counts(dtype):
    """Nothing is lost or gained, so no sum over values alone can see it."""
    tensor = sample(dtype, 40)
    before = checksum(tensor)
    for i, j in ((0, 1), (3, 30), (38, 39)):
        if tensor[i] != tensor[j]:
            swapped = tensor.clone()
            swapped[i], swapped[j] = tensor[j], tensor[i]
            assert checksum(swapped) != before
    assert checksum(tensor.flip(0)) != before
    assert checksum(tensor.roll(1)) != before


def test_changes_that_cancel_in_the_sum_count():
    bits = torch.arange(100, dtype=torch.int32)
    before = checksum(bits.view(torch.float32))
    for i in range(0, 98, 7):
        other = bits.clone()
        other[i] += 5
        other[i + 1] -= 5
        assert checksum(other.view(torch.float32)) != before


def test_minus_zero_is_not_zero_and_nan_is_itself():
    assert checksum(torch.tensor([0.0])) != checksum(torch.tensor([-0.0]))
    assert checksum(torch.tensor([float("nan")])) == checksum(torch.tensor([float("nan")]))


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0)])
def test_odd_shapes(shape):
    assert checksum(torch.zeros(shape)) == checksum(torch.zeros(shape))


@pytest.mark.parametrize("dtype", BITS)
def test_chunks_do_not_change_the_sum(dtype, monkeypatch):
    tensor = sample(dtype, 1003)
    whole = checksum(tensor)
    monkeypatch.setattr(proof, "CHUNK", 64)
    assert checksum(tensor) == whole
    tensor.view(BITS[dtype])[1001] ^= 1
    assert checksum(tensor) != whole


def test_a_big_tensor_is_hashed_in_chunks():
    big = torch.zeros(2 * proof.CHUNK + 3)
    before = checksum(big)
    for place in (0, proof.CHUNK - 1, proof.CHUNK, 2 * proof.CHUNK + 2):
        big[place] = 1e-30
        assert checksum(big) != before
        big[place] = 0.0
    assert checksum(big) == before


def test_a_parameter_is_neither_changed_nor_tracked():
    parameter = nn.Parameter(torch.randn(3))
    checksum(parameter)
    assert parameter.grad_fn is None
    assert parameter.requires_grad


# ---- the watch ---------------------------------------------------------------------------------------------------


def watched() -> tuple[dict[str, nn.Parameter], Engagement]:
    tensors = {name: nn.Parameter(torch.ones(2)) for name in ("head.w", "head.b", "block.w", "base.w")}
    groups = {"head.w": (2, "head"), "head.b": (2, "head"), "block.w": (1, "adapter")}
    return tensors, Engagement(tensors, groups.get)


def move(tensor: nn.Parameter) -> None:
    with torch.no_grad():
        tensor[1] += 1e-6


def test_rows_tell_steps_and_movement():
    tensors, watch = watched()
    for names in (["head.w", "head.b"], ["head.w", "head.b", "block.w"]):
        watch.count(names)
    move(tensors["head.w"])
    move(tensors["block.w"])
    watch.count(["head.w"])
    rows, strays = watch.finish()
    assert rows == [Row((2, "head"), 3, 2, 1, reached=False), Row((1, "adapter"), 1, 1, 1, reached=False)]
    assert strays == []
    check(rows, strays, num_blocks=1)


def test_a_declared_group_that_never_moved_fails():
    tensors, watch = watched()
    watch.count(["head.w", "head.b", "block.w"])
    move(tensors["head.b"])
    with pytest.raises(EngagementError, match=r"^What trained is not what was declared\. block 1 adapter: declared"):
        check(*watch.finish(), num_blocks=1)


def test_what_was_never_declared_need_not_move_and_must_not():
    tensors, watch = watched()
    watch.count(["head.w"])
    move(tensors["head.w"])
    rows, strays = watch.finish()
    check(rows, strays, num_blocks=1)
    for stray in ("base.w", "block.w", "head.b"):
        tensors, watch = watched()
        watch.count(["head.w"])
        move(tensors["head.w"])
        move(tensors[stray])
        with pytest.raises(EngagementError, match=f"1 frozen tensors moved, e.g. '{re.escape(stray)}'"):
            check(*watch.finish(), num_blocks=1)


def test_what_moves_before_its_own_thaw_is_caught():
    tensors, watch = watched()
    watch.count(["head.w"])
    move(tensors["head.w"])
    move(tensors["block.w"])  # still frozen
    watch.count(["head.w", "block.w"])
    move(tensors["block.w"])
    with pytest.raises(EngagementError, match=r"1 frozen tensors moved, e\.g\. 'block\.w'"):
        check(*watch.finish(), num_blocks=1)


@pytest.mark.parametrize(
    ("group", "excused"), [((2, "base"), True), ((2, "adapter"), True), ((2, "head"), False), ((1, "base"), False)]
)
def test_only_what_lies_above_the_blocks_and_is_no_head_may_be_unused(group, excused, caplog):
    row = Row(group, steps=3, tensors=2, moved=0, reached=False)
    if excused:
        check([row], [], num_blocks=1)
        assert "No gradient ever reached top" in caplog.text
    else:
        with pytest.raises(EngagementError, match="declared trainable"):
            check([row], [], num_blocks=1)
    with pytest.raises(EngagementError, match="declared trainable"):  # it had gradients, and yet it did not move
        check([Row(group, steps=3, tensors=2, moved=0)], [], num_blocks=1)


def test_both_faults_are_told():
    tensors, watch = watched()
    watch.count(["block.w"])
    move(tensors["base.w"])
    with pytest.raises(EngagementError, match=r"block 1 adapter.*; 1 frozen tensors moved"):
        check(*watch.finish(), num_blocks=1)


def test_the_table_names_the_groups():
    text = table([Row((2, "head"), 12, 2, 2), Row((1, "adapter"), 3, 4, 1), Row((0, "base"), 0, 1, 0)], num_blocks=1)
    lines = [line.split() for line in text.splitlines()]
    assert lines == [
        ["updates", "moved"],
        ["head", "12", "2/2"],
        ["block", "1", "adapter", "3", "1/4"],
        ["embeddings", "0", "0/1"],
    ]
    assert len({len(line) for line in text.splitlines()[1:]}) == 1
