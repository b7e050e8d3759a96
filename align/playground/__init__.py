"""The built-in task: an instruction a program can judge, a tokenizer and a fit that make a start model for it.

What runs when a newcomer types `python -m align`: no network, no account, no GPU. Nothing outside this folder knows
of it; `conf/model/tiny.yaml` and `conf/dataset/playground.yaml` name its functions, as they could name yours.
"""
