"""A run that is killed again and again ends with the bytes of one that was left alone; the command is tests/faults.py."""

from __future__ import annotations

import re

import faults
import pytest
from runs import fork, wait_for


@pytest.mark.slow
def test_killed_runs_end_as_one_that_was_left_alone(finished, tmp_path):
    """After `finished`, whose imports its children need not repeat; `python -m tests.faults` kills 200 times."""
    log = tmp_path / "log"
    child = fork(lambda: faults.main(["--kills", "12", "--seed", "5"]), log, TMPDIR=str(tmp_path))
    code = wait_for(child, 300)
    said = log.read_text()
    assert code == 0, said
    assert int(re.search(r"^all +(\d+) ", said, re.MULTILINE).group(1)) >= 12
    assert "killed runs ended with the bytes of one that was left alone; no checkpoint was lost" in said
