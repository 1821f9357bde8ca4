"""The score of a saved reward model as a reward: on the host by name, and inside a program."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.data import PromptExample, TokenBatch, character_tokenizer
from jaxrl_llm.models import from_pretrained_reward_model, save_pretrained
from jaxrl_llm.recipes.options import ModelOptions
from jaxrl_llm.recipes.text import reward_model
from jaxrl_llm.recipes.text.language_model import load_model, read_dataset
from jaxrl_llm.recipes.text.model_rewards import RewardModelReward, same_tokens
from jaxrl_llm.recipes.text.prompts import (
    HostRewards,
    TracedRewards,
    load_host_rewards,
    load_traceable_reward,
    make_prompt_table,
)
from jaxrl_llm.recipes.text.scoring import text_rewards
from jaxrl_llm.rewards import RewardError
from jaxrl_llm.rollouts import Completions
from tests.recipes.runs import TINY


@pytest.fixture(scope="module")
def policy():
    return load_model(ModelOptions(**TINY), jax.random.key(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("scorer")
    model = reward_model.load_reward_model(ModelOptions(**TINY), jax.random.key(1))
    save_pretrained(path, model.module, model.params, model.tokenizer)
    return str(path)


@pytest.fixture(scope="module")
def table(policy):
    prompts = ["1+2=", "34+5=", "0"]
    return make_prompt_table(
        policy, [PromptExample(prompt, {"answer": "7"}) for prompt in prompts], max_prompt_length=8
    )


def completions_of(policy, texts):
    """Completions as a sampler gives them; "." is EOS."""
    eos, pad = policy.tokenizer.eos_token_id, policy.pad_id
    rows = [[eos if c == "." else policy.tokenizer.convert_tokens_to_ids(c) for c in text] for text in texts]
    ids = np.array([row + [pad] * (3 - len(row)) for row in rows], np.int32)
    mask = np.arange(3) < np.array([len(row) for row in rows])[:, None]
    nothing = jnp.zeros(ids.shape)
    return Completions(jnp.array(ids), jnp.array(mask), nothing, nothing), rows


TEXTS = ["7.", "12.", "123", ".", "99.", "8"]


@pytest.fixture(scope="module")
def expected(policy, folder, table):
    """The scores of the sampled ids, one row at a time."""
    module, params, _ = from_pretrained_reward_model(folder)
    score = jax.jit(text_rewards, static_argnums=0)
    scores = []
    for index, row in enumerate(completions_of(policy, TEXTS)[1]):
        ids = np.concatenate([table.tokens[index // 2], row]).astype(np.int32)
        padded, mask = np.pad(ids, (0, 16 - len(ids)))[None], (np.arange(16) < len(ids))[None]
        scores.append(score(module, params, TokenBatch(padded, mask, mask))[0])
    return np.array(scores)


def test_the_host_reward_scores_the_sampled_ids_with_their_eos(policy, folder, table, expected):
    rewards = load_host_rewards(policy, [f"reward_model:{folder}"])
    totals, metrics = rewards(table, np.arange(3), completions_of(policy, TEXTS)[0])
    np.testing.assert_allclose(totals[:, 0], expected, atol=1e-5)
    assert np.std(expected) > 0.01
    assert metrics["rewards/reward_model/mean"] == pytest.approx(expected.mean(), abs=1e-5)
    assert set(metrics) == {"rewards/reward_model/mean", "rewards/reward_model/std"}


def test_small_batches_change_no_score(policy, folder, table, expected):
    (reward,) = load_host_rewards(policy, [f"reward_model:{folder}"]).functions
    assert isinstance(reward, RewardModelReward)
    small = HostRewards(policy, [dataclasses.replace(reward, batch_size=4)])
    scores, _ = small(table, np.arange(3), completions_of(policy, TEXTS)[0])
    np.testing.assert_allclose(scores[:, 0], expected, atol=1e-5)


def test_the_traced_reward_is_that_of_the_host(policy, folder, table, expected):
    completions, _ = completions_of(policy, TEXTS)
    names = [f"reward_model:{folder}", "exact_match_tokens"]
    eos_id = policy.tokenizer.eos_token_id
    reward = load_traceable_reward(names, [eos_id], tokenizer=policy.tokenizer)
    totals, _ = TracedRewards(policy, reward)(table, np.arange(3), completions)
    np.testing.assert_allclose(totals[:, 0], expected, atol=1e-5)
    np.testing.assert_array_equal(totals[:, 1], [1, 0, 0, 0, 0, 0])


def test_the_parameters_of_a_traced_reward_model_are_no_constants_of_a_program_that_is_given_it(policy, folder, table):
    completions, _ = completions_of(policy, TEXTS)
    reward = load_traceable_reward([f"reward_model:{folder}"], [1], tokenizer=policy.tokenizer)
    columns = {name: jnp.repeat(x, 2, axis=0) for name, x in table.batch(np.arange(3), policy.pad_id).columns.items()}
    given = jax.make_jaxpr(lambda reward: reward(completions, columns))(reward)
    closed_over = jax.make_jaxpr(lambda: reward(completions, columns))()
    sizes = [sum(np.size(x) for x in program.consts) for program in (given, closed_over)]
    assert sizes[1] - sizes[0] == sum(x.size for x in jax.tree.leaves(reward.functions[0].params)) > 1000


def test_another_tokenizer_reads_the_text_and_an_eos_where_the_completion_ended(policy, folder, table, expected):
    # One character more, so that all ids are others.
    other = dataclasses.replace(ModelOptions(**TINY), tokenizer="characters:!+0123456789=")
    stranger = load_model(other, jax.random.key(0))
    rewards = load_host_rewards(stranger, [f"reward_model:{folder}"])
    prompts = make_prompt_table(stranger, [PromptExample(text, {}) for text in table.texts], max_prompt_length=8)
    totals, _ = rewards(prompts, np.arange(3), completions_of(stranger, TEXTS)[0])
    np.testing.assert_allclose(totals[:, 0], expected, atol=1e-5)
    with pytest.raises(ValueError, match=r"has other tokens than the policy .* tokenized anew"):
        load_traceable_reward([f"reward_model:{folder}"], [1], tokenizer=stranger.tokenizer)


def test_a_text_that_the_reward_model_has_no_room_for_is_named(policy, folder):
    long = make_prompt_table(policy, [PromptExample("1" * 15, {})], max_prompt_length=16)
    completions, _ = completions_of(policy, ["12."])
    with pytest.raises(RewardError, match=r"context_length=16 tokens, and 18 are needed.* Row 0: prompt '1111"):
        load_host_rewards(policy, [f"reward_model:{folder}"])(long, np.arange(1), completions)


def test_a_folder_without_a_reward_model_says_so(policy, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_host_rewards(policy, ["reward_model:nowhere/at/all"])
    save_pretrained(tmp_path / "policy", policy.module, policy.params, policy.tokenizer)
    with pytest.raises(ValueError, match="holds no reward model"):
        load_host_rewards(policy, [f"reward_model:{tmp_path / 'policy'}"])


def test_host_rewards_are_given_ids_and_count_errors(policy, table):
    seen = {}

    def lengths(prompt_ids, completion_ids, **columns):
        seen.update(prompt_ids=prompt_ids, completion_ids=completion_ids)
        if any(len(ids) == 1 for ids in completion_ids):
            raise RuntimeError("too short")
        return [float(len(ids)) for ids in completion_ids]

    completions, rows = completions_of(policy, TEXTS)
    rewards = HostRewards(policy, [lengths], errors="ignore", timeout=60.0)
    totals, metrics = rewards(table, np.arange(3), completions)
    np.testing.assert_array_equal(totals[:, 0], [2, 3, 3, np.nan, 3, np.nan])
    assert metrics["rewards/lengths/errors"] == 2
    with pytest.raises(RewardError, match=r"'lengths' raised RuntimeError: too short. Row 3: prompt '34\+5='"):
        rewards._replace(errors="raise")(table, np.arange(3), completions)
    assert seen["completion_ids"] == [rows[3]]
    assert seen["prompt_ids"] == [table.tokens[1].tolist()]


def test_names_carry_options(policy, table):
    names = ["soft_overlong(max_completion_length=4, cache=2)", "exact_match"]
    rewards = load_host_rewards(policy, names)
    totals, metrics = rewards(table, np.arange(3), completions_of(policy, TEXTS)[0])
    assert totals[:, 0].tolist() == [0.0, -0.5, -0.5, 0.0, -0.5, 0.0]
    assert totals[:, 1].tolist() == [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert {"rewards/soft_overlong/mean", "rewards/exact_match/mean"} <= set(metrics)


def test_a_task_is_a_dataset():
    pytest.importorskip("reasoning_gym")
    options = "size=4, min_terms=2, max_terms=2, min_digits=1, max_digits=1, template='{question}\\n'"
    train, held_out = (read_dataset(f"task:chain_sum({options})", split) for split in ("train", "held_out"))
    assert len(train) == len(held_out) == 4
    assert {"prompt", "answer", "metadata", "task"} == set(train[0].fields)
    assert train[0].fields["prompt"].endswith("=\n")


def test_tokenizers_with_other_ids_are_not_the_same():
    assert same_tokens(character_tokenizer("012"), character_tokenizer("210"))
    assert not same_tokens(character_tokenizer("012"), character_tokenizer("0123"))
