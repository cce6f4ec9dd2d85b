"""Attention within each image of a pack, with optional sinks: FlexAttention under torch.compile, SDPA elsewhere.

FlexAttention (CUDA) reads the extents of images from a BlockMask; uncompiled it would build T x T scores, so eager
code, on any device, runs SDPA on runs of equally long images. torch 2.13 has no FlexAttention gradients on a CPU.

Shape letters: T tokens in the pack, M images in it, H heads, d head width.
"""

import itertools
import math

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

BLOCK = 128  # queries and keys in a block of the mask, FlexAttention's default


def runs(starts, n_tokens):
    """Neighbouring images of one length as (first token, images, length): each run is one dense batch for SDPA.

    Padding, the tokens from starts[-1] on, is a last group of its own.
    """
    edges = starts.tolist()
    if edges[-1] < n_tokens:
        edges.append(n_tokens)
    out = []
    for start, end in itertools.pairwise(edges):
        if out and out[-1][2] == end - start:
            out[-1][1] += 1
        else:
            out.append([start, 1, end - start])
    return out


def block_mask(starts, n_tokens, device="cpu"):
    """FlexAttention's BlockMask for a pack, from `starts` alone: no function is evaluated over T x T.

    A row of query blocks touches the key blocks from the start of its first image to the end of its last, a contiguous
    range; a block pair inside one image is full, any other needs the mask. The blocks are those `create_block_mask`
    finds by evaluating the rule on every pair.
    """
    edges = starts.long().cpu()
    if edges[-1] < n_tokens:
        edges = torch.cat([edges, torch.tensor([n_tokens])])
    n = -(-n_tokens // BLOCK)
    first = torch.arange(n) * BLOCK
    last = (first + BLOCK).clamp(max=n_tokens) - 1
    image_first = torch.searchsorted(edges, first, right=True) - 1
    image_last = torch.searchsorted(edges, last, right=True) - 1
    low = edges[image_first] // BLOCK
    high = (edges[image_last + 1] - 1) // BLOCK  # inclusive
    column = torch.arange(n)
    touched = (column >= low[:, None]) & (column <= high[:, None])
    # A last block cut short by the end of the sequence is never full, as create_block_mask has it.
    whole = (image_first == image_last) & (first + BLOCK <= n_tokens)
    full = touched & whole[:, None] & whole & (image_first[:, None] == image_first)

    def listed(dense):  # the indices of the set blocks first, in order
        order = dense.int().argsort(dim=1, descending=True, stable=True)
        return [t[None, None].int().to(device) for t in (dense.sum(1), order)]

    image = (torch.searchsorted(edges, torch.arange(n_tokens), right=True) - 1).to(device)

    def same_image(b, h, q, k):
        return image[q] == image[k]

    return BlockMask.from_kv_blocks(
        *listed(touched & ~full), *listed(full), BLOCK_SIZE=BLOCK, mask_mod=same_image, seq_lengths=(n_tokens, n_tokens)
    )


def attend(q_THd, k_THd, v_THd, groups, sinks_H=None):
    """Attention within each image of the pack, scale 1 / sqrt(d), [T, H, d]; with sinks, out *= sigmoid(lse - sink).

    `groups` chooses the form. A BlockMask runs FlexAttention, which wants torch.compile around it. `runs(...)` runs
    SDPA on each image, on any device: there a sink is one more key with score `sink` and value zero, which is the same
    function, since sigmoid(lse - sink) = e^lse / (e^lse + e^sink).
    """
    d = q_THd.shape[-1]
    if isinstance(groups, BlockMask):
        q, k, v = (t.transpose(0, 1)[None] for t in (q_THd, k_THd, v_THd))
        out, aux = flex_attention(q, k, v, block_mask=groups, return_aux=AuxRequest(lse=True))
        if sinks_H is not None:
            out = out * torch.sigmoid(aux.lse - sinks_H[:, None])[..., None].to(out.dtype)
        return out[0].transpose(0, 1)
    sizes = [images * length for _, images, length in groups]  # split: its gradient is one concatenation
    outs = []
    for (_, images, length), *qkv in zip(groups, *(t.split(sizes) for t in (q_THd, k_THd, v_THd)), strict=True):
        q, k, v = (t.unflatten(0, (images, length)).transpose(1, 2) for t in qkv)
        if sinks_H is not None:
            # Queries gain a constant channel; the extra key is zero but there, where it holds the sink's score.
            key = F.pad(sinks_H.to(k.dtype)[:, None, None] * math.sqrt(d), (d, 0)).expand(images, -1, 1, -1)
            q, k, v = F.pad(q, (0, 1), value=1.0), torch.cat([F.pad(k, (0, 1)), key], dim=2), F.pad(v, (0, 1, 0, 1))
        out = F.scaled_dot_product_attention(q, k, v, scale=1 / math.sqrt(d))[..., :d]
        outs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outs)
