"""What a run is told: one frozen dataclass per stage, and the presets."""
