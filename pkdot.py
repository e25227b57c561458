"""Losses and scores of PKDOT: all take tensors and scalars, none knows a data set or a network.

    loss = task_loss(output, label) + 0.4 * pkdot_loss(z_student, z_teacher, k=30)  # Eq. 9

Letters: b samples in the batch, m width of the joint representation z, k anchors. Theta (the
paper's letter) is the teacher's batch of representations, Phi the student's. A label that is not
there is -1 (class) or NaN (valence/arousal).
"""
import torch
import torch.nn.functional as F

from sinkhorn import full_precision, sinkhorn_divergence

ANCHORS = ("dissimilar", "similar", "random")


def cosine_similarity_matrix(z):
    """Cosine similarity of each row of z (b, m) to each, (b, b); Eq. 1-4. Zero rows give zeros."""
    norm = z.norm(dim=1, keepdim=True)  # Eq. 3
    z = z / norm.where(norm > 0, 1)
    return z @ z.T  # Eq. 1, 2 and 4: dividing the rows first is dividing C by N N^T


def pkdot_loss(student, teacher, k=30, epsilon=0.1, debias=True, anchors="dissimilar", shared=False,
               transport=True):
    """Entropic OT between the student's and the teacher's local structures; Eq. 1-6, section III.

    student, teacher: (b, m) and (b, m') representations of the same b samples; no gradient reaches
    the teacher. k: anchors, 1..b. epsilon: weight of the entropic term in Eq. 5, in units of the
    ground cost 1/2 |x - y|^2. debias: Sinkhorn divergence (zero when student equals teacher);
    False is Eq. 5 as it stands. anchors: "dissimilar" takes the k samples least similar in the
    teacher (the paper), "similar" the most similar (the first of a row's own is the row itself),
    "random" any (from torch's global generator).

    shared=False: each row has anchors of its own (the authors' code). Column c is then another
    sample in each row, and what rows share is the level of their lowest similarities.
    shared=True: the k samples least similar to the batch on average serve every row, so that a row
    is a position relative to the same landmarks. Either way OT matches the two *sets* of rows: its
    plan need not pair student i with teacher i; transport=False does instead.

    Returns a scalar, in full float32 even under autocast and with TF32 allowed (float64 if given);
    only backward's products of the cosine matrix follow the script's settings. Raises ValueError.
    """
    if student.ndim != 2 or teacher.ndim != 2 or len(student) != len(teacher):
        raise ValueError("student and teacher must be (b, m) over the same b samples, "
                         f"got {tuple(student.shape)} and {tuple(teacher.shape)}")
    b = len(student)
    _expect_anchors(k, b)
    if anchors not in ANCHORS:
        raise ValueError(f"anchors={anchors!r} is not one of {', '.join(ANCHORS)}")

    with full_precision(student.device.type):
        dtype = torch.promote_types(student.dtype, torch.float32)
        phi, theta = student.to(dtype), teacher.detach().to(dtype)
        S_phi, S_theta = map(cosine_similarity_matrix, (phi, theta))  # (b, b), Eq. 1-4
        if not torch.isfinite(S_phi.sum() + S_theta.sum()):
            raise ValueError("student or teacher representations hold NaN or infinity: "
                             f"{(~torch.isfinite(phi)).sum()} values of the student's, "
                             f"{(~torch.isfinite(theta)).sum()} of the teacher's")

        # the teacher alone chooses the anchors, and both sides are read at the same ones
        order = torch.rand_like(S_theta) if anchors == "random" else S_theta
        order = order.mean(0, keepdim=True) if shared else order  # (1, b) or (b, b)
        index = order.topk(k, dim=1, largest=anchors == "similar").indices.expand(b, k)
        x, y = S_phi.gather(1, index), S_theta.gather(1, index)  # (b, k) each

        if not transport:
            return (x - y).square().sum(1).mean() / 2  # row i with row i, at the same cost
        return sinkhorn_divergence(x, y, epsilon, debias)  # Eq. 5-6


def similarity_loss(student, teacher, k=30, student_temperature=0.1, teacher_temperature=0.05):
    """Cross-entropy of the student's distribution of similarities to the teacher's, over k random
    anchors that all rows share, row i with row i; (b, m) and (b, m') -> scalar. [ours]

    After SEED (Fang et al. 2021, of one modality) and COMODO (Chen et al. 2025, from video to
    inertial sensors). Both compare student and teacher to a long queue of the teacher's embeddings,
    in one space; here each is compared to its own representations of the batch, whose widths may
    differ. It needs no classes. ValueError: k not in 1..b.
    """
    b = len(student)
    _expect_anchors(k, b)
    anchors = torch.randperm(b, device=student.device)[:k]
    S_phi, S_theta = (cosine_similarity_matrix(z)[:, anchors] for z in (student, teacher.detach()))
    wanted = (S_theta / teacher_temperature).softmax(1)  # (b, k)
    return F.cross_entropy(S_phi / student_temperature, wanted)


