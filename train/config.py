"""Flags and run files -> the frozen groups of `train/args/`; `--help` and the checks come from their fields.

A value is taken from, last wins: the field's default, the `_base_` files of a run file, the run file (`--config run.yaml`, any
flag by its name), the command line. All flags of the published trainers are here, with their names and, but for the exceptions in
`train/published.py`, their defaults; both `--a_b` and `--a-b` work, booleans take `True` / `False` or stand alone. In: argv. Out:
`Args`.
"""

import argparse
import difflib
import math
import os
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

import yaml

from data.run_file import run_file_lines
from train.args import GROUPS, Args
from train.published import implied_values, refuse_unbuilt, spelled_out


@dataclass(frozen=True, slots=True)
class _Flag:
    """One row of the flag table: where its value goes and what it may be."""

    group: str
    type: Any
    field: Field[Any]

    @property
    def optional(self) -> bool:
        return type(None) in get_args(self.type)

    @property
    def plain(self) -> Any:
        """The type without `| None`."""
        if get_origin(self.type) in (Union, types.UnionType):
            return next(t for t in get_args(self.type) if t is not type(None))
        return self.type

    @property
    def kind(self) -> str:
        choices = get_args(self.plain) if get_origin(self.plain) is Literal else ()
        return "|".join(choices) if choices else {str: "text"}.get(self.plain, self.plain.__name__)


def _flag_table() -> dict[str, _Flag]:
    table = {}
    for group, group_class in GROUPS.items():
        hints = get_type_hints(group_class)
        table.update({f.name: _Flag(group, hints[f.name], f) for f in fields(group_class)})
    return table


BOOLEANS = {
    **dict.fromkeys(("true", "t", "yes", "y", "1", "on"), True),
    **dict.fromkeys(("false", "f", "no", "n", "0", "off"), False),
}
"""Words for booleans, as the published trainers take them."""

FLAGS = _flag_table()
"""Flag -> its row, in the order of `--help`."""


def parse_args(argv: Sequence[str] | None = None, about: Callable[[Args], str] = lambda args: "") -> Args:
    """Command line -> arguments. `--help` and `--print_config` print and end the program.

    Args:
        argv: without the program's name; None: the process's own.
        about: what `--print_config` adds to the flags, as YAML comments.

    Raises:
        ValueError: naming the flag or the file and key that is wrong, and the nearest one that exists.
    """
    words = [_flag_word(word) for word in (sys.argv[1:] if argv is None else argv)]
    known, unknown = _parser().parse_known_args(words)
    if unknown:
        raise ValueError(
            f"unknown argument {unknown[0]}{_nearest(unknown[0].lstrip('-').partition('=')[0], '--')}"
        )
    given = vars(known)
    print_config, run_file = given.pop("print_config"), given.pop("config")
    of_file = read_run_file(Path(run_file)) if run_file else {}
    if given.pop("strict_config"):
        _require_complete(of_file, run_file)
    values = {**of_file, **given}
    args = build_args(values)
    if print_config:
        comment = "".join(f"# {line}\n" for line in about(args).splitlines())
        sys.stdout.write(
            yaml.safe_dump(args.flat(), sort_keys=False) + comment
        )  # one write: ranks share the screen
        raise SystemExit(0)
    if not args.data.dataset_config_file:
        raise ValueError("--dataset_config_file is required: the YAML file that says what to train on")
    return args


def build_args(values: Mapping[str, Any]) -> Args:
    """Values by flag name -> checked arguments; what is not named keeps its default.

    Raises:
        ValueError: for a value out of range, or two that do not go together.
    """
    values = {**values, **implied_values(values)}
    for name, value in values.items():
        low, high = FLAGS[name].field.metadata["low"], FLAGS[name].field.metadata["high"]
        if isinstance(value, int | float) and not low <= value <= high:
            limits = f"from {low:g} to {high:g}"
            if math.isinf(low) or math.isinf(high):
                limits = f"at most {high:g}" if math.isinf(low) else f"at least {low:g}"
            raise ValueError(f"--{name} {value} must be {limits}")
    groups = {
        group: group_class(**{n: v for n, v in values.items() if FLAGS[n].group == group})
        for group, group_class in GROUPS.items()
    }
    args = Args(**groups)
    _require_consistent(args)
    refuse_unbuilt(args.flat())
    return args


