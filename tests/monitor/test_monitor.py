"""The monitor on run folders as the trainer writes them: states, growing and malformed files, both pages."""

from __future__ import annotations

import base64
import io
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from random import Random
from xml.etree import ElementTree

import pytest
from PIL import Image
from rich.cells import cell_len
from rich.console import Console

from training.config import Config
from training.monitor import run as monitor_run
from training.monitor import terminal as monitor
from training.monitor.html import write_page
from training.monitor.rows import rows
from training.monitor.run import Run, Series, duration, select_run
from training.run_files import list_runs

ROOT = Path(__file__).resolve().parents[2]
NAME = "faces_20250102_030405"
HOST = socket.gethostname()
PSNR = "validation/psnr"


def status_of(state: str = "running", **changes) -> dict:
    best = {"epoch": 2, "validation/reconstruction_loss": 0.031, PSNR: 27.71}
    fields = {
        "state": state,
        "reason": None,
        "pid": os.getpid(),
        "host": HOST,
        "updated": time.time(),
        "best": best,
    }
    fields |= {"epoch": 4, "step": 450, "images_seen": 28_800, "steps_per_epoch": 100, "num_epochs": 10}
    fields |= {
        "seconds_left": 4320.0,
        "model_dir": None,
        "plateau_bad_epochs": 3,
        "early_stopping_bad_epochs": 4,
    }
    return fields | changes


def train_line(step: int, **changes) -> dict:
    fields = {
        "kind": "train",
        "time": time.time(),
        "step": step,
        "epoch": step // 100,
        "images_seen": 64 * step,
    }
    fields |= {f"loss/{name}": 0.2 / math.sqrt(step) for name in ("mse", "l1", "perceptual", "lpips", "total")}
    fields |= {f"weighted/{name}": 0.05 / math.sqrt(step) for name in ("mse", "l1", "perceptual", "lpips", "kl")}
    fields |= {"loss/kl": 0.8, "kl/nats_per_image": 819.2, "kl/loss_fraction": 0.021, "kl/smoothed_fraction": 0.02}
    fields |= {"kl/target_low": 0.01, "kl/target_high": 0.03, "kl/beta": 1e-3, "kl/beta_floor": 5e-5}
    fields |= {"optim/learning_rate": 5e-5, "optim/grad_norm": 0.9, "optim/clipped_fraction": 0.12}
    fields |= {"optim/skipped_steps": 2, "speed/images_per_second": 123.4, "speed/data_wait_fraction": 0.03}
    return fields | {"speed/memory_gib": 10.2} | changes


def validation_line(step: int) -> dict:
    fields = {"kind": "validation", "time": time.time(), "step": step, "epoch": step // 100, PSNR: 27.5}
    fields |= {"images_seen": 64 * step, "validation/lpips_alexnet": 0.31, "validation/mse": 0.0088}
    fields |= {"validation/ssim": 0.8, "validation/reconstruction_loss": 0.04, "validation/improved": True}
    return fields | {"validation/active_units": 812, "validation/posterior_sigma": 0.43}


def event_line(message: str, level: str = "warning") -> dict:
    return {"kind": "event", "time": time.time(), "step": 7, "epoch": 0, "message": message, "level": level}


def make_run(folder: Path, status: dict | None, lines: list[dict] | None = None, name: str = NAME) -> Path:
    """A run folder; without `lines`, with metrics of four and a half epochs."""
    path = folder / name
    (path / "samples").mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(Config().to_dict()))
    if status is not None:
        (path / "status.json").write_text(json.dumps(status))
    if lines is None:
        lines = [train_line(step) for step in range(50, 451, 50)]
        lines += [validation_line(step) for step in range(100, 401, 100)]
    append(path, lines)
    for kind in ("samples", "reconstructions"):
        for epoch in (1, 10):
            image = Image.new("RGB", (8 * epoch, 4), (200, 30, 30))
            image.save(path / "samples" / f"faces_{kind}_epoch_{epoch:04}.png")
    return path


