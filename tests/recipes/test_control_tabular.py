import dataclasses

import pytest

from jaxrl_llm.recipes.control.tabular import Config, run


def test_q_learning_comes_close_to_the_best_policy_of_the_lake(capsys):
    figures = run(Config(num_steps=100_000))
    assert figures["optimal"] == pytest.approx(0.542, abs=1e-3)
    assert 0.9 * figures["optimal"] < figures["q_learning"] <= figures["optimal"] + 1e-5
    assert figures["random"] < 0.02
    printed = capsys.readouterr().out
    assert "← 0.54" in printed  # on the slippery lake the best first step is against the wall
    assert "q_learning: policy and values" in printed


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gamma": 1.0}, r"gamma must be in \[0, 1\), got 1.0"),
        ({"learning_rate": 0.0}, r"learning_rate must be in \(0, 1\], got 0.0"),
        ({"epsilon": 2.0}, r"epsilon must be in \[0, 1\], got 2.0"),
        ({"decay": -1.0}, "decay must be at least 0, got -1.0"),
        ({"num_steps": 0}, "num_steps must be a whole number of at least 1, got 0"),
        ({"lake": ()}, "rows must have equal lengths, letters of S, F, H, G"),
        ({"lake": ("SX",)}, "rows must have equal lengths, letters of S, F, H, G"),
    ],
)
def test_wrong_settings_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        run(dataclasses.replace(Config(), **settings))
