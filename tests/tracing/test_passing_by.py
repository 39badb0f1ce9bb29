"""Sites that nobody touches in a run: their calls take the model's own function without asking the session, and are counted."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

import interp
from interp.testing import build
from interp.tracing import dispatch

STEPS = 5
HEADS = [interp.Head(1, 0), interp.Head(1, 1)]


@pytest.fixture
def model() -> Any:
    module: Any = build("llama").module
    module.generation_config.eos_token_id = None
    return module


def generate(model: Any, **more: Any) -> torch.Tensor:
    return model.generate(torch.tensor([[5, 6, 7, 8]]), max_new_tokens=STEPS, do_sample=False, pad_token_id=0, **more)


def test_they_are_counted_and_forgotten_with_the_run(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = generate(model)
    asked: list[int] = []
    handled = dispatch._attention
    monkeypatch.setattr(dispatch, "_attention", lambda module, *a, **o: asked.append(0) or handled(module, *a, **o))
    with interp.hooked(model) as run:
        assert torch.equal(generate(model), plain)
        assert not dispatch._passed_by
    n_sites = len(run.report())
    assert all(entry == {"untouched": STEPS} for entry in run.report().values())
    # The prompt and the first token after it ask; the others do not.
    assert len(asked) == 2 * n_sites


def test_a_site_that_is_touched_is_asked_every_time(model: Any) -> None:
    with interp.hooked(model, interventions=[interp.MaskHeads(HEADS, kind="zero")]) as run:
        changed = generate(model)
    counts = run.report()
    touched = [name for name, entry in counts.items() if "untouched" not in entry]
    assert len(touched) == 1 and sum(counts[touched[0]].values()) == STEPS
    with interp.hooked(model, interventions=[interp.MaskHeads(HEADS, kind="zero")], backend="reference"):
        assert torch.equal(generate(model), changed)


def test_a_session_opened_while_a_token_is_chosen_is_asked(model: Any) -> None:
    inner = interp.hooked(model, capture=interp.Capture(row_stats=True))

    def at_third(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if ids.shape[1] == 6:
            assert dispatch._passed_by
            with inner:
                assert not dispatch._passed_by
        return scores

    with interp.hooked(model) as run:
        generate(model, logits_processor=[at_third])
    assert all(entry == {"untouched": STEPS} for entry in run.report().values())


def test_an_error_leaves_nothing(model: Any) -> None:
    def fails(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if ids.shape[1] == 7:
            raise ValueError("stop")
        return scores

    with interp.hooked(model):
        with pytest.raises(ValueError, match="stop"):
            generate(model, logits_processor=[fails])
        assert not dispatch._passed_by
        model(torch.tensor([[5, 6]]))
    assert not dispatch._passed_by


def test_another_thread_is_not_taken_for_the_one_that_generates(model: Any) -> None:
    """A forward of another thread while a token is chosen is counted as a run of its own, once a site."""
    said: list[dict[str, dict[str, int]]] = []

    def elsewhere(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if ids.shape[1] == 7:
            before = run.report()
            thread = threading.Thread(target=lambda: model(torch.tensor([[9]])))
            thread.start()
            thread.join()
            said.extend([before, run.report()])
        return scores

    with interp.hooked(model) as run:
        generate(model, logits_processor=[elsewhere])
    before, after = said
    assert all(after[site]["untouched"] == before[site]["untouched"] + 1 for site in before)
    assert all(entry == {"untouched": STEPS + 1} for entry in run.report().values())


def test_a_session_on_a_part_of_the_model_is_asked(model: Any) -> None:
    """It has a handler of its own, which the calls of the part go to from then on."""
    inner: list[Any] = []

    def at_third(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if ids.shape[1] == 6:
            assert dispatch._passed_by
            with interp.hooked(model.model, interventions=[interp.MaskHeads(HEADS, kind="zero")]) as run:
                model.model(torch.tensor([[5, 6]]))
            inner.append(run.report())
        return scores

    with interp.hooked(model):
        generate(model, logits_processor=[at_third])
    assert sorted(map(str, inner[0].values())) == ["{'gain': 1}", *["{'untouched': 1}"] * (len(inner[0]) - 1)]
    assert not dispatch._passed_by


def test_threads_have_ways_of_their_own(model: Any) -> None:
    site = model.model.layers[0].self_attn
    dispatch.pass_by(site, first := {})
    seen: list[bool] = []
    thread = threading.Thread(target=lambda: seen.append(threading.get_ident() in dispatch._passed_by))
    thread.start()
    thread.join()
    assert seen == [False] and first == {"untouched": 0}
    dispatch.stop_passing([id(site)], thread=-1)
    assert dispatch._passed_by
    dispatch.stop_passing([id(site)])
    assert not dispatch._passed_by
