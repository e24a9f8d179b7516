"""Every form of a user's own text gives its exact number of documents, and what is left out is said."""

import bz2
import gzip
import json
import logging
import lzma
import os
from collections.abc import Callable
from pathlib import Path

import pandas
import pyarrow
import pyarrow.csv
import pyarrow.ipc
import pyarrow.parquet
import pytest

from fgpt_hf.config.data_options import TextSource
from fgpt_hf.data import file_scans, local_files, local_text
from fgpt_hf.data.corpora import open_corpus
from fgpt_hf.data.positions import ShardPosition
from fgpt_hf.errors import UserError

POEMS = ["Roses are red.", "Violets are blue,\nsugar is sweet.", "And so are you."]
LINES = "".join(json.dumps({"id": n, "text": poem}) + "\n" for n, poem in enumerate(POEMS))


def texts_of(name: object, **settings: object) -> list[str]:
    shards = open_corpus(TextSource(dataset_name=str(name), **settings))
    return [text for shard in shards for texts, _ in shard.read(ShardPosition()) for text in texts if text]


@pytest.fixture
def report(caplog: pytest.LogCaptureFixture) -> Callable[[], str]:
    caplog.set_level(logging.INFO)
    local_files.log_once.cache_clear()
    return lambda: caplog.text


# Every form as a file


def test_a_file_of_text_is_one_document(tmp_path: Path) -> None:
    for ending in (".txt", ".text", ".md", ".MD", ".markdown", ".rst"):
        (tmp_path / f"a{ending}").write_text("\n\n".join(POEMS))
        assert texts_of(tmp_path / f"a{ending}") == ["\n\n".join(POEMS)]


@pytest.mark.parametrize("ending", ["", ".gz", ".bz2", ".xz", ".zst"])
def test_rows_and_texts_are_read_compressed_or_not(tmp_path: Path, ending: str) -> None:
    compress: dict[str, Callable[[bytes], bytes]] = {
        "": bytes,
        ".gz": gzip.compress,
        ".bz2": bz2.compress,
        ".xz": lzma.compress,
        ".zst": lambda content: pyarrow.compress(content, codec="zstd", asbytes=True),
    }
    (tmp_path / f"lines.JSONL{ending}").write_bytes(compress[ending](LINES.encode()))
    (tmp_path / f"poem.txt{ending.upper()}").write_bytes(compress[ending](b"Alone."))
    assert texts_of(tmp_path / f"lines.JSONL{ending}") == POEMS
    assert texts_of(tmp_path) == [*POEMS, "Alone."]


JSON = {
    "lines": LINES,
    "lines and empty ones": "\n" + LINES.replace("\n", "\r\n\r\n"),
    "a list": json.dumps([json.loads(line) for line in LINES.splitlines()], indent=1),
    "a list of texts": json.dumps(POEMS),
    "texts as lines": "".join(json.dumps(poem) + "\n" for poem in POEMS),
    "a list under a name": json.dumps({"version": 1, "data": [{"text": poem} for poem in POEMS]}),
    "columns": json.dumps({"id": [1, 2, 3], "text": POEMS}),
    "pandas' columns": pandas.DataFrame({"id": [1, 2, 3], "text": POEMS}).to_json(),
}


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize("form", JSON)
def test_json_in_every_form_gives_three_documents(tmp_path: Path, name: str, form: str) -> None:
    (tmp_path / name).write_text(JSON[form])
    assert texts_of(tmp_path / name) == POEMS


def test_one_object_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"title": "Poem", "text": POEMS[0]}, indent=2))
    assert texts_of(tmp_path / "a.json") == POEMS[:1]


@pytest.mark.parametrize(("ending", "delimiter"), [("csv", ","), ("CSV", ";"), ("tsv", "\t")])
def test_tables_as_text_give_a_document_for_each_row(tmp_path: Path, ending: str, delimiter: str) -> None:
    pandas.DataFrame({"id": [1, 2, 3], "text": POEMS}).to_csv(tmp_path / f"a.{ending}", sep=delimiter, index=False)
    assert texts_of(tmp_path / f"a.{ending}") == POEMS


