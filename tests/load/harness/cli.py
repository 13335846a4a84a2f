"""`pagoda load`: flags to settings, settings to a run, a run to what is printed and written."""

import asyncio
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from tests.load.harness.errors import LoadError
from tests.load.harness.flags import expand_goodput, settings_of
from tests.load.harness.settings import BACKENDS, DATASETS, METRICS, RAMP_STRATEGIES, Settings

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
NOTHING_COMPLETED = 1


@app.callback(invoke_without_command=True)
def load(
    context: typer.Context,
    backend: Annotated[str, typer.Option(help=" or ".join(BACKENDS))] = "pagoda",
    base_url: Annotated[str | None, typer.Option(help="An OpenAI server, as in http://127.0.0.1:8000.")] = None,
    host: Annotated[str, typer.Option(help="Where ours listens.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port of ours.")] = 50051,
    model: Annotated[str | None, typer.Option(help="Of an OpenAI server. Unset: the first it lists.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="tokenizer.json: send an OpenAI server text, not ids.")] = None,
    vocab_size: Annotated[int | None, typer.Option(help="Prompts use ids below. Unset: as the server says.")] = None,
    num_prompts: Annotated[
        int | None, typer.Option(help="Conversations; unset: 1000, or what fills --duration-s.")
    ] = None,
    request_rate: Annotated[float, typer.Option(help="Conversations begun per second; inf: at once.")] = float("inf"),
    burstiness: Annotated[float, typer.Option(help="1: Poisson. Below: bursts. Above: evenness.")] = 1.0,
    max_concurrency: Annotated[int | None, typer.Option(help="At once at most; alone: a closed loop.")] = None,
    duration_s: Annotated[float | None, typer.Option(help="Nothing begins after so many seconds.")] = None,
    ramp_up_strategy: Annotated[str | None, typer.Option(help=" or ".join(RAMP_STRATEGIES))] = None,
    ramp_up_start_rps: Annotated[float | None, typer.Option(help="Rate at the start.")] = None,
    ramp_up_end_rps: Annotated[float | None, typer.Option(help="Rate at the end.")] = None,
    find_knee: Annotated[bool, typer.Option("--find-knee", help="Ramp in stages, until goodput falls.")] = False,
    knee_share: Annotated[float, typer.Option(help="Share of good requests that the knee keeps.")] = 0.9,
    stage_s: Annotated[float, typer.Option(help="Seconds of each stage.")] = 20.0,
    num_stages: Annotated[int, typer.Option(help="Stages from the ramp's start to its end.")] = 8,
    dataset_name: Annotated[str, typer.Option(help=", ".join(DATASETS))] = "random",
    dataset_path: Annotated[Path | None, typer.Option(help="timed_trace: JSONL as Mooncake's.")] = None,
    self_timed: Annotated[bool, typer.Option(help="timed_trace: keep the trace's own times.")] = True,
    input_len: Annotated[int | None, typer.Option(help="Mean tokens of a prompt.")] = None,
    output_len: Annotated[int | None, typer.Option(help="Mean tokens of an answer.")] = None,
    random_range_ratio: Annotated[float, typer.Option(help="random: spread around the means.")] = 0.0,
    length_sigma: Annotated[float, typer.Option(help="Lognormal lengths: of their logarithm.")] = 1.0,
    random_prefix_len: Annotated[int, typer.Option(help="Tokens that all prompts begin with.")] = 0,
    prefix_repetition_prefix_len: Annotated[int, typer.Option(help="Tokens of each shared prefix.")] = 256,
    prefix_repetition_suffix_len: Annotated[int, typer.Option(help="Tokens after it.")] = 256,
    prefix_repetition_num_prefixes: Annotated[int, typer.Option(help="Shared prefixes.")] = 10,
    prefix_repetition_output_len: Annotated[int, typer.Option(help="Tokens of an answer.")] = 128,
    num_turns: Annotated[int, typer.Option(help="conversation: turns of each.")] = 3,
    think_time_s: Annotated[float, typer.Option(help="conversation: mean time from answer to turn.")] = 1.0,
    cancel_share: Annotated[float, typer.Option(help="Share of the requests that we cancel.")] = 0.0,
    disconnect_share: Annotated[float, typer.Option(help="Share whose client goes away.")] = 0.0,
    leave_after_tokens: Annotated[int | None, typer.Option(help="When those leave: after tokens ...")] = None,
    leave_after_s: Annotated[float | None, typer.Option(help="... or after seconds.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0: greedy.")] = 0.0,
    ignore_eos: Annotated[bool, typer.Option(help="Answers are as long as they are drawn.")] = True,
    stream_interval: Annotated[int, typer.Option(help="Ours: tokens from message to message.")] = 0,
    request_timeout_s: Annotated[float, typer.Option(help="Deadline of a request.")] = 600.0,
    num_processes: Annotated[int, typer.Option(help="Generator processes.")] = 1,
    num_warmups: Annotated[int, typer.Option(help="Requests of each process that do not count.")] = 0,
    status_interval_s: Annotated[float, typer.Option(help="Between looks at the server's counters.")] = 0.5,
    goodput: Annotated[
        list[str] | None, typer.Option(help="What a good request keeps, as in ttft:200 tpot:50.")
    ] = None,
    percentile_metrics: Annotated[str, typer.Option(help="Metrics to report.")] = ",".join(METRICS),
    metric_percentiles: Annotated[str, typer.Option(help="Percentiles to report.")] = "50,90,95,99",
    seed: Annotated[int, typer.Option(help="The same seed sends the same requests at the same times.")] = 0,
    save_result: Annotated[bool, typer.Option("--save-result", help="Write JSON, and a page beside it.")] = False,
    save_detailed: Annotated[bool, typer.Option("--save-detailed", help="With every request in the JSON.")] = False,
    result_dir: Annotated[Path, typer.Option(help="Where to.")] = Path(),
    result_filename: Annotated[str | None, typer.Option(help="Name of the JSON; the page's ends in .html.")] = None,
    label: Annotated[str | None, typer.Option(help="First part of the name.")] = None,
) -> None:
    """Send requests to a running service at a pace of their own, and report how they fared."""
    if context.invoked_subcommand is not None:
        return
    flags: dict[str, Any] = {name: value for name, value in locals().items() if name != "context"}
    settings = settings_of(flags)
    result = _run(settings, "pagoda load " + shlex.join(sys.argv[2:] if sys.argv[1:2] == ["load"] else sys.argv[1:]))
    if save_result or save_detailed or result_filename:
        _save(result, result_dir / (result_filename or _file_name(settings, result, label)))
    if not any(
        stage["completed"] + stage["cancelled"] + stage["disconnected"] for stage in result.get("stages", [result])
    ):
        raise LoadError("no request completed", NOTHING_COMPLETED)


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(help="A result of pagoda load.")],
    second: Annotated[Path, typer.Argument(help="Another one.")],
    html: Annotated[Path, typer.Option(help="Where the page goes.")] = Path("comparison.html"),
) -> None:
    """Print two results side by side, and write them as a page."""
    from rich.table import Table

    from tests.load.harness.compare import comparison_rows
    from tests.load.harness.page import render, write_page
    from tests.load.harness.result import read_result

    results = {path.stem: read_result(path) for path in (first, second)}
    if len(results) < 2:
        results = {str(path): read_result(path) for path in (first, second)}
    rows = comparison_rows(*results.values()) if len(results) == 2 else []
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("", *results, "second over first"):
        table.add_column(column, justify="left" if column == "" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    write_page(render("Load, compared", results, rows), html)
    print(f"wrote {html}")


def _run(settings: Settings, command: str) -> dict[str, Any]:
    """Runs, shows and reports. Imports what is slow only now: --help needs none of it."""
    from tests.load.harness.backend import connect
    from tests.load.harness.knee import find_knee
    from tests.load.harness.progress import Progress
    from tests.load.harness.result import knee_result, run_result
    from tests.load.harness.run import Interrupt, RawRun, run_once
    from tests.load.harness.text_report import print_knee, print_run

    interrupt = Interrupt()

    async def run() -> list[tuple[float, RawRun]]:
        asyncio.get_running_loop().add_signal_handler(signal.SIGINT, interrupt)
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, interrupt)
        backend = connect(settings.target)
        try:
            model = await backend.model()
            with Progress(Console(stderr=True)) as progress:

                async def one(rate: float, stage: Settings) -> RawRun:
                    progress.begin(f"{rate:g} requests/s on {model.name}")
                    return await run_once(stage, backend, model, progress.show, interrupt)

                if settings.knee is not None:
                    return await find_knee(settings, one)
                return [(settings.pace.request_rate, await one(settings.pace.request_rate, settings))]
        finally:
            await backend.close()

    runs = asyncio.run(run())
    console = Console()
    if settings.knee is None:
        result = run_result(runs[0][1], command)
        print_run(console, result)
    else:
        result = knee_result(settings, runs, command)
        print_knee(console, result)
    return result


