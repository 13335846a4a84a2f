"""Beam search over one request: candidates of all beams in, the next beams and the finished hypotheses out. Pure.

The rules are those of transformers' `generate(num_beams=...)`, step by step and in float32, so that both choose the
same tokens. Beams live in slots, which are sequences with blocks: the best child of a beam stays in its slot, the
others take the slots of beams that have no child. Every step is a row of words in the request's log, and the state is a
function of these rows: `replay` makes it from them again.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from scheduler.float_bits import from_bits, to_bits, to_float32

NO_SCORE = -1.0e9
_HEAD_WORDS, _ENTRY_WORDS = 2, 3


class EarlyStopping(Enum):
    """When a search ends that has as many hypotheses as beams."""

    HEURISTIC = "heuristic"
    """When the best beam, ended now, would be no better than the worst hypothesis."""
    FULL = "full"
    """At once."""
    NEVER = "never"
    """When no beam can become better than the worst hypothesis."""


@dataclass(frozen=True, slots=True)
class BeamParams:
    """What a search is asked to do. length_penalty: exponent of the length that scores are divided by."""

    width: int
    length_penalty: float
    early_stopping: EarlyStopping
    max_output_tokens: int
    end_token_ids: frozenset[int]

    @property
    def num_candidates(self) -> int:
        """Likeliest tokens of each beam that a step looks at: enough for `width` that do not end."""
        return max(2, 1 + len(self.end_token_ids)) * self.width


@dataclass(frozen=True, slots=True)
class Entry:
    """One more token of the beam in a slot. score: the sum of log probabilities, or a hypothesis' own."""

    parent: int
    token_id: int
    score: float


@dataclass(frozen=True, slots=True)
class BeamStep:
    """What a step decided. running: by slot, empty where the search is over; finished: new hypotheses, best first."""

    running: list[Entry]
    finished: list[Entry]

    def words(self) -> list[int]:
        """As the log holds it: two counts, then three words an entry, the score as its bits."""
        words = [len(self.running), len(self.finished)]
        for entry in (*self.running, *self.finished):
            words += (entry.parent, entry.token_id, to_bits(entry.score))
        return words


@dataclass(slots=True)
class Beam:
    """What a slot holds."""

    token_ids: list[int]
    score: float


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A sequence that has ended; its score is divided by its length's power."""

    token_ids: list[int]
    score: float


@dataclass(slots=True)
class BeamSearch:
    """The state after some steps."""

    params: BeamParams
    beams: list[Beam] = field(default_factory=list)
    """By slot. Before the first step only slot 0 counts."""
    hypotheses: list[Hypothesis] = field(default_factory=list)
    """At most `width`, best first."""
    num_words: int = 0
    """Of the log."""
    is_done: bool = False
    _may_improve: bool = True

    def __post_init__(self) -> None:
        self.beams = [Beam([], 0.0 if slot == 0 else NO_SCORE) for slot in range(self.params.width)]

    @classmethod
    def replay(cls, params: BeamParams, words: Sequence[int]) -> "BeamSearch":
        """The state that a log leads to."""
        search = cls(params)
        at = 0
        while at < len(words):
            counts = words[at : at + _HEAD_WORDS]
            at += _HEAD_WORDS
            entries = []
            for _ in range(sum(counts)):
                parent, token_id, bits = words[at : at + _ENTRY_WORDS]
                entries.append(Entry(parent, token_id, from_bits(bits)))
                at += _ENTRY_WORDS
            search.apply(BeamStep(entries[: counts[0]], entries[counts[0] :]))
        return search

    @property
    def num_steps(self) -> int:
        """Tokens of each beam."""
        return len(self.beams[0].token_ids)

    @property
    def open_slots(self) -> range:
        """Slots whose candidates the next step needs."""
        return range(self.params.width if self.num_steps else 1)

    def choose(self, candidates: Mapping[int, Iterable[tuple[int, float]]]) -> BeamStep:
        """The next step, from the likeliest `num_candidates` (token id, log probability) of each open slot."""
        params = self.params
        found = [
            Entry(slot, token_id, to_float32(self.beams[slot].score + logprob))
            for slot, own in sorted(candidates.items())
            for token_id, logprob in own
        ]
        found.sort(key=lambda entry: -entry.score)
        kept = found[: params.num_candidates]
        is_last = self.num_steps + 1 >= params.max_output_tokens
        ended = [is_last or entry.token_id in params.end_token_ids for entry in kept]
        running = [entry for entry, has_ended in zip(kept, ended, strict=True) if not has_ended][: params.width]
        finished: list[Entry] = []
        if self._may_improve and not self._is_full_enough():
            divisor = to_float32((self.num_steps + 1) ** params.length_penalty)
            best = zip(kept[: params.width], ended, strict=False)
            finished = [
                Entry(e.parent, e.token_id, to_float32(e.score / divisor)) for e, has_ended in best if has_ended
            ]
        return BeamStep(self._by_slot(running), finished)

    def apply(self, step: BeamStep) -> None:
        """Makes a step's decisions the state."""
        params = self.params
        self.num_words += len(step.words())
        self.hypotheses += [Hypothesis([*self.beams[e.parent].token_ids, e.token_id], e.score) for e in step.finished]
        self.hypotheses = sorted(self.hypotheses, key=lambda hypothesis: -hypothesis.score)[: params.width]
        num_tokens = self.num_steps + 1
        if not step.running:
            self.is_done = True
            return
        self.beams = [Beam([*self.beams[e.parent].token_ids, e.token_id], e.score) for e in step.running]
        if len(self.hypotheses) == params.width:
            is_patient = params.early_stopping is EarlyStopping.NEVER and params.length_penalty > 0
            length = params.max_output_tokens if is_patient else num_tokens
            best = to_float32(max(beam.score for beam in self.beams) / to_float32(length**params.length_penalty))
            self._may_improve = self._may_improve and best > self.hypotheses[-1].score
        self.is_done = not self._may_improve or self._is_full_enough()

    def _is_full_enough(self) -> bool:
        return self.params.early_stopping is EarlyStopping.FULL and len(self.hypotheses) == self.params.width

    def _by_slot(self, running: list[Entry]) -> list[Entry]:
        """The best child of each beam stays where its parent was; the others take what is free."""
        slots: dict[int, Entry] = {}
        others = []
        for entry in running:
            if entry.parent in slots:
                others.append(entry)
            else:
                slots[entry.parent] = entry
        free = (slot for slot in range(self.params.width) if slot not in slots)
        slots.update(zip(free, others, strict=False))
        return [slots[slot] for slot in sorted(slots)]
