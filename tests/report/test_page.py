"""The report as a page, looked at in a real browser: what it shows, that it fits, and that nothing of it comes from elsewhere."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

import thresher
from thresher.approximation.budget import Budget
from thresher.approximation.ledger import Change, Spent
from thresher.models import resnet18
from thresher.report.graph_diff import Line
from thresher.report.report import Report
from thresher.report.svg import lanes

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian: apt-get install chromium)")
HOSTILE = "<script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">"


@pytest.fixture(scope="module")
def report() -> Report:
    """Of a ResNet with half of the inner channels masked off."""
    model, args = resnet18().eval(), (torch.randn(1, 3, 32, 32),)
    for block in (b for b in model.modules() if hasattr(b, "conv2")):
        prune.random_structured(block.conv1, "weight", 0.5, dim=0)
    return thresher.compile(model, args, target="cpu").report


def test_every_layer_says_what_it_was_and_is(report: Report) -> None:
    halved = [layer for layer in report.layers() if layer.remaining == 0.5]
    assert len(halved) >= 4 and all("conv" in layer.module for layer in halved)
    first = next(layer for layer in halved if layer.module.endswith("conv1"))
    assert first.after == [first.before[0] // 2, *first.before[1:]]
    gone = [line for line in report.graph["before"] if line.mark == "gone"]
    assert {"mul.Tensor", "_native_batch_norm_legit_no_training"} <= {line.operator for line in gone}


def test_a_layer_that_left_and_one_that_came_are_told() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kept, self.dead = nn.Linear(8, 8), nn.Linear(8, 8)
            nn.init.zeros_(self.dead.weight)
            nn.init.zeros_(self.dead.bias)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.kept(x) + self.dead(x)

    report = thresher.compile(Branches(), (torch.randn(4, 8),), target="cpu", backend="eager").report
    assert {layer.module: layer.after for layer in report.layers()} == {"kept": [8, 8], "dead": []}
    assert next(line.mark for line in report.graph["before"] if line.module == "dead") == "gone"
    assert report.kernels == []  # torch runs it


def test_kernels_are_told_in_the_words_of_the_model(report: Report) -> None:
    named = [k for k in report.kernels if k.modules]
    assert len(named) == len(report.kernels) > 10 and all(k.milliseconds > 0 for k in named)
    convolutions = {layer.module for layer in report.layers() if layer.operator == "conv2d"}
    assert convolutions <= {module for k in named for module in k.modules}


def test_the_terminal_report_is_markdown(report: Report) -> None:
    lines = str(report).splitlines()
    tables = [i for i, line in enumerate(lines) if line.startswith("|--")]
    assert len(tables) >= 3
    for i in tables:
        end = next(j for j in range(i, len(lines) + 1) if j == len(lines) or not lines[j].startswith("|"))
        assert lines[i - 2] == "" and {line.count("|") for line in lines[i - 1 : end]} == {lines[i].count("|")}
    assert "┃" not in str(report)


@given(st.lists(st.sets(st.integers(0, 30), max_size=3), min_size=1, max_size=20))
def test_no_rail_runs_through_the_dot_of_another_line(readers: list[set[int]]) -> None:
    """Each line reads some of those before it."""
    graph = [
        Line(str(i), "op", "", sorted({str(r % i) for r in reads}) if i else [], [], [])
        for i, reads in enumerate(readers)
    ]
    lane = lanes(graph)
    for i, line in enumerate(graph):
        last = max((j for j, other in enumerate(graph) if line.name in other.inputs), default=i)
        between = [lane[other.name] for other in graph[i + 1 : last]]
        assert lane[line.name] not in between


# ---------------------------------------------------------------------- in the browser


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        yield (started := playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]))
        started.close()


def opened(browser: object, report: Report, folder: Path, width: int = 1280) -> object:
    """A tab with the report; it fails the test on any word on the console and any request but the page."""
    report.save_html(folder / "report.html")
    tab = browser.new_page(viewport={"width": width, "height": 800})  # type: ignore[attr-defined]
    heard: list[str] = []
    tab.on("console", lambda message: heard.append(message.text))
    tab.on("pageerror", lambda error: heard.append(str(error)))
    tab.on("request", lambda request: heard.append(request.url))
    tab.goto((folder / "report.html").as_uri())
    assert heard == [(folder / "report.html").as_uri()]
    return tab


@needs_browser
def test_the_page_shows_the_graph_beside_its_rails(report: Report, browser: object, tmp_path: Path) -> None:
    tab = opened(browser, report, tmp_path)
    for side in ("after", "before"):
        tab.click(f"label[for=tab-{side}]")
        visible = tab.eval_on_selector_all(".graph", "all => all.filter(g => g.offsetHeight).map(g => g.id)")
        assert visible == [f"graph-{side}"]
        middles = "all => all.map(e => { const r = e.getBoundingClientRect(); return (r.top + r.bottom) / 2 })"
        dots = tab.eval_on_selector_all(f"#graph-{side} circle", middles)
        rows = tab.eval_on_selector_all(f"#graph-{side} .row", middles)
        assert len(dots) == len(rows) == len(report.graph[side])
        assert max(abs(a - b) for a, b in zip(dots, rows)) < 1
    shown = tab.inner_text("#graph-before")
    assert "was" not in shown and "now 1x32x8x8" in shown
    assert tab.eval_on_selector(".row.gone span", "e => getComputedStyle(e).textDecorationLine") == "line-through"


@needs_browser
def test_the_bars_are_as_long_as_the_numbers(report: Report, browser: object, tmp_path: Path) -> None:
    tab = opened(browser, report, tmp_path)
    lengths = tab.eval_on_selector_all(".time", "all => all.map(e => e.getBoundingClientRect().width)")
    times = [k.milliseconds for k in report.kernels]
    assert len(lengths) == len(times)
    for length, time in zip(lengths, times):
        assert length == pytest.approx(max(lengths) * time / max(times), abs=1.5)


@needs_browser
@pytest.mark.parametrize("width", [1280, 400])
def test_nothing_runs_out_of_the_page(report: Report, browser: object, tmp_path: Path, width: int) -> None:
    tab = opened(browser, report, tmp_path, width)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    for link in tab.query_selector_all("nav a"):
        assert tab.query_selector(link.get_attribute("href")) is not None


@needs_browser
def test_heads_are_drawn_and_names_are_only_text(report: Report, browser: object, tmp_path: Path) -> None:
    mass, mask = [[0.5, 0.1], [0.0, 1.0]], [[1.0, 0.0], [1.0, 1.0]]
    change = Change(HOSTILE, "head 0: a window", 1e-4, 0.2, mass, mask)
    spent = Spent("sparse-attention", 0.0, 0.01, Budget(rel_l2=0.1).summary([0.01, 0.01]), [change])
    tab = opened(browser, replace(report, model=HOSTILE, spent=[spent]), tmp_path)
    assert tab.inner_text("h1") == HOSTILE and tab.title() == f"Thresher: {HOSTILE}"
    tab.click("details:has(figure) summary")
    box = tab.locator("figure svg").bounding_box()
    assert box["width"] == box["height"] == 88
    assert HOSTILE in tab.inner_text("figcaption") and tab.locator("img").count() == 0
    assert tab.locator("figure svg path").count() == 5  # four levels of mass, and what covers
