"What the checks share: where the repository is, and how findings are told"

import sys
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Hand-written modules and the layer each belongs to: plumbing whose tests are in tests/
PLAIN = {"errors": -3, "strict_yaml": -2, "durable": -1, "pm_engine": 0.6, "all": 100}
PLAIN |= {"capture": 69.1, "own_code": 69.2}


def main(findings: Callable[[Path], Iterable[str]]) -> None:
    "Print one line per finding; exit 1 when there is any"
    root = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else ROOT
    found = list(findings(root))
    print(*found, sep="\n", end="\n" if found else "")
    sys.exit(1 if found else 0)
