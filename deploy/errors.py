"""What the command tells a person: one line that says what to do, and an exit code."""


class DeployError(Exception):
    """The command can't do what was asked; the text is the line."""

    def __init__(self, line: str, exit_code: int = 1) -> None:
        super().__init__(line)
        self.exit_code = exit_code
