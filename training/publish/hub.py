"""Uploads a model to the Hugging Face Hub: which files, no secrets in them, retries. Log in with `hf auth login` or HF_TOKEN.

An upload is one commit: a reader sees the old model or the new one. A failed upload leaves nothing visible, and
repeating it sends only what has not arrived.
"""

from __future__ import annotations

import fnmatch
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import EntryNotFoundError, LocalTokenNotFoundError, OfflineModeIsEnabled

from training.cli import UserError
from training.config import HubConfig
from training.io import http_response, retry_after
from training.run_files import priors_of

logger = logging.getLogger(__name__)
T = TypeVar("T")

# The files of a model or a fitted prior, variants and shards included; the source that `config.json` names is added.
_MODEL = ("config.json", "diffusion_pytorch_model*.safetensors", "diffusion_pytorch_model.safetensors.index*.json")
_PUBLISHED = (*_MODEL, "README.md", "training_config.json", "images/*.png", "onnx/*.onnx")
_PRIORS = "priors/*"

_TRANSIENT = (408, 429, 500, 502, 503, 504)  # HTTP status codes after which the same request may succeed
_REJECTED = (429, 503)  # those of them after which the request was certainly not carried out
_NETWORK = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3")  # packages that raise network errors
_ATTEMPTS = 6
_FIRST_DELAY_S = 2.0  # doubled after each attempt
_MAX_DELAY_S = 300.0  # upper bound on a server's Retry-After

_SECRETS = {
    "a Hugging Face token": rb"\b(?:hf|api_org)_[A-Za-z0-9]{20,}",
    "a GitHub token": rb"\bgh[pousr]_[A-Za-z0-9]{30,}|\bgithub_pat_[A-Za-z0-9_]{30,}",
    "an AWS key": rb"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "a Google key": rb"\bAIza[0-9A-Za-z_-]{35}",
    "a Slack token": rb"\bxox[abeprs]-[0-9A-Za-z-]{10,}",
    "an API key": rb"\bsk-[A-Za-z0-9_-]{24,}",
    "a JSON web token": rb"\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.",
    "a private key": rb"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "a password in a URL": rb"\b[a-z][a-z0-9+.-]*://[^/\s:@\"']+:[^/\s:@\"']+@",
}
_PRINTABLE = re.compile(rb"[\x20-\x7e]{12,}")
_SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSW|API_?KEY|CREDENTIAL")


class PushError(UserError):
    """The Hub refused an upload, or could not be reached for long; nothing of it is visible there."""


# ---------------------------------------------------------------------- files


def files_to_publish(folder: Path) -> dict[str, Path]:
    """The files of a folder, and of its run's priors, that belong to a published model: name in the repository -> file.

    Optimizer states, logs, checkpoints and other files are left out.

    Raises:
        ValueError: There is no model in the folder.
    """
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    if (priors := priors_of(folder)).parent != folder:
        found = (path for path in sorted(priors.rglob("*")) if path.is_file())
        files |= {f"priors/{path.relative_to(priors).as_posix()}": path for path in found}
    files = {name: path for name, path in files.items() if not any(part.startswith(".") for part in name.split("/"))}
    published = {name: path for name, path in files.items() if is_published(name)}
    for config in [name for name in published if PurePosixPath(name).name == "config.json"]:
        source = _source_of(published[config])
        if source is not None and (name := str(PurePosixPath(config).with_name(source))) in files:
            published[name] = files[name]
    if "config.json" not in published or not any(fnmatch.fnmatch(name, _MODEL[1]) for name in published):
        raise ValueError(
            f"{folder} holds no exported model (config.json and {_MODEL[1]}): give the folder of a run, or of the model "
            "that it exported."
        )
    return dict(sorted(published.items()))


def is_published(name: str) -> bool:
    """Whether a file of that name belongs to a published model; Python sources are not decided by name."""
    patterns = (*_PUBLISHED, *(f"{_PRIORS}/{pattern}" for pattern in _MODEL))
    return any(_matches(name, pattern) for pattern in patterns)


def _matches(name: str, pattern: str) -> bool:
    """Like a shell: a star does not cross a folder."""
    parts, patterns = name.split("/"), pattern.split("/")
    return len(parts) == len(patterns) and all(map(fnmatch.fnmatchcase, parts, patterns))


def _source_of(config: Path) -> str | None:
    """The source file that a model's `config.json` names, or None."""
    try:
        auto_class = json.loads(config.read_text(encoding="utf-8"))["auto_map"]["AutoModel"]
    except (ValueError, KeyError, TypeError):
        return None
    return f"{str(auto_class).partition('.')[0]}.py"


# ---------------------------------------------------------------------- secrets


