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
from thresher.frontend.functional_graph import FunctionalGraph, functionalize, rows_of, views
from thresher.ir.program import Program
from thresher.passes import pipelines
from thresher.rewriting.contract import Pass
from thresher.rewriting.registry import make_pass

#: What ``options=`` may say: the arguments of thresher.compile() that describe how to build, and ``fallback``.
OPTIONS = {f.name for f in dataclasses.fields(CompileOptions)} - {"masks", "fixed", "certificate", "dynamic_shapes"}
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
    """One functional graph, built when it is called first, and again for other constants: Dynamo hands modules of one kind to one graph."""

    def __init__(self, graph: FunctionalGraph, settings: dict[str, Any], fallback: bool):
        self.graph, self.settings, self.fallback = graph, settings, fallback
        self.constants = set(graph.constants)
        self.free = any(isinstance(n.meta["val"], torch.SymInt) for n in graph.placeholders)
        self.loose = graph.loose_numbers(self.constants)
        self.modules: OrderedDict[Any, _Builds] = OrderedDict()

    def __call__(self, *args: Any) -> Any:
        if self.free and any(args[i] < 0 for i in self.loose):
            return self.graph.module(*args)  # no array has so many rows
        builds = self.modules.get(self._identity(args))
        if builds is None:
            builds = self._builds_for(args)
        run = builds.runs.get(self._sizes(args))
        if run is None:
            with torch.inference_mode(False), torch.no_grad():
                run = self._build(args, len(builds.runs))
            if not self.free:  # by now it may be known that sizes do not stay free
                builds.runs.pop(None, None)
            builds.runs[self._sizes(args)] = run
        return run(*args)

    def _identity(self, args: Sequence[Any]) -> Any:
        """Return a key of the constants that are handed in: the same tensors, not written since."""
        return tuple([_stamp(args[i]) for i in self.constants])

    def _builds_for(self, args: Sequence[Any]) -> _Builds:
        """Return an entry for constants that are new. A buffer that changes between calls is an input from then on."""
        parameters = {i for i in self.constants if isinstance(args[i], nn.Parameter)}
        for key, builds in list(self.modules.items()):
            changed = {i for i in self.constants if builds.stamps[i] != _stamp(args[i])}
            if changed and not changed & parameters:
                self.constants -= changed
                self.loose = self.graph.loose_numbers(self.constants)
                self.modules.clear()
                break
            if any(builds.tensors[i] is args[i] for i in changed):  # written: what it was does not come back
                del self.modules[key]
        while len(self.modules) >= MAX_REMEMBERED:
            self.modules.popitem(last=False)
        tensors = {i: args[i] for i in self.constants}
        builds = _Builds(tensors, {i: _stamp(t) for i, t in tensors.items()})
        self.modules[self._identity(args)] = builds
        return builds

    def _sizes(self, args: Sequence[Any]) -> Any:
        """Return the sizes and numbers that a build is for; None where it is for any."""
        if self.free:
            return None
        inputs = self.graph.inputs(self.constants)
        return tuple(tuple(args[i].shape) for i in inputs), tuple(args[i] for i in sorted(self.graph.numbers))

    def _build(self, args: Sequence[Any], others: int) -> Callable[..., Any]:
        """Return what computes the graph for ``args``, of which there are ``others`` for the same constants."""
        outputs = self.graph.depending(self.constants)
        if not outputs or not self.graph.inputs(self.constants):
            return self.graph.module
        results = list(dict.fromkeys(self.graph.memory_of(outputs)))
        try:
            if not self.free and others >= MAX_SIZES:
                raise CaptureError(f"it is called with more than {MAX_SIZES} sizes, which cannot stay free")
            compiled = self._compiled(args, results)
        except (CaptureError, BackendError) as error:
            if not self.fallback:
                raise
            return self._as_it_is(str(error))
        loose = self.loose if self.free else []
        return _Run(compiled, self.graph, self.graph.inputs(self.constants), loose, outputs, results, args)

    def _compiled(self, args: Sequence[Any], results: Sequence[fx.Node]) -> Compiled:
        """Return the compiled graph: with free sizes where it has some and that can be, else for the sizes of ``args``."""
        if self.free:
            try:
                return _remembered(self.graph.program(args, self.constants, results, free=True), self.settings)
            except (CaptureError, BackendError):
                self.free = False
        return _remembered(self.graph.program(args, self.constants, results, free=False), self.settings)

    def _as_it_is(self, reason: str) -> Callable[..., Any]:
        calls = sum(n.op == "call_function" for n in self.graph.module.graph.nodes)
        warnings.warn(f"a graph of {calls} calls runs in eager mode: {reason}", stacklevel=2)
        return self.graph.module


@dataclasses.dataclass
class _Builds:
    """What was built for some constants: these ``tensors`` (an id is only good while its tensor lives), with their ``stamps``."""

    tensors: dict[int, Tensor]
    stamps: dict[int, tuple[int, int, int]]
    runs: dict[Any, Callable[..., Any]] = dataclasses.field(default_factory=dict)


class _Run:
    """A compiled graph, called like the functional one.

    Results that depend on no input are those of a run by torch; results that share memory are torch's views of one compiled result.
    """

    def __init__(
        self,
        compiled: Compiled,
        graph: FunctionalGraph,
        inputs: Sequence[int],
        loose: Sequence[int],
        outputs: Sequence[int],
        results: Sequence[fx.Node],
        args: Sequence[Any],
    ):
        self.compiled, self.graph, self.inputs, self.outputs = compiled, graph, list(inputs), list(outputs)
        self.loose = list(loose)
        self.count = len(graph.outputs)
        self.constant = [i for i in range(self.count) if i not in set(outputs)]
        self.values = self._constant_results(args)
        wanted = [graph.outputs[i] for i in outputs]
        self.views = None
        if wanted != list(results):
            self.views, sizes = views(results, wanted)
            self.sizes = [graph.placeholders.index(n) for n in sizes]

    def __call__(self, *args: Any) -> list[Any]:
        results: list[Any] = [None] * self.count
        computed = self.compiled(*(args[i] for i in self.inputs), *(rows_of(args[i]) for i in self.loose))
        if self.views is not None:
            computed = self.views(*computed, *(args[i] for i in self.sizes))
        for i, value in zip(self.outputs, computed):
            results[i] = value
        if any(_version(value) != version for value, version in self.values):  # somebody wrote them
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


def _stamp(tensor: Tensor) -> tuple[int, int, int]:
    """Return what is another one for another tensor, and after each write."""
    return id(tensor), _version(tensor), tensor.data_ptr()


_WARNED: set[str] = set()


def _warn_once(message: str) -> None:
    if message not in _WARNED:
        _WARNED.add(message)
        warnings.warn(message, stacklevel=3)
