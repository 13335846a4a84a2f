"""`pagoda explain`: where the blocks of a request's prompt came from, and who took those that were there once."""

import json
from collections.abc import Iterator
from datetime import datetime
from itertools import groupby

from pagoda.v1 import generation_pb2 as pb

from deploy.call import call_at
from scheduler.client import PagodaClient

_WORDS: dict[int, str] = {
    pb.BLOCK_SOURCE_HIT: "hit on the device",
    pb.BLOCK_SOURCE_HOST_HIT: "hit on the host",
    pb.BLOCK_SOURCE_COMPUTED: "computed",
    pb.BLOCK_SOURCE_EVICTED: "computed again: evicted",
    pb.BLOCK_SOURCE_LAST: "computed: the last token is always run",
}


def explain_at(port: int, request_id: str, as_json: bool) -> None:
    """Prints what the service at a port of this machine knows of a request's blocks."""

    async def show(client: PagodaClient) -> None:
        explanation = await client.explain(request_id)
        print(to_json(explanation) if as_json else "\n".join(lines_of(explanation)))

    call_at(port, show)


def lines_of(explanation: pb.ExplainResponse) -> Iterator[str]:
    """For people: an admission has a line, and each stretch of its prompt's blocks."""
    size = explanation.block_size
    num_blocks = -(-explanation.num_prompt_tokens // size)
    blocks = "1 block" if num_blocks == 1 else f"{num_blocks} blocks"
    yield f"{explanation.request_id}: a prompt of {explanation.num_prompt_tokens} tokens in {blocks} of {size}"
    if not explanation.admissions:
        yield "it ended before it was admitted" if explanation.has_ended else "it waits for its admission"
    for admission in explanation.admissions:
        num_hits = sum(admission.sources.count(source) for source in (pb.BLOCK_SOURCE_HIT, pb.BLOCK_SOURCE_HOST_HIT))
        again = f"again, attempt {admission.attempt + 1}, " if admission.attempt else ""
        yield f"admitted {again}at {_clock(admission.admitted_at_s)} on {admission.worker}: {num_hits} of {blocks} hit"
        for first, count, words in stretches(admission):
            tokens = f"{first * size}-{min((first + count) * size, explanation.num_prompt_tokens) - 1}"
            yield f"  {_span(first, count):<14}{f'tokens {tokens}':<20}{words}"


def stretches(admission: pb.Admission) -> Iterator[tuple[int, int, str]]:
    """(first block, blocks, what became of them): side by side, from the front of the prompt."""
    fates: list[str] = [_WORDS[source] for source in admission.sources]
    for run in admission.evicted_runs:
        before_s = admission.admitted_at_s - run.evicted_at_s
        fate = f"{_WORDS[pb.BLOCK_SOURCE_EVICTED]} {before_s:.1f} s before, at {_clock(run.evicted_at_s)}, "
        last = run.first_block + run.num_blocks
        fates[run.first_block : last] = [f"{fate}for {run.evicted_for}"] * run.num_blocks
    for fate, group in groupby(enumerate(fates), lambda pair: pair[1]):
        indexes = [index for index, _ in group]
        yield indexes[0], len(indexes), fate


def to_json(explanation: pb.ExplainResponse) -> str:
    """One object on one line; field names as in the contract, sources by name."""
    names: dict[int, str] = {
        value: name.removeprefix("BLOCK_SOURCE_").lower() for name, value in pb.BlockSource.items()
    }
    admissions = []
    for admission in explanation.admissions:
        fields = {f.name: getattr(admission, f.name) for f in admission.DESCRIPTOR.fields}
        fields["sources"] = [names[source] for source in admission.sources]
        fields["evicted_runs"] = [
            {f.name: getattr(run, f.name) for f in run.DESCRIPTOR.fields} for run in admission.evicted_runs
        ]
        admissions.append(fields)
    rest = {f.name: getattr(explanation, f.name) for f in explanation.DESCRIPTOR.fields if f.name != "admissions"}
    return json.dumps(rest | {"admissions": admissions})


def _span(first: int, count: int) -> str:
    return f"block {first}" if count == 1 else f"blocks {first}-{first + count - 1}"


def _clock(unix_time_s: float) -> str:
    return datetime.fromtimestamp(unix_time_s).astimezone().strftime("%H:%M:%S")
