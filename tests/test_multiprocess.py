"""Two processes do what one does with the same batch, and launchers pass the configuration on."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from multiprocess_worker import record
from safetensors.torch import load_file

from training.config import config_from_dict
from training.distributed import resolve_precision
from training.run_files import DISCRIMINATOR_FILE

pytestmark = pytest.mark.multiprocess

ROOT = Path(__file__).parent.parent
# One step an epoch. No validation is ten times better than the first, so the plateau lowers the rate after epoch 3 and
# early stopping ends the run after epoch 4.
PRESETS = {
    "num_epochs": 20,
    "max_images_per_epoch": 4,
    "learning_rate": 3e-4,
    "lr_warmup_steps": 0,
    "plateau_threshold": 0.9,
    "plateau_patience": 1,
    "early_stopping_patience": 3,
    "kl_warmup_images": 4,
}


def settings(folder: Path, faces: Path, micro_batch_size: int) -> dict:
    folder.mkdir()
    presets = PRESETS | {"micro_batch_size": micro_batch_size}
    return tiny.tiny_settings(folder, faces, training_presets=presets, output={"sample_every_epochs": 20})


def environment(folder: Path) -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "HF_"))}
    own |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1"}
    return own | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}


# Two processes with two micro-batches of one image, or one micro-batch of two (DDP: static graph).
@pytest.fixture(scope="module", params=[1, 2])
def folders(request, tmp_path_factory, faces) -> tuple[Path, Path]:
    """The records of one process (micro-batches of 3 and 1 images) and of two."""
    base = tmp_path_factory.mktemp("multiprocess")
    one, two = base / "one", base / "two"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the two processes have it: the number of threads decides how sums are rounded
    try:
        with tiny.process_state():
            record(config_from_dict(settings(one, faces, micro_batch_size=3)), one)
    finally:
        torch.set_num_threads(threads)
    values = settings(two, faces, micro_batch_size=request.param)
    (two / "config.json").write_text(json.dumps(values))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(ROOT / "tests" / "multiprocess_worker.py"), str(two / "config.json"), str(two)]
    done = subprocess.run(command, cwd=base, env=environment(base), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return one, two


def facts(folder: Path, rank: int = 0) -> dict:
    return json.loads((folder / f"rank{rank}.json").read_text())


def tensors(folder: Path, kind: str, rank: int = 0) -> dict[str, torch.Tensor]:
    return load_file(folder / f"rank{rank}_{kind}.safetensors")


def test_two_processes_were_started_and_read_one_batch(folders):
    one, two = folders
    assert facts(one)["processes"] == 1
    assert [facts(two, rank)["processes"] for rank in (0, 1)] == [2, 2]
    halves = [facts(two, rank)["example_ids"] for rank in (0, 1)]
    assert [len(half) for half in halves] == [2, 2]
    assert halves[0] + halves[1] == facts(one)["example_ids"]


def test_gradients_equal_those_of_one_process(folders):
    one, two = (tensors(folder, "gradients") for folder in folders)
    assert one.keys() == two.keys()
    scale = max(gradient.abs().max().item() for gradient in one.values())
    for name, gradient in one.items():
        torch.testing.assert_close(
            two[name], gradient, rtol=1e-5, atol=3e-5 * scale, msg=lambda text, n=name: f"{n}: {text}"
        )
    norm = sum(gradient.square().sum() for gradient in one.values()).sqrt()
    difference = sum((two[name] - gradient).square().sum() for name, gradient in one.items()).sqrt()
    assert difference <= 1e-5 * norm
    other_rank = tensors(folders[1], "gradients", rank=1)
    assert all(torch.equal(gradient, two[name]) for name, gradient in other_rank.items())


def test_a_training_ends_at_the_same_weights(folders):
    one, two = (tensors(folder, "last") for folder in folders)
    first, other_first = (tensors(folder, "first") for folder in folders)
    assert all(torch.equal(weight, other_first[name]) for name, weight in first.items())
    moved = sum((one[name] - weight).square().sum() for name, weight in first.items()).sqrt()
    apart = sum((two[name] - weight).square().sum() for name, weight in one.items()).sqrt()
    assert moved > 0.01
    # Adam turns the smallest gradients, rounding errors among them, into steps as long as the others.
    assert apart <= 1e-3 * moved
    for name, weight in one.items():
        assert (two[name] - weight).abs().max() <= 1e-5, name
    other_rank = tensors(folders[1], "last", rank=1)
    assert all(torch.equal(weight, two[name]) for name, weight in other_rank.items())


def test_every_process_decides_as_one_process_does(folders):
    one, two = folders
    single, first, second = facts(one), facts(two), facts(two, rank=1)
    assert (first["trace"], first["code"], first["steps"]) == (second["trace"], second["code"], second["steps"])
    assert (single["code"], single["steps"]) == (first["code"], first["steps"]) == (0, 4)
    assert [entry["learning_rate"] for entry in single["trace"]] == [3e-4, 3e-4, 1.5e-4, 1.5e-4]
    assert [entry["early_stopping_bad_epochs"] for entry in single["trace"]] == [0, 1, 2, 3]
    for entry, other in zip(single["trace"], first["trace"], strict=True):
        exact = ("learning_rate", "early_stopping_bad_epochs", "best_epoch")
        assert [other[name] for name in exact] == [entry[name] for name in exact]
        assert other["plateau"][1] == entry["plateau"][1]
        assert other["plateau"][0] == pytest.approx(entry["plateau"][0], rel=1e-5)
        assert other["kl"] == pytest.approx(entry["kl"], rel=1e-5)
        assert other["validation"] == pytest.approx(entry["validation"], rel=1e-4)


def test_only_the_main_process_writes(folders):
    (run,) = (folders[1] / "runs").iterdir()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == [1, 2, 4]
    logged = re.search(r"4 = 2 x 2 processes; (\d) x (\d) images per forward pass", (run / "training.log").read_text())
    assert int(logged[1]) * int(logged[2]) == 2
    assert "[0] INFO" in (run / "training.log").read_text() and "[1]" not in (run / "training.log").read_text()
    assert json.loads((run / "status.json").read_text())["reason"] == "no improvement in 3 epochs (early stopping)"
    assert len(list(run.glob("events.out.tfevents.*"))) == 1


def test_out_of_memory_on_one_process_is_out_of_memory_on_both(tmp_path):
    """Both processes repeat the step with smaller micro-batches and end at the weights of a run that started with them."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(ROOT / "tests" / "memory_worker.py"), str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    short, other, plain = (load_file(tmp_path / f"{name}.safetensors") for name in ("short0", "short1", "plain0"))
    for name, weight in plain.items():
        assert torch.equal(short[name], other[name])
        # The first step had other micro-batches, whose sums round differently; Adam makes a rounding error of a gradient near
        # zero a step of up to the learning rate, 1e-3.
        torch.testing.assert_close(short[name], weight, rtol=1e-3, atol=1e-3)
    moved = sum((short[name] - weight).abs().mean() for name, weight in plain.items())
    assert moved < 1e-3 * len(plain)


