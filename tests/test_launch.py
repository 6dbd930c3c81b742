"""The launcher's environment variables: what belongs together passes, anything else is an error before torch loads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from training.launch import check_launch_environment

ROOT = Path(__file__).parent.parent
LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_", "SLURM_", "OMPI_", "PMI_", "MV2_")
TORCHRUN = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture
def launched(monkeypatch):
    """Sets the variables of a launcher, and none besides."""

    def set_environment(variables: dict[str, str]) -> None:
        for name in list(os.environ):
            if name.startswith(LAUNCHERS):
                monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_environment


@pytest.mark.parametrize(
    ("variables", "num_processes"),
    [
        ({}, 1),
        ({"WORLD_SIZE": "1"}, 1),
        ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "host", "MASTER_PORT": "1"}, 1),
        (TORCHRUN, 2),
        (TORCHRUN | {"RANK": "7", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "2"}, 8),
        (TORCHRUN | {"SLURM_NTASKS": "2", "SLURM_PROCID": "1"}, 2),  # torchrun below srun
        ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, 1),
        ({"SLURM_NTASKS": "2"}, 1),  # the shell of an allocation
        ({"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, 1),
    ],
)
def test_consistent_variables_give_the_number_of_processes(launched, variables, num_processes):
    launched(variables)
    assert check_launch_environment() == num_processes


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"LOCAL_RANK": "1"}, "LOCAL_RANK is set, but RANK is not: start with `accelerate launch` or `torchrun`, or"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK must be 0 or more, got '-1'"),
        ({"LOCAL_RANK": ""}, "LOCAL_RANK must be 0 or more, got ''"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE must be 0 or more, got ''"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE must be 0 or more, got 'two'"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is set, but RANK is not"),
        ({"RANK": "1"}, "RANK is 1 in a launch of 1"),
        (TORCHRUN | {"RANK": "2"}, "RANK is 2 in a launch of 2"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "1"}, "LOCAL_RANK is 1 in a launch of 1"),
        (TORCHRUN | {"MASTER_ADDR": ""}, "LOCAL_RANK is set, but MASTER_ADDR is not"),
        (TORCHRUN | {"MASTER_PORT": "http"}, "MASTER_PORT must be 0 or more, got 'http'"),
        (
            {"SLURM_NTASKS": "2", "SLURM_PROCID": "0"},
            "SLURM_NTASKS is 2, but RANK is not set: each process would train",
        ),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"}, "OMPI_COMM_WORLD_SIZE is 4, but RANK is not set"),
        ({"PMI_SIZE": "2", "PMI_RANK": "1", "WORLD_SIZE": "1"}, "PMI_SIZE is 2, but RANK is not set"),
    ],
)
def test_inconsistent_variables_are_an_error(launched, variables, message):
    launched(variables)
    with pytest.raises(ValueError) as caught:
        check_launch_environment()
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["LOCAL_RANK", "WORLD_SIZE"])
def test_training_prints_the_error_on_every_rank_without_torch(launched, name):
    launched({name: "3"})
    code = "import sys, train_vae; code = train_vae.main(); assert 'torch' not in sys.modules; sys.exit(code)"
    command = [sys.executable, "-c", code, "--config", "configs/quickstart.json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: the environment variable {name} is set, but RANK is not")
    assert done.stderr.count("\n") == 1
