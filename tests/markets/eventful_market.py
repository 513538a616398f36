"""A deterministic market with every event that real markets have, and a list of where each one happens.

The generator's market is the quiet background (its own splits are undone first). Each event is one small function whose
docstring is the market's rule, and `_plan` says which stock has which event on which session. Panels are [T, N].
"""
# ruff: noqa: ARG001  (events share one signature)

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import polars as pl

from atft_pipeline.market.synthetic import generate_market

Tables = dict[str, pl.DataFrame]
QUOTE = ("Open", "High", "Low", "Close")
SILENT_SESSION = dt.date(2020, 10, 1)
SEGMENT_CHANGE = dt.date(2022, 4, 4)
LATER_CLOSE = dt.date(2024, 11, 5)
HOLIDAY = dt.date(2021, 5, 3)

PERIODS: dict[str, tuple[dt.date, int]] = {
    "segments": (dt.date(2018, 6, 1), 1060),
    "later_close": (dt.date(2024, 7, 1), 110),
    "half_days": (dt.date(2008, 9, 1), 110),
}
"""First session and length: across 2020-10-01 and 2022-04-04 with every window filled, 2024-11-05, and a year's end."""


@dataclass(frozen=True)
class Event:
    name: str
    code: str
    """Empty for an event of the whole market."""
    session: dt.date
    hits: tuple[tuple[str, int], ...] = ()
    """Quarantine rules that must fire for it, each with its distance from `session` in sessions."""


class Background:
    """The market under construction: quotes as panels, the other tables as they will be."""

    def __init__(self, first_session: dt.date, sessions: int) -> None:
        self.tables = dict(generate_market(stocks=56, sessions=sessions, seed=3, first_session=first_session).tables)
        prices = self.tables["prices"]
        self.days: list[dt.date] = prices["Date"].unique().sort().to_list()
        listed = self.tables["listed"].filter(pl.col("MarketCode") != "0109", pl.col("Code").str.ends_with("0"))
        self.codes: list[str] = listed["Code"].unique().sort().to_list()
        self.panel: dict[str, Any] = {}
        stocks = prices.filter(pl.col("Code").is_in(self.codes))
        self.funds = prices.filter(~pl.col("Code").is_in(self.codes))
        t = np.searchsorted(np.array(self.days), np.array(stocks["Date"].to_list()))
        n = np.searchsorted(self.codes, stocks["Code"].to_list())
        for name in (*QUOTE, "Volume", "TurnoverValue", "AdjustmentFactor"):
            self.panel[name] = np.full((sessions, len(self.codes)), np.nan)
            self.panel[name][t, n] = stocks[name].to_numpy()
        self.has_row = ~np.isnan(self.panel["Close"])
        self._undo_splits()
        self.complete = np.flatnonzero(self.has_row.all(axis=0)).tolist()
        self.documents: list[dict[str, Any]] = self.tables["statements"].to_dicts()
        self.events: list[Event] = []

    def _undo_splits(self) -> None:
        factor = np.cumprod(np.nan_to_num(self.panel["AdjustmentFactor"], nan=1.0), axis=0)
        for name in QUOTE:
            self.panel[name] = np.round(self.panel[name] / factor, 2)
        self.panel["Volume"] = np.round(self.panel["Volume"] * factor)
        self.panel["AdjustmentFactor"][self.has_row] = 1.0

    def scale(self, n: int, sessions: slice, ratio: float) -> None:
        for name in QUOTE:
            self.panel[name][sessions, n] *= ratio

    def set(self, n: int, sessions: Any, **values: float) -> None:
        for name, value in values.items():
            self.panel[name][sessions, n] = value

    def rename(self, n: int, code: str) -> None:
        old, self.codes[n] = self.codes[n], code
        for table, column in (("listed", "Code"),):
            self.tables[table] = self.tables[table].with_columns(pl.col(column).replace({old: code}))
        for document in self.documents:
            document["LocalCode"] = code if document["LocalCode"] == old else document["LocalCode"]

    def documents_of(self, n: int, before: dt.date | None = None) -> list[dict[str, Any]]:
        """The stock's documents in order of disclosure, those before a day."""
        found = [d for d in self.documents if d["LocalCode"] == self.codes[n]]
        found.sort(key=lambda d: (d["DisclosedDate"], d["DisclosedTime"]))
        return [d for d in found if before is None or d["DisclosedDate"] < before.isoformat()]

    def disclose(self, like: dict[str, Any], day: dt.date, time: str, **changes: Any) -> None:
        self.documents.append(like | {"DisclosedDate": day.isoformat(), "DisclosedTime": time} | changes)

    def finished(self) -> Tables:
        keep = self.has_row.reshape(-1)
        dates = pl.Series("Date", np.repeat(np.array(self.days, "datetime64[ms]"), len(self.codes))).cast(pl.Date)
        quotes = {name: pl.Series(values.reshape(-1)).fill_nan(None) for name, values in self.panel.items()}
        frame = pl.DataFrame({"Date": dates, "Code": self.codes * len(self.days), **quotes}).filter(pl.Series(keep))
        prices = pl.concat([frame, self.funds.select(frame.columns)]).sort("Date", "Code")
        documents = sorted(self.documents, key=lambda d: (d["DisclosedDate"], d["DisclosedTime"], d["LocalCode"]))
        numbered = [d | {"DisclosureNumber": f"{20180000000000 + i}"} for i, d in enumerate(documents)]
        return self.tables | {"prices": prices, "statements": pl.DataFrame(numbered, infer_schema_length=None)}


