"""The two errors that a command reports in one line. Warnings go to the standard library's logging."""


class UserError(ValueError):
    """The user's input is wrong: exit status 2. One line: `message` quotes the input, `hint` is the next step."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(f"{message}: {hint}" if hint else message)
        self.message, self.hint = message, hint


class GateError(Exception):
    """A gate failed: accuracy, speed or verification. The message is one line. Exit status 1."""
