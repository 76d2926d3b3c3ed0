"""TVM's tensor intrinsics, imported in seconds instead of half a minute."""

from __future__ import annotations

import importlib
import inspect
from typing import Any
from unittest import mock


def import_intrinsics() -> None:
    """Register the intrinsics that ``TensorCores`` and MetaSchedule ask for.

    TVMScript looks up the module of every frame of the stack, most of which have none; the lookup is skipped for those.
    """
    original = inspect.getmodule

    def quick(thing: Any, file: str | None = None) -> Any:
        return None if file is not None and file.startswith("<") else original(thing, file)

    with mock.patch.object(inspect, "getmodule", quick):
        importlib.import_module("tvm.s_tir.tensor_intrin")
