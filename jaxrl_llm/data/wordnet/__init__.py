"""Definitions of the 5,000 English words that WordNet 3.0's concordance uses most (short glosses only).

The sample is made by `benchmarks/make_wordnet_sample.py`; the licence of WordNet stands in LICENSE beside the data.
"""

import importlib.resources
import json


def wordnet_definitions() -> list[dict[str, str]]:
    r"""Reads the sample as rows of SFT, in alphabetical order, one row a word.

    Returns:
        Rows with `prompt` ("Define: happiness\n") and `completion` (the gloss of the word's first sense).

    Example:
        >>> rows = wordnet_definitions()
        >>> len(rows), rows[0]
        (5000, {'prompt': 'Define: abandon\n', 'completion': 'forsake, leave behind'})
    """
    text = (importlib.resources.files(__name__) / "definitions.jsonl").read_text("utf-8")
    entries = [json.loads(line) for line in text.splitlines()]
    return [{"prompt": f"Define: {entry['word']}\n", "completion": entry["gloss"]} for entry in entries]
