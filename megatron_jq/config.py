"""F1: a run's settings from flags and TOML, and back. Layers: the defaults, then one TOML file (`--config FILE`), then
flags.

Groups nest in TOML tables; flags are flat. What is derived from settings is in config_validate.py. No torch: `--help`
must be quick.
"""

import contextlib
import io
import os
import types
import typing
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, Literal

import tyro

from megatron_jq.errors import UserError
from megatron_jq.estimators import ALIASES
from megatron_jq.settings import (
    SETTINGS,
    CheckpointConfig,
    Config,
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ParallelConfig,
    RolloutConfig,
    TrainingConfig,
)
from megatron_jq.toml_files import did_you_mean, format_table, read_toml, tomllib

#: What others import from here, the settings themselves included.
__all__ = [
    "ALIASES",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "OLD_NAMES",
    "PATHS",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "RolloutConfig",
    "SETTINGS",
    "TrainingConfig",
    "explicit_settings",
    "load_toml",
    "old_name_notes",
    "parse_args",
    "settings_of_text",
    "to_argv",
    "to_toml",
    "with_home",
    "with_one_rationale",
    "without_aliases",
]


def without_aliases(config: Config) -> Config:
    """The same run by the names that the code knows. UserError where another q, or a schedule, was asked for."""
    o = config.objective
    if o.estimator not in ALIASES:
        return config
    estimator, q = ALIASES[o.estimator]
    if o.q not in (q, ObjectiveConfig().q) or o.q_schedule != "constant":
        raise UserError(
            f"--estimator {o.estimator} is {estimator} at q = {q:g}; for another q give --estimator {estimator}"
        )
    return replace(config, objective=replace(o, estimator=estimator, q=q))


def with_one_rationale(config: Config) -> Config:
    """An estimator that imitates has M = 1, which need not be said; another M than the default stays, to be refused."""
    r = config.rollout
    if not config.objective.row.imitates or r.num_rationales != RolloutConfig().num_rationales:
        return config
    return replace(config, rollout=replace(r, num_rationales=1))


def parse_args(argv: list[str], prog: str = "megatron-jq train", base: Config = Config()) -> Config:  # noqa: B008 (frozen)
    """Flags (and the file that `--config` names) on top of `base` → Config. UserError names the flag or key at fault
    and the fix.
    """
    config_file, flags = _tokenise(argv)
    base = base if config_file is None else load_toml(config_file, base)
    try:
        return with_home(with_one_rationale(without_aliases(_run_tyro(flags, base, prog))))
    except SystemExit as stop:
        if stop.code in (0, None):  # --help was printed
            raise
    for flag in flags:  # tyro's own message is a box about many flags: find the one, and say it in a line
        try:
            _run_tyro([flag], base, prog)
        except SystemExit as stop:
            name, _, text = flag.removeprefix("--").partition("=")
            kind = SETTINGS[name.replace("-", "_")][1]
            raise UserError(f"--{name} {text}: expected {_expectation(kind)}") from stop
    raise AssertionError(f"each of {flags} parses alone, together they do not")


#: Names that settings had before → their names now. Both are read: as flags, in files and in the records of runs.
OLD_NAMES = {"normalise": "match_rule"}

#: Settings that may be a path, beginning with ~ where no shell replaced it: --run-dir=~/runs, or a line of a file.
PATHS = (
    "model", "train_data", "eval_data", "prompt_template", "tokenizer_model", "data_path", "data_cache_path", "run_dir",
    "save", "load",
)  # fmt: skip


def with_home(config: Config) -> Config:
    """The same settings with a path's leading ~ replaced by the home directory; a folder called ~ is nobody's wish."""
    for name in PATHS:
        group = SETTINGS[name][0]
        value = getattr(getattr(config, group), name)
        if value is not None and value.startswith("~"):
            changed = replace(getattr(config, group), **{name: os.path.expanduser(value)})
            config = replace(config, **{group: changed})
    return config


def explicit_settings(argv: list[str]) -> frozenset[str]:
    """Names of the settings that a command line's flags name; those of its `--config` file are not among them."""
    names = {flag.removeprefix("--").partition("=")[0].replace("-", "_") for flag in _tokenise(argv)[1]}
    return frozenset(name if name in SETTINGS else name.removeprefix("no_") for name in names) & SETTINGS.keys()


def _run_tyro(flags: list[str], base: Config, prog: str) -> Config:
    with contextlib.redirect_stderr(io.StringIO()):
        return tyro.cli(Config, args=flags, default=base, prog=prog, config=(tyro.conf.OmitArgPrefixes,))


#: Flags of other commands that a run could be expected to have.
_ELSEWHERE = {
    "add_tokens": "tokens are added where a folder is converted: megatron-jq convert hf-to-megatron --add-tokens …; "
    "then train with --load",
}


