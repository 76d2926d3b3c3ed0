"""The results of a suite: JSON lines on disk, the last line of a sample counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class Results:
    """Rows by sample: the fields of a :class:`Verdict` and the commit that was judged; a field that is empty is left out.

    A last line that was cut off, by a run that was killed, is dropped.
    """

    def __init__(self, path: Path):
        self.path = path
        self.rows: dict[str, dict[str, Any]] = {}
        text = path.read_text() if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            path.write_text(whole)
        for line in whole.splitlines():
            row = json.loads(line)
            self.rows[row.pop("sample")] = row

    def append(self, sample: str, row: dict[str, Any]) -> None:
        """Add the row of a sample, which replaces an earlier one."""
        self.rows[sample] = row
        with self.path.open("a") as file:
            file.write(_line(sample, row))

    def tidy(self) -> None:
        """Write the file anew: one line a sample, in the order of their names."""
        whole = self.path.with_suffix(".tmp")
        whole.write_text("".join(_line(sample, row) for sample, row in sorted(self.rows.items())))
        whole.replace(self.path)


def _line(sample: str, row: dict[str, Any]) -> str:
    return (
        json.dumps({"sample": sample, **{name: value for name, value in row.items() if value not in (None, "", [])}})
        + "\n"
    )
