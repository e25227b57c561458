"""Stage 3: distil the multimodal teacher into a student that has the face alone; then evaluate, predict, tabulate.

    python train_student.py --lambda 0.4 --k 30                     # the newest teacher under runs/
    python train_student.py --method cosine --fold all
    python train_student.py --evaluate runs/biovid_b-synthetic/c2/fold1/student-pkdot.pt
    python train_student.py --predict faces --student runs/biovid_b-synthetic/c2/fold1/student-pkdot.pt
    python train_student.py --table 5 --synthetic --seeds 3         # trains what results.jsonl lacks, then prints
    python train_student.py --figure 7 --synthetic

The student is the visual backbone of stage 1 (frozen, unless --finetune), the frozen T-Net of stage 2 and a fresh
fusion head of the teacher's architecture, trained with L = L_gt + lambda W (Eq. 9).
"""
import ast
import csv
import functools
import hashlib
import json
import math
import statistics
import sys
import tempfile
import time
from itertools import chain, product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy import stats
from torchvision.utils import save_image
from tqdm import tqdm

import data
import models
import train_teacher
from data import Parser, Samples, UserError
from pkdot import ANCHORS, cosine_loss, cosine_similarity_matrix, kl_loss, mse_loss, pkdot_loss, rkd_loss, task_loss
from train_teacher import (TEACHER_DEFAULTS, Unimodal, add_common_flags, append_line, at_least, bar, choose_device,
                           clip_loader, criterion, fingerprint, finite, gather, heading, keep_progress, load,
                           log_videos, part_windows, restore_progress, result_line, run_features, run_folder,
                           same_settings, save, score, seed_all, show, snapshot, start_log)
from train_teacher import make_settings as teacher_settings
from train_teacher import parse as parse_teacher

METHODS = ("pkdot", "cosine", "mse", "kl", "rkd", "none")
# Section IV-B unless marked; epsilon in units of the cost 1/2 |x - y|^2. 20 epochs are the release's.
DEFAULTS = {"method": "pkdot", "lambda": 0.4, "k": 30, "epsilon": 0.1, "debias": True, "anchors": "dissimilar",
           "batch_size": 128, "lr": 1e-4, "epochs": 20, "finetune": False, "select": "val", "seed": 0, "amp": False}
STAND_IN_EPOCHS = 50  # its epochs are of a few steps


def distil(teacher_path, choice, args, keep_student=True, watch=None):
    """Stage 3 of one fold; choice is DEFAULTS with what the user changed. Returns the results line that it appends.

    watch(epoch, student), if given, is called before the first epoch and after each.
    """
    begin = time.time()
    state, run, device = load(teacher_path, "teacher"), Path(teacher_path).parent, args.device
    settings = {**state["settings"], "student": identity(choice, state), "seed": choice["seed"]}
    finished, progress = (run / f"student-{choice['method']}.{end}" for end in ("pt", "progress"))
    if args.resume and keep_student and finished.exists():
        done = load(finished, "student")
        if done["settings"] == settings:
            print(f"{finished} is finished")
            return done["record"]
    if choice["method"] == "kl" and settings["task"] == "regression":
        raise UserError("--method kl compares class probabilities, and valence/arousal has none; choose another method")
    features = open_run(run, state)
    part = data.parts(features, settings["fold"])
    train = part_windows(features, part, "train", dense=True)
    test = part_windows(features, part, "test")
    # --select val: held-out training subjects choose the epoch; test: the test fold does (the release); last: nothing
    chosen_on = test if choice["select"] == "test" else part_windows(features, part, "val")
    samples = len(train[0])
    b, k = min(choice["batch_size"], samples), min(choice["k"], samples)
    if b < choice["batch_size"] and keep_student:
        print(f"warning: only {samples} training samples; batches are of {b} and k is {k}", file=sys.stderr)

    targets = data.sample_labels(features.label, *train).to(device), *teacher_answers(state, features, train[0], device)
    seed_all(choice["seed"], 3)
    student, trained = make_student(state, run, choice, device)
    optimizer = torch.optim.Adam(trained.parameters(), lr=choice["lr"], fused=True)
    frozen = fingerprint(student.tnet.state_dict())
    if choice["finetune"]:
        source, forward = open_faces(settings, args.root), student
        if not np.array_equal(source.name, features.name):
            raise UserError(f"{source.path}: its clips are no longer those of {run / 'features.npz'}; "
                            "train the teacher again, or give the --root it was trained on")
    else:
        source, forward = features.rows["visual"].to(device), student.fuse  # (R, 512)

    def outputs(windows):
        batches = student_inputs(source, windows, torch.arange(len(windows[0])), b, args)
        return gather(lambda x: forward(x)[0], batches)

    first, best, saved = 0, None, time.time()
    if args.resume and keep_student and progress.exists():
        first, best = restore_progress(progress, settings, trained, optimizer)
    if watch:
        watch(0, student)
    for epoch in bar(range(first, choice["epochs"]), f"{choice['method']} fold {settings['fold']}"):
        seed_all(choice["seed"], 3, epoch + 1)
        order = torch.randperm(samples)[:samples - samples % b]  # S wants b rows
        batches = zip(order.to(device).split(b), student_inputs(source, train, order, b, args), strict=True)
        trained.train()
        try:
            loss_gt, w = train_epoch(forward, batches, targets, optimizer, choice, k)
        except ValueError as error:  # pkdot_loss met NaN
            raise UserError(f"epoch {epoch + 1}: {error}; lower --lr or raise --epsilon") from error
        finite(loss_gt + w, epoch, "lower --lr or raise --epsilon")
        trained.eval()
        scores = score(outputs(chosen_on), features, *chosen_on)
        if best is None or choice["select"] == "last" or criterion(scores) > best["score"]:
            best = dict(score=criterion(scores), epoch=epoch, model=snapshot(trained))
        if keep_student:
            log_epoch(run, choice, epoch, loss_gt, w, scores)
        if keep_student and time.time() - saved > train_teacher.SAVE_EVERY:
            keep_progress(progress, settings, epoch, trained, optimizer, best)
            saved = time.time()
        if watch:
            watch(epoch + 1, student)

    if fingerprint(student.tnet.state_dict()) != frozen:
        raise RuntimeError("the frozen T-Net has changed during distillation")
    trained.load_state_dict(best["model"])
    output = outputs(test)
    scores = score(output, features, *test)
    record = result_line(settings, "student", scores, time.time() - begin, epoch=best["epoch"] + 1, b=b, k_used=k,
                         **identity(choice, state))
    if keep_student:
        log_videos(run, f"student {choice['method']}", output, features, *test)
        save(finished, dict(kind="student", settings=settings, scores=scores, record=record, model=snapshot(student),
                            test_groups=np.unique(features.group[part == "test"]).astype(str).tolist()))
        progress.unlink(missing_ok=True)
    append_line(args.out / "results.jsonl", record)
    return record


