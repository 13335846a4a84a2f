"""The batch against a naive model under random plans, some begun while a step runs, and the plans that it refuses."""

from collections import deque
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from pagoda.v1 import worker_pb2 as pb

from worker.batch import Batch
from worker.errors import ProtocolError
from worker.step import BatchLimits, Progress, Sampled, StepInputs
from worker.wire import decode_plan

LIMITS = BatchLimits(block_size=16, max_num_seqs=6, max_num_batched_tokens=64, max_model_len=80)


@dataclass
class Naive:
    """One sequence, as a list of tokens."""

    attempt: int
    tokens: list[int]
    num_prompt: int
    num_computed: int
    blocks: list[int]
    temperature: float
    seed: int
    min_tokens: int
    end_token_ids: list[int] = field(default_factory=list)
    num_candidates: int = 0
    has_failed: bool = False
    num_unsent: int = 0
    """Tokens of which the worker never heard: they were computed when it was added."""

    def fail(self) -> None:
        """Forget a token that was to be sampled: nothing is left to run."""
        self.has_failed = True
        self.tokens.pop()
        self.num_computed = min(self.num_computed, len(self.tokens))


@dataclass
class Running:
    """A step that has begun: what each of its sequences is to be after it, and which sample.

    For the token that entry i of the newest one is to sample, ~i stands at the end of a naive sequence.
    """

    inputs: StepInputs
    naives: list[Naive]
    computed: list[int]
    indexes: list[int]
    samples: list[Naive]


def added(seq_id: int, naive: Naive) -> pb.AddedSequence:
    naive.num_unsent = naive.num_computed
    return pb.AddedSequence(
        seq_id=seq_id,
        attempt=naive.attempt,
        token_ids=naive.tokens[naive.num_computed :],
        num_prompt_tokens=naive.num_prompt,
        num_computed_tokens=naive.num_computed,
        block_ids=naive.blocks,
        num_blocks=[len(naive.blocks)],
        sampler=pb.SamplerParams(
            temperature=naive.temperature,
            seed=naive.seed,
            top_p=1.0,
            min_tokens=naive.min_tokens,
            end_token_ids=naive.end_token_ids,
            num_candidates=naive.num_candidates,
        ),
    )


