"""Scorers: what says how good responses are. One interface (base.py), one file per scorer, `registry.build` makes one."""
