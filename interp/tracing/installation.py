"""What is changed on a model while sessions are open on it, and what its attention calls then run through.

Attention modules point to their model's :class:`Installation`, which holds the stack of open sessions. The first session on a
model makes it and the last undoes it; that of a planted model (see :mod:`interp.models.base_edit`) stays for as long as the
model lives.
"""

from __future__ import annotations

import functools
import threading
import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from interp.attention import Edit, Gain, attend, combine, is_neutral
from interp.models.anatomy import Anatomy, Site
from interp.models.base_edit import HOLDS
from interp.models.module_walk import every
from interp.tracing import bridge_link, dispatch
from interp.tracing.call_arguments import decodes, site_call
from interp.tracing.calls import RunState, SiteCall
from interp.tracing.gains import scaled
from interp.tracing.lasting import Settled, settle
from interp.tracing.plant import Plant
from interp.tracing.recorder import Recorder
from interp.tracing.runs import begin_run, finish_generate, generation_options

if TYPE_CHECKING:
    from interp.tracing.session import Session

NO_CHUNK = (0, 0)
"""Rows and keys of earlier calls of a module forward, where nobody asks."""


class SessionError(RuntimeError):
    """A session that cannot be opened, or a result that is not there."""


# Weak: the hooks on a model hold its installation, and a planted model would otherwise never be freed.
INSTALLATIONS: weakref.WeakValueDictionary[int, Installation] = weakref.WeakValueDictionary()
LOCK = threading.RLock()


def install(module: nn.Module, shape: Anatomy, plant: Plant | None = None) -> Installation:
    installation = Installation(module, shape, plant)
    for sub in installation.modules:
        owner: Any = getattr(dispatch.handler_of(sub), "__self__", None)
        if getattr(owner, "plant", None) is not None:
            raise SessionError(
                f"model must be the whole model where it has a base edit ({owner.plant.edit}), got the {type(module).__name__} in it"
            )
    INSTALLATIONS[id(module)] = installation
    try:
        installation.put()
    except BaseException:
        installation.undo()
        INSTALLATIONS.pop(id(module), None)
        raise
    return installation