def train_epoch(forward, batches, targets, optimizer, choice, k):
    """One epoch over batches of (which windows, what the student sees of them); the mean L_gt and W."""
    terms = []
    for batch, x in batches:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=choice["amp"]):
            output_s, z_s = forward(x)
        loss_gt, W = loss_terms(choice, output_s.float(), z_s.float(), *(t[batch] for t in targets), k)
        loss = loss_gt + choice["lambda"] * W  # Eq. 9
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        terms.append(torch.stack([loss_gt, W]).detach())
    return torch.stack(terms).mean(0).tolist()


def loss_terms(choice, output_s, z_s, label, output_t, z_t, k):
    """L_gt (Eq. 7 or 8), and what lambda weighs in Eq. 9: PKDOT's W, or a baseline of Table II in its place."""
    loss_gt = task_loss(output_s, label)
    if choice["method"] == "none" or choice["lambda"] == 0:
        return loss_gt, torch.zeros_like(loss_gt)
    if choice["method"] == "pkdot":
        return loss_gt, pkdot_loss(z_s, z_t, k, choice["epsilon"], choice["debias"], choice["anchors"])  # Eq. 1-6
    if choice["method"] == "cosine":
        return loss_gt, cosine_loss(z_s, z_t)
    if choice["method"] == "mse":
        return loss_gt, mse_loss(z_s, z_t)
    if choice["method"] == "kl":
        return loss_gt, kl_loss(output_s, output_t)
    return loss_gt, rkd_loss(z_s, z_t)


def student_inputs(source, windows, order, size, args):
    """Batches of what the student sees of the windows in order: clips (b, L, 3, F, H, W) of a data set, or rows
    (b, L, 512) of a tensor of features, which lies on the device."""
    if torch.is_tensor(source):
        rows = windows[0].to(source.device)
        return (source[rows[batch]] for batch in order.to(source.device).split(size))
    return (batch[0].to(args.device, non_blocking=True)
            for batch in clip_loader(Samples(source, "visual", *windows), size, args, order))


@torch.no_grad()
def teacher_answers(state, features, index, device):
    """Output (S, ...) and z (S, m) of the frozen teacher for all windows: on frozen features it answers only once."""
    teacher = models.fusion_head(state["settings"]).to(device).eval()
    teacher.load_state_dict(state["head"])
    visual, privileged = (features.rows[m].to(device) for m in ("visual", "privileged"))
    answers = [teacher(visual[rows], privileged[rows]) for rows in index.to(device).split(256)]
    return [torch.cat(answer) for answer in zip(*answers, strict=True)]


def make_student(state, run, choice, device):
    """The student, and the part of it that stage 3 trains; all else is frozen."""
    student = models.student(state["settings"])
    student.tnet.load_state_dict(state["tnet"])
    stage1 = Unimodal(student.backbone, state["settings"])
    stage1.load_state_dict(load(run / "visual.pt", "visual")["model"])
    if not state["backbones"].startswith(fingerprint(student.backbone.state_dict())):
        raise UserError(f"{run}: visual.pt was trained again after teacher.pt; "
                        "finish the teacher: train_teacher.py --resume with the same flags")
    student.to(device).requires_grad_(False)
    trained = torch.nn.ModuleDict({"head": student.head})
    if choice["finetune"]:
        trained["backbone"] = student.backbone
    return student, trained.requires_grad_(True)


