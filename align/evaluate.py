"""`python -m align.evaluate run=<run folder> suite=<suite> ...`: measure a trained run by a suite (align/suites/).

The words are those of conf/evaluate.yaml. What is found goes into <run>/evaluation/<suite.name>, the run's tracker and the
model card. `-m run=a,b suite=judge,pairs` evaluates several. Left out: training, and what runs say of each other (report).
"""

from align.__main__ import main
from align.suites.settings import EvaluateConfig

if __name__ == "__main__":
    main("align.suites.evaluate:evaluate", root="evaluate", schema=EvaluateConfig)
