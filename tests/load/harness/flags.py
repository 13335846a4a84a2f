"""From the flags of `pagoda load` to the settings of a run; where a flag's form is looser than typer's, that too."""

from collections.abc import Mapping, Sequence
from typing import Any

from tests.load.harness.errors import LoadError
from tests.load.harness.settings import (
    Dataset,
    Knee,
    Leavers,
    Measures,
    Pace,
    Ramp,
    Settings,
    Target,
    require,
)


def expand_goodput(arguments: Sequence[str]) -> list[str]:
    """`--goodput a:1 b:2` as `--goodput a:1 --goodput b:2`: several values after one flag, as vLLM has them."""
    expanded: list[str] = []
    is_open = False
    for argument in arguments:
        is_open = argument == "--goodput" or (is_open and ":" in argument and not argument.startswith("-"))
        if is_open and argument != "--goodput" and expanded[-1] != "--goodput":
            expanded.append("--goodput")
        expanded.append(argument)
    return expanded


def settings_of(flags: Mapping[str, Any]) -> Settings:
    """Flags by their Python names. Raises LoadError that names the one that is wrong."""
    is_openai = flags["backend"] == "openai"
    require(is_openai == (flags["base_url"] is not None), "base-url", flags["base_url"], "goes with --backend openai")
    target = Target(
        backend=flags["backend"],
        address=flags["base_url"] if is_openai else f"{flags['host']}:{flags['port']}",
        **{name: flags[name] for name in ("model", "tokenizer", "vocab_size", "temperature", "ignore_eos")},
        **{name: flags[name] for name in ("stream_interval", "request_timeout_s")},
    )
    measures = Measures(
        percentile_metrics=_names(flags["percentile_metrics"]),
        metric_percentiles=tuple(_float("metric-percentiles", part) for part in _names(flags["metric_percentiles"])),
        goodput_ms=tuple(_limit(pair) for given in flags["goodput"] or () for pair in given.split()),
        save_detailed=flags["save_detailed"],
    )
    pace = ("num_prompts", "request_rate", "burstiness", "max_concurrency", "duration_s")
    knee = Knee(flags["knee_share"], flags["stage_s"], flags["num_stages"]) if flags["find_knee"] else None
    return Settings(
        target=target,
        pace=Pace(**{name: flags[name] for name in pace}, ramp=_ramp(flags)),
        dataset=_dataset(flags),
        leavers=Leavers(
            flags["cancel_share"], flags["disconnect_share"], flags["leave_after_tokens"], flags["leave_after_s"]
        ),
        measures=measures,
        knee=knee,
        **{name: flags[name] for name in ("num_processes", "num_warmups", "status_interval_s", "seed")},
    )


def _ramp(flags: Mapping[str, Any]) -> Ramp | None:
    strategy, start, end = (flags[f"ramp_up_{part}"] for part in ("strategy", "start_rps", "end_rps"))
    if strategy is None and start is None and end is None:
        return None
    for flag, value in (("strategy", strategy), ("start-rps", start), ("end-rps", end)):
        require(value is not None, f"ramp-up-{flag}", "", "a ramp needs its strategy, its start and its end")
    return Ramp(strategy, start, end)


def _dataset(flags: Mapping[str, Any]) -> Dataset:
    common = {name: flags[name] for name in ("num_turns", "think_time_s", "length_sigma", "self_timed")}
    if flags["dataset_name"] == "prefix_repetition":
        return Dataset(
            name="prefix_repetition",
            input_len=flags["prefix_repetition_suffix_len"],
            output_len=flags["prefix_repetition_output_len"],
            prefix_len=flags["prefix_repetition_prefix_len"],
            num_prefixes=flags["prefix_repetition_num_prefixes"],
            **common,
        )
    return Dataset(
        name=flags["dataset_name"],
        path=flags["dataset_path"],
        input_len=flags["input_len"],
        output_len=flags["output_len"],
        range_ratio=flags["random_range_ratio"],
        prefix_len=flags["random_prefix_len"],
        **common,
    )


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _float(flag: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise LoadError(f"--{flag} {text}: must be a number", 2) from None


def _limit(pair: str) -> tuple[str, float]:
    name, _, limit = pair.partition(":")
    require(bool(limit), "goodput", pair, "must be METRIC:MILLISECONDS, as in ttft:200")
    return name, _float("goodput", limit)
