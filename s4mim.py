"""S4MIM, semi-supervised segmentation with masked image modeling.

A few labelled pictures x_l and many without labels. The encoder E has a semantic decoder SeD, for
classes, and in training a pixel decoder PiD, for pixels. Each step has two phases.

I.  FixMatch with UniPerb: what E and SeD say of a weak view x_w of an unlabelled picture, where
    they are confident, is the pseudo-label of its strong view x_s and of its perturbed features.
        L_s = CE(p_l, y_l)                                                             Eq. 1
        L_u = lambda_u [conf >= psi] (CE(p_s, y_w) + CE(p_fp, y_w))                    Eq. 2
II. Patches of x_l, x_s and x_w are removed (* m), and all is to be as if they were there:
        L_mimpi   the pixels, each class painted by a head of its own                  Eq. 3-8
        L_mimfea  the features of removed pixels near the prototype of their class     Eq. 9-12
        L_mimse   the classes                                                          Eq. 13
    loss = (L_s + L_u + L_mimpi + L_mimfea + L_mimse) / (the sum of their weights)     Eq. 14

Li, Hao, Shang and Jiao, "Masked image modeling boosting semi-supervised semantic segmentation",
arXiv:2411.08756, 2024; equations, tables and figures are numbered as there.

    python s4mim.py                                         # embedded dataset, CPU, two minutes
    python s4mim.py --data voc --labeled labeled.txt        # the paper's recipe, UniMatch's list
    python s4mim.py --data voc --method fixmatch            # without Phase II; or suponly, or mim
    python s4mim.py --data voc --no-fea --no-se             # rows of Table IV
    python s4mim.py --data voc --stride 8                   # Table VIII, but for its stem
    python s4mim.py --data camvid --burn-in 500             # pseudo-labels after 500 steps
    python s4mim.py --data my/folder --labeled list.txt     # pictures without masks are used too
    python s4mim.py --eval out/s4mim-voc/best.pt
    python s4mim.py --predict PICTURES --ckpt out/s4mim-voc/best.pt --to DIR
    torchrun --nproc_per_node=4 s4mim.py --data cityscapes  # several GPUs

README.md has the departures from the paper, what it leaves open, and the results of reduced runs;
the paper's setting has not been run here.
"""
import json
import math
import os
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

import common
import data
from common import UserError


# ---------------------------------------------------------------------------------------- config

@dataclass
class Config:
    data: str = "materials"        # a dataset that data.py lists, or your own folder
    root: str = "data"             # where datasets live
    out: str = ""                  # run folder; empty: out/s4mim-DATA
    labeled: str = "1/1"           # labelled pictures: a number, a share of the masks, or a list
    split_seed: int = 0            # of the draw of these, so that runs of several --seed share it
    setup: Literal["ori", "aug"] = "ori"  # voc: labels from its own 1464, or from SBD's 10582
    method: Literal["s4mim", "mim", "fixmatch", "suponly"] = "s4mim"  # mim: plain MIM of Table V
    pi: bool = True                # L_mimpi; --no-pi, --no-fea and --no-se are Table IV
    fea: bool = True               # L_mimfea
    se: bool = True                # L_mimse
    dic: bool = True               # prototypes over all batches; off: of each batch (Table VI)
    conf: bool = True              # weigh features by confidence (Table VI)
    semantic: Literal["ce", "mse"] = "ce"  # L_mimse to pseudo-labels, or probabilities (Table VII)
    backbone: Literal["resnet18", "resnet50", "resnet101"] = "resnet101"  # encoder E
    stem: Literal["standard", "deep"] = "standard"  # one 7x7, or the paper's three 3x3
    stride: int = 16               # of E: 16, or 8 for Table VIII's "standard backbone"
    width: int = 64                # channels of E's first stage, and a quarter of the decoders'
    pretrained: str = "imagenet"   # weights of E: imagenet (downloads), a file, or none
    init: str = ""                 # start from the weights of this checkpoint
    recipe: Literal["auto", "small", "paper"] = "auto"  # auto: small for a folder, else paper
    epochs: int = 80               # passes over the unlabelled pictures; 0: 3000 steps
    batch_size: int = 16           # pictures a step, over all processes, half of them labelled
    lr: float = 1e-3               # of E at the start
    decoder_lr: float = 10.0       # SeD's rate is so many times E's
    pixel_lr: float = 10.0         # PiD's is constant, so many times E's at the start
    weight_decay: float = 1e-4     # of SGD, whose momentum is 0.9
    size: int = 321                # side of the crops; best a multiple of 4 plus 1: see resize()
    scale: float = 2.0             # pictures are scaled by 1 / scale to scale, then cropped
    zoom: float = 1.0              # pictures are shrunk by this first; 0: to 1.5 crops, if larger
    window: Literal["whole", "slide"] = "whole"  # predict pictures whole, or by windows of --size
    ohem: bool = False             # L_s from the hardest pixels only
    burn_in: int = 0               # steps at the start that are suponly's; the paper has none
    psi: float = 0.95              # least confidence of a pseudo-label in L_u
    lambda_u: float = 1 / 2        # weights of Eq. 14
    lambda_mp: float = 1 / 3
    lambda_mf: float = 0.05
    lambda_ms: float = 0.1 / 3
    patch: int = 0                 # side of a removed patch; 0: 6 pixels (Fig. 4), fewer below 321
    ratio: float = 0.4             # share of the patches that is removed (Fig. 4)
    alpha: float = 0.99            # moving average of the prototypes
    tau: float = 10.0              # temperature of Eq. 10
    baseline: Literal["none", "suponly"] = "none"  # train this first on the same labels, compare
    eval_every: int = 1            # epochs between evaluations
    seed: int = 0                  # of weights, masks and order
    workers: int = -1              # loader processes; -1: one a processor with CUDA, or else none
    threads: int = 0               # of torch on the CPU; 0: one for each processor that is idle
    in_memory: float = 2.0         # GB of decoded pixels up to which a split is read only once
    device: str = "auto"           # auto: the best there is; or cuda, cuda:1, mps, cpu
    amp: Literal["auto", "bf16", "fp16", "off"] = "auto"  # auto: bf16 with CUDA, off elsewhere
    compile: bool = False          # torch.compile E, SeD and PiD
    resume: bool = False           # go on from OUT/last.pt
    save_every: float = 5.0        # minutes between saves, at least; 0: after each evaluation
    max_steps: int = 0             # stop after so many steps, evaluate and save; 0: all epochs
    palette: str = ""              # colours of RGB masks: voc, cityscapes, binary or a file
    eval: tuple = ()               # evaluate these checkpoints and do nothing else
    bench: int = -1                # time N training steps on random tensors; 0: only count
    predict: tuple = ()            # images to segment: files, or folders and what is in them
    ckpt: str = ""                 # --predict: the checkpoint
    to: str = ""                   # --predict: new folder for the predictions


