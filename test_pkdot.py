"""Every test of the project, in the README's order. Each has an oracle that is not the code under
test: a closed form, a loop, scipy, a brute force, an uninterrupted run; none needs a GPU, the
network or data that is not made here.

    python -m pytest -q test_pkdot.py
    python -m pytest -q test_pkdot.py -k "sinkhorn or pkdot_loss"
"""
import contextlib
import io
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import wave
from functools import cache, partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the number of threads moves MKL's last bits

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from numpy.random import default_rng
from numpy.testing import assert_allclose
from PIL import Image
from pytest import MonkeyPatch, approx
from scipy import stats
from scipy.io import wavfile
from scipy.signal import stft
from scipy.special import logsumexp, softmax
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import data
import models
import pkdot
import sinkhorn
import train_student
import train_teacher
from data import Features, UserError, fold_windows, open_dataset
from pkdot import (
    ccc,
    cosine_loss,
    kl_loss,
    mse_loss,
    pkdot_loss,
    rkd_loss,
    similarity_loss,
    task_loss
)
from sinkhorn import ot_cost, sinkhorn_divergence, transport_plan

SCRIPTS = Path(data.__file__).parent
OUT = Path("out")
parametrize = pytest.mark.parametrize
strict = pytest.mark.filterwarnings("error")  # a warning is a failure
once = pytest.fixture(scope="session")

# ---------------------------------------------------------------------------- helpers and fixtures


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    """No test touches the user's runs/ and data/, and a test's folder goes with it."""
    monkeypatch.chdir(tmp_path)
    yield
    shutil.rmtree(tmp_path, ignore_errors=True)


@pytest.fixture(autouse=True, scope="session")
def nothing_is_left(tmp_path_factory):
    """Of the folders that tests share; pytest keeps those of three runs."""
    yield
    for folder in tmp_path_factory.getbasetemp().iterdir():
        shutil.rmtree(folder, ignore_errors=True)


class Ended(NamedTuple):
    code: int
    out: str
    err: str


def run(script, line):
    """A script's command line in this process -> exit code, stdout, stderr."""
    files = out, err = [io.TextIOWrapper(io.BytesIO(), "utf-8") for _ in "oe"]
    code = 0
    with (MonkeyPatch.context() as patch, contextlib.redirect_stdout(out),
          contextlib.redirect_stderr(err)):
        patch.setattr(sys, "argv", [f"{script.__name__}.py", *line.split()])
        try:
            data.run(script.main)
        except SystemExit as stop:
            code = int(stop.code or 0)
    for file in files:
        file.flush()
    return Ended(code, *(file.buffer.getvalue().decode() for file in files))


def program(main):
    """A script that does this."""
    return SimpleNamespace(__name__="program", main=main)


def ok(script, line):
    """A command that must succeed -> its stdout."""
    ended = run(script, line)
    assert ended.code == 0, ended
    return ended.out


distil = partial(ok, train_student)


def checked(dataset, root, code=0):
    """What --check prints when it ends with that exit code."""
    ended = run(data, f"--check {dataset} --root {root}")
    assert ended.code == code and not ended.err, ended
    return ended.out


def on_disk():
    """{path: size and time of change} of all files."""
    return {path: (path.stat().st_size, path.stat().st_mtime_ns)
            for path in Path().rglob("*") if path.is_file()}


def failed(script, line, *words):
    """A command that must end with exit code 2 and one line that holds each of the words -> the
    line."""
    code, _, err = run(script, line)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1, (code, err)
    assert not [word for word in words if str(word) not in err], err
    return err


def refused(script, line, *words):
    """A command that must have `failed`, and left the working folder as it was -> the line."""
    before = on_disk()
    err = failed(script, line, *words)
    assert on_disk() == before
    return err


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def results(out, role="student"):
    """Its lines of results.jsonl, oldest first."""
    return [line for line in lines_of(out / "results.jsonl") if line["role"] == role]


def logged(run, stage):
    return [line for line in lines_of(run / "log.jsonl") if line.get("stage") == stage]


def saved(run, name):
    return torch.load(run / f"{name}.pt", weights_only=True)


def tensors(state, name=""):
    """{where: tensor} of all tensors in nested dicts and lists."""
    if torch.is_tensor(state):
        return {name: state}
    inside = (state.items() if isinstance(state, dict) else
              enumerate(state) if isinstance(state, list) else ())
    return {key: x for k, v in inside for key, x in tensors(v, f"{name}/{k}").items()}


def equal(a, b):
    """Whether two states hold the same tensors, bit by bit."""
    a, b = tensors(a), tensors(b)
    return len(a) > 0 and a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# Oracles, in float64 numpy

def naive_similarity(z):
    return np.array([[p @ q / math.sqrt((p @ p) * (q @ q)) for q in z] for p in np.asarray(z)])


def half_squared(x, y):
    return np.array([[((p - q) ** 2).sum() / 2 for q in np.asarray(y)] for p in np.asarray(x)])


def naive_ccc(p, q):
    """Eq. 7 without its 1 -, of series or of columns."""
    p, q = map(np.asarray, (p, q))
    covariance = ((p - p.mean(0)) * (q - q.mean(0))).mean(0)
    return 2 * covariance / (p.var(0) + q.var(0) + (p.mean(0) - q.mean(0)) ** 2)


# Small data in the owners' formats

NAME = "071309_w_21-BL1-081"
FACES = f"faces/{NAME[:11]}/{NAME}"
BIO = f"biosignals_filtered/{NAME[:11]}/{NAME}_bio.csv"
HEADER = "time\tgsr\tecg\temg_trapezius\t emg_corrugator \temg_zygomaticus"


def made(path):
    """A path in a folder that is there."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def write(path, content):
    made(path).write_bytes(content if isinstance(content, bytes) else content.encode())


def jpg(path, value, size=16):
    image = Image.new("RGB", (size, size), (value % 256,) * 3)
    image.save(made(path), "JPEG", quality=95)


def grays(clip):
    """The gray of each frame of (3, F, H, W); the trees below paint frame i in gray i."""
    assert clip.dtype == torch.uint8 and len(clip) == 3
    return clip.float().mean((0, 2, 3)).round().int().tolist()


def bio_csv(path, rows=2816, first=0, header=HEADER, times=lambda t: t):
    """gsr counts the rows, emg_corrugator counts them down."""
    n = np.arange(first, rows)
    table = np.column_stack([times(n / 512 * 1e6), n, 0 * n, 0 * n, -n, 0 * n])
    np.savetxt(made(path), table, "%.6g", "\t", header=header, comments="")


def biovid(root, names=(NAME,), frames=range(1, 139), signals="biosignals_filtered", **csv):
    for name in names:
        for i in frames:
            jpg(root / "faces" / name[:11] / name / f"img_{i:05d}.jpg", i)
        if signals:
            bio_csv(root / signals / name[:11] / f"{name}_bio.csv", **csv)
    return root


VA = "annotations/VA_Estimation_Challenge"
TEXT, CROPS, WAV = f"{VA}/Train_Set/one.txt", "cropped_aligned/one", "audio/one.wav"


def affwild2(root, video="one", frames=100, part="Train_Set", layout=VA, present=None, label=None,
             rate=4410, sound=None):
    rng = default_rng(frames)
    label = rng.uniform(-1, 1, (frames, 2)) if label is None else label
    for folder in (root / layout / "Train_Set", root / layout / "Validation_Set", root / "audio"):
        folder.mkdir(parents=True, exist_ok=True)
    np.savetxt(root / layout / part / f"{video}.txt", label, "%.3f", ",", comments="",
               header="valence,arousal")
    for i in range(1, frames + 1) if present is None else present:
        jpg(root / "cropped_aligned" / video / f"{i:05d}.jpg", i)
    sound = np.zeros(int(frames / 25 * rate), np.int16) if sound is None else sound
    wavfile.write(root / "audio" / f"{re.sub('_(left|right)$', '', video)}.wav", rate, sound)
    return root


def arrays(n=6, length=2, **changes):
    """The arrays of a good features file, with changes; None leaves one out."""
    rng = default_rng(0)
    good = dict(visual=rng.normal(size=(n, length, 3)).astype("f4"),
                privileged=rng.normal(size=(n, length, 4)), label=np.arange(n) % 3,
                group=np.arange(n) // 2, name=np.array([f"n{i}" for i in range(n)]))
    return {key: value for key, value in (good | changes).items() if value is not None}


# Small runs; what a fixture returns is for reading, a test that writes takes a copy

class Slight(models.Backbone):
    """A linear layer that stands for the deep backbones: what is tested is what they are given."""

    def __init__(self, channels):
        super().__init__(fitted=channels == 1)
        self.features = nn.Sequential(
            nn.Flatten(2), nn.AdaptiveAvgPool1d(1), nn.Flatten(),
            nn.Linear(channels, models.D))


@contextlib.contextmanager
def slight_backbones():
    class Video(Slight):
        def __init__(self):
            super().__init__(3)

    with MonkeyPatch.context() as patch:
        patch.setattr(models, "R3D18", Video)
        for name in models.VISUAL:
            patch.setitem(models.VISUAL, name, Video)
        patch.setattr(models, "SpectrogramResNet18", lambda: Slight(1))
        yield


@pytest.fixture
def slight():
    with slight_backbones():
        yield


@once
def stand_in(tmp_path_factory):
    """BioVid B's stand-in: 5 subjects, two samples of each of 5 levels, faces of 16 pixels."""
    root = tmp_path_factory.mktemp("data") / "biovid"
    with MonkeyPatch.context() as patch:
        for name, value in {"SUBJECTS": 5, "LEVELS": data.LEVELS[:10], "FACE": 16}.items():
            patch.setattr(data, name, value)
        data.write_stand_in("biovid_b", root)
    return root


@once
def views(tmp_path_factory):
    """A features file of 240 samples, one clip each, of 4 classes: the visual view is noisy, the
    privileged one clear."""
    rng = default_rng(0)
    label = rng.integers(0, 4, 240)
    centres_v, centres_p = rng.normal(size=(4, 12)), rng.normal(size=(4, 9))
    path = tmp_path_factory.mktemp("features") / "views.npz"
    np.savez(path, label=label,
             visual=(centres_v[label] + rng.normal(size=(240, 12)))[:, None].astype("f4"),
             privileged=(3 * centres_p[label] + rng.normal(size=(240, 9)))[:, None].astype("f4"))
    return path


CPU = "--device cpu --workers 0 --out"
TEACHER = "--dataset features --backbone-epochs 3 --fusion-epochs 5 --root"
STUDENT = f"--epochs 3 --batch-size 64 {CPU}"


def train_on(views, out, more="", student=None):
    """The smallest teacher of a features file, and a student if its flags are given -> its run
    folder."""
    ok(train_teacher, f"{TEACHER} {views} {more} {CPU} {out}")
    run, = out.glob("features/*/fold*")
    if student is not None:
        distil(f"{student} {STUDENT} {out}")
    return run


@once
def views_run(views, tmp_path_factory):
    """The run folder of a teacher and a PKDOT student of `views`."""
    return train_on(views, tmp_path_factory.mktemp("views"), student="--lambda 0.4 --k 30")


def copied(run, out):
    """A copy of the whole --out of a run -> its run folder there."""
    shutil.copytree(run.parents[2], out)
    return out / run.relative_to(run.parents[2])


# ---------------------------------------------------------- the quick start and the commands
# What the README tells a user to type is there. No flag has to be given: the defaults are the
# paper's. The last line is the answer, and the saved networks give it. A mistake is one line.

README = (SCRIPTS / "README.md").read_text()
PAGES = README + "".join(path.read_text() for path in SCRIPTS.glob("assets/*.md"))
SCRIPT = {script.__name__: script for script in (data, train_teacher, train_student)}
VIEWS = "visual", "privileged"


def test_documented_commands_parse():
    text = PAGES + "".join(script.__doc__ for script in SCRIPT.values())
    commands = re.findall(r"python (train_teacher|train_student|data)\.py([^\n#&`|]*)", text)
    assert {script for script, _ in commands} == SCRIPT.keys()
    for script, line in commands:
        SCRIPT[script].parse(line.split())


def test_every_name_in_the_readme_is_there():
    modules = SCRIPT | {module.__name__: module for module in (models, pkdot, sinkhorn)}
    for module, name in re.findall(r"`(\w+)\.(?!py\b)(\w+)`", PAGES):
        assert module not in modules or hasattr(modules[module], name), name
    assert {*re.findall(r"`(test_\w+)`", README)} < globals().keys()


@once
def home(stand_in, views, tmp_path_factory):
    """A folder with small data of each kind under data/, and under runs/ what the README's commands
    make of it with no other flags and slight backbones."""
    home = tmp_path_factory.mktemp("home")
    spare = shutil.ignore_patterns("SYNTHETIC", "*PA[123]*", "img_*[1-9].jpg")
    for dataset in ("biovid_a", "biovid_b"):
        shutil.copytree(stand_in, home / "data" / dataset, ignore=spare)
    for frames in (290, 40, 41, 500):
        affwild2(home / "data/affwild2", f"video{frames}", frames, present=range(frames, 0, -7),
                 part="Train_Set" if frames < 500 else "Validation_Set")
    shutil.copy(views, home / "data/views.npz")

    with slight_backbones(), MonkeyPatch.context() as patch:
        patch.chdir(home)
        for source, view in product((data.BioVid, data.Affwild2), VIEWS):
            patch.setattr(source, view, cache(getattr(source, view)))
        for dataset in RUNS:
            root = "--root data/views.npz" * (dataset == "features")
            ok(train_teacher, f"--dataset {dataset} {root} --workers 0")
            distil("--lambda 0.4 --k 30 --workers 0")
    return home


@pytest.fixture
def at_home(home, monkeypatch):
    """A test that reads, in that folder."""
    monkeypatch.chdir(home)


RUNS = {"biovid_a": Path("runs/biovid_a/c2/fold1"), "biovid_b": Path("runs/biovid_b/c2/fold1"),
        "affwild2": Path("runs/affwild2/va/fold1"), "features": Path("runs/features/c4/fold1")}
RUN = RUNS["features"]

# Table I and section IV-B of the paper; epochs, folds and what chooses the epoch as the README says
NAMES = "visual_backbone fusion outputs length batch_size fusion_lr".split()
TEACHERS = {
    "biovid_a": ["r3d18", "concat", 2, 1, 64, 1e-4],
    "biovid_b": ["r3d18", "mmt", 2, 1, 64, 1e-4],
    "affwild2": ["i3d", "jca", 2, 8, 8, 1e-3],
    "features": ["mlp", "concat", 4, 1, 64, 1e-4]}
ALL = dict(lr=1e-3, fusion_batch_size=64, image_size=112, folds="subjects", fold=1, seed=0)
PAPERS = {"method": "pkdot", "lambda": 0.4, "k": 30, "epsilon": 0.1, "debias": True,
          "anchors": "dissimilar", "shared": False, "transport": True, "hallucinate": "tnet",
          "batch_size": 128, "finetune": False, "select": "val", "fold": 1, "seed": 0,
          "kl": 0.0, "lr": 1e-4, "folds": "subjects", "labelled": None}
EPOCHS = {"visual": 30, "privileged": 30, "fusion": 50, "student": 20}


@parametrize("dataset, run", RUNS.items())
def test_defaults_are_those_of_the_paper(dataset, run, at_home):
    teacher, = (line for line in results(Path("runs"), "multimodal") if line["dataset"] == dataset)
    assert [teacher[name] for name in NAMES] == TEACHERS[dataset]
    assert teacher.items() >= ALL.items()
    assert saved(run, "student-pkdot")["record"].items() >= PAPERS.items()
    assert {stage: len(logged(run, stage)) for stage in EPOCHS} == EPOCHS


def opened(run, student="student-pkdot"):
    """What the files of a run hold: settings, features, fold, the teacher's head and a student."""
    teacher, student = saved(run, "teacher"), saved(run, student)
    its = SimpleNamespace(**teacher["settings"])
    its.features = Features(run / "features.npz", its.length)
    its.fold = fold_windows(its.features, its.fold)
    its.rows = lambda index: [its.features.rows[view][index] for view in VIEWS]  # (S, L, 512)
    its.head, head = (models.HEADS[its.fusion](
        its.outputs, length=its.length, per_clip=its.task == "regression").eval() for _ in "ts")
    its.head.load_state_dict(teacher["head"])
    backbone = models.VISUAL.get(its.visual_backbone, partial(models.FeatureMLP, 12))()
    its.student = models.Student(backbone, models.TNet(), head).eval()
    its.student.load_state_dict(student["model"])
    return its


def metrics_of(line):
    return [line[name] for name in ("accuracy", "valence", "arousal") if name in line]


