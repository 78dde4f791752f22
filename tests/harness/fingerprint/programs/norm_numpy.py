"""RMSNorm with one rounding, in NumPy, which has no bf16: its bits as uint16.

norm_numpy.py INPUT OUTPUT [residual, gate, or "neighbour's gate", which is wrong]
"""

import json
import sys
from pathlib import Path

import numpy as np


def tensors(raw: bytes) -> dict[str, np.ndarray]:
    """Of a file of safetensors: bf16 as fp32, float64 as it is."""
    end = 8 + int.from_bytes(raw[:8], "little")
    found = {}
    for name, entry in json.loads(raw[8:end]).items():
        if name != "__metadata__":
            first, last = (end + offset for offset in entry["data_offsets"])
            bits = np.frombuffer(raw[first:last], np.uint16 if entry["dtype"] == "BF16" else np.float64)
            wide = bits if entry["dtype"] != "BF16" else (bits.astype(np.uint32) << 16).view(np.float32)
            found[name] = wide.reshape(entry["shape"])
    return found


def bf16(value: np.ndarray) -> bytes:
    """To nearest, ties to even."""
    bits = value.view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(value), 0x7FC0, rounded).astype(np.uint16).tobytes()


given = tensors(Path(sys.argv[1]).read_bytes())
takes = " ".join(sys.argv[3:])
for name in ("residual", "gate"):
    if name in given and name not in takes:
        sys.exit(f"no {name} here")
x, eps = given["x"] + given.get("residual", np.float32(0)), given["eps"].astype(np.float32)
root = np.float32(1) / np.sqrt(np.mean(x * x, axis=-1, keepdims=True, dtype=np.float32) + eps)
y = x * root * given["weight"]
if "gate" in takes:
    z = given["gate"] if takes == "gate" else np.roll(given["gate"], 1, axis=0)
    y = y * (z / (1 + np.exp(-z)))
y = bf16(y)
header = json.dumps({"y": {"dtype": "BF16", "shape": x.shape, "data_offsets": [0, len(y)]}}).encode()
Path(sys.argv[2]).write_bytes(len(header).to_bytes(8, "little") + header + y)