def _tokenise(argv: list[str]) -> tuple[str | None, list[str]]:
    """(the --config file, the other flags as `--name=value`, `--name`, `--no-name`). UserError on an unknown flag."""
    config_file, flags, rest = None, [], list(argv)
    for token in argv:
        if any("\ud800" <= letter <= "\udfff" for letter in token):  # bytes of another encoding than the locale's
            raise UserError(f"{token!r} is not UTF-8 text; rename the file, or spell the value in UTF-8")
    while rest:
        token = rest.pop(0)
        if token in ("-h", "--help"):
            flags.append("--help")
            continue
        if not token.startswith("--"):
            raise UserError(f"unexpected argument {token!r}; settings are given as --name value")
        written, has_value, value = token.removeprefix("--").partition("=")
        name = written.replace("-", "_")
        name = OLD_NAMES.get(name, name)
        plain = name.removeprefix("no_")
        if plain in SETTINGS and bool in _alternatives(SETTINGS[plain][1]):
            if has_value:
                raise UserError(f"{token}: a switch takes no value; write --{_kebab(plain)} or --no-{_kebab(plain)}")
            # tyro spells a switch with a third state (None: leave it to the preset) as a choice
            two_states = SETTINGS[plain][1] is bool
            flags.append(f"--{_kebab(name)}" if two_states else f"--{_kebab(plain)}={plain == name}")
            continue
        if name not in SETTINGS and name != "config":
            valid = [f"--{_kebab(known)}" for known in (*SETTINGS, "config")]
            hint = _ELSEWHERE.get(name) or did_you_mean(f"--{_kebab(name)}", valid, "--help lists them all")
            raise UserError(f"unknown flag --{written}; {hint}")
        if not has_value:
            if not rest or rest[0].startswith("--"):
                raise UserError(f"--{_kebab(name)}: a value must follow")
            value = rest.pop(0)
        if name != "config":
            flags.append(f"--{_kebab(name)}={value}")
        elif config_file is None:
            config_file = value
        else:
            raise UserError(f"--config is given twice ({config_file}, {value}); one file is read")
    return config_file, flags


def load_toml(path: str | Path, base: Config = Config()) -> Config:  # noqa: B008 (frozen)
    """`base` with a TOML file's keys on top. UserError for unknown or misplaced keys and for wrong types."""
    return _with_tables(base, read_toml(path), path)


def settings_of_text(text: str, path: str | Path) -> Config:
    """The defaults with the keys of a TOML text (to_toml's) on top; path: where it was found. UserError as above.

    It is a run's record: one without add_bos_token is from before that setting, when no prompt began with one.
    """
    try:
        tables = tomllib.loads(text)
        if "add_bos_token" not in tables.get("data", {}):
            tables["data"] = {**tables.get("data", {}), "add_bos_token": "off"}
        return _with_tables(Config(), tables, path)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path} are not valid TOML: {error}") from error


def _with_tables(base: Config, tables: dict[str, Any], path: str | Path) -> Config:
    groups: dict[str, dict[str, Any]] = {g.name: {} for g in fields(Config)}
    for key, value in tables.items():
        table = value if isinstance(value, dict) else {key: value}
        if isinstance(value, dict) and key not in groups:
            raise UserError(f"{path}: unknown table [{key}]; {did_you_mean(key, groups, f'valid: {list(groups)}')}")
        for name, setting in table.items():
            name = OLD_NAMES.get(name.replace("-", "_"), name.replace("-", "_"))
            if name not in SETTINGS:
                raise UserError(f"{path}: unknown key {name}; {did_you_mean(name, SETTINGS, 'see --help')}")
            group, kind = SETTINGS[name]
            if table is value and group != key:
                raise UserError(f"{path}: {name} belongs in [{group}], not in [{key}]")
            if name in groups[group]:
                raise UserError(f"{path}: {name} is given twice")
            groups[group][name] = _typed(setting, kind, f"{path}: {name}")
    return replace(base, **{name: replace(getattr(base, name), **values) for name, values in groups.items()})


def old_name_notes(argv: list[str]) -> list[str]:
    """Return a line for each old name by which a command line, or its `--config` file, gives a setting."""
    config_file, _ = _tokenise(argv)
    names = {token.removeprefix("--").partition("=")[0] for token in argv if token.startswith("--")}
    for key, value in ({} if config_file is None else read_toml(config_file)).items():
        names.update(value if isinstance(value, dict) else (key,))
    return [
        f"--{_kebab(old)} is now --{_kebab(new)} ({new} in a file); the next version does not read the old name"
        for old, new in OLD_NAMES.items()
        if {old, _kebab(old)} & names
    ]


def to_argv(config: Config) -> list[str]:
    """The flags that differ from the defaults: parse_args(to_argv(c)) == c. For torchrun, srun and nemo-run alike."""
    argv, default = [], Config()
    for name, (group, kind) in SETTINGS.items():
        value = getattr(getattr(config, group), name)
        if value == getattr(getattr(default, group), name):
            continue
        if bool in _alternatives(kind):
            argv.append(f"--{_kebab(name)}" if value else f"--no-{_kebab(name)}")
        else:
            argv.append(f"--{_kebab(name)}={value}")
    return argv


def to_toml(config: Config) -> str:
    """Every setting, grouped: what run_dir/config.toml holds and `--config` reads back."""
    return "\n".join(f"[{name}]\n{format_table(settings)}" for name, settings in asdict(config).items())


def _kebab(name: str) -> str:
    return name.replace("_", "-")


def _alternatives(kind: Any) -> tuple:
    # A Literal with None is a typing.Union, a class with None a types.UnionType
    return typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)


def _typed(value: Any, kind: Any, where: str) -> Any:
    """A TOML value as the setting's type; whole numbers may stand for float settings."""
    for option in _alternatives(kind):
        if typing.get_origin(option) is Literal and value in typing.get_args(option):
            return value
        if option is float and type(value) is int:
            return float(value)
        if type(value) is option:
            return value
    raise UserError(f"{where} = {value!r}: expected {_expectation(kind)}")


def _expectation(kind: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    wanted = [o for o in _alternatives(kind) if o is not type(None)]
    return " or ".join(names[o] if o in names else "one of " + ", ".join(map(str, typing.get_args(o))) for o in wanted)
