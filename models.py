"""The networks: backbones, T-Net, the three fusion heads of Fig. 4, and the student made of them.

Letters: B batch, L clips per sample, F frames per clip, D = 512 feature width, m width of the
representation z. A backbone folds the clips into the batch and returns (B, L, D); a fusion head
takes two of those and returns Fused(output, z). In eval() no sample's output depends on the other
samples of its batch. To add a visual backbone or a head: write its class and name it in VISUAL or
HEADS; a head takes (outputs, length=, per_clip=), length being the clips of a sample.
"""
import re
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.models import resnet18
from torchvision.models.video import r3d_18

D = 512


class Backbone(nn.Module):
    """Standardises its input, folds (B, L) into one batch axis, applies the network `features` and
    unfolds: (B, L, ...) -> (B, L, D).

    mean and std broadcast against one clip (channels first). They are fitted to the training part
    for spectrograms and feature vectors, and fixed for video, which is uint8 or float in [0, 1].
    """

    def __init__(self, mean=0.0, std=1.0, fitted=True):
        super().__init__()
        self.fitted = fitted
        self.register_buffer("mean", torch.as_tensor(mean), persistent=fitted)
        self.register_buffer("std", torch.as_tensor(std), persistent=fitted)

    def standardise(self, batches):
        """Fit mean and std to all clips of the batches (B, L, ...): one value of each for
        spectrograms, one a feature for vectors. A constant is only centred."""
        count = sums = 0
        for clips in batches:
            x = clips.cpu().double()  # not every device has doubles
            powers = [power.sum_to_size(self.mean.shape) for power in (x, x.square())]
            sums += torch.stack(powers)
            count += x.numel() / self.mean.numel()
        mean, square = sums / count
        variance = square - mean**2
        self.mean.copy_(mean)
        # what is left of a constant is rounding, not variance
        self.std.copy_(variance.where(variance > 1e-12 * square, 1).sqrt())

    def forward(self, x):
        clips = x.flatten(0, 1)  # (B * L, ...)
        if clips.dtype == torch.uint8:
            clips = clips / 255
        if clips.dim() == 5 and torch.is_autocast_enabled(clips.device.type):
            # twice as fast, in bfloat16 alone
            clips = clips.contiguous(memory_format=torch.channels_last_3d)
        return self.features((clips - self.mean) / self.std).unflatten(0, x.shape[:2])  # (B, L, D)


class R3D18(Backbone):
    """torchvision's R3D-18 without its classifier, section IV-B1; video (B, L, 3, F, H, W) ->
    (B, L, 512)."""

    def __init__(self):
        kinetics = torch.tensor([[0.43216, 0.394666, 0.37645], [0.22803, 0.22145, 0.216989]])
        super().__init__(*kinetics.view(2, 3, 1, 1, 1), fitted=False)
        self.features = r3d_18()  # (N, 3, F, H, W) -> (N, 512)
        self.features.fc = nn.Identity()


class Unit3D(nn.Module):
    """Convolution, batch norm, ReLU, with the padding that I3D's public weights were trained with:
    TensorFlow's "same"."""

    def __init__(self, in_channels, out_channels, kernel=1, stride=1):
        super().__init__()
        self.conv3d = nn.Conv3d(in_channels, out_channels, kernel, stride, bias=False)
        self.bn = nn.BatchNorm3d(out_channels, eps=1e-3)

    def forward(self, x):
        x = pad_same(x, self.conv3d)
        return F.relu(self.bn(self.conv3d(x)))


