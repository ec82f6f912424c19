r"""MaskSup, masked supervised learning: segment an image and a copy of it that is full of holes.

    I                      -> f -> M_p     segmentation branch, L_seg = CE(M_p, M_gt)
    I_masked = I * M_holes -> f -> M_pm    context branch, L_context = CE(M_pm, M_gt)      Eq. 1-2
    L = L_seg + L_context + L_tasksim,     L_tasksim = MSE(softmax M_p, softmax M_pm)      Eq. 3

f is any segmentation network, the same in both branches. At test time there are no holes, and
prediction costs as much as f alone. Zunair and Ben Hamza, "Masked supervised learning for semantic
segmentation", BMVC 2022; equations, tables and figures have the paper's numbers, S 1 to S 7 those
of its supplement.
Lines 173 to 358 are the method (branches, masks, loss, training step), the rest is plumbing.

    python masksup.py                                       # drawn images, CPU, two minutes
    python masksup.py --data glas                           # as released: from LeViT's weights
    python masksup.py --data glas --pretrained none         # from random weights
    python masksup.py --predict IMAGES --ckpt out/masksup-glas/best.pt --to DIR
    python masksup.py --eval --pretrained masksupglas76.06iou.pth --data glas   # MaskSup's release
    torchrun --nproc_per_node=4 masksup.py --data glas      # several GPUs

The paper's tables and figures; D is glas, polyp or nyuv2:
    Table 1     --data D; baselines: --method base --model unet|unetpp|levit128s|levit192|levit384.
                The other networks of the table are not here.
    Table 2     --data D; MAE: --data D --pretrain mae
    Table 3     --data D --coverage low|high
    Table 4     --data D --model levit192; --data nyuv2 --model unet --width 20 (3 M parameters);
                with --bench 0 the parameters alone
    Fig. 1      python data.py --data D draws images with their labels
    Fig. 2      not here: a diagram; the class MaskSup is what it shows
    Fig. 3, 4   --eval A/last.pt B/last.pt writes samples.png; also S 5 (nyuv2), 6, 7
    Fig. 5      --data D --method base|cb|masksup
    Fig. 6      --eval A/last.pt B/last.pt --corrupt 0.1,0.3,0.5,0.7; also S 4
    S 1         the row "image with holes" of samples.png, of every run
    S 2, 3      --eval A/last.pt B/last.pt writes curves.png: L_tasksim and mIoU during training

Results, reduced to U-Nets of width 16 (2.0 M parameters) from scratch on a CPU (AMD EPYC, torch
2.13.0): mIoU of the last epoch, mean of seeds 0, 1, 2 (range).
                         base               cb                 masksup
    default run          93.0 (92.6-93.2)   90.7 (90.3-91.1)   90.1 (89.9-90.1)
      30 % removed       56.3 (55.6-57.1)   75.4 (74.1-76.7)   75.6 (74.4-77.5)
      50 % removed       35.5 (35.0-36.2)   58.0 (55.6-60.3)   59.0 (56.7-62.1)
    GlaS, low            73.6 (73.0-74.3)   75.2 (74.8-76.0)   76.1 (75.8-76.5)
    GlaS, high                              73.7 (71.6-75.4)   73.6 (71.0-74.9)
    CamVid, validation   44.6 (42.7-46.7)   43.9 (42.2-46.3)   44.6 (42.6-47.0)
    CamVid, test         36.5 (35.9-36.9)   36.9 (36.8-37.1)   37.3 (36.9-38.0)
    CVC 62, low          77.4 (74.9-78.6)   75.6 (74.6-77.4)   76.4 (74.9-77.8)
    CVC 62, high                            73.3 (73.0-74.0)   70.8 (69.8-71.5)
    Kvasir 100, low      70.4 (70.1-70.6)   68.9 (67.8-69.8)   70.6 (70.4-70.8)
    Kvasir 100, high                        68.9 (68.2-69.5)   68.1 (67.3-68.7)
    python masksup.py --threads 1 --method masksup --seed 0         # then --eval .. --corrupt
    python masksup.py --data glas --size 112 --epochs 100 --eval-every 10 FLAGS
    python masksup.py --data camvid --size 96 --epochs 20 --eval-every 20 --optimizer adam \
        --threads 1 FLAGS
    python masksup.py --data polyp --size 96 --epochs 4 --eval-every 4 --threads 1 FLAGS
    FLAGS: --model unet --width 16 --batch-size 8 --lr 1e-3 --schedule cosine --warmup 50 --amp bf16
           --coverage low
- Default run: with holes masksup is far ahead of base, on whole images behind it. Seeds 0 to 4, one
  thread or two: 89.6 to 90.5, mean 90.1.
- GlaS, 85 training and 80 test images. With low coverage the order is the paper's; with high, the
  paper's choice, whole images gain nothing. GlaS has no validation set: this is the test set.
- CamVid, 11 classes, 900 steps. With L_tasksim divided by pixels x classes instead of 2 x pixels
  (--alpha3 0.1818) 44.1 (42.5-46.8) and 37.7 (37.6-37.7): noise.
- Polyps, one training set of Kvasir-SEG and CVC-ClinicDB, 724 steps: so short a run is best with
  base. CVC-ClinicDB's frames come from 29 videos, so that its 62 have near twins in training.
- The paper's U-Net in its setting (7.9 M parameters, 224 x 224, 200 epochs, coverage high) on an
  H200 (bf16, torch 2.11), GlaS, seeds 0, 1: base 70.8, 72.8, cb 73.4, 72.1, masksup 71.2, 73.7, the
  same within noise. On images with holes base 40.6, 41.0, cb 48.7, 51.8, masksup 49.8, 54.1.
    python masksup.py --data glas --model unet --pretrained none --eval-every 10 --workers 0 \
        --threads 1 --method masksup --seed 0
  Their paper_iou is 71.4, 73.0 / 72.9, 71.5 / 70.4, 73.6. Fig. 5 (from the release) has 67.41 /
  67.81 / 68.32, on polyps 69.74 / 72.51 / 73.60, on NYUv2 33.60 / 38.26 / 38.54, at the epoch that
  is best on the test set. LeViT-UNet and U-Net++ are built and counted, but have not been trained.

Departures from the paper, and what it leaves open:
- L_tasksim is half the squared distance of the probabilities, mean over the pixels: 0 to 1 for any
  number of classes and image size. The paper has a norm, which grows with the image; the released
  NYUDv2 script compares the argmax, without a gradient.
- Binary sets have two classes and a softmax; the released networks one channel and a sigmoid.
- M_holes is drawn by draw_mask(). The paper gives no figures for "high" and "low" (Table 3), only
  "roughly over 50%".
- BatchNorm's running averages follow both passes. Recomputed on whole images alone they give 75.7
  instead of 76.1 (GlaS, low, three seeds), and 58.7 instead of 60.5 with half of the image removed.
- levit384 drops branches (0.1, LeViT's own rate) anew in each of the two passes.
- LeViT-UNet's coarse maps are doubled until large enough, then shrunk, as in the release.
- glas, polyp: Adam and batch 16, as in the paper. The release has amsgrad, weight decay 1e-5 and
  batch 8, averages labels over areas (here: nearest pixel), and leaves LeViT's first convolution
  random (here: ImageNet's).
- nyuv2: learning rate 0.1, as in the paper; its code has 0.01, weight decay 5e-4 and x 0.1 every 60
  epochs. On CamVid (unetpp, width 8, 112 x 112, 20 epochs of constant rate, one seed) 0.1 gave a
  validation mIoU of 40.4, 0.01 with the decay 35.9; L_tasksim was then divided by the classes.
- paper_iou counts void as class 0 in nyuv2, as the released code; paper_iou_without_void does not.
- The last epoch is reported; the paper's choice, the best one on the test set, separately.
- Table 2's MAE is a ViT; here it is f, on images whose removed patches are zero.
- Loading was tested with weights of the released names and shapes, not with the released files.
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
from common import UserError, parameters


# ----------------------------------------------------------------------------------------- config

@dataclass
class Config(common.RunConfig):    # which has seed, device, resume and the like
    data: str = "materials"        # a dataset that data.py lists, or your own folder
    out: str = ""                  # run folder; empty: out/masksup-DATA
    method: Literal["masksup", "cb", "base"] = "masksup"  # Eq. 3; without L_tasksim; L_seg alone
    model: Literal["unet", "unetpp", "levit128s", "levit192", "levit384"] = "levit384"  # network f
    recipe: Literal["auto", "small", "paper"] = "auto"  # auto: small for a folder, else paper
    # training; the defaults are the paper's for GlaS
    epochs: int = 200              # 0: as many as make 3000 steps
    batch_size: int = 16           # images a step, over all processes
    lr: float = 1e-4               # learning rate
    optimizer: Literal["adam", "sgd"] = "adam"  # SGD with momentum 0.9
    weight_decay: float = 0.0      # L2 penalty, not decoupled as in AdamW
    schedule: Literal["constant", "step", "cosine"] = "constant"  # step: x 0.1 every 60 epochs
    warmup: int = 0                # steps over which the learning rate rises to lr
    size: int = 224                # images are resized to size x size, without keeping the aspect
    flip: bool = False             # mirror half of the training images; the paper does not
    coverage: Literal["high", "low"] = "high"  # M_holes removes 50-75 %, or 10-30 % (for Table 3)
    alpha1: float = 1.0            # weight of L_seg in Eq. 3
    alpha2: float = 1.0            # weight of L_context
    alpha3: float = 1.0            # weight of L_tasksim
    # masks, network, weights
    masks: str = ""                # folder of masks to use instead of drawn ones
    masks_remove: Literal["dark", "bright"] = "dark"  # holes in --masks; the released are bright
    bank: int = 256                # number of masks, drawn once a run
    width: int = 32                # channels of the first level of unet and unetpp
    pretrained: str = "none"       # imagenet (downloads LeViT's), a file of LeViT's or MaskSup's
    #                                release, or none: random weights
    pretrain: Literal["none", "mae"] = "none"  # first train as a masked autoencoder (Table 2)
    pretrain_epochs: int = 800     # --pretrain mae: its epochs; then 50 of --method base
    mae_patch: int = 16            # --pretrain mae: side of a patch, in pixels
    mae_ratio: float = 0.75        # --pretrain mae: share of the patches that is removed
    # other commands
    corrupt: str = ""              # --eval: also with these shares removed, e.g. 0.1,0.3,0.5,0.7
    predict: tuple = ()            # images to segment: files, or folders and what is in them
    ckpt: str = ""                 # --predict: the checkpoint
    to: str = ""                   # --predict: new folder for the predictions


SCENES = dict(model="unetpp", optimizer="sgd", lr=0.1, batch_size=8)
RECIPES = {                        # what differs from the defaults above, by dataset
    # a minute and a half on one CPU core
    "materials": dict(model="unet", width=16, size=48, epochs=12, batch_size=8, lr=5e-3,
                      schedule="cosine", warmup=30, coverage="low", eval_every=4, mae_patch=8,
                      pretrain_epochs=10),
    "glas": dict(pretrained="imagenet"), "polyp": dict(pretrained="imagenet"),  # of LeViT alone
    "nyuv2": SCENES,                                    # the paper's
    "voc": SCENES, "camvid": SCENES, "cityscapes": SCENES,      # not in the paper
    # a folder of your own on a laptop: about ten minutes
    "small": dict(model="unet", width=16, size=128, epochs=0, batch_size=8, lr=1e-3,
                  schedule="cosine", warmup=50, coverage="low", flip=True),
}
RECIPES["shapes"] = dict(RECIPES["materials"], size=32, epochs=24)


# --------------------------------------------------------------------------------- model: MaskSup
# To paste this section: import torch.nn as nn.

class MaskSup(nn.Module):
    """The two branches of Fig. 2, which share one network f: (B, 3, S, S) -> (B, N, S, S)."""

    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, image, holes=None):
        """
        image: (B, 3, S, S) float in [-1, 1].  holes: M_holes, (B, 1, S, S), 1 keeps and 0 removes.
        Returns the logits M_p and M_pm, (B, N, S, S) both; M_pm is None without holes.

        Two passes, so that BatchNorm normalises each by the statistics of its own batch.
        """
        M_p = self.f(image)                                               # segmentation branch
        if holes is None:
            return M_p, None
        return M_p, self.f(image * holes)                                 # context branch    Eq. 1


# ---------------------------------------------------------------------------------------- masking
# To paste this section: import numpy as np; import torch; from PIL import Image, ImageDraw.

COVERAGE = {"high": (0.50, 0.75), "low": (0.10, 0.30)}      # shares of the image that are removed


def draw_mask(rng, size, low, high):
    """One M_holes: streaks and holes of arbitrary shape, (size, size) bool, True keeps.

    rng: NumPy's Generator.  low, high: bounds of the share removed, in 0..1.
    Shapes that cross a border continue at the opposite one, so that a mask can be shifted
    cyclically without a seam. Their sizes, relative to the image, are our choice.
    """
    target, scale, mask = rng.uniform(low, high), 1.0, Image.new("1", (size, size), 1)
    removed = 0.0
    while removed < target and scale > 0.02:            # below that, no shape fits any more
        trial = mask.copy()
        draw_shape = streak if rng.random() < 0.7 else hole
        draw_shape(ImageDraw.Draw(trial), rng, size, scale)
        share = 1 - np.asarray(trial).mean()
        if share <= high:
            mask, removed = trial, share
        else:                                           # too much: try a smaller shape
            scale *= 0.7
    return np.asarray(mask)


def streak(draw, rng, size, scale):
    """Draw a thick line of two to six straight segments with round ends."""
    n, angle = rng.integers(2, 7), rng.uniform(0, 2 * np.pi) + rng.normal(0, 0.7, 6).cumsum()
    width = max(1.0, rng.uniform(0.03, 0.12) * size * scale)
    length = rng.uniform(0.08, 0.25, n)[:, None] * size * scale
    ends = (length * np.stack([np.cos(angle[:n]), np.sin(angle[:n])], 1)).cumsum(0)
    for points in cyclic_copies(rng, np.concatenate([np.zeros((1, 2)), ends]), size):
        draw.line(points.ravel().tolist(), fill=0, width=round(width), joint="curve")
        for x, y in points[[0, -1]]:
            draw.ellipse((x - width / 2, y - width / 2, x + width / 2, y + width / 2), fill=0)


def hole(draw, rng, size, scale):
    """Draw a blob: a closed polygon whose radius varies smoothly with the angle."""
    angle = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    waves = sum(rng.uniform(-0.3, 0.3) * np.cos(k * angle + rng.uniform(0, 2 * np.pi))
                for k in (1, 2, 3))
    radius = rng.uniform(0.04, 0.14) * size * scale * (1 + waves)
    outline = radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1)
    for points in cyclic_copies(rng, outline, size):
        draw.polygon(points.ravel().tolist(), fill=0)


def cyclic_copies(rng, points, size):
    """Move the points (P, 2) to a random place, and copy them one image side away in each of the
    eight directions: nine arrays (P, 2)."""
    points = points + rng.uniform(0, size, 2) - (points.min(0) + points.max(0)) / 2
    return [points + np.array([dx, dy]) * size for dx in (-1, 0, 1) for dy in (-1, 0, 1)]


def mask_bank(n, size, low, high, seed):
    """n drawn masks (n, size, size) bool, True keeps; each removes a share from low to high."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(np.stack([draw_mask(rng, size, low, high) for _ in range(n)]))