def _require_complete(values: Mapping[str, Any], run_file: str | None) -> None:
    if not run_file:
        raise ValueError("--strict_config needs --config FILE: the file in which every flag has to stand")
    if missing := [name for name in FLAGS if name not in values]:
        raise ValueError(
            f"--strict_config: {run_file} (with what it inherits) lacks {len(missing)} of {len(FLAGS)} keys: "
            f"{', '.join(missing)}; --print_config prints a whole file"
        )


def read_run_file(path: Path) -> dict[str, Any]:
    """Flags of a run file, with those of its `_base_` files (relative to it) underneath.

    Raises:
        ValueError: if a file is missing or is no flat mapping of flags, or includes itself.
    """
    values: dict[str, Any] = {}
    for file, key, value in run_file_lines(path):
        name = key.replace("-", "_")
        if name not in FLAGS:
            raise ValueError(f"--config {file}: unknown key {key!r}{_nearest(name)}")
        try:
            values[name] = _convert(FLAGS[name], value)
        except ValueError as error:
            raise ValueError(f"--config {file}: {key}: {error}") from error
    return values


def _convert(row: _Flag, value: Any) -> Any:
    """A value as written (a word of the command line, or a YAML scalar) -> the flag's type."""
    kind = row.plain
    if row.optional and (value is None or value == "None"):
        return None
    if kind is bool:
        if isinstance(value, bool):
            return value
        if str(value).lower() in BOOLEANS:
            return BOOLEANS[str(value).lower()]
    elif isinstance(value, bool) or not isinstance(value, str | int | float):
        pass  # a list, a mapping, a yes/no: no flag is any of these
    elif get_origin(kind) is Literal:
        if value in get_args(kind):
            return value
    elif kind is str:
        return os.path.expanduser(str(value))
    else:
        try:
            number = _whole(value) if kind is int else kind(value)
        except (ValueError, OverflowError):
            number = math.nan
        if math.isfinite(number) and (isinstance(value, str) or number == value):
            return number
    raise ValueError(f"{value!r} is not {row.kind}")


def _whole(value: str | int | float) -> int:
    """A whole number, also as `1e3`; digits alone are never read as a float, which would round the long ones."""
    try:
        return int(value) if not isinstance(value, float) else _integral(value)
    except ValueError:
        return _integral(float(value))


def _integral(value: float) -> int:
    if value != int(value):
        raise ValueError(f"{value} is not whole")
    return int(value)


_OTHER_WORDS = {
    "help": None,
    "config": None,
    "strict_config": None,
    "print_config": None,
    **{f"no_{n}": r for n, r in FLAGS.items()},
}
"""What may follow `--` besides the flags."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see --help)")


class _Store(argparse.Action):
    """Converts by the flag's row, so that the command line and run files agree on every type."""

    def __call__(self, parser, namespace, value, option_string=None):  # type: ignore[no-untyped-def]
        if option_string and option_string.startswith("--no_"):
            value = "False"
        elif value is None:  # a boolean that stands alone
            value = "True"
        try:
            setattr(namespace, self.dest, _convert(FLAGS[self.dest], value))
        except ValueError as error:
            raise ValueError(f"{option_string} {error}") from error


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="train/main.py",
        allow_abbrev=False,  # see `train.published.spelled_out`
        usage="torchrun --standalone --nproc_per_node=N %(prog)s --dataset_config_file FILE [--config FILE] [--flag value ...]",
        description="Train one model that reads, answers, draws, points and segments.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=40, width=120),
    )
    parser.add_argument(
        "--config", metavar="FILE", help="YAML file with any of the flags below; `_base_: FILE` inherits."
    )
    parser.add_argument(
        "--strict_config",
        action="store_true",
        help="Every flag has to stand in the file of --config or in what it inherits: no default counts but its own words.",
    )
    parser.add_argument("--print_config", action="store_true", help="Print every value in force and stop.")
    for group, group_class in GROUPS.items():
        section = parser.add_argument_group(group_class.__doc__.rstrip("."))
        for name, row in FLAGS.items():
            if row.group == group:
                _add(section, name, row)
    return parser


