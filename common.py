"""What the three method files share: errors, the command line, metrics, the run folder, pictures.

Nothing in here knows a method, and no method's model, masking or loss imports it.
"""
import csv
import dataclasses
import difflib
import errno
import hashlib
import inspect
import io
import json
import math
import os
import re
import signal
import sys
import time
import typing
import warnings
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from contextlib import nullcontext, suppress
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont
from torch.utils.flop_counter import FlopCounterMode

LOOK = 20        # steps from one look at the losses to the next: each waits for the device
VOID = 255       # the label of a pixel that is not counted and not learned from


# ------------------------------------------------------------------------------------------ errors

class UserError(Exception):
    """A mistake the person at the keyboard can mend: one line says what, where, what to do."""


def run(main):
    """Call main(): what a person can mend is one line on stderr and status 2: a UserError, a file
    or folder that the system refuses, too little memory. Other faults are a traceback."""
    warnings.filterwarnings("ignore", module="PIL")     # of files that it reads none the less
    sys.stdout = sys.stdout or open(os.devnull, "w")
    with suppress(AttributeError):
        sys.stdout.reconfigure(errors="backslashreplace")       # names that no terminal can show
    try:
        check_processes()
        try:
            main()
        except SystemExit:
            sys.stdout.flush()
            raise
        sys.stdout.flush()      # here, so that a full disk or a closed pipe is caught below
        if dist.is_initialized():
            dist.barrier()      # the first process may still be writing
            # no tearing down: of 48 runs with gloo one ended in "terminate called without an
            # active exception", after everything had been saved
            os._exit(0)
    except UserError as error:
        line = str(error)
        if line.startswith("Caught UserError in"):      # by a loader's worker, with its traceback
            line = line.rpartition("common.UserError: ")[2].strip()
        give_up(line)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)) and (
                "can't allocate memory" not in str(error)):
            raise
        give_up(f"too little memory ({str(error)[:150]}); lower --batch-size or --size")
    except OSError as error:
        if error.filename is None and error.errno not in (errno.EPIPE, errno.ENOSPC):
            raise
        if error.errno == errno.EPIPE:                  # as `| head` leaves it
            drop_output()
            sys.exit(1)
        give_up(f"{error.filename or 'standard output'}: {error.strerror}; mend that and run this "
                "again")
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def drop_output():
    """What is still to be printed has nowhere to go: Python is not to complain of that too."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def give_up(line):
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)       # names may hold \n
    try:
        if sys.stdout.isatty():
            print("\r\033[K", end="")                   # what Progress has left there
        sys.stdout.flush()
    except OSError:
        drop_output()
    print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)
    sys.exit(2)


def nearest_name(name, names):
    """' (did you mean X?)' for the closest of names, or ''."""
    names = {other.lower(): other for other in names}
    close = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.5)
    return f" (did you mean {names[close[0]]}?)" if close else ""


# ------------------------------------------------------------------------- configuration and flags

class Parser(ArgumentParser):
    def error(self, message):
        raise UserError(message)


def parse(Config, recipes, doc, argv=None):
    """Fill the dataclass Config from its defaults, then recipes[--data], then the command line.

    A field `a_b: int = 3  # why` is the flag --a-b, its comment the help text. A bool that is True
    by default becomes --no-a-b, a Literal is checked, a tuple takes several values.
    Returns (cfg, origin), origin[name] being "recipe" or "flag" for what is not the default.
    Raises UserError for an unknown flag or value, and names the nearest valid one.
    """
    fields = dataclasses.fields(Config)
    why = dict(re.findall(r"^    (\w+):.*?#\s*(.*)$", inspect.getsource(Config), re.M))
    parser = Parser(description=doc, formatter_class=RawDescriptionHelpFormatter,
                    allow_abbrev=False)
    for field in fields:
        flag = field.name.replace("_", "-")
        kind = {"help": why.get(field.name, "").replace("%", "%%")}
        if field.type is bool:
            kind["action"] = "store_false" if field.default else "store_true"
            flag = f"no-{flag}" if field.default else flag
        elif field.type is tuple:
            kind.update(nargs="+", metavar=field.name.upper())
        elif typing.get_origin(field.type) is typing.Literal:
            kind["metavar"] = "|".join(typing.get_args(field.type))
        else:
            kind.update(type=field.type, metavar=field.type.__name__.upper())
        parser.add_argument(f"--{flag}", dest=field.name, default=None, **kind)
    flags = [s for action in parser._actions for s in action.option_strings]
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        raise UserError(f"unknown argument {unknown[0]}{nearest_name(unknown[0], flags)}; "
                        "--help lists them")
    given = {name: tuple(value) if isinstance(value, list) else value
             for name, value in vars(given).items() if value is not None}
    for field in fields:
        choices, value = typing.get_args(field.type), given.get(field.name)
        flag = f"--{field.name.replace('_', '-')}"
        if value == "" or isinstance(value, tuple) and "" in value:
            raise UserError(f"{flag} is given nothing: an empty variable? Give a value, or leave "
                            "it out")
        if isinstance(value, (int, float)) and not abs(value) < 2**63:
            raise UserError(f"{flag} {value}: expected a finite number, below 2^63 in size")
        if choices and value is not None and value not in choices:
            raise UserError(f"{flag} {value}: expected one of {', '.join(choices)}"
                            f"{nearest_name(value, choices)}")
    recipe = recipes.get(given.get("data", Config.data), {})
    origin = {**dict.fromkeys(recipe, "recipe"), **dict.fromkeys(given, "flag")}
    return Config(**{**recipe, **given}), origin


def show_config(cfg, origin):
    """Print every value, then where each one that is not the default came from (one process)."""
    if os.environ.get("RANK", "0") != "0":
        return
    values = dataclasses.asdict(cfg)
    width = max(map(len, values))
    print("\n".join(f"  {name:{width}} {value}" for name, value in values.items()))
    titles = {"recipe": f"from the recipe for {cfg.data}", "pretrain": "because of --pretrain",
              "flag": "from the command line"}
    for source, title in titles.items():
        names = [name for name, s in origin.items() if s == source]
        if names:
            print(f"{title}: " + ", ".join(names))


# ----------------------------------------------------------------------- device, seeds, processes

def seed_of(*ints):
    """A 63-bit seed out of any integers: a generator is seeded by what its draws are for."""
    digest = hashlib.blake2b(repr(ints).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def check_processes():
    """Raises UserError for environment variables that look like torchrun's, and are not."""
    rank, world = (os.environ.get(name, default) for name, default in (("RANK", "0"),
                                                                       ("WORLD_SIZE", "1")))
    if not (rank.isdecimal() and world.isdecimal() and int(rank) < int(world)
            and (world == "1" or {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys())):
        raise UserError(f"RANK={rank} WORLD_SIZE={world} in the environment: torchrun sets these; "
                        "unset them, or use it")


class Machine:
    """Where a run runs: .device, .autocast() for forward passes, .rank and .world of torchrun."""

    def __init__(self, cfg):
        self.rank = int(os.environ.get("RANK", 0))
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        name = cfg.device
        if name == "auto":
            name = ("cuda" if torch.cuda.is_available() else
                    "mps" if torch.backends.mps.is_available() else "cpu")
        if name == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: torch finds no CUDA device here; leave --device out")
        if name == "mps" and not torch.backends.mps.is_available():
            raise UserError("--device mps: torch finds no Apple GPU here; leave --device out")
        if name == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
            name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
            torch.cuda.set_device(name)
        self.device = torch.device(name)
        if self.world > 1:
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        amp = cfg.amp
        if amp == "auto":       # bf16 needs no loss scaling; on a CPU few chips gain from it
            amp = ("off" if self.device.type != "cuda" else
                   "bf16" if torch.cuda.is_bf16_supported() else "fp16")
        self.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}[amp]
        self.workers = cfg.workers if cfg.workers >= 0 else (
            min(8, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
            if self.device.type == "cuda" else 0)

    def autocast(self):
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def scaler(self):
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

    def sum(self, tensor):
        """The sum of a tensor over the processes, which gradients pass."""
        return tensor if self.world == 1 else SumProcesses.apply(tensor)

    @property
    def main(self):
        return self.rank == 0


class SumProcesses(torch.autograd.Function):
    """all_reduce with its gradient: each process has the loss of all batches, so that the mean of
    gradients which parallel() and average_gradients() take is that of this loss."""

    @staticmethod
    def forward(ctx, tensor):
        return SumProcesses.reduce(tensor)

    @staticmethod
    def backward(ctx, gradient):
        return SumProcesses.reduce(gradient)

    @staticmethod
    def reduce(tensor):
        tensor = tensor.clone()
        dist.all_reduce(tensor)
        return tensor


def synchronized(model, machine):
    """The model with BatchNorm over the batches of all processes; on CPUs there is no such."""
    if machine.world > 1 and machine.device.type == "cuda":
        return torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model


def parallel(model, machine):
    """The model as the loop calls it: wrapped for torchrun if there is more than one process."""
    if machine.world == 1:
        return model
    return torch.nn.parallel.DistributedDataParallel(synchronized(model, machine))


def same_buffers(model, machine):
    """Give every process the buffers (BatchNorm's averages) of the first, as a checkpoint has
    them: all then evaluate the same network."""
    if machine.world > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def average_gradients(module, world):
    """Average the gradients of a module that is not wrapped by parallel(), in one message."""
    if world > 1:
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        for g, mean in zip(gradients, (flat / world).split([g.numel() for g in gradients])):
            g.copy_(mean.view_as(g))


def all_reduce(*tensors):
    """Sum each tensor over the processes, in place; nothing to do in one process."""
    if dist.is_initialized():
        for t in tensors:
            dist.all_reduce(t)


# ----------------------------------------------------------------------------------------- metrics

def confusion(prediction, target, classes):
    """Pixel counts (C, C) int64, row = truth, column = prediction, on the tensors' own device.

    prediction: any shape, ints in 0..C-1.  target: the same shape, 0..C-1, or 255 = not counted.
    """
    cell = target.long() * classes + prediction.long()
    cell = cell.masked_fill(target == VOID, classes * classes)          # one more bin, thrown away
    counts = torch.bincount(cell.flatten(), minlength=classes * classes + 1)
    return counts[:-1].view(classes, classes)


def class_iou(matrix):
    """IoU in percent, (C,) float64; NaN for a class that is in neither truth nor prediction."""
    m = matrix.cpu().double()                     # Apple GPUs have no float64
    return 100 * m.diag() / (m.sum(0) + m.sum(1) - m.diag())


def miou(matrix):
    """Mean IoU in percent over the classes that occur in truth or prediction; NaN if none does."""
    return class_iou(matrix).nanmean().item()


def constant_miou(matrix):
    """The miou, in percent, of the best answer that is one and the same class for every pixel."""
    pixels = matrix.sum(1).float()                # of each class that occurs: all but one score 0
    return (100 * pixels.max() / pixels.sum() / (pixels > 0).sum()).item()


def picture_iou(prediction, target, classes):
    """MaskSup's measure, (B,) float in percent; its paper_iou is the mean over the pictures.

    prediction, target: (B, H, W) ints. Two classes: the IoU of class 1, void (255) left out, 100
    where it is in neither. More: the IoU micro-averaged over the classes, that is pixels right
    over (pixels right + 2 x pixels wrong), void counted as class 0 as in the released code.
    """
    prediction, target = prediction.flatten(1), target.flatten(1)
    if classes == 2:
        both = ((prediction == 1) & (target == 1)).sum(1).float()
        either = (((prediction == 1) | (target == 1)) & (target != VOID)).sum(1)
        return 100 * torch.where(either > 0, both / either.clamp(min=1), 1.0)
    right = (prediction == target.masked_fill(target == VOID, 0)).sum(1)
    return 100 * right / (2 * target.shape[1] - right)


def nearest_fill(label, removed):
    """Give each removed pixel the label of the nearest kept one: what no learning would answer.

    label: (B, H, W) uint8, 255 = void.  removed: (B, H, W) bool.  Returns (B, H, W) uint8.
    Distance is Euclidean and exact; void is not a label, so only kept pixels below 255 are sources
    (of equally near ones, the first found). With no source in a picture the answer is class 0.

    Exact in two passes: the nearest source within each row, then the best row. The second stops as
    soon as no farther row can win, after some 30 of 224 for patches of 16.
    """
    if label.device.type == "mps":                    # has no cummax of integers
        return nearest_fill(label.cpu(), removed.cpu()).to(label.device)
    _, H, W = label.shape
    far = 2 * (H + W)                                 # farther than any pixel
    source = ~removed & (label != VOID)
    x = torch.arange(W, device=label.device, dtype=torch.int32)
    left = torch.where(source, x, -far).cummax(-1).values
    right = torch.where(source, x, far).flip(-1).cummin(-1).values.flip(-1)
    column = torch.where(x - left <= right - x, left, right)
    row_d2 = (column - x).square().clamp(max=far * far)
    row_label = label.gather(-1, column.clamp(0, W - 1).long())
    row_label = row_label.masked_fill(row_d2 >= far * far // 4, 0)
    best_d2, best = row_d2.clone(), row_label.clone()
    for k in range(1, H):
        if not (best_d2[removed] > k * k).any():
            break
        for to, frm in (slice(k, None), slice(None, -k)), (slice(None, -k), slice(k, None)):
            d2 = row_d2[:, frm] + k * k
            closer = d2 < best_d2[:, to]
            best_d2[:, to] = torch.where(closer, d2, best_d2[:, to])
            best[:, to] = torch.where(closer, row_label[:, frm], best[:, to])
    return torch.where(removed, best, label)


# -------------------------------------------------------------------------------------- run folder

def write(path, content):
    """Write text or bytes beside path, then move it there: a reader never sees half a file."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            file.write(content.encode("utf-8", "surrogateescape")       # as names of files are
                       if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)        # the room it takes may be what the others lack
        raise UserError(f"cannot write {path}: {error.strerror or error}; make room or write "
                        "elsewhere") from None


def save_checkpoint(path, state):
    """torch.save by way of write(): killed at any moment, the last whole one is still there."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write(path, buffer.getbuffer())


def load_checkpoint(path, method, device="cpu"):
    """Read a checkpoint of `method`, running no code in it. Raises UserError if it is none."""
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"no checkpoint {path}; train first, or give another path") from None
    except Exception as error:
        reason = (str(error).strip() or "it ends too early").splitlines()[0]
        raise UserError(f"{path} cannot be read as a whole checkpoint ({reason[:80]}); take "
                        "another one") from None
    found = state.get("method") if isinstance(state, dict) and "model" in state else None
    if found != method:
        raise UserError(f"{path} is a checkpoint of {found or 'something else'}, not of {method}")
    return state


def load_weights(model, path, method, may_lack=()):
    """Copy a checkpoint's weights into the model. Raises UserError if they do not fit it.

    may_lack: what begins with this may be in one of the two only, and is then left as it is; ():
    nothing may.
    """
    mine, theirs = model.state_dict(), load_checkpoint(path, method)["model"]
    theirs = {k: v for k, v in theirs.items() if k in mine or not k.startswith(may_lack)}
    theirs |= {k: v for k, v in mine.items() if k not in theirs and k.startswith(may_lack)}
    try:
        model.load_state_dict(theirs)
    except RuntimeError as error:
        line = " ".join(str(error).split("\n\t")[1:2]) or "other weights"
        raise UserError(f"--init {path} does not fit this model ({line}); build the model "
                        "with the classes and flags that it was trained with") from None


RUN_FILES = ("config.json", "last.pt", "best.pt", "pretrain.pt", "log.csv", "curves.png",
             "samples.png", "step.png", "labeled.txt", "metrics.json", "robustness.png",
             "augment.json")
# fields that may change when a run goes on: where it runs and how far, not what it computes
MAY_DIFFER = {"root", "out", "workers", "device", "compile", "resume", "max_steps"}


def refuse_run(out, what="a run: --resume goes on with it, --out DIR starts another"):
    """Raises UserError if the folder holds a run, or what may be one: none is overwritten."""
    if found := [name for name in RUN_FILES if (Path(out) / name).exists()]:
        raise UserError(f"{out} already holds {what} ({found[0]} is there)")


def refuse_results(out):
    """Raises UserError if the folder holds a run, or results of an evaluation."""
    refuse_run(out, "a run, or results: give another folder with --out DIR")


def result_folders(paths, out):
    """{checkpoint: folder for its results}: OUT, or of several OUT/RUN-CHECKPOINT.

    Raises UserError if two are called the same, or if one or OUT holds a run or results.
    """
    refuse_results(out)
    if len(paths) == 1:
        return {paths[0]: out}
    folders = {}
    for path in paths:
        folder = out / f"{Path(path).resolve().parent.name}-{Path(path).stem}"
        if folder in folders.values():
            raise UserError(f"--eval {path}: another one is called {folder.name} too: rename its "
                            "folder")
        refuse_results(folder)
        folders[path] = folder
    return folders


def open_run(cfg, method, machine, info, pictures, may_differ=()):
    """Make the run folder OUT, or with --resume go on in it: returns the state in OUT/last.pt.

    None if there is none yet. A folder that holds a run is never overwritten, and no run goes on
    under another configuration (but for the fields may_differ), other classes, or other training
    pictures (a hash of their names), or from weights alone. Raises UserError with the difference.
    """
    last, config = Path(cfg.out) / "last.pt", Path(cfg.out) / "config.json"
    mine = dataclasses.asdict(cfg)
    if not cfg.resume:
        if machine.main:
            refuse_run(cfg.out)
            write(config, json.dumps(mine, indent=1) + "\n")
        return None
    if not config.exists():
        raise UserError(f"--resume: no run in {cfg.out}; leave --resume out to start one, or "
                        "name the run by --out")
    try:
        theirs = json.loads(config.read_text("utf-8"))
        if not isinstance(theirs, dict) or theirs.keys() != mine.keys():
            raise ValueError("its fields are others")
    except ValueError as error:                         # what json and utf-8 raise are ValueErrors
        raise UserError(f"--resume: {config} is not of a run of this {method}.py ({error}); "
                        "give another --out") from None
    differ = [f"{k} was {theirs.get(k)}, now {v}" for k, v in json.loads(json.dumps(mine)).items()
              if k not in MAY_DIFFER | set(may_differ) and theirs.get(k) != v]
    if differ:
        raise UserError(f"--resume: {cfg.out} holds another configuration ({'; '.join(differ)}); "
                        "give the flags it was started with, or another --out")
    if not last.exists():
        return None
    state = load_checkpoint(last, method)
    if "optimizer" not in state:
        raise UserError(f"--resume: {last} has weights only, as best.pt: start another run, with "
                        f"--init {last}")
    same_data(cfg, state, info, pictures)
    return state


def same_data(cfg, state, info, pictures):
    """Raises UserError if the state is not of a run on these classes and training pictures."""
    if "pictures" not in state:
        raise UserError(f"--resume: {cfg.out} was begun by another version of this script; give "
                        "another --out")
    for what, was, now in (("classes", tuple(state["info"]["classes"]), info.classes),
                           ("training pictures", state["pictures"], pictures)):
        if was != now:
            raise UserError(f"--resume: {cfg.data} has other {what} than {cfg.out} was begun with "
                            f"({was}, now {now}); bring them back, or give another --out")


def refuse_past(cfg, start, stop, history):
    """Raises UserError if a run that goes on has nothing to do, and no scores of where it is."""
    if start >= stop and (not history or history[-1]["step"] < start):
        raise UserError(f"--resume: {cfg.out} is at step {start} already, beyond --max-steps or "
                        "--epochs; give more")


def write_history(out, history):
    """log.csv and curves.png, whole, out of the rows (dicts) that the checkpoint carries: if there
    are any, that is, if the run has got to an evaluation."""
    if not history:
        return
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(history[0]), lineterminator="\n")
    writer.writeheader()
    for row in history:
        writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
    write(Path(out) / "log.csv", text.getvalue())
    draw_curves(history, Path(out) / "curves.png")


