"""One worker's planner from arrivals to ends, without Redis and without a network, in rounds.

Planner, block manager, results and plans are the real ones; Redis is a delay until a script is acknowledged, and the
worker a physical pool in which every slot says what is written in it. A round is what the engine does when it wakes,
and what the worker does meanwhile: one plan. Every round asserts what must always hold.
"""

import random
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import cast

from pagoda.v1 import worker_pb2 as pb

from scheduler.admitter import PlannerLimits
from scheduler.beam_search import BeamParams, BeamSearch, EarlyStopping
from scheduler.block_hash import root_hash
from scheduler.block_manager import BlockCopy, BlockManager
from scheduler.changes import Changes
from scheduler.committer import Committer
from scheduler.float_bits import to_float32
from scheduler.host_pool import HostPool
from scheduler.live_request import Ending, LiveChoice, LiveRequest
from scheduler.pins import Pins
from scheduler.planner import Planner
from scheduler.request import RequestBody
from scheduler.results import Results, Step
from scheduler.sequence import FinishReason, Sequence, SequenceLimits, SequenceStatus
from scheduler.step_rows import ScheduledRow
from scheduler.swap_ahead import Preemption, SwapAhead, SwapCosts
from scheduler.swapper import Swap, Swapper
from scheduler.wire import StepNumbers, StepWork, build_plan

