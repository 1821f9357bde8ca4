import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_llm.data import character_tokenizer, supervised_example, tokenize_sft
from jaxrl_llm.data.rows import as_rows
from jaxrl_llm.models import save_pretrained
from jaxrl_llm.recipes.options import ModelOptions
from jaxrl_llm.recipes.text import distill, sft
from jaxrl_llm.recipes.text.language_model import LanguageModel, load_model
from tests.recipes.runs import TINY, assert_close_weights, assert_complete_folder, curve, renamed, write_rows

ROWS = [{"prompt": f"{a}+{b}=", "completion": "7" * (1 + b % 3)} for a in range(4) for b in range(6)]


@pytest.fixture(scope="module")
def teacher():
    """A model that says 7 or nothing more, whatever it reads: its last norm gives a constant, which its head reads."""
    model = load_model(ModelOptions(**TINY), jax.random.key(7))
    tokenizer = model.tokenizer
    params = jax.tree.map(jnp.zeros_like, model.params)
    params["final_norm"]["bias"] = params["final_norm"]["bias"].at[0].set(1.0)
    table = params["token_embedding"]["embedding"]
    seven = tokenizer.convert_tokens_to_ids("7")
    table = table.at[seven, 0].set(4.0).at[tokenizer.eos_token_id, 0].set(3.5)
    return LanguageModel(model.module, params | {"token_embedding": {"embedding": table}}, tokenizer)


@pytest.fixture(scope="module")
def finished(teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("distill")
    save_pretrained(folder / "teacher", *teacher)
    config = distill.Config(
        **TINY,
        output_dir=str(folder / "whole"),
        dataset=write_rows(folder / "rows.jsonl", ROWS),
        teacher=str(folder / "teacher"),
        eval_fraction=0.25,
        per_device_train_batch_size=4,
        optim="sgd",
        learning_rate=1.0,
        lr_scheduler_type="constant",
        warmup_steps=0,
        max_steps=8,  # later, so high a rate oscillates
        logging_steps=1,
        eval_steps=4,
        save_steps=4,
        num_samples=0,
    )
    return config, distill.run(config)


def test_the_student_comes_to_predict_what_the_teacher_does_and_leaves_everything_behind(finished):
    config, figures = finished
    before = curve(config.output_dir)[0]
    assert figures["eval_loss"] < 0.3 * before["eval_loss"]
    assert figures["eval_nll"] < before["eval_nll"] - 1
    assert set(curve(config.output_dir)[-1]) >= {"loss", "jsd", "eval_jsd", "eval_mean_token_accuracy", "grad_norm"}
    assert_complete_folder(config.output_dir, steps=[4, 8])


def test_tokens_survive_micro_batches(finished):
    whole, _ = finished
    in_parts = renamed(whole, "in_parts", gradient_accumulation_steps=2)
    distill.run(in_parts)
    for line, other in zip(curve(whole.output_dir), curve(in_parts.output_dir), strict=True):
        assert line == pytest.approx(other, rel=1e-5, abs=2e-6)
    assert_close_weights(whole.output_dir, in_parts.output_dir, atol=2e-6)


@pytest.fixture(scope="module")
def batch(teacher):
    rows = [supervised_example(row) for row in as_rows(ROWS[:6])]
    batch = sft.collate(teacher.pad_id, [tokenize_sft(row, teacher.tokenizer, max_length=16) for row in rows], 12)
    return batch._replace(weights=sft.batch_weights(batch, None))


def test_a_student_that_is_its_teacher_has_no_loss_and_no_gradient(finished, batch):
    model = load_model(finished[0], jax.random.key(3))
    loss_fn = distill.make_loss(model, model, finished[0])
    (loss, _), grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(
        model.params, batch, jax.random.key(0), model.params
    )
    assert float(loss) == pytest.approx(0, abs=1e-7)
    assert float(optax.tree.norm(grads)) < 1e-6


def test_each_token_is_compared_where_it_is_predicted_though_the_teachers_head_is_padded(finished, batch):
    student, teacher = (load_model(finished[0], jax.random.key(seed)) for seed in (0, 1))
    config = dataclasses.replace(finished[0], beta=0.0, temperature=2.0)

    @jax.jit
    def log_probs(params, temperature):
        return jax.nn.log_softmax(student.apply({"params": params}, batch.tokens)[0] / temperature)[:, :-1]

    p, q = (np.asarray(log_probs(model.params, 2.0), np.float64) for model in (teacher, student))
    learned = np.asarray(batch.loss_mask)[:, 1:]
    likely = np.take_along_axis(np.asarray(log_probs(student.params, 1.0)), np.asarray(batch.tokens)[:, 1:, None], 2)
    expected = (np.exp(p) * (p - q)).sum(-1)[learned].mean()  # KL(teacher‖student), each divided by the temperature

    # Models of one tokenizer come with as many entries as their makers liked.
    table = teacher.params["token_embedding"]["embedding"]
    params = teacher.params | {"token_embedding": {"embedding": jnp.pad(table, ((0, 6), (0, 0)), constant_values=9.0)}}
    module = teacher.module.clone(config=dataclasses.replace(teacher.module.config, vocab_size=len(table) + 6))
    padded = teacher._replace(module=module, params=params)
    loss_fn = jax.jit(distill.make_loss(student, padded, config, evaluation=True))
    loss, metrics = loss_fn(student.params, batch, jax.random.key(0), padded.params)
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert float(metrics["nll"]) == pytest.approx(-likely[..., 0][learned].mean(), rel=1e-5)


def test_a_student_of_another_vocabulary_is_refused(finished, tmp_path):
    config, _ = finished
    model = load_model(config, jax.random.key(0))
    save_pretrained(tmp_path / "student", model.module, model.params, character_tokenizer("+=abcdefghij"))
    config = renamed(config, "other", model=str(tmp_path / "student"))
    with pytest.raises(ValueError, match=r"model='.*student' has another vocabulary than teacher='.*teacher'"):
        distill.run(config)


def test_rows_longer_than_the_teacher_reads_are_refused(finished, tmp_path):
    rows = write_rows(tmp_path / "long.jsonl", [{"prompt": "1+1=", "completion": "7" * 30}] * 4)
    config = renamed(finished[0], "long", dataset=rows, n_positions=64)
    with pytest.raises(ValueError, match="context_length=16 tokens, and 34 are needed: lower max_length"):
        distill.run(config)
