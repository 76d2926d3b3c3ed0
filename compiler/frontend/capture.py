"""Anything a user has -> :class:`Program`.

``torch.export`` (non-strict) gives a functional ATen graph. It is decomposed only where an operator has no name of its
own worth keeping: convolutions, linear, attention, norms, pools, activations and matmul stay whole, because passes match on
them and the backend has kernels for them.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind

from thresher.errors import CaptureError
from thresher.frontend.fast_decompositions import fast_decompositions
from thresher.frontend.onnx.reader import read_onnx
from thresher.ir.nodes import copy_origin
from thresher.ir.program import Original, Program, Role

KEPT_WHOLE = frozenset(
    [
        "conv1d",
        "conv2d",
        "conv3d",
        "conv_transpose1d",
        "conv_transpose2d",
        "conv_transpose3d",
        "linear",
        "bilinear",
        "embedding",
        "scaled_dot_product_attention",
        "layer_norm",
        "group_norm",
        "instance_norm",
        "rms_norm",
        "batch_norm",
        "silu",
        "hardswish",
        "hardsigmoid",
        "relu6",
        "softmax",
        "log_softmax",
        "gelu",
        "elu",
        "selu",
        "celu",
        "mish",
        "leaky_relu",
        "softplus",
        "prelu",
        "threshold",
        "matmul",
        "max_pool1d",
        "max_pool2d",
        "max_pool3d",
        "avg_pool1d",
        "avg_pool2d",
        "avg_pool3d",
        "adaptive_avg_pool1d",
        "adaptive_avg_pool2d",
        "adaptive_max_pool2d",
        "upsample_nearest2d",
        "upsample_bilinear2d",
        "upsample_bicubic2d",
        "im2col",
        "col2im",
        "pixel_shuffle",
        "pixel_unshuffle",
        "channel_shuffle",
    ]
)

#: What can be captured: a module, an exported program, or the path of a ``.pt2`` or ``.onnx`` file.
Model: TypeAlias = nn.Module | ExportedProgram | str | os.PathLike

VIEWS = (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default)

CURES = """Usual cures:
  * control flow that depends on tensor values: torch.where, torch.cond, or move it out of the model;
  * .item(), .tolist(), int(tensor), numpy: keep the value a tensor, or pass it in as a Python number;
  * a shape computed from data (nonzero, boolean indexing): use a mask of fixed shape;
  * an operator without export support: register a fake implementation (torch.library.register_fake)."""


def capture(
    model: Model,
    args: Sequence[Any] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
) -> Program:
    """Capture ``model`` as a :class:`Program`.

    Args:
        model: a module, an ``ExportedProgram``, or the path of a ``.pt2`` or ``.onnx`` file. A module is captured in eval mode; its own
            mode is restored afterwards.
        args, kwargs: example inputs (any nesting). For an exported program they default to the ones stored in it.
        dynamic_shapes: as in ``torch.export.export``, e.g. ``({0: torch.export.Dim("batch")},)``.

    Raises:
        CaptureError: with the place in the user's code and the usual cures.
    """
    if isinstance(model, (str, os.PathLike)):
        model = read_onnx(model) if str(model).endswith(".onnx") else _load_pt2(Path(model))
    if isinstance(model, nn.Module):
        name = type(model).__name__
        exported = _export(model, tuple(args), kwargs or {}, dynamic_shapes)
    elif isinstance(model, ExportedProgram):
        if dynamic_shapes is not None:
            raise CaptureError(
                "an exported program has its free sizes already: give dynamic_shapes= to torch.export.export"
            )
        name, exported = "model", model
        if args or kwargs:
            exported._example_inputs = (tuple(args), dict(kwargs or {}))
    else:
        raise CaptureError(
            f"cannot capture a {type(model).__name__}: give an nn.Module, an ExportedProgram, or the path of a .pt2 or .onnx file"
        )
    with _quiet(), fast_decompositions():
        exported = exported.run_decompositions(_decompositions())
    return _from_exported(exported, name)


def _load_pt2(path: Path) -> ExportedProgram:
    if not path.exists():
        raise CaptureError(f"{path} does not exist")
    try:
        return torch.export.load(path)
    except Exception as error:
        raise CaptureError(f"{path} is not a torch.export file: {error}") from error


def _export(model: nn.Module, args: tuple, kwargs: dict, dynamic_shapes: Any) -> ExportedProgram:
    args, kwargs = _distinct((args, kwargs))
    with eval_mode(model), _quiet():
        try:
            return torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)
        except Exception as error:
            raise CaptureError(_explain(model, error)) from error


def _distinct(tree: Any) -> Any:
    """Give every leaf its own tensor: torch.export merges two inputs that are one object, silently."""
    return torch.utils._pytree.tree_map(lambda v: v.detach().clone() if isinstance(v, Tensor) else v, tree)


def _explain(model: nn.Module, error: Exception) -> str:
    message = str(error).strip().split("\n\nThe error above occurred")[0].strip()
    place = _user_frame(error)
    where = f" at {place}" if place else ""
    return f"{type(model).__name__} could not be exported{where}:\n{message[:1500]}\n{CURES}"


def _user_frame(error: BaseException) -> str:
    """The innermost frame outside torch and thresher: the user's line that stopped the export."""
    import traceback

    own = (os.path.dirname(torch.__file__), os.path.dirname(os.path.dirname(__file__)))
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(own)]
    frames = [f for f in frames if "contextlib" not in f.filename and not f.filename.startswith("<")]
    return f"{frames[-1].filename}:{frames[-1].lineno} ({frames[-1].line})" if frames else ""


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode for the time of the block; every module's own mode comes back after it."""
    modes = {m: m.training for m in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Masks of torch.nn.utils.prune are plain attributes: export warns about each, and nothing is wrong with them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*assigned during export.*")
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield


def _decompositions() -> dict:
    table = torch.export.default_decompositions()
    for op in list(table.keys()):
        if op._schema.name.removeprefix("aten::") in KEPT_WHOLE:
            table.pop(op)
    return table


def _from_exported(exported: ExportedProgram, name: str) -> Program:
    signature = exported.graph_signature
    for output in signature.output_specs:
        if output.kind is OutputKind.TOKEN:
            raise CaptureError(
                "the model calls an operator with side effects (printing, checking, random state); remove it from forward"
            )
        if output.kind is not OutputKind.USER_OUTPUT:
            what = output.target or output.arg
            raise CaptureError(
                f"the model writes to {what!r} while it runs ({output.kind.name.lower()}); a compiled model has no state. "
                "Return the new value instead of assigning it, or put the module in eval mode"
            )
    graph: fx.Graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    constants: dict[str, Tensor] = {}
    nodes = {n.name: n for n in exported.graph.nodes}
    for spec in signature.input_specs:
        source = nodes[spec.arg.name]
        if spec.kind is InputKind.USER_INPUT:
            mapping[source] = graph.node_copy(source)
            if isinstance(spec.arg, ConstantArgument):
                mapping[source].meta["val"] = spec.arg.value
    by_name: dict[str, fx.Node] = {}
    for spec in signature.input_specs:
        if spec.kind is InputKind.USER_INPUT:
            continue
        if spec.target is None or spec.kind not in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
            raise CaptureError(f"the exported program has an input of kind {spec.kind.name}, which is not supported")
        source = nodes[spec.arg.name]
        if spec.target not in by_name:
            node = graph.create_node("get_attr", spec.target, name=spec.target.replace(".", "_"))
            node.meta["val"] = source.meta["val"]
            by_name[spec.target] = node
            constants[spec.target] = _constant(exported, spec.target).detach()
        mapping[source] = by_name[spec.target]
    for node in exported.graph.nodes:
        if node.op == "call_function":
            if _is_assertion(node):
                continue
            mapping[node] = graph.node_copy(node, lambda n: mapping[n])
            copy_origin(mapping[node], node)
            if node.target in VIEWS:  # strides are the backend's business: a view here is a reshape
                mapping[node].target = torch.ops.aten.reshape.default
            if node.target is torch.ops.aten.rms_norm.default:
                _name_epsilon(mapping[node])
        elif node.op == "output":
            output = graph.output(tuple(fx.map_arg(node.args[0], lambda n: mapping[n])))
            output.meta = dict(node.meta)
    call_spec = exported.call_spec
    probe_args, probe_kwargs = exported.example_inputs or ((), {})
    probe = torch.utils._pytree.tree_leaves((probe_args, probe_kwargs))
    learned = {s.target for s in signature.input_specs if s.kind is InputKind.PARAMETER}
    constants = _share_storage(constants)
    shared = {id(t): t for name, t in constants.items() if name in learned}
    program = Program(
        graph,
        constants,
        call_spec.in_spec,
        call_spec.out_spec,
        tuple(probe),
        name,
        Original(dict(exported.state_dict), sum(t.numel() for t in shared.values())),
        {name: Role.BUFFER for name in constants if name not in learned},
    )
    return program.clean().propagate().verify()


def _name_epsilon(node: fx.Node) -> None:
    """rms_norm without eps takes that of its dtype: of the model's, also when the program runs in float64 for a proof."""
    x, shape, *rest = node.args
    weight = rest[0] if rest else node.kwargs.get("weight")
    eps = rest[1] if len(rest) > 1 else node.kwargs.get("eps")
    eps = torch.finfo(node.meta["val"].dtype).eps if eps is None else eps
    node.args, node.kwargs = (x, shape, weight, eps), {}


def _is_assertion(node: fx.Node) -> bool:
    """Guards that export leaves behind (shape and range checks): the compiled module checks its inputs itself."""
    name = str(node.target)
    return "_assert" in name or "sym_constrain_range" in name


def _constant(exported: ExportedProgram, name: str) -> Tensor:
    if name in exported.state_dict:
        return exported.state_dict[name]
    return exported.constants[name]


def _share_storage(constants: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tied weights stay one tensor object under their two names."""
    seen: dict[tuple, Tensor] = {}
    return {
        name: seen.setdefault((t.data_ptr(), t.shape, t.stride(), t.dtype) if t.numel() else (name,), t)
        for name, t in constants.items()
    }
