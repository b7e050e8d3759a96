"""`align ...` and `python -m align ...`: a run, or a verb and its words. A newcomer starts reading here."""

import sys

from align.cli.command import Sweep, job_of, one_line_errors
from align.say import UserError, closest, resolve

HELP = """align: train a policy on preference pairs, judge it, compare runs.

  align                                        the built-in task: a few minutes on a CPU, no network, no account
  align objective=wpo model=gemma2_9b          a run; plan=true prints what would run, --cfg job all its knobs
  align -m objective=dpo,simpo,wpo seed=1,2,3  a sweep: a run for each combination
  align VERB ...                               a verb; align VERB --help explains it
"""

#: Verb -> its purpose, and the function that takes its words, whose module says what they are.
TOOLS = {
    "report": ("compare finished runs on one page", "align.report.page:report"),
    "dashboard": ("lay out a wandb project for comparing runs", "align.tracking.dashboard:dashboard"),
}

#: Verb -> its purpose, the function that gets its composed configuration, the YAML of conf/, and the type of that.
STAGES = {
    "evaluate": (
        "run=<folder> suite=<suite>: put a finished run through a suite",
        "align.evaluation.evaluate:evaluate",
        "evaluate",
        "align.evaluation.settings:EvaluateConfig",
    ),
    "sample": ("run_dir=<folder>: answer the prompts of the dataset into that folder", "align.runs.stages:sample"),
    "annotate": ("run_dir=<folder> scorer=<scorer>: score the answers there", "align.runs.stages:annotate"),
    "select": ("run_dir=<folder>: choose the pairs to train on from the scores there", "align.runs.stages:select"),
}


def main() -> None:
    """Entry point of the console script and of `python -m align`."""
    verbs = {**TOOLS, **STAGES}
    verb = sys.argv[1] if len(sys.argv) > 1 else ""
    if verb in verbs:
        del sys.argv[1]
    elif verb and "=" not in verb and not verb.startswith("-"):
        sys.exit(
            f"align: there is no verb {verb!r}{closest(verb, list(verbs))}: the verbs are {', '.join(verbs)}; "
            "the words of a run are key=value"
        )
    if verb in TOOLS:
        _use(TOOLS[verb][1], sys.argv[1:])
        return
    listed = "".join(f"\n  {name:<10} {purpose}" for name, (purpose, *_) in verbs.items())
    purpose, *stage = STAGES.get(verb, ("",))
    sweep = Sweep()
    with one_line_errors(sweep):
        job_of(sweep, f"align {verb} {purpose}\n" if stage else f"{HELP}{listed}\n", *stage)()


def _use(tool: str, words: list[str]) -> None:
    function = resolve(tool, "verb")
    if {"-h", "--help"} & {*words}:
        print(sys.modules[function.__module__].__doc__)
        return
    try:
        function(words)
    except UserError as error:
        sys.exit(f"align: {error}")


if __name__ == "__main__":
    main()
