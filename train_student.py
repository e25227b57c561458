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
import hashlib
import json
import statistics
import sys
import tempfile
import time
from itertools import product
from pathlib import Path

import torch
from scipy import stats
from torchvision.utils import save_image
from tqdm import tqdm

import data
import models
import train_teacher
from data import Samples, UserError
from pkdot import ANCHORS, cosine_loss, cosine_similarity_matrix, kl_loss, mse_loss, pkdot_loss, rkd_loss, task_loss
from train_teacher import (DEFAULTS, Parser, VisualOrPrivileged, add_common_flags, append_line, at_least, bar,
                           choose_device, clip_loader, criterion, fingerprint, gather, keep_progress, load,
                           part_windows, restore_progress, result_line, run_features, run_folder, save, score,
                           seed_all, show, snapshot, start_log)
from train_teacher import make_settings as teacher_settings
from train_teacher import parse as parse_teacher

METHODS = ("pkdot", "cosine", "mse", "kl", "rkd", "none")
# Section IV-B unless marked; epsilon in units of the cost 1/2 |x - y|^2. 20 epochs are the release's.
DEFAULT = {"method": "pkdot", "lambda": 0.4, "k": 30, "epsilon": 0.1, "debias": True, "anchors": "dissimilar",
           "batch_size": 128, "lr": 1e-4, "epochs": 20, "finetune": False, "select": "val", "seed": 0, "amp": False}
STAND_IN_EPOCHS = {"biovid_a": 100, "biovid_b": 100, "affwild2": 50}  # its epochs are of a step or two


def distillation_loss(choice, output_s, z_s, output_t, z_t, k):
    """What lambda weighs in Eq. 9, by choice["method"]: PKDOT's W, or a baseline of Table II in its place."""
    if choice["method"] == "pkdot":
        return pkdot_loss(z_s, z_t, k, choice["epsilon"], choice["debias"], choice["anchors"])
    if choice["method"] == "cosine":
        return cosine_loss(z_s, z_t)
    if choice["method"] == "mse":
        return mse_loss(z_s, z_t)
    if choice["method"] == "kl":
        return kl_loss(output_s, output_t)
    return rkd_loss(z_s, z_t)


