"""Entropic optimal transport (Eq. 5-6 of the paper) for dense problems, in plain torch.

    from sinkhorn import sinkhorn_divergence
    sinkhorn_divergence(x, y, epsilon=0.1).backward()  # x (..., n, d), y (..., m, d)

    python sinkhorn.py --sizes 128 512  # benchmark, beside geomloss where it is installed

Read `sweep` first: it is the whole method. `_solve` finds the same f and g, only faster.

Shapes: n points of weights a (n), m points of weights b (m), cost C (n, m); "..." are independent
problems. Units: epsilon and the potentials f, g are in the units of C.
"""
import argparse
import contextlib
import itertools
import warnings
from functools import partial
from math import inf, log, sqrt
from timeit import repeat

import torch
from torch.utils._python_dispatch import TorchDispatchMode

BLOCK = 7  # sweeps between two looks at the error: at each look the host waits for the device
SHORT = 4  # the same where max|C| is up to 2 epsilon: there a few sweeps suffice
EASY = 8  # max|C| / epsilon where the way down to a small epsilon begins; 8 to 15 do as well
SAFE_DRIFT = 20  # |log u|, |log v| up to which no entry of the plan is lost to underflow


@contextlib.contextmanager
def full_precision(device_type):
    """Inside, matrix products are in full float32 (float64), whatever autocast and the script's
    torch.set_float32_matmul_precision or allow_tf32 say: TF32 keeps three digits, with which the
    marginals stop near 1e-3. Afterwards, also after an error, the settings are what they were.
    """
    backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # bfloat16 on some CPUs
    settings = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        for backend, setting in zip(backends, settings, strict=True):
            backend.fp32_precision = setting


def sweep(cost, f, epsilon, a, b):
    """A sweep of Sinkhorn's algorithm for Eq. 5-6, in the log domain: f -> f (..., n), g (..., m).

    The plan that minimises <pi, C> + epsilon KL(pi | a x b) among those with marginals a and b is
        pi_ij = exp((f_i + g_j - C_ij) / epsilon) a_i b_j
    for some f, g. A sweep chooses g so that the columns of pi sum to b, and then f so that its rows
    sum to a, which spoils the columns a little; repeated, it leaves both right. Start from any f.
    """
    log_a, log_b = a.log().unsqueeze(-1), b.log().unsqueeze(-2)  # (..., n, 1), (..., 1, m)

    # sum_i pi_ij = b_j, solved for g_j
    g = -epsilon * ((f.unsqueeze(-1) - cost) / epsilon + log_a).logsumexp(-2)

    # sum_j pi_ij = a_i, solved for f_i
    f = -epsilon * ((g.unsqueeze(-2) - cost) / epsilon + log_b).logsumexp(-1)
    return f, g


def transport_plan(cost, f, g, epsilon, a=None, b=None):
    """The plan (..., n, m) of potentials f (..., n), g (..., m); weights, errors as in `sinkhorn`,
    and a ValueError where f or g does not match."""
    cost, marginals = _checked(cost, epsilon, a, b)
    if (f.shape, g.shape) != (cost.shape[:-1], cost[..., 0, :].shape):
        raise ValueError(f"f (..., n), g (..., m) do not match cost {tuple(cost.shape)}: "
                         f"{tuple(f.shape)}, {tuple(g.shape)}")
    return _log_plan(cost, torch.cat((f, g), -1).unsqueeze(-2), marginals.log(), epsilon).exp()


def sinkhorn(cost, epsilon, a=None, b=None, tol=1e-5, max_iter=1000):
    """Potentials f (..., n), g (..., m) of min <pi, C> + epsilon KL(pi | a x b) (Eq. 5-6).

    cost (..., n, m); a (..., n) or (n,) non-negative and of sum 1, uniform if None; b likewise. No
    gradient. Runs until every problem's marginals are within tol of a and b (L1), or warns after
    max_iter sweeps (rounded up to a block; not before a block at each epsilon on the way down).
    With r = u max|C| / epsilon, the rounding of the plan's entries (u the dtype's unit), tol is at
    least 3 r; r above 0.1 warns, too. Computes in float64 if cost is, else in float32, autocast or
    not.
    ValueError: cost not (..., n, m) or not finite, epsilon <= 0, weights of wrong shape or sum or
    negative.
    """
    cost, marginals = _checked(cost, epsilon, a, b)
    with torch.no_grad(), full_precision(cost.device.type):
        potentials = _solve(cost, epsilon, marginals, tol, max_iter)[2]
    return potentials.squeeze(-2).split(cost.shape[-2:], -1)


