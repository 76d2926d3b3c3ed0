"""CUDA code of compiled models, to be read: it can be made where there is no GPU."""

from __future__ import annotations

import re

import torch
from torch import nn

import thresher

MMA = "mma_sync"


def half(model: nn.Module, args: tuple, dtype: torch.dtype = torch.float16) -> tuple[nn.Module, tuple]:
    return model.to(dtype), tuple(a.to(dtype) if a.is_floating_point() else a for a in args)


def compiled_code(model: nn.Module, args: tuple, arch: str = "sm_90") -> str:
    return thresher.compile(model.eval(), args, target=f"cuda:{arch}", verify="off").executable.device_code()


def bodies(source: str) -> dict[str, str]:
    """The text of every kernel, by its name."""
    parts = re.split(r'extern "C" __global__ void (?:__launch_bounds__\(\d+\) )?(\w+)\(', source)
    return {name: body for name, body in zip(parts[1::2], parts[2::2]) if "{" in body.split(";")[0]}
