"""What the benchmarks of all kernels print and keep."""

import datetime
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any


def begin(hardware: dict[str, object]) -> dict[str, object]:
    """Prints the hardware; results that say when and on what, to be filled."""
    report(json.dumps(hardware))
    return {"date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "hardware": hardware}


def report(line: str) -> None:
    """Prints it now: a benchmark takes minutes."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def row(case: Any) -> dict[str, object]:
    """The fields of a case, a dataclass with a dtype and a kv_dtype, as JSON holds them."""
    return {**asdict(case), "dtype": str(case.dtype), "kv_dtype": str(case.kv_dtype or case.dtype)}


def times_of(own: str, seconds: Mapping[str, float]) -> tuple[dict[str, float], str]:
    """Times of dtypes beside that of `own`, and as a line has them."""
    ratios = {name: found / seconds[own] for name, found in seconds.items()}
    return ratios, ", ".join(f"{name.removeprefix('torch.')} {ratio:.2f} x" for name, ratio in ratios.items())