def ot_cost(cost, epsilon, a=None, b=None):
    """W = <pi, C> + epsilon KL(pi | a x b) at its minimum (Eq. 5-6), cost (..., n, m) -> (...).

    Differentiable once, in cost and the weights. Arguments, errors and warning as in `sinkhorn`.
    """
    cost, marginals = _checked(cost, epsilon, a, b)
    with torch.no_grad(), full_precision(cost.device.type):
        value, _, potentials = _solve(cost, epsilon, marginals)
        plan = _log_plan(cost, potentials, marginals.log(), epsilon).exp()

    # f and g maximise the dual, so that W moves with C and the weights as if f and g stood still
    # (envelope theorem): dW/dC = pi, dW/da = f, dW/db = g, and backward does not see the sweeps.
    return _WithGradient.apply((value, plan, potentials), cost, marginals)[0]


def sinkhorn_divergence(x, y, epsilon, debias=True, tol=1e-5):
    """W(x, y) - W(x, x) / 2 - W(y, y) / 2 of clouds x (..., n, d), y (..., m, d) -> (...).

    W is Eq. 5 with equal weights and ground cost |x_i - y_j|^2 / 2. The debiased form (Feydy et al.
    2019, the paper's [33]) is 0, with gradient 0, up to rounding for equal clouds; debias=False is
    W(x, y), Eq. 5 as it stands. Differentiable once, in x and y. Marginals within 3 r (see
    `sinkhorn`) are coarse for nearly equal clouds at a small epsilon, whose gradient is a small
    difference: use float64 there, and a smaller tol. ValueError: shapes that do not match, points
    that are not finite, epsilon <= 0. Warns as `sinkhorn` does.
    """
    if x[..., 0, :].shape != y[..., 0, :].shape:
        raise ValueError("x (..., n, d), y (..., m, d) do not match: "
                         f"{tuple(x.shape)}, {tuple(y.shape)}")
    dtype = torch.promote_types(torch.result_type(x, y), torch.float32)
    inputs = x, y = x.to(dtype), y.to(dtype)

    with torch.no_grad(), full_precision(x.device.type):
        # two clouds of one size go side by side, (2, ..., n, d): half the launches
        n, m = x.shape[-2], y.shape[-2]
        clouds = [*map(_centred, [torch.stack((x, y))] if n == m else [x[None], y[None]])]
        (x, _, half_x, mean_x), (y, _, half_y, mean_y) = (
            one for cloud in clouds for one in zip(*cloud, strict=True))
        gap = mean_x - mean_y

        cost = x @ y.mT
        cost = torch.sub(half_x, cost, out=cost).add_(half_y.mT)  # |x_i - y_j|^2 / 2, in one place
        cost, marginals = _checked(cost, epsilon)
        value, plan, _ = _solve(cost, epsilon, marginals, tol)
        value.add_((gap @ gap.mT).squeeze((-2, -1)), alpha=0.5)

        if debias:
            w, own = zip(*(_solve_symmetric(z, gram, half, epsilon, tol)
                           for z, gram, half, _ in clouds), strict=True)
            for w_z in itertools.chain(*w):
                value.sub_(w_z, alpha=0.5)
        else:
            own = [z / z.shape[-2] for z, *_ in clouds]
        own_x, own_y = itertools.chain(*own)

        # dW(x, y)/dx_i = sum_j pi_ij (x_i - y_j): a pull to where the mass of x_i goes in y, and
        # the debiasing one away from where it goes in x itself. The terms in x_i alone cancel.
        dx = (own_x - plan @ y).add_(gap, alpha=1 / n)
        dy = None
        if inputs[1].requires_grad:  # a teacher's does not
            dy = (own_y - plan.mT @ x).sub_(gap, alpha=1 / m)

    return _WithGradient.apply((value, dx, dy), *inputs)[0]


class _WithGradient(torch.autograd.Function):
    """Gives a value that was computed without autograd the gradients it is known to have in inputs:
    value (...), each input and its gradient (..., p, q).

    The gradients are outputs as well, so that autograd comes back here when someone differentiates
    them: as constants they would give second derivatives that are wrong in silence.
    """

    @staticmethod
    def forward(ctx, value_and_gradients, *inputs):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*value_and_gradients[1:])
        return value_and_gradients

    @staticmethod
    def backward(ctx, grad, *grads_of_gradients):
        if any(g is not None for g in grads_of_gradients):
            raise RuntimeError("entropic OT has a first derivative here, but no second")

        return None, *(None if grad is None or d is None else d * grad[..., None, None]
                       for d in ctx.saved_tensors)


