"""The run around the loss, with a loss that compiles in no time: the distance of one parameter to the rows' values."""

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.data import (
    Row,
    bucket_length,
    load_tokenizer,
    preference_example,
    supervised_example,
    unpaired_examples,
)
from jaxrl_llm.models import from_pretrained
from jaxrl_llm.recipes.options import ModelOptions
from jaxrl_llm.recipes.text.language_model import load_model
from jaxrl_llm.recipes.text.offline import train_offline
from jaxrl_llm.recipes.text.offline_task import (
    OfflineOptions,
    ReferenceOptions,
    Task,
    load_splits,
    real_rows,
    sample_prompts,
)
from jaxrl_llm.reductions import row_weights, token_weights, weighted_sum
from tests.recipes.runs import TINY, assert_same_run, curve, press_ctrl_c_after, renamed, write_rows


class Rows(NamedTuple):
    values: Any
    tokens: Any
    real: Any
    reference: Any = None
    weights: Any = None


def collate(rows, length):
    """A row is its length and its value."""
    values = jnp.array([value for _, value in rows], jnp.float32)
    return Rows(values, jnp.zeros((len(rows), length), bool), real_rows(rows))


def parameter(params):
    return params["final_norm"]["bias"][0]


def loss_fn(params, batch, key):
    weights = row_weights(batch.values) if batch.weights is None else batch.weights
    distance = weighted_sum((parameter(params) - batch.values) ** 2, weights)
    return distance, {"values": weighted_sum(batch.values, weights)}


def make_task(train, held_out, **changes):
    task = Task(
        label="toy",
        train=train,
        held_out=held_out,
        length=lambda row: row[0],
        collate=collate,
        loss_fn=loss_fn,
        evaluation_loss_fn=loss_fn,
        weights_fn=lambda batch, axis_name: token_weights(batch.real, "token_mean", axis_name=axis_name),
    )
    return task._replace(**changes)


@pytest.fixture
def config(tmp_path):
    return OfflineOptions(
        **TINY,
        output_dir=str(tmp_path / "whole"),
        dataset="toy",
        optim="sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1e3,
        per_device_train_batch_size=2,
        max_steps=8,
        logging_steps=1,
        eval_steps=1,
        num_samples=0,
    )


@pytest.fixture(scope="module")
def model():
    return load_model(ModelOptions(**TINY | {"n_positions": 1500}), jax.random.key(0))


def train(config, model, task, **options):
    """Trains a copy, for the steps of a run give away the memory of their parameters."""
    return train_offline(config, model._replace(params=jax.tree.map(jnp.copy, model.params)), task, **options)


def test_the_evaluation_is_the_mean_over_all_rows_though_the_last_batch_is_ragged(config, model):
    held_out = [(4, value) for value in (1.0, 2.0, 3.0, 4.0, 9.0)]
    params, figures = train(config, model, make_task([(4, 1.0)] * 4, held_out))
    expected = np.mean([(parameter(params) - value) ** 2 for _, value in held_out])
    assert figures["eval_loss"] == pytest.approx(expected, rel=1e-6)
    assert figures["eval_values"] == pytest.approx(3.8, rel=1e-6)


def test_a_loss_that_cannot_be_split_is_averaged_over_whole_batches(config, model):
    task = make_task([(4, 1.0)] * 4, [(4, value) for value in (1.0, 2.0, 3.0, 4.0, 9.0)], weights_fn=None)
    _, figures = train(config, model, task)
    assert figures["eval_values"] == pytest.approx(2.5, rel=1e-6)


# The parameter goes from 0 towards 1, by a fifth of what is left: 0, 0.2, 0.36, 0.488, 0.5904, 0.67232.
TOWARDS_ONE = [(4, 1.0)] * 4


