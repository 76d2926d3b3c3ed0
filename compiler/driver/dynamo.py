"""``torch.compile(model, backend="thresher")``: what Dynamo finds between two graph breaks is compiled like any model.

    compiled = torch.compile(model, backend="thresher", options={"passes": ["exact"], "validate": "warn"})
    with torch.no_grad():
        y = compiled(x)

Dynamo hands over a graph whose inputs are the user's tensors and the parameters and buffers of the modules. The latter are taken as the
constants that they are, so pruned channels fold. A graph is built at its first call with given shapes (a dynamic dimension is built for
each of its sizes) and again when a parameter has changed since. Training stays Dynamo's: where a gradient is asked for, the graph runs as
it is. What cannot be captured or lowered runs as it is, too, with a warning that says why; a *wrong* result raises, as everywhere.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from thresher.artifact.compiled import Compiled
from thresher.driver.compile import compile as compile_model
from thresher.driver.options import CompileOptions
from thresher.errors import BackendError, CaptureError, InputError
from thresher.passes import pipelines
from thresher.rewriting.contract import Pass
from thresher.rewriting.registry import make_pass

#: What ``options=`` may say: the arguments of thresher.compile() that describe how to build, and ``fallback``.
OPTIONS = {f.name for f in dataclasses.fields(CompileOptions)} - {"masks", "certificate", "dynamic_shapes"}
MAX_REMEMBERED = 32  # compiled graphs

_CACHE: OrderedDict[str, Compiled] = OrderedDict()


def thresher_backend(
    module: fx.GraphModule, inputs: Sequence[Any], *, options: dict[str, Any] | None = None
) -> Callable[..., Any]:
    """Return what Dynamo calls in the place of ``module``. Dynamo finds this function by the entry point ``torch_dynamo_backends``.

    ``options``: how to build, as in :func:`thresher.compile` (``passes``, ``target``, ``validate``, ``tune``, ...); ``fallback=False``
    raises where a graph would run as it is. ``calibration`` and ``budget`` concern the graph's inputs: they are for models without breaks.

    Raises :class:`InputError` naming an option that is none.
    """
    settings = dict(options or {})
    fallback = bool(settings.pop("fallback", True))
    if unknown := sorted(settings.keys() - OPTIONS):
        known = ", ".join(sorted({*OPTIONS, "fallback"}))
        raise InputError(f"torch.compile(backend='thresher') has no option {unknown[0]!r}; its options: {known}")
    return _Graph(module, settings, fallback)


def built() -> list[Compiled]:
    """Return the compiled graphs that are remembered, the latest last: for their reports."""
    return list(_CACHE.values())


def clear() -> None:
    """Forget all compiled graphs. ``torch._dynamo.reset()`` does so, too."""
    _CACHE.clear()


thresher_backend.reset = clear  # type: ignore[attr-defined]


def identity(item: str | Pass) -> str:
    """Return a text that stands for a pass: where it is defined, its options and its source. A pass that was edited is another one."""
    instance = make_pass(item)
    cls = type(instance)
    try:
        source = inspect.getsource(cls)
    except (OSError, TypeError):  # it was typed in
        source = str(id(cls))
    return f"{cls.__module__}.{cls.__qualname__} {instance!r} {hashlib.sha256(source.encode()).hexdigest()}"


class _Graph:
    """One graph of Dynamo's, built for each combination of shapes that it is called with."""

    def __init__(self, module: fx.GraphModule, settings: dict[str, Any], fallback: bool):
        self.module, self.settings, self.fallback = module, settings, fallback
        placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
        self.state = [i for i, n in enumerate(placeholders) if _is_state(n)]
        self.inputs = [i for i in range(len(placeholders)) if i not in self.state]
        self.numbers = [i for i in self.inputs if any(map(_is_number, placeholders[i].users))]
        self.outputs = _depending(module.graph, [placeholders[i] for i in self.inputs if i not in self.numbers])
        self.runs: dict[Any, Callable[..., Any]] = {}
        self.last_state: Any = None

    def __call__(self, *args: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            _warn_once("a gradient is asked for: thresher compiles for inference, under torch.no_grad()")
            return self.module(*args)
        state = tuple((id(args[i]), _version(args[i])) for i in self.state)
        if state != self.last_state:
            self.runs.clear()
            self.last_state = state
        key = tuple(_kind(args[i].item() if i in self.numbers else args[i]) for i in self.inputs)
        if key not in self.runs:
            with torch.inference_mode(False), torch.no_grad():
                self.runs[key] = self.build(args)
        return self.runs[key](*args)

    def build(self, args: Sequence[Any]) -> Callable[..., Any]:
        if not any(self.outputs) or not any(isinstance(args[i], Tensor) for i in self.inputs):
            return self.module
        examples = [_plain(args[i]) for i in self.inputs]
        model = _bound(self.module, args, self.state, self.outputs)
        try:
            compiled = _remembered(model, examples, self.settings)
        except (CaptureError, BackendError) as error:
            if not self.fallback:
                raise
            calls = sum(n.op.startswith("call") for n in self.module.graph.nodes)
            warnings.warn(f"a graph of {calls} calls runs in eager mode: {error}", stacklevel=2)
            return self.module
        constants = [] if all(self.outputs) else self.module(*args)  # results that depend on no input: computed once

        def run(*args: Any) -> Any:
            results = iter(compiled(*(args[i] for i in self.inputs)))
            return [next(results) if depends else constants[k] for k, depends in enumerate(self.outputs)]

        return run


def _remembered(model: fx.GraphModule, args: Sequence[Any], settings: dict[str, Any]) -> Compiled:
    """Return what was built before from the same graph, numbers, shapes and passes, or build it now."""
    settings = dict(settings)
    device = next(a.device for a in args if isinstance(a, Tensor))
    if device.type == "cpu":
        settings.setdefault("target", "cpu")
    if "calibration" in settings:  # what samples make of a model is not known by a key
        return compile_model(model, tuple(args), **settings)
    passes = [identity(p) for p in pipelines.resolve(settings.get("passes", "exact"))]
    digest = hashlib.sha256(repr((model.code, [_kind(a) for a in args], passes)).encode())
    digest.update(repr(sorted((k, v) for k, v in settings.items() if k != "passes")).encode())
    for value in [*model.parameters(), *model.buffers()]:
        digest.update(repr(_kind(value)).encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    key = digest.hexdigest()
    if key not in _CACHE:
        _CACHE[key] = compile_model(model, tuple(args), **settings)
        while len(_CACHE) > MAX_REMEMBERED:
            _CACHE.popitem(last=False)
    _CACHE.move_to_end(key)
    return _CACHE[key]


def _bound(
    module: fx.GraphModule, args: Sequence[Any], state: Sequence[int], outputs: Sequence[bool]
) -> fx.GraphModule:
    """Return the graph with parameters and buffers as its own, numbers as they are now, and the outputs that depend on an input."""
    graph, root = fx.Graph(), nn.Module()
    mapping: dict[fx.Node, Any] = {}
    for name, child in module.named_children():
        root.add_module(name, child)
    for name, value in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
        root.register_buffer(name, value.detach())
    placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
    for index, (node, value) in enumerate(zip(placeholders, args)):
        if index in state:
            name = f"{_name(node)}_{index}" if hasattr(root, _name(node)) else _name(node)
            if isinstance(value, nn.Parameter):
                root.register_parameter(name, nn.Parameter(value.detach(), value.is_floating_point()))
            else:
                root.register_buffer(name, value.detach())
            mapping[node] = graph.get_attr(name)
        else:
            mapping[node] = graph.node_copy(node)
    values = dict(zip(placeholders, args))
    for node in module.graph.nodes:
        if node.op == "output":
            results = [v for v, depends in zip(node.args[0], outputs) if depends]
            graph.output(tuple(fx.map_arg(results, lambda n: mapping[n])))
        elif _is_number(node):
            mapping[node] = values[node.args[0]].item()
        elif node.op != "placeholder":
            mapping[node] = graph.node_copy(node, lambda n: mapping[n])
    graph.eliminate_dead_code()
    return fx.GraphModule(root, graph).eval()


def _name(node: fx.Node) -> str:
    """``l_self_modules_layers_modules_0_parameters_weight_`` -> ``layers_0_weight``"""
    path = re.sub(r"_(modules|parameters|buffers)_", "_", node.name.strip("_"))
    return re.sub(r"^l_(self|fn)_", "", path)


def _is_number(node: fx.Node) -> bool:
    """Dynamo passes some numbers of Python's (an epsilon) as tensors, to build once for all of their values."""
    return node.op == "call_method" and node.target == "item" and node.args[0].op == "placeholder"


def _is_state(node: fx.Node) -> bool:
    """Return whether an input of Dynamo's is a parameter or a buffer of a module, by where it says that it comes from."""
    argument = node.meta.get("grapharg")
    source = getattr(argument, "source", None)
    while source is not None:
        if type(source).__name__ == "UnspecializedParamBufferSource":
            return True
        source = getattr(source, "base", None)
    return False


def _depending(graph: fx.Graph, inputs: Sequence[fx.Node]) -> list[bool]:
    """Return, for each output, whether it depends on one of the inputs."""
    moved = set(inputs)
    for node in graph.nodes:
        if any(n in moved for n in node.all_input_nodes):
            moved.add(node)
    output = next(n for n in reversed(graph.nodes) if n.op == "output")
    return [isinstance(v, fx.Node) and v in moved for v in output.args[0]]


def _version(value: Tensor) -> int:
    return 0 if value.is_inference() else value._version


def _kind(value: Any) -> Any:
    return (tuple(value.shape), value.dtype, value.device) if isinstance(value, Tensor) else (type(value), value)


def _plain(value: Any) -> Any:
    """An example that torch.export takes: no inference tensor, no part of a graph of gradients."""
    return value.detach().clone() if isinstance(value, Tensor) else value


_WARNED: set[str] = set()


def _warn_once(message: str) -> None:
    if message not in _WARNED:
        _WARNED.add(message)
        warnings.warn(message, stacklevel=3)
