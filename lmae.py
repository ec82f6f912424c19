r"""L-MAE, a label masked autoencoder: it completes broken segmentation labels.

    image, label  ->  one plane a class, stacked on the image        stack fuse       Eq. 1
                  ->  patches, some of them removed                  mask strategy
                  ->  encoder on the patches that are left           L-MAE encoder    Eq. 2-9
                  ->  the image of the removed patches put back      IPS
                  ->  decoder on all patches -> a class per pixel    L-MAE decoder    Eq. 4-9
    loss: cross entropy, a weight per class                                           Eq. 10-12

Jia et al., "A label masked autoencoder for image-guided segmentation label completion", Patterns
2025 (equations and tables are numbered as there; arXiv 2211.11242 is an earlier version).

Lines 180 to 514 are the method, the rest is plumbing.

    python lmae.py                                          # drawn images, CPU, three minutes
    python lmae.py --data my/folder                         # masks that are partly 255; then:
    python lmae.py --complete my/folder --ckpt out/lmae-folder/best.pt --to REPAIRED
    python lmae.py --complete LABELS --images IMAGES --ckpt out/lmae-folder/best.pt --to REPAIRED
    torchrun --nproc_per_node=4 lmae.py --data voc          # several GPUs

Results of small models from scratch (the paper's is built and counted, but has not been trained
here), on one core of an AMD EPYC, torch 2.13.0; --amp bf16 --threads 1 belong to each command.
Scores are the mIoU of the missing pixels, in brackets the nearest fill's. CELLS is a folder of
masks in which half of the N-pixel cells of a grid are 255.
- CamVid, whole training labels, seeds 0, 1, 2; 26 to 37 minutes. N = 8: 84.1, 84.0, 84.1 (81.9);
  16: 78.7, 78.6, 78.7 (74.4); 32: 69.5, 69.4, 69.6 (64.1).
    python lmae.py --data camvid --model small --epochs 130 --eval-every 10 --seed 0
    python lmae.py --complete CELLS --images data/camvid/val --truth data/camvid/valannot \
        --ckpt out/lmae-camvid/last.pt --to REPAIRED
- A dataset repairs itself: the 367 training masks with N = 16, trained on these alone, seed 0: 76.6
  (72.9); 41 minutes.
    python lmae.py --data SELF --epochs 240 --eval-every 40
    python lmae.py --complete SELF --truth WHOLE --ckpt out/lmae-SELF/last.pt --to REPAIRED
- A U-Net trained on these masks, mIoU on whole validation labels, seeds 0, 1, 2: broken 47.5, 49.8,
  48.4; nearest fill 48.9, 50.2, 49.0; repaired 47.3, 51.8, 49.5; whole 49.6, 50.9, 49.6. The
  differences are within the noise: so small a network is not limited by its labels.
    python masksup.py --data SET --method base --size 144 --epochs 40 --eval-every 20
- GlaS, cells of 32 pixels set to 0, the 80 test labels, seed 0: 63.0 (40.8).
    python lmae.py --data glas --model small --epochs 0 --eval-every 50
    python lmae.py --complete CELLS --images glas/test/img --truth glas/test/labelcol \
        --broken background --ckpt out/lmae-glas/last.pt --to REPAIRED
- PA-mIoU on CamVid after 15 epochs, with --supplement nearest 64.4, 64.3, 64.4, with image (IPS)
  45.7, 45.3, 44.0 (62.4, 62.2, 62.1): so short a run with IPS does not reach the nearest fill.
    python lmae.py --data camvid --size 112 --patch 8 --batch-size 8 --lr 1e-3 --schedule cosine \
        --warmup 100 --epochs 15 --enc-blocks 1 --dec-blocks 3 --enc-dim 256 --dec-dim 192 \
        --heads 4 --drop-path 0 --weight-decay 0 --mask-strategy random --eval-every 5 \
        --supplement nearest

Departures from the paper:
- --supplement nearest and --punch are additions for repairing labels: see LMAE, punch(), damage().
  A folder trains with both, camvid with the first; voc and cityscapes with IPS.
- Eq. 10 as printed gives Pascal VOC's background a weight of 1e-13 and drops it from the loss, yet
  the tables count it. V(x) is taken as the standard deviation, and background counts.
- beta and gamma of Eq. 10 stay at 1 (--class-weights fixed; the paper's is learned). They lower the
  loss that they weigh: gamma falls while rare classes have larger errors. With VOC's shares and
  constant errors it is 0 after 10,000 steps, and -2.6 after the paper's 41,600, where rare classes
  weigh 0.05 and 98 % of the loss is background (test_all.py, LmaeLoss). log.csv has both. The
  plateau schedule follows val_ce, the cross entropy without class weights.
- A head has D / 8 dimensions (the text also says 64, which 1440 and 720 do not give).
- 8 and 6 blocks, the best of the tables; the text's default is 12 and 8.
- Positions are also added before the decoder: IPS alone does not say where a patch belongs.
- In repairs, an object pixel in a rebuilt patch keeps its label (the paper rebuilds the whole
  patch), and all patches that are at least half background are rebuilt, in passes.
- Table 4 trains small FCN and U-Net for a number of epochs (the paper: 300 iterations), and adds
  the nearest fill, void for background, and the complete labels.
- cityscapes is scored on the whole of each image, in crops next to each other.
Left open by the texts: the learning rate and the patch size (here 1e-4 and 16), the rate of
DropPath (0.1 at the last block), mirrored crops, the initial weights (Xavier), which classes are
background where none has that name (the "stuff" of Cityscapes and CamVid), and the masks of the
evaluation (random, fixed by seed and index). The "preservation status" of Fig. 2 is in none of
Eq. 4-8. Crops of 448 pad VOC's 500 x 375: 16 % is black and void.

Slips of the paper: the sort orders of background-first and label-first are swapped in the Patterns
text (here they do what their names and the rest of the text say); the column heads of Table 4 and
the columns of Table 9 are swapped; Table 9's last row is "layer"; the text on Fig. 6 says "with
IPS" for "without"; Cityscapes' row for m = 0.5 averages 89.0, not 86.4.

Paper item   | python lmae.py ..  (rows of other methods in Tables 1 to 3 are quoted: not here)
Fig. 1       | --data voc                                  # OUT/samples.png
Fig. 2, 3, 5 | not here: drawings of the network, of IPS (both are class LMAE) and of Table 4
Fig. 4       | --complete LABELS --images IMAGES --ckpt A.pt B.pt --to DIR --broken background
Fig. 6, 7, 8 | --eval A.pt B.pt --ratios 0.3 0.5 0.7       # --supplement image, none; 8: worst.png
Table 1, 3   | --data voc --mask-ratio 0.5                 # to 0.8; pa_class_iou in metrics.json
Table 2      | --data cityscapes --mask-ratio 0.5          # or 0.6
Table 4      | --augment --ckpt out/lmae-voc/best.pt
Table 5      | --data voc --enc-blocks 12 --dec-blocks 8 --enc-dim 1024 --dec-dim 512  # and so on
Table 6      | --data voc --mask-strategy random           # or label, background, mixed
Table 7      | not here: BUS-M2AE masks by another method; L-MAE's rows are "mixed" of Table 6
Table 8      | --data voc --bench 20                       # and for Table 5 --bench 0 only counts
Table 9      | --data voc --mask-strategy random --fuse direct   # or insert, layer
"""
import json
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import ImageOps

import common
import data
from common import UserError, parameters


# ---------------------------------------------------------------------------------------- config

@dataclass
class Config(common.RunConfig):    # which has seed, device, resume and the like
    data: str = "shapes"           # a dataset that data.py lists, or your own folder
    out: str = ""                  # run folder; empty: out/lmae-DATA
    model: Literal["auto", "small", "base", "paper"] = "auto"  # auto: small for folders, else paper
    # down to mask_ratio: the paper's values for VOC
    epochs: int = 400              # 0: as many as make 3000 steps
    batch_size: int = 24           # images a step, over all processes
    lr: float = 1e-4               # learning rate of Adam
    crop: int = 448                # side of the crop in pixels; 0: size, or 1/3 of the shorter side
    size: int = 224                # the crop is resized to this side
    patch: int = 16                # side of a patch: L = (size / patch)^2 tokens
    enc_blocks: int = 8            # EB of Table 5
    dec_blocks: int = 6            # DB
    enc_dim: int = 1440            # ED
    dec_dim: int = 720             # DD
    heads: int = 8                 # h of Eq. 8, in encoder and decoder
    weight_decay: float = 1e-4     # L2 penalty, not decoupled as in AdamW
    plateau_factor: float = 0.8    # factor of the learning rate when the validation loss stalls
    plateau_patience: int = 5      # evaluations without a lower validation loss before that
    plateau_threshold: float = 1e-3  # the share by which it must fall to count as lower
    mask_ratio: float = 0.5        # share of the patches that is removed
    mask_strategy: Literal["mixed", "random", "background", "label"] = "mixed"  # mixed is 1:2:2
    fuse: Literal["layer", "direct", "insert"] = "layer"  # Eq. 1, or the other rows of Table 9
    supplement: Literal["none", "image", "nearest"] = "image"  # given to the decoder: see LMAE
    punch: float = 0.0             # half of the labels lose cells, up to this share: see punch()
    class_weights: Literal["learned", "fixed", "none", "literal"] = "fixed"  # of Eq. 10
    drop_path: float = 0.1         # rate in the last block, 0 in the first, linear between; ours
    flip: bool = True              # mirror half of the training crops; our choice
    schedule: Literal["plateau", "cosine"] = "plateau"  # the paper's; cosine suits short runs
    warmup: int = 0                # steps over which the learning rate rises to lr
    ratios: tuple = ()             # --eval: also at these mask ratios, for a plot like Fig. 6
    scored: Literal["centre", "all"] = "centre"  # the centre crop of an image, or all its crops
    complete: tuple = ()           # broken labels to repair: files, or folders of them
    suspect: tuple = ()            # labels to search for mistakes, given as for --complete
    images: tuple = ()             # --complete: the images of the labels, with the same names
    ckpt: tuple = ()               # --complete, --augment: checkpoints, e.g. one per mask ratio
    to: str = ""                   # --complete: new folder for the repaired labels
    truth: tuple = ()              # --complete: true labels, only to score the result
    broken: Literal["255", "background"] = "255"  # --complete: what to rebuild, see complete()
    sure: float = 0.0              # --complete: fill only pixels of at least this confidence
    augment: bool = False          # the label augmentation experiment (Table 4)
    augment_epochs: int = 300      # --augment: epochs of each of its segmentation networks


