"""What `import interp` costs over `import torch, xarray`: promised are at most 0.5 s."""

from __future__ import annotations

import argparse
import subprocess
import sys

from _record import record, summary

LIMIT = 0.5

# Both times come from one process, so that they share its caches; a new one each time, since an import is made once.
PROGRAM = """
from time import perf_counter
start = perf_counter()
import torch, xarray
middle = perf_counter()
import interp
end = perf_counter()
print(middle - start, end - middle)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    repeats: int = parser.parse_args().repeats
    base: list[float] = []
    extra: list[float] = []
    for run in range(repeats + 1):
        done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
        # The first run reads the files from the disk and may compile them.
        if run:
            first, second = map(float, done.stdout.split())
            base.append(first)
            extra.append(second)
    rows = [
        {"import": name, "seconds": timing.median, "low": timing.low, "high": timing.high, "runs": timing.repeats}
        for name, timing in (("torch, xarray", summary(base)), ("interp, after them", summary(extra)))
    ]
    record("import", rows, note=f"Medians and quartiles of new processes; promised for interp: at most {LIMIT} s.")
    if summary(extra).median > LIMIT:
        sys.exit(f"import interp took {summary(extra).median:.2f} s over torch and xarray; promised are {LIMIT} s")


if __name__ == "__main__":
    main()
