"""Entropic optimal transport (Eq. 5-6 of the paper) for dense problems, in plain torch.

    from sinkhorn import sinkhorn_divergence
    sinkhorn_divergence(x, y, epsilon=0.1).backward()  # x (..., n, d), y (..., m, d)

    python sinkhorn.py  # benchmark, beside geomloss and POT where installed
    python sinkhorn.py --sizes 128 512 --threads 2 --repeats 20

Shapes: n points of weights a (n), m points of weights b (m), cost C (n, m); "..." are independent problems.
Units: epsilon and the potentials f, g are in the units of C.
Float32 is meant: with TF32 allowed in matrix products (not PyTorch's default) the marginals stop near 1e-3.
Plan: pi_ij = exp((f_i + g_j - C_ij) / epsilon) a_i b_j.
"""
import argparse
import functools
import importlib.util
import itertools
import math
import os
import statistics
import time
import warnings

import torch

BLOCK = 7  # sweeps, with the plain one for a look at the error: each look makes the host wait for the device
SAFE_DRIFT = 20  # |log u|, |log v| from where entries of the plan that underflowed may be missed
EASY = 10  # max|C| / epsilon where the way down starts: 8 to 16 do as well, 30 is slow on hard problems


def sinkhorn(cost, epsilon, a=None, b=None, tol=1e-5, max_iter=1000):
    """Potentials f (..., n), g (..., m) of min <pi, C> + epsilon KL(pi | a x b), marginals a, b (Eq. 5-6).

    cost (..., n, m); a (..., n) or (n,) non-negative and of sum 1, uniform if None; b likewise. No gradient.
    Runs until every problem's marginals are within tol of a and b (L1), or warns after max_iter sweeps
    (rounded up to a block; not before a block at each epsilon on the way down). With r = u max|C| / epsilon,
    the rounding of the plan's entries (u the dtype's unit), tol is at least 3 r; r above 0.1 warns, too.
    Computes in float64 if cost is, else in float32, autocast or not.
    ValueError: cost not (..., n, m) or not finite, epsilon <= 0, weights of wrong shape or sum or negative.
    """
    with torch.autocast(cost.device.type, enabled=False):
        return _solve(cost, epsilon, a, b, tol, max_iter)[1:3]


def transport_plan(cost, f, g, epsilon, a=None, b=None):
    """The plan (..., n, m) of potentials f (..., n), g (..., m); weights as in `sinkhorn`."""
    log_a = -math.log(cost.shape[-2]) if a is None else a.log()
    log_b = -math.log(cost.shape[-1]) if b is None else b.log()
    return ((f / epsilon + log_a).unsqueeze(-1) + (g / epsilon + log_b).unsqueeze(-2) - cost / epsilon).exp()


def ot_cost(cost, epsilon, a=None, b=None):
    """W = <pi, C> + epsilon KL(pi | a x b) at its minimum (Eq. 5-6), cost (..., n, m) -> (...).

    Computed as the dual <a, f> + <b, g> + epsilon (1 - sum pi). At the optimum the two are equal and the
    dual's derivative in C at fixed f, g is pi (envelope theorem): backward does not see the sweeps, and is
    right once, in cost. Arguments, errors and warning as in `sinkhorn`.
    """
    cost, a, b, _ = _checked(cost, epsilon, a, b)
    f, g = sinkhorn(cost, epsilon, a, b)
    mass = transport_plan(cost, f, g, epsilon, a, b).sum((-2, -1))
    return (a * f).sum(-1) + (b * g).sum(-1) + epsilon * (1 - mass)


def sinkhorn_divergence(x, y, epsilon, debias=True):
    """W(x, y) - W(x, x) / 2 - W(y, y) / 2 of clouds x (..., n, d), y (..., m, d) of equal weights -> (...).

    W is Eq. 5 with ground cost |x_i - y_j|^2 / 2. The debiased form (Feydy et al. 2019, the paper's [33])
    is 0, with gradient 0, up to rounding for equal clouds; debias=False is W(x, y), Eq. 5 to the letter.
    Differentiable once, in x and y. Marginals within 3 r (see `sinkhorn`) are coarse for nearly equal clouds at
    a small epsilon, whose gradient is a small difference: use float64 there.
    ValueError: shapes that do not match, points that are not finite, epsilon <= 0. Warns as `sinkhorn` does.
    """
    if min(x.dim(), y.dim()) < 2 or x.shape[:-2] + x.shape[-1:] != y.shape[:-2] + y.shape[-1:]:
        raise ValueError(f"x (..., n, d), y (..., m, d) do not match: {tuple(x.shape)}, {tuple(y.shape)}")
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    return _Divergence.apply(x.to(dtype), y.to(dtype), epsilon, debias)