def shown(text):
    """The scores in a command's last line."""
    last = text.splitlines()[-1]
    return [float(x) for x in re.findall(r"(?:accuracy|valence|arousal) (-?[.\d]+)", last)]


def recorded(run):
    """The score that a student's file records, as a command shows it."""
    return approx(metrics_of(saved(run, "student-pkdot")["record"]), abs=0.01)


def last_results(*roles):
    """Theirs in out/, as a command shows them."""
    return approx([results(OUT, role)[-1]["accuracy"] for role in roles], abs=0.01)


@parametrize("dataset, run", RUNS.items())
@torch.no_grad()
def test_scores_are_those_of_the_saved_networks(dataset, run, at_home, slight):
    """In results.jsonl on the test fold; and the epoch is the one that was best in validation."""
    its = opened(run)

    def alone(view, x):
        state = saved(run, view)["model"]
        x = x @ state["head.weight"].T + state["head.bias"]
        return x if its.task == "regression" else x.mean(1)

    def score(part):
        v, p = its.rows(part.index)
        output = {"visual": alone("visual", v), "privileged": alone("privileged", p),
                  "multimodal": its.head(v, p).output, "student": its.student.fuse(v).output}
        return {role: metrics_of(pkdot.metrics(*data.aligned(its.features, part, x)))
                for role, x in output.items()}

    mse = [line["tnet_val_mse"] for line in logged(run, "fusion")]
    v, p = its.rows(its.fold.val.index)
    assert min(mse) < mse[0] and F.mse_loss(its.student.tnet(v), p).item() == approx(min(mse))

    val, test = score(its.fold.val), score(its.fold.test)
    for role in test:
        epochs = logged(run, role.replace("multimodal", "fusion"))
        best = max(map(metrics_of, epochs), key=np.mean)
        line, = (line for line in results(Path("runs"), role) if line["dataset"] == dataset)
        assert best == approx(val[role], abs=1e-5)
        assert metrics_of(line) == approx(test[role], abs=1e-5)


FEATURES = "--dataset features --root data/views.npz"
BAD = {  # its last flag, or what is given for it, is named
    train_student: [
        "--out none",
        "--teacher none",
        "--teacher data/views.npz",
        "--student runs/features/c4/fold1/student-pkdot.pt --predict data/biovid_b",
        "--dataset features --folds clips",
        "--dataset features --root data/other.npz",
        "--k 129",
        "--method ridge",
        "--method cosine --k 5",
        "--table 5 --classes 5",
        "--table 2 --shared-anchors",
        "--root none --table 2 --hallucinate zero",
        "--table 2 --print --root x",
        "--root none --figure labels --labelled 20",
        "--root none --figure 5 --lambda 1 2",
        "--root none --table choices --kl 1",
        "--method none --labelled 60",
        "--chunk 4",
        "--seeds 2",
        "--amp",
        "--device cuda:99",
        "--evaluate runs/features/c4/fold1/teacher.pt",
        "--evaluate runs/biovid_a/c2/fold1/student-pkdot.pt --root none",
        "--student runs/biovid_a/c2/fold1/student-pkdot.pt --predict none",
        "--predict none"],
    train_teacher: [
        "--batch 3",
        "--root none",
        "--dataset affwild2 --root none",
        "--dataset affwild2 --fold 2",
        "--dataset affwild2 --folds clips",
        "--dataset features --root none",
        f"{FEATURES} --clips 2",
        f"{FEATURES} --out data/views.npz",
        "--root none --out data/views.npz/deeper"]}


@parametrize("script, line", [(s, line) for s in BAD for line in BAD[s]])
def test_a_mistake_is_one_line_that_names_it(script, line, at_home):
    error = refused(script, line)
    flag, *given = line[line.rindex("--"):].split()
    assert flag in error or given and given[-1] in error


def test_batch_norm_of_one_value_is_one_line(at_home, tmp_path):
    line = "--dataset affwild2 --clips 1 --image-size 32 --batch-size 11"  # the last one is of one
    failed(train_teacher, f"{line} {CPU} {tmp_path}", "batch norm", "--batch-size")


@parametrize("line", [
    "data --check features --root",
    "train_teacher --root",
    "train_teacher --visual-weights",
    "train_student --evaluate",
    "train_student --predict"])
def test_a_path_may_begin_at_home(line):
    script, *flags = line.split()
    given = SCRIPT[script].parse([*flags, "~/x"])
    assert str(Path.home() / "x") in map(str, vars(given).values())


def test_each_line_is_out_at_once_and_a_notebooks_stdout_will_do(monkeypatch):
    monkeypatch.setenv("RANK", "")  # nor is this torchrun's
    seen = []
    ok(program(lambda: print("x") or seen.append(sys.stdout.buffer.getvalue())), "")
    assert seen == [b"x\n"]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        data.run(lambda: print("x"))
    assert out.getvalue() == "x\n"
    refused(train_student, "--teacher none", "none")


# ----------------------------------------------------------------------------------------- the loss
# Whatever the problem, the solver's plan, value and gradient are the optimum's, or a warning says
# that they are not; PKDOT's loss, the baselines and the scores are the equations of their papers.


def solved(cost, epsilon, *weights, **options):
    """In float64 from the solver's f and g: the plan, the error of its marginals (L1) and its value
    <pi, C> + epsilon KL (Eq. 5-6). The one plan of this form without errors is the optimum."""
    beside_easy_ones = torch.stack([cost, *3 * [0 * cost]])
    f, g = (z[0] for z in sinkhorn.sinkhorn(beside_easy_ones, epsilon, *weights, **options))
    cost, f, g = (z.double() for z in (cost, f, g))
    a, b = weights or (torch.ones_like(z) / len(z) for z in (f, g))
    log_density = (f[:, None] + g - cost) / epsilon
    plan = log_density.exp() * a[:, None] * b
    error = (plan.sum(1) - a).abs().sum() + (plan.sum(0) - b).abs().sum()
    return plan, error, (plan * (cost + epsilon * log_density)).sum()


@strict
@parametrize("epsilon", [0.2, 1.0])
def test_plan_value_and_gradient_are_the_optimums(epsilon):
    cost = randn(2, 3, 6, 4).square().requires_grad_()
    a, b = randn(2, 3, 6).softmax(-1), torch.tensor([1, 0, 5, 2]) / 8
    given = (1.00009 * a).requires_grad_()  # as far from a sum of 1 as rounding may leave it
    f, g = sinkhorn.sinkhorn(cost, epsilon, given, b, tol=1e-9)
    plan = transport_plan(cost, f, g, epsilon, given, b).detach()
    value = ot_cost(cost, epsilon, given, b)
    (3 * value).sum().backward()

    for i in np.ndindex(2, 3):
        expected, error, least = solved(cost[i].detach(), epsilon, a[i], b, tol=1e-12)
        assert error < 1e-8
        assert_close(plan[i], expected, rtol=0, atol=1e-8)
        assert abs(value[i] - least) < 1e-7

    # envelope theorem: dW/dC = pi, dW/da = f; the latter less what would change the sum
    assert_close(cost.grad, 3 * plan, rtol=0, atol=2e-5)
    change = f - (f * a).sum(-1, keepdim=True)
    assert_close(given.grad, 3 * change, rtol=0, atol=1e-3)
    assert not f.requires_grad

    swept = sinkhorn.sweep(cost.detach(), f, epsilon, a, b)
    assert_close(transport_plan(cost.detach(), *swept, epsilon, a, b), plan)

    # what underflows in a block is not lost
    cost = torch.tensor([[7, 1], [0, 0]]).double()
    assert abs(ot_cost(cost, 1e-3, torch.eye(2)[1])) < 1e-6


def hard_rows(confused):
    """Similarities (2, 32, 32) of eight clusters, and of two sharp classes: the hardest we met."""
    noise = randn(32, 32, seed=confused)
    clusters = randn(8, 32).repeat(4, 1) + noise / 2
    classes = randn(32, 1).sign() * noise[0].abs()[:, None] * noise[1] + noise / 10
    classes[:confused] *= -1
    return torch.tensor(np.array([naive_similarity(z.numpy()) for z in (clusters, classes)]))


STUDENT_ROWS, TEACHER_ROWS = hard_rows(confused=3), hard_rows(confused=0)
COSTS = torch.cdist(STUDENT_ROWS, TEACHER_ROWS[:, :24]).square() / 2


@strict
@parametrize("dtype", [torch.float32, torch.float64])
@parametrize("scale", [1e-4, 1, 1e4])
@parametrize("ratio", [1e-3, 1e-2, 1, 10])
@parametrize("cost", COSTS)
def test_few_sweeps_find_the_optimum_in_every_regime(cost, ratio, scale, dtype):
    cost = (cost / cost.max() * scale).to(dtype)
    error = solved(cost, ratio * scale, max_iter=300)[1]
    assert error < 1.1 * max(1e-5, 3 * torch.finfo(dtype).eps / ratio)


def half(x, y, epsilon, debias):
    """x's part of the divergence, and its gradient: a pull to where the mass of each point goes."""
    part = pull = 0
    for other, sign in (y, 1), (x, -debias):
        cost = torch.tensor(half_squared(x, other))
        plan, error, value = solved(cost, epsilon, tol=1e-7, max_iter=20000)
        assert error < 2e-7
        part = part + sign * value / 2
        pull = pull + sign * (x / len(x) - plan @ other)
    return part, pull


@strict
@parametrize("debias", [True, False])
@parametrize("epsilon", [0.1, 0.01])
@parametrize("m, dtype, tol, within", [
    (24, torch.float32, 1e-5, 1e-4),
    (32, torch.float64, 1e-6, 1e-6)
])
def test_the_divergence_is_exact_even_in_float32(m, dtype, tol, within, epsilon, debias):
    """However far the clouds are from the origin."""
    given = [(z + 5).to(dtype).requires_grad_() for z in (STUDENT_ROWS, TEACHER_ROWS[:, :m])]
    values = sinkhorn_divergence(*given, epsilon, debias, tol)
    (3 * values).sum().backward()
    for i in range(2):
        x, y = STUDENT_ROWS[i], TEACHER_ROWS[i, :m]
        halves = half(x, y, epsilon, debias), half(y, x, epsilon, debias)
        parts, pulls = zip(*halves, strict=True)
        assert abs(values[i] / sum(parts) - 1) < within
        for z, expected in zip(given, pulls, strict=True):
            off = (z.grad[i] / 3 - expected).norm() / expected.norm()
            assert off < within / epsilon


@parametrize("stops_early", [
    lambda cost: sinkhorn.sinkhorn(cost, 1e-3, max_iter=1),
    lambda cost: ot_cost(cost.float(), 1e-6),  # float32's rounding is more
    lambda cost: sinkhorn_divergence(cost, cost.flip(0) + 1, 1e-15)
])
def test_a_solver_that_stops_early_says_so_where_it_was_called(stops_early):
    with pytest.warns(UserWarning) as caught:
        stops_early(randn(50, 50).square())
    assert {warning.filename for warning in caught} == {__file__}


ENTROPIC = [
    lambda x, y: sinkhorn_divergence(x, y, 0.3),
    lambda x, y: ot_cost(x, 0.3),
    lambda x, y: pkdot_loss(x, y, 3)
]


@parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@parametrize("loss", ENTROPIC)
def test_all_is_in_float32_or_float64_if_given_and_has_no_second_derivative(loss, dtype):
    x, y = randn(2, 9, 6).to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(x, y)
        gradient, = torch.autograd.grad(value, x, create_graph=True)
    assert value.dtype == torch.promote_types(dtype, torch.float32)
    assert abs(value / loss(x.double(), y.double()) - 1) < 1e-5
    with pytest.raises(RuntimeError, match="second"):  # which would be wrong
        gradient.sum().backward()


@strict
def test_the_benchmark_finds_exact_gradients_in_few_launches(capsys):
    sinkhorn.benchmark([8, 128], 1, "cpu")
    ours = [line.split() for line in capsys.readouterr().out.splitlines() if " ours " in line]
    assert len(ours) == 16
    for *kind, b, epsilon, _, launches, _, _, _, error in ours:
        easy = b != "8" and epsilon == "0.1" and kind in (["clustered"], ["collapsed"])
        assert 0 < int(launches) < (100 if easy else 700)
        assert float(error) < 1e-2


class Products(TorchDispatchMode):
    """In which precisions matrix products are taken."""
    seen = frozenset()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.name() in ("aten::mm", "aten::bmm"):
            self.seen |= {*precisions()}
        return op(*args, **kwargs or {})


def precisions():
    backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    return [backend.fp32_precision for backend in backends]


@parametrize("loss", [*ENTROPIC, lambda x, y: sinkhorn.sinkhorn(x, 0.3)])
def test_the_loss_is_in_full_float32_whatever_the_script_allows(loss):
    x, y = randn(2, 9, 6, dtype=torch.float32)
    torch.set_float32_matmul_precision("medium")
    try:
        before = precisions()  # TF32 on a GPU, bfloat16 on a CPU
        with Products() as products:
            loss(x, y)
            with pytest.raises(ValueError):
                loss(x * math.nan, y)
        assert products.seen == {"ieee"}
        assert precisions() == before
    finally:
        torch.set_float32_matmul_precision("highest")


def naive_pkdot(student, teacher, k=30, epsilon=0.1, debias=True, anchors="dissimilar",
                shared=False, transport=True):
    """Eq. 1-6."""
    S, T = (naive_similarity(z.numpy()) for z in (student, teacher))
    order = T * 0 + T.mean(0) if shared else T
    index = np.argsort(order if anchors == "dissimilar" else -order, 1)[:, :k]
    x, y = (torch.tensor(np.take_along_axis(M, index, 1)) for M in (S, T))
    if transport:
        return half(x, y, epsilon, debias)[0] + half(y, x, epsilon, debias)[0]
    return ((x - y) ** 2).sum() / 2 / len(x)


@parametrize("options", [
    {},
    dict(k=32, epsilon=2, debias=False),
    dict(k=3, epsilon=0.5, shared=True),
    dict(k=3, anchors="similar", shared=True, transport=False)
])
def test_pkdot_loss_is_equations_1_to_6(options):
    student, teacher = randn(32, 5), 1e-4 * randn(32, 4, seed=1)
    expected = naive_pkdot(student, teacher, **options)
    assert abs(pkdot_loss(student, teacher, **options) / expected - 1) < 1e-4


@parametrize("shared", [True, False])
def test_random_anchors_are_any_and_the_same_for_all_rows_if_shared(shared):
    z = randn(2, 3, 4)
    S, T = map(naive_similarity, z.numpy())
    costs = (S - T) ** 2 / 2
    possible = costs.mean(0) if shared else [sum(c) / 3 for c in product(*costs)]
    found = set()
    for seed in range(30):
        torch.manual_seed(seed)
        loss = pkdot_loss(*z, 1, anchors="random", shared=shared, transport=False)
        found.add(round(loss.item(), 9))
    assert found <= {round(cost, 9) for cost in possible}
    assert len(found) > (2 if shared else 6)


def test_a_zero_row_is_similar_to_nothing_and_has_a_finite_gradient():
    z = torch.cat([randn(4, 3), torch.zeros(1, 3)]).requires_grad_()
    S = pkdot.cosine_similarity_matrix(z)
    S.sum().backward()
    expected = np.pad(naive_similarity(randn(4, 3).numpy()), (0, 1))
    assert_allclose(S.detach(), expected, atol=1e-12)
    assert z.grad.isfinite().all()
    assert torch.autograd.gradcheck(pkdot.cosine_similarity_matrix, z[:4])


ROWS = randn(4, 2)
NAN = ROWS.index_fill(0, torch.tensor(1), math.nan)


@parametrize("loss, inputs, named", [
    (ot_cost, (NAN, 1), "nan"),
    (ot_cost, (ROWS, 0), r"\b0\b"),
    (ot_cost, (ROWS, 1, ROWS[0]), r"\ba\b.*\(4,\).*\(2,\)"),
    (ot_cost, (ROWS, 1, torch.ones(4) / 3), r"\ba\b.*0\.333"),
    (ot_cost, (ROWS, 1, None, torch.tensor([1.5, -0.5])), r"\bb\b.*-0\.5"),
    (sinkhorn_divergence, (COSTS, ROWS.T, 1), r"\(2, 32, 24\), \(2, 4\)"),
    (pkdot_loss, (ROWS, ROWS, 5), "k=5.*b=4"),
    (pkdot_loss, (ROWS, ROWS, 0), "k=0"),
    (pkdot_loss, (ROWS, ROWS[:3], 2), r"\(4, 2\).*\(3, 2\)"),
    (pkdot_loss, (ROWS, ROWS, 2, 1, True, "far"), "'far'.*dissimilar.*similar.*random"),
    (pkdot_loss, (NAN, ROWS, 2), r"NaN.*\b2\b.*\b0\b"),
    (pkdot_loss, (ROWS, NAN, 2), r"NaN.*\b0\b.*\b2\b"),
    (similarity_loss, (ROWS, ROWS, 5), r"k=5.*b=4"),
    (ccc, (ROWS[0], ROWS[0, :1]), r"\(2,\).*\(1,\)"),
    (ccc, (ROWS[0, :0], ROWS[0, :0]), r"\(0,\)")
])
def test_what_is_refused_is_named(loss, inputs, named):
    with pytest.raises(ValueError, match=named):
        loss(*inputs)


