# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "accelerate>=1.10",
#     "datasets>=4.3",
#     "diffusers>=0.37",
#     "filelock>=3.12",
#     "huggingface_hub>=0.34",
#     "lpips>=0.1.4",
#     "matplotlib>=3.8",
#     "numpy>=1.26",
#     "pillow>=11.3",
#     "psutil>=5.9",
#     "pyarrow>=21",
#     "rich>=13.7",
#     "safetensors>=0.4.5",
#     "scikit-learn>=1.3",
#     "tensorboard>=2.16",
#     "torch>=2.8",
#     "torchmetrics>=1.4",
#     "torchvision>=0.23",
#     "tqdm>=4.66",
#     "transformers>=4.50",
# ]
# ///
"""Trains on rented hardware and uploads the model, in one line, for example with Hugging Face Jobs:

    hf jobs uv run --flavor l4x1 --timeout 30h --secrets HF_TOKEN examples/train_job.py \\
        --repository https://example.com/face-vae-trainer.git --repo-id org/name --config configs/ultra.json

`uv` installs what the first lines list. The script clones the project into `face-vae-trainer` in the current folder, or uses
the clone that is there, and starts one process for each GPU. Unknown options are passed to train_vae.py, such as
`--set training_presets.num_epochs=10`. The disk of a job is lost when it ends, so the best model is uploaded to a private
repository; the token needs the right to write. The exit code is not 0 if the upload failed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code of the training."""
    parser = argparse.ArgumentParser(description="Clone the project, train and upload the model.")
    parser.add_argument("--repository", required=True, metavar="URL", help="Git repository of the project")
    parser.add_argument("--branch", default="main", metavar="NAME", help="branch or tag (%(default)s)")
    parser.add_argument("--repo-id", required=True, metavar="ORG/NAME", help="model repository on the Hub")
    arguments, options = parser.parse_known_args(argv)
    folder = str(Path("face-vae-trainer").absolute())
    clone = ["git", "clone", "--depth", "1", "--branch", arguments.branch, arguments.repository, folder]
    if Path(folder).is_dir():
        print(f"using the clone in {folder}; --repository and --branch have no effect", file=sys.stderr)
    elif subprocess.run(clone).returncode:
        return 2
    push = ["--set", "hub.push=true", "--set", f"hub.repo_id={arguments.repo_id}"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "gpu"]
    return subprocess.run([*launch, "train_vae.py", *push, *options], cwd=folder).returncode


if __name__ == "__main__":
    sys.exit(main())
