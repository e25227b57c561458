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
import ast
import csv
import json
import math
import os
import statistics
import sys
import time
from argparse import BooleanOptionalAction, Namespace
from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from itertools import chain, product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy import stats
from tqdm import tqdm

import data
import models
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
    similarity_loss,
    task_loss,
)
from train_teacher import (
    ALONE,
    add_common_flags,
    answer,
    answers,
    append_line,
    at_least,
    autocast,
    bar,
    clip_answers,
    content,
    criterion,
    defaults,
    epochs,
    fingerprint,
    fold_of,
    folds_of,
    from_all,
    fusion_lr,
    gather,
    heading,
    join_ranks,
    keep_best,
    leave_ranks,
    load,
    made_of,
    make_backbone,
    make_head,
    make_settings,
    measure,
    one_at_a_time,
    open_features,
    print_mean,
    ran_on,
    read_clips,
    result_line,
    run_folder,
    save,
    seed_all,
    share,
    show,
    snapshot,
    spread,
    stage_1_folder,
    start_log,
    step_means,
    train_teacher,
    trainings_of,
    variant,
    wait_for_all,
)

EPOCHS, STAND_IN_EPOCHS = 20, 50  # the release's; a stand-in's epochs are of few steps
DRAWN = 32  # of few labels: labelled samples in each step, beside b pairs without [ours]


class Method(NamedTuple):
    loss: Callable  # of the student's part of a batch, the teacher's, and these flags by name
    flags: str = ""  # those that it reads, besides lambda
    part: str = "z"  # of their Fused; or "output"


# What lambda weighs in Eq. 9. To add a baseline: write its loss in pkdot.py, and a line here.
METHODS = {
    "pkdot": Method(pkdot_loss, "k epsilon debias anchors shared transport"),  # Eq. 1-6
    "cosine": Method(cosine_loss),
    "mse": Method(mse_loss),
    "kl": Method(kl_loss, part="output"),
    "rkd": Method(rkd_loss),
    "similarity": Method(similarity_loss, "k"),
    "none": Method(lambda student, teacher: student.new_zeros(()))}


