"""Program -> Relax module.

TVM's own ``ExportedProgramImporter`` converts the operators it gets right; ours (``converters.py``) replace those it gets silently wrong,
add those it lacks and, on the CPU, put our kernels in. Constants become a parameter of the function (``weights``), so that they live
in one safetensors file beside the compiled code, already packed for their kernels.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import tvm
from torch import fx
from tvm import relax, te, tirx
from tvm.relax.frontend.torch.exported_program_translator import ExportedProgramImporter

from thresher.backends.tvm.cpu import CpuInfo
from thresher.backends.tvm.importing.provenance import NamingBuilder
from thresher.backends.tvm.plans import torch_kernels
from thresher.backends.tvm.plans.plan_selection import PlanSelector, workload_of
from thresher.errors import BackendError
from thresher.ir.nodes import is_tensor, module_path, source_line
from thresher.ir.program import Program
from thresher.runtime.tensor_spec import dtype_name
from thresher.runtime.weight_store import Weights

BUILDING = threading.Lock()  # TVM's builders share one stack in a process
WEIGHT = "vm.builtin.tuple_getitem"
OPAQUE = 8  # TVM's OpPatternKind
SMALL = 1  # constants of at most this many elements stay in the code


def architecture(target: tvm.target.Target) -> int:
    """80 for sm_80; 0 for a CPU."""
    return int(re.sub(r"\D", "", str(target.attrs.get("arch", "0"))))


class Importer:
    """Converts one program. ``machine`` is the CPU whose kernels are used, or None for targets that TVM schedules; ``strict_rounding``
    as in :meth:`Backend.lower`; ``choices`` are the plans of the kernels that were measured; ``apart``: every weight is an argument of its
    own, because a remote device takes no arrays of tensors; ``arch``: the number of a GPU's architecture (80 for sm_80), 0 for others;
    ``shared_weights``: as in :class:`LoweringOptions`."""

    def __init__(
        self,
        program: Program,
        machine: CpuInfo | None,
        strict_rounding: bool = False,
        choices: PlanSelector | None = None,
        apart: bool = False,
        arch: int = 0,
        shared_weights: Weights | None = None,
    ):
        self.program, self.machine, self.strict_rounding = program, machine, strict_rounding
        self.choices = PlanSelector() if choices is None else choices
        self.stock = ExportedProgramImporter()
        self.builder = NamingBuilder()
        self.stock.block_builder = self.builder
        self.env: dict[fx.Node, Any] = self.stock.env
        self.weights: list[np.ndarray] = []
        self.parameters: list[relax.Var] = [] if apart else [relax.Var("weights", relax.ObjectType())]
        self.apart, self.arch, self.shared_weights = apart, arch, shared_weights
        self.symbols: dict[str, tirx.Var] = {}
        self._shared: dict[Any, relax.Var] = {}
        self.widened: set[fx.Node] = set()  # their values have the zeros already that the padding behind them adds

    @property
    def cpu(self) -> CpuInfo:
        """The CPU that kernels of ours are made for."""
        assert self.machine is not None, "CPU kernels are chosen for CPU targets only"
        return self.machine

    def run(self) -> tuple[tvm.IRModule, list[np.ndarray]]:
        """The module, whose ``main`` takes the tensor inputs and then the weights as one array, and the weights."""
        from thresher.backends.tvm.importing.converters import converter_of

        with BUILDING:
            inputs = [self._input(n) for n in self.program.placeholders if is_tensor(n)]
            self.builder.begin_scope(inputs)
            with self.builder.function("main"):
                with self.builder.dataflow():
                    for node in self.program.calls():
                        self._convert(node, converter_of(node, self))
                    results = [self.value(o) for o in self.program.output_nodes if is_tensor(o)]
                    output = self.builder.emit_output(relax.Tuple(results))
                self.builder.emit_func_output(output, params=[*inputs, *self.parameters])
            self.builder.end_scope()
            return self.builder.get(), self.weights

    def _convert(self, node: fx.Node, convert: Callable[[Importer, fx.Node], Any] | None) -> None:
        if node in self.env:  # the operator before it gave this value, too
            return
        self.builder.node = node.name
        try:
            if self._by_library(node):
                self.env[node] = torch_kernels.emit(self, node)
                return
            if convert is not None:
                self.env[node] = convert(self, node)
                return
            for source in node.all_input_nodes:  # stock converters look into env themselves
                if source.op == "get_attr":
                    self.value(source)
            stock = self.stock.convert_map.get(getattr(node.target, "__name__", str(node.target)))
            if stock is None:
                raise BackendError(f"no TVM lowering for {node.target}")
            self.env[node] = stock(node)
        except Exception as error:
            where = source_line(node)
            place = f" at {where}" if where else ""
            raise BackendError(
                f"cannot lower node {node.name} ({node.target}, module {module_path(node)}){place}: {type(error).__name__}: {error}"
            ) from error

    def _by_library(self, node: fx.Node) -> bool:
        if not self.choices.library or not torch_kernels.possible(node):
            return False
        return self.choices.by_library(workload_of(node, self.strict_rounding), node)

    # ------------------------------------------------------------------ values

    def value(self, node: Any) -> Any:
        """The Relax expression of an argument: of a node, or of a literal as it is."""
        if not isinstance(node, fx.Node):
            return node
        if node not in self.env:
            if node.op != "get_attr":
                raise BackendError(f"node {node.name} has not been converted")
            self.env[node] = self.weight(self.array(node), node)
        return self.env[node]

    def array(self, node: fx.Node) -> np.ndarray:
        """The constant behind a ``get_attr`` node."""
        tensor = self.program.constants[node.target].detach().cpu()
        if tensor.dtype is torch.bfloat16:
            import ml_dtypes

            return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return tensor.contiguous().numpy()

    def choose(self, node: fx.Node, plans: Callable[[int], Sequence[Any]]) -> Any:
        """The plan of the kernel of ``node``: the one recorded as fastest, else the first of ``plans(limit)``."""
        return self.choices.choose(workload_of(node, self.strict_rounding), node, plans)

    def is_constant(self, node: Any) -> bool:
        return isinstance(node, fx.Node) and node.op == "get_attr"

    def weight(self, array: np.ndarray, key: Any) -> Any:
        """A constant array as an expression: an element of the parameter ``weights``, the same one for the same ``key``."""
        if array.size <= SMALL:
            return relax.const(array)
        if key not in self._shared:
            kind = relax.TensorType(array.shape, str(array.dtype))
            if self.apart:
                self._shared[key] = relax.Var(f"w{len(self.weights)}", kind)
                self.parameters.append(self._shared[key])
            else:  # one argument for all weights: each argument of its own costs a check at every call
                place = relax.prim_value(len(self.weights))
                self._shared[key] = self.emit(relax.call_pure_packed(WEIGHT, *self.parameters, place, ty_args=[kind]))
            self.weights.append(array)
        return self._shared[key]

    def emit(self, expression: Any) -> Any:
        return self.builder.emit(expression)

    def emit_te(
        self, name: str, compute: Callable[..., te.Tensor], *args: Any, scheduled: bool = False, alone: bool = False
    ) -> Any:
        """A kernel from its computation; ``None`` arguments are passed through. ``scheduled``: it is to stay as it is; ``alone``: it is to
        become part of no other."""
        present = [a for a in args if a is not None]

        def call(*tensors: te.Tensor) -> te.Tensor:
            left = iter(tensors)
            return compute(*[None if a is None else next(left) for a in args])

        attrs = {"tirx.is_scheduled": True} if scheduled else {"op_pattern": OPAQUE} if alone else None
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
