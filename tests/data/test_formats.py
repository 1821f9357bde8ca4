"""Formats: every accepted row, and for every bad row the message that finds it."""

import pytest

from jaxrl_llm.data import (
    Instruction,
    Message,
    PreferenceExample,
    PromptExample,
    RatedExample,
    Row,
    SupervisedExample,
    UnpairedExample,
    preference_example,
    prompt_example,
    rated_example,
    reward_columns,
    supervised_example,
    unpaired_examples,
)

USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
OTHER = {"role": "assistant", "content": "Go away"}
NAN = float("nan")
CHAT = (Message("user", "Hi"), Message("assistant", "Hello"))


def row(**fields):
    return Row("data.jsonl, line 7", fields)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"instruction": "Add", "input": "1 2", "output": "3"}, (Instruction("Add", "1 2"), "3")),
        ({"instruction": "Add", "input": "", "output": "3"}, (Instruction("Add"), "3")),
        ({"instruction": "Add", "input": None, "output": "3"}, (Instruction("Add"), "3")),
        ({"instruction": "翻译", "output": "幸福", "text": "whole"}, (Instruction("翻译"), "幸福")),
        ({"messages": [USER, ASSISTANT]}, ((), CHAT)),
        ({"conversations": [USER, ASSISTANT], "id": 3}, ((), CHAT)),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}, ((), CHAT)),
        ({"conversations": [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Hello"}]}, ((), CHAT)),
        ({"prompt": "3+4=", "completion": "7", "answer": "7"}, ("3+4=", "7")),
        ({"prompt": [USER], "completion": [ASSISTANT]}, (CHAT[:1], CHAT[1:])),
        ({"text": "Once upon a time"}, ("", "Once upon a time")),
        ({"text": "Once", "prompt": None, "messages": None}, ("", "Once")),
    ],
)
def test_every_sft_format_is_read_into_prompt_and_completion(fields, expected):
    assert supervised_example(row(**fields)) == SupervisedExample(*expected)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"prompt": "Hi", "chosen": "Hello", "rejected": "Go"}, ("Hi", "Hello", "Go")),
        ({"instruction": "Greet", "chosen": "Hello", "rejected": "Go"}, (Instruction("Greet"), "Hello", "Go")),
        (
            {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [OTHER]},
            (CHAT[:1], CHAT[1:], (Message("assistant", "Go away"),)),
        ),
        (
            {"chosen": [USER, ASSISTANT], "rejected": [USER, OTHER]},
            (CHAT[:1], CHAT[1:], (Message("assistant", "Go away"),)),
        ),
        (
            {"chosen": [USER, ASSISTANT, USER, ASSISTANT], "rejected": [USER, ASSISTANT, USER, OTHER], "prompt": None},
            ((*CHAT, CHAT[0]), CHAT[1:], (Message("assistant", "Go away"),)),
        ),
    ],
)
def test_every_dpo_format_is_read_into_prompt_and_two_answers(fields, expected):
    assert preference_example(row(**fields)) == PreferenceExample(*expected)


