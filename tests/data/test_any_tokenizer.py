"""Rows of documents with tokenizers other than the project's: wide ids, their own ends, and their own padding."""

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fgpt_hf.config.data_options import TextSource
from fgpt_hf.config.runs import Preparation
from fgpt_hf.data.batch_fields import IGNORED
from fgpt_hf.data.batches import as_batch
from fgpt_hf.data.corpora import open_corpus
from fgpt_hf.data.packing import pack_documents
from fgpt_hf.data.prepare import prepare_documents
from fgpt_hf.data.shards import load_prepared
from fgpt_hf.data.stream import EpochPosition, TokenizerPool
from fgpt_hf.errors import UserError
from fgpt_hf.evaluation.checks import bytes_of_tokens
from fgpt_hf.tokenizer.document_encoder import PROJECT_ENCODER, DocumentEncoder
from tests.support.any_models import TEXTS, any_tokenizer, write_documents


def test_padding_that_is_the_token_between_documents_has_no_label() -> None:
    encoder = DocumentEncoder(start=9, end=None, pad=9, vocab_size=10, rules="")
    batch = as_batch(np.array([[9, 1, 2, 9, 3, 9, 9]], dtype=np.uint16), encoder)
    assert batch["labels"].tolist() == [[9, 1, 2, 9, 3, IGNORED, IGNORED]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 0]]
    assert batch["document_ends"].tolist() == [[3, 5, 7, 7]]


def test_documents_stand_between_a_llamas_beginning_and_end() -> None:
    tokenizer = any_tokenizer("llama")
    encoder = DocumentEncoder.of(tokenizer)
    rows = pack_documents(encoder.encode(["The river", "A market"]), 24, encoder).ids
    text = tokenizer.decode(rows[0]).removesuffix("</s>" * int((rows[0] == encoder.pad).sum() - 2))
    assert sorted(text.split("<s>")) == ["", "A market</s>", "The river</s>"]


def test_rows_that_are_not_packed_hold_one_document_each_and_have_no_positions() -> None:
    encoder = replace(DocumentEncoder.of(any_tokenizer("gpt2")), packs=False)
    documents = encoder.encode(TEXTS[:5])
    packed = pack_documents(documents, 64, encoder)
    assert len(packed.ids) == 5 and (packed.ids[:, 0] == encoder.start).all()
    assert as_batch(packed.ids, encoder).keys() == {"input_ids", "labels"}


@pytest.mark.slow
def test_processes_and_threads_make_the_same_rows_of_32_bits(tmp_path: Path) -> None:
    source = TextSource(dataset_name=str(write_documents(tmp_path / "documents.jsonl")), max_position_embeddings=32)
    encoder, rows = DocumentEncoder.of(any_tokenizer("qwen3")), []
    for in_processes in (False, True):
        with closing(TokenizerPool(source, 2, in_processes, encoder=encoder)) as pool:
            (buffer,) = pool.packed_buffers(open_corpus(source), EpochPosition())
        rows.append(buffer.rows["train"].ids)
    assert rows[0].dtype == np.uint32 and np.array_equal(*rows)


@pytest.mark.slow
def test_a_prepared_folder_names_its_tokenizer_by_content(tmp_path: Path) -> None:
    tokenizer = any_tokenizer("qwen3")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    source = {"dataset_name": str(write_documents(tmp_path / "documents.jsonl")), "max_position_embeddings": 32}
    rows = tmp_path / "rows"
    prepare_documents(Preparation(**source, tokenizer=str(tmp_path / "tokenizer"), output_dir=str(rows)))
    encoder = DocumentEncoder.of(tokenizer)
    train = load_prepared(rows, 32, encoder=encoder).rows["train"]
    assert train[[0]].dtype == np.uint32 and train[[0]][0, 0] == encoder.start > 1 << 16
    for other in (PROJECT_ENCODER, DocumentEncoder.of(any_tokenizer("gpt2"))):
        with pytest.raises(UserError, match="was prepared with another tokenizer than .*: prepare it with --tokenizer"):
            load_prepared(rows, 32, encoder=other)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_bytes_of_tokens_add_up_to_those_of_the_text(name: str) -> None:
    tokenizer = any_tokenizer(name)
    ids = tokenizer("naïve Čechy <0x0A>", add_special_tokens=False)["input_ids"]
    assert bytes_of_tokens(tokenizer, len(tokenizer))[ids].sum() == len("naïve Čechy <0x0A>".encode())
