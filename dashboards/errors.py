"""What went wrong, for the page: one line that names the cause."""

from __future__ import annotations


class PageError(ValueError):
    """A wish of the page that cannot be met; shown on it.

    Attributes:
        status: HTTP status of the answer.
    """

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


def explain(error: BaseException) -> str:
    """One line about an error of whatever kind.

    A model that does not fit says so in other words on every backend; the page says what to do.
    """
    import torch

    message = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    line = " ".join(message.split())[:600]
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return f"out of memory: {line or 'nothing more could be allocated'}. Take a shorter prompt or a smaller model; the page goes on."
    if isinstance(error, PageError):
        return line
    return f"{type(error).__name__}: {line}" if line else type(error).__name__
