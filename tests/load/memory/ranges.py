"""A dense cache's memory: contiguous ranges of slots from a free list, first fit.

Free ranges that touch become one; nothing is ever moved. So a range can be refused though as many slots are free.
"""

from bisect import insort


class RangeAllocator:
    """Owns `num_slots` slots, numbered from 0."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._holes: list[tuple[int, int]] = [(0, num_slots)]  # (first slot, slots), by first slot

    @property
    def num_free_slots(self) -> int:
        """Slots of all holes together."""
        return sum(size for _, size in self._holes)

    @property
    def largest_hole(self) -> int:
        """Slots of the longest range that could be had now."""
        return max((size for _, size in self._holes), default=0)

    def allocate(self, size: int) -> int | None:
        """The first slot of the first hole of `size` slots or more; None where there is none."""
        for i, (start, length) in enumerate(self._holes):
            if length >= size:
                self._holes[i : i + 1] = [(start + size, length - size)] if length > size else []
                return start
        return None

    def release(self, start: int, size: int) -> None:
        """Gives a range back."""
        insort(self._holes, (start, size))
        joined = self._holes[:1]
        for first, length in self._holes[1:]:
            before, before_length = joined[-1]
            assert before + before_length <= first, f"slot {first} released twice"
            if before + before_length == first:
                joined[-1] = (before, before_length + length)
            else:
                joined.append((first, length))
        self._holes = joined
