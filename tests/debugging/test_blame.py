"""Blame on seeded faults: the pass or the operator, the site, a small program, and a script that shows it."""

from __future__ import annotations

import random
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import fx, nn

from thresher import capture
from thresher.backends.tvm.importing.converters import registry
from thresher.backends.tvm.importing.importer import Importer
from thresher.cli import main as cli
from thresher.debugging.blame import Blame, blame, blame_lowering, lowering_fails, pass_fails
from thresher.ir.nodes import dtype_of, is_tensor
from thresher.ir.program import Program
from thresher.passes import pipelines
from thresher.rewriting.contract import Context, Note, Pass, PassResult
from thresher.testing import ZOO, settle

aten = torch.ops.aten


@dataclass(frozen=True)
class Faulty(Pass):
    """Rewrites every call of one operator, rightly but for one, which it scales by a little."""

    name: ClassVar[str] = "faulty"
    target: Any = None
    wrong: str = ""

    def apply(self, program: Program, context: Context) -> PassResult:
        work, notes = program.clone(), []
        for node in list(work.calls(self.target)):
            if any(u.target is aten.mul.Tensor and u.args[1] == 1.0 for u in node.users):
                continue
            factor = 1.0 if node.name != self.wrong else 1.0 + 1e-4
            users = list(node.users)
            scaled = work.insert_call(node.next, aten.mul.Tensor, (node, factor), like=node)
            for user in users:
                user.replace_input_with(node, scaled)
            if node.name == self.wrong:
                notes.insert(0, Note.at(node, "scaled"))
            else:
                notes.append(Note.at(node, "scaled"))
        return PassResult(work, notes) if notes else PassResult(program)


def model_of(name: str) -> tuple[nn.Module, tuple]:
    torch.manual_seed(0)
    model, args = ZOO[name]()
    return settle(model), args


@pytest.mark.parametrize("seed", range(30))
def test_a_pass_that_is_wrong_at_one_of_its_sites(seed: int, tmp_path: Path) -> None:
    draw = random.Random(seed)
    model, args = model_of(draw.choice(["lista", "vit", "bert", "llama", "unet"]))
    calls = [n for n in capture(model, args).calls() if is_tensor(n) and dtype_of(n) is torch.float32]
    victim = draw.choice([n for n in calls if n.name not in {o.name for o in calls[-1:]}])
    item = Faulty(victim.target, victim.name)
    found = blame(model, args, passes=["evaluate-constants", item] if seed % 2 else [item])
    if found is None:  # nothing reads it in a way that shows
        assert not pass_fails(item, capture(model, args))
        return
    assert found.stage == "pass" and found.culprit == str(item)
    assert found.node == victim.name, found
    assert len(list(found.program.calls())) <= 3 and pass_fails(item, found.program)
    script = found.save(tmp_path / "blame.py").read_text()
    assert len(script.splitlines()) <= 25


def scaled(real: registry.Converter, importer: Importer, node: fx.Node) -> Any:
    value = real(importer, node)
    return importer.emit(registry.R.multiply(value, registry.cast(importer, 1.01, str(value.ty.dtype))))


def small_model(seed: int) -> tuple[nn.Module, tuple]:
    torch.manual_seed(seed)
    layers = [
        nn.Linear(8, 8), nn.GELU(), nn.Sigmoid(), nn.ReLU(), nn.Softmax(-1), nn.LayerNorm(8), nn.Tanh(),
        nn.SiLU(), nn.Hardswish(), nn.ELU(),
    ]  # fmt: skip
    draw = random.Random(seed)
    return nn.Sequential(nn.Linear(8, 8), *draw.sample(layers, 4), nn.Linear(8, 4)).eval(), (torch.randn(3, 8),)


@pytest.mark.parametrize("seed", range(20))
def test_an_operator_that_is_lowered_wrongly(seed: int, monkeypatch) -> None:
    model, args = small_model(seed)
    program = capture(model, args)
    named = [n for n in program.calls() if n.target in registry.SEMANTICS or n.target in registry.CPU_KERNELS]
    victim = random.Random(seed).choice(named)
    for table in (registry.SEMANTICS, registry.CPU_KERNELS):
        if victim.target in table:
            monkeypatch.setitem(table, victim.target, partial(scaled, table[victim.target]))
    found = blame_lowering(program, "cpu")
    if found is None:  # a norm takes the factor back
        assert not lowering_fails(program)
        return
    assert found.stage == "lowering"
    assert found.culprit == str(victim.target), found
    assert len(list(found.program.calls())) == 1 and len(found.program.probe[0]) == 1


def test_all_is_well() -> None:
    model, args = small_model(0)
    assert blame(model, args) is None


def test_the_script_shows_it(tmp_path: Path) -> None:
    """A defect of a registered pass, in a process of its own: the numbers come from the file beside the script."""
    program = capture(nn.Sequential(nn.Linear(3, 4), nn.ReLU()).eval(), (torch.randn(2, 3),))
    found = Blame("pass", "fold-channels", "linear", "0", "relative error 1.0", program)
    script = found.save(tmp_path / "blame.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert done.stdout == "nothing is wrong\n", done.stderr  # for it was a false accusation


def test_command_line(tmp_path: Path, monkeypatch, capsys) -> None:
    (tmp_path / "blamed.py").write_text(
        "from torch import nn\ndef make():\n    return nn.Sequential(nn.Linear(4, 3), nn.GELU())\n"
    )
    monkeypatch.chdir(tmp_path)
    assert cli.main(["blame", "blamed:make", "--input", "2x4"]) == 0 and "nothing is wrong" in capsys.readouterr().out
    real = registry.CPU_KERNELS[aten.gelu.default]
    monkeypatch.setitem(registry.CPU_KERNELS, aten.gelu.default, partial(scaled, real))
    assert cli.main(["blame", "blamed:make", "--input", "2x4"]) == 1
    assert "lowering aten.gelu.default at gelu (1): relative error" in capsys.readouterr().out
    assert (tmp_path / "blame.py").exists() and (tmp_path / "blame.safetensors").exists()


def test_specialising_passes_are_judged_too(monkeypatch) -> None:
    model, args = small_model(1)
    monkeypatch.setattr(pipelines, "specialize", (Faulty(aten.linear.default, "linear"),))
    found = blame(model, args, passes="none")
    assert found is not None and found.stage == "pass" and found.culprit.startswith("faulty")
