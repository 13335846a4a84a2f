"""The same examples in every run, so that only a change can break it; new ones where PAGODA_TEST_LONG asks for more.

A whole run begins with tests that mostly wait for processes; what tests/kernels load is compiled beside them. Those of
the load generator, which measure, come last.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).parent.parent
KERNELS = ROOT / "tests" / "kernels"
LAST = (KERNELS, ROOT / "tests" / "load")

if os.environ.get("PAGODA_TEST_LONG") != "1" and settings.get_current_profile_name() == "default":
    settings.load_profile("ci")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Folders in LAST come last, in that order."""
    items.sort(key=lambda item: next((i for i, folder in enumerate(LAST, 1) if item.path.is_relative_to(folder)), 0))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Of many tests, of which those of the kernels are not the first. What a GPU runs is compiled there."""
    on_cpu = [item for item in session.items if item.get_closest_marker("gpu") is None]
    is_of_kernels = [item.path.is_relative_to(KERNELS) for item in on_cpu]
    if session.config.option.collectonly or not any(is_of_kernels) or all(is_of_kernels[:100]):
        return
    command = [sys.executable, "-m", "tests.kernels.compile_ahead"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True)

    def end() -> None:
        """With its compilers."""
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()

    session.config.add_cleanup(end)