# --- corporate actions ------------------------------------------------------------------------------------------------


def split(m: Background, n: int, t: int, ratio: float = 2.0) -> None:
    """On the ex-date one share becomes `ratio`: the price falls by it, the factor is its inverse."""
    m.scale(n, slice(t, None), 1 / ratio)
    m.panel["Volume"][t:, n] *= ratio
    m.panel["AdjustmentFactor"][t, n] = 1 / ratio


def consolidation(m: Background, n: int, t: int) -> None:
    """Ten shares become one: the price rises tenfold and the factor is 10."""
    split(m, n, t, 0.1)


def split_without_trade(m: Background, n: int, t: int) -> None:
    """The ex-date comes although nobody trades: the row has the factor and no quote."""
    split(m, n, t)
    m.set(n, t, **dict.fromkeys((*QUOTE, "TurnoverValue"), np.nan), Volume=0.0)


def split_at_the_end_of_a_halt(m: Background, n: int, t: int) -> None:
    """A halted stock has rows without quotes, and may come back on a new share base."""
    split(m, n, t)
    m.set(n, slice(t - 4, t), **dict.fromkeys((*QUOTE, "TurnoverValue", "Volume"), np.nan))


# --- sessions without a trade -----------------------------------------------------------------------------------------


def halt(m: Background, n: int, t: int, sessions: int = 4) -> None:
    """While trading is halted the stock has no row at all."""
    m.has_row[t : t + sessions, n] = False


def halt_with_empty_rows(m: Background, n: int, t: int) -> None:
    """A vendor may print a halted stock's rows without any quote, here for three weeks."""
    m.set(n, slice(t, t + 15), **dict.fromkeys((*QUOTE, "TurnoverValue"), np.nan), Volume=0.0)


def stop_and_return(m: Background, n: int, t: int) -> None:
    """A stock that is suspended for 90 sessions leaves the universe and comes back."""
    halt(m, n, t, 90)


def no_trade(m: Background, n: int, t: int) -> None:
    """Nobody trades on every third session for a while: the last price is repeated on a volume of 0."""
    for s in range(t, t + 18, 3):
        m.set(n, s, **dict.fromkeys(QUOTE, m.panel["Close"][s - 1, n]), Volume=0.0, TurnoverValue=0.0)


def no_price_change(m: Background, n: int, t: int) -> None:
    """A thin stock trades 25 sessions long at one price: every 0/0 of the oscillators."""
    m.set(n, slice(t, t + 25), **dict.fromkeys(QUOTE, m.panel["Close"][t - 1, n]))


def listing(m: Background, n: int, t: int, code: str = "130A0") -> None:
    """Codes given since 2024 contain a letter; a new stock has no row, snapshot or document before it is listed."""
    m.has_row[:t, n] = False
    day, listed = m.days[t], m.tables["listed"]
    own = pl.col("Code") == m.codes[n]
    first = listed.filter(own, pl.col("Date") <= day).tail(1).with_columns(Date=pl.lit(day))
    later = listed.filter(~own | (pl.col("Date") > day))
    m.tables["listed"] = pl.concat([later, first]).sort("Date", "Code")
    early = [id(d) for d in m.documents_of(n, before=day)]
    m.documents = [d for d in m.documents if id(d) not in early]
    m.rename(n, code)


