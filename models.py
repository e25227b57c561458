"""The networks: backbones, T-Net, the three fusion heads of Fig. 4, and the student made of them.

Letters: B batch, L clips per sample, F frames per clip, D = 512 feature width, m width of the representation z.
A backbone folds the clips into the batch and returns (B, L, D); a fusion head takes two of those and returns
(output, z). In eval() no sample's output depends on the other samples of its batch.
"""
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import resnet18
from torchvision.models.video import r3d_18

D = 512


class Backbone(nn.Module):
    """Standardises its input, folds (B, L) into one batch axis, applies `features`, unfolds: (B, L, ...) -> (B, L, D).

    mean and std broadcast against one clip (channels first). They are fitted to the training part for spectrograms and
    feature vectors, and fixed for video, which is uint8 or float in [0, 1].
    """

    def __init__(self, mean=0.0, std=1.0, fitted=True):
        super().__init__()
        self.register_buffer("mean", torch.as_tensor(mean), persistent=fitted)
        self.register_buffer("std", torch.as_tensor(std), persistent=fitted)

    def standardise(self, mean, std):
        """Set the training part's statistics; a constant input (std 0) is only centred."""
        self.mean.copy_(mean)
        self.std.copy_(std.where(std > 0, 1))

    def forward(self, x):
        clips = x.flatten(0, 1)  # (B * L, ...)
        if clips.dtype == torch.uint8:
            clips = clips / 255
        if clips.dim() == 5 and torch.is_autocast_enabled(clips.device.type):
            clips = clips.contiguous(memory_format=torch.channels_last_3d)  # twice as fast in bfloat16 alone
        return self.features((clips - self.mean) / self.std).unflatten(0, x.shape[:2])  # (B, L, D)


class R3D18(Backbone):
    """torchvision's R3D-18 without its classifier; video (B, L, 3, F, H, W) -> (B, L, 512). Section IV-B1."""

    def __init__(self):
        kinetics = (0.43216, 0.394666, 0.37645), (0.22803, 0.22145, 0.216989)
        super().__init__(*(torch.tensor(s).view(3, 1, 1, 1) for s in kinetics), fitted=False)
        body = r3d_18()
        self.stem, self.layer1, self.layer2 = body.stem, body.layer1, body.layer2
        self.layer3, self.layer4 = body.layer3, body.layer4

    def features(self, video):  # (N, 3, F, H, W) -> (N, 512)
        return self.layer4(self.layer3(self.layer2(self.layer1(self.stem(video))))).mean((2, 3, 4))


class Unit3D(nn.Module):
    """Convolution, batch norm, ReLU, with TensorFlow's "same" padding, which I3D's public weights were trained with."""

    def __init__(self, in_channels, out_channels, kernel=1, stride=1):
        super().__init__()
        self.conv3d = nn.Conv3d(in_channels, out_channels, kernel, stride, bias=False)
        self.bn = nn.BatchNorm3d(out_channels, eps=1e-3)

    def forward(self, x):
        return F.relu(self.bn(self.conv3d(pad_same(x, self.conv3d.kernel_size, self.conv3d.stride))))


def pad_same(x, kernel, stride):
    """Zero-pad x (N, C, F, H, W) so that a window gives ceil(size / stride) outputs; an odd rest goes at the end."""
    pads = []
    for size, k, s in zip(reversed(x.shape[2:]), reversed(kernel), reversed(stride), strict=True):
        total = max(k - (size % s or s), 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads)


class MaxPool3dSame(nn.MaxPool3d):
    def forward(self, x):
        return super().forward(pad_same(x, self.kernel_size, self.stride))


class Inception(nn.Module):
    """Four branches, concatenated: 1x1x1, two of 1x1x1 then 3x3x3, and a pool then 1x1x1."""

    def __init__(self, channels, b0, b1a, b1b, b2a, b2b, b3b):
        super().__init__()
        self.b0 = Unit3D(channels, b0)
        self.b1a, self.b1b = Unit3D(channels, b1a), Unit3D(b1a, b1b, 3)
        self.b2a, self.b2b = Unit3D(channels, b2a), Unit3D(b2a, b2b, 3)
        self.b3a, self.b3b = MaxPool3dSame((3, 3, 3), (1, 1, 1)), Unit3D(channels, b3b)

    def forward(self, x):
        return torch.cat([self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(self.b3a(x))], 1)


