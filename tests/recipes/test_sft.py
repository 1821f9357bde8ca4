import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from jaxrl_llm import cli
from jaxrl_llm.data import (
    SupervisedExample,
    batch_indices,
    load_tokenizer,
    pack_rows,
    split_indices,
    supervised_example,
    tokenize_sft,
    tokenize_sft_rows,
)
from jaxrl_llm.models import from_pretrained
from jaxrl_llm.recipes.text import sft
from jaxrl_llm.recipes.text.language_model import LanguageModel, load_model, load_rows
from tests.recipes.runs import (
    TINY,
    assert_close_weights,
    assert_complete_folder,
    assert_same_run,
    curve,
    press_ctrl_c_after,
    renamed,
    token_log_probs,
    words,
    write_rows,
)
from tests.unchecked import unchecked

EOS = "<|endoftext|>"
FORMATS = {
    "instruction": (
        {"instruction": "用一句话介绍长城。", "input": "", "output": "长城是古代的防御工程。"},
        "### Instruction:\n用一句话介绍长城。\n### Response:\n",
        "长城是古代的防御工程。" + EOS,
    ),
    "instruction with input": (
        {"instruction": "翻译成英文", "input": "你好", "output": "Hello", "text": "not read"},
        "### Instruction:\n翻译成英文\n### Input:\n你好\n### Response:\n",
        "Hello" + EOS,
    ),
    "conversations": (
        {"conversations": [{"from": "human", "value": "今天天气如何？"}, {"from": "gpt", "value": "晴。"}]},
        "### User:\n今天天气如何？\n### Assistant:\n",
        "晴。" + EOS,
    ),
    "messages": (
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]},
        "### User:\nHi\n### Assistant:\n",
        "Hello." + EOS,
    ),
    "prompt and completion": (
        {"prompt": "Define: happiness\n", "completion": "joy"},
        "Define: happiness\n",
        "joy" + EOS,
    ),
    # Nothing predicts the first token of a text, so it is no target.
    "text": ({"text": "Once upon a time"}, "Once", " upon a time" + EOS),
}


def write_json(path, rows):
    Path(path).write_text(json.dumps(rows, ensure_ascii=False), "utf-8")


def write_parquet(path, rows):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


@pytest.fixture(scope="module")
def gpt2_tokenizer():
    return load_tokenizer("gpt2")


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("kind", "write"), [("json", write_json), ("jsonl", write_rows), ("parquet", write_parquet)])
def test_every_format_from_every_file_trains_the_response_and_its_eos_alone(
    name, kind, write, gpt2_tokenizer, tmp_path
):
    row, prompt, response = FORMATS[name]
    write(tmp_path / f"rows.{kind}", [row, row])
    examples = [supervised_example(row) for row in load_rows(str(tmp_path / f"rows.{kind}"))]
    tokens = tokenize_sft_rows(examples, gpt2_tokenizer, max_length=256).rows
    assert len(tokens) == 2
    assert gpt2_tokenizer.decode(tokens[1].ids[~tokens[1].loss_mask]) == prompt
    assert gpt2_tokenizer.decode(tokens[1].ids[tokens[1].loss_mask]) == response


def test_a_run_lowers_the_loss_and_leaves_everything_behind(tuned):
    config, figures = tuned
    lines = curve(config.output_dir)
    assert lines[0]["eval_loss"] > 2.5
    assert figures["eval_loss"] == pytest.approx(lines[-1]["eval_loss"])
    assert figures["eval_loss"] < 1.4
    assert np.mean([line["loss"] for line in lines[-5:]]) < 1
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 25, 50, 75, 100]
    assert_complete_folder(config.output_dir, steps=[80, 100])
    saved = json.loads(Path(config.output_dir, "config.json").read_text())
    settings = json.loads(json.dumps(dataclasses.asdict(config)))  # a tuple is a list there
    settings = {k: v for k, v in settings.items() if k not in ("resume", "overwrite")}
    assert saved == settings | {"rows_per_step": config.per_device_train_batch_size}


def test_metrics_have_the_names_of_trl(tuned):
    names = {"loss", "grad_norm", "learning_rate", "epoch", "mean_token_accuracy", "num_tokens", "entropy"}
    last = curve(tuned[0].output_dir)[-1]
    assert set(last) >= names | {"eval_loss", "eval_mean_token_accuracy", "eval_entropy"}
    assert last["epoch"] == pytest.approx(100 * 16 / 75)


