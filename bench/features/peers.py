"""Cost of the same job in other libraries: `python bench/features/peers.py PEER SOURCE` prints one JSON line.

The job: SOURCE/prices.parquet and SOURCE/index.parquet (J-Quants columns) to float32 features in memory, split-adjusted
and per stock, then a z-score per session over the stocks. The peers use raw prices: a session without a trade has no
row, windows count rows, and there is no contract check, quarantine, universe, outlier clip or point-in-time join. Our
own `atft` does all of these within its time. `ours` counts the features that have a name of ours; the others are
indicators that a user of the library would add. `beside_peers.py` runs every peer beside ours.

`wall_s` and `cpu_s` (all threads and finished worker processes) are measured from before the parquet file is read until
the features are in memory. Imports, and one warm-up of the same code on a market of 30 stocks x 80 sessions, are not
counted. `peak_rss_gb` is the peak resident size of this process in that time, `worker_rss_gb` that of its largest
worker.

Environments (never the project's own `.venv`, where `atft` and `floor` run):

    python3 -m venv ~/peers && ~/peers/bin/pip install -r bench/features/requirements-peers.txt
    python3 -m venv ~/qlib && ~/qlib/bin/pip install -r bench/features/requirements-qlib.txt
    ~/peers/bin/python bench/features/peers.py polars-talib SOURCE
    ~/qlib/bin/python bench/features/peers.py qlib-alpha158 SOURCE

A peer whose library is not installed prints `skipped` with the reason and exits 0.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
QUOTES = ("Open", "High", "Low", "Close", "Volume")
TINY_STOCKS, TINY_SESSIONS = 30, 80
RAW_COLUMNS, OUR_COLUMNS = 8, 82
"""What `floor` touches per row: the raw columns except the date, float64, and our features, float32."""


class Features(NamedTuple):
    rows: int
    features: int
    ours: int
    """How many of them have a name of ours."""
    table: Any
    """Kept alive until the memory is measured."""
    figures: dict[str, Any] | None = None
    """What this peer reports besides the common figures."""


class Peer(NamedTuple):
    version: str
    compute: Callable[[Path], Features]
    prepare: Callable[[Path, Path], Path] | None = None
    """(source, folder to write in) -> the path that `compute` takes instead of the source; timed separately, as
    `prepare_s`."""


# Ours ----------------------------------------------------------------------------------------------------------


def atft() -> Peer:
    """This checkout's own features: what `atft dataset` does before targets, manifest and writing."""
    sys.path.insert(0, str(ROOT))
    from atft_pipeline import __version__
    from atft_pipeline.config.presets import preset
    from atft_pipeline.features.compute import build_features
    from atft_pipeline.features.registry import FEATURE_NAMES
    from atft_pipeline.market.contracts import read_checked
    from atft_pipeline.market.sources import open_source
    from atft_pipeline.market.universe import build_prices

    config = preset("cpu").dataset

    def compute(source: Path) -> Features:
        checked = read_checked(open_source(source))
        adjusted = build_prices(checked.tables, config)
        tables = {name: table for name, table in checked.tables.items() if name != "prices"}
        del checked  # else the raw table would stay in memory beside the panels
        panel = build_features(adjusted.panel, tables, config)
        return Features(panel.values.shape[1], len(FEATURE_NAMES), len(FEATURE_NAMES), panel)

    return Peer(f"atft_pipeline {__version__}", compute)


