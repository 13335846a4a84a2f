"""What a step costs Redis: one script, keys that were named, and nothing that looks through the whole key space."""

import re
from importlib.resources import files

import pytest

from scheduler.changes import Changes
from scheduler.lua import STEP_PARTS
from scheduler.redis_pipe import RedisPipe
from scheduler.request_store import RequestStore
from scheduler.store import SequenceRow, WorkerStore
from tests.redis_servers import RedisServer

ROW = SequenceRow("request", 0, 0, 0, 0, -1).pack()
SCRIPTS = sorted(path.name for path in files("scheduler.lua").iterdir() if path.name.endswith(".lua"))


async def test_a_step_is_one_script_and_nothing_scans_the_keys(server: RedisServer, pipe: RedisPipe) -> None:
    store, requests = WorkerStore(pipe, "worker-0", 60), RequestStore(pipe, 60, 600)
    await store.seize(0)
    await store.reclaim("incarnation-1", 64)
    with server.client() as client:
        client.config_resetstat()
        await requests.create("r", b"digest", b"body", ("worker-0", 1), range(1, 2))
        await store.commit(Changes(describe=[(1, ROW)], reserve=[(1, [], [1, 2])]), 0)
        for i in range(20):
            await store.commit(Changes(append=[(1, i, [i])], publish=[(1, b"\x01" * 16)] if i == 0 else []), i)
        await store.commit(Changes(release=[1]), 20)
        await requests.end("r", ("worker-0", 1), b"end")
        await store.commit(Changes(close=[1]), 20)
        image, record = await store.load(), await requests.load("r")
        calls = {name.removeprefix("cmdstat_"): stats["calls"] for name, stats in client.info("commandstats").items()}
    assert image.rows == {}
    assert record is not None
    assert calls["evalsha"] == 1 + 1 + 20 + 1 + 1 + 1
    assert not {"keys", "scan", "hscan", "sscan", "eval", "flushall", "multi", "watch"} & calls.keys()


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_touches_only_keys_that_it_was_given(name: str) -> None:
    """So that a cluster can tell where it runs. And its head says what it is for."""
    text = files("scheduler.lua").joinpath(name).read_text("utf-8")
    code = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("--"))
    for command, key in re.findall(r"\b(?:redis\.call|call|later)\('(\w+)', *([^,)\s]+)", code):
        assert key.startswith(("KEYS[", "key", "log_keys[")), f"{name}: {command} {key}"
        assert command not in {"KEYS", "SCAN", "EVAL"}
    assert text.startswith(f"-- {name.removesuffix('.lua')}: ")
    if name.removesuffix(".lua") not in STEP_PARTS:
        assert "-- KEYS " in text
        assert "-- ARGV " in text or name == "seize.lua"
        assert "-- returns" in text
