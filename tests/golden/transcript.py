"""A simulation written down for people: per round, what came back, what was planned, what Redis was told."""

from collections.abc import Iterable

from pagoda.v1 import worker_pb2 as pb

from scheduler.changes import Changes
from tests.unit.planner_sim import Round, Simulation


class Transcript:
    """Collects lines. Hashes get short names, in the order in which they appear."""

    def __init__(self, title: str, simulation: Simulation) -> None:
        limits = simulation.limits
        self._simulation = simulation
        self._names: dict[bytes, str] = {}
        self.lines = [
            title,
            f"pool: {limits.num_blocks} blocks of {limits.block_size} tokens;"
            f" step: {limits.max_num_batched_tokens} tokens, {limits.max_num_seqs} sequences;"
            f" Redis: answers after {limits.ack_rounds} round{'' if limits.ack_rounds == 1 else 's'}",
        ]

    def write(self, rounds: Iterable[Round]) -> str:
        """The whole text; rounds in which nothing happens are left out."""
        for round_ in rounds:
            lines = [
                *self._arrivals(round_.number),
                *(line for result, _ in round_.results for line in self._result(result)),
                *(line for plan, _ in round_.plans for line in self._plan(plan)),
                *self._script(round_.changes),
            ]
            if lines:
                self.lines += ["", f"round {round_.number}", *(f"  {line}" for line in lines)]
        blocks = self._simulation.blocks
        counts = (blocks.num_free_blocks, blocks.num_referenced_blocks, blocks.num_cached_blocks)
        self.lines += ["", "at the end: {} free, {} referenced, {} cached".format(*counts)]
        return "\n".join(self.lines) + "\n"

    def _arrivals(self, number: int) -> Iterable[str]:
        for seq_id, arrival in enumerate(self._simulation.arrivals, start=1):
            if arrival.round == number:
                extra = f", priority {arrival.priority}" if arrival.priority else ""
                yield f"arrives   {seq_id}: {len(arrival.prompt)} prompt tokens, at most {arrival.max_tokens}{extra}"
            if arrival.cancel_round == number:
                yield f"cancelled {seq_id}"

    def _result(self, result: pb.StepResult) -> Iterable[str]:
        at = 0
        rows = []
        for seq_id, computed, first, count in zip(
            result.seq_ids, result.num_computed_tokens, result.first_output_indexes, result.num_tokens, strict=True
        ):
            tokens = "".join(f" output[{first + i}]={result.token_ids[at + i]}" for i in range(count))
            at += count
            rows.append(f"{seq_id} has {computed}{tokens}")
        yield f"result {result.step_id}: {'; '.join(rows)}"

    def _plan(self, plan: pb.StepPlan) -> Iterable[str]:
        rows = zip(plan.scheduled_seq_ids, plan.num_scheduled_tokens, strict=True)
        steps = f" in {plan.num_steps} steps" if plan.num_steps > 1 else ""
        yield f"plan {plan.step_id}: run {', '.join(f'{count} of {seq_id}' for seq_id, count in rows)}{steps}"
        if plan.removed_seq_ids:
            yield f"    remove {_ids(plan.removed_seq_ids)}"
        for added in plan.added:
            life = f" (attempt {added.attempt})" if added.attempt else ""
            num_tokens = added.num_computed_tokens + len(added.token_ids)
            start = f"{num_tokens} tokens, {added.num_computed_tokens} computed"
            yield f"    add {added.seq_id}{life}: {start}, blocks {_ids(added.block_ids)}"
        at = 0
        for seq_id, count in zip(plan.appended_seq_ids, plan.appended_num_blocks, strict=True):
            yield f"    blocks of {seq_id}: + {_ids(plan.appended_block_ids[at : at + count])}"
            at += count
        if plan.freed_block_ids:
            yield f"    freed blocks: {_ids(plan.freed_block_ids)}"

    def _script(self, changes: Changes) -> Iterable[str]:
        for seq_id, offset, tokens in changes.append:
            yield f"log       {seq_id}[{offset}] = {_ids(tokens)}"
        if changes.publish:
            yield f"publish   {', '.join(f'block {i} as {self._name(hash_)}' for i, hash_ in changes.publish)}"
        for seq_id in changes.release:
            yield f"release   {seq_id}"
        for seq_id, shared, new in changes.reserve:
            hits = f"share {', '.join(f'{i} ({self._name(hash_)})' for i, hash_ in shared)}" if shared else ""
            fresh = f"take {_ids(new)}" if new else ""
            yield f"reserve   {seq_id}: {', '.join(filter(None, (hits, fresh)))}"

    def _name(self, hash_: bytes) -> str:
        return self._names.setdefault(hash_, f"h{len(self._names) + 1}")


def _ids(ids: Iterable[int]) -> str:
    return " ".join(map(str, ids))
