"""A decomposed ``ExportedProgram`` -> :class:`Program`: user inputs become placeholders, parameters and buffers constants.

A parameter or buffer that the model writes becomes a placeholder, too (``Program.state``), and its new value an output; so does the new
value of an input that is written. What a :class:`Program` cannot say is refused by name: side effects, and operators that call a subgraph.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, InputSpec, OutputKind, OutputSpec
from torch.utils._pytree import tree_leaves

from thresher.errors import CaptureError
from thresher.frontend.calls import copy_call, is_assertion, refuse_subgraphs
from thresher.frontend.layouts import refuse_sparse_values
from thresher.frontend.random_operators import refuse_random_numbers
from thresher.ir.program import Original, Program, Role

CONSTANT_KINDS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
STATE_WRITES = (OutputKind.BUFFER_MUTATION, OutputKind.PARAMETER_MUTATION)
#: Calls that return their first argument's values.
COPIES = (torch.ops.aten.alias.default, torch.ops.aten.detach.default, torch.ops.aten.clone.default)


def to_program(
    exported: ExportedProgram,
    name: str,
    example_inputs: tuple[tuple, dict[str, Any]],
    attributes: Collection[str] = (),
) -> Program:
    """Return the :class:`Program` of ``exported``.

    Args:
        exported: decomposed (:func:`thresher.frontend.decompositions.decompose`); it is not changed.
        name: that of the program.
        example_inputs: positional and keyword arguments; flattened they are the program's ``probe``.
        attributes: names of buffers that are plain attributes of the module: what is written there counts only if it is read, too.

    Raises:
        CaptureError: the model has side effects, changes the shape of what it writes, draws random numbers, makes sparse tensors, or
            calls an operator with a subgraph.
    """
    refuse_random_numbers(exported.graph)
    refuse_sparse_values(exported.graph)
    refuse_subgraphs(exported.graph_module)
    graph = fx.Graph()
    results, written, written_state = _outputs(exported, attributes)
    mapping, constants, state = _add_inputs(exported, graph, written_state)
    for node in exported.graph.nodes:
        if node.op == "call_function" and not is_assertion(node):
            mapping[node] = copy_call(graph, node, mapping.__getitem__)
    outputs = [*results, *written.values(), *(written_state[name] for name in state)]
    graph.output(tuple(fx.map_arg(outputs, mapping.__getitem__)))
    inputs = tree_leaves(example_inputs)
    learned = {s.target for s in exported.graph_signature.input_specs if s.kind is InputKind.PARAMETER}
    constants = _share_storage(constants)
    distinct = {id(t): t for name, t in (constants | state).items() if name in learned}
    program = Program(
        graph,
        constants,
        exported.call_spec.in_spec,
        exported.call_spec.out_spec,
        (*inputs, *(tensor.clone() for tensor in state.values())),
        name,
        Original(dict(exported.state_dict), sum(t.numel() for t in distinct.values())),
        {constant: Role.BUFFER for constant in constants if constant not in learned},
        state=tuple(state),
        writes=(*written, *range(len(inputs), len(inputs) + len(state))),
    )
    return _with_metadata(program.clean()).verify()


def _with_metadata(program: Program) -> Program:
    """Return the program with its metadata.

    Raises :class:`CaptureError` naming a call that cannot be described without its data: sizes that an input decides go into some operators
    of torch as numbers only.
    """
    try:
        return program.propagate()
    except Exception as error:
        where = "; ".join(getattr(error, "__notes__", []))
        raise CaptureError(
            f"{where}: {str(error).strip().splitlines()[0]}. If an argument of the model decides the sizes and is always the same: "
            'thresher.compile(..., fixed={"name": value})'
        ) from error


# ---------------------------------------------------------------------- outputs


def _outputs(
    exported: ExportedProgram, attributes: Collection[str]
) -> tuple[list[Any], dict[int, fx.Node], dict[str, fx.Node]]:
    """Return what the user gets, and the new values of what is written: of inputs by their index, and of the model's tensors by name.

    Raises :class:`CaptureError` for an output that is neither, and for a new value of another shape.
    """
    signature, sources = exported.graph_signature, {n.name: n for n in exported.graph.nodes}
    user_inputs = [s.arg.name for s in signature.input_specs if s.kind is InputKind.USER_INPUT]
    state = {s.target: s.arg.name for s in signature.input_specs if s.kind is not InputKind.USER_INPUT}
    values: Sequence[Any] = exported.graph.output_node().args[0]
    results: list[Any] = []
    written: dict[int, fx.Node] = {}
    written_state: dict[str, fx.Node] = {}
    for spec, value in zip(signature.output_specs, values, strict=True):
        if spec.kind is OutputKind.USER_OUTPUT:
            results.append(value)
            continue
        if spec.kind not in (*STATE_WRITES, OutputKind.USER_INPUT_MUTATION):
            raise CaptureError(_side_effect(spec, exported.graph))
        name = str(spec.target)
        target = sources[state[name] if spec.kind in STATE_WRITES else name]
        if spec.kind in STATE_WRITES and name in attributes and not target.users:
            continue
        _check_shape(name, target, value)
        if _copied(value) is target:
            continue
        if spec.kind in STATE_WRITES:
            written_state[name] = value
        else:
            written[user_inputs.index(name)] = value
    return results, written, written_state


def _side_effect(spec: OutputSpec, graph: fx.Graph) -> str:
    if spec.kind is OutputKind.TOKEN:
        effects = [n for n in graph.nodes if n.target is torch.ops.higher_order.with_effects]
        names = ", ".join(dict.fromkeys(str(n.args[1]) for n in effects))
        return f"the model calls operators with side effects ({names}); leave them out of forward"
    return f"the exported program has an output of kind {spec.kind.name}, which is not supported: export the model for inference"


def _check_shape(name: str, target: fx.Node, value: fx.Node) -> None:
    """Raise :class:`CaptureError` unless what is written has the shape and the dtype of what it replaces."""
    old, new = target.meta["val"], value.meta["val"]
    if (tuple(map(str, old.shape)), old.dtype) != (tuple(map(str, new.shape)), new.dtype):
        raise CaptureError(
            f"the model replaces {name!r}, {old.dtype} {tuple(old.shape)}, by a tensor of {new.dtype} {tuple(new.shape)}; what is "
            "written must keep its shape and dtype: make it as large as it may become, and write into a part of it"
        )


def _copied(value: fx.Node) -> fx.Node:
    """Return the node whose values ``value`` has, through calls that only copy."""
    while value.target in COPIES or (value.target is torch.ops.aten.copy.default and _same_type(*value.args)):
        value = value.args[-1] if value.target is torch.ops.aten.copy.default else value.args[0]
    return value


def _same_type(a: Any, b: Any, *_: Any) -> bool:
    a, b = a.meta["val"], b.meta["val"]
    return a.shape == b.shape and a.dtype == b.dtype


# ---------------------------------------------------------------------- nodes


def _add_inputs(
    exported: ExportedProgram, graph: fx.Graph, written: Collection[str]
) -> tuple[dict[fx.Node, fx.Node], dict[str, Tensor], dict[str, Tensor]]:
    """Add the placeholders, those of the state that is ``written`` last, then the constants.

    Returns the new node of each old one, the constants by name, and the state by name.
    """
    nodes = {n.name: n for n in exported.graph.nodes}
    mapping: dict[fx.Node, fx.Node] = {}
    specs = exported.graph_signature.input_specs
    for spec in (s for s in specs if s.kind is InputKind.USER_INPUT):
        source = nodes[spec.arg.name]
        mapping[source] = graph.node_copy(source)
        if isinstance(spec.arg, ConstantArgument):
            mapping[source].meta["val"] = spec.arg.value
    state: dict[str, Tensor] = {}
    for spec in (s for s in specs if s.target in written and s.kind in CONSTANT_KINDS):
        name = _constant_name(spec)
        mapping[nodes[spec.arg.name]] = graph.node_copy(nodes[spec.arg.name])
        state[name] = _constant(exported, name).detach()
    constant_nodes: dict[str, fx.Node] = {}
    constants: dict[str, Tensor] = {}
    for spec in (s for s in specs if s.kind is not InputKind.USER_INPUT and s.target not in state):
        name, source = _constant_name(spec), nodes[spec.arg.name]
        if name not in constants:
            node = graph.create_node("get_attr", name, name=name.replace(".", "_"))
            node.meta["val"] = source.meta["val"]
            constant_nodes[name] = node
            constants[name] = _constant(exported, name).detach()
        mapping[source] = constant_nodes[name]
    return mapping, constants, state


def _constant_name(spec: InputSpec) -> str:
    if spec.target is None or spec.kind not in CONSTANT_KINDS:
        raise CaptureError(f"the exported program has an input of kind {spec.kind.name}, which is not supported")
    return spec.target


def _constant(exported: ExportedProgram, name: str) -> Tensor:
    return exported.state_dict[name] if name in exported.state_dict else exported.constants[name]


def _share_storage(constants: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the constants with one tensor object for tied weights, under their names."""
    seen: dict[tuple, Tensor] = {}
    return {
        name: seen.setdefault((t.data_ptr(), t.shape, t.stride(), t.dtype) if t.numel() else (name,), t)
        for name, t in constants.items()
    }
