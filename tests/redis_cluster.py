"""A Redis Cluster on this machine, for tests and measurements, from the binaries that other tests use.

Each node listens on loopback, as the nodes' own talk needs, and on a unix socket, through which it is used. Whoever
sends a script chooses the node: `node_of` asks the cluster which one owns a key.
"""

import contextlib
import random
import socket
import time
from typing import Any

from redis.exceptions import RedisError, ResponseError

from tests.redis_servers import RedisServer

NUM_SLOTS = 16384
START_TIMEOUT_S = 30.0
BUS_OFFSET = 10_000
FIRST_PORT, LAST_PORT = 11_000, 22_000
"""These and their bus ports lie below the ones that systems give to outgoing connections."""


class ClusterUnsupportedError(Exception):
    """The server binary was built without it."""


class RedisCluster:
    """Masters that share all slots evenly, then as many replicas; `start` returns once each of them serves.

    A node that dies is not replaced unless `node_timeout_ms` is short: a slow machine is not a dead one.
    """

    def __init__(
        self, kind: str, num_masters: int = 3, *flags: str, has_replicas: bool = False, node_timeout_ms: int = 60_000
    ) -> None:
        self.kind = kind
        self.num_masters = num_masters
        self.has_replicas = has_replicas
        self.nodes: list[RedisServer] = []
        self.ports: list[int] = []
        timeout = ("--cluster-node-timeout", str(node_timeout_ms))
        self._flags = (*flags, *timeout, "--repl-diskless-sync-delay", "0")
        self._slots: list[tuple[range, int]] = []

    def start(self) -> "RedisCluster":
        """Starts the nodes, introduces them and waits until they agree. Raises ClusterUnsupportedError."""
        try:
            self.ports += [self._start_node() for _ in range(self.num_masters * (1 + self.has_replicas))]
            self._join()
            self._wait_until_agreed()
            if self.has_replicas:
                self._replicate()
        except BaseException:
            self.close()
            raise
        return self

    def _start_node(self) -> int:
        """A node on a free port; another port where somebody else was faster."""
        for attempt in range(5):
            port = _free_port()
            flags = ("--port", str(port), "--bind", "127.0.0.1", "--cluster-enabled", "yes")
            node = RedisServer(self.kind, *flags, *self._flags)
            self.nodes.append(node)
            try:
                node.start()
                return port
            except RuntimeError:
                self.nodes.pop().close()
                if attempt == 4:
                    raise
        raise AssertionError("unreachable")

    def _join(self) -> None:
        for i, node in enumerate(self.nodes):
            with node.client() as client:
                try:
                    client.execute_command("CLUSTER", "SET-CONFIG-EPOCH", i + 1)
                except ResponseError as error:
                    raise ClusterUnsupportedError(str(error)) from None
                if i < self.num_masters:
                    first, end = (NUM_SLOTS * k // self.num_masters for k in (i, i + 1))
                    client.execute_command("CLUSTER", "ADDSLOTS", *range(first, end))
                client.execute_command("CLUSTER", "MEET", "127.0.0.1", self.ports[0])

    def _replicate(self) -> None:
        """Node i + num_masters follows node i."""
        deadline = time.monotonic() + START_TIMEOUT_S
        for i, node in enumerate(self.nodes[self.num_masters :]):
            with node.client() as client:
                client.execute_command("CLUSTER", "REPLICATE", self.node_id(i))
                while client.info("replication").get("master_link_status") != "up":
                    if time.monotonic() > deadline:
                        raise RuntimeError(f"node {self.num_masters + i} does not follow its master")
                    time.sleep(0.02)
        for node in self.nodes:
            with node.client() as client:
                while any(len(owners) < 4 for owners in client.execute_command("CLUSTER", "SLOTS")):
                    if time.monotonic() > deadline:
                        raise RuntimeError("not every node knows the replicas")
                    time.sleep(0.02)

    def _wait_until_agreed(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        for node in self.nodes:
            with node.client() as client:
                while True:
                    with contextlib.suppress(RedisError):
                        self._slots = _owners(client.execute_command("CLUSTER", "SLOTS"), self.ports)
                        state: bytes = client.execute_command("CLUSTER", "INFO")
                        num_owned = sum(len(slots) for slots, _ in self._slots)
                        if b"cluster_state:ok" in state and num_owned == NUM_SLOTS:
                            break
                    if time.monotonic() > deadline:
                        raise RuntimeError("the nodes of the cluster do not agree")
                    time.sleep(0.02)

    def node_of(self, key: str | bytes) -> int:
        """Number of the node that owned a key at the start, as the cluster said."""
        slot = self.slot_of(key)
        return next(node for slots, node in self._slots if slot in slots)

    def slot_of(self, key: str | bytes) -> int:
        """The slot of a key."""
        with self.nodes[0].client() as client:
            return int(client.execute_command("CLUSTER", "KEYSLOT", key))

    def node_id(self, number: int) -> str:
        """A node's name for itself."""
        with self.nodes[number].client() as client:
            return bytes(client.execute_command("CLUSTER", "MYID")).decode()

    def move(self, slot: int, source: int, target: int, pause_s: float = 0.0) -> None:
        """Moves a slot to another node key by key, with a pause after each, as resharding tools do."""
        source_id, target_id = self.node_id(source), self.node_id(target)
        with self.nodes[source].client() as old, self.nodes[target].client() as new:
            new.execute_command("CLUSTER", "SETSLOT", slot, "IMPORTING", source_id)
            old.execute_command("CLUSTER", "SETSLOT", slot, "MIGRATING", target_id)
            while keys := old.execute_command("CLUSTER", "GETKEYSINSLOT", slot, 1):
                old.execute_command("MIGRATE", "127.0.0.1", self.ports[target], keys[0], 0, 5000)
                time.sleep(pause_s)
        others = [number for number in range(self.num_masters) if number not in (source, target)]
        while any(self.owner_of(slot, number) != target for number in (target, source, *others)):
            for number in (target, source, *others):  # each is told: word of an earlier move may come later to some
                with self.nodes[number].client() as client:
                    client.execute_command("CLUSTER", "SETSLOT", slot, "NODE", target_id)

    def owner_of(self, slot: int, asked: int = 0) -> int:
        """The node that owns a slot now, as another one says."""
        with self.nodes[asked].client() as client:
            owners = _owners(client.execute_command("CLUSTER", "SLOTS"), self.ports)
        return next(node for slots, node in owners if slot in slots)

    def await_master(self, number: int) -> None:
        """Returns once a node is a master."""
        deadline = time.monotonic() + START_TIMEOUT_S
        with self.nodes[number].client() as client:
            while client.execute_command("ROLE")[0] != b"master":
                if time.monotonic() > deadline:
                    raise RuntimeError(f"node {number} does not take over")
                time.sleep(0.02)

    def close(self) -> None:
        """Ends all nodes and removes their folders; may be called twice."""
        for node in self.nodes:
            node.close()


def _owners(reply: list[list[Any]], ports: list[int]) -> list[tuple[range, int]]:
    """(slots, number of the node that owns them), from the answer of CLUSTER SLOTS."""
    return [(range(first, last + 1), ports.index(owner[1])) for first, last, owner, *_ in reply]


def _free_port() -> int:
    """A port that nobody listens on now, nor on its bus port."""
    while True:
        port = random.randint(FIRST_PORT, LAST_PORT)
        with contextlib.suppress(OSError), socket.socket() as probe, socket.socket() as bus_probe:
            probe.bind(("127.0.0.1", port))
            bus_probe.bind(("127.0.0.1", port + BUS_OFFSET))
            return port
