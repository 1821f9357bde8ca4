"""Recipes with adapters: what is trained, what is kept, what is saved, and that nothing else changes or is copied."""

import dataclasses
import gc

import jax
import numpy as np
import pytest

from jaxrl_llm.data import Tokens
from jaxrl_llm.models import (
    Quantized,
    ScalarHead,
    from_pretrained,
    from_pretrained_reward_model,
    load_adapters,
    merge_lora,
    save_pretrained,
    split_trainable,
)
from jaxrl_llm.recipes.options import ModelOptions
from jaxrl_llm.recipes.text import distill, dpo, grpo, kto, offline, ppo, pretrain, reward_model, sft, trpo
from jaxrl_llm.recipes.text.language_model import load_model
from jaxrl_llm.recipes.text.offline import OfflineState, run_keys
from jaxrl_llm.training import checkpoints, init_train_state
from tests.recipes.runs import TINY, assert_same_run, curve, press_ctrl_c_after, renamed, write_rows

ROWS = [
    {"prompt": f"{a}+{b}=", "chosen": "7" * (1 + b % 2), "rejected": "3" * (1 + a)} for a in range(4) for b in range(6)
]
SETTINGS = {
    "lora": True,
    "lora_r": 2,
    "eval_fraction": 0.25,
    "per_device_train_batch_size": 4,
    "optim": "sgd",
    "learning_rate": 0.3,
    "lr_scheduler_type": "constant",
    "max_steps": 8,
    "logging_steps": 1,
    "eval_steps": 4,
    "save_steps": 4,
    "num_samples": 0,
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    config = dpo.Config(
        **TINY,
        **SETTINGS,
        lora_dropout=0.1,
        output_dir=str(folder / "whole"),
        dataset=write_rows(folder / "pairs.jsonl", ROWS),
        beta=0.5,
    )
    return config, dpo.run(config)


def start(config):
    return load_model(config, run_keys(config.seed)[0])


def test_dpo_begins_at_ln_2_against_its_own_base_and_learns(finished):
    lines = curve(finished[0].output_dir)
    assert lines[0]["eval_loss"] == lines[1]["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert finished[1]["eval_loss"] < 0.6


def test_the_base_stays_as_it_was_and_checkpoints_hold_adapters_alone(finished):
    config, figures = finished
    before, (_, after, _) = start(config).params, from_pretrained(figures["model"])
    lora = load_adapters(f"{config.output_dir}/adapter", start(config).module, before.base).lora
    jax.tree.map(np.testing.assert_array_equal, after, merge_lora(dataclasses.replace(before, lora=lora)))
    changed = jax.tree.map(lambda old, new: not np.array_equal(old, new), before.base, after)
    assert changed["blocks"]["qkv"].pop("kernel")
    assert not any(jax.tree.leaves(changed))
    optimizer = config.optimizer(config.max_steps)
    like = OfflineState(init_train_state(before.lora, optimizer), None)  # other leaves would be refused
    state = checkpoints.restore(f"{config.output_dir}/checkpoints", like).state
    jax.tree.map(np.testing.assert_array_equal, state.train.params, lora)


def test_a_run_stopped_by_ctrl_c_resumes_bit_for_bit(finished, monkeypatch):
    whole, figures = finished
    cut = renamed(whole, "cut")
    with monkeypatch.context() as patch:
        press_ctrl_c_after(patch, step=5)
        assert "model" not in dpo.run(cut)
    assert dpo.run(dataclasses.replace(cut, resume=True)) == figures | {"model": f"{cut.output_dir}/model"}
    assert_same_run(whole.output_dir, cut.output_dir)


def test_no_copy_of_the_base_is_made_for_training_or_as_the_reference(finished, monkeypatch):
    config = renamed(finished[0], "lean", max_steps=2)
    held, copies, loop, load = [], [], offline.training_loop, start
    shape = load(config).params.base["token_embedding"]["embedding"].shape

    def count():
        gc.collect()
        copies.append(sum(x.shape == shape for x in jax.live_arrays()))

    def counted_loop(config, state, update, **options):
        def counted_update(state, index):
            result = update(state, index)
            count()
            return result

        count()
        return loop(config, state, counted_update, **options)

    def held_model(config, key):
        held.append(load(config))
        return held[0]

    count()
    monkeypatch.setattr(offline, "training_loop", counted_loop)
    monkeypatch.setattr("jaxrl_llm.recipes.text.pairs.load_model", held_model)
    dpo.run(config)
    assert copies == [copies[0], *[copies[0] + 1] * 3]
    assert not any(x.is_deleted() for x in jax.tree.leaves(held[0].params.base))
    assert all(x.is_deleted() for x in jax.tree.leaves(held[0].params.lora)), "the step was given them"


def test_scoring_by_the_reference_beforehand_gives_the_same_run(finished):
    scored = renamed(finished[0], "scored", precompute_ref_log_probs=True)
    dpo.run(scored)
    assert_same_run(finished[0].output_dir, scored.output_dir)


@pytest.mark.slow
def test_early_stopping_keeps_the_best_adapters_of_a_llama(finished, tmp_path, capsys):
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in ROWS]
    config = sft.Config(
        **TINY,
        **SETTINGS | {"eval_steps": 1, "learning_rate": 30.0, "warmup_steps": 0, "num_samples": 1, "sample_tokens": 2},
        model_type="llama",
        target_modules=("all-linear",),
        early_stopping_patience=1,
        eval_exact_match=True,
        output_dir=str(tmp_path / "run"),
        dataset=write_rows(tmp_path / "rows.jsonl", rows),
    )
    figures = sft.run(config)
    losses = [line["eval_loss"] for line in curve(config.output_dir)]
    assert losses[-1] > min(losses)
    assert figures["eval_loss"] == pytest.approx(min(losses), rel=1e-6)
    model = start(config)
    best = load_adapters(tmp_path / "run/adapter", model.module, model.params.base)
    jax.tree.map(np.testing.assert_array_equal, from_pretrained(figures["model"])[1], merge_lora(best))
    out = " ".join(capsys.readouterr().out.split())
    count = sum(leaf.size for leaf in jax.tree.leaves(model.params.lora))
    assert f"{count:,} of {model.num_params:,}, {100 * count / model.num_params:.2f} %" in out


def test_saved_adapters_are_gone_on_with_or_merged(finished, tmp_path):
    config, figures = finished
    trained, base = from_pretrained(figures["model"])[1], start(config)
    save_pretrained(tmp_path / "base", base.module, base.params.base, base.tokenizer)
    settings = {"model": str(tmp_path / "base"), "lora_r": 8, "lora_dropout": 0.0}
    again = dataclasses.replace(config, adapter=f"{config.output_dir}/adapter", **settings)
    again.validate_model()
    went_on = start(again)
    assert went_on.params.config.r == config.lora_r
    jax.tree.map(np.testing.assert_array_equal, merge_lora(went_on.params), trained)
    merged = start(dataclasses.replace(again, lora=False))
    jax.tree.map(np.testing.assert_array_equal, merged.params, trained)
    with pytest.raises(
        ValueError, match="lora_r must be 8 with adapter, whose folder says what its adapters are, got 3"
    ):
        dataclasses.replace(again, lora_r=3).validate_model()
    with pytest.raises(ValueError, match="model must be the model that adapter was trained beside, got ''"):
        dataclasses.replace(again, model="").validate_model()


def test_qlora_trains_adapters_beside_a_base_of_4_bits(finished, tmp_path):
    config = renamed(finished[0], "qlora", lora=False, qlora=True, use_double_quant=True, dtype="bfloat16")
    before = start(config)
    kernel = before.params.base["blocks"]["mlp_in"]["kernel"]
    assert isinstance(kernel, Quantized)
    assert kernel.codes.dtype == "uint8"
    assert before.params.base["token_embedding"]["embedding"].dtype == "bfloat16"
    assert {leaf.dtype.name for leaf in jax.tree.leaves(before.params.lora)} == {"float32"}
    assert before.num_params == start(finished[0]).num_params
    figures = dpo.run(config)
    assert figures["eval_loss"] < 0.65
    trained = load_adapters(f"{config.output_dir}/adapter", before.module, before.params.base)
    after = from_pretrained(figures["model"])[1]
    expected = jax.tree.map(lambda x: np.asarray(x, np.float32), merge_lora(trained))
    jax.tree.map(np.testing.assert_array_equal, after, expected)
    again = dataclasses.replace(config, model=figures["model"], adapter=f"{config.output_dir}/adapter", lora_r=8)
    dataclasses.replace(again, lora_dropout=0.0).validate_model()
    assert isinstance(start(again).params.base["blocks"]["qkv"]["kernel"], Quantized)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [grpo, ppo, trpo])
