"""The graph IR: an ``fx.Graph`` of functional ATen (and ``thresher::``) calls, with its constants and its signature.

Three kinds of node matter: ``placeholder`` (one per leaf of the user's inputs), ``get_attr`` (one per constant; its
target is the name in ``constants``) and ``call_function``.

A graph writes into nothing. Where the model does, its state (the buffers that it writes) is among the inputs, after the user's, and the
new value of everything that it writes, state or input, is among the outputs, after the user's results. Passes see more inputs and
outputs, no more.

Every tensor node carries

* ``meta["val"]``             a fake tensor: its shape, dtype and, for dynamic programs, its symbols;
* ``meta["nn_module_stack"]`` and ``meta["stack_trace"]``, as torch.export wrote them: where in the user's code it comes from.

A constant may be stored at a higher precision than its node declares. Passes compute new constants in float64 and the
rounding to the declared dtype happens once, in :meth:`Program.rounded`; so an exact pass can be checked to 1e-9.
"""

from __future__ import annotations

import difflib
import enum
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from thresher.errors import ProgramError
from thresher.ir import fake_results
from thresher.ir.interpreter import Interpreter
from thresher.ir.lineage import Restore
from thresher.ir.nodes import copy_origin, dtype_of, is_tensor, shape_of
from thresher.ir.printer import render
from thresher.ir.signature import dimension, tree_of
from thresher.runtime.signature import Signature
from thresher.runtime.tensor_spec import LiteralSpec, NumberSpec, TensorSpec, dtype_name

CURE = "call clean() at the end of the pass"


class Role(enum.Enum):
    """The role of a constant in the model."""

    PARAMETER = "parameter"  #: training changes it
    BUFFER = "buffer"  #: fixed: a buffer of the model, or an index or a table that a pass made
    DERIVED = "derived"  #: computed by a fold from several parameters (a bias map): not trained, not counted


@dataclass(frozen=True)
class Original:
    """The model as it was captured.

    ``state`` is its ``state_dict`` (for the way back); ``parameter_count`` the elements of its parameters, shared ones once.
    """

    state: Mapping[str, Tensor] = field(default_factory=dict)
    parameter_count: int = 0


