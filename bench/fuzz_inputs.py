"""Inputs for bench.fuzz, as hypothesis strategies: command lines, YAML files, corpora, safetensors headers, run directories.

Each is a command with the files it reads. Some are wrong by construction (`must_fail`): whoever accepts one has not looked.
"""

from __future__ import annotations

import json
import math
import struct
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, get_args, get_origin

import numpy as np
from hypothesis import strategies as st

from ..launcher.config.conf_groups import GROUPS
from ..launcher.config.run_config import Config
from ..launcher.config.schema import walk_fields
from ..utils.ranges import Range, ranges_of

HERE = "@HERE@"
"""Placeholder in words and files for the folder that the input's files lie in."""
BASE = (
    "model=tiny",
    "data=stdlib",
    "cluster=local_cpu",
    "train.steps=20",
    "train.dtype=float32",
    "parallel.tokens_per_rank=4K",
    "memory=keep",
)
DRY = ("train", "--print-config")
Files = dict[str, bytes]


@dataclass(frozen=True, slots=True)
class Input:
    """One command to try, with the files it reads."""

    kind: str
    words: tuple[str, ...]
    """A command line; `data` alone: open the corpus {HERE}/corpus; `mirror ADDRESS`: look at a second place."""
    files: Files = field(default_factory=dict)
    """Contents of the input's files, by path below its folder."""
    must_fail: bool = False
    """True for an input that is wrong by construction: exit code 0 would be a fault."""


def ranges(kind: type = Config, path: str = "") -> dict[str, Range]:
    """Every declared range of the configuration, by dotted key."""
    allowed_by_key = {f"{path}{name}": allowed for name, allowed in ranges_of(kind).items()}
    for name, hint in typing.get_type_hints(kind, include_extras=True).items():
        if hasattr(hint, "__dataclass_fields__"):
            allowed_by_key |= ranges(typing.cast(type, hint), f"{path}{name}.")
    return allowed_by_key


def _is_plain_number(hint: Any) -> bool:
    if get_origin(hint) is Annotated or hint in (int, float):
        return get_args(hint)[1:] != ("nodes",)
    return get_origin(hint) not in (list, dict) and any(_is_plain_number(inner) for inner in get_args(hint))


_RANGES = ranges()
_KEYS = [key for key, _, _ in walk_fields()]
_NUMBERS = [key for key, hint, _ in walk_fields() if key in _RANGES and _is_plain_number(hint)]
_WEIRD = (
    *(
        "",
        "null",
        "true",
        "???",
        "{}",
        "[]",
        "[1,2",
        "{a:1}",
        "a,b",
        "${x}",
        "${oc.env:NOPE}",
        "'",
        '"',
        "\\",
        "\t",
        "nan",
        "-inf",
        "1e400",
    ),
    *(
        "0",
        "-1",
        "1e-400",
        "9" * 400,
        "0x10",
        "1:2:3",
        "!!python/name:os.system",
        "*a",
        "é\u202e",
        "a" * 5000,
        "../..",
        "~",
        "/dev/null",
        "8K",
        "4h",
    ),
)


@st.composite
def command_lines(draw: st.DrawFn) -> Input:
    """Overrides of every key with every sort of value, commands with options they may not have."""
    words = [*BASE, *draw(_overrides())]
    must_fail = draw(st.booleans())
    if must_fail:
        words.append(draw(_wrong_number()))
    options = st.sampled_from(("--json", "--dry-run", "--config-dir", "--lines", "-1", "--", "-x", "stray", "--seed", "nan", "--help"))
    head = draw(st.sampled_from((DRY, DRY, ("train", "--dry-run"), ("plan",))))
    extra = draw(st.lists(options, max_size=2)) if not must_fail else []
    return Input("command line", (*head, *_without_nul(words), *extra), must_fail=must_fail)


