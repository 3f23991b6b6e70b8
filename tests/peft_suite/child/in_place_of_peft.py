"""Pytest plugin of the child process: whoever asks for `peft` from now on is given peft_plus."""

from __future__ import annotations

import sys

import peft_plus

assert "peft" not in sys.modules
sys.modules["peft"] = peft_plus