class _Divergence(torch.autograd.Function):
    """Envelope theorem: dW(x, y)/dx_i = sum_j pi_ij (x_i - y_j), a pull towards where the mass of x_i goes.
    It is known as soon as pi is, so forward computes it and nothing of size (n, m) waits for backward."""

    @staticmethod
    def forward(ctx, x, y, epsilon, debias):
        # Shifting a cloud adds terms in i or in j alone to C, which f or g absorb: the plan does not see means.
        # Without them C stays small, and float32 exact, where the clouds are far apart (a collapsed student).
        mean_x, mean_y = x.mean(-2, keepdim=True), y.mean(-2, keepdim=True)  # (..., 1, d)
        x, y, gap = x - mean_x, y - mean_y, mean_x - mean_y
        with torch.autocast(x.device.type, enabled=False):
            plan, f, g, _ = _solve(_half_squared_distances(x, y), epsilon)
            value = gap.square().sum((-2, -1)) / 2 + f.mean(-1) + g.mean(-1)  # Eq. 5, its dual
            dx, dy = (x + gap) / x.shape[-2] - plan @ y, None
            if ctx.needs_input_grad[1]:  # a teacher's points have none
                dy = (y - gap) / y.shape[-2] - plan.mT @ x
            for points, gradient in ((x, dx), (y, dy)) if debias else ():
                plan, f = _solve_symmetric(_half_squared_distances(points, points), epsilon)
                value -= f.mean(-1)
                if gradient is not None:
                    gradient -= points / points.shape[-2] - plan @ points
        ctx.save_for_backward(dx, dy)
        return value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        dx, dy = (d if d is None else grad[..., None, None] * d for d in ctx.saved_tensors)
        return dx, dy, None, None


def _half_squared_distances(x, y):
    half_x, half_y = x.square().sum(-1, keepdim=True) / 2, y.square().sum(-1, keepdim=True) / 2
    return (half_x - x @ y.mT).add_(half_y.mT)  # (..., n, m)


@torch.no_grad()
def _solve(cost, epsilon, a=None, b=None, tol=1e-5, max_iter=1000):
    """Plan (..., n, m), f (..., n), g (..., m), sweeps done.

    A sweep v = b / (P^T u), u = a / (P v) is two matrix-vector products on the current plan P. After a block
    of them log u, log v go into f / epsilon, g / epsilon, and P is computed afresh (Schmitzer 2019). Where u,
    v ran too far for P's floating-point range, log-domain sweeps replace the block. A small epsilon is reached
    from a large one (Schmitzer's epsilon scaling): after a block `level` falls to error^(1 / BLOCK) of itself,
    the further the better the block converged, and f, g, about linear in it, go on along their line.
    """
    cost, a, b, scale = _checked(cost, epsilon, a, b)
    unit = torch.finfo(cost.dtype).eps
    rounding = unit * scale / epsilon
    tol = max(tol, min(3 * rounding, 0.1))
    a, b = (w.clamp(min=unit ** 2).unsqueeze(-1) for w in (a, b))  # points of no weight have a potential
    log_a, log_b, sizes = a.log(), b.log().mT, cost.shape[-2:]  # (..., n, 1), (..., 1, m), (n, m)

    def snapped(level):  # an epsilon this near is not worth a block of its own
        return level if level > 2 * epsilon else epsilon

    def fresh():
        f, g = (potentials / level).split(sizes, -2)
        plan = _exp_((cost / -level).add_(f + log_a).add_(g.mT + log_b))
        return plan, torch.ones_like(f), torch.ones_like(g)

    level, level_above, potentials_above = snapped(scale / EASY), math.inf, 0.0
    potentials = torch.cat((cost.amin(-1), torch.zeros_like(cost[..., 0, :])), -1).unsqueeze(-1)  # (..., n + m, 1)
    omega, error, sweeps = 1.0, math.inf, 0
    while True:
        sweeps += BLOCK
        plan, u, v = fresh()
        for _ in range(BLOCK - 1):
            v = _scaling(v, b, plan.mT @ u, omega)
            u = _scaling(u, a, plan @ v, omega)
        plain_v = b / (plan.mT @ u)
        plain_u = a / (plan @ plain_v)  # after a plain sweep rows are exact, and the columns hold all of the error
        moved = torch.cat((plain_u, plain_v), -2).log()
        look = torch.stack((_l1(plain_v * (plan.mT @ plain_u) - b), moved.abs().max()))
        previous, (error, drift) = error, look.tolist()
        if not drift < SAFE_DRIFT:
            f, g = potentials.split(sizes, -2)
            for _ in range(BLOCK):
                g = -level * ((f - cost) / level + log_a).logsumexp(-2).unsqueeze(-1)
                f = -level * ((g.mT - cost) / level + log_b).logsumexp(-1, keepdim=True)
            potentials = torch.cat((f, g), -2)
            plan, u, v = fresh()
            omega, error = 1.0, _l1(plan.mT @ u - b).item()
        elif omega == 1 or error <= tol or sweeps >= max_iter:
            potentials, u, v = potentials + level * moved, plain_u, plain_v
        else:  # a plain sweep would stop the over-relaxed ones' swing
            potentials = potentials + level * torch.cat((u, v), -2).log()
        if level > epsilon:
            next_level = snapped(level * min(error ** (1 / BLOCK), 0.8))  # errors may exceed 1: never up
            step = (level - next_level) / (level_above - level) * (potentials - potentials_above)  # 0 at first
            potentials, potentials_above = potentials + step, potentials
            level, level_above, error = next_level, level, math.inf
        elif error > tol and sweeps < max_iter:
            omega = _over_relaxation(omega, error, previous)
        else:
            break
    _warn_above(tol, max(error, rounding), sweeps, epsilon)
    f, g = potentials.squeeze(-1).split(sizes, -1)
    return plan.mul_(u).mul_(v.mT), f, g, sweeps


