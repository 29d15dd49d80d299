"""Lists which configuration groups, options and experiments exist: those of conf/ and of the user's own directory."""

from __future__ import annotations

import difflib
from pathlib import Path

from ...errors import ConfigError

GROUPS = ("model", "adapter", "data", "optim", "parallel", "engine", "memory", "checkpoint", "cluster", "launcher", "logging", "eval")
"""Groups that always have exactly one option; `experiment` comes on top of them."""
EXPERIMENT = "experiment"


def conf_dir() -> Path:
    """The package's own configuration files."""
    return Path(__file__).resolve().parents[2] / "conf"


def options(group: str, config_dir: str | None = None) -> list[str]:
    """Names that `group=NAME` accepts, sorted."""
    directories = [conf_dir(), *([Path(config_dir)] if config_dir else [])]
    return sorted({path.stem for directory in directories for path in (directory / group).glob("*.yaml") if path.is_file()})


def option_file(group: str, option: str, config_dir: str | None = None) -> Path:
    """Return the file of an option; the user's own directory comes first."""
    directories = [*([Path(config_dir)] if config_dir else []), conf_dir()]
    return next(path for directory in directories if (path := directory / group / f"{option}.yaml").is_file())


def first_comment(path: Path) -> str:
    """The comment line at the top of a configuration file: what it is for."""
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith("# @package"):
            continue
        return line.lstrip("# ").strip() if line.startswith("#") else ""
    return ""


def check_option(group: str, option: str, config_dir: str | None = None) -> None:
    """ConfigError that lists the options unless `group` has one of this name."""
    existing = options(group, config_dir)
    if option in existing:
        return
    near = difflib.get_close_matches(option, existing, 1)
    typed = f"+{group}" if group == EXPERIMENT else group
    hint = f"{typed}={near[0]}" if near else f"{typed}={existing[0]}" if existing else f"--config-dir DIR with {group}/{option}.yaml"
    raise ConfigError(typed, found=f"{option!r}", expected=f"one of {', '.join(existing)}", hint=hint)


def check_config_dir(config_dir: str | None) -> None:
    """ConfigError unless the user's directory exists."""
    if config_dir is not None and not Path(config_dir).is_dir():
        hint = "--config-dir DIR, a directory with files such as DIR/experiment/mine.yaml"
        raise ConfigError("--config-dir", found=f"{config_dir!r}, not a directory", expected="an existing directory", hint=hint)
