"""The README's example runs as it stands, and the Chinese README says the same."""

import re
from collections import Counter
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"
TRANSLATION = README.with_name("README.zh-CN.md")


def test_the_grpo_step_of_the_readme_runs_and_learns():
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.DOTALL)
    names: dict = {}
    exec(compile(example, "README.md", "exec"), names)
    rewards = names["rewards"]
    assert sum(rewards[-5:]) / 5 > 2 * sum(rewards[:5]) / 5


def test_both_readmes_have_the_same_blocks_of_code():
    english, chinese = (re.findall(r"```.*?```", path.read_text("utf-8"), re.DOTALL) for path in (README, TRANSLATION))
    assert len(english) > 4
    assert chinese == english


def test_both_readmes_have_the_same_sections_tables_figures_and_links():
    english, chinese = (path.read_text("utf-8") for path in (README, TRANSLATION))
    for pattern in (r"^#+ ", r"^\|", r"^!\[", r"\d+\.\d+", r"`[^`\n]+`"):
        found = [Counter(re.findall(pattern, text, re.MULTILINE)) for text in (english, chinese)]
        assert found[0] == found[1], pattern
    links = [Counter(re.findall(r"\]\((.*?)\)", text)) for text in (english, chinese)]
    assert links[0] - Counter(["README.zh-CN.md"]) == links[1] - Counter(["README.md"])