def held_out_tokens(config, tokenizer):
    rows = load_rows(config.dataset)
    examples = [supervised_example(rows[i]) for i in split_indices(len(rows), held_out=0.25, seed=0)[1]]
    return examples, [tokenize_sft(example, tokenizer, max_length=256) for example in examples]


def test_the_held_out_loss_is_the_mean_over_all_response_tokens_though_the_last_batch_is_ragged(tuned):
    config, figures = tuned
    module, params, tokenizer = from_pretrained(figures["model"])
    _, rows = held_out_tokens(config, tokenizer)
    assert len(rows) == 25 > config.per_device_train_batch_size
    assert len({len(row.ids) for row in rows}) > 1
    logits_of = jax.jit(lambda tokens: module.apply({"params": params}, tokens)[0])
    losses, hits = [], []
    for row in rows:
        logits = np.asarray(logits_of(row.ids[None, :-1])[0], np.float64)
        log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        targets, trained = row.ids[1:], row.loss_mask[1:]
        losses += list(-log_probs[np.arange(len(targets)), targets][trained])
        hits += list((logits.argmax(-1) == targets)[trained])
    assert figures["eval_loss"] == pytest.approx(np.mean(losses), abs=2e-6)
    assert figures["eval_mean_token_accuracy"] == pytest.approx(np.mean(hits), abs=1e-6)


def share_right(module, params, tokenizer, examples):
    """Completes prompts of four tokens greedily, without a cache, and compares."""
    logits_of = jax.jit(lambda tokens: module.apply({"params": params}, tokens)[0])
    right = []
    for example in examples:
        ids = tokenizer.encode(example.prompt)
        while len(ids) < 4 + 3 and ids[-1] != tokenizer.eos_token_id:  # the longest answer has two digits and EOS
            padded = np.array([ids + [0] * (8 - len(ids))])
            ids.append(int(np.argmax(logits_of(padded)[0, len(ids) - 1])))
        right.append(tokenizer.decode(ids[4:], skip_special_tokens=True) == example.completion)
    return np.mean(right)


def test_exact_match_counts_the_held_out_answers_that_greedy_completion_gets_right(tuned):
    config, figures = tuned
    before = load_model(config, jax.random.split(jax.random.key(config.seed), 3)[0])
    after = from_pretrained(figures["model"])
    examples, _ = held_out_tokens(config, before.tokenizer)
    assert figures["eval_exact_match_before"] == pytest.approx(share_right(*before, examples))
    assert figures["eval_exact_match"] == pytest.approx(share_right(*after, examples))


@pytest.fixture(scope="module")
def blind():
    """A model that sees positions and no tokens: what it is given changes nothing, what it is asked for does."""
    model = load_model(sft.Config(**TINY, tie_word_embeddings=False), jax.random.key(0))
    params = dict(model.params)
    params["token_embedding"] = jax.tree.map(jnp.zeros_like, params["token_embedding"])
    return LanguageModel(model.module, params, model.tokenizer)


