"""The embedded pairs: the truth about an object against what is true of its neighbour."""

from fgpt_hf.data.pydocs_derived import document_pairs, load_pydocs_preference, looping

MEMBERS = [
    {"name": "shop.buy", "kind": "function", "signature": "buy(thing)", "docstring": "Exchange money for a thing."},
    {"name": "shop.sell", "kind": "function", "signature": "sell(thing)", "docstring": "Exchange a thing for money."},
    {"name": "shop.close", "kind": "function", "signature": "close()", "docstring": "Let nobody in any more.\n\nNow."},
    {"name": "shop.x", "kind": "function", "signature": "x()", "docstring": ">>> x()"},
]


def test_the_chosen_reply_is_the_objects_own_and_the_rejected_one_a_neighbours_or_goes_in_circles() -> None:
    pairs = list(document_pairs("shop", MEMBERS))
    own = [member["docstring"].split("\n")[0] for member in MEMBERS[:3]]
    assert [pair["chosen"] for pair in pairs] == own
    for pair in pairs:
        assert pair["rejected"] in {*own, looping(pair["chosen"])} - {pair["chosen"]}
    assert pairs == list(document_pairs("shop", MEMBERS))


def test_an_object_without_another_answer_beside_it_is_not_compared_with_its_own() -> None:
    twins = [MEMBERS[0], MEMBERS[0] | {"name": "shop.get", "signature": "get(thing)"}]
    assert {pair["rejected"] for pair in document_pairs("shop", twins)} == {looping("Exchange money for a thing.")}


def test_a_reply_in_circles_does_not_get_past_the_middle_of_the_sentence() -> None:
    assert looping("One two three four five six seven eight.") == "One two three four" + " two three four" * 3


def test_the_installed_packages_give_thousands_of_pairs_and_no_question_twice() -> None:
    pairs = load_pydocs_preference()
    assert len(pairs) > 1000
    assert len(set(pairs["prompt"])) == len(pairs)
    circles = sum(looping(chosen) == reply for chosen, reply in zip(pairs["chosen"], pairs["rejected"], strict=True))
    assert 0.4 < circles / len(pairs) < 0.7
    assert all(chosen != rejected for chosen, rejected in zip(pairs["chosen"], pairs["rejected"], strict=True))
