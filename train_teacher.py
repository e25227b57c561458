"""Stages 1 and 2: a backbone per modality, then the fusion head and the T-Net on their frozen features.

    python train_teacher.py --dataset biovid_b --synthetic          # no data needed; minutes on a CPU
    python train_teacher.py --dataset affwild2
    python train_teacher.py --dataset biovid_a --classes 5 --fold all
    python train_teacher.py --dataset features --root my.npz

A run is a folder <out>/<dataset>[-synthetic]/c<classes>/fold<n>/ (va instead of c<classes> for valence/arousal) with
visual.pt, privileged.pt, features.npz, teacher.pt and log.jsonl; its scores are lines of <out>/results.jsonl.
The helpers that both training scripts use stand in the first half of this file.
"""
import argparse
import hashlib
import json
import os
import pickle
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

import data
import models
from data import DATASETS, Parser, Samples, UserError, windows
from pkdot import ccc, task_loss, valid

SAVE_EVERY = 30  # seconds between two files to resume from: an epoch on cached features is too short for each


def at_least(least, kind=int):
    """An argparse type: a finite number from `least` on."""
    def number(text):
        value = kind(text)
        if not least <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not a number from {least} on")
        return value
    return number


def add_common_flags(parser):
    parser.add_argument("--root", help="the data; default: data/<dataset>")
    parser.add_argument("--synthetic", action="store_true", help="use a synthetic stand-in, written on first use")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of initial weights and batch order; folds stay")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    parser.add_argument("--workers", type=at_least(0), default=2, help="processes that decode files")
    parser.add_argument("--amp", action="store_true", help="bfloat16 autocast on CUDA (the OT stays in float32)")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="where runs and results.jsonl live")
    parser.add_argument("--resume", action="store_true", help="go on where an interrupted run stopped")


def choose_device(name, amp=False):
    """The device of --device; --amp is CUDA's alone. On a CPU with AVX512_BF16 and no AMX, torch 2.14's bfloat16
    gradient of a 3x3x3 convolution over two frames (R3D-18's last layer) is off by 100 % or infinite."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from None
    device = torch.device(name)
    if amp and device.type != "cuda":
        raise UserError(f"--amp is for CUDA, and this runs on {device}: leave it out, float32 is right everywhere")
    return device


def seed_all(*numbers):
    """Seed torch from a run's seed, its stage and the epoch (from 1: numpy takes a last 0 for none): a resumed run then
    draws what an uninterrupted one draws."""
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))


def save(path, state):
    """torch.save under a temporary name, then rename: a crash leaves the old file or the new one, never half of it."""
    part = path.with_name(path.name + ".tmp")
    torch.save(state, part)
    os.replace(part, path)


def load(path, kind):
    """A checkpoint that `save` wrote, on the CPU; UserError unless it is a `kind` ("teacher", "student", ...)."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; expected a {kind} checkpoint")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError, AttributeError, IndexError):
        raise UserError(f"{path}: not a checkpoint that can be loaded safely; train it again") from None
    if not isinstance(state, dict) or state.get("kind") != kind or "settings" not in state:
        raise UserError(f"{path}: not a {kind} checkpoint of these scripts; give another file or train it again")
    return state


def finite(loss, epoch, flags):
    """The epoch's mean loss as a float; UserError if training has diverged, before anything of it is saved."""
    loss = float(loss)
    if not np.isfinite(loss):
        raise UserError(f"the loss is {loss} in epoch {epoch + 1}; {flags}")
    return loss


def append_line(path, record):
    """One JSON line, on a line of its own even if the last writer was killed halfway through its line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+") as file:
        torn = file.tell() and not (file.seek(-1, os.SEEK_END) and file.read(1) == b"\n")
        file.write(b"\n" * bool(torn) + json.dumps(record).encode() + b"\n")


def start_log(run, settings):
    """The first line of a command's log: the command, and what it ran with."""
    append_line(run / "log.jsonl", {"command": " ".join(sys.argv), "synthetic": settings["synthetic"],
                                    "python": sys.version.split()[0],
                                    "torch": str(torch.__version__), "torchvision": torchvision.__version__,
                                    "numpy": np.__version__, "date": time.strftime("%Y-%m-%d %H:%M:%S")})


