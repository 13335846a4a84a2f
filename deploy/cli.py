"""The `pagoda` command: reads flags and hands them on. Every error is one line on stderr and a non-zero exit code.

Slow imports stand inside the commands: `up` and `run` have their processes on the way before anything else.
"""

import os
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from deploy.errors import DeployError
from deploy.settings import UpSettings
from deploy.stack import start

DEFAULT_PORT = 50051
RUN_MAX_TOKENS = 160

_SAMPLING_FLAGS = (
    "max_tokens", "min_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "best_of", "beam_width",
    "length_penalty", "ignore_eos", "stop",
)  # fmt: skip
_REQUEST_FLAGS = (
    "prompt", "chat", "request_id", "n", "priority", "tenant", "cache_salt", "resume_wait_s", "pin_prompt_s",
)  # fmt: skip

app = typer.Typer(
    help="Serves large language models, and loses nothing when a process dies.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Model = Annotated[Path, typer.Option(help="Hugging Face checkpoint: config.json, *.safetensors, tokenizer.json.")]
Workers = Annotated[int, typer.Option(help="Worker processes; CPU workers share the cores and --kv-memory.")]
Device = Annotated[str, typer.Option(help="cpu or cuda (worker i on device i).")]
Dtype = Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16.")]
KvCacheDtype = Annotated[str | None, typer.Option(help="auto (as --dtype), fp8 or int8: half the memory per token.")]
KvMemory = Annotated[str | None, typer.Option(help="KV memory, as in 512MiB: of all CPU workers, of each GPU.")]
NumBlocks = Annotated[int | None, typer.Option(help="KV blocks of each worker, instead of --kv-memory.")]
Port = Annotated[int, typer.Option(help="Port for clients, on 127.0.0.1.")]
Prompt = Annotated[str | None, typer.Option(help="Text to go on from.")]
Chat = Annotated[str | None, typer.Option(help="What a user says; the model's chat template goes around it.")]
MaxTokens = Annotated[int | None, typer.Option(help="Tokens to generate at most.")]
Temperature = Annotated[float | None, typer.Option(help="0 is greedy. Unset: the model's own default.")]
Seed = Annotated[int | None, typer.Option(help="The same seed draws the same tokens.")]
Json = Annotated[bool, typer.Option("--json", help="Print one object on one line.")]


@app.command()
def up(
    model: Model,
    workers: Workers = 1,
    device: Device = "cpu",
    dtype: Dtype = None,
    kv_cache_dtype: KvCacheDtype = None,
    kv_memory: KvMemory = None,
    num_blocks: NumBlocks = None,
    host_memory: Annotated[
        str | None,
        typer.Option(help="Main memory of each worker for blocks that its pool evicts, as in 4GiB."),
    ] = None,
    num_host_blocks: Annotated[int | None, typer.Option(help="The same in blocks.")] = None,
    block_size: Annotated[int | None, typer.Option(help="Tokens per KV block: 16 or 32.")] = None,
    max_num_batched_tokens: Annotated[int | None, typer.Option(help="Tokens in one step at most.")] = None,
    max_num_seqs: Annotated[int | None, typer.Option(help="Sequences in one step at most.")] = None,
    max_model_len: Annotated[int | None, typer.Option(help="Longest prompt plus output, in tokens.")] = None,
    port: Port = DEFAULT_PORT,
    redis_url: Annotated[
        str | None,
        typer.Option(envvar="REDIS_URL", help="A Redis >= 6.2 or Valkey. Unset: one of our own is started."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder for our own Redis. Unset: a temporary one, removed at the end.")
    ] = None,
    record_ttl_s: Annotated[int | None, typer.Option(help="Seconds that an ended request stays readable.")] = None,
    max_waiting: Annotated[int | None, typer.Option(help="Requests that may wait at most.")] = None,
    overcommit: Annotated[
        float | None, typer.Option(help="Share of the pool that the batch's expected peak may reach.")
    ] = None,
    preemption: Annotated[
        str | None, typer.Option(help="auto, swap or recompute: what a preempted sequence comes back by.")
    ] = None,
    plan_ms: Annotated[
        float | None, typer.Option(help="How long tokens may wait for those of their plan's later steps; 0: never.")
    ] = None,
    pin_memory: Annotated[
        str | None, typer.Option(help="KV memory of each worker for pinned prompts. Unset: a quarter of its pool.")
    ] = None,
    metrics_port: Annotated[
        int | None, typer.Option(help="Prometheus port of the scheduler; each worker has one of the next.")
    ] = None,
    pids: Annotated[
        Path | None, typer.Option(help="File that always holds the processes' ids, as a JSON object by name.")
    ] = None,
) -> None:
    """Start Redis, a scheduler and workers, and keep them running until Ctrl-C or SIGTERM."""
    settings = UpSettings(**locals())  # one field per flag, by the same name
    stack = start(settings)
    from deploy.serve import serve

    serve(stack, settings)


@app.command()
def run(
    model: Model,
    prompt: Prompt = None,
    chat: Chat = None,
    max_tokens: MaxTokens = RUN_MAX_TOKENS,
    temperature: Temperature = None,
    seed: Seed = None,
    workers: Workers = 1,
    device: Device = "cpu",
    dtype: Dtype = None,
    kv_cache_dtype: KvCacheDtype = None,
    kv_memory: KvMemory = None,
    num_blocks: NumBlocks = None,
) -> None:
    """Start everything, stream one generation, end everything."""
    began_s = time.monotonic()
    _one_of({"--prompt": prompt, "--chat": chat})
    stack = start(UpSettings(model, workers, device, dtype, kv_cache_dtype, kv_memory, num_blocks))
    from deploy.generate import build_request, show_run
    from deploy.serve import serve_for

    sampling = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    request = build_request({"prompt": prompt, "chat": chat}, sampling)
    serve_for(stack, lambda address: show_run(address, request, began_s))


@app.command()
def generate(
    prompt: Prompt = None,
    token_ids: Annotated[str | None, typer.Option(help="Ids to go on from, as in 1,2,3.")] = None,
    chat: Chat = None,
    port: Port = DEFAULT_PORT,
    max_tokens: MaxTokens = None,
    min_tokens: Annotated[int | None, typer.Option(help="No end-of-sequence or stop token before.")] = None,
    temperature: Temperature = None,
    top_k: Annotated[int | None, typer.Option(help="Sample among the k likeliest; 0: all.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample among the likeliest up to this probability.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Drop what is less likely than this share of the best.")] = None,
    seed: Seed = None,
    best_of: Annotated[int | None, typer.Option(help="Choices to sample, of which the --n likeliest are told.")] = None,
    beam_width: Annotated[int | None, typer.Option(help="Beams to search with, instead of sampling.")] = None,
    length_penalty: Annotated[float | None, typer.Option(help="Beam search: exponent of the length.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on past end-of-sequence tokens.")] = False,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends the output; repeatable.")] = None,
    stop_token_ids: Annotated[str | None, typer.Option(help="Ids that end the output, as in 1,2.")] = None,
    request_id: Annotated[str | None, typer.Option(help="The request's name. Unset: drawn at random.")] = None,
    n: Annotated[int | None, typer.Option(help="Choices to generate, each with a seed of its own.")] = None,
    priority: Annotated[int | None, typer.Option(help="Lower runs first.")] = None,
    tenant: Annotated[str | None, typer.Option(help="Whose request it is.")] = None,
    cache_salt: Annotated[str | None, typer.Option(help="Share cached prefixes only under the same salt.")] = None,
    resume_wait_s: Annotated[float | None, typer.Option(help="Seconds the request waits if we are cut off.")] = None,
    pin_prompt_s: Annotated[float | None, typer.Option(help="Seconds for which the prompt stays cached.")] = None,
    json: Json = False,
) -> None:
    """Stream one generation from a running service, through whatever restarts of it."""
    _one_of({"--prompt": prompt, "--token-ids": token_ids, "--chat": chat})
    from deploy.generate import build_request, generate_at, parse_ids

    flags = locals()
    sampling = {name: flags[name] for name in _SAMPLING_FLAGS}
    sampling["stop_token_ids"] = parse_ids("--stop-token-ids", stop_token_ids)
    fields = {name: flags[name] for name in _REQUEST_FLAGS}
    fields["token_ids"] = parse_ids("--token-ids", token_ids)
    generate_at(port, build_request(fields, sampling), json)


@app.command()
def status(port: Port = DEFAULT_PORT, json: Json = False) -> None:
    """Print workers, sequences, blocks and prefix hits."""
    from deploy.status import status_at

    status_at(port, json)


@app.command()
def blocks(
    port: Port = DEFAULT_PORT,
    worker: Annotated[str, typer.Option(help="One worker's pool. Unset: all.")] = "",
    watch: Annotated[
        bool, typer.Option("--watch", help="Draw it again and again, on a terminal, until Ctrl-C.")
    ] = False,
    json: Json = False,
) -> None:
    """Draw every block of the workers' pools: free, cached, or how many tables name it."""
    from deploy.blocks import blocks_at

    blocks_at(port, worker, json, watch)


@app.command()
def pins(port: Port = DEFAULT_PORT, json: Json = False) -> None:
    """List the prompts that requests have pinned."""
    from deploy.pins import pins_at

    pins_at(port, json)


@app.command()
def unpin(
    request_id: Annotated[str, typer.Argument(help="The request whose prompt is pinned.")], port: Port = DEFAULT_PORT
) -> None:
    """End a pin before it expires."""
    from deploy.pins import unpin_at

    unpin_at(port, request_id)


@app.command()
def explain(
    request_id: Annotated[str, typer.Argument(help="The request's name.")],
    port: Port = DEFAULT_PORT,
    json: Json = False,
) -> None:
    """Say where the blocks of a request's prompt came from, and who evicted those that were there once."""
    from deploy.explain import explain_at

    explain_at(port, request_id, json)


@app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def load(context: typer.Context) -> None:
    """Send load to a running service, ours or an OpenAI server, and report how it fared (see pagoda load --help)."""
    from deploy.load import load

    load(context.args)


def _one_of(flags: dict[str, object]) -> None:
    if sum(value is not None for value in flags.values()) != 1:
        raise DeployError(f"give exactly one of {', '.join(flags)}", 2)


def main() -> int:
    """Runs the command line; the exit code."""
    # Read by gRPC at its import: it logs every lost connection, and would hold up the start of children.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    try:
        app(standalone_mode=False)
    except DeployError as error:
        sys.stderr.write(f"pagoda: {error}\n")
        return error.exit_code
    except typer.TyperException as error:
        sys.stderr.write(f"pagoda: {error.format_message()} (see pagoda --help)\n")
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except BrokenPipeError:  # who read our output has gone; nothing is left to flush
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return 0


if __name__ == "__main__":
    sys.exit(main())
