"""A process that dies is one crashed sample; results survive a run that is killed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks.conformance.page import render
from benchmarks.conformance.results import Results
from benchmarks.conformance.runner import Worker

#: A process that answers as the real one does, and does what the name of a sample says.
PROGRAM = """
import ctypes, json, os, resource, signal, sys, time
for line in sys.stdin:
    name = line.strip()
    if name == "segfault":
        ctypes.string_at(0)
    if name == "busy":
        resource.setrlimit(resource.RLIMIT_CPU, (1, resource.RLIM_INFINITY))
        while True:
            pass
    if name == "hang":
        time.sleep(60)
    if name == "exit":
        os._exit(3)
    print(json.dumps({"outcome": "equal", "reason": str(os.getpid()), "restart": name == "large"}), flush=True)
"""


@pytest.fixture
def worker(tmp_path: Path):
    with (tmp_path / "log").open("wb") as log:
        worker = Worker("", log, [sys.executable, "-c", PROGRAM])
        yield worker
        worker.stop()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("segfault", "the process ended: SIGSEGV"),
        ("busy", "the process ended: its time was used up"),
        ("exit", "the process ended: exit code 3"),
    ],
)
def test_a_process_that_ends(worker: Worker, name: str, reason: str) -> None:
    first = worker.judge("a", 30)
    assert first["outcome"] == "equal"
    assert worker.judge(name, 30) == {"outcome": "crashed", "reason": reason}
    after = worker.judge("b", 30)
    assert after["outcome"] == "equal" and after["reason"] != first["reason"]  # another process


def test_a_process_that_hangs(worker: Worker) -> None:
    worker.judge("a", 30)
    assert worker.judge("hang", 0.2) == {"outcome": "crashed", "reason": "no answer after 0 s"}
    assert worker.judge("b", 30)["outcome"] == "equal"


def test_a_process_that_has_grown_is_replaced(worker: Worker) -> None:
    same = [worker.judge(name, 30)["reason"] for name in ("a", "b", "large")]
    assert len(set(same)) == 1
    assert worker.judge("c", 30)["reason"] != same[0]


def test_results_go_on_after_a_line_that_was_cut_off(tmp_path: Path) -> None:
    results = Results(tmp_path / "op_db.jsonl")
    results.append("add:float32:0", {"outcome": "refused", "reason": "x"})
    results.append("add:float32:0", {"outcome": "equal", "reason": ""})
    results.append("sub:float32:0", {"outcome": "wrong", "reason": "output 0: dtype"})
    with results.path.open("a") as file:
        file.write('{"sample": "mul:flo')
    again = Results(results.path)
    assert {name: row["outcome"] for name, row in again.rows.items()} == {
        "add:float32:0": "equal",
        "sub:float32:0": "wrong",
    }
    again.append("mul:float32:0", {"outcome": "random", "reason": ""})
    assert len(Results(results.path).rows) == 3


def test_a_tidy_file_has_one_short_line_a_sample(tmp_path: Path) -> None:
    results = Results(tmp_path / "op_db.jsonl")
    results.append("sub:float32:0", {"outcome": "refused", "reason": "x", "library": [], "commit": "0123456"})
    results.append("sub:float32:0", {"outcome": "equal", "reason": "", "library": [], "commit": "89abcde"})
    results.append("add:float32:0", {"outcome": "equal", "reason": "", "build_seconds": None, "commit": "89abcde"})
    results.tidy()
    assert results.path.read_text().splitlines() == [
        '{"sample": "add:float32:0", "outcome": "equal", "commit": "89abcde"}',
        '{"sample": "sub:float32:0", "outcome": "equal", "commit": "89abcde"}',
    ]
    assert list(tmp_path.iterdir()) == [results.path]


def test_page(tmp_path: Path) -> None:
    """Samples counted apart are not in the share, and reasons that differ in numbers are one row."""
    results = Results(tmp_path / "timm.jsonl")
    times = {"build_seconds": 0.5, "milliseconds": 2.0, "eager_milliseconds": 1.0, "commit": "0123456"}
    results.append("a:float32:0", {"outcome": "equal", "reason": "", **times})
    results.append("a:float32:1", {"outcome": "library", "reason": "", **times})
    for index in range(2):
        reason = f"BackendError: cannot lower node b_{index} (aten.b.default): no rule | for 3 x {index}"
        results.append(f"b:float32:{index}", {"outcome": "refused", "reason": reason, "commit": "89abcde"})
    results.append("c:float32:0", {"outcome": "random", "reason": "", "commit": "0123456"})
    page = render({"timm": results})
    assert "| timm | 5 of 98 | 50.0% | 1 | 1 | 2 |" in page and "| 0.50 | 2.00x | 2 commits |" in page
    assert (
        "| 2 | BackendError: cannot lower node b_0 (aten.b.default): no rule / for 3 x 0 | `b:float32:0`, `b:float32:1` |"
        in page
    )
