"""Command line -> checked Config. Hydra runs here, in one process, and nowhere else.

Every command reads overrides here, on top of the configuration files (train, plan, sweep, ...) or of a run's stored
configuration (resume), by the same rules: groups are chosen first, values are set in their order, mappings are merged.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ...errors import ConfigError
from ...utils.names import check_identifier, check_path
from .conf_groups import check_config_dir, conf_dir, option_file, options
from .node_range import resolve_nodes
from .overrides import Override, parse_overrides, split_values
from .own_aliases import current_own_files
from .paths import expand_homes
from .run_config import Config
from .schema import dump_config, load_config, missing_key

_MISSING = "???"


def compose(overrides: list[str], config_dir: str | None = None) -> Config:
    """The configuration a command line asks for; ConfigError says where, what was found, expected and what to type."""
    check_config_dir(config_dir)
    parsed = parse_overrides(overrides, config_dir)
    rewritten = current_own_files(config_dir, [item.value for item in parsed if item.is_group]) if config_dir is not None else {}
    return _checked(_run_hydra([text for item in parsed for text in _whole(item)], config_dir, rewritten=rewritten), parsed)


def changed(config: Config, overrides: list[Override], config_dir: str | None) -> Config:
    """`config`, a run's own, with `overrides` on top of it; ConfigError as compose's, and for what a run cannot change."""
    for item in overrides:
        if item.key in ("experiment", "run.id", "run.root"):
            raise ConfigError(
                item.key, found="a change of it", expected="the run's own", hint="start another run: efflaunch +experiment=NAME"
            )
    data = _escaped(dump_config(config))
    # As in a first start, whatever the order: values that are typed count, also for a group chosen after them.
    data.update({item.key: _group(item.key, item.value, config_dir, resolve=False) for item in overrides if item.is_group})
    with tempfile.TemporaryDirectory() as folder:
        # JSON, which is YAML with every text in quotes.
        (Path(folder) / "stored.yaml").write_text(json.dumps(data), encoding="utf-8")
        texts = [text for item in overrides if not item.is_group for text in _whole(item)]
        composed = _run_hydra(texts, config_dir, "stored", folder=Path(folder))
    return _checked(composed, overrides)


def _checked(data: dict[str, Any], overrides: list[Override]) -> Config:
    missing = list(_missing_keys(data))
    if missing:
        raise _missing_choice(missing[0], overrides)
    config = _engined(decided(resolve_nodes(expand_homes(load_config(data)), [item.key for item in overrides])))
    check_config(config)
    if config.run.id is not None:
        check_identifier("run.id", config.run.id)
    return config


def decided(config: Config) -> Config:
    """`config` with what its command line leaves to be decided: parallel.pipeline.auto. Lines about it go to standard error."""
    if not config.parallel.pipeline.auto:
        return config
    from .pipeline_choice import decide_pipeline

    # Standard output may be a script, or JSON.
    return decide_pipeline(config, lambda line: print(line, file=sys.stderr, flush=True))


def _engined(config: Config) -> Config:
    """`config` with what engine.config says."""
    if config.engine.config is None:
        return config
    from ...parallel.sharding.config import with_ds_config

    return replace(config, engine=with_ds_config(config))


def _whole(item: Override) -> list[str]:
    """The override as Hydra is given it. A mapping replaces the one that stood there, which Hydra would add it to."""
    return [f"++{item.key}=null", item.text] if not item.is_group and item.value.lstrip().startswith("{") else [item.text]


def _escaped(data: Any) -> Any:
    """Plain values whose texts stay what they are when interpolations are resolved."""
    if isinstance(data, dict):
        return {key: _escaped(value) for key, value in data.items()}
    if isinstance(data, list):
        return [_escaped(value) for value in data]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", data) if isinstance(data, str) else data


def sweep_values(argument: str) -> list[str] | None:
    """Each value of a `key=a,b` as text, where Hydra reads it as several (also `range(0,4)`, `choice(a,b)`); None: it is one."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import ValueType
    from hydra.errors import HydraException

    try:
        parsed = OverridesParser.create().parse_override(argument)
    except HydraException as error:
        raise _unparsed(argument, str(error).splitlines()[0]) from error
    if not parsed.is_sweep_override():
        return None
    if parsed.value_type is ValueType.SIMPLE_CHOICE_SWEEP:
        # As typed: the values name the runs.
        return split_values(argument.partition("=")[2])
    return [str(value) for value in parsed.sweep_string_iterator()]


def compose_group(group: str, option: str, config_dir: str | None = None) -> dict[str, Any]:
    """The plain values of one group option by itself; the option must exist."""
    return _group(group, option, config_dir)


def _group(group: str, option: str, config_dir: str | None, *, resolve: bool = True) -> dict[str, Any]:
    rewritten = current_own_files(config_dir, [option]) if config_dir is not None else {}
    data = _run_hydra([], config_dir, f"{group}/{option}", resolve=resolve, rewritten=rewritten)
    if set(data) != {group} or not isinstance(data[group], dict):
        contents = f"keys of {', '.join(sorted(data)) or 'nothing'}"
        hint = "remove its `# @package` line, or type the keys it sets"
        raise ConfigError(f"{group}={option}", found=contents, expected=f"keys of {group} alone", hint=hint)
    return data[group]


