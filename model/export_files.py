"""Writes an exported model's other files: tokenizer, chat template trained with, generation settings.

Files are copied byte for byte; only a chat template other than the tokenizer's and a missing end-of-turn token change any.
Nothing is fetched: a hub name counts where its files are in the local cache.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..utils.stored_paths import base_of

_PATTERNS = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model*", "special_tokens_map.json", "added_tokens.json", "tekken.json"),
    *("vocab.*", "merges.txt", "*.model", "*.tiktoken", "bpe.codes", "chat_template.jinja", "chat_template.json"),
    "additional_chat_templates/*.jinja",
)
_CONFIG, _TEMPLATE, _OTHER_TEMPLATES = "tokenizer_config.json", "chat_template.jinja", "additional_chat_templates"
_GENERATION = "generation_config.json"
_PORTABLE_CLASS = "PreTrainedTokenizerFast"
"""The class that transformers 4 and 5 both know for a bare tokenizer.json."""


@dataclass(frozen=True, slots=True)
class Origins:
    """What a run was trained with, as far as its checkpoint and its corpora tell."""

    tokenizers: tuple[str, ...]
    """Places where the tokenizer may be, best first: data.tokenizer, the corpora's, the model's own directory."""
    model: str | None
    corpora: tuple[dict[str, Any], ...]
    """What PREFIX.json holds of each corpus that has one."""
    hf_config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class FilesReport:
    """A report of what was written beside the weights."""

    tokenizer: str | None = None
    """Directory or name it was copied from; None: it is not on this machine."""
    chat_template: str | None = None
    """Owner of the template: `tokenizer` or `corpus`; None: there is none."""
    end_of_turn: str | None = None
    """The token that ends the assistant's turn, which generation stops at."""
    notes: tuple[str, ...] = ()


def origins_of(run_dir: Path, metadata: Mapping[str, Any]) -> Origins:
    """The origins that a checkpoint of `run_dir` records. Relative paths, of earlier versions, start where the run started."""
    config = metadata.get("config") or {}
    run, data, model = (config.get(group) or {} for group in ("run", "data", "model"))
    base = base_of(run_dir, run.get("root", ""), run.get("id"))

    def located(path: str) -> str:
        return str(base / path) if base is not None and (base / path).exists() else path

    prefixes = [located(f"{prefix}.idx")[: -len(".idx")] for prefix in data.get("prefixes") or ()]
    corpora = [described for prefix in prefixes if (described := _read_json(Path(prefix + ".json")))]
    named = [metadata.get("tokenizer"), *((corpus.get("tokenizer") or {}).get("path") for corpus in corpora), model.get("path")]
    paths = [located(path) for path in named if path]
    own = located(model["path"]) if model.get("path") else None
    return Origins(tuple(dict.fromkeys(paths)), own, tuple(corpora), metadata.get("hf_config") or {})


def write_files(origins: Origins, out_dir: Path) -> FilesReport:
    """Copy tokenizer and generation settings into `out_dir`, with the template and the end of turn that were trained."""
    notes: list[str] = []
    tokenizer = next((path for path in origins.tokenizers if _copy_tokenizer(path, origins, out_dir)), None)
    if tokenizer is not None and tokenizer != origins.tokenizers[0]:
        notes.append(f"tokenizer {origins.tokenizers[0]} is not on this machine; the one of {tokenizer} was taken")
    if _read_json(out_dir / _CONFIG).get("tokenizer_class") == "TokenizersBackend":
        notes.append("the tokenizer's class, TokenizersBackend, is not known to transformers before 5; its files are as they were")
    template = None if tokenizer is None else _write_template(origins, out_dir, notes)
    end = None if template is None else _end_of_turn(origins, out_dir, notes)
    _write_generation(origins, out_dir, end, notes)
    return FilesReport(tokenizer, template, end, tuple(notes))


def _folder(path: str, name: str) -> Path | None:
    """The directory at `path`, or the local cache's of the hub name `path`, where `name` is in it."""
    if Path(path).is_dir():
        return Path(path) if (Path(path) / name).is_file() else None
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        return None
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(path, name)
    return Path(cached).parent if isinstance(cached, str) else None


def _copy_tokenizer(path: str, origins: Origins, out_dir: Path) -> bool:
    """Copy it from a directory, a bare tokenizer.json and its neighbours, or a hub name in the local cache; False: none there."""
    bare = Path(path) if Path(path).is_file() else None
    if bare is not None:
        # What lies beside it is of this tokenizer unless that is another file there.
        folder = bare.parent if bare.name == "tokenizer.json" or not (bare.parent / "tokenizer.json").exists() else None
    else:
        folder = next((candidate for name in ("tokenizer.json", _CONFIG, "tokenizer.model") if (candidate := _folder(path, name))), None)
        if folder is None:
            return False
    for source in sorted({file for pattern in _PATTERNS for file in (folder.glob(pattern) if folder else ()) if file.is_file()}):
        target = out_dir / source.relative_to(folder or source.parent)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(source, target)
    if bare is not None:
        shutil.copyfile(bare, out_dir / "tokenizer.json")
    if not (out_dir / _CONFIG).exists() and (out_dir / "tokenizer.json").exists():
        _write_json(out_dir / _CONFIG, {"tokenizer_class": _PORTABLE_CLASS, **_special_tokens(origins, out_dir)})
    return True


