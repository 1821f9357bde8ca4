"""Finding a reward by name, in a module or in a file."""

import pytest

from jaxrl_llm.rewards import exact_match, load_reward


def test_a_reward_is_found_in_a_module():
    assert load_reward("jaxrl_llm.rewards:exact_match") is exact_match


def test_a_reward_is_found_in_a_file(tmp_path):
    path = tmp_path / "my_rewards.py"
    path.write_text("def length(completions, **columns):\n    return [len(text) for text in completions]\n")
    assert load_reward(f"{path}:length")(completions=["abc"]) == [3]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("exact_match", r'is named "package.module:function" or "path/file.py:function", got \'exact_match\''),
        (":f", "is named"),
        ("math:", "is named"),
        ("no_such_package.rewards:f", "There is no module 'no_such_package.rewards' for the reward"),
        ("jaxrl_llm.no_such_module:f", "There is no module 'jaxrl_llm.no_such_module'"),
        ("math:no_such_function", r"'no_such_function' is missing in math"),
        ("math:pi", r"'pi' is a float, not a function in math"),
        ("nowhere/rewards.py:f", r"There is no file nowhere/rewards.py for the reward"),
    ],
)
def test_a_reward_that_cannot_be_found_says_why(name, message):
    with pytest.raises(ValueError, match=message):
        load_reward(name)


def test_a_failing_import_inside_the_rewards_module_is_not_hidden(tmp_path, monkeypatch):
    (tmp_path / "rewards_with_a_missing_import.py").write_text("import no_such_dependency\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        load_reward("rewards_with_a_missing_import:f")