def append(path: Path, lines: list[dict], end: str = "") -> None:
    with (path / "metrics.jsonl").open("a") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines) + end)


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def shown(run: Run, encoding: str = "utf-8", width: int = 80) -> list[str]:
    """The page's lines as a pipe of that encoding gets them."""
    buffer = io.BytesIO()
    file = io.TextIOWrapper(buffer, encoding=encoding, errors="replace", newline="\n")
    console = Console(file=file, width=width, force_terminal=False)
    console.print(monitor.page(run, console))
    file.flush()
    return buffer.getvalue().decode(encoding).splitlines()


def test_states_of_ended_runs(tmp_path):
    for state, reason in (("finished", None), ("stopped", "early stopping"), ("failed", "RuntimeError: [x]")):
        run = Run(make_run(tmp_path / state, status_of(state, reason=reason, pid=dead_pid())))
        assert (run.state.name, run.state.detail, run.state.is_alive) == (state, reason or "", False)
        assert state.upper() in shown(run)[0] and "4 epochs done of 10, 45 %" in "\n".join(shown(run))
        assert (reason or "epoch") in "\n".join(shown(run))


def test_live_starting_and_dead_on_this_host(tmp_path):
    assert Run(make_run(tmp_path / "live", status_of())).state.name == "live"
    starting = Run(make_run(tmp_path / "starting", status_of("starting", epoch=0, step=0), []))
    assert starting.state.name == "starting" and "no metrics yet" in starting.state.detail
    assert Run(make_run(tmp_path / "resuming", status_of("starting"))).state.name == "starting"
    pid = dead_pid()
    for number, lines in enumerate((None, [])):
        dead = Run(make_run(tmp_path / f"dead{number}", status_of(pid=pid), lines))
        assert dead.state.name == "dead" and f"process {pid} does not exist" in dead.state.detail


def test_a_process_without_updates_may_hang(tmp_path, monkeypatch):
    monkeypatch.setattr(monitor_run, "STALE_SECONDS", 0.5)
    then = time.time() - 0.6
    run = Run(make_run(tmp_path, status_of(updated=then), [train_line(50, time=then)]))
    assert run.state.name == "live" and "may hang" in run.state.detail


def test_a_reused_process_id_is_not_the_run(tmp_path):
    # This process started after the last update of the run.
    lines = [train_line(50, time=time.time() - 10**6)]
    run = Run(make_run(tmp_path, status_of(updated=time.time() - 10**6), lines))
    assert run.state.name == "dead"


@pytest.mark.skipif(sys.platform == "win32", reason="only Unix has zombies")
def test_a_zombie_is_dead(tmp_path):
    with subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE) as process:
        assert process.stdout.read() == b""  # it ends, and nobody has waited for it
        path = make_run(tmp_path, status_of(pid=process.pid))
        for _ in range(100):
            if (state := Run(path).state.name) == "dead":
                break
            time.sleep(0.02)
        assert state == "dead"


def test_on_another_host_the_age_of_the_update_decides(tmp_path):
    here = Run(make_run(tmp_path / "a", status_of(host="far", updated=time.time() - 300), []))
    assert here.state.name == "starting" and "far" in here.state.detail
    old = time.time() - 660
    assert Run(make_run(tmp_path / "b", status_of(host="far", updated=old))).state.name == "live"  # fresh metrics
    gone = Run(make_run(tmp_path / "c", status_of(host="far", updated=old), [train_line(50, time=old)]))
    assert gone.state.name == "dead" and "11 min" in gone.state.detail


def test_without_status_the_age_of_the_files_decides(tmp_path):
    path = make_run(tmp_path, None, [])
    assert Run(path).state.name == "starting"
    for item in (path, *path.iterdir()):
        os.utime(item, (time.time() - 3600,) * 2)
    assert Run(path).state.name == "dead"
    (path / "status.json").write_text('{"state": "fini')  # as a full disk may leave it
    assert Run(path).state.name == "starting"


