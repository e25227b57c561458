"""Stage 3: distil the multimodal teacher into a student that has the face alone; then evaluate,
predict, tabulate.

    python train_student.py --lambda 0.4 --k 30                # the newest teacher under runs/
    python train_student.py --method cosine --fold all
    python train_student.py --evaluate runs/biovid_b-synthetic/c2/fold1/student-pkdot.pt
    python train_student.py --predict faces --student runs/biovid_b-synthetic/c2/fold1/student-pkdot.pt
    python train_student.py --table 5 --synthetic --seeds 3    # trains what is missing, then prints
    python train_student.py --figure 7 --synthetic

The student is the visual backbone of stage 1 (frozen, unless --finetune), the frozen T-Net of stage
2 and a fresh fusion head of the teacher's architecture, trained with L = L_gt + lambda W (Eq. 9).
"""
import csv
import functools
import hashlib
import json
import math
import statistics
import sys
import time
from argparse import Namespace
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy import stats
from tqdm import tqdm

import data
import models
import train_teacher
from data import Parser, UserError, fold_windows
from models import Fused
from pkdot import (
    ANCHORS,
    cosine_loss,
    cosine_similarity_matrix,
    kl_loss,
    mse_loss,
    pkdot_loss,
    rkd_loss,
    task_loss,
)
from train_teacher import append_line, bar, fingerprint, load, score, show

# What lambda weighs in Eq. 9, of the student's and the teacher's Fused of a batch.
# To add a baseline: write its loss in pkdot.py, and a line here.
METHODS = {
    "pkdot": lambda s, t, args: pkdot_loss(s.z, t.z, min(args.k, len(s.z)), args.epsilon, args.debias,
                                           args.anchors, args.shared, args.transport),  # Eq. 1-6
    "cosine": lambda s, t, args: cosine_loss(s.z, t.z),
    "mse": lambda s, t, args: mse_loss(s.z, t.z),
    "kl": lambda s, t, args: kl_loss(s.output, t.output),
    "rkd": lambda s, t, args: rkd_loss(s.z, t.z),
    "none": lambda s, t, args: s.z.new_zeros(())}


def distil(path, args, keep_student=True, watch=None):
    """Stage 3 of one fold: a student of the teacher at path; returns the results line it appends.

    args: the parsed flags. watch(epoch, represent), if given, is called before the first epoch and
    after each; represent(windows) is the student's z (S, m) of them.
    """
    # prepare: the teacher's answers to all windows, the student, what it sees
    begin, run, device = time.time(), path.parent, args.device
    teacher = load(path, "teacher")
    choice, settings = identity(args, teacher), teacher["settings"]
    saved_as = {**settings, **{f"student_{key}": value for key, value in choice.items()}}
    finished, progress = (run / f"student-{args.method}.{end}" for end in ("pt", "progress"))
    if args.resume and keep_student and finished.exists():
        done = load(finished, "student")
        if done["settings"] == saved_as:
            print(f"{finished} is finished")
            return done["record"]
    if undefined(args.method, settings["task"]):
        raise UserError(f"--method {args.method} compares class probabilities, and valence/arousal "
                        "has none; choose another method")

    features = open_run(path, teacher)
    fold = fold_windows(features, settings["fold"], dense=True)
    samples = len(fold.train.index)
    b = min(args.batch_size, samples)
    if b < args.batch_size and keep_student:
        print(f"warning: only {samples} training samples; batches are of {b} and k is "
              f"{min(args.k, b)}", file=sys.stderr)
    label = fold.train.label.to(device)
    targets = teacher_answers(teacher, features, fold.train.index, device)

    train_teacher.seed_all(args.seed, 3)
    student, trained = make_student(path, teacher, args)
    optimizer = torch.optim.Adam(trained.parameters(), lr=args.lr, fused=True)
    frozen = fingerprint(student.tnet.state_dict())
    source, forward = what_the_student_sees(student, features, settings, args)

    def predict(windows, part):
        batches = torch.arange(len(windows.index)).split(b)
        inputs = student_inputs(source, windows.index, batches, args)
        return train_teacher.answers(lambda x: getattr(forward(*x), part), inputs)

    def keep_best():
        if best and keep_student:
            trained.load_state_dict(best["model"])
            diverged = finished.with_suffix(".diverged.pt")
            save_student(diverged, student, saved_as, features, fold, {}, {})
            return diverged

    first, best, saved = 0, None, time.time()
    if args.resume and keep_student and progress.exists():
        first, best = train_teacher.restore_progress(progress, saved_as, trained, optimizer)
    if watch:
        watch(0, lambda windows: predict(windows, "z"))
    for epoch in bar(range(first, choice["epochs"]), f"{args.method} fold {settings['fold']}"):
        # one epoch; the last batch is dropped, since S wants b rows
        train_teacher.seed_all(args.seed, 3, epoch + 1)
        order = torch.randperm(samples)[:samples - samples % b]
        batches = order.split(b)
        inputs = student_inputs(source, fold.train.index, batches, args)
        trained["head"].train()  # a backbone's batch norm keeps the statistics of stage 1
        terms = train_epoch(forward, batches, inputs, label, targets, optimizer, args, epoch, keep_best)
        loss_gt, W = train_teacher.step_means(terms, ["L_gt", "W"], epoch, ADVICE, keep_best)

        # select: val, held-out training groups choose the epoch; test, the test fold does (the
        # release); last, nothing
        trained.eval()
        chosen_on = fold.test if args.select == "test" else fold.val
        found = score(features, chosen_on, predict(chosen_on, "output"))
        value = train_teacher.criterion(found)
        if best is None or args.select == "last" or value > best["score"]:
            best = dict(score=value, epoch=epoch, model=train_teacher.snapshot(trained))

        # keep
        if keep_student:
            log_epoch(run, args, choice["epochs"], epoch, loss_gt, W, found)
        if keep_student and time.time() - saved > train_teacher.SAVE_EVERY:
            train_teacher.keep_progress(progress, saved_as, epoch, trained, optimizer, best)
            saved = time.time()
        if watch:
            watch(epoch + 1, lambda windows: predict(windows, "z"))

    # finish: the test fold, once
    if fingerprint(student.tnet.state_dict()) != frozen:
        raise RuntimeError("the frozen T-Net has changed during distillation")
    trained.load_state_dict(best["model"])
    output = predict(fold.test, "output")
    found = score(features, fold.test, output)
    record = train_teacher.result_line(settings, "student", found, time.time() - begin,
                                       epoch=best["epoch"] + 1, b=b, k_used=min(args.k, b), **choice)
    if keep_student:
        train_teacher.log_videos(run, f"student {args.method}", features, fold.test, output)
        save_student(finished, student, saved_as, features, fold, found, record)
        progress.unlink(missing_ok=True)
    append_line(args.out / "results.jsonl", record)
    return record


