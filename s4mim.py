"""S4MIM: semi-supervised semantic segmentation with masked image modeling.

Trains on a few labelled images x_l and many unlabelled ones. An encoder E feeds a semantic decoder
SeD, which predicts classes, and in training a pixel decoder PiD. Each step has two phases.

I.  FixMatch with UniPerb: the prediction for a weak view x_w of an unlabelled image is, where it is
    confident, the pseudo-label of the strong view x_s and of the perturbed features of x_w (fp).
        L_s = CE(p_l, y_l)                                                             Eq. 1
        L_u = lambda_u [conf >= psi] (CE(p_s, y_w) + CE(p_fp, y_w))                    Eq. 2
II. Patches of x_l, x_s and x_w are removed (* m). Three losses ask for what was removed:
        L_mimpi   the pixels, each class reconstructed by a head of its own            Eq. 3-8
        L_mimfea  features of removed pixels, pulled to the prototype of their class   Eq. 9-12
        L_mimse   the classes                                                          Eq. 13
    loss = (L_s + L_u + L_mimpi + L_mimfea + L_mimse) / (the sum of their weights)     Eq. 14

Li, Hao, Shang and Jiao, "Masked image modeling boosting semi-supervised semantic segmentation",
arXiv:2411.08756, 2024; equations, tables and figures are numbered as there.
Lines 194 to 584 are the method; the rest is networks, data, training loop and other commands.

    python s4mim.py                                         # drawn images, CPU, two minutes
    python s4mim.py --data voc --labeled labeled.txt        # the paper's recipe, UniMatch's list
    python s4mim.py --data camvid --burn-in 500             # pseudo-labels after 500 steps
    python s4mim.py --data my/folder --labeled list.txt     # images without masks are used too
    python s4mim.py --eval out/s4mim-voc/best.pt
    python s4mim.py --predict IMAGES --ckpt out/s4mim-voc/best.pt --to DIR
    torchrun --nproc_per_node=4 s4mim.py --data cityscapes  # several GPUs

The paper's experiments. LIST is UniMatch's list of labelled images, such as
splits/pascal/92/labeled.txt in its repository; the paper's backbone, in all tables, is --stem deep
--pretrained FILE with the ImageNet weights of that stem. The other methods of Tables I-III and VIII
are not here: they have code of their own.
    Table I     --data voc --labeled LIST; SupOnly: --method suponly
    Table II    --data voc --setup aug --labeled LIST --size 321 or 513; SupOnly as above
    Table III   --data cityscapes --labeled LIST; SupOnly as above
    Table IV    --method fixmatch | --no-fea --no-se | --no-se | --no-pi --no-fea | --no-fea |
                (no flag)
    Table V     --method fixmatch | --method mim | --no-fea --no-se
    Table VI    --no-dic --no-conf | --no-dic | --no-conf | (no flag)
    Table VII   --method fixmatch | --no-pi --no-fea --semantic mse | --no-pi --no-fea
    Table VIII  --stride 8
    Fig. 1-3    not here, they are diagrams: of train_step() (2), class_heads() and Prototypes (3)
    Fig. 4      (a) --ratio 0.3, 0.35, .. 0.5; (b) --patch 4, 6, 8 or 10
    Fig. 5      not here: t-SNE is in none of the libraries used
    Fig. 6, 7   --predict IMAGES --ckpt CHECKPOINT --to DIR: the images are in DIR/overlay

Results: ResNet-18 of width 16 (0.8 M parameters) from scratch, equal steps and labels, on one core
of an AMD EPYC (torch 2.13.0), mIoU of the last epoch. The paper's setting has not been run here.
- Default run, materials, 32 of 512 images labelled, 720 steps, seeds 0, 1, 2. Its learning rate and
  lambda_mp were chosen on this validation set.
    suponly 66.3, 64.1, 64.4; fixmatch 72.6, 69.9, 72.5; s4mim 70.0, 65.8, 67.6, with --patch 8
    69.7, 67.0, 68.2, with the paper's --lambda-mp 0.3333 67.1, 63.5, 63.7
    seed 0: --no-pi 70.0; --patch 8 --lambda-ms 0.1 with --lambda-mp 0.01 66.7, with --no-pi
    --no-fea 67.2
    suponly with --lr 0.1 65.3, 58.2, 56.8, with 0.025 59.1, 58.5, 61.3: 0.05 is its best
    python s4mim.py --threads 1 --method fixmatch --seed 0
    On an Intel Xeon s4mim, seed 0, ended at 54.6: its L_mimpi was 2.5 after the burn-in and 1.7 at
    the end, more than the variance of the pixels. The run depends on rounding.
- Mean of seeds 0 to 5 and its standard error. + pixels: --no-fea --no-se; + classes: --no-pi
  --no-fea. GlaS 1/8: 11 labels, 360 steps; polyps 1/16: 91 labels, 507 steps, one training set.
                     suponly      fixmatch     + pixels     + classes    all
    GlaS             47.9 (0.9)   50.6 (0.7)   47.8 (0.5)   49.4 (0.5)   47.7 (0.6)
    CVC-ClinicDB     55.5 (0.8)   54.7 (1.2)   51.8 (1.4)   52.3 (1.5)   50.2 (1.8)
    Kvasir-SEG       56.1 (0.8)   56.3 (0.5)   53.8 (0.9)   55.8 (0.5)   54.4 (1.6)
    python s4mim.py --data glas --labeled 1/8 --zoom 0.2 --epochs 40 --eval-every 20 FLAGS
    python s4mim.py --data polyp --labeled 1/16 --zoom 0.2 --epochs 3 --eval-every 3 FLAGS
    FLAGS: --backbone resnet18 --width 16 --pretrained none --size 97 --scale 1.25 --lr 0.05
           --decoder-lr 1 --pixel-lr 0.1 --amp bf16 --threads 1
- CamVid 1/8 (46 labels, 400 steps), seeds 0, 1: suponly 36.8, 35.7; fixmatch 33.6, 32.0; all 32.8,
  31.9. --data camvid --labeled 1/8 --zoom 0.4 --epochs 10 --eval-every 10 FLAGS
So FixMatch gains on materials and GlaS alone, and the masked losses on none of these: such short
runs from scratch are not the paper's 80 epochs from ImageNet.

Departures from the paper:
- Stem: the default is the standard one with torchvision's weights (BSD licence; trained on
  ImageNet, which has terms of its own): we know of no public address with a checksum for weights of
  the paper's deep stem. Table VIII's "standard backbone" is a stride of 8 instead of 16 (ASPP 12,
  24, 36), as in CorrMatch but not in UniMatch.
- CutMix takes its box from another image of the batch; in UniMatch's code from the image itself.
- BatchNorm: each pass is normalised by its own batch, but only the pass of x_l and x_w moves the
  running averages, which predictions use. In UniMatch p_fp shares their batch, and all passes move
  the averages: --method fixmatch would have 73.3, 68.8, 69.1 (above 72.6, 69.9, 72.5), within the
  noise. In Phase II PiD has the masked streams and the whole x_w in one batch, so that r_fp and its
  target x_fp are comparable: on visible pixels they differ by 0.092, with two batches by 0.118
  (mean square, after the default run).
- Crops below 321: the blur (sigma up to 2) and the patches (6 pixels) are scaled down with the
  side, patches to at least 2 pixels, or to --patch. FixMatch as above with the blur of 321: 72.3,
  70.4, 71.9, within the noise.
- Means: Eq. 1, 2, 11 and 13 average over the valid pixels of a batch, not over images first. Eq. 2
  divides by all valid pixels, not by the confident ones, as UniMatch does.
- The divisor of Eq. 14 counts only the losses in use: it is 2 for fixmatch, 1 for suponly.
- Void and padding are left out of all losses but the reconstruction; the paper says so of the
  features. Unlabelled crops have only padding: no ground truth is used.
- suponly has 8 labelled images a step, for as many steps as the method. UniMatch's has 16 a step
  and 80 epochs of the labelled images, which is 400 steps with 92.
- metrics.json is of the last epoch; UniMatch reports the best on the validation set.
- Windows (--window slide) end at the border of the image; UniMatch's last ones are smaller.
- bf16 is the default with CUDA, and its gradients are coarser; --amp off is float32.
- --burn-in N starts with N steps on labels alone. The paper, which starts from ImageNet's weights
  and trains for long, has none, and neither have its recipes here.
- Left open by the paper, and here: each place in the batch has one mask m for its three streams;
  removed pixels have the mean colour; these streams share one pass of E; x_fp is made of Phase I's
  features, as the weights have not changed since; prototypes move before they are used; PiD's rate
  is E's first, times --pixel-lr; labels, masks and confidence at the features are those of one
  pixel (at_features()); OHEM keeps at least 100,000 pixels a labelled crop of each process
  (UniMatch: 200,000 of the two crops of a GPU).
"""
import json
import math
import os
import re
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
from common import UserError, parameters


