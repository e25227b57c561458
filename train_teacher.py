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
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
import models
from data import DATASETS, Parser, Samples, UserError, fold_windows
from pkdot import scores, task_loss

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
    add = parser.add_argument
    add("--root", help="the data; default: data/<dataset>")
    add("--synthetic", action="store_true", help="use a synthetic stand-in, written on first use")
    add("--seed", type=at_least(0), default=0, help="of weights and batch order; folds stay")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--workers", type=at_least(0), default=2, help="processes that decode files")
    add("--amp", action="store_true", help="bfloat16 autocast on CUDA (the OT stays in float32)")
    add("--out", type=Path, default=Path("runs"), help="where runs and results.jsonl live")
    add("--resume", action="store_true", help="go on where an interrupted run stopped")


def choose_device(name, amp=False):
    """The device of --device; --amp is CUDA's alone. On a CPU with AVX512_BF16 and no AMX, torch
    2.14's bfloat16 gradient of a 3x3x3 convolution over two frames (R3D-18's last layer) is off by
    100 % or infinite."""
    if name == "auto":
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from None
    device = torch.device(name)
    if amp and device.type != "cuda":
        raise UserError(f"--amp is for CUDA, and this runs on {device}: leave it out, "
                        "float32 is right everywhere")
    return device


def seed_all(*numbers):
    """Seed torch from a run's seed, its stage and the epoch (from 1: numpy takes a last 0 for
    none), so that a resumed run draws what an uninterrupted one draws."""
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))


def save(path, state):
    """torch.save that leaves the old file or the new one, never half of it."""
    with data.replacing(path) as part:
        torch.save(state, part)


def read_checkpoint(path):
    """What torch.save wrote, on the CPU; code in the file is not run."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; expected a checkpoint or state dict")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes raise all kinds
        raise UserError(f"{path}: not a checkpoint or state dict that can be loaded safely "
                        f"({type(error).__name__}); give another file or train it again") from None


def load(path, kind):
    """A checkpoint that `save` wrote; UserError unless it is a `kind` ("teacher", ...)."""
    state = read_checkpoint(path)
    if not isinstance(state, dict) or state.get("kind") != kind or "settings" not in state:
        raise UserError(f"{path}: not a {kind} checkpoint of these scripts; "
                        "give another file or train it again")
    return state


def append_line(path, record):
    """One JSON line, on a line of its own even if the last writer was killed halfway through."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+") as file:
        torn = file.tell() and not (file.seek(-1, os.SEEK_END) and file.read(1) == b"\n")
        file.write(b"\n" * bool(torn) + json.dumps(record).encode() + b"\n")


def start_log(run, settings):
    """The first line of a command's log: the command, and what it ran with."""
    append_line(run / "log.jsonl", {
        "command": " ".join(sys.argv), "synthetic": settings["synthetic"],
        "python": sys.version.split()[0], "torch": str(torch.__version__),
        "torchvision": torchvision.__version__, "numpy": np.__version__,
        "date": time.strftime("%Y-%m-%d %H:%M:%S")})


def fingerprint(arrays):
    """12 hex digits that identify a dict of tensors or numpy arrays, a state dict for one."""
    digest = hashlib.sha256()
    for key, value in arrays.items():
        value = value.cpu().numpy() if torch.is_tensor(value) else value
        digest.update(key.encode() + np.ascontiguousarray(value).tobytes())
    return digest.hexdigest()[:12]


def clip_loader(source, modality, index, batches, args):
    """Clips (B, L, ...) of the windows index (S, L), for each of `batches`, tensors of numbers of
    windows. Files are decoded in worker processes."""
    return DataLoader(Samples(source, modality, index), batch_sampler=[b.tolist() for b in batches],
                      num_workers=0 if isinstance(source, data.Features) else args.workers,
                      pin_memory=args.device.type == "cuda")


def bar(batches, text):
    return tqdm(batches, desc=text, leave=False, disable=None)