# small models trained from scratch, for repairing labels
SMALL = dict(crop=0, epochs=0, lr=1e-3, schedule="cosine", warmup=100, weight_decay=0.0,
             drop_path=0.0, mask_strategy="random", supplement="nearest", punch=0.9)
RECIPES = {                        # what differs from the defaults above, by dataset
    # three minutes on a CPU core: small patches and few of them, a small model, and "random":
    # with "mixed" it takes longer to learn to look at the neighbours
    "shapes": dict(epochs=44, batch_size=16, lr=2e-3, crop=48, size=48, patch=4, enc_blocks=1,
                   dec_blocks=2, enc_dim=128, dec_dim=128, heads=4, drop_path=0.0,
                   weight_decay=0.0, schedule="cosine", warmup=50, mask_strategy="random",
                   supplement="nearest", eval_every=4),
    "voc": {}, "nyuv2": {}, "glas": {},
    "cityscapes": dict(batch_size=48, size=448, scored="all", eval_every=10),
    "camvid": dict(crop=320, supplement="nearest"),     # its images are 480 x 360
    "polyp": dict(crop=288),       # CVC-ClinicDB's are 384 x 288
    # --model: for your own folder, on a laptop: ten minutes; on one GPU; the paper's
    "small": dict(SMALL, enc_blocks=2, dec_blocks=4, enc_dim=256, dec_dim=192, heads=4,
                  batch_size=8),
    "base": dict(SMALL, enc_blocks=6, dec_blocks=4, enc_dim=512, dec_dim=256, lr=5e-4),
    "paper": dict(supplement="image"),
}
RECIPES["materials"] = RECIPES["shapes"]


# ----------------------------------------------------------------------------------------- model
# To paste this section: import math, torch, torch.nn as nn, torch.nn.functional as F.

class LMAE(nn.Module):
    """Encoder on the kept patches of image and label, decoder on all patches, N classes a pixel.

    supplement: what the decoder is given where a patch was removed. "image" is the paper's IPS,
    the image of the patch; "none" is zeros. "nearest", an addition, gives all patches the image,
    the planes of the nearest shown labels and the distance to these; and the logit of the nearest
    label gets a learned bonus for each distance, so that the network learns where it is wrong.

    The patch embeddings are convolutions with stride = kernel, written as Linear layers over
    flattened patches: only the patches that are used are embedded, as the paper's GFLOPs imply.
    """

    def __init__(self, classes, size=224, patch=16, enc_blocks=8, dec_blocks=6, enc_dim=1440,
                 dec_dim=720, heads=8, drop_path=0.1, fuse="layer", supplement="image"):
        super().__init__()
        self.classes, self.patch, self.fuse, self.supplement = classes, patch, fuse, supplement
        L, channels = (size // patch) ** 2, {"layer": classes + 3, "direct": 4, "insert": 6}[fuse]
        added = {"none": 0, "image": 3, "nearest": classes + 4}[supplement]        # channels

        def blocks(n, dim):
            rates = [drop_path * i / max(1, n - 1) for i in range(n)]
            return nn.ModuleList(Block(dim, heads, rate) for rate in rates)

        self.embed = nn.Linear(channels * patch ** 2, enc_dim)
        self.encoder, self.enc_norm = blocks(enc_blocks, enc_dim), nn.LayerNorm(enc_dim)
        self.enc_to_dec = nn.Linear(enc_dim, dec_dim)
        self.ips = nn.Linear(added * patch ** 2, dec_dim) if added else None
        self.trust = nn.Parameter(torch.full((17,), 4.0)) if supplement == "nearest" else None
        self.decoder, self.dec_norm = blocks(dec_blocks, dec_dim), nn.LayerNorm(dec_dim)
        self.head = nn.Linear(dec_dim, patch ** 2 * classes)
        self.register_buffer("enc_pos", positions(L, enc_dim), persistent=False)
        self.register_buffer("dec_pos", positions(L, dec_dim), persistent=False)
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)

    def planes(self, label):
        """(B, K, p * p) -> (B, K, N, p * p) bool, one plane a class."""
        return label[:, :, None] == torch.arange(self.classes, device=label.device)[:, None]

    def fuse_map(self, image, label):
        """Eq. 1 on patches: (B, K, 3 * p * p), (B, K, p * p) -> F, (B, K, channels * p * p).
        Void (255) is 0 in every label plane."""
        if self.fuse == "layer":                # l_1 .. l_N, one plane a class, then the image
            return torch.cat([self.planes(label).flatten(2).to(image.dtype), image], -1)
        one = torch.where(label < self.classes, (label + 1.0) / self.classes, 0.0).to(image.dtype)
        if self.fuse == "direct":               # the label as a fourth channel
            return torch.cat([image, one], -1)
        r, g, b = image.chunk(3, -1)            # "insert": a copy of it after each of R, G and B
        return torch.cat([r, one, g, one, b, one], -1)

    def forward(self, image, label, keep, removed):
        """
        image: (B, 3, S, S) float in [-1, 1].  label: (B, S, S) integer, the shown part of it, 255
        = void or hidden. keep, removed: (B, K), (B, L - K) int64, which together hold every patch
        once; only "nearest" reads shown labels in removed patches.
        Returns logits (B, L, p * p, N), the pixels of each patch row by row.
        """
        pixels = patchify(image, self.patch)                                        # (B, L, 3 pp)
        labels = patchify(label[:, None], self.patch)                               # (B, L, pp)
        x = self.embed(self.fuse_map(take(pixels, keep), take(labels, keep)))       # (B, K, ED)
        x = x + self.enc_pos[keep]                                                  # Eq. 2-3
        for block in self.encoder:
            x = block(x)
        x = self.enc_to_dec(self.enc_norm(x))                                       # (B, K, DD)
        supplement = x.new_zeros(*removed.shape, x.shape[-1])
        if self.supplement == "image":      # IPS: the image of the removed patches, no label
            supplement = self.ips(take(pixels, removed)).to(x.dtype)                # (B, L-K, DD)
        restore = torch.cat([keep, removed], 1).argsort(1)
        x = take(torch.cat([x, supplement], 1), restore) + self.dec_pos             # (B, L, DD)
        if self.supplement == "nearest":
            near, distance = (patchify(t[:, None], self.patch) for t in nearest_label(label))
            planes = self.planes(near).flatten(2).to(pixels.dtype)
            x = x + self.ips(torch.cat([planes, pixels, (distance / self.patch).clamp(max=4)], -1))
        for block in self.decoder:
            x = block(x)
        x = self.head(self.dec_norm(x)).unflatten(2, (self.classes, -1))            # (B, L, N, pp)
        if self.supplement == "nearest":
            trust = self.trust[distance.clamp(max=len(self.trust) - 1)]             # (B, L, pp)
            x = x.float().scatter_add(2, near[:, :, None].long(), trust[:, :, None])
        return x.transpose(2, 3)


class Block(nn.Module):
    """One LMMSA block (Eq. 4-9): pre-norm attention, then pre-norm FFN, each under DropPath."""

    def __init__(self, dim, heads, drop_path):
        super().__init__()
        self.heads, self.drop_path = heads, drop_path
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def attention(self, x):
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)     # Eq. 6
        z = F.scaled_dot_product_attention(q, k, v)                     # (B, h, L, D / h)   Eq. 7
        return self.proj(z.transpose(1, 2).flatten(2))                                     # Eq. 8

    def ffn(self, x):
        return self.fc2(F.relu(self.fc1(x)))                                               # Eq. 9

    def drop(self, x):
        """DropPath: leave the branch out for a share of the samples, scale it up for the rest."""
        if not self.training or self.drop_path == 0:
            return x
        kept = 1 - self.drop_path
        return x * x.new_empty(x.shape[0], 1, 1).bernoulli_(kept) / kept

    def forward(self, x):
        """(B, L, D) -> (B, L, D)."""
        x = x + self.drop(self.attention(self.norm1(x)))                                   # Eq. 4
        return x + self.drop(self.ffn(self.norm2(x)))                                      # Eq. 5


def patchify(x, p):
    """(B, C, H, W) -> (B, L, C * p * p): patches row by row, each flattened as a conv reads it."""
    x = x.unflatten(3, (-1, p)).unflatten(2, (-1, p))                     # (B, C, H/p, p, W/p, p)
    return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpatchify(x, p):
    """(B, L, p * p) -> (B, S, S), for a square of L patches."""
    n = math.isqrt(x.shape[1])
    return x.unflatten(2, (p, p)).unflatten(1, (n, n)).transpose(2, 3).flatten(3).flatten(1, 2)


def take(x, ids):
    """Rows `ids` (B, K) of x (B, L, D) -> (B, K, D)."""
    return x.gather(1, ids[..., None].expand(-1, -1, x.shape[-1]))


def positions(L, dim):
    """Fixed 1-D sine-cosine positions (L, dim) of Eq. 2-3: even columns sine, odd ones cosine."""
    angle = torch.arange(L)[:, None] / 10000 ** (torch.arange(0, dim, 2) / dim)
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)


def nearest_label(label):
    """Fill each void pixel with the label of the nearest one that has a label, by city-block
    distance (|dx| + |dy|); of equally near ones, with the smallest.

    label: (B, H, W) integer, 255 = void.  Returns the filled label, uint8, and the distance in
    pixels, int32, both (B, H, W); with no label in an image these are 0 and at least 2^16.

    Two cumulative minima an axis, of distance and label in one number: no wait for the device. The
    Euclidean nearest_fill() takes 20 to 70 times as long, for 58.1 on CamVid instead of 58.4.
    """
    if label.device.type == "mps":                      # has no cumulative minimum of integers
        return tuple(t.to(label.device) for t in nearest_label(label.cpu()))
    key = label.int().masked_fill(label == 255, 1 << 24)            # distance * 256 + label
    for _ in range(2):                                              # along rows, then columns
        at = 256 * torch.arange(key.shape[2], device=label.device, dtype=torch.int32)
        before = (key - at).cummin(2).values + at
        after = (key + at).flip(2).cummin(2).values.flip(2) - at
        key = torch.minimum(before, after).mT
    return (key & 255).to(torch.uint8), key >> 8


