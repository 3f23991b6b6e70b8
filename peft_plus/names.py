"""Names that people mistype: the nearest match, in one sentence."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str]) -> str:
    """` Did you mean 'x'?`, with a leading space, or an empty string when nothing is close."""
    lowered = {k.lower(): k for k in known}
    match = difflib.get_close_matches(str(name).lower(), lowered, n=1, cutoff=0.6)
    return f" Did you mean {lowered[match[0]]!r}?" if match else ""
