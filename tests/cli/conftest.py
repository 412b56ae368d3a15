"""Finished runs that the tests of the command line share."""

from __future__ import annotations

import os

import pytest
from cli_runs import FinishedRuns


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> FinishedRuns:
    """Train a run by name, once for all test processes: `finished("tft", "method=tft").folder`."""
    base = tmp_path_factory.getbasetemp()
    return FinishedRuns((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cli-runs")
