"""Devices that kernels are measured on: this machine's, or one that an RPC tracker knows."""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm.runtime.vm import VirtualMachine

from thresher.errors import BackendError
from thresher.tuning.options import Remote

MAX_WEIGHT_COPIES = 16
CALLS = 5  # of a bare kernel, of which the median is taken
SESSION_SECONDS = 600  # after which a device that does not answer is given up


class Runner:
    """A device of this machine, and kernels on it."""

    def __init__(self, kind: str):
        """Open the first device of a ``kind``, cpu or cuda; raises :class:`BackendError` where there is none."""
        self.device = tvm.device(kind, 0)
        if not self.device.exist:
            raise BackendError(
                f"tuning for {kind} measures on the device, and none is here: tune where one is, or name one behind an RPC tracker (Remote)"
            )

    def prepare(self, executable: Any) -> Any:
        """Do the part of loading that several threads may do at once: here, generate machine code."""
        return VirtualMachine(executable, self.device)

    def machine(self, prepared: Any) -> VirtualMachine:
        """Return the virtual machine of what was prepared."""
        return prepared

    def load(
        self, prepared: Any, weights: Sequence[np.ndarray], inputs: Sequence[np.ndarray], footprint: int
    ) -> Callable[[int], float]:
        """Return a function of a number of calls, the seconds that one of them takes.

        Every call reads other copies of the weights, of ``footprint`` bytes in all.
        """
        values = self.sent(inputs)
        copies = max(1, min(MAX_WEIGHT_COPIES, footprint // max(1, sum(w.nbytes for w in weights))))
        sets = [[*values, *self.sent(weights)] for _ in range(copies)]
        return self.timed(self.machine(prepared), sets)

    def seconds(self, main: Callable[..., Any], arguments: Sequence[Any]) -> float:
        """Return the seconds that a call of a bare kernel takes: the median of a few, after one to warm up."""
        samples = []
        for _ in range(CALLS + 1):
            start = time.perf_counter()
            main(*arguments)
            self.device.sync()
            samples.append(time.perf_counter() - start)
        return statistics.median(samples[1:])

    def sent(self, arrays: Sequence[np.ndarray]) -> list[Any]:
        """Return the arrays as tensors on the device."""
        return [tvm.runtime.tensor(np.ascontiguousarray(a), self.device) for a in arrays]

    def timed(self, machine: VirtualMachine, sets: list[list[Any]]) -> Callable[[int], float]:
        """Return a function of a number of calls, the seconds that one of them takes; the calls go through the ``sets`` of arguments."""
        main = machine["main"]
        for arguments in sets:
            main(*arguments)

        def call(times: int) -> float:
            main(*sets[0])  # the caches hold what the last contender read
            self.device.sync()
            start = time.perf_counter()
            for i in range(times):
                main(*sets[(i + 1) % len(sets)])
            self.device.sync()
            return (time.perf_counter() - start) / times

        return call


class RemoteRunner(Runner):
    """A device behind an RPC tracker; the clock is the device's."""

    def __init__(self, remote: Remote, kind: str, folder: Path):
        """Request the device; ``folder`` holds the code on its way. Raises :class:`BackendError` where the tracker has no such device."""
        from tvm import rpc

        try:
            tracker = rpc.connect_tracker(remote.host, remote.port)
            self.session = tracker.request(remote.key, session_timeout=SESSION_SECONDS)
        except Exception as error:
            raise BackendError(
                f"no device {remote.key!r} at the RPC tracker {remote.host}:{remote.port}: {error}; is the tracker running, and a "
                "server registered under that key?"
            ) from error
        self.device, self.folder, self.count = self.session.device(kind, 0), folder, itertools.count()

    def prepare(self, executable: Any) -> Path:
        """Write the code to a file of its own."""
        path = self.folder / f"kernel{next(self.count)}.so"
        executable.export_library(str(path))
        return path

    def machine(self, prepared: Path) -> VirtualMachine:
        """Send the code to the device and load it there."""
        self.session.upload(str(prepared))
        return VirtualMachine(self.session.load_module(prepared.name), self.device)

    def timed(self, machine: VirtualMachine, sets: list[list[Any]]) -> Callable[[int], float]:
        """Return a function of a number of calls, the seconds that one of them takes on the device."""

        def call(times: int) -> float:
            return float(
                statistics.mean(
                    machine.time_evaluator("main", self.device, number=1, repeat=1)(*sets[i % len(sets)]).mean
                    for i in range(times)
                )
            )

        return call


@contextmanager
def runner_of(remote: Remote | None, kind: str) -> Iterator[Runner]:
    """Yield a runner for devices of a ``kind`` (cpu or cuda): the remote one, else this machine's."""
    if remote is None:
        yield Runner(kind)
        return
    with tempfile.TemporaryDirectory(prefix="thresher-") as folder:
        yield RemoteRunner(remote, kind, Path(folder))