def log_epoch(run, choice, epoch, loss_gt, w, scores):
    """Task and OT terms apart: every epoch to log.jsonl, ten of them to the screen."""
    append_line(run / "log.jsonl", dict(stage="student", method=choice["method"], seed=choice["seed"], epoch=epoch + 1,
                                        loss_gt=loss_gt, w=w, lambda_w=choice["lambda"] * w, **scores))
    if epoch % max(choice["epochs"] // 10, 1) == 0 or epoch + 1 == choice["epochs"]:
        tqdm.write(f"epoch {epoch + 1:3d}  L_gt {loss_gt:.4f}  lambda W {choice['lambda'] * w:.4f}  "
                   f"{'test' if choice['select'] == 'test' else 'val'} {show(scores)}")


def open_faces(settings, root=None):
    """The data set a run was trained on, without its privileged files."""
    return data.open_dataset(settings["dataset"], root or settings["root"], settings["outputs"], settings["length"],
                             settings["image_size"], privileged=False)


def open_run(run, state):
    """The run's features, if they are those that the teacher was trained on."""
    features = run_features(run, state["settings"])
    if features.backbones != state["backbones"]:
        raise UserError(f"{run}: features.npz is of other backbones than teacher.pt; "
                        "finish the teacher: train_teacher.py --resume with the same flags")
    return features


def identity(choice, state):
    """What a line of results.jsonl must agree in to stand for a run: every choice, the teacher's weights, the code."""
    teacher = "-".join((fingerprint(state["head"]), fingerprint(state["tnet"]), state["backbones"]))
    return {**choice, "teacher": teacher, "code": code_digest()}


STAGE_3 = {  # what a student's score depends on; None: all of the file
    "sinkhorn.py": None, "pkdot.py": None, "models.py": None, "data.py": ("windows", "parts", "sample_labels"),
    "train_teacher.py": ("seed_all", "part_windows", "score", "frame_predictions", "criterion", "gather", "snapshot"),
    "train_student.py": ("distil", "train_epoch", "loss_terms", "student_inputs", "teacher_answers", "make_student")}


@functools.cache  # the code that runs is the code that was imported, whatever is edited meanwhile
def code_digest():
    """Changes when stage 3's code does, not with its comments, docstrings or layout."""
    digest = hashlib.sha256()
    for name, functions in STAGE_3.items():
        tree = ast.parse((Path(__file__).parent / name).read_text())
        if functions:
            tree.body = [node for node in tree.body if getattr(node, "name", None) in functions]
        for node in ast.walk(tree):
            if isinstance(getattr(node, "body", None), list):
                node.body = [n for n in node.body
                             if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))]
        digest.update(ast.dump(tree).encode())
    return digest.hexdigest()[:12]


def default_epochs(settings):
    return STAND_IN_EPOCHS if settings["synthetic"] else DEFAULTS["epochs"]


def newest_teacher(args):
    """The newest teacher.pt under --out, of --dataset and --synthetic if they are given."""
    name = args.dataset + ("-synthetic" if args.synthetic else "") if args.dataset else "*"
    name = "*-synthetic" if args.synthetic and not args.dataset else name
    found = sorted(args.out.glob(f"{name}/*/fold*/teacher.pt"), key=lambda p: p.stat().st_mtime)
    if not found:
        raise UserError(f"{args.out}: no {name.replace('*', '<dataset>')}/<classes>/fold<n>/teacher.pt in it; "
                        "run train_teacher.py first")
    return found[-1]


def load_student(path, device):
    state = load(path, "student")
    student = models.student(state["settings"])
    student.load_state_dict(state["model"])
    return student.to(device).eval(), state


def evaluate(path, args):
    """Test score of a saved student, from the faces alone: no privileged file is opened."""
    student, state = load_student(path, args.device)
    settings, groups = state["settings"], state["test_groups"]  # whoever was not in its training, whatever is at root
    source = open_faces(settings, args.root)
    missing = sorted(set(groups) - set(source.group.astype(str)))
    if missing:
        raise UserError(f"{source.path}: lacks {len(missing)} of the student's {len(groups)} test subjects or videos, "
                        f"first {missing[0]}; give the --root it was trained on")
    test = part_windows(source, np.where(np.isin(source.group.astype(str), groups), "test", "train"), "test")
    loader = clip_loader(Samples(source, "visual", *test), 32, args)
    scores = score(gather(lambda batch: student(batch[0].to(args.device))[0], bar(loader, "evaluate")), source, *test)
    print(f"{heading(settings, settings['fold'])}, n = {scores['n']}: student {settings['student']['method']} "
          f"{show(scores)}")


