"""Stage 3: distil the multimodal teacher into a student that has the face alone; then evaluate,
predict, tabulate.

    python train_student.py --lambda 0.4 --k 30                # the newest teacher under runs/
    python train_student.py --method cosine --fold all
    python train_student.py --evaluate runs/biovid_b-synthetic/c2/fold1/student-pkdot.pt
    python train_student.py --predict faces --student student-pkdot.pt
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
import os
import statistics
import sys
import time
from itertools import product, starmap
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy import stats
from tqdm import tqdm

import data
import models
import train_teacher
from data import Parser, UserError
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
from train_teacher import (
    append_line,
    bar,
    clip_loader,
    criterion,
    dealt,
    fingerprint,
    fold_of,
    heading,
    load,
    make_head,
    result_line,
    score,
    seed_all,
    show,
    snapshot,
    with_flags,
)

EPOCHS, STAND_IN_EPOCHS = 20, 50  # the release's; a stand-in's epochs are of few steps

# What lambda weighs in Eq. 9, of the student's and the teacher's Fused of a batch.
# To add a baseline: write its loss in pkdot.py, and a line here.
METHODS = {
    "pkdot": lambda s, t, args: pkdot_loss(  # Eq. 1-6
        s.z, t.z, args.k, args.epsilon, args.debias, args.anchors, args.shared, args.transport),
    "cosine": lambda s, t, args: cosine_loss(s.z, t.z),
    "mse": lambda s, t, args: mse_loss(s.z, t.z),
    "kl": lambda s, t, args: kl_loss(s.output, t.output),
    "rkd": lambda s, t, args: rkd_loss(s.z, t.z),
    "none": lambda s, t, args: s.z.new_zeros(())}


def distil(teacher, args, keep_student=True, watch=None):
    """Stage 3 of one fold: a student of a teacher (`open_teacher`); returns the results line that
    it appends.

    args: the parsed flags. watch(epoch, predict), if given, is called before the first epoch and
    after each; predict(windows, "z") is the student's z (S, m) of them.
    """
    # prepare: the teacher's answers to all windows, the student, what it sees
    begin, run, device = time.time(), teacher["path"].parent, args.device
    choice, settings = identity(args, teacher), teacher["settings"]
    saved_as = settings | {f"student_{key}": value for key, value in choice.items()}
    finished = run / f"student-{args.method}.pt"
    progress = finished.with_suffix(".progress")
    resume = args.resume and keep_student
    if resume and finished.exists():
        done = load(finished, "student")
        if done["settings"] == saved_as:
            print(f"{finished} is finished")
            return done["record"]
    if args.method == "kl" and settings["task"] == "regression":
        raise UserError(f"--method {args.method} compares class probabilities, and valence/arousal "
                        "has none; choose another method")

    features = open_features(teacher, device)
    fold = fold_of(features, settings, dense=True)
    index = fold.train.index
    samples, b = len(index), min(args.batch_size, len(index))
    args = with_flags(args, k=min(args.k, b))  # no more anchors than rows
    if b < args.batch_size and keep_student:
        print(f"warning: only {samples} training samples; batches are of {b} and k is {args.k}",
              file=sys.stderr)
    label = fold.train.label.to(device)
    targets = teacher_answers(teacher, features, index)

    seed_all(args.seed, 3)
    student, trained = make_student(teacher, args, with_backbone=args.finetune or keep_student)
    optimizer = torch.optim.Adam(trained.parameters(), lr=args.lr, fused=True)
    frozen = fingerprint(student.tnet.state_dict())
    seen = what_the_student_sees(features, settings, args)
    network = student if args.finetune else student.fuse
    over_ranks = train_teacher.spread(network, args)

    def forward(network, x):
        with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
            output, z = network(*x)
        return Fused(output.float(), z.float())

    def predict(windows, part="output"):
        batches = dealt(torch.arange(len(windows.index)).split(b), args)
        inputs = student_inputs(*seen, windows.index, batches, args)
        return train_teacher.answers(lambda x: getattr(forward(network, x), part), inputs, args)

    first, best, fault, saved = 0, None, None, time.time()
    if resume and progress.exists():
        first, best = train_teacher.restore_progress(progress, saved_as, trained, optimizer)
    if watch:
        watch(0, predict)
    for epoch in bar(range(first, choice["epochs"]), f"{args.method} fold {settings['fold']}"):
        # one epoch; the last batch is dropped, since S wants b rows
        seed_all(args.seed, 3, epoch + 1)
        batches = torch.randperm(samples)[:samples - samples % b].split(b)
        shares = [train_teacher.share(batch, args) for batch in batches]
        inputs = student_inputs(*seen, index, shares, args)
        trained["head"].train()  # a backbone's batch norm keeps the statistics of stage 1
        answers = (forward(over_ranks, x) for x in inputs)
        terms = train_epoch(answers, batches, label, targets, optimizer, args)
        means, fault = train_teacher.step_means(terms, ["L_gt", "W"], epoch)
        if fault:
            break

        # select: val, held-out training groups choose the epoch; test, the test fold does (the
        # release); last, nothing
        trained.eval()
        chosen_on = fold.test if args.select == "test" else fold.val
        found = score(features, chosen_on, predict(chosen_on))
        value = criterion(found)
        if best is None or args.select == "last" or value > best["score"]:
            best = dict(score=value, epoch=epoch, model=snapshot(trained))

        # keep
        if keep_student and args.rank == 0:
            log_epoch(run, args, choice["epochs"], epoch, *means, found)
            if time.time() - saved > train_teacher.SAVE_EVERY:
                train_teacher.keep_progress(progress, saved_as, epoch, trained, optimizer, best)
                saved = time.time()
        if watch:
            watch(epoch + 1, predict)

    # finish: the test fold, once; the score of the validation part, by which a table chooses lambda
    if fingerprint(student.tnet.state_dict()) != frozen:
        raise RuntimeError("the frozen T-Net has changed during distillation")
    if best:
        trained.load_state_dict(best["model"])
    state = best and keep_student and dict(
        kind="student", settings=saved_as, model=snapshot(student),
        test_names=features.name[fold.test.index[:, 0].numpy()].tolist())
    if fault:
        train_teacher.diverged(fault, "lower --lr or raise --epsilon", finished, state, args)
    validation = criterion(score(features, fold.val, predict(fold.val)))
    output = predict(fold.test)
    found = score(features, fold.test, output)
    record = result_line(
        settings, "student", found, time.time() - begin, b=b, k_used=args.k,
        epoch=best["epoch"] + 1, validation=validation, **choice)
    if args.rank == 0:
        if keep_student:
            train_teacher.log_videos(run, f"student {args.method}", features, fold.test, output)
            train_teacher.save(finished, state | {"scores": found, "record": record})
            progress.unlink(missing_ok=True)
        append_line(args.out / "results.jsonl", record)
    return record


def train_epoch(answers, batches, label, teacher, optimizer, args):
    """The steps of one epoch; returns L_gt and W of each.

    answers: the student's Fused of this rank's share of each batch, computed as it is asked for;
    label (S, ...) and the teacher's Fused (S, ...) are of all windows.
    """
    terms = []
    for batch, s in zip(batches, answers, strict=True):
        batch = batch.to(args.device)
        s = Fused(*(train_teacher.gather(part, len(batch), args) for part in s))
        t = Fused(*(part[batch] for part in teacher))

        loss_gt = task_loss(s.output, label[batch])  # Eq. 7 or 8
        try:
            W = METHODS[args.method](s, t, args)
        except ValueError:  # a representation is not finite; nor is what follows
            W = loss_gt * math.nan
        loss = loss_gt + args.lam * W  # Eq. 9

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        terms.append(torch.stack([loss_gt, W]).detach())
    return terms


def what_the_student_sees(features, settings, args):
    """(visual, privileged): the rows of visual features (R, 512), or under --finetune what lies
    before the backbone, a data set of faces or rows (R, Dv); and for an oracle the true privileged
    features (R, 512), else None."""
    visual = features.rows["visual"]
    privileged = features.rows["privileged"] if args.hallucinate == "oracle" else None
    if args.finetune:
        file = settings["dataset"] == "features"
        root = args.root or settings["root"]
        source = data.Features(root) if file else open_faces(settings, args)
        if train_teacher.digest(source) != settings["data"]:
            raise UserError(
                f"{source.path}: its samples are not those that the teacher was trained on; "
                "train the teacher again, or give the --root it was trained on")
        visual = source.rows["visual"].to(args.device) if file else source
    return visual, privileged


def student_inputs(visual, privileged, index, batches, args):
    """What the student sees of the windows index (S, L), batch by batch: (visual, windows,
    privileged). Rows give visual (b, L, D) and windows None; a data set gives the distinct clips
    (U, 1, 3, F, H, W) of the batch, read once each, and which of them its windows have (b, L)."""
    batches = [index[batch] for batch in batches]  # (b, L) rows each
    if torch.is_tensor(visual):
        clips, windows = (visual[rows] for rows in batches), [None] * len(batches)
    else:
        distinct = [rows.unique() for rows in batches]
        windows = map(torch.searchsorted, distinct, batches)
        every = torch.arange(len(visual.name))[:, None]
        clips = clip_loader(visual, "visual", every, distinct, args)
    for rows, x, which in zip(batches, clips, windows, strict=True):
        true = None if privileged is None else privileged[rows]
        yield x.to(args.device, non_blocking=True), which, true


@torch.no_grad()
def teacher_answers(teacher, features, index):
    """Fused (S, ...) of the frozen teacher for all windows: on frozen features it answers once."""
    visual, privileged = features.rows["visual"], features.rows["privileged"]
    head = make_head(teacher["settings"]).to(visual.device).eval()
    head.load_state_dict(teacher["head"])
    answers = [head(visual[rows], privileged[rows]) for rows in index.split(256)]
    return Fused(*(torch.cat(part) for part in zip(*answers, strict=True)))


def build_student(settings, hallucinate="tnet", chunk=None):
    return models.Student(train_teacher.make_backbone("visual", settings), models.TNet(),
                          make_head(settings), hallucinate, chunk)


def make_student(teacher, args, with_backbone):
    """The student, and the part of it that stage 3 trains; all else is frozen. Only what is run or
    saved needs a backbone with weights."""
    student = build_student(teacher["settings"], args.hallucinate, args.chunk)
    student.tnet.load_state_dict(teacher["tnet"])
    if with_backbone:
        student.backbone.load_state_dict(visual_weights(teacher))
    student.to(args.device).requires_grad_(False).eval()
    trained = torch.nn.ModuleDict({"head": student.head})
    if args.finetune:
        trained["backbone"] = student.backbone
    return student, trained.requires_grad_(True)


def log_epoch(run, args, epochs, epoch, loss_gt, W, found):
    """Task and OT terms apart: every epoch to log.jsonl, ten of them to the screen."""
    lambda_w = args.lam * W
    append_line(run / "log.jsonl", dict(
        stage="student", method=args.method, seed=args.seed, epoch=epoch + 1,
        loss_gt=loss_gt, w=W, lambda_w=lambda_w, **found))
    if epoch % max(epochs // 10, 1) == 0 or epoch + 1 == epochs:
        part = "test" if args.select == "test" else "val"
        tqdm.write(f"epoch {epoch + 1:3d}  L_gt {loss_gt:.4f}  lambda W {lambda_w:.4f}  "
                   f"{part} {show(found)}")


def open_faces(settings, args, folder=None):
    """What a run's student looks at, without any privileged file: the data set that it was trained
    on, or the unlabelled faces in a folder. A features file may be another one, of the same shape.
    """
    kind, length, size = (settings[key] for key in ("dataset", "length", "image_size"))
    root = folder or args.root or settings["root"]
    start = settings["face_start"] if args.face_start is None else args.face_start
    if kind != "features" and folder:
        return data.Faces(folder, kind, length, size, start)
    if kind != "features":
        return data.open_dataset(kind, root, settings["outputs"], length, size, False, start)
    source = data.Features(root, privileged=False, labelled=not folder)
    found, wanted = source.rows["visual"].shape[1], settings["visual_dim"]
    if (source.length, found) != (length, wanted):
        raise UserError(f"{root}: visual is (N, {source.length}, {found}), the student was trained "
                        f"on (N, {length}, {wanted})")
    return source


def open_teacher(path):
    """A teacher's checkpoint, and with it where it lies and which weights it is."""
    state = load(path, "teacher")
    parts = fingerprint(state["head"]), fingerprint(state["tnet"]), state["backbones"]
    folder = train_teacher.stage_1_folder(path.parent, state["settings"])
    teacher = state | {"path": path, "stage 1": folder, "weights": "-".join(parts)}
    visual_weights(teacher)  # or one line says that they are others by now
    return teacher


