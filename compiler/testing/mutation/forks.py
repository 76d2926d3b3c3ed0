"""Calls in processes of their own, with a time limit: whatever they do to modules, to the machine's memory or to time ends with them.

A process is a fork: it has everything that was captured and imported before.
"""

from __future__ import annotations

import gc
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import connection, get_context
from multiprocessing.process import BaseProcess
from typing import Any

import torch

MEMORY = 4 << 30  # bytes beyond what is mapped when a process starts


@dataclass(frozen=True)
class Lost:
    """No result: the time was over (``timeout``), or the process ended without one."""

    timeout: bool


def in_forks(
    calls: Sequence[Callable[[], Any]], jobs: int, seconds: Callable[[int], float]
) -> Iterator[tuple[int, Any]]:
    """Yield the index and the result of each call, or :class:`Lost`, as they end; ``seconds(index)`` is the limit of each.

    Raises what a call raises.
    """
    context = get_context("fork")
    waiting = list(range(len(calls)))[::-1]
    running: dict[Any, tuple[int, BaseProcess, float]] = {}
    gc.collect()
    gc.freeze()  # a collection in the processes would copy all pages
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                index = waiting.pop()
                receiver, sender = context.Pipe(duplex=False)
                process: BaseProcess = context.Process(target=_answer, args=(calls[index], sender), daemon=True)
                process.start()
                sender.close()
                running[receiver] = (index, process, time.monotonic() + seconds(index))
            nearest = min(deadline for _, _, deadline in running.values())
            ready: list[Any] = connection.wait(list(running), max(0.0, nearest - time.monotonic()))
            late = [r for r, (_, _, deadline) in running.items() if deadline <= time.monotonic() and r not in ready]
            for receiver in (*ready, *late):
                index, ended, _ = running.pop(receiver)
                answer = _received(receiver) if receiver in ready else Lost(timeout=True)
                if isinstance(answer, Exception):
                    raise answer
                yield index, answer
                ended.kill()
                ended.join()
    finally:
        gc.unfreeze()
        for _, left, _ in running.values():
            left.kill()


def _answer(call: Callable[[], Any], sender: connection.Connection) -> None:
    """Send the result of a call to the parent, and print nothing."""
    os.setpgrp()
    silent = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    torch.set_num_threads(1)  # the threads of the parent are not here
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_mapped() + MEMORY, hard))
    try:
        sender.send(call())
    except Exception as error:
        sender.send(error)
    sender.close()
    os._exit(0)


def _mapped() -> int:
    """Return the bytes of address space that this process has."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def _received(receiver: Any) -> Any:
    try:
        return receiver.recv()
    except EOFError:
        return Lost(timeout=False)
    finally:
        receiver.close()
