"""A card's front matter is found however an editor saved the file, so that no license is lost."""

from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from fgpt_hf.errors import UserError
from fgpt_hf.hub.card_merge import mark_as_generated, merge_card
from fgpt_hf.hub.front_matter import read_card, results_of_card, split_card, tidy_card

FIELDS = "license: mit\ntags: [poetry]\n"
SAVED = {
    "as we write it": f"---\n{FIELDS}---\n\n# Tiny\n",
    "with a byte order mark": f"\ufeff---\n{FIELDS}---\n\n# Tiny\n",
    "below blank lines": f"\n  \n---\n{FIELDS}---\n\n# Tiny\n",
    "with spaces behind the dashes": f"--- \t\n{FIELDS}---  \n\n# Tiny\n",
    "with the line ends of Windows": f"---\n{FIELDS}---\n\n# Tiny\n".replace("\n", "\r\n"),
    "with all of these": f"\ufeff\n--- \n{FIELDS}--- \n\n# Tiny\n".replace("\n", "\r\n"),
}


@pytest.mark.parametrize("card", SAVED.values(), ids=SAVED.keys())
def test_front_matter_is_found_however_it_was_saved(card: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(card.encode())
    fields, text = split_card(read_card(tmp_path / "README.md"))
    assert (fields, text.strip()) == ({"license": "mit", "tags": ["poetry"]}, "# Tiny")
    assert ModelCard(tidy_card(card)).data.license == "mit"  # type: ignore[attr-defined]


@pytest.mark.parametrize("card", SAVED.values(), ids=SAVED.keys())
def test_a_license_survives_two_publications(card: str) -> None:
    new = mark_as_generated("---\nlibrary_name: transformers\n---\n# Generated\n")
    for _ in range(2):
        card = merge_card(new, card)
    fields, text = split_card(card)
    assert (fields["license"], fields["tags"], fields["library_name"]) == ("mit", ["poetry"], "transformers")
    assert text.count("# Tiny") == 1 and "license" not in text


@pytest.mark.parametrize(
    ("card", "text"),
    [
        ("", ""),
        ("---\n---\n# Tiny", "# Tiny"),
        ("---\n# only a comment\n---\n# Tiny", "# Tiny"),
        ("---\nWords between two rules.\n---\n", "---\nWords between two rules.\n---\n"),
        ("# Tiny\n---\nlicense: mit\n---\n", "# Tiny\n---\nlicense: mit\n---\n"),
    ],
)
def test_a_card_without_fields_is_all_text(card: str, text: str) -> None:
    assert split_card(card) == ({}, text)


@pytest.mark.parametrize("fields", ["a: [", "a: b: c", "a: 2026-13-45", "\tlicense: mit", "a: *unknown"])
def test_a_front_matter_that_is_not_yaml_is_one_clear_line(fields: str) -> None:
    for read in (split_card, results_of_card, lambda card: merge_card(mark_as_generated("# New"), card)):
        with pytest.raises(UserError, match="the front matter of the model card cannot be read"):
            read(f"---\n{fields}\n---\n# Tiny")


@pytest.mark.parametrize(
    "index", ["model-index: 3", "model-index: [a]", "1: x\nmodel-index: [{name: a, results: [b]}]"]
)
def test_results_of_another_form_are_none_or_one_clear_line(index: str) -> None:
    try:
        assert results_of_card(f"---\n{index}\n---\n") == []
    except UserError as error:
        assert "the front matter of the model card cannot be read" in str(error)


def test_a_card_that_is_not_utf_8_is_named(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes("# Tiny".encode("utf-16"))
    with pytest.raises(UserError, match=r"README\.md is damaged: it is not UTF-8 text"):
        read_card(tmp_path / "README.md")
