"""`python -m tests.kills.serve FOLDER SEED TASKS`: does the tasks (JSON) one after the other from one warm process.

Each task is a list: `["storm", loop, case, kills, processes]`, `["sweep", loop, case, step, end, every]`,
`["cold", [loop, case], kills]` or `["launch", [[loop, case], …], kills]`. `FOLDER/results.json` tells how they ended.
"""

from __future__ import annotations

import json
import os
import random
import resource
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

Task = Sequence[Any]

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",  # pyarrow's allocator would start a thread
}
"""One thread, from the first import on: a process with more cannot be forked."""


def start(folder: Path, seed: int, tasks: Sequence[Task]) -> subprocess.Popen[bytes]:
    """The process that does the tasks; it writes what it prints to `FOLDER/output.txt`."""
    folder.mkdir(parents=True)
    command = [sys.executable, "-m", "tests.kills.serve", str(folder), str(seed), json.dumps(tasks)]
    with (folder / "output.txt").open("wb") as output:
        return subprocess.Popen(
            command,
            cwd=Path(__file__).resolve().parent.parent.parent,
            env={**os.environ, **ENVIRONMENT},
            stdout=output,
            stderr=output,
        )


def main(folder: Path, seed: int, tasks: Sequence[Task]) -> None:
    import torch
    from tqdm import tqdm

    from .cold import cold_storm
    from .sweep import sweep
    from .warm import Warm

    torch.set_num_threads(1)
    tqdm.monitor_interval = 0  # its monitor, which watches transformers' progress bars, is a thread
    draw = random.Random(seed)
    warm = Warm(folder, draw)
    results: list[dict[str, Any]] = []
    for kind, *details in tasks:
        if kind == "storm":
            done: Any = warm.storm(*details)
        elif kind == "sweep":
            done = sweep(warm, *details)
        else:
            runs, kills = details
            processes = 2 if kind == "launch" else 1
            references = [warm.reference(loop, case, processes) for loop, case in runs]
            done = cold_storm(folder, references, [":".join(run) for run in runs], kills, draw, processes)
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        results.append({"kind": kind, **asdict(done), "cpu": used.ru_utime + used.ru_stime})
        (folder / "results.tmp").write_text(json.dumps(results, indent=1), encoding="utf-8")
        (folder / "results.tmp").rename(folder / "results.json")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), int(sys.argv[2]), json.loads(sys.argv[3]))
