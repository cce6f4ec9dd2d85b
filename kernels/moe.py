"""Mixture-of-Experts feed-forward: y_t = sum_k weight_tk * w2_e (silu(w1_e x_t) * w3_e x_t) with e = expert_tk.

`ref` loops over the experts: any device, any float dtype, and the definition. It needs the counts on the host.
`grouped` is torch's grouped GEMM: CUDA, bfloat16, no host synchronisation, so it compiles without a break.

Shape letters: T tokens, D model width, E experts, F expert width, K experts a token.
"""

import torch
import torch.nn.functional as F


def choose(impl, device):
    """The form that `impl` ("auto", "ref", "grouped") means on `device`; an explicit one that cannot run raises."""
    if impl == "auto":
        return "grouped" if device.type == "cuda" and hasattr(F, "grouped_mm") else "ref"
    if impl not in ("ref", "grouped"):
        raise ValueError(f"kernels.moe has no implementation '{impl}'; it has ref and grouped")
    if impl == "grouped" and device.type != "cuda":
        raise ValueError(f"kernels.moe: 'grouped' needs a CUDA device and was asked to run on {device.type}; use ref")
    return impl


def moe(x_TD, expert_TK, weight_TK, w1_EFD, w2_EDF, w3_EFD, impl="auto"):
    """Every token through its K experts, weighted after the expert; no token is dropped. Returns [T, D] in x's dtype.

    expert_TK: int64 expert indices; weight_TK: float32 routing weights. Accumulates the K results in x's dtype.
    """
    # A stable sort keeps a token's rows in order inside an expert, so sums do not depend on the sort algorithm.
    order_N = expert_TK.flatten().argsort(stable=True)  # N = T K routed rows, grouped by expert
    token_N = order_N // expert_TK.shape[1]
    # Not bincount, whose size a compiler cannot know.
    count_E = torch.zeros(len(w1_EFD), dtype=torch.int64, device=x_TD.device)
    count_E.scatter_add_(0, expert_TK.flatten(), torch.ones_like(order_N))
    experts = experts_grouped if choose(impl, x_TD.device) == "grouped" else experts_ref
    y_ND = experts(x_TD.index_select(0, token_N), count_E, w1_EFD, w2_EDF, w3_EFD)
    y_ND = y_ND * weight_TK.flatten()[order_N, None].to(y_ND.dtype)
    return torch.zeros_like(x_TD).index_add(0, token_N, y_ND.to(x_TD.dtype))


def experts_ref(x_ND, count_E, w1_EFD, w2_EDF, w3_EFD):
    """Rows sorted by expert, `count_E` of them each, through their experts. One without rows stays in the graph."""
    groups = x_ND.split(count_E.tolist())
    return torch.cat(
        [
            F.linear(F.silu(F.linear(x, w1)) * F.linear(x, w3), w2)
            for x, w1, w2, w3 in zip(groups, w1_EFD, w2_EDF, w3_EFD, strict=True)
        ]
    )


def experts_grouped(x_ND, count_E, w1_EFD, w2_EDF, w3_EFD):
    """The same through torch's grouped GEMM, which takes bfloat16 operands and the groups' ends."""
    end_E = count_E.cumsum(0).int()
    x_ND, w1, w2, w3 = (t.bfloat16() for t in (x_ND, w1_EFD, w2_EDF, w3_EFD))
    hidden_NF = F.silu(F.grouped_mm(x_ND, w1.mT, offs=end_E)) * F.grouped_mm(x_ND, w3.mT, offs=end_E)
    return F.grouped_mm(hidden_NF, w2.mT, offs=end_E)
