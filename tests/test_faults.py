"""A run that is killed again and again ends with the bytes of one that was left alone; the command is tests/faults.py."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_killed_runs_end_as_one_that_was_left_alone(tmp_path):
    """In an interpreter of its own, which has no threads yet when it forks; `python -m tests.faults` kills 200 times."""
    command = [sys.executable, "-m", "tests.faults", "--kills", "12", "--seed", "5"]
    environment = os.environ | {"TMPDIR": str(tmp_path), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.search(r"^all +(\d+) ", done.stdout, re.MULTILINE).group(1)) >= 12
    assert "killed runs ended with the bytes of one that was left alone; no checkpoint was lost" in done.stdout