def test_qlora_learns_from_rewards(recipe, tmp_path):
    rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(3) for b in range(3)]
    (tmp_path / "rewards.py").write_text(
        "def length(prompts, completions, **_):\n    return list(map(len, completions))\n"
    )
    config = recipe.Config(
        **TINY,
        qlora=True,
        dataset=write_rows(tmp_path / "rows.jsonl", rows),
        output_dir=str(tmp_path / "run"),
        reward_funcs=(f"{tmp_path}/rewards.py:length",),
        num_prompts=4,
        num_generations=4,
        max_completion_length=3,
        max_steps=2,
        **({"value_network": "shared"} if recipe is ppo else {}),
    )
    before, figures = start(config).params, recipe.run(config)
    adapted = load_adapters(tmp_path / "run/adapter", start(config).module, before.base)
    changed = jax.tree.map(lambda old, new: not np.array_equal(old, new), before.lora, adapted.lora)
    assert any(jax.tree.leaves(changed))
    assert "model" in figures


def test_what_is_trained_beside_a_base_in_bfloat16_is_float32(finished, tmp_path):
    options = TINY | {"qlora": True, "dtype": "bfloat16", "dataset": finished[0].dataset}
    params = reward_model.load_reward_model(reward_model.Config(**options), jax.random.key(0)).params
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params.lora)} == {"float32"}
    assert params.base["score"]["kernel"].dtype == "float32"
    assert params.base["backbone"]["token_embedding"]["embedding"].dtype == "bfloat16"


