"""Program -> Relax module.

A call is converted in the first of these ways that gives a value of the shape and dtype that the node declares:

1. a converter of the table that is handed in: our kernels, and operators that TVM lacks or gets silently wrong;
2. TVM's own converter (``ExportedProgramImporter``);
3. torch's decomposition of the operator, whose calls are converted in the ways 1 to 3;
4. a call of torch's kernel from the compiled code, where that is allowed. It is named, with what hindered the other ways.

Constants become a parameter of the function (``weights``), so that they are stored in one safetensors file beside the compiled code,
already packed for their kernels.
"""

from __future__ import annotations

import operator
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import tvm
from torch import Tensor, fx
from tvm import relax, te, tirx
from tvm.relax.frontend.torch.exported_program_translator import ExportedProgramImporter

from thresher.backends.base import DEFAULT, MEASURED_AS_FASTER, LibraryCall, LoweringOptions
from thresher.backends.tvm.cpu import CpuInfo
from thresher.backends.tvm.importing.decomposition import decomposed
from thresher.backends.tvm.importing.inputs import bind_sizes, bound, input_variables, is_number, scalar_tensor
from thresher.backends.tvm.importing.library_call import library_call
from thresher.backends.tvm.importing.provenance import NamingBuilder
from thresher.backends.tvm.importing.sizes import SYMBOLIC, Sizes
from thresher.backends.tvm.importing.stock import is_trusted
from thresher.backends.tvm.importing.values import is_empty, misfit, tensor_type
from thresher.backends.tvm.kernels.blocks import OPAQUE
from thresher.backends.tvm.plans import torch_kernels
from thresher.backends.tvm.plans.plan_selection import PlanSelector, workload_of
from thresher.backends.tvm.target import TVMTarget
from thresher.errors import BackendError, first_line
from thresher.ir.nodes import is_tensor, module_path, source_line
from thresher.ir.program import Program

BUILDER_LOCK = threading.Lock()  # TVM's builders share one stack in a process
OUR_LOWERING = "our lowering"
GET_WEIGHT = "vm.builtin.tuple_getitem"

#: ``f(importer, node)`` returns the Relax expression of a call.
Converter = Callable[["Importer", fx.Node], Any]
#: ``f(node, importer)`` returns the converter of a call, None where TVM's own is right.
ConverterTable = Callable[[fx.Node, "Importer"], Converter | None]


@dataclass(frozen=True)
class Imported:
    """A Relax module and its constants.

    ``module``: its ``main`` takes the tensor inputs in their order and then the weights, as one tuple or one by one. ``weights``: the
    packed constants in the order in which the code reads them. ``origins``: Relax variable -> the node of the program that it was
    emitted for. ``library``: the nodes that torch computes. ``rounds_more``: as for :class:`Executable`.
    """

    module: tvm.IRModule
    weights: list[np.ndarray]
    origins: dict[str, str]
    library: list[LibraryCall]
    rounds_more: bool


class Unlowered(BackendError):
    """Raised where a call cannot be lowered without torch's kernel; the message says what hinders each way."""