@st.composite
def _overrides(draw: st.DrawFn) -> list[str]:
    """Up to three of any key and group with any value."""
    values = st.one_of(st.sampled_from(_WEIRD), st.integers().map(str), st.floats().map(str), st.text(max_size=20))
    words = []
    for _ in range(draw(st.integers(0, 3))):
        key = draw(st.one_of(st.sampled_from(_KEYS), st.sampled_from([*GROUPS, "experiment", "hydra.run.dir", "x.y"]), st.text(max_size=8)))
        words.append(f"{draw(st.sampled_from(('', '', '', '+', '++', '~', '+++')))}{key}={draw(values)}")
    return words


@st.composite
def _wrong_number(draw: st.DrawFn) -> str:
    """A number outside its key's range."""
    key = draw(st.sampled_from(_NUMBERS))
    return f"{key}={draw(_outside(_RANGES[key]))}"


def _outside(allowed: Range) -> st.SearchStrategy[str]:
    wrong = [str(value) for value in (-1, -(10**9), 10**40, float("nan"), float("inf"), float("-inf")) if value not in allowed]
    return st.sampled_from(wrong + (["0"] if 0 not in allowed else []))


def _without_nul(words: list[str]) -> list[str]:
    # No process gets such an argument.
    return [word.replace("\0", "") for word in words]


_SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=10), st.dates(), st.binary(max_size=4))
_TREES = st.recursive(
    _SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["defaults", "name", "lr", "betas"]) | _SCALARS, inner, max_size=3)
    ),
    max_leaves=8,
)
_OPTION = b"# An option.\ndefaults:\n  - adamw\n  - _self_\nname: mine\nlr: 0.001\nbetas: [0.9, 0.95]\n"


@st.composite
def yaml_files(draw: st.DrawFn) -> Input:
    """An option file of the user's own: a tree of values, a damaged good one, or bytes."""
    import yaml

    how = draw(st.integers(0, 2))
    if how == 0:
        content = yaml.dump(draw(_TREES)).encode("utf-8", "surrogateescape")
    else:
        content = draw(_damaged(_OPTION)) if how == 1 else draw(st.binary(max_size=60))
    try:
        must_fail = yaml.safe_load(content) is not None and not isinstance(yaml.safe_load(content), dict)
    except (yaml.YAMLError, ValueError):
        must_fail = True
    name = draw(st.sampled_from(("optim/mine.yaml", "optim/adamw.yaml")))
    option = () if name == "optim/adamw.yaml" else ("optim=mine",)
    return Input("YAML", (*DRY, *BASE, *option, "--config-dir", HERE), {name: content}, must_fail)


