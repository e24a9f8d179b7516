"""Rows of tokens that begin alike, packed into one sequence in which what they share stands once: a prefix tree.

    rows        c0 c1 c2 a3 a4    c0 c1 c2 a3 b4 b5    the numbers are positions
    tree        c0 c1 c2 a3 b4                         the last token of a row is predicted and need not be read
    b4 sees     c0 c1 c2 a3 b4                         its ancestors, and no token of another row

Legend: R trees of a batch, L length of the longest, P tokens from which others are predicted, N scored tokens.
"""

from collections.abc import Hashable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


class Row(NamedTuple):
    """Token ids of which a model scores the last `scored`, each from all that stand before it."""

    ids: Sequence[int]
    scored: int


class Tree(NamedTuple):
    """Rows as one sequence: what the network reads, and what it predicts where.

    Attributes:
        keys: a name for each row.
        ids, parents: of each token that is read, in an order in which parents, -1 for none, come before their children.
        sources: indices into `ids` of the tokens from which others are predicted, each once.
        places, targets, owners: of each scored token: the index of its source, itself, the index of its row's key.
    """

    keys: Sequence[Hashable]
    ids: list[int]
    parents: list[int]
    sources: list[int]
    places: list[int]
    targets: list[int]
    owners: list[int]


def build_prefix_tree(keys: Sequence[Hashable], rows: Sequence[Row]) -> Tree:
    """Pack rows, each of which has a token or more before the scored ones, into a tree."""
    tree = Tree(keys, [], [], [], [], [], [])
    nodes: dict[tuple[int, int], int] = {}  # (parent, id) to index
    place_of: dict[int, int] = {}  # source to its index
    for owner, row in enumerate(rows):
        node = -1
        for number, token in enumerate(row.ids):
            if number >= len(row.ids) - row.scored:
                tree.places.append(place_of.setdefault(node, len(place_of)))
                tree.targets.append(token)
                tree.owners.append(owner)
            if number < len(row.ids) - 1:
                parent, node = node, nodes.setdefault((node, token), len(nodes))
                if node == len(tree.ids):
                    tree.ids.append(token)
                    tree.parents.append(parent)
    tree.sources.extend(place_of)
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
    """A batch, padded on the right.

    Attributes:
        input_ids, position_ids, is_token: `(R, L)`; a position is the number of ancestors.
        sees: `(R, L, L)` bool: which tokens each token sees: its ancestors and itself.
        sources: `(P,)`, flat indices into the `(R, L)` tokens.
        places, targets, owners: `(N,)`: rows of the sources, token ids, and numbers of the keys of all trees.
    """

    input_ids: Tensor
    position_ids: Tensor
    is_token: Tensor
    sees: Tensor
    sources: Tensor
    places: Tensor
    targets: Tensor
    owners: Tensor


def as_tensors(trees: Sequence[Tree]) -> Tensors:
    """A batch of trees."""
    length = max(len(tree.ids) for tree in trees)
    ids = np.zeros((len(trees), length), dtype=np.int64)
    sees = np.zeros((len(trees), length, length), dtype=bool)
    for tree, row, row_sees in zip(trees, ids, sees, strict=True):
        row[: len(tree.ids)] = tree.ids
        row_sees[:] = _ancestry(tree.parents, length)
    is_token = np.arange(length) < np.array([[len(tree.ids)] for tree in trees])
    sources = np.concatenate([np.array(tree.sources) + number * length for number, tree in enumerate(trees)])
    places = _numbered_through([tree.places for tree in trees], [len(tree.sources) for tree in trees])
    owners = _numbered_through([tree.owners for tree in trees], [len(tree.keys) for tree in trees])
    targets = np.concatenate([tree.targets for tree in trees])
    arrays = (ids, sees.sum(axis=2) - 1, is_token, sees, sources, places, targets, owners)
    return Tensors(*map(torch.from_numpy, arrays))


def _ancestry(parents: Sequence[int], length: int) -> npt.NDArray[np.bool_]:
    """Which of `length` tokens are each one's ancestors or itself; what lies behind the tree sees itself alone."""
    sees = np.eye(length, dtype=bool)
    for node, parent in enumerate(parents):
        if parent >= 0:
            sees[node] |= sees[parent]
    return sees


def _numbered_through(indices: Sequence[Sequence[int]], sizes: Sequence[int]) -> npt.NDArray[np.int64]:
    """Indices within each tree as indices into what all trees of the batch have, one after the other."""
    offsets = np.cumsum([0, *sizes])
    return np.concatenate([np.array(own) + offset for own, offset in zip(indices, offsets, strict=False)])
