"""Runs samples in processes of their own: one that is killed, runs out of memory or never ends is one crashed sample, and no more."""

from __future__ import annotations

import contextlib
import json
import queue
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parents[2]
START_SECONDS = 120.0  # for a new process to import torch, beside the limit of its first sample
PATIENCE = 10.0  # a process that has not used up its processor time after so many times its limit hangs
Row = dict[str, Any]


class Worker:
    """One process of :mod:`benchmarks.conformance.worker`, started when it is needed and again after it has died.

    Args:
        suite: name of the suite.
        log: where the standard error of the process goes.
        command: another program that answers in the same way (for tests).
    """

    def __init__(self, suite: str, log: IO[bytes], command: list[str] | None = None):
        self.command = command or [sys.executable, "-X", "faulthandler", "-m", "benchmarks.conformance.worker", suite]
        self.log = log
        self.process: subprocess.Popen[bytes] | None = None

    def judge(self, name: str, limit: float) -> Row:
        """Return the verdict on one sample as a row: that of the process, or ``crashed`` with the way in which the process ended.

        ``limit``: seconds, after which a process that still runs hangs and is ended.
        """
        if self.process is None:
            self.process = subprocess.Popen(
                self.command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log
            )
            limit += START_SECONDS
        process = self.process
        assert process.stdin is not None and process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended: that is seen where its answer is read
            process.stdin.write(name.encode() + b"\n")
            process.stdin.flush()
        ready, _, _ = select.select([process.stdout], [], [], limit)
        if not ready:
            self.stop()
            return {"outcome": "crashed", "reason": f"no answer after {limit:.0f} s"}
        line = process.stdout.readline()
        if not line.endswith(b"\n"):
            code = process.wait()
            self.process = None
            return {"outcome": "crashed", "reason": f"the process ended: {_ending(code)}"}
        row = json.loads(line)
        if row.pop("restart", False):
            self.stop()
        return row

    def stop(self) -> None:
        """End the process, if there is one."""
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


def run_samples(
    suite: str, names: Iterable[str], limit: float, jobs: int, log: Path, done: Callable[[str, Row], None]
) -> None:
    """Judge samples of a suite in ``jobs`` processes.

    ``limit``: seconds of processor time for a sample; ``done`` is called with each name and its row, from one thread at a time.
    """
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
    for name in names:
        waiting.put(name)
    lock = threading.Lock()

    def work() -> None:
        with log.open("ab") as file:
            worker = Worker(suite, file)
            try:
                while True:
                    name = waiting.get_nowait()
                    row = worker.judge(name, PATIENCE * limit)
                    with lock:
                        done(name, row)
            except queue.Empty:
                pass
            finally:
                worker.stop()

    threads = [threading.Thread(target=work) for _ in range(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _ending(code: int) -> str:
    if code == -signal.SIGXCPU:
        return "its time was used up"
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"
