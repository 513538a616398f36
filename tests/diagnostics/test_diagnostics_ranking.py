"""Laws of the ranking: how evidence may change the probabilities of causes, whatever the rules are."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from atft_pipeline.diagnostics import causes as cause_table
from atft_pipeline.diagnostics import posterior as ranking_module
from atft_pipeline.diagnostics.causes import BY_ID, CAUSES, HEALTHY, HEALTHY_PRIOR, PROVABLE, UNKNOWN, UNKNOWN_PRIOR
from atft_pipeline.diagnostics.posterior import (
    CAP,
    CONCLUSIVE,
    DEFECT_AGAINST_HEALTHY,
    MARGIN,
    NEVER_FINE,
    Counts,
    Ranking,
    learned,
    rank,
)
from atft_pipeline.diagnostics.probes.run import PROBES
from atft_pipeline.diagnostics.questions import Question
from atft_pipeline.diagnostics.rule import Finding, Rule, Severity, Status
from atft_pipeline.diagnostics.rule_table import RULES

NOTHING_LEARNED: Counts = {}
EQUALLY: Counts = {"a": dict.fromkeys((HEALTHY, "overfit", "underfit"), (10**9, 2 * 10**9))}
CLASSES = {cause.id for cause in CAUSES} | {HEALTHY, UNKNOWN}
PRIORS = {cause.id: cause.prior for cause in CAUSES} | {HEALTHY: HEALTHY_PRIOR, UNKNOWN: UNKNOWN_PRIOR}


def rule(id: str, *suspects: str, channel: str = "", severity: Severity = "explanation") -> Rule:
    return Rule(
        id=id,
        cause=id,
        group="curves",
        severity=severity,
        when=(),
        evidence="",
        next_step="",
        question=Question(""),
        channel=channel or id,
        suspects=suspects,
    )


def found(of: Rule, status: Status) -> Finding:
    return Finding(of.id, of.cause, of.group, of.severity, status, status == "fired", "", "", "", of.question.text)


def findings(rules: Sequence[Rule], statuses: Mapping[str, Status]) -> list[Finding]:
    return [found(one, statuses[one.id]) for one in rules if one.id in statuses]


def ranked(rules: Sequence[Rule], counts: Counts = NOTHING_LEARNED, **statuses: Status) -> Ranking:
    return rank(findings(rules, statuses), counts, rules)


def probabilities(ranking: Ranking) -> dict[str, float]:
    return {cause.id: cause.probability for cause in ranking.causes} | {
        HEALTHY: ranking.healthy,
        UNKNOWN: ranking.unknown,
    }


def random_statuses(seed: int, *, fired: float = 0.1) -> dict[str, Status]:
    rng = random.Random(seed)
    draw: list[Status] = ["fired", "not_fired", "not_assessable"]
    return {one.id: rng.choices(draw, [fired, 0.7, 0.3])[0] for one in RULES}


# Probabilities ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("fired", [0.0, 0.03, 0.5])
def test_probabilities_of_all_classes_sum_to_one(seed: int, fired: float) -> None:
    ranking = rank(findings(RULES, random_statuses(seed, fired=fired)))
    assert sum(probabilities(ranking).values()) == pytest.approx(1.0)
    assert all(0.0 <= p <= 1.0 for p in probabilities(ranking).values())


def test_without_findings_the_prior_stands() -> None:
    total = sum(PRIORS.values())
    expected = {name: prior / total for name, prior in PRIORS.items()}
    assert probabilities(rank([], NOTHING_LEARNED)) == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(4))
def test_rules_that_could_not_be_assessed_change_nothing(seed: int) -> None:
    statuses = random_statuses(seed)
    assessed = {name: status for name, status in statuses.items() if status != "not_assessable"}
    assert len(assessed) < len(statuses)
    with_them, without = (rank(findings(RULES, given)) for given in (statuses, assessed))
    assert probabilities(with_them) == pytest.approx(probabilities(without))


@pytest.mark.parametrize("seed", range(4))
def test_order_of_rules_and_findings_changes_nothing(seed: int) -> None:
    given = findings(RULES, random_statuses(seed))
    rng = random.Random(seed)
    shuffled = rank(rng.sample(given, len(given)), rules=rng.sample(RULES, len(RULES)))
    straight = rank(given)
    assert probabilities(shuffled) == pytest.approx(probabilities(straight))
    assert (shuffled.conclusion, set(shuffled.missing)) == (straight.conclusion, set(straight.missing))


def test_fired_rule_speaks_for_its_suspects_and_a_quiet_one_against_them() -> None:
    rules = [rule("a", "overfit", "underfit")]
    prior = probabilities(rank([], NOTHING_LEARNED, rules))
    fired, quiet = probabilities(ranked(rules, a="fired")), probabilities(ranked(rules, a="not_fired"))
    for suspect in ("overfit", "underfit"):
        assert fired[suspect] / fired[HEALTHY] > prior[suspect] / prior[HEALTHY] > quiet[suspect] / quiet[HEALTHY]
    assert fired["overfit"] > fired["underfit"]
    assert fired["no_signal"] / fired[HEALTHY] == pytest.approx(prior["no_signal"] / prior[HEALTHY])


def test_rule_without_suspects_tells_sick_from_healthy_and_no_cause_from_another() -> None:
    rules = [rule("a")]
    counts = {"a": {HEALTHY: (0, 50), "overfit": (20, 20), "underfit": (0, 20)}}
    before, after = probabilities(rank([], NOTHING_LEARNED, rules)), probabilities(ranked(rules, counts, a="fired"))
    assert after[HEALTHY] < before[HEALTHY]
    assert after["overfit"] / after["underfit"] == pytest.approx(before["overfit"] / before["underfit"])


# Channels and the cap --------------------------------------------------------------------------------------------


def test_of_one_channel_the_strongest_rule_alone_counts() -> None:
    strong, weak = rule("strong", "overfit", channel="c"), rule("weak", "overfit", channel="c")
    counts = {
        "strong": {"overfit": (10, 20), HEALTHY: (10, 100)},
        "weak": {"overfit": (6, 20), HEALTHY: (10, 100)},
    }
    alone = probabilities(ranked([strong], counts, strong="fired"))
    both = probabilities(ranked([strong, weak], counts, strong="fired", weak="fired"))
    apart = probabilities(ranked([strong, replace(weak, channel="d")], counts, strong="fired", weak="fired"))
    assert both["overfit"] / both[HEALTHY] == pytest.approx(alone["overfit"] / alone[HEALTHY])
    assert apart["overfit"] / apart[HEALTHY] > 1.5 * both["overfit"] / both[HEALTHY]


def test_rules_of_two_channels_add_up() -> None:
    first, second = rule("first", "overfit"), rule("second", "overfit")
    alone = probabilities(ranked([first], first="fired"))
    both = probabilities(ranked([first, second], first="fired", second="fired"))
    assert both["overfit"] / both[HEALTHY] > 5 * alone["overfit"] / alone[HEALTHY]


@pytest.mark.parametrize(("status", "sign"), [("fired", 1), ("not_fired", -1)])
def test_one_channel_is_worth_no_more_than_the_cap(status: Status, sign: int) -> None:
    """A thousand planted runs, in all of which the rule fired, and a thousand healthy ones."""
    rates = [(1000, 1000), (0, 1000)]
    counts = {"a": dict(zip(("overfit", HEALTHY), rates, strict=True))}
    after = probabilities(ranked([rule("a", "overfit")], counts, a=status))
    odds = after["overfit"] / after[HEALTHY]
    assert math.log(odds * HEALTHY_PRIOR / BY_ID["overfit"].prior) == pytest.approx(sign * CAP)


def test_what_planted_runs_did_corrects_what_the_table_expects() -> None:
    rules = [rule("a", "overfit"), rule("another witness", "overfit")]
    often, never = (
        probabilities(ranked(rules, {"a": {"overfit": (fired, 20), HEALTHY: (1, 50)}}, a="fired"))["overfit"]
        for fired in (20, 0)
    )
    expected = probabilities(ranked(rules, a="fired"))["overfit"]
    assert never < BY_ID["overfit"].prior / sum(PRIORS.values()) * 4
    assert never < expected
    assert never < often


def test_only_rule_that_speaks_for_a_cause_is_expected_to_fire_more_often_than_one_of_several() -> None:
    """As the given rules have it, whatever the whole table has."""
    first, second = rule("first", "overfit"), rule("second", "overfit")
    alone, of_two = (probabilities(ranked(rules, first="not_fired")) for rules in ([first], [first, second]))
    assert alone["overfit"] < of_two["overfit"]


@pytest.mark.parametrize(("severity", "conclusion"), [("defect", "inconclusive"), ("explanation", "healthy")])
def test_no_run_is_called_healthy_while_a_defect_stands(severity: Severity, conclusion: str) -> None:
    """Though every other rule is quiet, and it fired in most of the healthy runs that it was fitted on."""
    odd = rule("odd", severity=severity)
    all_quiet: dict[str, Status] = dict.fromkeys((one.id for one in RULES), "not_fired")
    counts = {"odd": {HEALTHY: (18, 20), "overfit": (2, 20)}}
    ranking = ranked([*RULES, odd], counts, **all_quiet, odd="fired")
    assert ranking.healthy > CONCLUSIVE
    assert (ranking.conclusion, "odd fired" in ranking.sentence) == (conclusion, conclusion == "inconclusive")
    assert ranked([*RULES, odd], counts, **all_quiet, odd="not_fired").conclusion == "healthy"


def test_a_defect_weighs_against_health_beyond_what_it_says_of_a_cause() -> None:
    odds = []
    for severity in ("defect", "observation"):
        found = probabilities(ranked([rule("a", "overfit", severity=severity)], EQUALLY, a="fired"))
        odds.append(found["overfit"] / found[HEALTHY])
    assert odds[0] / odds[1] == pytest.approx(math.exp(DEFECT_AGAINST_HEALTHY))


def test_in_a_channel_what_speaks_of_a_cause_comes_before_what_other_runs_did() -> None:
    """Ridge finds a signal: the rule that asks for none is quiet, and no loud rule of its channel makes up for it."""
    nothing, more = rule("nothing", "no_signal", channel="ridge"), rule("more", "underfit", channel="ridge")
    counts = {
        "nothing": {"no_signal": (19, 20), HEALTHY: (2, 100)},
        "more": {"overfit": (15, 20), "underfit": (18, 20), HEALTHY: (2, 100)},
    }
    before = probabilities(rank([], counts, [nothing, more]))
    after = probabilities(ranked([nothing, more], counts, nothing="not_fired", more="fired"))
    assert after["no_signal"] / after[HEALTHY] < before["no_signal"] / before[HEALTHY]
    assert after["underfit"] / after[HEALTHY] > before["underfit"] / before[HEALTHY]


def test_an_observation_speaks_of_its_suspects_alone() -> None:
    """That a market lacks something says nothing of the runs that happened to be made on it."""
    seen = rule("seen", "survivorship", severity="observation")
    counts = {"seen": {"overfit": (20, 20), "survivorship": (20, 20), HEALTHY: (5, 100)}}
    before, after = probabilities(rank([], counts, [seen])), probabilities(ranked([seen], counts, seen="fired"))
    assert after["overfit"] / after[HEALTHY] == pytest.approx(before["overfit"] / before[HEALTHY])
    assert after["survivorship"] / after[HEALTHY] > before["survivorship"] / before[HEALTHY]


def test_evidence_of_a_cause_is_of_rules_that_name_it() -> None:
    """That another fires in many sick runs is no evidence for this one."""
    named, common = rule("named", "overfit"), rule("common", "underfit")
    counts = {"common": {"no_signal": (20, 20), HEALTHY: (0, 100)}}
    evidence = {c.id: c.evidence for c in ranked([named, common], counts, named="fired", common="fired").causes}
    assert (evidence["overfit"], evidence["underfit"], evidence["no_signal"]) == (("named",), ("common",), ())


@pytest.mark.parametrize(("suspect", "conclusion"), [("look_ahead_in_feature", "inconclusive"), ("overfit", "cause")])
def test_while_a_root_rule_stands_none_but_its_suspects_is_named(suspect: str, conclusion: str) -> None:
    root = replace(rule("root", suspect), root=True)
    witnesses = [rule(f"witness {number}", "overfit") for number in range(4)]
    counts = {one.id: {"overfit": (50, 50), HEALTHY: (0, 500)} for one in witnesses}
    statuses: dict[str, Status] = dict.fromkeys((one.id for one in (root, *witnesses)), "fired")
    ranking = ranked([root, *witnesses], counts, **statuses)
    assert (ranking.conclusion, ranking.causes[0].id) == (conclusion, "overfit")
    assert ("root fired" in ranking.sentence) == (conclusion == "inconclusive")
    free = ranked([replace(root, root=False), *witnesses], counts, **statuses)
    odds = [found["overfit"] / found[UNKNOWN] for found in map(probabilities, (ranking, free))]
    assert odds[0] / odds[1] == pytest.approx(1.0 if suspect == "overfit" else math.exp(-CAP), rel=1e-6)


def test_an_unknown_fault_brings_no_root_rule_about() -> None:
    plain, root = (replace(rule("a", "overfit"), root=root) for root in (False, True))
    counts = {"a": {HEALTHY: (0, 500), "underfit": (0, 500)}}
    odds = [
        found[UNKNOWN] / found[HEALTHY]
        for found in (probabilities(ranked([one], counts, a="fired")) for one in (plain, root))
    ]
    assert odds[0] > 10 * UNKNOWN_PRIOR / HEALTHY_PRIOR
    assert odds[1] == pytest.approx(UNKNOWN_PRIOR / HEALTHY_PRIOR)


# The veto --------------------------------------------------------------------------------------------------------


def test_proven_false_report_vetoes_every_other_cause() -> None:
    false, loud = rule("false", "wrong_split", severity="invalid"), rule("loud", "overfit")
    ranking = ranked([false, loud], false="fired", loud="fired")
    assert {cause.group for cause in ranking.causes} == set(PROVABLE)
    assert ranking.healthy == 0.0
    assert ranking.causes[0].id == "wrong_split"
    assert sum(probabilities(ranking).values()) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("other", "status"),
    [
        (rule("a", "wrong_split", severity="invalid"), "not_fired"),
        (rule("a", "wrong_split", severity="invalid"), "not_assessable"),
        (rule("a", "wrong_split", severity="defect"), "fired"),
        (rule("a", "predictions_collapse", "unrankable_scores_ranked", severity="invalid"), "fired"),
        (rule("a", severity="invalid"), "fired"),
    ],
    ids=["quiet", "not assessable", "no proof", "of a training cause", "without suspects"],
)
def test_nothing_else_vetoes(other: Rule, status: Status) -> None:
    assert set(probabilities(ranked([other], a=status))) == CLASSES
    assert ranked([other], a=status).healthy > 0.0


# Conclusions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(30))
def test_nothing_is_concluded_under_one_half_or_three_to_one(seed: int) -> None:
    statuses = random_statuses(seed, fired=0.004 * seed)
    ranking = rank(findings(RULES, statuses))
    (first, best), (_, second) = sorted(probabilities(ranking).items(), key=lambda pair: -pair[1])[:2]
    kinds = {HEALTHY: "healthy", UNKNOWN: "unknown"}
    defects = [one for one in RULES if one.severity in NEVER_FINE and statuses[one.id] == "fired"]
    decided = best >= CONCLUSIVE and best >= MARGIN * second and not (first == HEALTHY and defects)
    assert ranking.conclusion == (kinds.get(first, "cause") if decided else "inconclusive")


def test_prior_concludes_nothing_though_healthy_leads_by_far() -> None:
    ranking = rank([], NOTHING_LEARNED)
    assert MARGIN * max(ranking.unknown, ranking.causes[0].probability) < ranking.healthy < CONCLUSIVE
    assert ranking.conclusion == "inconclusive"


def test_odds_under_three_to_one_are_inconclusive_above_one_half(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two classes share everything: 60 % and 40 %, then 80 % and 20 %."""
    monkeypatch.setattr(ranking_module, "CAUSES", (BY_ID["overfit"],))
    monkeypatch.setattr(ranking_module, "UNKNOWN_PRIOR", 1e-12)
    for healthy, conclusion in ((1.5, "inconclusive"), (4.0, "healthy"), (0.25, "cause")):
        monkeypatch.setattr(ranking_module, "HEALTHY_PRIOR", healthy)
        assert rank([], NOTHING_LEARNED, []).conclusion == conclusion


