"""The data sets as they lie on disk, their spectrograms, the features file, folds and windows, and
the stand-in.

    python data.py --check biovid_b --root data/biovid_b          # counts, and every fault found
    python data.py --synthetic biovid_b --root data/my-stand-in   # a small stand-in, same format
    python data.py --crop video --root data/biovid_b              # face crops from its videos

A data set is a sequence of *rows*: one row is one clip (F face frames and the privileged signal of
the same span). Its attributes, arrays over the rows first:

    name    which clip this is
    label   int64 (R,), -1 where there is none; or float32 (R, 2), NaN where there is none
    group   what folds keep together (a subject)
    split   "train" or "test" where the data set fixes it, else None
    video   rows of one sequence are consecutive
    visual(row), privileged(row)   one clip's tensors, from disk
    task, outputs   "classification" and the number of classes, or "regression" and 2
    frame_label, frame_row   of regression: the frames that are scored, and whose rows they are
    path, length, describe()   root, rows a sample, counts in one line
    faults, notes, check()   what is wrong, and what lies there unused or odd; check() looks into
            the files, too

and a *sample* is a window of `length` consecutive rows of one sequence (`Windows`, `fold_windows`).

What all scripts share lives here, too: `Parser`, `UserError` (a user's mistake), `run`, which turns
errors into one line, `bar`, and `replacing`, which never leaves half a file.
"""
import argparse
import json
import math
import os
import re
import shutil
import sys
import time
import warnings
import zipfile
import zlib
from contextlib import contextmanager, suppress
from functools import cache
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from scipy.io import wavfile
from scipy.signal import fftconvolve, resample_poly, spectrogram
from torch import Tensor
from torch.utils.data import DataLoader, default_collate
from torchvision.transforms.functional import pil_to_tensor, resize
from tqdm import tqdm

DATASETS = "biovid_b biovid_a affwild2 features".split()
NO_LABEL = math.nan  # valence/arousal without a label: here,
INVALID = -5.0  # and in files
SAMPLE = r"\d{6}_[mw]_\d\d-(BL1|PA[1-4])-\d{3}"  # BioVid's names: subject, level, number
BIOVID = ("expected faces/<subject>/<sample>/img_00001.jpg and "
          "biosignals_filtered/<subject>/<sample>_bio.csv under the root; on request: "
          "https://www.nit.ovgu.de/BioVid.html; --synthetic runs without it")
AFFWILD2 = ("expected cropped_aligned/<video>/00001.jpg, the annotations and audio/<video>.wav "
            "under the root; on request: https://ibug.doc.ic.ac.uk/resources/aff-wild2/; "
            "--synthetic runs without it")
LITTER = r"[.@_]|lost\+found$"  # what macOS, a NAS and a disk check leave behind,
FOLDER = "[!.@_]*/"  # and a glob of all else
FEATURES = ("expected a features file (.npz): float32 visual (N, L, Dv) and privileged (N, L, Dp), "
            "without L if it is 1; label int (N,), -1 for none, or float (N, 2) or (N, L, 2), -5 "
            "for none; if you like group (of a subject), split and name (N,), text, .astype(str), "
            "or whole numbers")


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, like every other error of the user's."""

    def __init__(self, description):
        super().__init__(description=description, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        raise UserError(f"{message}; see python {self.prog} --help")


def a_path(text):
    """An argparse type: a path in which ~ is the home folder."""
    return Path(text).expanduser()


class UserError(ValueError):
    """A user's mistake: one line that says what is wrong, where, and what to do; see `run`."""


def bar(iterable, text, quiet=False):
    """Yields what is in it and shows how far it is: a bar on a terminal; elsewhere, a file say, a
    line every half a minute."""
    if quiet or sys.stderr.isatty():
        yield from tqdm(iterable, text, leave=False, disable=quiet)
        return
    start = last = time.monotonic()
    for done, item in enumerate(iterable, 1):
        yield item
        now = time.monotonic()
        if now > last + 30:
            last = now
            left = (now - start) / done * (len(iterable) - done)
            print(f"{text} {done} of {len(iterable)}, about {left / 60:.0f} min left",
                  file=sys.stderr)


class Windows(NamedTuple):
    """Samples as windows over a source's rows: S of them, L rows each."""
    index: Tensor  # (S, L) the rows
    keep: Tensor  # (S, L) bool: which of them count; a tiling counts each row once
    label: Tensor  # int64 (S,), -1 for none; or float32 (S, L, 2), NaN for none or not keep

    @property
    def labelled(self):
        """bool (S,): which samples have a label at all."""
        known = has_label(self.label)
        return known if known.ndim == 1 else known.any(1)

    def take(self, which):
        """The samples that a mask or indices pick."""
        return Windows(*(field[which] for field in self))


class Fold(NamedTuple):
    train: Windows
    val: Windows
    test: Windows


def has_label(label):
    """bool, of each class in label (R,), or each valence and arousal in (..., 2): not -1, NaN."""
    return label >= 0 if label.ndim == 1 else label.isfinite().all(-1)


def read_windows(read, windows):
    """The clips (B, L, ...) of windows of rows; read is a source's `visual` or `privileged`."""
    clips = [torch.stack([read(row) for row in rows]) for rows in windows]
    return default_collate(clips)  # in a worker it fills shared memory, or says that there is none


def windows(video, length, dense=False):
    """Samples of `length` consecutive rows of one video -> index, keep, both (S, length).

    Tiling by default, the last window aligned to the video's end; dense starts a window at every
    row. keep marks what counts: in a tiling each row exactly once (not again where the last window
    overlaps the one before), and never the repeats of the last row that fill up a video shorter
    than a window.
    """
    edges = torch.from_numpy(np.flatnonzero(np.r_[True, video[1:] != video[:-1], True]))
    row = torch.arange(len(video))
    begin, end = (edge.repeat_interleave(edges.diff()) for edge in (edges[:-1], edges[1:]))
    last = torch.maximum(end - length, begin)  # where the last window of a row's video begins
    starts = row <= last if dense else (row - begin) % length == 0
    first, last, end = (of_row[starts, None] for of_row in (row, last, end))  # (windows, 1) each
    place = torch.minimum(first, last) + torch.arange(length)  # (windows, length)
    return torch.minimum(place, end - 1), (place >= first) & (place < end)


def label_windows(source, label, dense=False):
    """All windows of a source under its rows' labels: a sample's class is its first row's."""
    index, keep = windows(source.video, source.length, dense)
    if label.ndim == 1:
        return Windows(index, keep, label[index[:, 0]])
    return Windows(index, keep, label[index].where(keep[..., None], NO_LABEL))


def fold_windows(source, fold, dense=False, folds="subjects", labelled=None):
    """The samples of fold 1..5 -> Fold; they tile, or in training start at every row with dense.

    A training window without a label stays: it is a pair of modalities. labelled=N hides all
    training labels but those of N samples (tiles), the same ones whatever the seed; folds: see
    `parts`. Raises UserError where training lacks a class, a part has no label, or N of them cannot
    be had.
    """
    part = parts(source, fold, folds)
    label = source.label
    if labelled is not None:
        label = few_labels(source, part == "train", labelled, fold)

    samples = []
    for name in Fold._fields:
        whole = label_windows(source, label, dense and name == "train")
        samples.append(whole.take(part[whole.index[:, 0]] == name))
        if not samples[-1].labelled.any():
            raise UserError(f"{source.path}: no sample with a label in the {name} part of fold "
                            f"{fold}; give labels, or take another fold")
    if source.task == "classification":
        lacking = {*range(source.outputs)} - {*samples[0].label.tolist()}
        if lacking:
            raise UserError(f"{source.path}: no training sample of class {str(lacking)[1:-1]} of 0 "
                            f"to {source.outputs - 1} in fold {fold}; add some, or take another "
                            "fold")
    return Fold(*samples)


def fold_numbers(source):
    """Five, or one where the data set has a split of its own."""
    return range(1, 6) if source.split is None else [1]


def refused_folds(source, numbers, folds="subjects", labelled=None):
    """What training says of those of the numbered folds that it refuses."""
    faults = []
    for fold in numbers:
        with noting(faults):
            fold_windows(source, fold, False, folds, labelled)
    return faults


def unlabelled(label):
    """How many rows have no label, in words."""
    mark = "-1" if label.ndim == 1 else "-5"
    return f"{int((~has_label(label)).sum())} clips without a label ({mark})"


def few_labels(source, train, number, fold):
    """The rows' labels, hidden in training rows but for `number` samples: each class in proportion,
    and at least once. They are the first of one order that the fold alone decides, so that 20 of
    them are among 60."""
    samples = label_windows(source, source.label)
    candidates = train[samples.index[:, 0]] & samples.labelled.numpy()
    order = np.random.default_rng(fold).permutation(np.flatnonzero(candidates))
    level = samples.label[order].numpy() if samples.label.ndim == 1 else 0 * order
    levels, counts = np.unique(level, return_counts=True)
    if not len(levels) <= number <= len(order):
        raise UserError(f"{source.path}: cannot keep {number} training labels; fold {fold} takes "
                        f"from {len(levels)} (one a class) to {len(order)} (all there are)")

    # each class is spread evenly over a line from 0 to 1, its first sample at 0
    place = np.zeros(len(order))
    for one, count in zip(levels, counts, strict=True):
        place[level == one] = np.r_[0, 1.5:count] / count
    kept = samples.take(order[place.argsort(kind="stable")[:number]])

    hidden = train.copy()
    label = source.label.clone()
    hidden[kept.index[kept.keep]] = False
    label[hidden] = -1 if label.ndim == 1 else NO_LABEL
    return label


def parts(source, fold, folds="subjects"):
    """Which part each row is in for fold 1..5 -> array of "train", "val", "test". [ours]

    Groups (subjects, videos) are never divided. Test is the fold, or the data set's own split where
    it has one; 1/8 of the remaining groups, at least one, is held out as "val" to choose the epoch.
    Folds do not depend on any seed flag. folds="clips" divides samples instead, as the authors'
    release: then one person is in train and test.
    """
    group = source.group
    split = source.split
    if folds == "clips":
        if split is not None:
            raise UserError(f"{source.path}: has a split of its own, no folds; leave --folds out")
        group = windows(source.video, source.length)[1].nonzero()[:, 0].numpy()  # a row's sample
    groups = np.random.default_rng(0).permutation(np.unique(group))
    test = np.isin(group, groups[fold - 1::5]) if split is None else split == "test"
    rest = groups[np.isin(groups, group[~test])]
    if split is None and len(groups) < 5 or len(rest) < 2 or not test.any():
        found = (f"{len(groups)} groups" if split is None else
                 f"{len(rest)} groups to train on and {test.sum()} rows to test")
        raise UserError(f"{source.path}: 5 folds need at least 5 groups (subjects), a split two to "
                        f"train on and a test part; found {found}")
    return np.where(test, "test", np.where(np.isin(group, rest[::8]), "val", "train"))


def aligned(source, windows, output):
    """What a metric compares of the windows' outputs, (S, classes) or (S, L, 2) on the CPU:
    prediction (T, C) and label int64 (T,) of each labelled sample, or float64 (T, 2) of each frame.

    A row's valence and arousal are those of the one window that keeps it, and hold for all its
    frames. Samples and frames without a label are left out.
    """
    if source.task == "classification":
        chosen = windows.labelled
        return output[chosen], windows.label[chosen]
    kept = windows.index[windows.keep]
    of_row = torch.zeros(len(source.label), 2, dtype=torch.float64)
    of_row[kept] = output.double()[windows.keep]
    frames = torch.isin(source.frame_row, kept)
    row = source.frame_row[frames]
    return of_row[row], source.frame_label[frames].double()


def image_files(folder, prefix, first=0):
    """Numbers and names of a folder's images, in order; UserError for a number below first."""
    form = prefix + r"(\d{5,9})\.(?:jpe?g|png)"
    names = dict(sorted((int(match[1]), name) for name in os.listdir(folder)
                        if (match := re.fullmatch(form, name, re.IGNORECASE))))
    if min(names, default=first) < first:
        raise UserError(f"{folder}: its images are numbered from 0, expected from 1; rename "
                        "them, or say with --face-start (BioVid) when image 1 was taken")
    return np.array([*names], int), np.array([*names.values()])


@contextmanager
def blaming(path, expected, advice, kinds=Exception):
    """What fails in this block fails because of the file, read or written, unless it is for want of
    memory. Damaged bytes make Pillow, numpy and scipy raise any of a dozen kinds of error."""
    try:
        yield
    except kinds as error:
        if isinstance(error, UserError) or lacks_memory(error):
            raise
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: {expected} ({reason}); {advice}") from None


def read_image(path):
    """A jpg or png as a viewer shows it."""
    with blaming(path, "not a plain jpg or png", "extract it again or delete it"):
        with (warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning),
              Image.open(path, formats=("JPEG", "PNG")) as file):
            image = ImageOps.exif_transpose(file)
        if image.mode not in "RGB L P 1 CMYK".split() or "transparency" in image.info:
            raise ValueError(f"{image.mode} pixels; save it with 8 bits and without alpha")
        return image.convert("RGB")


