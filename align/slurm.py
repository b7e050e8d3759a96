"""stub"""
from pathlib import Path
from typing import Any
def submit(folder: Path, config: dict[str, Any]) -> None: ...
