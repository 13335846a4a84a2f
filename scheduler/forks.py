"""Sequences of one request: the first computes the prompt, the others follow it and fork from it. Pure.

Of choices that sample, the step that ends the leader's prompt samples the first token of every follower too, from the
same logits; beams fork whenever the search chooses so. A moment later each child gets a table of its own, which shares
its parent's full blocks and has a copy of the partial one.
"""

from collections.abc import Iterator

from scheduler.block_manager import BlockCopy, BlockManager
from scheduler.sequence import Sequence, SequenceStatus


class Forks:
    """Who follows whom, and whose blocks are due."""

    def __init__(self, blocks: BlockManager, block_size: int) -> None:
        self.copies: list[BlockCopy] = []
        """To be made by a plan once Redis has acknowledged them; whoever tells Redis takes them."""
        self.num_waiting = 0
        """Sequences that follow another."""
        self._blocks = blocks
        self._block_size = block_size
        self.leaders: dict[int, tuple[Sequence, list[Sequence]]] = {}
        """Each with those who follow it, by seq_id."""
        self._begun: list[tuple[Sequence, int, Sequence]] = []  # leader, its attempt, child

    @property
    def num_begun(self) -> int:
        """Children that sample in a plan already and have no blocks yet."""
        return len(self._begun)

    def followers_of(self, leader: Sequence) -> list[Sequence]:
        """A copy of the list of those who follow it."""
        return list(self.leaders[leader.seq_id][1]) if leader.seq_id in self.leaders else []

    def follow(self, leader: Sequence, follower: Sequence) -> None:
        """The follower waits for the leader's prompt."""
        follower.leader = leader
        follower.num_shared_blocks = leader.num_prompt_tokens // self._block_size
        self.leaders.setdefault(leader.seq_id, (leader, []))[1].append(follower)
        self.num_waiting += 1

    def leave(self, follower: Sequence) -> None:
        """The follower waits no longer."""
        assert follower.leader is not None
        leader_id = follower.leader.seq_id
        followers = self.leaders[leader_id][1]
        followers.remove(follower)
        if not followers:
            del self.leaders[leader_id]
        follower.leader = None
        follower.num_shared_blocks = 0
        self.num_waiting -= 1

    def past_prompt(self) -> Iterator[Sequence]:
        """Followers, no longer such, of leaders that have generated something without them."""
        for leader, followers in list(self.leaders.values()):
            if leader.num_output_tokens:
                for follower in list(followers):
                    self.leave(follower)
                    yield follower

    def begin(self, leader: Sequence, child: Sequence) -> None:
        """The plan being made ends the leader's prompt; the child samples in it."""
        self.leave(child)
        child.num_planned_samples = 1
        child.num_plans_in_flight += 1
        self.go_on(leader, child, leader.num_prompt_tokens)

    def go_on(self, parent: Sequence, child: Sequence, num_computed_tokens: int) -> None:
        """The child has nothing, and is to stand where its parent does."""
        child.num_computed_tokens = child.num_planned_tokens = num_computed_tokens
        child.status = SequenceStatus.RUNNING
        self._begun.append((parent, parent.attempt, child))

    def carry_out(self, running: list[Sequence], max_num_seqs: int) -> Iterator[tuple[Sequence, bool]]:
        """Gives the children that have begun their blocks: (child, whether there was room for it).

        The caller makes a child one of `running` before it asks for the next.
        """
        begun, self._begun = self._begun, []
        for parent, attempt, child in begun:
            is_there = parent.status is SequenceStatus.RUNNING and parent.attempt == attempt
            can_fork = is_there and self._blocks.num_available_blocks > 0 and len(running) < max_num_seqs
            if can_fork:
                self._fork(parent, child)
            yield child, can_fork

    def _fork(self, parent: Sequence, child: Sequence) -> None:
        num_full, num_rest = divmod(child.num_computed_tokens, self._block_size)
        writes = child.num_computed_tokens < child.max_num_tokens  # else what is being sampled is its last
        tail = (parent.block_ids[num_full], num_rest) if writes and num_rest else None
        child.block_ids = self._blocks.fork(parent.seq_id, child.seq_id, parent.block_ids[:num_full], tail)
        if tail is not None:
            self.copies.append(BlockCopy(tail[0], child.block_ids[-1], num_rest))
        elif writes:
            child.block_ids += self._blocks.reserve(child.seq_id, (), 1)
        child.num_shared_blocks = child.num_published_blocks = num_full
        if child.num_cached_tokens is None:
            child.num_cached_tokens = parent.num_prompt_tokens
        if not child.num_output_tokens:
            # Until its first token is logged: who finds this record knows that the prompt may not be computed.
            self._blocks.changes.computed.append((child.seq_id, 0))
            child.has_computed_record = True