def _centred(z):
    """Of clouds z (..., n, d): the points about their mean, their products z z^T (..., n, n), their
    half squared norms (..., n, 1), and the mean (..., 1, d).

    The plan does not change when a cloud is shifted, for that adds to C terms in i or in j alone.
    About its mean C is small, and float32 exact, however far the clouds are apart.
    """
    mean = z.mean(-2, keepdim=True)
    z = z - mean
    gram = z @ z.mT
    return z, gram, gram.diagonal(dim1=-2, dim2=-1).unsqueeze(-1) / 2, mean


def _log_plan(cost, potentials, log_marginals, epsilon):
    """log pi (..., n, m), for what belongs to rows and columns side by side, as in `_solve`."""
    log_uv = torch.add(log_marginals, potentials, alpha=1 / epsilon)
    log_u, log_v = log_uv.split(cost.shape[-2:], -1)
    return (log_u.mT + log_v).sub_(cost, alpha=1 / epsilon)


def _solve(cost, epsilon, marginals, tol=1e-5, max_iter=1000):
    """The fixed point of `sweep`, faster -> W (...), plan (..., n, m), potentials (..., 1, n + m).

    What belongs to rows and to columns lies side by side, a and b in marginals (..., 1, n + m), f
    and g in potentials: one launch serves both.
    """
    largest = cost.abs().max().item()
    if not largest < inf:
        raise ValueError(f"cost must be finite, got {largest}")
    rounding = torch.finfo(cost.dtype).eps * largest / epsilon
    tol = max(tol, min(3 * rounding, 0.1))

    log_marginals = marginals.log()
    ones = torch.ones_like(marginals)
    sizes = cost.shape[-2:]
    a, b = marginals.split(sizes, -1)  # (..., 1, n), (..., 1, m)

    potentials = above = torch.zeros_like(marginals)
    level = largest / EASY if largest / EASY > 2 * epsilon else epsilon
    level_above = inf
    omega = 1.0
    previous = None  # the error one block ago, at epsilon itself
    block = BLOCK if largest > 2 * epsilon else SHORT
    sweeps = 0
    while True:
        # Absorb: with f and g inside a plan P, sweeps only have to find u, v such that u_i P_ij v_j
        # has the right sums: matrix-vector products, and exp once a block (Schmitzer 2019).
        plan = _exp_(_log_plan(cost, potentials, log_marginals, level))
        transposed = plan.mT

        # Sweep, over-relaxed by omega.
        u, v = ones.split(sizes, -1)
        for _ in range(block - 1):
            v = _relaxed(v, b / (u @ plan), omega)
            u = _relaxed(u, a / (v @ transposed), omega)

        # A plain sweep makes the rows exact, so that the columns hold all of the error. Among
        # over-relaxed sweeps it is for measure only: taking it would spoil their pace.
        last_v = b / (u @ plan)
        last_u = a / (last_v @ transposed)
        if omega == 1:
            u, v = last_u, last_v
        drift = torch.cat((u, v), -1).log_()
        residual = torch.addcmul(b, last_v, last_u @ plan, value=-1)
        lost = torch.nn.functional.hardshrink(drift, SAFE_DRIFT)  # 0 up to it
        error = _l1(torch.cat((residual, lost), -1)).item()
        sweeps += block

        # u, v left the range of floating-point numbers, or moved so far that entries of the plan
        # were lost to underflow: the same sweeps, in the log domain.
        if not error < SAFE_DRIFT:  # NaN too
            f = potentials[..., 0, :sizes[0]]
            for _ in range(block):
                f, g = sweep(cost, f, level, a.squeeze(-2), b.squeeze(-2))
            potentials = torch.cat((f, g), -1).unsqueeze(-2)
            omega = 1.0
            plan = _exp_(_log_plan(cost, potentials, log_marginals, level))
            last_u, last_v = ones.split(sizes, -1)
            drift = torch.zeros_like(ones)
            error = _l1(b - last_u @ plan).item()

        done = level == epsilon and (error <= tol or sweeps >= max_iter)
        if done and omega != 1:
            drift = torch.cat((last_u, last_v), -1).log_()
        potentials = potentials.add(drift, alpha=level)
        if done:
            break

        # Relax: hundreds of sweeps become tens.
        if level == epsilon:
            omega = _over_relaxation(omega, error, previous, block)
            previous = error

        # Lower epsilon, the further the better the block converged (Schmitzer's epsilon scaling):
        # a small one is reached sooner from a large one. f and g, about linear in it, go on along
        # their line, which halves the sweeps of the hardest problems.
        else:
            lower = level * min(error ** (1 / 9), 0.8)
            if lower < 2 * epsilon:  # not worth a block of its own
                lower = epsilon
            ahead = 1 + (level - lower) / (level_above - level)  # 1 at first
            above, potentials = potentials, torch.lerp(above, potentials, ahead)
            level_above, level = level, lower

    _warn_above(tol, max(error, rounding), sweeps, epsilon)
    value = (marginals @ potentials.mT).squeeze((-2, -1))  # the dual, equal to W at the optimum
    return value, plan.mul_(last_u.mT).mul_(last_v), potentials


