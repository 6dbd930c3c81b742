"""Checkpoints under faults: a write fails or is killed at every system call; every file is damaged in every way."""

from __future__ import annotations

import errno
import json
import logging
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import tiny
import torch
from accelerate import Accelerator
from faults import watched_calls
from runs import EPOCHS, differences, run

from modeling.autoencoder_kl_ultra import AutoencoderKLUltra
from training.checkpoint.format import (
    CheckpointWriter,
    Snapshot,
    copy_into,
    quarantine_newer,
    read_tensors,
    sweep,
    write_checkpoint,
)
from training.checkpoint.resume import newest_valid
from training.checkpoint.state import TrainingState
from training.io import file_sha256
from training.run_files import (
    FORMAT,
    MANIFEST,
    MODEL_FILE,
    OPTIMIZER_FILE,
    STATE_FILE,
    InvalidCheckpointError,
    list_checkpoints,
    read_state,
    verify,
)
from training.trainer import Trainer


def snapshot(step: int, mark: str = "", best: int | None = None) -> Snapshot:
    tensors = {MODEL_FILE: {"weight": torch.full((3, 2), step)}, OPTIMIZER_FILE: {"step": torch.tensor(float(step))}}
    return Snapshot(step, {"config.json": b"{}\n"}, tensors, {"step": step, "mark": mark, "processes": 1}, best)


def names(run_dir: Path) -> list[str]:
    return [path.name for path in list_checkpoints(run_dir)]