def _save(result: dict[str, Any], path: Path) -> None:
    from tests.load.harness.page import render, write_page
    from tests.load.harness.result import write_result

    write_result(result, path)
    write_page(render(f"Load on {result['model_id']}", {path.stem: result}), path.with_suffix(".html"))
    print(f"wrote {path} and {path.with_suffix('.html')}")


def _file_name(settings: Settings, result: dict[str, Any], label: str | None) -> str:
    """As `vllm bench serve` names its files."""
    pace = settings.pace
    rate = (
        f"ramp-up-{pace.ramp.strategy}-{pace.ramp.start_rps:g}qps-{pace.ramp.end_rps:g}qps"
        if pace.ramp
        else f"{pace.request_rate:g}qps"
    )
    concurrency = f"-concurrency{pace.max_concurrency}" if pace.max_concurrency is not None else ""
    model = str(result["model_id"]).rsplit("/", 1)[-1]
    return f"{label or settings.target.backend}-{rate}{concurrency}-{model}-{time.strftime('%Y%m%d-%H%M%S')}.json"


def main(arguments: Sequence[str]) -> None:
    """Runs the command line. Raises LoadError, and what typer raises for flags that it does not know."""
    app(args=expand_goodput(arguments), prog_name="pagoda load", standalone_mode=False)
