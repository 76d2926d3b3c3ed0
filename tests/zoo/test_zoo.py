"""The whole way on the zoo: masked at random, folded, lowered, validated, and really smaller."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import thresher
from thresher.analysis.cost.cost import count_flops
from thresher.frontend.capture import capture
from thresher.ir.folded_module import to_module
from thresher.passes import pipelines
from thresher.rewriting.manager import PassManager
from thresher.testing import ZOO, mask_channels, settle
from thresher.verification.compare import compare


def masked_zoo_model(name: str, amount: float):
    torch.manual_seed(0)
    model, args = ZOO[name]()
    return mask_channels(settle(model), amount), args


@pytest.mark.parametrize(("name", "amount"), [(name, (0.3, 0.7)[i % 2]) for i, name in enumerate(sorted(ZOO))])
def test_fold_is_exact_and_smaller(name: str, amount: float) -> None:
    """Equal in float64 to 1e-9, fewer parameters, no pass reverted, and nothing left to fold."""
    model, args = masked_zoo_model(name, amount)
    program = capture(model, args)
    manager = PassManager(pipelines.exact, "each")
    folded = manager.run(program)
    assert [r.name for r in manager.records if r.status == "reverted"] == []
    expected = program.run(*program.probe, dtype=torch.float64)
    found = folded.run(*program.probe, dtype=torch.float64)
    assert any(bool(e.any()) for e in expected if e.is_floating_point()), "the model's output says nothing"
    assert not compare(expected, found).exceeds(1e-9)
    if (
        name != "lista"
    ):  # its one matrix serves all layers, and the last one's rows are the model's output: nothing can go
        assert folded.parameter_count() < program.original.parameter_count
    else:
        fold = next(r for r in manager.records if r.name == "fold-channels")
        assert any("dead outputs kept" in n.message for n in fold.refusals)
    again = PassManager(pipelines.exact, "off")
    twice = again.run(folded)
    assert twice.parameter_count() == folded.parameter_count()
    assert count_flops(twice) == count_flops(folded)


@pytest.mark.parametrize("name", sorted(ZOO))
def test_compile_save_load(name: str, tmp_path) -> None:
    """compile() validates itself; the artifact comes back from disk and says the same."""
    model, args = masked_zoo_model(name, 0.5)
    compiled = thresher.compile(model, args, target="cpu")
    assert all(check.passed for check in compiled.report.checks)
    assert len(compiled.report.checks) == 6
    with torch.no_grad():
        reference = torch.utils._pytree.tree_leaves(model(*args))
    outputs = torch.utils._pytree.tree_leaves(compiled(*args))
    assert not compare(reference, outputs).exceeds(1e-4)
    loaded = thresher.load(compiled.save(tmp_path / "model.thresher"))
    assert loaded.validate()[0].passed
    assert not compare(outputs, torch.utils._pytree.tree_leaves(loaded(*args))).exceeds(0.0)
    assert loaded.report.after == compiled.report.after


@pytest.mark.parametrize("name", sorted(ZOO))
def test_flops_agree_with_torch(name: str) -> None:
    """Our count of the folded program is torch's count of the rewritten module."""
    model, args = masked_zoo_model(name, 0.5)
    program = PassManager(pipelines.exact, "off").run(capture(model, args))
    module = to_module(program)
    # torch counts the products of attention only where it composes it
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        module(*args)
    assert count_flops(program) == counter.get_total_flops() > 0


@pytest.mark.parametrize("name", sorted(ZOO))
def test_rewrite_trains(name: str) -> None:
    """rewrite() gives a module that computes the same and whose parameters get gradients."""
    model, args = masked_zoo_model(name, 0.5)
    module = thresher.rewrite(model, args)
    with torch.no_grad():
        expected = torch.utils._pytree.tree_leaves(model(*args))
    outputs = torch.utils._pytree.tree_leaves(module(*args))
    assert not compare(expected, outputs).exceeds(1e-4)
    sum(o.square().sum() for o in outputs).backward()
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    assert len(gradients) > len(list(module.parameters())) // 2
    assert any(bool(g.any()) for g in gradients)
