"""Why a run came out as it did: diagnostics, experiments, explained failures."""
