"""Tables of settings on a probe: the metric with its interval, the baseline beside it, what it costs (:func:`evaluate`).

A setting is interventions and decoding (:func:`parse_setting`), a task is samples and their judge (:mod:`.tasks`). It is a part
of the command and of experiments: nothing else of the package imports it.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "evaluate": "running", "Evaluation": "running", "Row": "running", "Setting": "settings", "SettingError": "settings",
    "parse_setting": "settings", "random_control": "settings", "GREEDY": "settings", "VCD": "baselines", "DoLa": "baselines",
    "CaptionTask": "captions", "MarginTask": "forced", "PopeTask": "pope", "AnswerTask": "answers", "ContrastTask": "answers",
    "Sample": "tasks", "Task": "tasks",
}  # fmt: skip
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