# --------------------------------------------------------------------------------------- masking
# To paste this section: import torch. Take along patchify(), unpatchify() of the model.

def draw(seeds, L, punched=False):
    """The random numbers of masks: (B, L + 1) in [0, 1), each row from its own seed, so that the
    mask of a sample depends on neither the batch nor the process nor the device. For punch() there
    are 3 + 16 L more."""
    n = L + 1 + (3 + 16 * L) * punched
    return torch.stack([torch.rand(n, generator=torch.Generator().manual_seed(seed))
                        for seed in seeds])


def select(label, patch, ratio, strategy, background, noise):
    """Choose the patches to remove. Pure: the same noise gives the same choice.

    label: (B, S, S) integer, 255 = void.  background: (256,) bool, which labels are background.
    noise: (B, L + 1) from draw(): L numbers that shuffle and break ties, one to pick a strategy.
    Returns keep (B, L - M) and removed (B, M), int64, M = int(L * ratio).

    "First" means removed first: background-first removes the patches with the most background
    pixels, label-first those with the most object pixels. "mixed" is 1:2:2, random first.
    """
    labels = patchify(label[:, None].long(), patch)                                 # (B, L, pp)
    L = labels.shape[1]
    shuffle, pick = noise[:, :L], noise[:, L:L + 1]
    is_background = background[labels]
    most_background = is_background.sum(-1) + shuffle                               # (B, L)
    most_object = (~is_background & (labels != 255)).sum(-1) + shuffle              # (B, L)
    if strategy != "mixed":
        pick = torch.full_like(pick, {"random": 0.0, "background": 0.2, "label": 0.6}[strategy])
    key = torch.where(pick < 0.6, most_background, most_object)
    order = torch.where(pick < 0.2, shuffle, key).argsort(dim=1, descending=True, stable=True)
    M = int(L * ratio)
    return order[:, M:], order[:, :M]


def mask_of(removed, L, patch):
    """removed (B, M) -> (B, S, S) bool, True = removed: the m of PA-mIoU."""
    m = torch.zeros(len(removed), L, dtype=torch.bool, device=removed.device)
    m = m.scatter_(1, removed, True)[..., None].expand(-1, -1, patch * patch)
    return unpatchify(m, patch)


