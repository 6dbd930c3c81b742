"""The state of a run as named tensors and plain values: taken out for a checkpoint, put back by a resume.

What it is for: which tensor of the model, the optimizer and the averaged weights has which name in which file, and
that every process has the main process's values after a load. What it is not for: files (checkpoint.py), and what
progress, plateau and KL control remember (trainer.py). Random state is missing on purpose: a step has none (step.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from training.checkpoint.format import copy_into, host_copy, read_tensors
from training.ema import EMAWeights
from training.run_files import MODEL_FILE, OPTIMIZER_FILE, WEIGHTS_FILE

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # of Adam and AdamW, for each parameter


class RunState:
    """The tensors of a run, by the names they have in a checkpoint.

    Args:
        accelerator: For the gradient scaler and the other processes.
        model: Unwrapped, on the device.
        optimizer: torch's Adam or AdamW over the model's trained parameters.
        ema: Averaged weights of the trained parameters, or None.
    """

    def __init__(
        self, accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, ema: EMAWeights | None
    ) -> None:
        self.accelerator, self.model, self.optimizer, self.ema = accelerator, model, optimizer, ema
        self._trained = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def live_tensors(self) -> dict[str, dict[str, Tensor]]:
        """File of a checkpoint -> name -> the tensor itself, not a copy."""
        files = {MODEL_FILE: dict(self.model.state_dict())}
        if self.ema is not None:
            files[MODEL_FILE].update(zip(self._trained, self.ema.shadow_params, strict=True))
            files[WEIGHTS_FILE] = dict(self._trained)
        files[OPTIMIZER_FILE] = {
            f"{kind}/{name}": self.optimizer.state[parameter][kind]
            for name, parameter in self._trained.items()
            if parameter in self.optimizer.state
            for kind in _MOMENTS
        }
        return files

    def host_tensors(self) -> dict[str, dict[str, Tensor]]:
        """`live_tensors`, copied to host memory: what training changes later, they do not show."""
        return {
            file: {name: host_copy(tensor) for name, tensor in tensors.items()}
            for file, tensors in self.live_tensors().items()
        }

    def plain_values(self) -> dict[str, Any]:
        """What is not a tensor, JSON-able."""
        scaler, ema = self.accelerator.scaler, self.ema
        return {
            "learning_rates": [group["lr"] for group in self.optimizer.param_groups],
            "has_moments": bool(self.optimizer.state),
            "scaler": None if scaler is None else scaler.state_dict(),
            "ema": None if ema is None else {"step": ema.optimization_step, "decay": ema.cur_decay_value},
        }

    def load(self, checkpoint: Path, values: dict[str, Any]) -> None:
        """Put a checkpoint's state back; called by every process, read by the main one alone.

        Args:
            checkpoint: A verified checkpoint.
            values: What `plain_values` gave, the same on every process.

        Raises:
            ValueError: The checkpoint belongs to another model.
        """
        if values["has_moments"]:
            self._create_state()
        for file, tensors in self.live_tensors().items():
            if self.accelerator.is_main_process:
                copy_into(tensors, read_tensors(checkpoint, file), file)
            if self.accelerator.num_processes > 1:
                for tensor in tensors.values():
                    sent = tensor.detach().contiguous()  # a copy where strides are others, which are kept
                    torch.distributed.broadcast(sent, src=0)
                    with torch.no_grad():
                        tensor.copy_(sent)
        for group, rate in zip(self.optimizer.param_groups, values["learning_rates"], strict=True):
            group["lr"] = rate
        if self.accelerator.scaler is not None and values["scaler"]:
            self.accelerator.scaler.load_state_dict(values["scaler"])
        if self.ema is not None:
            self.ema.optimization_step = values["ema"]["step"]
            self.ema.cur_decay_value = values["ema"]["decay"]

    def _create_state(self) -> None:
        """Adam's state as it is after a first step, with zeros; strides follow the parameters', as kernels expect."""
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        zeros = {
            index: {
                "step": torch.zeros(()),  # moved to the device where the kernel wants it there
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
            for index, parameter in enumerate(parameters)
        }
        self.optimizer.load_state_dict({"state": zeros, "param_groups": self.optimizer.state_dict()["param_groups"]})