ADVICE = "lower --lr or raise --epsilon"


def train_epoch(forward, batches, inputs, label, teacher, optimizer, args, epoch, keep_best):
    """The steps of one epoch; label (S, ...) and the teacher's Fused (S, ...) are of all windows.
    Returns L_gt and W of each."""
    lam = vars(args)["lambda"]  # a keyword of Python's
    terms = []
    for step, (batch, x) in enumerate(zip(batches, inputs, strict=True)):
        batch = batch.to(args.device)
        s, t = forward(*x), Fused(*(answer[batch] for answer in teacher))

        loss_gt = task_loss(s.output, label[batch])  # Eq. 7 or 8
        try:
            W = METHODS[args.method](s, t, args)
        except ValueError:  # a representation is no longer finite
            terms = [loss_gt.item(), math.nan]
            train_teacher.diverged(epoch, step, ["L_gt", "W"], terms, ADVICE, keep_best)
        loss = loss_gt + lam * W  # Eq. 9

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        terms.append(torch.stack([loss_gt, W]).detach())
    return terms


def what_the_student_sees(student, features, settings, args):
    """(source, forward): cached features and what lies behind the backbone, or, under --finetune,
    the faces and all of the student."""
    def forward(*x):
        with torch.autocast(args.device.type, torch.bfloat16, enabled=args.amp):
            answer = student(*x) if args.finetune else student.fuse(*x)
        return Fused(answer.output.float(), answer.z.float())

    rows = {name: value.to(args.device) for name, value in features.rows.items()}
    if not args.finetune:
        oracle = (rows["privileged"],) if args.hallucinate == "oracle" else ()
        return (rows["visual"], *oracle), forward
    source = open_faces(settings, args.root)
    if not np.array_equal(source.name, features.name):
        raise UserError(f"{source.path}: its clips are no longer those of the teacher's features; "
                        "train the teacher again, or give the --root it was trained on")
    if settings["dataset"] == "features":
        return (source.rows["visual"].to(args.device),), forward
    return source, forward


def student_inputs(source, index, batches, args):
    """What the student sees of the windows index (S, L), batch by batch: rows (b, L, D) of each of a
    tuple of tensors, which lie on the device; or of a data set the distinct clips (U, 1, 3, F, H, W)
    of a batch, read once each, and which of them its windows are (b, L)."""
    if isinstance(source, tuple):
        index = index.to(args.device)
        return (tuple(rows[index[batch.to(args.device)]] for rows in source) for batch in batches)
    picks = [index[batch].unique(return_inverse=True) for batch in batches]
    every = torch.arange(len(source.name))[:, None]
    loader = train_teacher.clip_loader(source, "visual", every, [rows for rows, _ in picks], args)
    return ((clips.to(args.device, non_blocking=True), windows.to(args.device))
            for clips, (_, windows) in zip(loader, picks, strict=True))


@torch.no_grad()
def teacher_answers(teacher, features, index, device):
    """Fused (S, ...) of the frozen teacher for all windows: on frozen features it answers once."""
    head = train_teacher.make_head(teacher["settings"]).to(device).eval()
    head.load_state_dict(teacher["head"])
    visual, privileged = (features.rows[m].to(device) for m in ("visual", "privileged"))
    answers = [head(visual[rows], privileged[rows]) for rows in index.to(device).split(256)]
    return Fused(*(torch.cat(part) for part in zip(*answers, strict=True)))


def build_student(settings, hallucinate="tnet"):
    return models.Student(train_teacher.make_backbone("visual", settings), models.TNet(),
                          train_teacher.make_head(settings), hallucinate)


