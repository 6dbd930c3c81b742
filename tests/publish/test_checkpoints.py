"""Checkpoints on the Hub: a run continues on another machine, through failing uploads and downloads."""

from __future__ import annotations

import shutil
import signal
import threading
import time
from pathlib import Path

import huggingface_hub
import pytest
import tiny
from fake_hub import TOKEN, FakeHub, Model
from runs import EPOCHS, differences, run

from training.publish.checkpoints import CheckpointUploader, download_run, link_checkpoints, push_checkpoints
from training.publish.hub import upload
from training.run_files import MODEL_FILE, PRIORS, list_checkpoints, step_folder
from training.trainer import EXIT_STOPPED, Trainer

REPO = "org/checkpoints"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    constants = huggingface_hub.constants
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with FakeHub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        url = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
        yield server


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    """A copy of a finished run, which a test may change."""
    return Path(shutil.copytree(finished.folder, tmp_path / "here" / finished.folder.name, symlinks=True))


def steps_on(hub: FakeHub) -> set[str]:
    return {name.split("/")[2] for name in hub.models[REPO].files if "/checkpoints/" in name}


def test_a_run_continues_on_another_machine_bit_for_bit(hub, finished, faces, tmp_path):
    presets, push = {"num_epochs": EPOCHS}, {"push_checkpoints": REPO}
    here, there = (
        tiny.tiny_config(tmp_path / name, faces, training_presets=presets, hub=push) for name in ("here", "there")
    )
    stopped = run(here, stop_after={8: signal.SIGTERM})
    assert stopped.code == EXIT_STOPPED and hub.models[REPO].private
    assert f"step_{stopped.status['step']:08d}" in steps_on(hub)  # uploaded before the process ended
    shutil.rmtree(tmp_path / "here")  # the machine is gone
    ended = run(there, f"hub://{REPO}")
    assert (ended.code, ended.folder.name) == (0, stopped.folder.name)
    assert [
        text for text in differences(ended.folder, finished.folder) if "metrics" not in text and "config" not in text
    ] == []
    assert steps_on(hub) == {path.name for path in list_checkpoints(ended.folder)} & {
        f"step_{step:08d}" for step in (ended.status["best"]["step"], 15)
    }
    log = (ended.folder / "training.log").read_text()
    assert f"downloaded the newest checkpoints to {ended.folder}" in log
    assert f"uploaded  step_00000015 of {ended.folder.name} to {REPO}" in log


def test_priors_of_the_initial_model_travel_with_the_run(hub, copied, tmp_path):
    prior = copied / PRIORS / "gaussian" / "config.json"
    prior.parent.mkdir(parents=True)
    prior.write_text("{}")
    push_checkpoints(copied, REPO, *link_checkpoints(copied))
    downloaded = download_run(f"hub://{REPO}", tmp_path / "there", "tiny")
    assert (downloaded / prior.relative_to(copied)).read_text() == "{}"


def test_the_repository_keeps_the_newest_and_the_best_checkpoint(hub, copied):
    push_checkpoints(copied, REPO, *link_checkpoints(copied))
    first = steps_on(hub)
    assert list_checkpoints(copied)[-1].name in first and len(first) <= 2
    newest = list_checkpoints(copied)[-1]
    shutil.copytree(newest, step_folder(copied, 16))
    push_checkpoints(copied, REPO, *link_checkpoints(copied))
    assert "step_00000016" in steps_on(hub) and len(steps_on(hub)) <= 2
    assert hub.models[REPO].commits[-1] == f"{copied.name}: step_00000016"


@pytest.mark.parametrize("kind", ["create", "preupload", "batch", "upload", "commit"])
@pytest.mark.parametrize("fault", ["cut", "503"])
def test_an_upload_that_is_interrupted_is_repeated(hub, copied, kind, fault):
    hub.push_faults[kind] = [fault, "ok"]
    push_checkpoints(copied, REPO, *link_checkpoints(copied))
    assert list_checkpoints(copied)[-1].name in steps_on(hub)


