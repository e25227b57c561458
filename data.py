"""The data sets as they lie on disk, their spectrograms, the features file, folds and windows, and the stand-in.

    python data.py --check biovid_b --root data/biovid_b            # counts, and every fault found
    python data.py --synthetic biovid_b --root data/my-stand-in     # writes a small stand-in in the same format
    python data.py --crop video --root data/biovid_b                # cuts the face crops from its videos

A data set is a sequence of *rows*: one row is one clip (F face frames and the privileged signal of the same span). Its
attributes are arrays over the rows:

    name   which clip this is                         label  int64 (R,) or float32 (R, 2), -5 where there is none
    group  what folds keep together (a subject)       split  "train" or "test" where the data set fixes it, else None
    video  rows of one sequence are consecutive       visual(row), privileged(row)   one clip's tensors, from disk

and a *sample* is a window of `length` consecutive rows of one sequence (`windows`).
"""
import argparse
import json
import math
import os
import re
import shutil
import struct
import sys
import tokenize
import warnings
import zipfile
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import torch
from scipy.io import wavfile
from scipy.signal import resample_poly, spectrogram
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, encode_jpeg, read_image
from torchvision.transforms.functional import resize
from tqdm import tqdm

from pkdot import INVALID, valid

DATASETS = ("biovid_b", "biovid_a", "affwild2", "features")
ORIGIN = {"biovid": "on request from https://www.nit.ovgu.de/BioVid.html",
          "affwild2": "on request from https://ibug.doc.ic.ac.uk/resources/aff-wild2/"}


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, like every other error of the user's."""

    def __init__(self, description):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                         allow_abbrev=False)

    def error(self, message):
        raise UserError(f"{message}; see python {self.prog} --help")


class UserError(ValueError):
    """What the user can mend: one line that says what, where and what to do. The scripts print it and exit with 2."""


class Samples(Dataset):
    """Windows of one modality as read from disk: ((L, ...) clips, label), labels outside `keep` being -5.

    keep = None is for data without labels: clips alone.
    """

    def __init__(self, source, modality, index, keep):
        self.read, self.windows, self.index = getattr(source, modality), (index, keep), index
        self.label = sample_labels(source.label, index, keep) if keep is not None else None

    def __len__(self):
        return len(self.index)

    def __getitem__(self, sample):
        clips = torch.stack([self.read(int(row)) for row in self.index[sample]])
        return clips if self.label is None else (clips, self.label[sample])


def windows(video, length, dense=False):
    """Samples of `length` consecutive rows of one video -> index (S, length) of rows, keep (S, length) bool.

    Tiling by default, the last window aligned to the video's end; dense starts a window at every row. keep marks what
    counts: in a tiling each row exactly once (not again where the last window overlaps the one before), and never the
    repeats of the last row that fill up a video shorter than a window.
    """
    index, keep = [], []
    bounds = [0, *(np.flatnonzero(video[1:] != video[:-1]) + 1), len(video)]
    for begin, end in zip(bounds[:-1], bounds[1:], strict=True):
        last = max(end - length, begin)
        seen = begin
        for start in range(begin, last + 1) if dense else [*range(begin, last, length), last]:
            rows = np.arange(start, start + length)
            keep.append((rows < end) & (rows >= (start if dense else seen)))
            index.append(rows.clip(max=end - 1))
            seen = start + length
    return torch.from_numpy(np.stack(index)), torch.from_numpy(np.stack(keep))


def sample_labels(label, index, keep):
    """Labels of windows: classes (S,), or valence/arousal (S, L, 2) with -5 where the row does not count."""
    return label[index].where(keep[..., None], INVALID) if label.is_floating_point() else label[index[:, 0]]


def parts(source, fold):
    """Which part each row is in for fold 1..5 -> array of "train", "val", "test". [ours]

    Groups (subjects, videos) are never divided. Test is the fold, or the data set's own split where it has one; 1/8 of
    the remaining groups, at least one, is held out as "val" to choose the epoch. Folds do not depend on any seed flag.
    """
    groups = np.random.default_rng(0).permutation(np.unique(source.group))
    if source.split is None:
        if len(groups) < 5:
            raise UserError(f"{source.path}: 5 folds need at least 5 groups (subjects), found {len(groups)}")
        test = np.isin(source.group, groups[fold - 1::5])
    else:
        test = source.split == "test"
    rest = groups[np.isin(groups, source.group[~test])]
    if len(rest) < 2 or not test.any():
        raise UserError(f"{source.path}: needs two training groups and a test part, has {len(rest)} groups "
                        f"and {test.sum()} test rows")
    return np.where(test, "test", np.where(np.isin(source.group, rest[::8]), "val", "train"))


def read_frames(paths, size):
    """Decode, resize and stack face crops -> uint8 (3, F, size, size)."""
    frames = []
    for path in paths:
        try:
            image = read_image(str(path), ImageReadMode.RGB)
        except RuntimeError:
            raise UserError(f"{path}: not a readable image; extract it again or delete it") from None
        frames.append(resize(image, [size, size], antialias=True))
    return torch.stack(frames, 1)


def find_folder(root, *names):
    """The first of root/name that exists, or root/name/name as unzipping sometimes leaves it; None if there is none."""
    return next((p for n in names for p in (root / n / n, root / n) if p.is_dir()), None)


