"""Results of the workbench as files: save, reopen, and what ``headscope generate --interventions`` takes."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dashboards.errors import PageError
from dashboards.safety import check_id
from dashboards.specs import build_all
from interp.files import write_whole

if TYPE_CHECKING:
    from dashboards.jobs import Job
    from dashboards.workspace import Workspace


def checked(space: Workspace, given: Mapping[str, Any]) -> dict[str, Any]:
    """The spec of a before / after, every part checked before the model runs.

    Raises:
        PageError: names the part that is wrong.
    """
    spec = space.spec(given)
    build_all(spec["interventions"])
    seed, temperature = given.get("seed", 0), given.get("temperature", 1.0)
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**31:
        raise PageError(f"seed must be a whole number from 0 to {2**31 - 1}, got {seed!r}")
    if isinstance(temperature, bool) or not isinstance(temperature, int | float) or not 0 < temperature <= 10:
        raise PageError(f"temperature must be above 0 and at most 10, got {temperature!r}")
    return spec | {
        "max_new_tokens": spec["max_new_tokens"] or 32, "seed": seed, "temperature": float(temperature),
        "do_sample": bool(given.get("do_sample")),
    }  # fmt: skip


def save(space: Workspace, job: Job) -> dict[str, Any]:
    """Keep a finished before / after; the id is the job's."""
    if job.kind != "generate" or job.result is None:
        raise PageError("only a finished before / after can be saved", 409)
    held = {
        "format": "headscope-workbench",
        "version": 1,
        "saved": time.time(),
        "spec": dict(job.spec),
        "result": job.result,
    }
    write_whole(space.state / "saved" / f"{job.id}.json", json.dumps(held, indent=1, default=str))
    return {"saved": job.id}


def listed(space: Workspace) -> list[dict[str, Any]]:
    """Saved results, the newest first."""
    found: list[dict[str, Any]] = []
    for path in (space.state / "saved").glob("*.json"):
        try:
            held = json.loads(path.read_text(encoding="utf-8"))
            names = "+".join(str(i["name"]) for i in held["spec"]["interventions"]) or "plain"
            found.append(
                {"value": path.stem, "label": f"{names}: {held['spec']['prompt'][:40]}", "saved": held["saved"]}
            )
        except (ValueError, KeyError, TypeError, OSError):
            continue
    return sorted(found, key=lambda e: -float(e["saved"]))


def opened(space: Workspace, name: str) -> dict[str, Any]:
    """A saved result.

    Raises:
        PageError: not there, or not one.
    """
    path = space.state / "saved" / f"{check_id(name, 'saved result')}.json"
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        if held["format"] != "headscope-workbench":
            raise ValueError("another format")
    except FileNotFoundError:
        raise PageError("this saved result is not there any more", 404) from None
    except (ValueError, KeyError, TypeError) as error:
        raise PageError(f"this saved result cannot be read: {error}", 409) from error
    return held