def delisting(m: Background, n: int, t: int) -> None:
    """A stock taken over trades last on the session before `t`, and no snapshot or document names it later."""
    m.has_row[t:, n] = False
    gone = (pl.col("Code") == m.codes[n]) & (pl.col("Date") >= m.days[t])
    m.tables["listed"] = m.tables["listed"].filter(~gone)
    before = [id(d) for d in m.documents_of(n, before=m.days[t])]
    m.documents = [d for d in m.documents if d["LocalCode"] != m.codes[n] or id(d) in before]


def listed_and_never_traded(m: Background, n: int, t: int) -> None:
    """A code may stand in the list of stocks and have no quote at all."""
    m.has_row[:, n] = False


# --- quotes that are wrong --------------------------------------------------------------------------------------------


def zero_price(m: Background, n: int, t: int) -> None:
    """A traded row with an open of 0 is an error."""
    m.set(n, t, Open=0.0)


def negative_price(m: Background, n: int, t: int) -> None:
    """No price is negative."""
    m.set(n, t, Low=-1.0)


def null_price(m: Background, n: int, t: int) -> None:
    """A row with a volume has all four prices."""
    m.set(n, t, Close=np.nan)


def negative_volume(m: Background, n: int, t: int) -> None:
    """No volume is negative."""
    m.set(n, t, Volume=-100.0)


def negative_turnover(m: Background, n: int, t: int) -> None:
    """No turnover is negative."""
    m.set(n, t, TurnoverValue=-1.0)


def high_below_low(m: Background, n: int, t: int) -> None:
    """The high is at least the low."""
    m.set(n, t, High=m.panel["Low"][t, n] * 0.9)


def close_outside_range(m: Background, n: int, t: int) -> None:
    """The close lies between low and high."""
    m.set(n, t, Close=m.panel["High"][t, n] * 1.1)


def range_too_wide(m: Background, n: int, t: int) -> None:
    """No daily price limit allows a high of ten times the low."""
    m.set(n, t, High=m.panel["Low"][t, n] * 10)


def bad_factor(m: Background, n: int, t: int, factor: float = -1.0) -> None:
    """A factor is positive; null on a traded row says as little as -1."""
    m.set(n, t, AdjustmentFactor=factor)


def level_error(m: Background, n: int, t: int, ratio: float) -> None:
    """A row in another unit comes back on the next session: nobody earned either move."""
    m.scale(n, slice(t, t + 1), ratio)


def level_break(m: Background, n: int, t: int) -> None:
    """A level that jumps 7.3 times and stays is no split's ratio and no return."""
    m.scale(n, slice(t, None), 7.3)


def split_without_factor(m: Background, n: int, t: int) -> None:
    """A price that halves on ordinary turnover is a split whose factor the source forgot."""
    split(m, n, t)
    m.set(n, t, AdjustmentFactor=1.0)


def real_halving(m: Background, n: int, t: int) -> None:
    """A price that halves on twenty times its turnover is bad news, and stays a loss."""
    m.scale(n, slice(t, None), 0.5)
    m.panel["Volume"][t, n] *= 40.0
    m.panel["TurnoverValue"][t, n] *= 20.0


def factor_without_jump(m: Background, n: int, t: int) -> None:
    """A factor of 1/4 on a price that does not move is an error of the source."""
    m.set(n, t, AdjustmentFactor=0.25)


def factor_one_session_late(m: Background, n: int, t: int) -> None:
    """Some sources put the factor on the session after the ex-date."""
    split(m, n, t)
    m.set(n, t, AdjustmentFactor=1.0)
    m.set(n, t + 1, AdjustmentFactor=0.5)


def penny_stock(m: Background, n: int, t: int) -> None:
    """Below the price floor of 50 yen a tick is a return: a stock that crosses it goes out of the universe and back."""
    ratio = 50.0 / m.panel["Close"][t, n]
    m.scale(n, slice(None), ratio)
    m.panel["Volume"][:, n] /= ratio


