"""One owner of a worker's blocks, as small as it can be: its mirror, its sequences, its numbered scripts.

Decides on the mirror at once, like the engine, and notes of each script what Redis must hold once it is applied. Who
decides what is up to the machine that drives it.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import replace

from scheduler.block_hash import extend_chain, root_hash
from scheduler.block_manager import BlockManager
from scheduler.changes import Changes
from scheduler.host_pool import HostPool
from scheduler.pins import PIN_BIT, Pins
from scheduler.store import WorkerImage, WorkerStore
from scheduler.swapper import Prefix, Swap, Swapper
from tests.redis.faulty_wire import FaultyWire, Message
from tests.redis.model_state import Expected, Tracked, World, num_tables, revived
from tests.redis.worker_model import BLOCK_SIZE, Plan, Row, Story

MAX_PINNED_BLOCKS = 4


class Owner:
    """Everything one owner knows, and loses with the ownership."""

    def __init__(self, world: World, store: WorkerStore, wire: FaultyWire) -> None:
        self.world = world
        self.store = store
        self.wire = wire
        self.blocks = BlockManager(0, Changes())
        self.swapper = Swapper(self.blocks, HostPool(0), BLOCK_SIZE)
        self.pins = Pins(self.blocks, MAX_PINNED_BLOCKS)
        self.sequences: dict[int, Tracked] = {}
        self.kept_logs: dict[int, tuple[list[int], bool]] = {}
        self.in_flight: deque[Plan] = deque()
        self.resent: set[int] = set()
        self.applied_step_id = 0
        self.next_step_id = 1
        self._known: dict[int, Tracked] = {}
        self._acked_n = 0
        self._reclaimed_n = 0
        self._forked_in: dict[int, int] = {}  # copy -> number of the script that forked it
        self._issued_copies: set[int] = set()
        self._acked_swaps: list[Swap] = []

    def adopt(self, image: WorkerImage, expected: Expected, highest_step_id: int) -> None:
        """Everything from Redis; the kept logs, which nobody reads here, from the model."""
        self.blocks = BlockManager.from_image(image.pool, Changes())
        self.swapper = Swapper(self.blocks, HostPool.from_image(image.host), BLOCK_SIZE)
        self._acked_swaps = self.swapper.adopt(image.host)
        self.pins = Pins(self.blocks, MAX_PINNED_BLOCKS)
        self.pins.adopt(image.pins, image.tables)
        self._acked_n = self.store.n
        self._forked_in = dict.fromkeys(self.blocks.pending_copies, self.store.n)
        self.kept_logs = dict(expected.kept_logs)
        self.applied_step_id = expected.committed_step_id
        self.next_step_id = max(highest_step_id, self.applied_step_id) + 1
        for seq_id, row in image.rows.items():
            sequence = self._track(revived(self.world.stories[seq_id], row, image))
            if sequence.is_running:
                self.swapper.adopt_running(sequence)
                self.world.events["adopted while blocks arrive"] += sequence.num_arriving_blocks > 0
            else:
                self._lose_progress(sequence)  # its blocks were let go: what earlier plans computed in them is lost

    def _track(self, sequence: Tracked) -> Tracked:
        self.sequences[sequence.seq_id] = self._known[sequence.seq_id] = sequence
        return sequence

    # -- scripts ------------------------------------------------------------------------------------------------------

    @property
    def is_settled(self) -> bool:
        """Whether Redis has applied all that was decided, and said so."""
        return not self.wire.unanswered and not self.blocks.changes

    @property
    def has_acked_swaps(self) -> bool:
        """Whether a plan is to begin some."""
        return bool(self._acked_swaps)

    def image(self) -> WorkerImage:
        """What Redis will hold."""
        all_ = self.sequences.values()
        pins = self.pins.pinned
        return WorkerImage(
            self.blocks.image(),
            {s.seq_id: s.row() for s in all_},
            {s.seq_id: list(s.table) for s in all_ if s.table}
            | {pin_id: list(pin.block_ids) for pin_id, pin in pins.items()},
            {s.seq_id: s.num_computed for s in all_ if s.has_computed_record},
            {s.seq_id: s.outputs for s in all_},
            self.swapper.image(),
            {pin_id: pin.pack() for pin_id, pin in pins.items()},
        )

    @property
    def tables(self) -> list[Sequence[int]]:
        """Of sequences and of pins."""
        return [*(s.table for s in self.sequences.values()), *(pin.block_ids for pin in self.pins.pinned.values())]

    def commit(self) -> None:
        """One script with all that was decided since the last, where there is something."""
        changes = self.blocks.changes
        if not changes and self.world.expected[self.store.n].committed_step_id == self.applied_step_id:
            return
        self.blocks.changes = Changes()
        self.store.commit(changes, self.applied_step_id)
        swaps, self.swapper.started = self.swapper.started, []
        reserved = [seq_id for seq_id, _, _ in changes.reserve if not seq_id & PIN_BIT]
        named = [self._known[i] for i in (*reserved, *(row[1] for row in changes.fork))]
        self._expect(
            reserved=[(s, s.attempt, len(s.table)) for s in named],
            logged=[(i, self._known[i].num_outputs) for i, _, _ in changes.append],
            swaps=swaps,
        )
        self._forked_in.update({row[4]: self.store.n for row in changes.fork if row[4]})
        self.world.events["scripts"] += 1
        self.world.events["rows"] += sum(len(getattr(changes, name)) for name in Changes.__slots__)

    def _expect(self, **acknowledged: object) -> None:
        self.world.expected[self.store.n] = Expected(
            self.image(),
            self.applied_step_id,
            dict(self.kept_logs),
            **acknowledged,  # type: ignore[arg-type]
        )

    def acknowledge(self, message: Message) -> None:
        """A script was answered: its reservations may be named, its tokens delivered."""
        expected = self.world.expected[message.n]
        for sequence, attempt, num_blocks in expected.reserved:
            if sequence.attempt == attempt:
                sequence.num_acked_blocks = num_blocks
        for seq_id, num_outputs in expected.logged:
            self.world.delivered[seq_id] = max(self.world.delivered.get(seq_id, 0), num_outputs)
        if message.n > self._reclaimed_n:
            self._acked_swaps += expected.swaps
        self._acked_n = message.n

    # -- sequences ----------------------------------------------------------------------------------------------------

    def open(self, story: Story) -> Tracked:
        """A sequence arrives."""
        self.world.stories[story.seq_id] = story
        sequence = self._track(Tracked(story, len(story.prompt)))
        self._describe(sequence)
        return sequence

    def _describe(self, sequence: Tracked) -> None:
        self.blocks.changes.describe.append((sequence.seq_id, sequence.row().pack()))

    def chain(self, story: Story, num_tokens: int) -> list[bytes]:
        """The hashes of a sequence's full blocks; asserts that no two contents have one."""
        hashes: list[bytes] = []
        tokens = story.tokens(num_tokens)
        extend_chain(root_hash("model", "float32", "", story.salt), hashes, tokens, BLOCK_SIZE)
        for i, hash_ in enumerate(hashes, start=1):
            content = (story.salt, tokens[: i * BLOCK_SIZE])
            assert self.world.contents.setdefault(hash_, content) == content, "two contents, one hash"
        return hashes

    def admit(self, sequence: Tracked, lookahead: int) -> Prefix | None:
        """Look-up and reservation in one go; returns what it found, or None where it does not fit."""
        hashes = self.chain(sequence.story, sequence.num_tokens)
        found = self.swapper.find_prefix(hashes[: (sequence.num_tokens - 1) // BLOCK_SIZE])
        shared = found.shared
        num_blocks = -(-(sequence.num_tokens + lookahead) // BLOCK_SIZE)
        if num_blocks - len(shared) > self.blocks.num_available_blocks - self.blocks.num_cached_among(shared):
            return None
        if sequence.attempt == 0:
            self.blocks.touch(hashes)
            self.swapper.host.touch(hashes)
        num_new = num_blocks - len(shared)
        self.world.events["evictions"] += max(0, num_new - self.blocks.num_free_blocks)
        self.world.events["hits"] += len(shared)
        self.world.events["hits on the host"] += len(found) - len(shared)
        sequence.table = self.swapper.reserve(sequence, found, num_blocks - len(found))
        self._start(sequence, len(found) * BLOCK_SIZE, len(found))
        return found

    def _start(self, sequence: Tracked, num_computed: int, num_published: int) -> None:
        sequence.num_computed = sequence.num_planned = num_computed
        sequence.num_published = num_published
        sequence.is_running = sequence.has_computed_record = True
        self.blocks.changes.computed.append((sequence.seq_id, num_computed))

    def grow(self, sequence: Tracked, num_new: int) -> None:
        """Fresh blocks to the end of a table."""
        self.world.events["evictions"] += max(0, num_new - self.blocks.num_free_blocks)
        sequence.table = [*sequence.table, *self.blocks.reserve(sequence.seq_id, [], num_new)]

    def send_out(self, block_id: int) -> None:
        """A published block is copied to the host."""
        self.world.events["contents that the host lost"] += not self.swapper.host.num_free_blocks
        self.swapper.begin_out(block_id)

    def finish_swap(self, swap: Swap) -> None:
        """The worker has reported one."""
        if self.blocks.changes.reserve or self.blocks.changes.fork or self.blocks.changes.swap_out:
            self.commit()  # ends are applied before them
        self.swapper.finish([swap.host_block_id] if swap.is_out else [], [] if swap.is_out else [swap.block_id])

    def fork(self, parent: Tracked, child_id: int) -> bool:
        """A second sequence goes on from where the first is; False where there is no block for the copy."""
        num_full, num_tail = divmod(parent.num_computed, BLOCK_SIZE)
        if num_tail and not self.blocks.num_available_blocks:
            return False
        if self.blocks.changes.reserve:
            self.commit()  # forks are applied before reservations
        child = self.open(Story(child_id, parent.story.salt, parent.story.tokens(parent.num_tokens)))
        tail = (parent.table[num_full], num_tail) if num_tail else None
        child.table = self.blocks.fork(parent.seq_id, child_id, parent.table[:num_full], tail)
        self._start(child, parent.num_computed, min(parent.num_published, num_full))
        self.world.events["copies"] += tail is not None
        return True

    def branch(self, parent: Tracked, child: Tracked) -> None:
        """A beam gives up what it has, and goes on from where another one is: in one script, where there was none."""
        self.swapper.give_up(child)
        self._release(child)
        self._lose_progress(child)
        child.story = Story(child.seq_id, parent.story.salt, parent.story.tokens(parent.num_tokens))
        self.world.stories[child.seq_id] = child.story
        child.num_tokens = parent.num_tokens
        num_full, num_tail = divmod(parent.num_computed, BLOCK_SIZE)
        tail = (parent.table[num_full], num_tail) if num_tail else None
        child.table = self.blocks.fork(parent.seq_id, child.seq_id, parent.table[:num_full], tail)
        child.num_computed = child.num_planned = parent.num_computed
        child.num_published = min(parent.num_published, num_full)
        child.is_running = True  # and has caught up, as its parent has: there is no record of that

    def pin(self, sequence: Tracked, now_s: float) -> None:
        """What of a sequence is full and published stays, for a while."""
        sequence.block_hashes = self.chain(sequence.story, sequence.num_computed)
        self.pins.promise(sequence, len(sequence.block_hashes))
        self.pins.pin(sequence, len(sequence.block_hashes), now_s)

    def _release(self, sequence: Tracked) -> None:
        changes = self.blocks.changes
        forked = {seq_id for row in changes.fork for seq_id in row[:2]}
        if sequence.seq_id in forked or any(row[0] == sequence.seq_id for row in changes.reserve):
            self.commit()  # releases are applied before forks and reservations
        if sequence.table:
            self.blocks.release(sequence.seq_id, sequence.table)
        sequence.table = []
        sequence.is_running = sequence.has_computed_record = False

    def preempt(self, sequence: Tracked) -> None:
        """Its blocks go, whatever plans name them; its tokens stay, and so does what the host has of it."""
        self.world.events["preemptions while blocks arrive"] += sequence.num_arriving_blocks > 0
        sequence.block_hashes = self.chain(sequence.story, sequence.num_computed)
        self.swapper.set_aside(sequence)
        self._release(sequence)
        self._lose_progress(sequence)

    def _lose_progress(self, sequence: Tracked) -> None:
        sequence.attempt += 1
        sequence.is_running = sequence.has_computed_record = False
        sequence.table = []
        sequence.num_acked_blocks = sequence.num_computed = sequence.num_planned = 0
        sequence.num_planned_samples = sequence.num_published = sequence.num_arriving_blocks = 0
        self._describe(sequence)

    def finish(self, sequence: Tracked) -> None:
        """It is over; its row goes later."""
        self.swapper.give_up(sequence)
        self._release(sequence)
        sequence.is_finished = True

    def drop_row(self, sequence: Tracked, *, expires: bool) -> None:
        """Closes an ended sequence, or forgets one that lives on elsewhere."""
        changes = self.blocks.changes
        (changes.close if expires else changes.forget).append(sequence.seq_id)
        self.swapper.give_up(sequence)
        del self.sequences[sequence.seq_id]
        if sequence.num_outputs:
            self.kept_logs[sequence.seq_id] = (sequence.outputs, expires)

    def reclaim(self, incarnation: str, num_blocks: int, num_host_blocks: int) -> None:
        """The worker died: empty pools, and everything that ran waits again, in a second script."""
        self.commit()
        self.store.reclaim(incarnation, num_blocks, num_host_blocks)
        self.in_flight.clear()
        self.resent.clear()
        self.applied_step_id, self.next_step_id = 0, 1
        self._forked_in.clear()
        self._issued_copies.clear()
        self._acked_swaps.clear()
        self._reclaimed_n = self.store.n
        self.blocks = BlockManager(num_blocks, Changes())
        self.swapper = Swapper(self.blocks, HostPool(num_host_blocks), BLOCK_SIZE)
        self.pins = Pins(self.blocks, MAX_PINNED_BLOCKS)
        lost = [s for s in self.sequences.values() if s.is_running]
        image = replace(self.image(), tables={}, computed={}, pins={})
        self.world.expected[self.store.n] = Expected(image, 0, dict(self.kept_logs))
        for sequence in lost:
            self._lose_progress(sequence)
        for sequence in self.sequences.values():
            sequence.num_in_flight = 0
        self.commit()

    # -- steps --------------------------------------------------------------------------------------------------------

    def plan(self, num_tokens: int, skipped: int) -> Plan | None:
        """The next step: up to so many tokens of each running sequence that `skipped`, a set of bits, leaves in."""
        rows: list[Row] = []
        for i, sequence in enumerate(s for s in self.sequences.values() if s.num_plannable > 0):
            if not skipped >> i & 1:
                rows.append(self._row(sequence, sequence.num_planned + min(num_tokens, sequence.num_plannable)))
        pending = self.blocks.pending_copies
        acked = {copy for copy, n in self._forked_in.items() if n <= self._acked_n}
        ready = sorted(acked - self._issued_copies)
        swaps, self._acked_swaps = tuple(self._acked_swaps), []
        if not rows and not ready and not swaps:
            return None
        self._issued_copies.update(ready)
        plan = Plan(
            self.next_step_id, self.store.epoch, tuple((copy, *pending[copy]) for copy in ready), tuple(rows), swaps
        )
        self.next_step_id += 1
        self.in_flight.append(plan)
        return plan

    def _row(self, sequence: Tracked, end: int) -> Row:
        first, sequence.num_planned = sequence.num_planned, end
        samples = end == sequence.num_tokens + sequence.num_planned_samples
        sequence.num_planned_samples += samples
        sequence.num_in_flight += 1
        block_ids = tuple(sequence.table[: sequence.num_acked_blocks])
        for block_id in block_ids[first // BLOCK_SIZE : -(-end // BLOCK_SIZE)]:
            assert num_tables(self.blocks.image(), block_id) == 1, "a plan writes to a shared block"
            assert not self.is_published(block_id), "a plan writes to a published block"
        return Row(sequence.story, sequence.attempt, block_ids, first, end - first, samples)

    def is_published(self, block_id: int) -> bool:
        """Whether a block is read-only to all."""
        return block_id in self.blocks.image().hashes

    def apply(self, plan: Plan) -> None:
        """The result of a step: counted once, tokens logged, filled blocks published."""
        if self.blocks.changes.reserve or self.blocks.changes.fork:
            self.commit()  # publishing is applied before them, and one of them may have evicted that very hash
        is_resent = plan.step_id in self.resent
        if is_resent:
            self.resent.discard(plan.step_id)
        else:
            assert self.in_flight.popleft() is plan
            copied = [copy for copy, _, _ in plan.copies]
            self.blocks.finish_copies(copied)
            self._issued_copies -= set(copied)
            for copy in copied:
                del self._forked_in[copy]
        self.applied_step_id = plan.step_id
        for row in plan.rows:
            sequence = self.sequences.get(row.story.seq_id)
            if sequence is None or sequence.is_finished:
                self.world.events["rows of ended sequences"] += 1
                continue
            sequence.num_in_flight -= not is_resent
            self._apply_row(sequence, row, is_resent)

    def _apply_row(self, sequence: Tracked, row: Row, is_resent: bool) -> None:
        if sequence.attempt != row.attempt:
            self.world.events["rows of an earlier attempt"] += 1
        elif row.num_computed > sequence.num_computed:
            sequence.num_computed = row.num_computed
            if is_resent:
                sequence.num_planned = row.num_computed
            else:
                sequence.num_planned_samples -= row.samples
            sequence.has_computed_record = not row.samples
            record = -1 if row.samples else row.num_computed
            self.blocks.changes.computed.append((sequence.seq_id, record))
        if row.samples and row.first_output_index > sequence.num_outputs:
            # the earlier owner had ended it, dropped a token, and died before it recorded the end
            assert is_resent, "a token without the one before it"
            assert not sequence.is_running
        elif row.samples and row.first_output_index == sequence.num_outputs:
            token = row.story.output(row.first_output_index)
            self.blocks.changes.append.append((sequence.seq_id, row.first_output_index, [token]))
            sequence.num_tokens += 1
        hashes = self.chain(sequence.story, sequence.num_tokens)
        num_full = sequence.num_computed // BLOCK_SIZE
        for i in range(sequence.num_published, num_full):
            if not self.blocks.publish(sequence.table[i], hashes[i]):
                self.world.events["blocks of duplicate content"] += 1
        sequence.num_published = max(sequence.num_published, num_full)
