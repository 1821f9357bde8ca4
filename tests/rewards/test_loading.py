"""Finding a reward by name, in a module or in a file."""

import pytest

from jaxrl_llm import rewards
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
        (
            "exact-match",
            r'named "short_name", "package.module:function" or "path/file.py:function".*; got \'exact-match\'',
        ),
        ("exact_mach", r"There is no reward 'exact_mach'. Did you mean 'exact_match'\? Ours are exact_match, numeric"),
        ("load_reward", r"There is no reward 'load_reward'\."),
        ("soft_overlong", r"'soft_overlong' cannot be made: .*max_completion_length"),
        ("repetition_penalty(size=1)", r"cannot be made: .*size"),
        (
            "soft_overlong(cache=30, max_completion_length=20)",
            "0 <= cache <= max_completion_length is meant, got cache=30",
        ),
        ("exact_match(strip=True)", r"cannot be made: .*In parentheses stand the options"),
        ("tag_format(('a', 'b'))", "cannot be read .options are given by keyword"),
        ("tag_format(**{'strict': True})", "cannot be read"),
        ("tag_format(strict=print(1))", "cannot be read"),
        ("tag_format(strict=", "is named"),
        ("tag_format(strict=)", "cannot be read"),
        ("tag_format(strict=1)(strict=2)", "cannot be read"),
        ("math:floor(x=1)", "cannot be made"),
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


def test_options_follow_the_name_and_need_no_import_path():
    assert load_reward("answer_match")(completions=["#### 7"], answer=["7"]) == [1.0]
    assert load_reward(" tag_format(tags=('a',), strict=False) ")(completions=["so <a>1</a>"]) == [1.0]
    named = load_reward("jaxrl_llm.rewards:soft_overlong(max_completion_length=10,cache=4)")
    assert named(completion_ids=[[0] * 8]) == [-0.5]
    assert named.__name__ == "soft_overlong"


def test_options_go_to_functions_of_a_file_whatever_its_name(tmp_path):
    path = tmp_path / "my(1).py"
    path.write_text(
        "def scaled(scale=1, by='a:b'):\n"
        "    return lambda completions, **columns: [scale * len(by) for text in completions]\n"
        "def no_reward():\n"
        "    return 3\n"
    )
    assert load_reward(f"{path}:scaled()")(completions=["x"]) == [3]
    assert load_reward(f"{path}:scaled(scale=2, by=':')")(completions=["x"]) == [2]
    with pytest.raises(ValueError, match="gave a int; expected a function"):
        load_reward(f"{path}:no_reward()")


def test_every_short_name_is_a_reward_of_the_table():
    for name in rewards.SHORT_NAMES:
        assert f"`{name}" in rewards.__doc__
        assert callable(getattr(rewards, name))
