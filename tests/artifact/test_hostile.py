"""What is damaged or made to harm: the loader, the text form and the command line say what is wrong, and nothing else happens."""

from __future__ import annotations

import copy
import errno
import json
import os
import random
import resource
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import thresher
from helpers.hostile_zips import TRICKS
from thresher.artifact import numpy_reader
from thresher.cli import main as cli
from thresher.errors import ArtifactError, ProgramError, ThresherError
from thresher.ir import parser
from thresher.runtime.format import digest


class Counts(nn.Module):
    """Has state: the signature of the artifact says so."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.add_(1)
        return x + 0 * self.calls


def compiled_model() -> thresher.Compiled:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 5), Counts()).eval()
    return thresher.compile(model, (torch.randn(2, 3, 6, 6),), target="cpu")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled_model().save(tmp_path_factory.mktemp("artifact") / "m.thresher")


def refuses(path: Path) -> bool:
    """Both loaders raise our error, or both load and agree with the proof."""
    outcomes = []
    for load in (thresher.load, numpy_reader.load):
        try:
            load(path).validate()
            outcomes.append(False)
        except ThresherError:
            outcomes.append(True)
    assert outcomes[0] == outcomes[1]
    return outcomes[0]


@settings(max_examples=40)
@given(st.data())
def test_flipped_bits_and_cut_files(
    artifact: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    content = bytearray(artifact.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] ^= 1 << data.draw(st.integers(0, 7))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content))) :]
    path = tmp_path_factory.mktemp("flipped") / "m.thresher"
    path.write_bytes(content)
    refuses(path)


def places(tree: Any, path: tuple = ()) -> list[tuple]:
    """Every place of a JSON tree."""
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [path, *(p for key, value in inner for p in places(value, (*path, key)))]


def changed(tree: Any, place: tuple, value: Any) -> Any:
    if not place:
        return value
    tree = copy.copy(tree)
    tree[place[0]] = changed(tree[place[0]], place[1:], value)
    return tree


VALUES = [None, True, -1, 2**40, 1.5, "", "x", "../../etc/passwd", [], [1], {}, {"tensor": "nothing"}, "[1, {}]", "{"]


@pytest.mark.parametrize("member", ["manifest.json", "main/report.json"])
def test_every_field_of_a_header(artifact: Path, tmp_path: Path, member: str) -> None:
    """Anything in the place of anything, with hashes that fit: our error, or it did not matter."""
    with zipfile.ZipFile(artifact) as package:
        members = {n: package.read(n) for n in package.namelist()}
    tree = json.loads(members[member])
    choices = random.Random(0).sample([(p, v) for p in places(tree) for v in VALUES], 80)
    for place, value in choices:
        data = json.dumps(changed(tree, place, value)).encode()
        manifest = json.loads(members["manifest.json"])
        manifest["hashes"]["main/report.json"] = digest(data)
        path = tmp_path / "m.thresher"
        with zipfile.ZipFile(path, "w") as package:
            for name, content in (members | {"manifest.json": json.dumps(manifest).encode()} | {member: data}).items():
                package.writestr(name, content)
        try:
            thresher.load(path)
        except ThresherError:
            continue
        except Exception as error:
            raise AssertionError(f"{place} = {value!r} raises {type(error).__name__}: {error}") from error


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("member", ["weights.safetensors", "main/model.so"])
@pytest.mark.parametrize("name", TRICKS)
def test_tricks_with_the_package(artifact: Path, tmp_path: Path, name: str, member: str) -> None:
    path = tmp_path / "m.thresher"
    TRICKS[name](artifact, path, member)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ArtifactError, match="damaged"):
        thresher.load(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10  # KB: a bomb is not unpacked
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.thresher"]


TEXT = thresher.capture(
    nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval(), (torch.randn(1, 3, 5, 5),)
).text()


@settings(max_examples=80)
@given(st.data())
def test_the_text_form(data: st.DataObject) -> None:
    """Edited anyhow it is read, or the line that cannot be is named."""
    edited = TEXT
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(edited)))
        end = min(len(edited), start + data.draw(st.integers(0, 6)))
        put = data.draw(
            st.sampled_from(
                ["", "%", "(", "[", "9", "-1", "None", ", ", "f32[", "__import__('os')", "torch.", "\n", '"', "é"]
            )
        )
        edited = edited[:start] + put + edited[end:]
    try:
        parser.parse(edited)
    except ProgramError as error:
        assert str(error)


WORDS = """build inspect validate diff bench passes records verify x.thresher no:thing m:make --input 1x3
1x-3 x:int64 --passes exact; fold-channels{
nothing{a=1} --target cuda cpu:pentium --budget cosine=x -o /proc/x/y --fixed sr= model.onnx m.pt2 --rounds -3
tune bundle inspect blame a=x.thresher --trials 1 --remote h:1:k --batch 0 --explain a:b --json --amount 2""".split()


@settings(max_examples=60)
@given(st.lists(st.sampled_from(WORDS), min_size=1, max_size=6))
def test_the_command_line(words: list[str]) -> None:
    """Any words: an exit code, never a traceback."""
    try:
        assert cli.main(words) in (0, 1)
    except SystemExit as stop:
        assert stop.code in (0, 2)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_is_stopped_leaves_nothing(tmp_path: Path, monkeypatch, error: BaseException) -> None:
    """Half of the package is written when the disk is full, or the user gives up; what stood there before stays."""
    compiled = compiled_model()
    path = compiled.save(tmp_path / "m.thresher")
    before = path.read_bytes()
    write = zipfile.ZipFile.write

    def stop(self: zipfile.ZipFile, name: Path, *args: Any) -> None:
        if Path(name).name == "program.txt":
            raise error
        write(self, name, *args)

    monkeypatch.setattr(zipfile.ZipFile, "write", stop)
    with pytest.raises(ArtifactError if isinstance(error, OSError) else KeyboardInterrupt):
        compiled.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["m.thresher"] and path.read_bytes() == before


def test_a_killed_build_leaves_nothing(tmp_path: Path) -> None:
    code = "import os, signal, zipfile, thresher, torch\nfrom torch import nn\n"
    code += "zipfile.ZipFile.write = lambda *a: os.kill(os.getpid(), signal.SIGKILL)\n"
    code += "thresher.compile(nn.Linear(2, 2), (torch.randn(1, 2),), target='cpu').save('m.thresher')"
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path).returncode == -9
    assert not (tmp_path / "m.thresher").exists()


DISK = """
import os, sys, thresher, torch, warnings
from pathlib import Path
from thresher.cli import main as cli
small, closed, ample = map(Path, sys.argv[1:])
model = torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.ReLU(), torch.nn.Linear(512, 64))
with warnings.catch_warnings(record=True) as warned:
    warnings.simplefilter("always")
    compiled = thresher.compile(model, (torch.randn(1, 256),), target="cpu")
