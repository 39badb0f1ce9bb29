"""What `import interp` costs over `import torch, xarray` (promised are at most 0.5 s), and what the first use of its names adds."""

from __future__ import annotations

import argparse
import subprocess
import sys

from _record import record, summary

LIMIT = 0.5

# All times come from one process, so that they share its caches; a new one each time, since an import is made once.
# Names of `interp` are resolved on first use, so the import alone would say little about what a user waits for.
PROGRAM = """
from time import perf_counter
start = perf_counter()
import torch, xarray
middle = perf_counter()
import interp
end = perf_counter()
for name in interp.__all__:
    getattr(interp, name)
print(middle - start, end - middle, perf_counter() - end)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    repeats: int = parser.parse_args().repeats
    columns: list[list[float]] = []
    for run in range(repeats + 1):
        done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
        # The first run reads the files from the disk and may compile them.
        if run:
            columns.append([float(word) for word in done.stdout.split()])
    labels = ("import torch, xarray", "import interp, after them", "first use of every name of interp")
    timings = {label: summary(values) for label, values in zip(labels, zip(*columns, strict=True), strict=True)}
    rows = [
        {"step": label, "seconds": timing.median, "low": timing.low, "high": timing.high, "runs": timing.repeats}
        for label, timing in timings.items()
    ]
    cost = timings[labels[1]].median
    record(
        "import", rows, note=f"Medians and quartiles of new processes; promised for import interp: at most {LIMIT} s."
    )
    if cost > LIMIT:
        sys.exit(f"import interp took {cost:.2f} s over torch and xarray; promised are {LIMIT} s")


if __name__ == "__main__":
    main()
