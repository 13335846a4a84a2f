"""All-pairs selection: few rows in which every two values of two factors meet."""

import itertools
import random
from collections.abc import Callable, Mapping, Sequence

Row = dict[str, object]


def product(factors: Mapping[str, Sequence[object]], allowed: Callable[[Row], bool]) -> list[Row]:
    """Every row that is allowed, in order."""
    rows = [dict(zip(factors, values, strict=True)) for values in itertools.product(*factors.values())]
    return [row for row in rows if allowed(row)]


def pairwise(factors: Mapping[str, Sequence[object]], allowed: Callable[[Row], bool]) -> list[Row]:
    """Rows of the product that cover every pair that some allowed row has: greedily, the same ones each time."""
    rows = product(factors, allowed)
    random.Random(0).shuffle(rows)
    pairs_of = [_pairs(row) for row in rows]
    missing = set().union(*pairs_of)
    chosen: list[Row] = []
    while missing:
        best = max(range(len(rows)), key=lambda i: len(pairs_of[i] & missing))
        chosen.append(rows[best])
        missing -= pairs_of[best]
    return chosen


def _pairs(row: Row) -> set[object]:
    return set(itertools.combinations(sorted(row.items()), 2))
