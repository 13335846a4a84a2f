"""What sequences that do not run yet are going to compute: those that wait, and those on their way to the worker. Pure.

For the choice of a worker alone: whoever comes next counts on it, and nothing of it is sure.
"""

from scheduler.sequence import Sequence


class Promises:
    """By block hash, how many of these sequences have it in their prompts; and what they will run in all."""

    def __init__(self) -> None:
        self.num_tokens = 0
        """Tokens that they will run, as counted when each came."""
        self._num_holders: dict[bytes, int] = {}
        self._held: dict[int, tuple[list[bytes], int]] = {}

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, hash_: object) -> bool:
        return hash_ in self._num_holders

    def make(self, sequence: Sequence, num_tokens: int) -> None:
        """The sequence has come, with its chain as far as it is hashed; one that is known stays as it was."""
        if sequence.seq_id in self._held:
            return
        hashes = list(sequence.block_hashes)
        self._held[sequence.seq_id] = (hashes, num_tokens)
        self.num_tokens += num_tokens
        for hash_ in hashes:
            self._num_holders[hash_] = self._num_holders.get(hash_, 0) + 1

    def drop(self, sequence: Sequence) -> None:
        """It runs now, or never will; one that is not known has been dropped before."""
        hashes, num_tokens = self._held.pop(sequence.seq_id, ([], 0))
        self.num_tokens -= num_tokens
        for hash_ in hashes:
            if self._num_holders[hash_] == 1:
                del self._num_holders[hash_]
            else:
                self._num_holders[hash_] -= 1
