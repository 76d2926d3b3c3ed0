"""Folded widths as a Hugging Face config, where the architecture has fields for them.

A config has one number for all layers. Where every layer lost the same number of hidden units, that number can be written, and the
folded weights load into the architecture's own class; where layers differ, or a width without a field shrank, a sentence says so.
"""

from __future__ import annotations

import copy
from typing import Any

from thresher.ir.folded_module import FoldedModule
from thresher.ir.program import Role

FIELDS = ("intermediate_size", "ffn_dim", "n_inner", "hidden_dim", "encoder_ffn_dim", "decoder_ffn_dim", "hidden_size")


def folded_config(config: Any, small: FoldedModule) -> tuple[Any, list[str]]:
    """Return a copy of ``config`` with the widths of ``small``, and a sentence for each width that it cannot express.

    With no sentences, ``type(model)(config)`` has the shapes of ``small.program.constants``, under the same names.
    """
    config, state, problems = copy.deepcopy(config), small.program.original.state, []
    changed: dict[int, set[tuple[str, int]]] = {}
    for name, tensor in small.program.constants.items():
        if name not in state:
            continue
        for before, after in zip(state[name].shape, tensor.shape):
            changed.setdefault(int(before), set()).add((name, int(after)))
    handled: set[int] = set()
    for field in FIELDS:
        value = getattr(config, field, None)
        widths = {after for _, after in changed.get(value, ())} if isinstance(value, int) else set()
        if not widths or widths == {value}:
            continue
        if len(widths) == 1 and value not in handled:
            setattr(config, field, widths.pop())
        else:
            problems.append(
                f"{field} = {value}: layers now have {', '.join(map(str, sorted(widths)))}; the config has one number"
            )
        handled.add(int(value))  # type: ignore[arg-type]
    for before, tensors in changed.items():
        other = sorted(name for name, after in tensors if after != before)
        if other and before not in handled:
            problems.append(f"{other[0]}: a dimension of {before} shrank, and the config has no field for it")
    program = small.program
    missing = sorted(n for n in program.constants if n not in state and program.role(n) is not Role.BUFFER)
    problems += [f"{name}: a parameter that the architecture does not have" for name in missing]
    return config, problems
