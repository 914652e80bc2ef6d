"""Command-line flags from a frozen dataclass: type, default and help of a flag are one field.

    @dataclass(frozen=True)
    class Options:
        checkpoint: tuple[str, ...] = flag((), "checkpoint files")            # several values
        limit: int | None = flag(None, "number of images", at_least=1)
        precision: str = flag("auto", "of the encoder", choices=("auto", "bf16", "fp32"))
        k: tuple[int, ...] = flag((10, 20), "numbers of neighbors", only_for=("knn",))

    opt = parse_flags(Options, argv, description=__doc__)
"""
import argparse
import dataclasses
import math
import types
import typing

from lib import config


def flag(default, help, choices=None, at_least=None, only_for=(), group=None):
    """A field of a dataclass of flags.

    default: None and () mean "not given". A bool is a switch without a value. at_least: the
    smallest number allowed. only_for: names of the tasks that use the flag; (): all of them.
    group: title of its section in --help.
    """
    return dataclasses.field(default=default, metadata=dict(
        help=help, choices=choices, at_least=at_least, only_for=tuple(only_for), group=group))


def parse_flags(cls, argv=None, description="", epilog=""):
    """The dataclass `cls` filled from the command line (None: sys.argv).

    Errors are printed to stderr, with exit code 2. The error about an unknown flag names the
    nearest known one.
    """
    parser = config.Parser(description=description, epilog=epilog, allow_abbrev=False,
                           formatter_class=argparse.RawDescriptionHelpFormatter)
    hints, groups = typing.get_type_hints(cls), {}
    for field in dataclasses.fields(cls):
        title = field.metadata["group"]
        if title and title not in groups:
            groups[title] = parser.add_argument_group(title)
        groups.get(title, parser).add_argument(config.flag(field.name),
                                               **arguments(field, hints[field.name]))
    values = vars(parser.parse_args(argv))
    return cls(**{name: tuple(value) if isinstance(value, list) else value
                  for name, value in values.items()})


def arguments(field, hint):
    """Keyword arguments of argparse's add_argument for a field with this type hint."""
    kind, several = value_type(hint)
    info, default = field.metadata, field.default
    text = f"{', '.join(info['only_for'])}: {info['help']}" if info["only_for"] else info["help"]
    if default not in (None, (), "") and kind is not bool:
        shown = " ".join(map(str, default)) if several else default
        text += f" [{shown}]"
    keywords = dict(default=default, help=text.replace("%", "%%"))
    if kind is bool:
        return keywords | dict(action="store_true")
    if several:
        keywords["nargs"] = "+"
    if info["choices"]:
        return keywords | dict(choices=info["choices"])
    if kind in (int, float):
        kind = number_from(kind, info["at_least"])
    return keywords | dict(type=kind, metavar=field.name.upper())


def value_type(hint):
    """int | None -> (int, False); tuple[int, ...] -> (int, True)."""
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0], True
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        [hint] = [kind for kind in typing.get_args(hint) if kind is not types.NoneType]
    return hint, False


def number_from(kind, minimum=None):
    """A function that converts the text of a flag to a finite int or float of at least `minimum`
    (None: any)."""
    def convert(text):
        try:
            number = kind(text)
        except ValueError:
            number = math.nan
        if not math.isfinite(number) or minimum is not None and number < minimum:
            bound = "" if minimum is None else f" of at least {minimum}"
            raise argparse.ArgumentTypeError(
                f"expected {'an integer' if kind is int else 'a number'}{bound}, not {text!r}")
        return number
    return convert


def refuse_unused(opt, tasks):
    """ValueError for a flag that was given although none of the tasks uses it."""
    for field in dataclasses.fields(opt):
        users = field.metadata["only_for"]
        if users and not set(tasks) & set(users) and getattr(opt, field.name) != field.default:
            many = len(tasks) > 3
            raise ValueError(
                f"{config.flag(field.name)} is for {', '.join(users)} only: leave it out" if many
                else f"{' and '.join(tasks)} {'does' if len(tasks) == 1 else 'do'} not use "
                     f"{config.flag(field.name)}: leave it out")
