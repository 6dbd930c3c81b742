"""Publishing a finished model on the Hub. Authentication is the Hub's own: `hf auth login` or `HF_TOKEN`."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import LocalTokenNotFoundError

from training.config import HubConfig


def check_access(config: HubConfig) -> None:
    """Find out before hours of training whether the upload at their end will be allowed.

    Raises:
        ValueError: Nobody is logged in, or the Hub does not answer.
    """
    try:
        HfApi().whoami()
    except LocalTokenNotFoundError:
        raise ValueError(
            f"hub.push to {config.repo_id} needs a token and there is none: run `hf auth login`, set HF_TOKEN, or set "
            "hub.push to false."
        ) from None
    except Exception as error:  # which ones, depends on the HTTP library that this huggingface_hub uses
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(
            f"hub.push to {config.repo_id}: the Hub refused or did not answer ({reason}); log in again, or set hub.push "
            "to false."
        ) from None


def push(folder: Path, config: HubConfig) -> str:
    """Upload an exported model; may be repeated.

    Args:
        folder: What `export_model` wrote.
        config: Section `hub`.

    Returns:
        The repository's address.
    """
    api = HfApi()
    url = api.create_repo(config.repo_id, private=config.private, exist_ok=True)
    api.upload_folder(repo_id=config.repo_id, folder_path=folder, commit_message="Upload a trained AutoencoderKLUltra")
    return str(url)