def read_frames(folder, names, size):
    """Images, resized and stacked -> uint8 (3, F, size, size)."""
    return torch.stack([resize(pil_to_tensor(read_image(folder / name)), [size, size])
                        for name in names], 1)


def read_table(path, delimiter, columns):
    """The named columns of a text table as numbers, (rows, columns); it may have no row."""
    expected = f"not a table of numbers with a first line of names, among them {columns}"
    with (blaming(path, expected, "extract it again"), open(path, encoding="utf-8-sig") as file,
          warnings.catch_warnings(action="ignore", category=UserWarning)):  # of an empty table
        header = [name.strip() for name in file.readline().split(delimiter)]
        use = None if header == columns else [header.index(name) for name in columns]
        return np.loadtxt(file, delimiter=delimiter, usecols=use, ndmin=2)


def find_folder(root, layout, *names):
    """The first of root/name that exists, or root/name/name as unzipping sometimes leaves it."""
    for name in names:
        for path in (root / name / name, root / name):
            if path.is_dir():
                return path
    raise UserError(f"{root / names[0]}: no such folder; {layout}")


@contextmanager
def noting(faults):
    """A user's mistake in this block becomes a line in `faults`, and the block ends there."""
    try:
        yield
    except (UserError, OSError) as error:
        faults.append(str(error))


