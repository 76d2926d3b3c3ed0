"""Mutants of our passes that nothing can notice, with the reason: for every program they do what the pass does.

A mutant is the file, and the lines before and after; line numbers change too often. ``thresher prove --mutate`` lists those that survive.
"""

from __future__ import annotations

MERGE, KEY_HEADS = "fold/merge_duplicates.py", "canonicalize/share_key_heads.py"
REASONS: dict[tuple[str, str, str], str] = {
    (
        MERGE,
        "if duplicates is not None and bool((duplicates[1] != torch.arange(duplicates[1].numel())).any()):",
        "if duplicates is not None and bool((duplicates[1] == torch.arange(duplicates[1].numel())).any()):",
    ): "the first channel is always its own first; classes without a duplicate add no column to another",
    (
        MERGE,
        "for source in sources if dim >= 0 else ():",
        "for source in sources if dim >= -1 else ():",
    ): "without a class on any operand dim is -1, the dimension of each source is below 0, and the loop passes over all",
    (
        MERGE,
        "count = int(group.max()) + 1",
        "count = int(group.max()) + 2",
    ): "the last entry is of no group, and nobody reads it",
    (
        KEY_HEADS,
        'if k is None or v is None or shape_of(k)[1] != shape_of(v)[1] or argument(node, 7, "enable_gqa", False):',
        'if k is None or v is None or shape_of(k)[1] != shape_of(v)[1] or argument(node, 8, "enable_gqa", False):',
    ): "enable_gqa is given by name only",
    (
        KEY_HEADS,
        'if k is None or v is None or shape_of(k)[1] != shape_of(v)[1] or argument(node, 7, "enable_gqa", False):',
        'if k is None or v is None or shape_of(k)[1] != shape_of(v)[1] or argument(node, 6, "enable_gqa", False):',
    ): "enable_gqa is given by name only, and so is the scale before it",
    (
        KEY_HEADS,
        'if k is None or v is None or shape_of(k)[1] != shape_of(v)[1] or argument(node, 7, "enable_gqa", False):',
        'if k is None or v is None or shape_of(k)[1] != shape_of(v)[1] or argument(node, 7, "enable_gqa"):',
    ): "None is as false as False",
    (
        "fold/permute_channels.py",
        "if not same_size(size, 1) and (value, dim) not in mentioned:",
        "if True and (value, dim) not in mentioned:",
    ): "a dimension of size 1 is tied to none of another size, and its only channel has one order",
    (
        "canonicalize/simplify.py",
        "or not is_tensor(node.args[0])",
        "or False",
    ): "what is sliced is one tensor",
}