def _scaling(u, a, marginal, omega):
    """u = a / (P v), over-relaxed: log u moves omega times as far."""
    return a / marginal if omega == 1 else (a / (u * marginal)).pow_(omega).mul_(u)


def _over_relaxation(omega, error, previous):
    """The next block's omega. Near the optimum a sweep is a Gauss-Seidel step; if the plain one converges
    at rate r, omega = 2 / (1 + sqrt(1 - r)) is best, and turns hundreds of sweeps into tens (Lehmann et al.
    2022). Young's (1954) (rate + omega - 1)^2 = r omega^2 rate gives r from the rate just seen; 1.6 is a first
    guess. Plain again after an increase; on a plateau rounding alone moves the error, and that is none."""
    if error > 1.02 * previous:
        return 1.0
    if previous == math.inf:
        return 1.6
    rate = max((error / previous) ** (1 / BLOCK), omega - 1)
    plain_rate = min((rate + omega - 1) ** 2 / (rate * omega ** 2), 0.9999)  # keeps omega below 1.98
    return 2 / (1 + math.sqrt(1 - plain_rate))


@torch.no_grad()
def _solve_symmetric(cost, epsilon, tol=1e-5, max_iter=200):
    """Plan (..., n, n) and f (..., n) of a cloud against itself: f = g = epsilon log u, u = 1 / (K u), where
    K = exp(-C / epsilon) / n.

    The plain u -> v = 1 / (K u) swings around the solution; the mean of log v and log 1 / (K v) damps that
    (Knight, Ruiz, Ucar 2014). Together they shrink an eigenmode l of the positive operator by l (1 - l) / 2
    <= 1/8, at any epsilon. K_ii = 1 / n keeps u below sqrt(n), so that nothing underflows.
    """
    n = cost.shape[-1]
    kernel = _exp_(cost / -epsilon).div_(n)
    u, error, sweeps = torch.ones_like(cost[..., :1]), math.inf, 0  # u (..., n, 1)
    while error > tol and sweeps < max_iter:
        sweeps += 10
        for _ in range(5):  # the error shrinks by 8^5 or more: seldom a second time
            v = (kernel @ u).reciprocal()
            u = (v / (kernel @ v)).sqrt()
        v = (kernel @ u).reciprocal()  # rows exact, as in `_solve`
        error = _l1((u / v - 1) / n).item()
    _warn_above(tol, error, sweeps, epsilon)
    f = epsilon / 2 * (u * v).log().squeeze(-1)
    return kernel.mul_(v / n).mul_(u.mT), f


def _exp_(x):
    """exp in place, at least about 1e-30: subnormal numbers slow a CPU's matrix products tenfold."""
    return x.clamp_(min=0.8 * math.log(torch.finfo(x.dtype).tiny)).exp_()