def distil(teacher_path, choice, args, keep_student=True, watch=None):
    """Stage 3 of one fold; choice is DEFAULT with what the user changed. Returns the results line that it appends.

    watch(epoch, student), if given, is called before the first epoch and after each.
    """
    begin = time.time()
    state, run, device = load(teacher_path, "teacher"), Path(teacher_path).parent, args.device
    settings = {**state["settings"], "student": choice, "seed": choice["seed"]}
    if choice["method"] == "kl" and settings["task"] == "regression":
        raise UserError("--method kl compares class probabilities, and valence/arousal has none; choose another method")
    features = open_run(run, state)
    part = data.parts(features, settings["fold"])
    index, keep = part_windows(features, part, "train", dense=True)
    test = part_windows(features, part, "test")
    # --select val: held-out training subjects choose the epoch; test: the test fold does (the release); last: nothing
    chosen_on = test if choice["select"] == "test" else part_windows(features, part, "val")
    b, k = min(choice["batch_size"], len(index)), min(choice["k"], len(index))
    if b < choice["batch_size"] and keep_student:
        print(f"warning: only {len(index)} training samples; batches are of {b} and k is {k}", file=sys.stderr)

    visual, rows = features.rows["visual"].to(device), index.to(device)  # (R, 512), (S, L)
    label = data.sample_labels(features.label, index, keep).to(device)
    output_t, z_t = teacher_answers(state, features, index, device)
    seed_all(choice["seed"], 3)
    student, trained = make_student(state, run, choice, device)
    optimizer = torch.optim.Adam(trained.parameters(), lr=choice["lr"], fused=True)
    frozen = fingerprint(student.tnet.state_dict())
    faces = open_faces(settings) if choice["finetune"] else None

    def outputs(windows):  # of the student, by the path it is trained on: video, or cached features
        if faces:
            loader = clip_loader(Samples(faces, "visual", *windows), torch.arange(len(windows[0])), b, args)
            return gather(lambda batch: student(batch[0].to(device))[0], loader)
        return gather(lambda rows: student.fuse(visual[rows])[0], windows[0].to(device).split(256))

    progress = run / f"student-{choice['method']}.progress"
    first, best, saved = 0, None, time.time()
    if args.resume and keep_student and progress.exists():
        first, best = restore_progress(progress, settings, trained, optimizer)
    if watch:
        watch(0, student)
    for epoch in bar(range(first, choice["epochs"]), f"{choice['method']} fold {settings['fold']}"):
        seed_all(choice["seed"], epoch)
        trained.train()
        total_gt = total_w = 0.0
        order = torch.randperm(len(index))
        order = order[:len(order) - len(order) % b]  # S wants b rows
        clips = iter(clip_loader(Samples(faces, "visual", index, keep), order, b, args)) if faces else None
        for batch in order.to(device).split(b):
            with torch.autocast(device.type, torch.bfloat16, enabled=choice["amp"]):
                if faces:
                    output_s, z_s = student(next(clips)[0].to(device, non_blocking=True))  # (b, L, 3, F, H, W)
                else:
                    output_s, z_s = student.fuse(visual[rows[batch]])  # (b, L, 512)
            loss_gt = task_loss(output_s.float(), label[batch])  # Eq. 7 or 8
            loss = loss_gt
            if choice["method"] != "none" and choice["lambda"] > 0:
                W = distillation_loss(choice, output_s, z_s, output_t[batch], z_t[batch], k)  # Eq. 1-6
                loss = loss_gt + choice["lambda"] * W  # Eq. 9
                total_w += W.detach()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total_gt += loss_gt.detach()
        trained.eval()
        scores = score(outputs(chosen_on), features, *chosen_on)
        if best is None or choice["select"] == "last" or criterion(scores) > best["score"]:
            best = dict(score=criterion(scores), epoch=epoch, model=snapshot(trained))
        if keep_student:
            log_epoch(run, choice, epoch, float(total_gt) * b / len(order), float(total_w) * b / len(order), scores)
        if keep_student and time.time() - saved > train_teacher.SAVE_EVERY:
            keep_progress(progress, settings, epoch, trained, optimizer, best)
            saved = time.time()
        if watch:
            watch(epoch + 1, student)

    if fingerprint(student.tnet.state_dict()) != frozen:
        raise RuntimeError("the frozen T-Net has changed during distillation")
    trained.load_state_dict(best["model"])
    scores = score(outputs(test), features, *test)
    if keep_student:
        save(run / f"student-{choice['method']}.pt",
             dict(kind="student", settings=settings, scores=scores, epoch=best["epoch"] + 1, model=snapshot(student)))
        progress.unlink(missing_ok=True)
    record = result_line(settings, "student", scores, time.time() - begin, epoch=best["epoch"] + 1,
                         **identity(choice, state))
    append_line(args.out / "results.jsonl", record)
    return record


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
    stage1 = VisualOrPrivileged(student.backbone, state["settings"])
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


def code_digest():
    """Changes when the method's code does, and not with its comments, docstrings or layout."""
    digest = hashlib.sha256()
    for name in ("sinkhorn.py", "pkdot.py", "models.py"):
        tree = ast.parse((Path(__file__).parent / name).read_text())
        for node in ast.walk(tree):
            if isinstance(getattr(node, "body", None), list):
                node.body = [n for n in node.body
                             if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))]
        digest.update(ast.dump(tree).encode())
    return digest.hexdigest()[:12]


def default_epochs(settings):
    return STAND_IN_EPOCHS[settings["dataset"]] if settings["synthetic"] else DEFAULT["epochs"]


def newest_teacher(out):
    found = sorted(out.glob("*/*/fold*/teacher.pt"), key=lambda p: p.stat().st_mtime)
    if not found:
        raise UserError(f"{out}: no <dataset>/<classes>/fold<n>/teacher.pt in it; run train_teacher.py first")
    return found[-1]


