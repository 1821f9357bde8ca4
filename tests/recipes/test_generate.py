import jax
import numpy as np
import pytest

from jaxrl_llm import cli
from jaxrl_llm.models import save_pretrained
from jaxrl_llm.recipes.options import ModelOptions
from jaxrl_llm.recipes.text import generate
from jaxrl_llm.recipes.text.language_model import complete, load_model
from tests.recipes.runs import TINY

ALPHABET = "ab []/red\n# Instruction:Response"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Random weights, large enough to say something."""
    folder = str(tmp_path_factory.mktemp("generate") / "model")
    options = TINY | {"tokenizer": f"characters:{ALPHABET}", "n_positions": 48, "initializer_range": 0.5}
    model = load_model(ModelOptions(**options), jax.random.key(0))
    save_pretrained(folder, model.module, model.params, model.tokenizer)
    return folder


def run(model, *prompts, **settings):
    return generate.run(generate.Config(model=model, prompt=prompts, **{"max_new_tokens": 8} | settings))


def test_greedy_completions_come_in_order_and_do_not_depend_on_neighbours(model):
    together = run(model, "ab", "baab")
    assert len(together) == 2
    assert together == [*run(model, "ab"), *run(model, "baab")]


def test_samples_of_one_prompt_stand_together_and_depend_on_the_seed_alone(model, capsys):
    settings = {"temperature": 1.0, "num_generations": 3}
    samples = run(model, "ab", "ba", **settings)
    prompts = ["ab"] * 3 + ["ba"] * 3
    assert capsys.readouterr().out == "".join(f"{p}{text}\n" for p, text in zip(prompts, samples, strict=True))
    assert len(set(samples)) == 6
    assert samples == run(model, "ab", "ba", **settings)
    assert samples != run(model, "ab", "ba", **settings, seed=1)


def test_a_nucleus_of_nothing_but_the_likeliest_token_is_greedy(model):
    assert run(model, "ab", temperature=1.0, top_p=1e-6) == run(model, "ab")


def test_a_completion_ends_where_the_model_has_no_more_room(model):
    # 48 positions: the model reads the two tokens of the prompt and 46 of its own, and writes one more.
    (text,) = run(model, "ab", max_new_tokens=1000)
    loaded = load_model(ModelOptions(model=model), jax.random.key(0))
    prompt = [np.array(loaded.tokenizer.encode("ab"), np.int32)]
    assert [text] == complete(loaded, loaded.params, prompt, jax.random.key(0), max_new_tokens=47)
    with pytest.raises(
        ValueError, match=r"context_length=48 tokens, and 49 are needed: shorten the prompts, ask for fewer"
    ):
        complete(loaded, loaded.params, prompt, jax.random.key(0), max_new_tokens=48)


def test_a_prompt_longer_than_the_model_reads_is_refused(model):
    with pytest.raises(ValueError, match="context_length=48 tokens, and 49 are needed: shorten the prompt"):
        run(model, "a" * 49)


def test_a_backslash_and_n_in_a_prompt_is_a_line_break(model):
    assert run(model, r"a\nb") == run(model, "a\nb")


def test_an_instruction_is_put_into_the_template(model):
    assert run(model, "a", instruction=True, max_new_tokens=1) == run(
        model, "### Instruction:\na\n### Response:\n", max_new_tokens=1
    )


def test_text_is_printed_as_it_is_though_it_looks_like_markup_and_is_long(model, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    prompt = "[red]" + "a b" * 10 + "[/red]"
    (text,) = run(model, prompt)
    assert capsys.readouterr().out == f"{prompt}{text}\n"


def test_a_prompt_that_the_tokenizer_cannot_write_is_refused_by_the_command_with_the_characters(model):
    with pytest.raises(SystemExit) as stop:
        cli.main(["generate", "--model", model, "--prompt", "a?"])
    assert "jaxrl-llm generate: The tokenizer has no token for ['?'] in 'a?'" in str(stop.value)


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        run(str(tmp_path), "a")