def hidden(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").glob(".*"))


def tree(folder: Path) -> dict[str, bytes | str]:
    """Every file below a folder and its content, and every link and its target; locks apart."""
    paths = [path for path in folder.rglob("*") if path.name not in (".lock", "run.lock")]
    found = {str(p.relative_to(folder)): os.readlink(p) if p.is_symlink() else p for p in paths}
    return {name: p.read_bytes() if isinstance(p, Path) and p.is_file() else str(p) for name, p in found.items()}


@pytest.fixture
def two(tmp_path) -> Path:
    """A run with checkpoints of the steps 1, which is the best, and 2."""
    run_dir = tmp_path / "two" / "run"
    for step in (1, 2):
        write_checkpoint(run_dir, snapshot(step, best=1), keep=2)
    return run_dir


# ---- writing ----


def test_the_content_of_a_checkpoint_and_its_manifest(two):
    newest = two / "checkpoints" / "step_00000002"
    manifest = verify(newest)
    assert (manifest["step"], manifest["format"]) == (2, FORMAT)
    assert manifest["versions"]["torch"] == torch.__version__
    assert set(manifest["files"]) == {str(path.relative_to(newest)) for path in newest.rglob("*") if path.is_file()} - {
        MANIFEST
    }
    assert read_state(newest)["step"] == 2
    assert torch.equal(read_tensors(newest, MODEL_FILE)["weight"], torch.full((3, 2), 2))
    assert read_tensors(newest, "training_state/weights.safetensors") == {}
    assert os.readlink(newest.with_name("latest")) == "step_00000002"
    assert os.readlink(newest.with_name("best")) == "step_00000001"


def test_older_checkpoints_are_removed_and_the_best_is_kept(two):
    for step in (3, 4, 5):
        write_checkpoint(two, snapshot(step, best=1), keep=2)
    assert names(two) == ["step_00000001", "step_00000004", "step_00000005"]
    write_checkpoint(two, snapshot(6, best=6), keep=2)
    assert names(two) == ["step_00000005", "step_00000006"]
    assert os.readlink(two / "checkpoints" / "best") == "step_00000006" and not hidden(two)


def test_everything_is_fsynced_before_the_rename(two):
    """Files, then folders, then the rename, then the folder that holds the name."""
    calls, opened = [], {}
    original = os.open

    def note_open(path, *args, **kwargs):
        descriptor = original(path, *args, **kwargs)
        opened[descriptor] = Path(path).name
        return descriptor

    os.open = note_open
    try:
        with watched_calls(lambda name, args: calls.append((name, opened.get(args[0], args[0])))):
            write_checkpoint(two, snapshot(3), keep=9)
    finally:
        os.open = original
    synced = [str(what) for name, what in calls if name == "fsync"]
    assert synced == [
        *("config.json", Path(MODEL_FILE).name, Path(OPTIMIZER_FILE).name, Path(STATE_FILE).name, MANIFEST),
        *("model", "training_state", ".writing_step_00000003"),
        *("checkpoints", "run", "two"),
    ]
    given = next(i for i, (name, what) in enumerate(calls) if name == "replace" and "writing" in str(what))
    assert [name for name, _ in calls[:given]].count("fsync") == 8


@pytest.mark.parametrize("step", [3, 2], ids=["a new step", "a step that has one"])
@pytest.mark.parametrize("fault", ["ENOSPC once", "EIO once", "ENOSPC from then on", "EIO from then on", "killed"])
def test_a_fault_at_any_call_of_a_write_loses_at_most_that_checkpoint(two, tmp_path, monkeypatch, step, fault):
    """Each call in turn; afterwards the newest valid checkpoint is found, and the next write cleans up."""
    code = getattr(errno, fault.split()[0], None)

    class Killed(BaseException):
        pass

    def attempt(run_dir: Path, failing: int) -> tuple[int, bool]:
        count = 0

        def watch(name: str, args: tuple) -> None:
            nonlocal count
            count += 1
            if count == failing or (count > failing and "once" not in fault):
                if code is None:
                    if name == "write" and count == failing:
                        os.pwrite(args[0], args[1][: len(args[1]) // 2], 0)  # half of it is written
                    raise Killed
                raise OSError(code, os.strerror(code))

        try:
            with watched_calls(watch):
                write_checkpoint(run_dir, snapshot(step, mark="again", best=1), keep=2)
            return count, True
        except (OSError, Killed):
            return count, False

    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # counted, but not waited for
    shutil.copytree(two, tmp_path / "complete" / "run", symlinks=True)
    calls, written = attempt(tmp_path / "complete" / "run", 10**9)
    assert written and calls >= 40
    outcomes = set()
    for failing in range(1, calls + 1):
        run_dir = tmp_path / f"{failing}" / "run"
        shutil.copytree(two, run_dir, symlinks=True)
        _, written = attempt(run_dir, failing)
        if fault != "killed":
            for each in list_checkpoints(run_dir):
                verify(each)
            if (
                "once" in fault and not written
            ):  # the new checkpoint may be valid, although its rename may not be on disk
                assert hidden(run_dir) in ([], [".replaced_step_00000002"])
        sweep(run_dir)  # as a resume does
        assert not hidden(run_dir)
        newest, skipped = newest_valid(run_dir, None)
        assert not skipped  # a checkpoint with its final name is valid
        there = (newest.name, read_state(newest)["mark"])
        assert there in {("step_00000002", ""), (f"step_{step:08d}", "again")}
        if written:
            assert there == (f"step_{step:08d}", "again")
        assert {"step_00000001", "step_00000002"} <= set(names(run_dir))  # the best, and one of the last two
        outcomes.add((written, there[1]))
        write_checkpoint(run_dir, snapshot(4, best=1), keep=2)
        assert names(run_dir)[-1] == "step_00000004" and len(names(run_dir)) == 3 and not hidden(run_dir)
        assert os.readlink(run_dir / "checkpoints" / "latest") == "step_00000004"
        shutil.rmtree(run_dir.parent)
    assert {(False, "")} <= outcomes and any(mark == "again" for _, mark in outcomes)


def test_free_space_is_checked_before_a_write(two, monkeypatch):
    before = tree(two)
    needed = snapshot(3).size
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=needed - 1))
    with pytest.raises(OSError, match=r"needs 0\.01 GiB and .* has 0\.01 GiB free: make room, or lower output\.keep_"):
        write_checkpoint(two, snapshot(3), keep=2)
    assert tree(two) == before
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=needed))
    write_checkpoint(two, snapshot(3), keep=2)
    assert names(two) == ["step_00000002", "step_00000003"]


def test_a_folder_that_cannot_be_fsynced_is_ignored(two):
    """Some network disks answer EINVAL for folders."""

    def watch(name, args):
        if name == "fsync" and os.path.isdir(f"/proc/self/fd/{args[0]}"):
            raise OSError(errno.EINVAL, "Invalid argument")

    with watched_calls(watch):
        verify(write_checkpoint(two, snapshot(3), keep=2))