def _relaxed(old, new, omega):
    """log u moves omega times as far as in a plain sweep."""
    return new if omega == 1 else (new / old).pow_(omega).mul_(old)


def _over_relaxation(omega, error, previous, block):
    """The next block's omega. Near the optimum a sweep is a Gauss-Seidel step; if the plain one
    converges at rate r, omega = 2 / (1 + sqrt(1 - r)) is best (Lehmann et al. 2022). Young's (1954)
    (rate + omega - 1)^2 = r omega^2 rate gives r from the rate just seen; 1.6 is a first guess.
    Plain again after an increase; on a plateau rounding alone moves the error, and that is none.
    """
    if previous is None:
        return 1.6
    if error > 1.02 * previous:
        return 1.0
    rate = max((error / previous) ** (1 / block), omega - 1)
    plain_rate = min((rate + omega - 1) ** 2 / (rate * omega**2), 0.9999)  # keeps omega below 1.98
    return 2 / (1 + sqrt(1 - plain_rate))


def _solve_symmetric(x, gram, half, epsilon, tol):
    """A cloud of `_centred` (gram is overwritten) to itself -> W (...), and plan @ x (..., n, d).

    Here f = g: n times the plan is u_i K_ij u_j with K = exp(-C / epsilon), so that u = 1 / (K u).
    The step from u to v = 1 / (K u) swings around the solution; the mean of log v and log 1 / (K v)
    damps that (Knight, Ruiz, Ucar 2014). Together they shrink an eigenmode l of the positive
    operator by l (1 - l) / 2 <= 1/8, at any epsilon. K_ii = 1 keeps u below 1: nothing underflows.
    """
    n = x.shape[-2]
    kernel = _exp_(gram.sub_(half).sub_(half.mT).div_(epsilon))
    u = kernel.sum(-2, keepdim=True).rsqrt_()
    sweeps = 0
    while True:
        for _ in range(3):
            v = (u @ kernel).reciprocal_()
            u = (v / (v @ kernel)).sqrt_()
        v = (u @ kernel).reciprocal_()  # rows exact, as in `_solve`
        error = _l1(u / v - 1).item() / n
        sweeps += 7
        if error <= tol or sweeps > 200:
            break

    _warn_above(tol, error, sweeps, epsilon)
    value = epsilon * ((u * v).log_().mean((-2, -1)) + log(n))
    return value, v.mT / n * (kernel @ (u.mT * x))


def _exp_(x):
    """exp in place, at least 1e-30: subnormal numbers slow a CPU's products tenfold."""
    return x.clamp_(-69).exp_()


def _l1(residual):
    return torch.linalg.vector_norm(residual, 1, -1).max()  # (..., 1, n): the worst problem's


def _warn_above(tol, error, sweeps, epsilon):
    if not error <= tol:  # NaN too
        warnings.warn(f"Sinkhorn stopped at marginal error {error:.1e} > {tol:.1e} after {sweeps} "
                      f"sweeps, epsilon={epsilon}; raise epsilon, or use float64", stacklevel=4)


def _checked(cost, epsilon, a=None, b=None):
    """cost in float32 or float64; a and b, filled in and of sum 1, side by side (..., 1, n + m)."""
    if cost.dim() < 2 or not cost.numel():
        raise ValueError(f"cost must be (..., n, m) and not empty, got {tuple(cost.shape)}")
    if not 0 < epsilon < inf:
        raise ValueError(f"epsilon must be positive and finite, got {epsilon}")
    cost = cost.to(torch.promote_types(cost.dtype, torch.float32))
    a = _marginal("a", a, cost[..., 0])
    b = _marginal("b", b, cost[..., 0, :])
    return cost, torch.cat((a, b), -1).unsqueeze(-2)


