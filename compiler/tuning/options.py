"""The options of tuning: how much to measure, and where the records go. Each backend decides itself what it measures."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from thresher.errors import InputError


@dataclass(frozen=True)
class Remote:
    """A device at a TVM RPC tracker (``python -m tvm.exec.rpc_tracker``, ``python -m tvm.exec.rpc_server --tracker=... --key=...``)."""

    host: str
    port: int
    key: str


def _torch_version() -> str:
    import torch  # here: the command line asks this module for defaults, and is to be quick

    return torch.__version__


@dataclass(frozen=True)
class TorchKernel:
    """The plan of a site that torch computes. It holds torch's version: the time of another version is not known."""

    torch: str = field(default_factory=_torch_version)


@dataclass(frozen=True)
class Tune:
    """A request to measure the plans of every kernel and to build with the fastest.

    Args:
        trials: plans per workload, at least 2 and at most 32; the one that would be built without tuning is always among them.
        seconds: stop beginning new workloads after this long; None: measure all. What was measured is kept and goes on next time.
        records: the file; default: :func:`thresher.tuning.records.default_path`.
        again: measure workloads that have a record, too.
        remote: measure on this device instead of here.
        search: schedules that MetaSchedule tries for every kernel that has no plans of ours (minutes for a model); 0: none.
        min_speedup: a plan must beat the untuned one by this fraction, on a second measurement, to be recorded.

    Raises:
        InputError: for a number out of its range.
    """

    trials: int = 16
    seconds: float | None = None
    records: str | Path | None = None
    again: bool = False
    remote: Remote | None = None
    search: int = 0
    min_speedup: float = 0.03

    def __post_init__(self) -> None:
        if not 2 <= self.trials <= 32:
            raise InputError(f"trials must be between 2 and 32, not {self.trials}")
        if self.search < 0 or (self.search and self.remote):
            raise InputError(
                f"search must be a number of schedules, and they are measured here, not on a remote device: {self.search}"
            )
        if not 0 <= self.min_speedup < 1:
            raise InputError(f"min_speedup must be a fraction between 0 and 1, not {self.min_speedup}")