def predict(folder, path, args):
    """One csv line per sample (class probabilities) or clip (valence, arousal) of unlabelled faces, on stdout."""
    student, state = load_student(path, args.device)
    settings = state["settings"]
    if settings["dataset"] == "features":
        source = data.Features(folder, privileged=False, labelled=False)
        found, wanted = (source.length, source.rows["visual"].shape[1]), (settings["length"], settings["visual_dim"])
        if found != wanted:
            raise UserError(f"{folder}: visual is (N, {found[0]}, {found[1]}), the student was trained on "
                            f"(N, {wanted[0]}, {wanted[1]})")
    else:
        source = data.Faces(folder, settings)
    index, keep = data.windows(source.video, source.length)
    loader = clip_loader(Samples(source, "visual", index, None), 32, args)
    output = gather(lambda batch: student(batch.to(args.device))[0], bar(loader, "predict"))
    write = csv.writer(sys.stdout, lineterminator="\n").writerow
    if settings["task"] == "regression":
        write(["clip", "valence", "arousal"])
        for row, (valence, arousal) in sorted(zip(index[keep].tolist(), output[keep].tolist(), strict=True)):
            write([source.name[row], f"{valence:.4f}", f"{arousal:.4f}"])
    else:
        biovid = settings["dataset"].startswith("biovid")
        names = data.BioVid.levels(settings["outputs"]) if biovid else range(settings["outputs"])
        write(["sample", *(f"p({name})" for name in names)])
        for row, p in zip(index[:, 0].tolist(), output.softmax(1).tolist(), strict=True):
            write([source.video[row] if biovid else source.name[row], *(f"{value:.4f}" for value in p)])


# --------------------------------------------------------------------------------------------------- tables, figures

class Column(NamedTuple):
    heading: str
    dataset: str
    classes: int | str  # "va" for valence/arousal
    metric: str
    change: dict = {}  # of the student's defaults, for all cells below


class Row(NamedTuple):
    label: str
    ours: dict | str | None  # a student, by what it changes; a bound, "visual" or "multimodal"; None: others' work
    paper: tuple = ()  # the numbers as the paper prints them, one a column


class Table(NamedTuple):
    title: str
    columns: list
    rows: list


TABLE_I = {
    "biovid_a": "BioVid (A): visual (weak, prevalent) + EDA (strong, privileged), feature concatenation, SEW",
    "biovid_b": "BioVid (B): visual (strong, prevalent) + EMG (weak, privileged), multimodal transformer, WES",
    "affwild2": "Affwild2: visual (strong, prevalent) + audio (weak, privileged), joint cross attention, WES",
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
    "choices": Table("Choices that the paper leaves open (not in the paper)", [BIOVID_B, VALENCE, AROUSAL], [
        Row("PKDOT", {}),
        Row("anchors: most similar", {"anchors": "similar"}),
        Row("anchors: random", {"anchors": "random"}),
        Row("not debiased (Eq. 5)", {"debias": False}),
        *(Row(f"lambda {x:g}", {"lambda": x}) for x in (0.0, 0.1, 1.0, 4.0, 10.0)),
        Row("the release's, epoch chosen on test", {"epsilon": 0.01, "lambda": 0.6, "select": "test"})])}
FIGURES = {
    "6": Table("Figure 6: batch size and number of anchors", [
        Column(f"k = {k}, BioVid (B) accuracy", "biovid_b", 2, "accuracy", {"k": k}) for k in (5, 15, 30)], [
        Row(f"batch size {b}", {"batch_size": b}) for b in (32, 64, 128, 256)]),
    "7": Table("Figure 7: epsilon", [BIOVID_B, VALENCE, AROUSAL], [
        Row(f"epsilon {e:g}", {"epsilon": e}) for e in (0.001, 0.01, 0.1, 1.0, 10.0)])}


def read_results(path):
    """The lines of results.jsonl. One that is not JSON, of a writer that was killed, is left out with a warning."""
    records = []
    for count, line in enumerate(path.read_text(errors="replace").splitlines() if path.exists() else [], 1):
        try:
            records.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            print(f"warning: {path}, line {count} is not whole and is left out", file=sys.stderr)
    return records


def values(records, column, row, base):
    """{(fold, seed): metric} of one cell; of equal runs the last. A bound has one run a fold, which all seeds share."""
    if row.ours is None:
        return {}
    want = {"role": row.ours}
    if isinstance(row.ours, dict):
        want = {"role": "student", **base, **row.ours, **column.change}
    want = {key: value for key, value in want.items() if key != "seed" and value is not None}
    want.update(dataset=column.dataset, classes=column.classes)
    return {(record["fold"], record["seed"]): record[column.metric] for record in records
            if column.metric in record and all(record.get(key) == value for key, value in want.items())}


def interval(ours, theirs):
    """Mean and 95 % t interval of ours - theirs, paired by fold and seed -> (mean, low, high), or None below two pairs.

    Seeds of one fold share its teacher and its test samples, so a fold's differences are averaged first; with a single
    fold the seeds are what is left to vary. theirs may have one run a fold (a bound): it pairs with every seed.
    """
    by_fold = {fold: value for (fold, _), value in theirs.items()} if len({s for _, s in theirs}) == 1 else {}
    pairs = {key: value - theirs.get(key, by_fold.get(key[0])) for key, value in ours.items()
             if key in theirs or key[0] in by_fold}
    folds = {fold: [d for (f, _), d in pairs.items() if f == fold] for fold, _ in pairs}
    sample = [statistics.mean(d) for d in folds.values()] if len(folds) > 1 else list(pairs.values())
    if len(sample) < 2:
        return None
    mean, half = statistics.mean(sample), stats.t.ppf(0.975, len(sample) - 1) * stats.sem(sample)
    return mean, mean - half, mean + half