RECIPES = {                        # what differs from the defaults above, the paper's for voc
    # two minutes on a CPU core: a narrow network, from scratch, and pseudo-labels only from one
    # that knows something already. PiD's rate is low, for at E's its loss may run away, and
    # lambda_mp a tenth of the paper's: here L_mimpi is the loudest term (README.md, Results)
    "materials": dict(labeled="32", backbone="resnet18", width=16, pretrained="none", size=65,
                      scale=1.25, epochs=12, lr=0.05, decoder_lr=1.0, pixel_lr=0.1, burn_in=100,
                      lambda_mp=0.03, eval_every=2),
    "shapes": dict(labeled="32", backbone="resnet18", width=16, pretrained="none", size=65,
                   epochs=12, lr=0.05, decoder_lr=1.0, pixel_lr=1.0, baseline="suponly",
                   eval_every=2),
    "voc": dict(labeled="1/16"),   # 92
    "camvid": dict(labeled="1/8"), "nyuv2": {}, "glas": {}, "polyp": {},
    "cityscapes": dict(labeled="1/16", size=801, epochs=240, lr=0.005, decoder_lr=1.0,
                       pixel_lr=1.0, psi=0.0, ohem=True, window="slide"),
    # for a folder of your own, on a laptop: about a quarter of an hour
    "small": dict(backbone="resnet18", width=16, pretrained="none", size=97, zoom=0.0, scale=1.25,
                  epochs=0, lr=0.05, decoder_lr=1.0, pixel_lr=1.0),
}


# ----------------------------------------------------------------------------------------- model

