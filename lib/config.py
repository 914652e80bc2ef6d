"""Settings of a run. Each source overrides those before it: the dataclass, the data set's section
in configs/METHOD.yaml, with --resume the run's config.yaml, --config FILE, the command line.

    @dataclass
    class Config(config.Settings):
        img_size: Size = 224           # pixels (paper): this comment is the help of --img-size
        mask_ratio: Fraction = 0.75    # fraction of the patches that are masked (paper)
        pos: Literal["learned", "none"] = "learned"      # positions (paper: learned)

    cfg = config.parse(Config)         # cfg.img_size, ...; cfg.origin: which source set what
    config.main(main)                  # runs a script; a user error is one line, exit code 2
"""
import argparse
import dataclasses
import difflib
import inspect
import math
import os
import re
import sys
import typing
from pathlib import Path

import torch
import torch.distributed as dist
import yaml

from lib import distributed

# Types of settings with their bounds. Any other int or float must be 0 or more.
Size = typing.Annotated[int, (1, math.inf)]
Several = typing.Annotated[int, (2, math.inf)]
Fraction = typing.Annotated[float, (0, 1)]
Positive = typing.Annotated[float, (math.ulp(0), math.inf)]

CONFIGS = Path(__file__).parent.parent / "configs"
# The section for data sets that have none in configs/METHOD.yaml. Every name that is not listed
# here, such as pets or a folder of images, takes imagenet100's.
FALLBACK_SECTIONS = {"toy-scenes": "toy", "synthetic": "toy", "cifar100": "cifar10",
                     "stl10": "cifar10"}


@dataclasses.dataclass
class Settings:
    """The settings of every method. Each method's Config adds its own."""
    data: str = "toy"            # data set (docs/datasets.md lists them), or a folder of images
    data_root: str = ""          # folder with the data sets; default: $DATA_ROOT, else datasets/
    out: str = ""                # folder of this run; default: out/METHOD-DATA
    init_from: str = ""          # checkpoint file whose weights the run starts from
    normalization: typing.Literal["auto", "imagenet", "0.5"] = "auto"  # of the input of the network
                                 # in that file; auto: as the file says, else as published
    resume: bool = False         # continue from the last checkpoint in the run's folder
    seed: int = 0                # seed of all random numbers
    steps: int = 0               # optimizer steps of the run; 0: as many as --epochs gives
    accum_iter: Size = 1         # micro-batches per step, to save memory; not every method can
    workers: int = 2             # DataLoader workers, which decode images, per training process
    device: str = "auto"         # cuda, cuda:1 or cpu; auto: cuda if available
    precision: str = "auto"      # bf16 or fp32; auto: bf16 where the hardware has it
    compile: bool = False        # use torch.compile, after the first step without an evaluation
    section: str = ""            # section of configs/METHOD.yaml; default: that of the data set
    config: str = ""             # YAML file whose settings override the section
    log_every: Size = 10         # steps between log lines
    save_every: float = 5.0      # minutes between checkpoints; 0: after every step
    evals: int = 10              # number of evaluations (kNN accuracy, visualization) per run
    tensorboard: bool = False    # also write TensorBoard files (pip install tensorboard)

    paper_data: typing.ClassVar[str] = "imagenet"        # section with the paper's settings


# --------------------------------------------------------------------------------------------------
# Fields and values


def fields(cls):
    """{name: (type, default, help)} of a Config: the help is the comment on the field's line and
    on lines below it that are only a comment, indented by 20 or more."""
    hints, comments = typing.get_type_hints(cls), {}
    for owner in [c for c in reversed(cls.__mro__) if dataclasses.is_dataclass(c)]:
        for line in inspect.getsource(owner).splitlines():
            if match := re.match(r"    (\w+):[^#]*#\s*(.+)", line):
                name, comments[match[1]] = match[1], match[2]
            elif match := re.match(r"\s{20,}#\s*(.+)", line):
                comments[name] += f" {match[1]}"
    methods_first = sorted(dataclasses.fields(cls),
                           key=lambda f: f.name in Settings.__annotations__)
    return {f.name: (hints[f.name], f.default, comments.get(f.name, "")) for f in methods_first}


