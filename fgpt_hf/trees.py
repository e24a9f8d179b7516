"""Rows of tokens that begin alike, packed into one sequence in which the shared beginning stands once.

    tokens      c0 c1 c2  a3 a4  b3 b4 b5         c: shared context, a and b: two endings, numbered by position
    a4 sees     c0 c1 c2  a3 a4
    b4 sees     c0 c1 c2         b3 b4

Legend: R trees of a batch, L length of the longest, N scored tokens of them all.
"""

from collections.abc import Hashable, Iterator, Sequence
from itertools import takewhile
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

SHARED, PADDING = 0, -1  # what a position can be besides a part of branch 1, 2, …


class Row(NamedTuple):
    """Token ids of which a model scores the last `scored`, each from all that stand before it."""

    ids: Sequence[int]
    scored: int


class Tree(NamedTuple):
    """Rows as one sequence: what the network reads, and where it predicts what.

    Attributes:
        keys: a name for each row.
        ids, positions, branches: of each token that is read; the last token of a row is only predicted.
        sources: indices into `ids`, of the tokens from which the targets are predicted.
        targets: the scored tokens.
        owners: indices into `keys`, of the rows that the targets belong to.
    """

    keys: Sequence[Hashable]
    ids: list[int]
    positions: list[int]
    branches: list[int]
    sources: list[int]
    targets: list[int]
    owners: list[int]


def plant(keys: Sequence[Hashable], rows: Sequence[Row]) -> Tree:
    """Pack rows, each of which has a context of a token or more, into a tree."""
    contexts = [row.ids[: -row.scored] for row in rows]
    shared = sum(1 for _ in takewhile(lambda ids: len(set(ids)) == 1, zip(*contexts, strict=False)))
    tree = Tree(keys, list(rows[0].ids[:shared]), list(range(shared)), [SHARED] * shared, [], [], [])
    for number, row in enumerate(rows):
        offset = len(tree.ids) - shared
        read = len(row.ids) - 1
        tree.ids.extend(row.ids[shared:read])
        tree.positions.extend(range(shared, read))
        tree.branches.extend([number + 1] * (read - shared))
        predicting = range(len(row.ids) - row.scored - 1, read)
        tree.sources.extend(index if index < shared else index + offset for index in predicting)
        tree.targets.extend(row.ids[-row.scored :])
        tree.owners.extend([number] * row.scored)
    return tree


def batches(trees: Sequence[Tree], max_tokens: int) -> Iterator[list[Tree]]:
    """Trees in batches of `max_tokens` or less, padding included; a longer tree is a batch by itself.

    The longest come first, so that a lack of memory shows at once, and no batch depends on the order of the trees.
    """
    batch: list[Tree] = []
    for tree in sorted(trees, key=lambda tree: (-len(tree.ids), tree.ids, tree.targets)):
        if batch and (len(batch) + 1) * len(batch[0].ids) > max_tokens:
            yield batch
            batch = []
        batch.append(tree)
    if batch:
        yield batch


class Tensors(NamedTuple):
    """A batch: `input_ids`, `position_ids`, `branches` `(R, L)`; `sources`, flat indices into them, `targets` and
    `owners`, indices into the keys of all trees, `(N,)`."""

    input_ids: Tensor
    position_ids: Tensor
    branches: Tensor
    sources: Tensor
    targets: Tensor
    owners: Tensor


def as_tensors(trees: Sequence[Tree]) -> Tensors:
    """A batch of trees, padded on the right."""
    length = max(len(tree.ids) for tree in trees)
    padded = np.zeros((3, len(trees), length), dtype=np.int64)
    padded[2] = PADDING
    for number, tree in enumerate(trees):
        padded[:, number, : len(tree.ids)] = tree.ids, tree.positions, tree.branches
    keys_before = np.cumsum([0, *(len(tree.keys) for tree in trees)])
    sources = [number * length + source for number, tree in enumerate(trees) for source in tree.sources]
    owners = [keys_before[number] + owner for number, tree in enumerate(trees) for owner in tree.owners]
    targets = [target for tree in trees for target in tree.targets]
    return Tensors(*torch.from_numpy(padded), *map(torch.tensor, (sources, targets, owners)))


def attention_mask(branches: Tensor) -> Tensor:
    """Which tokens see which, `(R, 1, L, L)` bool: each sees the shared ones and its own branch, up to itself."""
    queries, keys = branches[:, :, None], branches[:, None, :]
    seen = ((keys == SHARED) | (keys == queries)).tril()
    return seen[:, None]
