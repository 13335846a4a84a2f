"""A start that can't work ends at once: exit code 2, and one line that says what to do."""

import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scheduler.__main__ import load_model
from scheduler.config import ConfigError, SchedulerConfig, parse_flags
from tests.redis_servers import RedisServer
from tests.stack import ROOT, Stack, free_port, running
from tests.timed import make_timed_model


def begin(model: Path, *flags: str) -> "subprocess.Popen[str]":
    command = [
        sys.executable,
        "-m",
        "scheduler",
        "--model",
        str(model),
        "--listen",
        "127.0.0.1:0",
        *flags,
    ]
    env = {"PYTHONPATH": f"{ROOT}:{ROOT / 'protos'}"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, cwd=ROOT)


def end(process: "subprocess.Popen[str]") -> "subprocess.CompletedProcess[str]":
    stdout, stderr = process.communicate(timeout=60)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def scheduler(model: Path, *flags: str) -> "subprocess.CompletedProcess[str]":
    return end(begin(model, *flags))


def refused(result: "subprocess.CompletedProcess[str]", words: str) -> None:
    assert result.returncode == 2, result.stderr
    lines = result.stderr.splitlines()
    assert lines[-1].startswith("scheduler: ")
    assert words in lines[-1]
    assert all("add_port.cc" in line for line in lines[:-1]), result.stderr  # gRPC's own word on a port in use


def test_a_redis_that_is_not_there(timed_model: Path) -> None:
    """All at once, because each is given some seconds to come."""
    began = time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        out_of_reach = ("redis://127.0.0.1:1", "unix:///nowhere/r.sock", f"redis://127.0.0.1:{silent.getsockname()[1]}")
        processes = [begin(timed_model, "--redis-url", url) for url in out_of_reach]
        for process in processes:
            refused(end(process), "--redis-url: can't be reached")
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("url", ["http://127.0.0.1", "", "redis", "redis://127.0.0.1:x"])
def test_a_redis_url_that_is_none(timed_model: Path, url: str) -> None:
    refused(scheduler(timed_model, "--redis-url", url), "--redis-url: ")


@pytest.mark.parametrize("policy", ["allkeys-lru", "volatile-ttl"])
def test_a_redis_that_would_evict(timed_model: Path, policy: str) -> None:
    server = RedisServer("valkey", "--maxmemory-policy", policy).start()
    try:
        refused(scheduler(timed_model, "--redis-url", server.url), f"maxmemory-policy is {policy}")
    finally:
        server.close()


def test_a_port_in_use(timed_model: Path) -> None:
    server = RedisServer("valkey").start()
    try:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            taken = f"127.0.0.1:{listening.getsockname()[1]}"
            result = scheduler(timed_model, "--redis-url", server.url, "--listen", taken)
            refused(result, f"--listen={taken}: ")
        refused(scheduler(timed_model, "--redis-url", server.url, "--listen", "nowhere:x"), "--listen=nowhere:x: ")
    finally:
        server.close()


async def test_two_schedulers_on_one_port(timed_model: Path) -> None:
    """The second ends; the first never notices."""
    flags = ("--timed-step-s", "0.002", "--num-blocks", "100")
    async with running(Stack(timed_model, worker_flags=flags)) as stack:
        url = f"unix://{stack.redis_socket}"
        result = scheduler(timed_model, "--redis-url", url, "--listen", stack.address)
        refused(result, f"--listen={stack.address}: ")
        assert (await stack.idle()).workers[0].epoch == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "no *.safetensors"),
        (lambda folder: (folder / "config.json").unlink(), "config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
        (lambda folder: (folder / "config.json").write_text("[]"), "config.json"),
        (lambda folder: (folder / "config.json").write_text("{}"), "max_position_embeddings"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json is missing"),
        (lambda folder: (folder / "tokenizer.json").write_bytes(b"\xff\x00"), "tokenizer.json"),
        (lambda folder: (folder / "tokenizer_config.json").write_text("{"), "tokenizer_config.json"),
        (shutil.rmtree, "config.json"),
    ],
    ids=["no weights", "no config", "cut config", "list", "empty config", "no tokenizer", "noise", "cut", "nothing"],
)
def test_a_folder_that_is_no_model(tmp_path: Path, change: object, words: str) -> None:
    folder = make_timed_model(tmp_path / "model")
    change(folder)  # type: ignore[operator]
    with pytest.raises(ConfigError) as error:
        load_model(SchedulerConfig(folder, ("unix:/nowhere",), "unix:///nowhere"))
    assert words in str(error.value)
    assert str(error.value).startswith(f"--model={folder}: ")
    assert "\n" not in str(error.value)


def test_the_process_says_so(tmp_path: Path) -> None:
    refused(scheduler(tmp_path, "--redis-url", "unix:///nowhere/r.sock"), f"--model={tmp_path}: ")
    refused(scheduler(tmp_path, "--redis-url", "unix:///nowhere/r.sock", "--block-size", "8"), "--block-size=8")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--block-size", "8"), "--block-size=8"),
        (("--max-model-len", "-1"), "--max-model-len=-1"),
        (("--max-model-len", "99999"), "--max-model-len=99999"),
        (("--lease-s", "0"), "--lease-s=0"),
        (("--overcommit", "-1"), "--overcommit=-1"),
        (("--max-waiting", "0"), "--max-waiting=0"),
        (("--record-ttl-s", "0"), "--record-ttl-s=0"),
        (("--lease-s", "nan"), "--lease-s=nan"),
        (("--plan-ms", "-1"), "--plan-ms=-1"),
        (("--plan-ms", "nan"), "--plan-ms=nan"),
    ],
)
def test_a_flag_that_can_not_be(timed_model: Path, flags: tuple[str, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_model(parse_flags(["--model", str(timed_model), "--listen", "x", "--redis-url", "unix:///x", *flags]))


def test_the_port_is_free_again_after_a_refusal(timed_model: Path) -> None:
    port = free_port()
    scheduler(timed_model, "--redis-url", "", "--listen", f"127.0.0.1:{port}")
    socket.create_server(("127.0.0.1", port)).close()
