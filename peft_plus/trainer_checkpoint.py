"""Training checkpoints of a Trainer: sealed by a manifest, and refused unless whole and of this run.

transformers takes any folder for a checkpoint, and goes on without a word where something in it is missing. This stands
in front of a Trainer class; where an engine owns the state (DeepSpeed, FSDP, …), its own files are sealed.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import SaveStrategy, has_length

from .arguments import plan_of
from .checkpoint import REPLACED, Checkpoint, seal, unseal, verify
from .checkpoint_trouble import gone, loading, try_to_write, writing
from .data_sample import data_sample
from .distributed import gather
from .errors import CheckpointError
from .find_checkpoint import begun, check, newest_whole, rotate
from .run_identity import compare, identity, refuse_another_run, training_settings
from .stock_checkpoint import is_stock, lacking_weights
from .trainer_data import RepeatableData

logger = logging.getLogger(__name__)

T = TypeVar("T")

_STATE = "trainer_state.json"


class SealedCheckpoints(RepeatableData):
    """What a Trainer class gets in front of it so that its checkpoints are whole, or not there."""

    stage: Any
    _identity: dict[str, Any] | None = None
    _unpushed: str | None = None
    _asked_at: int = -1  # the step after which the Trainer last asked whether to save

    # ---- which checkpoint ----------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        if self.args.save_strategy != SaveStrategy.NO:
            self._on_savers(lambda: try_to_write(self.args.output_dir))
        if resume_from_checkpoint is not None and resume_from_checkpoint is not False:
            found = self._on_savers(lambda: self._find(resume_from_checkpoint))
            if found is not None:
                resume_from_checkpoint = str(found.folder)
            else:  # none was ever finished; where none was begun either, the Trainer itself says so
                resume_from_checkpoint = not self._on_savers(lambda: begun(self.args.output_dir))
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _find(self, wanted: Any) -> Checkpoint | None:
        """The checkpoint to go on with, checked before anything is loaded: whole, of this run, with all its state."""
        layout = {"processes": self.args.world_size, "own_layout": self._engine_owns_state()}
        if wanted is True:
            found = newest_whole(self.args.output_dir, **layout)
            if found is None:
                return None
        else:
            try:
                found = check(wanted, **layout)
            except CheckpointError as error:
                raise CheckpointError(
                    f"{error} Nothing was loaded. train(resume_from_checkpoint=True) takes the newest whole one."
                ) from error
        if not found.sealed:
            return found
        if _STATE not in found.files:
            raise CheckpointError(
                f"{found.folder} was not written by a Trainer: resume it with the loop that wrote it."
            )
        if not self._engine_owns_state() and "optimizer.json" not in found.files:
            raise CheckpointError(
                f"{found.folder} holds the model alone (it was saved with save_only_model=True): without optimizer, "
                "scheduler and random state another run would begin. Load its weights into a new run, and save with "
                "save_only_model=False."
            )
        compare(found.identity, self._describe(), str(found.folder))
        return found

    def _describe(self) -> dict[str, Any]:
        settings = training_settings(self.args)
        own_class, _ = getattr(self, "optimizer_cls_and_kwargs", None) or (None, None)
        if own_class is not None:
            settings["optimizer class"] = own_class.__name__
        data = self.train_dataset
        return identity(
            self.model,
            plan_of(self.model),
            getattr(self, "stage", None),
            settings=settings,
            processes=self.args.world_size,
            device=f"{self.args.device.type} × {max(self.args.n_gpu, 1)}",
            examples=len(data) if data is not None and has_length(data) else None,
            sample=data_sample(data),
        )

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: str | None,
        trial: Any,
    ) -> Any:
        folder = resume_from_checkpoint
        if folder is not None and not Path(folder, _STATE).is_file():
            raise CheckpointError(gone(folder))
        begin = super()._init_training_state(max_steps, num_update_steps_per_epoch, num_train_epochs, folder, trial)
        self._identity = self._describe()
        if folder is None:
            return begin
        self._keep_best(folder)
        self._mend_callbacks(folder)
        if self.args.ignore_data_skip:
            logger.warning("ignore_data_skip: the data begin anew, so this is not the run that was interrupted.")
        if self.state.global_step >= max_steps:
            logger.warning("%s is the end of this run (step %d of %d).", folder, self.state.global_step, max_steps)
            return num_train_epochs, 0  # in the middle of an epoch the Trainer would make one step too many
        return begin

    def _keep_best(self, resume: str) -> None:
        """The best checkpoint so far must still be there, here or where the run's folder was moved to."""
        recorded = json.loads(Path(resume, _STATE).read_text(encoding="utf-8")).get("best_model_checkpoint")
        if not recorded or not self.args.load_best_model_at_end:
            return
        # A copy of a run has its own; and a kill may have left it set aside, in the middle of being replaced.
        places = [Path(resume).with_name(Path(recorded).name), Path(recorded)]
        places = [place.with_name(prefix + place.name) for place in places for prefix in ("", REPLACED)]
        self.state.best_model_checkpoint = self._on_savers(lambda: self._whole_best(places, resume, recorded))

    def _whole_best(self, places: Sequence[Path], resume: str, recorded: str) -> str:
        faults: list[str] = []
        for place in places:
            try:
                self._check_best(place)
            except CheckpointError as error:
                faults.append(str(error))
            else:
                return str(place)
        fault = next((text for text in faults if "does not exist" not in text), faults[0])
        raise CheckpointError(
            f"{resume} tells that the best model so far is in {recorded}, which cannot be used: {fault} Bring it "
            "back, or set load_best_model_at_end=False."
        )

    def _mend_callbacks(self, resume: str) -> None:
        """Say which callbacks' state the Trainer drops, and let it save those that the interrupted run did not have."""
        kept = self.args.restore_callback_states_from_checkpoint
        callbacks = [*self.callback_handler.callbacks, self.control]
        for callback in (c for c in callbacks if isinstance(c, ExportableState)):
            name = type(callback).__name__
            if name in self.state.stateful_callbacks and not kept and callback is not self.control:
                logger.warning(
                    "The state of %s in %s is not restored, so the run may stop elsewhere than without the "
                    "interruption. Set restore_callback_states_from_checkpoint=True.",
                    name,
                    resume,
                )
            self.state.stateful_callbacks.setdefault(name, callback.state())

    # ---- writing -------------------------------------------------------------------------------------------------

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Save at the last step of an epoch when the epoch is over: what is evaluated there belongs to the checkpoint.

        A run that went on from one without it would neither evaluate nor draw what the evaluation drew.
        """
        ends_step = self._asked_at != self.state.global_step  # the same is asked again at the end of the epoch
        self._asked_at = self.state.global_step
        waits = ends_step and self.control.should_save and float(self.state.epoch or 0.5).is_integer()
        if waits:
            self.control.should_save = False
        result = super()._maybe_log_save_evaluate(*args, **kwargs)
        if waits:
            self.control.should_save = True
        return result

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        run_dir = Path(self._get_output_dir(trial=trial))
        folder = run_dir / f"checkpoint-{self.state.global_step}"
        with writing(run_dir, folder):
            self._on_savers(lambda: unseal(folder))
            if self._engine is not None:
                self._engine.seal()
            limit, self.args.save_total_limit = self.args.save_total_limit, None  # nothing goes before this is sealed
            self._saving = True
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self.args.save_total_limit, self._saving = limit, False
            self.accelerator.wait_for_everyone()
            self._on_savers(lambda: self._finish(folder))
        unpushed, self._unpushed = self._unpushed, None
        if unpushed is not None:
            self._push_from_checkpoint(unpushed)
        if self.args.should_save:
            rotate(run_dir, limit, keep=[p for p in (folder, self.state.best_model_checkpoint) if p])

    def _finish(self, folder: Path) -> None:
        """What is still missing, then the manifest."""
        self._write_arguments(folder)
        if not self.args.save_only_model:
            self._save_plan_state(folder)
        seal(folder, self._identity or self._describe(), self.state.global_step)

    def _tune_save_checkpoint(self, checkpoint_dir: str) -> None:
        folder = Path(checkpoint_dir, f"checkpoint-{self.state.global_step}")
        unseal(folder)
        if self._engine is not None:
            self._engine.seal()
        self.save_model(str(folder), _internal_call=True)
        if self.args.should_save:
            self.state.stateful_callbacks["TrainerControl"] = self.control.state()
            self.state.save_to_json(str(folder / _STATE))
            self._save_optimizer_and_scheduler(str(folder))
            self._save_rng_state(str(folder))
            self._finish(folder)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._saving:
            self._unpushed = checkpoint_folder  # only when it is whole
        else:
            super()._push_from_checkpoint(checkpoint_folder)

    # ---- reading -------------------------------------------------------------------------------------------------

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        try:
            self._on_savers(lambda: self._check_best(Path(best)))
        except CheckpointError as error:
            raise CheckpointError(
                f"The best model cannot be loaded: {error} The model in memory is that of the last step, unchanged; "
                "keep it with trainer.save_model(…), or resume from an older checkpoint."
            ) from error
        with loading(best):
            super()._load_best_model()

    def _check_best(self, folder: Path) -> None:
        """The best model of this run, whole."""
        if is_stock(folder):
            faults = lacking_weights(folder)
            if faults:
                raise CheckpointError(f"{folder} is incomplete: {'; '.join(faults)}.")
            return
        found = verify(folder)
        if found.identity:
            refuse_another_run(found.identity, self._identity or self._describe(), str(folder))

    # ---- common --------------------------------------------------------------------------------------------------

    def _on_savers(self, work: Callable[[], T]) -> T:
        """Let the processes that save do `work`; all get its answer, or all raise its error. Nobody runs ahead."""
        answer: Any = None
        error: Exception | None = None
        if self.args.should_save:
            try:
                answer = work()
            except (CheckpointError, OSError, SafetensorError, TypeError) as raised:
                error = raised
        told = gather((answer, f"{error}" if error else None))
        failures = [text for _, text in told if text is not None]
        if failures and error is None:
            error = CheckpointError(failures[0])
        if error is not None:
            raise error
        return answer if self.args.should_save else told[0][0]
