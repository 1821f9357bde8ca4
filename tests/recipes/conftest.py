"""A run that several tests start from."""

import pytest

from jaxrl_llm.recipes.text import sft
from tests.recipes.runs import TINY, write_rows


@pytest.fixture(scope="module", autouse=True)
def quick(quick_compilation):
    """Recipes compile whole programs for a few steps."""


@pytest.fixture(scope="session")
def tuned(tmp_path_factory):
    """Settings and figures of SFT on sums of two digits, with more held-out rows than a batch has."""
    folder = tmp_path_factory.mktemp("tuned")
    rows = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(10) for b in range(10)]
    config = sft.Config(
        **TINY,
        output_dir=str(folder / "run"),
        dataset=write_rows(folder / "sums.jsonl", rows),
        eval_fraction=0.25,
        eval_exact_match=True,
        max_steps=100,
        per_device_train_batch_size=16,
        learning_rate=1e-2,
        warmup_steps=5,
        logging_steps=5,
        eval_steps=25,
        save_steps=40,
    )
    return config, sft.run(config)
