"""best_of: more choices are sampled than are delivered, and the likeliest are. Pure.

A choice is ranked by its score: the sum of the log probabilities of all tokens that it sampled, by the model's own
distribution (before temperature and filters). As in vLLM's best_of the sum is not divided by the length. The log of a
choice holds each token with its log probability, so that scores and ranks are a function of the logs.
"""

from collections.abc import Iterable, Sequence
from math import fsum

from scheduler.float_bits import from_bits, to_bits
from scheduler.sequence import FinishReason

WORDS_PER_TOKEN = 2
"""Of such a choice's log: the token's id, and the bits of its log probability."""
_STANDING = {FinishReason.ERROR: 0, FinishReason.ABORT: 2}


def to_words(token_ids: Iterable[int], logprobs: Iterable[float]) -> list[int]:
    """As the log holds them."""
    return [word for pair in zip(token_ids, logprobs, strict=True) for word in (pair[0], to_bits(pair[1]))]


def from_words(words: Sequence[int]) -> tuple[list[int], list[float]]:
    """Token ids and log probabilities of a log."""
    return list(words[::WORDS_PER_TOKEN]), [from_bits(bits) for bits in words[1::WORDS_PER_TOKEN]]


def score(logprobs: Iterable[float]) -> float:
    """Their sum, rounded once: the same whoever adds them up, and in whatever pieces they came."""
    return fsum(logprobs)


def rank(scores: Sequence[float], reasons: Sequence[FinishReason]) -> list[int]:
    """Numbers of the choices, best first, equals by their number.

    One that failed comes before all, for its error is the request's; one that a cancel cut short comes last.
    """
    return sorted(range(len(scores)), key=lambda i: (_STANDING.get(reasons[i], 1), -scores[i], i))
