"""What wandb has written to disk, without its own reader."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path


def read_offline(folder: Path) -> list[dict]:
    """The offline wandb runs under a folder, in the order they began, one for each stretch. LevelDB's log framing, protobuf."""
    import wandb
    from wandb.proto import wandb_internal_pb2 as protocol

    wandb.teardown()  # its service writes behind the end of a run

    def values(items) -> dict:
        return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}

    runs = []
    for file in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        made: dict = {"config": {}, "history": [], "summary": {}, "metrics": {}, "exit": None, "folder": file.parent}
        for raw in _records(file.read_bytes()):
            record = protocol.Record.FromString(raw)
            match record.WhichOneof("record_type"):
                case "run":
                    made["run"] = record.run
                    made["config"] |= values(record.run.config.update)
                case "history":
                    made["history"].append(values(record.history.item))
                case "summary":
                    made["summary"] |= values(record.summary.update)
                case "metric":
                    made["metrics"][record.metric.name or record.metric.glob_name] = record.metric
                case "exit":
                    made["exit"] = record.exit.exit_code
        runs.append(made)
    return runs


def _records(raw: bytes) -> Iterator[bytes]:
    """What the blocks of 32 KiB hold; a record that crosses their bounds comes in parts: 2 first, 3 middle, 4 last."""
    position, part = 7, b""
    while position + 7 <= len(raw):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, size, kind = struct.unpack("<IHB", raw[position : position + 7])
        part += raw[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):
            yield part
            part = b""
