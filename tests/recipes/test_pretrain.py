import dataclasses
import itertools
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxrl_llm.data import LazySequence, character_tokenizer, streams
from jaxrl_llm.data.tokenizers import encode_text
from jaxrl_llm.models import from_pretrained
from jaxrl_llm.recipes.text import pretrain, sft
from jaxrl_llm.recipes.text.language_model import LanguageModel
from tests.recipes.runs import (
    TINY,
    assert_complete_folder,
    assert_same_run,
    curve,
    press_ctrl_c_after,
    renamed,
    token_log_probs,
    write_rows,
)

TEXT = "".join(f"{a}+{b}={a + b}。\n" for a in range(10) for b in range(10))  # three bytes in each full stop


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrain")
    (folder / "sums.txt").write_text(TEXT, "utf-8")
    config = pretrain.Config(
        **TINY | {"tokenizer": "bpe:270"},
        output_dir=str(folder / "run"),
        dataset=str(folder / "sums.txt"),
        eval_fraction=0.2,
        max_length=16,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        warmup_steps=2,
        max_steps=30,
        logging_steps=5,
        eval_steps=15,
        save_steps=15,
        num_samples=0,
    )
    return config, pretrain.run(config)


def test_a_run_learns_to_predict_a_text_and_leaves_everything_behind(finished):
    config, figures = finished
    lines = curve(config.output_dir)
    assert figures["eval_bits_per_byte"] < 0.6 * lines[0]["eval_bits_per_byte"]
    assert lines[-1]["eval_bits_per_byte"] == pytest.approx(figures["eval_bits_per_byte"])
    assert_complete_folder(config.output_dir, steps=[15, 30])
    tokenizer = from_pretrained(figures["model"])[2]
    assert 257 < len(tokenizer) <= 270
    assert tokenizer.decode(tokenizer.encode("7+7=14。")) == "7+7=14。"


def test_bits_per_byte_are_those_of_the_end_of_the_text_in_windows(finished):
    _, figures = finished
    model = LanguageModel(*from_pretrained(figures["model"]))
    held_out = TEXT[round(0.8 * len(TEXT)) :]
    eos = model.tokenizer.eos_token_id
    ids = np.array([eos, *model.tokenizer.encode(held_out), eos])
    windows = [ids[start : start + 17] for start in range(0, len(ids) - 1, 16)]  # 16 targets each
    nats = -np.concatenate(token_log_probs(model, model.params, windows)).sum()
    assert figures["eval_bits_per_byte"] == pytest.approx(nats / np.log(2) / len(held_out.encode()), rel=1e-5)
    assert figures["eval_num_tokens"] == len(ids) - 1


def test_every_token_of_every_text_is_a_target_once_between_its_ends(tmp_path, monkeypatch):
    tasks, texts = [], ["1+1=2", "2+2=4", "3+3=6=3+3", "9"]
    monkeypatch.setattr(pretrain, "train_offline", lambda config, model, task: (tasks.append(task), {}))
    dataset = write_rows(tmp_path / "rows.jsonl", [{"text": text} for text in texts])
    pretrain.run(pretrain.Config(**TINY, output_dir="unused", dataset=dataset, max_length=5, eval_fraction=0.25))
    tokenizer = character_tokenizer("+0123456789=")
    found = []
    for windows in (tasks[0].train, tasks[0].held_out):
        assert all(len(window.ids) <= 6 for window in windows)
        for before, after in itertools.pairwise(windows):
            assert before.ids[-1] == after.ids[0]
        assert windows[0].ids[0] == tokenizer.eos_token_id
        targets = [token for window in windows for token in window.ids[window.loss_mask]]
        found += tokenizer.decode(targets).split("<eos>")[:-1]
        assert targets[-1] == tokenizer.eos_token_id
    assert sorted(found) == sorted(texts)


def test_texts_come_from_a_file_a_folder_or_rows(tmp_path):
    config = pretrain.Config(output_dir="unused", dataset="", eval_fraction=0.25)
    for name in ("b", "a", "c", "d"):
        (tmp_path / f"{name}.txt").write_text(name * 8)

    def load(dataset, **changes):
        return pretrain.load_texts(dataclasses.replace(config, dataset=str(dataset), **changes))

    assert load(tmp_path / "a.txt") == (["aaaaaa"], ["aa"])
    train, held_out = load(tmp_path)
    assert (len(train), len(held_out)) == (3, 1)
    assert sorted(train + held_out) == ["a" * 8, "b" * 8, "c" * 8, "d" * 8]
    other = write_rows(tmp_path / "rows.jsonl", [{"text": "x"}, {"text": "y"}])
    assert load(tmp_path / "a.txt", eval_dataset=other) == (["aaaaaaaa"], ["x", "y"])


