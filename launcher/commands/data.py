"""`efflaunch data ...`: corpora from a person's files. Heavy libraries only once there is work to do."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any, NoReturn

from ...errors import EXIT_DONE, EXIT_PREEMPTED, ConfigError, DataError
from ...units import format_bytes
from ...utils.ranges import Range
from .arguments import CommandParser, number_in

_EPILOG = """\
inputs: text files (one document each; directories are searched), .jsonl, .json (a list), .csv, .tsv, .parquet, .arrow, each also as .gz,
  .bz2, .xz or .zst where it is text, and directories of datasets' save_to_disk
records: a text field, or prompt and completion (the completion is learnt), or a chat in messages or conversations (the assistant's turns
  are learnt), or instruction, input and output, or prompt, chosen and rejected (for train.objective=dpo), or prompt and completions with
  rewards (for train.objective=grpo); prompts and answers are texts or lists of messages
output: PREFIX.bin and PREFIX.idx (Megatron's indexed format), PREFIX.mask.bin where there is a loss mask, PREFIX.json

Stopped or killed, the same command resumes where it was. Train on it with: data.prefixes=[PREFIX]
"""


OBJECTIVES = {"pairs": "dpo", "completions": "grpo"}
"""Objective that corpora of a kind are for, where it is not language modelling."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `efflaunch data`."""
    commands = parser.add_subparsers(dest="command", required=True, metavar="{prepare,tokenizer}", parser_class=_Subparser)
    prepare = commands.add_parser(
        "prepare", help="turn documents into an indexed corpus", epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    _add_prepare_arguments(prepare)
    tokenizer = commands.add_parser("tokenizer", help="train a byte-level BPE tokenizer on text files")
    tokenizer.add_argument("inputs", nargs="+", metavar="INPUT", help="text files, or directories of them")
    tokenizer.add_argument(
        "--vocab-size",
        type=number_in(int, Range(257, 1 << 28)),
        required=True,
        metavar="N",
        help="tokens, the 256 bytes and the end token included",
    )
    tokenizer.add_argument("--out", required=True, metavar="DIR", help="directory to write; must not exist")


class _Subparser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(
            self.prog, found=f"arguments it does not understand ({message})", expected=self.usage_line(), hint=f"{self.prog} --help"
        )

    def usage_line(self) -> str:
        """The usage on one line."""
        return " ".join(self.format_usage().split()).removeprefix("usage: ")


def _add_prepare_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="files and directories, read in this order")
    parser.add_argument(
        "--tokenizer", required=True, metavar="TOKENIZER", help="directory, tokenizer.json, or hub name where there is a network"
    )
    parser.add_argument("--out", required=True, metavar="PREFIX", help="where to write: PREFIX.bin, PREFIX.idx, ...")
    formats = ("auto", "text", "jsonl", "json", "csv", "parquet", "arrow", "datasets")
    parser.add_argument("--format", choices=formats, default="auto", help="how inputs are read; auto goes by the file name")
    parser.add_argument("--text-field", default="text", metavar="NAME", help="field or column of plain documents (text)")
    end = parser.add_mutually_exclusive_group()
    end.add_argument("--append-eos", dest="append_eos", action="store_true", default=None, help="end token after every document, chats too")
    end.add_argument("--no-eos", dest="append_eos", action="store_false", help="end token after none (the default: all but chats)")
    parser.add_argument("--eos-token", metavar="TOKEN", help="end token, where the tokenizer does not name one")
    parser.add_argument("--chat-template", metavar="FILE", help="Jinja chat template instead of the tokenizer's own")
    parser.add_argument(
        "--turns",
        choices=("auto", "all", "each", "last"),
        default="auto",
        help="assistant's turns that are learnt in one document: as many as the chat template leaves as they were (auto), "
        "all of a conversation, one, or only its last",
    )
    parser.add_argument(
        "--special-tokens",
        choices=("parse", "text"),
        default="parse",
        help="what special tokens written in texts and messages are: themselves (parse), or plain text",
    )
    parser.add_argument("--date", metavar="YYYY-MM-DD", help="today's date for chat templates that ask (2025-01-01)")
    parser.add_argument(
        "--reward-weight",
        action="append",
        default=[],
        type=_weight,
        metavar="NAME=NUMBER",
        help="weight of one of several rewards of completions (1)",
    )
    parser.add_argument("--skip-bad", action="store_true", help="count and leave out records that cannot be used, instead of stopping")
    parser.add_argument("--workers", type=_positive, metavar="N", help="processes that tokenise (one per core, fewer for small inputs)")
    parser.add_argument("--restart", action="store_true", help="throw away an unfinished earlier attempt")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")


def _weight(text: str) -> tuple[str, float]:
    name, _, number = text.rpartition("=")
    if not name or not math.isfinite(float(number)):
        raise ValueError(text)
    return name, float(number)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def main(arguments: list[str]) -> int:
    """Run `efflaunch data ARGUMENTS` and return the exit code. Raises UserError for what the user must mend."""
    parser = CommandParser("data", "Make corpora to train on.")
    add_arguments(parser)
    options = parser.parse_args(arguments)
    return _tokenizer(options) if options.command == "tokenizer" else _prepare(options)


def _prepare(options: argparse.Namespace) -> int:
    from ...training.data.chat import DATE, Turns
    from ...training.data.encode import EncodeOptions
    from ...training.data.inputs import Format
    from ...training.data.prepare import PrepareRequest, prepare
    from ...training.data.token_ids import SpecialTokens
    from .data_progress import show_progress

    if os.path.basename(options.out) in ("", ".", ".."):
        hint = f"--out {shlex.quote(os.path.join(options.out, 'corpus'))}"
        raise ConfigError(
            f"--out {options.out}", found="a directory", expected="what the names of the corpus's files begin with", hint=hint
        )
    encode = EncodeOptions(
        tokenizer=options.tokenizer,
        text_field=options.text_field,
        append_eos=options.append_eos,
        eos_token=options.eos_token,
        chat_template=_read_template(options.chat_template),
        skip_bad=options.skip_bad,
        special_tokens=SpecialTokens(options.special_tokens),
        turns=Turns(options.turns),
        date=options.date or DATE,
        reward_weights=tuple(dict(options.reward_weight).items()),
    )
    request = PrepareRequest(
        inputs=options.inputs,
        out=options.out,
        encode=encode,
        format=Format(options.format),
        num_workers=options.workers,
        restart=options.restart,
    )
    try:
        with show_progress(sys.stderr) as report:
            metadata = prepare(request, report)
    except KeyboardInterrupt:
        print("Stopped. The same command again resumes from here.", file=sys.stderr)
        return EXIT_PREEMPTED
    except OSError as error:
        where = error.filename or options.out
        hint = "make room or another --out; the same command resumes where it was"
        raise DataError(
            f"file {where}", found=str(error.strerror or error), expected="files that can be read and written", hint=hint
        ) from error
    print(json.dumps({"out": options.out, **metadata}) if options.json else summary_text(options.out, metadata))
    return EXIT_DONE


def _read_template(path: str | None) -> str | None:
    if path is None:
        return None
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        problem = str(error.strerror) if isinstance(error, OSError) else "bytes that are not UTF-8"
        raise ConfigError(f"--chat-template {path}", found=problem, expected="a Jinja file", hint="--chat-template FILE.jinja") from error


def _tokenizer(options: argparse.Namespace) -> int:
    from ...training.data.builtin import train_tokenizer
    from ...training.data.encode import read_text
    from ...training.data.inputs import Format, find_inputs

    out = Path(options.out)
    if out.exists():
        raise ConfigError(f"--out {out}", found="something there already", expected="a new directory", hint="another --out")
    if options.vocab_size < 257:
        raise ConfigError("--vocab-size", found=str(options.vocab_size), expected="at least 257", hint="--vocab-size 8192")
    inputs = find_inputs(options.inputs, Format.TEXT)
    train_tokenizer((read_text(entry.path) for entry in inputs), options.vocab_size, out)
    print(f"{out}: byte-level BPE trained on {len(inputs)} files")
    return EXIT_DONE


def summary_text(prefix: str, metadata: dict[str, Any]) -> str:
    """The corpus in a few lines for a person."""
    lengths = metadata["lengths"]
    kind, objective = metadata.get("kind", "documents"), OBJECTIVES.get(metadata.get("kind", "documents"))
    lines = [
        f"{prefix}.bin + .idx{' + .mask.bin' if metadata['loss_mask'] else ''}{' + .scalars.bin' if kind == 'completions' else ''}",
        f"  {metadata['documents']:,} {kind}, {metadata['tokens']:,} tokens from {metadata['inputs']['files']:,} inputs"
        f" ({format_bytes(metadata['inputs']['bytes'])})",
        f"  tokens per {kind[:-1]}: " + ", ".join(f"{name} {value:,}" for name, value in lengths.items()),
    ]
    if metadata["loss_mask"]:
        lines.append(f"  {metadata['loss_tokens']:,} tokens are learnt, the rest is context")
    for reason, entry in metadata["skipped"].items():
        lines.append(f"  skipped {entry['count']:,}: {reason} (first: {entry['first']})")
    for warning, entry in metadata.get("warnings", {}).items():
        lines.append(f"  warning, {entry['count']:,} times: {warning} (first: {entry['first']})")
    if metadata.get("date"):
        lines.append(f"  the chat template asks for the date: it was {metadata['date']} (--date)")
    wanted = f" train.objective={objective}" if objective else ""
    corpus, tokenizer = _override("data.prefixes", "[{}]", prefix), _override("data.tokenizer", "{}", metadata["tokenizer"]["path"])
    lines.append(f"Train on it: {corpus} {tokenizer}{wanted}")
    return "\n".join(lines)


def _override(key: str, form: str, text: str) -> str:
    """`key=text` as a shell hands it on and Hydra reads it, in quotes where either needs them."""
    if re.fullmatch(r"[\w./-]+", text):
        return f"{key}={form.format(text)}"
    # Hydra reads a backslash as one unless a quote follows.
    escaped = re.sub(r'(\\*)("|$)', lambda match: match[1] * 2 + match[2].replace('"', '\\"'), text)
    return shlex.quote(f"{key}=" + form.format(f'"{escaped}"'))
