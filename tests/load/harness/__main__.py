"""`python -m tests.load.harness`: the same as `pagoda load`."""

import sys

import typer

from tests.load.harness.cli import main
from tests.load.harness.errors import LoadError

if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except LoadError as error:
        sys.stderr.write(f"pagoda load: {error}\n")
        sys.exit(error.exit_code)
    except typer.TyperException as error:
        sys.stderr.write(f"pagoda load: {error.format_message()}\n")
        sys.exit(error.exit_code)
