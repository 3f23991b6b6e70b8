"""The name of a row depends on all of its content, and on nothing else of its batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from peft_plus.trunk.rows import Rows, UnknownRows, rows_of
from tests.models import NUM_CHOICES, PAD, batch

from .architectures import padded_left


def names(given: Mapping[str, Any], **settings: Any) -> list[bytes]:
    return list(rows_of(given, **{"by_place": True, **settings}).keys)


def padded(given: Mapping[str, Tensor], left: int, right: int) -> dict[str, Tensor]:
    """More padding on both sides."""
    return {
        name: torch.nn.functional.pad(value, (left, right), value=PAD) if value.dim() == 2 else value
        for name, value in given.items()
    }


TEXT = batch("bert", rows=5)
FULL = {**TEXT, "token_type_ids": torch.randint(0, 2, (5, 8)), "position_ids": torch.arange(8).repeat(5, 1)}


# ---- what does not matter ------------------------------------------------------------------------------------------


def test_padding_on_the_right_changes_no_name() -> None:
    wanted = rows_of(TEXT, by_place=True)
    assert wanted.spans == [(0, 8), (0, 7), (0, 6), (0, 8), (0, 7)]
    for extra in (1, 9):
        assert names(padded(TEXT, 0, extra)) == wanted.keys
    shorter = {name: value[1:2, :7] if value.dim() == 2 else value[1:2] for name, value in TEXT.items()}
    assert names(shorter) == [wanted.keys[1]]


def test_what_stands_in_the_padding_changes_no_name() -> None:
    other = {**TEXT, "input_ids": TEXT["input_ids"].masked_fill(TEXT["attention_mask"] == 0, 55)}
    assert names(other) == names(TEXT)


@pytest.mark.parametrize("given", [TEXT, FULL, batch("vit", rows=5), batch("bert", "MULTIPLE_CHOICE", rows=5)])
def test_order_and_batch_mates_change_no_name(given: Mapping[str, Tensor]) -> None:
    wanted = names(given)
    texts = len(wanted) // 5
    assert len(set(wanted)) == len(wanted)
    order = torch.tensor([3, 0, 4])
    chosen = [wanted[row * texts + text] for row in order.tolist() for text in range(texts)]
    assert names({name: value[order] for name, value in given.items()}) == chosen
    for row in range(5):
        alone = names({name: value[row : row + 1] for name, value in given.items()})
        assert alone == wanted[row * texts : (row + 1) * texts]


def test_labels_and_what_only_the_head_is_told_change_no_name() -> None:
    wanted = names(TEXT)
    for name in ("labels", "start_positions", "end_positions", "shift_labels"):
        assert names({**TEXT, name: torch.randint(0, 9, (5,))}) == wanted
    head = {"num_items_in_batch": torch.tensor(7), "return_dict": True, "use_cache": False, "fused_lm_head": True}
    assert names({**TEXT, **head, "past_key_values": None}) == wanted


def test_only_the_encoder_counts_where_the_trunk_is_an_encoders() -> None:
    given = {**TEXT, "decoder_input_ids": torch.randint(4, 90, (5, 3)), "decoder_attention_mask": torch.ones(5, 3)}
    assert names(given, encoder_only=True) == names(TEXT)
    assert names(given) != names(TEXT)


# ---- what matters --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["input_ids", "token_type_ids", "position_ids"])
def test_every_real_token_counts(name: str) -> None:
    wanted = names(FULL)
    for row in range(5):
        for token in range(8):
            other = FULL[name].clone()
            other[row, token] += 1
            real = bool(FULL["attention_mask"][row, token])
            got = names({**FULL, name: other})
            assert [a == b for a, b in zip(got, wanted, strict=True)] == [r != row or not real for r in range(5)]


def test_every_pixel_counts_and_so_does_the_number_of_channels() -> None:
    given = batch("vit", rows=2)
    other = given["pixel_values"].clone()
    other[1, 2, 31, 31] += 1e-6
    before, after = names(given), names({"pixel_values": other})
    assert before[0] == after[0]
    assert before[1] != after[1]


def test_pixels_beside_a_text_are_not_cut_at_its_last_token() -> None:
    """An image has three channels, and a text of three tokens, the last of them padding, is as wide."""
    given = {
        "input_ids": torch.tensor([[5, 6, PAD]]),
        "attention_mask": torch.tensor([[1, 1, 0]]),
        "pixel_values": torch.zeros(1, 3, 4, 4),
    }
    for dtype in (torch.float32, torch.bfloat16):
        given["pixel_values"] = torch.zeros(1, 3, 4, 4, dtype=dtype)
        other = given["pixel_values"].clone()
        other[0, 2] = 1
        assert names({**given, "pixel_values": other}) != names(given)


def test_a_hole_in_the_mask_and_another_mask_count() -> None:
    mask = TEXT["attention_mask"].clone()
    mask[0, 3] = 0
    got = rows_of({**TEXT, "attention_mask": mask}, by_place=True)
    assert got.spans is not None
    assert got.spans[0] == (0, 8)
    assert got.keys[0] != names(TEXT)[0]
    assert list(got.keys[1:]) == names(TEXT)[1:]


def test_settings_of_the_pass_and_the_dtype_of_an_input_count() -> None:
    image = batch("vit", rows=2)
    others = [
        {**image, "interpolate_pos_encoding": True},
        {**image, "interpolate_pos_encoding": False},
        {"pixel_values": image["pixel_values"].half()},
        {"pixel_values": image["pixel_values"].bfloat16()},
    ]
    found = [tuple(names(given)) for given in (image, *others)]
    assert len(set(found)) == len(found)


def test_embeddings_given_by_hand_count_instead_of_ids() -> None:
    given = {"inputs_embeds": torch.randn(3, 8, 4), "attention_mask": TEXT["attention_mask"][:3]}
    other = given["inputs_embeds"].clone()
    other[1, 7] += 1  # padding
    other[2, 5] += 1
    got, wanted = names({**given, "inputs_embeds": other}), names(given)
    assert [a == b for a, b in zip(got, wanted, strict=True)] == [True, True, False]


def test_without_a_mask_padding_is_content() -> None:
    given = {"input_ids": TEXT["input_ids"]}
    got = rows_of(given, by_place=True)
    assert got.spans is None
    assert names(padded(given, 0, 1)) != list(got.keys)


def test_a_mask_of_who_sees_whom_is_part_of_the_row_and_nothing_is_cut() -> None:
    seen = torch.ones(5, 1, 8, 8)
    given = {"input_ids": TEXT["input_ids"], "attention_mask": seen}
    got = rows_of(given, by_place=True)
    assert got.spans is None
    other = seen.clone()
    other[4, 0, 7, 0] = 0
    after = names({**given, "attention_mask": other})
    assert [a == b for a, b in zip(after, got.keys, strict=True)] == [True] * 4 + [False]


def test_a_row_without_a_real_token_is_told_by_all_that_it_holds() -> None:
    """Its features are whatever the model makes of it; cut to nothing it would be one row with all like it."""
    mask = torch.zeros(2, 4, dtype=torch.long)
    given = {"input_ids": torch.tensor([[1, 2, 3, 4], [1, 2, 3, 5]]), "attention_mask": mask}
    got = rows_of(given, by_place=True)
    assert got.spans == [(0, 4), (0, 4)]
    assert got.keys[0] != got.keys[1]


# ---- padding on the left -------------------------------------------------------------------------------------------


def test_padding_on_the_left_counts_only_where_it_moves_positions() -> None:
    left = padded_left(TEXT)
    assert rows_of(left, by_place=True).spans == [(0, 8), (1, 8), (2, 8), (0, 8), (1, 8)]
    assert names(left, by_place=False) == names(TEXT, by_place=False)
    moved = names(left, by_place=True)
    assert [a == b for a, b in zip(moved, names(TEXT), strict=True)] == [True, False, False, True, False]
    further = padded(left, 3, 0)
    assert names(further, by_place=False) == names(TEXT)
    assert not set(names(further, by_place=True)) & set(moved)


def test_positions_that_are_given_tell_more_than_the_place() -> None:
    given = {**padded_left(TEXT), "position_ids": torch.arange(8).repeat(5, 1) + 3}
    assert names(given, by_place=True) == names(given, by_place=False)
    further = padded(given, 2, 0)
    assert names(further, by_place=True) == names(given)


# ---- what has no rows ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"images": [1, 2]}, "'images', a list, which has no rows"),
        ({"weights": torch.ones(5, requires_grad=True)}, "'weights' carries a gradient"),
    ],
)
def test_what_cannot_be_told_apart_is_refused(more: dict[str, Any], says: str) -> None:
    with pytest.raises(UnknownRows, match=says):
        rows_of({**TEXT, **more}, by_place=True)


def test_what_is_for_all_rows_together_is_part_of_each() -> None:
    """Where the texts of a packed row begin, e.g."""
    given = {"input_ids": TEXT["input_ids"], "cu_seq_lens_q": torch.tensor([0, 3, 8])}
    got, moved = names(given), names({**given, "cu_seq_lens_q": torch.tensor([0, 4, 8])})
    assert len(set(got)) == 5
    assert not set(got) & set(moved)
    packed = {"input_ids": torch.arange(5, 20)[None], "cu_seq_lens_q": torch.tensor([0, 3, 8])}
    assert len(names(packed)) == 1


def test_what_is_the_same_for_all_rows_may_be_given_once() -> None:
    given = {"input_ids": TEXT["input_ids"], "position_ids": torch.arange(8)[None]}
    got = rows_of(given, by_place=True)
    assert len(set(got.keys)) == 5
    assert names({**given, "position_ids": torch.arange(8)[None] + 1}) != list(got.keys)
    once = {"input_ids": TEXT["input_ids"], "attention_mask": TEXT["attention_mask"][1:2]}
    assert rows_of(once, by_place=True).spans == [(0, 7)] * 5


def test_several_texts_of_an_example_are_rows_of_their_own() -> None:
    given = batch("bert", "MULTIPLE_CHOICE", rows=3)
    got: Rows = rows_of(given, by_place=True)
    flat = {name: value.flatten(0, 1) for name, value in given.items() if name != "labels"}
    assert len(got.keys) == 3 * NUM_CHOICES
    assert (got.keys, got.spans) == (rows_of(flat, by_place=True).keys, rows_of(flat, by_place=True).spans)
