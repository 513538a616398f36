"""ATFT-GAT-FAN: one file per published layer, composed in `atft_gat_fan`."""

from atft_pipeline.model.atft_gat_fan import ATFTGATFAN

__all__ = ["ATFTGATFAN"]
