"""Memory for batches that comes back by itself: a fresh 40 MB batch costs the kernel 10,000 page faults, 10 ms on one core."""

from __future__ import annotations

import math
import weakref
from collections import deque
from typing import Any

import numpy as np
import numpy.typing as npt
import torch


class BufferPool:
    """Lends arrays as tensors. When the last tensor on an array is gone, wherever that was, the array is lent again.

    So a batch stays as it is for as long as anybody keeps it, and no memory is freed and taken anew while nobody does.
    """

    def __init__(self) -> None:
        self._free: deque[npt.NDArray[np.uint8]] = deque()
        self._bytes = 0

    def lend(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> tuple[npt.NDArray[Any], torch.Tensor]:
        """An array of undefined content and a tensor on the same memory."""
        dtype = np.dtype(dtype)
        wanted = math.prod(shape) * dtype.itemsize
        if wanted > self._bytes:  # batches grow rarely (progressive resizing): then all arrays are replaced
            self._bytes = wanted
        memory = self._take()
        lent = memory[:wanted].view(dtype).reshape(shape)
        weakref.finalize(lent, self._give_back, memory).atexit = False  # torch keeps `lent` as long as a tensor lives on it
        return lent, torch.from_numpy(lent)

    def _take(self) -> npt.NDArray[np.uint8]:
        while self._free:
            memory = self._free.pop()
            if len(memory) == self._bytes:
                return memory
        return np.empty(self._bytes, np.uint8)

    def _give_back(self, memory: npt.NDArray[np.uint8]) -> None:
        if len(memory) == self._bytes:
            self._free.append(memory)
