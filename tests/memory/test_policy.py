"""Memory policies that mean nothing are refused."""

from __future__ import annotations

import pytest

from efflaunch.errors import ConfigError
from efflaunch.memory.config import ActivationPlace, MemoryConfig, check_memory


@pytest.mark.parametrize(
    ("attention", "activations", "chunk", "message"),
    [
        (ActivationPlace.RECOMPUTE, ActivationPlace.KEEP, None, r"memory\.attention_output: found recompute with memory\.activations=keep"),
        (ActivationPlace.RECOMPUTE, ActivationPlace.RECOMPUTE, 0, r"memory\.chunk_tokens: found 0"),
        (ActivationPlace.KEEP, ActivationPlace.KEEP, 64, r"memory=recompute, or memory\.chunk_tokens=null"),
    ],
)
def test_refused(attention, activations, chunk, message):
    with pytest.raises(ConfigError, match=message):
        check_memory(
            MemoryConfig(
                name="x", layer_input=ActivationPlace.KEEP, attention_output=attention, activations=activations, chunk_tokens=chunk
            )
        )


@pytest.mark.parametrize(
    ("attention", "chunk"), [(ActivationPlace.RECOMPUTE, None), (ActivationPlace.KEEP, 64), (ActivationPlace.RECOMPUTE, 64)]
)
def test_accepted(attention, chunk):
    policy = MemoryConfig(
        name="x", layer_input=ActivationPlace.KEEP, attention_output=attention, activations=ActivationPlace.RECOMPUTE, chunk_tokens=chunk
    )
    check_memory(policy)
    assert policy.chunk_tokens == chunk
