"""The edges of the program, where it reads what others wrote: whatever a reader raises becomes one sentence."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PurePath

from ptq4dit_jax.errors import Ptq4ditError, printable

#: The remedy if no better one is known.
DAMAGED = "it is damaged; copy, download or make it again"
#: The digits of 2^63. Python refuses to read thousands of digits, with an error of its own.
_MOST_DIGITS = 19


@contextmanager
def edge(what: object, remedy: str = DAMAGED) -> Iterator[None]:
    """Runs a reader of ``what`` (a path, or words for it) and turns every exception into a sentence with its remedy.

    There is no list of types: the libraries behind readers may raise anything on input that nobody foresaw.

    Raises:
      Ptq4ditError: the reader's own one unchanged; for any other exception ``Cannot read WHAT: REMEDY.`` A lack of memory and
        the system's errors are named as such.
    """
    try:
        yield
    except Ptq4ditError:
        raise
    except Exception as error:
        raise Ptq4ditError(f"Cannot read {shown(what, 1000)}: {_reason(error) or remedy}.") from error


def _reason(error: Exception) -> str | None:
    """Returns the reason if the system, and not the input, is to blame; None otherwise."""
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return "there is too little free memory; close other programs or use a machine with more"
    if isinstance(error, OSError) and error.strerror:
        return f"the system says {error.strerror!r}; check that it exists and can be read"
    return None


def shown(value: object, limit: int = 120) -> str:
    """Formats a string for a message: on one line, without control characters, no longer than about ``limit``.

    For anything but strings, paths and numbers the name of the type is shown, since formatting could take any time.
    """
    plain = isinstance(value, (str, float, PurePath)) or (isinstance(value, int) and value.bit_length() < 256)
    text = str(value) if plain else f"a {type(value).__name__}"
    head = text if len(text) <= limit else f"{text[: limit // 2]}...{text[-(limit // 3) :]}"
    return printable(head)


def quoted(value: object, limit: int = 120) -> str:
    """Formats as :func:`shown` does, with quotation marks around strings."""
    return repr(shown(value, limit)) if isinstance(value, str) else shown(value, limit)


def whole_number(text: str) -> int | None:
    """Returns the number that a user typed as ASCII digits; None for any other text, or for more digits than any count has."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= _MOST_DIGITS else None