def undefined(column, row):
    return column.metric != "accuracy" and isinstance(row.ours, dict) and row.ours.get("method") == "kl"


def number(value, column, sign=""):
    return f"{value:{sign}.{2 if column.metric == 'accuracy' else 3}f}"


def summary(found):
    """Mean and standard deviation over folds and seeds, and the number of runs."""
    runs = list(found.values())
    return statistics.mean(runs) if runs else math.nan, statistics.stdev(runs) if len(runs) > 1 else 0.0, len(runs)


def format_cell(column, row, found):
    if row.ours is None:
        return ""
    if undefined(column, row):
        return "n/a"
    if not found:
        return "not run"
    mean, spread, runs = summary(found)
    if runs == 1:
        return f"{number(mean, column)} (1 run)"
    return f"{number(mean, column)} ± {number(spread, column)} ({runs} runs)"


def format_gap(column, reference, row, ours, theirs):
    """The paired difference of the reference (PKDOT as in the paper) and another row, and whether it is noise."""
    text = f"{reference.label} minus {row.label}, {column.heading}: "
    gap = interval(ours, theirs)
    if gap is None:
        return text + "one pair, no interval"
    mean, low, high = (number(value, column, "+") for value in gap)
    over = "folds" if len({fold for fold, _ in ours}) > 1 else "the seeds of one split"
    noise = ", inside the noise" if gap[1] <= 0 <= gap[2] else ""
    return text + f"{mean}, 95 % interval over {over} [{low}, {high}]{noise}"


def format_table(table, records, base, synthetic):
    """The table as printed: for each column the paper's number and ours, then the paired differences."""
    title, columns, rows = table
    lines = [("SYNTHETIC DATA - " if synthetic else "") + title]
    lines += [TABLE_I[dataset] for dataset in dict.fromkeys(column.dataset for column in columns)]
    if columns[0].dataset == "features":
        lines[-1] += f", fusion {', '.join(sorted({record['fusion'] for record in records}))}"
    changed = [f"{key} {value}" for key, value in base.items() if value not in (None, DEFAULTS[key]) and key != "seed"]
    if changed:
        lines.append(f"with {', '.join(changed)}")
    published = any(row.paper for row in rows)
    grid = [["", *(f"{column.heading}: paper | ours" if published else column.heading for column in columns)]]
    found = [[values(records, column, row, base) for column in columns] for row in rows]
    for row, cells in zip(rows, found, strict=True):
        ours = [format_cell(column, row, cell) for column, cell in zip(columns, cells, strict=True)]
        paper = row.paper or ["-"] * len(columns)
        grid.append([row.label, *(f"{p:>5} | {o}" if published else o for p, o in zip(paper, ours, strict=True))])
    widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
    lines += ["  ".join(c.ljust(width) for c, width in zip(cells, widths, strict=True)).rstrip() for cells in grid]
    for size, b in sorted({(r["batch_size"], r["b"]) for r in records if r.get("b", 1e9) < r.get("batch_size", 0)}):
        lines.append(f"where fewer than {size} training samples are there, batch size {size} is b = {b}")
    if {} in [row.ours for row in rows]:
        first = [row.ours for row in rows].index({})
        lines += [format_gap(column, rows[first], row, found[first][j], cells[j])
                  for j, column in enumerate(columns) for row, cells in zip(rows, found, strict=True)
                  if row is not rows[first] and cells[j] and found[first][j]]
    return "\n".join(lines)


def run_missing(table, base, args):
    """Train what the table lacks, teachers included; the results that may stand in it, and why others are missing."""
    usable, problems = [], []
    records = [] if args.fresh else read_results(args.out / "results.jsonl")
    for dataset, classes in dict.fromkeys((column.dataset, column.classes) for column in table.columns):
        try:
            teachers = ensure_teachers(dataset, classes, args)
        except UserError as error:
            problems.append(f"{dataset} not run: {error}")
            continue
        epochs = base["epochs"] or default_epochs(teachers[0][1]["settings"])
        choices = [{**base, **row.ours, **column.change, "epochs": epochs} for row in table.rows
                   for column in table.columns
                   if column.dataset == dataset and isinstance(row.ours, dict) and not undefined(column, row)]
        choices = [json.loads(choice) for choice in dict.fromkeys(map(json.dumps, choices))]  # two metrics, one run
        for path, state in teachers:
            settings = state["settings"]
            usable += [result_line(settings, role, scores, 0) for role, scores in state["scores"].items()]
            for choice, seed in product(choices, range(args.seed, args.seed + args.seeds)):
                choice = {**choice, "seed": seed}
                want = {**{k: settings[k] for k in ("dataset", "synthetic", "fold")}, "role": "student",
                        **identity(choice, state)}
                done = [r for r in records if all(r.get(k) == v for k, v in want.items())]
                usable.append(done[-1] if done else distil(path, choice, args, keep_student=False))
    return usable, problems


