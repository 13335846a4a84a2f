"""Which worker a request goes to. Pure: the rule in words, and its arithmetic.

A request goes where it is done first: where the fewest tokens stand before its output, those that are queued there and
those of its own prompt that it must run itself. Every sequence there counts as some tokens more.

Single flight: what another request computes on a worker, or waits to compute first, is not computed elsewhere at the
same time. It is followed there, unless that worker is behind by far: with more in its queue, what is followed included,
by over three times the tokens that following saves (once for what they are, and RECOMPUTE_PENALTY). So a long prefix is
followed into a long queue; a short one, which thousands of different prompts may share, draws nobody, and is computed
again where there is room. What has been computed already weighs what a hit saves and no more: a hot prefix gets a copy
on the next worker as soon as the queue on the first has grown longer by that.

Chains of block hashes say what is the same, so nobody follows a request of another salt.

What others learned the hard way. An index that knows only what has been computed scatters a burst over all workers
(llm-d-kv-cache issue 353): here a request counts from the moment that its worker is chosen, for as long as it lives.
Affinity without load herds everybody to the worker that has the system prompt (production-stack issue 957). A gate that
asks whether any worker is overloaded turns affinity off for all (vllm-project/router pull request 238), and a ratio of
small counts is noise (smg pull request 2150): here two workers are compared, in tokens.
"""

from collections.abc import Sequence as Seq
from typing import NamedTuple

SEQUENCE_COST_TOKENS = 16
"""What one sequence weighs against tokens to run."""
RECOMPUTE_PENALTY = 2
"""Times that tokens weigh more which would be computed twice at once."""


class Outlook(NamedTuple):
    """What a request would find at a worker, in tokens."""

    num_queued: int
    """To be run there before it, with what the sequences there weigh."""
    num_cached: int
    """Of its prompt, from the front: in the prefix index."""
    num_promised: int
    """Of its prompt, from the front: in the prefix index, being computed, or going to be by one that came before."""


def best_worker(num_tokens: int, outlooks: Seq[Outlook]) -> int:
    """The number of the worker that a prompt of so many tokens goes to; of equals the first."""
    computing = [outlook for outlook in outlooks if outlook.num_promised > outlook.num_cached]

    def cost(at: Outlook) -> int:
        num_doubled = max((_num_doubled(at, other) for other in computing), default=0)
        return at.num_queued + num_tokens - at.num_promised + RECOMPUTE_PENALTY * num_doubled

    return min(range(len(outlooks)), key=lambda number: cost(outlooks[number]))


def _num_doubled(at: Outlook, other: Outlook) -> int:
    """Tokens that the request would compute at one worker while another one does; 0 where both are the same."""
    return max(0, other.num_promised - max(other.num_cached, at.num_promised))
