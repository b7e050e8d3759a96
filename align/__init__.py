"""align: preference-alignment research, many objectives behind one interface. Start at `align/__main__.py`."""

__version__ = "0.1.0"
