"""`pagoda load` from the command line: what it prints and writes, what it refuses, and where it is not."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.load.double import VOCAB_SIZE
from tests.load.harness.flags import expand_goodput
from tests.load.test_double import double
from tests.load.words_tokenizer import write_words_tokenizer
from tests.stack import ROOT

PAGODA = [sys.executable, "-m", "deploy.cli", "load"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'protos'}"}
QUICK = ("--num-prompts", "12", "--request-rate", "12", "--input-len", "6", "--output-len", "3")


def load(folder: Path, *flags: object) -> "subprocess.CompletedProcess[str]":
    command = [*PAGODA, *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=ENVIRONMENT, cwd=folder)


def test_a_run_prints_figures_and_writes_json_and_a_page(tmp_path: Path) -> None:
    with double() as server:
        port = server.ports["grpc"]
        slo = ("--goodput", "ttft:5000", "tpot:5000", "--metric-percentiles", "50,99.9")
        flags = ("--port", port, *QUICK, *slo, "--save-detailed", "--result-filename", "a.json")
        ended = load(tmp_path, *flags)
        base_url = f"http://127.0.0.1:{server.ports['http']}"
        other = load(tmp_path, "--backend", "openai", "--base-url", base_url, *QUICK, "--result-filename", "b.json")
    assert ended.returncode == 0, ended.stderr
    assert re.search(r"completed +12\n", ended.stdout)
    assert "100.0% of all" in ended.stdout
    assert other.returncode == 0, other.stderr
    result = json.loads((tmp_path / "a.json").read_text())
    assert (result["completed"], result["failed"], result["total_output_tokens"]) == (12, 0, 36)
    assert result["total_input_tokens"] == 72
    assert {
        f"{name}_{metric}_ms" for name in ("mean", "median", "std", "p50", "p99.9") for metric in ("ttft", "itl")
    } <= set(result)
    assert len(result["ttfts"]) == len(result["itls"]) == 12
    assert result["command"].startswith("pagoda load --port")
    page = (tmp_path / "a.html").read_text()
    assert "http" not in re.sub(r"http://www.w3.org/2000/svg|http://127.0.0.1", "", page), "it asks the network"
    assert json.loads(re.search(r"const RESULTS = (.*);", page)[1])[0]["result"]["completed"] == 12  # type: ignore[index]

    compared = load(tmp_path, "compare", "a.json", "b.json", "--html", "c.html")
    assert compared.returncode == 0, compared.stderr
    assert re.search(r"completed +12 +12 +1.00x", compared.stdout)
    assert len(json.loads(re.search(r"const RESULTS = (.*);", (tmp_path / "c.html").read_text())[1])) == 2  # type: ignore[index]


def test_a_server_that_takes_text_alone_is_sent_what_the_tokenizer_makes_of_the_ids(tmp_path: Path) -> None:
    write_words_tokenizer(tmp_path, VOCAB_SIZE)
    with double("--text-only") as server:
        base_url = ("--backend", "openai", "--base-url", f"http://127.0.0.1:{server.ports['http']}")
        text = ("--no-ignore-eos", "--tokenizer", "tokenizer.json")
        ended = load(tmp_path, *base_url, *text, *QUICK, "--result-filename", "t.json")
        refused = load(tmp_path, *base_url, *QUICK)
    assert ended.returncode == 0, ended.stderr
    result = json.loads((tmp_path / "t.json").read_text())
    assert (result["completed"], result["total_input_tokens"], result["total_output_tokens"]) == (12, 72, 36)
    assert result["mean_ttft_ms"] > 0
    assert refused.returncode == 1, "it was sent ids"
    assert "HTTP 422" in refused.stdout


def test_the_knee_is_the_fastest_stage_that_keeps_its_share(tmp_path: Path) -> None:
    """From 1.5 s on after its first request the double is silent for a second: the second stage begins then."""
    ramp = ("--ramp-up-strategy", "linear", "--ramp-up-start-rps", 10, "--ramp-up-end-rps", 30)
    stages = ("--find-knee", *ramp, "--num-stages", 3, "--stage-s", 1, "--goodput", "ttft:1100")
    with double("--stall-at-s", 2, "--stall-s", 30) as server:
        flags = ("--port", server.ports["grpc"], "--input-len", 5, "--output-len", 1, "--request-timeout-s", 2)
        ended = load(tmp_path, *flags, *stages, "--result-filename", "k.json")
    assert ended.returncode == 0, ended.stderr
    result = json.loads((tmp_path / "k.json").read_text())
    assert [stage["offered_rps"] for stage in result["stages"]] == [10, 20], "it ends with the first that fails"
    assert result["stages"][0]["good_share"] == 1
    assert result["stages"][1]["errors_by_status"].keys() == {"DEADLINE_EXCEEDED"}
    assert result["knee_rps"] == 10
    assert "the knee: 10 requests/s" in ended.stdout


def test_ctrl_c_ends_a_run_early_and_reports_what_was_measured(tmp_path: Path) -> None:
    with double() as server:
        flags = ("--port", server.ports["grpc"], "--request-rate", 10, "--output-len", 5, "--result-filename", "i.json")
        command = [*PAGODA, *map(str, flags)]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT, cwd=tmp_path
        )
        assert process.stderr is not None
        assert b"10 requests/s" in process.stderr.readline()
        assert b" sent, " in process.stderr.readline()  # it is in the middle of it
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert process.returncode == 0, err
    assert b"THE RUN WAS INTERRUPTED" in out
    result = json.loads((tmp_path / "i.json").read_text())
    assert result["is_interrupted"]
    assert 0 < result["completed"] < 60
    assert result["completed"] + result["disconnected"] == result["num_requests"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--port", "1", "--num-prompts", "1"), "no answer from 127.0.0.1:1"),
        (("--num-prompts", "0"), "--num-prompts 0: must be over 0"),
        (("--goodput", "ttft"), "--goodput ttft"),
        (("--backend", "openai"), "--base-url"),
        (("--tokenizer", "tokenizer.json"), "--tokenizer"),
        (("--no-such-flag",), "no-such-flag"),
        (("--request-rate", "fast"), "--request-rate"),
        (("compare", "nowhere.json", "nowhere.json"), "nowhere.json"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tmp_path: Path, flags: tuple[str, ...], words: str) -> None:
    ended = load(tmp_path, *flags)
    assert ended.returncode != 0
    assert words in ended.stderr
    assert ended.stderr.startswith("pagoda: ")
    assert ended.stderr.count("\n") == 1


def test_where_the_harness_is_not_installed_the_command_says_so(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "deploy", tmp_path / "deploy", ignore=shutil.ignore_patterns("demo"))
    for name in ("scheduler", "worker", "protos"):
        (tmp_path / name).symlink_to(ROOT / name)
    environment = ENVIRONMENT | {"PYTHONPATH": f"{tmp_path}:{tmp_path / 'protos'}"}
    ended = subprocess.run(PAGODA, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=60)
    assert ended.returncode == 1
    assert "not installed here" in ended.stderr
    assert ended.stderr.count("\n") == 1


def test_several_limits_may_follow_one_flag() -> None:
    given = ["--goodput", "ttft:200", "tpot:50", "--seed", "1", "compare", "a:b"]
    expected = ["--goodput", "ttft:200", "--goodput", "tpot:50", "--seed", "1", "compare", "a:b"]
    assert expand_goodput(given) == expected