def visual_weights(teacher):
    """Stage 1's weights of the visual backbone, those that the teacher was trained on."""
    folder = teacher["stage 1"]
    weights = train_teacher.backbone_weights(load(folder / "visual.pt", "visual"))
    if not teacher["backbones"].startswith(fingerprint(weights)):
        raise UserError(f"{folder}: visual.pt was trained again after {teacher['path']}; "
                        "finish the teacher: train_teacher.py --resume with the same flags")
    return weights


def open_features(teacher, device):
    """The features that a teacher was trained on."""
    features = train_teacher.open_features(teacher["stage 1"], teacher["settings"], device)
    if features.backbones != teacher["backbones"]:
        raise UserError(f"{teacher['stage 1']}: features.npz is of other backbones than "
                        f"{teacher['path']}; finish the teacher: train_teacher.py --resume with "
                        "the same flags")
    return features


CHOICES = ("method", "k", "epsilon", "debias", "anchors", "shared", "transport",
           "hallucinate", "batch_size", "lr", "epochs", "finetune", "select", "seed", "amp")


def identity(args, teacher):
    """What a line of results.jsonl must agree in to stand for a run: every choice, the teacher's
    weights, the code of the loss and the networks."""
    choice = {key: vars(args)[key] for key in CHOICES}
    choice["lambda"] = 0.0 if args.method == "none" else args.lam
    default = STAND_IN_EPOCHS if teacher["settings"]["synthetic"] else EPOCHS
    choice["epochs"] = args.epochs or default
    return choice | {"teacher": teacher["weights"], "code": code_digest()}