def find_secrets(files: dict[str, Path]) -> list[str]:
    """Locations of tokens, keys and passwords in files, as "file, line: kind", without the secrets themselves.

    Searches for well-known token formats, the Hub token in use, and the values of environment variables with names such
    as `*_TOKEN` and `*_PASSWORD`. Of weights only the header, which is text, is searched, and of ONNX files what is printable.
    """
    patterns = {kind: re.compile(pattern) for kind, pattern in _SECRETS.items()}
    for kind, value in _own_secrets():
        patterns[kind] = re.compile(re.escape(value.encode()))
    found = []
    for name, path in files.items():
        data = safetensors_header(path) if path.suffix == ".safetensors" else path.read_bytes()
        if path.suffix == ".onnx":  # random bytes of weights may look like a secret
            data = b"\n".join(_PRINTABLE.findall(data))
        for kind, pattern in patterns.items():
            for match in pattern.finditer(data):
                line = data.count(b"\n", 0, match.start()) + 1
                found.append(f"{name}, line {line}: {kind}")
    return found


def _own_secrets() -> Iterator[tuple[str, str]]:
    token = get_token()
    if token:
        yield "the Hub token of this machine", token
    for name, value in os.environ.items():
        # Short values are switches, and values with separators are paths.
        if _SECRET_NAME.search(name.upper()) and len(value) >= 12 and "/" not in value and os.sep not in value:
            yield f"the value of {name}", value