def test_the_end_of_a_watched_run(tmp_path):
    path = make_run(tmp_path, status_of())
    run = Run(path)
    append(path, [train_line(500, **{"loss/total": 0.5})])
    (path / "status.json").write_text(json.dumps(status_of("finished", pid=dead_pid())))
    run.refresh()
    assert run.state.name == "finished" and run.train["loss/total"] == 0.5


def test_a_run_that_ends_during_a_refresh_is_not_dead(tmp_path, monkeypatch):
    path = make_run(tmp_path, status_of())

    def ends_just_now(pid: int, last_update: float) -> bool:
        append(path, [train_line(500, **{"loss/total": 0.5})])
        (path / "status.json").write_text(json.dumps(status_of("finished")))
        return False

    monkeypatch.setattr(monitor_run, "process_exists", ends_just_now)
    run = Run(path)
    assert run.state.name == "finished" and run.train["loss/total"] == 0.5


def test_metrics_are_read_as_they_grow(tmp_path):
    path = make_run(tmp_path, status_of(), [train_line(1)])
    append(path, [], json.dumps(train_line(2))[:40])
    run = Run(path)
    assert run.train["step"] == 1 and run.unreadable == 0 and run.warnings() == []
    append(path, [], json.dumps(train_line(2))[40:])  # complete except for the line break
    run.refresh()
    assert run.train["step"] == 1
    append(path, [], "\n" + json.dumps(train_line(3)) + "\n")
    run.refresh()
    assert run.train["step"] == 3 and run.series["loss/total"].xs == [64, 128, 192]
    assert run.unreadable == 0
    (path / "metrics.jsonl").write_text(json.dumps(train_line(9)) + "\n")  # replaced by a shorter file
    run.refresh()
    assert run.series["loss/total"].xs == [64 * 9]


def test_malformed_lines_and_non_finite_values(tmp_path):
    path = make_run(tmp_path, status_of(), [train_line(1)])
    append(path, [], '{"kind": "tr' + json.dumps(train_line(2)) + "\n[1]\n\n\0\0\0\n")
    append(path, [train_line(3, **{"loss/total": None, "loss/mse": math.nan, "kl/smoothed_fraction": None})])
    append(
        path,
        [train_line(4, **{"loss/total": "high", "kl/loss_fraction": math.inf, "images_seen": None})],
    )
    run = Run(path)
    assert run.unreadable == 3
    assert run.non_finite == {"loss/total": (2, 4), "loss/mse": (1, 3)}
    assert run.series["loss/l1"].xs == [64, 192] and run.series["loss/total"].xs == [64]
    text = "\n".join(shown(run))
    assert "unreadable lines 3" in text and "loss/mse not finite" in text and "n/a" in text


def test_missing_terms_and_a_run_without_metrics(tmp_path):
    line = {key: value for key, value in train_line(50).items() if not key.endswith(("perceptual", "lpips"))}
    text = "\n".join(shown(Run(make_run(tmp_path / "a", status_of(), [line]))))
    assert "loss mse" in text and "perceptual" not in text
    path = make_run(tmp_path / "b", None, [])
    (path / "metrics.jsonl").unlink()
    (path / "config.json").write_text("[]")
    assert "no metrics yet" in "\n".join(shown(Run(path)))


def test_a_series_is_reduced_to_means_and_rewound_by_a_resume():
    series = Series()
    for x in range(5000):
        series.add(x, float(x))
    assert 1024 <= len(series.xs) <= 2048 and series.xs[-1] == 4999
    # Buckets of 4: the mean of 0..3, of 4..7, and so on, each at its last x.
    assert series.xs[:2] == [3, 7] and series.ys[:2] == [1.5, 5.5]
    series.add(1000, -1.0)
    assert series.xs[-2:] == [999, 1000] and series.ys[-1] == -1.0