def make_student(path, teacher, args):
    """The student, and the part of it that stage 3 trains; all else is frozen."""
    settings, folder = teacher["settings"], train_teacher.stage_1_folder(path.parent, teacher["settings"])
    student = build_student(settings, args.hallucinate)
    student.tnet.load_state_dict(teacher["tnet"])
    stage_1 = load(folder / "visual.pt", "visual")["model"]
    student.backbone.load_state_dict({key.removeprefix("backbone."): value for key, value in stage_1.items()
                                      if key.startswith("backbone.")})
    if not teacher["backbones"].startswith(fingerprint(student.backbone.state_dict())):
        raise UserError(f"{folder}: visual.pt was trained again after {path}; "
                        "finish the teacher: train_teacher.py --resume with the same flags")
    student.to(args.device).requires_grad_(False).eval()
    trained = torch.nn.ModuleDict({"head": student.head})
    if args.finetune:
        trained["backbone"] = student.backbone
    return student, trained.requires_grad_(True)


def save_student(path, student, settings, features, fold, scores, record):
    """Self-contained: weights, settings as plain types, and the names of the test clips."""
    names = features.name[fold.test.index.unique().numpy()].astype(str).tolist()
    train_teacher.save(path, dict(kind="student", settings=settings, scores=scores, record=record,
                                  model=train_teacher.snapshot(student), test_names=names))


