"""Token cutoff: the same answer with some of the words missing."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from peft_plus import LossTerm, Plugin, Run
from peft_plus.batch_rows import number_of_rows
from peft_plus.layers import transformers_model

from .divergences import mean_jensen_shannon

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class TokenCutoff(Plugin):
    """Learn from a second view of each example, in which the embeddings of some tokens are 0, and keep both alike.

    loss = task loss + weight · L(f(e')) + consistency · JS(f(e), f(e')), e' being e with ⌊share · n⌋ of the n real
    tokens of each text set to 0 (Shen et al. 2020, arXiv:2009.13818). JS is the Jensen–Shannon divergence of the two
    predictions, of each yes/no label where labels are such, and half the squared difference for regression. Gradients
    flow through both passes. Which tokens go is drawn for each text from a stream of its own (seed, step, example).

    Padding never goes, nor do special tokens where they are known: from the tokenizer that the task's `preprocess` was
    given, and from the model's config. The words' embeddings are cut; what a model adds to them, such as positions,
    stays. A text of fewer than 1 / share tokens loses none. The second pass is made for it all the same, for a batch of
    such texts too: one process's batch may have longer ones, and processes that share the weights must make equally
    many passes. The first batch in which nothing goes is told of by a warning.

    Costs one more forward and backward pass.

    Args:
        weight: α ≥ 0, of the second view's task loss, in units of the loss.
        consistency: β ≥ 0, likewise. With both at 0 the run is the plain one bit for bit.
        share: of the tokens, in [0, 1). At 0 too the run is the plain one bit for bit.
    Raises:
        ValueError: a setting is out of its range.
    """

    name: ClassVar[str] = "token_cutoff"
    source: ClassVar[str] = "Shen et al. 2020, arXiv:2009.13818"

    weight: float = 1.0
    consistency: float = 1.0
    share: float = 0.1

    def __post_init__(self) -> None:
        for name, symbol in (("weight", "α"), ("consistency", "β")):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: give {symbol} ≥ 0.")
        if not 0 <= self.share < 1:
            raise ValueError(f"share={self.share}: give a share of the tokens in [0, 1).")
        self._warned = False

    def loss_terms(self, run: Run, batch: Mapping[str, Any], output: Any) -> Mapping[str, LossTerm]:
        if self.share == 0 or (self.weight == 0 and self.consistency == 0):
            return {}
        view = run.forward(batch, perturb={"embeddings": partial(self._cut, run, batch)}, labels=True)
        terms: dict[str, LossTerm] = {}
        if self.weight > 0:
            own = run.task.loss(view, batch)
            terms["token_cutoff"] = LossTerm(self.weight * own.sum, own.count, per=own.per)
        if self.consistency > 0:
            count = run.task.count(batch)
            whole, cut = run.task.logits(output, batch), run.task.logits(view, batch)
            distance = mean_jensen_shannon(whole, cut, run.task.distribution)
            terms["token_cutoff_consistency"] = LossTerm(self.consistency * distance * count, count, per="label")
        return terms

    def _cut(self, run: Run, batch: Mapping[str, Any], embeddings: Tensor) -> Tensor:
        """δ = −e where a token goes, 0 elsewhere; its gradient takes that of e away there."""
        real = droppable(batch, embeddings, special_ids(run)).cpu()
        texts = len(real) // number_of_rows(batch)
        gone = torch.stack(
            [
                chosen(allowed, share=self.share, generator=_stream(run, i // texts, i % texts))
                for i, allowed in enumerate(real)
            ]
        )
        if not self._warned and not gone.any():
            self._warned = True
            logger.warning("token_cutoff: at step %d %s", run.step, too_short(int(real.sum(1).max()), share=self.share))
        return -embeddings * gone.to(embeddings.device)[..., None]


def too_short(longest: int, *, share: float) -> str:
    """What to say of a batch in which no token went.

    Args:
        longest: tokens that may go in the longest of its texts, < 1 / share.
        share: of the tokens, in (0, 1).
    """
    # As much as makes one token of the longest text, rounded up; all of a text may not go.
    fix = f"Give share ≥ {math.ceil(100 / longest) / 100}" if longest > 1 else "Leave it out for such texts"
    return (
        f"a batch lost no token: share={share} takes none of a text with fewer than {math.ceil(1 / share - 1e-9)} "
        f"tokens that may go, and its longest has {longest}. Its second pass costs as much and shows the model nothing "
        f"new but another draw of dropout. {fix}."
    )


def _stream(run: Run, row: int, text: int) -> torch.Generator:
    return run.generator("token_cutoff", run.example(row), text)


def special_ids(run: Run) -> set[int]:
    """Ids of the tokens that are no words, as far as the task's tokenizer and the model's config tell."""
    found: set[int] = set(getattr(run.task.tokenizer, "all_special_ids", None) or ())
    config = getattr(transformers_model(run.model), "config", None)
    for kind in ("pad", "bos", "eos", "cls", "sep", "mask", "decoder_start"):
        value = getattr(config, f"{kind}_token_id", None)
        found.update(value if isinstance(value, (list, tuple)) else () if value is None else (value,))
    return found


def droppable(batch: Mapping[str, Any], embeddings: Tensor, special: Collection[int]) -> Tensor:
    """Where a token may go: not at padding, not where a special token stands.

    Args:
        batch: `attention_mask` and `input_ids`, of (texts, tokens) numbers in whatever shape, tell; others do not.
        embeddings: (texts, tokens, width).
        special: ids.
    Returns: bool, (texts, tokens).
    """
    texts, tokens = embeddings.shape[:2]
    allowed = torch.ones(texts, tokens, dtype=torch.bool, device=embeddings.device)
    mask, ids = batch.get("attention_mask"), batch.get("input_ids")
    if isinstance(mask, Tensor) and mask.numel() == texts * tokens:
        allowed &= mask.reshape(texts, tokens).bool()
    if isinstance(ids, Tensor) and ids.numel() == texts * tokens and special:
        allowed &= ~torch.isin(ids.reshape(texts, tokens), torch.tensor(sorted(special), device=ids.device))
    return allowed


def chosen(allowed: Tensor, *, share: float, generator: torch.Generator) -> Tensor:
    """⌊share · n⌋ of the n places that are allowed, each choice as likely as another.

    Args:
        allowed: bool, (tokens,), on the generator's device.
    Returns: bool, (tokens,).
    """
    places = allowed.nonzero().flatten()
    number = math.floor(share * len(places) + 1e-9)  # 0.29 · 100 is a little less than 29
    order = torch.randperm(len(places), generator=generator)[:number]
    return torch.zeros_like(allowed).index_fill_(0, places[order], True)
