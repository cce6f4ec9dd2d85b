"""Muon (Keller Jordan, 2024; kellerjordan.github.io/posts/muon): steps of matrices are made orthogonal.

torch.optim.Muon takes matrices alone; experts are stacks of them, which here are stepped all at once.
"""

import torch

# x <- a x + b x^3 + c x^5, turn after turn, brings singular values of [0.01, 1] into [0.73, 1.27], and smaller ones 78
# times nearer. Each turn is the best one on what the turn before leaves (arXiv 2505.16932), solved as a linear program.
# K. Jordan's one quintic takes five turns: no better scores on the toy, and 1.7 times the work.
TURNS = (8.0934, -23.6205, 17.4462), (3.6366, -2.7219, 0.5365), (2.6613, -1.9772, 0.4526)


def orthogonalise(g):
    """Matrices [N, m, n], their singular values brought near 1 (Newton-Schulz)."""
    x = g.bfloat16() if g.is_cuda else g
    wide = x.shape[1] <= x.shape[2]
    x = x if wide else x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for a, b, c in TURNS:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.mT).to(g.dtype)


class Muon(torch.optim.AdamW):
    """AdamW, but for the groups marked "muon": their parameters, [..., m, n], are stepped by Muon.

    Steps are scaled by 0.2 sqrt(max(m, n)), so that they are as large as AdamW's and take its learning rate and decay
    (arXiv 2502.16982). `found_inf`, as the fused AdamW has it: where it is 1, nothing changes. Of what FSDP2 shards,
    a rank holds whole experts, and of a matrix some rows: these are brought together for the step.
    """

    @torch.no_grad()
    def step(self, closure=None):
        good = 1 - self.found_inf
        for group in self.param_groups:
            alike = {}  # small matrices of one shape are stepped together
            for p in group["params"] if group.get("muon") else ():
                if p.grad is not None:
                    alike.setdefault(p.shape if p.ndim == 2 else p, []).append(p)
            for parameters in alike.values():
                moments = [self.momentum(p, good) for p in parameters]
                steps = orthogonalise(torch.cat(moments))
                size = (0.2 * max(steps.shape[1:]) ** 0.5) * good
                for p, step in zip(parameters, steps.split([len(m) for m in moments]), strict=True):
                    own = local(p).mul_(1 - group["lr"] * group["weight_decay"] * good)
                    own.sub_(part(step, p).view(own.shape) * size, alpha=group["lr"])
                    p.grad = None  # AdamW passes over it
        return super().step(closure)

    def momentum(self, p, good):
        """Nesterov's momentum of a parameter, as matrices [N, m, n]; its state moves on where good is 1."""
        grad, state = torch.where(good.bool(), local(p.grad), 0), self.state[p]
        if not state:
            state |= {"momentum": torch.zeros_like(p), "step": torch.tensor(0.0)}  # AdamW reads back a "step"
        momentum = local(state["momentum"]).lerp_(grad, 0.05 * good)
        return whole(grad.lerp(momentum, 0.95), p).view(-1, *p.shape[-2:])


def local(x):
    """This rank's part of a tensor; all of one that is not sharded."""
    return x.to_local() if hasattr(x, "to_local") else x


def whole(x, p):
    """The whole matrix of p's shape whose rows x this rank holds; of experts, which a rank holds whole, x itself."""
    if p.ndim > 2 or not hasattr(p, "to_local"):
        return x
    return type(p.data).from_local(x, p.device_mesh, p.placements, shape=p.shape, stride=p.stride()).full_tensor()


def part(x, p):
    """The rows that this rank holds of x [1, m, n], a matrix of p's shape: the inverse of `whole`."""
    if p.ndim > 2 or not hasattr(p, "to_local"):
        return x
    return type(p.data).from_local(x[0], p.device_mesh).redistribute(placements=p.placements).to_local()
