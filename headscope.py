"""The command ``headscope`` and ``python -m headscope``: check that our packages are ours, then run :mod:`interp.cli`.

It stands outside of the three packages because their names are common ones: where a foreign ``interp`` comes first on
Python's path, nothing inside ours would be reached to say so.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

PACKAGES = ("interp", "probes", "dashboards")
HOME = Path(__file__).resolve().parent


class ForeignPackageError(ImportError):
    """Another package of the same name stands before one of ours on Python's path."""


def check_packages(names: tuple[str, ...] = PACKAGES) -> None:
    """Check that ``interp``, ``probes`` and ``dashboards`` are those of this distribution, importing none of them.

    Raises:
        ForeignPackageError: one of them is missing, or is another package; the message says where both lie.
    """
    for name in names:
        spec = find_spec(name)
        places = [str(Path(place).resolve()) for place in spec.submodule_search_locations or ()] if spec else []
        if str(HOME / name) in places[:1]:
            continue
        got = places[0] if places else (spec and spec.origin) or "nothing of that name on Python's path"
        raise ForeignPackageError(
            f"package {name!r} must be Headscope's, {HOME / name}; got {got}. Rename that one, or put {HOME} before it "
            "on Python's path (PYTHONPATH)."
        )


def main() -> None:
    """Run the command line interface; exit code 1 and one line on stderr where a foreign package is in the way."""
    try:
        check_packages()
    except ForeignPackageError as error:
        sys.exit(f"headscope: {error}")
    from interp.cli import main as run

    run()


if __name__ == "__main__":
    main()
