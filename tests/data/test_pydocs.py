"""The embedded corpus: what is in it, in which order, and how its cache behaves."""

import hashlib
import logging
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fgpt_hf.data import pydocs
from fgpt_hf.data.pydocs import Member, load_pydocs, module_members

SHAPES = '''"""Shapes in the plane."""


class Circle(Shape):
    """A round shape."""

    def area(self, precision: int = 2) -> float:
        """The area in square metres."""

    class Unit:
        """A unit of length."""

        def convert(self): "Into metres."


async def fetch(url, *, timeout=3): 'Download one shape.'
'''


def write_tree(root: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    files = {
        "shapes/__init__.py": SHAPES,
        "shapes/solids.py": '"""Solids."""\n',
        "alone.py": 'def run():\n    """Run alone."""\n',
        "alone-1.0.dist-info/METADATA": "Name: alone\nVersion: 1.0\n",
    }
    return write_tree(tmp_path / "site-packages", files)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def rows(cache: Path, *search_paths: Path) -> list[dict]:
    return load_pydocs(cache, search_paths).to_list()


def names(source: str) -> list[str]:
    return [member.name for member in module_members(source, "m")]


# ---------------------------------------------------------------------------------------------- one module's members


def test_members_come_in_source_order_with_names_kinds_and_signatures() -> None:
    assert module_members(SHAPES, "shapes") == [
        Member("shapes", "module", "", "Shapes in the plane."),
        Member("shapes.Circle", "class", "class Circle(Shape)", "A round shape."),
        Member(
            "shapes.Circle.area",
            "method",
            "Circle.area(self, precision: int=2) -> float",
            "The area in square metres.",
        ),
        Member("shapes.Circle.Unit", "class", "class Circle.Unit", "A unit of length."),
        Member("shapes.Circle.Unit.convert", "method", "Circle.Unit.convert(self)", "Into metres."),
        Member("shapes.fetch", "function", "async fetch(url, *, timeout=3)", "Download one shape."),
    ]


def test_docstrings_lose_their_indentation_and_blank_ones_do_not_count() -> None:
    source = 'def f():\n    """\n    First.\n\n        Indented.\n    """\ndef g():\n    "  "\n'
    assert [member.docstring for member in module_members(source, "m")] == ["First.\n\n    Indented."]


def test_conditional_definitions_are_members_and_those_inside_functions_are_not() -> None:
    source = (
        'try:\n    def f(): "F."\nexcept ImportError:\n    def g(): "G."\nelse:\n    def h(): "H."\n'
        'if x:\n    pass\nelif y:\n    class C:\n        with z:\n            def i(self): "I."\n'
        'def outer():\n    def inner(): "Inner."\n'
    )
    assert names(source) == ["m.f", "m.g", "m.h", "m.C.i"]


def test_of_overloads_and_property_setters_the_first_documented_definition_counts() -> None:
    source = (
        'class C:\n    @overload\n    def f(self, x: int): ...\n    def f(self, x): "Implementation."\n'
        '    @property\n    def p(self): "Getter."\n    @p.setter\n    def p(self, value): "Setter."\n'
    )
    found = module_members(source, "m")
    assert [(member.signature, member.docstring) for member in found] == [
        ("C.f(self, x)", "Implementation."),
        ("C.p(self)", "Getter."),
    ]


def test_a_very_long_signature_is_shortened() -> None:
    arguments = ", ".join(f"argument_{index}" for index in range(100))
    assert module_members(f'def f({arguments}) -> int: "F."', "m")[0].signature == "f(...) -> int"


def test_invalid_escapes_do_not_warn_and_lone_surrogates_become_question_marks(
    recwarn: pytest.WarningsRecorder,
) -> None:
    assert module_members(r'"A \d and \ud800."', "m")[0].docstring == r"A \d and ?."
    assert not recwarn.list


# ------------------------------------------------------------------------------------------------------ the dataset


def test_a_row_is_a_module_and_its_text_joins_its_members(tree: Path, cache: Path) -> None:
    alone, shapes, solids = rows(cache, tree)
    assert [alone["id"], shapes["id"], solids["id"]] == ["alone", "shapes", "shapes.solids"]
    assert alone["text"] == "alone\n\nrun()\nRun alone."
    assert solids["text"] == "shapes.solids\n\nSolids."
    assert shapes["text"].startswith(
        "shapes\n\nShapes in the plane.\n\nclass Circle(Shape)\nA round shape.\n\nCircle.area(self, "
    )
    assert [Member(**member) for member in shapes["members"]] == module_members(SHAPES, "shapes")


def test_the_order_of_the_file_system_does_not_matter(  # type: ignore[return]
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Any]:
    expected = rows(tmp_path / "a", tree)
    walk = os.walk

    def reversed_walk(root: Any) -> Iterator[Any]:
        for folder, subfolders, files in walk(root):
            subfolders.sort(reverse=True)
            yield folder, subfolders, sorted(files, reverse=True)

    monkeypatch.setattr(os, "walk", reversed_walk)
    assert rows(tmp_path / "b", tree) == expected


def test_several_processes_read_what_one_reads(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = rows(tmp_path / "a", tree)
    monkeypatch.setattr(pydocs, "FILES_PER_WORKER", 1)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert rows(tmp_path / "b", tree) == expected


def test_the_reading_processes_do_not_run_the_callers_script(tree: Path, tmp_path: Path, cache: Path) -> None:
    script = tmp_path / "unguarded.py"
    script.write_text(
        "import os\nfrom fgpt_hf.data import pydocs\nprint('ran')\n"
        f"pydocs.FILES_PER_WORKER = 1\nos.cpu_count = lambda: 2\npydocs.load_pydocs({str(cache)!r}, [{str(tree)!r}])\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(pydocs.__file__).parents[2])}
    run = subprocess.run([sys.executable, script], check=True, stdout=subprocess.PIPE, text=True, env=environment)
    assert run.stdout == "ran\n"


def test_a_docstring_of_a_vendored_copy_stays_with_the_shortest_path(tmp_path: Path, cache: Path) -> None:
    copied = 'def f(): "Copied."\n'
    files = {"pip/_vendor/rich.py": copied + 'def g(): "Old."\n', "rich.py": copied, "pip/again.py": copied}
    texts = {row["id"]: row["text"] for row in rows(cache, write_tree(tmp_path / "t", files))}
    assert texts == {"rich": "rich\n\nf()\nCopied.", "pip._vendor.rich": "pip._vendor.rich\n\ng()\nOld."}


def test_modules_are_never_imported(tmp_path: Path, cache: Path) -> None:
    mark = tmp_path / "imported"
    source = f'"""Harmless."""\nopen({str(mark)!r}, "w")\nraise SystemExit\n'
    assert len(rows(cache, write_tree(tmp_path / "t", {"trap.py": source}))) == 1
    assert not mark.exists()


def test_tests_and_the_project_itself_are_left_out(tmp_path: Path, cache: Path) -> None:
    files = {"a/tests/b.py": '"B."', "fgpt_hf/x.py": '"X."', "a/fgpt_hf.py": '"Namesake."', "a/test_utils.py": '"U."'}
    assert [row["id"] for row in rows(cache, write_tree(tmp_path / "t", files))] == ["a.fgpt_hf", "a.test_utils"]


def test_the_first_search_path_wins_and_a_package_beats_a_module(tmp_path: Path, cache: Path) -> None:
    first = write_tree(tmp_path / "1", {"a/__init__.py": '"Package."', "a.py": '"Module."'})
    second = write_tree(tmp_path / "2", {"a.py": '"Second."', "b.py": '"B."'})
    assert [row["text"] for row in rows(cache, first, second)] == ["a\n\nPackage.", "b\n\nB."]


def test_cookies_byte_order_marks_line_ends_and_form_feeds_are_read_as_python_reads_them(
    tmp_path: Path, cache: Path
) -> None:
    files = {
        "bom.py": b'\xef\xbb\xbf"""Caf\xc3\xa9."""',
        "crlf.py": b'"""One.\r\n\r\nTwo.\r\n"""\r\n',
        "feed.py": b'x = 1\n\x0c\ndef f():\n    "After a page."\n',
        "latin.py": '# -*- coding: latin-1 -*-\n"""Naïve."""\n'.encode("latin-1"),
    }
    texts = [row["members"][0]["docstring"] for row in rows(cache, write_tree(tmp_path / "t", files))]
    assert texts == ["Café.", "One.\n\nTwo.", "After a page.", "Naïve."]


def test_files_that_cannot_be_read_are_skipped_and_counted(
    tree: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = rows(cache, tree)
    broken = {
        "cookie.py": b"# coding: no-such-codec\n",
        "deep.py": "x = " + "-" * 100_000 + "1",
        "huge.py": '"""Huge."""\n' + "#" * 20_000,
        "null.py": b'"""Null."""\x00',
        "python2.py": '"""Old."""\nprint "old"\n',
        "undecodable.py": b'"""\xff\xfe"""',
    }
    write_tree(tree, broken)
    (tree / "dangling.py").symlink_to(tree / "nowhere")
    (tree / "loop").symlink_to(tree, target_is_directory=True)
    (tree / "folder.py").mkdir()
    monkeypatch.setattr(pydocs, "MAX_SOURCE_BYTES", 10_000)
    caplog.set_level(logging.INFO, "fgpt_hf.data.pydocs")
    assert rows(cache / "again", tree) == expected
    assert "3 of 10 modules have docstrings, 7 skipped" in caplog.text


def test_without_any_docstring_the_error_names_the_place(tmp_path: Path, cache: Path) -> None:
    empty = write_tree(tmp_path / "bare", {"a.py": "x = 1\n"})
    with pytest.raises(ValueError, match=r"no docstring in 1 Python files under .*bare"):
        load_pydocs(cache, [empty])


# --------------------------------------------------------------------------------------------------------- the cache


def test_the_second_call_reads_no_source(tree: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = rows(cache, tree)
    monkeypatch.setattr(pydocs, "_sources", lambda root: pytest.fail("looked for sources again"))
    assert rows(cache, tree) == expected


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("name", ["data-00000-of-00001.arrow", "dataset_info.json", "state.json", "manifest.json"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:100]),
        lambda path: path.write_bytes(path.read_bytes()[:-9] + b"x" + path.read_bytes()[-8:]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"{}"),
        Path.unlink,
        replace_by_folder,
    ],
    ids=["truncate", "flip", "empty", "object", "delete", "replace by folder"],
)
def test_a_damaged_cache_is_built_again(tree: Path, cache: Path, name: str, damage: Callable[[Path], Any]) -> None:
    expected = rows(cache, tree)
    (path,) = cache.glob(f"*/{name}")
    damage(path)
    assert rows(cache, tree) == expected
    assert sorted(path.suffix for path in cache.iterdir()) == ["", ".lock"]


def test_a_build_that_was_killed_leaves_nothing_behind_the_next_one(tree: Path, cache: Path) -> None:
    write_tree(cache, {"0123456789abcdef.partial/data.arrow": "half"})
    rows(cache, tree)
    assert sorted(path.suffix for path in cache.iterdir()) == ["", ".lock"]


def test_other_distributions_have_another_cache(tree: Path, cache: Path) -> None:
    before = rows(cache, tree)
    write_tree(tree, {"new.py": '"""New."""\n'})
    assert rows(cache, tree) == before
    (tree / "alone-1.0.dist-info").rename(tree / "alone-1.1.dist-info")
    assert [row["id"] for row in rows(cache, tree)] == ["alone", "new", "shapes", "shapes.solids"]


def test_the_cache_belongs_to_hf_home_unless_told_otherwise(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    load_pydocs(search_paths=[tree])
    assert list((tmp_path / "home" / "fgpt" / "pydocs").glob("*/dataset_info.json"))


def load_together(barrier: Any, answers: Any, tree: Path, cache: Path) -> None:
    import datasets  # noqa: F401  # the slow part, so that both start to build at once

    barrier.wait()
    dataset = load_pydocs(cache, [tree])
    answers.put((dataset._fingerprint, hashlib.sha256("".join(dataset["text"]).encode()).hexdigest(), len(dataset)))


@pytest.mark.slow
def test_processes_that_build_at_once_share_one_whole_data_set(tmp_path: Path, cache: Path) -> None:
    modules = 300
    tree = write_tree(tmp_path / "t", {f"m{index:03}.py": SHAPES + f'def f(): "{index}"' for index in range(modules)})
    context = multiprocessing.get_context("spawn")
    barrier, answers = context.Barrier(2), context.Queue()
    processes = [context.Process(target=load_together, args=(barrier, answers, tree, cache)) for _ in range(2)]
    for process in processes:
        process.start()
    first, second = answers.get(timeout=200), answers.get(timeout=200)
    for process in processes:
        process.join()
    assert first == second and first[2] == modules
    assert sorted(path.suffix for path in cache.iterdir()) == ["", ".lock"]


def test_a_full_disk_leaves_nothing_behind_and_says_what_would_work(
    tree: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(dataset: Any, path: Any) -> None:
        write_tree(Path(path), {"half.arrow": "half"})
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("datasets.Dataset.save_to_disk", full)
        with pytest.raises(ValueError, match="No space left on device.*set HF_HOME"):
            load_pydocs(cache, [tree])
    assert [path.suffix for path in cache.iterdir()] == [".lock"]
    assert len(rows(cache, tree)) == 3


def test_a_cache_that_cannot_be_a_folder_says_what_would_work(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file.*set HF_HOME to a writable folder"):
        load_pydocs(tmp_path / "file", [tree])
