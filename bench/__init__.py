"""Measurements: each prints medians and ratios to a floor that is taken in the same run."""
