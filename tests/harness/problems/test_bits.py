"""Drawn inputs are the same bits on every instruction set and number of threads."""

import os
import subprocess
import sys

import pytest
import torch

from castpoint.harness.cases.elementwise import angles, indexer_outputs
from castpoint.harness.cases.inputs import calibrated, normal
from castpoint.harness.fingerprint import probes
from castpoint.harness.problems.drawn import digest, ordered_sum, synthetic_problem, with_positions
from castpoint.harness.problems.streams import with_published_stream
from castpoint.kernels.plan import DEFAULT
from castpoint.variants.problem import Problem
from castpoint.variants.spec import with_table

# Of synthetic_problem(layer=layer), layers 0 to 27 of qwen3-0.6b with the seed and the 128 tokens of published figures.
LAYERS = """
385dd475c055 ff163cc65635 d3ad31955910 7524a1b4ffbf b1c58ca8490e 7d82932dc828 ceebfd541725
ce256c0c37d4 e5de569c662e a91cc0c4648f ab6a1f9ab7b0 23b32672cb5f 434e851abb7b de632dabb8b8
53155b19001c c7bc0b3c1641 f1e6fe59fc85 01daab564ba3 80cc5d3cb88a 8b5df2c09bc6 29ed147f5eb4
19ba1624dde9 87e2f12dfd7c 1afc653b0f83 a9af828cd6ac 1f616c8db226 25850c26f194 88a7aaf8b6b1
""".split()
# Rotated problems: QKV bias; norm weights stored as w - 1; another D. A published stream. Then what cases and
# fingerprints draw.
OTHERS = {
    "qwen2.5-0.5b": "0bff77c9b652",
    "gemma-3-270m": "8cb0f1445c97",
    "qwen3-1.7b": "53a7f11923b6",
    "published": "2d18c54ee213",
    "cases": "a2be9db3ebfe",
    "probes": "cf7bf927db2e",
}


def digest_of(problem: Problem) -> str:
    return digest(value for value in vars(problem).values() if torch.is_tensor(value))


def found(name: int | str) -> str:
    """The digest of a layer of qwen3-0.6b, or of one of OTHERS."""
    rng = torch.Generator().manual_seed(0)
    if isinstance(name, int):
        return digest_of(synthetic_problem(layer=name))
    if name == "published":
        return digest_of(with_published_stream(synthetic_problem("qwen3-1.7b", 3, 16), 0))
    if name == "cases":
        return digest(
            [normal(rng, 64, 512), calibrated(3)(rng, 512), angles(rng, 64, 128), indexer_outputs(rng)[0]["value"]]
        )
    if name == "probes":
        rows = probes.norm_rows(1024, rng)
        return digest([rows.x, rows.weight, probes.norm_weight(1 << 16, rng), probes.gaussian([64, 512], rng)])
    return digest_of(with_table(DEFAULT, with_positions(synthetic_problem(name, 5))))


@pytest.mark.parametrize("layer", range(28))
def test_every_layer_is_drawn_as_on_every_other_machine(layer: int) -> None:
    assert found(layer) == LAYERS[layer]


@pytest.mark.parametrize("name", OTHERS)
def test_other_models_cases_and_probes_too(name: str) -> None:
    assert found(name) == OTHERS[name]


def test_neither_instruction_set_nor_libm_nor_threads_change_a_bit() -> None:
    """In a process of its own, since they are asked for once. glibc without fused multiply-adds moves last bits in
    float64. On Arm the threads alone are others."""
    held = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"}
    held |= {"GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX2,-FMA,-FMA4,-AVX512F"}
    command = [sys.executable, __file__, "3"]
    run = subprocess.run(command, env=os.environ | held, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == LAYERS + list(OTHERS.values())


def test_the_ordered_sum_is_a_sum() -> None:
    for size in (0, 1, 2, 3, 7, 64, 1000):
        values = torch.arange(size, dtype=torch.float64) + 1
        assert ordered_sum(values) == size * (size + 1) / 2
    assert ordered_sum(torch.ones(3, 5, 7)) == 105


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[1]))
    print(*(found(name) for name in (*range(28), *OTHERS)))
