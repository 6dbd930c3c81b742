"""What one process finds out, all of them know."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list

T = TypeVar("T")


def on_main_process(state: Accelerator | PartialState, function: Callable[[], T]) -> T:
    """Call `function` on the main process and give every process its result; all processes must call this.

    Args:
        state: Says which process this is.
        function: Its result, or its error, must be picklable.

    Raises:
        ValueError: The function raised it; on every process.
    """
    box: list = [None, None]
    if state.is_main_process:
        try:
            box[0] = function()
        except ValueError as error:
            if state.num_processes == 1:
                raise
            box[1] = error
    if state.num_processes > 1:
        broadcast_object_list(box, from_process=0)
    if box[1] is not None:
        raise box[1]
    return box[0]
