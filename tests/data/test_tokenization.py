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
    SupervisedExample,
    tokenize_preference,
    tokenize_preference_rows,
    tokenize_prompt,
    tokenize_prompt_rows,
    tokenize_sft,
    tokenize_sft_rows,
)

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


def test_without_completion_only_loss_all_but_the_first_token_are_targets(gpt2):
    example = SupervisedExample((), (USER, ASSISTANT))
    tokens = tokenize_sft(example, gpt2, max_length=512, completion_only_loss=False)
    assert gpt2.decode(tokens.ids).endswith("<|endoftext|>\n")
    assert tokens.loss_mask.tolist() == [False] + [True] * (len(tokens.ids) - 1)


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


def test_prompts_that_are_too_long_are_dropped_not_cut(digits):
    examples = [PromptExample(prompt, {}) for prompt in ("1+1=", "1+1+1=", "1=")]
    rows = tokenize_prompt_rows(examples, digits, max_prompt_length=4)
    assert [digits.decode(ids) for ids in rows.rows] == ["1+1=", "1="]
    assert (rows.kept, rows.num_dropped) == ([0, 2], 1)
    assert len(tokenize_prompt_rows(examples, digits).rows) == 3