# ---------------------------------------------------------------------------------------- config

@dataclass
class Config(common.RunConfig):    # which has seed, device, resume and the like
    data: str = "materials"        # a dataset that data.py lists, or your own folder
    out: str = ""                  # run folder; empty: out/s4mim-DATA
    labeled: str = "1/1"           # labelled images: a number, a share of the masks, or a list
    split_seed: int = 0            # seed of their choice, the same for runs of several --seed
    setup: Literal["ori", "aug"] = "ori"  # voc: labels from its own 1464, or from SBD's 10582
    method: Literal["s4mim", "mim", "fixmatch", "suponly"] = "s4mim"  # mim: plain MIM of Table V
    pi: bool = True                # L_mimpi; --no-pi, --no-fea and --no-se are Table IV
    fea: bool = True               # L_mimfea
    se: bool = True                # L_mimse
    dic: bool = True               # prototypes over all batches; off: of each batch (Table VI)
    conf: bool = True              # weight features by confidence (Table VI)
    semantic: Literal["ce", "mse"] = "ce"  # L_mimse to pseudo-labels, or probabilities (Table VII)
    backbone: Literal["resnet18", "resnet50", "resnet101"] = "resnet101"  # encoder E
    stem: Literal["standard", "deep"] = "standard"  # one 7x7, or the paper's three 3x3
    stride: int = 16               # of E: 16, or 8 for Table VIII's "standard backbone"
    width: int = 64                # channels of E's first stage, and a quarter of the decoders'
    pretrained: str = "imagenet"   # weights of E: imagenet (downloads), a file, or none
    recipe: Literal["auto", "small", "paper"] = "auto"  # auto: small for a folder, else paper
    epochs: int = 80               # passes over the unlabelled images; 0: 3000 steps
    batch_size: int = 16           # images a step, over all processes, half of them labelled
    lr: float = 1e-3               # of E at the start
    decoder_lr: float = 10.0       # learning rate of SeD, as a multiple of E's
    pixel_lr: float = 10.0         # learning rate of PiD, constant, as a multiple of E's first
    weight_decay: float = 1e-4     # of SGD, whose momentum is 0.9
    size: int = 321                # side of the crops; best a multiple of 4 plus 1: see resize()
    scale: float = 2.0             # images are scaled by 1 / scale to scale, then cropped
    zoom: float = 1.0              # images are shrunk by this first; 0: to 1.5 crops, if larger
    window: Literal["whole", "slide"] = "whole"  # predict images whole, or by windows of --size
    ohem: bool = False             # L_s from the hardest pixels only
    burn_in: int = 0               # first so many steps on labels alone; the paper has none
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
    predict: tuple = ()            # images to segment: files, or folders of images
    ckpt: str = ""                 # --predict: the checkpoint
    to: str = ""                   # --predict: new folder for the predictions


SMALL = dict(backbone="resnet18", width=16, pretrained="none", lr=0.05, decoder_lr=1.0,
             pixel_lr=1.0)         # a narrow network, from random weights
RECIPES = {                        # what differs from the defaults above, the paper's for voc
    # two minutes on a CPU core. Pseudo-labels wait for step 100. PiD's rate is low because at E's
    # its loss may diverge, and lambda_mp a tenth of the paper's because L_mimpi is the largest
    # loss here (see Results, above)
    "materials": dict(SMALL, labeled="32", size=65, scale=1.25, epochs=12, pixel_lr=0.1,
                      burn_in=100, lambda_mp=0.03, eval_every=2),
    "shapes": dict(SMALL, labeled="32", size=65, epochs=12, baseline="suponly", eval_every=2),
    "voc": dict(labeled="1/16"),   # 92
    "camvid": dict(labeled="1/8"), "nyuv2": {}, "glas": {}, "polyp": {},
    "cityscapes": dict(labeled="1/16", size=801, epochs=240, lr=0.005, decoder_lr=1.0,
                       pixel_lr=1.0, psi=0.0, ohem=True, window="slide"),
    # for a folder of your own, on a laptop: about a quarter of an hour
    "small": dict(SMALL, size=97, zoom=0.0, scale=1.25, epochs=0),
}


# ----------------------------------------------------------------------------------------- model
# To paste this section elsewhere: torch, torch.nn as nn, torch.nn.functional as F; nothing more.

def resize(x, size):
    """Bilinear, corners aligned: (B, C, h, w) -> (B, C, *size). Features stay on the pixels they
    are centred on, see at_features(), if the sides are multiples of 4 plus 1: 321, 513, 801."""
    return F.interpolate(x, size, mode="bilinear", align_corners=True)


def at_features(x):
    """The pixels that the features are centred on: (B, H, W) -> (B, H/4, W/4), rounded up.

    Feature i is centred on pixel 4 i. Resizing by "nearest" would take pixel floor(i H / h), which
    at 321 is up to 3 pixels off, and a third of the removed features would count as visible.
    """
    return x[:, ::4, ::4]


