"Run the harness: `python -m tests.harness [PART …] [--short]`."

import sys
import time

from . import PARTS
from .lab import Lab


def main(words: list[str]) -> int:
    short = "--short" in words
    wanted = [w for w in words if not w.startswith("-")] or list(PARTS)
    lab, failed = Lab(), 0
    for name in wanted:
        part, long_form, short_form = PARTS[name]
        start = time.perf_counter()
        ok, text = part(lab, **(short_form if short else long_form))
        failed += not ok
        print(
            f"{'ok ' if ok else 'BAD'} {name:12} {time.perf_counter() - start:6.1f} s  {text}",
            flush=True,
        )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
