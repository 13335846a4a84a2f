"""The `pagoda` command end to end: real processes, a small random model, kills in mid-stream."""

import contextlib
import json
import os
import pty
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.stack import free_port

ROOT = Path(__file__).parents[2]
PAGODA = [sys.executable, "-m", "deploy.cli"]
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "REDIS_URL"} | {
    "PYTHONPATH": f"{ROOT}:{ROOT / 'protos'}"
}
TIMEOUT_S = 120


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    from tests.checkpoints import make_checkpoint

    return make_checkpoint("llama3", tmp_path_factory.mktemp("cli") / "llama3")


def pagoda(*flags: object, **environment: str) -> "subprocess.CompletedProcess[str]":
    command = [*PAGODA, *(flag if isinstance(flag, bytes) else str(flag) for flag in flags)]
    environment = ENVIRONMENT | environment
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, env=environment, check=False)


def refused(result: "subprocess.CompletedProcess[str]", words: str) -> None:
    """One line that has the words, and a code that tells."""
    assert result.returncode != 0
    assert result.stdout == ""
    assert words in result.stderr
    assert result.stderr.startswith("pagoda: ")
    assert result.stderr.count("\n") == 1, result.stderr


@dataclass
class Up:
    """A running `pagoda up`."""

    process: "subprocess.Popen[str]"
    port: int
    pids_file: Path
    ready_line: str

    def pids(self) -> dict[str, int]:
        return json.loads(self.pids_file.read_text())

    def generate(self, *flags: object) -> "subprocess.CompletedProcess[str]":
        return pagoda("generate", "--port", self.port, *flags)

    def status(self) -> dict:
        return json.loads(pagoda("status", "--port", self.port, "--json").stdout)

    def end(self, number: signal.Signals = signal.SIGTERM) -> tuple[int, str, str]:
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=TIMEOUT_S)
        return self.process.returncode, out, err


def start_up(model: Path, folder: Path, *flags: object, **environment: str) -> Up:
    port, pids_file = free_port(), folder / "pids.json"
    command = [*PAGODA, "up", "--model", model, "--port", port, "--pids", pids_file, "--dtype", "float32", *flags]
    process = subprocess.Popen(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT | environment,
    )
    line = process.stdout.readline()
    if not line.startswith("pagoda: ready"):
        process.kill()
        pytest.fail(line + process.communicate()[1])
    return Up(process, port, pids_file, line)


