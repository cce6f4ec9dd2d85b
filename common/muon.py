"""Muon (Keller Jordan, 2024; kellerjordan.github.io/posts/muon): steps of matrices are made orthogonal.

torch.optim.Muon takes matrices alone; experts are stacks of them, which here are stepped all at once.
"""

import torch

# Of the odd polynomial that pushes singular values of (0, 1] into about (0.7, 1.2) in five turns; by K. Jordan.
QUINTIC, TURNS = (3.4445, -4.7750, 2.0315), 5


def orthogonalise(g):
    """Matrices [..., m, n], their singular values brought near 1 (Newton-Schulz)."""
    a, b, c = QUINTIC
    x = g.bfloat16() if g.is_cuda else g
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(TURNS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x if wide else x.mT).to(g.dtype)


class Muon(torch.optim.AdamW):
    """AdamW, but for the groups marked "muon": their parameters, [..., m, n], are stepped by Muon.

    Steps are scaled by 0.2 sqrt(max(m, n)), so that they are as large as AdamW's and take its learning rate and decay
    (arXiv 2502.16982). `found_inf`, as the fused AdamW has it: where it is 1, nothing changes.
    """

    @torch.no_grad()
    def step(self):
        good = 1 - self.found_inf
        for group in self.param_groups:
            for p in group["params"] if group.get("muon") else ():
                if p.grad is None:
                    continue
                grad = torch.where(good.bool(), p.grad, 0)
                state = self.state[p]
                if not state:
                    state |= {"momentum": torch.zeros_like(p), "step": torch.tensor(0.0)}  # AdamW reads back a "step"
                momentum = state["momentum"]
                momentum.lerp_(grad, 0.05 * good)
                step = orthogonalise(grad.lerp(momentum, 0.95)) * (0.2 * max(p.shape[-2:]) ** 0.5)
                p.mul_(1 - group["lr"] * group["weight_decay"] * good).sub_(step * good, alpha=group["lr"])
                p.grad = None  # AdamW passes over it
        super().step()
