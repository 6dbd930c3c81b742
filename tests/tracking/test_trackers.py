"""Outputs of a run: a failing one is logged once, and training continues."""

from __future__ import annotations

import json
import logging
import math
import os

import pytest
import tiny
import torch
from accelerate import Accelerator
from accelerate.tracking import TensorBoardTracker
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from training.cli import UserError
from training.config import TOKEN
from training.tracking.trackers import LogFile, RedactingFormatter, Tracker, log_failed, setup_logging

WHERE = {"step": 5, "epoch": 1, "images_seen": 320}


@pytest.fixture
def tracker(tmp_path, session):
    accelerator = Accelerator(cpu=True)
    tracker = Tracker(accelerator, tmp_path, {"a.b": 1}, {"num_epochs": 2})
    yield tracker
    tracker.close()


def lines(tracker: Tracker) -> list[dict]:
    return [json.loads(text) for text in (tracker.run_dir / "metrics.jsonl").read_text().splitlines()]


def test_the_log_file_has_the_traceback_of_a_bug(tmp_path, capsys, session):
    setup_logging(Accelerator(cpu=True), tmp_path / "training.log")
    for error, traceback in ((UserError("the disk is full"), False), (IndexError("out of range"), True)):
        try:
            raise error
        except Exception as caught:
            reason = log_failed(caught)
        log, terminal = (tmp_path / "training.log").read_text(), capsys.readouterr().err
        assert f"failed: {reason}" in log and f"failed: {reason}" in terminal
        assert ("Traceback" in log) == traceback and "Traceback" not in terminal
    logging.getLogger("other").error("broken", exc_info=IndexError("of a library"))
    assert "of a library" in capsys.readouterr().err


def test_the_log_file_begins_with_what_was_logged_before_it_existed(tmp_path, session):
    accelerator = Accelerator(cpu=True)
    setup_logging(accelerator, None)
    logging.getLogger("training.data").warning("3 images left out")
    setup_logging(accelerator, tmp_path / "training.log")
    logging.getLogger("training.data").info("training starts")
    lines = (tmp_path / "training.log").read_text().splitlines()
    assert [line.partition(" WARNING ")[2] or line.partition(" INFO ")[2] for line in lines] == [
        "3 images left out",
        "training starts",
    ]
    setup_logging(accelerator, tmp_path / "other.log")
    assert (tmp_path / "other.log").read_text() == ""


@pytest.mark.parametrize("state", ["finished", "failed"])
def test_a_failed_run_does_not_wait_for_the_other_processes(tracker, monkeypatch, state):
    """Leaving the group of processes waits for all of them where it is NCCL's."""
    left = []
    monkeypatch.setattr(tracker.accelerator, "end_training", lambda: left.append(True))
    tracker.update_status(state=state)
    tracker.close()
    assert left == [True] * (state == "finished")


def test_non_finite_metrics_are_null_in_metrics_jsonl(tracker):
    tracker.log("train", {"loss/total": math.nan, "loss/kl": -math.inf, "loss/mse": 0.5}, **WHERE)
    (line,) = lines(tracker)
    assert line["loss/total"] is None and line["loss/kl"] is None and line["loss/mse"] == 0.5


@pytest.mark.parametrize("values", [[math.nan] * 4, [math.inf, -math.inf], []])
def test_a_histogram_without_finite_values_is_left_out(tracker, values, caplog):
    tracker.histogram("kl", torch.tensor(values), 5)
    assert caplog.text == ""


def test_a_histogram_has_the_finite_values(tracker):
    tracker.histogram("kl", torch.tensor([1.0, math.nan, 1e25]), 5)
    tracker.close()
    events = EventAccumulator(str(tracker.run_dir), size_guidance={"histograms": 0}).Reload()
    assert events.Histograms("kl")[0].histogram_value.num == 2


