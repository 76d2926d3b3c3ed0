"""Write the pages that are made from the code: docs/passes.md and docs/operators.md.

python docs/generate.py [--check]        --check: only say whether they are what they should be
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path

from thresher.analysis.slices.operators import TABLE
from thresher.backends.tvm.importing.converters import registry
from thresher.ir.printer import operator_name
from thresher.passes import pipelines
from thresher.rewriting.contract import Pass
from thresher.rewriting.registry import registered_passes

HERE = Path(__file__).parent
STAGES = {
    "canonicalize": "One spelling for each thing", "fold": "What pruning left behind", "attention": "Cheaper attention",
    "tokens": "Fewer tokens", "layers": "Fewer layers", "sparsity": "Zeros", "specialize": "The form that runs best",
}  # fmt: skip


def passes() -> str:
    """Every built-in pass, by the folder of its stage: what its module says, and its options."""
    lines = [
        "# Passes",
        "",
        "Made from the code by `python docs/generate.py`. `thresher passes NAME` says the same.",
        "",
    ]
    for name, members in pipelines.NAMED.items():
        lines.append(f"* `{name}`: {', '.join(f'[{p.name}](#{p.name})' for p in members) or 'nothing'}")
    for stage, title in STAGES.items():
        lines += ["", f"## {title}"]
        for cls in registered_passes().values():
            if cls.__module__.startswith(f"thresher.passes.{stage}."):
                lines += ["", *_pass(cls)]
    return "\n".join(lines) + "\n"


def _pass(cls: type[Pass]) -> Iterator[str]:
    kind = {"exact": "Exact.", "approximate": "Approximate: needs calibration samples and a budget."}[cls.kind]
    yield from (f"### {cls.name}", "", kind, "")
    for paragraph in (inspect.getdoc(sys.modules[cls.__module__]) or "").split("\n\n"):
        listing = any(line.startswith("    ") for line in paragraph.splitlines())
        yield from (["```text", *paragraph.splitlines(), "```", ""] if listing else [*paragraph.splitlines(), ""])
    if fields := dataclasses.fields(cls):
        yield from ("| option | default |", "|---|---|", *(f"| `{f.name}` | `{f.default}` |" for f in fields), "")
    if cls.requires:
        yield f"Runs after {', '.join(f'`{r}`' for r in cls.requires)}."


def operators() -> str:
    """What folds through an operator, and how it is lowered."""
    known = {*TABLE, *registry.SEMANTICS, *registry.CPU_KERNELS}
    lines = [
        "# Operators", "",
        "Made from the code by `python docs/generate.py`. *Folds*: the rule by which dead channels pass through the operator.",
        "*Executable*: by a kernel of ours (CPU, float32, fixed shapes), by a converter of ours (all targets), or by TVM's own.", "",
        "| operator | folds | lowered |", "|---|---|---|",
    ]  # fmt: skip
    for target in sorted(known, key=operator_name):
        row = type(TABLE[target]).__name__ if target in TABLE else ""
        ours = [w for w, t in (("kernel", registry.CPU_KERNELS), ("converter", registry.SEMANTICS)) if target in t]
        lines.append(f"| `{operator_name(target)}` | {row} | {', '.join(ours) or 'by TVM'} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    wrong = []
    for name, text in (("passes.md", passes()), ("operators.md", operators())):
        if "--check" in sys.argv:
            wrong += [name] if (HERE / name).read_text() != text else []
        else:
            (HERE / name).write_text(text)
    if wrong:
        print(f"out of date: {', '.join(wrong)}; run python docs/generate.py")
    return len(wrong)


if __name__ == "__main__":
    sys.exit(main())
