import gc
import shutil

import jax
import jax.numpy as jnp
import pytest

from jaxrl_llm.models import from_pretrained, pretrained_module, save_pretrained, split_trainable
from jaxrl_llm.recipes.text import estimate, ppo
from jaxrl_llm.recipes.text.estimate import Config, Way, bytes_of, settings_of
from jaxrl_llm.recipes.text.iteration import start_state
from jaxrl_llm.recipes.text.language_model import load_model, outline_model
from jaxrl_llm.recipes.text.outlines import Program, outline_run
from jaxrl_llm.training import init_train_state
from tests.recipes.runs import TINY

SIZES = {"batch_size": 4, "max_prompt_length": 4, "max_completion_length": 8, "num_generations": 2}
ALL = Way(0)
LORA = {"lora": True, "lora_r": 2}


def config(**changes):
    return Config(**TINY | SIZES | changes)


def need(way=ALL, **changes):
    return estimate.estimate(config(**changes), way)


def test_parameters_and_optimizer_are_those_of_the_formulas():
    width, vocab, positions = 16, 14, 16
    block = 12 * width**2 + 13 * width  # four projections of attention, two of the MLP, their biases, two norms
    count = (vocab + positions) * width + block + 2 * width
    found = need()
    assert found.trained_parameters == count
    assert found.parameters == 4 * count
    assert found.optimizer == 2 * 4 * count + 2 * 4  # the counts of Adam and of the schedule
    assert need(optim_state_dtype="bfloat16").optimizer == 6 * count + 2 * 4
    adapters = 2 * (width + 3 * width)
    found = need(Way(2))
    assert (found.trained_parameters, found.parameters) == (adapters, 4 * (count + adapters))
    assert found.optimizer == 8 * adapters + 2 * 4
    kernels = 12 * width**2
    scales = 4 * (3 * width + width + 4 * width + width)  # a block of 64 inputs or fewer, of each output
    found = need(Way(2, quantized=True))
    assert found.parameters == 4 * (count - kernels + adapters) + kernels // 2 + scales


@pytest.mark.parametrize("way", [Way(0), Way(2), Way(2, quantized=True)])
def test_what_is_held_is_what_a_run_holds(way):
    settings = settings_of(config(recipe="dpo"), way)
    outline = outline_run(outline_model(settings), settings)
    trained, base = split_trainable(load_model(settings, jax.random.key(0)).params)
    state = init_train_state(trained, settings.optimizer(10))
    assert bytes_of(state.params) == bytes_of(outline.trained)
    assert bytes_of(state.opt_state) == bytes_of(outline.opt_state)
    assert bytes_of(base) == bytes_of(outline.frozen)
    assert bytes_of(outline.reference) == (0 if way.rank else bytes_of(trained)), "adapters off are the reference"


def test_ppo_holds_a_critic_of_its_own_and_with_adapters_a_head():
    settings = settings_of(config(recipe="ppo"), Way(0))
    model = load_model(settings, jax.random.key(0))
    method = ppo.make_method(model, settings)
    state = start_state(method, method.start(jax.random.key(1), model.params), settings.optimizer(10))
    outline = outline_run(outline_model(settings), settings)
    assert bytes_of(state.train.params) == bytes_of(outline.trained)
    assert bytes_of(outline.reference) == bytes_of(model.params)
    shared = outline_run(*[f(settings_of(config(recipe="ppo"), Way(2))) for f in (outline_model, lambda x: x)])
    assert jax.tree.map(jnp.shape, shared.trained.value) == {"kernel": (16, 1)}


def test_the_peak_grows_with_rows_and_tokens_and_shrinks_with_parts():
    peak = need().peak
    assert need(batch_size=8).peak > peak
    assert need(max_completion_length=12).peak > peak
    assert need(gradient_accumulation_steps=4).peak < peak
    assert need(recipe="dpo").peak > peak


def test_a_run_on_completions_needs_keys_and_values_and_the_reference_of_its_kl():
    found = need(recipe="grpo", n_layer=16)
    layers, rows, slots, width = 16, 4, 4 + 8 - 1, 16
    assert found.kv_cache == 2 * layers * rows * slots * width * 4
    assert found.reference == 0
    assert found.program == "update"
    assert found.peak > found.parameters + found.optimizer + found.temporary