def test_a_pair_may_have_a_margin():
    fields = {"prompt": "Hi", "chosen": "Hello", "rejected": "Go"}
    assert preference_example(row(**fields)).margin is None
    assert preference_example(row(**fields, margin=None)).margin is None
    assert preference_example(row(**fields, margin=2)).margin == 2.0
    chat = preference_example(row(chosen=[USER, ASSISTANT], rejected=[USER, OTHER], margin=0.5))
    assert chat == PreferenceExample(CHAT[:1], CHAT[1:], (Message("assistant", "Go away"),), 0.5)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"prompt": "The sky is", "completion": " blue.", "label": True}, [("The sky is", " blue.", True)]),
        ({"prompt": "The sky is", "completion": " green.", "label": 0}, [("The sky is", " green.", False)]),
        ({"instruction": "Greet", "completion": "Go", "label": False}, [(Instruction("Greet"), "Go", False)]),
        ({"prompt": [USER], "completion": [ASSISTANT], "label": True}, [(CHAT[:1], CHAT[1:], True)]),
        (
            {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."},
            [("The sky is", " blue.", True), ("The sky is", " green.", False)],
        ),
        (
            {"chosen": [USER, ASSISTANT], "rejected": [USER, OTHER], "label": None},
            [(CHAT[:1], CHAT[1:], True), (CHAT[:1], (Message("assistant", "Go away"),), False)],
        ),
    ],
)
def test_every_kto_format_is_read_and_a_pair_gives_two_examples(fields, expected):
    assert unpaired_examples(row(**fields)) == [UnpairedExample(*example) for example in expected]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"text": "Superb.", "score": 3.5}, ("", "Superb.", 3.5)),
        ({"text": "Superb.", "rating": -2}, ("", "Superb.", -2.0)),
        ({"text": "Superb.", "rating": 1, "score": 0}, ("", "Superb.", 0.0)),
        ({"prompt": "Hi", "completion": "Hello", "score": 1}, ("Hi", "Hello", 1.0)),
        ({"instruction": "Greet", "completion": "Hi", "text": "x", "rating": 1}, (Instruction("Greet"), "Hi", 1.0)),
        ({"prompt": [USER], "completion": [ASSISTANT], "score": 0.5}, (CHAT[:1], CHAT[1:], 0.5)),
    ],
)
def test_every_format_of_ratings_is_read(fields, expected):
    assert rated_example(row(**fields)) == RatedExample(*expected)


def test_a_prompt_keeps_its_other_columns_for_the_rewards():
    assert prompt_example(row(prompt="3+4=", answer="7", hint=None)) == ("3+4=", {"answer": "7", "hint": None})
    assert prompt_example(row(prompt=[USER])) == PromptExample(CHAT[:1], {})
    assert prompt_example(row(instruction="Add", input="3 4", answer=7)) == (Instruction("Add", "3 4"), {"answer": 7})