print("kept" if not any("not kept" in str(w.message) for w in warned) else "not kept for later builds")
def attempt(do):
    try:
        do()
        print("written")
    except thresher.ThresherError as error:
        print(error)
attempt(lambda: compiled.save(small / "m.thresher"))
attempt(lambda: compiled.save(closed / "m.thresher"))
attempt(lambda: compiled.report.save_html(small / "r.html"))
attempt(lambda: thresher.compile(model, (torch.randn(1, 256),), target="cpu", tune=thresher.Tune(trials=2)))
compiled.save(ample / "m.thresher")
import tempfile
tempfile.tempdir = str(small)
attempt(lambda: compiled.save(ample / "n.thresher"))
attempt(lambda: thresher.load(ample / "m.thresher"))
print(sorted(p.name for p in small.iterdir()), sorted(p.name for p in ample.iterdir()))
"""


def test_a_disk_that_is_full_or_read_only(tmp_path: Path) -> None:
    """Real ones, mounted for one process: each writer says so in one of our errors, and leaves nothing half-written."""
    small, closed, ample = (tmp_path / name for name in ("small", "closed", "ample"))
    for folder in (small, closed, ample):
        folder.mkdir()
    mount = f"mount -t tmpfs -o size=4k tmpfs {small} && mount -t tmpfs -o ro tmpfs {closed}"
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a disk of their own")
    command = f"{mount} && exec {sys.executable} -c '{DISK}' {small} {closed} {ample}"
    environment = os.environ | {"THRESHER_CACHE": str(closed / "cache")}
    done = subprocess.run(["unshare", "-rm", "sh", "-c", command], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    kept, saved, refused, page, tuned, prepared, loaded, left = done.stdout.splitlines()
    full, read_only = "No space left on device", "Read-only file system"
    assert kept == "not kept for later builds"
    assert saved.startswith(f"cannot write {small}/m.thresher:") and full in saved
    assert refused.startswith(f"cannot write {closed}/m.thresher:") and read_only in refused
    assert page.startswith(f"cannot write {small}/r.html:") and full in page
    assert tuned.startswith("cannot use the tuning records in") and read_only in tuned
    assert prepared.startswith(f"cannot prepare {ample}/n.thresher:") and full in prepared
    assert loaded.startswith(f"cannot unpack {ample}/m.thresher:") and full in loaded
    assert left == "[] ['m.thresher']"


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("THRESHER_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ThresherError, match="cache"):
        thresher.compile(nn.Linear(4, 4), (torch.randn(2, 4),), target="cpu", tune=thresher.Tune(trials=2))


def test_ten_thousand_calls_from_four_threads(artifact: Path) -> None:
    """Right each time, and memory does not grow."""
    model, x = thresher.load(artifact), torch.randn(4, 2, 3, 6, 6)
    wanted = [model(part).clone() for part in x]
    wrong: list[int] = []

    def call(thread: int, count: int) -> None:
        for _ in range(count):
            if not torch.equal(model(x[thread]), wanted[thread]):
                wrong.append(thread)

    def all_threads(count: int) -> None:
        threads = [threading.Thread(target=call, args=(i, count)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    all_threads(250)
    before = resident()
    all_threads(2500)
    assert not wrong and resident() - before < 8 << 20


def resident() -> int:
    """Bytes of this process in memory."""
    time.sleep(0.1)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
