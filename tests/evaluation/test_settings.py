"""Settings as text: what is read, what is refused, and which heads a control takes."""

from __future__ import annotations

from typing import Any

import pytest

from interp.evaluation import VCD, DoLa, SettingError, parse_setting, random_control
from interp.evaluation.settings import Setting, other_heads, unique
from interp.heads import Heads
from interp.interventions import VAR, VHR, Knockout, MaskHeads
from interp.models.anatomy import anatomy


def test_methods_compose_with_their_arguments() -> None:
    found = parse_setting("VHR(alpha=2)+VAR(p=.6, tau_unit='width') + beam=5")
    vhr, var = found.interventions
    assert isinstance(vhr, VHR) and vhr.alpha == 2
    assert isinstance(var, VAR) and (var.p, var.tau_unit) == (0.6, "width")
    assert found.beams == 5 and found.random is None and not found.plain


def test_bare_words_are_texts_and_a_plus_within_brackets_is_no_joint() -> None:
    (mask,) = parse_setting("MaskHeads(L3H1, kind=uniform)").interventions
    assert isinstance(mask, MaskHeads) and str(mask.heads) == "L3H1" and mask.kind == "uniform"
    (several,) = parse_setting('MaskHeads("L3H1,L5H0-2")').interventions
    assert isinstance(several, MaskHeads) and len(several.heads) == 4
    (blocked,) = parse_setting("Knockout(image, question, layers=[0, +1])").interventions
    assert isinstance(blocked, Knockout) and blocked.layers == (0, 1)
    assert isinstance(parse_setting("DoLa").interventions[0], DoLa)
    assert parse_setting("VCD(.5, step=300)").interventions[0].describe() == VCD(0.5, step=300).describe()
    assert parse_setting("greedy").plain and parse_setting("plain").key == Setting("x").key


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("VHR(alpha=-1)", "alpha must be"),
        ("VHR(strength=2)", "strength"),
        ("VRH(2)", "near: VHR"),
        ("VHR(2", "must be such as"),
        ("VHR(2)++VAR", "must be such as"),
        ("", "must be such as"),
        ("greedy+VHR(2)", "stand alone"),
        ("beam=0", "beam=N"),
        ("beams=5", "beam=N"),
        ("beam=2+beam=3", "given once"),
        ("random=x", "random=SEED"),
        ("MaskHeads(L3H1-4)", "literals"),
        ("VHR(alpha=open('x'))", "literals"),
        ("__import__('os').system('true')", "such as VHR"),
        ("VHR(**{'alpha': 2})", "such as VHR"),
        ("(lambda: 1)()", "such as VHR"),
        ("MaskHeads(nonsense)", "nonsense"),
        ("[" * 500, "such as"),
    ],
)
def test_what_cannot_be_read_is_named(text: str, words: str) -> None:
    with pytest.raises(SettingError, match=words.replace("(", r"\(")):
        parse_setting(text)


def test_nothing_is_run_while_reading(tmp_path: Any) -> None:
    file = tmp_path / "made"
    with pytest.raises(SettingError):
        parse_setting(f"VHR(alpha=open({str(file)!r}, 'w'))")
    assert not file.exists()


def test_a_key_follows_what_is_done_not_the_name() -> None:
    assert parse_setting("VHR()").key == parse_setting("VHR(alpha=2.0)").key
    keys = {
        parse_setting(t).key
        for t in ("VHR", "VHR(3)", "VHR+beam=2", "VCD", "VCD(seed=1)", "DoLa", "DoLa('high')", "greedy")
    }
    assert len(keys) == 8
    first, second = unique([parse_setting("VHR"), parse_setting("VHR(2)")])
    assert first.plain and second.name == "VHR"
    with pytest.raises(SettingError, match="one setting"):
        unique([Setting("a", (VHR(2),)), Setting("a", (VHR(3),))])


def test_a_control_takes_other_heads_of_the_same_layers(tiny: Any) -> None:
    shape = anatomy(tiny.module)
    given = Heads.parse("L1H0,L1H2,L3H3")
    draws = {str(other_heads(given, shape, seed)) for seed in range(30)}
    for text in draws:
        drawn = Heads.parse(text)
        assert sorted(h.layer for h in drawn) == [1, 1, 3] and not (given & drawn)
    assert len(draws) == 3, "L1 has one pair of others, L3 three heads"
    control = random_control(parse_setting('MaskHeads("L1H0,L1H2")+VHR'), 0)
    mask, vhr = control.on(shape)
    assert isinstance(mask, MaskHeads) and str(mask.heads) == "L1H1,L1H3" and isinstance(vhr, VHR)
    with pytest.raises(SettingError, match="needs a method with heads"):
        random_control(parse_setting("VHR"), 0)
    with pytest.raises(SettingError, match="others than the 3 chosen"):
        random_control(parse_setting('MaskHeads("L1H0-2")'), 0).on(shape)