def test_older_checkpoints_that_cannot_be_removed_are_logged(two, caplog):
    def watch(name, args):
        if name == "rmdir" or (name == "replace" and "removed" in str(args[1])):
            raise OSError(errno.EROFS, "Read-only file system")

    with watched_calls(watch), caplog.at_level(logging.WARNING):
        write_checkpoint(two, snapshot(3), keep=2)
    assert names(two) == ["step_00000001", "step_00000002", "step_00000003"]
    assert "step_00000003 is valid, but older checkpoints could not be removed" in caplog.text


def test_the_writer_reports_an_error_and_continues(two, monkeypatch):
    writer = CheckpointWriter(two, keep=2)
    assert writer.wait() is None and not writer.is_done
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    writer.start(snapshot(3))
    step, error = writer.wait()
    assert step == 3 and error.startswith("OSError: a checkpoint needs") and not writer.is_done
    monkeypatch.undo()
    writer.start(snapshot(4))
    assert writer.wait() == (4, None)
    assert writer.wait() is None
    assert names(two) == ["step_00000002", "step_00000004"]


def test_host_copies_are_independent_of_training():
    model = torch.nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters())
    state = TrainingState(Accelerator(cpu=True), model, optimizer, None, {})
    state.create_optimizer_state()
    wanted = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    copies = state.host_tensors()
    with torch.no_grad():
        model.weight.zero_()
    assert copies[OPTIMIZER_FILE].keys() == {
        f"{kind}/{name}" for kind in ("step", "exp_avg", "exp_avg_sq") for name in wanted
    }
    for name, copied in copies[MODEL_FILE].items():
        assert torch.equal(copied, wanted[name]) and copied.is_contiguous() and not copied.requires_grad
    assert safetensors.torch.load(safetensors.torch.save(copies[MODEL_FILE])).keys() == wanted.keys()


def test_the_state_created_before_the_first_step_changes_nothing():
    def weights_after_a_step(created: bool) -> torch.Tensor:
        torch.manual_seed(0)
        model = torch.nn.Conv2d(2, 3, 3)
        optimizer = torch.optim.Adam(model.parameters(), fused=True)
        if created:
            TrainingState(Accelerator(cpu=True), model, optimizer, None, {}).create_optimizer_state()
            assert len(optimizer.state) == 2
        model(torch.ones(1, 2, 3, 3)).sum().backward()
        optimizer.step()
        return model.weight.detach()

    assert torch.equal(weights_after_a_step(True), weights_after_a_step(False))


def test_newer_checkpoints_are_quarantined(two):
    write_checkpoint(two, snapshot(3), keep=9)
    assert quarantine_newer(two, two / "checkpoints" / "step_00000001") == [
        "quarantined_0_step_00000002",
        "quarantined_0_step_00000003",
    ]
    write_checkpoint(two, snapshot(2), keep=9)
    assert quarantine_newer(two, two / "checkpoints" / "step_00000001") == ["quarantined_1_step_00000002"]
    for each in (two / "checkpoints").glob("quarantined_*"):
        verify(each)


# ---- reading ----


