"""Compare packings: how many tokens each loses, how much it pads, and how many documents it cuts.

`python benchmarks/packing.py [--documents 8000] [--row_length 1024]` prints a table for documents of the embedded
corpus, and one for each of some other distributions of lengths. `bfd` and `bfd_split` are run by TRL itself
(`trl.pack_dataset`); nanochat's and one stream are written after their loaders. A document is its tokens with an
`<|endoftext|>` in front; the separators do not count as tokens. A document is cut that loses tokens, or is in more rows
than its length makes necessary.
"""

import argparse
from bisect import bisect_right, insort
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from datasets import Dataset, disable_progress_bars
from trl import pack_dataset

from fgpt_hf.data.packing import count_cut, plan_rows
from fgpt_hf.data.pydocs import load_pydocs
from fgpt_hf.tokenizer.document_encoder import encode_documents

BUFFER_OF_NANOCHAT = 1000  # documents that it chooses from
TOKENS_PER_WORD = 1.33


class PackingStats(NamedTuple):
    """The outcome of a packing: `kept`, `lost` and `padding` count tokens, `cut` counts documents."""

    kept: int
    lost: int
    padding: int
    cut: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=8000)
    parser.add_argument("--row_length", type=int, default=1024)
    options = parser.parse_args()
    disable_progress_bars()
    texts = load_pydocs().shuffle(seed=0)[: options.documents]["text"]
    drawn = {name: draw(np.random.default_rng(0), options.documents) for name, draw in DISTRIBUTIONS.items()}
    corpora = {"the embedded corpus": [len(ids) for ids in encode_documents(texts)]} | {
        name: np.maximum(1, lengths).astype(int).tolist() for name, lengths in drawn.items()
    }
    for name, lengths in corpora.items():
        print(f"{name}: {len(lengths):,} documents, {sum(lengths) / len(lengths):,.0f} tokens on average")
        print("| packing | lost tokens | padding | documents cut |\n|---|---|---|---|")
        for packing, stats in compare_packings(lengths, options.row_length).items():
            lost, padding = stats.lost / sum(lengths), stats.padding / max(1, stats.kept + stats.padding)
            print(f"| {packing} | {lost:.2%} | {padding:.2%} | {stats.cut / len(lengths):.1%} |")


def compare_packings(lengths: Sequence[int], row_length: int) -> dict[str, PackingStats]:
    """Return what each packing does with documents of these lengths, by its name."""
    return {name: pack(lengths, row_length) for name, pack in PACKERS.items()}


def pack_by_filling(lengths: Sequence[int], row_length: int) -> PackingStats:
    """Best fit, and where that leaves gaps documents that go on in the next row: `pack_documents`."""
    plan = plan_rows(lengths, row_length)
    padding = len(plan) * row_length - sum(lengths) - sum(map(len, plan))
    return PackingStats(sum(lengths), 0, padding, count_cut(plan, lengths, row_length))


def pack_with_trl(strategy: str) -> Callable[[Sequence[int], int], PackingStats]:
    """Return a packing by TRL, where pieces after a document's first have no separator in front."""

    def pack(lengths: Sequence[int], row_length: int) -> PackingStats:
        documents = [[0, *[1] * length] for length in lengths]
        rows = [] if not documents else _packed_by_trl(documents, row_length, strategy)
        kept = sum(map(sum, rows))
        cut = 0 if kept == sum(lengths) else sum(length >= row_length for length in lengths)
        return PackingStats(kept, sum(lengths) - kept, sum(row_length - len(row) for row in rows), cut)

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
    kept = row_kept = used = whole = row_whole = 0
    while buffer:
        fitting = bisect_right(buffer, row_length - used)
        length = buffer.pop(fitting - 1 if fitting else 0)
        taken = min(length, row_length - used)
        used, row_kept, row_whole = used + taken, row_kept + taken - 1, row_whole + (taken == length)
        if used == row_length:
            kept, whole, used, row_kept, row_whole = kept + row_kept, whole + row_whole, 0, 0, 0
        if (following := next(waiting, None)) is not None:
            insort(buffer, following + 1)
    return PackingStats(kept, sum(lengths) - kept, 0, len(lengths) - whole)


def pack_as_one_stream(lengths: Sequence[int], row_length: int) -> PackingStats:
    """Cut one stream anywhere: nanoGPT and the `run_clm` of transformers. Rows begin inside documents."""
    kept, used, cut = 0, 0, 0
    stream = sum(lengths) + len(lengths)
    whole = stream - stream % row_length
    for length in lengths:
        taken = min(length, max(0, whole - used - 1))
        rows = (used + length) // row_length - used // row_length + 1
        cut += taken < length or rows > -(-(length + 1) // row_length)
        kept, used = kept + taken, used + length + 1
    return PackingStats(kept, sum(lengths) - kept, 0, cut)


PACKERS: Mapping[str, Callable[[Sequence[int], int], PackingStats]] = {
    "best fit, then gaps filled by cutting: this project": pack_by_filling,
    "best fit, long documents split: TRL's `bfd_split`": pack_with_trl("bfd_split"),
    "best fit, long documents truncated: TRL's `bfd`": pack_with_trl("bfd"),
    "best fit, cropped to the row: nanochat": pack_by_cropping,
    "one stream cut anywhere: nanoGPT, TRL's `wrapped`": pack_as_one_stream,
}

# Lengths in tokens, given a generator of random numbers and the number of documents.
DISTRIBUTIONS: Mapping[str, Callable[[np.random.Generator, int], npt.NDArray[np.float64]]] = {
    "450 ± 60 words": lambda rng, count: TOKENS_PER_WORD * rng.normal(450, 60, count),
    "four paragraphs of 80 ± 25 words": lambda rng, count: TOKENS_PER_WORD * rng.normal(80, 25, (count, 4)).sum(axis=1),
    "150 ± 20 words": lambda rng, count: TOKENS_PER_WORD * rng.normal(150, 20, count),
    "log-normal, a median of 500 tokens": lambda rng, count: rng.lognormal(np.log(500), 1.0, count),
    "uniform, up to a row of 1,024": lambda rng, count: rng.uniform(1, 1023, count),
    "600 tokens each": lambda rng, count: np.full(count, 600.0),
}


if __name__ == "__main__":
    main()
