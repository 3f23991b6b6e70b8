"""`python -m tests.peft_suite`: PEFT's tests in the three ways; fails on any test that only plain PEFT passes."""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

from .compare import Comparison, table
from .suite import FILES, MODES, VERSION, run, unpack


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.peft_suite", description=__doc__)
    parser.add_argument("files", nargs="*", default=FILES, help="names of test files, without .py")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("out/peft_suite"))
    options = parser.parse_args()
    if version("peft") != VERSION:
        parser.error(f"these are the tests of peft {VERSION}, and peft {version('peft')} is installed")
    options.out = options.out.resolve()  # the tests run in a folder of their own
    options.out.mkdir(parents=True, exist_ok=True)
    outcomes: dict[str, dict[str, str]] = {}
    for mode in MODES:
        start = time.monotonic()
        root = unpack(mode, options.out)
        outcomes[mode] = run(mode, root, options.files, workers=options.workers)
        (options.out / f"{mode}.json").write_text(json.dumps(outcomes[mode], indent=0, sort_keys=True))
        print(f"{mode}: {len(outcomes[mode])} tests in {time.monotonic() - start:.0f} s", flush=True)
    names = ("peft-plus", "peft", "transformers", "accelerate", "torch", "pytest")
    print(f"\n{datetime.date.today()}, {', '.join(f'{name} {version(name)}' for name in names)}")
    broken = 0
    for mode in MODES[1:]:
        comparison = Comparison(outcomes["plain"], outcomes[mode])
        print("\n" + table(comparison.rows(), mode))
        for test, plain, ours in comparison.differences():
            print(f"{test}: {plain} with plain PEFT, {ours} {mode}")
        broken += len(comparison.broken())
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
