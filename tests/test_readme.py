"""The README's example runs as it stands."""

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_the_grpo_step_of_the_readme_runs_and_learns():
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    names: dict = {}
    exec(compile(example, "README.md", "exec"), names)
    rewards = names["rewards"]
    assert sum(rewards[-5:]) / 5 > 2 * sum(rewards[:5]) / 5
