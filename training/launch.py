"""Checks the environment variables with which a launcher gives each process its rank; standard library only."""

from __future__ import annotations

import os

_INTEGERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT")
_REMEDY = "start with `accelerate launch` or `torchrun`, or unset it to train in one process"
# Variables of launchers that start several processes without those of torch: number of processes -> rank.
_OTHER_LAUNCHERS = {
    "SLURM_NTASKS": "SLURM_PROCID",
    "OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_RANK",
    "PMI_SIZE": "PMI_RANK",
    "MV2_COMM_WORLD_SIZE": "MV2_COMM_WORLD_RANK",
}


def check_launch_environment() -> int:
    """Check that the launcher's variables belong together, before anything waits for a process that does not exist.

    Returns:
        The number of processes of this launch.

    Raises:
        ValueError: A variable is not a number, is out of range or is missing, or several processes were started that
            do not know of each other.
    """
    values = {}
    for name in _INTEGERS:
        text = os.environ.get(name)
        if text is not None:
            if not text.isdecimal():
                raise ValueError(f"the environment variable {name} must be 0 or more, got {text!r}: {_REMEDY}.")
            values[name] = int(text)
    if "RANK" not in values:
        _refuse_other_launchers()
    world_size = values.get("WORLD_SIZE", 1)
    if "LOCAL_RANK" in values or world_size != 1:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            if not os.environ.get(name):
                present = "LOCAL_RANK" if "LOCAL_RANK" in values else "WORLD_SIZE"
                raise ValueError(f"the environment variable {present} is set, but {name} is not: {_REMEDY}.")
    sizes = {"RANK": world_size, "LOCAL_RANK": values.get("LOCAL_WORLD_SIZE", world_size)}
    for name, size in sizes.items():
        if values.get(name, 0) >= size:
            raise ValueError(f"the environment variable {name} is {values[name]} in a launch of {size}: {_REMEDY}.")
    return world_size


def _refuse_other_launchers() -> None:
    for count, rank in _OTHER_LAUNCHERS.items():
        # A job of several tasks may run a step of one.
        text = count == "SLURM_NTASKS" and os.environ.get("SLURM_STEP_NUM_TASKS") or os.environ.get(count, "1")
        if rank in os.environ and text != "1":
            raise ValueError(
                f"{count} is {text}, but RANK is not set: each process would train alone in the same folder; start one "
                "`torchrun` or `accelerate launch` per machine (srun --ntasks-per-node=1 torchrun ...), or one task."
            )
