"""Losses and scores of PKDOT: all take tensors and scalars, none knows a data set or a network.

    loss = task_loss(output, label) + 0.4 * pkdot_loss(z_student, z_teacher, k=30, epsilon=0.1)     # Eq. 9

Letters: b samples in the batch, m width of the joint representation z, k anchors.
Theta (the paper's letter) is the teacher's batch of representations, Phi the student's.
"""
import torch
import torch.nn.functional as F

from sinkhorn import sinkhorn_divergence

ANCHORS = ("dissimilar", "similar", "random")
INVALID = -5.0  # Affwild2's mark for a frame without a valence/arousal label


def cosine_similarity_matrix(z):
    """Cosine similarity of each row of z (b, m) to each row -> (b, b); Eq. 1-4. A zero row gives zeros."""
    z = _unit(z)
    return z @ z.T  # Eq. 1, 2 and 4: dividing the rows first is dividing C by N N^T


def _unit(z):
    """z over its norm along the last axis (Eq. 3); a zero vector stays zero and its gradient finite."""
    norm = z.norm(dim=-1, keepdim=True)
    return z / norm.where(norm > 0, 1)


def pkdot_loss(student, teacher, k=30, epsilon=0.1, debias=True, anchors="dissimilar"):
    """Entropic OT between the student's and the teacher's local structures; Eq. 1-6, section III.

    student, teacher: (b, m) and (b, m') representations of the same b samples; no gradient reaches the teacher.
    k: anchors per row, 1..b. epsilon: weight of the entropic term in Eq. 5, in units of the ground cost 1/2 |x - y|^2.
    debias: Sinkhorn divergence (zero when student equals teacher); False is Eq. 5 to the letter.
    anchors: "dissimilar" takes each row's k least similar samples in the teacher (the paper), "similar" the k most
    similar (itself among them), "random" k at random (drawn from torch's global generator).
    Returns a scalar, in float32 even under autocast (float64 if given). Raises ValueError.
    """
    if student.ndim != 2 or teacher.ndim != 2 or len(student) != len(teacher):
        raise ValueError(f"student and teacher must be (b, m) over the same b samples, "
                         f"got {tuple(student.shape)} and {tuple(teacher.shape)}")
    b = len(student)
    if not 1 <= k <= b:
        raise ValueError(f"k={k} anchors need 1 <= k <= b, and the batch has b={b} samples")
    if anchors not in ANCHORS:
        raise ValueError(f"anchors={anchors!r} is not one of {', '.join(ANCHORS)}")
    with torch.autocast(student.device.type, enabled=False):
        dtype = torch.promote_types(student.dtype, torch.float32)
        phi, theta = student.to(dtype), teacher.detach().to(dtype)
        S_phi, S_theta = cosine_similarity_matrix(phi), cosine_similarity_matrix(theta)  # (b, b), Eq. 1-4
        if not torch.isfinite(S_phi.sum() + S_theta.sum()):
            raise ValueError("student or teacher representations hold NaN or infinity: "
                             f"{(~torch.isfinite(phi)).sum()} values of the student's, "
                             f"{(~torch.isfinite(theta)).sum()} of the teacher's")
        order = torch.rand_like(S_theta) if anchors == "random" else S_theta
        index = order.topk(k, dim=1, largest=anchors == "similar").indices  # (b, k), chosen by the teacher alone
        x, y = S_phi.gather(1, index), S_theta.gather(1, index)  # (b, k) each: the same anchors for both
        return sinkhorn_divergence(x, y, epsilon, debias)  # Eq. 5-6


def cosine_loss(student, teacher):
    """Mean over samples of 1 - cos(z_s, z_t), for (b, m) each; Aslam et al. 2023 ([10] in Table II)."""
    return 1 - F.cosine_similarity(student, teacher.detach(), dim=1).mean()


def mse_loss(student, teacher):
    """Mean squared error of the representations, (b, m) each; Makantasis et al. 2023 ([8] in Table II)."""
    return F.mse_loss(student, teacher.detach())


def kl_loss(student_logits, teacher_logits, temperature=4.0):
    """T^2 KL(teacher || student) of the softened classes, (b, classes) each; Hinton et al. 2015, [8] in Table II."""
    log_p_s = F.log_softmax(student_logits / temperature, dim=1)
    log_p_t = F.log_softmax(teacher_logits.detach() / temperature, dim=1)
    return temperature**2 * F.kl_div(log_p_s, log_p_t, reduction="batchmean", log_target=True)


def rkd_loss(student, teacher, distance=25.0, angle=50.0):
    """Relational KD of (b, m) representations; Park et al. 2019 ([31]). Means over all b^2 pairs and b^3 triplets."""
    d_s, a_s = _relations(student)
    d_t, a_t = _relations(teacher.detach())
    return distance * F.smooth_l1_loss(d_s, d_t) + angle * F.smooth_l1_loss(a_s, a_t)


def _relations(z):
    """Pairwise distances over their mean (b, b), and for each middle sample j the cosines of angles i-j-k (b, b, b)."""
    d = torch.cdist(z, z, compute_mode="donot_use_mm_for_euclid_dist")
    mean = d.sum() / (d > 0).sum().clamp_min(1)
    z = z - z.mean(0)
    gram = z @ z.T
    # (z_i - z_j)(z_k - z_j) from the products of two: without a (b, b, m) tensor, five times as fast
    inner = gram - gram[:, :, None] - gram[:, None] + gram.diagonal()[:, None, None]  # [j, i, k]
    length = d.where(d > 0, 1)
    return d / mean.where(mean > 0, 1), inner / (length[:, :, None] * length[:, None])


def ccc(prediction, target):
    """Concordance correlation coefficient of two 1-d series -> scalar; Eq. 7 without its "1 -".

    Population variances. A constant series concords with nothing: 0, never NaN.
    """
    if prediction.shape != target.shape or prediction.numel() == 0:
        raise ValueError(f"ccc needs two series of one length, got {tuple(prediction.shape)} and {tuple(target.shape)}")
    # a constant's mean may be off by a rounding, which must not pass for variance
    x, y = ((series - series.mean()) * (series != series[0]).any() for series in (prediction, target))
    denominator = x.square().mean() + y.square().mean() + (prediction.mean() - target.mean()).square()
    return 2 * (x * y).mean() / denominator.where(denominator > 0, 1)  # rho sigma_x sigma_y is the covariance


def valid(label):
    """Which (..., 2) valence/arousal labels count: neither value is Affwild2's -5 -> (...) bool."""
    return (label != INVALID).all(-1)


def task_loss(output, label):
    """L_gt: cross-entropy (Eq. 8) for class labels (B,), 1 - CCC (Eq. 7) for valence/arousal labels (B, L, 2).

    CCC is taken over all valid clips of the batch together, and averaged over valence and arousal.
    """
    if not label.is_floating_point():
        return F.cross_entropy(output, label)
    keep = valid(label)
    output, label = output.float()[keep], label[keep]  # (valid clips, 2)
    return 1 - (ccc(output[:, 0], label[:, 0]) + ccc(output[:, 1], label[:, 1])) / 2