BASELINES = [cosine_loss, mse_loss, kl_loss, rkd_loss, similarity_loss]


@parametrize("loss", [pkdot_loss, *BASELINES])
def test_no_gradient_reaches_the_teacher(loss):
    both = randn(2, 31, 4).requires_grad_()
    loss(*both).backward()
    student, teacher = both.grad
    assert student.any() and not teacher.any()


def test_cosine_mse_kl_and_similarity_are_their_closed_forms():
    z = randn(2, 6, 5)
    s, t = z.numpy()
    cosine = naive_similarity(np.concatenate([s, t]))
    p, q = softmax(t / 4, 1), softmax(s / 4, 1)
    expected = (1 - cosine[:6, 6:].trace() / 6, ((s - t) ** 2).mean(),
                4**2 * (p * np.log(p / q)).sum() / 6)
    assert [loss(*z).item() for loss in BASELINES[:3]] == approx(expected)

    # the cross-entropy of two distributions over a few anchors that all rows share
    torch.manual_seed(3)
    loss = similarity_loss(*z, k=4)
    torch.manual_seed(3)
    anchors = torch.randperm(6)[:4]
    p, q = softmax(cosine[6:, 6 + anchors] / 0.05, 1), softmax(cosine[:6, anchors] / 0.1, 1)
    assert loss.item() == approx(-(p * np.log(q)).sum() / 6)


def naive_relations(z):
    """Park et al. 2019: distances over their mean, and the cosines of all angles i-j-k."""
    z = z.double().numpy()
    d = np.sqrt(2 * half_squared(z, z))
    cosine = np.nan_to_num([naive_similarity(z - middle) for middle in z])
    return d / (d[d > 0].mean() if d.any() else 1), cosine


@pytest.mark.filterwarnings("ignore:invalid value")  # the cosine of an angle with a leg of length 0
@parametrize("s, t, rel", [
    (3 * randn(5, 4)[[0, 1, 1, 3, 4]], randn(5, 6, seed=1), 1e-6),
    # nearly equal rows, of which float32's rounding alone makes cosines; and all rows equal
    ((100 + randn(4, 4)[[0, 1, 1, 3]] + 1e-4 * randn(4, 1)).float(), torch.ones(4, 4), 0.02)
])
def test_rkd_is_its_pairs_and_triplets_whichever_rows_are_equal(s, t, rel):
    expected = 0
    for a, b, weight in zip(naive_relations(s), naive_relations(t), (25, 50), strict=True):
        e = np.abs(a - b)
        expected += weight * np.where(e < 1, e**2 / 2, e - 0.5).mean()
    assert abs(rkd_loss(s, t.to(s)) / expected - 1) < rel


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of a mean of nothing
@parametrize("known", [[1, 0, 1, 1, 1, 0], 6 * [0]])
def test_the_task_loss_is_eq_8_or_1_less_eq_7_over_what_has_a_label(known):
    known = torch.tensor(known) == 1
    logits, classes = randn(6, 5), torch.tensor([0, 4, 3, 2, 1, 2])
    eq_8 = -np.log(softmax(logits.numpy(), 1)[range(6), classes][known]).mean()
    classes[~known] = -1
    series, truth = randn(2, 6, 1, 2)
    truth[~known, 0, 1] = math.nan
    eq_7 = naive_ccc(series[known, 0], truth[known, 0]).mean()

    for output, label, expected in (logits, classes, eq_8), (series, truth, 1 - eq_7):
        output.requires_grad_()
        loss = task_loss(output, label)
        loss.backward()
        assert abs(loss - (expected if known.any() else 0)) < 1e-12
        assert torch.equal(output.grad.ne(0).flatten(1).any(1), known)


@parametrize("other", [torch.zeros(7), torch.full((7,), 0.1), randn(7).float()])
def test_a_constant_series_concords_with_nothing(other):
    x = torch.full((7,), 0.1, requires_grad=True)  # their mean, rounded, is not 0.1
    value = ccc(x, other)
    value.backward()
    assert value.item() == 0 and x.grad.isfinite().all()


def test_scores_are_percent_of_classes_and_the_ccc_of_valence_and_of_arousal():
    label = torch.tensor([0, 1, 2, 3, 0])
    assert pkdot.metrics(torch.eye(5), label) == {"accuracy": 80, "n": 5}
    output, label = randn(2, 9, 2)
    valence, arousal = naive_ccc(output, label)
    expected = {"valence": valence, "arousal": arousal, "n": 9}
    assert pkdot.metrics(output, label) == approx(expected)


# ------------------------------------------------------------------------------------- the networks
# Each head is its equations, computed for one sample alone; each backbone is the published network,
# clip by clip; a student's chunks change nothing but the memory it takes.


def lively(module):
    """In float64 and eval(), with weights and statistics that all make a difference."""
    torch.manual_seed(0)
    for x in module.state_dict().values():
        if x.ndim > 1:
            nn.init.kaiming_normal_(x)
        elif x.ndim == 1:
            x.uniform_(0.5, 1.5)
    return module.double().eval()


def holding(network, w, prefix=""):
    """PyTorch's own network with those weights whose names begin so; no classifier."""
    network.fc = nn.Identity()
    network.load_state_dict({name.removeprefix(prefix): x for name, x in w.items()
                             if name.startswith(prefix)})
    return network.double().eval()


def linear(w, name, x):
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def concat(w, visual, privileged):
    return linear(w, "hidden", torch.cat([visual, privileged], 1)).relu()


def jca(w, visual, privileged):
    J, attended = torch.cat([privileged, visual], 1), []
    for X, m in (visual, "v"), (privileged, "a"):
        C = (X.T @ w[f"W_j{m}"] @ J / 32).tanh()
        H = (w[f"W{m}"] @ X + w[f"W_c{m}"] @ C.T).relu()
        attended.append(w[f"W_h{m}"] @ H + X)
    return torch.cat(attended, 1)


def mmt(w, visual, privileged):
    v, p = (holding(nn.TransformerEncoderLayer(512, 2, 512), w, f"encode_{m}.")(x)
            for m, x in (("v", visual), ("p", privileged)))
    v, p = (holding(nn.MultiheadAttention(512, 2), w, f"attend_{m}.")(query, x, x)[0]
            for m, query, x in (("v", p, v), ("p", v, p)))
    g = linear(w, "gate", torch.cat([v, p], 1)).sigmoid()
    return g * v + (1 - g) * p


@parametrize("per_clip", [False, True])
@parametrize("length", [1, 4])
@parametrize("equations, layers, size, dropout", [
    (concat, ["classifier"], 526_339, 0),
    (jca, ["regressor.0", "regressor.2"], 197_253, 0.6),
    (mmt, ["classifier"], 5_259_780, 0)
])
def test_no_head_looks_at_other_samples_and_every_head_uses_both_modalities(
        equations, layers, size, dropout, length, per_clip, monkeypatch):
    head = lively(models.HEADS[equations.__name__](3, length=length, per_clip=per_clip)).train()
    w, inputs, dropped = head.state_dict(), randn(2, 3, length, 512), [0]
    assert length > 1 or sum(map(torch.numel, w.values())) == size
    monkeypatch.setattr(F, "dropout", lambda x, p, *_: dropped.append(p) or x)
    answers = head(*inputs)
    assert max(dropped) == dropout

    for v, p, output, z in zip(*inputs, *answers, strict=True):
        x = equations(w, v, p)  # (L, m)
        assert_close(z, x.mean(0))
        x = x if per_clip else x.mean(0)
        for layer in layers:
            x = linear(w, layer, x)
        assert_close(output, x)


def test_a_backbone_alone_answers_for_the_mean_of_its_clips():
    model, x = lively(models.Unimodal(models.FeatureMLP(2), 3, per_clip=False)), randn(2, 4, 2)
    assert_close(model(x), linear(model.state_dict(), "head", model.backbone(x).mean(1)))


def r3d18(w, x):
    kinetics = torch.tensor([[0.43216, 0.394666, 0.37645], [0.22803, 0.22145, 0.216989]])
    mean, std = kinetics[..., None, None, None]
    x = ((x / 255 - mean) / std).double()
    return holding(torchvision.models.video.r3d_18(), w)(x[None])


def spectrogram(w, x):
    """By the network for colours, of which each is the same."""
    w["conv1.weight"] = w["conv1.weight"].expand(-1, 3, -1, -1) / 3
    return holding(torchvision.models.resnet18(), w)(x.expand(1, 3, -1, -1))


def i3d(w, x):
    def unit(x, name, stride=1, padding="same"):
        x = F.conv3d(x, w[f"{name}.conv3d.weight"], None, stride, padding)
        norm = nn.BatchNorm3d(x.shape[1], eps=1e-3)
        return holding(norm, w, f"{name}.bn.")(x).relu()

    # TensorFlow's "same" padding: of sizes that are even wherever windows of 3 or 7 move by 2
    x = unit(F.pad(2 * x[None] - 1, 3 * [2, 3]), "Conv3d_1a_7x7", 2, 0)
    flat = (1, 3, 3), (1, 2, 2)
    x = unit(F.max_pool3d(x, *flat, ceil_mode=True), "Conv3d_2b_1x1")
    x = unit(x, "Conv3d_2c_3x3")
    for stage, window, letters in (3, flat, "bc"), (4, (3, 2), "bcdef"), (5, (2, 2), "bc"):
        x = F.max_pool3d(x, *window, ceil_mode=True)
        for letter in letters:
            b = f"Mixed_{stage}{letter}.b"
            deep = [unit(unit(x, f"{b}{i}a"), f"{b}{i}b") for i in (1, 2)]
            last = unit(F.max_pool3d(x, 3, 1, 1), f"{b}3b")
            x = torch.cat([unit(x, f"{b}0"), *deep, last], 1)
    return linear(w, "projection", x.mean((2, 3, 4)))


def test_i3d_loads_the_public_checkpoint():
    i3d, public = models.I3D(), lively(models.I3D().features).float().state_dict()
    assert sum(map(torch.numel, i3d.parameters())) == 12_812_064  # 12,287,264 and a projection
    state = {f"module.model.backbone.encoder.{key}": x for key, x in public.items()}
    state["logits.bias"] = torch.zeros(400)
    found = models.load_weights(i3d, {"epoch": 3, "optimizer": {}, "net": state})
    assert found == (["logits.bias"], []) and equal(i3d.features.state_dict(), public)

    del public["projection.bias"]  # which is ours
    assert models.load_weights(i3d, public) == ([], ["projection.bias"])
    for key in "Mixed_5c.b0.bn.bias", "Mixed_5c.b0.bn.running_var":
        for change in torch.zeros(3), torch.full((384,), math.nan), None:
            with pytest.raises(ValueError, match=key):
                models.load_weights(i3d, public | {key: change})


def test_chunks_give_the_gradient_of_the_whole_batch():
    """And that is the gradient of the student's parts in turn, written out."""
    parts = models.FeatureMLP(2), models.TNet(), models.ConcatFusion(3)
    student = lively(models.Student(*parts, chunk=3))
    student.backbone.standardise(torch.tensor([[0.5, 7], [1.5, 7]]).split(1))  # 7 is only centred
    x, w, passed = randn(8, 2, 2), student.state_dict(keep_vars=True), []
    student.backbone.register_forward_pre_hook(lambda _, x: passed.append(len(x[0])))
    answers = [student(x)]

    x = (x - torch.tensor([1, 7])) / torch.tensor([0.5, 1])
    visual = linear(w, "backbone.features.2", linear(w, "backbone.features.0", x).relu())
    privileged = visual
    for name, width in ("encoder.0", 256), ("encoder.2", 128), ("decoder.0", 256):
        privileged = linear(w, f"tnet.{name}", privileged).relu()
        assert privileged.shape[2] == width
    answers.append(student.head(visual, linear(w, "tnet.decoder.2", privileged)))

    gradients = []
    for output, z in answers:
        loss = task_loss(output, torch.arange(8) % 3) + z.sum()
        gradients.append(torch.autograd.grad(loss, [*student.parameters()]))
    for a, b in zip(*gradients, strict=True):
        assert_close(a, b)
    assert sorted(passed) == [1] * 2 + [3] * 10  # forward, and again going backward