def load_student(path, device):
    state = load(path, "student")
    student = models.student(state["settings"])
    student.load_state_dict(state["model"])
    return student.to(device).eval(), state["settings"]


def evaluate(path, args):
    """Test score of a saved student, from the faces alone: no privileged file is opened."""
    student, settings = load_student(path, args.device)
    source = open_faces(settings, args.root)
    test = part_windows(source, data.parts(source, settings["fold"]), "test")
    loader = clip_loader(Samples(source, "visual", *test), torch.arange(len(test[0])), 32, args)
    scores = score(gather(lambda batch: student(batch[0].to(args.device))[0], bar(loader, "evaluate")), source, *test)
    print(f"{'SYNTHETIC ' * settings['synthetic']}{settings['dataset']} fold {settings['fold']}, test, "
          f"n = {scores['n']}: student {settings['student']['method']} {show(scores)}")


def predict(folder, path, args):
    """One csv line per sample (class probabilities) or clip (valence, arousal) of unlabelled faces, on stdout."""
    student, settings = load_student(path, args.device)
    if settings["dataset"] == "features":
        source = data.Features(folder, privileged=False, labelled=False)
    else:
        source = data.Faces(folder, settings)
    index, keep = data.windows(source.video, source.length)
    samples = Samples(source, "visual", index, None)
    loader = clip_loader(samples, torch.arange(len(index)), 32, args)
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
            write([source.name[row].rpartition("/")[0] or source.name[row], *(f"{value:.4f}" for value in p)])


# --------------------------------------------------------------------------------------------------- tables, figures

# A table is (title, columns, rows). A column is (heading, data set, classes, metric, changes of the choice). A row is
# (label, what is ours, the paper's numbers as it prints them), where ours is a bound ("visual" or "multimodal"), a
# student (changes of the choice), or None for what others have published.

TABLE_I = {
    "biovid_a": "BioVid (A): visual (weak, prevalent) + EDA (strong, privileged), feature concatenation, SEW",
    "biovid_b": "BioVid (B): visual (strong, prevalent) + EMG (weak, privileged), multimodal transformer, WES",
    "affwild2": "Affwild2: visual (strong, prevalent) + audio (weak, privileged), joint cross attention, WES",
    "features": "features file: visual (prevalent) + privileged, feature concatenation"}
BIOVID_B = ("BioVid (B) accuracy", "biovid_b", 2, "accuracy", {})
VALENCE = ("Affwild2 valence", "affwild2", "va", "valence", {})
AROUSAL = ("Affwild2 arousal", "affwild2", "va", "arousal", {})
LOWER, STUDENT, UPPER = "Visual only (lower bound)", "Student - PKDOT", "Multimodal (upper bound)"
DASH = "-"  # not in the paper