def noise_of(seeds, n=6):
    """Random numbers (B, n) in [0, 1), each row from its own integer seed: the mask of a sample
    depends neither on its batch, nor on the process, nor on the device."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.stack([torch.rand(n, generator=generator) for generator in generators])


def pick(bank, noise):
    """A mask for each sample: one of the bank, flipped, transposed and shifted. Deterministic.

    bank: (n, S, S) bool, True keeps.  noise: (B, 6) from noise_of(), on the bank's device.
    Returns M_holes, (B, 1, S, S) bool, 1 keeps, 0 removes.
    """
    S = bank.shape[-1]
    which, down, right = ((noise[:, i] * n).long() for i, n in enumerate((len(bank), S, S)))
    transpose, flip_y, flip_x = (noise[:, 3:, None, None] < 0.5).unbind(1)      # (B, 1, 1) each
    y, x = torch.arange(S, device=bank.device)[:, None], torch.arange(S, device=bank.device)
    y, x = torch.where(transpose, x, y), torch.where(transpose, y, x)           # (B, S, S)
    y, x = torch.where(flip_y, S - 1 - y, y), torch.where(flip_x, S - 1 - x, x)
    y, x = (y + down[:, None, None]) % S, (x + right[:, None, None]) % S
    return bank[which[:, None, None], y, x][:, None]


# ------------------------------------------------------------------------------------------- loss
# To paste this section: import torch; import torch.nn.functional as F.

def cross_entropy(logits, label, valid=None):
    """Cross entropy of the pixels that are not void (255): their sum / valid, a float32 scalar.

    logits: (B, N, S, S).  label: (B, S, S) integer.
    valid: scalar tensor; None: the number of these pixels, so that this is their mean. 0 if there
    are none.
    """
    if valid is None:
        valid = (label != 255).sum()
    total = F.cross_entropy(logits.float(), label.long(), ignore_index=255, reduction="sum")
    return total / valid.clamp(min=1)


def task_similarity(M_p, M_pm, pixels=None):
    """L_tasksim: half the squared distance of the probabilities, summed, / pixels; float32.

    M_p, M_pm: logits (B, N, S, S); both receive the gradient. Void pixels count: no label is used.
    pixels: a number or scalar tensor; None: B * S * S. The mean is then 0 where the branches
    agree, and 1 where they are sure of different classes, for any N.
    """
    if pixels is None:
        pixels = M_p[:, 0].numel()
    distance = (M_p.float().softmax(1) - M_pm.float().softmax(1)).square().sum()
    return distance / (2 * pixels)


def loss_fn(M_p, M_pm, label, alpha=(1, 1, 1), valid=None, pixels=None):
    """Eq. 3. L_context and L_tasksim are not computed without M_pm, or if their weight is 0.

    M_p, M_pm: logits (B, N, S, S), M_pm None for L_seg alone.  label: (B, S, S), 255 = void.
    valid, pixels: what the sums over pixels are divided by, see above; None: means over the batch.
    Returns the loss, a scalar, and the terms (L_seg, L_context, L_tasksim), (3,), detached.
    """
    zero = torch.zeros((), device=M_p.device)
    L_seg = cross_entropy(M_p, label, valid)
    L_context = cross_entropy(M_pm, label, valid) if M_pm is not None and alpha[1] else zero
    L_tasksim = task_similarity(M_p, M_pm, pixels) if M_pm is not None and alpha[2] else zero
    loss = alpha[0] * L_seg + alpha[1] * L_context + alpha[2] * L_tasksim            # Eq. 2-3
    return loss, torch.stack([L_seg, L_context, L_tasksim]).detach()


# ---------------------------------------------------------------------------------- training step

def train_step(net, optimizer, scaler, machine, cfg, image, label, holes):
    """One optimizer step of net, MaskSup(f).

    image: uint8 (B, 3, S, S).  label: uint8 (B, S, S).  holes: (B, 1, S, S) on the device, or None.
    Returns the loss and its terms, (4,) on the device, of the batches of all processes.
    """
    image, label = to_input(image, machine.device), label.to(machine.device, non_blocking=True)
    with machine.autocast():
        M_p, M_pm = net(image, holes)
    # DDP averages the gradients of the processes: dividing their sums by the mean number of pixels
    # makes this the gradient of one process that has the whole batch
    valid = (label != 255).sum().float()
    counts = torch.stack([valid, torch.full_like(valid, label.numel())])
    alpha = cfg.alpha1, cfg.alpha2, cfg.alpha3 if cfg.method == "masksup" else 0
    loss, terms = loss_fn(M_p, M_pm, label, alpha, *machine.mean(counts))
    update(loss, optimizer, scaler)
    return machine.mean(torch.cat([loss[None], terms]))


def to_input(image, device):
    """uint8 (B, 3, S, S) -> float in [-1, 1] on the device, in channels_last format: a U-Net's step
    takes 560 ms instead of 637, in bf16 298 instead of 370 (one CPU core)."""
    image = image.to(device, non_blocking=True, memory_format=torch.channels_last)
    return image.float() / 127.5 - 1


def update(loss, optimizer, scaler):
    optimizer.zero_grad(set_to_none=True)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()


# -------------------------------------------------------------------- networks: U-Net and U-Net++

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
    """U-Net of five levels, bilinear upsampling: (B, 3, S, S) -> logits (B, N, S, S), 16 | S."""

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

    (B, 3, S, S) -> logits (B, N, S, S), 16 | S. The head is on node [0, 4].
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

    def forward(self, image):
        x = {}
        for j in range(5):
            for i in range(5 - j):
                if j:
                    inputs = torch.cat([*(x[i, k] for k in range(j)), up(x[i + 1, j - 1])], 1)
                else:
                    inputs = F.max_pool2d(x[i - 1, 0], 2) if i else image
                x[i, j] = self.node[f"{i}{j}"](inputs)
        return self.head(x[0, 4])


# --------------------------------------------------------------------------- networks: LeViT-UNet
# Module names and shapes inside LeViT are those of LeViT's release, so that its weights load.

class LinearBN(nn.Sequential):
    """Linear on (B, L, i), BN over all tokens. gain: BN's initial weight, 0 to end a residual."""

    def __init__(self, i, o, gain=1.0):
        super().__init__(OrderedDict(c=nn.Linear(i, o, bias=False), bn=nn.BatchNorm1d(o)))
        nn.init.constant_(self.bn.weight, gain)

    def forward(self, x):
        return self.bn(self.c(x).flatten(0, 1)).unflatten(0, x.shape[:2])


