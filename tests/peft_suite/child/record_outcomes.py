"""Pytest plugin of the child process: which tests run, and how each one ended.

Loaded with `-p` before any test is imported. What it is told comes in environment variables, so that the workers of
pytest-xdist hear it too.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import set_client_factory
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.utils._http import default_client_factory

RECORD = Path(os.environ["PEFT_SUITE_RECORD"])
SAMPLE: dict[str, int] = json.loads(os.environ["PEFT_SUITE_SAMPLE"])
"""File → n: of its tests, those run whose id hashes to a multiple of n. A file that is not here runs whole."""


def _refuse(request: Any) -> None:
    raise OfflineModeIsEnabled(f"The suite runs without the hub: {request.url}")


def _offline_client() -> Any:
    client = default_client_factory()
    client.event_hooks = {"request": [_refuse], "response": []}
    return client


# PEFT's tests switch HF_HUB_OFFLINE off again; they would then wait for one retry after the other.
set_client_factory(_offline_client)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept: list[pytest.Item] = []
    dropped: list[pytest.Item] = []
    for item in items:
        every = SAMPLE.get(item.nodeid.partition("::")[0], 1)
        number = int.from_bytes(hashlib.sha256(item.nodeid.encode()).digest()[:8])
        (dropped if number % every else kept).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=dropped)


class _Outcomes:
    def __init__(self) -> None:
        self.of: dict[str, str] = {}

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.of[report.nodeid] = "collection failed"

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # A test passes if its set-up, its call and its tear-down do; the first that does not says how it ended.
        outcome = "xfailed" if hasattr(report, "wasxfail") and report.skipped else report.outcome
        if self.of.get(report.nodeid, "passed") == "passed":
            self.of[report.nodeid] = outcome

    def pytest_sessionfinish(self) -> None:
        RECORD.write_text(json.dumps(self.of, indent=0, sort_keys=True), encoding="utf-8")


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # reports of all workers arrive at the one process that started them
        config.pluginmanager.register(_Outcomes())
