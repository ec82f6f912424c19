"""MaskSup, masked supervised learning: segment a picture and its copy full of holes, together.

    I                      -> f -> M_p     segmentation branch, L_seg = CE(M_p, M_gt)
    I_masked = I * M_holes -> f -> M_pm    context branch, L_context = CE(M_pm, M_gt)      Eq. 1-2
    L = L_seg + L_context + L_tasksim,     L_tasksim = MSE(softmax M_p, softmax M_pm)      Eq. 3

f is any segmentation network, the same in both branches; at test time there are no holes, and no
cost but that of f. Zunair and Ben Hamza, "Masked supervised learning for semantic segmentation",
BMVC 2022; equations, tables and figures are numbered as there.

    python masksup.py                                       # embedded dataset, CPU, two minutes
    python masksup.py --data glas                           # as released: from LeViT's weights
    python masksup.py --data glas --method base             # what it is compared with (Fig. 5)
    python masksup.py --data glas --pretrained none         # from random weights
    python masksup.py --eval out/a/last.pt out/b/last.pt --corrupt 0.1,0.3,0.5,0.7      # Fig. 6
    python masksup.py --eval --pretrained masksupglas76.06iou.pth --data glas   # MaskSup's release
    python masksup.py --predict PICTURES --ckpt out/masksup-glas/best.pt --to DIR
    python masksup.py --data glas --pretrain mae            # the other side of Table 2
    torchrun --nproc_per_node=4 masksup.py --data glas      # several GPUs

On GlaS a reduced model (U-Net, 2.0 M parameters, 112 x 112, from scratch, two CPU cores, torch
2.13.0) ends at a test mIoU of 73.6 (base), 75.2 (cb) and 76.1 (masksup) with --coverage low, means
of three seeds; commands and tables in README.md. The paper's own networks are built and counted,
but have not been trained here.

Departures from the paper, and what it leaves open (more in README.md):
- L_tasksim is half the squared distance of the probabilities, mean over the pixels, not a norm
  that grows with the picture. The released NYUDv2 script compares the argmax: no gradient.
- Every set has two classes or more and a softmax, binary ones included.
- The masks are drawn by draw_mask(); "high" and "low" of Table 3 have no figures in the paper.
- glas, polyp: Adam and batch 16, as printed; the release has amsgrad, decay 1e-5 and batch 8,
  averages labels over areas (we: the nearest pixel), and leaves LeViT's first convolution random.
- LeViT-UNet's coarse maps are brought from 4 to 8, 16 and then 14 pixels, as released.
- BatchNorm's running averages follow both passes. Taken from clean pictures alone they cost 0.5 of
  mIoU, and 1.8 with half of the picture removed (GlaS as above, three seeds).
- The last epoch is reported; the paper's choice, the best on the test set, stands beside it.
- nyuv2: the paper has rate 0.1, its released code 0.01 with decay 5e-4 and steps; ours is 0.1.
  paper_iou counts void, which training leaves out, as class 0; it is given without void, too.
- Table 4's U-Net of 3 M parameters is --width 20. Table 2's MAE is a ViT, ours f on zeroed pixels.
- The released networks' names are mapped, tested on their shapes, not tried on the files.
"""
import json
import math
import os
import re
import textwrap
from collections import OrderedDict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw

import common
import data
from common import UserError


# ---------------------------------------------------------------------------------------- config

@dataclass
class Config:
    data: str = "shapes"           # a dataset that data.py lists, or your own folder
    root: str = "data"             # where datasets live
    out: str = ""                  # run folder; empty: out/masksup-DATA
    method: Literal["masksup", "cb", "base"] = "masksup"  # all terms of Eq. 3, Eq. 2, L_seg alone
    model: Literal["unet", "unetpp", "levit128s", "levit192", "levit384"] = "levit384"  # network f
    recipe: Literal["auto", "small", "paper"] = "auto"  # auto: small for a folder, else paper
    epochs: int = 200              # the paper's for GlaS, like all defaults down to coverage;
    #                                0: as many as make 3000 steps
    batch_size: int = 16           # pictures a step, over all processes
    lr: float = 1e-4               # of the optimizer
    optimizer: Literal["adam", "sgd"] = "adam"  # SGD with momentum 0.9
    weight_decay: float = 0.0      # the optimizer's own, not decoupled
    schedule: Literal["constant", "step", "cosine"] = "constant"  # step: x 0.1 every 60 epochs
    warmup: int = 0                # steps over which the rate rises to lr
    size: int = 224                # pictures are resized to this side, whatever their proportions
    flip: bool = False             # mirror half of the training pictures; the paper does not
    coverage: Literal["high", "low"] = "high"  # M_holes removes 50-75 %, or 10-30 % (for Table 3)
    masks: str = ""                # folder of masks to use instead of drawn ones
    masks_remove: Literal["dark", "bright"] = "dark"  # what removes in --masks; released: bright
    bank: int = 256                # masks that are drawn, once a run
    alpha1: float = 1.0            # weight of L_seg in Eq. 3
    alpha2: float = 1.0            # weight of L_context
    alpha3: float = 1.0            # weight of L_tasksim
    width: int = 32                # channels of the first level of unet and unetpp
    pretrained: str = "none"       # imagenet (downloads LeViT's), a file of LeViT's or MaskSup's
    #                                release, or none: random weights
    init: str = ""                 # start from the weights of this checkpoint, to fine-tune it
    pretrain: Literal["none", "mae"] = "none"  # first learn to paint in removed patches (Table 2)
    pretrain_epochs: int = 800     # --pretrain mae: epochs of that; then 50 of --method base
    mae_patch: int = 16            # --pretrain mae: side of a removed patch
    mae_ratio: float = 0.75        # --pretrain mae: share of the patches that is removed
    eval_every: int = 1            # epochs between evaluations
    seed: int = 0                  # of weights, masks and order
    workers: int = -1              # loader processes; -1: one a processor with CUDA, or else none
    threads: int = 0               # of torch on the CPU; 0: one for each processor that is idle
    in_memory: float = 2.0         # GB of decoded pixels up to which a split is read only once
    device: str = "auto"           # auto: the best there is; or cuda, cuda:1, mps, cpu
    amp: Literal["auto", "bf16", "fp16", "off"] = "auto"  # auto: bf16 with CUDA, off elsewhere
    compile: bool = False          # torch.compile the model
    resume: bool = False           # go on from OUT/last.pt
    save_every: float = 5.0        # minutes between saves, at least; 0: after each evaluation
    max_steps: int = 0             # stop after so many steps, evaluate and save; 0: all epochs
    palette: str = ""              # colours of RGB masks: voc, cityscapes, binary or a file
    eval: tuple = ()               # evaluate these checkpoints (or --pretrained) and nothing else
    corrupt: str = ""              # --eval: also with these shares removed, e.g. 0.1,0.3,0.5,0.7
    bench: int = -1                # time N training steps on random tensors; 0: only count
    predict: tuple = ()            # images to segment: files, or folders and what is in them
    ckpt: str = ""                 # --predict: the checkpoint
    to: str = ""                   # --predict: new folder for the predictions