class Residual(nn.Module):
    """x + m(x); in training the branch m is dropped for a share `drop` of the samples."""

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
    """Attention between r x r tokens, with a learned bias per head and distance (|dy|, |dx|).

    (B, r * r, i) -> (B, r' * r', o), r' = r, or ceil(r / 2) with shrink: queries are then every
    second token in both directions. key: the width d_k of queries and keys in a head; values are
    twice as wide, four times with shrink.
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
        rows = torch.arange(0, r, 2 if shrink else 1)               # of the queries; same columns
        off = (rows[:, None] - torch.arange(r)).abs()               # (r', r), in each direction
        index = off[:, None, :, None] * r + off[None, :, None, :]   # (r', r', r, r), |dy| r + |dx|
        self.register_buffer("index", index.flatten(2).flatten(0, 1), persistent=False)

    def forward(self, x):
        if self.shrink:
            coarse = x.unflatten(1, (self.r, self.r))[:, ::2, ::2].flatten(1, 2)
            (q,) = self.split(self.q(coarse), self.key)
            k, v = self.split(self.kv(x), self.key, self.value)
        else:
            q, k, v = self.split(self.qkv(x), self.key, self.key, self.value)
        # index_select: the gradient of [:, index] would sort the L' L indices at each step
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


LEVIT = {   # widths, heads and numbers of blocks of the three stages; d_k; drop rate of branches
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
        n, r = widths[0], size // 16
        stem, blocks, self.ends = [], [], []
        for i, o in (3, n // 8), (n // 8, n // 4), (n // 4, n // 2), (n // 2, n):
            conv = nn.Conv2d(i, o, 3, stride=2, padding=1, bias=False)
            stem += nn.Sequential(OrderedDict(c=conv, bn=nn.BatchNorm2d(o))), nn.Hardswish()
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


# ------------------------------------------------------------------- networks: pretrained weights

def build(cfg, classes):
    """The network f with random weights."""
    if cfg.model.startswith("levit"):
        return LeViTUNet(classes, cfg.model, cfg.size)
    return {"unet": UNet, "unetpp": UNetPlusPlus}[cfg.model](classes, cfg.width)


LEVIT_RELEASE = {name: f"https://dl.fbaipublicfiles.com/LeViT/LeViT-{file}.pth" for name, file in (
    ("levit128s", "128S-96703c44"), ("levit192", "192-92712e41"), ("levit384", "384-9bdaf2e2"))}
MASKSUP_RELEASE = "https://github.com/hasibzunair/masksup-segmentation/releases"
OUR_NAMES = (       # start of a name in LeViT's release (the first two) or MaskSup's -> in ours
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
    """--pretrained: copy LeViT's weights into the encoder of f, or those that MaskSup's authors
    released into all of f, and print what was not copied. whole: accept only the second. Raises
    UserError if they are those of another network.

    LeViT's were trained on images normalised by ImageNet's mean and deviation, not to [-1, 1]:
    BatchNorm adapts. MaskSup's for two classes have one channel z before a sigmoid: here (0, z).
    """
    url = MASKSUP_RELEASE if whole else LEVIT_RELEASE.get(cfg.model, MASKSUP_RELEASE)
    read = common.read_weights(cfg.pretrained, url, "model")
    released = {our_name(k.removeprefix("module."), cfg.model): read[k] for k in sorted(read)
                if torch.is_tensor(read[k])}
    weights = f.state_dict()
    whole = whole or "head.weight" in released
    tensors = weights | dict(f.named_buffers())             # with the attention's index, too
    for k in {"head.weight", "head.bias"} & released.keys():
        if len(released[k]) == 1 and len(weights[k]) == 2:
            released[k] = torch.cat([torch.zeros_like(released[k]), released[k]])
    fits = {k: v for k, v in released.items() if k in tensors and v.shape == tensors[k].shape}
    wanted = [k for k in weights if whole or k.startswith("levit.")]
    missing = sorted(set(wanted) - fits.keys())
    needed = [k for k in missing if whole or not k.endswith("attention_biases")]
    if needed or not wanted:
        raise UserError(f"--pretrained {cfg.pretrained}: not the weights of {cfg.model} with "
                        f"{len(weights['head.bias'])} classes at --size {cfg.size}; give those of "
                        f"{url}, or another --model")
    for k, v in fits.items():
        tensors[k].copy_(v)                                 # these share memory with f's
    if os.environ.get("RANK", "0") == "0":
        unused = sorted({k.split(".")[0] for k in released if k not in tensors})
        print(f"pretrained: {len(fits.keys() & weights.keys())} of the "
              f"{'network' if whole else 'encoder'}'s {len(wanted)} tensors"
              + (f"; zero at this size: {', '.join(missing).replace('levit.', '')}"
                 if missing else "")
              + (f"; not used: {', '.join(unused)}" if unused else ""))


# --------------------------------------------------------------------------------------- evaluate

def dataset(cfg, split):
    return data.Dataset(cfg.data, cfg.root, split, size=cfg.size, train=split == "train",
                        flip=cfg.flip, seed=cfg.seed, palette=cfg.palette or None,
                        in_memory=cfg.in_memory)


def eval_loaders(cfg, machine):
    """{split: loader} of the splits to evaluate on. Training is scored on the first of them."""
    return {split: data.eval_loader(dataset(cfg, split), cfg.batch_size, **machine.loading)
            for split in data.source_of(cfg.data).splits[1:]}


def image_iou(prediction, target, classes, void=True):
    """The paper's measure of each image, (B,) float in percent; paper_iou is its mean.

    prediction, target: (B, H, W) ints. Two classes: the IoU of class 1, void (255) left out, 100
    where it is in neither. More: the IoU micro-averaged over the classes, that is right pixels /
    (right + 2 x wrong), void counted as class 0 as in the released code, or left out (void=False).
    """
    prediction, target = prediction.flatten(1), target.flatten(1)
    if classes == 2:
        intersection = ((prediction == 1) & (target == 1)).sum(1).float()
        union = (((prediction == 1) | (target == 1)) & (target != 255)).sum(1)
        return 100 * torch.where(union > 0, intersection / union.clamp(min=1), 1.0)
    counted = (target != 255) | void
    right = ((prediction == target.masked_fill(target == 255, 0)) & counted).sum(1)
    return 100 * right / (2 * counted.sum(1) - right).clamp(min=1)


@torch.no_grad()
def evaluate(f, loader, cfg, machine, corrupt=None, bank=None):
    """Score the network f on all images of a loader. The mask of image i depends on (cfg.seed, i).

    corrupt: bank of masks that the images are multiplied with (Fig. 6).  bank: that of the context
    branch, to compare the two branches (S 2).
    Returns, in percent: miou and dice (their means over the classes), class_iou and classes (both
    by name), from one confusion matrix over all images at size S; paper_iou (image_iou) and the
    same without void; constant, the miou of the best prediction that is one class everywhere; and
    the loss, CE. Void is not counted, except in paper_iou of more than two classes. With a bank
    also tasksim, L_tasksim between M_p and M_pm, and miou_holes, the miou of M_pm.
    """
    net = MaskSup(f).eval()
    classes, device = loader.dataset.info.classes, machine.device
    N = len(classes)
    counts = torch.zeros(2, N, N, dtype=torch.int64, device=device)     # of M_p and of M_pm
    sums = torch.zeros(6, device=device)
    for image, label, index in loader:
        image, label = to_input(image, device), label.to(device, non_blocking=True)
        noise = noise_of([common.seed_of(cfg.seed, i) for i in index.tolist()]).to(device)
        if corrupt is not None:
            image = image * pick(corrupt, noise)
        with machine.autocast():
            M_p, M_pm = net(image, None if bank is None else pick(bank, noise))
        prediction, valid = M_p.argmax(1), (label != common.VOID).sum()
        counts[0] += common.confusion(prediction, label, N)
        if M_pm is not None:
            counts[1] += common.confusion(M_pm.argmax(1), label, N)
        iou, no_void = (image_iou(prediction, label, N, void).sum() for void in (True, False))
        tasksim = iou * 0 if M_pm is None else task_similarity(M_p, M_pm) * len(label)
        sums += torch.stack([cross_entropy(M_p, label) * valid, valid.float(), iou, no_void,
                             tasksim, torch.full_like(iou, len(label))])
    common.all_reduce(counts, sums)
    ce, pixels, iou, no_void, tasksim, images = sums
    class_iou = common.class_iou(counts[0])
    dice = 200 * class_iou / (100 + class_iou)
    return {"miou": class_iou.nanmean().item(), "dice": dice.nanmean().item(),
            "class_iou": class_iou.tolist(),
            "classes": {name: {"iou": a, "dice": b} for name, a, b in
                        zip(classes, class_iou.tolist(), dice.tolist())},
            "paper_iou": (iou / images).item(), "constant": common.constant_miou(counts[0]),
            "paper_iou_without_void": (no_void / images).item(),
            "loss": (ce / pixels.clamp(min=1)).item(),
            **({} if bank is None else {"tasksim": (tasksim / images).item(),
                                        "miou_holes": common.miou(counts[1])})}


def score_line(scores, cfg):
    """The scores in a line; paper_iou for the paper's sets only."""
    shown = [("mIoU", "miou", True), ("with holes", "miou_holes", "miou_holes" in scores),
             ("paper_iou", "paper_iou", cfg.data in ("glas", "polyp", "nyuv2")),
             ("without void", "paper_iou_without_void", cfg.data == "nyuv2")]
    return ", ".join(f"{title} {scores[key]:.2f}" for title, key, wanted in shown if wanted)


