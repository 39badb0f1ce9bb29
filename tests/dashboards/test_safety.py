"""Each rule of the page is attacked."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dashboards.app import make_app, serve
from dashboards.errors import PageError
from dashboards.safety import MAX_BODY, below, check_id, check_model, read_image
from tests.dashboards.conftest import HEADERS, Client, picture


def test_a_name_pointed_to_this_machine_is_refused(app: Any) -> None:
    http = app.server.test_client()
    for host in ("evil.example", "127.0.0.1.evil.example", "127.0.0.1@evil.example", "[::1]"):
        assert http.get("/", headers={"Host": host}).status_code == 400
        assert http.get("/api/models", headers={"Host": host}).status_code == 400
        assert http.post("/api/run", json={}, headers={**HEADERS, "Host": host}).status_code == 400
        assert http.post("/_dash-update-component", json={}, headers={**HEADERS, "Host": host}).status_code == 400
    for host in ("127.0.0.1:8050", "localhost:8050", "localhost"):
        assert http.get("/", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "path", ["/api/run", "/api/image", "/api/generate", "/api/job/abcdef/cancel", "/_dash-update-component"]
)
def test_only_the_page_itself_may_post(app: Any, path: str) -> None:
    http = app.server.test_client()
    base = {"Host": "127.0.0.1:8050"}
    for other in (
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:9999"},
        {"Origin": "http://127.0.0.1:8050", "Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {},
    ):
        assert http.post(path, json={}, headers={**base, **other}).status_code == 403, other
    mine = http.post(
        path, json={}, headers={**base, "Origin": "http://127.0.0.1:8050", "Sec-Fetch-Site": "same-origin"}
    )
    assert mine.status_code != 403


def test_a_form_of_another_site_starts_nothing(app: Any) -> None:
    http = app.server.test_client()
    sent = http.post(
        "/api/run",
        data='{"model": "tiny-llama", "prompt": "w10"}',
        headers={"Host": "127.0.0.1", "Content-Type": "text/plain"},
    )
    assert sent.status_code == 403
    again = http.post("/api/run", data="x=1", headers={**HEADERS, "Content-Type": "application/x-www-form-urlencoded"})
    assert again.status_code == 415 and not app.workspace.queue.jobs


def test_reading_never_starts_or_stops_anything(app: Any) -> None:
    http = app.server.test_client()
    for rule in app.server.url_map.iter_rules():
        if rule.rule.startswith("/api") and any(
            w in rule.rule for w in ("cancel", "reopen", "save", "evaluate", "generate", "dissect")
        ):
            if rule.rule in ("/api/saved", "/api/saved/<name>"):
                continue
            assert rule.methods == {"POST", "OPTIONS"}, rule
    assert http.get("/api/job/abcdef/cancel", headers={"Host": "127.0.0.1"}).mimetype == "text/html", (
        "Dash's page, nothing more"
    )


def test_large_bodies_are_refused(app: Any) -> None:
    http = app.server.test_client()
    sent = http.post("/api/image", data=b"0" * (MAX_BODY + 1), headers=HEADERS)
    assert sent.status_code == 413
    assert (
        http.post(
            "/_dash-update-component",
            data=b"0" * (MAX_BODY + 1),
            headers={**HEADERS, "Content-Type": "application/json"},
        ).status_code
        == 413
    )


def test_headers_of_every_answer(app: Any) -> None:
    http = app.server.test_client()
    for path in ("/", "/api/models", "/api/run/ffffff", "/nonsense", "/assets/b_renderer.js"):
        got = http.get(path, headers={"Host": "127.0.0.1"}).headers
        assert got["X-Content-Type-Options"] == "nosniff" and got["Cross-Origin-Resource-Policy"] == "same-origin"
        assert got["X-Frame-Options"] == "DENY" and got["Referrer-Policy"] == "no-referrer"
    policy = http.get("/", headers={"Host": "127.0.0.1"}).headers["Content-Security-Policy"]
    scripts = next(part for part in policy.split(";") if "script-src" in part)
    assert "unsafe" not in scripts and "http" not in scripts and "*" not in scripts
    assert "frame-ancestors 'none'" in policy and "connect-src 'self'" in policy


def test_nothing_of_the_page_comes_from_elsewhere(app: Any) -> None:
    text = app.server.test_client().get("/", headers={"Host": "127.0.0.1"}).text
    assert "http://" not in text.replace("http://www.w3.org", "") and "https://" not in text


@pytest.mark.parametrize(
    "name",
    [
        "../secret",
        "/etc",
        "a/../../etc",
        "~/models",
        "..\\x",
        "owner/name/more",
        "a b",
        "owner/..",
        "",
        "x\x00y",
        "-flag",
        7,
        None,
        "é/é",
    ],
)
def test_models_outside_are_refused(name: Any, tmp_path: Path) -> None:
    with pytest.raises(PageError, match="model must"):
        check_model(name, ["bundled"], [tmp_path])


def test_models_that_may_be_loaded(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "link").symlink_to("/etc")
    assert check_model("bundled", ["bundled"], []) == "bundled"
    assert check_model("owner/name-1.5", [], []) == "owner/name-1.5"
    assert check_model(str(tmp_path / "mine"), [], [tmp_path]) == str(tmp_path / "mine")
    with pytest.raises(PageError, match="must lie below a root"):
        check_model(str(tmp_path / "link"), [], [tmp_path])
    with pytest.raises(PageError, match="must exist"):
        below("absent", [tmp_path], "trace")
    with pytest.raises(PageError, match="none is configured"):
        below("/etc/passwd", [], "trace")


def test_code_of_a_checkpoint_is_never_run_because_the_page_asks(client: Client) -> None:
    given = client.space.spec(
        {"model": "tiny-llama", "prompt": "w10", "trust_remote_code": True, "load_options": {"a": 1}}
    )
    assert "trust_remote_code" not in given and "load_options" not in given
    assert client.space._options == {}


@pytest.mark.parametrize("name", ["..", "../x", "g" * 16, "", "a" * 65, "%2e%2e", "ABCDEF", 3])
def test_ids_are_opaque(name: Any, client: Client) -> None:
    with pytest.raises(PageError, match="must be an id of this page"):
        check_id(name, "run")
    if isinstance(name, str) and name and "/" not in name and "." not in name:
        client.get(f"run/{name}", 404)
        client.get(f"image/{name}.png", 404)
        client.get(f"saved/{name}", 404)


def test_pictures_are_written_anew() -> None:
    jpeg = io.BytesIO()
    exif = Image.Exif()
    exif[0x010E] = "where I live"
    Image.new("RGB", (20, 10), "red").save(jpeg, "JPEG", exif=exif)
    name, clean, size = read_image(jpeg.getvalue() + b"<script>alert(1)</script>")
    assert size == (20, 10) and clean[:8] == b"\x89PNG\r\n\x1a\n" and len(name) == 64
    assert b"where I live" not in clean and b"script" not in clean
    assert read_image(picture(5000, 40))[2][0] == 4096, "made smaller, not refused"


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few hundred bytes whose header promises a large picture."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("data", "words", "status"),
    [
        (b"just text, no picture", "must be a picture", 400),
        (b"", "must be a picture", 400),
        (b"<svg/>", "must be a picture", 400),
        (bomb(10_000, 10_000), "pixels, got 10000 x 10000", 413),
        (bomb(2**31 - 1, 2**31 - 1), "24 million|must be a picture", None),
        (picture()[:200], "must be a picture", 400),
        (bomb(64, 64), "must be a picture", 400),
    ],
)
def test_bad_pictures(data: bytes, words: str, status: int | None, client: Client) -> None:
    with pytest.raises(PageError, match=words) as refused:
        read_image(data)
    if status:
        assert refused.value.status == status
        sent = client.http.post("/api/image", data=data, headers=HEADERS)
        assert sent.status_code == status and "image must" in sent.json["error"]


def test_another_address_needs_its_token(model: Any, tmp_path: Path) -> None:
    made = make_app(model, state=tmp_path, hosts=("127.0.0.1", "192.0.2.7"), token="s3cret")
    http = made.server.test_client()
    host = {"Host": "192.0.2.7:8050"}
    assert http.get("/", headers=host).status_code == 401
    assert http.get("/api/models", headers=host).status_code == 401
    assert http.get("/?token=wrong", headers=host).status_code == 401
    assert http.get("/api/models", headers={**host, "Cookie": "headscope=wrong"}).status_code == 401
    came = http.get("/?token=s3cret&run=ab%26c", headers=host)
    assert came.status_code == 302 and came.headers["Location"] == "/?run=ab%26c", (
        "the token does not stay in the address"
    )
    cookie = came.headers["Set-Cookie"]
    assert "HttpOnly" in cookie and "SameSite=Strict" in cookie
    assert http.get("/api/models", headers={**host, "Cookie": "headscope=s3cret"}).status_code == 200
    made.workspace.close()
    with pytest.raises(ValueError, match="hosts must be given where there is no token"):
        make_app(model, state=tmp_path, hosts=None)


def test_another_address_without_a_token_is_not_served(app: Any) -> None:
    with pytest.raises(ValueError, match="needs a token, got '0.0.0.0'"):
        serve(app, port=0, browser=False, host="0.0.0.0")


def test_nothing_is_unpickled() -> None:
    folder = Path(__file__).parents[2] / "dashboards"
    text = "".join(p.read_text(encoding="utf-8") for p in folder.rglob("*.py"))
    for word in (
        "pickle",
        "torch.load",
        "allow_pickle=True",
        "eval(",
        "exec(",
        "shell=True",
        "dangerously",
        "DiskcacheManager",
    ):
        assert word not in text, word
