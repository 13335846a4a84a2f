"""Blocks between a worker's pool and its host pool, and where a prefix is found in the two. Pure.

What moves is a full block under its hash, so one mechanism is both the host tier of the prefix cache and the swapping
of preempted sequences: what goes out becomes a hit on the host, whoever is admitted takes in what the host has of its
prefix, and a preempted sequence's hashes are pinned there until it comes back for them. (Its last, partial block is run
again, together with the token that it would run anyway.)

A swap runs beside the steps and holds its source and its destination until the worker has reported it. What comes in is
published only then, and whoever waits for it is not planned before.
"""

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import NamedTuple

from scheduler.block_manager import BlockManager
from scheduler.host_pool import HostImage, HostPool
from scheduler.sequence import Sequence, SequenceStatus

MAX_SWAP_OUTS = 64
"""Blocks on their way out at most: what swaps hold nobody else can have."""


@dataclass(frozen=True, slots=True)
class Prefix:
    """Where the blocks of a prefix are: on the device, or (0) on the host."""

    block_ids: list[int] = field(default_factory=list)
    host_block_ids: dict[int, int] = field(default_factory=dict)
    """By place in the prefix, where block_ids has 0."""

    def __len__(self) -> int:
        return len(self.block_ids)

    @property
    def shared(self) -> list[int]:
        """Those on the device."""
        return [block_id for block_id in self.block_ids if block_id] if self.host_block_ids else self.block_ids


class Swap(NamedTuple):
    """A copy between the pools."""

    is_out: bool
    block_id: int
    host_block_id: int


@dataclass(slots=True)
class _SwapIn:
    """The sequence that waits for it, in which attempt; one that an earlier owner began may have none."""

    host_block_id: int
    sequence: Sequence | None = None
    attempt: int = 0

    def note_arrival(self) -> None:
        sequence = self.sequence
        if sequence is not None and sequence.status is SequenceStatus.RUNNING and sequence.attempt == self.attempt:
            sequence.num_arriving_blocks -= 1


@dataclass(slots=True)
class _Underway:
    """Swaps that the worker has not reported, by destination, and the contents that they move."""

    outs: dict[int, int] = field(default_factory=dict)
    ins: dict[int, _SwapIn] = field(default_factory=dict)
    leaving: dict[bytes, int] = field(default_factory=dict)
    """hash -> block."""
    arriving: set[bytes] = field(default_factory=set)