def floor() -> Peer:
    """A copy on all cores of the bytes that any implementation must touch at least once: no feature, no parquet.

    `floor_s` is the fastest of 9 copies into existing pages, which is the memory's own speed. `wall_s` is the first
    copy, which also has to get new pages, as does every program that keeps its result.
    """
    import numba
    import numpy as np
    import pyarrow.parquet as pq

    block = 2048
    """Rows of 8 columns, 128 KiB: what is read stays in the second-level cache while it is written."""

    @numba.njit(parallel=True)  # type: ignore[untyped-decorator]
    def copy(raw: Any, out: Any) -> None:
        columns, rows = raw.shape
        for b in numba.prange((rows + block - 1) // block):
            low, high = b * block, min(rows, (b + 1) * block)
            for f in range(out.shape[0]):
                for i in range(low, high):
                    out[f, i] = raw[f % columns, i]

    def prepare(source: Path, folder: Path) -> Path:
        rows = pq.read_metadata(source / "prices.parquet").num_rows
        np.save(folder / "raw.npy", np.random.default_rng(0).random((RAW_COLUMNS, rows)))
        return folder / "raw.npy"

    def compute(path: Path) -> Features:
        raw = np.load(path)
        out = np.empty((OUR_COLUMNS, raw.shape[1]), np.float32)
        elapsed = []
        for _ in range(10):
            started = time.perf_counter()
            copy(raw, out)
            elapsed.append(time.perf_counter() - started)
        floor_s = min(elapsed[1:])
        figures = {
            "wall_s": round(elapsed[0], 4),
            "floor_s": round(floor_s, 4),
            "gb_per_s": round((raw.nbytes + out.nbytes) / floor_s / 1e9, 2),
            "threads": numba.get_num_threads(),
        }
        return Features(raw.shape[1], 0, 0, out, figures)

    return Peer(f"numba {version('numba')}", compute, prepare)


# polars and polars_talib ---------------------------------------------------------------------------------------


def polars_talib() -> Peer:
    """Polars expressions and TA-Lib's plugin `.over("Code")`, then per session.

    It is written for speed. Of two equal expressions it uses the faster one: TA-Lib's rolling extremes, deviation,
    correlation and beta take a third of the time of polars' own. The z-score joins each session's moments, which takes
    two thirds of the time of `.over("Date")`.
    """
    import polars as pl
    import polars_talib as _plugin  # noqa: F401 - registers the namespace `ta`

    col = pl.col
    Open, H, L, C, V = (col(name) for name in QUOTES)
    R, M, X = col("r"), col("m"), col("x")  # returns of the stock and of the index, level of the index
    shared = {  # read by several features
        "r5": C / C.shift(5) - 1, "ema5": C.ta.ema(5), "ema20": C.ta.ema(20), "ema200": C.ta.ema(200),
        "sma20": C.ta.sma(20), "std20": C.ta.stddev(20), "beta": X.ta.beta(C, 60),
    }  # fmt: skip
    r5, ema5, ema20, ema200, sma20, std20, beta = (col(name) for name in shared)
    named = {
        "returns_1d": R,
        "returns_5d": r5,
        "returns_10d": C / C.shift(10) - 1,
        "returns_20d": C / C.shift(20) - 1,
        "overnight_return_1d": Open / C.shift(1) - 1,
        "volatility_5d": R.ta.stddev(5),
        "volatility_10d": R.ta.stddev(10),
        "volatility_20d": R.ta.stddev(20),
        "volatility_60d": R.ta.stddev(60),
        "parkinson_volatility_20d": ((H / L).log() ** 2).ta.sma(20).sqrt(),
        "price_to_ema_5": C / ema5 - 1,
        "price_to_ema_20": C / ema20 - 1,
        "price_to_ema_200": C / ema200 - 1,
        "ma_gap_5_20": ema5 / ema20 - 1,
        "price_to_sma_60": C / C.ta.sma(60) - 1,
        "returns_60d": C / C.shift(60) - 1,
        "momentum_12_1": C.shift(21) / C.shift(252) - 1,
        "bb_position": (C - sma20) / (4 * std20),
        "bb_width": std20 / sma20,
        "rsi_2": C.ta.rsi(2),
        "rsi_14": C.ta.rsi(14),
        "macd_histogram": C.ta.macd(12, 26, 9).struct.field("macdhist") / C,
        "stoch_k_14": C.ta.stochf(H, L, 14, 1, 0).struct.field("fastk"),
        "close_location": (C - L) / (H - L),
        "high_52w_ratio": C / H.ta.max(252),
        "volume_ratio_5": (V / V.ta.sma(5)).log(),
        "volume_ratio_20": (V / V.ta.sma(20)).log(),
        "amihud_illiquidity_20d": (R.abs() / col("TurnoverValue")).ta.sma(20).log(),
        "beta_60d": beta,
        "beta_stability_60d": 1 / (beta.ta.stddev(60) + 1e-6),
        "alpha_1d": R - beta * M,
        "alpha_5d": r5 - beta * col("m5"),
        "corr_mkt_60d": R.ta.correl(M, 60),
        "idio_volatility_60d": (R - beta * M).ta.stddev(60),
    }
    indicators = {
        "adx_14": C.ta.adx(H, L, 14),
        "natr_14": C.ta.natr(H, L, 14),
        "cci_20": C.ta.cci(H, L, 20),
        "willr_28": C.ta.willr(H, L, 28),
        "aroonosc_25": H.ta.aroonosc(L, 25),
        "ultosc": C.ta.ultosc(H, L, 7, 14, 28),
        "mfi_14": C.ta.mfi(H, L, V, 14),
        "adosc": C.ta.adosc(H, L, V, 3, 10) / V.ta.sma(20),
        "bop": Open.ta.bop(H, L, C),
        "cmo_20": C.ta.cmo(20),
        "trix_15": C.ta.trix(15),
        "ppo": C.ta.ppo(12, 26),
        "price_to_kama_30": C / C.ta.kama(30) - 1,
        "price_to_dema_20": C / C.ta.dema(20) - 1,
        "slope_20": C.ta.linearreg_slope(20) / C,
        "forecast_gap_20": C.ta.tsf(20) / C - 1,
        "midprice_gap_60": C / H.ta.midprice(L, 60) - 1,
        "minus_di_14": C.ta.minus_di(H, L, 14),
    }
    index_series = {
        "mkt_returns_1d": M,
        "mkt_returns_5d": col("m5"),
        "mkt_returns_10d": X / X.shift(10) - 1,
        "mkt_returns_20d": X / X.shift(20) - 1,
        "mkt_ma_gap_5_20": X.ta.ema(5) / X.ta.ema(20) - 1,
        "mkt_ema20_slope_3": X.ta.ema(20) / X.ta.ema(20).shift(3) - 1,
        "mkt_volatility_20d": M.rolling_std(20),
        "mkt_drawdown": X / X.rolling_max(252, min_samples=1) - 1,
        "mkt_bb_width": X.ta.stddev(20) / X.ta.sma(20),
        "mkt_bb_position": (X - X.ta.sma(20)) / (4 * X.ta.stddev(20)),
    }
    per_stock = named | indicators
    flags = {
        "mkt_bull_200": col("bull"),
        "mkt_high_vol": col("mkt_volatility_20d") > 1,
        "mkt_breadth_200": C.gt(ema200).mean().over("Date"),
        "trend_align_mkt": (ema5 > ema20) == col("rising"),
    }

    def finite(x: Any) -> Any:
        # TA-Lib marks its warm-up with NaN, which a mean over the session would pass on to every stock.
        return pl.when(x.is_finite()).then(x)

    def trailing_zscore(x: Any) -> Any:
        return (x - x.rolling_mean(252, min_samples=60)) / x.rolling_std(252, min_samples=60)

    def index_table(source: Path) -> Any:
        closes = pl.read_parquet(source / "index.parquet").sort("Date").select("Date", x="Close")
        levels = closes.with_columns(m=X / X.shift(1) - 1, m5=X / X.shift(5) - 1)
        series = levels.with_columns(finite(x).alias(name) for name, x in index_series.items())
        return series.with_columns(
            *(trailing_zscore(col(name)).cast(pl.Float32) for name in index_series),
            bull=X.gt(X.ta.ema(200)),
            rising=X.ta.ema(5) > X.ta.ema(20),
        )

    def compute(source: Path) -> Features:
        factor = col("AdjustmentFactor").cum_prod()
        stocks = (
            pl.read_parquet(source / "prices.parquet")
            .filter(C.is_not_null())
            .sort("Code", "Date")
            .with_columns(*((col(q) / factor).over("Code") for q in QUOTES[:4]), (V * factor).over("Code"))
            .join(index_table(source), on="Date", how="left", maintain_order="left")
            .with_columns(r=(C / C.shift(1) - 1).over("Code"))
            .with_columns(x.over("Code").alias(name) for name, x in shared.items())
        )
        features = stocks.select(
            "Date",
            "Code",
            *index_series,
            *(x.cast(pl.Float32).alias(name) for name, x in flags.items()),
            *(finite(x).over("Code").cast(pl.Float32).alias(name) for name, x in per_stock.items()),
        )
        del stocks
        moments = features.group_by("Date").agg(
            *(col(name).mean().name.suffix(" mean") for name in per_stock),
            *(col(name).std(ddof=0).name.suffix(" std") for name in per_stock),
        )
        normalised = features.join(moments, on="Date", how="left", maintain_order="left").select(
            "Date",
            "Code",
            *index_series,
            *flags,
            *((col(name) - col(f"{name} mean")) / col(f"{name} std") for name in per_stock),
        )
        return Features(normalised.height, normalised.width - 2, normalised.width - 2 - len(indicators), normalised)

    return Peer(f"polars {version('polars')}, polars_talib {version('polars-talib')}", compute)


# TA-Lib and pandas ---------------------------------------------------------------------------------------------


def talib_pandas() -> Peer:
    """TA-Lib's functions on the arrays of each stock of a pandas `groupby("Code")`, then `groupby("Date")`.

    One core: pandas and TA-Lib's Python wrapper have no threads of their own.
    """
    import numpy as np
    import pandas as pd
    import talib as ta

    def lag(x: Any, rows: int) -> Any:
        out = np.full(len(x), np.nan)
        out[rows:] = x[:-rows]
        return out

    def change(x: Any, rows: int) -> Any:
        return x / lag(x, rows) - 1

    def of_stock(
        Open: Any, H: Any, L: Any, C: Any, V: Any, value: Any, X: Any, M: Any, m5: Any, gap: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Our features and other indicators of one stock. X, M, m5, gap: the index on this stock's rows."""
        R, r5 = change(C, 1), change(C, 5)
        ema5, ema20, sma20, std20 = ta.EMA(C, 5), ta.EMA(C, 20), ta.SMA(C, 20), ta.STDDEV(C, 20)
        beta = ta.BETA(X, C, 60)
        residual = R - beta * M
        named = {
            "trend_align_mkt": np.where(np.isnan(gap), np.nan, (ema5 > ema20) == (gap > 0)),
            "returns_1d": R,
            "returns_5d": r5,
            "returns_10d": change(C, 10),
            "returns_20d": change(C, 20),
            "overnight_return_1d": Open / lag(C, 1) - 1,
            "volatility_5d": ta.STDDEV(R, 5),
            "volatility_10d": ta.STDDEV(R, 10),
            "volatility_20d": ta.STDDEV(R, 20),
            "volatility_60d": ta.STDDEV(R, 60),
            "parkinson_volatility_20d": np.sqrt(ta.SMA(np.log(H / L) ** 2, 20)),
            "price_to_ema_5": C / ema5 - 1,
            "price_to_ema_20": C / ema20 - 1,
            "price_to_ema_200": C / ta.EMA(C, 200) - 1,
            "ma_gap_5_20": ema5 / ema20 - 1,
            "price_to_sma_60": C / ta.SMA(C, 60) - 1,
            "returns_60d": change(C, 60),
            "momentum_12_1": lag(C, 21) / lag(C, 252) - 1,
            "bb_position": (C - sma20) / (4 * std20),
            "bb_width": std20 / sma20,
            "rsi_2": ta.RSI(C, 2),
            "rsi_14": ta.RSI(C, 14),
            "macd_histogram": ta.MACD(C, 12, 26, 9)[2] / C,
            "stoch_k_14": ta.STOCHF(H, L, C, 14, 1, 0)[0],
            "close_location": (C - L) / (H - L),
            "high_52w_ratio": C / ta.MAX(H, 252),
            "volume_ratio_5": np.log(V / ta.SMA(V, 5)),
            "volume_ratio_20": np.log(V / ta.SMA(V, 20)),
            "amihud_illiquidity_20d": np.log(ta.SMA(np.abs(R) / value, 20)),
            "beta_60d": beta,
            "beta_stability_60d": 1 / (ta.STDDEV(beta, 60) + 1e-6),
            "alpha_1d": residual,
            "alpha_5d": r5 - beta * m5,
            "corr_mkt_60d": ta.CORREL(R, M, 60),
            "idio_volatility_60d": ta.STDDEV(residual, 60),
        }
        indicators = {
            "adx_14": ta.ADX(H, L, C, 14),
            "natr_14": ta.NATR(H, L, C, 14),
            "cci_20": ta.CCI(H, L, C, 20),
            "willr_28": ta.WILLR(H, L, C, 28),
            "aroonosc_25": ta.AROONOSC(H, L, 25),
            "ultosc": ta.ULTOSC(H, L, C, 7, 14, 28),
            "mfi_14": ta.MFI(H, L, C, V, 14),
            "adosc": ta.ADOSC(H, L, C, V, 3, 10) / ta.SMA(V, 20),
            "bop": ta.BOP(Open, H, L, C),
            "cmo_20": ta.CMO(C, 20),
            "trix_15": ta.TRIX(C, 15),
            "ppo": ta.PPO(C, 12, 26),
            "price_to_kama_30": C / ta.KAMA(C, 30) - 1,
            "price_to_dema_20": C / ta.DEMA(C, 20) - 1,
            "slope_20": ta.LINEARREG_SLOPE(C, 20) / C,
            "forecast_gap_20": ta.TSF(C, 20) / C - 1,
            "midprice_gap_60": C / ta.MIDPRICE(H, L, 60) - 1,
            "minus_di_14": ta.MINUS_DI(H, L, C, 14),
        }
        return named, indicators

    def index_table(source: Path) -> Any:
        index = pd.read_parquet(source / "index.parquet", columns=["Date", "Close"]).sort_values("Date")
        X = index["Close"].to_numpy(np.float64)
        gap = ta.EMA(X, 5) / ta.EMA(X, 20) - 1
        return pd.DataFrame({"Date": index["Date"], "x": X, "m": change(X, 1), "m5": change(X, 5), "gap": gap})

    def compute(source: Path) -> Features:
        prices = pd.read_parquet(source / "prices.parquet").dropna(subset=["Close"]).sort_values(["Code", "Date"])
        prices = prices.merge(index_table(source), on="Date", how="left")
        factor = prices.groupby("Code", sort=False)["AdjustmentFactor"].cumprod()
        prices[list(QUOTES[:4])] = prices[list(QUOTES[:4])].div(factor, axis=0)
        prices["Volume"] *= factor
        columns = [prices[name].to_numpy(np.float64) for name in (*QUOTES, "TurnoverValue", "x", "m", "m5", "gap")]
        parts = []
        with np.errstate(divide="ignore", invalid="ignore"):
            for rows in prices.groupby("Code", sort=False).indices.values():
                named, indicators = of_stock(*(column[rows[0] : rows[-1] + 1] for column in columns))
                parts.append(np.array([*named.values(), *indicators.values()], np.float32))
        values = np.concatenate(parts, axis=1)
        values[~np.isfinite(values)] = np.nan
        frame = pd.DataFrame(values.T, columns=[*named, *indicators])
        flag = frame.pop("trend_align_mkt")
        sessions = frame.groupby(prices["Date"], sort=False)
        normalised = (frame - sessions.transform("mean")) / sessions.transform("std", ddof=0)
        normalised["trend_align_mkt"] = flag
        return Features(len(normalised), normalised.shape[1], len(named), normalised)

    return Peer(f"TA-Lib {version('ta-lib')}, pandas {version('pandas')}", compute)


# qlib ----------------------------------------------------------------------------------------------------------


def qlib_alpha158() -> Peer:
    """Alpha158's expressions through qlib's own engine, one worker process per core, then its `CSZScoreNorm`.

    qlib reads its own binary files. Writing them is timed separately as `prepare_s`. qlib's caches are off.
    """
    import numpy as np
    import pandas as pd
    import qlib
    from qlib.contrib.data.loader import Alpha158DL
    from qlib.data import D
    from qlib.data.dataset.processor import CSZScoreNorm

    def dump(source: Path, folder: Path) -> Path:
        """A qlib data folder: one calendar, the instruments' first and last day, float32 per stock and field.

        Layout of qlib's own scripts/dump_bin.py, which the wheel lacks: each file begins with the calendar position of
        its first value, and a session without a row is NaN.
        """
        prices = pd.read_parquet(source / "prices.parquet").dropna(subset=["Close"]).sort_values(["Code", "Date"])
        factor = prices.groupby("Code", sort=False)["AdjustmentFactor"].cumprod().to_numpy()
        fields = {name.lower(): prices[name].to_numpy() / factor for name in QUOTES[:4]}
        fields["volume"] = prices["Volume"].to_numpy() * factor
        fields["vwap"] = prices["TurnoverValue"].to_numpy() / fields["volume"]
        calendar = np.unique(prices["Date"].to_numpy().astype("datetime64[D]"))
        session = np.searchsorted(calendar, prices["Date"].to_numpy().astype("datetime64[D]"))
        instruments = []
        for code, rows in prices.groupby("Code", sort=False).indices.items():
            of = slice(rows[0], rows[-1] + 1)
            first, last = session[of][0], session[of][-1]
            instruments.append(f"{code}\t{calendar[first]}\t{calendar[last]}\n")
            target = folder / "features" / code.lower()
            target.mkdir(parents=True)
            for name, column in fields.items():
                content = np.full(last - first + 2, np.nan, "<f4")
                content[0] = first
                content[1 + session[of] - first] = column[of]
                content.tofile(target / f"{name}.day.bin")
        for name, lines in (("calendars/day", [f"{day}\n" for day in calendar]), ("instruments/all", instruments)):
            path = folder / f"{name}.txt"
            path.parent.mkdir()
            path.write_text("".join(lines))
        return folder

    def compute(folder: Path) -> Features:
        qlib.init(
            provider_uri=str(folder),
            region="us",
            kernels=os.cpu_count(),
            expression_cache=None,
            dataset_cache=None,
            logging_level=40,
        )
        fields, names = Alpha158DL.get_feature_config()
        features = D.features(D.instruments("all"), fields, freq="day")
        features.columns = pd.MultiIndex.from_product([["feature"], names])
        normalised = CSZScoreNorm(fields_group="feature")(features)
        workers = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        return Features(len(normalised), len(names), 0, normalised, {"worker_rss_gb": round(workers / 2**20, 3)})

    return Peer(f"pyqlib {version('pyqlib')}, pandas {version('pandas')}", compute, dump)


# One measurement -----------------------------------------------------------------------------------------------


PEERS: dict[str, Callable[[], Peer]] = {
    "atft": atft,
    "floor": floor,
    "polars-talib": polars_talib,
    "talib-pandas": talib_pandas,
    "qlib-alpha158": qlib_alpha158,
}


def measured(name: str, source: Path) -> dict[str, Any]:
    """The figures of one run, or why it was skipped."""
    try:
        peer = PEERS[name]()
    except ModuleNotFoundError as missing:
        return {"peer": name, "skipped": f"{missing.name} is not installed; see bench/features/requirements-*.txt"}
    with tempfile.TemporaryDirectory() as scratch:
        peer.compute(_prepared(peer, _tiny_market(name, Path(scratch, "tiny")), Path(scratch, "warm-up")))
        started = time.perf_counter()
        source = _prepared(peer, source, Path(scratch, "prepared"))
        prepare_s = time.perf_counter() - started
        _reset_peak_rss()
        cpu, started = _cpu_s(), time.perf_counter()
        features = peer.compute(source)
        line = {
            "peer": name,
            "version": peer.version,
            "rows": features.rows,
            "features": features.features,
            "ours": features.ours,
            "wall_s": round(time.perf_counter() - started, 3),
            "cpu_s": round(_cpu_s() - cpu, 3),
            "peak_rss_gb": round(_peak_rss_gb(), 3),
            "cpu_count": os.cpu_count(),
        }
    if peer.prepare:
        line["prepare_s"] = round(prepare_s, 3)
    return line | (features.figures or {})


def _prepared(peer: Peer, source: Path, folder: Path) -> Path:
    if peer.prepare is None:
        return source
    folder.mkdir()
    return peer.prepare(source, folder)


def _tiny_market(name: str, folder: Path) -> Path:
    """A source for the warm-up: the synthetic market for our own features, which read five tables; a random walk for
    peers."""
    if name == "atft":
        from atft_pipeline.market.synthetic import generate_market, write_tables

        write_tables(generate_market(stocks=TINY_STOCKS, sessions=TINY_SESSIONS), folder)
        return folder
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.default_rng(0)
    shape = (TINY_SESSIONS, TINY_STOCKS)
    days = np.arange(TINY_SESSIONS) + np.datetime64("2024-01-01")
    close = 1000 * np.exp(rng.normal(0, 0.02, shape).cumsum(axis=0))
    prices = {
        "Date": np.repeat(days, TINY_STOCKS),
        "Code": [f"{10000 + 10 * n}" for n in range(TINY_STOCKS)] * TINY_SESSIONS,
        "Open": (close * rng.uniform(0.99, 1.01, shape)).ravel(),
        "High": (close * 1.02).ravel(),
        "Low": (close * 0.98).ravel(),
        "Close": close.ravel(),
        "Volume": rng.uniform(1e5, 1e6, close.size),
        "TurnoverValue": rng.uniform(1e8, 1e9, close.size),
        "AdjustmentFactor": np.ones(close.size),
    }
    folder.mkdir()
    pq.write_table(pa.table(prices), folder / "prices.parquet")
    pq.write_table(pa.table({"Date": days, "Close": close.mean(axis=1)}), folder / "index.parquet")
    return folder


def _cpu_s() -> float:
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _reset_peak_rss() -> None:
    # Linux only; elsewhere the peak includes imports, warm-up and preparation.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak_rss_gb() -> float:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("source", type=Path)
    options = parser.parse_args()
    with contextlib.redirect_stdout(sys.stderr):  # libraries that print would spoil the line
        line = measured(options.peer, options.source)
    print(json.dumps(line))


if __name__ == "__main__":
    main()
