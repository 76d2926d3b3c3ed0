"""Zip files made to harm whoever reads them: each function writes one from a good file."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

Trick = Callable[[Path, Path, str], None]  # the good file, the bad one to write, and the member that is attacked


def bomb(source: Path, target: Path, member: str) -> None:
    """Compressed: a member is a thousand times as large as the file."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, b"\0" * (1 << 28) if name == member else old.read(name))


def twice(source: Path, target: Path, member: str) -> None:
    """A member is there twice."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in [*old.namelist(), member]:
            new.writestr(name, old.read(name))


def outside(source: Path, target: Path, member: str) -> None:
    """A member lies outside of the folder that somebody may unpack it into."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            new.writestr(f"../../{name}" if name == member else name, old.read(name))


def foreign(source: Path, target: Path, member: str) -> None:
    """There is one member more."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
        new.writestr(f"{member}.py", "import this")


def link(source: Path, target: Path, member: str) -> None:
    """A member is a link to another file."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            info = zipfile.ZipInfo(name)
            info.external_attr = 0o120777 << 16 if name == member else 0
            new.writestr(info, "/etc/passwd" if name == member else old.read(name))


def encrypted(source: Path, target: Path, member: str) -> None:
    """The header says that the first member is encrypted."""
    data = bytearray(source.read_bytes())
    data[data.find(b"PK\x01\x02") + 8] |= 1
    target.write_bytes(data)


def claims(source: Path, target: Path, member: str) -> None:
    """The directory claims three gigabytes for each member."""
    data = bytearray(source.read_bytes())
    place = data.find(b"PK\x01\x02")
    while place >= 0:
        data[place + 20 : place + 28] = (3 << 30).to_bytes(4, "little") * 2
        place = data.find(b"PK\x01\x02", place + 1)
    target.write_bytes(data)


TRICKS: dict[str, Trick] = {f.__name__: f for f in (bomb, twice, outside, foreign, link, encrypted, claims)}
