"""Tasks of reasoning-gym: rows, the two sides of a split, and scores that garbage cannot win."""

import json

import pytest

from jaxrl_llm.rewards import tasks
from jaxrl_llm.rewards.tasks import named_task_rows, task_rows, task_score


@pytest.fixture(scope="module", autouse=True)
def reasoning_gym():
    return pytest.importorskip("reasoning_gym")


ONE_DIGIT = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}


def scores(rows, texts, **options):
    columns = {name: [row[name] for row in rows] for name in ("answer", "task")}
    return task_score(**options)(completions=texts, **columns)


def test_rows_are_distinct_and_the_same_every_time():
    rows = task_rows("chain_sum", size=50, seed=3, **ONE_DIGIT)
    assert len({row["prompt"] for row in rows}) == len(rows) == 50
    assert rows == task_rows("chain_sum", size=50, seed=3, **ONE_DIGIT)
    assert rows[:20] != task_rows("chain_sum", size=20, seed=4, **ONE_DIGIT)
    assert scores(rows, [row["answer"] for row in rows]) == [1.0] * 50


def test_a_small_task_gives_what_it_has_and_the_sides_never_meet():
    train, held_out, everything = (
        {row["prompt"] for row in task_rows("chain_sum", size=1000, seed=seed, split=split, held_out=0.2, **ONE_DIGIT)}
        for split, seed in (("train", 0), ("held_out", 7), ("all", 1))
    )
    assert not train & held_out
    assert 100 < len(everything) < 250
    assert 0.1 < len(held_out) / (len(train) + len(held_out)) < 0.3


def test_rows_survive_json_and_an_answer_of_another_release_is_noticed():
    rows = json.loads(json.dumps(task_rows("gcd", size=3)))
    assert scores(rows, [row["answer"] for row in rows]) == [1.0] * 3
    rows[1]["answer"] += "1"
    with pytest.raises(ValueError, match=r"'gcd' gives .*: another release of reasoning-gym made the row"):
        scores(rows, ["1"] * 3)
    rows[1]["task"] = None
    assert scores(rows, ["?"] * 3) == [0.0, None, 0.0]


def test_the_answer_may_be_tagged_or_a_message():
    rows = task_rows("chain_sum", size=2, **ONE_DIGIT)
    tagged = [f"<think>hm</think><result> {row['answer']} </result>" for row in rows]
    assert scores(rows, [[{"role": "assistant", "content": text}] for text in tagged], tag="result") == [1.0, 1.0]
    assert max(scores(rows, tagged)) < 1


def test_prompts_have_a_template_or_are_chats():
    plain, templated, chat = (
        task_rows("gcd", size=1, **options)[0]["prompt"]
        for options in ({}, {"template": "Q: {question}\nA:"}, {"chat": True})
    )
    assert templated == f"Q: {plain}\nA:"
    assert chat == [{"role": "user", "content": plain}]


GARBAGE = ["", " \n", "I do not know.", "nan", "inf", "-Infinity", "1e99999", "9" * 10_001, "None", "[]", "{}", "0e"]


@pytest.mark.parametrize(
    "name",
    [
        *("prime_factorization", "complex_arithmetic", "game_of_life_halting", "coin_flip", "countdown", "puzzle24"),
        *(
            "n_queens",
            "string_insertion",
            "spiral_matrix",
            "binary_matrix",
            "polynomial_multiplication",
            "power_function",
        ),
    ],
)
def test_known_faults_pay_for_the_answer_alone(name):
    rows = task_rows(name, size=4)
    assert scores(rows, [row["answer"] for row in rows]) == [1.0] * 4
    for text in GARBAGE:
        assert max(scores(rows, [text] * 4)) <= 0.05, text
    assert scores(rows, [""] * 4) == [0.0] * 4


def test_no_answer_is_ever_run(monkeypatch, tmp_path):
    mark = tmp_path / "ran"
    attack = f"__import__('pathlib').Path({str(mark)!r}).touch()"
    for name in tasks.REPLACED:
        scores(task_rows(name, size=1), [attack])
    assert not mark.exists()


def test_a_scorer_may_raise_exaggerate_or_change_the_entry(monkeypatch):
    rows = task_rows("gcd", size=4)
    dataset = tasks._dataset("gcd", rows[0]["task"]["size"], 0, "{}")

    def scorer(answer, entry):
        entry["metadata"].clear()
        return {"a": 7, "b": -1, "c": float("nan")}[answer]

    monkeypatch.setattr(dataset, "score_answer", scorer)
    for _ in range(2):
        assert scores(rows, ["a", "b", "c", "d"]) == [1.0, 0.0, 0.0, 0.0]
    assert rows == task_rows("gcd", size=4)


def test_puzzle24_wants_the_numbers_that_it_gave():
    (row,) = task_rows("puzzle24", size=1)
    assert scores([row], ["6*4+1-1"]) == [0.0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("chain_sums", r"no task 'chain_sums'. Did you mean 'chain_sum'"),
        ("qqq", r"no task 'qqq'. There are ab, acre"),
        ("rubiks_cube", r"'rubiks_cube' cannot be used: it stores no answer"),
        ("simple_integration", "runs the answer"),
        ("composite", "several tasks in one"),
        ("chain_sum(min_term=2)", r"has no option min_term; it has min_terms, "),
        ("chain_sum(min_terms=9, max_terms=2)", r"do not fit: "),
        ("chain_sum(size=0)", "size must be at least 1"),
        ("chain_sum(template='?')", "size must be at least 1, .* template='\\?'"),
        ("chain_sum(2)", "cannot be read"),
    ],
)
def test_what_cannot_be_made_says_why(name, message):
    with pytest.raises(ValueError, match=message):
        named_task_rows(name)


def test_a_task_is_named_in_one_string():
    rows = named_task_rows("chain_sum(size=5, min_terms=2, max_terms=2, min_digits=1, max_digits=1)")
    assert rows == task_rows("chain_sum", size=5, split="train", **ONE_DIGIT)
    assert named_task_rows("gcd", split="held_out") == task_rows("gcd", split="held_out")