def test_the_best_model_is_kept_and_reported_though_the_run_went_past_it(config, model, monkeypatch):
    config, task = dataclasses.replace(config, early_stopping_patience=2), make_task(TOWARDS_ONE, [(4, 0.5)] * 2)
    params, figures = train(config, model, task)
    lines = curve(config.output_dir)
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 5]
    assert lines[-1]["eval_loss"] == pytest.approx(0.17232**2, rel=1e-5)
    assert figures["eval_loss"] == pytest.approx(0.012**2, rel=1e-4)
    assert float(parameter(params)) == pytest.approx(0.488, rel=1e-6)
    assert float(parameter(from_pretrained(figures["model"])[1])) == pytest.approx(0.488, rel=1e-6)

    cut = renamed(config, "cut")
    with monkeypatch.context() as patch:
        press_ctrl_c_after(patch, step=4)
        assert "model" not in train(cut, model, task)[1]
    assert train(dataclasses.replace(cut, resume=True), model, task)[1] == figures | {
        "model": f"{cut.output_dir}/model"
    }
    assert_same_run(config.output_dir, cut.output_dir)


def test_where_training_only_harms_the_model_of_the_start_is_kept(config, model):
    config = dataclasses.replace(config, early_stopping_patience=1)
    params, figures = train(config, model, make_task(TOWARDS_ONE, [(4, -1.0)] * 2))
    assert [line["step"] for line in curve(config.output_dir)] == [0, 1]
    assert float(parameter(params)) == float(parameter(from_pretrained(figures["model"])[1])) == 0
    assert figures["eval_loss"] == pytest.approx(1)


def test_rows_of_like_length_share_a_batch_and_few_programs_compile(config, model):
    lengths = [*range(1, 61), *range(100, 460, 4)]
    seen, traces = [], []

    def counted_loss(params, batch, key):
        traces.append(batch.tokens.shape)
        return loss_fn(params, batch, key)

    def counted_collate(rows, length):
        if len(rows) == 10:  # a batch of training; an evaluation has one row
            seen.extend(rows)
            assert max(row[0] for row in rows) <= length
        return collate(rows, length)

    config = dataclasses.replace(
        config, per_device_train_batch_size=10, num_train_epochs=2.0, max_steps=0, group_by_length=True, eval_steps=99
    )
    rows = [(length, float(index)) for index, length in enumerate(lengths)]
    task = make_task(rows, [(500, 0.0)], loss_fn=counted_loss, collate=counted_collate)
    train(config, model, task)
    assert sorted(seen) == sorted(rows * 2)
    assert 1 < len(set(traces)) == len(traces) <= 4
    padded = sum(bucket_length(max(row[0] for row in seen[i : i + 10]), max_length=500) * 10 for i in range(0, 300, 10))
    assert padded < 1.5 * sum(row[0] for row in seen)  # padded to the longest row of all it would be 2.8 times


def read_samples(folder):
    return [json.loads(line) for line in Path(folder, "samples.jsonl").read_text("utf-8").splitlines()]


def test_held_out_prompts_are_completed_at_every_evaluation_the_same_after_a_resume(config, model, monkeypatch):
    texts = "1+1=", "2" * 1499, "3+", "7"  # after the second there is no room to write
    prompts = [np.array(model.tokenizer.encode(text), np.int32) for text in texts]
    config = dataclasses.replace(config, num_samples=2, sample_tokens=3, max_steps=4, eval_steps=2)
    task = make_task(TOWARDS_ONE, [(4, 1.0)], prompts=prompts)
    train(config, model, task)
    rows = read_samples(config.output_dir)
    assert [(row["step"], row["prompt"]) for row in rows] == [(s, p) for s in (0, 2, 4) for p in ("1+1=", "3+")]
    assert all(len(row["completion"]) <= 3 for row in rows)
    assert any(row["completion"] for row in rows)
    cut = renamed(config, "cut")
    with monkeypatch.context() as patch:
        press_ctrl_c_after(patch, step=3)
        train(cut, model, task)
    train(dataclasses.replace(cut, resume=True), model, task)
    assert read_samples(cut.output_dir) == rows


