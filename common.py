"""What the three method files share: errors, the command line, metrics, the run folder, images.

Nothing here knows a method. The models, masking and losses do not use it.
"""
import csv
import dataclasses
import difflib
import errno
import functools
import hashlib
import inspect
import io
import json
import math
import os
import re
import signal
import sys
import textwrap
import threading
import time
import typing
import warnings
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.utils.flop_counter import FlopCounterMode

CHECK_EVERY = 20    # read the losses from the device once in so many steps: reading waits for it
VOID = 255          # the label of a pixel that is not counted and not learned from
LOCK = threading.Lock()             # for say()


# ------------------------------------------------------------------------------------------ errors

class UserError(Exception):
    """An error that the user can fix. Its message is one line: what, where, what to do."""


def run(main):
    """Call main() and end the process: with one line on stderr and status 2 for errors that the
    user can fix (a UserError, a file or folder that cannot be used, too little memory), with status
    130 for Ctrl-C. Other errors keep their traceback."""
    warnings.filterwarnings("ignore", module="PIL")     # about files that it can read all the same
    sys.stdout = sys.stdout or open(os.devnull, "w")
    with suppress(AttributeError):          # file names may have characters a terminal cannot show
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        check_processes()
        try:
            main()
        except SystemExit:
            sys.stdout.flush()
            raise
        sys.stdout.flush()          # now, so that a full disk or a closed pipe is caught below
        if dist.is_initialized():
            dist.barrier()          # the first process may still be writing
            # Not destroy_process_group(): with gloo, 1 of 48 runs ended in "terminate called
            # without an active exception", after everything had been saved.
            os._exit(0)
    except UserError as error:      # a loader's worker puts its traceback before the message
        exit_with(str(error).rpartition("common.UserError: ")[2].strip())
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)) and (
                "can't allocate memory" not in str(error)):
            raise
        training = not {"--complete", "--suspect", "--predict"} & set(sys.argv)
        exit_with(f"too little memory ({str(error)[:150]}); "
                  + ("lower --batch-size or --size" if training else
                     "use --device cpu or smaller images"))
    except OSError as error:
        if error.filename is None and error.errno not in (errno.EPIPE, errno.ENOSPC):
            raise
        if error.errno == errno.EPIPE:              # the reader has gone, as in `| head`
            discard_output()
            sys.exit(1)
        exit_with(f"{error.filename or 'standard output'}: {error.strerror}; fix this and run the "
                  "command again")
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def discard_output():
    """Send what is still to be printed nowhere, so that Python does not report another error."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def exit_with(line):
    """Print an error as one line on stderr and exit with status 2."""
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)       # names may hold \n
    try:
        if sys.stdout.isatty():
            print("\r\033[K", end="")                   # clear the line of progress
        sys.stdout.flush()
    except OSError:
        discard_output()
    print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)
    sys.exit(2)


def nearest_name(name, names):
    """' (did you mean X?)' for the closest of names, or ''."""
    names = {other.lower(): other for other in names}
    close = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.5)
    return f" (did you mean {names[close[0]]}?)" if close else ""


@functools.cache
def say_once(line):
    if os.environ.get("RANK", "0") == "0":
        print(line, flush=True)


def say(line):
    """Print a line, once, in the first process; also from several threads."""
    with LOCK:
        say_once(line)


@contextmanager
def waiting(what):
    """Say what a block does, if it takes more than three seconds."""
    timer = threading.Timer(3, say, (f"{what} ..",))
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


# ------------------------------------------------------------------------- configuration and flags

@dataclasses.dataclass
class RunConfig:
    """Where and how a run takes place; a method's Config adds its own fields."""
    root: str = "data"             # folder of the datasets
    palette: str = ""              # colours of RGB masks: voc, cityscapes, binary or a file
    init: str = ""                 # start from the weights of this checkpoint, to fine-tune it
    eval_every: int = 1            # epochs between evaluations
    seed: int = 0                  # of weights, masks and order
    workers: int = -1              # loader processes; -1: one per processor with CUDA, else none
    threads: int = 0               # of torch on the CPU; 0: one for each processor that is idle
    in_memory: float = 2.0         # a split of at most so many GB of pixels is kept in memory
    device: str = "auto"           # auto: the best there is; or cuda, cuda:1, mps, cpu
    amp: typing.Literal["auto", "bf16", "fp16", "off"] = "auto"  # auto: bf16 with CUDA, else off
    compile: bool = False          # torch.compile the model
    resume: bool = False           # continue from OUT/last.pt
    save_every: float = 5.0        # minutes between saves, at least; 0: after each evaluation
    max_steps: int = 0             # stop after so many steps, evaluate and save; 0: all epochs
    eval: tuple = ()               # evaluate these checkpoints and do nothing else
    bench: int = -1                # time N training steps on random tensors; 0: only count


class Parser(ArgumentParser):
    def error(self, message):
        raise UserError(message)


@functools.lru_cache
def help_texts(Config):
    """{field: the comment after it} of a dataclass and its bases."""
    source = "".join(map(inspect.getsource, Config.__mro__[:-1]))
    return dict(re.findall(r"^    (\w+):.*?#\s*(.*)$", source, re.M))


