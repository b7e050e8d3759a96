"""Intervals, tests and the length-controlled win rate: pure functions."""
