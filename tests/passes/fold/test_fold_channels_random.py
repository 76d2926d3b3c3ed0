"""The fold on random programs: equal, idempotent, minimal."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, example, given, seed, settings
from hypothesis import strategies as st

from helpers.random_graphs import KINDS, build
from thresher.analysis.cost.cost import count_flops
from thresher.ir.program import Program
from thresher.passes.fold.fold_channels import FoldChannels
from thresher.passes.fold.permute_channels import PermuteChannels
from thresher.rewriting.contract import Context
from thresher.verification.compare import EXACT_TOLERANCE, compare
from thresher.verification.verifier import verify

step = st.tuples(st.sampled_from(KINDS), st.integers(0, 3), st.integers(0, 59))
programs = st.builds(
    build, st.integers(0, 10_000), st.sampled_from([0.0, 0.2, 0.5, 0.8]), st.lists(step, min_size=2, max_size=8)
)


def check(program: Program, fold: FoldChannels) -> None:
    """Equal in float64 on two inputs, the certificate holds, and folding again changes nothing."""
    permuted = PermuteChannels(min_improvement=0.0).apply(program, Context()).program.verify()
    result = fold.apply(permuted, Context())
    folded = result.program.verify()
    assert count_flops(folded) <= count_flops(program)
    for scale in (1.0, 100.0):
        x = scale * program.probe[0]
        assert not compare(program.run(x), folded.run(x)).exceeds(EXACT_TOLERANCE)
    if result.rewrites:
        verify(result.certificate)
    again = fold.apply(folded, Context())
    assert again.rewrites == []


def examples(count: int) -> settings:
    return settings(
        max_examples=count, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True, database=None
    )


@examples(200)
@given(programs)
def test_random_programs(program: Program) -> None:
    check(program, FoldChannels())


@examples(200)
@given(programs)
@example(build(1437, 0.8, [("concat", 1, 5), ("pixels", 0, 34), ("flip", 2, 47), ("conv", 1, 39)]))  # holes in blocks
@example(build(6663, 0.5, [("conv", 0, 12), ("residual", 1, 54), ("linear", 3, 5), ("concat", 2, 44)]))  # a dead part
@example(build(6372, 0.8, [("concat", 1, 57), ("layer_norm", 3, 20), ("halves", 2, 11)]))  # ... which others wait for
@example(build(0, 0.5, [("grouped", 0, 1), ("to_tokens", 0, 0), ("conv", 0, 0), ("attention", 0, 1)]))  # known keys
@example(build(1, 0.5, [("conv", 0, 0), ("conv", 0, 1), ("to_tokens", 0, 0), ("attention", 0, 1)]))  # tried again
@example(build(3482, 0.8, [("gated_unit", 0, 31), ("block", 1, 41), ("attention", 0, 55)]))  # an addend becomes zero
@example(
    build(420, 0.8, [(s, 0, 0) for s in "to_tokens gated_unit conv grouped residual gated_unit".split()])
)  # constant
def test_random_programs_with_every_edge_marker(program: Program) -> None:
    """Edge markers wherever they save anything at all: on these small programs the cost rule would take few."""
    check(program, FoldChannels(min_improvement=0.0, round_to=1))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("part", range(10))
def test_many_random_programs(part: int) -> None:
    """1,000 more with every edge marker for each part, others than in the default run."""

    @seed(part)
    @settings(examples(1000), derandomize=False)
    @given(programs)
    def run(program: Program) -> None:
        check(program, FoldChannels(min_improvement=0.0, round_to=1))

    run()
