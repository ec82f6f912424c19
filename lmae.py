"""L-MAE, a label masked autoencoder: complete broken segmentation labels from the image and what is left of them.
"""
import csv
import io
import json
import math
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

import common
import data
from common import UserError


# ------------------------------------------------------------------------------------------ config

@dataclass
class Config:
    data: str = "shapes"           # shapes, voc, cityscapes, camvid, or a folder with images/ and masks/
    root: str = "data"             # where datasets live
    out: str = ""                  # run folder; empty: out/lmae-DATA
    epochs: int = 400              # the paper's; what follows down to `size` is its Pascal VOC recipe
    batch_size: int = 24           # images a step, over all processes
    lr: float = 1e-4               # Adam; lowered by plateau steps (below) on the validation loss
    crop: int = 448                # side of the random crop, in pixels of the picture
    size: int = 224                # the crop is resized to this side
    patch: int = 16                # side of a patch: L = (size / patch)^2 tokens
    enc_blocks: int = 8            # EB of Table 5
    dec_blocks: int = 6            # DB
    enc_dim: int = 1440            # ED
    dec_dim: int = 720             # DD
    heads: int = 8                 # h of Eq. 8, in both encoder and decoder
    drop_path: float = 0.1         # Eq. 4-5; the rate is not in the paper: 0.1 at the last block, 0 at the first
    fuse: Literal["layer", "direct", "insert"] = "layer"  # stack fuse (Eq. 1), or what Table 9 compares it with
    ips: bool = True               # image patch supplement; without it removed positions enter as zeros
    mask_ratio: float = 0.5        # share of the patches that is removed
    mask_strategy: Literal["mixed", "random", "background", "label"] = "mixed"  # mixed is 1:2:2 (Table 6)
    class_weights: Literal["learned", "fixed", "none", "literal"] = "learned"  # Eq. 10, see ClassWeights
    weight_decay: float = 1e-4     # Adam's own, not decoupled
    plateau_factor: float = 0.8    # ReduceLROnPlateau: lr times this ...
    plateau_patience: int = 5      # ... after so many epochs ...
    plateau_threshold: float = 1e-3  # ... without the validation loss falling by this share
    schedule: Literal["plateau", "cosine"] = "plateau"  # the paper's; cosine (to 0 at the last epoch) suits short runs
    warmup: int = 0                # steps over which the rate rises to lr
    flip: bool = True              # mirror half of the training crops; the paper is silent
    eval_every: int = 1            # epochs between evaluations
    seed: int = 0                  # of weights, masks, crops and order
    workers: int = -1              # loader processes; -1: one a core up to 8 with CUDA, none without
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto: the best there is
    amp: Literal["auto", "bf16", "fp16", "off"] = "auto"  # auto: bf16 with CUDA, off elsewhere
    compile: bool = False          # torch.compile the model
    resume: bool = False           # go on from OUT/last.pt
    max_steps: int = 0             # stop after so many steps, evaluate and save; 0: all epochs
    palette: str = ""              # colours of RGB masks: voc, cityscapes or a file (see data.py)
    eval: str = ""                 # evaluate this checkpoint and do nothing else
    bench: int = -1                # time N training steps on random tensors; 0: count only
    complete: str = ""             # folder of broken labels to repair (with --images, --ckpt, --to)
    images: str = ""               # --complete: the folder with their pictures
    ckpt: tuple = ()               # --complete, --augment: checkpoints, one for each mask ratio at hand
    to: str = ""                   # --complete: new folder for the repaired labels
    truth: str = ""                # --complete: folder of true labels, only to score the result
    broken: Literal["255", "background"] = "255"  # --complete: which pixels to rebuild, see complete()
    augment: bool = False          # run the label augmentation experiment (Table 4) with --ckpt
    augment_epochs: int = 300      # --augment: epochs of each of its segmentation networks


RECIPES = {                        # what differs from the defaults for a dataset
    "shapes": dict(epochs=40, batch_size=32, lr=1e-3, crop=64, size=64, patch=8, enc_blocks=4, dec_blocks=2,
                   enc_dim=192, dec_dim=128, drop_path=0.0),
    "cityscapes": dict(batch_size=48, crop=448, size=448),
    "camvid": dict(crop=320),
}


# ------------------------------------------------------------------------------------------- model

