"""A tiny language model with words for tokens, a tiny model that reads pictures, a server, and a browser that forgives nothing."""

from __future__ import annotations

import io
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

from dashboards.app import make_app
from dashboards.workspace import Workspace
from interp.models.loading import BUNDLED
from interp.models.model import Model
from interp.tracing.trace import Trace

PROMPT = "w10 w11 w12 w10 w11 w12"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
]
HEADERS = {"Host": "127.0.0.1", "X-Headscope": "1"}


def tiny_llama() -> Model:
    """A Llama of 3 layers x 4 heads with random weights."""
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
def model() -> Model:
    return tiny_llama()


@pytest.fixture(scope="module")
def space(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    root = tmp_path_factory.mktemp("roots")
    made = Workspace({"tiny-llama": model}, roots=[root], state=tmp_path_factory.mktemp("state"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def app(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    made = make_app(
        model, roots=[tmp_path_factory.mktemp("roots")], state=tmp_path_factory.mktemp("state"), prompt=PROMPT
    )
    yield made
    made.workspace.close()


@pytest.fixture(scope="module")
def client(app: Any) -> Any:
    return Client(app)


class Client:
    """Requests as the page's script makes them."""

    def __init__(self, app: Any) -> None:
        self.http, self.space = app.server.test_client(), app.workspace

    def get(self, path: str, status: int = 200, **headers: str) -> Any:
        answer = self.http.get(f"/api/{path}", headers={**HEADERS, **headers})
        assert answer.status_code == status, (answer.status_code, answer.text[:400])
        return answer

    def json(self, path: str, status: int = 200) -> Any:
        return self.get(path, status).json

    def post(self, path: str, body: Any = None, status: int = 200) -> Any:
        answer = self.http.post(f"/api/{path}", json=body if body is not None else {}, headers=HEADERS)
        assert answer.status_code == status, (answer.status_code, answer.text[:400])
        return answer.json

    def run(self, **spec: Any) -> str:
        """Trace, wait, and give the run's id."""
        given = {"model": "tiny-llama", "prompt": PROMPT, "max_new_tokens": 4, **spec}
        made = self.post("run", given)
        if made["job"]:
            job = self.space.queue.wait(self.space.queue.get(made["job"]), 60)
            assert job.state == "done", job.error
        return made["run"]

    def finish(self, path: str, body: Any) -> Any:
        """A job to its end."""
        job = self.space.queue.get(self.post(path, body)["job"])
        return self.space.queue.wait(job, 120)


def synthetic_trace(layers: int, heads: int, grid: int = 32, keys: int = 64, missing: tuple[int, ...] = ()) -> Trace:
    """Pooled maps, row statistics and column sums of a model with as many heads as wanted; layers in ``missing`` are absent."""
    rng = np.random.default_rng(0)
    kept = [layer for layer in range(layers) if layer not in missing]
    edge = keys // grid
    lower = np.tril(np.ones((grid, grid), np.float32))
    pooled = rng.random((1, len(kept), heads, grid, grid), np.float32) ** 4 * lower + 1e-4 * lower
    pooled *= edge / pooled.sum(-1, keepdims=True)
    row = ("sample", "layer", "head", "query")
    size = (1, len(kept), heads, keys)
    column = ("sample", "layer", "head", "query_group", "key")
    visible = np.arange(keys, 0, -1)
    received = rng.random((1, len(kept), heads, 1, keys), np.float32) * 0.1 * visible
    received[..., 0] = 0.6 * visible[0]
    data = xr.Dataset(
        {
            "entropy": (row, rng.random(size, np.float32) * 3),
            "top_weight": (row, rng.random(size, np.float32)),
            "top_key": (row, np.minimum(rng.integers(0, keys, size), np.arange(keys)).astype(np.int32)),
            "mass": ((*row, "group"), rng.dirichlet((1, 1), size).astype(np.float32)),
            "pooled": (("sample", "layer", "head", "query_block", "key_block"), pooled),
            "received": (column, received),
            "received_rows": (column, np.broadcast_to(visible, received.shape).astype(np.int32).copy()),
        },
        coords={
            "layer": kept,
            "head": range(heads),
            "sample": [0],
            "query": range(keys),
            "key": range(keys),
            "group": ["special", "text"],
            "query_group": ["prefill"],
            "block_edge": edge,
            "phase": ("query", ["prefill"] * keys),
            "token": (("sample", "key"), [[f"t{i}" for i in range(keys)]]),
            "token_fed": (("sample", "query"), [[f"t{i}" for i in range(keys)]]),
            "kind": (("sample", "key"), np.array([[0] + [1] * (keys - 1)], np.int8)),
        },
    )
    return Trace({"text": data}, {"model": {"name": "synthetic"}})


def picture(width: int = 64, height: int = 48, kind: str = "PNG") -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)).save(out, kind)
    return out.getvalue()


def bundled(name: str) -> str:
    """A model that comes with Headscope; a build of it under test may lie in the folder ``HEADSCOPE_TRIAL_MODELS``."""
    folders = [*BUNDLED, *[Path(p) for p in [os.environ.get("HEADSCOPE_TRIAL_MODELS", "")] if p]]
    for folder in folders:
        if (folder / name / "config.json").is_file():
            return str(folder / name)
    pytest.skip(f"{name} is not bundled in this checkout")


# -- browser


@pytest.fixture(scope="session")
def browser_type_launch_args(browser_type_launch_args: dict[str, Any]) -> dict[str, Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium (apt-get install chromium)")
    return {**browser_type_launch_args, "executable_path": CHROMIUM, "args": FLAGS}


@pytest.fixture(scope="session")
def browser_context_args(browser_context_args: dict[str, Any]) -> dict[str, Any]:
    return {**browser_context_args, "viewport": {"width": 1440, "height": 1000}, "color_scheme": "light"}


class Server:
    """An app behind a real server on a free port."""

    def __init__(self, app: Any) -> None:
        from werkzeug.serving import make_server

        self.app, self.space = app, app.workspace
        self.server = make_server("127.0.0.1", 0, app.server, threaded=True)
        self.address = f"http://127.0.0.1:{self.server.server_port}/"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.space.close()
        self.server.shutdown()
        self.thread.join(10)
        self.server.server_close()


class Watched:
    """A page whose console errors, script errors, strayed requests and large callback bodies are remembered."""

    LARGEST = 30_000
    """Bytes that the page may post to a callback at once."""

    def __init__(self, page: Any, address: str) -> None:
        self.page, self.address = page, address
        self.wrong: list[str] = []
        self.allowed: list[str] = []
        self.posted: list[tuple[str, int]] = []
        page.on("console", lambda m: self.wrong.append(f"console: {m.text}") if m.type == "error" else None)
        page.on("pageerror", lambda e: self.wrong.append(f"script: {e}"))
        page.on("request", self._request)

    def _request(self, request: Any) -> None:
        if not request.url.startswith((self.address, "data:", "blob:")):
            self.wrong.append(f"left this machine: {request.url}")
        if request.method == "POST" and "_dash-update" in request.url:
            self.posted.append((request.url, len(request.post_data_buffer or b"")))

    def check(self) -> None:
        wrong = [w for w in self.wrong if not any(re.search(a, w) for a in self.allowed)]
        assert not wrong, wrong
        large = [p for p in self.posted if p[1] > self.LARGEST]
        assert not large, large

    def open(self, query: str = "", ready: bool = True) -> Any:
        self.page.goto(self.address + query)
        self.page.wait_for_selector("body[data-booted]", timeout=30_000)
        if ready:
            self.page.wait_for_selector("body[data-ready]", timeout=60_000)
        return self.page

    def state(self) -> dict[str, Any]:
        return self.page.evaluate("() => hs.state")

    def set(self, **patch: Any) -> None:
        self.page.evaluate("(patch) => hs.set(patch)", patch)


@pytest.fixture
def watch(page: Any) -> Iterator[Callable[[Server], Watched]]:
    made: list[Watched] = []

    def start(server: Server) -> Watched:
        made.append(Watched(page, server.address))
        return made[-1]

    yield start
    for watched in made:
        watched.check()
