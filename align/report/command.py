"""`python -m align report [folder ...] [out=folder]`: compare the runs in some folders; without a folder, those in runs/.

A folder of links to runs, as a sweep leaves one in runs/groups/, is a report on these. Writes report.html, report.md and
results.csv into `out`; without it, into the folder, or into what several have in common.
"""

import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import align
from align.say import UserError


def report(words: Sequence[str]) -> Path:
    """Read the folders that the words name and write the three files. Returns the page.

    Raises:
        UserError: anything the user can put right.
    """
    from align.report.page import markdown, page
    from align.report.read import read_runs
    from align.report.study import study
    from align.report.text import results_csv, size

    options = dict(word.split("=", 1) for word in words if "=" in word and not Path(word).exists())
    if unknown := options.keys() - {"out"}:
        raise UserError(
            f"unknown option {', '.join(sorted(unknown))}: python -m align report [folder ...] [out=folder]"
        )
    folders = [Path(word).expanduser() for word in words if "=" not in word or Path(word).exists()] or [Path("runs")]
    made = study(read_runs(folders))
    common = Path(os.path.commonpath([folder.resolve() for folder in folders]))
    out = Path(options["out"]).expanduser() if "out" in options else common
    when = f"Made by align {align.__version__} on {datetime.now(UTC):%Y-%m-%d %H:%M} UTC."
    files = {"report.html": page(made, when), "report.md": markdown(made, when), "results.csv": results_csv(made)}
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (out / name).write_text(content, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {out} ({error.strerror}): give another out=") from error
    print(size(made))
    for name in files:
        print(out / name)
    return out / "report.html"
