import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxrl_llm import cli
from jaxrl_llm.data import Instruction, Message, as_rows
from jaxrl_llm.models import from_pretrained, save_pretrained
from jaxrl_llm.recipes.options import ModelOptions
from jaxrl_llm.recipes.progress import format_number
from jaxrl_llm.recipes.statistics import pass_at_k, wilson_interval
from jaxrl_llm.recipes.text import evaluate, reward_model
from jaxrl_llm.recipes.text.language_model import complete, load_model
from tests.recipes.runs import TINY, words, write_rows

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of random models, large enough to differ: a GPT-2, a Llama, and a reward model."""
    folder = tmp_path_factory.mktemp("models")
    for name, model_type in (("gpt2", "gpt2"), ("llama", "llama"), ("reward", "gpt2")):
        options = ModelOptions(**TINY | {"initializer_range": 0.4}, model_type=model_type)
        load = reward_model.load_reward_model if name == "reward" else load_model
        model = load(options, jax.random.key(1))
        save_pretrained(folder / name, model.module, model.params, model.tokenizer)
    return {name: str(folder / name) for name in ("gpt2", "llama", "reward")}


def run(model, rows, folder, **settings):
    path = write_rows(folder / "rows.jsonl", rows)
    return evaluate.run(evaluate.Config(model=model, dataset=path, **{"num_samples": 0} | settings))


def log_probs(folder, texts):
    """Log-probabilities [time, vocab] of what follows each token but the last of each text, in double precision."""
    module, params, _ = from_pretrained(folder)
    logits_of = jax.jit(lambda tokens: module.apply({"params": params}, tokens)[0])
    for ids in texts:
        logits = logits_of(np.pad(ids[:-1], (0, 17 - len(ids)))[None])[0, : len(ids) - 1]
        logits = np.asarray(logits, np.float64)
        yield logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def of_tokens(folder, texts, after=0):
    """Log-probabilities of the tokens of each text but the first, or those after a prompt."""
    logs = zip(log_probs(folder, texts), texts, strict=True)
    return [table[np.arange(len(ids) - 1), ids[1:]][max(after - 1, 0) :] for table, ids in logs]


def encode(folder, *texts):
    tokenizer = from_pretrained(folder)[2]
    return [np.array(tokenizer.encode(text), np.int32) for text in texts]


def test_texts_are_read_by_themselves_from_a_token_of_beginning_to_the_end(models, tmp_path):
    texts = ["1+1=2", "9", "0123456789+0123456789=01234"]
    figures = run(models["gpt2"], [{"text": text} for text in texts], tmp_path)
    # The model reads 16 tokens: a longer text is cut into windows of as many targets, which overlap in one token.
    windows = "<eos>1+1=2<eos>", "<eos>9<eos>", "<eos>0123456789+01234", "456789=01234<eos>"
    nats = -np.concatenate(of_tokens(models["gpt2"], encode(models["gpt2"], *windows)))
    assert (figures["rows"], figures["tokens"]) == (3, len(nats)) == (3, 36)
    assert figures["loss"] == pytest.approx(nats.mean(), rel=1e-5)
    assert figures["perplexity"] == pytest.approx(np.exp(nats.mean()), rel=1e-5)
    assert figures["bits_per_byte"] == pytest.approx(nats.sum() / np.log(2) / sum(map(len, texts)), rel=1e-5)


SUMS = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(7) for b in range(a)]


ROLES = ["user", "assistant"] * 2
ASK = {"num_generations": 1, "max_completion_length": 4}


@pytest.fixture(scope="module")
def greedy(models):
    """What the model answers."""
    model = load_model(ModelOptions(model=models["gpt2"]), jax.random.key(0))
    prompts = encode(models["gpt2"], *(row["prompt"] for row in SUMS))
    return complete(model, model.params, prompts, jax.random.key(0), max_new_tokens=4)


def with_answers(answers):
    return [row | {"answer": answer} for row, answer in zip(SUMS, answers, strict=True)]


def test_only_completions_count_and_the_size_of_a_batch_changes_nothing(models, greedy, tmp_path):
    rows = with_answers([text if i % 3 else "77777" for i, text in enumerate(greedy)])
    figures = run(models["gpt2"], rows, tmp_path, **ASK)
    texts = encode(models["gpt2"], *(f"{row['prompt']}{row['completion']}<eos>" for row in SUMS))
    nats = -np.concatenate(of_tokens(models["gpt2"], texts, after=4))
    assert figures["tokens"] == len(nats)
    assert figures["loss"] == pytest.approx(nats.mean(), rel=1e-5)
    best = [table[3:].argmax(-1) == ids[4:] for table, ids in zip(log_probs(models["gpt2"], texts), texts, strict=True)]
    assert figures["mean_token_accuracy"] == pytest.approx(np.concatenate(best).mean())
    assert figures["exact_match"] == pytest.approx(2 / 3)
    assert figures["pass@1"] == pytest.approx(2 / 3)
    smaller = run(models["gpt2"], rows, tmp_path, per_device_eval_batch_size=5, **ASK)
    assert smaller == pytest.approx(figures, rel=1e-6)


def test_a_completion_may_contain_the_answer_or_give_its_number(models, greedy, tmp_path):
    rows = with_answers([text[-1:] if i % 3 else "77777" for i, text in enumerate(greedy)])
    assert run(models["gpt2"], rows, tmp_path, match="contains", **ASK)["contains_match"] == pytest.approx(2 / 3)
    numbers = [re.findall(r"\d+", text)[-1:] for text in greedy]
    rows = with_answers([f"so it is {number[0]}.0" if number else "5" for number in numbers])
    right = np.mean([bool(number) for number in numbers])
    assert run(models["gpt2"], rows, tmp_path, match="numeric", **ASK)["pass@1"] == pytest.approx(right)


def test_samples_are_judged_by_a_function_and_counted_by_the_unbiased_estimator(models, tmp_path):
    (tmp_path / "odd.py").write_text(
        "def odd(prompts, completions, limit, **columns):\n"
        "    return [float(text[-1:] in list('13579')) * most for text, most in zip(completions, limit)]\n"
    )
    rows = [{"prompt": row["prompt"], "limit": 2 * (i % 2)} for i, row in enumerate(SUMS)]
    options = words(
        model=models["gpt2"],
        dataset=write_rows(tmp_path / "prompts.jsonl", rows),
        max_rows=20,
        num_generations=3,
        temperature=1.0,
        max_completion_length=4,
        reward_funcs=f"{tmp_path}/odd.py:odd",
        reward_threshold=2,
        num_samples=60,
        output_file=tmp_path / "new" / "figures.json",
    )
    cli.main(["evaluate", *options])
    written = json.loads((tmp_path / "new" / "figures.json").read_text())
    samples, figures = written["samples"], written["figures"]
    assert [sample["prompt"] for sample in samples] == [row["prompt"] for row in rows[:20] for _ in range(3)]
    right = np.array([sample["completion"][-1:] in list("13579") for sample in samples]).reshape(20, 3)
    right &= np.arange(20)[:, None] % 2 == 1
    assert 0 < right.sum() < 30
    assert figures["odd"] == pytest.approx(2 * right.mean())
    assert figures["prompts"] == 20
    for k in (1, 2, 3):
        assert figures[f"pass@{k}"] == pytest.approx(pass_at_k(right.sum(1).tolist(), num_samples=3, k=k))
    assert written["config"]["num_generations"] == 3


PAIRS = [
    {"prompt": f"{a}+{b}=", "chosen": str(a + b), "rejected": str((7 * a + 3 * b + 1) % 10) + "3" * (a % 2)}
    for a in range(4)
    for b in range(6)
]


def test_pairs_are_judged_by_likelihood_and_by_its_ratio_to_a_reference_of_another_architecture(models, tmp_path):
    figures = run(models["gpt2"], PAIRS, tmp_path, reference=models["llama"])
    responses = [
        encode(models["gpt2"], *(f"{row['prompt']}{row[name]}<eos>" for row in PAIRS))
        for name in ("chosen", "rejected")
    ]
    logs = [[of_tokens(models[name], texts, after=4) for texts in responses] for name in ("gpt2", "llama")]
    own, ref = (np.array([[each.sum() for each in half] for half in model]) for model in logs)
    means = np.array([[each.mean() for each in half] for half in logs[0]])
    margins = (own - ref)[0] - (own - ref)[1]
    for name, values in (
        ("accuracy", own[0] > own[1]),
        ("accuracy_averaged", means[0] > means[1]),
        ("rewards/accuracies", margins > 0),
    ):
        assert 0 < values.sum() < 24, name
        assert figures[name] == values.mean()
        assert (figures[f"{name}_low"], figures[f"{name}_high"]) == wilson_interval(int(values.sum()), 24)
    assert figures["logps/rejected"] == pytest.approx(own[1].mean(), rel=1e-5)
    assert figures["rewards/margins"] == pytest.approx(margins.mean(), rel=1e-4)
    both = [*responses[0], *responses[1]]
    tables = zip(log_probs(models["gpt2"], both), log_probs(models["llama"], both), strict=True)
    kl = [(np.exp(p) * (p - q)).sum(-1)[3:].sum() for p, q in tables]
    assert figures["kl"] == pytest.approx(np.mean(kl), rel=1e-4)


def test_samples_are_the_first_rows_each_with_what_was_measured_of_it(models, tmp_path):
    file = tmp_path / "samples.json"

    def samples(rows):
        run(models["gpt2"], rows, tmp_path, num_samples=2, output_file=str(file))
        return json.loads(file.read_text("utf-8"))["samples"]

    def nats(*texts, after=0):
        return -np.concatenate(of_tokens(models["gpt2"], encode(models["gpt2"], *texts), after=after))

    texts = ["0123456789+0123456789=01234", "1+1=2", "9"]
    losses = nats("<eos>0123456789+01234", "456789=01234<eos>").mean(), nats("<eos>1+1=2<eos>").mean()
    found = samples([{"text": text} for text in texts])
    assert [sample["text"] for sample in found] == texts[:2]
    assert [sample["loss"] for sample in found] == pytest.approx(losses, rel=1e-5)

    found, whole = samples(SUMS[:3]), ["1+0=1<eos>", "2+0=2<eos>"]
    assert [sample["text"] for sample in found] == whole
    assert [sample["loss"] for sample in found] == pytest.approx(
        [nats(text, after=4).mean() for text in whole], rel=1e-5
    )

    found = samples(PAIRS[:3])
    assert len(found) == 2
    for sample, row in zip(found, PAIRS, strict=False):
        for name in ("chosen", "rejected"):
            assert sample[name] == row[name]
            expected = -nats(f"{row['prompt']}{row[name]}<eos>", after=4).sum()
            assert sample[f"log-prob of {name}"] == pytest.approx(expected, rel=1e-5)


def test_a_model_does_not_differ_from_itself(models, tmp_path):
    figures = run(models["llama"], SUMS, tmp_path, reference=models["llama"])
    assert figures["kl"] == pytest.approx(0, abs=1e-6)
    assert figures["ref_loss"] == figures["loss"]


def test_a_reward_model_judges_pairs_and_ratings(models, tmp_path, capsys):
    model = reward_model.load_reward_model(ModelOptions(model=models["reward"]), jax.random.key(0))

    values = jax.jit(lambda ids: model.module.apply({"params": model.params}, ids)[0])

    def rewards(*texts):
        rows = encode(models["gpt2"], *(f"{text}<eos>" for text in texts))
        return np.array([values(np.pad(ids, (0, 16 - len(ids)))[None])[0, len(ids) - 1] for ids in rows])

    figures = run(models["reward"], PAIRS, tmp_path, per_device_eval_batch_size=9, num_samples=1)
    chosen, rejected = (rewards(*(row["prompt"] + row[name] for row in PAIRS)) for name in ("chosen", "rejected"))
    assert 0 < figures["accuracy"] == np.mean(chosen > rejected) < 1
    assert figures["margin"] == pytest.approx(np.mean(chosen - rejected), rel=1e-4)
    assert re.search(rf"0\+0= +│ 0 +│ +{format_number(chosen[0])} ", capsys.readouterr().out)

    # Rows of like length go together; each must get its own reward back.
    rows = [{"text": row["prompt"] + row["rejected"], "score": i % 4} for i, row in enumerate(PAIRS)]
    figures = run(models["reward"], rows, tmp_path, per_device_eval_batch_size=9)
    found, scores = rewards(*(row["text"] for row in rows)), np.arange(24) % 4
    assert figures["mse"] == pytest.approx(np.mean((found - scores) ** 2), rel=1e-4)
    assert figures["mae"] == pytest.approx(np.mean(abs(found - scores)), rel=1e-4)
    assert figures["pearson"] == pytest.approx(np.corrcoef(found, scores)[0, 1], rel=1e-4)


@pytest.mark.parametrize(
    ("columns", "kind"),
    [
        ({"text": "a", "score": None}, "texts"),
        ({"text": "a", "rating": 1}, "ratings"),
        ({"messages": []}, "completions"),
        ({"instruction": "a", "output": "b", "text": "c"}, "completions"),
        ({"prompt": "a", "completion": "b", "label": True}, "completions"),
        ({"prompt": "a", "answer": "b"}, "prompts"),
        ({"chosen": "a", "rejected": "b", "score": 1}, "pairs"),
    ],
)
def test_the_columns_of_a_row_tell_what_it_is(columns, kind):
    assert evaluate.kind_of(as_rows([columns])[0]) == kind


@pytest.mark.parametrize(
    ("columns", "prompt", "answer"),
    [
        ({"instruction": "a", "input": "b", "output": "c"}, Instruction("a", "b"), "c"),
        ({"prompt": "a", "completion": "b", "answer": 5}, "a", 5),
        (
            {"messages": [{"role": role, "content": text} for text, role in zip("abcd", ROLES, strict=True)]},
            (Message("user", "a"), Message("assistant", "b"), Message("user", "c")),
            "d",
        ),
    ],
)
def test_a_row_asks_for_its_last_response_or_its_answer(columns, prompt, answer):
    question = evaluate.question(as_rows([columns])[0], "completions")
    assert (question.prompt, question.columns["answer"]) == (prompt, answer)


@pytest.mark.parametrize(
    ("model", "rows", "settings", "message"),
    [
        ("gpt2", [], {}, "has no rows"),
        ("gpt2", [{"title": "1"}], {}, r"line 1: nothing can be evaluated on the columns \['title'\]"),
        ("gpt2", [{"prompt": "1", "chosen": "2"}], {}, "field `rejected` is missing"),
        ("gpt2", [{"text": "1", "score": 1}], {}, "is a language model. Train a reward model .* with --rows texts"),
        ("reward", [{"text": "1"}], {}, "is a reward model, which judges pairs and ratings; .*rows.jsonl has texts"),
        ("reward", PAIRS[:1], {"reference": "gpt2"}, "is for language models"),
        ("gpt2", [{"text": "1"}], {"num_generations": 1}, "needs rows with prompts to complete, not texts"),
        ("gpt2", [{"prompt": "1"}], {}, "has prompts without completions: set num_generations"),
        ("gpt2", [{"prompt": "1"}], ASK, "Reward 'exact_match' needs .*answer"),
        ("gpt2", [{"prompt": "1", "completion": None, "answer": None}], ASK, "No reward function applies .* prompt 1"),
        ("gpt2", [{"prompt": "1" * 17, "completion": "2"}], {}, "None of the 1 rows .* max_length=16"),
        ("gpt2", [{"prompt": "1" * 14, "answer": "2"}], ASK, "None of the 1 rows .* max_prompt_length=13"),
        ("gpt2", SUMS[:1], ASK | {"max_completion_length": 17}, "context_length=16 .* lower max_completion_length"),
        ("gpt2", SUMS[:1], {"max_length": 17}, "context_length=16 tokens, and 17 are needed: lower max_length"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(models, model, rows, settings, message, tmp_path):
    settings = settings | {"reference": models[settings["reference"]]} if "reference" in settings else settings
    with pytest.raises(ValueError, match=message):
        run(models[model], rows, tmp_path, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_generations": 2}, r"temperature must be positive for several num_generations: .* got 0\.0"),
        ({"reward_funcs": ("a:b",)}, "reward_funcs must be empty where num_generations is 0"),
        ({"max_length": 1}, "max_length must be at least 2 tokens, or 0, got 1"),
        ({"output_file": "figures.txt"}, r"output_file must be a \.json file, got 'figures\.txt'"),
        ({"per_device_eval_batch_size": 0}, "per_device_eval_batch_size must be a whole number of at least 1, got 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        evaluate.run(evaluate.Config(model="none", dataset="none", **settings))


def test_models_without_a_tokenizer_or_with_another_vocabulary_are_refused(models, tmp_path):
    with pytest.raises(ValueError, match="holds no tokenizer files; save them into the same folder"):
        run(str(GOLDEN / "gpt2_tied"), SUMS, tmp_path)
    with pytest.raises(ValueError, match="holds no tokenizer files; save them into the same folder"):
        run(str(GOLDEN / "gpt2_reward"), SUMS, tmp_path)
    other = load_model(ModelOptions(**TINY | {"tokenizer": "characters:abc"}), jax.random.key(0))
    save_pretrained(tmp_path / "other", other.module, other.params, other.tokenizer)
    with pytest.raises(ValueError, match=r"reference=.* has another vocabulary than model="):
        run(models["gpt2"], SUMS, tmp_path, reference=str(tmp_path / "other"))