def _marginal(name, w, like):
    if w is None:
        return torch.full_like(like, 1 / like.shape[-1])
    if w.shape not in (like.shape, like.shape[-1:]):
        raise ValueError(f"{name} must be {tuple(like.shape)}, got {tuple(w.shape)}")
    w = w.to(like).expand_as(like)
    total = w.sum(-1, keepdim=True)
    lowest = w.min()
    if not lowest >= 0:  # NaN too
        raise ValueError(f"{name} must not be negative, got {lowest}")
    off = (total - 1).abs().max()
    if not off < 1e-4:
        raise ValueError(f"{name} must sum to 1, got a sum off by {off:.3g}")
    return w / total + 1e-20  # points of no weight have a potential, too


# ------------------------------------------------------------------------------------ benchmark


def _batch(kind, b, k=30, width=512):
    """Student's and teacher's cosine similarities at the teacher's k least similar anchors: (b, k).
    "two classes" is what trained networks make of a batch: two sharp classes, and a student that
    disagrees with the teacher on every tenth sample."""
    torch.manual_seed(0)
    if kind == "low-rank":
        teacher, student = (torch.randn(b, 3) @ torch.randn(3, width) for _ in range(2))
    elif kind == "two classes":
        side = torch.randint(2, (b, 1)) * 2.0 - 1
        teacher, student = (side * torch.rand(b, 1) * torch.randn(width)
                            + torch.randn(b, width) / 10 for _ in range(2))
        student[::10] *= -1
    else:
        teacher = torch.randn(8, width)[torch.randint(8, (b,))] + torch.randn(b, width) / 2
        student = teacher + torch.randn(b, width) + (kind == "collapsed") * 5 * torch.randn(width)

    student, teacher = (z @ z.T for z in map(torch.nn.functional.normalize, (student, teacher)))
    anchors = teacher.topk(min(k, b), largest=False).indices
    return student.gather(1, anchors), teacher.gather(1, anchors)


class _Count(TorchDispatchMode):
    """Counts the operators that PyTorch carries out, views apart (on a GPU each is a kernel, or a
    few), and those by which the host waits for a number (`.item()`)."""
    launches = syncs = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **kwargs or {})
        self.syncs += op.name() == "aten::_local_scalar_dense"
        view = op.is_view or op.name() == "aten::_unsafe_view"
        self.launches += torch.is_tensor(result) and not view
        return result


def _gradient(loss, x, y):
    return torch.autograd.grad(loss(x, y), x)[0].cpu()  # waits for a GPU


def benchmark(sizes, repeats, device):
    """Prints a table of this divergence's costs and errors, and geomloss's where it is installed.

    ms is the fastest run, forward and backward, and ms/ours how many times ours that is; the error
    is relative to a gradient in float64 with marginals within 1e-7, or as near as 1,000 sweeps come
    (5e-6 at worst).
    """
    try:
        from geomloss import SamplesLoss
    except ImportError:
        SamplesLoss = None
        print("geomloss is not installed: no rows for it")

    print(f"debiased divergence, float32, {device}, {torch.get_num_threads()} threads\n"
          "      batch points epsilon     loss launches syncs      ms ms/ours gradient error")
    kinds = "clustered", "collapsed", "low-rank", "two classes"
    for kind, epsilon, b in itertools.product(kinds, (0.1, 0.01), sizes):
        x, y = (z.to(device) for z in _batch(kind, b))
        x.requires_grad_()
        losses = {"ours": partial(sinkhorn_divergence, epsilon=epsilon)}
        if SamplesLoss:
            losses["geomloss"] = SamplesLoss(blur=epsilon**0.5, backend="tensorized")
        with warnings.catch_warnings(action="ignore"):  # of 1e-7; the columns are about the losses
            exact = _gradient(partial(losses["ours"], tol=1e-7), x.double(), y.double())

        ms = {}
        for name, loss in losses.items():
            with _Count() as count:
                gradient = _gradient(loss, x, y)
            error = (gradient - exact).norm() / exact.norm()
            ms[name] = 1e3 * min(repeat(partial(_gradient, loss, x, y), number=1, repeat=repeats))
            print(f"{kind:>11} {b:6} {epsilon:7} {name:>8} {count.launches:8} {count.syncs:5} "
                  f"{ms[name]:7.2f} {ms[name] / ms['ours']:7.1f} {error:14.0e}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Benchmark of the divergence.", allow_abbrev=False)
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 128, 512, 2048], help="points")
    sizes = parser.parse_args().sizes
    if min(sizes) < 1:
        parser.exit(2, f"error: --sizes {min(sizes)}: give numbers of points from 1 on\n")
    benchmark(sizes, 20, "cuda" if torch.cuda.is_available() else "cpu")