def flag(name):
    return f"--{name.replace('_', '-')}"


def metavar(kind):
    """What --help shows for a value of this type."""
    if typing.get_origin(kind) is typing.Literal:
        return "|".join(typing.get_args(kind))
    return "float" if kind is tuple else kind.__name__


def check_bounds(cfg):
    """Raises ValueError for a number outside the bounds of its type (NaN is outside), for a value
    that is not one of the choices of a Literal, and for sizes that do not divide each other."""
    for name, hint in typing.get_type_hints(type(cfg), include_extras=True).items():
        low, high = getattr(hint, "__metadata__", [(0, math.inf)])[0]
        value = getattr(cfg, name)
        if type(value) in (int, float) and not low <= value <= high:
            lower = "above 0" if low == math.ulp(0) else f"{low} or more"
            upper = f" and at most {high}" if high < math.inf else ""
            raise ValueError(f"{flag(name)} must be {lower}{upper}, not {value}")
        if typing.get_origin(hint) is typing.Literal and value not in typing.get_args(hint):
            raise ValueError(f"{flag(name)} must be {' or '.join(typing.get_args(hint))}, not "
                             f"{value}")
    if cfg.normalization != "auto" and not cfg.init_from:
        raise ValueError("--normalization is of the network of --init-from: leave it out")
    for name in "drop_path", "beta2":
        if getattr(cfg, name, 0) == 1:
            raise ValueError(f"{flag(name)} must be below 1")
    for whole, part in (("img_size", "patch_size"), ("embed_dim", "num_heads"),
                        ("decoder_embed_dim", "decoder_num_heads")):
        if hasattr(cfg, part) and getattr(cfg, whole) % getattr(cfg, part):
            raise ValueError(f"{flag(whole)} {getattr(cfg, whole)} must be a multiple of "
                             f"{flag(part)} {getattr(cfg, part)}")
    for name in "embed_dim", "decoder_embed_dim":
        if getattr(cfg, "pos", "sincos").startswith("sincos") and getattr(cfg, name, 0) % 4:
            raise ValueError(f"{flag(name)} {getattr(cfg, name)} must be a multiple of 4, for the "
                             f"sine-cosine positions")


def convert(name, value, kind):
    """A YAML or command-line value, converted to the field's type: PyYAML reads 1e-6 as a string.
    Raises ValueError."""
    kind = str if typing.get_origin(kind) is typing.Literal else kind
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[str(value).lower()]
        if isinstance(value, bool):
            raise ValueError
        if kind is tuple:
            return tuple(float(v) for v in value)
        if kind is int and not re.fullmatch(r"-?\d+", str(value)):
            if not float(value).is_integer():                        # 1e3 is
                raise ValueError
            return int(float(value))
        if value is None:
            raise ValueError
        return expand_home(value) if kind is str else kind(value)
    except (ValueError, TypeError, KeyError, OverflowError):
        noun = {int: "a whole number", float: "a number", bool: "true or false",
                tuple: "numbers", str: "text"}[kind]
        hint = "; name the run's folder with --out" * (name == "resume")
        raise ValueError(f"{flag(name)} must be {noun}, not {value!r}{hint}") from None


def expand_home(value):
    """A path below ~, which the shell replaces neither in --data=~/photos nor in a YAML file."""
    return os.path.expanduser(value) if str(value).startswith("~/") else str(value)


def read_yaml(path):
    """The dict in a YAML file. Raises ValueError or FileNotFoundError."""
    try:
        content = yaml.safe_load(Path(path).read_text()) or {}
    except FileNotFoundError:
        raise FileNotFoundError(f"no config file {path}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not a text file in UTF-8") from None
    except yaml.YAMLError as e:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(e).split())}") from None
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise ValueError(f"{path} should contain lines of the form name: value")
    return content