def parse(Config, recipes, doc, argv=None, by="recipe", may_be_empty=()):
    """Fill the dataclass Config: its defaults, then recipes[--data], then recipes[--BY], then the
    command line. For the user's own folder --BY is "small" unless given.

    A field `a_b: int = 3  # text` becomes the flag --a-b with this help text, a bool that is True
    --no-a-b. A tuple takes several values, or none if in may_be_empty.
    Returns (cfg, origin): origin[name] is "recipe" or "flag" for values that are not the default.
    Raises UserError for an unknown flag or value, and names the nearest valid one.
    """
    fields = sorted(dataclasses.fields(Config),         # Config's own first, then RunConfig's
                    key=lambda field: field.name not in Config.__annotations__)
    parser = Parser(description=doc, formatter_class=RawDescriptionHelpFormatter,
                    allow_abbrev=False)
    for field in fields:
        flag = field.name.replace("_", "-")
        kind = {"help": help_texts(Config).get(field.name, "").replace("%", "%%")}
        if field.type is bool:
            kind["action"] = "store_false" if field.default else "store_true"
            if field.default:
                flag, kind["help"] = f"no-{flag}", f"turns off: {kind['help']}"
        elif field.type is tuple:
            kind.update(metavar=field.name.upper(),
                        nargs="*" if field.name in may_be_empty else "+")
        elif typing.get_origin(field.type) is typing.Literal:
            kind["metavar"] = "|".join(typing.get_args(field.type))
        else:
            kind.update(type=field.type, metavar=field.type.__name__.upper())
        parser.add_argument(f"--{flag}", dest=field.name, default=None, **kind)
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        near = nearest_name(unknown[0], parser._option_string_actions)
        raise UserError(f"unknown argument {unknown[0]}{near}; --help lists them")
    given = {name: tuple(value) if isinstance(value, list) else value
             for name, value in vars(given).items() if value is not None}
    for field in fields:
        choices, value = typing.get_args(field.type), given.get(field.name)
        flag = f"--{field.name.replace('_', '-')}"
        if value == "" or isinstance(value, tuple) and "" in value:
            raise UserError(f"{flag} is empty (an empty variable?): give a value or leave it out")
        if isinstance(value, (int, float)) and not abs(value) < 2**63:
            raise UserError(f"{flag} {value}: expected a finite number below 2^63 in size")
        if choices and value is not None and value not in choices:
            raise UserError(f"{flag} {value}: expected one of {', '.join(choices)}"
                            f"{nearest_name(value, choices)}")
    name = given.get("data", Config.data)
    size = given.get(by, "auto" if name in recipes else "small")
    recipe = {**recipes.get(name, {}), **recipes.get(size, {})}
    origin = {**dict.fromkeys(recipe, "recipe"), **dict.fromkeys(given, "flag")}
    return Config(**{**recipe, **given}), origin


def show_config(cfg, origin, rest="everything else is the default: see --help or config.json"):
    """Print the values that are not the default and where they come from, in the first process."""
    if os.environ.get("RANK", "0") != "0":
        return
    titles = {"recipe": f"from the recipe for {cfg.data}", "pretrain": "because of --pretrain",
              "flag": "from the command line"}
    for source, title in titles.items():
        if values := ", ".join(f"{n} {getattr(cfg, n)}" for n in origin if origin[n] == source):
            print(textwrap.fill(f"{title}: {values}", 100, subsequent_indent="  "))
    print(rest)


