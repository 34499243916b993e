"""Compile the Triton kernels of a module for absent GPUs: `python tests/ops/aot.py MODULE [CAPABILITY ...]`.

The module's own host code launches them, on tensors of a CPU, so that what is compiled is what a GPU would be asked to
run. A driver that only names a GPU takes the launches, which end after compilation. Not under TRITON_INTERPRET.

Prints what each kernel needs, and fails if one needs more shared memory than a program can have, or might overwrite
what a product still reads.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # of one program, by compute capability
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class NoGPU:
    """What a launch asks of Triton's driver."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability  # keeps the kernels of different targets apart

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


def descents() -> Iterator[None]:
    """Every kernel of `fff.ops.tree_route.triton`, in all types and with and without what may be left out."""

    def descend(dtype, rows, in_features, depth, num_trees, levels, *, all_inputs=True):
        nodes = num_trees * (2**depth - 1)
        x, weight = torch.zeros(rows, in_features, dtype=dtype), torch.zeros(nodes, in_features, dtype=dtype)
        bias = torch.zeros(nodes, dtype=dtype) if all_inputs else None
        decision_bias = torch.zeros(nodes) if all_inputs else None
        flip = torch.zeros(rows, num_trees, depth, dtype=torch.bool) if all_inputs else None
        call = num_trees, depth, levels
        logit, _ = torch.ops.fff.triton_descend(x, weight, bias, decision_bias, flip, *call)
        index = torch.zeros(rows, num_trees, dtype=torch.int64)
        torch.ops.fff.triton_descend_backward(logit, x, weight, index, *call, True, True, all_inputs)

    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        yield descend(dtype, 100, 768, 9, 2, 7)
        yield descend(dtype, 8192, 1536, 9, 1, None)
    torch.set_float32_matmul_precision("high")
    yield descend(torch.float32, 100, 768, 7, 2, 7)
    torch.set_float32_matmul_precision("highest")
    yield descend(torch.float16, 7, 97, 3, 1, 2, all_inputs=False)  # odd sizes, which no load can rely on
    yield descend(torch.float16, 1, 1, 1, 1, 0)  # integers that are 1 become constants


def dispatches() -> Iterator[None]:
    """Every kernel of `fff.ops.expert_mlp.triton`, in all types, for narrow experts and for the widest."""

    def dispatch(dtype, rows, width, choices, activation, glu, *, all_inputs=True, keep=True):
        experts, in_features, out_features = 4, 768, 512
        x, index = torch.zeros(rows, in_features, dtype=dtype), torch.zeros(rows, choices, dtype=torch.int64)
        gate, b_in, b_out = (
            torch.zeros(shape, dtype=dtype) if all_inputs else None
            for shape in ((rows, choices), (experts, width * (1 + glu)), (experts, out_features))
        )
        w_in = torch.zeros(experts, width * (1 + glu), in_features, dtype=dtype)
        weights = w_in, b_in, torch.zeros(experts, width, out_features, dtype=dtype), b_out
        y, *kept = torch.ops.fff.triton_expert_mlp(x, index, gate, *weights, activation, glu, keep)
        need = [True, all_inputs, True, all_inputs, True, all_inputs]
        torch.ops.fff.triton_expert_mlp_backward(y, x, index, gate, *weights, *kept, activation, glu, need)
        torch.ops.fff.triton_expert_mlp_single(x, index, gate, *weights, activation, glu)

    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        yield dispatch(dtype, 1000, 32, 2, "gelu", True)
        yield dispatch(dtype, 1000, 256, 1, "relu", False)
        yield dispatch(dtype, 2100, 32, 1, "gelu", False)  # many choices of each expert
        yield dispatch(dtype, 100, 32, 1, "gelu", False)
    for width in (64, 128):
        yield dispatch(torch.bfloat16, 1000, width, 1, "gelu_tanh", False)
    yield dispatch(torch.float16, 7, 3, 1, "silu", False, all_inputs=False, keep=False)
    torch.set_float32_matmul_precision("high")
    yield dispatch(torch.float32, 1000, 32, 1, "relu2", True)
    torch.set_float32_matmul_precision("highest")


LAUNCHES = {"fff.ops.tree_route.triton": descents, "fff.ops.expert_mlp.triton": dispatches}


def resources(kernel: triton.compiler.CompiledKernel) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", file.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {name: int(value) for name, value in re.findall(r"\b(REG|STACK):(\d+)", listing)}
    return {"shared": kernel.metadata.shared, "registers": usage["REG"], "stack": usage["STACK"]}


def races(kernel: triton.compiler.CompiledKernel) -> list[str]:
    """Blocks in shared memory that an asynchronous product reads while they are loaded from elsewhere too: Triton 3.6
    takes such a block for free as soon as that load is done, and refills it under the product."""
    code = kernel.asm["ttgir"]
    source = dict(re.findall(r"(%\w+) = ttg\.memdesc_\w+ (%\w+)", code))  # views: a slot of a buffer, its transpose

    def buffer(name: str) -> str:
        return buffer(source[name]) if name in source else name

    read = {buffer(operand) for pair in products(kernel) for operand in pair}
    return sorted(read & set(map(buffer, re.findall(r"local_load (%\w+)", code))))


def products(kernel: triton.compiler.CompiledKernel) -> list[tuple[str, str]]:
    """Operands of each asynchronous product, as they stand in the code."""
    return re.findall(r"(?:warp_group_dot|tc_gen5_mma) (%\w+)(?:\[[^]]*\])?, (%\w+)", kernel.asm["ttgir"])


def main(module: str, *capabilities: str) -> int:
    functions = {name: f for name, f in vars(importlib.import_module(module)).items() if isinstance(f, JITFunction)}
    compiled = {}
    run = JITFunction.run

    def compile_alone(self, *args, grid, warmup, **options):
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        compiled[kernel.hash] = kernel

    JITFunction.run = compile_alone
    failures = 0
    for capability in map(int, capabilities or SHARED_BYTES):
        driver.set_active(NoGPU(capability))
        compiled.clear()
        for _ in LAUNCHES[module]():
            pass
        # Were they renamed, no race would be found any more. The kernel for many rows and nodes has one.
        if capability >= 90 and "tree_route" in module and not any(map(products, compiled.values())):
            failures += 1
            print(f"sm_{capability}: NO ASYNCHRONOUS PRODUCT FOUND")
        for kernel in compiled.values():
            needs = resources(kernel)
            fits = needs["shared"] <= SHARED_BYTES[capability]
            raced = races(kernel)
            failures += not fits or bool(raced)
            complaint = "" if fits else "TOO MUCH SHARED MEMORY"
            print(f"sm_{capability} {kernel.name}", needs, complaint, *[f"RACE FOR {name}" for name in raced])
    left_out = [name for name, function in functions.items() if function.hash is None]  # has one once it was compiled
    print("never launched:", *left_out or ["none"])
    return failures + len(left_out)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
