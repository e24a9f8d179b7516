"""Few facts in many wordings, of which some are never trained on."""

from collections import Counter

from fgpt_hf.data.basic_qa import first_questions, load_basic_qa, trained_questions, unseen_questions


def test_the_questions_that_a_newcomer_asks_first_are_trained_on() -> None:
    answers = dict(trained_questions())
    assert answers["What is the capital of France?"] == "The capital of France is Paris."
    assert answers["What is 2 + 2?"] == "2 + 2 = 4."
    assert answers["What is the capital of the Philippines?"] == "The capital of the Philippines is Manila."
    assert answers["Write 12 in words."] == "twelve"


def test_no_unseen_question_is_trained_on_and_every_answer_is() -> None:
    trained = dict(trained_questions())
    assert not trained.keys() & dict(unseen_questions()).keys()
    assert set(dict(unseen_questions()).values()) <= set(trained.values())
    assert dict(first_questions()).items() <= trained.items()


def test_a_question_has_one_answer_and_a_country_has_a_capital() -> None:
    asked = Counter(question.question for question in (*trained_questions(), *unseen_questions()))
    assert max(asked.values()) == 1
    assert len(asked) == 1092 + 184
    assert not [answer for _, answer in trained_questions() if "None" in answer or "is ." in answer]


def test_rows_are_conversations_of_one_turn() -> None:
    rows = load_basic_qa()
    assert len(rows) == 1092
    first = {question.question for question in first_questions()}
    assert min(row["document_hash"] for row in rows if row["messages"][0]["content"] in first) >= 0.5
    assert [message["role"] for message in rows[500]["messages"]] == ["user", "assistant"]
