"""A process that judges the samples it is sent, one name a line, and answers each with one JSON line.

What a sample or a library prints goes to standard error; the answers have the pipe that was standard output for themselves. A sample that
takes more processor time than its suite allows ends the process (SIGXCPU): seconds of a clock would depend on what else runs.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import warnings
from dataclasses import asdict
from functools import partial

LIMIT_BYTES = 8 << 30
#: Answer sent beside the verdict where the process should be replaced by a fresh one: what torch and TVM keep of earlier samples adds up.
RESTART_BYTES = 3 << 30


def main(suite_name: str) -> None:
    """Judge samples of one suite until standard input ends."""
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT_BYTES, LIMIT_BYTES))
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    os.environ["TVM_NUM_THREADS"] = "1"  # as torch: times are of one thread each
    import torch

    torch.set_num_threads(1)
    from .judge import judge
    from .suites import SUITES

    suite = SUITES[suite_name]
    for line in sys.stdin:
        name = line.rstrip("\n")
        _limit_processor_time(suite.limit)
        verdict = judge(partial(suite.build, name))
        answers.write(json.dumps({**asdict(verdict), "restart": _resident_bytes() > RESTART_BYTES}) + "\n")


def _limit_processor_time(seconds: float) -> None:
    """Let this process have so many seconds more than it has had."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    limit = int(usage.ru_utime + usage.ru_stime + seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))


def _resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


if __name__ == "__main__":
    main(sys.argv[1])
