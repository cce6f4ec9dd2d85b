"""Mixture-of-Experts feed-forward: y_t = sum_k weight_tk * w2_e (silu(w1_e x_t) * w3_e x_t) with e = expert_tk.

`ref` loops over the experts: any device, any float dtype, and the definition. It needs the counts on the host.
`grouped` is torch's grouped GEMM on one gathered copy of x: CUDA, bfloat16, no host synchronisation and no atomics, so
it compiles without a break.
`triton` reads x's rows through the sorted token index instead of gathering them, forward and backward: CUDA GPUs
(written for Hopper, sm_90), float32, float16 and bfloat16 with float32 accumulation, no host synchronisation either.
The idea of fusing gather and scatter into the grouped product is ScatterMoE's (arXiv 2403.08245).

Shape letters: T tokens, D model width, E experts, F expert width, K experts a token, N = T K routed rows in the order
of their experts, M tiles of rows.
"""

import torch
import torch.nn.functional as F

from kernels import INTERPRETED, check_impl, triton, why_not_triton

if triton is not None:
    import triton.language as tl

    # Columns of a tile of `up_backward`, whose last step holds five tiles in registers: 128 spilled 1192 bytes a thread
    # (sm_90), 64 none.
    NARROW = tl.constexpr(64)

IMPLS = ("ref", "grouped", "triton")
# Of the Triton kernels; its interpreter would multiply the bit patterns of bfloat16 as integers.
DTYPES = (torch.float32, torch.float16) if INTERPRETED else (torch.float32, torch.float16, torch.bfloat16)


# ---- the definition, and torch's grouped GEMM ----


def by_expert(expert_TK, n_experts):
    """The rows sorted by expert (int64 [N], places in the flattened expert_TK), and each expert's end (int64 [E])."""
    # A stable sort keeps a token's rows in order inside an expert, so sums do not depend on the sort algorithm.
    # int16: a GPU sorts by 8 bits a pass
    sorted_N, order_N = expert_TK.flatten().to(torch.int16).sort(stable=True)
    # Not bincount (the compiler cannot know its size), nor atomic sums of ones (they queue at 28 addresses).
    expert_E = torch.arange(n_experts, dtype=torch.int16, device=order_N.device)
    return order_N, torch.searchsorted(sorted_N, expert_E, right=True)


def moe_ref(x_TD, expert_TK, weight_TK, w1_EFD, w2_EDF, w3_EFD):
    """One expert after the other, on its rows. An expert without rows stays in the graph, with a gradient of zero."""
    order_N, end_E = by_expert(expert_TK, len(w1_EFD))
    token_N = order_N // expert_TK.shape[1]
    groups = x_TD.index_select(0, token_N).split(end_E.diff(prepend=end_E.new_zeros(1)).tolist())
    experts = zip(groups, w1_EFD, w2_EDF, w3_EFD, strict=True)
    y_ND = torch.cat([F.linear(F.silu(F.linear(x, w1)) * F.linear(x, w3), w2) for x, w1, w2, w3 in experts])
    y_ND = y_ND * weight_TK.flatten()[order_N, None].to(y_ND.dtype)
    return torch.zeros_like(x_TD).index_add(0, token_N, y_ND.to(x_TD.dtype))


class Rows(torch.autograd.Function):
    """x's rows at `index`, where `back` says which rows of the result come from each row of x, K of them in a row.

    index_select's own gradient adds into x's rows. CUDA cannot add bfloat16 in place without sorting the indices first;
    a permutation's inverse is known, so here the gradient is gathered and summed too.
    """

    @staticmethod
    def forward(ctx, x, index, back, K):
        ctx.save_for_backward(back)
        ctx.K = K
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, gradient):
        (back,) = ctx.saved_tensors
        return gradient.index_select(0, back).unflatten(0, (-1, ctx.K)).sum(1), None, None, None


