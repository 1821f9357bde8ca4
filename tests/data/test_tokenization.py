"""Tokenizing: the loss falls on responses alone, prompts are the same in training and generation, cuts are counted."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from jaxrl_llm.data import (
    Instruction,
    Message,
    PreferenceExample,
    PromptExample,
    RatedExample,
    SupervisedExample,
    UnpairedExample,
    tokenize_preference,
    tokenize_preference_rows,
    tokenize_prompt,
    tokenize_prompt_rows,
    tokenize_rated_rows,
    tokenize_sft,
    tokenize_sft_rows,
    tokenize_unpaired_rows,
)
from tests.data.chat import MARKED
from tests.unchecked import unchecked

USER, ASSISTANT = Message("user", "你好！"), Message("assistant", "你好，有什么可以帮你？")
MORE, BYE = Message("user", "再见"), Message("assistant", "再见！")
WORDS = st.text("ab 幸福.\n", min_size=1, max_size=12)


def trained_text(tokens, tokenizer):
    return tokenizer.decode(tokens.ids[tokens.loss_mask])


def test_the_loss_falls_on_the_response_and_its_eos(digits):
    tokens = tokenize_sft(SupervisedExample("3+4=", "11"), digits, max_length=64)
    assert digits.convert_ids_to_tokens(tokens.ids) == ["3", "+", "4", "=", "1", "1", "<eos>"]
    assert tokens.loss_mask.tolist() == [False] * 4 + [True] * 3
    assert tokens.ids.dtype == np.int32
    assert not tokens.truncated


def test_chinese_instructions_go_through_gpt2s_bpe(gpt2):
    example = SupervisedExample(Instruction("翻译成英文", "幸福"), "人工智能 means AI。")
    tokens = tokenize_sft(example, gpt2, max_length=512)
    assert trained_text(tokens, gpt2) == "人工智能 means AI。<|endoftext|>"
    assert (
        gpt2.decode(tokens.ids[~tokens.loss_mask]) == "### Instruction:\n翻译成英文\n### Input:\n幸福\n### Response:\n"
    )


def test_every_response_of_a_conversation_is_trained_and_what_follows_the_last_is_left_out(gpt2, chatml):
    for tokenizer in (gpt2, chatml):
        tokens = tokenize_sft(SupervisedExample((), (USER, ASSISTANT, MORE, BYE)), tokenizer, max_length=512)
        eos = tokenizer.eos_token
        assert trained_text(tokens, tokenizer) == f"{ASSISTANT.content}{eos}{BYE.content}{eos}"
        assert tokens.ids[-1] == tokenizer.eos_token_id


SYSTEM = Message("system", "Be kind.")
TURNS = {
    "text": SupervisedExample("", "Once upon"),
    "completion": SupervisedExample("Hi you", " there"),
    "instruction": SupervisedExample(Instruction("Hi"), "there"),
    "messages": SupervisedExample((), (SYSTEM, USER, ASSISTANT, MORE, BYE)),
    "turns": SupervisedExample((USER, ASSISTANT, MORE), (BYE, USER, ASSISTANT)),
}
A, B = ASSISTANT.content, BYE.content
ONE_TURN = "\n### User:\n你好！\n### Assistant:\n"


@pytest.mark.parametrize(
    ("kind", "completion_only", "assistant_only", "trained"),
    [
        ("text", True, True, " upon<eos>"),
        ("text", False, False, " upon<eos>"),
        ("completion", True, True, " there<eos>"),
        ("completion", True, False, " there<eos>"),
        ("completion", False, True, " you there<eos>"),
        ("instruction", True, True, "there<eos>"),
        ("instruction", False, True, " Instruction:\nHi\n### Response:\nthere<eos>"),
        ("messages", True, True, f"{A}<eos>{B}<eos>"),
        ("messages", False, True, f"{A}<eos>{B}<eos>"),
        (
            "messages",
            True,
            False,
            f" System:\nBe kind.\n### User:\n你好！\n### Assistant:\n{A}<eos>\n### User:\n再见\n### Assistant:\n{B}<eos>\n",
        ),
        ("turns", True, True, f"{B}<eos>{A}<eos>"),
        ("turns", False, True, f"{A}<eos>{B}<eos>{A}<eos>"),
        ("turns", True, False, f"{B}<eos>{ONE_TURN}{A}<eos>\n"),
        (
            "turns",
            False,
            False,
            f" User:\n你好！\n### Assistant:\n{A}<eos>\n### User:\n再见\n### Assistant:\n{B}<eos>{ONE_TURN}{A}<eos>\n",
        ),
    ],
)
def test_the_two_switches_say_what_is_trained(gpt2, kind, completion_only, assistant_only, trained):
    tokens = tokenize_sft(
        TURNS[kind],
        gpt2,
        max_length=512,
        completion_only_loss=completion_only,
        assistant_only_loss=assistant_only,
    )
    assert trained_text(tokens, gpt2).replace("<|endoftext|>", "<eos>") == trained


def test_a_template_with_marks_trains_what_transformers_says(chatml):
    chatml.chat_template = MARKED
    tokens = tokenize_sft(TURNS["messages"], chatml, max_length=512)
    messages = [message._asdict() for message in TURNS["messages"].completion]
    expected = chatml.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
    length = len(tokens.ids)
    assert tokens.ids.tolist() == expected["input_ids"][:length]
    assert tokens.loss_mask.astype(int).tolist() == expected["assistant_masks"][:length]
    assert not any(expected["assistant_masks"][length:])


@pytest.mark.parametrize(
    ("max_length", "start", "targets"), [(7, 0, "11<eos>"), (6, 1, "11<eos>"), (3, 4, "1<eos>"), (1, 6, "")]
)
def test_keeping_the_end_keeps_eos_and_cuts_the_beginning(digits, max_length, start, targets):
    example = SupervisedExample("3+4=", "11")
    whole = tokenize_sft(example, digits, max_length=7)
    tokens = tokenize_sft(example, digits, max_length=max_length, truncation="keep_end")
    assert tokens.ids.tolist() == whole.ids[start:].tolist()
    assert trained_text(tokens, digits) == targets
    assert tokens.truncated == (max_length < 7)


def test_rows_that_lose_their_eos_or_their_beginning_are_counted(digits):
    examples = [SupervisedExample("1+1=", "2"), SupervisedExample("1+1+1+1=", "4")]
    kept = tokenize_sft_rows(examples, digits, max_length=7, truncation="keep_end")
    assert (kept.num_truncated, kept.num_dropped, kept.rows[1].ids[-1]) == (1, 0, digits.eos_token_id)
    cut = tokenize_sft_rows(examples, digits, max_length=9)
    assert (cut.num_truncated, cut.num_dropped) == (1, 0)
    assert digits.eos_token_id not in cut.rows[1].ids


def test_an_unknown_truncation_is_refused(digits):
    with unchecked(), pytest.raises(ValueError, match=r"truncation must be one of .*'keep_end'.*, got 'middle'"):
        tokenize_sft(TURNS["text"], digits, max_length=4, truncation="middle")


def test_text_is_trained_from_its_second_token(digits):
    tokens = tokenize_sft(SupervisedExample("", "123"), digits, max_length=64)
    assert tokens.loss_mask.tolist() == [False, True, True, True]


@hypothesis.given(WORDS, WORDS)
def test_a_prompt_has_the_same_ids_in_training_as_in_generation(gpt2, prompt, completion):
    for given in (prompt, Instruction(prompt), Instruction(prompt, completion)):
        prompt_ids = tokenize_prompt(given, gpt2)
        tokens = tokenize_sft(SupervisedExample(given, completion), gpt2, max_length=10_000)
        assert tokens.ids[: len(prompt_ids)].tolist() == prompt_ids.tolist()
        assert gpt2.decode(tokens.ids[len(prompt_ids) :]) == completion + "<|endoftext|>"


def test_tokenizing_the_whole_text_would_change_the_prompt(gpt2):
    whole, prompt = gpt2.encode("The capital"), tokenize_prompt("The cap", gpt2)
    assert whole[: len(prompt)] != prompt.tolist()
    tokens = tokenize_sft(SupervisedExample("The cap", "ital"), gpt2, max_length=16)
    assert tokens.ids[: len(prompt)].tolist() == prompt.tolist()


def test_a_conversation_continues_from_the_ids_that_were_trained(gpt2, chatml):
    for tokenizer in (gpt2, chatml):
        whole = tokenize_sft(SupervisedExample((), (USER, ASSISTANT, MORE, BYE)), tokenizer, max_length=512)
        prompt_ids = tokenize_prompt((USER, ASSISTANT, MORE), tokenizer)
        assert whole.ids[: len(prompt_ids)].tolist() == prompt_ids.tolist()


def test_a_row_is_cut_at_max_length_and_says_so(digits):
    example = SupervisedExample("3+4=", "11")
    whole = tokenize_sft(example, digits, max_length=7)
    assert not whole.truncated
    cut = tokenize_sft(example, digits, max_length=6)
    assert cut.truncated
    assert cut.ids.tolist() == whole.ids[:6].tolist()
    assert cut.loss_mask.tolist() == whole.loss_mask[:6].tolist()


def test_rows_without_a_response_left_are_dropped_and_counted(digits):
    examples = [SupervisedExample("1+1=", "2"), SupervisedExample("1+1+1+1=", "4"), SupervisedExample("1+1+1=", "3")]
    rows = tokenize_sft_rows(examples, digits, max_length=7)
    assert [len(row.ids) for row in rows.rows] == [6, 7]
    assert rows.kept == [0, 2]
    assert (rows.num_truncated, rows.num_dropped) == (1, 1)
    assert str(rows) == "2 of 3 rows (1 truncated, 1 dropped)"


def test_nothing_left_to_train_on_is_an_error(digits):
    with pytest.raises(ValueError, match=r"None of the 1 rows has a response .* within max_length=4. Raise the limit"):
        tokenize_sft_rows([SupervisedExample("1+1=", "2")], digits, max_length=4)
    with pytest.raises(ValueError, match="max_length must be at least 1 token, got 0"):
        tokenize_sft(SupervisedExample("1+1=", "2"), digits, max_length=0)
    with pytest.raises(ValueError, match="within max_prompt_length=3"):
        tokenize_prompt_rows([PromptExample("1+1=", {})], digits, max_prompt_length=3)


def test_a_preference_row_shares_its_prompt_and_ends_both_answers(gpt2, chatml):
    good, bad = Message("assistant", "你好"), Message("assistant", "Go away")
    for tokenizer in (gpt2, chatml):
        for example in (
            PreferenceExample("Greet: ", "你好", "Go away"),
            PreferenceExample(Instruction("Greet"), "你好", "Go away"),
            PreferenceExample((USER, ASSISTANT, MORE), (good,), (bad,)),
        ):
            tokens = tokenize_preference(example, tokenizer)
            assert tokens.prompt_ids.tolist() == tokenize_prompt(example.prompt, tokenizer).tolist()
            assert tokenizer.decode(tokens.chosen_ids) == f"你好{tokenizer.eos_token}"
            assert tokenizer.decode(tokens.rejected_ids) == f"Go away{tokenizer.eos_token}"
            assert not tokens.truncated


def test_answers_are_cut_at_max_length_and_lost_ones_dropped(digits):
    examples = [PreferenceExample("1+1=", "2", "345"), PreferenceExample("1+1+1=", "3", "4")]
    whole = tokenize_preference(examples[0], digits)
    rows = tokenize_preference_rows(examples, digits, max_length=6)
    (row,) = rows.rows
    assert row.chosen_ids.tolist() == whole.chosen_ids.tolist()
    assert row.rejected_ids.tolist() == whole.rejected_ids[:2].tolist()
    assert (rows.kept, rows.num_truncated, rows.num_dropped) == ([0], 1, 1)
    assert tokenize_preference_rows(examples, digits).kept == [0, 1]


def test_answers_that_are_the_same_within_the_limit_are_dropped(digits):
    examples = [PreferenceExample("1+1=", "123", "124"), PreferenceExample("1+1=", "1", "2")]
    rows = tokenize_preference_rows(examples, digits, max_length=6)
    assert (rows.kept, rows.num_dropped) == ([1], 1)
    assert tokenize_preference_rows(examples, digits).num_dropped == 0


def test_margins_are_carried_along(digits):
    assert tokenize_preference(PreferenceExample("1=", "1", "2", 0.5), digits).margin == 0.5
    assert tokenize_preference(PreferenceExample("1=", "1", "2"), digits).margin == 0.0


def test_unpaired_and_rated_rows_end_with_eos_and_lost_completions_are_dropped(digits):
    prompts = ["1+1=", "1+1+1+1=", "1+1+1="]
    unpaired = tokenize_unpaired_rows([UnpairedExample(p, "12", p == "1+1=") for p in prompts], digits, max_length=8)
    rated = tokenize_rated_rows([RatedExample(p, "12", len(p) / 2) for p in prompts], digits, max_length=8)
    for rows in (unpaired, rated):
        assert [digits.decode(row.prompt_ids) for row in rows.rows] == ["1+1=", "1+1+1="]
        assert [digits.decode(row.completion_ids) for row in rows.rows] == ["12<eos>", "12"]
        assert (rows.kept, rows.num_truncated, rows.num_dropped) == ([0, 2], 1, 1)
        assert [row.truncated for row in rows.rows] == [False, True]
    assert [row.label for row in unpaired.rows] == [True, False]
    assert [row.score for row in rated.rows] == [2.0, 3.0]


def test_a_rated_text_has_no_prompt(digits, chatml):
    (row,) = tokenize_rated_rows([RatedExample("", "1+1", 2.5)], digits).rows
    assert (row.prompt_ids.tolist(), digits.decode(row.completion_ids)) == ([], "1+1<eos>")
    chat = UnpairedExample((USER,), (ASSISTANT,), True)
    (row,) = tokenize_unpaired_rows([chat], chatml).rows
    assert chatml.decode(row.completion_ids) == f"{ASSISTANT.content}<|im_end|>"
    assert row.prompt_ids.tolist() == tokenize_prompt((USER,), chatml).tolist()


def test_an_empty_dataset_is_an_error(digits):
    for tokenize in (tokenize_preference_rows, tokenize_unpaired_rows, tokenize_rated_rows, tokenize_prompt_rows):
        with pytest.raises(ValueError, match="There are no examples to tokenize: the dataset is empty"):
            tokenize([], digits)
    with pytest.raises(ValueError, match="There are no examples to tokenize: the dataset is empty"):
        tokenize_sft_rows([], digits, max_length=8)


def test_prompts_that_are_too_long_are_dropped_not_cut(digits):
    examples = [PromptExample(prompt, {}) for prompt in ("1+1=", "1+1+1=", "1=")]
    rows = tokenize_prompt_rows(examples, digits, max_prompt_length=4)
    assert [digits.decode(ids) for ids in rows.rows] == ["1+1=", "1="]
    assert (rows.kept, rows.num_dropped) == ([0, 2], 1)
    assert len(tokenize_prompt_rows(examples, digits).rows) == 3
