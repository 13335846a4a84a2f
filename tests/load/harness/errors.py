"""What stops a load run: one line that says what to do."""


class LoadError(Exception):
    """The run can't be made as asked, or the server can't be reached; the text is the line."""

    def __init__(self, line: str, exit_code: int = 1) -> None:
        super().__init__(line)
        self.exit_code = exit_code
