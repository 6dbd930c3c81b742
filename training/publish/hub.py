"""Publishing a finished model on the Hub. Authentication is the Hub's own: `hf auth login` or `HF_TOKEN`.

What it is for: which files belong to a published model, that no secret is in them, and an upload that survives a bad
network. What it is not for: writing the model card (model_card.py) or the command line (publish.py).

An upload is one commit: a reader sees the old model or the new one, never a half. Until that commit nothing is visible,
so a failed upload costs nothing, and repeating it sends only what has not arrived.
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
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalTokenNotFoundError

from training.cli import UserError
from training.config import HubConfig

logger = logging.getLogger(__name__)
T = TypeVar("T")

# A model, ours or a fitted prior: its weights (also in half precision, also in pieces) and what describes them. The
# source that `config.json` names is added to these.
_MODEL = ("config.json", "diffusion_pytorch_model*.safetensors", "diffusion_pytorch_model*.safetensors.index.json")
_BELONGS = (*_MODEL, "README.md", "training_config.json", "images/*.png", "onnx/*.onnx")
_PRIORS = "priors/*"

# Answers after which the same request may succeed: overload, rate limits, and gateways that lost the server.
_TRANSIENT = (408, 429, 500, 502, 503, 504)
_REFUSED = (429, 503)  # of these, the ones that say that nothing was done
_NETWORK = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3")  # whose errors are of the connection
_ATTEMPTS = 6
_FIRST_DELAY_S = 2.0  # doubled after each attempt
_MAX_DELAY_S = 300.0  # longest wait that a server's Retry-After is followed in

_SECRETS = {
    "a Hugging Face token": rb"\b(?:hf|api_org)_[A-Za-z0-9]{20,}",
    "a GitHub token": rb"\bgh[pousr]_[A-Za-z0-9]{30,}|\bgithub_pat_[A-Za-z0-9_]{30,}",
    "an AWS key": rb"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "a Google key": rb"\bAIza[0-9A-Za-z_-]{35}",
    "a Slack token": rb"\bxox[abeprs]-[0-9A-Za-z-]{10,}",
    "an API key": rb"\bsk-[A-Za-z0-9_-]{24,}",
    "a JSON web token": rb"\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.",
    "a private key": rb"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "a password in an address": rb"\b[a-z][a-z0-9+.-]*://[^/\s:@\"']+:[^/\s:@\"']+@",
}
_SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSW|API_?KEY|CREDENTIAL")


class PushError(UserError):
    """The Hub refused an upload, or could not be reached for long; nothing of it is visible there."""


# ---------------------------------------------------------------------- files


def files_to_publish(folder: Path) -> dict[str, Path]:
    """Exactly the files of a folder that belong to a published model: name in the repository -> file.

    Optimizer states, logs, checkpoints and whatever else lies beside them stay where they are.

    Raises:
        ValueError: There is no model in the folder.
    """
    names = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    wanted = {name: path for name, path in names.items() if belongs(name)}
    for name in [name for name in wanted if PurePosixPath(name).name == "config.json"]:
        source = _source_of(wanted[name])
        if source is not None and (beside := str(PurePosixPath(name).with_name(source))) in names:
            wanted[beside] = names[beside]
    if "config.json" not in wanted or not any(fnmatch.fnmatch(name, _MODEL[1]) for name in wanted):
        raise ValueError(
            f"{folder} holds no exported model (config.json and {_MODEL[1]}): give the folder of a run, or of the model "
            "that it wrote."
        )
    return dict(sorted(wanted.items()))


def belongs(name: str) -> bool:
    """Whether a file of that name is ours in a repository; sources are not decided by name."""
    patterns = (*_BELONGS, *(f"{_PRIORS}/{pattern}" for pattern in _MODEL))
    return any(_matches(name, pattern) for pattern in patterns)


def _matches(name: str, pattern: str) -> bool:
    """Like a shell: a star does not cross a folder."""
    parts, wanted = name.split("/"), pattern.split("/")
    return len(parts) == len(wanted) and all(map(fnmatch.fnmatchcase, parts, wanted))


def _source_of(config: Path) -> str | None:
    """Name of the source file that a model's `config.json` says it needs."""
    try:
        named = json.loads(config.read_text(encoding="utf-8"))["auto_map"]["AutoModel"]
    except (ValueError, KeyError, TypeError):
        return None
    return f"{str(named).partition('.')[0]}.py"


