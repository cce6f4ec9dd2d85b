"""Asymmetric relational distillation (E4; AMoE, arXiv 2512.20157): pairwise distances, student against teacher.

`ref` builds the B x B distances by differences: it is the definition.
`chunked` goes through strips of rows in float64, where |a|^2 - 2ab + |b|^2 does not cancel: nothing of B x B elements.
Both run on any device, in float32 or float64, and never make the host wait for it.

With n = B (B - 1), g_ij the derivative of a pair's loss by D^S_ij and mu the student's mean distance,

    dL/dz_i = sum_j w_ij (z_i - z_j),    w_ij = 2 / (n mu) (g_ij - c) / d_ij,    c = 1/n sum_kl g_kl D^S_kl

where c is the path through the mean. So three passes over the pairs are enough: the two means, then the loss and c,
then the gradient.

Shape letters: B summaries in the global batch, D channels (student and teacher may differ), R rows of a strip.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F

from kernels import check_impl

MODES = ("arkd", "rkd")
IMPLS = ("ref", "chunked")
MEDIAN_EXACT = 4096  # images up to which the teacher's median is over every pair
MEDIAN_SHIFTS = 128  # beyond, over MEDIAN_SHIFTS * B seeded pairs: at B = 4097 the rank of the median is off by 0.07%
TIE = 4  # machine epsilons: distances this near the median count as equal to it, whichever form rounded them
ZERO = 1e-13  # images whose squared distance is below this share of |a|^2 + |b|^2 count as equal: float64's rounding
STRIP = 1024  # rows of a strip: its weights take 256 MiB at B = 32k
SMALL = 128  # images up to which `auto` takes ref: one graph to a compiler, and 2.5 against 1.8 ms on 2 cores, D = 128


# ---- the definition ----


def arkd_ref(student_BD, teacher_BD, mode):
    B = len(student_BD)
    student_BB, teacher_BB = distances(student_BD), distances(teacher_BD)
    near_BB = teacher_BB < median_cut(teacher_BD)
    excess_BB = over_mean(student_BB) - over_mean(teacher_BB)
    if mode == "arkd":  # pairs the teacher holds close may not be further apart, the others may not be closer
        excess_BB = torch.where(near_BB, excess_BB.clamp(min=0), excess_BB.clamp(max=0))
    loss = F.smooth_l1_loss(excess_BB, torch.zeros_like(excess_BB), reduction="sum", beta=1.0)
    return loss / (B * (B - 1))  # the diagonal is 0 in both and adds nothing


def distances(z_BD):
    """||z_i - z_j||, by differences: |a|^2 - 2ab + |b|^2 would cancel in float32."""
    # cdist: its gradient at distance 0 is 0, where that of a square root would be NaN
    return torch.cdist(z_BD, z_BD, compute_mode="donot_use_mm_for_euclid_dist")


def over_mean(d_BB):
    """Distances over their mean for i != j, which is positive unless every image is the same."""
    B = len(d_BB)
    return d_BB / (d_BB.sum() / (B * (B - 1))).clamp(min=torch.finfo(d_BB.dtype).tiny)


def median_cut(teacher_BD, exact=lambda z_BD: F.pdist(z_BD).median()):  # of each pair once: the same median
    """Below this a distance is under the lower median over i != j, with equal distances on one side of it.

    `exact` up to MEDIAN_EXACT images; then from seeded pairs, the same for every implementation: neighbours at
    MEDIAN_SHIFTS random shifts of one random order, so that each image is drawn equally often and nothing is gathered
    twice.
    """
    B = len(teacher_BD)
    if B <= MEDIAN_EXACT:
        median = exact(teacher_BD)
    else:
        generator = torch.Generator().manual_seed(0)
        # Drawn on the host, so that every device draws the same; a copy from pinned memory waits for no device's work.
        order = torch.randperm(B, generator=generator, pin_memory=teacher_BD.is_cuda)
        z_BD = teacher_BD[order.to(teacher_BD.device, non_blocking=True)]
        shifts = torch.randint(1, B, (MEDIAN_SHIFTS,), generator=generator).tolist()
        median = torch.cat([torch.linalg.vector_norm(z_BD - z_BD.roll(shift, 0), dim=1) for shift in shifts]).median()
    return median * (1 - TIE * torch.finfo(median.dtype).eps)


# ---- strips of rows ----


def strip_distances(z, start, stop):
    """||z_i - z_j|| of rows start <= i < stop with all, float64 [R, B]; z: centred z_BD, and its squared norms."""
    z_BD, square_B = z
    scale_RB = square_B[start:stop, None] + square_B
    squared_RB = torch.addmm(scale_RB, z_BD[start:stop], z_BD.T, alpha=-2)
    return squared_RB.masked_fill_(squared_RB <= ZERO * scale_RB, 0).sqrt_()


def strip_pairs(student, teacher, scalars, mode, start, stop, weights):
    """Totals of pairs' losses and of slope * d, slope being its derivative by D^S; or the gradient's weights [R, B]."""
    student_RB, teacher_RB = strip_distances(student, start, stop), strip_distances(teacher, start, stop)
    mean_student, mean_teacher, cut = scalars[:3]
    excess_RB = student_RB / mean_student - teacher_RB / mean_teacher
    if mode == "arkd":
        excess_RB = torch.where(teacher_RB < cut, excess_RB.clamp(min=0), excess_RB.clamp(max=0))
    slope_RB = excess_RB.clamp(-1, 1)
    if weights:
        return torch.where(student_RB > 0, (slope_RB - scalars[3]) / student_RB, 0)
    loss_RB = slope_RB * (excess_RB - slope_RB / 2)  # smooth L1: x^2 / 2 up to |x| = 1, |x| - 1/2 beyond
    return torch.stack([t.sum() for t in (loss_RB, slope_RB * student_RB)])


# ---- autograd ----


class Relational(torch.autograd.Function):
    """The three passes over strips, and the sums that ranks share between them."""

    @staticmethod
    def forward(ctx, student_BD, teacher_BD, mode, rows, group):
        B = len(student_BD)
        span = rows if group is not None else (0, B)  # the rows whose sums this rank contributes
        student, teacher = both = centred(student_BD), centred(teacher_BD)
        zero = student_BD.new_zeros(2, dtype=torch.float64)  # a rank may have been given no rows
        total = lambda of, rows=span: sum((of(*strip) for strip in strips(*rows)), zero)  # noqa: E731
        # First pass: the two means.
        sums = lambda *strip: torch.stack([strip_distances(z, *strip).sum() for z in both])  # noqa: E731
        means_2 = (over_ranks(total(sums), group) / (B * (B - 1))).clamp(min=torch.finfo(torch.float32).tiny)
        cut = median_cut(teacher_BD, lambda _: strip_median(teacher, span, group))
        scalars = torch.cat([means_2, cut[None]])
        # Second pass: the loss, and c.
        sums = lambda *strip: strip_pairs(student, teacher, scalars, mode, *strip, weights=False)  # noqa: E731
        sums_2 = total(sums)
        own = (sums_2 if span == rows else total(sums, rows))[0].clone()
        c = over_ranks(sums_2[1].clone(), group) / means_2[0] / (B * (B - 1))
        ctx.save_for_backward(*student, *teacher, torch.cat([scalars, c[None]]))
        ctx.mode, ctx.rows, ctx.dtype = mode, rows, student_BD.dtype
        return (own / (B * (B - 1))).to(student_BD.dtype)

    @staticmethod
    def backward(ctx, grad):
        z_BD, square_B, *teacher, scalars = ctx.saved_tensors
        B, student, out_BD = len(z_BD), (z_BD, square_B), torch.zeros_like(z_BD)
        for start, stop in strips(*ctx.rows):
            weight_RB = strip_pairs(student, teacher, scalars, ctx.mode, start, stop, weights=True)
            out_BD[start:stop] = z_BD[start:stop] * weight_RB.sum(1, keepdim=True) - weight_RB @ z_BD
        return (out_BD * (grad * 2 / (B * (B - 1)) / scalars[0])).to(ctx.dtype), None, None, None, None


def strip_median(z, rows, group):
    """The lower median over i != j, in float32, of distances that are neither kept nor sorted; `rows` are this rank's.

    Floats that are not negative sort like their bits. A histogram of the leading 16 bits, summed over ranks, finds the
    bin of the median; those of the other 16 bits, among the distances of that bin, narrow it down to one number.
    """
    z_BD, B = z[0], len(z[0])
    found, below = torch.zeros((), dtype=torch.int64, device=z_BD.device), (B * (B - 1) - 1) // 2 + B  # B: the diagonal
    for shift in (16, 0):
        count = torch.zeros(1 << 16, dtype=torch.int64, device=z_BD.device)
        for strip in strips(*rows):
            bits = strip_distances(z, *strip).float().view(torch.int32).flatten().long() >> shift
            count.scatter_add_(0, bits & 0xFFFF, (bits >> 16 == found).long())
        through = over_ranks(count, group).cumsum(0)
        digit = torch.searchsorted(through, below + torch.zeros_like(found), right=True)
        below, found = below - (through[digit] - count[digit]), found << 16 | digit
    return found.int().view(torch.float32)


def centred(z_BD):
    """z minus its mean, in float64, and its squared norms: what all have in common would only cost digits."""
    z_BD = z_BD.double() - z_BD.double().mean(0)
    return z_BD, z_BD.square().sum(1)


def strips(start, stop):
    return [(at, min(at + STRIP, stop)) for at in range(start, stop, STRIP)]


def over_ranks(sums, group):
    if group is not None:
        dist.all_reduce(sums, group=group)
    return sums


# ---- the operation ----


def arkd(student_BD, teacher_BD, mode="arkd", impl="auto", rows=None, group=None):
    """The relational loss over ordered pairs i != j, float32 (or float64); gradients reach the student only.

    mode "arkd" gates by the teacher: pairs it holds closer than the median may not be further apart in the student, the
    others may not be closer. "rkd" (arXiv 1904.05068) pulls both ways on every pair. Fewer than two images give 0.

    impl "auto" is ref up to SMALL images, and chunked beyond.

    rows = (start, stop), stop exclusive, shares the work over ranks that all hold the whole batch. It returns those
    rows' part of the sum over i, still over B (B - 1); its gradient is the whole loss's for z_start to z_(stop - 1) and
    zero for the others. Over ranks whose rows cover the batch once, values add up to the loss and gradients to its
    gradient, and a rank whose rows are its own images has all of theirs (multiply by the world size where gradients are
    averaged over ranks, as DDP does). The means are the global ones either way: with `group`, a torch.distributed
    process group, each rank sums its rows and three scalars are added up; without it every rank sums all rows itself.

    Raises ValueError on unequal numbers of rows, an unknown mode or impl, or ref with rows.
    """
    B = len(student_BD)
    if mode not in MODES:
        raise ValueError(f"arkd mode '{mode}' is not one of {', '.join(MODES)}")
    if B != len(teacher_BD):
        raise ValueError(f"arkd compares the same images: {B} student rows, {len(teacher_BD)} of the teacher")
    if rows is not None and not 0 <= rows[0] <= rows[1] <= B:
        raise ValueError(f"arkd rows {tuple(rows)} are not a range of the {B} images; 0 <= start <= stop <= {B}")
    if group is not None and rows is None:
        raise ValueError("arkd was given a group without rows: say which rows are this rank's, rows=(start, stop)")
    dtype = torch.promote_types(torch.promote_types(student_BD.dtype, teacher_BD.dtype), torch.float32)
    student_BD, teacher_BD = student_BD.to(dtype), teacher_BD.detach().to(dtype)
    if group is None and rows is not None and tuple(rows) == (0, B):
        rows = None  # a world of one
    if impl == "auto":
        impl = "ref" if B <= SMALL and rows is None else "chunked"
    whole = None if rows is None else "computes every row and was given rows="
    check_impl("arkd", impl, {"ref": whole, "chunked": None}, "chunked")
    if B < 2:
        return student_BD.sum() * 0  # a zero that stays in the graph
    if impl == "ref":
        return arkd_ref(student_BD, teacher_BD, mode)
    return Relational.apply(student_BD, teacher_BD, mode, tuple(rows or (0, B)), group)