def _l1(residual):
    return residual.abs().sum((-2, -1)).max()  # of the worst problem in the batch


def _warn_above(tol, error, sweeps, epsilon):
    if not error <= tol:  # NaN too
        warnings.warn(f"Sinkhorn stopped at marginal error {error:.1e} > {tol:.1e} after {sweeps} sweeps, "
                      f"epsilon={epsilon}; raise epsilon, or use float64", stacklevel=5)


def _checked(cost, epsilon, a, b):
    """cost in float32 or float64, weights filled in and of sum 1, max|C|."""
    if cost.dim() < 2 or cost.numel() == 0:
        raise ValueError(f"cost must be (..., n, m) and not empty, got {tuple(cost.shape)}")
    if not 0 < epsilon < math.inf:
        raise ValueError(f"epsilon must be positive and finite, got {epsilon}")
    cost = cost.to(torch.promote_types(cost.dtype, torch.float32))
    if not math.isfinite(scale := cost.detach().abs().max().item()):
        raise ValueError(f"cost must be finite, got {scale}")
    return cost, _weights("a", a, cost, cost.shape[-2]), _weights("b", b, cost, cost.shape[-1]), scale


def _weights(name, w, cost, size):
    if w is None:
        return cost.new_full((size,), 1 / size)
    if w.shape not in ((size,), cost.shape[:-2] + (size,)):
        raise ValueError(f"{name} must be (..., {size}) for cost {tuple(cost.shape)}, got {tuple(w.shape)}")
    w = w.to(cost)
    if not (lowest := w.min().item()) >= 0:
        raise ValueError(f"{name} must not be negative, got {lowest}")
    total = w.sum(-1, keepdim=True)
    if not (gap := (total - 1).abs().max().item()) < 1e-4:
        raise ValueError(f"{name} must sum to 1, got a sum off by {gap:.3g}")
    return w / total


def _batch(kind, b, k=30, width=512):
    """Student's and teacher's cosine similarities at the teacher's k least similar anchors, (b, k) each."""
    rng = torch.Generator().manual_seed(0)
    if kind == "low-rank":
        teacher, student = (torch.randn(b, 3, generator=rng) @ torch.randn(3, width, generator=rng)
                            for _ in range(2))
    elif kind == "two classes":  # as trained networks see them; they disagree on every tenth sample
        side = torch.randint(2, (b, 1), generator=rng) * 2.0 - 1
        flip = 1 - 2.0 * (torch.arange(b) % 10 == 0)[:, None]
        teacher, student = (side * torch.rand(b, 1, generator=rng) * torch.randn(width, generator=rng)
                            + torch.randn(b, width, generator=rng) / 10 for side in (side, side * flip))
    else:
        teacher = torch.randn(8, width, generator=rng)[torch.randint(8, (b,), generator=rng)]
        teacher = teacher + torch.randn(b, width, generator=rng) / 2
        student = teacher + torch.randn(b, width, generator=rng)
    if kind == "collapsed":
        student = student + 5 * torch.randn(width, generator=rng)
    teacher, student = (torch.nn.functional.normalize(z, dim=1) for z in (teacher, student))
    anchors = (teacher @ teacher.T).topk(min(k, b), largest=False).indices
    return (student @ student.T).gather(1, anchors), (teacher @ teacher.T).gather(1, anchors)