def safetensors_header(path: Path) -> bytes:
    """The JSON header of a safetensors file, which follows its length in 8 bytes, little-endian.

    Raises:
        ValueError: The file is truncated, or not a safetensors file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(min(length, size))
    try:
        tensors = [entry for name, entry in json.loads(header).items() if name != "__metadata__"]
        complete = size == 8 + length + max((entry["data_offsets"][1] for entry in tensors), default=0)
    except (ValueError, KeyError, TypeError, AttributeError):
        complete = False
    if not complete:
        raise ValueError(f"{path} is not a complete safetensors file (it has {size:,} bytes): save it again.")
    return header


def refuse_secrets(files: dict[str, Path]) -> None:
    """Check that no file holds a secret.

    Raises:
        ValueError: A file holds a secret, and where.
    """
    found = find_secrets(files)
    if found:
        more = f" and {len(found) - 5} more" if len(found) > 5 else ""
        raise ValueError(
            f"nothing was sent, because these files hold secrets: {'; '.join(found[:5])}{more}. Remove them, and revoke "
            "the secrets if the files have been shared."
        )


# ---------------------------------------------------------------------- the Hub


def check_access(config: HubConfig, key: str = "hub.push") -> None:
    """Check before a training that its upload will be allowed.

    Args:
        config: Names the repository.
        key: The configuration key that asks for the upload.

    Raises:
        ValueError: There is no token, it is read-only, the repository belongs to somebody else, or the Hub does not
            answer.
    """
    api = HfApi()
    target, off = f"{key} to {config.repo_id}", f"set {key} to {'false' if key == 'hub.push' else 'null'}"
    try:
        user = _retry("whoami", api.whoami, retry_lost=False)
        namespace = str(config.repo_id).partition("/")[0]
        known = [user.get("name"), *(entry.get("name") for entry in user.get("orgs") or [])]
        # Somebody else's repository may be writable for this user, if it exists.
        foreign = namespace not in known and not api.repo_exists(config.repo_id)
    except LocalTokenNotFoundError:
        raise ValueError(
            f"{target} needs a token and there is none: run `hf auth login`, set HF_TOKEN, or {off}."
        ) from None
    except Exception as error:  # the classes depend on the HTTP library of huggingface_hub
        raise ValueError(
            f"{target}: the Hub refused or did not answer ({reason(error)}); log in again, or {off}."
        ) from None
    role = ((user.get("auth") or {}).get("accessToken") or {}).get("role")
    if role == "read":
        raise ValueError(f"{target}: the token of {user.get('name')} is read-only: log in with one that may write.")
    if foreign:
        raise ValueError(
            f"{target}: {user.get('name')} is neither {namespace} nor a member of it: use one of "
            f"{', '.join(filter(None, known))}."
        )


def push(folder: Path, config: HubConfig, create_pr: bool = False) -> str:
    """Upload an exported model in one commit; may be repeated.

    The commit also deletes the files of an older upload that belong to a model but not to this one (another variant, a
    prior). Files of other names are left alone.

    Args:
        folder: A model's folder; see `files_to_publish`.
        config: Section `hub`.
        create_pr: Open a pull request instead of writing to the main branch.

    Returns:
        The URL of the repository, or of the pull request.

    Raises:
        ValueError: The folder holds no model, or a secret, or there is no token; nothing was sent.
        PushError: The Hub refused, or could not be reached; nothing of the upload is visible there.
    """
    message = "Upload a trained AutoencoderKLUltra"
    return upload(files_to_publish(folder), config, create_pr, message=message, is_owned=is_published)


def upload(
    files: dict[str, Path],
    config: HubConfig,
    create_pr: bool = False,
    *,
    message: str,
    is_owned: Callable[[str], bool],
    space_sdk: str | None = None,
) -> str:
    """Upload files in one commit; see `push`.

    Not `HfApi.upload_folder`: with `hf_xet` installed it makes several commits, and a reader can meet a mixed model.

    Args:
        files: Name in the repository -> file.
        config: Section `hub`.
        create_pr: Open a pull request instead of writing to the main branch.
        message: Of the commit.
        is_owned: Whether a file of that name in the repository, which is not among `files`, is deleted.
        space_sdk: Makes the repository a Space of this kind, such as "gradio"; None for a model.
    """
    refuse_secrets(files)
    api, repo_id = HfApi(), str(config.repo_id)
    repo_type = None if space_sdk is None else "space"
    if get_token() is None:
        raise ValueError(f"publishing {repo_id} needs a token and there is none: run `hf auth login`, or set HF_TOKEN.")

    def create() -> str:
        return str(
            api.create_repo(repo_id, private=config.private, exist_ok=True, repo_type=repo_type, space_sdk=space_sdk)
        )

    def commit() -> str:
        # New operations in each attempt, which ask the Hub again what it has: a commit whose response was lost is
        # recognized and not repeated.
        present = _remote_files(api, repo_id, repo_type)
        stale = [name for name in present if name not in files and is_owned(name)]
        info = api.create_commit(
            repo_id,
            [CommitOperationAdd(name, str(path)) for name, path in files.items()]
            + [CommitOperationDelete(name) for name in stale],
            commit_message=message,
            create_pr=create_pr,
            repo_type=repo_type,
        )
        return info.pr_url or url

    try:
        url = _retry("create", create)
        # A pull request whose response was lost would be opened twice.
        return _retry("upload", commit, retry_lost=not create_pr)
    except Exception as error:
        status = _status(error)
        may_pass = status in _TRANSIENT or (status is None and not isinstance(error, OfflineModeIsEnabled))
        remedy = "run the same command again" if may_pass else "fix that and try again"
        if status in (401, 403):
            remedy = "log in with a token that may write there"
        elif status is None and create_pr:
            remedy = f"see {api.endpoint}/{repo_id}/discussions, where the pull request may be, before trying again"
        raise PushError(f"the upload to {repo_id} failed ({reason(error)}): {remedy}.") from error


def _remote_files(api: HfApi, repo_id: str, repo_type: str | None) -> list[str]:
    try:
        return api.list_repo_files(repo_id, repo_type=repo_type)
    except EntryNotFoundError:  # an empty repository
        return []


def _retry(what: str, call: Callable[[], T], retry_lost: bool = True) -> T:
    """Call until it succeeds, with growing delays.

    huggingface_hub itself retries the parts of an upload (`http_backoff`: 5 times, 1 to 8 s apart, on 408, 429, 5xx and
    lost connections), but not the creation of a repository, the check of the card and the commit.

    Args:
        what: "create", "upload" or "whoami", for the log.
        call: The request; safe to repeat.
        retry_lost: Also retry when the connection was lost, so that the request may have been carried out.
    """
    delay = _FIRST_DELAY_S
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return call()
        except Exception as error:
            status = _status(error)
            if status is not None:
                may_retry = status in (_TRANSIENT if retry_lost else _REJECTED)
            else:
                may_retry = retry_lost and _is_network_error(error)
            if not may_retry or attempt == _ATTEMPTS:
                raise
            wait = min(retry_after(error) or delay, _MAX_DELAY_S)
            logger.warning("%s: %s; attempt %d of %d in %.0f s", what, reason(error), attempt + 1, _ATTEMPTS, wait)
            time.sleep(wait)
            delay *= 2
    raise AssertionError("unreachable")


def _status(error: BaseException) -> int | None:
    response = http_response(error)
    return None if response is None else response.status_code


def _is_network_error(error: BaseException) -> bool:
    """Whether the connection failed, or a gateway answered instead of the Hub (a web page instead of JSON)."""
    cause: BaseException | None = None if isinstance(error, OfflineModeIsEnabled) else error
    while cause is not None:
        if isinstance(cause, (ConnectionError, TimeoutError, json.JSONDecodeError)):
            return True
        if type(cause).__module__.partition(".")[0] in _NETWORK:
            return True
        cause = cause.__cause__
    return False


def reason(error: BaseException) -> str:
    """The error in one line, without the signatures in upload URLs."""
    # huggingface_hub wraps errors of a file's upload in a RuntimeError that does not name them.
    shown = error.__cause__ if type(error) is RuntimeError and error.__cause__ else error
    text = " ".join(str(shown).split())
    return re.sub(r"\?\S+", "", f"{type(shown).__name__}: {text}")[:300]