def write_results(f, loaders, cfg, machine, bank, state, out, **more):
    """Write OUT/samples.png, and OUT/metrics.json with the scores of a checkpoint's state, those of
    the other splits and `more`, and print them. Returns the rows of samples.png."""
    first, *others = loaders
    splits = {split: evaluate(f, loaders[split], cfg, machine) for split in others}
    if not machine.main:
        return None
    scores = state["scores"]
    rows = draw_samples(f, loaders[first].dataset, cfg, machine, bank, scores, out / "samples.png")
    common.write_json(out / "metrics.json", {
        **scores, "epoch": state["history"][-1]["epoch"], "steps": state["step"],
        "seconds": state["seconds"], "params": parameters(f), "method": cfg.method,
        "model": cfg.model, **splits, **more})
    for split, s in {"": scores, **splits}.items():
        classes = ", ".join(f"{name} {c['iou']:.1f} / {c['dice']:.1f}"
                            for name, c in s["classes"].items() if not math.isnan(c["iou"]))
        tasksim = f"; tasksim {s['tasksim']:.4f}" if "tasksim" in s else ""
        print(textwrap.fill(f"{split} IoU / Dice: {classes}; mean {s['miou']:.1f} / "
                            f"{s['dice']:.1f}{tasksim}".strip(), 100, subsequent_indent="  "))
    print(f"{score_line(scores, cfg)} (the best constant answer {scores['constant']:.2f})"
          + "".join(f"; {split}: {score_line(s, cfg)}" for split, s in splits.items())
          + f"  -> {out}")
    return rows