@parametrize("make, published, x", [
    (models.R3D18, r3d18, torch.randint(256, (1, 2, 3, 8, 32, 32), dtype=torch.uint8)),
    (models.I3D, i3d, randn(1, 2, 3, 8, 48, 80)),
    (models.SpectrogramResNet18, spectrogram, randn(3, 2, 1, 67, 40))
])
@torch.no_grad()
def test_each_backbone_is_the_published_network_clip_by_clip(make, published, x):
    backbone = lively(make())
    with torch.autocast("cpu", torch.bfloat16):  # leaves float64 as it is
        found = backbone(x)
    expected = [published(backbone.features.state_dict(), clip) for clip in x.flatten(0, 1)]
    assert_close(found, torch.cat(expected).unflatten(0, x.shape[:2]), rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------ your own features
# A features file is read as it is meant, or refused by name. A pair without a label counts where
# no label is needed and nowhere else, and nothing of the test part reaches what is trained.

SIX, CUBE, AFFECT = np.arange(6), np.ones((6, 2, 3)), np.ones((6, 2))
SPLIT = np.array("train train test test train train".split())


@parametrize("kind", "<f4 >f8 f2 g".split())
def test_a_features_file_is_read_as_it_is_meant(kind):
    affect = np.linspace(-1, 1, 24).reshape(6, 2, 2)
    affect[1, 0, 1], affect[4], affect[5] = -5, math.nan, -1  # two of no label, and a number
    visual = np.arange(36).reshape(6, 2, 3) / 4

    for label in (np.array([0, -1, 1, 2, 1, 2]), affect, affect[:, 0]):
        given = arrays(visual=visual.astype(kind), label=label, split=SPLIT)
        data.save_features("f.npz", given)
        source = open_dataset("features", "f.npz")
        assert source.length == 2 and Features("f.npz", length=1).length == 1
        assert np.array_equal(source.rows["visual"], visual.reshape(12, 3))
        rows = given["privileged"].reshape(12, 4)
        assert_allclose(source.rows["privileged"], rows, 1e-6)
        for key, of_sample in (given | {"video": SIX}).items():
            if of_sample.ndim == 1:  # the same for both clips
                assert getattr(source, key).tolist() == of_sample.repeat(2).tolist()

        if label.ndim > 1:
            wanted = np.broadcast_to(label.reshape(6, -1, 2), affect.shape).reshape(12, 2)
            known = (wanted > -5).all(1)
            wanted = np.where(known[:, None], wanted, math.nan)
            assert_allclose(source.label, wanted, 1e-6)
            assert_allclose(source.frame_label, wanted[known], 1e-6)
            assert source.frame_row.tolist() == np.flatnonzero(known).tolist()

    np.savez("f.npz", **arrays(length=1, visual=visual[:, 0]))  # one clip each
    assert np.array_equal(Features("f.npz").rows["visual"], visual[:, 0])


@parametrize("key, value", [
    ("visual", None),
    ("visual", CUBE.astype(int)),
    ("visual", CUBE[..., :0]),
    ("visual", CUBE * -1e39),  # infinite as float32
    ("privileged", None),
    ("privileged", CUBE[:5]),
    ("privileged", CUBE[:, :1]),
    ("label", None),
    ("label", SIX[:5]),
    ("label", AFFECT * math.nan),
    ("label", np.int64(3 * AFFECT)),
    ("label", AFFECT),  # classes as zeros and ones
    ("label", AFFECT * 1.01),
    ("label", SIX * 0),
    ("label", SIX * 2),
    ("group", SIX[:5]),
    ("group", SIX / 1),
    ("groups", SIX),  # misspelt, it would be a leak
    ("name", SPLIT),
    ("split", np.char.upper(SPLIT)),
    ("split", np.roll(SPLIT, 1)),  # both have group 0
    ("video", SIX // 2)])
def test_a_features_file_that_does_not_fit_is_refused_by_name(key, value):
    np.savez("f.npz", **arrays(**{key: value}))
    says("f.npz", Features, "f.npz")
    assert re.search(f"^f.npz: (holds )?{key}\\b", checked("features", "f.npz", 2), re.M)


def test_each_array_that_does_not_fit_is_a_line_of_check_that_says_where():
    holes = np.where(SIX[:, None, None] % 4 == 3, math.nan, CUBE)
    np.savez("f.npz", **arrays(visual=holes, privileged=SIX, label=SIX - 2))
    told = checked("features", "f.npz", 2)
    assert re.findall("npz: ([a-z]+)", told) == ["visual", "privileged", "label"]
    assert re.search("visual.* 1 of 6 .* 3 ", told)


def test_a_file_that_is_no_features_file_is_told_what_it_is(views, monkeypatch):
    write("html.npz", "<html>")
    np.savez("cut.npz", **arrays())
    os.truncate("cut.npz", 999)
    line = "--check features --root"
    for name, word in ("none", "o such file"), ("html", "no .npz"), ("cut", "cut short"):
        refused(data, f"{line} {name}.npz", word)
    monkeypatch.setattr(np, "load", lambda _, **__: np.empty(2**50))
    refused(data, f"{line} {views}", "not enough memory for 8.00 PiB")


@once
def pairs(views):
    """The arrays of `views`, noisier, so that epochs differ, and in groups of all sizes; two of
    three labels are taken away."""
    content = dict(np.load(views))
    content["visual"] += 3 * randn(240, 1, 12).numpy()
    content["label"][SIX.repeat(40) % 3 > 0] = -1
    return content | {"group": np.sqrt(np.arange(240)).astype(int)}


def fold_1(content, **how):
    """Writes pairs.npz -> its first fold, and masks of the samples in the fold's parts."""
    np.savez("pairs.npz", **content)
    fold = fold_windows(Features("pairs.npz"), 1, **how)
    return fold, [np.isin(np.arange(240), part.index[:, 0]) for part in fold]


@parametrize("key", ["label", "visual", "privileged"])
def test_nothing_of_the_test_part_reaches_a_weight(key, pairs):
    _, (*_, test) = fold_1(pairs)
    known = np.flatnonzero(test & (pairs["label"] >= 0))
    changed = pairs[key].copy()
    changed[known] = changed[np.roll(known, 1)]
    np.savez("changed.npz", **pairs | {key: changed})

    weights, scores = [], []
    for name in ("pairs", "changed"):
        run = train_on(f"{name}.npz", Path(name), student="")
        weights.append({path.stem: saved(run, path.stem) for path in run.glob("*.pt")})
        scores.append([line["accuracy"] for line in lines_of(Path(name, "results.jsonl"))])
    assert equal(*weights) and scores[0] != scores[1]


@parametrize("folds, drawn", [("subjects", 0), ("clips", 100000)])
def test_task_losses_and_scores_are_over_labels_and_all_else_over_pairs(
        folds, drawn, pairs, monkeypatch):
    """With --lr 0 a network is saved as the first step saw it. Of few labels, some are drawn for
    each step: so many have the labels' mean."""
    monkeypatch.setattr(train_student, "DRAWN", drawn)
    fold, (train, val, test) = fold_1(pairs, folds=folds, labelled=20)  # whatever the seed
    label = torch.from_numpy(pairs["label"]).clone()
    label[train] = fold.train.label
    known = label.numpy() >= 0

    def agrees(output, line, role, loss="loss"):
        """Logged loss and validation score, and the test score in results.jsonl."""
        output = output.detach()
        entropy = logsumexp(output, 1) - output[range(240), label].numpy()  # Eq. 8
        right = 100 * (output.argmax(1) == label).numpy()
        found = line[loss], line["accuracy"], results(OUT, role)[-1]["accuracy"]
        wanted = entropy[train & known], right[val & known], right[test & known]
        assert found == approx([x.mean() for x in wanted], 1e-2 if drawn else 1e-4)
        assert loss == "loss" or drawn == 0 or found[0] != approx(wanted[0].mean(), 1e-6)

    run = train_on("pairs.npz", OUT, f"--folds {folds} --labelled 20 --seed 1 --lr 0 "
                   "--batch-size 20 --fusion-lr 0 --fusion-batch-size 240")
    rows = []
    for view in ("visual", "privileged"):
        x = torch.from_numpy(pairs[view])
        model = models.Unimodal(models.FeatureMLP(x.shape[2]), 4, False)
        model.load_state_dict(saved(run, view)["model"])
        agrees(model(x), logged(run, view)[0], view)
        rows.append(model.backbone(x).detach())
        statistics = torch.std_mean(x[train, 0], 0, correction=0)
        assert_close(statistics, (model.backbone.std, model.backbone.mean))

    distil(f"--method kl --lr 0 --epochs 1 --batch-size 240 {CPU} out")
    its = opened(run, "student-kl")
    s, t = its.student(torch.from_numpy(pairs["visual"])), its.head(*rows)
    line, = logged(run, "student")
    hidden = {"device": "cpu, threads 1", "processes": 1, "unlabelled": (train & ~known).sum()}
    for told in results(OUT, "visual") + results(OUT) + logged(run, None):
        assert told.items() >= hidden.items() and "batch_size" in told
    agrees(s.output, line, "student", "loss_gt")
    W = kl_loss(s.output[train], t.output[train])
    assert line["w"] == approx(W.item(), 1e-4)

    line = logged(run, "fusion")[0]
    agrees(t.output, line, "multimodal")
    error = (its.student.tnet(rows[0]) - rows[1]).square().mean((1, 2)).detach()
    found = line["tnet_loss"], line["tnet_val_mse"]
    assert found == approx([error[part].mean().item() for part in (train, val)], 1e-4)


@pytest.fixture
def invented(views):
    """invented(line, change, ...): what a table of two folds prints after lines were appended to
    results.jsonl that are its students' but for a change."""
    np.savez("views.npz", group=np.arange(240) // 3, **np.load(views))
    train_on("views.npz", OUT)

    def show(line, *changes):
        line = f"{line} --dataset features --root views.npz --fold 1 2 --epochs 1 {CPU} out"
        distil(line)
        for old, change in product(changes and results(OUT), changes):
            train_teacher.append_line(OUT / "results.jsonl", old | change(old))
        return distil(line)
    return show


def test_lambda_is_chosen_on_validation_alone(invented):
    text = invented("--table 5 --lambda 0.1 3 40", lambda line: {
        "validation": -abs(line["lambda"] - 3), "accuracy": line["lambda"]})
    assert "| PKDOT | 3.00 ± 0.00 (2 folds x 1 seed) |" in text
    assert "PKDOT, views accuracy: 2 times 3\n" in text


def test_positive_control():
    """A problem in which there is something to transfer: of 100 clusters at random places nothing
    but the privileged view says which belong together, and 700 pairs show them, 60 with a label. A
    student that is trained hard on those forgets what the T-Net gave it, unless a term keeps it."""
    rng = default_rng(1)
    cluster = rng.permutation(1000) % 100
    label, place = cluster % 4, rng.normal(size=(100, 20))
    np.savez("pairs.npz", label=label,
             visual=(place[cluster] + rng.normal(size=(1000, 20)) / 2)[:, None],
             privileged=(np.eye(4)[label] + rng.normal(size=(1000, 4)) / 10)[:, None])
    ok(train_teacher, "--dataset features --root pairs.npz --labelled 60 --fusion-epochs 20 "
                      f"{CPU} out")

    for flags in ("--method none", "--method kl", "--method similarity", "--shared-anchors"):
        distil(f"{flags} --lambda 1 --finetune --epochs 20 --lr 1e-3 {CPU} out")
    none, *gained = (line["accuracy"] for line in results(OUT))
    print(f"none {none}, KL, similarity and shared anchors {gained}")
    assert min(gained) > none + 3


# ------------------------------------------------------------- real data: BioVid and Affwild2
# Both are read as their owners hand them out, however they were unzipped; a clip's images, signal,
# sound and label are of the same span; a fault is one line that begins with its path.


def says(path, read, *given):
    """A user's mistake: one line that begins with the path."""
    with pytest.raises(UserError) as error:
        read(*given)
    message = str(error.value)
    assert "\n" not in message and message.split(": ")[0].endswith(path), message


@parametrize("dataset, sign, layout, present, shown", [
    ("biovid_a", 1, dict(first=100, signals="biosignals_raw"), [50, *range(51, 124, 4), 126],
     [range(51, 124, 8)]),
    ("biovid_b", -1, dict(rows=2817, header=f"\ufeff{HEADER}",
                          signals="biosignals_filtered/biosignals_filtered"),
     [*range(1, 89), 124], [range(51, 70, 2), range(70, 89, 2), [88] * 10, [124] * 10])])
def test_each_clip_has_ten_images_and_the_signal_of_its_span(
        tmp_path, dataset, sign, layout, present, shown):
    """2 to 5 s, cut into as many clips as are wanted. Where there is no image, the nearest one."""
    biovid(tmp_path, frames=present, **layout)
    source = open_dataset(dataset, tmp_path, length=len(shown))
    signals = np.split(sign * np.arange(1024.0, 2560), len(shown))  # at 512 Hz
    for row, images in enumerate(shown):
        assert grays(source.visual(row)) == [*images]
        assert torch.equal(source.privileged(row), data.pain_spectrogram(signals[row]))


def test_pain_spectrogram_is_the_log_power_of_segments_of_16_values():
    values = 5 + randn(1536).numpy()  # the offset stays: no detrending
    values[:100] = 0
    window = np.array([0, 0.5, *[1] * 13, 0.5])  # Tukey, 0.25, periodic
    segments = np.lib.stride_tricks.sliding_window_view(values, 16)[::12] * window  # (127, 16)
    power = np.abs(np.fft.rfft(segments, 132)) ** 2 / (512 * (window**2).sum())
    power[:, 1:-1] *= 2  # of the negative frequencies
    expected = np.log(power.T + 1e-10)[None]
    assert_allclose(data.pain_spectrogram(values), expected, atol=1e-4)


def test_an_image_is_turned_as_its_camera_says():
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(np.uint8([[255, 0]])).save("a.png", exif=exif)
    assert data.read_frames(Path(), ["a.png"], 2)[2, 0].tolist() == [[0, 255]] * 2


COUNTED = f"""\
5 subjects, 10 samples, 21 frames, classes BL1 5, PA4 5, 1 samples of other levels not used
note: {BIO}: no face crops in {FACES}; not used
note: faces/001309_w_21/001309_w_21-BL1-081/img_00001.jpg: not a plain jpg or png (
0 faults, 2 notes
train: 2 videos, 4 clips, 1 clips without a label (-5), 75 valid frames, \
test: 1 videos, 2 clips, 0 clips without a label (-5), 40 valid frames
note: cropped_aligned/new: crops without an annotation file in {VA}; not used
note: audio/three.wav: 2.7 s of sound for 1.3 s of three; is it this video's, and the rate right?
note: {CROPS}: 1 files not used, for their names or as doubles: 1.jpg
note: {WAV}: silent
note: audio/two.wav: silent
0 faults, 5 notes
"""


def test_check_counts_a_sound_root_and_what_is_odd_or_not_used_is_a_note():
    """The litter of macOS and of a NAS is not looked at."""
    names = [f"0{i}1309_w_21-{level}-081" for i in range(5) for level in ("BL1", "PA4")]
    affwild2(biovid(Path(), names, frames=[51, 81]), frames=40)
    affwild2(Path(), "two", 40, label=np.repeat([[0], [-5.0]], [35, 5], 0).repeat(2, 1))
    affwild2(Path(), "three", 40, "Validation_Set", sound=np.full(12000, 9, "i2"))
    for path in [*Path().rglob("*")]:
        for litter in (path.parent, path.parent / "__MACOSX", "@eaDir" / path.parent):
            write(litter / f"._{path.name}", "x")
    bio_csv(BIO)
    biovid(Path(), ["011309_w_21-PA2-081"], frames=[51])
    write("faces/001309_w_21/001309_w_21-BL1-081/img_00001.jpg", "")  # before the window
    jpg(f"{CROPS}/1.jpg", 1)
    jpg("cropped_aligned/new/00001.jpg", 1)
    told = checked("biovid_b", ".") + checked("affwild2", ".")
    assert "no training sample of class 1, " in checked("biovid_b --classes 5", ".", 2)
    lines = re.sub(" in fold .*|cannot ident.*", "", told).splitlines()
    assert [*dict.fromkeys(lines)] == COUNTED.splitlines()


def test_images_cut_to_the_window_are_read_from_face_start_on():
    """Image 1 is then not the video's first one, which its number does not tell."""
    biovid(Path(), frames=[])
    for i in range(1, 81):
        jpg(f"{FACES}/img_{i:05d}.jpg", i + 50)
    faces = ("faces", "biovid_b", 1, 16)
    refused(data, "--check biovid_b --root .", "faces: ", "--face-start")
    says("faces", data.Faces, *faces)
    assert "found 1 groups\n1 faults" in run(data, "--check biovid_b --root . --face-start 2").out
    assert grays(data.Faces(*faces, 2).visual(0))[::9] == [51, 125]

    def first(start):
        return grays(open_dataset("biovid_b", ".", face_start=start).visual(0))[0]

    jpg(f"{FACES}/img_00081.jpg", 131)  # of a whole video
    jpg(f"{FACES}/img_00000.jpg", 50)
    says(FACES, first, None)
    assert first(2.04) == 50


@parametrize("length, layout, place", [
    (2, "VA_Estimation_Challenge", "cropped_aligned/batch2"),
    (3, "6th ABAW Annotations/VA_Set", "cropped_aligned/cropped_aligned"),
    (1, "annotations/5th ABAW Annotations/VA_Set", "cropped_aligned_new_50_vids"),
    (2, "annotations/annotations/6th/VA_Set", "cropped_aligned_new/cropped_aligned_new")])
def test_scores_are_over_valid_frames_each_predicted_by_its_clip(tmp_path, length, layout, place):
    """In every layout. Clips tile a video, the last one aligned to its end; where a clip has no
    image, the nearest one predicts. The part is the annotation's folder."""
    label = randn(164, 2).clamp(-1, 1).numpy().round(3)
    label[3:9, 0] = label[5:12, 1] = label[-1] = -5
    affwild2(tmp_path, "a", 64, layout=layout, label=label[:64], present=range(1, 67))
    affwild2(tmp_path, "b", 100, "Validation_Set", layout, [3, 5, 29, 32, 40, 98], label[64:])
    os.renames("cropped_aligned/a", f"{place}/a")
    source = open_dataset("affwild2", tmp_path, length=length)
    assert [*source.name] == "a/00032 a/00064 b/00032 b/00064 b/00100".split()
    assert [*source.split] == ["train"] * 2 + ["test"] * 3
    assert [grays(source.visual(row)) for row in range(1, 5)] == [
        [*range(36, 65, 4)], [3] + [5] * 3 + [29] * 3 + [32], [40] * 8, [98] * 8]

    valid = (label > -5).all(1)
    row = np.repeat(range(5), [32, 32, 32, 34, 34])[valid]
    own = np.where(valid[:, None], label, np.nan)[[31, 63, 95, 127, 163]]  # of its last frame
    assert_allclose(source.label, own, rtol=1e-6)
    samples = data.label_windows(source, source.label)
    assert samples.index[-1, 0] == 5 - length  # aligned to the end, too
    output = randn(*samples.index.shape, 2)
    prediction, scored = data.aligned(source, samples, output)
    expected = torch.cat([output[(samples.index == r) & samples.keep] for r in row])
    assert torch.equal(prediction, expected)
    assert_allclose(scored, label[valid], rtol=1e-6)


@parametrize("line, fps, rate, stored", [
    ("", 30, 44100, lambda x: np.stack([1.5 * x, 0.5 * x], 1)),
    ("\ufeffduo_left.MP4\t30000/1001\n\n", 30000 / 1001, 16000, lambda x: np.int16(x * 2**15))])
def test_the_sound_of_a_clip_ends_with_its_last_frame(tmp_path, line, fps, rate, stored):
    """And is zero beyond the file. The two faces of a video share it, and a group."""
    def tone(t):
        return 0.6 * np.sin(2765 * t) * (0 <= t) * (t < 3)

    sound = stored(tone(np.arange(3 * rate) / rate))
    affwild2(tmp_path, "duo_right", 100, rate=rate, sound=sound)
    write(tmp_path / "fps.txt", line)
    source = open_dataset("affwild2", tmp_path)
    for row, end in enumerate((32, 64, 96, 100)):
        shown = data.read_sound(*source.signals[row])
        expected = tone(round(end / fps * rate) / rate + np.arange(-47040, 0) / 44100)
        assert np.abs(shown - expected).mean() < 3e-3  # a resampling is unsure of the ends
        assert torch.equal(source.privileged(row), data.log_mel(shown))
    assert {*source.group} == {"duo"} and source.length == 8


def test_24_bits_are_read():
    sound = np.arange(-99, 99)
    with wave.open("a.wav", "wb") as file:
        file.setparams((1, 3, 8000, 0, "NONE", ""))
        file.writeframes(b"".join(int(x).to_bytes(3, "little", signed=True) for x in sound))
    assert np.array_equal(data.read_wav(Path("a.wav"))[1] >> 8, sound)


def test_log_mel_is_its_definition():
    sound = 0.1 * randn(47040).float().numpy()
    sound[20000:30000] *= 1e-6  # below the floor
    mel = np.linspace(0, 2595 * np.log10(1 + 22050 / 700), 66)
    corner = 700 * (10 ** (mel / 2595) - 1)[:, None]  # Hz
    slope = (np.arange(513) * 44100 / 1024 - corner[:-1]) / np.diff(corner, axis=0)  # (65, 513)
    filters = np.minimum(slope[:-1], 1 - slope[1:]).clip(0)  # (64, 513)

    # 20 ms about each 10 ms; scipy divides by the sum of the window
    power = (441 * np.abs(stft(sound, nperseg=882, nfft=1024, padded=False)[2])) ** 2  # (513, 107)
    db = 10 * np.log10(filters @ power + 1e-10)
    assert_allclose(data.log_mel(sound), db.clip(db.max() - 80)[None], atol=0.02)
    assert (data.log_mel(0 * sound) == -100).all()


def source_of(label, group, length=1, **more):
    """A features file of these rows, one clip each; a group is a sequence of `length` a sample."""
    np.savez("rows.npz", **arrays(len(label), 1, label=label, group=group, video=group, **more))
    return Features("rows.npz", length)


@parametrize("subjects", [5, 19, 87])
def test_folds_never_divide_a_subject_and_test_each_sample_once(subjects):
    """An eighth of the subjects that are left chooses the epoch; what has no label stays."""
    group = np.arange(4 * subjects) // 4
    source = source_of(np.arange(4 * subjects) // 2 % 3 - 1, group, 2)
    tested = []
    for fold in range(1, 6):
        samples = fold_windows(source, fold, dense=True)
        train, val, test = ({*group[part.index].flat} for part in samples)
        assert len(samples.train.index) == 3 * len(train) and len(samples.val.index) == 2 * len(val)
        assert sorted([*train, *val, *test]) == [*range(subjects)]
        assert len(val) == math.ceil((subjects - len(test)) / 8)
        tested += [*test]
    assert sorted(tested) == [*range(subjects)]


def test_few_labels_are_a_stratified_nested_draw_from_training_alone():
    """The part of the test, if the data set has one, is kept."""
    level = np.repeat([0, 1, 2, -1], [140, 50, 10, 8])
    split = np.where(np.arange(208) % 4, "train", "test")
    source = source_of(level, np.arange(208), split=split)
    assert ((data.parts(source, 1) == "test") == (split == "test")).all()
    assert "208 samples of 1 clips, 3 classes, 8 clips without a label (-1)" in source.describe()
    train = fold_windows(source, 1).train
    share = np.bincount(train.label[train.labelled])
    before = set()
    for n in (3, 20, 60, share.sum()):
        train = fold_windows(source, 1, labelled=n).train
        kept = train.index[train.labelled, 0]
        count = np.bincount(level[kept])
        assert count.sum() == n and count.min() > 0
        assert np.abs(count - share * n / share.sum()).max() < 2
        assert before <= (before := {*kept.tolist()})
    for n in (2, share.sum() + 1):
        says("rows.npz", fold_windows, source, 1, False, "subjects", n)


def test_few_labels_of_frames_are_those_of_whole_samples():
    source = source_of(randn(100, 2).tanh().numpy(), np.arange(100) // 10, 4)
    tiles, dense = (fold_windows(source, 1, dense, labelled=3).train
                    for dense in (False, True))
    kept = tiles.index[tiles.labelled[:, None] & tiles.keep]
    labelled = dense.index[dense.label.isfinite().all(-1)]
    assert tiles.labelled.sum() == 3 and torch.equal(labelled.unique(), kept.unique())


def test_a_fold_that_cannot_train_or_score_is_refused_before_the_first_is_trained():
    """No label in a part, a class that training lacks, four subjects."""
    group = np.arange(20)
    part = data.parts(source_of(group % 2, group), 1)
    for label in (np.where(part == "test", -1, group % 2), 1 * (part == "test")):
        says("rows.npz", fold_windows, source_of(label, group), 1)
    says("rows.npz", data.parts, source_of(group[:4] % 2, group[:4]), 1)
    assert "found 4 groups\n1 faults" in checked("features", "rows.npz", 2)

    source = source_of(1 * (group == 12), group)  # a class of one subject
    lost = [str(fold) for fold in range(1, 6) if data.parts(source, fold)[12] != "train"]
    assert re.findall(r"class 1 .*fold (\d)", checked("features", "rows.npz", 2)) == lost
    assert len(lost) == 2
    refused(train_teacher, f"{TEACHER} rows.npz --fold all {CPU} out",
            *(f"class 1 of 0 to 1 in fold {fold}" for fold in lost))


FAULTS = [  # a path of a good tree, and its new content or what makes it anew
    ("faces", shutil.rmtree),
    ("faces/071309_w_21/clip7", os.makedirs),
    ("faces/082109_m_53/071309_w_21-BL1-081", os.makedirs),
    (f"{FACES}/img_00051.jpg", "no jpg"),
    (f"{FACES}/img_00051.jpg", lambda path: Image.new("I;16", (9, 9)).save(path, "PNG")),
    (BIO, os.unlink),
    (BIO, f"{HEADER}\n"),
    (BIO, lambda path: bio_csv(path, times=lambda t: t * 1.01)),
    (BIO, lambda path: bio_csv(path, times=lambda t: t // 3906 * 3906)),
    (BIO, lambda path: write(path, path.read_text().replace("\t-1300\t", "\tnan\t"))),
    (BIO, lambda path: write(path, path.read_text().replace("\t-1300\t", "\t1e30\t"))),
    (BIO, lambda path: write(path, re.sub(r"\t-\d+\t", "\t0\t", path.read_text()))),
    (CROPS, shutil.rmtree),
    (CROPS, lambda path: [image.unlink() for image in path.iterdir()]),
    ("cropped_aligned/new", dict(video="new", frames=31)),
    ("cropped_aligned/new", dict(video="new", present=range(1, 104))),
    ("annotations", dict(layout="9th ABAW Annotations/VA_Set")),
    (f"{VA}/Validation_Set/one.txt", dict(part="Validation_Set")),
    (TEXT, "0.1,0.2\n"),
    (TEXT, "valence,arousal\n1.01,0\n"),
    (WAV, os.unlink),
    (WAV, dict(sound=np.zeros(10000))),
    (WAV, dict(sound=np.zeros(44100, "u1"))),
    (WAV, dict(sound=np.r_[np.zeros(14400), np.nan])),
    ("fps.txt", "stray 25\nthree 25"),
    ("fps.txt", "one 25\none 30")]


@parametrize("path, change", FAULTS)
def test_each_fault_is_one_line_of_check_that_begins_with_its_path(tmp_path, path, change):
    affwild2(biovid(tmp_path, frames=[51, 81]))
    if isinstance(change, dict):
        affwild2(tmp_path, **change)
    elif callable(change):
        change(tmp_path / path)
    else:
        write(tmp_path / path, change)
    told = "\n".join(text for dataset in ("biovid_b", "affwild2")
                     for text in run(data, f"--check {dataset} --root {tmp_path}")[1:])
    assert told.count(f"{tmp_path / path}: ") == 1
    assert re.search(f"^(error: )?{tmp_path / path}: ", told, re.M)


def test_every_folder_with_images_is_predicted_or_named(tmp_path, monkeypatch):
    for path in ("top/00040.JPG", "top/a/00040.png", "top/b/deep/00040.jpeg", "other/00040.jpg",
                 "top/0/00000.jpg", "top/kind/00040.bmp", "top/named/face.jpg",
                 "top/short/00009.jpg", "top/torn/00040.jpg",
                 *(f"top/{name}/00040.jpg" for name in ("__MACOSX", "@eaDir", "lost+found"))):
        jpg(tmp_path / path, 40)
    os.truncate(tmp_path / "top/torn/00040.jpg", 300)
    (tmp_path / "top/link").symlink_to(tmp_path / "other")
    (tmp_path / "top/b/loop").symlink_to(tmp_path / "top")
    monkeypatch.chdir(tmp_path / "top")
    faces = data.Faces(".", "affwild2", 8, 16)
    assert [*faces.name] == ["top/00040", "a/00040", "b/deep/00040", "link/00040"]
    assert [line.split(": ")[0] for line in faces.faults] == (
        "0 kind named short torn/00040.jpg".split())


def test_stand_ins_are_read_and_touch_nothing_else(stand_in, monkeypatch):
    for levels in map(str.split, ("BL1 PA4", "BL1 PA1 PA2 PA3 PA4")):
        source = open_dataset("biovid_b", stand_in, len(levels))
        pairs = zip(source.group, source.label, strict=True)
        assert [f"{group}-{levels[i]}" for group, i in pairs] == [name[:15] for name in source.name]

    for name, value in {"VIDEOS": 27, "FACE": 8, "SOUND_RATE": 2205}.items():
        monkeypatch.setattr(data, name, value)
    root = Path("data/affwild2-synthetic")
    ok(data, "--synthetic affwild2")
    source = open_dataset("affwild2", root)
    assert {"video3_left", "video3_right"} <= {*source.video}
    assert data.read_fps(root / "fps.txt", source.video) == {"video5": 25}
    assert source.label.isnan().any()

    ok(data, "--synthetic affwild2")  # it is there
    write("mine/thesis.txt", "")
    for taken in (root, "mine", "mine/thesis.txt/a"):
        assert str(taken).startswith(
            refused(data, f"--synthetic biovid_a --root {taken}").split(": ")[1])


def test_two_who_write_the_same_at_once_end_well():
    """The last file stays, and the first folder; what a killed process left a day ago goes."""
    for name in (".writing-now", ".writing-long"):
        os.mkdir(name)
    os.utime(name, (0, time.time() - 90000))
    for name, inside, kept in ("file", "", "last"), ("folder", "x", "first"):
        with data.replacing(name) as last, data.replacing(name) as first:
            write(last / inside, "last")
            write(first / inside, "first")
        assert Path(name, inside).read_text() == kept
    assert {*os.listdir()} == {".writing-now", "file", "folder"}


def ended_by(fault, workers=0):
    """A program whose reading of data fails, in itself or in a worker process."""
    def read(_):
        if fault is None:
            os.kill(os.getpid(), 9)  # for want of memory
        raise fault if isinstance(fault, BaseException) else AssertionError(fault())

    loader = torch.utils.data.DataLoader([0], None, num_workers=workers, collate_fn=read)
    return run(program(lambda: next(iter(loader))), "")


@parametrize("workers", [0, 1])
@parametrize("fault, words", [
    (UserError("a.npz: is damaged; mend it"), "error: a.npz: is damaged; mend it\n"),
    (RuntimeError("unable to write to file </torch_1_2_3>"), "--workers 0"),
    (OSError(12, "Cannot allocate memory"), "memory"),
    (MemoryError(), "--batch-size"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB. GPU"), "for 9.00 GiB"),
    (lambda: torch.empty(2**50), "--chunk"),
    (lambda: np.empty(2**50), "for 8.00 PiB")])
def test_what_a_user_or_the_system_spoils_is_one_line(fault, words, workers):
    code, _, err = ended_by(fault, workers)
    assert code == 2 and words in err and err.count("\n") == 1


def test_ctrl_c_and_a_killed_worker_are_one_line_and_the_programs_own_faults_are_not():
    assert "--workers 0" in ended_by(None, 1).err
    code, _, err = ended_by(KeyboardInterrupt())
    assert code == 130 and err.count("\n") == 1
    with pytest.raises(RuntimeError):
        ended_by(RuntimeError("shapes differ"))


def test_long_work_is_a_line_every_half_minute_in_a_file(monkeypatch):
    bar = program(lambda: [*data.bar(range(4), "crops")])
    assert run(bar, "").err == ""
    monkeypatch.setattr(time, "monotonic", iter(range(0, 999, 20)).__next__)
    assert run(bar, "").err == ("crops 2 of 4, about 1 min left\n"
                                "crops 4 of 4, about 0 min left\n")


def test_an_output_that_cannot_be_written_is_one_line(stand_in):
    says("/proc", data.writable, "/proc")
    line = f"{sys.executable} {data.__file__} --check biovid_b --root {stand_in}"
    assert os.system(f"env -u PYTHONUNBUFFERED {line} 2>told >/dev/full") == 2 << 8  # exit code 2
    assert re.fullmatch("error: .*\n", Path("told").read_text())


def test_a_full_disk_is_one_line_and_leaves_the_old_file_alone():
    def main():
        with data.replacing(name) as part:
            part.symlink_to("/dev/full")
            writers[name](part)

    writers = {"a.npz": np.savez, "a.pt": lambda part: torch.save(0, part)}
    for name in writers:
        write(name, "old")
        refused(program(main), "", f"error: {name}: ")


# ---------------------------------------------------------------------- face crops from videos
# Image i is what the video shows at (i - 1) / 25 s, its face in the middle with level eyes; a video
# that fails is named, and nothing is half written. Skipped where OpenCV is not installed.


@pytest.fixture
def cv2():
    return pytest.importorskip("cv2", reason="face crops need OpenCV")


def film(cv2, path, images, fps=25):
    size = images[0].shape[1::-1]
    writer = cv2.VideoWriter(str(made(path)), cv2.VideoWriter_fourcc(*"MJPG"), fps, size)
    for image in images:
        writer.write(image)
    writer.release()


def portrait():
    image = np.full((240, 320, 3), 70, np.uint8)
    face, = data.draw_faces(np.zeros(6), np.zeros((4, 1)))
    image[60:172, 100:212] = face.repeat(2, 0).repeat(2, 1)[..., ::-1]
    return image


def test_smooth_faces_is_the_median_over_half_a_second():
    """A gap of one image is filled from both sides."""
    faces = randn(60, 4).numpy() + 9
    faces[[0, 10, 20, 21]] = np.nan
    smooth = data.smooth_faces(faces.copy())
    faces[10] = (faces[9] + faces[11]) / 2
    assert [*smooth] == [*range(1, 20), *range(22, 60)]
    for i, face in smooth.items():
        near = faces[max(i - 6, 0):i + 7]  # 13 images, 0.52 s
        assert_allclose(face, np.nanmedian(near, 0))


def test_a_video_is_read_by_its_time_stamps(monkeypatch, cv2):
    """Of a variable rate, as phones have; where they are none or broken, at the nominal rate."""
    stamps = [0, 0.03, 0.11, 0.15, 0, 1e6]

    class Video:
        at = -1

        def read(self):
            self.at += 1
            return self.at < len(stamps), np.full((2, 2, 3), self.at, np.uint8)

        def get(self, what):
            stamp = [*stamps, 0][self.at]
            return {cv2.CAP_PROP_FPS: 12.5, cv2.CAP_PROP_POS_MSEC: 1000 * stamp}.get(what, 0)

    monkeypatch.setattr(cv2, "VideoCapture", lambda path: Video())
    assert [frame[0, 0, 0] for frame in data.video_frames("a")] == [0, 1, 2, 2, 3, 4, 4, 5, 5]


def test_crop_finds_the_faces_where_and_when_they_are(cv2, monkeypatch):
    """Of a video of 30 frames a second, too: crops are of 25."""
    face = portrait()
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {1, 5, 6})
    assert data.parse(["--crop", "v"]).workers == 3  # the CPUs allotted
    film(cv2, f"v/deep/{NAME}.avi", [face] * 24 + [0 * face] * 12 + [face] * 24, 30)
    ok(data, "--crop v --root . --workers 0")
    assert sorted(os.listdir(FACES)) == [
        f"img_{i:05d}.jpg" for i in (*range(1, 21), *range(31, 51))]

    image = np.int16(Image.open(f"{FACES}/img_00001.jpg"))
    skin = np.argwhere(image[..., 0] > image[..., 2] + 20)
    low, high = skin.min(0), skin.max(0)
    assert np.abs(low + high - 111).max() < 14 and 70 < high[0] - low[0] < 88  # with a margin


def test_crop_levels_the_eyes_of_the_largest_face(monkeypatch, cv2):
    """Part of it may lie outside of the frame."""
    image = np.zeros((960, 1280, 3), np.uint8)  # is shrunk to 480 x 640
    cv2.circle(image, (80, 800), 24, (0, 255, 0), -1)
    cv2.circle(image, (320, 640), 24, (255, 0, 0), -1)
    film(cv2, "me.avi", [image])
    faces = [[5, 5, 9, 9, 0, 9, 0, 0], [-60, 160, 320, 400, 40, 400, 160, 320]]
    monkeypatch.setattr(data, "face_detector", lambda file: lambda image: faces)
    ok(data, "--crop me.avi --root . --workers 0")
    # each is hypot(120, 80) / 2 from the middle of 1.2 * 400 pixels, which become 112: 17
    eyes = np.array(Image.open("faces/me/img_00001.jpg"))[56, [39, 73], 1:] > 100
    assert eyes.tolist() == [[True, False], [False, True]]


def test_what_fails_is_named_and_what_is_there_stays(cv2, monkeypatch):
    """And processes write the same as none."""
    images = [portrait()] * 20
    for name in ("good.MKV", "torn.avi"):
        film(cv2, f"elsewhere/{name}", images)
    write("v/b/notes.txt", "")
    film(cv2, "v/_old/good.avi", images)
    Path("v/a").symlink_to(Path("elsewhere").resolve())
    film(cv2, "v/black.avi", [0 * images[0]])
    os.truncate("v/a/torn.avi", 30000)
    write("v/text.MP4", "no video")
    written, forks, fork = [], [], os.fork
    monkeypatch.setattr(os, "fork", lambda: forks.append("") or fork())
    for workers in "20":
        line = f"--crop v --root {workers} --workers {workers}"
        code, out, _ = run(data, line)
        *named, _ = (line.split(": ")[0] for line in out.splitlines() if ": " in line)
        assert code == 1 and named == ["v/a/torn.avi", "v/black.avi", "v/text.MP4"]
        assert out.endswith("2 others not used: v/_old, v/b/notes.txt\n")
        written.append({path.name: path.read_bytes() for path in Path(workers).rglob("*.*")})
    assert written[0] == written[1] and len(written[0]) == 20
    assert len(forks) == 2

    def stop(*given):
        raise KeyboardInterrupt

    film(cv2, "v/a/torn.avi", images)
    before = on_disk()
    with monkeypatch.context() as patch:
        patch.setattr(cv2, "imencode", stop)
        assert run(data, line).code == 130
    run(data, line)
    assert on_disk().items() > before.items() and len(os.listdir("0/faces/a/torn")) == 20


def test_each_mistake_with_crop_is_one_line(cv2, monkeypatch):
    for path in ("me.avi", "none/._a.mp4", f"mixed/{NAME}.mp4", "mixed/clip.avi", f"two/{NAME}.avi",
                 f"two/a/{NAME}.avi", "signals/biosignals_raw/a"):
        write(path, "")
    for line, words in (("none --root .", "none"), ("me.avi", "--root"),
                        ("me.avi --root signals", "me.avi"), ("mixed --root .", "mixed/clip.avi"),
                        ("two --root .", FACES), ("me.avi --root me.avi", "me.avi/faces"),
                        ("me.avi --root . --detector a.onnx", "a.onnx")):
        refused(data, f"--crop {line}", words)
    monkeypatch.setitem(sys.modules, "cv2", None)
    refused(data, "--crop me.avi --root . --detector b.onnx", "pip install")


# ------------------------------------------------------------ runs, saved students, resuming
# A run is what its flags say; it can be interrupted and repeated, and never replaces another. A
# saved student needs the face alone. A damaged file is refused, and code in it does not run.


@contextlib.contextmanager
def watched(end=None):
    """Adam's steps meanwhile: the learning rate of each and the last one's gradients; Ctrl-C after
    step `end`."""
    rates, gradients = [], []

    def look(optimizer, *_):
        group, = optimizer.param_groups
        rates.append(group["lr"])
        gradients[:] = [p.grad.clone() for p in group["params"]]
        if len(rates) == end:
            raise KeyboardInterrupt

    handle = register_optimizer_step_post_hook(look)
    yield rates, gradients
    handle.remove()


@pytest.fixture
def mine(views_run):
    """The run folder of a copy of `views_run`, in out/."""
    return copied(views_run, OUT)


W = {  # flags of a student: what lambda weighs
    "": pkdot_loss,
    "--k 7": partial(pkdot_loss, k=7),
    "--epsilon 1": partial(pkdot_loss, epsilon=1),
    "--no-debias": partial(pkdot_loss, debias=False),
    "--anchors similar": partial(pkdot_loss, anchors="similar"),
    "--shared-anchors": partial(pkdot_loss, shared=True),
    "--no-transport": partial(pkdot_loss, transport=False),
    "--method cosine": cosine_loss,
    "--method mse": mse_loss,
    "--method rkd": rkd_loss,
    "--method kl": kl_loss,
    "--method similarity --k 168": partial(similarity_loss, k=168),  # all: the draw is no matter
    "--method none": lambda s, t: 0 * s.sum(),
    "--kl 2": pkdot_loss,
    "--finetune --chunk 50": pkdot_loss}


@parametrize("flags", W)
def test_a_step_of_a_student_is_equation_9(flags, views, mine):
    """One batch of all training samples; with a rate of 0 the student is saved as it began: with
    stage 1's backbone, stage 2's T-Net, and a head that is not the teacher's."""
    with watched() as (_, gradients):
        distil(f"{flags} --lambda 3 --lr 0 --epochs 1 --batch-size 168 {CPU} out")
    line = logged(mine, "student")[-1]
    its = opened(mine, f"student-{line['method']}")
    index, _, label = its.fold.train
    clips = Features(views).rows["visual"][index]
    s = its.student(clips)
    t = its.head(*its.rows(index))
    loss_gt = F.cross_entropy(s.output, label)
    w = W[flags](*(x.output if "method kl" in flags else x.z for x in (s, t)))
    beside = kl_loss(s.output, t.output) * ("--kl" in flags)
    (loss_gt + 3 * w + 2 * beside).backward()

    found = [line["loss_gt"], line["w"], line["kl_beside"]]
    assert found == approx([loss_gt.item(), w.item(), beside.item()], rel=1e-4)
    trained = [its.student.head] + [its.student.backbone] * ("finetune" in flags)
    expected = [x.grad for part in trained for x in part.parameters()]
    for ours, theirs in zip(gradients, expected, strict=True):
        assert (ours - theirs).norm() <= 1e-3 * theirs.norm()
    assert equal(its.student.tnet.state_dict(), saved(mine, "teacher")["tnet"])
    assert not equal(its.student.head.state_dict(), its.head.state_dict())
    student = train_student.load_student(mine / f"student-{line['method']}.pt")
    assert torch.equal(student(clips).output, s.output) and student.settings["visual_dim"] == 12
    pytest.raises(ValueError, student, clips[0])


@parametrize("select", ["val", "test", "last"])
def test_what_chooses_the_epoch_and_what_the_last_line_says(select, mine):
    said = distil(f"--select {select} --epochs 7 --lr 0.03 --batch-size 64 {CPU} out")
    assert shown(said) == last_results("visual", "student", "multimodal")
    scores = [line["accuracy"] for line in logged(mine, "student")[-7:]]
    best = scores.index(max(scores))
    assert best < 6
    chosen = 6 if select == "last" else best
    record = results(OUT)[-1]
    part = "accuracy" if select == "test" else "validation"
    assert [record["epoch"], record[part]] == approx([chosen + 1, scores[chosen]])

    its = opened(mine)  # a table chooses lambda by validation, whatever chose the epoch
    index, _, label = its.fold.val
    output = its.student.fuse(its.features.rows["visual"][index]).output
    right = (output.argmax(1) == label).double().mean().item()
    assert record["validation"] == approx(100 * right)


@once
def odd(stand_in, tmp_path_factory):
    """A run with another value for nearly every flag, and the learning rates of its steps."""
    out = tmp_path_factory.mktemp("odd")
    with slight_backbones(), watched() as (rates, _), MonkeyPatch.context() as patch:
        patch.delitem(models.VISUAL, "r3d18")
        ok(train_teacher, f"--dataset biovid_b --root {stand_in} --classes 5 --fold 2 --clips 2 "
                          "--visual-backbone i3d --image-size 40 --face-start 0.5 --fusion jca "
                          "--folds clips --backbone-epochs 2 --batch-size 8 --lr 0.002 "
                          f"--fusion-epochs 3 --fusion-batch-size 9 --fusion-lr 0.005 {CPU} {out}")
        distil(f"--finetune --epochs 2 --batch-size 8 --k 5 --lr 0.003 {CPU} {out}")
    return out / "biovid_b-synthetic", rates


def test_each_flag_is_heard(odd, stand_in):
    """The stand-in's 50 samples are those of 5 subjects: 10 to test, 5 to validate, 35 to train."""
    out, rates = odd
    assert rates == 4 * 5 * [0.002] + 3 * 4 * [0.005] + 2 * 4 * [0.003]
    names = saved(out / "c5-i3d-jca-length2-clips/fold2", "student-pkdot")["test_names"]
    assert len({name[:11] for name in names}) > 1

    # the layer in the backbone's place has seen these pixels
    run = out / "c5-i3d-length2-clips/fold2"
    layer = saved(run, "visual")["model"]
    source = open_dataset("biovid_b", stand_in, 5, 2, 40, face_start=0.5)
    pixels = source.visual(7).float().mean((1, 2, 3)) / 255
    expected = linear(layer, "backbone.features.3", pixels)
    seen = Features(run / "features.npz").rows["visual"][7]
    assert torch.allclose(seen, expected, atol=1e-6)


def test_an_evaluation_repeats_the_score_whatever_the_clips(odd, slight):
    """Here two a sample, five classes, and a backbone of the student's own."""
    run = odd[0] / "c5-i3d-jca-length2-clips/fold2"
    line = f"--evaluate {run}/student-pkdot.pt --workers 0"
    assert shown(distil(line)) == recorded(run)
    refused(train_student, f"{line} --face-start 9", "faces")  # where no image lies


CACHED = Path("hub/checkpoints/r3d_18-b3b3357e.pth")  # where torch puts what it downloads


@parametrize("flag", ["--pretrained", f"--visual-weights {CACHED}"])
def test_training_begins_with_public_weights(flag, home, slight, monkeypatch):
    public = models.R3D18().features.state_dict()
    torch.save({"state_dict": public}, made(CACHED))
    monkeypatch.setenv("TORCH_HOME", ".")
    ok(train_teacher, f"{flag} --root {home}/data/biovid_b --lr 0 --backbone-epochs 1 --workers 0")
    begun = saved(RUNS["biovid_b"], "visual")["model"]
    assert all(torch.equal(begun[f"backbone.features.{key}"], x) for key, x in public.items())


@parametrize("content, word", [
    (nn.Linear(2, 2), "state_dict()"),
    ({0: torch.ones(2)}, "state_dict()"),
    ({}, "state_dict()"),
    ({"layer.bias": torch.ones(2).to_sparse()}, "layer.bias")])
def test_what_is_no_state_dict_is_one_line(content, word, home, slight, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", ".")
    torch.save(content, made(CACHED))
    failed(train_teacher, f"--pretrained --root {home}/data/biovid_b {NEW}", CACHED, word)


def test_a_student_follows_the_newest_teacher_or_the_one_named(home, slight):
    """Whose features suffice, without its data; an evaluation asks where that is."""
    shutil.copytree(home / "runs", "runs")
    refused(train_student, f"--evaluate {RUN}/student-pkdot.pt", "--root")
    for flags, dataset in {"": "features", "--dataset biovid_b": "biovid_b",
                           f"--teacher {home}/{RUNS['affwild2']}/teacher.pt": "affwild2"}.items():
        assert "is not there" in distil(f"--method mse --epochs 1 --workers 0 {flags}")
        path, = Path("runs").rglob("student-mse.pt")
        assert path.parent == RUNS[dataset]
        path.unlink()


@parametrize("dataset, faces, columns", [
    ("biovid_b", "biovid_b/faces", "sample,p(BL1),p(PA4)"),
    ("affwild2", "affwild2/cropped_aligned", "clip,valence,arousal"),
    ("features", "views.npz", "sample,p(0),p(1),p(2),p(3)")])
@torch.no_grad()
def test_evaluation_and_prediction_need_no_privileged_file(dataset, faces, columns, home, slight):
    """They are the saved student's, of what the privileged modality is missing from."""
    run = home / RUNS[dataset]
    privileged = shutil.ignore_patterns("biosignals*", "audio")
    shutil.copytree(home / "data", "data", ignore=privileged)
    student = f"{run}/student-pkdot.pt --workers 0"
    assert shown(distil(f"--evaluate {student}")) == recorded(run)

    its = opened(run)
    tiles = data.windows(its.features.video, its.length)
    said = distil(f"--predict data/{faces} --student {student}")
    written = (run / "student-pkdot.csv").read_text()  # in training: of the test part
    for text, (index, keep, *known) in (said, tiles), (written, its.fold.test):
        header, *lines = (line.split(",") for line in text.splitlines())
        names, *numbers = zip(*lines, strict=True)
        rows = index[keep]
        expected = its.student.fuse(its.features.rows["visual"][index]).output
        expected = expected[keep] if dataset == "affwild2" else expected.softmax(1)
        own = its.features.name[rows]  # of BioVid <sample>/0
        assert all(name in f"{line}/0" for name, line in zip(own, names, strict=True))
        if known:  # group and label are there, too
            groups, *numbers = numbers
            assert [*groups] == [*map(str, its.features.group[rows])]
            label = its.features.label[rows].reshape(len(rows), -1)
            expected = torch.cat([label, expected], 1)
        else:
            assert header == columns.split(",")
        assert_allclose(np.float64(numbers).T, expected, atol=1e-4)


def test_a_student_is_evaluated_on_its_own_test_samples_alone(at_home, tmp_path):
    """Whatever their order, whoever else is in the file, and without its privileged view."""
    whole = np.load("data/views.npz")
    path = tmp_path / "a.npz"
    line = f"--evaluate {RUN}/student-pkdot.pt --root {path}"

    def write_file(name, label=whole["label"]):
        row = name % 240
        np.savez(path, visual=whole["visual"][row], label=label[row], name=name)

    write_file(default_rng(0).permutation(480))
    assert shown(distil(line)) == recorded(RUN)
    assert "other visual rows" in run(train_student, line).err  # twice as many
    assert not run(train_student, f"--evaluate {RUN}/student-pkdot.pt").err
    write_file(np.arange(240), 3 - whole["label"])
    refused(train_student, line, path)


FILES = "visual privileged teacher student-pkdot".split()
MINE = OUT / "features/c4/fold1"
FORK = multiprocessing.get_context("fork")


def same(a, b):
    return [name for name in FILES if equal(saved(a, name), saved(b, name))]


def test_same_seed_twice_gives_identical_numbers(views, views_run):
    again = train_on(views, Path("again"), student="--lambda 0.4 --k 30")
    other = train_on(views, Path("other"), "--seed 1", student="--seed 1")
    assert same(again, views_run) == FILES
    assert same(other, views_run) == []


def commands(views):
    """Those of `views_run`, which go on where they were stopped."""
    return [(train_teacher, f"{TEACHER} {views} {CPU} out --resume"),
            (train_student, f"{STUDENT} out --resume")]


@parametrize("stage, end", [
    ("visual", 5), ("privileged", 14), ("fusion", 23), ("student", 36)])
def test_resumed_equals_uninterrupted(stage, end, views, views_run, monkeypatch):
    """Stopped within the second epoch of a stage."""
    monkeypatch.setattr(train_teacher, "SAVE_EVERY", 0)
    with watched(end):
        codes = [run(script, line).code for script, line in 2 * commands(views)]
    assert 130 in codes and codes[2:] == [0, 0]
    assert same(MINE, views_run) == FILES
    epochs = [line["epoch"] for line in logged(MINE, stage)]
    assert len({*epochs}) == len(epochs) > 2
    assert not [*MINE.glob("*.progress")]


def kept_files(run):
    names = "visual.pt", "privileged.pt", "features.npz", "teacher.pt"
    return [(run / name).read_bytes() for name in names]


def test_distillation_leaves_the_teacher_as_it_was(mine):
    before = kept_files(mine)
    for flags in ("", "--finetune"):
        distil(f"{STUDENT} out {flags}")
        assert kept_files(mine) == before


@parametrize("name, part, key, value", [
    ("teacher", "settings", "seed", 1),
    ("visual", "model", "backbone.features.0.bias", torch.zeros(512))
])
def test_a_checkpoint_that_somebody_changed_is_refused(name, part, key, value, mine):
    state = saved(mine, name)
    state[part][key] = value
    torch.save(state, mine / f"{name}.pt")
    refused(train_student, f"--teacher {mine}/teacher.pt", f"{name}.pt")


@parametrize("fault, word", [
    (MemoryError(), "memory"),
    (PermissionError(13, "Permission denied"), "Permission")])
def test_a_checkpoint_that_is_not_damaged_is_not_called_so(fault, word, mine, monkeypatch):
    def read(*_, **__):
        raise fault

    monkeypatch.setattr(torch, "load", read)
    refused(train_student, f"--teacher {mine}/teacher.pt", word)


def test_a_teacher_without_its_backbones_names_what_is_missing(mine):
    os.remove(mine / "visual.pt")
    refused(train_student, f"--teacher {mine}/teacher.pt", "visual.pt", "no such file")


@parametrize("flags", [
    "--lr 0.1", "--fusion-epochs 6", "--fusion mmt --batch-size 7", "--resume --lr 0.1"])
def test_a_run_of_other_settings_is_never_overwritten(flags, views, mine):
    before = kept_files(mine)
    failed(train_teacher, f"{TEACHER} {views} {CPU} out {flags}", mine)
    assert kept_files(mine) == before


def test_a_teacher_follows_backbones_that_were_trained_again(views, mine):
    state = saved(mine, "visual")
    del state["seal"]
    state["model"]["backbone.features.0.bias"] += 1
    train_teacher.save(mine / "visual.pt", state)
    refused(train_student, f"{STUDENT} out", mine, "--resume")
    before = np.load(mine / "features.npz")["visual"]
    ok(train_teacher, f"{TEACHER} {views} {CPU} out --resume")
    assert not np.array_equal(np.load(mine / "features.npz")["visual"], before)
    distil(f"{STUDENT} out")


def test_another_head_shares_stage_1_and_what_is_finished_stays(views, mine):
    before = kept_files(mine)
    with watched() as (rates, _):
        for script, line in commands(views):
            ok(script, line)
        assert rates == []
        said = ok(train_teacher, f"{TEACHER} {views} --fusion mmt {CPU} out")
    assert rates == 15 * [1e-4]
    assert shown(said) == last_results(*VIEWS, "multimodal")
    assert kept_files(mine) == before


@parametrize("name, line, one", [
    ("visual", f"{TEACHER} views.npz --seed 5 --batch-size 168 --lr 1e30", "--backbone-epochs 1"),
    ("student-pkdot", "--batch-size 168 --lr 1e30", "--epochs 1")])
def test_a_run_that_diverges_keeps_its_best_epoch(name, line, one, views, views_run):
    """Of one step an epoch, of which the second has no loss: the first is that of a run of one."""
    shutil.copy(views, "views.npz")
    script = train_teacher if name == "visual" else train_student
    for out, more in ("one", one), ("out", ""):
        copied(views_run, Path(out))
        ended = run(script, f"{line} {more} {CPU} {out}")
    path = re.search(r"out/(\S+)(\.\S+)\.pt\b", ended.err)
    assert ended.code == 2 and "--lr" in ended.err
    assert equal(saved(OUT, path[1] + path[2]), saved(Path("one"), path[1]))


def test_files_are_read_by_processes_of_their_own(home, slight, monkeypatch):
    monkeypatch.setattr(os, "fork", lambda: os.open("no process left", 0))
    failed(train_teacher, f"--root {home}/data/biovid_b --workers 1", "no process left")


@parametrize("dataset, pattern", [
    ("biovid_b", "*/*/*.csv"),
    ("biovid_b", "*/*/*/*.jpg"),
    ("affwild2", "*/*.wav")])
def test_a_data_set_is_what_it_holds_wherever_it_lies(dataset, pattern, home, slight):
    """Moved it is the same; with other files under the same names it is not."""
    shutil.copytree(home / "runs", "runs")
    shutil.copytree(home / "data", "moved")
    line = f"--dataset {dataset} --root moved/{dataset} --workers 0 --resume"
    ok(train_teacher, line)
    for path in Path("moved", dataset).glob(pattern):
        if path.suffix == ".jpg":
            jpg(path, 7, size=64)
            continue
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1  # the size stays
        path.write_bytes(content)
    refused(train_teacher, line, RUNS[dataset])


@parametrize("key", ["group", "label", *VIEWS])
def test_other_groups_labels_or_features_make_another_data_set(key, views):
    content = dict(np.load(views))
    shutil.copy(views, "mine.npz")
    run = train_on("mine.npz", OUT)
    content[key] = np.roll(content.get(key, np.arange(240) // 30), 30, 0)
    np.savez("mine.npz", **content)
    refused(train_teacher, f"{TEACHER} mine.npz {CPU} out --resume", run)
    refused(train_student, f"{STUDENT} out", "mine.npz")


class Bomb:
    """Whoever unpickles it makes a file."""

    def __reduce__(self):
        return open, ("went off", "w")


def spoiled(content, rng):
    """Contents of a file that is cut short, has a hole, lacks a piece, or holds code."""
    a, b = sorted(rng.integers(0, len(content), 2))
    yield content[:a]
    yield content[:a] + bytes(b - a) + content[b:]
    yield content[:a] + content[b:]
    for save in (pickle.dump, torch.save, lambda bomb, file: np.savez(file, visual=[bomb])):
        file = io.BytesIO()
        save(Bomb(), file)
        yield file.getvalue()


NEW = "--backbone-epochs 1 --fusion-epochs 1 --workers 0 --out new"
PREDICT = f"train_student --predict data/views.npz --student {RUN}/student-pkdot.pt"
DISTIL = f"train_student --teacher {RUN}/teacher.pt --method mse"
READERS = [  # a file, and a command that reads it
    ("data/biovid_b/*/*/*.csv", f"train_teacher {NEW}"),
    ("data/biovid_b/*/*/*/*.jpg", f"train_teacher {NEW}"),
    ("data/affwild2/*/*.wav", f"train_teacher --dataset affwild2 {NEW}"),
    ("data/affwild2/*/*/*/*.txt", f"train_teacher --dataset affwild2 {NEW}"),
    ("data/views.npz", f"train_teacher {FEATURES} {NEW}"),
    ("data/views.npz", PREDICT),
    (f"{RUN}/student-pkdot.pt", PREDICT),
    (f"{RUN}/teacher.pt", DISTIL),
    (f"{RUN}/visual.pt", DISTIL),
    (f"{RUN}/features.npz", DISTIL),
    ("half/*/*/*/*.progress", f"train_teacher {FEATURES} --workers 0 --out half --resume"),
    ("runs/biovid_b/*/*/visual.pt",
     f"train_teacher --visual-weights {RUNS['biovid_b']}/visual.pt {NEW}")]


@parametrize("file, line", READERS)
def test_each_generated_fault_is_one_line_that_names_the_file_or_does_no_harm(
        file, line, home, slight):
    """And code in a file does not run."""
    shutil.copytree(home, ".", dirs_exist_ok=True)
    with watched(5):
        run(train_teacher, f"{FEATURES} --workers 0 --out half")
    path = next(Path().glob(file))
    script, line = line.split(" ", 1)
    for content in spoiled(path.read_bytes(), default_rng(0)):
        write(path, content)
        code, _, err = run(SCRIPT[script], line)
        harmless = code == 0 and file.startswith("data")
        assert harmless or code == 2 and err.count("\n") == 1 and path.stem in err
        shutil.rmtree("new", ignore_errors=True)
    assert code == 2 and not Path("went off").exists()


# ----------------------------------------------------------------------------- tables and figures
# A cell holds the runs of its own row's flags and no others; what lacks is trained, what is there
# is not. Beside the paper's numbers stand ours, with their spread and their paired differences.


def test_seeds_are_what_varies_with_a_single_fold_and_a_bound_pairs_with_each():
    ours = {(1, 0): 0.1, (1, 1): 0.2, (1, 2): 0.3}
    half = stats.t.ppf(0.975, 2) * 0.1 / math.sqrt(3)
    bound = {(1, None): 0.4}
    assert train_student.interval(ours, bound) == approx((-0.2, -0.2 - half, half - 0.2))
    assert train_student.interval(bound, ours) == approx((0.2, 0.2 - half, half + 0.2))


@parametrize("name, rows", [
    ("2", ["| Cosine similarity [10] | 75.40 | not run | 0.37 | not run | 0.53 | not run |",
           "| MSE [8] | N/A | not run | 0.39 | not run | 0.53 | not run |",
           "| KL [8] | 75.80 | not run | N/A | n/a | N/A | n/a |",
           "| PKDOT | 78.76 | not run | 0.43 | not run | 0.56 | not run |",
           "| PKDOT, shared anchors | - | not run | - | not run | - | not run |",
           "| RKD [31] | - | not run | - | not run | - | not run |",
           "| Similarity distributions | - | not run | - | not run | - | not run |",
           "| PKDOT + 0.4 KL | - | not run | - | n/a | - | n/a |",
           "| PKDOT, the last epoch | - | not run | - | not run | - | not run |",
           "| none (lambda 0) | - | not run | - | not run | - | not run |",
           "| Visual only (lower bound) | - | not run | - | not run | - | not run |",
           "| Multimodal (upper bound) | - | not run | - | not run | - | not run |"]),
    ("3", ["| ResNet-50 [44] | 0.31 |  | 0.17 |  |",
           "| SENet-50 [45] | 0.28 |  | 0.34 |  |",
           "| MobileNet [46] | 0.28 |  | 0.44 |  |",
           "| RegNet + GRU [47] | 0.43 |  | 0.57 |  |",
           "| ResNeXt + SENet [48] | 0.51 |  | 0.48 |  |",
           "| Visual only (lower bound) | 0.41 | not run | 0.51 | not run |",
           "| none (lambda 0) | - | not run | - | not run |",
           "| PKDOT | 0.43 | not run | 0.56 | not run |",
           "| Multimodal (upper bound) | 0.67 | not run | 0.59 | not run |"]),
    ("4", ["| Sparse LSTM [19] | 61.70 |  | 29.70 |  |",
           "| ViT [18] | 72.11 |  | NR |  |",
           "| FAD + RF [49] | 72.40 |  | 30.80 |  |",
           "| GNN [50] | 73.20 |  | NR |  |",
           "| ViT [51] | 73.28 |  | 31.52 |  |",
           "| ResNet-18 [52] | NR |  | 36.60 |  |",
           "| Visual only (lower bound) | 72.10 | not run | 30.38 | not run |",
           "| none (lambda 0) | - | not run | - | not run |",
           "| PKDOT | 74.55 | not run | 33.65 | not run |",
           "| Multimodal (upper bound) | 83.50 | not run | 36.40 | not run |"]),
    ("5", ["| Handcrafted + RF [22] | 72.70 |  |",
           "| Visual only (lower bound) | 74.10 | not run |",
           "| none (lambda 0) | - | not run |",
           "| PKDOT | 78.76 | not run |",
           "| Multimodal (upper bound) | 81.30 | not run |"])])
def test_the_papers_numbers(name, rows):
    """Where there is no data they stand alone, and what is missing is named."""
    code, out, err = run(train_student, f"--table {name} {CPU} out")
    assert "\n".join(rows) in out
    assert code == 2 and ("data/biovid_b" in err) == (name in "25")


# what the flags of a row, or of a figure's column, change in a student's line of results.jsonl
ROWS_AND_COLUMNS = """
PKDOT                                 |
Cosine similarity [10]                | method cosine
MSE [8]                               | method mse
KL [8]                                | method kl
RKD [31]                              | method rkd
PKDOT, shared anchors                 | shared True
Similarity distributions              | method similarity
PKDOT + 0.4 KL                        | kl 0.4
PKDOT, the last epoch                 | select last
none (lambda 0)                       | method none, lambda 0.0
anchors shared by the batch           | shared True
anchors shared, random                | shared True, anchors random
anchors: most similar                 | anchors similar
anchors: random                       | anchors random
no transport: row i with row i        | transport False
similarity distributions              | method similarity
not debiased (Eq. 5)                  | debias False
T-Net's output zero                   | hallucinate zero
true privileged features (no student) | hallucinate oracle
backbone frozen                       |
backbone trained                      | finetune True
lambda 0.1                            | lambda 0.1
lambda 1                              | lambda 1.0
lambda 4                              | lambda 4.0
lambda 10                             | lambda 10.0
epoch chosen on the test fold         | select test
folds over clips                      | folds clips
the release's lambda and epsilon      | lambda 0.6, epsilon 0.01
the release's protocol                | lambda 0.6, epsilon 0.01, select test, folds clips
batch size 32                         | batch_size 32
batch size 64                         | batch_size 64
batch size 128                        | batch_size 128
batch size 256                        | batch_size 256
epsilon 0.001                         | epsilon 0.001
epsilon 0.01                          | epsilon 0.01
epsilon 0.1                           | epsilon 0.1
epsilon 1                             | epsilon 1.0
epsilon 10                            | epsilon 10.0
labels 35                             | labelled 35
labels 70                             | labelled 70
labels 210                            | labelled 210
labels all                            |
views accuracy                        |
k = 5, views accuracy                 | k 5
k = 15, views accuracy                | k 15
k = 30, views accuracy                | k 30
none, views accuracy                  | method none, lambda 0.0
PKDOT, views accuracy                 |
PKDOT shared, views accuracy          | shared True
row by row, views accuracy            | shared True, anchors random, transport False
similarity, views accuracy            | method similarity, lambda 1.0
KL, views accuracy                    | method kl"""
CHANGES = {}
for line in ROWS_AND_COLUMNS.strip().splitlines():
    label, changes = line.split("|")
    CHANGES[label.strip()] = dict(map(str.split, filter(str.strip, changes.split(","))))
REFERENCE = {  # what a figure's differences are to: row (None: the same) and column
    "--figure 6": ("batch size 128", "k = 30, views accuracy"),
    "--figure 7": ("epsilon 0.1", "views accuracy"),
    "--figure labels": (None, "none, views accuracy")}


def made_up(line):
    """An accuracy for a student of these settings, fold and seed."""
    settings = repr([str(line.get(key, PAPERS[key])) for key in PAPERS])
    return {"accuracy": random.Random(settings).uniform(0, 100)}


def scores_of(row, column):
    """(folds, seeds) of a cell."""
    settings = PAPERS | CHANGES[row] | CHANGES[column]
    return np.array([[made_up(settings | {"fold": fold, "seed": seed})["accuracy"]
                      for seed in (0, 1)] for fold in (1, 2)])


def points(name):
    """Mean, sd, runs, difference, low and high of the cells in a figure's csv that have runs."""
    path = OUT / f"figure{name}-views.csv"
    header = path.read_text().splitlines()[0]
    assert header == "row,column,mean,sd,runs,difference,low,high,data"
    table = np.loadtxt(path, delimiter=",", skiprows=1, quotechar='"', usecols=range(2, 8))
    return table[table[:, 2] > 0]


@parametrize("line, count", [
    ("--table 2", 10),
    ("--table 3", 2),
    ("--table 4", 2),
    ("--table 5", 2),
    ("--table choices", 22),
    ("--figure 6", 4 * 3),
    ("--figure 7", 5),
    ("--figure labels", 3 * 6)])  # there are no 210
def test_cells_and_differences_are_of_the_rows_own_runs(line, count, invented):
    text = invented(f"{line} --seeds 2", made_up).splitlines()
    columns, *rows = [row.strip("| ").split(" | ") for row in text if row.startswith("| ")]
    numbers = []
    for (row, *cells), (i, column) in product(rows, enumerate(columns)):
        if "bound" in row or cells[i] == "not run":
            continue
        ours = scores_of(row, column)
        mean, sd = ours.mean(), ours.std(ddof=1)
        reference, other = REFERENCE.get(line, ("PKDOT", column))
        gaps = (ours - scores_of(reference or row, other)).mean(1)
        gap = gaps.mean()
        error = math.sqrt((1 / 2 + 1 / 4) * gaps.var(ddof=1))  # Nadeau and Bengio 2003
        low, high = gap + stats.t.ppf([0.025, 0.975], 1) * error
        numbers.append([mean, sd, 4, gap, low, high])
        bold = "**" * int(not low <= 0 <= high)
        said = f"; {bold}{gap:+.2f} [{low:+.2f}, {high:+.2f}]{bold}" * int(
            (reference or row, other) != (row, column) and "folds" not in CHANGES.get(row, ""))
        assert cells[i] == f"{mean:.2f} ± {sd:.2f} (2 folds x 2 seeds){said}"

    assert len(numbers) == count
    if "--figure" in line:
        assert_allclose(points(line[9:]), numbers, atol=1e-9)
    if "labels" in line:  # fewer than half of 144 or all: each has the rate of its own regime
        rates = {found["labelled"]: found["fusion_lr"] for found in results(OUT, "multimodal")}
        assert rates == {35: 1e-3, 70: 1e-3, None: 1e-4}


def test_a_table_prints_again_from_its_results_alone(invented):
    line = "--table 2 --lambda 1 2 --k 9"
    lines = invented(line, made_up).splitlines()
    shutil.rmtree("out/features")
    os.remove("views.npz")
    again = invented(f"{line} --print").splitlines()
    assert again[1:-1] == lines[1:-1] and len(lines) > 20
    line += " --print --dataset features --root x/views.npz --fold 1 2 --out out"
    assert "numbers are of views.npz" in distil(line)


def test_what_is_no_run_in_the_results_is_left_out_and_told_once():
    good = dict.fromkeys("root task role fold".split())
    write("r.jsonl", "\ufeff" + json.dumps(good) + '\n{}\n[]\n{"root')

    def main():
        for _ in "twice":
            assert train_student.read_results(Path("r.jsonl")) == [good]

    assert re.findall(r"line (\d)", run(program(main), "").err) == [*"234"]


def test_the_oracle_sees_the_true_privileged_features(invented):
    invented("--table choices")
    score = {line["hallucinate"]: line["validation"] for line in results(OUT)}
    assert max(score, key=score.get) == "oracle"


def test_only_lines_with_the_same_settings_count(invented):
    others = [*PAPERS][:-2] + "epochs amp teacher dataset synthetic role".split()
    text = invented("--table 5", made_up, *(
        lambda line, key=key: {key: "another", "accuracy": 1.0} for key in others))
    assert "| PKDOT | 78.76 | 1.00" not in text and "| PKDOT | 1.00" not in text


def test_a_sweep_trains_exactly_what_is_missing(invented):
    """Each command is given twice."""
    path = OUT / "results.jsonl"
    for more, count in {"": 3 + 4, "--seeds 2": 4, "--lr 0.1": 4, "--epsilon 2": 2, "--seed 3": 4,
                        "--labelled 60": 6 + 4, "--fresh": 4 + 4}.items():
        before = len(lines_of(path))
        invented(f"--table 5 {more}")
        assert len(lines_of(path)) - before == count, more
    for file in OUT.rglob("teacher.pt"):  # as the first one
        assert saved(file.parent, "teacher")["settings"]["fusion_epochs"] == 5

    whole = path.read_text()[:-1]
    path.write_text(whole[:-9])  # the end of a writer that was killed
    invented("--table 5 --lr 7")
    assert len(path.read_text().splitlines()) == len(whole.splitlines()) + 4


def test_runs_of_other_code_are_told_and_a_docstring_is_no_code(invented, monkeypatch):
    assert "--fresh" not in invented("--table 5")
    assert "- 4 students" in invented("--table 5", lambda line: {"code": "another"})

    for path in SCRIPTS.glob("*.py"):
        shutil.copy(path, ".")
    monkeypatch.setattr(train_student, "__file__", "train_student.py")
    found = [train_student.code.__wrapped__()]
    for file, old, new in (("pkdot.py", "Entropic OT", "OT"), ("pkdot.py", "clamp_min(1)", "abs()"),
                           ("models.py", "D = 512", "D = 256")):
        write(Path(file), Path(file).read_text().replace(old, new))
        found.append(train_student.code.__wrapped__())
    assert found[0] == found[1] and len({*found}) == 3


def test_a_table_takes_the_teachers_that_are_there_whatever_their_clips(odd, stand_in, slight):
    shutil.copytree(odd[0].parent, OUT)
    text = distil(f"--table choices --dataset biovid_b --root {stand_in} --classes 5 --fold 2 "
                  f"--epochs 1 {CPU} out")
    assert "length 2" in text and "fusion jca" in text


def test_figures_are_drawn_of_their_numbers(invented, monkeypatch):
    pytest.importorskip("matplotlib")
    drawn = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig",
                        lambda figure, path, **_: drawn.append(figure.axes) or path.touch())
    invented("--figure 7 --seeds 2", made_up)
    mean, _, _, gap, low, high = points("7").T
    raw, paired = drawn[-1]
    found = [axis.lines[0].get_ydata() for axis in (raw, paired)]
    assert_allclose(np.float64(found), [mean, gap])
    band = paired.collections[0].get_paths()[0].vertices[:, 1]
    assert {*band.round(6)} == {*np.round([*low, *high], 6)}


def test_figure_5_has_the_similarities_of_the_teacher_and_of_the_student_then(views, views_run):
    """Of 128 of the 168 training samples, sorted by class."""
    run = copied(views_run, OUT)
    common = f"--epochs 6 --lr 0.03 --batch-size 64 {CPU} out"  # of which the last is not the best
    distil(f"--figure 5 --dataset features --root {views} {common}")
    S = np.load("out/figure5-views.npz")
    its = opened(run)
    index = its.fold.train.index[np.linspace(0, 167, 128).astype(int)]
    index = index[its.features.label[index[:, 0]].argsort(stable=True)]

    v, p = its.rows(index)
    z = {"teacher": its.head(v, p).z}
    for name, flags in {"before training": "--lr 0", "own anchors": "", "shared anchors":
                        "--shared-anchors", "row by row":
                        "--shared-anchors --anchors random --no-transport"}.items():
        distil(f"{common} --select last {flags}")
        z[name] = opened(run).student.fuse(v).z
    for name in z:
        assert_allclose(S[name], naive_similarity(z[name].detach().numpy()), atol=1e-4)
    assert S.keys() == z.keys()


def test_a_stand_in_is_marked_and_a_column_has_its_own_teachers(stand_in, slight):
    line = f"--dataset biovid_a --root {stand_in} --fold 1 --epochs 1 {CPU} out"
    text = distil(f"--table 4 {line}")
    assert "**SYNTHETIC DATA - Table IV" in text
    (a, b), (c, d) = ([found["accuracy"] for found in results(OUT, role)]
                      for role in ("visual", "multimodal"))
    assert f"(lower bound) | 72.10 | {a:.2f} (1 fold) | 30.38 | {b:.2f} (1 fold) |" in text
    assert f"(upper bound) | 83.50 | {c:.2f} (1 fold) | 36.40 | {d:.2f} (1 fold) |" in text
    distil(f"--figure labels {line}")
    file = Path("out/figurelabels-biovid_a-synthetic.csv")
    assert file.read_text().count(",SYNTHETIC") == 4 * 6


def test_valence_and_arousal_are_columns_of_affwild2(slight):
    for video in "abc":
        part = "Validation_Set" if video == "c" else "Train_Set"
        affwild2(Path("data/affwild2"), video, part=part)
    text = distil(f"--table 3 --epochs 1 {CPU} out")
    line = results(OUT)[-1]
    assert (f"| PKDOT (--epochs 1) | 0.43 | {line['valence']:.3f} (1 fold x 1 seed) "
            f"| 0.56 | {line['arousal']:.3f} (1 fold x 1 seed) |" in text)


# ------------------------------------------------------- several processes, and processes that die
# Processes that share the work find what one finds; whoever is killed leaves nothing half written.
# Two ranks go through PLAN, and the real networks through QUICK_START, beside the other tests, from
# the beginning of the session on.

SHORT = "--backbone-epochs 2 --fusion-epochs 2 --batch-size 31 --workers 0 --out"
FINETUNE = "--finetune --epochs 2 --batch-size 31 --lr 1e-3 --out"
SAVED = "classes/features/c4/fold1/student-pkdot.pt"
PLAN = [  # of one fold, in batches of odd sizes; then several trainings, which are dealt out
    (train_teacher, f"--dataset features --root views.npz {SHORT} classes"),
    (train_student, f"--shared-anchors --chunk 20 {FINETUNE} classes"),
    (train_student, f"--evaluate {SAVED}"),
    (train_student, f"--predict views.npz --student {SAVED}"),
    (train_teacher, f"--dataset features --root affect.npz {SHORT} affect"),
    (train_student, f"--method rkd {FINETUNE} affect"),
    (train_teacher, f"--dataset features --root views.npz --fold all {SHORT} dealt"),
    (train_student, "--fold 4 2 --epochs 2 --out dealt"),
    (train_student, "--fold 1 --method mse --epochs 2 --out dealt"),
    (train_student,
     "--table 2 --dataset features --root views.npz --fold 3 --epochs 2 --out dealt")]


QUICK_START = [  # the README's commands, of fewer epochs: the only training of the real networks
    "train_teacher.py --dataset biovid_b --synthetic --backbone-epochs 1 --fusion-epochs 9",
    "train_student.py --lambda 0.4 --k 30",
    "train_student.py --finetune --epochs 1 --workers 0"]


def be_a_rank():
    """PLAN, in one process group; then a training in which rank 1 is killed in its second epoch.
    What a rank prints lies in <number>-<rank>."""
    group = torch.distributed
    group.init_process_group("gloo")
    group.init_process_group = group.destroy_process_group = lambda *_, **__: None
    rank = group.get_rank()
    for number, (script, line) in enumerate(PLAN):
        Path(f"{number}-{rank}").write_text(ok(script, line))

    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, to those that are left
    with watched(9 * rank):
        error = run(train_teacher, f"--dataset features --root views.npz {SHORT} killed").err
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    Path("killed.txt").write_text(error)


def quick_start(folder, fixture):
    data = folder / "data/biovid_b-synthetic"  # where --synthetic would write it
    made(data).symlink_to(fixture("stand_in"))
    return " && ".join(f"{sys.executable} {SCRIPTS}/{line}" for line in QUICK_START)


def torchrun(folder, fixture):
    shutil.copy(fixture("views"), folder / "views.npz")
    np.savez(folder / "affect", **arrays(60, label=np.sin(np.arange(240.0)).reshape(60, 2, 2)))
    return (f"PYTHONPATH={SCRIPTS} exec {sys.executable} -m torch.distributed.run --standalone "
            "--nproc_per_node=2 -m test_pkdot")


@pytest.fixture(scope="session", autouse=True)
def beside(request, tmp_path_factory):
    """Folder and process of what tests ask for by `started` and `ranks`; what it prints lies in
    said.txt there."""
    running = {}
    for name, prepare in {"started": quick_start, "ranks": torchrun}.items():
        if any(name in item.fixturenames for item in request.session.items):
            folder = tmp_path_factory.mktemp(name)
            command = prepare(folder, request.getfixturevalue)
            with open(folder / "said.txt", "w") as said:
                process = subprocess.Popen(command, shell=True, cwd=folder, stdout=said)
            running[name] = folder, process
    yield running
    for _, process in running.values():
        process.terminate()
        process.wait()


@once
def started(beside):
    folder, process = beside["started"]
    assert process.wait(300) == 0
    return folder


@once
def ranks(beside, tmp_path_factory):
    """The folder of the ranks when they have ended, that of one process, and what it printed."""
    two, process = beside["ranks"]
    one = tmp_path_factory.mktemp("one")
    for path in two.glob("*.npz"):
        shutil.copy(path, one)
    with MonkeyPatch.context() as patch:
        patch.chdir(one)
        said = [ok(script, line) for script, line in PLAN]
    assert process.wait(300) == 1
    return two, one, said


@parametrize("run", ["classes/features/c4/fold1", "affect/features/va/fold1"])
def test_loss_and_gradient_over_ranks_are_those_of_one_process(run, ranks):
    """The losses of each epoch show where the steps before it led."""
    two, one, _ = ranks
    for stage in EPOCHS:
        for lines in zip(logged(two / run, stage), logged(one / run, stage), strict=True):
            a, b = ([line.get(key, 0) for key in ("loss", "loss_gt", "w")] for line in lines)
            assert a == approx(b, rel=1e-4)

    for path in (one / run).glob("[sv]*.pt"):  # the visual backbone and the student
        weights = [tensors(saved(folder / run, path.stem)["model"]) for folder in (two, one)]
        ours, theirs = (torch.cat([*map(torch.flatten, w.values())]) for w in weights)
        assert (ours - theirs).norm() <= 1e-3 * theirs.norm()


def test_folds_dealt_out_give_the_same_bits(ranks):
    """And the students of some of them, and a table's."""
    two, one = (folder / "dealt" for folder in ranks[:2])
    paths, others = ({path.relative_to(out) for path in out.rglob("*")} for out in (two, one))
    assert paths == others
    weights = [path.with_suffix("") for path in paths if path.suffix == ".pt"]
    assert len(weights) == 5 * 3 + 3
    assert all(equal(saved(two, path), saved(one, path)) for path in weights)
    a, b = (sorted(json.dumps(line | {"seconds": 0}) for line in lines_of(out / "results.jsonl"))
            for out in (two, one))
    assert a == b and len(a) == 5 * 3 + 3 + 10


def test_what_ranks_say_is_said_once(ranks):
    """But of what is dealt out, and that rank 1 has nothing to do (8)."""
    two, _, said = ranks
    first, second = ([(two / f"{number}-{rank}").read_text() for number in range(len(PLAN))]
                     for rank in (0, 1))
    assert first[2:4] == said[2:4]
    for number, role, folds in (6, "visual", 5), (7, "student", 2):
        scores = [line["accuracy"] for line in results(two / "dealt", role)[:folds]]
        mean = f"{np.mean(scores):.2f} ± {stats.tstd(scores):.2f} %"
        assert mean in first[number].splitlines()[-1]
    assert list(map(bool, second)) == 6 * [False] + 3 * [True] + [False]


def test_a_killed_rank_ends_all_and_leaves_nothing_half_written(ranks):
    two, _, _ = ranks
    assert re.fullmatch("error: .*rank.*\n", (two / "killed.txt").read_text())
    run = two / "killed/features/c4/fold1"
    assert {path.name for path in run.iterdir()} == {"log.jsonl", "visual.progress"}
    assert train_teacher.load(run / "visual.progress", "progress")["epoch"] == 0


def test_killed_while_it_saves_and_resumed_equals_uninterrupted(views, views_run, monkeypatch):
    def die(_, path):
        write(path, "half of it")
        os.kill(os.getpid(), signal.SIGKILL)

    for script, line in commands(views):
        with monkeypatch.context() as patch:
            patch.setattr(torch, "save", die)
            process = FORK.Process(target=run, args=(script, line))
            process.start()
            process.join()
        ok(script, line)
    assert same(MINE, views_run) == FILES


def test_trainings_at_once_share_the_backbones_and_the_second_takes_the_firsts_result(
        views, views_run):
    def at_once(script, *lines):
        processes = [FORK.Process(target=ok, args=(script, line)) for line in lines]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
            assert process.exitcode == 0

    at_once(train_teacher, *(f"{TEACHER} {views} --fusion {head} {CPU} out"
                             for head in [*models.HEADS, "concat"]))
    assert [line["epoch"] for line in logged(MINE, "visual")] == [1, 2, 3]
    assert equal(saved(MINE, "teacher"), saved(views_run, "teacher"))
    assert len(results(OUT, "multimodal")) == 3
    at_once(train_student, *2 * [f"--epochs 99 {CPU} out"])
    assert len(results(OUT)) == 1


def append(who):
    for number in range(1000):
        train_teacher.append_line(OUT / "results.jsonl", [who, number, "x" * (7 * number)])


def test_two_processes_that_append_to_one_file_lose_no_line():
    write(OUT / "results.jsonl", '{"of one that was killed')
    with FORK.Pool(2) as pool:
        pool.map(append, [0, 1], chunksize=1)
    _, *lines = filter(str.strip, open(OUT / "results.jsonl"))
    found = [json.loads(line)[:2] for line in lines]
    assert sorted(found) == [[who, number] for who in (0, 1) for number in range(1000)]


def test_the_quick_start_ends_with_the_answer(started):
    """And under --finetune batch norm keeps its statistics."""
    said = (started / "said.txt").read_text()
    answers = re.findall(r"^SYNTHETIC biovid_b fold 1.*student, pkdot", said, re.M)
    run = started / "runs/biovid_b-synthetic/c2/fold1"
    assert len(answers) == 2 and len(logged(run, "student")) == 50 + 1
    before, after = (saved(run, name)["model"] for name in ("visual", "student-pkdot"))
    moved = {key.split(".")[-1] for key in before
             if "backbone" in key and not torch.equal(before[key], after[key])}
    assert moved == {"weight", "bias"}


def test_half_of_torchruns_variables_is_one_line(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for script in (train_teacher, train_student):
        assert "WORLD_SIZE" not in refused(script, "", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


if __name__ == "__main__":
    be_a_rank()
