"""The traceable reward: equal to exact match on the decoded text, under jit, and blind to what is padding."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.data import character_tokenizer
from jaxrl_llm.data.tokenizers import encode_text
from jaxrl_llm.rewards import exact_match, exact_match_tokens

EOS, PAD, JUNK = 9, 0, 7
TOKENIZER = character_tokenizer("01")
jitted = jax.jit(exact_match_tokens)


def padded(rows, width, fill):
    ids = np.full((len(rows), width), fill, np.int32)
    mask = np.zeros((len(rows), width), bool)
    for index, row in enumerate(rows):
        ids[index, : len(row)], mask[index, : len(row)] = row, True
    return jnp.array(ids), jnp.array(mask)


def reward(completions, answers, width=4, answer_width=3, fill=PAD, eos_id=EOS):
    ids, mask = padded(completions, width, fill)
    answer_ids, answer_mask = padded(answers, answer_width, fill)
    return jitted(ids, mask, answer_ids, answer_mask, eos_id).tolist()


def test_the_completion_up_to_eos_must_be_the_answer():
    cases = [
        ([1, 2, EOS], [1, 2], 1.0),  # the answer
        ([1, 2], [1, 2], 1.0),  # cut before EOS, but right
        ([1, 2, 3, EOS], [1, 2], 0.0),  # too long
        ([1, EOS], [1, 2], 0.0),  # too short
        ([2, 1, EOS], [1, 2], 0.0),  # wrong order
        ([1, 2, EOS, 3], [1, 2], 1.0),  # what follows EOS does not count
        ([EOS], [1], 0.0),  # nothing
        ([EOS], [], 1.0),  # nothing was asked for
        ([], [], 1.0),
        ([1, 2, 3, 4], [1, 2, 3], 0.0),  # never ended
    ]
    completions, answers, rewards = zip(*cases, strict=True)
    assert reward(completions, answers) == list(rewards)


def test_padding_does_not_matter():
    completions, answers = [[1, 2, EOS], [1, JUNK], [JUNK]], [[1, 2], [1], [JUNK]]
    for fill in (PAD, JUNK, EOS):
        for width, answer_width in ((3, 2), (3, 6), (8, 2)):
            assert reward(completions, answers, width, answer_width, fill) == [1.0, 0.0, 1.0]


def test_there_may_be_several_eos():
    assert reward([[1, 5], [1, EOS], [1, 2]], [[1], [1], [1]], eos_id=jnp.array([5, EOS])) == [1.0, 1.0, 0.0]


def test_a_mask_of_numbers_is_a_mask():
    ids, answers = jnp.array([[1, EOS, 3]]), jnp.array([[1, 0]])
    result = exact_match_tokens(ids, jnp.array([[1.0, 1.0, 0.0]]), answers, jnp.array([[1, 0]]), EOS)
    assert result.tolist() == [1.0]


TEXTS = st.lists(st.tuples(st.text("01", max_size=3), st.text("01", max_size=3)), min_size=6, max_size=6)


@hypothesis.given(TEXTS)
def test_it_agrees_with_exact_match_on_the_text(pairs):
    texts, answers = zip(*pairs, strict=True)
    completions = [[*encode_text(text, TOKENIZER), TOKENIZER.eos_token_id] for text in texts]
    answer_ids = [encode_text(answer, TOKENIZER) for answer in answers]
    got = reward(completions, answer_ids, eos_id=TOKENIZER.eos_token_id)
    assert got == exact_match(texts, list(texts), answer=list(answers))
