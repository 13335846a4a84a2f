"""How long requests take, measured where it is true: from their arrival to tokens that Redis has acknowledged.

Names and meanings are vLLM's where it has them. Owns the measurements; metrics.py shows them.
"""

import logging
from collections import Counter
from time import monotonic, time

from scheduler.live_request import LiveChoice, LiveRequest
from scheduler.tally import Tally

log = logging.getLogger("pagoda.requests")

FIRST_TOKEN_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
    *(160.0, 640.0, 2560.0),
)
NEXT_TOKEN_S = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0),
)
REQUEST_S = (
    *(0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0),
    *(480.0, 960.0, 1920.0, 7680.0),
)
LENGTHS = tuple(float(x) for n in range(6) for x in (10**n, 2 * 10**n, 5 * 10**n))


def log_end(live: LiveRequest) -> None:
    """One line for a request that has ended; of several choices the first one speaks."""
    leader = live.choices[0]
    end, sequence = leader.end, leader.sequence
    assert end is not None
    fields: dict[str, object] = {
        "request_id": live.body.request_id,
        "finish_reason": end.reason.value,
        "num_prompt_tokens": sequence.num_prompt_tokens,
        "num_cached_tokens": end.num_cached_tokens,
        "num_output_tokens": sum(choice.sequence.num_output_tokens for choice in live.choices[: live.body.n]),
    }
    if end.status:
        fields["status"] = end.status
    if live.arrived_s:
        fields["seconds"] = round(monotonic() - live.arrived_s, 4)
    log.info("request %s ended: %s", live.body.request_id, end.error or end.reason.value, extra=fields)


class RequestMetrics:
    """Of all requests of this scheduler. Those that it took over from another one have no arrival, and count only with
    what it saw of them."""

    def __init__(self) -> None:
        self.time_to_first_token_s = Tally(FIRST_TOKEN_S)
        self.inter_token_latency_s = Tally(NEXT_TOKEN_S)
        self.time_per_output_token_s = Tally(NEXT_TOKEN_S)
        self.e2e_latency_s = Tally(REQUEST_S)
        self.queue_time_s = Tally(REQUEST_S)
        self.prefill_time_s = Tally(REQUEST_S)
        self.decode_time_s = Tally(REQUEST_S)
        self.prompt_tokens = Tally(LENGTHS)
        self.generation_tokens = Tally(LENGTHS)
        self.num_prompt_tokens = 0
        self.num_generation_tokens = 0
        self.num_ended: Counter[str] = Counter()
        """Choices, by finish_reason."""
        self.num_refused: Counter[str] = Counter()
        """Calls that failed, by gRPC status."""

    def note_arrival(self, live: LiveRequest) -> None:
        """A client sent it just now."""
        live.arrived_s, live.arrived_at_s = monotonic(), time()

    def note_tokens(self, logged: list[tuple[LiveChoice, int, int]]) -> None:
        """(choice, tokens before, tokens now): Redis has just acknowledged them, all at once."""
        now_s = monotonic()
        same_step: Counter[float] = Counter()  # choices by when their last tokens came: mostly the same step
        for choice, num_before, num_now in logged:
            if num_now <= num_before:
                continue
            self.num_generation_tokens += num_now - num_before
            if choice.last_token_s:
                same_step[choice.last_token_s] += 1
            elif not num_before:
                self._note_first(choice, now_s)
            choice.last_token_s = now_s
        for last_s, count in same_step.items():
            self.inter_token_latency_s.observe(now_s - last_s, count)

    def _note_first(self, choice: LiveChoice, now_s: float) -> None:
        choice.first_token_s = now_s
        if choice.sequence.choice == 0:
            self.num_prompt_tokens += choice.sequence.num_prompt_tokens
        if choice.request.arrived_s:
            self.time_to_first_token_s.observe(now_s - choice.request.arrived_s)

    def note_end(self, live: LiveRequest) -> None:
        """Its end is recorded."""
        now_s = monotonic()
        for choice in live.choices[: live.body.n]:
            assert choice.end is not None
            self.num_ended[choice.end.reason.value] += 1
            self.generation_tokens.observe(choice.sequence.num_output_tokens)
            if choice.first_token_s and choice.sequence.num_output_tokens > 1:
                decode_s = choice.last_token_s - choice.first_token_s
                self.decode_time_s.observe(decode_s)
                self.time_per_output_token_s.observe(decode_s / (choice.sequence.num_output_tokens - 1))
        leader = live.choices[0]
        self.prompt_tokens.observe(leader.sequence.num_prompt_tokens)
        if live.arrived_s:
            self.e2e_latency_s.observe(now_s - live.arrived_s)
            self._note_phases(live, leader)

    def _note_phases(self, live: LiveRequest, leader: LiveChoice) -> None:
        admissions = leader.sequence.admissions
        if admissions:
            queued_s = max(0.0, admissions[0].at_s - live.arrived_at_s)
            self.queue_time_s.observe(queued_s)
            if leader.first_token_s:
                self.prefill_time_s.observe(max(0.0, leader.first_token_s - live.arrived_s - queued_s))
