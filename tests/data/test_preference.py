"""Pairs become ids of which exactly the two last replies are scored, each with the end of its turn."""

from typing import Any

import pytest

from fgpt_hf.config.runs import PreferenceRun
from fgpt_hf.data.batch_fields import IGNORED
from fgpt_hf.data.mixtures import RowIssues
from fgpt_hf.data.preference import PairRows, encode_pairs, pair_batch
from fgpt_hf.data.preference_pairs import Pair
from fgpt_hf.tokenizer.tokenizer import END_OF_TURN_ID
from tests.support.tiny import tokenizer

USER = {"role": "user", "content": "What is 2 + 2?"}
SYSTEM = {"role": "system", "content": "Be brief."}
EARLIER = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi there"}]


def encode(*pairs: Pair, length: int = 64, **fields: Any) -> tuple[PairRows, RowIssues]:
    issues = RowIssues()
    read = encode_pairs(tokenizer(), pairs, length, PreferenceRun(**fields), issues)
    return PairRows.without_reference([replies for _, replies in read]), issues


def pair(*prompt: dict[str, str], chosen: str = "It is 4.", rejected: str = "It is 5, I think.") -> Pair:
    return Pair(prompt=prompt, chosen=chosen, rejected=rejected, row_id="row 7", hash_fraction=0.5)


@pytest.mark.parametrize("prompt", [[USER], [SYSTEM, USER], [*EARLIER, USER], [SYSTEM, *EARLIER, USER]])
def test_exactly_the_last_reply_and_its_end_are_scored(prompt: list[dict[str, str]]) -> None:
    rows, _ = encode(pair(*prompt))
    batch = pair_batch(rows)
    for side, text in enumerate(("It is 4.", "It is 5, I think.")):
        labels = batch["labels"][0, side]
        assert labels[labels != IGNORED].tolist() == [*tokenizer().encode(text), END_OF_TURN_ID]
        read = batch["input_ids"][0, side][: len(rows.pairs[0][side].ids)]
        whole = tokenizer().apply_chat_template([*prompt, {"role": "assistant", "content": text}])["input_ids"]
        assert read.tolist() == whole[: len(read)]
        assert tokenizer().decode(whole[len(read) :]) == "\n"


def test_a_batch_is_as_wide_as_its_longest_reply_and_nothing_is_scored_behind_a_shorter_one() -> None:
    rows, _ = encode(pair(USER), pair(SYSTEM, *EARLIER, USER))
    batch = pair_batch(rows)
    lengths = [[len(reply.ids) for reply in replies] for replies in rows.pairs]
    assert batch["input_ids"].shape == batch["labels"].shape == (2, 2, max(map(max, lengths)))
    for number, sides in enumerate(lengths):
        for side, length in enumerate(sides):
            assert batch["labels"][number, side, length - 1] == END_OF_TURN_ID
            assert (batch["labels"][number, side, length:] == IGNORED).all()


def test_long_pairs_are_cut_left_out_or_refused_and_told_in_any_case() -> None:
    long = pair(USER, rejected="word " * 90)
    rows, issues = encode(long)
    assert [len(reply.ids) for reply in rows.pairs[0]] == [len(encode(pair(USER))[0].pairs[0][0].ids), 64]
    assert str(issues) == "1 cut, it is longer than 64 tokens: row 7"
    rows, issues = encode(long, long_rows="skip")
    assert not len(rows) and str(issues) == "1 left out, it is longer than 64 tokens: row 7"
    with pytest.raises(ValueError, match="row 7: it is longer than 64 tokens"):
        encode(long, long_rows="refuse")


def test_pairs_that_are_equal_once_cut_have_nothing_to_prefer() -> None:
    rows, issues = encode(pair(USER, chosen="word " * 90, rejected="word " * 90 + "more"))
    assert not len(rows) and "up to max_length" in str(issues)


def test_a_prompt_longer_than_the_context_and_roles_in_a_wrong_order_are_left_out() -> None:
    rows, issues = encode(pair(USER | {"content": "word " * 90}), pair(USER, USER), pair(USER))
    assert len(rows) == 1
    assert "its prompt alone is longer than 64 tokens: row 7" in str(issues)
    assert "has the role 'user' where 'assistant' must be" in str(issues)


def test_text_that_spells_a_control_token_ends_no_reply() -> None:
    rows, _ = encode(pair(USER, chosen="<|end|>\n<|user|>\n4"))
    labels = pair_batch(rows)["labels"][0, 0]
    assert (labels == END_OF_TURN_ID).sum() == 1


@pytest.mark.slow
def test_pairs_are_recognized_by_their_content() -> None:
    def fingerprint(*pairs: Pair) -> str:
        return encode(*pairs)[0].fingerprint

    first, second = pair(USER), pair(SYSTEM, USER)
    assert fingerprint(first, second) == fingerprint(first, second)
    others = [(second, first), (first,), (first, second, second), (first, pair(SYSTEM, USER, rejected="It is 6."))]
    others += [(first, pair(SYSTEM, USER, chosen="IT IS 4."))]
    assert len({fingerprint(*pairs) for pairs in [(first, second), *others]}) == 1 + len(others)
