"""The graph IR: an ``fx.Graph`` of functional ATen (and ``thresher::``) calls, with its constants and its signature.

Three kinds of node matter: ``placeholder`` (one per leaf of the user's inputs), ``get_attr`` (one per constant; its
target is the name in ``constants``) and ``call_function``. Every tensor node carries

* ``meta["val"]``             a fake tensor: its shape, dtype and, for dynamic programs, its symbols;
* ``meta["nn_module_stack"]`` and ``meta["stack_trace"]``, as torch.export wrote them: where in the user's code it comes from.

A constant may be stored at a higher precision than its node declares. Passes compute new constants in float64 and the
rounding to the declared dtype happens once, in :meth:`Program.rounded`; so an exact pass can be checked to 1e-9.
"""

from __future__ import annotations

import difflib
import operator
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from thresher.errors import ProgramError
from thresher.ir import fake_results
from thresher.ir.lineage import Restore, Values, unfold
from thresher.ir.signature import Signature, dimension, flatten_call
from thresher.runtime.tensor_spec import LiteralSpec, TensorSpec

TORCH = os.path.dirname(torch.__file__)
BIAS_MAP = "bias_map."  # names of constants that fold-channels makes where padding shows
ORIGIN_KEYS = ("nn_module_stack", "stack_trace", "torch_fn", "source_fn_stack")


def module_path(node: fx.Node) -> str:
    """The dotted path of the module that produced ``node``, or the node's name where none is known."""
    stack = node.meta.get("nn_module_stack")
    paths = [entry[0] for entry in stack.values()] if stack else []
    path = paths[-1] if paths else ""
    return path.removeprefix("L['self'].").removeprefix("L['self']") or node.name


def source_line(node: fx.Node) -> str:
    """The innermost ``File "...", line N`` outside torch that led to ``node``, or an empty string."""
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines()]
    frames = [line for line in lines if line.startswith("File ")]
    return next((f for f in reversed(frames) if TORCH not in f), frames[-1] if frames else "")


def copy_origin(target: fx.Node, source: fx.Node) -> None:
    """Let ``target`` say that it comes from the same place of the user's code as ``source``."""
    for key in ORIGIN_KEYS:
        if key in source.meta:
            target.meta[key] = source.meta[key]


def is_tensor(node: Any) -> bool:
    """Whether ``node`` is a graph node that stands for one tensor."""
    return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), Tensor)


def shape_of(node: fx.Node) -> tuple:
    """The shape of a tensor node; dynamic dimensions are ``SymInt``."""
    return tuple(node.meta["val"].shape)


def dtype_of(node: fx.Node) -> torch.dtype:
    """The declared dtype of a tensor node."""
    return node.meta["val"].dtype