# --- the whole market -------------------------------------------------------------------------------------------------


def session_without_quotes(m: Background, n: int, t: int) -> None:
    """On 2020-10-01 a system failure let nothing trade: a session of the exchange without a row of any stock."""
    m.has_row[t] = False
    m.funds = m.funds.filter(pl.col("Date") != m.days[t])
    index = m.tables["index"].sort("Date")
    previous = index["Close"][t - 1]
    m.tables["index"] = index.with_columns(
        pl.when(pl.col("Date") == m.days[t]).then(previous).otherwise(pl.col(name)).alias(name) for name in QUOTE
    )


def holiday_rows(m: Background, n: int, t: int) -> None:
    """Some sources print rows on a holiday: the last prices, and nothing traded."""
    last = m.funds.filter(pl.col("Date") == m.days[t - 1])
    m.funds = pl.concat(
        [m.funds, last.with_columns(Date=pl.lit(HOLIDAY), Volume=pl.lit(0.0), TurnoverValue=pl.lit(0.0))]
    )


def missing_index_row(m: Background, n: int, t: int) -> None:
    """The index table may lack a session."""
    m.tables["index"] = m.tables["index"].filter(pl.col("Date") != m.days[t])


def old_segments(m: Background, n: int, t: int) -> None:
    """Until 2022-04-04 Tokyo had a First and a Second Section, Mothers and JASDAQ; flows follow with their own week."""
    old, junior = pl.col("Date") < SEGMENT_CHANGE, pl.col("Code").hash(seed=0) % 2 == 0
    listed = m.tables["listed"]
    if SEGMENT_CHANGE in m.days:
        change = listed.filter(pl.col("Date") <= SEGMENT_CHANGE)
        change = change.filter(pl.col("Date") == pl.col("Date").max()).with_columns(Date=pl.lit(SEGMENT_CHANGE))
        listed = pl.concat([listed, change]).unique(["Date", "Code"], maintain_order=True).sort("Date", "Code")
    growth = pl.when(junior).then(pl.lit("0104")).otherwise(pl.lit("0106"))
    before = pl.col("MarketCode").replace({"0111": "0101", "0112": "0102"})
    before = pl.when(pl.col("MarketCode") == "0113").then(growth).otherwise(before)
    m.tables["listed"] = listed.with_columns(MarketCode=pl.when(old).then(before).otherwise("MarketCode"))

    flows = m.tables["investor_flows"]
    was = flows.filter(pl.col("EndDate") < SEGMENT_CHANGE)
    figures = [name for name in flows.columns if name.endswith(("Sales", "Purchases", "Total", "Balance"))]
    jasdaq = was.filter(pl.col("Section") == "TSEGrowth").with_columns(pl.col(figures).shift(1, fill_value=1e6))
    names = {"TSEPrime": "TSE1st", "TSEStandard": "TSE2nd", "TSEGrowth": "TSEMothers"}
    was = was.with_columns(pl.col("Section").replace(names))
    now = flows.filter(pl.col("EndDate") >= SEGMENT_CHANGE)
    m.tables["investor_flows"] = pl.concat([was, jasdaq.with_columns(Section=pl.lit("TSEJASDAQ")), now]).sort(
        "PublishedDate", "Section"
    )


def sector_change(m: Background, n: int, t: int) -> None:
    """A company may move to another sector, known from the snapshot that says so."""
    listed, own = m.tables["listed"], pl.col("Code") == m.codes[n]
    others = listed.filter(~own, pl.col("Sector33Code") != "9999")
    now = listed.filter(own, pl.col("Date") <= m.days[t])["Sector33Code"][-1]
    new = others.filter(pl.col("Sector33Code") != now)["Sector33Code"][0]
    moved = own & (pl.col("Date") >= m.days[t])
    m.tables["listed"] = listed.with_columns(Sector33Code=pl.when(moved).then(pl.lit(new)).otherwise("Sector33Code"))


def section_change(m: Background, n: int, t: int) -> None:
    """A company may move between the main section and the second."""
    listed, own = m.tables["listed"], pl.col("Code") == m.codes[n]
    now = listed.filter(own, pl.col("Date") <= m.days[t])["MarketCode"][-1]
    moved = own & (pl.col("Date") >= m.days[t])
    other = pl.lit("0112" if now == "0111" else "0111")
    m.tables["listed"] = listed.with_columns(MarketCode=pl.when(moved).then(other).otherwise("MarketCode"))


