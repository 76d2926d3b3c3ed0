"""The records of tuning: for a target, the fastest plan of every workload. One SQLite file, safe for several processes.

    default file    $THRESHER_CACHE/records.sqlite, else ~/.cache/thresher/records.sqlite
    shipped         records.jsonl of a backend: read where the file has nothing

A record is written the moment it is measured, in a transaction of its own: a tuning that is killed goes on where it was. Files are merged
record by record; of two for the same workload the later stays.
"""

from __future__ import annotations

import json
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from thresher.atomic_files import write_text
from thresher.errors import RecordsError

SCHEMA = """create table if not exists records (
    target text not null, workload text not null, plan text not null,
    microseconds real not null, rule_microseconds real not null, measured real not null,
    primary key (target, workload))"""
LOCK_TIMEOUT = 60.0  # seconds to wait for another process that writes


@dataclass(frozen=True)
class Record:
    """The fastest plan of one workload on one target.

    ``target`` names the machine and the versions (:meth:`Backend.fingerprint`); ``plan`` is empty where none was faster than what is
    built without a record. ``microseconds`` is the time of the plan, ``rule_microseconds`` that of what is built without it, both
    medians of the same run; ``measured`` is in seconds since 1970.
    """

    target: str
    workload: str
    plan: str
    microseconds: float
    rule_microseconds: float
    measured: float

    @staticmethod
    def now(target: str, workload: str, plan: str, microseconds: float, rule_microseconds: float) -> Record:
        """Return a record that is measured now."""
        return Record(target, workload, plan, microseconds, rule_microseconds, time.time())

    def untuned(self) -> Record:
        """Return the record of the same workload with its plan withdrawn."""
        return Record.now(self.target, self.workload, "", self.rule_microseconds, self.rule_microseconds)


def default_path() -> Path:
    """Return the path of the records unless another file is named."""
    cache = (
        os.environ.get("THRESHER_CACHE")
        or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "thresher"
    )
    return Path(cache) / "records.sqlite"


class Records:
    """The records in one file. It is made when something is first written."""

    def __init__(self, path: str | Path | None = None):
        self.path = Path(path) if path is not None else default_path()

    def plans(self, target: str) -> dict[str, str]:
        """Return the plan of each workload, for one target. Raises :class:`RecordsError` where the file cannot be used."""
        return {r.workload: r.plan for r in self.all() if r.target == target}

    def all(self) -> list[Record]:
        """Return every record, in the order of target and workload."""
        if not self.path.exists():
            return []
        with self._open() as database:
            names = ", ".join(f.name for f in fields(Record))
            return [Record(*row) for row in database.execute(f"select {names} from records order by target, workload")]

    def put(self, records: Iterable[Record]) -> int:
        """Write records, but none that is older than what stands; return how many were written."""
        names = [f.name for f in fields(Record)]
        updates = ", ".join(f"{n} = excluded.{n}" for n in names[2:])
        with self._open() as database:
            database.executemany(
                f"insert into records ({', '.join(names)}) values ({', '.join(f':{n}' for n in names)}) "
                f"on conflict (target, workload) do update set {updates} where excluded.measured >= records.measured",
                [asdict(r) for r in records],
            )
            return database.total_changes

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """Open the database for one transaction."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            database = sqlite3.connect(self.path, timeout=LOCK_TIMEOUT)
            try:
                with database:
                    database.execute(SCHEMA)
                    yield database
            finally:
                database.close()
        except (sqlite3.Error, OSError) as error:
            raise RecordsError(
                f"cannot use the tuning records in {self.path}: {error}; name another file, or set THRESHER_CACHE"
            ) from error


def write_lines(records: Iterable[Record], path: str | Path) -> None:
    """Write records as JSON lines: to read, to keep under version control, to send."""
    write_text(path, "".join(json.dumps(asdict(r)) + "\n" for r in records))


def read_lines(path: str | Path) -> list[Record]:
    """Return the records of a file that :func:`write_lines` wrote. Raises :class:`RecordsError` naming the line that is none."""
    records = []
    kinds: dict[str, Any] = {f.name: float if f.type == "float" else str for f in fields(Record)}
    for number, line in enumerate(Path(path).read_text().splitlines(), 1):
        try:
            values = json.loads(line)
            record = Record(**{name: kinds[name](values.pop(name)) for name in kinds})
            if values:
                raise ValueError(f"unknown {', '.join(values)}")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RecordsError(f"{path}, line {number} is no tuning record: {error}") from error
        records.append(record)
    return records
