"""Products of matrices of ONNX in torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from thresher.frontend.onnx.rules import plain, rule
from thresher.frontend.onnx.values import Unsupported

plain({"MatMul": torch.matmul, "Det": torch.linalg.det})


@rule("Einsum")
def einsum(*values: Tensor, equation: str) -> Tensor:
    """Return the sums of products that the equation names."""
    return torch.einsum(equation, *values)


@rule("Gemm", since=7)
def gemm(
    a: Tensor, b: Tensor, c: Tensor | None = None, *, alpha: float, beta: float, transA: int, transB: int
) -> Tensor:
    """Return alpha A B + beta C; F.linear where it says the same."""
    a = a.mT if transA else a
    if transB and alpha == 1.0 and (c is None or (beta == 1.0 and c.dim() == 1)):
        return F.linear(a, b, c)
    product = _times(alpha, a @ (b.mT if transB else b))
    return product if c is None else product + _times(beta, c)


@rule("Gemm")
def gemm_of_opset_6(
    a: Tensor, b: Tensor, c: Tensor, *, alpha: float, beta: float, broadcast: int, transA: int, transB: int
) -> Tensor:
    """Return alpha A B + beta C."""
    result = gemm(a, b, c, alpha=alpha, beta=beta, transA=transA, transB=transB)
    if not broadcast and c.shape != result.shape:
        raise Unsupported("a C of another shape without the attribute broadcast")
    return result


def _times(factor: float, x: Tensor) -> Tensor:
    """Return ``factor`` x in the type of x, which may be one of whole numbers."""
    if factor == 1.0:
        return x
    return x * factor if x.is_floating_point() else (x * factor).to(x.dtype)
