"""Fourier transforms of ONNX in torch. A complex number is a last dimension of two: its real and its imaginary part."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from thresher.frontend.onnx.dtypes import torch_dtype
from thresher.frontend.onnx.rules import Floats, Ints, rule


@rule("DFT", since=20)
def dft(x: Tensor, length: Ints | None = None, axis: Ints = (-2,), *, inverse: int, onesided: int) -> Tensor:
    """Return the transform along an axis; half of it where ``onesided``, and of half of it the real inverse."""
    dim = axis[0] % x.dim()
    if length is not None:
        count = length[0]
    else:
        count = 2 * (int(x.shape[dim]) - 1) if inverse and onesided else int(x.shape[dim])
    return _transform(x, count, dim, bool(inverse), bool(onesided))


@rule("DFT")
def dft_by_attribute(x: Tensor, length: Ints | None = None, *, axis: int, inverse: int, onesided: int) -> Tensor:
    """Return the transform along an axis; half of it where ``onesided``, and of half of it the real inverse."""
    return dft(x, length, [axis], inverse=inverse, onesided=onesided)


def _transform(x: Tensor, count: int, dim: int, inverse: bool, onesided: bool) -> Tensor:
    real = x.shape[-1] == 1
    numbers = x.squeeze(-1) if real else torch.view_as_complex(x.contiguous())
    if inverse:
        if onesided:
            return torch.fft.irfft(numbers, count, dim).unsqueeze(-1)
        return torch.view_as_real(torch.fft.ifft(numbers, count, dim))
    if onesided and real:
        return torch.view_as_real(torch.fft.rfft(numbers, count, dim))
    whole = torch.view_as_real(torch.fft.fft(numbers, count, dim))
    return whole.narrow(dim, 0, count // 2 + 1) if onesided else whole


@rule("STFT")
def stft(x: Tensor, step: Ints, window: Tensor | None = None, length: Ints | None = None, *, onesided: int) -> Tensor:
    """Return the transforms of the frames of a signal [batch, time, 1 or 2]: [batch, frames, frequencies, 2]."""
    if length is not None:
        count = length[0]
    else:
        count = int(x.shape[1] if window is None else window.shape[0])
    frames = x.unfold(1, count, step[0]).transpose(2, 3)  # [batch, frames, count, 1 or 2]
    weighted = frames if window is None else frames * window.reshape(-1, 1)
    return _transform(weighted, count, 2, False, bool(onesided))


@rule("MelWeightMatrix")
def mel_weight_matrix(
    bins: Ints, length: Ints, rate: Ints, low: Floats, high: Floats, *, output_datatype: int
) -> Tensor:
    """Return the weights [frequencies, bins] of overlapping triangles that are equally wide on the mel scale."""
    count, spectrum = bins[0], length[0] // 2 + 1
    edges = [2595 * math.log10(1 + f[0] / 700) for f in (low, high)]
    step = (edges[1] - edges[0]) / (count + 2)
    hertz = [700 * (10 ** ((edges[0] + i * step) / 2595) - 1) for i in range(count + 2)]
    corners = [int((length[0] + 1) * f // rate[0]) for f in hertz]
    weights = torch.zeros(spectrum, count, dtype=torch.float64)
    for i, (start, top, end) in enumerate(zip(corners, corners[1:], corners[2:])):
        for j in range(start, top):
            weights[j, i] = (j - start) / (top - start)
        weights[top, i] = 1
        for j in range(top, end):
            weights[j, i] = (end - j) / (end - top)
    return weights.to(torch_dtype(output_datatype))