# the rows of samples.png
ROWS = "image", "ground truth", "prediction", "image with holes", "prediction from holes"


@torch.no_grad()
def draw_samples(f, val_set, cfg, machine, bank, scores, path, n=6):
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
        return ((x + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()

    rows = [shown(x), label, M_p.cpu(), shown(x * holes), M_pm.cpu()]
    common.draw_sheet(path, rows, ROWS, val_set.info, f"{cfg.method}: {score_line(scores, cfg)}")
    return rows


# ------------------------------------------------------------------------------------------ train

def training_masks(cfg):
    """The bank of training masks, (n, S, S) bool, True keeps: drawn, or the images in --masks
    (which pick() shifts as well: they get a seam). Raises UserError if there are none."""
    if not cfg.masks:
        with common.waiting(f"drawing {cfg.bank} masks"):
            return mask_bank(cfg.bank, cfg.size, *COVERAGE[cfg.coverage], common.seed_of(cfg.seed))
    if not Path(cfg.masks).is_dir():
        raise UserError(f"--masks {cfg.masks}: no such folder")
    images = [Image.fromarray(data.read_image(path)).convert("L").resize(
        (cfg.size, cfg.size), Image.BILINEAR) for path in data.images_in(cfg.masks)]
    bright = torch.tensor(np.array(images)) >= 128
    if bright.all() or not bright.any():
        raise UserError(f"--masks {cfg.masks}: no image in it removes a part: give masks with 0 "
                        "where the image is removed and 255 where it is kept, or the reverse with "
                        "--masks-remove bright")
    percent = 100 * bright.float().mean().item()
    common.say(f"--masks: removes what is {cfg.masks_remove}: dark are {100 - percent:.1f} % and "
             f"bright {percent:.1f} % on average; --masks-remove dark|bright says which")
    return bright if cfg.masks_remove == "dark" else ~bright


def make_optimizer(model, cfg, fused=None):
    kind = dict(lr=cfg.lr, weight_decay=cfg.weight_decay, fused=fused)
    if cfg.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), **kind)
    return torch.optim.SGD(model.parameters(), momentum=0.9, **kind)