DEPTHS = {"resnet18": (2, 2, 2, 2), "resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3)}


def conv(i, o, k=3, stride=1, dilation=1):
    return nn.Conv2d(i, o, k, stride, dilation * (k // 2), dilation, bias=False)


def conv_bn(i, o, k=3, stride=1, dilation=1):
    return conv(i, o, k, stride, dilation), nn.BatchNorm2d(o)


class Block(nn.Module):
    """A residual block, i -> o channels: with o = width two 3x3, in ResNet-18; with o = 4 width a
    1x1, a 3x3 and a 1x1, in ResNet-50 and -101."""

    def __init__(self, i, width, o, stride=1, dilation=1):
        super().__init__()
        self.bottleneck = o > width
        if self.bottleneck:
            self.conv1, self.bn1 = conv_bn(i, width, 1)
            self.conv2, self.bn2 = conv_bn(width, width, 3, stride, dilation)
            self.conv3, self.bn3 = conv_bn(width, o, 1)
        else:
            self.conv1, self.bn1 = conv_bn(i, width, 3, stride, dilation)
            self.conv2, self.bn2 = conv_bn(width, o, 3, 1, dilation)
        self.downsample = nn.Sequential(*conv_bn(i, o, 1, stride)) if stride > 1 or i != o else None

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.bottleneck:
            y = self.bn3(self.conv3(F.relu(y)))
        return F.relu(y + (self.downsample(x) if self.downsample else x))


class ResNet(nn.Module):
    """The encoder E: (B, 3, H, W) -> c1 (B, C1, H/4, W/4) and c4 (B, C4, H/16, W/16), rounded up;
    with a stride of 8, c4 is (B, C4, H/8, W/8).

    The last stage, of stride 8 the last two, doubles the dilation in place of a stride of 2, from
    its second block on. The names of the weights are torchvision's, those of the deep stem
    UniMatch's, so that they load.
    """

    def __init__(self, name="resnet101", stem="standard", width=64, stride=16):
        super().__init__()
        expansion, i = 1 if name == "resnet18" else 4, width
        if stem == "deep":
            self.conv1 = nn.Sequential(*conv_bn(3, width, 3, 2), nn.ReLU(),
                                       *conv_bn(width, width), nn.ReLU(), conv(width, 2 * width))
            i = 2 * width
        else:
            self.conv1 = conv(3, width, 7, 2)
        self.bn1 = nn.BatchNorm2d(i)
        dilation, dilations = 1, (1, 1, 1, 2) if stride == 16 else (1, 1, 2, 4)
        for stage, depth in enumerate(DEPTHS[name]):
            w, blocks = width * 2 ** stage, []
            for b in range(depth):
                halve = b == 0 < stage and dilations[stage] == dilation
                blocks.append(Block(i, w, w * expansion, 2 if halve else 1, dilation))
                i, dilation = w * expansion, dilations[stage]
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.channels = i // 8, i
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))                     # H/2
        c1 = self.layer1(F.max_pool2d(x, 3, 2, 1))              # H/4
        return c1, self.layer4(self.layer3(self.layer2(c1)))    # H/stride


def conv_bn_relu(*shape):
    return nn.Sequential(*conv_bn(*shape), nn.ReLU())


def resize(x, size):
    """Bilinear, corner on corner: vectors stay on the pixels they are centred on (at_features) if
    a side is a multiple of 4 and 1 more, as the paper's 321, 513 and 801 are."""
    return F.interpolate(x, size, mode="bilinear", align_corners=True)


class Trunk(nn.Module):
    """DeepLabv3+ up to its last layer: (c1, c4) -> (B, 4 * width, H/4, W/4).

    ASPP on c4: a 1x1, three dilated 3x3 and the mean over the picture, concatenated and projected;
    then c1, reduced to few channels, is concatenated, and two 3x3 follow. stride: of c4.
    """

    def __init__(self, channels, width, stride=16):
        super().__init__()
        low, high = channels
        o, few = high // 8, 3 * width // 4
        self.aspp = nn.ModuleList([conv_bn_relu(high, o, 1)] + [
            conv_bn_relu(high, o, 3, 1, reach // stride) for reach in (96, 192, 288)])
        self.pool = conv_bn_relu(high, o, 1)
        self.project = conv_bn_relu(5 * o, o, 1)
        self.reduce = conv_bn_relu(low, few, 1)
        self.fuse = nn.Sequential(conv_bn_relu(o + few, 4 * width),
                                  conv_bn_relu(4 * width, 4 * width))

    def forward(self, c1, c4):
        pooled = self.pool(c4.mean((2, 3), keepdim=True)).expand(-1, -1, *c4.shape[2:])
        x = self.project(torch.cat([f(c4) for f in self.aspp] + [pooled], 1))
        x = resize(x, c1.shape[2:]).to(x.dtype)         # autocast on CUDA resizes in float32
        return self.fuse(torch.cat([self.reduce(c1), x], 1))


class SeD(Trunk):
    """The semantic decoder: (c1, c4) -> logits (B, C, *size), float32."""

    def __init__(self, channels, width, classes, stride=16):
        super().__init__(channels, width, stride)
        self.classifier = nn.Conv2d(4 * width, classes, 1)

    def forward(self, c1, c4, size):
        # each class in one piece, for softmax and cross entropy: with their gradient they take
        # 470 ms instead of 590 (8 x 21 x 321 x 321, one core, torch 2.13.0)
        return resize(self.classifier(super().forward(c1, c4)).float(), size).contiguous()


class PiD(Trunk):
    """The pixel decoder. Called, PiD*: (c1, c4) -> fea (B, D, H/4, W/4); paint() has the heads."""

    def __init__(self, channels, width, classes, stride=16):
        super().__init__(channels, width, stride)
        # Head_1 .. Head_C, D -> 3 channels each, without bias: their weights, one after another
        self.heads = nn.Conv2d(4 * width, 3 * classes, 3, bias=False)

    def paint(self, fea, label, size, classwise=True):
        """The reconstruction r of Eq. 7, (B, 3, *size) float32, from fea (B, D, H/4, W/4).

        label: (B, H/4, W/4) long, see class_heads() and at_features().  Not classwise: Eq. 4, all
        heads on all pixels, a sum of convolutions: one with the sum of their weights.
        """
        weight = self.heads.weight.unflatten(0, (-1, 3))                # (C, 3, D, 3, 3)
        return resize(class_heads(fea, label, weight) if classwise else
                      F.conv2d(fea, weight.sum(0), padding=1).float(), size)


def at_features(x):
    """What lies under each vector of c1, fea and the like: (B, H, W) -> (B, H/4, W/4), rounded up.

    Vector i is centred on pixel 4 i. Resizing by "nearest" would take pixel floor(i H / h), which
    at 321 is up to 3 pixels off, and a third of the removed features would count as visible.
    """
    return x[:, ::4, ::4]


def class_heads(fea, label, weight, block=128):
    """r = sum over c of Head_c(fea_c), fea_c = fea where the label is c and 0 elsewhere, Eq. 6-7.

    fea: (B, D, H, W).  label: (B, H, W) long, 0..C-1; any other value is no class and paints
    nothing.  weight: (C, O, D, 3, 3).  Returns r, (B, O, H, W) float32, O = 3 for pictures.

    C convolutions are not needed. A convolution is linear: what a pixel adds to its 3 x 3
    neighbours is its vector times the D x 9 O weights of its own class's head. So the pixels are
    sorted by class into blocks of one class each, padded with zeros, all blocks are multiplied at
    once, and F.fold adds up what overlaps. No size depends on the labels, and the device is never
    waited for. Forward and backward take 35 ms instead of 690, and 153 MB instead of 790 (4 x 256
    x 81 x 81, 21 classes, two CPU cores, torch 2.13.0).
    """
    B, D, H, W = fea.shape
    C, O = weight.shape[:2]
    y = torch.where((label < 0) | (label >= C), C, label).flatten()     # class C: none
    y_sorted, order = y.sort(stable=True)
    first = torch.searchsorted(y_sorted, torch.arange(C + 2, device=y.device))
    blocks = (first.diff() + block - 1) // block                        # of each class
    ends = blocks.cumsum(0)
    n = len(y) // block + C + 1                                         # as many as it can be
    slot = torch.empty_like(y)                                          # where each pixel goes
    place = torch.arange(len(y), device=y.device) - first[y_sorted]     # within its class
    slot[order] = place + block * (ends - blocks)[y_sorted]
    x = fea.permute(0, 2, 3, 1).reshape(-1, D)
    x = x.new_zeros(n * block, D).index_copy_(0, slot, x).view(n, block, D)
    taps = weight.flip(3, 4).permute(0, 2, 1, 3, 4).reshape(C, D, O * 9)
    taps = torch.cat([taps, taps.new_zeros(1, D, O * 9)])
    of = torch.searchsorted(ends, torch.arange(n, device=y.device), right=True).clamp(max=C)
    # of: the class of a block. index_select, for the gradient of taps[of] is summed on a CPU in
    # whatever order the threads come: runs would differ
    painted = (x @ taps.index_select(0, of)).flatten(0, 1)[slot]        # (B H W, 9 O)
    return F.fold(painted.view(B, H * W, O * 9).mT.float(), (H, W), 3, padding=1)


class S4MIM(nn.Module):
    """E, SeD and, if `pixel`, PiD (Fig. 2); called, E and SeD: (B, 3, H, W) -> (B, C, H, W)."""

    def __init__(self, classes, backbone="resnet101", stem="standard", width=64, stride=16,
                 pixel=True):
        super().__init__()
        self.E = ResNet(backbone, stem, width, stride)
        self.SeD = SeD(self.E.channels, width, classes, stride)
        self.PiD = PiD(self.E.channels, width, classes, stride) if pixel else None

    def forward(self, x):
        return self.SeD(*self.E(x), x.shape[2:])


# --------------------------------------------------------------------------------------- masking

def noise_of(seeds, n):
    """(B, n) random numbers in [0, 1), each row from a seed of its own, so that a sample's draws
    depend on neither its batch nor the process nor the device."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.stack([torch.rand(n, generator=generator) for generator in generators])


def patch_mask(noise, size, patch=6, ratio=0.4):
    """The mask m, (B, 1, size, size) bool: 1 keeps, 0 removes the share `ratio` of the patches.

    noise: (B, L), L = ceil(size / patch)^2: the patches with the smallest numbers are removed.
    Those at the right and the bottom border may be cut off.
    """
    n = -(-size // patch)
    kept = noise.argsort(1).argsort(1) >= int(ratio * n * n)
    m = kept.view(-1, 1, n, n).repeat_interleave(patch, 2).repeat_interleave(patch, 3)
    return m[..., :size, :size]


def perturb(c, noise):
    """(c1, c4) of B pictures, each channel dropped with probability 1/2, or else doubled.
    noise: (B, C1) and (B, C4) in [0, 1)."""
    return [x * (2 * (u >= 0.5)[..., None, None]).to(x.dtype) for x, u in zip(c, noise)]


def mix(x, partner, box):
    """CutMix: x with its box out of x[partner]. x: (B, .., S, S); partner (B,); box (B, S, S)."""
    box = box.view(len(box), *[1] * (x.dim() - 3), *box.shape[1:])
    return torch.where(box, x[partner], x)


# ------------------------------------------------------------------------------------------ loss

# add: sums a tensor over processes, so that each mean is that of all their batches.

def alone(sums):
    return sums


def means(values, valid, streams=1, add=alone):
    """The mean over the valid pixels of each stream, (streams,) float32; 0 where none is valid.
    values, valid: (streams * B, H, W), float and bool."""
    values = torch.where(valid, values, 0).reshape(streams, -1).sum(1)
    sums = add(torch.stack([values, valid.reshape(streams, -1).sum(1).float()]))
    return sums[0] / sums[1].clamp(min=1)


def supervised(p_l, y_l, ohem=False, add=alone):
    """L_s, Eq. 1: CE over the pixels that are not void.

    p_l: logits (B, C, H, W).  y_l: (B, H, W), 255 = void.  ohem: only over the pixels whose own
    class has a probability below 0.7, and at least the hardest of this process, 100,000 a crop.
    """
    valid = y_l != 255
    ce = F.cross_entropy(p_l.float(), y_l.long(), ignore_index=255, reduction="none")
    if ohem:
        hardest = ce.detach().flatten().topk(min(100_000 * len(ce), ce.numel())).values
        valid = valid & (ce >= hardest[-1].clamp(max=-math.log(0.7)))
    return means(ce, valid, add=add)[0]


def consistency(p, y, conf, void, psi=0.95, add=alone):
    """One half of L_u, Eq. 2: CE to the pseudo-labels y that are confident, over all valid pixels.

    p: logits (B, C, H, W).  y: (B, H, W) classes.  conf: (B, H, W) in 0..1.  void: (B, H, W) bool,
    True where there is padding. The sum goes over the confident pixels, but is divided by all that
    are valid: few confident pixels have little to say.
    """
    ce = F.cross_entropy(p.float(), y, reduction="none")
    return means(ce * (conf >= psi), ~void, add=add)[0]


def pixel_loss(r, x, add=alone):
    """The bracket of Eq. 8: the sum of the three streams' mean squared errors, Eq. 5.
    r, x: (3 B, 3, H, W), what is painted and what should be."""
    everywhere = torch.ones_like(x[:, 0], dtype=torch.bool)
    return means((r - x).square().mean(1), everywhere, 3, add).sum()


def semantic_loss(p_m, target, void, add=alone):
    """The bracket of Eq. 13: predictions of masked views to those of the views themselves.

    p_m: logits (3 B, C, H, W).  target: pseudo-labels (3 B, H, W) long, for cross entropy; or
    probabilities (3 B, C, H, W), for the squared error of Table VII.  void: (3 B, H, W) bool.
    """
    if target.is_floating_point():
        each = (p_m.float().softmax(1) - target).square().mean(1)
    else:
        each = F.cross_entropy(p_m.float(), target, reduction="none")
    return means(each, ~void, 3, add).sum()


class Prototypes(nn.Module):
    """The dictionary {c: v_c} of Eq. 9-12, and the loss that draws features towards it. v: (C, D),
    zeros for a class that was never seen, without gradient."""

    def __init__(self, classes, width, alpha=0.99, tau=10.0, dic=True):
        super().__init__()
        self.alpha, self.tau, self.dic = alpha, tau, dic
        self.register_buffer("v", torch.zeros(classes, width))

    @torch.no_grad()
    def update(self, fea, label, conf, visible, add=alone):
        """Move v_c to the mean of the labelled stream's visible features of class c, Eq. 9.

        fea: (B, D, H, W).  label: (B, H, W) long.  conf: (B, H, W), the weights.
        visible: (B, H, W) bool, Omega^v. Without the dictionary, v_c is this batch's alone.
        """
        C, D = self.v.shape
        weight = F.one_hot(label, C).movedim(-1, 1) * (conf * visible)[:, None]     # (B, C, H, W)
        sums = add(torch.cat([torch.einsum("bchw,bdhw->cd", weight, fea.float()),
                              weight.sum((0, 2, 3))[:, None]], 1))
        seen = sums[:, D:] > 0
        v = sums[:, :D] / sums[:, D:].clamp(min=1e-6)                               # Eq. 9
        moved = self.alpha * self.v + (1 - self.alpha) * v if self.dic else v
        self.v.copy_(torch.where(seen, moved, self.v if self.dic else 0))

    def forward(self, fea, label, conf, removed, add=alone):
        """The bracket of Eq. 12, a mean over the classes that have removed pixels and a prototype.
        As in update(), of all three streams; removed: (3 B, H, W) bool, Omega^m. 0 without any."""
        C = len(self.v)
        fea = fea.float()
        v = self.v / self.v.norm(dim=1, keepdim=True).clamp(min=1e-12)
        cos = F.conv2d(fea, v[:, :, None, None]).gather(1, label[:, None])[:, 0]    # of its class
        far = (1 - cos / fea.norm(dim=1).clamp(min=1e-12)) / self.tau               # Eq. 10
        weight = F.one_hot(label, C).movedim(-1, 1) * (conf * removed)[:, None]
        top, bottom = add(torch.stack([(weight * far[:, None]).sum((0, 2, 3)),
                                       weight.sum((0, 2, 3))]))
        has = (bottom > 0) & self.v.any(1)                                          # Gamma
        agg = torch.where(has, top / bottom.clamp(min=1e-6), 0)                     # Eq. 11
        return agg.sum() / has.sum().clamp(min=1)                                   # Eq. 12


# ----------------------------------------------------------------------------- data, model, views

MEAN, STD = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]


def datasets(cfg):
    """(labelled, unlabelled): training crops of both kinds, and the hash of the labelled list."""
    protocol = cfg.setup if cfg.data == "voc" else "lists"
    items = data.labeled_split(cfg.data, cfg.root, cfg.labeled, cfg.split_seed, protocol)
    sets = [data.Dataset(cfg.data, cfg.root, "train", items=part, size=cfg.size, crop=cfg.size,
                         scale=(cfg.zoom / cfg.scale, cfg.zoom * cfg.scale), flip=True, train=True,
                         seed=common.seed_of(cfg.seed, kind), palette=cfg.palette or None,
                         in_memory=cfg.in_memory)
            for kind, part in enumerate(items)]
    ours, theirs = len(sets[1]), 10_582 - len(sets[0])
    if cfg.data == "voc" and ours < theirs:
        steps = [data.steps_per_epoch(n, cfg.batch_size // 2) for n in (ours, theirs)]
        data.say(f"voc: {ours} unlabelled pictures instead of the paper's {theirs}, {steps[0]} "
                 f"steps an epoch instead of {steps[1]}: get SBD's list of 10582 names, "
                 "ImageSets/Segmentation/train_aug.txt; its pictures are in JPEGImages")
    return *sets, data.labeled_hash(items[0])


def eval_loader(cfg, split, machine):
    """The pictures of a split at their own sizes; if all have the same, in batches of about as
    many pixels as in training."""
    pictures = data.Dataset(cfg.data, cfg.root, split, size=cfg.size, whole=True,
                            palette=cfg.palette or None, in_memory=cfg.in_memory)
    (h, w), alike = pictures.shapes[0], len(set(pictures.shapes)) == 1
    batch = max(1, cfg.batch_size * cfg.size ** 2 // (h * w)) if alike else 1
    return data.eval_loader(pictures, batch, **machine.loading)


def build(cfg, classes):
    """The network with random weights; PiD only where a loss needs it."""
    (_, mp, mf, _), _ = lambdas(cfg)
    return S4MIM(classes, cfg.backbone, cfg.stem, cfg.width, cfg.stride, pixel=mp + mf > 0)


def compile_parts(model, cfg):
    """--compile: E, SeD and PiD in place, so that the names of the weights stay."""
    for part in filter(None, (model.E, model.SeD, model.PiD) if cfg.compile else ()):
        part.compile()


def parameters(*modules):
    return sum(p.numel() for module in modules for p in module.parameters())


def to_unit(image, device):
    """uint8 (B, 3, H, W) -> float 0..1 on the device. All channels of a pixel lie together in
    memory, which convolutions like."""
    return image.to(device, non_blocking=True, memory_format=torch.channels_last).float() / 255


def normalize(image):
    """0..1 -> what E takes: less ImageNet's mean, over its deviation. 0 is then the mean colour,
    which is what a removed patch shows."""
    mean, std = (t.to(image.device, non_blocking=True) for t in (MEAN, STD))
    return (image - mean) / std


class Views(NamedTuple):
    """What a step sees: B labelled and B unlabelled crops, S x S. suponly has the first two."""
    x_l: torch.Tensor               # (B, 3, S, S) labelled, normalised
    y_l: torch.Tensor               # (B, S, S) their labels, 255 = void and padding
    x_w: torch.Tensor = None        # (B, 3, S, S) unlabelled, weak view: scaled, cropped, mirrored
    x_s: torch.Tensor = None        # (B, 3, S, S) strong view of that: colours, blur, CutMix
    void_w: torch.Tensor = None     # (B, S, S) bool, True on the padding of x_w
    void_s: torch.Tensor = None     # (B, S, S) bool, and of x_s
    partner: torch.Tensor = None    # (B,) which other unlabelled picture CutMix's box is from
    box: torch.Tensor = None        # (B, S, S) bool, that box; empty in half of them
    m: torch.Tensor = None          # (B, 1, S, S) bool, mask of Phase II: 1 keeps, 0 removes
    drop: list = None               # noise that perturbs c1 and c4: (B, C1) and (B, C4)


def make_views(labeled, unlabeled, cfg, channels, seeds, device):
    """The Views of two batches (image uint8, label uint8, index) as the loaders give them.

    channels: (C1, C4) of E.  seeds: one for each place in the batch. Of `unlabeled`, which suponly
    does not look at, the label says where there is padding (255), and nothing else.
    """
    x_l, y_l, _ = labeled
    x_l, y_l = normalize(to_unit(x_l, device)), y_l.to(device, non_blocking=True)
    if cfg.method == "suponly":
        return Views(x_l, y_l)
    image, void, index = unlabeled
    L = (-(-cfg.size // cfg.patch)) ** 2
    noise = noise_of(seeds, 12 + 5 + L + sum(channels))
    if torch.device(device).type == "cuda":     # above 64 KB a copy waits for the device, unless
        noise = noise.pin_memory()              # it is from pinned memory
    _, cut, patches, *drop = noise.to(device, non_blocking=True).split([12, 5, L, *channels], 1)
    weak, void = to_unit(image, device), void.to(device, non_blocking=True) == 255
    strong = data.strong_view(weak, noise[:, :12])
    partner = data.partners(index).to(device, non_blocking=True)
    box = data.cutmix_boxes(cut, cfg.size)
    return Views(x_l, y_l, normalize(weak), normalize(mix(strong, partner, box)),
                 void, mix(void, partner, box), partner, box,
                 patch_mask(patches, cfg.size, cfg.patch, cfg.ratio) if masked(cfg) else None,
                 drop)


RELEASE = {name: f"https://download.pytorch.org/models/{name}-{digest}.pth" for name, digest in (
    ("resnet18", "f37072fd"), ("resnet50", "0676ba61"), ("resnet101", "63fe2227"))}


def load_encoder(E, cfg):
    """--pretrained: copy weights with torchvision's names into E, and say what was not used. Raises
    UserError if they cannot be read, or if less than nine of ten tensors find a place."""
    if cfg.pretrained == "imagenet" and cfg.stem == "deep":
        raise UserError("--pretrained imagenet: torchvision's weights have the standard stem: "
                        "leave --stem deep out, or give a file with --pretrained")
    theirs = {k.removeprefix("module.").removeprefix("backbone."): v for k, v in data.published(
        cfg.pretrained, RELEASE[cfg.backbone], "state_dict").items()}
    mine = E.state_dict()
    fits = {k: v for k, v in theirs.items()
            if k in mine and torch.is_tensor(v) and v.shape == mine[k].shape}
    E.load_state_dict(fits, strict=False)
    # but for BatchNorm's counters, which old files do not have
    found, fresh, unused = (sorted(k for k in names if not k.endswith("batches_tracked"))
                            for names in (fits, mine.keys() - fits, theirs.keys() - fits))
    if len(found) < 0.9 * len(found + fresh):
        raise UserError(f"--pretrained {cfg.pretrained}: {len(found)} of its tensors fit the "
                        f"{len(found + fresh)} of {cfg.backbone} with --width {cfg.width}: give "
                        "its own, or none")
    if os.environ.get("RANK", "0") == "0":
        print(f"pretrained: {len(found)} of E's {len(found + fresh)} tensors"
              + (f"; not in the file: {', '.join(fresh)}" if fresh else "")
              + (f"; not used: {', '.join(unused)}" if unused else ""))


# ------------------------------------------------------------------------------- the two phases

def lambdas(cfg):
    """The lambdas of Eq. 14 as the switches leave them, (u, mp, mf, ms), and the divisor."""
    u = cfg.lambda_u if cfg.method != "suponly" else 0
    mp = cfg.lambda_mp if cfg.pi and cfg.method in ("s4mim", "mim") else 0
    mf = cfg.lambda_mf if cfg.fea and cfg.method == "s4mim" else 0
    ms = cfg.lambda_ms if cfg.se and cfg.method == "s4mim" else 0
    return (u, mp, mf, ms), 1 + 2 * u + 3 * (mp + mf + ms)


def masked(cfg):
    """Whether there is a Phase II."""
    return any(lambdas(cfg)[0][1:])


class Seen(NamedTuple):
    """What Phase I leaves behind, without gradient. Its streams l, s and fp are the labelled, the
    strong, and the feature-perturbed weak view; what is None is for Phase II alone."""
    y: torch.Tensor                 # (3 B, S, S) their classes: of p^l, y_w mixed, y_w
    conf_w: torch.Tensor            # (2 B, S, S) confidence of p^w, of the last two
    conf: torch.Tensor = None       # (3 B, S, S) confidence of p^l, p^s and p^fp
    target: torch.Tensor = None     # (3 B, S, S) argmax of these; --semantic mse: probabilities
    c_fp: tuple = None              # c1 and c4 of x_w, perturbed


@contextmanager
def averages_kept(model):
    """BatchNorm takes the statistics of its batch, as always in training, but its running averages
    stay. Only the passes of x_l and x_w move these: they look like what is evaluated."""
    norms = [m for m in model.modules() if getattr(m, "track_running_stats", False)]
    for norm in norms:
        norm.track_running_stats = False
    yield
    for norm in norms:
        norm.track_running_stats = True


def phase_one(model, v, cfg, machine):
    """Phase I, FixMatch with UniPerb, on Views v. PiD has no part in it.

    Returns L_s, L_u without its weight, the share of pixels that are confident, and Seen, None for
    suponly.
    """
    add, B, size = machine.sum, len(v.x_l), v.x_l.shape[2:]
    if v.x_w is None:                                       # suponly
        with machine.autocast():
            p_l = model(v.x_l)
        L_s = supervised(p_l, v.y_l, cfg.ohem, add)
        return L_s, torch.zeros_like(L_s), torch.zeros_like(L_s), None
    with machine.autocast():
        c = model.E(torch.cat([v.x_l, v.x_w]))
        p_l, p_w = model.SeD(*c, size).chunk(2)
        c_fp = perturb((x[B:] for x in c), v.drop)
        with averages_kept(model):
            p_s, p_fp = model(v.x_s), model.SeD(*c_fp, size)

    conf_w, y_w = p_w.detach().softmax(1).max(1)
    conf_w_mixed, y_w_mixed = (mix(t, v.partner, v.box) for t in (conf_w, y_w))
    L_s = supervised(p_l, v.y_l, cfg.ohem, add)                                         # Eq. 1
    L_u = (consistency(p_s, y_w_mixed, conf_w_mixed, v.void_s, cfg.psi, add)
           + consistency(p_fp, y_w, conf_w, v.void_w, cfg.psi, add))                    # Eq. 2
    confident = means((conf_w >= cfg.psi).float(), ~v.void_w, add=add)[0]
    # the labelled pictures' classes are predicted, too: their truth has void
    seen = Seen(torch.cat([p_l.detach().argmax(1), y_w_mixed, y_w]),
                torch.cat([conf_w_mixed, conf_w]))
    if masked(cfg):
        p = torch.cat([p_l, p_s, p_fp]).detach().softmax(1)
        conf, y = p.max(1)
        seen = seen._replace(conf=conf, target=p if cfg.semantic == "mse" else y,
                             c_fp=tuple(x.detach() for x in c_fp))
    return L_s, L_u, confident, seen


def phase_two(model, prototypes, v, seen, cfg, machine):
    """Phase II, mask-induced learning. Moves the prototypes.

    Returns the brackets of Eq. 8, 12 and 13, which are L_mimpi, L_mimfea and L_mimse without their
    weights, 0 for one that is switched off; and fea, r and p_m of the masked views, None likewise.
    """
    add, B, size = machine.sum, len(v.x_l), v.x_l.shape[2:]
    (_, mp, mf, ms), _ = lambdas(cfg)
    L_pi = L_fea = L_se = torch.zeros((), device=v.x_l.device)
    fea = r = p_m = None
    x, m = torch.cat([v.x_l, v.x_s, v.x_w]), v.m.repeat(3, 1, 1, 1)
    void = torch.cat([v.y_l == 255, v.void_s, v.void_w])
    y, conf, visible, valid = map(at_features, (seen.y, seen.conf, m[:, 0], ~void))
    with machine.autocast(), averages_kept(model):
        c = model.E(x * m)
        # the third stream is perturbed as in Phase I
        c = [torch.cat([a[:2 * B], b]) for a, b in zip(c, perturb((a[2 * B:] for a in c), v.drop))]
        if mp or mf:
            # in one batch with the whole x_w: r^fp and its target have the same BatchNorm
            fea, whole = model.PiD(*map(torch.cat, zip(c, seen.c_fp))).split([3 * B, B])  # Eq. 3
        if mp:
            classwise = cfg.method != "mim"
            r = model.PiD.paint(fea, y, size, classwise)                                # Eq. 6-7
            with torch.no_grad():       # x^fp: what is painted where nothing is removed
                x_fp = model.PiD.paint(whole, y[2 * B:], size, classwise)
        if ms:
            p_m = model.SeD(*c, size)
    if mp:
        L_pi = pixel_loss(r, torch.cat([v.x_l, v.x_s, x_fp]), add)                      # Eq. 8
    if mf:
        conf = conf if cfg.conf else torch.ones_like(conf)
        prototypes.update(fea[:B], y[:B], conf[:B], (visible & valid)[:B], add)         # Eq. 9
        L_fea = prototypes(fea, y, conf, ~visible & valid, add)                         # Eq. 10-12
    if ms:
        L_se = semantic_loss(p_m, seen.target, void, add)                               # Eq. 13
    return (L_pi, L_fea, L_se), (fea, r, p_m)


TERMS = ("loss", "loss_s", "loss_u", "loss_pi", "loss_fea", "loss_se", "confident")


def train_step(model, prototypes, optimizer, scaler, machine, cfg, v):
    """Both phases and one step of the optimizer on Views v. Returns TERMS, (7,), on the device.
    Each phase has its own backward pass, so that only one phase's graph is in memory."""
    (u, mp, mf, ms), divisor = lambdas(cfg)                                             # Eq. 14
    optimizer.zero_grad(set_to_none=True)
    L_s, L_u, confident, seen = phase_one(model, v, cfg, machine)
    one = (L_s + u * L_u) / divisor
    scaler.scale(one).backward()
    two = L_pi = L_fea = L_se = torch.zeros_like(one)
    if masked(cfg):
        L_pi, L_fea, L_se = phase_two(model, prototypes, v, seen, cfg, machine)[0]
        two = (mp * L_pi + mf * L_fea + ms * L_se) / divisor
        scaler.scale(two).backward()
    # once a step, and by hand: DistributedDataParallel sends after each backward pass, and wants
    # every weight in each
    common.average_gradients(model, machine.world)
    scaler.step(optimizer)
    scaler.update()
    return torch.stack([one + two, L_s, L_u, L_pi, L_fea, L_se, confident]).detach()


# ------------------------------------------------------------------------------- train, evaluate

def places(length, window):
    """Where windows start: two thirds of their side apart, the last flush with the border."""
    last = max(0, length - window)
    return [*range(0, last, max(1, 2 * window // 3)), last]


# whole pictures have many sizes: cudnn is not to try all its algorithms on each
@torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=True)
def probabilities(model, x, cfg, machine):
    """What the network says of normalised pictures x, (B, 3, H, W) -> (B, C, H, W) float32.
    --window whole: of all at once; slide: by windows of --size, averaged where they overlap."""
    H, W = x.shape[2:]
    h, w = max(1, round(H * cfg.zoom)), max(1, round(W * cfg.zoom))
    if (h, w) != (H, W):
        x = F.interpolate(x, (h, w), mode="bilinear", antialias=True)
    S = cfg.size if cfg.window == "slide" else max(h, w)
    p = x.new_zeros(len(x), model.SeD.classifier.out_channels, h, w)
    times = x.new_zeros(h, w)
    for top in places(h, S):
        for left in places(w, S):
            part = ..., slice(top, top + S), slice(left, left + S)
            with machine.autocast():
                logits = model(x[part])
            p[part] += logits.softmax(1)
            times[part] += 1
    p /= times
    return resize(p, (H, W)) if (h, w) != (H, W) else p


@torch.no_grad()
def evaluate(model, loader, cfg, machine, info):
    """Score the network on pictures at their own sizes, void left out: in percent miou, class_iou,
    from one confusion matrix over all pictures, and constant, the miou of the best answer that is
    the same class everywhere; and the loss, CE."""
    model.eval()
    C, device = len(info.classes), machine.device
    counts = torch.zeros(C, C, dtype=torch.int64, device=device)
    sums = torch.zeros(2, device=device)                                # CE and its pixels
    for image, label, _ in loader:
        p = probabilities(model, normalize(to_unit(image, device)), cfg, machine)
        label = label.to(device, non_blocking=True)
        counts += common.confusion(p.argmax(1), label, C)
        ce = F.nll_loss(p.clamp(min=1e-12).log(), label.long(), ignore_index=common.VOID,
                        reduction="sum")
        sums += torch.stack([ce, (label != common.VOID).sum().float()])
    common.all_reduce(counts, sums)
    return {"miou": common.miou(counts), "class_iou": common.class_iou(counts).tolist(),
            "constant": common.constant_miou(counts),
            "loss": (sums[0] / sums[1].clamp(min=1)).item()}


def make_optimizer(model, cfg, fused=None):
    groups = [{"params": part.parameters(), "start": cfg.lr * times, "poly": poly}
              for part, times, poly in ((model.E, 1.0, True), (model.SeD, cfg.decoder_lr, True),
                                        (model.PiD, cfg.pixel_lr, False)) if part]
    return torch.optim.SGD(groups, cfg.lr, 0.9, weight_decay=cfg.weight_decay, fused=fused)


def rate(step, total, group):
    """The learning rate of a step: poly for E and SeD, constant for PiD."""
    return group["start"] * (1 - step / total) ** 0.9 if group["poly"] else group["start"]


def train(cfg, machine, interrupt):
    """The training run, from top to bottom. Returns the scores at its end."""
    B = cfg.batch_size // 2 // machine.world                # of each kind, in this process
    out, device = Path(cfg.out), machine.device
    labeled, unlabeled, digest = datasets(cfg)
    val_loader = eval_loader(cfg, data.eval_split(cfg.data), machine)
    info, per_epoch = labeled.info, data.steps_per_epoch(len(unlabeled), cfg.batch_size // 2)
    common.default_epochs(cfg, per_epoch)
    total = cfg.epochs * per_epoch

    torch.manual_seed(common.seed_of(cfg.seed))
    model = build(cfg, len(info.classes)).to(device, memory_format=torch.channels_last)
    if cfg.pretrained != "none" and not common.resuming(cfg):
        load_encoder(model.E, cfg)
    if cfg.init and not common.resuming(cfg):
        common.load_weights(model, cfg.init, "s4mim", len(info.classes),
                            may_lack="PiD.")                            # suponly has none
    model = common.synchronized(model, machine)
    prototypes = Prototypes(len(info.classes), 4 * cfg.width, cfg.alpha, cfg.tau,
                            cfg.dic).to(device)
    optimizer, scaler = make_optimizer(model, cfg, machine.fused), machine.scaler()
    parts = dict(model=model, prototypes=prototypes, optimizer=optimizer, scaler=scaler)
    both = f"labelled {digest}, unlabelled {data.labeled_hash(unlabeled.items)}"
    run = common.Run(cfg, "s4mim", machine, info, both, parts, TERMS,
                     min(total, cfg.max_steps or total), per_epoch, interrupt=interrupt,
                     labeled=len(labeled), labeled_hash=digest)
    if machine.main:
        common.write(out / "labeled.txt", data.labeled_lines(labeled.items))
    compile_parts(model, cfg)

    # two streams with an order of their own: no picture meets the same others in each epoch
    loaders = [data.train_loader(pictures, B, seed=common.seed_of(cfg.seed, kind), endless=True,
                                 start=run.start, stop=run.stop, **machine.loading)
               for kind, pictures in enumerate((labeled, unlabeled))]
    if cfg.method == "suponly":
        loaders[1] = [None] * (run.stop - run.start)
    same = [i.stem for i in labeled.items] == [i.stem for i in unlabeled.items]
    run.announce(f"{parameters(model.E, model.SeD) / 1e6:.1f} M parameters, {len(labeled)} "
                 f"labelled (list {digest}) and {0 if same else len(unlabeled)} unlabelled "
                 f"pictures, {len(val_loader.dataset)} {data.eval_split(cfg.data)} pictures")
    for step, *batches in zip(range(run.start, run.stop), *loaders):
        # 1. the rates
        for group in optimizer.param_groups:
            group["lr"] = rate(step, total, group)

        # 2. one step: its draws hang on (seed, step, place in the batch) and nothing else, so that
        #    a resumed run repeats what an unbroken one does
        model.train()
        seeds = [common.seed_of(cfg.seed, step, machine.rank + machine.world * j)
                 for j in range(B)]
        now = replace(cfg, method="suponly") if step < cfg.burn_in else cfg
        v = make_views(*batches, now, model.E.channels, seeds, device)
        terms = train_step(model, prototypes, optimizer, scaler, machine, now, v)

        # 3. evaluate, log, save
        due = run.note(step, terms, *((pictures, batch[2]) for pictures, batch
                                      in zip((labeled, unlabeled), batches) if batch))
        if due == "evaluate":
            scores = evaluate(model, val_loader, cfg, machine, info)
            run.log(scores, "miou", f"mIoU {scores['miou']:.2f}", val_loss=scores["loss"],
                    miou=scores["miou"])
        if due:
            run.save()

    if cfg.method != "suponly":
        draw_step(model, labeled, unlabeled, cfg, machine, info, out / "step.png")
    write_metrics(model, val_loader, cfg, machine, info, out, run.state())
    return run.scores


def write_metrics(model, loader, cfg, machine, info, out, state):
    """OUT/samples.png, and OUT/metrics.json of a checkpoint's state, with the scores of the splits
    beside that of the loader; these scores on the screen."""
    more = {split: evaluate(model, eval_loader(cfg, split, machine), cfg, machine, info)
            for split in data.splits_beside(cfg.data)}
    if not machine.main:
        return
    scores = state["scores"]
    draw_samples(model, loader.dataset, cfg, machine, info, scores, out / "samples.png")
    common.write_json(out / "metrics.json", {
        "miou": scores["miou"], "class_iou": scores["class_iou"], "constant": scores["constant"],
        "epoch": state["history"][-1]["epoch"], "steps": state["step"],
        "seconds": state["seconds"], "params": parameters(model.E, model.SeD),
        "method": cfg.method, "labeled": state["labeled"], "labeled_hash": state["labeled_hash"],
        **more})
    print(f"mIoU {scores['miou']:.2f} (the best constant answer {scores['constant']:.2f})"
          + "".join(f"; {split}: mIoU {s['miou']:.2f}" for split, s in more.items())
          + f"  -> {out}")


def shown(x):
    """Normalised pictures (B, 3, H, W) -> a list of uint8 (H, W, 3)."""
    x = ((x.float().cpu() * STD + MEAN) * 255).round().clamp(0, 255)
    return list(x.to(torch.uint8).permute(0, 2, 3, 1).numpy())


def painted(labels, info):
    """Classes (B, H, W) -> a list of uint8 (H, W, 3)."""
    return list(common.colorize(labels.cpu(), info.colors))


@torch.no_grad()
def draw_samples(model, pictures, cfg, machine, info, scores, path, n=6):
    """samples.png: n images, their ground truth and prediction."""
    model.eval()
    rows = []
    for i in range(0, len(pictures), max(1, len(pictures) // n))[:n]:
        image, label, _ = pictures[i]
        x = normalize(to_unit(image[None], machine.device))
        p = probabilities(model, x, cfg, machine).argmax(1)
        step = max(1, max(x.shape[2:]) // 320)
        rows.append([picture[::step, ::step] for picture in (
            *shown(x), *painted(label[None], info), *painted(p, info))])
    common.draw_sheet(path, list(zip(*rows)), ["image", "ground truth", "prediction"], info,
                      f"{cfg.method}: mIoU {scores['miou']:.2f}")


@torch.no_grad()
def draw_step(model, labeled, unlabeled, cfg, machine, info, path, n=4):
    """step.png: n unlabelled images in one step. Grey in pseudo-labels is left out of L_u. The last
    row shows the output of one head, that of the largest object. All processes have to call this,
    because the two phases sum over them."""
    model.train()
    batches = [next(iter(data.train_loader(pictures, n, seed=common.seed_of(cfg.seed), stop=1,
                                           endless=True))) for pictures in (labeled, unlabeled)]
    seeds = [common.seed_of(cfg.seed, 0, j) for j in range(n)]
    v = make_views(*batches, cfg, model.E.channels, seeds, machine.device)
    s, C = slice(n, 2 * n), len(info.classes)
    with averages_kept(model), machine.autocast():
        *_, seen = phase_one(model, v, cfg, machine)
        y_w_mixed, y_w = seen.y[n:].masked_fill(seen.conf_w < cfg.psi, 255).chunk(2)
        rows = {"weak view": shown(v.x_w), "pseudo-label": painted(y_w, info),
                "strong view": shown(v.x_s), "mixed pseudo-label": painted(y_w_mixed, info)}
        if masked(cfg):
            spare = Prototypes(C, 4 * cfg.width).to(machine.device)     # Phase II moves them
            _, (fea, r, p_m) = phase_two(model, spare, v, seen, cfg, machine)
            rows["masked strong view"] = shown(v.x_s * v.m)
            if p_m is not None:
                rows["prediction from masked"] = painted(p_m[s].argmax(1), info)
            if r is not None:
                rows["painted by PiD"] = shown(r[s])
            if r is not None and cfg.method != "mim":
                y, area = seen.y[s], F.one_hot(seen.y[s], C).sum((1, 2))
                area[:, list(info.background)] = 0
                y = at_features(torch.where(y == area.argmax(1)[:, None, None], y, C))  # C: none
                rows["painted by one head"] = shown(model.PiD.paint(fea[s], y, v.x_s.shape[2:]))
    if machine.main:
        common.draw_sheet(path, list(rows.values()), list(rows), info,
                          "One step on unlabelled images", "void or not confident")


# ----------------------------------------------------------------------------- the other commands

def load(path):
    return common.load(path, "s4mim", Config, data.Info, build)


def evaluate_only(cfg, origin):
    """--eval A.pt [B.pt ..]: the scores of each, in OUT/metrics.json and OUT/samples.png, for
    several checkpoints in OUT/RUN-CHECKPOINT each."""
    machine = None
    out = Path(cfg.out if origin.get("out") == "flag" else Path(cfg.eval[0]).parent / "eval")
    for path, folder in common.result_folders(cfg.eval, out).items():
        theirs, info, model, state = load(path)
        here = common.checkpoint_config(cfg, origin, path, theirs, check, "eval", "data",
                                        "palette", "batch_size", "window", "zoom")
        machine = machine or common.Machine(here)
        loader = eval_loader(here, data.eval_split(here.data), machine)
        if loader.dataset.info.classes != info.classes:
            raise UserError(f"--data {here.data} has other classes than {path} was trained for")
        model.to(machine.device)
        scores = evaluate(model, loader, here, machine, info)
        write_metrics(model, loader, here, machine, info, folder, {**state, "scores": scores})


@torch.no_grad()
def segment(model, image, cfg, machine):
    """Segment one picture: uint8 (H, W, 3) -> class indices uint8 (H, W), and their probability,
    float32 (H, W).

    Above 2048 pixels a side a smaller copy is segmented, by windows, and the answer enlarged: C
    planes of floats would not fit.
    """
    H, W = image.shape[:2]
    shrink = min(1, 2048 / max(H, W))
    x = to_unit(torch.from_numpy(image.copy()).permute(2, 0, 1)[None], machine.device)
    if shrink < 1:
        cfg = replace(cfg, window="slide")
        x = F.interpolate(x, (max(1, round(H * shrink)), max(1, round(W * shrink))),
                          mode="bilinear", antialias=True)
    sure, answer = probabilities(model, normalize(x), cfg, machine).max(1)
    return tuple(np.array(Image.fromarray(one[0].cpu().numpy()).resize((W, H), Image.NEAREST))
                 for one in (answer.to(torch.uint8), sure))


def bench(cfg):
    """--bench N: parameters, multiply-adds of E and SeD, and for N > 0 the time of a training step.
    The last line is one JSON object."""
    machine, info = common.Machine(cfg), data.info(cfg.data, cfg.root, cfg.palette or None)
    C, S, B, device = len(info.classes), cfg.size, cfg.batch_size // 2, machine.device
    with torch.device("meta"):           # shapes without numbers: counting takes no memory
        model = S4MIM(C, cfg.backbone, cfg.stem, cfg.width, cfg.stride).eval()
        x = torch.empty(1, 3, S, S)
        gmacs, of_E = common.macs(model, x), common.macs(model.E, x)
        of_PiD = common.macs(model.PiD, *model.E(x))                        # without its heads
    result = {"params": parameters(model.E, model.SeD), "params_E": parameters(model.E),
              "params_PiD": parameters(model.PiD), "gmacs": round(gmacs, 3)}
    print(f"{result['params']:,} parameters, {result['params_E']:,} of them in E; PiD has "
          f"{result['params_PiD']:,} more")
    if cfg.bench > 0:
        torch.manual_seed(cfg.seed)
        image = torch.randint(0, 256, (B, 3, S, S), dtype=torch.uint8)
        batch = image, torch.randint(0, C, (B, S, S), dtype=torch.uint8), torch.arange(B)
        model = build(cfg, C).to(device, memory_format=torch.channels_last).train()
        prototypes = Prototypes(C, 4 * cfg.width, cfg.alpha, cfg.tau, cfg.dic).to(device)
        compile_parts(model, cfg)
        optimizer, scaler = make_optimizer(model, cfg, machine.fused), machine.scaler()

        def step(i):
            v = make_views(batch, batch, cfg, model.E.channels, range(i * B, i * B + B), device)
            train_step(model, prototypes, optimizer, scaler, machine, cfg, v)

        # how often a step sends its B pictures through E, SeD and PiD
        passes = {"suponly": (1, 1, 0), "fixmatch": (3, 4, 0), "mim": (6, 4, 4),
                  "s4mim": (6, 7, 4)}[cfg.method]
        pictures = B if cfg.method == "suponly" else 2 * B
        result |= common.time_steps(step, cfg.bench, pictures, device,
                                    float(B * np.array(passes) @ (of_E, gmacs - of_E, of_PiD)))
    print(json.dumps(result))


# ------------------------------------------------------------------------------------------ main

def check(cfg):
    """What the parser cannot judge. Raises UserError."""
    common.at_least(cfg, 1, "size", "width", "eval_every", "patch", "scale")
    common.at_least(cfg, -1, "bench")
    common.at_least(cfg, 0, "epochs", "max_steps", "weight_decay", "psi", "lambda_u", "lambda_mp",
                    "lambda_mf", "lambda_ms", "threads", "save_every", "in_memory", "burn_in")
    for name in ("lr", "decoder_lr", "pixel_lr", "tau", "zoom"):
        if not 0 < getattr(cfg, name) < math.inf:
            raise UserError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: expected a number "
                            "above 0")
    if not 0 <= cfg.alpha < 1:
        raise UserError(f"--alpha {cfg.alpha}: expected a number from 0 to below 1")
    patches = (-(-cfg.size // cfg.patch)) ** 2
    if not 0 < cfg.ratio < 1 or not int(cfg.ratio * patches):
        raise UserError(f"--patch {cfg.patch} --ratio {cfg.ratio}: of the {patches} patches of "
                        "--size at least one must be removed and one kept")
    if cfg.setup == "aug" and cfg.data != "voc":
        raise UserError("--setup aug: only voc has more masks beside its own")
    if cfg.width % 4 or cfg.size < 32 or cfg.stride not in (8, 16):
        raise UserError(f"--width {cfg.width} --size {cfg.size} --stride {cfg.stride}: a multiple "
                        "of 4; at least 32; 8 or 16")
    world = int(os.environ.get("WORLD_SIZE", 1))
    if cfg.batch_size % (2 * world) or cfg.batch_size < 4 * world:
        # BatchNorm needs more than one value a channel, and CutMix another picture
        raise UserError(f"--batch-size {cfg.batch_size}: half of it is labelled, half not: a "
                        f"multiple of {2 * world} and at least {4 * world} for {world} processes")
    if (cfg.ckpt or cfg.to) and not cfg.predict:
        raise UserError("--ckpt and --to go with --predict")


def settle(cfg):
    """Put what 0 stands for in --zoom and --patch into cfg."""
    if not cfg.zoom:
        cfg.zoom = min(1.0, round(1.5 * cfg.size / (data.short_side(cfg.data, cfg.root) or 1), 3))
    # as large a share of a small crop as the paper's 6 pixels are of 321, but at least 2 pixels
    cfg.patch = cfg.patch or max(2, round(6 * data.of_321(cfg.size)))


def main():
    cfg, origin = common.parse(Config, RECIPES, __doc__)
    cfg.out = cfg.out or str(Path("out") / f"s4mim-{Path(cfg.data).name}")
    if cfg.predict:
        return common.predict_folder(cfg, origin, load, check, data, segment, "window", "zoom")
    if cfg.eval:
        return evaluate_only(cfg, origin)
    if cfg.method == "suponly":
        cfg.baseline = "none"
    settle(cfg)
    check(cfg)
    common.show_config(cfg, origin)
    if cfg.bench >= 0:
        return bench(cfg)
    machine = common.Machine(cfg, first=Path(cfg.out) / "suponly")
    interrupt = common.Interrupt(machine)
    if cfg.baseline != "none":
        begun = (Path(cfg.out) / "config.json").exists()
        if not cfg.resume:
            common.refuse_run(cfg.out)
        elif begun and not (Path(cfg.out) / "suponly").exists():
            raise UserError(f"--resume: {cfg.out} was begun without a baseline: give --baseline "
                            "none")
        base = train(replace(cfg, method="suponly", out=str(Path(cfg.out) / "suponly")), machine,
                     interrupt)
        if interrupt.due(0)[0]:                 # asked for after the last step of the baseline
            interrupt.end("the baseline")
        # if that was broken off, there is nothing yet that the second run could resume
        cfg.resume = cfg.resume and begun
    scores = train(cfg, machine, interrupt)
    if cfg.baseline != "none" and machine.main:
        print(f"with the same labels and steps: --method suponly {base['miou']:.2f}, "
              f"--method {cfg.method} {scores['miou']:.2f}")


if __name__ == "__main__":
    common.run(main)
