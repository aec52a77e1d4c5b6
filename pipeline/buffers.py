"""Memory on the host for batches, which comes back by itself, and its way to the device.

A fresh batch of 40 MB would cost the kernel 10,000 page faults, 10 ms of one core.
"""

from __future__ import annotations

import math
import threading
import weakref
from typing import Any

import numpy as np
import numpy.typing as npt
import torch


def to_device(array: npt.NDArray[Any], device: torch.device | str) -> torch.Tensor:
    """A table of numbers on the device, without waiting for it; on a CPU, a tensor on the array's memory."""
    tensor = torch.from_numpy(array)
    if torch.device(device).type != "cuda":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)  # from other memory the host would wait for the copy


class BufferPool:
    """Lends arrays as tensors. When the last tensor on an array is gone, wherever that was, the array is lent again.

    So a batch stays as it is for as long as anybody keeps it, and no memory is freed and taken anew while nobody does.
    """

    def __init__(self, device: str) -> None:
        """device: where batches go in the end; for a GPU, memory is pinned."""
        self._device = torch.device(device)
        self._copies = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        self._bytes = 0  # of each array
        self._free: list[npt.NDArray[np.uint8]] = []
        self._lent: list[tuple[weakref.ref[Any], npt.NDArray[np.uint8]]] = []
        self._taking = threading.Lock()

    def acquire(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> tuple[npt.NDArray[Any], torch.Tensor]:
        """An array of undefined content and a tensor on the same memory, on the host."""
        dtype = np.dtype(dtype)
        wanted = math.prod(shape) * dtype.itemsize
        if self._copies and dtype == np.uint8:  # torch itself keeps pinned memory, and knows when a copy from it has ended
            pinned = torch.empty(shape, dtype=torch.uint8, pin_memory=True)
            return pinned.numpy(), pinned
        with self._taking:
            memory = self._take(wanted)
            lent = memory[:wanted].view(dtype).reshape(shape)
            self._lent.append((weakref.ref(lent), memory))  # torch keeps `lent` as long as a tensor lives on it
        return lent, torch.from_numpy(lent)

    def to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """A lent tensor on the device. It is copied beside what the device is doing; its current stream waits for that."""
        if not self._copies:
            return tensor
        current = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._copies):
            copy = tensor.to(self._device, non_blocking=True)
        current.wait_stream(self._copies)
        copy.record_stream(current)
        return copy

    def _take(self, wanted: int) -> npt.NDArray[np.uint8]:
        """At least so many bytes, which nobody holds any more, or new.

        What has come back is looked for here: a callback of the weak references would swallow an interrupt that falls into it.
        """
        if wanted > self._bytes:  # batches grow rarely (progressive resizing): then all arrays are replaced
            self._bytes = wanted
            self._free.clear()
        held = []
        for reference, memory in self._lent:
            if reference() is not None:
                held.append((reference, memory))
            elif len(memory) == self._bytes:
                self._free.append(memory)
        self._lent = held
        return self._free.pop() if self._free else np.empty(self._bytes, np.uint8)
