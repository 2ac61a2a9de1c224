"""The two ways a command of ours may end badly, besides a bug; and what it says and goes on."""


class UserError(ValueError):
    """The user's input is wrong. The message is one line: it quotes the input and says the next step. Exit status 2."""


class GateError(Exception):
    """A gate failed: accuracy, speed or verification. The message is one line. Exit status 1."""


class Caution(UserWarning):
    """Something that a person should know of. The message is one line, and the command goes on."""