def pad_same(x, layer):
    """Zero-pad x (N, C, F, H, W) so that a convolution or pool gives ceil(size / stride) outputs;
    an odd rest goes at the end."""
    pads = []
    for size, k, s in zip(x.shape[2:], layer.kernel_size, layer.stride, strict=True):
        total = k - (size % s or s)  # no window here is shorter than its stride
        pads = [total // 2, total - total // 2, *pads]  # F.pad wants the last axis first
    return F.pad(x, pads)


class MaxPool3dSame(nn.MaxPool3d):
    """Its window and its stride, three numbers each."""

    def __init__(self, *sizes):
        super().__init__(sizes[:3], sizes[3:])

    def forward(self, x):
        return super().forward(pad_same(x, self))


class Inception(nn.Module):
    """Four branches, concatenated: 1x1x1, two of 1x1x1 then 3x3x3, and a pool then 1x1x1."""

    def __init__(self, channels, b0, b1a, b1b, b2a, b2b, b3b):
        super().__init__()
        self.b0 = Unit3D(channels, b0)
        self.b1a, self.b1b = Unit3D(channels, b1a), Unit3D(b1a, b1b, 3)
        self.b2a, self.b2b = Unit3D(channels, b2a), Unit3D(b2a, b2b, 3)
        self.b3a, self.b3b = nn.MaxPool3d(3, 1, 1), Unit3D(channels, b3b)

    def forward(self, x):
        branches = self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(self.b3a(x))
        return torch.cat(branches, 1)


I3D_LAYERS = """\
    Conv3d_1a_7x7       3   64   7    2
    MaxPool3d_2a_3x3    1    3   3    1    2    2
    Conv3d_2b_1x1      64   64
    Conv3d_2c_3x3      64  192   3
    MaxPool3d_3a_3x3    1    3   3    1    2    2
    Mixed_3b          192   64  96  128   16   32   32
    Mixed_3c          256  128 128  192   32   96   64
    MaxPool3d_4a_3x3    3    3   3    2    2    2
    Mixed_4b          480  192  96  208   16   48   64
    Mixed_4c          512  160 112  224   24   64   64
    Mixed_4d          512  128 128  256   24   64   64
    Mixed_4e          512  112 144  288   32   64   64
    Mixed_4f          528  256 160  320   32  128  128
    MaxPool3d_5a_2x2    2    2   2    2    2    2
    Mixed_5b          832  256 160  320   32  128  128
    Mixed_5c          832  384 192  384   48  128  128"""  # and the arguments of each
I3D_KINDS = {"Conv3d": Unit3D, "MaxPool3d": MaxPool3dSame, "Mixed": Inception}


class I3D(Backbone):
    """Inception-v1 inflated to 3D (Carreira and Zisserman 2017) and Linear(1024, 512); Table III.

    Video (B, L, 3, F, H, W), H and W from 32 -> (B, L, 512). Frames are brought to [-1, 1].
    The layers bear the names of the public Inception-I3D checkpoint, so that its Kinetics weights
    load (`load_weights`).
    """

    def __init__(self):
        super().__init__(0.5, 0.5, fitted=False)
        self.features = nn.Sequential()
        for line in I3D_LAYERS.splitlines():
            name, *numbers = line.split()
            kind, _, _ = name.partition("_")
            self.features.add_module(name, I3D_KINDS[kind](*map(int, numbers)))
        self.features.pool = nn.AdaptiveAvgPool3d(1)
        self.features.flatten = nn.Flatten()  # (N, 1024)
        self.features.projection = nn.Linear(1024, D)


def load_weights(backbone, state):
    """Load a public checkpoint into a visual backbone; returns (keys left out, parameters kept).

    state: a state dict, or a dict that holds one under any name; its keys may begin with module.,
    model., backbone., features. or encoder. What the backbone has no place for, as a classifier, is
    left out; only I3D's own projection may be missing. Raises ValueError if a tensor is missing or
    does not fit; the backbone is then loaded in part.
    """
    # Beside settings and an optimizer's state, the state dict is the dict with the most entries
    found = [state, *state.values()] if isinstance(state, dict) else []
    state = max((d for d in found if isinstance(d, dict)), key=len, default={})
    state = {re.sub(r"^((module|model|backbone|features|encoder)\.)+", "", str(key)): value
             for key, value in state.items() if torch.is_tensor(value)}
    kind = type(backbone).__name__
    for key, value in state.items():
        if value.layout != torch.strided or not value.isfinite().all():
            raise ValueError(f"{key} is sparse, or holds NaN or infinity")

    try:
        missing, left_out = backbone.features.load_state_dict(state, strict=False)
    except RuntimeError as error:  # a title, then a line for each misfit
        raise ValueError(f"does not fit {kind}: {str(error).splitlines()[1].strip()}") from None

    unexplained = [key for key in missing if not key.startswith("projection.")]
    if unexplained:
        raise ValueError(f"lacks {len(unexplained)} of {kind}'s tensors, {unexplained[0]} for one; "
                         f"it holds {', '.join([*state][:4]) or 'no tensor'} ...; what fits is "
                         "saved by torch.save(model.state_dict(), FILE)")
    return sorted(left_out), sorted(missing)


class SpectrogramResNet18(Backbone):
    """ResNet-18 from scratch, section IV-B; spectrograms (B, L, 1, H, W) -> (B, L, 512)."""

    def __init__(self):
        super().__init__()
        self.features = resnet18()  # (N, 1, H, W) -> (N, 512)
        self.features.conv1 = nn.Conv2d(1, 64, 7, 2, 3, bias=False)
        self.features.fc = nn.Identity()


class FeatureMLP(Backbone):
    """Two layers for feature vectors of a user's own: (B, L, in_dim) -> (B, L, 512). [ours]"""

    def __init__(self, in_dim):
        super().__init__(torch.zeros(in_dim), torch.ones(in_dim))
        self.features = nn.Sequential(nn.Linear(in_dim, D), nn.ReLU(), nn.Linear(D, D))


VISUAL = {"r3d18": R3D18, "i3d": I3D}  # by the name that --visual-backbone has for it


class Unimodal(nn.Module):
    """Stage 1's model: a backbone and its own linear head -> (B, outputs), or (B, L, outputs) if
    per_clip."""

    def __init__(self, backbone, outputs, per_clip):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(D, outputs)
        self.per_clip = per_clip

    def forward(self, x):
        return self.classify(self.backbone(x))

    def classify(self, features):  # (B, L, 512) -> (B, classes) or (B, L, 2)
        return self.head(features if self.per_clip else features.mean(1))


class TNet(nn.Sequential):
    """Encoder and decoder that hallucinate privileged features from visual ones, (B, L, 512) each.

    The output is linear, since features are not confined to [0, 1]. [ours]
    """

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(D, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU())
        self.decoder = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, D))