@torch.inference_mode()
def answers(forward, batches):
    """forward(batch) over all batches, concatenated on the CPU: one copy, no step waits for it."""
    return torch.cat([forward(batch).float() for batch in batches]).cpu()


def score(source, windows, output):
    return scores(*data.scored(source, windows, output)[:2])


def criterion(found):
    """What the best epoch is chosen by: accuracy, or the mean of the two CCCs."""
    return found["accuracy"] if "accuracy" in found else (found["valence"] + found["arousal"]) / 2


def score_videos(source, windows, output):
    """{video: its own CCC of valence and arousal, and its labelled frames}."""
    prediction, label, row = data.scored(source, windows, output)
    video = source.video[row.numpy()]
    masks = {str(name): torch.from_numpy(video == name) for name in np.unique(video)}
    return {name: scores(prediction[mask], label[mask]) for name, mask in masks.items()}


def log_videos(run, role, source, windows, output):
    """The per-video table of valence/arousal, into log.jsonl."""
    if source.task == "regression":
        append_line(run / "log.jsonl", {"test_videos_of": role,
                                        "videos": score_videos(source, windows, output)})


def heading(settings):
    mark = "SYNTHETIC " * settings["synthetic"]
    return f"{mark}{settings['dataset']} fold {settings['fold']}, test"


def show(found):
    if "accuracy" in found:
        return f"accuracy {found['accuracy']:.2f} %"
    return f"CCC valence {found['valence']:.3f}, arousal {found['arousal']:.3f}"


def snapshot(module):
    return {k: v.detach().cpu().clone() for k, v in module.state_dict().items()}


def step_means(terms, names, epoch, advice, keep_best):
    """Mean of each loss term over an epoch's steps; terms is a list of tensors (len(names),).

    The host waits for the device here, once an epoch. UserError if a step's loss was not finite.
    """
    terms = torch.stack(terms).cpu()  # (steps, names)
    bad = (~terms.isfinite()).any(1).nonzero()
    if len(bad):
        step = int(bad[0])
        diverged(epoch, step, names, terms[step].tolist(), advice, keep_best)
    return terms.mean(0).tolist()


def diverged(epoch, step, names, values, advice, keep_best):
    """Stop, naming both terms; keep_best() saves the best epoch so far, if there is one, and
    returns the file's path."""
    path = keep_best()
    found = ", ".join(f"{name} {value:.4g}" for name, value in zip(names, values, strict=True))
    kept = f"; the best epoch before it is kept in {path}" if path else ""
    raise UserError(f"epoch {epoch + 1}, step {step + 1}: the loss is not finite, {found}; "
                    f"{advice}{kept}")


def keep_progress(path, settings, epoch, model, optimizer, best):
    save(path, dict(kind="progress", settings=settings, epoch=epoch, model=model.state_dict(),
                    optimizer=optimizer.state_dict(), best=best))


def restore_progress(path, settings, model, optimizer):
    """First epoch to run and the best so far, after loading weights and optimiser: --resume."""
    state = load(path, "progress")
    same_settings(state, settings, path)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["epoch"] + 1, state["best"]


def same_settings(state, settings, path):
    for key in settings.keys() | state["settings"].keys():
        old, new = state["settings"].get(key), settings.get(key)
        if old != new:
            again = ", or train again without --resume" if key != "root" else ""
            raise UserError(f"{path} was trained with {key} {old}, not {new}; "
                            f"use the same flags, or another --out{again}")


# ------------------------------------------------------------------------------ the two stages

DEFAULTS = {  # Table I and section IV-B; the batch size is the backbones'
    "biovid_a": dict(
        fusion="concat", visual_backbone="r3d18", length=1, batch_size=64, fusion_lr=1e-4),
    "biovid_b": dict(
        fusion="mmt", visual_backbone="r3d18", length=1, batch_size=64, fusion_lr=1e-4),
    "affwild2": dict(
        fusion="jca", visual_backbone="i3d", length=8, batch_size=8, fusion_lr=1e-3),
    "features": dict(
        fusion="concat", visual_backbone="mlp", length=None, batch_size=64, fusion_lr=1e-4)}
