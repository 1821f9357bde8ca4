"""What compiled programs of whole runs hold in memory: never the logits of a whole batch, and no second copy of the state."""

import importlib
import math
import re

import jax
import pytest
from jax._src import compiler  # there is no public way to see all programs of a run

from jaxrl_llm.models import decoder, save_pretrained
from jaxrl_llm.recipes.options import ModelOptions
from jaxrl_llm.recipes.text import sft
from jaxrl_llm.recipes.text.estimate import bytes_of
from jaxrl_llm.recipes.text.language_model import load_model, outline_model
from jaxrl_llm.recipes.text.outlines import outline_run
from tests.recipes.runs import write_rows

VOCAB = 211  # a prime number, which divides the size of an array only if the array has the vocabulary as an axis
LETTERS = "".join(map(chr, range(0x4E00, 0x4E00 + VOCAB - 2)))  # beside them there are <pad> and <eos>
ROWS, TIME, PROMPT = 4, 15, 3
SIZES = {
    "tokenizer": f"characters:{LETTERS}",
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 16,
    "n_positions": 32,
    "chunk_size": 4,
}
SHARED = {"eval_fraction": 0.25, "max_steps": 1, "warmup_steps": 0}
OFFLINE = {"per_device_train_batch_size": ROWS, "num_samples": 0}
ONLINE = {"num_prompts": 2, "num_generations": 2, "max_completion_length": TIME}
REFERRED = {"ppo": {"num_generations": 2}, "grpo": {"beta": 0.1}, "rloo": {"beta": 0.1}, "reinforce": {"kl_coef": 0.1}}
OPTIONS = {
    **dict.fromkeys(("sft", "dpo", "kto", "orpo", "cpo", "distill"), OFFLINE),
    "pretrain": OFFLINE | {"max_length": PROMPT + TIME},
    **{name: ONLINE | options for name, options in REFERRED.items()},
    "trpo": ONLINE,
}
QUICK = ("sft", "dpo", "grpo", "ppo")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Rows of `PROMPT` + `TIME` tokens for every recipe (the last of a response is its end), and a text."""
    folder = tmp_path_factory.mktemp("data")
    answer = LETTERS[:1] * (TIME - 1)
    rows = [
        {"prompt": LETTERS[i : i + PROMPT], "chosen": answer, "rejected": answer[1:] + LETTERS[1], "answer": answer}
        for i in range(40)
    ]
    labelled = [{"prompt": row["prompt"], "completion": answer, "label": i % 2 == 0} for i, row in enumerate(rows)]
    (folder / "text.txt").write_text(LETTERS * 10, "utf-8")
    write_rows(folder / "pairs.jsonl", rows)
    write_rows(folder / "labelled.jsonl", labelled)
    write_rows(folder / "completed.jsonl", [{k: row[k] for k in ("prompt", "completion")} for row in labelled])
    return folder


@pytest.fixture
def programs(monkeypatch):
    """The text of each program that is compiled in a test."""
    texts = []
    compile_program = compiler.compile_or_get_cached

    def recorded(*arguments, **options):
        executable = compile_program(*arguments, **options)
        texts.extend(module.to_string() for module in executable.hlo_modules())
        return executable

    monkeypatch.setattr(compiler, "compile_or_get_cached", recorded)
    jax.clear_caches()  # what was compiled before would not be compiled again
    return texts


def settings(name, data, folder, **changes):
    files = {"sft": "completed", "distill": "completed", "kto": "labelled"}
    file = "text.txt" if name == "pretrain" else f"{files.get(name, 'pairs')}.jsonl"
    options = SIZES | SHARED | OPTIONS[name] | {"dataset": str(data / file), "output_dir": str(folder / name)}
    if name == "distill":
        teacher = load_model(ModelOptions(**SIZES), jax.random.key(1))
        save_pretrained(folder / "teacher", *teacher)
        options["teacher"] = str(folder / "teacher")
    if name == "trpo":
        del options["warmup_steps"]
    return importlib.import_module(f"jaxrl_llm.recipes.text.{name}").Config(**options | changes)


def run(config):
    return importlib.import_module(type(config).__module__).run(config)


def shapes_of_vocabulary(programs):
    """All shapes in the programs with an axis of the vocabulary, also where it is joined with others."""
    found = {tuple(map(int, s.split(","))) for text in programs for s in re.findall(r"\w\[([\d,]+)\]", text)}
    return {shape for shape in found if math.prod(shape) % VOCAB == 0}


def all_logits(programs):
    """Shapes that have room for the logits of a whole batch."""
    return {s for s in shapes_of_vocabulary(programs) if math.prod(s) >= ROWS * TIME * VOCAB}


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in OPTIONS]
)
def test_no_program_of_a_run_holds_the_logits_of_a_batch(name, data, programs, tmp_path):
    run(settings(name, data, tmp_path))
    largest = max(shapes_of_vocabulary(programs), key=math.prod)
    assert math.prod(largest) > ROWS * VOCAB, "no program holds logits at all"
    assert all_logits(programs) == set()


@pytest.mark.parametrize("name", ["sft", pytest.param("grpo", marks=pytest.mark.slow)])
def test_logits_of_a_whole_batch_are_found_where_there_are_some(name, data, programs, tmp_path):
    run(settings(name, data, tmp_path, chunk_size=PROMPT + TIME))
    assert all_logits(programs)


DEEP = {"tokenizer": "characters:0123456789", "n_layer": 12, "n_head": 2, "n_embd": 32, "n_positions": 64}


def step_of_sft(**changes):
    """The compiled step of a deep model, and what it holds."""
    options = {"dataset": "rows", "max_length": 64, "per_device_train_batch_size": 8, "warmup_steps": 0}
    config = sft.Config(**DEEP | options | changes)
    run = outline_run(outline_model(config), config)
    return run, run.programs["step"].compile().memory_analysis()


@pytest.fixture(scope="module")
def plain_step():
    return step_of_sft()


def test_recomputing_activations_takes_memory_for_one_layer_and_not_for_all(plain_step):
    _, recomputed = step_of_sft(remat=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder.nn, "remat", lambda block, **options: block)
        _, everything = step_of_sft()
    assert recomputed.temp_size_in_bytes < 0.4 * everything.temp_size_in_bytes
    assert recomputed.temp_size_in_bytes < plain_step[1].temp_size_in_bytes < everything.temp_size_in_bytes


def test_a_batch_in_parts_takes_memory_for_one_part(plain_step):
    _, parts = step_of_sft(gradient_accumulation_steps=8)
    assert parts.temp_size_in_bytes < 0.4 * plain_step[1].temp_size_in_bytes


@pytest.mark.parametrize("changes", [{}, {"lora": True}, {"optim_state_dtype": "bfloat16"}])
def test_a_step_takes_over_the_memory_of_its_state(changes, plain_step):
    run, memory = step_of_sft(**changes) if changes else plain_step
    state = bytes_of((run.trained, run.opt_state))
    assert state <= memory.alias_size_in_bytes <= memory.output_size_in_bytes < state + 10_000, "the rest are metrics"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_plan_leaves_out_the_float32_copy_of_frozen_kernels_that_a_cpu_makes(dtype):
    run, planned = step_of_sft(lora=True, dtype=dtype, remat=True, gradient_accumulation_steps=8)
    as_run = run.programs["step"].compile(as_run=True).memory_analysis()
    kernels = 12 * 12 * DEEP["n_embd"] ** 2 * 4
    copied = as_run.temp_size_in_bytes - planned.temp_size_in_bytes
    if dtype == "float32":
        assert copied < 0.1 * planned.temp_size_in_bytes
    else:
        assert copied > 0.9 * kernels