def class_heads(fea, label, weight, block=128):
    """r = sum over c of Head_c(fea_c), fea_c = fea where the label is c and 0 elsewhere, Eq. 6-7.

    fea: (B, D, H, W).  label: (B, H, W) long; values outside 0..C-1 are of no class, they add 0.
    weight: (C, O, D, 3, 3), the heads.  Returns r, (B, O, H, W) float32, O = 3 for images.

    C convolutions are not needed. A convolution is linear: a pixel adds to its 3 x 3 neighbours
    its features times the D x 9 O weights of its own class's head. So the pixels are sorted by
    class into blocks of one class each, padded with zeros; all blocks are multiplied at once, and
    F.fold adds what overlaps. No size depends on the labels, so nothing waits for the device.
    Forward and backward take 35 ms instead of 690, and 153 MB instead of 790 (4 x 256 x 81 x 81,
    21 classes, two CPU cores, torch 2.13.0).
    """
    B, D, H, W = fea.shape
    C, O = weight.shape[:2]
    y = torch.where((label < 0) | (label >= C), C, label).flatten()     # class C: none
    y_sorted, order = y.sort(stable=True)
    first = torch.searchsorted(y_sorted, torch.arange(C + 2, device=y.device))
    blocks = (first.diff() + block - 1) // block                        # of each class
    ends = blocks.cumsum(0)
    n = len(y) // block + C + 1                                         # the most there can be
    slot = torch.empty_like(y)                                          # where each pixel goes
    place = torch.arange(len(y), device=y.device) - first[y_sorted]     # within its class
    slot[order] = place + block * (ends - blocks)[y_sorted]
    x = fea.permute(0, 2, 3, 1).reshape(-1, D)
    x = x.new_zeros(n * block, D).index_copy_(0, slot, x).view(n, block, D)
    taps = weight.flip(3, 4).permute(0, 2, 1, 3, 4).reshape(C, D, O * 9)
    taps = torch.cat([taps, taps.new_zeros(1, D, O * 9)])
    block_class = torch.searchsorted(ends, torch.arange(n, device=y.device), right=True)
    # index_select, as the gradient of taps[block_class] is summed on a CPU in the order in which
    # the threads finish: runs would differ
    out = x @ taps.index_select(0, block_class.clamp(max=C))            # (n, block, 9 O)
    out = out.flatten(0, 1)[slot].view(B, H * W, O * 9)
    return F.fold(out.mT.float(), (H, W), 3, padding=1)


class Heads(nn.Conv2d):
    """Head_1 .. Head_C, PiD's last layer: each a 3x3 convolution without bias, D channels -> 3."""

    def __init__(self, D, classes):
        super().__init__(D, 3 * classes, 3, bias=False)

    def forward(self, fea, label, size, classwise=True):
        """The reconstruction r of Eq. 7: fea (B, D, H/4, W/4) -> (B, 3, *size) float32.

        label: (B, H/4, W/4) long, see class_heads() and at_features().  Not classwise: Eq. 4, all
        heads on all features, which is one convolution with the sum of their weights.
        """
        weight = self.weight.unflatten(0, (-1, 3))                      # (C, 3, D, 3, 3)
        return resize(class_heads(fea, label, weight) if classwise else
                      F.conv2d(fea, weight.sum(0), padding=1).float(), size)


class Prototypes(nn.Module):
    """The dictionary {c: v_c} of Eq. 9-12 and its loss. v: (C, D), without gradient; zeros for a
    class not seen yet. A batch's update is update(sums(..)).

    Arguments of the methods: fea (B, D, H, W); label (B, H, W) integers, of which values outside
    0..C-1 such as 255, void, are left out; conf (B, H, W) float in 0..1; visible and removed
    (B, H, W) bool, Omega^v and Omega^m.
    """

    def __init__(self, classes, D, alpha=0.99, tau=10.0, dic=True):
        super().__init__()
        self.alpha, self.tau, self.dic = alpha, tau, dic
        self.register_buffer("v", torch.zeros(classes, D))

    def weights(self, label, conf, where):
        """(B, C, H, W) float: conf where the label is c and `where` is True, else 0."""
        one_hot = label[..., None] == torch.arange(len(self.v), device=label.device)
        return one_hot.movedim(-1, 1) * (conf * where)[:, None]

    @torch.no_grad()
    def sums(self, fea, label, conf, visible):
        """Numerators and denominators of Eq. 9, (C, D + 1), of the labelled stream: to be summed or
        averaged over processes, if there are several."""
        weight = self.weights(label, conf, visible)
        return torch.cat([torch.einsum("bchw,bdhw->cd", weight, fea.float()),
                          weight.sum((0, 2, 3))[:, None]], 1)

    @torch.no_grad()
    def update(self, sums):
        """Move the prototypes of the classes in sums. Without `dic` they are this batch's alone."""
        numerator, denominator = sums[:, :-1], sums[:, -1:]
        v = numerator / denominator.clamp(min=1e-6)                                     # Eq. 9
        moved = self.alpha * self.v + (1 - self.alpha) * v if self.dic else v
        self.v.copy_(torch.where(denominator > 0, moved, self.v if self.dic else 0))

    def forward(self, fea, label, conf, removed, n=None):
        """L_mimfea without lambda_mf: the mean over the classes that have both removed pixels and a
        prototype; 0 without any. n: (C,), the denominators of Eq. 11; None: those of this batch."""
        fea, weight = fea.float(), self.weights(label, conf, removed)
        n = weight.sum((0, 2, 3)) if n is None else n
        cos = F.conv2d(fea, F.normalize(self.v)[:, :, None, None])                # (B, C, H, W)
        cos = cos / fea.norm(dim=1, keepdim=True).clamp(min=1e-12)
        l_cos = (1 - cos) / self.tau                                                    # Eq. 10
        l_agg = (weight * l_cos).sum((0, 2, 3)) / n.clamp(min=1e-6)                     # Eq. 11
        gamma = (n > 0) & self.v.any(1)
        return torch.where(gamma, l_agg, 0).sum() / gamma.sum().clamp(min=1)            # Eq. 12


# --------------------------------------------------------------------------------------- masking
# To paste this section elsewhere: torch; nothing more.