COMMON = dict(  # the numbers of epochs are not in the paper
    classes=2, image_size=112, lr=1e-3, backbone_epochs=30, fusion_epochs=50, fusion_batch_size=64,
    seed=0, amp=False, weights=None)
STAND_IN = {  # few samples and a CPU: smaller images, smaller batches, more passes over less
    "biovid": dict(image_size=32, batch_size=16, backbone_epochs=4, fusion_epochs=200),
    "affwild2": dict(image_size=48, batch_size=4, lr=1e-4, backbone_epochs=10, fusion_epochs=20)}


def make_settings(dataset, root=None, synthetic=False, **given):
    """What a teacher is made of, as plain values: what is given, or the data set's default for what
    is None; and the opened data set."""
    if dataset == "features" and (synthetic or not root):
        raise UserError("--dataset features needs --root FILE.npz (the format: README.md); "
                        "it has no stand-in")
    root = root or f"data/{dataset}" + "-synthetic" * synthetic
    if synthetic:
        data.write_stand_in(dataset, root)
    synthetic = (Path(root) / "SYNTHETIC").is_file()

    settings = {**COMMON, **DEFAULTS[dataset],
                **(STAND_IN[dataset.partition("_")[0]] if synthetic else {})}
    settings.update((key, given[key]) for key in settings if given.get(key) is not None)
    source = data.open_dataset(dataset, root, settings.pop("classes"), settings["length"],
                               settings["image_size"])

    settings.update(dataset=dataset, root=str(Path(root)), synthetic=synthetic, task=source.task,
                    outputs=source.outputs, length=source.length)
    if dataset == "features":
        settings.update((f"{m}_dim", source.rows[m].shape[1]) for m in ("visual", "privileged"))
    rows = getattr(source, "rows", {})
    settings["data"] = fingerprint({"label": source.label, "name": source.name, **rows})
    return settings, source


def variant(settings):
    """c2, c5, va, then whatever else makes another teacher: none overwrites another's."""
    default = DEFAULTS[settings["dataset"]]
    names = [f"c{settings['outputs']}" if settings["task"] == "classification" else "va"]
    names += [settings[k] for k in ("visual_backbone", "fusion") if settings[k] != default[k]]
    if settings["length"] != (default["length"] or settings["length"]):
        names.append(f"length{settings['length']}")
    return "-".join(names + [f"seed{settings['seed']}"] * (settings["seed"] > 0))


def run_folder(settings, out):
    name = settings["dataset"] + "-synthetic" * settings["synthetic"]
    return Path(out) / name / variant(settings) / f"fold{settings['fold']}"


def stage_1(settings):
    """The settings of a teacher that its backbones depend on: all but the fusion head's."""
    fusion = DEFAULTS[settings["dataset"]]["fusion"]
    return {k: v for k, v in settings.items() if not k.startswith("fusion_")} | {"fusion": fusion}


def stage_1_folder(run, settings):
    """Where the backbones and features of a teacher's run folder lie."""
    return run.parent.parent / variant(stage_1(settings)) / run.name


def per_clip(settings):
    return settings["task"] == "regression"


def make_backbone(modality, settings):
    kind = "mlp" if settings["dataset"] == "features" else settings["visual_backbone"]
    make = models.visual_backbone if modality == "visual" else models.privileged_backbone
    return make(kind, settings.get(f"{modality}_dim"))


def make_head(settings):
    return models.fusion_head(settings["fusion"], settings["outputs"], settings["length"],
                              per_clip(settings))


