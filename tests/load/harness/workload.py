"""What conversations say: prompts, turns, limits, and who leaves. The same for the same seed, in any process. Pure.

A conversation is made when it is about to begin, from the seed and its index: a long run holds no prompts.
"""

from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import numpy as np

from tests.load.harness.errors import LoadError
from tests.load.harness.lengths import draw_lengths
from tests.load.harness.settings import Leavers, Settings
from tests.load.harness.trace import read_trace

DEFAULT_VOCAB_SIZE = 1000
"""Ids that any tokenizer has, for servers that don't say how many they have."""
_LENGTHS, _PREFIXES, _PROMPTS = 2, 3, 4
"""Tell the random numbers of each apart."""


class Leave(Enum):
    """How a client goes in the middle of its stream."""

    STAYS = "stays"
    CANCELS = "cancels"
    DISCONNECTS = "disconnects"


@dataclass(frozen=True, slots=True)
class Turn:
    """One request: what is said after all that was said before, and how long the answer may be."""

    token_ids: list[int]
    max_tokens: int
    think_s: float = 0.0
    """From the end of the answer before it."""
    leave: Leave = Leave.STAYS


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns, each after the answer to the one before."""

    index: int
    turns: tuple[Turn, ...]


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What the server says of its model."""

    name: str
    vocab_size: int = DEFAULT_VOCAB_SIZE
    max_model_len: int = 0
    """0: it does not say."""
    eos_token_ids: tuple[int, ...] = ()


class Workload(Protocol):
    """All conversations of a run, by index."""

    def conversation(self, index: int) -> Conversation:
        """The same for the same index."""


class PromptMaker:
    """Draws token ids; none of them ends a generation, for a model may take that for a border."""

    def __init__(self, model: ServedModel, seed: int) -> None:
        ends = set(model.eos_token_ids)
        self._ids = np.array([token_id for token_id in range(model.vocab_size) if token_id not in ends])
        self._seed = seed

    def rng(self, stream: int, index: int) -> np.random.Generator:
        """Random numbers of their own for each index."""
        return np.random.default_rng([self._seed, stream, index])

    def draw(self, rng: np.random.Generator, num_tokens: int) -> list[int]:
        """Token ids."""
        drawn: list[int] = rng.choice(self._ids, num_tokens).tolist()
        return drawn

    def prefix(self, number: int, num_tokens: int) -> list[int]:
        """What a group of requests shares."""
        return self.draw(self.rng(_PREFIXES, number), num_tokens)


class DrawnWorkload:
    """Requests and conversations whose lengths are drawn."""

    def __init__(self, settings: Settings, model: ServedModel, num_requests: int) -> None:
        self._dataset = settings.dataset
        self._leavers = settings.leavers
        self._maker = PromptMaker(model, settings.seed)
        self._max_model_len = model.max_model_len
        num_turns = self._num_turns = settings.dataset.num_turns if settings.dataset.name == "conversation" else 1
        rng = np.random.default_rng([settings.seed, _LENGTHS])
        self._lengths = draw_lengths(settings.dataset, num_requests * num_turns, rng)
        dataset = settings.dataset
        self._prefixes = [self._maker.prefix(i, dataset.prefix_len) for i in range(dataset.num_prefixes)]

    def conversation(self, index: int) -> Conversation:
        """See Workload; ends early where the next turn would not fit the model."""
        rng = self._maker.rng(_PROMPTS, index)
        token_ids = self._prefixes[int(rng.integers(len(self._prefixes)))]
        turns: list[Turn] = []
        num_before = 0
        for number in range(self._num_turns):
            num_prompt, num_output = self._lengths.of(index * self._num_turns + number)
            num_prompt, num_output = self._cut(num_before + len(token_ids), num_prompt, num_output, not turns)
            if num_output < 1:
                break
            token_ids = token_ids + self._maker.draw(rng, num_prompt)
            think_s = float(rng.exponential(self._dataset.think_time_s)) if turns else 0.0
            turns.append(Turn(token_ids, num_output, think_s, draw_leave(self._leavers, rng)))
            num_before += len(token_ids) + num_output
            token_ids = []
        return Conversation(index, tuple(turns))

    def _cut(self, num_before: int, num_prompt: int, num_output: int, must_fit: bool) -> tuple[int, int]:
        """The first turn is cut to the model's length; a later one that does not fit has no output."""
        limit = self._max_model_len
        if not limit or num_before + num_prompt + num_output <= limit:
            return num_prompt, num_output
        if not must_fit:
            return num_prompt, 0
        num_prompt = min(num_prompt, limit - num_before - 1)
        if num_prompt < 1:
            raise LoadError(f"a shared prefix of {num_before} tokens does not fit the model's {limit}", 2)
        return num_prompt, min(num_output, limit - num_before - num_prompt)


class TracedWorkload:
    """Requests as long as a trace's, sharing the chunks that it says they share."""

    def __init__(self, settings: Settings, model: ServedModel) -> None:
        assert settings.dataset.path is not None
        self._rows = read_trace(settings.dataset.path)
        self._leavers = settings.leavers
        self._maker = PromptMaker(model, settings.seed)

    def conversation(self, index: int) -> Conversation:
        """See Workload."""
        row = self._rows[index % len(self._rows)]
        rng = self._maker.rng(_PROMPTS, index)
        token_ids: list[int] = []
        for chunk_id, num_tokens in row.shared_chunks():
            token_ids += self._maker.prefix(chunk_id, num_tokens)
        token_ids += self._maker.draw(rng, row.num_prompt_tokens - len(token_ids))
        return Conversation(index, (Turn(token_ids, row.num_output_tokens, 0.0, draw_leave(self._leavers, rng)),))


def draw_leave(leavers: Leavers, rng: np.random.Generator) -> Leave:
    """Whether and how a request's client goes."""
    drawn = rng.random()
    if drawn < leavers.cancel_share:
        return Leave.CANCELS
    return Leave.DISCONNECTS if drawn < leavers.cancel_share + leavers.disconnect_share else Leave.STAYS


def make_workload(settings: Settings, model: ServedModel, num_requests: int) -> Workload:
    """The workload of a run. Raises LoadError where the trace can't be read."""
    if settings.dataset.name == "timed_trace":
        return TracedWorkload(settings, model)
    return DrawnWorkload(settings, model, num_requests)
