"""The page in a browser: real clicks, keys and drags. Any console error, script error or strayed request fails the test."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import expect

from dashboards.app import make_app
from dashboards.runs import Run, run_id
from interp.heads import Heads
from tests.dashboards.conftest import PROMPT, Server, Watched, bundled, picture, synthetic_trace, tiny_llama

Watch = Callable[[Server], Watched]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    model = tiny_llama()
    app = make_app(
        model, roots=[tmp_path_factory.mktemp("roots")], state=tmp_path_factory.mktemp("state"), prompt=PROMPT
    )
    made = Server(app)
    yield made
    made.close()


@pytest.fixture(scope="module")
def run(server: Server) -> str:
    made = server.space.start_run({"model": "tiny-llama", "prompt": PROMPT, "max_new_tokens": 6})
    assert server.space.queue.wait(server.space.queue.get(made["job"]), 60).state == "done"
    return made["run"]


def drag(page: Any, selector: str, points: list[tuple[float, float]]) -> None:
    """Press at the first point (fractions of the element), move through the others, release."""
    box = page.locator(selector).bounding_box()
    at = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in points]
    page.mouse.move(*at[0])
    page.mouse.down()
    for point in at[1:]:
        page.mouse.move(*point, steps=4)
    page.mouse.up()


def test_a_prompt_is_traced_streamed_and_shown(server: Server, watch: Watch) -> None:
    watched = watch(server)
    page = watched.open(ready=False)
    page.fill("#c-prompt", "w20 w21 w22 w20 w21")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("body[data-ready]", timeout=60_000)
    expect(page.locator("#answer")).not_to_be_empty()
    state = watched.state()
    assert state["model"] == "tiny-llama" and state["stack"] == "text" and state["run"] in page.url
    expect(page.locator("#grid-host canvas")).to_have_attribute("aria-label", re.compile("3 layers by 4 heads"))
    expect(page.locator(".ag-center-cols-container [role=row]")).to_have_count(12)
    expect(page.locator("#metric-about")).to_contain_text("nats")


def test_a_click_opens_a_head_and_back_returns(server: Server, run: str, watch: Watch) -> None:
    watched = watch(server)
    page = watched.open(f"?run={run}&metric=p:entropy")
    canvas = page.locator("#grid-host canvas")
    # The centre of the cell of layer 1, head 2: margins 38 and 18, cells 54 x 30.
    canvas.hover(position={"x": 38 + 2.5 * 54, "y": 18 + 1.5 * 30})
    expect(page.locator(".hs-tip")).to_contain_text("L1H2")
    expect(page.locator(".hs-tip")).to_contain_text("rank")
    canvas.click(position={"x": 38 + 2.5 * 54, "y": 18 + 1.5 * 30})
    expect(page.locator("#map-host[data-head=L1H2]")).to_be_visible()
    assert "view=head" in page.url and watched.state()["layer"] == 1
    expect(page.locator("#head-facts")).to_contain_text("row entropy")
    page.go_back()
    expect(page.locator("#view-overview")).to_be_visible()
    page.go_forward()
    expect(page.locator("#view-head")).to_be_visible()


def test_an_address_restores_everything(server: Server, run: str, watch: Watch) -> None:
    watched = watch(server)
    page = watched.open(
        f"?run={run}&view=head&stack=text&layer=2&head=3&q=5&metric=p:first_key&sel=L0H1,L2H2&norm=1&gamma=0.8&pin=L0H0"
    )
    wanted = {
        "layer": 2,
        "head": 3,
        "q": 5,
        "metric": "p:first_key",
        "sel": "L0H1,L2H2",
        "norm": True,
        "gamma": 0.8,
        "pin": "L0H0",
    }
    assert {k: watched.state()[k] for k in wanted} == wanted
    expect(page.locator("#map-host[data-head=L2H3]")).to_be_visible()
    expect(page.locator("#pin-title")).to_have_text("L0H0")
    expect(page.locator("#strip-note")).to_contain_text("query 5")
    expect(page.locator("#chips .hs-chip")).to_have_count(2)
    page.click("#copy-link")
    link = page.get_attribute("body", "data-link")
    page.goto("about:blank")
    page.goto(link)
    page.wait_for_selector("body[data-ready]")
    assert {k: watched.state()[k] for k in wanted} == wanted


def test_a_run_that_the_server_forgot_is_traced_again(server: Server, watch: Watch) -> None:
    watched = watch(server)
    made = server.space.start_run({"model": "tiny-llama", "prompt": "w50 w51 w52", "max_new_tokens": 2})
    server.space.queue.wait(server.space.queue.get(made["job"]), 60)
    del server.space.runs[made["run"]]
    watched.allowed.append("404")
    watched.open(f"?run={made['run']}")
    assert watched.state()["prompt"] == "w50 w51 w52"


def test_a_first_visit_is_told_what_to_do_and_options_live_in_the_address(
    server: Server, run: str, watch: Watch
) -> None:
    watched = watch(server)
    page = watched.open(ready=False)
    expect(page.locator("#welcome")).to_be_visible()
    expect(page.locator("#view-overview")).to_be_hidden()
    watched.open(f"?run={run}&view=workbench&chat=0&wnew=7&seed=3&sample=1&temp=0.5")
    expect(page.locator("#welcome")).to_be_hidden()
    assert [page.input_value(f"#wb-{n}") for n in ("new", "seed", "temperature")] == ["7", "3", "0.5"]
    page.fill("#wb-seed", "11")
    page.keyboard.press("Tab")
    page.wait_for_function("() => location.search.includes('seed=11')")
    page.click("#jobs-count")
    page.get_by_role("button", name="open the result of").last.click()
    expect(page.locator("#jobs-drawer")).to_be_hidden()


def test_keys(server: Server, run: str, watch: Watch) -> None:
    watched = watch(server)
    page = watched.open(f"?run={run}")
    page.locator("h1").click()
    for key, wanted in (
        ("ArrowRight", {"layer": 0, "head": 1}), ("j", {"layer": 1, "head": 1}), ("h", {"layer": 1, "head": 0}),
        ("ArrowLeft", {"layer": 0, "head": 3}),
        ("s", {"sel": "L0H3"}), ("p", {"pin": "L0H3"}), ("n", {"norm": True}), ("x", {"hide": True}), ("d", {"dir": "to"}),
        ("t", {"thumbs": True}),
        ("2", {"view": "head"}), ("]", {"q": 0}), ("]", {"q": 1}), ("Escape", {"q": None}), ("s", {"sel": ""}), ("1", {"view": "overview"}),
        ("Enter", {"view": "head"}),
    ):  # fmt: skip
        page.keyboard.press(key)
        state = watched.state()
        assert {k: state[k] for k in wanted} == wanted, key
    page.keyboard.press("/")
    page.keyboard.type("l2h1")
    page.keyboard.press("Enter")
    assert (watched.state()["layer"], watched.state()["head"]) == (2, 1), "letters typed into a field are no commands"
    page.keyboard.press("?")
    expect(page.get_by_role("dialog").get_by_text("hide sink columns")).to_be_visible()
    page.keyboard.press("j")
    assert watched.state()["layer"] == 2, "keys are off while a sheet is open"
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog").get_by_text("hide sink columns")).to_be_hidden()


def test_a_box_selects_and_the_table_follows(server: Server, run: str, watch: Watch) -> None:
    watched = watch(server)
    page = watched.open(f"?run={run}")
    drag(page, "#grid-host canvas", [(0.01, 0.01), (0.5, 0.62)])
    assert (
        set(watched.state()["sel"].split(",")) == {"L0H0", "L0H1", "L1H0", "L1H1"}
        or len(watched.state()["sel"].split(",")) >= 2
    )
    before = watched.state()["sel"]
    page.locator("#grid-host canvas").click(position={"x": 38 + 3.5 * 54, "y": 18 + 2.5 * 30}, modifiers=["Shift"])
    assert watched.state()["sel"] == f"{before},L2H3"
    page.get_by_role("button", name="keep the selection under a name").click()
    page.fill("#named input", "my heads")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="clear the selection").click()
    assert watched.state()["sel"] == ""
    page.get_by_role("button", name="my heads", exact=True).click()
    assert watched.state()["sel"] == f"{before},L2H3"
    page.locator(".ag-center-cols-container [role=row]").nth(4).locator("input[type=checkbox]").check()
    page.wait_for_function("() => hs.state.sel.split(',').includes('L1H0')")


def test_hover_links_map_and_tokens_both_ways(server: Server, run: str, watch: Watch) -> None:
    watched = watch(server)
    page = watched.open(f"?run={run}&view=head&layer=1&head=1")
    page.wait_for_selector("#map-host[data-head=L1H1]")
    page.locator("#strip-q [data-i='6']").hover()
    expect(page.locator("#strip-note")).to_contain_text("query 6")
    weights = page.eval_on_selector_all(
        "#strip-k [data-i]", "(all) => all.map((e) => Number(e.style.getPropertyValue('--w')))"
    )
    row = server.space.run(run).full_map("text", 1, 1)[6]
    assert [round(w, 2) for w in weights] == pytest.approx(
        [round(float((v / row.max()) ** 0.5), 2) for v in row], abs=0.011
    )
    page.locator("#strip-k [data-i='2']").click()
    expect(page.locator("#strip-note")).to_contain_text("key 2")
    assert watched.state()["k"] == 2
    box = page.locator("#map-host canvas.hs-canvas").bounding_box()
    frame = page.evaluate("() => hs.parts.map.frame()")
    size = server.space.run(run).full_map("text", 1, 1).shape[0]
    page.mouse.move(
        box["x"] + frame["left"] + 2.5 / size * frame["w"], box["y"] + frame["top"] + 5.5 / size * frame["h"]
    )
    value = float(server.space.run(run).full_map("text", 1, 1)[5, 2])
    expect(page.locator(".hs-tip")).to_contain_text(f"{value:.7f}"[:7])
    expect(page.locator("#strip-note")).to_contain_text("query 5")
    page.mouse.click(
        box["x"] + frame["left"] + 2.5 / size * frame["w"], box["y"] + frame["top"] + 5.5 / size * frame["h"]
    )
    assert (watched.state()["q"], watched.state()["k"]) == (5, 2)


def test_zooming_fetches_a_sharper_tile(server: Server, watch: Watch) -> None:
    import numpy as np

    from dashboards.maps import Look
    from interp.heads import Head

    watched = watch(server)
    found = Run("aa" * 8, {"trace": str(server.space.roots[0])}, synthetic_trace(2, 2, keys=2048), "long")
    server.space.keep_run(found)
    large = np.tril(np.random.default_rng(0).random((2048, 2048), np.float32))
    server.space.maps.get((found.id, "L0H0"), lambda: large)
    page = watched.open(f"?run={found.id}&view=head")
    page.wait_for_selector("#map-host[data-head=L0H0]")
    with page.expect_response(re.compile("tile/.*x0=")) as answer:
        page.locator("#map-host canvas.hs-canvas").hover(position={"x": 300, "y": 200})
        for _ in range(4):
            page.mouse.wheel(0, -400)
    assert answer.value.status == 200
    page.wait_for_timeout(400)
    tile = page.evaluate("() => { const t = hs.parts.map.tiles[1]; return [t.x0, t.x1, t.image.width]; }")
    assert tile[1] - tile[0] == tile[2] < 1024, "one pixel a cell"
    page.click("#zoom-all")
    page.wait_for_function("() => hs.parts.map.view.x1 - hs.parts.map.view.x0 === 2048")
    assert server.space.pyramid(found, Head(0, 0), Look()).shape == (2048, 2048)


def test_a_score_is_computed_while_browsing_goes_on(server: Server, run: str, watch: Watch) -> None:
    watched = watch(server)
    page = watched.open(f"?run={run}&metric=s:induction")
    page.click("#compute")
    began = time.monotonic()
    page.evaluate("() => hs.set({ view: 'head', layer: 2, head: 2 })")
    page.wait_for_selector("#map-host[data-head=L2H2]")
    assert time.monotonic() - began < 3
    page.evaluate("() => hs.set({ view: 'overview' })")
    expect(page.locator("#metric-about #compute")).to_have_count(0, timeout=60_000)
    expect(page.locator("#grid-bar")).to_contain_text("fraction of row mass", timeout=60_000)
    page.click("#jobs-count")
    expect(page.get_by_role("dialog").get_by_text("score induction (text)")).to_be_visible()


def test_the_map_of_heads_is_lassoed(server: Server, run: str, watch: Watch) -> None:
    watched = watch(server)
    page = watched.open(f"?run={run}&view=map")
    page.wait_for_selector("#scatter-host[data-points='12']")
    drag(page, "#scatter-host canvas", [(0.06, 0.03), (0.98, 0.03), (0.98, 0.9), (0.06, 0.9), (0.06, 0.04)])
    assert len(watched.state()["sel"].split(",")) == 12
    expect(page.locator("#archetypes .hs-card").first).to_be_visible()
    page.locator("#archetypes .hs-card").first.click()
    assert 0 < len(watched.state()["sel"].split(",")) < 12
    watched.set(sx="p:entropy", sy="p:top_weight")
    expect(page.locator("#map-note")).to_contain_text("row entropy (nats) against largest weight of a row")


def test_importance_and_sinks(server: Server, run: str, watch: Watch) -> None:
    watched = watch(server)
    page = watched.open(f"?run={run}&view=importance&layer=1&head=2")
    expect(page.locator("#importance-host canvas")).to_have_attribute("aria-label", re.compile("12 heads by"))
    page.click("#do-dissect")
    page.wait_for_selector("#dissect-host[data-rows='5']", timeout=60_000)
    expect(page.locator("#dissect-host")).to_contain_text("all but text keys")
    page.keyboard.press("6")
    page.wait_for_selector("#sink-list[data-count]")
    watched.set(thr=0.02)
    expect(page.locator("#sink-list td").first).to_be_visible()
    page.click("#do-massive")
    expect(page.locator("#massive")).to_contain_text("median", timeout=20_000)


def test_the_workbench_streams_compares_saves_and_reopens(server: Server, run: str, watch: Watch) -> None:
    watched = watch(server)
    page = watched.open(f"?run={run}&view=workbench&sel=L0H1,L1H2")
    page.wait_for_selector("#add-card option[value=MaskHeads]", state="attached")
    offered = page.eval_on_selector_all("#add-card option", "(all) => all.map((o) => o.value)")
    assert {"VHR", "VAR", "PAI", "MaskHeads", "Knockout", "Streaming"} <= set(offered)
    page.select_option("#add-card", "MaskHeads")
    expect(page.locator("[data-name=MaskHeads] input").first).to_have_value("L0H1,L1H2")
    page.fill("#wb-new", "8")
    page.click("#wb-run")
    page.wait_for_selector("#verdict[data-done]", timeout=60_000)
    expect(page.locator("#verdict")).to_contain_text("nats, matched random heads by")
    assert page.inner_text("#text-before") and page.inner_text("#text-after")
    assert float(page.get_attribute("#text-before", "data-at")) < 2
    page.click("#wb-save")
    expect(page.locator("#saved option")).to_have_count(2)
    with page.expect_download() as download:
        page.click("#wb-export")
    held = json.loads(Path(download.value.path()).read_text(encoding="utf-8"))
    assert held["interventions"][0]["settings"]["heads"] == "L0H1,L1H2" and held["model"] == "tiny-llama"
    verdict, address = page.inner_text("#verdict"), page.url
    page.goto("about:blank")
    page.goto(address)
    page.wait_for_selector("#verdict[data-done]", timeout=30_000)
    assert page.inner_text("#verdict") == verdict, "a saved result comes back with its address"
    page.get_by_role("button", name="Compare the head, before and after").click()
    expect(page.locator("#pin-title")).to_contain_text("MaskHeads", timeout=20_000)


def test_a_generation_is_stopped_at_once(server: Server, run: str, watch: Watch) -> None:
    watched = watch(server)
    page = watched.open(
        f"?run={run}&view=workbench&wb="
        + json.dumps([{"name": "ScaleHeads", "settings": {"heads": "L0H1", "gain": 0.5}}])
    )
    page.wait_for_selector("[data-name=ScaleHeads]")
    page.fill("#wb-new", "100")
    page.click("#wb-run")
    expect(page.locator("#text-before")).to_contain_text("w", timeout=20_000)
    page.click("#wb-stop")
    began = time.monotonic()
    expect(page.locator("#verdict")).to_contain_text("stopped", timeout=10_000)
    assert time.monotonic() - began < 2
    page.fill("#wb-new", "2")
    page.click("#wb-run")
    page.wait_for_selector("#verdict[data-done]", timeout=60_000)


def test_what_goes_wrong_is_said_and_the_page_goes_on(server: Server, run: str, watch: Watch, tmp_path: Path) -> None:
    watched = watch(server)
    watched.allowed.append("Failed to load resource")
    page = watched.open(f"?run={run}")
    problems = page.locator("#problems")
    (tmp_path / "text.png").write_text("no picture", encoding="utf-8")
    page.set_input_files("#image-file", tmp_path / "text.png")
    expect(problems).to_contain_text("image must be a picture")
    page.fill("#c-prompt", " ".join(["w10"] * 4000))
    page.click("#trace")
    expect(problems).to_contain_text("prompt must have at most", timeout=20_000)
    problems.get_by_role("button", name="dismiss").first.click()
    page.fill("#c-prompt", "w60 w61 w62")
    page.click("#trace")
    expect(page.locator("body")).to_have_attribute("data-ready", re.compile("."), timeout=20_000)
    expect(problems.get_by_text("prompt must have at most")).to_have_count(0, timeout=20_000)
    watched.set(view="workbench", wb=json.dumps([{"name": "VHR", "settings": {}}]))
    page.wait_for_selector("[data-name=VHR]")
    page.click("#wb-run")
    expect(problems).to_contain_text("image", timeout=20_000)
    page.locator("h1").click()
    page.keyboard.press("2")
    expect(page.locator("#map-host[data-head]")).to_be_visible()


def test_two_tabs_and_one_that_closes_mid_generation(server: Server, run: str, watch: Watch, context: Any) -> None:
    watched = watch(server)
    page = watched.open(f"?run={run}&view=workbench&new=4")
    other = context.new_page()
    other.goto(server.address + f"?run={run}&view=workbench")
    other.wait_for_selector("body[data-ready]")
    other.fill("#wb-new", "64")
    other.click("#wb-run")
    expect(other.locator("#text-before")).to_contain_text("w", timeout=20_000)
    other.close()
    page.fill("#wb-new", "3")
    page.click("#wb-run")
    page.wait_for_selector("#verdict[data-done]", timeout=60_000)
    expect(page.locator("#verdict")).to_contain_text("No effect")


def test_dark_mode_and_code(server: Server, run: str, watch: Watch) -> None:
    watched = watch(server)
    page = watched.open(f"?run={run}&view=head")
    colours = "() => [getComputedStyle(document.body).backgroundColor, document.documentElement.getAttribute('data-ag-theme-mode')]"
    assert page.evaluate(colours) == ["rgb(255, 255, 255)", "light"]
    page.click("#scheme")
    expect(page.locator("html")).to_have_attribute("data-ag-theme-mode", "dark")
    assert page.evaluate(colours)[0] == "rgb(31, 32, 35)"
    page.reload()
    page.wait_for_selector("body[data-ready]")
    assert page.evaluate(colours)[1] == "dark"
    page.locator("h1").click()
    page.keyboard.press("c")
    expect(page.get_by_role("dialog")).to_contain_text("interp.load('tiny-llama')")


def test_exports(server: Server, run: str, watch: Watch) -> None:
    watched = watch(server)
    page = watched.open(f"?run={run}&layer=1&head=1")
    for kind, begins in (
        ("png", b"\x89PNG"),
        ("svg", b"<svg"),
        ("csv", b"id,layer"),
        ("npz", b"PK"),
        (None, b"<!DOCTYPE html>"),
    ):
        page.click("#export")
        with page.expect_download() as download:
            page.click(f"#export-{kind}" if kind else "#do-export-html")
        assert Path(download.value.path()).read_bytes().startswith(begins), kind
    assert "Plotly Cloud" not in page.content()


def test_an_exported_page_opens_without_a_server(server: Server, run: str, page: Any, tmp_path: Path) -> None:
    from dashboards.export import html_page

    wrong: list[str] = []
    page.on("console", lambda m: wrong.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda e: wrong.append(str(e)))
    page.on("request", lambda r: wrong.append(r.url) if not r.url.startswith(("file:", "data:", "blob:")) else None)
    (tmp_path / "page.html").write_text(
        html_page(server.space, server.space.run(run), Heads.parse("L1H1,L2H0")), encoding="utf-8"
    )
    page.goto(f"file://{tmp_path}/page.html")
    expect(page.locator("canvas").first).to_be_visible()
    page.get_by_role("button", name="L2H0").click()
    box = page.locator("canvas").nth(1).bounding_box() or page.locator("canvas").last.bounding_box()
    assert box and not wrong
    expect(page.locator("tbody tr")).to_have_count(12)


def test_the_widgets_module_draws_in_a_page_of_its_own(server: Server, run: str, page: Any) -> None:
    from dashboards.export import page_data
    from dashboards.widget import headscope_widget, module_source

    wrong: list[str] = []
    page.on("pageerror", lambda e: wrong.append(str(e)))
    page.set_content("<div id=host></div>")
    data = page_data(None, server.space.run(run), Heads.parse("L1H1"))
    page.evaluate(
        """async ([source, data]) => {
          const module = await import(URL.createObjectURL(new Blob([source], { type: "text/javascript" })));
          module.default.render({ model: { get: () => data }, el: document.getElementById("host") });
        }""",
        [module_source(), json.loads(json.dumps(data))],
    )
    expect(page.locator("#host canvas").first).to_be_visible()
    expect(page.locator("#host tbody tr")).to_have_count(12)
    assert not wrong
    try:
        import anywidget as _  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match="headscope\\[notebooks\\]"):
            headscope_widget(server.space.run(run).trace)


@pytest.mark.slow
def test_the_widget_of_a_real_kernel_draws(page: Any, tmp_path: Path) -> None:
    pytest.importorskip("anywidget")
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    path = synthetic_trace(3, 4).save(tmp_path / "run.zarr")
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).resolve().parents[2])!r})\n"
        "import interp\nfrom dashboards.widget import headscope_widget\n"
        f"headscope_widget(interp.Trace.open({str(path)!r}), 'L1H1')"
    )
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    nbclient.NotebookClient(notebook, timeout=120).execute()
    shown = [o["data"] for o in notebook.cells[0].outputs if "data" in o]
    assert any("application/vnd.jupyter.widget-view+json" in data for data in shown)
    states = notebook.metadata["widgets"]["application/vnd.jupyter.widget-state+json"]["state"].values()
    state = next(s["state"] for s in states if s["model_module"] == "anywidget")
    wrong: list[str] = []
    page.on("pageerror", lambda e: wrong.append(str(e)))
    page.set_content("<div id=host></div>")
    page.evaluate(
        """async ([source, data]) => {
          const module = await import(URL.createObjectURL(new Blob([source], { type: "text/javascript" })));
          module.default.render({ model: { get: () => data }, el: document.getElementById("host") });
        }""",
        [state["_esm"], json.loads(json.dumps(state["data"], allow_nan=False))],
    )
    expect(page.locator("#host canvas").first).to_be_visible()
    expect(page.locator("#host tbody tr")).to_have_count(12)
    assert not wrong


def test_5120_heads(server: Server, watch: Watch) -> None:
    watched = watch(server)
    path = synthetic_trace(80, 64, grid=16, keys=32, missing=(3,)).save(
        server.space.roots[0] / "large.zarr", overwrite=True
    )
    page = watched.open(f"?run={run_id({'trace': str(path)})}&metric=p:entropy")
    expect(page.locator("#grid-host canvas")).to_have_attribute("aria-label", re.compile("80 layers by 64 heads"))
    painted = page.evaluate(
        "() => { const t = performance.now(); hs.set({ metric: 'p:top_weight' }); return performance.now() - t; }"
    )
    assert painted < 1000, painted
    watched.set(thumbs=True)
    page.wait_for_function("(width) => hs.page.overview.sprite?.width === width", arg=64 * 16, timeout=20_000)
    watched.set(thumbs=False, top=20)
    watched.set(view="map")
    page.wait_for_selector("#scatter-host[data-points='5056']", timeout=30_000)
    drag(page, "#scatter-host canvas", [(0.05, 0.02), (0.98, 0.02), (0.98, 0.92), (0.05, 0.92), (0.05, 0.03)])
    page.wait_for_timeout(500)
    chosen = watched.state()["sel"]
    assert len(chosen) < 2000 and len(Heads.parse(chosen)) == 5056
    watched.set(sel="")


@pytest.mark.slow
def test_a_vision_language_model(tmp_path_factory: pytest.TempPathFactory, watch: Watch) -> None:
    source = bundled("scenes-lvlm")
    from probes.scenes import World
    from probes.scenes import picture as paint

    app = make_app(None, sources=[source], state=tmp_path_factory.mktemp("state"))
    server = Server(app)
    try:
        folder = tmp_path_factory.mktemp("picture")
        paint(World("test").scene(3)).save(folder / "scene.png")
        watched = watch(server)
        page = watched.open(ready=False)
        page.evaluate(
            "(patch) => hs.set(patch)", {"model": source, "chat": True, "new": 16, "prompt": "Describe the picture."}
        )
        page.set_input_files("#image-file", folder / "scene.png")
        page.wait_for_selector("#image-preview img")
        page.click("#trace")
        page.wait_for_selector("body[data-ready]", timeout=60_000)
        watched.set(view="image", layer=5, head=3)
        page.wait_for_selector("#image-panels[data-drawn]")
        expect(page.locator("#image-note")).to_contain_text("of the row is on patches")
        page.locator("#image-panels canvas").click(position={"x": 40, "y": 40})
        expect(page.locator("#image-note")).to_contain_text("Tokens that look at patch")
        page.locator("#image-tokens [data-i]").last.click()
        expect(page.locator("#image-note")).to_contain_text("Attention of token")
        page.locator("#step").fill("207")
        expect(page.locator("#image-note")).to_contain_text("token 207")
        watched.set(stack="vision")
        expect(page.locator("#image-special button")).to_contain_text("CLS")
        expect(page.locator("#hops canvas")).to_be_visible()
        watched.set(stack="text", view="workbench", wb=json.dumps([{"name": "VHR", "settings": {"alpha": 2}}]))
        page.fill("#wb-new", "12")
        page.click("#wb-run")
        page.wait_for_selector("#verdict[data-done]", timeout=90_000)
        expect(page.locator("#curves")).to_contain_text("Attention on the image")
        expect(page.locator("#curves")).to_contain_text("Vision-aware head divergence")
        page.fill("#wb-new", "200")
        page.click("#wb-run")
        expect(page.locator("#text-before")).not_to_be_empty(timeout=30_000)
        page.click("#wb-stop")
        expect(page.locator("#verdict")).to_contain_text("stopped", timeout=20_000)
    finally:
        server.close()


def test_a_vision_transformer(tmp_path_factory: pytest.TempPathFactory, watch: Watch) -> None:
    source = bundled("scenes-vit")
    server = Server(make_app(None, sources=[source], state=tmp_path_factory.mktemp("state")))
    try:
        folder = tmp_path_factory.mktemp("picture")
        (folder / "noise.png").write_bytes(picture(112, 112))
        watched = watch(server)
        page = watched.open(ready=False)
        watched.set(model=source, view="image")
        page.set_input_files("#image-file", folder / "noise.png")
        page.wait_for_selector("#image-preview img")
        page.click("#trace")
        page.wait_for_selector("#image-panels[data-drawn]", timeout=60_000)
        expect(page.locator("#image-special button").first).to_contain_text("CLS")
        page.locator("#image-panels canvas").click(position={"x": 60, "y": 60})
        expect(page.locator("#image-note")).to_contain_text("Attention of position")
        expect(page.locator("#hops canvas")).to_be_visible()
    finally:
        server.close()
