"""The embedded pairs: the truth about an object against what is true of its neighbour."""

from fgpt_hf.pydocs_preference import document_pairs, load_pydocs_preference

MEMBERS = [
    {"name": "shop.buy", "kind": "function", "signature": "buy(thing)", "docstring": "Exchange money for a thing."},
    {"name": "shop.sell", "kind": "function", "signature": "sell(thing)", "docstring": "Exchange a thing for money."},
    {"name": "shop.close", "kind": "function", "signature": "close()", "docstring": "Let nobody in any more.\n\nNow."},
    {"name": "shop.x", "kind": "function", "signature": "x()", "docstring": ">>> x()"},
]


def test_the_chosen_reply_is_the_objects_own_and_the_rejected_one_a_neighbours() -> None:
    pairs = list(document_pairs("shop", MEMBERS))
    own = [member["docstring"].split("\n")[0] for member in MEMBERS[:3]]
    assert [pair["chosen"] for pair in pairs] == own
    assert all(pair["rejected"] in own and pair["rejected"] != pair["chosen"] for pair in pairs)
    assert pairs == list(document_pairs("shop", MEMBERS))


def test_an_object_without_another_answer_beside_it_gives_no_pair() -> None:
    assert not list(document_pairs("shop", MEMBERS[:1]))
    twins = [MEMBERS[0], MEMBERS[0] | {"name": "shop.get"}]
    assert not list(document_pairs("shop", twins))


def test_the_installed_packages_give_thousands_of_pairs_and_no_question_twice() -> None:
    pairs = load_pydocs_preference()
    assert len(pairs) > 1000
    assert len(set(pairs["prompt"])) == len(pairs)
    assert all(chosen != rejected for chosen, rejected in zip(pairs["chosen"], pairs["rejected"], strict=True))