def test_a_plain_launch_gets_the_configurations_precision(tmp_path, monkeypatch):
    """`accelerate launch` exports a precision even where nobody chose one; it must not win over the configuration's."""
    script = tmp_path / "script.py"
    script.write_text("import os; print('precision', os.environ['ACCELERATE_MIXED_PRECISION'])")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    done = subprocess.run(
        [*launch, str(script)], cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    precision, exported = done.stdout.split()
    assert precision == "precision"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", exported)
    assert resolve_precision("bf16", torch.device("cpu")) == ("bf16", "the configuration")


def test_two_processes_equal_one_in_bf16_with_an_adversarial_term_and_muon(tmp_path, faces):
    """The same micro-batches of two images; the discriminators stay equal."""
    presets = {"num_epochs": 3, "max_images_per_epoch": 4, "micro_batch_size": 2, "lr_warmup_steps": 0}
    presets |= {"mixed_precision": "bf16", "optimizer": "muon", "learning_rate": 3e-4}
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        loss = {"adversarial_weight": 0.5, "adversarial_start_images": 4}
        values = tiny.tiny_settings(folder, faces, loss=loss, training_presets=presets)
        (folder / "config.json").write_text(json.dumps(values))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command += [str(ROOT / "tests" / "multiprocess_worker.py"), str(folder / "config.json"), str(folder)]
        done = subprocess.run(command, env=environment(tmp_path), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    one, two = tmp_path / "1", tmp_path / "2"
    for name, gradient in tensors(one, "gradients").items():
        torch.testing.assert_close(tensors(two, "gradients")[name], gradient, rtol=1e-3, atol=1e-6)
    for name, weight in tensors(two, "last").items():
        assert torch.equal(tensors(two, "last", rank=1)[name], weight), name
    first, second = (
        load_file(next(folder.glob("runs/*/checkpoints/step_00000003")) / DISCRIMINATOR_FILE) for folder in (one, two)
    )
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-2, atol=1e-5)