class Fused(NamedTuple):
    """What a fusion head answers: output (B, classes) or (B, L, 2), representation z (B, m)."""

    output: torch.Tensor
    z: torch.Tensor


def pooled(h, layer, per_clip):
    """Fused from h (B, L, m): z is its mean over L, and the output is of each clip or of z."""
    z = h.mean(1)
    return Fused(layer(h if per_clip else z), z)


class ConcatFusion(nn.Module):
    """Fig. 4a: concatenation, one hidden layer, classifier. z is the hidden layer, m = 512.

    visual, privileged (B, L, 512) -> Fused: output (B, outputs), or (B, L, outputs) if per_clip.
    """

    def __init__(self, outputs, per_clip=False, length=None):
        super().__init__()
        self.per_clip = per_clip
        self.hidden = nn.Linear(2 * D, D)
        self.classifier = nn.Linear(D, outputs)

    def forward(self, visual, privileged):
        h = F.relu(self.hidden(torch.cat([visual, privileged], -1)))  # (B, L, 512)
        return pooled(h, self.classifier, self.per_clip)


class JointCrossAttention(nn.Module):
    """Fig. 4b: joint cross-attention (Praveen et al. 2022, [4]); z is the attended concatenation,
    m = 1024.

    visual, privileged (B, L, 512) with L = length -> Fused: output (B, L, outputs), or (B, outputs)
    unless per_clip. X (L, d_m) is a modality and J = [X_a, X_v] (L, d) the two side by side; no
    biases. A weight's last letter is its modality: a for the privileged one (audio), v for visual.
    """

    def __init__(self, outputs, length, per_clip=True, k=32):
        super().__init__()
        self.per_clip = per_clip

        def weights():
            shapes = (length, length), (k, length), (k, 2 * D), (length, k)
            return (nn.Parameter(nn.init.xavier_uniform_(torch.empty(shape))) for shape in shapes)

        self.W_ja, self.Wa, self.W_ca, self.W_ha = weights()
        self.W_jv, self.Wv, self.W_cv, self.W_hv = weights()
        self.regressor = nn.Sequential(
            nn.Linear(2 * D, 128), nn.Dropout(0.6), nn.Linear(128, outputs))

    def forward(self, visual, privileged):
        X_a, X_v = privileged, visual  # (B, L, d_m)
        J = torch.cat([X_a, X_v], -1)  # (B, L, d)
        d = J.shape[-1]

        # C = tanh(X^T W_j J / sqrt(d)), the one large array: scaled while small
        C_a = (X_a.mT @ (self.W_ja @ J / d**0.5)).tanh_()  # (B, d_m, d)
        C_v = (X_v.mT @ (self.W_jv @ J / d**0.5)).tanh_()

        # H = ReLU(W X + W_c C^T)
        H_a = F.relu(self.Wa @ X_a + (C_a @ self.W_ca.mT).mT)  # (B, k, d_m)
        H_v = F.relu(self.Wv @ X_v + (C_v @ self.W_cv.mT).mT)

        # X_att = W_h H + X
        att_a = self.W_ha @ H_a + X_a  # (B, L, d_m)
        att_v = self.W_hv @ H_v + X_v

        x = torch.cat([att_v, att_a], -1)  # (B, L, 1024)
        return pooled(x, self.regressor, self.per_clip)