@dataclass
class Program:
    """A captured model. ``probe`` holds one example of its flat inputs; the pytree specs give back the user's structure."""

    graph: fx.Graph
    constants: dict[str, Tensor]
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    probe: tuple[Any, ...]
    name: str = "model"
    notes: dict[str, Any] = field(default_factory=dict)  # what passes leave for the report, by pass name
    lineage: list[Restore] = field(default_factory=list)  # how to get the captured constants back, oldest first

    # ------------------------------------------------------------------ reading

    @property
    def placeholders(self) -> list[fx.Node]:
        return [n for n in self.graph.nodes if n.op == "placeholder"]

    @property
    def output(self) -> fx.Node:
        return next(n for n in reversed(self.graph.nodes) if n.op == "output")

    @property
    def output_nodes(self) -> list[Any]:
        """The flat outputs: nodes, or literals where the model returns them."""
        return list(self.output.args[0])

    def calls(self, *targets: Any) -> Iterator[fx.Node]:
        """Every ``call_function`` node, or only those of the given operators."""
        return (n for n in self.graph.nodes if n.op == "call_function" and (not targets or n.target in targets))

    def constant(self, node: Any) -> Tensor | None:
        """The constant behind a ``get_attr`` node; None for anything else."""
        return self.constants[node.target] if isinstance(node, fx.Node) and node.op == "get_attr" else None

    def parameter_count(self) -> int:
        """Elements of all floating-point constants but bias maps, which are computed from parameters (their bytes do count)."""
        found = (t for name, t in self.constants.items() if not name.startswith(BIAS_MAP))
        return sum(t.numel() for t in found if t.is_floating_point())

    def trainable(self) -> set[str]:
        """The constants that are parameters: not what was none, and not what a fold computed from several (bias maps)."""
        fixed = self.notes.get("fixed", frozenset())
        return {
            name
            for name, t in self.constants.items()
            if t.is_floating_point() and name not in fixed and not name.startswith(BIAS_MAP)
        }

    def signature(self, device: str) -> Signature:
        """What the program takes and returns, for a module that runs on ``device``."""
        inputs = tuple(
            TensorSpec(n.name, str(dtype_of(n)).removeprefix("torch."), tuple(dimension(d) for d in shape_of(n)))
            if is_tensor(n)
            else LiteralSpec(n.name, n.meta.get("val"))
            for n in self.placeholders
        )
        outputs = tuple(None if is_tensor(o) else LiteralSpec("output", o) for o in self.output_nodes)
        return Signature(inputs, outputs, self.in_spec, self.out_spec, device)

    # ------------------------------------------------------------------ running

    def flatten_inputs(self, args: Sequence[Any], kwargs: dict[str, Any] | None = None) -> list[Any]:
        """The leaves of a call, checked against the structure that was captured."""
        return flatten_call(self.in_spec, args, kwargs or {})

    def unflatten_outputs(self, leaves: Sequence[Any]) -> Any:
        return pytree.tree_unflatten(list(leaves), self.out_spec)

    def run(
        self, *flat: Any, dtype: torch.dtype | None = None, watch: Callable[[fx.Node, Any], None] | None = None
    ) -> list[Any]:
        """Run on flat inputs and return the flat outputs.

        ``dtype`` evaluates the whole program in that floating dtype (float64 for proofs): floating inputs, constants and
        every dtype literal in the graph are replaced. ``watch(node, value)`` sees each intermediate value.
        """
        with torch.no_grad():
            return _Interpreter(self, dtype, watch).run(flat)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.unflatten_outputs(self.run(*self.flatten_inputs(args, kwargs)))

    # ------------------------------------------------------------------ editing

    def clone(self) -> Program:
        """A copy whose graph can be edited freely; constant tensors are shared and must never be written in place."""
        graph = fx.Graph()
        mapping: dict[fx.Node, fx.Node] = {}
        for node in self.graph.nodes:
            mapping[node] = graph.node_copy(node, lambda n: mapping[n])
        return Program(
            graph,
            dict(self.constants),
            self.in_spec,
            self.out_spec,
            self.probe,
            self.name,
            dict(self.notes),
            list(self.lineage),
        )

    def add_constant(
        self,
        value: Tensor,
        name: str,
        dtype: torch.dtype | None = None,
        like: fx.Node | None = None,
        fixed: bool = False,
    ) -> fx.Node:
        """A ``get_attr`` node, placed before all calls, for a new constant declared as ``dtype`` (default: its own). ``fixed``: training
        does not change it."""
        name = self.fresh_name(name)
        first = next((n for n in self.graph.nodes if n.op not in ("placeholder", "get_attr")), None)
        if first is None:
            raise ProgramError("the graph has no output node")
        with self.graph.inserting_before(first):
            node = self.graph.create_node("get_attr", name, name=name.replace(".", "_"))
        self.constants[name] = value
        self.set_fake(node, dtype or value.dtype)
        if fixed:
            self.notes["fixed"] = frozenset(self.notes.get("fixed", ())) | {name}
        if like is not None:
            copy_origin(node, like)
        return node

    def fresh_name(self, name: str) -> str:
        taken, candidate, i = self.constants, name, 0
        while candidate in taken:
            i += 1
            candidate = f"{name}_{i}"
        return candidate

    def set_fake(self, node: fx.Node, dtype: torch.dtype) -> None:
        """Write the metadata of a ``get_attr`` node from its constant."""
        node.meta["val"] = fake_results.empty(self.constants[node.target].shape, dtype, self.fake_mode)

    def insert_call(
        self, before: fx.Node, target: Any, args: tuple, kwargs: dict | None = None, like: fx.Node | None = None
    ) -> fx.Node:
        """A new call before ``before``, with metadata: the shapes by a fake run, the origin of ``like``."""
        with self.graph.inserting_before(before):
            node = self.graph.call_function(target, args, kwargs or {})
        copy_origin(node, like if like is not None else before)
        self.refresh(node)
        return node

    def refresh(self, node: fx.Node) -> None:
        """Recompute ``meta["val"]`` of one call from the metadata of its arguments."""
        node.meta["val"] = fake_results.result_of(node, self.fake_mode)

    def propagate(self) -> Program:
        """Recompute all metadata from the inputs and constants on; returns self."""
        for node in self.graph.nodes:
            if node.op == "get_attr":
                self.set_fake(node, dtype_of(node) if "val" in node.meta else self.constants[node.target].dtype)
            elif node.op == "call_function":
                self.refresh(node)
        return self

    def clean(self) -> Program:
        """Drop calls nobody uses, then constants nobody reads; returns self."""
        for node in reversed(list(self.graph.nodes)):
            if node.op in ("call_function", "get_attr") and not node.users:
                self.graph.erase_node(node)
        used = {n.target for n in self.graph.nodes if n.op == "get_attr"}
        self.constants = {name: t for name, t in self.constants.items() if name in used}
        return self

    def rounded(self) -> Program:
        """The program with every constant at the dtype its node declares: what is lowered, saved and counted."""
        result = self.clone()
        for node in result.graph.nodes:
            if node.op == "get_attr":
                result.constants[node.target] = result.constants[node.target].to(dtype_of(node)).contiguous()
        return result

    @property
    def fake_mode(self) -> FakeTensorMode:
        for node in self.graph.nodes:
            value = node.meta.get("val")
            if isinstance(value, FakeTensor):
                return value.fake_mode
        return FakeTensorMode(allow_non_fake_inputs=True)

    # ------------------------------------------------------------------ checking

    def verify(self) -> Program:
        """Raise :class:`ProgramError` unless the program is well-formed; returns self.

        Well-formed: topologically ordered, every constant present and used, one node per constant, and the shapes and
        dtypes in the metadata equal those of a fake-tensor run.
        """
        try:
            self.graph.lint()
        except RuntimeError as error:
            raise ProgramError(f"the graph is not well-formed: {error}") from error
        targets = [n.target for n in self.graph.nodes if n.op == "get_attr"]
        if missing := [t for t in targets if t not in self.constants]:
            raise ProgramError(f"get_attr nodes without a constant: {missing}")
        if len(set(targets)) != len(targets):
            raise ProgramError(
                f"a constant has two get_attr nodes: {sorted(t for t in targets if targets.count(t) > 1)}"
            )
        if dangling := sorted(set(self.constants) - set(targets)):
            raise ProgramError(f"constants that no node reads: {dangling[:5]}; call clean() at the end of the pass")
        self._verify_metadata()
        return self

    def _verify_metadata(self) -> None:
        mode = self.fake_mode
        for node in self.graph.nodes:
            if node.op == "get_attr" and self.constants[node.target].shape != shape_of(node):
                found, said = tuple(self.constants[node.target].shape), shape_of(node)
                raise ProgramError(f"constant {node.target!r} has shape {found}, but its node says {said}")
            if node.op != "call_function":
                continue
            said = node.meta.get("val")
            try:
                found = fake_results.result_of(node, mode)
            except Exception as error:
                raise ProgramError(f"node {node.name} ({node.target}) does not fit its arguments: {error}") from error
            if found is not said and _signature(found) != _signature(said):
                raise ProgramError(
                    f"node {node.name} ({node.target}) has metadata {_signature(said)}, but yields {_signature(found)}"
                )

    # ------------------------------------------------------------------ showing

    def text(self) -> str:
        """A readable form, one line a node; :func:`thresher.ir.printer.parse` reads it back."""
        from thresher.ir.printer import render

        return render(self)

    def diff(self, other: Program) -> str:
        """A unified diff of the two text forms; empty where they are structurally equal."""
        return "\n".join(difflib.unified_diff(self.text().splitlines(), other.text().splitlines(), lineterm="", n=1))

    def structurally_equal(self, other: Program) -> bool:
        """Same operators, arguments, shapes and constants' shapes, node names aside."""
        from thresher.ir.printer import render

        return render(self, canonical=True) == render(other, canonical=True)

    # ------------------------------------------------------------------ leaving

    def to_module(self) -> FoldedModule:
        """An ``nn.Module`` that computes the same on the user's structure, with trainable parameters.

        What was no parameter, and what a fold computed from several (bias maps), is a buffer.
        """
        program, trained = self.rounded(), self.trainable()
        root: dict[str, Any] = {
            name: torch.nn.Parameter(t.detach().clone()) if name in trained else t.detach()
            for name, t in program.constants.items()
        }
        graph = program.graph
        output = program.output
        module = FoldedModule(root, graph, class_name=_class_name(self.name))
        module.program = self
        for name, value in root.items():  # fx registers what it copies as buffers unless told otherwise
            owner, _, leaf = name.rpartition(".")
            holder = module.get_submodule(owner)
            if isinstance(value, torch.nn.Parameter) and leaf not in holder._parameters:
                holder._buffers.pop(leaf, None)
                holder.register_parameter(leaf, value)
        graph.set_codegen(_PytreeCodeGen(self.in_spec, self.out_spec, [n.name for n in program.placeholders]))
        output.args = (list(output.args[0]),)
        module.recompile()
        return module


