"""A result as text for a terminal: what came of the requests, how long they took, what the server counted."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.load.harness.settings import METRICS

MIN_WIDTH = 100
_TITLES = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2el": "end to end"}
Result = Mapping[str, Any]


def print_run(console: Console, result: Result) -> None:
    """One run."""
    console.width = max(console.width, MIN_WIDTH)
    for label, value in _counts(result):
        console.print(f"{label:<28} {value}", highlight=False)
    console.print(_latencies(result))
    for failure in result["failures"]:
        words = f"{failure['count']} failed with {failure['status']}: {failure['detail']}"
        if failure["with_retry_delay"]:
            delay_s = failure["mean_retry_delay_s"]
            words += f" ({failure['with_retry_delay']} were told to come back, after {delay_s:.2f} s on average)"
        console.print(words, highlight=False, soft_wrap=True)
    print_complaints(console, result)


def print_complaints(console: Console, result: Result) -> None:
    """Why the figures are not the server's alone, so that nobody overlooks it."""
    for complaint in result["generator"]["complaints"]:
        console.print(f"THE LOAD GENERATOR DID NOT KEEP UP: {complaint}", style="bold red", soft_wrap=True)
    if result["is_interrupted"]:
        console.print("THE RUN WAS INTERRUPTED", style="bold red")


def print_knee(console: Console, result: Result) -> None:
    """A search for the knee: a row per stage."""
    console.width = max(console.width, MIN_WIDTH)
    columns = ("requests/s", "good", "tokens/s", "TTFT p50", "TTFT p99", "TPOT p50", "TPOT p99", "failed")
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for stage in result["stages"]:
        times = (stage.get(f"{p}_{metric}_ms") for metric in ("ttft", "tpot") for p in ("p50", "p99"))
        share, tokens = f"{stage['good_share']:.1%}", f"{stage['output_throughput']:.0f}"
        table.add_row(f"{stage['offered_rps']:.3g}", share, tokens, *map(milliseconds, times), str(stage["failed"]))
    console.print(table)
    for stage in result["stages"]:
        if stage["generator"]["complaints"]:
            console.print(f"at {stage['offered_rps']:.3g} requests/s:", style="bold red")
            print_complaints(console, stage)
    knee = result["knee_rps"]
    share = f"{result['knee_share']:.0%}"
    found = "no stage was slow enough" if knee is None else f"the knee: {knee:.3g} requests/s"
    beyond = ", or beyond: no stage was too fast" if result["is_knee_beyond"] else ""
    console.print(f"{found}{beyond} (the knee: {share} of the requests keep every limit)", highlight=False)


def _counts(result: Result) -> Iterator[tuple[str, str]]:
    yield "requests", f"{result['num_requests']} in {result['duration']:.2f} s"
    for outcome in ("completed", "cancelled", "disconnected", "failed"):
        if result[outcome] or outcome == "completed":
            yield f"  {outcome}", str(result[outcome])
    yield "input, output tokens", f"{result['total_input_tokens']}, {result['total_output_tokens']}"
    yield "requests/s", f"{result['request_throughput']:.2f}"
    if result["request_goodput"] is not None:
        yield "good requests/s", f"{result['request_goodput']:.2f} ({result['good_share']:.1%} of all)"
    yield (
        "output tokens/s",
        f"{result['output_throughput']:.1f} (most in a second: {result['max_output_tokens_per_s']})",
    )
    yield "messages/s", f"{result['messages_per_s']:.1f} ({result['tokens_per_message']:.2f} tokens each)"
    yield "most requests at once", str(result["max_concurrent_requests"])
    generator = result["generator"]
    late = f", late by {milliseconds(generator['p99_late_ms'])} (p99)" if generator["p99_late_ms"] is not None else ""
    busy = f"{generator['cpu_share_of_the_busiest']:.0%} of a core at most"
    yield "generators", f"{generator['num_processes']}, {busy}{late}"
    server = result["server"]
    if server is not None:
        yield from _server(server)


def _server(server: Result) -> Iterator[tuple[str, str]]:
    grown, rate = server["grown"], server["prefix_hit_rate"]
    yield "server: running, waiting", f"at most {server['max_running']}, {server['max_waiting']}"
    yield "server: steps, preemptions", f"{grown['num_steps']:.0f}, {grown['num_preemptions']:.0f}"
    yield "server: prefix hits", "-" if rate is None else f"{rate:.1%} of the prompts' tokens"
    before, after = server["before"]["blocks"], server["after"]["blocks"]
    for state in after:
        yield f"server: {state} blocks", f"{before.get(state, 0)} before, {after[state]} after"
    yield "server: scheduler CPU", f"{grown['scheduler_cpu_s']:.2f} s"


def _latencies(result: Result) -> Table:
    shown = [metric for metric in METRICS if f"mean_{metric}_ms" in result]
    names = [key.split("_")[0] for key in result if shown and key.startswith("p") and key.endswith(f"_{shown[0]}_ms")]
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("from when due", no_wrap=True)
    for name in ("mean", *names):
        table.add_column(name, justify="right", no_wrap=True)
    for metric in shown:
        values = (result[f"{name}_{metric}_ms"] for name in ("mean", *names))
        table.add_row(_TITLES[metric], *map(milliseconds, values))
    return table


def milliseconds(value: float | None) -> str:
    """With three digits or so."""
    if value is None:
        return "-"
    return f"{value:.0f} ms" if value >= 100 else f"{value:.3g} ms"
