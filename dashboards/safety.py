"""What the page lets in: hosts, origins, sizes, names, paths and images; and the headers it sends."""

from __future__ import annotations

import hashlib
import hmac
import io
import re
import secrets
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

from dashboards.errors import PageError

LOOPBACK = ("127.0.0.1", "localhost")
MAX_BODY = 32 * 2**20
MAX_PIXELS = 24_000_000
"""Largest picture, pixels; a phone's photograph has 12 million."""
MAX_EDGE = 4096
IMAGE_KINDS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
MODEL_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
IDENT = re.compile(r"[0-9a-f]{6,64}", re.ASCII)
COOKIE = "headscope"


def check_id(value: str, what: str) -> str:
    """An opaque id, as this program makes them.

    Raises:
        PageError: anything else.
    """
    if not isinstance(value, str) or not IDENT.fullmatch(value):
        raise PageError(f"{what} must be an id of this page, got {str(value)[:80]!r}", 404)
    return value


def check_model(name: str, offered: Sequence[str], roots: Sequence[Path]) -> str:
    """A model that the page may load: one that is offered, a folder below a root, or a hub id.

    Returns:
        What ``interp.load`` takes.

    Raises:
        PageError: another path, or a name that is none.
    """
    if not isinstance(name, str) or not name or len(name) > 512 or "\x00" in name:
        raise PageError(f"model must be a name, got {str(name)[:80]!r}")
    if name in offered:
        return name
    looks_local = name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1 or Path(name).exists()
    if looks_local:
        return str(below(name, roots, "model"))
    if not MODEL_ID.fullmatch(name) or ".." in name:
        raise PageError(
            f"model must be a bundled name, a folder below a root, or a hub id 'owner/name', got {name[:80]!r}"
        )
    return name


def below(name: str, roots: Sequence[Path], what: str) -> Path:
    """A path below one of the roots, links resolved.

    Raises:
        PageError: it lies elsewhere, or does not exist.
    """
    for root in roots:
        whole = (root / name if not Path(name).is_absolute() else Path(name)).resolve()
        if whole.is_relative_to(root.resolve()):
            if not whole.exists():
                raise PageError(f"{what} must exist, got {name[:80]!r}", 404)
            return whole
    shown = ", ".join(str(root) for root in roots) or "none is configured"
    raise PageError(f"{what} must lie below a root of the page ({shown}; option --root), got {name[:80]!r}", 403)


def read_image(data: bytes) -> tuple[str, bytes, tuple[int, int]]:
    """Decode a picture that somebody sent and write it anew: without metadata, profiles or trailing bytes.

    Returns:
        Its name (SHA-256 of the new file), the file (PNG), and ``(width, height)``.

    Raises:
        PageError: not a picture of a kind in ``IMAGE_KINDS``, damaged, or larger than ``MAX_PIXELS``.
    """
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image: Any = Image.open(io.BytesIO(data), formats=IMAGE_KINDS)
            width, height = image.size
            # The header tells the size; nothing is decoded before it is checked.
            if width * height > MAX_PIXELS:
                raise PageError(
                    f"image must have at most {MAX_PIXELS / 1e6:.0f} million pixels, got {width} x {height} "
                    f"({width * height / 1e6:.0f} million)",
                    413,
                )
            image = ImageOps.exif_transpose(image).convert("RGB")
    except PageError:
        raise
    except Exception as error:
        raise PageError(
            f"image must be a picture ({', '.join(IMAGE_KINDS)}), got {len(data)} bytes that are none"
        ) from error
    if max(image.size) > MAX_EDGE:
        image.thumbnail((MAX_EDGE, MAX_EDGE))
    out = io.BytesIO()
    Image.frombytes("RGB", image.size, image.tobytes()).save(out, "PNG", compress_level=1)
    return hashlib.sha256(out.getvalue()).hexdigest(), out.getvalue(), image.size


class Guard:
    """Checks every request before it reaches the app.

    Args:
        hosts: names the page is reached by. A page of another site that points its own name here is refused by them. None
            takes any: then that page has no cookie with the token.
        token: asked for once in the address (``?token=``), then kept in a cookie; None asks for none (this machine only).
    """

    def __init__(self, hosts: Sequence[str] | None = LOOPBACK, token: str | None = None) -> None:
        self.hosts, self.token = hosts, token

    def install(self, server: Any, policy: str) -> None:
        """Put the checks on a Flask server.

        Args:
            policy: the Content-Security-Policy.
        """
        server.config.update(
            TRUSTED_HOSTS=None if self.hosts is None else list(self.hosts), MAX_CONTENT_LENGTH=MAX_BODY
        )
        server.before_request(self.before)
        self.policy = policy
        server.after_request(self.after)

    def before(self) -> Any:
        from flask import abort, redirect, request

        if request.method not in ("GET", "HEAD", "OPTIONS") and not self._same_origin(request):
            abort(403, "requests that change something must come from this page")
        if self.token is None or self._known(request.cookies.get(COOKIE)):
            return None
        if not self._known(request.args.get("token")):
            abort(401, "open the address with its token, as the command printed it")
        rest = urlencode([(k, v) for k, v in request.args.items(multi=True) if k != "token"])
        answer = redirect(request.path + (f"?{rest}" if rest else ""))
        answer.set_cookie(COOKIE, str(self.token), httponly=True, samesite="Strict")
        return answer

    def after(self, response: Any) -> Any:
        document = response.mimetype == "text/html"
        for name, value in (
            ("X-Content-Type-Options", "nosniff"),
            ("Cross-Origin-Resource-Policy", "same-origin"),
            ("Content-Security-Policy", self.policy if document else "default-src 'none'"),
            ("Referrer-Policy", "no-referrer"),
            ("X-Frame-Options", "DENY"),
            ("Cross-Origin-Opener-Policy", "same-origin"),
        ):
            response.headers[name] = value
        return response

    def _known(self, value: str | None) -> bool:
        return value is not None and self.token is not None and hmac.compare_digest(value.encode(), self.token.encode())

    def _same_origin(self, request: Any) -> bool:
        site = request.headers.get("Sec-Fetch-Site")
        if site is not None and site not in ("same-origin", "none"):
            return False
        origin = request.headers.get("Origin")
        if origin is None:
            # Browsers send it with every POST; what does not (a script on this machine) has no cookies to steal.
            return site is not None or request.headers.get("X-Headscope") == "1"
        return urlsplit(origin).netloc == request.host


def new_token() -> str:
    return secrets.token_urlsafe(24)


def content_policy(hashes: Sequence[str]) -> str:
    """Nothing from elsewhere; scripts are the page's files and the inline ones with these hashes."""
    scripts = " ".join(dict.fromkeys(["'self'", *hashes]))
    return (
        f"default-src 'self'; script-src {scripts}; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
        "connect-src 'self'; worker-src 'self' blob:; object-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    )