class I3D(Backbone):
    """Inception-v1 inflated to 3D (Carreira and Zisserman 2017) and Linear(1024, 512); Table III's backbone.

    Video (B, L, 3, F, H, W), H and W from 32 -> (B, L, 512). Frames are brought to [-1, 1]. Parameters bear the names
    of the public Inception-I3D checkpoint, so that its Kinetics weights load (`load_weights`).
    """

    def __init__(self):
        super().__init__(0.5, 0.5, fitted=False)
        self.Conv3d_1a_7x7 = Unit3D(3, 64, 7, 2)
        self.MaxPool3d_2a_3x3 = MaxPool3dSame((1, 3, 3), (1, 2, 2))
        self.Conv3d_2b_1x1 = Unit3D(64, 64)
        self.Conv3d_2c_3x3 = Unit3D(64, 192, 3)
        self.MaxPool3d_3a_3x3 = MaxPool3dSame((1, 3, 3), (1, 2, 2))
        self.Mixed_3b = Inception(192, 64, 96, 128, 16, 32, 32)
        self.Mixed_3c = Inception(256, 128, 128, 192, 32, 96, 64)
        self.MaxPool3d_4a_3x3 = MaxPool3dSame((3, 3, 3), (2, 2, 2))
        self.Mixed_4b = Inception(480, 192, 96, 208, 16, 48, 64)
        self.Mixed_4c = Inception(512, 160, 112, 224, 24, 64, 64)
        self.Mixed_4d = Inception(512, 128, 128, 256, 24, 64, 64)
        self.Mixed_4e = Inception(512, 112, 144, 288, 32, 64, 64)
        self.Mixed_4f = Inception(528, 256, 160, 320, 32, 128, 128)
        self.MaxPool3d_5a_2x2 = MaxPool3dSame((2, 2, 2), (2, 2, 2))
        self.Mixed_5b = Inception(832, 256, 160, 320, 32, 128, 128)
        self.Mixed_5c = Inception(832, 384, 192, 384, 48, 128, 128)
        self.projection = nn.Linear(1024, D)

    def features(self, video):  # (N, 3, F, H, W) -> (N, 512)
        for name, layer in self.named_children():
            if name != "projection":
                video = layer(video)
        return self.projection(video.mean((2, 3, 4)))


def load_weights(backbone, state):
    """Load a public checkpoint's state dict into a visual backbone; returns (keys left out, parameters not in it).

    Raises ValueError when nothing fits or a shape disagrees. Classifier weights are what is usually left out.
    """
    own = backbone.state_dict()
    fits = {key: value for key, value in state.items() if key in own and torch.is_tensor(value)}
    if not fits:
        raise ValueError(f"holds no parameter of {type(backbone).__name__} (first key: {next(iter(state), 'none')!r})")
    for key, value in fits.items():
        if value.shape != own[key].shape:
            raise ValueError(f"{key} is {tuple(value.shape)}, {type(backbone).__name__} needs {tuple(own[key].shape)}")
    backbone.load_state_dict(fits, strict=False)
    return sorted(state.keys() - own.keys()), sorted(own.keys() - state.keys())


class SpectrogramResNet18(Backbone):
    """ResNet-18 from scratch on one-channel spectrograms (B, L, 1, H, W) -> (B, L, 512). Section IV-B."""

    def __init__(self):
        super().__init__()
        self.body = resnet18()
        self.body.conv1 = nn.Conv2d(1, 64, 7, 2, 3, bias=False)
        self.body.fc = nn.Identity()

    def features(self, spectrogram):  # (N, 1, H, W) -> (N, 512)
        return self.body(spectrogram)


class FeatureMLP(Backbone):
    """Two layers for feature vectors of a user's own: (B, L, in_dim) -> (B, L, 512). [ours]"""

    def __init__(self, in_dim):
        super().__init__(torch.zeros(in_dim), torch.ones(in_dim))
        self.features = nn.Sequential(nn.Linear(in_dim, D), nn.ReLU(), nn.Linear(D, D))


class TNet(nn.Module):
    """Encoder-decoder that hallucinates privileged features from visual ones: (B, L, 512) -> (B, L, 512).

    The output is linear, since features are not confined to [0, 1]. [ours]
    """

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(D, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU())
        self.decoder = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, D))

    def forward(self, visual):
        return self.decoder(self.encoder(visual))


class ConcatFusion(nn.Module):
    """Fig. 4a: concatenation, one hidden layer, classifier. z is the hidden layer, m = 512.

    visual, privileged (B, L, 512) -> output (B, outputs), or (B, L, outputs) if per_clip, and z (B, 512).
    """

    def __init__(self, outputs, per_clip=False):
        super().__init__()
        self.per_clip = per_clip
        self.hidden = nn.Linear(2 * D, D)
        self.classifier = nn.Linear(D, outputs)

    def forward(self, visual, privileged):
        h = F.relu(self.hidden(torch.cat([visual, privileged], -1)))  # (B, L, 512)
        z = h.mean(1)  # (B, 512)
        return self.classifier(h if self.per_clip else z), z