@pytest.mark.parametrize(("completion_only", "changes"), [(True, False), (False, True)])
def test_prompts_and_padding_are_no_targets(blind, completion_only, changes):
    config = sft.Config(**TINY, completion_only_loss=completion_only)
    loss_fn = jax.jit(sft.make_loss(blind, config))

    def loss(prompt, pad_id, completion="12"):
        example = SupervisedExample(prompt, completion)
        row = tokenize_sft(example, blind.tokenizer, max_length=99, completion_only_loss=completion_only)
        batch = sft.collate(pad_id, [row], 12)
        return float(
            loss_fn(blind.params, batch._replace(weights=sft.batch_weights(batch, None)), jax.random.key(0))[0]
        )

    assert loss("3+9=", 0) == loss("3+9=", 5)
    assert (loss("3+9=", 0) != loss("7+5=", 0)) == changes
    assert loss("3+9=", 0, "12") != loss("3+9=", 0, "13")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run in which each batch holds all rows, of 4 to 12 tokens, with held-out rows from a file of their own."""
    folder = tmp_path_factory.mktemp("plain")
    rows = [{"prompt": f"{a}=", "completion": str(a) * (1 + b)} for a in range(4) for b in range(9)]
    held_out = [{"prompt": f"{a}=", "completion": f"{a}{a}8"} for a in range(4)]
    config = sft.Config(
        **TINY,
        output_dir=str(folder / "whole"),
        dataset=write_rows(folder / "train.jsonl", rows),
        eval_dataset=write_rows(folder / "held_out.jsonl", held_out),
        max_length=12,
        per_device_train_batch_size=36,
        optim="sgd",
        learning_rate=0.5,
        lr_scheduler_type="constant",
        warmup_steps=0,
        max_steps=6,
        logging_steps=1,
        eval_steps=3,
        save_steps=2,
        num_samples=0,
    )
    return config, sft.run(config)


def test_accumulating_gradients_over_micro_batches_changes_nothing(plain):
    whole, _ = plain
    in_parts = renamed(whole, "in_parts", gradient_accumulation_steps=4)
    sft.run(in_parts)
    assert_close_weights(whole.output_dir, in_parts.output_dir, atol=1e-6)
    for line, other in zip(curve(whole.output_dir), curve(in_parts.output_dir), strict=True):
        assert line == pytest.approx(other, rel=1e-5, abs=1e-6)
    assert curve(whole.output_dir)[-1]["loss"] < curve(whole.output_dir)[1]["loss"] - 0.1


def test_packing_changes_nothing_but_the_number_of_rows(plain):
    whole, _ = plain
    packs = pack_rows(sft.load_data(whole, load_model(whole, jax.random.key(0))).train, 12)
    assert len(packs) < 30
    packed = renamed(whole, "packed", packing=True, per_device_train_batch_size=len(packs))
    sft.run(packed)
    assert_close_weights(whole.output_dir, packed.output_dir, atol=1e-6)
    for line, other in zip(curve(whole.output_dir), curve(packed.output_dir), strict=True):
        assert line == pytest.approx(other, rel=1e-5, abs=1e-6)


@pytest.fixture
def task_of(plain, monkeypatch):
    """Makes the task of a run without training, and its model."""

    def make(**changes):
        found = []
        with monkeypatch.context() as patch:
            patch.setattr(sft, "train_offline", lambda config, model, task: found.append((task, model)) or (None, {}))
            sft.run(dataclasses.replace(plain[0], **changes))
        return found[0]

    return make


@pytest.mark.parametrize(("strategy", "lost"), [("bfd", True), ("bfd_split", False), ("wrapped", False)])
def test_rows_longer_than_a_pack_are_cut_or_go_on_in_another(task_of, tmp_path, strategy, lost):
    rows = [{"text": text} for text in ("0123456789" * 2, "55", "678")]
    dataset = write_rows(tmp_path / "rows.jsonl", rows)
    task, model = task_of(dataset=dataset, packing=True, packing_strategy=strategy, max_length=8)
    assert max(len(row.ids) for row in task.train) <= 8
    texts = model.tokenizer.decode([token for row in task.train for token in row.ids], skip_special_tokens=True)
    assert sorted(texts) == sorted("01234567" + "55678" if lost else "0123456789" * 2 + "55678")


def streamed_rows(folder):
    """More rows than a batch has, one of them exactly as long as the model reads."""
    rows = [{"prompt": f"{a}+{b}=", "completion": str(b) * (1 + a % 7)} for a in range(10) for b in range(6)]
    return write_rows(folder / "many.jsonl", rows)


@pytest.mark.slow
def test_a_streamed_run_is_the_run_in_memory_and_resumes_exactly(plain, tmp_path, monkeypatch):
    memory = renamed(plain[0], "memory", dataset=streamed_rows(tmp_path))
    streamed = dataclasses.replace(memory, output_dir=str(tmp_path / "streamed"), streaming=True)
    sft.run(memory)
    sft.run(streamed)
    assert_close_weights(memory.output_dir, streamed.output_dir, atol=1e-6)
    for line, other in zip(curve(memory.output_dir), curve(streamed.output_dir), strict=True):
        counted = {"num_rows_without_targets": 0, "num_rows_truncated": 0}
        assert line | counted == pytest.approx(counted | other, rel=1e-6)
    cut = dataclasses.replace(streamed, output_dir=str(tmp_path / "cut"))
    with monkeypatch.context() as patch:
        press_ctrl_c_after(patch, step=3)
        sft.run(cut)
    sft.run(dataclasses.replace(cut, resume=True))
    assert_same_run(streamed.output_dir, cut.output_dir)


def test_streaming_reads_and_tokenizes_no_row_before_its_turn_and_counts_rows_without_targets(plain, tmp_path):
    path = Path(streamed_rows(tmp_path))
    lines = path.read_text().splitlines()
    batches = [set(batch_indices(60, 36, seed=0, step=step).tolist()) for step in range(3)]
    first, second = min(batches[0] - batches[1]), min(batches[1] - batches[0])
    lines[first] = json.dumps({"prompt": "1" * 12, "completion": "2"})
    lines[second] = json.dumps({"prompt": "1+1="})
    path.write_text("\n".join(lines))
    config = renamed(plain[0], "counted", dataset=str(path), streaming=True, max_steps=3)
    missing = rf"many.jsonl, line {second + 1}: field `completion` is missing"
    with unchecked(), pytest.raises(ValueError, match=missing):  # the checks of types look into sequences
        sft.run(config)
    (before, after) = curve(config.output_dir)
    assert "num_rows_without_targets" not in before
    assert (after["step"], after["num_rows_without_targets"], after["num_rows_truncated"]) == (1, 1, 1)
    data = [json.loads(lines[i]) for i in sorted(batches[0] - {first})]
    read = sum(len(row["prompt"]) + len(row["completion"]) + 1 for row in data)
    assert after["num_tokens"] == read + 12  # the row without targets was cut to 12


def test_noise_on_the_embeddings_changes_training_and_no_evaluation(task_of):
    (task, model), (noisy, _) = task_of(), task_of(neftune_noise_alpha=5.0)
    batch = task.collate(task.train, 12)
    batch = batch._replace(weights=sft.batch_weights(batch, None))

    @jax.jit
    def losses(params, key):
        fns = task.loss_fn, noisy.loss_fn, task.evaluation_loss_fn, noisy.evaluation_loss_fn
        return [loss_fn(params, batch, key)[0] for loss_fn in fns]

    (quiet, one, *evaluations), (_, other, *_) = (losses(model.params, jax.random.key(seed)) for seed in (0, 1))
    assert len({float(quiet), float(one), float(other)}) == 3
    np.testing.assert_array_equal(evaluations, quiet)


def test_dynamic_fine_tuning_weighs_tokens_by_their_probability_and_is_evaluated_by_likelihood(task_of):
    task, model = task_of(loss_type="dft")
    batch = task.collate(task.train, 12)
    loss_fn, evaluation = (jax.jit(fn) for fn in (task.loss_fn, task.evaluation_loss_fn))
    learned = np.concatenate([row.loss_mask[1:] for row in task.train])
    log_probs = np.concatenate(token_log_probs(model, model.params, [row.ids for row in task.train]))[learned]
    loss, metrics = loss_fn(model.params, batch, jax.random.key(0))
    assert float(loss) == pytest.approx(-(np.exp(log_probs) * log_probs).mean(), rel=1e-5)
    assert float(metrics["nll"]) == pytest.approx(-log_probs.mean(), rel=1e-5)
    assert float(evaluation(model.params, batch, jax.random.key(0))[0]) == pytest.approx(-log_probs.mean(), rel=1e-5)


CHAT = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}, {"role": "user", "content": "3"}]
CHAT = [*CHAT, {"role": "assistant", "content": "4"}]


@pytest.mark.parametrize(
    ("row", "settings", "trained"),
    [
        ({"messages": CHAT}, {}, "2<eos>4<eos>"),
        ({"messages": CHAT}, {"assistant_only_loss": False}, "all"),
        ({"prompt": CHAT[:3], "completion": CHAT[3:]}, {}, "4<eos>"),
        ({"prompt": "1+1=", "completion": "2"}, {}, "2<eos>"),
        ({"prompt": "1+1=", "completion": "2"}, {"completion_only_loss": False}, "all"),
    ],
)
def test_what_is_learned_of_a_row_is_what_the_settings_say(task_of, tmp_path, row, settings, trained):
    alphabet = "characters:0123456789+=# :UserAssistant\n"
    path = write_rows(tmp_path / "rows.jsonl", [row] * 2)
    task, model = task_of(
        dataset=path, eval_dataset=path, tokenizer=alphabet, max_length=99, n_positions=99, **settings
    )
    row = task.train[0]
    expected = model.tokenizer.decode(row.ids[1:]) if trained == "all" else trained
    assert model.tokenizer.decode(row.ids[row.loss_mask]) == expected


@pytest.mark.slow
def test_a_run_that_was_killed_resumes_bit_for_bit(tmp_path, programs):
    rows = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(10) for b in range(10)]
    options = words(
        **TINY,
        dataset=write_rows(tmp_path / "sums.jsonl", rows),
        dropout=0.1,
        gradient_accumulation_steps=2,
        max_steps=40,
        warmup_steps=5,
        logging_steps=1,
        eval_steps=8,
        save_steps=8,
    )
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": programs, "JAX_PLATFORMS": "cpu"}
    environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    environment.pop("XLA_FLAGS")

    def start(name, *more):
        command = [sys.executable, "-m", "jaxrl_llm.cli", "sft", *options, "--output-dir", name, *more]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=pipe, stderr=pipe, text=True)

    whole = start("whole")
    output = whole.communicate(timeout=300)
    assert whole.returncode == 0, output

    killed = start("killed")
    metrics = tmp_path / "killed" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    # Kill it when it has done, and logged, more than its newest checkpoint holds.
    while not (tmp_path / "killed/checkpoints/8").exists() or '"step": 11,' not in metrics.read_text():
        assert killed.poll() is None, killed.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    killed.kill()
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "model").exists()

    resumed = start("killed", "--resume")
    output = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, output
    assert "another option" not in output[0]
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    assert len(curve(tmp_path / "killed")) == 41


def test_ctrl_c_leaves_a_checkpoint_and_no_model(tuned, tmp_path, monkeypatch, capsys):
    config = dataclasses.replace(tuned[0], output_dir=str(tmp_path / "run"))
    press_ctrl_c_after(monkeypatch, step=5)
    figures = sft.run(config)
    assert set(figures) >= {"eval_loss", "eval_exact_match_before"}
    assert not {"model", "eval_exact_match"} & set(figures)
    assert (tmp_path / "run" / "checkpoints" / "5").is_dir()
    assert not (tmp_path / "run" / "model").exists()
    assert "Stopped after step 5 of 100; --resume goes on from here." in capsys.readouterr().out


@pytest.mark.slow
def test_chinese_goes_through_gpt2s_bpe_into_a_model_and_back(tmp_path, capsys):
    rows = [{"instruction": "床前明月光", "input": "", "output": "疑是地上霜。"}] * 5
    options = words(
        **TINY | {"tokenizer": "gpt2", "n_positions": 64},
        dataset=write_rows(tmp_path / "poem.jsonl", rows),
        output_dir=tmp_path / "run",
        max_steps=30,
        warmup_steps=2,
        learning_rate=0.02,
        per_device_train_batch_size=2,
        num_samples=0,
    )
    cli.main(["sft", *options])
    cli.main(["generate", "--model", f"{tmp_path}/run/model", "--instruction", "--prompt", "床前明月光"])
    assert capsys.readouterr().out.splitlines()[-1] == "床前明月光疑是地上霜。"


@pytest.mark.parametrize("row", [FORMATS["messages"][0], FORMATS["text"][0]])
def test_exact_match_of_rows_that_ask_for_no_single_text_is_refused(tmp_path, row):
    path = write_rows(tmp_path / "rows.jsonl", [FORMATS["instruction"][0], row])
    config = sft.Config(**TINY, dataset=path, eval_exact_match=True)
    with pytest.raises(ValueError, match=r"eval_exact_match needs .*; .*line 2 is a conversation or plain text"):
        sft.run(config)


def test_rows_longer_than_the_model_reads_are_refused_with_a_cure(tuned, tmp_path):
    config = dataclasses.replace(tuned[0], output_dir=str(tmp_path / "run"), n_positions=4)
    with pytest.raises(
        ValueError, match=r"context_length=4 tokens, and 6 are needed: lower max_length, or give .*more"
    ):
        sft.run(config)
    assert not (tmp_path / "run").exists()


def test_a_dataset_of_one_row_is_refused_for_none_could_be_held_out(tmp_path):
    config = sft.Config(**TINY, dataset=write_rows(tmp_path / "one.jsonl", [{"text": "1+1=2"}]))
    with pytest.raises(ValueError, match=r"one.jsonl has one row; at least 2 are needed"):
        sft.run(config)


@pytest.mark.slow
def test_the_defaults_learn_to_define_english_words(tmp_path):
    figures = sft.run(sft.Config(output_dir=str(tmp_path / "run"), max_steps=200))
    before = curve(tmp_path / "run")[0]["eval_loss"]
    assert before == pytest.approx(np.log(50257), abs=0.1)
    # Knowing how often each token occurs, and nothing else, gives 6.85 (add-0.1 smoothing, the best of several).
    assert figures["eval_loss"] < 6.4
