"""`pagoda load`: hands its flags to the load-test harness, which lives in the repository and not in the wheel.

Knows where the harness is, and nothing of what it does.
"""

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from deploy.errors import DeployError

HARNESS = "tests.load.harness"
_CHECKOUT = Path(__file__).parent.parent


def load(arguments: Sequence[str]) -> None:
    """Runs the harness's own command line. Raises DeployError where it is not there, or says what is wrong."""
    if not (_CHECKOUT / HARNESS.replace(".", "/")).is_dir():
        raise DeployError("the load-test harness is not installed here: pagoda load runs from a checkout (tests/load)")
    if str(_CHECKOUT) not in sys.path:
        sys.path.insert(0, str(_CHECKOUT))
    try:
        cli, errors = (importlib.import_module(f"{HARNESS}.{name}") for name in ("cli", "errors"))
    except ModuleNotFoundError as error:
        raise DeployError(f"pagoda load needs {error.name}: pip install -e '.[load]' in the checkout") from None
    try:
        cli.main(arguments)
    except errors.LoadError as error:
        raise DeployError(str(error), error.exit_code) from None