@dataclass
class Program:
    """A captured model. ``probe`` holds one example of its flat inputs; the pytree specs give back the user's structure.

    ``state`` names the tensors of the model that it writes: the last placeholders, whose values in the probe are those before the first
    call. ``writes`` has the index of a placeholder for each of the last outputs, which are the new values of these inputs.
    """

    graph: fx.Graph
    constants: dict[str, Tensor]
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    probe: tuple[Any, ...]
    name: str = "model"
    original: Original = field(default_factory=lambda: Original())
    roles: dict[str, Role] = field(default_factory=dict)  # of the constants that are no parameters, by name
    lineage: list[Restore] = field(default_factory=list)  # how to get the captured constants back, oldest first
    state: tuple[str, ...] = ()
    writes: tuple[int, ...] = ()

    # ------------------------------------------------------------------ reading

    @property
    def placeholders(self) -> list[fx.Node]:
        """The inputs, one node for each leaf of the user's structure, and then one for each tensor of the state."""
        return [n for n in self.graph.nodes if n.op == "placeholder"]

    @property
    def output(self) -> fx.Node:
        """The output node."""
        return next(n for n in reversed(self.graph.nodes) if n.op == "output")

    @property
    def output_nodes(self) -> list[Any]:
        """The flat outputs: nodes, or literals where the model returns them; then the new values of what is written."""
        return list(self.output.args[0])

    @property
    def initial_state(self) -> dict[str, Tensor]:
        """The state before the first call, by name."""
        return dict(zip(self.state, self.probe[len(self.probe) - len(self.state) :]))

    def written(self) -> dict[fx.Node, fx.Node]:
        """Return the new value of each placeholder that is written."""
        placeholders, outputs = self.placeholders, self.output_nodes
        return {placeholders[i]: value for i, value in zip(self.writes, outputs[len(outputs) - len(self.writes) :])}

    def calls(self, *targets: Any) -> Iterator[fx.Node]:
        """Return every ``call_function`` node, or only those of the given operators."""
        return (n for n in self.graph.nodes if n.op == "call_function" and (not targets or n.target in targets))

    def constant(self, node: Any) -> Tensor | None:
        """Return the constant of a ``get_attr`` node; None for anything else."""
        return self.constants[node.target] if isinstance(node, fx.Node) and node.op == "get_attr" else None

    def parameter_count(self) -> int:
        """Return the elements of all floating-point constants but derived ones (whose bytes do count)."""
        counted = (t for name, t in self.constants.items() if self.role(name) is not Role.DERIVED)
        return sum(t.numel() for t in counted if t.is_floating_point())

    def role(self, name: str) -> Role:
        """Return what the constant ``name`` is to the model; a constant nobody gave a role is a parameter."""
        return self.roles.get(name, Role.PARAMETER)

    def trainable(self) -> set[str]:
        """Return the names of the constants that training changes: the floating-point parameters."""
        return {n for n, t in self.constants.items() if t.is_floating_point() and self.role(n) is Role.PARAMETER}

    def signature(self, device: str) -> Signature:
        """Return the names, shapes and dtypes of inputs and outputs, for a module that runs on ``device``."""
        placeholders = self.placeholders
        names = [*(n.name for n in placeholders[: len(placeholders) - len(self.state)]), *self.state]
        inputs = tuple(
            TensorSpec(name, dtype_name(dtype_of(n)), tuple(dimension(d) for d in shape_of(n)))
            if is_tensor(n)
            else LiteralSpec(name, n.meta.get("val"))
            for name, n in zip(names, placeholders)
        )
        outputs = tuple(None if is_tensor(o) else self._number_or_literal(o) for o in self.output_nodes)
        trees = tree_of(self.in_spec), tree_of(self.out_spec)
        return Signature(inputs, outputs, *trees, device, self.state, self.writes)

    @staticmethod
    def _number_or_literal(output: Any) -> NumberSpec | LiteralSpec:
        """Return the specification of a result that is no tensor: of a node a number that is computed, else a literal."""
        if not isinstance(output, fx.Node):
            return LiteralSpec("output", output)
        kinds = {torch.SymBool: "bool", torch.SymFloat: "float"}
        return NumberSpec(kinds.get(type(output.meta["val"]), "int"))

    # ------------------------------------------------------------------ running

    def flatten_inputs(self, args: Sequence[Any], kwargs: dict[str, Any] | None = None) -> list[Any]:
        """Return the flat inputs of a first call. Raises :class:`InputError` where its structure is not the captured one."""
        return [*tree_of(self.in_spec).flatten_call(args, kwargs or {}), *self.initial_state.values()]

    def unflatten_outputs(self, leaves: Sequence[Any]) -> Any:
        """Return the user's structure of flat outputs, without the values that are written."""
        return pytree.tree_unflatten(list(leaves[: len(leaves) - len(self.writes)]), self.out_spec)

    def run(
        self, *flat: Any, dtype: torch.dtype | None = None, watch: Callable[[fx.Node, Any], None] | None = None
    ) -> list[Any]:
        """Run on flat inputs and return the flat outputs.

        ``dtype`` evaluates the whole program in that floating dtype (float64 for proofs): floating inputs, constants and
        every dtype literal in the graph are replaced. ``watch(node, value)`` sees each intermediate value.
        """
        with torch.no_grad():
            return Interpreter(self.graph, self.constants, dtype, watch).run(flat)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the first call of the model returns; nothing is written."""
        return self.unflatten_outputs(self.run(*self.flatten_inputs(args, kwargs)))

    # ------------------------------------------------------------------ editing

    def clone(self) -> Program:
        """Return a copy whose graph can be edited freely; constant tensors are shared and must never be written in place."""
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
            self.original,
            dict(self.roles),
            list(self.lineage),
            self.state,
            self.writes,
        )

    def detached(self) -> Program:
        """Return a copy whose constants and probe are copies, too: what is one tensor under two names stays one."""
        program = self.clone()
        program.probe = tuple(v.detach().clone() if isinstance(v, Tensor) else v for v in self.probe)
        copies = {id(t): t.detach().clone() for t in program.constants.values()}
        program.constants = {name: copies[id(t)] for name, t in program.constants.items()}
        return program

    def add_constant(
        self,
        value: Tensor,
        name: str,
        dtype: torch.dtype | None = None,
        like: fx.Node | None = None,
        role: Role = Role.PARAMETER,
    ) -> fx.Node:
        """Add a constant and return its ``get_attr`` node, placed before all calls.

        Args:
            value: the numbers; a pass may give float64 and declare another dtype, see :meth:`rounded`.
            name: made unique by a number where it is taken.
            dtype: what the node declares; default: that of ``value``.
            like: a node whose origin in the user's code the new one takes.
            role: whether training may change it.
        """
        name = self.fresh_name(name)
        first = next((n for n in self.graph.nodes if n.op not in ("placeholder", "get_attr")), None)
        if first is None:
            raise ProgramError("the graph has no output node")
        with self.graph.inserting_before(first):
            node = self.graph.create_node("get_attr", name, name=name.replace(".", "_"))
        self.constants[name] = value
        self.set_fake(node, dtype or value.dtype)
        if role is not Role.PARAMETER:
            self.roles[name] = role
        if like is not None:
            copy_origin(node, like)
        return node

    def fresh_name(self, name: str) -> str:
        """Return ``name``, or with a number after it where a constant has this name."""
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
        """Insert a call before ``before`` and return it, with metadata: its shape by a fake run, the origin of ``like``."""
        with self.graph.inserting_before(before):
            node = self.graph.call_function(target, args, kwargs or {})
        copy_origin(node, like if like is not None else before)
        self.refresh(node)
        return node

    def refresh(self, node: fx.Node) -> None:
        """Recompute ``meta["val"]`` of one call from the metadata of its arguments."""
        node.meta["val"] = fake_results.result_of(node, self.fake_mode)

    def propagate(self) -> Program:
        """Recompute all metadata from the inputs and constants on; returns self. A note on an operator's error names the node."""
        for node in self.graph.nodes:
            if node.op == "get_attr":
                self.set_fake(node, dtype_of(node) if "val" in node.meta else self.constants[node.target].dtype)
            elif node.op == "call_function":
                try:
                    self.refresh(node)
                except Exception as error:
                    error.add_note(f"node {node.name} ({node.target})")
                    raise
        return self

    def clean(self) -> Program:
        """Drop calls nobody uses, then constants nobody reads; returns self."""
        for node in reversed(list(self.graph.nodes)):
            if node.op in ("call_function", "get_attr") and not node.users:
                self.graph.erase_node(node)
        used = {n.target for n in self.graph.nodes if n.op == "get_attr"}
        self.constants = {name: t for name, t in self.constants.items() if name in used}
        self.roles = {name: role for name, role in self.roles.items() if name in used}
        return self

    def rounded(self) -> Program:
        """Return the program with every constant at the dtype its node declares: what is lowered, saved and counted."""
        result = self.clone()
        for node in result.graph.nodes:
            if node.op == "get_attr":
                result.constants[node.target] = result.constants[node.target].to(dtype_of(node)).contiguous()
        return result

    @property
    def fake_mode(self) -> FakeTensorMode:
        """The mode of the fake tensors in the metadata."""
        for node in self.graph.nodes:
            value = node.meta.get("val")
            if isinstance(value, FakeTensor):
                return value.fake_mode
        return FakeTensorMode(allow_non_fake_inputs=True)

    # ------------------------------------------------------------------ checking

    def verify(self) -> Program:
        """Raise :class:`ProgramError` unless the program is well-formed; returns self.

        Well-formed: topologically ordered, every call and constant present and read, one node per constant, what is written of the
        shape and dtype of its input, and the shapes and dtypes in the metadata equal those of a fake-tensor run.
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
            raise ProgramError(f"constants that no node reads: {dangling[:5]}; {CURE}")
        if unread := [n for n in self.graph.nodes if n.op in ("call_function", "get_attr") and not n.users]:
            raise ProgramError(f"nothing reads {', '.join(map(_in_words, unread[:5]))}; {CURE}")
        for target, value in self.written().items():
            if not is_tensor(value) or _signature(value.meta["val"]) != _signature(target.meta["val"]):
                raise ProgramError(f"{value} is written into {target.name}, and has another shape or dtype")
        self._verify_metadata()
        return self

    def _verify_metadata(self) -> None:
        mode = self.fake_mode
        for node in self.graph.nodes:
            if node.op == "get_attr" and self.constants[node.target].shape != shape_of(node):
                shape, declared = tuple(self.constants[node.target].shape), shape_of(node)
                raise ProgramError(f"constant {node.target!r} has shape {shape}, but its node says {declared}")
            if node.op != "call_function":
                continue
            declared = node.meta.get("val")
            try:
                result = fake_results.result_of(node, mode)
            except Exception as error:
                raise ProgramError(f"node {node.name} ({node.target}) does not fit its arguments: {error}") from error
            if result is not declared and _signature(result) != _signature(declared):
                raise ProgramError(
                    f"node {node.name} ({node.target}) has metadata {_signature(declared)}, but yields {_signature(result)}"
                )

    # ------------------------------------------------------------------ showing

    def text(self, canonical: bool = False) -> str:
        """Return a readable form, one line a node; :func:`thresher.ir.parser.parse` reads it back. ``canonical`` numbers the nodes and
        leaves out what is not structure: two programs are structurally equal where these texts are."""
        return render(self.graph, self.name, canonical, self.state, self.writes)

    def diff(self, other: Program) -> str:
        """Return a unified diff of the two text forms; empty where they are structurally equal."""
        return "\n".join(difflib.unified_diff(self.text().splitlines(), other.text().splitlines(), lineterm="", n=1))

    def structurally_equal(self, other: Program) -> bool:
        """Return whether operators, arguments, shapes and constants' shapes are the same, node names aside."""
        return self.text(canonical=True) == other.text(canonical=True)


def _in_words(node: fx.Node) -> str:
    return f"the constant {node.target!r}" if node.op == "get_attr" else f"the call {node.name} ({node.target})"


def _signature(value: Any) -> Any:
    if isinstance(value, Tensor):
        return (str(value.dtype), tuple(str(d) for d in value.shape))
    if isinstance(value, (tuple, list)):
        return tuple(_signature(v) for v in value)
    return str(value)
