"""Generation through the kernels: what a token's first layer finds, the later ones take; and it is what each would find."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from interp.attention import Edit, Gain, Redistribute
from interp.interventions.image_groups import KeyGroups
from interp.tracing import hooked, installation, lasting
from interp.tracing.calls import Intervention, Lasting, SiteCall

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAYERS, PROMPT, TOKENS = 3, 7, 5
TEMPLATE = Edit((Redistribute((1,), (2,), 0.8, (1, 2), (2,), 0.0, 0.0),), n_groups=3)


class Moves(Intervention):
    """Attention moved between key groups that each layer has for itself."""

    def __init__(self, batch: int) -> None:
        draw = torch.Generator().manual_seed(1)
        codes = torch.randint(0, 3, (LAYERS, batch, PROMPT), generator=draw).to(torch.int8)
        self.groups = [KeyGroups(c.to(DEVICE)) for c in codes]
        self.gain = Gain(torch.tensor([0.5, 1.0, 2.0, 1.0], device=DEVICE).view(1, 4, 1))

    def before(self, call: SiteCall) -> Edit | None:
        return self.groups[call.site.layer].edit(call, TEMPLATE)

    def after(self, call: SiteCall, z: torch.Tensor) -> torch.Tensor | None:
        return z * self.gain.value[..., None].transpose(1, 2) if call.site.layer == 2 else None  # pyright: ignore

    def lasting(self, call: SiteCall) -> Lasting:
        gains = (self.gain,) if call.site.layer == 2 else ()
        return Lasting(gains, TEMPLATE, self.groups[call.site.layer])


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=32, num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=50, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(DEVICE).eval()


def generate(model: Any, batch: int, padded: bool) -> tuple[torch.Tensor, Any]:
    ids = torch.randint(1, 50, (batch, PROMPT), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :3] = 0
    with hooked(model, interventions=[Moves(batch)], backend="triton") as run:
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=TOKENS, do_sample=False, return_dict_in_generate=True, output_logits=True
        )  # fmt: skip
    return torch.stack(out.logits), run.report()


@pytest.mark.parametrize(("batch", "padded"), [(1, False), (2, True)])
def test_layers_share_a_way(model: Any, batch: int, padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    attend = lasting.attend

    def counted(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> Any:
        asked.append(k.shape[2])
        return attend(q, k, v, **options)

    monkeypatch.setattr(lasting, "attend", counted)
    logits, report = generate(model, batch, padded)
    # Each layer settles in its own first token; from then on one layer asks, and again at every token where keys are hidden.
    assert asked == list(range(PROMPT + 2, PROMPT + TOKENS if padded else PROMPT + 3))
    monkeypatch.setattr(installation, "settle", lambda *_: None)
    wanted, counts = generate(model, batch, padded)
    torch.testing.assert_close(logits, wanted, atol=2e-5, rtol=2e-5)
    assert report == counts