# ---------------------------------------------------------------------- secrets


def find_secrets(files: dict[str, Path]) -> list[str]:
    """Where tokens, keys and passwords are in files that are about to leave this machine; never what they are.

    Looked for are the shapes of well-known tokens, the Hub token in use, and the values of environment variables whose
    name says that they are secret. Of weights the header is read, which is text; the numbers behind it are not.
    """
    patterns = {kind: re.compile(pattern) for kind, pattern in _SECRETS.items()}
    for where, value in _own_secrets():
        patterns[where] = re.compile(re.escape(value.encode()))
    found = []
    for name, path in files.items():
        data = safetensors_header(path) if path.suffix == ".safetensors" else path.read_bytes()
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
        # Short values are switches, and values with separators are places, not secrets.
        if _SECRET_NAME.search(name.upper()) and len(value) >= 12 and "/" not in value and os.sep not in value:
            yield f"the value of {name}", value


def safetensors_header(path: Path) -> bytes:
    """The JSON at the beginning of a safetensors file: a length in 8 bytes, little-endian, and so many bytes.

    Raises:
        ValueError: The file is cut short, or none of that kind.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(min(length, size))
    try:
        tensors = [entry for name, entry in json.loads(header).items() if name != "__metadata__"]
        whole = size == 8 + length + max((entry["data_offsets"][1] for entry in tensors), default=0)
    except (ValueError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise ValueError(f"{path} is no whole safetensors file (it has {size:,} bytes): write it again.")
    return header


def refuse_secrets(files: dict[str, Path]) -> None:
    """Stop before anything leaves.

    Raises:
        ValueError: A file holds a secret; with the places.
    """
    found = find_secrets(files)
    if found:
        more = f" and {len(found) - 5} more" if len(found) > 5 else ""
        raise ValueError(
            f"nothing was sent, because these files hold secrets: {'; '.join(found[:5])}{more}. Remove them, and replace "
            "the secrets if the files have been elsewhere."
        )


# ---------------------------------------------------------------------- the Hub


def check_access(config: HubConfig) -> None:
    """Find out before hours of training whether the upload at their end will be allowed.

    Raises:
        ValueError: Nobody is logged in, the token may only read, the repository belongs to somebody else, or the Hub
            does not answer.
    """
    api = HfApi()
    target = f"hub.push to {config.repo_id}"
    try:
        user = _patiently("whoami", api.whoami, retry_cut=False)
        namespace = str(config.repo_id).partition("/")[0]
        known = [user.get("name"), *(entry.get("name") for entry in user.get("orgs") or [])]
        # A stranger's repository may have been opened to this user; one that does not exist was not.
        foreign = namespace not in known and not api.repo_exists(config.repo_id)
    except LocalTokenNotFoundError:
        raise ValueError(
            f"{target} needs a token and there is none: run `hf auth login`, set HF_TOKEN, or set hub.push to false."
        ) from None
    except Exception as error:  # which ones, depends on the HTTP library that this huggingface_hub uses
        raise ValueError(
            f"{target}: the Hub refused or did not answer ({_reason(error)}); log in again, or set hub.push to false."
        ) from None
    role = ((user.get("auth") or {}).get("accessToken") or {}).get("role")
    if role == "read":
        raise ValueError(f"{target}: the token of {user.get('name')} may only read; log in with one that may write.")
    if foreign:
        raise ValueError(
            f"{target}: {user.get('name')} is not {namespace} and no member of it; known are {', '.join(filter(None, known))}."
        )


def push(folder: Path, config: HubConfig, create_pr: bool = False) -> str:
    """Upload an exported model in one commit; may be repeated.

    Files of an older upload that belong to a model and are not part of this one (another variant's weights, a prior)
    are removed by the same commit, so that the repository never mixes two models; files of other names are left alone.

    Args:
        folder: A model's folder; see `files_to_publish`.
        config: Section `hub`.
        create_pr: Open a pull request instead of writing to the main branch.

    Returns:
        The address of the repository, or of the pull request.

    Raises:
        ValueError: The folder holds no model, or a secret, or nobody is logged in; nothing was sent.
        PushError: The Hub refused, or could not be reached; nothing of the upload is visible there.
    """
    files = files_to_publish(folder)
    refuse_secrets(files)
    api, repo_id = HfApi(), str(config.repo_id)
    if get_token() is None:
        raise ValueError(f"publishing {repo_id} needs a token and there is none: run `hf auth login`, or set HF_TOKEN.")

    def commit() -> str:
        # Made anew in each attempt: what has arrived is asked again, so that an earlier commit whose answer was lost
        # is recognised and not made twice.
        stale = [name for name in _remote_files(api, repo_id) if name not in files and belongs(name)]
        info = api.create_commit(
            repo_id,
            [CommitOperationAdd(name, str(path)) for name, path in files.items()]
            + [CommitOperationDelete(name) for name in stale],
            commit_message="Upload a trained AutoencoderKLUltra",
            create_pr=create_pr,
        )
        return info.pr_url or url

    try:
        made = _patiently("create", lambda: api.create_repo(repo_id, private=config.private, exist_ok=True))
        url = str(made)
        # A pull request whose answer was lost would be opened twice.
        return _patiently("upload", commit, retry_cut=not create_pr)
    except Exception as error:
        status = _status(error)
        remedy = "repeat the same command" if status is None or status in _TRANSIENT else "correct that and repeat it"
        if status in (401, 403):
            remedy = "log in with a token that may write there"
        elif status is None and create_pr:
            remedy = f"see {api.endpoint}/{repo_id}/discussions, where the pull request may be, before you repeat it"
        raise PushError(f"the upload to {repo_id} failed ({_reason(error)}): {remedy}.") from error


def _remote_files(api: HfApi, repo_id: str) -> list[str]:
    try:
        return api.list_repo_files(repo_id)
    except EntryNotFoundError:  # an empty repository
        return []


def _patiently(what: str, call: Callable[[], T], retry_cut: bool = True) -> T:
    """Call until it succeeds, with growing pauses.

    huggingface_hub itself repeats the parts of an upload (`http_backoff`: 5 times, 1 to 8 s apart, on 408, 429, 5xx and
    cut connections), but not the creation of a repository, the check of the card and the commit.

    Args:
        what: "create", "upload" or "whoami", for the log.
        call: The request; safe to repeat.
        retry_cut: Also after a connection was cut, when nobody knows whether the request had been carried out.
    """
    delay = _FIRST_DELAY_S
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return call()
        except Exception as error:
            status = _status(error)
            if status is not None:
                again = status in (_TRANSIENT if retry_cut else _REFUSED)
            else:
                again = retry_cut and _is_cut(error)
            if not again or attempt == _ATTEMPTS:
                raise
            wait = min(_retry_after(error) or delay, _MAX_DELAY_S)
            logger.warning(
                "%s: %s; attempt %d of %d follows in %.0f s", what, _reason(error), attempt + 1, _ATTEMPTS, wait
            )
            time.sleep(wait)
            delay *= 2
    raise AssertionError("unreachable")


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and what caused it: huggingface_hub wraps those of a file's upload."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__


def _response(error: BaseException):
    answers = (getattr(cause, "response", None) for cause in _chain(error) if isinstance(cause, HfHubHTTPError))
    return next((answer for answer in answers if answer is not None), None)


def _status(error: BaseException) -> int | None:
    response = _response(error)
    return None if response is None else response.status_code


def _is_cut(error: BaseException) -> bool:
    """Whether a connection failed, or something other than the Hub answered (a gateway's page instead of JSON)."""
    return any(
        isinstance(cause, (ConnectionError, TimeoutError, json.JSONDecodeError))
        or type(cause).__module__.partition(".")[0] in _NETWORK
        for cause in _chain(error)
    )


def _retry_after(error: BaseException) -> float | None:
    response = _response(error)
    try:
        return None if response is None else float(response.headers["Retry-After"])
    except (KeyError, ValueError):
        return None


def _reason(error: BaseException) -> str:
    """One line without the signatures that addresses of uploads carry."""
    # huggingface_hub wraps what happens to a file's upload in a RuntimeError that does not say it.
    shown = error.__cause__ if type(error) is RuntimeError and error.__cause__ else error
    text = " ".join(str(shown).split())
    return re.sub(r"\?\S+", "", f"{type(shown).__name__}: {text}")[:300]
