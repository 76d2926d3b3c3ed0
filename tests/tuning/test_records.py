"""The file of tuning records: written record by record, by several processes, merged, and never silently wrong."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thresher.errors import RecordsError
from thresher.tuning.records import Record, Records, default_path, read_lines, write_lines

RECORD = Record("machine a", "conv 1x3", "Plan(rows=6)", 10.0, 12.5, 100.0)

texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)
numbers = st.floats(0, 1e12, allow_nan=False)
records = st.builds(Record, texts, texts, texts, numbers, numbers, numbers)


def test_nothing_is_made_by_looking(tmp_path: Path) -> None:
    found = Records(tmp_path / "new" / "records.sqlite")
    assert found.all() == [] and found.plans("machine a") == {}
    assert not (tmp_path / "new").exists()


def test_the_later_record_stays(tmp_path: Path) -> None:
    found = Records(tmp_path / "r.sqlite")
    assert found.put([RECORD]) == 1
    assert found.put([replace(RECORD, plan="older", measured=99.0)]) == 0
    assert found.put([replace(RECORD, plan="newer", measured=101.0), replace(RECORD, target="machine b")]) == 2
    assert found.plans("machine a") == {"conv 1x3": "newer"}
    assert found.plans("machine b") == {"conv 1x3": "Plan(rows=6)"}


@given(st.lists(records, max_size=8), st.lists(records, max_size=8))
def test_merging_in_either_order_gives_the_same(first: list[Record], second: list[Record]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        files = [Records(Path(folder) / name) for name in ("ab", "ba")]
        for file, order in zip(files, ((first, second), (second, first))):
            for part in order:
                file.put(part)
        unique = {(r.target, r.workload, r.measured) for r in first + second}
        if len(unique) == len(first + second):  # no two for one workload at the same moment
            assert files[0].all() == files[1].all()
        lines = Path(folder) / "lines.jsonl"
        write_lines(files[0].all(), lines)
        assert read_lines(lines) == files[0].all()


def test_two_processes_write_at_once(tmp_path: Path) -> None:
    script = (
        "import sys; from thresher.tuning.records import Record, Records\n"
        "for i in range(100): Records(sys.argv[1]).put([Record('t', f'{sys.argv[2]} {i}', 'p', 1.0, 1.0, float(i))])"
    )
    path = str(tmp_path / "r.sqlite")
    running = [subprocess.Popen([sys.executable, "-c", script, path, name]) for name in ("a", "b")]
    assert [p.wait(timeout=120) for p in running] == [0, 0]
    assert len(Records(path).all()) == 200


def test_damage_is_named(tmp_path: Path) -> None:
    broken = tmp_path / "r.sqlite"
    broken.write_bytes(b"not a database at all, not at all" * 100)
    with pytest.raises(RecordsError, match=r"r\.sqlite.*THRESHER_CACHE"):
        Records(broken).all()
    lines = tmp_path / "r.jsonl"
    for text in ("{", "[]", '{"target": "t"}', '{"target":"t","workload":"w","plan":"p","microseconds":"fast"}'):
        lines.write_text(text)
        with pytest.raises(RecordsError, match="line 1"):
            read_lines(lines)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RecordsError, match="THRESHER_CACHE"):
        Records(tmp_path / "file" / "records.sqlite").put([RECORD])


def test_default_place(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("THRESHER_CACHE", str(tmp_path))
    assert default_path() == tmp_path / "records.sqlite"
    monkeypatch.delenv("THRESHER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_path() == tmp_path / "thresher" / "records.sqlite"
