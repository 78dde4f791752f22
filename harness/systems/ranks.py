"""A rank of a split decoder as a process: what it sends, what it runs, what it writes."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from castpoint.harness.runs.torchrun import Beat, as_rank
from castpoint.harness.systems.shards import Run, Shard, load
from castpoint.harness.systems.weights import opened

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Job:
    """What every rank runs: ids, the last `decoded` of them one at a time; each of the dtypes and reduces, so often."""

    source: str
    ids: list[int]
    decoded: int
    dtypes: list[str]
    reduces: list[str]
    repeats: int


class Joined:
    """shards.Ranks over torch.distributed. sent: bytes that this rank sends; of an all-reduce, what its ring takes,
    2 (R - 1) / R of the tensor, which is arithmetic and no measurement."""

    def __init__(self) -> None:
        self.rank, self.ranks, self.sent = dist.get_rank(), dist.get_world_size(), 0.0

    def add(self, x: Tensor) -> Tensor:
        self.sent += 2 * (self.ranks - 1) / self.ranks * x.nbytes
        x = x.contiguous()
        dist.all_reduce(x)
        return x

    def swap(self, x: Tensor, other: int) -> Tensor:
        self.sent += x.nbytes
        got = torch.empty_like(x)
        both = [dist.P2POp(dist.isend, x.contiguous(), other), dist.P2POp(dist.irecv, got, other)]
        for work in dist.batch_isend_irecv(both):
            work.wait()
        return got

    def gather(self, x: Tensor) -> list[Tensor]:
        self.sent += (self.ranks - 1) * x.nbytes
        parts = [torch.empty_like(x) for _ in range(self.ranks)]
        dist.all_gather(parts, x.contiguous())
        return parts


def run(folder: Path, job: Job, device: str, beat: Beat) -> None:
    """Writes of each dtype and reduce what this rank computed and how long it took."""
    weights, joined = opened(job.source), Joined()
    for dtype in job.dtypes:
        shard = load(weights, joined.rank, joined.ranks, DTYPES[dtype], device, beat)
        for reduce in job.reduces:
            beat(f"{reduce} in {dtype}")
            shard.prepare(reduce)
            _one(job, folder / f"{dtype}-{reduce}-{joined.rank}", shard, Joined(), reduce, beat)


def _one(job: Job, path: Path, shard: Shard, ranks: Joined, reduce: str, beat: Beat) -> None:
    prompt, more = job.ids[: -job.decoded], job.ids[-job.decoded :]
    kept: dict[str, Tensor] = {}

    def keep(stage: str, layer: int, value: Tensor) -> None:
        kept.setdefault(f"{stage}.{layer}", value.clone())  # of the prompt, which comes first

    first = Run(shard, ranks, reduce, keep, beat)
    logits = [first.forward(prompt)]
    sent = ranks.sent
    logits += [first.forward([one]) for one in more]
    times: dict[str, list[float]] = {"prefill": [], "decode": []}
    for _ in range(job.repeats):
        again = Run(shard, ranks, reduce, beat=beat)
        times["prefill"].append(_timed(lambda again=again: again.forward(prompt)))
        times["decode"] += [_timed(lambda again=again, one=one: again.forward([one])) for one in more]
    if ranks.rank == 0:
        kept["logits"] = torch.cat(logits)
    save_file({name: value.contiguous().cpu() for name, value in kept.items()}, path.with_suffix(".safetensors"))
    facts = {"times": times, "sent": sent, "read": shard.read, "kv": [shard.part.kv.start, shard.part.kv.stop]}
    path.with_suffix(".json").write_text(json.dumps(facts))


def _timed(forward: Callable[[], Tensor]) -> float:
    """Seconds from when all ranks are there to when this one has the logits."""
    dist.barrier()
    start = time.perf_counter()
    forward()[0, 0].item()  # waits for a GPU
    return time.perf_counter() - start


if __name__ == "__main__":
    where = Path(sys.argv[1])
    sys.exit(as_rank(where, lambda job, device, beat: run(where, Job(**job), device, beat)))