KINDS = {
    "text": pyarrow.array(POEMS),
    "large text": pyarrow.array(POEMS, pyarrow.large_string()),
    "a category": pyarrow.array(POEMS).dictionary_encode(),
    "a view": pyarrow.array(POEMS, pyarrow.string_view()),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_column_of_any_kind_of_text_is_read(tmp_path: Path, kind: str) -> None:
    table = pyarrow.table({"id": [1, 2, 3], "text": KINDS[kind]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    with pyarrow.OSFile(str(tmp_path / "file.arrow"), "wb") as file, pyarrow.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    with pyarrow.OSFile(str(tmp_path / "s.arrow"), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    for name in ("a.parquet", "file.arrow", "s.arrow"):
        assert texts_of(tmp_path / name) == POEMS, name


def test_the_category_of_a_data_frame_is_read(tmp_path: Path) -> None:
    pandas.DataFrame({"text": pandas.Categorical([*POEMS, None])}).to_parquet(tmp_path / "a.parquet")
    assert texts_of(tmp_path / "a.parquet") == POEMS


def test_a_page_of_html_is_its_text(tmp_path: Path) -> None:
    pytest.importorskip("bs4")
    (tmp_path / "a.HTML").write_text(
        "<html><head><title>Poems</title><style>p {}</style></head><body><nav>Menu</nav><!-- draft -->"
        "<h1>Poems</h1><p>Roses\n are <b>red</b>.<br>Violets are <i>blue</i>.</p><script>x()</script></body></html>"
    )
    assert texts_of(tmp_path / "a.HTML") == ["Poems\n\nRoses are red.\nViolets are blue."]


# Separators


def test_stories_between_lines_of_endoftext_are_documents(tmp_path: Path, report: Callable[[], str]) -> None:
    (tmp_path / "a.txt").write_text("\n<|endoftext|>\n".join([*POEMS, ""]))
    assert texts_of(tmp_path / "a.txt") == POEMS
    assert f"divided into documents at separators: {tmp_path / 'a.txt'} (3)" in report()


def test_endoftext_within_a_line_divides_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("GPT-2 ends with <|endoftext|> here.")
    assert len(texts_of(tmp_path / "a.txt")) == 1


@pytest.mark.parametrize("separator", ["***", r"\n\n", "-" * 3000])
def test_a_separator_divides_a_file_wherever_it_stands(tmp_path: Path, separator: str) -> None:
    text = separator.replace(r"\n", "\n").join(["x" * ((1 << 20) - 1), "y" * (1 << 20), "z"])
    (tmp_path / "a.txt").write_text(text)
    assert [each[0] for each in texts_of(tmp_path / "a.txt", document_separator=separator)] == ["x", "y", "z"]


# Folders, globs and mixtures


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    files = {
        "train.txt": "One.",
        "sub/test.md": "Two.",
        "sub/deep/validation.TXT": "Three.",
        "sub/copy.txt": "One.",
        "empty.txt": " \n",
        "picture.png": "not text",
        ".hidden/secret.txt": "Nobody reads this.",
        ".notes.txt": "Nor this.",
    }
    for name, text in files.items():
        (tmp_path / "my" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "my" / name).write_text(text)
    return tmp_path / "my"


def test_every_file_of_a_folder_is_read_and_the_rest_is_said(folder: Path, report: Callable[[], str]) -> None:
    assert sorted(texts_of(folder)) == ["One.", "Three.", "Two."]
    for said in (
        f"{folder}: 5 files, 3 documents, ",
        f"left out, hidden: {folder}/.hidden/, {folder}/.notes.txt",
        f"left out, an ending of no known format: {folder}/picture.png",
        f"left out, no text: {folder}/empty.txt",
        f"left out, a repetition of an earlier document: {folder}/train.txt",
    ):
        assert said in report(), said


def test_globs_lists_limits_and_repeats(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sorted(texts_of(f"{folder}/sub/*.md,{folder}/train.txt")) == ["One.", "Two."]
    assert sorted(texts_of(f"{folder}/**/*.TXT")) == ["Three."]
    assert len(texts_of(f"{folder}:2")) == 2 and texts_of(f"{folder}:2") == texts_of(f"{folder}:2")
    shards = open_corpus(TextSource(dataset_name=f"{folder}/sub/*.md*2,{folder}/train.txt*0.5,pydocs:3"))
    assert sorted(shard.repeats for shard in shards) == [0.5, 1.0, 2.0]
    monkeypatch.setenv("HOME", str(folder))
    assert texts_of("~/sub/*.md") == ["Two."]


@pytest.mark.parametrize("name", ["a[1].txt", "b*2.txt", "c?.txt", "d,e.txt", "f:7", "g*3", "h, i"])
def test_an_existing_path_is_that_path(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / name if name.endswith(".txt") else tmp_path / name / "text.md"
    path.parent.mkdir(exist_ok=True)
    path.write_text("Read me.")
    (tmp_path / "other.txt").write_text("Other.")
    assert texts_of(name) == texts_of(tmp_path / name) == ["Read me."]
    assert sorted(texts_of(f"{name}:5*2,other.txt")) == ["Other.", "Read me."]


def test_what_datasets_saved_is_read_without_its_description(tmp_path: Path) -> None:
    from datasets import Dataset

    Dataset.from_dict({"text": POEMS}).save_to_disk(tmp_path / "saved")
    assert texts_of(tmp_path / "saved") == POEMS


# Encodings

FRENCH = "Café au lait, déjà vu : les élèves sont arrivés à l’école."
RUSSIAN = "Мой дядя самых честных правил, когда не в шутку занемог, он уважать себя заставил."


@pytest.mark.parametrize(
    ("encoding", "text"),
    [(name, FRENCH) for name in ("utf-8", "utf-8-sig", "utf-16", "utf-32", "cp1252")]
    + [("cp1251", RUSSIAN), ("shift_jis", "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。")],
)
def test_encodings_are_recognized(tmp_path: Path, encoding: str, text: str) -> None:
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    (tmp_path / "b.csv").write_bytes(f"text,id\n{text.replace(',', ';')} 2,1\n".encode(encoding))
    (tmp_path / "c.jsonl").write_bytes(json.dumps({"text": f"{text} 3"}, ensure_ascii=False).encode(encoding))
    assert texts_of(tmp_path) == [text, f"{text.replace(',', ';')} 2", f"{text} 3"]


def test_bytes_that_are_no_text_are_named_with_the_option(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"text" + bytes(range(256)))
    with pytest.raises(UserError, match=r"a\.txt cannot be read as text: byte 132 .*--encoding"):
        texts_of(tmp_path)
    with pytest.raises(UserError, match=r"a\.txt is not ascii text: byte .*--encoding"):
        texts_of(tmp_path, encoding="ascii")
    (tmp_path / "a.txt").write_bytes("Größe".encode("cp437"))
    assert texts_of(tmp_path, encoding="cp437") == ["Größe"]


# Columns


def test_columns_that_nobody_asked_for_do_not_matter(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"text": f"Document {n}", "id": n, "note": None} for n in range(3000)]
    rows += [{"text": "Another", "id": "x", "note": "Words", "late": [{"a": 1}]}, {"id": 7, "note": {"b": 2}}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "b.jsonl").write_text('{"text": "Last", "id": [1]}\n')
    assert len(texts_of(tmp_path)) == 3002


@pytest.mark.parametrize(
    ("row", "column"),
    [
        ({"title": "A title of it", "text": "The text"}, "text"),
        ({"title": "A title of it", "Content": "The text"}, "Content"),
        ({"id": "a7", "url": "https://example.org", "story_of_it": "The text"}, "story_of_it"),
    ],
)
def test_the_column_of_the_text_is_found_and_said(
    tmp_path: Path, row: dict[str, str], column: str, report: Callable[[], str]
) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    assert texts_of(tmp_path / "a.jsonl") == ["The text"]
    assert f"documents are in the column {column} of 1 file" in report()


# Bad input


def test_what_cannot_be_read_is_one_line_with_what_would_work(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "pictures").mkdir()
    files = {
        "pictures/a.png": "",
        "blank.txt": "\n",
        "texts.tar.gz": "",
        "plain.csv": "It was the best of times\nIt was the worst of times\n",
        "two.csv": "first,second\nSome words,Other words\n",
        "chats.jsonl": '{"messages": []}\n{"messages": []}\n',
        "locked.pdf": "%PDF-1.4 nothing",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    answers = {
        "empty": "the folder is empty; files may end in .txt",
        "pictures": "no readable file (an ending of no known format: ",
        "blank.txt": "no text in ",
        "texts.tar.gz": "no readable file (an archive, which must be unpacked first: ",
        "plain.csv": "has no header: its first line should name the columns, such as text",
        "two.csv": "give the one of the documents as --text_column_name, one of first, second",
        "chats.jsonl": ": conversations are for train_instruct.py",
        "locked.pdf": "locked.pdf cannot be read, it may be damaged",
        "no/*.txt": "no file matches this glob",
        "none.txt": "there is no such file",
    }
    for name, answer in answers.items():
        with pytest.raises(UserError) as error:
            texts_of(tmp_path / name)
        assert answer in str(error.value), name


def pdf_of(*pages: str) -> bytes:
    """Return a PDF with a line of text on each page."""
    kids = " ".join(f"{3 + 2 * number} 0 R" for number in range(len(pages)))
    font = "<< /Font << /F1 << /Type /Font /Subtype /Type1 /BaseFont /Helvetica >> >> >>"
    objects = ["<< /Type /Catalog /Pages 2 0 R >>", f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>"]
    for number, text in enumerate(pages):
        content = f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET"
        where = f"/Parent 2 0 R /MediaBox [0 0 612 792] /Contents {4 + 2 * number} 0 R"
        objects += [f"<< /Type /Page {where} /Resources {font} >>"]
        objects += [f"<< /Length {len(content)} >>\nstream\n{content}\nendstream"]
    body, offsets = "%PDF-1.4\n", []
    for number, each in enumerate(objects, start=1):
        offsets.append(len(body))
        body += f"{number} 0 obj\n{each}\nendobj\n"
    table = "".join(f"{offset:010} 00000 n \n" for offset in offsets)
    size = len(objects) + 1
    trailer = f"trailer\n<< /Root 1 0 R /Size {size} >>\nstartxref\n{len(body)}\n%%EOF\n"
    return f"{body}xref\n0 {size}\n0000000000 65535 f \n{table}{trailer}".encode()


def test_a_pdf_is_the_text_of_its_pages(tmp_path: Path, report: Callable[[], str]) -> None:
    pytest.importorskip("pypdf")
    (tmp_path / "poems.PDF").write_bytes(pdf_of(POEMS[0], POEMS[2]))
    assert texts_of(tmp_path) == [f"{POEMS[0]}\n\n{POEMS[2]}"]
    assert "1 file, 1 document, 31 characters" in report()


def test_a_pdf_without_text_is_left_out_with_what_would_help(tmp_path: Path) -> None:
    pypdf = pytest.importorskip("pypdf")
    writer = pypdf.PdfWriter()
    writer.add_blank_page(100, 100)
    writer.write(tmp_path / "scan.pdf")
    with pytest.raises(UserError, match=r"a PDF without text: .*ocrmypdf: .*scan\.pdf"):
        texts_of(tmp_path / "scan.pdf")


@pytest.mark.parametrize("encoding", ["klingon", "rot13"])
def test_an_encoding_that_is_none_is_refused(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.txt").write_text("Roses")
    with pytest.raises(UserError, match=f"encoding={encoding} is unknown: give one of Python's, such as cp1252"):
        texts_of(tmp_path, encoding=encoding)


def test_links_that_lead_in_circles_or_nowhere_are_followed_once_or_named(
    tmp_path: Path, report: Callable[[], str]
) -> None:
    (tmp_path / "a.txt").write_text("Roses")
    (tmp_path / "again").symlink_to(tmp_path)
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere.txt")
    assert texts_of(tmp_path) == ["Roses"]
    assert f"left out, a link to nothing: {tmp_path / 'gone.txt'}" in report()


def test_a_missing_library_is_named_with_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "bs4", None)
    monkeypatch.setitem(__import__("sys").modules, "pypdf", None)
    (tmp_path / "a.html").write_text("<p>Text")
    (tmp_path / "a.pdf").write_text("%PDF")
    for name in ("a.html", "a.pdf"):
        with pytest.raises(UserError, match=r"fgpt-hf\[documents\]"):
            texts_of(tmp_path / name)


def test_a_folder_that_one_may_not_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)  # as root, tests may read everything
    with pytest.raises(UserError, match="cannot be read: Permission denied"):
        texts_of(tmp_path)


def test_a_file_that_changes_while_it_is_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("One.")
    (shard,) = open_corpus(TextSource(dataset_name=str(path)))
    os.utime(path, (1, 1))  # the content is what counts
    assert list(shard.read(ShardPosition()))
    path.write_text("Two.")
    with pytest.raises(UserError, match=r"a\.txt changed while it was read"):
        list(shard.read(ShardPosition()))


# Position and identity


def test_many_small_files_make_one_shard_that_can_be_read_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_text, "DOCUMENTS_AT_ONCE", 7)
    for number in range(20):
        (tmp_path / f"{number:02}.txt").write_text(f"Document {number}")
    (tmp_path / "30.jsonl").write_text(LINES)
    (shard,) = open_corpus(TextSource(dataset_name=str(tmp_path)))
    everything = [text for texts, _ in shard.read(ShardPosition()) for text in texts]
    assert len(everything) == 23
    for start in range(23):
        assert [text for texts, _ in shard.read(ShardPosition(0, start)) for text in texts] == everything[start:]


def test_the_identity_is_the_content_and_how_it_is_read(tmp_path: Path) -> None:
    def version(**settings: str) -> str:
        (shard,) = open_corpus(TextSource(dataset_name=str(tmp_path), **settings))
        return shard.version

    (tmp_path / "a.txt").write_text("One.***Two.")
    first = version()
    assert version() == first != version(document_separator="***")
    (tmp_path / "a.txt").rename(tmp_path / "b.txt")
    assert version() == first
    (tmp_path / "b.txt").write_text("One.***Too.")
    assert version() != first


def test_a_scan_of_large_files_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_scans, "SMALL_BYTES", 1)
    monkeypatch.setattr(file_scans, "HF_HOME", str(tmp_path / "cache"))
    (tmp_path / "a.jsonl").write_text(LINES + LINES)
    assert texts_of(tmp_path / "a.jsonl") == POEMS
    monkeypatch.setattr(file_scans, "_scan", None)
    assert texts_of(tmp_path / "a.jsonl") == POEMS