class FoldedModule(fx.GraphModule):
    """What :func:`thresher.rewrite` returns: a trainable module, and the way back to the original's shapes."""

    program: Program

    def __deepcopy__(self, memo: dict[int, Any]) -> FoldedModule:
        """A module of its own on the same program: fx's copy would be a plain GraphModule that has forgotten the way back."""
        module = self.program.to_module()
        module.load_state_dict(self.state_dict())
        for mine, its in zip(self.parameters(), module.parameters(), strict=True):
            its.requires_grad_(mine.requires_grad)
        return module.train(self.training)

    def unfold(self) -> Values:
        """The ``state_dict`` of the original model, in its shapes: what was cut as it was, everything else as it is here now.

        Raises :class:`ProgramError` naming parameters that changed and that the original has no place for.
        """
        program = self.program.rounded()
        here = dict(self.named_parameters()) | dict(self.named_buffers())
        current = {name: here[name].detach().cpu() for name in program.constants}
        exact = self.program.constants
        same = {name: torch.equal(value, program.constants[name]) for name, value in current.items()}
        current = {name: exact[name] if same[name] else value for name, value in current.items()}
        return unfold(program.notes.get("state", {}), program.lineage, exact, current)


def _class_name(name: str) -> str:
    cleaned = "".join(c if c.isalnum() else "_" for c in name)
    return cleaned if cleaned and not cleaned[0].isdigit() else f"Model_{cleaned}"