class Installation:
    """Everything that is changed on a model while sessions are open on it."""

    def __init__(self, module: nn.Module, shape: Anatomy, plant: Plant | None = None) -> None:
        self.module = module
        self.plant = plant
        self.sessions: list[Session] = []
        self.suspended = 0
        self.thread: int | None = None
        self.thread_name = ""
        self.sites: dict[int, Site] = {}
        self.modules: list[nn.Module] = []
        parts = _on_the_way(module, shape)
        for site in shape.sites:
            sub = parts[site.name]
            self.modules.append(sub)
            self.sites[id(sub)] = site
        self.configs = _configs(parts, shape)
        self.handles: list[Any] = []
        self.watched: list[Any] = []
        self.chunks: dict[int, list[int]] = {}
        self.active: dict[int, list[nn.Module]] = {}
        self.generating: set[int] = set()
        self.direct: dict[int, dict[int, Settled]] = {}
        self.known: set[int] = set()
        self._placed = False
        self._unlink: Callable[[], None] = lambda: None

    def unsettle(self) -> None:
        """What was settled for sites was settled for the sessions there were."""
        self.direct.clear()
        dispatch.stop_passing(self.sites)

    def held_by_this_thread(self) -> None:
        self.thread, self.thread_name = threading.get_ident(), threading.current_thread().name

    def close(self) -> None:
        """The last session has ended."""
        self.thread = None
        if self.plant is None:
            self.undo()
            INSTALLATIONS.pop(id(self.module), None)
        else:
            self._unwatch()

    def put(self) -> None:
        from transformers import PreTrainedModel

        disable: Any = torch.compiler.disable
        dispatch.install(self.modules, self.configs, self.handle)
        self._placed = True
        if self.plant is not None:
            weakref.finalize(self, dispatch.forget, [id(m) for m in self.modules], [id(c) for c in self.configs])
        for sub in every(self.module):
            if isinstance(sub, PreTrainedModel):
                self.known.add(id(sub))
                self.handles.append(sub.register_forward_pre_hook(disable(self._enter), with_kwargs=True, prepend=True))
                self.handles.append(sub.register_forward_hook(disable(self._leave), with_kwargs=True, always_call=True))
        if callable(getattr(self.module, "generate", None)):
            self._wrap_generate()
        self._unlink = bridge_link.link(self.module, self.sites.values(), self._enter, self._leave)

    def watch_sites(self) -> None:
        """Notice where a site begins whose rows and keys may come in several calls: for sessions that look at them.

        Positions of decoders come from the cache; a hook on each of their sites would cost a step as much as a small edit.
        """
        if not self.watched:
            towers = [sub for sub in self.modules if not decodes(self.sites[id(sub)])]
            self.watched = [sub.register_forward_pre_hook(self._site_hook()) for sub in towers]

    def _site_hook(self) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        disable: Any = torch.compiler.disable
        plain, uncompiled = self._site_begins, disable(self._site_begins)

        def hook(sub: nn.Module, args: tuple[Any, ...]) -> None:
            # The way around the compiler costs more than the rest, so it is taken under the compiler alone.
            (uncompiled if torch.compiler.is_compiling() else plain)(sub, args)

        return hook

    def undo(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        self._unwatch()
        self._unlink()
        if self._placed:
            dispatch.remove(self.modules, self.configs)
            self._placed = False
        mine: Any = vars(self.module).get("generate")
        if getattr(mine, "_interp_previous", None) is not None:
            previous = mine._interp_previous[0]
            del self.module.generate
            if previous is not None:
                self.module.generate = previous

    def _unwatch(self) -> None:
        for handle in self.watched:
            handle.remove()
        self.watched.clear()

    def _wrap_generate(self) -> None:
        previous = vars(self.module).get("generate")
        original: Any = self.module.generate

        @functools.wraps(original)
        def generate(*args: Any, **kwargs: Any) -> Any:
            me = threading.get_ident()
            if me in self.generating:
                return original(*args, **kwargs)
            args, kwargs, unpack = generation_options(self.module, args, kwargs)
            self.generating.add(me)
            self.active.pop(me, None)
            try:
                self._begin(args, kwargs, generating=True)
                self._start(me)
                kwargs = self._with_processors(me, kwargs)
                result = original(*args, **kwargs)
                self._finish(result)
                return unpack(result)
            finally:
                self.generating.discard(me)
                self.active.pop(me, None)
                self._drop()

        generate._interp_previous = (previous,)  # type: ignore[attr-defined]
        self.module.generate = generate  # type: ignore[assignment]

    def _enter(self, sub: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        me = threading.get_ident()
        stack = self.active.setdefault(me, [])
        if sub in stack:
            # A forward that Ctrl-C ended left its entry; a model does not call itself.
            del stack[stack.index(sub) :]
            if not stack and me not in self.generating:
                self._drop()
        stack.append(sub)
        if len(stack) > 1:
            return
        if self.plant is not None:
            self._require_plant(sub)
            self.plant.enter(me, sub, args, kwargs)
        if kwargs.get("output_attentions") or getattr(getattr(sub, "config", None), "output_attentions", False):
            warnings.warn(
                "output_attentions=True inside interp.hooked gives no maps for sites that are edited; "
                "use capture=interp.Capture(attention=True) and run.trace['text']['attention']",
                stacklevel=2,
            )
        fresh = me not in self.generating
        if fresh:
            self._begin(args, kwargs, generating=False, sub=sub)
        for session in self.sessions:
            found = session.runs.get(me)
            if found is not None:
                begin_run(found[0], sub, args, kwargs)
        if fresh:
            self._start(me)

    def _leave(self, sub: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        me = threading.get_ident()
        stack = self.active.get(me, [])
        if sub in stack:
            del stack[stack.index(sub) :]
        if not stack and self.plant is not None:
            self.plant.leave(me, result)
        if stack or me in self.generating:
            return
        # torch calls this with None when the forward raised.
        if result is not None:
            self._finish(result)
        self._drop()

    def _require_plant(self, sub: nn.Module) -> None:
        """A planted model runs with its base edit or not at all."""
        plant = cast(Plant, self.plant)
        if id(sub) not in self.known:
            raise SessionError(
                f"a copy of a planted model ({plant.edit}) is without its base edit: load it again instead"
            )
        other = [c._attn_implementation for c in self.configs if c._attn_implementation not in HOLDS]
        if other:
            raise SessionError(
                f"attention implementation must stay as interp.load set it on a planted model ({plant.edit}), got {other[0]!r}; "
                "pass attn_implementation= to interp.load"
            )

    def _site_begins(self, sub: nn.Module, args: tuple[Any, ...]) -> None:
        self.chunks[id(sub)] = [0, 0]

    def _begin(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], *, generating: bool, sub: nn.Module | None = None
    ) -> None:
        me = threading.get_ident()
        self._forget_ways(me)
        for session in list(self.sessions):
            run = RunState(sub or self.module, session.anatomy, {}, generating, session.tokenizer, root=self.module)
            run.given_prompt_length = None if generating else session.prompt_length
            recorder = None
            if session.selection is not None:
                recorder = Recorder(session.capture, session.selection, run, session.tokenizer)
            if generating:
                begin_run(run, self.module, args, kwargs, forward=False)
            session.end_run(me)
            session.runs[me] = (run, recorder)

    def _start(self, thread: int) -> None:
        for session in list(self.sessions):
            run, _ = session.runs[thread]
            for intervention in session.interventions:
                intervention.start(run)

    def _with_processors(self, thread: int, kwargs: dict[str, Any]) -> dict[str, Any]:
        ours = [
            processor
            for session in self.sessions
            for intervention in session.interventions
            for processor in intervention.logits_processors(session.runs[thread][0])
        ]
        if not ours:
            return kwargs
        from transformers import LogitsProcessorList

        return {**kwargs, "logits_processor": LogitsProcessorList([*(kwargs.get("logits_processor") or []), *ours])}

    def _finish(self, result: Any) -> None:
        me = threading.get_ident()
        for session in self.sessions:
            run, recorder = session.runs.get(me, (None, None))
            if run is None:
                continue
            run.keep(session.interventions, getattr(result, "past_key_values", None))
            if recorder is None:
                continue
            sequences = finish_generate(run, result) if run.generating else None
            attrs = {
                "interventions": [i.describe() for s in self.sessions for i in s.interventions],
                "model": _identity(session),
            }
            if self.plant is not None:
                attrs["base_edit"] = self.plant.edit.describe()
            session.keep(functools.partial(recorder.trace, sequences, attrs))

    def _drop(self) -> None:
        me = threading.get_ident()
        self._forget_ways(me)
        for session in self.sessions:
            session.end_run(me)

    def _forget_ways(self, thread: int) -> None:
        """What was settled for sites was settled for one run of a thread."""
        self.direct.pop(thread, None)
        dispatch.stop_passing(self.sites, thread)

    def handle(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
    ) -> tuple[Tensor, Any]:
        """One attention call of a site."""
        me, one_row = threading.get_ident(), query.shape[2] == 1
        direct = self.direct.get(me)
        if direct is not None and one_row:
            settled = direct.get(id(module))
            if settled is not None and settled.fits(query, key, attention_mask):
                return settled(module, query, key, value, attention_mask, options)
        site = self.sites[id(module)]
        alone = self.sessions[0] if len(self.sessions) == 1 and self.plant is None and one_row else None
        if alone is not None and (me not in alone.runs or alone.runs[me][1] is not None or not decodes(site)):
            alone = None
        if alone is not None:
            # Settled before sessions were suspended for a while, as text branches do at every token.
            settled = alone.runs[me][0].lasting.get(site.name)
            if settled is not None and settled.fits(query, key, attention_mask):
                self.direct.setdefault(me, {})[id(module)] = settled
                return settled(module, query, key, value, attention_mask, options)
        live = [(s, *s.runs[me]) for s in self.sessions if me in s.runs]
        planted = self.plant if self.plant is not None and self.plant.acts_on(site, me) else None
        if planted is None:
            for session, run, recorder in live:
                if recorder is not None or session.touches(site, run):
                    break
            else:
                for session, _, _ in live:
                    session.count(site, "untouched")
                self._advance(module, query, key)
                if alone is not None:
                    # Whether a session touches a site is settled for the whole of a run.
                    dispatch.pass_by(module, alone.entry(site))
                return dispatch.call_original(module, query, key, value, attention_mask, **options)
        chunk = NO_CHUNK if decodes(site) else self.chunks.setdefault(id(module), [0, 0])
        first = live[0][1] if live else cast(Plant, planted).run(me)
        call = site_call(site, first, module, query, key, value, attention_mask, options, chunk)
        self._advance(module, query, key)
        if planted is not None:
            call.mask = planted.mask(call, me)
        for session, run, _ in live:
            call.run = run
            for intervention in session.interventions:
                call.edits.append(intervention.before(call))
        edit = combine(*call.edits)
        if edit is not None and is_neutral(edit):
            edit = None
        if (edit is not None or planted is not None) and options.get("dropout"):
            raise SessionError(
                f"editing attention needs dropout 0, got {options['dropout']} at {site.name}: call model.eval()"
            )
        readers = [(s, r) for s, _, r in live if r is not None and r.wants(call)]
        z, second, lse = self._output(
            module, call, edit, attention_mask, options, live, bool(readers), planted is not None
        )
        for session, recorder in readers:
            backends = recorder.read(call, edit, session.backend, lse)
            session.count(site, "read" if not backends else f"read by {', '.join(sorted(backends))}")
        for session, run, _ in live:
            call.run = run
            for intervention in session.interventions:
                changed = intervention.after(call, z)
                if changed is not None:
                    if changed.shape != z.shape:
                        raise SessionError(
                            f"{type(intervention).__name__}.after must keep z's shape {tuple(z.shape)}, got {tuple(changed.shape)}"
                        )
                    z, second = changed.to(z.dtype), None
        for _, recorder in readers:
            recorder.keep_z(call, z)
        if alone is not None and call.generated:
            if site.name not in call.run.lasting:
                call.run.lasting[site.name] = settle(
                    call, alone.interventions, alone.backend, module, alone.entry(site)
                )
            if (settled := call.run.lasting[site.name]) is not None:
                self.direct.setdefault(me, {})[id(module)] = settled
        return z.contiguous(), second

    def _advance(self, module: nn.Module, query: Tensor, key: Tensor) -> None:
        """Count the rows and keys of a call: a packed tower calls its attention once a window or image."""
        chunk = self.chunks.get(id(module))
        if chunk is not None:
            chunk[0] += query.shape[2]
            chunk[1] += key.shape[2]

    def _output(
        self, module: nn.Module, call: SiteCall, edit: Edit | None, mask: Any, options: dict[str, Any], live: list[Any],
        read: bool, planted: bool,
    ) -> tuple[Tensor, Any, Tensor | None]:  # fmt: skip
        """z, the second result, and the log-sum-exp ``[B, H, Lq]`` where it will be read and came for free."""
        gains = [] if edit is None else edit.of(Gain)
        if not planted and (edit is None or len(gains) == len(edit.operations)):
            # Gains act on z alone, so the model's own function makes it and other heads stay bit-equal.
            lse = None
            if read and call.q.is_cuda:
                with dispatch.SeenLse() as seen:
                    z, second = dispatch.call_original(module, call.q, call.k, call.v, mask, **options)
                # What the model drops there (a softcap, sink logits, a bias) the readings have: then it is another softmax's.
                plain = call.softcap is None and call.sinks is None and call.bias is None
                lse = seen.lse if plain and call.mask.dense is None and call.mask.rule is None else None
            else:
                z, second = dispatch.call_original(module, call.q, call.k, call.v, mask, **options)
            for gain in gains:
                z = scaled(z, gain)
            for session, _, _ in live:
                session.count(call.site, "untouched" if edit is None else "gain")
            return z, second if edit is None else None, lse
        names = {s.backend for s, _, _ in live}
        backend = names.pop() if len(names) == 1 else "auto"
        out = attend(
            call.q, call.k, call.v, scale=call.scale, mask=call.mask, softcap=call.softcap, sinks=call.sinks, bias=call.bias,
            edit=edit, backend=backend,
        )  # fmt: skip
        for session, _, _ in live:
            session.count(call.site, f"{'planted' if edit is None else 'edited'} by {out.readings.backend}")
        return cast(Tensor, out.output), None, None


def _on_the_way(module: nn.Module, shape: Anatomy) -> dict[str, Any]:
    """The modules between the root and each site by path, both ends included: each looked up once, in order."""
    found: dict[str, Any] = {"": module}
    for site in shape.sites:
        walked, path = found[""], ""
        for part in site.name.split("."):
            path = f"{path}.{part}" if path else part
            if path not in found:
                found[path] = getattr(walked, part)
            walked = found[path]
    return found


def _configs(modules: Mapping[str, Any], shape: Anatomy) -> list[Any]:
    """Configs that the sites and the models around them read; masks are built from the latter."""
    from transformers import PreTrainedModel

    sites = {site.name for site in shape.sites}
    held = [
        getattr(m, "config", None) for path, m in modules.items() if path in sites or isinstance(m, PreTrainedModel)
    ]
    found = {id(config): config for config in held}
    return [config for config in found.values() if hasattr(config, "_attn_implementation_internal")]


def _identity(session: Session) -> dict[str, Any]:
    config: Any = session.module.config
    name = getattr(session.model, "name", None) or getattr(config, "_name_or_path", "") or type(session.module).__name__
    return {
        "name": str(name),
        "class": type(session.module).__name__,
        "revision": getattr(session.model, "revision", None),
    }