def ensure_teachers(dataset, classes, args):
    """(path, state) of each fold's teacher for a table. What is missing is trained like those that are there, or with
    train_teacher.py's defaults."""
    flags = ["--dataset", dataset, "--fold", "all", "--out", str(args.out), "--workers", str(args.workers), "--resume"]
    flags += ["--synthetic"] * args.synthetic + ["--amp"] * args.amp
    flags += ["--root", args.root] if args.root else []
    flags += ["--classes", str(classes)] if dataset.startswith("biovid") else []
    teacher_args = parse_teacher(flags)
    teacher_args.device = args.device
    defaults, folds = teacher_settings(teacher_args)
    paths = [run_folder({**defaults, "fold": fold}, args.out) / "teacher.pt" for fold in folds]
    there = [load(path, "teacher")["settings"] for path in paths if path.exists()]
    settings = {**defaults, **(there[0] if there else {}), "root": defaults["root"]}
    teacher_args.amp = settings["amp"]
    changed = [f"{key} {value}" for key, value in settings.items() if value != defaults.get(key) and key != "fold"]
    if changed:
        print(f"{dataset}: teachers with {', '.join(changed)}")
    found = []
    for fold, path in zip(folds, paths, strict=True):
        fold_settings = {**settings, "fold": fold}
        if not path.exists():
            train_teacher.train_teacher(fold_settings, teacher_args)
        state = load(path, "teacher")
        same_settings(state, fold_settings, path)
        found.append((path, state))
    return found


def for_features(table, path):
    """A table's comparison on a features file: the same rows, the file's own metric, no number of the paper's."""
    source = data.Features(path)
    metrics = ["accuracy"] if source.task == "classification" else ["valence", "arousal"]
    classes = source.outputs if source.task == "classification" else "va"
    changes = [c.change for c in table.columns if c.dataset == table.columns[0].dataset and c.metric == "accuracy"]
    changes = [change for n, change in enumerate(changes) if change not in changes[:n]]
    columns = [Column(", ".join([*(f"{k} = {v}" for k, v in change.items()), f"{Path(path).stem} {metric}"]),
                      "features", classes, metric, change) for metric in metrics for change in changes or [{}]]
    title = table.title.partition(",")[0]  # without the data set
    return Table(title, columns, [Row(row.label, row.ours) for row in table.rows if row.ours is not None])


def print_table(name, base, args):
    table = {**TABLES, **FIGURES}[name]
    if args.dataset == "features":
        table = for_features(table, args.root)
    elif args.dataset:
        keep = [j for j, column in enumerate(table.columns) if column.dataset == args.dataset]
        rows = [Row(row.label, row.ours, tuple(row.paper[j] for j in keep if row.paper)) for row in table.rows]
        table = Table(table.title, [table.columns[j] for j in keep], rows)
    if not table.columns:
        raise UserError(f"--dataset {args.dataset}: {table.title} has no column of it")
    if args.root and len({column.dataset for column in table.columns}) > 1:
        raise UserError(f"--root {args.root}: {table.title} is of several data sets; say which one with --dataset")
    begin = time.time()
    records, problems = run_missing(table, base, args)
    print(format_table(table, records, base, any(r["synthetic"] for r in records)))
    students = [r["seconds"] for r in records if r["role"] == "student"]
    print(f"{time.time() - begin:.0f} s on {args.device}, torch {torch.__version__}; "
          f"{len(students)} students took {sum(students):.0f} s, whenever trained")
    if not records:
        raise UserError("; ".join(problems))
    print("\n".join(problems), file=sys.stderr, end="\n" if problems else "")
    return table, records


def draw_figure(name, base, args):
    """Figures 6 and 7: the grid on the screen and as csv, and as png if matplotlib is installed."""
    (title, columns, rows), records = print_table(name, base, args)
    synthetic = any(r["synthetic"] for r in records)
    cells = [[summary(values(records, column, row, base)) for column in columns] for row in rows]
    source = Path(args.root).stem if args.dataset == "features" else args.dataset
    path = args.out / "-".join([f"figure{name}", *([source] if source else []), *["synthetic"] * synthetic])
    with open(path.with_suffix(".csv"), "w", newline="") as file:
        write = csv.writer(file).writerow
        write(["SYNTHETIC" if synthetic else "", *chain(*((column.heading, "sd", "runs") for column in columns))])
        for row, found in zip(rows, cells, strict=True):
            write([row.label, *chain(*found)])
    print(path.with_suffix(".csv"))
    try:
        from matplotlib import pyplot
    except ImportError:
        print("matplotlib is not installed: no png")
        return
    units = ["accuracy (%)" if column.metric == "accuracy" else "CCC" for column in columns]
    panels = list(dict.fromkeys(units))  # valence and arousal share one
    figure, axes = pyplot.subplots(1, len(panels), squeeze=False, figsize=(5 * len(panels), 4), layout="constrained")
    for column, unit, series in zip(columns, units, zip(*cells, strict=True), strict=True):
        axis = axes[0, panels.index(unit)]
        mean, spread, _ = zip(*series, strict=True)
        axis.errorbar([row.label.split()[-1] for row in rows], mean, spread, marker="o", label=column.heading)
        axis.set_xlabel(rows[0].label.rpartition(" ")[0])
        axis.set_ylabel(unit)
        axis.legend()
    figure.suptitle(("SYNTHETIC DATA - " if synthetic else "") + title)
    figure.savefig(path.with_suffix(".png"))
    print(path.with_suffix(".png"))