def test_columns_of_rewards_have_an_entry_for_every_prompt():
    examples = [PromptExample("a", {"x": 1}), PromptExample("b", {"y": 2}), PromptExample("c", {"x": 3, "y": None})]
    assert reward_columns(examples) == {"x": [1, None, 3], "y": [None, 2, None]}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"question": "a", "reply": "b"},
            r"no SFT format has the columns \['question', 'reply'\]. Accepted are: .*`text`",
        ),
        ({"instruction": "Add"}, r"field `output` is missing or null; expected a string"),
        ({"instruction": "Add", "output": 3}, r"field `output` is int '3'; expected a string"),
        ({"instruction": "Add", "output": " \n"}, r"field `output` is empty; expected a string with text"),
        ({"instruction": "", "output": "3"}, r"field `instruction` is empty"),
        ({"instruction": "Add", "input": [1], "output": "3"}, r"field `input` is list '\[1\]'; expected a string"),
        ({"prompt": "3+4="}, r"field `completion` is missing or null"),
        ({"prompt": "3+4=", "completion": [ASSISTANT]}, r"field `completion` is list .*; expected a string"),
        ({"prompt": [USER], "completion": "Hello"}, r"field `completion` is str 'Hello'; expected messages"),
        ({"prompt": [USER], "completion": [USER]}, r"`completion` is messages that begin with the user"),
        ({"prompt": [USER, ASSISTANT], "completion": [ASSISTANT]}, r"neither begins nor ends with the assistant"),
        ({"text": 5}, r"field `text` is int '5'; expected a string"),
        ({"messages": "Hi"}, r"field `messages` is str 'Hi'; expected a list of messages"),
        ({"messages": []}, r"field `messages` is list '\[\]'; expected a list of messages, at least one"),
        (
            {"messages": [USER]},
            r"`messages` is a conversation of \['user'\]; expected one in which the assistant answers",
        ),
        ({"messages": [ASSISTANT, USER]}, r"expected one in which the assistant answers"),
        (
            {"messages": [ASSISTANT, USER, ASSISTANT]},
            r"a conversation of \['assistant', 'user', 'assistant'\]; expected one .* which it does not begin",
        ),
        ({"messages": [USER, "Hello"]}, r'field `messages\[1\]` is str \'Hello\'; expected an object with "role"'),
        (
            {"messages": [{"role": "bot", "content": "a"}]},
            r"`messages\[0\].role` is str 'bot'; expected one of system, user",
        ),
        ({"messages": [{"role": "user", "content": None}]}, r"`messages\[0\].content` is missing or null"),
        ({"conversations": [{"from": "human", "value": 1}]}, r"`conversations\[0\].value` is int '1'"),
        ({"messages": [USER, {"role": "assistant", "content": ""}]}, r"`messages\[1\].content` is empty"),
    ],
)
def test_a_bad_sft_row_is_found_by_place_and_field(fields, message):
    with pytest.raises(ValueError, match=rf"^data.jsonl, line 7: .*{message}"):
        supervised_example(row(**fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, r"field `rejected` is missing, the columns are \['chosen', 'prompt'\]"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, r"`chosen` and `rejected` are the same"),
        ({"prompt": "a", "chosen": "b", "rejected": ""}, r"field `rejected` is empty"),
        ({"chosen": "a b", "rejected": "a c"}, r"field `prompt` is missing; expected a string.*no prompt: the BOS"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": "1"}, r"field `margin` is str '1'; .*finite number"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": NAN}, r"field `margin` is float 'nan'"),
        ({"prompt": [USER], "chosen": [ASSISTANT, USER], "rejected": [OTHER]}, r"`chosen` is 2 messages; expected one"),
        ({"chosen": [USER, ASSISTANT], "rejected": [OTHER, OTHER]}, r"`rejected` is a conversation of"),
        (
            {"chosen": [USER, ASSISTANT], "rejected": [USER, ASSISTANT, USER, OTHER]},
            r"must be the same up to the last message",
        ),
    ],
)
def test_a_bad_dpo_row_is_found_by_place_and_field(fields, message):
    with pytest.raises(ValueError, match=rf"^data.jsonl, line 7: .*{message}"):
        preference_example(row(**fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": "a", "completion": "b"}, r"no KTO format has the columns \['completion', 'prompt'\]. Accepted are"),
        ({"prompt": "a", "label": True}, r"no KTO format has the columns"),
        ({"completion": "b", "label": True}, r"field `prompt` is missing"),
        ({"prompt": "a", "completion": "b", "label": "yes"}, r"field `label` is str 'yes'; expected true or false"),
        ({"prompt": "a", "completion": "b", "label": 2}, r"field `label` is int '2'"),
        ({"prompt": "a", "completion": "b", "label": NAN}, r"field `label` is float 'nan'"),
        (
            {"prompt": [USER], "completion": [ASSISTANT, USER], "label": True},
            r"`completion` is 2 messages; expected one",
        ),
        ({"prompt": "a", "chosen": "b"}, r"field `rejected` is missing"),
    ],
)
def test_a_bad_kto_row_is_found_by_place_and_field(fields, message):
    with pytest.raises(ValueError, match=rf"^data.jsonl, line 7: .*{message}"):
        unpaired_examples(row(**fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text": "a"}, r"no format of ratings has the columns \['text'\]. Accepted are"),
        ({"prompt": "a", "score": 1}, r"no format of ratings has the columns"),
        ({"text": "a", "score": "good"}, r"field `score` is str 'good'; expected a finite number"),
        ({"text": "a", "score": True}, r"field `score` is bool 'True'"),
        ({"text": "a", "rating": float("inf")}, r"field `rating` is float 'inf'"),
        ({"text": "a", "rating": NAN}, r"field `rating` is float 'nan'; expected a finite number"),
        ({"text": " ", "score": 1}, r"field `text` is empty"),
        ({"completion": "a", "score": 1}, r"field `prompt` is missing"),
    ],
)
def test_a_bad_rating_is_found_by_place_and_field(fields, message):
    with pytest.raises(ValueError, match=rf"^data.jsonl, line 7: .*{message}"):
        rated_example(row(**fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"answer": "7"}, r"field `prompt` is missing \(columns: \['answer'\]\)"),
        ({"prompt": 7}, r"field `prompt` is int '7'"),
        ({"prompt": ""}, r"field `prompt` is empty"),
        ({"prompt": [USER, ASSISTANT]}, r"neither begins nor ends with the assistant"),
    ],
)
def test_a_bad_prompt_is_found_by_place_and_field(fields, message):
    with pytest.raises(ValueError, match=rf"^data.jsonl, line 7: .*{message}"):
        prompt_example(row(**fields))
