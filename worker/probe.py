"""`python -m worker.probe [HOST:PORT]`: exit code 0 where the worker whose metrics are there has an owner, else 1."""

import re
import sys
import urllib.request

TIMEOUT_S = 3.0


def main(address: str = "127.0.0.1:9101") -> int:
    """Reads its metrics."""
    try:
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=TIMEOUT_S) as response:
            text = response.read().decode()
    except OSError as error:
        sys.stderr.write(f"{address}: {error}\n")
        return 1
    is_registered = re.search(r"^pagoda_worker:registered 1\.0$", text, re.MULTILINE) is not None
    sys.stderr.write(f"{address}: {'registered' if is_registered else 'no scheduler'}\n")
    return int(not is_registered)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