TABLES = {
    "2": ("Table II: privileged KD methods", [BIOVID_B, VALENCE, AROUSAL], [
        ("Cosine similarity [10]", {"method": "cosine"}, ("75.40", "0.37", "0.53")),
        ("MSE [8]", {"method": "mse"}, ("N/A", "0.39", "0.53")),
        ("KL [8]", {"method": "kl"}, ("75.80", "N/A", "N/A")),
        ("PKDOT", {}, ("78.76", "0.43", "0.56")),
        ("RKD [31]", {"method": "rkd"}, (DASH, DASH, DASH)),
        ("none (lambda 0)", {"method": "none"}, (DASH, DASH, DASH))]),
    "3": ("Table III: visual-only methods, Affwild2 validation set", [VALENCE, AROUSAL], [
        ("ResNet-50 [44]", None, ("0.31", "0.17")),
        ("SENet-50 [45]", None, ("0.28", "0.34")),
        ("MobileNet [46]", None, ("0.28", "0.44")),
        ("RegNet + GRU [47]", None, ("0.43", "0.57")),
        ("ResNeXt + SENet [48]", None, ("0.51", "0.48")),
        (LOWER, "visual", ("0.41", "0.51")),
        (STUDENT, {}, ("0.43", "0.56")),
        (UPPER, "multimodal", ("0.67", "0.59"))]),
    "4": ("Table IV: visual-only methods, BioVid (A)", [
        ("BL1 vs. PA4 accuracy", "biovid_a", 2, "accuracy", {}),
        ("5 classes accuracy", "biovid_a", 5, "accuracy", {})], [
        ("Sparse LSTM [19]", None, ("61.70", "29.70")),
        ("ViT [18]", None, ("72.11", "NR")),
        ("FAD + RF [49]", None, ("72.40", "30.80")),
        ("GNN [50]", None, ("73.20", "NR")),
        ("ViT [51]", None, ("73.28", "31.52")),
        ("ResNet-18 [52]", None, ("NR", "36.60")),
        (LOWER, "visual", ("72.10", "30.38")),
        (STUDENT, {}, ("74.55", "33.65")),
        (UPPER, "multimodal", ("83.50", "36.40"))]),
    "5": ("Table V: visual-only methods, BioVid (B)", [BIOVID_B], [
        ("Handcrafted + RF [22]", None, ("72.70",)),
        (LOWER, "visual", ("74.10",)),
        (STUDENT, {}, ("78.76",)),
        (UPPER, "multimodal", ("81.30",))]),
    "choices": ("Choices that the paper leaves open (not in the paper)", [BIOVID_B, VALENCE, AROUSAL], [
        (label, change, (DASH, DASH, DASH)) for label, change in [
            ("PKDOT", {}),
            ("anchors: most similar", {"anchors": "similar"}),
            ("anchors: random", {"anchors": "random"}),
            ("not debiased (Eq. 5)", {"debias": False}),
            *((f"lambda {x:g}", {"lambda": x}) for x in (0.0, 0.1, 1.0, 4.0, 10.0)),
            ("the release's settings", {"epsilon": 0.01, "lambda": 0.6, "select": "test"})]])}
FIGURES = {
    "6": ("Figure 6: batch size and number of anchors", [
        (f"k = {k}", "biovid_b", 2, "accuracy", {"k": k}) for k in (5, 15, 30)], [
        (f"batch size {b}", {"batch_size": b}, (DASH,) * 3) for b in (32, 64, 128, 256)]),
    "7": ("Figure 7: epsilon", [BIOVID_B, VALENCE, AROUSAL], [
        (f"epsilon {e:g}", {"epsilon": e}, (DASH,) * 3) for e in (0.001, 0.01, 0.1, 1, 10)])}


