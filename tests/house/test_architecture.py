"""docs/architecture.md describes the house as it is: its figure and its paragraphs are held to the imports."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import generate
import networkx as nx
from figure import draw
from rooms import ROOT, imports, rooms

PAGE, FIGURE = ROOT / "docs" / "architecture.md", ROOT / "docs" / "architecture.svg"
MAX_CAPTION = 26  # characters that fit into a box


def test_no_circle_of_rooms() -> None:
    assert [sorted(c) for c in nx.strongly_connected_components(rooms()) if len(c) > 1] == []


def test_the_figure_is_up_to_date() -> None:
    assert FIGURE.read_text() == draw(rooms(), generate.labels()), "run python docs/generate.py"


def test_a_room_stands_above_all_that_it_imports() -> None:
    svg = "{http://www.w3.org/2000/svg}"
    names = [e for e in ElementTree.parse(FIGURE).iter(f"{svg}text") if e.get("class") == "name"]
    y = {e.text: float(e.attrib["y"]) for e in names}
    assert set(y) == set(rooms())
    assert [(a, b) for a, b in rooms().edges if y[a] >= y[b]] == []


def test_every_room_has_its_paragraph() -> None:
    sections = dict(re.findall(r"^#### (\w+): .+\n\n(.+(?:\n.+)*)", PAGE.read_text(), flags=re.M))
    assert set(sections) == set(rooms())
    assert [name for name, text in sections.items() if text.startswith("*Imports*")] == []
    labels = generate.labels()
    assert [name for name, label in labels.items() if len(label.caption) > MAX_CAPTION] == []
    assert sorted(label.step for label in labels.values() if label.step) == list("123456")


def test_the_lines_of_imports_are_the_imports() -> None:
    lines = re.findall(r"^#### (\w+): [\s\S]+?^\*Imports\*: (.+)\.$", PAGE.read_text(), flags=re.M)
    assert {name: set(re.findall(r"`(\w+)`", line)) for name, line in lines} == {
        name: set(rooms().successors(name)) for name in rooms()
    }


def test_files_that_the_paragraphs_name_exist() -> None:
    folders = {"thresher": "compiler", "basics": "compiler", **{n: n for n in ("passes", "backends", "models")}}
    for name, text in re.findall(r"^#### (\w+): ([\s\S]+?)^\*Imports\*", PAGE.read_text(), flags=re.M):
        folder = ROOT / folders.get(name, f"compiler/{name}")
        for file in re.findall(r"`(?:compiler/)?([\w/]+(?:\.py|/))`", text):
            assert (folder / file).exists(), f"{name}: {file}"


def test_imports_are_read_from_the_text() -> None:
    """Of a module, of a member of a package, in a function, and none of a module by itself."""
    graph = imports()
    assert graph.has_edge("thresher.ir.program", "thresher.ir.nodes")
    assert graph.has_edge("thresher.ir.program", "thresher.ir.fake_results")
    assert not any(graph.has_edge(name, name) for name in graph)