def test_a_large_file_is_read_once(tmp_path, monkeypatch):
    path = make_run(tmp_path, status_of(), [])
    text = "".join(json.dumps(train_line(step)) + "\n" for step in range(1, 201)).encode()
    chunks = [text.replace(b'"images_seen": ', b'"images_seen": %d' % (index + 1)) for index in range(30)]
    (path / "metrics.jsonl").write_bytes(b"".join(chunks))  # 6,000 lines, over 4 MiB
    run = Run(path)
    assert (path / "metrics.jsonl").stat().st_size > 1 << 22 and run.unreadable == 0
    assert all(len(series.xs) <= 2048 for series in run.series.values())
    monkeypatch.setattr(run, "_add_line", None)
    run.refresh()  # nothing new to read


def test_sparklines():
    assert monitor.sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert monitor.sparkline([7, 0, math.nan, None, 7], 8, ascii_only=True) == "#_#"
    assert monitor.sparkline([0, 2, 6, 8], 2) == "▁█"  # means 1 and 7
    assert monitor.sparkline([1, 10, 100], 3, log=True) == "▁▅█"  # log 10 lies half way: level 3.5 rounds to 4
    assert monitor.sparkline([0, 10, 100], 3, log=True) == "▁▂█"  # 0 has no logarithm: linear
    assert len(set(monitor.sparkline([0.1 + 1e-17, 0.1, 0.3 - 0.2], 3))) == 1
    assert monitor.sparkline([], 8) == "" and monitor.sparkline([1.0], 0) == ""


def test_durations():
    spans = {0: "0 s", 59.6: "1 min 0 s", 4320: "1 h 12 min", 90_000: "1 d 1 h", -5: "0 s"}
    assert {seconds: duration(seconds) for seconds in spans} == spans


def test_the_page_shows_the_metrics(tmp_path):
    path = make_run(tmp_path, status_of())
    append(path, [event_line("data starves the device"), event_line("saved", "info")])
    text = "\n".join(shown(Run(path)))
    for words in (
        "LIVE",
        "epoch 5 of 10, 45 %",
        "1 h 1",
        "2 %, inside target range 1 to 3 %",
        "0.001, minimum 5e-05",
        "5e-05, minimum 1e-07",
        "0.9, clipped 12 %, skipped steps 2",
        "3 of 10 epochs without improvement",
        "4 of 20 epochs without improvement",
        "27.50 dB, best model 27.71",
        "val lpips_alexnet",
        "0.31",
        "123.4 images/s, 10.2 GiB",
        "3 % of the time",
        "step 7: data starves the device",
        "samples/faces_samples_epoch_0010.png",
    ):
        assert words in text
    assert "saved" not in text  # information is no warning
    append(path, [train_line(460, **{"kl/smoothed_fraction": 0.004}), train_line(470, **{"kl/smoothed_fraction": 0.2})])
    assert "above target range 1 to 3 %" in "\n".join(shown(Run(path)))


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
@pytest.mark.parametrize("width", [40, 80, 200])
def test_no_line_is_wider_than_the_terminal(tmp_path, encoding, width):
    path = make_run(tmp_path, status_of("failed", reason="x" * 300), name="n" * 120 + "_20250102_030405")
    append(path, [event_line("ein größeres Übel " * 9 + "漢字" * 60), event_line("b" * 200)])
    (path / "training.log").write_text("first\n" + "Traceback " * 30 + "\n")
    lines = shown(Run(path), encoding, width)
    assert max(map(cell_len, lines)) <= width and len(lines) > 30
    assert any("Traceback" in line for line in lines)
    assert ("█" in "".join(lines)) is (encoding == "utf-8")


def test_important_rows_come_first(tmp_path):
    """A live page is cropped to the terminal's height."""
    labels = [row.label for row in rows(Run(make_run(tmp_path, status_of())))]
    order = ["progress", "loss total", "KL fraction", "val psnr", "throughput", "samples", "loss mse", "gradient norm"]
    assert [label for label in labels if label in order] == order