def noise_of(seeds, n):
    """(B, n) random numbers in [0, 1), each row from a seed of its own: they do not depend on the
    rest of the batch, on the process or on the device."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.stack([torch.rand(n, generator=generator) for generator in generators])


def patch_mask(noise, size, patch=6, ratio=0.4):
    """The mask m, (B, 1, size, size) bool: True keeps, False removes `ratio` of the patches.

    noise: (B, L), L = ceil(size / patch)^2: the patches with the smallest numbers are removed.
    Patches at the right and lower border may be cut off.
    """
    n = -(-size // patch)
    kept = noise.argsort(1).argsort(1) >= int(ratio * n * n)
    m = kept.view(-1, 1, n, n).repeat_interleave(patch, 2).repeat_interleave(patch, 3)
    return m[..., :size, :size]


def perturb(c, noise):
    """Features (c1, c4) of B images, each channel dropped with probability 1/2, or else doubled.
    noise: (B, C1) and (B, C4) in [0, 1)."""
    return [x * (2 * (u >= 0.5)[..., None, None]).to(x.dtype) for x, u in zip(c, noise)]


def cutmix_boxes(noise, size, p=0.5):
    """Where pixels of another image go: noise float (B, 5) in [0, 1) -> bool (B, size, size).

    A box with probability p, or nothing. noise: is there a box; its area, 0.02 to 0.4 of the image;
    height / width, 0.3 to 1 / 0.3 if such a box fits; its place, x and y.
    """
    there, area, ratio, x, y = noise.T[..., None]                   # each (B, 1)
    area = 0.02 + 0.38 * area
    lowest, highest = area.clamp_min(0.3), (1 / area).clamp_max(1 / 0.3)
    ratio = lowest + (highest - lowest) * ratio
    at = torch.arange(size, device=noise.device)

    def inside(side, place):
        side = (side.sqrt() * size).floor().clamp_max(size)         # rounding may exceed it
        first = (place * (size - side + 1)).floor()
        return (at >= first) & (at < first + side)

    rows, columns = inside(area * ratio, y) & (there < p), inside(area / ratio, x)
    return rows[:, :, None] & columns[:, None, :]


def partners(index):
    """For each sample the position of the next one (in a circle) that shows another image, or its
    own if there is none. index: the images shown, integers (B,) on the CPU -> long (B,)."""
    n = torch.arange(len(index))
    following = (n[:, None] + n) % len(index)
    other = (index[following] != index[:, None]).int().argmax(1)    # the first; 0, itself, if none
    return (n + other) % len(index)


def mix(x, partner, box):
    """CutMix: x with the box out of x[partner]. x: (B, .., S, S); partner (B,); box (B, S, S)."""
    box = box.view(len(box), *[1] * (x.dim() - 3), *box.shape[1:])
    return torch.where(box, x[partner], x)


# ------------------------------------------------------------------------------------------ loss
# To paste this section elsewhere: math, torch, torch.nn.functional as F; nothing more.
# n, in all losses: the number of pixels to divide by. None: the valid pixels of this batch. With
# several processes it is the mean of their numbers: the mean of their gradients is then that of the
# whole batch.

def masked_mean(values, valid, n=None, streams=1):
    """The mean over the valid pixels; of several streams the sum of their means. 0 without any.
    values, valid: (streams * B, H, W), float and bool.  n: (streams,) or None."""
    n = valid.reshape(streams, -1).sum(1) if n is None else n
    sums = torch.where(valid, values, 0).reshape(streams, -1).sum(1)
    return (sums / n.clamp(min=1e-6)).sum()


@torch.no_grad()
def hard_pixels(p_l, y_l):
    """OHEM: y_l with 255 at easy pixels. Hard are those whose own class has a probability below
    0.7, and at least the hardest 100,000 a crop of this batch. Shapes: as supervised()."""
    ce = F.cross_entropy(p_l.float(), y_l.long(), ignore_index=255, reduction="none")
    hardest = ce.flatten().topk(min(100_000 * len(ce), ce.numel())).values
    return torch.where(ce >= hardest[-1].clamp(max=-math.log(0.7)), y_l, 255)


def supervised(p_l, y_l, n=None):
    """L_s, Eq. 1: CE over the pixels that are not void.
    p_l: logits (B, C, H, W).  y_l: (B, H, W) integers, 255 = void."""
    ce = F.cross_entropy(p_l.float(), y_l.long(), ignore_index=255, reduction="none")
    return masked_mean(ce, y_l != 255, n)


def consistency(p, y, conf, void, psi=0.95, n=None):
    """One half of L_u, Eq. 2, without lambda_u: CE to the pseudo-labels y that are confident.

    p: logits (B, C, H, W).  y: (B, H, W) long, 0..C-1.  conf: (B, H, W) in 0..1.  void: (B, H, W)
    bool, True on padding. The sum is over the confident pixels, but n is all that are valid: the
    fewer are confident, the smaller the loss.
    """
    ce = F.cross_entropy(p.float(), y, reduction="none")
    return masked_mean(ce * (conf >= psi), ~void, n)


def pixel_loss(r, x):
    """The bracket of Eq. 8: the sum of the three streams' mean squared errors, Eq. 5.
    r, x: (3 B, 3, H, W), reconstructions and their targets."""
    return (r - x).square().mean(1).reshape(3, -1).mean(1).sum()


def semantic_loss(p_m, target, void, n=None):
    """The bracket of Eq. 13: predictions of the masked views against those of the whole views.

    p_m: logits (3 B, C, H, W).  target: pseudo-labels (3 B, H, W) long, for cross entropy; or
    probabilities (3 B, C, H, W), for the squared error of Table VII.  void: (3 B, H, W) bool.
    """
    if target.is_floating_point():
        loss = (p_m.float().softmax(1) - target).square().mean(1)
    else:
        loss = F.cross_entropy(p_m.float(), target, reduction="none")
    return masked_mean(loss, ~void, n, streams=3)


# ------------------------------------------------------------------------------- the two phases

class Views(NamedTuple):
    """The input of a step: B labelled and B unlabelled crops, S x S. suponly has the first two."""
    x_l: torch.Tensor               # (B, 3, S, S) labelled, normalised
    y_l: torch.Tensor               # (B, S, S) their labels, 255 = void and padding
    x_w: torch.Tensor = None        # (B, 3, S, S) unlabelled, weak view: scaled, cropped, flipped
    x_s: torch.Tensor = None        # (B, 3, S, S) its strong view: colours, blur, CutMix
    void_w: torch.Tensor = None     # (B, S, S) bool, True on the padding of x_w
    void_s: torch.Tensor = None     # (B, S, S) bool, True on the padding of x_s
    partner: torch.Tensor = None    # (B,) the unlabelled image that CutMix's box is from
    box: torch.Tensor = None        # (B, S, S) bool, that box; empty in half of them
    m: torch.Tensor = None          # (B, 1, S, S) bool, mask of Phase II: True keeps
    drop: list = None               # noise that perturbs c1 and c4: (B, C1) and (B, C4)


class Seen(NamedTuple):
    """The results of Phase I that Phase II needs, without gradient. Streams l, s and fp are the
    labelled view, the strong view, and the weak view with perturbed features."""
    y: torch.Tensor                 # (3 B, S, S) their classes: of p_l, y_w mixed, y_w
    conf_w: torch.Tensor            # (2 B, S, S) confidence of p_w, for the last two
    conf: torch.Tensor = None       # (3 B, S, S) confidence of p_l, p_s and p_fp
    target: torch.Tensor = None     # (3 B, S, S) argmax of these; --semantic mse: probabilities
    c_fp: tuple = None              # c1 and c4 of x_w, perturbed


def lambdas(cfg):
    """The weights of Eq. 14, 0 for what is switched off, as (u, mp, mf, ms), and the divisor."""
    u = cfg.lambda_u if cfg.method != "suponly" else 0
    mp = cfg.lambda_mp if cfg.pi and cfg.method in ("s4mim", "mim") else 0
    mf = cfg.lambda_mf if cfg.fea and cfg.method == "s4mim" else 0
    ms = cfg.lambda_ms if cfg.se and cfg.method == "s4mim" else 0
    return (u, mp, mf, ms), 1 + 2 * u + 3 * (mp + mf + ms)


def masked(cfg):
    """Whether there is a Phase II."""
    return any(lambdas(cfg)[0][1:])


@contextmanager
def averages_kept(model):
    """BatchNorm normalises by its batch, as always in training, but its running averages stay. Only
    the pass of x_l and x_w moves them: these are like the images that are evaluated."""
    norms = [m for m in model.modules() if getattr(m, "track_running_stats", False)]
    for norm in norms:
        norm.track_running_stats = False
    yield
    for norm in norms:
        norm.track_running_stats = True


def phase_one(model, v, cfg, machine):
    """Phase I, FixMatch with UniPerb, on Views v. Returns L_s, L_u without lambda_u, the share of
    pixels that are confident, and Seen, None for suponly."""
    B, size, suponly = len(v.x_l), v.x_l.shape[2:], v.x_w is None
    with machine.autocast():
        c = model.E(v.x_l if suponly else torch.cat([v.x_l, v.x_w]))
        p = model.SeD(*c, size)
        if not suponly:
            c_fp = perturb((x[B:] for x in c), v.drop)
            with averages_kept(model):
                p_s, p_fp = model(v.x_s), model.SeD(*c_fp, size)
    p_l, p_w = p.split([B, len(p) - B])
    y_l = hard_pixels(p_l, v.y_l) if cfg.ohem else v.y_l
    L_s = supervised(p_l, y_l, machine.mean((y_l != 255).sum()))                        # Eq. 1
    if suponly:
        return L_s, torch.zeros_like(L_s), torch.zeros_like(L_s), None

    conf_w, y_w = p_w.detach().softmax(1).max(1)
    conf_w_mixed, y_w_mixed = (mix(t, v.partner, v.box) for t in (conf_w, y_w))
    n_s, n_w = (machine.mean((~void).sum()) for void in (v.void_s, v.void_w))
    L_u = (consistency(p_s, y_w_mixed, conf_w_mixed, v.void_s, cfg.psi, n_s)
           + consistency(p_fp, y_w, conf_w, v.void_w, cfg.psi, n_w))                    # Eq. 2
    confident = masked_mean((conf_w >= cfg.psi).float(), ~v.void_w, n_w)
    # the classes of labelled images are predicted, too: their ground truth has void
    seen = Seen(torch.cat([p_l.detach().argmax(1), y_w_mixed, y_w]),
                torch.cat([conf_w_mixed, conf_w]))
    if masked(cfg):
        p = torch.cat([p_l, p_s, p_fp]).detach().softmax(1)
        conf, y = p.max(1)
        seen = seen._replace(conf=conf, target=p if cfg.semantic == "mse" else y,
                             c_fp=tuple(x.detach() for x in c_fp))
    return L_s, L_u, confident, seen


def phase_two(model, prototypes, v, seen, cfg, machine):
    """Phase II, mask-induced learning. Moves the prototypes. Returns L_mimpi, L_mimfea and L_mimse
    without their weights, 0 for those that are switched off; and fea, r and p_m of the masked
    views, None likewise."""
    B, size = len(v.x_l), v.x_l.shape[2:]
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
            # in one batch with the whole x_w: r_fp and its target have the same BatchNorm
            fea, whole = model.PiD(*map(torch.cat, zip(c, seen.c_fp))).split([3 * B, B])  # Eq. 3
        if mp:
            classwise = cfg.method != "mim"
            r = model.PiD.heads(fea, y, size, classwise)                                # Eq. 6-7
            with torch.no_grad():       # the reconstruction where nothing is removed
                x_fp = model.PiD.heads(whole, y[2 * B:], size, classwise)
        if ms:
            p_m = model.SeD(*c, size)
    if mp:
        L_pi = pixel_loss(r, torch.cat([v.x_l, v.x_s, x_fp]))                           # Eq. 8
    if mf:
        conf = conf if cfg.conf else torch.ones_like(conf)
        sums = prototypes.sums(fea[:B], y[:B], conf[:B], (visible & valid)[:B])
        prototypes.update(machine.mean(sums))                                           # Eq. 9
        removed = ~visible & valid
        n = machine.mean(prototypes.weights(y, conf, removed).sum((0, 2, 3)))
        L_fea = prototypes(fea, y, conf, removed, n)                                    # Eq. 10-12
    if ms:
        n = machine.mean((~void).reshape(3, -1).sum(1))
        L_se = semantic_loss(p_m, seen.target, void, n)                                 # Eq. 13
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
    # once a step: DistributedDataParallel would send after each backward pass, and requires every
    # weight to be in each
    common.average_gradients(model, machine.world)
    scaler.step(optimizer)
    scaler.update()
    return machine.mean(torch.stack([one + two, L_s, L_u, L_pi, L_fea, L_se, confident]))


# -------------------------------------------------------------------------------------- networks

DEPTHS = {"resnet18": (2, 2, 2, 2), "resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3)}
RELEASE = {name: f"https://download.pytorch.org/models/{name}-{digest}.pth" for name, digest in (
    ("resnet18", "f37072fd"), ("resnet50", "0676ba61"), ("resnet101", "63fe2227"))}


def conv(i, o, k=3, stride=1, dilation=1):
    return nn.Conv2d(i, o, k, stride, dilation * (k // 2), dilation, bias=False)


def conv_bn(i, o, k=3, stride=1, dilation=1):
    return conv(i, o, k, stride, dilation), nn.BatchNorm2d(o)


def conv_bn_relu(*shape):
    return nn.Sequential(*conv_bn(*shape), nn.ReLU())


class Block(nn.Module):
    """A residual block, i -> o channels: two 3x3 if o = width (ResNet-18), or a 1x1, a 3x3 and a
    1x1 if o = 4 width (ResNet-50 and -101)."""

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

    The last stage (with a stride of 8 the last two) doubles the dilation instead of the stride,
    from its second block on. The names of the weights are torchvision's, those of the deep stem
    UniMatch's, so that published weights load.
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


class Decoder(nn.Module):
    """DeepLabv3+ up to its last layer: (c1, c4) -> (B, 4 * width, H/4, W/4).

    ASPP on c4: a 1x1, three dilated 3x3 and the mean over the image, concatenated and projected.
    c1, reduced to few channels, is then concatenated, and two 3x3 follow. stride: of c4.
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


