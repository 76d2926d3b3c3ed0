"""Every registered pass through the whole proof kit, on the cases of its name; a pass without a case fails."""

from __future__ import annotations

import pytest

from helpers.cases import CASES
from helpers.registered import OWN
from thresher.testing import prove


@pytest.mark.parametrize("name", sorted({*OWN, *CASES}))
def test_every_registered_pass_is_proven(name: str) -> None:
    assert name in OWN, "the table has a case of a pass that is not registered"
    assert CASES.get(name), "the table of cases (tests/helpers/cases) has none of this pass"
    prove(name, *CASES[name])
