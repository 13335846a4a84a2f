"""Decides, step by step, which sequences run, with which blocks: queues and free counts in, decisions out.

Pure: no I/O, no clock. Running sequences come first, then waiting ones. When blocks run out, cached ones are evicted
(by the block manager), then running sequences are preempted, the last by priority and arrival first.
"""

from dataclasses import dataclass

from scheduler.admitter import Admitter, Fit, PlannerLimits
from scheduler.block_hash import extend_chain
from scheduler.block_manager import BlockManager
from scheduler.forks import Forks
from scheduler.history import PoolHistory
from scheduler.pins import Pins
from scheduler.sequence import Sequence, SequenceStatus
from scheduler.step_rows import ScheduledRow, StepRows
from scheduler.swap_ahead import SwapAhead
from scheduler.worker_choice import Outlook


@dataclass(slots=True)
class PlannerCounters:
    """Since the planner began."""

    num_prefix_query_tokens: int = 0
    num_prefix_hit_tokens: int = 0
    """On the device, or on the host."""
    num_host_hit_tokens: int = 0
    """Of those, the ones on the host."""
    num_preemptions: int = 0


class Planner:
    """Owns the order of one worker's sequences."""

    def __init__(
        self,
        limits: PlannerLimits,
        blocks: BlockManager,
        swap_ahead: SwapAhead | None = None,
        pins: Pins | None = None,
    ) -> None:
        """Without `swap_ahead` there is no host pool, without `pins` nothing is pinned."""
        self.limits = limits
        self.blocks = blocks
        self.swap_ahead = SwapAhead.without_host(blocks, limits.block_size) if swap_ahead is None else swap_ahead
        self.swapper = self.swap_ahead.swapper
        self.pins = Pins(blocks, 0) if pins is None else pins
        self.running: list[Sequence] = []
        self.counters = PlannerCounters()
        self.history = PoolHistory(limits.block_size)
        self.removed: list[int] = []
        """Sequences that the worker is to forget with the next plan."""
        self.redescribed: list[Sequence] = []
        """Sequences whose row in Redis is to be written anew: admitted for the first time, or preempted."""
        self.reserved: list[Sequence] = []
        """Sequences that got blocks; plans may not name these before Redis has acknowledged them."""
        self.forks = Forks(blocks, limits.block_size)
        self._unsettled: list[Sequence] = []  # of an earlier owner, with blocks of which nothing may be computed yet
        self._admitter = Admitter(limits, blocks, self.swapper, self.forks)
        self._step_rows = StepRows(limits, blocks, self.forks, self._admitter)
        self.waiting = self._admitter.waiting
        self.lengths = self._admitter.lengths

    # -- what happens to sequences ------------------------------------------------------------------------------------

    def enqueue(self, sequence: Sequence, leader: Sequence | None = None) -> None:
        """A sequence wants to run; with a leader, one of the same prompt, as soon as that has computed it."""
        self._promise_pin(sequence)
        if leader is not None and leader.status is not SequenceStatus.FINISHED and not leader.num_output_tokens:
            self.forks.follow(leader, sequence)
        else:
            self._admitter.queue(sequence)

    def expect(self, sequence: Sequence) -> None:
        """This worker is chosen for a sequence that is not here yet: whoever is to choose next counts on it."""
        self._admitter.expect(sequence)

    def expect_no_more(self, sequence: Sequence) -> None:
        """The sequence is here, or will never be."""
        self._admitter.expect_no_more(sequence)

    def adopt_running(self, sequence: Sequence) -> None:
        """A sequence of an earlier owner that holds its blocks already."""
        self._promise_pin(sequence)
        self.running.append(sequence)
        self.swapper.adopt_running(sequence)
        self._admitter.claim_prefix(sequence)
        if not sequence.num_computed_tokens:
            self._unsettled.append(sequence)

    def settle(self) -> None:
        """All plans of an earlier owner have reported: now it is known who of its sequences has to begin anew.

        The blocks of a fork whose first token has not come may be those of a prompt that was never finished.
        """
        for sequence in self._unsettled:
            if sequence.status is SequenceStatus.RUNNING and not sequence.num_computed_tokens:
                self.running.remove(sequence)
                self._set_back(sequence)
        self._unsettled.clear()
        for follower in self.forks.past_prompt():
            self._admitter.queue(follower)

    def branch(self, parent: Sequence, child: Sequence, token_ids: list[int]) -> None:
        """A beam gives up what it has, for `token_ids`: what its parent has computed, and one token more."""
        if child.leader is not None:
            self.forks.leave(child)
        elif child.status is SequenceStatus.RUNNING:
            self.running.remove(child)
            self._give_back(child)
        else:
            self._dismiss(child)
        child.forget_progress()
        child.token_ids = token_ids
        child.block_hashes = parent.block_hashes[: parent.num_computed_tokens // self.limits.block_size]
        self.forks.go_on(parent, child, len(token_ids) - 1)

    def finish(self, sequence: Sequence) -> None:
        """A sequence has ended, wherever it stands; its blocks are free from the next plan on."""
        if sequence.status is SequenceStatus.RUNNING:
            self.running.remove(sequence)
            self._give_back(sequence)
        elif sequence.leader is not None:
            self.forks.leave(sequence)
        elif sequence.status is not SequenceStatus.FINISHED:
            self._dismiss(sequence)
        for follower in self.forks.followers_of(sequence):
            self.forks.leave(follower)
            self._admitter.queue(follower)
        sequence.status = SequenceStatus.FINISHED
        self.pins.take_back(sequence)
        self.waiting.charge(sequence.tenant, sequence.num_output_tokens)

    def publish_computed(self, sequence: Sequence) -> None:
        """Enters the blocks that the sequence's confirmed progress has filled into the prefix index."""
        block_size = self.limits.block_size
        # A plan of several steps may have run on behind the sequence's end.
        num_full = min(sequence.num_computed_tokens, len(sequence.token_ids)) // block_size
        if num_full > sequence.num_published_blocks:
            extend_chain(sequence.root_hash, sequence.block_hashes, sequence.token_ids, block_size)
            for i in range(sequence.num_published_blocks, num_full):
                hash_ = sequence.block_hashes[i]
                self.blocks.publish(sequence.block_ids[i], hash_)
                self._admitter.drop_claim(sequence, hash_)
            sequence.num_published_blocks = num_full
        if sequence.pin_s and sequence.num_computed_tokens >= sequence.num_prompt_tokens:
            self.pins.pin(sequence, sequence.num_prompt_tokens // block_size, self.history.now_s)
            sequence.pin_s = 0.0

    # -- one step -----------------------------------------------------------------------------------------------------

    def grow_and_admit(self, lookahead: int, num_steps: int = 1) -> None:
        """Reserves blocks for what runs during the next `lookahead` steps, then admits what fits beside it.

        Where nobody waits and there is room, for `num_steps` times as many: so many may be planned as one.
        """
        has_room = (not self.num_waiting and self._try_grow(lookahead * num_steps)) or self._grow_running(lookahead)
        for child, is_forked in self.forks.carry_out(self.running, self.limits.max_num_seqs):
            if is_forked:
                self.running.append(child)
                self.reserved.append(child)
                self.redescribed.append(child)
                self.history.note_evictions(self.blocks.evicted_hashes, child.request_id)
            else:
                self._set_back(child)
        if has_room:
            self._admit_waiting(lookahead)
        while self._is_entangled():
            self._preempt(max(self.running, key=lambda s: (s.priority, s.seq_id)))
            self._admit_waiting(lookahead)
        while self._is_blocked() and self.pins.give_way():
            self._admit_waiting(lookahead)
        self.swap_ahead.send_out(self.running, lookahead)

    def num_steps_alike(self, most: int) -> int:
        """How many steps, `most` at most, may be planned as one: while somebody waits to join them, one."""
        return 1 if self.num_waiting else self._step_rows.num_alike(self.running, most)

    def schedule(self, num_steps: int = 1) -> list[ScheduledRow]:
        """The next step, or as many alike."""
        return self._step_rows.share_out(self.running, num_steps)

    @property
    def num_running_requests(self) -> int:
        """Requests of which some choice runs."""
        return len({sequence.request_id for sequence in self.running})

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for admission, or for the prompt of another."""
        return len(self.waiting) + self.forks.num_waiting

    def outlook(self, sequence: Sequence) -> Outlook:
        """What a sequence that is not here would find, for the choice of a worker."""
        return self._admitter.outlook(sequence.block_hashes, self.running)

    # -- inside -------------------------------------------------------------------------------------------------------

    def _grow_running(self, lookahead: int) -> bool:
        """Returns whether there was no shortage: admitting into a shortage would undo a preemption."""
        if self._try_grow(lookahead):
            return True
        if self._try_grow(0):
            return False
        while not self._try_grow(0):
            self._preempt(max(self.running, key=lambda s: (s.priority, s.seq_id)))
        return False

    def _try_grow(self, lookahead: int) -> bool:
        """Reserves for every running sequence, or, where that is too much, for none."""
        block_size = self.limits.block_size
        needs = [(s, num_short) for s in self.running if (num_short := s.num_blocks_short(lookahead, block_size))]
        if sum([num_short for _, num_short in needs]) > self.blocks.num_available_blocks:
            return False
        for sequence, num_short in needs:
            self._note_reserved(sequence, self.blocks.reserve(sequence.seq_id, [], num_short))
        return True

    def _note_reserved(self, sequence: Sequence, block_ids: list[int]) -> None:
        sequence.block_ids += block_ids
        self.reserved.append(sequence)
        self.history.note_evictions(self.blocks.evicted_hashes, sequence.request_id)

    def _preempt(self, sequence: Sequence) -> None:
        """The sequence waits again, its blocks are free; published ones stay as hits while they last."""
        self.running.remove(sequence)
        self.swap_ahead.set_aside(sequence)
        self._set_back(sequence)
        sequence.num_preemptions += 1
        self.counters.num_preemptions += 1

    def _is_entangled(self) -> bool:
        """Whether all that run are beams that wait for one that has no room: then the youngest must give up its own."""
        if not self.waiting or any(s.num_plans_in_flight or s.num_unplanned_tokens > 0 for s in self.running):
            return False
        return bool(self.running) and any(not s.awaits_choice for s in self.waiting)

    def _is_blocked(self) -> bool:
        """Whether nothing runs and nothing moves, so that whoever waits waits for pins."""
        if self.running or not self.waiting or self.forks.num_begun or self.swapper.held_block_ids:
            return False
        return not any(sequence.num_plans_in_flight for sequence in self.waiting)

    def _promise_pin(self, sequence: Sequence) -> None:
        if sequence.pin_s:
            self.pins.promise(sequence, sequence.num_prompt_tokens // self.limits.block_size)

    def _dismiss(self, sequence: Sequence) -> None:
        """It waits no longer, and does not come back for what was swapped out."""
        self._admitter.unqueue(sequence)
        self.swapper.give_up(sequence)

    def _set_back(self, sequence: Sequence) -> None:
        self._give_back(sequence)
        sequence.forget_progress()
        sequence.status = SequenceStatus.PREEMPTED
        self.redescribed.append(sequence)
        self._admitter.queue(sequence)

    def _give_back(self, sequence: Sequence) -> None:
        if sequence.block_ids:
            self.blocks.release(sequence.seq_id, sequence.block_ids)
            sequence.block_ids = []
        if sequence.is_on_worker:
            self.removed.append(sequence.seq_id)
            sequence.is_on_worker = False
        self._admitter.drop_claims(sequence)

    def _admit_waiting(self, lookahead: int) -> None:
        for fit in self._admitter.fitting(self.running, lookahead):
            self._admit(fit)

    def _admit(self, fit: Fit) -> None:
        sequence, found, num_new = fit
        self._admitter.unqueue(sequence)
        block_size = self.limits.block_size
        num_cached = len(found) * block_size
        if sequence.num_cached_tokens is None:
            sequence.num_cached_tokens = min(num_cached, sequence.num_prompt_tokens)
            self.redescribed.append(sequence)
        self.counters.num_prefix_query_tokens += len(sequence.token_ids)
        self.counters.num_prefix_hit_tokens += num_cached
        self.counters.num_host_hit_tokens += len(found.host_block_ids) * block_size
        self.waiting.charge(sequence.tenant, len(sequence.token_ids) - num_cached)
        if sequence.attempt == sequence.choice == 0:  # else its request has asked for it before
            usable = self._admitter.usable_hashes(sequence)
            self.blocks.touch(usable)
            self.swapper.host.touch(usable)
        self.history.note_admission(sequence, found.block_ids)
        self._note_reserved(sequence, self.swapper.reserve(sequence, found, num_new))
        sequence.num_published_blocks = len(found)  # those from the host as soon as they are there
        sequence.num_computed_tokens = sequence.num_planned_tokens = num_cached
        self.blocks.changes.computed.append((sequence.seq_id, num_cached))
        sequence.has_computed_record = True
        sequence.status = SequenceStatus.RUNNING
        self.running.append(sequence)
        self._admitter.claim_prefix(sequence)
