"""Model soups: the mean of the weights of several finished runs, saved as one model."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from numbers import Real
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from peft_plus import MethodError
from peft_plus.adapter_folder import CONFIG, RECORD, WEIGHTS

from .soup_ingredients import INDEX, MODEL_CONFIG, Factors, Ingredient, check_alike, read_ingredient
from .weight_mean import LowRank, low_rank_mean, plain_mean, relative_error

logger = logging.getLogger(__name__)

Folder = str | os.PathLike[str]

REPORT = "soup.json"


@dataclass(frozen=True)
class Soup:
    """What a soup was made of; also in its folder, as `soup.json`.

    Attributes:
        folder: where it lies.
        ingredients: the folders that are in it, in the order in which they came in.
        rank: of its low-rank changes, the highest; None where it has none.
        relative_error: ‖what `rank=` cut off‖ / ‖ΔW‖ over all low-rank changes together, in [0, 1].
        scores: of a greedy soup: each folder, and what `evaluate` gave for it alone.
        score: of a greedy soup: what it gave for the soup.
    """

    folder: Path
    ingredients: tuple[Path, ...]
    rank: int | None = None
    relative_error: float = 0.0
    scores: tuple[tuple[Path, float], ...] = ()
    score: float | None = None


def uniform_soup(folders: Sequence[Folder], out: Folder, *, rank: int | None = None) -> Soup:
    """Average the weights of finished runs that began from the same base, and save them as one model.

    W = W₀ + Σ ΔWₖ / K (Wortsman et al. 2022, arXiv:2203.05482, "uniform soup"). Of LoRA adapters the changes
    ΔWₖ = sₖ · BₖAₖ are averaged, each with its own rank, alpha and rsLoRA, and factored again: by default exactly, with
    the sum of the ranks. (mean B)(mean A) would be something else. All that is saved plainly, such as heads, biases,
    IA³'s vectors, thawed base weights or a whole model, is averaged plainly. No base is loaded, and never more than the
    tensors of one weight and the result are in memory.

    ```python
    uniform_soup(["out/seed-0", "out/seed-1", "out/seed-2"], "out/soup", rank=8)
    model = PeftModel.from_pretrained(base, "out/soup")
    ```

    Args:
        folders: of adapters, or of whole models, as `save_pretrained` wrote them; one or more.
        out: a new folder. Plain PEFT (of whole models: transformers) loads it.
        rank: of each low-rank change at most, ≥ 1; None for the exact mean. `Soup.relative_error` says what it costs.
    Raises:
        MethodError: a folder is damaged, or two do not fit together; names both.
        ValueError: no folder, `out` holds something, or a rank that is none.
    """
    return _save(_checked(folders, out, rank), Path(out), rank)


def greedy_soup(
    folders: Sequence[Folder],
    out: Folder,
    evaluate: Callable[[Path], float],
    *,
    greater_is_better: bool = True,
    rank: int | None = None,
) -> Soup:
    """Average those finished runs that help: never worse on the validation set than the best of them.

    From the best to the worst, each run is added to the soup, and stays if the soup does not get worse (Wortsman et al.
    2022, arXiv:2203.05482, recipe 1). Calls `evaluate` 2 K − 1 times at most. Where nothing helps, the result is a copy
    of the best run. What it scores is no estimate for new data: the same validation set chose it.

    ```python
    def accuracy(folder):
        model = from_pretrained(base(), folder)
        trainer = Trainer(model, args, eval_dataset=dev, compute_metrics=metrics)
        return trainer.evaluate()["eval_accuracy"]

    greedy_soup(["out/seed-0", "out/seed-1", "out/seed-2"], "out/soup", accuracy)
    ```

    Args:
        folders: of adapters, or of whole models, as `save_pretrained` wrote them; one or more.
        out: a new folder. Plain PEFT (of whole models: transformers) loads it.
        evaluate: folder → its score on the validation set. A run that scores NaN is left out.
        greater_is_better: False for a loss.
        rank: of each low-rank change at most, ≥ 1; None for the exact mean. A run that stays alone keeps its own.
    Raises:
        MethodError: a folder is damaged, or two do not fit together; names both.
        ValueError: as in `uniform_soup`; `evaluate` gives no number; no run scores one.
    """
    ingredients, sign, place = _checked(folders, out, rank), 1.0 if greater_is_better else -1.0, Path(out)
    scores = [_score(evaluate, one.path) for one in ingredients]
    order = sorted((n for n, score in enumerate(scores) if not math.isnan(score)), key=lambda n: -sign * scores[n])
    if not order:
        raise ValueError("evaluate gave NaN for every folder: there is nothing to choose by.")
    kept, best = [ingredients[order[0]]], scores[order[0]]
    place.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=place.parent, prefix=f".{place.name}.") as scratch:
        soup, trial = Path(scratch) / "soup", Path(scratch) / "trial"
        made = _copy(kept[0], soup)
        for number in order[1:]:
            candidate = _save([*kept, ingredients[number]], trial, rank)
            score = _score(evaluate, trial)
            stays = sign * score >= sign * best
            logger.info(
                "%s %s the soup: %.6g with it, %.6g without.",
                ingredients[number].path,
                "joins" if stays else "stays out of",
                score,
                best,
            )
            shutil.rmtree(soup if stays else trial)
            if stays:
                trial.rename(soup)
                made, best = candidate, score
                kept.append(ingredients[number])
        alone = tuple((one.path, score) for one, score in zip(ingredients, scores, strict=True))
        made = replace(made, folder=place, scores=alone, score=best)
        _report(made, soup)
        _place(soup, place)
    return made


def _checked(folders: Sequence[Folder], out: Folder, rank: int | None) -> list[Ingredient]:
    """All that can be told before anything is computed."""
    if isinstance(folders, str | os.PathLike) or not folders:
        raise ValueError(f"folders={folders!r}: give a list of one folder or more.")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(f"rank={rank!r}: give a whole number ≥ 1, or None for the exact mean.")
    if Path(out).exists() and not (Path(out).is_dir() and not any(Path(out).iterdir())):
        raise ValueError(f"out={str(out)!r} exists already: give a new folder.")
    ingredients = [read_ingredient(Path(folder)) for folder in folders]
    check_alike(ingredients)
    if rank is not None and not ingredients[0].factors:
        raise MethodError(f"rank={rank} has no effect: {str(ingredients[0].path)!r} has no low-rank change.")
    return ingredients


def _score(evaluate: Callable[[Path], float], folder: Path) -> float:
    score = evaluate(folder)
    if not isinstance(score, Real) or isinstance(score, bool):
        raise ValueError(f"evaluate gave {score!r} for {str(folder)!r}: give a number.")
    return float(score)


def _save(ingredients: Sequence[Ingredient], out: Path, rank: int | None) -> Soup:
    """Write the mean to a folder that appears once it is whole."""
    first = ingredients[0]
    place = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    try:
        parts: dict[str, LowRank] = {}
        for file, declared in first.files.items():
            tensors: dict[str, Tensor] = {}
            if file == WEIGHTS:
                tensors, parts = _changes(ingredients, rank)
            for name in declared:
                if not any(name in (f.a, f.b, f.bias) for f in first.factors.values()):
                    tensors[name] = _mean(ingredients, file, name)
            save_file(tensors, place / file, metadata={"format": "pt"})
        _write_settings(ingredients, parts, place)
        ranks = [len(part.a) for part in parts.values()]
        soup = Soup(
            out,
            tuple(one.path for one in ingredients),
            max(ranks, default=None),
            relative_error(list(parts.values())),
        )
        _report(soup, place)
        _place(place, out)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return soup


def _changes(ingredients: Sequence[Ingredient], rank: int | None) -> tuple[dict[str, Tensor], dict[str, LowRank]]:
    """The mean of the low-rank changes, one module after the other: name → tensor, module → change."""
    tensors: dict[str, Tensor] = {}
    parts: dict[str, LowRank] = {}
    for module, names in ingredients[0].factors.items():
        every: list[tuple[Ingredient, Factors]] = [(one, one.factors[module]) for one in ingredients]
        read = [(one.tensor(WEIGHTS, f.a), one.tensor(WEIGHTS, f.b), f.scaling) for one, f in every]
        part = parts[module] = low_rank_mean(read, rank=rank)
        tensors[names.a], tensors[names.b] = part.a.contiguous(), part.b.contiguous()
        if names.bias is not None:  # PEFT scales it as it scales BA
            tensors[names.bias] = plain_mean([one.tensor(WEIGHTS, names.bias).float() * f.scaling for one, f in every])
    return tensors, parts


def _mean(ingredients: Sequence[Ingredient], file: str, name: str) -> Tensor:
    try:
        # In a model saved by others, a tensor may lie in another file.
        places = [next(f for f in (file, *one.files) if name in one.files.get(f, ())) for one in ingredients]
        return plain_mean([one.tensor(place, name) for one, place in zip(ingredients, places, strict=True)])
    except ValueError as error:
        paths = " and ".join(repr(str(one.path)) for one in ingredients)
        raise MethodError(f"{paths} cannot be averaged: {name!r}: {error}.") from None


def _write_settings(ingredients: Sequence[Ingredient], parts: Mapping[str, LowRank], place: Path) -> None:
    """Everything but the weights, as the first folder has it, where it holds for all."""
    first = ingredients[0]
    _copy_settings(first, place)
    if parts:
        ranks = _ranks({module: len(part.a) for module, part in parts.items()})
        _write_json({**first.config, **ranks}, place / CONFIG)
    (place / RECORD).unlink(missing_ok=True)
    if first.record is not None and all(one.record is not None for one in ingredients):
        _write_json({**first.record, "plugins": [], "stages_run": []}, place / RECORD)  # no plugin trained it


def _copy_settings(one: Ingredient, place: Path) -> None:
    names = (CONFIG, RECORD) if one.adapter else (MODEL_CONFIG, INDEX, "generation_config.json", RECORD)
    for path in one.path.iterdir():
        if path.is_file() and (path.name in names or (not one.adapter and _is_of_a_tokenizer(path.name))):
            shutil.copyfile(path, place / path.name)


def _is_of_a_tokenizer(name: str) -> bool:
    known = ("vocab", "merges", "special_tokens_map", "added_tokens", "spiece", "sentencepiece", "tokenizer")
    return name.startswith(known) and name.endswith((".json", ".txt", ".model"))


def _ranks(ranks: Mapping[str, int]) -> dict[str, Any]:
    """LoRA's settings for these ranks and a scaling of 1."""
    most = max(set(ranks.values()), key=list(ranks.values()).count)
    own = {
        "^" + module.removeprefix("base_model.model.").replace(".", r"\."): rank
        for module, rank in ranks.items()
        if rank != most
    }
    free = {"use_rslora": False, "init_lora_weights": True}
    return {"r": most, "lora_alpha": most, "rank_pattern": own, "alpha_pattern": dict(own), **free}


def _copy(one: Ingredient, out: Path) -> Soup:
    """A soup of one: its files as they are."""
    out.mkdir()
    _copy_settings(one, out)
    for file in one.files:
        shutil.copyfile(one.path / file, out / file)
    ranks = [len(one.files[WEIGHTS][factors.a]) for factors in one.factors.values()]
    return Soup(out, (one.path,), max(ranks, default=None))


def _report(soup: Soup, place: Path) -> None:
    _write_json({name: value for name, value in asdict(soup).items() if name != "folder"}, place / REPORT)


def _write_json(values: Mapping[str, Any], path: Path) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True, default=str) + "\n", encoding="utf-8")


def _place(made: Path, out: Path) -> None:
    if out.exists():
        out.rmdir()  # it is empty
    out.parent.mkdir(parents=True, exist_ok=True)
    made.replace(out)
