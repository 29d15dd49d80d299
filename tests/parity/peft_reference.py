"""The truth for adapters: peft's LoRA on a plain Hugging Face model, in one process."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from peft import LoraConfig, get_peft_model

from efflaunch.model.adapters.config import AdapterConfig, AdapterMethod
from efflaunch.model.adapters.lora import insert_adapters
from efflaunch.model.adapters.peft_config import settings_of
from efflaunch.model.build import build_on_meta
from efflaunch.tests.parity.ranks_side import run_plans
from efflaunch.tests.parity.reference import hf_config, lift_to_float64, reference_loss, reference_model
from efflaunch.tests.parity.test_parity import LENGTHS, make_documents, worst


def lora(**fields) -> AdapterConfig:
    """Adapters of a rank and a scaling that are nobody's default."""
    return AdapterConfig(name="lora", method=AdapterMethod.LORA, **{"rank": 3, "alpha": 7.0, **fields})


def our_name(name: str) -> str | None:
    """Our name of a parameter inside a model that peft changed; None for the frozen copy of a part that is trained whole."""
    if ".original_module." in name:
        return None
    for theirs, ours in ((".lora_A.default.weight", ".lora.A"), (".lora_B.default.weight", ".lora.B"),
                         (".lora_magnitude_vector.default.weight", ".lora.magnitude"),
                         (".base_layer.", "."), (".modules_to_save.default.", ".")):  # fmt: skip
        name = name.replace(theirs, ours)
    return name


def peft_model(family: str, dtype: torch.dtype, config: AdapterConfig):
    """(the model with its adapters inside, its parameters by our names); factors are random, so that no gradient is zero."""
    empty = build_on_meta(hf_config(family), dtype)
    insert_adapters(empty, config, dtype)
    fields = settings_of(config, None, [name for name, _ in empty.named_parameters()])
    wrapped = get_peft_model(reference_model(family, dtype), LoraConfig(**{k: v for k, v in fields.items() if k != "peft_type"} | {
        "inference_mode": False}))  # fmt: skip
    model = wrapped.get_base_model()
    named = {ours: p for name, p in model.named_parameters() if (ours := our_name(name)) is not None}
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in named.items():
            if parameter.requires_grad:
                noise = 0.3 * torch.randn(parameter.shape, generator=generator, dtype=dtype)
                parameter.copy_(noise if name.endswith((".lora.A", ".lora.B")) else parameter + noise)
    return model, named


def arrays(named, pick=lambda p: p):
    """Whole arrays of what `pick` finds of each parameter."""
    return {name: np.array(value.detach()) for name, p in named.items() if (value := pick(p)) is not None}


def lifted(family: str, dtype: str, config: AdapterConfig):
    """`peft_model` in a named precision, float64 lifted as on the other side."""
    if dtype == "float64":
        lift_to_float64()
    return peft_model(family, getattr(torch, dtype), config)


class Truth:
    """Weights to start from, loss and gradients of one plain process by `make(family, dtype, config)`, each made once.

    `make` returns (weights by our names, the model, its parameters by our names).
    """

    def __init__(self, make) -> None:
        self._make, self._configs = make, {}

    def of(self, family, config):
        """(weights, loss, gradients by our names) in float64."""
        self._configs[repr(config)] = config
        return self._of(family, repr(config))

    @lru_cache(maxsize=8)  # noqa: B019 - one of each module of tests
    def _of(self, family, key):
        weights, model, named = self._make(family, "float64", self._configs[key])
        loss = reference_loss(model, *make_documents(LENGTHS))
        loss.backward()
        return weights, loss.item(), arrays(named, lambda p: p.grad)


def lora_truth(family, dtype, config):
    """What `Truth` asks for, of `lifted`."""
    model, named = lifted(family, dtype, config)
    return arrays(named), model, named


def check_row(pool, truth, row):
    """A row's loss and gradients under each of its plans are the truth's, to 1e-10. `row`: (family, adapters, policy, more, plans)."""
    family, config, policy, more, plans = row
    weights, loss, gradients = truth.of(family, config)
    case = {"family": family, "dtype": "float64", "policy": policy, "adapter": config, **more}
    made = plans()
    answers = pool.run(run_plans, case, weights, *make_documents(LENGTHS), made, 0, ranks=made[0].world_size * more.get("stages", 1))
    for plan, (got_loss, got) in zip(made, answers[0][0], strict=True):
        assert abs(got_loss - loss) <= 1e-10 * abs(loss), f"{plan}: loss {got_loss} is not {loss}"
        error, name = worst(got, gradients)
        assert error <= 1e-10, f"{plan}: gradient of {name} is off by {error:.1e}"