def patchify(x, p):
    """(B, C, H, W) -> (B, L, C * p * p): patches row by row, each flattened as a p x p conv would read it."""
    B, C, H, W = x.shape
    x = x.view(B, C, H // p, p, W // p, p).permute(0, 2, 4, 1, 3, 5)    # (B, H/p, W/p, C, p, p)
    return x.reshape(B, (H // p) * (W // p), C * p * p)


def unpatchify(x, p):
    """(B, L, p * p) -> (B, H, W), for a square of L patches."""
    B, L, _ = x.shape
    n = math.isqrt(L)
    return x.view(B, n, n, p, p).transpose(2, 3).reshape(B, n * p, n * p)


def take(x, ids):
    """Rows `ids` (B, K) of x (B, L, D) -> (B, K, D)."""
    return x.gather(1, ids[..., None].expand(-1, -1, x.shape[-1]))


def positions(L, dim):
    """Fixed 1-D sine-cosine positions (L, dim) of Eq. 2-3: even columns sine, odd ones cosine."""
    angle = torch.arange(L)[:, None] / 10000 ** (torch.arange(0, dim, 2) / dim)
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)


class Block(nn.Module):
    """One LMMSA block (Eq. 4-9): pre-norm attention, pre-norm FFN, each with DropPath."""

    def __init__(self, dim, heads, drop_path):
        super().__init__()
        self.heads, self.drop_path = heads, drop_path
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def attention(self, x):
        B, L, D = x.shape
        q, k, v = self.qkv(x).view(B, L, 3, self.heads, -1).permute(2, 0, 3, 1, 4)   # Eq. 6, (B, h, L, D/h)
        z = F.scaled_dot_product_attention(q, k, v)                                  # Eq. 7
        return self.proj(z.transpose(1, 2).reshape(B, L, D))                         # Eq. 8

    def ffn(self, x):
        return self.fc2(F.relu(self.fc1(x)))                                         # Eq. 9

    def drop(self, x):
        """DropPath: leave the branch out for a share of the samples, and scale it up for the others."""
        if not self.training or self.drop_path == 0:
            return x
        kept = 1 - self.drop_path
        return x * x.new_empty(x.shape[0], 1, 1).bernoulli_(kept) / kept

    def forward(self, x):
        x = x + self.drop(self.attention(self.norm1(x)))                             # Eq. 4
        return x + self.drop(self.ffn(self.norm2(x)))                                # Eq. 5


class LMAE(nn.Module):
    """Label masked autoencoder: encoder on the kept patches of image and label, decoder on all patches.

    The patch embeddings are convolutions whose kernel is their stride, written as Linear over flattened
    patches so that only the patches in use are embedded (what the paper's GFLOPs imply).
    """

    def __init__(self, classes, size=224, patch=16, enc_blocks=8, dec_blocks=6, enc_dim=1440, dec_dim=720,
                 heads=8, drop_path=0.1, fuse="layer", ips=True):
        super().__init__()
        self.classes, self.patch, self.fuse = classes, patch, fuse
        L, planes = (size // patch) ** 2, {"layer": classes + 3, "direct": 4, "insert": 6}[fuse]
        self.embed = nn.Linear(planes * patch ** 2, enc_dim)
        self.encoder = nn.ModuleList(
            Block(enc_dim, heads, drop_path * i / max(1, enc_blocks - 1)) for i in range(enc_blocks))
        self.enc_norm = nn.LayerNorm(enc_dim)
        self.enc_to_dec = nn.Linear(enc_dim, dec_dim)
        self.ips = nn.Linear(3 * patch ** 2, dec_dim) if ips else None
        self.decoder = nn.ModuleList(
            Block(dec_dim, heads, drop_path * i / max(1, dec_blocks - 1)) for i in range(dec_blocks))
        self.dec_norm = nn.LayerNorm(dec_dim)
        self.head = nn.Linear(dec_dim, patch ** 2 * classes)
        self.register_buffer("enc_pos", positions(L, enc_dim), persistent=False)
        self.register_buffer("dec_pos", positions(L, dec_dim), persistent=False)
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)

    def fuse_map(self, image, label):
        """Eq. 1 on patches: image (B, K, 3 * p * p), label (B, K, p * p) -> F (B, K, planes * p * p).

        A void pixel (255) is zero in every label plane.
        """
        if self.fuse == "layer":                # l_1 .. l_N: one plane a class, then the image
            c = torch.arange(self.classes, device=label.device)[:, None]
            return torch.cat([(label[:, :, None] == c).flatten(2).to(image.dtype), image], -1)
        one = torch.where(label < self.classes, (label + 1.0) / self.classes, 0.0).to(image.dtype)
        if self.fuse == "direct":               # the label as one more channel
            return torch.cat([one, image], -1)
        r, g, b = image.chunk(3, -1)            # "insert": a copy of the label after each of R, G, B
        return torch.cat([r, one, g, one, b, one], -1)

    def forward(self, image, label, keep, removed):
        """
        image: (B, 3, S, S) float in [-1, 1].  label: (B, S, S) integer, 255 = void; read at `keep` only.
        keep, removed: (B, K) and (B, L - K) int64, the patches that stay and those that go.
        Returns logits (B, L, p * p, N): N classes for each pixel of each patch.
        """
        pixels = patchify(image, self.patch)                                         # (B, L, 3pp)
        labels = patchify(label[:, None], self.patch)                                # (B, L, pp)
        x = self.embed(self.fuse_map(take(pixels, keep), take(labels, keep)))        # (B, K, ED)
        x = x + self.enc_pos[keep]                                                   # Eq. 2-3
        for block in self.encoder:
            x = block(x)
        x = self.enc_to_dec(self.enc_norm(x))                                        # (B, K, DD)
        if self.ips is None:
            supplement = x.new_zeros(*removed.shape, x.shape[-1])
        else:                                   # IPS: the image of the removed patches, nothing of their label
            supplement = self.ips(take(pixels, removed)).to(x.dtype)                 # (B, L - K, DD)
        back = torch.cat([keep, removed], 1).argsort(1)
        x = take(torch.cat([x, supplement], 1), back) + self.dec_pos                 # (B, L, DD), in order again
        for block in self.decoder:
            x = block(x)
        x = self.head(self.dec_norm(x))
        return x.view(*x.shape[:2], self.patch ** 2, self.classes)


# ----------------------------------------------------------------------------------------- masking

def draw(seeds, L):
    """The random numbers of one sample's mask: (B, L + 1) in [0, 1), row b from its own seed, so that the
    mask of an image does not depend on its batch, on the process or on the device."""
    return torch.stack([torch.rand(L + 1, generator=torch.Generator().manual_seed(s)) for s in seeds])


def select(label, patch, ratio, strategy, background, noise):
    """Choose the patches to remove. Pure: the same noise gives the same choice.

    label: (B, S, S) integer, 255 = void.  background: (256,) bool, True for the labels that count as
    background.  noise: (B, L + 1) uniform: L numbers that shuffle and break ties, one that picks the strategy.
    Returns keep (B, L - M) and removed (B, M) int64, M = int(L * ratio).

    "First" means removed first: background-first takes the patches with the most background pixels,
    label-first those with the most object pixels.
    """
    labels = patchify(label[:, None].long(), patch)                                  # (B, L, pp)
    is_background = background[labels]
    back = is_background.sum(-1) + noise[:, :-1]                                     # counts, ties by noise
    front = (~is_background & (labels != 255)).sum(-1) + noise[:, :-1]
    u = noise[:, -1:]
    u = {"mixed": u, "random": 0 * u, "background": 0 * u + 0.5, "label": 0 * u + 0.9}[strategy]
    key = torch.where(u < 0.2, noise[:, :-1], torch.where(u < 0.6, back, front))     # random, back, label = 1:2:2
    order = key.argsort(1, descending=True)
    M = int(label.shape[-1] ** 2 // patch ** 2 * ratio)
    return order[:, M:], order[:, :M]


def mask_of(removed, L, patch):
    """removed (B, M) -> (B, S, S) bool, True = removed: the m of PA-mIoU."""
    m = torch.zeros(removed.shape[0], L, dtype=torch.bool, device=removed.device).scatter_(1, removed, True)
    return unpatchify(m[..., None].expand(-1, -1, patch * patch), patch)


# -------------------------------------------------------------------------------------------- loss

class ClassWeights(nn.Module):
    """w_i = 1 - 1 / (1 + beta exp(-(x_i - E x) / (V + xi))^gamma) = sigmoid(ln beta - gamma z_i)   (Eq. 10)

    x_i is the share of class i among the labelled pixels. `learned`, `fixed`: V is the standard deviation and
    beta = gamma = 1, learned or not. `literal`: V is the variance and background is left out of the
    loss, as printed. `none`: every weight is 1.
    """

    def __init__(self, share, mode="learned", background=()):
        """share: (N,) float, sums to 1.  background: class indices that `literal` leaves out."""
        super().__init__()
        spread = share.std(unbiased=False) ** (2 if mode == "literal" else 1)
        self.register_buffer("z", (share - share.mean()) / (spread + 1e-6))          # xi = 1e-6
        self.register_buffer("counts", torch.ones_like(share))
        self.mode = mode
        if mode == "literal":
            self.counts[list(background)] = 0
        learned = mode in ("learned", "literal")
        self.log_beta = nn.Parameter(torch.zeros(()), requires_grad=learned)         # beta = 1, and stays positive
        self.gamma = nn.Parameter(torch.ones(()), requires_grad=learned)

    def forward(self):
        """The N weights, float32."""
        if self.mode == "none":
            return self.counts
        return torch.sigmoid(self.log_beta - self.gamma * self.z) * self.counts      # Eq. 10


def loss_fn(logits, label, weights, patch):
    """Weighted cross entropy over all pixels that are not void (Eq. 11-12).

    logits: (B, L, p * p, N).  label: (B, S, S) integer, 255 = void.  weights: (N,).
    Returns a scalar, float32; 0 where nothing is labelled.
    """
    y = patchify(label[:, None].long(), patch).flatten()                             # the pixels in the logits' order
    ce = F.cross_entropy(logits.float().flatten(0, 2), y, ignore_index=255, reduction="none")
    w = F.pad(weights, (0, 256 - len(weights)))[y]                                   # w of Eq. 11, 0 for void
    return (w * ce).sum() / w.sum().clamp(min=1e-12)                                 # Eq. 12


# ------------------------------------------------------------------------------------ data, model

def dataset(cfg, split):
    return data.Dataset(cfg.data, cfg.root, split, size=cfg.size, crop=cfg.crop, flip=cfg.flip and split == "train",
                        train=split == "train", seed=cfg.seed, protocol="lmae", palette=cfg.palette or None)


def build(cfg, classes):
    return LMAE(classes, cfg.size, cfg.patch, cfg.enc_blocks, cfg.dec_blocks, cfg.enc_dim, cfg.dec_dim,
                cfg.heads, cfg.drop_path, cfg.fuse, cfg.ips)


def class_share(dataset, most=500):
    """x of Eq. 10: each class's share of the labelled pixels, from the first `most` training labels."""
    counts = sum(torch.bincount(dataset[i][1].flatten(), minlength=256) for i in range(min(most, len(dataset))))
    counts = counts[:len(dataset.info.classes)].float()
    return counts / counts.sum().clamp(min=1)


def background_table(info):
    table = torch.zeros(256, dtype=torch.bool)
    table[list(info.background)] = True
    return table


def to_input(image, device):
    """uint8 (B, 3, S, S) -> float in [-1, 1] on the device."""
    return image.to(device, non_blocking=True).float() / 127.5 - 1


# --------------------------------------------------------------------------------- train, evaluate

@torch.no_grad()
def evaluate(model, loader, cfg, machine, info, weights, strategy="random", nearest=True):
    """Score the model where the labels of int(L * mask_ratio) patches are removed; masks fixed by (seed, index).

    Returns percentages: pa_miou (PA-mIoU: removed pixels only), miou (predictions everywhere), pasted_miou (the
    kept labels pasted over them), pa_class_iou, class_iou, the loss, and with nearest=True pa_miou_nearest and
    miou_nearest: each removed pixel takes the label of the nearest kept pixel. Void is never counted.
    """
    model.eval()
    N, device, background = len(info.classes), machine.device, background_table(info).to(machine.device)
    counts = torch.zeros(5, N, N, dtype=torch.int64, device=device)
    loss = torch.zeros(2, device=device)
    for image, label, index in loader:
        image, label = to_input(image, device), label.to(device)
        noise = draw([common.seed_of(cfg.seed, i) for i in index.tolist()], model.enc_pos.shape[0]).to(device)
        keep, removed = select(label, cfg.patch, cfg.mask_ratio, strategy, background, noise)
        with machine.autocast():
            logits = model(image, label, keep, removed)
        loss += torch.stack([loss_fn(logits, label, weights(), cfg.patch), loss.new_ones(())]) * len(index)
        predicted = unpatchify(logits.argmax(-1), cfg.patch).to(label.dtype)
        m = mask_of(removed, noise.shape[1] - 1, cfg.patch)
        target = label.masked_fill(~m, common.VOID)                     # what PA-mIoU counts
        answers = [(predicted, target), (predicted, label), (label.where(~m, predicted), label)]
        if nearest:
            filled = common.nearest_fill(label, m)
            answers += [(filled, target), (filled, label)]
        for matrix, (answer, truth) in zip(counts, answers):
            matrix += common.confusion(answer, truth, N)
    common.all_reduce(counts, loss)
    pa, everywhere, pasted, pa_near, near = counts
    scores = {"pa_miou": common.miou(pa), "miou": common.miou(everywhere), "pasted_miou": common.miou(pasted),
              "pa_class_iou": common.class_iou(pa).tolist(), "class_iou": common.class_iou(everywhere).tolist(),
              "loss": (loss[0] / loss[1]).item()}
    if nearest:
        scores.update(pa_miou_nearest=common.miou(pa_near), miou_nearest=common.miou(near))
    return scores


def train_step(net, weights, optimizer, scaler, machine, cfg, background, image, label, noise):
    """One step on (B, 3, S, S) float, (B, S, S) uint8 and the numbers of the masks. Returns the loss, on the device."""
    keep, removed = select(label, cfg.patch, cfg.mask_ratio, cfg.mask_strategy, background, noise)
    with machine.autocast():
        logits = net(image, label, keep, removed)
    loss = loss_fn(logits, label, weights(), cfg.patch)
    optimizer.zero_grad(set_to_none=True)
    scaler.scale(loss).backward()
    common.average_gradients(weights, machine.world)
    scaler.step(optimizer)
    scaler.update()
    return loss.detach()


def make_optimizer(model, weights, cfg):
    """Adam with its own weight decay; beta and gamma of Eq. 10 are not decayed."""
    return torch.optim.Adam([{"params": list(model.parameters())},
                             {"params": [p for p in weights.parameters() if p.requires_grad], "weight_decay": 0}],
                            lr=cfg.lr, weight_decay=cfg.weight_decay)


def rate(step, cfg, total):
    """The learning rate of a step: 1. rising over the warm-up, 2. held, or 3. falling on a half cosine to 0."""
    if step < cfg.warmup:
        return cfg.lr * (step + 1) / cfg.warmup
    if cfg.schedule == "plateau":
        return cfg.lr
    return cfg.lr * (1 + math.cos(math.pi * (step - cfg.warmup) / max(1, total - cfg.warmup))) / 2


def train(cfg):
    """The training run: read it from top to bottom."""
    machine = common.Machine(cfg)
    out, device = Path(cfg.out), machine.device
    train_set, val_set = dataset(cfg, "train"), dataset(cfg, "val")
    info, per_epoch = train_set.info, data.steps_per_epoch(len(train_set), cfg.batch_size)

    torch.manual_seed(common.seed_of(cfg.seed))
    model = build(cfg, len(info.classes)).to(device)
    weights = ClassWeights(class_share(train_set), cfg.class_weights, info.background).to(device)
    optimizer, scaler = make_optimizer(model, weights, cfg), machine.scaler()
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, "min", cfg.plateau_factor, cfg.plateau_patience, cfg.plateau_threshold)
    background = background_table(info).to(device)

    start, history, scores, best, spent = 0, [], {}, -1.0, 0.0
    state = common.open_run(cfg, "lmae", machine)
    if state:
        model.load_state_dict(state["model"])
        for name, part in dict(weights=weights, optimizer=optimizer, scheduler=scheduler, scaler=scaler).items():
            part.load_state_dict(state[name])
        start, history, scores = state["step"], state["history"], state["scores"]
        best, spent = state["best"], state["seconds"]
    total = cfg.epochs * per_epoch
    stop = min(total, cfg.max_steps or total)
    net = common.parallel(torch.compile(model) if cfg.compile else model, machine)
    print_main = print if machine.main else lambda *_: None
    print_main(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {len(train_set)} training and "
               f"{len(val_set)} validation pictures, steps {start} to {stop}, {per_epoch} an epoch, on {device}")

    loader = data.train_loader(train_set, cfg.batch_size // machine.world, seed=cfg.seed, start=start, stop=stop,
                               workers=machine.workers, rank=machine.rank, world=machine.world)
    val_loader = data.eval_loader(val_set, cfg.batch_size, workers=machine.workers, rank=machine.rank,
                                  world=machine.world)
    progress, interrupt = common.Progress(start, stop, cfg.batch_size, not machine.main), common.Interrupt()
    running, began = [], time.time()
    for step, (image, label, index) in zip(range(start, stop), loader):
        # 1. the rate; once warm, the plateau schedule sets it in part 3
        if step < cfg.warmup or cfg.schedule == "cosine":
            for group in optimizer.param_groups:
                group["lr"] = rate(step, cfg, total)

        # 2. one step. Its draws hang on (seed, step) or (seed, epoch, index) alone: a resumed run repeats them
        net.train()
        torch.manual_seed(common.seed_of(cfg.seed, step, machine.rank))              # DropPath
        noise = draw([common.seed_of(cfg.seed, step // per_epoch, i) for i in index.tolist()], patches(cfg))
        loss = train_step(net, weights, optimizer, scaler, machine, cfg, background, to_input(image, device),
                          label.to(device, non_blocking=True), noise.to(device, non_blocking=True))
        running.append(loss)                                                         # stays on the device
        if progress.live and step % 20 == 0:
            progress.step(step, loss.item())                                         # waits for the device

        # 3. evaluate, log, save
        epoch, end_of_epoch = (step + 1) / per_epoch, (step + 1) % per_epoch == 0
        last = step + 1 == stop or interrupt.set
        if not last and (not end_of_epoch or epoch % cfg.eval_every):
            continue
        train_loss = torch.stack(running).mean().item()
        if not math.isfinite(train_loss):
            raise RuntimeError(f"the loss is {train_loss} near step {step + 1}; {out / 'last.pt'} is from before it. "
                               "A lower --lr or --amp off is the usual cure")
        spent, began, running = spent + time.time() - began, time.time(), []
        first = "pa_miou_nearest" not in scores                                      # it never changes: once
        scores |= evaluate(model, val_loader, cfg, machine, info, weights, nearest=first)
        history.append({"epoch": round(epoch, 2), "step": step + 1, "train_loss": train_loss,
                        "val_loss": scores["loss"], **{k: scores[k] for k in SCORES},
                        "lr": optimizer.param_groups[0]["lr"], "seconds": round(spent, 1)})
        progress.say(f"epoch {epoch:6.2f}  step {step + 1:6d}  loss {train_loss:.4f} / {scores['loss']:.4f}  "
                     f"mIoU {scores['miou']:.1f}  PA-mIoU {scores['pa_miou']:.1f} "
                     f"(nearest fill {scores['pa_miou_nearest']:.1f})  {spent:.0f} s")
        if end_of_epoch and cfg.schedule == "plateau":
            scheduler.step(scores["loss"])
        better, best = scores["pa_miou"] > best, max(best, scores["pa_miou"])
        state = {"method": "lmae", "config": asdict(cfg), "info": asdict(info), "model": model.state_dict(),
                 "weights": weights.state_dict(), "optimizer": optimizer.state_dict(),
                 "scheduler": scheduler.state_dict(), "scaler": scaler.state_dict(), "step": step + 1,
                 "history": history, "scores": scores, "best": best, "seconds": spent}
        if machine.main:
            if better:
                common.save_checkpoint(out / "best.pt", state)
            common.save_checkpoint(out / "last.pt", state)
            common.write_history(out, history)
        began = time.time()
        if interrupt.set:
            progress.say(f"stopped after step {step + 1}; the same command with --resume goes on")
            sys.exit(130)

    if machine.main:
        draw_samples(model, val_set, cfg, machine, info, out / "samples.png")
        write_metrics(out, scores, history[-1]["epoch"], history[-1]["step"], spent, model, weights)


def patches(cfg):
    return (cfg.size // cfg.patch) ** 2


SCORES = ("miou", "pa_miou", "pasted_miou", "miou_nearest", "pa_miou_nearest")        # in percent


def write_metrics(out, scores, epoch, step, seconds, model, weights):
    """OUT/metrics.json, and the scores on the screen."""
    metrics = {**{k: scores[k] for k in SCORES}, "class_iou": scores["class_iou"],
               "pa_class_iou": scores["pa_class_iou"], "epoch": epoch, "steps": step, "seconds": seconds,
               "params": sum(p.numel() for p in model.parameters()),
               "beta": weights.log_beta.exp().item(), "gamma": weights.gamma.item()}
    common.write(Path(out) / "metrics.json", json.dumps(common.clean(metrics), indent=1) + "\n")
    print(f"PA-mIoU {scores['pa_miou']:.2f} (nearest fill {scores['pa_miou_nearest']:.2f}), mIoU {scores['miou']:.2f}, "
          f"with the kept labels {scores['pasted_miou']:.2f} (nearest fill {scores['miou_nearest']:.2f})  -> {out}")


@torch.no_grad()
def draw_samples(model, val_set, cfg, machine, info, path, n=6):
    """samples.png: picture, what is left of the label, truth, prediction (kept labels pasted), nearest fill."""
    model.eval()
    image, label, index = zip(*(val_set[i] for i in range(0, len(val_set), max(1, len(val_set) // n))[:n]))
    image, label = torch.stack(image), torch.stack(label)
    noise = draw([common.seed_of(cfg.seed, i) for i in index], patches(cfg))
    keep, removed = select(label, cfg.patch, cfg.mask_ratio, "random", background_table(info), noise)
    with machine.autocast():
        logits = model(to_input(image, machine.device), *(t.to(machine.device) for t in (label, keep, removed)))
    m = mask_of(removed, patches(cfg), cfg.patch)
    predicted = label.where(~m, unpatchify(logits.argmax(-1), cfg.patch).cpu().to(torch.uint8))
    near = common.nearest_fill(label, m)
    pictures = image.permute(0, 2, 3, 1).numpy()
    paint = lambda maps: [common.colorize(one, info.colors) for one in maps.numpy()]
    seen = [np.where(hole[..., None], 128, p).astype(np.uint8) for hole, p in zip(m.numpy(), paint(label))]
    common.sheet([list(pictures), seen, paint(label), paint(predicted), paint(near)], path,
                 ["image", "label seen", "truth", "L-MAE", "nearest fill"])


# ------------------------------------------------------------------------------- the extra commands

def load(path, device):
    """(cfg, info, model, weights, state) of a checkpoint, ready to evaluate."""
    state = common.load_checkpoint(path, "lmae", device)
    cfg, info = Config(**state["config"]), data.Info(**state["info"])
    model = build(cfg, len(info.classes)).to(device)
    model.load_state_dict(state["model"])
    weights = ClassWeights(torch.ones(len(info.classes)), cfg.class_weights).to(device)
    weights.load_state_dict(state["weights"])
    return cfg, info, model.eval(), weights, state


def evaluate_only(cfg, origin):
    """--eval CKPT: the checkpoint's own configuration, but for what the command line says of the evaluation."""
    machine = common.Machine(cfg)
    theirs, info, model, weights, state = load(cfg.eval, machine.device)
    given = {k: getattr(cfg, k) for k, source in origin.items() if source == "flag"}
    strategy = given.get("mask_strategy", "random")
    allowed = {"data", "root", "out", "mask_ratio", "mask_strategy", "batch_size", "seed", "palette", "workers",
               "device", "amp", "eval"}
    if set(given) - allowed:
        raise UserError(f"--{sorted(set(given) - allowed)[0].replace('_', '-')} cannot be changed by --eval; "
                        "it comes from the checkpoint")
    cfg = replace(theirs, root=cfg.root, **{k: given[k] for k in allowed & set(given)})
    out = Path(cfg.out) if "out" in given else Path(cfg.eval).parent / "eval"
    val_set = dataset(cfg, "val")
    if val_set.info.classes != info.classes:
        raise UserError(f"{cfg.data} has other classes than {cfg.eval} was trained for; evaluate it on its own set")
    loader = data.eval_loader(val_set, cfg.batch_size, workers=machine.workers, rank=machine.rank, world=machine.world)
    scores = evaluate(model, loader, cfg, machine, info, weights, strategy)
    if machine.main:
        draw_samples(model, val_set, cfg, machine, info, out / "samples.png")
        write_metrics(out, scores, state["history"][-1]["epoch"], state["step"], state["seconds"], model, weights)


def bench(cfg):
    """Parameters, multiply-adds (Eq. 13-16), and for N > 0 the time of a training step, at the paper's ratios too."""
    machine, info = common.Machine(cfg), data.info(cfg.data, cfg.root)
    N, L, S, B = len(info.classes), patches(cfg), cfg.size, cfg.batch_size
    with torch.device("meta"):                              # shapes only: the full model costs no memory to count
        model = build(cfg, N)
        M = int(L * cfg.mask_ratio)
        ids = torch.empty(1, L, dtype=torch.int64)
        gmacs = common.macs(model, torch.empty(1, 3, S, S), torch.empty(1, S, S, dtype=torch.uint8),
                            ids[:, M:], ids[:, :M])
    result = {"params": sum(p.numel() for p in model.parameters()), "gmacs": round(gmacs, 3)}
    blocks = lambda n, d, tokens: n * (12 * tokens * d ** 2 + 2 * tokens ** 2 * d) / 1e9
    print(f"Eq. 15, encoder: {blocks(cfg.enc_blocks, cfg.enc_dim, L - M):.2f} G  "
          f"Eq. 16, decoder: {blocks(cfg.dec_blocks, cfg.dec_dim, L):.2f} G  "
          f"Eq. 13, stack fuse: {S * S * N / 1e9:.4f} G  Eq. 14, masking: {(S * S + L * math.log2(L)) / 1e9:.4f} G")
    if cfg.bench > 0:
        device, made = machine.device, torch.Generator().manual_seed(cfg.seed)
        model = build(cfg, N).to(device).train()
        weights = ClassWeights(torch.full((N,), 1 / N), cfg.class_weights, info.background).to(device)
        optimizer, scaler = make_optimizer(model, weights, cfg), machine.scaler()
        net, background = torch.compile(model) if cfg.compile else model, background_table(info).to(device)
        image = (torch.rand(B, 3, S, S, generator=made) * 2 - 1).to(device)
        label = torch.randint(0, N, (B, S, S), generator=made, dtype=torch.uint8).to(device)
        noise = torch.rand(B, L + 1, generator=made).to(device)
        for ratio in (0.3, 0.5, 0.6, 0.7, cfg.mask_ratio):  # Table 8; the configured one last, for the result
            at = replace(cfg, mask_ratio=ratio)
            timed = common.time_steps(lambda i: train_step(net, weights, optimizer, scaler, machine, at, background,
                                                           image, label, noise), cfg.bench, B, device)
            print(f"mask ratio {ratio:.2f}: {timed['ms_per_step']:.1f} ms a batch of {B}")
        result.update(timed)
    print(json.dumps(result))


def windows(length, side):
    """Where windows of `side` start so that they cover `length`, evenly spaced."""
    n = math.ceil(length / side)
    return [round(i * (length - side) / (n - 1)) for i in range(n)] if n > 1 else [0]


def rebuild(models, image, label, missing, broken, device):
    """Complete one window: the model whose mask ratio is nearest, in as many passes as that ratio needs.

    image: (S, S, 3) uint8.  label: (S, S) uint8, 255 = void.  missing: (S, S) bool, what is to be answered.
    broken "255": every patch with a missing pixel is removed, at most int(L * ratio) in a pass, the
    emptiest first; what one pass answers the next one sees. "background": one pass removes the
    int(L * ratio) patches with the most missing (that is, background) pixels.
    Returns probabilities (N, S, S), 0 outside the rebuilt patches, the number of passes and the ratio.
    """
    p = models[0][0].patch
    missing = patchify(torch.from_numpy(missing)[None, None], p)[0].to(device)         # (L, pp)
    label = patchify(torch.from_numpy(label)[None, None], p)[0].to(device)             # (L, pp)
    empty = missing.sum(-1)                                                            # (L,)
    share = missing.float().mean() if broken == "background" else (empty > 0).float().mean()
    cfg, model = min(models, key=lambda m: abs(m[0].mask_ratio - share.item()))
    most, order = max(1, int(len(empty) * cfg.mask_ratio)), empty.argsort(descending=True, stable=True)
    if broken == "background":
        order = order[:most]
    else:
        order, label = order[:(empty > 0).sum()], label.masked_fill(missing, common.VOID)
    image = to_input(torch.from_numpy(image).permute(2, 0, 1)[None], device)
    answer = torch.zeros(*label.shape, model.classes, device=device)                   # (L, pp, N)
    passes = order.split(most)
    for removed in passes:
        gone = torch.zeros(len(label), dtype=torch.bool, device=device).index_fill_(0, removed, True)
        keep = (~gone).nonzero()[:, 0]
        logits = model(image, unpatchify(label[None], p), keep[None], removed[None])
        answer[removed] = logits[0, removed].float().softmax(-1)
        label[removed] = torch.where(missing[removed], answer[removed].argmax(-1).to(label.dtype), label[removed])
    n = math.isqrt(len(empty))
    answer = answer.view(n, n, p, p, -1).permute(4, 0, 2, 1, 3).reshape(-1, n * p, n * p)
    return answer, len(passes), cfg.mask_ratio


def repair(models, image, label, missing, broken, device):
    """Complete one picture of any size, in windows as large as the crops of training, resized as they were.

    image: (H, W, 3) uint8.  label: (H, W) uint8 class indices, 255 = void.  missing: (H, W) bool.
    Returns label (H, W) uint8, confidence (H, W) uint8 (255 = certain, and wherever nothing was rebuilt),
    rebuilt (H, W) bool, and a dict for review.csv. Pixels outside `missing` come back as they were.
    """
    cfg, (H, W) = models[0][0], label.shape
    C, S = cfg.crop, cfg.size
    pad = (0, max(0, C - H)), (0, max(0, C - W))                                       # as in training
    image = np.pad(image, (*pad, (0, 0)))
    padded, hole = np.pad(label, pad, constant_values=common.VOID), np.pad(missing, pad)
    total = torch.zeros(models[0][1].classes, *hole.shape, device=device)              # summed probabilities
    passes, ratios = 0, set()
    for y in windows(hole.shape[0], C):
        for x in windows(hole.shape[1], C):
            part = np.s_[y:y + C, x:x + C]
            if not hole[part].any():
                continue
            resized = [np.array(Image.fromarray(a[part]).resize((S, S), how)) for a, how in (
                (image, Image.Resampling.BILINEAR), (padded, Image.Resampling.NEAREST))]
            small = F.adaptive_max_pool2d(torch.from_numpy(hole[part]).float()[None], S)[0].bool().numpy()
            answer, n, ratio = rebuild(models, *resized, small, broken, device)
            total[:, y:y + C, x:x + C] += F.interpolate(answer[None], (C, C), mode="bilinear")[0]
            passes, ratios = max(passes, n), ratios | {ratio}
    weight = total.sum(0)
    best, index = total.max(0)
    confidence = (best / weight.clamp(min=1e-6)).cpu().numpy()[:H, :W]
    rebuilt = missing & (weight > 0).cpu().numpy()[:H, :W]
    doubt = float(1 - confidence[rebuilt].mean()) if rebuilt.any() else 0.0
    facts = {"doubt": round(100 * doubt, 2), "rebuilt": round(100 * float(rebuilt.mean()), 2), "passes": passes,
             "mask_ratio": " ".join(f"{r:g}" for r in sorted(ratios))}
    return (np.where(rebuilt, index.cpu().numpy()[:H, :W].astype(np.uint8), label),
            np.where(rebuilt, (255 * confidence).astype(np.uint8), 255).astype(np.uint8), rebuilt, facts)


def by_stem(folder):
    """{stem: path} of the pictures in a folder."""
    if not Path(folder).is_dir():
        raise UserError(f"{folder}: no such folder")
    return {path.stem: path for path in data.pictures(Path(folder))}


def complete(cfg):
    """--complete LABELS --images IMAGES --ckpt A.pt [B.pt ..] --to DIR: repair a folder of broken labels (Fig. 4).

    --broken 255: these pixels are known to be missing. --broken background: the paper's case, pixels left as
    background may be forgotten objects; the patches with the most of it are rebuilt, and only their background
    pixels may change. The checkpoint with the mask ratio nearest the broken share is taken for each window.
    Writes DIR/NAME.png (ids, palette and size as they came), DIR/confidence/NAME.png and DIR/review.csv, the
    most doubtful first. A file that cannot be repaired is one line on stderr and exit status 1.
    """
    for name in ("images", "ckpt", "to"):
        if not getattr(cfg, name):
            raise UserError(f"--complete needs --{name} as well: --complete LABELS --images IMAGES --ckpt A.pt --to DIR")
    machine = common.Machine(cfg)
    loaded = [load(path, machine.device)[:3] for path in cfg.ckpt]
    (first, info, _), models = loaded[0], [(c, m) for c, _, m in loaded]
    for path, (c, i, _) in zip(cfg.ckpt, loaded):
        if (i.classes, c.crop, c.size, c.patch) != (info.classes, first.crop, first.size, first.patch):
            raise UserError(f"{path} differs from {cfg.ckpt[0]} in classes, crop, size or patch: give one family")
    to = Path(cfg.to)
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UserError(f"--to {to} exists and is not an empty folder; give a new one, nothing is overwritten")
    images, labels = by_stem(cfg.images), by_stem(cfg.complete)
    print(f"{len(labels)} labels in windows of {first.crop} pixels, resized to {first.size}, "
          f"mask ratio {', '.join(f'{c.mask_ratio:g}' for c, _ in models)}, on {machine.device}")
    to_id = np.array([*info.ids, *[common.VOID] * (256 - len(info.ids))], np.uint8)
    truths = by_stem(cfg.truth) if cfg.truth else {}
    scores, review, failed = torch.zeros(2, len(info.classes), len(info.classes), dtype=torch.int64), [], 0
    for stem in sorted(set(images) | set(labels)):
        try:
            for folder, found in (cfg.images, images), (cfg.complete, labels):
                if stem not in found:
                    raise UserError(f"{stem}: no such file in {folder}; skipped")
            label, ids = data.read_label(labels[stem], info), data.read_ids(labels[stem])
            image = data.read_image(images[stem])
            if image.shape[:2] != label.shape:
                raise UserError(f"{labels[stem]}: {label.shape[1]}x{label.shape[0]}, but its picture is "
                                f"{image.shape[1]}x{image.shape[0]}; skipped")
            missing = ids == common.VOID if cfg.broken == "255" else np.isin(label, info.background)
            with torch.no_grad(), machine.autocast():
                fixed, confidence, rebuilt, facts = repair(models, image, label, missing, cfg.broken, machine.device)
            with Image.open(labels[stem]) as file:
                palette = file.getpalette() if file.mode == "P" else None
            name = Path(labels[stem]).relative_to(cfg.complete).with_suffix(".png")
            common.save_image(to / name, np.where(rebuilt, to_id[fixed], ids), palette)
            common.save_image(to / "confidence" / name, confidence)
            review.append({"file": str(name), **facts})
            if stem in truths:
                truth = torch.from_numpy(data.read_label(truths[stem], info)).masked_fill(~torch.from_numpy(rebuilt), 255)
                near = common.nearest_fill(torch.from_numpy(label)[None], torch.from_numpy(rebuilt)[None])[0]
                for matrix, answer in zip(scores, (torch.from_numpy(fixed), near)):
                    matrix += common.confusion(answer, truth, len(info.classes))
        except UserError as error:
            failed += 1
            print(error, file=sys.stderr)
    if review:
        review.sort(key=lambda row: -row["doubt"])
        text = io.StringIO()
        writer = csv.DictWriter(text, list(review[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(review)
        common.write(to / "review.csv", text.getvalue())
    if cfg.truth:
        print(f"mIoU on the rebuilt pixels {common.miou(scores[0]):.2f}, nearest fill {common.miou(scores[1]):.2f}")
    print(f"{len(review)} repaired -> {to}, most doubtful first in {to / 'review.csv'}; {failed} failed")
    sys.exit(1 if failed else 0)


# --------------------------------------------------------- the label augmentation experiment (Table 4)

def conv(i, o):
    return nn.Sequential(nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU(inplace=True),
                         nn.Conv2d(o, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU(inplace=True))


class FCN(nn.Module):
    """A small FCN-8s: the class scores at strides 8, 16 and 32, enlarged and added up."""

    def __init__(self, classes, widths=(32, 64, 128, 256, 256)):
        super().__init__()
        self.stages = nn.ModuleList(nn.Sequential(conv(i, o), nn.MaxPool2d(2)) for i, o in zip((3, *widths), widths))
        self.scores = nn.ModuleList(nn.Conv2d(w, classes, 1) for w in widths[2:])

    def forward(self, x):
        """(B, 3, S, S) -> (B, N, S, S), S a multiple of 32."""
        size, maps = x.shape[-2:], []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        y = 0
        for score, x in zip(reversed(self.scores), reversed(maps[2:])):
            y = score(x) + (F.interpolate(y, x.shape[-2:], mode="bilinear") if torch.is_tensor(y) else 0)
        return F.interpolate(y, size, mode="bilinear")


class UNet(nn.Module):
    """A small U-Net with bilinear upsampling."""

    def __init__(self, classes, widths=(32, 64, 128, 256)):
        super().__init__()
        self.down = nn.ModuleList(conv(i, o) for i, o in zip((3, *widths), widths))
        self.up = nn.ModuleList(conv(i + o, o) for i, o in zip(widths[:0:-1], widths[-2::-1]))
        self.head = nn.Conv2d(widths[0], classes, 1)

    def forward(self, x):
        """(B, 3, S, S) -> (B, N, S, S)."""
        skips = []
        for stage in self.down:
            x = stage(F.max_pool2d(x, 2) if skips else x)
            skips.append(x)
        for stage, skip in zip(self.up, skips[-2::-1]):
            x = stage(torch.cat([F.interpolate(x, skip.shape[-2:], mode="bilinear"), skip], 1))
        return self.head(x)


def segmentation_miou(net, images, labels, val_images, val_labels, cfg, machine):
    """Train net on (n, 3, S, S) and (n, S, S) uint8 for cfg.augment_epochs, half of it mirrored; mIoU on the rest."""
    N, B, device = net.head.out_channels if hasattr(net, "head") else net.scores[0].out_channels, 16, machine.device
    net, steps = net.to(device).train(), cfg.augment_epochs * max(1, len(images) // B)
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
    for step in range(steps):
        epoch, i = divmod(step, max(1, len(images) // B))
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(common.seed_of(cfg.seed, epoch)))
        ids = order[i * B:(i + 1) * B]
        image, label = to_input(images[ids], device), labels[ids].to(device).long()
        if step % 2:
            image, label = image.flip(-1), label.flip(-1)
        with machine.autocast():
            logits = net(image)
        loss = F.cross_entropy(logits.float(), label, ignore_index=common.VOID)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    net.eval()
    matrix = 0
    with torch.no_grad(), machine.autocast():
        for image, label in zip(val_images.split(B), val_labels.split(B)):
            matrix = matrix + common.confusion(net(to_input(image, device)).argmax(1), label.to(device), N)
    return common.miou(matrix)


@torch.no_grad()
def label_sets(model, images, labels, cfg, info, machine):
    """The training labels of the experiment: half of the patches hidden once and for all, then filled in five ways."""
    sets = {"complete": labels}
    noise = draw([common.seed_of(cfg.seed, 1, i) for i in range(len(labels))], patches(cfg))
    keep, removed = select(labels, cfg.patch, 0.5, "random", background_table(info), noise)
    m, answers = mask_of(removed, patches(cfg), cfg.patch), []
    for parts in zip(*(t.split(cfg.batch_size) for t in (images, labels, keep, removed))):
        image, *rest = (t.to(machine.device) for t in parts)
        with machine.autocast():
            answers.append(unpatchify(model(to_input(image, machine.device), *rest).argmax(-1), cfg.patch).cpu())
    if len(info.background) == 1:
        sets["broken (background)"] = labels.masked_fill(m, info.background[0])
    sets["broken (void)"] = labels.masked_fill(m, common.VOID)
    sets["nearest fill"] = common.nearest_fill(labels, m)
    sets["L-MAE"] = labels.where(~m, torch.cat(answers).to(labels.dtype))
    return sets


def augment(cfg):
    """--augment --ckpt CKPT: the label augmentation experiment (Table 4, Fig. 5) on the checkpoint's own dataset.

    Half of the patches of every training label are hidden, once; FCN and U-Net are trained on what is left
    (hidden = background, as a forgotten object would be, or = void), on the nearest fill, on L-MAE's
    completion and on the complete labels, and scored on the validation set's true labels.
    """
    if not cfg.ckpt:
        raise UserError("--augment needs --ckpt CKPT, a trained lmae checkpoint")
    machine = common.Machine(cfg)
    theirs, info, model, _, _ = load(cfg.ckpt[0], machine.device)
    theirs = replace(theirs, root=cfg.root, seed=cfg.seed, augment_epochs=cfg.augment_epochs)
    fixed = {}
    for split in ("train", "val"):
        whole = dataset(replace(theirs, flip=False), split)
        whole.train = False                                  # centre crops: each picture's label is broken once
        image, label, _ = zip(*(whole[i] for i in range(len(whole))))
        fixed[split] = torch.stack(image), torch.stack(label)
    results = {}
    for name, labels in label_sets(model, *fixed["train"], theirs, info, machine).items():
        for network in (FCN, UNet):
            torch.manual_seed(cfg.seed)
            score = segmentation_miou(network(len(info.classes)), fixed["train"][0], labels, *fixed["val"], theirs, machine)
            results.setdefault(network.__name__, {})[name] = score
            print(f"{network.__name__:5s} trained on {name:20s} mIoU {score:.2f}", flush=True)
    common.write(Path(cfg.out) / "augment.json", json.dumps(common.clean(results), indent=1) + "\n")


def main(argv=None):
    cfg, origin = common.parse(Config, RECIPES, __doc__, argv)
    if not cfg.out:
        cfg.out = str(Path("out") / f"lmae-{Path(cfg.data).name}")
    check(cfg)
    common.show_config(cfg, origin)
    if cfg.bench >= 0:
        bench(cfg)
    elif cfg.complete:
        complete(cfg)
    elif cfg.augment:
        augment(cfg)
    elif cfg.eval:
        evaluate_only(cfg, origin)
    else:
        train(cfg)


def check(cfg):
    """Values that the parser cannot judge. Raises UserError."""
    if cfg.size % cfg.patch:
        raise UserError(f"--size {cfg.size} is not a multiple of --patch {cfg.patch}")
    for name in ("enc_dim", "dec_dim"):
        if getattr(cfg, name) % (2 * cfg.heads):
            raise UserError(f"--{name.replace('_', '-')} {getattr(cfg, name)} is not a multiple of 2 x --heads {cfg.heads}")
    L = patches(cfg)
    if not 1 <= int(L * cfg.mask_ratio) < L:
        raise UserError(f"--mask-ratio {cfg.mask_ratio}: of {L} patches at least one must go and one stay")


if __name__ == "__main__":
    common.run(main)