class RandomPlans(RuleBasedStateMachine):
    """Collects changes into a plan, sends it, and compares all that the batch says with the naive sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.batch = Batch(LIMITS)
        self.model: dict[int, Naive] = {}
        self.plan = pb.StepPlan(epoch=1, step_id=1)
        self.touched: set[int] = set()
        self.next_seq_id = 1
        self.next_block = 1
        self.running: deque[Running] = deque()

    def blocks(self, count: int) -> list[int]:
        self.next_block += count
        return list(range(self.next_block - count, self.next_block))

    @rule(data=st.data())
    def add(self, data: st.DataObject) -> None:
        """A new sequence, or one that is known sent in full."""
        known = [seq_id for seq_id in self.model if seq_id not in self.touched]
        again = data.draw(st.sampled_from(known)) if known and data.draw(st.booleans()) else None
        seq_id = self.next_seq_id if again is None else again
        self.next_seq_id += again is None
        length = data.draw(st.integers(1, LIMITS.max_model_len))
        computed = data.draw(st.integers(0, length - 1))
        self.model[seq_id] = Naive(
            attempt=data.draw(st.integers(1, 5)),
            tokens=data.draw(st.lists(st.integers(0, 2**31 - 1), min_size=length, max_size=length)),
            num_prompt=data.draw(st.integers(1, length)),
            num_computed=computed,
            blocks=self.blocks(-(-computed // LIMITS.block_size)),
            temperature=data.draw(st.sampled_from([0.0, 0.5])),
            seed=data.draw(st.integers(0, 2**64 - 1)),
            min_tokens=data.draw(st.sampled_from([0, 3])),
            end_token_ids=data.draw(st.lists(st.integers(0, 99), max_size=3)),
        )
        self.plan.added.append(added(seq_id, self.model[seq_id]))
        self.touched.add(seq_id)

    @precondition(lambda self: set(self.model) - self.touched)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        seq_id = data.draw(st.sampled_from(sorted(set(self.model) - self.touched)))
        del self.model[seq_id]
        self.plan.removed_seq_ids.append(seq_id)

    @rule(data=st.data())
    def run(self, data: st.DataObject) -> None:
        chosen = data.draw(st.lists(st.sampled_from(sorted(self.model)), unique=True, max_size=6)) if self.model else []
        wanted = {seq_id: data.draw(st.integers(1, 20)) for seq_id in chosen}
        budget = LIMITS.max_num_batched_tokens
        for seq_id, num_tokens in wanted.items():
            naive = self.model[seq_id]
            short = -(-min(naive.num_computed + num_tokens, LIMITS.max_model_len) // LIMITS.block_size)
            new = self.blocks(max(0, short - len(naive.blocks)))
            naive.blocks += new
            if new:
                self.plan.appended_seq_ids.append(seq_id)
                self.plan.appended_num_blocks.append(len(new))
                self.plan.appended_block_ids.extend(new)
            budget -= max(0, min(num_tokens, len(naive.tokens) - naive.num_computed))
            self.plan.scheduled_seq_ids.append(seq_id)
            self.plan.num_scheduled_tokens.append(num_tokens)
        plan = decode_plan(self.plan)
        if budget < 0:
            with pytest.raises(ProtocolError, match="limits"):
                self.batch.apply(plan)
        else:
            inputs = self.batch.apply(plan)
            self.batch.begin(inputs)
            self.check(inputs, wanted)
            if len(self.running) == 2:
                self.commit()
        step_id = self.plan.step_id + 1
        self.plan = pb.StepPlan(epoch=1, step_id=step_id)
        self.touched = set()

    @precondition(lambda self: self.running)
    @rule()
    def end(self) -> None:
        """The step ends before the next plan is there."""
        self.commit()

    @invariant()
    def tokens_are_their_own(self) -> None:
        """Steps that end late write to no row that has been given to another sequence since."""
        for seq_id in set(self.model) - self.touched:
            tokens, row, first = self.model[seq_id].tokens, self.batch._row_of[seq_id], self.model[seq_id].num_unsent
            assert self.batch._token_ids[row, first : len(tokens)].tolist() == tokens[first:]
            assert self.batch._sequences["num_tokens"][row] == len(tokens)

    def check(self, inputs: StepInputs, wanted: dict[int, int]) -> None:
        assert len(self.batch) == len(self.model)
        ids, positions, slots, lens, samples = [], [], [], [], []
        for i, (seq_id, num_tokens) in enumerate(wanted.items()):
            naive = self.model[seq_id]
            end = min(naive.num_computed + num_tokens, len(naive.tokens))
            run = range(naive.num_computed, end)
            ids += [naive.tokens[p] for p in run]
            positions += run
            slots += [naive.blocks[p // 16] * 16 + p % 16 for p in run]
            if len(run):
                lens.append((len(run), end))
            if len(run) and end == len(naive.tokens) < LIMITS.max_model_len:
                samples.append((i, len(ids) - 1, naive))
            naive.num_computed = max(naive.num_computed, end)
        assert inputs.input_ids.tolist() == ids
        assert inputs.positions.tolist() == positions
        assert inputs.slot_mapping.tolist() == slots
        assert list(zip(inputs.query_lens.tolist(), inputs.context_lens.tolist(), strict=True)) == lens
        assert inputs.cu_seqlens_q.tolist() == [0, *np.cumsum([q for q, _ in lens]).tolist()]
        tables = [self.model[s].blocks[: -(-self.model[s].num_computed // 16)] for s in wanted]
        active = [
            t
            for i, t in enumerate(tables)
            if inputs.scheduled.num_computed_tokens[i] > inputs.scheduled.before["num_computed_tokens"][i]
        ]
        assert [row[: len(t)].tolist() for row, t in zip(inputs.block_tables, active, strict=True)] == active
        assert inputs.scheduled.sampling.tolist() == [i for i, _, _ in samples]
        assert inputs.logit_rows.tolist() == [row for _, row, _ in samples]
        sampling = [naive for _, _, naive in samples]
        self.check_sampling(inputs.sampled, sampling)
        naives = [self.model[s] for s in wanted]
        indexes = [len(n.tokens) - n.num_prompt for n in naives]
        self.running.append(Running(inputs, naives, [n.num_computed for n in naives], indexes, sampling))
        for i, naive in enumerate(sampling):
            naive.tokens.append(~i)

    def check_sampling(self, sampled: object, samples: list[Naive]) -> None:
        assert sampled.seeds.tolist() == [n.seed for n in samples]  # type: ignore[attr-defined]
        assert sampled.temperatures.tolist() == [n.temperature for n in samples]  # type: ignore[attr-defined]
        indexes = [len(n.tokens) - n.num_prompt for n in samples]
        assert sampled.output_indexes.tolist() == indexes  # type: ignore[attr-defined]
        forbidden = {i: tuple(n.end_token_ids) for i, n in enumerate(samples) if indexes[i] < n.min_tokens}
        found = {i: ids for i, ids in sampled.forbidden if ids}  # type: ignore[attr-defined]
        assert found == {i: ids for i, ids in forbidden.items() if ids}

    def commit(self) -> None:
        """Every third row that samples fails, and so does what was fed with one that failed."""
        running = self.running.popleft()
        samples = running.samples
        tokens = np.arange(len(samples), dtype=np.int64) + 1000
        is_finite = np.array([i % 3 != 2 and not naive.has_failed for i, naive in enumerate(samples)], np.bool_)
        sampled = Sampled(tokens, is_finite)
        self.batch.commit(running.inputs, sampled)
        for i, naive in enumerate(samples):
            if is_finite[i]:
                naive.tokens[naive.tokens.index(~i)] = int(tokens[i])
            else:
                naive.fail()
        progress = Progress.of(running.inputs.scheduled, sampled)
        assert progress.attempts.tolist() == [n.attempt for n in running.naives]
        assert progress.num_computed_tokens.tolist() == running.computed
        assert progress.first_output_indexes.tolist() == running.indexes
        assert progress.token_ids.tolist() == tokens[is_finite].tolist()
        assert progress.num_tokens.sum() == is_finite.sum()
        assert len(progress.failed) == (~is_finite).sum()


TestRandomPlans = RandomPlans.TestCase
TestRandomPlans.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def naive(**changes: object) -> Naive:
    fields = {
        "attempt": 1, "tokens": [1, 2, 3], "num_prompt": 3, "num_computed": 0, "blocks": [4],
        "temperature": 0.0, "seed": 0, "min_tokens": 0,
    }  # fmt: skip
    return Naive(**(fields | changes))  # type: ignore[arg-type]


def plan(**columns: object) -> pb.StepPlan:
    return pb.StepPlan(epoch=1, step_id=1, **columns)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"scheduled_seq_ids": [9], "num_scheduled_tokens": [1]}, "names sequence 9, which was never added"),
        ({"appended_seq_ids": [9], "appended_num_blocks": [1], "appended_block_ids": [2]}, "names sequence 9"),
        ({"scheduled_seq_ids": [7, 7], "num_scheduled_tokens": [1, 1]}, "twice"),
        ({"scheduled_seq_ids": [7], "num_scheduled_tokens": []}, "scheduled columns differ"),
        ({"appended_seq_ids": [7], "appended_num_blocks": [2], "appended_block_ids": [1]}, "appended_block_ids"),
        ({"copy_src_block_ids": [1], "copy_dst_block_ids": [2]}, "copy columns differ"),
        ({"appended_seq_ids": [7], "appended_num_blocks": [9], "appended_block_ids": range(9)}, "past max_model_len"),
        ({"added": [added(8, naive(tokens=[1] * 81))]}, "sequence 8 has 81 tokens"),
        ({"added": [added(8, naive(num_prompt=4))]}, "sequence 8 has 3 tokens, 4 of them prompt"),
        ({"added": [added(8, naive(num_computed=81))]}, "sequence 8 has 81 tokens"),
        ({"added": [added(8, naive(tokens=[]))]}, "sequence 8 has 0 tokens"),
        ({"added": [pb.AddedSequence(seq_id=8, token_ids=[1], block_ids=[1], num_blocks=[1, 0])]}, "one KV group"),
        (
            {"added": [added(8, naive(tokens=[1] * 20))], "scheduled_seq_ids": [8], "num_scheduled_tokens": [20]},
            "runs sequence 8 up to token 20: it has 1 blocks of 16",
        ),
        (
            {"scheduled_seq_ids": [7], "num_scheduled_tokens": [3], "num_steps": 2},
            "2 steps, which are not decodes of fewer and fewer sequences",
        ),
        (
            {"scheduled_seq_ids": [7], "num_scheduled_tokens": [1], "num_steps": 2},
            "2 steps, which are not decodes of fewer and fewer sequences",
        ),
        (
            {"added": [added(8, naive())], "scheduled_seq_ids": [7, 8], "num_scheduled_tokens": [1, 2], "num_steps": 2},
            "2 steps, which are not decodes of fewer and fewer sequences",
        ),
        (
            {"added": [added(8, naive())], "scheduled_seq_ids": [7, 8], "num_scheduled_tokens": [2, 0], "num_steps": 2},
            "2 steps, which are not decodes of fewer and fewer sequences",
        ),
        ({"num_steps": 2}, "2 steps, which are not decodes of fewer and fewer sequences"),
        (
            {
                "added": [added(8, naive(num_computed=2, num_candidates=3))],
                "scheduled_seq_ids": [8],
                "num_scheduled_tokens": [2],
                "num_steps": 2,
            },
            "2 steps, which are not decodes of fewer and fewer sequences",
        ),
        (
            {
                "added": [added(8, naive(tokens=[1] * 14, num_computed=13))],
                "scheduled_seq_ids": [8],
                "num_scheduled_tokens": [4],
                "num_steps": 4,
            },
            "runs sequence 8 up to token 17: it has 1 blocks of 16",
        ),
        (
            {"added": [added(8, naive(num_computed=3))], "scheduled_seq_ids": [8, 7], "num_scheduled_tokens": [0, 3]},
            "forks sequence 8 from one that does not end its prompt",
        ),
        (
            {"added": [added(8, naive(num_computed=3))], "scheduled_seq_ids": [7, 8], "num_scheduled_tokens": [2, 0]},
            "forks sequence 8",
        ),
        (
            {"added": [added(8, naive(num_computed=2))], "scheduled_seq_ids": [7, 8], "num_scheduled_tokens": [3, 0]},
            "forks sequence 8",
        ),
        (
            {
                "added": [added(8, naive(tokens=[1] * 4, num_computed=4))],
                "scheduled_seq_ids": [7, 8],
                "num_scheduled_tokens": [3, 0],
            },
            "forks sequence 8",
        ),
    ],
)
def test_refuses(columns: dict[str, object], message: str) -> None:
    batch = Batch(LIMITS)
    batch.apply(decode_plan(plan(added=[added(7, naive())])))
    with pytest.raises(ProtocolError, match=message):
        batch.apply(decode_plan(plan(**columns)))


def test_a_fork_samples_from_its_parents_logits_and_gets_its_blocks_later() -> None:
    batch = Batch(LIMITS)
    prompt = list(range(20))
    parent = naive(tokens=prompt, num_prompt=20, num_computed=4, blocks=[1, 2], seed=70)
    forks = [naive(tokens=prompt, num_prompt=20, num_computed=20, blocks=[], seed=seed) for seed in (80, 90)]
    other = naive(tokens=[5, 6], num_prompt=2, num_computed=1, blocks=[3], seed=60)
    sequences = (*enumerate((parent, *forks), start=7), (6, other))
    scheduled = {"scheduled_seq_ids": [7, 8, 9, 6], "num_scheduled_tokens": [16, 0, 0, 1]}
    inputs, progress = run(batch, plan(added=[added(*s) for s in sequences], **scheduled), [101, 102, 103, 104])
    assert inputs.input_ids.tolist() == [*prompt[4:], 6]
    assert inputs.query_lens.tolist() == [16, 1]
    assert inputs.logit_rows.tolist() == [15, 15, 15, 16]
    assert inputs.sampled.seeds.tolist() == [70, 80, 90, 60]
    assert inputs.sampled.output_indexes.tolist() == [0, 0, 0, 0]
    assert progress.num_computed_tokens.tolist() == [20, 20, 20, 2]
    assert progress.token_ids.tolist() == [101, 102, 103, 104]
    appended = {"appended_seq_ids": [9], "appended_num_blocks": [2], "appended_block_ids": [1, 4]}
    decode = {"scheduled_seq_ids": [7, 9], "num_scheduled_tokens": [1, 1]}
    inputs, progress = run(batch, plan(**appended, **decode), [105, 106])
    assert inputs.input_ids.tolist() == [101, 103]
    assert inputs.slot_mapping.tolist() == [2 * 16 + 4, 4 * 16 + 4]
    assert inputs.block_tables.tolist() == [[1, 2], [1, 4]]
    assert progress.first_output_indexes.tolist() == [1, 1]


def test_every_token_samples_where_each_does_once() -> None:
    """Not where as many sample as run, but a fork samples from the same token as its parent."""
    batch = Batch(LIMITS)
    prompt = {"tokens": [1, 2], "num_prompt": 2}
    rows = ((7, naive(**prompt)), (8, naive(**prompt)), (9, naive(**prompt, num_computed=2)))
    prompts = {"scheduled_seq_ids": [7, 9], "num_scheduled_tokens": [2, 0]}
    inputs, _ = run(batch, plan(added=[added(*row) for row in rows], **prompts), [5, 6])
    assert (inputs.logit_rows.tolist(), inputs.samples_all) == ([1, 1], False)
    inputs, _ = run(batch, plan(scheduled_seq_ids=[7, 8], num_scheduled_tokens=[1, 1]), [5])
    assert (inputs.logit_rows.tolist(), inputs.samples_all) == ([0], False)
    inputs, _ = run(batch, plan(scheduled_seq_ids=[8, 7], num_scheduled_tokens=[1, 1]), [5, 6])
    assert (inputs.logit_rows.tolist(), inputs.samples_all) == ([0, 1], True)


def test_a_full_sequence_samples_no_more() -> None:
    """At max_model_len there is nothing to run, and plans sent ahead find that out without harm."""
    batch = Batch(LIMITS)
    row = naive(tokens=[5] * 79, num_computed=78, blocks=[1, 2, 3, 4, 5])
    one = {"scheduled_seq_ids": [7], "num_scheduled_tokens": [1]}
    inputs, progress = run(batch, plan(added=[added(7, row)], **one), [9])
    assert (progress.num_tokens.tolist(), progress.num_computed_tokens.tolist()) == ([1], [79])
    inputs, progress = run(batch, plan(**one), [])
    assert (inputs.input_ids.tolist(), len(inputs.scheduled.sampling)) == ([9], 0)
    inputs, progress = run(batch, plan(**one), [])
    assert (len(inputs.input_ids), progress.num_tokens.tolist()) == (0, [0])


def run(batch: Batch, message: pb.StepPlan, token_ids: list[int]) -> tuple[StepInputs, Progress]:
    """A whole step that samples these."""
    inputs = batch.apply(decode_plan(message))
    sampled = Sampled(np.array(token_ids, np.int64), np.ones(len(token_ids), np.bool_))
    batch.begin(inputs)
    batch.commit(inputs, sampled)
    return inputs, Progress.of(inputs.scheduled, sampled)


def test_forgetting_an_unknown_sequence_is_no_error() -> None:
    batch = Batch(LIMITS)
    batch.apply(decode_plan(plan(removed_seq_ids=[99])))
    assert len(batch) == 0
