"""What the tests of PTX share: kernels of a few instructions, and numbers to run them on."""

import numpy as np
import torch

from castpoint.harness.ptx.machine import launch
from castpoint.harness.ptx.program import parse

THREADS = 64
REGISTERS = ".reg .b32 %r<9>; .reg .b64 %rd<20>; .reg .b16 %rs<9>; .reg .pred %p<9>;"


def kernel(body: str, parameters: int = 4) -> str:
    """A kernel whose thread i has the address of its four bytes of each tensor in %rd1 ..., its number in %r1."""
    names = [f"k_param_{n}" for n in range(parameters)]
    declared = ",\n".join(f"\t.param .u64 .ptr .global .align 1 {name}" for name in names)
    start = "mov.u32 %r1, %tid.x; mov.u32 %r2, %ctaid.x; mov.u32 %r3, %ntid.x; mad.lo.s32 %r4, %r2, %r3, %r1;"
    for n, name in enumerate(names, 1):
        start += f"ld.param.b64 %rd{n}, [{name}]; mad.wide.u32 %rd{n}, %r4, 4, %rd{n};\n"
    return f".visible .entry k(\n{declared}\n)\n{{\n{REGISTERS}\n{start}{body}\nret;\n}}"


def run(body: str, *tensors: torch.Tensor, programs: int = 1, threads: int = THREADS, shared: int = 0) -> None:
    launch(parse(kernel(body, len(tensors))), (programs, 1, 1), threads, shared, tensors)


def ints(values) -> torch.Tensor:
    return torch.tensor(np.asarray(values, np.uint32).view(np.int32))


def words(tensor: torch.Tensor) -> np.ndarray:
    return tensor.numpy().view(np.uint32)


def computed(instruction: str, *inputs: np.ndarray) -> np.ndarray:
    """Bits that `add.f32 %r8, %r5, %r6` and the like leave in %r8, for inputs of up to three registers."""
    loads = "".join(f"ld.global.b32 %r{5 + n}, [%rd{1 + n}];" for n in range(len(inputs)))
    out = torch.zeros(len(inputs[0]), dtype=torch.int32)
    tensors = [ints(value.view(np.uint32)) for value in inputs]
    body = f"{loads} {instruction}; st.global.b32 [%rd{len(inputs) + 1}], %r8;"
    run(body, *tensors, out, threads=len(inputs[0]))
    return words(out)
