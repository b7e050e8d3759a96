"""align: preference-alignment research, many objectives behind one interface. Start at `align/__main__.py`."""

import logging

__version__ = "0.1.0"

# Where DeepSpeed is installed, accelerate imports it for every run, and it warns of the accelerator it has not found.
logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
