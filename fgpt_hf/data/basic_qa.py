"""Build an embedded set of short questions and answers: capitals, sums, plurals and numbers in words.

They are the questions that a newcomer asks first. There are few facts, each in many wordings, so that a small model can
learn them in minutes. Some wordings for capitals are never trained on: an answer to one of those shows that the fact
was learned, and not the sentence. A model of this size does not know what is not among the facts.

Capitals come from the package `countryinfo` (MIT license).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeAlias

from datasets import Dataset

from fgpt_hf.data.splits import document_hash

# Countries whose capitals have one well-known English name, and have kept it.
COUNTRIES = (
    *("Algeria", "Argentina", "Australia", "Austria", "Belgium", "Brazil", "Canada", "Chile", "China", "Cuba"),
    *("Denmark", "Egypt", "Ethiopia", "Finland", "France", "Germany", "Ghana", "Greece", "Hungary", "India"),
    *("Indonesia", "Iran", "Iraq", "Ireland", "Italy", "Japan", "Kenya", "Mexico", "Morocco", "Nepal"),
    *("Norway", "Pakistan", "Peru", "Philippines", "Poland", "Portugal", "Russia", "South Korea", "Spain", "Sweden"),
    *("Thailand", "Turkey", "Ukraine", "United Kingdom", "Venezuela", "Vietnam"),
)
NEEDS_ARTICLE = ("Philippines", "United Kingdom")
ADDENDS = range(1, 10)
NOUNS = (
    *("apple", "bird", "boat", "book", "car", "cat", "chair", "cloud", "cow", "dog", "door", "egg", "flower", "hand"),
    *("house", "key", "lamp", "letter", "river", "road", "ship", "star", "table", "tree"),
)
NUMBER_WORDS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty"),
)

CAPITAL_WORDINGS = (
    "What is the capital of {}?",
    "What's the capital of {}?",
    "What is the capital city of {}?",
    "Which city is the capital of {}?",
    "Which city is {}'s capital?",
    "What is {}'s capital?",
    "Name the capital of {}.",
    "Tell me the capital of {}.",
    "Capital of {}?",
    "Do you know the capital of {}?",
    "I want to know the capital of {}.",
    "The capital of {} is which city?",
)
UNSEEN_CAPITAL_WORDINGS = (
    "Can you tell me the capital of {}?",
    "Which city serves as the capital of {}?",
    "Please name the capital city of {}.",
    "What is the name of {}'s capital?",
)
SUM_WORDINGS = ("What is {} + {}?", "What's {} + {}?", "What is {} plus {}?", "{} + {} = ?", "Add {} and {}.")
PLURAL_WORDINGS = ("What is the plural of {}?", "Give the plural of {}.", "One {}, two what?")
NUMBER_WORDINGS = ("Write {} in words.", "How is {} written in words?", "Spell the number {}.")


class Fact(NamedTuple):
    """What is asked for, and the whole reply; `names` are put into a wording."""

    names: tuple[str, ...]
    answer: str


class Question(NamedTuple):
    """A question and the one reply that is right."""

    question: str
    answer: str


Wordings: TypeAlias = Sequence[str]


def load_basic_qa() -> Dataset:
    """Return a conversation for each fact in each wording that is trained on: rows of `messages` and `document_hash`.

    Validation may hold out some of them, but none of `first_questions` unless its fraction is above a half.

    Example:
        >>> [message["content"] for message in load_basic_qa()[0]["messages"]]
        ['What is the capital of Algeria?', 'The capital of Algeria is Algiers.']
    """
    first = set(first_questions())
    rows = []
    for question in trained_questions():
        asked, answer = question
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        fraction = document_hash(asked)
        rows.append({"messages": messages, "document_hash": (1 + fraction) / 2 if question in first else fraction})
    return Dataset.from_list(rows)


def trained_questions() -> list[Question]:
    """Return all facts in all wordings that are trained on."""
    return [question for facts, wordings in KINDS.values() for question in _ask(facts(), wordings)]


def first_questions() -> list[Question]:
    """Return each fact once, in the first of the wordings that are trained on."""
    return [question for facts, wordings in KINDS.values() for question in _ask(facts(), wordings[:1])]


def unseen_questions() -> list[Question]:
    """Return the capitals in the wordings that are never trained on.

    Example:
        >>> unseen_questions()[0].question
        'Can you tell me the capital of Algeria?'
    """
    return list(_ask(capitals(), UNSEEN_CAPITAL_WORDINGS))


def capitals() -> list[Fact]:
    """Return the capitals of `COUNTRIES`."""
    from countryinfo import CountryInfo  # not above: it reads its files, and few commands need them

    facts = []
    for country in COUNTRIES:
        name = f"the {country}" if country in NEEDS_ARTICLE else country
        facts.append(Fact((name,), f"The capital of {name} is {CountryInfo(country).capital()}."))
    return facts


def sums() -> list[Fact]:
    """Return the sums of two numbers from 1 to 9."""
    return [Fact((str(one), str(other)), f"{one} + {other} = {one + other}.") for one in ADDENDS for other in ADDENDS]


def plurals() -> list[Fact]:
    """Return the plurals of `NOUNS`, which are all regular."""
    return [Fact((noun,), f"{noun}s") for noun in NOUNS]


def numbers() -> list[Fact]:
    """Return the numbers from 0 to 20 in words."""
    return [Fact((str(number),), word) for number, word in enumerate(NUMBER_WORDS)]


def _ask(facts: Sequence[Fact], wordings: Wordings) -> Iterator[Question]:
    for wording in wordings:
        for names, answer in facts:
            yield Question(wording.format(*names), answer)


KINDS: Mapping[str, tuple[Callable[[], list[Fact]], Wordings]] = {
    "capitals": (capitals, CAPITAL_WORDINGS),
    "sums": (sums, SUM_WORDINGS),
    "plurals": (plurals, PLURAL_WORDINGS),
    "numbers": (numbers, NUMBER_WORDINGS),
}
