"""What a checkpoint contains: the one list of the tensors and objects that a resumed run needs.

Random state is not part of it: all randomness of a step is a function of the seed and the step (randomness.py).
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from training.checkpoint.format import copy_into, read_tensors
from training.distributed import on_main_process
from training.ema import EMAWeights
from training.run_files import DISCRIMINATOR_FILE, MODEL_FILE, OPTIMIZER_FILE, WEIGHTS_FILE

logger = logging.getLogger(__name__)

_ALIGNMENT = 64  # bytes, of each tensor in the buffer of the copies
_OPTIMIZER_STATE = ("step", "exp_avg", "exp_avg_sq")  # of Adam for each parameter; Muon has exp_avg only


class Stateful(Protocol):
    """An object whose state is JSON values."""

    def state_dict(self) -> dict[str, Any]:
        """Returns the state."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a state."""


class TrainingState:
    """The state of a run: named tensors for safetensors files, and JSON values.

    Args:
        accelerator: Holds the gradient scaler and the processes.
        model: Unwrapped, on the device.
        optimizer: Adam, AdamW or Muon over the model's trained parameters.
        ema: EMA weights of the trained parameters, or None.
        components: Name in the checkpoint -> object whose state is JSON values, the same on every process.
        other_tensors: File in the checkpoint -> returns its tensors by name.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        ema: EMAWeights | None,
        components: dict[str, Stateful],
        other_tensors: dict[str, Callable[[], dict[str, Tensor]]] | None = None,
    ) -> None:
        self.accelerator, self.model, self.optimizer, self.ema = accelerator, model, optimizer, ema
        self.components, self._other_tensors = components, other_tensors or {}
        self._trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._staging: Tensor | None = None

    def live_tensors(self) -> dict[str, dict[str, Tensor]]:
        """Returns the tensors themselves, not copies, by file of a checkpoint and name.

        With EMA, `MODEL_FILE` has the EMA weights, which are evaluated and published, and `WEIGHTS_FILE` the trained ones."""
        files = {MODEL_FILE: dict(self.model.state_dict())}
        if self.ema is not None:
            files[MODEL_FILE].update(zip(self._trained, self.ema.shadow_params, strict=True))
            files[WEIGHTS_FILE] = dict(self._trained)
        files[OPTIMIZER_FILE] = {
            f"{kind}/{name}": self.optimizer.state[parameter][kind]
            for name, parameter in self._trained.items()
            if parameter in self.optimizer.state
            for kind in _OPTIMIZER_STATE
            if kind in self.optimizer.state[parameter]
        }
        return files | {file: tensors() for file, tensors in self._other_tensors.items()}

    def host_tensors(self) -> dict[str, dict[str, Tensor]]:
        """Returns `live_tensors` as contiguous copies in host memory, which are valid until the next call.

        All of them lie in one buffer; that of a GPU's copies is page-locked and kept, so that the host waits only once.
        """
        files = self.live_tensors()
        on_gpu = self.accelerator.device.type == "cuda"
        offsets = itertools.accumulate(
            (-(-each.nbytes // _ALIGNMENT) * _ALIGNMENT for tensors in files.values() for each in tensors.values()),
            initial=0,
        )
        *starts, size = offsets
        staging = self._staging
        if staging is None or staging.nbytes != size:
            staging = torch.empty(size, dtype=torch.uint8, pin_memory=on_gpu)
            self._staging = staging if on_gpu else None
        places = iter(starts)

        def copy(tensor: Tensor) -> Tensor:
            start = next(places)
            place = staging[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            return place.copy_(tensor.detach(), non_blocking=on_gpu)

        copies = {file: {name: copy(each) for name, each in tensors.items()} for file, tensors in files.items()}
        if on_gpu:
            torch.cuda.synchronize(self.accelerator.device)
        return copies

    def values(self) -> dict[str, Any]:
        """Returns everything else, as JSON values."""
        scaler, ema = self.accelerator.scaler, self.ema
        return {
            "optimizer_has_state": bool(self.optimizer.state),
            "scaler": None if scaler is None else scaler.state_dict(),
            "ema": None if ema is None else {"step": ema.optimization_step, "decay": ema.cur_decay_value},
            **{name: component.state_dict() for name, component in self.components.items()},
        }

    def load(self, checkpoint: Path, values: dict[str, Any]) -> None:
        """Restores a checkpoint; every process calls it, the main process reads the files and broadcasts.

        Args:
            checkpoint: A verified checkpoint.
            values: What `values` returned, the same on every process.

        Raises:
            ValueError: The checkpoint belongs to another model.
        """
        if values["optimizer_has_state"]:
            self.create_optimizer_state()
        for file, tensors in self.live_tensors().items():
            if file == DISCRIMINATOR_FILE and not on_main_process(self.accelerator, (checkpoint / file).is_file):
                logger.warning("resume: the checkpoint has no discriminator, which starts from its initial weights")
                continue
            if self.accelerator.is_main_process:
                copy_into(tensors, read_tensors(checkpoint, file), file)
            if self.accelerator.num_processes > 1:
                for tensor in tensors.values():
                    sent = (
                        tensor.detach().contiguous()
                    )  # a copy where needed; `tensor` keeps its strides (channels_last)
                    torch.distributed.broadcast(sent, src=0)
                    with torch.no_grad():
                        tensor.copy_(sent)
        if self.accelerator.scaler is not None and values["scaler"]:
            self.accelerator.scaler.load_state_dict(values["scaler"])
        if self.ema is not None:
            self.ema.optimization_step = values["ema"]["step"]
            self.ema.cur_decay_value = values["ema"]["decay"]
        for name, component in self.components.items():
            if name in values:
                component.load_state_dict(values[name])
            else:  # written by an earlier version
                logger.warning("resume: the checkpoint has no state of %s, which starts from its defaults", name)

    def create_optimizer_state(self) -> None:
        """Creates the optimizer's state before the first step, as it does in it: zeros in the strides of the parameters.

        So the trial of a micro-batch, which is before the first step, shares the device's memory with it.
        """
        members = [(group, parameter) for group in self.optimizer.param_groups for parameter in group["params"]]
        state: dict[int, dict[str, Tensor]] = {}
        for index, (group, parameter) in enumerate(members):
            state[index] = {"exp_avg": torch.zeros_like(parameter)}
            if not group.get("muon"):
                state[index]["exp_avg_sq"] = torch.zeros_like(parameter)
                state[index]["step"] = torch.zeros(())  # `load_state_dict` moves it to where the kernel expects it
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})
