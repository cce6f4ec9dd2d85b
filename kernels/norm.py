"""RMSNorm with few passes over memory on a CPU, where torch's own is six operators and their gradients eleven.

Shape letters: N rows of any leading axes, D channels.
"""

import torch
import torch.nn.functional as F
from torch import nn


class RMSNormFunction(torch.autograd.Function):
    """weight y, with y = s x and s = 1 / sqrt(mean(x^2) + eps). Backward: s (g' - y mean(g' y)), with g' = g weight."""

    @staticmethod
    def forward(ctx, x_ND, weight_D, eps):
        scale_N1 = (x_ND.square().mean(-1, keepdim=True) + eps).rsqrt_()
        y_ND = x_ND * scale_N1
        ctx.save_for_backward(y_ND, scale_N1, weight_D)
        return y_ND if weight_D is None else y_ND * weight_D

    @staticmethod
    def backward(ctx, g_ND):
        y_ND, scale_N1, weight_D = ctx.saved_tensors
        g_D = None
        if weight_D is not None:
            g_D, g_ND = (g_ND * y_ND).flatten(0, -2).sum(0), g_ND * weight_D
        along_N1 = torch.linalg.vecdot(g_ND, y_ND).unsqueeze(-1) / -y_ND.shape[-1]
        return torch.addcmul(g_ND, y_ND, along_N1).mul_(scale_N1), g_D, None


def rms_norm(x_ND, weight_D, eps):
    """F.rms_norm over the last axis; on a CPU, uncompiled and unrounded, in half of its time."""
    whole = x_ND.dtype in (torch.float32, torch.float64) and (weight_D is None or weight_D.dtype == x_ND.dtype)
    if x_ND.device.type == "cpu" and whole and not torch.compiler.is_compiling():
        return RMSNormFunction.apply(x_ND, weight_D, eps)
    return F.rms_norm(x_ND, x_ND.shape[-1:], weight_D, eps)


class RMSNorm(nn.RMSNorm):
    """nn.RMSNorm by `rms_norm`."""

    def forward(self, x_ND):
        return rms_norm(x_ND, self.weight, self.eps)
