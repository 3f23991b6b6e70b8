"""Starting two gloo processes as a user would, with an end that a hang cannot put off."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
GRACE = 30
"""Seconds that the launcher gets beyond the ranks' own limit, for its start and its end."""


def launch(
    module: str,
    *arguments: str,
    folder: Path,
    limit: float,
    options: tuple[str, ...] = ("--multi_gpu", "--num_processes", "2"),
) -> subprocess.CompletedProcess[str]:
    """Run `python -m module folder limit *arguments` in two processes on one machine.

    Args:
        folder: each rank writes its error, or after `limit` seconds its stacks, into `RANK.txt` there.
        limit: seconds.
        options: of `accelerate launch`.
    Returns: the launcher's exit code and what both ranks printed, with those files at the end.
    """
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += [*options, "--main_process_port", "0", "-m", module, str(folder), str(limit), *arguments]
    # `--cpu` would start one process unless mpirun is there, so the processes are told instead (ACCELERATE_USE_CPU).
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        text=True,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        output, _ = process.communicate(timeout=limit + GRACE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        output += f"\nkilled after {limit + GRACE} s"
    for report in sorted(folder.glob("*.txt")):
        output += f"\n---- rank {report.stem}\n{report.read_text()}"
    return subprocess.CompletedProcess(command, process.returncode, output)
