"""Several processes that are stopped, killed and fed NaN, by the launchers that people use; and what each returns.

Interpreters that a launcher starts are few here, because each takes seconds; all other processes are forked.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import tiny
import torch
from runs import differences, fork, metric_lines, run_ranks, wait_for_all
from safetensors.torch import load_file, save_file

from training import step as step_module
from training.config import Config, config_from_dict
from training.distributed import join_processes
from training.run_files import MODEL_FILE, list_checkpoints, read_state, verify
from training.trainer import Trainer

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]

ROOT = Path(__file__).parent.parent
STEPS = 20  # of an epoch, of two
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ACCELERATE = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]


def settings(folder: Path, faces: Path) -> dict:
    """Two micro-batches of one image in each process and step; a checkpoint every other step."""
    return tiny.tiny_settings(
        folder,
        faces,
        data={"synthetic_train_images": 4 * STEPS},
        loss={"perceptual_weight": 0, "lpips_weight": 0},
        training_presets={"micro_batch_size": 1},
        output={"checkpoint_every_images": 8, "log_every_steps": 1, "sample_every_epochs": 2},
    )


def run_dir_of(config: Config) -> Path:
    (run_dir,) = Path(config.output.runs_dir).iterdir()
    return run_dir


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, faces, finished) -> Path:
    """The folder of a run of two processes that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    config = config_from_dict(settings(folder, faces))
    assert run_ranks(config, None, folder / "log", ranks=2) == [0, 0], (folder / "log").read_text()
    return run_dir_of(config)


class Launched:
    """A launcher with two processes of `train_vae.py`, in a process group of their own."""

    def __init__(self, launcher: list[str], folder: Path, values: dict) -> None:
        (folder / "config.json").write_text(json.dumps(values))
        self.config, self.log = config_from_dict(values), folder / "launched.log"
        own = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "HF_"))}
        own |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HOME": str(folder / "hf")}
        own["HF_HUB_OFFLINE"] = "1"
        command = [sys.executable, *launcher, str(ROOT / "train_vae.py"), "--config", str(folder / "config.json")]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, cwd=folder, env=own, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        self.seen: dict[int, psutil.Process] = {}

    def trainers(self) -> dict[int, psutil.Process]:
        """Rank -> process, of those that live."""
        found = {}
        for each in psutil.Process(self.process.pid).children(recursive=True):
            self.seen[each.pid] = each
            environment = each.environ()
            if "LOCAL_RANK" in environment and "train_vae.py" in " ".join(each.cmdline()):
                found[int(environment["LOCAL_RANK"])] = each
        return found

    def wait_for_step(self, step: int, seconds: float = 240.0) -> None:
        """Wait until a step is in the metrics of the run."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for file in Path(self.config.output.runs_dir).glob("*/metrics.jsonl"):
                last = file.read_text().rpartition('"kind": "train"')[2]
                if last and int(last.partition('"step": ')[2].partition(",")[0] or -1) >= step:
                    return
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.002)
        raise AssertionError(f"step {step} did not come: {self.log.read_text()}")

    def ended(self) -> int:
        """Exit code of the launcher; nothing that it had started lives on."""
        self.trainers()
        code = self.process.wait(timeout=120)
        _, alive = psutil.wait_procs(list(self.seen.values()), timeout=20)
        assert not alive, f"orphans {alive}: {self.log.read_text()}"
        return code

    def close(self) -> None:
        for each in [*self.seen.values(), self.process]:
            try:
                each.kill()
            except (psutil.NoSuchProcess, ProcessLookupError):
                pass


@pytest.fixture
def launch(tmp_path, faces):
    launched = []

    def start(launcher: list[str]) -> Launched:
        launched.append(Launched(launcher, tmp_path, settings(tmp_path, faces)))
        return launched[-1]

    yield start
    for each in launched:
        each.close()


def assert_stopped(launched: Launched) -> Path:
    """It ended by SIGTERM, with a checkpoint of the step that it had got to; returns the run's folder."""
    run_dir = run_dir_of(launched.config)
    status = json.loads((run_dir / "status.json").read_text())
    assert (status["state"], status["reason"]) == ("stopped", "SIGTERM"), launched.log.read_text()
    newest = list_checkpoints(run_dir)[-1]
    verify(newest)
    assert read_state(newest)["progress"]["step"] == status["step"] < 2 * STEPS
    assert (
        "stopped by SIGTERM; resume with the same command and --resume auto" in (run_dir / "training.log").read_text()
    )
    assert not list((run_dir / "checkpoints").glob(".*"))
    assert "Warning" not in (run_dir / "training.log").read_text()  # of Python: those of a library tell users nothing
    return run_dir


def test_torchrun_restarts_after_a_killed_rank_and_its_group_stops_on_a_signal(launch, undisturbed, tmp_path):
    """SIGKILL for one of two processes in mid-epoch, a restart by itself, SIGTERM for all of them, and a resume."""
    launched = launch([*TORCHRUN, "--max-restarts", "1"])
    launched.wait_for_step(5)
    first = launched.trainers()
    first[1].kill()
    launched.wait_for_step(STEPS + 3)
    second = launched.trainers()
    assert second.keys() == {0, 1} and not {each.pid for each in first.values()} & {
        each.pid for each in second.values()
    }
    os.killpg(launched.process.pid, signal.SIGTERM)
    code = launched.ended()
    run_dir = assert_stopped(launched)
    log = (run_dir / "training.log").read_text()
    assert "restarted by the launcher: resuming its run" in log
    resumed_at = int(log.partition("step_")[2][:8])
    assert 0 < resumed_at < STEPS
    assert code == 1  # torchrun does not hand on what its processes return
    config = launched.config
    assert run_ranks(config, "auto", tmp_path / "log", ranks=2) == [0, 0], (tmp_path / "log").read_text()
    assert differences(run_dir, undisturbed) == []


