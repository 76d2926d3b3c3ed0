"""Complex values become pairs of real numbers, and Fourier transforms products with their matrices, exactly.

    z [..]  ->  [.., 2]            (re, im)
    (a + ib) (c + id)              (ac - bd, ad + bc)
    DFT along a dimension of n     a linear layer with the constant matrix of cosines and sines, n^2 instead of n log n multiplications: for
                                   the grids of models (AFNO, Guibas et al., 2022; FNet, Lee-Thorp et al., 2022; GFNet, Rao et al., 2021)
                                   that is what a kernel for products does best
    DFT of more than WHOLE         n = a b: DFTs of a, factors, DFTs of b (Cooley & Tukey, 1965), n (a + b) multiplications; both alike

So thresholds, products and sums of Fourier modes are the ones that other passes know. A program stays as it is, with the reason, if it
takes or returns complex values, divides by one, multiplies with a complex literal, adds a number to one, transforms over a dynamic
dimension or over more than LARGEST numbers that are a prime (or a multiple of one), reads a part of a spectrum, or applies an operator that
has no rule here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from thresher.analysis.slices.transfer.base import argument
from thresher.ir.nodes import dtype_of, is_tensor, shape_of
from thresher.ir.program import Program, Role
from thresher.rewriting.contract import Context, Note, Pass, PassResult
from thresher.rewriting.registry import register_pass

aten = torch.ops.aten
FOURIER = (aten._fft_r2c.default, aten._fft_c2c.default, aten._fft_c2r.default)
MAKERS = (*FOURIER, aten.view_as_complex.default, aten.complex.default)
WHOLE, LARGEST = 256, 4096  # numbers that are transformed by one matrix: where they have factors, and at all
REAL = {torch.complex64: torch.float32, torch.complex128: torch.float64}


class NoRule(Exception):
    """Raised where something else is done with a complex value."""


@register_pass
@dataclass(frozen=True)
class ComplexNumbers(Pass):
    """Write complex arithmetic and Fourier transforms with real numbers."""

    name: ClassVar[str] = "complex-numbers"
    target_ops: ClassVar[tuple] = MAKERS

    def apply(self, program: Program, context: Context) -> PassResult:
        if not any(is_complex(n) for n in program.graph.nodes):
            return PassResult(program)
        work = program.clone()
        notes = [Note.at(n, "a product with its matrix") for n in work.calls(*FOURIER)]
        try:
            _Pairs(work).run()
        except NoRule as reason:
            return PassResult(program, [], [Note("", "", f"complex values stay: {reason}")])
        return PassResult(work.clean(), notes or [Note("", "", "complex values are pairs")])


def is_complex(node: Any) -> bool:
    """Return whether a value is a complex tensor."""
    return is_tensor(node) and dtype_of(node) in REAL


@dataclass
class _Pairs:
    program: Program
    of: dict[fx.Node, fx.Node] = field(default_factory=dict)  # the pairs of complex nodes

    def run(self) -> None:
        for node in list(self.program.graph.nodes):
            if node.op == "output" and any(is_complex(n) for n in node.all_input_nodes):
                raise NoRule("the model returns some")
            if node.op == "placeholder" and is_complex(node):
                raise NoRule("the model takes some")
            if node.op == "get_attr" and is_complex(node):
                value = torch.view_as_real(self.program.constants[str(node.target)])
                self.of[node] = self.program.add_constant(value, f"{node.name}_pairs", REAL[dtype_of(node)], like=node)
            elif node.op == "call_function" and (is_complex(node) or any(is_complex(n) for n in node.all_input_nodes)):
                self.convert(node)

    def convert(self, node: fx.Node) -> None:
        rule = RULES.get(node.target)
        if rule is None:
            raise NoRule(f"{node.name} is {node.target}")
        self.here = node
        new = rule(self, node)
        if is_complex(node):
            self.of[node] = new
        else:
            node.replace_all_uses_with(new)

    def call(self, target: Any, *args: Any) -> fx.Node:
        return self.program.insert_call(self.here, target, args, like=self.here)

    def pairs(self, value: Any) -> Any:
        """Return the pairs of a complex or a real value; numbers stay."""
        if not is_tensor(value):
            if isinstance(value, complex):
                raise NoRule(f"the complex number {value}")
            return value
        return self.of[value] if value in self.of else self.stack(value, self.call(aten.zeros_like.default, value))

    def stack(self, re: fx.Node, im: fx.Node) -> fx.Node:
        rank = len(shape_of(re))
        return self.call(aten.cat.default, [self.call(aten.unsqueeze.default, part, rank) for part in (re, im)], rank)

    def constant(self, value: Tensor, name: str) -> fx.Node:
        """Return a constant in the precision of the node that is converted."""
        kind = dtype_of(self.here)
        return self.program.add_constant(
            value, f"{self.here.name}_{name}", REAL.get(kind, kind), like=self.here, role=Role.BUFFER
        )

    def parts(self, value: fx.Node) -> tuple[fx.Node, fx.Node]:
        return self.split(self.pairs(value))

    def split(self, pairs: fx.Node) -> tuple[fx.Node, fx.Node]:
        """Return the real and the imaginary parts of pairs."""
        last = len(shape_of(pairs)) - 1
        return self.call(aten.select.int, pairs, last, 0), self.call(aten.select.int, pairs, last, 1)

    def times(self, a: tuple[fx.Node, fx.Node], b: tuple[fx.Node, fx.Node]) -> fx.Node:
        """Insert the pairs of the product of two complex values, whose parts are given."""
        (p, q), (r, s), mul = a, b, aten.mul.Tensor
        re = self.call(aten.sub.Tensor, self.call(mul, p, r), self.call(mul, q, s))
        return self.stack(re, self.call(aten.add.Tensor, self.call(mul, p, s), self.call(mul, q, r)))

    # ------------------------------------------------------------------ Fourier transforms

    def factor(self, n: int) -> int:
        """Return the factor by which a transform of n numbers is taken apart; 1: one matrix does it."""
        a = next(d for d in range(math.isqrt(n), 0, -1) if n % d == 0)
        if a == 1 and n > LARGEST:
            raise NoRule(f"{self.here.name} transforms {n} numbers, which have no factors")
        return a if n > WHOLE else 1

    def along(self, x: fx.Node, dim: int, matrix: Tensor, paired: tuple[bool, bool]) -> fx.Node:
        """Insert ``matrix`` times the numbers (or pairs) of x along a dimension; ``paired``: whether x has pairs, and the result."""
        before, after = paired
        rank = len(shape_of(x)) - before  # without the pairs
        others = [d for d in range(rank) if d != dim]
        order = [*others, dim, *([rank] if before else [])]
        x = self.call(aten.permute.default, x, order) if order != list(range(len(order))) else x
        lead = self.literal(list(shape_of(x)[: rank - 1]))
        x = self.call(aten.reshape.default, x, [*lead, matrix.shape[1]]) if before else x
        dtype = dtype_of(x)
        weight = self.program.add_constant(matrix, f"{self.here.name}_{dim}", dtype, like=self.here, role=Role.BUFFER)
        x = self.call(aten.linear.default, x, weight)
        if after:
            x = self.call(aten.reshape.default, x, [*lead, matrix.shape[0] // 2, 2])
        back = sorted(range(rank), key=lambda d: [*others, dim][d])
        back = [*back, *([rank] if after else [])]
        return self.call(aten.permute.default, x, back) if back != list(range(len(back))) else x

    def literal(self, shape: list) -> list[int]:
        """Return sizes as the argument of a reshape, which finds a single free one itself."""
        if sum(not isinstance(d, int) for d in shape) > 1:
            raise NoRule(f"{self.here.name} has several free sizes")
        return [d if isinstance(d, int) else -1 for d in shape]


def _angles(rows: int, columns: int, n: int) -> tuple[Tensor, Tensor]:
    """Return cos and sin of 2 pi r c / n; the product is reduced first, so that large ones lose nothing."""
    product = torch.arange(rows, dtype=torch.float64)[:, None] * torch.arange(columns, dtype=torch.float64) % n
    angle = product * (2 * math.pi / n)
    return angle.cos(), angle.sin()


def real_to_complex(n: int, half: bool) -> Tensor:
    """Return the DFT of n real numbers as a matrix [2 m, n], m = n // 2 + 1 with ``half``, else n."""
    cos, sin = _angles(n // 2 + 1 if half else n, n, n)
    return torch.stack([cos, -sin], 1).flatten(0, 1)


def complex_to_complex(n: int, forward: bool) -> Tensor:
    """Return the DFT (its inverse, unscaled) of n complex numbers as a matrix [2 n, 2 n]."""
    cos, sin = _angles(n, n, n)
    sin = sin if forward else -sin
    return torch.stack([torch.stack([cos, sin], -1).flatten(1), torch.stack([-sin, cos], -1).flatten(1)], 1).flatten(
        0, 1
    )


def complex_to_real(n: int) -> Tensor:
    """Return the inverse DFT to n real numbers as a matrix [n, 2 (n // 2 + 1)]: the other half of the spectrum is the conjugate."""
    m = n // 2 + 1
    cos, sin = _angles(n, m, n)
    twice = torch.tensor([1.0 if k == 0 or 2 * k == n else 2.0 for k in range(m)], dtype=torch.float64)
    return torch.stack([cos * twice, -sin * twice], -1).flatten(1)


def _scale(normalization: int, size: int) -> float:
    return {0: 1.0, 1: 1 / math.sqrt(size), 2: 1 / size}[normalization]


def _fourier(self: _Pairs, node: fx.Node) -> fx.Node:
    source, dims, normalization = node.args[:3]
    if normalization not in (0, 1, 2):
        raise NoRule(f"{node.name} has the unknown normalization {normalization}")
    rank = len(shape_of(source))
    dims = [d % rank for d in dims]
    x = source if node.target is aten._fft_r2c.default else self.pairs(source)
    last = node.args[3]
    whole = [shape_of(source)[d] for d in dims]
    if node.target is aten._fft_c2r.default:
        if whole[-1] != last // 2 + 1:
            raise NoRule(f"{node.name} reads a part of its spectrum")
        whole[-1] = last
    if any(not isinstance(n, int) for n in whole):
        raise NoRule(f"{node.name} is over a dynamic dimension")
    scale = _scale(normalization, math.prod(whole))
    forward = bool(last) if node.target is aten._fft_c2c.default else node.target is aten._fft_r2c.default
    if node.target is aten._fft_r2c.default:
        x = _real_to_complex(self, x, dims[-1], whole[-1], bool(last), scale)
    elif node.target is aten._fft_c2c.default:
        x = _transform(self, x, dims[-1], whole[-1], forward, True, scale)
    for dim, n in zip(dims[:-1], whole):
        x = _transform(self, x, dim, n, forward, True)
    return _complex_to_real(self, x, dims[-1], last, scale) if node.target is aten._fft_c2r.default else x


def _real_to_complex(self: _Pairs, x: fx.Node, dim: int, n: int, half: bool, scale: float) -> fx.Node:
    if self.factor(n) == 1:
        return self.along(x, dim, scale * real_to_complex(n, half), (False, True))
    x = _transform(self, x, dim, n, True, False, scale)
    return self.call(aten.slice.Tensor, x, dim, 0, n // 2 + 1) if half else x


def _complex_to_real(self: _Pairs, x: fx.Node, dim: int, n: int, scale: float) -> fx.Node:
    """Insert the inverse DFT to n real numbers; of a large one the other half of the spectrum, the conjugate, is made first."""
    if self.factor(n) == 1:
        return self.along(x, dim, scale * complex_to_real(n), (True, False))
    known = n // 2 + 1
    mirrored = self.call(aten.flip.default, self.call(aten.slice.Tensor, x, dim, 1, n - known + 1), [dim])
    sign = self.constant(torch.tensor([1.0, -1.0], dtype=torch.float64), "conjugate")
    x = self.call(aten.cat.default, [x, self.call(aten.mul.Tensor, mirrored, sign)], dim)
    x = _transform(self, x, dim, n, False, True, scale)
    return self.call(aten.select.int, x, len(shape_of(x)) - 1, 0)


def _transform(self: _Pairs, x: fx.Node, dim: int, n: int, forward: bool, paired: bool, scale: float = 1.0) -> fx.Node:
    """Insert the DFT (its inverse, unscaled, but for ``scale``) of n pairs, or of n real numbers unless ``paired``."""
    a = self.factor(n)
    if a == 1:
        matrix = complex_to_complex(n, forward) if paired else real_to_complex(n, False)
        return self.along(x, dim, scale * matrix, (paired, True))
    b, shape = n // a, list(shape_of(x))
    x = self.call(aten.reshape.default, x, self.literal([*shape[:dim], a, b, *shape[dim + 1 :]]))
    x = _transform(self, x, dim, a, forward, paired, scale)
    x = _transform(self, _turned(self, x, dim, forward), dim + 1, b, forward, True)
    x = self.call(aten.transpose.int, x, dim, dim + 1)
    return self.call(
        aten.reshape.default, x, self.literal([*shape[:dim], n, *shape[dim + 1 :], *([] if paired else [2])])
    )


def _turned(self: _Pairs, x: fx.Node, dim: int, forward: bool) -> fx.Node:
    """Insert the product of the pair at (k, j) of two dimensions a and b with exp(-2 pi i k j / (a b)), its conjugate for the inverse."""
    a, b = shape_of(x)[dim : dim + 2]
    cos, sin = (t.reshape(a, b, *[1] * (len(shape_of(x)) - dim - 3)) for t in _angles(a, b, a * b))
    sin = -sin if forward else sin
    return self.times(self.split(x), (self.constant(cos, "cosines"), self.constant(sin, "sines")))


# ---------------------------------------------------------------------- arithmetic and movement


def _product(self: _Pairs, node: fx.Node) -> fx.Node:
    a, b = node.args[:2]
    if is_complex(a) and is_complex(b):
        return self.times(self.parts(a), self.parts(b))
    z, real = (a, b) if is_complex(a) else (b, a)
    if node.target is aten.div.Tensor and z is b:
        raise NoRule(f"{node.name} divides by a complex value")
    if isinstance(real, complex):
        raise NoRule(f"{node.name} multiplies with a complex number")
    if is_tensor(real):
        real = self.call(aten.unsqueeze.default, real, len(shape_of(real)))
    return self.call(node.target, self.pairs(z), real)


def _elementwise(self: _Pairs, node: fx.Node) -> fx.Node:
    return self.call(node.target, *(self.pairs(a) if is_tensor(a) else a for a in node.args))


def _sum(self: _Pairs, node: fx.Node) -> fx.Node:
    if node.kwargs or not all(is_tensor(a) for a in node.args):
        raise NoRule(f"{node.name} adds a number")
    return _elementwise(self, node)


def _sizes(self: _Pairs, node: fx.Node) -> fx.Node:
    return self.call(node.target, self.pairs(node.args[0]), [*node.args[1], 2])


def _permute(self: _Pairs, node: fx.Node) -> fx.Node:
    rank = len(shape_of(node))
    return self.call(node.target, self.pairs(node.args[0]), [*(d % rank for d in node.args[1]), rank])


def _one_dim(self: _Pairs, node: fx.Node) -> fx.Node:
    """slice, select, squeeze and unsqueeze: their dimension, counted from the front."""
    rank = len(shape_of(node.args[0])) + (node.target is aten.unsqueeze.default)
    dim = argument(node, 1, "dim", 0)
    return self.call(node.target, self.pairs(node.args[0]), dim % rank, *node.args[2:])


def _cat(self: _Pairs, node: fx.Node) -> fx.Node:
    parts, dim = node.args[0], argument(node, 1, "dim", 0)
    return self.call(node.target, [self.pairs(p) for p in parts], dim % len(shape_of(parts[0])))


def _pad(self: _Pairs, node: fx.Node) -> fx.Node:
    return self.call(node.target, self.pairs(node.args[0]), [0, 0, *node.args[1]], *node.args[2:])


def _conjugate(self: _Pairs, node: fx.Node) -> fx.Node:
    re, im = self.parts(node.args[0])
    return self.stack(re, self.call(aten.neg.default, im))


def _size(self: _Pairs, node: fx.Node) -> fx.Node:
    squares = self.call(aten.pow.Tensor_Scalar, self.pairs(node.args[0]), 2)
    return self.call(aten.sqrt.default, self.call(aten.sum.dim_IntList, squares, [-1]))


RULES: dict[Any, Callable[[_Pairs, fx.Node], fx.Node]] = {
    **dict.fromkeys(FOURIER, _fourier),
    aten.view_as_complex.default: lambda self, node: node.args[0],
    aten.view_as_real.default: lambda self, node: self.pairs(node.args[0]),
    aten.complex.default: lambda self, node: self.stack(*node.args),
    aten.mul.Tensor: _product, aten.div.Tensor: _product, aten.add.Tensor: _sum, aten.sub.Tensor: _sum, aten.neg.default: _elementwise,
    aten.clone.default: lambda self, node: self.pairs(node.args[0]), aten.abs.default: _size,
    aten._conj.default: _conjugate, aten.conj_physical.default: _conjugate,
    aten.reshape.default: _sizes, aten.view.default: _sizes, aten.expand.default: _sizes, aten.permute.default: _permute,
    aten.slice.Tensor: _one_dim, aten.select.int: _one_dim, aten.unsqueeze.default: _one_dim, aten.squeeze.dim: _one_dim,
    aten.cat.default: _cat, aten.constant_pad_nd.default: _pad,
}  # fmt: skip
