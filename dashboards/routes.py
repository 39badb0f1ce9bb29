"""Addresses of the page's data: GET reads, POST (JSON, same origin) starts and stops; nothing else changes anything."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from functools import wraps
from typing import Any

import numpy as np
from flask import Blueprint, Response, request, send_file
from werkzeug.exceptions import HTTPException

from dashboards import embedding, facts, images, overview, sinks
from dashboards.errors import PageError, explain
from dashboards.jobs import GENERATION, SCORE, SWEEP
from dashboards.maps import Look
from dashboards.safety import check_id
from dashboards.workspace import Workspace
from interp.heads import Head, HeadError, Heads

FOREVER = "private, max-age=31536000, immutable"


def blueprint(space: Workspace) -> Blueprint:
    """All addresses below ``/api``."""
    api = Blueprint("api", __name__, url_prefix="/api")

    def get(path: str) -> Callable[[Any], Any]:
        return lambda function: api.get(path)(_answering(function))

    def post(path: str) -> Callable[[Any], Any]:
        return lambda function: api.post(path)(_answering(function))

    @get("/models")
    def models() -> Any:
        return {"models": space.offered(), "runs": space.list_runs()}

    @get("/run/<run>")
    def run_info(run: str) -> Any:
        found = space.run(run)
        return {**found.describe(), "tokens": {stack: found.tokens(stack) for stack in found.trace}}

    @get("/run/<run>/overview/<stack>")
    def run_overview(run: str, stack: str) -> Any:
        return overview.overview(space, space.run(run), stack)

    @get("/run/<run>/sprite/<stack>.png")
    def run_sprite(run: str, stack: str) -> Any:
        return _png(overview.sprite_png(space.run(run), stack))

    @get("/run/<run>/table/<stack>.csv")
    def run_table(run: str, stack: str) -> Any:
        return _download(overview.table_csv(space, space.run(run), stack).encode(), f"heads-{stack}.csv", "text/csv")

    @get("/run/<run>/map/<stack>/<int:layer>/<int:head>")
    def head_map(run: str, stack: str, layer: int, head: int) -> Any:
        found, one, look = space.run(run), Head(layer, head, stack), _look()
        found.check_head(stack, layer, head)
        pyramid = space.pyramid(found, one, look)
        whole = pyramid.shape == (len(found.tokens(stack)["queries"]), len(found.tokens(stack)["keys"]))
        edge = (
            1 if whole else int(found.stack(stack)["block_edge"]) if "block_edge" in found.stack(stack).variables else 1
        )
        return {
            "rows": pyramid.shape[0], "columns": pyramid.shape[1], "top": pyramid.top, "pooled": not whole, "edge": edge,
            **facts.facts(space, found, one),
        }  # fmt: skip

    @get("/run/<run>/tile/<stack>/<int:layer>/<int:head>.png")
    def tile(run: str, stack: str, layer: int, head: int) -> Any:
        found = space.run(run)
        found.check_head(stack, layer, head)
        pyramid = space.pyramid(found, Head(layer, head, stack), _look())
        rows, columns = pyramid.shape
        part = pyramid.tile(
            _number("x0", 0), _number("x1", columns), _number("y0", 0), _number("y1", rows), min(_number("w", 800), 1600),
            top=_float("top", pyramid.top or 1.0), gamma=_float("gamma", 0.5),
        )  # fmt: skip
        answer = _png(part.data)
        answer.headers["X-Tile"] = f"{part.x0},{part.x1},{part.y0},{part.y1},{part.step}"
        return answer

    @get("/run/<run>/line/<stack>/<int:layer>/<int:head>")
    def line(run: str, stack: str, layer: int, head: int) -> Any:
        """One row (``q=``) or column (``k=``) as fp32."""
        found = space.run(run)
        found.check_head(stack, layer, head)
        values = space.pyramid(found, Head(layer, head, stack), _look()).levels[0]
        at, axis = (_number("q", 0), 0) if "q" in request.args else (_number("k", 0), 1)
        if not 0 <= at < values.shape[axis]:
            raise PageError(f"position must be in 0..{values.shape[axis] - 1}, got {at}")
        return _floats(values[at] if axis == 0 else values[:, at])

    @get("/run/<run>/npz/<stack>/<int:layer>/<int:head>.npz")
    def npz(run: str, stack: str, layer: int, head: int) -> Any:
        found, one = space.run(run), Head(layer, head, stack)
        found.check_head(stack, layer, head)
        tokens = found.tokens(stack)
        out = io.BytesIO()
        np.savez_compressed(
            out, attention=space.pyramid(found, one, _look()).levels[0], head=np.array(str(one)),
            queries=np.array(tokens["queries"], dtype=str), keys=np.array(tokens["keys"], dtype=str),
        )  # fmt: skip
        return _download(out.getvalue(), f"{one}.npz", "application/octet-stream")

    @get("/run/<run>/pairs/<stack>/<int:layer>/<int:head>")
    def head_pairs(run: str, stack: str, layer: int, head: int) -> Any:
        return {"pairs": facts.pairs(space, space.run(run), Head(layer, head, stack), _look().hide)}

    @get("/run/<run>/logits/<stack>/<int:layer>/<int:head>")
    def head_logits(run: str, stack: str, layer: int, head: int) -> Any:
        found, row = space.run(run), _number("row", -1)
        one = Head(layer, head, stack)
        return found.once(("logits", str(one), row), lambda: space.queue.call(
            lambda: facts.direct_logits(space, found, one, None if row < 0 else row)))  # fmt: skip

    @get("/run/<run>/examples/<stack>/<int:layer>/<int:head>")
    def head_examples(run: str, stack: str, layer: int, head: int) -> Any:
        found, one = space.run(run), Head(layer, head, stack)
        return {
            "examples": found.once(
                ("examples", str(one)), lambda: space.queue.call(lambda: facts.examples(space, found, one))
            )
        }

    @get("/run/<run>/images/<stack>")
    def image_panels(run: str, stack: str) -> Any:
        found = space.run(run)
        return {"panels": images.panels(found, stack), "special": images.special_positions(found, stack)}

    @get("/run/<run>/looks/<stack>")
    def looks(run: str, stack: str) -> Any:
        heads = _heads(request.args.get("heads", ""), stack)
        found = space.run(run)
        for head in heads:
            found.check_head(head.stack, head.layer, head.head)
        return _floats(images.weights(space, found, heads, _number("q", 0), request.args.get("direction", "from")))

    @get("/run/<run>/hops/<stack>/<int:layer>/<int:head>")
    def head_hops(run: str, stack: str, layer: int, head: int) -> Any:
        return images.hops(space, space.run(run), Head(layer, head, stack))

    @get("/run/<run>/embedding/<stack>")
    def run_embedding(run: str, stack: str) -> Any:
        found, method = space.run(run), request.args.get("method", "pca")
        return found.once(("embedding", stack, method), lambda: embedding.embed(found, stack, method))

    @get("/run/<run>/archetypes/<stack>")
    def run_archetypes(run: str, stack: str) -> Any:
        found = space.run(run)
        trained = found.known(("autoencoder", stack))
        return trained or found.once(("archetypes", stack), lambda: embedding.archetypes(found, stack))

    @get("/run/<run>/page.html")
    def page(run: str) -> Any:
        from dashboards.export import html_page

        found = space.run(run)
        heads = Heads.parse(request.args.get("heads", "")[:20_000])
        return _download(html_page(space, found, heads).encode(), f"headscope-{found.id[:8]}.html", "text/html")

    @get("/cards")
    def cards() -> Any:
        from dashboards.specs import cards as all_cards

        return {"cards": [{**c._asdict(), "fields": [f._asdict() for f in c.fields]} for c in all_cards()]}

    @get("/probes")
    def probes() -> Any:
        from dashboards.evaluate import judged_probes

        return {"probes": judged_probes()}

    @get("/run/<run>/sinks/<stack>")
    def run_sinks(run: str, stack: str) -> Any:
        return sinks.sinks(space.run(run), stack, _float("threshold", 0.3), request.args.get("rows") or None)

    @get("/run/<run>/activations")
    def run_activations(run: str) -> Any:
        found = space.run(run)
        return found.once("activations", lambda: space.queue.call(lambda: sinks.activations(space, found)))

    @get("/image/<name>.png")
    def image(name: str) -> Any:
        answer = send_file(space.image_path(name), mimetype="image/png")
        answer.headers["Cache-Control"] = FOREVER
        return answer

    @get("/jobs")
    def jobs() -> Any:
        return {
            "jobs": [job.summary() for job in reversed(list(space.queue.jobs.values()))][:50],
            "last": space.queue.last_event,
        }

    @get("/job/<job>")
    def job(job: str) -> Any:
        found = space.queue.get(check_id(job, "job"))
        return {**found.summary(), "result": found.result, "partial": found.partial, "spec": dict(found.spec)}

    @api.get("/events")
    def events() -> Any:
        given = request.headers.get("Last-Event-ID") or request.args.get("since") or ""
        epoch, _, number = given.partition("-")
        # Numbers start anew with the server: those of an earlier one mean nothing.
        since = int(number) if epoch == space.queue.epoch and number.isdigit() else space.queue.last_event
        return Response(
            _stream(space, since),
            mimetype="text/event-stream",
            headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
        )

    @post("/image")
    def add_image() -> Any:
        return space.add_image(request.get_data(cache=False))

    @post("/run")
    def start_run() -> Any:
        return space.start_run(_body())

    @post("/run/<run>/reopen")
    def reopen(run: str) -> Any:
        return space.reopen(run)

    @post("/score")
    def start_score() -> Any:
        found = space.run(str(_body().get("run")))
        spec = {
            "model": found.model_name,
            "score": str(_body().get("score")),
            "stack": str(_body().get("stack") or "text"),
            "run": found.id,
        }
        space.spec({"model": spec["model"]})
        found.stack(spec["stack"])
        same = [q for q in space.queue.jobs.values() if q.kind == "score" and not q.ended and dict(q.spec) == spec]
        job = same[0] if same else space.queue.submit("score", f"score {spec['score']} ({spec['stack']})", spec, SCORE)
        return {"job": job.id}

    @post("/generate")
    def start_generate() -> Any:
        from dashboards.saved import checked

        return {"job": space.queue.submit("generate", "before / after", checked(space, _body()), GENERATION).id}

    @post("/evaluate")
    def start_evaluate() -> Any:
        body = _body()
        spec = space.spec(body) | {"probe": str(body.get("probe")), "n": body.get("n") or 20}
        return {"job": space.queue.submit("evaluate", f"evaluate {spec['probe']}", spec, SWEEP).id}

    @post("/dissect")
    def start_dissect() -> Any:
        body = _body()
        found = space.run(str(body.get("run")))
        head = Head.parse(str(body.get("head")))
        found.check_head(head.stack, head.layer, head.head)
        spec = {"run": found.id, "head": str(head)}
        return {"job": space.queue.submit("dissect", f"dissect {head}", spec, SWEEP).id}

    @post("/archetypes")
    def start_archetypes() -> Any:
        body = _body()
        found = space.run(str(body.get("run")))
        embedding.square_maps(found, str(body.get("stack")))
        spec = {"run": found.id, "stack": str(body.get("stack"))}
        return {"job": space.queue.submit("archetypes", f"archetypes ({spec['stack']})", spec, SWEEP).id}

    @post("/job/<job>/cancel")
    def cancel(job: str) -> Any:
        return space.queue.cancel(check_id(job, "job")).summary()

    @get("/saved")
    def saved() -> Any:
        from dashboards.saved import listed

        return {"saved": listed(space)}

    @get("/saved/<name>")
    def saved_one(name: str) -> Any:
        from dashboards.saved import opened

        return opened(space, name)

    @post("/job/<job>/save")
    def save(job: str) -> Any:
        from dashboards.saved import save as keep

        return keep(space, space.queue.get(check_id(job, "job")))

    return api


def _answering(function: Any) -> Any:
    """JSON of what a function gives; an error as JSON with its cause, whatever it was."""

    @wraps(function)
    def answer(**arguments: Any) -> Any:
        try:
            found = function(**arguments)
        except PageError as error:
            return _json({"error": str(error)}, error.status)
        except HTTPException as error:
            words = "too large: at most 32 MB" if error.code == 413 else error.description
            return _json({"error": words or error.name}, error.code or 500)
        except (HeadError, KeyError, ValueError) as error:
            return _json({"error": explain(error)}, 400)
        except Exception as error:
            return _json({"error": explain(error)}, 500)
        return found if isinstance(found, Response) else _json(found)

    return answer


def _json(value: Any, status: int = 200) -> Response:
    text = json.dumps(_finite(value), allow_nan=False)
    return Response(text, status, mimetype="application/json", headers={"Cache-Control": "no-store"})


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    if isinstance(value, np.generic):
        return _finite(value.item())
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value


def _png(data: bytes) -> Response:
    return Response(data, mimetype="image/png", headers={"Cache-Control": FOREVER})


def _floats(values: Any) -> Response:
    data = np.ascontiguousarray(values, dtype="<f4").tobytes()
    return Response(data, mimetype="application/octet-stream", headers={"Cache-Control": FOREVER})


def _download(data: bytes, name: str, kind: str) -> Response:
    return Response(data, mimetype=kind, headers={"Content-Disposition": f'attachment; filename="{name}"'})


def _body() -> dict[str, Any]:
    found = request.get_json(silent=True)
    if not isinstance(found, dict):
        raise PageError("the request must be a JSON object", 415)
    return found


def _look() -> Look:
    return Look.parse(request.args.get("norm"), request.args.get("hide"))


def _number(name: str, default: int) -> int:
    text = request.args.get(name, "")
    if text and not text.lstrip("-").isdigit():
        raise PageError(f"{name} must be a whole number, got {text[:40]!r}")
    return int(text[:12]) if text else default


def _float(name: str, default: float) -> float:
    try:
        value = float(request.args.get(name) or default)
    except ValueError:
        value = float("nan")
    if not np.isfinite(value) or value <= 0:
        raise PageError(f"{name} must be a number above 0, got {request.args.get(name, '')[:40]!r}")
    return value


def _heads(text: str, stack: str) -> Heads:
    found = Heads(h for h in Heads.parse(text[:20_000]) if h.stack == stack)
    if not found:
        raise PageError(f"heads must name heads of {stack!r}, got {text[:60]!r}")
    return found


def _stream(space: Workspace, since: int) -> Any:
    yield f"id: {space.queue.epoch}-{since}\nevent: hello\ndata: {{}}\n\n"
    for entry in space.queue.events(since):
        yield (
            ": keep\n\n"
            if entry is None
            else f"id: {space.queue.epoch}-{entry[0]}\nevent: {entry[1]}\ndata: {entry[2]}\n\n"
        )
