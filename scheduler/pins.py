"""Prefixes that a request asked to keep: tables that nobody runs, which hold their blocks until they expire. Pure.

A pin begins when its request's prompt is computed, and is a table like any other, so that nothing evicts its blocks and
whoever comes next finds it in Redis. All pins of a worker share a budget. They give way to a request that could not run
beside them at all: they make it wait for running sequences, never for themselves.
"""

from dataclasses import dataclass, replace
from struct import Struct

from scheduler.block_manager import BlockManager
from scheduler.sequence import Sequence

PIN_BIT = 1 << 63
"""Makes a table's name out of that of the sequence that asked for it."""
_EXPIRY = Struct("<d")


@dataclass(frozen=True, slots=True)
class Pin:
    """One request's."""

    request_id: str
    expires_at_s: float
    """Unix time."""
    block_ids: tuple[int, ...]

    def pack(self) -> bytes:
        """As Redis keeps it, beside the table."""
        return _EXPIRY.pack(self.expires_at_s) + self.request_id.encode()


def unpack_pin(data: bytes, block_ids: list[int]) -> Pin:
    """The inverse of Pin.pack."""
    return Pin(data[_EXPIRY.size :].decode(), _EXPIRY.unpack_from(data)[0], tuple(block_ids))


class Pins:
    """Of one worker's pool."""

    def __init__(self, blocks: BlockManager, max_blocks: int) -> None:
        self.max_blocks = max_blocks
        self.pinned: dict[int, Pin] = {}
        """By the table's name."""
        self._blocks = blocks
        self._promised: dict[int, int] = {}  # blocks of requests whose prompts are not computed, by seq_id

    @property
    def num_blocks(self) -> int:
        """Blocks that pins hold, each counted once."""
        return len({block_id for pin in self.pinned.values() for block_id in pin.block_ids})

    @property
    def num_blocks_left(self) -> int:
        """Of the budget, what is neither pinned nor promised."""
        return self.max_blocks - self.num_blocks - sum(self._promised.values())

    @property
    def next_expiry_s(self) -> float:
        """Unix time of the first expiry; infinite where there is none."""
        return min((pin.expires_at_s for pin in self.pinned.values()), default=float("inf"))

    def adopt(self, records: dict[int, bytes], tables: dict[int, list[int]]) -> None:
        """Takes an earlier owner's over."""
        self.pinned = {pin_id: unpack_pin(record, tables[pin_id]) for pin_id, record in records.items()}

    def promise(self, sequence: Sequence, num_blocks: int) -> None:
        """A request is to have its prompt pinned, as far as the budget goes."""
        self._promised[sequence.seq_id] = min(num_blocks, max(0, self.num_blocks_left))

    def take_back(self, sequence: Sequence) -> None:
        """It ends without."""
        self._promised.pop(sequence.seq_id, None)

    def pin(self, sequence: Sequence, num_blocks: int, now_s: float) -> None:
        """Keeps the first blocks of a sequence's chain, all of them published, as far as was promised."""
        num_promised = self._promised.pop(sequence.seq_id, 0)
        block_ids = self._blocks.find_prefix(sequence.block_hashes[: min(num_blocks, num_promised)])
        if block_ids:
            pin_id = sequence.seq_id | PIN_BIT
            pin = Pin(sequence.request_id, now_s + sequence.pin_s, tuple(block_ids))
            self.pinned[pin_id] = pin
            self._blocks.reserve(pin_id, block_ids, 0)
            self._blocks.changes.pin.append((pin_id, pin.pack()))

    def end(self, request_id: str) -> int:
        """A request's pin is to expire now; how many blocks it holds."""
        found = {pin_id: pin for pin_id, pin in self.pinned.items() if pin.request_id == request_id}
        self.pinned |= {pin_id: replace(pin, expires_at_s=0.0) for pin_id, pin in found.items()}
        return sum(len(pin.block_ids) for pin in found.values())

    def expire(self, now_s: float) -> None:
        """Lets go of those whose time is over."""
        for pin_id in self._settled():
            if self.pinned[pin_id].expires_at_s <= now_s:
                self._let_go(pin_id)

    def give_way(self) -> bool:
        """Lets go of the one that would expire first; False where there is none to let go of now."""
        pin_ids = self._settled()
        if pin_ids:
            self._let_go(min(pin_ids, key=lambda pin_id: self.pinned[pin_id].expires_at_s))
        return bool(pin_ids)

    def _settled(self) -> list[int]:
        """Those that Redis was told of before the script to come: within one, releases come before reservations."""
        fresh = {seq_id for seq_id, _, _ in self._blocks.changes.reserve} if self.pinned else set()
        return [pin_id for pin_id in self.pinned if pin_id not in fresh]

    def _let_go(self, pin_id: int) -> None:
        self._blocks.release(pin_id, self.pinned.pop(pin_id).block_ids)
        self._blocks.changes.pin.append((pin_id, b""))