class Bomb:
    """A pickle of this makes a file when it is loaded."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def replace_by_link(path: Path) -> None:
    copy = path.with_name(path.name + ".copy").rename(Path(f"{path.parents[3]}_{path.name}.copy"))
    path.unlink()
    path.symlink_to(copy)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size - 2),
    "one bit flipped": flip_a_bit,
    "emptied": lambda path: os.truncate(path, 0),
    "removed": lambda path: path.unlink(),
    "a link to an equal file": lambda path: (shutil.copy(path, str(path) + ".copy"), replace_by_link(path)),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a pickle": lambda path: path.write_bytes(pickle.dumps(Bomb(path.parents[2] / "exploded"))),
}
FILES = ("model/config.json", MODEL_FILE, OPTIMIZER_FILE, STATE_FILE, MANIFEST)


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_detected_and_the_older_checkpoint_taken(two, how, name):
    newest = two / "checkpoints" / "step_00000002"
    DAMAGE[how](newest / name)
    found, (skipped,) = newest_valid(two, None)
    assert found == newest.with_name("step_00000001")
    assert re.match(rf"resume: skipped {newest}: (its )?{re.escape(name)} ", skipped)
    with pytest.raises(ValueError, match="step_00000002.*give another checkpoint of the run, or the run"):
        newest_valid(two, newest)
    assert not list(two.rglob("exploded"))


def with_files(change: Callable[[dict], object]) -> Callable[[dict], object]:
    return lambda manifest: change(manifest["files"])


def entry(name: str, **values) -> Callable[[dict], object]:
    return with_files(lambda files: files.update({name: {**files[STATE_FILE], **values}}))


MANIFESTS: dict[str, tuple[Callable[[dict], object], str]] = {
    "a path upwards": (entry("model/../../../x"), "lists 'model/../../../x', outside of its folder"),
    "an absolute path": (entry("/etc/hostname"), "lists '/etc/hostname', outside of its folder"),
    "a Windows path": (entry("..\\x"), "outside of its folder"),
    "a path with a NUL": (entry("model/\0"), "outside of its folder"),
    "a path too long": (entry("x" * 5000), "cannot be read|missing"),
    "a path that is a folder": (entry("model"), "model is missing or not a plain file"),
    "an empty path": (entry(""), "is missing or not a plain file"),
    "a file that is not there": (entry("model/more.json"), "model/more.json is missing"),
    "another format": (
        lambda m: m.update(format=FORMAT + 1),
        f"has format {FORMAT + 1}, and this version reads format {FORMAT}",
    ),
    "no format": (lambda m: m.pop("format"), "cannot be read"),
    "no files": (lambda m: m.pop("files"), "cannot be read"),
    "a list of files": (lambda m: m.update(files=[]), "cannot be read"),
    "a file less": (with_files(lambda files: files.pop(OPTIMIZER_FILE)), f"does not list {OPTIMIZER_FILE}"),
    "a size that is none": (entry(STATE_FILE, size=None), "cannot be read"),
    "an infinite size": (entry(STATE_FILE, size=float("inf")), "cannot be read"),
    "a negative size": (entry(STATE_FILE, size=-1), "bytes instead of -1"),
    "no digest": (entry(STATE_FILE, sha256=""), "SHA-256 differs"),
}


@pytest.mark.parametrize("how", MANIFESTS)
def test_an_invalid_manifest_is_refused(two, how):
    change, reason = MANIFESTS[how]
    path = two / "checkpoints" / "step_00000002" / MANIFEST
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(InvalidCheckpointError, match=reason):
        verify(path.parent)


@pytest.mark.parametrize(
    "content",
    [
        b"null",
        b"[1]",
        b"5",
        b'"x"',
        b"{}",
        b"\xff\xfe",
        b"[" * 100_000,
        b" " * (17 << 20),
        b'{"format": 1, "files": 5}',
    ],
    ids=["null", "a list", "a number", "a string", "empty", "not text", "deep", "huge", "files a number"],
)
def test_a_file_that_is_not_a_manifest_is_refused(two, content):
    path = two / "checkpoints" / "step_00000002" / MANIFEST
    path.write_bytes(content)
    with pytest.raises(InvalidCheckpointError, match=f"its {MANIFEST} cannot be read"):
        verify(path.parent)


def test_a_folder_that_is_a_link_is_refused(two, tmp_path):
    model = two / "checkpoints" / "step_00000002" / "model"
    shutil.move(model, tmp_path / "elsewhere")
    model.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InvalidCheckpointError, match="model/config.json is missing or not a plain file"):
        verify(model.parent)


def test_without_a_valid_checkpoint_the_error_names_all(two):
    for each in list_checkpoints(two):
        os.truncate(each / MODEL_FILE, 1)
    with pytest.raises(ValueError, match="no checkpoint can be used .*step_00000002.*step_00000001.*restore one of th"):
        newest_valid(two, None)


def test_a_pickle_that_the_manifest_lists_is_not_executed(two, finished, tmp_path):
    newest = two / "checkpoints" / "step_00000002"
    for name in (MODEL_FILE, OPTIMIZER_FILE, STATE_FILE):
        (newest / name).write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
        with pytest.raises((safetensors.SafetensorError, ValueError)):
            read_state(newest) if name == STATE_FILE else read_tensors(newest, name)
    model = tmp_path / "model"
    shutil.copytree(list_checkpoints(finished.folder)[-1] / "model", model)
    for name in ("diffusion_pytorch_model.bin", "pytorch_model.bin"):
        (model / name).write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    AutoencoderKLUltra.from_pretrained(model, use_safetensors=True)
    (model / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(OSError, match="safetensors"):
        AutoencoderKLUltra.from_pretrained(model, use_safetensors=True)
    assert not (tmp_path / "exploded").exists()
    pickle.loads(pickle.dumps(Bomb(tmp_path / "exploded"))).close()
    assert (tmp_path / "exploded").exists()  # the bomb works


def test_tensors_of_another_model_are_refused_by_name():
    live = {"a": torch.zeros(2), "b": torch.zeros(3)}
    with pytest.raises(ValueError, match="here b is missing in the checkpoint"):
        copy_into(live, {"a": torch.ones(2)}, "here")
    with pytest.raises(ValueError, match="here c is unknown in the checkpoint"):
        copy_into(live, {"a": torch.ones(2), "b": torch.ones(3), "c": torch.ones(1)}, "here")
    with pytest.raises(ValueError, match=r"here a has shape \(3,\) in the checkpoint and \(2,\) here"):
        copy_into(live, {"a": torch.ones(3), "b": torch.ones(3)}, "here")
    assert not any(tensor.any() for tensor in live.values())


def test_the_fp16_gradient_scaler_is_restored():
    """Its state survives JSON."""

    def state() -> TrainingState:
        model = torch.nn.Linear(2, 1)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
        accelerator = SimpleNamespace(scaler=scaler, is_main_process=True, num_processes=1, device=torch.device("cpu"))
        return TrainingState(accelerator, model, torch.optim.Adam(model.parameters()), None, {})

    def update(each: TrainingState, factor: float) -> None:
        scaler, optimizer = each.accelerator.scaler, each.optimizer
        optimizer.zero_grad()
        scaler.scale(each.model(torch.ones(1, 2)).sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()

    first, second = state(), state()
    for factor in (float("inf"), 1.0, 1.0):  # backs off; the third finite step after that grows the scale
        update(first, factor)
    saved = json.loads(json.dumps(first.values()))
    assert (saved["scaler"]["scale"], saved["scaler"]["_growth_tracker"]) == (512.0, 2)
    second.accelerator.scaler.load_state_dict(saved["scaler"])
    for each in (first, second):
        update(each, 1.0)
        assert each.accelerator.scaler.state_dict()["scale"] == 1024.0


# ---- runs ----


def copy_of(finished, folder: Path, steps=(10, 15)) -> Path:
    """The checkpoints of the finished run, in a run of their own."""
    run_dir = folder / "runs" / "tiny_20000101_000000"
    for step in steps:
        name = f"checkpoints/step_{step:08d}"
        shutil.copytree(finished.folder / name, run_dir / name)
    shutil.copy(finished.folder / "metrics.jsonl", run_dir / "metrics.jsonl")
    return run_dir


def config_of(finished, faces: Path, folder: Path, **sections):
    return tiny.tiny_config(folder, faces, training_presets={"num_epochs": EPOCHS}, **sections)


def test_a_run_resumes_from_the_newest_valid_checkpoint(finished, faces, tmp_path):
    run_dir = copy_of(finished, tmp_path)
    flip_a_bit(run_dir / "checkpoints" / "step_00000015" / MODEL_FILE)
    (run_dir / "checkpoints" / ".writing_step_00000016").mkdir()
    again = run(config_of(finished, faces, tmp_path), "auto")
    assert (again.code, again.folder) == (0, run_dir)
    assert differences(run_dir, finished.folder) == []
    log = (run_dir / "training.log").read_text()
    assert f"skipped {run_dir}/checkpoints/step_00000015: {MODEL_FILE} is not what was written" in log
    assert "removed .writing_step_00000016, left by an interrupted write" in log
    # Quarantined: it does not count as one of the newest any more, and is not deleted.
    assert (run_dir / "checkpoints" / "quarantined_0_step_00000015").is_dir()
    assert names(run_dir) == ["step_00000010", "step_00000015"] and not hidden(run_dir)


def test_a_refused_resume_changes_no_file(finished, faces, tmp_path, session):
    run_dir = copy_of(finished, tmp_path)
    before = tree(run_dir)
    other = config_of(finished, faces, tmp_path, loss={"lpips_weight": 0.3})
    with pytest.raises(ValueError, match="was trained with other values of loss.lpips_weight"):
        Trainer(other, str(run_dir / "checkpoints" / "step_00000010"))
    assert tree(run_dir) == before
    for each in list_checkpoints(run_dir):
        os.truncate(each / STATE_FILE, 10)
    before = tree(run_dir)
    with pytest.raises(ValueError, match="no checkpoint can be used"):
        Trainer(config_of(finished, faces, tmp_path), "auto")
    assert tree(run_dir) == before


def test_a_damaged_best_model_is_replaced_by_the_next(finished, faces, tmp_path):
    """All epochs are done: the weights are validated once more and exported."""
    run_dir = copy_of(finished, tmp_path, steps=(15,))
    newest = run_dir / "checkpoints" / "step_00000015"
    shutil.copytree(newest, newest.with_name("step_00000005"))
    path = newest / STATE_FILE
    state = json.loads(path.read_text())
    state["progress"]["best"]["step"] = 5
    path.write_text(json.dumps(state))
    manifest = json.loads((newest / MANIFEST).read_text())
    manifest["files"][STATE_FILE] = {"size": path.stat().st_size, "sha256": file_sha256(path)}
    (newest / MANIFEST).write_text(json.dumps(manifest))
    flip_a_bit(newest.with_name("step_00000005") / MODEL_FILE)
    ended = run(config_of(finished, faces, tmp_path), "auto")
    assert (ended.code, ended.status["best"]["step"]) == (0, 15)
    assert "best model so far, step 5, is lost (model/" in (run_dir / "training.log").read_text()
    weights = AutoencoderKLUltra.from_pretrained(ended.status["model_dir"]).state_dict()
    saved = read_tensors(newest, MODEL_FILE)
    assert all(torch.equal(value, saved[name]) for name, value in weights.items())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's own thread ends
def test_a_full_disk_loses_outputs_and_never_ends_the_run(finished, faces, tmp_path, capfd):
    """Every output at once: metrics, status, log, grids, TensorBoard and the checkpoint at the end of the run."""
    run_dir = copy_of(finished, tmp_path, steps=(10,))
    (run_dir / "metrics.jsonl").unlink()
    (run_dir / "samples").mkdir()
    grids = [f"tiny_{kind}_epoch_0003.png" for kind in ("samples", "samples_gaussian", "reconstructions")]
    grids += ["tiny_final_samples.png", "tiny_final_samples_gaussian.png"]
    for name in ("metrics.jsonl", "status.json.tmp", "training.log", *(f"samples/{grid}" for grid in grids)):
        (run_dir / name).symlink_to("/dev/full")  # writes fail with ENOSPC
    checkpoint_10 = tree(run_dir / "checkpoints" / "step_00000010")

    def watch(name, args):
        if name == "write" and "/.writing_step" in os.readlink(f"/proc/self/fd/{args[0]}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with watched_calls(watch), tiny.process_state():
        trainer = Trainer(config_of(finished, faces, tmp_path), "auto")
        trainer.tracker.trackers["tensorboard"].writer.flush()
        (events,) = run_dir.glob("events.out.tfevents.*")
        events.unlink()
        events.symlink_to("/dev/full")
        assert trainer.run() == 0
    log = capfd.readouterr().err
    for what in ("metrics.jsonl", "status.json", "training.log", "samples/", "TensorBoard"):
        assert log.count(f"{what} failed, training continues") == 1, log
    assert log.count("the checkpoint of step 15 could not be written; older checkpoints are unchanged (OSError") == 1
    assert "finished: 3 epochs; best model of step 10" in log
    assert "Logging error" not in log
    assert names(run_dir) == ["step_00000010"] and not hidden(run_dir)
    assert tree(run_dir / "checkpoints" / "step_00000010") == checkpoint_10
