"""The CUDA path with real values on a pretended device: no mixed devices, few waits of the host, the results of the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pretended_cuda
import pytest

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def walks(tmp_path_factory) -> dict[str, Any]:
    """The output of cuda_walk.py."""
    if reason := pretended_cuda.reason_to_skip():
        pytest.skip(reason)
    environment = pretended_cuda.environment(tmp_path_factory.mktemp("libraries")) | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(TESTS / "cuda_walk.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


CASES = [f"{layout} {precision}" for layout in ("vector", "spatial") for precision in ("no", "bf16", "fp16")]


@pytest.mark.parametrize("case", CASES)
def test_the_results_are_those_of_the_cpu(walks, case):
    layout, precision = case.split()
    found, wanted = walks[case], walks[f"{layout} cpu"]
    assert found["device"] == "cuda:0"
    tolerance = 1e-5 if precision == "no" else 0.02
    for name, value in wanted["terms"].items():
        assert found["terms"][name] == pytest.approx(value, rel=tolerance), name
    assert found["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=tolerance)
    assert found["validation_loss"] == pytest.approx(wanted["validation_loss"], rel=tolerance)


@pytest.mark.parametrize("case", CASES)
def test_the_host_waits_for_the_device_at_few_places(walks, case):
    found = walks[case]
    # The random pixels of the benchmark are in pageable memory; those of the stream are pinned.
    waits = {place: count for place, count in found["step"]["waits"].items() if "copy to the device" not in place}
    assert not waits
    # Of the metrics, which are few, and not of the images.
    assert sum(found["validation"]["waits"].values()) <= 15, found["validation"]["waits"]
    assert sum(found["grids"]["waits"].values()) <= 10, found["grids"]["waits"]
    assert sum(found["checkpoint"]["waits"].values()) == 1, found["checkpoint"]["waits"]


@pytest.mark.parametrize("case", CASES)
def test_a_step_launches_few_operations(walks, case):
    assert 300 < walks[case]["step"]["operations"] < 1000
    assert walks[case.split()[0] + " cpu"]["step"]["operations"] == 0


def test_mixed_devices_raise(tmp_path):
    if reason := pretended_cuda.reason_to_skip():
        pytest.skip(reason)
    code = "import pretended_cuda, torch\nwith pretended_cuda.install():\n    torch.ones(2, device='cuda') + torch.ones(2)\n"
    environment = pretended_cuda.environment(tmp_path)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "at least two devices, cuda:0 and cpu" in done.stderr
