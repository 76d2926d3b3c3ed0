"""PyTorch's own samples of its modules: ``module_db``, in evaluation mode."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch

from thresher.models.families.sample import Case, SampleExcluded

from ..sample import Suite
from .bound import Arguments, bound_case

MOST_SAMPLES = 10  # one loss has hundreds, and would count more than all convolutions together


@cache
def _modules() -> dict[str, Any]:
    from torch.testing._internal.common_modules import module_db

    return {info.formatted_name: info for info in module_db}


def _samples(info: Any, seed: int) -> list[Any]:
    torch.manual_seed(seed)
    return info.module_inputs_func(info, "cpu", torch.float32, requires_grad=False, training=False)


def names() -> Iterator[str]:
    """Yield ``module:index`` of the first float32 samples of every module."""
    for name, info in _modules().items():
        if torch.float32 in info.supported_dtypes("cpu"):
            yield from (f"{name}:{i}" for i in range(min(len(_samples(info, seed=0)), MOST_SAMPLES)))


def build(name: str) -> Case:
    """Return one sample; its further inputs are the same sample of another seed."""
    module_name, index = name.rsplit(":", 1)
    info = _modules()[module_name]
    sample, other = (_samples(info, seed)[int(index)] for seed in (0, 1))
    if sample.forward_input is None:
        raise SampleExcluded("the sample only constructs the module")
    torch.manual_seed(0)
    constructor = sample.constructor_input
    module = info.module_cls(*constructor.args, **constructor.kwargs)
    return bound_case(module.eval(), _arguments(sample), _arguments(other))


def _arguments(sample: Any) -> Arguments:
    return tuple(sample.forward_input.args), sample.forward_input.kwargs


MODULES = Suite(
    "module_db",
    "PyTorch's modules",
    f"The first {MOST_SAMPLES} float32 samples of every module in `torch.testing._internal.common_modules.module_db`, in evaluation mode.",
    names,
    build,
)
