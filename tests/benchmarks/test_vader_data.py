import doctest

import pytest

from benchmarks import vader_data
from benchmarks.vader_data import EVAL_ONE_IN, MIN_MARGIN, Snippet, clean, draw_pairs, read_snippets, split, words_of
from tests.benchmarks import archives

SNIPPETS = [Snippet(f"Film number {n} has a plot.", round(-4 + 8 * (37 * n % 400) / 399, 6)) for n in range(400)]


def test_the_examples_run():
    assert doctest.testmod(vader_data).failed == 0


def test_only_the_film_snippets_are_read_as_utf8(tmp_path):
    sdist = archives.vader_sdist(
        tmp_path / "v.tar.gz", ["1\t2.26666666667\tA ''joy''   for   Amélie", "2\t-1\tS&amp;M"]
    )
    assert read_snippets(sdist) == [Snippet('A "joy" for Amélie', 2.266667), Snippet("S&M", -1.0)]


@pytest.mark.parametrize("line", ["1\t2.0", "1\t4.5\tToo good"])
def test_a_line_that_is_no_rated_snippet_is_shown(tmp_path, line):
    with pytest.raises(ValueError, match="line 2 of the snippets must be"):
        read_snippets(archives.vader_sdist(tmp_path / "v.tar.gz", ["1\t2.0\tFine", line]))


def test_cleaning_twice_changes_nothing():
    assert clean(clean(" A \t''mess''\u00a0&amp; more ")) == clean('A "mess" & more') == 'A "mess" & more'


def test_no_snippet_stands_on_both_sides_however_it_is_written():
    variants = [Snippet(text.upper().replace(" ", "  ") + "!", score) for text, score in SNIPPETS]
    sides = split([*SNIPPETS, *variants])
    words = {side: {words_of(snippet.text) for snippet in members} for side, members in sides.items()}
    assert not words["train"] & words["eval"]
    assert sorted([*sides["train"], *sides["eval"]]) == sorted(SNIPPETS)
    assert len(sides["eval"]) == pytest.approx(len(SNIPPETS) / EVAL_ONE_IN, rel=0.2)


def test_a_snippet_keeps_its_side_and_its_place_whatever_else_there_is():
    whole, half = split(SNIPPETS), split(SNIPPETS[::-2])
    for side, members in half.items():
        assert members == [snippet for snippet in whole[side] if snippet in half[side]]


def test_pairs_put_the_clearly_better_one_first_and_use_no_snippet_too_often():
    pairs = draw_pairs(SNIPPETS, count=300, max_uses=2)
    assert len(set(pairs)) == len(pairs) == 300
    assert all(better.score - worse.score >= MIN_MARGIN for better, worse in pairs)
    texts = [snippet.text for pair in pairs for snippet in pair]
    assert max(texts.count(text) for text in texts) == 2
    assert pairs == draw_pairs(SNIPPETS, count=300, max_uses=2)


def test_more_pairs_than_there_are_is_an_error():
    alike = [Snippet("good", 2.0), Snippet("fine", 1.5), Snippet("bad", -2.0)]
    assert len(draw_pairs(alike, count=2, max_uses=2)) == 2
    with pytest.raises(ValueError, match="count is 3, but only 2 pairs were found"):
        draw_pairs(alike, count=3, max_uses=2)


def test_every_table_is_made_of_its_own_side_and_labels_leave_out_the_neutral(monkeypatch):
    monkeypatch.setattr(vader_data, "PAIRS", {"train": 100, "eval": 20})
    tables = vader_data.tables(SNIPPETS)
    scores = {snippet.text: snippet.score for snippet in SNIPPETS}
    for side, members in split(SNIPPETS).items():
        own = [snippet.text for snippet in members]
        assert [row["text"] for row in tables[f"texts_{side}"]] == own
        assert tables[f"ratings_{side}"] == [{"text": text, "score": scores[text]} for text in own]
        labelled = [text for text in own if abs(scores[text]) > 0.5]
        assert [row["completion"] for row in tables[f"unpaired_{side}"]] == labelled
        assert all(row["label"] is (scores[row["completion"]] > 0) for row in tables[f"unpaired_{side}"])
        assert [row["text"] for row in tables[f"positive_{side}"]] == [t for t in labelled if scores[t] > 0]
        pairs = tables[f"pairs_{side}"]
        assert len(pairs) == vader_data.PAIRS[side]
        assert {row["chosen"] for row in pairs} | {row["rejected"] for row in pairs} <= set(own)
        for row in pairs:
            assert row["margin"] == pytest.approx(scores[row["chosen"]] - scores[row["rejected"]], abs=1e-6)
    chosen, rejected = ([row[side] for row in tables["pairs_eval"]] for side in ("chosen", "rejected"))
    assert len({*chosen, *rejected}) == 2 * len(chosen)
    assert {row["prompt"] for name in ("pairs_train", "unpaired_eval") for row in tables[name]} == {"<|endoftext|>"}
