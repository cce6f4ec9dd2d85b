"""Hadamard matrices, which spread variance evenly over channels in PHI-S (E1).

Shape letters: n the order, q a prime.
"""

import math

import torch
from scipy.linalg import hadamard as sylvester


def hadamard(n):
    """A Hadamard matrix of order n (entries +-1, orthogonal rows), float64; None where no construction here reaches n.

    Sylvester doubling, Paley I (n - 1 prime, 3 mod 4) and Paley II (n / 2 - 1 prime, 1 mod 4), and their doublings.
    """
    if n & (n - 1) == 0:
        return torch.from_numpy(sylvester(n)).double()
    if n % 2 == 0 and (half := hadamard(n // 2)) is not None:
        return torch.cat([torch.cat([half, half], 1), torch.cat([half, -half], 1)])
    prime = lambda q: q > 1 and all(q % f for f in range(2, math.isqrt(q) + 1))  # noqa: E731

    def conference(q, symmetric):  # Paley's core [q + 1, q + 1]: zero diagonal, +-1 elsewhere, rows orthogonal
        square = torch.full((q,), -1.0, dtype=torch.float64)
        square[[x * x % q for x in range(1, q)]] = 1
        square[0] = 0
        i = torch.arange(q)
        core = torch.zeros(q + 1, q + 1, dtype=torch.float64)
        core[1:, 1:] = square[(i[:, None] - i) % q]
        core[0, 1:] = 1
        core[1:, 0] = 1 if symmetric else -1
        return core

    if n % 4 == 0 and prime(n - 1):
        return conference(n - 1, symmetric=False) + torch.eye(n, dtype=torch.float64)
    if n % 4 == 0 and prime(n // 2 - 1) and (n // 2 - 1) % 4 == 1:
        core, eye = conference(n // 2 - 1, symmetric=True), torch.eye(n // 2, dtype=torch.float64)
        a = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        b = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(core, a) + torch.kron(eye, b)
    return None
