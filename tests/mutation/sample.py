"""Names of mutants drawn at random from those that mutmut has made: ``python sample.py NUMBER SEED``, in mutmut's folder."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

names = sorted(
    name
    for file in Path("mutants/interp").rglob("*.meta")
    for name in json.loads(file.read_text(encoding="utf-8"))["exit_code_by_key"]
)
number, seed = map(int, sys.argv[1:])
print(*random.Random(seed).sample(names, number), sep="\n")
