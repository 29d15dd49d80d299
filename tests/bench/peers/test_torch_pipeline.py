"""The peer's half of a model: both halves together are Hugging Face's whole one."""

from __future__ import annotations

import torch
from transformers import AutoConfig

from efflaunch.bench.peers.shape import Shape
from efflaunch.bench.peers.torch_pipeline import LAYERS, Documents, HalfOfModel, lengths_of


def test_halves_follow_each_other() -> None:
    fields = Shape(4, 16).fields(LAYERS)
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    first, last = HalfOfModel(config, 0), HalfOfModel(config, 1)
    assert len(first.layers) + len(last.layers) == LAYERS and first.head is None and last.embed is None
    assert last(first(torch.arange(6).unsqueeze(0))).shape == (1, 6, config.vocab_size)


def test_documents_are_shifted_once() -> None:
    documents = Documents(lengths_of(16, "equal"), 50)
    ids, targets = documents.tokens(0, 0, 0, 16)
    assert list(targets[:-1]) == list(ids[1:]) and targets[-1] == -100
