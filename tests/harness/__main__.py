"Run the harness: `python -m tests.harness [PART …] [--short]`."

import argparse
import sys
import time

from . import PARTS
from .lab import Lab


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.harness", description="Attack run directories, and tell what held."
    )
    parser.add_argument("part", nargs="*", help=f"all of them, or some of: {', '.join(PARTS)}")
    parser.add_argument("--short", action="store_true", help="a small sample of each part")
    chosen = parser.parse_args(words)
    if unknown := [p for p in chosen.part if p not in PARTS]:
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    lab, failed = Lab(), 0
    for name in chosen.part or PARTS:
        part, long_form, short_form = PARTS[name]
        start = time.perf_counter()
        ok, text = part(lab, **(short_form if chosen.short else long_form))
        failed += not ok
        print(
            f"{'ok ' if ok else 'BAD'} {name:12} {time.perf_counter() - start:6.1f} s  {text}",
            flush=True,
        )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
