"""Every remedy does what it says, on every preset: presets differ by factors of a hundred."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest

from atft_pipeline.config.overrides import leaves, to_dict, with_overrides
from atft_pipeline.config.presets import PRESETS
from atft_pipeline.diagnostics.causes import REMEDIES
from atft_pipeline.diagnostics.changes import Change, lowered, plan_changes, raised, switched, text_of, values_of
from atft_pipeline.diagnostics.experiments.plan import EXPERIMENTS
from atft_pipeline.diagnostics.rule import Rule
from atft_pipeline.diagnostics.rule_table import RULES

ASKED: dict[str, tuple[Change, ...]] = (
    {f"rule {rule.id}": rule.changes for rule in RULES if rule.changes}
    | {f"probe {cause}": changes for cause, changes in REMEDIES.items()}
    | {f"experiment {experiment.id}": experiment.changes for experiment in EXPERIMENTS}
)
SAID = re.compile(r"(raise|lower|set) `([\w.]+)` from (\S+) to (\S+)$")


def of_preset(name: str) -> dict[str, Any]:
    return leaves(to_dict(PRESETS[name]()))


def has_arrived(change: Change, old: Any) -> bool:
    """Whether the run has by itself what the change is for, so that nothing is left to do."""
    if change.verb == "set":
        return bool(old == change.to)
    return bool(old >= change.at_most if change.verb == "raise" else old <= max(change.at_least, 0))


def check(changes: Sequence[Change], name: str) -> None:
    values = of_preset(name)
    settings = plan_changes(changes, values)
    moved = {}
    for sentence in settings.made:
        said = SAID.fullmatch(sentence)
        assert said, sentence
        verb, field, old, new = said.groups()
        before, after = values[field], settings.overrides[field]
        assert (text_of(before), text_of(after)) == (old, new)
        assert after != before
        assert verb == "set" or (after > before) == (verb == "raise")
        moved[field] = verb
    assert set(settings.overrides) == set(moved)
    with_overrides(PRESETS[name](), settings.overrides)
    for change in changes:
        to_zero = change.times == 0 and change.at_least < 0
        relative = change.times > 1 if change.verb == "raise" else 0 < change.times < 1 or to_zero
        assert change.verb == "set" or relative, f"{change}: the value does not follow from the run's own"
        applies = change.only_if is None or values[change.only_if[0]] == change.only_if[1]
        assert moved.get(change.field) == change.verb or not applies or has_arrived(change, values[change.field]), (
            f"{change} does not {change.verb} {values[change.field]} of preset {name}: {settings.left_out}"
        )
    assert settings.made or settings.left_out


def check_on_every_preset(change: Change) -> None:
    for name in PRESETS:
        check([change], name)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("asked", ASKED)
def test_a_remedy_moves_the_setting_the_way_it_says_on_every_preset(asked: str, name: str) -> None:
    check(ASKED[asked], name)


@pytest.mark.parametrize(
    "absolute",
    [
        Change("train.optimizer.weight_decay", "raise", 0.0, at_least=0.1),
        Change("train.optimizer.lr", "lower", 0.0, at_least=1e-3),
        Change("train.optimizer.lr", "raise", 0.0, at_least=1e-3),
    ],
    ids=str,
)
def test_a_remedy_with_a_fixed_value_fails_the_test_above(absolute: Change) -> None:
    """Weight decay 0.1 cuts that of `cpu` twentyfold; a rate of 1e-3 raises `quick`'s and lowers `cpu`'s."""
    with pytest.raises(AssertionError):
        check_on_every_preset(absolute)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.id)
def test_a_next_step_names_no_value_of_a_setting(rule: Rule) -> None:
    """What is written into the sentence would be the same for every run."""
    assert "--set" not in rule.next_step
    assert not re.search(r"\w+\.\w+=[\d.]", rule.next_step)


def test_what_would_change_nothing_is_left_out_and_said() -> None:
    values = of_preset("quick")
    settings = plan_changes(
        [raised("model.dropout", 2, at_most=0.1), lowered("train.loss.sharpe", 0), switched("model.graph", True)],
        values,
    )
    assert settings.overrides == {}
    assert settings.sentence == (
        "`model.dropout` is 0.1 already, `train.loss.sharpe` is 0.0 already, `model.graph` is true already"
    )


def test_what_the_configuration_refuses_is_left_out_and_said() -> None:
    settings = plan_changes([raised("split.train_fraction", 1.5)], of_preset("quick"))
    assert settings.overrides == {}
    assert "is refused (split: train_fraction and validation_fraction must" in settings.sentence


def test_a_change_that_another_choice_makes_idle_is_left_out() -> None:
    sessions, fraction = (raised(f"split.validation_{name}", 1.5, only_if=("split.scheme", scheme))
                          for name, scheme in (("sessions", "sessions"), ("fraction", "fraction")))  # fmt: skip
    assert plan_changes([sessions, fraction], of_preset("quick")).overrides == {"split.validation_fraction": 0.3}
    assert plan_changes([sessions, fraction], of_preset("cpu")).overrides == {"split.validation_sessions": 375}
    assert "counts only where `split.scheme` is sessions" in plan_changes([sessions], of_preset("quick")).sentence


def test_the_weight_of_a_loss_term_is_what_its_phases_make_it() -> None:
    """A phase hides the base weight: relative to that one, a heavier term would be a lighter one."""
    values = of_preset("quick") | {
        "train.loss.phases": [{"first_epoch": 1, "last_epoch": 9, "weights": {"sharpe": 0.5}}]
    }
    settings = plan_changes([raised("train.loss.sharpe", 3, at_least=0.3)], values)
    assert settings.made == ("raise `train.loss.sharpe` from 0.5 to 1.5",)
    config = with_overrides(PRESETS["quick"](), settings.overrides)
    assert config.train.loss.weights_at(1)["sharpe"] == 1.5
    assert config.train.loss.weights_at(20)["sharpe"] == 0.0, "epochs without the term stay without it"


def test_each_phase_moves_from_its_own_weight() -> None:
    """Relative to the largest weight alone, a tenth of it would be a rise elsewhere."""
    phases = [{"first_epoch": first, "last_epoch": first + 4, "weights": {"variance_penalty": weight}}
              for first, weight in ((1, 5.0), (6, 0.1))]  # fmt: skip
    values = of_preset("production") | {"train.loss.variance_penalty": 0.01, "train.loss.phases": phases}
    settings = plan_changes([lowered("train.loss.variance_penalty", 0.1)], values)
    loss = with_overrides(PRESETS["production"](), settings.overrides).train.loss
    assert [loss.weights_at(epoch)["variance_penalty"] for epoch in (1, 6, 20)] == [0.5, 0.01, 0.001]


@pytest.mark.parametrize("strange", [None, "x", True, [1], float("nan")], ids=repr)
def test_a_setting_that_is_none_counts_as_the_default(strange: object) -> None:
    class Stored:
        def config(self, field: str) -> object:
            return strange if field == "train.optimizer.lr" else None

    assert values_of(Stored())["train.optimizer.lr"] == 1e-3  # type: ignore[arg-type]


def test_a_bound_never_turns_a_change_around() -> None:
    values = of_preset("quick") | {"train.optimizer.lr": 1e-4, "model.dropout": 0.7}
    settings = plan_changes(
        [lowered("train.optimizer.lr", 0.1, at_least=1e-3), raised("model.dropout", 2, at_most=0.5)], values
    )
    assert settings.overrides == {}
    assert settings.sentence == "`train.optimizer.lr` is 0.0001 already, `model.dropout` is 0.7 already"