@functools.cache  # the code that runs is the code that was imported, whatever is edited meanwhile
def code_digest():
    code = b"".join(Path(__file__).with_name(f"{name}.py").read_bytes()
                    for name in ("sinkhorn", "pkdot", "models"))
    return hashlib.sha256(code).hexdigest()[:12]


def teachers_under(out, name):
    """All teacher.pt of a data set, "*" for any, the newest first."""
    found = out.glob(f"{name}/*/fold*/teacher.pt")
    return sorted(found, key=os.path.getmtime, reverse=True)


def newest_teacher(args):
    """The newest teacher.pt under --out, of --dataset and --synthetic if they are given."""
    name = (args.dataset or "*") + "-synthetic" * args.synthetic
    if found := teachers_under(args.out, name):
        return found[0]
    name = name.replace("*", "<dataset>")
    raise UserError(f"{args.out}: no {name}/<variant>/fold<n>/teacher.pt in it; "
                    "run train_teacher.py first")


def student_output(state, source, index, args, text):
    """Output of a saved student for windows of faces, in the precision that it was trained in."""
    settings = state["settings"]
    student = build_student(settings)
    student.load_state_dict(state["model"])
    student.to(args.device).eval()
    amp = settings["student_amp"]
    precision = functools.partial(torch.autocast, args.device.type, torch.bfloat16)
    batches = dealt(torch.arange(len(index)).split(32), args)
    loader = clip_loader(source, "visual", index, batches, args)

    def forward(clips):
        with precision(enabled=amp if settings["student_finetune"] else settings["amp"]):
            features = student.backbone(clips.to(args.device))
        with precision(enabled=amp):
            return student.fuse(features.float()).output

    return train_teacher.answers(forward, bar(loader, text), args)


def evaluate(path, args):
    """Test score of a saved student, from the faces alone: no privileged file is opened."""
    state = load(path, "student")
    settings, wanted = state["settings"], state["test_names"]
    source = open_faces(settings, args)
    missing = sorted(set(wanted) - set(source.name))
    if missing:
        raise UserError(f"{source.path}: lacks {len(missing)} of the student's {len(wanted)} test "
                        f"samples, first {missing[0]}; give the --root it was trained on")
    windows = data.label_windows(source, source.label)
    windows = windows.take(np.isin(source.name[windows.index[:, 0].numpy()], wanted))
    found = score(source, windows, student_output(state, source, windows.index, args, "evaluate"))
    print(f"{heading(settings)}, n = {found['n']}: "
          f"student {settings['student_method']} {show(found)}")


def class_names(settings):
    """BL1, PA1 ...; the classes of a features file have numbers."""
    numbers = range(settings["outputs"])
    return numbers if settings["dataset"] == "features" else data.BioVid.levels(len(numbers))


def predict(folder, path, args):
    """One csv line per sample (class probabilities) or clip (valence, arousal) of unlabelled faces,
    on stdout; what cannot be used is named on stderr. Returns the exit code, then 1."""
    state = load(path, "student")
    settings = state["settings"]
    source = open_faces(settings, args, folder)
    index, keep = data.windows(source.video, source.length)
    output = student_output(state, source, index, args, "predict")

    if settings["task"] == "regression":  # each clip once, in their order
        header, names = ["clip", "valence", "arousal"], source.name
        rows, values = index[keep], output[keep]
    else:
        header = ["sample", *(f"p({name})" for name in class_names(settings))]
        names = source.name if settings["dataset"] == "features" else source.video
        rows, values = index[:, 0], output.softmax(1)
    write = csv.writer(sys.stdout, lineterminator="\n").writerow
    write(header)
    for name, numbers in zip(names[rows.numpy()], values.tolist(), strict=True):
        write([name, *(f"{number:.4f}" for number in numbers)])
    for fault in source.faults:
        print(fault, file=sys.stderr)
    return 1 if source.faults else 0


# ------------------------------------------------------------------------------ tables, figures

class Column(NamedTuple):
    heading: str
    dataset: str
    classes: int | str  # "va" for valence/arousal
    metric: str
    change: dict = {}  # of the flags, for all cells below
    series: str = ""  # what the change is called


class Row(NamedTuple):
    label: str
    ours: dict | str | None  # a student, by its flags; a bound, "visual" or "multimodal"; others'
    paper: tuple = ()  # the numbers as the paper prints them, one a column


class Table(NamedTuple):
    title: str
    columns: list
    rows: list
    reference: object = None  # of a figure: which cell (i, j) is compared to


