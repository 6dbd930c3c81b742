"""The export is the checkpoint's model, and an older export stays until the new one is complete."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny

from modeling.autoencoder_kl_ultra import AutoencoderKLUltra
from training.publish import export


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def source(tmp_path) -> Path:
    AutoencoderKLUltra(**tiny.SETTINGS["model"]).save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def test_model_files_are_those_that_save_pretrained_writes(source):
    files = contents(source)
    del files["diffusion_pytorch_model.safetensors"]
    assert export.model_files(AutoencoderKLUltra(**tiny.SETTINGS["model"])) == files


def test_an_export_replaces_an_older_one_with_its_priors(source, tmp_path):
    folder = tmp_path / "models" / "vae"
    (folder / "priors").mkdir(parents=True)
    export.export_model(source, folder)
    assert contents(folder) == contents(source)
    assert list(folder.parent.iterdir()) == [folder]


def test_an_export_of_the_same_model_keeps_its_priors(source, tmp_path):
    export.export_model(source, tmp_path / "vae")
    (tmp_path / "vae" / "priors").mkdir()
    export.export_model(source, tmp_path / "vae")
    assert (tmp_path / "vae" / "priors").is_dir()


def test_an_export_takes_given_priors_and_no_folder_of_the_source(source, tmp_path):
    (source / "priors").mkdir()
    export.export_model(source, tmp_path / "plain")
    assert not (tmp_path / "plain" / "priors").exists()
    (tmp_path / "priors" / "gaussian").mkdir(parents=True)
    (tmp_path / "priors" / "gaussian" / "config.json").write_text("{}")
    (tmp_path / "priors" / "gaussian").chmod(0o555)
    export.export_model(source, tmp_path / "vae", tmp_path / "priors")
    assert (tmp_path / "vae" / "priors" / "gaussian" / "config.json").read_text() == "{}"
    assert (tmp_path / "vae" / "priors" / "gaussian").stat().st_mode & 0o200  # can be replaced


def test_a_full_disk_leaves_the_older_export(source, tmp_path, monkeypatch):
    folder = tmp_path / "models" / "vae"
    export.export_model(source, folder)
    (folder / "config.json").write_text("{}")  # of another model
    before = contents(folder)

    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        export.export_model(source, folder)
    assert contents(folder) == before
    assert list(folder.parent.iterdir()) == [folder]