class Importer:
    """The conversion of one program, and what converters ask and tell while it runs."""

    def __init__(
        self,
        program: Program,
        table: ConverterTable,
        target: TVMTarget,
        selector: PlanSelector,
        options: LoweringOptions = DEFAULT,
        separate_weights: bool = False,
    ):
        """Prepare the conversion of ``program``.

        Args:
            program: already rounded to the dtypes it runs in.
            table: the converters that replace TVM's.
            target: the machine to generate code for; a CPU gets the kernels of ``kernels/cpu``.
            selector: chooses the plan of every kernel that has several.
            options: of these the importer heeds ``strict_rounding``, ``shared_weights`` and what concerns the library.
            separate_weights: make every weight an argument of its own, because a remote device takes no tuple of tensors.
        """
        self.program, self.table, self.target, self.selector = program, table, target, selector
        self.options, self.strict_rounding, self.shared_weights = (
            options,
            options.strict_rounding,
            options.shared_weights,
        )
        self.separate_weights = separate_weights
        self.stock = ExportedProgramImporter()
        self.builder = NamingBuilder()
        self.stock.block_builder = self.builder
        self.env: dict[fx.Node, Any] = self.stock.env  # node -> its Relax expression
        self.weights: list[np.ndarray] = []
        self.parameters: list[relax.Var] = [] if separate_weights else [relax.Var("weights", relax.ObjectType())]
        self.sizes = Sizes()
        #: Nodes whose values are those of their only user already: it adds zeros around them, or exchanges their dimensions.
        self.as_user: set[fx.Node] = set()
        self.library: list[LibraryCall] = []  # the nodes that torch computes
        self.rounds_more = False  # a converter sets it
        self._weight_of: dict[Any, relax.Var] = {}
        self._constants: dict[fx.Node, Tensor] = {}  # those of decompositions

    @property
    def machine(self) -> CpuInfo | None:
        """The CPU whose kernels are used, None for a GPU."""
        return self.target.machine

    @property
    def cpu(self) -> CpuInfo:
        """The CPU whose kernels are used; only for converters that run for CPU targets alone."""
        return self.target.cpu_info

    def run(self) -> Imported:
        """Convert every call of the program in its order.

        Raises:
            BackendError: a node cannot be lowered; the message names it, its operator, its module and its line of source.
        """
        with BUILDER_LOCK:
            placeholders = [n for n in self.program.placeholders if is_tensor(n)]
            inputs = input_variables(placeholders, self.sizes)
            self.builder.begin_scope(inputs)
            with self.builder.function("main"):
                with self.builder.dataflow():
                    self.env.update(bind_sizes(self.builder, placeholders, inputs, self.sizes))
                    for node in self.program.calls():
                        self._convert(node)
                    results = [self.tensor(o) for o in self.program.output_nodes if isinstance(o, fx.Node)]
                    output = self.builder.emit_output(relax.Tuple(results))
                self.builder.emit_func_output(output, params=[*inputs, *self.parameters])
            self.builder.end_scope()
            return Imported(self.builder.get(), self.weights, self.builder.origins, self.library, self.rounds_more)

    def _convert(self, node: fx.Node) -> None:
        if node in self.env:  # the converter of an earlier node computed this one, too
            return
        self.builder.node = node.name
        try:
            self.env[node] = self._by_torch(node) if self._prefers_torch(node) else self._in_first_way(node)
        except Exception as error:
            line = source_line(node)
            where = f" at {line}" if line else ""
            raise BackendError(
                f"cannot lower node {node.name} ({node.target}, module {module_path(node)}){where}: {error}"
            ) from error

    def _prefers_torch(self, node: fx.Node) -> bool:
        """Return whether torch is to compute a node that could be lowered, and note it."""
        reason = self.options.library_nodes.get(node.name, "")
        if not reason and self.selector.library and torch_kernels.possible(node):
            measured = self.selector.uses_torch(workload_of(node, self.strict_rounding), node)
            reason = MEASURED_AS_FASTER if measured else ""
        if reason:
            self.library.append(LibraryCall(node.name, str(node.target), reason))
        return bool(reason)

    def _in_first_way(self, node: fx.Node) -> Any:
        """Convert a call without torch's kernel where that is possible, else by it where that is allowed."""
        try:
            return self._lowered(node)
        except Unlowered as error:
            if not self.options.library:
                raise BackendError(f"{error}; with library='auto' torch computes it") from error
            result = self._by_torch(node)
            self.library.append(LibraryCall(node.name, str(node.target), str(error)))
            return result

    def _by_torch(self, node: fx.Node) -> Any:
        call = library_call(node, self.tensor, self.sizes, self.target.device)
        return self._checked(self.emit(call), node)

    def _lowered(self, node: fx.Node) -> Any:
        """Convert a call in the first way that gives what the node declares. Raises :class:`Unlowered` with what hinders each."""
        value, hindrances = node.meta["val"], []
        if isinstance(value, SYMBOLIC) and not self.sizes.unknown(value):
            return self.sizes.expression(value)
        if node.target is operator.getitem:
            return self._item(self.value(node.args[0]), node)
        if is_empty(value) and not any(map(self.sizes.unknown, value.shape)):
            return self._empty(node)
        for name, way in self._ways(node):
            try:
                return self._checked(way(node), node)
            except Exception as error:  # whatever a converter raises: another way may do
                if name == OUR_LOWERING and not isinstance(error, NotImplementedError):  # a defect: it may cost speed
                    reason = f"{type(error).__name__}: {first_line(error)}"
                    warnings.warn(f"our lowering of {node.target} failed, another is used ({reason})", stacklevel=2)
                hindrances.append(f"{name}: {first_line(error)}")
                self.as_user.discard(node)
        raise Unlowered("; ".join(hindrances))

    def _item(self, results: Any, node: fx.Node) -> Any:
        """Return one of several results, with the sizes that data decided bound."""
        index, value = node.args[1], node.meta["val"]
        if isinstance(results, (tuple, list)):
            return results[index]
        item = self.emit(relax.TupleGetItem(results, index))
        return bound(self.builder, item, value, self.sizes) if isinstance(value, Tensor) else item

    def _empty(self, node: fx.Node) -> Any:
        """Return the value of a node that has no elements; TVM cannot read such a constant of its code from a file."""
        kind = tensor_type(node.meta["val"], self.sizes)
        if all(isinstance(d, tirx.IntImm) for d in kind.shape.values):
            return self.weight(np.zeros([int(d) for d in kind.shape.values], str(kind.dtype)), node)
        return self.emit(relax.op.zeros(kind.shape, kind.dtype))

    def _ways(self, node: fx.Node) -> Iterator[tuple[str, Callable[[fx.Node], Any]]]:
        convert = self.table(node, self)
        if convert is not None:
            yield OUR_LOWERING, partial(convert, self)
        stock = self.stock.convert_map.get(getattr(node.target, "__name__", str(node.target)))
        if stock is not None and is_trusted(node):
            yield "TVM's lowering", partial(self._by_tvm, stock)
        yield "torch's decomposition", self._decomposed

    def _by_tvm(self, convert: Callable[[fx.Node], Any], node: fx.Node) -> Any:
        for source in node.all_input_nodes:  # TVM's converters look into env themselves
            if source.op == "get_attr":
                self.value(source)
        return convert(node)

    def _decomposed(self, node: fx.Node) -> Any:
        """Convert the calls of torch's decomposition of a node."""
        module, sources = decomposed(node, self.program)
        arguments = iter(sources)
        for inner in module.graph.nodes:
            if inner.op == "placeholder":
                source = next(arguments)
                if self.is_constant(source):
                    self._constants[inner] = self.constant(source)
                self.env[inner] = self.value(source)
            elif inner.op == "get_attr":
                self._constants[inner] = getattr(module, inner.target)
            elif inner.op == "call_function" and inner not in self.env:
                self.env[inner] = self._part(inner)
        (results,) = module.graph.output_node().args
        return fx.node.map_aggregate(results, self.value)

    def _part(self, node: fx.Node) -> Any:
        """Convert a call of a decomposition."""
        try:
            return self._lowered(node)
        except Unlowered as error:
            raise NotImplementedError(f"it needs {node.target}, which has no lowering ({error})") from error

    def _checked(self, result: Any, node: fx.Node) -> Any:
        """Return the result of a conversion, with its free sizes bound.

        Raises :class:`TypeError` where it is not of the kind that the node declares.
        """
        value = (next(iter(node.users)) if node in self.as_user else node).meta["val"]
        if reason := misfit(result, value, self.sizes):
            raise TypeError(reason)
        return bound(self.builder, result, value, self.sizes) if isinstance(value, Tensor) else result

    # ------------------------------------------------------------------ values

    def value(self, node: Any) -> Any:
        """Return the Relax expression of an argument: of a node, or a literal as it is."""
        if not isinstance(node, fx.Node):
            return node
        if node not in self.env:
            if not self.is_constant(node):
                raise BackendError(f"node {node.name} has not been converted")
            self.env[node] = self.weight(self.array(node), node)
        return self.env[node]

    def tensor(self, node: fx.Node) -> Any:
        """Return the value of a node as a tensor: a size as one without dimensions."""
        value = self.value(node)
        return scalar_tensor(self.builder, value) if is_number(value) else value

    def constant(self, node: fx.Node) -> Tensor:
        """Return the tensor of a constant of the program, or of the decomposition that is being converted."""
        return self._constants[node] if node in self._constants else self.program.constants[node.target]

    def array(self, node: fx.Node) -> np.ndarray:
        """Return the constant of a ``get_attr`` node, in its own dtype; complex numbers as pairs."""
        tensor = self.constant(node).detach().cpu().resolve_conj().resolve_neg()
        if tensor.dtype is torch.bfloat16:
            import ml_dtypes

            return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).contiguous().numpy()

    def is_constant(self, node: Any) -> bool:
        """Return whether an argument is a constant of the program, whose :meth:`array` may be packed when the code is generated."""
        return isinstance(node, fx.Node) and (node.op == "get_attr" or node in self._constants)

    def choose(self, node: fx.Node, plans: Callable[[int], Sequence[Any]]) -> Any:
        """Return the plan of the kernel of ``node``: the one on record as fastest, else the first of ``plans(limit)``."""
        return self.selector.choose(workload_of(node, self.strict_rounding), node, plans)

    def weight(self, array: np.ndarray, key: Any) -> Any:
        """Return a constant array as an expression: an element of the parameter ``weights``, the same one for the same ``key``."""
        if array.size == 1:  # it stays in the code
            return relax.const(array, str(array.dtype))
        if key not in self._weight_of:
            kind, index = relax.TensorType(array.shape, str(array.dtype)), len(self.weights)
            if self.separate_weights:
                self._weight_of[key] = relax.Var(f"w{index}", kind)
                self.parameters.append(self._weight_of[key])
            else:  # one argument for all weights: each argument of its own costs a check at every call
                call = relax.call_pure_packed(GET_WEIGHT, *self.parameters, relax.prim_value(index), ty_args=[kind])
                self._weight_of[key] = self.emit(call)
            self.weights.append(array)
        return self._weight_of[key]

    def emit(self, expression: Any) -> Any:
        """Bind an expression to a new variable, which is returned; it counts as computed for the node that is being converted."""
        return self.builder.emit(expression)

    def emit_te(
        self, name: str, compute: Callable[..., te.Tensor], *args: Any, scheduled: bool = False, opaque: bool = False
    ) -> Any:
        """Emit the kernel ``name`` from its computation and return its result.

        Args:
            name: a hint; TVM numbers kernels of one name.
            compute: a function of TE tensors that returns the result's; an argument that is None is passed through as None.
            args: Relax expressions.
            scheduled: the kernel stays as it is.
            opaque: the kernel is fused with no other.
        """
        present = [a for a in args if a is not None]

        def call(*tensors: te.Tensor) -> te.Tensor:
            remaining = iter(tensors)
            return compute(*[None if a is None else next(remaining) for a in args])

        attrs = {"tirx.is_scheduled": True} if scheduled else {"op_pattern": OPAQUE} if opaque else None
        return self.builder.emit_te(call, *present, primfunc_name_hint=name, primfunc_attrs=attrs)
