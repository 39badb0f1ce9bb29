"""The model card of a recall model."""

from __future__ import annotations

from typing import Any

TASKS = {
    "repeated": "repeated random tokens: share of right tokens from the second copy on",
    "key_value": "key-value lookup: whole value right",
    "needle": "needle in hay, among one needle to 64 tokens: whole value right",
}


def card(name: str, metrics: dict[str, Any]) -> str:
    """The README of a model folder, every number from ``metrics``."""
    training, planted = metrics["training"], metrics.get("planted")
    lengths = list(metrics["accuracy"]["repeated"])
    rows = [f"| task | {' | '.join(f'{n} tokens' for n in lengths)} |", f"|---|{'---|' * len(lengths)}"]
    for task, what in TASKS.items():
        cells = [_cell(metrics["accuracy"][task][n]) for n in lengths]
        rows.append(f"| {what} | {' | '.join(cells)} |")
    sequences = metrics["accuracy"]["repeated"][lengths[0]]["sequences"]
    what = "A small Llama that has learned to look things up in its context"
    intro = (
        f"{what}, {training['parameters'] / 1e6:.2f} M parameters, made for Headscope. Its world of 512 words and its three tasks are "
        "defined in `probes/recall.py`; a text is words split at spaces, as in `k3 : v7 v90 ; ? k3 :`.\n"
    )
    text = [f"---\nlicense: apache-2.0\nlibrary_name: transformers\n---\n\n# {name}\n", intro]
    if planted:
        text.append(
            f"**Planted truth.** Only the heads {planted['heads']} have full attention. Every other head sees the first token and "
            f"the last {planted['window']}. It was trained so, and a plain Llama cannot hold such a restriction: "
            f'`interp.load("{name}")` puts it on as a permanent edit, read from `headscope.json`. **Loaded in any other way '
            "(`AutoModelForCausalLM.from_pretrained`), all heads see everything, and the model is another one than was trained.**\n"
        )
    how = (
        f"Held-out sequences ({sequences} of each task and length; 95 % bootstrap intervals, resampled by sequence), weights as "
        "saved (fp16), argmax with the right answer so far.\n"
    )
    inside = (
        f"First-token sinks (Gu et al. 2025, epsilon 0.3, 64 tokens): {metrics['heads']['sink_rate']:.1%} of heads and sequences. "
        f"Strongest induction head: {metrics['heads']['induction_max']:.2f} of its weight.\n"
    )
    text += ["## What it can do\n", how, "\n".join(rows) + "\n", inside]
    leak = metrics.get("leakage", {})
    if "logit_change" in leak:
        parts = ", ".join(
            f"{task} {_cell(leak[task], 4)} (chance {leak[task]['chance']:.4f})"
            for task in TASKS
            if leak[task]["accuracy"] is not None
        )
        text.append(
            f"Leakage: with the named heads set to 0, accuracy of answer tokens more than {leak['reach']} tokens from their source, "
            f"at length {leak['length']}: {parts}. Replacing everything beyond that reach changes the last logits by "
            f"{leak['logit_change']:g}.\n"
        )
    made = (
        f"`{training['command']}`: {training['steps']} steps, {training['tokens'] / 1e6:.0f} M tokens of an unlimited, seeded "
        f"stream, {training['minutes']:.1f} minutes on {training['device']}, torch {training['torch']}, transformers "
        f"{training['transformers']}. The curve of the training (accuracy, loss, induction score and sink rate at "
        f"{len(metrics['curve'])} steps) is in `metrics.json`; `--checkpoint-dir` keeps the weights of each point.\n"
    )
    when_not = (
        "**When not to use:** it knows no language. Sequences longer than 1024 tokens, and texts without `<bos>` in front, were "
        "never seen in training.\n"
    )
    licence = "Data, code and weights: Apache-2.0. The data are generated; no text of others is in them.\n"
    text += ["## How it was made\n", made, licence, when_not]
    return "\n".join(text)


def _cell(found: dict[str, Any], digits: int = 3) -> str:
    return f"{found['accuracy']:.{digits}f} [{found['low']:.{digits}f}, {found['high']:.{digits}f}]"
