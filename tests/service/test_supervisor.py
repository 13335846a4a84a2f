"""The supervisor with small real processes: restarts, order of the end, and nothing left behind."""

import asyncio
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from deploy import supervisor as supervisor_module
from deploy.child import Child, ChildLog, Command
from deploy.errors import DeployError
from deploy.stack import Stack, kill
from deploy.supervisor import Supervisor

ROOT = Path(__file__).parents[2]


def sh(name: str, script: str) -> Command:
    return Command(name, ("sh", "-c", script))


def python(name: str, script: str) -> Command:
    return Command(name, (sys.executable, "-c", textwrap.dedent(script)))


@pytest.fixture
def stack():
    stack = Stack(Path(tempfile.mkdtemp(prefix="pgd-")), "unix:none")
    yield stack
    kill(list(stack.children.values()))
    shutil.rmtree(stack.folder, ignore_errors=True)


async def ready(stack: Stack, supervisor: Supervisor) -> None:
    assert await supervisor.wait_ready(asyncio.create_task(asyncio.sleep(0)))


async def until(condition, timeout_s: float = 10) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        await asyncio.sleep(0.01)


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


async def test_a_dead_child_is_started_again_and_its_new_pid_published(stack, tmp_path):
    stack.spawn(sh("a", "exec sleep 100"))
    stack.spawn(sh("b", "exec sleep 100"))
    pids_file = tmp_path / "pids.json"
    async with Supervisor(stack, pids_file) as supervisor:
        await ready(stack, supervisor)
        before = json.loads(pids_file.read_text())
        assert before == {name: child.pid for name, child in stack.children.items()}
        os.kill(before["a"], signal.SIGKILL)
        await until(lambda: json.loads(pids_file.read_text())["a"] != before["a"])
        after = json.loads(pids_file.read_text())
        assert after["b"] == before["b"]
        assert not gone(after["a"])
        assert supervisor.down == ""
    assert all(map(gone, [*before.values(), *after.values()]))
    assert not pids_file.exists()
    assert not stack.folder.exists()


async def test_a_large_stack_is_looked_after_to_the_last_child(stack):
    for index in range(40):
        stack.spawn(sh(f"c{index}", "exec sleep 100"))
    async with Supervisor(stack) as supervisor:
        await ready(stack, supervisor)
        last = stack.children["c39"].pid
        os.kill(last, signal.SIGKILL)
        await until(lambda: stack.children["c39"].pid != last)
    assert all(gone(child.pid) for child in stack.children.values())


async def test_backoff_grows_while_it_dies_at_once(stack, tmp_path):
    starts = tmp_path / "starts"
    stack.spawn(python("a", f"import time; open({str(starts)!r}, 'a').write(str(time.time()) + '\\n'); exit(1)"))
    async with Supervisor(stack) as supervisor:
        await ready(stack, supervisor)
        await until(lambda: starts.exists() and len(starts.read_text().splitlines()) >= 4)
    times = [float(line) for line in starts.read_text().splitlines()]
    pauses = [b - a for a, b in itertools.pairwise(times)]
    assert pauses[0] >= 0.1
    assert pauses[1] >= 0.2
    assert pauses[2] >= 0.4


async def test_what_is_down_is_named(stack, monkeypatch):
    monkeypatch.setattr(supervisor_module, "FIRST_BACKOFF_S", 100)
    stack.spawn(sh("steady", "exec sleep 100"))
    stack.spawn(sh("broken", "sleep 0.2; exit 7"))
    async with Supervisor(stack) as supervisor:
        await ready(stack, supervisor)
        await until(lambda: supervisor.down)
        assert supervisor.down == "broken ended with exit code 7"
        os.kill(stack.children["steady"].pid, signal.SIGKILL)
        await until(lambda: "," in supervisor.down)
        assert "steady was killed by SIGKILL" in supervisor.down


@pytest.mark.parametrize("code", [2, 3])
async def test_a_configuration_error_at_the_start_ends_it_with_its_line(stack, code):
    stack.spawn(sh("ok", "exec sleep 100"))
    stack.spawn(sh("bad", f"echo noise >&2; echo 'worker: model: no weights' >&2; exit {code}"))
    with pytest.raises(DeployError) as caught:
        async with Supervisor(stack) as supervisor:
            await supervisor.wait_ready(asyncio.create_task(asyncio.sleep(100)))
    assert str(caught.value) == "worker: model: no weights"
    assert caught.value.exit_code == code
    assert gone(stack.children["ok"].pid)


