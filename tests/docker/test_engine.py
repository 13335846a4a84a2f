"""The images built, the CPU profile up, and a generation that outlives its worker's container: `make test-docker`.

Needs an engine (DOCKER_HOST is heeded) with the base images, or a way to them, and runs in the engine's network.
"""

import asyncio
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from pagoda.v1 import generation_pb2 as pb

from scheduler.client import PagodaClient
from tests.stack import Received, collect, free_port, greedy

DEPLOY = Path(__file__).parents[2] / "deploy"
PROJECT = "pagoda-test"
BUILD_TIMEOUT_S, START_TIMEOUT_S = 3600, 180
PROMPT, NUM_TOKENS = [5, 6, 7, 8], 400
MAX_SCHEDULER_MB = 300
pytestmark = [pytest.mark.docker, pytest.mark.timeout(BUILD_TIMEOUT_S + 600)]


def engine() -> str | None:
    """Why there is none, or None."""
    if shutil.which("docker") is None:
        return "there is no docker here"
    found = subprocess.run(["docker", "info"], capture_output=True, text=True, check=False, timeout=60)
    return None if found.returncode == 0 else "no engine answers"


def compose_command() -> list[str]:
    """Version 2 where it is, else 1."""
    if subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode == 0:
        return ["docker", "compose"]
    return ["docker-compose"]


class Compose:
    """One project, on a port of its own."""

    def __init__(self) -> None:
        self.port = free_port()
        self._environment = {**os.environ, "PORT": str(self.port), "DTYPE": "float32"}

    def run(self, *arguments: str, timeout_s: float = START_TIMEOUT_S) -> str:
        command = [*compose_command(), "-p", PROJECT, "--profile", "cpu", *arguments]
        said = subprocess.run(
            command, cwd=DEPLOY, env=self._environment, capture_output=True, text=True, check=False, timeout=timeout_s
        )
        assert said.returncode == 0, said.stdout[-3000:] + said.stderr[-3000:]
        return said.stdout

    def container(self, service: str) -> str:
        return self.run("ps", "-q", service).split()[0]


def inspect(name: str, form: str) -> str:
    command = ["docker", "inspect", "--format", form, name]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()


@pytest.fixture(scope="module")
def compose() -> Iterator[Compose]:
    why = engine()
    if why is not None:
        pytest.skip(why)
    compose = Compose()
    compose.run("build", timeout_s=BUILD_TIMEOUT_S)
    compose.run("up", "--detach")
    try:
        yield compose
    finally:
        compose.run("down", "--volumes")


async def healthy(compose: Compose, *services: str) -> None:
    """Waits until the engine says so of each."""
    async with asyncio.timeout(START_TIMEOUT_S):
        for service in services:
            name = compose.container(service)
            while await asyncio.to_thread(inspect, name, "{{.State.Health.Status}}") != "healthy":  # noqa: ASYNC110
                await asyncio.sleep(0.5)


async def test_everything_comes_up_healthy(compose: Compose) -> None:
    await healthy(compose, "redis", "scheduler", "worker-cpu")


async def test_a_generation_outlives_its_worker_s_container(compose: Compose) -> None:
    async with PagodaClient(f"127.0.0.1:{compose.port}", give_up_s=START_TIMEOUT_S) as client:
        expected, _, _ = await collect(client, greedy(PROMPT, NUM_TOKENS))
        received = Received()
        reading = asyncio.create_task(collect(client, greedy(PROMPT, NUM_TOKENS, resumable=True), received))
        await received.at_least(NUM_TOKENS // 4)
        worker = compose.container("worker-cpu")
        os.kill(int(inspect(worker, "{{.State.Pid}}")), signal.SIGKILL)
        assert not reading.done()
        token_ids, _, last = await asyncio.wait_for(reading, START_TIMEOUT_S)
        assert token_ids == expected
        assert last.finish_reason == pb.FINISH_REASON_LENGTH
        await healthy(compose, "worker-cpu")
        assert int(inspect(worker, "{{.RestartCount}}")) == 1


def test_the_scheduler_s_own_layers_are_small(compose: Compose) -> None:
    command = ["docker", "history", "--no-trunc", "--format", "{{.Size}} {{.CreatedBy}}", "pagoda-scheduler"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.splitlines()
    (copied,) = (line for line in lines if "COPY" in line)
    size, unit = copied.split()[0].rstrip("B")[:-1], copied.split()[0][-2:]
    assert unit == "MB"
    assert float(size) < MAX_SCHEDULER_MB - 130, "a slim base has 130"
