"""Run the Triton kernels without a GPU: a program of its own, since triton decides at its import how it runs.

``TRITON_INTERPRET=1 python -m tests.count.triton_program count 0 600`` counts random cases in triton's interpreter;
``watch`` in place of ``count 0 600`` watches a network whose tensors the kernels count. ``compile``, without the
variable, makes the machine code of the kernels for three GPUs.
"""

from __future__ import annotations

import re
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from neuronscope.count.kernel_plan import plan_for
from neuronscope.count.neuron_layout import NeuronLayout
from tests.count.device_cases import case, check

#: Several tensors of each shape that a plan tells apart, with the sizes of real networks; on `meta`, so without memory.
SHAPES = {
    "rows": ((8192, 3072), 1, torch.contiguous_format),
    "images": ((64, 256, 56, 56), 1, torch.contiguous_format),
    "channels last": ((64, 256, 56, 56), 1, torch.channels_last),
    "small maps": ((64, 2048, 7, 7), 1, torch.contiguous_format),
    "one neuron": ((4096, 1), 1, torch.contiguous_format),
    "one position": ((1, 4096), 1, torch.contiguous_format),
    "one number": ((1, 1), 1, torch.contiguous_format),
}
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


def patch_once() -> None:
    """Have the interpreter replace a function's language before its first call by a kernel, and not before each.

    It never puts back what it replaced for such a function, and to look for it took two fifths of the time.
    """
    from triton.runtime.interpreter import InterpretedFunction

    with_patches, known = InterpretedFunction.__call__, set()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.fn in known:
            return self.rewrite()(*args, **kwargs)
        known.add(self.fn)
        return with_patches(self, *args, **kwargs)

    InterpretedFunction.__call__ = call


def count(first: int, last: int) -> None:
    """Count cases with many and few programs; the sums of magnitudes have the same bits each time."""
    from neuronscope.count.pieces import Pieces
    from neuronscope.count.triton_counting import TritonKernels

    class NoPieces(Pieces):
        def count(self, *args: Any) -> None:
            raise AssertionError("the kernels do not count this tensor")

    backends = [TritonKernels(programs, NoPieces()) for programs in (1, 7, 64, 1024)]
    for number in range(first, last):
        one, backend = case(number), backends[number % len(backends)]
        sums = [check(backend, one, captured=captured) for captured in (False, True)[: 1 + (number % 5 == 0)]]
        assert all(torch.equal(sums[0], each) for each in sums)
    print(f"{last - first} cases agree")


def watch() -> None:
    """Watch a network on the CPU whose tensors go the way of those on a GPU, and compare with the CPU's own counts."""
    import neuronscope as ns
    from neuronscope.count import backends, counter_tensors
    from neuronscope.count.triton_counting import TritonKernels

    def census(on_device: bool) -> Any:
        torch.manual_seed(0)
        net = nn.Sequential(
            *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Flatten()),
            *(nn.Linear(8 * 36, 16), nn.GELU(), nn.Linear(16, 4)),
        )
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        if on_device:
            backends._used["cpu"] = backends.Backend("cpu", TritonKernels())
            torch.Tensor.is_cpu = property(lambda self: False)
            counter_tensors._SEEN_BY_HOST = "nowhere"
        try:
            with ns.watch(net) as scope:
                for _ in range(3):
                    F.cross_entropy(net(torch.randn(5, 3, 8, 8)), torch.arange(5) % 4).backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    scope.step()
            assert not scope.report().not_measured
            return scope.census()
        finally:
            if on_device:
                del torch.Tensor.is_cpu
                assert backends._used["cpu"].kernels is not None, backends._used["cpu"].reason

    here, there = census(False), census(True)
    assert list(here) == list(there) == ["1/relu", "4/gelu"]
    for name, tally in here.items():
        other = there[name]
        for field in ("zero_outputs", "zero_gradients", "last_active_step", "first_active_step"):
            assert getattr(tally, field).tolist() == getattr(other, field).tolist(), (name, field)
        for field in ("positions", "gradient_positions", "examples", "not_finite"):
            assert getattr(tally, field) == getattr(other, field), (name, field)
        torch.testing.assert_close(*(torch.from_numpy(each.abs_sum) for each in (tally, other)), rtol=1e-6, atol=0)
    print("the network's counts agree")