def train_backbone(modality, source, fold, settings, args, folder):
    """Stage 1: one modality alone, backbone and linear head; the model of the best epoch.

    A backbone that is there, of the same settings and data, is taken as it is.
    """
    path, progress = folder / f"{modality}.pt", folder / f"{modality}.progress"
    settings, stage = stage_1(settings), ["visual", "privileged"].index(modality)
    seed_all(settings["seed"], stage)
    backbone = make_backbone(modality, settings)
    model = models.Unimodal(backbone, settings["outputs"], per_clip(settings))
    if path.exists():
        state = load(path, modality)
        if args.resume:
            same_settings(state, settings, path)
        if state["settings"] == settings:
            print(f"{path} is finished; delete it to train it again")
            model.load_state_dict(state["model"])
            return model.to(args.device)

    train, val = fold.train.take(fold.train.labelled), fold.val
    if modality == "visual" and settings["weights"]:
        load_public_weights(backbone, settings["weights"])
    if isinstance(backbone, (models.FeatureMLP, models.SpectrogramResNet18)):
        index = fold.train.index
        every = clip_loader(source, modality, index, torch.arange(len(index)).split(64), args)
        backbone.standardise(*statistics(every))
    model.to(args.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=settings["lr"], fused=True)
    first, best = 0, None
    if args.resume and progress.exists():
        first, best = restore_progress(progress, settings, model, optimizer)

    def forward(clips):
        with torch.autocast(args.device.type, torch.bfloat16, enabled=settings["amp"]):
            output = model(clips.to(args.device, non_blocking=True))
        return output.float()

    def keep_best():
        if best:
            save(path.with_suffix(".diverged.pt"), dict(kind=modality, settings=settings, **best))
            return path.with_suffix(".diverged.pt")

    label, size = train.label.to(args.device), settings["batch_size"]
    validation = torch.arange(len(val.index)).split(size)
    saved = time.time()
    for epoch in range(first, settings["backbone_epochs"]):
        start = time.time()
        seed_all(settings["seed"], stage, epoch + 1)
        batches = torch.randperm(len(train.index)).split(size)
        clips = clip_loader(source, modality, train.index, batches, args)

        # one pass over the training samples that have a label
        model.train()
        losses = []
        for batch, x in zip(batches, bar(clips, f"{modality} {epoch + 1}"), strict=True):
            loss = task_loss(forward(x), label[batch.to(args.device)])  # Eq. 7 or 8
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach()[None])
        loss, = step_means(losses, ["L_gt"], epoch, "lower --lr", keep_best)

        # the epoch is chosen on held-out training groups
        model.eval()
        output = answers(forward, clip_loader(source, modality, val.index, validation, args))
        found = score(source, val, output)
        if best is None or criterion(found) > best["score"]:
            best = dict(score=criterion(found), epoch=epoch, model=snapshot(model))

        if time.time() - saved > SAVE_EVERY:
            keep_progress(progress, settings, epoch, model, optimizer, best)
            saved = time.time()
        seconds = time.time() - start
        append_line(folder / "log.jsonl",
                    dict(stage=modality, epoch=epoch + 1, loss=loss, **found, seconds=seconds))
        print(f"{modality} epoch {epoch + 1:3d}  loss {loss:.4f}  val {show(found)}  "
              f"{seconds:.1f} s")
    save(path, dict(kind=modality, settings=settings, **best))
    progress.unlink(missing_ok=True)
    model.load_state_dict(best["model"])
    return model


def load_public_weights(backbone, weights):
    """Weights from another training, for the visual backbone: a file, or "pretrained" for
    torchvision's R3D-18."""
    if weights != "pretrained":
        state = read_checkpoint(weights)
    elif not isinstance(backbone, models.R3D18):
        raise UserError("--pretrained is for r3d18 alone; give i3d a file with --visual-weights")
    else:
        try:
            weights = torchvision.models.video.R3D_18_Weights.KINETICS400_V1
            state = weights.get_state_dict(progress=True)
        except OSError as error:
            raise UserError(f"--pretrained: the download failed ({error}); "
                            "give a file with --visual-weights") from None
    try:
        left_out, missing = models.load_weights(backbone, state)
    except ValueError as error:
        raise UserError(f"--visual-weights {weights}: {error}") from None
    print(f"{weights} loaded; left out: {', '.join(left_out) or 'nothing'}; "
          f"not in it, trained from scratch: {', '.join(missing) or 'nothing'}")


