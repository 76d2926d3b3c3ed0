"""Write the pages that are made from the code: passes.md, operators.md, architecture.svg, and the lines of imports in architecture.md.

python docs/generate.py [--check]        --check: only compare them with what they should be
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

from figure import Label, draw
from rooms import rooms

from thresher.analysis.slices.operators import TABLE
from thresher.backends.tvm.importing.converters import registry
from thresher.ir.printer import operator_name
from thresher.passes import pipelines
from thresher.rewriting.contract import Pass
from thresher.rewriting.options import write_options
from thresher.rewriting.registry import registered_passes

HERE = Path(__file__).parent
STAGES = {
    "canonicalize": "Canonicalize: one form for each operation",
    "fold": "Fold: what pruning left is removed",
    "attention": "Attention",
    "tokens": "Tokens",
    "layers": "Layers",
    "sparsity": "Zeros",
    "specialize": "Specialize: the form that runs best",
}


def passes() -> str:
    """Return a page of every built-in pass, by the folder of its stage: the docstring of its module, and its options."""
    lines = [
        "# Passes",
        "",
        "Made from the code by `python docs/generate.py`. `thresher passes NAME` prints the same. These names stand for several passes:",
        "",
    ]
    for name, members in pipelines.NAMED.items():
        lines.append(f"* `{name}`: {', '.join(f'[{p.name}](#{p.name})' for p in members) or 'no passes'}")
    for stage, title in STAGES.items():
        lines += ["", f"## {title}"]
        for cls in registered_passes().values():
            if cls.__module__.startswith(f"thresher.passes.{stage}."):
                lines += ["", *_pass(cls)]
    return "\n".join(lines) + "\n"


def _pass(cls: type[Pass]) -> Iterator[str]:
    kind = {"exact": "Exact.", "approximate": "Approximate: it needs calibration samples and a budget."}[cls.kind]
    after = f" Runs after {', '.join(f'[{r}](#{r})' for r in cls.requires)}." if cls.requires else ""
    yield from (f"### {cls.name}", "", f"*{kind}*{after}")
    for paragraph in (inspect.getdoc(sys.modules[cls.__module__]) or "").split("\n\n"):
        listing = any(line.startswith("    ") for line in paragraph.splitlines())
        lines = paragraph.replace("``", "`").splitlines()
        yield from ("", "```text", *inspect.cleandoc(paragraph).splitlines(), "```") if listing else ("", *lines)
    if fields := dataclasses.fields(cls):
        comments = _comments(cls)
        yield from ("", "| option | default | |", "|---|---|---|")
        for f in fields:
            default = write_options({f.name: f.default}).strip("{}").partition("=")[2]
            yield f"| `{f.name}` | `{default}` | {comments.get(f.name, '')} |"


def _comments(cls: type[Pass]) -> dict[str, str]:
    """Return the comment of each field of a class: the one at the end of its line, or the one on the line before it."""
    source = inspect.getsource(cls)
    tokens = [t for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type == tokenize.COMMENT]
    after = {t.start[0]: t.string for t in tokens if not t.line.strip().startswith("#")}
    before = {t.start[0] + 1: t.string for t in tokens if t.line.strip().startswith("#")}
    fields = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.AnnAssign)]
    comments = {ast.unparse(n.target): after.get(n.end_lineno or 0, before.get(n.lineno, "")) for n in fields}
    return {name: text.lstrip("#: ").replace("``", "`").replace("|", "\\|") for name, text in comments.items()}


def operators() -> str:
    """Return a page of all operators: what folds through each, and how it is lowered."""
    lines = [
        "# Operators",
        "",
        "Made from the code by `python docs/generate.py`. *Rule* is the transfer rule by which facts about channels pass through the "
        "operator; no channel is removed through an operator without one. *Lowered* says how the operator becomes code: by a *kernel* "
        "of ours (CPU, float32, fixed shapes), by a *converter* of ours (all targets), or by the converter of TVM. An operator with "
        "both has the kernel where it fits.",
        "",
        "| operator | overloads | rule | lowered |",
        "|---|---|---|---|",
    ]
    rows: dict[tuple[str, str, str], list[str]] = {}
    for target in {*TABLE, *registry.SEMANTICS, *registry.CPU_KERNELS}:
        name, _, overload = operator_name(target).rpartition(".")
        if not name or "Tensor" not in str(target._schema):  # ours alone, or of numbers
            continue
        rule = type(TABLE[target]).__name__ if target in TABLE else ""
        tables = (("kernel", registry.CPU_KERNELS), ("converter", registry.SEMANTICS))
        lowered = ", ".join(kind for kind, table in tables if target in table) or "by TVM"
        rows.setdefault((name, rule, lowered), []).append(overload)
    for (name, rule, lowered), overloads in sorted(rows.items()):
        lines.append(f"| `{name}` | {' '.join(sorted(overloads))} | {rule} | {lowered} |")
    return "\n".join(lines) + "\n"


def architecture() -> str:
    """Return architecture.md with the imports of each room in the line for them."""
    graph, room, lines = rooms(), "", []
    for line in (HERE / "architecture.md").read_text().splitlines():
        if heading := re.match(r"#### (\w+): ", line):
            room = heading[1]
        if line.startswith("*Imports*:"):
            below = sorted(graph.successors(room))
            line = f"*Imports*: {', '.join(f'`{name}`' for name in below) or 'nothing'}."
        lines.append(line)
    return "\n".join(lines) + "\n"


def labels() -> dict[str, Label]:
    """Return the label of each room as architecture.md describes it: its heading, the one above, and its step of the walk."""
    found, group = {}, ""
    text = (HERE / "architecture.md").read_text()
    steps = {room: number for number, room in re.findall(r"^(\d)\. \*\*[^*]+\*\* \(`(\w+)`\)", text, flags=re.M)}
    for level, title in re.findall(r"^(###|####) (.+)$", text, flags=re.M):
        if level == "###":
            group = title
        else:
            room, caption = title.split(": ", 1)
            found[room] = Label(caption, group, steps.get(room, ""))
    return found


def main() -> int:
    """Write the pages, or with ``--check`` compare them; return the number of pages that are out of date."""
    texts = {
        "passes.md": passes(),
        "operators.md": operators(),
        "architecture.md": architecture(),
        "architecture.svg": draw(rooms(), labels()),
    }
    outdated = [name for name, text in texts.items() if not (HERE / name).exists() or (HERE / name).read_text() != text]
    if "--check" in sys.argv:
        if outdated:
            print(f"out of date: {', '.join(outdated)}; run python docs/generate.py")
        return len(outdated)
    for name in outdated:
        (HERE / name).write_text(texts[name])
    return 0


if __name__ == "__main__":
    sys.exit(main())
