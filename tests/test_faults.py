"""A run that is killed and resumed many times is bitwise identical to an uninterrupted one; see tests/faults.py."""

from __future__ import annotations

import re

import faults
import pytest
from runs import fork, wait_for


@pytest.mark.slow
def test_killed_runs_are_bitwise_identical_to_an_uninterrupted_one(finished, tmp_path):
    """After `finished`, whose imports its children need not repeat; `python -m tests.faults` kills 200 times."""
    log = tmp_path / "log"
    child = fork(lambda: faults.main(["--kills", "12", "--seed", "5"]), log, TMPDIR=str(tmp_path))
    code = wait_for(child, 300)
    output = log.read_text()
    assert code == 0, output
    assert int(re.search(r"^all +(\d+) ", output, re.MULTILINE).group(1)) >= 12
    assert "killed runs are bitwise identical to an uninterrupted one; no checkpoint was lost" in output