def clean(value):
    """Numbers as JSON has them: NaN becomes null, floats keep four decimals."""
    if isinstance(value, dict):
        return {k: clean(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [clean(v) for v in value]
    if isinstance(value, float):
        return round(value, 4) if math.isfinite(value) else None
    return value


class Progress:
    """One line that rewrites itself on a terminal; elsewhere only the lines given to say()."""

    def __init__(self, start, stop, batch, quiet=False):
        self.first, self.stop, self.batch, self.began = start, stop, batch, time.time()
        self.live = sys.stdout.isatty() and not quiet
        self.quiet = quiet

    def step(self, step, loss):
        """loss: a float, so call this only at steps that may wait for the device."""
        if self.live:
            done, spent = step + 1 - self.first, time.time() - self.began
            left = spent / done * (self.stop - step - 1)
            print(f"\r\033[Kstep {step + 1}/{self.stop}  loss {loss:.4f}  "
                  f"{done * self.batch / spent:.0f} img/s  "
                  f"{int(left // 60)}:{int(left % 60):02d} left", end="", flush=True)

    def say(self, line):
        if not self.quiet:
            print(("\r\033[K" if self.live else "") + line, flush=True)


class Losses:
    """The loss terms of the steps since the last evaluation, on the device until looked at.

    Looking waits for the device, so it is done every LOOK steps, and before a checkpoint is saved:
    none is saved after a loss, or with a weight or buffer, that is not finite.
    """

    def __init__(self, out):
        self.out, self.terms, self.last = out, [], math.nan
        self.unseen, self.drawn = [], {}        # the losses not looked at; by step, its batches

    def add(self, step, terms, *batches):
        """terms: float (n,), the whole loss first. batches: pairs (Dataset, indices (B,)), whose
        files are named if that loss is not finite."""
        self.terms.append(terms)
        self.unseen.append(terms[0])
        self.drawn[step + 1] = batches

    def look(self, *modules):
        """The last loss, a float. Raises UserError, with the step and the files of its batch, if
        one added since the last look is not finite, or a weight or buffer of the modules is not.
        """
        if self.unseen:
            steps, losses = list(self.drawn), torch.stack(self.unseen).tolist()
            for step, self.last in zip(steps[-len(losses):], losses):
                if not math.isfinite(self.last):
                    self.fail(step, f"the loss is {self.last}")
            self.drawn, self.unseen = {steps[-1]: self.drawn[steps[-1]]}, []
        weights = [t.isfinite().all() for m in modules for t in m.state_dict().values()]
        if weights and not torch.stack(weights).all():
            self.fail(max(self.drawn), "weights that are not finite are left")
        return self.last

    def mean(self):
        """The mean of each term since the last call, n floats."""
        terms, self.terms = torch.stack(self.terms).mean(0).tolist(), []
        return terms

    def fail(self, step, what):
        files = [name for dataset, index in self.drawn[step] for name in dataset.files(index)]
        raise UserError(f"step {step}: {what}, after the batch {', '.join(files)}; {self.out} is "
                        "as it was saved before: look at these files, or start another run, "
                        "with another --out, perhaps by --init, and a lower --lr or --amp off")


class Interrupt:
    """Turns the first Ctrl-C, or a polite kill, into a question to ask between steps: what is
    saved is a whole step. Under torchrun the processes agree on it, every LOOK steps."""

    def __init__(self, machine):
        self.machine, self.asked = machine, False
        signal.signal(signal.SIGINT, self.catch)
        if machine.world == 1:              # torchrun sends it when one process of it has failed
            signal.signal(signal.SIGTERM, self.catch)

    def catch(self, number, _):
        self.asked = True
        if self.machine.world == 1:         # a second one ends it at once
            signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else
                          signal.default_int_handler)

    def due(self, step):
        """Whether to save after this step and to end: the same answer in all processes, so under
        torchrun only every LOOK steps."""
        if self.machine.world == 1:
            return self.asked
        if step % LOOK:
            return False
        asked = torch.tensor(float(self.asked), device=self.machine.device)
        dist.all_reduce(asked)
        return asked.item() > 0

    def end(self, progress, what):
        """Say how to go on, and leave, once the first process has saved."""
        progress.say(f"stopped after {what}: the same command with --resume goes on")
        if self.machine.world > 1:
            dist.barrier()
        sys.exit(130)


# ------------------------------------------------------------------------------------------- bench

def macs(model, *inputs):
    """Multiply-adds (1e9) of model(*inputs), counted by torch in the products it really does."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*inputs)
    return counter.get_total_flops() / 2e9                          # a multiply-add is two FLOPs


def time_steps(step, n, batch, device):
    """Call step(i) n times after two to warm up: {ms_per_step, img_per_s, peak_mb}."""
    sync = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device.type, bool)
    for i in range(2):
        step(i)
    sync()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    for i in range(n):
        step(i)
    sync()
    seconds = (time.perf_counter() - began) / n
    return {"ms_per_step": round(1000 * seconds, 2), "img_per_s": round(batch / seconds, 1),
            "peak_mb": peak_mb(device)}


def peak_mb(device):
    """Peak MiB: of the allocator on CUDA, of the whole process elsewhere, None on Windows."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated() / 2**20)
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10))


