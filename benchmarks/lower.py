"""What torch makes of the training step for an H100, found without one: `python -m benchmarks.lower`.

A CUDA build of torch and a C compiler are needed, and no GPU: tensors are fake, stand-ins answer where CUDA would, and
nothing is run. The step of packs that differ in what they hold is lowered by Dynamo, AOT autograd and Inductor. It must
give one graph, float32 where the design asks for it, and a gradient for every parameter. Our own Triton kernels are
compiled for sm_90a, which needs Triton alone (`--only own`).

The table counts each kernel's bytes as Inductor does (every tensor read and written once) and the operations of its
products, and gives the time that these take at 3 TB/s and 0.8 PFLOP/s, whichever is longer: computed, not measured.

Shape letters: T tokens, H heads, d head width.
"""

import argparse
import copy
import math
import os
import re
import subprocess
import sys
import tempfile
import types
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mode
from unittest import mock

import torch
from torch._functorch import config as functorch
from torch._subclasses import fake_tensor

import amoe
import train
from benchmarks.measure import ROOT, record
from benchmarks.speed import mixed_shapes, random_pack, random_spaces
from common.process import Process
from kernels import moe as moe_file
from kernels import triton
from kernels.attention import BLOCK, mask_blocks

DEVICE = torch.device("cuda", 0)
BYTES_PER_S, FLOPS_PER_S = 3e12, 0.8e15  # of an H100, as kernels reach them

# ---- a machine with an H100, to those who ask ----

STAND_INS = """
int cudaGetDeviceCount(int *n) { *n = 1; return 0; }
int cudaGetDevice(int *n) { *n = 0; return 0; }
int cudaStreamIsCapturing(void *stream, int *n) { *n = 0; return 0; }
"""
# These do nothing and answer 0, and so do the driver's functions that torch's library names.
SILENT = {"cudaSetDevice", "cudaGetLastError", "cudaPeekAtLastError", "cudaDeviceGetStreamPriorityRange"}
H100 = types.SimpleNamespace(
    name="NVIDIA H100 80GB HBM3", gcnArchName="", major=9, minor=0, total_memory=80 << 30, multi_processor_count=132,
    max_threads_per_multi_processor=2048, regs_per_multiprocessor=65536, warp_size=32, L2_cache_size=50 << 20,
    shared_memory_per_block_optin=232448, max_threads_per_block=1024,
)  # fmt: skip


def run_with_stand_ins(words):
    """This command in a process that finds one CUDA device; its exit status."""
    with tempfile.TemporaryDirectory() as folder:
        library, wants_driver = Path(folder, "libcuda.so.1"), Path(torch.__file__).parent / "lib/libcaffe2_nvrtc.so"
        silent = SILENT | set(re.findall(r"\0(cu[A-Z]\w+)", wants_driver.read_text("latin-1")))
        code = STAND_INS + "".join(f"int {name}() {{ return 0; }}\n" for name in silent)
        build = ["cc", "-w", "-shared", "-fPIC", f"-Wl,-soname,{library.name}", "-x", "c", "-", "-o", library]
        subprocess.run(build, input=code, text=True, check=True)
        caches = {"TRITON_CACHE_DIR": folder, "TORCHINDUCTOR_CACHE_DIR": folder}
        command, environment = [sys.executable, "-m", "benchmarks.lower", *words], os.environ | caches
        return subprocess.run(command, env=environment | {"LD_PRELOAD": str(library)}).returncode


def pretend_driver():
    """Let Triton compile for an H100; nothing can be run."""
    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    driver = dict(get_current_target=lambda: target, get_current_device=lambda: 0, get_current_stream=lambda _: 0)
    triton.runtime.driver.set_active(types.SimpleNamespace(**driver))


def pretend():
    """Let torch, Inductor and Triton find an H100, for fake tensors."""
    answers = dict(_lazy_init=None, is_available=True, device_count=1, get_device_properties=H100)
    answers["get_rng_state"] = torch.get_rng_state()
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    torch.Tensor.pin_memory = lambda self, *_: self
    fake_tensor.init_gpu_context = lambda *_: None
    fake_tensor.FakeTensorMode.avoid_device_init = property(lambda self: True)
    pretend_driver()


# ---- lowering ----


