"""What measuring and reporting share: the rows, their names and their sizes. Knows nothing of processes or files."""
import json
import re
KIB, MIB = 1 << 10, 1 << 20
TOTAL = 64 * MIB
BLOCKS = [64 * MIB, MIB, 32 * KIB, 4 * KIB]
BULK = [(op, TOTAL, block) for block in BLOCKS for op in ("write", "read")]
SMALL = [("write", 4 * KIB, 4 * KIB), ("read", 4 * KIB, 4 * KIB)]
CPU_ROWS = [("write", TOTAL, TOTAL), ("read", TOTAL, TOTAL), ("write", TOTAL, 4 * KIB)]
STREAMS = [1, 2, 4]
# Mooncake fails ("the transfer failed") above a few thousand blocks a call; it gets a smaller transfer of the same blocks.
MOONCAKE_TOTAL = {4 * KIB: 4 * MIB}
NAMES = {"raw": "raw TCP", "ours": "ours", "nixl": "NIXL + UCX", "mooncake": "Mooncake"}
# Cores that others may use while a system has its turn.
UNDISTURBED = 0.3


def baselines(results):
    """The systems that ours is compared with and that were measured, besides raw TCP."""
    return [s for s in ("nixl", "mooncake") if results.get(s)]


def show_size(n):
    return f"{n // MIB} MiB" if n % MIB == 0 else f"{n // KIB} KiB"


def row_name(op, total, block):
    if block == total:
        return f"{show_size(total)} {op.upper()}"
    return f"{total // block} x {show_size(block)} {op.upper()}" + (" scattered" if block < MIB else "")


def as_json(document):
    """A run as JSON, one line a row, so that differences can be read."""
    text = json.dumps(document, indent=1)
    text = re.sub(r"\[[^][{}]*\]", lambda found: " ".join(found[0].split()), text)
    return re.sub(r"\{[^{}]*\}", lambda found: " ".join(found[0].split()), text) + "\n"
