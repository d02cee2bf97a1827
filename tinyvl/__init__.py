"""tinyvl: frozen language models that see and hear, three papers in one small toolkit."""

__version__ = "0.1.0"


class UserError(Exception):
    """Something the user can mend: one sentence that says what was wrong and what to do.

    The command line prints it without a traceback and leaves with ``status``
    (1: an input or a download failed; 2: the command cannot be run as it was given).
    """

    def __init__(self, message: str, status: int = 1):
        super().__init__(message)
        self.status = status
