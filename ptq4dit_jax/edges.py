"""The edges of the program, where what others wrote is read: whatever a reader raises ends in one sentence."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PurePath

from ptq4dit_jax.errors import Ptq4ditError, printable

#: The remedy where nothing better is known.
DAMAGED = "it is damaged; copy, download or make it again"
#: Those of 2^63. Python refuses to read thousands of them, with an error of its own.
_MOST_DIGITS = 19


@contextmanager
def edge(what: object, remedy: str = DAMAGED) -> Iterator[None]:
    """Runs a reader of ``what`` (a path, or words for it) and turns every exception into a sentence with its remedy.

    There is no list of types: the libraries behind readers raise whatever they like on input that nobody foresaw.

    Raises:
      Ptq4ditError: the reader's own one as it is; for any other exception ``Cannot read WHAT: REMEDY.`` Memory that does not
        suffice and what the system says of the file are called by their names.
    """
    try:
        yield
    except Ptq4ditError:
        raise
    except Exception as error:
        raise Ptq4ditError(f"Cannot read {shown(what, 1000)}: {_reason(error) or remedy}.") from error


def _reason(error: Exception) -> str | None:
    """What the system, and not the input, is to blame for; None for anything else."""
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return "there is too little free memory; close other programs or use a machine with more"
    if isinstance(error, OSError) and error.strerror:
        return f"the system says {error.strerror!r}; check that it exists and can be read"
    return None


def shown(value: object, limit: int = 120) -> str:
    """A string as a message may hold it: on one line, without control characters, no longer than about ``limit``.

    What is no string or number is shown by the name of its type: formatting it could take any time.
    """
    plain = isinstance(value, (str, float, PurePath)) or (isinstance(value, int) and value.bit_length() < 256)
    text = str(value) if plain else f"a {type(value).__name__}"
    head = text if len(text) <= limit else f"{text[: limit // 2]}...{text[-(limit // 3) :]}"
    return printable(head)


def quoted(value: object, limit: int = 120) -> str:
    """As :func:`shown`, with quotation marks around strings."""
    return repr(shown(value, limit)) if isinstance(value, str) else shown(value, limit)


def whole_number(text: str) -> int | None:
    """The number that a user has typed as ASCII digits; None for any other text, and for more digits than any count has."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= _MOST_DIGITS else None
