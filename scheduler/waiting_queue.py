"""Who is next: by priority, then fairly between tenants, then by arrival.

Fairness is the virtual token counter of Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024): the
tenant that has been served the fewest tokens goes first, and one that comes back from idleness starts level with the
least served of the active ones, or with the last one that waited: idleness saves no credit. Pure.
"""

from collections.abc import Iterator
from heapq import heappop, heappush

from scheduler.sequence import Sequence


class WaitingQueue:
    """Sequences that wait for admission, preempted ones included."""

    def __init__(self) -> None:
        self._queues: dict[tuple[int, str], list[tuple[int, Sequence]]] = {}  # (priority, tenant) -> heap by arrival
        self._served_tokens: dict[str, int] = {}
        self._last_to_leave = ""
        """The tenant whose last waiting sequence went last."""
        self._seq_ids: set[int] = set()

    def __len__(self) -> int:
        return len(self._seq_ids)

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence.seq_id in self._seq_ids

    def push(self, sequence: Sequence) -> None:
        """Queues a sequence by its arrival: seq_ids grow with it, so a preempted one goes before later arrivals."""
        key = (sequence.priority, sequence.tenant)
        if not any(tenant == sequence.tenant for _, tenant in self._queues):
            active = [self._served_tokens[tenant] for _, tenant in self._queues]
            level = min(active) if active else self._served_tokens.get(self._last_to_leave, 0)
            self._served_tokens[sequence.tenant] = max(self._served_tokens.get(sequence.tenant, 0), level)
        heappush(self._queues.setdefault(key, []), (sequence.seq_id, sequence))
        self._seq_ids.add(sequence.seq_id)

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out wherever it stands."""
        key = (sequence.priority, sequence.tenant)
        heap = self._queues[key]
        heap.remove((sequence.seq_id, sequence))
        heap.sort()
        self._seq_ids.discard(sequence.seq_id)
        if not heap:
            del self._queues[key]
            if not any(tenant == sequence.tenant for _, tenant in self._queues):
                self._last_to_leave = sequence.tenant
            self._forget_idle_tenants()

    def charge(self, tenant: str, num_tokens: int) -> None:
        """Counts tokens served to a tenant."""
        if tenant in self._served_tokens:
            self._served_tokens[tenant] += num_tokens

    def __iter__(self) -> Iterator[Sequence]:
        """All sequences in the order in which they would be admitted if nothing were charged between them."""
        for priority in sorted({priority for priority, _ in self._queues}):
            tenants = [tenant for p, tenant in self._queues if p == priority]
            heads = [(self._served_tokens[tenant], tenant, list(self._queues[priority, tenant])) for tenant in tenants]
            turns = [(served, heap[0][0], tenant, heap) for served, tenant, heap in heads]
            while turns:
                served, _, tenant, heap = min(turns, key=lambda turn: turn[:3])
                turns = [turn for turn in turns if turn[2] != tenant]
                _, sequence = heappop(heap)
                yield sequence
                if heap:
                    turns.append((served + len(sequence.token_ids), heap[0][0], tenant, heap))

    def _forget_idle_tenants(self) -> None:
        """Keeps the counters of as many idle tenants as there are active ones, and at least 1,000."""
        if len(self._served_tokens) > 1000 + 2 * len(self._queues):
            active = {self._last_to_leave, *(tenant for _, tenant in self._queues)}
            self._served_tokens = {t: served for t, served in self._served_tokens.items() if t in active}