def _reference_gradient(x, y, epsilon):
    """Debiased gradient in x, float64, marginals to 1e-9 or after 1,000 sweeps, the general solver only."""
    x, y = x.double(), y.double()
    gap, x, y = x.mean(0) - y.mean(0), x - x.mean(0), y - y.mean(0)
    xy, xx = _half_squared_distances(x, y), _half_squared_distances(x, x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 1,000 sweeps leave it below 1e-4 all the same
        to_y, to_x = (transport_plan(c, *sinkhorn(c, epsilon, tol=1e-9), epsilon) for c in (xy, xx))
    return gap / len(x) + to_x @ x - to_y @ y


def _peak_megabytes(step, device):
    """Peak of one step: CUDA's max_memory_allocated, or the running sum of the CPU allocator's events."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would talk of GPUs that are not there
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as p:
        step()
    events = p.profiler.kineto_results.events()
    events = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    return max(itertools.accumulate(nbytes for _, nbytes in sorted(events))) / 2**20


def _step(x, y, epsilon):
    sinkhorn_divergence(x.clone().requires_grad_(), y, epsilon).backward()


def _rivals():
    rivals = {}
    if importlib.util.find_spec("geomloss"):
        from geomloss import SamplesLoss
        loss = functools.cache(lambda eps: SamplesLoss("sinkhorn", p=2, blur=eps**0.5, backend="tensorized"))
        rivals["geomloss"] = lambda x, y, eps: loss(eps)(x, y)
    if importlib.util.find_spec("ot"):
        import ot
        solve = functools.partial(ot.solve, max_iter=1000, tol=1e-5, grad="envelope")
        pairs = ((0, 1, 1), (0, 0, -0.5), (1, 1, -0.5))
        rivals["POT"] = lambda *args: sum(
            w * solve(_half_squared_distances(args[i], args[j]), reg=args[2]).value for i, j, w in pairs)
    for name in {"geomloss", "POT"} - rivals.keys():
        print(f"{name} is not installed: no column for it")
    return rivals


def _timed(losses, x, y, epsilon, repeats):
    """Seconds of forward and backward, (runs, losses), run in turn; the last one's gradient stays in x.grad."""
    runs, begin = [], time.perf_counter()
    while len(runs) < 4 or len(runs) <= repeats and time.perf_counter() - begin < 1.5:
        runs.append([])
        for loss in losses:
            x.grad, start = None, time.perf_counter()
            loss(x, y, epsilon).backward()
            if x.is_cuda:
                torch.cuda.synchronize()
            runs[-1].append(time.perf_counter() - start)
    return runs[1:]  # without the warm-up


def benchmark(sizes, repeats, device):
    rivals = _rivals()
    print(f"debiased divergence, forward + backward, float32, {device}, {torch.get_num_threads()} threads\n"
          "ms: median; x: its time over ours, median of pairs run in turn; gradient: error against float64\n"
          "      batch     b  eps sweeps marginal     ms      MB gradient"
          + "".join(f" | {name:>8} gradient" for name in rivals))
    rows = []
    for kind, eps, b in itertools.product(("clustered", "collapsed", "low-rank", "two classes"), (0.1, 0.01), sizes):
        x, y = (z.to(device) for z in _batch(kind, b))
        x.requires_grad_()
        true = _reference_gradient(x.detach(), y, eps)
        timed = functools.partial(_timed, x=x, y=y, epsilon=eps, repeats=repeats)
        seconds = statistics.median(ours for ours, in timed([sinkhorn_divergence]))
        quality = f"{(x.grad - true).norm() / true.norm():8.0e}"
        for name, rival in rivals.items():
            if name != "POT" or b <= 512:  # POT takes seconds above
                ratio = statistics.median(other / ours for ours, other in timed([sinkhorn_divergence, rival]))
                quality += f" | {ratio:7.1f}x {(x.grad - true).norm() / true.norm():8.0e}"
        x, y = x.detach(), y.detach()
        plan, _, _, sweeps = _solve(_half_squared_distances(x - x.mean(0), y - y.mean(0)), eps)
        marginal = _l1(plan.sum(0, keepdim=True) - 1 / b) + _l1(plan.sum(1, keepdim=True) - 1 / b)
        megabytes = _peak_megabytes(functools.partial(_step, x, y, eps), device)
        rows.append((b, seconds, megabytes))
        print(f"{kind:>11} {b:5} {eps:4} {sweeps:6} {marginal:8.0e} {1e3 * seconds:6.2f} {megabytes:7.2f} {quality}",
              flush=True)
    large = sorted(set(sizes))[-2:]  # below, a step is mostly overhead
    if len(large) == 2:
        log_b, *logs = ([math.log(value) for value in column]
                        for column in zip(*(row for row in rows if row[0] in large), strict=True))
        t, m = (statistics.linear_regression(log_b, column).slope for column in logs)
        print(f"b = {large[0]} to {large[1]}: time grows like b^{t:.2f}, peak memory like b^{m:.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Benchmark of the Sinkhorn divergence.", allow_abbrev=False)
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 128, 512, 2048], help="batch sizes b")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--repeats", type=int, default=20, help="paired repetitions, at most 1.5 s a row")
    args = parser.parse_args()
    if min(args.sizes) < 2 or args.threads < 1 or args.repeats < 1:
        parser.error("--sizes must be 2 or more, --threads and --repeats 1 or more")
    torch.set_num_threads(args.threads)
    benchmark(args.sizes, args.repeats, "cuda" if torch.cuda.is_available() else "cpu")
