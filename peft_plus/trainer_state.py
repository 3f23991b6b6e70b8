"""A Trainer's state without pickle: optimizer, scheduler, gradient scaler, random state, arguments, plan.

transformers pickles them. This stands in front of a Trainer class and writes and reads the same things as state files.
Where an engine owns the state (DeepSpeed, FSDP, XLA, SageMaker), its own files stay.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from transformers.trainer_utils import SaveStrategy
from transformers.utils import is_sagemaker_mp_enabled, is_torch_xla_available

from .ask import ask
from .checkpoint_trouble import loading
from .errors import CheckpointError
from .random_state import rng_state, set_rng_state
from .state_files import check_state, has_state, read_state, write_state

if TYPE_CHECKING:
    from .engine import Engine

logger = logging.getLogger(__name__)

_Trainer = cast(Any, object)  # stands before any Trainer class in the order of resolution

ARGUMENTS = "training_args.json"
_PICKLED_ARGUMENTS = "training_args.bin"
_PLAN_STATE = "plan_state"
_STOPS_OTHERS = ("optimizer.pt", "scheduler.pt")
"""Where they are missing transformers' own Trainer goes on without a word, with a fresh optimizer. On ours it fails."""

_NOT_PICKLED = "No pickle: peft_plus keeps this state in .json and .safetensors files. Resume with peft_plus.Trainer.\n"


class StateFiles(_Trainer):
    """Writes and reads what the Trainer would pickle."""

    _engine: Engine | None = None  # of the plan, while it trains
    _saving: bool = False

    def _engine_owns_state(self) -> bool:
        return bool(
            self.is_deepspeed_enabled or self.is_fsdp_enabled or is_torch_xla_available() or is_sagemaker_mp_enabled()
        )

    # ---- writing -------------------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            folder = Path(output_dir if output_dir is not None else self.args.output_dir)
            (folder / _PICKLED_ARGUMENTS).unlink(missing_ok=True)
            if not self._saving:  # a checkpoint's are written once it is complete
                self._write_arguments(folder)

    def _write_arguments(self, folder: Path) -> None:
        (folder / ARGUMENTS).write_text(self.args.to_json_string() + "\n", encoding="utf-8")

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self._engine_owns_state():
            super()._save_optimizer_and_scheduler(output_dir)
        elif self.args.should_save:
            write_state(Path(output_dir, "optimizer"), self.optimizer.state_dict())
            write_state(Path(output_dir, "scheduler"), self.lr_scheduler.state_dict())
            for name in _STOPS_OTHERS:
                Path(output_dir, name).write_text(_NOT_PICKLED, encoding="utf-8")

    def _save_scaler(self, output_dir: str) -> None:
        scaler = getattr(self.accelerator, "scaler", None)
        if self._engine_owns_state():
            super()._save_scaler(output_dir)
        elif scaler is not None and self.args.should_save:
            write_state(Path(output_dir, "scaler"), scaler.state_dict())

    def _save_rng_state(self, output_dir: str) -> None:
        if is_torch_xla_available():
            super()._save_rng_state(output_dir)
        else:
            write_state(self._rng_stem(output_dir), rng_state())

    def _save_plan_state(self, folder: Path) -> None:
        if self._engine is not None:
            write_state(folder / _PLAN_STATE, self._engine.state_dict())

    def _rng_stem(self, folder: str) -> Path:
        return Path(folder, f"rng_state_{self.args.process_index}" if self.args.world_size > 1 else "rng_state")

    # ---- reading -------------------------------------------------------------------------------------------------

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_for_training(*args, **kwargs)
        if self.args.save_strategy != SaveStrategy.NO and not self.args.save_only_model:
            # Now rather than at the first checkpoint, hours later.
            if not self._engine_owns_state():
                check_state(
                    self.optimizer.state_dict(),
                    f"optimizer {type(getattr(self.optimizer, 'optimizer', self.optimizer)).__name__}",
                )
                check_state(self.lr_scheduler.state_dict(), f"scheduler {type(self.lr_scheduler).__name__}")
            for plugin in self._engine.plan.active(self._engine.stage) if self._engine is not None else ():
                check_state(dict(ask(plugin, "state_dict")), f"plugin {plugin.name}")
        return prepared

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        with loading(checkpoint):
            if has_state(Path(checkpoint, "optimizer")):
                self.optimizer.load_state_dict(read_state(Path(checkpoint, "optimizer")))
                self.lr_scheduler.load_state_dict(read_state(Path(checkpoint, "scheduler")))
            else:
                super()._load_optimizer_and_scheduler(checkpoint)
            if self._engine is not None:
                self._load_plan_state(checkpoint)

    def _load_plan_state(self, checkpoint: str) -> None:
        """Plugins' state and what else the plan's engine keeps; transformers' own checkpoints have none of it."""
        assert self._engine is not None
        stem = Path(checkpoint, _PLAN_STATE)
        if has_state(stem):
            self._engine.load_state_dict(read_state(stem))
            return
        keeping = [p.name for p in self._engine.plan.active(self._engine.stage) if ask(p, "state_dict")]
        if keeping:
            raise CheckpointError(
                f"{checkpoint} holds no state of plugins, but {keeping[0]!r} keeps one: it would start anew in the "
                "middle of training. Start this run from its beginning."
            )

    def _load_scaler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        with loading(checkpoint):
            if not has_state(Path(checkpoint, "scaler")):
                super()._load_scaler(checkpoint)
            elif (scaler := getattr(self.accelerator, "scaler", None)) is not None:
                scaler.load_state_dict(read_state(Path(checkpoint, "scaler")))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        stem = self._rng_stem(checkpoint)
        with loading(checkpoint):
            if has_state(stem):
                set_rng_state(read_state(stem))
            elif any(Path(checkpoint).glob("rng_state*.json")):
                logger.warning("%s has no random state for process %d.", checkpoint, self.args.process_index)
            else:
                super()._load_rng_state(checkpoint)