def test_accelerate_launch_hands_on_a_signal_and_the_number_of_processes_is_compared(launch, undisturbed, tmp_path):
    launched = launch(ACCELERATE)
    launched.wait_for_step(5)
    launched.process.send_signal(signal.SIGTERM)  # for the launcher alone
    code = launched.ended()
    run_dir = assert_stopped(launched)
    assert code == 1
    config, log = launched.config, tmp_path / "log"
    assert run_ranks(config, "auto", log) == [99]
    refused = "the checkpoint was trained with other values of processes (2 -> 1)"
    assert refused in log.read_text() and "--allow-changed processes" in log.read_text()
    assert run_ranks(config, "auto", log, allow_changed=["processes"]) == [0], log.read_text()
    assert "resume: processes was 2, is now 1" in (run_dir / "training.log").read_text()
    # The mathematics is the same, and sums round differently.
    mine, its = (load_file(list_checkpoints(each)[-1] / MODEL_FILE) for each in (run_dir, undisturbed))
    for name, weight in its.items():
        torch.testing.assert_close(mine[name], weight, rtol=1e-3, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}")


def test_restarted_processes_meet_each_other_and_not_the_dead(session, tmp_path):
    """torchrun keeps its store over a restart, with the addresses of the processes before; the first to look has luck
    at best. Here the second process is late, so that the first one looks when only the old address is there."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    log = tmp_path / "log"

    def meet(late: float) -> int:
        time.sleep(late)
        state = join_processes()
        total = torch.tensor(1.0)
        torch.distributed.all_reduce(total)
        return 0 if state.num_processes == int(total) == 2 else 1

    for restart in range(6):  # which side connects to which is decided by their ports, so that luck is possible
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
        group |= {"WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "1", "TORCHELASTIC_RESTART_COUNT": str(restart)}
        ranks = [{**group, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in (0, 1)]
        children = [fork(lambda late=0.5 * rank: meet(late), log, **each) for rank, each in enumerate(ranks)]
        assert wait_for_all(children, 60) == [0, 0], log.read_text()


def poison(trainer: Trainer, folder: Path) -> None:
    """On the second process only: NaN in the loss of step 3, in a gradient of step 6, in the images of step 9."""
    rank = trainer.accelerator.process_index
    finish, at = trainer._finish, {"step": -1}

    def finish_and_save(reason: str) -> bool:
        is_published = finish(reason)
        tensors = {name: value.detach().contiguous() for name, value in trainer.model.state_dict().items()}
        tensors |= {f"average.{i}": value.contiguous() for i, value in enumerate(trainer.ema.shadow_params)}
        save_file(tensors, folder / f"rank{rank}.safetensors")
        return is_published

    trainer._finish = finish_and_save
    if rank == 0:
        return
    gradients, loss, normalize = trainer.train_step.gradients, step_module.vae_loss, step_module.normalize

    def noted(*args, step: int, **kwargs):
        at["step"] = step
        return gradients(*args, step=step, **kwargs)

    def bad(step: int, function: Callable, change: Callable) -> Callable:
        return lambda *args, **kwargs: change(function(*args, **kwargs), at["step"] == step)

    trainer.train_step.gradients = noted
    step_module.vae_loss = bad(3, loss, lambda result, now: (result[0] * (math.nan if now else 1), result[1]))
    trainer.setup.parameters[-1].register_hook(lambda gradient: gradient * (math.nan if at["step"] == 6 else 1))
    step_module.normalize = bad(9, normalize, lambda pixels, now: pixels * (math.nan if now else 1))


def test_nan_on_one_process_is_skipped_by_both(faces, finished, tmp_path):
    values = settings(tmp_path, faces)
    values["training_presets"]["num_epochs"] = 1
    config, log = config_from_dict(values), tmp_path / "log"
    codes = run_ranks(config, None, log, ranks=2, prepare=lambda trainer: poison(trainer, tmp_path))
    assert codes == [0, 0], log.read_text()
    run_dir = run_dir_of(config)
    skipped = {line["step"]: line["optim/skipped_steps"] for line in metric_lines(run_dir) if line["kind"] == "train"}
    assert [skipped[step] for step in (3, 4, 6, 7, 9, 10, STEPS)] == [0, 1, 1, 2, 2, 3, 3]
    events = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    skips = {line["step"]: line["message"] for line in events if "skipped: " in line.get("message", "")}
    assert all("skipped: the gradient is not finite (images " in skips[step] for step in (4, 7, 10))
    mine, its = (load_file(tmp_path / f"rank{rank}.safetensors") for rank in (0, 1))
    assert mine.keys() == its.keys()
    for name, value in mine.items():
        assert torch.equal(value, its[name]) and value.isfinite().all(), name