def compile_kernels() -> None:
    """Compile the kernels for three GPUs: they load 128 bits at once and flush no subnormal number to zero."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from neuronscope.count.triton_kernels import add_shares, count_share

    def source(kernel: Any, types: dict[str, str], values: dict[str, Any]) -> Any:
        """As triton specializes a call: an argument of 1 is a constant, one that 16 divides is known as such."""
        fixed = {name: value for name, value in values.items() if name.isupper() or value == 1}
        signature = {name: "constexpr" if name in fixed else types.get(name, "i32") for name in kernel.arg_names}
        aligned = {
            (place,): [["tt.divisibility", 16]]
            for place, name in enumerate(kernel.arg_names)
            if name not in fixed and (signature[name].startswith("*") or (name in values and values[name] % 16 == 0))
        }
        return ASTSource(fn=kernel, signature=signature, constexprs=fixed, attrs=aligned)

    def share_source(kind: str, dtype: str, outputs: bool, masked: bool) -> Any:
        shape, axis, order = SHAPES[kind]
        tensor = torch.empty(shape, device="meta", dtype=TYPES[dtype]).contiguous(memory_format=order)
        plan = plan_for(tensor, NeuronLayout(axis), None)
        types = {"tensor": f"*{dtype}", "keep": "*u8", "counts": "*i32", "kept": "*i32", "tolerance": "i64"}
        types["sums"] = "*fp64" if dtype == "fp64" else "*fp32"
        values: dict[str, Any] = dict(zip(("row", "inner_units"), plan.neuron_sizes))
        values.update(zip(("outer_unit_stride", "unit_stride"), plan.neuron_strides))
        values.update(zip(("size_b", "size_c", "size_d"), plan.sizes[1:]))
        values.update(zip((f"stride_{each}" for each in "abcd"), plan.strides))
        values.update(zip((f"keep_{each}" for each in "abcd"), plan.keep_strides))
        values.update(OUTPUTS=outputs, EXACT=outputs, MASKED=masked, ALONG=plan.along, KEEP_ALONG=False, HEADS=False)
        values.update(POSITIONS=plan.tile[0], UNITS=plan.tile[1])
        values.update(tiles=plan.tiles, positions=plan.positions // plan.fold)
        return source(count_share, types, values)

    def sum_source(outputs: bool, captured: bool) -> Any:
        longs = ("zeros_of", "not_finite", "last_active", "first_active", "traced", "clock")
        types = {"counts": "*i32", "kept": "*i32", "sums": "*fp32", "abs_sum": "*fp64", **dict.fromkeys(longs, "*i64")}
        values = {"OUTPUTS": outputs, "MASKED": captured, "CAPTURED": captured, "SHARES": 1024, "ROWS": 64, "UNITS": 16}
        return source(add_shares, types, values)

    compiled = 0
    for target in (GPUTarget("cuda", 80, 32), GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64)):
        cases = [(kind, "bf16", True, False) for kind in SHAPES]
        cases += [("rows", "fp32", True, True), ("rows", "fp64", True, False), ("rows", "fp16", False, False)]
        if target.arch == 90:
            cases += [("images", "bf16", True, True), ("rows", "bf16", False, False)]
        for each in cases:
            made = triton.compile(share_source(*each), target=target, options={"num_warps": 8})
            code = made.asm["ptx" if target.backend == "cuda" else "amdgcn"]
            wide = r"ld\.global\.(v4\.b32|v2\.b64)" if target.backend == "cuda" else "global_load_dwordx4"
            if not each[0].startswith("one"):
                assert re.search(wide, code), (target, each)
            assert ".ftz" not in code, (target, each)
            if target.backend == "hip":  # 3: subnormal numbers stay, in operands and results
                assert re.search(r"\.amdhsa_float_denorm_mode_32 3\b", code), each
            compiled += 1
        for outputs, captured in ((True, False), (True, True), (False, False)):
            triton.compile(sum_source(outputs, captured), target=target, options={"num_warps": 4})
            compiled += 1
    print(f"{compiled} kernels compiled")


if __name__ == "__main__":
    if sys.argv[1] != "compile":
        patch_once()
    if sys.argv[1] == "count":
        count(*map(int, sys.argv[2:]))
    else:
        {"watch": watch, "compile": compile_kernels}[sys.argv[1]]()
