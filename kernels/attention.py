"""Attention within each image of a pack, with optional sinks: FlexAttention under torch.compile, SDPA elsewhere.

FlexAttention (CUDA) reads the extents of images from a BlockMask; uncompiled it would build T x T scores, so eager
code, on any device, runs SDPA on runs of equally long images. torch 2.13 has no FlexAttention gradients on a CPU.

Shape letters: T tokens in the pack, M images in it, H heads, d head width.
"""

import itertools
import math

import numpy as np
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


def block_table(starts, n_tokens):
    """All that FlexAttention is told of a pack, from `starts` alone, on the host: int32 [2 (n + n * n) + T], n blocks.

    First for the block pairs that need the mask, then for those that are whole: how many of them each query block
    touches [n], and which [n, n], those that count in front, in order. Then every token's image [T]. A row of query
    blocks touches the key blocks from the start of its first image to the end of its last; a block pair inside one
    image is whole. The blocks are those that `create_block_mask` finds by evaluating the rule on every pair of tokens.
    """
    # numpy: so small, these run in 0.3 ms on one thread, and torch's threads have taken 7 ms to agree on them
    edges = np.append(starts.numpy(force=True), n_tokens)  # an empty last image where there is no padding
    n = -(-n_tokens // BLOCK)
    first = np.arange(n) * BLOCK
    last = np.minimum(first + BLOCK, n_tokens) - 1
    image_first, image_last = (np.searchsorted(edges, token, side="right") - 1 for token in (first, last))
    low, high = edges[image_first] // BLOCK, (edges[image_last + 1] - 1) // BLOCK  # high inclusive
    column = np.arange(n)
    touched = (column >= low[:, None]) & (column <= high[:, None])
    # A last block cut short by the end of the sequence is never whole, as create_block_mask has it.
    inside = (image_first == image_last) & (first + BLOCK <= n_tokens)
    whole = touched & inside[:, None] & inside & (image_first[:, None] == image_first)
    lists = [(dense.sum(1), (~dense).argsort(axis=1, kind="stable")) for dense in (touched & ~whole, whole)]
    image = np.repeat(np.arange(len(edges) - 1), np.diff(edges))
    return torch.from_numpy(np.concatenate([part.ravel() for part in (*lists[0], *lists[1], image)]).astype(np.int32))


def mask_of(table, n_tokens):
    """The BlockMask that a `block_table` describes, on the table's device; nothing is computed.

    Being of one image is symmetric: the query blocks that touch a key block are the key blocks that it touches as a
    query block. `BlockMask.from_kv_blocks` would transpose the lists, which was most of a mask's cost.
    """
    n = -(-n_tokens // BLOCK)
    *lists, image = table.split([n, n * n, n, n * n, n_tokens])
    shapes = [(1, 1, n), (1, 1, n, n)] * 2
    number, index, whole_number, whole_index = (t.view(shape) for t, shape in zip(lists, shapes, strict=True))

    def same_image(b, h, q, k):
        return image[q] == image[k]

    return BlockMask(
        seq_lengths=(n_tokens, n_tokens),
        kv_num_blocks=number,
        kv_indices=index,
        full_kv_num_blocks=whole_number,
        full_kv_indices=whole_index,
        q_num_blocks=number,
        q_indices=index,
        full_q_num_blocks=whole_number,
        full_q_indices=whole_index,
        BLOCK_SIZE=(BLOCK, BLOCK),
        mask_mod=same_image,
    )


def block_mask(starts, n_tokens, device="cpu"):
    """FlexAttention's mask of a pack on `device`, by one copy."""
    return mask_of(block_table(starts, n_tokens).to(device), n_tokens)


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
