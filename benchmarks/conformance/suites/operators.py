"""PyTorch's own samples of its operators: ``op_db``, one sample of one operator in one dtype as a module."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import torch

from thresher.models.families.sample import Case, SampleExcluded

from ..sample import Suite
from .bound import bound_case

FLOAT32_SAMPLES = 3
OTHER_DTYPES = ("float64", "int64", "bool", "complex64", "float16", "bfloat16")


@cache
def _operators() -> dict[str, Any]:
    from torch.testing._internal.common_methods_invocations import op_db

    return {operator.full_name: operator for operator in op_db}


def _samples(operator: Any, dtype: torch.dtype, count: int, seed: int) -> list[Any]:
    torch.manual_seed(seed)
    return list(itertools.islice(operator.sample_inputs("cpu", dtype, requires_grad=False), count))


def names_of(dtypes: tuple[str, ...], count: int) -> Iterator[str]:
    """Yield ``operator:dtype:index`` of the first ``count`` samples of every operator that supports the dtype."""
    for dtype in dtypes:
        kind = getattr(torch, dtype)
        for name, operator in _operators().items():
            if kind in operator.supported_dtypes("cpu"):
                yield from (f"{name}:{dtype}:{i}" for i in range(len(_samples(operator, kind, count, seed=0))))


def build(name: str) -> Case:
    """Return the sample; its further inputs are the same sample of another seed."""
    operator_name, dtype, index = name.rsplit(":", 2)
    if operator_name.startswith(("empty", "new_empty")):  # two runs are equal by chance
        raise SampleExcluded("it returns memory that nobody has written")
    operator = _operators()[operator_name]
    first, second = (_samples(operator, getattr(torch, dtype), int(index) + 1, seed)[-1] for seed in (0, 1))
    arguments, other = (((s.input, *s.args), s.kwargs) for s in (first, second))
    return bound_case(operator.op, arguments, other)


FLOAT32 = Suite(
    "op_db",
    "PyTorch's operators, float32",
    f"The first {FLOAT32_SAMPLES} float32 samples of every operator in `torch.testing._internal.common_methods_invocations.op_db`: "
    "the tensors of a sample are inputs, its other arguments are literals.",
    partial(names_of, ("float32",), FLOAT32_SAMPLES),
    build,
)
OTHERS = Suite(
    "op_db_dtypes",
    "PyTorch's operators, other dtypes",
    f"The first sample of every operator in each of {', '.join(OTHER_DTYPES)} that it supports.",
    partial(names_of, OTHER_DTYPES, 1),
    build,
)