class JointCrossAttention(nn.Module):
    """Fig. 4b: joint cross-attention (Praveen et al. 2022, [4]); z is the attended concatenation, m = 1024.

    visual, privileged (B, L, 512) with L = length -> output (B, L, outputs), or (B, outputs) unless per_clip, and
    z (B, 1024). With X (L, d_m) a modality and J = [X_a, X_v] (L, d), no biases:

        C = tanh(X^T W_j J / sqrt(d))      H = ReLU(W X + W_c C^T)      X_att = W_h H + X
    """

    def __init__(self, outputs, length, per_clip=True, k=32):
        super().__init__()
        self.per_clip = per_clip
        shapes = {"W_j": (length, length), "W": (k, length), "W_c": (k, 2 * D), "W_h": (length, k)}
        for modality in "av":
            for name, shape in shapes.items():
                weight = nn.init.xavier_uniform_(torch.empty(shape))
                self.register_parameter(f"{name}{modality}", nn.Parameter(weight))
        self.regressor = nn.Sequential(nn.Linear(2 * D, 128), nn.Dropout(0.6), nn.Linear(128, outputs))

    def attend(self, X, J, W_j, W, W_c, W_h):  # X (B, L, d_m), J (B, L, d) -> (B, L, d_m)
        C = (X.mT @ (W_j @ J / J.shape[-1] ** 0.5)).tanh_()  # (B, d_m, d), the one large array: scaled while small
        H = F.relu(W @ X + (C @ W_c.mT).mT)  # (B, k, d_m)
        return W_h @ H + X

    def forward(self, visual, privileged):
        J = torch.cat([privileged, visual], -1)  # (B, L, d)
        X_a = self.attend(privileged, J, self.W_ja, self.Wa, self.W_ca, self.W_ha)
        X_v = self.attend(visual, J, self.W_jv, self.Wv, self.W_cv, self.W_hv)
        x = torch.cat([X_v, X_a], -1)  # (B, L, 1024)
        z = x.mean(1)  # (B, 1024)
        return self.regressor(x if self.per_clip else z), z


class MultimodalTransformer(nn.Module):
    """Fig. 4c: an encoder per modality, cross-attention both ways, a learned gate (Waligora et al. 2024, [42]).

    visual, privileged (B, L, 512) -> output (B, outputs), or (B, L, outputs) if per_clip, and z (B, 512). Attention
    runs over the L clips of one sample. With L = 1, the paper's setting, it has a single key: its weight is 1 and each
    attention is its value path, so att_v sees only the visual and att_p only the privileged features; use more clips
    for a sequence to attend over.
    """

    def __init__(self, outputs, per_clip=False):
        super().__init__()
        self.per_clip = per_clip
        self.encode_v, self.encode_p = (
            nn.TransformerEncoderLayer(D, nhead=2, dim_feedforward=D, dropout=0.0, batch_first=True) for _ in "vp")
        self.attend_v, self.attend_p = (nn.MultiheadAttention(D, 2, batch_first=True) for _ in "vp")
        self.gate = nn.Linear(2 * D, 1)
        self.classifier = nn.Linear(D, outputs)

    def forward(self, visual, privileged):
        v, p = self.encode_v(visual), self.encode_p(privileged)  # (B, L, 512)
        att_v, _ = self.attend_v(query=p, key=v, value=v, need_weights=False)
        att_p, _ = self.attend_p(query=v, key=p, value=p, need_weights=False)
        g = torch.sigmoid(self.gate(torch.cat([att_v, att_p], -1)))  # (B, L, 1)
        h = g * att_v + (1 - g) * att_p  # (B, L, 512)
        z = h.mean(1)  # (B, 512)
        return self.classifier(h if self.per_clip else z), z


class Student(nn.Module):
    """Visual backbone, T-Net, fusion head: video (B, L, 3, F, H, W) alone -> (output, z). Fig. 3, bottom."""

    def __init__(self, backbone, tnet, head):
        super().__init__()
        self.backbone, self.tnet, self.head = backbone, tnet, head

    def forward(self, video):
        return self.fuse(self.backbone(video))

    def fuse(self, visual):
        """From cached visual features (B, L, 512): the T-Net's hallucination stands in for the privileged ones."""
        return self.head(visual, self.tnet(visual))


# What follows makes the networks of a run from its settings, a dict of plain values saved with every checkpoint.

def visual_backbone(settings):
    if settings["dataset"] == "features":
        return FeatureMLP(settings["visual_dim"])
    return I3D() if settings["visual_backbone"] == "i3d" else R3D18()


def privileged_backbone(settings):
    return FeatureMLP(settings["privileged_dim"]) if settings["dataset"] == "features" else SpectrogramResNet18()


def fusion_head(settings):
    outputs, per_clip = settings["outputs"], settings["task"] == "regression"
    if settings["fusion"] == "jca":
        return JointCrossAttention(outputs, settings["length"], per_clip)
    return {"concat": ConcatFusion, "mmt": MultimodalTransformer}[settings["fusion"]](outputs, per_clip)


def student(settings):
    return Student(visual_backbone(settings), TNet(), fusion_head(settings))
