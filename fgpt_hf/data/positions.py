"""The parts in which a shard of documents is read, and a position in it."""

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

DOCUMENTS_AT_ONCE = 1000  # that a shard gives, at most


class ShardPosition(NamedTuple):
    """A position in a shard: one of its parts, and the number of documents in that part before it."""

    part: int = 0
    documents: int = 0


Texts: TypeAlias = tuple[Sequence[str | None], ShardPosition]  # of one part of a shard, and the position after them