def nearest(name, known):
    """The end of a message about an unknown name: the nearest known one, or all of them."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; known: {', '.join(known)}"


# --------------------------------------------------------------------------------------------------
# Command line


class Parser(argparse.ArgumentParser):
    """argparse that accepts two spellings of a flag (--img-size, --img_size) and names the known
    flag nearest to an unknown one. An error ends the process with exit code 2."""

    def parse_known_args(self, args=None, namespace=None):
        def hyphens(arg):
            if not arg.startswith("--"):
                return arg
            name, equals, value = arg.partition("=")
            return name.replace("_", "-") + equals + expand_home(value)

        args = sys.argv[1:] if args is None else args
        return super().parse_known_args([hyphens(str(arg)) for arg in args], namespace)

    def error(self, message):
        if found := re.search(r"unrecognized arguments: (--[\w-]+)", message):
            known = [o for a in self._actions for o in a.option_strings if o.startswith("--")]
            close = [name for name in known if name.startswith(f"{found[1]}-")]
            close += difflib.get_close_matches(found[1], known, n=1, cutoff=0.7)
            message = f"unknown flag {found[1]}" + (f"; did you mean {close[0]}?" if close else "")
        elif found := re.search(r"unrecognized arguments: (\S+)", message):
            message = f"{found[1]!r} does not belong to a flag"
        self.exit(2, f"error: {message} (--help lists all)\n")


def parse(cls, argv=None):
    """The settings of this run, an instance of `cls` (a Config).

    The sources and their order are given at the top of this file. A --config file has either
    settings, or sections of them like configs/METHOD.yaml. Settings below a key such as `base moby`
    are overridden only if --base is moby. The result also has method, sections (their names in
    configs/METHOD.yaml) and origin {name: source}. Raises ValueError for unknown keys (with the
    nearest known one) and for values of a wrong type or out of bounds."""
    method, known = Path(inspect.getfile(cls)).stem, fields(cls)
    legend = (f"[...]: default; configs/{method}.yaml overrides it for toy and other data sets.\n"
              "(paper), (code), (our choice): the value is from the paper, the official code, "
              "neither.\n")
    parser = Parser(f"python {method}.py", description=sys.modules[cls.__module__].__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
                    epilog=legend)
    for name, (kind, default, text) in known.items():
        many = {tuple: dict(nargs="+"), bool: dict(nargs="?", const=True)}.get(kind, {})
        parser.add_argument(flag(name), help=f"{text} [{default}]".replace("%", "%%"),
                            metavar=metavar(kind), **many)
    given = {k: v for k, v in vars(parser.parse_args(argv)).items() if v is not None}

    sections = read_yaml(CONFIGS / f"{method}.yaml")
    file = read_yaml(given["config"]) if "config" in given else {}
    has_sections = bool(set(file) & set(sections))
    for key in file.keys() - sections.keys() if has_sections else ():
        raise ValueError(f"{given['config']}: {key!r} is no section of configs/{method}.yaml; move "
                         f"it into a section, or give it as a flag")

    if file.get("method", method) != method:
        raise ValueError(f"{given['config']} has the settings of a run of {file['method']}, not of "
                         f"{method}")

    def read_file(section):
        settings = (file.get(section) or {}) if has_sections else file
        if not isinstance(settings, dict):
            raise ValueError(f"{given['config']}: section {section} should contain lines of the "
                             f"form name: value")
        return settings

    top = {**({} if has_sections else file), **given}
    dataset = str(top.get("data", "toy"))
    section = str(top.get("section") or (
        dataset if dataset in sections and dataset != "photos" else       # perhaps a folder's name
        FALLBACK_SECTIONS.get(dataset, "imagenet100")))
    out = Path(top.get("out") or f"out/{method}-{Path(dataset).resolve().name}").absolute()
    if Path.cwd() in out.parents:
        out = out.relative_to(Path.cwd())

    resume = convert("resume", {**read_file(section), **given}.get("resume", False), bool)
    earlier = read_yaml(out / "config.yaml") if resume and (out / "config.yaml").exists() else {}
    if earlier.pop("method", method) != method:
        raise ValueError(f"{out} is the folder of another method's run: resume it with that "
                         f"method's script, or choose another folder with --out")
    section = str(top.get("section") or earlier.get("section") or section)
    if section not in sections:
        raise ValueError(f"configs/{method}.yaml has no section {section!r}"
                         f"{nearest(section, sections)}")
    if has_sections and section not in file:
        raise ValueError(f"{given['config']} has no section {section}, only {', '.join(file)}: "
                         f"add it, or choose one with --section")
    file = read_file(section)
    chosen = {**(sections[section] or {}), **earlier, **file, **given}
    values, origin = {}, {}

    def override(settings, source):
        if "epochs" in settings and "steps" in values:   # of an earlier source: else they would win
            del values["steps"], origin["steps"]
        for name, value in settings.items():
            flag_name, _, choice = name.partition(" ")
            if isinstance(value, dict) and flag_name in known:
                if chosen.get(flag_name, known[flag_name][1]) == choice:
                    override(value, f"{source}, {name}")
                continue
            if name not in known:
                raise ValueError(f"unknown key {name!r} in {source}{nearest(name, known)}")
            try:
                values[name], origin[name] = convert(name, value, known[name][0]), source
            except ValueError as e:
                raise ValueError(f"{e} (from {source})" if source != "flags" else e) from None

    override(sections[section] or {}, f"configs/{method}.yaml [{section}]")
    override({k: v for k, v in earlier.items() if k not in known or
              convert(k, v, known[k][0]) != values.get(k, known[k][1])}, "the run to resume")
    if "epochs" in given and convert("steps", given.get("steps", 0), int):
        raise ValueError("--steps and --epochs both give the length of the run: leave out one")
    override({k: v for k, v in file.items() if k != "method"}, given.get("config"))
    override(given, "flags")
    cfg = cls(**{**values, "out": str(out), "section": section})
    for name in given.keys() & values.keys() - {"out"}:
        if getattr(cfg, name) != values[name]:                               # set by __post_init__
            raise ValueError(f"{flag(name)} {values[name]} does not go with the other settings, "
                             f"which make it {getattr(cfg, name)}: leave it out")
    cfg.method, cfg.sections, cfg.origin = method, list(sections), origin
    return cfg


def main(function):
    """Runs a script's main, and ends several processes together.

    A ValueError or OSError counts as a user error, as do a full GPU memory, a killed DataLoader
    worker, a failed torch.compile and a lost connection to another process: one line on stderr,
    exit code 2. Ctrl-C: one line, exit code 130. Any other exception is not caught. If $TRACEBACK
    is not empty, user errors are not caught either, so that Python prints the traceback. Characters
    that the terminal cannot print, as in the path of an image, are printed as escapes. Every line
    is written at once, also to a pipe."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):          # not in notebooks
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
    try:
        function()
    except (ValueError, OSError, RuntimeError) as e:
        if isinstance(e, torch.OutOfMemoryError):
            e = ("the GPU's memory is full: use a smaller --batch-size; in training perhaps "
                 "--accum-iter; in evaluate.py, where features fill it, --limit, one --feature, or "
                 "--device cpu")
        elif re.search(r"DataLoader worker \(pid", str(e)):     # killed, not an exception in it
            e = ("a DataLoader worker was killed (memory or /dev/shm full?): use fewer --workers; "
                 "training continues with --resume")
        elif re.search("Connection (reset|closed) by peer", str(e)) and dist.is_initialized():
            e = ("the connection to another process was lost: see its message, unless the network "
                 "failed")
        elif type(e).__module__.startswith(("torch._dynamo", "torch._inductor")):
            reason = " ".join(str(e).split("\n\n")[0].split())
            e = (f"torch.compile failed ({reason}); it needs a C++ compiler (g++, or that of "
                 f"$CXX), on a GPU also Triton; everything runs without --compile")
        elif isinstance(e, RuntimeError):
            raise
        if os.environ.get("TRACEBACK"):
            raise
        if str(e).startswith("Caught"):         # in a DataLoader worker: contains its traceback
            e = str(e).splitlines()[-1]
        print(f"error: {e}", file=sys.stderr, flush=True)
        end_process(2)
    except KeyboardInterrupt as stop:           # Ctrl-C
        print(str(stop) or "interrupted", file=sys.stderr, flush=True)
        end_process(130)
    distributed.exit_together()


def end_process(code):
    if dist.is_initialized():
        os._exit(code)                          # NCCL's cleanup would wait for the other processes
    sys.exit(code)
