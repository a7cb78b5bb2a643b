"""What ends a command early, and how it is worded. The command line prints these, and nothing else, in one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something that was given does not fit; the message says what was found, what is needed, and where."""


class Interrupted(RuntimeError):
    """A signal ended the run after a whole update, which was saved. ``exit_code`` is 128 + the signal's number."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message, exit_code)  # both, so that it can be pickled on its way out of a process
        self.exit_code = exit_code

    def __str__(self) -> str:
        return self.args[0]


class FailedElsewhere(RuntimeError):
    """Another process of the run failed, and says why."""


def nearest(word: str, known: Iterable[str], *, cutoff: float = 0.6) -> str:
    """`` (did you mean ...?)``, or nothing where no known word is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return f" (did you mean {near[0]!r}?)" if near else ""
