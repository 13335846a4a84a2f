"""Where the blocks of a request's prompt came from, told while the scheduler still knows.

A live request carries its admissions itself. Of ended ones the last are kept here, bounded by their number; that their
record has not expired, the caller sees to. Nothing of this is in Redis: a new scheduler begins to know anew.
"""

from collections import OrderedDict
from dataclasses import dataclass

from pagoda.v1 import generation_pb2 as pb

from scheduler.live_request import LiveRequest
from scheduler.sequence import Admission

MAX_ENDED = 4096
"""Ended requests whose admissions are kept."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """Of one request."""

    num_prompt_tokens: int
    was_admitted: bool
    admissions: tuple[Admission, ...]

    @property
    def is_forgotten(self) -> bool:
        """Whether it was admitted and only an earlier scheduler knew how."""
        return self.was_admitted and not self.admissions

    @classmethod
    def of(cls, live: LiveRequest) -> "Explanation":
        """Of a request that is live here."""
        sequence = live.choices[0].sequence  # the others of the prompt fork from it
        return cls(sequence.num_prompt_tokens, sequence.num_cached_tokens is not None, tuple(sequence.admissions))


class Explanations:
    """Of requests that have ended."""

    def __init__(self) -> None:
        self._ended: OrderedDict[str, Explanation] = OrderedDict()

    def keep(self, live: LiveRequest) -> None:
        """A request has ended."""
        self._ended[live.body.request_id] = Explanation.of(live)
        if len(self._ended) > MAX_ENDED:
            self._ended.popitem(last=False)

    def get(self, request_id: str) -> Explanation | None:
        """Of an ended request, or None where too many have ended since."""
        return self._ended.get(request_id)


def to_response(request_id: str, explanation: Explanation, block_size: int, has_ended: bool) -> pb.ExplainResponse:
    """As clients see it."""
    return pb.ExplainResponse(
        request_id=request_id,
        num_prompt_tokens=explanation.num_prompt_tokens,
        block_size=block_size,
        has_ended=has_ended,
        admissions=[_admission(admission) for admission in explanation.admissions],
    )


def _admission(admission: Admission) -> pb.Admission:
    runs = [
        pb.EvictedRun(
            first_block=run.first_block,
            num_blocks=run.num_blocks,
            evicted_at_s=run.eviction[0],
            evicted_for=run.eviction[1],
        )
        for run in admission.evicted
    ]
    return pb.Admission(
        worker=admission.worker,
        admitted_at_s=admission.at_s,
        attempt=admission.attempt,
        sources=admission.sources,
        evicted_runs=runs,
    )