@st.composite
def _damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Cut short, a part overwritten, doubled or taken out, or something put in."""
    at, length = draw(st.integers(0, len(content))), draw(st.integers(0, 12))
    change: Callable[[bytes], bytes] = draw(
        st.sampled_from(
            (
                lambda noise: content[:at],
                lambda noise: content[:at] + noise + content[at + len(noise) :],
                lambda noise: content[:at] + noise + content[at:],
                lambda noise: content[:at] + content[at + length :],
                lambda noise: content[:at] + content[at : at + length] * 2 + content[at + length :],
            )
        )
    )
    return change(
        draw(st.one_of(st.binary(max_size=8), st.sampled_from((b"{", b"[", b"\x00", b"\xff", b"null", b"-1", b"9" * 30, b'"', b"\n"))))
    )


def corpus_files(lengths: list[int], *, masked: bool) -> Files:
    """A small indexed corpus, byte by byte as its format says."""
    total, items = sum(lengths), len(lengths)
    pointers = np.concatenate([[0], np.cumsum(lengths)[:-1]]) * 2 if items else np.zeros(0)
    index = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8, items, items + 1)
    index += np.array(lengths, "<i4").tobytes() + pointers.astype("<i8").tobytes() + np.arange(items + 1, dtype="<i8").tobytes()
    files = {"corpus.idx": index, "corpus.bin": (np.arange(total) % 50).astype("<u2").tobytes()}
    metadata = {"kind": "documents", "loss_mask": masked, "tokenizer": {"path": "none", "vocab_size": 50, "vocab_sha256": None}}
    files["corpus.json"] = json.dumps(metadata).encode()
    return files | ({"corpus.mask.bin": b"\x01" * total} if masked else {})


@st.composite
def corpora(draw: st.DrawFn) -> Input:
    """A corpus with one file damaged, missing, longer, or of something else."""
    lengths = draw(st.lists(st.integers(0, 40), min_size=1, max_size=6))
    files = corpus_files(lengths, masked=draw(st.booleans()))
    name, how = draw(st.sampled_from(sorted(files))), draw(st.integers(0, 4))
    must_fail = sum(lengths) == 0
    if how == 0:
        # The mask is spoken of in the .json.
        must_fail |= name != "corpus.json"
        del files[name]
    elif how == 1 and name != "corpus.json":
        files[name] += draw(st.binary(min_size=1, max_size=9))
        # An index may end in one more byte an item.
        must_fail = must_fail or name != "corpus.idx"
    elif how == 2:
        files[draw(st.sampled_from(("corpus.mask.bin", "corpus.scalars.bin", "corpus.ref.bin", "corpus.json")))] = draw(
            st.binary(max_size=30)
        )
    elif how == 3:
        files["corpus.json"] = json.dumps(draw(_mutated(json.loads(files["corpus.json"])))).encode()
    else:
        files[name] = draw(_damaged(files[name]))
    return Input("corpus", ("data",), files, must_fail)


_CONFIG = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 40,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}


def weight_shapes() -> dict[str, list[int]]:
    """Name to shape of every tensor of the model that _CONFIG describes."""
    hidden, inner, words = 16, 32, 40
    layer = {
        **{f"self_attn.{name}_proj.weight": [rows, hidden] for name, rows in (("q", hidden), ("k", 8), ("v", 8), ("o", hidden))},
        **{f"mlp.{name}_proj.weight": [inner, hidden] for name in ("gate", "up")},
        "mlp.down_proj.weight": [hidden, inner],
        **{f"{name}_layernorm.weight": [hidden] for name in ("input", "post_attention")},
    }
    whole = {"model.embed_tokens.weight": [words, hidden], "model.norm.weight": [hidden], "lm_head.weight": [words, hidden]}
    return whole | {f"model.layers.{number}.{name}": shape for number in range(2) for name, shape in layer.items()}


def _header() -> tuple[dict[str, Any], int]:
    """A whole safetensors header of them, and the bytes of data it speaks of."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in weight_shapes().items():
        size = 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    return header, at


@st.composite
def headers(draw: st.DrawFn) -> Input:
    """A model directory, whole but for a damaged header, index or config.json."""
    header, size = _header()
    length = None
    names, config, index = header, _CONFIG, {"weight_map": dict.fromkeys(weight_shapes(), "model.safetensors")}
    what, how = draw(st.integers(0, 2)), draw(st.integers(0, 3))
    if what == 0 and how:
        names = draw(_mutated(header))
    elif what == 1:
        index = draw(_mutated(index))
    elif how:
        config = draw(_mutated(_CONFIG))
    text = json.dumps(names).encode()
    if what == 0 and not how:
        length = draw(st.sampled_from((0, 1, 7, len(text) + 1, 10**9, 2**63, 2**64 - 1)))
        text = draw(_damaged(text))
    files = {"model/model.safetensors": struct.pack("<Q", len(text) if length is None else length) + text + bytes(size)}
    files["model/config.json"] = json.dumps(config).encode() if what != 2 or how else draw(_damaged(json.dumps(_CONFIG).encode()))
    if what == 1 or draw(st.booleans()):
        files["model/model.safetensors.index.json"] = json.dumps(index).encode()
    return Input("model directory", ("plan", *BASE[1:], "model=pretrained", f"model.path={HERE}/model", "--json"), files)


