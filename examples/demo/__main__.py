"""`python -m examples.demo`: runs the demo; `--help` lists the options."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .quiet import before_imports


def main() -> int:
    """Returns the exit code: 0 when the reloaded logits were equal and the loss fell."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.demo", description="Fine-tune real models, with and without plugins."
    )
    parser.add_argument(
        "--quick", action="store_true", help="little data and one seed: under a minute, and no meaningful accuracy"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("out/demo"), help="folder to write into (default: %(default)s)"
    )
    options = parser.parse_args()

    before_imports()
    from .run import run  # only now: it imports what must not be imported earlier

    try:
        return 0 if run(options.out, quick=options.quick) else 1
    except FileNotFoundError as error:
        if "make inputs" not in str(error):
            raise
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
