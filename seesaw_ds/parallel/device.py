"""The device this process computes on, and streams and events that are None where the device has none.

DeepSpeed's accelerator decides which device that is. On CPU every copy and kernel is done when its call returns, so
there is nothing to order: a stream or event is None, and the functions here take None as "already done".
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from deepspeed.accelerator import get_accelerator

if TYPE_CHECKING:
    Stream = torch.cuda.Stream
    Event = torch.cuda.Event


def device() -> torch.device:
    """The device of this process: the current CUDA device, or the CPU."""
    return torch.device(get_accelerator().current_device_name())


def is_cuda(device: torch.device) -> bool:
    """Whether work on `device` is queued on streams and host memory must be registered for DMA."""
    return device.type == "cuda"


def can_start_early(device: torch.device) -> bool:
    """Whether a kernel may start while those before it run, and wait for them when it has to: from Hopper on."""
    return is_cuda(device) and torch.cuda.get_device_capability(device) >= (9, 0)


def set_device(device: torch.device) -> None:
    """Make `device` the calling thread's current one (the choice is per thread in CUDA)."""
    if is_cuda(device):
        get_accelerator().set_device(device.index)


def new_stream(device: torch.device) -> Stream | None:
    """A stream of the lowest priority, which is the priority of the default stream too."""
    return get_accelerator().Stream(device=device) if is_cuda(device) else None


def on_stream(stream: Stream | None) -> contextlib.AbstractContextManager[object]:
    """A context in which `stream` is the current stream."""
    return contextlib.nullcontext() if stream is None else get_accelerator().stream(stream)


def record_event(device: torch.device, *, timing: bool = False) -> Event | None:
    """An event at the end of what the current stream holds now; `timing` allows elapsed_time between two."""
    if not is_cuda(device):
        return None
    event = get_accelerator().Event(enable_timing=timing, blocking=True)
    event.record()
    return event


def wait_event(event: Event | None) -> None:
    """Make what the current stream gets from now on wait for `event`."""
    if event is not None:
        event.wait()


def synchronize_stream(device: torch.device) -> None:
    """Wait for what the current stream holds; other streams, such as those of copies, go on."""
    if is_cuda(device):
        get_accelerator().current_stream().synchronize()


def to_device(values: Sequence[int] | np.ndarray, device: torch.device) -> torch.Tensor:
    """Host integers as a device tensor of their dtype (int64 for a sequence), copied on the current stream."""
    tensor = torch.from_numpy(np.asarray(values))
    return tensor.pin_memory().to(device, non_blocking=True) if is_cuda(device) else tensor
