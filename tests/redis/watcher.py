"""What must always hold, on the bytes that Redis holds: rules 1 to 8, as far as blocks, logs and numbers go."""

from collections import Counter
from collections.abc import Awaitable, Callable

from redis import Redis

from scheduler.block_manager import BlockManager
from scheduler.changes import Changes
from scheduler.host_pool import HostPool
from scheduler.keys import log_key, worker_key
from scheduler.store import WorkerImage
from scheduler.swapper import Swapper
from tests.redis.model_owner import Owner
from tests.redis.model_state import World
from tests.redis.redis_dump import Dump, dump, parse_pool, parse_u32
from tests.redis.worker_model import BLOCK_SIZE, Worker


class Watcher:
    """Looks at one worker's keys, and remembers what it saw."""

    def __init__(
        self, world: World, client: Redis, worker: str, run: Callable[[Awaitable[WorkerImage]], WorkerImage]
    ) -> None:
        self._world = world
        self._client = client
        self._worker = worker
        self._run = run
        self._logs_seen: dict[bytes, bytes] = {}
        self._epoch_seen = self._n_seen = 0

    def check(self, owner: Owner, worker: Worker) -> None:
        """Asserts all of it."""
        raw = dump(self._client)
        meta = {key.decode(): value.decode() for key, value in self._hash(raw, "meta").items()}
        self._check_numbers(meta)
        self._check_partition(raw)
        self._check_logs(raw)
        image = self._run(owner.store.load())
        self._check_image(image, owner)
        if meta.get("incarnation", "") == worker.incarnation:
            for block_id, hash_ in image.pool.hashes.items():  # rule 2, and rule 4: nothing was written there since
                assert worker.holds(block_id, *self._world.contents[hash_]), "an index entry of an unfilled block"
            for block_id, hash_ in image.host.hashes.items():
                assert worker.holds_on_host(block_id, *self._world.contents[hash_]), "a host block that is not filled"

    def _check_numbers(self, meta: dict[str, str]) -> None:
        """Rules 7 and 8: numbers only grow."""
        n, epoch = int(meta.get("n", 0)), int(meta["epoch"])
        assert n >= self._n_seen, "n fell"
        assert epoch >= self._epoch_seen, "the epoch fell"
        self._n_seen, self._epoch_seen = n, epoch
        assert int(meta.get("committed_step_id", 0)) == self._world.expected[n].committed_step_id

    def _check_partition(self, raw: Dump) -> None:
        """Rule 1 on the raw bytes, with references counted from the tables and copies themselves."""
        pool = parse_pool(self._bytes(raw, "pool"))
        counts = Counter(block_id for table in self._hash(raw, "tables").values() for block_id in parse_u32(table))
        for copy, row in self._hash(raw, "copies").items():
            counts[int(copy)] += 1
            counts[parse_u32(row)[0]] += 1
        swap_outs = {int(h): parse_u32(row)[0] for h, row in self._hash(raw, "swap_outs").items()}
        swap_ins = {int(block_id): parse_u32(row)[0] for block_id, row in self._hash(raw, "swap_ins").items()}
        counts.update([*swap_outs.values(), *swap_ins])
        self._check_host(raw, Counter([*swap_outs, *swap_ins.values()]))
        num_free = num_referenced = num_cached = 0
        for block_id, (ref_count, hash_) in enumerate(pool):
            assert ref_count == counts[block_id], f"block {block_id} has {ref_count} references"
            num_referenced += ref_count > 0
            num_cached += ref_count == 0 and hash_ is not None
            num_free += ref_count == 0 and hash_ is None and block_id > 0
        assert num_free + num_referenced + num_cached == max(0, len(pool) - 1)
        assert not pool or pool[0] == (0, None), "the null block is in use"
        index = {hash_: int(block_id) for hash_, block_id in self._hash(raw, "index").items()}
        assert index == {hash_: block_id for block_id, (_, hash_) in enumerate(pool) if hash_ is not None}

    def _check_host(self, raw: Dump, counts: Counter[int]) -> None:
        """The same for the host pool; one content is in one host block."""
        host = parse_pool(self._bytes(raw, "host"))
        for block_id, (ref_count, hash_) in enumerate(host):
            assert ref_count == counts[block_id], f"host block {block_id} has {ref_count} references"
            assert block_id > 0 or (ref_count, hash_) == (0, None), "host block 0 is in use"
        hashes = [hash_ for _, hash_ in host if hash_ is not None]
        assert len(set(hashes)) == len(hashes), "one content in two host blocks"

    def _check_image(self, image: WorkerImage, owner: Owner) -> None:
        """A mirror rebuilt from Redis alone is what its last script left; once all is settled, it is the live one."""
        assert image == self._world.expected[self._n_seen].image
        rebuilt = BlockManager.from_image(image.pool, Changes())
        swapper = Swapper(rebuilt, HostPool.from_image(image.host), BLOCK_SIZE)
        assert len(swapper.adopt(image.host)) == len(image.host.swap_outs) + len(image.host.swap_ins)
        rebuilt.check(image.tables.values(), swapper.held_block_ids)
        swapper.check()
        assert (rebuilt.image(), swapper.image()) == (image.pool, image.host)
        assert all(image.tables[pin_id] for pin_id in image.pins), "a pin of nothing"
        live = owner.blocks
        live.check(owner.tables, owner.swapper.held_block_ids)
        owner.swapper.check()
        if owner.is_settled:
            assert (rebuilt.image(), swapper.image()) == (live.image(), owner.swapper.image())
            assert rebuilt.num_free_blocks == live.num_free_blocks
            assert rebuilt.num_cached_blocks == live.num_cached_blocks
            assert rebuilt.num_referenced_blocks == live.num_referenced_blocks
            self._world.events["the live mirror rebuilt"] += 1

    def _check_logs(self, raw: Dump) -> None:
        """Rule 6: what was in a log stays there; what a client may have is there; kept logs are as they were left."""
        logs = {key: value for key, (value, _) in raw.items() if b":log:" in key and isinstance(value, bytes)}
        for key, seen in self._logs_seen.items():
            assert logs[key].startswith(seen), f"{key!r} was rewritten"
        self._logs_seen = logs
        for seq_id, num_delivered in self._world.delivered.items():
            assert len(logs[log_key(self._worker, seq_id)]) >= 4 * num_delivered, "a client knows more than the log"
        kept = self._world.expected[self._n_seen].kept_logs
        for seq_id, story in self._world.stories.items():
            key = log_key(self._worker, seq_id)
            log = parse_u32(logs.get(key, b""))
            assert log == [story.output(i) for i in range(len(log))], "not what the sequence says"
            if log:
                assert (log, raw[key][1]) == kept.get(seq_id, (log, False))

    def _bytes(self, raw: Dump, part: str) -> bytes:
        value, _ = raw.get(worker_key(self._worker, part).encode(), (b"", False))
        assert isinstance(value, bytes)
        return value

    def _hash(self, raw: Dump, part: str) -> dict[bytes, bytes]:
        value, _ = raw.get(worker_key(self._worker, part).encode(), ({}, False))
        assert isinstance(value, dict)
        return value