def fingerprint(state):
    """12 hex digits that identify a state dict."""
    digest = hashlib.sha256()
    for key, value in state.items():
        digest.update(key.encode() + value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def run_folder(settings, out):
    kind = f"c{settings['outputs']}" if settings["task"] == "classification" else "va"
    name = settings["dataset"] + ("-synthetic" if settings["synthetic"] else "")
    return out / name / kind / f"fold{settings['fold']}"


def clip_loader(samples, batch_size, args, order=None):
    """Batches of samples, in their own order or the one given; decoding happens in worker processes."""
    workers = args.workers if not isinstance(getattr(samples.read, "__self__", None), data.Features) else 0
    samples = samples if order is None else Subset(samples, order.tolist())
    return DataLoader(samples, batch_size, num_workers=workers, pin_memory=args.device.type == "cuda")


def bar(batches, text):
    return tqdm(batches, desc=text, leave=False, disable=None)


def part_windows(source, part, name, dense=False):
    """index, keep of the windows in a part; for training only those that have a label at all."""
    index, keep = windows(source.video, source.length, dense)
    label = data.sample_labels(source.label, index, keep)
    use = torch.from_numpy(part[index[:, 0].numpy()] == name)
    labelled = valid(label).any(1) if label.is_floating_point() else use
    if name == "train":
        use &= labelled
    if not (use & labelled).any():
        raise UserError(f"{source.path}: no sample with a label in the {name} part of this fold")
    return index[use], keep[use]


def score(output, source, index, keep):
    """Accuracy in percent, or CCC of valence and arousal over single frames, of the windows' outputs; and their n.

    A row's prediction is the one made in the window that keeps it (each row once), and holds for all its frames.
    """
    if source.task == "classification":
        right = output.argmax(1).cpu() == source.label[index[:, 0]]
        return {"accuracy": 100 * right.double().mean().item(), "n": len(right)}
    x, y, _ = frame_predictions(output, source, index, keep)
    return {"valence": ccc(x[:, 0], y[:, 0]).item(), "arousal": ccc(x[:, 1], y[:, 1]).item(), "n": len(x)}


def frame_predictions(output, source, index, keep):
    """Prediction (T, 2), label (T, 2) and row (T,) of each valid frame of the windows, in float64."""
    prediction = torch.full((len(source.label), 2), float("nan"), dtype=torch.float64)
    prediction[index[keep]] = output.double().cpu()[keep]
    frames = ~prediction.isnan().any(1)[source.frame_row]
    row = source.frame_row[frames]
    return prediction[row], source.frame_label[frames].double(), row


def score_videos(output, source, index, keep):
    """{video: its own CCC of valence and arousal, and its valid frames}."""
    x, y, row = frame_predictions(output, source, index, keep)
    video = source.video[row.numpy()]
    return {str(v): {"valence": ccc(x[mask, 0], y[mask, 0]).item(), "arousal": ccc(x[mask, 1], y[mask, 1]).item(),
                     "n": int(mask.sum())} for v in np.unique(video) for mask in [torch.from_numpy(video == v)]}


def criterion(scores):
    """What the best epoch is chosen by: accuracy, or the mean of the two CCCs."""
    return scores["accuracy"] if "accuracy" in scores else (scores["valence"] + scores["arousal"]) / 2


def log_videos(run, role, output, source, index, keep):
    """The per-video table of valence/arousal, into log.jsonl."""
    if source.task == "regression":
        append_line(run / "log.jsonl", {"test_videos_of": role, "videos": score_videos(output, source, index, keep)})


def heading(settings, fold):
    return ("SYNTHETIC " if settings["synthetic"] else "") + f"{settings['dataset']} fold {fold}, test"


def show(scores):
    if "accuracy" in scores:
        return f"accuracy {scores['accuracy']:.2f} %"
    return f"CCC valence {scores['valence']:.3f}, arousal {scores['arousal']:.3f}"


def snapshot(module):
    return {k: v.detach().cpu().clone() for k, v in module.state_dict().items()}


@torch.inference_mode()
def gather(forward, batches):
    """forward(batch) over all batches, concatenated on the CPU; one copy at the end, so that no step waits for it."""
    return torch.cat([forward(batch).float() for batch in batches]).cpu()


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
            raise UserError(f"{path} was trained with {key} {old}, not {new}; use the same flags, or another --out"
                            + again)


# ---------------------------------------------------------------------------------------------------- the two stages

TEACHER_DEFAULTS = {  # Table I and section IV-B; batch size and learning rate are the backbones'
    "biovid_a": dict(fusion="concat", visual_backbone="r3d18", clips=1, batch_size=64, lr=1e-3, fusion_lr=1e-4),
    "biovid_b": dict(fusion="mmt", visual_backbone="r3d18", clips=1, batch_size=64, lr=1e-3, fusion_lr=1e-4),
    "affwild2": dict(fusion="jca", visual_backbone="i3d", clips=8, batch_size=8, lr=1e-3, fusion_lr=1e-3),
    "features": dict(fusion="concat", visual_backbone="r3d18", clips=None, batch_size=64, lr=1e-3, fusion_lr=1e-4)}
COMMON = dict(classes=2, image_size=112, backbone_epochs=30, fusion_epochs=50)  # the epochs are not in the paper
STAND_IN = {  # few samples and a CPU: smaller images, smaller batches, more passes over less
    "biovid": dict(image_size=32, batch_size=16, backbone_epochs=4, fusion_epochs=200),
    "affwild2": dict(image_size=48, batch_size=4, lr=1e-4, backbone_epochs=10, fusion_epochs=20)}


class Unimodal(nn.Module):
    """Stage 1's model: a backbone and its own linear head."""

    def __init__(self, backbone, settings):
        super().__init__()
        self.backbone, self.head = backbone, nn.Linear(models.D, settings["outputs"])
        self.per_clip = settings["task"] == "regression"

    def forward(self, x):
        return self.classify(self.backbone(x))

    def classify(self, features):  # (B, L, 512) -> (B, classes) or (B, L, 2)
        return self.head(features if self.per_clip else features.mean(1))


def train_backbone(modality, source, part, settings, args, run):
    """Stage 1: one modality alone, backbone and linear head; returns the model of the best validation epoch."""
    path, progress = run / f"{modality}.pt", run / f"{modality}.progress"
    stage = ["visual", "privileged"].index(modality)
    seed_all(settings["seed"], stage)
    backbone = (models.visual_backbone if modality == "visual" else models.privileged_backbone)(settings)
    model = Unimodal(backbone, settings)
    if args.resume and path.exists():
        state = load(path, modality)
        same_settings(state, settings, path)
        model.load_state_dict(state["model"])
        return model.to(args.device)
    train, val = (Samples(source, modality, *part_windows(source, part, name)) for name in ("train", "val"))
    if modality == "visual" and settings["weights"]:
        load_public_weights(backbone, settings["weights"])
    if isinstance(backbone, (models.FeatureMLP, models.SpectrogramResNet18)):
        backbone.standardise(*statistics(clip_loader(train, 64, args)))
    model.to(args.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=settings["lr"], fused=True)
    first, best = 0, None
    if args.resume and progress.exists():
        first, best = restore_progress(progress, settings, model, optimizer)

    def forward(batch):
        with torch.autocast(args.device.type, torch.bfloat16, enabled=args.amp):
            output = model(batch[0].to(args.device, non_blocking=True))
        return output.float()

    saved = time.time()
    for epoch in range(first, settings["backbone_epochs"]):
        start = time.time()
        seed_all(settings["seed"], stage, epoch + 1)
        model.train()
        total = 0.0
        loader = clip_loader(train, settings["batch_size"], args, torch.randperm(len(train)))
        for batch in bar(loader, f"{modality} {epoch + 1}/{settings['backbone_epochs']}"):
            output = forward(batch)
            loss = task_loss(output, batch[1].to(args.device, non_blocking=True))  # Eq. 7 or 8
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach()
        model.eval()
        total = finite(total / len(loader), epoch, "lower --lr")
        scores = score(gather(forward, clip_loader(val, settings["batch_size"], args)), source, *val.windows)
        if best is None or criterion(scores) > best["score"]:  # the epoch is chosen on the held-out training groups
            best = dict(score=criterion(scores), epoch=epoch, model=snapshot(model))
        if time.time() - saved > SAVE_EVERY:
            keep_progress(progress, settings, epoch, model, optimizer, best)
            saved = time.time()
        line = dict(stage=modality, epoch=epoch + 1, loss=total, **scores,
                    seconds=time.time() - start)
        append_line(run / "log.jsonl", line)
        print(f"{modality} epoch {epoch + 1:3d}  loss {line['loss']:.4f}  val {show(scores)}  {line['seconds']:.1f} s")
    save(path, dict(kind=modality, settings=settings, **best))
    progress.unlink(missing_ok=True)
    model.load_state_dict(best["model"])
    return model


def load_public_weights(backbone, weights):
    """Weights from another training, for the visual backbone: a file, or "pretrained" for torchvision's R3D-18."""
    if weights == "pretrained":
        if not isinstance(backbone, models.R3D18):
            raise UserError("--pretrained is for r3d18 alone; give i3d a file with --visual-weights")
        try:
            state = torchvision.models.video.R3D_18_Weights.KINETICS400_V1.get_state_dict(progress=True)
        except OSError as error:
            raise UserError(f"--pretrained: the download failed ({error}); give a file with --visual-weights") from None
    else:
        try:
            state = torch.load(weights, map_location="cpu", weights_only=True)
            state = state.get("state_dict", state)
        except (OSError, pickle.UnpicklingError, RuntimeError, EOFError, AttributeError) as error:
            raise UserError(f"--visual-weights {weights}: not a state dict ({str(error).splitlines()[0]})") from None
    try:
        left_out, missing = models.load_weights(backbone, state)
    except ValueError as error:
        raise UserError(f"--visual-weights {weights}: {error}") from None
    print(f"{weights}: {len(state) - len(left_out)} tensors loaded; left out: {', '.join(left_out) or 'none'}; "
          f"not in it, trained from scratch: {', '.join(missing) or 'none'}")


def statistics(loader):
    """Mean and standard deviation of the training part, one value for spectrograms, one per feature for vectors."""
    count, total, squares = 0, 0.0, 0.0
    for clips, _ in bar(loader, "statistics"):
        axes = (0, 1) if clips.ndim == 3 else tuple(range(clips.ndim))
        total, squares = total + clips.double().sum(axes), squares + clips.double().square().sum(axes)
        count += clips.numel() / total.numel()
    mean, square = total / count, squares / count
    variance = square - mean**2
    return mean, variance.where(variance > 1e-12 * square, 0).sqrt()  # a constant's rest is rounding, not variance


def extract_features(backbones, source, settings, args, path):
    """Stage 2, first half: both frozen backbones over every clip once -> the features file."""
    every = torch.arange(len(source.label))
    arrays = {}
    for modality, backbone in backbones.items():
        backbone.eval()
        samples = Samples(source, modality, every[:, None], torch.ones(len(every), 1, dtype=torch.bool))

        rows, done = torch.empty(len(every), models.D, device=args.device), 0  # all at once: no small pieces to keep
        with torch.inference_mode(), torch.autocast(args.device.type, torch.bfloat16, enabled=args.amp):
            for clips, _ in bar(clip_loader(samples, settings["batch_size"], args), f"features {modality}"):
                rows[done:done + len(clips)] = backbone(clips.to(args.device, non_blocking=True))[:, 0]
                done += len(clips)
        arrays[modality] = rows.cpu().numpy()  # (rows, 512)
    length = 1 if settings["dataset"] == "affwild2" else source.length  # its windows overlap, and are cut by index
    first = slice(None, None, length)
    arrays = {k: v.reshape(-1, length, models.D) for k, v in arrays.items()}
    label = source.label.numpy()
    arrays["label"] = label[first] if label.ndim == 1 else label.reshape(-1, length, 2)
    arrays.update(group=source.group[first], video=source.video[first], name=source.name[first])
    if source.split is not None:
        arrays["split"] = source.split[first]
    if source.task == "regression":
        arrays.update(frame_label=source.frame_label.numpy(), frame_row=source.frame_row.numpy())
    arrays["backbones"] = np.array("-".join(fingerprint(b.state_dict()) for b in backbones.values()))
    data.save_features(path, arrays)


def train_fusion(features, part, settings, args, run):
    """Stage 2, second half: fusion head on the task loss, T-Net on MSE(T(visual), privileged); the best epoch of each.

    The features lie on the device once, and a batch of windows is rows picked by index: nothing is copied per window.
    """
    progress, progress_of = run / "fusion.progress", {**settings, "backbones": features.backbones}
    seed_all(settings["seed"], 2)
    model = nn.ModuleDict({"head": models.fusion_head(settings), "tnet": models.TNet()}).to(args.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=settings["fusion_lr"], fused=True)  # no weight in common
    visual, privileged = (features.rows[m].to(args.device) for m in ("visual", "privileged"))
    index, keep = part_windows(features, part, "train", dense=True)
    label = data.sample_labels(features.label, index, keep).to(args.device)
    index, val = index.to(args.device), part_windows(features, part, "val")
    first, best = 0, dict(head=None, tnet=None)
    if args.resume and progress.exists():
        first, best = restore_progress(progress, progress_of, model, optimizer)
    start = saved = time.time()
    for epoch in bar(range(first, settings["fusion_epochs"]), "fusion"):
        seed_all(settings["seed"], 2, epoch + 1)
        model.train()
        losses = []
        for batch in torch.randperm(len(index)).to(args.device).split(settings["fusion_batch_size"]):
            v, p = visual[index[batch]], privileged[index[batch]]  # (B, L, 512)
            output, _ = model["head"](v, p)
            loss_gt = task_loss(output, label[batch])  # Eq. 7 or 8
            loss_tnet = F.mse_loss(model["tnet"](v), p)
            loss = loss_gt + loss_tnet
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(torch.stack([loss_gt, loss_tnet]).detach())
        model.eval()
        loss_gt, loss_tnet = torch.stack(losses).mean(0).tolist()
        finite(loss_gt + loss_tnet, epoch, "lower --fusion-lr")
        batches = val[0].to(args.device).split(256)
        scores = score(gather(lambda i: model["head"](visual[i], privileged[i])[0], batches), features, *val)
        mse = gather(lambda i: (model["tnet"](visual[i]) - privileged[i]).square().mean((1, 2)), batches).mean().item()
        for name, value in (("head", criterion(scores)), ("tnet", -mse)):
            if best[name] is None or value > best[name]["score"]:
                best[name] = dict(score=value, epoch=epoch, model=snapshot(model[name]))
        if time.time() - saved > SAVE_EVERY:
            keep_progress(progress, progress_of, epoch, model, optimizer, best)
            saved = time.time()
        append_line(run / "log.jsonl", dict(stage="fusion", epoch=epoch + 1, loss=loss_gt, tnet_loss=loss_tnet,
                                            tnet_val_mse=mse, **scores))
    variance = privileged[val[0].to(args.device)].var(dim=(0, 1), correction=0).mean().item()
    print(f"fusion {settings['fusion_epochs']} epochs in {time.time() - start:.1f} s; best of epoch "
          f"{best['head']['epoch'] + 1}; T-Net's of epoch {best['tnet']['epoch'] + 1}, which leaves "
          f"{-best['tnet']['score'] / max(variance, 1e-12):.2f} of the privileged features' variance unexplained")
    for name in ("head", "tnet"):
        model[name].load_state_dict(best[name]["model"])
    return model.eval()


def finished_teacher(run):
    """The run's teacher, if there is one and it is of the backbones beside it."""
    if not (run / "teacher.pt").exists():
        return None
    state = load(run / "teacher.pt", "teacher")
    weights = [load(run / f"{m}.pt", m)["model"] for m in ("visual", "privileged") if (run / f"{m}.pt").exists()]
    backbones = ({k.removeprefix("backbone."): v for k, v in w.items() if k.startswith("backbone.")} for w in weights)
    return state if "-".join(map(fingerprint, backbones)) == state["backbones"] else None


def train_teacher(settings, args):
    """Stages 1 and 2 of one fold; writes the run folder and three result lines, returns the scores by role."""
    start = time.time()
    run = run_folder(settings, args.out)
    path = run / "teacher.pt"
    if args.resume and (state := finished_teacher(run)) and state["settings"] == settings:
        print(f"{path} is finished")
        return state["scores"]
    if path.exists() and (old := load(path, "teacher")["settings"]["root"]) != settings["root"]:
        raise UserError(f"{path}: is a teacher of {old}, not of {settings['root']}; give another --out")
    source = data.open_dataset(settings["dataset"], settings["root"], settings["outputs"], settings["length"],
                               settings["image_size"])
    part = data.parts(source, settings["fold"])
    run.mkdir(parents=True, exist_ok=True)
    start_log(run, settings)
    print(f"{run}: {source.describe()}; rows "
          + ", ".join(f"{name} {(part == name).sum()}" for name in ("train", "val", "test")))
    single = {m: train_backbone(m, source, part, settings, args, run).eval() for m in ("visual", "privileged")}
    extract_features({m: model.backbone for m, model in single.items()}, source, settings, args, run / "features.npz")
    features = run_features(run, settings)
    model = train_fusion(features, part, settings, args, run)

    test = part_windows(features, part, "test")
    rows = {m: features.rows[m].to(args.device) for m in single}
    batches = test[0].to(args.device).split(256)
    outputs = {m: gather(lambda i, m=m: single[m].classify(rows[m][i]), batches) for m in single}
    outputs["multimodal"] = gather(lambda i: model["head"](rows["visual"][i], rows["privileged"][i])[0], batches)
    scores = {role: score(output, features, *test) for role, output in outputs.items()}
    for role, output in outputs.items():
        log_videos(run, role, output, features, *test)
    save(path, dict(kind="teacher", settings=settings, scores=scores, backbones=features.backbones,
                    head=model["head"].state_dict(), tnet=model["tnet"].state_dict()))
    (run / "fusion.progress").unlink(missing_ok=True)
    for role, values in scores.items():
        append_line(args.out / "results.jsonl", result_line(settings, role, values, time.time() - start))
    return scores


def run_features(run, settings, privileged=True):
    """The run's features file, with windows as long as the run's samples."""
    features = data.Features(run / "features.npz", privileged)
    features.length = settings["length"]
    return features


def result_line(settings, role, scores, seconds, **more):
    keys = ("dataset", "synthetic", "fold", "fusion", "seed", "length", "visual_backbone", "image_size")
    metrics = {k: v for k, v in scores.items() if k != "n"}
    return {"role": role, "classes": settings["outputs"] if settings["task"] == "classification" else "va",
            **{k: settings[k] for k in keys}, **metrics, "n_test": scores["n"], "seconds": round(seconds, 1),
            "torch": str(torch.__version__), **more}


def parse(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--dataset", choices=DATASETS, default="biovid_b")
    add_common_flags(parser)
    parser.add_argument("--classes", type=int, choices=(2, 5), help="BioVid: BL1 and PA4, or all five; default 2")
    parser.add_argument("--fold", default="1", choices=["1", "2", "3", "4", "5", "all"], help="default 1")
    parser.add_argument("--clips", type=at_least(1), help="clips per sample; default: BioVid 1, Affwild2 8")
    parser.add_argument("--fusion", choices=("concat", "jca", "mmt"), help="Fig. 4; default: Table I's")
    parser.add_argument("--visual-backbone", choices=("r3d18", "i3d"), help="default: BioVid r3d18, Affwild2 i3d")
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument("--visual-weights", metavar="FILE", help="state dict to start the visual backbone from")
    weights.add_argument("--pretrained", action="store_true", help="start r3d18 from torchvision's Kinetics weights")
    parser.add_argument("--image-size", type=at_least(32), help="pixels; default 112, the paper's; 32 with --synthetic")
    parser.add_argument("--backbone-epochs", type=at_least(1), help="default 30 (not stated in the paper)")
    parser.add_argument("--batch-size", type=at_least(1), help="backbones; default: BioVid 64, Affwild2 8")
    parser.add_argument("--lr", type=at_least(0, float), help="backbones; default 1e-3")
    parser.add_argument("--fusion-epochs", type=at_least(1), help="default 50 (not stated in the paper)")
    parser.add_argument("--fusion-batch-size", type=at_least(1), default=64, help="default 64")
    parser.add_argument("--fusion-lr", type=at_least(0, float), help="default: BioVid 1e-4, Affwild2 1e-3")
    return parser.parse_args(argv)


def make_settings(args):
    """What a run is made of, as plain values: the flags, and the data set's defaults where a flag was not given."""
    if args.dataset == "features" and args.synthetic:
        raise UserError("--dataset features has no stand-in; give --root FILE.npz")
    if args.dataset == "features" and not args.root:
        raise UserError("--dataset features needs --root FILE.npz (the format: README.md)")
    root = args.root or f"data/{args.dataset}" + "-synthetic" * args.synthetic
    if args.synthetic:
        data.write_stand_in(args.dataset, root)
    synthetic = (Path(root) / "SYNTHETIC").is_file()
    defaults = {**COMMON, **TEACHER_DEFAULTS[args.dataset]}
    if synthetic:
        defaults.update(STAND_IN[args.dataset.partition("_")[0]])
    settings = {k: v if getattr(args, k) is None else getattr(args, k) for k, v in defaults.items()}
    source = data.open_dataset(args.dataset, root, settings.pop("classes"), settings["clips"], settings["image_size"])
    settings.update(length=source.length, dataset=args.dataset, root=str(Path(root)), synthetic=synthetic,
                    seed=args.seed, task=source.task, outputs=source.outputs, fusion_batch_size=args.fusion_batch_size,
                    amp=args.amp, weights="pretrained" if args.pretrained else args.visual_weights)
    del settings["clips"]
    if args.dataset == "features":
        settings.update(visual_dim=source.rows["visual"].shape[1], privileged_dim=source.rows["privileged"].shape[1])
    folds = [1, 2, 3, 4, 5] if source.split is None else [1]
    if args.fold != "all" and int(args.fold) not in folds:
        raise UserError(f"--fold {args.fold}: {root} has its own split into training and test; there is only fold 1")
    return settings, folds if args.fold == "all" else [int(args.fold)]


def main():
    args = parse()
    args.device = choose_device(args.device, args.amp)
    settings, folds = make_settings(args)
    for fold in folds:
        scores = train_teacher({**settings, "fold": fold}, args)
        print(f"{heading(settings, fold)}, n = {scores['multimodal']['n']}: visual only (lower bound) "
              f"{show(scores['visual'])} | privileged only {show(scores['privileged'])} | multimodal (upper bound) "
              f"{show(scores['multimodal'])}")


if __name__ == "__main__":
    data.run(main)
