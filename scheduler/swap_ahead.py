"""What goes out to the host before it has to: the policy of swapping. Pure.

Everything goes out ahead of need, because a swap holds its blocks until it is done and nobody is to wait for that.
Where the running sequences will soon need more than there is: the blocks of those that would be preempted, if moving
them is cheaper than computing them again. While few blocks are free: the coldest cached ones, and, as far as there is
room for more, what has just been published, whoever still uses it, for it may be evicted as soon as it is let go.
"""

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from enum import Enum
from itertools import islice

from scheduler.block_manager import BlockManager
from scheduler.host_pool import HostPool
from scheduler.sequence import Sequence
from scheduler.swapper import MAX_SWAP_OUTS, Swapper

WINDOW_BLOCKS = 64
"""The coldest cached blocks that are to be on the host too, once fewer are free."""
MAX_STEPS_AHEAD = 64
"""How far growth is foreseen, beside the tokens of a block."""


class Preemption(Enum):
    """What becomes of a preempted sequence's blocks."""

    AUTO = "auto"
    """Of each sequence, what is cheaper."""
    SWAP = "swap"
    RECOMPUTE = "recompute"


@dataclass(slots=True)
class SwapCosts:
    """What moving and computing take on a worker, as far as measured; 0: not known."""

    block_bytes: int = 0
    bytes_per_s: float = 0.0
    """Between the pools, in either direction."""
    s_per_token: float = 0.0
    """To compute one token more of a prompt."""
    step_s: float = 0.0

    def move_s(self, num_blocks: int) -> float:
        """Seconds to move blocks."""
        return num_blocks * self.block_bytes / self.bytes_per_s if self.bytes_per_s else float("inf")

    def compute_s(self, num_tokens: int) -> float:
        """Seconds to compute tokens."""
        return num_tokens * self.s_per_token


class SwapAhead:
    """Decides for one worker; the swapper carries out."""

    def __init__(self, blocks: BlockManager, swapper: Swapper, preemption: Preemption, costs: SwapCosts) -> None:
        self.swapper = swapper
        self._costs = costs
        self._blocks = blocks
        self._preemption = preemption
        self._block_size = swapper.block_size
        swapper.takes_preempted = preemption is not Preemption.RECOMPUTE
        self._judge_hits()

    @classmethod
    def without_host(cls, blocks: BlockManager, block_size: int) -> "SwapAhead":
        """Of a worker that has no host pool."""
        return cls(blocks, Swapper(blocks, HostPool(0), block_size), Preemption.RECOMPUTE, SwapCosts())

    def learn(self, step_s: float, s_per_token: float) -> None:
        """What steps have taken lately."""
        self._costs.step_s, self._costs.s_per_token = step_s, s_per_token
        self._judge_hits()

    def learn_moves(self, num_blocks: int, seconds: float) -> None:
        """What moving so many blocks has taken."""
        if num_blocks and seconds > 0:
            self._costs.bytes_per_s += 0.1 * (num_blocks * self._costs.block_bytes / seconds - self._costs.bytes_per_s)
            self._judge_hits()

    def _judge_hits(self) -> None:
        """A block that only the host has is a hit where it comes in sooner than it is computed."""
        is_sooner = self._costs.move_s(1) < self._costs.compute_s(self._block_size)
        self.swapper.takes_hits = self._preemption is Preemption.SWAP or is_sooner

    def set_aside(self, sequence: Sequence) -> None:
        """A sequence is preempted: what the host has of it, or is getting, stays there until it is back."""
        if self._preemption is not Preemption.RECOMPUTE:
            self.swapper.set_aside(sequence)

    def send_out(self, running: Seq[Sequence], lookahead: int) -> None:
        """Begins to copy what may be evicted or preempted soon."""
        if not self.swapper.host.num_blocks:
            return
        if self._preemption is not Preemption.RECOMPUTE and len(running) > 1:
            self._send_victims(running, lookahead)
        if self._blocks.num_free_blocks < WINDOW_BLOCKS and self.swapper.takes_hits:
            # Of what could be reserved now, half at most: what is on its way out cannot be.
            self._send(islice(self._blocks.coldest_first(), WINDOW_BLOCKS), self._blocks.num_available_blocks // 2)
            published = (block_id for block_id, _ in self._blocks.changes.publish)
            self._send(filter(self._blocks.ref_count, published), MAX_SWAP_OUTS)

    def _send(self, block_ids: Iterable[int], room: int) -> None:
        room = min(room, self.swapper.num_outs_left)
        for block_id in block_ids:
            if room <= 0:
                break
            if self.swapper.can_go_out(block_id):
                self.swapper.begin_out(block_id)
                room -= 1

    def _send_victims(self, running: Seq[Sequence], lookahead: int) -> None:
        """As many as would make up for what will be short, in the order in which they would be preempted."""
        num_available, horizon = self._blocks.num_available_blocks, self._horizon(lookahead)
        if len(running) * (horizon // self._block_size + 1) <= num_available:
            return
        num_short = sum(s.num_blocks_short(horizon, self._block_size) for s in running) - num_available
        for victim in sorted(running, key=lambda s: (s.priority, s.seq_id), reverse=True)[:-1]:
            if num_short <= 0:
                break
            num_short -= victim.num_blocks_short(horizon, self._block_size) + self._send_victim(victim)

    def _send_victim(self, victim: Sequence) -> int:
        """Begins to copy what nobody else has of it, if that is worth it; how many blocks are its own."""
        own = [block_id for block_id in victim.block_ids if self.swapper.num_tables(block_id) == 1]
        leaving = [block_id for block_id in own if self.swapper.can_go_out(block_id)]
        num_full = victim.num_computed_tokens // self._block_size
        if self._is_cheaper(len(leaving) + num_full, num_full * self._block_size):
            for block_id in leaving[: self.swapper.num_outs_left]:
                self.swapper.begin_out(block_id)
        return len(own)

    def _is_cheaper(self, num_moves: int, num_tokens: int) -> bool:
        return self._preemption is Preemption.SWAP or self._costs.move_s(num_moves) < self._costs.compute_s(num_tokens)

    def _horizon(self, lookahead: int) -> int:
        """Steps: until the next block of every sequence, and as long as it takes to move what may be under way."""
        num_steps = 0
        if self._costs.step_s and self._costs.bytes_per_s:
            num_steps = int(self._costs.move_s(self.swapper.num_outs_left) / self._costs.step_s)
        return lookahead + self._block_size + min(num_steps, MAX_STEPS_AHEAD)
