"""Files that appear under their name only when they are complete."""

from __future__ import annotations

import os
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from thresher.errors import ArtifactError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside ``path`` to write. It takes that name at the end; after an error nothing is left of it.

    Raises :class:`ArtifactError` where the system refuses (no permission, full disk).
    """
    partial = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        yield Path(partial)
        os.chmod(partial, 0o644)
        os.replace(partial, path)
    except OSError as error:
        raise ArtifactError(f"cannot write {path}: {error}") from error
    finally:
        if partial:
            Path(partial).unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """A file with this text; see :func:`replacing`."""
    with replacing(Path(path)) as partial:
        partial.write_text(text)


@contextmanager
def new_zip(path: Path) -> Iterator[zipfile.ZipFile]:
    """A zip file to write into; see :func:`replacing`."""
    with replacing(path) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as package:
        yield package
