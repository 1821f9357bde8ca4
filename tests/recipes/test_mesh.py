"""Recipes on a mesh of 8 devices: the run of one device, and checkpoints that move between meshes."""

import dataclasses
import json

import numpy as np
import pytest

from jaxrl_llm.recipes.text import dpo, grpo, ppo, sft
from tests.recipes.runs import TINY, assert_close_weights, curve, press_ctrl_c_after, write_rows

ROWS = [
    {"prompt": f"{a}+{b}=", "completion": "7" * (1 + b % 2), "chosen": "7" * (1 + b % 2), "rejected": "3" * (1 + a)}
    for a in range(4)
    for b in range(6)
]
OFFLINE = {
    "eval_fraction": 0.25,
    "optim": "sgd",
    "learning_rate": 0.3,
    "lr_scheduler_type": "constant",
    "max_steps": 6,
    "logging_steps": 1,
    "eval_steps": 3,
    "save_steps": 2,
    "num_samples": 1,
}
ONLINE = {
    "traceable_rewards": True,
    "reward_funcs": ("exact_match",),
    "num_prompts": 8,
    "num_generations": 2,
    "max_completion_length": 4,
    "learning_rate": 0.1,
    "optim": "sgd",
    "max_steps": 2,
    "logging_steps": 1,
}
MESH = "data=2,fsdp=2,tensor=2"


def assert_same_curves(left, right):
    for ours, theirs in zip(curve(left), curve(right), strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "grouped"), [(sft, False), (sft, True), (dpo, False)])
def test_an_offline_run_on_a_mesh_is_that_of_one_device(recipe, grouped, tmp_path):
    dataset = write_rows(tmp_path / "rows.jsonl", ROWS)
    options = TINY | OFFLINE | {"group_by_length": grouped} | ({"warmup_steps": 0} if recipe is sft else {})
    one = recipe.Config(**options, dataset=dataset, output_dir=str(tmp_path / "one"), per_device_train_batch_size=8)
    four = dataclasses.replace(one, mesh=MESH, output_dir=str(tmp_path / "mesh"), per_device_train_batch_size=2)
    figures, found = recipe.run(one), recipe.run(four)
    assert_same_curves(one.output_dir, four.output_dir)
    assert_close_weights(one.output_dir, four.output_dir, atol=1e-5)
    assert found["eval_loss"] == pytest.approx(figures["eval_loss"], abs=1e-6)


def test_a_checkpoint_moves_from_8_devices_to_4_and_to_1(tmp_path, monkeypatch):
    dataset = write_rows(tmp_path / "rows.jsonl", ROWS)
    # (Not Adam, which makes steps of the rounding of keys' biases, whose gradients are zero.)
    options = TINY | OFFLINE | {"dataset": dataset, "warmup_steps": 0, "optim": "momentum"}
    one = sft.Config(**options, output_dir=str(tmp_path / "one"), per_device_train_batch_size=8)
    sft.run(one)
    moved = dataclasses.replace(one, output_dir=str(tmp_path / "moved"))
    for mesh, size, stop in ((MESH, 2, 2), ("fsdp=4", 2, 4), ("", 8, None)):
        config = dataclasses.replace(moved, mesh=mesh, per_device_train_batch_size=size, resume=mesh != MESH)
        if config.resume:
            with pytest.raises(ValueError, match="resume must go on with rows_per_step=8 of the saved run, got"):
                sft.run(dataclasses.replace(config, per_device_train_batch_size=3))
        with monkeypatch.context() as patch:
            if stop is not None:
                press_ctrl_c_after(patch, step=stop)
            sft.run(config)
    assert_same_curves(one.output_dir, moved.output_dir)
    assert_close_weights(one.output_dir, moved.output_dir, atol=1e-5)


@pytest.mark.parametrize("recipe", [grpo, pytest.param(ppo, marks=pytest.mark.slow)])
@pytest.mark.parametrize("traceable", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_an_online_run_on_a_mesh_is_that_of_one_device(recipe, traceable, tmp_path):
    rows = [{"prompt": f"{a}+{b}=", "answer": "7"} for a in range(5) for b in range(2, 5)]
    rewards = ("exact_match",) if not traceable else (f"{tmp_path}/rewards.py:sevens",)
    (tmp_path / "rewards.py").write_text(
        "def sevens(completion_ids, completion_mask):\n    return ((completion_ids == 8) & completion_mask).sum(-1)\n"
    )
    options = TINY | ONLINE | {"traceable_rewards": traceable, "reward_funcs": rewards}
    dataset = write_rows(tmp_path / "rows.jsonl", rows)
    one = recipe.Config(**options, dataset=dataset, output_dir=str(tmp_path / "one"))
    mesh = dataclasses.replace(one, mesh=MESH, output_dir=str(tmp_path / "mesh"))
    figures, found = recipe.run(one), recipe.run(mesh)
    assert_same_curves(one.output_dir, mesh.output_dir)
    assert_close_weights(one.output_dir, mesh.output_dir, atol=1e-5)
    assert found["eval_reward"] == pytest.approx(figures["eval_reward"], abs=1e-6)
    samples = [json.loads(line) for line in (tmp_path / "mesh/samples.jsonl").read_text().splitlines()]
    assert samples == [json.loads(line) for line in (tmp_path / "one/samples.jsonl").read_text().splitlines()]


def test_a_loss_that_cannot_be_split_is_not_evaluated_on_rows_that_fill_a_batch_up(tmp_path):
    dataset = write_rows(tmp_path / "rows.jsonl", ROWS)
    options = TINY | OFFLINE | {"mesh": "data=8", "output_dir": str(tmp_path / "run"), "per_device_train_batch_size": 1}
    with pytest.raises(ValueError, match="mesh must be of 6 parts at most, as many as there are held-out rows"):
        dpo.run(dpo.Config(**options, dataset=dataset, loss_type=("aot",)))
    assert not (tmp_path / "run").exists()


def test_rows_that_a_mesh_does_not_divide_are_refused(tmp_path):
    dataset = write_rows(tmp_path / "rows.jsonl", ROWS)
    options = TINY | ONLINE | {"num_prompts": 6, "traceable_rewards": False, "mesh": "data=4"}
    config = grpo.Config(**options, dataset=dataset, output_dir=str(tmp_path / "run"))
    with pytest.raises(ValueError, match="mesh divides a batch into 4 parts, which do not divide its 6 rows"):
        grpo.run(config)
