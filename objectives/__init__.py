"""Preference objectives: one file each, one interface (`base.Objective`), found by name (`registry.build`).

Importing this package imports every objective file beside it, so that a new file registers itself by being
there. Needs torch and the standard library only; knows nothing of models, data, Hydra or processes.
"""

import importlib
import pkgutil

from objectives.base import MissingStatistic, Objective, PairLoss, Response
from objectives.registry import available, build, load_file, register

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["MissingStatistic", "Objective", "PairLoss", "Response", "available", "build", "load_file", "register"]
