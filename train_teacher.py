"""Stages 1 and 2: a backbone per modality, then the fusion head and the T-Net on their features.

    python train_teacher.py --dataset biovid_b --synthetic     # no data needed; minutes on a CPU
    python train_teacher.py --dataset affwild2
    python train_teacher.py --dataset biovid_a --classes 5 --fold all
    python train_teacher.py --dataset features --root my.npz --labelled 60

A run is a folder <out>/<dataset>[-synthetic]/<variant>/fold<n>/ with teacher.pt and log.jsonl. The
variant is c<classes>, or va for valence/arousal, and whatever else makes another teacher (-jca,
-60labels). Stage 1 (visual.pt, privileged.pt, features.npz) lies in the variant without -jca: three
fusion heads share one training of the backbones. The scores are lines of <out>/results.jsonl.

The helpers that both training scripts use stand in the first half of this file.
"""
import argparse
import hashlib
import json
import os
import re
import sys
import time
import warnings
import zipfile
from collections import ChainMap
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torchvision
from torch import nn
from torch.utils.data import DataLoader

import data
import models
from data import DATASETS, Parser, UserError, fold_windows
from pkdot import metrics, task_loss

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None

SAVE_EVERY = 30  # seconds between two files to resume from: an epoch on features is shorter


def at_least(least, kind=int):
    """An argparse type: a finite number from `least` on."""
    def number(text):
        value = kind(text)
        if not least <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not a number from {least} on")
        return value
    return number


def add_common_flags(parser):
    add = parser.add_argument_group("data, machine, output").add_argument
    add("--root", type=data.a_path, help="the data; default: data/<dataset>")
    add("--synthetic", action="store_true", help="use a synthetic stand-in, written on first use")
    add("--classes", type=int, choices=(2, 5), help="BioVid: BL1 and PA4, or all five; default 2")
    add("--folds", choices=("subjects", "clips"),
        help="what folds divide; clips puts a person into training and test; default subjects")
    add("--labelled", type=at_least(1), metavar="N",
        help="training samples that keep their label, the others are pairs without; default all")
    add("--face-start", type=at_least(0, float), metavar="SECONDS",
        help="where in BioVid's videos image 1 lies; default 0, or the teacher's")
    add("--seed", type=at_least(0), default=0,
        help="of weights and batch order; default 0; folds stay")
    add("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, mps")
    add("--workers", type=at_least(0), default=2, help="processes that decode files; default 2")
    add("--amp", action="store_true", help="bfloat16 autocast on CUDA (the OT stays in float32)")
    add("--out", type=data.a_path, default="runs",
        help="where runs and results.jsonl live; default runs")
    add("--resume", action="store_true", help="go on where an interrupted run stopped")


def choose_device(name, amp=False):
    """The device of --device; --amp is CUDA's alone. On a CPU with AVX512_BF16 and no AMX, torch
    2.14's bfloat16 gradient of a 3x3x3 convolution over two frames (R3D-18's last layer) is off by
    100 % or infinite."""
    if name == "auto":
        name = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    try:
        device = torch.empty(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}; torch finds "
                        f"{torch.accelerator.device_count()} GPUs (one a process)") from None
    if amp and device.type != "cuda":
        raise UserError(f"--amp is for CUDA, and this runs on {device}: leave it out, "
                        "float32 is right everywhere")
    return device


def autocast(args, enabled):
    return torch.autocast(args.device.type, torch.bfloat16, enabled=enabled)


class Ranks(NamedTuple):
    """The processes that work on one training: this one's number, and how many there are."""
    rank: int
    world: int


ALONE = Ranks(0, 1)  # without torchrun, and where each rank has trainings of its own


