from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dashboards.app import Actions, make_app
from dashboards.figures import empty_figure, map_figure
from dashboards.workbench import MAX_TOKENS, Workbench
from interp.models.model import Model

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--enable-logging=stderr",
)  # fmt: skip
PROMPT = "w10 w11 w12 w10 w11 w12"


@pytest.fixture(scope="module")
def model() -> Model:
    """A tiny Llama, 3 layers x 4 heads, with a tokenizer of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from interp.testing import build

    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, **{f"w{i}": i for i in range(4, 96)}}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )
    return Model(build("llama").module, tokenizer=tokenizer, name="tiny-llama")


@pytest.fixture(scope="module")
def actions(model: Model) -> Actions:
    return Actions(Workbench({"tiny-llama": model}))


def click(layer: int, head: int) -> dict[str, Any]:
    return {"points": [{"x": head, "y": layer}]}


def test_map_figure_carries_exact_values_and_names() -> None:
    weights = np.array([[1.0, np.nan], [0.25, 0.75]])
    figure = map_figure(weights, ["<b>", " cat"], "L1H2 of <i>m</i>")
    trace = figure.data[0]
    np.testing.assert_array_equal(trace.z, weights)
    assert trace.customdata[1][0] == "query 1  cat<br>key 0 &lt;b&gt;"
    assert "&lt;i&gt;" in figure.layout.title.text and list(figure.layout.xaxis.ticktext) == ["0 &lt;b&gt;", "1  cat"]
    assert figure.layout.yaxis.range[0] > figure.layout.yaxis.range[1], "query 0 stands on top"


def test_map_figure_refuses_other_shapes() -> None:
    with pytest.raises(ValueError, match=r"attention must be \[query, key\]"):
        map_figure(np.zeros((2, 3)), ["a", "b", "c"], "")
    with pytest.raises(ValueError, match="tokens must name each of the 2 positions, got 1"):
        map_figure(np.zeros((2, 2)), ["a"], "")


def test_grid_is_the_score(actions: Actions, model: Model) -> None:
    from interp import analysis

    figure, error, _, stack = actions.grid("tiny-llama", "previous_token")
    assert (error, stack) == ("", "text")
    expected = analysis.score("previous_token", model, progress=False)["value"].values
    np.testing.assert_allclose(figure.data[0].z, expected, atol=1e-7)


def test_a_click_draws_that_heads_map(actions: Actions, model: Model) -> None:
    figure, error, _, name = actions.head_map(click(2, 1), 0, "tiny-llama", "text", PROMPT)
    assert (error, name) == ("", "L2H1")
    model.module.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            inputs = model.encode(PROMPT)
            expected = model(inputs, output_attentions=True).attentions[2][0, 1].numpy()
    finally:
        model.module.set_attn_implementation("sdpa")
    np.testing.assert_allclose(figure.data[0].z, expected, atol=1e-5)
    assert figure.layout.xaxis.ticktext[-1].strip().endswith("w12")


def test_mistakes_are_told_on_the_page(actions: Actions) -> None:
    for score, model, word in (("nonsense", "tiny-llama", "nonsense"), ("sink", "someone/else", "someone/else")):
        figure, error, style, stack = actions.grid(model, score)
        assert word in error and style.get("display") != "none" and stack is None and len(figure.data) == 0
    long = " ".join(["w10"] * (MAX_TOKENS + 1))
    for event, prompt, word in (
        (click(0, 0), " ", "empty"),
        (click(0, 0), long, str(MAX_TOKENS)),
        (click(9, 0), PROMPT, "L9H0"),
    ):
        _, error, style, _ = actions.head_map(event, 0, "tiny-llama", "text", prompt)
        assert word in error and style.get("display") != "none"
    assert "click a head" in actions.head_map(None, 1, "tiny-llama", "text", PROMPT)[1]
    assert empty_figure("<why>").layout.annotations[0].text == "&lt;why&gt;"


def test_callers_of_many_threads_share_one_model(model: Model) -> None:
    actions = Actions(Workbench({"tiny-llama": model}))
    errors: list[str] = []

    def work(head: int) -> None:
        errors.append(actions.head_map(click(0, head), 0, "tiny-llama", "text", PROMPT)[1])

    threads = [threading.Thread(target=work, args=(i % 4,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == [""] * 8


def test_only_this_machine_may_ask(model: Model) -> None:
    client = make_app(model).server.test_client()
    assert client.get("/", headers={"Host": "evil.example"}).status_code == 400
    good = client.get("/", headers={"Host": "127.0.0.1:8050"})
    assert good.status_code == 200 and good.headers["X-Content-Type-Options"] == "nosniff"
    body = {"output": "x.y", "inputs": [], "changedPropIds": []}
    evil = client.post("/_dash-update-component", json=body, headers={"Host": "evil.example"})
    assert evil.status_code == 400
    assert "http://" not in good.text.replace("http://www.w3.org", "") and "https://" not in good.text, (
        "nothing from outside"
    )


def test_the_layout_offers_models_and_scores(model: Model, tmp_path: Path) -> None:
    app = make_app(model, sources=[str(tmp_path)])
    whole = json.dumps(app.layout.to_plotly_json(), default=lambda part: part.to_plotly_json())
    assert "tiny-llama" in whole and str(tmp_path) in whole and "induction" in whole and '"displaylogo": false' in whole


@pytest.fixture(scope="module")
def address(model: Model) -> Iterator[str]:
    from werkzeug.serving import make_server

    server = make_server("127.0.0.1", 0, make_app(model, prompt=PROMPT).server, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    thread.join()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_the_page_shows_the_grid_in_a_browser(address: str, tmp_path: Path) -> None:
    picture = Path(os.environ.get("HEADSCOPE_SCREENSHOT") or tmp_path / "page.png")
    done = subprocess.run(
        [
            str(CHROMIUM), *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,900",
            "--virtual-time-budget=20000", f"--screenshot={picture}", "--dump-dom", address,
        ],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert "previous_token, text, by head" in done.stdout, done.stdout[-3000:]
    assert "heatmaplayer" in done.stdout and "<image" in done.stdout, "the heat map is painted"
    assert "Callback error" not in done.stdout
    said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not [line for line in said if "rror" in line], said
    assert picture.stat().st_size > 10_000
