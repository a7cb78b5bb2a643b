"""What ends a command early, and how it is worded. The command line prints these, and nothing else, in one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something that was given does not fit; the message says what was found, what is needed, and where."""


class NonFiniteValue(UserError, RuntimeError):
    """A loss, a gradient or a velocity in training became infinite or not a number; nothing was saved after it."""


class Interrupted(RuntimeError):
    """A signal ended the run after a whole update, which was saved. ``exit_code`` is 128 + the signal's number."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message, exit_code)  # both, so that it can be pickled on its way out of a process
        self.exit_code = exit_code

    def __str__(self) -> str:
        return self.args[0]


class FailedElsewhere(RuntimeError):
    """Another process of the run failed, and says why."""


def nearest(word: str, known: Iterable[str]) -> str:
    """`` (did you mean ...?)``, or nothing where no known word is near."""
    near = nearest_word(word, known, cutoff=0.6)
    return f" (did you mean {near!r}?)" if near else ""


def nearest_word(word: str, known: Iterable[str], *, cutoff: float) -> str | None:
    """The known word that is most like ``word``; None where none is. cutoff: in [0, 1], 1 for the word itself."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)), None)
