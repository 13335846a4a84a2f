"""Runs requests, all there at the start, to their ends in one process, and says after each step what the memory did.

The planner, what it makes of results, and the plans are the scheduler's own; the worker is whole but for its link.
Redis answers at once. As in the engine, one plan is ahead of the one that runs, and blocks are reserved ahead of both.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import cast

from pagoda.v1 import worker_pb2 as pb

from scheduler.beam_search import BeamParams, BeamSearch, EarlyStopping
from scheduler.block_hash import root_hash
from scheduler.block_manager import BlockCopy
from scheduler.changes import Changes
from scheduler.committer import Committer
from scheduler.live_request import Ending, LiveChoice, LiveRequest
from scheduler.planner import Planner
from scheduler.request import RequestBody
from scheduler.results import Results, Step
from scheduler.sequence import FinishReason, Sequence, SequenceLimits, SequenceStatus
from scheduler.wire import StepNumbers, StepWork, build_plan, choice_seed
from tests.load.memory.accounting import MemoryUse
from tests.unit.worker_harness import LocalWorker

LOOKAHEAD = 2
"""Plans for which blocks are reserved ahead: what the engine asks for where Redis answers within a step."""


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked for. The output ends after num_output_tokens; limit is what its client allowed, or knew.

    n: choices, sampled from one prompt; beam_width: beams to search with instead (0: none).
    """

    prompt: list[int]
    num_output_tokens: int
    limit: int
    n: int = 1
    beam_width: int = 0


@dataclass(frozen=True, slots=True)
class Contender:
    """A way to share out KV memory: who plans, and what the memory does during a step that runs so many tokens of each.

    A slot that the step writes holds a token.
    """

    planner: Planner
    use: Callable[[Mapping[int, int]], MemoryUse]


@dataclass(frozen=True, slots=True)
class Moment:
    """One step: the memory while it ran, who held some of it, and how long it took with its planning."""

    use: MemoryUse
    num_held: int
    num_rows: int
    num_output_tokens: int
    is_waited_for: bool
    """Whether a request waited for memory."""
    seconds: float


def local_worker(flags: Mapping[str, object]) -> LocalWorker:
    """A whole worker but for its link, by the flags of its command line."""
    return LocalWorker(*(str(part) for name, value in flags.items() for part in (f"--{name}", value)))