def join_ranks(args):
    """Sets args.device; under torchrun, the ranks meet here. Returns all of them."""
    args.device = choose_device(args.device, args.amp)
    if not os.environ.get("RANK"):  # a WORLD_SIZE alone may be a scheduler's
        return ALONE
    missing = {"WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} - os.environ.keys()
    if missing:
        raise UserError(f"RANK is set but {', '.join(sorted(missing))} is not: start the command "
                        "with torchrun --standalone --nproc_per_node=N, or unset RANK")
    ranks = Ranks(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    if ranks.world == 1:
        return ALONE
    backend = "gloo"
    if args.device.type == "cuda":
        backend = "nccl"
        args.device = choose_device(f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(args.device)
    # some ranks wait for others to train whole folds
    dist.init_process_group(backend, timeout=timedelta(days=7))
    return ranks


def wait_for_all():
    if dist.is_initialized():
        dist.barrier()


def leave_ranks():
    """Without the barrier, a gloo process that leaves early may abort the others."""
    wait_for_all()
    if dist.is_initialized():
        dist.destroy_process_group()


def first_of_all():
    """Whether no other process than this one should write what all need, or show a bar."""
    return not dist.is_initialized() or dist.get_rank() == 0


def trainings_of(jobs, what, ranks):
    """This rank's share of whole trainings; one that has none says so."""
    mine = jobs[ranks.rank::ranks.world]
    if jobs and not mine:
        print(f"rank {ranks.rank} only waits: {ranks.world} processes, {what} to train: "
              f"{len(jobs)}")
    return mine


@contextmanager
def one_at_a_time(path, ranks):
    """In this block no other command trains what lies at the path, a fold's folder or a student.
    Yields whether another one did until now: of two that train the same thing, the second uses what
    the first has finished.

    The lock, a file beside it, ends with its process, however that ends. Where a file system knows
    no locks, nobody waits.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    waited = False
    with open(path.with_name(f".{path.name}.lock"), "a") as file:
        try:
            if ranks.rank == 0:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{path}: another process works on it; this one waits")
            fcntl.flock(file, fcntl.LOCK_EX)
            waited = True
        except (OSError, AttributeError):
            pass
        yield from_all(waited, ranks)[0]  # the other ranks wait here for the first


def share(batch, ranks):
    """This rank's part of a batch of numbers, as long as every other rank's: the last ranks repeat
    the batch's first."""
    size = -(-len(batch) // ranks.world)
    return torch.from_numpy(np.resize(batch, (ranks.world, size)))[ranks.rank]


def gather(x, count, ranks):
    """The batch's `count` rows, with gradient, from all ranks' shares of it. A loss is of the whole
    batch: CCC, PKDOT and RKD couple its samples, and a mean of the ranks' losses is another one.

    Every rank computes the same loss and goes backward through its own rows; of the ranks' sum,
    which is the whole gradient, DistributedDataParallel takes the mean.
    """
    if ranks.world == 1:
        return x
    rows = [torch.empty_like(x) for _ in range(ranks.world)]
    dist.all_gather(rows, x.detach().contiguous())
    if x.requires_grad:
        rows[ranks.rank] = own = x.clone()  # x may have another gradient from elsewhere, as z has
        own.register_hook(lambda grad: grad * ranks.world)
    return torch.cat(rows)[:count]


def spread(model, args, ranks):
    """The model over all ranks. Its batch norm sees the whole batch on CUDA alone (what `share`
    repeats counts twice): on a CPU torch has no such layer, and each rank's statistics are of its
    own share. Dropout, which joint cross-attention has, is drawn by each rank for its share."""
    if ranks.world == 1:
        return model
    if args.device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return nn.parallel.DistributedDataParallel(model)


def seed_all(*numbers):
    """Seed torch from a run's seed, its stage and the epoch (from 1: numpy takes a last 0 for
    none), so that a resumed run draws what an uninterrupted one draws."""
    torch.manual_seed(np.random.SeedSequence(numbers).generate_state(1).item())


def fingerprint(thing):
    """12 hex digits that say what a thing is: plain values, arrays and tensors, in dicts or lists
    as deep as you like."""
    def of_array(x):
        x = np.asarray(x.cpu() if torch.is_tensor(x) else x)
        return f"{x.dtype} {x.shape} {hashlib.sha256(x.tobytes()).hexdigest()}"

    text = json.dumps(thing, default=of_array)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def save(path, state):
    """torch.save that leaves the old file or the new one, never half of it."""
    with data.replacing(path) as part:
        torch.save(state | {"seal": fingerprint(state)}, part)


def read_checkpoint(path):
    """What torch.save wrote, on the CPU; code in the file is not run."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; give another, or train it first (beside a "
                        "teacher.pt belong stage 1's visual.pt and features.npz)")
    try:
        with warnings.catch_warnings(action="ignore"):  # torch's, about files not its own
            # torch does not compare the checksums that a zip file has
            if zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip():
                raise zipfile.BadZipFile
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes raise all kinds
        if data.lacks_memory(error):
            raise
        code = re.search(r"GLOBAL (\S+)", str(error))
        reason = getattr(error, "strerror", None) or (
            f"it holds code, {code[1]}" if code else type(error).__name__)
        raise UserError(
            f"{path}: cannot be loaded ({reason}); give another file, of tensors and no code "
            "(torch.save(model.state_dict(), FILE)), or move it away and train or download it "
            "again") from None


def load(path, kind, wanted=None):
    """A checkpoint that `save` wrote; UserError unless it is a `kind` ("teacher", ...), and of the
    wanted settings, if they are given: wherever its data lay, if they are the same."""
    state = read_checkpoint(path)
    try:
        if state.pop("seal") != fingerprint(state) or state["kind"] != kind:
            raise ValueError
    except Exception:  # any kind of content
        raise UserError(f"{path}: not a {kind} checkpoint as these scripts write it; "
                        "give another file, or delete it and train it again") from None
    wanted = wanted or state["settings"]
    there = dict(flat(state["settings"]))
    for key, new in flat(wanted):
        old = there.get(key)
        if key != "root" and old != new:
            raise UserError(f"{path} was trained with {key} {old}, not {new}; use the same flags "
                            "and unchanged data, or another --out, or delete its folder")
    state["settings"]["root"] = wanted["root"]  # where the data lies by now
    return state


def flat(settings, of=""):
    """The names and values in a dict of dicts: "data visual", say."""
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from flat(value, f"{of}{key} ")
        else:
            yield of + key, value


def append_line(path, record):
    """One JSON line, on a line of its own even if the last writer was killed halfway through; makes
    the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+") as file:
        file.seek(max(file.tell() - 1, 0))
        torn = file.read(1) not in (b"", b"\n")
        file.write(b"\n" * torn + json.dumps(record).encode() + b"\n")


def ran_on(args, ranks, settings, train):
    """What a training ran on, beside its settings: for the screen, its log and results.jsonl.

    few_labels: whether fewer than half of the training samples (tiles) have a label. [ours] Then
    stage 2 has a higher rate, for the T-Net's sake, and stage 3 draws labelled samples for each
    step.
    """
    of = f"threads {torch.get_num_threads()}"
    if args.device.type == "cuda":
        of = torch.cuda.get_device_name(args.device)
    unlabelled = int((~train.labelled).sum())
    few = 2 * unlabelled > len(train.index)
    return dict(device=f"{args.device}, {of}", processes=ranks.world, unlabelled=unlabelled,
                few_labels=few, fusion_lr=fusion_lr(settings, few))


def fusion_lr(settings, few):
    """Stage 2's rate: that of --fusion-lr or of the data set, else the regime's."""
    lr = settings["fusion_lr"]
    return (1e-3 if few else 1e-4) if lr is None else lr


def start_log(run, settings, **ran):
    """The first line of a command's log: the command, and what it ran with, which is shown."""
    print(f"{run}:", ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in ran.items()))
    append_line(run / "log.jsonl", ran | {
        "command": " ".join(sys.argv), "synthetic": settings["synthetic"],
        "python": sys.version.split()[0], "torch": torch.__version__,
        "torchvision": torchvision.__version__, "numpy": np.__version__,
        "date": time.strftime("%Y-%m-%d %H:%M:%S")})


def read_clips(source, modality, index, batches, args, text=""):
    """Yields the clips (B, L, ...) of the windows index (S, L), on the device, for each of
    `batches`, tensors of numbers of windows. Files are decoded in worker processes."""
    clips = DataLoader([index[batch].tolist() for batch in batches], batch_size=None,
                       collate_fn=partial(data.read_windows, getattr(source, modality)),
                       num_workers=0 if isinstance(source, data.Features) else args.workers,
                       pin_memory=args.device.type == "cuda")
    for x in bar(clips, text):
        yield x.to(args.device, non_blocking=True)


def bar(batches, text):
    return data.bar(batches, text, quiet=not (text and first_of_all()))


def from_all(thing, ranks):
    """What each rank has in a thing's place, rank 0's first."""
    things = [thing] * ranks.world
    if ranks.world > 1:
        dist.all_gather_object(things, thing)
    return things


@torch.inference_mode()
def answers(forward, batches, count=None, ranks=ALONE):
    """forward(batch) over all batches, concatenated on the CPU: one copy, no step waits for it.
    Under torchrun the batches are those of this rank's `share` of `count` samples."""
    outputs = torch.cat([forward(batch).float() for batch in batches])
    return gather(outputs, count, ranks).cpu()


def clip_answers(network, source, modality, index, settings, args, ranks):
    """`answers` of a network to the clips of all windows index (S, L), read from disk."""
    batches = share(torch.arange(len(index)), ranks).split(settings["batch_size"])
    clips = read_clips(source, modality, index, batches, args, modality)
    with autocast(args, settings["amp"]):
        return answers(network, clips, len(index), ranks)


def measure(source, windows, output):
    """`metrics` of the windows' outputs: what the tables show."""
    return metrics(*data.aligned(source, windows, output))


def criterion(found):
    """What the best epoch is chosen by: accuracy, or the mean of the two CCCs."""
    return found["accuracy"] if "accuracy" in found else (found["valence"] + found["arousal"]) / 2


def heading(settings):
    mark = "SYNTHETIC " * settings["synthetic"]
    leak = " over clips" * (settings["folds"] == "clips")
    return f"{mark}{settings['dataset']} fold {settings['fold']}{leak}, test"


def show(*found):
    """One fold's metrics, or the mean and standard deviation of several folds'."""
    def score(name, digits):
        values = [one[name] for one in found]
        sd = f" ± {np.std(values, ddof=1):.{digits}f}" if len(found) > 1 else ""
        return f"{name} {np.mean(values):.{digits}f}{sd}"

    if "accuracy" in found[0]:
        return score("accuracy", 2) + " %"
    return f"CCC {score('valence', 3)}, {score('arousal', 3)}"


BOUNDS = {"visual": "visual only (lower bound)", "privileged": "privileged only",
          "multimodal": "multimodal (upper bound)"}


def answer(*found):
    """The scores side by side; found: {what is scored: metrics} of a fold, or each of several."""
    return " | ".join(f"{BOUNDS.get(what, what)} {show(*(one[what] for one in found))}"
                      for what in found[0])


def print_mean(found, settings, ranks):
    """The last line of a command for several folds; found: {fold: what `answer` shows}, of those
    that this rank had."""
    folds = ChainMap(*from_all(found, ranks))
    if len(folds) > 1 and first_of_all():
        where = heading(settings | {"fold": ", ".join(map(str, sorted(folds)))})
        print(f"{where}, mean ± sd over folds: {answer(*folds.values())}")


def snapshot(module):
    return {k: v.cpu().clone() for k, v in module.state_dict().items()}


def epochs(count, model, optimizer, best, path, settings, args, ranks=ALONE, text=""):
    """Yields the numbers of the epochs to train: from the beginning, or for --resume from where an
    interrupted run stopped, with its weights and its best. After each, what --resume goes on from
    is kept at the path (None: nowhere), unless that was done a few seconds ago."""
    first = 0
    if path and path.exists():
        if args.resume:
            state = load(path, "progress", settings)
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            best.update(state["best"])
            first = state["epoch"] + 1
            if first_of_all():
                print(f"{path}: goes on after epoch {first}")
        elif first_of_all():
            print(f"{path}: an interrupted run's; --resume would go on, this begins anew",
                  file=sys.stderr)

    saved = 0
    for epoch in bar(range(first, count), text):
        yield epoch
        if path and ranks.rank == 0 and time.time() - saved >= SAVE_EVERY:
            saved = time.time()
            save(path, dict(kind="progress", settings=settings, epoch=epoch, best=best,
                            model=model.state_dict(), optimizer=optimizer.state_dict()))


def step_means(terms, names, epoch, advice, path, best, ranks=ALONE):
    """Mean of each loss term over an epoch's steps; terms: a list of tensors (len(names),). The
    host waits for the device here, once an epoch.

    A loss that is not finite ends the run; the best epoch before it, a checkpoint if there was one,
    is kept beside the path.
    """
    terms = torch.stack(terms).cpu()  # (steps, names)
    finite = terms.isfinite().all(1).tolist()
    if all(finite):
        return terms.mean(0).tolist()

    step = finite.index(False)
    found = ", ".join(f"{name} {value:.4g}"
                      for name, value in zip(names, terms[step], strict=True))
    fault = f"epoch {epoch + 1}, step {step + 1}: the loss is not finite, {found}; {advice}"
    if best:
        path = path.with_suffix(".diverged.pt")
        fault += f"; the best epoch before it is kept in {path}"
        if ranks.rank == 0:
            save(path, best)
    if ranks.world > 1:
        wait_for_all()  # the first rank to end would end the others
    raise UserError(fault)


def keep_best(best, score, epoch, model):
    """Makes `best` this epoch's, if there was none or its score is higher than the one before."""
    if not best or score > best["score"]:
        best.update(score=score, epoch=epoch, model=snapshot(model))


# ------------------------------------------------------------------------------ the two stages

COMMON = dict(  # section IV-B; the batch size is the backbones', epochs are not in the paper
    classes=2, image_size=112, lr=1e-3, backbone_epochs=30, fusion_epochs=50, fusion_batch_size=64,
    seed=0, amp=False, weights=None, folds="subjects", labelled=None, face_start=None,
    visual_backbone="r3d18", batch_size=64, fusion_lr=None)  # see `fusion_lr`
DEFAULTS = {  # Table I, and what differs from COMMON
    "biovid_a": dict(fusion="concat", length=1),
    "biovid_b": dict(fusion="mmt", length=1),
    "affwild2": dict(fusion="jca", length=8, visual_backbone="i3d", batch_size=8, fusion_lr=1e-3),
    "features": dict(fusion="concat", visual_backbone="mlp")}  # its own length
STAND_IN = {  # few samples and a CPU: smaller images, smaller batches, more passes over less
    "biovid": dict(image_size=32, batch_size=16, lr=1e-4, backbone_epochs=2, fusion_epochs=60),
    "affwild2": dict(image_size=48, batch_size=4, lr=1e-4, backbone_epochs=10, fusion_epochs=20)}


def defaults(dataset, synthetic):
    stand_in = STAND_IN[dataset.partition("_")[0]] if synthetic else {}
    return COMMON | DEFAULTS[dataset] | stand_in


def make_settings(dataset, root=None, synthetic=False, **given):
    """What a teacher is made of, as plain values: what is given, or the data set's default for what
    is None; and the opened data set."""
    of_images = "length classes visual_backbone weights image_size face_start".split()
    if dataset == "features" and (not root or synthetic or any(map(given.get, of_images))):
        raise UserError(
            "--dataset features needs --root FILE.npz (the format: README.md); leave out what is "
            "for images: --synthetic, --clips, --classes, --visual-backbone, --visual-weights, "
            "--pretrained, --image-size, --face-start")
    root = Path(root or f"data/{dataset}" + "-synthetic" * synthetic)
    if synthetic and first_of_all():
        data.write_stand_in(dataset, root)
    wait_for_all()
    synthetic = (root / "SYNTHETIC").is_file()

    settings = defaults(dataset, synthetic)
    settings.update((key, given[key]) for key in settings if given.get(key) is not None)
    source = data.open_dataset(dataset, root, settings.pop("classes"), settings.get("length"),
                               settings["image_size"], face_start=settings["face_start"])

    # the data first, for `load` names the first difference: of other data all else may follow
    settings = {"data": content(source)} | settings | dict(
        dataset=dataset, root=str(root), synthetic=synthetic, task=source.task,
        outputs=source.outputs, length=source.length)
    if dataset == "features":
        for modality, rows in source.rows.items():
            settings[f"{modality}_dim"] = rows.shape[1]
    return settings, source


def content(source, modalities=("visual", "privileged")):
    """What a data set holds, wherever it lies: whose rows, with which labels and in which part, and
    the traces of each modality."""
    columns = "name label group split video frame_label frame_row".split()
    labels = [getattr(source, column, None) for column in columns]
    return {"labels": fingerprint(labels)} | {
        modality: fingerprint(source.traces(modality)) for modality in modalities}


# the settings that make another teacher, as they stand in the folder's name
VARIANT = "{visual_backbone} {fusion} length{length} {labelled}labels {folds} seed{seed}"


def variant(settings):
    """c2, c5 or va, then whatever is not the default: no teacher overwrites another's."""
    default = settings | COMMON | DEFAULTS[settings["dataset"]]
    settings = default | settings  # stage 1's have no fusion head
    names = [f"c{settings['outputs']}" if settings["task"] == "classification" else "va"]
    names += [part.format(**settings) for part in VARIANT.split()
              if part.format(**settings) != part.format(**default)]
    return "-".join(names)


def run_folder(settings, out):
    name = settings["dataset"] + "-synthetic" * settings["synthetic"]
    return out / name / variant(settings) / f"fold{settings['fold']}"


def stage_1(settings):
    """The settings of a teacher that its backbones depend on: all but the fusion head's."""
    return {k: v for k, v in settings.items() if not k.startswith("fusion")}


def stage_1_folder(run, settings):
    """Where the backbones and features of a teacher's run folder lie: beside it, if they were
    copied there."""
    if (run / "visual.pt").exists():
        return run
    return run.parent.parent / variant(stage_1(settings)) / run.name


def fold_of(source, settings, dense=False):
    """The training, validation and test samples of a teacher, and of all of its students."""
    return fold_windows(source, settings["fold"], dense, settings["folds"], settings["labelled"])


def make_backbone(modality, settings):
    if settings["dataset"] == "features":
        return models.FeatureMLP(settings[f"{modality}_dim"])
    if modality == "visual":
        return models.VISUAL[settings["visual_backbone"]]()
    return models.SpectrogramResNet18()


def make_head(settings):
    head = models.HEADS[settings["fusion"]]
    return head(settings["outputs"], length=settings["length"],
                per_clip=settings["task"] == "regression")


def train_backbone(modality, source, fold, settings, folder, args, ranks):
    """Stage 1: one modality alone, backbone and linear head; the model of the best epoch.

    A backbone that is there, of the same settings and data, is taken as it is.
    """
    path = folder / f"{modality}.pt"
    progress = path.with_suffix(".progress")
    settings = stage_1(settings)
    stage = int(modality == "privileged")
    seed_all(settings["seed"], stage)
    backbone = make_backbone(modality, settings)
    model = models.Unimodal(backbone, settings["outputs"], settings["task"] == "regression")
    if path.exists():
        model.load_state_dict(load(path, modality, settings)["model"])
        if ranks.rank == 0:
            print(f"{path} is finished; delete it to train it again")
        return model.to(args.device)

    # this stage alone learns from labels only: there is nothing else that it could predict
    train = fold.train.take(fold.train.labelled)

    # begin from public weights, if given, and with the statistics of all training samples
    if modality == "visual" and settings["weights"]:
        told = load_public_weights(backbone, settings["weights"])
        if ranks.rank == 0:
            print(told)
    if backbone.fitted:
        index = fold.train.index
        every = torch.arange(len(index)).split(64)
        backbone.standardise(read_clips(source, modality, index, every, args, "statistics"))

    # Adam (section IV-B), from the beginning or from where an interrupted run stopped
    model.to(args.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=settings["lr"], fused=True)
    over_ranks = spread(model, args, ranks)
    checkpoint = dict(kind=modality, settings=settings)
    best = {}
    for epoch in epochs(settings["backbone_epochs"], model, optimizer, best, progress, settings,
                        args, ranks):
        start = time.time()

        # a new order, in which every sample counts once: a last, smaller batch is not dropped
        seed_all(settings["seed"], stage, epoch + 1)
        batches = torch.randperm(len(train.index)).split(settings["batch_size"])
        shares = [share(batch, ranks) for batch in batches]
        clips = read_clips(source, modality, train.index, shares, args, f"{modality} {epoch + 1}")

        # one pass over the training samples that have a label
        model.train()
        losses = []
        for batch, x in zip(batches, clips, strict=True):
            # forward: this rank's share of the batch
            with autocast(args, settings["amp"]):
                output = over_ranks(x)

            # the loss of the whole batch, in float32: CCC couples its samples
            output = gather(output.float(), len(batch), ranks)
            loss = task_loss(output, train.label[batch].to(args.device))  # Eq. 7 or 8

            # step; the loss stays on the device, or the host would wait for it each time
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach()[None])

        loss, = step_means(losses, ["L_gt"], epoch, "lower --lr", path, best and checkpoint | best,
                           ranks)

        # the epoch is chosen on held-out training groups
        model.eval()
        for buffer in model.buffers() if ranks.world > 1 else ():
            dist.broadcast(buffer, 0)  # all ranks take the first one's batch norm
        output = clip_answers(model, source, modality, fold.val.index, settings, args, ranks)
        found = measure(source, fold.val, output)
        keep_best(best, criterion(found), epoch, model)
        if ranks.rank == 0:
            seconds = time.time() - start
            append_line(folder / "log.jsonl", dict(
                stage=modality, epoch=epoch + 1, loss=loss, **found, seconds=seconds))
            print(f"{modality} epoch {epoch + 1:3d}  loss {loss:.4f}  val {show(found)}  "
                  f"{seconds:.1f} s")

    # what goes on is the best epoch, not the last
    if ranks.rank == 0:
        save(path, checkpoint | best)
        progress.unlink(missing_ok=True)
    model.load_state_dict(best["model"])
    return model


def load_public_weights(backbone, weights):
    """Weights from another training, for the visual backbone: a file, or "pretrained" for
    torchvision's R3D-18. Returns what to say about them."""
    if weights == "pretrained":
        if not isinstance(backbone, models.R3D18):
            raise UserError("--pretrained is for r3d18 alone; give i3d a file with "
                            "--visual-weights")
        public = torchvision.models.video.R3D_18_Weights.KINETICS400_V1
        weights = Path(torch.hub.get_dir(), "checkpoints", Path(public.url).name)
        with data.blaming(weights, "the download failed", "give a file with --visual-weights"):
            if not weights.exists():
                public.get_state_dict(check_hash=True)  # a login page is no weights
    state = read_checkpoint(weights)
    try:
        left_out, missing = models.load_weights(backbone, state)
    except ValueError as error:
        raise UserError(f"--visual-weights {weights}: {error}") from None
    return (f"{weights} loaded; left out: {', '.join(left_out) or 'nothing'}; "
            f"not in it, trained from scratch: {', '.join(missing) or 'nothing'}")


def extract_features(single, backbones, source, settings, path, args, ranks):
    """Stage 2, first half: both frozen backbones over every clip once -> the features file."""
    # a sample of BioVid is a row of the file; Affwild2's windows overlap, and are cut by index
    length = 1 if settings["dataset"] == "affwild2" else source.length
    every = torch.arange(len(source.label))[:, None]
    arrays = {}
    for modality, model in single.items():
        rows = clip_answers(model.backbone, source, modality, every, settings, args, ranks)
        arrays[modality] = rows.reshape(-1, length, models.D)  # from (R, 1, 512)
    if ranks.rank > 0:
        return

    for key in "label group video name split".split():
        values = getattr(source, key)
        if values is not None:
            arrays[key] = np.asarray(values)[::length]  # the same in all rows of a sample
    if source.task == "regression":
        arrays.update(label=source.label.reshape(-1, length, 2).numpy(),
                      frame_label=source.frame_label, frame_row=source.frame_row)
    data.save_features(path, arrays | {"backbones": backbones})


def train_fusion(features, fold, settings, lr, run, args):
    """Stage 2, second half: fusion head on the task loss, T-Net on MSE(T(visual), privileged); the
    best epoch of each. Samples without a label are pairs of modalities, and count for the T-Net.
    """
    seed_all(settings["seed"], 2)
    model = nn.ModuleDict({"head": make_head(settings), "tnet": models.TNet()}).to(args.device)
    head, tnet = model.values()
    optimizer = torch.optim.Adam(model.parameters(), lr, fused=True)
    progress_of = settings | {"backbones": features.backbones}
    best = {"head": {}, "tnet": {}}
    visual, privileged = features.rows.values()
    index, _, label = (field.to(args.device) for field in fold.train)

    def output_of(rows):
        return head(visual[rows], privileged[rows]).output

    def squared_error(rows):
        return (tnet(visual[rows]) - privileged[rows]).square().mean((1, 2))

    start = time.time()
    for epoch in epochs(settings["fusion_epochs"], model, optimizer, best, run / "fusion.progress",
                        progress_of, args, text="fusion"):
        # a new order of all pairs, labelled or not
        seed_all(settings["seed"], 2, epoch + 1)
        order = torch.randperm(len(index)).to(args.device)

        # the two share no weight: one optimiser, two losses
        model.train()
        terms = []
        for batch in order.split(settings["fusion_batch_size"]):
            v, p = visual[index[batch]], privileged[index[batch]]  # (B, L, 512)

            # the head sees both modalities; the T-Net guesses one from the other, label or not
            loss_gt = task_loss(head(v, p).output, label[batch])  # Eq. 7 or 8
            loss_tnet = nn.functional.mse_loss(tnet(v), p)
            loss = loss_gt + loss_tnet

            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            terms.append(torch.stack([loss_gt, loss_tnet]).detach())
        loss, tnet_loss = step_means(
            terms, ["L_gt", "T-Net's MSE"], epoch, "lower --fusion-lr", run / "fusion.pt",
            best["head"] and dict(kind="fusion", settings=settings, **best))

        # each keeps its own best epoch, chosen on held-out training groups
        model.eval()
        batches = fold.val.index.split(256)
        found = measure(features, fold.val, answers(output_of, batches))
        mse = answers(squared_error, batches).mean().item()
        keep_best(best["head"], criterion(found), epoch, head)
        keep_best(best["tnet"], -mse, epoch, tnet)
        append_line(run / "log.jsonl", dict(stage="fusion", epoch=epoch + 1, loss=loss,
                                            tnet_loss=tnet_loss, tnet_val_mse=mse, **found))

    # the T-Net's error says little without the variance of what it guesses
    variance = privileged[fold.val.index].var(dim=(0, 1), correction=0).mean().item()
    print(f"fusion {settings['fusion_epochs']} epochs in {time.time() - start:.1f} s; best of "
          f"epoch {best['head']['epoch'] + 1}; T-Net's of epoch {best['tnet']['epoch'] + 1}, "
          f"which leaves {-best['tnet']['score'] / max(variance, 1e-12):.2f} of the privileged "
          "features' variance unexplained")
    for name, module in model.items():
        module.load_state_dict(best[name]["model"])
    return model.eval().values()


def open_features(folder, settings, device):
    """Stage 2's features file, with windows as long as the run's samples, its rows on the device:
    from there on a batch of windows is rows picked by index, not copied."""
    try:
        features = data.Features(folder / "features.npz", settings["length"])
    except UserError as error:
        raise UserError(f"{error}; this one is the run's own: delete it, and train_teacher.py with "
                        "the same flags makes it again") from None
    features.rows = {modality: rows.to(device) for modality, rows in features.rows.items()}
    return features


def train_teacher(settings, source, args, ranks):
    """Stages 1 and 2 of one fold; writes the run folder and three result lines, returns the metrics
    by role, or None in the ranks that only helped with stage 1. A teacher that is there stays with
    --resume, or if another command has just trained it."""
    run = run_folder(settings, args.out)
    folder = stage_1_folder(run, settings)
    path = run / "teacher.pt"
    with one_at_a_time(folder, ranks) as waited:
        start = time.time()
        old = path.exists() and load(path, "teacher", settings)
        fold = fold_of(source, settings)
        ran = ran_on(args, ranks, settings, fold.train)
        if ranks.rank == 0:
            print(f"{run}: {source.describe()}; samples train {len(fold.train.index)}, "
                  f"val {len(fold.val.index)}, test {len(fold.test.index)}")
            start_log(run, settings, **ran, batch_size=settings["batch_size"],
                      fusion_batch_size=settings["fusion_batch_size"])

        # stage 1, or what is there of it
        single = {modality: train_backbone(modality, source, fold, settings, folder, args, ranks)
                  for modality in ("visual", "privileged")}
        backbones = [fingerprint(snapshot(model.eval().backbone)) for model in single.values()]
        if (args.resume or waited) and old and old["backbones"] == backbones:
            if ranks.rank > 0:
                return None
            print(f"{path} is finished")
            return old["metrics"]

        # stage 2; on features a single process is fast enough
        features = folder / "features.npz"
        if not features.exists() or open_features(folder, settings, "cpu").backbones != backbones:
            extract_features(single, backbones, source, settings, features, args, ranks)
        if ranks.rank > 0:
            return None
        features = open_features(folder, settings, args.device)
        fold = fold_of(features, settings, dense=True)
        head, tnet = train_fusion(features, fold, settings, ran["fusion_lr"], run, args)

        # the test fold, once
        visual, privileged = features.rows.values()
        forward = {
            "visual": lambda rows: single["visual"].classify(visual[rows]),
            "privileged": lambda rows: single["privileged"].classify(privileged[rows]),
            "multimodal": lambda rows: head(visual[rows], privileged[rows]).output}
        found = {}
        for role, answer_to in forward.items():
            output = answers(answer_to, fold.test.index.split(256))
            found[role] = measure(features, fold.test, output)

        state = dict(kind="teacher", settings=settings, metrics=found, backbones=backbones,
                     head=head.state_dict(), tnet=tnet.state_dict())
        save(path, state)
        (run / "fusion.progress").unlink(missing_ok=True)
        for role, values in found.items():
            append_line(args.out / "results.jsonl",
                        result_line(settings, role, values, time.time() - start, **ran,
                                    teacher=made_of(state)))
    return found


def made_of(teacher):
    """What makes a teacher this one, in its results lines and its students'."""
    return fingerprint([teacher["backbones"], teacher["head"], teacher["tnet"]])


def result_line(settings, role, found, seconds, **more):
    """A line of results.jsonl: the teacher's settings, and what a student chose over them; plain
    values alone, since a student's checkpoint holds its line."""
    classes = settings["outputs"] if settings["task"] == "classification" else "va"
    values = dict(found)
    return {**settings, "role": role, "classes": classes, "n_test": values.pop("n"), **values,
            "seconds": round(seconds, 1), "torch": str(torch.__version__), **more}


def parse(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    count = at_least(1)
    number = at_least(0, float)
    add("--dataset", choices=DATASETS, default="biovid_b")
    add_common_flags(parser)
    add("--fold", default="1", choices="1 2 3 4 5 all".split(), help="default 1")
    add("--clips", dest="length", type=count,
        help="clips per sample; default: BioVid 1, Affwild2 8")
    add("--fusion", choices=models.HEADS, help="Fig. 4; default: Table I's")
    add("--visual-backbone", choices=models.VISUAL, help="default: BioVid r3d18, Affwild2 i3d")
    weights = parser.add_mutually_exclusive_group().add_argument
    weights("--visual-weights", type=os.path.expanduser, dest="weights", metavar="FILE",
        help="state dict to start the visual backbone from")
    weights("--pretrained", dest="weights", action="store_const", const="pretrained",
        help="start r3d18 from torchvision's Kinetics weights")
    add("--image-size", type=at_least(32), help="pixels; default 112; smaller on a stand-in")
    add("--backbone-epochs", type=count, help="default 30 (not stated in the paper)")
    add("--batch-size", type=count, help="backbones; default: BioVid 64, Affwild2 8")
    add("--lr", type=number, help="backbones; default 1e-3")
    add("--fusion-epochs", type=count, help="default 50 (not stated in the paper)")
    add("--fusion-batch-size", type=count, help="default 64")
    add("--fusion-lr", type=number,
        help="default: BioVid 1e-4, Affwild2 and few labels 1e-3")
    return parser.parse_args(argv)


def folds_of(source, settings, wanted):
    """The settings of the teachers of those folds that --fold names: of 1 to 5, or of fold 1 alone
    where the data set has a split of its own. Raises UserError with all that is wrong in any."""
    folds = [fold for fold in data.fold_numbers(source) if {"all", str(fold)} & {*wanted}]
    if not folds:
        raise UserError(f"--fold {' '.join(wanted)}: {source.path} has its own split into training "
                        "and test; there is only fold 1")

    faults = data.refused_folds(source, folds, settings["folds"], settings["labelled"])
    if faults:
        raise UserError("; ".join(dict.fromkeys(faults)))
    return [settings | {"fold": fold} for fold in folds]


def main():
    args = parse()
    ranks = join_ranks(args)
    data.writable(args.out)
    if args.dataset == "affwild2" and (args.classes or args.face_start):
        raise UserError("--classes and --face-start are for BioVid; leave them out")
    settings, source = make_settings(**vars(args))
    folds = folds_of(source, settings, [args.fold])

    # several folds are dealt out to the ranks, one is trained by all of them together
    together = len(folds) == 1
    wait_for_all()  # until all have looked what is there
    found = {}
    for settings in folds if together else trainings_of(folds, "folds", ranks):
        one = train_teacher(settings, source, args, ranks if together else ALONE)
        if one:
            found[settings["fold"]] = one
            print(f"{heading(settings)}, n = {one['multimodal']['n']}: {answer(one)}")
    print_mean(found, settings, ranks)
    leave_ranks()


if __name__ == "__main__":
    data.run(main)
