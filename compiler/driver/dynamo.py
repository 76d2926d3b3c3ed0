"""``torch.compile(model, backend="thresher")``: what Dynamo finds between two graph breaks is compiled like any model.

    compiled = torch.compile(model, backend="thresher", options={"passes": ["exact"], "validate": "warn"})
    with torch.no_grad():
        y = compiled(x)

Dynamo hands over a graph whose inputs are the user's tensors and the parameters and buffers of the modules. AOTAutograd makes it
functional: it is torch that writes into inputs and buffers, and that makes the views which the user gets. Parameters, and buffers that
the graph does not write, are taken as the constants that they are, so pruned channels fold; a graph is built again when one has changed.
A graph with free sizes is built once, for any of them; only where that cannot be, for each of a few sizes. Training stays Dynamo's:
where a gradient is asked for, the graph runs as it is. What cannot be captured or lowered runs as it is, too, with a warning that says
why; a *wrong* result raises, as everywhere.
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
from torch._dynamo.exc import RestartAnalysis, TensorifyScalarRestartAnalysis

from thresher.artifact.compiled import Compiled
from thresher.driver.compile import run_stages
from thresher.driver.options import CompileOptions
from thresher.driver.session import open_session
from thresher.driver.stages import Captured
from thresher.errors import BackendError, CaptureError, InputError
from thresher.frontend.functional_graph import FunctionalGraph, functionalize
from thresher.ir.program import Program
from thresher.passes import pipelines
from thresher.rewriting.contract import Pass
from thresher.rewriting.registry import make_pass

#: What ``options=`` may say: the arguments of thresher.compile() that describe how to build, and ``fallback``.
OPTIONS = {f.name for f in dataclasses.fields(CompileOptions)} - {"masks", "certificate", "dynamic_shapes"}
MAX_REMEMBERED = 32  # compiled graphs
MAX_SIZES = 8  # that one graph is built for where its free sizes cannot stay free

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
    if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in inputs):
        _warn_once("a gradient is asked for: thresher compiles for inference, under torch.no_grad()")
        return module
    placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
    names, parameters = [_name(n) for n in placeholders], {i for i, n in enumerate(placeholders) if _is_state(n)}

    def build(graph: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        return _Graph(FunctionalGraph.of(graph, names, parameters), settings, fallback)

    try:
        return functionalize(module, inputs, build)
    except (RestartAnalysis, TensorifyScalarRestartAnalysis):  # Dynamo's own affair
        raise
    except Exception as error:
        message = f"torch cannot make a graph functional: {str(error).strip()[:500]}"
        if not fallback:
            raise CaptureError(message) from error
        warnings.warn(f"a graph of {len(module.graph.nodes)} nodes runs in eager mode: {message}", stacklevel=2)
        return module


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
    """One functional graph, built when it is called first, and again for other constants."""

    def __init__(self, graph: FunctionalGraph, settings: dict[str, Any], fallback: bool):
        self.graph, self.settings, self.fallback = graph, settings, fallback
        self.constants = set(graph.constants)
        self.free = any(isinstance(n.meta["val"], torch.SymInt) for n in graph.placeholders)
        self.runs: dict[Any, Callable[..., Any]] = {}
        self.seen: dict[int, tuple[Tensor, int, int]] = {}

    def __call__(self, *args: Any) -> Any:
        self._forget_changed(args)
        run = self.runs.get(self._key(args))
        if run is None:
            with torch.inference_mode(False), torch.no_grad():
                run = self._build(args)
            self.runs[self._key(args)] = run  # by then it may be known that sizes do not stay free
        return run(*args)

    def _forget_changed(self, args: Sequence[Any]) -> None:
        """Drop what was built for constants that are others now. A buffer that changes between calls is an input from then on."""
        seen = {i: (args[i], _version(args[i]), args[i].data_ptr()) for i in self.constants}
        changed = [
            i for i, (tensor, *rest) in seen.items() if i in self.seen and not _same(self.seen[i], (tensor, *rest))
        ]
        if changed:
            self.runs.clear()
            self.constants -= {i for i in changed if not isinstance(args[i], nn.Parameter)}
        self.seen = seen  # the tensors, too: an id is only good while its tensor lives

    def _key(self, args: Sequence[Any]) -> Any:
        """Return the sizes and numbers that a build is for; None where it is for any."""
        if self.free:
            return None
        inputs = self.graph.inputs(self.constants)
        return tuple(tuple(args[i].shape) for i in inputs), tuple(args[i] for i in sorted(self.graph.numbers))

    def _build(self, args: Sequence[Any]) -> Callable[..., Any]:
        outputs = self.graph.depending(self.constants)
        if not outputs or not self.graph.inputs(self.constants):
            return self.graph.module
        if not self.free and len(self.runs) >= MAX_SIZES:
            return self._as_it_is(f"it is called with more than {MAX_SIZES} sizes")
        try:
            compiled = self._compiled(args, outputs)
        except (CaptureError, BackendError) as error:
            if not self.fallback:
                raise
            return self._as_it_is(str(error))
        return _Run(compiled, self.graph, self.graph.inputs(self.constants), outputs, args)

    def _compiled(self, args: Sequence[Any], outputs: Sequence[int]) -> Compiled:
        """Return the compiled graph: with free sizes where it has some and that can be, else for the sizes of ``args``."""
        if self.free:
            try:
                return _remembered(self.graph.program(args, self.constants, outputs, free=True), self.settings)
            except (CaptureError, BackendError):
                self.free = False
                self.runs.clear()
        return _remembered(self.graph.program(args, self.constants, outputs, free=False), self.settings)

    def _as_it_is(self, reason: str) -> Callable[..., Any]:
        calls = sum(n.op == "call_function" for n in self.graph.module.graph.nodes)
        warnings.warn(f"a graph of {calls} calls runs in eager mode: {reason}", stacklevel=2)
        return self.graph.module


class _Run:
    """A compiled graph, called like the functional one: results that depend on no input are those of a run by torch."""

    def __init__(
        self,
        compiled: Compiled,
        graph: FunctionalGraph,
        inputs: Sequence[int],
        outputs: Sequence[int],
        args: Sequence[Any],
    ):
        self.compiled, self.graph, self.inputs, self.outputs = compiled, graph, list(inputs), list(outputs)
        self.count = len(graph.outputs)
        self.constant = [i for i in range(self.count) if i not in set(outputs)]
        self.values = self._constant_results(args)

    def __call__(self, *args: Any) -> list[Any]:
        results: list[Any] = [None] * self.count
        for i, value in zip(self.outputs, self.compiled(*(args[i] for i in self.inputs))):
            results[i] = value
        if any(_written(value, version) for value, version in self.values):
            self.values = self._constant_results(args)
        for i, (value, _) in zip(self.constant, self.values):
            results[i] = value
        return results

    def _constant_results(self, args: Sequence[Any]) -> list[tuple[Any, int]]:
        if not self.constant:
            return []
        with torch.no_grad():
            results = self.graph.module(*args)
        return [(results[i], _version(results[i])) for i in self.constant]


def _remembered(program: Program, settings: dict[str, Any]) -> Compiled:
    """Return what was built before from the same graph, numbers, shapes and passes, or build it now."""
    settings = dict(settings)
    if next(v.device for v in program.probe if isinstance(v, Tensor)).type == "cpu":
        settings.setdefault("target", "cpu")
    options = CompileOptions.of(settings)
    if "calibration" in settings:  # what samples make of a model is not known by a key
        return _compile(program, options)
    passes = [identity(p) for p in pipelines.resolve(settings.get("passes", "exact"))]
    digest = hashlib.sha256(repr((program.text(), passes)).encode())
    digest.update(repr(sorted((k, v) for k, v in settings.items() if k != "passes")).encode())
    for name, value in program.constants.items():
        digest.update(repr((name, program.role(name), _kind(value))).encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    key = digest.hexdigest()
    if key not in _CACHE:
        _CACHE[key] = _compile(program, options)
        while len(_CACHE) > MAX_REMEMBERED:
            _CACHE.popitem(last=False)
    _CACHE.move_to_end(key)
    return _CACHE[key]


def _compile(program: Program, options: CompileOptions) -> Compiled:
    """Return the compiled program; its reference is itself, run by torch."""
    with open_session(options) as session:
        return run_stages(Captured(program, None, session.machine), options, session)


def _name(node: fx.Node) -> str:
    """``l_self_modules_layers_modules_0_parameters_weight_`` -> ``layers_0_weight``"""
    path = re.sub(r"_(modules|parameters|buffers)_", "_", node.name.strip("_"))
    return re.sub(r"^l_(self|fn)_", "", path)


def _is_state(node: fx.Node) -> bool:
    """Return whether an input of Dynamo's is a parameter or a buffer of a module, by where it says that it comes from."""
    argument = node.meta.get("grapharg")
    source = getattr(argument, "source", None)
    while source is not None:
        if type(source).__name__ == "UnspecializedParamBufferSource":
            return True
        source = getattr(source, "base", None)
    return False


def _version(value: Any) -> int:
    return value._version if isinstance(value, Tensor) and not value.is_inference() else 0


def _kind(value: Any) -> Any:
    return (tuple(value.shape), value.dtype, value.device) if isinstance(value, Tensor) else (type(value), value)


def _same(a: tuple[Tensor, int, int], b: tuple[Tensor, int, int]) -> bool:
    return a[0] is b[0] and a[1:] == b[1:]


def _written(value: Any, version: int) -> bool:
    """Return whether a result has been written since it was computed."""
    return _version(value) != version


_WARNED: set[str] = set()


def _warn_once(message: str) -> None:
    if message not in _WARNED:
        _WARNED.add(message)
        warnings.warn(message, stacklevel=3)
