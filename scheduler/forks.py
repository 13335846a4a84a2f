"""Choices of one request: the first computes the prompt, the others follow it and fork from it when it is done. Pure.

The step that ends the leader's prompt samples the first token of every follower too, from the same logits; a moment
later each follower gets a table of its own, which shares the prompt's full blocks and has a copy of its partial one.
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
        child.num_computed_tokens = child.num_planned_tokens = leader.num_prompt_tokens
        child.num_planned_samples = 1
        child.num_plans_in_flight += 1
        child.status = SequenceStatus.RUNNING
        self._begun.append((leader, leader.attempt, child))

    def carry_out(self) -> Iterator[tuple[Sequence, bool]]:
        """Gives the children that have begun their blocks: (child, whether there were any to give)."""
        begun, self._begun = self._begun, []
        for leader, attempt, child in begun:
            can_fork = leader.attempt == attempt and self._blocks.num_available_blocks > 0
            if can_fork:
                self._fork(leader, child)
            yield child, can_fork

    def _fork(self, leader: Sequence, child: Sequence) -> None:
        num_full, num_rest = divmod(leader.num_prompt_tokens, self._block_size)
        shared = leader.block_ids[:num_full]
        if child.limits.max_output_tokens == 1:  # the token that is being sampled is its last: it writes nothing
            child.block_ids = self._blocks.fork(leader.seq_id, child.seq_id, shared, None)
        elif num_rest:
            source = leader.block_ids[num_full]
            child.block_ids = self._blocks.fork(leader.seq_id, child.seq_id, shared, (source, num_rest))
            self.copies.append(BlockCopy(source, child.block_ids[-1], num_rest))
        else:
            child.block_ids = self._blocks.fork(leader.seq_id, child.seq_id, shared, None)
            child.block_ids += self._blocks.reserve(child.seq_id, (), 1)
        child.num_shared_blocks = child.num_published_blocks = num_full
        if child.num_cached_tokens is None:
            child.num_cached_tokens = leader.num_prompt_tokens
        # Until its first token is logged: an owner that finds this record knows that the prompt may not be computed.
        self._blocks.changes.computed.append((child.seq_id, 0))
        child.has_computed_record = True