class BioVid:
    """BioVid Heat Pain, parts A (privileged: EDA) and B (EMG). Section IV-A1.

    root/faces/<subject>/<sample>/img_00001.jpg ..., root/biosignals_filtered/<subject>/<sample>_bio.csv. The label is
    in the sample's name; 2 classes keep BL1 and PA4. A sample is the window 2.0-5.0 s, cut into `length` clips:
    visual(row) -> uint8 (3, 10, size, size), privileged(row) -> float32 (1, 67, 127) when there is one clip.
    `faults` lists what is wrong with the folders; reading a file that is wrong raises UserError.
    """
    task, split = "classification", None
    LEVELS = ("BL1", "PA1", "PA2", "PA3", "PA4")
    COLUMN = {"biovid_a": "gsr", "biovid_b": "emg_corrugator"}
    BEGIN, END, VIDEO_FPS, RATE, FRAMES = 2.0, 5.0, 25, 512, 10  # seconds, seconds, Hz, Hz, images a clip

    def __init__(self, root, dataset, classes=2, length=1, image_size=112, privileged=True):
        self.path, self.column, self.length, self.image_size = Path(root), self.COLUMN[dataset], length, image_size
        levels = self.levels(classes)
        self.outputs, self.samples, self.faults, self.strays = len(levels), [], [], []
        hint = f"BioVid is licence-gated, {ORIGIN['biovid']}; --synthetic runs without it"
        faces = find_folder(self.path, "faces")
        signals = find_folder(self.path, "biosignals_filtered", "biosignals_raw")
        if faces is None:
            self.faults.append(f"{self.path / 'faces'}: expected a folder "
                               f"faces/<subject>/<sample>/img_00001.jpg; {hint}")
        if privileged and signals is None:
            self.faults.append(f"{self.path / 'biosignals_filtered'}: expected a folder "
                               f"biosignals_filtered/<subject>/<sample>_bio.csv; {hint}")
        if self.faults:
            return
        for folder in sorted(p for p in faces.glob("[!.]*/[!.]*") if p.is_dir()):
            subject = folder.parent.name
            match = re.fullmatch(r"\d{6}_[mw]_\d{2}-(BL1|PA[1-4])-\d{3}", folder.name)
            csv = signals / subject / f"{folder.name}_bio.csv" if privileged else None
            if not match or not folder.name.startswith(subject + "-"):
                self.faults.append(f"{folder}: expected a name like 071309_w_21/071309_w_21-BL1-081; "
                                   "rename or remove it")
            elif csv and not csv.is_file():
                self.faults.append(f"{csv}: missing, but its face crops are there; extract it again or remove {folder}")
            elif match[1] in levels:
                self.samples.append((folder, csv, levels.index(match[1])))
        if privileged:
            self.strays = [f"{p}: no face crops in {faces / p.parent.name / p.name[:-8]}; not used"
                           for p in sorted(signals.glob("[!.]*/[!.]*_bio.csv"))
                           if not (faces / p.parent.name / p.name[:-8]).is_dir()]
        if not self.samples and not self.faults:
            self.faults.append(f"{faces}: no sample of {', '.join(levels)} in it; expected <subject>/<sample>/; {hint}")
        rows = [s for s in self.samples for _ in range(length)]
        self.name = np.array([f"{s[0].name}/{i % length}" for i, s in enumerate(rows)])
        self.group = np.array([s[0].parent.name for s in rows])
        self.video = np.repeat(np.arange(len(self.samples)), length)
        self.label = torch.tensor([s[2] for s in rows])

    @classmethod
    def levels(cls, classes):
        return cls.LEVELS if classes == 5 else ("BL1", "PA4")

    def visual(self, row):
        return read_frames(pain_frames(self.samples[row // self.length][0], *self._span(row)), self.image_size)

    def privileged(self, row):
        begin, end = self._span(row)
        return pain_spectrogram(read_biosignal(self.samples[row // self.length][1], self.column, begin, end))

    def _span(self, row):
        return clip_span(row % self.length, self.length)

    def check(self):
        """Yields every fault inside the files, and what lies there unused; folders' faults are in `faults`."""
        yield from self.strays
        for folder, csv, _ in tqdm(self.samples, disable=None):
            yield from _faults(pain_frames, folder, self.BEGIN, self.END)
            for image in folder.glob("*.jpg"):
                yield from _faults(read_frames, [image], 8)
            yield from _faults(read_biosignal, csv, self.column, self.BEGIN, self.END)

    def describe(self):
        frames = sum(len(os.listdir(s[0])) for s in self.samples)
        classes = ", ".join(f"{n} {int((self.label == i).sum())}"
                            for i, n in enumerate(self.levels(self.outputs)))
        return f"{len(set(self.group))} subjects, {len(self.samples)} samples, {frames} frames, classes {classes}"


def _faults(read, *args):
    """The fault of one read, if any, as `check` lists it."""
    try:
        read(*args)
    except UserError as error:
        yield str(error)


def clip_span(clip, length):
    """Where clip 0..length-1 of a BioVid sample begins and ends, in seconds."""
    seconds = (BioVid.END - BioVid.BEGIN) / length
    return BioVid.BEGIN + clip * seconds, BioVid.BEGIN + (clip + 1) * seconds


def image_numbers(folder, pattern):
    """The sorted numbers of a folder's images, by a pattern with one group of digits."""
    return np.array(sorted(int(m[1]) for m in map(re.compile(pattern).fullmatch, os.listdir(folder)) if m), int)


def pain_frames(folder, begin, end):
    """BioVid.FRAMES equally spaced ones of the images there from begin to end seconds; image i is at (i - 1) / 25 s.

    A clip without an image takes the one of the sample's window that is nearest to its middle.
    """
    numbers = image_numbers(folder, r"img_(\d{5})\.jpg")
    seconds = (numbers - 1) / BioVid.VIDEO_FPS
    window, clip = (numbers[(seconds >= a) & (seconds < b)] for a, b in ((BioVid.BEGIN, BioVid.END), (begin, end)))
    if len(window) == 0:
        raise UserError(f"{folder}: no face img_<5 digits>.jpg between {BioVid.BEGIN:g} and {BioVid.END:g} s; "
                        "extract its crops again or remove the folder")
    middle = 1 + (begin + end) / 2 * BioVid.VIDEO_FPS
    present = clip if len(clip) else window[[np.abs(window - middle).argmin()]]
    chosen = present[np.linspace(0, len(present) - 1, BioVid.FRAMES).round().astype(int)]
    return [folder / f"img_{i:05d}.jpg" for i in chosen]


def read_biosignal(path, column, begin, end):
    """One column of a BioVid csv from `begin` s on, (end - begin) * 512 values. Rows are found by time, in us."""
    count = round((end - begin) * BioVid.RATE)
    try:
        with open(path) as file:
            header = [name.strip() for name in file.readline().split("\t")]
            if "time" not in header or column not in header:
                raise UserError(f"{path}: no column {column if 'time' in header else 'time'!r} among {header}; "
                                "a tab-separated BioVid file is expected")
            time, values = _read_table(file, "\t", [header.index("time"), header.index(column)]).T
    except (UnicodeDecodeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: not a table of numbers ({error}); extract it again") from None
    start = np.searchsorted(time, begin * 1e6)
    values = values[start:start + count]
    late = len(values) == count and time[start + count - 1] > end * 1e6 + 2e6 / BioVid.RATE  # rows are missing
    if len(values) < count or late or not np.isfinite(values).all():
        raise UserError(f"{path}: expected {count} finite values of {column} between {begin:g} and {end:g} s; "
                        "extract it again or remove the sample")
    return values


def _read_table(file, delimiter, columns=None):
    """The numbers that are left in an open text file, (rows, columns); none of them is for the caller to notice."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "loadtxt: input contained no data")
        return np.loadtxt(file, delimiter=delimiter, usecols=columns, ndmin=2)


def pain_spectrogram(values):
    """Log power of 512 Hz values -> float32 (1, 67, frames); 3 s give the paper's 67 x 127. Section IV-B1.

    No detrending: an EDA response is slow, and removing each 31 ms segment's mean would remove it. [ours]
    """
    _, _, power = spectrogram(values, fs=BioVid.RATE, nperseg=16, noverlap=4, nfft=132, detrend=False)
    return torch.from_numpy(np.log(power + 1e-10)[None]).float()


class Affwild2:
    """Affwild2 as ABAW distributes it for valence and arousal; privileged: audio. Section IV-A, IV-B2.

    root/cropped_aligned/<video>/00001.jpg ..., root/annotations/VA_Estimation_Challenge/{Train_Set,Validation_Set}/
    <video>.txt, root/audio/<video without _left/_right>.wav, optional root/fps.txt. A row is a clip of 32 frames; clips
    tile the video, the last one aligned to its end. visual(row) -> uint8 (3, 8, size, size), privileged(row) -> float32
    (1, 64, 107), label = its last frame's. frame_label (T, 2) and frame_row (T,) hold each valid frame of the data
    set once, with the row whose prediction holds for it.
    """
    task, outputs = "regression", 2
    CLIP, EVERY, LENGTH = 32, 4, 8

    def __init__(self, root, length=LENGTH, image_size=112, privileged=True):
        self.path, self.length, self.image_size, self.faults = Path(root), length, image_size, []
        self.wavs, self.folders, self.strays = {}, {}, []
        hint = f"Affwild2 is licence-gated, {ORIGIN['affwild2']}; --synthetic runs without it"
        crops = find_folder(self.path, "cropped_aligned")
        annotations = find_folder(self.path, "annotations") or self.path
        sets = sorted(p.parent for level in ("", "*/") for name in ("VA_Estimation_Challenge", "VA_Set")
                      for p in annotations.glob(f"{level}{name}/Train_Set"))
        if crops is None:
            self.faults.append(f"{self.path / 'cropped_aligned'}: expected a folder "
                               f"cropped_aligned/<video>/00001.jpg; {hint}")
        if not sets:
            self.faults.append(f"{self.path / 'annotations'}: expected a folder VA_Estimation_Challenge/"
                               f"Train_Set/<video>.txt in it; {hint}")
        if self.faults:
            return
        self.fps = {}
        self.faults += _faults(self._read_fps)
        files = {p.stem: (p, split) for split, name in (("train", "Train_Set"), ("test", "Validation_Set"))
                 for p in sorted((sets[-1] / name).glob("[!.]*.txt"))}  # sets[-1]: the later ABAW edition
        self.strays = [f"{p}: crops without an annotation file in {sets[-1]}; not used"
                       for p in sorted(crops.iterdir()) if p.is_dir() and p.name not in files]
        rows, frames = [], []  # (video, split, first frame, images, label) and (labels, row) of each video
        for video, (path, split) in files.items():
            try:
                label, present = self._read_video(path, crops / video, privileged)
            except UserError as error:
                self.faults.append(str(error))
                continue
            clips = list(affect_clips(len(label), present))
            first_row = len(rows)
            rows += [(video, split, begin, images, label[begin + self.CLIP - 1]) for begin, images in clips]
            frames.append((label, first_row + self._nearest([begin for begin, _ in clips], len(label))))
        if not rows:
            self.faults = self.faults or [f"{sets[-1]}: no <video>.txt in Train_Set or Validation_Set; {hint}"]
            return
        video, split, begin, images, label = zip(*rows, strict=True)
        self.video, self.split, self.begin, self.images = map(np.array, (video, split, begin, images))
        self.name = np.array([f"{v}/{b + self.CLIP:05d}" for v, b in zip(video, begin, strict=True)])
        self.group = np.array([sound_name(v) for v in video])
        self.label = torch.from_numpy(np.stack(label))
        label, row = (torch.from_numpy(np.concatenate(x)) for x in zip(*frames, strict=True))
        self.frame_label, self.frame_row = label[valid(label)], row[valid(label)]

    def _read_fps(self):
        path = self.path / "fps.txt"
        try:
            lines = path.read_text().splitlines() if path.exists() else []
            self.fps = {video: float(fps) for video, fps in (line.split() for line in lines if line.strip())}
            if not all(0 < fps < math.inf for fps in self.fps.values()):
                raise ValueError
        except ValueError:
            self.fps = {}
            raise UserError(f"{path}: expected lines '<video> <frames per second>', above 0") from None

    def _read_video(self, annotation, crops, privileged):
        """Labels (T, 2) and the sorted numbers of the images there; raises UserError at the first fault."""
        label = read_annotation(annotation)
        if len(label) < self.CLIP:
            raise UserError(f"{annotation}: {len(label)} frames, shorter than a clip of {self.CLIP}; remove the file")
        if not crops.is_dir():
            raise UserError(f"{crops}: missing, but {annotation} is there; extract the crops or remove the annotation")
        present = image_numbers(crops, r"(\d{5})\.jpg")
        beyond, present = present[present > len(label) + 2], present[present <= len(label)]
        if len(beyond):
            raise UserError(f"{crops}: image {beyond[-1]:05d}.jpg, but {annotation} has {len(label)} rows; "
                            "they are not of the same video")
        if len(present) == 0:
            raise UserError(f"{crops}: no image <5 digits>.jpg in it; extract it again or remove {annotation}")
        video, wav = annotation.stem, self.path / "audio" / f"{sound_name(annotation.stem)}.wav"
        if privileged:
            rate, sound = read_wav(wav)
            seconds, needed = len(sound) / rate, len(label) / self.fps.get(video, 30)
            if seconds < needed - 1:  # within a second it is rounding of frame rates, and silence fills it
                raise UserError(f"{wav}: {seconds:.1f} s of sound for {needed:.1f} s of {video}; "
                                "extract it again or give the frame rate in fps.txt")
        self.wavs[video], self.folders[video] = wav, crops
        return label, present

    def _nearest(self, begins, frames):
        """Which clip predicts each frame: the first that covers it, or where that was dropped the nearest one."""
        begins, t = np.array(begins), np.arange(frames)
        clip = np.searchsorted(begins + self.CLIP, t, side="right").clip(max=len(begins) - 1)
        before = (clip - 1).clip(min=0)
        gap = np.maximum(begins[clip] - t, 0)  # 0 where the clip covers the frame
        return np.where(t - (begins[before] + self.CLIP - 1) < gap, before, clip) if len(begins) > 1 else clip

    def visual(self, row):
        folder = self.folders[self.video[row]]
        return read_frames([folder / f"{i:05d}.jpg" for i in self.images[row]], self.image_size)

    def privileged(self, row):
        video = self.video[row]
        end = (self.begin[row] + self.CLIP) / self.fps.get(video, 30)
        return log_mel(read_sound(self.wavs[video], end))

    def check(self):
        yield from self.strays
        for row in tqdm(range(len(self.name)), disable=None):
            yield from _faults(self.privileged, row)
        for folder in tqdm(self.folders.values(), disable=None):
            for image in folder.glob("*.jpg"):
                yield from _faults(read_frames, [image], 8)

    def describe(self):
        return ", ".join(f"{part}: {len(set(self.video[self.split == part]))} videos, "
                         f"{(self.split == part).sum()} clips, "
                         f"{(self.split[self.frame_row] == part).sum()} valid frames" for part in ("train", "test"))


def affect_clips(frames, present):
    """(first frame, numbers of its 8 images) of each clip that has an image; a missing one repeats the nearest."""
    last = frames - Affwild2.CLIP
    for begin in [*range(0, last, Affwild2.CLIP), last]:
        near = present[(present > begin) & (present <= begin + Affwild2.CLIP)]  # image numbers start at 1
        if len(near):
            wanted = begin + np.arange(Affwild2.EVERY, Affwild2.CLIP + 1, Affwild2.EVERY)  # the last one is labelled
            yield begin, near[np.abs(near[None] - wanted[:, None]).argmin(1)]


def sound_name(video):
    """Two faces of one video, <video>_left and <video>_right, share its sound, and stay in one group."""
    return re.sub("_(left|right)$", "", video)


def read_annotation(path):
    """Affwild2's valence,arousal file -> float32 (T, 2); a row with -5 in either place has no label."""
    try:
        with open(path) as file:
            if file.readline().replace(" ", "").strip() != "valence,arousal":
                raise UserError(f"{path}: its first line should be 'valence,arousal'")
            label = _read_table(file, ",").astype(np.float32)
    except (UnicodeDecodeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: not pairs of numbers ({error}); extract it again") from None
    if label.size == 0 or label.shape[1] != 2 or not ((np.abs(label) <= 1) | (label == INVALID)).all():
        raise UserError(f"{path}: expected two values a row, in [-1, 1] or -5; extract it again")
    return label


def read_wav(path):
    """Sample rate and samples of a wav, (n,) or (n, channels), mapped rather than read."""
    if not path.is_file():
        raise UserError(f"{path}: missing; make it with ffmpeg -i <video>.mp4 -ac 1 -ar 44100 {path.name}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", wavfile.WavFileWarning)  # chunks of metadata
            rate, sound = wavfile.read(path, mmap=True)
    except (ValueError, EOFError, struct.error) as error:
        raise UserError(f"{path}: not a readable wav ({error}); make it again with ffmpeg -ac 1 -ar 44100") from None
    fine = sound.dtype in (np.int16, np.int32, np.float32, np.float64)
    if sound.size == 0 or not fine:
        what = f"{sound.dtype} samples, expected int16, int32 or float" if sound.size else "empty"
        raise UserError(f"{path}: {what}; make it again with ffmpeg -ac 1 -ar 44100")
    return rate, sound


SOUND_RATE, SOUND_SAMPLES = 44100, 47040  # 1.067 s: a clip's 32 frames at 30 fps


def read_sound(path, end):
    """The SOUND_SAMPLES mono samples at 44.1 kHz that end at `end` seconds, zeros outside the file -> float32."""
    rate, sound = read_wav(path)
    stop = round(end * rate)
    start = stop - math.ceil(SOUND_SAMPLES * rate / SOUND_RATE)
    piece = np.asarray(sound[max(start, 0):stop])
    if np.issubdtype(piece.dtype, np.integer):
        piece = piece / -float(np.iinfo(piece.dtype).min)
    if not np.isfinite(piece).all():
        raise UserError(f"{path}: holds NaN or infinity before {end:.2f} s; make it again with ffmpeg -ac 1 -ar 44100")
    piece = piece.mean(1) if piece.ndim == 2 else piece
    piece = np.pad(piece, (max(-start, 0), stop - max(start, 0) - len(piece)))
    if rate != SOUND_RATE:
        divisor = math.gcd(rate, SOUND_RATE)
        piece = resample_poly(piece, SOUND_RATE // divisor, rate // divisor)
    return piece[-SOUND_SAMPLES:].astype(np.float32)


@cache
def mel_filters(bins=513, mels=64, rate=SOUND_RATE):
    """(mels, bins): triangles of height 1, evenly spaced from 0 to rate / 2 on the scale 2595 log10(1 + f / 700)."""
    corners = np.linspace(0, 2595 * np.log10(1 + rate / 2 / 700), mels + 2)
    corners = 700 * (10 ** (corners / 2595) - 1)[:, None]  # Hz
    f = np.linspace(0, rate / 2, bins)
    rise = (f - corners[:-2]) / (corners[1:-1] - corners[:-2])
    fall = (corners[2:] - f) / (corners[2:] - corners[1:-1])
    return torch.from_numpy(np.minimum(rise, fall).clip(0)).float()


def log_mel(sound):
    """47,040 samples at 44.1 kHz -> float32 (1, 64, 107) dB, floor 80 dB below the maximum. Section IV-B2."""
    spectrum = torch.stft(torch.from_numpy(sound), n_fft=1024, hop_length=441, win_length=882,
                          window=torch.hann_window(882), pad_mode="constant", return_complex=True)  # (513, 107)
    db = 10 * (mel_filters() @ spectrum.abs().square()).clamp_min(1e-10).log10()
    return db.clamp_min(db.max() - 80)[None]


class Faces:
    """Face crops alone, for prediction: a folder of images named as in the data set, or a folder of such folders."""

    def __init__(self, folder, settings):
        self.path, self.image_size, self.length = Path(folder), settings["image_size"], settings["length"]
        if not self.path.is_dir():
            raise UserError(f"{folder}: no such folder; expected face crops, named as in {settings['dataset']}")
        clips = []  # (name, images)
        for one in sorted({p.parent for p in self.path.glob("**/*.jpg")}):
            if settings["dataset"] == "affwild2":
                present = image_numbers(one, r"(\d{5})\.jpg")
                frames = max(present, default=0)
                if frames < Affwild2.CLIP:
                    raise UserError(f"{one}: {frames} frames, shorter than a clip of {Affwild2.CLIP}")
                clips += [(one, b + Affwild2.CLIP, [one / f"{i:05d}.jpg" for i in images])
                          for b, images in affect_clips(frames, present)]
            else:
                clips += [(one, clip, pain_frames(one, *clip_span(clip, self.length))) for clip in range(self.length)]
        if not clips:
            raise UserError(f"{folder}: no .jpg in it; expected face crops, named as in {settings['dataset']}")
        self.video, last, self.images = zip(*clips, strict=True)
        self.video = np.array([v.name if v == self.path else str(v.relative_to(self.path)) for v in self.video])
        self.name = [f"{v}/{i:05d}" for v, i in zip(self.video, last, strict=True)]

    def visual(self, row):
        return read_frames(self.images[row], self.image_size)


class Features:
    """A features file (.npz): visual (N, L, Dv), privileged (N, L, Dp); label int (N,), or float (N, 2) or (N, L, 2).

    Optional: group, split ("train" or "test"), name, all (N,); and, as stage 2 writes them, video (N,) and the labels
    frame_label (T, 2) of single frames with frame_row (T,), the row whose prediction holds for the frame.
    `rows["visual"]` and `rows["privileged"]` are the (N * L, D) tensors. Raises UserError for whatever does not fit.
    """

    faults = ()

    def __init__(self, path, privileged=True, labelled=True):
        self.path = Path(path)
        want = "expected a features file (.npz) with visual (N, L, Dv), privileged (N, L, Dp) and label"
        if not self.path.is_file():
            raise UserError(f"{path}: no such file; {want}")
        try:
            with np.load(path, allow_pickle=False) as file:
                skip = () if privileged else ("privileged",)
                arrays = {key: file[key] for key in file.files if key not in skip}
        except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile, zlib.error, tokenize.TokenError):
            raise UserError(f"{path}: cannot be read: not an .npz, damaged, or of pickled objects; {want}") from None
        modalities = ("visual", "privileged") if privileged else ("visual",)
        for key in (*modalities, "label") if labelled else modalities:
            if key not in arrays:
                raise UserError(f"{path}: no array {key!r} in it, only {sorted(arrays)}; {want}")
        count, self.length = arrays["visual"].shape[:2] if arrays["visual"].ndim == 3 else (0, 0)
        for key in modalities:
            if arrays[key].ndim != 3 or arrays[key].shape[:2] != (count, self.length) or arrays[key].size == 0:
                raise UserError(f"{path}: {key} is {arrays[key].shape}; {want}")
            if arrays[key].dtype.kind != "f":
                raise UserError(f"{path}: {key} is {arrays[key].dtype}; write finite float32 values")
        self.rows = {key: torch.from_numpy(arrays[key]).float().flatten(0, 1) for key in modalities}
        for key, rows in self.rows.items():
            if not torch.isfinite(rows).all():
                raise UserError(f"{path}: {key} holds NaN or infinity; write finite float32 values")
        if labelled:
            self._label(arrays["label"], count)
        for key in ("group", "split", "name", "video"):
            if key in arrays and (arrays[key].shape != (count,)):
                raise UserError(f"{path}: {key} is {arrays[key].shape}, expected one entry a sample, ({count},)")
        sample = np.arange(count)

        def over_rows(key, default):
            return np.repeat(arrays.get(key, default), self.length)

        self.group, self.video = over_rows("group", sample), over_rows("video", sample)
        self.name, self.split = over_rows("name", sample.astype(str)), arrays.get("split")
        if self.split is not None:
            if not set(self.split) <= {"train", "test"}:
                found = ", ".join(sorted(set(self.split))[:4])
                raise UserError(f"{path}: split holds {found}; expected train and test")
            self.split = over_rows("split", None)
        self.backbones = str(arrays.get("backbones", ""))  # which weights stage 2 made the file with
        if labelled and self.task == "regression":
            if {"frame_row", "frame_label"} <= arrays.keys():  # as stage 2 wrote them
                self.frame_row, self.frame_label = (torch.from_numpy(arrays[k]) for k in ("frame_row", "frame_label"))
            else:
                self.frame_row = valid(self.label).nonzero()[:, 0]
                self.frame_label = self.label[self.frame_row]

    def _label(self, label, count):
        if label.dtype.kind in "iu" and label.shape == (count,):
            self.task, self.outputs = "classification", int(label.max()) + 1
            if label.min() < 0 or self.outputs < 2 or len(np.unique(label)) < self.outputs:
                raise UserError(f"{self.path}: the classes are {np.unique(label).tolist()[:9]}; number two or more "
                                "from 0 on, leaving none out")
            label = np.repeat(label.astype(np.int64), self.length)
        elif label.dtype.kind == "f" and label.shape in ((count, 2), (count, self.length, 2)):
            self.task, self.outputs = "regression", 2
            if not np.isfinite(label).all():
                raise UserError(f"{self.path}: label holds NaN or infinity; mark what has no label with -5")
            label = label.reshape(count, -1, 2).astype(np.float32)
            label = np.broadcast_to(label, (count, self.length, 2)).reshape(-1, 2)
        else:
            raise UserError(f"{self.path}: label is {label.dtype} {label.shape}, expected int ({count},), or float "
                            f"({count}, 2) or ({count}, {self.length}, 2)")
        self.label = torch.from_numpy(label.copy())

    def visual(self, row):
        return self.rows["visual"][row]

    def privileged(self, row):
        return self.rows["privileged"][row]

    def check(self):
        return ()

    def describe(self):
        what = f"{self.outputs} classes" if self.task == "classification" else "valence/arousal"
        return (f"{len(self.label) // self.length} samples of {self.length} clips, {what}, "
                f"{len(set(self.group))} groups, " + ", ".join(f"{k} width {v.shape[1]}" for k, v in self.rows.items()))


def save_features(path, arrays):
    """Write a features file under a temporary name, then rename it."""
    part = Path(path).with_suffix(".tmp")
    with open(part, "wb") as file:
        np.savez(file, **arrays)
    os.replace(part, path)


def open_dataset(dataset, root, classes=2, length=None, image_size=112, privileged=True):
    """The data set at `root`; raises UserError with the first fault. length: clips per sample, None for the default.

    With privileged=False no file of the privileged modality is looked at.
    """
    source = _open(dataset, root, classes, length, image_size, privileged)
    if source.faults:
        more = f" (and {len(source.faults) - 1} more: python data.py --check {dataset} --root {root})"
        raise UserError(source.faults[0] + more * (len(source.faults) > 1))
    return source


def _open(dataset, root, classes=2, length=None, image_size=112, privileged=True):
    if dataset == "features":
        return Features(root, privileged)
    if dataset == "affwild2":
        return Affwild2(root, length or Affwild2.LENGTH, image_size, privileged)
    return BioVid(root, dataset, classes, length or 1, image_size, privileged)


# The stand-in: a hidden intensity drives face and signal, each with noise of its own. NOISE (standard deviations, of an
# intensity that runs from 0 to 1) was set once, on the scores of single modalities and of their fusion, to come out in
# Table I's order; no student and no distillation method was looked at.
NOISE = {"biovid_a": (0.60, 0.20), "biovid_b": (0.60, 0.45), "affwild2": (0.25, 0.60)}  # visual, privileged
SUBJECTS, REPEATS, VIDEOS, FACE = 24, 8, 32, 56


def write_stand_in(dataset, root):
    """Write the synthetic data set to root, unless it is there already. Never touches a folder of other data."""
    root = Path(root)
    recipe = json.dumps({"dataset": dataset, "noise": NOISE[dataset], "version": 2}) + "\n"
    mark = root / "SYNTHETIC"
    if mark.is_file() and mark.read_text() == recipe:
        return
    if root.exists():
        what = "another stand-in: delete it, or" if mark.is_file() else "not a stand-in:"
        raise UserError(f"{root}: exists and is {what} give another --root")
    part = root.with_name(root.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    print(f"writing a synthetic stand-in of {dataset} to {root}")
    rng = np.random.default_rng(0)
    (write_affwild2 if dataset == "affwild2" else write_biovid)(dataset, part, rng)
    (part / "SYNTHETIC").write_text(recipe)
    part.rename(root)


def draw_faces(identity, brow, eye, mouth, smile):
    """Cartoon faces, uint8 (T, FACE, FACE, 3), of one identity (8 numbers in [-1, 1]) under expressions (T,) in about
    [-1, 1]: brow lowering, eye opening, mouth opening, smile."""
    brow, eye, mouth, smile = (x.astype(np.float32)[:, None, None] for x in (brow, eye, mouth, smile))
    y, x = np.mgrid[-1:1:FACE * 1j, -1:1:FACE * 1j].astype(np.float32)

    def blob(cx, cy, rx, ry, edge=4):
        return (edge * (1 - ((x - cx) / rx) ** 2 - ((y - cy) / ry) ** 2)).clip(0, 1)

    width, height, apart, low, wide, *tone = identity
    shape = np.broadcast_to(blob(0, 0, 0.75 + 0.1 * width, 0.92 + 0.06 * height), (len(brow), FACE, FACE))
    dark = np.zeros_like(shape)
    for side in (-1, 1):
        cx = side * (0.33 + 0.05 * apart)
        dark = np.maximum(dark, blob(cx, -0.22, 0.17, 0.07 + 0.045 * eye.clip(-1, 1)))
        dark = np.maximum(dark, 0.8 * blob(cx, -0.52 + 0.03 * low + 0.1 * brow, 0.22, 0.06))
    curve = smile.clip(-1, 1) * 1.5 * (0.03 - x**2)  # raises the mouth's corners
    dark = np.maximum(dark, blob(0, 0.45 + 0.05 * low + curve, 0.3 + 0.05 * wide, (0.1 + 0.09 * mouth).clip(0.03)))
    skin = np.array([205, 160, 130]) + 30 * np.array(tone)
    image = 70 + shape[..., None] * (skin - 70)
    return (image * (1 - 0.75 * dark[..., None])).clip(0, 255).astype(np.uint8)


def write_jpegs(folder, pattern, faces, keep, scale=1):
    folder.mkdir(parents=True)
    faces = torch.from_numpy(faces).permute(0, 3, 1, 2).repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    for i in np.flatnonzero(keep):
        (folder / pattern.format(i + 1)).write_bytes(encode_jpeg(faces[i].contiguous(), quality=90).numpy().tobytes())


def write_biovid(dataset, root, rng):
    noise_v, noise_p = NOISE[dataset]
    header = "time\tgsr\tecg\temg_trapezius\t emg_corrugator\temg_zygomaticus"  # real headers carry blanks, too
    for person in tqdm(range(SUBJECTS), disable=None):
        subject = f"{person + 1:02d}0109_{'mw'[person % 2]}_{20 + person}"
        identity, gain = rng.uniform(-1, 1, 8), rng.normal(1, 0.15)
        reactive = 0.15 if person % 6 == 5 else 1.0  # some subjects hardly react
        (root / "biosignals_filtered" / subject).mkdir(parents=True)
        for n in range(5 * REPEATS):
            level = n % 5
            sample = f"{subject}-{BioVid.LEVELS[level]}-{n + 81:03d}"
            hidden = reactive * level / 4
            t = np.arange(138) / BioVid.VIDEO_FPS
            onset = (t / 1.5).clip(0, 1)
            shown = onset * (hidden + noise_v * rng.normal()) + 0.05 * rng.normal(size=t.size)
            keep = np.ones(t.size, bool)
            if n % 4 == 3:  # the face detector lost the face for a while
                lost = rng.integers(0, 110)
                keep[lost:lost + rng.integers(1, 20)] = False
            faces = draw_faces(identity, shown, 0.6 - shown, shown - 0.3, 0 * shown)
            write_jpegs(root / "faces" / subject / sample, "img_{:05d}.jpg", faces, keep)

            rows = 2816 + n % 2
            t = np.arange(rows) / BioVid.RATE
            felt = (hidden + noise_p * rng.normal()) * (t / 1.5).clip(0, 1)
            tension = 3 * gain * np.exp(0.9 * felt)  # muscle activity is noise whose power follows the effort
            noise = rng.normal(size=(rows, 4))
            table = np.column_stack([t * 1e6, 5 + 0.5 * gain + 2.0 * felt + 0.01 * noise[:, 0],
                                     np.exp(-(((t * 1.2) % 1 - 0.5) / 0.02) ** 2), 3 * noise[:, 1],
                                     tension * noise[:, 2], tension * noise[:, 3]])
            np.savetxt(root / "biosignals_filtered" / subject / f"{sample}_bio.csv", table, delimiter="\t",
                       fmt=["%d"] + ["%.4f"] * 5, header=header, comments="")


def _wander(rng, frames, scale=60):
    """A smooth random course with standard deviation about 1."""
    kernel = np.hanning(2 * scale)
    return np.convolve(rng.normal(size=frames + 2 * scale - 1), kernel / np.sqrt((kernel**2).sum()), mode="valid")


def write_affwild2(dataset, root, rng):
    noise_v, noise_p = NOISE[dataset]
    labels, audio = root / "annotations" / "VA_Estimation_Challenge", root / "audio"
    for folder in (labels / "Train_Set", labels / "Validation_Set", audio):
        folder.mkdir(parents=True)
    videos = [(f"video{i}", "Train_Set" if i < 24 else "Validation_Set") for i in range(VIDEOS)]
    videos[3:4] = [("video3_left", "Train_Set"), ("video3_right", "Train_Set")]
    (root / "fps.txt").write_text("video5 25\n")
    for n, (video, part) in enumerate(tqdm(videos, disable=None)):
        fps = 25 if video == "video5" else 30
        frames = 550 if video.startswith("video3_") else int(rng.integers(400, 700))
        hidden = np.stack([0.25 * rng.normal() + 0.35 * _wander(rng, frames) for _ in "va"])  # valence, arousal
        shown = hidden / 0.4 + noise_v / 0.4 * np.stack([_wander(rng, frames) for _ in "va"])
        heard = hidden / 0.4 + noise_p / 0.4 * np.stack([_wander(rng, frames) for _ in "va"])
        keep = np.ones(frames, bool)
        lost = rng.integers(0, frames - 60)
        keep[lost:lost + rng.integers(5, 50)] = False
        faces = draw_faces(rng.uniform(-1, 1, 8), -0.5 * shown[1], 0.6 * shown[1], 0.4 * shown[1], 0.6 * shown[0])
        write_jpegs(root / "cropped_aligned" / video, "{:05d}.jpg", faces, keep, scale=2)
        table = hidden.T.clip(-1, 1)
        lost = rng.integers(0, frames - 100)
        table[lost:lost + 40, n % 2] = -5  # a stretch that nobody could label
        rows = frames + n % 3 - 1  # one row more or less than there are frames
        np.savetxt(labels / part / f"{video}.txt", np.pad(table, ((0, 1), (0, 0)), "edge")[:rows], fmt="%.3f",
                   delimiter=",", header="valence,arousal", comments="")
        if not video.endswith("_right"):  # the pair's sound is the left one's
            t = np.arange(int((frames + 1) / fps * SOUND_RATE)) / SOUND_RATE
            at = np.arange(frames) / fps
            pitch = rng.uniform(110, 220) * 2 ** (0.3 * np.interp(t, at, heard[0]))
            tone = np.sin(2 * np.pi * np.cumsum(pitch) / SOUND_RATE)
            loud = 0.03 * np.exp(0.7 * np.interp(t, at, heard[1]).clip(-3, 3))
            sound = loud * (tone + 0.5 * tone**3) + 0.003 * rng.normal(size=t.size)
            wavfile.write(audio / f"{sound_name(video)}.wav", SOUND_RATE, (sound.clip(-1, 1) * 32767).astype(np.int16))


# Face crops from videos. A face is four numbers: x and y of its centre, the side of the square that
# is cut, and by how many degrees the square is turned; NaN without a face. Frames shrink to FRAME:
# fine enough for crops of CROP, coarse enough for a quick detector.
CROP, FRAME, MARGIN = 112, 640, 1.2  # pixels; pixels of the longer side; of the detector's box


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
    largest = max(() if faces is None else faces, key=lambda face: face[2], default=[np.nan] * 8)
    x, y, w, h, x1, y1, x2, y2 = [*largest, 0, 0, 1, 0][:8]  # Haar gives no eyes: level ones
    return [x + w / 2, y + h / 2, MARGIN * max(w, h), math.degrees(math.atan2(y2 - y1, x2 - x1))]


def smooth_faces(faces):
    """{i: face} of those in faces (T, 4), steadied so that the crop does not tremble.

    A gap of one is filled from both sides, then each number is its median over half a second.
    """
    faces[1:-1] = np.where(np.isnan(faces[1:-1]), (faces[:-2] + faces[2:]) / 2, faces[1:-1])
    seen = np.flatnonzero(faces[:, 2] > 0)
    return {i: np.nanmedian(faces[max(i - 6, 0):i + 7], axis=0) for i in seen}


def video_frames(path):
    """Yields the frame nearest to each (i - 1) / 25 s, i from 1 on, whatever the video's own rate.

    Frames stand at their time stamps, or at the nominal rate where stamps stand still or leap.
    """
    import cv2
    video = cv2.VideoCapture(str(path))
    step = 1 / (video.get(cv2.CAP_PROP_FPS) or BioVid.VIDEO_FPS)
    count, shown, time, more, frame = 0, 0, 0, *video.read()
    while more:
        scale = min(1, FRAME / max(frame.shape))
        frame = cv2.resize(frame, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        more, following = video.read()
        stamp = video.get(cv2.CAP_PROP_POS_MSEC) / 1000
        later = stamp if more and 0 < stamp - time < 10 else time + step

        # From half-way on the following frame is nearer; the last one has half a step.
        while shown < BioVid.VIDEO_FPS * (time + later) / 2:
            yield frame
            shown += 1
        frame, time, count = following, later, count + 1

    promised = video.get(cv2.CAP_PROP_FRAME_COUNT)  # sometimes an estimate
    if count < max(1, 0.95 * promised):
        raise UserError(f"{path}: no video, or damaged: only {count} of {promised:.0f} frames "
                        "can be read; copy it again, or repair it with ffmpeg")


def crop_video(job):
    """Write one video's crops -> its frames, how many of them lack a face, and what is wrong or "".

    Two passes: a median looks ahead, and the frames of a long video do not fit in memory.
    """
    video, target, detector = job
    detect, part = face_detector(detector), target.with_name(f".{target.name}.part")
    import cv2
    try:
        faces = np.array([largest_face(detect(frame)) for frame in video_frames(video)])
        smooth = smooth_faces(faces)
        if not smooth:
            raise UserError(f"{video}: no face in it; look at it, or try another --detector")

        # Under a hidden name until it is complete: what a killed run leaves is no sample.
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        for i, frame in enumerate(video_frames(video)):
            if i in smooth:
                x, y, side, angle = smooth[i]
                turn = cv2.getRotationMatrix2D((x, y), angle, CROP / side)
                turn[:, 2] += CROP / 2 - x, CROP / 2 - y
                crop = cv2.warpAffine(frame, turn, (CROP, CROP))
                jpeg = cv2.imencode(".jpg", crop, (cv2.IMWRITE_JPEG_QUALITY, 95))[1]
                (part / f"img_{i + 1:05d}.jpg").write_bytes(jpeg)
        part.rename(target)
    except UserError as error:
        return 0, 0, str(error)
    except OSError as error:  # a full disk, say: other videos would fare no better
        raise UserError(f"{part}: {error.strerror}; then give the same command again") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return len(faces), len(faces) - len(smooth), ""


def crop_videos(videos, root, detector, workers):
    """Write root/faces/<subject>/<sample>/img_00001.jpg ... where it is not there yet.

    If root holds BioVid's signals or one name is BioVid's, all must be; others keep their folders.
    """
    face_detector(detector)  # what is wrong with it is said once, here
    (root / "faces").mkdir(parents=True, exist_ok=True)
    paths = [path for path in sorted([videos, *videos.rglob("[!.]*")])
             if path.suffix.lower() in (".mp4", ".avi", ".mov") and path.is_file()]
    if not paths:
        raise UserError(f"{videos}: no mp4, avi or mov; expected one or a folder of them")
    strays = [path for path in paths
              if not re.fullmatch(r"\d{6}_[mw]_\d\d-(BL1|PA[1-4])-\d{3}", path.stem)]
    signals = find_folder(root, "biosignals_filtered", "biosignals_raw")
    if strays and (signals or len(strays) < len(paths)):
        raise UserError(f"{strays[0]}: expected a name like 071309_w_21-BL1-081; move or rename it")

    jobs = []
    for path in paths:
        folder = path.relative_to(videos).parent if strays else path.stem.split("-")[0]
        jobs.append((path, root / "faces" / folder / path.stem, detector))
    todo = [job for job in jobs if not job[1].is_dir()]
    workers = max(0, min(workers, len(todo)))
    loader = DataLoader(todo, None, num_workers=workers, collate_fn=crop_video)
    results = tqdm(loader, unit="video", disable=None)

    frames, missing, faults = zip((0, 0, ""), *results, strict=True)
    faults = [fault for fault in faults if fault]
    done = [job[1] for job in jobs if job[1].is_dir()]
    fewest = sorted(f"{len(os.listdir(folder)):6} {folder.name}" for folder in done)[:10]
    print("fewest faces:", *fewest, *faults, sep="\n")
    print(f"{len(jobs)} videos, {len(jobs) - len(todo)} there already, {len(faults)} failed; "
          f"{sum(frames)} frames, {sum(missing)} without a face")
    sys.exit(bool(faults))


def parse(argv=None):
    parser = Parser(__doc__)
    job = parser.add_mutually_exclusive_group(required=True)
    job.add_argument("--check", choices=DATASETS, help="count what is at --root and list every fault")
    job.add_argument("--synthetic", choices=DATASETS[:3], help="write a stand-in of this data set to --root")
    job.add_argument("--crop", type=Path, metavar="VIDEOS",
                     help="cut the faces out of a video or a folder of videos, into --root/faces")
    parser.add_argument("--detector", default="haar", metavar="FILE",
                        help="for --crop: the file of YuNet, else OpenCV 4's Haar cascade")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="for --crop: processes")
    parser.add_argument("--root", help="default: data/<data set>, with -synthetic behind it for a stand-in")
    return parser.parse_args(argv)


def main():
    args = parse()
    if args.synthetic:
        return write_stand_in(args.synthetic, args.root or f"data/{args.synthetic}-synthetic")
    if args.crop:
        if not args.root:
            raise UserError("--crop needs --root, the folder to write faces/ into")
        return crop_videos(args.crop, Path(args.root), args.detector, args.workers)
    source = _open(args.check, args.root or f"data/{args.check}", classes=5)
    faults = list(source.faults)
    if hasattr(source, "label"):
        print(source.describe())
        faults += source.check()
    faults = list(dict.fromkeys(faults))  # a file of many clips is one fault
    print("\n".join([*faults, f"{len(faults)} faults"]))
    if faults:
        sys.exit(2)


def run(main):
    """Call main; what the user can mend ends in one line on stderr and exit code 2, Ctrl-C in one and 130."""
    try:
        main()
    except UserError as error:  # a DataLoader worker hands it on behind its traceback, which is not for the user
        print(f"error: {str(error).rpartition('UserError: ')[2].strip()}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.filename is None:
            raise
        print(f"error: {error.filename}: {error.strerror}; give another path", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; training goes on with --resume, all else with the same command", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    run(main)
