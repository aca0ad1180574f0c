"""Expected failures, in one line each: what, where, and what is allowed."""

import difflib
import re
from collections.abc import Iterable

__all__ = ["ConfigError", "MinsnrError", "MinsnrWarning", "exhausted", "nearest", "printable"]


class MinsnrError(Exception):
    "An expected failure, told in one line"

    exit_code = 1


class ConfigError(MinsnrError):
    "The request was wrong; nothing was written"

    exit_code = 2


class MinsnrWarning(UserWarning):
    "Something a person should see, told in one line; work goes on"


_MEMORY = re.compile(
    r"out of memory|not enough memory|can't allocate memory|cannot allocate memory"
)


def exhausted(
    e: BaseException,  # What ended a computation
) -> str:  # Which resource ran out and what helps; "" when it was something else
    "Tell an end of resources from an error: torch raises both as RuntimeError"
    text = str(e).lower()
    if (
        isinstance(e, MemoryError)
        or isinstance(e, (RuntimeError, OSError))
        and _MEMORY.search(text)
    ):
        return "out of memory; a smaller train.batch_size, eval.batch_size or model needs less"
    if isinstance(e, RuntimeError) and "can't start new thread" in text:
        return "no further thread can be started; `ulimit -u` and the memory limit say how many may"
    return ""


_CONTROLS = re.compile(  # of terminals, of the direction of writing, of lines; and what is no text
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(
    text: str,  # A line that may hold a name or a value from a file
) -> str:  # Fit for a terminal
    "Write control characters as escapes, so that they are read and not obeyed"
    return _CONTROLS.sub(lambda m: ascii(m[0])[1:-1], text)


def _slips(a: str, b: str) -> int:
    "Count the slips between two words"
    if abs(len(a) - len(b)) > 2:
        return 3
    before, row = [], list(range(len(b) + 1))
    for i, x in enumerate(a):
        before, above, row = row, before, [i + 1]
        for j, y in enumerate(b):
            row.append(min(before[j + 1] + 1, row[j] + 1, before[j] + (x != y)))
            if i and j and x == b[j - 1] and y == a[i - 1]:
                row[-1] = min(row[-1], above[j - 1] + 1)
    return row[-1]


def nearest(
    name: str,  # What was written
    known: Iterable[str],  # What exists
) -> str:  # Ready to append to a message
    "Name the likeliest candidate and list the others"
    known, name = sorted(known), str(name)[:64]
    slips = min(((_slips(name, k), k) for k in known), default=(3, ""))
    close = [slips[1]] if slips[0] <= min(2, len(name) - 1) else []
    close = close or difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return (
        f"; did you mean {close[0]!r}?" if close else ";"
    ) + f" Known: {', '.join(known) or 'none'}"
