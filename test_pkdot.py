"""Every test of the project. Each has an oracle that is not the code under test: a closed form, a loop, scipy, a brute
force, a permutation; none needs a GPU, the network or data that is not made here.

    python -m pytest -q test_pkdot.py
    python -m pytest -q test_pkdot.py -k "sinkhorn or pkdot_loss"
"""
import contextlib
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import re
import resource
import shlex
import shutil
import signal
import struct
import statistics
import subprocess
import sys
import time
import traceback
import warnings
import zlib
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "1")  # on a busy machine, MKL's number of threads moves the last bits

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import wavfile
from scipy.optimize import linear_sum_assignment, minimize
from scipy.special import logsumexp, softmax

import data
import models
import sinkhorn as sinkhorn_module
import train_student
import train_teacher
from data import UserError
from pkdot import ccc, cosine_loss, cosine_similarity_matrix, kl_loss, mse_loss, pkdot_loss, rkd_loss, task_loss
from sinkhorn import ot_cost, sinkhorn, sinkhorn_divergence, sweep, transport_plan
from train_teacher import score

SCRIPTS = Path(train_student.__file__).parent


@pytest.fixture(autouse=True, scope="session")
def nothing_is_left(tmp_path_factory):
    """Of the folders that tests share; pytest keeps those of three runs."""
    yield
    for folder in tmp_path_factory.getbasetemp().iterdir():
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    """No test reads or writes the user's runs/ and data/: whatever has no path of its own lands in a temporary one,
    which is gone after the test: all of them together would hold 5 GB of checkpoints."""
    monkeypatch.chdir(tmp_path)
    yield
    shutil.rmtree(tmp_path, ignore_errors=True)


# ------------------------------------------------------------------------------------------------------------ sinkhorn