async def test_a_child_that_keeps_dying_at_the_start_ends_it(stack):
    stack.spawn(sh("bad", "kill -9 $$"))
    with pytest.raises(DeployError, match="bad was killed by SIGKILL and said nothing"):
        async with Supervisor(stack) as supervisor:
            await supervisor.wait_ready(asyncio.create_task(asyncio.sleep(100)))


async def test_a_child_that_dies_once_at_the_start_is_given_another_chance(stack, tmp_path):
    flag = tmp_path / "flag"
    stack.spawn(sh("a", f"test -e {flag} && exec sleep 100; touch {flag}; exit 1"))
    async with Supervisor(stack) as supervisor:
        waiting = asyncio.create_task(supervisor.wait_ready(asyncio.create_task(asyncio.sleep(1))))
        assert await waiting
        assert supervisor.down == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
async def test_a_signal_before_it_is_ready_ends_it(stack, number):
    stack.spawn(sh("a", "exec sleep 100"))
    async with Supervisor(stack) as supervisor:
        asyncio.get_running_loop().call_later(0.1, os.kill, os.getpid(), number)
        assert not await supervisor.wait_ready(asyncio.create_task(asyncio.sleep(100)))
        assert supervisor.stopping.is_set()
    assert gone(stack.children["a"].pid)


async def test_the_end_is_in_order_and_spares_nobody(stack, tmp_path, monkeypatch):
    monkeypatch.setattr(supervisor_module, "GRACE_S", 0.5)
    order = tmp_path / "order"
    slow = f"trap 'sleep 0.2; echo NAME >> {order}; exit 0' TERM; while :; do sleep 0.02; done"
    stack.spawn(sh("redis", slow.replace("NAME", "redis")))
    stack.spawn(sh("worker", slow.replace("NAME", "worker")))
    stack.spawn(sh("deaf", "trap '' TERM; while :; do sleep 0.02; done"))
    stack.spawn(sh("stopped", "exec sleep 100"))
    async with Supervisor(stack) as supervisor:
        await ready(stack, supervisor)
        await asyncio.sleep(0.3)
        os.kill(stack.children["stopped"].pid, signal.SIGSTOP)
    assert order.read_text().split() == ["worker", "redis"]
    assert all(gone(child.pid) for child in stack.children.values())


async def test_what_children_started_ends_too(stack, tmp_path):
    pid_file = tmp_path / "pid"
    stack.spawn(sh("a", f"sleep 100 & echo $! > {pid_file}; wait"))
    async with Supervisor(stack) as supervisor:
        await ready(stack, supervisor)
        await until(lambda: pid_file.exists() and pid_file.read_text().strip())
    await until(lambda: gone(int(pid_file.read_text())))


def test_children_die_with_a_supervisor_that_is_killed(tmp_path):
    script = f"""
        import sys, time
        sys.path.insert(0, {str(ROOT)!r})
        from deploy.child import Child, ChildLog, Command
        log = ChildLog()
        children = [Child(Command(f"c{{i}}", ("sleep", "100")), log) for i in range(3)]
        print(*[child.pid for child in children], flush=True)
        time.sleep(100)
    """
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True)
    pids = [int(word) for word in parent.stdout.readline().split()]
    assert len(pids) == 3
    assert not any(map(gone, pids))
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 10
    while not all(map(gone, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_lines_are_held_until_everything_is_ready(capfd):
    log = ChildLog()
    child = Child(sh("a", "echo early; echo late >&2; exit 5"), log)
    assert child.wait() == 5
    assert child.last_line == "late"
    log.write("chatter\n", is_chatter=True)
    assert capfd.readouterr().err == ""
    log.release()
    log.write("after\n")
    log.mute()
    log.write("end\n")
    assert capfd.readouterr().err == "early\nlate\nafter\n"


def test_a_line_that_tells_why_it_takes_long_is_passed_on_at_once(capfd):
    command = replace(sh("a", "echo early; echo compiling kernels"), progress="compiling ")
    child = Child(command, ChildLog())
    assert child.wait() == 0
    assert child.last_line == "compiling kernels"
    assert capfd.readouterr().err == "compiling kernels\n"


async def test_starting_children_while_grpc_runs_does_not_hang(stack):
    """gRPC's threads and a fork: the child must still get to its exec."""
    import grpc.aio

    from scheduler.client import PagodaClient

    server = grpc.aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with PagodaClient(f"127.0.0.1:{port}") as client:
        assert not await client.is_serving()
        for _ in range(20):
            child = stack.spawn(sh("a", "exit 0"))
            assert await asyncio.wait_for(asyncio.to_thread(child.wait), 10) == 0
            assert not await client.is_serving()
    await server.stop(None)