class MultimodalTransformer(nn.Module):
    """Fig. 4c: an encoder per modality, cross-attention both ways, a learned gate (Waligora et al.
    2024, [42]); m = 512.

    visual, privileged (B, L, 512) -> Fused: output (B, outputs), or (B, L, outputs) if per_clip.
    Attention runs over the L clips of one sample. With L = 1, the paper's setting, it has a single
    key: its weight is 1 and each attention is its value path, so that att_v sees only the visual
    and att_p only the privileged features; use more clips for a sequence to attend over.
    """

    def __init__(self, outputs, per_clip=False, length=None):
        super().__init__()
        self.per_clip = per_clip
        self.encode_v, self.encode_p = (
            nn.TransformerEncoderLayer(D, 2, dim_feedforward=D, dropout=0.0, batch_first=True)
            for _ in "vp")
        self.attend_v, self.attend_p = (nn.MultiheadAttention(D, 2, batch_first=True) for _ in "vp")
        self.gate = nn.Linear(2 * D, 1)
        self.classifier = nn.Linear(D, outputs)

    def forward(self, visual, privileged):
        v, p = self.encode_v(visual), self.encode_p(privileged)  # (B, L, 512)
        att_v, _ = self.attend_v(p, v, v, need_weights=False)  # query, key, value
        att_p, _ = self.attend_p(v, p, p, need_weights=False)
        g = torch.sigmoid(self.gate(torch.cat([att_v, att_p], -1)))  # (B, L, 1)
        h = g * att_v + (1 - g) * att_p  # (B, L, 512)
        return pooled(h, self.classifier, self.per_clip)


# by the name that --fusion has for it
HEADS = {"concat": ConcatFusion, "jca": JointCrossAttention, "mmt": MultimodalTransformer}


class Student(nn.Module):
    """Visual backbone, T-Net, fusion head (Fig. 3, bottom): video (B, L, 3, F, H, W) -> Fused.

    chunk: how many clips pass the backbone at a time. Their activations are not kept but computed
    again going backward (gradient caching), so that a batch of any size fits. Exact, since batch
    norm is in eval mode when a student trains.
    """

    def __init__(self, backbone, tnet, head, chunk=None):
        super().__init__()
        self.backbone, self.tnet, self.head = backbone, tnet, head
        self.chunk = chunk

    def forward(self, video, privileged=None):
        if self.chunk:
            clips = video.flatten(0, 1).unsqueeze(1)  # (B * L, 1, 3, F, H, W)
            features = torch.cat([checkpoint(self.backbone, some, use_reentrant=False)
                                  for some in clips.split(self.chunk)])
            features = features.view(*video.shape[:2], D)
        else:
            features = self.backbone(video)
        return self.fuse(features, privileged)

    def fuse(self, visual, privileged=None):
        """From visual features (B, L, 512); --finetune moves them under the T-Net, which stays.
        privileged (B, L, 512), if given, takes the place of what the T-Net hallucinates."""
        return self.head(visual, self.tnet(visual) if privileged is None else privileged)
