"""What a run is told by the arguments and results of forwards and ``generate``, on answers known beforehand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import interp
from interp.attention import Edit, Gain
from interp.testing import build
from interp.tracing import Intervention
from interp.tracing.calls import RunState
from interp.tracing.runs import Sequences, finish_generate

PROMPT = torch.tensor([[11, 12, 13], [21, 22, 23]])


def run_state(prompt: Tensor = PROMPT, **inputs: Any) -> RunState:
    module = nn.Module()
    module.config = SimpleNamespace(is_encoder_decoder=False)  # type: ignore[assignment]
    return RunState(module, None, {"input_ids": prompt, **inputs}, True, prompt_length=prompt.shape[1])  # type: ignore[arg-type]


def finished(run: RunState, result: Any) -> Sequences:
    sequences = finish_generate(run, result)
    assert sequences is not None
    return sequences


def test_a_model_that_returns_new_tokens_alone_gets_its_prompts_back() -> None:
    new = torch.tensor([[1, 2], [3, 4], [5, 6], [7, 8]])  # two returned sequences a prompt
    got = finished(run_state(), new)
    assert got.ids.tolist() == [[11, 12, 13, 1, 2], [11, 12, 13, 3, 4], [21, 22, 23, 5, 6], [21, 22, 23, 7, 8]]
    assert got.lengths.tolist() == [5, 5, 5, 5]
    # Longer than the prompt, but another text.
    assert finished(run_state(), torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])).ids[:, :3].tolist() == PROMPT.tolist()
    whole = torch.cat([PROMPT, new[:2]], 1)
    assert finished(run_state(), whole).ids.tolist() == whole.tolist()


@pytest.mark.parametrize(
    ("own", "given", "lengths"),
    [
        (None, {}, [6, 6]),  # a module without a generation config
        (7, {}, [4, 6]),
        ([7, 8], {}, [4, 5]),
        (7, {"generation_config": SimpleNamespace(eos_token_id=9)}, [6, 6]),
        (7, {"generation_config": SimpleNamespace(eos_token_id=torch.tensor([8]))}, [5, 5]),
        (7, {"eos_token_id": 8}, [5, 5]),
        (7, {"generation_config": SimpleNamespace(eos_token_id=9), "eos_token_id": [7]}, [4, 6]),
    ],
    ids=str,
)
def test_where_samples_stop(own: Any, given: dict[str, Any], lengths: list[int]) -> None:
    run = run_state(**given)
    if own is not None:
        run.module.generation_config = SimpleNamespace(eos_token_id=own)  # type: ignore[assignment]
    # A stop token inside the prompt ends nothing.
    run.inputs["input_ids"] = prompt = torch.tensor([[7, 8, 9], [7, 8, 9]])
    out = torch.cat([prompt, torch.tensor([[7, 8, 1], [1, 8, 1]])], 1)
    assert finished(run, out).lengths.tolist() == lengths


@pytest.mark.parametrize("given", [[2, 11, 12, 13], [11, 12, 13]], ids=["with", "without"])
def test_a_start_token_that_generate_puts_before_the_prompt_belongs_to_it(given: list[int]) -> None:
    specimen: Any = build("bart")
    assert specimen.module.config.decoder_start_token_id == 2
    specimen.module.generation_config.eos_token_id = None
    ids = specimen.inputs["input_ids"][:1]
    with interp.hooked(specimen.module, capture=interp.Capture(row_stats=True, stacks=["text"])) as run:
        out = specimen.module.generate(ids, decoder_input_ids=torch.tensor([given]), max_new_tokens=3, do_sample=False)
    assert out[0, :4].tolist() == [2, 11, 12, 13]
    assert run.trace["text"]["phase"].values.tolist() == ["prefill"] * 4 + ["generated"] * 2
    assert run.trace["text"]["token_fed_id"].values[0].tolist() == out[0, :-1].tolist()


class Cache:
    def get_seq_length(self) -> int:
        return 3


def test_what_is_kept_for_the_next_run_goes_with_the_cache_that_was_returned() -> None:
    policy, cache = Intervention(), Cache()
    first, second = run_state(), run_state()
    first.of(policy)["sinks"] = [0]
    first.keep([policy], cache)  # a forward that makes its own cache is given none
    second.cache = cache
    assert second.earlier(policy) == {"sinks": [0]}
    second.cache = Cache()
    assert second.earlier(policy) == {}


class Scale(Intervention):
    def __init__(self, gain: Gain) -> None:
        self.gain = gain

    def before(self, call: Any) -> Edit | None:
        return Edit((self.gain,)) if call.site.layer == 0 else None


HALF_OF_ONE_HEAD = torch.tensor([1.0, 0.5, 1.0, 1.0])[None, :, None]
BY_SAMPLE_AND_ROW = torch.linspace(0.0, 2.0, 48).view(2, 1, 24)


@pytest.fixture(scope="module")
def llama() -> Any:
    return build("llama")


@pytest.mark.parametrize("where", [None, torch.tensor([False, True, True, False])[None, :, None]], ids=["", "where"])
@pytest.mark.parametrize("value", [0.25, torch.tensor(0.25), HALF_OF_ONE_HEAD, BY_SAMPLE_AND_ROW], ids=str)
def test_a_gain_scales_z_head_by_head_and_row_by_row(value: Any, where: Tensor | None, llama: Any) -> None:
    assert llama.module.config.num_attention_heads == 4
    capture = interp.Capture(z=True, layers=[0])
    with torch.no_grad():
        with interp.hooked(llama.module, capture=capture) as plain:
            llama.module(input_ids=llama.batch["input_ids"])
        with interp.hooked(llama.module, capture=capture, interventions=[Scale(Gain(value, where))]) as run:
            llama.module(input_ids=llama.batch["input_ids"])
    assert run.report()["model.layers.0.self_attn"] == {"gain": 1, "read": 1}
    factor = torch.as_tensor(value)
    if where is not None:
        factor = torch.where(where, factor, 1.0)
    factor = factor.expand(2, 4, 24).numpy()[:, None, ..., None]
    np.testing.assert_allclose(run.trace["text"]["z"].values, plain.trace["text"]["z"].values * factor, atol=1e-6)