def moe_grouped(x_TD, expert_TK, weight_TK, w1_EFD, w2_EDF, w3_EFD):
    """The same through torch's grouped GEMM, which takes bfloat16 operands, int32 ends and widths in multiples of 8.

    w1 and w3 are one product, so that the gathered rows are read once and their gradient is written once.
    """
    K = expert_TK.shape[1]
    order_N, end_E = by_expert(expert_TK, len(w1_EFD))
    inverse_N = torch.empty_like(order_N).scatter(0, order_N, torch.arange(len(order_N), device=order_N.device))
    end_E = end_E.int()
    x_ND = Rows.apply(x_TD.bfloat16(), order_N // K, inverse_N, K)
    w13 = torch.cat([w1_EFD, w3_EFD], dim=1).bfloat16()
    h1_NF, h3_NF = F.grouped_mm(x_ND, w13.mT, offs=end_E).chunk(2, dim=1)
    y_ND = F.grouped_mm(F.silu(h1_NF) * h3_NF, w2_EDF.bfloat16().mT, offs=end_E)
    y_TKD = Rows.apply(y_ND, inverse_N, order_N, 1).unflatten(0, (-1, K))
    return (y_TKD * weight_TK[..., None]).sum(1).to(x_TD.dtype)


# ---- the Triton kernels ----
#
# Rows are cut into tiles that each belong to one expert. Five kernels make the layer:
#   up             h1, h3 = x w1^T, x w3^T and silu(h1) * h3      rows of x gathered through the token index
#   down           y = weight * (silu(h1) * h3) w2^T              one row written per (token, k)
#   up_backward    from dy: dh1, dh3, the weights' gradient       rows of dy gathered likewise
#   down_backward  dx = dh1 w1 + dh3 w3                           one row written per (token, k)
#   outer          dw = sum over an expert's rows of an outer product
# A token's K rows land next to each other, so a plain sum over K ends both ways: no atomics, the same bits every time.

if triton is not None:

    @triton.jit
    def open_tile(order_ptr, tile_ptr, WIDTH, BLOCK: tl.constexpr, COLUMNS: tl.constexpr):
        """This program's tile: its expert, rows, which of them it has, places, columns; whether there is one."""
        # The column varies fastest: neighbouring programs read the same rows of x, which stay in L2.
        across = tl.cdiv(WIDTH, COLUMNS)
        at, column = tile_ptr + 3 * (tl.program_id(0) // across), tl.program_id(0) % across
        first, end = tl.load(at + 1), tl.load(at + 2)
        row = first + tl.arange(0, BLOCK)
        place = tl.load(order_ptr + row, mask=row < end, other=0)
        return tl.load(at), row, row < end, place, column * COLUMNS + tl.arange(0, COLUMNS), first < end

    @triton.jit
    def add_product(out, a_ptr, row, real, w_ptr, column, stride_inner, stride_column, INNER, COLUMNS, BLOCK_K):
        """out + a[row] @ w, for rows of width INNER and a matrix of COLUMNS columns."""
        for k in range(0, INNER, BLOCK_K):
            i = k + tl.arange(0, BLOCK_K)
            a_mask, w_mask = real[:, None] & (i < INNER)[None, :], (i < INNER)[:, None] & (column < COLUMNS)[None, :]
            a = tl.load(a_ptr + row[:, None] * INNER + i[None, :], mask=a_mask, other=0.0)
            w_at = i[:, None] * stride_inner + column[None, :] * stride_column
            out = tl.dot(a, tl.load(w_ptr + w_at, mask=w_mask, other=0.0), out, input_precision="ieee")
        return out

    @triton.jit
    def up_kernel(x_ptr, w1_ptr, w3_ptr, h1_ptr, h3_ptr, hidden_ptr, order_ptr, tile_ptr, D, F, K, BLOCK: tl.constexpr):
        expert, row, real, place, f, exists = open_tile(order_ptr, tile_ptr, F, BLOCK, BLOCK)
        if not exists:
            return
        token = place // K
        h1 = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
        h3 = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
        for k in range(0, D, BLOCK // 2):
            d = k + tl.arange(0, BLOCK // 2)
            x = tl.load(x_ptr + token[:, None] * D + d[None, :], mask=real[:, None] & (d < D)[None, :], other=0.0)
            at, mask = expert * F * D + f[None, :] * D + d[:, None], (d < D)[:, None] & (f < F)[None, :]
            h1 = tl.dot(x, tl.load(w1_ptr + at, mask=mask, other=0.0), h1, input_precision="ieee")
            h3 = tl.dot(x, tl.load(w3_ptr + at, mask=mask, other=0.0), h3, input_precision="ieee")
        at, mask = row[:, None] * F + f[None, :], real[:, None] & (f < F)[None, :]
        tl.store(h1_ptr + at, h1, mask=mask)
        tl.store(h3_ptr + at, h3, mask=mask)
        tl.store(hidden_ptr + at, h1 * tl.sigmoid(h1) * h3, mask=mask)

    @triton.jit
    def up_backward_kernel(
        dy_ptr,
        w2_ptr,
        h1_ptr,
        h3_ptr,
        weight_ptr,
        dh1_ptr,
        dh3_ptr,
        weighted_ptr,  # weight * silu(h1) * h3, for dw2
        dweight_ptr,  # at (token, k), a part from each block of columns
        order_ptr,
        tile_ptr,
        D,
        F,
        K,
        BLOCK: tl.constexpr,
    ):
        expert, row, real, place, f, exists = open_tile(order_ptr, tile_ptr, F, BLOCK, NARROW)
        if not exists:
            return
        g = tl.zeros((BLOCK, NARROW), dtype=tl.float32)  # dy w2, the gradient of the hidden row before its weight
        g = add_product(g, dy_ptr, place // K, real, w2_ptr + expert * D * F, f, F, 1, D, F, BLOCK // 2)
        at, mask = row[:, None] * F + f[None, :], real[:, None] & (f < F)[None, :]
        h1 = tl.load(h1_ptr + at, mask=mask, other=0.0).to(tl.float32)
        h3 = tl.load(h3_ptr + at, mask=mask, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + place, mask=real, other=0.0).to(tl.float32)[:, None]
        gate = tl.sigmoid(h1)
        hidden = h1 * gate * h3
        across = tl.cdiv(F, NARROW)
        tl.store(dweight_ptr + place * across + tl.program_id(0) % across, tl.sum(g * hidden, 1), mask=real)
        tl.store(weighted_ptr + at, weight * hidden, mask=mask)
        g = weight * g
        tl.store(dh1_ptr + at, g * h3 * gate * (1 + h1 * (1 - gate)), mask=mask)
        tl.store(dh3_ptr + at, g * h1 * gate, mask=mask)

    @triton.jit
    def down_kernel(a_ptr, wa_ptr, weight_ptr, out_ptr, order_ptr, tile_ptr, D, F, BLOCK: tl.constexpr):
        expert, row, real, place, d, exists = open_tile(order_ptr, tile_ptr, D, BLOCK, BLOCK)
        if not exists:
            return
        out = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
        out = add_product(out, a_ptr, row, real, wa_ptr + expert * F * D, d, 1, F, F, D, BLOCK // 2)
        out *= tl.load(weight_ptr + place, mask=real, other=0.0).to(tl.float32)[:, None]
        tl.store(out_ptr + place[:, None] * D + d[None, :], out, mask=real[:, None] & (d < D)[None, :])

    @triton.jit
    def down_backward_kernel(a_ptr, wa_ptr, b_ptr, wb_ptr, out_ptr, order_ptr, tile_ptr, D, F, BLOCK: tl.constexpr):
        expert, row, real, place, d, exists = open_tile(order_ptr, tile_ptr, D, BLOCK, BLOCK)
        if not exists:
            return
        out = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
        out = add_product(out, a_ptr, row, real, wa_ptr + expert * F * D, d, D, 1, F, D, BLOCK // 2)
        out = add_product(out, b_ptr, row, real, wb_ptr + expert * F * D, d, D, 1, F, D, BLOCK // 2)
        tl.store(out_ptr + place[:, None] * D + d[None, :], out, mask=real[:, None] & (d < D)[None, :])

    @triton.jit
    def outer_kernel(
        left_ptr, right_ptr, out_ptr, order_ptr, end_ptr, D, F, K, TURNED: tl.constexpr, BLOCK: tl.constexpr
    ):
        """out_e[f, d] = sum over the expert's rows n of left[n, f] right[token n, d]; or [d, f], where TURNED."""
        expert = tl.program_id(0).to(tl.int64)
        f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        d = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
        begin, end = tl.load(end_ptr + expert - 1, mask=expert > 0, other=0), tl.load(end_ptr + expert)
        out = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
        for start in range(begin, end, BLOCK // 2):
            row = start + tl.arange(0, BLOCK // 2)
            token = tl.load(order_ptr + row, mask=row < end, other=0) // K
            mask = (f < F)[:, None] & (row < end)[None, :]
            left = tl.load(left_ptr + row[None, :] * F + f[:, None], mask=mask, other=0.0)
            mask = (row < end)[:, None] & (d < D)[None, :]
            right = tl.load(right_ptr + token[:, None] * D + d[None, :], mask=mask, other=0.0)
            out = tl.dot(left, right, out, input_precision="ieee")
        at = d[None, :] * F + f[:, None] if TURNED else f[:, None] * D + d[None, :]
        tl.store(out_ptr + expert * F * D + at, out, mask=(f < F)[:, None] & (d < D)[None, :])


def launch_options(dtype):
    """BLOCK, the rows and columns of a tile whose products go BLOCK / 2 deep, with warps and stages.

    16-bit: 128 x 128 x 64 feeds Hopper's matrix units; two accumulators take 128 registers of each of 256 threads, and
    three stages of x, w1 and w3 take 144 of 227 KiB of shared memory. Float32 runs on the ordinary units.
    """
    if dtype == torch.float32:
        return {"BLOCK": 64, "num_warps": 4, "num_stages": 2}
    return {"BLOCK": 128, "num_warps": 8, "num_stages": 3}


def schedule(end_E, n_rows, block):
    """Tiles of up to `block` rows that each lie in one expert: (expert, first row, expert's end), int64 [M, 3].

    Made on the device; the host knows only the bound M = n_rows // block + E on their number. Tiles past the last have
    expert E and begin at their end or after it. An expert without rows has no tile.
    """
    begin_E = torch.cat([end_E.new_zeros(1), end_E[:-1]])
    tiles_E = (end_E - begin_E + block - 1) // block
    last_E = tiles_E.cumsum(0)
    tile_M = torch.arange(n_rows // block + len(end_E), device=end_E.device)
    expert_M = torch.searchsorted(last_E, tile_M, right=True)
    of_M = expert_M.clamp(max=len(end_E) - 1)
    first_M = begin_E[of_M] + (tile_M - (last_E - tiles_E)[of_M]) * block
    return torch.stack([expert_M, first_M, end_E[of_M]], dim=1)


class GroupedExperts(torch.autograd.Function):
    """The layer in `dtype`, with gradients in the dtype of what they belong to.

    Weights may be float32 masters: their gradients then leave the float32 accumulators without a detour.
    """

    @staticmethod
    def forward(ctx, x_TD, expert_TK, weight_TK, w1_EFD, w2_EDF, w3_EFD, dtype):
        (T, K), (E, n_hidden, D) = expert_TK.shape, w1_EFD.shape
        x, w1, w2, w3 = (t.to(dtype).contiguous() for t in (x_TD, w1_EFD, w2_EDF, w3_EFD))
        weight_TK, options = weight_TK.contiguous(), launch_options(dtype)
        order_N, end_E = by_expert(expert_TK, E)
        tile_M3 = schedule(end_E, T * K, options["BLOCK"])
        h1_NF, h3_NF, hidden_NF = (x.new_empty(T * K, n_hidden) for _ in range(3))
        grid = grid_of(tile_M3, n_hidden, options["BLOCK"])
        up_kernel[grid](x, w1, w3, h1_NF, h3_NF, hidden_NF, order_N, tile_M3, D, n_hidden, K, **options)
        y_TKD, grid = x.new_empty(T, K, D), grid_of(tile_M3, D, options["BLOCK"])
        down_kernel[grid](hidden_NF, w2, weight_TK, y_TKD, order_N, tile_M3, D, n_hidden, **options)
        ctx.save_for_backward(x, weight_TK, w1, w2, w3, order_N, end_E, tile_M3, h1_NF, h3_NF)
        ctx.dtypes = x_TD.dtype, weight_TK.dtype, w1_EFD.dtype
        return y_TKD.sum(1, dtype=torch.float32).to(x_TD.dtype)

    @staticmethod
    def backward(ctx, dy_TD):
        x, weight_TK, w1, w2, w3, order_N, end_E, tile_M3, h1_NF, h3_NF = ctx.saved_tensors
        (T, K), (E, n_hidden, D), options = weight_TK.shape, w1.shape, launch_options(x.dtype)
        dy = dy_TD.to(x.dtype).contiguous()
        dh1_NF, dh3_NF, weighted_NF = (torch.empty_like(h1_NF) for _ in range(3))
        dweight_TKC = torch.empty(T, K, triton.cdiv(n_hidden, NARROW.value), dtype=torch.float32, device=x.device)
        made = (dh1_NF, dh3_NF, weighted_NF, dweight_TKC, order_N, tile_M3)
        grid = grid_of(tile_M3, n_hidden, NARROW.value)
        up_backward_kernel[grid](dy, w2, h1_NF, h3_NF, weight_TK, *made, D, n_hidden, K, **options)
        dx_TKD, grid = x.new_empty(T, K, D), grid_of(tile_M3, D, options["BLOCK"])
        down_backward_kernel[grid](dh1_NF, w1, dh3_NF, w3, dx_TKD, order_N, tile_M3, D, n_hidden, **options)
        dws, grid = [], (E, *(triton.cdiv(width, options["BLOCK"]) for width in (n_hidden, D)))
        pairs = (dh1_NF, x, w1, False), (weighted_NF, dy, w2, True), (dh3_NF, x, w3, False)
        for left_NF, right_TD, w, turned in pairs:
            dws.append(torch.empty_like(w, dtype=ctx.dtypes[2]))
            outer_kernel[grid](left_NF, right_TD, dws[-1], order_N, end_E, D, n_hidden, K, turned, **options)
        dx = dx_TKD.sum(1, dtype=torch.float32).to(ctx.dtypes[0])
        return dx, None, dweight_TKC.sum(2).to(ctx.dtypes[1]), *dws, None


def grid_of(tile_M3, width, block):
    return (len(tile_M3) * triton.cdiv(width, block),)


# ---- the operation ----


def choose(impl, device, dtype=torch.bfloat16):
    """The form that `impl` means on `device` in `dtype`; an explicit one that cannot run raises ValueError.

    auto takes grouped on CUDA in bfloat16, else ref: triton has run in the interpreter and through the sm_90 compiler,
    but has not been timed on a GPU yet, and a default needs a measurement (kernels/bench.py makes it).
    """
    grouped = device.type == "cuda" and hasattr(F, "grouped_mm")
    if impl == "auto":
        return "grouped" if grouped and dtype == torch.bfloat16 else "ref"
    why_not_grouped = None if grouped else f"needs a CUDA device and was asked to run on {device.type}"
    reasons = {"ref": None, "grouped": why_not_grouped, "triton": why_not_triton(device, dtype, DTYPES)}
    return check_impl("moe", impl, reasons, "ref")


def moe(x_TD, expert_TK, weight_TK, w1_EFD, w2_EDF, w3_EFD, impl="auto"):
    """Every token through its K experts, weighted after the expert; no token is dropped. Returns [T, D] in x's dtype.

    expert_TK: int64 expert indices; weight_TK: float32 routing weights. ref accumulates the K results in x's dtype,
    grouped and triton in float32. Products run in autocast's dtype inside autocast, else in x's. Raises ValueError
    where an explicit impl cannot run here.
    """
    kind = x_TD.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x_TD.dtype
    impl = choose(impl, x_TD.device, dtype)
    if impl == "triton":
        return GroupedExperts.apply(x_TD, expert_TK, weight_TK, w1_EFD, w2_EDF, w3_EFD, dtype)
    form = moe_grouped if impl == "grouped" else moe_ref
    return form(x_TD, expert_TK, weight_TK, w1_EFD, w2_EDF, w3_EFD)