def revised_flows(m: Background, n: int, t: int) -> None:
    """The exchange corrects a week two weeks later: a second row of that week with its own publication date."""
    flows = m.tables["investor_flows"]
    week = flows.filter(pl.col("PublishedDate") < m.days[t])["EndDate"].unique().sort()[-2]
    changed = {"ForeignersBalance": -1.4, "IndividualsBalance": 0.5, "TotalTotal": 1.3, "TrustBanksBalance": -1.0}
    again = flows.filter(pl.col("EndDate") == week).with_columns(
        *(pl.col(name) * ratio for name, ratio in changed.items()), PublishedDate=pl.lit(m.days[t])
    )
    m.tables["investor_flows"] = pl.concat([flows, again]).sort("PublishedDate", "Section", "EndDate")


def late_flows(m: Background, n: int, t: int) -> None:
    """A week may be published after the next one: until then it is missing in the history."""
    flows = m.tables["investor_flows"]
    week = flows.filter(pl.col("PublishedDate") < m.days[t])["EndDate"].unique().sort()[-2]
    late = pl.when(pl.col("EndDate") == week).then(pl.lit(m.days[t])).otherwise("PublishedDate")
    m.tables["investor_flows"] = flows.with_columns(PublishedDate=late).sort("PublishedDate", "Section", "EndDate")


# --- documents --------------------------------------------------------------------------------------------------------

_RESULTS = ("NetSales", "OperatingProfit", "OrdinaryProfit", "Profit", "TotalAssets", "Equity")


def _revision(m: Background, n: int, day: dt.date, time: str, growth: float) -> None:
    documents = [d for d in m.documents_of(n, before=day) if d["ForecastProfit"]]
    last = documents[-1]
    figures = {f"Forecast{name}": str(round(float(last[f"Forecast{name}"]) * growth)) for name in
               ("OperatingProfit", "Profit")}  # fmt: skip
    blank = dict.fromkeys(_RESULTS, "")
    m.disclose(last, day, time, TypeOfDocument="EarnForecastRevision", TypeOfCurrentPeriod="FY", **blank, **figures)


def forecast_revision(m: Background, n: int, t: int, time: str = "13:30:00") -> None:
    """A revised forecast comes without results, and may come before the close."""
    _revision(m, n, m.days[t], time, 1.25)


def several_documents_in_a_day(m: Background, n: int, t: int) -> None:
    """Two revisions and a notice on dividends within a day, the last of them after the close."""
    _revision(m, n, m.days[t], "11:30:00", 0.9)
    _revision(m, n, m.days[t], "15:30:00", 0.8)
    dividend_notice(m, n, t, "12:00:00")


def dividend_notice(m: Background, n: int, t: int, time: str = "14:00:00") -> None:
    """A notice on dividends is a document with no figure that the features read."""
    last = m.documents_of(n, before=m.days[t])[-1]
    blank = {name: "" for name in last if name.removeprefix("NextYear").removeprefix("Forecast") in _RESULTS}
    m.disclose(last, m.days[t], time, TypeOfDocument="RevisionDividendForecast", TypeOfCurrentPeriod="FY", **blank)


def corrected_older_period(m: Background, n: int, t: int) -> None:
    """Figures of last year's period are corrected later: only the comparison changes, from the correction on."""
    documents = [d for d in m.documents_of(n, before=m.days[t]) if d["NetSales"]]
    period = documents[-1]["TypeOfCurrentPeriod"]
    older = [d for d in documents if d["TypeOfCurrentPeriod"] == period][-2]
    figures = {name: str(round(float(older[name]) * 0.7)) for name in ("NetSales", "OperatingProfit", "Profit")}
    m.disclose(older, m.days[t], "10:00:00", **figures)


def restated_newest_period(m: Background, n: int, t: int) -> None:
    """The latest results are restated: the new figures and the new date count from then on."""
    last = [d for d in m.documents_of(n, before=m.days[t]) if d["NetSales"]][-1]
    m.disclose(last, m.days[t], "10:00:00", Profit=str(round(float(last["Profit"]) * 0.6)), Equity="1000000")


