"""`align ...` and `python -m align ...`: a run, or a verb and its words. A newcomer starts reading here.

align objective=wpo model=gemma2_9b        a run
align report runs                          a verb; `align VERB --help` explains it
"""

import sys

from align.cli.command import command
from align.say import resolve

#: Verbs that have words of their own.
_TOOLS = {"report": "align.report.command:main", "dashboard": "align.tracking.dashboard:main"}

#: Verbs whose words are Hydra's -> the function that does it, the YAML of conf/ that is composed, and its type.
_STAGES = {
    "evaluate": ("align.evaluation.evaluate:evaluate", "evaluate", "align.evaluation.settings:EvaluateConfig"),
    "sample": ("align.cli.stages:sample", "config", "align.config:RunConfig"),
    "annotate": ("align.cli.stages:annotate", "config", "align.config:RunConfig"),
    "select": ("align.cli.stages:select", "config", "align.config:RunConfig"),
}


def main() -> None:
    """Entry point of the console script and of `python -m align`."""
    verb = sys.argv[1] if len(sys.argv) > 1 else ""
    if verb in _TOOLS:
        del sys.argv[1]
        resolve(_TOOLS[verb], verb)()
    elif verb in _STAGES:
        del sys.argv[1]
        command(*_STAGES[verb])
    elif verb and "=" not in verb and not verb.startswith("-"):
        sys.exit(
            f"align: there is no verb {verb!r}: a run is typed in key=value words, a verb is one of {', '.join([*_TOOLS, *_STAGES])}"
        )
    else:
        command()


if __name__ == "__main__":
    main()