def statistics(batches):
    """Mean and standard deviation of the training part: one value for spectrograms, one per feature
    for vectors."""
    count, total, squares = 0, 0.0, 0.0
    for clips in bar(batches, "statistics"):
        axes = (0, 1) if clips.ndim == 3 else tuple(range(clips.ndim))
        clips = clips.double()
        total, squares = total + clips.sum(axes), squares + clips.square().sum(axes)
        count += clips.numel() / total.numel()
    mean, square = total / count, squares / count
    variance = square - mean**2
    # what is left of a constant is rounding, not variance
    return mean, variance.where(variance > 1e-12 * square, 0).sqrt()


def extract_features(backbones, source, settings, args, path):
    """Stage 2, first half: both frozen backbones over every clip once -> the features file."""
    every = torch.arange(len(source.label))
    batches = every.split(settings["batch_size"])
    arrays = {}
    for modality, backbone in backbones.items():
        backbone.eval()
        rows, done = torch.empty(len(every), models.D, device=args.device), 0  # (R, 512)
        loader = clip_loader(source, modality, every[:, None], batches, args)
        with (torch.inference_mode(),
              torch.autocast(args.device.type, torch.bfloat16, enabled=settings["amp"])):
            for clips in bar(loader, f"features {modality}"):
                features = backbone(clips.to(args.device, non_blocking=True))[:, 0]
                rows[done:done + len(clips)] = features
                done += len(clips)
        arrays[modality] = rows.cpu().numpy()

    # a sample of BioVid is a row of the file; Affwild2's windows overlap, and are cut by index
    length = 1 if settings["dataset"] == "affwild2" else source.length
    first = slice(None, None, length)
    arrays = {k: v.reshape(-1, length, models.D) for k, v in arrays.items()}
    label = source.label.numpy()
    arrays["label"] = label[first] if label.ndim == 1 else label.reshape(-1, length, 2)
    arrays.update(group=source.group[first], video=source.video[first], name=source.name[first])
    if source.split is not None:
        arrays["split"] = source.split[first]
    if source.task == "regression":
        arrays.update(frame_label=source.frame_label.numpy(), frame_row=source.frame_row.numpy())
    arrays["backbones"] = np.array(backbones_id(backbones))
    data.save_features(path, arrays)


def backbones_id(backbones):
    return "-".join(fingerprint(backbone.state_dict()) for backbone in backbones.values())


