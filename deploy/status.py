"""`pagoda status`: what the workers do and what their blocks hold."""

import json

from pagoda.v1 import generation_pb2 as pb

from deploy.call import call_at
from scheduler.client import PagodaClient

_MIN_WIDTH = 110


def status_at(port: int, as_json: bool) -> None:
    """Prints the state of the service at a port of this machine."""

    async def show(client: PagodaClient) -> None:
        status = await client.get_status()
        if as_json:
            print(to_json(status))
        else:
            print_table(status)

    call_at(port, show)


def to_json(status: pb.GetStatusResponse) -> str:
    """One object on one line; field names as in the contract, hit rates added."""
    workers = []
    for worker in sorted(status.workers, key=lambda worker: worker.name):
        fields = {field.name: getattr(worker, field.name) for field in worker.DESCRIPTOR.fields}
        fields["state"] = _state(worker)
        fields["phase_s"] = dict(worker.phase_s)
        workers.append(fields | {"prefix_hit_rate": hit_rate(worker)})
    totals = {f.name: getattr(status, f.name) for f in status.DESCRIPTOR.fields if f.name != "workers"}
    return json.dumps(totals | {"workers": workers})


def print_table(status: pb.GetStatusResponse) -> None:
    """One row per worker, and a line for the service."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("worker", "state", "device"):
        table.add_column(column, no_wrap=True)
    columns = ("running", "waiting", "free", "referenced", "cached", "blocks", "on host", "prefix hits", "preempted")
    for column in columns:
        table.add_column(column, no_wrap=True, justify="right")
    for worker in sorted(status.workers, key=lambda worker: worker.name):
        rate = hit_rate(worker)
        counts = (
            worker.num_running,
            worker.num_waiting,
            worker.num_free_blocks,
            worker.num_referenced_blocks,
            worker.num_cached_blocks,
            worker.num_blocks,
            f"{worker.num_cached_host_blocks} of {worker.num_host_blocks}" if worker.num_host_blocks else "-",
            "-" if rate is None else f"{rate:.1%}",
            worker.num_preemptions,
        )
        table.add_row(worker.name, _state(worker), worker.device, *map(str, counts))
    console = Console()
    console.width = max(console.width, _MIN_WIDTH)  # wrapped by a narrow terminal, but not cut
    if status.workers:
        console.print(table)
    else:
        console.print("no workers")
    console.print(f"{status.num_live_requests} live requests, {status.num_streams} streams", highlight=False)


def hit_rate(worker: pb.WorkerStatus) -> float | None:
    """Share of the prompt tokens looked up that the prefix cache had; None before the first."""
    queried = worker.num_prefix_query_tokens
    return worker.num_prefix_hit_tokens / queried if queried else None


def _state(worker: pb.WorkerStatus) -> str:
    return pb.WorkerState.Name(worker.state).removeprefix("WORKER_STATE_").lower()