def log_epoch(run, args, epochs, epoch, loss_gt, W, found):
    """Task and OT terms apart: every epoch to log.jsonl, ten of them to the screen."""
    lambda_w = vars(args)["lambda"] * W
    append_line(run / "log.jsonl", dict(
        stage="student", method=args.method, seed=args.seed, epoch=epoch + 1,
        loss_gt=loss_gt, w=W, lambda_w=lambda_w, **found))
    if epoch % max(epochs // 10, 1) == 0 or epoch + 1 == epochs:
        part = "test" if args.select == "test" else "val"
        tqdm.write(f"epoch {epoch + 1:3d}  L_gt {loss_gt:.4f}  lambda W {lambda_w:.4f}  "
                   f"{part} {show(found)}")


def open_faces(settings, root=None):
    """The data set a run was trained on, without its privileged files."""
    return data.open_dataset(settings["dataset"], root or settings["root"], settings["outputs"],
                             settings["length"], settings["image_size"], privileged=False)


def open_run(path, teacher):
    """The features that the teacher at path was trained on."""
    folder = train_teacher.stage_1_folder(path.parent, teacher["settings"])
    features = train_teacher.open_features(folder, teacher["settings"])
    if features.backbones != teacher["backbones"]:
        raise UserError(f"{folder}: features.npz is of other backbones than {path}; "
                        "finish the teacher: train_teacher.py --resume with the same flags")
    return features


CHOICES = ("method", "lambda", "k", "epsilon", "debias", "anchors", "shared", "transport", "hallucinate",
           "batch_size", "lr", "epochs", "finetune", "select", "seed", "amp")


def identity(args, teacher):
    """What a line of results.jsonl must agree in to stand for a run: every choice, the teacher's
    weights, the code of the loss and the networks."""
    choice = {key: vars(args)[key] for key in CHOICES}
    if args.epochs is None:
        choice["epochs"] = 50 if teacher["settings"]["synthetic"] else 20  # its epochs are of few steps
    weights = fingerprint(teacher["head"]), fingerprint(teacher["tnet"]), teacher["backbones"]
    return {**choice, "teacher": "-".join(weights), "code": code_digest()}


@functools.cache  # the code that runs is the code that was imported, whatever is edited meanwhile
def code_digest():
    folder = Path(__file__).parent
    code = [(folder / f"{name}.py").read_bytes() for name in ("sinkhorn", "pkdot", "models")]
    return hashlib.sha256(b"".join(code)).hexdigest()[:12]


def newest_teacher(args):
    """The newest teacher.pt under --out, of --dataset and --synthetic if they are given."""
    name = (args.dataset or "*") + "-synthetic" * args.synthetic
    found = sorted(args.out.glob(f"{name}/*/fold*/teacher.pt"), key=lambda p: p.stat().st_mtime)
    if not found:
        raise UserError(f"{args.out}: no {name.replace('*', '<dataset>')}/<variant>/fold<n>/teacher.pt "
                        "in it; run train_teacher.py first")
    return found[-1]


def load_student(path, device):
    state = load(path, "student")
    student = build_student(state["settings"])
    student.load_state_dict(state["model"])
    return student.to(device).eval(), state["settings"], state


def student_output(student, settings, source, index, args, text):
    """Output of the student for windows of faces, in the precision that it was trained in."""
    amp = settings["student_amp"]
    precision = functools.partial(torch.autocast, args.device.type, torch.bfloat16)
    batches = torch.arange(len(index)).split(32)
    loader = train_teacher.clip_loader(source, "visual", index, batches, args)

    def forward(clips):
        with precision(enabled=amp if settings["student_finetune"] else settings["amp"]):
            features = student.backbone(clips.to(args.device))
        with precision(enabled=amp):
            return student.fuse(features.float()).output

    return train_teacher.answers(forward, bar(loader, text))


def evaluate(path, args):
    """Test score of a saved student, from the faces alone: no privileged file is opened."""
    student, settings, state = load_student(path, args.device)
    source, wanted = open_faces(settings, args.root), state["test_names"]
    here = np.isin(source.name.astype(str), wanted)
    missing = sorted(set(wanted) - set(source.name[here].astype(str)))
    if missing:
        raise UserError(f"{source.path}: lacks {len(missing)} of the student's {len(wanted)} test clips, "
                        f"first {missing[0]}; give the --root it was trained on")
    windows = data.label_windows(source, source.label)
    windows = windows.take(torch.from_numpy(here)[windows.index].all(1))
    output = student_output(student, settings, source, windows.index, args, "evaluate")
    found = score(source, windows, output)
    print(f"{train_teacher.heading(settings)}, n = {found['n']}: "
          f"student {settings['student_method']} {show(found)}")


def predict(folder, path, args):
    """One csv line per sample (class probabilities) or clip (valence, arousal) of unlabelled faces,
    on stdout; what cannot be used is named on stderr, and then the exit code is 1."""
    student, settings, _ = load_student(path, args.device)
    if settings["dataset"] == "features":
        source = data.Features(folder, privileged=False, labelled=False)
        found = (source.length, source.rows["visual"].shape[1])
        wanted = (settings["length"], settings["visual_dim"])
        if found != wanted:
            raise UserError(f"{folder}: visual is (N, {found[0]}, {found[1]}), the student was "
                            f"trained on (N, {wanted[0]}, {wanted[1]})")
    else:
        source = data.Faces(folder, settings["dataset"], settings["length"], settings["image_size"])
    index, keep = data.windows(source.video, source.length)
    output = student_output(student, settings, source, index, args, "predict")

    write = csv.writer(sys.stdout, lineterminator="\n").writerow
    if settings["task"] == "regression":
        write(["clip", "valence", "arousal"])
        rows = sorted(zip(index[keep].tolist(), output[keep].tolist(), strict=True))
        lines = [(source.name[row], *values) for row, values in rows]
    else:
        biovid = settings["dataset"].startswith("biovid")
        names = data.BioVid.levels(settings["outputs"]) if biovid else range(settings["outputs"])
        write(["sample", *(f"p({name})" for name in names)])
        name = source.video if biovid else source.name
        lines = [(name[row], *p) for row, p in
                 zip(index[:, 0].tolist(), output.softmax(1).tolist(), strict=True)]
    for name, *values in lines:
        write([name, *(f"{value:.4f}" for value in values)])
    if source.faults:
        print("\n".join(source.faults), file=sys.stderr)
        sys.exit(1)


# ------------------------------------------------------------------------------ tables, figures

class Column(NamedTuple):
    heading: str
    dataset: str
    classes: int | str  # "va" for valence/arousal
    metric: str
    change: dict = {}  # of the flags, for all cells below


class Row(NamedTuple):
    label: str
    ours: dict | str | None  # a student, by its flags; a bound, "visual" or "multimodal"; others'
    paper: tuple = ()  # the numbers as the paper prints them, one a column


class Table(NamedTuple):
    title: str
    columns: list
    rows: list


TABLE_I = {
    "biovid_a": "BioVid (A): visual (weak, prevalent) + EDA (strong, privileged), "
                "feature concatenation, SEW",
    "biovid_b": "BioVid (B): visual (strong, prevalent) + EMG (weak, privileged), "
                "multimodal transformer, WES",
    "affwild2": "Affwild2: visual (strong, prevalent) + audio (weak, privileged), "
                "joint cross attention, WES",
    "features": "features file: visual (prevalent) + privileged"}
BIOVID_B = Column("BioVid (B) accuracy", "biovid_b", 2, "accuracy")
VALENCE = Column("Affwild2 valence", "affwild2", "va", "valence")
AROUSAL = Column("Affwild2 arousal", "affwild2", "va", "arousal")
LOWER, STUDENT, UPPER = "Visual only (lower bound)", "Student - PKDOT", "Multimodal (upper bound)"

TABLES = {
    "2": Table("Table II: privileged KD methods", [BIOVID_B, VALENCE, AROUSAL], [
        Row("Cosine similarity [10]", {"method": "cosine"}, ("75.40", "0.37", "0.53")),
        Row("MSE [8]", {"method": "mse"}, ("N/A", "0.39", "0.53")),
        Row("KL [8]", {"method": "kl"}, ("75.80", "N/A", "N/A")),
        Row("PKDOT", {}, ("78.76", "0.43", "0.56")),
        Row("RKD [31]", {"method": "rkd"}),
        Row("none (lambda 0)", {"method": "none"})]),
    "3": Table("Table III: visual-only methods, Affwild2 validation set", [VALENCE, AROUSAL], [
        Row("ResNet-50 [44]", None, ("0.31", "0.17")),
        Row("SENet-50 [45]", None, ("0.28", "0.34")),
        Row("MobileNet [46]", None, ("0.28", "0.44")),
        Row("RegNet + GRU [47]", None, ("0.43", "0.57")),
        Row("ResNeXt + SENet [48]", None, ("0.51", "0.48")),
        Row(LOWER, "visual", ("0.41", "0.51")),
        Row(STUDENT, {}, ("0.43", "0.56")),
        Row(UPPER, "multimodal", ("0.67", "0.59"))]),
    "4": Table("Table IV: visual-only methods, BioVid (A)", [
        Column("BL1 vs. PA4 accuracy", "biovid_a", 2, "accuracy"),
        Column("5 classes accuracy", "biovid_a", 5, "accuracy")], [
        Row("Sparse LSTM [19]", None, ("61.70", "29.70")),
        Row("ViT [18]", None, ("72.11", "NR")),
        Row("FAD + RF [49]", None, ("72.40", "30.80")),
        Row("GNN [50]", None, ("73.20", "NR")),
        Row("ViT [51]", None, ("73.28", "31.52")),
        Row("ResNet-18 [52]", None, ("NR", "36.60")),
        Row(LOWER, "visual", ("72.10", "30.38")),
        Row(STUDENT, {}, ("74.55", "33.65")),
        Row(UPPER, "multimodal", ("83.50", "36.40"))]),
    "5": Table("Table V: visual-only methods, BioVid (B)", [BIOVID_B], [
        Row("Handcrafted + RF [22]", None, ("72.70",)),
        Row(LOWER, "visual", ("74.10",)),
        Row(STUDENT, {}, ("78.76",)),
        Row(UPPER, "multimodal", ("81.30",))]),
    "choices": Table("Choices that the paper leaves open (not in the paper)",
                     [BIOVID_B, VALENCE, AROUSAL], [
        Row("PKDOT", {}),
        Row("anchors: most similar", {"anchors": "similar"}),
        Row("anchors: random", {"anchors": "random"}),
        Row("not debiased (Eq. 5)", {"debias": False}),
        *(Row(f"lambda {x:g}", {"lambda": x}) for x in (0.0, 0.1, 1.0, 4.0, 10.0)),
        Row("the release's, epoch chosen on test",
            {"epsilon": 0.01, "lambda": 0.6, "select": "test"})])}
FIGURES = {
    "6": Table("Figure 6: batch size and number of anchors", [
        Column(f"k = {k}, BioVid (B) accuracy", "biovid_b", 2, "accuracy", {"k": k})
        for k in (5, 15, 30)], [
        Row(f"batch size {b}", {"batch_size": b}) for b in (32, 64, 128, 256)]),
    "7": Table("Figure 7: epsilon", [BIOVID_B, VALENCE, AROUSAL], [
        Row(f"epsilon {e:g}", {"epsilon": e}) for e in (0.001, 0.01, 0.1, 1.0, 10.0)])}


def read_results(path):
    """The lines of results.jsonl; one that is not JSON, of a writer that was killed, is left out
    with a warning."""
    records = []
    for count, line in enumerate(path.read_text(errors="replace").splitlines() if path.exists() else [], 1):
        try:
            records.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            print(f"warning: {path}, line {count} is not whole and is left out", file=sys.stderr)
    return records


def undefined(method, task):
    return method == "kl" and task == "regression"


def fill(table, args):
    """Trains what the table lacks, teachers included. Returns {(row, column): {(fold, seed): results
    line}} by number, and why data sets are missing. A bound has one run a fold, of seed None."""
    known = [] if args.fresh else read_results(args.out / "results.jsonl")
    cells, problems, teachers = {}, {}, {}
    for (i, row), (j, column) in product(enumerate(table.rows), enumerate(table.columns)):
        cell, key = cells.setdefault((i, j), {}), (column.dataset, column.classes)
        if row.ours is None or undefined(method_of(row, args), task_of(column)):
            continue
        if key not in teachers:
            try:
                teachers[key] = ensure_teachers(*key, args)
            except UserError as error:
                teachers[key], problems[column.dataset] = [], f"{column.dataset} not run: {error}"
        for path, state in teachers[key]:
            fold = state["settings"]["fold"]
            if isinstance(row.ours, str):
                scores = state["scores"][row.ours]
                cell[fold, None] = train_teacher.result_line(state["settings"], row.ours, scores, 0)
                continue
            for seed in range(args.seed, args.seed + args.seeds):
                flags = Namespace(**{**vars(args), **row.ours, **column.change, "seed": seed})
                cell[fold, seed] = student_of(path, state, flags, known)
    return cells, list(problems.values())


def method_of(row, args):
    return row.ours.get("method", args.method) if isinstance(row.ours, dict) else "none"


def task_of(column):
    return "classification" if column.metric == "accuracy" else "regression"


def student_of(path, teacher, args, known):
    """The results line of a student: the last equal one that is known, else trained now."""
    settings = teacher["settings"]
    want = {**{k: settings[k] for k in ("dataset", "synthetic", "fold")}, "role": "student",
            **identity(args, teacher)}
    done = [line for line in known if all(line.get(k) == v for k, v in want.items())]
    if not done:
        done = [distil(path, args, keep_student=False)]
        known += done
    return done[-1]


def ensure_teachers(dataset, classes, args):
    """(path, state) of each fold's teacher for a table. What is missing is trained like the newest
    that is there, or with train_teacher.py's defaults."""
    settings, source = train_teacher.make_settings(
        dataset, args.root, args.synthetic, amp=args.amp, classes=classes if classes != "va" else None)
    pattern = settings["dataset"] + "-synthetic" * settings["synthetic"] + "/*/fold*/teacher.pt"
    there = sorted(args.out.glob(pattern), key=lambda p: p.stat().st_mtime, reverse=True)
    there = (load(path, "teacher")["settings"] for path in there)
    same = ("root", "task", "outputs")
    found = next((s for s in there if all(s[k] == settings[k] for k in same)), {})
    changed = [f"{key} {value}" for key, value in found.items()
               if key in settings and value != settings[key] and key != "data"]
    if changed:
        print(f"{dataset}: teachers with {', '.join(changed)}")
    settings = {**settings, **found, "data": settings["data"]}
    teachers = []
    for fold in train_teacher.folds_of(source):
        settings = {**settings, "fold": fold}
        path = train_teacher.run_folder(settings, args.out) / "teacher.pt"
        if not path.exists():
            train_teacher.train_teacher(settings, source, Namespace(**{**vars(args), "resume": True}))
        state = load(path, "teacher")
        train_teacher.same_settings(state, settings, path)
        teachers.append((path, state))
    return teachers


def metric_of(cell, column):
    return {key: record[column.metric] for key, record in cell.items()}


def interval(ours, theirs):
    """Mean and 95 % t interval of ours - theirs, {(fold, seed): score} each, paired by fold and seed
    -> (mean, low, high), or None below two pairs.

    Seeds of one fold share its teacher and its test samples, so that a fold's differences are
    averaged first; with a single fold the seeds are what is left to vary. A bound (seed None) pairs
    with every seed.
    """
    pairs = {(fold, seed): value - theirs.get((fold, seed), theirs.get((fold, None)))
             for (fold, seed), value in ours.items() if {(fold, seed), (fold, None)} & theirs.keys()}
    folds = {fold: [d for (f, _), d in pairs.items() if f == fold] for fold, _ in pairs}
    sample = [statistics.mean(d) for d in folds.values()] if len(folds) > 1 else list(pairs.values())
    if len(sample) < 2:
        return None
    mean = statistics.mean(sample)
    half = stats.t.ppf(0.975, len(sample) - 1) * stats.sem(sample)
    return mean, mean - half, mean + half


def number(value, column, sign=""):
    return f"{value:{sign}.{2 if column.metric == 'accuracy' else 3}f}"


def summary(runs):
    """Mean and standard deviation over folds and seeds, and the number of runs."""
    spread = statistics.stdev(runs) if len(runs) > 1 else 0.0
    return statistics.mean(runs) if runs else math.nan, spread, len(runs)


def format_cell(column, row, cell, args):
    if row.ours is None:
        return ""
    if undefined(method_of(row, args), task_of(column)):
        return "n/a"
    if not cell:
        return "not run"
    mean, spread, runs = summary(list(metric_of(cell, column).values()))
    if runs == 1:
        return f"{number(mean, column)} (1 run)"
    return f"{number(mean, column)} ± {number(spread, column)} ({runs} runs)"


def format_gap(column, reference, row, ours, theirs):
    """The paired difference of the reference (PKDOT as in the paper) and another row, and whether
    it is noise."""
    text = f"- {reference.label} minus {row.label}, {column.heading}: "
    gap = interval(metric_of(ours, column), metric_of(theirs, column))
    if gap is None:
        return text + "one pair, no interval"
    mean, low, high = (number(value, column, "+") for value in gap)
    over = "folds" if len({fold for fold, _ in ours}) > 1 else "the seeds of one split"
    noise = ", inside the noise" if gap[1] <= 0 <= gap[2] else ""
    return text + f"{mean}, 95 % interval over {over} [{low}, {high}]{noise}"


def is_synthetic(cells):
    return any(record["synthetic"] for cell in cells.values() for record in cell.values())


def format_table(table, cells, args):
    """The table in Markdown: for each column the paper's number and ours, then the paired
    differences to PKDOT as in the paper."""
    title, columns, rows = table
    records = [record for cell in cells.values() for record in cell.values()]
    lines = [f"**{'SYNTHETIC DATA - ' * is_synthetic(cells)}{title}**", ""]
    lines += [TABLE_I[dataset] for dataset in dict.fromkeys(column.dataset for column in columns)]
    if columns[0].dataset == "features":
        lines[-1] += f", fusion {', '.join(sorted({record['fusion'] for record in records}))}"
    changed = [f"{key} {value}" for key, value in vars(args).items() if key in CHOICES
               and key != "seed" and value not in (None, parse([]).__dict__[key])]
    lines += [f"with {', '.join(changed)}"] if changed else []

    published = any(row.paper for row in rows)
    heads = [head for column in columns
             for head in ([f"{column.heading}: paper", "here"] if published else [column.heading])]
    lines += ["", "| | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for i, row in enumerate(rows):
        ours = [format_cell(column, row, cells[i, j], args) for j, column in enumerate(columns)]
        paper = row.paper or ["-"] * len(columns)
        texts = [text for pair in zip(paper, ours, strict=True) for text in pair] if published else ours
        lines.append(f"| {row.label} | " + " | ".join(texts) + " |")

    lines.append("")
    sizes = {(r["batch_size"], r["b"]) for r in records if r.get("b", 1e9) < r.get("batch_size", 0)}
    for size, b in sorted(sizes):
        lines.append(f"where fewer than {size} training samples are there, batch size {size} is b = {b}")
    first = next((i for i, row in enumerate(rows) if row.ours == {}), None)
    lines += [format_gap(column, rows[first], row, cells[first, j], cells[i, j])
              for j, column in enumerate(columns) for i, row in enumerate(rows)
              if first not in (None, i) and cells[i, j] and cells[first, j]]
    return "\n".join(lines)


def for_features(table, path):
    """A table's comparison on a features file: the same rows, the file's own metric, no number of
    the paper's."""
    source = data.Features(path)
    metrics = ["accuracy"] if source.task == "classification" else ["valence", "arousal"]
    classes = source.outputs if source.task == "classification" else "va"
    changes = [c.change for c in table.columns
               if c.dataset == table.columns[0].dataset and c.metric == "accuracy"]
    changes = [change for n, change in enumerate(changes) if change not in changes[:n]] or [{}]
    columns = [Column(", ".join([*(f"{k} = {v}" for k, v in change.items()), f"{Path(path).stem} {metric}"]),
                      "features", classes, metric, change) for metric in metrics for change in changes]
    title = table.title.partition(",")[0]  # without the data set
    return Table(title, columns, [Row(row.label, row.ours) for row in table.rows if row.ours is not None])


def of_dataset(table, dataset):
    """The columns of one data set."""
    keep = [j for j, column in enumerate(table.columns) if column.dataset == dataset]
    if not keep:
        raise UserError(f"--dataset {dataset}: {table.title} has no column of it")
    rows = [Row(row.label, row.ours, tuple(row.paper[j] for j in keep if row.paper)) for row in table.rows]
    return Table(table.title, [table.columns[j] for j in keep], rows)


def print_table(name, args):
    table = {**TABLES, **FIGURES}[name]
    if args.dataset == "features":
        table = for_features(table, args.root)
    elif args.dataset:
        table = of_dataset(table, args.dataset)
    if args.root and len({column.dataset for column in table.columns}) > 1:
        raise UserError(f"--root {args.root}: {table.title} is of several data sets; "
                        "say which one with --dataset")
    begin = time.time()
    cells, problems = fill(table, args)
    print(format_table(table, cells, args))
    students = {id(record): record["seconds"] for cell in cells.values() for record in cell.values()
                if record["role"] == "student"}.values()  # two metrics of one run are one student
    print(f"\n{time.time() - begin:.0f} s on {args.device}, torch {torch.__version__}; "
          f"{len(students)} students took {sum(students):.0f} s, whenever trained")
    if not any(cells.values()):
        raise UserError("; ".join(problems))
    print("\n".join(problems), file=sys.stderr, end="\n" if problems else "")
    return table, cells


def pyplot():
    """matplotlib, or None with a line that says so."""
    try:
        from matplotlib import pyplot
    except ImportError:
        print("matplotlib is not installed: no png")
        return None
    return pyplot


def draw_figure(name, args):
    """Figures 6 and 7: the grid on the screen and as csv, and as png if matplotlib is installed."""
    (title, columns, rows), cells = print_table(name, args)
    synthetic = is_synthetic(cells)
    grid = [[summary(list(metric_of(cells[i, j], column).values())) for j, column in enumerate(columns)]
            for i, _ in enumerate(rows)]
    source = Path(args.root).stem if args.dataset == "features" else args.dataset
    path = args.out / "-".join([f"figure{name}", *filter(None, [source]), *["synthetic"] * synthetic])
    with data.replacing(path.with_suffix(".csv")) as part, open(part, "w", newline="") as file:
        write = csv.writer(file).writerow
        heads = [head for column in columns for head in (column.heading, "sd", "runs")]
        write(["SYNTHETIC" * synthetic, *heads])
        for row, found in zip(rows, grid, strict=True):
            write([row.label, *(value for triple in found for value in triple)])
    print(path.with_suffix(".csv"))
    if (plot := pyplot()) is None:
        return
    units = ["accuracy (%)" if column.metric == "accuracy" else "CCC" for column in columns]
    panels = list(dict.fromkeys(units))  # valence and arousal share one
    figure, axes = plot.subplots(1, len(panels), squeeze=False, figsize=(5 * len(panels), 4),
                                 layout="constrained")
    for column, unit, series in zip(columns, units, zip(*grid, strict=True), strict=True):
        axis = axes[0, panels.index(unit)]
        mean, spread, _ = zip(*series, strict=True)
        ticks = [row.label.split()[-1] for row in rows]
        axis.errorbar(ticks, mean, spread, marker="o", label=column.heading)
        axis.set_xlabel(rows[0].label.rpartition(" ")[0])
        axis.set_ylabel(unit)
        axis.legend()
    figure.suptitle("SYNTHETIC DATA - " * synthetic + title)
    with data.replacing(path.with_suffix(".png")) as part:
        figure.savefig(part, format="png")
    print(path.with_suffix(".png"))


def figure_5(args):
    """Similarity matrices (Eq. 4) of the teacher, and of the student before, halfway through and
    after training, over up to 128 training samples sorted by class."""
    dataset = args.dataset or "biovid_b"
    args.fold = args.fold or ["1"]
    path, teacher = ensure_teachers(dataset, "va" if dataset == "affwild2" else None, args)[0]
    settings, features = teacher["settings"], open_run(path, teacher)
    epochs = identity(args, teacher)["epochs"]
    train = fold_windows(features, settings["fold"], dense=True).train
    train = train.take(torch.linspace(0, len(train.index) - 1, min(len(train.index), 128)).long())
    rank = train.label if settings["task"] == "classification" else train.label[..., 0].nanmean(1)
    train = train.take(rank.argsort(stable=True))
    z_t = teacher_answers(teacher, features, train.index, args.device).z
    S = {"teacher": cosine_similarity_matrix(z_t).cpu()}

    def watch(epoch, represent):
        if epoch in (0, epochs // 2, epochs):
            S[f"student, epoch {epoch}"] = cosine_similarity_matrix(represent(train))

    distil(path, args, keep_student=False, watch=watch)
    for name, matrix in S.items():
        print(f"{name}: mean similarity {matrix.mean():.3f}, "
              f"mean |S - S_teacher| {(matrix - S['teacher']).abs().mean():.3f}")
    synthetic = settings["synthetic"]
    out = args.out / f"figure5-{dataset}{'-synthetic' * synthetic}.npz"
    with data.replacing(out) as part, open(part, "wb") as file:
        np.savez(file, **{name: matrix.numpy() for name, matrix in S.items()})
    print(out)
    if (plot := pyplot()) is None:
        return
    figure, axes = plot.subplots(1, len(S), figsize=(3.2 * len(S), 3.6), layout="constrained")
    for axis, (name, matrix) in zip(axes, S.items(), strict=True):
        image = axis.imshow(matrix, vmin=-1, vmax=1, cmap="RdBu_r")
        axis.set_title(name)
        axis.set_xlabel("training sample")
        if settings["task"] == "classification":  # a line between classes
            for edge in train.label.sort().values.diff().nonzero()[:, 0].tolist():
                axis.axvline(edge + 0.5, color="black", lw=0.8)
                axis.axhline(edge + 0.5, color="black", lw=0.8)
    axes[0].set_ylabel("sorted by class" if settings["task"] == "classification" else "sorted by valence")
    figure.colorbar(image, ax=axes, label="cosine similarity (Eq. 4)", shrink=0.8)
    figure.suptitle("SYNTHETIC DATA - " * synthetic + f"similarity matrices, {dataset} fold {settings['fold']}")
    with data.replacing(out.with_suffix(".png")) as part:
        figure.savefig(part, format="png", dpi=110)
    print(out.with_suffix(".png"))


def parse(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--teacher", type=Path, metavar="FILE", help="default: the newest teacher.pt under --out")
    add("--fold", nargs="+", choices=["1", "2", "3", "4", "5", "all"],
        help="the teacher's siblings of these folds; of a table, its folds (default all)")
    add("--method", choices=METHODS, default="pkdot", help="default pkdot")
    at_least = train_teacher.at_least
    add("--lambda", type=at_least(0, float), default=0.4, help="weight of W in Eq. 9; default 0.4")
    add("--k", type=at_least(1), default=30, help="anchors; default 30")
    add("--epsilon", type=at_least(1e-6, float), default=0.1, help="Eq. 5, in units of the cost "
        "1/2 |x - y|^2; default 0.1 (the release's blur 0.1 is 0.01)")
    add("--no-debias", dest="debias", action="store_false", help="Eq. 5 to the letter")
    add("--anchors", choices=ANCHORS, default="dissimilar", help="default dissimilar, the paper's")
    add("--shared-anchors", dest="shared", action="store_true",
        help="one set of anchors for the batch instead of one a row")
    add("--batch-size", type=at_least(2), default=128, help="b in Eq. 1; default 128")
    add("--lr", type=at_least(0, float), default=1e-4, help="default 1e-4")
    add("--epochs", type=at_least(1), help="default 20 (the release's); 50 on a stand-in")
    add("--finetune", action="store_true", help="train the visual backbone too, from video")
    add("--select", choices=("val", "test", "last"), default="val", help="what chooses the epoch: "
        "held-out training subjects (default), the test fold (the release), or nothing")
    train_teacher.add_common_flags(parser)
    job = parser.add_mutually_exclusive_group()
    job.add_argument("--evaluate", type=Path, metavar="STUDENT.pt",
                     help="a saved student's test score, from faces")
    job.add_argument("--predict", type=Path, metavar="FOLDER",
                     help="csv of a student's predictions for face crops")
    job.add_argument("--table", choices=TABLES,
                     help="the paper's table, or our choices; trains what is missing")
    job.add_argument("--figure", choices=("5", *FIGURES), help="the paper's figure, likewise")
    add("--student", type=Path, metavar="STUDENT.pt", help="for --predict")
    add("--dataset", choices=data.DATASETS, help="the newest teacher's; of a table its columns")
    add("--seeds", type=at_least(1), default=1, help="tables and figures: students a fold; default 1")
    add("--fresh", action="store_true", help="tables and figures: train the students again")
    parser.set_defaults(transport=True, hallucinate="tnet")  # --table choices changes them
    return parser.parse_args(argv)


def main():
    args = parse()
    args.device = train_teacher.choose_device(args.device, args.amp)
    if args.k > args.batch_size:
        raise UserError(f"--k {args.k}: the similarity matrix has only --batch-size {args.batch_size} "
                        "rows; lower --k or raise --batch-size")
    if args.evaluate:
        return evaluate(args.evaluate, args)
    if args.predict:
        if not args.student:
            raise UserError("--predict needs --student STUDENT.pt")
        return predict(args.predict, args.student, args)
    if args.table or args.figure:
        if args.method != "pkdot" or args.teacher:
            raise UserError("--table and --figure choose methods and teachers: "
                            "leave --method and --teacher out")
        if args.dataset == "features" and not args.root:
            raise UserError("--dataset features needs --root FILE.npz")
        if args.figure == "5":
            return figure_5(args)
        return draw_figure(args.figure, args) if args.figure else print_table(args.table, args)

    for path in siblings(args.teacher or newest_teacher(args), args.fold):
        teacher = load(path, "teacher")
        settings, found = teacher["settings"], teacher["scores"]
        train_teacher.start_log(path.parent, settings)
        print(f"{path}, test: visual only {show(found['visual'])}, "
              f"teacher {show(found['multimodal'])}")
        record = distil(path, args)
        print(f"{train_teacher.heading(settings)}, n = {record['n_test']}: "
              f"visual only (lower bound) {show(found['visual'])} | "
              f"student, {args.method} {show(record)} | "
              f"multimodal (upper bound) {show(found['multimodal'])}")


def siblings(path, folds):
    """The teachers beside the one at path that --fold names."""
    if not folds:
        return [path]
    if "all" in folds:
        return sorted(path.parent.parent.glob("fold*/teacher.pt"))
    return [path.parent.parent / f"fold{fold}" / "teacher.pt" for fold in folds]


if __name__ == "__main__":
    data.run(main)