# ---------------------------------------------------------------------------------------- pictures

def colorize(label, colors):
    """(H, W) uint8 class indices -> (H, W, 3) uint8 by the C colours; the rest is light grey."""
    table = np.full((256, 3), 200, np.uint8)
    table[:len(colors)] = colors
    return table[np.asarray(label)]


def overlay(image, label, colors, share=0.55):
    """The picture with its labels laid over it; void stays the picture. Shapes as colorize()."""
    mixed = np.asarray(image) * (1 - share) + colorize(label, colors) * share
    return np.where((np.asarray(label) == VOID)[..., None], image, mixed).astype(np.uint8)


def save_image(path, array, palette=None):
    """Write uint8 (H, W) or (H, W, 3) as PNG, an indexed one given a palette (a flat list)."""
    image = Image.fromarray(np.ascontiguousarray(array))
    if palette is not None:
        image.putpalette(palette + [0] * (768 - len(palette)))  # a short one would cut higher ids
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    write(path, buffer.getbuffer())


def font(size):
    return ImageFont.load_default(size)


def sheet(rows, path, titles=None, tile=160):
    """A contact sheet: rows of uint8 (H, W, 3) pictures, a title before each row, as one PNG.

    Pictures smaller than `tile` pixels on their long side are enlarged by whole steps, so that the
    patches stay square; all the pictures of a column share its width.
    """
    gap, names = 4, titles or [""] * len(rows)
    rows = [[enlarge(p, max(1, tile // max(p.shape[:2]))) for p in row] for row in rows]
    margin = gap + max(int(font(14).getlength(t)) for t in names) + (gap if titles else 0)
    widths = [max(r[i].shape[1] for r in rows if i < len(r)) for i in range(max(map(len, rows)))]
    heights = [max(p.shape[0] for p in row) for row in rows]
    canvas = Image.new("RGB", (margin + sum(widths) + gap * len(widths),
                               gap + sum(heights) + gap * len(heights)), "white")
    draw, y = ImageDraw.Draw(canvas), gap
    for row, name, height in zip(rows, names, heights):
        draw.text((gap, y + height // 2 - 8), name, "black", font(14))
        x = margin
        for picture, width in zip(row, widths):
            canvas.paste(Image.fromarray(picture), (x, y))
            x += width + gap
        y += height + gap
    save_image(path, np.asarray(canvas))


def enlarge(picture, k):
    return np.ascontiguousarray(picture.repeat(k, 0).repeat(k, 1))


LINES = [(31, 90, 170), (200, 60, 30), (40, 140, 70), (140, 70, 160), (120, 120, 120),
         (190, 140, 20), (20, 170, 180)]


def draw_curves(history, path):
    """Line plots of a history: the losses in one panel, what is in percent in the other."""
    W, H = 480, 340
    canvas = Image.new("RGB", (2 * W, H), "white")
    for i, word in enumerate(("loss", "iou")):
        keys = [key for key in history[0] if word in key]
        box = (i * W + 46, 14 + 16 * len(keys), (i + 1) * W - 14, H - 28)
        draw_panel(ImageDraw.Draw(canvas), box, [row["step"] for row in history],
                   {key: [row[key] for row in history] for key in keys})
    save_image(path, np.asarray(canvas))


def draw_lines(xs, series, path, title):
    """One panel as a PNG: a line per series {name: values} over xs, and a title below."""
    W, H = 560, 380
    canvas = Image.new("RGB", (W, H), "white")
    draw = ImageDraw.Draw(canvas)
    draw_panel(draw, (50, 20 + 16 * len(series), W - 16, H - 48), xs, series,
               {x: f"{x:g}" for x in xs})
    draw.text((W // 2, H - 14), title, "black", font(12), anchor="mm")
    save_image(path, np.asarray(canvas))


def draw_panel(draw, box, xs, series, ticks=None):
    """One panel in box (left, top, right, bottom): a line per series, its last value above. ticks:
    {x: text}, else the first step and the last."""
    left, top, right, bottom = box
    finite = [v for values in series.values() for v in values if math.isfinite(v)] or [0.0]
    low, high = min(finite), max(max(finite), min(finite) + 1e-6)
    for i in range(5):
        y = bottom - (bottom - top) * i / 4
        draw.line((left, y, right, y), (222, 222, 222))
        value = low + (high - low) * i / 4
        draw.text((left - 4, y), f"{value:.3g}", "black", font(11), anchor="rm")
    across = (right - left) / ((xs[-1] - xs[0]) or 1)
    for x, text in (ticks or {xs[0]: f"step {xs[0]}", xs[-1]: str(xs[-1])}).items():
        anchor = "lm" if x == xs[0] else "rm" if x == xs[-1] else "mm"
        draw.text((left + across * (x - xs[0]), bottom + 12), text, "black", font(11),
                  anchor=anchor)
    for i, (name, values) in enumerate(series.items()):
        color = LINES[i % len(LINES)]
        points = [(left + across * (a - xs[0]),
                   bottom - (bottom - top) * (v - low) / (high - low))
                  for a, v in zip(xs, values) if math.isfinite(v)]
        draw.line(points, color, 2)
        for x, y in points if ticks else ():
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), color)
        above = top - 10 - 16 * (len(series) - 1 - i)
        draw.text((left + 4, above), f"{name} {values[-1]:.4g}", color, font(12), anchor="lm")
