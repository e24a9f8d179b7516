"""Parquet shards with FineWeb-Edu's columns, and the card that names its configurations."""

import random
from pathlib import Path

import pyarrow
import pyarrow.parquet

CARD = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/*/*
- config_name: sample-10BT
  data_files:
  - split: train
    path: sample/10BT/*
---
"""


def documents(count: int, seed: int = 0, most_words: int = 120) -> list[str]:
    """Texts of words and numbers, no two the same."""
    rng = random.Random(seed)
    words = [f"{syllable}{ending}" for syllable in ("ba", "ko", "li", "mun") for ending in ("", "ter", "ning", "7")]
    return [f"{seed}.{n} " + " ".join(rng.choices(words, k=rng.randint(3, most_words))) for n in range(count)]


def write_shard(path: Path, texts: list[str], row_group_size: int = 50) -> Path:
    """One file of the dataset."""
    size = len(texts)
    columns = {
        "text": texts,
        "id": [f"<urn:uuid:{path.stem}-{n}>" for n in range(size)],
        "dump": ["CC-MAIN-2024-10"] * size,
        "url": [f"https://example.org/{n}" for n in range(size)],
        "file_path": ["s3://commoncrawl/x.warc.gz"] * size,
        "language": ["en"] * size,
        "language_score": [0.97] * size,
        "token_count": [len(text.split()) for text in texts],
        "score": [3.1] * size,
        "int_score": [3] * size,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=row_group_size)
    return path


def write_shards(folder: Path, shards: int = 3, texts: int = 130, row_group_size: int = 50) -> dict[str, Path]:
    """The files of a small FineWeb-Edu by their path in the repository, all different, in its `sample-10BT`."""
    names = [f"sample/10BT/{number:03d}_00000.parquet" for number in range(shards)]
    return {
        name: write_shard(folder / name, documents(texts, seed=number), row_group_size)
        for number, name in enumerate(names)
    }
