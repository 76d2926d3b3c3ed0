"""Python reads numbers from tensors while a model is exported: those that no input changes are known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import thresher
from thresher.errors import CaptureError
from thresher.frontend.capture import capture

aten = torch.ops.aten


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shares", torch.tensor([1.0, 0.0]))
        self.register_buffer("table", torch.zeros(2, 3))
        self.linear = nn.Linear(3, 3)


class Branches(Model):
    """EoMT: a branch by the element of a buffer."""

    def forward(self, x: Tensor) -> Tensor:
        for share in self.shares:
            x = self.linear(x) if share > 0 else x + 100
        return x * int(self.shares.sum())


class Written(Model):
    """Longformer: a mask of the model's own is written in place, through a view, before it decides."""

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.zeros(x.shape[:2])
        mask[:, 0] = 1
        before = mask.sum().item()
        mask[:, 1:].fill_(2)
        return self.linear(x) * before if (mask == 2).any() else x


class ByConstant(Model):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.tensor([2, 3]).tolist()[1] + float(self.linear.weight.detach().abs().max() * 0 + 2)


class Sizes(Model):
    """Mimi, Wav2Vec: sizes of a padding are tensors, some of them computed."""

    def forward(self, x: Tensor) -> Tensor:
        left, count = self.shares[0].long(), self.shares.sum().ceil().long()
        x = nn.functional.pad(self.linear(x), (left, count - left + 1))
        return x[:, count:] if x.shape[1] > 4 else x[:, left - 1 : count + 1].reshape(count, -1)


class SizesByValues(Model):
    """Vision models of Qwen: how long the sequences are is the difference of their ends."""

    def forward(self, x: Tensor) -> Tensor:
        ends = torch.repeat_interleave(self.shares.long() + 1, torch.tensor([1, 1])).cumsum(0)
        ends[1:] += self.shares.nonzero().squeeze(1)
        lengths = torch.cat([ends[:1], ends[1:] - ends[:-1]]).tolist()
        return torch.cat([part * i for i, part in enumerate(torch.split(self.linear(x), lengths, dim=1))], dim=1)


class Selected(Model):
    def forward(self, x: Tensor) -> Tensor:
        kept = x[:, torch.tensor([True, False, True])]
        kept[:, 0] = torch.unique(self.shares)[1]
        return kept @ torch.ones(2, 3)


@pytest.mark.parametrize("kind", [Branches, Written, ByConstant, Sizes, SizesByValues, Selected])
def test_what_no_input_changes_is_known(kind: type[Model]) -> None:
    model, x = kind().eval(), torch.randn(2, 3)
    compiled = thresher.compile(model, (x,))
    torch.testing.assert_close(compiled(x), model(x))
    assert compiled.report.library == []


def test_the_model_is_left_as_it_is() -> None:
    model = Branches()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    program = capture(model, (torch.randn(2, 3),))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert len(list(program.calls(aten.linear.default))) == 1


# ---------------------------------------------------------------------- refusals


class ByInput(Model):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) if x.sum() > 0 else x


class ByWrittenInput(Model):
    """The buffer is zeros, but for what is written into a copy of it."""

    def forward(self, x: Tensor) -> Tensor:
        table = self.table.clone()
        table[0] = x[0]
        return self.linear(x) if table.sum() > 0 else x


class ByRandomNumber(Model):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) if torch.rand(()) > 0.5 else x


class ByFreeSize(Model):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) if torch.ones(x.shape[0]).sum() > 2 else x


@pytest.mark.parametrize("kind", [ByInput, ByWrittenInput, ByRandomNumber, ByFreeSize])
def test_what_may_differ_is_refused(kind: type[Model]) -> None:
    dynamic = ({0: torch.export.Dim("batch")},) if kind is ByFreeSize else None
    with pytest.raises(CaptureError, match="control flow that depends on tensor values"):
        capture(kind(), (torch.randn(2, 3),), dynamic_shapes=dynamic)


class ByState(Model):
    def forward(self, x: Tensor) -> Tensor:
        if self.shares[0] > 2:
            x = self.linear(x)
        self.shares += 1
        return x


def test_a_number_that_the_model_writes_is_refused() -> None:
    """The third call would go the other way."""
    with pytest.raises(CaptureError, match="control flow of the model depends on shares, which it writes"):
        capture(ByState(), (torch.randn(2, 3),))