def punch(patch, max_share, noise, S):
    """Damage that does not follow the patches: the pixels to hide, (B, S, S) bool, and which
    samples are damaged, (B,) bool. An addition.

    Half of the samples lose a share, drawn from 0..max_share, of the cells of a grid, whose side
    is drawn from a quarter of a patch to four patches, uniformly in its logarithm.
    noise: (B, L + 4 + 16 L) from draw(): after the numbers of select() one each for whether, how
    much and how large, and one for each cell.
    """
    L = (S // patch) ** 2
    whether, share, side = noise[:, L + 1:L + 4].T
    side = (patch / 4 * 16 ** side).round().long().clamp(min=-(-patch // 4))
    cell = torch.arange(S, device=noise.device) // side[:, None]                    # (B, S)
    index = cell[:, :, None] * (cell[:, -1:, None] + 1) + cell[:, None, :]          # (B, S, S)
    chance = noise[:, L + 4:].gather(1, index.flatten(1)).view_as(index)
    punched = whether < 0.5
    return (chance < max_share * share[:, None, None]) & punched[:, None, None], punched


def damage(label, patch, ratio, strategy, max_share, background, noise):
    """What a training step removes and hides: (keep, removed, the label that is shown).

    In the paper the patches that select() removes lose their whole label. In a sample that punch()
    damages (max_share > 0) the emptiest patches are removed, as in repairs, and their other pixels
    stay shown ("nearest" reads them). Shapes as in select() and punch().
    """
    keep, removed = select(label, patch, ratio, strategy, background, noise)
    M, L = removed.shape[1], keep.shape[1] + removed.shape[1]
    hidden = mask_of(removed, L, patch)
    if max_share:
        holes, punched = punch(patch, max_share, noise, label.shape[-1])
        empty = patchify((holes | (label == 255))[:, None].float(), patch).sum(-1)
        order = (empty + noise[:, :L]).argsort(dim=1, descending=True, stable=True)
        keep = torch.where(punched[:, None], order[:, M:], keep)
        removed = torch.where(punched[:, None], order[:, :M], removed)
        hidden = torch.where(punched[:, None, None], holes, hidden)
    return keep, removed, label.masked_fill(hidden, 255)


# ------------------------------------------------------------------------------------------ loss
# To paste this section: import torch, torch.nn as nn, torch.nn.functional as F. Take along
# patchify() of the model.

class ClassWeights(nn.Module):
    """w_i = 1 - 1 / (1 + beta exp(-(x_i - E x) / (V + xi))^gamma)                         Eq. 10
           = sigmoid(ln beta - gamma z_i),  z_i = (x_i - E x) / (V + xi)

    with x_i the share of class i in the labelled pixels. Modes: `learned` learns beta and gamma
    from 1, `fixed` leaves them at 1; V is the standard deviation. `literal` is Eq. 10-11 as
    printed: learned, V the variance, background left out. `none`: every weight is 1.
    """

    def __init__(self, share, mode="learned", background=()):
        """share: (N,) float that sums to 1.  background: the classes that `literal` leaves out."""
        super().__init__()
        self.mode, spread = mode, share.var(unbiased=False)
        spread = spread if mode == "literal" else spread.sqrt()
        counted = torch.ones_like(share)
        counted[list(background) if mode == "literal" else []] = 0
        self.register_buffer("z", (share - share.mean()) / (spread + 1e-6))         # xi = 1e-6
        self.register_buffer("counted", counted)
        learned = mode in ("learned", "literal")
        self.log_beta = nn.Parameter(torch.zeros(()), requires_grad=learned)        # beta > 0
        self.gamma = nn.Parameter(torch.ones(()), requires_grad=learned)

    def forward(self):
        """The weights, (N,) float32."""
        if self.mode == "none":
            return self.counted
        return torch.sigmoid(self.log_beta - self.gamma * self.z) * self.counted    # Eq. 10


def class_sums(logits, label, patch):
    """What the loss is made of, by class, over all pixels that are not void.

    logits: (B, L, p * p, N).  label: (B, S, S) integer, 255 = void.
    Returns (2, N) float32, sums over the pixels of each class: of -log p(y), and of 1.
    """
    N = logits.shape[-1]
    y = patchify(label[:, None].long(), patch)                        # in the order of the logits
    # class before pixel, as in memory: with 11 classes last log_softmax takes 40 times as long
    ce = F.cross_entropy(logits.float().transpose(2, 3).flatten(0, 1), y.flatten(0, 1),
                         ignore_index=255, reduction="none").view_as(y)                 # Eq. 11
    # Bins for each patch, then their sum: one bin a class for the whole batch is 1 % off in float32
    # at 448 x 448 and batch 48, and on CUDA more threads wait for it. The last bin is void.
    bins = ce.new_zeros(2, *y.shape[:2], N + 1)
    bins = bins.scatter_add(3, y.clamp(max=N).expand(2, -1, -1, -1),
                            torch.stack([ce, torch.ones_like(ce)]))
    return bins[..., :N].sum((1, 2))


def loss_fn(logits, label, weights, patch, denominator=None):
    """Weighted cross entropy, Eq. 12, a float32 scalar; 0 where nothing is labelled.

    logits: (B, L, p * p, N).  label: (B, S, S) integer, 255 = void.  weights: (N,).
    denominator: scalar; None: the sum of the weights of this batch's pixels. With the mean of
    these sums over processes, the mean of the losses is the loss of all their batches together.
    """
    numerator, own = (class_sums(logits, label, patch) * weights).sum(1)
    return numerator / (own if denominator is None else denominator).clamp(min=1e-12)


# --------------------------------------------------------------------------------- training step

def to_input(image, device):
    """uint8 (B, 3, S, S) -> float in [-1, 1] on the device."""
    return image.to(device, non_blocking=True).float() / 127.5 - 1


def train_step(net, weights, optimizer, scaler, machine, cfg, background, image, label, noise):
    """One step on uint8 (B, 3, S, S) and (B, S, S); noise: from draw(). Returns the loss, which
    stays on the device. Under torchrun it is that of the batches of all processes together."""
    device = machine.device
    image, label = to_input(image, device), label.to(device, non_blocking=True)
    keep, removed, shown = damage(label, cfg.patch, cfg.mask_ratio, cfg.mask_strategy, cfg.punch,
                                  background, noise.to(device, non_blocking=True))
    with machine.autocast():
        logits = net(image, shown, keep, removed)
    w, denominator = weights(), None
    if machine.world > 1:       # the counts do not depend on what is learned, the weights may
        counts = torch.histc(label.float(), 256, 0, 256)[:len(w)]       # one bin for each label
        denominator = (machine.mean(counts) * w).sum()
    loss = loss_fn(logits, label, w, cfg.patch, denominator)
    optimizer.zero_grad(set_to_none=True)
    scaler.scale(loss).backward()
    if weights.gamma.requires_grad:             # DistributedDataParallel averages those of net
        common.average_gradients(weights, machine.world)
    scaler.step(optimizer)
    scaler.update()
    return machine.mean(loss)


# ------------------------------------------------------------------------------------------ data

def dataset(cfg, split, train=False, whole=False):
    return data.Dataset(cfg.data, cfg.root, split, size=cfg.size, crop=cfg.crop, train=train,
                        flip=cfg.flip, seed=cfg.seed, protocol="lmae", whole=whole,
                        palette=cfg.palette or None, in_memory=cfg.in_memory)


class Crops(torch.utils.data.Dataset):
    """The whole images of a split, cut into crops next to each other, as (image, label, index):
    of 2048 x 1024 pixels a centre crop of 448 is a tenth."""

    def __init__(self, cfg, split):
        self.images = dataset(cfg, split, whole=True)
        self.cfg, self.info, self.last = cfg, self.images.info, (None, None)
        self.crops = [(i, y, x) for i, (h, w) in enumerate(self.images.shapes)
                      for y in range(0, h, cfg.crop) for x in range(0, w, cfg.crop)]

    def __len__(self):
        return len(self.crops)

    def __getitem__(self, index):
        i, y, x = self.crops[index]
        if self.last[0] != i:                               # decoded once for all of its crops
            image, label, _ = self.images[i]
            self.last = i, (image.permute(1, 2, 0).numpy(), label.numpy())
        image, label = (a[y:y + self.cfg.crop, x:x + self.cfg.crop] for a in self.last[1])
        image, label = data.geometry(image, label, self.cfg.size, self.cfg.crop, place=(0, 0))
        return torch.from_numpy(image.transpose(2, 0, 1).copy()), torch.from_numpy(label), index


def validation_set(cfg):
    """(image, label, index) of the split that a model is scored on, as --scored says."""
    split = data.eval_split(cfg.data)
    return Crops(cfg, split) if cfg.scored == "all" else dataset(cfg, split)


def build(cfg, classes):
    return LMAE(classes, cfg.size, cfg.patch, cfg.enc_blocks, cfg.dec_blocks, cfg.enc_dim,
                cfg.dec_dim, cfg.heads, cfg.drop_path, cfg.fuse, cfg.supplement)


def patches(cfg):
    """L, the number of patches."""
    return (cfg.size // cfg.patch) ** 2


def class_share(dataset, most=500):
    """x of Eq. 10, (N,): the classes' shares of the labelled pixels, in about `most` images."""
    some = range(0, len(dataset), max(1, len(dataset) // most))
    with common.waiting("counting the pixels of each class"):
        counts = sum(torch.bincount(dataset[i][1].flatten(), minlength=256) for i in some)
    counts = counts[:len(dataset.info.classes)].float()
    return counts / counts.sum().clamp(min=1)


def background_table(info):
    """(256,) bool: which labels are background."""
    return torch.isin(torch.arange(256), torch.tensor(info.background))


# ------------------------------------------------------------------------------------ evaluation

SCORES = ("miou", "pa_miou", "pasted_miou", "miou_nearest", "pa_miou_nearest")


def nearest_fill(label, removed):
    """Give each removed pixel the label of the nearest kept one: the baseline.

    label: (B, H, W) uint8, 255 = void.  removed: (B, H, W) bool.  Returns (B, H, W) uint8.
    Distance is Euclidean; sources are kept pixels below 255 (of equally near ones, the first
    found). With none in an image the answer is class 0.

    Two passes: the nearest source within each row, then the best row, until no farther one can be
    nearer: after some 30 of 224 rows for patches of 16.
    """
    if label.device.type == "mps":                    # has no cummax of integers
        return nearest_fill(label.cpu(), removed.cpu()).to(label.device)
    _, H, W = label.shape
    far = 2 * (H + W)                                 # farther than any pixel
    source = ~removed & (label != 255)
    x = torch.arange(W, device=label.device)
    left = torch.where(source, x, -far).cummax(-1).values
    right = torch.where(source, x, far).flip(-1).cummin(-1).values.flip(-1)
    column = torch.where(x - left <= right - x, left, right)
    row_label = label.gather(-1, column.clamp(0, W - 1)).masked_fill((column - x).abs() >= W, 0)
    # keys whose minimum is the answer: unit * distance^2 + 256 * which row is looked at + label
    unit = 512 * H
    row = unit * (column - x).square() + row_label
    best = row.clone()
    for k in range(1, H):
        if (best[removed] < unit * (k * k + 1)).all():
            break
        step = unit * k * k + 512 * k                 # 2 k: the k-th row above, 2 k + 1: below
        best[:, k:] = torch.minimum(best[:, k:], row[:, :-k] + step)
        best[:, :-k] = torch.minimum(best[:, :-k], row[:, k:] + step + 256)
    return torch.where(removed, best % 256, label).to(label.dtype)


def predict(model, image, label, index, cfg, machine, info):
    """Mask uint8 (B, 3, S, S) and (B, S, S) by (seed, index), and predict. Returns the logits, the
    labels predicted everywhere (B, S, S) uint8, and the mask (B, S, S) bool, on the device."""
    device, L = machine.device, patches(cfg)
    noise = draw([common.seed_of(cfg.seed, i) for i in index], L).to(device)
    label, background = label.to(device), background_table(info).to(device)
    keep, removed = select(label, cfg.patch, cfg.mask_ratio, cfg.mask_strategy, background, noise)
    m = mask_of(removed, L, cfg.patch)
    with machine.autocast():
        logits = model(to_input(image, device), label.masked_fill(m, common.VOID), keep, removed)
    return logits, unpatchify(logits.argmax(-1), cfg.patch).to(label.dtype), m


@torch.no_grad()
def evaluate(model, loader, cfg, machine, info, weights, nearest=True):
    """Score the model with int(L * mask_ratio) patches removed; masks are fixed by (seed, index).

    Returns percentages: pa_miou (PA-mIoU: removed pixels only), miou (predictions everywhere),
    pasted_miou (the kept labels pasted over them), pa_class_iou, class_iou; with nearest, those of
    the nearest fill, pa_miou_nearest and miou_nearest; the loss, and ce, the same without class
    weights. Void is never counted.
    """
    model.eval()
    N, device = len(info.classes), machine.device
    counts = torch.zeros(5 if nearest else 3, N, N, dtype=torch.int64, device=device)   # of SCORES
    sums = torch.zeros(2, N, device=device)
    for image, label, index in loader:
        logits, predicted, m = predict(model, image, label, index.tolist(), cfg, machine, info)
        label = label.to(device)
        sums += class_sums(logits, label, cfg.patch)
        target = label.masked_fill(~m, common.VOID)                   # the pixels of PA-mIoU
        pairs = [(predicted, label), (predicted, target), (label.where(~m, predicted), label)]
        if nearest:
            filled = nearest_fill(label, m)
            pairs += [(filled, label), (filled, target)]
        counts += torch.stack([common.confusion(answer, truth, N) for answer, truth in pairs])
    common.all_reduce(counts, sums)
    scores = dict(zip(SCORES, map(common.miou, counts)))
    for name, w in ("loss", weights()), ("ce", 1):
        numerator, denominator = (sums * w).sum(1)
        scores[name] = (numerator / denominator.clamp(min=1e-9)).item()
    class_iou, pa_class_iou = (common.class_iou(matrix).tolist() for matrix in counts[:2])
    return scores | {"pa_class_iou": pa_class_iou, "class_iou": class_iou}


# -------------------------------------------------------------------------------------- training

def make_optimizer(model, weights, cfg, fused):
    """Adam with its own weight decay; beta and gamma of Eq. 10 are not decayed."""
    learned = [p for p in weights.parameters() if p.requires_grad]
    groups = {"params": list(model.parameters())}, {"params": learned, "weight_decay": 0}
    return torch.optim.Adam(groups, cfg.lr, weight_decay=cfg.weight_decay, fused=fused)


def learning_rate(step, cfg, total):
    """Of a step: rising over the warm-up, then falling to 0 on a half cosine."""
    if step < cfg.warmup:
        return cfg.lr * (step + 1) / cfg.warmup
    done = (step - cfg.warmup) / max(1, total - cfg.warmup)
    return cfg.lr * (1 + math.cos(math.pi * done)) / 2


def train(cfg):
    """The training run, from top to bottom."""
    machine = common.Machine(cfg)
    out, device, resuming = Path(cfg.out), machine.device, common.resuming(cfg)
    train_set, val_set = dataset(cfg, "train", train=True), validation_set(cfg)
    info, per_epoch = train_set.info, data.steps_per_epoch(len(train_set), cfg.batch_size)
    common.default_epochs(cfg, per_epoch)
    total, N = cfg.epochs * per_epoch, len(info.classes)
    background, scored = background_table(info).to(device), replace(cfg, mask_strategy="random")
    if info.threshold is not None and machine.main:
        print("in black and white masks nothing is missing: if 255 is missing in yours, save them "
              "with the ids 0, 1 and 255, and leave out --palette")

    torch.manual_seed(common.seed_of(cfg.seed))
    model = build(cfg, N).to(device)
    if cfg.init and not resuming:
        common.load_weights(model, cfg.init, "lmae", N)
    # counted once: a resumed run has it from the checkpoint, other processes from the first one
    share = class_share(train_set) if machine.main and not resuming else torch.full((N,), 1 / N)
    weights = ClassWeights(share, cfg.class_weights, info.background).to(device)
    common.same_buffers(weights, machine)
    optimizer, scaler = make_optimizer(model, weights, cfg, machine.fused), machine.scaler()
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, "min", cfg.plateau_factor, cfg.plateau_patience, cfg.plateau_threshold)
    run = common.Run(
        cfg, "lmae", machine, info, data.labeled_hash(train_set.items),
        dict(model=model, weights=weights, optimizer=optimizer, scaler=scaler, plateau=plateau),
        ["train_loss"], min(total, cfg.max_steps or total), per_epoch,
        may_differ={"epochs"} if cfg.schedule == "plateau" else set())

    net = common.parallel(common.compiled(model, cfg), machine)
    loader = data.train_loader(train_set, cfg.batch_size // machine.world, seed=cfg.seed,
                               start=run.start, stop=run.stop, **machine.loading)
    val_loader = data.eval_loader(val_set, cfg.batch_size, **machine.loading)
    run.announce(f"{parameters(model) / 1e6:.1f} M parameters, {len(train_set)} training and "
                 f"{len(val_set)} validation images")
    for step, (image, label, index) in zip(range(run.start, run.stop), loader):
        # 1. learning rate: after the warm-up "plateau" keeps it, and lowers it in part 3
        if step < cfg.warmup or cfg.schedule == "cosine":
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, cfg, total)

        # 2. one step: random numbers depend on (seed, step) and on (seed, epoch, index) only, so
        #    that a resumed run repeats an uninterrupted one
        net.train()
        torch.manual_seed(common.seed_of(cfg.seed, step, machine.rank))             # DropPath
        noise = draw([common.seed_of(cfg.seed, step // per_epoch, i) for i in index.tolist()],
                     patches(cfg), cfg.punch > 0)
        loss = train_step(net, weights, optimizer, scaler, machine, cfg, background, image, label,
                          noise)

        # 3. evaluate, log, save
        due = run.note(step, loss[None], (train_set, index))
        if due == "evaluate":
            # the nearest fill never changes: once is enough
            scores = run.scores | evaluate(model, val_loader, scored, machine, info, weights,
                                           nearest="pa_miou_nearest" not in run.scores)
            # ce, as the weights of the loss may change; not where --max-steps ends within an epoch
            if cfg.schedule == "plateau" and run.step % (per_epoch * cfg.eval_every) == 0:
                plateau.step(scores["ce"])
            run.log(scores, "pa_miou", f"validation {scores['loss']:.4f}  mIoU "
                    f"{scores['miou']:.1f}  PA-mIoU {scores['pa_miou']:.1f} (nearest fill "
                    f"{scores['pa_miou_nearest']:.1f})", val_loss=scores["loss"],
                    val_ce=scores["ce"], **{name: scores[name] for name in SCORES},
                    beta=weights.log_beta.exp().item(), gamma=weights.gamma.item())
        if due:
            run.save()

    if machine.main:
        draw_samples(model, val_set, scored, machine, info, run.scores, out / "samples.png")
        write_metrics(out, run.state(), scored)


def write_metrics(out, state, cfg):
    """OUT/metrics.json of a checkpoint's state, and its scores on the screen."""
    scores, weights = state["scores"], state["weights"]
    objects = [iou for c, iou in enumerate(scores["pa_class_iou"])
               if c not in state["info"]["background"] and not math.isnan(iou)]
    objects = sum(objects) / max(1, len(objects))       # Table 1; Tables 3 and 5 have all classes
    common.write_json(Path(out) / "metrics.json", {
        **{name: scores[name] for name in (*SCORES, "class_iou", "pa_class_iou")},
        "pa_miou_objects": objects, "epoch": state["history"][-1]["epoch"],
        "steps": state["step"], "seconds": state["seconds"],
        "params": sum(p.numel() for p in state["model"].values()),
        "mask_ratio": cfg.mask_ratio, "mask_strategy": cfg.mask_strategy,
        "beta": weights["log_beta"].exp().item(), "gamma": weights["gamma"].item()})
    of_objects = f", of the objects alone {objects:.2f}" if cfg.data == "voc" else ""
    print(f"PA-mIoU {scores['pa_miou']:.2f} (nearest fill {scores['pa_miou_nearest']:.2f}"
          f"{of_objects}), mIoU {scores['miou']:.2f}, with the kept labels "
          f"{scores['pasted_miou']:.2f} (nearest fill {scores['miou_nearest']:.2f})  -> {out}")
    if line := warning(scores):
        print(line)


def warning(scores):
    """A line if the nearest fill beats these scores, or "". There are none before an evaluation."""
    model, nearest = scores.get("pa_miou", 100), scores.get("pa_miou_nearest", 0)
    return "" if model > nearest else (
        f"PA-mIoU {model:.1f} against {nearest:.1f} of the nearest label: do not use it to repair")


@torch.no_grad()
def draw_samples(model, val_set, cfg, machine, info, scores, path, chosen=()):
    """samples.png: image, masked label, ground truth, prediction with the kept labels
    and nearest fill, of the images `chosen`, or of six from the whole set."""
    model.eval()
    chosen = chosen or range(0, len(val_set), max(1, len(val_set) // 6))[:6]
    image, label, _ = torch.utils.data.default_collate([val_set[i] for i in chosen])
    _, predicted, m = predict(model, image, label, chosen, cfg, machine, info)
    predicted, m = predicted.cpu(), m.cpu()
    truth, repaired, nearest = (common.colorize(labels, info.colors) for labels in (
        label, label.where(~m, predicted), nearest_fill(label, m)))
    kept = np.where(m.numpy()[..., None], 255, truth).astype(np.uint8)
    common.draw_sheet(
        path, [image.permute(0, 2, 3, 1).numpy(), kept, truth, repaired, nearest],
        ["image", "masked label", "ground truth", "prediction", "nearest fill"], info,
        f"PA-mIoU {scores['pa_miou']:.2f} (nearest fill {scores['pa_miou_nearest']:.2f})")


# ------------------------------------------------------------------------------ --eval, --bench

def load(path):
    return common.load(path, "lmae", Config, data.Info, build)


def evaluate_only(cfg, origin):
    """--eval A [B ..]: each with its own configuration, except for the flags of the evaluation.
    With --ratios also ratios.png, PA-mIoU against the mask ratio (Fig. 6), and ratios.json; and
    worst.png, the images with the lowest PA-mIoU (Fig. 8)."""
    strategy = cfg.mask_strategy if origin.get("mask_strategy") == "flag" else "random"
    asked, lines = cfg, {}
    try:
        ratios = sorted(map(float, cfg.ratios))
    except ValueError:
        raise UserError(f"--ratios {' '.join(cfg.ratios)}: expected numbers, as 0.3 0.5") from None
    first = cfg if origin.get("mask_ratio") == "flag" else load(cfg.eval[0])[0]
    folder = (Path(cfg.out) if origin.get("out") == "flag" else Path(cfg.eval[0]).parent
              / f"eval-{first.mask_ratio:g}-{strategy}")
    for path, out in common.result_folders(cfg.eval, folder).items():
        trained, info, model, state = load(path)
        cfg = replace(common.checkpoint_config(
            asked, origin, path, trained, check, "eval", "data", "palette", "seed", "batch_size",
            "mask_ratio", "mask_strategy", "ratios", "scored"), mask_strategy=strategy)
        machine, val_set = common.Machine(cfg), validation_set(cfg)
        if val_set.info.classes != info.classes:
            raise UserError(f"--data {cfg.data} has other classes than {path} was trained for")
        weights = ClassWeights(torch.ones(len(info.classes)), cfg.class_weights)
        weights.load_state_dict(state["weights"])
        model, weights = model.to(machine.device), weights.to(machine.device)
        loader = data.eval_loader(val_set, cfg.batch_size, **machine.loading)
        settings = [replace(cfg, mask_ratio=ratio) for ratio in (cfg.mask_ratio, *ratios)]
        for now in settings:
            check(now)
        scores, *several = [evaluate(model, loader, now, machine, info, weights)
                            for now in settings]
        if not machine.main:
            continue
        draw_samples(model, val_set, cfg, machine, info, scores, out / "samples.png")
        write_metrics(out, {**state, "scores": scores}, cfg)
        if ratios:
            name = Path(path).resolve().parent.name
            lines[name if name not in lines else path] = [s["pa_miou"] for s in several]
            nearest = [s["pa_miou_nearest"] for s in several]
            worst = worst_images(model, val_set, cfg, machine, info)
            draw_samples(model, val_set, cfg, machine, info, scores, out / "worst.png", worst)
    if lines:
        lines["nearest fill"] = nearest
        common.write_json(folder / "ratios.json", {"mask_ratio": ratios, "pa_miou": lines})
        common.draw_panels(folder / "ratios.png", [
            ([100 * ratio for ratio in ratios], lines, "share of the patches removed, %",
             "PA-mIoU, %")])


@torch.no_grad()
def worst_images(model, val_set, cfg, machine, info, n=6):
    """The indices of the n images with the lowest PA-mIoU."""
    scores = {}
    for i in range(len(val_set)):
        image, label, _ = val_set[i]
        _, predicted, m = predict(model, image[None], label[None], [i], cfg, machine, info)
        target = label[None].to(machine.device).masked_fill(~m, common.VOID)
        scores[i] = common.miou(common.confusion(predicted, target, len(info.classes)))
    return sorted((i for i in scores if not math.isnan(scores[i])), key=scores.get)[:n]


def bench(cfg):
    """--bench N: parameters, multiply-adds, and for N > 0 the time of a training step, also at the
    ratios of Table 8. The last line is one JSON object."""
    machine, info = common.Machine(cfg), data.info(cfg.data, cfg.root, cfg.palette or None)
    N, L, S, B, device = len(info.classes), patches(cfg), cfg.size, cfg.batch_size, machine.device
    M = int(L * cfg.mask_ratio)

    with torch.device("meta"):               # shapes without numbers: counting takes no memory
        counted, ids = build(cfg, N), torch.empty(1, L, dtype=torch.int64)
        inputs = torch.empty(1, 3, S, S), torch.empty(1, S, S)

    def gmacs(M):
        """Multiply-adds (1e9) of one image with M patches removed."""
        return common.macs(counted, *inputs, ids[:, M:], ids[:, :M])

    def blocks(n, dim, tokens):
        return n * (12 * tokens * dim ** 2 + 2 * tokens ** 2 * dim) / 1e9

    result = {"params": parameters(counted), "gmacs": round(gmacs(M), 3)}
    print(f"G operations: stack fuse {S * S * N / 1e9:.4f} (Eq. 13), masking "
          f"{(S * S + L * math.log2(L)) / 1e9:.4f} (Eq. 14), encoder "
          f"{blocks(cfg.enc_blocks, cfg.enc_dim, L - M):.2f} (Eq. 15), decoder "
          f"{blocks(cfg.dec_blocks, cfg.dec_dim, L):.2f} (Eq. 16)")
    if cfg.bench > 0:
        torch.manual_seed(cfg.seed)
        model = build(cfg, N).to(device).train()
        weights = ClassWeights(torch.full((N,), 1 / N), cfg.class_weights, info.background)
        weights, background = weights.to(device), background_table(info).to(device)
        optimizer = make_optimizer(model, weights, cfg, machine.fused)
        net, scaler = common.compiled(model, cfg), machine.scaler()
        image = torch.randint(0, 256, (B, 3, S, S), dtype=torch.uint8).to(device)
        label = torch.randint(0, N, (B, S, S), dtype=torch.uint8).to(device)
        label[torch.rand(B, S, S, device=device) < 0.73] = 0     # VOC's background
        noise = draw(range(B), L, cfg.punch > 0)
        for ratio in (0.3, 0.5, 0.6, 0.7, cfg.mask_ratio):       # the last is the one reported
            now = replace(cfg, mask_ratio=ratio)
            timed = common.time_steps(
                lambda i: train_step(net, weights, optimizer, scaler, machine, now, background,
                                     image, label, noise), cfg.bench, B, device,
                B * gmacs(int(L * ratio)))
            print(f"mask ratio {ratio:.2f}: {timed['ms_per_step']:.1f} ms for a batch of {B}, "
                  f"{timed['tflops']:.3g} TFLOP/s")
        result |= timed
    print(json.dumps(result))


# --------------------------------------- --complete: repair labels; --suspect: search for mistakes

def patch_span(cfg):
    """The side of a patch in pixels of the image."""
    return max(1, round(cfg.crop * cfg.patch / cfg.size))


def windows(length, side, step):
    """The starts of windows of `side` pixels that cover `length` and overlap by half: about evenly
    spaced, on multiples of `step` (the span of a patch), so that damage in such cells covers whole
    patches. The last one ends where the image ends, so that it needs no padding."""
    rest = max(0, length - side)
    n = math.ceil(rest / max(step, side // 2 // step * step))
    return [math.ceil(rest * i / n / step) * step for i in range(n)] + [rest]


def rebuild(models, image, label, missing, broken, share, machine):
    """Complete one window with the model whose mask ratio is nearest to the broken share.

    models: list of (cfg, LMAE).  image: (S, S, 3) uint8.  label: (S, S) uint8, 255 = void.
    missing: (S, S) bool, the pixels to predict.  share: that of background in the whole label.
    A pass removes at most int(L * ratio) patches, those with the most complete neighbours first,
    and the next pass sees its predictions. broken says which patches are predicted:
      "255"         those that miss a pixel. With a model trained with --punch only the entirely
                    void ones are removed, the others keep their labels; otherwise all are removed.
      "background"  those of which at least half is missing, that is, background.
      "suspect"     those with a known pixel, in passes that do not see each other's predictions.
    Returns probabilities (N, S, S), 0 outside the predicted patches, the passes, and the ratio.
    """
    p, device = models[0][0].patch, machine.device
    label, missing = (patchify(torch.from_numpy(a)[None, None], p)[0].to(device)    # (L, pp)
                      for a in (label, missing))
    todo = missing.any(1) if broken != "background" else missing.float().mean(1) >= 0.5
    if broken == "255":
        share, label = todo.float().mean().item(), label.masked_fill(missing, common.VOID)
    cfg, model = min(models, key=lambda pair: abs(pair[0].mask_ratio - share))
    L, n, limit = len(todo), math.isqrt(len(todo)), int(len(todo) * cfg.mask_ratio)
    partial = broken == "255" and cfg.punch > 0         # patches that miss only a part stay
    known = (label != common.VOID) & ~missing
    image = to_input(torch.from_numpy(image).permute(2, 0, 1)[None], device)
    answer = torch.zeros(*label.shape, model.classes, device=device)                # (L, pp, N)
    ties, passes = 1e-3 * torch.rand(L, generator=torch.Generator().manual_seed(0)).to(device), 0
    while todo.any():
        full = known.float().mean(1)
        remove = todo & ~known.any(1) if partial else todo
        neighbours = F.avg_pool2d(full.view(1, 1, n, n), 3, 1, 1).flatten()
        order = (torch.where(remove, 2 + neighbours, -full) + ties).argsort(descending=True)
        chosen = order[:min(limit, int(remove.sum()))]
        # "nearest" is trained with the emptiest patches removed, even if they know something
        removed = order[:limit] if partial and cfg.supplement == "nearest" else chosen
        keep = order[len(removed):].sort().values
        shown = unpatchify(label.index_fill(0, chosen, common.VOID)[None], p)
        with machine.autocast():
            logits = model(image, shown, keep[None], removed[None])
        answered = (todo & ~remove).index_fill_(0, chosen, True)
        answer[answered] = logits[0, answered].float().softmax(-1)
        if broken != "suspect":
            label = torch.where(answered[:, None] & missing, answer.argmax(-1), label).byte()
            known = known | answered[:, None]
        todo, passes = todo & ~answered, passes + 1
    return unpatchify(answer.permute(2, 0, 1), p), passes, cfg.mask_ratio


@torch.no_grad()
def repair(models, image, label, missing, broken, machine):
    """Complete one image of any size, in windows as large as the training crops and resized like
    them; where they overlap their probabilities are added. Memory grows with the width alone.

    image: (H, W, 3) uint8.  label: (H, W) uint8, 255 = void.  missing: (H, W) bool.
    broken: as in rebuild().  Returns the class (H, W) uint8, its confidence (H, W) float32, 0 where
    nothing was predicted, and a dict of columns for review.csv.
    """
    (cfg, model), (H, W), side = models[0], label.shape, models[0][0].crop
    ys, xs = (windows(length, side, patch_span(cfg)) for length in (H, W))
    share, passes, ratios = missing.mean().item(), 0, set()
    pad = (0, ys[-1] + side - H), (0, xs[-1] + side - W)        # of an image smaller than a window
    image, missing = np.pad(image, (*pad, (0, 0))), np.pad(missing, pad)
    label = np.pad(label, pad, constant_values=common.VOID)
    index, confidence = np.zeros_like(label), np.zeros(label.shape, np.float32)
    total = torch.zeros(model.classes, side, label.shape[1], device=machine.device)
    for y, next_y in zip(ys, [*ys[1:], ys[-1] + side]):
        for x in xs:
            at = np.s_[y:y + side, x:x + side]
            if not missing[at].any():
                continue
            hole = F.adaptive_max_pool2d(torch.from_numpy(missing[at])[None].float(), cfg.size)[0]
            answer, n, ratio = rebuild(models, *data.geometry(image[at], label[at], cfg.size),
                                       hole.bool().numpy(), broken, share, machine)
            predicted = (answer.sum(0) > 0).float()[None, None]     # bilinear would leak out of it
            predicted = F.interpolate(predicted, (side, side))[0]
            answer = F.interpolate(answer[None], (side, side), mode="bilinear")[0]
            total[:, :, x:x + side] += answer * predicted
            passes, ratios = max(passes, n), ratios | {ratio}
        rows = total[:, :next_y - y]                            # no later window reaches these
        best, index[y:next_y] = (t.cpu().numpy() for t in rows.max(0))
        confidence[y:next_y] = best / rows.sum(0).clamp(min=1e-6).cpu().numpy()
        total = F.pad(total[:, next_y - y:], (0, 0, 0, next_y - y))
    return index[:H, :W], confidence[:H, :W], {
        "passes": passes, "mask_ratio": " ".join(f"{r:g}" for r in sorted(ratios))}


def regions(mask, ids=None):
    """Number the 4-connected regions of a mask, (H, W) bool, from the largest id + 1 on.

    ids: (H, W) int, objects outside the mask (0: none). A region that touches objects gets no new
    number: each pixel joins the one that reaches it first. Returns (H, W) int, also the given ids.
    """
    ids = np.zeros(mask.shape, int) if ids is None else ids.astype(int)
    first, none = ids.max() + 1, mask.size + 1000
    at = np.where(mask, first + np.arange(mask.size).reshape(mask.shape), np.where(ids, ids, none))
    at = np.pad(at, 1, constant_values=none)
    inner = at[1:-1, 1:-1]
    while True:     # every pixel that is in no object takes the smallest number next to it
        least = np.minimum.reduce([at[:-2, 1:-1], at[2:, 1:-1], at[1:-1, :-2], at[1:-1, 2:]])
        changed = mask & (inner >= first) & (least < inner)
        if not changed.any():
            break
        inner[changed] = least[changed]
    out = np.where(mask, inner, ids)
    new = np.unique(out[out >= first])
    return np.where(out >= first, first + np.searchsorted(new, out), out)


def tree(paths):
    """{path below its folder, without the suffix: file} of the images in files and folders.
    Raises UserError for a path that does not exist or has no images, and for two of one name."""
    found = {}
    for path in map(Path, paths):
        files = data.images_below(path) if path.is_dir() else [path] if path.exists() else []
        if not files:
            raise UserError(f"{path}: no such file, or no images in this folder")
        for file in files:
            name = file.relative_to(path if path.is_dir() else path.parent).with_suffix("")
            if (other := found.setdefault(name.as_posix(), file)) != file:
                raise UserError(f"{file} and {other} share a name: remove or rename one")
    return found


def labels_and_images(labels, images, dataset):
    """data.Items of the labels, stem: where results go below --to. Without images the folder of
    labels is a dataset, with the layout of `dataset` (the checkpoint's) or of your own folder."""
    if images:
        images = tree(images)
        return [data.Item(name, images.get(name), path) for name, path in tree(labels).items()]
    folder, items = Path(labels[0]), []
    if len(labels) > 1 or not folder.is_dir():
        raise UserError("give --images IMAGES too: the images of these labels, with the same names")
    name = dataset if dataset in data.SOURCES else str(folder)
    for split in data.source_of(name).splits:
        for item in data.list_items(name, str(folder), split):
            if item.mask:
                path = item.mask.resolve().relative_to(folder.resolve()).with_suffix("")
                items.append(item._replace(stem=path.as_posix()))
    return items


class Mask:
    """A label file to paint in. raw: its ids, greys or indices (H, W), or colours (H, W, 3 or 4).
    values: what each class is in raw."""

    def __init__(self, path, info):
        self.path, self.info, self.values = path, info, info.ids
        with data.opened(path) as file:
            file = ImageOps.exif_transpose(file) if data.turned(file) else file
            self.palette = file.getpalette() if file.mode == "P" and not info.threshold else None
            grey = file.mode in ("1", "L")
            table = [v for v in range(256) for _ in "rgb"] if grey else self.palette or []
            shades = [tuple(table[i:i + 3]) for i in range(0, len(table), 3)]
            if not info.palette:
                self.raw = data.read_ids(path, bool(info.threshold))
            elif set(info.colors) <= set(shades):       # greys and indices stay so
                self.raw = np.array(file.convert("L") if grey else file)
                self.values = [shades.index(color) for color in info.colors]
            else:
                self.raw = np.array(file.convert("RGBA" if "A" in file.getbands() else "RGB"))
                self.values = [(*color, 255)[:self.raw.shape[2]] for color in info.colors]
                self.palette = None

    def paint(self, where, classes):
        """Give the pixels `where` (H, W) bool these class indices (H, W)."""
        if self.info.threshold == 0:            # numbers of objects: join the existing ones
            drawn = regions(where & (classes > 0), np.where(where, 0, self.raw))
            if drawn.max() < 256:
                self.raw = drawn.astype(np.uint8)
                return
            if self.raw.max() > 1:              # else 0 and 1 alone, not numbers of objects
                raise UserError(f"{self.path}: more than 255 objects after the repair; skipped")
        self.raw[where] = np.array(self.values, np.uint8)[classes[where]]


def repair_file(item, image, label, truth, models, info, cfg, machine):
    """Repair one label: DIR/NAME.png, confidence/, overlay/ and, for ids, preview/.
    Returns its row of review.csv, in a list, and the confusion matrices (2, N, N) of L-MAE and the
    nearest fill on the rebuilt pixels, if there is a true label, a file."""
    mask, to, N, name = Mask(item.mask, info), Path(cfg.to), len(info.classes), f"{item.stem}.png"
    if cfg.broken == "background":
        missing = np.isin(label, info.background)
    else:           # other ids can be void, too; where 255 is a class it is never missing
        missing = (label if info.palette else mask.raw) == common.VOID
        missing &= info.threshold is None
    index, confidence, columns = repair(models, image, label, missing, cfg.broken, machine)
    answered = missing & (confidence > 0)
    rebuilt = answered & (confidence >= cfg.sure)
    fixed = np.where(rebuilt, index, label)
    changed, doubt = rebuilt & (fixed != label), np.where(answered, 1 - confidence, 0)
    mask.paint(rebuilt, fixed)
    common.save_image(to / name, mask.raw, mask.palette)
    common.save_image(to / "confidence" / name, (255 * (1 - doubt)).astype(np.uint8))
    common.save_image(to / "overlay" / name,
                      common.outline(common.overlay(image, fixed, info.colors), changed))
    if not info.palette:                                # grey ids look black
        common.save_image(to / "preview" / name, common.colorize(fixed, info.colors))
    counts = np.bincount(fixed[changed], minlength=N).tolist()
    side = patch_span(models[0][0])             # the worst cell of this size
    cells = F.avg_pool2d(torch.from_numpy(doubt)[None], side, ceil_mode=True)[0]
    y, x = (side * i for i in divmod(int(cells.argmax()), cells.shape[1]))
    percent = lambda pixels: round(100 * float(pixels.mean()), 2)
    row = {"file": name, "doubt": percent(doubt[answered]) if answered.any() else 0.0,
           "missing": percent(missing), "rebuilt": percent(rebuilt),
           "worst": f"{x} {y} {min(x + side, label.shape[1])} {min(y + side, label.shape[0])}",
           **columns, **{f"to {title}": n for title, n in zip(info.classes, counts)}}
    matrices = torch.zeros(2, N, N, dtype=torch.int64)
    if truth:
        target = data.read_label(truth, info)
        data.check_sizes(data.Item(item.stem, item.mask, truth), label.shape, target.shape)
        target = torch.from_numpy(np.where(rebuilt, target, common.VOID))
        near = nearest_fill(*(torch.from_numpy(array)[None] for array in (label, answered)))[0]
        matrices = torch.stack([common.confusion(answer, target, N)
                                for answer in (torch.from_numpy(index), near)])
    return [row], matrices


def suspect_file(item, image, label, truth, models, info, cfg, machine):
    """The regions of a label that the model, which does not see them, predicts as another class
    with a confidence of at least --sure (0.9). Returns rows of suspects.csv, and no matrices;
    overlay/ has their outlines."""
    known = label != common.VOID
    index, confidence, _ = repair(models, image, label, known, "suspect", machine)
    doubted = known & (index != label) & (confidence >= (cfg.sure or 0.9))
    found, rows = regions(doubted), []
    for number in range(1, found.max() + 1):
        ys, xs = (found == number).nonzero()
        drawn, seen = (info.classes[np.bincount(a[ys, xs]).argmax()] for a in (label, index))
        rows.append({"file": str(item.mask), "pixels": len(xs),
                     "box": f"{xs.min()} {ys.min()} {xs.max() + 1} {ys.max() + 1}",
                     "label": drawn, "predicted": seen,
                     "confidence": round(100 * float(confidence[ys, xs].mean()), 2)})
    if rows:
        common.save_image(Path(cfg.to) / "overlay" / f"{item.stem}.png", common.outline(
            common.overlay(image, label, info.colors), doubted))
    return rows, torch.zeros(2, 1, 1, dtype=torch.int64)


def mask_info(cfg, path, info):
    """How the masks to repair are read and written: like the checkpoint's, or by --palette, which
    must have the checkpoint's classes."""
    if not cfg.palette:
        return info
    given = data.load_palette(cfg.palette)
    names = info.classes if set(given.classes) == set(info.classes) else given.classes
    if len(names) != len(info.classes) or names != info.classes and info.classes[1] != "class 1":
        raise UserError(f"--palette {cfg.palette} has the classes {', '.join(given.classes)}, and "
                        f"{path} was trained for {', '.join(info.classes)}: give one with these")
    order = [given.classes.index(name) for name in names]
    return replace(info, colors=tuple(given.colors[c] for c in order), threshold=given.threshold,
                   ids=given.ids, palette=tuple((color, order.index(c) if c != common.VOID else c)
                                                for color, c in given.palette))


def finished_files(what, cfg, labels):
    """The file in DIR that lists what is finished, and its lines, each of a label, where --resume
    goes on in DIR; otherwise DIR is made."""
    path, lines, settings = Path(cfg.to) / f"{what}.jsonl", [], json.dumps(
        [what, *labels, *cfg.images, *cfg.ckpt, cfg.broken, cfg.sure, cfg.palette])
    if cfg.resume and path.exists():
        was, *lines = path.read_text("utf-8").split("\n")[:-1]     # without an incomplete last line
        if was != settings:
            raise UserError(f"--resume: {cfg.to} was started with other flags ({was}); give those, "
                            "or another --to")
    else:
        common.refuse_nonempty(cfg.to)
    common.write(path, "\n".join([settings, *lines, ""]))
    return path, [json.loads(line) for line in lines]


def load_models(what, cfg, origin):
    """(cfg, info, machine, models) for --complete and --suspect: the configuration of the
    checkpoints with the flags that may change it, how masks are read, the device, [(cfg, LMAE)]."""
    for name in "ckpt", "to":
        if not getattr(cfg, name):
            raise UserError(f"--{what} needs --{name} too: "
                            f"--{what} LABELS --images IMAGES --ckpt A.pt [B.pt ..] --to DIR")
    if what == "suspect" and cfg.truth:
        raise UserError("--truth goes with --complete: --suspect changes nothing")
    loaded = [load(path) for path in cfg.ckpt]
    first, info, *_ = loaded[0]
    for path, (c, i, *_) in zip(cfg.ckpt, loaded):
        if (i, c.crop, c.size, c.patch) != (info, first.crop, first.size, first.patch):
            raise UserError(f"{path} and {cfg.ckpt[0]} differ in classes, crop, size or patch: "
                            "give checkpoints that differ in their mask ratio only")
    info = mask_info(cfg, cfg.ckpt[0], info)
    cfg = common.checkpoint_config(cfg, origin, cfg.ckpt[0], first, check, what, "images", "ckpt",
                                   "to", "truth", "broken", "seed", "sure", "palette", "resume")
    if what == "complete" and cfg.broken == "255" and (
            info.threshold is not None
            or info.palette and common.VOID not in dict(info.palette).values()):
        raise UserError(f"--broken 255: the masks of {first.data} have no void, so that "
                        f"{', '.join(info.classes)} are all there is, and nothing is missing: give "
                        "--broken background, or --palette FILE with a line `R G B void`, the "
                        "colour of what is missing")
    for path, (*_, state) in zip(cfg.ckpt, loaded):
        if line := warning(state["scores"]):
            print(f"{path}: {line}")
    machine = common.Machine(cfg)
    if machine.world > 1:
        raise UserError(f"--{what} works in one process: python instead of torchrun")
    return cfg, info, machine, [(c, model.to(machine.device)) for c, _, model, _ in loaded]


def black_and_white(items, info):
    """Whether there are several labels and all hold 0 and 255 alone. Most often one is enough."""
    found = set()
    for item in items:
        label = data.attempt([], data.read_label, item.mask, info)
        found |= set() if label is None else {*np.unique(label).tolist()}
        if found - {0, common.VOID}:
            return False
    return len(items) > 1 and len(found) == 2


def complete(cfg, origin):
    """--complete LABELS --images IMAGES --ckpt A.pt [B.pt ..] --to DIR: repair labels (Fig. 4).

    LABELS and IMAGES are files or folders, with subfolders; a label and its image have the same
    path below them. Without --images LABELS is a whole dataset in a layout that data.py reads.
    Masks are read by the palette of the checkpoint's training, or by --palette, and written in it.
    --broken 255: pixels of 255, or of a void colour, are missing. --broken background: the paper's
    case, and the only one for masks without void: background may be a forgotten object, and it
    alone changes, where it is at least half of a patch. A window is repaired by the checkpoint
    whose mask ratio is nearest to the share that is broken.
    Writes DIR/NAME.png (size, ids or colours, and palette of the label), confidence/, overlay/
    (changes are outlined), for ids preview/ in colours, and review.csv, the most doubtful first.
    --suspect LABELS, with the same flags, changes nothing: DIR/suspects.csv lists the regions that
    the model, without seeing them, predicts with confidence as another class.
    A label that cannot be repaired is a line on stderr, and exit status 1. --resume goes on in DIR.
    """
    what, work, labels = (("complete", repair_file, cfg.complete) if cfg.complete else
                          ("suspect", suspect_file, cfg.suspect))
    cfg, info, machine, models = load_models(what, cfg, origin)
    trained = models[0][0]
    items = labels_and_images(labels, cfg.images, trained.data)
    if cfg.broken == "255" and not info.palette and black_and_white(items, info):
        raise UserError(f"{items[0].mask}, ..: these masks hold only 0 and 255, and 255 would be "
                        "missing: if it is the object, save it as 1; if it is missing, add a mask "
                        "with an object")
    truths = tree(cfg.truth)
    if truths and not truths.keys() & {item.stem for item in items}:
        raise UserError(f"--truth {cfg.truth[0]}: it has {next(iter(truths))}, .. and the labels "
                        f"are {items[0].stem}, ..: give a folder with the same paths below it")
    path, finished = finished_files(what, cfg, labels)
    common.draw_sheet(Path(cfg.to) / "overlay/legend.png", [], [], info,
                      "Class 0 and void are left as the image is. Outlined in magenta: "
                      + ("changed" if what == "complete" else "in doubt"))
    done, failed = {line["name"] for line in finished}, 0
    print(f"{len(items)} labels, {len(done)} of them done, in windows of {trained.crop} pixels "
          f"resized to {trained.size}, with mask ratio "
          + ", ".join(f"{c.mask_ratio:g}" for c, _ in models))
    for item in common.progress([item for item in items if item.stem not in done]):
        try:
            if item.image is None:
                raise UserError(f"{item.mask}: no image called {item.stem} in "
                                f"{' '.join(cfg.images)}; skipped")
            rows, matrices = work(item, *data.read_pair(item, info, None), truths.get(item.stem),
                                  models, info, cfg, machine)
        except UserError as error:
            failed += 1
            print(error, file=sys.stderr)
            continue
        finished.append({"name": item.stem, "rows": rows, "counts": matrices.tolist()})
        with open(path, "a", encoding="utf-8") as file:         # after all its images are written
            file.write(json.dumps(finished[-1]) + "\n")

    key, name, order = {"complete": ("doubt", "review.csv", "most doubtful first"),
                        "suspect": ("pixels", "suspects.csv", "largest first")}[what]
    rows = sorted((row for line in finished for row in line["rows"]), key=lambda row: -row[key])
    common.write_csv(Path(cfg.to) / name, rows[0] if rows else [], [row.values() for row in rows])
    if cfg.truth and finished:
        counts = torch.tensor([line["counts"] for line in finished]).sum(0)
        print(f"mIoU on the rebuilt pixels {common.miou(counts[0]):.2f}, nearest fill "
              f"{common.miou(counts[1]):.2f}")
    result = (f"{len(finished)} repaired" if what == "complete" else
              f"{len(rows)} suspect regions in {len(finished)} labels")
    print(f"{result}, {failed} failed -> {cfg.to}; {name}: {order}")
    sys.exit(1 if failed else 0)


# ------------------------------------------- --augment: the label augmentation experiment, Table 4

def conv_twice(i, o):
    layers = []
    for c in i, o:
        layers += nn.Conv2d(c, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU()
    return nn.Sequential(*layers)


def enlarge(x, like):
    return F.interpolate(x, like.shape[-2:], mode="bilinear")


class FCN(nn.Module):
    """A small FCN-8s: class scores at strides 32, 16 and 8, enlarged and added up.
    (B, 3, S, S) -> (B, N, S, S), S at least 32."""

    def __init__(self, classes, widths=(32, 64, 128, 256, 256)):
        super().__init__()
        self.stages = nn.ModuleList(map(conv_twice, (3, *widths), widths))
        self.scores = nn.ModuleList(nn.Conv2d(w, classes, 1) for w in widths[2:])

    def forward(self, x):
        maps = [x]
        for stage in self.stages:
            maps.append(F.max_pool2d(stage(maps[-1]), 2))
        at8, at16, at32 = (score(m) for score, m in zip(self.scores, maps[3:]))
        at16 = at16 + enlarge(at32, at16)
        return enlarge(at8 + enlarge(at16, at8), x)


class UNet(nn.Module):
    """A small U-Net, upsampling bilinearly. (B, 3, S, S) -> (B, N, S, S), S a multiple of 8."""

    def __init__(self, classes, widths=(32, 64, 128, 256)):
        super().__init__()
        self.down = nn.ModuleList(map(conv_twice, (3, *widths), widths))
        wide = widths[::-1]
        self.up = nn.ModuleList(conv_twice(i + o, o) for i, o in zip(wide, wide[1:]))
        self.head = nn.Conv2d(widths[0], classes, 1)

    def forward(self, x):
        skips = []
        for stage in self.down:
            x = stage(F.max_pool2d(x, 2) if skips else x)
            skips.append(x)
        for stage, skip in zip(self.up, skips[-2::-1]):
            x = stage(torch.cat([enlarge(x, skip), skip], 1))
        return self.head(x)


def segmentation_miou(network, classes, train_pair, val_pair, cfg, machine, batch=16):
    """Train FCN or UNet on (n, 3, S, S) and (n, S, S) uint8, cfg.augment_epochs; mIoU on val."""
    torch.manual_seed(cfg.seed)
    net, device, n = network(classes).to(machine.device).train(), machine.device, len(train_pair[0])
    generator, per_epoch = torch.Generator().manual_seed(cfg.seed), data.steps_per_epoch(n, batch)
    batches = [ids for _ in range(cfg.augment_epochs)
               for ids in torch.randperm(n, generator=generator).split(batch)[:per_epoch]]
    optimizer, scaler = torch.optim.Adam(net.parameters()), machine.scaler()
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=len(batches))
    for step, ids in enumerate(batches):
        image, label = to_input(train_pair[0][ids], device), train_pair[1][ids].to(device).long()
        if step % 2:
            image, label = image.flip(-1), label.flip(-1)
        with machine.autocast():
            logits = net(image)
        loss = F.cross_entropy(logits.float(), label, ignore_index=common.VOID)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
    net.eval()
    with torch.no_grad(), machine.autocast():
        return common.miou(sum(
            common.confusion(net(to_input(image, device)).argmax(1), label.to(device), classes)
            for image, label in zip(*(t.split(batch) for t in val_pair))))


@torch.no_grad()
def label_sets(model, images, labels, cfg, info, machine):
    """{name: labels (n, S, S) uint8}: the complete ones; with half of the patches removed (void, or
    background, like forgotten objects); and these filled by the nearest label, or by L-MAE."""
    cfg, parts = replace(cfg, mask_ratio=0.5, mask_strategy="random"), []
    for index in torch.arange(len(labels)).split(cfg.batch_size):
        label = labels[index]
        _, predicted, m = predict(model, images[index], label, index.tolist(), cfg, machine, info)
        parts.append((m.cpu(), predicted.cpu(), nearest_fill(label, m.cpu())))
    m, predicted, near = map(torch.cat, zip(*parts))
    sets = {"complete": labels, "broken (void)": labels.masked_fill(m, common.VOID),
            "nearest fill": near, "L-MAE": labels.where(~m, predicted)}
    if len(info.background) == 1:
        sets["broken (background)"] = labels.masked_fill(m, info.background[0])
    return sets


def augment(cfg, origin):
    """--augment --ckpt CKPT: Table 4 and Fig. 5, on the checkpoint's dataset.

    FCN and U-Net are trained on each of label_sets() of the training images, and scored on the true
    validation labels. The paper compares L-MAE's completion with the broken labels only. As there,
    the L-MAE was trained on the complete labels of the same images: this favours it.
    """
    if len(cfg.ckpt) != 1:
        raise UserError("--augment needs --ckpt CKPT, one checkpoint of lmae.py")
    trained, info, model, _ = load(cfg.ckpt[0])
    if trained.size < 32:
        raise UserError(f"--augment: {cfg.ckpt[0]} has --size {trained.size}, and FCN needs 32")
    cfg = common.checkpoint_config(cfg, origin, cfg.ckpt[0], trained, check, "augment",
                                   "augment_epochs", "ckpt", "seed")
    out = Path(cfg.out) if origin.get("out") == "flag" else Path(cfg.ckpt[0]).parent / "augment"
    common.refuse_results(out)
    machine = common.Machine(cfg)
    model = model.to(machine.device)

    def pair(split):
        """Centre crops (n, 3, S, S) and their labels (n, S, S)."""
        images = dataset(cfg, split)
        return torch.utils.data.default_collate([images[i] for i in range(len(images))])[:2]

    (images, labels), val_pair, results = pair("train"), pair(data.eval_split(cfg.data)), {}
    for name, labels in label_sets(model, images, labels, cfg, info, machine).items():
        for network in FCN, UNet:
            score = segmentation_miou(network, len(info.classes), (images, labels), val_pair, cfg,
                                      machine)
            results.setdefault(network.__name__, {})[name] = score
            print(f"{network.__name__:4s} trained on {name:19s} mIoU {score:.2f}", flush=True)
    common.write_json(out / "augment.json", results)


# ------------------------------------------------------------------------------------------ main

def check(cfg):
    """Values that the parser cannot judge. Raises UserError."""
    common.at_least(cfg, 1, "batch_size", "size", "patch", "enc_blocks", "dec_blocks", "enc_dim",
                    "dec_dim", "heads", "eval_every", "augment_epochs")
    common.at_least(cfg, -1, "bench")
    common.at_least(cfg, 0, "epochs", "crop", "max_steps", "lr", "weight_decay", "warmup",
                    "drop_path", "threads", "save_every", "in_memory", "sure", "punch")
    L, unit = patches(cfg), 2 * cfg.heads
    for name, fits, wanted in (
            ("sure", cfg.sure <= 1, "a share, of at most 1"),
            ("punch", cfg.punch <= 1, "a share, of at most 1"),
            ("drop_path", cfg.drop_path < 1, "below 1"),
            ("plateau_factor", 0 < cfg.plateau_factor < 1, "expected a number between 0 and 1"),
            ("size", cfg.size % cfg.patch == 0, f"not a multiple of --patch {cfg.patch}"),
            ("enc_dim", cfg.enc_dim % unit == 0, f"not a multiple of 2 x --heads {cfg.heads}"),
            ("dec_dim", cfg.dec_dim % unit == 0, f"not a multiple of 2 x --heads {cfg.heads}"),
            ("mask_ratio", 1 <= L * cfg.mask_ratio < L,
             f"of {L} patches at least one must be removed and one kept")):
        if not fits:
            raise UserError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: {wanted}")


def main():
    cfg, origin = common.parse(Config, RECIPES, __doc__, by="model")
    cfg.out = cfg.out or str(Path("out") / f"lmae-{Path(cfg.data).name}")
    if cfg.complete or cfg.suspect:
        return complete(cfg, origin)
    if cfg.augment:
        return augment(cfg, origin)
    if cfg.ratios and not cfg.eval:
        raise UserError("--ratios goes with --eval")
    if cfg.images or cfg.to or cfg.truth or cfg.ckpt:
        raise UserError("--images, --ckpt, --to and --truth go with --complete or --suspect")
    if cfg.eval:
        return evaluate_only(cfg, origin)
    check(cfg)
    if not cfg.crop:        # a multiple of the patches per side, so that a patch is whole pixels
        short, n = data.short_side(cfg.data, cfg.root) or cfg.size, cfg.size // cfg.patch
        cfg.crop = max(n, min(short, max(cfg.size, short // 3)) // n * n)
        print(f"crops of {cfg.crop} pixels, for images whose shorter side is {short}")
    common.show_config(cfg, origin)
    bench(cfg) if cfg.bench >= 0 else train(cfg)


if __name__ == "__main__":
    common.run(main)
