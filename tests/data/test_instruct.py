"""Packed conversations: each complete, none sees another, only replies are scored, and whatever is cut is reported."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fgpt_hf.config.runs import InstructRun
from fgpt_hf.data.batch_fields import IGNORED
from fgpt_hf.data.instruct import InstructData, chat_batch, load_instruct_data, pack_chats
from fgpt_hf.data.mixtures import MixtureRow, RowIssues, split_rows
from fgpt_hf.errors import UserError
from fgpt_hf.losses.objectives import LanguageModelObjective
from fgpt_hf.tokenizer.fast_encoding import EncodedConversation, encode_conversations
from fgpt_hf.tokenizer.tokenizer import PAD_ID, build_tokenizer
from tests.data.test_conversations import run_on, turns
from tests.support.tiny import CONTEXT, random_model, tokenizer


def chats(count: int, seed: int = 0) -> list[list[dict[str, Any]]]:
    """Conversations of one to three turns, with and without system."""
    chance = random.Random(seed)

    def words() -> str:
        return " ".join(chance.choices(["one", "two", "three", "four"], k=chance.randint(1, 4)))

    return [
        turns(*(words() for _ in range(2 * chance.randint(1, 3))), system=chance.choice([None, "Be brief."]))
        for _ in range(count)
    ]


def opened(folder: Path, conversations: Sequence[Any], **fields: Any) -> InstructData:
    path = folder / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in conversations))
    settings: dict[str, Any] = {"validation_fraction": 0.1, "max_new_tokens": 8} | fields
    return load_instruct_data(run_on(path, **settings), tokenizer(), CONTEXT)


def scored_text(data: InstructData) -> str:
    return "".join(tokenizer().decode(rows.ids[rows.loss_mask]) for rows in (data.rows, data.validation))


def test_every_conversation_is_whole_in_one_row_and_padding_is_rare() -> None:
    encoded = [chat for chat in encode_conversations(tokenizer(), chats(600)) if isinstance(chat, EncodedConversation)]
    rows = pack_chats(encoded, CONTEXT)
    starts = (rows.positions == 0) & (rows.ids != PAD_ID)
    found = []
    for ids, begins in zip(rows.ids, starts, strict=True):
        found += [part[part != PAD_ID].tolist() for part in np.split(ids, np.flatnonzero(begins))[1:]]
    assert sorted(found) == sorted(chat.ids.tolist() for chat in encoded)
    assert (rows.ids == PAD_ID).mean() < 0.03
    assert rows.loss_mask.sum() == sum(chat.loss_mask.sum() for chat in encoded)


def test_packed_and_unpacked_conversations_give_equal_losses_and_gradients() -> None:
    encoded = [chat for chat in encode_conversations(tokenizer(), chats(12)) if isinstance(chat, EncodedConversation)]
    packed = chat_batch(pack_chats(encoded, CONTEXT))
    alone = [
        {
            "input_ids": torch.from_numpy(chat.ids[None].astype(np.int64)),
            "labels": torch.from_numpy(np.where(chat.loss_mask, chat.ids.astype(np.int64), IGNORED)[None]),
        }
        for chat in encoded
    ]
    assert len(packed["input_ids"]) < len(alone)
    losses, gradients = [], []
    for batches in ([packed], alone):
        objective = LanguageModelObjective(random_model())
        loss = sum((objective(batch) for batch in batches), torch.zeros(()))
        loss.backward()
        losses.append(float(loss.detach()))
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in objective.parameters()]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-4 * float(gradients[1].abs().max()))


def test_only_replies_and_their_ends_are_learnt(tmp_path: Path) -> None:
    data = opened(tmp_path, [turns(f"ask{n}", f"reply{n}", "again", "reply", system="be kind") for n in range(40)])
    scored = scored_text(data)
    assert scored.count("<|end|>") == scored.count("reply") > 0
    assert not any(word in scored for word in ("ask", "again", "kind", "<|user|>", "<|assistant|>", "\n"))


def test_everything_is_learnt_on_request_but_no_first_token_from_its_neighbour(tmp_path: Path) -> None:
    data = opened(tmp_path, [turns(f"ask{n}", f"reply{n}") for n in range(100)], assistant_only_loss=False)
    not_scored = data.rows.ids[~data.rows.loss_mask]
    assert set(tokenizer().decode(not_scored).replace("<|pad|>", "").split("<|user|>")) == {""}
    assert (data.rows.positions[data.rows.loss_mask] > 0).all()


@pytest.mark.slow
def test_long_conversations_are_cut_left_out_or_refused_and_named(tmp_path: Path) -> None:
    rows = [turns(f"ask{n}", "fine") for n in range(40)]
    rows[3:3] = [turns("ask", "word " * CONTEXT)]
    rows[7:7] = [turns("word " * CONTEXT, "reply")]
    cut, skipped = opened(tmp_path, rows), opened(tmp_path, rows, long_rows="skip")
    assert f"1 cut, it is longer than {CONTEXT} tokens: row 3 of" in cut.description
    assert f"1 left out, its prompt alone is longer than {CONTEXT} tokens: row 7 of" in cut.description
    assert f"1 left out, it is longer than {CONTEXT} tokens: row 3 of" in skipped.description
    assert "word" in scored_text(cut) and "word" not in scored_text(skipped)
    assert scored_text(cut).count("<|end|>") == scored_text(cut).count("fine")  # the reply that was cut has no end
    with pytest.raises(ValueError, match="row 3 of .* is longer than"):
        opened(tmp_path, rows, long_rows="refuse")
    with pytest.raises(ValueError, match="row 7 of .* its prompt alone"):
        opened(tmp_path, rows, bad_rows="refuse")


def test_roles_in_a_wrong_order_are_named_as_the_template_names_them(tmp_path: Path) -> None:
    rows: list[Any] = [turns(f"ask{n}", "fine") for n in range(40)]
    rows[5] = rows[5][::-1]
    assert "1 left out, not a conversation: message 1 has the role 'assistant'" in opened(tmp_path, rows).description


def test_a_template_under_which_replies_cannot_be_told_is_said_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unmarked = build_tokenizer(CONTEXT)
    unmarked.chat_template = "{{ messages | length }}{% for message in messages %}{{ message['content'] }}{% endfor %}"
    monkeypatch.setattr("tests.data.test_instruct.tokenizer", lambda: unmarked)
    with pytest.raises(UserError, match="message 2 shows that the chat template writes a message in another way"):
        opened(tmp_path, chats(40))
    assert len(opened(tmp_path, chats(40), assistant_only_loss=False).rows)


def test_validation_conversations_are_not_scored_and_their_prompts_are_asked(tmp_path: Path) -> None:
    data = opened(tmp_path, [turns(f"ask {n} !", f"reply {n} !") for n in range(200)], validation_prompts=3)
    trained = tokenizer().decode(data.rows.ids.flatten())
    validation = tokenizer().decode(data.validation.ids.flatten())
    assert trained.count("ask") + validation.count("ask") == 200 and validation.count("ask") > 5
    assert not {f"ask {n} !" for n in range(200) if f"ask {n} !" in trained and f"ask {n} !" in validation}
    assert len(data.prompts) == 3
    for (message,) in data.prompts:
        assert message["role"] == "user" and message["content"] in validation
    assert data.provenance.sizes["validation"].documents == validation.count("ask")


@pytest.mark.parametrize("form", ["messages", "prompt", "instruction"])
def test_of_42_conversations_two_are_held_out_whatever_their_form(tmp_path: Path, form: str) -> None:
    forms: dict[str, list[dict[str, Any]]] = {
        "messages": [{"messages": turns(f"ask{n}", "fine")} for n in range(42)],
        "prompt": [{"prompt": f"ask{n}", "completion": "fine"} for n in range(42)],
        "instruction": [{"instruction": f"do{n}", "input": "this", "output": "done"} for n in range(42)],
    }
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in forms[form]))
    data = load_instruct_data(InstructRun(dataset_name=str(path)), tokenizer(), CONTEXT)
    assert {split: size.documents for split, size in data.provenance.sizes.items()} == {"train": 40, "validation": 2}


def test_a_fraction_of_zero_holds_no_conversation_out_and_says_so(tmp_path: Path) -> None:
    data = opened(tmp_path, chats(20), validation_fraction=0)
    assert (len(data.validation), data.prompts) == (0, [])
    assert "holds nothing out" in data.description


def test_conversations_of_documents_are_held_out_with_these_and_others_by_the_fraction() -> None:
    def rows(count: int, is_derived: bool) -> list[tuple[MixtureRow, int]]:
        return [
            (MixtureRow(row_id=f"row {n}", hash_fraction=n / 1000 + is_derived / 2000, is_derived=is_derived), n)
            for n in range(100, 100 + count)
        ]

    def held_out(rows: list[tuple[MixtureRow, int]]) -> list[int]:
        return [n for _, n in split_rows(rows, InstructRun(validation_fraction=0.11), "rows", RowIssues())[1]]

    assert held_out(rows(100, is_derived=True)) == list(range(100, 110))  # below 0.11
    assert held_out(rows(100, is_derived=False)) == list(range(100, 111))
    assert len(held_out(rows(100, is_derived=True) + rows(50, is_derived=False))) == 10 + round(50 * 0.11)
    assert held_out(rows(3, is_derived=True)[1:]) == [101]  # at least one is trained on
    assert held_out(rows(30, is_derived=True)[16:]) == [116, 117]  # at least one is held out


def test_a_weight_says_how_often_an_epoch_has_a_conversation(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"ask{n}", "completion": "fine"}) + "\n" for n in range(400)))
    once, often = (
        load_instruct_data(run_on(f"{path}{times}", validation_fraction=0.1), tokenizer(), CONTEXT)
        for times in ("", "*2.5")
    )
    assert often.rows.loss_mask.sum() == pytest.approx(2.5 * once.rows.loss_mask.sum(), rel=0.05)
    assert len(often.validation) == len(once.validation)


def test_a_position_leads_to_the_same_rows_again(tmp_path: Path) -> None:
    data = opened(tmp_path, chats(200))
    first = data.batches(1, 0, 1)
    for _ in range(5):
        first.take(3)
    second = data.batches(1, 0, 1)
    second.load_state_dict(first.state_dict())
    for _ in range(30):
        one, other = first.take(3), second.take(3)
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_a_position_in_other_conversations_is_refused_however_many_there_are(tmp_path: Path) -> None:
    conversations = chats(30)
    state = opened(tmp_path, conversations).batches(1, 0, 1).state_dict()
    opened(tmp_path, conversations).batches(1, 0, 1).load_state_dict(state)
    conversations[7] = [message | {"content": message["content"].upper()} for message in conversations[7]]
    with pytest.raises(UserError, match="the training rows are not those of the checkpoint"):
        opened(tmp_path, conversations).batches(1, 0, 1).load_state_dict(state)


def test_data_that_does_not_fit_is_said(tmp_path: Path) -> None:
    fine = [turns(f"ask{n}", "fine") for n in range(40)]
    with pytest.raises(ValueError, match=f"max_length=65 is longer than the model's context of {CONTEXT} tokens"):
        opened(tmp_path, fine, max_length=CONTEXT + 1)
    with pytest.raises(ValueError, match=r"gives 1 conversations to train on and 0 to hold out.*39 left out"):
        opened(tmp_path, [fine[0], *[turns("ask")] * 39], validation_fraction=1e-9)
    with pytest.raises(ValueError, match="holds no conversations that can be used: 9 left out, no message is the"):
        opened(tmp_path, [turns("ask")] * 9)
