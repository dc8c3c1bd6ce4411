"""F0: the exceptions a user is meant to read. The command line prints their message instead of a traceback."""


class UserError(ValueError):
    """Bad input: the message names the flag, file or line and says how to fix it. Exit code 2."""


class RunFailure(RuntimeError):
    """A run that had to stop: the message names step and cause. Exit code 3."""


class PeerFailure(RunFailure):
    """A run that had to stop because another process of it ended or does not answer. Exit code 3, at once."""