def distil(teacher, args, ranks=ALONE, run=None):
    """Stage 3 of one fold, of a teacher (`open_teacher`) -> the student's results line, and the
    student as it was in the epoch chosen.

    args: the parsed flags, of one lambda. run: the folder of a student that is kept, where it is
    saved, each epoch is logged and --resume finds how far it came.
    """
    features, fold = teacher_data(teacher, args)
    begin = time.time()
    settings = teacher["settings"]
    choice = choices(args, teacher)

    # the frozen teacher's answers to all pairs, once
    index = fold.train.index  # (S, L)
    label = fold.train.label.to(args.device)
    labelled = fold.train.labelled.nonzero().flatten()
    targets = teacher_answers(teacher, features, index)

    # no more rows than samples, no more anchors than rows
    samples = len(index)
    b = min(args.batch_size, samples)
    args = with_flags(args, k=min(args.k, b))
    writes = run and ranks.rank == 0
    if writes and b < args.batch_size:
        print(f"warning: only {samples} training samples; batches are of {b} and k is {args.k}",
              file=sys.stderr)
    ran = ran_on(args, ranks, settings, fold_of(features, settings).train)
    if writes:
        start_log(run, settings, **ran, batch_size=b)

    # the student, and what it sees
    seed_all(args.seed, 3)
    student, trained = make_student(teacher, args)
    see = what_the_student_sees(features, settings, args)
    network = student if args.finetune else student.fuse
    over_ranks = spread(network, args, ranks)
    finished = (run or Path()) / f"student-{args.method}.pt"
    progress = run and finished.with_suffix(".progress")
    progress_of = settings | {"student": choice}
    optimizer = torch.optim.Adam(trained.parameters(), lr=choice["lr"], fused=True)
    checkpoint = run and student_state(student, progress_of, features, fold)

    count = choice["epochs"]
    best = {}
    for epoch in epochs(count, trained, optimizer, best, progress, progress_of, args, ranks,
                        f"{args.method} fold {settings['fold']}"):
        # S wants b rows: the rest, fewer than b, is dropped
        seed_all(args.seed, 3, epoch + 1)
        batches = torch.randperm(samples)[:samples - samples % b].split(b)
        if ran["few_labels"]:  # by chance, a batch has one or two
            drawn = labelled[torch.randint(len(labelled), (len(batches), DRAWN))]
            batches = [*map(torch.cat, zip(batches, drawn, strict=True))]
        shares = [share(batch, ranks) for batch in batches]
        inputs = see(index, shares)

        # one pass over all pairs; a backbone's batch norm keeps the statistics of stage 1
        trained["head"].train()
        terms = []
        for batch, x in zip(batches, inputs, strict=True):
            batch = batch.to(args.device)

            # forward: this rank's share, then the whole batch
            s = student_forward(over_ranks, x, args)
            s = Fused(*(gather(part, len(batch), ranks) for part in s))
            loss_gt = task_loss(s.output, label[batch])  # Eq. 7 or 8

            # what the teacher says of the b pairs
            s, t = (Fused(*(part[rows] for part in of)) for of, rows in
                    ((s, slice(b)), (targets, batch[:b])))
            W = distillation_loss(s, t, args)
            KL = kl_loss(s.output, t.output) if args.kl else torch.zeros_like(W)
            loss = loss_gt + choice["lambda"] * W + args.kl * KL  # Eq. 9, and --kl [ours]

            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            terms.append(torch.stack([loss_gt, W, KL]).detach())
        loss_gt, W, KL = step_means(
            terms, ["L_gt", "W", "KL"], epoch, "lower --lr or raise --epsilon", finished,
            best and run and checkpoint | {"model": checkpoint["model"] | best["model"]}, ranks)

        # what chooses the epoch: held-out training groups (val), the test fold (test; the release)
        # or nothing (last)
        trained.eval()
        where = "test" if args.select == "test" else "val"
        chosen_on = getattr(fold, where)
        output = student_answers(network, see, chosen_on.index, args, ranks)
        found = measure(features, chosen_on, output)
        if args.select == "last":
            best.clear()
        keep_best(best, criterion(found), epoch, trained)

        # the terms of every epoch go to log.jsonl, Eq. 9's of ten to the screen
        if writes:
            lambda_w = choice["lambda"] * W
            append_line(run / "log.jsonl", dict(
                stage="student", method=args.method, seed=args.seed, epoch=epoch + 1,
                loss_gt=loss_gt, w=W, lambda_w=lambda_w, kl_beside=KL, **found))
            if epoch % max(count // 10, 1) == 0 or epoch + 1 == count:
                tqdm.write(f"epoch {epoch + 1:3d}  L_gt {loss_gt:.4f}  lambda W {lambda_w:.4f}  "
                           f"{where} {show(found)}")

    trained.load_state_dict(best["model"])

    # the test fold, once; and the validation part's score, by which a table chooses lambda
    validation = best["score"]
    if args.select == "test":
        output = student_answers(network, see, fold.val.index, args, ranks)
        validation = criterion(measure(features, fold.val, output))
    output = student_answers(network, see, fold.test.index, args, ranks)
    found = measure(features, fold.test, output)
    record = result_line(
        settings, "student", found, time.time() - begin, **ran, b=b, k_used=args.k, code=code(),
        epoch=best["epoch"] + 1, validation=validation, **choice)
    if writes:
        index, keep, _ = fold.test
        with (data.replacing(finished.with_suffix(".csv")) as part,
              open(part, "w", encoding="utf-8", errors="backslashreplace", newline="") as file):
            write_predictions(file, settings, features, index, keep, output, known=True)
        save(finished, checkpoint | {"model": snapshot(student), "record": record})
        progress.unlink(missing_ok=True)
    return record, student


def needs_classes(args):
    """KL compares their probabilities."""
    return args.method == "kl" or args.kl > 0


def distillation_loss(s, t, args):
    """W in Eq. 9; NaN for a student that has diverged, which `step_means` reports."""
    loss, flags, part = METHODS[args.method]
    try:
        return loss(getattr(s, part), getattr(t, part), **values_of(args, flags))
    except ValueError:
        if s.z.isfinite().all():
            raise
        return s.z.sum() * math.nan


def student_forward(network, x, args):
    """A student's Fused, in float32, of what it sees."""
    with autocast(args, args.amp):
        output, z = network(*x)
    return Fused(output.float(), z.float())


def student_answers(network, see, index, args, ranks, part="output"):
    """The student's output, or "z", of all windows index (S, L), on the CPU."""
    batches = share(torch.arange(len(index)), ranks).split(args.batch_size)
    return answers(lambda x: getattr(student_forward(network, x, args), part),
                   see(index, batches), len(index), ranks)


def what_the_student_sees(features, settings, args):
    """The function see(index, batches), which yields for each batch of the windows index (S, L)
    rows (b, L, D) or clips (b, L, 3, F, H, W), and what stands in place of the T-Net's output or
    None.

    Seen are the visual features, or under --finetune what lies before the backbone: faces, or the
    rows of a features file. --hallucinate oracle is no student, but what a perfect T-Net would
    allow.
    """
    visual, privileged = features.rows.values()
    instead = None
    if args.hallucinate != "tnet":
        instead = privileged * (args.hallucinate == "oracle")  # else zeros
    faces = None
    if args.finetune:
        source = open_faces(settings, args)
        expect_same_data(source, settings)
        if settings["dataset"] == "features":
            visual = source.rows["visual"].to(args.device)
        else:
            faces = source

    def see(index, batches):
        windows = [index[batch] for batch in batches]  # (b, L) rows each
        shown = (visual[rows] for rows in windows)
        if faces:
            shown = read_clips(faces, "visual", index, batches, args)
        for rows, x in zip(windows, shown, strict=True):
            yield x, None if instead is None else instead[rows]

    return see


@torch.no_grad()
def teacher_answers(teacher, features, index):
    """Fused (S, ...) of the frozen teacher for all windows: on frozen features it answers once."""
    visual, privileged = features.rows.values()
    head = make_head(teacher["settings"]).to(visual.device).eval()
    head.load_state_dict(teacher["head"])
    parts = [head(visual[rows], privileged[rows]) for rows in index.split(256)]
    return Fused(*map(torch.cat, zip(*parts, strict=True)))


def build_student(settings, chunk=None):
    return models.Student(make_backbone("visual", settings), models.TNet(), make_head(settings),
                          chunk)


def make_student(teacher, args):
    """The student, and the part of it that stage 3 trains; all else is frozen."""
    student = build_student(teacher["settings"], args.chunk)
    student.tnet.load_state_dict(teacher["tnet"])
    student.backbone.load_state_dict(visual_backbone(teacher))
    student.to(args.device).requires_grad_(False).eval()
    trained = torch.nn.ModuleDict({"head": student.head})
    if args.finetune:
        trained["backbone"] = student.backbone
    return student, trained.requires_grad_(True)


def student_state(student, settings, features, fold):
    """A student's checkpoint: all that it needs without its teacher, and its test samples."""
    tested = samples_of(features, fold.test)
    return dict(kind="student", settings=settings, model=snapshot(student),
                test_names=[*tested], test_labels=fingerprint(tested))


def open_faces(settings, args, folder=None, strict=True):
    """What a run's student looks at: its data set, or the unlabelled faces in a folder. Nothing
    privileged is read. A features file may be another one, of the same shape. strict: see
    `data.open_dataset`."""
    kind = settings["dataset"]
    length = settings["length"]
    size = settings["image_size"]
    root = folder or args.root or settings["root"]
    start = settings["face_start"] if args.face_start is None else args.face_start
    if args.face_start is not None and kind not in data.BioVid.COLUMN:
        raise UserError("--face-start is for BioVid, and this student is not; leave it out")
    if folder and folder.is_dir() == (kind == "features"):
        wanted = "features file (.npz)" if kind == "features" else "folder of face crops"
        raise UserError(f"{folder}: this student looks at a {wanted}; give one")
    if not (folder or args.root or Path(root).exists()):
        raise UserError(f"{root}: the data is no more where it was; say with --root where it is")
    if kind == "features":
        source = data.Features(root, privileged=False, labelled=not folder)
        found, wanted = source.rows["visual"].shape[1], settings["visual_dim"]
        if (source.length, found) != (length, wanted):
            raise UserError(f"{root}: visual is (N, {source.length}, {found}), the student was "
                            f"trained on (N, {length}, {wanted})")
        return source
    if folder:
        return data.Faces(folder, kind, length, size, start)
    return data.open_dataset(kind, root, settings["outputs"], length, size, False, start, strict)


def open_teacher(path, settings=None):
    """A teacher's checkpoint (of these settings, if given), where its stage 1 lies, and what makes
    it this teacher."""
    state = load(path, "teacher", settings)
    teacher = state | {"path": path, "made of": made_of(state),
                       "stage 1": stage_1_folder(path.parent, state["settings"])}
    visual_backbone(teacher)  # or one line says that it is another one by now
    return teacher


def visual_backbone(teacher):
    """Stage 1's weights of the visual backbone, those that the teacher was trained on."""
    folder = teacher["stage 1"]
    model = load(folder / "visual.pt", "visual")["model"]
    weights = {key.removeprefix("backbone."): value for key, value in model.items()
               if key.startswith("backbone.")}
    if teacher["backbones"][0] != fingerprint(weights):
        raise UserError(f"{folder}: visual.pt was trained again after {teacher['path']}; "
                        "finish the teacher: train_teacher.py --resume with the same flags")
    return weights


def teacher_data(teacher, args):
    """The features that a teacher was trained on, and their fold."""
    settings = teacher["settings"]
    features = open_features(teacher["stage 1"], settings, args.device)
    if features.backbones != teacher["backbones"]:
        raise UserError(f"{teacher['stage 1']}: features.npz is of other backbones than "
                        f"{teacher['path']}; finish the teacher: train_teacher.py --resume with "
                        "the same flags")
    return features, fold_of(features, settings, dense=True)


def choices(args, teacher):
    """What a student was made of, that a results line must agree in to stand for it: its teacher,
    and the flags that its method reads."""
    common = "method hallucinate batch_size lr finetune select seed amp kl "
    choice = values_of(args, common + METHODS[args.method].flags)
    settings = teacher["settings"]
    choice["epochs"] = args.epochs or (STAND_IN_EPOCHS if settings["synthetic"] else EPOCHS)
    choice["lambda"] = 0.0 if args.method == "none" else args.lambdas[0]
    return choice | {"teacher": teacher["made of"]}


class WithoutDocstrings(ast.NodeTransformer):
    def visit_Expr(self, node):
        return None if isinstance(node.value, ast.Constant) else node


@cache  # and called first of all: what is edited meanwhile is not what runs
def code():
    """12 hex digits of all code that makes results, without comments and docstrings."""
    modules = "sinkhorn pkdot models data train_teacher train_student".split()
    trees = [ast.parse(Path(__file__).with_name(f"{name}.py").read_bytes()) for name in modules]
    return fingerprint([ast.dump(WithoutDocstrings().visit(tree)) for tree in trees])


def teachers_under(out, name):
    """All teacher.pt of a data set, "*" for any, the newest first."""
    return sorted(out.glob(f"{name}/*/fold*/teacher.pt"), key=os.path.getmtime, reverse=True)


def chosen_teachers(args):
    """The teacher.pt of --teacher, or the newest under --out, of --dataset and --synthetic if they
    are given; or those beside it that --fold names."""
    name = (args.dataset or "*") + "-synthetic" * args.synthetic
    path = args.teacher or next(iter(teachers_under(args.out, name)), None)
    if not path:
        raise UserError(f"{args.out}: no {name}/*/fold*/teacher.pt; run train_teacher.py first")
    if path.is_dir():
        path /= "teacher.pt"
    folds = path.parent.parent
    if not args.fold:
        return [path]
    if "all" in args.fold:
        found = sorted(folds.glob("fold*/teacher.pt"))
        if not found:
            raise UserError(f"{folds}: no fold*/teacher.pt in it; give another --teacher")
        return found
    return [folds / f"fold{fold}/teacher.pt" for fold in args.fold]


def load_student(path):
    """A saved student, ready for code of your own: a models.Student in eval mode, on the CPU, whose
    `settings` say what it was made of.

    student(x) is Fused(output, z) of faces x (B, L, 3, F, H, W), uint8 or float in [0, 1], with L =
    settings["length"], H = W = settings["image_size"] and F = 10 frames (BioVid) or 8 (Affwild2) of
    a clip; or of a features file's visual rows (B, L, settings["visual_dim"]). Output: logits (B,
    classes), or valence and arousal (B, L, 2). UserError: not a student's checkpoint. ValueError in
    use: x of another shape, or float beyond 1.
    """
    student = student_of(load(path, "student"))
    student.register_forward_pre_hook(expect_input)
    return student


def expect_input(student, inputs):
    """Raises ValueError unless a student of `load_student` is given what it was trained on."""
    x, *_ = inputs
    settings = student.settings
    size = settings["image_size"]
    frames = data.CLIP // data.EVERY if settings["dataset"] == "affwild2" else data.PAIN_IMAGES
    faces = settings["dataset"] != "features"
    clip = (3, frames, size, size) if faces else (settings["visual_dim"],)
    wanted = settings["length"], *clip
    if x.shape[1:] != wanted or faces and x.is_floating_point() and x.max() > 1:
        kind = ", uint8 or float in [0, 1]" * faces
        raise ValueError(f"expected (B, {str(wanted)[1:-1]}){kind}; got {tuple(x.shape)} {x.dtype} "
                         f"up to {x.max():.3g}")


def student_of(state):
    student = build_student(state["settings"])
    student.load_state_dict(state["model"])
    student.settings = state["settings"]
    return student.eval()


def student_output(state, source, index, args, ranks):
    """Output of a saved student for windows of faces, in the precision that it was trained in."""
    student = student_of(state).to(args.device)
    settings = student.settings
    choice = settings["student"]

    def forward(clips):
        with autocast(args, choice["amp"] if choice["finetune"] else settings["amp"]):
            features = student.backbone(clips)
        with autocast(args, choice["amp"]):
            return student.fuse(features.float()).output

    return clip_answers(forward, source, "visual", index, settings, args, ranks)


def evaluate(args, ranks):
    """Test score of a saved student, from the faces alone: no privileged file is opened."""
    state = load(args.evaluate, "student")
    settings = state["settings"]
    wanted = state["test_names"]
    source = open_faces(settings, args, strict=False)  # other samples' faults do no harm
    missing = sorted(set(wanted) - set(getattr(source, "name", ())))
    if missing:
        folder = missing[0].rpartition("/")[0]
        reason = next((fault for fault in source.faults if folder in fault),
                      "give the --root it was trained on")
        raise UserError(f"{source.path}: lacks {len(missing)} of the student's {len(wanted)} test "
                        f"samples, first {missing[0]}; {reason}")
    windows = data.label_windows(source, source.label)
    windows = windows.take(np.isin(source.name[windows.index[:, 0].numpy()], wanted))
    if fingerprint(samples_of(source, windows)) != state["test_labels"]:
        raise UserError(f"{source.path}: its samples bear the names of the student's test samples, "
                        "but other labels; give the --root it was trained on")
    if ranks.rank == 0 and settings["dataset"] == "features":
        if content(source, ["visual"])["visual"] != settings["data"]["visual"]:
            print(f"note: {source.path} holds other visual rows than the student was trained on",
                  file=sys.stderr)
    output = student_output(state, source, windows.index, args, ranks)
    found = measure(source, windows, output)
    if ranks.rank == 0:
        print(f"{heading(settings)}, n = {found['n']}: "
              f"student {settings['student']['method']} {show(found)}")


def samples_of(source, windows):
    """{name: label} of samples, in the order of their names."""
    names = source.name[windows.index[:, 0].numpy()]  # no two alike
    return dict(sorted(zip(names.tolist(), windows.label, strict=True)))


def class_names(settings):
    """BL1, PA1 ... of BioVid; other classes have numbers."""
    outputs = settings["outputs"]
    biovid = settings["dataset"] in data.BioVid.COLUMN
    return data.BioVid.LEVELS[outputs] if biovid else range(outputs)


def predict_faces(args, ranks):
    """One csv line per sample (class probabilities) or clip (valence, arousal) of unlabelled faces,
    on stdout; what cannot be used is named on stderr, and the exit code, returned, is then 1."""
    if not args.student:
        raise UserError("--predict needs --student STUDENT.pt")
    state = load(args.student, "student")
    settings = state["settings"]
    source = open_faces(settings, args, args.predict)
    index, keep = data.windows(source.video, source.length)
    output = student_output(state, source, index, args, ranks)
    if ranks.rank > 0:
        return False
    write_predictions(sys.stdout, settings, source, index, keep, output)
    for fault in source.faults:
        print(fault, file=sys.stderr)
    return bool(source.faults)


def write_predictions(file, settings, source, index, keep, output, known=False):
    """csv: a line for each sample (class probabilities) or clip (valence, arousal), in their order;
    between name and prediction group and label, if they are known."""
    names = source.name
    if settings["task"] == "regression":  # each clip once
        rows, values = index[keep], output[keep]
        what, answer = "clip", ["valence", "arousal"]
        labels = ["label valence", "label arousal"]
    else:
        rows, values = index[:, 0], output.softmax(1)
        what, answer = "sample", [f"p({name})" for name in class_names(settings)]
        labels = ["label"]
        if settings["dataset"] != "features":  # BioVid's are <sample>/<clip>
            names = [name.rpartition("/")[0] for name in names]

    write = csv.writer(file, lineterminator="\n").writerow
    write([what, *["group", *labels] * known, *answer])
    for row, value in zip(rows.tolist(), values.tolist(), strict=True):
        line = [names[row]]
        if known:
            label = source.label[row].flatten().tolist()
            line += [source.group[row], *(f"{number:.4g}" for number in label)]
        write(line + [f"{number:.4f}" for number in value])


# ------------------------------------------------------------------------------ tables, figures

class Table(NamedTuple):
    title: str
    columns: dict  # {heading: flags}; its last word is the metric
    rows: dict  # {label: flags}; "-" is others' work, and not run
    paper: dict  # {label: {heading: the number as the paper prints it}}
    reference: tuple  # row (None: the same) and series that differences are to


class Cell(NamedTuple):
    """A row of a table in one of its columns."""
    metric: str
    reference: tuple  # the cell that its difference is to
    flags: Namespace | None  # the command's, with the column's and the row's; None: undefined
    teachers: list
    runs: dict  # {(fold, seed): results line}, see `runs_of`

    @property
    def values(self):
        return {run: line[self.metric] for run, line in self.runs.items()}


TABLE_I = {
    "biovid_a": "BioVid (A): visual (weak, prevalent) + EDA (strong, privileged), SEW",
    "biovid_b": "BioVid (B): visual (strong, prevalent) + EMG (weak, privileged), WES",
    "affwild2": "Affwild2: visual (strong, prevalent) + audio (weak, privileged), WES",
    "features": "features file: visual (prevalent) + privileged"}


def table_of(title, columns, rows, reference=("PKDOT", "")):
    """A table of columns "heading | flags" (of a figure: "series, heading"), and of rows "label |
    flags | the paper's number in each column". A row without numbers is not in the paper."""
    columns, rows = ([[*map(str.strip, line.split("|"))] for line in text.strip().splitlines()]
                     for text in (columns, rows))
    columns = dict(columns)
    paper = {label: dict(zip(columns, numbers, strict=False)) for label, _, *numbers in rows}
    return Table(title, columns, {label: flags for label, flags, *_ in rows}, paper, reference)


def dataset_of(flags):
    return parse(flags.split()).dataset


COLUMNS = """
    BioVid (B) accuracy | --dataset biovid_b
    Affwild2 valence    | --dataset affwild2
    Affwild2 arousal    | --dataset affwild2"""  # Table II's
TABLES = {
    "2": table_of("Table II: privileged KD methods", COLUMNS, """
        Cosine similarity [10]    | --method cosine    | 75.40 | 0.37 | 0.53
        MSE [8]                   | --method mse       | N/A   | 0.39 | 0.53
        KL [8]                    | --method kl        | 75.80 | N/A  | N/A
        PKDOT                     |                    | 78.76 | 0.43 | 0.56
        PKDOT, shared anchors     | --shared-anchors
        RKD [31]                  | --method rkd
        Similarity distributions  | --method similarity
        PKDOT + 0.4 KL            | --kl 0.4
        PKDOT, the last epoch     | --select last
        none (lambda 0)           | --method none
        Visual only (lower bound) | --role visual
        Multimodal (upper bound)  | --role multimodal"""),
    "3": table_of("Table III: visual-only methods, Affwild2 validation set", """
        Affwild2 valence | --dataset affwild2
        Affwild2 arousal | --dataset affwild2""", """
        ResNet-50 [44]            | -                  | 0.31 | 0.17
        SENet-50 [45]             | -                  | 0.28 | 0.34
        MobileNet [46]            | -                  | 0.28 | 0.44
        RegNet + GRU [47]         | -                  | 0.43 | 0.57
        ResNeXt + SENet [48]      | -                  | 0.51 | 0.48
        Visual only (lower bound) | --role visual      | 0.41 | 0.51
        none (lambda 0)           | --method none
        PKDOT                     |                    | 0.43 | 0.56
        Multimodal (upper bound)  | --role multimodal  | 0.67 | 0.59"""),
    "4": table_of("Table IV: visual-only methods, BioVid (A)", """
        BL1 vs. PA4 accuracy | --dataset biovid_a
        5 classes accuracy   | --dataset biovid_a --classes 5""", """
        Sparse LSTM [19]          | -                  | 61.70 | 29.70
        ViT [18]                  | -                  | 72.11 | NR
        FAD + RF [49]             | -                  | 72.40 | 30.80
        GNN [50]                  | -                  | 73.20 | NR
        ViT [51]                  | -                  | 73.28 | 31.52
        ResNet-18 [52]            | -                  | NR    | 36.60
        Visual only (lower bound) | --role visual      | 72.10 | 30.38
        none (lambda 0)           | --method none
        PKDOT                     |                    | 74.55 | 33.65
        Multimodal (upper bound)  | --role multimodal  | 83.50 | 36.40"""),
    "5": table_of("Table V: visual-only methods, BioVid (B)", """
        BioVid (B) accuracy | --dataset biovid_b""", """
        Handcrafted + RF [22]     | -                  | 72.70
        Visual only (lower bound) | --role visual      | 74.10
        none (lambda 0)           | --method none
        PKDOT                     |                    | 78.76
        Multimodal (upper bound)  | --role multimodal  | 81.30"""),
    "choices": table_of("Choices that the paper leaves open (not in the paper)", COLUMNS, """
        PKDOT                                 |
        anchors shared by the batch           | --shared-anchors
        anchors shared, random                | --shared-anchors --anchors random
        anchors: most similar                 | --anchors similar
        anchors: random                       | --anchors random
        no transport: row i with row i        | --no-transport
        similarity distributions              | --method similarity
        PKDOT + 0.4 KL                        | --kl 0.4
        not debiased (Eq. 5)                  | --no-debias
        T-Net's output zero                   | --hallucinate zero
        true privileged features (no student) | --hallucinate oracle
        backbone frozen                       | --no-finetune
        backbone trained                      | --finetune
        lambda 0.1                            | --lambda 0.1
        lambda 1                              | --lambda 1
        lambda 4                              | --lambda 4
        lambda 10                             | --lambda 10
        epoch chosen on the test fold         | --select test
        folds over clips                      | --folds clips
        the release's lambda and epsilon      | --lambda 0.6 --epsilon 0.01
        the release's protocol       | --lambda 0.6 --epsilon 0.01 --select test --folds clips
        none (lambda 0)                       | --method none
        Visual only (lower bound)             | --role visual
        Multimodal (upper bound)              | --role multimodal""")}
FIGURES = {
    "6": table_of("Figure 6: batch size and number of anchors", """
        k = 5, BioVid (B) accuracy  | --dataset biovid_b --k 5
        k = 15, BioVid (B) accuracy | --dataset biovid_b --k 15
        k = 30, BioVid (B) accuracy | --dataset biovid_b --k 30""", """
        batch size 32  | --batch-size 32
        batch size 64  | --batch-size 64
        batch size 128 | --batch-size 128
        batch size 256 | --batch-size 256""", ("batch size 128", "k = 30")),  # the paper's
    "7": table_of("Figure 7: epsilon", COLUMNS, """
        epsilon 0.001 | --epsilon 0.001
        epsilon 0.01  | --epsilon 0.01
        epsilon 0.1   | --epsilon 0.1
        epsilon 1     | --epsilon 1
        epsilon 10    | --epsilon 10""", ("epsilon 0.1", "")),  # the paper's
    "labels": table_of("Figure labels: number of labelled training samples (not in the paper)", """
        none, BioVid (A) accuracy         | --dataset biovid_a --method none
        PKDOT, BioVid (A) accuracy        | --dataset biovid_a
        PKDOT shared, BioVid (A) accuracy | --dataset biovid_a --shared-anchors
        row by row, BioVid (A) accuracy | --dataset biovid_a --shared-anchors --anchors random \
                                          --no-transport
        similarity, BioVid (A) accuracy   | --dataset biovid_a --method similarity --lambda 1
        KL, BioVid (A) accuracy           | --dataset biovid_a --method kl""", """
        labels 35  | --labelled 35
        labels 70  | --labelled 70
        labels 210 | --labelled 210
        labels all |""", (None, "none"))}  # no distillation, of as many labels


def read_results(path):
    """The lines of results.jsonl; one that is no run's, of a writer that was killed, say, is left
    out with a warning."""
    records = []
    text = path.read_text("utf-8-sig", errors="replace") if path.exists() else ""
    for count, line in enumerate(text.splitlines(), 1):
        if not line:  # where one writer met another halfway through
            continue
        try:
            record = json.loads(line)
            if not {"root", "task", "role", "fold"} <= {*record}:
                raise ValueError
            records.append(record)
        except (ValueError, TypeError):
            warn_once(f"warning: {path}, line {count} is no run's and is left out")
    return records


@cache
def warn_once(text):
    print(text, file=sys.stderr)


def empty_cells(table, args):
    """{(row, column): Cell} of a table, by label and heading, none of them run. Others' work has
    no cell."""
    label, series = table.reference
    cells = {}
    for (row, flags), (column, more) in product(table.rows.items(), table.columns.items()):
        if flags == "-":
            continue
        flags = parse(f"{more} {flags}".split(), with_flags(args))  # added to the command's
        metric = column.split()[-1]
        if flags.role == "student" and needs_classes(flags) and metric != "accuracy":
            flags = None
        other = f"{series}, {column.partition(', ')[2]}" if series else column
        cells[row, column] = Cell(metric, (label or row, other), flags, [], {})
    return cells


def fill(table, args, ranks):
    """Trains what the table lacks, teachers included. Returns its cells, what is not the default in
    its teachers, and why data sets or runs are missing."""
    cells = empty_cells(table, args)
    problems = []
    results = args.out / "results.jsonl"
    known = read_results(results)

    # the teachers: cells of one data set, with the same classes, labels and folds, share them
    teachers = {}
    notes = []
    runnable = [cell for cell in cells.values() if cell.flags]
    for cell in runnable:
        flags = cell.flags
        which = flags.dataset, flags.classes, flags.labelled, flags.folds
        if which not in teachers:
            teachers[which] = (recorded_teachers(flags, known) if args.print else
                               table_teachers(flags, ranks, problems))
            notes += notes_on(teachers[which], args)
        cell.teachers.extend(teachers[which])
    runs = [(cell, *run) for cell in runnable for run in runs_of(cell)]

    # the students that results.jsonl lacks by now
    known = read_results(results)
    missing = {}
    for _, _, teacher, flags in () if args.print else runs:
        if not line_of(teacher, flags, [] if args.fresh else known):
            missing[json.dumps(choices(flags, teacher))] = teacher, flags
    if missing and ranks.rank == 0:
        print(f"students to train: {len(missing)}", file=sys.stderr)
    wait_for_all()
    for teacher, flags in bar(trainings_of([*missing.values()], "students", ranks), "students"):
        try:
            record, _ = distil(teacher, flags)
            append_line(results, record)
        except UserError as error:  # one that diverges leaves its cell without this run
            problems.append(f"{flags.method} of {teacher['path']} not run: {error}")
    problems = chain.from_iterable(from_all(problems, ranks))

    # collect: of several lambdas the one that is best on validation
    known = read_results(results)
    for cell, run, teacher, flags in runs:
        line = line_of(teacher, flags, known)
        best = cell.runs.get(run)
        if line and not (best and best["validation"] >= line["validation"]):
            cell.runs[run] = line
    return cells, notes, dict.fromkeys(problems)


def runs_of(cell):
    """Yields fold and seed, teacher and flags of what a cell may hold: one for each fold and seed,
    and for each lambda to choose from. A bound has a run a fold, of seed None."""
    flags = cell.flags
    seeds, lambdas = range(flags.seed, flags.seed + flags.seeds), flags.lambdas
    if flags.role != "student":
        seeds = lambdas = [None]
    for teacher, seed, weight in product(cell.teachers, seeds, lambdas):
        settings = teacher["settings"]
        fold = settings["folds"], settings["fold"]  # divided otherwise, folds are no pair
        yield (fold, seed), teacher, with_flags(flags, seed=seed, lambdas=[weight])


def line_of(teacher, args, known):
    """The results line of a run, or None: of a bound its teacher's, of a student the last one of
    these flags."""
    settings = teacher["settings"]
    if args.role != "student":
        scores = teacher["metrics"].get(args.role)  # a run that was cut off may lack it
        return scores and settings | scores
    wanted = {key: settings[key] for key in ("dataset", "synthetic", "fold")}
    wanted |= {"role": "student"} | choices(args, teacher)
    return next((line for line in reversed(known) if wanted.items() <= line.items()), None)


def recorded_teachers(args, known):
    """What results.jsonl holds of a table's teachers, one a fold, like the newest: enough to find
    the lines of their students, and their own scores, without the data."""
    wanted = dict(dataset=args.dataset, labelled=args.labelled, folds=args.folds or "subjects")
    if not args.root:  # which says by itself whether it is a stand-in
        wanted["synthetic"] = args.synthetic
    if args.dataset in data.BioVid.COLUMN:
        wanted["outputs"] = args.classes or 2
    lines = [line for line in known if "teacher" in line and line["role"] != "student"
             and wanted.items() <= line.items() and {"all", str(line["fold"])} & {*args.fold}
             and (args.dataset != "features" or Path(line["root"]).stem == args.root.stem)]
    same = *defaults(args.dataset, synthetic=False), "data"
    lines = [line for line in lines if all(line.get(key) == lines[-1].get(key) for key in same)]
    newest = {line["fold"]: line for line in lines}
    return [{"settings": line, "made of": line["teacher"],
             "metrics": {other["role"]: other for other in lines
                         if other["teacher"] == line["teacher"]}} for line in newest.values()]


def teacher_settings(args):
    """A table's data set, and {teacher.pt: settings} of its teachers, one a fold: like the newest
    teacher that is there, or train_teacher.py's defaults."""
    given = values_of(args, "classes labelled folds face_start amp")
    settings, source = make_settings(args.dataset, args.root, args.synthetic, **given)
    for path in teachers_under(args.out, args.dataset + "-synthetic" * settings["synthetic"]):
        old = load(path, "teacher")["settings"]
        other_file = args.dataset == "features" and old["data"] != settings["data"]
        if other_file or old["outputs"] != settings["outputs"]:
            continue
        changed = {key: old[key] for key in settings if old[key] != settings[key]
                   and key not in "folds labelled root data".split()}
        like_it = settings, source
        if changed:
            like_it = make_settings(args.dataset, args.root, args.synthetic, **given | changed)
        if like_it[0]["data"] == old["data"]:
            settings, source = like_it
            break
    folds = folds_of(source, settings, args.fold)
    return source, {run_folder(one, args.out) / "teacher.pt": one for one in folds}


def notes_on(teachers, args):
    """Lines about what is not the default in a table's teachers, and what other root they had."""
    if not teachers:
        return
    settings = teachers[-1]["settings"]
    default = defaults(settings["dataset"], settings["synthetic"])
    if "few_labels" in settings:  # of results.jsonl: the rate that the default led to
        default["fusion_lr"] = fusion_lr(default, settings["few_labels"])
    said = ", ".join(f"{key} {settings[key]}" for key, value in default.items()
                     if key not in ("classes", "labelled", "folds") and settings[key] != value)
    if said:
        yield f"- {settings['dataset']}/{variant(settings)}: teachers with {said}"
    if args.root and Path(settings["root"]) != args.root:
        yield f"- the numbers are of {settings['root']}"


def table_teachers(args, ranks, problems):
    """A table's teachers; each rank trains its share of what is missing. A data set that is not
    there, or a teacher that diverges, is a line in problems."""
    try:
        source, wanted = teacher_settings(args)
    except UserError as error:
        problems.append(f"{args.dataset} not run: {error}")
        return []
    missing = [settings for path, settings in wanted.items() if not path.exists()]
    wait_for_all()  # until all have looked what is missing
    for settings in trainings_of(missing, "teachers", ranks):
        try:
            train_teacher(settings, source, args, ALONE)
        except UserError as error:
            problems.append(f"{args.dataset} fold {settings['fold']} not run: {error}")
    wait_for_all()
    return [open_teacher(path, settings) for path, settings in wanted.items() if path.exists()]


def interval(ours, theirs):
    """Mean and 95 % t interval of ours - theirs, {(fold, seed): score} each, paired by fold and
    seed -> (mean, low, high), NaN below two pairs. A bound (seed None) pairs with every seed.

    Seeds of one fold share its teacher and its test samples, so that a fold's differences are
    averaged first; with a single fold the seeds are what is left to vary. Folds share training
    data: in their variance the factor 1/J becomes 1/J + n_test/n_train (Nadeau and Bengio 2003),
    where a fifth of the data is for testing and the held-out groups count as training data.
    """
    by_fold = {}
    for fold, seed in ours.keys() | theirs.keys():
        value, other = (one.get((fold, seed), one.get((fold, None))) for one in (ours, theirs))
        if value is not None and other is not None:
            by_fold.setdefault(fold, []).append(value - other)
    sample = [statistics.mean(d) for d in by_fold.values()]
    shared = 1 / 4
    if len(sample) == 1:
        (sample,) = by_fold.values()
        shared = 0
    if len(sample) < 2:
        return [math.nan] * 3
    error = math.sqrt((1 / len(sample) + shared) * statistics.variance(sample))
    mean = statistics.mean(sample)
    half = stats.t.ppf(0.975, len(sample) - 1) * error
    return mean, mean - half, mean + half


class Point(NamedTuple):
    """A cell in numbers: over its runs, and its difference to its reference, as `interval` has it.
    """
    mean: float
    sd: float
    runs: int
    difference: float
    low: float
    high: float


def points_of(cells):
    """{(row, column): Point} of a table's cells."""
    points = {}
    for key, cell in cells.items():
        values = [*cell.values.values()]
        mean = statistics.mean(values) if values else math.nan
        sd = statistics.stdev(values) if len(values) > 1 else 0.0
        paired = interval(cell.values, cells[cell.reference].values)
        points[key] = Point(mean, sd, len(values), *paired)
    return points


def format_cell(cell, point, own):
    """Ours, what it is over, and the difference to the reference, in bold if beyond the noise:
    "76.00 ± 5.89 (2 folds x 3 seeds); +1.20 [-0.30, +2.70]". own: it is its own reference."""
    if not cell.flags:
        return "n/a"
    if not cell.runs:
        return "not run"
    form = ".2f" if cell.metric == "accuracy" else ".3f"
    folds, seeds = map(set, zip(*cell.runs, strict=True))
    over = " x ".join(f"{len(found)} {what}{'s' * (len(found) > 1)}" for what, found in
                      {"fold": folds, "seed": seeds - {None}}.items() if found)
    sd = f" ± {point.sd:{form}}" * (point.runs > 1)
    text = f"{point.mean:{form}}{sd} ({over})"
    if own or math.isnan(point.difference):
        return text
    # two equal differences prove nothing
    bold = "" if point.low <= 0 <= point.high or point.low == point.high else "**"
    gap = f"{point.difference:+{form}} [{point.low:+{form}}, {point.high:+{form}}]"
    return f"{text}; {bold}{gap}{bold}"


CAPTION = """
After the semicolon: the difference to {}, paired by fold and seed, with a 95 % interval
over folds (over the seeds of a single split), corrected for the training data that folds share
(Nadeau and Bengio 2003); bold where that leaves out 0, else it may be noise. The visual-only
network is stage 1's: what a student gains over it, the whole pipeline gives; what it gains over
"none", its own network without a distillation term, the term. ± is the standard deviation."""


def label_of(table, row, args):
    """A row's label; beside the paper's number it says which flags are not the paper's."""
    own = table.rows[row]
    flags = "labelled folds"
    if "--role" not in own:
        flags += " lambdas k epsilon batch_size lr epochs finetune select"
    typed = given(args, flags)
    return f"{row} ({typed})" if typed and table.paper[row] and own != "-" else row


def format_table(table, cells, points, lines, args):
    """The table in Markdown: for each column the paper's number, ours and a paired difference.
    lines: what results.jsonl holds of its runs."""
    title, columns, rows, paper, reference = table
    text = [f"**{title}**", ""]
    for dataset in dict.fromkeys(map(dataset_of, columns.values())):
        heads = sorted({line["fusion"] for line in lines if line["dataset"] == dataset})
        text.append(f"{TABLE_I[dataset]}, fusion {' and '.join(heads) or '-'}")

    published = any(paper.values())
    heads = [f"{column}{': paper | here' * published}" for column in columns]
    text += ["", f"| | {' | '.join(heads)} |", "|---" * (1 + len(columns) * (1 + published)) + "|"]
    for row in rows:
        shown = [label_of(table, row, args)]
        for column in columns:
            key = row, column
            cell = cells.get(key)
            here = format_cell(cell, points[key], cell.reference == key) if cell else ""
            shown.append(f"{paper[row].get(column, '-')} | " * published + here)
        text.append(f"| {' | '.join(shown)} |")

    text.append("")
    if any(line["labelled"] for line in lines):
        text.append("- --labelled hides labels of the training part alone: the validation part, "
                    "which chooses epochs and lambda, keeps its own")
    text += dict.fromkeys(
        "- fewer than {batch_size} training samples: there batch size {batch_size} is b = {b}"
        .format_map(line) for line in lines if "b" in line and line["b"] < line["batch_size"])
    return "\n".join([*text, *format_lambdas(cells), CAPTION.format(named(reference))])


def named(reference):
    return " ".join(filter(None, reference))


def format_lambdas(cells):
    """A line for each cell whose students are chosen among several lambdas."""
    for (row, column), cell in cells.items():
        flags = cell.flags
        if not cell.runs or flags.role != "student" or flags.method == "none":
            continue
        if len(flags.lambdas) > 1:
            times = Counter(line["lambda"] for line in cell.runs.values())
            chosen = ", ".join(f"{n} times {weight:g}" for weight, n in sorted(times.items()))
            yield f"- lambda chosen on validation, {row}, {column}: {chosen}"


def for_features(table, args):
    """A table's comparison on a features file: the same rows, the file's own metric, no number of
    the paper's."""
    if not args.root:
        raise UserError("--dataset features: give its --root FILE.npz, too")
    if args.print:
        lines = read_results(args.out / "results.jsonl")
        task = next((line["task"] for line in lines if Path(line["root"]).stem == args.root.stem),
                    "classification")
    else:
        task = data.Features(args.root).task
    metrics = ["valence", "arousal"] if task == "regression" else ["accuracy"]
    name = next(iter(table.columns)).rpartition(", ")[2]
    columns = {column.replace(name, f"{args.root.stem} {metric}"): f"{flags} --dataset features"
               for metric in metrics for column, flags in table.columns.items() if name in column}
    rows = {row: flags for row, flags in table.rows.items() if flags != "-"}
    # the title without its data set
    return table._replace(title=table.title.partition(",")[0], columns=columns, rows=rows,
                          paper=dict.fromkeys(rows, {}))


def choose_table(args):
    """The table or figure that is asked for; under --dataset, of this data set alone."""
    table = (TABLES | FIGURES)[args.table or args.figure]
    if args.dataset == "features":
        return for_features(table, args)
    if args.classes == 5 and any(table.paper.values()):
        raise UserError(f"--classes 5: the paper's numbers in {table.title} are of two classes, "
                        "Table IV's second column of five; leave it out, or see --table choices")
    columns = {column: flags for column, flags in table.columns.items()
               if args.dataset in (None, dataset_of(flags))}
    if not columns:
        raise UserError(f"--dataset {args.dataset}: {table.title} has no column of it")
    if args.root and len({*map(dataset_of, columns.values())}) > 1:
        raise UserError(f"--root {args.root}: {table.title} is of several data sets; "
                        "say which one with --dataset")
    return table._replace(columns=columns)


def print_table(args, ranks):
    """The table, or the figure as a table before it is drawn."""
    begin = time.time()
    table = choose_table(args)
    cells, notes, problems = fill(table, args, ranks)
    if ranks.rank > 0:
        return
    lines = {id(line): line for cell in cells.values()
             for line in cell.runs.values()}.values()  # one of two metrics once
    synthetic = any(line["synthetic"] for line in lines)
    table = table._replace(title="SYNTHETIC DATA - " * synthetic + table.title)
    points = points_of(cells)
    text = format_table(table, cells, points, lines, args)
    print(f"{' '.join(sys.argv)}\n", text, *notes, sep="\n")
    edited = sum(line.get("code", code()) != code() for line in lines)
    if edited:
        print(f"- {edited} students were trained by other code than today's; --fresh trains them "
              "again")
    print(f"\n{time.time() - begin:.0f} s on {args.device}, torch {torch.__version__}")
    if not lines:
        raise UserError("; ".join(problems) or f"{args.out}/results.jsonl holds none of these "
                        "runs; leave --print out to train them")
    for problem in problems:
        print(problem, file=sys.stderr)
    if args.figure:
        header = "row", "column", *Point._fields, "data"
        rows = [[*key, *point, "SYNTHETIC" * synthetic] for key, point in points.items()]
        draw = partial(draw_lines, table, points)
        save_figure(table.title, synthetic, [header, *rows], draw, args)


def draw_lines(table, points, figure):
    """Figures 6, 7 and labels. A row of two axes for each unit: the scores, and the paired
    differences to a common reference with their band."""
    panels = {}  # valence and arousal share one
    for column in table.columns:
        unit = "accuracy (%)" if column.endswith("accuracy") else "CCC"
        panels.setdefault(unit, []).append(column)
    figure.set_size_inches(10, 4 * len(panels))
    axes = figure.subplots(len(panels), 2, squeeze=False)
    what, _, _ = next(iter(table.rows)).rpartition(" ")
    x = [row.split()[-1] for row in table.rows]
    for (raw, paired), (unit, columns) in zip(axes, panels.items(), strict=True):
        for column in columns:
            line = [points[row, column] for row in table.rows]
            mean, sd, _, difference, low, high = zip(*line, strict=True)
            raw.errorbar(x, mean, sd, marker="o", capsize=3, label=column)
            paired.plot(x, difference, marker="o", label=column)
            paired.fill_between(x, low, high, alpha=0.15)
        raw.set(xlabel=what, ylabel=f"{unit}, mean ± sd")
        paired.set(xlabel=what, ylabel=f"difference to {named(table.reference)}, 95 % band")
    for axis in axes.flat:
        axis.legend(fontsize="small")


def save_figure(title, synthetic, numbers, draw, args):
    """A figure's numbers, {name: array} as npz or lines as csv, and if matplotlib is installed its
    png, by draw(figure)."""
    source = args.root.stem if args.dataset == "features" else args.dataset
    parts = f"figure{args.figure}", source, "finetune" * args.finetune, "synthetic" * synthetic
    arrays = isinstance(numbers, dict)
    path = args.out / f"{'-'.join(filter(None, parts))}{'.npz' if arrays else '.csv'}"
    with data.replacing(path) as part:
        if arrays:
            np.savez(part, **numbers)
        else:
            with open(part, "w", newline="") as file:
                csv.writer(file).writerows(numbers)
    print(path)
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("matplotlib is not installed: no png")
        return
    figure = Figure(layout="constrained")
    figure.suptitle(title)
    draw(figure)
    path = path.with_suffix(".png")
    with data.replacing(path) as part:
        figure.savefig(part, dpi=90)
    print(path)


FIGURE_5 = {  # the student's panels, and what trains it
    "before training": "",
    "own anchors": "--method pkdot",
    "shared anchors": "--shared-anchors",
    "row by row": "--shared-anchors --anchors random --no-transport"}


def figure_5(args, ranks):
    """Similarity matrices (Eq. 4) of the teacher, and of the student before and after training, in
    three ways, over up to 128 training samples, sorted by class or by valence."""
    args.dataset = args.dataset or "biovid_b"
    args.fold = [args.fold[0].replace("all", "1")]  # it shows one teacher
    problems = []
    teachers = table_teachers(args, ranks, problems)
    if not teachers:
        problems = chain.from_iterable(from_all(problems, ranks))
        raise UserError("; ".join(dict.fromkeys(problems)))
    if ranks.rank > 0:
        return
    for note in notes_on(teachers, args):
        print(note)
    teacher, = teachers
    settings = teacher["settings"]
    features, fold = teacher_data(teacher, args)

    train = fold.train.take(fold.train.labelled)
    count = len(train.index)
    train = train.take(torch.linspace(0, count - 1, min(count, 128)).long())
    rank = train.label if train.label.ndim == 1 else train.label[..., 0].nanmean(1)
    train = train.take(rank.argsort(stable=True))
    z_t = teacher_answers(teacher, features, train.index).z
    S = {"teacher": cosine_similarity_matrix(z_t).cpu()}

    # the last epoch, whichever is the best: the figure is about training
    see = what_the_student_sees(features, settings, args)
    for name, flags in FIGURE_5.items():
        one = parse(flags.split(), with_flags(args, select="last"))
        if flags:
            _, student = distil(teacher, one)
        else:
            seed_all(args.seed, 3)
            student, _ = make_student(teacher, args)
        network = student.eval() if args.finetune else student.fuse
        z_s = student_answers(network, see, train.index, args, ALONE, "z")
        S[name] = cosine_similarity_matrix(z_s)

    for name, matrix in S.items():
        print(f"{name}: mean similarity {matrix.mean():.3f}, "
              f"mean |S - S_teacher| {(matrix - S['teacher']).abs().mean():.3f}")
    synthetic = settings["synthetic"]
    title = (f"{'SYNTHETIC DATA - ' * synthetic}Figure 5: similarity matrices, {args.dataset} fold "
             f"{settings['fold']}")
    draw = partial(draw_matrices, S, train.label, class_names(settings))
    save_figure(title, synthetic, S, draw, args)


def draw_matrices(S, label, names, figure):
    """The similarity matrices side by side; label (b,) and names say where each class lies, labels
    (b, L, 2) have none."""
    figure.set_size_inches(3.2 * len(S), 3.6)
    axes = figure.subplots(1, len(S))
    for axis, (title, matrix) in zip(axes, S.items(), strict=True):
        image = axis.imshow(matrix.numpy(), vmin=-1, vmax=1, cmap="RdBu_r")
        axis.set(title=title, xlabel="training samples")
        if label.ndim > 1:
            axis.set_ylabel("sorted by valence")
            continue
        level, count = label.unique_consecutive(return_counts=True)
        end = count.cumsum(0) - 0.5
        shown = [names[i] for i in level]
        axis.set_xticks(end - count / 2, shown)
        axis.set_yticks(end - count / 2, shown, rotation=90, va="center")
        for line, edge in product((axis.axvline, axis.axhline), end[:-1]):
            line(edge, color="black", lw=0.8)
    figure.colorbar(image, ax=axes, label="cosine similarity (Eq. 4)", shrink=0.8)


def parse(argv=None, namespace=None):
    """The flags in argv; those that it leaves out are the namespace's, if there is one."""
    parser = Parser(__doc__)
    count = at_least(1)
    number = at_least(0, float)

    add = parser.add_argument_group("what to train").add_argument
    add("--teacher", type=data.a_path, help="default: the newest teacher.pt under --out")
    add("--dataset", choices=data.DATASETS,
        help="default: the newest teacher's; of a table, all of its columns")
    add("--fold", nargs="+", choices=[*"12345", "all"],
        help="whose teachers to take; default: --teacher's fold, in tables all")
    add("--finetune", action=BooleanOptionalAction, default=False,
        help="train the visual backbone too, from video; default: frozen")
    add("--batch-size", type=at_least(2), default=128, help="b in Eq. 1; default 128")
    add("--lr", type=number, default=1e-4, help="default 1e-4")
    add("--epochs", type=count,
        help=f"default {EPOCHS} (the release's); {STAND_IN_EPOCHS} on a stand-in")
    add("--select", choices=("val", "test", "last"), default="val",
        help="what chooses the epoch: held-out groups (val, the default), the test fold (test, as "
             "the release does), or nothing (last)")
    add("--chunk", type=count,
        help="--finetune: clips in the backbone at a time; less memory, the same gradient; default "
             "all")

    add = parser.add_argument_group("the method").add_argument
    add("--method", choices=METHODS, default="pkdot", help="default pkdot")
    add("--lambda", dest="lambdas", type=number, nargs="+", default=[0.4],
        help="weight of W in Eq. 9; default 0.4; a table chooses among several on validation")
    add("--k", type=count, default=30, help="anchors; default 30")
    add("--epsilon", type=at_least(1e-6, float), default=0.1,
        help="Eq. 5, in units of 1/2 |x - y|^2; default 0.1 (the release's blur 0.1 is 0.01)")
    add("--shared-anchors", dest="shared", action="store_true",
        help="one set of anchors for the batch; default: each row its own")
    add("--kl", type=number, default=0.0, metavar="A",
        help="weight of KL (classes alone) beside the method; default 0")

    add = parser.add_argument_group("ablations").add_argument
    add("--no-debias", dest="debias", action="store_false",
        help="the cost of Eq. 5 itself; default: the debiased divergence")
    add("--anchors", choices=ANCHORS, default="dissimilar", help="default dissimilar, the paper's")
    add("--no-transport", dest="transport", action="store_false",
        help="compare row i with row i; default: optimal transport")
    add("--hallucinate", choices=("tnet", "zero", "oracle"), default="tnet",
        help="in tables: what stands for the privileged features; default tnet; oracle: themselves")
    add("--role", choices=("student", "visual", "multimodal"), default="student",
        help="in tables: the student (default), or one of its two bounds")

    group = parser.add_argument_group("instead of training a student")
    job = group.add_mutually_exclusive_group().add_argument
    job("--evaluate", type=data.a_path, metavar="STUDENT.pt",
        help="a saved student's test score, from faces")
    job("--predict", type=data.a_path, metavar="FACES",
        help="csv of the predictions of --student for a folder of face crops, or a features file")
    job("--table", choices=TABLES, help="the paper's table, or our choices; trains what is missing")
    job("--figure", choices=("5", *FIGURES), help="the paper's figure, likewise")
    group.add_argument("--student", type=data.a_path, metavar="STUDENT.pt", help="for --predict")

    add = parser.add_argument_group("tables and figures").add_argument
    add("--seeds", type=count, default=1, help="students a fold; default 1")
    add("--fresh", action="store_true", help="train the students again; default: what is missing")
    add("--print", action="store_true",
        help="of what results.jsonl holds; no data is read, nothing trained")

    add_common_flags(parser)
    return parser.parse_args(argv, namespace)


def given(args, dests):
    """Those of the flags that are not at their defaults, as they are typed."""
    names = dict(lambdas="lambda", debias="no-debias", shared="shared-anchors",
                 transport="no-transport")
    default = vars(parse([]))
    typed = []
    for dest, value in values_of(args, dests).items():
        if value != default[dest]:
            values = [] if isinstance(value, bool) else np.ravel(value)
            name = names.get(dest, dest).replace("_", "-")
            typed.append(" ".join([f"--{name}", *map(str, values)]))
    return " ".join(typed)


def misplaced(args):
    """Yields flags that mean nothing to this command, and what to do."""
    if len(args.lambdas) > 1 and not (args.table or args.figure in FIGURES):
        yield "lambdas", "several values are for --table, and --figure but 5; give one"
    if not args.finetune:
        yield "chunk", "for --finetune: without it no clip passes the backbone; leave it out"

    if args.table or args.figure:
        own = "method role hallucinate teacher kl"  # what the rows and columns are about
        if args.figure == "labels":
            own += " labelled"
        elif args.figure == "5":
            own += " anchors shared transport"
            yield "print", "figure 5 is made of students, not of results; leave it out"
        elif args.table and args.table != "choices":
            own += " anchors shared transport debias"
        yield own, ("the rows of --table and --figure say what they are; leave it out, or see "
                    "--table choices")
    elif args.evaluate or args.predict:
        own = "evaluate predict student root face_start seed device workers amp out resume".split()
        yield (" ".join(flag for flag in vars(args) if flag not in own),
               "a saved student has its own; leave it out")
    else:
        own = METHODS[args.method].flags.split()
        yield (" ".join(flag for flag in METHODS["pkdot"].flags.split() if flag not in own),
               f"--method {args.method} does not read it; leave it out")
        yield "labelled folds classes", "a teacher's; give it to train_teacher.py"
        yield "seeds fresh print hallucinate role", "for --table and --figure; leave it out"
        yield "student", "for --predict; leave it out"


def values_of(args, dests):
    return {dest: vars(args)[dest] for dest in dests.split()}


def with_flags(args, **change):
    return Namespace(**vars(args) | change)


def main():
    args = parse()
    code()
    ranks = join_ranks(args)
    if not (args.evaluate or args.predict or args.print):
        data.writable(args.out)
    if "k" in METHODS[args.method].flags.split() and args.k > args.batch_size:
        raise UserError(f"--k {args.k}: the similarity matrix has only --batch-size "
                        f"{args.batch_size} rows; lower --k or raise --batch-size")
    for flags, why in misplaced(args):
        if typed := given(args, flags):
            raise UserError(f"{typed}: {why}")
    table = args.table or args.figure
    if table:
        args.fold = args.fold or ["all"]
        args.resume = True  # what is trained already stays
    if args.evaluate:
        job = evaluate
    elif args.predict:
        job = predict_faces
    elif args.figure == "5":
        job = figure_5
    elif table:
        job = print_table
    else:
        job = distil_folds
    failed = job(args, ranks)
    leave_ranks()
    sys.exit(failed)


def distil_folds(args, ranks):
    """The students that a command without --table asks for; of several folds each rank has some."""
    paths = chosen_teachers(args)
    together = args.finetune and len(paths) == 1  # one that all ranks train
    teachers = [open_teacher(path) for path in paths]  # all, before the first student
    wait_for_all()
    found = {}
    settings = None  # of a rank that only waits
    for teacher in teachers if together else trainings_of(teachers, "students", ranks):
        settings = teacher["settings"]
        one = keep_student(teacher, args, ranks if together else ALONE)
        if one:
            found[settings["fold"]] = one
    print_mean(found, settings, ranks)


def expect_same_data(source, settings):
    """Raises UserError unless the data set holds the faces and labels that a teacher was trained
    on, wherever it lies; of a features file that was read whole, the privileged rows, too."""
    views = getattr(source, "rows", ["visual"])
    if not content(source, views).items() <= settings["data"].items():
        raise UserError(f"{source.path}: its samples are not those that the teacher was trained "
                        "on; train the teacher again, or give the --root it was trained on")


def keep_student(teacher, args, ranks):
    """Trains a student, unless --resume finds it finished; prints its scores between its teacher's,
    and returns them, or None in the ranks that only helped."""
    settings = teacher["settings"]
    found = teacher["metrics"]
    run = run_folder(settings, args.out)  # also of a teacher that lies elsewhere
    finished = run / f"student-{args.method}.pt"
    if needs_classes(args) and settings["task"] == "regression":
        raise UserError("--method kl and --kl compare class probabilities, and valence/arousal has "
                        "none; choose another method, similarity for one")
    if not args.finetune:  # which opens the data, and looks, itself
        root = args.root or Path(settings["root"])
        if args.root or root.is_file() or any(root.glob("*")):
            file = settings["dataset"] == "features"
            expect_same_data(data.Features(root) if file else open_faces(settings, args), settings)
        elif ranks.rank == 0:
            print(f"{root} is not there: the features that were extracted suffice")
    if ranks.rank == 0:
        print(f"{teacher['path']}, test: visual only {show(found['visual'])}, "
              f"teacher {show(found['multimodal'])}")

    whole = settings | {"student": choices(args, teacher)}
    with one_at_a_time(finished, ranks) as waited:
        old = (args.resume or waited) and finished.exists() and load(finished, "student")
        if old and old["settings"] | {"root": None} == whole | {"root": None}:
            record = old["record"]
            if ranks.rank == 0:
                print(f"{finished} is finished")
        else:
            record, _ = distil(teacher, args, ranks, run)
            if ranks.rank == 0:
                append_line(args.out / "results.jsonl", record)
    if ranks.rank > 0:
        return
    found = {"visual": found["visual"], f"student, {args.method}": record,
             "multimodal": found["multimodal"]}
    print(f"{heading(settings)}, n = {record['n_test']}: {answer(found)}")
    return found


if __name__ == "__main__":
    data.run(main)