@pytest.fixture(scope="module", autouse=True)
def sigint_is_heard() -> Iterator[None]:
    """A shell's background job ignores it, and so would the children of the tests."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def up(model, tmp_path_factory) -> Iterator[Up]:
    running = start_up(model, tmp_path_factory.mktemp("up"), "--workers", 2, "--kv-memory", "8MiB")
    yield running
    if running.process.poll() is None:
        running.end()


def wait_gone(pids: list[int], timeout_s: float = 15) -> None:
    deadline = time.monotonic() + timeout_s
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < deadline, [psutil.Process(pid).cmdline() for pid in pids if is_running(pid)]
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_up_says_one_line_and_shares_out_the_memory(up):
    assert up.ready_line == f"pagoda: ready, llama3 on 127.0.0.1:{up.port} with 2 workers\n"
    assert set(up.pids()) == {"redis", "scheduler", "worker-0", "worker-1"}
    workers = up.status()["workers"]
    assert [worker["name"] for worker in workers] == ["worker-0", "worker-1"]
    blocks = [worker["num_blocks"] for worker in workers]
    block_bytes = 3 * 2 * 2 * 16 * 8 * 4  # layers, K and V, KV heads, block_size, head_dim, float32
    assert blocks == [(4 << 20) // block_bytes - 1] * 2


def test_text_and_json_say_the_same(up):
    flags = ("--prompt", "the quick brown fox", "--max-tokens", 20, "--temperature", 0)
    text = up.generate(*flags)
    assert (text.returncode, text.stderr) == (0, "")
    result = up.generate(*flags, "--json", "--request-id", "mine")
    assert result.stdout.count("\n") == 1
    answer = json.loads(result.stdout)
    assert text.stdout == answer["text"] + "\n"
    assert list(answer) == ["request_id", "text", "token_ids", "finish_reason", "usage"]
    assert answer["request_id"] == "mine"
    assert len(answer["token_ids"]) == answer["usage"]["num_output_tokens"]
    assert answer["finish_reason"] in ("length", "stop")
    assert answer["usage"]["num_prompt_tokens"] > 0


def test_choices_are_written_one_after_the_other(up):
    flags = ("--prompt", "the quick brown fox", "--max-tokens", 12, "--seed", 5, "--ignore-eos", "--n", 3)
    answer = json.loads(up.generate(*flags, "--json").stdout)
    assert list(answer) == ["request_id", "choices"]
    assert [len(choice["token_ids"]) for choice in answer["choices"]] == [12] * 3
    assert len({choice["text"] for choice in answer["choices"]}) == 3
    text = up.generate(*flags)
    assert (text.returncode, text.stderr) == (0, "")
    assert text.stdout == "".join(f"--- choice {i}\n{c['text']}\n" for i, c in enumerate(answer["choices"]))
    one = json.loads(up.generate(*flags[:-2], "--json").stdout)
    assert one["token_ids"] == answer["choices"][0]["token_ids"]


def test_the_best_of_several_are_written_with_their_scores(up):
    flags = ("--prompt", "the quick brown fox", "--max-tokens", 8, "--seed", 5, "--ignore-eos")
    every = json.loads(up.generate(*flags, "--n", 5, "--json").stdout)["choices"]
    answer = json.loads(up.generate(*flags, "--n", 2, "--best-of", 5, "--json").stdout)
    scores = [choice["score"] for choice in answer["choices"]]
    assert len(scores) == 2
    assert scores == sorted(scores, reverse=True)
    assert all(choice["text"] in [other["text"] for other in every] for choice in answer["choices"])
    text = up.generate(*flags, "--n", 2, "--best-of", 5)
    assert text.stdout == "".join(f"--- choice {i}\n{c['text']}\n" for i, c in enumerate(answer["choices"]))
    one = json.loads(up.generate(*flags, "--best-of", 5, "--json").stdout)
    assert (one["token_ids"], one["score"]) == (answer["choices"][0]["token_ids"], scores[0])
    refused = up.generate(*flags, "--n", 2, "--best-of", 1)
    assert "best_of" in refused.stderr
    assert refused.returncode != 0


def test_beams_are_written_best_first_with_their_scores(up):
    flags = ("--prompt", "the quick brown fox", "--max-tokens", 6, "--ignore-eos", "--beam-width", 3)
    best = json.loads(up.generate(*flags, "--json").stdout)
    answer = json.loads(up.generate(*flags, "--n", 3, "--json").stdout)
    scores = [choice["score"] for choice in answer["choices"]]
    assert scores == sorted(scores, reverse=True)
    assert best["token_ids"] == answer["choices"][0]["token_ids"]
    assert list(best) == ["request_id", "text", "token_ids", "finish_reason", "usage", "score"]


def test_every_form_of_prompt_and_of_stop(up):
    common = ("--max-tokens", 8, "--temperature", 0, "--ignore-eos", "--json")
    by_ids = json.loads(up.generate("--token-ids", "5,6,7", *common).stdout)
    assert len(by_ids["token_ids"]) == 8
    assert json.loads(up.generate("--chat", "hello", *common).stdout)["finish_reason"] == "length"
    stopped = up.generate("--token-ids", "5,6,7", *common, "--stop-token-ids", by_ids["token_ids"][3])
    assert json.loads(stopped.stdout)["finish_reason"] == "stop"
    first = next(i for i, token_id in enumerate(by_ids["token_ids"]) if token_id == by_ids["token_ids"][3])
    assert json.loads(stopped.stdout)["token_ids"] == by_ids["token_ids"][: first + 1]
    text = by_ids["text"]
    cut = json.loads(up.generate("--token-ids", "5,6,7", *common, "--stop", text[2:4], "--stop", "zzzz").stdout)
    assert cut["text"] == text[: text.find(text[2:4])]


def test_a_seed_draws_the_same_again(up):
    flags = ("--prompt", "the", "--max-tokens", 12, "--temperature", 1.5, "--top-k", 50, "--top-p", 0.9)
    first = up.generate(*flags, "--min-p", 0.001, "--seed", 7)
    assert first.stdout == up.generate(*flags, "--min-p", 0.001, "--seed", 7).stdout
    assert first.returncode == 0


def test_the_same_id_and_body_again_gives_the_same_answer(up):
    flags = ("--prompt", "again", "--max-tokens", 6, "--request-id", "again-1", "--json")
    first = up.generate(*flags)
    assert first.returncode == 0
    assert up.generate(*flags).stdout == first.stdout
    refused(up.generate("--prompt", "other", "--request-id", "again-1"), "ALREADY_EXISTS")


BAD_REQUESTS = {
    "top_p": (("--prompt", "a", "--top-p", 2), "INVALID_ARGUMENT: sampling.top_p"),
    "temperature": (("--prompt", "a", "--temperature", "nan"), "INVALID_ARGUMENT: sampling.temperature"),
    "max_tokens": (("--prompt", "a", "--max-tokens", 0), "INVALID_ARGUMENT: sampling.max_tokens"),
    "empty": (("--prompt", ""), "INVALID_ARGUMENT: text: is empty"),
    "range": (("--token-ids", "1,4000"), "INVALID_ARGUMENT: token_ids.ids[1]"),
    "too long": (("--token-ids", ",".join(["5"] * 600)), "INVALID_ARGUMENT: prompt: is 600 tokens long"),
    "ids": (("--token-ids", "1,x"), "--token-ids 1,x: must be ids"),
    "negative seed": (("--prompt", "a", "--seed", -1), "--seed -1: out of range"),
    "no prompt": ((), "give exactly one of --prompt, --token-ids, --chat"),
    "two prompts": (("--prompt", "a", "--chat", "b"), "give exactly one of"),
    "no number": (("--prompt", "a", "--max-tokens", "many"), "--max-tokens"),
    "no flag": (("--prompt", "a", "--frequency", 1), "--frequency"),
}


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_a_bad_request_is_one_line(up, case):
    flags, words = BAD_REQUESTS[case]
    refused(up.generate(*flags), words)


def test_a_prompt_that_is_not_utf8_is_one_line(up):
    refused(up.generate("--prompt", b"\xff\xfe"), "--prompt")


def test_status_prints_a_table(up):
    result = pagoda("status", "--port", up.port)
    assert result.returncode == 0
    for word in ("worker-0", "worker-1", "live", "running", "waiting", "free", "referenced", "cached", "prefix hits"):
        assert word in result.stdout
    worker = up.status()["workers"][0]
    blocks = ("num_free_blocks", "num_referenced_blocks", "num_cached_blocks")
    assert sum(worker[name] for name in blocks) == worker["num_blocks"]


def test_blocks_are_drawn_once_where_nobody_watches(up):
    up.generate("--prompt", "the quick brown fox jumps", "--max-tokens", 20, "--request-id", "drawn", "--ignore-eos")
    result = pagoda("blocks", "--port", up.port, "--watch")
    assert (result.returncode, result.stderr) == (0, "")
    for word in ("worker-0", "worker-1", "free", "referenced", "cached", "evicted", "-", "·"):
        assert word in result.stdout
    assert "\x1b" not in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80
    one = json.loads(pagoda("blocks", "--port", up.port, "--worker", "worker-0", "--json").stdout)
    (pool,) = one["pools"]
    assert len(pool["states"]) == len(pool["ref_counts"]) == up.status()["workers"][0]["num_blocks"]
    assert set(pool["states"]) <= set("frcp")
    refused(pagoda("blocks", "--port", up.port, "--worker", "nobody"), "NOT_FOUND: worker: no worker 'nobody'")


def test_blocks_are_drawn_again_and_again_on_a_terminal_until_ctrl_c(up):
    """Through a kill of the scheduler: what it said last stays, with a word."""
    terminal, end = pty.openpty()
    command = [*PAGODA, "blocks", "--port", str(up.port), "--watch"]
    process = subprocess.Popen(command, stdout=end, stderr=end, env=ENVIRONMENT | {"TERM": "xterm", "COLUMNS": "80"})
    os.close(end)
    try:
        notes = below_the_legends(terminal)
        assert b"does not answer" not in next(notes)
        while b"does not answer" not in next(notes):  # it may be back before anybody asks: then once more
            with contextlib.suppress(ProcessLookupError):
                os.kill(up.pids()["scheduler"], signal.SIGKILL)
        while b"does not answer" in next(notes):
            pass
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(OSError):  # the terminal's end
            while os.read(terminal, 4096):
                pass
        assert process.wait(TIMEOUT_S) == 0
    finally:
        process.kill()
        process.wait()
        os.close(terminal)


def below_the_legends(terminal: int) -> Iterator[bytes]:
    """Of each frame that a terminal shows, what stands behind the last line that is always there."""
    shown = b""
    while True:
        assert select.select([terminal], [], [], TIMEOUT_S)[0], shown
        shown += os.read(terminal, 4096)
        *frames, shown = shown.split(b"worker-0")
        for text in frames:
            if b"tables" in text:
                yield text.rpartition(b"tables")[2]


def test_a_request_is_explained(up):
    flags = ("--token-ids", ",".join(map(str, range(3, 43))), "--max-tokens", 2, "--temperature", 0, "--ignore-eos")
    for name in ("explained-1", "explained-2"):
        assert up.generate(*flags, "--request-id", name).returncode == 0
    first, second = (pagoda("explain", name, "--port", up.port).stdout for name in ("explained-1", "explained-2"))
    assert first.startswith("explained-1: a prompt of 40 tokens in 3 blocks of 16\n")
    assert "0 of 3 blocks hit" in first
    assert "2 of 3 blocks hit" in second
    assert "tokens 0-31 " in second
    assert "hit on the device" in second
    answer = json.loads(pagoda("explain", "explained-2", "--port", up.port, "--json").stdout)
    assert answer["admissions"][0]["sources"] == ["hit", "hit", "last"]
    refused(pagoda("explain", "nobody", "--port", up.port), "NOT_FOUND: request_id: no request 'nobody'")


def test_a_port_in_use_is_one_line(up, model):
    refused(pagoda("up", "--model", model, "--port", up.port), f"port {up.port} is in use")


def test_nobody_there_is_one_line():
    port = free_port()
    refused(pagoda("generate", "--port", port, "--prompt", "a"), f"nothing answers on port {port}")
    for command in (("status",), ("blocks",), ("explain", "mine")):
        refused(pagoda(*command, "--port", port), f"nothing answers on port {port}")


@pytest.mark.parametrize("victim", ["scheduler", "worker-0", "worker-1", "redis"])
def test_a_kill_in_mid_stream_loses_and_repeats_nothing(up, victim):
    flags = ("--token-ids", "9,8,7", "--max-tokens", 300, "--ignore-eos", "--temperature", 0, "--json")
    expected = json.loads(up.generate(*flags).stdout)
    command = [*PAGODA, "generate", "--port", str(up.port), *map(str, flags[:-1])]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT, bufsize=0)
    text = process.stdout.read(20)
    before = up.pids()[victim]
    os.kill(before, signal.SIGKILL)
    rest, err = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, err) == (0, b"")
    assert (text + rest).decode() == expected["text"] + "\n"
    deadline = time.monotonic() + 30
    while up.pids()[victim] == before or len([w for w in up.status()["workers"] if w["state"] == "live"]) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_ctrl_c_cancels_the_request(up):
    command = [*PAGODA, "generate", "--port", str(up.port), "--token-ids", "1,2", "--max-tokens", "480", "--ignore-eos"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT)
    process.stdout.read(5)
    workers = [pid for name, pid in up.pids().items() if name.startswith("worker")]
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)  # so that the request can't end before the signal is there
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=TIMEOUT_S)
    for pid in workers:
        os.kill(pid, signal.SIGCONT)
    assert process.returncode in (130, -signal.SIGINT)
    deadline = time.monotonic() + 10
    while up.status()["num_live_requests"]:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_reader_that_goes_away_is_no_traceback(up):
    command = [*PAGODA, "generate", "--port", str(up.port), "--token-ids", "1,2", "--max-tokens", "480", "--ignore-eos"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT)
    process.stdout.read(5)
    process.stdout.close()
    assert process.stderr.read() == b""
    process.wait(TIMEOUT_S)
    process.stderr.close()


def test_sigterm_ends_it_cleanly(up):
    """The last that uses the shared service."""
    pids = list(up.pids().values())
    code, out, err = up.end()
    assert (code, out) == (0, "")
    assert "Traceback" not in err
    wait_gone(pids)
    assert not up.pids_file.exists()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_nothing_outlives_it(model, tmp_path, how):
    with tempfile.TemporaryDirectory(prefix="pgd-") as sockets:  # a supervisor that is killed can't remove its own
        running = start_up(model, tmp_path, "--num-blocks", 64, "--data", tmp_path / "data", TMPDIR=sockets)
        pids = list(running.pids().values())
        code, _, _ = running.end(how)
        assert code == (0 if how == signal.SIGINT else -signal.SIGKILL)
        wait_gone(pids)
    assert list((tmp_path / "data").rglob("*.aof*"))  # the folder that was named stays


def test_an_unused_folder_is_not_left(model, tmp_path):
    before = set(Path(tempfile.gettempdir()).glob("pagoda-*"))
    running = start_up(model, tmp_path, "--num-blocks", 64)
    assert len(set(Path(tempfile.gettempdir()).glob("pagoda-*")) - before) == 1
    assert running.end()[0] == 0
    assert set(Path(tempfile.gettempdir()).glob("pagoda-*")) <= before


def test_run_shows_prompt_and_answer_and_ends(model):
    result = pagoda("run", "--model", model, "--prompt", "the quick", "--max-tokens", 10, "--temperature", 0)
    assert result.returncode == 0
    assert result.stdout.startswith("the quick")
    assert len(result.stdout) > len("the quick\n")
    assert result.stderr.count("\n") == 1  # how long it took
    assert " tokens, the first " in result.stderr


def test_run_can_be_interrupted(model):
    command = [*PAGODA, "run", "--model", str(model), "--prompt", "the", "--max-tokens", "480", "--temperature", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT)
    process.stdout.read(3)  # the prompt: everything is up
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, err) == (130, b"pagoda: interrupted\n")
    wait_gone([child.pid for child in children])


def copy_model(model: Path, folder: Path) -> Path:
    folder.mkdir()
    for path in model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def break_weights(folder: Path) -> None:
    path = next(folder.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:100])


def drop_weights(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        path.unlink()


BROKEN_FOLDERS = {
    "no weights": (drop_weights, "has no weights"),
    "half a weight file": (break_weights, ".safetensors"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json"),
    "broken tokenizer": (lambda folder: (folder / "tokenizer.json").write_text("{"), "tokenizer.json"),
    "broken config": (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
}


@pytest.mark.parametrize("case", BROKEN_FOLDERS)
def test_a_broken_model_folder_is_one_line(model, tmp_path, case):
    break_it, words = BROKEN_FOLDERS[case]
    folder = copy_model(model, tmp_path / "model")
    break_it(folder)
    refused(pagoda("up", "--model", folder, "--port", free_port()), words)


@pytest.mark.parametrize("given", ["flag", pytest.param("environment", marks=pytest.mark.slow)])
def test_an_unreachable_redis_is_one_line(model, given):
    url = f"redis://127.0.0.1:{free_port()}/0"
    flags = ("up", "--model", model, "--port", free_port())
    result = pagoda(*flags, "--redis-url", url) if given == "flag" else pagoda(*flags, REDIS_URL=url)
    refused(result, "redis")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--model", "/nowhere"), "--model /nowhere is no folder"),
        (("--workers", 0), "--workers 0"),
        (("--port", 70000), "--port 70000"),
        (("--kv-memory", "lots", "--workers", 2), "--kv-memory"),
        (("--kv-memory", "1MiB", "--num-blocks", 3), "give one of them"),
        (("--block-size", 17), "block-size"),
        (("--device", "tpu"), "device"),
        (("--data", "/proc/nowhere"), "--data /proc/nowhere"),
    ],
)
def test_a_bad_flag_is_one_line(model, flags, words):
    flags = flags if "--model" in flags else ("--model", model, *flags)
    flags = flags if "--port" in flags else (*flags, "--port", free_port())
    refused(pagoda("up", *flags), words)