class Swapper:
    """Owns a worker's host pool and its swaps."""

    def __init__(self, blocks: BlockManager, host: HostPool, block_size: int) -> None:
        self.host = host
        self.block_size = block_size
        self.takes_hits = True
        """Whether what only the host has is worth taking in, or sending out; whoever knows says so."""
        self.takes_preempted = True
        """Whether preempted sequences take in anything, likewise."""
        self.num_blocks_out = 0
        self.num_blocks_in = 0
        self.started: list[Swap] = []
        """Decided, and not told to Redis yet; whoever tells it takes them."""
        self._blocks = blocks
        self._underway = _Underway()
        self._set_aside: dict[int, list[bytes]] = {}  # hashes pinned for a preempted sequence, by seq_id
        self._sent: dict[int, bytes] = {}  # block -> the content that was sent out from it last

    # -- an earlier owner's swaps -------------------------------------------------------------------------------------

    def adopt(self, image: HostImage) -> list[Swap]:
        """Takes over the swaps that `host` was made with; all of them have to be issued again."""
        for host_block_id, block_id in image.swap_outs.items():
            self._underway.outs[host_block_id] = block_id
            self._underway.leaving[self._blocks.hash_of(block_id)] = block_id
        for block_id, host_block_id in image.swap_ins.items():
            self._underway.ins[block_id] = _SwapIn(host_block_id)
            self._underway.arriving.add(self.host.hash_of(host_block_id))
        outs = [Swap(True, block_id, host_block_id) for host_block_id, block_id in image.swap_outs.items()]
        return outs + [Swap(False, block_id, host_block_id) for block_id, host_block_id in image.swap_ins.items()]

    def adopt_running(self, sequence: Sequence) -> None:
        """A sequence of an earlier owner, whose blocks may be among those that are on their way in."""
        for block_id in sequence.block_ids:
            swap_in = self._underway.ins.get(block_id)
            if swap_in is not None:
                swap_in.sequence, swap_in.attempt = sequence, sequence.attempt
                sequence.num_arriving_blocks += 1

    def image(self) -> HostImage:
        """The state that a mirror rebuilt from Redis must equal."""
        swap_ins = {block_id: swap_in.host_block_id for block_id, swap_in in self._underway.ins.items()}
        return self.host.image(self._underway.outs, swap_ins)

    # -- prefixes -----------------------------------------------------------------------------------------------------

    def find_prefix(self, hashes: Seq[bytes], is_preempted: bool = False) -> Prefix:
        """The longest prefix of the chain `hashes` that is published or on the host, block by block."""
        found = Prefix(self._blocks.find_prefix(hashes))
        if is_preempted and not self.takes_preempted:
            return found
        for place in range(len(found), len(hashes)):
            block_id = self._blocks.block_of(hashes[place])
            if not block_id:
                host_block_id = self._host_hit(hashes[place])
                if not host_block_id:
                    break
                found.host_block_ids[place] = host_block_id
            found.block_ids.append(block_id)
        return found

    def is_known(self, hash_: bytes) -> bool:
        """Whether a block of this content need not be computed."""
        return bool(self._blocks.block_of(hash_) or self._host_hit(hash_) or self.is_arriving(hash_))

    def is_arriving(self, hash_: bytes) -> bool:
        """Whether a block of this content is on its way in, and not to be found before."""
        return hash_ in self._underway.arriving

    def reserve(self, sequence: Sequence, found: Prefix, num_new: int) -> list[int]:
        """A sequence's first blocks: shared ones, ones that what the host has is copied into, and fresh ones."""
        block_ids = self._blocks.reserve(sequence.seq_id, found.block_ids, num_new)
        for place, host_block_id in found.host_block_ids.items():
            self._begin_in(host_block_id, block_ids[place], sequence)
        self.give_up(sequence)
        return block_ids

    def _host_hit(self, hash_: bytes) -> int:
        return self.host.block_of(hash_) if self.takes_hits and hash_ not in self._underway.arriving else 0

    # -- preempted sequences ------------------------------------------------------------------------------------------

    def set_aside(self, sequence: Sequence) -> None:
        """What the host has of a preempted sequence, or is getting, stays there until it is back."""
        num_full = sequence.num_computed_tokens // self.block_size
        kept = [hash_ for hash_ in sequence.block_hashes[:num_full] if not self.is_missing(hash_)]
        if kept:
            self._set_aside[sequence.seq_id] = kept
            self.host.pin(kept)

    def give_up(self, sequence: Sequence) -> None:
        """A sequence has come back for what was set aside, or never will."""
        if sequence.seq_id in self._set_aside:
            self.host.unpin(self._set_aside.pop(sequence.seq_id))

    # -- swaps --------------------------------------------------------------------------------------------------------

    @property
    def num_outs_left(self) -> int:
        """Blocks that may be sent out now."""
        return min(MAX_SWAP_OUTS - len(self._underway.outs), self.host.num_available_blocks)

    def is_missing(self, hash_: bytes) -> bool:
        """Whether the host neither has this content nor is getting it."""
        return not self.host.block_of(hash_) and hash_ not in self._underway.leaving

    def can_go_out(self, block_id: int) -> bool:
        """Whether a block is published, is missing on the host, and has not been sent there since it was filled.

        What the host has evicted again is not sent once more: two contents would oust each other for ever.
        """
        hash_ = self._blocks.find_hash(block_id)
        return hash_ is not None and self.is_missing(hash_) and self._sent.get(block_id) != hash_

    def num_tables(self, block_id: int) -> int:
        """Tables that name a block of a table, and copies: what it is held by, but for its way out."""
        hash_ = self._blocks.find_hash(block_id)
        is_leaving = hash_ is not None and self._underway.leaving.get(hash_) == block_id
        return self._blocks.ref_count(block_id) - is_leaving

    def begin_out(self, block_id: int) -> None:
        """A published block is copied to the host; the caller has seen that it can go out, and that there is room."""
        host_block_id, hash_ = self.host.take(), self._blocks.hash_of(block_id)
        self._blocks.hold(block_id)
        self._underway.outs[host_block_id] = block_id
        self._underway.leaving[hash_] = block_id
        self._sent[block_id] = hash_
        self._blocks.changes.swap_out.append((block_id, hash_, host_block_id))
        self.started.append(Swap(True, block_id, host_block_id))

    def _begin_in(self, host_block_id: int, block_id: int, sequence: Sequence) -> None:
        hash_ = self.host.hash_of(host_block_id)
        self.host.hold(host_block_id)
        self._blocks.hold(block_id)
        self._underway.ins[block_id] = _SwapIn(host_block_id, sequence, sequence.attempt)
        self._underway.arriving.add(hash_)
        sequence.num_arriving_blocks += 1
        self._blocks.changes.swap_in.append((host_block_id, hash_, block_id))
        self.started.append(Swap(False, block_id, host_block_id))

    def finish(self, host_block_ids: Iterable[int], block_ids: Iterable[int]) -> None:
        """The worker has written these host blocks and these blocks. Raises KeyError for one that is not on its way."""
        for host_block_id in host_block_ids:
            block_id = self._underway.outs.pop(host_block_id)
            hash_ = self._blocks.hash_of(block_id)
            del self._underway.leaving[hash_]
            self.host.fill(host_block_id, hash_)
            self._blocks.let_go(block_id)
            self._blocks.changes.swapped_out.append(host_block_id)
            self.num_blocks_out += 1
        for block_id in block_ids:
            swap_in = self._underway.ins.pop(block_id)
            hash_ = self.host.hash_of(swap_in.host_block_id)
            self._underway.arriving.remove(hash_)
            self._blocks.publish(block_id, hash_)  # or another block of this content was, in the meantime
            self._blocks.let_go(block_id)
            self.host.let_go(swap_in.host_block_id)
            self._blocks.changes.swapped_in.append(block_id)
            self.num_blocks_in += 1
            swap_in.note_arrival()

    # -- for tests and idle moments -----------------------------------------------------------------------------------

    @property
    def held_block_ids(self) -> list[int]:
        """Blocks that swaps hold."""
        return [*self._underway.outs.values(), *self._underway.ins]

    def check(self) -> None:
        """Asserts rule 1 of the design for the host pool."""
        self.host.check([*self._underway.outs, *(swap_in.host_block_id for swap_in in self._underway.ins.values())])
