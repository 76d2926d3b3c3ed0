"""Program -> Relax module.

TVM's own ``ExportedProgramImporter`` converts the operators it gets right; the converters of the table that is handed in replace those it
gets silently wrong, add those it lacks and, on the CPU, put our kernels in. Constants become a parameter of the function (``weights``), so
that they are stored in one safetensors file beside the compiled code, already packed for their kernels.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import tvm
from torch import fx
from tvm import relax, te, tirx
from tvm.relax.frontend.torch.exported_program_translator import ExportedProgramImporter

from thresher.backends.base import DEFAULT, LoweringOptions
from thresher.backends.tvm.cpu import CpuInfo
from thresher.backends.tvm.importing.provenance import NamingBuilder
from thresher.backends.tvm.kernels.blocks import OPAQUE
from thresher.backends.tvm.plans import torch_kernels
from thresher.backends.tvm.plans.plan_selection import PlanSelector, workload_of
from thresher.backends.tvm.target import TVMTarget
from thresher.errors import BackendError
from thresher.ir.nodes import is_tensor, module_path, source_line
from thresher.ir.program import Program
from thresher.runtime.tensor_spec import dtype_name

BUILDER_LOCK = threading.Lock()  # TVM's builders share one stack in a process
GET_WEIGHT = "vm.builtin.tuple_getitem"
MAX_EMBEDDED_ELEMENTS = 1  # constants of at most this many elements stay in the code

#: ``f(importer, node)`` returns the Relax expression of a call.
Converter = Callable[["Importer", fx.Node], Any]
#: ``f(node, importer)`` returns the converter of a call, None where TVM's own is right.
ConverterTable = Callable[[fx.Node, "Importer"], Converter | None]


@dataclass(frozen=True)
class Imported:
    """A Relax module and its constants.

    ``module``: its ``main`` takes the tensor inputs in their order and then the weights, as one tuple or one by one. ``weights``: the
    packed constants in the order in which the code reads them. ``origins``: Relax variable -> the node of the program that it was
    emitted for.
    """

    module: tvm.IRModule
    weights: list[np.ndarray]
    origins: dict[str, str]


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
            options: of these the importer heeds ``strict_rounding`` and ``shared_weights``.
            separate_weights: make every weight an argument of its own, because a remote device takes no tuple of tensors.
        """
        self.program, self.table, self.target, self.selector = program, table, target, selector
        self.strict_rounding, self.shared_weights = options.strict_rounding, options.shared_weights
        self.separate_weights = separate_weights
        self.stock = ExportedProgramImporter()
        self.builder = NamingBuilder()
        self.stock.block_builder = self.builder
        self.env: dict[fx.Node, Any] = self.stock.env  # node -> its Relax expression
        self.weights: list[np.ndarray] = []
        self.parameters: list[relax.Var] = [] if separate_weights else [relax.Var("weights", relax.ObjectType())]
        self.symbols: dict[str, tirx.Var] = {}
        self.widened: set[fx.Node] = set()  # their values have the zeros already that the padding after them adds
        self._weight_of: dict[Any, relax.Var] = {}

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
            inputs = [self._input(n) for n in self.program.placeholders if is_tensor(n)]
            self.builder.begin_scope(inputs)
            with self.builder.function("main"):
                with self.builder.dataflow():
                    for node in self.program.calls():
                        self._convert(node)
                    results = [self.value(o) for o in self.program.output_nodes if is_tensor(o)]
                    output = self.builder.emit_output(relax.Tuple(results))
                self.builder.emit_func_output(output, params=[*inputs, *self.parameters])
            self.builder.end_scope()
            return Imported(self.builder.get(), self.weights, self.builder.origins)

    def _convert(self, node: fx.Node) -> None:
        if node in self.env:  # the converter of an earlier node computed this one, too
            return
        self.builder.node = node.name
        try:
            self.env[node] = self._expression_of(node)
        except Exception as error:
            line = source_line(node)
            where = f" at {line}" if line else ""
            raise BackendError(
                f"cannot lower node {node.name} ({node.target}, module {module_path(node)}){where}: {type(error).__name__}: {error}"
            ) from error

    def _expression_of(self, node: fx.Node) -> Any:
        """Convert a call: by torch's own kernel where that is on record as fastest, by a converter of the table, else by TVM's."""
        if self._uses_torch(node):
            return torch_kernels.emit(self, node)
        if (convert := self.table(node, self)) is not None:
            return convert(self, node)
        for source in node.all_input_nodes:  # TVM's converters look into env themselves
            if source.op == "get_attr":
                self.value(source)
        stock = self.stock.convert_map.get(getattr(node.target, "__name__", str(node.target)))
        if stock is None:
            raise BackendError(f"no TVM lowering for {node.target}")
        return stock(node)

    def _uses_torch(self, node: fx.Node) -> bool:
        if not self.selector.library or not torch_kernels.possible(node):
            return False
        return self.selector.uses_torch(workload_of(node, self.strict_rounding), node)

    # ------------------------------------------------------------------ values

    def value(self, node: Any) -> Any:
        """Return the Relax expression of an argument: of a node, or a literal as it is."""
        if not isinstance(node, fx.Node):
            return node
        if node not in self.env:
            if node.op != "get_attr":
                raise BackendError(f"node {node.name} has not been converted")
            self.env[node] = self.weight(self.array(node), node)
        return self.env[node]

    def array(self, node: fx.Node) -> np.ndarray:
        """Return the constant of a ``get_attr`` node, in its own dtype."""
        tensor = self.program.constants[node.target].detach().cpu()
        if tensor.dtype is torch.bfloat16:
            import ml_dtypes

            return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return tensor.contiguous().numpy()

    def is_constant(self, node: Any) -> bool:
        """Return whether an argument is a constant of the program, whose :meth:`array` may be packed when the code is generated."""
        return isinstance(node, fx.Node) and node.op == "get_attr"

    def choose(self, node: fx.Node, plans: Callable[[int], Sequence[Any]]) -> Any:
        """Return the plan of the kernel of ``node``: the one on record as fastest, else the first of ``plans(limit)``."""
        return self.selector.choose(workload_of(node, self.strict_rounding), node, plans)

    def weight(self, array: np.ndarray, key: Any) -> Any:
        """Return a constant array as an expression: an element of the parameter ``weights``, the same one for the same ``key``."""
        if array.size <= MAX_EMBEDDED_ELEMENTS:
            return relax.const(array)
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

    # ------------------------------------------------------------------ inputs

    def _input(self, node: fx.Node) -> relax.Var:
        value = node.meta["val"]
        shape = [self._dimension(d) for d in value.shape]
        var = relax.Var(node.name, relax.TensorType(shape, dtype_name(value.dtype)))
        self.env[node] = var
        return var

    def _dimension(self, dim: int | torch.SymInt) -> Any:
        if not isinstance(dim, torch.SymInt):
            return int(dim)
        name = str(dim)
        if not name.isidentifier():
            raise BackendError(f"input dimension {name}: only plain dynamic dimensions are supported, not derived ones")
        return self.symbols.setdefault(name, tirx.Var(name, "int64"))