TABLE_I = {
    "biovid_a": "BioVid (A): visual (weak, prevalent) + EDA (strong, privileged), "
                "feature concatenation, SEW",
    "biovid_b": "BioVid (B): visual (strong, prevalent) + EMG (weak, privileged), "
                "multimodal transformer, WES",
    "affwild2": "Affwild2: visual (strong, prevalent) + audio (weak, privileged), "
                "joint cross attention, WES",
    "features": "features file: visual (prevalent) + privileged"}

# What stands beside the paper's number in a row: a bound, or a student by its flags. Others' work
# is not run.
OURS = {
    "Visual only (lower bound)": "visual",
    "none (lambda 0)": {"method": "none"},
    "Cosine similarity [10]": {"method": "cosine"},
    "MSE [8]": {"method": "mse"},
    "KL [8]": {"method": "kl"},
    "RKD [31]": {"method": "rkd"},
    "PKDOT": {},
    "PKDOT, shared anchors": {"shared": True},
    "Multimodal (upper bound)": "multimodal"}


def rows_of(printed):
    """The rows of a table as the paper prints it; a row without numbers is not in the paper."""
    cells = [[cell.strip() for cell in line.split("|")] for line in printed.strip().splitlines()]
    return [Row(label, OURS.get(label), tuple(paper)) for label, *paper in cells]


BIOVID_B = Column("BioVid (B) accuracy", "biovid_b", 2, "accuracy")
VALENCE = Column("Affwild2 valence", "affwild2", "va", "valence")
AROUSAL = Column("Affwild2 arousal", "affwild2", "va", "arousal")
TABLES = {
    "2": Table("Table II: privileged KD methods", [BIOVID_B, VALENCE, AROUSAL], rows_of("""
        Cosine similarity [10]    | 75.40 | 0.37 | 0.53
        MSE [8]                   | N/A   | 0.39 | 0.53
        KL [8]                    | 75.80 | N/A  | N/A
        PKDOT                     | 78.76 | 0.43 | 0.56
        PKDOT, shared anchors
        RKD [31]
        none (lambda 0)
        Visual only (lower bound)
        Multimodal (upper bound)""")),
    "3": Table("Table III: visual-only methods, Affwild2 validation set", [
        VALENCE, AROUSAL], rows_of("""
        ResNet-50 [44]            | 0.31 | 0.17
        SENet-50 [45]             | 0.28 | 0.34
        MobileNet [46]            | 0.28 | 0.44
        RegNet + GRU [47]         | 0.43 | 0.57
        ResNeXt + SENet [48]      | 0.51 | 0.48
        Visual only (lower bound) | 0.41 | 0.51
        none (lambda 0)
        PKDOT                     | 0.43 | 0.56
        Multimodal (upper bound)  | 0.67 | 0.59""")),
    "4": Table("Table IV: visual-only methods, BioVid (A)", [
        Column("BL1 vs. PA4 accuracy", "biovid_a", 2, "accuracy"),
        Column("5 classes accuracy", "biovid_a", 5, "accuracy")], rows_of("""
        Sparse LSTM [19]          | 61.70 | 29.70
        ViT [18]                  | 72.11 | NR
        FAD + RF [49]             | 72.40 | 30.80
        GNN [50]                  | 73.20 | NR
        ViT [51]                  | 73.28 | 31.52
        ResNet-18 [52]            | NR    | 36.60
        Visual only (lower bound) | 72.10 | 30.38
        none (lambda 0)
        PKDOT                     | 74.55 | 33.65
        Multimodal (upper bound)  | 83.50 | 36.40""")),
    "5": Table("Table V: visual-only methods, BioVid (B)", [BIOVID_B], rows_of("""
        Handcrafted + RF [22]     | 72.70
        Visual only (lower bound) | 74.10
        none (lambda 0)
        PKDOT                     | 78.76
        Multimodal (upper bound)  | 81.30""")),
    "choices": Table("Choices that the paper leaves open (not in the paper)",
                     [BIOVID_B, VALENCE, AROUSAL], list(starmap(Row, {
        "PKDOT": {},
        "anchors shared by the batch": {"shared": True},
        "anchors shared, random": {"shared": True, "anchors": "random"},
        "anchors: most similar": {"anchors": "similar"},
        "anchors: random": {"anchors": "random"},
        "no transport: row i with row i": {"transport": False},
        "not debiased (Eq. 5)": {"debias": False},
        "T-Net's output zero": {"hallucinate": "zero"},
        "true privileged features (no student)": {"hallucinate": "oracle"},
        "backbone trained": {"finetune": True},
        **{f"lambda {x:g}": {"lambdas": [x]} for x in (0.0, 0.1, 1.0, 4.0, 10.0)},
        "epoch chosen on the test fold": {"select": "test"},
        "folds over clips": {"folds": "clips"},
        "the release's lambda and epsilon": {"lambdas": [0.6], "epsilon": 0.01},
        "the release's lambda, epsilon, epoch and folds": {
            "lambdas": [0.6], "epsilon": 0.01, "select": "test", "folds": "clips"},
        "none (lambda 0)": {"method": "none"},
        "Visual only (lower bound)": "visual",
        "Multimodal (upper bound)": "multimodal"}.items())))}
FIGURES = {
    "6": Table("Figure 6: batch size and number of anchors", [
        Column(f"k = {k}, BioVid (B) accuracy", "biovid_b", 2, "accuracy", {"k": k}, f"k = {k}")
        for k in (5, 15, 30)], [
        Row(f"batch size {b}", {"batch_size": b}) for b in (32, 64, 128, 256)],
        lambda i, j: (2, j - j % 3 + 2)),  # the paper's 128 and 30
    "7": Table("Figure 7: epsilon", [BIOVID_B, VALENCE, AROUSAL], [
        Row(f"epsilon {e:g}", {"epsilon": e}) for e in (0.001, 0.01, 0.1, 1.0, 10.0)],
        lambda i, j: (2, j)),  # the paper's 0.1
    "labels": Table("Figure labels: number of labelled training samples (not in the paper)", [
        Column(f"{name}, BioVid (A) accuracy", "biovid_a", 2, "accuracy", change, name)
        for name, change in (
            ("none", {"method": "none"}), ("cosine", {"method": "cosine"}),
            ("KL", {"method": "kl"}), ("PKDOT", {}), ("PKDOT shared", {"shared": True}))], [
        *(Row(f"labels {n}", {"labelled": n}) for n in (20, 60, 200, 600)),
        Row("labels all", {"labelled": None})],
        lambda i, j: (i, j - j % 5))}  # no distillation