def test_a_failing_output_is_logged_once_until_it_works_again(tracker, monkeypatch, caplog):
    def fails(*_, **__):
        raise RuntimeError("The histogram is empty, please file a bug report.")

    tensorboard = tracker.trackers["tensorboard"]
    for name in ("add_histogram", "add_image"):
        monkeypatch.setattr(tensorboard.writer, name, fails)
    monkeypatch.setattr(tensorboard, "log", fails)
    for _ in range(3):
        tracker.log("train", {"loss/total": 1.0}, **WHERE)
        tracker.histogram("kl", torch.ones(4), 5)
        tracker.image("samples", torch.zeros(3, 8, 8), 5, "grid.png")
    assert len(lines(tracker)) == 3 and (tracker.run_dir / "samples" / "grid.png").is_file()
    for name in ("TensorBoard", "TensorBoard histogram", "TensorBoard image"):
        assert caplog.text.count(f"{name} failed, training continues (RuntimeError: The histogram is empty") == 1
    monkeypatch.undo()
    tracker.log("train", {"loss/total": 1.0}, **WHERE)
    monkeypatch.setattr(tensorboard, "log", fails)
    tracker.log("train", {"loss/total": 1.0}, **WHERE)
    assert caplog.text.count("TensorBoard failed, ") == 2


def test_every_method_survives_a_run_folder_that_is_gone(tracker, caplog, monkeypatch):
    # TensorBoard writes in a thread of its own, which must have nothing to write while the folder is gone.
    tensorboard = tracker.trackers["tensorboard"]
    tensorboard.writer.flush()
    monkeypatch.setattr(tensorboard, "log", lambda *_, **__: None)
    monkeypatch.setattr(tensorboard.writer, "add_image", lambda *_: None)
    for path in sorted(tracker.run_dir.iterdir()):
        path.unlink()
    tracker.run_dir.rmdir()
    tracker.log("train", {"loss/total": 1.0}, **WHERE)
    tracker.event("message", "warning", **WHERE)
    tracker.image("samples", torch.zeros(3, 8, 8), 5, "grid.png")
    tracker.update_status(state="running")
    tracker.rewind(5, 1)
    for name in ("metrics.jsonl", "samples/", "status.json"):
        assert caplog.text.count(f"{name} failed, training continues (FileNotFoundError") == 1
    tracker.run_dir.mkdir()  # for the end of TensorBoard's thread


def test_a_run_without_tensorboard_has_its_other_outputs(tmp_path, session, monkeypatch, caplog):
    accelerator = Accelerator(cpu=True)

    def fails(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr(TensorBoardTracker, "start", fails)
    tracker = Tracker(accelerator, tmp_path, {}, {})
    tracker.log("train", {"loss/total": 1.0}, **WHERE)
    tracker.histogram("kl", torch.ones(4), 5)
    tracker.close()
    assert caplog.text.count("TensorBoard failed, training continues (OSError: no space left") >= 1
    assert len(lines(tracker)) == 1 and json.loads((tmp_path / "status.json").read_text())["state"] == "starting"


def test_a_guard_lets_ctrl_c_through(tracker):
    with pytest.raises(KeyboardInterrupt), tracker.guard("anything"):
        raise KeyboardInterrupt


def test_file_names_that_are_not_utf_8_are_logged(tmp_path, capfd):
    handler = LogFile(tmp_path / "training.log", encoding="utf-8", errors="backslashreplace")
    name = os.fsdecode(b"Jos\xe9.jpg")
    handler.emit(logging.LogRecord("training", logging.INFO, "", 0, "corrupt image %s", (name,), None))
    handler.close()
    assert (tmp_path / "training.log").read_text() == "corrupt image Jos\\udce9.jpg\n"
    assert capfd.readouterr().err == ""


def test_access_tokens_are_redacted():
    token = "hf_" + "a" * 34
    record = logging.LogRecord("training", logging.INFO, "", 0, f"token {token}", (), None)
    assert TOKEN and RedactingFormatter("%(message)s").format(record) == "token hf_..."


def test_a_learning_rate_that_diverges_ends_as_documented(faces, tmp_path):
    """The observers meet NaN everywhere; the run ends because of its gradients, not because of them."""
    from training.trainer import Trainer

    presets = {"learning_rate": 1000.0, "lr_warmup_steps": 0, "max_skipped_in_a_row": 8}
    config = tiny.tiny_config(tmp_path, faces, training_presets=presets)
    with tiny.process_state():
        trainer = Trainer(config)
        with pytest.raises(RuntimeError, match="8 steps in a row had no finite gradient, again, after a roll-back"):
            trainer.run()
    text = (trainer.run_dir / "training.log").read_text()
    assert "metrics not finite" in text and "rolled back from step" in text
    assert "failed, training continues" not in text