class SeD(Decoder):
    """The semantic decoder: (c1, c4) -> logits (B, C, *size), float32."""

    def __init__(self, channels, width, classes, stride=16):
        super().__init__(channels, width, stride)
        self.classifier = nn.Conv2d(4 * width, classes, 1)

    def forward(self, c1, c4, size):
        # contiguous, for softmax and cross entropy: with their gradient they take 470 ms instead of
        # 590 (8 x 21 x 321 x 321, one core, torch 2.13.0)
        return resize(self.classifier(super().forward(c1, c4)).float(), size).contiguous()


class PiD(Decoder):
    """The pixel decoder. Called it is PiD*, (c1, c4) -> fea (B, D, H/4, W/4); PiD.heads follow."""

    def __init__(self, channels, width, classes, stride=16):
        super().__init__(channels, width, stride)
        self.heads = Heads(4 * width, classes)


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


def build(cfg, classes):
    """The network with random weights; PiD only where a loss needs it."""
    (_, mp, mf, _), _ = lambdas(cfg)
    return S4MIM(classes, cfg.backbone, cfg.stem, cfg.width, cfg.stride, pixel=mp + mf > 0)


def compile_parts(model, cfg):
    """--compile: E, SeD and PiD, each in place so that the names of the weights stay."""
    for part in filter(None, (model.E, model.SeD, model.PiD) if cfg.compile else ()):
        part.compile(dynamic=False)