def read_results(path):
    """The lines of results.jsonl; one that is not JSON, of a writer that was killed, is left out
    with a warning."""
    records = []
    text = path.read_text(errors="replace") if path.exists() else ""
    for count, line in enumerate(text.splitlines(), 1):
        if not line:  # where one writer met another halfway through
            continue
        try:
            records.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            print(f"warning: {path}, line {count} is not whole and is left out", file=sys.stderr)
    return records


def is_student(row):
    return isinstance(row.ours, dict)


def changes(row, column):
    """What the student of a cell changes of the command's flags."""
    return {**column.change, **(row.ours if is_student(row) else {})}


def undefined(row, column):
    """KL compares class probabilities."""
    return changes(row, column).get("method") == "kl" and column.metric != "accuracy"


def fill(table, args):
    """Trains what the table lacks, teachers included. Returns {(row, column): {(fold, seed):
    results line}} by number, and why data sets are missing. A bound has a run a fold, of seed None.
    """
    jobs, teachers, problems = {}, {}, {}
    for (i, row), (j, column) in product(enumerate(table.rows), enumerate(table.columns)):
        if row.ours is None or undefined(row, column):
            continue
        flags = with_flags(args, **changes(row, column))
        key = column.dataset, column.classes, flags.labelled, flags.folds
        if key not in teachers:
            teachers[key] = []
            try:
                found = teacher_settings(column.dataset, column.classes, flags)
            except UserError as error:
                problems[str(error)] = f"{column.dataset} not run: {error}"
            else:
                teachers[key] = ensure_teachers(*found, flags)

        # a student for each seed, and for each lambda to choose from
        seeds = range(args.seed, args.seed + args.seeds) if is_student(row) else [None]
        for teacher, seed in product(teachers[key], seeds):
            students = [with_flags(flags, seed=seed, lam=lam)
                        for lam in flags.lambdas if is_student(row)]
            jobs[i, j, teacher["settings"]["fold"], seed] = teacher, students

    # students that results.jsonl lacks: each rank trains its share, then all read what all wrote
    results = args.out / "results.jsonl"
    known = [] if args.fresh else read_results(results)
    missing = {json.dumps(want(teacher, flags)): (teacher, flags)
               for teacher, students in jobs.values() for flags in students
               if not student_of(teacher, flags, known)}
    train_teacher.wait_for_all()  # until all have read: who trains changes what is missing
    for teacher, flags in train_teacher.deal_out(list(missing.values()), "students", args):
        try:
            distil(teacher, train_teacher.alone(flags), keep_student=False)
        except UserError as error:  # one that diverges leaves its cell without this run
            problems[str(error)] = f"{flags.method} of {teacher['path']} not run: {error}"
    train_teacher.wait_for_all()
    known = read_results(results)

    cells = {(i, j): {} for i, _ in enumerate(table.rows) for j, _ in enumerate(table.columns)}
    for (i, j, *run), (teacher, students) in jobs.items():
        lines = list(filter(None, (student_of(teacher, flags, known) for flags in students)))
        if lines:
            cells[i, j][tuple(run)] = max(lines, key=lambda line: line["validation"])
        elif not students:
            bound = table.rows[i].ours
            cells[i, j][tuple(run)] = train_teacher.result_line(
                teacher["settings"], bound, teacher["scores"][bound], 0)
    return cells, list(problems.values())


def want(teacher, args):
    """What a student's results line must agree in."""
    settings = teacher["settings"]
    return {**{k: settings[k] for k in ("dataset", "synthetic", "fold")}, "role": "student",
            **identity(args, teacher)}


def student_of(teacher, args, known):
    """The last of the results lines that are a student's of these flags, or None."""
    wanted = want(teacher, args).items()
    return next((line for line in reversed(known) if wanted <= line.items()), None)


def teacher_settings(dataset, classes, args):
    """The settings of a table's teachers, like the newest teacher that is there or
    train_teacher.py's defaults; their data, and the folds."""
    flags = dict(amp=args.amp, labelled=args.labelled, folds=args.folds, face_start=args.face_start,
                 classes=None if classes == "va" else classes)
    settings, source = train_teacher.make_settings(dataset, args.root, args.synthetic, **flags)
    folds = [fold for fold in train_teacher.folds_of(source) if {"all", str(fold)} & set(args.fold)]
    if not folds:
        raise UserError(f"--fold {' '.join(args.fold)}: {settings['root']} has its own split; "
                        "there is only fold 1")

    name = dataset + "-synthetic" * settings["synthetic"]
    there = (load(path, "teacher")["settings"] for path in teachers_under(args.out, name))
    same = ("root", "task", "outputs", "labelled", "folds")
    found = next((s for s in there if all(s[k] == settings[k] for k in same)), {})
    changed = {key: value for key, value in found.items()
               if key not in ("fold", "data") and value != settings[key]}
    if changed:
        print(f"{dataset}: teachers with {', '.join(f'{k} {v}' for k, v in changed.items())}")
        settings, source = train_teacher.make_settings(dataset, args.root, args.synthetic,
                                                       **{**flags, **changed})
    for fold in folds:
        train_teacher.fold_of(source, {**settings, "fold": fold})  # or one line says why not
    return settings, source, folds


def ensure_teachers(settings, source, folds, args):
    """The teachers of a table's folds; each rank trains its share of those that are missing."""
    wanted = [{**settings, "fold": fold} for fold in folds]
    paths = [train_teacher.run_folder(one, args.out) / "teacher.pt" for one in wanted]
    missing = [one for one, path in zip(wanted, paths, strict=True) if not path.exists()]
    train_teacher.wait_for_all()  # until all have looked
    for one in train_teacher.deal_out(missing, "teachers", args):
        train_teacher.train_teacher(one, source, train_teacher.alone(args))
    train_teacher.wait_for_all()
    teachers = list(map(open_teacher, paths))
    for teacher, one in zip(teachers, wanted, strict=True):
        train_teacher.same_settings(teacher, one, teacher["path"])
    return teachers


def metric_of(cell, column):
    return {key: record[column.metric] for key, record in cell.items()}


