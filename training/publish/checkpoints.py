"""Keeps a run's checkpoints in a private repository of the Hub, for machines whose disk is lost when they stop.

    python train_vae.py --config configs/ultra.json --set hub.push_checkpoints=org/name
    python train_vae.py --config configs/ultra.json --resume hub://org/name

The repository has the folders of `output.runs_dir`: `<run>/checkpoints/step_XXXXXXXX/` with the newest and the best
checkpoint, and the run's small files. An upload is one commit, so a reader never finds half a checkpoint, and every file
is verified against the manifest after the download.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download

from training.config import HubConfig
from training.io import remove_folder
from training.publish.hub import check_access, reason, upload
from training.run_files import (
    MANIFEST,
    PRIORS,
    RUN_FILE,
    UPLOAD_LINKS,
    InvalidCheckpointError,
    list_checkpoints,
    read_state,
    step_folder,
    verify,
)

logger = logging.getLogger(__name__)

PREFIX = "hub://"
_MANIFESTS = re.compile(rf"([^/]+_(\d{{8}}_\d{{6}}))/checkpoints/step_(\d{{8,}})/{re.escape(MANIFEST)}")


def check_repository(repo_id: str) -> None:
    """Check before a training that checkpoints may be uploaded.

    Raises:
        ValueError: See `check_access`; or the repository exists and is public.
    """
    check_access(HubConfig(repo_id=repo_id), "hub.push_checkpoints")
    api = HfApi()
    if api.repo_exists(repo_id) and not api.repo_info(repo_id).private:
        raise ValueError(
            f"hub.push_checkpoints names {repo_id}, which is public: name a private repository, or one that does not exist."
        )


def link_checkpoints(run_dir: Path) -> tuple[str, dict[str, Path]]:
    """Link the newest and the best checkpoint of a run, which training may remove during an upload.

    Returns:
        The name of the newest checkpoint, and name in the repository -> hard link, or the file itself where the file system
        has no hard links.
    """
    newest = list_checkpoints(run_dir)[-1]
    best = read_state(newest)["progress"].get("best")
    folders = {newest} if best is None else {newest, step_folder(run_dir, best["step"])}
    paths = [path for folder in sorted(folders) for path in sorted(folder.rglob("*")) if path.is_file()]
    paths += [path for name in (RUN_FILE, "config.json") if (path := run_dir / name).is_file()]
    paths += [path for path in sorted((run_dir / PRIORS).rglob("*")) if path.is_file()]
    links = {}
    for path in paths:
        name = path.relative_to(run_dir).as_posix()
        link = run_dir / UPLOAD_LINKS / name
        try:
            link.parent.mkdir(parents=True, exist_ok=True)
            os.link(path, link)
        except OSError:
            link = path
        links[f"{run_dir.name}/{name}"] = link
    return newest.name, links


def push_checkpoints(run_dir: Path, repo_id: str, newest: str, files: dict[str, Path]) -> str:
    """Upload checkpoints, delete the others of the run from the repository, and remove the links.

    Args:
        run_dir: The run's folder.
        repo_id: "organization/name"; created as a private repository if it does not exist.
        newest, files: Of `link_checkpoints`.

    Returns:
        `newest`.

    Raises:
        PushError: The upload failed; the repository still has the checkpoints of the last one.
        OSError: A file was removed meanwhile.
    """
    try:
        upload(
            files,
            HubConfig(repo_id=repo_id, private=True),
            message=f"{run_dir.name}: {newest}",
            is_owned=lambda name: name.startswith(f"{run_dir.name}/checkpoints/"),
        )
    finally:
        shutil.rmtree(run_dir / UPLOAD_LINKS, ignore_errors=True)
    return newest


class CheckpointUploader:
    """Uploads checkpoints in a thread while training continues; a failed upload is logged, and repeated with the next.

    Args:
        run_dir: The run's folder.
        repo_id: "organization/name".
        warn: Called with a sentence when an upload has failed.
    """

    def __init__(self, run_dir: Path, repo_id: str, warn: Callable[[str], None]) -> None:
        self._run_dir, self._repo_id, self._warn = run_dir, repo_id, warn
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint upload")
        self._running: Future[str] | None = None
        self._uploaded: str | None = None

    def start(self) -> None:
        """Upload the newest checkpoint, unless an upload is still running."""
        if self._running is not None and not self._running.done():
            return
        self._report()
        try:
            linked = link_checkpoints(self._run_dir)  # here, where no checkpoint is being written or removed
        except Exception as error:  # of the disk
            self._warn_of(error)
        else:
            self._running = self._pool.submit(push_checkpoints, self._run_dir, self._repo_id, *linked)

    def finish(self) -> None:
        """Wait until the newest checkpoint is uploaded or has failed to."""
        self._report()
        checkpoints = list_checkpoints(self._run_dir)
        if checkpoints and checkpoints[-1].name != self._uploaded:
            self.start()
            self._report()
        self._pool.shutdown()

    def _report(self) -> None:
        if self._running is None:
            return
        try:
            self._uploaded = self._running.result()
            logger.info("uploaded  %s of %s to %s", self._uploaded, self._run_dir.name, self._repo_id)
        except Exception as error:  # of the Hub, the network or the disk
            self._warn_of(error)
        self._running = None

    def _warn_of(self, error: Exception) -> None:
        self._warn(f"a checkpoint could not be uploaded to {self._repo_id} ({type(error).__name__}: {error})")


def download_run(address: str, runs_dir: Path, run_name: str) -> Path:
    """Download the checkpoints of the newest run of a name, unless they are here.

    Args:
        address: "hub://organization/name".
        runs_dir: `output.runs_dir`.
        run_name: `output.run_name`.

    Returns:
        The run's folder, in `runs_dir`.

    Raises:
        ValueError: There is no such repository, or no complete checkpoint in it, or the Hub does not answer.
    """
    repo_id, temporary = address.removeprefix(PREFIX), runs_dir / ".download"
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id):
        raise ValueError(f"--resume {address}: write {PREFIX}organization/name.")
    try:
        info = HfApi().repo_info(repo_id)
        found = [match for each in info.siblings if (match := _MANIFESTS.fullmatch(each.rfilename))]
        found = [match for match in found if match[1] == f"{run_name}_{match[2]}"]
        if not found:
            raise ValueError(f"--resume {address}: it has no checkpoint of {run_name}: check output.run_name.")
        run = max(found, key=lambda match: (match[2], int(match[3])))[1]
        # In a folder of its own, where an interrupted download resumes.
        snapshot_download(repo_id, revision=info.sha, allow_patterns=[f"{run}/*"], local_dir=temporary)
    except ValueError:
        raise
    except Exception as error:  # the classes depend on the HTTP library of huggingface_hub
        raise ValueError(
            f"--resume {address}: the Hub refused or did not answer ({reason(error)}): check the name, log in "
            "(`hf auth login`), or try again."
        ) from None
    for checkpoint in list_checkpoints(temporary / run):
        try:
            verify(checkpoint)
        except InvalidCheckpointError as error:
            remove_folder(temporary)
            raise ValueError(f"--resume {address}: {checkpoint.name} is damaged ({error}): try again.") from None
    final = runs_dir / run
    (final / "checkpoints").mkdir(parents=True, exist_ok=True)
    for path in [*list_checkpoints(temporary / run), *(temporary / run).glob("*.json"), temporary / run / PRIORS]:
        destination = final / path.relative_to(temporary / run)
        if path.exists() and not destination.exists():  # what is here may be newer
            os.replace(path, destination)
    shutil.rmtree(temporary, ignore_errors=True)
    return final
