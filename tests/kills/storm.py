"""`make storm`: hundreds of kills over every case, recorded in docs/storm.md.

`python -m tests.kills.storm --kills 200 --seed 7`: the seed draws the moments; the load of the machine moves them.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from .cases import RUNS
from .page import page, verdict
from .serve import Task, start

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "storm.md"

TWO = [(loop, case) for loop in ("trainer", "session") for case in ("plain", "together", "accumulation", "nf4")]
COLD = ["trainer:plain", "session:together"]
LAUNCHED = [["trainer", "together"], ["session", "plain"]]
COLD_SHARE, LAUNCHED_SHARE, TWO_SHARE = 0.12, 0.06, 0.12
"""Of all kills: of whole processes, of launches, of two forked ranks. The rest are of one forked process."""

SWEEPS: list[Task] = [
    ["sweep", loop, case, step, end]
    for loop in ("trainer", "session")
    for case, step, end in (
        ("limit 1", 2, "killed"),
        ("together", 6, "killed"),
        ("best model" if loop == "trainer" else "full", 10, "killed"),
        ("limit 1", 10, "disk full"),
        ("together", 10, "killed in a write"),
        ("together", 10, "file too big"),
    )
]


def tasks(kills: int) -> list[Task]:
    """What a storm of so many kills does: every case gets its share, and at least one."""
    cold, launched = (max(1, round(kills * share)) for share in (COLD_SHARE, LAUNCHED_SHARE))
    two = max(len(TWO), round(kills * TWO_SHARE))
    one = max(len(RUNS), kills - cold - launched - two)
    return [
        *(["storm", loop, case, count, 1] for (loop, case), count in zip(RUNS, shares(one, len(RUNS)), strict=True)),
        *(["storm", loop, case, count, 2] for (loop, case), count in zip(TWO, shares(two, len(TWO)), strict=True)),
        *(["cold", [run.split(":")], count] for run, count in zip(COLD, shares(cold, len(COLD)), strict=True)),
        ["launch", LAUNCHED, launched],
        *SWEEPS,
    ]


def shares(whole: int, parts: int) -> list[int]:
    """Whole numbers that differ by one at most."""
    return [whole // parts + (place < whole % parts) for place in range(parts)]


def main(kills: int, seed: int) -> int:
    folder = Path(tempfile.mkdtemp(prefix="storm-"))
    print(f"A storm of {kills} kills, seed {seed}, in {folder}.", flush=True)
    begun = time.monotonic()
    process = start(folder / "work", seed, tasks(kills))
    told: list[dict[str, Any]] = []
    while True:
        ended = process.poll() is not None
        results = _results(folder / "work")
        for result in results[len(told) :]:
            print(f"{result['kind']:7} {result['loop']:8} {result['case']:35} {verdict(result)}", flush=True)
        told = results
        if ended:
            break
        time.sleep(1)
    if process.returncode != 0:
        print((folder / "work" / "output.txt").read_text(encoding="utf-8")[-5000:])
        return 1
    PAGE.write_text(page(told, kills=kills, seed=seed, seconds=time.monotonic() - begun), encoding="utf-8")
    if any(result["faults"] for result in told):
        print(f"Something differs: see {PAGE}; what was written is in {folder}.")
        return 1
    shutil.rmtree(folder)
    return 0


def _results(folder: Path) -> list[dict[str, Any]]:
    path = folder / "results.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    asked = parser.parse_args()
    sys.exit(main(asked.kills, asked.seed))