def load_encoder(E, cfg):
    """--pretrained: copy weights with torchvision's names into E, and print which are not used.
    Raises UserError if they cannot be read, or if less than nine of ten of E's tensors fit."""
    if cfg.pretrained == "imagenet" and cfg.stem == "deep":
        raise UserError("--pretrained imagenet: torchvision's weights have the standard stem: "
                        "leave --stem deep out, or give a file with --pretrained")
    source = common.read_weights(cfg.pretrained, RELEASE[cfg.backbone], "state_dict")
    source = {k.removeprefix("module.").removeprefix("backbone."): v for k, v in source.items()}
    target = E.state_dict()
    fits = {k: v for k, v in source.items()
            if k in target and torch.is_tensor(v) and v.shape == target[k].shape}
    E.load_state_dict(fits, strict=False)
    # without BatchNorm's counters, which old files do not have
    found, missing, unused = (sorted(k for k in names if not k.endswith("batches_tracked"))
                              for names in (fits, target.keys() - fits, source.keys() - fits))
    if len(found) < 0.9 * len(found + missing):
        raise UserError(f"--pretrained {cfg.pretrained}: {len(found)} of its tensors fit the "
                        f"{len(found + missing)} of {cfg.backbone} with --width {cfg.width}: give "
                        "weights of this network, or none")
    if os.environ.get("RANK", "0") == "0":
        print(f"pretrained: {len(found)} of E's {len(found + missing)} tensors"
              + (f"; not in the file: {', '.join(missing)}" if missing else "")
              + (f"; not used: {', '.join(unused)}" if unused else ""))


# ------------------------------------------------------------------------------------------ data

MEAN, STD = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]


