"""Take the pictures of ``dashboards/screenshots`` anew: every view, light and dark, on the bundled vision-language model.

Run it after a change to the page, look at each picture, and commit those that changed: ``python tests/dashboards/take_screenshots.py``.
"""

from __future__ import annotations

import io
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from PIL import Image
from playwright.sync_api import sync_playwright

from dashboards.app import make_app
from probes.scenes import World, picture
from tests.dashboards.conftest import FLAGS, Server, bundled

OUT = Path(__file__).resolve().parents[2] / "dashboards" / "screenshots"
WIDTH = 1000
MASK = [{"name": "MaskHeads", "settings": {"heads": "L5H3,L5H4,L2H1"}}]
VIEWS: dict[str, dict[str, Any]] = {
    "overview": {"thumbs": True, "sort": "cluster"},
    "head": {"q": 214, "pin": "L3H2"},
    "image": {"q": 214, "pin": ""},
    "map": {},
    "importance": {},
    "sinks": {},
    "workbench": {"wb": json.dumps(MASK)},
}


def main() -> None:
    folder = Path(tempfile.mkdtemp())
    source = bundled("scenes-lvlm")
    server = Server(make_app(None, sources=[source], state=folder))
    picture(World("test").scene(3)).save(folder / "scene.png")
    image = server.space.add_image((folder / "scene.png").read_bytes())["image"]
    OUT.mkdir(exist_ok=True)
    try:
        made = server.space.start_run(
            {"model": source, "prompt": "Describe the picture.", "image": image, "chat": True, "max_new_tokens": 40}
        )
        server.space.queue.wait(server.space.queue.get(made["job"]))
        for name in ("entropy", "sink", "effective_keys", "top_k_mass", "write_norm", "image_mass"):
            job = server.space.queue.submit(
                "score", name, {"model": source, "score": name, "stack": "text", "run": made["run"]}, 3
            )
            server.space.queue.wait(job)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
            for scheme in ("light", "dark"):
                shoot(
                    browser,
                    f"{server.address}?run={made['run']}&metric=p:mass_image&layer=5&head=3&sel=L5H3,L5H4,L2H1",
                    scheme,
                )
            browser.close()
    finally:
        server.close()
        shutil.rmtree(folder, ignore_errors=True)


def shoot(browser: Any, address: str, scheme: str) -> None:
    page = browser.new_context(viewport={"width": 1440, "height": 1000}, color_scheme=scheme).new_page()
    page.goto(address)
    page.wait_for_selector("body[data-ready]", timeout=60_000)
    for view, state in VIEWS.items():
        page.evaluate("(patch) => hs.set(patch)", {"view": view, **state})
        page.wait_for_timeout(1500)
        if view == "importance":
            page.click("#do-dissect")
            page.wait_for_selector("#dissect-host[data-rows='9']", timeout=60_000)
        if view == "workbench":
            page.click("#wb-run")
            page.wait_for_selector("#verdict[data-done]", timeout=60_000)
        shot = Image.open(io.BytesIO(page.screenshot(full_page=view not in ("overview", "head")))).convert("RGB")
        small = shot.resize((WIDTH, round(shot.height * WIDTH / shot.width)), Image.Resampling.LANCZOS)
        small.save(OUT / f"{view}-{scheme}.webp", quality=60, method=6)
    page.context.close()


if __name__ == "__main__":
    main()