def check_config(config: Config) -> None:
    """ConfigError where values that are right by themselves do not go together. Rules live beside their fields."""
    from ...checkpoint.config import check_checkpoint
    from ...memory.config import check_memory
    from ...model.model_check import check_weights
    from ...parallel.sharding.config import check_stage
    from ...training.optimizers.algorithms import check_algorithm
    from ...training.optimizers.check import check_residency
    from ...training.optimizers.engine_check import check_engine, engine_facts
    from ...training.optimizers.lr_schedule import check_optim
    from ...training.reporting.metrics import check_logging
    from ..env import secrets
    from . import checks
    from .secrets import check_secrets

    check_secrets(dump_config(config), secrets())
    check_path("run.root", config.run.root)
    check_checkpoint(config.checkpoint)
    checks.check_config(config)
    check_memory(config.memory)
    check_algorithm(config.optim, config.adapter)
    check_optim(config.optim, config.train.steps)
    check_residency(config.optim, config.train.dtype)
    check_stage(config.engine)
    check_engine(engine_facts(config), config)
    check_logging(config.logging)
    check_weights(config.model)


def _run_hydra(
    overrides: list[str],
    config_dir: str | None,
    config_name: str = "config",
    *,
    folder: Path | None = None,
    resolve: bool = True,
    rewritten: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Any]:
    # The one place that knows Hydra: a later version is a change of this function.
    import yaml
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        places = _search_places(config_dir, config_name, folder, rewritten)
        with places as (first, search), initialize_config_dir(first, version_base="1.3"):
            composed = hydra_compose(config_name, overrides=[*overrides, *search])
        data = OmegaConf.to_container(composed, resolve=resolve, throw_on_missing=False)
    except (HydraException, OmegaConfBaseException) as error:
        raise _translated(error) from error
    except (ValueError, TypeError, LookupError, AttributeError, AssertionError, RecursionError, OSError, yaml.YAMLError) as error:
        # Hydra and OmegaConf let through what their parsers raise; all they are given is the user's.
        raise _untranslated(error, config_dir) from error
    assert isinstance(data, dict)
    return {str(key): value for key, value in data.items()}


def _translated(error: Exception) -> ConfigError:
    first = (str(error).splitlines() or [type(error).__name__])[0]
    ambiguous = re.match(r"Ambiguous value for argument '(.*)'$", first)
    argument = getattr(error, "override", None) or (ambiguous[1] if ambiguous else None)
    if argument:
        return _unparsed(str(argument), "several values" if ambiguous else first)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    choice = re.match(r"You must specify '(\w+)'", lines[0]) if lines else None
    if choice is not None:
        group = choice[1]
        expected = f"one of {', '.join(options(group))}"
        return ConfigError(
            group, found="no choice", expected=expected, hint=f"{group}=..., or an experiment that sets it: +experiment=quickstart"
        )
    cause = error.__cause__
    if cause is not None and type(cause).__module__.startswith("omegaconf"):
        lines.append(str(cause).splitlines()[0])
    return ConfigError(
        "command line or configuration file",
        found="; ".join(lines[:3]) or type(error).__name__,
        expected="overrides and files that compose",
        hint="efflaunch train --help lists keys and groups",
    )


@contextmanager
def _search_places(
    config_dir: str | None, config_name: str, folder: Path | None, rewritten: Mapping[str, str]
) -> Iterator[tuple[str, list[str]]]:
    """The directory Hydra starts from, and the override that names the others. The first that has an option wins: the user's own.

    Hydra has to find what it is asked for in its first directory, and searches that before all others: with a user's directory
    the first holds this one file, and those of the user's that are `rewritten`. `folder`: holds all of a configuration, which
    refers to no other file.
    """
    if folder is not None or config_dir is None:
        yield str(folder or conf_dir()), []
        return
    with tempfile.TemporaryDirectory(prefix="efflaunch-") as first:
        group, _, option = config_name.rpartition("/")
        target = Path(first) / f"{config_name}.yaml"
        target.parent.mkdir(exist_ok=True)
        shutil.copy(option_file(group, option, config_dir) if group else conf_dir() / target.name, target)
        for name, text in rewritten.items():
            (Path(first) / name).parent.mkdir(parents=True, exist_ok=True)
            (Path(first) / name).write_text(text, encoding="utf-8")
        quoted = (str(place).replace("\\", "\\\\").replace("'", "\\'") for place in (Path(config_dir).resolve(), conf_dir()))
        listed = ",".join(f"'file://{place}'" for place in quoted)
        yield first, [f"hydra.searchpath=[{listed}]"]


def _untranslated(error: Exception, config_dir: str | None) -> ConfigError:
    where = f"command line or files of {config_dir}" if config_dir else "command line"
    reason = "groups nested without end" if isinstance(error, RecursionError) else (str(error).splitlines() or [""])[0][:200]
    hint = "efflaunch train --help lists keys and groups"
    return ConfigError(where, found=f"{reason} ({type(error).__name__})", expected="overrides and files that compose", hint=hint)


def _unparsed(argument: str, problem: str) -> ConfigError:
    hint = "a list is [a,b]; quote special characters: 'data.prefixes=[\"/data/my corpus\"]'"
    # `++` is ours.
    return ConfigError(f"argument {argument.lstrip('+')!r}", found=problem, expected="a value that can be parsed", hint=hint)


def _missing_keys(data: Any, path: str = "") -> Iterator[str]:
    if isinstance(data, dict):
        for key, value in data.items():
            yield from _missing_keys(value, f"{path}.{key}" if path else str(key))
    elif data == _MISSING:
        yield path


def _missing_choice(key: str, given: list[Override]) -> ConfigError:
    error = missing_key(key)
    if any(item.key == "experiment" for item in given):
        return error
    return ConfigError(
        error.where, found=error.found, expected=error.expected, hint=f"{key}=..., or an experiment that sets it: +experiment=quickstart"
    )