def test_a_saved_model_is_estimated_from_its_config_alone(tmp_path):
    new = load_model(config(model_type="llama"), jax.random.key(0))
    save_pretrained(tmp_path / "whole", *new)
    (tmp_path / "config").mkdir()
    shutil.copy(tmp_path / "whole/config.json", tmp_path / "config")
    assert pretrained_module(tmp_path / "config") == from_pretrained(tmp_path / "whole")[0]
    assert need(model=str(tmp_path / "config")) == need(model_type="llama")


def test_nothing_is_allocated(monkeypatch):
    module = outline_model(config()).module
    shapes = {x.shape for x in jax.tree.leaves(outline_model(config()).params) if x.ndim > 1}
    seen, compile_program = [], Program.compile

    def weights():
        return [x.shape for x in jax.live_arrays() if x.shape in shapes]

    def watched(self):
        seen.append(len(weights()))
        return compile_program(self)

    gc.collect()
    before = len(weights())
    monkeypatch.setattr(Program, "compile", watched)
    need(recipe="dpo")
    assert seen == [before, before], "the reference's scoring and the step"
    params = module.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    assert len(weights()) == before + sum(x.ndim > 1 for x in jax.tree.leaves(params)), "they would have been seen"


@pytest.fixture
def tabled(monkeypatch):
    """Bytes of each way to train, without compiling anything."""
    peaks = {Way(0): 60e9, Way(32): 24e9, Way(16): 18e9, Way(8): 17e9, Way(8, True): 8e9}
    monkeypatch.setattr(estimate, "estimate", lambda _, way: estimate.Need(1, 1, 1, 1, 0, 1, int(peaks[way]), "step"))


@pytest.mark.parametrize(
    ("memory", "fits", "rule"),
    [
        (80.0, "all parameters", "all parameters or LoRA r 32"),
        (24.0, "LoRA r 32", "all parameters or LoRA r 32"),
        (20.0, "LoRA r 16", "LoRA r 16"),
        (12.0, "QLoRA r 8", "LoRA r 16"),
        (8.0, "QLoRA r 8", "QLoRA r 8"),
        (6.0, None, "QLoRA r 8"),
    ],
)
def test_the_first_way_that_fits_is_named_beside_the_usual_rule(memory, fits, rule, tabled, capsys):
    figures = estimate.run(config(memory=memory))
    assert figures["fits"] == fits
    assert list(figures["ways"]) == ["all parameters", "LoRA r 8", "QLoRA r 8"]
    printed = " ".join(capsys.readouterr().out.split())
    assert ("None fits" if fits is None else f"The first that fits is {fits} (of") in printed
    assert f"the usual rule for {memory:g} GB says {rule}." in printed


def test_without_memory_nothing_is_said_of_what_fits(tabled, capsys):
    figures = estimate.run(config())
    assert set(figures) == {"backend", "ways"}
    printed = capsys.readouterr().out
    assert "compiled for cpu" in printed
    assert "fits" not in printed


@pytest.mark.parametrize("chosen", [LORA, {"qlora": True, "lora_r": 2, "quant_type": "int8"}])
def test_all_ways_are_shown_whatever_was_chosen(chosen, tabled, monkeypatch):
    monkeypatch.setattr(estimate, "estimate", lambda config, way: estimate.Need(way.rank, 1, 1, 1, 0, 1, 1, "step"))
    assert list(estimate.run(config(**chosen))["ways"]) == ["all parameters", "LoRA r 2", "QLoRA r 2"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, got 0"),
        ({"memory": -1.0}, "memory must be at least 0, got -1.0"),
        ({"gradient_accumulation_steps": 3}, "gradient_accumulation_steps must be a divisor of batch_size=4, got 3"),
        ({"recipe": "grpo", "batch_size": 3}, "batch_size must be a multiple of num_generations=2, got 3"),
        ({"recipe": "grpo", "num_generations": 1}, "num_generations must be a whole number of at least 2, got 1"),
        ({"recipe": "ppo", "dropout": 0.1}, "dropout and lora_dropout must be 0"),
        ({"adapter": "folder", "model": "x", "lora": True}, "adapter must be empty: lora_r and target_modules say"),
        ({"max_prompt_length": 16}, "reads context_length=16 tokens, and 23 are needed: lower max_prompt_length"),
    ],
)
def test_wrong_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        estimate.run(config(**changes))


def test_a_model_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        estimate.run(config(model=str(tmp_path)))