def test_a_loss_term_of_a_user_has_a_row_and_a_curve(tmp_path):
    line = train_line(50, **{"loss/edges": 0.25, "weighted/edges": 0.025})
    path = make_run(tmp_path, status_of(), [line])
    (row,) = [row for row in rows(Run(path)) if row.label == "loss edges"]
    assert row.text.split() == ["0.25", "weighted", "0.025"]
    assert "weighted/edges" in base64.b64decode(html_of(path, tmp_path)[0].split("base64,")[1].split('"')[0]).decode()


def test_names_and_messages_are_shown_as_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status = status_of("stopped", reason="[/bold] why")
    path = make_run(Path("runs"), status, name="[red]a[_b_20250102_030405")
    append(path, [event_line("[blink]x[/blink] \x1b[2J\x07 [link=file:///]y")])
    text = "\n".join(shown(Run(path)))
    assert "\x1b" not in text and "\x07" not in text
    for words in ("runs/[red]a[_b_20250102_030405", "[/bold] why", "[blink]x[/blink]", "[link=file:///]y"):
        assert words in text


def test_grids_are_complete_and_fit_the_state(tmp_path):
    path = make_run(tmp_path, status_of())
    samples = path / "samples"
    (samples / "faces_samples_epoch_0020.png").write_bytes(b"\x89PNG half")
    for name in ("faces_final_samples.png", "faces_reconstructions_final.png"):
        shutil.copy(samples / "faces_samples_epoch_0001.png", samples / name)
    run = Run(path)
    assert run.grid("samples").name == "faces_samples_epoch_0010.png"
    assert run.grid("reconstructions").name == "faces_reconstructions_epoch_0010.png"
    (path / "status.json").write_text(json.dumps(status_of("finished")))
    run.refresh()
    assert run.grid("samples").name == "faces_final_samples.png"
    assert run.grid("reconstructions").name == "faces_reconstructions_final.png"


def test_selecting_a_run(tmp_path):
    for name in ("b_20250101_000000", "a_20250301_000000", "a_20250201_000000"):
        make_run(tmp_path, status_of(), [], name=name)
    (tmp_path / "z_20260101_000000").mkdir()  # not a run
    os.utime(tmp_path / "b_20250101_000000")  # copied just now
    assert select_run(None, tmp_path).name == "a_20250301_000000"
    assert select_run("b", tmp_path).name == select_run("b_20250101_000000", tmp_path).name == "b_20250101_000000"
    assert select_run(str(tmp_path / "a_20250201_000000"), Path("nowhere")).name == "a_20250201_000000"