def _expect_anchors(k, b):
    if not 1 <= k <= b:
        raise ValueError(f"k={k} anchors need 1 <= k <= b, and the batch has b={b} samples")


def cosine_loss(student, teacher):
    """Mean over samples of 1 - cos(z_s, z_t), (b, m) each; Aslam et al. 2023 ([10] in Table II)."""
    return 1 - F.cosine_similarity(student, teacher.detach(), dim=1).mean()


def mse_loss(student, teacher):
    """Mean squared error of the representations, (b, m) each; Makantasis et al. 2023 ([8])."""
    return F.mse_loss(student, teacher.detach())


def kl_loss(student_logits, teacher_logits, temperature=4.0):
    """T^2 KL(teacher || student) of the softened classes, (b, classes) each; Hinton et al. 2015,
    [8] in Table II."""
    log_p_s = F.log_softmax(student_logits / temperature, dim=1)
    log_p_t = F.log_softmax(teacher_logits.detach() / temperature, dim=1)
    return temperature**2 * F.kl_div(log_p_s, log_p_t, reduction="batchmean", log_target=True)


def rkd_loss(student, teacher, distance=25.0, angle=50.0):
    """Relational KD of (b, m) representations; Park et al. 2019 ([31]). Means over all b^2 pairs
    and b^3 triplets."""
    d_s, a_s = _relations(student)
    d_t, a_t = _relations(teacher.detach())
    return distance * F.smooth_l1_loss(d_s, d_t) + angle * F.smooth_l1_loss(a_s, a_t)


def _relations(z):
    """Pairwise distances over their mean (b, b), and for each middle sample j the cosines of the
    angles i-j-k (b, b, b)."""
    d = torch.cdist(z, z, compute_mode="donot_use_mm_for_euclid_dist")
    mean = d.sum() / (d > 0).sum().clamp_min(1)

    # (z_i - z_j)(z_k - z_j) from the Gram matrix: no (b, b, m) tensor, five times as fast
    z = z - z.mean(0)
    gram = z @ z.T
    inner = gram - gram[:, :, None] - gram[:, None] + gram.diagonal()[:, None, None]  # [j, i, k]
    length = d.where(d > 0, 1)
    # of two samples that nearly coincide, rounding alone would make a "cosine" of a hundred
    cosine = (inner / (length[:, :, None] * length[:, None])).clamp(-1, 1)
    return d / mean.where(mean > 0, 1), cosine


def ccc(prediction, target):
    """Concordance correlation coefficient of two 1-d series -> scalar; Eq. 7 without its "1 -".

    Population variances. A constant series concords with nothing: 0, never NaN.
    """
    if prediction.shape != target.shape or prediction.numel() == 0:
        raise ValueError("ccc needs two series of one length, "
                         f"got {tuple(prediction.shape)} and {tuple(target.shape)}")
    # a constant's mean may be off by a rounding, which must not pass for variance
    x, y = ((s - s.mean()) * (s != s[0]).any() for s in (prediction, target))
    gap = prediction.mean() - target.mean()
    denominator = x.square().mean() + y.square().mean() + gap.square()
    covariance = (x * y).mean()  # rho sigma_x sigma_y
    return 2 * covariance / denominator.where(denominator > 0, 1)


def task_loss(output, label):
    """L_gt: cross-entropy (Eq. 8) of (B, classes) with int labels (B,), or 1 - CCC (Eq. 7) of
    (B, L, 2), over all labelled clips of the batch together, the mean of valence and arousal.

    What has no label (-1, NaN) does not count; a batch without one has loss 0.
    """
    if not label.is_floating_point():
        total = F.cross_entropy(output, label, ignore_index=-1, reduction="sum")
        return total / (label >= 0).sum().clamp_min(1)

    labelled = ~label.isnan().any(-1)
    output, label = output[labelled], label[labelled]  # (labelled clips, 2)
    if len(label) == 0:
        return output.sum()  # of nothing: 0, and so is its gradient
    return 1 - (ccc(output[:, 0], label[:, 0]) + ccc(output[:, 1], label[:, 1])) / 2


def metrics(prediction, label):
    """What the tables show, as a dict: accuracy in percent of (N, classes) and labels (N,), or the
    CCC of valence and of arousal of two (N, 2); and n, how many were scored. All have a label."""
    if not label.is_floating_point():
        right = prediction.argmax(1) == label
        return {"accuracy": 100 * right.double().mean().item(), "n": len(label)}
    valence, arousal = (ccc(prediction[:, i], label[:, i]).item() for i in (0, 1))
    return {"valence": valence, "arousal": arousal, "n": len(label)}
