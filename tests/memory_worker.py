"""Steps of two processes, of which one runs out of memory; started by test_multiprocess with torchrun.

torchrun --nproc_per_node 2 tests/memory_worker.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import test_step
import torch
from safetensors.torch import save_file


def main(folder: Path) -> None:
    loss = test_step.make_loss()
    pixels = (torch.arange(8 * 3 * 40 * 40).reshape(8, 3, 40, 40) % 251).byte()
    for name, adapt, short in (("plain", False, False), ("short", True, True)):
        step = test_step.make_step(loss, micro_batch=4 if short else 2, adapt_micro_batch=adapt)
        rank = step.accelerator.process_index
        assert step.accelerator.num_processes == 2
        if short and rank == 1:  # in its second step
            calls, backward = [], step.accelerator.backward

            def failing(total, calls=calls, backward=backward):
                calls.append(1)
                if len(calls) == 2:
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
                backward(total)

            step.accelerator.backward = failing
        halved = []
        for number in range(3):
            step(pixels[4 * rank : 4 * rank + 4], step=number, beta=0.01)
            halved.append(step.finish().halved)
        assert halved == ([False, True, False] if short else [False] * 3), halved
        assert step.micro_batch == 2
        weights = {str(index): parameter.detach().contiguous() for index, parameter in enumerate(step.parameters)}
        save_file(weights, folder / f"{name}{rank}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
