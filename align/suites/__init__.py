"""Suites: what a trained run is measured by afterwards. What one is: base.py; one file each, found by its kind."""