def test_pretraining_of_adapters_drops_out_too(finished):
    dataset = finished[0].dataset
    config = pretrain.Config(**TINY, qlora=True, lora_dropout=0.5, target_modules=("all-linear",), dataset=dataset)
    model = start(config)
    lora = jax.tree.map(lambda leaf: leaf + 0.3, model.params.lora)
    params = dataclasses.replace(model.params, lora=lora)
    tokens = Tokens(np.arange(8, dtype=np.int32), np.arange(8) > 0, False)
    batch, loss = sft.collate(0, [tokens], 8), jax.jit(pretrain.make_loss(model, config))
    first, second = (float(loss(params, batch, jax.random.key(seed))[0]) for seed in (0, 1))
    assert first != second


def test_adapters_learn_at_ten_times_the_rate_of_the_whole_model():
    def rate(recipe, **options):
        given = {"dataset": "rows.jsonl"} if recipe in (dpo, kto) else {}
        return recipe.Config(**given, **options).peak_learning_rate

    assert [rate(sft), rate(sft, model="m"), rate(sft, model="m", lora=True)] == [1e-3, 2e-5, 2e-4]
    assert [rate(dpo, model="m"), rate(dpo, model="m", qlora=True)] == [1e-6, 1e-5]
    assert [rate(grpo, model="m"), rate(grpo, lora=True), rate(grpo, lora=True, learning_rate=3e-4)] == [
        1e-6,
        1e-5,
        3e-4,
    ]
    schedule = sft.Config(model="m", lora=True, lr_scheduler_type="constant", warmup_steps=0).schedule(10)
    assert float(schedule(3)) == pytest.approx(2e-4)


def test_a_reward_model_trains_its_head_and_adapters(finished, tmp_path):
    config = reward_model.Config(
        **TINY, **SETTINGS | {"learning_rate": 0.5}, output_dir=str(tmp_path / "run"), dataset=finished[0].dataset
    )
    figures = reward_model.run(config)
    assert figures["eval_loss"] < curve(config.output_dir)[0]["eval_loss"] - 0.05
    before = reward_model.load_reward_model(config, run_keys(config.seed)[0])
    module, after, _ = from_pretrained_reward_model(figures["model"])
    assert isinstance(module, ScalarHead)
    changed = jax.tree.map(lambda old, new: not np.array_equal(old, new), before.params.base, after)
    assert changed["score"].pop("kernel")
    assert changed["backbone"]["blocks"]["qkv"].pop("kernel")
    assert not any(jax.tree.leaves(changed))


@pytest.mark.slow
def test_kto_and_distillation_train_adapters_too(finished, tmp_path):
    dataset = finished[0].dataset
    options = TINY | SETTINGS | {"dataset": dataset, "learning_rate": 0.3}
    unpaired = kto.Config(**options, output_dir=str(tmp_path / "kto"))
    assert kto.run(unpaired)["eval_loss"] < curve(unpaired.output_dir)[0]["eval_loss"]
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": r["prompt"], "completion": r["chosen"]} for r in ROWS])
    teacher = finished[1]["model"]
    options = TINY | SETTINGS | {"dataset": rows, "warmup_steps": 0}
    student = distill.Config(**options, teacher=teacher, output_dir=str(tmp_path / "distill"))
    assert distill.run(student)["eval_loss"] < curve(student.output_dir)[0]["eval_loss"]
    assert split_trainable(start(student).params)[1] is not None


def test_the_share_of_what_is_trained_is_written_as_peft_counts_it(finished):
    model, count = start(finished[0]), 2 * (16 + 3 * 16)
    assert model.trainable_share == f"{count:,} of {model.num_params:,}, {100 * count / model.num_params:.2f} %"


def test_a_reference_that_should_follow_adapters_is_refused(finished):
    config = renamed(finished[0], "synced", sync_ref_model=True)
    with pytest.raises(ValueError, match="sync_ref_model must be false with lora: the reference is the model with its"):
        dpo.run(config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora": True, "lora_r": 0}, "lora_r must be a whole number of at least 1, got 0"),
        ({"lora": True, "lora_alpha": 0.0}, "lora_alpha must be positive, got 0.0"),
        ({"lora": True, "lora_dropout": 1.0}, r"lora_dropout must be in \[0, 1\), got 1.0"),
        ({"lora_r": 16}, "lora_r must be 8 unless lora is true: nothing else reads it, got 16"),
        ({"lora": True, "use_double_quant": True}, "use_double_quant must be False unless qlora is true"),
        ({"quant_type": "int8"}, "quant_type must be 'nf4' unless qlora is true: nothing else reads it, got 'int8'"),
        ({"target_modules": ("qkv",)}, r"target_modules must be \(\) unless lora is true: .*, got \('qkv',\)"),
    ],
)
def test_wrong_settings_are_refused_and_those_that_nothing_reads(settings, message):
    with pytest.raises(ValueError, match=message):
        ModelOptions(**settings).validate_model()
