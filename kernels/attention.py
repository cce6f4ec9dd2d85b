"""Attention within each image of a pack, with optional sinks: FlexAttention under torch.compile, SDPA elsewhere.

FlexAttention (CUDA) takes a BlockMask. Uncompiled it would build T x T scores, so eager code, on any device, calls SDPA
once per run of equally long images. torch 2.13 has no FlexAttention gradients on a CPU.

Shape letters: T tokens in the pack, M images in it, H heads, d head width.
"""

import itertools
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

BLOCK = 128  # queries and keys in a block of the mask, FlexAttention's default


def image_runs(starts, n_tokens):
    """Neighbouring images of one length as (first token, images, length): each run is one dense batch for SDPA.

    Padding, the tokens from starts[-1] on, is a last group of its own.
    """
    out = []
    for start, end in itertools.pairwise([*starts.tolist(), n_tokens]):
        if out and out[-1][2] == end - start:
            out[-1][1] += 1
        elif start < end:
            out.append([start, 1, end - start])
    return out


def mask_blocks(starts, n_tokens):
    """Which blocks of keys each block of queries attends to, from `starts` alone: {name: int32}, on the host.

    "partial" are the pairs of blocks that share an image only in part, "full" those inside one image. For n blocks of
    queries, `partial_count` [n] says how many key blocks each has, and `partial_index` [n, n] which (the first count
    entries of a row); `full_count` and `full_index` likewise. A query block touches the key blocks from the start
    of its first image to the end of its last. The blocks are those that `create_block_mask` finds by evaluating the
    rule on every pair of tokens.
    """
    # numpy: arrays this small take 0.2 ms on one thread, where torch's threads have taken 7 ms
    edges = np.append(starts.numpy(force=True), n_tokens)  # an empty last image where there is no padding
    k = np.arange(-(-n_tokens // BLOCK))
    first = k * BLOCK
    last = np.minimum(first + BLOCK, n_tokens) - 1
    image, image_last = (np.searchsorted(edges, token, side="right") - 1 for token in (first, last))
    start, end = edges[image], edges[image_last + 1]
    low, high = start // BLOCK, -(-end // BLOCK)  # the key blocks touched, high exclusive
    # A last block cut short by the end of the sequence is never full, as create_block_mask has it.
    whole = (image == image_last) & (first + BLOCK <= n_tokens)
    full_low, full_high = np.where(whole, -(-start // BLOCK), low), np.where(whole, end // BLOCK, low)
    before, full = (full_low - low)[:, None], (full_high - full_low)[:, None]  # partial blocks before the full ones
    blocks = {
        "partial_count": high - low - full[:, 0],
        "partial_index": (low[:, None] + k + np.where(k < before, 0, full)) % len(k),  # what is not counted: anything
        "full_count": full[:, 0],
        "full_index": (full_low[:, None] + k) % len(k),
    }
    return {name: torch.from_numpy(array.astype(np.int32)) for name, array in blocks.items()}


def block_mask(blocks, image_T):
    """FlexAttention's BlockMask of `mask_blocks` and the image of every token (Batch.image); nothing is computed.

    "Same image" is symmetric, so the lists of query blocks by key block equal those of key blocks by query block.
    `BlockMask.from_kv_blocks` would transpose the lists, which was most of a mask's cost.
    """

    def same_image(b, h, q, k):
        return image_T[q] == image_T[k]

    lists = [blocks[name][None, None] for name in ("partial_count", "partial_index", "full_count", "full_index")]
    T = len(image_T)
    return BlockMask((T, T), *lists, *lists, BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=same_image)


def mask_of(starts, n_tokens, device="cpu"):
    """The BlockMask of images that begin at `starts` [M + 1]; tokens from the last of them on are padding."""
    edges = torch.cat([starts.cpu().int(), torch.tensor([n_tokens], dtype=torch.int32)])
    image_T = torch.repeat_interleave(torch.arange(len(edges) - 1, dtype=torch.int32), edges.diff())
    blocks = {name: t.to(device) for name, t in mask_blocks(starts, n_tokens).items()}
    return block_mask(blocks, image_T.to(device))


class WithSinks(torch.autograd.Function):
    """SDPA on each run of images on a CPU, then out *= sigmoid(lse - sink), with a gradient that needs no extra key.

    A sink only adds e^sink to the softmax's sum, so SDPA's own backward pass is right if it is given the log of that
    larger sum and the gated output. The sink acts as a key of value zero, hence d sink = -(its share) (g . out).
    """

    @staticmethod
    def forward(ctx, q_THd, k_THd, v_THd, sinks_H, runs):
        out_THd, lse_TH = torch.empty_like(q_THd), q_THd.new_empty(q_THd.shape[:2])
        for rows, (q, k, v) in each_run(runs, q_THd, k_THd, v_THd):
            out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
            out_THd[rows], lse_TH[rows] = (t.transpose(1, 2).flatten(0, 1) for t in (out, lse))
        out_THd *= torch.sigmoid(lse_TH - sinks_H)[..., None]
        ctx.save_for_backward(q_THd, k_THd, v_THd, sinks_H, out_THd, torch.logaddexp(lse_TH, sinks_H))
        ctx.runs = runs
        return out_THd

    @staticmethod
    def backward(ctx, g_THd):
        *qkv, sinks_H, out_THd, lse_TH = ctx.saved_tensors
        gradients = [torch.empty_like(t) for t in qkv]
        for rows, parts in each_run(ctx.runs, g_THd, *qkv, out_THd, lse_TH):
            found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(*parts, 0.0, False)
            for gradient, part in zip(gradients, found, strict=True):
                gradient[rows] = part.transpose(1, 2).flatten(0, 1)
        share_TH = torch.exp(sinks_H - lse_TH)
        return *gradients, -(share_TH * torch.linalg.vecdot(g_THd, out_THd)).sum(0), None


def each_run(runs, *tensors):
    """(the run's rows, its part [images, H, length, ...] of every tensor [T, H, ...]) of one run after the other."""
    sizes = [images * length for _, images, length in runs]  # split: its gradient is one concatenation
    for (start, images, length), *parts in zip(runs, *(t.split(sizes) for t in tensors), strict=True):
        rows = slice(start, start + images * length)
        yield rows, [part.unflatten(0, (images, length)).transpose(1, 2) for part in parts]


def attend(q_THd, k_THd, v_THd, mask, sinks_H=None):
    """Attention within each image of the pack, scale 1 / sqrt(d), [T, H, d]; with sinks, out *= sigmoid(lse - sink).

    The mask chooses the form. A BlockMask runs FlexAttention, which needs torch.compile around it. `image_runs(...)`
    runs SDPA on each run: on a CPU as `WithSinks`, elsewhere with the sink as one more key of score `sink` and value
    zero, which is the same function, since sigmoid(lse - sink) = e^lse / (e^lse + e^sink).
    """
    d = q_THd.shape[-1]
    if isinstance(mask, BlockMask):
        q, k, v = (t.transpose(0, 1)[None] for t in (q_THd, k_THd, v_THd))
        out, aux = flex_attention(q, k, v, block_mask=mask, return_aux=AuxRequest(lse=True))
        out_THd, lse_TH = out[0].transpose(0, 1), aux.lse[0].T  # transposed before the gate: after it, a copy
        return out_THd if sinks_H is None else out_THd * torch.sigmoid(lse_TH - sinks_H)[..., None].to(out.dtype)
    runs, alike = mask, sinks_H is not None and q_THd.dtype == sinks_H.dtype
    if alike and q_THd.device.type == "cpu" and not torch.compiler.is_compiling():
        return WithSinks.apply(q_THd, k_THd, v_THd, sinks_H, runs)
    outs = []
    for _, (q, k, v) in each_run(runs, q_THd, k_THd, v_THd):
        if sinks_H is not None:
            # Queries gain a constant channel; the extra key is zero but there, where it holds the sink's score. On CUDA
            # it becomes 8 channels: of a width that is no multiple of 8, SDPA's fused forms take nothing.
            wide = 8 if q.is_cuda else 1
            key = F.pad(sinks_H.to(k.dtype)[:, None, None] * math.sqrt(d), (d, wide - 1)).expand(len(q), -1, 1, -1)
            q = F.pad(q, (0, wide), value=1.0)
            k, v = torch.cat([F.pad(k, (0, wide)), key], dim=2), F.pad(v, (0, wide, 0, 1))
        out = F.scaled_dot_product_attention(q, k, v, scale=1 / math.sqrt(d))[..., :d]
        outs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outs)
