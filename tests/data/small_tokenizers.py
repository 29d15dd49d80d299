"""Small tokenizers of every kind there is, trained on a few words, as Hugging Face directories."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

TEXT = ["Two plus two is four. Five and three? [INST] Kind words are used by the assistant, playing and calling tools."] * 3
SPECIAL = ["<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def _without_bytes(tokenizer: Any) -> Any:
    """Pieces for bytes are in the vocabulary, and no tokens of their own in a text."""
    from tokenizers import Tokenizer

    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] in SPECIAL]
    return Tokenizer.from_str(json.dumps(content))


def _with_start(tokenizer: Any, start: str = "<s>") -> Any:
    from tokenizers import processors

    tokenizer.post_processor = processors.TemplateProcessing(single=f"{start} $A", special_tokens=[(start, tokenizer.token_to_id(start))])
    return tokenizer


def _byte_level(*, trim: bool) -> Any:
    """As GPT-2's and Llama 3's: bytes; `trim`: offsets leave out the space at a token's beginning."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=330, special_tokens=SPECIAL, initial_alphabet=alphabet))
    parts = [processors.ByteLevel(trim_offsets=True)] if trim else []
    start = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.post_processor = processors.Sequence([*parts, start])
    return tokenizer


def _prepending() -> Any:
    """As Llama 2's: an underscore before every text, and after every special token."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers

    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=340, special_tokens=[*SPECIAL, *BYTES]))
    return _with_start(_without_bytes(tokenizer))


def _metaspace(scheme: str) -> Any:
    """As Mistral's: words with their space, one put before the first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)  # type: ignore[arg-type]
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=340, special_tokens=[*SPECIAL, *BYTES]))
    return _with_start(_without_bytes(tokenizer))


def _replacing() -> Any:
    """As Gemma's: an underscore for every space, and none that nobody wrote."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=340, special_tokens=[*SPECIAL, *BYTES]))
    return _with_start(_without_bytes(tokenizer))


def _stripping() -> Any:
    """As Phi-3's: tokens of turns swallow the white space after them."""
    from tokenizers import Tokenizer

    content = json.loads(_prepending().to_str())
    for token in content["added_tokens"]:
        token["rstrip"] = token["content"].startswith("<|")
    return Tokenizer.from_str(json.dumps(content))


def _unigram() -> Any:
    """As T5's: the likeliest pieces, an end token that the tokenizer puts itself."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(vocab_size=80, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    return tokenizer


def _word_piece() -> Any:
    """As BERT's: lower case, pieces of words, spaces trimmed."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    tokenizer.train_from_iterator(TEXT, trainers.WordPieceTrainer(vocab_size=120, special_tokens=SPECIAL))
    return _with_start(tokenizer)


KINDS: dict[str, Callable[[], Any]] = {
    "byte_level": lambda: _byte_level(trim=False),
    "trimming": lambda: _byte_level(trim=True),
    "prepending": _prepending,
    "replacing": _replacing,
    "stripping": _stripping,
    "metaspace_first": lambda: _metaspace("first"),
    "metaspace_always": lambda: _metaspace("always"),
    "unigram": _unigram,
    "word_piece": _word_piece,
}


def save_tokenizer(kind: str, folder: Path, chat_template: str | None = None) -> str:
    """The tokenizer of a kind, in a new folder."""
    folder.mkdir(parents=True)
    KINDS[kind]().save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    if chat_template is not None:
        config["chat_template"] = chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return str(folder)