def train_fusion(features, fold, settings, args, run):
    """Stage 2, second half: fusion head on the task loss, T-Net on MSE(T(visual), privileged); the
    best epoch of each. Samples without a label are pairs of modalities, and count for the T-Net.

    The features lie on the device once; a batch of windows is rows picked by index, not copied.
    """
    progress = run / "fusion.progress"
    progress_of = {**settings, "backbones": features.backbones}
    seed_all(settings["seed"], 2)
    model = nn.ModuleDict({"head": make_head(settings), "tnet": models.TNet()}).to(args.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=settings["fusion_lr"], fused=True)
    visual, privileged = (features.rows[m].to(args.device) for m in ("visual", "privileged"))
    index, label = fold.train.index.to(args.device), fold.train.label.to(args.device)
    first, best = 0, dict(head=None, tnet=None)
    if args.resume and progress.exists():
        first, best = restore_progress(progress, progress_of, model, optimizer)

    def fused(rows):
        return model["head"](visual[rows], privileged[rows]).output

    def squared_error(rows):
        return (model["tnet"](visual[rows]) - privileged[rows]).square().mean((1, 2))

    def keep_best():
        if best["head"]:
            save(run / "fusion.diverged.pt", dict(kind="fusion", settings=settings, **best))
            return run / "fusion.diverged.pt"

    start = saved = time.time()
    for epoch in bar(range(first, settings["fusion_epochs"]), "fusion"):
        seed_all(settings["seed"], 2, epoch + 1)
        order = torch.randperm(len(index)).to(args.device)

        # the two share no weight: one optimiser, two losses
        model.train()
        terms = []
        for batch in order.split(settings["fusion_batch_size"]):
            v, p = visual[index[batch]], privileged[index[batch]]  # (B, L, 512)
            loss_gt = task_loss(model["head"](v, p).output, label[batch])  # Eq. 7 or 8
            loss_tnet = F.mse_loss(model["tnet"](v), p)
            loss = loss_gt + loss_tnet
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            terms.append(torch.stack([loss_gt, loss_tnet]).detach())
        loss_gt, loss_tnet = step_means(terms, ["L_gt", "T-Net's MSE"], epoch, "lower --fusion-lr",
                                        keep_best)

        # each keeps its own best epoch, chosen on held-out training groups
        model.eval()
        batches = fold.val.index.to(args.device).split(256)
        found = score(features, fold.val, answers(fused, batches))
        mse = answers(squared_error, batches).mean().item()
        for name, value in (("head", criterion(found)), ("tnet", -mse)):
            if best[name] is None or value > best[name]["score"]:
                best[name] = dict(score=value, epoch=epoch, model=snapshot(model[name]))

        if time.time() - saved > SAVE_EVERY:
            keep_progress(progress, progress_of, epoch, model, optimizer, best)
            saved = time.time()
        append_line(run / "log.jsonl", dict(stage="fusion", epoch=epoch + 1, loss=loss_gt,
                                            tnet_loss=loss_tnet, tnet_val_mse=mse, **found))

    pairs = privileged[fold.val.index.to(args.device)]
    variance = pairs.var(dim=(0, 1), correction=0).mean().item()
    head, tnet = best["head"], best["tnet"]
    print(f"fusion {settings['fusion_epochs']} epochs in {time.time() - start:.1f} s; best of epoch "
          f"{head['epoch'] + 1}; T-Net's of epoch {tnet['epoch'] + 1}, which leaves "
          f"{-tnet['score'] / max(variance, 1e-12):.2f} of the privileged features' variance "
          "unexplained")
    for name in ("head", "tnet"):
        model[name].load_state_dict(best[name]["model"])
    return model.eval()


def finished_teacher(run, settings):
    """The run's teacher, if there is one of these settings and of the backbones that are there."""
    if not (run / "teacher.pt").exists():
        return None
    state, found = load(run / "teacher.pt", "teacher"), {}
    for modality in ("visual", "privileged"):
        path = stage_1_folder(run, settings) / f"{modality}.pt"
        if path.exists():
            found[modality] = make_backbone(modality, settings)
            weights = load(path, modality)["model"].items()
            found[modality].load_state_dict({k.removeprefix("backbone."): v for k, v in weights
                                             if k.startswith("backbone.")})
    matches = state["settings"] == settings and state["backbones"] == backbones_id(found)
    return state if matches else None


def open_features(folder, settings):
    """Stage 2's features file, with windows as long as the run's samples."""
    return data.Features(folder / "features.npz", settings["length"])


def train_teacher(settings, source, args):
    """Stages 1 and 2 of one fold; writes the run folder and three result lines, returns the scores
    by role."""
    start = time.time()
    run = run_folder(settings, args.out)
    folder, path = stage_1_folder(run, settings), run / "teacher.pt"
    if args.resume and (state := finished_teacher(run, settings)):
        print(f"{path} is finished")
        return state["scores"]
    if path.exists() and (old := load(path, "teacher")["settings"]["root"]) != settings["root"]:
        raise UserError(f"{path}: is a teacher of {old}, not of {settings['root']}; "
                        "give another --out")
    fold = fold_windows(source, settings["fold"])
    run.mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    start_log(run, settings)
    print(f"{run}: {source.describe()}; samples "
          + ", ".join(f"{name} {len(part.index)}" for name, part in fold._asdict().items()))

    single = {modality: train_backbone(modality, source, fold, settings, args, folder).eval()
              for modality in ("visual", "privileged")}
    extract_features({m: model.backbone for m, model in single.items()}, source, settings, args,
                     folder / "features.npz")
    features = open_features(folder, settings)
    fold = fold_windows(features, settings["fold"], dense=True)
    model = train_fusion(features, fold, settings, args, run)

    # the test fold, once
    rows = {m: features.rows[m].to(args.device) for m in single}
    batches = fold.test.index.to(args.device).split(256)
    outputs = {m: answers(lambda i, m=m: single[m].classify(rows[m][i]), batches) for m in single}
    outputs["multimodal"] = answers(
        lambda i: model["head"](rows["visual"][i], rows["privileged"][i]).output, batches)
    found = {role: score(features, fold.test, output) for role, output in outputs.items()}
    for role, output in outputs.items():
        log_videos(run, role, features, fold.test, output)

    save(path, dict(kind="teacher", settings=settings, scores=found, backbones=features.backbones,
                    head=model["head"].state_dict(), tnet=model["tnet"].state_dict()))
    (run / "fusion.progress").unlink(missing_ok=True)
    for role, values in found.items():
        line = result_line(settings, role, values, time.time() - start)
        append_line(args.out / "results.jsonl", line)
    return found


