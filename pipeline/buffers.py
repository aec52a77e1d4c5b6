"""Recycled host buffers for batches, and their copies to the device.

Newly allocated memory for a batch of 40 MB costs 10,000 page faults, which take 10 ms of one core.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch


def to_device(array: npt.NDArray[Any], device: torch.device | str) -> torch.Tensor:
    """Copy an array to the device, without waiting for the copy. On a CPU, the tensor shares the array's memory."""
    tensor = torch.from_numpy(array)
    if torch.device(device).type != "cuda":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)  # copies from pageable memory block the host


def split(memory: Any, shapes: Sequence[tuple[int, ...]]) -> list[Any]:
    """Consecutive parts of a flat array or tensor, in the given shapes."""
    ends = np.cumsum([math.prod(shape) for shape in shapes]).tolist()
    return [memory[end - math.prod(shape) : end].reshape(shape) for end, shape in zip(ends, shapes, strict=True)]


class BufferPool:
    """Provides host arrays with tensors that share their memory. An array is recycled once no tensor on its memory exists.

    So a batch is never overwritten while it is referenced, and memory is not allocated anew for every batch.
    """

    def __init__(self, device: str) -> None:
        """device: of the finished batches. For a GPU, uint8 buffers are pinned."""
        self._device = torch.device(device)
        self._copies = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        self._bytes = 0  # size of each array
        self._free: list[npt.NDArray[np.uint8]] = []
        self._in_use: list[tuple[weakref.ref[Any], npt.NDArray[np.uint8]]] = []
        self._lock = threading.Lock()

    def acquire(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> tuple[npt.NDArray[Any], torch.Tensor]:
        """An uninitialized array and a tensor that share memory on the host."""
        dtype = np.dtype(dtype)
        wanted = math.prod(shape) * dtype.itemsize
        if self._copies and dtype == np.uint8:  # torch itself recycles pinned memory once the copies from it have ended
            pinned = torch.empty(shape, dtype=torch.uint8, pin_memory=True)
            return pinned.numpy(), pinned
        with self._lock:
            memory = self._recycle(wanted)
            array = memory[:wanted].view(dtype).reshape(shape)
            self._in_use.append((weakref.ref(array), memory))  # tensors on `array` keep it alive
        return array, torch.from_numpy(array)

    def acquire_parts(
        self, shapes: Sequence[tuple[int, ...]], dtype: npt.DTypeLike
    ) -> tuple[list[npt.NDArray[Any]], torch.Tensor]:
        """Arrays of several shapes in one piece of memory, and the flat tensor of all: one copy moves them to a device."""
        memory, tensor = self.acquire((sum(map(math.prod, shapes)),), dtype)
        return split(memory, shapes), tensor

    def to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """An acquired tensor on the device. The copy runs on a stream of its own; the current stream waits for it."""
        if not self._copies:
            return tensor
        current = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._copies):
            copy = tensor.to(self._device, non_blocking=True)
        current.wait_stream(self._copies)
        copy.record_stream(current)
        return copy

    def _recycle(self, wanted: int) -> npt.NDArray[np.uint8]:
        """An array of at least `wanted` bytes that is no longer in use, or a new one.

        Unused arrays are found by polling: a callback of the weak references would swallow a KeyboardInterrupt raised in it.
        """
        if wanted > self._bytes:  # rare (progressive resizing): all arrays are replaced
            self._bytes = wanted
            self._free.clear()
        in_use = []
        for reference, memory in self._in_use:
            if reference() is not None:
                in_use.append((reference, memory))
            elif len(memory) == self._bytes:
                self._free.append(memory)
        self._in_use = in_use
        return self._free.pop() if self._free else np.empty(self._bytes, np.uint8)
