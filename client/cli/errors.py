"""What a command tells the shell: an exit code and one sentence on stderr. Knows the exceptions, no command.

0 ok, 1 failure, 2 usage, 3 fenced, 69 unreachable, 75 retry later, 77 auth, 78 configuration or data directory;
130 by Ctrl-C, 143 by SIGTERM.
"""

from __future__ import annotations

from ..errors import (
    AuthError,
    ConnectionLost,
    IdemqError,
    InvalidRequest,
    OutcomeUnknown,
    PermissionDenied,
    ProducerFenced,
    RetriableError,
    Unsupported,
)
from ..testing import BrokerFailed

OK = 0
FAILURE = 1
USAGE = 2
FENCED = 3
UNREACHABLE = 69
RETRY_LATER = 75
AUTH = 77
CONFIGURATION = 78
INTERRUPTED = 130
"""128 + SIGINT, as every shell shows it."""
TERMINATED = 143
"""128 + SIGTERM."""

EXIT_CODES: tuple[tuple[type[IdemqError], int], ...] = (
    (ProducerFenced, FENCED),
    (ConnectionLost, UNREACHABLE),
    (RetriableError, RETRY_LATER),
    (OutcomeUnknown, RETRY_LATER),
    (AuthError, AUTH),
    (PermissionDenied, AUTH),
    (InvalidRequest, USAGE),
    (Unsupported, USAGE),
)
"""The first that fits counts; every other error is a failure."""


class CommandError(Exception):
    """A command ends here. The text is a sentence for people with its remedy; `exit_code` is for the shell."""

    def __init__(self, text: str, exit_code: int = FAILURE) -> None:
        super().__init__(text)
        self.exit_code = exit_code


def explain(error: Exception) -> tuple[str, int] | None:
    """(the sentence, the exit code) of an error that is not ours; None: a bug, which deserves its traceback."""
    if isinstance(error, CommandError):
        return str(error), error.exit_code
    if isinstance(error, IdemqError):
        code = next((code for kind, code in EXIT_CODES if isinstance(error, kind)), FAILURE)
        # What an error offers to a program is none of a shell's; `pub` says itself what repeating it does.
        remedy = "Run the same command again" if isinstance(error, OutcomeUnknown) else error.remedy
        text = f"{error.text.rstrip('.')}. {remedy}".strip(". ")
        return f"{text}. ({error.code})", code
    if isinstance(error, BrokerFailed):
        return str(error), FAILURE
    if isinstance(error, OSError):
        return f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}.", FAILURE
    return None
