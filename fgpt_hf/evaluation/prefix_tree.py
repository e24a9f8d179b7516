"""Merge token rows with a common beginning into one sequence that holds the shared tokens once: a prefix tree.

    rows        c0 c1 c2 a3 a4    c0 c1 c2 a3 b4 b5    the numbers are positions
    tree        c0 c1 c2 a3 b4                         the last token of a row is predicted and need not be read
    b4 sees     c0 c1 c2 a3 b4                         its ancestors and itself, and no token of another row

Legend: R trees of a batch, L tokens of the longest one, P source tokens (those that others are predicted from),
N targets (scored tokens).
"""

from collections.abc import Hashable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


class Row(NamedTuple):
    """Token ids, the last `scored` of which are scored, each given all the tokens before it."""

    ids: Sequence[int]
    scored: int


class PrefixTree(NamedTuple):
    """Rows as one sequence: the tokens to read, and the tokens to predict from them.

    Attributes:
        keys: a name for each row.
        token_ids: the tokens to read; a parent comes before its children.
        parents: for each token, the index of the token before it in its rows, or -1 at the beginning.
        source_tokens: indices into `token_ids` of the tokens that others are predicted from, each once.
        source_of_target: for each target, the index of its source in `source_tokens`.
        target_ids: the scored tokens.
        row_of_target: for each target, the index of its row in `keys`.
    """

    keys: Sequence[Hashable]
    token_ids: list[int]
    parents: list[int]
    source_tokens: list[int]
    source_of_target: list[int]
    target_ids: list[int]
    row_of_target: list[int]


def build_prefix_tree(keys: Sequence[Hashable], rows: Sequence[Row]) -> PrefixTree:
    """Merge rows into a tree. Each row has at least one token before its scored ones.

    Example:
        >>> tree = build_prefix_tree("ab", [Row((1, 2, 3), 1), Row((1, 2, 4), 1)])
        >>> tree.token_ids, tree.source_tokens, tree.target_ids
        ([1, 2], [1], [3, 4])
    """
    tree = PrefixTree(keys, [], [], [], [], [], [])
    index_of: dict[tuple[int, int], int] = {}  # (parent, token id) to the token's index
    source_of: dict[int, int] = {}  # a token's index to its index among the sources
    for row_index, row in enumerate(rows):
        last = -1
        for position, token_id in enumerate(row.ids):
            if position >= len(row.ids) - row.scored:
                tree.source_of_target.append(source_of.setdefault(last, len(source_of)))
                tree.target_ids.append(token_id)
                tree.row_of_target.append(row_index)
            if position < len(row.ids) - 1:
                parent, last = last, index_of.setdefault((last, token_id), len(index_of))
                if last == len(tree.token_ids):
                    tree.token_ids.append(token_id)
                    tree.parents.append(parent)
    tree.source_tokens.extend(source_of)
    return tree


def batch_trees(trees: Sequence[PrefixTree], max_tokens: int) -> Iterator[list[PrefixTree]]:
    """Yield batches of at most `max_tokens` tokens, padding included; a longer tree is a batch by itself.

    The longest trees come first, so that a lack of memory shows at once, and no batch depends on the order of `trees`.
    """
    batch: list[PrefixTree] = []
    for tree in sorted(trees, key=lambda tree: (-len(tree.token_ids), tree.token_ids, tree.target_ids)):
        if batch and (len(batch) + 1) * len(batch[0].token_ids) > max_tokens:
            yield batch
            batch = []
        batch.append(tree)
    if batch:
        yield batch


class TreeBatch(NamedTuple):
    """Trees as tensors, padded on the right. Indices count through all trees of the batch.

    Attributes:
        input_ids: `(R, L)`.
        position_ids: `(R, L)`, the number of a token's ancestors.
        is_token: `(R, L)` bool, false at padding.
        visible: `(R, L, L)` bool, the tokens that each token attends to: its ancestors and itself.
        source_tokens: `(P,)`, indices into the flattened `(R, L)` tokens.
        source_of_target: `(N,)`, indices into `source_tokens`.
        target_ids: `(N,)`.
        row_of_target: `(N,)`, indices into the keys of all trees.
    """

    input_ids: Tensor
    position_ids: Tensor
    is_token: Tensor
    visible: Tensor
    source_tokens: Tensor
    source_of_target: Tensor
    target_ids: Tensor
    row_of_target: Tensor


def collate_trees(trees: Sequence[PrefixTree]) -> TreeBatch:
    """Pad and stack trees."""
    length = max(len(tree.token_ids) for tree in trees)
    input_ids = np.zeros((len(trees), length), dtype=np.int64)
    visible = np.zeros((len(trees), length, length), dtype=bool)
    for index, tree in enumerate(trees):
        input_ids[index, : len(tree.token_ids)] = tree.token_ids
        visible[index] = _visible_tokens(tree.parents, length)
    sources = [tree.source_tokens for tree in trees]
    arrays = {
        "input_ids": input_ids,
        "position_ids": visible.sum(axis=2) - 1,
        "is_token": np.arange(length) < np.array([[len(tree.token_ids)] for tree in trees]),
        "visible": visible,
        "source_tokens": _joined(sources, [length] * len(trees)),
        "source_of_target": _joined([tree.source_of_target for tree in trees], list(map(len, sources))),
        "target_ids": np.concatenate([tree.target_ids for tree in trees]),
        "row_of_target": _joined([tree.row_of_target for tree in trees], [len(tree.keys) for tree in trees]),
    }
    return TreeBatch(**{name: torch.from_numpy(array) for name, array in arrays.items()})


def _visible_tokens(parents: Sequence[int], length: int) -> npt.NDArray[np.bool_]:
    """Return which of `length` tokens each one attends to, `(length, length)`; padding attends to itself alone."""
    visible = np.eye(length, dtype=bool)
    for token, parent in enumerate(parents):
        if parent >= 0:
            visible[token] |= visible[parent]
    return visible


def _joined(indices: Sequence[Sequence[int]], sizes: Sequence[int]) -> npt.NDArray[np.int64]:
    """Join the indices of all trees, each moved by the `sizes` of the trees before it."""
    offsets = np.cumsum([0, *sizes])
    return np.concatenate([np.array(own) + offset for own, offset in zip(indices, offsets, strict=False)])
