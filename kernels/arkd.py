"""Asymmetric relational distillation (E4; AMoE, arXiv 2512.20157): pairwise distances, student against teacher.

`ref` builds the B x B distances: any device, float32 or float64, and the definition.

Shape letters: B summaries in the global batch, D channels (student and teacher may differ).
"""

import torch
import torch.nn.functional as F

MEDIAN_EXACT = 4096  # images up to which the teacher's median is over every pair; beyond, over as many sampled pairs
MODES = ("arkd", "rkd")


def arkd(student_BD, teacher_BD, mode="arkd", impl="auto"):
    """The relational loss over ordered pairs i != j, float32 (or float64); gradients reach the student only.

    mode "arkd" gates by the teacher: pairs it holds closer than the median may not be further apart in the student, the
    others may not be closer. "rkd" (arXiv 1904.05068) pulls both ways on every pair. Fewer than two images give 0.
    """
    if mode not in MODES:
        raise ValueError(f"arkd mode '{mode}' is not one of {', '.join(MODES)}")
    if impl not in ("auto", "ref"):
        raise ValueError(f"kernels.arkd has no implementation '{impl}'; it has ref")
    if len(student_BD) != len(teacher_BD):
        raise ValueError(
            f"arkd compares the same images: {len(student_BD)} student rows, {len(teacher_BD)} of the teacher"
        )
    dtype = torch.promote_types(student_BD.dtype, torch.float32)
    return arkd_ref(student_BD.to(dtype), teacher_BD.detach().to(dtype), mode)


def arkd_ref(student_BD, teacher_BD, mode):
    B = len(student_BD)
    if B < 2:
        return student_BD.sum() * 0  # a zero that stays in the graph
    student_BB = normalised_distances(student_BD)
    teacher_BB = normalised_distances(teacher_BD)
    if mode == "rkd":
        loss_BB = smooth_l1(student_BB - teacher_BB)
    else:
        near_BB = teacher_BB < lower_median(teacher_BB)
        excess_BB = torch.where(near_BB, student_BB - teacher_BB, teacher_BB - student_BB)
        loss_BB = smooth_l1(excess_BB.clamp(min=0))
    return loss_BB.sum() / (B * (B - 1))  # the diagonal is 0 in both and adds nothing


def normalised_distances(z_BD):
    """||z_i - z_j|| over its mean for i != j, from differences: |a|^2 - 2ab + |b|^2 would cancel in float32."""
    B = len(z_BD)
    # cdist: its gradient at distance 0 is 0, where that of a square root would be NaN
    d_BB = torch.cdist(z_BD, z_BD, compute_mode="donot_use_mm_for_euclid_dist")
    mean = d_BB.sum() / (B * (B - 1))
    return d_BB / mean.clamp(min=torch.finfo(d_BB.dtype).tiny)


def lower_median(d_BB, seed=0):
    """Lower median over i != j; exact up to MEDIAN_EXACT images, then from as many seeded pairs."""
    B = len(d_BB)
    if B <= MEDIAN_EXACT:
        i, j = torch.triu_indices(B, B, 1, device=d_BB.device)  # each pair once: the same median
    else:
        generator = torch.Generator().manual_seed(seed)
        n = MEDIAN_EXACT * (MEDIAN_EXACT - 1) // 2
        i = torch.randint(B, (n,), generator=generator)
        j = (i + torch.randint(1, B, (n,), generator=generator)) % B
        i, j = i.to(d_BB.device), j.to(d_BB.device)
    return d_BB[i, j].median()


def smooth_l1(x):
    return F.smooth_l1_loss(x, torch.zeros_like(x), reduction="none", beta=1.0)