def test_a_streamed_run_is_the_run_in_memory_and_resumes_exactly(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "PIECE", 400)  # half of the text
    (tmp_path / "held_out.txt").write_text(TEXT[-200:], "utf-8")
    changes = {"eval_dataset": str(tmp_path / "held_out.txt"), "max_steps": 4, "eval_steps": 2, "save_steps": 2}
    whole = renamed(finished[0], "in_memory", logging_steps=1, **changes)
    streamed = renamed(whole, "streamed", streaming=True)
    figures = pretrain.run(whole)
    assert pretrain.run(streamed) == figures | {"model": f"{streamed.output_dir}/model"}
    assert_same_run(whole.output_dir, streamed.output_dir)
    (ids,) = Path(streamed.output_dir, "tokens").iterdir()
    assert ids.stat().st_size == 2 * (2 + len(from_pretrained(figures["model"])[2].encode(TEXT)))

    cut = renamed(streamed, "cut")
    with monkeypatch.context() as patch:
        press_ctrl_c_after(patch, step=3)
        assert "model" not in pretrain.run(cut)
    with monkeypatch.context() as patch:
        patch.setattr(streams, "encode_blocks", None)  # the file of ids is there already
        pretrain.run(dataclasses.replace(cut, resume=True))
    assert_same_run(whole.output_dir, cut.output_dir)


def test_a_streamed_text_is_never_read_as_a_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "PIECE", 400)
    for name, text in (("train", TEXT * 5), ("held_out", TEXT[:100])):
        (tmp_path / f"{name}.txt").write_text(text, "utf-8")
    lengths, tasks = [], []

    def noting(text, tokenizer):
        lengths.append(len(text))
        return encode_text(text, tokenizer)

    monkeypatch.setattr(streams, "encode_text", noting)
    monkeypatch.setattr(pretrain, "SAMPLE", 300)
    monkeypatch.setattr(pretrain, "train_offline", lambda config, model, task: (tasks.append(task), {}))
    read_bytes = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: b"" if path.name == "train.txt" else read_bytes(path))
    config = pretrain.Config(
        **TINY | {"tokenizer": "bpe:270"},
        output_dir=str(tmp_path / "run"),
        dataset=str(tmp_path / "train.txt"),
        eval_dataset=str(tmp_path / "held_out.txt"),
        max_length=8,
        streaming=True,
    )
    pretrain.run(config)
    assert max(lengths) < 1_200 < len(TEXT) * 5 < sum(lengths)
    assert isinstance(tasks[0].train, LazySequence)
    assert tasks[0].longest == len(tasks[0].train[0].ids) == 9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "eval_dataset must be the source of the held-out text where streaming is true, got ''"),
        (
            {"eval_dataset": "other.txt", "group_by_length": True},
            "group_by_length must be false where streaming is true",
        ),
    ],
)
def test_settings_that_streaming_has_no_use_for_are_refused(changes, message):
    config = pretrain.Config(output_dir="unused", dataset="text.txt", streaming=True, **changes)
    with pytest.raises(ValueError, match=message):
        pretrain.run(config)


def test_a_text_too_short_to_hold_some_of_it_out_is_refused(tmp_path):
    (tmp_path / "short.txt").write_text("1+1")
    config = pretrain.Config(output_dir="unused", dataset=str(tmp_path / "short.txt"))
    with pytest.raises(ValueError, match=r"short.txt is too short to hold eval_fraction=0.1 of it out"):
        pretrain.load_texts(config)


def test_a_row_without_text_is_refused_with_its_place(tmp_path):
    config = pretrain.Config(
        output_dir="unused", dataset=write_rows(tmp_path / "rows.jsonl", [{"text": "1"}, {"prompt": "1+1="}])
    )
    with pytest.raises(ValueError, match=r"rows.jsonl, line 2: field `text` is missing or null; expected a string"):
        pretrain.load_texts(config)


@pytest.mark.slow
def test_a_llama_is_pretrained_on_characters_and_tuned_by_the_same_recipes(tmp_path):
    folder = Path(tmp_path, "texts")
    folder.mkdir()
    for index, line in enumerate(TEXT.replace("。", "").splitlines()):
        (folder / f"{index:02}.txt").write_text(line)
    shared = {
        "optim": "sgd",
        "learning_rate": 1.0,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "num_samples": 0,
    }
    figures = pretrain.run(
        pretrain.Config(
            **TINY | shared,
            model_type="llama",
            output_dir=str(tmp_path / "pretrained"),
            dataset=str(folder),
            max_length=8,
            max_steps=30,
        )
    )
    assert figures["eval_bits_per_byte"] < 0.8 * curve(tmp_path / "pretrained")[0]["eval_bits_per_byte"]
    rows = [{"prompt": f"{a}+{b}=", "completion": "7"} for a in range(5) for b in range(5)]
    dataset = write_rows(tmp_path / "rows.jsonl", rows)
    tuned = sft.run(
        sft.Config(**shared, model=figures["model"], output_dir=str(tmp_path / "tuned"), dataset=dataset, max_steps=10)
    )
    assert tuned["eval_loss"] < curve(tmp_path / "tuned")[0]["eval_loss"] - 0.5
    module, params, _ = from_pretrained(tuned["model"])
    assert module.config.model_type == "llama"
    assert jax.tree.structure(params) == jax.tree.structure(from_pretrained(figures["model"])[1])
