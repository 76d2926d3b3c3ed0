"""Operators of the domains ai.onnx.ml and ai.onnx.preview.training, and n-grams, in torch: those of numbers, not of strings."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from thresher.frontend.onnx.rules import rule
from thresher.frontend.onnx.values import Unsupported, real_tensors

ML, TRAINING = "ai.onnx.ml", "ai.onnx.preview.training"


@rule("ArrayFeatureExtractor", domain=ML)
def array_feature_extractor(x: Tensor, index: Tensor) -> Tensor:
    """Return the columns of x at indices."""
    columns = x.index_select(-1, index.reshape(-1))
    return columns.reshape(1, -1) if x.dim() == 1 else columns


@rule("Binarizer", domain=ML)
def binarizer(x: Tensor, *, threshold: float) -> Tensor:
    """Return 1 where x is above a threshold, else 0."""
    return (x > threshold).to(x.dtype)


@rule("LabelEncoder", domain=ML, since=2)
def label_encoder(
    x: Tensor,
    *,
    default_float: float,
    default_int64: int,
    default_string: str,
    default_tensor: Tensor | None = None,
    keys_floats: Sequence[float] | None = None,
    keys_int64s: Sequence[int] | None = None,
    keys_strings: Sequence[str] | None = None,
    keys_tensor: Tensor | None = None,
    values_floats: Sequence[float] | None = None,
    values_int64s: Sequence[int] | None = None,
    values_strings: Sequence[str] | None = None,
    values_tensor: Tensor | None = None,
) -> Tensor:
    """Return for each element the value of its key."""
    if keys_strings or values_strings:
        raise Unsupported("strings, which torch does not have")
    keys = (
        keys_tensor if keys_tensor is not None else torch.tensor(list(keys_floats or keys_int64s or []), dtype=x.dtype)
    )
    if values_tensor is not None:
        values = values_tensor
        default = torch.zeros((), dtype=values.dtype) if default_tensor is None else default_tensor.reshape(())
    elif values_floats is not None:
        values, default = torch.tensor(list(values_floats)), torch.tensor(default_float)
    else:
        values, default = torch.tensor(list(values_int64s or [])), torch.tensor(default_int64)
    same = x.unsqueeze(-1) == keys
    same = same | (x.unsqueeze(-1).isnan() & keys.isnan()) if x.is_floating_point() else same
    first = same.to(torch.int64).argmax(-1)
    return torch.where(same.any(-1), values[first], default)


LEQ, LT, GTE, GT, EQ, NEQ, MEMBER = range(7)
AVERAGE, SUM, MIN, MAX = range(4)


@rule("TreeEnsemble", domain=ML)
def tree_ensemble(
    x: Tensor,
    *,
    aggregate_function: int,
    leaf_targetids: Sequence[int],
    leaf_weights: Tensor,
    membership_values: Tensor | None = None,
    n_targets: int = 1,
    nodes_falseleafs: Sequence[int],
    nodes_falsenodeids: Sequence[int],
    nodes_featureids: Sequence[int],
    nodes_hitrates: Tensor | None = None,
    nodes_missing_value_tracks_true: Sequence[int] | None = None,
    nodes_modes: Tensor,
    nodes_splits: Tensor,
    nodes_trueleafs: Sequence[int],
    nodes_truenodeids: Sequence[int],
    post_transform: int,
    tree_roots: Sequence[int],
) -> Tensor:
    """Return for each sample and target the sum, the mean, the least or the largest of the leaves that the trees lead to.

    All nodes are compared at once; then the paths of all trees are followed, one step a level.
    """
    if post_transform:
        raise Unsupported("a transform of the scores")
    with real_tensors():
        modes = nodes_modes.tolist()
        members = [] if membership_values is None else membership_values.tolist()
    missing = list(nodes_missing_value_tracks_true or [0] * len(modes))
    features = x.index_select(1, torch.tensor(list(nodes_featureids)))  # [samples, nodes]
    holds = _compared(features, modes, nodes_splits.to(x.dtype), members)
    holds = torch.where(features.isnan(), torch.tensor(missing, dtype=torch.bool), holds)
    count = len(modes)  # leaves are numbered behind the nodes
    lists = [
        [i + count if leaf else i for i, leaf in zip(ids, leaves)]
        for ids, leaves in ((nodes_falsenodeids, nodes_falseleafs), (nodes_truenodeids, nodes_trueleafs))
    ]
    otherwise, following = (torch.tensor(way) for way in lists)
    current = torch.tensor(list(tree_roots)).expand(x.shape[0], len(tree_roots))
    for _ in range(_depth(tree_roots, lists, count)):
        node = current.clamp(max=count - 1)
        reached = torch.where(torch.gather(holds, 1, node), following[node], otherwise[node])
        current = torch.where(current < count, reached, current)
    leaf = current - count
    weights, targets = leaf_weights.to(x.dtype)[leaf], torch.tensor(list(leaf_targetids))[leaf]
    kind = {AVERAGE: "sum", SUM: "sum", MIN: "amin", MAX: "amax"}[aggregate_function]
    limits = torch.finfo(x.dtype)
    empty = {"sum": 0.0, "amin": limits.max, "amax": limits.min}[kind]
    result = x.new_full((x.shape[0], n_targets), empty).scatter_reduce(1, targets, weights, kind)
    return result / len(tree_roots) if aggregate_function == AVERAGE else result


def _compared(x: Tensor, modes: Sequence[int], splits: Tensor, members: list[float]) -> Tensor:
    """Return for each sample and node whether its comparison holds."""
    comparisons = {
        LEQ: x <= splits,
        LT: x < splits,
        GTE: x >= splits,
        GT: x > splits,
        EQ: x == splits,
        NEQ: x != splits,
    }
    kinds = torch.tensor(list(modes))
    result = torch.zeros_like(x, dtype=torch.bool)
    for kind in sorted(set(modes) - {MEMBER}):
        result = torch.where(kinds == kind, comparisons[kind], result)
    for i in (i for i, m in enumerate(modes) if m == MEMBER):
        end = next(j for j, v in enumerate(members) if v != v)  # not a number: the end of a set
        within = (x[:, i : i + 1] == torch.tensor(members[:end], dtype=x.dtype)).any(1, keepdim=True)
        result = torch.where(torch.arange(len(modes)) == i, within, result)
        members = members[end + 1 :]
    return result


def _depth(roots: Sequence[int], ways: Sequence[Sequence[int]], count: int) -> int:
    """Return the number of steps of the longest path from a root to a leaf."""
    level, depth = set(roots), 0
    while level := {way[i] for i in level for way in ways if i < count}:
        depth += 1
        if depth > count:
            raise Unsupported("a tree that leads back to itself")
    return depth


@rule("TfIdfVectorizer", unsigned="native")
def tf_idf_vectorizer(
    x: Tensor,
    *,
    max_gram_length: int,
    max_skip_count: int,
    min_gram_length: int,
    mode: str,
    ngram_counts: Sequence[int],
    ngram_indexes: Sequence[int],
    pool_int64s: Sequence[int] | None = None,
    pool_strings: Sequence[str] | None = None,
    weights: Sequence[float] | None = None,
) -> Tensor:
    """Return how often each n-gram of a pool is in each row of x, with up to some items skipped between its items."""
    if not pool_int64s:
        raise Unsupported("strings, which torch does not have")
    if weights and mode != "TF" and list(ngram_indexes) != list(range(len(ngram_indexes))):
        raise Unsupported(
            "weights of n-grams in another order: the specification and its reference read them differently"
        )
    rows = x.reshape(1, -1) if x.dim() == 1 else x
    counts = torch.zeros(rows.shape[0], max(ngram_indexes) + 1)
    starts, first = [*ngram_counts, len(pool_int64s)], 0
    for n, (start, end) in enumerate(pairwise(starts), 1):
        grams = torch.tensor(list(pool_int64s[start:end])).reshape(-1, n)
        index = torch.tensor(list(ngram_indexes[first : first + len(grams)]))
        first += len(grams)
        if min_gram_length <= n <= max_gram_length and len(grams):
            counts = counts.index_add(1, index, _occurrences(rows, grams, 1 if n == 1 else max_skip_count + 1))
    counts = counts.reshape(-1) if x.dim() == 1 else counts
    if mode == "IDF":
        counts = (counts > 0).to(counts.dtype)
    return counts * torch.tensor(list(weights)) if weights and mode != "TF" else counts


def _occurrences(rows: Tensor, grams: Tensor, max_step: int) -> Tensor:
    """Return how often each n-gram is in each row, its items up to ``max_step`` apart."""
    n, total = grams.shape[1], torch.zeros(rows.shape[0], len(grams))
    for step in range(1, max_step + 1):
        count = int(rows.shape[1]) - (n - 1) * step
        if count > 0:
            items = torch.stack([rows[:, i * step : i * step + count] for i in range(n)], -1)
            total = total + (items.unsqueeze(1) == grams.reshape(1, -1, 1, n)).all(-1).sum(-1)
    return total


def _groups(values: Sequence[Tensor], count: int) -> list[Sequence[Tensor]]:
    """Return the values of each tensor that is optimised: itself, its gradient, and its ``count`` - 2 states."""
    each = len(values) // count
    return [values[i::each] for i in range(each)]


@rule("Adagrad", domain=TRAINING)
def adagrad(
    rate: Tensor, step: Tensor, *values: Tensor, decay_factor: float, epsilon: float, norm_coefficient: float
) -> list[Tensor]:
    """Return the tensors after a step of Adagrad, and their sums of squared gradients."""
    results = []
    for x, g, h in _groups(values, 3):
        gradient = norm_coefficient * x + g
        squares = h + gradient * gradient
        results.append((x - rate / (1 + step * decay_factor) * gradient / (squares.sqrt() + epsilon), squares))
    return [v for column in zip(*results) for v in column]


@rule("Adam", domain=TRAINING)
def adam(
    rate: Tensor,
    step: Tensor,
    *values: Tensor,
    alpha: float,
    beta: float,
    epsilon: float,
    norm_coefficient: float,
    norm_coefficient_post: float,
) -> list[Tensor]:
    """Return the tensors after a step of Adam, and their moments."""
    results = []
    for x, g, v, h in _groups(values, 4):
        gradient = norm_coefficient * x + g
        first, second = alpha * v + (1 - alpha) * gradient, beta * h + (1 - beta) * gradient * gradient
        power = step.to(x.dtype)
        adjusted = torch.where(step > 0, rate * torch.sqrt(1 - beta**power) / (1 - alpha**power), rate)
        results.append(
            ((1 - norm_coefficient_post) * (x - adjusted * first / (second.sqrt() + epsilon)), first, second)
        )
    return [v for column in zip(*results) for v in column]


@rule("Momentum", domain=TRAINING)
def momentum(
    rate: Tensor, step: Tensor, *values: Tensor, alpha: float, beta: float, mode: str, norm_coefficient: float
) -> list[Tensor]:
    """Return the tensors after a step with momentum, and their momenta."""
    results = []
    for x, g, v in _groups(values, 3):
        gradient = norm_coefficient * x + g
        moved = alpha * v + torch.where(step > 0, beta, 1.0) * gradient
        results.append((x - rate * (gradient + alpha * moved if mode == "nesterov" else moved), moved))
    return [v for column in zip(*results) for v in column]