END = 0
"""The end-of-sequence token; no prompt holds it."""
CANCELLED = Ending(FinishReason.ABORT)


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request as its client makes it. Rounds count from 0."""

    prompt: tuple[int, ...]
    max_tokens: int
    stops_after: int = 10**9
    """Output tokens before the model would end by itself."""
    round: int = 0
    cancel_round: int | None = None
    priority: int = 0
    tenant: str = ""
    salt: str = ""
    ignores_eos: bool = False
    n: int = 1
    beam_width: int = 0
    """0: its tokens are those that the model says."""
    pin_rounds: float = 0.0
    """For how long its prompt is to be pinned."""

    @property
    def num_sequences(self) -> int:
        """Choices, or beams."""
        return max(self.n, self.beam_width)


@dataclass(frozen=True, slots=True)
class SimLimits:
    """What the worker can run, and how far Redis is away."""

    num_blocks: int
    block_size: int = 4
    max_num_seqs: int = 8
    max_num_batched_tokens: int = 16
    overcommit: float = 1.0
    lookahead: int = 2
    ack_rounds: int = 1
    """Rounds from a script to its answer; 0: before the next round begins."""
    plans_ahead: int = 1
    """Plans that wait behind the one that runs."""
    steps_per_plan: int = 1
    """Steps that may be planned as one."""
    num_host_blocks: int = 0
    preemption: Preemption = Preemption.SWAP
    swap_rounds: int = 2
    """Rounds that the worker takes for swaps."""
    max_pinned_blocks: int = 0


@dataclass(slots=True)
class _Held:
    """What the worker knows of a sequence."""

    attempt: int
    tokens: list[int]
    num_prompt_tokens: int
    num_computed: int
    block_ids: list[int]
    salt: str
    num_candidates: int


@dataclass(slots=True)
class SimWorker:
    """Runs plans in order. Reads only what is written, writes only what nobody else reads."""

    block_size: int
    next_token: Callable[[int, int], int]
    """(seq_id, output index) -> the token: sampling is reproducible."""
    salts: dict[int, str] = field(default_factory=dict)
    prefixes: dict[tuple[int, int], list[int]] = field(default_factory=dict)
    """(step_id, seq_id) of who is added -> the tokens before those that are sent: for checks alone."""
    pool: dict[int, list[int | None]] = field(default_factory=dict)
    held: dict[int, _Held] = field(default_factory=dict)
    host: dict[int, list[int | None]] = field(default_factory=dict)
    swaps: deque[Swap] = field(default_factory=deque)
    """Begun, and done later, in their order."""
    last_step_id: int = 0

    def run(self, plan: pb.StepPlan) -> pb.StepResult:
        """The result of the next plan."""
        assert plan.step_id == self.last_step_id + 1
        self.last_step_id = plan.step_id
        for block_id in plan.freed_block_ids:
            self.pool[block_id] = [None] * self.block_size
        for seq_id in plan.removed_seq_ids:
            del self.held[seq_id]
        for added in plan.added:
            assert added.seq_id not in self.held, "added twice"
            self.held[added.seq_id] = _Held(
                added.attempt,
                [*self.prefixes.pop((plan.step_id, added.seq_id)), *added.token_ids],
                added.num_prompt_tokens,
                added.num_computed_tokens,
                list(added.block_ids),
                self.salts[added.seq_id],
                added.sampler.num_candidates,
            )
        for seq_id, token_id in zip(plan.replaced_seq_ids, plan.replaced_token_ids, strict=True):
            self.held[seq_id].tokens[-1] = token_id
        at = 0
        for seq_id, count in zip(plan.appended_seq_ids, plan.appended_num_blocks, strict=True):
            self.held[seq_id].block_ids += plan.appended_block_ids[at : at + count]
            at += count
        copies = (plan.copy_src_block_ids, plan.copy_dst_block_ids, plan.copy_num_tokens)
        for source, copy, count in zip(*copies, strict=True):
            self.pool[copy] = [*self.pool[source][:count], *[None] * (self.block_size - count)]
        self.swaps += [Swap(True, *out) for out in zip(plan.out_block_ids, plan.out_host_block_ids, strict=True)]
        self.swaps += [Swap(False, *in_) for in_ in zip(plan.in_block_ids, plan.in_host_block_ids, strict=True)]
        result = pb.StepResult(epoch=plan.epoch, step_id=plan.step_id)
        assert max(plan.num_scheduled_tokens, default=0) >= plan.num_steps or plan.num_steps == 1, "steps of nobody"
        parent, num_left = 0, plan.num_steps
        for seq_id, count in zip(plan.scheduled_seq_ids, plan.num_scheduled_tokens, strict=True):
            if plan.num_steps > 1:
                assert 0 < count <= num_left, "who takes fewer steps comes first"
                num_left = count
                self._run_steps(seq_id, count, result)
            elif count:
                parent = seq_id
                self._run_row(seq_id, count, result)
            else:
                self._fork_row(parent, seq_id, result)
        return result

    def swap(self, count: int) -> list[Swap]:
        """Does the oldest swaps that have begun, at the last moment."""
        done = [self.swaps.popleft() for _ in range(min(count, len(self.swaps)))]
        for swap in done:
            if swap.is_out:
                assert None not in self.pool[swap.block_id], "what nobody has written goes out"
                self.host[swap.host_block_id] = list(self.pool[swap.block_id])
            else:
                self.pool[swap.block_id] = list(self.host[swap.host_block_id])
        return done

    def _fork_row(self, parent_id: int, seq_id: int, result: pb.StepResult) -> None:
        parent, held = self.held[parent_id], self.held[seq_id]
        assert held.tokens == parent.tokens[:-1], "a fork of another prompt, or of one that is not done"
        assert held.num_computed == len(held.tokens)
        assert not held.block_ids
        self._report(seq_id, held, held.num_computed, result)

    def _run_row(self, seq_id: int, count: int, result: pb.StepResult) -> None:
        held = self.held[seq_id]
        end = held.num_computed + count
        assert len(set(held.block_ids)) == len(held.block_ids), "a block twice in one table"
        assert end <= len(held.tokens), "scheduled beyond the tokens that there are"
        assert end <= len(held.block_ids) * self.block_size, "scheduled beyond its blocks"
        content = hash((held.salt, "root"))
        for position, token in enumerate(held.tokens[:end]):
            content = hash((content, token))
            slots = self.pool.setdefault(held.block_ids[position // self.block_size], [None] * self.block_size)
            if position >= held.num_computed:
                slots[position % self.block_size] = content
            assert slots[position % self.block_size] == content, f"{seq_id} reads what is not its own at {position}"
        held.num_computed = end
        self._report(seq_id, held, end, result)

    def _run_steps(self, seq_id: int, num_steps: int, result: pb.StepResult) -> None:
        """One token in each; what they report is one row."""
        assert not self.held[seq_id].num_candidates, "a beam runs on before its search has chosen"
        steps = pb.StepResult()
        for _ in range(num_steps):
            self._run_row(seq_id, 1, steps)
        assert list(steps.num_tokens) == [1] * num_steps
        result.seq_ids.append(seq_id)
        result.attempts.append(steps.attempts[-1])
        result.num_computed_tokens.append(steps.num_computed_tokens[-1])
        result.first_output_indexes.append(steps.first_output_indexes[0])
        result.num_tokens.append(num_steps)
        result.token_ids.extend(steps.token_ids)

    def _report(self, seq_id: int, held: _Held, end: int, result: pb.StepResult) -> None:
        output_index = len(held.tokens) - held.num_prompt_tokens
        samples = end == len(held.tokens)
        if samples:
            for token_id, logprob in likeliest(held.tokens, held.num_candidates):
                result.candidate_token_ids.append(token_id)
                result.candidate_logprobs.append(logprob)
            held.tokens.append(self.next_token(seq_id, output_index))
            result.token_ids.append(held.tokens[-1])
        result.seq_ids.append(seq_id)
        result.attempts.append(held.attempt)
        result.num_computed_tokens.append(end)
        result.first_output_indexes.append(output_index)
        result.num_tokens.append(int(samples))


def likeliest(token_ids: list[int], count: int) -> list[tuple[int, float]]:
    """What the model says comes after these tokens, best first, to beams: (token id, log probability)."""
    rng = random.Random(str(token_ids))
    logprobs = sorted((to_float32(-rng.expovariate(1)) for _ in range(count)), reverse=True)
    return list(zip(rng.sample(range(40), count), logprobs, strict=True))


@dataclass(frozen=True, slots=True)
class _Script:
    """What is so once it is answered."""

    answer_round: int
    reserved: list[tuple[Sequence, int, int]]
    copies: list[BlockCopy]
    swaps: list[Swap]


class SimCommitter:
    """Has the face of a Committer that Results needs; scripts are answered some rounds later."""

    def __init__(self, changes: Changes) -> None:
        self.changes = changes
        self.logs: dict[int, list[int]] = {}
        self.ended: list[LiveChoice] = []
        self.acked_copies: list[BlockCopy] = []
        self.acked_swaps: list[Swap] = []
        self._in_flight: deque[_Script] = deque()

    def log_tokens(self, live: LiveChoice, first_index: int, token_ids: list[int]) -> None:
        """Appends to the log, which is contiguous."""
        log = self.logs.setdefault(live.sequence.seq_id, [])
        assert first_index == len(log)
        log += token_ids
        self.changes.append.append((live.sequence.seq_id, first_index, token_ids))

    def log_search(self, live: LiveRequest, words: list[int]) -> None:
        """Appends to the log of the search, from which it can be made again."""
        assert live.search is not None
        log = self.logs.setdefault(live.choices[0].sequence.seq_id, [])
        log += words
        assert BeamSearch.replay(live.search.params, log) == live.search

    def deliver(self, choice: LiveChoice) -> None:
        """A hypothesis is one choice's output."""

    def note_computed(self, sequence: Sequence, has_caught_up: bool) -> None:
        """As the real one."""
        sequence.has_computed_record = not has_caught_up

    def end(self, live: LiveChoice) -> None:
        """A sequence is over."""
        self.ended.append(live)

    def send(self, planner: Planner, answer_round: int) -> Changes:
        """The next script, with all that the planner has to tell."""
        named = [(s, s.attempt, len(s.block_ids)) for s in planner.reserved]
        self._in_flight.append(_Script(answer_round, named, list(planner.forks.copies), list(planner.swapper.started)))
        for told in (planner.reserved, planner.redescribed, planner.forks.copies, planner.swapper.started):
            told.clear()
        return self.changes.take()

    def answer(self, now: int) -> None:
        """Everything whose answer is due."""
        while self._in_flight and self._in_flight[0].answer_round <= now:
            script = self._in_flight.popleft()
            self.acked_copies += script.copies
            self.acked_swaps += script.swaps
            for sequence, attempt, num_blocks in script.reserved:
                if sequence.attempt == attempt:
                    sequence.num_acked_blocks = num_blocks


