"""Benches by stage: what the pipeline costs, what it learns, and what its diagnosis finds.

Run them from the root of the checkout, as `python -m bench.STAGE.NAME`.
"""
