"""Reading a zip file that others may have made: nothing is unpacked, and all limits are checked before a member is read."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from thresher.errors import ArtifactError, ThresherError

MAX_HEADER_BYTES = 64 << 20  # of manifest.json, for instance: it is small, whatever a damaged zip header claims


def read_package(
    path: Path, kind: str, header: str, members_of: Callable[[Any], set[str]]
) -> tuple[Any, dict[str, bytes]]:
    """Return the JSON of the member ``header`` and the other members of a zip file.

    Args:
        path: the file.
        kind: its kind with the article, for the messages: ``a Thresher artifact``.
        header: the name of the member that is JSON.
        members_of: returns from the JSON the names of all other members; raises :class:`ArtifactError` where it is not what it should be.

    Raises:
        ArtifactError: the file is missing, or no zip file; a member is compressed, encrypted, there twice, or not among the names; the
            members claim more bytes than the file has.
    """
    if not path.exists():
        raise ArtifactError(f"{path} does not exist")
    try:
        with zipfile.ZipFile(path) as package:
            infos = package.infolist()
            names = [info.filename for info in infos]
            if header not in names:
                raise ArtifactError(f"{path} is a zip file, but not {kind}: it has no {header}")
            _check_sizes(path, kind, infos)
            if package.getinfo(header).file_size > MAX_HEADER_BYTES:
                raise ArtifactError(f"{path} is damaged: its {header} claims more than {MAX_HEADER_BYTES} bytes")
            content = json.loads(package.read(header))
            expected = members_of(content)
            if len(names) != len(set(names)) or set(names) != expected | {header}:
                raise ArtifactError(f"{path} is damaged: its members are {sorted(names)}")
            return content, {name: package.read(name) for name in expected}
    except (
        zipfile.BadZipFile,
        EOFError,
        OSError,
        ValueError,
        RecursionError,
        NotImplementedError,
        RuntimeError,
    ) as error:
        raise ArtifactError(f"{path} is damaged or not {kind}: {error}") from error


@contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """Turn every exception while members are interpreted into :class:`ArtifactError`: they are data, and may say anything."""
    try:
        yield
    except ThresherError:
        raise
    except OSError as error:
        raise ArtifactError(f"cannot unpack {path}: {error}; TMPDIR names a folder with room") from error
    except Exception as error:
        raise ArtifactError(
            f"{path} is damaged: its contents do not fit together ({type(error).__name__}: {error})"
        ) from error


def _check_sizes(path: Path, kind: str, infos: list[zipfile.ZipInfo]) -> None:
    if any(i.compress_type != zipfile.ZIP_STORED or i.file_size != i.compress_size for i in infos):
        raise ArtifactError(f"{path} is damaged: its members are compressed, which none of {kind} is")
    if sum(i.file_size for i in infos) > path.stat().st_size:
        raise ArtifactError(f"{path} is damaged: its members claim more bytes than the file has")
