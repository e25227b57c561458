"""Entropic optimal transport (Eq. 5-6 of the paper) for small dense problems, in plain torch.

    from sinkhorn import sinkhorn_divergence
    sinkhorn_divergence(x, y, epsilon=0.1).backward()   # x (..., n, d), y (..., m, d)

    python sinkhorn.py                                  # benchmark: time, memory, accuracy; geomloss, POT if installed
    python sinkhorn.py --sizes 128 512 --threads 2 --repeats 20

Shapes: n points with weights a (n), m points with weights b (m), cost (..., n, m); "..." are independent problems.
Units: epsilon and the potentials f, g are in units of the cost. The plan is exp((f_i + g_j - C_ij) / epsilon) a_i b_j.
"""
import argparse
import importlib.util
import math
import statistics
import threading
import time
import warnings

import torch

BLOCK = 6           # sweeps between two looks at the error: each look makes the host wait for the device
SAFE_DRIFT = 20.0   # |log u|, |log v| beyond which entries that underflowed in the plan may be missed


def sinkhorn(cost, epsilon, a=None, b=None, tol=1e-5, max_iter=2000):
    """Potentials of min <pi, C> + epsilon KL(pi | a x b) over the plans pi with marginals a and b (Eq. 5-6).

    cost (..., n, m); a (..., n) or (n,) and b likewise, non-negative, sum 1, uniform if None -> f (..., n), g (..., m).
    Stops when the marginals are within tol of a and b in L1 norm, in every problem of the batch, and warns if that
    takes more than max_iter sweeps. tol is raised to 4 eps max|C| / epsilon (eps: of the dtype), as rounding the
    exponent alone moves the marginals by about that much. No gradient. Computes in float32, in float64 if given it.
    ValueError: cost not (..., n, m) or not finite, epsilon <= 0, weights of a wrong shape, negative, or not of sum 1.
    """
    return _solve(cost, epsilon, a, b, tol, max_iter)[1:]


def transport_plan(cost, f, g, epsilon, a=None, b=None):
    """The plan exp((f_i + g_j - C_ij) / epsilon) a_i b_j of potentials f (..., n), g (..., m) -> (..., n, m)."""
    n, m = cost.shape[-2:]
    log_a = -math.log(n) if a is None else a.log()
    log_b = -math.log(m) if b is None else b.log()
    return ((f / epsilon + log_a).unsqueeze(-1) + (g / epsilon + log_b).unsqueeze(-2) - cost / epsilon).exp()


def ot_cost(cost, epsilon, a=None, b=None):
    """W = <pi, C> + epsilon KL(pi | a x b) at its minimum (Eq. 5-6), cost (..., n, m) -> (...).

    Written as the dual, <a, f> + <b, g> + epsilon (1 - sum pi), which has that value at the optimum and whose derivative
    in C at fixed f, g is pi: the envelope theorem, so backward does not see the sweeps. Differentiable once, in cost.
    Arguments and errors as in `sinkhorn`.
    """
    cost, a, b = _checked(cost, epsilon, a, b)
    f, g = sinkhorn(cost, epsilon, a, b)
    plan = transport_plan(cost, f, g, epsilon, a, b)
    return (a * f).sum(-1) + (b * g).sum(-1) + epsilon * (1 - plan.sum((-2, -1)))


def sinkhorn_divergence(x, y, epsilon, debias=True):
    """W(x, y) - W(x, x) / 2 - W(y, y) / 2 between clouds x (..., n, d), y (..., m, d) of equal weights -> (...).

    W is Eq. 5 with ground cost |x - y|^2 / 2; debias=False gives W(x, y) alone, Eq. 5 to the letter. The debiased form
    (Feydy et al. 2019, ref. [33]) is zero, with zero gradient, when the clouds are equal. Differentiable once, in x and y.
    ValueError: shapes that do not match, points that are not finite, epsilon <= 0.
    """
    if x.dim() < 2 or x.shape[:-2] + x.shape[-1:] != y.shape[:-2] + y.shape[-1:]:
        raise ValueError(f"x (..., n, d) and y (..., m, d) do not match, got {tuple(x.shape)} and {tuple(y.shape)}")
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    return _Divergence.apply(x.to(dtype), y.to(dtype), _positive(epsilon), debias)


