"""Certificates: accepted as made, on disk and back; every kind of lie is rejected and named."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import thresher
from thresher.cli.main import main
from thresher.errors import ProgramError
from thresher.testing import ZOO, mask_channels, settle
from thresher.verification.certificate import Certificate, Step
from thresher.verification.verifier import verify


class Net(nn.Module):
    """A constant channel behind a padded convolution, an unread one, a one-sided residual."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(6, 4, 1)
        with torch.no_grad():
            self.a.weight[[1, 4]] = 0
            self.a.bias[1], self.a.bias[4] = 0.7, 0.0
            self.c.weight[:, 2] = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).relu()).relu())


def certificate() -> Certificate:
    torch.manual_seed(0)
    return thresher.rewrite(Net(), (torch.randn(1, 3, 7, 7),)).certificate


def change(values: dict, name: str, value: object) -> dict:
    return {**values, name: value}


def other_weight(step: Step) -> Step:
    after = step.after.clone()
    after.constants["b.weight"] = after.constants["b.weight"].clone()
    after.constants["b.weight"][0, 0, 0, 0] += 1e-3
    return dataclasses.replace(step, after=after)


def other_bias_map(step: Step) -> Step:
    after = step.after.clone()
    name = next(n for n in after.constants if n.startswith("bias_map."))
    after.constants[name] = after.constants[name] * 1.001
    return dataclasses.replace(step, after=after)


def lost_map(step: Step) -> Step:
    """The bias map is not added."""
    after = step.after.clone()
    total = next(n for n in after.calls(torch.ops.aten.add.Tensor))
    total.replace_all_uses_with(total.args[0])
    kept = {k: (str(total.args[0]) if v[0] == total.name else v[0], v[1]) for k, v in step.kept.items()}
    return dataclasses.replace(step, after=after.clean(), kept=kept)


def doubled_output(step: Step) -> Step:
    """Everything inside is right, and the result is doubled on the way out."""
    after = step.after.clone()
    result = after.output_nodes[0]
    twice = after.insert_call(after.output, torch.ops.aten.mul.Tensor, (result, 2.0))
    after.output.args = ((twice,),)
    return dataclasses.replace(step, after=after)


def other_indices(step: Step) -> Step:
    name, (stands, dims) = next((k, v) for k, v in step.kept.items() if v[1])
    return dataclasses.replace(step, kept=change(step.kept, name, (stands, {d: i.flip(0) for d, i in dims.items()})))


def other_content(step: Step) -> Step:
    mask, content = step.known["conv2d"]
    return dataclasses.replace(step, known=change(step.known, "conv2d", (mask, content + 0.5)))


def more_known(step: Step) -> Step:
    mask, content = step.known["conv2d"]
    return dataclasses.replace(step, known=change(step.known, "conv2d", (torch.ones_like(mask), content)))


def less_read(step: Step) -> Step:
    wanted = step.read["relu"].expand(1, 8, 1, 1).clone()
    wanted[:, 3] = False
    return dataclasses.replace(step, read=change(step.read, "relu", wanted))


def output_unread(step: Step) -> Step:
    return dataclasses.replace(step, read=change(step.read, "conv2d_2", torch.tensor(False)))


def no_reason(step: Step) -> Step:
    return dataclasses.replace(step, reasons=[r for r in step.reasons if r.value != "relu"])


def wrong_dimension(step: Step) -> Step:
    name, (stands, dims) = next((k, v) for k, v in step.kept.items() if v[1])
    return dataclasses.replace(step, kept=change(step.kept, name, (stands, {9: next(iter(dims.values()))})))


def wrong_kind(step: Step) -> Step:
    reasons = [dataclasses.replace(r, kind="zero") if r.kind == "constant" else r for r in step.reasons]
    return dataclasses.replace(step, reasons=reasons)


def wrong_source(step: Step) -> Step:
    return dataclasses.replace(step, reasons=[dataclasses.replace(r, source=("c_weight",)) for r in step.reasons])


LIES: dict[Callable[[Step], Step], str] = {
    other_weight: "has another value in the new program",
    other_bias_map: "has another value in the new program",
    lost_map: "has another value in the new program",
    wrong_dimension: "is malformed: IndexError",
    doubled_output: "is another value in the new program",
    other_indices: "has another value in the new program",
    other_content: "does not have the content",
    more_known: "does not have the content",
    less_read: "depends on elements that are claimed to be unread",
    output_unread: "is claimed not to be read",
    no_reason: "no reason is given",
    wrong_kind: "does not agree with the claims",
    wrong_source: "names values that it has nothing to do with",
}


def test_accepted() -> None:
    verdict = verify(certificate())
    assert verdict.steps == 1
    assert verdict.removed >= 2 * 2 + 1
    assert verdict.values >= 5


@pytest.mark.parametrize("lie", LIES, ids=lambda f: f.__name__)
def test_lies_are_rejected(lie: Callable[[Step], Step]) -> None:
    made = certificate()
    with pytest.raises(ProgramError) as error:
        verify(Certificate([lie(made.steps[0]), *made.steps[1:]]))
    assert LIES[lie] in str(error.value)


def test_every_single_weight_counts() -> None:
    """Whichever element of the folded program's weights is changed, the verifier sees it."""
    made = certificate()
    step = made.steps[0]
    generator = torch.Generator().manual_seed(0)
    for name, tensor in step.after.constants.items():
        after = step.after.clone()
        after.constants[name] = tensor.clone()
        place = int(torch.randint(tensor.numel(), (1,), generator=generator))
        after.constants[name].view(-1)[place] += 0.01
        with pytest.raises(ProgramError):
            verify(Certificate([dataclasses.replace(step, after=after)]))


def test_explains_down_to_the_weight() -> None:
    made = certificate()
    text = made.explain("relu", 1, 1)
    assert text.splitlines() == [
        "relu (aten.relu.default): constant by Elementwise from conv2d",
        "conv2d (aten.conv2d.default): constant by Convolution from x, a_weight, a_bias",
    ]
    assert "not read by conv2d_2" in made.explain("relu_1", 1, 2)
    assert "was not removed" in made.explain("relu", 1, 0)


def test_on_disk(tmp_path, capsys) -> None:
    path = certificate().save(tmp_path / "model.certificate")
    assert verify(Certificate.load(path)) == verify(certificate())
    assert main(["verify", str(path), "--explain", "relu:1:1"]) == 0
    shown = capsys.readouterr().out
    assert "the certificate holds" in shown
    assert "constant by Convolution" in shown
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(bytes(data))
    assert main(["verify", str(path)]) == 1
    assert "thresher:" in capsys.readouterr().err


@pytest.mark.parametrize("name", sorted(ZOO))
def test_the_zoo_is_certified(name: str) -> None:
    torch.manual_seed(0)
    model, args = ZOO[name]()
    certificate = thresher.rewrite(mask_channels(settle(model), 0.3), args).certificate
    if name == "lista":  # nothing can go
        assert certificate is None
    else:
        assert verify(certificate).removed > 10


def test_compile_keeps_it_where_asked() -> None:
    model, x = Net().eval(), torch.randn(1, 3, 7, 7)
    compiled = thresher.compile(model, (x,), target="cpu", backend="eager", certificate=True)
    assert compiled.certificate is not None
    assert verify(compiled.certificate).steps == 1
    assert thresher.compile(model, (x,), target="cpu", backend="eager").certificate is None