def test_a_failing_upload_is_logged_and_the_next_one_makes_up_for_it(hub, copied):
    warnings = []
    uploader = CheckpointUploader(copied, REPO, warnings.append)
    hub.push_faults["commit"] = ["403"]
    uploader.start()
    uploader.finish()
    assert len(warnings) == 1 and warnings[0].startswith(f"a checkpoint could not be uploaded to {REPO} (PushError: ")
    assert list_checkpoints(copied)[-1].name in steps_on(hub)


def test_checkpoints_that_training_removes_meanwhile_are_uploaded(hub, copied, monkeypatch):
    warnings, removed = [], threading.Event()

    def upload_later(*arguments, **options):
        assert removed.wait(60)
        return upload(*arguments, **options)

    monkeypatch.setattr("training.publish.checkpoints.upload", upload_later)
    uploader = CheckpointUploader(copied, REPO, warnings.append)
    newest = list_checkpoints(copied)[-1]
    uploader.start()
    newest.rename(copied / "removed")
    removed.set()
    assert uploader._running.result() == newest.name
    assert newest.name in steps_on(hub) and not (copied / ".upload").exists()
    (copied / "removed").rename(newest)
    uploader.finish()
    assert warnings == []


def test_a_checkpoint_that_is_damaged_on_the_way_is_refused(hub, copied, tmp_path):
    push_checkpoints(copied, REPO, *link_checkpoints(copied))
    files = hub.models[REPO].files
    name = next(name for name in files if name.endswith(MODEL_FILE))
    good, files[name] = files[name], files[name][:-1] + b"x"
    runs_dir = tmp_path / "there"
    with pytest.raises(ValueError, match=rf"--resume hub://{REPO}: step_\d+ is damaged .*SHA-256 differs.*: try again"):
        download_run(f"hub://{REPO}", runs_dir, "tiny")
    assert not list(runs_dir.glob("tiny_*"))
    files[name] = good
    run_dir = download_run(f"hub://{REPO}", runs_dir, "tiny")
    assert (run_dir / "run.json").is_file() and list_checkpoints(run_dir)[-1].name == "step_00000015"
    assert [path.name for path in runs_dir.iterdir()] == [run_dir.name]


def test_newer_checkpoints_on_this_machine_are_kept(hub, copied):
    push_checkpoints(copied, REPO, *link_checkpoints(copied))
    shutil.copytree(list_checkpoints(copied)[-1], step_folder(copied, 16))
    assert download_run(f"hub://{REPO}", copied.parent, "tiny") == copied
    assert list_checkpoints(copied)[-1].name == "step_00000016"


def test_what_cannot_be_resumed_is_an_error(hub, copied, tmp_path, faces, session):
    with pytest.raises(ValueError, match="--resume hub://org: write hub://organization/name"):
        download_run("hub://org", tmp_path, "tiny")
    with pytest.raises(
        ValueError, match="hub://org/nothing: the Hub refused or did not answer .*check the name, log in"
    ):
        download_run("hub://org/nothing", tmp_path, "tiny")
    push_checkpoints(copied, REPO, *link_checkpoints(copied))
    with pytest.raises(ValueError, match="it has no checkpoint of other: check output.run_name"):
        download_run(f"hub://{REPO}", tmp_path, "other")
    with pytest.raises(ValueError, match="hub.push_checkpoints to else/where: somebody is neither else nor a member"):
        Trainer(tiny.tiny_config(tmp_path, faces, hub={"push_checkpoints": "else/where"}))
    hub.models["org/public"] = Model(private=False)
    with pytest.raises(ValueError, match="hub.push_checkpoints names org/public, which is public: name a private repo"):
        Trainer(tiny.tiny_config(tmp_path, faces, hub={"push_checkpoints": "org/public"}))
    with pytest.raises(ValueError, match='hub.push_checkpoints must be "organization/name" or null'):
        tiny.tiny_config(tmp_path, faces, hub={"push_checkpoints": "where"})