def default_epochs(cfg, per_epoch, steps=3000):
    """Set --epochs 0 to as many as make `steps` steps, with 20 evaluations."""
    if not cfg.epochs:
        cfg.epochs = -(-steps // per_epoch)
        cfg.eval_every = cfg.eval_every if cfg.eval_every > 1 else max(1, cfg.epochs // 20)


def at_least(cfg, least, *names):
    """Raises UserError for the first of these fields that is below `least`."""
    for name in names:
        if getattr(cfg, name) < least:
            raise UserError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: at least {least}")


# ----------------------------------------------------------------------- device, seeds, processes

def seed_of(*ints):
    """A 63-bit seed from any integers, such as the run's seed, the step and the image's index."""
    digest = hashlib.blake2b(repr(ints).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def check_processes():
    """Raises UserError if torchrun's environment variables are set, but not by torchrun."""
    rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not (rank.isdecimal() and world.isdecimal() and int(rank) < int(world)
            and (world == "1" or {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys())):
        raise UserError(f"RANK={rank} WORLD_SIZE={world} in the environment, which torchrun sets: "
                        "unset them or start with torchrun")


def idle_processors():
    """The number of threads to use: as many as there are idle processors, at least 1. Threads wait
    for each other: with another process on one of two processors, two threads are slower than one
    (masksup.py --bench 40: 245 ms a step instead of 96; on idle ones 62 and 92)."""
    try:        # on Linux, how many threads run now: the median of nine readings, without this one
        running = []
        for _ in range(9):
            running.append(int(Path("/proc/loadavg").read_text().split()[3].split("/")[0]))
            time.sleep(0.02)
        busy = sorted(running)[4] - 1
    except OSError:     # the load average is slower: it still counts a run that has just ended
        busy = round(os.getloadavg()[0]) if hasattr(os, "getloadavg") else 0
    return max(1, min(torch.get_num_threads(), (os.cpu_count() or 1) - busy))


class Machine:
    """Where a run takes place: .device, .rank and .world (torchrun's), .autocast() for forward
    passes, and .loading, arguments for data.py's loaders. If cfg.threads is 0, it becomes that of
    the run to resume (in the folder `first` or cfg.out), or else idle_processors()."""

    def __init__(self, cfg, first=None):
        for folder in (first or cfg.out, cfg.out) if cfg.resume else ():
            with suppress(OSError, ValueError, AttributeError):     # Run reports what is wrong
                config = json.loads((Path(folder) / "config.json").read_text("utf-8"))
                cfg.threads = cfg.threads or config.get("threads", 0)
                if config.get("palette") and not cfg.palette:
                    raise UserError(f"--resume: {folder} was started with --palette "
                                    f"{config['palette']}: give it again")
        cfg.threads = cfg.threads or idle_processors()
        torch.set_num_threads(cfg.threads)      # the last bits of results on a CPU depend on it
        self.rank = int(os.environ.get("RANK", 0))
        self.world, self.main = int(os.environ.get("WORLD_SIZE", 1)), self.rank == 0
        name = cfg.device
        if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", name):
            raise UserError(f"--device {name}: expected one of auto, cuda, cuda:1, mps, cpu"
                            f"{nearest_name(name, ('auto', 'cuda', 'mps', 'cpu'))}")
        there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
                 "cpu": True}
        if name == "auto":
            name = next(kind for kind in there if there[kind])
        if not there[name.partition(":")[0]]:
            raise UserError(f"--device {name}: torch does not find one; leave --device out")
        if name.startswith("cuda"):
            n = torch.cuda.device_count()
            if int(name[5:] or 0) >= n:
                raise UserError(f"--device {name}: there are only cuda:0 to cuda:{n - 1}")
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
            torch.backends.cudnn.benchmark = True       # all crops have one size
            name = name if ":" in name else f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
            torch.cuda.set_device(name)
        self.device = torch.device(name)
        if self.world > 1:
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        amp = cfg.amp
        if amp == "auto":       # bf16 needs no loss scaling. Few CPUs gain from it, and GPUs before
            # 8.0 only emulate it, which is_bf16_supported() counts as support.
            amp = ("off" if self.device.type != "cuda" else
                   "bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp16")
        self.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}[amp]
        # With CUDA one worker for each processor that this process may use: a worker reads 7
        # images of Cityscapes a second, and a GPU takes hundreds.
        usable = (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else
                  os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        auto = usable if self.device.type == "cuda" else 0
        self.loading = dict(workers=cfg.workers if cfg.workers >= 0 else auto, rank=self.rank,
                            world=self.world)
        # for torch's optimizers: one kernel on CUDA, the default elsewhere
        self.fused = self.device.type == "cuda" or None

    def autocast(self):
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def scaler(self):
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

    def mean(self, tensor):
        """The mean over the processes, a new tensor without gradient. A loss whose sum is divided
        by the mean number of pixels has, averaged, the gradient of the whole batch."""
        tensor = tensor.detach().clone()
        all_reduce(tensor)
        return tensor / self.world


def synchronized(model, machine):
    """The model with BatchNorm over the batches of all processes, which exists on CUDA only."""
    if machine.world > 1 and machine.device.type == "cuda":
        return torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model


def compiled(model, cfg):
    """The model, with --compile compiled for the one shape of the training batches."""
    return torch.compile(model, dynamic=False) if cfg.compile else model


def parallel(model, machine):
    """The model that the training loop calls: wrapped if there is more than one process."""
    if machine.world == 1:
        return model
    return torch.nn.parallel.DistributedDataParallel(
        synchronized(model, machine), gradient_as_bucket_view=True)     # without copying gradients


def same_buffers(model, machine):
    """Copy the buffers (BatchNorm's averages) of the first process to all, so that they evaluate
    the network that a checkpoint holds."""
    if machine.world > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def average_gradients(module, world):
    """Average the gradients of a module that parallel() does not wrap, in one message."""
    if world > 1:
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        for g, mean in zip(gradients, (flat / world).split([g.numel() for g in gradients])):
            g.copy_(mean.view_as(g))


def all_reduce(*tensors):
    """Sum each tensor over the processes, in place."""
    if dist.is_initialized():
        for t in tensors:
            dist.all_reduce(t)


# ----------------------------------------------------------------------------------------- metrics

def confusion(prediction, target, classes):
    """Pixel counts (C, C) int64, row = ground truth, column = prediction, on the tensors' device.

    prediction: ints 0..C-1, any shape.  target: the same shape, 0..C-1, or 255 (not counted).
    """
    cell = target.long() * classes + prediction.long()
    cell = cell.masked_fill(target == VOID, classes * classes)          # one more bin, dropped
    counts = torch.bincount(cell.flatten(), minlength=classes * classes + 1)
    return counts[:-1].view(classes, classes)


def class_iou(matrix):
    """IoU in percent, (C,) float64; NaN for a class in neither ground truth nor prediction."""
    m = matrix.cpu().double()                     # Apple GPUs have no float64
    return 100 * m.diag() / (m.sum(0) + m.sum(1) - m.diag())


def miou(matrix):
    """Mean IoU in percent over the classes in ground truth or prediction; NaN if there is none."""
    return class_iou(matrix).nanmean().item()


def constant_miou(matrix):
    """The mIoU in percent of the best constant prediction: one class for every pixel."""
    pixels = matrix.sum(1).float()                # of each class; all classes but one score 0
    return (100 * pixels.max() / pixels.sum() / (pixels > 0).sum()).item()


# -------------------------------------------------------------------------------------- run folder

def write(path, content):
    """Write text or bytes to path.part, then rename it: a reader never sees half a file."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            file.write(content.encode("utf-8", "surrogateescape")       # as file names are
                       if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)        # the disk may be full
        raise UserError(f"cannot write {path}: {error.strerror or error}; free space or write "
                        "elsewhere") from None


def save_checkpoint(path, state):
    """torch.save through write(): a process killed here leaves the previous checkpoint."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write(path, buffer.getbuffer())


def load_checkpoint(path, method):
    """Read a checkpoint of `method` without running code in it. UserError if it is not one."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"no checkpoint {path}; train first, or give another path") from None
    except Exception as error:
        reason = (str(error).strip() or "it ends too early").splitlines()[0]
        raise UserError(f"{path} is not a complete checkpoint ({reason[:80]}); give another one"
                        ) from None
    found = state.get("method") if isinstance(state, dict) and "model" in state else None
    if found != method:
        raise UserError(f"{path} is a checkpoint of {found or 'something else'}, not of {method}")
    return state


def load(path, method, Config, Info, build):
    """(cfg, info, model, state) of a checkpoint, on the CPU, in evaluation mode. build: (cfg, C) ->
    model. Raises UserError if it is of another method or version."""
    state = load_checkpoint(path, method)
    try:
        cfg, info = Config(**state["config"]), Info(**state["info"])
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: written by another version of {method}.py ({error})") from None
    model = build(cfg, len(info.classes)).eval()
    model.load_state_dict(state["model"])
    return cfg, info, model, state


def checkpoint_config(cfg, origin, path, trained, check, *flags):
    """The configuration `trained` of the checkpoint at path, with the values of the command line
    that may differ: `flags`, and those of this machine. Prints them; UserError for others."""
    given = {name for name, source in origin.items() if source == "flag"}
    local = {"root", "workers", "device", "amp", "threads", "in_memory"}
    if wrong := sorted(given - local - {"out", *flags}):
        raise UserError(f"--{wrong[0].replace('_', '-')} cannot be changed: it is fixed by the "
                        f"checkpoint {path}")
    cfg = dataclasses.replace(trained, **{"resume": False}
                              | {k: getattr(cfg, k) for k in given | local})
    check(cfg)
    show_config(cfg, dict.fromkeys(sorted(given), "flag"), f"everything else as in {path}")
    return cfg


def load_weights(model, path, method, classes, may_lack=()):
    """--init: copy a checkpoint's weights into the model, which has C classes. With another number
    of classes in the checkpoint, weights whose shape depends on that number keep their initial
    values, and are listed. Names that start with may_lack may be missing in one of the two. Raises
    UserError if the weights do not fit."""
    initial, state = model.state_dict(), load_checkpoint(path, method)
    saved = {k: v for k, v in state["model"].items() if k in initial or not k.startswith(may_lack)}
    saved |= {k: v for k, v in initial.items() if k not in saved and k.startswith(may_lack)}
    more, kept = classes - len(state["info"]["classes"]), []
    for name in initial.keys() & saved.keys() if more else ():
        off = [a - b for a, b in zip(initial[name].shape, saved[name].shape) if a != b]
        if len(off) == 1 and off[0] % more == 0 and off[0] * more > 0:
            saved[name] = initial[name]
            kept.append(name)
    try:
        model.load_state_dict(saved)
    except RuntimeError as error:
        line = " ".join(str(error).split("\n\t")[1:2]) or "other weights"
        raise UserError(f"--init {path} does not fit this model ({line}); use the flags that it "
                        "was trained with") from None
    if kept:
        print(f"--init {path} has {classes - more} classes, not {classes}; not loaded: "
              f"{', '.join(sorted(kept))}")


def read_weights(pretrained, url, key):
    """{name: tensor} for --pretrained: the weights in a file, or for "imagenet" at url; maybe under
    the name `key` there."""
    try:
        if pretrained == "imagenet":
            state = torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True,
                                                       weights_only=True)
        else:
            state = torch.load(pretrained, map_location="cpu", weights_only=True)
        return {str(name): value for name, value in state.get(key, state).items()}
    except Exception as error:              # a missing file, no network, not a checkpoint
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"--pretrained {pretrained}: cannot be read ({reason[:100]}); give a file "
                        f"from {url}, or --pretrained none for random weights") from None


RUN_FILES = ("config.json", "last.pt", "best.pt", "pretrain.pt", "log.csv", "curves.png",
             "samples.png", "step.png", "labeled.txt", "metrics.json", "robustness.png",
             "augment.json")
# what --resume may change: where the run takes place and how far it goes, not what it computes
MAY_DIFFER = {"root", "out", "workers", "threads", "in_memory", "device", "compile", "resume",
              "max_steps", "save_every"}


def refuse_run(out, what="a run: continue it with --resume, or start another with --out DIR"):
    """Raises UserError if the folder has files of a run, which are never overwritten."""
    if found := [name for name in RUN_FILES if (Path(out) / name).exists()]:
        raise UserError(f"{out} already holds {what} ({found[0]} is there)")


def refuse_results(out):
    """Raises UserError if the folder has files of a run or of an evaluation."""
    refuse_run(out, "a run, or results: give another folder with --out DIR")


def result_folders(paths, out):
    """{checkpoint: folder for its results}: OUT for one, OUT/RUN-CHECKPOINT for several. Raises
    UserError if two folders have the same name, or if one has files of a run or an evaluation."""
    refuse_results(out)
    if len(paths) == 1:
        return {paths[0]: out}
    names = [f"{Path(path).resolve().parent.name}-{Path(path).stem}" for path in paths]
    for path, name in zip(paths, names):
        if names.count(name) > 1:
            raise UserError(f"--eval {path}: the results of another one go to {name} too; rename "
                            "its folder")
        refuse_results(out / name)
    return {path: out / name for path, name in zip(paths, names)}


def resuming(cfg):
    """Whether the run continues from its last.pt, so that it needs no initial weights."""
    return cfg.resume and (Path(cfg.out) / "last.pt").exists()


class Run:
    """The run folder OUT, and what a training loop does besides training: announce() before it,
    note() after a step, log() after an evaluation, save() when note() returned something. Raises
    UserError instead of overwriting a run, and if a run is resumed with another configuration,
    other classes or other training images."""
    KEPT = "step", "history", "scores", "losses", "best", "seconds"

    def __init__(self, cfg, method, machine, info, pictures, parts, terms, stop, per_epoch, *,
                 may_differ=(), interrupt=None, last="last.pt", **facts):
        """To be created after the datasets: if these fail, no folder is left behind.

        pictures: a hash of the training images' names.  parts: {name: model, optimizer, ..}, whose
        state is saved.  terms: names of the losses.  stop: the last step.  per_epoch: steps an
        epoch.  may_differ: more fields that --resume may change.  facts: more to save.  interrupt,
        last: for a run inside another one, the other's Interrupt and a name for its checkpoints.
        """
        if cfg.batch_size % machine.world:
            raise UserError(f"--batch-size {cfg.batch_size}: not a multiple of {machine.world} "
                            "processes")
        self.cfg, self.machine, self.out, self.last = cfg, machine, Path(cfg.out), last
        self.parts, self.terms, self.stop, self.per_epoch = parts, terms, stop, per_epoch
        self.modules = [p for p in parts.values() if isinstance(p, torch.nn.Module)]
        self.facts = {"method": method, "config": dataclasses.asdict(cfg),
                      "info": dataclasses.asdict(info), "pictures": pictures, **facts}
        self.interrupt, self.saved = interrupt or Interrupt(machine), time.time()
        self.step, self.history, self.scores, self.best, self.seconds = 0, [], {}, -1.0, 0.0
        self.losses = []                    # since the last evaluation, (n,) for each step
        self.unchecked = []                 # (step, loss, batches), for check_finite()
        self.better = None                  # the state for best.pt, until it is written
        self.live = sys.stdout.isatty() and machine.main
        if last == "last.pt":
            self.open(may_differ)
        if cfg.resume and (self.out / last).exists():
            self.restore(load_checkpoint(self.out / last, method))
        self.start = self.step
        if self.start >= stop and last == "last.pt" and not (
                self.history and self.history[-1]["step"] == self.start):
            raise UserError(f"--resume: {cfg.out} is at step {self.start} already; give more "
                            "--epochs or --max-steps")

    def open(self, may_differ):
        """Create OUT with config.json, or for --resume compare the configurations."""
        config, now = self.out / "config.json", self.facts["config"]
        if not self.cfg.resume:
            if self.machine.main:
                refuse_run(self.out)
                write(config, json.dumps(now, indent=1) + "\n")
            return
        try:
            was, now = json.loads(config.read_text("utf-8")), json.loads(json.dumps(now))
            if not isinstance(was, dict) or was.keys() != now.keys():
                raise ValueError("it has other fields")
        except FileNotFoundError:
            raise UserError(f"--resume: no run in {self.out}; leave --resume out to start one, or "
                            "give the run's folder with --out") from None
        except ValueError as error:                     # from json and utf-8 too
            raise UserError(f"--resume: {config} is not of a run of this {self.facts['method']}.py"
                            f" ({error}); give another --out") from None
        may_differ = MAY_DIFFER | set(may_differ)
        if Path(now["data"]).is_dir():                  # it may have moved: restore() compares
            may_differ |= {"data", "palette"}           # classes and training images
        if differ := [f"{k} was {was[k]}, now {now[k]}" for k in now
                      if was[k] != now[k] and k not in may_differ]:
            raise UserError(f"--resume: {self.out} has other flags ({'; '.join(differ)}); give "
                            "the flags it was started with, or another --out")

    def restore(self, state):
        """Continue from a checkpoint's state."""
        if not {"optimizer", "pictures"} <= state.keys():
            raise UserError(f"--resume: {self.out / self.last} has weights only; start another "
                            f"run with --init {self.out / self.last}")
        was, now = ((s["info"]["classes"], s["pictures"],
                     [s["info"][key] for key in ("ids", "void", "threshold", "palette")])
                    for s in (state, self.facts))
        kinds = "classes", "training images", "ids or colours in its masks"
        for what, a, b in zip(kinds, was, now):
            if a != b:
                raise UserError(f"--resume: {self.cfg.data} has other {what} than {self.out} had "
                                f"({a}, now {b}); restore these, or give another --out")
        for group in state["optimizer"]["param_groups"]:
            group["fused"] = self.machine.fused         # of this device, not the saved one
        for name, part in self.parts.items():
            if state[name]:                             # a scaler without fp16 has none
                part.load_state_dict(state[name])
        vars(self).update({k: state[k] for k in self.KEPT})
        self.losses = [terms.to(self.machine.device) for terms in self.losses]

    def announce(self, words):
        """Print what starts, and start the clock."""
        self.say(f"{words}, steps {self.start} to {self.stop}, {self.per_epoch} an epoch, on "
                 f"{self.machine.device}, threads: {self.cfg.threads}"
                 + "; the first steps compile, which takes minutes" * self.cfg.compile)
        self.first, self.clock = None, time.time()

    def say(self, line):
        if self.machine.main:
            print(("\r\033[K" if self.live else "") + line, flush=True)

    def note(self, step, terms, *batches):
        """Record the losses of a step. Returns what to do now: "evaluate", "save" or "".

        terms: float (n,), the total loss first, read once in CHECK_EVERY steps.  batches: pairs
        (Dataset, indices (B,)), whose files are named if the loss is not finite.
        """
        self.step = step + 1
        self.losses.append(terms)
        self.unchecked.append((self.step, terms[0], batches))
        if step % CHECK_EVERY == 0:
            self.progress(self.check_finite())
        late = 0 < self.cfg.save_every < (time.time() - self.saved) / 60
        self.asked, self.late = self.interrupt.due(step, late)
        due = self.step % (self.per_epoch * self.cfg.eval_every) == 0 or self.step == self.stop
        if due or self.asked or self.late:
            self.check_finite(*self.modules)
            self.seconds += time.time() - self.clock
            for module in self.modules:
                same_buffers(module, self.machine)
        return "evaluate" if due else "save" if self.asked or self.late else ""

    def progress(self, loss):
        """Print the loss, the speed and the time left: on a terminal in one line, which is
        rewritten, otherwise once. The first call starts the clock: the model may compile before."""
        self.first = self.first or (self.step, time.time())
        done, spent = self.step - self.first[0], max(time.time() - self.first[1], 1e-9)
        line = f"step {self.step}/{self.stop}  loss {loss:.4f}"
        if done:
            line += (f"  {done * self.cfg.batch_size / spent:.3g} img/s  "
                     f"{duration(spent / done * (self.stop - self.step))} left")
        if self.live:
            print(f"\r\033[K{line}", end="", flush=True)
        elif done == CHECK_EVERY:
            self.say(line)

    def check_finite(self, *modules):
        """The last loss, a float. Raises UserError, with the step and the files of its batch, if a
        loss since the last call is not finite, or a weight or buffer of the modules is not."""
        losses = torch.stack([loss for _, loss, _ in self.unchecked]).tolist()
        bad = [i for i, loss in enumerate(losses) if not math.isfinite(loss)]
        what = f"the loss is {losses[bad[0]]}" if bad else "some weights are not finite"
        weights = [t.isfinite().all() for m in modules for t in m.state_dict().values()]
        if bad or weights and not torch.stack(weights).all():
            step, _, batches = self.unchecked[bad[0] if bad else -1]
            files = [name for dataset, index in batches for name in dataset.files(index)]
            raise UserError(f"step {step}: {what}, after the batch {', '.join(files)}; "
                            f"{self.out} has the last state saved before: look at these files, or "
                            "start another run with another --out and a lower --lr or --amp off")
        self.unchecked = self.unchecked[-1:]
        return losses[-1]

    def means(self):
        """{term: its mean since the last call}."""
        means, self.losses = torch.stack(self.losses).mean(0).tolist(), []
        return dict(zip(self.terms, means))

    def log(self, scores, better_by, line, **row):
        """Add a row to log.csv and curves.png, and print a line. better_by: the score by which
        best.pt is chosen."""
        means, epoch, self.scores = self.means(), self.step / self.per_epoch, scores
        self.history.append({"epoch": round(epoch, 2), "step": self.step, **means, **row,
                             "lr": self.parts["optimizer"].param_groups[0]["lr"],
                             "seconds": round(self.seconds, 1)})
        loss, *others = (f"{k.removeprefix('loss_')} {v:.4f}" for k, v in means.items() if v)
        self.say(f"epoch {epoch:6.2f}  step {self.step:6d}  {loss.removeprefix('train_')} "
                 f"({' '.join(others)})  {line}  {self.seconds:.0f} s".replace(" ()", ""))
        if self.machine.main:
            write_csv(self.out / "log.csv", list(self.history[0]), [
                [f"{v:.6g}" if isinstance(v, float) else v for v in row.values()]
                for row in self.history])
            draw_curves(self.history, self.out / "curves.png")
        if scores[better_by] > self.best or self.best < 0:      # also a first score of NaN
            self.best = max(scores[better_by], -1.0)
            resume_only = {k for k, p in self.parts.items() if p not in self.modules}
            self.better = {k: v for k, v in self.state().items() if k not in resume_only}

    def state(self):
        """Everything that --resume and --eval need."""
        kept = {k: getattr(self, k) for k in self.KEPT}
        kept |= {k: list(kept[k]) for k in ("history", "losses")}       # copies: these lists grow
        return {**self.facts, **kept, **{k: p.state_dict() for k, p in self.parts.items()}}

    def save(self):
        """Write last.pt and, if the model is better, best.pt; after an evaluation only if
        --save-every minutes have passed: two files of 4 GB take longer to write than an epoch on a
        fast GPU. Until then a better model is kept in memory, so that best.pt is never older than
        last.pt. Exit after Ctrl-C."""
        asked = self.asked or self.interrupt.due(self.step - 1)[0]      # before evaluate(), in it
        if asked or self.late or self.step == self.stop or not self.cfg.save_every:
            if self.machine.main:
                if self.better:                         # first: a run resumes from last.pt
                    save_checkpoint(self.out / "best.pt", self.better)
                save_checkpoint(self.out / self.last, self.state())
            self.better, self.saved = None, time.time()
        elif self.better and self.better["step"] == self.step:      # copy before training goes on
            for k in self.parts.keys() & self.better.keys():
                self.better[k] = type(self.better[k])(
                    (name, t.to("cpu", copy=True)) for name, t in self.better[k].items())
        if asked:
            self.interrupt.end(f"step {self.step}")
        self.clock = time.time()


def write_csv(path, titles, rows):
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([titles, *rows])
    write(path, text.getvalue())


def write_json(path, value):
    """Write JSON: NaN becomes null, floats have four decimals."""
    value = json.loads(json.dumps(value), parse_constant=lambda name: None,
                       parse_float=lambda digits: round(float(digits), 4))
    write(path, json.dumps(value, indent=1) + "\n")


def progress(items):
    """Loop over a list and print how far it is and the time left: on a terminal in one line, which
    is rewritten, otherwise once after ten seconds."""
    start, live, printed = time.time(), sys.stdout.isatty(), False
    for i, item in enumerate(items):
        spent = time.time() - start
        if i and (live or spent > 10 and not printed):
            left = duration(spent / i * (len(items) - i))
            print("\r\033[K" * live + f"{i} of {len(items)}, {left} left",
                  end="" if live else "\n", flush=True)
            printed = True
        yield item
    print("\r\033[K" * live, end="", flush=True)


def duration(seconds):
    """'11 h 44 min', '3 min 20 s' or '45 s'."""
    minutes, s = divmod(round(seconds), 60)
    h, m = divmod(minutes, 60)
    return f"{h} h {m} min" if h else f"{m} min {s} s" if m else f"{s} s"


class Interrupt:
    """Records the first Ctrl-C or SIGTERM, so that the loop can finish the step, save and end.
    Under torchrun the processes agree on it, once in CHECK_EVERY steps."""

    def __init__(self, machine):
        self.machine, self.asked = machine, False
        signal.signal(signal.SIGINT, self.catch)
        if machine.world == 1:              # torchrun sends it when a process fails
            signal.signal(signal.SIGTERM, self.catch)

    def catch(self, number, _):
        self.asked = True
        if self.machine.world == 1:         # a second one ends the process at once
            signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else
                          signal.default_int_handler)

    def due(self, step, late=False):
        """(whether to save and end after this step, whether any process is `late`): the same in
        all processes, which under torchrun is found once in CHECK_EVERY steps."""
        if self.machine.world == 1:
            return self.asked, late
        if step % CHECK_EVERY:
            return False, False
        both = torch.tensor([float(self.asked), float(late)], device=self.machine.device)
        dist.all_reduce(both)
        return tuple((both > 0).tolist())

    def end(self, what):
        """Print how to continue, and exit when the first process has saved."""
        if self.machine.main:
            print(f"\nstopped after {what}: continue with the same command and --resume")
        if self.machine.world > 1:
            dist.barrier()
        sys.exit(130)


# ------------------------------------------------------------------------------------------- bench

def parameters(*modules):
    """The number of their weights."""
    return sum(p.numel() for module in modules for p in module.parameters())


def macs(model, *inputs):
    """Multiply-adds (1e9) of model(*inputs), as torch counts them."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*inputs)
    return counter.get_total_flops() / 2e9                          # a multiply-add is two FLOPs


def time_steps(step, n, batch, device, gmacs):
    """Time n calls step(i), after two to warm up: {ms_per_step, img_per_s, tflops, peak_mb}.
    gmacs: multiply-adds (1e9) of a step's forward passes. tflops, 1e12 FLOP a second, counts
    forward and backward as 3 x gmacs x 2; compare it with the peak of the GPU."""
    sync = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device.type, bool)
    for i in range(2):
        step(i)
    sync()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    for i in range(n):
        step(i)
    sync()
    seconds = (time.perf_counter() - start) / n
    return {"ms_per_step": round(1000 * seconds, 2), "img_per_s": round(batch / seconds, 1),
            "tflops": round(0.006 * gmacs / seconds, 4), "peak_mb": peak_mb(device)}


def peak_mb(device):
    """Peak memory in MiB: of CUDA's allocator, or of the whole process; None on Windows."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated() / 2**20)
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10))