SCENES = dict(model="unetpp", optimizer="sgd", lr=0.1, batch_size=8)
RECIPES = {                        # what differs from the defaults above, by dataset
    # a minute and a half on one CPU core: small pictures, a narrow U-Net, many short steps; and
    # "low", for "high" leaves nothing of most shapes at this size
    "shapes": dict(model="unet", width=16, size=32, epochs=24, batch_size=8, lr=5e-3,
                   schedule="cosine", warmup=30, coverage="low", eval_every=4, mae_patch=8,
                   pretrain_epochs=10),
    "glas": dict(pretrained="imagenet"), "polyp": dict(pretrained="imagenet"),  # of LeViT alone
    "nyuv2": SCENES,                                    # the paper's; the others are not in it
    "voc": SCENES, "camvid": SCENES, "cityscapes": SCENES,
    # for a folder of your own, on a laptop: about ten minutes
    "small": dict(model="unet", width=16, size=128, epochs=0, batch_size=8, lr=1e-3,
                  schedule="cosine", warmup=50, coverage="low", flip=True),
}
RECIPES["materials"] = dict(RECIPES["shapes"], size=48)     # for its 13 stripes a side


# ----------------------------------------------------------------------------- model: the U-Nets

def conv_twice(i, o, bias=True):
    """(conv3x3, BN, ReLU) twice, i -> o channels."""
    layers = []
    for c in i, o:
        layers += nn.Conv2d(c, o, 3, padding=1, bias=bias), nn.BatchNorm2d(o), nn.ReLU()
    return nn.Sequential(*layers)


def up(x):
    """Twice the height and width, bilinearly."""
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)


class UNet(nn.Module):
    """U-Net, five levels, upsampling bilinearly: (B, 3, S, S) -> logits (B, N, S, S), 16 | S."""

    def __init__(self, classes, width=32):
        super().__init__()
        w = [width * 2 ** i for i in range(5)]
        self.down = nn.ModuleList(map(conv_twice, [3, *w], w))
        self.up = nn.ModuleList(conv_twice(w[i] + w[i + 1], w[i]) for i in (3, 2, 1, 0))
        self.head = nn.Conv2d(w[0], classes, 1)

    def forward(self, x):
        skips = []
        for stage in self.down:
            x = stage(F.max_pool2d(x, 2) if skips else x)
            skips.append(x)
        for stage, skip in zip(self.up, skips[-2::-1]):
            x = stage(torch.cat([skip, up(x)], 1))
        return self.head(x)


class UNetPlusPlus(nn.Module):
    """U-Net++: node[i, j] at level i = conv(node[i, 0], .., node[i, j-1], up(node[i+1, j-1])).

    (B, 3, S, S) -> logits (B, N, S, S), S a multiple of 16. Node [0, 4] has the head.
    """

    def __init__(self, classes, width=32):
        super().__init__()
        w = [width * 2 ** i for i in range(5)]
        self.node = nn.ModuleDict()
        for j in range(5):
            for i in range(5 - j):
                inputs = w[i] * j + w[i + 1] if j else [3, *w][i]
                self.node[f"{i}{j}"] = conv_twice(inputs, w[i])
        self.head = nn.Conv2d(w[0], classes, 1)

    def forward(self, x):
        x = {(-1, 0): x}
        for j in range(5):
            for i in range(5 - j):
                if j:
                    inputs = torch.cat([*(x[i, k] for k in range(j)), up(x[i + 1, j - 1])], 1)
                else:
                    inputs = F.max_pool2d(x[i - 1, 0], 2) if i else x[-1, 0]
                x[i, j] = self.node[f"{i}{j}"](inputs)
        return self.head(x[0, 4])


# ---------------------------------------------------------------------------- model: LeViT-UNet

# Module names and shapes down to LeViT are those of LeViT's release, so that its weights load.

def conv_bn(i, o):
    """conv3x3 of stride 2, BN."""
    return nn.Sequential(OrderedDict(c=nn.Conv2d(i, o, 3, 2, 1, bias=False),
                                     bn=nn.BatchNorm2d(o)))


class LinearBN(nn.Sequential):
    """Linear on (B, L, i), BN over all tokens. gain: of BN at the start, 0 ending a residual."""

    def __init__(self, i, o, gain=1.0):
        super().__init__(OrderedDict(c=nn.Linear(i, o, bias=False), bn=nn.BatchNorm1d(o)))
        nn.init.constant_(self.bn.weight, gain)

    def forward(self, x):
        return self.bn(self.c(x).flatten(0, 1)).unflatten(0, x.shape[:2])


class Residual(nn.Module):
    """x + m(x); in training the branch m is left out for a share `drop` of the samples."""

    def __init__(self, m, drop):
        super().__init__()
        self.m, self.drop = m, drop

    def forward(self, x):
        y = self.m(x)
        if self.training and self.drop > 0:
            kept = torch.rand(x.shape[0], 1, 1, device=x.device) >= self.drop
            y = y * kept / (1 - self.drop)
        return x + y


class Attention(nn.Module):
    """Attention of r x r tokens of width i, to as many, or (shrink) from every second in each
    direction, with a learned bias for each head and each distance (|dy|, |dx|).

    (B, r * r, i) -> (B, r' * r', o), r' = r or ceil(r / 2). key: the width d_k of queries and keys
    in a head; values are twice as wide, four times with shrink.
    """

    def __init__(self, i, o, key, heads, r, shrink=False):
        super().__init__()
        self.heads, self.shrink, self.r = heads, shrink, r
        self.key, self.value = key, 4 * key if shrink else 2 * key
        if shrink:
            self.q = nn.Sequential(nn.Identity(), LinearBN(i, heads * key))
            self.kv = LinearBN(i, heads * (key + self.value))
        else:
            self.qkv = LinearBN(i, heads * (2 * key + self.value))
        self.proj = nn.Sequential(nn.Hardswish(), LinearBN(heads * self.value, o,
                                                           gain=1.0 if shrink else 0.0))
        self.attention_biases = nn.Parameter(torch.zeros(heads, r * r))
        rows = torch.arange(0, r, 2 if shrink else 1)             # of the queries; columns alike
        off = (rows[:, None] - torch.arange(r)).abs()             # (r', r), along either direction
        index = off[:, None, :, None] * r + off[None, :, None, :]   # (r', r', r, r), |dy| r + |dx|
        self.register_buffer("index", index.flatten(2).flatten(0, 1), persistent=False)

    def forward(self, x):
        if self.shrink:
            coarse = x.unflatten(1, (self.r, self.r))[:, ::2, ::2].flatten(1, 2)
            (q,) = self.split(self.q(coarse), self.key)
            k, v = self.split(self.kv(x), self.key, self.value)
        else:
            q, k, v = self.split(self.qkv(x), self.key, self.key, self.value)
        # index_select: the gradient of [:, index] sorts the L' L indices at each step
        bias = self.attention_biases.index_select(1, self.index.flatten()).to(q.dtype)
        bias = bias.unflatten(1, self.index.shape)                              # (h, L', L)
        z = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)             # (B, h, L', d_v)
        return self.proj(z.transpose(1, 2).flatten(2))

    def split(self, x, *widths):
        """(B, L, h * sum(widths)) -> a (B, h, L, width) for each of widths."""
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2).split(widths, 3)


def mlp(width):
    """The MLP of LeViT's blocks, on (B, L, width)."""
    return nn.Sequential(LinearBN(width, 2 * width), nn.Hardswish(),
                         LinearBN(2 * width, width, gain=0.0))