def _special_tokens(origins: Origins, out_dir: Path) -> dict[str, str]:
    """Special tokens for a bare tokenizer.json: the corpora's end token, and those the model's configuration names by id."""
    added = _read_json(out_dir / "tokenizer.json").get("added_tokens") or ()
    by_id = {entry["id"]: entry["content"] for entry in added}
    ids = {name: origins.hf_config.get(f"{name}_id") for name in ("bos_token", "eos_token", "pad_token")}
    tokens = {name: by_id[number] for name, number in ids.items() if isinstance(number, int) and number in by_id}
    end = next((token for corpus in origins.corpora if (token := (corpus.get("tokenizer") or {}).get("eos_token"))), None)
    return tokens if end is None else {**tokens, "eos_token": end}


def _write_template(origins: Origins, out_dir: Path, notes: list[str]) -> str | None:
    """Make the template that was trained with the model's own; returns whose it is."""
    trained = [corpus["chat_template"] for corpus in origins.corpora if corpus.get("chat_template")]
    own = _templates(out_dir)
    if not trained:
        return "tokenizer" if own else None
    if any(template != trained[0] for template in trained):
        notes.append("the corpora were made with different chat templates; the first corpus's was taken")
    templates = {"default": trained[0]} if isinstance(trained[0], str) else dict(trained[0])
    if templates == own or (isinstance(trained[0], str) and own.get("default") == trained[0]):
        return "tokenizer"
    # Every place a loader may look at: none may still hold the other one.
    (out_dir / "chat_template.json").unlink(missing_ok=True)
    shutil.rmtree(out_dir / _OTHER_TEMPLATES, ignore_errors=True)
    if "default" in templates:
        (out_dir / _TEMPLATE).write_text(templates.pop("default"), encoding="utf-8")
    for name, text in templates.items():
        (out_dir / _OTHER_TEMPLATES).mkdir(exist_ok=True)
        (out_dir / _OTHER_TEMPLATES / f"{name}.jinja").write_text(text, encoding="utf-8")
    settings = _read_json(out_dir / _CONFIG)
    if settings.pop("chat_template", None) is not None:
        _write_json(out_dir / _CONFIG, settings)
    return "corpus"


def _templates(out_dir: Path) -> dict[str, str]:
    """The templates of a tokenizer's files by name; files go before what tokenizer_config.json holds."""
    inline = _read_json(out_dir / _CONFIG).get("chat_template")
    templates = (
        {entry["name"]: entry["template"] for entry in inline} if isinstance(inline, list) else {"default": inline} if inline else {}
    )
    if (out_dir / _TEMPLATE).is_file():
        templates["default"] = (out_dir / _TEMPLATE).read_text(encoding="utf-8")
    return {**templates, **{file.stem: file.read_text(encoding="utf-8") for file in (out_dir / _OTHER_TEMPLATES).glob("*.jinja")}}


def _end_of_turn(origins: Origins, out_dir: Path, notes: list[str]) -> str | None:
    """The token that ends the assistant's turn in the chats that were trained on; None: no chats, or no such token."""
    ends = {corpus["end_of_turn"] for corpus in origins.corpora if corpus.get("end_of_turn")}
    if ends:
        return str(sorted(ends)[0])
    if any(corpus.get("loss_mask") and "end_of_turn" not in corpus for corpus in origins.corpora):
        return _rendered_end(out_dir, notes)
    return None


def _rendered_end(out_dir: Path, notes: list[str]) -> str | None:
    """The end of turn for corpora that record none: the first special token after the assistant's text, by the template."""
    from jinja2 import TemplateError
    from transformers import AutoTokenizer

    answer = "an answer"
    chat = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": answer}]
    try:
        tokenizer = AutoTokenizer.from_pretrained(out_dir, local_files_only=True, trust_remote_code=False)
        after = str(tokenizer.apply_chat_template(chat, tokenize=False)).rpartition(answer)[2]
    except (OSError, ValueError, TypeError, KeyError, TemplateError) as error:
        notes.append(f"the end of the assistant's turn is not known: the chat template cannot be tried ({str(error).splitlines()[0]})")
        return None
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special and token.content in after]
    return min(special, key=after.index, default=None)


def _write_generation(origins: Origins, out_dir: Path, end: str | None, notes: list[str]) -> None:
    """Write the model's generation_config.json, with the end of turn among what generation stops at."""
    folder = None if origins.model is None else _folder(origins.model, _GENERATION)
    if folder is not None:
        shutil.copyfile(folder / _GENERATION, out_dir / _GENERATION)
    elif origins.model is not None and not Path(origins.model).is_dir() and _folder(origins.model, "config.json") is None:
        notes.append(f"model {origins.model} is not on this machine: its generation settings, if it had any, are not in the export")
    number = None if end is None else _token_id(out_dir, end)
    if end is not None and number is None:
        notes.append(f"{end!r}, which ends the assistant's turn, is no token of the exported tokenizer: generation does not stop at it")
    if number is None:
        return
    settings = _read_json(out_dir / _GENERATION)
    if folder is None:
        ids = {key: origins.hf_config.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        settings = {key: value for key, value in ids.items() if value is not None}
    stops = settings.get("eos_token_id", origins.hf_config.get("eos_token_id"))
    stops = [] if stops is None else stops if isinstance(stops, list) else [stops]
    if number not in stops:
        _write_json(out_dir / _GENERATION, {**settings, "eos_token_id": [*stops, number] if stops else number})


def _token_id(out_dir: Path, token: str) -> int | None:
    file = out_dir / "tokenizer.json"
    if not file.is_file():
        return None
    from tokenizers import Tokenizer

    number: int | None = Tokenizer.from_file(str(file)).token_to_id(token)
    return number


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a file; an empty one where there is no file. CheckpointError where it holds something else."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        content = str(error)
    if not isinstance(content, dict):
        hint = "mend the file, or move it away to export without it"
        raise CheckpointError(str(path), found=f"no JSON object ({str(content)[:80]})", expected="one, as it was written", hint=hint)
    return content


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