def interval(ours, theirs):
    """Mean and 95 % t interval of ours - theirs, {(fold, seed): score} each, paired by fold and
    seed -> (mean, low, high), or None below two pairs. A bound (seed None) pairs with every seed.

    Seeds of one fold share its teacher and its test samples, so that a fold's differences are
    averaged first; with a single fold the seeds are what is left to vary. Folds share training
    data: their variance is corrected as by Nadeau and Bengio (2003), 1/J + n_test/n_train for 1/J,
    where a fifth of the data is for testing and the held-out groups count as training data.
    """
    by_fold = {}
    for (fold, seed), value in ours.items():
        other = theirs.get((fold, seed), theirs.get((fold, None)))
        if other is not None:
            by_fold.setdefault(fold, []).append(value - other)
    sample, shared = [statistics.mean(d) for d in by_fold.values()], 1 / 4
    if len(sample) == 1:
        (sample,), shared = by_fold.values(), 0
    if len(sample) < 2:
        return None
    mean = statistics.mean(sample)
    error = math.sqrt((1 / len(sample) + shared) * statistics.variance(sample))
    half = stats.t.ppf(0.975, len(sample) - 1) * error
    return mean, mean - half, mean + half


def rounded(value, column, sign=""):
    return f"{value:{sign}.{2 if column.metric == 'accuracy' else 3}f}"


def runs_of(cell):
    """What a +- is over: "5 folds x 3 seeds"."""
    folds, seeds = ({key[i] for key in cell} for i in (0, 1))
    text = f"{len(folds)} fold{'s' * (len(folds) > 1)}"
    return text if seeds == {None} else f"{text} x {len(seeds)} seed{'s' * (len(seeds) > 1)}"


def summary(cell, column):
    """Mean and standard deviation over folds and seeds."""
    runs = list(metric_of(cell, column).values())
    spread = statistics.stdev(runs) if len(runs) > 1 else 0.0
    return statistics.mean(runs) if runs else math.nan, spread


def format_cell(column, row, cell):
    if row.ours is None:
        return ""
    if undefined(row, column):
        return "n/a"
    if not cell:
        return "not run"
    mean, spread = (rounded(value, column) for value in summary(cell, column))
    return f"{mean} ({runs_of(cell)})" if len(cell) == 1 else f"{mean} ± {spread} ({runs_of(cell)})"


def format_gap(name, column, ours, theirs):
    """A paired difference, and whether it is noise."""
    gap = interval(metric_of(ours, column), metric_of(theirs, column))
    if gap is None:
        return f"- {name}: one pair, no interval"
    mean, low, high = (rounded(value, column, "+") for value in gap)
    over = "folds" if len({fold for fold, _ in ours}) > 1 else "the seeds of one split"
    noise = ", inside the noise" if gap[1] <= 0 <= gap[2] else ""
    return f"- {name}: {mean}, 95 % interval over {over} [{low}, {high}]{noise}"


def gaps(table, cells):
    """(name, column, cell, cell) of each paired difference: of a table's PKDOT and its other rows,
    or of a figure's cells and its reference. Folds that are divided otherwise have no pairs."""
    _, columns, rows, reference = table
    first = next((i for i, row in enumerate(rows) if row.ours == {}), None)
    for (j, column), (i, row) in product(enumerate(columns), enumerate(rows)):
        if reference:
            a, b = (i, j), reference(i, j)
            name = (f"{row.label}, {column.heading} minus {rows[b[0]].label}"
                    f"{', ' * bool(column.series)}{columns[b[1]].series}")
        elif first is not None and "folds" not in (row.ours or {}):
            a, b = (first, j), (i, j)
            name = f"{rows[first].label} minus {row.label}, {column.heading}"
        else:
            continue
        if a != b and cells[a] and cells[b]:
            yield name, column, cells[a], cells[b]


CAPTION = """
The visual-only network is stage 1's: a difference to it asks whether the whole pipeline pays.
"none" is the student's own network without a distillation term: a difference to it asks what the
term adds. ± is the standard deviation over the runs named; intervals over folds are corrected for
the training data that folds share (Nadeau and Bengio 2003)."""


def is_synthetic(cells):
    return any(record["synthetic"] for cell in cells.values() for record in cell.values())


