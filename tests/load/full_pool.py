"""One worker in the middle of its work, without a model: a full pool and a batch that decodes.

The mirror is the real one, and decides; what it decides are the rows of real scripts. Sequences of 264 + 256 tokens,
128 of them a prefix that a sixteenth of them share, are spread over all ages; one that ends makes room for a new one,
so that the pool stays as it is however many steps it runs. Blocks that no table names hold what ended sequences left.
"""

from collections.abc import Iterator

from scheduler.block_hash import extend_chain, root_hash
from scheduler.block_manager import BlockManager
from scheduler.changes import Changes
from scheduler.sequence import Sequence, SequenceLimits
from scheduler.store import SequenceRow, WorkerImage

BLOCK_SIZE = 16
NUM_SEQUENCES = 256
NUM_GROUPS = 16
PREFIX_TOKENS = 128
PROMPT_TOKENS = 264
OUTPUT_TOKENS = 256
MAX_BLOCKS = -(-(PROMPT_TOKENS + OUTPUT_TOKENS - 1) // BLOCK_SIZE)
LOOKAHEAD = 2
"""Plans for which blocks are reserved ahead, as with one plan ahead and Redis within a step."""
MAX_ENDED_AT_ONCE = 50
"""Ended sequences per script that fills a pool: no reply may take as long as a pipe waits for one."""
ROOT = root_hash("model", "bfloat16", "", "")
LIMITS = SequenceLimits(OUTPUT_TOKENS, frozenset(), ignores_eos=True)


class FullPool:
    """The decisions of one owner, script by script: first those of `fill`, all of them, then those of `step`."""

    def __init__(self, num_blocks: int, num_sequences: int = NUM_SEQUENCES) -> None:
        self.blocks = BlockManager(num_blocks, Changes())
        self.running: list[Sequence] = []
        self._num_sequences = num_sequences
        self._ended: list[Sequence] = []  # their rows and logs go with the next script
        self._num_opened = 0

    def fill(self) -> Iterator[Changes]:
        """The batch, whose first sequences compute what the others share; then, block by block, what others left."""
        ages = (1 + 97 * i % (OUTPUT_TOKENS - 1) for i in range(self._num_sequences))
        for wave in (NUM_GROUPS, self._num_sequences - NUM_GROUPS):
            opened = [
                self._open(i % NUM_GROUPS, num_outputs) for i, num_outputs in zip(range(wave), ages, strict=False)
            ]
            yield self.blocks.changes.take()
            for sequence in opened:
                self._log(sequence, sequence.output_token_ids)
            self.running += opened
        while (num_ended := min(self.blocks.num_free_blocks // MAX_BLOCKS, MAX_ENDED_AT_ONCE)) > 0:
            opened = [self._open(self._num_opened + NUM_GROUPS, OUTPUT_TOKENS) for _ in range(num_ended)]
            yield self.blocks.changes.take()
            for sequence in opened:  # without a log: it has expired
                self._note_caught_up(sequence)
                self._publish(sequence)
                self._end(sequence)
            yield self.blocks.changes.take()
            self._close_ended()
        yield self.blocks.changes.take()

    def step(self, num_rows: int) -> Changes:
        """One decode step of the first `num_rows` sequences: its result, and what the next plans need."""
        self._close_ended()
        batch = self.running[:num_rows]
        for sequence in batch:
            token = _token(sequence.seq_id, sequence.num_output_tokens)
            sequence.token_ids.append(token)
            self._log(sequence, [token])
            if sequence.num_output_tokens == OUTPUT_TOKENS:
                self._end(sequence)
        for i, sequence in enumerate(batch):
            if sequence.block_ids:
                self._grow(sequence)
            else:
                self.running[i] = self._open(sequence.seq_id % NUM_GROUPS, 0)
        return self.blocks.changes.take()

    def image(self) -> WorkerImage:
        """What Redis holds once every script so far is applied."""
        return WorkerImage(
            self.blocks.image(),
            {s.seq_id: SequenceRow.of(s) for s in (*self.running, *self._ended)},
            {s.seq_id: s.block_ids for s in self.running},
            {s.seq_id: s.num_computed_tokens for s in self.running if s.has_computed_record},
            {s.seq_id: s.output_token_ids for s in (*self.running, *self._ended)},
        )

    def check(self) -> None:
        """Rule 1, and that the pool is full: all its blocks are published but for the ends of tables."""
        self.blocks.check([sequence.block_ids for sequence in self.running])
        assert self.num_published_blocks > 0.9 * self.blocks.num_blocks

    @property
    def num_published_blocks(self) -> int:
        """Blocks with a hash, referenced or cached."""
        return len(self.blocks.image().hashes)

    def _open(self, group: int, num_outputs: int) -> Sequence:
        """Admits a sequence; with outputs, as if it had run elsewhere before."""
        self._num_opened += 1
        seq_id = 1 << 32 | self._num_opened  # the upper half counts schedulers
        prompt = [_token(group, i) for i in range(PREFIX_TOKENS)]
        prompt += [_token(seq_id, -i) for i in range(PREFIX_TOKENS, PROMPT_TOKENS)]
        tokens = prompt + [_token(seq_id, i) for i in range(num_outputs)]
        sequence = Sequence(seq_id, f"request-{seq_id:032x}", 0, tokens, PROMPT_TOKENS, LIMITS, ROOT)
        extend_chain(ROOT, sequence.block_hashes, tokens, BLOCK_SIZE)
        shared = self.blocks.find_prefix(sequence.block_hashes[: (len(tokens) - 1) // BLOCK_SIZE])
        sequence.num_cached_tokens = sequence.num_computed_tokens = len(shared) * BLOCK_SIZE
        sequence.num_published_blocks = len(shared)
        sequence.block_ids = self.blocks.reserve(seq_id, shared, _num_blocks(sequence) - len(shared))
        sequence.has_computed_record = True
        changes = self.blocks.changes
        changes.computed.append((seq_id, sequence.num_computed_tokens))
        changes.describe.append((seq_id, SequenceRow.of(sequence).pack()))
        return sequence

    def _log(self, sequence: Sequence, new_tokens: list[int]) -> None:
        """A result: the sequence's last tokens are new; all before the last are computed."""
        offset = sequence.num_output_tokens - len(new_tokens)
        self.blocks.changes.append.append((sequence.seq_id, offset, new_tokens))
        self._note_caught_up(sequence)
        self._publish(sequence)

    def _note_caught_up(self, sequence: Sequence) -> None:
        sequence.num_computed_tokens = len(sequence.token_ids) - 1
        if sequence.has_computed_record:
            self.blocks.changes.computed.append((sequence.seq_id, -1))
            sequence.has_computed_record = False

    def _publish(self, sequence: Sequence) -> None:
        num_full = sequence.num_computed_tokens // BLOCK_SIZE
        if num_full > sequence.num_published_blocks:
            extend_chain(ROOT, sequence.block_hashes, sequence.token_ids, BLOCK_SIZE)
            for i in range(sequence.num_published_blocks, num_full):
                self.blocks.publish(sequence.block_ids[i], sequence.block_hashes[i])
            sequence.num_published_blocks = num_full

    def _grow(self, sequence: Sequence) -> None:
        num_short = _num_blocks(sequence) - len(sequence.block_ids)
        if num_short > 0:
            sequence.block_ids += self.blocks.reserve(sequence.seq_id, (), num_short)

    def _end(self, sequence: Sequence) -> None:
        self.blocks.release(sequence.seq_id, sequence.block_ids)
        sequence.block_ids = []
        self._ended.append(sequence)

    def _close_ended(self) -> None:
        self.blocks.changes.close += [sequence.seq_id for sequence in self._ended]
        self._ended.clear()


def _num_blocks(sequence: Sequence) -> int:
    """That a table needs for the plans ahead."""
    return -(-min(len(sequence.token_ids) + 1 + LOOKAHEAD, sequence.max_num_tokens) // BLOCK_SIZE)


def _token(story: int, index: int) -> int:
    """Some id of a large vocabulary; another story's tokens differ."""
    return (story * 8191 + index * 131) % 128_000
