"""Where an ending begins: as the harness has it, as the original has it, and what neither can score."""

import random

import pytest

from fgpt_hf.evaluation.encoding import Encoder
from fgpt_hf.evaluation.prefix_tree import Row
from tests.support.tiny import CONTEXT, tokenizer

PAIRS = [
    ("A man sits on a roof. he", " starts pulling up tiles."),
    ("Question: why?\nAnswer:", " because"),
    ("x", "\ny"),
]


def encoder(length: int = CONTEXT) -> Encoder:
    return Encoder(tokenizer(), length)


@pytest.mark.parametrize("pair", PAIRS)
def test_rows_spell_context_and_ending(pair: tuple[str, str]) -> None:
    for (row,) in (encoder().encode_joint([pair]), encoder().encode_separately([pair])):
        assert tokenizer().decode(row.ids) == "".join(pair)
        assert tokenizer().decode(row.ids[-row.scored :]) == pair[1]


def test_white_space_at_the_end_of_a_context_is_scored_with_the_ending() -> None:
    assert encoder().encode_joint([("A man \n", " sat")]) == encoder().encode_joint([("A man", " \n sat")])


def test_together_the_boundary_is_where_the_contexts_own_tokens_end() -> None:
    """The harness' rule, even where the whole is encoded otherwise: 'abc' is one token, and its 'ab' is kept."""
    ids = {text: tokenizer().encode(text) for text in ("under", "stand", "understand")}
    assert len(ids["understand"]) == 2 and ids["understand"][:1] == ids["under"]
    (together,) = encoder().encode_joint([("under", "standing")])
    (apart,) = encoder().encode_separately([("under", "standing")])
    assert together.ids[1:] == tuple(tokenizer().encode("understanding")[1:])
    assert apart.ids[1:] == tuple(tokenizer().encode("standing"))


def test_without_a_context_the_tokenizers_first_token_stands_there() -> None:
    (row,) = encoder().encode_joint([("", "Once upon")])
    assert row == Row((tokenizer().bos_token_id, *tokenizer().encode("Once upon")), 2)


def test_long_contexts_lose_their_beginning_and_are_counted() -> None:
    short = encoder(8)
    (row, _) = short.encode_joint([("one two three four five six seven eight nine", " ten"), ("one", " two")])
    assert tokenizer().decode(row.ids) == " two three four five six seven eight nine ten"
    assert (len(row.ids), row.scored, short.contexts_cut) == (9, 1, 1)


@pytest.mark.parametrize(("ending", "count"), [("", 0), (" one two three four five six seven eight nine", 9)])
def test_endings_that_cannot_be_scored_are_refused(ending: str, count: int) -> None:
    with pytest.raises(ValueError, match=f"has {count} tokens of its own, and the model can score 1 to 8"):
        encoder(8).encode_joint([("A", ending)])


@pytest.mark.parametrize("length", [1, 15, 16, 17, 32, 33, 100])
def test_windows_score_each_token_once_and_never_read_more_than_the_model_can(length: int) -> None:
    source = random.Random(length)
    text = "".join(source.choice([" one", " two", " three"]) for _ in range(length))
    windows = encoder(16).windows(text)
    scored = [index for window in windows for index in window.ids[-window.scored :]]
    assert scored == tokenizer().encode(text) and len(scored) == length
    assert all(len(window.ids) - 1 <= 16 for window in windows)
    assert windows[0].ids[0] == tokenizer().bos_token_id
    assert all(len(window.ids) == 17 for window in windows[1:])


def test_an_empty_text_has_no_windows() -> None:
    assert encoder().windows("") == []


def test_prompts_leave_room_for_the_answer() -> None:
    asking = encoder(8)
    assert [len(ids) for ids in asking.prompts(["one two three four five six seven", "one"], 3)] == [5, 1]
    assert asking.contexts_cut == 1
