"""What the flags of `pagoda up` become on the command lines of its processes."""

from pathlib import Path

import pytest

from deploy import settings as settings_module
from deploy import stack as stack_module
from deploy.errors import DeployError
from deploy.settings import UpSettings, scheduler_command, worker_commands

SOCKET = Path("/tmp/x/pagoda.sock")


def flags(argv: tuple[str, ...]) -> dict[str, str]:
    return dict(zip(argv[3::2], argv[4::2], strict=True))


def test_cores_and_kv_memory_are_shared_out_among_cpu_workers(monkeypatch):
    monkeypatch.setattr(settings_module, "num_cores", lambda: 10)
    commands = worker_commands(UpSettings(Path("m"), workers=3, kv_memory="3GiB"), SOCKET)
    assert [command.name for command in commands] == ["worker-0", "worker-1", "worker-2"]
    for command in commands:
        assert flags(command.argv)["--num-threads"] == "3"
        assert flags(command.argv)["--kv-memory"] == str(1 << 30)
        assert flags(command.argv)["--name"] == command.name
        assert flags(command.argv)["--scheduler"] == f"unix:{SOCKET}"


def test_without_a_flag_several_cpu_workers_take_together_what_one_would(monkeypatch):
    monkeypatch.setattr(settings_module, "_available_bytes", lambda: 2 << 30)
    share = flags(worker_commands(UpSettings(Path("m"), workers=4), SOCKET)[0].argv)["--kv-memory"]
    assert share == str((2 << 30) // 4 // 4)
    assert "--kv-memory" not in worker_commands(UpSettings(Path("m")), SOCKET)[0].argv
    assert "--kv-memory" not in worker_commands(UpSettings(Path("m"), workers=2, num_blocks=9), SOCKET)[0].argv


def test_each_gpu_worker_has_its_own_device_and_the_memory_as_given():
    commands = worker_commands(UpSettings(Path("m"), workers=2, device="cuda", kv_memory="3GiB"), SOCKET)
    assert [flags(command.argv)["--device"] for command in commands] == ["cuda:0", "cuda:1"]
    assert all(flags(command.argv)["--kv-memory"] == "3GiB" for command in commands)
    assert all("--num-threads" not in command.argv for command in commands)


def test_what_is_not_given_is_left_to_the_processes():
    command = scheduler_command(UpSettings(Path("m")), SOCKET, "redis://:secret@host")
    assert command.argv[3:] == ("--listen", f"unix:{SOCKET}", "--model", "m")
    assert command.environment == (("REDIS_URL", "redis://:secret@host"),), "a password is on the command line"
    given = UpSettings(
        Path("m"), port=5, block_size=32, dtype="float16", max_model_len=9, record_ttl_s=3, overcommit=1.5
    )
    argv = scheduler_command(given, SOCKET, "unix:///r").argv
    assert "127.0.0.1:5" in argv
    expected = ("--block-size", "32", "--dtype", "float16", "--max-model-len", "9")
    assert argv[argv.index("--block-size") :] == (*expected, "--record-ttl-s", "3", "--overcommit", "1.5")


def test_every_flag_is_one_that_the_processes_know(monkeypatch):
    from scheduler.config import parse_flags
    from scheduler.swap_ahead import Preemption
    from worker.config import parse_config

    everything = UpSettings(
        *(Path("m"), 2, "cpu", "float32", "int8", "1GiB", None, "2GiB", None, 16, 64, 8, 128, 5),
        *(None, None, None, 3, 7, 1.5, "swap", 5.0),
    )
    command = scheduler_command(everything, SOCKET, "unix:///r")
    for name, value in command.environment:
        monkeypatch.setenv(name, value)
    config = parse_flags(command.argv[3:])
    assert (config.overcommit, config.redis_url, config.kv_dtype) == (1.5, "unix:///r", "auto")
    assert (config.preemption, config.plan_ms) == (Preemption.SWAP, 5.0)
    worker = parse_config(worker_commands(everything, SOCKET)[1].argv[3:])
    assert (worker.max_num_seqs, worker.dtype, worker.kv_cache_dtype) == (8, "float32", "int8")
    assert worker.host_memory_bytes == 2 * 2**30


def test_cores_are_counted():
    assert 1 <= settings_module.num_cores() <= 4096


def test_sockets_find_a_short_folder(tmp_path, monkeypatch):
    long = tmp_path / ("x" * 90)
    long.mkdir()
    monkeypatch.setattr(stack_module.tempfile, "tempdir", str(long))
    folder = stack_module._socket_folder()
    assert folder.parent == Path("/tmp")
    folder.rmdir()
    assert not list(long.iterdir())


def test_a_failed_start_leaves_nothing(tmp_path, monkeypatch):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "a.safetensors").write_bytes(b"")
    monkeypatch.setattr(stack_module.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(stack_module.signal, "pthread_sigmask", lambda *_: None)
    monkeypatch.setenv("PAGODA_LOG_LEVEL", "WARNING")

    def fail(*_: object) -> None:
        raise DeployError("no redis")

    monkeypatch.setattr(stack_module.redis_server, "wait_until_ready", fail)
    started, kill = [], stack_module.kill
    monkeypatch.setattr(stack_module, "kill", lambda children: (started.extend(children), kill(children)))
    with pytest.raises(DeployError, match="no redis"):
        stack_module.start(UpSettings(model))
    assert [child.command.name for child in started] == ["redis", "worker-0"]
    assert all(child.exit_code is not None for child in started)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
