"""The demo in a headless browser, and the Space that shows it."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.parse
from pathlib import Path

import pytest
import tiny
import yaml
from PIL import Image

from modeling.latent_prior import DiffusionPrior, GaussianPrior
from training.demo import command
from training.publish.space import stage_space

ROOT = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
needs_gradio = pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="needs `pip install gradio`")
needs_browser = pytest.mark.skipif(
    importlib.util.find_spec("playwright") is None or CHROMIUM is None,
    reason="needs `pip install playwright` and chromium on the PATH",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A model with a Gaussian prior that knows the directions of two attributes, and a diffusion prior of one."""
    folder = tmp_path_factory.mktemp("demo") / "vae_tiny"
    tiny.random_vae().save_pretrained(folder)
    prior = GaussianPrior(16, attributes=("Smiling", "Wearing_Hat"))
    prior.directions.data.fill_(1.0)
    prior.save_pretrained(folder / "priors" / "gaussian")
    prior = DiffusionPrior(16, 3, 20, 2, (8, 16), (1, 1, 1), ("Smiling",), num_inference_steps=3)
    prior.save_pretrained(folder / "priors" / "diffusion")
    return folder


def test_a_missing_gradio_is_one_line(model, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert command.main([str(model)]) == 2
    assert capsys.readouterr().err.startswith("error: the demo needs Gradio: pip install gradio")


# ---- the browser ----


@pytest.fixture(scope="module")
def address(model, tmp_path_factory):
    """The command, in a process of its own, and its address; Ctrl-C ends it."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    log = tmp_path_factory.mktemp("log") / "log"
    with log.open("w") as file:
        demo = subprocess.Popen(
            [sys.executable, "-m", "training.demo", str(model)], cwd=ROOT, env=environment, stdout=file, stderr=file
        )
    deadline = time.monotonic() + 120
    while not (found := re.search(r"http://\S+", log.read_text())):
        assert demo.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)
    assert found[0].startswith("http://127.0.0.1:")
    yield found[0]
    demo.send_signal(signal.SIGINT)
    assert demo.wait(timeout=30) in (0, 130), log.read_text()
    assert "Traceback" not in log.read_text(), log.read_text()  # errors of a visitor are shown on the page alone


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(address, browser, tmp_path):
    """The page; a screenshot is kept, and a request to another machine fails the test."""
    page, hosts = browser.new_page(viewport={"width": 1280, "height": 1100}), set()
    page.on("request", lambda request: hosts.add(urllib.parse.urlsplit(request.url).hostname))
    page.goto(address)
    page.get_by_role("tab", name="Reconstruct").wait_for()
    yield page
    page.screenshot(path=tmp_path / "page.png")
    page.close()
    assert hosts <= {"127.0.0.1", None}


def choose_example(tab) -> None:
    tab.locator("button.gallery-item").first.click()
    tab.get_by_role("button", name="Remove Image").wait_for()


def open_tab(page, name: str):
    page.get_by_role("tab", name=name).click()
    return page.get_by_role("tabpanel").filter(visible=True)


@pytest.mark.slow
@needs_gradio
@needs_browser
class TestBrowser:
    def test_reconstruct_an_example(self, page):
        tab = open_tab(page, "Reconstruct")
        choose_example(tab)
        tab.get_by_role("button", name="Reconstruct", exact=True).click()
        page.wait_for_function(
            "[...document.querySelectorAll('textarea')].some(e => /^PSNR [0-9.]+ dB$/.test(e.value))"
        )
        assert tab.locator(".caption-label").all_inner_texts() == [
            "original, 40x40",
            "reconstruction",
            "difference x 4",
        ]

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"\xff\xd8\xff not an image", "not a readable image: use JPEG, PNG or WebP"),
            ("tiny", "The image has 8x8 pixels: it must have at least 16x16"),
            ("huge", "The image has 9000x9000 pixels"),
        ],
    )
    def test_a_bad_upload_is_explained(self, page, tmp_path, content, message):
        file = tmp_path / "face.png"
        if isinstance(content, bytes):
            file.write_bytes(content)
        else:
            Image.new("L", (8, 8) if content == "tiny" else (9000, 9000)).save(file)
        tab = open_tab(page, "Reconstruct")
        tab.locator("input[type=file]").first.set_input_files(file)
        page.wait_for_timeout(1000)
        tab.get_by_role("button", name="Reconstruct", exact=True).click()
        page.get_by_text(message).first.wait_for()

    def test_no_upload_is_explained(self, page):
        open_tab(page, "Reconstruct").get_by_role("button", name="Reconstruct", exact=True).click()
        page.get_by_text("Upload an image, or choose an example.").first.wait_for()

    def test_samples(self, page):
        tab = open_tab(page, "Samples")
        tab.get_by_role("button", name="Sample", exact=True).click()
        tab.locator(".thumbnail-item").nth(15).wait_for()
        tab.get_by_label("number input for guidance, with the prior diffusion").fill("1")
        tab.get_by_label("number input for guidance, with the prior diffusion").press("Enter")
        tab.get_by_role("button", name="Sample", exact=True).click()
        page.wait_for_timeout(500)
        assert page.locator(".toast-body.error").count() == 0

    def test_interpolate_between_seeds_and_move_the_slider(self, page):
        tab = open_tab(page, "Interpolate")
        tab.get_by_role("button", name="Interpolate", exact=True).click()
        tab.locator(".thumbnail-item").nth(10).wait_for()
        before = tab.locator("#shown img").get_attribute("src")
        tab.get_by_label("number input for position").fill("11")
        tab.get_by_label("number input for position").press("Enter")
        page.wait_for_function("before => document.querySelector('#shown img').src !== before", arg=before)

    def test_edit_an_attribute(self, page):
        tab = open_tab(page, "Edit")
        choose_example(tab)
        tab.get_by_label("number input for Wearing Hat").fill("2")
        tab.get_by_label("number input for Wearing Hat").press("Enter")
        tab.get_by_role("button", name="Edit", exact=True).click()
        tab.locator(".thumbnail-item").nth(1).wait_for()
        assert tab.locator(".caption-label").all_inner_texts() == ["reconstruction", "edited"]

    def test_one_latent_dimension(self, page):
        tab = open_tab(page, "Latent")
        assert "of 16 latent dimensions are active" in tab.inner_text()
        choose_example(tab)
        tab.get_by_role("button", name="Change this dimension").click()
        tab.locator(".thumbnail-item").nth(7).wait_for()
        assert "mean" in tab.locator(".caption-label").all_inner_texts()


# ---- the Space ----


def test_the_space_has_the_demo_its_requirements_and_a_card(tmp_path):
    files = stage_space(tmp_path, "org/vae_tiny")
    assert {"README.md", "app.py", "demo.py", "requirements.txt", "modeling/pipeline.py"} <= set(files)
    card = yaml.safe_load((tmp_path / "README.md").read_text().split("---")[1])
    assert (card["sdk"], card["app_file"], card["models"]) == ("gradio", "app.py", ["org/vae_tiny"])
    requirements = (tmp_path / "requirements.txt").read_text().splitlines()
    assert card["python_version"] == ".".join(map(str, sys.version_info[:2]))
    assert {line.partition("==")[0] for line in requirements if "==" in line} == {"diffusers", "torch"}
    assert "pillow" in requirements and not any("+" in line for line in requirements)
    assert len(list((tmp_path / "examples").glob("*.jpg"))) == 16
    for path in files.values():
        if path.suffix == ".py":
            source = path.read_text()
            compile(source, path, "exec")
            assert "training." not in "".join(
                line for line in source.splitlines() if line.startswith(("from", "import"))
            )


@pytest.mark.slow
@needs_gradio
def test_the_app_of_the_space_builds_the_demo_without_this_project(model, tmp_path):
    stage_space(tmp_path, str(model))  # a local folder in place of a repository
    script = "import json, app; print(json.dumps([app.demo.title, [b.label for b in app.demo.blocks.values() if type(b).__name__ == 'Tab']]))"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    title, tabs = json.loads(done.stdout.splitlines()[-1])
    assert title == "vae_tiny" and tabs == ["Reconstruct", "Samples", "Interpolate", "Edit", "Latent"]
