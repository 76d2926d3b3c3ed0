"""The way back: the original-shape ``state_dict`` from a small module, so that users fold, fine-tune, unfold, and go on.

A pass that makes new constants from old ones leaves a :class:`Restore`, which gives the old ones back from the new ones: what was cut
comes back from the original, what was scaled is divided again. Undone in reverse order they lead from the constants of the small
program to those of the model as it was captured. A parameter that changed and has no way back is an error that names it, never a
silent loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from thresher.errors import ProgramError

Values = dict[str, Tensor]
ROUNDING = (
    1e-5  # relative: a pass computes a constant, and its way back the parameter, in float64; they are stored in float32
)


class TrainedApart(ProgramError):
    """A parameter of the original model stands in several constants, and training has made them differ."""

    def __init__(self, name: str, constants: tuple[str, ...]):
        super().__init__(
            f"copies of {name} were trained apart (one of them in {', '.join(constants)}); freeze them before training"
        )


@dataclass(frozen=True)
class Restore:
    """A step of the way back: ``back(values)`` gives the constants from which those named ``constants`` were computed.

    ``fixed``: constants that they were computed from, too, as they were then, and that the step does not give back.
    """

    constants: tuple[str, ...]
    back: Callable[[Values], Values]
    fixed: Mapping[str, Tensor] = field(default_factory=dict)


def moved(new: str, old: str, original: Tensor, move: Callable[[Tensor], Tensor]) -> Restore:
    """Return the step back for a constant ``new`` that holds some elements of ``old`` at other indices.

    ``move`` is what was done to ``old``. The elements that ``new`` does not hold come from ``original``.
    """

    def back(values: Values) -> Values:
        index = move(torch.arange(original.numel()).reshape(original.shape)).reshape(-1)
        so_far = values.get(old, original) if old != new else original  # other parts of it may be back already
        full = so_far.clone().reshape(-1).to(values[new].dtype)
        full[index] = values[new].reshape(-1)
        if not torch.equal(full[index], values[new].reshape(-1)):
            raise TrainedApart(old, (new,))
        return {old: full.reshape(original.shape)}

    return Restore((new,), back)


def computed(new: str, sources: Mapping[str, Tensor]) -> Restore:
    """Return the step back for a constant ``new`` that was computed from the constants ``sources``, which it does not give back."""
    return Restore((new,), lambda values: {}, sources)


def unfold(original: Mapping[str, Tensor], lineage: Iterable[Restore], initial: Values, current: Values) -> Values:
    """Return the state of the original model: ``original`` with the values of ``current``, the constants of the small program.

    ``initial`` are these constants when the program was made.

    Raises:
        TrainedApart: a parameter of the original stands in two constants, which differ; or in one that was computed from it as it was.
        ProgramError: naming the constants that changed since and have no way back to the original's parameters.
    """
    values = dict(current)
    covered: dict[str, Tensor] = {}  # which elements of a value that came back stand in the small program; default: all
    open_ends = {name for name, value in current.items() if not torch.equal(value, initial[name])}
    fixed: list[Restore] = []  # steps that are undone, and whose sources must be as they were
    for restore in reversed(list(lineage)):
        if not all(name in values for name in restore.constants):
            continue
        _check_fixed(fixed, {name: values[name] for name in restore.constants})
        fixed.append(restore)
        restored, stands = restore.back(values), _covered(restore, values)
        touched = open_ends & set(restore.constants)
        for name in restore.constants:
            values.pop(name)
            covered.pop(name, None)
        for name, mask in stands.items():
            if name in values:
                mask_before = covered.get(name, torch.ones_like(mask))
                if _apart(values[name], restored[name], mask & mask_before):
                    raise TrainedApart(name, restore.constants)
                mask = mask | mask_before
            covered[name] = mask
        if restored:
            open_ends -= touched
        values |= restored
        open_ends |= set(restored) if touched else set()
    _check_fixed(fixed, values)
    if lost := sorted(open_ends - original.keys()):
        raise ProgramError(
            f"these parameters changed, but nothing in the original model corresponds to them: {', '.join(lost[:5])}; "
            "freeze them (requires_grad_(False)) before training, or give the layer a bias before folding"
        )
    return {
        name: values[name].to(tensor.dtype).reshape(tensor.shape) if name in values else tensor.clone()
        for name, tensor in original.items()
    }


def _check_fixed(steps: Iterable[Restore], values: Values) -> None:
    """Raise :class:`TrainedApart` where one of ``values`` is not what the constants of a step were computed from."""
    for step in steps:
        for name, before in step.fixed.items():
            if name in values and _apart(before, values[name], torch.ones_like(before, dtype=torch.bool)):
                raise TrainedApart(name, step.constants)


def _covered(restore: Restore, values: Values) -> dict[str, Tensor]:
    """Return which elements of what comes back are computed from the constants of the step: infinity there reaches these elements."""
    numbers = {name: values[name] for name in restore.constants if values[name].is_floating_point()}
    marked = restore.back({**values, **{name: torch.full_like(value, torch.inf) for name, value in numbers.items()}})
    return {name: ~value.isfinite() for name, value in marked.items() if value.is_floating_point()}


def _apart(a: Tensor, b: Tensor, where: Tensor) -> bool:
    """Return whether two versions of a parameter differ by more than the rounding of what was computed from it."""
    a, b = a.double()[where], b.double()[where]
    return bool((a - b).abs().max() > ROUNDING * a.abs().max()) if a.numel() else False
