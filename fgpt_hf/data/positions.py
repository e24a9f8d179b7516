"""A reading position in a shard of documents."""

from typing import NamedTuple


class ShardPosition(NamedTuple):
    """A position in a shard: one of its parts, and the number of documents in that part before it."""

    part: int = 0
    documents: int = 0
