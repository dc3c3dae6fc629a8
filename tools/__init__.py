"""Measurements and checks that are no part of the package: `python -m tools.NAME`."""