def test_the_newest_run_is_the_one_that_resume_auto_takes(tmp_path):
    """By recorded UTC time: local times in names depend on the time zone."""
    tokyo = make_run(tmp_path, status_of(), [], name="a_20250302_090000")
    los_angeles = make_run(tmp_path, status_of(), [], name="a_20250301_170000")
    (tokyo / "run.json").write_text(json.dumps({"created": "2025-03-02T00:00:00+00:00"}))
    (los_angeles / "run.json").write_text(json.dumps({"created": "2025-03-02T01:00:00+00:00"}))
    assert select_run(None, tmp_path) == select_run("a", tmp_path) == list_runs(tmp_path, "a")[0] == los_angeles


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--runs-dir", "none"], "error: no run in none: start a training first"),
        (["--runs-dir", "empty"], "no run in empty: start a training first, or set --runs-dir"),
        (["typo"], "typo is not a run folder: start a training first, or set --runs-dir (runs in runs: faces_2025"),
        (["empty"], "empty is not a run folder"),
        (["/nowhere/runs"], "/nowhere/runs is not a run folder"),
        (["../*"], "../* is not a run folder"),
        (["--html", "metrics.jsonl"], "ends in .html"),
        (["--html", "absent/page.html"], "does not exist"),
        (["--refresh", "0"], "--refresh must be between 0.1 and 3600 seconds, got 0."),
    ],
)
def test_errors_name_the_remedy(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    make_run(tmp_path / "runs", status_of(), [])
    assert monitor.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_in_a_pipe_one_page_without_escape_codes_and_nothing_touched(tmp_path):
    path = make_run(tmp_path, status_of())
    before = {item: item.stat().st_mtime_ns for item in (tmp_path, *tmp_path.rglob("*"))}
    environment = os.environ | {"FORCE_COLOR": "1", "TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8"}
    environment.pop("COLUMNS", None)
    command = [sys.executable, "-m", "training.monitor", "--runs-dir", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=60, check=True)
    text = result.stdout.decode()
    assert "\x1b" not in text and "LIVE" in text and result.stderr == b""
    assert max(map(cell_len, text.splitlines())) <= 80
    assert {item: item.stat().st_mtime_ns for item in (tmp_path, *tmp_path.rglob("*"))} == before
    assert path.is_dir()


def test_in_a_terminal_the_page_follows_the_run_to_its_end(tmp_path):
    pty = pytest.importorskip("pty")
    import fcntl
    import struct
    import termios

    path = make_run(tmp_path, status_of())
    primary, secondary = pty.openpty()
    fcntl.ioctl(secondary, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES", "NO_COLOR")}
    environment |= {"TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, "-m", "training.monitor", "--runs-dir", str(tmp_path), "--refresh", "0.1"]
    streams = {"stdin": secondary, "stdout": secondary, "stderr": secondary}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, **streams)
    os.close(secondary)
    seen = b""
    try:
        deadline = time.monotonic() + 30
        ended = False
        while time.monotonic() < deadline:
            try:
                seen += os.read(primary, 65536)
            except OSError:  # the terminal's other end is closed
                break
            if b"LIVE" in seen and not ended:
                ended = True
                append(path, [train_line(500, **{"speed/images_per_second": 77.77})])
                (path / "new").write_text(json.dumps(status_of("stopped", reason="early stopping")))
                os.replace(path / "new", path / "status.json")
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait()
        os.close(primary)
    frames = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen.decode()).replace("\r", "\n").split("\n")
    assert max(map(cell_len, frames)) <= 80
    text = "\n".join(frames)
    assert "STOPPED" in text and "early stopping" in text and "77.77 images/s" in text


def html_of(path: Path, folder: Path) -> tuple[str, ElementTree.Element]:
    run, file = Run(path), folder / "page.html"
    write_page(run, rows(run), file)
    text = file.read_text(encoding="utf-8")
    assert [item.name for item in folder.iterdir() if "page.html" in item.name] == ["page.html"]
    return text, ElementTree.fromstring(text)


def test_html_is_well_formed_complete_and_self_contained(tmp_path):
    path = make_run(tmp_path, status_of())
    append(path, [event_line("data starves the device")])
    text, page = html_of(path, tmp_path)
    images = [image.get("src") for image in page.iter("img")]
    charts = [base64.b64decode(src.partition(",")[2]) for src in images if src.startswith("data:image/svg+xml;base64,")]
    grids = [base64.b64decode(src.partition(",")[2]) for src in images if src.startswith("data:image/png;base64,")]
    assert len(charts) == 13 and len(grids) == 2 and len(images) == 15
    assert all(image.get("alt") for image in page.iter("img"))
    assert all(Image.open(io.BytesIO(grid)).size == (80, 4) for grid in grids)
    for chart in charts:
        drawing = ElementTree.fromstring(chart)
        assert drawing.tag.endswith("svg")
        for element in drawing.iter():  # inside a drawing, too, links stay inside
            links = (value for key, value in element.attrib.items() if key.endswith("href"))
            assert all(link.startswith("#") for link in links)
    assert not re.search(r"(?:src|href|url|action)\s*[=(]\s*[\"']?\s*(?:https?:)?//", text)
    assert "<script" not in text and "default-src 'none'" in text
    shown_text = " ".join(page.itertext())
    for words in ("LIVE", "data starves the device", "early_stopping_patience", "val lpips_alexnet", "KL fraction"):
        assert words in shown_text


def test_html_escapes_what_comes_from_elsewhere(tmp_path):
    lines = [
        {"kind": "train", "images_seen": 50, "loss/total": 2.0, "weighted/$\\frac$ <b>": 1.0},
        event_line("<script>alert(1)</script> & \x1b\x00"),
    ]
    status = status_of("failed", reason='"><img src="http://example.com/x"/>')
    path = make_run(tmp_path, status, lines, name="<i>&_20250102_030405")
    (path / "config.json").write_text(json.dumps({"<u>": {"<s>": "</table>"}, "model": {}, "odd": 5}))
    (path / "training.log").write_text("Traceback\n<pre>ValueError</pre>\n")
    text, page = html_of(path, tmp_path)
    tags = {element.tag for element in page.iter()}
    assert tags.isdisjoint({"script", "i", "u", "s", "b"})
    assert all(image.get("src").startswith("data:") for image in page.iter("img"))
    shown_text = " ".join(page.itertext())
    for words in (
        "<script>alert(1)</script> &",
        "<i>&_2025",
        "<u>",
        "</table>",
        "<pre>ValueError</pre>",
        'src="http:',
    ):
        assert words in shown_text


def test_html_of_a_run_that_has_only_just_started(tmp_path):
    path = tmp_path / NAME
    path.mkdir()
    (path / "config.json").write_text("{}")
    _, page = html_of(path, tmp_path)
    assert "STARTING" in " ".join(page.itertext()) and not list(page.iter("img"))


def test_the_html_command_prints_what_it_wrote(tmp_path, capsys):
    make_run(tmp_path, status_of("finished"), [validation_line(50)])
    assert 0 == monitor.main(["--runs-dir", str(tmp_path), "--html", str(tmp_path / "out.html")])
    assert capsys.readouterr().out.startswith("wrote ") and (tmp_path / "out.html").stat().st_size > 10_000


def test_a_closed_stdout_ends_the_monitor_quietly(tmp_path):
    """As `| head -1` does, which reads one line and ends."""
    path = make_run(tmp_path, status_of())
    append(path, [event_line("x" * 200) for _ in range(50)])
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "training.monitor", "--runs-dir", str(tmp_path), "--once"]
    result = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, timeout=60, check=False)
    os.close(writer)
    assert (result.returncode, result.stderr) == (1, b"")