@st.composite
def _mutated(draw: st.DrawFn, data: Any) -> Any:
    """JSON with one value replaced by another kind, by nonsense or by nothing."""
    if isinstance(data, dict) and data and draw(st.integers(0, 4)):
        key = draw(st.sampled_from(sorted(data)))
        if draw(st.integers(0, 5)) == 0:
            return {name: value for name, value in data.items() if name != key}
        return {**data, key: draw(_mutated(data[key]))}
    if isinstance(data, list) and data and draw(st.booleans()):
        at = draw(st.integers(0, len(data) - 1))
        return [*data[:at], draw(_mutated(data[at])), *data[at + 1 :]]
    numbers = st.sampled_from((0, -1, 1, 0.5, 10**9, 10**18, 10**40, 1e308))
    return draw(st.one_of(numbers, st.none(), st.booleans(), st.text(max_size=6), st.just([]), st.just({}), st.just([{}])))


@st.composite
def resumes(draw: st.DrawFn, template: Files) -> Input:
    """A resume of a good run with overrides, groups chosen anew among them."""
    words = draw(_overrides())
    groups = ("memory=keep", "memory=auto", "optim=adamw", "checkpoint=default", "launcher=slurm", "cluster=local_cpu", "model=tiny")
    words += draw(st.lists(st.sampled_from(groups), max_size=2))
    must_fail = draw(st.booleans())
    words += [draw(_wrong_number())] if must_fail else []
    return Input("resume", ("resume", f"{HERE}/run", *_without_nul(words), "--dry-run"), template, must_fail)


_OWN_PLACES = (HERE, f"{HERE}/run", f"{HERE}/run/checkpoints", f"{HERE}/run/x", f"file://{HERE}/run/logs", ".", "./", "/", "", "memory://x")
_ADDRESSES = (
    "nosuch://x",
    "file://",
    "://",
    "s3:/x",
    "a" * 300,
    "/dev/null",
    f"{HERE}/run/run.yaml",
    f"{HERE}/run/run.yaml/x",
    "~nobody9/x",
)


@st.composite
def mirrors(draw: st.DrawFn, template: Files) -> Input:
    """A second place for checkpoints that is none: another run's, the current directory, a file, no path at all."""
    must_fail = draw(st.booleans())
    # Below the input's folder, for it is made.
    new = st.text(st.characters(exclude_characters="/."), max_size=8).map(f"{HERE}/new/{{}}".format)
    place = draw(st.sampled_from(_OWN_PLACES) if must_fail else st.one_of(st.sampled_from(_ADDRESSES), new))
    return Input("mirror", ("mirror", *_without_nul([place])), template, must_fail)


RUN_COMMANDS = ("status", "status", "logs", "explain", "checkpoints", "resume")


@st.composite
def run_dirs(draw: st.DrawFn, template: Files) -> Input:
    """A run directory in which one file is damaged, changed in meaning, or gone. `template`: a good one, below `run/`."""
    files, name = dict(template), draw(st.sampled_from(sorted(template)))
    how = draw(st.integers(0, 2))
    if how == 0:
        del files[name]
    elif how == 1 and name.endswith((".json", "COMMIT")):
        files[name] = json.dumps(draw(_mutated(json.loads(files[name])))).encode()
    elif how == 1 and name.endswith(".jsonl"):
        lines = files[name].splitlines()
        at = draw(st.integers(0, len(lines) - 1))
        lines[at] = json.dumps(draw(_mutated(json.loads(lines[at])))).encode()
        files[name] = b"\n".join(lines) + b"\n"
    else:
        files[name] = draw(_damaged(files[name]))
    command = draw(st.sampled_from(RUN_COMMANDS))
    options = {"status": ("--json",), "resume": ("--dry-run",), "explain": ("--step", "1")}.get(command, ())
    must_fail = name == "run/run.yaml" and files.get(name) != template[name]
    return Input(
        "run directory", (command, f"{HERE}/run", *(options if draw(st.booleans()) or command == "resume" else ())), files, must_fail
    )


def all_inputs(template: Files) -> st.SearchStrategy[Input]:
    """Any of them."""
    return st.one_of(command_lines(), yaml_files(), corpora(), headers(), run_dirs(template), resumes(template), mirrors(template))