def read_results(path):
    """The lines of results.jsonl. One that is not JSON, of a writer that was killed, is left out with a warning."""
    records = []
    for number, line in enumerate(path.read_text().splitlines() if path.exists() else [], 1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            print(f"warning: {path}, line {number} is not whole and is left out", file=sys.stderr)
    return records


def values(records, column, row, base):
    """{(fold, seed): metric} of one cell; of equal runs the last. A bound has one run a fold, which all seeds share."""
    _, dataset, classes, metric, column_change = column
    change = row[1]
    if isinstance(change, str):
        want, found = {"role": change}, {}
    else:
        want, found = {"role": "student", **base, **change, **column_change}, {}
        want = {key: value for key, value in want.items() if key != "seed" and value is not None}
    want.update(dataset=dataset, classes=classes)
    for record in records:
        if metric in record and all(record.get(key) == value for key, value in want.items()):
            found[record["fold"], record["seed"]] = record[metric]
    return found


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
    return column[3] != "accuracy" and isinstance(row[1], dict) and row[1].get("method") == "kl"


def format_table(table, records, base, synthetic):
    """The printed table: for each column the paper's number, ours as mean +- std (runs), then paired differences."""
    title, columns, rows = table
    lines = [("SYNTHETIC DATA - " if synthetic else "") + title]
    lines += [TABLE_I[dataset] for dataset in dict.fromkeys(column[1] for column in columns)]
    changed = [f"{key} {value}" for key, value in base.items() if value not in (None, DEFAULT[key]) and key != "seed"]
    lines += [f"with {', '.join(changed)}"] * bool(changed)
    published = any(p != DASH for row in rows for p in row[2])
    grid = [["", *(f"{c[0]}: paper | ours" if published else c[0] for c in columns)]]
    found = {(i, j): values(records, column, row, base)
             for i, row in enumerate(rows) for j, column in enumerate(columns)}
    for i, row in enumerate(rows):
        cells = [row[0]]
        for j, column in enumerate(columns):
            digits, v = 2 if column[3] == "accuracy" else 3, list(found[i, j].values())
            if undefined(column, row):
                ours = "n/a"
            elif row[1] is None:
                ours = ""
            elif not v:
                ours = "not run"
            else:
                spread = f" ± {statistics.stdev(v):.{digits}f}" if len(v) > 1 else ""
                ours = f"{statistics.mean(v):.{digits}f}{spread} ({len(v)} run{'s' * (len(v) > 1)})"
            cells.append(f"{row[2][j]:>5} | {ours}" if published else ours)
        grid.append(cells)
    widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
    lines += ["  ".join(c.ljust(width) for c, width in zip(cells, widths, strict=True)).rstrip() for cells in grid]
    reference = next((i for i, row in enumerate(rows) if row[1] == {}), None)
    for j, column in enumerate(columns):
        for i, row in enumerate(rows):
            if reference is None or i == reference or not (found[i, j] and found[reference, j]):
                continue
            gap = interval(found[reference, j], found[i, j])
            text = f"{rows[reference][0]} minus {row[0]}, {column[0]}: "
            digits = 2 if column[3] == "accuracy" else 3
            lines.append(text + ("one pair, no interval" if gap is None else
                         f"{gap[0]:+.{digits}f}, 95 % interval [{gap[1]:+.{digits}f}, {gap[2]:+.{digits}f}]"
                         + (", inside the noise" if gap[1] <= 0 <= gap[2] else "")))
    return "\n".join(lines)


def run_missing(table, base, args):
    """Train what the table lacks, teachers included; returns the results that may stand in it."""
    results, usable = args.out / "results.jsonl", []
    for dataset, classes in dict.fromkeys(column[1:3] for column in table[1]):
        try:
            teachers = ensure_teachers(dataset, classes, args)
        except UserError as error:
            print(f"{dataset} not run: {error}", file=sys.stderr)
            continue
        epochs = base["epochs"] or default_epochs(teachers[0][1]["settings"])
        choices = [{**base, **row[1], **column[4], "epochs": epochs} for row in table[2] for column in table[1]
                   if column[1] == dataset and isinstance(row[1], dict) and not undefined(column, row)]
        for path, state in teachers:
            settings = state["settings"]
            place = {k: settings[k] for k in ("dataset", "synthetic", "fold")}
            usable += [result_line(settings, role, scores, 0) for role, scores in state["scores"].items()]
            records = [] if args.fresh else read_results(results)
            for choice, seed in dict.fromkeys((json.dumps(c), s) for c, s in product(choices, range(args.seeds))):
                choice = {**json.loads(choice), "seed": args.seed + seed}
                want = {**place, "role": "student", **identity(choice, state)}
                done = [r for r in records if all(r.get(k) == v for k, v in want.items())]
                if not done:
                    done = [distil(path, choice, args, keep_student=False)]
                    records += done
                usable.append(done[-1])
    return usable


def ensure_teachers(dataset, classes, args):
    """(path, state) of each fold's teacher for a table; what is missing is trained with train_teacher.py's defaults."""
    flags = ["--dataset", dataset, "--fold", "all", "--out", str(args.out), "--workers", str(args.workers), "--resume"]
    flags += ["--synthetic"] * args.synthetic + (["--root", args.root] if args.root else [])
    flags += ["--classes", str(classes)] if dataset.startswith("biovid") else []
    teacher_args = parse_teacher(flags)
    teacher_args.device = args.device
    settings, folds = teacher_settings(teacher_args)
    found = []
    for fold in folds:
        path = run_folder({**settings, "fold": fold}, args.out) / "teacher.pt"
        if not path.exists():
            train_teacher.train_teacher({**settings, "fold": fold}, teacher_args)
        state = load(path, "teacher")
        if state["settings"]["root"] != settings["root"]:
            raise UserError(f"{path} was trained on {state['settings']['root']}, not {settings['root']}; "
                            "give another --out")
        found.append((path, state))
    return found


def for_features(table, args):
    """A table's comparison on a features file: the same rows, the file's own metric, no number of the paper's."""
    source = data.Features(args.root)
    metrics = ["accuracy"] if source.task == "classification" else ["valence", "arousal"]
    classes = source.outputs if source.task == "classification" else "va"
    columns = [(f"{Path(args.root).stem} {metric}", "features", classes, metric, {}) for metric in metrics]
    return table[0], columns, [(label, change, (DASH,) * 2) for label, change, _ in table[2] if change is not None]


def print_table(name, base, args):
    table = {**TABLES, **FIGURES}[name]
    if args.dataset == "features":
        table = for_features(table, args)
    elif args.dataset:
        keep = [j for j, column in enumerate(table[1]) if column[1] == args.dataset]
        table = table[0], [table[1][j] for j in keep], [(*row[:2], [row[2][j] for j in keep]) for row in table[2]]
    start = time.time()
    records = run_missing(table, base, args)
    print(format_table(table, records, base, any(r["synthetic"] for r in records)))
    print(f"{time.time() - start:.0f} s on {args.device}, torch {torch.__version__}")
    return table, records


def draw_figure(name, base, args):
    """Figures 6 and 7: the grid on the screen and as csv, and as png if matplotlib is installed."""
    (title, columns, rows), records = print_table(name, base, args)
    means = [[statistics.mean(v) if (v := list(values(records, c, row, base).values())) else None for c in columns]
             for row in rows]
    path = args.out / f"figure{name}.csv"
    with open(path, "w", newline="") as file:
        csv.writer(file).writerow(["", *(c[0] for c in columns)])
        csv.writer(file).writerows([row[0], *mean] for row, mean in zip(rows, means, strict=True))
    print(path)
    try:
        from matplotlib import pyplot
    except ImportError:
        return print("matplotlib is not installed: no png")
    figure, axes = pyplot.subplots(1, 2 if name == "7" else 1, squeeze=False)
    for column, series in zip(columns, zip(*means, strict=True), strict=True):
        axis = axes[0, -1 if column[3] != "accuracy" else 0]
        axis.plot([row[0].split()[-1] for row in rows], series, marker="o", label=column[0])
        axis.set_ylabel("accuracy (%)" if column[3] == "accuracy" else "CCC")
        axis.legend()
    synthetic = any(r["synthetic"] for r in records)
    figure.suptitle("SYNTHETIC DATA - " * synthetic + title)
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
    settings = {**DEFAULTS["biovid_b"], "dataset": "biovid_b", "task": "classification", "outputs": 2}
    student = models.student(settings).to(device)
    visual = torch.randn(rows, 1, models.D, device=device)
    label, z_t = torch.randint(2, (rows,), device=device), torch.randn(rows, models.D, device=device)
    optimizer = torch.optim.Adam(student.head.parameters(), lr=1e-4, fused=True)

    def step(batch):
        output_s, z_s = student.fuse(visual[batch])
        loss = task_loss(output_s, label[batch]) + 0.4 * pkdot_loss(z_s, z_t[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    z = torch.randn(b, models.D, device=device, requires_grad=True)
    first = torch.arange(b)
    whole, ot = seconds(lambda: step(first)), seconds(lambda: pkdot_loss(z, z_t[:b]).backward())
    epoch = seconds(lambda: [step(batch) for batch in torch.randperm(rows).split(b)[:-1]], 1)
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}; medians\n"
          f"distillation step on cached features, b {b}, multimodal transformer: {1e3 * whole:.1f} ms, of which "
          f"pkdot_loss forward and backward {1e3 * ot:.1f} ms ({ot / whole:.0%})\n"
          f"epoch of {rows} x {models.D} features: {epoch:.2f} s")

    clips, size = 16, 112
    with tempfile.TemporaryDirectory() as folder:
        faces = torch.randint(256, (data.BioVid.FRAMES, 8, 8, 3), dtype=torch.uint8).numpy()
        data.write_jpegs(Path(folder) / "faces", "img_{:05d}.jpg", faces, [True] * len(faces), scale=size // 8)
        paths = sorted((Path(folder) / "faces").iterdir())
        decode = seconds(lambda: data.read_frames(paths, size))
    backbone = student.backbone.eval()
    video = torch.randint(256, (clips, 1, 3, data.BioVid.FRAMES, size, size), dtype=torch.uint8)
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
        forward = seconds(lambda: backbone(video.to(device)), 3) / clips
    print(f"feature extraction, {data.BioVid.FRAMES} x {size} x {size} jpg: decoding {1 / decode:.1f} clips/s "
          f"a worker, R3D-18 {1 / forward:.1f} clips/s{' (bfloat16)' * args.amp}; the slower bounds it\n"
          f"two R3D-18 forwards of {b} clips in every step, as the release does: {2 * b * forward:.1f} s a step, "
          f"{2 * b * forward / whole:.0f} times ours")
    steps = sum(20 * (rows // size) for size in (32, 64, 128, 256)) * 3 * 5  # Figure 6: 20 epochs, 3 k, 5 folds
    samples = sum(20 * (rows // size) * size for size in (32, 64, 128, 256)) * 3 * 5
    print(f"Figure 6 that way: {steps} steps, {2 * samples * forward / 3600:.0f} h (an estimate from the line above)")


def parse(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--teacher", type=Path, metavar="FILE", help="default: the newest teacher.pt under --out")
    parser.add_argument("--fold", choices=["1", "2", "3", "4", "5", "all"], help="the teacher's sibling of this fold")
    parser.add_argument("--method", choices=METHODS, default="pkdot", help="default pkdot")
    parser.add_argument("--lambda", type=at_least(0, float), default=0.4, help="weight of W in Eq. 9; default 0.4")
    parser.add_argument("--k", type=at_least(1), default=30, help="anchors; default 30")
    parser.add_argument("--epsilon", type=at_least(1e-9, float), default=0.1,
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
    parser.add_argument("--dataset", choices=data.DATASETS, help="tables and figures: this data set alone")
    parser.add_argument("--seeds", type=at_least(1), default=1, help="tables and figures: students a fold; default 1")
    parser.add_argument("--fresh", action="store_true", help="tables and figures: train the students again")
    return parser.parse_args(argv)


def main():
    args = parse()
    args.device = choose_device(args.device)
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
    choice = {key: getattr(args, key) for key in DEFAULT}
    if args.table or args.figure:
        if args.dataset == "features" and not args.root:
            raise UserError("--dataset features needs --root FILE.npz")
        if args.figure == "5":
            return figure_5(choice, args)
        return draw_figure(args.figure, choice, args) if args.figure else print_table(args.table, choice, args)
    teacher = args.teacher or newest_teacher(args.out)
    folds = range(1, 6) if args.fold == "all" else [args.fold] if args.fold else []
    for path in [teacher.parent.parent / f"fold{fold}" / "teacher.pt" for fold in folds] or [teacher]:
        state = load(path, "teacher")
        settings, scores = state["settings"], state["scores"]
        choice["epochs"] = args.epochs or default_epochs(settings)
        start_log(path.parent)
        print(f"{path}, test: visual only {show(scores['visual'])}, teacher {show(scores['multimodal'])}")
        record = distil(path, choice, args)
        print(f"{'SYNTHETIC ' * settings['synthetic']}{settings['dataset']} fold {settings['fold']}, test, n = "
              f"{record['n_test']}: visual only (lower bound) {show(scores['visual'])} | student, {choice['method']} "
              f"{show(record)} | multimodal (upper bound) {show(scores['multimodal'])}")


if __name__ == "__main__":
    data.run(main)
