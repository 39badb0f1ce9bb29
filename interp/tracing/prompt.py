"""What the positions of a prompt are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from interp.models.layout import KINDS

IMAGE, GENERATED, PAD = KINDS.index("image"), KINDS.index("generated"), -1


@dataclass(frozen=True, eq=False)
class Prompt:
    """The positions of a run's prompt in the text stack, cached ones included. S is the number of prompts.

    Attributes:
        kind: int8 ``[S, P]``, code of :data:`interp.models.layout.KINDS`, -1 for a pad.
        picture: int16 ``[S, P]``, number of the image in its prompt, -1 elsewhere.
    """

    kind: Tensor
    picture: Tensor

    @property
    def image(self) -> Tensor:
        """Bool ``[S, P]``, image tokens."""
        return self.kind == IMAGE

    @property
    def real(self) -> Tensor:
        """Bool ``[S, P]``, False on pads."""
        return self.kind != PAD

    @property
    def last(self) -> Tensor:
        """Int64 ``[S]``, the position whose row predicts the first token: the last one that is no pad."""
        places = torch.arange(self.kind.shape[1])
        return torch.where(self.real, places, -1).amax(-1)

    def __len__(self) -> int:
        return len(self.kind)
