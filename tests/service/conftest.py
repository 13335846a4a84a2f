"""Stacks that tests share, because starting one takes a second; each test leaves them idle, or fails."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc.aio
import pytest
from pagoda.v1 import generation_pb2_grpc

from scheduler.client import PagodaClient
from tests.stack import Stack, started
from tests.timed import make_timed_model


@pytest.fixture(scope="session")
def timed_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder for stacks that wait instead of computing."""
    return make_timed_model(tmp_path_factory.mktemp("timed"))


@pytest.fixture(scope="session")
def shared_stack(timed_model: Path) -> Iterator[Stack]:
    flags = ("--timed-step-s", "0.002", "--num-blocks", "2000")
    with started(Stack(timed_model, worker_flags=flags, scheduler_flags=("--lease-s", "1"))) as stack:
        yield stack


@pytest.fixture
async def stack(shared_stack: Stack) -> AsyncIterator[Stack]:
    """One timed worker; afterwards nothing runs, nobody waits, and every block is free or cached."""
    yield shared_stack
    await shared_stack.idle()


@pytest.fixture
async def client(stack: Stack) -> AsyncIterator[PagodaClient]:
    """A client that resumes by itself."""
    async with stack.client() as client:
        yield client


@pytest.fixture
async def stub(stack: Stack) -> AsyncIterator[generation_pb2_grpc.GenerationStub]:
    """The bare contract: what fails shows."""
    async with grpc.aio.insecure_channel(stack.address) as channel:
        yield generation_pb2_grpc.GenerationStub(channel)
