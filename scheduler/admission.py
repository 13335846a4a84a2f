"""Whether one more sequence can be admitted: looks ahead at the peak that the running batch can reach.

A running batch needs most blocks at some moment when one of its sequences ends: until then all that outlive it have
grown as far as it, after it its blocks are back. The peak over these moments must fit the pool. How long a sequence
will still grow is its own limit, or, where it may stop earlier, what sequences of its kind did lately (compare Gong et
al., "Past-Future Scheduler for LLM Serving under SLA Guarantees", 2025). Pure.
"""

from collections import deque
from collections.abc import Iterable

from scheduler.sequence import Sequence

MIN_HISTORY = 16
"""Finished outputs below which only the limits count."""


class OutputLengths:
    """Lengths of the outputs that ended lately by a stop, to foretell those that run."""

    def __init__(self, num_kept: int = 256) -> None:
        self._lengths: deque[int] = deque(maxlen=num_kept)

    def add(self, num_output_tokens: int) -> None:
        """Notes the length of an output that ended by itself."""
        self._lengths.append(num_output_tokens)

    def expected_remaining(self, sequence: Sequence) -> int:
        """Tokens that the sequence will probably still generate, at most its limit."""
        num_outputs = sequence.num_output_tokens
        most = sequence.limits.max_output_tokens - num_outputs
        if sequence.limits.ignores_eos or len(self._lengths) < MIN_HISTORY:
            return most
        longer = [length for length in self._lengths if length > num_outputs]
        if not longer:
            return most
        return min(most, sum(longer) // len(longer) - num_outputs + 1)


def peak_blocks(sequences: Iterable[Sequence], lengths: OutputLengths, block_size: int) -> int:
    """Most blocks, beside those shared, that the sequences will hold at once if all grow as expected.

    A sequence that is not admitted yet counts with all its tokens; one that is, with the blocks that it holds alone.
    """
    growths = []
    for sequence in sequences:
        remaining = lengths.expected_remaining(sequence)
        private = sequence.num_shared_blocks * block_size
        growths.append((remaining, len(sequence.token_ids) - private))
    growths.sort(reverse=True)
    peak = held_blocks = 0
    for position, (remaining, num_tokens) in enumerate(growths, start=1):
        held_blocks += -(-max(0, num_tokens) // block_size)
        peak = max(peak, held_blocks + -(-position * remaining // block_size))
    return peak
