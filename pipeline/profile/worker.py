"""The process of one loader, which `runner` starts and controls. It answers one order at a time and sends it a result:

    ("open", MODULE:FUNCTION or a LoaderSpec)    -> Opened
    ("warm", seconds)                            -> Turn
    ("run", seconds, demand or None)             -> Turn

or a UserError. It imports nothing but the standard library before the loader does.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from ..errors import UserError
from . import processes, target
from .batches import Images, images_in

DRAIN = 0.25  # share of a turn in which batches do not count, as they may have been prefetched before
DYING = 5.0  # seconds in which a batch must come after a thread has failed


class Opened(NamedTuple):
    """seconds: from the call that makes the loader to its first batch. batch: that one."""

    seconds: float
    batch: Images


class Turn(NamedTuple):
    """Batches that were taken in a row. waited: seconds of waiting for them. epochs: how many ended meanwhile."""

    images: int
    batches: int
    seconds: float
    waited: float
    cpu_seconds: float
    epochs: int


class Source:
    """The batches of a loader, epoch after epoch. name: of the loader, for errors."""

    def __init__(self, make: Callable[[], Iterable[Any]], name: str) -> None:
        self._make, self._name = make, name
        self.epochs = self.taken = 0
        self._each = 0.0  # seconds of a batch in the last turn
        self._batches = self._endless()

    def next(self) -> Images:
        """Wait for a batch. Raises UserError if it has no images."""
        batch = next(self._batches)
        found = images_in(batch)
        if found is None:
            problem = f"`loader` {self._name}: its batches hold no tensor or array; the first is of type {type(batch).__name__}"
            inside = f" of {type(batch[0]).__name__}" if isinstance(batch, list | tuple) and batch else ""
            raise UserError(problem + inside, "return one loader, whose batches hold tensors or arrays")
        self.taken += 1
        return found

    def _endless(self) -> Iterator[Any]:
        loader, is_new = self._make(), True
        while True:
            before = self.taken
            yield from loader
            if self.taken > before:
                self.epochs, is_new = self.epochs + 1, False
                if hasattr(loader, "reset"):  # DALI's iterators
                    loader.reset()
            elif is_new:
                again = "more than one epoch; give a function that makes the loader" if self.taken else ""
                raise UserError(f"`loader` {self._name}: yields {f'no batches for {again}' if again else 'no batches'}")
            else:  # a generator, which ends with its epoch
                loader, is_new = self._make(), True

    def take(self, seconds: float) -> Turn:
        """Batches at full speed, for about `seconds`; at least one."""
        return self._turn(seconds, None)

    def run(self, seconds: float, demand: float | None) -> Turn:
        """Drain what was prefetched, then measure for about `seconds` in all. demand: images/s of a consumer, or None.

        Batches that take long are not drained: the budget has no time for them, and few of them were prefetched.
        """
        if self._each < DRAIN * seconds:
            self.take(DRAIN * seconds)
        return self._turn((1 - DRAIN) * seconds, demand)

    def _turn(self, seconds: float, demand: float | None) -> Turn:
        images = batches = 0
        waited, epochs = 0.0, self.epochs
        cpu, began = processes.cpu_seconds(os.getpid()), time.perf_counter()
        now = began
        while batches == 0 or now - began < seconds:
            count = self.next().count
            got = time.perf_counter()
            images, batches, waited = images + count, batches + 1, waited + got - now
            if demand:
                time.sleep(max(0.0, got + count / demand - time.perf_counter()))
            now = time.perf_counter()
        _synchronise()
        took = time.perf_counter() - began
        self._each = took / batches
        return Turn(images, batches, took, waited, processes.cpu_seconds(os.getpid()) - cpu, self.epochs - epochs)


def _synchronise() -> None:
    """Wait for the GPU, if the loader uses one."""
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def open_source(what: Any) -> tuple[Source, Opened]:
    """what: MODULE:FUNCTION, or a LoaderSpec. The module's import does not count."""
    if isinstance(what, str):
        make = target.find(what)
    else:
        from .. import open_loader

        def make() -> Iterable[Any]:
            return open_loader(what)

    began = time.perf_counter()
    source = Source(make, str(what) if isinstance(what, str) else "Cropfeed")
    first = source.next()
    return source, Opened(time.perf_counter() - began, first)


def main(descriptor: int) -> None:
    """Answer orders from this file descriptor until it is closed."""
    connection = Connection(descriptor)
    name, source = "", None

    def thread_failed(failure: threading.ExceptHookArgs) -> None:
        """Report a thread's exception if no batch comes any more. Without it, FFCV's loader would wait for ever."""
        taken = source.taken if source else 0
        time.sleep(DYING)
        if failure.exc_value and (source.taken if source else 0) == taken:
            connection.send(target.explain(failure.exc_value, name))
            os._exit(1)
        threading.__excepthook__(failure)

    threading.excepthook = thread_failed
    while True:
        try:
            kind, *values = connection.recv()
        except EOFError:
            os._exit(0)  # whatever threads the loader has
        answer: Any
        try:
            if kind == "open":
                name = values[0] if isinstance(values[0], str) else ""
                source, answer = open_source(*values)
            else:
                assert source is not None
                answer = source.take(*values) if kind == "warm" else source.run(*values)
        except UserError as error:
            answer = error
        except KeyboardInterrupt:
            os._exit(130)
        except BaseException as error:  # the loader may raise anything, SystemExit too
            if not name:
                raise  # a bug of Cropfeed
            answer = target.explain(error, name)
        with suppress(ConnectionError):  # the runner has ended
            connection.send(answer)
