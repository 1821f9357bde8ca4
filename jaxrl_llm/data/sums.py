"""Sums of one-digit numbers: the smallest task with a verifiable answer, all of it known.

With plus alone and three numbers there are 1,000 sums; with plus and minus, 4,000. Every expression occurs once, so a
split by rows (`split_indices`) has no row on both sides; the same numbers in another order may be.
"""

import itertools

ALPHABET = "+-0123456789="
"""The characters of prompts and answers, for `character_tokenizer`."""


def one_digit_sums(num_terms: int = 3, operators: str = "+") -> list[dict[str, str]]:
    """Lists every expression of `num_terms` one-digit numbers.

    Args:
        num_terms: Numbers in an expression, at least 1; there are 10^terms · operators^(terms − 1) expressions.
        operators: "+", "-" or "+-".

    Returns:
        Rows with `prompt` ("3+4+5="), `completion` ("12") and the same as `answer`, the column of the exact-match
        reward.

    Raises:
        ValueError: If an operator is unknown.

    Example:
        >>> rows = one_digit_sums()
        >>> len(rows), rows[345]
        (1000, {'prompt': '3+4+5=', 'completion': '12', 'answer': '12'})
    """
    if not operators or set(operators) - set("+-"):
        raise ValueError(f'operators must be "+", "-" or "+-", got {operators!r}.')
    rows = []
    for signs in itertools.product(operators, repeat=num_terms - 1):
        for digits in itertools.product(range(10), repeat=num_terms):
            rest = list(zip(signs, digits[1:], strict=True))
            total = digits[0] + sum(digit if sign == "+" else -digit for sign, digit in rest)
            prompt = f"{digits[0]}" + "".join(f"{sign}{digit}" for sign, digit in rest) + "="
            rows.append({"prompt": prompt, "completion": str(total), "answer": str(total)})
    return rows