def _PytreeCodeGen(in_spec: pytree.TreeSpec, out_spec: pytree.TreeSpec, names: list[str]) -> Any:
    from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo

    args_spec, kwargs_spec = in_spec.children()
    positional = [f"arg_{i}" for i in range(args_spec.num_children)]
    return _PyTreeCodeGen(_PyTreeInfo(positional + list(kwargs_spec.context or []), in_spec, out_spec))


def _signature(value: Any) -> Any:
    if isinstance(value, Tensor):
        return (str(value.dtype), tuple(str(d) for d in value.shape))
    if isinstance(value, (tuple, list)):
        return tuple(_signature(v) for v in value)
    return str(value)


class _Interpreter:
    """Runs a program node by node, freeing each value after its last use."""

    def __init__(self, program: Program, dtype: torch.dtype | None, watch: Callable[[fx.Node, Any], None] | None):
        self.program, self.dtype, self.watch = program, dtype, watch

    def convert(self, value: Any) -> Any:
        if self.dtype is None:
            return value
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.to(self.dtype)
        if isinstance(value, torch.dtype) and value.is_floating_point:
            return self.dtype
        return value

    def run(self, flat: Sequence[Any]) -> list[Any]:
        environment: dict[fx.Node, Any] = {}
        last_use: dict[fx.Node, list[fx.Node]] = {}
        seen: set[fx.Node] = set()
        for node in reversed(self.program.graph.nodes):
            for source in node.all_input_nodes:
                if source not in seen:
                    seen.add(source)
                    last_use.setdefault(node, []).append(source)
        inputs = iter(flat)
        for node in self.program.graph.nodes:
            if node.op == "output":
                return [environment[a] if isinstance(a, fx.Node) else a for a in node.args[0]]
            environment[node] = value = self.step(node, environment, inputs)
            if self.watch is not None:
                self.watch(node, value)
            for dead in last_use.get(node, ()):
                environment.pop(dead, None)
        raise ProgramError("the graph has no output node")

    def step(self, node: fx.Node, environment: dict[fx.Node, Any], inputs: Iterator[Any]) -> Any:
        if node.op == "placeholder":
            return self.convert(next(inputs))
        if node.op == "get_attr":
            constant = self.program.constants[node.target]
            return constant.to(dtype_of(node)) if self.dtype is None else self.convert(constant)
        args, kwargs = fx.node.map_aggregate(
            (node.args, node.kwargs), lambda a: environment[a] if isinstance(a, fx.Node) else self.convert(a)
        )
        return node.target(*args, **kwargs)


def getitem_users(node: fx.Node) -> dict[int, fx.Node]:
    """The ``getitem`` nodes of a call with several results, by index."""
    return {user.args[1]: user for user in node.users if user.target is operator.getitem}