def test_samples_answer_prompts_and_the_last_turn_of_conversations():
    turns = [("user", "1+1="), ("assistant", "2"), ("user", "2+2="), ("assistant", "4"), ("user", "9")]
    rows = [
        {"prompt": "3+4=", "completion": "7"},
        {"text": "nothing is asked"},
        {"messages": [{"role": role, "content": content} for role, content in turns]},
        {"prompt": [{"role": "user", "content": "5+5="}], "completion": [{"role": "assistant", "content": "10"}]},
        {"instruction": "Add.", "input": "1 2", "output": "3"},
    ]
    tokenizer = load_tokenizer("gpt2")
    prompts = sample_prompts([supervised_example(Row("a row", row)) for row in rows], tokenizer)
    assert tokenizer.batch_decode(prompts) == [
        "3+4=",
        "### User:\n1+1=\n### Assistant:\n2<|endoftext|>\n### User:\n2+2=\n### Assistant:\n",
        "### User:\n5+5=\n### Assistant:\n",
        "### Instruction:\nAdd.\n### Input:\n1 2\n### Response:\n",
    ]


def test_held_out_rows_come_from_a_source_of_their_own_or_from_the_dataset(config, tmp_path):
    train_rows, other = [{"text": str(i)} for i in range(10)], [{"text": "a"}, {"text": "b"}]
    config = dataclasses.replace(config, dataset=write_rows(tmp_path / "train.jsonl", train_rows), eval_fraction=0.3)
    first, second = load_splits(config, lambda row: row.fields["text"])
    assert len(second) == 3
    assert sorted(first + second) == [str(i) for i in range(10)]
    config = dataclasses.replace(config, eval_dataset=write_rows(tmp_path / "other.jsonl", other))
    assert load_splits(config, lambda row: row.fields["text"]) == ([str(i) for i in range(10)], ["a", "b"])


GOOD = {"prompt": "1+1=", "chosen": "2", "rejected": "3"}


@pytest.mark.parametrize(
    ("content", "read", "message"),
    [
        ("", supervised_example, "rows.jsonl has no rows"),
        ("\n \n", supervised_example, "rows.jsonl has no rows"),
        (json.dumps(GOOD), preference_example, "rows.jsonl has one row; at least 2 are needed"),
        ({"question": "1+1="}, supervised_example, r"line 2: no SFT format has the columns \['question'\]"),
        ({"prompt": "1+1=", "chosen": "2"}, preference_example, "line 2: field `rejected` is missing"),
        (GOOD | {"rejected": "2"}, preference_example, "line 2: `chosen` and `rejected` are the same"),
        ({"prompt": "1+1=", "completion": "2"}, unpaired_examples, "line 2: no KTO format has the columns"),
    ],
)
def test_bad_files_and_rows_are_refused_with_their_place(config, tmp_path, content, read, message):
    path = tmp_path / "rows.jsonl"
    if isinstance(content, dict):
        write_rows(path, [GOOD | {"completion": "2", "label": True}, content])
    else:
        path.write_text(content)
    with pytest.raises(ValueError, match=message):
        load_splits(dataclasses.replace(config, dataset=str(path)), read)


def test_the_checkpoint_of_another_model_is_refused_with_the_options_that_changed(config, model):
    task = make_task(TOWARDS_ONE, [(4, 1.0)])
    train(config, model, task)
    before = curve(config.output_dir)
    other = dataclasses.replace(config, resume=True, n_embd=32)
    message = (
        r"(?s)does not fit the state of this run.*\[1, 16\], expected float32\[1, 32\].*n_embd: 16 in the saved run"
    )
    with pytest.raises(ValueError, match=message):
        train_offline(other, load_model(other, jax.random.key(0)), task)
    assert curve(config.output_dir) == before


def test_a_reference_that_cannot_move_and_be_scored_beforehand_is_refused():
    with pytest.raises(ValueError, match="precompute_ref_log_probs and sync_ref_model must be not both true"):
        ReferenceOptions(precompute_ref_log_probs=True, sync_ref_model=True).validate_reference()
