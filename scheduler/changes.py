"""The rows of one numbered script: what the mirror has decided and Redis is to check and apply.

Plain values; the mirror fills them in, the store packs them, and they are applied in the order of the fields.
"""

from dataclasses import dataclass, field, fields


@dataclass(slots=True)
class Changes:
    """Rows per verb. Within a script releases come before forks and these before reservations: each may take what the
    ones before it freed, and nobody may fork from a sequence that the same script releases."""

    append: list[tuple[int, int, list[int]]] = field(default_factory=list)
    """(seq_id, offset in the segment's log in entries, entries: token ids, or the words of a search or
    of a choice that is ranked)."""
    publish: list[tuple[int, bytes]] = field(default_factory=list)
    """(block_id, block_hash)."""
    copied: list[int] = field(default_factory=list)
    """Copy destinations whose copy has run: the source is no longer held by it."""
    swapped_out: list[int] = field(default_factory=list)
    """Host blocks whose copy from a block has run."""
    swapped_in: list[int] = field(default_factory=list)
    """Blocks whose copy from a host block has run."""
    release: list[int] = field(default_factory=list)
    """seq_ids whose whole table is given back."""
    fork: list[tuple[int, int, int, int, int, int]] = field(default_factory=list)
    """(parent seq_id, child seq_id, blocks shared, copy source, copy destination, tokens to copy); 0: no copy."""
    describe: list[tuple[int, bytes]] = field(default_factory=list)
    """(seq_id, its packed row): written at arrival, rewritten with each attempt."""
    computed: list[tuple[int, int]] = field(default_factory=list)
    """(seq_id, num_computed_tokens, or -1 once it has caught up)."""
    reserve: list[tuple[int, list[tuple[int, bytes]], list[int]]] = field(default_factory=list)
    """(seq_id, shared (block_id, expected hash), new block_ids), appended to the table in this order."""
    swap_out: list[tuple[int, bytes, int]] = field(default_factory=list)
    """(block_id, its block_hash, the host block that it is to be copied into)."""
    swap_in: list[tuple[int, bytes, int]] = field(default_factory=list)
    """(host block, its block_hash, the block that it is to be copied into)."""
    pin: list[tuple[int, bytes]] = field(default_factory=list)
    """(name of a table, its packed pin; empty where table and pin go)."""
    close: list[int] = field(default_factory=list)
    """seq_ids that are ended and recorded as such: the row goes, the log stays until it expires."""
    forget: list[int] = field(default_factory=list)
    """seq_ids that have moved to another worker: the row goes, the log stays with no expiry."""

    segments: dict[int, int] = field(default_factory=dict)
    """seq_id -> output index at which its log under this worker begins, where that is not 0."""

    def release_table(self, seq_id: int) -> None:
        """A whole table is given back, and what was computed in it is void; what follows is of its next attempt."""
        self.release.append(seq_id)
        if self.computed:
            self.computed = [row for row in self.computed if row[0] != seq_id]

    def close_row(self, seq_id: int, first_index: int) -> None:
        """Closes a sequence whose log under this worker begins at `first_index`."""
        self.close.append(seq_id)
        if first_index:
            self.segments[seq_id] = first_index

    def take(self) -> "Changes":
        """All rows so far, in a Changes of their own; this one is empty afterwards."""
        taken = Changes(**{f.name: getattr(self, f.name) for f in fields(self)})
        for f in fields(self):
            setattr(self, f.name, type(getattr(self, f.name))())
        return taken

    def __bool__(self) -> bool:
        return bool(
            self.append
            or self.publish
            or self.reserve
            or self.release
            or self.describe
            or self.computed
            or self.close
            or self.fork
            or self.copied
            or self.swapped_out
            or self.swapped_in
            or self.swap_out
            or self.swap_in
            or self.pin
            or self.forget
        )
