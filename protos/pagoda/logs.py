"""How every process of the service logs: lines for people, or an object a line for machines. No prompt, no salt."""

import json
import logging
import sys
from datetime import UTC, datetime

FORMATS = ("text", "json")
FIELDS = (
    *("request_id", "worker", "finish_reason", "status", "num_prompt_tokens", "num_cached_tokens", "num_output_tokens"),
    "seconds",
)
"""What a message may carry beside its text, given to `extra`."""


def configure(process: str, level: str, log_format: str) -> None:
    """Sends all loggers' messages to stderr, in one of FORMATS."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines(process) if log_format == "json" else TextLines(process))
    logging.basicConfig(level=level, handlers=[handler], force=True)


class TextLines(logging.Formatter):
    """Time, process, level, message."""

    def __init__(self, process: str) -> None:
        super().__init__(f"%(asctime)s {process.replace('%', '%%')} %(levelname)s %(message)s")


class JsonLines(logging.Formatter):
    """One object a line; keys that a message does not have are left out."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        """See the class."""
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "process": self._process,
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {name: getattr(record, name) for name in FIELDS if hasattr(record, name)}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)
