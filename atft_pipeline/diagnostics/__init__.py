"""Why a run got the Sharpe it got: signals, rules, causes, probes, experiments, report."""