# ------------------------------------------------------------------------------------------ images

def vivid(colors):
    """Colours to draw C classes in, (C, 3) uint8: dark grey for class 0, and for the others bright
    colours that differ, however dark or alike `colors` (C, 3) are. A class keeps its hue if no
    earlier class has one near it. Otherwise it gets the bright colour that is farthest from all
    used so far, from white, from the grey of void, and from outline()'s magenta."""
    levels = np.linspace(0, 255, 8)
    bright = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(-1, 3)
    bright = bright[(bright.max(1) > 180) & (np.ptp(bright, 1) > 120)]
    used = [(60, 60, 60), (200, 200, 200), (255, 255, 255), (255, 0, 255)]
    for color in np.asarray(colors, float)[1:]:
        color = color * 255 / max(1, color.max())
        if np.ptp(color) < 120 or np.linalg.norm(used - color, axis=1).min() < 90:
            distance = np.linalg.norm(bright[:, None] - used, axis=2).min(1)
            color = bright[distance.argmax()]
        used.append(color)
    return np.array([used[0], *used[4:]]).round().astype(np.uint8)


def colorize(label, colors):
    """Class indices (.., H, W), 0..C-1, -> uint8 (.., H, W, 3) in vivid(colors); void and other
    values are light grey."""
    table = np.full((256, 3), 200, np.uint8)
    table[:len(colors)] = vivid(colors)
    return table[np.asarray(label)]