def late_results(m: Background, n: int, t: int) -> None:
    """Results delayed by an audit appear after those of the next quarter, and are then only what those compare with."""
    document = [d for d in m.documents_of(n, before=m.days[t]) if d["NetSales"]][-2]
    document["DisclosedDate"] = m.days[t].isoformat()


def silent_company(m: Background, n: int, t: int) -> None:
    """A company that stops reporting: what it said last expires after 400 days."""
    known = [id(d) for d in m.documents_of(n, before=m.days[t])]
    m.documents = [d for d in m.documents if d["LocalCode"] != m.codes[n] or id(d) in known]


def ifrs_filer(m: Background, n: int, t: int) -> None:
    """IFRS knows no ordinary profit, and some filers print no operating profit either."""
    for d in m.documents_of(n):
        d["TypeOfDocument"] = d["TypeOfDocument"].replace("_JP", "_IFRS")
        d["OrdinaryProfit"] = d["ForecastOrdinaryProfit"] = d["NextYearForecastOrdinaryProfit"] = ""
        if d["DisclosedDate"] >= m.days[t].isoformat():
            d["OperatingProfit"] = d["ForecastOperatingProfit"] = "-"


def marks_for_nothing(m: Background, n: int, t: int) -> None:
    """A figure that is not given is blank, '-' or '*'."""
    for d in m.documents_of(n):
        if d["DisclosedDate"] >= m.days[t].isoformat():
            d |= {"TotalAssets": "*", "Equity": "-", "ForecastProfit": " "}


def document_without_time(m: Background, n: int, t: int) -> None:
    """Without a time a document counts as disclosed after the close."""
    forecast_revision(m, n, t, time="")


def document_on_a_saturday(m: Background, n: int, t: int) -> None:
    """What is disclosed on a weekend is known at the next session's close."""
    saturday = m.days[t] + dt.timedelta(days=5 - m.days[t].weekday())
    _revision(m, n, saturday, "10:00:00", 1.1)


def changed_fiscal_year(m: Background, n: int, t: int) -> None:
    """A company that moves its year's end has nothing a year ago to compare with."""
    for d in m.documents_of(n):
        if d["DisclosedDate"] >= m.days[t].isoformat():
            end = dt.date.fromisoformat(d["CurrentFiscalYearEndDate"])
            d["CurrentFiscalYearEndDate"] = (end - dt.timedelta(days=91)).isoformat()


def loss(m: Background, n: int, t: int) -> None:
    """Growth from a loss is measured by the size of the loss; a zero to compare with gives null."""
    documents = [d for d in m.documents_of(n) if d["NetSales"]]
    for k, d in enumerate(documents):
        d["Profit"] = "-500000" if k % 2 == 0 else "0"


# --- which stock has which event --------------------------------------------------------------------------------------

Row = tuple[Callable[..., None], int, int, dict[str, Any], tuple[tuple[str, int], ...]]


def _row(event: Callable[..., None], stock: int, t: int, *hits: str, **arguments: Any) -> Row:
    """`hits`: the rules that fire on the session, with a leading + on the one after it."""
    return event, stock, t, arguments, tuple((rule.removeprefix("+"), int(rule.startswith("+"))) for rule in hits)