class _Divergence(torch.autograd.Function):
    """Value and gradient at once: by the envelope theorem dW(x, y)/dx_i = sum_j pi_ij (x_i - y_j), a pull towards where the
    mass of x_i goes, known as soon as the plan is. Backward then costs nothing and no (n, m) array is kept for it."""

    @staticmethod
    def forward(ctx, x, y, epsilon, debias):
        # Shifting a cloud adds terms in i alone and j alone to C, which f and g absorb: the plan does not see the means.
        # Without them costs stay small where the clouds are far apart (a collapsed student), and float32 suffices.
        mean_x, mean_y = x.mean(-2, keepdim=True), y.mean(-2, keepdim=True)                             # (..., 1, d)
        x, y, gap = x - mean_x, y - mean_y, mean_x - mean_y
        with torch.autocast(x.device.type, enabled=False):
            plan, f, g = _solve(_half_squared_distances(x, y), epsilon)                                 # Eq. 5-6
            value = gap.square().sum((-2, -1)) / 2 + f.mean(-1) + g.mean(-1)
            dx, dy = (x + gap) / x.shape[-2] - plan @ y, (y - gap) / y.shape[-2] - plan.mT @ x
            for points, gradient in ((x, dx), (y, dy)) if debias else ():
                plan, f, g = _solve_symmetric(_half_squared_distances(points, points), epsilon)
                value -= (f.mean(-1) + g.mean(-1)) / 2
                gradient -= points / points.shape[-2] - plan @ points
        ctx.save_for_backward(dx, dy)
        return value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        grads = (grad[..., None, None] * d if needed else None
                 for d, needed in zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False))
        return *grads, None, None


def _half_squared_distances(x, y):
    half_x, half_y = x.square().sum(-1, keepdim=True) / 2, y.square().sum(-1, keepdim=True) / 2
    return (half_x - x @ y.mT).add_(half_y.mT)                                                          # (..., n, m)


@torch.no_grad()
def _solve(cost, epsilon, a=None, b=None, tol=1e-5, max_iter=2000):
    """Plan (..., n, m), f (..., n), g (..., m).

    Sinkhorn's sweep v = b / (P^T u), u = a / (P v) is two matrix-vector products on the current plan P. After a block of
    sweeps u and v are absorbed into the log scalings phi = f / epsilon + log a and gamma = g / epsilon + log b, and P is
    computed afresh (Schmitzer 2019). Where u, v run so far that entries lost to underflow could matter, the block is
    discarded and swept in the log domain, which is slow and always safe.
    """
    if not math.isfinite(scale := cost.abs().max().item()):
        raise ValueError(f"cost must be finite, got {scale}")
    tol = max(tol, 4 * torch.finfo(cost.dtype).eps * scale / epsilon)
    a, b = _weights("a", a, cost, cost.shape[-2]), _weights("b", b, cost, cost.shape[-1])
    a, b = (w.clamp(min=1e-20).unsqueeze(-1) for w in (a, b))     # a zero weight still has a potential, but no mass
    log_a, log_b, log_kernel = a.log(), b.log().mT, cost / -epsilon                     # (n, 1), (1, m), (..., n, m)

    phi, gamma = log_a - log_kernel.amax(-1, keepdim=True), log_b        # g = 0, f the row minimum of C: no row is empty
    omega, error = 1.0, math.inf
    for _ in range(0, max_iter, BLOCK):
        plan = _exp_((log_kernel + phi).add_(gamma))
        u, v = torch.ones_like(phi), torch.ones_like(b)
        for w in (BLOCK - 1) * [omega] + [1.0]:           # the last sweep is plain: rows exact, error left in the columns
            v = _update(v, b, plan.mT @ u, w)
            u = _update(u, a, plan @ v, w)
        log_u, log_v = u.log(), v.log().mT
        drift = torch.maximum(log_u.abs().max(), log_v.abs().max())
        previous, error = error, (v * (plan.mT @ u) - b).abs().sum((-2, -1)).max()
        error = torch.where(drift < SAFE_DRIFT, error, math.inf).item()
        if error < math.inf:
            phi, gamma = phi + log_u, gamma + log_v
        else:
            for _ in range(BLOCK):
                gamma = log_b - (log_kernel + phi).logsumexp(-2, keepdim=True)
                phi = log_a - (log_kernel + gamma).logsumexp(-1, keepdim=True)
        if error <= tol:
            break
        omega = _over_relaxation(omega, error, previous)
    else:
        plan, u, v = _exp_((log_kernel + phi).add_(gamma)), torch.ones_like(phi), torch.ones_like(b)
        error = (plan.sum(-2) - b.squeeze(-1)).abs().sum(-1).max().item()
        if error > tol:
            warnings.warn(f"Sinkhorn: marginal error {error:.1e} > {tol:.1e} after {max_iter} sweeps at epsilon={epsilon}",
                          stacklevel=3)
    return plan.mul_(u).mul_(v.mT), epsilon * (phi - log_a).squeeze(-1), epsilon * (gamma - log_b).squeeze(-2)