def labeled_split(name, root, labeled, seed=0, protocol="lists"):
    """The Items of the training set as two lists in its order: (labelled, unlabelled).

    labeled: "N", a number of images, or "1/16", a share of those with a mask (rounded up): the
    first by a hash of seed and name, so that a draw is the same everywhere and 1/16 is part of 1/8.
    Or a file with a line `image mask`, or only a stem, for each: only the names count.
    unlabelled: all others without their masks, which nothing can read then; if there are none, the
    labelled ones without theirs.
    """
    items = data.list_items(name, root, "train", protocol)
    for line in data.listing_faults(name, "train", items):
        raise UserError(line)
    found = re.fullmatch(r"\s*(-?\d+)(?:/(\d+))?\s*", labeled)
    if not found and Path(labeled).is_file():
        stems = listed_stems(labeled, items, name)
    else:
        ranked = sorted((i.stem for i in items if i.mask),
                        key=lambda stem: common.seed_of(seed, data.fingerprint(stem)))
        n = int(found[1]) if found else 0
        if found and found[2]:
            n = -(-len(ranked) * n // int(found[2])) if 0 < n <= int(found[2]) else 0
        if not 1 <= n <= len(ranked):
            raise UserError(f"--labeled {labeled}: {name} has {len(ranked)} images with a mask in "
                            f"train: give a number from 1 to {len(ranked)}, a share above 0 and at "
                            "most 1, like 1/16, or a file that lists images (no such file here)")
        stems = set(ranked[:n])
    labelled = [i for i in items if i.stem in stems]
    rest = [i for i in items if i.stem not in stems]
    if not rest:
        common.say(f"{name}: nothing is unlabelled: the {len(labelled)} labelled images serve as "
                   "such too")
    return labelled, [i._replace(mask=None) for i in rest or labelled]


def listed_stems(file, items, name):
    """{stem: number of its line} of the Items that a file lists."""
    known = {i.image.stem: i for i in items} | {i.stem: i for i in items}
    found = {}
    text = Path(file).read_text("utf-8-sig", "surrogateescape")     # names are in any encoding
    for number, line in enumerate(map(str.strip, text.split("\n")), 1):
        if not line:
            continue
        words = re.split(r"\s", line)       # a name may hold spaces: try the line, then half of it
        image = " ".join(words[:len(words) // 2])
        spellings = [text for path in map(Path, (line, image)) for text in (str(path), *(
            "/".join([*path.parts[k:-1], path.stem]) for k in range(len(path.parts))))]
        item = next((known[text] for text in spellings if text in known), None)
        if item is None:
            what = (f"`{line[:90]}` is not an image in train of {name}"
                    f"{common.nearest_name(Path(image or line).stem, known)}: "
                    "correct the line or remove it")
        elif item.mask is None:
            what = f"{item.stem} has no mask in {name}: add the mask, or remove the line"
        elif item.stem in found:
            what = f"{item.stem} is already in line {found[item.stem]}: remove one of the two"
        else:
            found[item.stem] = number
            continue
        raise UserError(f"{file}, line {number}: {what}")
    if not found:
        raise UserError(f"{file}: no line in it: list an image a line, as `image mask` or a stem")
    return found


def datasets(cfg):
    """(labelled, unlabelled): training crops of both kinds, and the hash of the labelled list."""
    protocol = cfg.setup if cfg.data == "voc" else "lists"
    items = labeled_split(cfg.data, cfg.root, cfg.labeled, cfg.split_seed, protocol)
    sets = [data.Dataset(cfg.data, cfg.root, "train", items=part, size=cfg.size, crop=cfg.size,
                         scale=(cfg.zoom / cfg.scale, cfg.zoom * cfg.scale), flip=True, train=True,
                         seed=common.seed_of(cfg.seed, kind), palette=cfg.palette or None,
                         in_memory=cfg.in_memory)
            for kind, part in enumerate(items)]
    n, paper = len(sets[1]), 10_582 - len(sets[0])
    if cfg.data == "voc" and n < paper:
        steps = [data.steps_per_epoch(k, cfg.batch_size // 2) for k in (n, paper)]
        common.say(f"voc: {n} unlabelled images instead of the paper's {paper}, {steps[0]} steps "
                   f"an epoch instead of {steps[1]}: get SBD's list of 10582 names, "
                   "ImageSets/Segmentation/train_aug.txt; its images are in JPEGImages")
    return *sets, data.labeled_hash(items[0])


def labeled_lines(items):
    """The text of a file that labeled_split reads as these Items: lines `image mask`, or only a
    stem if there are no two files."""
    def line(item):
        if item.image == data.DRAWN or not item.mask:
            return item.stem
        base = os.path.commonpath(item[1:])
        return " ".join(path.relative_to(base).as_posix() for path in item[1:])

    return "".join(f"{line(item)}\n" for item in items)


def eval_loader(cfg, split, machine):
    """The images of a split at their own sizes; if all have the same, in batches of about as many
    pixels as in training."""
    images = data.Dataset(cfg.data, cfg.root, split, size=cfg.size, whole=True,
                          palette=cfg.palette or None, in_memory=cfg.in_memory)
    (h, w), same_size = images.shapes[0], len(set(images.shapes)) == 1
    batch = max(1, cfg.batch_size * cfg.size ** 2 // (h * w)) if same_size else 1
    return data.eval_loader(images, batch, **machine.loading)


def to_unit(image, device):
    """uint8 (B, 3, H, W) -> float 0..1 on the device, channels last: convolutions are faster."""
    return image.to(device, non_blocking=True, memory_format=torch.channels_last).float() / 255


def normalize(image):
    """0..1 -> E's input: minus ImageNet's mean, divided by its deviation. 0 is then the mean
    colour, which removed patches have."""
    mean, std = (t.to(image.device, non_blocking=True) for t in (MEAN, STD))
    return (image - mean) / std


def make_views(labeled, unlabeled, cfg, channels, seeds, device):
    """The Views of two batches (image uint8, label uint8, index) of the loaders.
    channels: (C1, C4) of E.  seeds: one for each place in the batch.  unlabeled: None for suponly.
    Of its labels only 255 is used, the padding."""
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
    partner = partners(index).to(device, non_blocking=True)
    box = cutmix_boxes(cut, cfg.size)
    m = patch_mask(patches, cfg.size, cfg.patch, cfg.ratio) if masked(cfg) else None
    return Views(x_l, y_l, normalize(weak), normalize(mix(strong, partner, box)), void,
                 mix(void, partner, box), partner, box, m, drop)


# ------------------------------------------------------------------------------- train, evaluate

def places(length, window):
    """Where windows start: two thirds of their side apart, the last at the border."""
    last = max(0, length - window)
    return [*range(0, last, max(1, 2 * window // 3)), last]


# whole images have many sizes: cudnn would try all its algorithms on each, --compile compile each
@torch.compiler.set_stance("force_eager")
@torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=True)
def probabilities(model, x, cfg, machine):
    """The probabilities of normalised images x, (B, 3, H, W) -> (B, C, H, W) float32. --window
    whole: of all at once; slide: by windows of --size, averaged where they overlap."""
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
    """Scores on images at their own sizes, without void: in percent miou and class_iou, from one
    confusion matrix over all images, and constant, the miou of the best prediction that is the same
    class everywhere; and the loss, CE."""
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
    """The training run. Returns the scores at its end."""
    B = cfg.batch_size // 2 // machine.world                # of each kind, in this process
    out, device = Path(cfg.out), machine.device
    labeled, unlabeled, digest = datasets(cfg)
    val_loader = eval_loader(cfg, data.eval_split(cfg.data), machine)
    info, per_epoch = labeled.info, data.steps_per_epoch(len(unlabeled), cfg.batch_size // 2)
    common.default_epochs(cfg, per_epoch)
    total, C = cfg.epochs * per_epoch, len(info.classes)

    torch.manual_seed(common.seed_of(cfg.seed))
    model = build(cfg, C).to(device, memory_format=torch.channels_last)
    if cfg.pretrained != "none" and not common.resuming(cfg):
        load_encoder(model.E, cfg)
    if cfg.init and not common.resuming(cfg):
        common.load_weights(model, cfg.init, "s4mim", C, may_lack="PiD.")   # suponly has none
    model = common.synchronized(model, machine)
    prototypes = Prototypes(C, 4 * cfg.width, cfg.alpha, cfg.tau, cfg.dic).to(device)
    optimizer, scaler = make_optimizer(model, cfg, machine.fused), machine.scaler()
    run = common.Run(cfg, "s4mim", machine, info,
                     f"labelled {digest}, unlabelled {data.labeled_hash(unlabeled.items)}",
                     dict(model=model, prototypes=prototypes, optimizer=optimizer, scaler=scaler),
                     TERMS, min(total, cfg.max_steps or total), per_epoch, interrupt=interrupt,
                     labeled=len(labeled), labeled_hash=digest)
    if machine.main:
        common.write(out / "labeled.txt", labeled_lines(labeled.items))
    compile_parts(model, cfg)

    # each kind has an order of its own: an image meets other partners in each epoch
    loaders = [data.train_loader(images, B, seed=common.seed_of(cfg.seed, kind), endless=True,
                                 start=run.start, stop=run.stop, **machine.loading)
               for kind, images in enumerate((labeled, unlabeled))]
    if cfg.method == "suponly":
        loaders[1] = [None] * (run.stop - run.start)
    same = [i.stem for i in labeled.items] == [i.stem for i in unlabeled.items]
    run.announce(f"{parameters(model.E, model.SeD) / 1e6:.1f} M parameters, {len(labeled)} "
                 f"labelled (list {digest}) and {0 if same else len(unlabeled)} unlabelled images, "
                 f"{len(val_loader.dataset)} {data.eval_split(cfg.data)} images")
    for step, *batches in zip(range(run.start, run.stop), *loaders):
        # 1. set the learning rates
        for group in optimizer.param_groups:
            group["lr"] = rate(step, total, group)

        # 2. one step. Its random numbers depend on (seed, step, place in the batch) and nothing
        #    else, so that a resumed run repeats an uninterrupted one
        model.train()
        seeds = [common.seed_of(cfg.seed, step, machine.rank + machine.world * j) for j in range(B)]
        now = replace(cfg, method="suponly") if step < cfg.burn_in else cfg
        v = make_views(*batches, now, model.E.channels, seeds, device)
        terms = train_step(model, prototypes, optimizer, scaler, machine, now, v)

        # 3. evaluate, log, save
        due = run.note(step, terms, *((images, batch[2]) for images, batch
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
    """Write OUT/samples.png, and OUT/metrics.json with the scores of a checkpoint's state and those
    of the dataset's other splits; print these scores."""
    more = {split: evaluate(model, eval_loader(cfg, split, machine), cfg, machine, info)
            for split in data.source_of(cfg.data).splits[2:]}
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
    """Normalised images (B, 3, H, W) -> uint8 (B, H, W, 3)."""
    x = ((x.float().cpu() * STD + MEAN) * 255).round().clamp(0, 255)
    return x.to(torch.uint8).permute(0, 2, 3, 1).numpy()


@torch.no_grad()
def draw_samples(model, images, cfg, machine, info, scores, path, n=6):
    """samples.png: n images, their ground truth and prediction."""
    model.eval()
    rows = []
    for i in range(0, len(images), max(1, len(images) // n))[:n]:
        image, label, _ = images[i]
        x = normalize(to_unit(image[None], machine.device))
        p = probabilities(model, x, cfg, machine)[0].argmax(0).cpu()
        step = max(1, max(p.shape) // 320)
        rows.append([tile[::step, ::step] for tile in (*shown(x), label, p)])
    common.draw_sheet(path, list(zip(*rows)), ["image", "ground truth", "prediction"], info,
                      f"{cfg.method}: mIoU {scores['miou']:.2f}")


@torch.no_grad()
@torch.compiler.set_stance("force_eager")               # of another batch size than a step
def draw_step(model, labeled, unlabeled, cfg, machine, info, path, n=4):
    """step.png: n unlabelled images in one step. Grey in pseudo-labels is left out of L_u. The last
    row shows the output of one head, that of the largest object. All processes have to call this,
    because the two phases average over them."""
    model.train()
    batches = [next(iter(data.train_loader(images, n, seed=common.seed_of(cfg.seed), stop=1,
                                           endless=True))) for images in (labeled, unlabeled)]
    seeds = [common.seed_of(cfg.seed, 0, j) for j in range(n)]
    v = make_views(*batches, cfg, model.E.channels, seeds, machine.device)
    s, C = slice(n, 2 * n), len(info.classes)
    with averages_kept(model), machine.autocast():
        *_, seen = phase_one(model, v, cfg, machine)
        y_w_mixed, y_w = seen.y[n:].masked_fill(seen.conf_w < cfg.psi, 255).cpu().chunk(2)
        rows = {"weak view": shown(v.x_w), "pseudo-label": y_w,
                "strong view": shown(v.x_s), "mixed pseudo-label": y_w_mixed}
        if masked(cfg):
            spare = Prototypes(C, 4 * cfg.width).to(machine.device)     # Phase II moves them
            _, (fea, r, p_m) = phase_two(model, spare, v, seen, cfg, machine)
            rows["masked strong view"] = shown(v.x_s * v.m)
            if p_m is not None:
                rows["prediction from masked"] = p_m[s].argmax(1).cpu()
            if r is not None:
                rows["painted by PiD"] = shown(r[s])
            if r is not None and cfg.method != "mim":
                y, area = seen.y[s], F.one_hot(seen.y[s], C).sum((1, 2))
                area[:, list(info.background)] = 0
                y = at_features(torch.where(y == area.argmax(1)[:, None, None], y, C))  # C: none
                rows["painted by one head"] = shown(model.PiD.heads(fea[s], y, v.x_s.shape[2:]))
    if machine.main:
        common.draw_sheet(path, list(rows.values()), list(rows), info,
                          "One step on unlabelled images", "void or not confident")


# ----------------------------------------------------------------------------- the other commands

def load(path):
    return common.load(path, "s4mim", Config, data.Info, build)


def evaluate_only(cfg, origin):
    """--eval A.pt [B.pt ..]: the scores of each, in OUT/metrics.json and OUT/samples.png, for
    several checkpoints in OUT/RUN-CHECKPOINT each."""
    machine = common.Machine(cfg)
    out = Path(cfg.out if origin.get("out") == "flag" else Path(cfg.eval[0]).parent / "eval")
    for path, folder in common.result_folders(cfg.eval, out).items():
        trained, info, model, state = load(path)
        now = common.checkpoint_config(cfg, origin, path, trained, check, "eval", "data",
                                       "palette", "batch_size", "window", "zoom")
        loader = eval_loader(now, data.eval_split(now.data), machine)
        if loader.dataset.info.classes != info.classes:
            raise UserError(f"--data {now.data} has other classes than {path} was trained for")
        model.to(machine.device)
        scores = evaluate(model, loader, now, machine, info)
        write_metrics(model, loader, now, machine, info, folder, {**state, "scores": scores})


@torch.no_grad()
def segment(model, image, cfg, machine):
    """Segment one image: uint8 (H, W, 3) -> class indices uint8 (H, W), and their probability,
    float32 (H, W). Above 2048 pixels a side a smaller copy is segmented, by windows, and the result
    enlarged: C planes of floats would not fit into memory."""
    H, W = image.shape[:2]
    shrink = min(1, 2048 / max(H, W))
    x = to_unit(torch.from_numpy(image.copy()).permute(2, 0, 1)[None], machine.device)
    if shrink < 1:
        cfg = replace(cfg, window="slide")
        x = F.interpolate(x, (max(1, round(H * shrink)), max(1, round(W * shrink))),
                          mode="bilinear", antialias=True)
    conf, label = probabilities(model, normalize(x), cfg, machine).max(1)
    return tuple(np.array(Image.fromarray(one[0].cpu().numpy()).resize((W, H), Image.NEAREST))
                 for one in (label.to(torch.uint8), conf))


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

        # how often B images pass through E, SeD and PiD in a step
        passes = {"suponly": (1, 1, 0), "fixmatch": (3, 4, 0), "mim": (6, 4, 4),
                  "s4mim": (6, 7, 4)}[cfg.method]
        images = B if cfg.method == "suponly" else 2 * B
        result |= common.time_steps(step, cfg.bench, images, device,
                                    float(B * np.array(passes) @ (of_E, gmacs - of_E, of_PiD)))
    print(json.dumps(result))


# ------------------------------------------------------------------------------------------ main

def fill_in(cfg):
    """Replace what is given as 0 in --zoom and --patch by its value; suponly has no baseline."""
    if not cfg.zoom:
        cfg.zoom = min(1.0, round(1.5 * cfg.size / (data.short_side(cfg.data, cfg.root) or 1), 3))
    # as large a share of a small crop as the paper's 6 pixels are of 321, but at least 2 pixels
    cfg.patch = cfg.patch or max(2, round(6 * data.share_of_321(cfg.size)))
    if cfg.method == "suponly":
        cfg.baseline = "none"


def check(cfg):
    """Check what the parser cannot. Raises UserError."""
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
        raise UserError("--setup aug: only --data voc has such masks")
    if cfg.width % 4 or cfg.size < 32 or cfg.stride not in (8, 16):
        raise UserError(f"--width {cfg.width} --size {cfg.size} --stride {cfg.stride}: expected a "
                        "multiple of 4; at least 32; 8 or 16")
    world = int(os.environ.get("WORLD_SIZE", 1))
    if cfg.batch_size % (2 * world) or cfg.batch_size < 4 * world:
        # BatchNorm needs more than one value per channel, and CutMix another image
        raise UserError(f"--batch-size {cfg.batch_size}: half of it is labelled, half not: give a "
                        f"multiple of {2 * world}, at least {4 * world} for {world} processes")
    if (cfg.ckpt or cfg.to) and not cfg.predict:
        raise UserError("--ckpt and --to need --predict")


def train_baseline(cfg, machine, interrupt):
    """--baseline suponly: train it in OUT/suponly. Returns its mIoU."""
    out = Path(cfg.out)
    started = (out / "config.json").exists()
    if not cfg.resume:
        common.refuse_run(out)
    elif started and not (out / "suponly").exists():
        raise UserError(f"--resume: {out} was started without a baseline: give --baseline none")
    scores = train(replace(cfg, method="suponly", out=str(out / "suponly")), machine, interrupt)
    if interrupt.due(0)[0]:                 # Ctrl-C came after the last step of the baseline
        interrupt.end("the baseline")
    cfg.resume = cfg.resume and started     # the second run may have nothing to resume yet
    return scores["miou"]


def main():
    cfg, origin = common.parse(Config, RECIPES, __doc__)
    cfg.out = cfg.out or str(Path("out") / f"s4mim-{Path(cfg.data).name}")
    if cfg.predict:
        return common.predict_folder(cfg, origin, load, check, data, segment, "window", "zoom")
    if cfg.eval:
        return evaluate_only(cfg, origin)
    fill_in(cfg)
    check(cfg)
    common.show_config(cfg, origin)
    if cfg.bench >= 0:
        return bench(cfg)
    machine = common.Machine(cfg, first=Path(cfg.out) / "suponly")
    interrupt = common.Interrupt(machine)
    suponly = None if cfg.baseline == "none" else train_baseline(cfg, machine, interrupt)
    scores = train(cfg, machine, interrupt)
    if suponly is not None and machine.main:
        print(f"with the same labels and steps: --method suponly {suponly:.2f}, "
              f"--method {cfg.method} {scores['miou']:.2f}")


if __name__ == "__main__":
    common.run(main)