class Drive:
    """One contender's run of one list of requests; iterate over it once."""

    def __init__(self, contender: Contender, worker: LocalWorker, requests: Iterable[Request]) -> None:
        self.planner = contender.planner
        self._use = contender.use
        self._worker = worker
        self._journal = Journal(self.planner.blocks.changes)
        self._live: dict[int, LiveChoice] = {}
        self._lengths: dict[int, int] = {}
        self._results = Results(self.planner, cast(Committer, self._journal), self._live)
        self._in_flight: deque[tuple[Step, pb.StepPlan]] = deque()
        self._samplers: dict[int, pb.SamplerParams] = {}
        self._num_steps = 0
        self._copies: list[BlockCopy] = []
        for request in requests:
            self._open(len(self._live) + 1, request)

    @property
    def outputs(self) -> list[list[int]]:
        """Of each choice, the token ids that it got."""
        return [choice.sequence.output_token_ids for choice in self._live.values()]

    @property
    def num_preemptions(self) -> int:
        """Of all requests."""
        return self.planner.counters.num_preemptions

    def __iter__(self) -> Iterator[Moment]:
        """Step by step, until every request has ended."""
        while self._journal.num_ended < len(self._live):
            began = time.perf_counter()
            self._plan_ahead()
            self._reserve()
            planned = time.perf_counter()
            step, plan = self._next()
            num_before = self._results.num_output_tokens
            use = self._use({row.sequence.seq_id: row.num_tokens for row in step.rows})
            num_held, is_waited_for = len(self.planner.running), bool(self.planner.waiting)
            looked = time.perf_counter()
            self._results.apply(step, self._worker.run(plan))
            self._end_those_that_stop(step)
            seconds = time.perf_counter() - looked + planned - began
            num_output_tokens = self._results.num_output_tokens - num_before
            yield Moment(use, num_held, len(step.rows), num_output_tokens, is_waited_for, seconds)
        self._worker.run(pb.StepPlan(step_id=self._num_steps + 1, removed_seq_ids=list(self._live)))

    def _open(self, first_seq_id: int, request: Request) -> None:
        is_known = request.limit == request.num_output_tokens
        limits = SequenceLimits(request.limit, frozenset(), ignores_eos=is_known)
        live = LiveRequest(cast(RequestBody, _Body(request.n)))
        if request.beam_width:
            live.search = BeamSearch(
                BeamParams(request.beam_width, 1.0, EarlyStopping.HEURISTIC, request.limit, frozenset())
            )
        for choice in range(max(request.n, request.beam_width)):
            sequence = Sequence(
                seq_id=first_seq_id + choice,
                request_id=f"r{first_seq_id}",
                choice=choice,
                token_ids=list(request.prompt),
                num_prompt_tokens=len(request.prompt),
                limits=limits,
                root_hash=root_hash("model", "", "", ""),
                num_candidates=live.search.params.num_candidates if live.search else 0,
            )
            live.choices.append(LiveChoice(live, sequence))
            self._live[sequence.seq_id] = live.choices[-1]
            self._lengths[sequence.seq_id] = request.num_output_tokens
            self._samplers[sequence.seq_id] = pb.SamplerParams(
                temperature=float(request.n > 1),
                top_p=1.0,
                seed=choice_seed(first_seq_id, choice),
                num_candidates=sequence.num_candidates,
            )
            self.planner.enqueue(sequence, live.choices[0].sequence if choice else None)

    def _plan_ahead(self) -> None:
        while len(self._in_flight) <= 1:
            rows = self.planner.schedule()
            if not rows and not self._copies:
                break
            self._num_steps += 1
            work = StepWork(rows, self._copies, self.planner.removed)
            plan = build_plan(StepNumbers(1, self._num_steps, 0), work, self._samplers)
            copied = [copy.destination for copy in self._copies]
            self._copies = []
            self.planner.removed.clear()
            self._in_flight.append((Step(self._num_steps, rows, sum(row.num_tokens for row in rows), copied), plan))

    def _reserve(self) -> None:
        self.planner.grow_and_admit(LOOKAHEAD)
        for sequence in self.planner.reserved:
            sequence.num_acked_blocks = len(sequence.block_ids)
        self._copies += self.planner.forks.copies
        self.planner.forks.copies.clear()
        self.planner.reserved.clear()
        self.planner.redescribed.clear()
        self._journal.changes.take()

    def _next(self) -> tuple[Step, pb.StepPlan]:
        """The plan to run: at the start, and where a lone sequence had to be given blocks first, there is none yet."""
        if not self._in_flight:
            self._plan_ahead()
            self._reserve()
        assert self._in_flight, "no request fits"
        return self._in_flight.popleft()

    def _end_those_that_stop(self, step: Step) -> None:
        for row in step.rows:
            sequence = row.sequence
            is_over = sequence.num_output_tokens >= self._lengths[sequence.seq_id] and not sequence.num_candidates
            if is_over and sequence.status is not SequenceStatus.FINISHED:
                self._results.finish(self._live[sequence.seq_id], Ending(FinishReason.STOP))


@dataclass(frozen=True, slots=True)
class _Body:
    """What a search's end asks of a request's body."""

    n: int


class Journal:
    """The face of a Committer that Results needs; counts ends."""

    def __init__(self, changes: Changes) -> None:
        self.changes = changes
        self.num_ended = 0

    def log_tokens(self, choice: LiveChoice, first_index: int, token_ids: list[int]) -> None:
        """The sequence has them."""

    def log_search(self, live: LiveRequest, words: list[int]) -> None:
        """The search has it."""

    def deliver(self, choice: LiveChoice) -> None:
        """The choice has its hypothesis."""

    def note_computed(self, sequence: Sequence, has_caught_up: bool) -> None:
        """As the real one."""
        sequence.has_computed_record = not has_caught_up

    def end(self, choice: LiveChoice) -> None:
        """A choice is over."""
        self.num_ended += 1