def lower_step(config, tokens):
    """Lower the step of a pack of 256-token images, then of two packs of mixed ones.

    Returns (model, [graph, forward and backward], [(group, bytes, operations) of each of Inductor's kernels]).
    """
    from torch._functorch.aot_autograd import make_boxed_func  # Inductor looks for Triton when it is imported
    from torch._inductor import async_compile, compile_fx
    from torch._inductor import config as inductor

    with fake_tensor.FakeTensorMode(allow_non_fake_inputs=True) as mode, DEVICE:
        spaces = random_spaces(small=False)
        model, process = amoe.AMoE(config, spaces), Process(0, 1, DEVICE)
    shapes = [(16, 16)] * (tokens // 261), mixed_shapes(tokens), mixed_shapes(tokens)
    packs = [random_pack(some, tokens, spaces) for some in shapes]
    blocks = mask_blocks(packs[0].starts, tokens)
    pairs = int(blocks["partial_count"].sum() + blocks["full_count"].sum()) * BLOCK**2  # whose score is computed
    graphs, kernels = [], []

    def lower(graph_module, inputs, **how):
        graphs.append(copy.deepcopy(graph_module))
        compile_fx.compile_fx_inner(graph_module, inputs, **how)
        return make_boxed_func(graphs[-1])  # which runs on fake tensors

    def count(scheduled):
        kernels.extend(describe(kernel, 4 * pairs * config.heads * config.head_dim) for kernel in scheduled)
        return scheduled

    inductor.fx_graph_cache = False  # it would want to pickle `count`
    inductor.joint_graph_constant_folding = inductor.shape_padding = False  # they would compute
    inductor._post_fusion_custom_pass = count
    functorch.backward_pass_autocast = "off"  # as train.compile_forward has it
    async_compile.AsyncCompile.triton = lambda *_, **__: None
    run = torch.compile(train.forward, backend=partial(compile_fx.compile_fx, inner_compile=lower), fullgraph=True)
    with mode:
        for pack in packs:
            fake = pack.map_tensors(lambda tensor: mode.from_tensor(tensor, static_shapes=True))
            some = train.to_device(fake, process, True, [], spaces)
            train.gradients(model, [some], spaces, train.Flags(arkd=0), process, run)
    return model, graphs, kernels


# ---- what belongs where ----

# The first pattern found in "KERNEL MODULE FILE:FUNCTION" says the group.
GROUPS = {
    "experts: grouped products": r"grouped_mm",
    "attention: FlexAttention": r"^flex",
    "attention: q, k, v, o": r"mm \S*attention",
    "weights: casts, float32 gradients": r"^cast \S*layers",
    "attention: norms, rotation, sinks": r"rope|attention\.py|attention ",
    "experts: routing": r"router|by_expert",
    "experts: gather, SiLU, combine": r"\bmoe",
    "blocks: norms, residuals": r"layers",
    "embedding, heads, losses": "",
}
CAST = re.compile("convert_element|permute|cat|slice|split|view|clone|select|_grouped_mm|transpose")  # of weights alone
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_grouped_mm")
FLOAT32 = ("router", "pool", ":invert")  # places whose products have float32 factors, forward and backward


def place(origin):
    """ "MODULE FILE:FUNCTION" of a node of a traced graph: ours, not torch's."""
    modules = origin.meta.get("nn_module_stack") or origin.meta.get("fwd_nn_module_stack") or {}
    path = re.sub(r"L\['model'\]\.?", "", [("",), *modules.values()][-1][0])
    frames = re.findall(r'File "(.*?)", line \d+, in (\w+)', origin.meta.get("stack_trace") or "")
    ours = [f"{Path(file).name}:{function}" for file, function in frames if Path(file).is_relative_to(ROOT)]
    return f"{path} {ours[-1] if ours else ''}"


def factors(node):
    """The two factors of a product of matrices, or of batches or groups of them; of other nodes none."""
    if getattr(getattr(node, "target", None), "_opname", "") not in PRODUCTS:
        return []
    tensors = [x.meta["val"] for x in node.args if hasattr(x, "meta")]
    return [t for t in tensors if t.is_floating_point()][-2:]  # not the sum's other part, nor where groups end


def describe(kernel, attention_flops):
    """(group, bytes, operations) of one of Inductor's kernels."""
    parts, what, flops = [part.node for part in kernel.get_nodes() if part.node is not None], "", 0
    origins = {o for part in parts for o in part.origins}
    products = [part.origin_node for part in parts if factors(getattr(part, "origin_node", None))]
    if kernel.get_template_node():
        backward = any("backward" in o.name for o in origins)
        what, flops = "flex", attention_flops * (2.5 if backward else 1)  # which computes the scores once more
    elif products:
        what, (left, right) = products[0].target._opname, factors(products[0])
        sizes = [*left.shape, right.shape[-1]]  # a symbol's hint: int() would make it a constant
        flops = 2 * math.prod(n if isinstance(n, int) else n.node.hint for n in sizes)
        # where Inductor joined it with a sum, its left factor says where it belongs
        origins = [products[0] if place(products[0]).strip() else products[0].args[-2]]
    elif all(CAST.match(o.name) for o in origins):
        what = "cast"
    known = [o for o in origins if place(o).strip()] or origins
    groups = [next(g for g, pattern in GROUPS.items() if re.search(pattern, f"{what} {place(o)}")) for o in known]
    group = mode(sorted(groups))  # a tie is decided by names: a set has no order
    return group, kernel.get_read_write_buffers_sizes(), flops


def not_float32(graph):
    """[what is wrong] with the products, and RoPE's angles, that must be float32."""
    dtypes = {name: set() for name in FLOAT32} | {":rotations": {torch.float32}}  # which has no backward pass
    for node in graph.nodes:
        tensors, names = factors(node), FLOAT32
        if not tensors and isinstance(node.meta.get("val"), torch.Tensor):
            tensors, names = [node.meta["val"]], [":rotations"]
        for name in names:
            if name in place(node):
                dtypes[name] |= {t.dtype for t in tensors if t.is_floating_point()}
    return [f"{name}: {found or 'no product'}" for name, found in dtypes.items() if found != {torch.float32}]


# ---- our kernels for sm_90a ----


def compile_own():
    """Compile, and not run, our kernels as they are launched, and print what a block of each takes.

    That is bytes of shared memory, registers a thread, bytes spilled, and the number of its instructions for products.
    """
    compile_and_run, binaries = triton.runtime.JITFunction.run, {}

    def compile_alone(kernel, *arguments, warmup, **options):
        binary = compile_and_run(kernel, *arguments, warmup=True, **options)
        binaries[binary.hash] = f"{kernel.fn.__name__}.{arguments[0].dtype}".replace("torch.", ""), binary

    with mock.patch.object(triton.runtime.JITFunction, "run", compile_alone):
        for dtype in (torch.bfloat16, torch.float32):
            x, weight, w = (torch.ones(shape, requires_grad=True) for shape in ((64, 64), (64, 2), (2, 64, 64)))
            expert = torch.zeros(64, 2, dtype=torch.int64)
            moe_file.GroupedExperts.apply(x, expert, weight, w, w, w, dtype).sum().backward()
    assembler = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    for name, binary in binaries.values():
        code, words = binary.asm["ptx"], [assembler, "-v", "--gpu-name=sm_90a", "-", "-o", "/dev/null"]
        said = subprocess.run(words, input=code, capture_output=True, text=True, check=True).stderr
        spilled = sum(map(int, re.findall(r"(\d+) bytes spill", said)))
        registers, products = re.search(r"Used (\d+) registers", said)[1], code.count("wgmma.mma_async")
        print(f"{name[:72]:<72}{binary.metadata.shared:>8}{registers:>6}{spilled:>9}{products:>7}", flush=True)


def lower_and_check(layers, tokens, out):
    """Print the table of amoe-0.3b's step, keep it in the folder `out`, and say what is not as it must be."""
    model, graphs, kernels = lower_step(replace(amoe.CONFIGS["amoe-0.3b"], layers=layers), tokens)
    learnt = {name: p for name, p in model.named_parameters() if p.requires_grad}
    wrong = [f"{name} gets no gradient" for name, p in learnt.items() if p.grad is None]
    wrong += [f"{len(graphs)} graphs, forward and backward, where two would do"] if len(graphs) != 2 else []
    wrong += [said for module in graphs for said in not_float32(module.graph)]
    # The norm reads the gradient, clipping reads and writes it; AdamW reads four tensors and writes three, all float32.
    update = ("clip and AdamW", 4 * (3 + 7) * sum(p.numel() for p in learnt.values()), 0)
    rows = {group: {"gb": 0.0, "tflop": 0.0, "floor_ms": 0.0} for group in (*GROUPS, update[0], "sum")}
    for group, size, flops in [*kernels, update]:
        for row in (rows[group], rows["sum"]):
            row["gb"] += size / 1e9
            row["tflop"] += flops / 1e12
            row["floor_ms"] += 1e3 * max(size / BYTES_PER_S, flops / FLOPS_PER_S)
    print(f"{'computed, not measured':<40}{'GB':>8}{'TFLOP':>8}{'floor, ms':>11}")
    for group, row in rows.items():
        print(f"{group:<40}{row['gb']:>8.2f}{row['tflop']:>8.2f}{row['floor_ms']:>11.2f}", flush=True)
    name = f"amoe-0.3b, {layers} layers, {tokens} tokens"
    record(out, "lower.json", name, {"torch": torch.__version__, "groups": rows})
    print(*(wrong or ["one graph, float32 where it must be, a gradient for every parameter"]), sep="\n", flush=True)
    return bool(wrong)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--layers", type=int, default=18, help="of the student; one takes a minute, 18 take four")
    parser.add_argument("--tokens", type=int, default=16384, help="in the step's pack")
    parser.add_argument("--only", choices=("own", "table"), help="our own kernels, or the table and its checks alone")
    parser.add_argument("--out", type=Path, help="folder of lower.json, which keeps the table")
    args = parser.parse_args()
    missing = "Triton" if triton is None else "a CUDA build of torch" if torch.version.cuda is None else ""
    if missing and not (triton and args.only == "own"):
        return print(f"not run: this needs {missing}, and here is torch {torch.__version__}")
    wrong = False
    if args.only != "own":
        if "libcuda.so.1" not in os.environ.get("LD_PRELOAD", ""):
            return run_with_stand_ins(sys.argv[1:])
        pretend()
        torch.set_float32_matmul_precision("high")  # as common.process.setup has it on CUDA
        wrong = lower_and_check(args.layers, args.tokens, args.out)
    if args.only != "table":
        pretend_driver()
        compile_own()
    return wrong


if __name__ == "__main__":
    sys.exit(main())