def test_quiet_run_is_called_healthy_and_a_loud_one_by_its_cause() -> None:
    quiet = rank(findings(RULES, dict.fromkeys((one.id for one in RULES), "not_fired")), NOTHING_LEARNED)
    assert quiet.conclusion == "healthy"
    assert "Nothing is wrong" in quiet.sentence
    rules = [rule("a", "no_signal"), rule("b", "no_signal"), rule("c", "no_signal")]
    loud = ranked(rules, a="fired", b="fired", c="fired")
    assert loud.conclusion == "cause"
    assert BY_ID["no_signal"].name in loud.sentence
    assert set(loud.causes[0].evidence) == {"a", "b", "c"}


def test_something_that_fits_no_cause_is_unknown() -> None:
    """Rules that no one is suspected of, which fire in no healthy run."""
    names = [f"r{i}" for i in range(6)]
    counts = {name: {HEALTHY: (0, 100), **{cause.id: (0, 100) for cause in CAUSES}} for name in names}
    ranking = ranked([rule(name) for name in names], counts, **dict.fromkeys(names, "fired"))
    assert ranking.conclusion == "unknown"
    assert "no known cause" in ranking.sentence


def test_inconclusive_ranking_names_what_would_decide() -> None:
    heard, blind, elsewhere = rule("heard", "overfit"), rule("blind", "overfit"), rule("elsewhere", "starved_loader")
    ranking = ranked([heard, blind, elsewhere], heard="fired", blind="not_assessable", elsewhere="not_assessable")
    assert ranking.conclusion == "inconclusive"
    assert ranking.missing == ("blind",)
    assert ranking.sentence.endswith("not measured, and it would decide: blind.")