def _add(section: Any, name: str, row: _Flag) -> None:
    is_switch = row.plain is bool
    default = row.field.default
    shown = "" if default in ("", MISSING) else f" [{default}]"
    section.add_argument(
        f"--{name}",
        dest=name,
        action=_Store,
        default=argparse.SUPPRESS,
        nargs="?" if is_switch else None,
        metavar=row.kind,
        help=(row.field.metadata["help"] + shown).replace("%", "%%"),
    )
    if is_switch:
        section.add_argument(
            f"--no_{name}",
            dest=name,
            action=_Store,
            nargs=0,
            default=argparse.SUPPRESS,
            help=argparse.SUPPRESS,
        )


def _flag_word(word: str) -> str:
    """`--a-b=c-d` -> `--a_b=c-d`, with the flag's name in full."""
    if not word.startswith("--"):
        return word
    name, equals, value = word[2:].partition("=")
    return f"--{spelled_out(name.replace('-', '_'), _OTHER_WORDS | FLAGS)}{equals}{value}"


def _nearest(name: str, prefix: str = "") -> str:
    close = difflib.get_close_matches(name.replace("-", "_"), FLAGS, n=1)
    return f"; did you mean {prefix}{close[0]}?" if close else ""


def _require_consistent(args: Args) -> None:
    profiled = args.train.profiled
    if args.train.memory_snapshot and profiled is None:
        raise ValueError("--memory_snapshot needs --profile_steps A:B: the steps to record")
    data, optim, checkpoint = args.data, args.optim, args.checkpoint
    if data.expected_num_tokens > data.max_num_tokens:
        raise ValueError(
            f"--expected_num_tokens {data.expected_num_tokens} is more than --max_num_tokens {data.max_num_tokens}; "
            "a pack could never be full"
        )
    if data.num_workers and data.worker_timeout_s >= args.train.dist_timeout_s:
        raise ValueError(
            f"--worker_timeout_s {data.worker_timeout_s:g} is not below --dist_timeout_s {args.train.dist_timeout_s:g}: over a "
            "data worker that hangs, the other ranks would give up first and nothing would be saved; lower it"
        )
    if optim.lr_scheduler == "cosine" and optim.warmup_steps >= optim.total_steps:
        raise ValueError(
            f"--warmup_steps {optim.warmup_steps} leaves nothing of --total_steps {optim.total_steps} for the cosine"
        )
    if optim.lr_scheduler == "wsd" and optim.warmup_steps > optim.decay_begins:
        raise ValueError(
            f"--warmup_steps {optim.warmup_steps} is longer than the {max(0, optim.decay_begins)} of --total_steps "
            f"{optim.total_steps} before the decay of --lr_scheduler wsd; lower it, or --decay_steps"
        )
    if optim.decay_steps is not None and optim.lr_scheduler != "wsd":
        raise ValueError(
            f"--decay_steps {optim.decay_steps} is for --lr_scheduler wsd, not {optim.lr_scheduler}"
        )
    if optim.lr_scheduler != "constant" and optim.min_lr > optim.lr:
        raise ValueError(f"--min_lr {optim.min_lr} is above --lr {optim.lr}")
    if checkpoint.resume_model_only and checkpoint.resume_from is None:
        raise ValueError("--resume_model_only needs --resume_from: the checkpoint to take the weights from")
    if args.model.finetune_from_hf and (other := args.model.llm_path or args.model.vit_path):
        raise ValueError(
            f"--finetune_from_hf True takes the model of --model_path {args.model.model_path}; {other} (--llm_path, --vit_path) "
            "would not be used: leave one of the two out"
        )
    if checkpoint.resume_model_only and args.model.vit_path and not args.model.llm_path:
        raise ValueError(
            "--vit_path with --resume_model_only: the checkpoint has a vision tower of its own; leave one of the two out"
        )
    if args.fsdp.use_flex and args.fsdp.attention not in ("auto", "flex"):
        raise ValueError(f"--use_flex means --attention flex, but --attention {args.fsdp.attention} is given")