def learning_rate(step, cfg, per_epoch, total):
    """The learning rate of a step, of `total` in all."""
    if step < cfg.warmup:                                                 # 1. linear warmup
        return cfg.lr * (step + 1) / cfg.warmup
    if cfg.schedule == "step":                                            # 2. x 0.1, released code
        return cfg.lr * 0.1 ** (step // per_epoch // 60)
    if cfg.schedule == "cosine":                                          # 3. half a cosine, to 0
        done = (step - cfg.warmup) / max(1, total - cfg.warmup)
        return cfg.lr * (1 + math.cos(math.pi * done)) / 2
    return cfg.lr                                                         # 4. constant


def train(cfg):
    """The training run, from start to end."""
    machine = common.Machine(cfg)
    device, train_set, loaders = machine.device, dataset(cfg, "train"), eval_loaders(cfg, machine)
    split, val_loader = next(iter(loaders.items()))
    info, per_epoch = train_set.info, data.steps_per_epoch(len(train_set), cfg.batch_size)
    common.default_epochs(cfg, per_epoch)
    total = cfg.epochs * per_epoch
    bank = training_masks(cfg).to(device)

    torch.manual_seed(common.seed_of(cfg.seed))
    f = build(cfg, len(info.classes)).to(device, memory_format=torch.channels_last)
    if cfg.pretrained != "none" and not common.resuming(cfg):
        load_pretrained(f, cfg)
    if cfg.init and not common.resuming(cfg):
        common.load_weights(f, cfg.init, "masksup", len(info.classes))
    optimizer, scaler = make_optimizer(f, cfg, machine.fused), machine.scaler()
    run = common.Run(cfg, "masksup", machine, info, data.labeled_hash(train_set.items),
                     dict(model=f, optimizer=optimizer, scaler=scaler),
                     ["loss", "loss_seg", "loss_context", "loss_tasksim"],
                     min(total, cfg.max_steps or total), per_epoch,
                     may_differ={"epochs"} if cfg.schedule == "constant" else set())
    if cfg.pretrain == "mae" and run.step == 0:
        run.seconds = pretrain(f, train_set, cfg, machine, run.interrupt)

    net = common.parallel(MaskSup(common.compiled(f, cfg)), machine)
    loader = data.train_loader(train_set, cfg.batch_size // machine.world, seed=cfg.seed,
                               start=run.start, stop=run.stop, **machine.loading)
    run.announce(f"{parameters(f) / 1e6:.1f} M parameters, {len(train_set)} training and "
                 f"{len(val_loader.dataset)} {split} images, {len(bank)} masks that remove "
                 f"{100 - 100 * bank.sum().item() / bank.numel():.0f} % on average")
    for step, (image, label, index) in zip(range(run.start, run.stop), loader):
        # 1. learning rate
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, cfg, per_epoch, total)

        # 2. one step; its random numbers depend on (seed, step) and (seed, epoch, index) alone, so
        #    that a resumed run repeats an uninterrupted one
        net.train()
        torch.manual_seed(common.seed_of(cfg.seed, step, machine.rank))     # for LeViT's drops
        holes = None
        if cfg.method != "base":
            seeds = [common.seed_of(cfg.seed, step // per_epoch, i) for i in index.tolist()]
            holes = pick(bank, noise_of(seeds).to(device, non_blocking=True))
        losses = train_step(net, optimizer, scaler, machine, cfg, image, label, holes)

        # 3. evaluate, log, save
        due = run.note(step, losses, (train_set, index))
        if due == "evaluate":
            scores = evaluate(f, val_loader, cfg, machine, bank=bank)
            run.log(scores, "miou", score_line(scores, cfg), val_loss=scores["loss"],
                    val_loss_tasksim=scores["tasksim"], miou=scores["miou"],
                    paper_iou=scores["paper_iou"])
        if due:
            run.save()

    # the paper's number: of the epoch that is best on the very set it is measured on
    best = max(row["paper_iou"] for row in run.history)
    write_results(f, loaders, cfg, machine, bank, run.state(), run.out, paper_iou_best_epoch=best)


# ------------------------------------------------------------------------ --pretrain mae, Table 2

def patch_holes(noise, size, patch, ratio):
    """Masks (B, 1, S, S) bool, True keeps: the share `ratio` of the L = (S / patch)^2 patches is
    removed. noise: (B, L) random numbers."""
    n = size // patch
    kept = noise.argsort(1).argsort(1) >= int(n * n * ratio)
    return kept.view(-1, 1, n, n).repeat_interleave(patch, 2).repeat_interleave(patch, 3)


def reconstruction_loss(output, image, holes, values):
    """The squared errors of the removed pixels, their sum / values, their number: a float32 scalar.
    output, image: (B, 3, S, S).  holes: (B, 1, S, S) bool, 0 removes.  values: scalar tensor."""
    return ((output.float() - image) * ~holes).square().sum() / values


def pretrain(f, train_set, cfg, machine, interrupt):
    """Train f as a masked autoencoder: three channels instead of the classes, which reconstruct the
    removed patches. All of its weights except the head's are then copied into f. Its checkpoint,
    from which --resume continues, is OUT/pretrain.pt. Returns the seconds it took."""
    device, per_epoch = machine.device, data.steps_per_epoch(len(train_set), cfg.batch_size)
    total = cfg.pretrain_epochs * per_epoch
    autoencoder = build(cfg, 3).to(device, memory_format=torch.channels_last)

    def copy(source, target):
        target.load_state_dict({k: v for k, v in source.state_dict().items()
                                if not k.startswith("head.")}, strict=False)

    copy(f, autoencoder)                                # what --pretrained or --init have loaded
    optimizer, scaler = make_optimizer(autoencoder, cfg, machine.fused), machine.scaler()
    run = common.Run(cfg, "masksup pretraining", machine, train_set.info,
                     data.labeled_hash(train_set.items),
                     dict(model=autoencoder, optimizer=optimizer, scaler=scaler), ["loss"], total,
                     per_epoch, interrupt=interrupt, last="pretrain.pt")
    net = common.parallel(common.compiled(autoencoder, cfg), machine)
    loader = data.train_loader(train_set, cfg.batch_size // machine.world, seed=cfg.seed,
                               start=run.start, stop=total, **machine.loading)
    run.announce("first, as a masked autoencoder")
    for step, (image, _, index) in zip(range(run.start, total), loader):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, cfg, per_epoch, total)
        net.train()
        torch.manual_seed(common.seed_of(cfg.seed, step, machine.rank))
        seeds = [common.seed_of(cfg.seed, step // per_epoch, i) for i in index.tolist()]
        noise = noise_of(seeds, (cfg.size // cfg.mae_patch) ** 2).to(device, non_blocking=True)
        holes = patch_holes(noise, cfg.size, cfg.mae_patch, cfg.mae_ratio)
        image = to_input(image, device)
        with machine.autocast():
            output = net(image * holes)
        values = machine.mean(3.0 * (~holes).sum())        # as in train_step()
        loss = reconstruction_loss(output, image, holes, values)
        update(loss, optimizer, scaler)
        due = run.note(step, machine.mean(loss[None]), (train_set, index))
        if due == "evaluate":
            run.say(f"pretraining, epoch {run.step / per_epoch:6.2f}  loss "
                    f"{run.means()['loss']:.4f}  {run.seconds:.0f} s")
        if due:
            run.save()
    copy(autoencoder, f)
    return run.seconds


# --------------------------------------------------------------------------------- other commands

def load(path):
    return common.load(path, "masksup", Config, data.Info, build)


def parse_shares(text):
    """'0.1,0.3' -> [0.1, 0.3]. Raises UserError for anything else than shares of an image."""
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
    names = [cfg.method + f" {cfg.coverage}" * (cfg.method != "base") for cfg in configs.values()]
    return {path: name + f" ({Path(path).resolve().parent.name}-{Path(path).stem})"
            * (names.count(name) > 1) for path, name in zip(configs, names)}


def evaluate_only(cfg, origin):
    """--eval A.pt [B.pt ..]: write metrics.json and samples.png of each checkpoint, to OUT, or for
    several to OUT/RUN-CHECKPOINT each. --eval --pretrained FILE: of MaskSup's release instead. All
    checkpoints of one size see the same holes. With --corrupt also the scores with a share of the
    image removed, right to one percent of the image (Fig. 6)."""
    shares, paths = parse_shares(cfg.corrupt), cfg.eval or (cfg.pretrained,)
    out = Path(cfg.out if origin.get("out") == "flag" else Path(paths[0]).parent / "eval")
    machine, found = common.Machine(cfg), {}
    for path, folder in common.result_folders(paths, out).items():
        if cfg.eval:
            saved_cfg, info, f, state = load(path)
            run_cfg = common.checkpoint_config(cfg, origin, path, saved_cfg, check, "eval",
                                               "corrupt", "data", "palette", "batch_size", "seed")
        else:
            check(cfg)
            run_cfg, info = cfg, data.info(cfg.data, cfg.root, cfg.palette or None)
            f = build(cfg, len(info.classes)).eval()
            load_pretrained(f, cfg, whole=True)
            state = {"history": [{"step": 0, "epoch": 0}], "step": 0, "seconds": 0.0}
        run_cfg = replace(run_cfg, seed=cfg.seed)       # of the holes: the same for all checkpoints
        loaders = eval_loaders(run_cfg, machine)
        val_loader = next(iter(loaders.values()))
        if val_loader.dataset.info.classes != info.classes:
            raise UserError(f"--data {run_cfg.data} has other classes than {path} was trained for")
        f.to(machine.device)

        def masks(low, high, *seed):
            bank = mask_bank(64, run_cfg.size, low, high, common.seed_of(cfg.seed, *seed))
            return bank.to(machine.device)

        holes, more = masks(*COVERAGE["high"]), {}
        curve = {0.0: evaluate(f, val_loader, run_cfg, machine, bank=holes)}
        for share in shares:
            corrupt = masks(max(0, share - 0.01), share + 0.01, round(1000 * share))
            curve[share] = evaluate(f, val_loader, run_cfg, machine, corrupt)
        if shares:
            more["corrupt"] = {f"{share:g}": {k: scores[k] for k in ("miou", "paper_iou", "loss")}
                               for share, scores in curve.items()}
        rows = write_results(f, loaders, run_cfg, machine, holes, {**state, "scores": curve[0.0]},
                             folder, **more)
        found[path] = run_cfg, curve, rows, state["history"]
    if machine.main:
        names = run_names({path: run_cfg for path, (run_cfg, *_) in found.items()}).values()
        configs, *others = zip(*found.values())
        curves, rows, histories = (dict(zip(names, of)) for of in others)
        if len(paths) > 1 and len({run_cfg.data for run_cfg in configs}) == 1:
            compare(curves, rows, histories, info, out)
        if shares:
            write_robustness(curves, out)


def compare(curves, rows, histories, info, out):
    """One samples.png (Fig. 3, 4) and one curves.png (S 2-3) of several checkpoints, in OUT.
    All are {name: ..}. curves: {share removed: scores}.  rows: from draw_samples()."""
    image, truth, _, holed, _ = next(iter(rows.values()))
    common.draw_sheet(
        out / "samples.png", [image, truth, *(r[2] for r in rows.values()), holed,
                              *(r[4] for r in rows.values())],
        [*ROWS[:2], *(f"{ROWS[2]}, {name}" for name in rows),
         ROWS[3], *(f"{ROWS[4]}, {name}" for name in rows)], info,
        "mIoU: " + ", ".join(f"{name} {curve[0.0]['miou']:.2f}" for name, curve in curves.items()))
    common.compare_curves(histories, out / "curves.png",
                          {"val_loss_tasksim": "L_tasksim", "miou": "mIoU, %"})


def write_robustness(curves, out):
    """Fig. 6: {name: {share removed: scores}} as a table, and as lines in OUT/robustness.png."""
    lines = {name: [s["miou"] for s in curve.values()] for name, curve in curves.items()}
    percent = [100 * share for share in next(iter(curves.values()))]
    print(f"\n{'mIoU':24}" + "".join(f"{p:7.0f} %" for p in percent))
    for name, line in lines.items():
        print(f"{name:24}" + "".join(f"{value:9.2f}" for value in line))
    common.draw_panels(out / "robustness.png", [
        (percent, lines, "share of the image removed, %", "mIoU, %")])


@torch.no_grad()
def segment(f, image, cfg, machine):
    """Segment one image: uint8 (H, W, 3) -> class indices uint8 (H, W), and their probability,
    float32 (H, W). The network sees it at the training size; its logits are resized to (H, W).
    Beyond 2048 pixels a side the classes are enlarged instead, as N planes of floats would not fit
    into memory."""
    small = Image.fromarray(image).resize((cfg.size, cfg.size), Image.BILINEAR)
    small = torch.from_numpy(np.array(small)).permute(2, 0, 1)[None]
    with machine.autocast():
        logits = f(to_input(small, machine.device)).float()
    H, W = image.shape[:2]
    logits = F.interpolate(logits, (min(H, 2048), min(W, 2048)), mode="bilinear")
    highest, prediction = logits.max(1)
    confidence = 1 / logits.sub_(highest[:, None]).exp_().sum(1)        # softmax of that class
    return tuple(np.array(Image.fromarray(x[0].cpu().numpy()).resize((W, H), Image.NEAREST))
                 for x in (prediction.to(torch.uint8), confidence))


def bench(cfg):
    """--bench N: parameters, multiply-adds of f, and for N > 0 the time of a training step with
    each --method. The last line is one JSON object, of cfg.method."""
    machine, info = common.Machine(cfg), data.info(cfg.data, cfg.root, cfg.palette or None)
    N, S, B, device = len(info.classes), cfg.size, cfg.batch_size, machine.device
    with torch.device("meta"):           # shapes without numbers: counting takes no memory
        f = build(cfg, N).eval()
        gmacs = common.macs(f, torch.empty(1, 3, S, S))
    result = {"params": parameters(f), "gmacs": round(gmacs, 3)}
    if cfg.bench > 0:
        torch.manual_seed(cfg.seed)
        f = build(cfg, N).to(device, memory_format=torch.channels_last).train()
        net = MaskSup(common.compiled(f, cfg))
        optimizer, scaler = make_optimizer(f, cfg, machine.fused), machine.scaler()
        image = torch.randint(0, 256, (B, 3, S, S), dtype=torch.uint8).to(device)
        label = torch.randint(0, N, (B, S, S), dtype=torch.uint8).to(device)
        bank = mask_bank(8, S, *COVERAGE[cfg.coverage], common.seed_of(cfg.seed)).to(device)
        noise = torch.rand(B, 6).to(device)
        for method, passes in ("base", 1), ("cb", 2), ("masksup", 2):
            method_cfg = replace(cfg, method=method)
            timed = common.time_steps(
                lambda i: train_step(net, optimizer, scaler, machine, method_cfg, image, label,
                                     None if method == "base" else pick(bank, noise)),
                cfg.bench, B, device, gmacs * B * passes)
            print(f"{method:8s}{timed['ms_per_step']:8.1f} ms for a batch of {B}, "
                  f"{timed['img_per_s']:.1f} img/s, {timed['tflops']:.3g} TFLOP/s")
            result |= timed if method == cfg.method else {}
    print(json.dumps(result))


# ------------------------------------------------------------------------------------------- main

def check(cfg):
    """Raises UserError for values that the parser accepts, but that cannot be used."""
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
    cfg, origin = common.parse(Config, RECIPES, __doc__, may_be_empty={"eval"})
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
    if cfg.pretrain == "mae":                       # Table 2: a baseline in two stages
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
