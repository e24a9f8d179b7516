"""Compare packings: how many tokens each loses and how much it pads, on documents of the embedded corpus.

`python benchmarks/packing.py [--documents 8000] [--row_length 256]` prints a row of a table for each. `bfd` and
`bfd_split` are run by TRL itself (`trl.pack_dataset`); nanochat's and one stream are written after their loaders.
A document is its tokens with an `<|endoftext|>` in front; the separators do not count as tokens.
"""

import argparse
from bisect import bisect_right, insort
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from datasets import Dataset, disable_progress_bars
from trl import pack_dataset

from fgpt_hf.data.packing import best_fit_decreasing
from fgpt_hf.data.pydocs import load_pydocs
from fgpt_hf.tokenizer.fast_encoding import encode_documents

BUFFER_OF_NANOCHAT = 1000  # documents that it chooses from


class PackingStats(NamedTuple):
    """What a packing does with the documents' tokens; padding counts tokens of the rows."""

    kept: int
    lost: int
    padding: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=8000)
    parser.add_argument("--row_length", type=int, default=256)
    options = parser.parse_args()
    disable_progress_bars()
    texts = load_pydocs().shuffle(seed=0)[: options.documents]["text"]
    lengths = [len(ids) for ids in encode_documents(texts)]
    print(f"{len(lengths):,} documents, {sum(lengths) / len(lengths):,.0f} tokens on average")
    print("| packing | lost tokens | padding |\n|---|---|---|")
    for name, stats in compare_packings(lengths, options.row_length).items():
        lost, padding = stats.lost / sum(lengths), stats.padding / max(1, stats.kept + stats.padding)
        print(f"| {name} | {lost:.2%} ({stats.lost:,}) | {padding:.2%} |")


def compare_packings(lengths: Sequence[int], row_length: int) -> dict[str, PackingStats]:
    """Return what each packing does with documents of these lengths, by its name."""
    return {name: pack(lengths, row_length) for name, pack in PACKERS.items()}


def pack_by_cutting(lengths: Sequence[int], row_length: int) -> PackingStats:
    """Best fit of whole documents and of the pieces of long ones: `pack_documents`."""
    room = row_length - 1
    pieces = [min(room, length - start) for length in lengths for start in range(0, length, room)]
    rows = best_fit_decreasing([piece + 1 for piece in pieces], row_length)
    return PackingStats(sum(lengths), 0, len(rows) * row_length - sum(pieces) - len(pieces))


def pack_with_trl(strategy: str) -> Callable[[Sequence[int], int], PackingStats]:
    """Return a packing by TRL, where pieces after a document's first have no separator in front."""

    def pack(lengths: Sequence[int], row_length: int) -> PackingStats:
        documents = [[0, *[1] * length] for length in lengths]
        rows = [] if not documents else _packed_by_trl(documents, row_length, strategy)
        kept = sum(map(sum, rows))
        return PackingStats(kept, sum(lengths) - kept, sum(row_length - len(row) for row in rows))

    return pack


def _packed_by_trl(documents: list[list[int]], row_length: int, strategy: str) -> list[list[int]]:
    dataset = Dataset.from_dict({"input_ids": documents})
    options = {"batch_size": len(documents), "keep_in_memory": True}  # all documents at once, as the others have them
    return list(pack_dataset(dataset, row_length, strategy, map_kwargs=options)["input_ids"])


def pack_by_cropping(lengths: Sequence[int], row_length: int) -> PackingStats:
    """Take the longest document that fits, and where none fits the shortest one's beginning: nanochat's loader.

    The last row, which no document fills, is dropped.
    """
    waiting = iter(lengths)
    buffer = sorted(length + 1 for _, length in zip(range(BUFFER_OF_NANOCHAT), waiting))  # noqa: B905
    kept = row_kept = used = 0
    while buffer:
        fitting = bisect_right(buffer, row_length - used)
        length = buffer.pop(fitting - 1 if fitting else 0)
        taken = min(length, row_length - used)
        used, row_kept = used + taken, row_kept + taken - 1
        if used == row_length:
            kept, used, row_kept = kept + row_kept, 0, 0
        if (following := next(waiting, None)) is not None:
            insort(buffer, following + 1)
    return PackingStats(kept, sum(lengths) - kept, 0)


def pack_as_one_stream(lengths: Sequence[int], row_length: int) -> PackingStats:
    """Cut one stream anywhere: nanoGPT and the `run_clm` of transformers. Rows begin inside documents."""
    kept, used = 0, 0
    stream = sum(lengths) + len(lengths)
    whole = stream - stream % row_length
    for length in lengths:
        kept += min(length, max(0, whole - used - 1))
        used += length + 1
    return PackingStats(kept, sum(lengths) - kept, 0)


PACKERS: Mapping[str, Callable[[Sequence[int], int], PackingStats]] = {
    "best fit, long documents cut into pieces: this project": pack_by_cutting,
    "best fit, long documents split: TRL's `bfd_split`": pack_with_trl("bfd_split"),
    "best fit, long documents truncated: TRL's `bfd`": pack_with_trl("bfd"),
    "best fit, cropped to the row: nanochat": pack_by_cropping,
    "one stream cut anywhere: nanoGPT, TRL's `wrapped`": pack_as_one_stream,
}


if __name__ == "__main__":
    main()