@dataclass(slots=True)
class Round:
    """What one round decided, for tests that look at the order of things and for transcripts."""

    number: int
    results: list[tuple[pb.StepResult, Step]]
    plans: list[tuple[pb.StepPlan, list[ScheduledRow]]]
    changes: Changes


class Simulation:
    """Runs arrivals to their ends."""

    def __init__(self, limits: SimLimits, arrivals: Iterable[Arrival]) -> None:
        self.limits = limits
        self.blocks = BlockManager(limits.num_blocks, Changes())
        planner_limits = PlannerLimits(
            limits.block_size, limits.max_num_seqs, limits.max_num_batched_tokens, limits.overcommit
        )
        swapper = Swapper(self.blocks, HostPool(limits.num_host_blocks), limits.block_size)
        costs = SwapCosts(block_bytes=1, bytes_per_s=2.0 / limits.block_size, s_per_token=1.0, step_s=1.0)
        swap_ahead = SwapAhead(self.blocks, swapper, limits.preemption, costs)
        self.planner = Planner(planner_limits, self.blocks, swap_ahead, Pins(self.blocks, limits.max_pinned_blocks))
        self.committer = SimCommitter(self.blocks.changes)
        self.live: dict[int, LiveChoice] = {}
        self.results = Results(self.planner, cast(Committer, self.committer), self.live)
        self.arrivals = list(arrivals)
        firsts = accumulate((arrival.num_sequences for arrival in self.arrivals), initial=1)
        self.first_seq_ids = list(firsts)
        """Of each arrival; in the end, the one after the last."""
        self.worker = SimWorker(limits.block_size, self.next_token)
        self.round_number = 0
        self.rounds: list[Round] = []
        self.admitted_order: list[int] = []
        self._contents: dict[bytes, int] = {}  # block_hash -> what a block of that hash holds in its last slot
        self._samplers: dict[int, pb.SamplerParams] = {}
        self._in_flight: deque[Step] = deque()
        self._plans: deque[pb.StepPlan] = deque()
        self._arrived_results: list[pb.StepResult] = []
        self._swap_dues: deque[tuple[int, int]] = deque()  # (round, swaps that are done in it)
        self._next_step_id = 1

    def __repr__(self) -> str:
        return f"Simulation({self.limits}, {self.arrivals})"

    def next_token(self, seq_id: int, output_index: int) -> int:
        """What the model says."""
        return END if output_index >= self.arrival_of(seq_id).stops_after else 1 + (seq_id * 7 + output_index) % 5

    def arrival_of(self, seq_id: int) -> Arrival:
        """The request that a sequence is a choice of."""
        return self.arrivals[bisect_right(self.first_seq_ids, seq_id) - 1]

    def expected_output(self, seq_id: int) -> list[int]:
        """What a client gets that stays to the end; the END token is part of it."""
        arrival = self.arrival_of(seq_id)
        output = [self.next_token(seq_id, i) for i in range(arrival.max_tokens)]
        if END in output and not arrival.ignores_eos:
            del output[output.index(END) + 1 :]
        return output

    def sequence(self, seq_id: int) -> Sequence:
        """By its number: choices of all arrivals count from 1."""
        return self.live[seq_id].sequence

    # -- rounds -------------------------------------------------------------------------------------------------------

    def run(self, max_rounds: int = 5000) -> "Simulation":
        """Until everything has ended; asserts that it does, and that every client got exactly its tokens."""
        while len(self.committer.ended) < self.first_seq_ids[-1] - 1:
            assert self.round_number < max_rounds, f"stuck: {self.describe()}"
            self.step()
        for _ in range(self.limits.plans_ahead + 2):
            self.step()
        while self.planner.swapper.held_block_ids or self.planner.pins.pinned:
            assert self.round_number < max_rounds, f"stuck: {self.describe()}"
            self.step()
        for seq_id, live in self.live.items():
            expected, log = self.expected_output(seq_id), self.committer.logs.get(seq_id, [])
            search, choice = live.request.search, live.sequence.choice
            if search is not None:
                arrival = self.arrival_of(seq_id)
                if live.ending is not CANCELLED and choice < arrival.n:
                    assert live.sequence.output_token_ids == hypotheses(arrival.prompt, search.params)[choice]
            elif live.ending is CANCELLED:
                assert log == expected[: len(log)]
            else:
                assert log == expected
        assert self.blocks.num_referenced_blocks == 0
        assert not self.worker.held
        return self

    def until(self, condition: Callable[[], bool], max_rounds: int = 500) -> None:
        """Rounds, at least one, until something is so."""
        for _ in range(max_rounds):
            self.step()
            if condition():
                return
        raise AssertionError(f"never: {self.describe()}")

    def describe(self) -> str:
        """Where everything stands."""
        rows = [
            f"{s.seq_id}:{s.status.value}/{s.num_computed_tokens}" for s in (x.sequence for x in self.live.values())
        ]
        return f"round {self.round_number}, {self.blocks.num_available_blocks} blocks available, {' '.join(rows)}"

    def step(self) -> Round:
        """One round."""
        self._arrive_and_cancel()
        self.committer.answer(self.round_number)
        results = self._apply_results()
        plans = self._plan_ahead()
        running_before = {s.seq_id for s in self.planner.running}
        self.planner.history.now_s = float(self.round_number)
        self.planner.pins.expire(self.planner.history.now_s)
        self.planner.grow_and_admit(self.limits.lookahead, self.limits.steps_per_plan)
        self.admitted_order += [s.seq_id for s in self.planner.running if s.seq_id not in running_before]
        changes = self.committer.send(self.planner, self.round_number + self.limits.ack_rounds)
        if not self.limits.ack_rounds:
            self.committer.answer(self.round_number)
        self._check()
        if self._plans:
            num_before = len(self.worker.swaps)
            self._arrived_results.append(self.worker.run(self._plans.popleft()))
            num_begun = len(self.worker.swaps) - num_before
            self._swap_dues.append((self.round_number + self.limits.swap_rounds, num_begun))
        self.rounds.append(Round(self.round_number, results, plans, changes))
        self.round_number += 1
        return self.rounds[-1]

    def _arrive_and_cancel(self) -> None:
        for first, arrival in zip(self.first_seq_ids, self.arrivals, strict=False):
            if arrival.round == self.round_number:
                self._open(first, arrival)
            if arrival.cancel_round == self.round_number and first in self.live:
                for choice in range(arrival.num_sequences):
                    self.cancel(first + choice)

    def cancel(self, seq_id: int) -> None:
        """A client goes."""
        live = self.live[seq_id]
        if live.sequence.status is not SequenceStatus.FINISHED:
            self.results.finish(live, CANCELLED)

    def _open(self, first_seq_id: int, arrival: Arrival) -> None:
        limits = SequenceLimits(arrival.max_tokens, frozenset((END,)), arrival.ignores_eos)
        if arrival.ignores_eos:
            limits = SequenceLimits(arrival.max_tokens, frozenset(), ignores_eos=True)
        live = LiveRequest(cast(RequestBody, arrival))  # of a body only n is asked
        if arrival.beam_width:
            live.search = BeamSearch(beam_params(arrival, limits))
        for choice in range(arrival.num_sequences):
            sequence = Sequence(
                seq_id=first_seq_id + choice,
                request_id=f"r{first_seq_id}",
                choice=choice,
                token_ids=list(arrival.prompt),
                num_prompt_tokens=len(arrival.prompt),
                limits=limits,
                root_hash=root_hash("model", "float32", "", arrival.salt),
                priority=arrival.priority,
                tenant=arrival.tenant,
                pin_s=0.0 if choice else arrival.pin_rounds,
                num_candidates=live.search.params.num_candidates if live.search else 0,
            )
            self._samplers[sequence.seq_id] = pb.SamplerParams(num_candidates=sequence.num_candidates)
            self.worker.salts[sequence.seq_id] = arrival.salt
            live.choices.append(LiveChoice(live, sequence))
            self.live[sequence.seq_id] = live.choices[-1]
            self.planner.enqueue(sequence, live.choices[0].sequence if choice else None)

    def _apply_results(self) -> list[tuple[pb.StepResult, Step]]:
        applied = []
        for result in self._arrived_results:
            step = self._in_flight.popleft()
            assert step.step_id == result.step_id
            self.results.apply(step, result)
            applied.append((result, step))
        self._arrived_results.clear()
        while self._swap_dues and self._swap_dues[0][0] <= self.round_number:
            done = self.worker.swap(self._swap_dues.popleft()[1])
            outs, ins = (
                [swap.host_block_id for swap in done if swap.is_out],
                [swap.block_id for swap in done if not swap.is_out],
            )
            self.planner.swapper.finish(outs, ins)
        return applied

    def _plan_ahead(self) -> list[tuple[pb.StepPlan, list[ScheduledRow]]]:
        plans = []
        while len(self._in_flight) <= self.limits.plans_ahead:
            before = {s.seq_id: s.num_unplanned_tokens for s in self.planner.running}
            num_steps = self.planner.num_steps_alike(self.limits.steps_per_plan)
            rows = self.planner.schedule(num_steps)
            assert rows or num_steps == 1, "several steps of nobody"
            copies, self.committer.acked_copies = self.committer.acked_copies, []
            swaps, self.committer.acked_swaps = self.committer.acked_swaps, []
            if not rows and not copies and not swaps:
                break
            self._check_rows(rows, num_steps, before)
            numbers = StepNumbers(1, self._next_step_id, 0)
            plan = build_plan(numbers, StepWork(rows, copies, self.planner.removed, swaps, num_steps), self._samplers)
            for added in plan.added:
                prefix = self.live[added.seq_id].sequence.token_ids[: added.num_computed_tokens]
                self.worker.prefixes[plan.step_id, added.seq_id] = prefix
            self.planner.removed.clear()
            plan.freed_block_ids.extend(self.blocks.freed_block_ids)
            self.blocks.freed_block_ids.clear()
            copied = [copy.destination for copy in copies]
            num_tokens = sum(row.num_tokens for row in rows)
            self._in_flight.append(Step(self._next_step_id, rows, num_tokens, copied, num_steps))
            self._plans.append(plan)
            self._next_step_id += 1
            plans.append((plan, rows))
        if not self._in_flight and self.planner.removed:  # nothing runs: the next plan will say so
            for seq_id in self.planner.removed:
                del self.worker.held[seq_id]
            self.planner.removed.clear()
        return plans

    # -- what must always hold ----------------------------------------------------------------------------------------

    def _check_rows(self, rows: list[ScheduledRow], num_steps: int, unplanned_before: dict[int, int]) -> None:
        num_tokens = len(rows) if num_steps > 1 else sum(row.num_tokens for row in rows)
        assert num_tokens <= self.limits.max_num_batched_tokens, "over the token budget"
        assert len(rows) <= self.limits.max_num_seqs, "over max_num_seqs"
        assert len({row.sequence.seq_id for row in rows}) == len(rows), "a sequence twice in a step"
        for row in rows:
            capacity = row.sequence.num_acked_blocks * self.limits.block_size
            is_fork = row.num_tokens == 0
            assert is_fork or row.sequence.num_planned_tokens <= capacity, (
                "a plan needs blocks that Redis has not acknowledged"
            )
        if len(self.planner.running) <= self.limits.max_num_batched_tokens:
            planned = {row.sequence.seq_id for row in rows}
            for sequence in self.planner.running:
                num_planned = sequence.num_planned_tokens
                has_room = num_planned < sequence.num_acked_blocks * self.limits.block_size
                is_decode = unplanned_before[sequence.seq_id] == 1 and has_room and not sequence.num_arriving_blocks
                assert not is_decode or sequence.seq_id in planned, "a decode starves beside prefills"

        for parent, row in pairwise(rows):
            is_child = row.num_tokens == 0 and parent.num_tokens > 0
            assert not is_child or row.sequence.request_id == parent.sequence.request_id, "a fork behind a stranger"

    def _check(self) -> None:
        assert len(self.planner.running) <= self.limits.max_num_seqs
        sequences = [live.sequence for live in self.live.values()]
        swapper = self.planner.swapper
        pins = self.planner.pins
        assert pins.num_blocks <= self.limits.max_pinned_blocks
        tables = [*(s.block_ids for s in sequences), *(pin.block_ids for pin in pins.pinned.values())]
        self.blocks.check(tables, swapper.held_block_ids)
        swapper.check()
        waiting = {s.seq_id for s in (*self.planner.waiting, *self._followers())}
        running = {s.seq_id for s in self.planner.running}
        assert not waiting & running
        for sequence in sequences:
            is_over = sequence.status is SequenceStatus.FINISHED
            assert is_over or sequence.seq_id in waiting | running, "a sequence that nobody will run"
            assert (sequence.seq_id in running) == (sequence.status is SequenceStatus.RUNNING)
            assert sequence.block_ids == [] or sequence.seq_id in running
            assert sequence.num_computed_tokens <= sequence.num_planned_tokens
            known = len(sequence.token_ids) + sequence.num_planned_samples
            assert is_over or sequence.num_planned_tokens <= known
        for block_id, hash_ in self.blocks.image().hashes.items():
            slots = self.worker.pool[block_id]
            content = slots[-1]
            assert content is not None, "published before it was written"
            assert None not in slots, "published before it was written"
            assert self._contents.setdefault(hash_, content) == content, "one hash, two contents"
        for block_id, hash_ in swapper.image().hashes.items():
            assert self.worker.host[block_id][-1] == self._contents[hash_], "the host does not hold what it says"

    def _followers(self) -> list[Sequence]:
        return [s for s in (live.sequence for live in self.live.values()) if s.leader is not None]


def beam_params(arrival: Arrival, limits: SequenceLimits) -> BeamParams:
    """Of a request that searches."""
    early_stopping = EarlyStopping.FULL if arrival.priority else EarlyStopping.HEURISTIC
    return BeamParams(arrival.beam_width, 1.0, early_stopping, arrival.max_tokens, limits.end_token_ids)


def hypotheses(prompt: tuple[int, ...], params: BeamParams) -> list[list[int]]:
    """What a search finds whose beams have all the memory that there is."""
    search = BeamSearch(params)
    while not search.is_done:
        tokens = {slot: [*prompt, *search.beams[slot].token_ids] for slot in search.open_slots}
        search.apply(search.choose({slot: likeliest(tokens[slot], params.num_candidates) for slot in tokens}))
    return [hypothesis.token_ids for hypothesis in search.hypotheses]
