"""An exact pass by pattern, check and rewrite: RMS norms that are written out become one call.

python examples/pass_by_pattern.py

x * rsqrt(mean(x^2, -1) + eps) * w   ->   rms_norm(x, w, eps)          (Zhang and Sennrich, 2019)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx, nn

from thresher.authoring import (
    Context,
    Match,
    Note,
    Pass,
    PassResult,
    Program,
    is_tensor,
    matches,
    register_pass,
    shape_of,
)

aten = torch.ops.aten


def written_out(x, power, dims, eps, weight):
    """Describe the pattern in ordinary Python over ATen calls. Parameters match nodes and literals alike."""
    size = aten.mean.dim(aten.pow.Tensor_Scalar(x, power), dims, True)
    return aten.mul.Tensor(aten.mul.Tensor(x, aten.rsqrt.default(aten.add.Tensor(size, eps))), weight)


@register_pass
@dataclass(frozen=True)
class FuseRMSNorm(Pass):
    """Replace an RMS norm that is written out by the operator."""

    name: ClassVar[str] = "fuse-rms-norm"
    target_ops: ClassVar[tuple] = (aten.rsqrt.default,)  # where there is none, the pass is not even run

    def apply(self, program: Program, context: Context) -> PassResult:
        work = program.clone()  # the input stays as it is
        rewrites, refusals = [], []
        for match in list(matches(work, written_out)):
            if reason := unlike(work, match):
                refusals.append(Note.at(match.anchor, reason))
                continue
            bound = match.bound
            width = shape_of(bound["x"])[-1]
            args = (bound["x"], [width], bound["weight"], bound["eps"])
            call = work.insert_call(match.anchor, aten.rms_norm.default, args, like=match.anchor)
            match.anchor.replace_all_uses_with(call)
            rewrites.append(Note.at(match.anchor, f"an RMS norm over {width} channels"))
        return PassResult(work.clean(), rewrites, refusals) if rewrites else PassResult(program, [], refusals)


def unlike(program: Program, match: Match) -> str:
    """Return why a match is no RMS norm; empty if it is one."""
    x, power, dims, eps, weight = (match.bound[k] for k in ("x", "power", "dims", "eps", "weight"))
    if power != 2:
        return f"the mean is of the power {power}, not of squares"
    if not is_tensor(x) or dims not in ([-1], [len(shape_of(x)) - 1]):
        return f"the mean is over the dimensions {dims}, not over the last one"
    if isinstance(eps, fx.Node):
        return "eps is computed in the graph"
    value = program.constant(weight)
    if value is None or tuple(value.shape) != tuple(shape_of(x)[-1:]):
        return "what it is multiplied with is not one constant per channel"
    return ""


class RMSNorm(nn.Module):
    """An RMS norm as many repositories write it."""

    def __init__(self, width: int, eps: float = 1e-6):
        super().__init__()
        self.weight, self.eps = nn.Parameter(1 + 0.1 * torch.randn(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


def main() -> None:
    from thresher.testing import Case, before_after, prove, refused

    def build(batch: int, width: int) -> tuple[nn.Module, tuple]:
        return nn.Sequential(RMSNorm(width), nn.Linear(width, 3)), (torch.randn(batch, 5, width),)

    print(before_after(FuseRMSNorm(), *build(2, 8)))
    prove(FuseRMSNorm(), Case("rms norm, linear", build, batch=(1, 2), width=(4, 7)))

    class OverBatch(RMSNorm):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.rsqrt(x.pow(2).mean(0, keepdim=True) + self.eps) * self.weight

    refused(FuseRMSNorm(), OverBatch(8), (torch.randn(4, 8),), match="not over the last one")
    print("proven")


if __name__ == "__main__":
    main()
