"""Compare the speed of preparing text with a plain `multiprocessing.Pool` over tiktoken, on the same cores.

    python benchmarks/preparation.py

prints both in tokens per second, and the ratios. The peer is how nanoGPT and the original FGPT prepare FineWeb-Edu:
workers encode one document at a time and return arrays, which the parent writes. This project also splits the documents
by hash, packs them into rows and shuffles. Both pools start before the clock does.
"""

import argparse
import os
import time
from collections.abc import Callable
from contextlib import closing
from multiprocessing import get_context
from multiprocessing.pool import Pool
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import psutil
import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str

from fgpt_hf.config.data_options import TextSource
from fgpt_hf.data.corpora import open_corpus
from fgpt_hf.data.pydocs import load_pydocs
from fgpt_hf.data.splits import SPLITS
from fgpt_hf.data.stream import EpochPosition, TokenizerPool
from fgpt_hf.tokenizer.byte_bpe import ranks_of_vocabulary
from fgpt_hf.tokenizer.tokenizer import read_vocabulary

REPEATS = 3  # readings of the corpus per round, so that beginnings and ends weigh little
WORKERS = os.cpu_count() or 1


encoding: tiktoken.Encoding  # in a worker of the peer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="Number of rounds (default: 5).")
    options = parser.parse_args()
    source = TextSource(dataset_name="pydocs")
    texts = list(load_pydocs()["text"]) * REPEATS
    with (
        get_context("spawn").Pool(WORKERS, initializer=_start_peer) as peer,
        closing(TokenizerPool(source, WORKERS, in_processes=True)) as pool,
    ):
        peer.map(_encode, texts[:WORKERS], chunksize=1)
        list(pool.executor.map(abs, range(WORKERS)))
        rates: dict[str, list[Rate]] = {"peer": [], "fgpt": []}
        for _ in range(options.rounds):  # in turn: a busy machine slows both
            rates["peer"].append(_rate(lambda file: _write_with_peer(peer, texts, file)))
            rates["fgpt"].append(_rate(lambda file: _write_rows(pool, source, file)))
    for name, found in rates.items():
        print(f"{name}: rounds of {', '.join(f'{rate.per_second / 1e6:.2f}' for rate in found)} million tokens/s")
    pairs = list(zip(rates["fgpt"], rates["peer"], strict=True))
    ratio = median(ours.per_second / theirs.per_second for ours, theirs in pairs)
    cpu_ratio = median(ours.per_cpu_second / theirs.per_cpu_second for ours, theirs in pairs)
    print(
        f"preparing text with {WORKERS} workers: {ratio:.2f} times as fast as a plain Pool over tiktoken, and "
        f"{cpu_ratio:.2f} times as many tokens per core second"
    )


class Rate(NamedTuple):
    """Tokens per second of wall time, and of processor time, which other programs disturb less."""

    per_second: float
    per_cpu_second: float


def _rate(write: Callable[[Path], int]) -> Rate:
    with TemporaryDirectory() as folder:
        began, worked = time.perf_counter(), _cpu_seconds()
        tokens = write(Path(folder, "tokens.bin"))
        return Rate(tokens / (time.perf_counter() - began), tokens / (_cpu_seconds() - worked))


def _cpu_seconds() -> float:
    process = psutil.Process()
    times = [each.cpu_times() for each in (process, *process.children(recursive=True))]
    return sum(each.user + each.system for each in times)


def _write_with_peer(pool: Pool, texts: list[str], path: Path) -> int:
    tokens = 0
    with path.open("wb") as file:
        for ids in pool.imap(_encode, texts, chunksize=16):
            file.write(ids.tobytes())
            tokens += len(ids)
    return tokens


def _write_rows(pool: TokenizerPool, source: TextSource, path: Path) -> int:
    tokens = 0
    with path.open("wb") as file:
        for buffer in pool.packed_buffers([*open_corpus(source)] * REPEATS, EpochPosition()):
            for split in SPLITS:
                file.write(buffer.rows[split].ids.tobytes())
                tokens += buffer.rows[split].tokens
    return tokens


def _start_peer() -> None:
    """Create tiktoken's `gpt2` encoding from the project's vocabulary; its own loader would need a network."""
    global encoding
    ranks = ranks_of_vocabulary(read_vocabulary()[0])
    encoding = tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={})


def _encode(text: str) -> npt.NDArray[np.uint16]:
    return np.array(encoding.encode_ordinary(text), dtype=np.uint16)


if __name__ == "__main__":
    main()
