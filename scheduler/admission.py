"""Whether one more sequence can be admitted: looks ahead at the peak that the running batch can reach.

A running batch needs most blocks at some moment when one of its sequences ends: until then all that outlive it have
grown as far as it, after it its blocks are back. The peak over these moments must fit the pool. How long a sequence
will still grow is its own limit, or, where it may stop earlier, what sequences of its kind did lately (compare Gong et
al., "Past-Future Scheduler for LLM Serving under SLA Guarantees", 2025). Pure.
"""

from bisect import bisect_right, insort
from collections import deque
from collections.abc import Iterable
from itertools import accumulate

from scheduler.sequence import Sequence

MIN_HISTORY = 16
"""Finished outputs below which only the limits count."""


class OutputLengths:
    """Lengths of the outputs that ended lately by a stop, to foretell those that run."""

    def __init__(self, num_kept: int = 256) -> None:
        self._lengths: deque[int] = deque()
        self._num_kept = num_kept
        self._sorted: list[int] = []
        self._sums: list[int] = [0]
        """Entry i: the sum of the i longest."""

    def add(self, num_output_tokens: int) -> None:
        """Notes the length of an output that ended by itself."""
        self._lengths.append(num_output_tokens)
        insort(self._sorted, num_output_tokens)
        if len(self._lengths) > self._num_kept:
            self._sorted.remove(self._lengths.popleft())
        self._sums = list(accumulate(reversed(self._sorted), initial=0))

    def expected_remaining(self, sequence: Sequence) -> int:
        """Tokens that the sequence will probably still generate, at most its limit."""
        num_outputs = sequence.num_output_tokens
        most = sequence.limits.max_output_tokens - num_outputs
        if sequence.limits.ignores_eos or len(self._sorted) < MIN_HISTORY:
            return most
        num_longer = len(self._sorted) - bisect_right(self._sorted, num_outputs)
        if not num_longer:
            return most
        return min(most, self._sums[num_longer] // num_longer - num_outputs + 1)


def peak_blocks(sequences: Iterable[Sequence], lengths: OutputLengths, block_size: int) -> int:
    """Most blocks, beside those shared, that the sequences will hold at once if all grow as expected.

    A sequence that is not admitted yet counts with all its tokens; one that is, with the blocks that it holds alone.
    """
    growths = []
    for sequence in sequences:
        shared = sequence.num_shared_blocks * block_size
        growths.append((lengths.expected_remaining(sequence), max(0, len(sequence.token_ids) - shared)))
    growths.sort(reverse=True)
    peak = num_full = 0
    num_by_fill = [0] * block_size  # how many sequences have so many tokens in their last, partial block
    for position, (remaining, num_tokens) in enumerate(growths, start=1):
        num_full += num_tokens // block_size
        num_by_fill[num_tokens % block_size] += 1
        num_more, rest = divmod(remaining, block_size)
        num_partial = position - (num_by_fill[0] if rest == 0 else 0)
        num_overflowing = sum(num_by_fill[block_size - rest + 1 :]) if rest else 0
        peak = max(peak, num_full + position * num_more + num_partial + num_overflowing)
    return peak
