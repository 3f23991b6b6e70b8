"""Runs in processes of their own, which may die without taking one another along."""

from __future__ import annotations

import logging
import os
import pickle
import sys
import threading
from collections import deque
from collections.abc import Generator, Sequence
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from .call import Call, Failure
from .errors import CallError
from .results import RunResult

logger = logging.getLogger(__name__)

_READY = "ready"
_ATTEMPTS = 2
"""How often a run is tried whose process dies."""
_PATIENCE_SECONDS = 10.0


def in_processes(
    call: Call, numbers: Sequence[int], workers: int, *, fraction: float | None = None
) -> Generator[tuple[int, RunResult | Failure]]:
    """Make runs in several processes, each of which makes one after another.

    Where a process dies, another takes its place, and its run is tried once more, since it may have died of what the
    others needed. When the iterator is closed, all end at once.

    Args:
        workers: processes, ≥ 1; they share this process's cores, and each sees one of its GPUs, taken in turn.
        fraction: of each run that is made.
    Returns: (number, result or failure) of each run, as they come.
    Raises:
        CallError: a process cannot begin.
    """
    order = pickle.dumps((call, fraction))
    threads, gpus = max(1, cores() // workers), devices()
    waiting, deaths = deque(numbers), dict.fromkeys(numbers, 0)
    crew: list[_Worker] = []
    try:
        while waiting or crew:
            while waiting and len(crew) < workers:
                slot = min(set(range(workers)) - {worker.slot for worker in crew})
                crew.append(_Worker(order, threads, slot, gpus[slot % len(gpus)] if gpus else None))
                crew[-1].give(waiting.popleft())
            for pipe in wait([worker.pipe for worker in crew]):
                worker = next(worker for worker in crew if worker.pipe is pipe)
                answer = worker.answer()
                if answer == _READY:
                    worker.ready = True
                    continue
                number = worker.number
                deaths[number] += not worker.is_alive
                again = not worker.is_alive and deaths[number] < _ATTEMPTS
                if again:
                    logger.warning("Run %d is tried once more. %s", number, answer.message)
                    waiting.append(number)
                if worker.is_alive and waiting:
                    worker.give(waiting.popleft())
                else:
                    crew.remove(worker)
                    worker.end()
                if not again:
                    yield number, answer
    finally:
        for worker in crew:
            worker.end(at_once=True)


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def devices() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    if not torch.cuda.is_available():
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(number) for number in range(torch.cuda.device_count())]


class _Worker:
    """A process that makes runs, seen from outside.

    Args:
        order: what it makes, pickled.
        threads: how many it may use.
        slot: its place among those that work at a time.
        gpu: the one that it sees; None where there is none.
    """

    def __init__(self, order: bytes, threads: int, slot: int, gpu: str | None) -> None:
        context = get_context("spawn")
        self.pipe, far = context.Pipe()
        # No daemon: those may have no processes of their own, such as those that load data.
        self._process: BaseProcess = context.Process(target=_serve, args=(far, threads, gpu))
        self._process.start()
        far.close()
        self.slot, self.number, self.ready, self.is_alive = slot, -1, False, True
        self._send(order)

    def give(self, number: int) -> None:
        """Let it make a run."""
        self.number = number
        self._send(pickle.dumps(number))

    def answer(self) -> Any:
        """What it says: that it is ready, a result or a failure.

        Raises:
            CallError: it ended before it was ready.
        """
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            self.is_alive = False
        self._process.join()
        how = f"exit code {self._process.exitcode}"
        if not self.ready:
            raise CallError(
                f"A process for runs ended before it began ({how}). A script that calls peft_plus.seeds with workers "
                'must be a file and do so below `if __name__ == "__main__":`, since each process imports it again.'
            )
        message = f"The process that made it died ({how}); exit code -9 often means that memory ran out."
        return Failure(message, f"{message}\n")

    def end(self, *, at_once: bool = False) -> None:
        """Let it go, or stop it in the midst of a run."""
        if at_once:
            self._process.terminate()
        self.pipe.close()
        self._process.join(_PATIENCE_SECONDS)
        if self._process.is_alive():  # something in it does not let it end
            self._process.kill()
            self._process.join()

    def _send(self, body: bytes) -> None:
        try:
            self.pipe.send_bytes(body)
        except OSError:
            return  # it has died, which the next answer tells


def _serve(pipe: Connection, threads: int, gpu: str | None) -> None:
    """The process: told what to run, then the numbers of runs, until the pipe is closed."""
    if gpu is not None:  # before anything looks for them: a Trainer that sees several would split each batch
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        call, fraction = pickle.loads(pipe.recv_bytes())
        import torch

        torch.set_num_threads(min(threads, torch.get_num_threads()))
        pipe.send(_READY)
        while True:
            number = pickle.loads(pipe.recv_bytes())
            try:
                answer: RunResult | Failure = call.run(number, fraction)
            except Exception as error:  # noqa: BLE001 - told to the parent, which records it
                answer = Failure.of(error)
            pipe.send(answer)
    except (EOFError, OSError, KeyboardInterrupt):
        sys.exit(0)  # nobody waits any more
    except (AttributeError, ImportError, pickle.UnpicklingError) as error:
        message = (
            f"workers: another process cannot find the factory or what it was given ({error}). Define them at the top "
            "level of a module that can be imported."
        )
        pipe.send(_READY)
        pipe.send(Failure(message, message, everywhere=True))


def _end_with_parent() -> None:
    """Do not go on alone when the parent was killed: its next call may work in the same folders."""
    parent = parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
