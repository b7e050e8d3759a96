"""The built-in task: an instruction that a program can judge, and a tokenizer and a fit for its start model.

`python -m align` runs it without network, account or GPU. No code outside this folder refers to it:
`conf/model/tiny.yaml` and `conf/dataset/playground.yaml` name its functions, as they could name yours.
"""
