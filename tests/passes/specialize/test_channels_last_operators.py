"""channels-last, operator by operator: each works on the twin, or a permutation leads around it; equal in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thresher.frontend.capture import capture
from thresher.ir.nodes import dtype_of, is_tensor
from thresher.ir.program import Program
from thresher.rewriting.contract import Context
from thresher.rewriting.registry import make_pass
from thresher.testing.comparisons import signature_change
from thresher.verification.compare import EXACT_TOLERANCE, compare_programs, observe

aten = torch.ops.aten
SIZES = {3: (2, 3, 12), 4: (2, 3, 8, 6), 5: (2, 3, 8, 6, 4)}
CONV = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
CONV_TRANSPOSE = {3: nn.ConvTranspose1d, 4: nn.ConvTranspose2d, 5: nn.ConvTranspose3d}
Step = Callable[[Tensor], Tensor]


class Between(nn.Module):
    """A convolution, one step (a function or a layer), and a convolution again, if the step leaves an image."""

    def __init__(self, rank: int, step: Step, last: bool = True):
        super().__init__()
        self.first, self.step = CONV[rank](3, 4, 1), step
        self.last = CONV[rank](4, 2, 1) if last else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.step(self.first(x)))


class Call(nn.Module):
    """A function as a layer."""

    def __init__(self, step: Step):
        super().__init__()
        self.forward = step


def on_twins(model: nn.Module, *args: Tensor, dynamic_shapes: tuple | None = None) -> tuple[Program, list[str]]:
    """Return the program after the pass, equal in float64, and the operators of the calls that it left alone, by its own account."""
    torch.manual_seed(0)
    program = capture(model.eval(), args, dynamic_shapes=dynamic_shapes)
    result = make_pass("channels-last").apply(program, Context())
    result.program.verify()
    assert not signature_change(program, result.program)
    assert not compare_programs(observe(program), result.program).exceeds(EXACT_TOLERANCE)
    calls = [node for node in program.calls() if is_tensor(node) and dtype_of(node).is_floating_point]
    names = {note.node for note in result.rewrites}
    return result.program, [str(node.target) for node in calls if node.name not in names]


def permutes(program: Program) -> int:
    """Return how often values are permuted; the interleaved pixels of a transposed convolution have six dimensions, and do not count."""
    return sum(len(node.args[1]) < 6 for node in program.calls(aten.permute.default))


def convs(factory: Mapping[int, Callable[..., nn.Module]], **options: Any) -> dict[str, tuple[int, Step]]:
    """Return a convolution of 4 channels for each rank, with the options of its name."""
    named = ", ".join(f"{k}={v}" for k, v in options.items())
    layers = {rank: factory[rank](4, 4, **{"kernel_size": 2, **options}) for rank in factory}
    return {f"{type(layer).__name__}({named})": (rank, layer) for rank, layer in layers.items()}


#: By name: the rank of the image, and a step for which nothing is permuted but the input and the output.
WITHIN: dict[str, tuple[int, Step]] = {
    **convs(CONV, kernel_size=3, stride=2, padding=1, dilation=2, groups=2),
    **convs(CONV, padding="same", kernel_size=2, dilation=3),
    **convs(CONV, padding="same", kernel_size=1),
    **convs(CONV, padding="valid"),
    **convs(CONV, bias=False),
    "Conv2d, other sizes": (4, nn.Conv2d(4, 4, (2, 3), stride=(2, 1), padding=(0, 2), dilation=(2, 1))),
    **convs(CONV_TRANSPOSE, stride=3, padding=1, output_padding=1, groups=2, dilation=2),
    **convs(CONV_TRANSPOSE, stride=2),
    **convs(CONV_TRANSPOSE, stride=2, bias=False),
    **convs(CONV_TRANSPOSE, stride=2, padding=1),
    **convs(CONV_TRANSPOSE, stride=2, groups=2),
    **convs(CONV_TRANSPOSE, stride=2, dilation=2),
    **convs(CONV_TRANSPOSE, stride=2, output_padding=1),
    "ConvTranspose2d, other sizes": (4, nn.ConvTranspose2d(4, 4, (2, 3), stride=(2, 3))),
    "max_pool1d": (3, lambda x: F.max_pool1d(x, 3, 2, padding=1, ceil_mode=True)),
    "max_pool1d, dilated": (3, lambda x: F.max_pool1d(x, 3, dilation=2)),
    "max_pool2d": (4, lambda x: F.max_pool2d(x, 2)),
    "max_pool2d, all options": (4, lambda x: F.max_pool2d(x, (3, 2), (2, 1), padding=1, dilation=(1, 2), ceil_mode=True)),
    "max_pool3d": (5, lambda x: F.max_pool3d(x, 2, (2, 3, 1), padding=1, ceil_mode=True)),
    "avg_pool1d": (3, lambda x: F.avg_pool1d(x, 2)),
    "avg_pool1d, all options": (3, lambda x: F.avg_pool1d(x, 3, 2, padding=1, ceil_mode=True, count_include_pad=False)),
    "avg_pool2d": (4, lambda x: F.avg_pool2d(x, (3, 2), (2, 1), padding=1, ceil_mode=True, count_include_pad=False)),
    "avg_pool2d, padding counts": (4, lambda x: F.avg_pool2d(x, 3, 1, padding=1)),
    "avg_pool2d, divisor": (4, lambda x: F.avg_pool2d(x, 2, divisor_override=3)),
    "avg_pool3d": (5, lambda x: F.avg_pool3d(x, 2, (2, 3, 1), padding=1, ceil_mode=True)),
    "adaptive_avg_pool1d": (3, lambda x: F.adaptive_avg_pool1d(x, 1)),
    "adaptive_avg_pool1d, 4 of 12": (3, lambda x: F.adaptive_avg_pool1d(x, 4)),
    "adaptive_avg_pool2d": (4, lambda x: F.adaptive_avg_pool2d(x, 1)),
    "adaptive_avg_pool2d, 4 x 3 of 8 x 6": (4, lambda x: F.adaptive_avg_pool2d(x, (4, 3))),
    "adaptive_avg_pool2d, 1 x 3 of 8 x 6": (4, lambda x: F.adaptive_avg_pool2d(x, (1, 3))),
    "adaptive_avg_pool3d": (5, lambda x: F.adaptive_avg_pool3d(x, 1)),
    "adaptive_avg_pool3d, 2 x 3 x 4 of 8 x 6 x 4": (5, lambda x: F.adaptive_avg_pool3d(x, (2, 3, 4))),
    "nearest": (4, lambda x: F.interpolate(x, (5, 9), mode="nearest")),
    "nearest, a factor": (4, lambda x: F.interpolate(x, scale_factor=2.5)),
    "bilinear": (4, lambda x: F.interpolate(x, (5, 9), mode="bilinear")),
    "bilinear, corners aligned": (4, lambda x: F.interpolate(x, (5, 9), mode="bilinear", align_corners=True)),
    "relu": (5, torch.relu),
    "a number": (3, lambda x: 2 * x + 1),
    "a sum with a factor": (4, lambda x: torch.add(x, x.exp(), alpha=3)),
    "gelu by tanh": (4, lambda x: F.gelu(x, approximate="tanh")),
    "mish in place": (4, lambda x: F.mish(x, inplace=True)),
    "x + f(x)": (4, lambda x: x + torch.sigmoid(x)),
    "times one pixel": (4, lambda x: x * x.mean((2, 3), keepdim=True)),
    "times one pixel of a sequence": (3, lambda x: x * x.amax(2, keepdim=True)),
    "the sum of a row": (4, lambda x: x + x.sum(3, keepdim=True)),
    "the mean of all channels": (4, lambda x: x - x.mean(1, keepdim=True)),
    "the mean of a batch": (4, lambda x: x - x.mean((0, -1), keepdim=True)),
    "cat of channels": (4, lambda x: torch.cat([x[:, :1], x[:, 1:]], 1)),
    "cat of rows": (4, lambda x: torch.cat([x, x], 2)),
    "cat of columns": (4, lambda x: torch.cat([x, x], -1)),
    "cat of sequences": (3, lambda x: torch.cat([x, x])),
    "cat along sequences": (3, lambda x: torch.cat([x, x], 2)),
    "cat of volumes": (5, lambda x: torch.cat([x, x], 3)),
    "slice of a sequence": (3, lambda x: x[:, :, 1:-1]),
    "slice of a batch of sequences": (3, lambda x: x[1:]),
    "slice of rows": (4, lambda x: x[:, :, 1:4]),
    "slice of every other column": (4, lambda x: x[:, :, :, ::2]),
    "slice of a batch of volumes": (5, lambda x: x[1:]),
    "slice of a volume": (5, lambda x: x[:, :, :, :, 1:]),
    "pad": (4, lambda x: F.pad(x, (1, 2, 0, 3), value=2.0)),
    "pad, channels too": (4, lambda x: F.pad(x[:, 1:], (1, 0, 0, 0, 0, 1))),
    "pad of a sequence": (3, lambda x: F.pad(x, (1, 2))),
    "pad of a volume": (5, lambda x: F.pad(x, (1, 2, 0, 3, 2, 0))),
    "index_select of channels": (4, lambda x: x.index_select(1, torch.tensor([1, 0, 3, 2]))),
    "index_select of a sequence": (3, lambda x: x.index_select(-1, torch.tensor([1, 0, 3]))),
}  # fmt: skip


@pytest.mark.parametrize("name", WITHIN)
def test_only_the_input_and_the_output_are_permuted(name: str) -> None:
    rank, step = WITHIN[name]
    program, left = on_twins(Between(rank, step), torch.randn(SIZES[rank]))
    assert (permutes(program), left) == (2, [])


#: By name: the rank, a step that reads the value itself, and the number of permutations.
AROUND: dict[str, tuple[int, Step, int]] = {
    "prelu": (4, nn.PReLU(4), 4),
    "a pool of uneven parts": (4, lambda x: F.adaptive_avg_pool2d(x, (3, 4)), 4),
    "a pool of parts of which some are uneven": (4, lambda x: F.adaptive_avg_pool2d(x, (2, 4)), 4),
    "a weight that is computed": (4, lambda x: F.conv2d(x, torch.ones(4, 4, 1, 1).cos()), 4),
    "a bias that is computed": (4, lambda x: F.conv2d(x, torch.ones(4, 4, 1, 1), torch.ones(4).cos()), 4),
    "nearest, of a sequence": (3, lambda x: F.interpolate(x, 5), 4),
}  # fmt: skip


@pytest.mark.parametrize("name", AROUND)
def test_a_permutation_leads_around(name: str) -> None:
    rank, step, count = AROUND[name]
    program, left = on_twins(Between(rank, step), torch.randn(SIZES[rank]))
    assert permutes(program) == count and left, program.text()


#: By name: the rank, what follows the last image, and the number of permutations.
HEADS: dict[str, tuple[int, Step, int]] = {
    "the mean of all pixels": (4, lambda x: x.mean((2, 3)), 1),
    "the mean of a sequence": (3, lambda x: x.mean(-1), 1),
    "the mean of a volume": (5, lambda x: x.mean((2, 3, 4)), 1),
    "the maximum of all pixels": (4, lambda x: x.amax((-1, -2)), 1),
    "the mean in another dtype": (4, lambda x: x.mean((2, 3), dtype=torch.float64), 1),
    "the mean of a pixel in another dtype": (4, lambda x: x.mean((2, 3), keepdim=True, dtype=torch.float64), 2),
    "the mean of rows": (4, lambda x: x.mean(2), 2),
    "the sum of channels of a sequence": (3, lambda x: x.sum(1), 2),
    "the mean of everything": (4, lambda x: x.mean(), 2),
    "the maximum of everything": (4, lambda x: x.amax(()), 2),
    "nothing of a pool": (4, lambda x: F.adaptive_avg_pool2d(x, (0, 2)), 2),
    "one pixel, flat": (4, lambda x: x[:, :, :1, :1].flatten(1), 1),
    "one pixel, in groups": (4, lambda x: x[:, :, :1, :1].reshape(2, 2, 2), 1),
    "one position, flat": (3, lambda x: x[:, :, :1].flatten(1), 1),
    "a row, flat": (4, lambda x: x[:, :, :1].flatten(1), 2),
    "tokens": (4, lambda x: x.flatten(2).transpose(1, 2), 1),
    "tokens by a permutation": (4, lambda x: x.flatten(2).permute(0, -1, 1), 1),
    "tokens of a volume": (5, lambda x: x.flatten(2).transpose(-1, -2), 1),
    "tokens of a sequence": (3, lambda x: x.transpose(1, 2), 1),
    "tokens of a sequence by a permutation": (3, lambda x: x.permute(0, 2, 1), 1),
    "tokens of a sequence, and the sequence": (3, lambda x: (x.permute(0, 2, 1), x), 2),
    "a sequence, another transposition": (3, lambda x: x.transpose(0, 1), 3),
    "an image, transposed": (4, lambda x: x.transpose(1, 2), 3),
    "tokens, read twice": (4, lambda x: (x.flatten(2).transpose(1, 2), x.flatten(2)), 2),
    "tokens and what is computed before": (4, lambda x: (lambda y: (y.transpose(1, 2), y.exp()))(x.flatten(2)), 3),
    "tokens of four dimensions": (4, lambda x: x.reshape(2, 4, -1, 1).transpose(1, 2), 3),
    "tokens of other channels": (4, lambda x: x.reshape(2, 8, -1).transpose(1, 2), 3),
    "tokens of other images": (4, lambda x: x.reshape(1, 4, -1).transpose(1, 2), 3),
    "no tokens": (4, lambda x: x.flatten(2).exp().transpose(1, 2), 3),
    "rows as tokens": (4, lambda x: x.flatten(2).transpose(0, 1), 3),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADS)
def test_heads(name: str) -> None:
    rank, step, count = HEADS[name]
    program, _ = on_twins(Between(rank, step, last=False), torch.randn(SIZES[rank]))
    assert permutes(program) == count, program.text()


#: By name: the rank, and a step before the first convolution, where no twin is there yet.
BEFORE: dict[str, tuple[int, Step]] = {
    "relu": (4, torch.relu),
    "resize": (4, lambda x: F.interpolate(x, (5, 9))),
    "cat": (4, lambda x: torch.cat([x, x])),
    "maximum": (4, lambda x: x.amax(3, keepdim=True)),
    "pad": (4, lambda x: F.pad(x, (1, 2))),
    "slice": (4, lambda x: x[1:]),
    "index_select": (4, lambda x: x.index_select(2, torch.tensor([1, 0, 3]))),
    "reshape": (4, lambda x: x.reshape(2, 3, 6, 8)),
    "permute": (3, lambda x: x.transpose(1, 2).relu().transpose(1, 2)),
}  # fmt: skip


@pytest.mark.parametrize("name", BEFORE)
def test_the_region_begins_with_a_convolution(name: str) -> None:
    rank, step = BEFORE[name]
    program, left = on_twins(nn.Sequential(Call(step), CONV[rank](3, 4, 1)), torch.randn(SIZES[rank]))
    assert permutes(program) == 2 and left, program.text()


class Operand(nn.Module):
    """A convolution, and an elementwise call that reads something else, too."""

    def __init__(self, rank: int, combine: Callable, shape: tuple[int, ...] = ()):
        super().__init__()
        self.conv, self.combine, self.other = CONV[rank](3, 4, 1), combine, nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor, *more: Tensor) -> Tensor:
        return self.combine(self.conv(x), self.other, *more)


def product(x: Tensor, *others: Tensor) -> Tensor:
    return x * others[-1]


#: By name: the rank, the other operand, the shape of a constant, those of more inputs, and the number of permutations.
OPERANDS: dict[str, tuple[int, Callable, tuple, list[tuple], int]] = {
    "a constant number": (4, product, (), [], 2),
    "a constant for each channel": (4, product, (4, 1, 1), [], 2),
    "a constant for each column": (4, product, (6,), [], 2),
    "a constant image": (4, product, (1, 4, 8, 1), [], 2),
    "a constant for each channel of a sequence": (3, product, (4, 1), [], 2),
    "a constant for each position of a sequence": (3, product, (12,), [], 2),
    "a constant sequence": (3, product, (2, 4, 1), [], 2),
    "a constant volume": (5, product, (4, 1, 6, 1), [], 2),
    "a number": (4, product, (), [()], 2),
    "a value for each column": (4, product, (), [(6,)], 3),
    "a value for each channel": (4, product, (), [(4, 1, 1)], 3),
    "a value for each channel of a sequence": (3, product, (), [(4, 1)], 3),
    "an image": (4, product, (), [(2, 4, 8, 6)], 3),
    "a larger image": (3, product, (), [(2, 2, 4, 12)], 2),
    "an image of cat": (4, lambda x, _, y: torch.cat([y, x], 1), (), [(2, 4, 8, 6)], 3),
    "a constant of cat": (4, lambda x, y: torch.cat([y, x], 1), (2, 2, 8, 6), [], 2),
    "cat with nothing": (4, lambda x, y: torch.cat([x, y]), (0,), [], 2),
    "cat of two vectors": (4, lambda x, y: torch.cat([x.amax((0, 2, 3)), y]), (4,), [], 2),
    "what is computed, of a lower rank": (3, lambda x, y: x * (y + 1), (4, 1), [], 3),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERANDS)
def test_other_operands(name: str) -> None:
    rank, combine, shape, more, count = OPERANDS[name]
    program, _ = on_twins(Operand(rank, combine, shape), torch.randn(SIZES[rank]), *map(torch.randn, more))
    assert permutes(program) == count, program.text()


def test_what_is_a_permutation_is_read_before_it() -> None:
    """The inputs of both models are channels-last already."""
    image = nn.Sequential(Call(lambda x: x.permute(0, -1, 1, 2)), nn.Conv2d(3, 4, 1))
    program, _ = on_twins(image, torch.randn(2, 8, 6, 3))
    assert permutes(program) == 1, program.text()
    other = nn.Sequential(Call(lambda x: x.permute(0, 3, 2, 1)), nn.Conv2d(3, 4, 1))
    program, _ = on_twins(other, torch.randn(2, 8, 6, 3))
    assert permutes(program) == 3, program.text()
    sequence = nn.Sequential(Call(lambda x: x.transpose(1, 2)), nn.Conv1d(3, 4, 1))
    program, _ = on_twins(sequence, torch.randn(2, 12, 3))
    assert permutes(program) == 1, program.text()


def test_a_value_has_one_twin() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
            self.image = nn.Parameter(torch.randn(1, 3, 8, 6))

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) * self.b(x) + self.a(self.image)

    program, _ = on_twins(Twice(), torch.randn(2, 3, 8, 6))
    assert permutes(program) == 2, program.text()


FREE = torch.export.Dim("free", min=3)


def test_free_sizes() -> None:
    """With a free batch all is as before; of an image of free size pools and tokens are left alone."""
    batch = {"dynamic_shapes": ({0: FREE},)}
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 4, 2, stride=2), nn.AdaptiveAvgPool2d((4, 3)))
    program, left = on_twins(model, torch.randn(4, 3, 8, 6), **batch)
    assert permutes(program) == 2 and not left and not list(program.calls(aten.linear.default)), program.text()
    program, left = on_twins(
        nn.Sequential(nn.Conv2d(3, 4, 1), Call(HEADS["tokens"][1])), torch.randn(4, 3, 8, 6), **batch
    )
    assert permutes(program) == 1, program.text()
    height = {"dynamic_shapes": ({2: FREE},)}
    program, left = on_twins(
        nn.Sequential(nn.Conv2d(3, 4, 1), Call(HEADS["tokens"][1])), torch.randn(4, 3, 8, 6), **height
    )
    assert permutes(program) == 3 and "aten.reshape.default" in left, program.text()
    program, left = on_twins(
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d((4, 3))), torch.randn(4, 3, 8, 6), **height
    )
    assert "aten.adaptive_avg_pool2d.default" in left, program.text()