def points(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def weights(*shape, seed=0):
    return torch.softmax(points(*shape, seed=seed), -1)


def squared(x, y):
    return (x.unsqueeze(-2) - y.unsqueeze(-3)).square().sum(-1) / 2


def plain_sinkhorn(cost, epsilon, a=None, b=None, sweeps=20000, tol=1e-12):
    """Log-domain Sinkhorn in numpy, float64: plan and value <pi, C> + epsilon KL."""
    cost = np.asarray(cost, dtype=np.float64)
    n, m = cost.shape
    a, b = (np.full(k, 1 / k) if w is None else np.asarray(w, dtype=np.float64) for w, k in ((a, n), (b, m)))
    g = np.zeros(m)
    for _ in range(sweeps):
        z = (g - cost) / epsilon
        top = z.max(1, keepdims=True)
        f = -epsilon * (top[:, 0] + np.log((np.exp(z - top) * b).sum(1)))
        plan = np.exp((f[:, None] + g - cost) / epsilon) * a[:, None] * b
        if np.abs(plan.sum(0) - b).sum() < tol:
            break
        z = (f[:, None] - cost) / epsilon
        top = z.max(0, keepdims=True)
        g = -epsilon * (top[0] + np.log((np.exp(z - top) * a[:, None]).sum(0)))
    return plan, (plan * (f[:, None] + g)).sum(), np.abs(plan.sum(0) - b).sum()


def unrolled_cost(cost, epsilon, sweeps=400):
    """Eq. 5-6 with autograd through every sweep."""
    log_n, log_m = math.log(cost.shape[0]), math.log(cost.shape[1])
    g = torch.zeros(cost.shape[1], dtype=cost.dtype)
    for _ in range(sweeps):
        f = -epsilon * torch.logsumexp((g - cost) / epsilon - log_m, 1)
        g = -epsilon * torch.logsumexp((f[:, None] - cost) / epsilon - log_n, 0)
    log_density = (f[:, None] + g - cost) / epsilon
    plan = (log_density - log_n - log_m).exp()
    return (plan * cost).sum() + epsilon * (plan * log_density).sum()


@pytest.mark.parametrize("shape", [(7, 7), (5, 9), (2, 3, 6, 4), (1, 1), (1, 5)])
@pytest.mark.parametrize("epsilon", [0.05, 1.0])
def test_marginals(shape, epsilon):
    cost = points(*shape).square()
    a, b = weights(*shape[:-1]), weights(*shape[:-2], shape[-1], seed=1)
    plan = transport_plan(cost, *sinkhorn(cost, epsilon, a, b, tol=1e-9), epsilon, a, b)
    assert (plan.sum(-1) - a).abs().sum(-1).max() < 1e-9 and (plan.sum(-2) - b).abs().sum(-1).max() < 1e-9


@pytest.mark.filterwarnings("ignore:Sinkhorn stopped")
def test_small_epsilon_is_the_assignment():
    n, epsilon = 40, 1e-3
    cost = squared(points(n, 2), points(n, 2, seed=1))
    plan = transport_plan(cost, *sinkhorn(cost, epsilon, tol=1e-7, max_iter=20000), epsilon)
    best = cost.numpy()[linear_sum_assignment(cost.numpy())].mean()
    found = (plan * cost).sum().item()
    assert best - 1e-5 < found < best + epsilon * math.log(n)
    assert abs(ot_cost(cost, epsilon).item() - best) < epsilon * math.log(n) + 1e-4


def test_dual_brute_force():
    cost, epsilon, a, b = points(4, 6).square(), 0.3, weights(4), weights(6, seed=1)
    c, p, q = cost.numpy(), a.numpy(), b.numpy()

    def negative_dual(z):
        f, g = z[:4], z[4:]
        plan = np.exp((f[:, None] + g - c) / epsilon) * p[:, None] * q
        gradient = np.concatenate((plan.sum(1) - p, plan.sum(0) - q))
        return -(p @ f + q @ g + epsilon * (1 - plan.sum())), gradient

    best = minimize(negative_dual, np.zeros(10), jac=True, method="BFGS", options={"gtol": 1e-9})
    assert abs(ot_cost(cost, epsilon, a, b).item() + best.fun) < 1e-8


def test_value_and_plan_of_the_plain_loop():
    x, y = points(20, 3), points(13, 3, seed=1)
    a, b = weights(20), weights(13, seed=1)
    plan, value, _ = plain_sinkhorn(squared(x, y), 0.1, a, b)
    assert ot_cost(squared(x, y), 0.1, a, b).item() == pytest.approx(value, abs=1e-7)
    ours = transport_plan(squared(x, y), *sinkhorn(squared(x, y), 0.1, a, b, tol=1e-10), 0.1, a, b)
    assert np.abs(ours.numpy() - plan).sum() < 1e-7
    xy, xx, yy = (plain_sinkhorn(squared(p, q), 0.1)[1] for p, q in ((x, y), (x, x), (y, y)))
    assert sinkhorn_divergence(x, y, 0.1).item() == pytest.approx(xy - xx / 2 - yy / 2, abs=1e-6)
    assert sinkhorn_divergence(x, y, 0.1, debias=False).item() == pytest.approx(xy, abs=1e-6)


@pytest.mark.parametrize("epsilon, spread", [(0.2, 5), (0.02, 2)])  # epsilon falls further for the harder problems
def test_batch_is_the_loop(epsilon, spread):
    x, y = points(2, 3, 10, 4), points(2, 3, 8, 4, seed=1)
    x[1] *= spread
    divergence, cost = sinkhorn_divergence(x, y, epsilon), ot_cost(squared(x, y), epsilon)
    for i in range(2):
        for j in range(3):
            assert torch.allclose(divergence[i, j], sinkhorn_divergence(x[i, j], y[i, j], epsilon), atol=1e-6)
            assert torch.allclose(cost[i, j], ot_cost(squared(x[i, j], y[i, j]), epsilon), atol=1e-6)


@pytest.mark.parametrize("debias", [True, False])
def test_divergence_gradcheck(debias):
    x, y = points(2, 6, 3).requires_grad_(), points(2, 5, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, y: sinkhorn_divergence(x, y, 0.5, debias), (x, y),
                                    atol=2e-5, rtol=1e-3)


def test_cost_gradcheck():
    cost, a, b = points(5, 7).square().requires_grad_(), weights(5), weights(7, seed=1)
    assert torch.autograd.gradcheck(lambda c: ot_cost(c, 0.5, a, b), (cost,), atol=2e-5, rtol=1e-3)


def test_weights_gradcheck():
    cost, a, b = points(2, 5, 7).square(), weights(5).requires_grad_(), weights(7, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: ot_cost(cost, 0.5, a / a.sum(), b / b.sum()), (a, b),
                                    atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("loss", [
    lambda x, y: sinkhorn_divergence(x, y, 0.3), lambda x, y: sinkhorn_divergence(x, y, 0.3, debias=False),
    lambda x, y: sinkhorn_divergence(y, x, 0.3) ** 2, lambda x, y: x.pow(3).sum() + ot_cost(squared(x, y), 0.3),
    lambda x, y: pkdot_loss(x, y, 3)])
def test_a_second_derivative_is_refused(loss):
    x, y, step = points(6, 3).requires_grad_(), points(6, 3, seed=1), 1e-4 * points(6, 3, seed=2)
    gradient, = torch.autograd.grad(loss(x, y), x, create_graph=True)
    up, down = ((x.detach() + s).requires_grad_() for s in (step, -step))
    change = torch.autograd.grad(loss(up, y), up)[0] - torch.autograd.grad(loss(down, y), down)[0]
    assert change.norm() > 1e-2 * step.norm()  # there is one, and it is not zero
    with pytest.raises(RuntimeError, match="no second"):
        torch.autograd.grad(gradient.sum(), x)
    value = loss(x, y)
    value.backward(retain_graph=True)
    value.backward()  # gradients accumulate
    torch.testing.assert_close(x.grad, 2 * gradient)


def test_gradient_of_the_unrolled_loop():
    x, y = points(12, 3).requires_grad_(), points(9, 3, seed=1).requires_grad_()
    naive = (unrolled_cost(squared(x, y), 0.3) - unrolled_cost(squared(x, x), 0.3) / 2
             - unrolled_cost(squared(y, y), 0.3) / 2)
    expected = torch.autograd.grad(naive, (x, y))
    for ours, true in zip(torch.autograd.grad(sinkhorn_divergence(x, y, 0.3), (x, y)), expected, strict=True):
        assert (ours - true).norm() < 1e-4 * true.norm()
    cost = points(9, 9).square().requires_grad_()
    true, = torch.autograd.grad(unrolled_cost(cost, 0.3), cost)
    ours, = torch.autograd.grad(ot_cost(cost, 0.3), cost)
    assert (ours - true).norm() < 1e-4 * true.norm()


@pytest.mark.parametrize("kind, epsilon", [
    *itertools.product(["clustered", "collapsed", "low-rank"], [0.1, 0.01]),
    ("two classes", 0.1)])  # at 0.01 the plain loop takes minutes
def test_float32_gradient_on_similarity_rows(kind, epsilon):
    x, y = sinkhorn_module._batch(kind, 64, k=20)
    expected = torch.zeros(x.shape, dtype=torch.float64)
    xd, yd = x.double(), y.double()
    for other, sign in ((yd, 1), (xd, -1)):
        plan, _, error = plain_sinkhorn(squared(xd, other), epsilon, sweeps=3000, tol=1e-8)
        plan = torch.from_numpy(plan)
        expected += sign * (plan.sum(1, keepdim=True) * xd - plan @ other)
    x.requires_grad_()
    sinkhorn_divergence(x, y, epsilon).backward()
    assert (x.grad - expected).norm() < 1e-3 * expected.norm()


def test_symmetric_in_its_arguments():
    x, y = points(11, 3), points(8, 3, seed=1)
    assert torch.allclose(sinkhorn_divergence(x, y, 0.1), sinkhorn_divergence(y, x, 0.1), atol=1e-6)
    assert torch.allclose(ot_cost(squared(x, y), 0.1), ot_cost(squared(y, x), 0.1), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_for_equal_clouds(dtype):
    x = points(30, 5, dtype=dtype).requires_grad_()
    value = sinkhorn_divergence(x, x.detach().flip(0), 0.1)
    value.backward()
    assert abs(value.item()) < 1e-5 and x.grad.abs().sum() < 1e-4
    assert sinkhorn_divergence(x, x.detach(), 0.1, debias=False).item() > 0.1  # the entropic bias it removes


def test_integer_weights_are_copies():
    x, y, counts = points(5, 2), points(7, 2, seed=1), torch.tensor([1, 3, 2, 1, 5])
    copies = x.repeat_interleave(counts, 0)
    weighted = ot_cost(squared(x, y), 0.2, counts / counts.sum())
    assert torch.allclose(weighted, ot_cost(squared(copies, y), 0.2), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("epsilon", [1e-2, 1.0])
@pytest.mark.filterwarnings("ignore:Sinkhorn stopped")
def test_zero_weights_drop_their_points(dtype, epsilon):
    cost = squared(points(6, 2), points(5, 2, seed=1)).to(dtype).requires_grad_()
    a = torch.tensor([0.25, 0, 0.25, 0.5, 0, 0], dtype=dtype)
    b = torch.tensor([0, 0.5, 0.25, 0.25, 0], dtype=dtype)
    value = ot_cost(cost, epsilon, a, b)
    value.backward()
    _, expected, _ = plain_sinkhorn(cost.detach()[a > 0][:, b > 0], epsilon, a[a > 0], b[b > 0])
    assert value.item() == pytest.approx(expected, abs=1e-4)
    assert cost.grad.isfinite().all() and (cost.grad[a == 0] == 0).all() and (cost.grad[:, b == 0] == 0).all()


@pytest.mark.filterwarnings("ignore:Sinkhorn stopped")
def test_permutation_of_points():
    x, y, order = points(9, 3), points(9, 3, seed=1), torch.tensor([3, 8, 0, 2, 7, 1, 6, 4, 5])
    assert torch.allclose(sinkhorn_divergence(x[order], y, 0.1), sinkhorn_divergence(x, y, 0.1), atol=1e-7)
    cost = squared(x, y)
    plan = transport_plan(cost, *sinkhorn(cost, 0.1, tol=1e-9), 0.1)
    permuted = transport_plan(cost[order], *sinkhorn(cost[order], 0.1, tol=1e-9), 0.1)
    assert torch.allclose(permuted, plan[order], atol=1e-8)


def test_translation_adds_half_its_squared_length():
    x, y, shift = points(10, 4), points(12, 4, seed=1), torch.tensor([30.0, -40.0, 0, 0])
    y = y - y.mean(0) + x.mean(0)
    moved = sinkhorn_divergence(x.float(), (y + shift).float(), 0.1).item()
    assert moved == pytest.approx(sinkhorn_divergence(x, y, 0.1).item() + 50**2 / 2, abs=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("ratio", [1e-3, 1e-2, 1.0, 10.0])
@pytest.mark.parametrize("kind", ["random", "points", "far clusters"])
def test_extreme_regimes(kind, ratio, scale, dtype):
    clusters = torch.cat((points(9, 2), points(15, 2, seed=2) + 30))
    cost = {"random": points(20, 24).abs(), "points": squared(points(24, 2), points(24, 2, seed=1)),
            "far clusters": squared(clusters, clusters.flip(0) + points(24, 2, seed=3))}[kind]
    cost = (cost / cost.max() * scale).to(dtype)
    epsilon = ratio * scale
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        f, g = sinkhorn(cost, epsilon)
    assert f.isfinite().all() and g.isfinite().all() and len(caught) <= 1
    plan = transport_plan(cost, f, g, epsilon)
    rows = (plan.sum(-1) - 1 / cost.shape[0]).abs().sum()
    columns = (plan.sum(-2) - 1 / cost.shape[1]).abs().sum()
    reached = 2 * max(1e-5, 4 * torch.finfo(dtype).eps / ratio)
    assert caught or rows + columns < reached
    reference, value, error = plain_sinkhorn(cost, epsilon, sweeps=3000, tol=1e-9)
    assert rows + columns < max(reached, 3 * error)  # keeps up with three times the plain sweeps
    ours = (plan * cost).sum().item() / scale
    assert ours == pytest.approx((reference * cost.double().numpy()).sum() / scale, abs=max(2e-4, 2 * error))


@pytest.mark.parametrize("kind, epsilon, max_iter, off", [
    ("two classes", 0.1, 105, 1e-3), ("two classes", 0.01, 105, 2e-2),  # cost / epsilon to 4,000
    ("clustered", 0.01, 200, 1e-3)])  # clusters nearly apart: the over-relaxed sweeps must not be stopped
def test_a_hard_batch_converges(kind, epsilon, max_iter, off):
    x, y = (z - z.mean(0) for z in sinkhorn_module._batch(kind, 32))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # not "stopped"
        f, g = sinkhorn(squared(x, y), epsilon, max_iter=max_iter)
    cost = squared(x.double(), y.double())
    plan, value, error = plain_sinkhorn(cost, epsilon, sweeps=50000, tol=1e-6)
    assert np.abs(transport_plan(cost, f.double(), g.double(), epsilon).numpy() - plan).sum() < off + error
    assert (f.double() + g.double()).mean().item() == pytest.approx(value, abs=1e-3)


@pytest.mark.parametrize("omega", [1.0, 1.2, 1.4, 1.7])
def test_over_relaxation_finds_the_best(omega):
    def rate(w, c=0.97**0.5):  # of x = c y, y = c x in turn, over-relaxed
        return np.abs(np.linalg.eigvals([[1 - w, w * c], [w * c * (1 - w), 1 - w + w**2 * c**2]])).max()

    best = min(np.linspace(1, 1.99, 1981), key=rate)
    found = sinkhorn_module._over_relaxation(omega, rate(omega)**sinkhorn_module.BLOCK, 1.0)
    assert found == pytest.approx(best, abs=1e-3)
    assert sinkhorn_module._over_relaxation(omega, 1.001, 1.0) > 1.9  # a plateau is no increase
    assert sinkhorn_module._over_relaxation(omega, 1.1, 1.0) == 1 < sinkhorn_module._over_relaxation(1, 0.1, math.inf)


@pytest.mark.filterwarnings("ignore:Sinkhorn stopped")
@pytest.mark.parametrize("max_iter", [7, 63, 70, 77])  # plain and over-relaxed blocks
def test_rows_are_exact_wherever_it_stops(max_iter):
    x, y = (z.double() for z in sinkhorn_module._batch("two classes", 32))
    plan = transport_plan(squared(x, y), *sinkhorn(squared(x, y), 0.1, max_iter=max_iter, tol=1e-12), 0.1)
    assert (plan.sum(-1) - 1 / 32).abs().max() < 1e-12 < 1e-6 < (plan.sum(-2) - 1 / 32).abs().max()


@pytest.mark.parametrize("safe_drift", [20, 0])  # 0: log-domain sweeps alone
@pytest.mark.parametrize("epsilon", [1.0, 0.3])
def test_log_domain_sweeps(safe_drift, epsilon, monkeypatch):
    monkeypatch.setattr(sinkhorn_module, "SAFE_DRIFT", safe_drift)
    cost, a, b = squared(points(2, 9, 3), points(2, 7, 3, seed=1)), weights(9), weights(7, seed=1)
    f, g = sinkhorn(cost, epsilon, a, b, tol=1e-8)
    for plan, one in zip(transport_plan(cost, f, g, epsilon, a, b), cost, strict=True):
        assert np.abs(plan.numpy() - plain_sinkhorn(one, epsilon, a, b)[0]).sum() < 1e-7


def test_the_sweep_is_the_plain_loops():
    cost, a, b, f = points(2, 6, 5).square(), weights(2, 6), weights(5, seed=1), torch.zeros(2, 6)
    for _ in range(300):
        f, g = sweep(cost, f.double(), 0.2, a, b)
    plan = transport_plan(cost, f, g, 0.2, a, b)
    for i in range(2):
        assert np.abs(plan[i].numpy() - plain_sinkhorn(cost[i], 0.2, a[i], b)[0]).sum() < 1e-9


@pytest.mark.parametrize("n", [20, 60])
def test_a_permutation_is_found(n):
    best = torch.eye(n)[torch.randperm(n, generator=torch.Generator().manual_seed(0))]
    plan = transport_plan(1 - best, *sinkhorn(1 - best, 0.01), 0.01)  # entries fall from 1/n to e^-100 at once
    assert torch.allclose(plan, best / n, atol=1e-6)


def test_identical_points_and_one_point():
    same = torch.full((6, 3), 0.7)
    assert sinkhorn_divergence(same, same, 1e-3).item() == pytest.approx(0, abs=1e-9)
    assert sinkhorn_divergence(same, same + 2, 1e-3).item() == pytest.approx(6.0)
    x, y = torch.tensor([[1.0, 2.0]], requires_grad=True), torch.tensor([[4.0, -2.0]])
    value = sinkhorn_divergence(x, y, 0.01)
    value.backward()
    assert value.item() == pytest.approx(12.5) and torch.allclose(x.grad, x.detach() - y)
    assert ot_cost(torch.tensor([[7.0]]), 0.1).item() == pytest.approx(7.0)


def test_warns_once_when_it_stops_early():
    cost = squared(points(50, 2), points(50, 2, seed=1))
    for too_hard in ({"cost": cost, "epsilon": 1e-3, "max_iter": 1}, {"cost": cost.float(), "epsilon": 1e-6}):
        with pytest.warns(UserWarning, match="marginal error") as caught:
            sinkhorn(**too_hard)
        assert len(caught) == 1
    x = points(20, 2)
    for loss in (sinkhorn, ot_cost, lambda cost, epsilon: sinkhorn_divergence(x, x.flip(0) + 1, 1e-15)):
        with pytest.warns(UserWarning, match="marginal error") as caught:
            loss(cost.float(), 1e-6)
        assert {w.filename for w in caught} == {__file__}  # the caller's line, not the solver's
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sinkhorn(cost, 1.0)


def test_dtypes_and_autocast():
    x, y = points(16, 4, dtype=torch.float32).requires_grad_(), points(16, 4, seed=1, dtype=torch.float32)
    expected = sinkhorn_divergence(x, y, 0.1)
    expected.backward()
    plain, x.grad = x.grad, None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = sinkhorn_divergence(x, y, 0.1)
        value.backward()
        assert torch.equal(sinkhorn(squared(x, y), 0.1)[0], sinkhorn(squared(x, y).detach(), 0.1)[0])
    assert value.dtype == torch.float32 and torch.equal(value, expected) and torch.equal(x.grad, plain)
    half = x.detach().half().requires_grad_()
    assert sinkhorn_divergence(half, y.half(), 0.1).dtype == torch.float32
    sinkhorn_divergence(half, y.half(), 0.1).backward()
    assert half.grad.dtype == torch.float16
    assert sinkhorn(points(3, 3).bfloat16(), 1.0)[0].dtype == torch.float32
    assert sinkhorn_divergence(x.double(), y, 0.1).dtype == torch.float64
    assert not sinkhorn(squared(x, y), 0.1)[0].requires_grad


@pytest.mark.parametrize("call, message", [
    (lambda: sinkhorn(torch.tensor([[0.0, math.nan]]), 1.0), "finite, got nan"),
    (lambda: ot_cost(torch.tensor([[0.0, math.inf]]), 1.0), "finite, got inf"),
    (lambda: sinkhorn(torch.zeros(3), 1.0), r"got \(3,\)"),
    (lambda: sinkhorn(torch.zeros(0, 3), 1.0), r"got \(0, 3\)"),
    (lambda: sinkhorn(torch.zeros(2, 2), 0), "epsilon must be positive and finite, got 0"),
    (lambda: sinkhorn_divergence(torch.zeros(2, 2), torch.zeros(2, 2), -0.1), "got -0.1"),
    (lambda: sinkhorn(torch.zeros(2, 3), 1.0, a=torch.ones(3) / 3), r"a must be .*got \(3,\)"),
    (lambda: sinkhorn(torch.zeros(2, 3), 1.0, b=torch.tensor([1.5, -0.5, 0])),
     "b must not be negative, got -0.5"),
    (lambda: sinkhorn(torch.zeros(2, 3), 1.0, a=torch.tensor([0.5, math.nan])),
     "a must not be negative, got nan"),
    (lambda: ot_cost(torch.zeros(2, 3), 1.0, a=torch.ones(2)), "a must sum to 1, got a sum off by 1"),
    (lambda: sinkhorn_divergence(torch.zeros(4, 2), torch.zeros(4, 3), 0.1), r"\(4, 2\), \(4, 3\)"),
    (lambda: sinkhorn_divergence(torch.full((4, 2), math.nan), torch.zeros(4, 2), 0.1), "finite, got nan"),
])
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_benchmark(capsys):
    sinkhorn_module.benchmark([8, 16], 1, "cpu")
    out = capsys.readouterr().out
    assert out.count("ours") == 16 and "launches syncs" in out
    rows = [line.split() for line in out.splitlines() if " ours " in line]
    assert all(float(error) < 1e-2 for *_, error in rows)  # as an independent gradient's in the tests above


def test_launches_and_syncs():
    x = torch.ones(3, 4)
    with sinkhorn_module._Count() as count:
        assert (x @ x.T).view(9)[1:].exp_().sum().item() > 0  # product, exp, sum; a view is none
    assert (count.launches, count.syncs) == (3, 1)
    for kind in ("clustered", "collapsed"):
        x, y = sinkhorn_module._batch(kind, 128)
        with sinkhorn_module._Count() as count:
            sinkhorn_divergence(x.requires_grad_(), y, 0.1).backward()
        assert count.launches < 150 and count.syncs == 3


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ------------------------------------------------------------------------------------------------------------- pkdot

def naive_ot(x, y, epsilon):
    """Eq. 5 in float64: log-domain Sinkhorn to convergence, then the primal value."""
    C = np.array([[((p - q) ** 2).sum() / 2 for q in y] for p in x])
    f, n, m = np.zeros(len(x)), len(x), len(y)
    before = np.inf
    while np.abs(f - before).max() > 1e-9:
        before = f
        g = -epsilon * logsumexp((f[:, None] - C) / epsilon - np.log(n), axis=0)
        f = -epsilon * logsumexp((g - C) / epsilon - np.log(m), axis=1)
    pi = np.exp((f[:, None] + g - C) / epsilon) / (n * m)
    return (pi * C).sum() + epsilon * (pi * np.log(pi * n * m)).sum()


def naive_similarity(z):
    return np.array([[p @ q / (math.sqrt(p @ p) * math.sqrt(q @ q)) for q in z] for p in z])


def naive_pkdot(student, teacher, anchors, epsilon, debias):
    """anchors(i, row i of the teacher's similarities) -> the row's anchors"""
    S, T = naive_similarity(student.numpy()), naive_similarity(teacher.numpy())
    index = [anchors(i, row) for i, row in enumerate(T)]
    x, y = (np.array([[M[i, j] for j in chosen] for i, chosen in enumerate(index)]) for M in (S, T))
    loss = naive_ot(x, y, epsilon)
    return loss - (naive_ot(x, x, epsilon) + naive_ot(y, y, epsilon)) / 2 if debias else loss


ANCHORS = {"dissimilar": lambda k: lambda i, row: sorted(range(len(row)), key=lambda j: row[j])[:k],
           "similar": lambda k: lambda i, row: sorted(range(len(row)), key=lambda j: -row[j])[:k]}


@pytest.mark.parametrize("epsilon", [0.05, 0.5])
@pytest.mark.parametrize("debias", [True, False])
@pytest.mark.parametrize("anchors, k", [("dissimilar", 3), ("similar", 3), ("dissimilar", 7)])  # 7: k = b is legal
def test_pkdot_loss_equals_a_naive_loop_with_the_teachers_anchors(anchors, k, debias, epsilon):
    student, teacher = randn(7, 5), randn(7, 4, seed=1)  # widths may differ
    loss = pkdot_loss(student, teacher, k, epsilon, debias, anchors)
    expected = naive_pkdot(student, teacher, ANCHORS[anchors](k), epsilon, debias)
    assert loss.item() == pytest.approx(expected, rel=1e-4, abs=1e-7)


def test_random_anchors_are_one_of_all_possible_choices():
    student, teacher = randn(3, 4), randn(3, 4, seed=1)
    choices = itertools.product(range(3), repeat=3)  # an anchor for each row
    possible = [naive_pkdot(student, teacher, lambda i, row, c=c: [c[i]], 0.5, False) for c in choices]
    found = set()
    for seed in range(12):
        torch.manual_seed(seed)
        loss = pkdot_loss(student, teacher, 1, 0.5, False, anchors="random").item()
        near = np.abs(np.array(possible) - loss)
        assert near.min() < 1e-5
        found.add(int(near.argmin()))
    assert len(found) > 3


@pytest.mark.parametrize("debias", [True, False])
def test_pkdot_gradient_equals_finite_differences_of_the_naive_loss(debias):
    student, teacher, step = randn(6, 4), randn(6, 4, seed=1), 1e-4 * randn(6, 4, seed=2)
    z = student.clone().requires_grad_()
    pkdot_loss(z, teacher, 3, 0.1, debias).backward()
    up, down = (naive_pkdot(student + s, teacher, ANCHORS["dissimilar"](3), 0.1, debias) for s in (step, -step))
    assert (z.grad * step).sum().item() == pytest.approx((up - down) / 2, rel=1e-3)


def test_pkdot_loss_ignores_positive_scales_and_the_order_of_samples():
    student, teacher, order = randn(8, 5), randn(8, 5, seed=1), randn(8).argsort()
    loss = pkdot_loss(student, teacher, 4)
    scale = randn(8, 1, seed=2).mul(3).exp()
    torch.testing.assert_close(pkdot_loss(student * scale, 1e-4 * teacher, 4), loss, rtol=1e-4, atol=0)
    torch.testing.assert_close(pkdot_loss(student[order], teacher[order], 4), loss, rtol=1e-4, atol=0)


def test_pkdot_loss_and_gradient_vanish_when_student_equals_teacher():
    z = randn(8, 5).requires_grad_()
    pkdot_loss(z, z.detach(), 4).backward()
    assert abs(pkdot_loss(z, z, 4).item()) < 1e-6 and z.grad.abs().max() < 1e-5


@pytest.mark.parametrize("loss", [pkdot_loss, cosine_loss, mse_loss, kl_loss, rkd_loss])
def test_no_gradient_reaches_the_teacher(loss):
    student, teacher = randn(31, 4).requires_grad_(), randn(31, 4, seed=1).requires_grad_()
    loss(student, teacher).backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0


@pytest.mark.parametrize("student, teacher, options, names", [
    (randn(4, 2), randn(4, 2), dict(k=5), ("k=5", "b=4")), (randn(4, 2), randn(4, 2), dict(k=0), ("k=0",)),
    (randn(4, 2), randn(5, 2), dict(k=2), ("(4, 2)", "(5, 2)")), (randn(4), randn(4), dict(k=2), ("(4,)",)),
    (randn(4, 2), randn(4, 2), dict(k=2, anchors="far"), ("'far'", "dissimilar", "similar", "random")),
    (randn(4, 2).index_fill(0, torch.tensor(1), math.nan), randn(4, 2), dict(k=2), ("NaN", "2 values of the student")),
    (randn(4, 2), randn(4, 2).index_fill(1, torch.tensor(1), math.inf), dict(k=2), ("4 of the teacher",)),
    (randn(4, 2), randn(4, 2), dict(k=2, epsilon=-0.5), ("-0.5",))])
def test_pkdot_loss_names_what_it_refuses(student, teacher, options, names):
    with pytest.raises(ValueError) as error:
        pkdot_loss(student, teacher, **options)
    assert all(name in str(error.value) for name in names)


def test_zero_row_has_zero_similarities_and_finite_gradients():
    z = randn(5, 3)
    z[2] = 0
    z.requires_grad_()
    S = cosine_similarity_matrix(z)
    rest = [0, 1, 3, 4]
    expected = np.zeros((5, 5))
    expected[np.ix_(rest, rest)] = naive_similarity(z.detach()[rest].numpy())
    np.testing.assert_allclose(S.detach(), expected, atol=1e-12)
    pkdot_loss(z, randn(5, 3, seed=1), 3).backward()
    assert torch.isfinite(z.grad).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pkdot_loss_is_float32_under_autocast(dtype):
    student, teacher = randn(9, 6).to(dtype), randn(9, 6, seed=1).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        loss = pkdot_loss(student, teacher, 4)
    expected = naive_pkdot(student.double(), teacher.double(), ANCHORS["dissimilar"](4), 0.1, True)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected, rel=1e-3)


def test_ccc_is_eq_7():
    x, y = randn(50), 0.6 * randn(50) + 0.3 * randn(50, seed=1) + 0.2
    p, q = x.numpy(), y.numpy()
    rho, (s, t) = np.corrcoef(p, q)[0, 1], (p.std(), q.std())  # population deviations
    expected = 2 * rho * s * t / (s**2 + t**2 + (p.mean() - q.mean()) ** 2)
    assert ccc(x, y).item() == pytest.approx(expected, rel=1e-12)
    assert ccc(x, x).item() == pytest.approx(1) and ccc(x, -x + 2 * x.mean()).item() == pytest.approx(-1)
    both = task_loss(torch.stack([x, y], 1)[None], torch.stack([y, y], 1)[None]).item()
    assert both == pytest.approx(1 - (expected + 1) / 2, rel=1e-6)  # the mean of valence's and arousal's


@pytest.mark.parametrize("a, b", [(0.0, 0.0), (0.5, 0.25), (0.1, "varying"), (0.1, 0.1)])
def test_ccc_of_a_constant_is_zero_with_finite_gradient(a, b):
    x = torch.full((7,), a, requires_grad=True)
    value = ccc(x, randn(7).float() if b == "varying" else torch.full((7,), b))
    value.backward()
    assert abs(value.item()) < 1e-6 and torch.isfinite(x.grad).all()


def test_ccc_refuses_series_of_different_lengths():
    for x, y in ((randn(3), randn(4)), (randn(0), randn(0))):
        with pytest.raises(ValueError, match=rf"\({len(x)},\) and \({len(y)},\)"):
            ccc(x, y)


def test_task_loss_is_blind_to_clips_without_label():
    label, output = randn(3, 4, 2).tanh().float(), randn(3, 4, 2, seed=1).float()
    label[0, 1], label[2, 3, 0] = math.nan, math.nan  # no label in either place
    keep = torch.ones(3, 4, dtype=torch.bool)
    keep[0, 1] = keep[2, 3] = False
    changed = output.where(keep[..., None], 77.0).requires_grad_()
    loss = task_loss(changed, label)
    loss.backward()
    p, q = output[keep].double().numpy(), label[keep].double().numpy()
    cov = [2 * np.mean((a - a.mean()) * (b - b.mean())) / (a.var() + b.var() + (a.mean() - b.mean()) ** 2)
           for a, b in zip(p.T, q.T, strict=True)]
    assert loss.item() == pytest.approx(1 - np.mean(cov), rel=1e-5)
    assert (changed.grad[~keep] == 0).all() and (changed.grad[keep] != 0).all()


def test_task_loss_of_classes_is_eq_8():
    output, label = randn(6, 5), torch.tensor([0, 4, 2, 2, 1, 3])
    expected = -np.mean([np.log(softmax(o)[c]) for o, c in zip(output.numpy(), label, strict=True)])
    assert task_loss(output, label).item() == pytest.approx(expected)


def test_kl_cosine_and_mse_equal_their_closed_forms():
    s, t = randn(6, 5), randn(6, 5, seed=1)
    kl = 0
    for p, q in zip(softmax(t.numpy() / 4, axis=1), softmax(s.numpy() / 4, axis=1), strict=True):
        kl += 16 / 6 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert kl_loss(s, t).item() == pytest.approx(kl)
    cos = [a @ b / math.sqrt((a @ a) * (b @ b)) for a, b in zip(s.numpy(), t.numpy(), strict=True)]
    assert cosine_loss(s, t).item() == pytest.approx(1 - np.mean(cos))
    assert mse_loss(s, t).item() == pytest.approx(np.mean((s.numpy() - t.numpy()) ** 2))


def test_rkd_equals_triple_loops():
    def relations(z):
        n = range(len(z))
        d = np.array([[math.dist(z[i], z[j]) for j in n] for i in n])
        angle = np.zeros((len(z),) * 3)
        for i, j, k in itertools.product(n, n, n):
            if i != j and k != j:
                angle[i, j, k] = (z[i] - z[j]) @ (z[k] - z[j]) / (d[i, j] * d[k, j])
        return d / d[d > 0].mean(), angle

    def huber(a, b):
        e = np.abs(a - b)
        return np.where(e < 1, e**2 / 2, e - 0.5).mean()

    s, t = 3 * randn(5, 4), randn(5, 6, seed=1)
    (d_s, a_s), (d_t, a_t) = relations(s.numpy()), relations(t.numpy())
    assert rkd_loss(s, t).item() == pytest.approx(25 * huber(d_s, d_t) + 50 * huber(a_s, a_t))


# ------------------------------------------------------------------------------------------------------------ models

HEADS = {"concat": lambda per_clip, L: models.ConcatFusion(3, per_clip),
         "jca": lambda per_clip, L: models.JointCrossAttention(3, L, per_clip),
         "mmt": lambda per_clip, L: models.MultimodalTransformer(3, per_clip)}


def lively(module):
    """Weights at which a random network's outputs differ between inputs, as a trained one's do."""
    torch.manual_seed(0)
    for weight in module.parameters():
        if weight.ndim > 1:
            torch.nn.init.kaiming_normal_(weight)
    return module.eval()


def assert_samples_are_independent(forward, *inputs):
    """Sample 1 alone gives what it gives between others; what others hold does not matter; order only permutes."""
    with torch.no_grad():
        together, alone = forward(*inputs), forward(*(x[1:2] for x in inputs))
        others = [torch.cat([x[2:] // 3, x[1:2], x[:1] // 2]) for x in inputs]
        for a, b, c in zip(together, alone, forward(*others), strict=True):
            torch.testing.assert_close(a[1:2], b, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(a[1], c[1], rtol=1e-4, atol=1e-4)
            assert (a[0] - a[1]).abs().max() > 1e-2


@pytest.mark.parametrize("length, per_clip", [(1, False), (4, False), (4, True)])
@pytest.mark.parametrize("kind", HEADS)
def test_no_head_looks_at_other_samples_and_every_head_uses_both_modalities(kind, length, per_clip):
    torch.manual_seed(0)
    head = HEADS[kind](per_clip, length).eval()
    v, p = (randn(3, length, 512, seed=s, dtype=torch.float32).requires_grad_() for s in (0, 1))
    assert_samples_are_independent(head, v, p)
    output, z = head(v, p)
    assert output.shape == ((3, length, 3) if per_clip else (3, 3)) and z.shape[0] == 3 and z.ndim == 2
    for part in (output, z):
        grads = torch.autograd.grad(part[0].square().sum(), (v, p), retain_graph=True)
        assert all((g[0].abs().sum(-1) > 0).all() and (g[1:] == 0).all() for g in grads)


@pytest.mark.parametrize("make, shape", [
    (models.R3D18, (3, 2, 3, 8, 32, 32)), (models.I3D, (3, 2, 3, 8, 32, 32)),
    (models.SpectrogramResNet18, (3, 2, 1, 67, 40)), (lambda: models.FeatureMLP(6), (3, 2, 6))])
def test_no_backbone_looks_at_other_clips(make, shape):
    backbone = lively(make())
    x = torch.randint(0, 256, shape, dtype=torch.uint8) if shape[2] == 3 else torch.randn(shape)
    assert_samples_are_independent(lambda x: (backbone(x),), x)
    with torch.no_grad():
        whole, clips = backbone(x), backbone(x.flatten(0, 1)[:, None])
        assert whole.shape == (3, 2, 512)
        torch.testing.assert_close(whole.flatten(0, 1), clips[:, 0], rtol=1e-4, atol=1e-4)
        if x.dtype == torch.uint8:
            torch.testing.assert_close(whole, backbone(x.float() / 255), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make, mean, std", [
    (models.R3D18, (0.43216, 0.394666, 0.37645), (0.22803, 0.22145, 0.216989)),  # Kinetics, as torchvision states them
    (models.I3D, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))])  # to [-1, 1]
def test_video_is_standardised_by_channel(make, mean, std):
    backbone, video = make(), torch.randint(0, 256, (2, 2, 3, 4, 5, 5), dtype=torch.uint8)
    backbone.features = lambda clips: clips
    for c in range(3):
        expected = (video[:, :, c].numpy() / 255 - mean[c]) / std[c]
        np.testing.assert_allclose(backbone(video)[:, :, c], expected, atol=1e-5)


def test_a_constant_feature_is_only_centred():
    backbone = models.FeatureMLP(2)
    backbone.standardise(torch.tensor([1.0, 7.0]), torch.tensor([2.0, 0.0]))
    backbone.features = torch.nn.Identity()
    assert backbone(torch.tensor([[[5.0, 7.0]]])).tolist() == [[[2.0, 0.0]]]


@pytest.mark.parametrize("visual, fusion", [("r3d18", "mmt"), ("i3d", "jca")])
def test_student_needs_video_alone_and_no_other_sample(visual, fusion):
    student = lively(models.Student(models.VISUAL[visual](), models.TNet(),
                                    models.HEADS[fusion](2, length=1, per_clip=False)))
    video = torch.randint(0, 256, (3, 1, 3, 8, 32, 32), dtype=torch.uint8)
    assert_samples_are_independent(student, video)
    with torch.no_grad():
        features = student.backbone(video)
        for a, b in zip(student(video), student.head(features, student.tnet(features)), strict=True):
            torch.testing.assert_close(a, b)


def test_jca_equals_its_equations_sample_by_sample():
    torch.manual_seed(0)
    head = models.JointCrossAttention(2, 3).double().eval()
    v, p = randn(2, 3, 512), randn(2, 3, 512, seed=1)
    output, z = head(v, p)
    w = {name: value.detach().numpy() for name, value in head.named_parameters()}
    assert w["Wa"].shape == (32, 3) and w["W_ca"].shape == (32, 1024) and w["W_ha"].shape == (3, 32)
    for b in range(2):
        X = {"a": p[b].numpy(), "v": v[b].numpy()}
        J = np.concatenate([X["a"], X["v"]], 1)  # (L, d)
        att = {}
        for m in "av":
            C = np.tanh(X[m].T @ w[f"W_j{m}"] @ J / math.sqrt(1024))
            H = np.maximum(w[f"W{m}"] @ X[m] + w[f"W_c{m}"] @ C.T, 0)
            att[m] = w[f"W_h{m}"] @ H + X[m]
        x = np.concatenate([att["v"], att["a"]], 1)
        hidden = x @ w["regressor.0.weight"].T + w["regressor.0.bias"]
        expected = hidden @ w["regressor.2.weight"].T + w["regressor.2.bias"]
        np.testing.assert_allclose(output[b].detach(), expected, atol=1e-10)
        np.testing.assert_allclose(z[b].detach(), x.mean(0), atol=1e-10)


@pytest.mark.parametrize("length", [1, 4])
def test_mmt_attention_is_a_value_path_exactly_when_there_is_one_clip(length):
    torch.manual_seed(0)
    head, seen = models.MultimodalTransformer(2).eval(), []
    head.attend_v.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    v = randn(2, length, 512, dtype=torch.float32)
    with torch.no_grad():
        for seed in (1, 2):
            head(v, randn(2, length, 512, seed=seed, dtype=torch.float32))
        value = head.encode_v(v) @ head.attend_v.in_proj_weight[1024:].T + head.attend_v.in_proj_bias[1024:]
        value = head.attend_v.out_proj(value)
    assert torch.allclose(seen[0], seen[1], atol=1e-6) == torch.allclose(seen[0], value, atol=1e-5) == (length == 1)


def public_i3d():
    """A state dict with the names and shapes of the public Inception-I3D checkpoint, values random."""
    mixed = {"3b": (192, 64, 96, 128, 16, 32, 32), "3c": (256, 128, 128, 192, 32, 96, 64),
             "4b": (480, 192, 96, 208, 16, 48, 64), "4c": (512, 160, 112, 224, 24, 64, 64),
             "4d": (512, 128, 128, 256, 24, 64, 64), "4e": (512, 112, 144, 288, 32, 64, 64),
             "4f": (528, 256, 160, 320, 32, 128, 128), "5b": (832, 256, 160, 320, 32, 128, 128),
             "5c": (832, 384, 192, 384, 48, 128, 128)}
    units = [("Conv3d_1a_7x7", 3, 64, 7), ("Conv3d_2b_1x1", 64, 64, 1), ("Conv3d_2c_3x3", 64, 192, 3)]
    for name, (i, b0, b1a, b1b, b2a, b2b, b3b) in mixed.items():
        units += [(f"Mixed_{name}.{unit}", *shape) for unit, *shape in (
            ("b0", i, b0, 1), ("b1a", i, b1a, 1), ("b1b", b1a, b1b, 3), ("b2a", i, b2a, 1), ("b2b", b2a, b2b, 3),
            ("b3b", i, b3b, 1))]
    state = {"logits.conv3d.weight": torch.zeros(400, 1024, 1, 1, 1), "logits.conv3d.bias": torch.zeros(400)}
    for name, i, o, k in units:
        state[f"{name}.conv3d.weight"] = torch.randn(o, i, k, k, k) / math.sqrt(i * k**3)
        for part in ("weight", "bias", "running_mean", "running_var"):
            state[f"{name}.bn.{part}"] = torch.rand(o) + 0.5
        state[f"{name}.bn.num_batches_tracked"] = torch.tensor(7)
    return state


@pytest.mark.parametrize("make", [models.R3D18, models.I3D])
def test_video_under_autocast_gives_nearly_the_same_features(make):
    backbone = make().eval()
    video = torch.randint(256, (2, 2, 3, 8, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        plain = backbone(video)
        with torch.autocast("cpu", torch.bfloat16):
            half = backbone(video).float()
    assert (half - plain).norm() < 0.05 * plain.norm() and not torch.equal(half, plain)


def test_i3d_has_the_public_parameters_and_loads_the_public_file():
    torch.manual_seed(0)
    i3d, state = models.I3D().eval(), public_i3d()
    assert sum(p.numel() for name, p in i3d.named_parameters() if "projection" not in name) == 12_287_264
    left_out, missing = models.load_weights(i3d, state)
    assert left_out == ["logits.conv3d.bias", "logits.conv3d.weight"]
    assert missing == ["projection.bias", "projection.weight"]
    own = i3d.state_dict()
    assert all(torch.equal(own[key], value) for key, value in state.items() if not key.startswith("logits"))
    for bad in ({}, {"fc.weight": torch.zeros(2)}, {"projection.weight": torch.zeros(3, 3)}):
        with pytest.raises(ValueError, match="I3D"):
            models.load_weights(i3d, bad)


@pytest.mark.parametrize("size", [(8, 32, 32), (8, 33, 47), (1, 48, 32)])
def test_i3d_takes_any_size_from_32(size):
    with torch.no_grad():
        assert torch.isfinite(models.I3D().eval()(torch.rand(1, 1, 3, *size))).all()


@pytest.mark.parametrize("kernel, stride", [(7, 2), (3, 1), (3, 2), (2, 2), (1, 2)])
@pytest.mark.parametrize("size", [1, 2, 7, 8, 112])
def test_pad_same_is_tensorflows_definition(size, kernel, stride):
    total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
    padded = models.pad_same(torch.ones(1, 1, size, 1, 1), torch.nn.MaxPool3d((kernel, 1, 1), (stride, 1, 1))).flatten()
    assert padded.tolist() == [0] * (total // 2) + [1] * size + [0] * (total - total // 2)


# ------------------------------------------------------------------------------------------------------------ BioVid

NAME, HEADER = "071309_w_21-BL1-081", "time\tgsr\tecg\temg_trapezius\t emg_corrugator \temg_zygomaticus"


def jpg(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), (value % 256,) * 3).save(path, "JPEG", quality=95)


def grays(clip):
    """The gray value of each frame of (3, F, H, W); the trees below paint frame i in gray i."""
    assert clip.dtype == torch.uint8 and clip.shape[0] == 3 and clip.shape[2] == clip.shape[3]
    return clip.float().mean((0, 2, 3)).round().int().tolist()


def bio_csv(path, rows=2816, first=0, header=HEADER):
    """gsr counts the rows, emg_corrugator counts them down"""
    n = np.arange(first, rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    table = np.column_stack([n / 512 * 1e6, n, 0 * n, 0 * n, -n, 0 * n])
    np.savetxt(path, table, delimiter="\t", fmt="%d", header=header, comments="")


def set_times(root, change):
    path = root / BIO
    table = np.loadtxt(path, delimiter="\t", skiprows=1)
    table[:, 0] = change(table[:, 0])
    np.savetxt(path, table, "%.4f", "\t", header=path.read_text().splitlines()[0], comments="")


def biovid(root, names=(NAME,), frames=range(1, 139), signals="biosignals_filtered", **csv):
    for name in names:
        for i in frames:
            jpg(root / "faces" / name[:11] / name / f"img_{i:05d}.jpg", i)
        if signals:
            bio_csv(root / signals / name[:11] / f"{name}_bio.csv", **csv)
    return root


@pytest.mark.parametrize("dataset, sign", [("biovid_a", 1), ("biovid_b", -1)])
@pytest.mark.parametrize("layout", [
    dict(), dict(rows=2817), dict(first=100), dict(signals="biosignals_raw"), dict(header=HEADER.replace(" ", "")),
    dict(signals="biosignals_filtered/biosignals_filtered"), dict(header="\ufeff" + HEADER)])
def test_biosignal_window_is_cut_by_time_in_every_layout(tmp_path, dataset, sign, layout):
    source = data.open_dataset(dataset, biovid(tmp_path, **layout))
    values = data.read_biosignal(*source.signals[0])
    np.testing.assert_array_equal(values, sign * np.arange(1024, 2560))  # 2.0 s to 5.0 s at 512 Hz
    spectrogram = source.privileged(0)
    assert spectrogram.shape == (1, 67, 127) and spectrogram.dtype == torch.float32


def test_clips_of_a_biovid_sample_share_its_span_and_label(tmp_path):
    source = data.open_dataset("biovid_a", biovid(tmp_path), length=4)
    assert data.clip_spans(4) == [(2, 2.75), (2.75, 3.5), (3.5, 4.25), (4.25, 5)]
    pieces = [data.read_biosignal(*signal) for signal in source.signals]
    np.testing.assert_array_equal(np.concatenate(pieces), np.arange(1024, 2560))
    shown = [grays(source.visual(row)) for row in range(4)]
    for i, frames in enumerate(shown):
        assert all(2 + 0.75 * i <= (f - 1) / 25 < 2.75 + 0.75 * i for f in frames) and len(frames) == 10
    assert data.windows(source.video, 4)[0].tolist() == [[0, 1, 2, 3]] and source.label.tolist() == [0] * 4


@pytest.mark.parametrize("present", [
    range(1, 139), [*range(1, 60), *range(90, 139)], [30, 80, 130], [*range(51, 61), 131]])
def test_ten_equally_spaced_of_the_frames_present_from_2_to_5_s(tmp_path, present):
    source = data.open_dataset("biovid_b", biovid(tmp_path, frames=present), privileged=False, image_size=16)
    within = [i for i in present if 2 <= (i - 1) / 25 < 5]
    expected = [within[round(j * (len(within) - 1) / 9)] for j in range(10)]
    shown = grays(source.visual(0))
    assert np.abs(np.subtract(shown, expected)).max() <= 1 and shown[0] == within[0] and shown[-1] == within[-1]


def test_pain_spectrogram_equals_naive_fourier_sums():
    values = 5 + randn(1536).numpy()  # an offset must survive: no detrending
    ramp = np.array([(1 + math.cos(math.pi * (2 * i / (0.25 * 16) - 1))) / 2 for i in range(2)])
    window = np.concatenate([ramp, np.ones(13), ramp[1:]])  # Tukey 0.25, periodic
    shown = data.pain_spectrogram(values)[0].numpy()
    for column in (0, 50, 126):
        piece = values[12 * column:12 * column + 16] * window
        for row in (0, 1, 33, 66):
            power = abs(sum(x * np.exp(-2j * np.pi * row * n / 132) for n, x in enumerate(piece))) ** 2
            power *= (1 if row in (0, 66) else 2) / (512 * (window**2).sum())
            assert shown[row, column] == pytest.approx(math.log(power + 1e-10), abs=1e-4)


@pytest.mark.parametrize("hertz", [64, 128, 200])
def test_pure_tone_lights_its_bin(hertz):
    shown = data.pain_spectrogram(np.sin(2 * np.pi * hertz * np.arange(1536) / 512))
    assert abs(shown[0].mean(1).argmax().item() - hertz / 512 * 132) <= 1


@pytest.mark.parametrize("classes, expected", [(2, {"BL1": 0, "PA4": 1}),
                                               (5, {"BL1": 0, "PA1": 1, "PA2": 2, "PA3": 3, "PA4": 4})])
def test_biovid_labels_come_from_the_names(tmp_path, classes, expected):
    names = [f"071309_w_21-{level}-{n:03d}" for n, level in enumerate(("PA4", "PA3", "PA2", "PA1", "BL1"))]
    source = data.open_dataset("biovid_b", biovid(tmp_path, names, [81]), classes)
    assert {n.split("-")[1]: y for n, y in zip(source.name, source.label.tolist(), strict=True)} == expected
    assert set(source.group) == {"071309_w_21"} and source.outputs == classes


def test_the_visual_path_never_needs_a_signal(tmp_path):
    source = data.open_dataset("biovid_b", biovid(tmp_path, signals=None), privileged=False)
    assert source.visual(0).shape == (3, 10, 112, 112)
    with pytest.raises(UserError, match="biosignals_filtered"):
        data.open_dataset("biovid_b", tmp_path)


def folds_of(group, split=None):
    source = SimpleNamespace(group=np.array(group), split=split, path="x")
    return [data.parts(source, fold) for fold in range(1, 6)]


@pytest.mark.parametrize("subjects", [5, 19, 87])
def test_folds_never_divide_a_subject_and_test_each_sample_once(subjects):
    group = np.random.default_rng(1).permutation(np.repeat([f"s{i}" for i in range(subjects)], 3))
    folds = folds_of(group)
    for part in folds:
        assert all(len(set(part[group == g])) == 1 for g in group)
        count = {name: len(set(group[part == name])) for name in ("train", "val", "test")}
        assert subjects // 5 <= count["test"] <= -(-subjects // 5)
        assert count["val"] == -(-(subjects - count["test"]) // 8) and count["train"] > 0
    assert (sum((part == "test").astype(int) for part in folds) == 1).all()


def test_a_split_of_the_data_set_is_kept_and_too_few_subjects_are_an_error():
    split = np.array(["train", "test", "train"] * 8)
    group = [f"v{i // 2}{s}" for i, s in enumerate(split)]
    for part in folds_of(group, split):
        assert ((part == "test") == (split == "test")).all()
        assert not set(np.array(group)[part == "val"]) & set(np.array(group)[part == "train"]) and (part == "val").any()
    with pytest.raises(UserError, match="found 4"):
        folds_of(["a", "b", "c", "d"])


def square(kind, path):
    """An 8 x 8 image, left half dark and right half bright, of an awkward kind."""
    gray = np.repeat(np.uint8([[40, 200]]), 8, 0).repeat(4, 1)
    image, more = Image.fromarray(gray).convert("RGB"), {}
    if kind in ("L", "1", "CMYK", "RGBA", "LA"):
        image = image.convert(kind)
    elif kind == "palette":
        image = image.quantize(4)
    elif kind == "clear palette":
        image, more = image.quantize(4), dict(transparency=0)
    elif kind == "16 bits":
        image = Image.fromarray(gray.astype(np.uint16) * 257)
    elif kind == "turned":
        more = dict(exif=(exif := Image.Exif()))
        exif[0x0112] = 6
    elif kind == "animated":
        more = dict(save_all=True, append_images=[Image.new("RGB", (8, 8), "red")])
    elif kind == "progressive":
        more = dict(progressive=True)
    form = "GIF" if kind == "gif" else "JPEG" if path.suffix.lower() in (".jpg", ".jpeg") else "PNG"
    image.save(path, form, **more)
    if kind == "cut":
        write(path, path.read_bytes()[:-40])


@pytest.mark.parametrize("kind, ending, expected", [
    ("plain", "jpg", "halves"), ("plain", "JPG", "halves"), ("plain", "jpeg", "halves"), ("plain", "Png", "halves"),
    ("L", "jpg", "halves"), ("L", "png", "halves"), ("1", "png", "black and white"), ("CMYK", "jpg", "halves"),
    ("palette", "png", "halves"), ("progressive", "jpg", "halves"), ("turned", "jpg", "one above the other"),
    ("animated", "png", "halves"), ("16 bits", "png", "I;16 pixels"), ("RGBA", "png", "RGBA pixels"),
    ("LA", "png", "LA pixels"), ("clear palette", "png", "P pixels"), ("gif", "jpg", "cannot identify"),
    ("cut", "png", "[Tt]runc"), ("cut", "jpg", "[Tt]runc")])
def test_images_are_decoded_as_a_viewer_shows_them_or_refused(tmp_path, kind, ending, expected):
    biovid(tmp_path, frames=[131])
    path = tmp_path / FACES / f"img_00060.{ending}"
    square(kind, path)
    source = data.open_dataset("biovid_b", tmp_path, image_size=8)
    if "pixels" in expected or "runc" in expected or "identify" in expected:
        with pytest.raises(UserError, match=expected) as error:
            source.visual(0)
        return only_line(error, path)
    halves = torch.tensor([40., 200] if expected != "black and white" else [0., 255]).repeat_interleave(4)
    shown = source.visual(0)[:, 0].float()  # (3, 8, 8)
    want = halves.expand(3, 8, 8) if expected != "one above the other" else halves[:, None].expand(3, 8, 8)
    assert (shown - want).abs().max() <= (0 if ending == "Png" or ending == "png" and kind != "1" else 6) or \
        kind == "1" and (shown.mean((0, 1))[:4] < shown.mean((0, 1))[4:]).all()


def test_mac_litter_and_other_files_are_not_looked_at(tmp_path):
    biovid(tmp_path, frames=[51, 81])
    affwild2(tmp_path, frames=40)
    for folder in (tmp_path, tmp_path / "faces", tmp_path / "faces" / NAME[:11], tmp_path / FACES, tmp_path / CROPS,
                   tmp_path / "cropped_aligned", tmp_path / "annotations", (tmp_path / BIO).parent):
        write(folder / ".DS_Store", "x")
        write(folder / "._img_00052.jpg", "x")
        jpg(folder / "__MACOSX" / NAME / "._img_00001.jpg", 1)
    litter = tmp_path / "__MACOSX" / "VA_Set" / "Train_Set"
    for path in (litter / "._one.txt", tmp_path / TEXT.replace("one", "._one"), tmp_path / BIO.replace("/07", "/._07")):
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, "x")
    for dataset in ("biovid_b", "affwild2"):
        source = data.open_dataset(dataset, tmp_path, classes=5, image_size=16)
        assert source.visual(0).shape[2:] == (16, 16) and not source.faults and not source.check()


def cut_to_the_window(root, first=1):
    """Images of 2 to 5 s alone, as the authors' preparation makes them; image `first + i` is gray i + 1."""
    biovid(root, frames=[])
    for i in range(75):
        jpg(root / FACES / f"img_{first + i:05d}.jpg", i + 1)


def test_folders_cut_to_the_window_are_refused_or_read_from_face_start_on(tmp_path):
    cut_to_the_window(tmp_path)
    for read in (lambda: data.open_dataset("biovid_b", tmp_path),
                 lambda: data.Faces(tmp_path / "faces", "biovid_b", 1, 112)):
        with pytest.raises(UserError, match="beyond number 80.*--face-start") as error:
            read()
        only_line(error, "faces")
    expected = [round(1 + j * 74 / 9) for j in range(10)]
    for source in (data.open_dataset("biovid_b", tmp_path, face_start=2.0),
                   data.Faces(tmp_path / "faces", "biovid_b", 1, 112, face_start=2.0)):
        assert np.abs(np.subtract(grays(source.visual(0)), expected)).max() <= 1
    jpg(tmp_path / "faces" / NAME[:11] / (NAME[:-1] + "2") / "img_00090.jpg", 1)  # one whole video is enough
    bio_csv(tmp_path / BIO.replace("081_", "082_"))
    assert len(data.open_dataset("biovid_b", tmp_path).label) == 2


def test_images_numbered_from_0_are_refused_unless_face_start_is_given(tmp_path):
    cut_to_the_window(tmp_path, 0)
    jpg(tmp_path / FACES / "img_00100.jpg", 100)
    with pytest.raises(UserError, match="numbered from 0.*--face-start") as error:
        data.open_dataset("biovid_b", tmp_path).visual(0)
    only_line(error, FACES)
    shown = grays(data.open_dataset("biovid_b", tmp_path, face_start=2.04).visual(0))
    assert shown[0] == 1 and shown[-1] == 75
    affwild2(tmp_path, present=range(0, 99))
    with pytest.raises(UserError, match="numbered from 0") as error:
        data.open_dataset("affwild2", tmp_path)
    only_line(error, CROPS)


BIO = f"biosignals_filtered/{NAME[:11]}/{NAME}_bio.csv"
FACES = f"faces/{NAME[:11]}/{NAME}"
BIO_FAULTS = {  # what to do to a good tree, and the path that the message must begin with
    "no root": (lambda root: shutil.rmtree(root), "faces"),
    "no csv": (lambda root: (root / BIO).unlink(), BIO),
    "no column": (lambda root: bio_csv(root / BIO, header="time\tgsr\tecg\tx\ty\tz"), BIO),
    "text": (lambda root: (root / BIO).write_text(HEADER + "\nsome\ttext\t\t\t\t\n"), BIO),
    "binary": (lambda root: (root / BIO).write_bytes(bytes(range(256))), BIO),
    "short": (lambda root: bio_csv(root / BIO, rows=2000), BIO),
    "256 Hz": (lambda root: set_times(root, lambda t: 2 * t), BIO),
    "1024 Hz": (lambda root: [bio_csv(root / BIO, rows=5632), set_times(root, lambda t: t / 2)], BIO),
    "one repeated": (lambda root: set_times(root, lambda t: np.where(t == t[1300], t[1299], t)), BIO),
    "two exchanged": (lambda root: set_times(root, lambda t: t[[*range(1300), 1301, 1300, *range(1302, len(t))]]), BIO),
    "500 Hz": (lambda root: set_times(root, lambda t: t * 1.024), BIO),
    "seconds": (lambda root: set_times(root, lambda t: t / 1e6), BIO),
    "backwards": (lambda root: set_times(root, lambda t: t[::-1]), BIO),
    "shuffled": (lambda root: set_times(root, np.random.default_rng(0).permutation), BIO),
    "repeated": (lambda root: set_times(root, lambda t: t // 7812 * 7812), BIO),
    "a second missing": (lambda root: set_times(root, lambda t: t + 1e6 * (t > 3e6)), BIO),
    "times of nan": (lambda root: set_times(root, lambda t: t + np.nan), BIO),
    "decimal commas": (lambda root: write(root / BIO, (root / BIO).read_text().replace("\t", ",5\t")), BIO),
    "semicolons": (lambda root: write(root / BIO, (root / BIO).read_text().replace("\t", ";")), BIO),
    "header only": (lambda root: (root / BIO).write_text(HEADER + "\n"), BIO),
    "bad image": (lambda root: (root / FACES / "img_00051.jpg").write_text("no jpg"), f"{FACES}/img_00051.jpg"),
    "no image": (lambda root: [p.unlink() for p in (root / FACES).iterdir()], FACES),
    "odd name": (lambda root: (root / FACES).rename(root / f"faces/{NAME[:11]}/clip7"), f"faces/{NAME[:11]}/clip7")}


def only_line(error, path):
    """A UserError is one line that names the path first."""
    assert "\n" not in str(error.value) and str(error.value).split(": ")[0].endswith(str(path)), str(error.value)


@pytest.mark.filterwarnings("ignore:loadtxt")
@pytest.mark.parametrize("fault", BIO_FAULTS)
def test_each_biovid_fault_is_one_line_naming_the_path(tmp_path, fault):
    biovid(tmp_path, frames=[51, 81])
    spoil, path = BIO_FAULTS[fault]
    spoil(tmp_path)
    with pytest.raises(UserError) as error:
        source = data.open_dataset("biovid_b", tmp_path)
        source.visual(0), source.privileged(0)
    only_line(error, path)


def run_check(dataset, root, monkeypatch, capsys):
    """Exit code and lines of python data.py --check."""
    monkeypatch.setattr(sys, "argv", ["data.py", "--check", dataset, "--root", str(root)])
    try:
        code = data.main() or 0
    except SystemExit as end:
        code = end.code
    return code, capsys.readouterr().out.splitlines()


def test_check_lists_every_biovid_fault_and_exits_with_2(tmp_path):
    names = [f"071309_w_21-{level}-{n:03d}" for n, level in enumerate(("BL1", "PA1", "PA2", "PA3", "PA4", "BL1"))]
    biovid(tmp_path, names, [51, 81, 125])
    faces, bio = tmp_path / "faces" / NAME[:11], tmp_path / "biosignals_filtered" / NAME[:11]
    (bio / f"{names[0]}_bio.csv").unlink()
    (bio / f"{names[1]}_bio.csv").write_text("time\tecg\n")
    (bio / f"{names[2]}_bio.csv").write_text(HEADER + "\na\tb\tc\td\te\tf\n")
    (faces / names[3] / "img_00081.jpg").write_text("no jpg")
    [p.unlink() for p in (faces / names[4]).iterdir()]
    (faces / "clip7").mkdir()
    done = subprocess.run([sys.executable, data.__file__, "--check", "biovid_b", "--root", tmp_path],
                          capture_output=True, text=True)
    _, *faults, last = done.stdout.splitlines()
    wrong = [bio / f"{names[0]}_bio.csv", bio / f"{names[1]}_bio.csv", bio / f"{names[2]}_bio.csv",
             faces / names[3] / "img_00081.jpg", faces / names[4], faces / "clip7"]
    assert done.returncode == 2 and {line.split(": ")[0] for line in faults} == set(map(str, wrong))
    assert "Traceback" not in done.stderr and last == f"{len(faults)} faults"


def test_check_lists_an_unreadable_frame_once(tmp_path, monkeypatch, capsys):
    biovid(tmp_path, frames=[51, 81])
    (tmp_path / FACES / "img_00081.jpg").write_text("no jpg")
    assert run_check("biovid_b", tmp_path, monkeypatch, capsys)[1][-1] == "1 faults"


def test_check_of_a_sound_root_counts_it_and_exits_with_0(tmp_path, monkeypatch, capsys):
    biovid(tmp_path, [NAME, "082109_m_53-PA4-001"], [51, 81])
    assert run_check("biovid_b", tmp_path, monkeypatch, capsys) == (
        0, ["2 subjects, 2 samples, 4 frames, classes BL1 1, PA1 0, PA2 0, PA3 0, PA4 1", "0 faults"])


# ---------------------------------------------------------------------------------------------------------- Affwild2

def affwild2(root, video="one", frames=100, part="Train_Set", layout="annotations/VA_Estimation_Challenge",
             present=None, label=None, rate=4410, sound=None):
    label = np.random.default_rng(frames).uniform(-1, 1, (frames, 2)) if label is None else np.asarray(label)
    for name in ("Train_Set", "Validation_Set"):
        (root / layout / name).mkdir(parents=True, exist_ok=True)
    (root / "audio").mkdir(exist_ok=True)
    np.savetxt(root / layout / part / f"{video}.txt", label, "%.3f", ",", header="valence,arousal", comments="")
    for i in range(1, frames + 1) if present is None else present:
        jpg(root / "cropped_aligned" / video / f"{i:05d}.jpg", i)
    sound = np.zeros(int(frames / 25 * rate), np.int16) if sound is None else sound
    wavfile.write(root / "audio" / f"{video.removesuffix('_left').removesuffix('_right')}.wav", rate, sound)
    return root


@pytest.mark.parametrize("layout", [
    "annotations/VA_Estimation_Challenge", "annotations/VA_Set", "6th ABAW Annotations/VA_Set",
    "annotations/5th ABAW Annotations/VA_Estimation_Challenge", "VA_Estimation_Challenge"])
def test_affwild2_is_found_in_every_layout_and_split_by_folder(tmp_path, layout):
    affwild2(tmp_path, "a", 40, layout=layout)
    affwild2(tmp_path, "b", 32, "Validation_Set", layout=layout)
    source = data.open_dataset("affwild2", tmp_path)
    assert list(zip(source.name, source.split, strict=True)) == [
        ("a/00032", "train"), ("a/00040", "train"), ("b/00032", "test")]


def test_two_editions_of_the_annotations_are_named_and_none_is_taken(tmp_path):
    for edition in ("9th", "10th"):
        affwild2(tmp_path, layout=f"{edition} ABAW Annotations/VA_Set")
    with pytest.raises(UserError, match="9th ABAW.* and .*10th ABAW|10th ABAW.* and .*9th ABAW") as error:
        data.open_dataset("affwild2", tmp_path)
    only_line(error, "annotations")
    shutil.rmtree(tmp_path / "9th ABAW Annotations")
    affwild2(tmp_path)  # in annotations/
    with pytest.raises(UserError, match="10th ABAW"):
        data.open_dataset("affwild2", tmp_path)


def test_crops_are_found_in_each_archives_folders(tmp_path):
    places = {"a": "cropped_aligned", "b": "cropped_aligned/batch1", "c": "cropped_aligned/batch2",
              "d": "cropped_aligned_new_50_vids", "e": "cropped_aligned_new_50_vids/cropped_aligned_new_50_vids"}
    for video, place in places.items():
        affwild2(tmp_path, video, 40)
        if video != "a":
            (tmp_path / place).mkdir(parents=True, exist_ok=True)
            (tmp_path / "cropped_aligned" / video).rename(tmp_path / place / video)
    source = data.open_dataset("affwild2", tmp_path, image_size=16)
    folders = {video: folder for video, (folder, _) in zip(source.video, source.images, strict=True)}
    assert folders == {video: tmp_path / place / video for video, place in places.items()}
    assert [grays(source.visual(row))[-1] for row in range(10)] == [32, 40] * 5 and not source.check()
    jpg(tmp_path / "cropped_aligned" / "e" / "00001.jpg", 1)
    with pytest.raises(UserError, match="same video as") as error:
        data.open_dataset("affwild2", tmp_path)
    only_line(error, "e")


def ends_of(source):
    """The last frame of each clip of Affwild2."""
    return np.array([int(name.rpartition("/")[2]) for name in source.name])


@pytest.mark.parametrize("lines, rate", [
    ("one 25", 25), ("duo 25", 25), ("duo_left 25", 25), ("\ufeffone 25\n", 25), ("one.mp4\t25", 25),
    ("one.AVI 25", 25), ("one 30000/1001", 30000 / 1001), ("one  29.97", 29.97), ("duo_left 25\nduo_right 25", 25),
    ("", 30), ("spare 25", 30),
    ("two 25", None), ("one.txt 25", None), ("one", None), ("one 25 x", None), ("one 30/0", None), ("one inf", None),
    ("one 1e-300", None), ("one 1e400", None), ("one -25", None), ("one 25/", None),
    ("duo_left 25\nduo_right 30", None),
    ("one,25", None), (b"\xff\xfe\x00", None)])
def test_a_line_of_fps_txt_names_a_video_or_is_an_error(tmp_path, lines, rate):
    for video in ("one", "duo_left", "duo_right"):
        affwild2(tmp_path, video, 40)
    jpg(tmp_path / "cropped_aligned" / "spare" / "00001.jpg", 1)  # crops of a video without labels
    write(tmp_path / "fps.txt", lines)
    if rate is None:
        with pytest.raises(UserError, match="fps.txt: expected lines") as error:
            data.open_dataset("affwild2", tmp_path)
        return only_line(error, "fps.txt")
    source = data.open_dataset("affwild2", tmp_path)
    assert {*source.video} == {"one", "duo_left", "duo_right"}
    for video, end, (_, seconds) in zip(source.video, ends_of(source), source.signals, strict=True):
        assert seconds == end / (rate if video[:3] in str(lines) else 30)


@pytest.mark.parametrize("frames, present", [
    (100, range(1, 101)), (64, range(1, 65)), (32, [7]), (150, [*range(1, 20), *range(110, 140)]),
    (130, [*range(1, 33), 129]), (200, [100, 101])])
def test_each_valid_frame_is_predicted_once_by_the_nearest_clip(tmp_path, frames, present):
    label = np.random.default_rng(0).uniform(-1, 1, (frames, 2)).round(3)
    label[3:9, 0], label[5:12, 1], label[-1] = -5, -5, -5
    affwild2(tmp_path, "before", 40)
    affwild2(tmp_path, frames=frames, present=present, label=label)
    source = data.open_dataset("affwild2", tmp_path, image_size=16)
    begins = [b for b in dict.fromkeys([*range(0, frames - 31, 32), frames - 32])  # clips tile, the last aligned
              if any(b < i <= b + 32 for i in present)]  # without any image: dropped
    own, end = source.video == "one", ends_of(source)
    assert (end[own] - 32).tolist() == begins
    expected = np.where((label == -5).any(1)[:, None], np.nan, label)[np.add(begins, 31)]
    np.testing.assert_array_equal(source.label[own], expected.astype("f4"))  # its last frame's
    frame_row = [r for r in source.frame_row.tolist() if own[r]]
    valid = [t for t in range(frames) if -5 not in label[t]]
    assert source.frame_label[own[source.frame_row]].tolist() == label[valid].astype("f4").tolist()
    for t, row in zip(valid, frame_row, strict=True):
        gap = [max(b - t, t - b - 31, 0) for b in begins]
        chosen = begins.index(end[row] - 32)
        assert gap[chosen] == min(gap) and (gap[chosen] > 0 or chosen == gap.index(0))
    for row in np.flatnonzero(own):  # 8 images, every 4th up to the labelled one; a missing one repeats the nearest
        begin, shown = end[row] - 32, grays(source.visual(row))
        inside = [i for i in present if begin < i <= begin + 32]
        for wanted, i in zip(range(begin + 4, begin + 33, 4), shown, strict=True):
            assert i in inside and abs(i - wanted) == min(abs(j - wanted) for j in inside)


def test_left_and_right_share_sound_and_group_and_row_counts_may_be_off_by_two(tmp_path):
    affwild2(tmp_path, "duo_left", 70, present=range(1, 73))  # two images more than rows
    affwild2(tmp_path, "duo_right", 70, present=range(1, 69))  # two rows more than images
    source = data.open_dataset("affwild2", tmp_path)
    assert set(source.group) == {"duo"} and set(source.video) == {"duo_left", "duo_right"} and len(source.label) == 6
    assert {wav for wav, _ in source.signals} == {tmp_path / "audio" / "duo.wav"}
    assert max(name for _, names in source.images for name in names) == "00070.jpg"


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("length", [1, 3, 8])
def test_windows_tile_or_start_everywhere(length, dense):
    sizes = [1, 3, 7, 8, 16, 2]
    video = np.repeat(list("abcdea"), sizes)
    index, keep = data.windows(video, length, dense)
    expected, row = [], 0
    for size in sizes:
        last = max(size - length, 0)
        begins = range(last + 1) if dense else sorted({*range(0, last, length), last})
        expected += [[row + min(b + i, size - 1) for i in range(length)] for b in begins]
        row += size
    assert index.tolist() == expected
    assert dense or sorted(index[keep].tolist()) == list(range(len(video)))  # each row counts once
    repeats = torch.cat([torch.zeros(len(index), 1), (index[:, 1:] == index[:, :-1])], 1).bool()
    assert not keep[repeats].any() and (not dense or keep[~repeats].all())


def rows(video, label, length=1, **more):
    """A source as far as folds, windows and scores look at it; each video is a group."""
    task = "classification" if torch.as_tensor(label).ndim == 1 else "regression"
    return SimpleNamespace(**dict(video=np.array(video), group=np.array(video), label=torch.as_tensor(label), path="x",
                                  split=None, length=length, task=task, outputs=int(max(label)) + 1
                                  if task == "classification" else 2) | more)


def test_labels_of_windows_and_which_have_one():
    label = randn(5, 2).float()
    label[2] = math.nan
    shown = data.label_windows(rows([0] * 5, label, 3), label)
    assert shown.index.tolist() == [[0, 1, 2], [2, 3, 4]]
    assert torch.equal(shown.label[0, :2], label[:2]) and torch.equal(shown.label[1, 1:], label[3:])
    assert shown.label[0, 2].isnan().all() and shown.label[1, 0].isnan().all()
    hidden = data.Windows(shown.index, shown.keep, torch.full_like(shown.label, math.nan))
    assert shown.labelled.tolist() == [True, True] and hidden.labelled.tolist() == [False, False]

    label = torch.tensor([3, 3, -1, -1])
    shown = data.label_windows(rows([0, 0, 1, 1], label, 2), label)
    assert shown.label.tolist() == [3, -1] and shown.labelled.tolist() == [True, False]
    for which in (torch.tensor([False, True]), torch.tensor([1])):
        assert [x.tolist() for x in shown.take(which)] == [[[2, 3]], [[True, True]], [-1]]


def in_part(samples, source):
    return set(source.group[samples.index[samples.keep].numpy()])


@pytest.mark.parametrize("task", ["classes", "frames"])
def test_fold_windows_cut_the_parts_and_keep_training_pairs_without_a_label(task):
    video = np.repeat(np.arange(20), 4)
    label = torch.arange(80) // 4 % 2 if task == "classes" else torch.rand(80, 2)
    part = data.parts(rows(video, label), 2)
    lost = np.flatnonzero(part == "train")[0] // 4
    label[4 * lost:4 * lost + 4] = -1 if task == "classes" else math.nan
    source = rows(video, label, 2 if task == "frames" else 4)
    for dense in (False, True):
        fold = data.fold_windows(source, 2, dense)
        for name, samples in zip(fold._fields, fold, strict=True):
            assert in_part(samples, source) == set(video[part == name])
            index, keep = data.windows(video[part == name], source.length, dense and name == "train")
            place = torch.from_numpy(np.flatnonzero(part == name))
            assert torch.equal(samples.index, place[index]) and torch.equal(samples.keep, keep)
        assert lost in in_part(fold.train, source) and not fold.train.labelled.all() and fold.val.labelled.all()


@pytest.mark.parametrize("name", ["train", "val", "test"])
def test_a_part_without_any_label_is_one_line(name):
    source = rows(np.arange(20), torch.arange(20) % 2)
    source.label[data.parts(source, 1) == name] = -1
    with pytest.raises(UserError, match=f"^x: no sample with a label in the {name} part") as error:
        data.fold_windows(source, 1)
    assert "\n" not in str(error.value)


def test_folds_over_clips_put_a_person_into_train_and_test_and_test_each_clip_once():
    video = np.repeat(np.arange(60), 2)
    source = rows(video, torch.arange(120) // 2 % 2, 2, group=video // 12)  # five people of twelve clips of two rows
    folds = [data.fold_windows(source, fold, folds="clips") for fold in range(1, 6)]
    assert sorted(row for fold in folds for row in fold.test.index.flatten().tolist()) == list(range(120))
    for fold in folds:
        clips = [set(video[samples.index[:, 0]]) for samples in fold]
        assert [len(c) for c in clips] == [42, 6, 12] and len(set.union(*clips)) == 60
        assert in_part(fold.test, source) & in_part(fold.train, source)
        whole = data.fold_windows(source, 1)
        assert not in_part(whole.test, source) & in_part(whole.train, source)
    source.split = np.where(video < 30, "train", "test")
    with pytest.raises(UserError, match="^x: has a split of its own"):
        data.fold_windows(source, 1, folds="clips")


def test_few_labels_are_stratified_nested_and_the_same_for_all_but_the_fold():
    level = np.repeat([0, 1, 2], [140, 50, 10])
    source = rows(np.random.default_rng(0).permutation(200), torch.from_numpy(level), group=np.arange(200) // 2)
    whole = data.fold_windows(source, 1)
    found, before = int(whole.train.labelled.sum()), None
    for n in (3, 20, 60, found):
        fold = data.fold_windows(source, 1, labelled=n)
        kept = fold.train.index[fold.train.labelled, 0]
        assert torch.equal(fold.train.index, whole.train.index) and len(kept) == n
        assert torch.equal(fold.train.label[fold.train.labelled], source.label[kept])
        share = [(source.label[kept] == c).sum().item() for c in range(3)]
        expected = [n * (whole.train.label == c).sum().item() / found for c in range(3)]
        assert min(share) >= 1 and np.abs(np.subtract(share, expected)).max() < 2
        assert before is None or set(before.tolist()) <= set(kept.tolist())
        assert all(torch.equal(a, b) for part in (1, 2) for a, b in zip(fold[part], whole[part], strict=True))
        before = kept
    again = data.fold_windows(source, 1, labelled=20).train.labelled
    assert torch.equal(again, data.fold_windows(source, 1, labelled=20).train.labelled)
    assert source.label.tolist() == level.tolist()
    for n in (2, found + 1):
        with pytest.raises(UserError, match=f"^x: cannot keep {n} training labels; .* 3 .* {found} "):
            data.fold_windows(source, 1, labelled=n)


def test_few_labels_of_frames_leave_those_of_whole_tiles_in_dense_windows_too():
    source = rows(np.repeat(np.arange(10), 10), torch.rand(100, 2), 4)
    tiles = data.fold_windows(source, 1, labelled=3).train
    assert tiles.labelled.sum() == 3
    left = set(tiles.index[tiles.label.isfinite().all(-1)].tolist())
    assert left == set(tiles.index[tiles.labelled][tiles.keep[tiles.labelled]].tolist())
    dense = data.fold_windows(source, 1, dense=True, labelled=3).train
    assert len(dense.index) == 7 * 7 and set(dense.index[dense.label.isfinite().all(-1)].tolist()) == left


def test_scored_compares_each_labelled_frame_with_the_window_that_keeps_its_row():
    label = torch.rand(9, 2)
    label[[2, 7]] = math.nan
    frames = [(row, row + k / 4) for row in range(9) for k in range(4) if (row, k) not in ((3, 1), (8, 0))]
    source = rows([0] * 7 + [1] * 2, label, 3, frame_row=torch.tensor([row for row, _ in frames]),
                  frame_label=torch.tensor([[t, -t] for _, t in frames]))
    samples = data.label_windows(source, label).take([0, 2, 3])  # without rows 3 to 5
    output = torch.arange(18.).view(3, 3, 2)
    expected = []
    for row, t in frames:
        for s in range(3):
            for place in range(3):
                if samples.keep[s, place] and samples.index[s, place] == row:
                    expected.append([*output[s, place].tolist(), t, -t, row])
    shown = data.scored(source, samples, output)
    assert torch.cat([shown.prediction, shown.label, shown.row[:, None]], 1).tolist() == expected
    assert len(expected) == 23 and shown.prediction.dtype == shown.label.dtype == torch.float64
    assert data.scored(source, samples, output * math.nan).prediction.isnan().all()  # never left out in silence


def test_scored_leaves_out_samples_without_a_class():
    source = rows([0, 0, 1, 1, 2, 2], torch.tensor([1, 1, -1, -1, 0, 0]), 2)
    shown = data.scored(source, data.label_windows(source, source.label), torch.arange(6.).view(3, 2))
    assert [x.tolist() for x in shown] == [[[0, 1], [4, 5]], [1, 0], [0, 4]]


@pytest.mark.parametrize("rate", [44100, 48000])
@pytest.mark.parametrize("fps", [30, 25])
def test_a_click_at_a_frame_lights_its_column_of_its_clip(tmp_path, fps, rate):
    frame, frames = 75, 100
    sound = np.zeros(frames * rate // fps, np.int16)
    at = (frame - 0.5) / fps  # in the middle of what image 75 shows
    sound[round(at * rate):round(at * rate) + 4] = 30000
    affwild2(tmp_path, frames=frames, sound=sound, rate=rate)
    (tmp_path / "fps.txt").write_text(f"one {fps}\n\n")
    source = data.open_dataset("affwild2", tmp_path)
    loud = [source.privileged(row)[0].max(0).values for row in range(4)]
    assert [(x.max() > -20).item() for x in loud] == [e - 32 < frame <= e for e in ends_of(source)]
    begin = ends_of(source)[2] - 32
    assert begin == 64 and abs(loud[2].argmax().item() - 100 * (at - ((begin + 32) / fps - 47040 / 44100))) <= 1


def test_sound_ends_with_the_clip_and_is_zero_outside_the_file(tmp_path):
    x = np.random.default_rng(0).uniform(-0.9, 0.9, 60000).astype(np.float32)
    wavfile.write(tmp_path / "a.wav", 44100, x)
    padded = np.concatenate([np.zeros(47040), x, np.zeros(47040)])
    for stop in (1000, 30000, 50000, 61000, 106000):
        sound = data.read_sound(tmp_path / "a.wav", stop / 44100)
        np.testing.assert_allclose(sound, padded[stop:stop + 47040], atol=1e-7)


def test_sample_formats_channels_and_rates_give_the_same_sound(tmp_path):
    def tone(rate):
        t = np.arange(2 * rate) / rate
        return 0.4 * np.sin(2 * np.pi * 440 * t) + 0.2 * np.sin(2 * np.pi * 3000 * t + 1)

    def read(rate, samples):
        wavfile.write(tmp_path / "a.wav", rate, samples)
        sound = data.read_sound(tmp_path / "a.wav", 1.5)
        assert sound.shape == (47040,) and sound.dtype == np.float32
        return sound

    expected, x = tone(44100)[66150 - 47040:66150], tone(44100)
    for samples in (x.astype(np.float32), x, (x * 2**15).astype(np.int16), (x * 2**31).astype(np.int32),
                    np.stack([1.5 * x, 0.5 * x], 1).astype(np.float32)):
        np.testing.assert_allclose(read(44100, samples), expected, atol=1e-4)
    for rate in (48000, 22050, 16000):  # resampled: its filter is unsure of the ends
        np.testing.assert_allclose(read(rate, tone(rate))[500:-500], expected[500:-500], atol=0.01)


def htk_corners():
    """64 + 2 points evenly spaced in mel from 0 to 22,050 Hz, in Hz."""
    top = 2595 * math.log10(1 + 22050 / 700)
    return [700 * (10 ** (i * top / 65 / 2595) - 1) for i in range(66)]


def naive_log_mel(sound):
    corners, hann = htk_corners(), 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(882) / 882)
    filters = np.zeros((64, 513))
    for m, (left, centre, right) in enumerate(zip(corners, corners[1:], corners[2:], strict=False)):
        for n in range(513):
            f = n * 44100 / 1024
            filters[m, n] = max(0, min((f - left) / (centre - left), (right - f) / (right - centre)))
    padded = np.pad(sound, 512)
    frames = np.stack([padded[441 * c + 71:441 * c + 953] * hann for c in range(107)])  # 20 ms about 10 ms * c
    power = np.abs(np.fft.rfft(np.pad(frames, ((0, 0), (71, 71))))) ** 2
    db = 10 * np.log10(np.maximum(filters @ power.T, 1e-10))
    return np.maximum(db, db.max() - 80), filters


def test_log_mel_equals_its_definition():
    sound = 0.1 * randn(47040).numpy()
    sound[20000:30000] *= 1e-6  # below the floor
    expected, filters = naive_log_mel(sound)
    shown = data.log_mel(sound.astype(np.float32))
    assert shown.shape == (1, 64, 107) and shown.dtype == torch.float32
    np.testing.assert_allclose(shown[0], expected, atol=2e-2)
    assert shown.min().item() == pytest.approx(shown.max().item() - 80, abs=1e-3)
    np.testing.assert_allclose(data.mel_filters(), filters, atol=1e-5)
    assert torch.isfinite(data.log_mel(np.zeros(47040, np.float32))).all()


@pytest.mark.parametrize("mel", [12, 30, 55])
def test_pure_tone_lights_its_mel_band(mel):
    sound = np.sin(2 * np.pi * htk_corners()[mel + 1] * np.arange(47040) / 44100).astype(np.float32)
    assert data.log_mel(sound)[0].mean(1).argmax().item() == mel


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def set_wav(root, samples, rate=4410):
    wavfile.write(root / WAV, rate, samples)


def wav_bytes(chunk=b"data", size=None, align=2, channels=1, rate=4410, sound=bytes(40000)):
    """A wav whose header says what one of a broken programme would."""
    head = struct.pack("<4sI4s4sIHHIIHH", b"RIFF", 36 + len(sound), b"WAVE", b"fmt ", 16, 1, channels, rate,
                       rate * align % 2**32, align, 16)
    return head + struct.pack("<4sI", chunk, len(sound) if size is None else size) + sound


def test_the_line_about_a_wav_says_how_to_make_one_of_a_silent_video(tmp_path):
    affwild2(tmp_path)
    (tmp_path / WAV).unlink()
    with pytest.raises(UserError, match="anullsrc") as error:
        data.open_dataset("affwild2", tmp_path)
    only_line(error, WAV)


TEXT, CROPS, WAV = "annotations/VA_Estimation_Challenge/Train_Set/one.txt", "cropped_aligned/one", "audio/one.wav"
AFF_FAULTS = {  # what to do to a good tree, and the path that the message must begin with
    "no annotations": (lambda root: shutil.rmtree(root / "annotations"), "annotations"),
    "no crops at all": (lambda root: shutil.rmtree(root / "cropped_aligned"), "cropped_aligned"),
    "annotation without video": (lambda root: shutil.rmtree(root / CROPS), CROPS),
    "no image": (lambda root: [p.unlink() for p in (root / CROPS).iterdir()], CROPS),
    "no wav": (lambda root: (root / WAV).unlink(), WAV),
    "empty file": (lambda root: write(root / WAV, b""), WAV),
    "wav without samples": (lambda root: set_wav(root, np.zeros(0, np.int16)), WAV),
    "wav cut in its header": (lambda root: write(root / WAV, (root / WAV).read_bytes()[:30]), WAV),
    "short wav": (lambda root: set_wav(root, np.zeros(4410, np.int16)), WAV),
    "wav without its data": (lambda root: write(root / WAV, wav_bytes(chunk=b"LIST")), WAV),
    "wav of no size": (lambda root: write(root / WAV, wav_bytes(size=0)), WAV),
    "piped wav": (lambda root: write(root / WAV, wav_bytes(size=2**32 - 1)), WAV),
    "block align 0": (lambda root: write(root / WAV, wav_bytes(align=0)), WAV),
    "no channels": (lambda root: write(root / WAV, wav_bytes(channels=0)), WAV),
    "0 Hz": (lambda root: write(root / WAV, wav_bytes(rate=0)), WAV),
    "4 GHz": (lambda root: write(root / WAV, wav_bytes(rate=2**32 - 1)), WAV),
    "wav is a folder": (lambda root: [(root / WAV).unlink(), (root / WAV).mkdir()], WAV),
    "in both sets": (lambda root: affwild2(root, part="Validation_Set"), TEXT.replace("Train", "Validation")),
    "images past the rows alone": (lambda root: [[p.unlink() for p in (root / CROPS).iterdir()],
                                                 jpg(root / CROPS / "00101.jpg", 1)], CROPS),
    "8-bit wav": (lambda root: set_wav(root, np.zeros(44100, np.uint8)), WAV),
    "short video": (lambda root: affwild2(root, frames=31, present=range(1, 34)) and [
        (root / CROPS / f"{i:05d}.jpg").unlink() for i in range(34, 101)], CROPS),
    "other video": (lambda root: affwild2(root, frames=50, present=range(1, 80)), CROPS),
    "text": (lambda root: write(root / TEXT, "valence,arousal\nhigh,low\n"), TEXT),
    "header": (lambda root: write(root / TEXT, "0.1,0.2\n" * 90), TEXT),
    "range": (lambda root: affwild2(root, label=np.full((100, 2), 1.5)), TEXT),
    "nan": (lambda root: affwild2(root, label=np.full((100, 2), np.nan)), TEXT),
    "three columns": (lambda root: affwild2(root, label=np.zeros((100, 3))), TEXT),
    "binary": (lambda root: write(root / TEXT, bytes(range(256))), TEXT),
    "bad image": (lambda root: write(root / CROPS / "00032.jpg", "no jpg"), f"{CROPS}/00032.jpg"),
    "fps": (lambda root: write(root / "fps.txt", "one thirty\n"), "fps.txt"),
    "fps of zero": (lambda root: write(root / "fps.txt", "one 0\n"), "fps.txt"),
    "fps of nan": (lambda root: write(root / "fps.txt", "one nan\n"), "fps.txt"),
    "sound of nan": (lambda root: set_wav(root, np.full(44100, np.nan, np.float32)), WAV)}


@pytest.mark.parametrize("fault", AFF_FAULTS)
def test_each_affwild2_fault_is_one_line_naming_the_path(tmp_path, fault):
    spoil, path = AFF_FAULTS[fault]
    spoil(affwild2(tmp_path))
    with pytest.raises(UserError) as error:
        source = data.open_dataset("affwild2", tmp_path)
        source.visual(0), source.privileged(0)
    only_line(error, path)


def test_check_lists_every_affwild2_fault_and_strays_do_not_stop_loading(tmp_path, monkeypatch, capsys):
    affwild2(tmp_path, "good", 40)
    jpg(tmp_path / "cropped_aligned" / "stray" / "00001.jpg", 1)
    assert len(data.open_dataset("affwild2", tmp_path).label) == 2
    for video in ("crops", "sound", "empty", "short", "text", "image"):
        affwild2(tmp_path, video, 40)
    (tmp_path / "cropped_aligned/crops").rename(tmp_path / "x")
    (tmp_path / "audio/sound.wav").unlink()
    write(tmp_path / "audio/empty.wav", b"")
    affwild2(tmp_path, "short", 20)
    texts = tmp_path / "annotations/VA_Estimation_Challenge/Train_Set"
    write(texts / "text.txt", "valence,arousal\nx,y\n")
    write(tmp_path / "cropped_aligned/image/00001.jpg", "no jpg")
    code, lines = run_check("affwild2", tmp_path, monkeypatch, capsys)
    wrong = [tmp_path / "cropped_aligned" / c for c in ("stray", "crops", "image/00001.jpg")]
    wrong += [tmp_path / "audio/sound.wav", tmp_path / "audio/empty.wav", texts / "text.txt"]
    wrong += [tmp_path / "cropped_aligned/short"]
    assert code == 2 and sorted(line.split(": ")[0] for line in lines[1:-1]) == sorted(map(str, wrong))
    assert lines[-1] == "7 faults"
    with pytest.raises(UserError, match=r"4 more: python data.py --check affwild2 --root"):
        data.open_dataset("affwild2", tmp_path)


def test_scores_are_over_valid_frames_each_predicted_by_its_clip(tmp_path):
    label = np.random.default_rng(0).uniform(-1, 1, (300, 2)).round(3)
    label[:64], label[100:110, 1] = -5, -5  # the first two clips have no valid frame
    source = data.open_dataset("affwild2", affwild2(tmp_path, frames=300, label=label), length=3)
    windows = data.label_windows(source, source.label)
    index, keep, _ = windows
    output = randn(*index.shape, 2)
    result = score(source, windows, output)
    predicted, true = [], []
    for t in [t for t in range(300) if -5 not in label[t]]:
        row = min(t // 32, 9)  # 9 whole clips, the tenth aligned to the end
        window = [s for s in range(len(index)) if row in index[s][keep[s]].tolist()]
        assert len(window) == 1
        predicted.append(output[window[0], index[window[0]].tolist().index(row)].numpy())
        true.append(label[t])
    for i, name in enumerate(("valence", "arousal")):
        p, q = np.array(predicted)[:, i], np.array(true)[:, i]
        expected = 2 * np.cov(p, q, bias=True)[0, 1] / (p.var() + q.var() + (p.mean() - q.mean()) ** 2)
        assert result[name] == pytest.approx(expected, rel=1e-5)
    assert result["n"] == len(true)
    changed = output.clone()
    changed[~keep], changed[0, :2] = 99, -99
    assert score(source, windows, changed) == result


def test_the_table_of_videos_scores_each_by_itself(tmp_path):
    rng = np.random.default_rng(1)
    labels = {"one": rng.uniform(-1, 1, (96, 2)).round(3), "two": rng.uniform(-1, 1, (64, 2)).round(3)}
    labels["two"][:40] = -5
    for video, label in labels.items():
        affwild2(tmp_path, video, len(label), label=label)
    source = data.open_dataset("affwild2", tmp_path, length=1)
    output = randn(5, 1, 2)  # three clips of video one, two of video two
    train_teacher.log_videos(tmp_path, "student", source, data.label_windows(source, source.label), output)
    shown, = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    assert shown["test_videos_of"] == "student" and sorted(shown["videos"]) == ["one", "two"]
    shown = shown["videos"]
    predicted = {"one": np.repeat(output[:3, 0].numpy(), 32, 0), "two": np.repeat(output[3:, 0].numpy(), 32, 0)}
    for video, label in labels.items():
        p, y = predicted[video][label[:, 0] != -5, 1], label[label[:, 0] != -5, 1]
        expected = 2 * np.cov(p, y, bias=True)[0, 1] / (p.var() + y.var() + (p.mean() - y.mean()) ** 2)
        assert shown[video]["arousal"] == pytest.approx(expected, rel=1e-5) and shown[video]["n"] == len(y)


def test_a_perfect_predictor_scores_1(tmp_path):
    label = np.repeat(np.random.default_rng(0).uniform(-1, 1, (4, 2)), 32, axis=0)
    source = data.open_dataset("affwild2", affwild2(tmp_path, frames=128, label=label))
    windows = data.label_windows(source, source.label)
    result = score(source, windows, source.label[windows.index])
    assert result["valence"] == pytest.approx(1) and result["arousal"] == pytest.approx(1) and result["n"] == 128


def test_accuracy_is_the_share_of_right_samples():
    source = SimpleNamespace(task="classification")
    output = torch.tensor([[5., 1, 1], [0, 0, 2], [9, 3, 1], [0, 4, 1], [7, 0, 0]])
    label = torch.tensor([0, 2, 1, 1, -1])  # the last has none, and does not count
    windows = data.Windows(torch.arange(10).view(5, 2), torch.ones(5, 2, dtype=torch.bool), label)
    assert score(source, windows, output) == {"accuracy": 75.0, "n": 4}


# ----------------------------------------------------------------------------------------- features, faces, stand-in

def arrays(n=6, length=2, **changes):
    rng = np.random.default_rng(0)
    good = dict(visual=rng.normal(size=(n, length, 3)).astype(np.float32), privileged=rng.normal(size=(n, length, 4)),
                label=np.arange(n) % 3, group=np.arange(n) // 2, name=np.array([f"n{i}" for i in range(n)]))
    return {key: value for key, value in (good | changes).items() if value is not None}


@pytest.mark.parametrize("label, task, outputs", [
    (np.array([0, 1, 2, 0, 1, 2]), "classification", 3), (np.zeros((6, 2), np.float32), "regression", 2),
    (np.linspace(-1, 1, 24).reshape(6, 2, 2), "regression", 2)])
def test_features_file_round_trip(tmp_path, label, task, outputs):
    content = arrays(label=label, split=np.array(["train", "train", "test", "test", "train", "train"]))
    data.save_features(tmp_path / "f.npz", content)
    source = data.open_dataset("features", tmp_path / "f.npz")
    assert (source.task, source.outputs, source.length) == (task, outputs, 2) and not list(tmp_path.glob("*.tmp*"))
    for sample, clip in itertools.product(range(6), range(2)):
        row = 2 * sample + clip
        np.testing.assert_array_equal(source.visual(row), content["visual"][sample, clip])
        np.testing.assert_allclose(source.privileged(row), content["privileged"][sample, clip], rtol=1e-6)
        expected = label[sample, clip] if label.ndim == 3 else label[sample]
        np.testing.assert_allclose(source.label[row], expected, rtol=1e-6)
        assert source.group[row] == sample // 2 and source.name[row] == f"n{sample}"
        assert source.split[row] == ("train", "test", "train")[sample // 2] and source.video[row] == sample


def test_features_leave_invalid_labels_out_of_the_frames(tmp_path):
    label = np.zeros((6, 2, 2), np.float32)
    label[1, 0, 1], label[4], label[5] = -5, -5, -3  # -3 is a value like any other
    data.save_features(tmp_path / "f.npz", arrays(label=label))
    source = data.Features(tmp_path / "f.npz")
    assert source.frame_row.tolist() == [0, 1, 3, 4, 5, 6, 7, 10, 11]
    assert source.frame_label.tolist() == 7 * [[0, 0]] + 2 * [[-3, -3]]
    assert source.label.isnan().any(1).nonzero()[:, 0].tolist() == [2, 8, 9]
    data.save_features(tmp_path / "f.npz", arrays(label=source.label.view(6, 2, 2).numpy()))
    assert np.array_equal(np.load(tmp_path / "f.npz")["label"].min((1, 2)) == -5, np.arange(6) % 3 == 1)
    assert torch.equal(data.Features(tmp_path / "f.npz").label.isnan(), source.label.isnan().any(1, True).expand(-1, 2))


def test_features_of_pairs_without_a_class_and_windows_longer_than_the_files(tmp_path):
    data.save_features(tmp_path / "f.npz", arrays(label=np.array([0, -1, 1, 1, -1, 2])))
    source = data.Features(tmp_path / "f.npz")
    assert source.outputs == 3 and source.label.tolist() == [0, 0, -1, -1, 1, 1, 1, 1, -1, -1, 2, 2]
    data.save_features(tmp_path / "f.npz", arrays(length=1, label=np.zeros((6, 2)), video=np.repeat([0, 1], 3)))
    source = data.Features(tmp_path / "f.npz", length=2)
    shown = data.label_windows(source, source.label)
    assert source.length == 2 and shown.index.tolist() == [[0, 1], [1, 2], [3, 4], [4, 5]]


def test_features_without_privileged_serve_the_visual_path(tmp_path):
    data.save_features(tmp_path / "f.npz", arrays(privileged=None))
    assert data.open_dataset("features", tmp_path / "f.npz", privileged=False).visual(0).shape == (3,)


@pytest.mark.parametrize("kind", [">f4", ">f8", np.float16, np.longdouble, "<f8"])
def test_features_of_any_float_kind_are_read(tmp_path, kind):
    visual = np.arange(36).reshape(6, 2, 3) / 4
    np.savez(tmp_path / "f.npz", **arrays(visual=visual.astype(kind), label=(visual[..., :2] / 9 - 1).astype(kind),
                                          group=np.arange(6).astype(">i8")))
    source = data.Features(tmp_path / "f.npz")
    assert torch.equal(source.rows["visual"].view(6, 2, 3), torch.from_numpy(visual).float())
    assert (source.label.view(6, 2, 2) - torch.from_numpy(visual[..., :2] / 9 - 1)).abs().max() < 1e-3
    assert set(data.parts(source, 1)) == {"train", "val", "test"}


@pytest.mark.parametrize("key", ["group", "name", "split"])
@pytest.mark.parametrize("change", [
    lambda x: x.astype("S"), lambda x: x == "train", lambda x: np.arange(6.), lambda x: x.astype(object),
    lambda x: np.arange(6) + 0j, lambda x: x[:, None]])
def test_arrays_of_names_of_another_kind_are_named_with_the_call_that_mends_them(tmp_path, key, change):
    names = np.array(["train", "test"] * 3)
    np.savez(tmp_path / "f.npz", **arrays(group=None, **{key: change(names)}) if key != "group" else arrays(
        group=change(names)))
    with pytest.raises(UserError, match=rf"'?{key}'? is .*\.astype\(str\)") as error:
        data.Features(tmp_path / "f.npz")
    only_line(error, "f.npz")


def test_a_video_array_may_join_samples_of_one_clip_alone(tmp_path):
    video = np.repeat([0, 1], 3)
    data.save_features(tmp_path / "f.npz", arrays(length=1, video=video))
    assert data.Features(tmp_path / "f.npz").video.tolist() == video.tolist()
    data.save_features(tmp_path / "f.npz", arrays(video=video))
    with pytest.raises(UserError, match="video joins samples of 2 clips") as error:
        data.Features(tmp_path / "f.npz")
    only_line(error, "f.npz")


NAN = np.full((6, 2, 3), np.nan, np.float32)


@pytest.mark.parametrize("changes, names", [
    (dict(visual=NAN), "visual holds NaN"), (dict(privileged=NAN), "privileged holds NaN"),
    (dict(visual=None), "'visual'"), (dict(privileged=None), "'privileged'"), (dict(label=None), "'label'"),
    (dict(visual=np.zeros((6, 3))), r"visual is float64 \(6, 3\)"),
    (dict(visual=np.zeros((6, 2, 3), int)), "visual is int64"),
    (dict(privileged=np.zeros((5, 2, 3))), r"privileged is float64 \(5, 2, 3\)"), (dict(label=NAN[..., :2]), "label holds NaN"),
    (dict(label=np.zeros(5, int)), r"label is int64 \(5,\)"), (dict(label=np.zeros(6, int)), r"are \[0\]"),
    (dict(label=np.arange(6) - 2), r"are \[-2, 0"), (dict(label=np.arange(6) * 2), r"are \[0, 2, 4"),
    (dict(label=np.full(6, -1)), r"are \[\]"), (dict(label=np.arange(6) * 2**60), r"are \[0, 11"),
    (dict(label=np.zeros((6, 3))), r"\(6, 3\)"), (dict(label=np.full((6, 2), -2)), r"label is int64 \(6, 2\)"),
    (dict(label=np.array(["a"] * 6)), "<U1"), (dict(group=np.arange(5)), r"group is int64 \(5,\)"),
    (dict(name=np.array(["a"] * 6)), "same one twice"),
    (dict(split=np.array(["train", "dev"] * 3)), "dev"), (dict(split=np.arange(6)), "split holds"),
    (dict(split=np.array(["train", "test"] * 3)), "group 0 is in both splits"),
    (dict(visual=np.full((6, 2, 3), 1e39)), "NaN"),
    (dict(label=np.eye(2)[[0, 1, 1, 0, 1, 0]]), "argmax"),
    (dict(name=np.array([{}] * 6)), "'name' .*Python objects.*astype")])
def test_features_that_do_not_fit_are_one_line(tmp_path, changes, names):
    np.savez(tmp_path / "f.npz", **arrays(**changes))
    with pytest.raises(UserError, match=names) as error:
        data.Features(tmp_path / "f.npz")
    only_line(error, "f.npz")


@pytest.mark.parametrize("content", [b"", b"some text", "missing", "npy"])
def test_files_that_are_no_npz_are_one_line(tmp_path, content):
    path = tmp_path / "f.npz"
    if content == "npy":
        np.save(tmp_path / "f.npy", np.zeros((3, 2, 2)))
        (tmp_path / "f.npy").rename(path)
    elif content != "missing":
        path.write_bytes(content)
    with pytest.raises(UserError) as error:
        data.Features(path)
    only_line(error, "f.npz")


def test_replacing_leaves_the_whole_file_or_the_old_one(tmp_path):
    path = tmp_path / "a.npz"
    for content in ("old", "new"):
        with data.replacing(path) as part:
            write(part, content)
            assert part.parent == tmp_path and part.suffix == ".npz" and (content == "old") != path.exists()
    for failure in (ValueError, KeyboardInterrupt):
        with pytest.raises(failure), data.replacing(path) as part:
            write(part, "half")
            raise failure
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_faces_of_a_folder_or_of_folders_need_no_label(tmp_path):
    for name in ("p1", "p2"):
        for i in (51, 125):
            jpg(tmp_path / "pain" / name / f"img_{i:05d}.jpg", i)
    for i in (1, 40):
        jpg(tmp_path / "affect" / "v" / f"{i:05d}.jpg", i)
    pain, affect = ("biovid_b", 1, 24), ("affwild2", 8, 24)
    faces = data.Faces(tmp_path / "pain", *pain)
    assert [n.split("/")[0] for n in faces.name] == faces.video.tolist() == ["p1", "p2"]
    assert faces.visual(1).shape == (3, 10, 24, 24) and set(grays(faces.visual(0))) == {51, 125}
    assert len(data.Faces(tmp_path / "pain" / "p1", *pain).name) == 1
    faces = data.Faces(tmp_path / "affect", *affect)
    assert faces.name.tolist() == ["v/00032", "v/00040"]
    assert [grays(faces.visual(i)) for i in (0, 1)] == [[1] * 8, [40] * 8]
    (tmp_path / "none").mkdir()
    for folder, settings in (("none", pain), ("missing", pain), ("pain/p1", affect)):
        with pytest.raises(UserError) as error:
            data.Faces(tmp_path / folder, *settings)
        only_line(error, folder)


def test_every_folder_with_images_is_predicted_or_named(tmp_path, monkeypatch):
    top, other = tmp_path / "top", tmp_path / "other"
    for folder, ending in ((top, "jpg"), (top / "a", "JPG"), (top / "b" / "deep", "png"), (other, "jpeg")):
        for i in range(1, 41):
            jpg(folder / f"{i:05d}.{ending}", i)
    (top / "link").symlink_to(other)
    (top / "b" / "loop").symlink_to(top)
    jpg(top / "short" / "00009.jpg", 1)
    jpg(top / "named" / "face.jpg", 1)
    jpg(top / "kind" / "00040.bmp", 1)
    jpg(top / "from 0" / "00000.jpg", 1)
    jpg(top / "__MACOSX" / "a" / "00040.jpg", 1)
    write(top / "b" / "notes.txt", "no image")
    monkeypatch.chdir(top)
    for folder in (top, Path(".")):
        faces = data.Faces(folder, "affwild2", 8, 16)
        assert list(dict.fromkeys(faces.video)) == ["top", "a", "b/deep", "link"]
        assert faces.name[:2].tolist() == ["top/00032", "top/00040"]
        assert grays(faces.visual(7)) == [12, 16, 20, 24, 28, 32, 36, 40]
        named = [line.split(": ")[0] for line in faces.faults]
        assert named == [str(folder / name) for name in ("from 0", "kind", "named", "short")]
        assert not any("\n" in line for line in faces.faults)
    for name in ("kind", "short", "b/loop/kind"):
        with pytest.raises(UserError) as error:
            data.Faces(top / name, "affwild2", 8, 16)
        only_line(error, name)


def ends(main, capsys):
    """Exit code and stderr of data.run(main)."""
    with pytest.raises(SystemExit) as end:
        data.run(main)
    return end.value.code, capsys.readouterr().err


class Broken(SimpleNamespace):
    """A source of one row, whose reading ends in `act`."""

    def visual(self, row):
        self.act()


def from_worker(act):
    args = SimpleNamespace(workers=1, device=torch.device("cpu"))
    batches = iter(train_teacher.clip_loader(Broken(act=act), "visual", torch.zeros(1, 1), torch.zeros(1, 1).long(), args))
    try:
        next(batches)
    finally:
        batches._shutdown_workers()  # now, not when the exception is collected


def test_a_worker_reads_clips_into_shared_memory(monkeypatch):
    """A full one is then an error of the worker's; in the thread that hands a batch on it would be a hang."""
    for worker in (False, True):
        monkeypatch.setattr(torch.utils.data, "get_worker_info", lambda worker=worker: worker or None)
        clips = data.read_windows(lambda row: torch.full((3,), row), [[1, 2], [5, 0]])
        assert clips[..., 2].tolist() == [[1, 2], [5, 0]] and clips.shape == (2, 2, 3) and clips.is_shared() == worker


def refuse(error):
    raise error


@pytest.mark.parametrize("worker", [False, True])
@pytest.mark.parametrize("act, message", [
    (lambda tmp: refuse(UserError("a.npz: is damaged (SomeError: 3); mend it")),
     r"a.npz: is damaged \(SomeError: 3\); mend it"),
    (lambda tmp: open(tmp / "none" / "a"), r"\[Errno 2\].*{tmp}/none/a.*; check the path, or give another"),
    (lambda tmp: os.makedirs(tmp / "file" / "runs"), r"\[Errno 20\].*{tmp}/file/runs.*; check the path, or give another"),
    (lambda tmp: refuse(OSError(28, "No space left on device")), r"\[Errno 28\] No space left on device; .*"),
    (lambda tmp: refuse(RuntimeError("unable to write to file </torch_1_2_3>: No space left on device (28)")),
     ".*--workers 0.*--shm-size.*")])
def test_what_a_user_or_the_system_spoils_is_one_line_also_out_of_a_worker(tmp_path, capsys, worker, act, message):
    write(tmp_path / "file", "")
    code, shown = ends(lambda: from_worker(lambda: act(tmp_path)) if worker else act(tmp_path), capsys)
    assert code == 2 and re.fullmatch(f"error: {message}\n".replace("{tmp}", str(tmp_path)), shown)


def test_a_killed_worker_and_an_interrupt_are_one_line_and_a_fault_of_the_programme_is_not(
        tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # for its core file, where the system writes one
    code, shown = ends(lambda: from_worker(lambda: os.kill(os.getpid(), signal.SIGBUS)), capsys)
    assert code == 2 and re.fullmatch("error: .*--workers 0.*--shm-size.*\n", shown)
    code, shown = ends(lambda: refuse(KeyboardInterrupt()), capsys)
    assert code == 130 and re.fullmatch("interrupted; .*\n", shown)
    with pytest.raises(RuntimeError, match="shapes differ"):
        data.run(lambda: refuse(RuntimeError("shapes differ")))


@pytest.mark.parametrize("lines", [1, 100000])  # in the buffer until the end, and not
@pytest.mark.parametrize("closed", ["Broken pipe", "No space"])
def test_output_that_cannot_be_written_is_one_line(closed, lines):
    read, pipe = os.pipe()
    os.close(read)
    with open(pipe if closed == "Broken pipe" else "/dev/full", "w") as stdout:
        done = subprocess.run([sys.executable, "-c", f"import data; data.run(lambda: print('x\\n' * {lines}))"],
                              env=os.environ | {"PYTHONUNBUFFERED": ""}, cwd=Path(data.__file__).parent,
                              stdout=stdout, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and re.fullmatch(f"error: .*{closed}.*\n", done.stderr)


@pytest.mark.parametrize("name, writer", [
    ("a.npz", lambda path: data.save_features(path, dict(label=np.zeros(10**5)))),
    ("a.pt", lambda path: written(path, lambda part: torch.save(torch.zeros(10**5), part))),
    ("a.csv", lambda path: written(path, lambda part: part.write_bytes(bytes(10**5))))])
def test_a_full_disk_is_one_line_and_leaves_the_old_file_alone(tmp_path, capsys, name, writer):
    path, limits = tmp_path / name, resource.getrlimit(resource.RLIMIT_FSIZE)
    write(path, "old")
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))  # as a full disk ends a file
    try:
        code, shown = ends(lambda: writer(path), capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2 and re.fullmatch(f"error: {path}: cannot be written .*\n", shown)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def written(path, write):
    with data.replacing(path) as part:
        write(part)


def test_stand_in_of_biovid_is_read_by_the_real_loader_and_covers_the_awkward_cases(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SUBJECTS", 5)
    monkeypatch.setattr(data, "REPEATS", 1)
    root = tmp_path / "s"
    data.write_stand_in("biovid_b", root)
    source = data.open_dataset("biovid_b", root, classes=5, image_size=16)
    assert (root / "SYNTHETIC").is_file() and len(set(source.group)) == 5 and len(source.images) == 25
    assert {len(csv.read_text().splitlines()) - 1 for csv, *_ in source.signals} == {2816, 2817}
    images = [sorted(p.name for p in folder.iterdir()) for folder in source.folders()]
    assert len({len(i) for i in images}) > 1 and not list(source.faults)
    assert source.visual(0).shape == (3, 10, 16, 16) and torch.isfinite(source.privileged(0)).all()
    before = (root / "SYNTHETIC").stat().st_mtime_ns
    data.write_stand_in("biovid_b", root)  # there already: nothing happens
    assert (root / "SYNTHETIC").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="another stand-in"):
        data.write_stand_in("biovid_a", root)


def test_stand_in_refuses_a_folder_that_is_not_its_own(tmp_path):
    (tmp_path / "mine").mkdir()
    write(tmp_path / "mine" / "thesis.txt", "irreplaceable")
    with pytest.raises(UserError, match="not a stand-in") as error:
        data.write_stand_in("biovid_b", tmp_path / "mine")
    only_line(error, "mine")
    assert [p.name for p in tmp_path.rglob("*")] == ["mine", "thesis.txt"]


def test_stand_in_of_affwild2_covers_the_awkward_cases(tmp_path, monkeypatch):
    shown = {}

    def few_tiny_images(folder, prefix, faces, keep):
        shown[folder.name] = keep
        for i in np.flatnonzero(keep)[::7]:
            jpg(folder / f"{prefix}{i + 1:05d}.jpg", 1)

    monkeypatch.setattr(data, "draw_faces", lambda *args: np.empty((0, 0, 0, 3)))
    monkeypatch.setattr(data, "write_jpegs", few_tiny_images)
    monkeypatch.setattr(data, "SOUND_RATE", 2205)
    data.write_stand_in("affwild2", tmp_path / "s")
    source = data.open_dataset("affwild2", tmp_path / "s")
    assert json.loads((tmp_path / "s" / "SYNTHETIC").read_text())["dataset"] == "affwild2"
    assert {"video3_left", "video3_right"} <= set(source.video) and set(source.split) == {"train", "test"}
    rates = {video: end / seconds for video, end, (_, seconds) in zip(source.video, ends_of(source), source.signals, strict=True)}
    assert {video for video, rate in rates.items() if rate == 25} == {"video5"} and not all(keep.all() for keep in shown.values())
    rows = {p.stem: data.read_annotation(p) for p in (tmp_path / "s").rglob("*_Set/*.txt")}
    assert {len(rows[v]) - len(keep) for v, keep in shown.items()} == {-1, 0, 1}
    assert all(np.isnan(label).any() and not np.isnan(label).all() for label in rows.values())
    assert len(source.frame_label) == sum(np.isfinite(label).all(1).sum() for label in rows.values())


# ----------------------------------------------------------------------------------- the scripts, as a user runs them


def call(script, line):
    """Run a script's main() in this process with a command line; returns the exit code (0 if it just returns)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{script.__name__}.py", *line.split()])
        try:
            data.run(script.main)
        except SystemExit as stop:
            return stop.code
    return 0


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory):
    """A small BioVid B in its own format: 10 subjects, one sample of each class, 16 x 16 faces."""
    root = tmp_path_factory.mktemp("data") / "biovid"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "SUBJECTS", 10)
        patch.setattr(data, "REPEATS", 1)
        patch.setattr(data, "FACE", 16)
        data.write_stand_in("biovid_b", root)
    return root


@pytest.fixture(scope="session")
def biovid_run(stand_in, tmp_path_factory):
    """Teacher and PKDOT student on it, by the two commands of the README with smaller settings."""
    out = tmp_path_factory.mktemp("runs")
    common = f"--out {out} --device cpu --workers 0"
    assert call(train_teacher, f"--dataset biovid_b --root {stand_in} --image-size 32 --backbone-epochs 1 "
                               f"--fusion-epochs 2 {common}") == 0
    assert call(train_student, f"--lambda 0.4 --k 30 --epochs 3 {common}") == 0
    return out / "biovid_b-synthetic" / "c2" / "fold1"


@pytest.fixture(scope="session")
def two_views(tmp_path_factory):
    """A features file: 4 classes; a noisy image of the class is the visual view, a clear one the privileged."""
    rng = np.random.default_rng(0)
    label = rng.integers(0, 4, 240)
    centres_v, centres_p = rng.normal(size=(4, 12)), rng.normal(size=(4, 9))
    path = tmp_path_factory.mktemp("features") / "views.npz"
    np.savez(path, label=label, visual=(centres_v[label] + rng.normal(size=(240, 12)))[:, None].astype(np.float32),
             privileged=(3 * centres_p[label] + rng.normal(size=(240, 9)))[:, None].astype(np.float32))
    return path


def train_on_views(path, out, more=""):
    assert call(train_teacher, f"--dataset features --root {path} --out {out} --backbone-epochs 3 --fusion-epochs 5 "
                               f"--device cpu {more}") == 0
    return out / "features" / "c4" / "fold1"


@pytest.fixture(scope="session")
def views_run(two_views, tmp_path_factory):
    return train_on_views(two_views, tmp_path_factory.mktemp("views"))


def results(out):
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_the_last_line_is_the_answer(biovid_run):
    out = biovid_run.parents[2]
    command = [sys.executable, SCRIPTS / "train_student.py", "--lambda", "0.4", "--k", "30", "--epochs", "2",
               "--workers", "0", "--out", out]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    assert re.fullmatch(r"SYNTHETIC biovid_b fold 1, test, n = 4: visual only \(lower bound\) accuracy [\d.]+ % \| "
                        r"student, pkdot accuracy [\d.]+ % \| multimodal \(upper bound\) accuracy [\d.]+ %", last)
    assert done.stderr.count("only 14 training samples; batches are of 14 and k is 14") == 1


def test_results_lines_say_what_was_run(biovid_run):
    lines = results(biovid_run.parents[2])
    assert [line["role"] for line in lines[:4]] == ["visual", "privileged", "multimodal", "student"]
    expected = {"dataset": "biovid_b", "synthetic": True, "classes": 2, "fold": 1, "method": "pkdot", "lambda": 0.4,
                "k": 30, "epsilon": 0.1, "debias": True, "anchors": "dissimilar", "batch_size": 128, "seed": 0,
                "select": "val", "n_test": 4, "torch": torch.__version__}
    assert expected.items() <= lines[3].items() and lines[3]["seconds"] > 0
    log = [json.loads(line) for line in (biovid_run / "log.jsonl").read_text().splitlines()]
    assert "command" in log[0] and {"visual", "privileged", "fusion", "student"} <= {line.get("stage") for line in log}


def test_student_is_stage_1_frozen_tnet_and_a_fresh_head(biovid_run):
    student = torch.load(biovid_run / "student-pkdot.pt", weights_only=True)["model"]
    teacher = torch.load(biovid_run / "teacher.pt", weights_only=True)
    visual = torch.load(biovid_run / "visual.pt", weights_only=True)["model"]
    part = {name: {key.removeprefix(name + "."): value for key, value in student.items() if key.startswith(name + ".")}
            for name in ("backbone", "tnet", "head")}
    assert sum(map(len, part.values())) == len(student)  # and no privileged backbone
    assert equal(part["tnet"], teacher["tnet"])
    assert equal(part["backbone"], {key.removeprefix("backbone."): value for key, value in visual.items()
                                    if key.startswith("backbone.")})
    assert part["head"].keys() == teacher["head"].keys() and not equal(part["head"], teacher["head"])


def test_distillation_leaves_the_teacher_as_it_was(views_run, monkeypatch):
    """The teacher in memory, watched from its creation to the end of the run, and the files it came from."""
    teachers, fusion_head = [], models.ConcatFusion

    def watching(*settings, **more):
        teachers.append(fusion_head(*settings, **more))
        return teachers[-1]

    monkeypatch.setitem(models.HEADS, "concat", watching)
    before = {path.name: path.read_bytes() for path in views_run.iterdir() if path.suffix in (".pt", ".npz")}
    assert call(train_student, f"--out {views_run.parents[2]} --epochs 2 --method mse --device cpu") == 0
    saved = torch.load(views_run / "teacher.pt", weights_only=True)["head"]
    assert len(teachers) == 2 and equal(teachers[0].state_dict(), saved)  # the second is the student's head
    assert not equal(teachers[1].state_dict(), saved)
    assert before == {name: (views_run / name).read_bytes() for name in before}


def test_evaluation_and_prediction_need_no_privileged_file(biovid_run, stand_in, tmp_path, capsys):
    shutil.copytree(stand_in / "faces", tmp_path / "faces")
    assert call(train_student, f"--evaluate {biovid_run}/student-pkdot.pt --root {tmp_path} --workers 0") == 0
    score = float(re.search(r"accuracy ([\d.]+) %", capsys.readouterr().out)[1])
    trained = torch.load(biovid_run / "student-pkdot.pt", weights_only=True)["scores"]["accuracy"]
    assert score == pytest.approx(trained, abs=0.01)
    subject = next(iter(sorted((tmp_path / "faces").iterdir())))
    assert call(train_student, f"--predict {subject} --student {biovid_run}/student-pkdot.pt --workers 0") == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header == "sample,p(BL1),p(PA4)"
    assert [line.split(",")[0] for line in lines] == sorted(path.name for path in subject.iterdir())
    assert all(sum(map(float, line.split(",")[1:])) == pytest.approx(1, abs=2e-4) for line in lines)


def test_an_evaluation_repeats_the_score_whatever_the_clips(stand_in, tmp_path, capsys):
    common = f"--out {tmp_path} --device cpu --workers 0"
    assert call(train_teacher, f"--dataset biovid_b --root {stand_in} --image-size 32 --backbone-epochs 1 --clips 2 "
                               f"--fusion-epochs 2 {common}") == 0
    for more in ("", "--finetune"):
        assert call(train_student, f"--epochs 1 {more} {common}") == 0
        student = tmp_path / "biovid_b-synthetic" / "c2-length2" / "fold1" / "student-pkdot.pt"
        capsys.readouterr()
        assert call(train_student, f"--evaluate {student} --workers 0") == 0
        recorded = torch.load(student, weights_only=True)["scores"]
        assert f"n = {recorded['n']}: student pkdot accuracy {recorded['accuracy']:.2f} %" in capsys.readouterr().out
        assert recorded["n"] == 4


def test_a_student_is_evaluated_on_its_own_test_subjects_alone(biovid_run, stand_in, tmp_path, capsys):
    """Whoever else lies at the root: a new subject changes nothing, a missing one is an error."""
    shutil.copytree(stand_in / "faces", tmp_path / "faces")
    line = f"--evaluate {biovid_run}/student-pkdot.pt --root {tmp_path} --workers 0"
    assert call(train_student, line) == 0
    before = capsys.readouterr().out
    new = sorted((tmp_path / "faces").iterdir())[0].name
    for sample in (tmp_path / "faces" / new).iterdir():
        shutil.copytree(sample, tmp_path / "faces" / "990101_m_40" / sample.name.replace(new, "990101_m_40"))
    assert call(train_student, line) == 0 and capsys.readouterr().out == before
    test = torch.load(biovid_run / "student-pkdot.pt", weights_only=True)["test_names"]
    sample = test[0].split("/")[0]
    shutil.rmtree(tmp_path / "faces" / sample.split("-")[0] / sample)
    assert call(train_student, line) == 2
    assert f"lacks 1 of the student's {len(test)} test samples, first {test[0]}" in capsys.readouterr().err


def test_a_misspelt_array_is_named_instead_of_ignored(two_views, tmp_path, capsys):
    """groups for group would put one person into training and test."""
    with np.load(two_views) as file:
        np.savez(tmp_path / "a.npz", groups=np.arange(240) // 4, **file)
    for script, line in ((data, f"--check features --root {tmp_path}/a.npz"),
                         (train_teacher, f"--dataset features --root {tmp_path}/a.npz --out {tmp_path} --device cpu")):
        assert call(script, line) == 2
        assert f"{tmp_path}/a.npz: holds groups, which nothing reads" in capsys.readouterr().err


def test_an_evaluation_knows_the_test_samples_by_name_and_label(two_views, views_run, tmp_path, capsys):
    """A file without its privileged view, in another order: the same score. Another file whose samples have
    the same default numbers for names: refused, not scored."""
    assert call(train_student, f"--out {views_run.parents[2]} --epochs 2 --method kl --device cpu") == 0
    student = views_run / "student-kl.pt"
    recorded = torch.load(student, weights_only=True)["scores"]
    with np.load(two_views) as file:
        arrays = {key: file[key] for key in ("visual", "label")}
    order = np.random.default_rng(1).permutation(240)
    np.savez(tmp_path / "again.npz", name=order, **{key: array[order] for key, array in arrays.items()})
    capsys.readouterr()
    assert call(train_student, f"--evaluate {student} --root {tmp_path}/again.npz") == 0
    assert f"n = {recorded['n']}: student kl accuracy {recorded['accuracy']:.2f} %" in capsys.readouterr().out
    np.savez(tmp_path / "other.npz", **{key: array[order] for key, array in arrays.items()})
    assert call(train_student, f"--evaluate {student} --root {tmp_path}/other.npz") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"{tmp_path}/other.npz" in error and "other labels" in error


def test_a_finished_student_is_not_trained_again(views_run, capsys):
    line = f"--out {views_run.parents[2]} --epochs 2 --method cosine --device cpu --resume"
    assert call(train_student, line) == 0
    count = len(results(views_run.parents[2]))
    assert call(train_student, line) == 0
    assert len(results(views_run.parents[2])) == count and "is finished" in capsys.readouterr().out


def test_a_teacher_of_older_backbones_is_not_finished(two_views, tmp_path, capsys):
    """A second run that died after stage 1: the student refuses, and --resume does what the refusal says."""
    run = train_on_views(two_views, tmp_path)
    state = torch.load(run / "visual.pt", weights_only=True)
    state["model"]["backbone.features.0.bias"] += 1
    torch.save(state, run / "visual.pt")
    assert call(train_student, f"--out {tmp_path} --epochs 1 --device cpu") == 2
    assert "train_teacher.py --resume" in capsys.readouterr().err
    train_on_views(two_views, tmp_path, "--resume")
    assert call(train_student, f"--out {tmp_path} --epochs 1 --device cpu") == 0


def test_same_seed_twice_gives_identical_numbers(two_views, views_run, tmp_path):
    again = train_on_views(two_views, tmp_path)
    for name in ("visual", "privileged"):
        assert equal(*(torch.load(run / f"{name}.pt", weights_only=True)["model"] for run in (views_run, again)))
    for run in (views_run, again):
        assert call(train_student, f"--teacher {run}/teacher.pt --out {run.parents[2]} --epochs 3 --device cpu") == 0
    one, two = (torch.load(run / "student-pkdot.pt", weights_only=True) for run in (views_run, again))
    assert equal(one["model"], two["model"]) and one["scores"] == two["scores"]
    assert call(train_student, f"--teacher {again}/teacher.pt --out {tmp_path} --epochs 3 --seed 1 --device cpu") == 0
    assert not equal(two["model"], torch.load(again / "student-pkdot.pt", weights_only=True)["model"])


@pytest.mark.parametrize("stage", ["visual", "privileged", "fusion", "student"])
def test_resumed_equals_uninterrupted(stage, two_views, views_run, tmp_path, monkeypatch):
    """A run killed after its second epoch of a stage, then resumed, ends with the very same weights."""
    whole = train_on_views(two_views, tmp_path / "whole")
    student = "--epochs 4 --device cpu --batch-size 32 --anchors random --out"
    assert call(train_student, f"{student} {tmp_path}/whole") == 0
    script = train_student if stage == "student" else train_teacher
    append = script.append_line

    def dying(path, record):
        append(path, record)
        if record.get("stage") == stage and record["epoch"] == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(train_teacher, "SAVE_EVERY", 0)
    monkeypatch.setattr(script, "append_line", dying)
    out = tmp_path / "killed"
    if stage == "student":
        train_on_views(two_views, out)
        assert call(train_student, f"{student} {out}") == 130
    else:
        assert call(train_teacher, f"--dataset features --root {two_views} --out {out} --backbone-epochs 3 "
                                   "--fusion-epochs 5 --device cpu") == 130
    monkeypatch.setattr(script, "append_line", append)
    killed = train_on_views(two_views, out, "--resume")
    assert call(train_student, f"{student} {out} --resume") == 0
    for name, keys in {"teacher": ("head", "tnet"), "student-pkdot": ("model",)}.items():
        one, two = (torch.load(run / f"{name}.pt", weights_only=True) for run in (whole, killed))
        assert all(equal(one[key], two[key]) for key in keys)
    assert not list(killed.glob("*.progress")) and not list(killed.glob("*.tmp*"))


def test_another_head_of_other_data_does_not_touch_the_backbones_that_are_there(two_views, views_run, tmp_path, capsys):
    other = tmp_path / "other.npz"
    shutil.copy(two_views, other)
    before = {path: path.read_bytes() for path in views_run.glob("*.*") if path.suffix in (".pt", ".npz")}
    line = f"--dataset features --root {other} --out {views_run.parents[2]} --fusion mmt --backbone-epochs 1 --device cpu"
    assert call(train_teacher, line) == 2
    assert f"{views_run / 'visual.pt'} was trained with root {two_views}, not {other}" in capsys.readouterr().err
    assert len(before) >= 4 and before == {path: path.read_bytes() for path in before}


@pytest.mark.parametrize("resume", ["", "--resume"])
@pytest.mark.parametrize("flags, named", [
    ("--backbone-epochs 4 --fusion-epochs 5", "teacher.pt was trained with backbone_epochs 3, not 4"),
    ("--fusion-epochs 6", "teacher.pt was trained with fusion_epochs 5, not 6"),
    ("--fusion jca --lr 1e-4 --fusion-epochs 5", "visual.pt was trained with lr 0.001, not 0.0001")])
def test_a_teacher_of_other_settings_is_never_overwritten(resume, flags, named, views_run, two_views, capsys):
    before = {path: path.read_bytes() for path in views_run.glob("*.*") if path.suffix in (".pt", ".npz")}
    line = f"--dataset features --root {two_views} --out {views_run.parents[2]} --device cpu --backbone-epochs 3 {resume}"
    assert call(train_teacher, f"{line} {flags}") == 2
    assert named in capsys.readouterr().err
    assert len(before) >= 4 and before == {path: path.read_bytes() for path in before}


def test_finetuning_trains_the_backbone_from_video(biovid_run):
    out = biovid_run.parents[2]
    assert call(train_student, f"--out {out} --method cosine --finetune --epochs 1 --workers 0 --device cpu") == 0
    student = torch.load(biovid_run / "student-cosine.pt", weights_only=True)["model"]
    visual = torch.load(biovid_run / "visual.pt", weights_only=True)["model"]
    assert not torch.equal(student["backbone.stem.0.weight"], visual["backbone.stem.0.weight"])


@pytest.mark.parametrize("method", train_student.METHODS)
def test_each_method_learns_to_classify_from_one_view(method, views_run):
    out = views_run.parents[2]
    assert call(train_student, f"--out {out} --method {method} --epochs 30 --batch-size 64 --lr 1e-3 --device cpu") == 0
    assert results(out)[-1]["method"] == method and results(out)[-1]["accuracy"] > 40  # chance is 25


@pytest.mark.parametrize("method", train_student.METHODS)
def test_autocast_runs(method, views_run, monkeypatch):
    """The path that --amp takes on CUDA, here on a CPU, where linear layers are right in bfloat16."""
    monkeypatch.setattr(train_teacher, "choose_device", lambda name, amp: torch.device(name))
    out = views_run.parents[2]
    assert call(train_student, f"--out {out} --epochs 2 --amp --method {method} --device cpu") == 0
    assert results(out)[-1]["amp"] is True


BAD = [  # script, command line, what the one line must name
    (train_student, "--out {tmp}", ["{tmp}", "run train_teacher.py first"]),
    (train_student, "--out {tmp} --k 300 --batch-size 128", ["--k 300", "128"]),
    (train_student, "--out {views} --k 300 --batch-size 128", ["--k 300", "--batch-size 128"]),
    (train_student, "--method ridge", ["ridge", "pkdot"]),
    (train_student, "--teacher {tmp}/teacher.pt", ["{tmp}/teacher.pt", "no such file"]),
    (train_student, "--teacher {text}", ["{text}", "checkpoint"]),
    (train_student, "--teacher {pickle}", ["{pickle}", "checkpoint"]),
    (train_student, "--evaluate {teacher}", ["{teacher}", "student"]),
    (train_student, "--evaluate {student} --root {tmp}", ["{tmp}/faces", "--synthetic"]),
    (train_student, "--predict {tmp}/none --student {student}", ["{tmp}/none", "no images there"]),
    (train_student, "--predict {tmp}", ["--student"]),
    (train_student, "--epsilon 0", ["--epsilon", "0"]),
    (train_student, "--out {views} --amp --device cpu", ["--amp", "CUDA", "float32"]),
    (train_teacher, "--dataset biovid_b --root {biovid} --amp --device cpu", ["--amp", "CUDA", "float32"]),
    (train_teacher, "--dataset mnist", ["mnist", "affwild2"]),
    (train_teacher, "--dataset biovid_b --root {tmp}", ["{tmp}/faces", "request", "--synthetic"]),
    (train_teacher, "--dataset affwild2 --root {tmp}", ["{tmp}/cropped_aligned", "request", "--synthetic"]),
    (train_teacher, "--dataset features", ["--root"]),
    (train_teacher, "--dataset features --root {text}", ["{text}", "features file"]),
    (train_teacher, "--dataset features --root {good} --clips 2", ["--clips", "leave"]),
    (train_teacher, "--dataset features --root {good} --classes 2", ["--classes", "leave"]),
    (train_teacher, "--dataset features --root {good} --pretrained", ["--pretrained", "leave"]),
    (train_teacher, "--dataset features --root {good} --visual-backbone i3d", ["--visual-backbone", "leave"]),
    (train_teacher, "--dataset features --root {nan}", ["{nan}", "NaN"]),
    (train_teacher, "--dataset biovid_b --root {biovid} --visual-weights {text}", ["{text}", "state dict"]),
    (train_teacher, "--dataset biovid_b --root {biovid} --device cuda:99", ["cuda:99"]),
    (train_student, "--evaluate {torn}", ["{torn}", "checkpoint"]),
    (train_student, "--out {views} --lr 1e30 --epochs 9", ["step ", "not finite", "L_gt nan", "W ", "--lr"]),
    (train_student, "--out {views} --lr 1e30 --epochs 9 --batch-size 32", ["epoch 1, step ", "nan", "W ", "--lr"]),
    (train_student, "--table 3 --out {tmp} --root {tmp}", ["{tmp}", "affwild2 not run"]),
    (train_student, "--table 5 --method mse", ["--method"]),
    (train_student, "--table 5 --role visual", ["--role"]),
    (train_student, "--out {views} --teacher {tmp}/none.pt", ["{tmp}/none.pt: no such file", "train it first"]),
    (train_student, "--out {views} --method cosine --shared-anchors", ["--shared-anchors", "pkdot's", "cosine"]),
    (train_student, "--out {views} --hallucinate oracle", ["--hallucinate", "--table"]),
    (train_teacher, "--dataset features --root {good} --out {text}", ["{text}", "Not a directory"]),
    (train_teacher, "--dataset features --root {good} --out {views} --lr 1e30", ["another --out"]),
    (train_teacher, "--fold 6", ["6", "all"]),
    (train_teacher, "--batch 3", ["--batch"])]


@pytest.mark.parametrize("script, line, named", BAD, ids=[line for _, line, _ in BAD])
def test_bad_input_is_one_line_and_exit_code_2(
        script, line, named, biovid_run, views_run, two_views, stand_in, tmp_path, capsys):
    files = {"tmp": tmp_path / "empty", "views": views_run.parents[2], "text": tmp_path / "text.pt",
             "pickle": tmp_path / "pickle.pt", "teacher": biovid_run / "teacher.pt", "nan": tmp_path / "nan.npz",
             "student": biovid_run / "student-pkdot.pt", "biovid": stand_in, "torn": tmp_path / "torn.pt",
             "good": tmp_path / "good.npz"}
    files["tmp"].mkdir()
    files["text"].write_text("not a checkpoint")
    files["torn"].write_bytes((biovid_run / "teacher.pt").read_bytes()[:5000])
    shutil.copy(two_views, files["good"])
    torch.save({"kind": "teacher", "settings": Path("x")}, files["pickle"])  # an object: not safe to load
    np.savez(files["nan"], visual=np.full((9, 1, 2), np.nan, np.float32), privileged=np.ones((9, 1, 2), np.float32),
             label=np.arange(9) % 2)
    runs = [biovid_run.parents[2], views_run.parents[2]]
    before = {path: path.read_bytes() for run in runs for path in run.rglob("*.pt")}
    assert call(script, line.format(**files)) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and "Traceback" not in captured.err
    for name in named:
        assert name.format(**files) in captured.err
    assert before == {path: path.read_bytes() for path in before}


def test_unreadable_files_are_named_from_worker_processes(stand_in, tmp_path):
    """As from the shell, and through a DataLoader's workers: still one line."""
    root = tmp_path / "biovid"
    shutil.copytree(stand_in, root)
    for path in (root / "faces").glob("*/*/*.jpg"):
        path.write_bytes(b"not a jpg")
    done = subprocess.run([sys.executable, SCRIPTS / "train_teacher.py", "--dataset", "biovid_b", "--root", root,
                           "--out", tmp_path / "out", "--workers", "1", "--image-size", "32"],
                          capture_output=True, text=True)
    assert done.returncode == 2
    assert re.fullmatch(r"error: \S+\.jpg: .*; extract it again or delete it\n", done.stderr)


def test_every_name_in_the_readme_is_there():
    """The map from the paper to the code, and the tests that guard what it says."""
    text = (SCRIPTS / "README.md").read_text()
    modules = {"sinkhorn": sinkhorn_module, "data": data, "models": models, "train_teacher": train_teacher,
               "train_student": train_student, "pkdot": sys.modules["pkdot"]}
    names = set(re.findall(r"`(sinkhorn|pkdot|models|data|train_teacher|train_student)\.([A-Za-z_0-9]+)`", text))
    names -= {(module, "py") for module in modules}
    assert len(names) > 30
    assert not [f"{module}.{name}" for module, name in names if not hasattr(modules[module], name)]
    tests = set(re.findall(r"`(test_[a-z0-9_]+)`", text))
    assert len(tests) > 10 and tests <= globals().keys(), tests - globals().keys()


def test_documented_commands_parse():
    """Every command in the README and in the docstrings of the scripts is one that its parser takes."""
    text = (SCRIPTS / "README.md").read_text() + train_teacher.__doc__ + train_student.__doc__
    text += data.__doc__
    commands = re.findall(r"python (train_teacher|train_student|data)\.py([^\n#&`|]*)", text)
    assert len(commands) > 10 and {"data"} < {script for script, _ in commands}
    for script, line in commands:
        globals()[script].parse(shlex.split(line))


# ---------------------------------------------------------------------------------------------------- several processes

WEIGHT, BATCHES = 0.7, torch.randperm(26, generator=torch.Generator().manual_seed(1))[:22].split(12)  # of 12 and of 10
LOSSES = {"pkdot": (pkdot_loss, {}), "shared": (pkdot_loss, {"shared": True}), "cosine": (cosine_loss, {}),
          "mse": (mse_loss, {}), "kl": (kl_loss, {}), "rkd": (rkd_loss, {}), "none": (None, {})}


PROBLEMS = [(name, task, "concat") for name in LOSSES for task in ("classification", "regression")]
PROBLEMS.remove(("kl", "regression", "concat"))
PROBLEMS += [("pkdot", "classification", "mmt"), ("pkdot", "regression", "jca")]


def distillation_problem(name, task, fusion):
    """A student on two-clip feature vectors, its inputs, and a teacher's answers; float64, dropout off."""
    torch.manual_seed(0)
    affect, width = task == "regression", 1024 if fusion == "jca" else 512
    student = train_student.build_student(dict(dataset="features", visual_dim=6, task=task, outputs=2 if affect else 3,
                                               length=2, fusion=fusion)).double().eval().requires_grad_(False)
    trained = torch.nn.ModuleDict({"head": student.head, "backbone": student.backbone}).requires_grad_(True)
    teacher = models.Fused(randn(26, 2, 2) if affect else randn(26, 3), randn(26, width, seed=1))
    label = randn(26, 2, 2, seed=2).tanh() if affect else torch.arange(26) % 3
    label[BATCHES[0][1]] = label[BATCHES[1][3:]] = math.nan if affect else -1  # some ranks' shares have none
    return student, trained, randn(52, 6), torch.arange(52).view(26, 2), label, teacher


class Recorder(torch.optim.SGD):
    """An optimiser that notes the gradients and leaves the weights alone."""

    def __init__(self, module):
        super().__init__(module.parameters(), lr=0.0)
        self.module, self.seen = module, []

    def step(self):
        self.seen.append({name: p.grad.clone() for name, p in self.module.named_parameters()})


def gradients_over_ranks(args):
    """What train_epoch logs and hands to its optimiser in this rank, for each problem; likewise stage 1's loss."""
    found = {}
    for name, *kind in PROBLEMS:
        student, trained, rows, index, label, teacher = distillation_problem(name, *kind)
        flags = train_student.parse(["--k", "9"])
        vars(flags).update(device=args.device, rank=args.rank, world=args.world, shared=name == "shared",
                           method="pkdot" if name == "shared" else name, lam=WEIGHT)
        network, optimizer = train_teacher.spread(student, flags), Recorder(trained)
        shares = [train_teacher.share(batch, flags) for batch in BATCHES]
        inputs = train_student.student_inputs(rows, None, index, shares, flags)
        terms = train_student.train_epoch((network(*x) for x in inputs), BATCHES, label, teacher, optimizer, flags)
        found[name, *kind] = [(*term.tolist(), grads) for term, grads in zip(terms, optimizer.seen, strict=True)]

    for per_clip in (False, True):
        model, rows, label = stage_1_problem(per_clip)
        network, optimizer = train_teacher.spread(model, args), Recorder(model)
        for batch in BATCHES:
            output = train_teacher.gather(network(rows[train_teacher.share(batch, args)]), len(batch), args)
            optimizer.zero_grad()
            task_loss(output, label[batch]).backward()
            optimizer.step()
        found["stage 1", per_clip] = optimizer.seen
    return found


def stage_1_problem(per_clip):
    torch.manual_seed(0)
    model = models.Unimodal(models.FeatureMLP(6), 2 + (not per_clip), per_clip).double()
    return model, randn(26, 2, 6), randn(26, 2, 2, seed=2).tanh() if per_clip else torch.arange(26) % 3


def rank_main(folder):
    """What each process of a group does: the gradients, then commands of both scripts, one after the other in one
    process group. What it found lies in folder/rank<r>.pt, what it printed in folder/<command>-rank<r>.txt."""
    dist, folder, plan = train_teacher.dist, Path(folder), json.loads((Path(folder) / "plan.json").read_text())
    args = SimpleNamespace(device="cpu", amp=False)
    train_teacher.join_ranks(args)
    leave, train_student_reads = dist.destroy_process_group, train_student.read_results
    dist.init_process_group = dist.destroy_process_group = lambda *_, **__: None  # not between the commands
    data.SUBJECTS, data.REPEATS, data.FACE = 10, 1, 16

    def late(path):  # one rank looks when the other may have gone on
        time.sleep(0.5 * (train_teacher.RANK == 0))
        return train_student_reads(path)

    train_student.read_results = late
    torch.save(gradients_over_ranks(args), folder / f"rank{args.rank}.pt")
    for name, (script, line) in plan.items():
        stdout = sys.stdout
        with open(folder / f"{name}-rank{args.rank}.txt", "w") as sys.stdout, warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)
            code = call(globals()[script], line)
            sys.stdout.flush()
        sys.stdout = stdout
        if code:
            sys.exit(f"{name}: exit code {code}")
    dist.barrier()
    leave()


def torchrun(world, *command, **how):
    """A command under torchrun, its processes with one thread each."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}", *command]
    return subprocess.Popen([*map(str, launch)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPTS)}, **how)


def finish(process, seconds=300):
    """(exit code, stdout, stderr) of a torchrun; it and its ranks end in any case."""
    try:
        out, err = process.communicate(timeout=seconds)
        return process.returncode, out, err
    finally:
        process.terminate()
        process.wait()


@pytest.fixture(scope="session")
def one_thread():
    """As the processes of a group have it: another number of threads sums in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


TEACHER = "--dataset features --root {views} --backbone-epochs 2 --fusion-epochs 3 --device cpu --batch-size 50 --out"
STUDENT = "--finetune --epochs 2 --device cpu --batch-size 50 --out"
TABLE = "--table 2 --dataset features --root {views} --epochs 1 --device cpu --batch-size 64 --fold 1 2 --out"
BIOVID = ("--dataset biovid_b --synthetic --root {biovid} --image-size 32 --backbone-epochs 1 --batch-size 7 "
          "--fusion-epochs 2 --device cpu --workers 0 --out")


@pytest.fixture(scope="session")
def group(two_views, one_thread, tmp_path_factory):
    """A folder of what `rank_main` found, by number of processes; each group is started once."""
    folders = {}

    def started(world):
        if world in folders:
            return folders[world]
        folder = folders[world] = tmp_path_factory.mktemp(f"ranks{world}")
        paths, one = {"views": two_views, "biovid": folder / "biovid"}, folder / "one"
        plan = {"teacher": ("train_teacher", f"{TEACHER} {one}"), "student": ("train_student", f"{STUDENT} {one}"),
                "alone": ("train_student", f"--epochs 1 --device cpu --method mse --out {one}")}
        if world == 2:
            out = folder / "biovid-runs"
            again, saved = f"--out {out} --device cpu --workers 0", out / "biovid_b-synthetic/c2/fold1/student-pkdot.pt"
            plan |= {"table": ("train_student", f"{TABLE} {folder}/table"),
                     "biovid": ("train_teacher", f"{BIOVID} {out}"),
                     "finetune": ("train_student", f"--finetune --chunk 4 --epochs 1 {again}"),
                     "evaluate": ("train_student", f"--evaluate {saved} {again}"),
                     "predict": ("train_student", f"--predict {{biovid}}/faces --student {saved} {again}"),
                     "figure": ("train_student",
                                f"--figure 5 --epochs 1 --dataset biovid_b --root {{biovid}} {again}")}
        plan = {name: (script, line.format(**paths)) for name, (script, line) in plan.items()}
        (folder / "plan.json").write_text(json.dumps(plan))
        driver = folder / "driver.py"
        driver.write_text(f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
                          f"import test_pkdot; test_pkdot.rank_main({str(folder)!r})\n")
        code, _, err = finish(torchrun(world, driver, cwd=folder))
        assert code == 0, err[-3000:]
        return folder
    return started


def assert_close(found, expected, relative):
    """Tensors of a dict, each by its norm."""
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert (found[key] - value).norm() <= relative * value.norm() + 1e-12, key


@pytest.mark.parametrize("world", [2, 3])
def test_loss_and_gradient_over_ranks_are_those_of_one_process(world, group):
    """The oracle: the loss of the whole batch, written out, in this process."""
    shown = [torch.load(group(world) / f"rank{rank}.pt") for rank in range(world)]
    for problem in PROBLEMS:
        student, trained, rows, index, label, teacher = distillation_problem(*problem)
        name = problem[0]
        loss, options = LOSSES[name]
        for step, batch in enumerate(BATCHES):
            trained.zero_grad()
            output, z = student(rows[index[batch]])
            pair = (output, teacher.output[batch]) if name == "kl" else (z, teacher.z[batch])
            more = {"k": 9, **options} if loss is pkdot_loss else {}
            gt, W = task_loss(output, label[batch]), loss(*pair, **more) if loss else torch.zeros(())
            (gt + WEIGHT * W).backward()
            expected = {key: p.grad for key, p in trained.named_parameters()}
            for rank in shown:
                found_gt, found_w, gradient = rank[problem][step]
                assert found_gt == pytest.approx(gt.item(), rel=1e-6)
                assert found_w == pytest.approx(W.item(), rel=1e-6, abs=1e-9)
                assert_close(gradient, expected, 1e-5)
    for per_clip in (False, True):
        model, rows, label = stage_1_problem(per_clip)
        for step, batch in enumerate(BATCHES):
            model.zero_grad()
            task_loss(model(rows[batch]), label[batch]).backward()
            for rank in shown:
                assert_close(rank["stage 1", per_clip][step], {k: p.grad for k, p in model.named_parameters()}, 1e-5)


def logged(run, stage):
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line.get("stage") == stage and line.get("method") != "mse"]


@pytest.mark.parametrize("world", [2, 3])
def test_one_fold_over_ranks_trains_as_one_process_does(world, group, two_views, tmp_path):
    """The commands as a user gives them; 168 samples in batches of 50, the last of 18, over 2 and over 3 ranks."""
    assert call(train_teacher, f"{TEACHER.format(views=two_views)} {tmp_path}") == 0
    assert call(train_student, f"{STUDENT} {tmp_path}") == 0
    one, many = (out / "features/c4/fold1" for out in (tmp_path, group(world) / "one"))
    for stage, terms in (  # each epoch once, whatever the number of processes
            ("visual", ["loss"]), ("privileged", ["loss"]), ("fusion", ["loss"]), ("student", ["loss_gt", "w"])):
        a, b = ([[line[term] for term in terms] for line in logged(run, stage)] for run in (one, many))
        assert len(a) == len(b) > 1 and b == [pytest.approx(line, rel=1e-3) for line in a]
    a, b = (torch.load(run / "visual.pt", weights_only=True)["model"] for run in (one, many))
    assert_close(b, a, 1e-3)
    start = train_teacher.backbone_weights({"model": a})
    a, b = (torch.load(run / "student-pkdot.pt", weights_only=True)["model"] for run in (one, many))
    moved, other = ({k: state[f"backbone.{k}"] - start[k] for k in start if "features" in k} for state in (a, b))
    assert all(value.norm() > 0 for value in moved.values())
    assert_close(other, moved, 0.05)
    roles = [line["role"] for line in results(group(world) / "one")]
    assert roles == ["visual", "privileged", "multimodal", "student", "student"]


def test_ranks_without_work_say_so(group):
    for world in (2, 3):
        said = [(group(world) / f"alone-rank{rank}.txt").read_text() for rank in range(world)]
        assert "student, mse accuracy" in said[0] and "waits" not in said[0]
        assert said[1:] == [f"rank {r} only waits: {world} processes, students to train: 1\n" for r in range(1, world)]


def numbers(out):
    """The lines of results.jsonl without their times, in an order of their own."""
    return sorted(json.dumps({**line, "seconds": 0}, sort_keys=True) for line in results(out))


def test_folds_dealt_out_give_the_same_bits(two_views, one_thread, tmp_path):
    line = f"{TEACHER.format(views=two_views)} {{}} --fold all".split()
    teacher = [word.format(tmp_path / "two") for word in line]
    code, out, err = finish(torchrun(2, SCRIPTS / "train_teacher.py", *teacher))
    assert code == 0, err[-3000:]
    assert len(re.findall("^features fold [1-5], test, ", out, re.M)) == 5, out
    assert call(train_teacher, " ".join(line).format(tmp_path / "one")) == 0
    for fold in range(1, 6):
        one, two = (tmp_path / name / f"features/c4/fold{fold}" for name in ("one", "two"))
        for name, keys in {"visual": ["model"], "privileged": ["model"], "teacher": ["head", "tnet"]}.items():
            a, b = (torch.load(run / f"{name}.pt", weights_only=True) for run in (one, two))
            assert all(equal(a[key], b[key]) for key in keys) and a.get("scores") == b.get("scores")
        assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in two.iterdir())
    assert numbers(tmp_path / "one") == numbers(tmp_path / "two")


def test_a_table_dealt_out_has_the_same_bits_and_is_printed_once(group, two_views, one_thread, tmp_path, capsys):
    """Also where one process looks at what is missing half a second after the other."""
    capsys.readouterr()
    assert call(train_student, f"{TABLE.format(views=two_views)} {tmp_path}") == 0
    one = capsys.readouterr().out
    printed = [(group(2) / f"table-rank{rank}.txt").read_text() for rank in (0, 1)]
    assert numbers(tmp_path) == numbers(group(2) / "table") and len(results(tmp_path)) == 2 * (3 + 7)
    times = re.compile(r"\d+ s on cpu|took \d+ s")
    table = times.sub("", one[one.index("**Table II"):])
    assert times.sub("", printed[0]).endswith(table) and "Table II" not in printed[1]


def test_a_stand_in_and_one_fold_of_video_over_two_ranks(group, one_thread):
    """Written by one rank for both; on a CPU batch norm has the statistics of a rank's share, and all score with the
    first one's: every score and feature is what one process finds with the saved weights."""
    folder = group(2)
    run = folder / "biovid-runs/biovid_b-synthetic/c2/fold1"
    roles = [line["role"] for line in results(folder / "biovid-runs")]
    assert roles == ["visual", "privileged", "multimodal", "student", "student"]
    assert not [path for path in folder.rglob("*") if ".tmp" in path.name or path.suffix == ".progress"]
    source = data.open_dataset("biovid_b", folder / "biovid", image_size=32)
    fold = data.fold_windows(source, 1)
    features = data.Features(run / "features.npz")
    states = {name: torch.load(run / f"{name}.pt", weights_only=True) for name in ("visual", "privileged", "teacher")}
    for name, make in (("visual", models.R3D18), ("privileged", models.SpectrogramResNet18)):
        model = models.Unimodal(make(), 2, False)
        model.load_state_dict(states[name]["model"])
        clips = [torch.stack([getattr(source, name)(int(row)) for row in rows])[:, None]
                 for rows in torch.arange(len(source.label)).split(7)]
        with torch.no_grad():
            seen = torch.cat([model.eval().backbone(x)[:, 0] for x in clips])
            answer = model.head(seen).argmax(1) == source.label
        assert torch.equal(features.rows[name], seen)
        scores = [100 * answer[part.index[:, 0]].double().mean().item() for part in (fold.val, fold.test)]
        assert scores == [states[name]["score"], states["teacher"]["scores"][name]["accuracy"]]
        line, = logged(run, name)  # one epoch, and one line of it
        assert line["accuracy"] == scores[0]


def test_finetuning_over_two_ranks_in_chunks_is_that_of_one_process(group, one_thread, tmp_path, capsys):
    folder, out = group(2), tmp_path / "runs"
    run, again = (root / "biovid_b-synthetic/c2/fold1" for root in (folder / "biovid-runs", out))
    shutil.copytree(folder / "biovid-runs", out)
    common = f"--out {out} --device cpu --workers 0"
    assert call(train_student, f"--finetune --epochs 1 {common}") == 0
    two, one = logged(again, "student")
    assert [two["loss_gt"], two["w"]] == pytest.approx([one["loss_gt"], one["w"]], rel=1e-4, abs=1e-7)
    start = train_teacher.backbone_weights(torch.load(run / "visual.pt", weights_only=True))
    a, b = (train_teacher.backbone_weights(torch.load(p / "student-pkdot.pt", weights_only=True)) for p in (again, run))
    statistics = [key for key in start if "running" in key]
    assert statistics and all(torch.equal(start[key], state[key]) for key in statistics for state in (a, b))
    moved, other = ({k: state[k] - start[k] for k in start if k.endswith("0.weight")} for state in (a, b))
    assert all(value.norm() > 0 for value in moved.values())
    assert_close(other, moved, 0.2)

    # scores, predictions and the figure are those of one process, and said by one rank
    capsys.readouterr()
    student = run / "student-pkdot.pt"
    for name, line in (("evaluate", f"--evaluate {student}"),
                       ("predict", f"--predict {folder}/biovid/faces --student {student}")):
        assert call(train_student, f"{line} {common}") == 0
        assert [(folder / f"{name}-rank{rank}.txt").read_text() for rank in (0, 1)] == [capsys.readouterr().out, ""]
    assert call(train_student, f"--figure 5 --epochs 1 --dataset biovid_b --root {folder}/biovid {common}") == 0
    a, b = (np.load(root / "figure5-biovid_b-synthetic.npz") for root in (out, folder / "biovid-runs"))
    assert list(a) == list(b) and all(np.array_equal(a[key], b[key]) for key in a)


def child_of(process, rank):
    """The process id of a rank under a torchrun."""
    for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        if f"\0RANK={rank}\0".encode() in Path(f"/proc/{pid}/environ").read_bytes():
            return int(pid)


def test_a_killed_rank_ends_all_and_leaves_nothing_half_written(two_views, tmp_path):
    line = f"{TEACHER.format(views=two_views)} {tmp_path} --backbone-epochs 100000"
    process, log = torchrun(2, SCRIPTS / "train_teacher.py", *line.split()), tmp_path / "features/c4/fold1/log.jsonl"
    deadline = time.monotonic() + 60
    while not (log.exists() and '"epoch": 3' in log.read_text()):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    os.kill(child_of(process, 1), signal.SIGKILL)
    begin = time.monotonic()
    code, _, err = finish(process, 30)
    assert code != 0 and time.monotonic() - begin < 15
    assert re.search(r"rank +: 1 .*\n.*exitcode +: -9", err)  # named by torchrun
    assert not re.search(r"rank0.*Traceback", err)
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {"log.jsonl", "visual.progress"}
    assert train_teacher.load(log.with_name("visual.progress"), "progress")["epoch"] >= 0
    assert all(json.loads(line) for line in log.read_text().splitlines())


def test_what_gloo_says_of_a_lost_rank_is_one_line(capsys):
    code, shown = ends(lambda: refuse(RuntimeError("[/w/gloo/pair.cc:5] Read error: Connection reset by peer")), capsys)
    assert code == 2 and re.fullmatch("error: another rank has ended: .*reset by peer.*\n", shown)


@pytest.mark.parametrize("script", [train_teacher, train_student])
@pytest.mark.parametrize("given, named", [
    ({}, "LOCAL_RANK, MASTER_ADDR, MASTER_PORT, WORLD_SIZE"),
    ({"WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_PORT": "1"}, "MASTER_ADDR")])
def test_half_of_torchruns_variables_is_one_line(script, given, named, two_views, monkeypatch, capsys):
    for key in ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(key, raising=False)
    for key, value in {"RANK": "1", **given}.items():
        monkeypatch.setenv(key, value)
    assert call(script, f"--dataset features --root {two_views} --device cpu") == 2
    shown = capsys.readouterr().err
    assert shown == f"error: RANK is set but {named} is not: start the command with torchrun --standalone " \
                    "--nproc_per_node=N, or unset RANK\n"


@pytest.mark.parametrize("chunk", [3, 128])
def test_chunks_give_the_gradient_of_the_whole_batch(chunk):
    """Eight clips of video, of which five windows are cut; loss and gradients without chunks are the oracle."""
    torch.manual_seed(0)
    student = models.Student(models.R3D18(), models.TNet(), models.ConcatFusion(3)).double().eval()
    video = torch.randint(0, 256, (8, 1, 3, 2, 16, 16), dtype=torch.uint8)
    windows = torch.tensor([[0, 1], [1, 2], [2, 3], [6, 7], [5, 5]])
    before, found = {k: v.clone() for k, v in student.named_buffers()}, []
    for student.chunk in (None, chunk):
        passed = []
        handle = student.backbone.register_forward_pre_hook(lambda m, x, seen=passed: seen.append(len(x[0])))
        student.zero_grad()
        output, z = student(video, windows)
        loss = pkdot_loss(z, randn(5, 7), 3) + task_loss(output, torch.tensor([0, 1, 2, -1, 0]))
        loss.backward()
        handle.remove()
        found.append({"loss": loss.detach()} | {k: p.grad for k, p in student.named_parameters() if p.grad is not None})
    assert sorted(passed) == ([2, 2, 3, 3, 3, 3] if chunk == 3 else [8, 8])  # forward, and again going backward
    assert len(found[0]) > 60
    assert_close(found[1], found[0], 1e-5)
    assert equal(dict(student.named_buffers()), before)


@pytest.mark.parametrize("chunk", [None, 3])
def test_each_clip_of_a_batch_of_windows_is_read_once(chunk, tmp_path, monkeypatch):
    """Dense windows share clips; the student's answers are those of whole windows, read one by one."""
    affwild2(tmp_path, "one", 250)
    affwild2(tmp_path, "two", 70)
    source = data.open_dataset("affwild2", tmp_path, length=4, image_size=32, privileged=False)
    index = data.label_windows(source, source.label, dense=True).index
    torch.manual_seed(0)
    student = lively(models.Student(models.R3D18(), models.TNet(), models.JointCrossAttention(2, 4), chunk=chunk))
    reads, visual = [], source.visual
    source.visual = lambda row: reads.append(row) or visual(row)
    args = SimpleNamespace(device=torch.device("cpu"), workers=0)
    order = torch.randperm(len(index), generator=torch.Generator().manual_seed(0))
    inputs = train_student.student_inputs(source, None, index, order.split(3), args)
    for batch, x in zip(order.split(3), inputs, strict=True):
        assert sorted(reads) == sorted(set(index[batch].flatten().tolist()))
        assert len(reads) < index[batch].numel()
        reads.clear()
        with torch.no_grad():
            video = torch.stack([torch.stack([visual(int(row)) for row in window]) for window in index[batch]])
            shown, whole = student(*x), student(video)
        for a, b in zip(shown, whole, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


# --------------------------------------------------------------------------- shared anchors, and pairs without a label


def at_angles(*degrees):
    """Points on a circle: the similarity of two is the cosine of the angle between them."""
    angle = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([angle.cos(), angle.sin()], 1)


def test_what_only_shared_anchors_see():
    """Each sample's least similar one is its opposite, -1, in both batches; how the two pairs of opposites lie to each
    other differs, and only a landmark shared by all rows sees it."""
    teacher, student = at_angles(0, 180, 60, 240), at_angles(0, 180, 0, 180)
    assert pkdot_loss(student, teacher, 1).item() == pytest.approx(0, abs=1e-9)
    x, y = (np.array([[c] for c in column]) for column in ((1, -1, 1, -1), (1, -1, 0.5, -0.5)))  # to any of the four
    expected = naive_ot(x, y, 0.5) - (naive_ot(x, x, 0.5) + naive_ot(y, y, 0.5)) / 2
    assert expected > 0.01
    assert pkdot_loss(student, teacher, 1, 0.5, shared=True).item() == pytest.approx(expected, rel=1e-3)


def test_transport_need_not_pair_a_sample_with_itself():
    """Samples 3 and 4 have changed places: as sets the rows are equal, two of four differ by 1 from their own."""
    teacher, student = at_angles(0, 180, 60, 240), at_angles(0, 180, 240, 60)
    assert pkdot_loss(student, teacher, 1, shared=True).item() == pytest.approx(0, abs=1e-9)
    assert pkdot_loss(student, teacher, 1, shared=True, transport=False).item() == pytest.approx(1 / 2 * 2 / 4)


def landmarks(teacher, k, sign=1):
    """The k samples that are least similar to the batch on average, by loops; with sign -1 the most."""
    S = naive_similarity(teacher.numpy())
    mean = [sum(S[i][j] for i in range(len(S))) / len(S) for j in range(len(S))]
    return sorted(range(len(S)), key=lambda j: sign * mean[j])[:k]


@pytest.mark.parametrize("debias", [True, False])
@pytest.mark.parametrize("anchors, k", [("dissimilar", 3), ("similar", 2), ("dissimilar", 7)])
def test_shared_anchors_equal_a_naive_loop(anchors, k, debias):
    student, teacher, step = randn(7, 5), randn(7, 4, seed=1), 1e-4 * randn(7, 5, seed=2)
    chosen = landmarks(teacher, k, 1 if anchors == "dissimilar" else -1)
    z = student.clone().requires_grad_()
    loss = pkdot_loss(z, teacher, k, 0.5, debias, anchors, shared=True)
    loss.backward()
    low, expected, high = (naive_pkdot(student + s * step, teacher, lambda i, row: chosen, 0.5, debias)
                           for s in (-1, 0, 1))
    assert loss.item() == pytest.approx(expected, rel=1e-4, abs=1e-7)
    assert (z.grad * step).sum().item() == pytest.approx((high - low) / 2, rel=1e-2)


def test_shared_random_anchors_are_one_set_for_all_rows():
    student, teacher = randn(4, 4), randn(4, 4, seed=1)
    possible = [naive_pkdot(student, teacher, lambda i, row, c=c: c, 0.5, False)
                for c in itertools.combinations(range(4), 2)]
    found = set()
    for seed in range(20):
        torch.manual_seed(seed)
        near = np.abs(np.array(possible) - pkdot_loss(student, teacher, 2, 0.5, False, "random", shared=True).item())
        assert near.min() < 1e-5
        found.add(int(near.argmin()))
    assert len(found) > 3


@pytest.mark.parametrize("shared", [True, False])
def test_without_transport_row_i_is_compared_with_row_i(shared):
    student, teacher = randn(6, 5), randn(6, 4, seed=1)
    S, T, expected = naive_similarity(student.numpy()), naive_similarity(teacher.numpy()), 0
    for i in range(6):
        for j in landmarks(teacher, 2) if shared else ANCHORS["dissimilar"](2)(i, T[i]):
            expected += (S[i][j] - T[i][j]) ** 2 / 2 / 6
    assert pkdot_loss(student, teacher, 2, shared=shared, transport=False).item() == pytest.approx(expected)


@pytest.mark.parametrize("output, label", [
    (randn(4, 3), torch.full((4,), -1)), (randn(4, 2, 2), torch.full((4, 2, 2), math.nan, dtype=torch.float64))])
def test_a_batch_without_a_label_has_task_loss_0_and_no_gradient(output, label):
    output.requires_grad_()
    loss = task_loss(output, label)
    loss.backward()
    assert loss.item() == 0 and (output.grad == 0).all()


@pytest.fixture(scope="session")
def pairs(two_views):
    """The arrays of the two views, where every second sample has lost its label; and the part that each is in."""
    arrays = dict(np.load(two_views))
    part = data.parts(data.Features(two_views), 1)
    for name in ("train", "val", "test"):
        arrays["label"][np.flatnonzero(part == name)[::2]] = -1
    return arrays, part


def run_on(arrays, out, more="", student="--epochs 4 --batch-size 50"):
    """Teacher and student of fold 1: (path of the run, its checkpoints, its results lines by role)."""
    out.mkdir()
    np.savez(out / "views.npz", **arrays)
    assert call(train_teacher, f"--dataset features --root {out}/views.npz --out {out} --backbone-epochs 3 "
                               f"--fusion-epochs 5 --device cpu {more}") == 0
    run, = out.glob("features/*/fold1")
    assert call(train_student, f"--out {out} --device cpu {student}") == 0
    saved = {path.stem: torch.load(path, weights_only=True) for path in run.glob("*.pt")}
    return run, saved, {line["role"]: line for line in results(out)}


@pytest.fixture(scope="session")
def pairs_run(pairs, tmp_path_factory):
    return run_on(pairs[0], tmp_path_factory.mktemp("pairs") / "base")


def test_a_pair_without_a_label_counts_for_the_tnet_and_never_for_the_task(pairs, pairs_run, tmp_path):
    """The other way round: training pairs without a label get each other's privileged views. Only who is paired with
    whom has changed, so that neither stage 1 nor the fusion head nor a teacher's score may notice; the T-Net must."""
    arrays, part = pairs
    hidden = np.flatnonzero((part == "train") & (arrays["label"] < 0))
    privileged = arrays["privileged"].copy()
    privileged[hidden] = privileged[np.roll(hidden, 1)]
    run, other, lines = run_on(arrays | {"privileged": privileged}, tmp_path / "paired")
    base, saved, expected = pairs_run
    for name in ("visual", "privileged"):
        assert equal(saved[name]["model"], other[name]["model"]) and saved[name]["epoch"] == other[name]["epoch"]
    assert equal(saved["teacher"]["head"], other["teacher"]["head"])
    assert saved["teacher"]["scores"] == other["teacher"]["scores"]
    assert [x["loss"] for x in logged(base, "fusion")] == [x["loss"] for x in logged(run, "fusion")]
    assert not equal(saved["teacher"]["tnet"], other["teacher"]["tnet"])
    assert [x["tnet_loss"] for x in logged(base, "fusion")] != [x["tnet_loss"] for x in logged(run, "fusion")]


def test_more_pairs_leave_stage_1_as_it_is(pairs, pairs_run, monkeypatch, tmp_path):
    """Forty further pairs, of the training samples' groups; their mean and deviation apart, which need no label."""
    arrays, part = pairs
    rng, train = np.random.default_rng(0), np.flatnonzero(part == "train")
    more = {"visual": rng.normal(size=(40, 1, 12)).astype(np.float32), "label": np.full(40, -1),
            "privileged": rng.normal(size=(40, 1, 9)).astype(np.float32), "group": train[:40]}
    arrays = arrays | {"group": np.arange(240)}
    monkeypatch.setattr(train_teacher, "mean_and_std", lambda batches: (torch.zeros(()), torch.ones(())))
    saved = [run_on(content, tmp_path / name)[1] for name, content in (
        ("few", arrays), ("many", {key: np.concatenate([arrays[key], more[key]]) for key in arrays}))]
    for name in ("visual", "privileged"):
        assert equal(saved[0][name]["model"], saved[1][name]["model"])


def test_what_has_no_label_is_never_scored_and_chooses_no_epoch(pairs, pairs_run, tmp_path):
    """Validation and test samples without a label become nonsense: no score, no choice by a score may notice."""
    arrays, part = pairs
    nonsense = np.flatnonzero((part != "train") & (arrays["label"] < 0))
    visual = arrays["visual"].copy()
    visual[nonsense] *= -50
    run, other, lines = run_on(arrays | {"visual": visual}, tmp_path / "nonsense", student="--epochs 4 --method none")
    base, saved, expected = pairs_run
    count = (arrays["label"][part == "test"] >= 0).sum()
    for role in ("visual", "privileged", "multimodal"):
        assert lines[role]["accuracy"] == expected[role]["accuracy"] and lines[role]["n_test"] == count
    assert lines["student"]["n_test"] == count and count < (part == "test").sum()
    for name in ("visual", "privileged"):
        assert saved[name]["epoch"] == other[name]["epoch"] and saved[name]["score"] == other[name]["score"]
    for a, b in zip(logged(base, "fusion"), logged(run, "fusion"), strict=True):
        assert a["accuracy"] == b["accuracy"] and a["tnet_val_mse"] != b["tnet_val_mse"]  # no label: the T-Net's own


def test_the_students_terms_are_over_labelled_samples_and_over_all_pairs(pairs, pairs_run, tmp_path):
    """One step on all training samples: L_gt and W (cosine) of the student as it began, in numpy."""
    arrays, part = pairs
    run, saved, _ = pairs_run
    whole = (part == "train").sum()
    args = train_student.parse(f"--method cosine --epochs 1 --batch-size {whole} --out {tmp_path}".split())
    vars(args).update({"lam": 0.4, "device": torch.device("cpu"), "rank": 0, "world": 1})
    features, before = data.Features(run / "features.npz"), {}
    samples = data.Windows(torch.from_numpy(np.flatnonzero(part == "train"))[:, None], None, None)

    def watch(epoch, predict):
        before.setdefault("z", predict(samples, "z").numpy()), before.setdefault("output", predict(samples).numpy())

    shutil.copytree(run, tmp_path / "copy/c4/fold1")
    train_student.distil(train_student.open_teacher(tmp_path / "copy/c4/fold1/teacher.pt"), args, watch=watch)
    head = models.ConcatFusion(4)
    head.load_state_dict(saved["teacher"]["head"])
    with torch.no_grad():
        z = head(*(features.rows[m][samples.index] for m in ("visual", "privileged"))).z.numpy()
    label = arrays["label"][part == "train"]
    loss_gt = -np.mean([np.log(softmax(o)[c]) for o, c in zip(before["output"], label, strict=True) if c >= 0])
    W = np.mean([1 - a @ b / math.sqrt((a @ a) * (b @ b)) for a, b in zip(before["z"], z, strict=True)])
    line = logged(tmp_path / "copy/c4/fold1", "student")[-1]
    assert (line["loss_gt"], line["w"]) == (pytest.approx(loss_gt, rel=1e-4), pytest.approx(W, rel=1e-4))


def test_few_labels_are_the_same_for_every_stage_method_and_seed(two_views, tmp_path, monkeypatch):
    seen, losses = {}, []

    def counting(output, label):
        losses.append(int((label >= 0).sum()))
        return task_loss(output, label)

    def watching(answers, batches, label, *rest, before=train_student.train_epoch):
        seen.setdefault((rest[-1].method, rest[-1].seed), []).append(label.tolist())
        return before(answers, batches, label, *rest)

    monkeypatch.setattr(train_teacher, "task_loss", counting)
    monkeypatch.setattr(train_student, "train_epoch", watching)
    whole, part = np.load(two_views)["label"], data.parts(data.Features(two_views), 1)
    shown = []
    for seed in (0, 1):
        assert call(train_teacher, f"--dataset features --root {two_views} --labelled 20 --seed {seed} --device cpu "
                                   f"--backbone-epochs 1 --fusion-epochs 1 --out {tmp_path}") == 0
        assert losses[:2] == [20, 20] and sum(losses[2:]) == 20  # two backbones, then the fusion head in batches of 64
        losses.clear()
        for method in ("none", "kl"):
            assert call(train_student, f"--method {method} --seed {seed} --epochs 1 --device cpu --out {tmp_path}") == 0
    assert {path.name for path in tmp_path.glob("features/*")} == {"c4-20labels", "c4-20labels-seed1"}
    labels = [label for epochs in seen.values() for label in epochs]
    assert len(seen) == 4 and all(label == labels[0] for label in labels)
    shown, true = np.array(labels[0]), whole[part == "train"]
    assert (shown >= 0).sum() == 20 and len(shown) == 168 and (shown[shown >= 0] == true[shown >= 0]).all()


def test_finetuning_a_features_file_trains_its_mlp(views_run, tmp_path):
    out = tmp_path / "runs"
    shutil.copytree(views_run.parents[2], out)
    more = "--finetune --chunk 50 --epochs 1 --batch-size 64 --device cpu"
    assert call(train_student, f"--out {out} --method mse {more}") == 0
    student = torch.load(out / "features/c4/fold1/student-mse.pt", weights_only=True)["model"]
    visual = train_teacher.backbone_weights(torch.load(views_run / "visual.pt", weights_only=True))
    for key, value in visual.items():
        assert torch.equal(student[f"backbone.{key}"], value) == (key in ("mean", "std"))
    tnet = torch.load(views_run / "teacher.pt", weights_only=True)["tnet"]
    assert all(torch.equal(student[f"tnet.{key}"], value) for key, value in tnet.items())


def test_lambda_is_chosen_on_validation_alone_and_named(two_views, tmp_path, capsys):
    """Test labels change places: what is chosen, and all else that training shows, stays."""
    arrays, part = dict(np.load(two_views)), data.parts(data.Features(two_views), 1)
    test, chosen, shown, scores = np.flatnonzero(part == "test"), [], [], []
    for name in ("true", "permuted"):
        out = tmp_path / name
        out.mkdir()
        np.savez(out / "views.npz", **arrays)
        table = f"--table 2 --dataset features --root {out}/views.npz --out {out} --fold 1 --lambda 0 3 40 --epochs 2"
        assert call(train_student, f"{table} --lr 1e-3 --batch-size 64 --device cpu") == 0
        lines = [line for line in results(out) if line["role"] == "student"]
        assert len(lines) == 6 * 3 + 1  # every method, but for `none` once
        best = {}
        for line in lines:  # the first of those that are best on validation
            key = line["method"], line["shared"]
            if key not in best or line["validation"] > best[key]["validation"]:
                best[key] = line
        rows = {"cosine": "Cosine similarity [10]", "mse": "MSE [8]", "kl": "KL [8]", "rkd": "RKD [31]",
                "pkdot": "PKDOT"}
        text = capsys.readouterr().out
        for (method, shared), line in best.items():
            label = rows.get(method, "none (lambda 0)") + ", shared anchors" * shared
            assert f"| {label} | {line['accuracy']:.2f} (1 fold x 1 seed) |" in text
            named = f"- lambda chosen on validation, {label}, views accuracy: {line['lambda']:g} (fold 1, seed 0)\n"
            assert (named in text) == (method != "none")
        chosen.append({key: line["lambda"] for key, line in best.items()})
        shown.append([(line["validation"], line["epoch"]) for line in lines])
        scores.append([line["accuracy"] for line in lines])
        arrays["label"][test] = arrays["label"][np.roll(test, 1)]
    assert chosen[0] == chosen[1] and shown[0] == shown[1] and scores[0] != scores[1]
    assert len(set(chosen[0].values())) > 1  # there was something to choose


def test_the_interval_over_five_folds_is_nadeau_and_bengios():
    """Differences 1 to 5: mean 3, variance 2.5; (1/5 + 1/4) 2.5 = 1.0607^2; t(0.975, 4) = 2.77645."""
    ours, theirs = {(f, 0): 10.0 + f for f in range(1, 6)}, {(f, 0): 10.0 for f in range(1, 6)}
    assert train_student.interval(ours, theirs) == pytest.approx((3, 3 - 2.944869, 3 + 2.944869), abs=1e-5)
    folds = "intervals over folds are corrected for\nthe training data that folds share (Nadeau and Bengio 2003)."
    table = train_student.TABLES["5"]
    text = train_student.format_table(table, cells_of(table, PKDOT=ours, none=theirs))
    assert text.endswith(folds) and "[+0.06, +5.94]\n" in text


@pytest.mark.parametrize("script, line, named", [
    (train_teacher, "--dataset features --root {good} --labelled 169", ["{good}", "169", "to 168"]),
    (train_teacher, "--dataset features --root {good} --labelled 3", ["{good}", "3 training labels", "from 4"]),
    (train_teacher, "--dataset features --root {good} --labelled 0", ["--labelled", "0"]),
    (train_teacher, "--dataset features --root {below}", ["{below}", "[-2, 0"]),
    (train_teacher, "--dataset features --root {hidden}", ["{hidden}", "-1 for no label"]),
    (train_teacher, "--dataset features --root {untold}", ["{untold}", "no sample with a label in the train part"]),
    (train_student, "--out {views} --labelled 20", ["--labelled", "train_teacher.py"]),
    (train_student, "--out {views} --folds clips", ["--folds", "train_teacher.py"]),
    (train_student, "--out {views} --lambda 0.1 0.4", ["--lambda", "--table"]),
    (train_student, "--out {views} --lambda", ["--lambda"]),
    (train_student, "--out {views} --root {other}", ["is a teacher of {good}, not of {other}"]),
    (train_student, "--out {views} --root {other} --finetune", ["{other}", "not those that the teacher was trained on"]),
    (train_student, "--out {views} --student {good}", ["--student is for --predict"]),
    (train_student, "--out {views} --seeds 2", ["--seeds", "--table"]),
    (train_teacher, "--dataset features --root {out}/no.npz", ["{out}/no.npz: no such file"]),
    (train_student, "--out {views} --figure 5 --lambda 0.1 0.4 --dataset features --root {good}", ["--lambda", "one"]),
    (train_student, "--table 5 --dataset features --root {good} --labelled 3 --out {out}", ["{good}", "from 4"]),
    (train_student, "--table 5 --dataset features --root {good} --labelled 900 --out {out}", ["{good}", "to 168"])])
def test_labels_and_lambdas_that_do_not_fit_are_one_line(script, line, named, two_views, views_run, tmp_path, capsys):
    arrays, part = dict(np.load(two_views)), data.parts(data.Features(two_views), 1)
    files = {"views": views_run.parents[2], "good": two_views, "out": tmp_path / "out"}
    for name, where, value in (
            ("below", part == "test", -2), ("hidden", part != "", -1), ("untold", part == "train", -1)):
        files[name] = tmp_path / f"{name}.npz"
        np.savez(files[name], **arrays | {"label": np.where(where, value, arrays["label"])})
    files["other"] = tmp_path / "other.npz"
    np.savez(files["other"], **arrays | {"visual": arrays["visual"] + 1})
    assert call(script, f"{line} --device cpu".format(**files)) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and "Traceback" not in shown
    assert all(name.format(**files) in shown for name in named), shown


def test_positive_control(tmp_path, capsys):
    """A problem in which there is something to transfer. The visual view falls into 100 clusters at random places, of
    which nothing but the privileged view says which belong together: it is the class and a little noise. 60 samples
    have a label, fewer than there are clusters; 700 pairs show them all. The student may move (--finetune), and is
    trained until it has (60 epochs are 300 steps).

    Lambda is chosen as a table chooses it, on validation, for each method from the same values (with seed 0). That
    rule, the number of epochs and the draw of the problem were fixed before their first run. Per-row anchors are
    recorded beside the others, whatever they do."""
    rng = np.random.default_rng(1)
    cluster = rng.permutation(1000) % 100
    label, place = cluster % 4, rng.normal(size=(100, 20))
    np.savez(tmp_path / "pairs.npz", label=label,
             visual=(place[cluster] + 0.5 * rng.normal(size=(1000, 20)))[:, None].astype(np.float32),
             privileged=(np.eye(4)[label] + 0.1 * rng.normal(size=(1000, 4)))[:, None].astype(np.float32))
    common = f"--device cpu --out {tmp_path}"
    assert call(train_teacher, f"--dataset features --root {tmp_path}/pairs.npz --labelled 60 {common}") == 0
    bounds = {line["role"]: line["accuracy"] for line in results(tmp_path)}
    assert bounds["visual"] + 30 < bounds["multimodal"]

    def student(flags, lam, seed):
        assert call(train_student, f"{flags} --lambda {lam} --seed {seed} --finetune --epochs 60 {common}") == 0
        return results(tmp_path)[-1]

    found = {}
    for name, flags in {"none": "--method none", "kl": "--method kl", "cosine": "--method cosine",
                        "shared": "--shared-anchors", "per row": ""}.items():
        tried = [student(flags, lam, 0) for lam in ((0.4,) if name == "none" else (0.1, 0.4, 1, 4, 10))]
        chosen = max(tried, key=lambda line: line["validation"])
        found[name] = [chosen["accuracy"],
                       *(student(flags, chosen["lambda"], seed)["accuracy"] for seed in range(1, 5))]
    capsys.readouterr()
    for name, scores in found.items():
        gain, spread = np.mean(scores) - np.mean(found["none"]), max(np.std(x, ddof=1) for x in (scores, found["none"]))
        print(f"{name}: {np.mean(scores):.1f}, {gain:+.1f} over none, spread {spread:.1f}")
        assert name in ("none", "per row") or gain > spread, (name, found)


# ------------------------------------------------------------------------------------------------------------ tables


def cells_of(table, **found):
    """Results lines of a table's cells: {label of a row: {(fold, seed): accuracy in the first column}}."""
    cells, column = train_student.empty_cells(table, train_student.parse([])), table.columns[0]
    for label, runs in found.items():
        cells[next(name for name, _ in cells if name.startswith(label)), column.heading].runs.update({
            key: {"accuracy": value, "synthetic": False, "dataset": column.dataset, "fusion": "concat"}
            for key, value in runs.items()})
    return cells


def test_a_known_table():
    """Means, standard deviations and intervals worked out by hand."""
    table = train_student.TABLES["2"]
    cells = cells_of(table,
                     PKDOT={(1, 0): 80.0, (1, 1): 82.0, (2, 0): 70.0, (2, 1): 72.0},  # mean 76, sd 5.887841
                     Cosine={(1, 0): 79.0, (1, 1): 79.0, (2, 0): 66.0, (2, 1): 66.0})  # 2 behind, and 5
    text = train_student.format_table(table, cells)
    lines = text.splitlines()
    assert "| PKDOT | 78.76 | 76.00 ± 5.89 (2 folds x 2 seeds) | 0.43 | not run | 0.56 | not run |" in lines
    assert "| Cosine similarity [10] | 75.40 | 72.50 ± 7.51 (2 folds x 2 seeds) | 0.37 | not run | 0.53 | not run |" in lines
    assert "| KL [8] | 75.80 | not run | N/A | n/a | N/A | n/a |" in lines
    # folds' means 2 and 5: mean 3.5, variance 4.5, Nadeau and Bengio's (1/2 + 1/4) 4.5 = 1.8371^2, t(0.975, 1) = 12.7062
    assert ("- PKDOT minus Cosine similarity [10], BioVid (B) accuracy: +3.50, "
            "95 % interval over folds [-19.84, +26.84], inside the noise") in lines
    assert lines[2].endswith("WES, fusion concat") and lines[3].endswith("WES, fusion -")  # what ran, and what did not
    assert "SYNTHETIC" not in text
    for record in cells["Cosine similarity [10]", "BioVid (B) accuracy"].runs.values():
        record["synthetic"] = True
    assert train_student.format_table(table, cells).startswith("**SYNTHETIC DATA - ")


def test_a_difference_without_spread_is_not_called_significant():
    table = train_student.TABLES["5"]
    cells = cells_of(table, PKDOT={(1, 0): 80.0, (2, 0): 70.0}, none={(1, 0): 82.5, (2, 0): 72.5})
    text = train_student.format_table(table, cells)
    assert "-2.50, 95 % interval over folds [-2.50, -2.50], inside the noise" in text


def test_seeds_are_what_varies_with_a_single_fold():
    pkdot = {(1, seed): value for seed, value in enumerate((0.5, 0.6, 0.7))}
    # differences 0.1, 0.1, 0.4: mean 0.2, standard error 0.1, t(0.975, 2) = 4.30265
    mean, low, high = train_student.interval(pkdot, {(1, 0): 0.4, (1, 1): 0.5, (1, 2): 0.3})
    assert (mean, low, high) == pytest.approx((0.2, 0.2 - 0.430265, 0.2 + 0.430265), abs=1e-5)
    assert train_student.interval({(1, 0): 1.0}, {(1, 0): 2.0}) is None


def test_a_bound_pairs_with_every_seed():
    ours = {(1, 0): 3.0, (1, 1): 5.0, (2, 0): 1.0, (2, 1): 1.0}  # fold means of the difference: 3 and 1
    assert train_student.interval(ours, {(1, None): 1.0, (2, None): 0.0})[0] == pytest.approx(2.0)


def test_only_lines_with_the_same_settings_count():
    settings = {"dataset": "biovid_b", "synthetic": False, "fold": 2}
    teacher = {"settings": settings, "weights": "a-b-c-d"}
    args = train_student.with_flags(train_student.parse(["--seed", "3"]), lam=0.4)
    good = {"role": "student", **settings, **train_student.identity(args, teacher)}
    assert good["lambda"] == 0.4 and good["epochs"] == 20
    other = {"role": "visual", "dataset": "biovid_a", "synthetic": True, "fold": 1, "epsilon": 0.2, "seed": 2,
             "lambda": 0.6, "anchors": "random", "shared": True, "finetune": True, "teacher": "x", "code": "y"}
    wrong = [{**good, key: value, "accuracy": 1.0} for key, value in other.items()]
    assert train_student.student_of(teacher, args, wrong) is None
    equal = [{**good, "accuracy": 2.0}, {**good, "accuracy": 3.0}]
    assert train_student.student_of(teacher, args, equal + wrong)["accuracy"] == 3.0


@pytest.mark.parametrize("name", [*train_student.TABLES, *train_student.FIGURES])
def test_every_table_and_figure_prints_without_a_single_run(name):
    table = {**train_student.TABLES, **train_student.FIGURES}[name]
    lines = train_student.format_table(table, cells_of(table)).splitlines()
    ours = [row for row in table.rows if row.flags is not None]
    assert lines[0] == f"**{table.title}**" and len(lines) >= len(table.rows) + 2
    assert sum("not run" in row for row in lines) == len(ours)
    assert sum("n/a" in row for row in lines) == (name == "2")  # KL has no valence and arousal


def test_the_papers_numbers():
    """Tables II to V as printed, row by row."""
    printed = {name: {row.label: tuple(row.paper.values()) for row in table.rows}
               for name, table in train_student.TABLES.items()}
    assert printed["2"] == {
        "Cosine similarity [10]": ("75.40", "0.37", "0.53"), "MSE [8]": ("N/A", "0.39", "0.53"),
        "KL [8]": ("75.80", "N/A", "N/A"), "PKDOT": ("78.76", "0.43", "0.56"),
        "PKDOT, shared anchors": (), "RKD [31]": (), "none (lambda 0)": (), "Visual only (lower bound)": (),
        "Multimodal (upper bound)": ()}
    assert printed["3"] == {
        "ResNet-50 [44]": ("0.31", "0.17"), "SENet-50 [45]": ("0.28", "0.34"), "MobileNet [46]": ("0.28", "0.44"),
        "RegNet + GRU [47]": ("0.43", "0.57"), "ResNeXt + SENet [48]": ("0.51", "0.48"),
        "Visual only (lower bound)": ("0.41", "0.51"), "none (lambda 0)": (), "PKDOT": ("0.43", "0.56"),
        "Multimodal (upper bound)": ("0.67", "0.59")}
    assert printed["4"] == {
        "Sparse LSTM [19]": ("61.70", "29.70"), "ViT [18]": ("72.11", "NR"), "FAD + RF [49]": ("72.40", "30.80"),
        "GNN [50]": ("73.20", "NR"), "ViT [51]": ("73.28", "31.52"), "ResNet-18 [52]": ("NR", "36.60"),
        "Visual only (lower bound)": ("72.10", "30.38"), "none (lambda 0)": (), "PKDOT": ("74.55", "33.65"),
        "Multimodal (upper bound)": ("83.50", "36.40")}
    assert printed["5"] == {
        "Handcrafted + RF [22]": ("72.70",), "Visual only (lower bound)": ("74.10",), "none (lambda 0)": (), "PKDOT": ("78.76",),
        "Multimodal (upper bound)": ("81.30",)}


def test_a_torn_last_line_loses_nothing_else(tmp_path, capsys):
    path = tmp_path / "results.jsonl"
    train_teacher.append_line(path, {"a": 1})
    with open(path, "a") as file:
        file.write('{"a": 2, "met')  # killed while writing
    train_teacher.append_line(path, {"a": 3})
    assert train_student.read_results(path) == [{"a": 1}, {"a": 3}]
    assert "line 2" in capsys.readouterr().err


def test_a_sweep_trains_exactly_what_is_missing(two_views, tmp_path, monkeypatch, capsys):
    trained, distil = [], train_student.distil

    def counting(teacher, args, **more):
        trained.append((teacher["path"].parent.name, args.method, args.seed))
        return distil(teacher, args, **more)

    monkeypatch.setattr(train_student, "distil", counting)
    table = f"--table 2 --dataset features --root {two_views} --out {tmp_path} --epochs 1 --device cpu --batch-size 64"
    assert call(train_student, table) == 0
    methods = [*train_student.METHODS, "pkdot"]  # with anchors of each row's own, and shared
    assert sorted(trained) == sorted((f"fold{f}", m, 0) for f in range(1, 6) for m in methods)
    assert "(5 folds x 1 seed)" in capsys.readouterr().out
    trained.clear()
    lines = (tmp_path / "results.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "results.jsonl").write_text("".join(lines[:-1]))
    assert call(train_student, table) == 0
    gone = json.loads(lines[-1])
    assert trained == [(f"fold{gone['fold']}", gone["method"], 0)]
    trained.clear()
    assert call(train_student, table + " --seeds 2") == 0
    assert len(trained) == 35 and {seed for _, _, seed in trained} == {1}
    trained.clear()
    assert call(train_student, table + " --epsilon 0.2") == 0  # counts for all: a setting of every run
    assert len(trained) == 35
    trained.clear()
    assert call(train_student, table + " --fresh") == 0
    assert len(trained) == 35


def test_a_table_stands_on_the_teachers_that_are_there(two_views, tmp_path, capsys):
    teacher = f"--dataset features --root {two_views} --out {tmp_path} --device cpu --backbone-epochs 1"
    assert call(train_teacher, f"{teacher} --fusion mmt --fold 2 --fusion-epochs 2") == 0
    table = f"--table 5 --dataset features --root {two_views} --out {tmp_path} --epochs 1 --device cpu --batch-size 64"
    assert call(train_student, table) == 0
    out = capsys.readouterr().out
    assert "- features/c4-mmt: teachers with backbone_epochs 1, fusion_epochs 2, fusion mmt\n" in out
    assert "privileged, fusion mmt\n" in out
    folds = [train_teacher.load(path, "teacher")["settings"] for path in tmp_path.glob("features/*/fold*/teacher.pt")]
    assert len(folds) == 5 and {(s["fusion"], s["fusion_epochs"]) for s in folds} == {("mmt", 2)}
    few = train_student.parse(f"{table} --labelled 60 --fold 1".split())
    (path,) = train_student.teacher_settings(few)[1]  # one head for every number of labels
    assert path == tmp_path / "features" / "c4-mmt-60labels" / "fold1" / "teacher.pt"
    before = {path: path.read_bytes() for path in tmp_path.glob("features/*/fold*/*.pt")}
    assert call(train_teacher, f"{teacher} --fold 2 --fusion-epochs 2") == 0  # another head overwrites nothing
    assert before == {path: path.read_bytes() for path in before}
    capsys.readouterr()
    assert call(train_student, table) == 0  # and is what the next table stands on
    assert "privileged, fusion concat\n" in capsys.readouterr().out


def test_without_data_a_table_has_the_paper_alone(tmp_path, capsys):
    assert call(train_student, f"--table 3 --root {tmp_path / 'none'} --out {tmp_path} --device cpu") == 2
    out, err = capsys.readouterr()
    assert "0.43 | not run" in out and str(tmp_path / "none") in err


def test_figures_are_written(biovid_run, stand_in, capsys, monkeypatch):
    out = biovid_run.parents[2]
    monkeypatch.setattr(train_student, "ensure_teachers", lambda *_: [
        train_student.open_teacher(biovid_run / "teacher.pt")])
    common = f"--out {out} --root {stand_in} --epochs 1 --device cpu --dataset biovid_b"
    assert call(train_student, f"--figure 5 {common}") == 0
    with np.load(out / "figure5-biovid_b-synthetic.npz", allow_pickle=False) as S:
        assert list(S) == ["teacher", "student, epoch 0", "student, epoch 1"]
        for matrix in S.values():  # of the 14 training samples
            assert matrix.shape == (14, 14) and np.allclose(matrix, matrix.T) and np.allclose(matrix.diagonal(), 1)
    assert call(train_student, f"--figure 7 {common}") == 0
    header, *rows = (out / "figure7-biovid_b-synthetic.csv").read_text().splitlines()
    assert header == "row,column,mean,sd,runs,difference,low,high,data"
    assert [row.split(",")[0] for row in rows][:2] == ["epsilon 0.001", "epsilon 0.01"]
    assert all(row.split(",")[1] == "BioVid (B) accuracy" and row.endswith(",SYNTHETIC") for row in rows)
    assert "SYNTHETIC DATA - Figure 7" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------- face crops from videos

LEVEL, STEP, SIDE = 10, 1.5, 112  # frame j's background is LEVEL + STEP * j; the drawn face's side in pixels
SIGHT = 20  # the least red minus blue of skin: 75 as drawn, 0 for the gray behind it


@pytest.fixture
def cv2():
    forget = data.face_detector.cache_clear
    forget()
    yield pytest.importorskip("cv2")
    forget()


def film(cv2, path, fps=25, frames=75, hidden=(), size=(320, 240), start=(60, 60), drift=1.0, codec="mp4v"):
    """A video of one of the stand-in's faces that drifts to the right, over a gray that tells the frame."""
    path.parent.mkdir(parents=True, exist_ok=True)
    still = np.zeros(1)
    face = data.draw_faces(np.zeros(8), [still, still + 0.3, still - 0.3, still])[0].repeat(2, 0).repeat(2, 1)
    face[68:78, 28:38] = 0, 255, 0  # on the cheek that is left in the image
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*codec), fps, size)
    assert writer.isOpened()
    for j in range(frames):
        image = np.full((size[1], size[0], 3), round(LEVEL + STEP * j), np.uint8)
        if j not in hidden:
            x, y = round(start[0] + drift * j), start[1]
            skin = face.astype(int).max(2, keepdims=True) > 80  # the gray of the drawing's corners goes
            part = image[y:y + SIDE, x:x + SIDE]
            part[:] = np.where(skin, face, part)
        writer.write(image[..., ::-1])
    writer.release()
    return path


def tear(path):
    """Overwrite the second half of a film, all but the index at its end."""
    content = path.read_bytes()
    middle, end = len(content) // 2, content.rindex(b"moov") - 4
    path.write_bytes(content[:middle] + np.random.default_rng(0).bytes(end - middle) + content[end:])


def crop(line):
    return call(data, f"--crop {line}")


def crops_in(folder):
    """{number: RGB image} of a sample's folder."""
    return {int(path.stem[4:]): np.asarray(Image.open(path)).astype(float) for path in folder.glob("*.jpg")}


def grays_of(cv2, path):
    """The gray of each frame of a film, by a plain loop over it."""
    video, found = cv2.VideoCapture(str(path)), []
    while True:
        more, image = video.read()
        if not more:
            return found
        found.append(image[:20].mean())


def nearest(number, fps, frames):
    """The frames that are nearest to the time of image `number`; two if it lies half-way."""
    away = [abs(Fraction(j, fps) - Fraction(number - 1, 25)) for j in range(frames)]
    return [j for j in range(frames) if away[j] == min(away)]


@pytest.mark.parametrize("fps", [25, 30])
def test_crop_finds_the_faces_of_a_video_where_and_when_they_are(tmp_path, monkeypatch, capsys, cv2, fps):
    count = 3 * fps
    lone = {25: 31, 30: 36}[fps]  # only image 32 or 31 is cut from this frame
    lost = range(count - 20, count - 8)
    video = film(cv2, tmp_path / "video" / NAME[:11] / f"{NAME}.mp4", fps, count, [lone, *lost], drift=25 / fps,
                 codec="MJPG")  # whose grays are true
    grays = grays_of(cv2, video)
    assert len(grays) == count
    bio_csv(tmp_path / "biosignals_filtered" / NAME[:11] / f"{NAME}_bio.csv")
    assert crop(f"{tmp_path / 'video'} --root {tmp_path} --workers 0") == 0

    images = crops_in(tmp_path / "faces" / NAME[:11] / NAME)
    source = {i: nearest(i, fps, count) for i in range(1, 76)}
    assert set(images) == {i for i in source if source[i][0] not in lost}
    for i, image in images.items():
        assert image.shape == (112, 112, 3)
        corners = np.r_[0:6, 106:112]
        told = np.interp(image[np.ix_(corners, corners)].mean(), grays, range(count))
        assert min(abs(told - j) for j in source[i]) < 0.4
        if lone in source[i]:
            continue  # no face to measure
        cheek = np.argwhere((image[..., 1] > 150) & (image[..., 0] < 100)).mean(0)
        assert 56 < cheek[0] < 75 and 25 < cheek[1] < 45
        rows, columns = np.nonzero(image[..., 0] - image[..., 2] > SIGHT)
        left, right, top, bottom = columns.min(), columns.max(), rows.min(), rows.max()
        assert abs(left + right - 111) / 2 < 7 and abs(top + bottom - 111) / 2 < 7  # in the middle
        assert 0.6 < (bottom - top) / 112 < 0.95 and 0.7 < (right - left) / (bottom - top) < 0.95  # with a margin

    out = capsys.readouterr().out
    assert f"   {len(images)} {NAME}\n" in out
    assert out.endswith(f"1 videos, 0 there already, 0 failed; 75 frames, {75 - len(images)} without a face\n")
    biovid(tmp_path, names=(NAME.replace("BL1", "PA4"),))  # one of full length: the folders are not cut to 2-5 s
    code, lines = run_check("biovid_b", tmp_path, monkeypatch, capsys)
    assert code == 0 and lines[-1] == "0 faults"


def eyes_apart(image):
    """A stand-in for YuNet: the eyes are a green and a blue dot, wide apart."""
    found = [np.argwhere((image[..., c] > 150) & (image[..., 2] < 100)) for c in (1, 0)]
    (y1, x1), (y2, x2) = (dots.mean(0) for dots in found)
    box = (x1 + x2) / 2 - 40, (y1 + y2) / 2 - 50, 80, 100
    return np.array([[5, 5, 9, 9, 0, 9, 0, 0, *[0] * 7], [*box, x1, y1, x2, y2, *[0] * 7]], np.float32)


@pytest.mark.parametrize("degrees", [-25, 0, 40])
@pytest.mark.parametrize("centre", [(160, 120), (10, 230)])
def test_crop_levels_the_eyes_and_takes_the_largest_face(tmp_path, monkeypatch, cv2, degrees, centre):
    """Half of the face may lie outside of the frame."""
    turn = np.array([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))]) * 25
    image = np.full((240, 320, 3), 60, np.uint8)
    offsets = (-turn, turn) if centre == (160, 120) else (np.array([0.0, 0]), 2 * turn * [1, -np.sign(degrees)])
    points = [np.round(np.add(centre, offset)).astype(int) for offset in offsets]
    for point, colour in zip(points, ((0, 255, 0), (255, 0, 0)), strict=True):
        cv2.circle(image, point.tolist(), 6, colour, -1)
    detect = eyes_apart(image)
    monkeypatch.setattr(data, "face_detector", lambda file: lambda frame: detect)
    monkeypatch.setattr(data, "video_frames", lambda path: iter([image]))
    (tmp_path / "me.mp4").touch()
    assert crop(f"{tmp_path / 'me.mp4'} --root {tmp_path} --workers 0") == 0

    image = crops_in(tmp_path / "faces" / "me")[1]
    (y1, x1), (y2, x2) = (np.argwhere((image[..., c] > 120) & (image[..., 0] < 80)).mean(0) for c in (1, 2))
    apart = np.linalg.norm(detect[1, 6:8] - detect[1, 4:6]) * 112 / (1.2 * 100)
    assert abs(y1 - y2) < 1 and abs(x2 - x1 - apart) < 1.5
    assert abs((x1 + x2) / 2 - 55.5) < 1 and abs((y1 + y2) / 2 - 55.5) < 1
    assert (image.max(2) < 20).any() == (centre != (160, 120))  # black beyond the frame


def test_smooth_faces_is_the_median_of_what_is_there():
    rng = np.random.default_rng(0)
    faces = rng.normal(size=(60, 4)) * [20, 20, 5, 3] + [300, 200, 150, 0]
    missing = {0, 10, 20, 21, 30, 32, 58, 59}
    known = {i: faces[i].tolist() for i in range(60) if i not in missing}
    for i in (10, 30, 32):
        known[i] = [(a + b) / 2 for a, b in zip(faces[i - 1], faces[i + 1], strict=True)]
    faces[list(missing)] = np.nan
    smooth = data.smooth_faces(faces)
    assert smooth.keys() == known.keys()
    for i, face in smooth.items():
        near = [known[j] for j in range(i - 6, i + 7) if j in known]  # 13 images, 0.52 s
        np.testing.assert_allclose(face, [statistics.median(column) for column in zip(*near, strict=True)])
    assert not data.smooth_faces(np.full((3, 4), np.nan)) and list(data.smooth_faces(np.ones((1, 4)))) == [0]


@pytest.mark.parametrize("stamps, rate, seconds", [
    ([0, 0.03, 0.11, 0.13, 0.3, 0.34, 0.36], 25, None),  # a variable rate, as phones have
    ([0, 0.02, 0.04, 0.06, 0.08, 0.10, 0.12], 25, None),  # the file's rate is wrong
    ([0] * 7, 10, [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6]),  # none at all
    ([0, 0.1, 0.2, 0, 0], 10, [0, 0.1, 0.2, 0.3, 0.4]),  # lost at the end
    ([0, 0.1, 1e6, 2e6], 10, [0, 0.1, 0.2, 0.3])])  # broken ones
def test_a_video_is_read_by_its_time_stamps(monkeypatch, cv2, stamps, rate, seconds):
    class Video:
        def __init__(self, path):
            self.position = -1

        def read(self):
            self.position += 1
            more = self.position < len(stamps)
            return more, np.full((2, 2, 3), self.position, np.uint8) if more else None

        def get(self, what):
            stamp = stamps[min(self.position, len(stamps) - 1)] * 1000
            return {cv2.CAP_PROP_FPS: rate, cv2.CAP_PROP_POS_MSEC: stamp, cv2.CAP_PROP_FRAME_COUNT: len(stamps)}[what]

    monkeypatch.setattr(cv2, "VideoCapture", Video)
    shown = [int(frame[0, 0, 0]) for frame in data.video_frames("a")]
    seconds = np.array(seconds or stamps)
    for i, frame in enumerate(shown):
        away = np.abs(seconds - i / 25)
        assert away[frame] < away.min() + 1e-9
    assert abs(len(shown) / 25 - seconds[-1] - 0.5 / rate) < 0.041  # to the end of the last frame, no further


@pytest.mark.parametrize("size, shape", [((320, 240), (240, 320, 3)), ((1280, 960), (480, 640, 3))])
def test_large_frames_of_a_video_are_shrunk_and_small_ones_are_not(tmp_path, cv2, size, shape):
    frames = list(data.video_frames(film(cv2, tmp_path / "a.mp4", frames=3, size=size)))
    assert [frame.shape for frame in frames] == [shape] * 3


def gray_finder(image):
    """A detector that costs nothing: a face in each image but a white one."""
    return [] if image.mean() > 240 else [[100, 60, 100, 100]]


def test_crop_names_each_video_that_fails_and_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys, cv2):
    monkeypatch.setattr(data, "face_detector", lambda file: gray_finder)
    videos = tmp_path / "videos"
    good = film(cv2, videos / "good.mp4").read_bytes()
    tear(film(cv2, videos / "torn.mp4"))
    (videos / "short.mp4").write_bytes(good[:len(good) // 2])
    (videos / "text.mp4").write_text("no video")
    (videos / "empty.AVI").touch()
    writer = cv2.VideoWriter(str(videos / "white.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 25, (320, 240))
    [writer.write(np.full((240, 320, 3), 255, np.uint8)) for _ in range(9)]
    writer.release()
    left = tmp_path / "faces" / ".good.tmp"  # by a run that was killed
    left.mkdir(parents=True)
    (left / "img_00099.jpg").touch()

    assert crop(f"{videos} --root {tmp_path} --workers 0") == 1
    out = capsys.readouterr().out
    for name in ("torn.mp4", "short.mp4", "text.mp4", "empty.AVI", "white.mp4"):
        assert sum(line.startswith(f"{videos / name}: ") for line in out.splitlines()) == 1
    assert "white.mp4: no face" in out and "\n    75 good\n" in out
    assert out.endswith("6 videos, 0 there already, 5 failed; 75 frames, 0 without a face\n")
    faces = tmp_path / "faces"
    assert os.listdir(faces) == ["good"] and set(crops_in(faces / "good")) == set(range(1, 76))

    (videos / "white.mp4").unlink()
    film(cv2, videos / "torn.mp4")
    (faces / "good" / "img_00001.jpg").write_text("mine")
    assert crop(f"{videos} --root {tmp_path} --workers 0") == 1
    assert (faces / "good" / "img_00001.jpg").read_text() == "mine" and len(crops_in(faces / "torn")) == 75
    assert capsys.readouterr().out.endswith("5 videos, 1 there already, 3 failed; 75 frames, 0 without a face\n")


@pytest.mark.parametrize("stop, code", [(KeyboardInterrupt(), 130), (OSError(28, "No space left on device"), 2)])
def test_a_crop_that_is_stopped_leaves_nothing_half_written(tmp_path, monkeypatch, capsys, cv2, stop, code):
    monkeypatch.setattr(data, "face_detector", lambda file: gray_finder)
    film(cv2, tmp_path / "videos" / f"{NAME}.mp4")
    write = Path.write_bytes

    def stopped(path, content):
        if path.name == "img_00040.jpg":
            raise stop
        return write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", stopped)
        assert crop(f"{tmp_path / 'videos'} --root {tmp_path} --workers 0") == code
    lines = capsys.readouterr().err.splitlines()
    assert "Traceback" not in str(lines) and (code == 130 or "No space left" in lines[-1])
    assert not any(path.is_file() for path in (tmp_path / "faces").rglob("*"))
    assert crop(f"{tmp_path / 'videos'} --root {tmp_path} --workers 0") == 0
    assert len(crops_in(tmp_path / "faces" / NAME[:11] / NAME)) == 75


def test_crop_in_processes_writes_the_same(tmp_path, cv2):
    for name in (NAME, "071309_w_21-PA4-007", "071309_w_21-PA4-008"):
        film(cv2, tmp_path / "videos" / f"{name}.mp4", frames=30, drift=int(name[-1]) / 4)
    tear(film(cv2, tmp_path / "videos" / "071309_w_21-PA4-009.mp4", frames=30))
    line = [str(tmp_path / "videos"), "--root"]
    done = subprocess.run([sys.executable, data.__file__, "--crop", *line, str(tmp_path / "two"), "--workers", "2"],
                          capture_output=True, text=True)
    assert done.returncode == 1 and "4 videos, 0 there already, 1 failed; 90 frames" in done.stdout, done.stderr
    assert not done.stderr  # OpenCV has much to say about a damaged video
    assert crop(" ".join([*line, str(tmp_path / "one"), "--workers", "0"])) == 1
    one, two = ({path.relative_to(tmp_path / root): path.read_bytes() for path in (tmp_path / root).rglob("*.jpg")}
                for root in ("one", "two"))
    assert one == two and len(one) == 90


def test_crop_finds_videos_however_they_lie(tmp_path, monkeypatch, cv2):
    monkeypatch.setattr(data, "face_detector", lambda file: gray_finder)
    flat, nested, upper = NAME, "071309_w_21-PA4-007", "080209_m_26-PA1-011"
    film(cv2, tmp_path / "v" / f"{flat}.mp4")
    film(cv2, tmp_path / "v" / "video" / nested[:11] / f"{nested}.avi", codec="MJPG")
    film(cv2, tmp_path / "v" / f"{upper}.mp4").rename(tmp_path / "v" / f"{upper}.MP4")
    for litter in (f"._{flat}.mp4", f"__MACOSX/video/._{nested}.mp4", "readme.txt"):
        (tmp_path / "v" / litter).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "v" / litter).touch()
    assert crop(f"{tmp_path / 'v'} --root {tmp_path} --workers 0") == 0
    samples = {str(path.relative_to(tmp_path / "faces")) for path in (tmp_path / "faces").glob("*/*")}
    assert samples == {f"{name[:11]}/{name}" for name in (flat, nested, upper)}


def test_a_class_without_a_sample_is_refused_before_training(stand_in, tmp_path, capsys):
    shutil.copytree(stand_in, tmp_path / "pain")
    for folder in (tmp_path / "pain" / "faces").glob("*/*-PA4-*"):
        shutil.rmtree(folder)
    assert call(train_teacher, f"--dataset biovid_b --root {tmp_path}/pain --device cpu --out {tmp_path}/out") == 2
    shown = capsys.readouterr()
    assert re.fullmatch(f"error: {tmp_path}/pain: no training sample of class 1 of 0 to 1 in fold 1; .*\n", shown.err)
    assert not (tmp_path / "out").exists()


def test_a_class_that_only_the_test_part_has_is_refused(two_views, tmp_path, capsys):
    arrays = dict(np.load(two_views))
    arrays["split"] = np.where((arrays["label"] == 3) | (np.arange(240) % 4 == 0), "test", "train")
    np.savez(tmp_path / "f.npz", **arrays)
    assert call(train_teacher, f"--dataset features --root {tmp_path}/f.npz --device cpu --out {tmp_path}/out") == 2
    assert "no training sample of class 3 of 0 to 3" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_two_videos_of_one_name_are_refused(tmp_path, monkeypatch, capsys, cv2):
    monkeypatch.setattr(data, "face_detector", lambda file: gray_finder)
    for folder in ("v", "v/copy"):
        (tmp_path / folder).mkdir()
        film(cv2, tmp_path / folder / f"{NAME}.mp4")
    assert crop(f"{tmp_path / 'v'} --root {tmp_path} --workers 0") == 2
    assert re.fullmatch(f"error: .*{NAME}: two videos of this name; remove one\n", capsys.readouterr().err)


def test_crop_takes_videos_of_ones_own(tmp_path, monkeypatch, cv2):
    monkeypatch.setattr(data, "face_detector", lambda file: gray_finder)
    me = film(cv2, tmp_path / "me.mp4")
    film(cv2, tmp_path / "clips" / "a" / "clip-1.mp4")
    film(cv2, tmp_path / "clips" / "b" / "clip-1.mp4")
    assert crop(f"{me} --root {tmp_path / 'faces-of-me'} --workers 0") == 0
    source = data.Faces(tmp_path / "faces-of-me" / "faces", "biovid_b", 1, 112, 0)
    assert list(source.video) == ["me"] and source.visual(0).shape == (3, 10, 112, 112)
    assert crop(f"{tmp_path / 'clips'} --root {tmp_path} --workers 0") == 0
    assert len(list((tmp_path / "faces").glob("[ab]/clip-1/*.jpg"))) == 150


def crop_mistakes(tmp_path, cv2, monkeypatch):
    video = film(cv2, tmp_path / "v" / "me.mp4", frames=2)
    (tmp_path / "signals" / "biosignals_raw").mkdir(parents=True)
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / f"{NAME}.mp4").touch()
    (tmp_path / "mixed" / "clip.mp4").touch()
    (tmp_path / "none").mkdir()
    (tmp_path / "bad.onnx").write_text("no network")
    good = f"{video} --root {tmp_path / 'root'}"
    return {"no such folder": (f"{tmp_path / 'gone'} --root {tmp_path}", str(tmp_path / "gone")),
            "no video": (f"{tmp_path / 'none'} --root {tmp_path}", str(tmp_path / "none")),
            "no root": (str(video), "--root"),
            "root is a file": (f"{tmp_path / 'mixed' / 'clip.mp4'} --root {tmp_path / 'bad.onnx'}",
                               str(tmp_path / "bad.onnx")),
            "stray at signals": (f"{video} --root {tmp_path / 'signals'}", str(video)),
            "stray among BioVid's": (f"{tmp_path / 'mixed'} --root {tmp_path}", str(tmp_path / "mixed" / "clip.mp4")),
            "bad detector": (f"{good} --detector {tmp_path / 'bad.onnx'}", str(tmp_path / "bad.onnx")),
            "no detector": (f"{good} --detector {tmp_path / 'gone.onnx'}", str(tmp_path / "gone.onnx")),
            "another network": (f"{good} --detector other.onnx", "other.onnx"),
            "no OpenCV": (good, 'pip install "opencv-python-headless<5"'),
            "OpenCV 5": (good, "--detector")}


@pytest.mark.parametrize("mistake", ["no such folder", "no video", "no root", "root is a file", "stray at signals",
                                     "stray among BioVid's", "bad detector", "no detector", "another network",
                                     "no OpenCV", "OpenCV 5"])
def test_each_mistake_with_crop_is_one_line(tmp_path, monkeypatch, capfd, cv2, mistake):
    line, named = crop_mistakes(tmp_path, cv2, monkeypatch)[mistake]
    if mistake == "another network":
        network = SimpleNamespace(setInputSize=lambda size: None, detect=cv2.imdecode)  # fails as OpenCV fails
        monkeypatch.setattr(network, "detect", lambda image: cv2.resize(image, (0, 0)))
        monkeypatch.setattr(cv2.FaceDetectorYN, "create", lambda *args: network)
    if mistake == "no OpenCV":
        monkeypatch.setitem(sys.modules, "cv2", None)
    if mistake == "OpenCV 5":
        monkeypatch.delattr(cv2, "CascadeClassifier")
    assert crop(f"{line} --workers 0") == 2
    out, err = capfd.readouterr()
    assert err.count("\n") == 1 and err.startswith("error: ") and named in err, err
    assert not out and not list(tmp_path.rglob("*.jpg"))


def test_yunet_is_asked_as_opencv_documents_it(tmp_path, monkeypatch, cv2):
    """The size of each image is told before it; faces are the second of two results, None when there is none."""
    class YuNet:
        def setInputSize(self, size):
            self.size = size

        def detect(self, image):
            assert self.size == (image.shape[1], image.shape[0])
            row = [100, 60, 90, 100, 120, 90, 170, 90, *[0] * 6, 0.95]
            return 1, np.array([row], np.float32) if image.std() > 8 else None

    created = []
    monkeypatch.setattr(cv2.FaceDetectorYN, "create", lambda *args: created.append(args) or YuNet())
    film(cv2, tmp_path / "me.mp4", hidden=range(30, 45))
    assert crop(f"{tmp_path / 'me.mp4'} --root {tmp_path} --detector y.onnx --workers 0") == 0
    assert [args[:2] for args in created] == [("y.onnx", "")]
    assert set(crops_in(tmp_path / "faces" / "me")) == {*range(1, 31), *range(46, 76)}


# ------------------------------------------------------------------------------- proof: faults, kills, bombs and leaks

# Generated faults, each through the scripts as a user calls them: how many each target gets, 500 in all. A failure
# prints the target and number that seed its fault: test_generated_faults(target) with range(number, number + 1).
FAULTS = {"annotation": 50, "fps": 15, "csv": 50, "wav": 60, "image": 65, "name": 50, "npz": 70, "run's npz": 20,
          "teacher": 20, "student": 35, "stage 1": 20, "stage 1's progress": 10, "stage 2's progress": 10,
          "stage 3's progress": 10, "weights": 15}
LONGEST, MOST = 60, 300  # seconds a command may take; MiB that a target's commands may add to the peak of memory
WORDS = ["", " ", "nan", "-inf", "-5", "1e400", "9" * 300, "0x1F", "1_0", "0,5", "abc", "\0", "é", '"', "#", "True"]
ODD = [None, True, "", "x", -1, 0, 7, 2**31, 10**18, 0.5, 1e308, math.nan, -math.inf, [], {}, (1, "a"), torch.zeros(2)]


def one_of(rng, choices):
    return choices[rng.integers(len(choices))]


def spoil_bytes(rng, content):
    """Truncated, flipped, holes, pieces missing or repeated, noise, nothing."""
    kind = one_of(rng, ["cut", "cut", "flip", "flip", "hole", "gap", "again", "noise", "empty"])
    reach = len(content) + 1
    a, b = sorted(rng.integers(0, min(reach, one_of(rng, [60, reach])), 2).tolist())
    flipped = np.frombuffer(content, np.uint8).copy()
    flipped[rng.integers(0, b + 1, 4).clip(max=reach - 2)] ^= rng.integers(1, 256, 4, dtype=np.uint8)
    return f"{kind} {a} {b}", {
        "cut": content[:b], "hole": content[:a] + bytes(b - a) + content[b:], "gap": content[:a] + content[b:],
        "again": content[:b] + content[a:], "noise": rng.bytes(b - a), "empty": b"", "flip": flipped.tobytes()}[kind]


def spoil_text(rng, content):
    """Fields swapped, replaced, missing or added; lines likewise; other delimiters and encodings."""
    mark = next(mark for mark in "\t, " if mark in content.decode())
    lines = [line.split(mark) for line in content.decode().splitlines()]
    i, j = one_of(rng, [0, rng.integers(len(lines))]), rng.integers(len(lines))
    a, b = rng.integers(0, len(lines[i]), 2)
    word = one_of(rng, [*WORDS, repr(float(rng.normal() * 10.0 ** rng.integers(-9, 20)))])
    mark, code = one_of(rng, ["\t", ",", ";", "|", "  "] + [mark] * 40), "utf-8"
    kind = one_of(rng, ["fields", "columns", "word", "word", "field", "new", "line", "lines", "swap", "again", "code"])
    if kind == "fields":
        lines[i][a], lines[i][b] = lines[i][b], lines[i][a]
    elif kind == "columns":
        lines[0][0], lines[0][-1] = lines[0][-1], lines[0][0]
    elif kind == "word":
        lines[i][a] = word
    elif kind == "field":
        del lines[i][a]
    elif kind == "new":
        lines[i].insert(a, word)
    elif kind in ("line", "lines"):
        del lines[i:i + 1 if kind == "line" else j]
    elif kind == "swap":
        lines[i], lines[j] = lines[j], lines[i]
    elif kind == "again":
        lines[j:j] = lines[i:i + 1] * one_of(rng, [1, 2, 100])
    else:
        code = one_of(rng, ["utf-8-sig", "utf-16", "utf-16-le", "cp500"])
    return f"{kind} {i} {j} {a} {b} {word!r:.20} {mark!r} {code}", "\n".join(map(mark.join, lines)).encode(code)


def spoil_wav(rng, content):
    """A header's field of an odd value, or a wav of an odd kind."""
    size, value = one_of(rng, [2, 4]), one_of(rng, [0, 1, 2, 3, 8, 24, 255, 999, 2**15, 2**16 - 1, 2**31, 2**32 - 1])
    if rng.random() < 0.6:
        at = 2 * rng.integers(0, 22)
        changed = content[:at] + (value % 256**size).to_bytes(size, "little") + content[at + size:]
        return f"header {at} {value} {size}", changed
    kind, channels, file = one_of(rng, ["u1", "i2", "i4", "i8", "f4", "f8"]), one_of(rng, [1, 1, 2, 9]), io.BytesIO()
    sound = (rng.normal(size=(one_of(rng, [0, 9, 20000]), channels)) * one_of(rng, [0, 1, 1e30, math.nan]))
    with np.errstate(all="ignore"):
        wavfile.write(file, one_of(rng, [1, 999, 8000, 44100, 200001]), sound.astype(kind))
    return f"wav {kind} {sound.shape}", file.getvalue()


def spoil_image(rng, content):
    """An image of another kind or size, or a png whose header is absurd."""
    kind = one_of(rng, ["JPEG", "PNG", "PNG", "GIF", "BMP", "TIFF"])
    mode = one_of(rng, ["RGB", "L", "1", "P", "CMYK", "I;16"])
    size, file = [one_of(rng, [1, 2, 16, 3000]) for _ in "wh"], io.BytesIO()
    with contextlib.suppress(OSError, ValueError):  # not every kind has every mode
        Image.new(mode, size).save(file, kind)
    image = file.getvalue()
    if kind == "PNG" and rng.random() < 0.5:
        size = [one_of(rng, [0, 1, 9000, 12000, 60000, 2**31 - 1]) for _ in "wh"]
        head = b"IHDR" + struct.pack(">II", *size) + image[24:29]
        image = image[:12] + head + struct.pack(">I", zlib.crc32(head)) + image[33:]
    return f"{kind} {mode} {size}", image


def spoil_arrays(rng, path):
    """Arrays missing, swapped, of other types, shapes, values; and arrays that nobody asked for."""
    with np.load(path) as file:
        arrays = dict(file)
    extra = {"video": rng.integers(0, 3, 24), "split": np.array(["train", "test"])[rng.integers(0, 2, 24)],
             "frame_row": rng.integers(-9, 99, 24), "frame_label": rng.normal(size=(24, 2)),
             "backbones": np.array("a-b")}
    key, other = one_of(rng, [*arrays]), one_of(rng, [*arrays])
    kind = one_of(rng, ["gone", "swap", "type", "type", "shape", "shape", "value", "value", "extra"])
    array, what = arrays[key], f"{kind} {key} {other}"
    if kind == "gone":
        del arrays[key]
    elif kind == "swap":
        arrays[key], arrays[other] = arrays[other], arrays[key]
    elif kind == "type":
        new = one_of(rng, ["?", "i1", "u8", "f2", ">f8", "g", "c16", "O", "S9", "U9", "M8[s]", "m8"])
        with contextlib.suppress(ValueError, TypeError):
            arrays[key] = array.astype(new)
        what += new
    elif kind == "shape":
        array = np.atleast_1d(array)
        arrays[key] = one_of(rng, [array.ravel(), array[None], array[..., None], array[:-1], array[:0], array.T,
                                   array.ravel()[0], np.concatenate([array, array])])
    elif kind == "value":
        odd = one_of(rng, [math.nan, math.inf, 1e300, -5, -1, 2**40, 0, "x"])
        changed = array.copy().reshape(-1)
        with contextlib.suppress(ValueError, OverflowError), np.errstate(all="ignore"):
            changed[rng.integers(0, changed.size, one_of(rng, [1, 99]))] = odd
        arrays[key], what = changed.reshape(array.shape), f"{what} {odd}"
    else:
        for key in rng.choice([*extra], 2):
            arrays[key] = extra[key]
            what += f" {key}"
    np.savez(path, **arrays)
    return what


def spoil_state(rng, path):
    """A checkpoint whose field is missing, swapped, of another type, absurd; a tensor of another kind."""
    node = state = torch.load(path, weights_only=True)
    trail = [one_of(rng, [*node])]
    while isinstance(child := node[trail[-1]], (dict, list)) and child and rng.random() < 0.8:
        node = child
        trail.append(one_of(rng, [*node] if isinstance(node, dict) else range(len(node))))
    key, kind = trail[-1], one_of(rng, ["gone", "odd", "odd", "swap", "all"])
    other, odd = one_of(rng, [*node] if isinstance(node, dict) else range(len(node))), one_of(rng, ODD)
    if torch.is_tensor(child) and rng.random() < 0.6:
        node[key] = odd = one_of(rng, [child.flatten()[1:], child.double(), child.int(), child * math.nan,
                                       child.to(torch.complex64), child[None]])
        kind = "tensor"
    elif kind == "gone":
        del node[key]
    elif kind == "odd":
        node[key] = odd
    elif kind == "swap":
        node[key], node[other] = node[other], node[key]
    else:
        state = one_of(rng, [odd, [state], {"state_dict": odd}, node, {key: state}])
    torch.save(state, path)
    return f"{kind} {trail} {other if kind == 'swap' else str(odd)[:60]}"


def spoil_name(rng, path):
    """The new path of what is renamed."""
    name = one_of(rng, ["", "x", " ", "a b", "ü", *["\udcfc", "a\nb"] * 5, "-x", "'", ".x", "0" * 200,
                        path.name.upper(), path.name[:-1], path.name + "_left", path.name.replace("1", "2"), "batch1", "__MACOSX"])
    new = one_of(rng, [path.with_name(name or "y"), path.parent.parent / path.name, path.with_name(path.name + name)])
    return path if new.exists() else path.rename(new)


class Slight(models.Backbone):
    """Stands for the three deep backbones, which would take minutes: what is tested is what they are given."""

    def __init__(self, channels):
        super().__init__(fitted=channels == 1)
        self.layer = torch.nn.Linear(channels, models.D)

    def features(self, clips):
        return self.layer(clips.flatten(2).mean(2))


SLIGHT = {name: type(name, (Slight,), {"__init__": lambda self, n=n: Slight.__init__(self, n)})
          for name, n in (("R3D18", 3), ("I3D", 3), ("SpectrogramResNet18", 1))}


@contextlib.contextmanager
def slight_backbones():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so little work is quicker alone
    with pytest.MonkeyPatch.context() as patch:
        for name, backbone in SLIGHT.items():
            patch.setattr(models, name, backbone)
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def slight():
    with slight_backbones():
        yield


def interrupted(script, line, stage):
    """Runs a command that stops in its last epoch of a stage, a file to resume from behind it."""
    append = script.append_line

    def dying(path, record):
        append(path, record)
        if record.get("stage") == stage and record["epoch"] == 2:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_teacher, "SAVE_EVERY", 0)
        patch.setattr(script, "append_line", dying)
        assert call(script, line) == 130


KINDS = {  # of data: where it lies, how a teacher is trained on it, what a student is shown
    "biovid": ("biovid", "biovid_b", "--image-size 32", "biovid/faces"),
    "affwild2": ("affwild2", "affwild2", "--image-size 32 --clips 2", "affwild2/cropped_aligned"),
    "features": ("a.npz", "features", "", "a.npz")}
COMMANDS = {
    "check": (data, "--check {dataset} --root {data}"),
    "train": (train_teacher, "--dataset {dataset} --root {data} {more} --workers 0 --device cpu --backbone-epochs 2 "
                             "--fusion-epochs 2 --out {new}"),
    "resume": (train_teacher, "--dataset {dataset} --root {data} {more} --workers 0 --device cpu --backbone-epochs 2 "
                              "--fusion-epochs 2 --out {out} --resume"),
    "distil": (train_student, "--epochs 2 --batch-size 6 --k 5 --workers 0 --device cpu --out {out} --resume"),
    "evaluate": (train_student, "--evaluate {student} --root {data} --workers 0 --device cpu"),
    "predict": (train_student, "--predict {faces} --student {student} --workers 0 --device cpu"),
    "weights": (train_teacher, "--dataset biovid_b --root {data} {more} --workers 0 --device cpu --backbone-epochs 1 "
                               "--fusion-epochs 1 --out {new} --visual-weights {out}/weights.pt")}


def command(name, ground, kind, out, new=None):
    """A script and its command line on one of the fixture's kinds of data."""
    where, dataset, more, faces = KINDS[kind]
    script, line = COMMANDS[name]
    student = next(out.rglob("student-pkdot.pt"), None)
    return script, line.format(data=ground / where, dataset=dataset, more=more, faces=ground / faces, out=out, new=new,
                               student=student)


@pytest.fixture(scope="session")
def ground(tmp_path_factory):
    """Small data of each kind, a teacher and a student of each, and runs stopped in a stage."""
    root = tmp_path_factory.mktemp("ground")
    names = [f"0{i}1309_w_2{i}-{'BL1' if i % 2 else 'PA4'}-081" for i in range(1, 8)]
    biovid(root / "biovid", names, [51, 81, 125])
    (root / "affwild2").mkdir()
    for i, video in enumerate(("one", "two", "three_left", "four")):
        part = "Validation_Set" if video == "four" else "Train_Set"
        affwild2(root / "affwild2", video, 40 + i, part, present=[1, 20, 40])
    write(root / "affwild2/fps.txt", "one 25\ntwo.mp4 30000/1001\nthree 30\n")
    np.savez(root / "a.npz", **arrays(24, label=np.arange(24) % 2, group=np.arange(24) // 3))
    with slight_backbones():
        for kind in KINDS:
            assert call(*command("train", root, kind, root / "out", root / "out" / kind)) == 0
            assert call(*command("distil", root, kind, root / "out" / kind)) == 0
        for stage, step in (("visual", "resume"), ("fusion", "resume"), ("student", "distil")):
            if stage == "student":
                shutil.copytree(root / "out/features", root / "out" / stage, ignore=shutil.ignore_patterns("student*"))
            interrupted(*command(step, root, "features", root / "out" / stage), stage)
    (root / "out/weights").mkdir()
    torch.save({"state_dict": SLIGHT["R3D18"]().state_dict() | {"fc.weight": torch.zeros(4, 4)}},
               root / "out/weights/weights.pt")
    return root


TARGETS = {  # the files that a target's faults are in, what else than bytes is spoiled, and who reads them
    "annotation": ("affwild2/annotations/*/*/*.txt", spoil_text, "check train evaluate"),
    "fps": ("affwild2/fps.txt", spoil_text, "check train evaluate"),
    "csv": ("biovid/biosignals_filtered/*/*.csv", spoil_text, "check check train"),
    "wav": ("affwild2/audio/*.wav", spoil_wav, "check train"),
    "image": ("[ab][fi]*/**/*.jpg", spoil_image, "check train evaluate predict"),
    "name": ("[ab][fi]*/*/**/*", spoil_name, "check train evaluate predict"),
    "npz": ("a.npz", spoil_arrays, "check train evaluate predict"),
    "run's npz": ("out/features/**/features.npz", spoil_arrays, "distil resume"),
    "teacher": ("out/features/**/teacher.pt", spoil_state, "distil resume"),
    "student": ("out/[abf]*/**/student-pkdot.pt", spoil_state, "evaluate predict distil"),
    "stage 1": ("out/features/**/[vp]*.pt", spoil_state, "distil resume"),
    "stage 1's progress": ("out/visual/**/visual.progress", spoil_state, "resume"),
    "stage 2's progress": ("out/fusion/**/fusion.progress", spoil_state, "resume"),
    "stage 3's progress": ("out/student/**/*.progress", spoil_state, "distil"),
    "weights": ("out/weights/weights.pt", spoil_state, "weights")}


class Hangs(BaseException):
    """Not an Exception: the scripts must not catch it."""


def spoiled(rng, path, spoil):
    """Spoils the file at path, or renames it; returns what was done and where it lies now."""
    if spoil is spoil_name:
        return "renamed", spoil_name(rng, path)
    spoil = spoil_bytes if rng.random() < 0.3 else spoil
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy's, about odd casts
        if spoil in (spoil_arrays, spoil_state):
            return spoil(rng, path), path
        what, content = spoil(rng, path.read_bytes())
    write(path, content)
    return what, path


def complaint(script, line, names, capfd):
    """What is wrong with how a command ends, or None."""
    stdout = io.TextIOWrapper(io.BytesIO(), "utf-8")  # as strict as a terminal's
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        warnings.simplefilter("ignore", ResourceWarning)  # as Python does
        signal.setitimer(signal.ITIMER_REAL, LONGEST)
        try:
            with contextlib.redirect_stdout(stdout):
                code = call(script, line)
        except BaseException:
            code = traceback.format_exc()[-1500:]
        signal.setitimer(signal.ITIMER_REAL, 0)
    stdout.flush()
    out, err = stdout.buffer.getvalue().decode(), capfd.readouterr().err
    listed = code == 2 and script is data and out.endswith(" faults\n")  # --check has them on stdout
    if code == 0 or code == 1 and "--predict" in line:
        right = not re.search(r"[ ,]nan\b", out) and (code == 0 or err)
    else:
        shown = out if listed else err
        right = code == 2 and len(caught) + err.count("\n") == (not listed) and any(name in shown for name in names)
    more = [str(warning.message) for warning in caught]
    return None if right else f"exit {code}, warnings {more}, stdout ends {out[-300:]!r}, stderr {err[-900:]!r}"


@pytest.mark.parametrize("target", FAULTS)
def test_each_generated_fault_is_one_line_that_names_the_file_or_does_no_harm(target, ground, slight, tmp_path, capfd):
    """No traceback, no hang, no growth of memory; a fault that does no harm ends with 0."""
    pattern, spoil, readers = TARGETS[target]
    paths, faults = sorted(ground.glob(pattern)), []
    previous = signal.signal(signal.SIGALRM, lambda *_: refuse(Hangs()))
    grown = 0
    for number in range(FAULTS[target]):
        rng = np.random.default_rng([list(FAULTS).index(target), number])
        path, reader = one_of(rng, paths), one_of(rng, readers.split())
        first, second = path.relative_to(ground).parts[:2] if path.parent != ground else (path.stem, "")
        kind = {"a": "features", "out": {"weights": "biovid"}.get(second, second)}.get(first, first)
        kind = kind if kind in KINDS else "features"

        # the file is spoiled in its place, or in a copy of its run, and read; then all is as it was
        old, out = path, ground / "out" / kind
        content = path.read_bytes() if path.is_file() else None
        if first == "out":
            out = tmp_path / "run"
            shutil.copytree(ground / "out" / second, out)
            path = out / path.relative_to(ground / "out" / second)
            if reader == "distil" and "progress" not in target:
                [student.unlink() for student in out.rglob("student*") if student != path]
        what, new = spoiled(rng, path, spoil)
        names = [str(path), str(path.parent), str(new), path.name] + [str(ground / first)] * (path != new)
        names += [f"{path.stem}.wav", f"{path.stem}/"] * (target == "annotation")  # its sound or images do not fit it
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # after the spoiling, which holds whole files
        found = complaint(*command(reader, ground, kind, out, tmp_path / "new"), names, capfd)
        grown += resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
        if found:
            faults.append(f"{target} {number}: {reader} after {what} of {path}{new}: {found}")
        if new != path:
            new.rename(path)
        elif content is not None:
            write(old, content)
        for folder in ("run", "new"):
            shutil.rmtree(tmp_path / folder, ignore_errors=True)
    signal.signal(signal.SIGALRM, previous)
    assert not faults, "\n".join(faults)
    assert grown < MOST * 1024


def processes(*calls):
    """Processes of this module's functions, from a server that has imported everything: no call waits for torch."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload([__name__])
    started = [server.Process(target=function, args=args) for function, *args in calls]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(SCRIPTS))  # the server looks for this module
        for process in started:
            process.start()
    return started


def run_saving_each_epoch(script, line):
    train_teacher.SAVE_EVERY = 0
    sys.stdout = sys.stderr = open(os.devnull, "w")
    sys.exit(call(sys.modules[script], line))


def tensors(state, name=""):
    """{where: tensor} of all tensors in nested dicts and lists."""
    if torch.is_tensor(state):
        return {name: state}
    inside = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list) else ()
    return {key: value for k, v in inside for key, value in tensors(v, f"{name}/{k}").items()}


STAGES = ["visual", "privileged", "fusion", "student"]


def views_commands(two_views, out):
    """The teacher's and the student's command, of 30 short epochs a stage."""
    common = f"--device cpu --resume --out {out}"
    return {"teacher": ("train_teacher", f"--dataset features --root {two_views} --backbone-epochs 30 "
                                         f"--fusion-epochs 30 {common}"),
            "student": ("train_student", f"--epochs 30 --batch-size 32 --anchors random {common}")}


@pytest.fixture(scope="session")
def uninterrupted(two_views, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    for script, line in views_commands(two_views, out).values():
        assert call(sys.modules[script], line) == 0
    return out / "features/c4/fold1"


def losses(run):
    lines = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return {(line["stage"], line["epoch"], line.get("loss", line.get("loss_gt"))) for line in lines if "stage" in line}


@pytest.mark.parametrize("stage", STAGES)
def test_killed_at_two_random_moments_of_a_stage_and_resumed_equals_uninterrupted(
        stage, two_views, uninterrupted, tmp_path):
    rng, run = np.random.default_rng(STAGES.index(stage)), tmp_path / "features/c4/fold1"
    commands = views_commands(two_views, tmp_path)
    if stage == "student":
        assert call(train_teacher, commands["teacher"][1]) == 0

    def epochs():
        log = run / "log.jsonl"
        return log.read_text().count(f'"stage": "{stage}"') if log.exists() else 0

    for _ in range(2):
        process, = processes((run_saving_each_epoch, *commands["student" if stage == "student" else "teacher"]))
        wanted = epochs() + rng.integers(1, 9)
        while epochs() < wanted and process.is_alive():
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.03))  # anywhere in an epoch: a step, a file half written
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL and epochs() < 30

    for script, line in commands.values():
        assert call(sys.modules[script], line) == 0
    assert losses(run) == losses(uninterrupted)  # of every epoch, also where it was run twice
    for name in ("visual", "privileged", "teacher", "student-pkdot"):
        files = (folder / f"{name}.pt" for folder in (uninterrupted, run))
        whole, killed = (tensors(torch.load(file, weights_only=True)) for file in files)
        assert len(whole) > 4 and equal(whole, killed)
    with np.load(uninterrupted / "features.npz") as whole, np.load(run / "features.npz") as killed:
        assert {key: whole[key].tobytes() for key in whole} == {key: killed[key].tobytes() for key in killed}
    assert not [path for path in run.glob("*.progress") if ".tmp." not in path.name]  # but what was half written


def append_many(path, who, together):
    together.wait()
    for number in range(3000):
        train_teacher.append_line(path, {"who": who, "number": number, "more": "x" * (number * 97 % 10007)})


def test_two_processes_that_append_to_one_file_lose_no_line(tmp_path, capsys):
    path, together = tmp_path / "results.jsonl", multiprocessing.get_context("forkserver").Barrier(2)
    for process in processes((append_many, path, 0, together), (append_many, path, 1, together)):
        process.join()
        assert process.exitcode == 0
    records = train_student.read_results(path)
    for who in range(2):
        assert [record["number"] for record in records if record["who"] == who] == list(range(3000))
    order = [record["who"] for record in records]
    assert order != sorted(order) and order != sorted(order)[::-1] and not capsys.readouterr().err


class Bomb:
    """Whoever unpickles it writes a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (self.marker, "w")


@pytest.mark.parametrize("packed", ["torch", "torch, inside", "pickle", "npz"])
@pytest.mark.parametrize("offered", [
    "train_student --teacher {bomb} --out {out}", "train_student --evaluate {bomb}",
    "train_student --predict {root}/a.npz --student {bomb}", "train_student --predict {bomb} --student {student}",
    "train_teacher --dataset biovid_b --root {root}/biovid --out {out} --visual-weights {bomb}",
    "train_teacher --dataset features --root {bomb} --out {out}", "data --check features --root {bomb}"])
def test_code_in_an_offered_file_does_not_run(offered, packed, ground, slight, tmp_path, capsys):
    bomb, marker = tmp_path / "bomb", tmp_path / "marker"
    student = next(ground.glob("out/features/**/student-pkdot.pt"))
    with open(bomb, "wb") as file:
        if packed == "torch":
            torch.save(Bomb(marker), file)
        elif packed == "torch, inside":  # all else is right
            torch.save({**torch.load(student, weights_only=True), "state_dict": {"x": Bomb(marker)}}, file)
        elif packed == "pickle":
            pickle.dump(Bomb(marker), file)
        else:
            np.savez(file, **arrays(6, name=np.array([Bomb(marker)] * 6)))
    script, line = offered.format(bomb=bomb, out=tmp_path / "out", root=ground, student=student).split(" ", 1)
    assert call(sys.modules[script], line) == 2 and not marker.exists()
    shown = capsys.readouterr().err
    assert shown.startswith(f"error: {bomb}: ") and shown.count("\n") == 1
    if packed == "pickle":
        pickle.loads(bomb.read_bytes()).close()  # it is one
        assert marker.exists()


# Leaks, besides the tests above: test_folds_never_divide_a_subject, test_left_and_right_share_sound_and_group and
# test_features_that_do_not_fit ("group 0 is in both splits") for subjects in two parts,
# test_evaluation_and_prediction_need_no_privileged_file for BioVid.

@pytest.fixture
def parts_of_views(two_views):
    """The arrays of the features file, so noisy that epochs differ, and which part of fold 1 each sample is in."""
    with np.load(two_views) as file:
        views = dict(file)
    for key in ("visual", "privileged"):
        views[key] += 4 * randn(*views[key].shape).numpy()
    return views, data.parts(data.Features(two_views), 1)


def trained_on(views, folder):
    """All files of a run on changed views, by name: their tensors, and which epochs were chosen."""
    folder.mkdir()
    np.savez(folder / "views.npz", **views)
    run = train_on_views(folder / "views.npz", folder)
    assert call(train_student, f"--out {folder} --epochs 3 --batch-size 32 --device cpu") == 0
    states = {name: torch.load(run / f"{name}.pt", weights_only=True)
              for name in ("visual", "privileged", "teacher", "student-pkdot")}
    epochs = [states["visual"]["epoch"], states["privileged"]["epoch"], states["student-pkdot"]["record"]["epoch"]]
    return {name: tensors(state) for name, state in states.items()}, epochs, states["student-pkdot"]["scores"]


def test_permuted_test_labels_leave_the_chosen_epochs_and_all_weights_as_they_were(parts_of_views, tmp_path):
    views, part = parts_of_views
    weights, epochs, found = trained_on(views, tmp_path / "whole")
    permuted, test = views["label"].copy(), part == "test"
    permuted[test] = np.random.default_rng(0).permutation(permuted[test])
    same, same_epochs, other = trained_on(views | {"label": permuted}, tmp_path / "permuted")
    assert all(equal(weights[name], same[name]) for name in weights) and epochs == same_epochs
    assert found["accuracy"] > other["accuracy"] + 9  # the labels did count, where they may


def test_inputs_of_the_test_part_change_no_weight_and_those_of_validation_no_statistics(parts_of_views, tmp_path):
    views, part = parts_of_views
    weights, epochs, _ = trained_on(views, tmp_path / "whole")

    def changed(name):
        new = {key: np.where((part == name)[:, None, None], 100 - 9 * views[key], views[key])
               for key in ("visual", "privileged")}
        return trained_on(views | new, tmp_path / name)

    same, same_epochs, _ = changed("test")
    assert all(equal(weights[name], same[name]) for name in weights) and epochs == same_epochs
    buffers = [(name, f"/model/backbone.{key}") for name in ("visual", "privileged") for key in ("mean", "std")]
    for name, as_were in (("val", True), ("train", False)):
        other, _, _ = changed(name)
        assert all(torch.equal(weights[file][key], other[file][key]) == as_were for file, key in buffers)
    for file, modality in (("visual", "visual"), ("privileged", "privileged")):
        train = views[modality][part == "train", 0].astype(np.float64)
        for key, expected in (("mean", train.mean(0)), ("std", train.std(0))):
            np.testing.assert_allclose(weights[file][f"/model/backbone.{key}"], expected, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_privileged_files_that_are_damaged_or_gone_change_nothing_at_test_time(kind, ground, slight, tmp_path, capsys):
    shutil.copytree(ground, tmp_path / "copy", ignore=shutil.ignore_patterns("out"))
    root, shown = tmp_path / "copy", []
    with np.load(root / "a.npz") as file:
        views = dict(file)
    for state in ("whole", "damaged", "gone"):
        for path in [*root.rglob("*.csv"), *root.rglob("*.wav")] if state == "damaged" else []:
            write(path, b"\0")
        if state == "damaged":
            np.savez(root / "a.npz", **views | {"privileged": np.array([{}, 1])})  # not to be read without pickle
        elif state == "gone":
            shutil.rmtree(root / "biovid/biosignals_filtered")
            shutil.rmtree(root / "affwild2/audio")
            np.savez(root / "a.npz", **{key: views[key] for key in views if key != "privileged"})
        for name in ("evaluate", "predict"):
            assert call(*command(name, root, kind, ground / "out" / kind)) == 0
        shown.append(capsys.readouterr())
    assert shown[0] == shown[1] == shown[2] and len(shown[0].out.splitlines()) > 4
