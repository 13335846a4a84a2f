"""The dense free list against a memory of single slots, by random operations."""

from itertools import groupby

from hypothesis import given
from hypothesis import strategies as st

from tests.load.memory.ranges import RangeAllocator

NUM_SLOTS = 64


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 40)), max_size=60))
def test_a_range_is_the_first_that_is_free_and_long_enough(operations: list[tuple[bool, int]]) -> None:
    ranges, taken = RangeAllocator(NUM_SLOTS), [False] * NUM_SLOTS
    held: list[tuple[int, int]] = []
    for is_release, number in operations:
        if is_release and held:
            start, size = held.pop(number % len(held))
            ranges.release(start, size)
        elif not is_release:
            fits = [i for i in range(NUM_SLOTS - number + 1) if not any(taken[i : i + number])]
            found = ranges.allocate(number)
            assert found == (fits[0] if fits else None)
            if found is None:
                continue
            start, size = found, number
            held.append((start, size))
        else:
            continue
        taken[start : start + size] = [not is_release] * size
        assert ranges.num_free_slots == taken.count(False)
        assert ranges.largest_hole == max(
            (len(list(run)) for is_taken, run in groupby(taken) if not is_taken), default=0
        )
