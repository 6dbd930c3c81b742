"""What each process of tests/test_multiprocess.py runs: one gradient, then a full training, and a record of both.

torchrun --standalone --nproc_per_node 2 tests/multiprocess_worker.py CONFIG FOLDER
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from training.config import Config, load_config
from training.trainer import Trainer


def record(config: Config, folder: Path) -> None:
    """Train, and leave rank<r>_{first,gradients,last}.safetensors and rank<r>.json in `folder`."""
    trainer = Trainer(config)
    accelerator = trainer.accelerator
    rank, processes = accelerator.process_index, accelerator.num_processes
    assert processes == int(os.environ.get("WORLD_SIZE", "1"))
    first = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    (batch,) = trainer.stream.epoch_batches(0, max_batches=1)
    trainer.train_step.gradients(batch.pixels, step=0, beta=0.01)
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    gradients = {names[id(parameter)]: parameter.grad.clone() for parameter in trainer.setup.parameters}
    trainer.train_step.optimizer.zero_grad(set_to_none=True)

    # The state behind each epoch's decisions, on every process and not only the one that writes the log.
    trace, decide = [], trainer._end_epoch

    def decide_and_record(*args, **kwargs):
        is_best = decide(*args, **kwargs)
        plateau, progress = trainer.learning_rate._plateau, trainer.progress
        trace.append(
            {
                "learning_rate": trainer.setup.optimizer.param_groups[0]["lr"],
                "plateau": [plateau.best, plateau.num_bad_epochs],
                "early_stopping_bad_epochs": progress.early_stopping_bad_epochs,
                "best_epoch": progress.best["epoch"],
                "validation": [value for name, value in progress.best.items() if name.startswith("validation/")],
                "kl": [trainer.kl.log_beta, trainer.kl.smoothed_fraction, trainer.kl.smoothed_kl],
            }
        )
        return is_best

    trainer._end_epoch = decide_and_record
    code = trainer.run()
    last = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    for kind, tensors in (("first", first), ("gradients", gradients), ("last", last)):
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(tensors, folder / f"rank{rank}_{kind}.safetensors")
    facts = {"processes": processes, "code": code, "steps": trainer.progress.step, "trace": trace}
    facts |= {"example_ids": batch.example_ids, "threads": torch.get_num_threads()}
    (folder / f"rank{rank}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    record(load_config(sys.argv[1]), Path(sys.argv[2]))