def border(label):
    """Which pixels of label (H, W) are at the border of a region: (H, W) bool. The border is one
    pixel wide, and one more for every 192 pixels of the longer side."""
    width, found = 1 + max(label.shape) // 192, np.zeros(label.shape, bool)
    for a, b in ((np.s_[width:], np.s_[:-width]), (np.s_[:, width:], np.s_[:, :-width])):
        found[a] |= label[a] != label[b]
        found[b] |= label[a] != label[b]
    return found


def outline(image, mask, color=(255, 0, 255)):
    """The image, uint8 (H, W, 3), with the borders of mask (H, W) bool in this colour."""
    return np.where((border(mask) & mask)[..., None], np.array(color, np.uint8), image)


def overlay(image, label, colors):
    """The image, uint8 (H, W, 3), with its label (H, W) over it: 45 % of the class's vivid colour,
    100 % at the borders of regions. Class 0 and void stay as the image is."""
    share = np.where(border(label), np.float32(1), np.float32(0.45))[..., None]
    share[(label == 0) | (label == VOID)] = 0
    mixed = image * (1 - share) + colorize(label, colors) * share
    return mixed.round().astype(np.uint8)


def save_image(path, array, palette=None):
    """Write uint8 (H, W) or (H, W, 3) as PNG; with a palette (a flat list), as indices."""
    image = Image.fromarray(np.ascontiguousarray(array))
    if palette is not None:
        image.putpalette(palette + [0] * (768 - len(palette)))      # 256 colours: no id is cut
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    write(path, buffer.getbuffer())


