"""Complex values as pairs, Fourier transforms as products."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import thresher
import thresher.ops
from helpers.modules import Function
from helpers.refusals import Build, check_refusal
from helpers.rewrites import check_rewrite
from thresher.frontend.capture import capture
from thresher.ir.nodes import dtype_of, is_tensor
from thresher.ir.parser import parse
from thresher.ir.program import Program
from thresher.passes import pipelines
from thresher.passes.canonicalize import complex_numbers
from thresher.rewriting.manager import PassManager, PassRecord
from thresher.verification.compare import compare

fft = torch.fft


def canonical(model: nn.Module, *inputs: Tensor) -> tuple[Program, PassRecord]:
    manager = PassManager(pipelines.canonicalize)
    program = manager.run(capture(model.eval(), inputs))
    return program, next(r for r in manager.records if r.name == "complex-numbers")


def all_real(program: Program) -> bool:
    return not any(dtype_of(n).is_complex for n in program.graph.nodes if is_tensor(n))


def rand(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@given(
    st.integers(1, 16),
    st.integers(1, 12),
    st.sampled_from(["backward", "ortho", "forward"]),
    st.sampled_from([0, 1, -1]),
    st.sampled_from([complex_numbers.WHOLE, 2]),
)
@settings(max_examples=25, deadline=None)
def test_transforms(rows: int, columns: int, norm: str, dim: int, whole: int) -> None:
    """By one matrix, and by those of its factors."""
    x = rand(rows, columns, 3)
    n = x.shape[dim]

    def function(x: Tensor) -> tuple[Tensor, ...]:
        y = fft.rfft(x, dim=dim, norm=norm)
        z = fft.fft(torch.view_as_complex(torch.stack([x, 2 * x], -1)), dim=dim, norm=norm)
        back = fft.ifft(z * z, dim=dim, norm=norm)
        two = fft.irfft2(fft.rfft2(x, dim=(0, 1), norm=norm), s=x.shape[:2], dim=(0, 1), norm=norm)
        both_halves = fft.fft(x, dim=dim, norm=norm).imag
        return (
            torch.view_as_real(y),
            fft.irfft(y, n=n, dim=dim, norm=norm),
            back.real,
            back.imag,
            z.abs(),
            two,
            both_halves,
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(complex_numbers, "WHOLE", whole)
        program, _ = canonical(Function(function), x)
    assert all_real(program)
    for wanted, found in zip(function(x.double()), program.run(x.double(), dtype=torch.float64)):
        assert not compare([wanted], [found]).exceeds(1e-9)


@pytest.mark.parametrize(
    "function",
    [
        lambda z, x: (z * x + z - z / 2.0).reshape(-1, 6).abs(),
        lambda z, x: torch.cat([z, z.conj()], 1).permute(1, 0, 2)[1:3, :, -2:].real,
        lambda z, x: (z.unsqueeze(-1) * z.unsqueeze(-2)).imag,
        lambda z, x: fft.irfft(z, n=9, dim=-1),  # more than there are: padded
        lambda z, x: (z * torch.complex(x, -x)).expand(2, -1, -1, -1).real,
    ],
)
def test_arithmetic(function: Callable) -> None:
    x = rand(2, 4, 3)

    def whole(x: Tensor) -> Tensor:
        return function(fft.fft(x), x)

    program, _ = canonical(Function(whole), x)
    assert all_real(program)
    assert not compare([whole(x.double())], program.run(x.double(), dtype=torch.float64)).exceeds(1e-9)


def test_what_stays() -> None:
    for function, words in (
        (lambda x: fft.fft(x), "returns"),
        (lambda x: fft.fft(x).exp().real, "exp"),
        (lambda x: (1 / fft.fft(x)).real, "reciprocal"),
    ):
        program, record = canonical(Function(function), rand(3, 4))
        assert not all_real(program) and words in record.refusals[0].message


class AFNO(nn.Module):
    """Adaptive Fourier Neural Operator (Guibas et al., 2022), as its authors wrote it: blocks of channels are mixed mode by mode, and the
    result is soft-thresholded."""

    def __init__(self, channels: int = 16, blocks: int = 4, threshold: float = 0.01):
        super().__init__()
        torch.manual_seed(0)
        self.blocks, self.size, self.threshold = blocks, channels // blocks, threshold
        self.w1, self.w2 = (nn.Parameter(0.2 * torch.randn(2, blocks, self.size, self.size)) for _ in range(2))
        self.b1, self.b2 = (nn.Parameter(0.2 * torch.randn(2, blocks, self.size)) for _ in range(2))

    def mix(self, re: Tensor, im: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        def times(x: Tensor, w: Tensor) -> Tensor:
            return torch.einsum("...bi,bio->...bo", x, w)

        return times(re, w[0]) - times(im, w[1]) + b[0], times(im, w[0]) + times(re, w[1]) + b[1]

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, channels = x.shape
        modes = fft.rfft2(x, dim=(1, 2), norm="ortho").reshape(batch, height, width // 2 + 1, self.blocks, self.size)
        re, im = torch.zeros(modes.shape), torch.zeros(modes.shape)
        re[:], im[:] = (part.relu() for part in self.mix(modes.real, modes.imag, self.w1, self.b1))
        mixed = F.softshrink(torch.stack(self.mix(re, im, self.w2, self.b2), -1), self.threshold)
        modes = torch.view_as_complex(mixed).reshape(batch, height, width // 2 + 1, channels)
        return fft.irfft2(modes, s=(height, width), dim=(1, 2), norm="ortho") + x


def test_afno_is_compiled() -> None:
    model, x = AFNO(), rand(2, 8, 8, 16)
    program, _ = canonical(model, x)
    assert all_real(program)
    (site,) = program.calls(torch.ops.thresher.shrink.default)
    assert site.args[2] == "soft"
    compiled = thresher.compile(model, (x,))
    assert not compare([model(x)], [compiled(x)]).exceeds(1e-4)


def test_modes_by_their_size() -> None:
    """Soft thresholding of complex numbers."""

    def function(x: Tensor) -> Tensor:
        z = fft.rfft(x)
        return fft.irfft(z * F.relu(1 - 0.5 / z.abs()), n=x.shape[-1])

    x = rand(3, 8)
    program, _ = canonical(Function(function), x)
    assert len(list(program.calls(torch.ops.thresher.group_shrink.default))) == 1
    compiled = thresher.compile(Function(function), (x,))
    assert not compare([function(x)], [compiled(x)]).exceeds(1e-5)


BEFORE = """\
program model {
  %x = input : f32[2, 4]
  %z = aten._fft_r2c.default(%x, [1], 0, True) : c64[2, 3]
  %y = aten.view_as_real.default(%z) : f32[2, 3, 2]
  return [%y]
}
"""
AFTER = """\
program model {
  %x = input : f32[2, 4]
  %z_1 = constant "z_1" : f32[6, 4]
  %linear = aten.linear.default(%x, %z_1) : f32[2, 6]
  %reshape = aten.reshape.default(%linear, [2, 3, 2]) : f32[2, 3, 2]
  return [%reshape]
}
"""


def test_a_long_convolution_has_no_large_matrix() -> None:
    """By the transform of twice as many numbers: a matrix of it would have 8 million."""

    def convolved(x: Tensor) -> Tensor:
        return fft.irfft(fft.rfft(x, n=2048) * fft.rfft(x.flip(-1), n=2048), n=2048)[..., :1024]

    program, _ = canonical(Function(convolved), rand(3, 1024))
    assert sum(c.numel() for c in program.constants.values()) < 100_000


def test_before_and_after() -> None:
    check_rewrite("complex-numbers", BEFORE, AFTER)


def of_spectrum(function: Callable) -> Build:
    return lambda: (Function(lambda x: function(fft.fft(x), x)), rand(3, 4))


def spelled(line: str, result: str) -> Build:
    """A line that reads the spectrum %z of eight numbers; its result is %y."""
    head = "%x = input : f32[2, 8]\n%z = aten._fft_r2c.default(%x, [1], 0, True) : c64[2, 5]\n"
    return lambda: parse(f"{head}{line}\n%r = aten.view_as_real.default(%y) : {result}\nreturn [%r]")


def free(function: Callable, *dims: int) -> Build:
    """Captured with free sizes."""

    def build() -> Program:
        shapes = {d: torch.export.Dim(f"d{d}", min=3) for d in dims}
        return capture(Function(function), (rand(4, 5, 6),), dynamic_shapes=((shapes,),))

    return build


REFUSALS = [
    ("complex values stay: *", of_spectrum(lambda z, x: z)),
    ("the model returns some", of_spectrum(lambda z, x: z)),
    (
        "the model takes some",
        lambda: (Function(lambda z: torch.view_as_real(z)), torch.complex(rand(3, 4), rand(3, 4))),
    ),
    ("* is *", of_spectrum(lambda z, x: z.exp().real)),
    ("* has several free sizes", free(lambda x: fft.ifft(fft.fft(x)).real, 0, 1)),
    (
        "* has the unknown normalization *",
        lambda: parse(
            "%x = input : f32[2, 8]\n%z = aten._fft_r2c.default(%x, [1], 3, True) : c64[2, 5]\n"
            "%y = aten.view_as_real.default(%z) : f32[2, 5, 2]\nreturn [%y]"
        ),
    ),
    (
        "* reads a part of its spectrum",
        lambda: parse(
            "%x = input : f32[2, 8]\n%z = aten._fft_r2c.default(%x, [1], 0, True) : c64[2, 5]\n"
            "%y = aten._fft_c2r.default(%z, [1], 2, 4) : f32[2, 4]\nreturn [%y]"
        ),
    ),
    ("* is over a dynamic dimension", free(lambda x: fft.fft(x, dim=0).abs(), 0)),
    (
        "* transforms * numbers, which have no factors",
        lambda: (Function(lambda x: fft.fft(x).abs()), rand(2, 2 * 4099)),
    ),
    ("* divides by a complex value", of_spectrum(lambda z, x: (x / z).real)),
    ("* multiplies with a complex number", spelled("%y = aten.mul.Tensor(%z, 2j) : c64[2, 5]", "f32[2, 5, 2]")),
    ("* adds a number", spelled("%y = aten.add.Tensor(%z, 1.0) : c64[2, 5]", "f32[2, 5, 2]")),
]


@pytest.mark.parametrize(("sentence", "build"), REFUSALS)
def test_refusals(sentence: str, build: Build) -> None:
    check_refusal("complex-numbers", sentence, build)