class Source:
    """What the data sets of images share: where the clips of each row lie on disk.

    `images[row]` are a folder and names in it, `signals[row]` what the privileged signal is read
    from. `faults` lists what is wrong with the folders, `notes` what lies there unused or is odd,
    and does no harm; reading a file that is wrong raises UserError.
    """
    split = None

    def __init__(self, root, length, image_size):
        self.path = Path(root)
        self.length = length
        self.image_size = image_size
        self.faults = []
        self.notes = []

    def set_columns(self, rows, names):
        """Sets the attributes whose values the rows hold in this order."""
        for name, column in zip(names.split(), zip(*rows, strict=True), strict=True):
            setattr(self, name, column if name in ("images", "signals") else np.array(column))

    def visual(self, row):
        return read_frames(*self.images[row], self.image_size)

    def traces(self, modality):
        """What tells the rows' files from others: their sizes, and of a signal, since recordings of
        one length have one size, some bytes. Images are not opened: there may be a million."""
        if modality == "visual":
            return [[name, os.path.getsize(os.path.join(folder, name))]
                    for folder, names in self.images for name in names]

        @cache
        def trace(path):
            size = path.stat().st_size
            with open(path, "rb") as file:
                file.seek(size // 2)
                return [size, zlib.crc32(file.read(4096))]

        return [[trace(path), *where] for path, *where in self.signals]

    def check(self):
        """Adds what is wrong or odd inside the files to `faults` and `notes`."""
        for row in bar(range(len(self.name)), "signals"):
            with noting(self.faults):
                self.privileged(row)

        shown = {}  # of each folder: an image that nothing reads, damaged or not, does no harm
        for folder, names in self.images:
            shown.setdefault(folder, set()).update(names)
        for folder, used in bar(shown.items(), "images"):
            names = image_files(folder, self.PREFIX)[1]
            for name in names:
                with noting(self.faults if name in used else self.notes):
                    read_image(folder / name)
            others = sorted(name for name in {*os.listdir(folder)} - {*names}
                            if not re.match(LITTER, name))
            if others:
                self.notes.append(f"{folder}: {len(others)} files not used, for their names or as "
                                  f"doubles: {', '.join(others[:3])}")


# BioVid
BEGIN = 2.0  # a sample's window, in seconds
END = 5.0
FPS = 25  # images a second
SIGNAL_RATE = 512  # signal values a second
PAIN_IMAGES = 10  # of a clip


class BioVid(Source):
    """BioVid Heat Pain, parts A (privileged: EDA) and B (EMG). Section IV-A1.

    root/faces/<subject>/<sample>/img_00001.jpg ..., root/biosignals_filtered/<subject>/
    <sample>_bio.csv. The label is in the sample's name; 2 classes keep BL1 and PA4. A sample is the
    window 2.0-5.0 s, cut into `length` clips: visual(row) -> uint8 (3, 10, size, size),
    privileged(row) -> float32 (1, 67, 127) when there is one clip. Image i lies at
    face_start + (i - 1) / 25 seconds.
    """
    task = "classification"
    PREFIX = "img_"
    LEVELS = {2: "BL1 PA4".split(), 5: "BL1 PA1 PA2 PA3 PA4".split()}
    COLUMN = {"biovid_a": "gsr", "biovid_b": "emg_corrugator"}

    def __init__(self, root, dataset, classes, length, image_size, privileged, face_start):
        super().__init__(root, length, image_size)
        levels = self.LEVELS[classes]
        self.outputs = len(levels)
        faces = find_folder(self.path, BIOVID, "faces")
        folders = sorted(faces.glob(FOLDER + FOLDER))
        if privileged:
            signals = find_folder(self.path, BIOVID, "biosignals_filtered", "biosignals_raw")
            self.notes = [f"{csv}: no face crops in {crops}; not used"
                          for csv in sorted(signals.glob(f"{FOLDER}[!.]*_bio.csv"))
                          if not (crops := faces / csv.parent.name / csv.name[:-8]).is_dir()]
        expect_whole_videos(folders, faces, face_start)

        self.frames = self.others = 0
        rows = []  # the attributes of each; video is the sample's number
        for folder in folders:
            subject, sample = folder.parts[-2:]
            match = re.fullmatch(SAMPLE, sample)
            csv = signals / subject / f"{sample}_bio.csv" if privileged else None
            with noting(self.faults):
                if not match or sample[:11] != subject:
                    raise UserError(f"{folder}: expected a name like 071309_w_21/071309_w_21-BL1-"
                                    "081; rename or remove it")
                if match[1] not in levels:
                    self.others += 1
                    continue
                if csv and not csv.is_file():
                    raise UserError(f"{csv}: missing, but its face crops are there; extract it "
                                    f"again or remove {folder}")
                clips, found = pain_clips(folder, length, face_start)
                self.frames += found
                rows += [(len(rows) // length, f"{sample}/{clip}", subject,
                          levels.index(match[1]), images,
                          (csv, self.COLUMN[dataset], *span))
                         for clip, images, *span in clips]
        if not rows:
            self.faults.append(f"{faces}: no sample of {', '.join(levels)} in it that can be used; "
                               f"{BIOVID}")
            return

        self.set_columns(rows, "video name group label images signals")
        self.label = torch.from_numpy(self.label).long()  # numpy 1's integers are short on Windows

    def privileged(self, row):
        return pain_spectrogram(read_biosignal(*self.signals[row]))

    def describe(self):
        label = self.label[::self.length]
        classes = ", ".join(f"{name} {int((label == i).sum())}"
                            for i, name in enumerate(self.LEVELS[self.outputs]))
        return (f"{len(set(self.group))} subjects, {len(set(self.video))} samples, {self.frames} "
                f"frames, classes {classes}, {self.others} samples of other levels not used")


def expect_whole_videos(folders, where, face_start):
    """Raises UserError if no folder has images beyond 3.2 s: those are cut, and begin later. With
    face_start it is known where they begin."""
    last = 0
    for folder in folders if face_start is None else ():
        last = image_files(folder, "img_")[0].max(initial=last)
        if last > 80:
            return
    if last:
        raise UserError(f"{where}: no image beyond number 80, expected some 138 from 0 to 5.5 s; "
                        "say with --face-start when image 1 was taken (2 if cut to 2-5 s)")


def pain_clips(folder, length, face_start):
    """Of each of the `length` clips of a sample: its number, folder and names of PAIN_IMAGES
    equally spaced images, where it begins and ends, in seconds. And how many images the folder has.

    Image 1 lies at face_start, 0 s by default. A clip without an image takes the one of the
    sample's window that is nearest to its middle.
    """
    numbers, names = image_files(folder, "img_", first=face_start is None)
    seconds = (face_start or 0) + (numbers - 1) / FPS
    window = (seconds >= BEGIN) & (seconds < END)
    seconds, names = seconds[window], names[window]
    if not len(names):
        raise UserError(f"{folder}: no face img_<5 digits>.jpg between {BEGIN:g} and {END:g} s; "
                        "extract its crops again or remove the folder")
    clips = []
    for clip, (begin, end) in enumerate(pairwise(np.linspace(BEGIN, END, length + 1))):
        inside = (seconds >= begin) & (seconds < end)
        if not inside.any():
            inside = [np.abs(seconds - (begin + end) / 2).argmin()]
        images = names[inside]
        spaced = np.linspace(0, len(images) - 1, PAIN_IMAGES).round().astype(int)
        clips.append((clip, (folder, images[spaced]), begin, end))
    return clips, len(numbers)


def read_biosignal(path, column, begin, end):
    """One column of a BioVid csv from `begin` s on, found by time: (end - begin) * 512 values."""
    count = round((end - begin) * SIGNAL_RATE)
    table = read_table(path, "\t", ["time", column])
    time, values = table[table[:, 0] >= begin * 1e6][:count].T
    if (len(values) < count or (np.diff(time) <= 0).any() or not 0 < np.abs(values).max() < 1e9
            or max(time[0] - begin * 1e6, abs(time[-1] - end * 1e6)) > 2e6 / SIGNAL_RATE):  # 2 rows
        raise UserError(f"{path}: expected {count} values of {column} between {begin:g} and {end:g}"
                        f" s, {SIGNAL_RATE} a second in rising time, not all zero, none NaN or "
                        "beyond 1e9; extract it again or remove the sample")
    return values


def pain_spectrogram(values):
    """Log power of 512 Hz values -> float32 (1, 67, frames); 3 s give the paper's 67 x 127. IV-B1.

    No detrending: an EDA response is slow, and removing each 31 ms segment's mean would remove it.
    [ours]
    """
    power = spectrogram(values, SIGNAL_RATE, nperseg=16, noverlap=4, nfft=132, detrend=False)[2]
    return torch.from_numpy(np.log(power + 1e-10)[None]).float()


# Affwild2
CLIP = 32  # frames a clip,
EVERY = 4  # and which of them are shown


class Affwild2(Source):
    """Affwild2 as ABAW distributes it for valence and arousal; privileged: audio. IV-A, IV-B2.

    root/cropped_aligned/<video>/00001.jpg ..., root/annotations/VA_Estimation_Challenge/
    {Train_Set,Validation_Set}/<video>.txt, root/audio/<video without _left/_right>.wav, optional
    root/fps.txt. A row is a clip of 32 frames; clips tile the video, the last one aligned to its
    end. visual(row) -> uint8 (3, 8, size, size), privileged(row) -> float32 (1, 64, 107), label =
    its last frame's. frame_label (T, 2) and frame_row (T,) hold each labelled frame of the data set
    once, with the row whose prediction holds for it.
    """
    task = "regression"
    outputs = 2
    PREFIX = ""
    SPLIT = {"Train_Set": "train", "Validation_Set": "test"}

    def __init__(self, root, length, image_size, privileged):
        super().__init__(root, length, image_size)
        find_folder(self.path, AFFWILD2, "cropped_aligned")
        # Crops come in several archives, of one level or two.
        crops = self._by_video(path for level in ("", "batch*/", "cropped_aligned*/")
                               for path in self.path.glob(f"cropped_aligned*/{level}{FOLDER}")
                               if not re.match(r"batch\d*$|cropped_aligned", path.name))
        annotations = self._find_annotations()
        files = self._by_video(path for part in self.SPLIT
                               for path in (annotations / part).glob("[!.]*.txt"))
        self.notes = [f"{folder}: crops without an annotation file in {annotations}; not used"
                      for video, folder in crops.items() if video not in files]
        fps = {}
        with noting(self.faults):
            fps = read_fps(self.path / "fps.txt", crops | files)

        rows = []  # the attributes of each
        frames = []  # of each video: its labels, and the row whose prediction holds for each
        for video, path in files.items():
            sound = sound_name(video)
            wav = self.path / "audio" / f"{sound}.wav"
            rate = fps.get(sound, 30)
            with noting(self.faults):
                if video not in crops:
                    raise UserError(f"{self.path / 'cropped_aligned' / video}: missing, but its "
                                    f"annotation is there; extract it again or remove {path}")
                label = read_annotation(path)
                clips = affect_clips(crops[video], len(label))
                if privileged:
                    self._expect_sound(wav, len(label) / rate, video)
                nearest = nearest_clip([end for end, _ in clips], len(label))
                frames.append((label, len(rows) + nearest))
                rows += [(video, f"{video}/{end:05d}", sound, self.SPLIT[path.parent.name],
                          label[end - 1], images, (wav, end / rate)) for end, images in clips]
        if not rows:
            self.faults.append(f"{annotations}: nothing in it that can be used; {AFFWILD2}")
            return

        self.set_columns(rows, "video name group split label images signals")
        self.label = torch.from_numpy(self.label)
        label, row = (torch.from_numpy(np.concatenate(column))
                      for column in zip(*frames, strict=True))
        known = has_label(label)
        self.frame_label, self.frame_row = label[known], row[known]

    def _by_video(self, paths):
        """{video: its path}; any further path of a video is a fault."""
        found = {}
        for path in sorted(paths):
            first = found.setdefault(path.name.removesuffix(".txt"), path)
            if first != path:
                self.faults.append(f"{path}: the same video as {first}; keep one")
        return found

    def _find_annotations(self):
        levels = "", FOLDER, FOLDER + FOLDER, f"annotations/annotations/{FOLDER}"
        sets = sorted(path.parent for level in levels
                      for name in ("VA_Estimation_Challenge", "VA_Set")
                      for path in self.path.glob(f"{level}{name}/Train_Set"))
        if len(sets) != 1:
            raise UserError(f"{self.path / 'annotations'}: expected one edition of ABAW's "
                            "VA_Estimation_Challenge/Train_Set/<video>.txt in it, found "
                            f"{' and '.join(map(str, sets)) or 'none'}; keep one there; {AFFWILD2}")
        return sets[0]

    def _expect_sound(self, path, needed, video):
        """Raises UserError unless a wav is as long as its video, of `needed` seconds."""
        rate, sound = read_wav(path)
        seconds = len(sound) / rate
        found = f"{path}: {seconds:.1f} s of sound for {needed:.1f} s of {video}"
        if seconds < needed - 1:  # within a second: roundings of the rate; silence fills it
            raise UserError(f"{found}; extract it again or give the frame rate in fps.txt")
        if seconds >= 2 * needed:
            self.notes.append(f"{found}; is it this video's, and the rate right?")

    def privileged(self, row):
        return log_mel(read_sound(*self.signals[row]))

    def describe(self):
        return ", ".join(f"{part}: {len(set(self.video[self.split == part]))} videos, "
                         f"{(self.split == part).sum()} clips, "
                         f"{unlabelled(self.label[self.split == part])}, "
                         f"{(self.split[self.frame_row] == part).sum()} valid frames"
                         for part in ("train", "test"))

    def check(self):
        super().check()
        self.notes += [f"{path}: silent" for path in bar(dict(self.signals), "sounds")
                       if not read_wav(path)[1].any()]


def affect_clips(folder, frames=None):
    """Number of the last frame, and folder and names of the 8 images, of each clip with an image.

    frames: how many the video has, up to its last image if None. The nearest image of the clip
    stands in for a missing one.
    """
    numbers, names = image_files(folder, "", first=1)
    last = numbers.max(initial=0)
    frames = last if frames is None else frames
    clips = []
    for end in [*range(CLIP, frames, CLIP), frames]:
        near = (numbers > end - CLIP) & (numbers <= end)
        if near.any():
            wanted = np.arange(end - CLIP + EVERY, end + 1, EVERY)[:, None]
            gap = np.abs(numbers[near] - wanted)  # (8, images)
            clips.append((end, (folder, names[near][gap.argmin(1)])))
    if not clips or frames < CLIP or last > frames + 2:
        raise UserError(f"{folder}: {len(names)} images <5 digits>.jpg up to number {last} do not "
                        f"fit {frames} frames ({CLIP} or more, the rows of {folder.name}.txt if "
                        "that is there); extract one or the other again, or remove both")
    return clips


def nearest_clip(ends, frames):
    """Which clip predicts each frame: the first that covers it, else (dropped) the nearest one."""
    ends = np.array(ends)
    between = (ends[:-1] + ends[1:] - CLIP + 1) // 2
    return np.searchsorted(np.maximum(ends[:-1], between), np.arange(1, frames + 1))


def sound_name(video):
    """The faces <video>_left and <video>_right share the video's sound, and stay in one group."""
    return re.sub("_(left|right)$", "", video)


def read_fps(path, videos):
    """{name of the sound: frame rate} from fps.txt; a video's ending may be there, a rate be
    30000/1001."""
    fps = {}
    known = {sound_name(video) for video in videos}
    text = path.read_text("utf-8-sig", errors="replace") if path.exists() else ""
    for line in filter(str.strip, text.splitlines()):
        match = re.fullmatch(r"(.+?)(?:_left|_right)?(?:\.(?:mp4|avi|mov|mkv|webm))?"
                             r"\s+([1-9]\d*(?:\.\d+)?)(?:/([1-9]\d*))?\s*", line, re.IGNORECASE)
        rate = match and float(match[2]) / int(match[3] or 1)
        if not match or match[1] not in known or fps.setdefault(match[1], rate) != rate:
            raise UserError(f"{path}: expected lines '<video> <frames per second>', one for a "
                            f"video that is there, not {line[:60]!r}")
    return fps


def read_annotation(path):
    """Affwild2's file -> float32 (T, 2); a row with -5 in either place has no label: NaN."""
    label = read_table(path, ",", ["valence", "arousal"])
    if label.shape[1:] != (2,):
        raise UserError(f"{path}: expected two values a row; extract it again")
    return affect(path, label)


def affect(path, label):
    """Valence and arousal (N, ..., 2) of a file as float32; NaN where either is -5."""
    refuse(path, "label", ~(np.abs(label) <= 1) & (label != INVALID), "values beyond [-1, 1]")
    label[(label == INVALID).any(-1)] = NO_LABEL
    return np.float32(label)


def refuse(path, key, wrong, what):
    """UserError if anything is wrong in a file's rows, or samples: wrong is bool (N, ...)."""
    rows = np.flatnonzero(wrong.any(tuple(range(1, wrong.ndim))))
    if len(rows):
        raise UserError(f"{path}: {key} holds {what} in {len(rows)} of {len(wrong)} rows, number "
                        f"{rows[0]} (from 0 on) the first; mend them or leave them out")


def read_wav(path):
    """Sample rate and samples of a wav, (n,) or (n, channels), mapped rather than read."""
    advice = (f"make it with ffmpeg -i <video>.mp4 -ac 1 -ar {SOUND_RATE} {path.name}, or for a "
              f"silent video ffmpeg -f lavfi -i anullsrc -ac 1 -ar {SOUND_RATE} -t <seconds> "
              f"{path.name}")
    with (blaming(path, "not a wav that can be used", advice),
          warnings.catch_warnings(action="ignore", category=wavfile.WavFileWarning)):
        try:
            rate, sound = wavfile.read(path, mmap=True)  # it warns of chunks of metadata
        except ValueError:  # 24 bits cannot be mapped
            rate, sound = wavfile.read(path)
        if sound.size == 0 or sound.dtype == np.uint8 or not 1000 <= rate <= 200000:
            raise ValueError(f"{sound.size} samples of {sound.dtype} at {rate} Hz")
    return rate, sound


SOUND_RATE = 44100
SOUND_SAMPLES = 47040  # 1.067 s: a clip's 32 frames at 30 fps


def read_sound(path, end):
    """The SOUND_SAMPLES mono float32 at 44.1 kHz that end at `end` s, zeros outside the file."""
    rate, sound = read_wav(path)
    stop = round(end * rate)
    count = math.ceil(SOUND_SAMPLES * rate / SOUND_RATE)
    piece = sound[max(stop - count, 0):stop]
    if piece.dtype.kind == "i":
        piece = piece / -float(np.iinfo(piece.dtype).min)
    if not (np.abs(piece) < 1e9).all():  # its power is a float32
        raise UserError(f"{path}: holds NaN or values beyond 1e9 before {end:.2f} s; make it again "
                        f"with ffmpeg -ac 1 -ar {SOUND_RATE}")
    piece = piece.mean(1) if piece.ndim == 2 else piece
    piece = np.pad(piece, (max(count - stop, 0), count))[:count]
    return np.float32(resample_poly(piece, SOUND_RATE, rate)[-SOUND_SAMPLES:])


@cache
def mel_filters():
    """(64, 513) triangles of height 1, evenly spaced to rate / 2 in 2595 log10(1 + f / 700)."""
    top = SOUND_RATE / 2
    mel = np.linspace(0, 2595 * np.log10(1 + top / 700), 64 + 2)
    corners = 700 * (10 ** (mel / 2595) - 1)  # Hz
    f = np.linspace(0, top, 513)
    filters = [np.interp(f, corners, one_hot) for one_hot in np.eye(64 + 2)[1:-1]]
    return torch.from_numpy(np.float32(filters))


def log_mel(sound):
    """47,040 samples -> float32 (1, 64, 107) dB, floor 80 dB below the maximum. Section IV-B2."""
    spectrum = torch.stft(torch.from_numpy(sound), n_fft=1024, hop_length=441, win_length=882,
                          window=torch.hann_window(882), pad_mode="constant", return_complex=True)
    db = 10 * (mel_filters() @ spectrum.abs().square()).clamp_min(1e-10).log10()  # (64, 107)
    return db.clamp_min(db.max() - 80)[None]


class Faces(Source):
    """Face crops alone, for prediction: every folder with images in `folder`, itself included.

    Images are named as in the data set. `video` and `name` say what a row is of; `faults` has a
    line for each folder whose images cannot be used: all that will be shown are decoded here once,
    so that a damaged one ends no prediction of the others. UserError if there is nothing to use.
    """

    def __init__(self, folder, dataset, length, image_size, face_start=None):
        super().__init__(folder, length, image_size)
        folders = [one for one, files in walk(self.path) if any(
            re.search(r"\.(jpe?g|png|bmp|gif|tiff?|webp)$", path.name, re.I) for path in files)]
        if dataset != "affwild2":
            expect_whole_videos(folders, folder, face_start)

        rows = []
        for one in bar(folders, "images"):
            video = str(one.relative_to(self.path)) if one != self.path else one.resolve().name
            if re.fullmatch(SAMPLE, one.name):  # the name that it has in training
                video = one.name
            with noting(self.faults):
                clips = (affect_clips(one) if dataset == "affwild2" else
                         pain_clips(one, length, face_start)[0])
                found = [(video, f"{video}/{number:05d}", images) for number, images, *_ in clips]
                for name in np.unique([names for *_, (_, names) in found]):
                    read_image(one / name)
                rows += found
        if not rows:
            raise UserError((self.faults or [f"{folder}: no images there; expected face crops (jpg "
                                             f"or png), named as in {dataset}"])[0])
        self.set_columns(rows, "video name images")


def walk(folder, above=()):
    """Yields the folder and those below it, each with its files, and the folders that are passed
    over; links are followed."""
    if (real := folder.resolve()) in above:  # it lies in what it links to
        return
    inside = [path for path in sorted(folder.iterdir()) if path.name[0] != "."]
    below = [path for path in inside if path.is_dir() and not re.match(LITTER, path.name)]
    yield folder, sorted({*inside} - {*below})
    for path in below:
        yield from walk(path, (*above, real))


class Features:
    """A features file (.npz): visual (N, L, Dv), privileged (N, L, Dp) and label; without L, one
    clip each.

    label: int (N,), -1 where there is none; or float (N, 2) or (N, L, 2), valence and arousal, -5
    where there is none. Optional: group, split ("train" or "test") and name, all (N,); with L = 1
    also video (N,), whose consecutive samples are a sequence; and, as stage 2 writes them, labels
    frame_label (T, 2) of single frames with frame_row (T,), the row whose prediction holds for it.
    `rows["visual"]` and `rows["privileged"]` are the (N * L, D) tensors. length: rows a window, L
    if None. Whatever does not fit is a line of `faults`; UserError with the first, if strict.
    """

    split = None

    def __init__(self, path, length=None, privileged=True, labelled=True, strict=True):
        self.path = Path(path)
        self.rows = {}
        self.faults = []
        self.notes = []
        wanted = {"visual": True, "privileged": privileged, "label": labelled}
        # all but those that are not wanted; nothing pickled is ever opened, and numpy, which takes
        # any other file for a pickle, is given zip files alone
        arrays = {}
        with (blaming(path, "no .npz file, or one cut short", FEATURES), zipfile.ZipFile(path),
              np.load(path, allow_pickle=False) as content):
            for key in [*wanted, *sorted(content.keys() - wanted)]:
                with noting(self.faults), blaming(path, f"{key} is missing or damaged", FEATURES):
                    if wanted.get(key, True):
                        arrays[key] = content[key]
        self.backbones = np.array(arrays.pop("backbones", ())).tolist()  # stage 2: whose features
        if "visual" in arrays:
            self._read(arrays, length)
        if strict and self.faults:
            raise UserError(self.faults[0])

    def _read(self, arrays, length):
        """Sets `rows` and all else; a fault of one array leaves the others' to be found."""
        count, clips = (*arrays["visual"].shape[:-1], 1, 1)[:2]
        self.length = length or clips
        self.group = self.name = self.video = np.arange(count).repeat(clips)
        for key, array in arrays.items():
            with noting(self.faults):
                match key:
                    case "visual" | "privileged":
                        array = array[:, None] if array.ndim == 2 else array
                        self._expect(key, array, "f", (count, clips, *array.shape[-1:]))
                        self.rows[key] = torch.from_numpy(np.float32(array)).flatten(0, 1)
                    case "label":
                        self._read_label(array, count, clips)
                    case "frame_label" | "frame_row":
                        if self.backbones:  # stage 2's, checked when they were read
                            setattr(self, key, torch.from_numpy(array))
                    case "group" | "name" | "split" | "video":
                        self._expect(key, array, "Uiu", (count,))
                        setattr(self, key, array.repeat(clips))
                        # an evaluation finds its samples by name
                        differ = key == "name" or key == "video" and clips > 1
                        if differ and len(np.unique(array)) < count:
                            raise UserError(f"{self.path}: {key} holds the same one twice; number "
                                            f"them, or leave {key} out")
                    case _:  # a group that is misspelt would be a leak
                        raise UserError(f"{self.path}: holds {key}, which nothing reads; leave it "
                                        "out, or rename it")

        if "group" not in arrays:
            self.notes.append(f"{self.path}: holds no group, so that a person may be in training "
                              "and test")
        self.name = self.name.astype(str)
        if self.split is not None:
            odd = np.setdiff1d(self.split, ["train", "test"])
            if len(odd):
                self.faults.append(f"{self.path}: split holds {str(odd)[:60]}; expected train and "
                                   "test (validation is taken from train)")
            both = np.intersect1d(*(self.group[self.split == part] for part in ("train", "test")))
            if len(both) and not self.backbones:  # stage 2's came with the data
                self.faults.append(f"{self.path}: split has group {both[:1]} in both parts; give "
                                   "it to one")

    def _expect(self, key, array, kinds, *shapes):
        """UserError unless it is of these kinds and one of these shapes, not empty, and finite as
        float32."""
        if array.dtype.kind not in kinds or array.shape not in shapes or not array.size:
            raise UserError(f"{self.path}: {key} is {array.dtype} {array.shape}; {FEATURES}")
        if "U" not in kinds:
            refuse(self.path, key, ~(np.abs(array) < np.float64(3e38)), "NaN or infinity")

    def _read_label(self, label, count, clips):
        """Sets task, outputs and a label for each row, (N * L,) or (N * L, 2); of regression the
        labels of frames, too."""
        self._expect("label", label, "iuf" if label.ndim == 1 else "f",  # whole numbers are classes
                     (count,), (count, 2), (count, clips, 2))
        if label.ndim == 1:
            classes = np.unique(label[label != -1]).tolist()
            if classes != [*range(max(len(classes), 2))]:
                raise UserError(f"{self.path}: label has {len(classes)} classes {classes[:9]}; "
                                "number two or more from 0 on, leaving none out, and write -1 for "
                                "no label")
            self.task = "classification"
            self.outputs = len(classes)
            self.label = torch.from_numpy(np.int64(label.repeat(clips)))
            return

        if label.any() and np.isin(label, (0, 1)).all():
            raise UserError(f"{self.path}: label is all 0 and 1; write classes as label.argmax(1)")
        self.task = "regression"
        self.outputs = 2
        label = affect(self.path, label.reshape(count, -1, 2))  # of each sample, or of its clips
        self.label = torch.from_numpy(label.repeat(clips // label.shape[1], 1)).flatten(0, 1)
        self.frame_row = has_label(self.label).nonzero().flatten()
        self.frame_label = self.label[self.frame_row]

    def visual(self, row):
        return self.rows["visual"][row]

    def privileged(self, row):
        return self.rows["privileged"][row]

    def traces(self, modality):
        return self.rows[modality]

    def check(self):
        """All was read when it was opened."""

    def describe(self):
        what = f"{self.outputs} classes" if self.task == "classification" else "valence/arousal"
        widths = ", ".join(f"{key} width {rows.shape[1]}" for key, rows in self.rows.items())
        return (f"{len(self.label) // self.length} samples of {self.length} clips, {what}, "
                f"{unlabelled(self.label)}, {len(set(self.group))} groups, {widths}")


def save_features(path, arrays):
    """Write a features file; in the file a missing valence/arousal label is -5, never NaN."""
    arrays = arrays | {"label": np.nan_to_num(arrays["label"], nan=INVALID)}
    with replacing(path) as part:
        np.savez(part, **arrays)


@contextmanager
def replacing(path):
    """A path of the same name in a hidden folder beside `path`, no other process's: what is written
    there is renamed to `path`, or removed on any failure. Where it is a folder that is there by
    then, another process was quicker, and its folder stays."""
    path = Path(path)
    with blaming(path, "cannot be written", "free some space or give another place",
                 (OSError, RuntimeError)):  # torch's writer raises RuntimeError
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(".writing-*"):  # by a killed process: no writing takes a day
            with suppress(OSError):  # its owner, or another one who cleans up, was quicker
                if left.stat().st_mtime < time.time() - 24 * 3600:
                    shutil.rmtree(left)
        with TemporaryDirectory(prefix=".writing-", dir=path.parent) as folder:
            part = Path(folder, path.name)
            yield part
            try:
                os.replace(part, path)
            except OSError:
                if not (part.is_dir() and path.is_dir()):
                    raise


def writable(folder):
    """Makes an output's folder, and finds out before the work whether a file can be made in it."""
    with blaming(folder, "cannot be written to", "give another place for the output", OSError):
        Path(folder).mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass


def open_dataset(dataset, root, classes=2, length=None, image_size=112, privileged=True,
                 face_start=None, strict=True):
    """The data set at `root`; raises UserError with the first fault, unless strict is False.

    length: clips a sample, None for the default. With privileged=False no file of the privileged
    modality is looked at.
    """
    if dataset == "features":
        source = Features(root, privileged=privileged, strict=False)
    elif dataset == "affwild2":
        source = Affwild2(root, length or 8, image_size, privileged)
    else:
        source = BioVid(root, dataset, classes, length or 1, image_size, privileged, face_start)
    if source.faults and strict:
        first, *more = source.faults
        hint = (f" (and {len(more)} more: python data.py --check {dataset} --root {root}"
                f"{' --classes 5' * (classes == 5)})")
        raise UserError(first + hint * bool(more))
    return source


# The stand-in: a hidden intensity drives face and signal, each with noise of its own. NOISE
# (standard deviations, visual and privileged, of an intensity that runs from 0 to 1) was set once,
# on the scores of single modalities and of their fusion, to come out in Table I's order; no student
# and no distillation method was looked at.
NOISE = {"biovid_a": (0.55, 0.35), "biovid_b": (0.55, 0.525), "affwild2": (0.25, 0.60)}
SUBJECTS = 22  # BioVid's,
LEVELS = 2 * [0, 1, 2, 3, 4] + 6 * [0, 4]  # and those of each one's samples
VIDEOS = 32  # Affwild2's
FACE = 56  # pixels


def write_stand_in(dataset, root):
    """Write the synthetic data set to root, unless it is there; never touches other data."""
    root = Path(root)
    recipe = json.dumps({"dataset": dataset, "noise": NOISE[dataset], "version": 3}) + "\n"
    mark = root / "SYNTHETIC"
    if not root.exists():
        print(f"writing a synthetic stand-in of {dataset} to {root}")
        write = write_affwild2 if dataset == "affwild2" else write_biovid
        with replacing(root) as part:
            write(part, np.random.default_rng(0), *NOISE[dataset])
            (part / mark.name).write_text(recipe)
    if not mark.is_file() or mark.read_text() != recipe:
        what = "another stand-in: delete it, or" if mark.is_file() else "not a stand-in:"
        raise UserError(f"{root}: exists and is {what} give another --root")


def draw_faces(identity, expressions):
    """Cartoon faces, uint8 (T, FACE, FACE, 3), of one identity (6 numbers in [-1, 1]).

    Expressions (4, T) in about [-1, 1]: brow lowering, eye opening, mouth opening, smile.
    """
    width, height, apart, *tone = identity
    brow, eye, mouth, smile = np.float32(expressions)[..., None, None]  # (T, 1, 1)
    axis = np.linspace(-1, 1, FACE, dtype=np.float32)
    x, y = np.abs(axis), axis[:, None]  # the right half is the left one's mirror image

    def blob(cx, cy, rx, ry):
        return (4 * (1 - ((x - cx) / rx) ** 2 - ((y - cy) / ry) ** 2)).clip(0, 1)

    skin = blob(0, 0, 0.75 + 0.1 * width, 0.92 + 0.06 * height)
    curve = smile.clip(-1, 1) * 1.5 * (0.03 - x**2)  # raises the mouth's corners
    lips = blob(0, 0.45 + curve, 0.3, (0.1 + 0.09 * mouth).clip(0.03))
    side = 0.33 + 0.05 * apart
    eyes = blob(side, -0.22, 0.17, 0.07 + 0.045 * eye.clip(-1, 1))
    brows = blob(side, -0.52 + 0.1 * brow, 0.22, 0.06)
    light = 1 - 0.75 * (lips + eyes + brows).clip(0, 1)  # (T, FACE, FACE)
    color = 70 + skin[..., None] * (np.array([135, 90, 60]) + 30 * np.array(tone))
    return np.uint8(light[..., None] * color)


def write_faces(folder, prefix, first, faces, rng):
    """A jpg a face, numbered from `first` on, but for a while that the face detector lost it."""
    folder.mkdir(parents=True)
    lost = rng.integers(0, len(faces) - 20)
    lost = range(lost, lost + rng.integers(1, 20))
    for i, face in enumerate(faces):
        if i not in lost:
            Image.fromarray(face).save(folder / f"{prefix}{first + i:05d}.jpg", quality=90)


def write_biovid(root, rng, noise_v, noise_p):
    for person in bar(range(SUBJECTS), "subjects"):
        subject = f"{person + 1:02d}0109_{'mw'[person % 2]}_{20 + person}"
        identity = rng.uniform(-1, 1, 6)
        gain = rng.normal(1, 0.15)
        reactive = 0.15 if person % 6 == 5 else 1.0  # some subjects hardly react
        signals = root / "biosignals_filtered" / subject
        signals.mkdir(parents=True)
        for n, level in enumerate(LEVELS):
            sample = f"{subject}-{BioVid.LEVELS[5][level]}-{n + 81:03d}"
            hidden = reactive * level / 4
            # images 50 to 129: the window from 2 to 5 s, and a few around it
            shown = hidden + noise_v * rng.normal() + 0.05 * rng.normal(size=80)
            faces = draw_faces(identity, [shown, 0.6 - shown, shown - 0.3, 0 * shown])
            write_faces(root / "faces" / subject / sample, "img_", 50, faces, rng)

            t = np.arange(2816 + n // 2 % 2) / SIGNAL_RATE
            felt = (hidden + noise_p * rng.normal()) * (t / 1.5).clip(0, 1)
            tension = 3 * gain * np.exp(0.9 * felt)  # a muscle's noise has the power of its effort
            skin, heart, trapezius, corrugator, zygomaticus = rng.normal(size=(5, t.size))
            table = [t * 1e6, 5 + 0.5 * gain + 2.0 * felt + 0.01 * skin, heart, 3 * trapezius,
                     tension * corrugator, tension * zygomaticus]
            # Real headers carry blanks, too.
            np.savetxt(signals / f"{sample}_bio.csv", np.transpose(table), "%d" + 5 * "\t%.4f",
                       header="time\tgsr\tecg\temg_trapezius\t emg_corrugator\temg_zygomaticus",
                       comments="")


def _wander(rng, frames):
    """Two smooth random courses with standard deviation about 1, (2, frames)."""
    kernel = np.hanning(120)
    noise = rng.normal(size=(2, frames + 119))
    return fftconvolve(noise, kernel[None] / np.linalg.norm(kernel), "valid", axes=1)


def write_affwild2(root, rng, noise_v, noise_p):
    labels = root / "annotations/VA_Estimation_Challenge"
    audio = root / "audio"
    for folder in (labels / "Train_Set", labels / "Validation_Set", audio):
        folder.mkdir(parents=True)
    videos = [f"video{i}" for i in range(VIDEOS)]
    videos[3:4] = "video3_left", "video3_right"
    (root / "fps.txt").write_text("video5 25\n")
    for n, video in enumerate(bar(videos, "videos")):
        part = "Train_Set" if n < 25 else "Validation_Set"
        fps = 25 if video == "video5" else 30
        frames = 550 if video.startswith("video3_") else rng.integers(400, 700)
        # valence and arousal: their course, and how face and voice show them
        hidden = 0.25 * rng.normal(size=(2, 1)) + 0.35 * _wander(rng, frames)
        (valence, arousal), heard = ((hidden + noise * _wander(rng, frames)) / 0.4
                                     for noise in (noise_v, noise_p))

        faces = draw_faces(rng.uniform(-1, 1, 6), [-0.5 * arousal, 0.6 * arousal, 0.4 * arousal,
                                                   0.6 * valence]).repeat(2, 1).repeat(2, 2)
        write_faces(root / "cropped_aligned" / video, "", 1, faces, rng)

        table = hidden.T.clip(-1, 1)
        lost = rng.integers(0, frames - 100)
        table[lost:lost + 40, n % 2] = INVALID  # a stretch that nobody could label
        rows = np.arange(frames + n % 3 - 1)  # one more or less than there are frames
        np.savetxt(labels / part / f"{video}.txt", table.take(rows, 0, mode="clip"), "%.3f", ",",
                   header="valence,arousal", comments="")

        if not video.endswith("_right"):  # the pair's sound is the left one's
            t = np.arange(int((frames + 1) / fps * SOUND_RATE)) / SOUND_RATE
            high, loud = (np.interp(t, np.arange(frames) / fps, course) for course in heard)
            pitch = rng.uniform(110, 220) * 2 ** (0.3 * high)
            tone = np.sin(2 * np.pi * np.cumsum(pitch) / SOUND_RATE)
            volume = 0.03 * np.exp(0.7 * loud.clip(-3, 3))
            sound = volume * (tone + 0.5 * tone**3) + 0.003 * rng.normal(size=t.size)
            wavfile.write(audio / f"{sound_name(video)}.wav", SOUND_RATE,
                          np.int16(sound.clip(-1, 1) * 32767))


# Face crops from videos. A face is four numbers: x and y of its centre, the side of the square that
# is cut, and by how many degrees the square is turned; NaN without a face.
CROP = 112  # pixels
FRAME = 640  # of the longer side: fine enough for the crops, coarse enough for a quick detector
MARGIN = 1.2  # of the detector's box
VIDEO = ".mp4 .avi .mov .mkv .webm .wmv .m4v .3gp .mpg .mpeg .flv .mts .m2ts".split()


@cache
def face_detector(file):
    """A function of a BGR image that gives its faces, rows of x, y, width, height, or None.

    YuNet's rows go on with x and y of the right eye and of the left, and with more.
    """
    # For one damaged video OpenCV prints thousands of lines; our summary names it in one.
    os.environ.update(OPENCV_LOG_LEVEL="SILENT", OPENCV_FFMPEG_LOGLEVEL="-8")
    try:
        import cv2
    except ImportError:
        raise UserError('--crop needs OpenCV: pip install "opencv-python-headless<5"') from None

    def yunet(image):
        model.setInputSize(image.shape[1::-1])
        return model.detect(image)[1]

    cv2.setNumThreads(1)  # processes share the work, and may be forks of this one
    try:
        if file == "haar":  # OpenCV 5 has neither the cascade nor its class
            path = cv2.data.haarcascades + "haarcascade_frontalface_default.xml"
            model = cv2.CascadeClassifier(path)
            return lambda image: model.detectMultiScale(image, 1.1, 5, minSize=(64, 64))
        model = cv2.FaceDetectorYN.create(file, "", (CROP, CROP))
        yunet(np.zeros((CROP, CROP, 3), np.uint8))  # here another network fails
    except (AttributeError, cv2.error):
        raise UserError(f"--detector {file}: OpenCV {cv2.__version__} cannot use it; "
                        "give YuNet's file, face_detection_yunet_2023mar.onnx of "
                        "https://github.com/opencv/opencv_zoo") from None
    return yunet


def largest_face(faces):
    """The largest of a detector's faces, as a square with a margin."""
    faces = () if faces is None else faces
    x, y, w, h, *eyes = max(faces, key=lambda face: face[2], default=[np.nan] * 8)
    x1, y1, x2, y2 = eyes[:4] or (0, 0, 1, 0)  # Haar gives no eyes: level ones
    return [x + w / 2, y + h / 2, MARGIN * max(w, h), math.degrees(math.atan2(y2 - y1, x2 - x1))]


def smooth_faces(faces):
    """{i: face} of those in faces (T, 4), steadied so that the crop does not tremble.

    A gap of one is filled from both sides, then each number is its median over half a second.
    """
    between = (faces[:-2] + faces[2:]) / 2
    np.copyto(faces[1:-1], between, where=np.isnan(faces[1:-1]))
    seen = np.flatnonzero(faces[:, 2] > 0)
    return {i: np.nanmedian(faces[max(i - 6, 0):i + 7], axis=0) for i in seen}


def video_frames(path):
    """Yields the frame nearest to each (i - 1) / 25 s, i from 1 on, whatever the video's own rate.

    Frames stand at their time stamps, or at the nominal rate where stamps stand still or leap.
    """
    import cv2
    video = cv2.VideoCapture(str(path))
    step = 1 / (video.get(cv2.CAP_PROP_FPS) or FPS)
    count = shown = time = 0
    more, frame = video.read()
    while more:
        scale = min(1, FRAME / max(frame.shape))
        frame = cv2.resize(frame, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        more, following = video.read()
        stamp = video.get(cv2.CAP_PROP_POS_MSEC) / 1000
        later = stamp if more and 0 < stamp - time < 10 else time + step

        # From half-way on the following frame is nearer; the last one has half a step.
        while shown < FPS * (time + later) / 2:
            yield frame
            shown += 1
        frame = following
        time = later
        count += 1

    promised = video.get(cv2.CAP_PROP_FRAME_COUNT)  # sometimes an estimate
    if count < max(1, 0.95 * promised):
        raise UserError(f"{path}: no video, or damaged: only {count} of {promised:.0f} frames "
                        "can be read; copy it again, or repair it with ffmpeg")


def crop_video(job):
    """Write one video's crops -> its frames, how many of them lack a face, and what is wrong or "".

    Two passes: a median looks ahead, and the frames of a long video do not fit in memory.
    """
    video, target, detector = job
    detect = face_detector(detector)
    import cv2
    try:
        faces = np.array([largest_face(detect(frame)) for frame in video_frames(video)])
        smooth = smooth_faces(faces)
        if not smooth:
            raise UserError(f"{video}: no face in it; look at it, or try another --detector")
    except UserError as error:
        return 0, 0, str(error)

    with replacing(target) as part:  # a full disk ends the whole run
        part.mkdir(parents=True)
        for i, frame in enumerate(video_frames(video)):
            if i in smooth:
                x, y, side, angle = smooth[i]
                turn = cv2.getRotationMatrix2D((x, y), angle, CROP / side)
                turn[:, 2] += CROP / 2 - x, CROP / 2 - y
                crop = cv2.warpAffine(frame, turn, (CROP, CROP))
                jpeg = cv2.imencode(".jpg", crop)[1]  # of quality 95, OpenCV's default
                (part / f"img_{i + 1:05d}.jpg").write_bytes(jpeg)
    return len(faces), len(faces) - len(smooth), ""


def crop_videos(videos, root, detector, workers):
    """Write root/faces/<subject>/<sample>/img_00001.jpg ... where it is not there yet.

    If root holds BioVid's signals or one name is BioVid's, all must be; others keep their folders.
    """
    face_detector(detector)  # what is wrong with it is said once, here
    files = ([videos] if videos.is_file() else
             sorted(path for _, inside in walk(videos) for path in inside))
    paths = [path for path in files if path.suffix.lower() in VIDEO]
    others = sorted({*files} - {*paths})
    if not paths:
        raise UserError(f"{videos}: no video (*{' *'.join(VIDEO)}) in it, of {len(files)} files; "
                        "expected one or a folder of them")
    strays = [path for path in paths if not re.fullmatch(SAMPLE, path.stem)]
    if strays and (any(root.glob("biosignals_*")) or strays != paths):
        raise UserError(f"{strays[0]}: expected a name like 071309_w_21-BL1-081; move or rename it")

    targets = {}  # {folder of crops: its video}
    for path in paths:
        folder = path.relative_to(videos).parent if strays else path.stem[:11]
        target = root / "faces" / folder / path.stem
        if targets.setdefault(target, path) != path:
            raise UserError(f"{target}: two videos of this name; remove one")
    writable(root / "faces")
    todo = [(path, target, detector) for target, path in targets.items() if not target.is_dir()]
    loader = DataLoader(todo, None, num_workers=max(0, min(workers, len(todo))),
                        collate_fn=crop_video)
    frames, missing, faults = zip((0, 0, ""), *bar(loader, "videos"), strict=True)
    faults = [fault for fault in faults if fault]
    fewest = sorted(f"{len(os.listdir(folder)):6} {folder.name}"
                    for folder in targets if folder.is_dir())[:10]
    print("fewest faces:", *fewest, *faults,
          f"{len(targets)} videos, {len(targets) - len(todo)} there already, {len(faults)} failed; "
          f"{sum(frames)} frames, {sum(missing)} without a face; {len(others)} others not used"
          f"{': ' * bool(others)}{', '.join(map(str, others[:9]))}", sep="\n")
    sys.exit(bool(faults))


def parse(argv=None):
    parser = Parser(__doc__)
    job = parser.add_mutually_exclusive_group(required=True).add_argument
    job("--check", choices=DATASETS, help="count what is at --root, list every fault")
    job("--synthetic", choices=DATASETS[:3], help="write a stand-in to --root")
    job("--crop", type=a_path, metavar="VIDEOS",
        help="cut the faces out of a video or a folder of videos, into --root/faces")
    add = parser.add_argument
    add("--detector", type=os.path.expanduser, default="haar", metavar="FILE",
        help="for --crop: the file of YuNet, else OpenCV 4's Haar cascade")
    allotted = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count()))
    add("--workers", type=int, default=len(allotted(0)),
        help="for --crop: processes; default: the CPUs that this one may use, %(default)s")
    add("--classes", type=int, choices=(2, 5), default=2,
        help="for --check of BioVid: the classes that are read; default 2, BL1 and PA4")
    add("--face-start", type=float, help="for --check: where image 1 lies, seconds")
    add("--root", type=a_path, help="default: data/<data set>, with -synthetic for a stand-in")
    return parser.parse_args(argv)


def main():
    args = parse()
    if args.synthetic:
        return write_stand_in(args.synthetic, args.root or f"data/{args.synthetic}-synthetic")
    if args.crop:
        if not args.root:
            raise UserError("--crop needs --root, the folder to write faces/ into")
        return crop_videos(args.crop, args.root, args.detector, args.workers)
    source = open_dataset(args.check, args.root or f"data/{args.check}", args.classes,
                          face_start=args.face_start, strict=False)
    if hasattr(source, "label"):
        print(source.describe())
        source.check()
        source.faults += refused_folds(source, fold_numbers(source))
    # a file of many clips is one fault
    faults, notes = map(dict.fromkeys, (source.faults, source.notes))
    print(*faults, *(f"note: {note}" for note in notes),
          f"{len(faults)} faults, {len(notes)} notes", sep="\n")
    if faults:
        sys.exit(2)


def lacks_memory(error):
    """Whether an error of any library is for want of memory."""
    return bool(re.search("MemoryError|out of memory|not enough memory|allocate memory|"
                          "nable to allocate|ALLOC_FAILED", repr(error)))


def run(main):
    """Call main; a user's mistake is one line on stderr and exit code 2 (Ctrl-C: 130)."""
    code = 2
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has none
        # files' names may be of any bytes; each line at once, into a file, too, and in one piece:
        # those of several ranks would cut one another
        sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True, write_through=False)
    try:
        try:
            main()
        finally:
            sys.stdout.flush()  # a closed pipe shows here rather than at the interpreter's exit
        return
    except Exception as error:
        # a DataLoader worker hands it on behind its traceback
        line = re.split(r"\n[\w.]*Error: ", str(error))[-1].strip()
        if isinstance(error, UserError):
            pass
        elif re.search("/gloo/|NCCL|TCPStore", line):
            line = ("another rank has ended: its own line says why, or torchrun's last name it "
                    f"({line.splitlines()[0]})")
        elif re.search(r"shared memory|</torch_|DataLoader worker .* (killed|exited)", line):
            line = ("a process that loads data died, probably for lack of shared memory; use "
                    "--workers 0 (in Docker also: --shm-size 8g)")
        elif lacks_memory(error):
            asked = re.search(r" for \d[\d.]* ?\w+|$", line.replace("allocate", "for"))[0]
            line = (f"not enough memory{asked}; lower --batch-size, --fusion-batch-size, "
                    "--image-size or, with --finetune, --chunk; a features file must fit in whole")
        elif "loading state_dict" in line:
            line = ("a checkpoint is of an earlier version of these scripts: train it again, in "
                    f"another --out ({line.splitlines()[0]})")
        elif "more than 1 value per channel" in line:
            line = ("a batch, or a rank's share of it, leaves batch norm one value a channel: "
                    "change --batch-size or --image-size")
        elif isinstance(error, OSError):
            closed = isinstance(error, BrokenPipeError)
            line = ("ended, for nobody reads the output any more" if closed else
                    f"{line}; check the path, or give another")
            sys.stdout = open(os.devnull, "w")  # what it still holds must not fail again at exit
        else:
            raise
    except KeyboardInterrupt:
        line = "interrupted; training goes on with --resume, all else with the same command"
        code = 130
    print("error: " * (code == 2) + line.replace("\n", " "), file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    run(main)