LEVIT = {   # widths and heads of the three stages, blocks in them, d_k, share of dropped branches
    "levit128s": ((128, 256, 384), (4, 6, 8), (2, 3, 4), 16, 0.0),
    "levit192": ((192, 288, 384), (3, 5, 6), (4, 4, 4), 32, 0.0),
    "levit384": ((384, 512, 768), (6, 9, 12), (4, 4, 4), 32, 0.1),
}


class LeViT(nn.Module):
    """LeViT without its classifier: (B, 3, S, S) -> a list of seven maps (B, C, r, r).

    Four of the stem, at strides 2, 4, 8 and 16 with n/8, n/4, n/2 and n channels, and one of each
    stage: r = 14, 7 and 4 for S = 224. n is the width of the first stage.
    """

    def __init__(self, name, size):
        super().__init__()
        widths, heads, depths, key, drop = LEVIT[name]
        n, r, stem, blocks, self.ends = widths[0], size // 16, [], [], []
        for i, o in (3, n // 8), (n // 8, n // 4), (n // 4, n // 2), (n // 2, n):
            stem += conv_bn(i, o), nn.Hardswish()
        self.patch_embed = nn.Sequential(*stem[:-1])
        for stage, (width, h, depth) in enumerate(zip(widths, heads, depths)):
            if stage:
                before = widths[stage - 1]
                blocks.append(Attention(before, width, key, before // key, r, shrink=True))
                blocks.append(Residual(mlp(width), drop))
                r = (r + 1) // 2
            for _ in range(depth):
                blocks.append(Residual(Attention(width, width, key, h, r), drop))
                blocks.append(Residual(mlp(width), drop))
            self.ends.append(len(blocks))
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x):
        maps = []
        for i, layer in enumerate(self.patch_embed):
            x = layer(x)
            if i % 2 or i == 6:                                # after Hardswish, and the last
                maps.append(x)
        x = x.flatten(2).transpose(1, 2)                       # (B, L, n)
        for i, block in enumerate(self.blocks, 1):
            x = block(x)
            if i in self.ends:
                r = math.isqrt(x.shape[1])
                maps.append(x.transpose(1, 2).unflatten(2, (r, r)))
        return maps


class LeViTUNet(nn.Module):
    """LeViT as the encoder of a U-Net: (B, 3, S, S) -> logits (B, N, S, S), 16 | S."""

    def __init__(self, classes, name="levit384", size=224):
        super().__init__()
        self.levit = LeViT(name, size)
        widths = LEVIT[name][0]
        n = widths[0]
        self.up = nn.ModuleList(conv_twice(i, o, bias=False) for i, o in
                                ((n + sum(widths), 512), (512 + n // 2, 256), (256 + n // 4, 128)))
        self.head = nn.Conv2d(128 + n // 8, classes, 3, padding=1)

    def forward(self, x):
        *skips, x, one, two, three = self.levit(x)
        for m in one, two, three:
            while m.shape[-1] < x.shape[-1]:                   # 4 -> 8 -> 16 -> 14, as released
                m = up(m)
            m = F.interpolate(m, x.shape[-2:], mode="bilinear", align_corners=True)
            x = torch.cat([x, m], 1)
        for stage, skip in zip(self.up, skips[::-1]):
            x = torch.cat([stage(up(x)), skip], 1)
        return up(self.head(x))


class MaskSup(nn.Module):
    """The two branches of Fig. 2 around one network f, which both share."""

    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, image, holes=None):
        """
        image: (B, 3, S, S) float in [-1, 1].  holes: M_holes, (B, 1, S, S), 1 keeps and 0 removes.
        Returns the logits M_p and M_pm, (B, N, S, S) both; M_pm is None without holes.

        Two passes, so that BatchNorm normalises each by the statistics of its own batch. Its
        running averages follow both; what following M_p's alone would cost is in README.md.
        """
        M_p = self.f(image)                                               # segmentation branch
        if holes is None:
            return M_p, None
        return M_p, self.f(image * holes)                                 # context branch    Eq. 1


# --------------------------------------------------------------------------------------- masking

COVERAGE = {"high": (0.50, 0.75), "low": (0.10, 0.30)}


def draw_mask(rng, size, low, high):
    """One M_holes: streaks and holes of arbitrary shape, (size, size) bool, True keeps.

    The share removed lies between low and high, of 0..1. What leaves the picture on one side comes
    back on the other, so that a mask can be shifted around without a seam. rng: numpy's Generator;
    the sizes of the figures, shares of the picture's side, are our choice.
    """
    target, scale, mask = rng.uniform(low, high), 1.0, Image.new("1", (size, size), 1)
    removed = 0.0
    while removed < target and scale > 0.02:            # until nothing fits below `high` any more
        trial = mask.copy()
        figure = streak if rng.random() < 0.7 else hole
        figure(ImageDraw.Draw(trial), rng, size, scale)
        share = 1 - np.asarray(trial).mean()
        if share <= high:
            mask, removed = trial, share
        else:                                           # too much: a smaller one instead
            scale *= 0.7
    return np.asarray(mask)


def around(rng, points, size):
    """The points (P, 2), centred on some place in the picture, and their eight copies a side away.
    """
    points = points + rng.uniform(0, size, 2) - (points.min(0) + points.max(0)) / 2
    return [points + np.array([dx, dy]) * size for dx in (-1, 0, 1) for dy in (-1, 0, 1)]


def streak(draw, rng, size, scale):
    """A bent stroke of a thick round pen: a walk of two to six straight pieces."""
    n, angle = rng.integers(2, 7), rng.uniform(0, 2 * np.pi) + rng.normal(0, 0.7, 6).cumsum()
    width = max(1.0, rng.uniform(0.03, 0.12) * size * scale)
    steps = rng.uniform(0.08, 0.25, n)[:, None] * size * scale
    walk = (steps * np.stack([np.cos(angle[:n]), np.sin(angle[:n])], 1)).cumsum(0)
    for points in around(rng, np.concatenate([np.zeros((1, 2)), walk]), size):
        draw.line(points.ravel().tolist(), fill=0, width=round(width), joint="curve")
        for x, y in points[[0, -1]]:                                    # round ends
            draw.ellipse((x - width / 2, y - width / 2, x + width / 2, y + width / 2), fill=0)


def hole(draw, rng, size, scale):
    """A blob: a closed polygon around a point, at distances that vary smoothly."""
    turn = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    waves = sum(rng.uniform(-0.3, 0.3) * np.cos(k * turn + rng.uniform(0, 2 * np.pi))
                for k in (1, 2, 3))
    radius = rng.uniform(0.04, 0.14) * size * scale * (1 + waves)
    for points in around(rng, radius[:, None] * np.stack([np.cos(turn), np.sin(turn)], 1), size):
        draw.polygon(points.ravel().tolist(), fill=0)


def mask_bank(n, size, low, high, seed):
    """n drawn masks (n, size, size) bool, True keeps; each removes a share from low to high."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(np.stack([draw_mask(rng, size, low, high) for _ in range(n)]))


def noise_of(seeds, n=6):
    """(B, n) random numbers in [0, 1), each row from a seed of its own, so that a sample's mask
    depends on neither its batch nor the process nor the device."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.stack([torch.rand(n, generator=generator) for generator in generators])


def pick(bank, noise):
    """A mask for each sample: one of the bank, flipped, turned and shifted. Pure.

    bank: (n, S, S) bool, True keeps.  noise: (B, 6) from noise_of(), on the bank's device.
    Returns M_holes, (B, 1, S, S) bool, 1 keeps, 0 removes. One gather for all: on the device the
    pixels of the bank are addressed, none is copied before.
    """
    S = bank.shape[-1]
    which, down, right = ((noise[:, i] * n).long() for i, n in enumerate((len(bank), S, S)))
    turn, mirror_y, mirror_x = (noise[:, 3:, None, None] < 0.5).unbind(1)       # (B, 1, 1) each
    y, x = torch.arange(S, device=bank.device)[:, None], torch.arange(S, device=bank.device)
    y, x = torch.where(turn, x, y), torch.where(turn, y, x)                     # (B, S, S)
    y, x = torch.where(mirror_y, S - 1 - y, y), torch.where(mirror_x, S - 1 - x, x)
    y, x = (y + down[:, None, None]) % S, (x + right[:, None, None]) % S
    return bank[which[:, None, None], y, x][:, None]


def patch_holes(noise, size, patch, ratio):
    """The masks of --pretrain mae: (B, 1, S, S) bool, True keeps; of the (S / patch)^2 patches the
    share `ratio` is removed. noise: (B, L) random numbers."""
    n = size // patch
    kept = noise.argsort(1).argsort(1) >= int(n * n * ratio)
    grid = kept.view(-1, 1, n, n)
    return grid.repeat_interleave(patch, 2).repeat_interleave(patch, 3)


# ------------------------------------------------------------------------------------------ loss

def cross_entropy(logits, label, add=lambda sums: sums):
    """Mean over the pixels that are not void (255), float32; 0 where all are.

    logits: (B, N, S, S).  label: (B, S, S) integer.  add: sums a tensor over processes, so that
    the mean is that of all their batches.
    """
    top = F.cross_entropy(logits.float(), label.long(), ignore_index=255, reduction="sum")
    top, bottom = add(torch.stack([top, (label != 255).sum().float()]))
    return top / bottom.clamp(min=1)


def task_similarity(M_p, M_pm, add=lambda sums: sums):
    """L_tasksim: half the squared distance of the probabilities, mean over all pixels: from 0 to 1,
    where the branches are sure of different classes, for any number of classes.

    M_p, M_pm: logits (B, N, S, S). Both receive its gradient; it needs no labels, so that void
    counts as well. The paper has the norm, whose size would grow with the picture. add: as in
    cross_entropy().
    """
    top = (M_p.float().softmax(1) - M_pm.float().softmax(1)).square().sum()
    top, bottom = add(torch.stack([top, torch.full_like(top, 2 * M_p[:, 0].numel())]))
    return top / bottom


def loss_fn(M_p, M_pm, label, alpha=(1, 1, 1), add=lambda sums: sums):
    """Eq. 3. L_context and L_tasksim are not computed without M_pm, or where their weight is 0.

    M_p, M_pm: logits (B, N, S, S), M_pm None for L_seg alone.  label: (B, S, S), 255 = void.
    Returns the loss, a scalar, and the terms (L_seg, L_context, L_tasksim), (3,), detached.
    """
    zero = torch.zeros((), device=M_p.device)
    L_seg = cross_entropy(M_p, label, add)
    L_context = cross_entropy(M_pm, label, add) if M_pm is not None and alpha[1] else zero
    L_tasksim = task_similarity(M_p, M_pm, add) if M_pm is not None and alpha[2] else zero
    loss = alpha[0] * L_seg + alpha[1] * L_context + alpha[2] * L_tasksim            # Eq. 2-3
    return loss, torch.stack([L_seg, L_context, L_tasksim]).detach()


def painting_loss(painted, image, holes, add=lambda sums: sums):
    """The loss of --pretrain mae: mean squared error over the removed pixels, float32.

    painted, image: (B, 3, S, S).  holes: (B, 1, S, S) bool, 0 removes.  add: as above.
    """
    top = ((painted.float() - image) * ~holes).square().sum()
    top, bottom = add(torch.stack([top, 3.0 * (~holes).sum()]))
    return top / bottom


# ----------------------------------------------------------------------------------- data, model

def dataset(cfg, split):
    return data.Dataset(cfg.data, cfg.root, split, size=cfg.size, train=split == "train",
                        flip=cfg.flip, seed=cfg.seed, palette=cfg.palette or None,
                        in_memory=cfg.in_memory)


def build(cfg, classes):
    """The network f with random weights."""
    if cfg.model.startswith("levit"):
        return LeViTUNet(classes, cfg.model, cfg.size)
    return {"unet": UNet, "unetpp": UNetPlusPlus}[cfg.model](classes, cfg.width)


def parameters(f):
    return sum(p.numel() for p in f.parameters())


def mask_source(cfg):
    """The bank of training masks, (n, S, S) bool, True keeps: drawn, or the pictures in --masks
    (pick() shifts these too, which leaves a seam at the border).

    Says what share they remove, and what it would be the other way round. Raises UserError if
    there are none.
    """
    if not cfg.masks:
        with data.waiting(f"drawing {cfg.bank} masks"):
            return mask_bank(cfg.bank, cfg.size, *COVERAGE[cfg.coverage], common.seed_of(cfg.seed))
    if not Path(cfg.masks).is_dir():
        raise UserError(f"--masks {cfg.masks}: no such folder")
    found = [np.asarray(Image.fromarray(data.read_image(path)).convert("L").resize(
        (cfg.size, cfg.size), Image.BILINEAR)) >= 128 for path in data.pictures(Path(cfg.masks))]
    bank = torch.from_numpy(np.stack(found)) if found else torch.zeros(0, dtype=torch.bool)
    if bank.all() or not bank.any():
        raise UserError(f"--masks {cfg.masks}: no pictures in it that remove a part: give masks "
                        "with 0 where the picture is removed and 255 where it is kept, or the "
                        "reverse with --masks-remove bright")
    bright = 100 * bank.float().mean().item()
    if os.environ.get("RANK", "0") == "0":
        print(f"--masks: removes what is {cfg.masks_remove}: dark are {100 - bright:.1f} % and "
              f"bright {bright:.1f} % on average; --masks-remove dark|bright says which")
    return bank if cfg.masks_remove == "dark" else ~bank


def to_input(image, device):
    """uint8 (B, 3, S, S) -> float in [-1, 1] on the device, all channels of a pixel together in
    memory: a U-Net's step takes 560 ms instead of 637, in bf16 298 instead of 370 (one CPU core).
    """
    image = image.to(device, non_blocking=True, memory_format=torch.channels_last)
    return image.float() / 127.5 - 1


LEVIT_RELEASE = {name: f"https://dl.fbaipublicfiles.com/LeViT/LeViT-{file}.pth" for name, file in (
    ("levit128s", "128S-96703c44"), ("levit192", "192-92712e41"), ("levit384", "384-9bdaf2e2"))}
MASKSUP_RELEASE = "https://github.com/hasibzunair/masksup-segmentation/releases"
OUR_NAMES = (           # how names begin in LeViT's release (the first two) and in MaskSup's: ours
    (r"patch_embed", "levit.patch_embed"), (r"blocks", "levit.blocks"),
    (r"cnn_b(\d)\.0", lambda m: f"levit.patch_embed.{2 * int(m[1]) - 2}"),
    (r"block_\d", "levit.blocks"),
    (r"decoderBlock_(\d)\.conv(\d)\.(\d)", lambda m:
     f"up.{int(m[1]) - 1}.{3 * int(m[2]) - 3 + int(m[3])}"),
    (r"conv(\d)_(\d)\.(conv|bn)(\d)", lambda m:
     f"node.{m[1]}{m[2]}.{3 * int(m[4]) - 3 + (m[3] == 'bn')}"),
    (r"segmentation_head\.0", "head"), (r"final", "head"), (r"(.*)attention_bias_idxs", r"\1index"),
    (r"node\.(\d)0", r"down.\1"), (r"node\.(\d)\d", lambda m: f"up.{3 - int(m[1])}"),  # of unet
)


def our_name(name, model):
    """A tensor's name in LeViT's or MaskSup's release -> its name in our network."""
    for pattern, ours in OUR_NAMES if model == "unet" else OUR_NAMES[:-2]:
        name = re.sub(rf"^{pattern}(?=\.|$)", ours, name)
    return name


def load_pretrained(f, cfg, whole=False):
    """--pretrained: copy the weights of LeViT's release into the encoder, or those of MaskSup's
    release into all of f, and say what was not copied. whole: accept the second alone.

    LeViT's were trained on pictures normalised by ImageNet's mean and deviation, not to [-1, 1]:
    BatchNorm takes up the difference. MaskSup's for two classes have one channel z before a
    sigmoid: here logits (0, z). The map of names was tested on tensors of the released names and
    shapes, against the released code's answers to 1e-4; it was not tried on the released files.
    (Nor do these answers hang on attention biases or on how LeViT's coarsest map is enlarged.)
    Raises UserError if they are those of another network.
    """
    url = MASKSUP_RELEASE if whole else LEVIT_RELEASE.get(cfg.model, MASKSUP_RELEASE)
    read = data.published(cfg.pretrained, url, "model")
    theirs = {our_name(k.removeprefix("module."), cfg.model): read[k] for k in sorted(read)
              if torch.is_tensor(read[k])}
    mine, whole = f.state_dict(), whole or "head.weight" in theirs
    index = {k: t for k, t in f.named_buffers() if k not in mine}   # the distance of each two
    for k in {"head.weight", "head.bias"} & theirs.keys():
        if len(theirs[k]) == 1 and len(mine[k]) == 2:
            theirs[k] = torch.cat([torch.zeros_like(theirs[k]), theirs[k]])
    fits = {k: v for k, v in theirs.items()
            if k in mine | index and v.shape == (mine | index)[k].shape}
    wanted = [k for k in mine if whole or k.startswith("levit.")]
    fresh = sorted(set(wanted) - fits.keys())
    if not wanted or fresh and (whole or not all(k.endswith("attention_biases") for k in fresh)):
        raise UserError(f"--pretrained {cfg.pretrained}: not the weights of {cfg.model} with "
                        f"{len(mine['head.bias'])} classes at --size {cfg.size}; give those of "
                        f"{url}, or another --model")
    for k, v in fits.items():
        (mine | index)[k].copy_(v)                                  # these share memory with f's
    if os.environ.get("RANK", "0") == "0":
        unused = sorted({k.split(".")[0] for k in theirs if k not in mine | index})
        print(f"pretrained: {len(fits.keys() & mine.keys())} of the "
              f"{'network' if whole else 'encoder'}'s {len(wanted)} tensors"
              + (f"; fresh at this size: {', '.join(fresh).replace('levit.', '')}" if fresh else "")
              + (f"; not used: {', '.join(unused)}" if unused else ""))
    return f


# ------------------------------------------------------------------------------- train, evaluate

def picture_iou(prediction, target, classes, void=True):
    """MaskSup's measure, (B,) float in percent; its paper_iou is the mean over the pictures.

    prediction, target: (B, H, W) ints. Two classes: the IoU of class 1, void (255) left out, 100
    where it is in neither. More: the IoU micro-averaged over the classes, that is pixels right
    over (pixels right + 2 x pixels wrong), void counted as class 0 as in the released code, or
    left out (void=False).
    """
    prediction, target = prediction.flatten(1), target.flatten(1)
    if classes == 2:
        both = ((prediction == 1) & (target == 1)).sum(1).float()
        either = (((prediction == 1) | (target == 1)) & (target != 255)).sum(1)
        return 100 * torch.where(either > 0, both / either.clamp(min=1), 1.0)
    counted = (target != 255) | void
    right = ((prediction == target.masked_fill(target == 255, 0)) & counted).sum(1)
    return 100 * right / (2 * counted.sum(1) - right).clamp(min=1)


@torch.no_grad()
def evaluate(f, loader, cfg, machine, info, corrupt=None, bank=None):
    """Score the network f. corrupt: a bank of masks to hold before the pictures (Fig. 6); bank: one
    for M_holes, to compare the branches. A picture's mask is fixed by (seed, index).

    Returns, in percent: miou, dice (their means over the classes), class_iou and classes (both of
    each by name), from one confusion matrix over all pictures at size S; paper_iou, the paper's
    own measure (picture_iou), and the same without void; constant, the miou of the best answer
    that is the same class everywhere; and the loss, CE. Void is not counted, except in paper_iou
    of more than two classes. With a bank also tasksim, L_tasksim between M_p and M_pm (S 2).
    """
    net = MaskSup(f).eval()
    N, device = len(info.classes), machine.device
    counts = torch.zeros(N, N, dtype=torch.int64, device=device)
    sums = torch.zeros(6, device=device)    # CE, its pixels, IoUs (two), tasksim, pictures
    for image, label, index in loader:
        image, label = to_input(image, device), label.to(device, non_blocking=True)
        noise = noise_of([common.seed_of(cfg.seed, i) for i in index.tolist()]).to(device)
        if corrupt is not None:
            image = image * pick(corrupt, noise)
        with machine.autocast():
            M_p, M_pm = net(image, None if bank is None else pick(bank, noise))
        answer = M_p.argmax(1)
        counts += common.confusion(answer, label, N)
        each, without = (picture_iou(answer, label, N, void).sum() for void in (True, False))
        valid = (label != common.VOID).sum()
        similar = valid * 0.0 if bank is None else task_similarity(M_p, M_pm) * len(label)
        sums += torch.stack([cross_entropy(M_p, label) * valid, valid.float(), each, without,
                             similar, torch.full_like(each, len(label))])
    common.all_reduce(counts, sums)
    iou = common.class_iou(counts)
    dice = 200 * iou / (100 + iou)
    return {"miou": iou.nanmean().item(), "dice": dice.nanmean().item(), "class_iou": iou.tolist(),
            "classes": {name: {"iou": a, "dice": b}
                        for name, a, b in zip(info.classes, iou.tolist(), dice.tolist())},
            "paper_iou": (sums[2] / sums[5]).item(), "constant": common.constant_miou(counts),
            "paper_iou_without_void": (sums[3] / sums[5]).item(),
            "loss": (sums[0] / sums[1].clamp(min=1)).item(),
            **({} if bank is None else {"tasksim": (sums[4] / sums[5]).item()})}


def train_step(net, optimizer, scaler, machine, cfg, image, label, holes):
    """One step on uint8 (B, 3, S, S) and (B, S, S), with M_holes (B, 1, S, S) or None on the
    device. Returns loss and terms (4,), which stay on the device."""
    with machine.autocast():
        M_p, M_pm = net(to_input(image, machine.device), holes)
    alpha = cfg.alpha1, cfg.alpha2, cfg.alpha3 if cfg.method == "masksup" else 0
    loss, terms = loss_fn(M_p, M_pm, label.to(machine.device, non_blocking=True), alpha,
                          add=machine.sum)
    descend(loss, optimizer, scaler)
    return torch.cat([loss.detach()[None], terms])


def descend(loss, optimizer, scaler):
    optimizer.zero_grad(set_to_none=True)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()


def make_optimizer(model, cfg, fused=None):
    kind = dict(lr=cfg.lr, weight_decay=cfg.weight_decay, fused=fused)
    if cfg.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), **kind)
    return torch.optim.SGD(model.parameters(), momentum=0.9, **kind)


def rate(step, cfg, per_epoch, total):
    """The learning rate of a step, of `total` in all."""
    if step < cfg.warmup:                                                 # 1. it rises
        return cfg.lr * (step + 1) / cfg.warmup
    if cfg.schedule == "step":                                            # 2. x 0.1, released code
        return cfg.lr * 0.1 ** (step // per_epoch // 60)
    if cfg.schedule == "cosine":                                          # 3. to 0, half a cosine
        done = (step - cfg.warmup) / max(1, total - cfg.warmup)
        return cfg.lr * (1 + math.cos(math.pi * done)) / 2
    return cfg.lr                                                         # 4. it stays


TERMS = ("loss", "loss_seg", "loss_context", "loss_tasksim")


def train(cfg):
    """The training run, from top to bottom."""
    machine = common.Machine(cfg)
    out, device = Path(cfg.out), machine.device
    train_set, val_set = dataset(cfg, "train"), dataset(cfg, data.eval_split(cfg.data))
    beside = {split: dataset(cfg, split) for split in data.splits_beside(cfg.data)}
    info, per_epoch = train_set.info, data.steps_per_epoch(len(train_set), cfg.batch_size)
    common.default_epochs(cfg, per_epoch)
    total = cfg.epochs * per_epoch
    bank = mask_source(cfg).to(device)

    torch.manual_seed(common.seed_of(cfg.seed))
    f = build(cfg, len(info.classes)).to(device, memory_format=torch.channels_last)
    if cfg.pretrained != "none" and not common.resuming(cfg):
        load_pretrained(f, cfg)
    if cfg.init and not common.resuming(cfg):
        common.load_weights(f, cfg.init, "masksup", len(info.classes))
    optimizer, scaler = make_optimizer(f, cfg, machine.fused), machine.scaler()
    run = common.Run(cfg, "masksup", machine, info, data.labeled_hash(train_set.items),
                     dict(model=f, optimizer=optimizer, scaler=scaler), TERMS,
                     min(total, cfg.max_steps or total), per_epoch,
                     may_differ={"epochs"} if cfg.schedule == "constant" else set())
    if cfg.pretrain == "mae" and run.step == 0:
        run.seconds = pretrain(f, train_set, cfg, machine, run.interrupt)

    net = common.parallel(MaskSup(torch.compile(f) if cfg.compile else f), machine)
    loader = data.train_loader(train_set, cfg.batch_size // machine.world, seed=cfg.seed,
                               start=run.start, stop=run.stop, **machine.loading)
    val_loader = data.eval_loader(val_set, cfg.batch_size, **machine.loading)
    run.announce(f"{parameters(f) / 1e6:.1f} M parameters, {len(train_set)} training and "
                 f"{len(val_set)} {data.eval_split(cfg.data)} pictures, {len(bank)} masks that "
                 f"remove {100 - 100 * bank.sum().item() / bank.numel():.0f} % on average")
    for step, (image, label, index) in zip(range(run.start, run.stop), loader):
        # 1. the rate
        for group in optimizer.param_groups:
            group["lr"] = rate(step, cfg, per_epoch, total)

        # 2. one step: its draws hang on (seed, step) and on (seed, epoch, index), nothing else,
        #    so that a resumed run repeats what an unbroken one does
        net.train()
        torch.manual_seed(common.seed_of(cfg.seed, step, machine.rank))             # LeViT drops
        holes = None
        if cfg.method != "base":
            noise = noise_of([common.seed_of(cfg.seed, step // per_epoch, i)
                              for i in index.tolist()])
            holes = pick(bank, noise.to(device, non_blocking=True))
        terms = train_step(net, optimizer, scaler, machine, cfg, image, label, holes)

        # 3. evaluate, log, save
        due = run.note(step, terms, (train_set, index))
        if due == "evaluate":
            scores = evaluate(f, val_loader, cfg, machine, info, bank=bank)
            run.log(scores, "miou", said(scores, cfg), val_loss=scores["loss"],
                    val_loss_tasksim=scores["tasksim"], miou=scores["miou"],
                    paper_iou=scores["paper_iou"])
        if due:
            run.save()

    more = {split: evaluate(f, data.eval_loader(pictures, cfg.batch_size, **machine.loading), cfg,
                            machine, info) for split, pictures in beside.items()}
    # the paper's number: of the epoch that is best on the very set it is measured on
    more["paper_iou_best_epoch"] = max(row["paper_iou"] for row in run.history)
    if machine.main:
        draw_samples(f, val_set, cfg, machine, info, bank, run.scores, out / "samples.png")
        write_metrics(out, run.state(), cfg, f, more)


def said(scores, cfg):
    """The scores in a line; paper_iou for the paper's sets only."""
    shown = {"mIoU": "miou"}
    if cfg.data in ("glas", "polyp", "nyuv2"):
        shown["paper_iou"] = "paper_iou"
    if cfg.data == "nyuv2":
        shown["without void"] = "paper_iou_without_void"
    return ", ".join(f"{title} {scores[key]:.2f}" for title, key in shown.items())


def write_metrics(out, state, cfg, f, more):
    """OUT/metrics.json of a checkpoint's state and what is given, and its scores on the screen."""
    scores = state["scores"]
    metrics = {**scores, "epoch": state["history"][-1]["epoch"], "steps": state["step"],
               "seconds": state["seconds"], "params": parameters(f), "method": cfg.method,
               "model": cfg.model, **more}
    common.write_json(Path(out) / "metrics.json", metrics)
    beside = {split: s for split, s in more.items() if isinstance(s, dict) and "miou" in s}
    for split, s in {"": scores, **beside}.items():
        each = (f"{name} {of['iou']:.1f} / {of['dice']:.1f}" for name, of in s["classes"].items()
                if of["iou"] == of["iou"])                             # not nan: in no picture
        similar = f"; tasksim {s['tasksim']:.4f}" if "tasksim" in s else ""
        print(textwrap.fill(f"{split} IoU / Dice: {', '.join(each)}; mean {s['miou']:.1f} / "
                            f"{s['dice']:.1f}{similar}".strip(), 100, subsequent_indent="  "))
    print(f"{said(scores, cfg)} (the best constant answer {scores['constant']:.2f})"
          + "".join(f"; {split}: {said(s, cfg)}" for split, s in beside.items()) + f"  -> {out}")


# the rows of samples.png
ROWS = "image", "ground truth", "prediction", "image with holes", "prediction from holes"


@torch.no_grad()
def draw_samples(f, val_set, cfg, machine, info, bank, scores, path, n=6):
    """samples.png: n images, their ground truth and prediction M_p; the images with holes, and the
    prediction M_pm from these. Returns these five rows, as draw_sheet() takes them."""
    f.eval()
    chosen = range(0, len(val_set), max(1, len(val_set) // n))[:n]
    image, label, _ = zip(*(val_set[i] for i in chosen))
    x, label = to_input(torch.stack(image), machine.device), torch.stack(label)
    holes = pick(bank, noise_of([common.seed_of(cfg.seed, i) for i in chosen]).to(machine.device))
    with machine.autocast():
        M_p, M_pm = f(x).argmax(1), f(x * holes).argmax(1)

    def shown(x):
        return list(((x + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy())

    truth, whole, holed = (list(common.colorize(labels.cpu(), info.colors))
                           for labels in (label, M_p, M_pm))
    rows = [shown(x), truth, whole, shown(x * holes), holed]
    common.draw_sheet(path, rows, ROWS, info, f"{cfg.method}: {said(scores, cfg)}")
    return rows


# ----------------------------------------------------------- --pretrain mae: Table 2's other side

def pretrain(f, train_set, cfg, machine, interrupt):
    """Teach f to paint in removed patches, as a masked autoencoder, before it is fine-tuned.

    The same network with three channels in place of the classes sees pictures without a share
    mae_ratio of their patches, and is to give those pixels back (painting_loss). All its weights
    but the head's then go into f. Its checkpoint, where --resume goes on from, is OUT/pretrain.pt.
    Returns the seconds it took.
    """
    device, per_epoch = machine.device, data.steps_per_epoch(len(train_set), cfg.batch_size)
    total = cfg.pretrain_epochs * per_epoch
    autoencoder = build(cfg, 3).to(device, memory_format=torch.channels_last)

    def copy(source, target):
        target.load_state_dict({k: v for k, v in source.state_dict().items()
                                if not k.startswith("head.")}, strict=False)

    copy(f, autoencoder)                                  # --pretrained or --init come before
    optimizer, scaler = make_optimizer(autoencoder, cfg, machine.fused), machine.scaler()
    run = common.Run(cfg, "masksup pretraining", machine, train_set.info,
                     data.labeled_hash(train_set.items),
                     dict(model=autoencoder, optimizer=optimizer, scaler=scaler), ["loss"], total,
                     per_epoch, interrupt=interrupt, last="pretrain.pt")
    net = common.parallel(torch.compile(autoencoder) if cfg.compile else autoencoder, machine)
    loader = data.train_loader(train_set, cfg.batch_size // machine.world, seed=cfg.seed,
                               start=run.start, stop=total, **machine.loading)
    run.announce("first, painting in removed patches")
    for step, (image, _, index) in zip(range(run.start, total), loader):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, cfg, per_epoch, total)
        net.train()
        torch.manual_seed(common.seed_of(cfg.seed, step, machine.rank))
        seeds = [common.seed_of(cfg.seed, step // per_epoch, i) for i in index.tolist()]
        noise = noise_of(seeds, (cfg.size // cfg.mae_patch) ** 2).to(device, non_blocking=True)
        holes = patch_holes(noise, cfg.size, cfg.mae_patch, cfg.mae_ratio)
        image = to_input(image, device)
        with machine.autocast():
            painted = net(image * holes)
        loss = painting_loss(painted, image, holes, machine.sum)
        descend(loss, optimizer, scaler)
        due = run.note(step, loss.detach()[None], (train_set, index))
        if due == "evaluate":
            run.say(f"pretraining, epoch {run.step / per_epoch:6.2f}  loss "
                    f"{run.means()['loss']:.4f}  {run.seconds:.0f} s")
        if due:
            run.save()
    copy(autoencoder, f)
    return run.seconds


# ----------------------------------------------------------------------------- the other commands

def load(path):
    return common.load(path, "masksup", Config, data.Info, build)


def shares_of(text):
    """'0.1,0.3' -> [0.1, 0.3]. Raises UserError for what are no shares of a picture."""
    try:
        shares = sorted({float(word) for word in text.split(",") if word.strip()})
        if all(0 < share <= 0.95 for share in shares):
            return shares
    except ValueError:
        pass
    raise UserError(f"--corrupt {text}: expected shares above 0 and up to 0.95, such as 0.1,0.3")


def run_names(configs):
    """{path: Config} of checkpoints -> {path: name}: the method and, with holes, their coverage;
    where these are equal also the run's folder and the checkpoint's name."""
    names = {path: cfg.method + f" {cfg.coverage}" * (cfg.method != "base")
             for path, cfg in configs.items()}
    for name in {*names.values()}:
        paths = [path for path in names if names[path] == name]
        if len(paths) > 1:
            for path in paths:
                names[path] += f" ({Path(path).resolve().parent.name}-{Path(path).stem})"
    return names


def evaluate_only(cfg, origin):
    """--eval A.pt [B.pt ..]: scores of each; with --corrupt, also with parts of the pictures
    removed (Fig. 6), as a table and as OUT/robustness.png with a line for each checkpoint.

    All checkpoints of one size see the same holes, whose share is right to one percent of the
    picture. metrics.json is written to OUT, for several checkpoints to OUT/RUN-CHECKPOINT each,
    with one sheet of their answers (Fig. 3, 4) and one picture of their curves (S 2-3) in OUT.
    --eval --pretrained FILE: of MaskSup's release instead.
    """
    shares, curves, paths = shares_of(cfg.corrupt), {}, cfg.eval or (cfg.pretrained,)
    configs, rows, histories = {}, {}, {}
    out = Path(cfg.out if origin.get("out") == "flag" else Path(paths[0]).parent / "eval")
    machine = common.Machine(cfg)
    for path, folder in common.result_folders(paths, out).items():
        if cfg.eval:
            theirs, info, f, state = load(path)
            here = common.checkpoint_config(cfg, origin, path, theirs, check, "eval", "corrupt",
                                            "data", "palette", "batch_size", "seed")
        else:
            check(cfg)
            here, info = cfg, data.info(cfg.data, cfg.root, cfg.palette or None)
            f = load_pretrained(build(here, len(info.classes)).eval(), here, whole=True)
            state = {"history": [{"step": 0, "epoch": 0}], "step": 0, "seconds": 0.0}
        here = configs[path] = replace(here, seed=cfg.seed)        # of the holes, one for all
        val_set = dataset(here, data.eval_split(here.data))
        if val_set.info.classes != info.classes:
            raise UserError(f"--data {here.data} has other classes than {path} was trained for")
        f.to(machine.device)

        def score(pictures, *banks):
            loader = data.eval_loader(pictures, here.batch_size, **machine.loading)
            return evaluate(f, loader, here, machine, info, *banks)

        holes = mask_bank(64, here.size, *COVERAGE["high"], common.seed_of(cfg.seed))
        holes = holes.to(machine.device)
        curve = curves[path] = {0.0: score(val_set, None, holes)}
        for share in shares:
            bank = mask_bank(64, here.size, max(0, share - 0.01), share + 0.01,
                             common.seed_of(cfg.seed, round(1000 * share)))
            curve[share] = score(val_set, bank.to(machine.device))
        more = {split: score(dataset(here, split)) for split in data.splits_beside(here.data)}
        if shares:
            more["corrupt"] = {f"{share:g}": {k: scores[k] for k in ("miou", "paper_iou", "loss")}
                               for share, scores in curve.items()}
        if machine.main:
            rows[path] = draw_samples(f, val_set, here, machine, info, holes,
                                      curve[0.0], folder / "samples.png")
            histories[path] = state["history"]
            write_metrics(folder, {**state, "scores": curve[0.0]}, here, f, more)
    names = run_names(configs)
    if len(rows) > 1 and len({here.data for here in configs.values()}) == 1:
        image, truth, _, holed, _ = rows[path]
        common.draw_sheet(
            out / "samples.png", [image, truth, *(r[2] for r in rows.values()), holed,
                                  *(r[4] for r in rows.values())],
            [*ROWS[:2], *(f"{ROWS[2]}, {names[path]}" for path in rows),
             ROWS[3], *(f"{ROWS[4]}, {names[path]}" for path in rows)], info,
            "mIoU: " + ", ".join(f"{names[path]} {curve[0.0]['miou']:.2f}"
                                 for path, curve in curves.items()))
        common.compare_curves({names[path]: rows for path, rows in histories.items()},
                              out / "curves.png", {"val_loss_tasksim": "L_tasksim",
                                                   "miou": "mIoU, %"})
    if shares and machine.main:
        lines = {names[path]: [score["miou"] for score in curve.values()]
                 for path, curve in curves.items()}
        print(f"\n{'mIoU':24}" + "".join(f"{100 * s:7.0f} %" for s in (0, *shares)))
        for name, line in lines.items():
            print(f"{name:24}" + "".join(f"{value:9.2f}" for value in line))
        common.draw_panels(out / "robustness.png", [(
            [100 * s for s in (0, *shares)], lines, "share of the image removed, %", "mIoU, %")])


@torch.no_grad()
def segment(f, image, cfg, machine):
    """Segment one picture: uint8 (H, W, 3) -> class indices uint8 (H, W), and their probability,
    float32 (H, W).

    It is resized to the size of training, and the logits back to its own. Above 2048 pixels a side
    the answer, not the logits, is enlarged: N planes of floats would not fit.
    """
    small = Image.fromarray(image).resize((cfg.size, cfg.size), Image.BILINEAR)
    small = torch.from_numpy(np.array(small)).permute(2, 0, 1)[None]
    with machine.autocast():
        logits = f(to_input(small, machine.device)).float()
    H, W = image.shape[:2]
    logits = F.interpolate(logits, (min(H, 2048), min(W, 2048)), mode="bilinear")
    top, answer = logits.max(1)
    sure = 1 / logits.sub_(top[:, None]).exp_().sum(1)          # the softmax of the class answered
    return tuple(np.array(Image.fromarray(one[0].cpu().numpy()).resize((W, H), Image.NEAREST))
                 for one in (answer.to(torch.uint8), sure))


def bench(cfg):
    """--bench N: parameters, multiply-adds of f, and for N > 0 the time of a training step with
    each --method. The last line is one JSON object, of the method asked for."""
    machine, info = common.Machine(cfg), data.info(cfg.data, cfg.root, cfg.palette or None)
    N, S, B, device = len(info.classes), cfg.size, cfg.batch_size, machine.device
    with torch.device("meta"):           # shapes without numbers: counting takes no memory
        f = build(cfg, N).eval()
        gmacs = common.macs(f, torch.empty(1, 3, S, S))
    result = {"params": parameters(f), "gmacs": round(gmacs, 3)}
    if cfg.bench > 0:
        torch.manual_seed(cfg.seed)
        f = build(cfg, N).to(device, memory_format=torch.channels_last).train()
        net = MaskSup(torch.compile(f) if cfg.compile else f)
        optimizer, scaler = make_optimizer(f, cfg, machine.fused), machine.scaler()
        image = torch.randint(0, 256, (B, 3, S, S), dtype=torch.uint8).to(device)
        label = torch.randint(0, N, (B, S, S), dtype=torch.uint8).to(device)
        bank = mask_bank(8, S, *COVERAGE[cfg.coverage], common.seed_of(cfg.seed)).to(device)
        noise = torch.rand(B, 6).to(device)
        for method in "base", "cb", "masksup":
            this = replace(cfg, method=method)
            timed = common.time_steps(
                lambda i: train_step(net, optimizer, scaler, machine, this, image, label,
                                     None if method == "base" else pick(bank, noise)),
                cfg.bench, B, device, gmacs * B * (1 if method == "base" else 2))
            print(f"{method:8s}{timed['ms_per_step']:8.1f} ms for a batch of {B}, "
                  f"{timed['img_per_s']:.1f} img/s, {timed['tflops']:.3g} TFLOP/s")
            result |= timed if method == cfg.method else {}
    print(json.dumps(result))


# ------------------------------------------------------------------------------------------ main

def check(cfg):
    """What the parser cannot judge. Raises UserError."""
    common.at_least(cfg, 1, "batch_size", "size", "width", "bank", "eval_every",
                    "pretrain_epochs", "mae_patch")
    common.at_least(cfg, -1, "bench")
    common.at_least(cfg, 0, "epochs", "max_steps", "weight_decay", "alpha1", "alpha2", "alpha3",
                    "warmup", "threads", "save_every", "in_memory")
    if not 0 < cfg.lr < math.inf:
        raise UserError(f"--lr {cfg.lr}: expected a number above 0")
    least = 80 if cfg.model.startswith("levit") else 32     # BatchNorm needs more than one value
    if cfg.size % 16 or cfg.size < least:
        raise UserError(f"--size {cfg.size}: for {cfg.model} a multiple of 16 from {least} on")
    n = (cfg.size // cfg.mae_patch) ** 2
    if cfg.pretrain == "mae" and (cfg.size % cfg.mae_patch or not 1 <= n * cfg.mae_ratio < n):
        raise UserError(f"--mae-patch {cfg.mae_patch} --mae-ratio {cfg.mae_ratio}: --size must be "
                        "a multiple of the patch, and at least one patch be removed and one kept")
    if cfg.pretrained == "imagenet" and not cfg.model.startswith("levit"):
        raise UserError("--pretrained imagenet: there are weights for LeViT only, not for "
                        f"{cfg.model}")


def main():
    cfg, origin = common.parse(Config, RECIPES, __doc__, alone={"eval"})
    cfg.out = cfg.out or str(Path("out") / f"masksup-{Path(cfg.data).name}")
    if origin.get("pretrained") == "recipe" and (cfg.init or not cfg.model.startswith("levit")):
        cfg.pretrained = "none"
        del origin["pretrained"]
    if cfg.predict:
        return common.predict_folder(cfg, origin, load, check, data, segment, "seed")
    if "eval" in origin:
        if not cfg.eval and origin.get("pretrained") != "flag":
            raise UserError("--eval: give checkpoints, or --pretrained FILE, MaskSup's release")
        return evaluate_only(cfg, origin)
    if cfg.pretrain == "mae":                       # Table 2: a baseline of MaskSup, in two stages
        for name, value in ("epochs", 50), ("method", "base"):
            if origin.get(name) != "flag":
                setattr(cfg, name, value)
                origin[name] = "pretrain"
    check(cfg)
    if cfg.corrupt or cfg.ckpt or cfg.to:
        raise UserError("--corrupt goes with --eval, --ckpt and --to with --predict")
    common.show_config(cfg, origin)
    if cfg.bench >= 0:
        bench(cfg)
    else:
        train(cfg)


if __name__ == "__main__":
    common.run(main)