def _update(u, a, marginal, omega):
    """u = a / (P v), over-relaxed: log u moves omega times as far."""
    return a / marginal if omega == 1 else u * (a / (u * marginal)) ** omega


def _over_relaxation(omega, error, previous):
    """The next omega. Near the optimum a sweep is a Gauss-Seidel step, whose successive over-relaxation is best at
    2 / (1 + sqrt(1 - lambda)), lambda the rate of the plain sweep. Young's (1954) (rate + omega - 1)^2 = lambda omega^2 rate
    gives lambda from the rate seen. Hundreds of sweeps become tens (Lehmann et al. 2022). Plain after an increase."""
    if not error < previous < math.inf:
        return 1.0
    rate = max((error / previous) ** (1 / BLOCK), omega - 1)
    plain_rate = min((rate + omega - 1) ** 2 / (rate * omega ** 2), 0.998)          # keeps omega below 1.92
    return 2 / (1 + math.sqrt(1 - plain_rate))


@torch.no_grad()
def _solve_symmetric(cost, epsilon, tol=1e-5, max_iter=200):
    """`_solve` for a cloud against itself, uniform weights: f = g = epsilon log u where u = 1 / (K u).

    The plain sweep u -> v = 1 / (K u) oscillates around the fixed point; the mean of log v and log 1 / (K v) damps that
    (Knight, Ruiz, Ucar 2014). An error component with eigenvalue l of the (positive) kernel shrinks by l (1 - l) / 2 <= 1/8
    in the pair, at any epsilon. K_ii = 1, so u <= sqrt(n) and nothing underflows.
    """
    n = cost.shape[-1]
    kernel = _exp_(cost / -epsilon).div_(n)
    u = torch.ones_like(cost[..., :1])                                                                  # (..., n, 1)
    for _ in range(0, max_iter, BLOCK):
        for _ in range(BLOCK // 2):
            v = (kernel @ u).reciprocal()
            u = (v / (kernel @ v)).sqrt()
        v = (kernel @ u).reciprocal()                                                                            # rows exact
        error = (u / v - 1).abs().max().item()                                              # relative, so it bounds L1
        if error <= tol:
            break
    else:
        warnings.warn(f"Sinkhorn: marginal error {error:.1e} > {tol:.1e} after {max_iter} sweeps at epsilon={epsilon}",
                      stacklevel=3)
    return kernel.mul_(v / n).mul_(u.mT), epsilon * v.log().squeeze(-1), epsilon * u.log().squeeze(-1)


def _exp_(x):
    """exp in place, with results below about 1e-30 set to 0: subnormal numbers slow a matrix product tenfold on CPUs."""
    return torch.nn.functional.threshold_(x, 0.8 * math.log(torch.finfo(x.dtype).tiny), -math.inf).exp_()


def _positive(epsilon):
    if not 0 < epsilon < math.inf:
        raise ValueError(f"epsilon must be positive, got {epsilon}")
    return float(epsilon)


def _checked(cost, epsilon, a, b):
    if cost.dim() < 2 or cost.numel() == 0:
        raise ValueError(f"cost must be (..., n, m) and not empty, got {tuple(cost.shape)}")
    if not 0 < epsilon < math.inf:
        raise ValueError(f"epsilon must be positive, got {epsilon}")
    cost = cost.to(torch.promote_types(cost.dtype, torch.float32))
    return cost, _weights("a", a, cost, cost.shape[-2]), _weights("b", b, cost, cost.shape[-1])


def _weights(name, w, cost, size):
    if w is None:
        return cost.new_full((size,), 1 / size)
    if w.shape not in ((size,), cost.shape[:-2] + (size,)):
        raise ValueError(f"{name} must be (..., {size}) for cost {tuple(cost.shape)}, got {tuple(w.shape)}")
    w = w.to(cost)
    if not w.min() >= 0:
        raise ValueError(f"{name} must not be negative, got {w.min().item()}")
    if (total := w.sum(-1).sub(1).abs().max().item()) > 1e-4:
        raise ValueError(f"{name} must sum to 1, got a sum that is off by {total:.3g}")
    return w / w.sum(-1, keepdim=True)
