"""An attribution as tables: one column per split, "not assessable" where an input is missing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from atft_pipeline.diagnostics.report.markdown import NOT_MEASURED
from atft_pipeline.inspection.attribution import (
    PARTICIPATIONS,
    TURNOVER_WINDOW_SESSIONS,
    Attribution,
    Bucket,
    Capacity,
    Estimate,
    MarketExposure,
    Missing,
    SectorExposure,
    SectorWeight,
    SizeTilt,
)

Attributions = Mapping[str, Attribution | Missing]
Rows = list[dict[str, str]]

NOT_ASSESSABLE = "not assessable"


def attribution_tables(attributions: Attributions) -> dict[str, Rows]:
    """Title -> rows with equal keys. A table has no rows where its input is missing in every split."""
    return {
        "Costs and turnover": _costs(attributions),
        "Sharpe by year, gross": _periods(attributions, lambda a: a.by_year),
        "Sharpe by month, gross": _periods(attributions, lambda a: a.by_month),
        "Capacity by liquidity": _capacity(attributions),
        "Exposures": _exposures(attributions),
        "Net weight by sector": _sectors(attributions),
    }


def not_assessable(attributions: Attributions) -> list[str]:
    """What is missing, in which splits, and why; one line per reason."""
    splits_by_reason: dict[str, list[str]] = {}
    for split, attribution in attributions.items():
        if isinstance(attribution, Missing):
            splits_by_reason.setdefault(attribution.reason, []).append(split)
            continue
        for name in ("market", "sectors", "size", "capacity"):
            part = getattr(attribution, name)
            if isinstance(part, Missing):
                splits_by_reason.setdefault(part.reason, []).append(f"{name} ({split})")
            elif isinstance(part, Capacity) and part.unknown:
                reason = f"{part.unknown} trades in names without a known turnover value are in no bucket"
                splits_by_reason.setdefault(reason, []).append(f"capacity ({split})")
    return [f"{', '.join(where)}: {reason}" for reason, where in splits_by_reason.items()]


def _costs(attributions: Attributions) -> Rows:
    bps = next((list(a.costs) for a in attributions.values() if isinstance(a, Attribution)), [])
    rows = [
        _by_split(
            "daily Sharpe, gross" if cost == 0 else f"daily Sharpe, net of {cost:g} bps", attributions, pick(cost)
        )
        for cost in bps
    ]
    if bps:
        turnover = "turnover a session (4 reverses both legs)"
        rows.append(_by_split(turnover, attributions, lambda a: _estimate(a.turnover)))
    return rows


def pick(cost: float) -> Callable[[Attribution], str]:
    return lambda attribution: _estimate(attribution.costs[cost])


def _periods(attributions: Attributions, periods: Callable[[Attribution], Mapping[str, Estimate]]) -> Rows:
    by_period = {split: {} if isinstance(a, Missing) else periods(a) for split, a in attributions.items()}
    names = sorted({name for of_split in by_period.values() for name in of_split})
    return [
        {"period": name}
        | {split: _sessions(of_split.get(name), attributions[split]) for split, of_split in by_period.items()}
        for name in names
    ]


def _sessions(estimate: Estimate | None, attribution: Attribution | Missing) -> str:
    if isinstance(attribution, Missing):
        return NOT_ASSESSABLE
    return "outside the split" if estimate is None else f"{_estimate(estimate)} ({estimate.sessions} sessions)"


def _capacity(attributions: Attributions) -> Rows:
    return [
        {
            "split": split,
            "traded names, least liquid first": bucket.name,
            "trades": str(bucket.trades),
            f"median {TURNOVER_WINDOW_SESSIONS}-session turnover value": money(bucket.median_turnover_value),
            "share of it per million of capital": f"{100 * bucket.share_per_million:.3g} %",
            **{f"capital at {100 * p:g} %": money(bucket.capital_at[p]) for p in PARTICIPATIONS},
        }
        for split, bucket in _buckets(attributions)
    ]


def _buckets(attributions: Attributions) -> list[tuple[str, Bucket]]:
    return [
        (split, bucket)
        for split, a in attributions.items()
        if isinstance(a, Attribution) and isinstance(a.capacity, Capacity)
        for bucket in a.capacity.buckets
    ]


def _exposures(attributions: Attributions) -> Rows:
    def beta(a: Attribution) -> str:
        return _estimate(a.market.beta) if isinstance(a.market, MarketExposure) else NOT_ASSESSABLE

    def correlation(a: Attribution) -> str:
        return fixed(a.market.correlation) if isinstance(a.market, MarketExposure) else NOT_ASSESSABLE

    def absolute(a: Attribution) -> str:
        return _percent(a.sectors.mean_absolute) if isinstance(a.sectors, SectorExposure) else NOT_ASSESSABLE

    def largest(a: Attribution) -> str:
        if not isinstance(a.sectors, SectorExposure):
            return NOT_ASSESSABLE
        one = a.sectors.largest
        return f"{_percent(one.largest, sign=True)} in sector {one.name} on {one.largest_on}"

    def tilt(a: Attribution) -> str:
        return _estimate(a.size.tilt, sign=True) if isinstance(a.size, SizeTilt) else NOT_ASSESSABLE

    rows: dict[str, Callable[[Attribution], str]] = {
        "beta to the equal-weight market, same interval": beta,
        "correlation with it": correlation,
        "net sector weight, mean absolute": absolute,
        "net sector weight, largest": largest,
        "size tilt: rank by turnover value (0 to 1), long minus short": tilt,
    }
    return [_by_split(name, attributions, shown) for name, shown in rows.items()]


def _sectors(attributions: Attributions) -> Rows:
    weights: dict[str, dict[str, SectorWeight]] = {}
    for split, a in attributions.items():
        if isinstance(a, Attribution) and isinstance(a.sectors, SectorExposure):
            for sector in a.sectors.sectors:
                weights.setdefault(sector.name, {})[split] = sector
    return [
        {"sector": name} | {split: _sector(by_split.get(split), attributions[split]) for split in attributions}
        for name, by_split in weights.items()
    ]


def _sector(weight: SectorWeight | None, attribution: Attribution | Missing) -> str:
    if isinstance(attribution, Missing) or isinstance(attribution.sectors, Missing):
        return NOT_ASSESSABLE
    if weight is None:
        return "not held"
    return f"mean {_percent(weight.mean_net, sign=True)}, absolute {_percent(weight.mean_absolute)}"


def _by_split(name: str, attributions: Attributions, shown: Callable[[Attribution], str]) -> dict[str, str]:
    cells = {split: NOT_ASSESSABLE if isinstance(a, Missing) else shown(a) for split, a in attributions.items()}
    return {"figure": name, **cells}


def _estimate(estimate: Estimate, *, sign: bool = False) -> str:
    if not math.isfinite(estimate.value):
        return NOT_MEASURED
    value = fixed(estimate.value, sign=sign)
    return f"{value} ± {estimate.se:.3f}" if math.isfinite(estimate.se) else value


def fixed(value: float, *, sign: bool = False) -> str:
    """Three decimals, so that the figures of a column can be compared."""
    return NOT_MEASURED if not math.isfinite(value) else f"{value:+.3f}" if sign else f"{value:.3f}"


def _percent(share: float, *, sign: bool = False) -> str:
    return f"{100 * share:+.1f} %" if sign else f"{100 * share:.1f} %"


UNITS: Sequence[tuple[float, str]] = ((1e12, " trillion"), (1e9, " billion"), (1e6, " million"), (1e3, " thousand"))


def money(amount: float) -> str:
    """An amount of the market's currency to three digits."""
    for size, unit in UNITS:
        if amount >= size:
            return f"{float(f'{amount / size:.3g}'):g}{unit}"
    return f"{amount:.3g}"