# Tables ----------------------------------------------------------------------------------------------------------


def test_every_suspect_is_a_cause_and_every_cause_has_a_rule_that_speaks_for_it() -> None:
    suspects = {suspect for one in RULES for suspect in one.suspects}
    assert suspects <= set(BY_ID)
    assert set(BY_ID) <= suspects
    assert len(BY_ID) == len(CAUSES)


def test_every_cause_is_the_first_suspect_of_a_rule() -> None:
    """What is only ever suspected beside others can never lead on its own evidence."""
    assert {one.suspects[0] for one in RULES if one.suspects} == set(BY_ID)


def test_every_cause_names_a_probe_that_exists() -> None:
    assert {cause.probe for cause in CAUSES} <= {*PROBES, "remedy"}


def test_healthy_is_about_as_likely_as_all_causes_together() -> None:
    together = sum(cause.prior for cause in CAUSES)
    assert 0.5 < cause_table.HEALTHY_PRIOR / together < 2.0


def test_learned_likelihoods_are_of_known_rules_and_classes() -> None:
    path = Path(ranking_module.__file__).with_name("likelihoods.json")
    counts = json.loads(path.read_text())["rules"]
    assert set(counts) <= {one.id for one in RULES}
    assert {name for by_class in counts.values() for name in by_class} <= CLASSES
    for by_class in counts.values():
        for fired, assessed in by_class.values():
            assert 0 <= fired <= assessed
    assert learned() == counts