def result_line(settings, role, found, seconds, **more):
    keys = ("dataset", "synthetic", "fold", "fusion", "seed", "length", "visual_backbone",
            "image_size")
    metrics = {k: v for k, v in found.items() if k != "n"}
    classes = settings["outputs"] if settings["task"] == "classification" else "va"
    return {"role": role, "classes": classes, **{k: settings[k] for k in keys}, **metrics,
            "n_test": found["n"], "seconds": round(seconds, 1), "torch": str(torch.__version__),
            **more}


def parse(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--dataset", choices=DATASETS, default="biovid_b")
    add_common_flags(parser)
    add("--classes", type=int, choices=(2, 5), help="BioVid: BL1 and PA4, or all five; default 2")
    add("--fold", default="1", choices=["1", "2", "3", "4", "5", "all"], help="default 1")
    add("--clips", dest="length", type=at_least(1),
        help="clips per sample; default: BioVid 1, Affwild2 8")
    add("--fusion", choices=("concat", "jca", "mmt"), help="Fig. 4; default: Table I's")
    add("--visual-backbone", choices=("r3d18", "i3d"), help="default: BioVid r3d18, Affwild2 i3d")
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument("--visual-weights", dest="weights", metavar="FILE",
                         help="state dict to start the visual backbone from")
    weights.add_argument("--pretrained", dest="weights", action="store_const", const="pretrained",
                         help="start r3d18 from torchvision's Kinetics weights")
    add("--image-size", type=at_least(32), help="pixels; default 112; smaller on a stand-in")
    add("--backbone-epochs", type=at_least(1), help="default 30 (not stated in the paper)")
    add("--batch-size", type=at_least(1), help="backbones; default: BioVid 64, Affwild2 8")
    add("--lr", type=at_least(0, float), help="backbones; default 1e-3")
    add("--fusion-epochs", type=at_least(1), help="default 50 (not stated in the paper)")
    add("--fusion-batch-size", type=at_least(1), help="default 64")
    add("--fusion-lr", type=at_least(0, float), help="default: BioVid 1e-4, Affwild2 1e-3")
    return parser.parse_args(argv)


def folds_of(source):
    """1 to 5, or fold 1 alone where the data set has a split of its own."""
    return [1, 2, 3, 4, 5] if source.split is None else [1]


def main():
    args = parse()
    args.device = choose_device(args.device, args.amp)
    settings, source = make_settings(**vars(args))
    folds = folds_of(source)
    if args.fold != "all" and int(args.fold) not in folds:
        raise UserError(f"--fold {args.fold}: {settings['root']} has its own split into training "
                        "and test; there is only fold 1")
    for fold in folds if args.fold == "all" else [int(args.fold)]:
        settings["fold"] = fold
        found = train_teacher(settings, source, args)
        print(f"{heading(settings)}, n = {found['multimodal']['n']}: "
              f"visual only (lower bound) {show(found['visual'])} | "
              f"privileged only {show(found['privileged'])} | "
              f"multimodal (upper bound) {show(found['multimodal'])}")


if __name__ == "__main__":
    data.run(main)