font = ImageFont.load_default


def draw_sheet(path, rows, names, info, title="", grey="void"):
    """Write a contact sheet as one PNG: rows of images, uint8 (H, W, 3), or labels (H, W), which
    get the colours of the dataset's Info; the name of each row before it, a title above, and a
    legend of the classes below, in which `grey` is the meaning of light grey. Small images are
    enlarged by whole steps to almost 160 pixels, so that patches stay square."""
    gap, tile, size = 4, 160, 15
    rows = [[Image.fromarray(colorize(p, info.colors) if p.ndim == 2 else p) for p in row]
            for row in rows]
    rows = [[ImageOps.scale(p, max(1, tile // max(p.size)), Image.NEAREST) for p in row]
            for row in rows]
    left = 4 * gap + max((int(font(size).getlength(name)) for name in names), default=0)
    widths = [max(row[i].width for row in rows if i < len(row))
              for i in range(max(map(len, rows), default=0))]
    heights = [max(image.height for image in row) for row in rows]
    W = max(left + sum(widths) + gap * len(widths), 480)
    head = textwrap.wrap(title, W // 8)
    entries, y = legend(info, grey, W - 2 * gap), gap + 22 * len(head)
    bottom = y + sum(heights) + gap * len(heights) + 2 * gap
    canvas = Image.new("RGB", (W, bottom + 22 * (entries[-1][1] + 1)), "white")
    draw = ImageDraw.Draw(canvas)
    for i, line in enumerate(head):
        draw.text((2 * gap, 14 + 22 * i), line, "black", font(size), anchor="lm")
    for row, name, height in zip(rows, names, heights):
        draw.text((2 * gap, y + height // 2), name, "black", font(size), anchor="lm")
        x = left
        for image, width in zip(row, widths):
            canvas.paste(image, (x, y))
            x += width + gap
        y += height + gap
    for x, line, name, color in entries:
        middle = bottom + 22 * line + 7
        if color is not None:
            draw.rectangle((x + 8, middle - 7, x + 22, middle + 7), tuple(map(int, color)), "black")
        draw.text((x + 28, middle), name, "black", font(size), anchor="lm")
    save_image(path, np.asarray(canvas))


def legend(info, grey, width, most=20):
    """[(x, line, name, colour)] of the first `most` classes and of grey, wrapped to a width."""
    entries = [*zip(info.classes, vivid(info.colors))][:most]
    if len(info.classes) > most:
        entries.append((f"and {len(info.classes) - most} more", None))
    placed, x, line = [], 0, 0
    for name, color in [*entries, (grey, (200, 200, 200))]:
        needed = 44 + int(font(15).getlength(name))
        if x and x + needed > width:
            x, line = 0, line + 1
        placed.append((x, line, name, color))
        x += needed
    return placed


def refuse_nonempty(to):
    """Raises UserError if the folder for --to has files."""
    if Path(to).exists() and (not Path(to).is_dir() or any(Path(to).iterdir())):
        raise UserError(f"--to {to} is not an empty folder; give a new one")


def pieces(label, classes):
    """The number of 4-connected regions of each class in a label, (H, W) int -> (C,) int. Runs of
    one class in a row are numbered. Runs that touch in two rows take the smaller number of the two,
    until all numbers are equal within a region."""
    start = np.ones(label.shape, bool)
    start[:, 1:] = label[:, 1:] != label[:, :-1]
    run = start.cumsum().reshape(label.shape) - 1
    touch = (label[1:] == label[:-1]) & (start[1:] | start[:-1])    # once for every two runs
    a, b, root = run[:-1][touch], run[1:][touch], np.arange(run[-1, -1] + 1)
    while len(a):
        np.minimum.at(root, np.maximum(root[a], root[b]), np.minimum(root[a], root[b]))
        while (root[root] != root).any():
            root = root[root]
        apart = root[a] != root[b]
        a, b = a[apart], b[apart]
    first = root == np.arange(len(root))
    return np.bincount(label[start][first], minlength=classes)[:classes]


def predict_folder(cfg, origin, load, check, data, segment, *flags):
    """--predict PATH .. --ckpt CKPT --to DIR: segment images and folders of images, and exit.

    load, check and segment belong to the method, data is data.py, flags as in checkpoint_config().
    Writes DIR/NAME.png (class indices, with the palette of the classes), DIR/overlay/NAME.png and
    DIR/confidence/NAME.png (255 times the confidence), in the size and the folders of the images,
    upright by their EXIF data. DIR/overlay/legend.png names the colours. DIR/areas.csv: for each
    class its share and mean confidence in percent and its number of regions. If a.jpg and a.png are
    given, they become a.jpg.png and a.png.png. Files that cannot be read are a line on stderr each,
    and exit status 1.
    """
    if not (cfg.ckpt and cfg.to):
        raise UserError(f"--predict needs --{'to' if cfg.ckpt else 'ckpt'} too: --predict PATH "
                        "--ckpt CKPT --to DIR")
    trained, info, model, _ = load(cfg.ckpt)
    cfg = checkpoint_config(cfg, origin, cfg.ckpt, trained, check, "predict", "ckpt", "to", *flags)
    machine, to, failed, found, areas = Machine(cfg), Path(cfg.to), 0, [], []
    if machine.world > 1:
        raise UserError("--predict runs in one process: start it with python, not torchrun")
    refuse_nonempty(to)
    for source in map(Path, cfg.predict):
        inside = (data.images_below(source) if source.is_dir() else
                  [source] if source.exists() else [])
        found += [(path, path.relative_to(source if source.is_dir() else source.parent))
                  for path in inside]
        if not inside:
            raise UserError(f"--predict {source}: no image there")
        if others := sorted(p.name for p in {*source.rglob("*")} - {*inside} if p.is_file()):
            print(f"{source}: skipped, not images: {', '.join(others[:4])}"
                  + f" and {len(others) - 4} more" * (len(others) > 4))
    if len({name for _, name in found}) < len(found):
        raise UserError("--predict: two images have the same name; predict them one by one")
    same_stem = len({name.with_suffix("") for _, name in found}) < len(found)   # a.jpg and a.png
    model.to(machine.device)
    draw_sheet(to / "overlay/legend.png", [], [], info, "Class 0 is left as the image is")
    for path, name in progress(found):
        file, name = name, f"{name if same_stem else name.with_suffix('')}.png"
        try:
            image = data.read_image(path)
        except UserError as error:
            failed += 1
            print(f"{error} (skipped)", file=sys.stderr)
            continue
        label, confidence = segment(model, image, cfg, machine)
        save_image(to / "confidence" / name, (255 * confidence).round().astype(np.uint8))
        for c, n in enumerate(pieces(label, len(info.classes))):
            mean = round(100 * float(confidence[label == c].mean()), 2) if n else ""
            areas.append((file, info.classes[c], round(100 * (label == c).mean(), 4), mean, n))
        save_image(to / name, label, np.array(info.colors, np.uint8).ravel().tolist())
        save_image(to / "overlay" / name, overlay(image, label, info.colors))
    write_csv(to / "areas.csv", ("file", "class", "share", "confidence", "pieces"), areas)
    print(f"{len(found) - failed} segmented, {failed} failed -> {to}; classes "
          + ", ".join(f"{c} {name}" for c, name in enumerate(info.classes)))
    sys.exit(1 if failed else 0)


# the colours of the lines of curves
LINES = [(31, 90, 170), (200, 60, 30), (40, 140, 70), (140, 70, 160), (110, 110, 110),
         (190, 130, 10), (10, 150, 170), (220, 80, 150), (110, 70, 40), (90, 120, 0)]


def draw_curves(history, path):
    """Two panels over the steps of a history (a list of rows): the losses, and the scores."""
    steps = [row["step"] for row in history]
    draw_panels(path, [(steps, {key: [row[key] for row in history]
                                for key in history[0] if word in key}, "step", unit)
                       for word, unit in (("loss", "loss"), ("iou", "%"))])


def compare_curves(histories, path, units):
    """A panel for each key of units {key: axis title}, with a line for each run of histories
    {name: history}. A run that has no row at a step has no point there."""
    steps = sorted({row["step"] for history in histories.values() for row in history})
    found = {name: {row["step"]: row for row in history} for name, history in histories.items()}
    draw_panels(path, [(steps, {name: [rows.get(step, {}).get(key, math.nan) for step in steps]
                                for name, rows in found.items()}, "step", unit)
                       for key, unit in units.items()])


def draw_panels(path, panels):
    """Write panels (xs, {name: values over xs}, x title, y title) side by side as one PNG."""
    W, H = 560, 420
    canvas = Image.new("RGB", (W * len(panels), H), "white")
    for i, (xs, series, x_title, y_title) in enumerate(panels):
        box = (i * W + 64, 48 + 18 * len(series), (i + 1) * W - 28, H - 52)
        draw_panel(ImageDraw.Draw(canvas), box, xs, series, x_title, y_title)
    save_image(path, np.asarray(canvas))


def round_ticks(low, high, most=6):
    """The multiples of a round step (1, 2, 2.5 or 5 times a power of ten) that cover low..high:
    the smallest step with at most `most` intervals."""
    power = 10.0 ** (math.floor(math.log10((high - low) / most)))
    for step in (power * times for times in (1, 2, 2.5, 5, 10, 20)):
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        if last - first <= most:
            return [i * step for i in range(first, last + 1)]


def draw_panel(draw, box, xs, series, x_title, y_title):
    """Draw a panel in box (left, top, right, bottom), with the lines' names and last values above.
    Baselines are dashed: lines whose name ends in "nearest" or "nearest fill". The x axis starts at
    0. A y axis in percent spans at least 10 points, so that noise looks small."""
    left, top, right, bottom = box
    finite = [v for values in series.values() for v in values if math.isfinite(v)] or [0.0]
    low, high = min(finite), max(finite)
    if "%" in y_title:
        low = max(0, min(low, high - 10))
        high = max(high, low + 10)
    ticks = round_ticks(low, max(high, low + 1e-6 * max(1, abs(low))))
    end = xs[-1] or 1

    def place(x, y):
        return (left + (right - left) * x / end,
                bottom - (bottom - top) * (y - ticks[0]) / (ticks[-1] - ticks[0]))

    for y in ticks:
        draw.line((place(0, y), place(end, y)), (222, 222, 222))
        draw.text((left - 8, place(0, y)[1]), f"{y:.10g}", "black", font(13), anchor="rm")
    for x in round_ticks(0, end):
        if x <= end:
            at = place(x, 0)[0]
            draw.line((at, bottom, at, bottom + 5), "black")
            draw.text((at, bottom + 14), f"{x:.10g}", "black", font(13), anchor="mm")
    draw.line((left, bottom, right, bottom), "black")
    draw.text(((left + right) / 2, bottom + 36), x_title, "black", font(14), anchor="mm")
    draw.text((left - 56, top - 18), y_title, "black", font(14), anchor="lm")
    for i, (name, values) in enumerate(series.items()):
        color, dashed = LINES[i % len(LINES)], name.endswith(("nearest", "nearest fill"))
        points = [place(x, v) for x, v in zip(xs, values) if math.isfinite(v)]
        above = top - 36 - 18 * (len(series) - 1 - i)
        draw_line(draw, [(left + 8, above), (left + 34, above)], color, dashed)
        draw_line(draw, points, color, dashed)
        for x, y in points if len(points) <= (1 if dashed else 20) else ():
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), color)
        last = next((v for v in reversed(values) if math.isfinite(v)), math.nan)
        draw.text((left + 42, above), f"{name} {last:.4g}", color, font(14), anchor="lm")


def draw_line(draw, points, color, dashed):
    """A line through points (x, y), x increasing; dashes are 6 pixels long."""
    if not dashed:
        draw.line(points, color, 3)
    elif points:
        xs = np.arange(points[0][0], points[-1][0], 6)
        dots = list(zip(xs, np.interp(xs, *zip(*points))))
        for pair in zip(dots[::2], dots[1::2]):
            draw.line(pair, color, 2)