def figure_5(base, args):
    """Similarity matrices (Eq. 4) of the teacher, and of the student before, halfway through and after training."""
    dataset = args.dataset or "biovid_b"
    classes = "va" if dataset == "affwild2" else 2
    path, state = ensure_teachers(dataset, classes, args)[0]
    settings, features = state["settings"], open_run(path.parent, state)
    choice = {**base, "epochs": base["epochs"] or default_epochs(settings)}
    index, _ = part_windows(features, data.parts(features, settings["fold"]), "train", dense=True)
    index = index[torch.linspace(0, len(index) - 1, min(len(index), 128)).long()]  # 128 of them, evenly spread
    label = features.label[index[:, -1]]
    rank = label if settings["task"] == "classification" else label[:, 0]
    index = index[rank.argsort(stable=True)]
    S = {"teacher": cosine_similarity_matrix(teacher_answers(state, features, index, args.device)[1])}
    visual = features.rows["visual"][index].to(args.device)

    def watch(epoch, student):
        if epoch in (0, choice["epochs"] // 2, choice["epochs"]):
            with torch.no_grad():
                S[f"student, epoch {epoch}"] = cosine_similarity_matrix(student.eval().fuse(visual)[1])

    distil(path, choice, args, keep_student=False, watch=watch)
    for name, matrix in S.items():
        print(f"{name}: mean similarity {matrix.mean():.3f}, "
              f"mean |S - S_teacher| {(matrix - S['teacher']).abs().mean():.3f}")
    out = args.out / f"figure5-{dataset}{'-synthetic' * settings['synthetic']}.png"
    images = [(matrix[None].cpu() + 1) / 2 for matrix in S.values()]  # black is -1, white is 1
    save_image([image.repeat_interleave(3, 1).repeat_interleave(3, 2) for image in images], out, nrow=4, padding=6)
    print(f"{out}: {', '.join(S)}; samples sorted by class" + " (SYNTHETIC DATA)" * settings["synthetic"])


def benchmark(args):
    """What a step of stage 3 costs, how much of it is the OT, and what bounds feature extraction."""
    device, b, rows = args.device, 128, 6960  # BioVid's five classes without a test fold: 8,700 * 4 / 5

    def seconds(step, repeats=20):
        times = []
        for _ in range(repeats + 2):  # two to warm up
            start = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return statistics.median(times[2:])

    torch.manual_seed(0)
    settings = {**TEACHER_DEFAULTS["biovid_b"], "dataset": "biovid_b", "task": "classification", "outputs": 2}
    student = models.student(settings).to(device).requires_grad_(False)
    optimizer = torch.optim.Adam(student.head.requires_grad_(True).parameters(), lr=1e-4, fused=True)
    visual = torch.randn(rows, 1, models.D, device=device)
    z_t = torch.randn(rows, models.D, device=device)
    targets = torch.randint(2, (rows,), device=device), z_t, z_t  # a label; the second is for KL alone

    def train(size, samples):
        batches = torch.randperm(samples).to(device).split(size)[:samples // size]
        train_epoch(student.fuse, [(i, visual[i]) for i in batches], targets, optimizer, DEFAULTS, 30)

    z_s = student.fuse(visual[:b])[1].detach().requires_grad_()
    steps = {size: seconds(lambda size=size: train(size, size)) for size in (32, 64, b, 256)}
    whole, ot = steps[b], seconds(lambda: pkdot_loss(z_s, z_t[:b]).backward())
    epoch = seconds(lambda: train(b, rows), 1)
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}; medians\n"
          f"distillation step on cached features, b {b}, multimodal transformer: {1e3 * whole:.1f} ms, of which "
          f"pkdot_loss forward and backward {1e3 * ot:.1f} ms ({ot / whole:.0%})\n"
          f"epoch of {rows} x {models.D} features: {epoch:.2f} s")

    clips, size, rates = 8, 112, {}
    with tempfile.TemporaryDirectory() as folder:
        faces = torch.randint(256, (data.BioVid.FRAMES, 8, 8, 3), dtype=torch.uint8).numpy()
        data.write_jpegs(Path(folder) / "faces", "img_{:05d}.jpg", faces, [True] * len(faces), scale=size // 8)
        paths = sorted((Path(folder) / "faces").iterdir())
        decode = seconds(lambda: data.read_frames(paths, size))
    body = student.backbone.eval().features
    for dtype, layout in product((torch.float32, torch.bfloat16), (torch.contiguous_format, torch.channels_last_3d)):
        video = torch.randn(clips, 3, data.BioVid.FRAMES, size, size, device=device).contiguous(memory_format=layout)
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            rates[dtype, layout] = clips / seconds(lambda video=video: body(video), 3)
    print(f"feature extraction, {data.BioVid.FRAMES} x {size} x {size} jpg: decoding {1 / decode:.1f} clips/s "
          "a worker; the slower of it and the network bounds it")
    for (dtype, layout), rate in rates.items():
        print(f"  R3D-18, {str(dtype)[6:]}, {str(layout)[6:].removesuffix('_format')}: {rate:.1f} clips/s")
    forward = 1 / rates[torch.float32, torch.contiguous_format]
    print(f"two R3D-18 forwards of {b} clips in every step, as the release does: {2 * b * forward:.1f} s a step, "
          f"{2 * b * forward / whole:.0f} times ours")
    runs = {size: 3 * 5 * 20 * (rows // size) for size in steps}  # Figure 6: 3 k, 5 folds, 20 epochs
    ours, theirs = (sum(runs[size] * cost(size) for size in runs) for cost in (steps.get, lambda n: 2 * n * forward))
    print(f"Figure 6, {sum(runs.values())} steps, estimated from these: {ours / 60:.0f} min; "
          f"the release's way {theirs / 3600:.0f} h")


def parse(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--teacher", type=Path, metavar="FILE", help="default: the newest teacher.pt under --out")
    parser.add_argument("--fold", choices=["1", "2", "3", "4", "5", "all"], help="the teacher's sibling of this fold")
    parser.add_argument("--method", choices=METHODS, default="pkdot", help="default pkdot")
    parser.add_argument("--lambda", type=at_least(0, float), default=0.4, help="weight of W in Eq. 9; default 0.4")
    parser.add_argument("--k", type=at_least(1), default=30, help="anchors; default 30")
    parser.add_argument("--epsilon", type=at_least(1e-6, float), default=0.1,
                        help="Eq. 5, in units of the cost 1/2 |x - y|^2; default 0.1 (the release's blur 0.1 is 0.01)")
    parser.add_argument("--no-debias", dest="debias", action="store_false", help="Eq. 5 to the letter")
    parser.add_argument("--anchors", choices=ANCHORS, default="dissimilar", help="default dissimilar, the paper's")
    parser.add_argument("--batch-size", type=at_least(2), default=128, help="b in Eq. 1; default 128")
    parser.add_argument("--lr", type=at_least(0, float), default=1e-4, help="default 1e-4")
    parser.add_argument("--epochs", type=at_least(1), help="default 20 (the release's); more on a stand-in")
    parser.add_argument("--finetune", action="store_true", help="train the visual backbone too, from video")
    parser.add_argument("--select", choices=("val", "test", "last"), default="val", help="what chooses the epoch: "
                        "held-out training subjects (default), the test fold (the release), or nothing")
    add_common_flags(parser)
    job = parser.add_mutually_exclusive_group()
    job.add_argument("--evaluate", type=Path, metavar="STUDENT.pt", help="a saved student's test score, from faces")
    job.add_argument("--predict", type=Path, metavar="FOLDER", help="csv of a student's predictions for face crops")
    job.add_argument("--table", choices=TABLES, help="the paper's table, or our choices; trains what is missing")
    job.add_argument("--figure", choices=("5", *FIGURES), help="the paper's figure, likewise")
    job.add_argument("--benchmark", action="store_true", help="time a distillation step, an epoch and the extraction")
    parser.add_argument("--student", type=Path, metavar="STUDENT.pt", help="for --predict")
    parser.add_argument("--dataset", choices=data.DATASETS, help="the newest teacher's; of a table its columns")
    parser.add_argument("--seeds", type=at_least(1), default=1, help="tables and figures: students a fold; default 1")
    parser.add_argument("--fresh", action="store_true", help="tables and figures: train the students again")
    return parser.parse_args(argv)


def main():
    args = parse()
    args.device = choose_device(args.device, args.amp)
    if args.k > args.batch_size:
        raise UserError(f"--k {args.k}: the similarity matrix has only --batch-size {args.batch_size} rows; "
                        "lower --k or raise --batch-size")
    if args.evaluate:
        return evaluate(args.evaluate, args)
    if args.predict:
        if not args.student:
            raise UserError("--predict needs --student STUDENT.pt")
        return predict(args.predict, args.student, args)
    if args.benchmark:
        return benchmark(args)
    choice = {key: getattr(args, key) for key in DEFAULTS}
    if args.table or args.figure:
        if args.method != "pkdot" or args.fold or args.teacher:
            raise UserError("--table and --figure choose methods, folds and teachers: "
                            "leave --method, --fold and --teacher out")
        if args.dataset == "features" and not args.root:
            raise UserError("--dataset features needs --root FILE.npz")
        if args.figure == "5":
            return figure_5(choice, args)
        return draw_figure(args.figure, choice, args) if args.figure else print_table(args.table, choice, args)
    teacher = args.teacher or newest_teacher(args)
    if args.fold:
        siblings = sorted(teacher.parent.parent.glob("fold*/teacher.pt"))
        one = teacher.parent.parent / f"fold{args.fold}" / "teacher.pt"
    for path in [teacher] if not args.fold else siblings if args.fold == "all" else [one]:
        state = load(path, "teacher")
        settings, scores = state["settings"], state["scores"]
        choice["epochs"] = args.epochs or default_epochs(settings)
        start_log(path.parent, settings)
        print(f"{path}, test: visual only {show(scores['visual'])}, teacher {show(scores['multimodal'])}")
        record = distil(path, choice, args)
        print(f"{heading(settings, settings['fold'])}, n = {record['n_test']}: visual only (lower bound) "
              f"{show(scores['visual'])} | student, {choice['method']} "
              f"{show(record)} | multimodal (upper bound) {show(scores['multimodal'])}")


if __name__ == "__main__":
    data.run(main)