def _segments_plan(days: list[dt.date]) -> list[Row]:
    """Stocks count those with a row on every session. Sessions from 640 on have every window filled but the longest."""
    split_like, reverts = "split_without_factor", "jump_reverts"
    back = f"+{split_like}"
    return [
        _row(listing, 0, 500, code="130A0"),
        _row(listing, 1, 900, code="285A0"),
        _row(stop_and_return, 2, 600),
        _row(split, 3, 700, ratio=2.0),
        _row(split, 4, 701, ratio=3.0),
        _row(split, 5, 702, ratio=1.1),
        _row(consolidation, 6, 703),
        _row(split_without_trade, 7, 704),
        _row(split_at_the_end_of_a_halt, 8, 705),
        _row(halt, 9, 698),
        _row(split, 9, 704, ratio=5.0),
        _row(halt_with_empty_rows, 10, 690),
        _row(no_trade, 11, 690),
        _row(no_price_change, 12, 690),
        _row(delisting, 13, 712),
        _row(zero_price, 14, 706, "price_not_positive"),
        _row(negative_price, 14, 709, "price_not_positive"),
        _row(null_price, 14, 712, "price_not_positive"),
        _row(negative_volume, 15, 706, "negative_volume"),
        _row(negative_turnover, 16, 715, "negative_turnover"),
        _row(high_below_low, 15, 708, "high_below_low"),
        _row(close_outside_range, 15, 710, "price_outside_range"),
        _row(range_too_wide, 15, 712, "range_too_wide"),
        _row(bad_factor, 16, 707, "bad_factor"),
        _row(bad_factor, 16, 711, "bad_factor", factor=np.nan),
        _row(level_error, 17, 707, split_like, reverts, back, ratio=5.0),
        _row(level_error, 18, 709, split_like, reverts, back, ratio=10.0),
        _row(level_error, 19, 711, "level_break", reverts, back, ratio=100.0),
        _row(level_break, 20, 710, "level_break"),
        _row(split_without_factor, 21, 708, split_like),
        _row(real_halving, 22, 709, "jump_without_factor"),
        _row(factor_without_jump, 23, 710, "factor_without_jump"),
        _row(factor_one_session_late, 24, 711, split_like, "+factor_without_jump"),
        _row(penny_stock, 25, 680),
        _row(listed_and_never_traded, 26, 0),
        _row(sector_change, 27, 700),
        _row(section_change, 28, 700),
        _row(forecast_revision, 29, 700),
        _row(several_documents_in_a_day, 30, 702),
        _row(dividend_notice, 31, 703),
        _row(corrected_older_period, 32, 704),
        _row(restated_newest_period, 33, 705),
        _row(late_results, 34, 706),
        _row(silent_company, 35, 440),
        _row(ifrs_filer, 36, 600),
        _row(marks_for_nothing, 37, 620),
        _row(document_without_time, 38, 707),
        _row(document_on_a_saturday, 39, 708),
        _row(changed_fiscal_year, 40, 650),
        _row(loss, 41, 0),
        _row(revised_flows, -1, 701),
        _row(late_flows, -1, 720),
        _row(missing_index_row, -1, 714),
        _row(holiday_rows, -1, days.index(dt.date(2021, 5, 6))),
        _row(session_without_quotes, -1, days.index(SILENT_SESSION)),
        _row(old_segments, -1, days.index(SEGMENT_CHANGE)),
    ]


def _later_close_plan(days: list[dt.date]) -> list[Row]:
    """At 15:10 a document is late on Friday 2024-11-01 and in time on Tuesday 2024-11-05."""
    t = days.index(LATER_CLOSE)
    return [
        _row(forecast_revision, 0, t - 1, time="15:10:00"),
        _row(forecast_revision, 1, t, time="15:10:00"),
        _row(forecast_revision, 2, t, time="15:30:00"),
        _row(split, 3, t),
    ]


def _half_days_plan(days: list[dt.date]) -> list[Row]:
    """The last session of 2008 and the first of 2009 end at 11:00."""
    t = days.index(dt.date(2008, 12, 30))
    assert days[t + 1] == dt.date(2009, 1, 5)
    return [
        _row(old_segments, -1, 0),
        _row(forecast_revision, 0, t, time="10:30:00"),
        _row(forecast_revision, 1, t, time="11:15:00"),
        _row(forecast_revision, 2, t + 1, time="11:15:00"),
        _row(forecast_revision, 3, t + 2, time="11:15:00"),
        _row(split, 4, t + 1),
    ]


_PLANS = {"segments": _segments_plan, "later_close": _later_close_plan, "half_days": _half_days_plan}


@cache
def _built(period: str) -> tuple[Tables, tuple[Event, ...]]:
    m = Background(*PERIODS[period])
    for event, stock, t, arguments, hits in _PLANS[period](m.days):
        n = m.complete[stock] if stock >= 0 else -1
        event(m, n, t, **arguments)
        m.events.append(Event(event.__name__, m.codes[n] if stock >= 0 else "", m.days[t], hits))
    return m.finished(), tuple(m.events)


def eventful_tables(period: str = "segments") -> Tables:
    """The five raw tables of one of `PERIODS`."""
    return dict(_built(period)[0])


def events(period: str = "segments") -> tuple[Event, ...]:
    """Where what happens, in the order of the plan."""
    return _built(period)[1]
