"""A Redis Cluster on this machine, for tests and measurements: masters alone, from the binaries that other tests use.

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
    """Nodes that share all slots evenly; `start` returns once each of them serves."""

    def __init__(self, kind: str, num_nodes: int = 3) -> None:
        self.kind = kind
        self.num_nodes = num_nodes
        self.nodes: list[RedisServer] = []
        self._slots: list[tuple[range, int]] = []

    def start(self) -> "RedisCluster":
        """Starts the nodes, introduces them and waits until they agree. Raises ClusterUnsupportedError."""
        try:
            ports = [self._start_node() for _ in range(self.num_nodes)]
            self._join(ports)
            self._wait_until_agreed(ports)
        except BaseException:
            self.close()
            raise
        return self

    def _start_node(self) -> int:
        """A node on a free port; another port where somebody else was faster."""
        for attempt in range(5):
            port = _free_port()
            flags = ("--port", str(port), "--bind", "127.0.0.1", "--cluster-enabled", "yes")
            node = RedisServer(self.kind, *flags, "--cluster-node-timeout", "60000")  # a slow machine is not a dead one
            self.nodes.append(node)
            try:
                node.start()
                return port
            except RuntimeError:
                self.nodes.pop().close()
                if attempt == 4:
                    raise
        raise AssertionError("unreachable")

    def _join(self, ports: list[int]) -> None:
        for i, node in enumerate(self.nodes):
            first, end = (NUM_SLOTS * k // self.num_nodes for k in (i, i + 1))
            with node.client() as client:
                try:
                    client.execute_command("CLUSTER", "SET-CONFIG-EPOCH", i + 1)
                except ResponseError as error:
                    raise ClusterUnsupportedError(str(error)) from None
                client.execute_command("CLUSTER", "ADDSLOTS", *range(first, end))
                client.execute_command("CLUSTER", "MEET", "127.0.0.1", ports[0])

    def _wait_until_agreed(self, ports: list[int]) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        for node in self.nodes:
            with node.client() as client:
                while True:
                    with contextlib.suppress(RedisError):
                        self._slots = _owners(client.execute_command("CLUSTER", "SLOTS"), ports)
                        state: bytes = client.execute_command("CLUSTER", "INFO")
                        num_owned = sum(len(slots) for slots, _ in self._slots)
                        if b"cluster_state:ok" in state and num_owned == NUM_SLOTS:
                            break
                    if time.monotonic() > deadline:
                        raise RuntimeError("the nodes of the cluster do not agree")
                    time.sleep(0.02)

    def node_of(self, key: str | bytes) -> int:
        """Number of the node that owns a key, as the cluster says."""
        with self.nodes[0].client() as client:
            slot = int(client.execute_command("CLUSTER", "KEYSLOT", key))
        return next(node for slots, node in self._slots if slot in slots)

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