def format_table(table, cells, args):
    """The table in Markdown: for each column the paper's number and ours, then the paired
    differences, and what they say."""
    title, columns, rows, _ = table
    records = [record for cell in cells.values() for record in cell.values()]
    lines = [f"**{'SYNTHETIC DATA - ' * is_synthetic(cells)}{title}**", ""]
    lines += [TABLE_I[dataset] for dataset in dict.fromkeys(column.dataset for column in columns)]
    if columns[0].dataset == "features":
        lines[-1] += f", fusion {', '.join(sorted({record['fusion'] for record in records}))}"
    default = vars(parse([]))
    always = set.intersection(*(set(changes(row, column)) for row, column in product(rows, columns)
                                if is_student(row)))  # a flag that each cell sets is no one's
    changed = [f"{key} {value}" for key, value in vars(args).items() if key not in always
               and key in (*CHOICES, "lambdas", "labelled") and value not in (None, default[key])]
    changed += ["folds over clips"] * (args.folds == "clips")
    lines += [f"with {', '.join(changed)}"] * bool(changed)

    published = any(row.paper for row in rows)
    heads = [head for column in columns
             for head in ([f"{column.heading}: paper", "here"] if published else [column.heading])]
    lines += ["", "| | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for i, row in enumerate(rows):
        texts = [format_cell(column, row, cells[i, j]) for j, column in enumerate(columns)]
        if published:
            paper = row.paper or ["-"] * len(columns)
            texts = [text for pair in zip(paper, texts, strict=True) for text in pair]
        lines.append(f"| {row.label} | " + " | ".join(texts) + " |")

    lines.append("")
    sizes = {(r["batch_size"], r["b"]) for r in records if r.get("b", 1e9) < r.get("batch_size", 0)}
    for size, b in sorted(sizes):
        lines.append(f"- fewer than {size} training samples: there batch size {size} is b = {b}")
    if len(args.lambdas) > 1:
        lines += [f"- lambda chosen on validation, {row.label}, {column.heading}: "
                  + ", ".join(f"{record['lambda']:g} (fold {fold}, seed {seed})"
                              for (fold, seed), record in cells[i, j].items())
                  for (i, row), (j, column) in product(enumerate(rows), enumerate(columns))
                  if is_student(row) and "lambdas" not in row.ours
                  and changes(row, column).get("method") != "none"]
    differences = [format_gap(*gap) for gap in gaps(table, cells)]
    lines += [*differences, CAPTION] if differences else []
    return "\n".join(lines)


def for_features(table, path):
    """A table's comparison on a features file: the same rows, the file's own metric, no number of
    the paper's."""
    source = data.Features(path)
    metrics = ["accuracy"] if source.task == "classification" else ["valence", "arousal"]
    classes = source.outputs if source.task == "classification" else "va"
    columns = [c._replace(heading=f"{c.series}{', ' * bool(c.series)}{Path(path).stem} {metric}",
                          dataset="features", classes=classes, metric=metric)
               for metric in metrics for c in table.columns if c[1:4] == table.columns[0][1:4]]
    rows = [row._replace(paper=()) for row in table.rows if row.ours is not None]
    title = table.title.partition(",")[0]  # without the data set
    return table._replace(title=title, columns=columns, rows=rows)


def of_dataset(table, dataset):
    """The columns of one data set."""
    keep = [j for j, column in enumerate(table.columns) if column.dataset == dataset]
    if not keep:
        raise UserError(f"--dataset {dataset}: {table.title} has no column of it")
    rows = [row._replace(paper=tuple(row.paper[j] for j in keep if row.paper))
            for row in table.rows]
    return table._replace(columns=[table.columns[j] for j in keep], rows=rows)


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
    if args.rank > 0:
        return table, cells
    print(format_table(table, cells, args))
    seconds = {id(record): record["seconds"] for cell in cells.values() for record in cell.values()
               if record["role"] == "student"}.values()  # two metrics of one run are one student
    print(f"\n{time.time() - begin:.0f} s on {args.device}, torch {torch.__version__}; "
          f"{len(seconds)} students took {sum(seconds):.0f} s, whenever trained")
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
    """Figures 6, 7 and labels, as a table, as csv, and as png if matplotlib is installed: the
    scores, and beside them the paired differences to a common reference with their band."""
    table, cells = print_table(name, args)
    if args.rank > 0:
        return
    title, columns, rows, reference = table
    synthetic = is_synthetic(cells)
    source = Path(args.root).stem if args.dataset == "features" else args.dataset
    parts = [f"figure{name}", *filter(None, [source]), *["synthetic"] * synthetic]
    path = args.out / "-".join(parts)

    points = {}  # mean, sd, runs, difference to the reference, its low and high end
    for (i, j), cell in cells.items():
        pair = (metric_of(cells[key], columns[j]) for key in ((i, j), reference(i, j)))
        points[i, j] = *summary(cell, columns[j]), len(cell), *(interval(*pair) or (math.nan,) * 3)
    with data.replacing(path.with_suffix(".csv")) as part, open(part, "w", newline="") as file:
        write = csv.writer(file).writerow
        write(["row", "column", "mean", "sd", "runs", "difference", "low", "high", "data"])
        for (i, j), values in points.items():
            write([rows[i].label, columns[j].heading, *values, "SYNTHETIC" * synthetic])
    print(path.with_suffix(".csv"))
    if (plot := pyplot()) is None:
        return

    units = ["accuracy (%)" if column.metric == "accuracy" else "CCC" for column in columns]
    panels = list(dict.fromkeys(units))  # valence and arousal share one
    figure, axes = plot.subplots(len(panels), 2, squeeze=False, layout="constrained",
                                 figsize=(10, 4 * len(panels)))
    x = [row.label.split()[-1] for row in rows]
    for j, (column, unit) in enumerate(zip(columns, units, strict=True)):
        raw, paired = axes[panels.index(unit)]
        series = [points[i, j] for i, _ in enumerate(rows)]
        mean, sd, _, difference, low, high = zip(*series, strict=True)
        raw.errorbar(x, mean, sd, marker="o", capsize=3, label=column.heading)
        raw.set_ylabel(f"{unit}, mean ± sd")
        paired.plot(x, difference, marker="o", label=column.heading)
        paired.fill_between(x, low, high, alpha=0.15)
        i, k = reference(0, j)
        compared = columns[k].series if i == 0 else f"{rows[i].label} {columns[k].series}".strip()
        paired.set_ylabel(f"difference to {compared}, 95 % band")
    for axis in axes.flat:
        axis.set_xlabel(rows[0].label.rpartition(" ")[0])
        axis.legend(fontsize="small")
    save_picture(figure, path.with_suffix(".png"), title, synthetic)


def save_picture(figure, path, title, synthetic):
    figure.suptitle("SYNTHETIC DATA - " * synthetic + title)
    with data.replacing(path) as part:
        figure.savefig(part, format="png", dpi=90)
    print(path)


def figure_5(args):
    """Similarity matrices (Eq. 4) of the teacher, and of the student before, halfway through and
    after training, over up to 128 training samples, sorted by class or by valence."""
    args, dataset = one_lambda(args), args.dataset or "biovid_b"
    classes = "va" if dataset == "affwild2" else None
    fold, = (args.fold or ["1"])[:1]  # it shows one teacher
    args = with_flags(args, fold=[fold.replace("all", "1")])
    teacher, = ensure_teachers(*teacher_settings(dataset, classes, args), args)
    if args.rank > 0:
        return
    args = train_teacher.alone(args)
    settings, features = teacher["settings"], open_features(teacher, args.device)
    epochs = identity(args, teacher)["epochs"]

    train = train_teacher.fold_of(features, settings, dense=True).train
    train = train.take(train.labelled)
    train = train.take(torch.linspace(0, len(train.index) - 1, min(len(train.index), 128)).long())
    rank = train.label if train.label.ndim == 1 else train.label[..., 0].nanmean(1)
    train = train.take(rank.argsort(stable=True))
    z_t = teacher_answers(teacher, features, train.index).z
    S = {"teacher": cosine_similarity_matrix(z_t).cpu()}

    def watch(epoch, predict):
        if epoch in (0, epochs // 2, epochs):
            S[f"student, epoch {epoch}"] = cosine_similarity_matrix(predict(train, "z"))

    distil(teacher, args, keep_student=False, watch=watch)
    for name, matrix in S.items():
        print(f"{name}: mean similarity {matrix.mean():.3f}, "
              f"mean |S - S_teacher| {(matrix - S['teacher']).abs().mean():.3f}")
    out = args.out / f"figure5-{dataset}{'-synthetic' * settings['synthetic']}.npz"
    with data.replacing(out) as part, open(part, "wb") as file:
        np.savez(file, **{name: matrix.numpy() for name, matrix in S.items()})
    print(out)
    if (plot := pyplot()) is None:
        return

    figure, axes = plot.subplots(1, len(S), figsize=(3.2 * len(S), 3.6), layout="constrained")
    for axis, (name, matrix) in zip(axes, S.items(), strict=True):
        image = axis.imshow(matrix.numpy(), vmin=-1, vmax=1, cmap="RdBu_r")
        axis.set(title=name, xlabel="training samples", ylabel="sorted by valence")
        if train.label.ndim == 1:  # where each class lies
            level, count = train.label.unique_consecutive(return_counts=True)
            end = count.cumsum(0) - 0.5
            names = [class_names(settings)[i] for i in level]
            axis.set_xticks(end - count / 2, names)
            axis.set_yticks(end - count / 2, names, rotation=90, va="center")
            axis.set_ylabel("")
            for edge in end[:-1]:
                axis.axvline(edge, color="black", lw=0.8)
                axis.axhline(edge, color="black", lw=0.8)
    figure.colorbar(image, ax=axes, label="cosine similarity (Eq. 4)", shrink=0.8)
    title = f"Figure 5: similarity matrices, {dataset} fold {settings['fold']}"
    save_picture(figure, out.with_suffix(".png"), title, settings["synthetic"])


def parse(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--teacher", type=Path, metavar="FILE", help="default: the newest teacher.pt under --out")
    add("--fold", nargs="+", choices=["1", "2", "3", "4", "5", "all"],
        help="the teacher's siblings of these folds; of a table, its folds (default all)")
    add("--method", choices=METHODS, default="pkdot", help="default pkdot")
    at_least = train_teacher.at_least
    add("--lambda", dest="lambdas", type=at_least(0, float), nargs="+", default=[0.4],
        help="weight of W in Eq. 9; default 0.4; a table chooses among several on validation")
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
    add("--chunk", type=at_least(1), metavar="C",
        help="--finetune: clips that pass the backbone at a time; less memory, the same gradient")
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
    add("--seeds", type=at_least(1), default=1, help="tables and figures: students a fold")
    add("--labelled", type=at_least(1), metavar="N", help="tables and figures: of the teachers")
    add("--folds", choices=("subjects", "clips"), help="tables and figures: of the teachers")
    add("--fresh", action="store_true", help="tables and figures: train the students again")
    parser.set_defaults(transport=True, hallucinate="tnet")  # --table choices changes them
    return parser.parse_args(argv)


def main():
    args, code = parse(), 0
    train_teacher.join_ranks(args)
    if args.k > args.batch_size:
        raise UserError(f"--k {args.k}: the similarity matrix has only --batch-size "
                        f"{args.batch_size} rows; lower --k or raise --batch-size")
    if args.chunk and not args.finetune:
        raise UserError("--chunk is for --finetune; without it no clip passes the backbone")
    if args.evaluate:
        evaluate(args.evaluate, train_teacher.one_voice(args))
    elif args.predict:
        if not args.student:
            raise UserError("--predict needs --student STUDENT.pt")
        code = predict(args.predict, args.student, train_teacher.one_voice(args))
    elif args.table or args.figure:
        tabulate(args)
    else:
        distil_folds(args)
    train_teacher.leave_ranks()
    sys.exit(code)


def tabulate(args):
    if args.method != "pkdot" or args.teacher:
        raise UserError("--table and --figure choose methods and teachers: "
                        "leave --method and --teacher out")
    if args.dataset == "features" and not args.root:
        raise UserError("--dataset features needs --root FILE.npz")
    args.folds, args.resume = args.folds or "subjects", True  # what is trained already stays
    if args.figure == "5":
        return figure_5(args)
    args.fold = args.fold or ["all"]
    if args.figure:
        draw_figure(args.figure, args)
    else:
        print_table(args.table, args)


def distil_folds(args):
    """The students that a command without --table asks for; of several folds each rank has some."""
    if args.labelled or args.folds:
        raise UserError("--labelled and --folds are a teacher's: give them to train_teacher.py, "
                        "and the student follows its teacher")
    if args.seeds > 1 or args.fresh or args.student:
        raise UserError("--seeds and --fresh are for --table and --figure, --student is for "
                        "--predict; leave them out")
    args = one_lambda(args)
    paths = siblings(args.teacher or newest_teacher(args), args.fold)
    together = len(paths) == 1 and args.finetune
    args = train_teacher.one_voice(args) if together else args
    for path in paths if together else train_teacher.deal_out(paths, "students", args):
        teacher = open_teacher(path)
        settings, found = teacher["settings"], teacher["scores"]
        if args.root and not args.finetune and str(Path(args.root)) != settings["root"]:
            raise UserError(f"{path}: is a teacher of {settings['root']}, not of {args.root}; "
                            "train one on it, or leave --root out")
        if args.rank == 0 or not together:
            train_teacher.start_log(path.parent, settings)
        print(f"{path}, test: visual only {show(found['visual'])}, "
              f"teacher {show(found['multimodal'])}")
        record = distil(teacher, args if together else train_teacher.alone(args))
        print(f"{train_teacher.heading(settings)}, n = {record['n_test']}: "
              f"visual only (lower bound) {show(found['visual'])} | "
              f"student, {args.method} {show(record)} | "
              f"multimodal (upper bound) {show(found['multimodal'])}")


def one_lambda(args):
    """The flags of a student that has a single lambda."""
    if len(args.lambdas) > 1:
        raise UserError("several values of --lambda are for --table, and --figure but 5; "
                        "give one")
    return with_flags(args, lam=args.lambdas[0])


def siblings(path, folds):
    """The teachers beside the one at path that --fold names."""
    if not folds:
        return [path]
    if "all" in folds:
        return sorted(path.parent.parent.glob("fold*/teacher.pt"))
    return [path.parent.parent / f"fold{fold}" / "teacher.pt" for fold in folds]


if __name__ == "__main__":
    data.run(main)
