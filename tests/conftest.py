"""Shared fixtures: what no test may see or measure, and the small models of the zoo."""

from __future__ import annotations

from collections.abc import Iterator

import hypothesis
import pytest
import torch
from torch import nn

from thresher.analysis.cost.break_even import estimated
from thresher.analysis.cost.cost import machine_model
from thresher.driver.clock import Clock
from thresher.testing import ZOO, settle
from thresher.tuning import timing

torch.set_num_threads(1)  # tests run beside each other, and threads that wait for one another wait for other tests, too
hypothesis.settings.register_profile("untimed", deadline=None)  # no test judges a time
hypothesis.settings.load_profile("untimed")


@pytest.fixture(autouse=True, scope="session")
def shared_fixtures_measure_nothing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What modules and sessions share is built before the fixtures of a test: it sees no records of this machine either, takes break-even
    points from the estimate, and does not pause between timings."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("THRESHER_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(timing, "PAUSE", 0.0)
        patch.setattr(
            Clock, "break_even", lambda clock, backend, target, layer: estimated(layer, machine_model(target))
        )
        yield


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees what tuning recorded in another one."""
    monkeypatch.setenv("THRESHER_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(params=sorted(ZOO))
def zoo_model(request: pytest.FixtureRequest) -> tuple[str, nn.Module, tuple]:
    """Each small model of the zoo in turn: its name, the module, its inputs."""
    torch.manual_seed(0)
    model, args = ZOO[request.param]()
    return request.param, settle(model), args