VALUES = [None, True, -1, 10**400, 1e308, math.nan, "text", "\udce9", [], {}, [{}], {"epoch": "x", "step": None}]


@pytest.mark.parametrize("seed", range(20))
def test_a_malformed_run_folder_is_shown_without_an_error(tmp_path, seed):
    random = Random(seed)
    name = os.fsdecode(b"Jos\xe9_20250102_030405")
    path = make_run(tmp_path, status_of(), name=name)

    def damaged(line: dict) -> dict:
        return {key: random.choice(VALUES) if random.random() < 0.3 else value for key, value in line.items()}

    lines = [
        damaged(line) for step in range(1, 40) for line in (train_line(step), validation_line(step), event_line("x"))
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines).encode()
    cut = random.randrange(len(text))
    (path / "metrics.jsonl").write_bytes(text[:cut] + b"\xe9\n" + text[cut : cut + random.randrange(5000)])
    (path / "status.json").write_text(json.dumps(damaged(status_of())))
    (path / "config.json").write_text(
        json.dumps(damaged(Config().to_dict()) | {"training_presets": random.choice(VALUES)})
    )
    (path / "training.log").write_bytes(b"Jos\xe9\n")
    for file in random.sample(["metrics.jsonl", "status.json", "config.json", "training.log"], 1):
        (path / file).unlink()
        if random.random() < 0.5:
            (path / file).mkdir()
    for encoding in ("utf-8", "latin-1"):
        assert shown(Run(path), encoding)
    html_of(path, tmp_path)
