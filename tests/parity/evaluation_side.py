"""What the ranks of an evaluation do in tests: build a sharded model with given weights, open a small corpus, evaluate, train."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist

from efflaunch.model.build import RouterSettings, build_model
from efflaunch.parallel.pipeline.config import PipelineOrder
from efflaunch.parallel.sequence.attention import CpuKernel
from efflaunch.parallel.sequence.cost import CostModel, DegreeCost
from efflaunch.parallel.sequence.plan import Group, MicroBatch, StepPlan
from efflaunch.parallel.sequence.solve import solve_greedy, solve_static
from efflaunch.parallel.sharding.parts import write_shard
from efflaunch.parallel.topology import build_topology
from efflaunch.tests.data.corpora import write_corpus
from efflaunch.tests.parity.ranks_side import POLICIES, of_all_stages, stage_place
from efflaunch.tests.parity.reference import BASE, hf_config, lift_to_float64, reference_model
from efflaunch.training.evaluation.config import EvalConfig
from efflaunch.training.evaluation.corpus import open_corpora
from efflaunch.training.evaluation.measure import Evaluator
from efflaunch.training.evaluation.needle_texts import NeedleTask
from efflaunch.training.evaluation.needles import Cell, NeedleSet, TextCorpus
from efflaunch.training.micro_batches import count_targets, read_step
from efflaunch.training.objectives.heads import LanguageModelling
from efflaunch.training.step import backward_step
from efflaunch.training.step_setup import StepSetup

DOCUMENTS = (37, 5, 64, 1, 18, 29, 90)
LONGEST, CONTEXT, LENGTHS = 64, 16, (8, 32)
"""data.max_seq_len, eval.context_tokens, eval.lengths."""


def documents():
    generator = np.random.default_rng(7)
    tokens = [generator.integers(0, BASE["vocab_size"], n) for n in DOCUMENTS]
    return tokens, [generator.random(n) < 0.7 for n in DOCUMENTS]


def corpus(folder, masked):
    tokens, masks = documents()
    return write_corpus(
        folder / "held", [list(map(int, row)) for row in tokens], [list(map(int, row)) for row in masks] if masked else None
    )


def plan_for(layout, lengths):
    """The plan of a step of these lengths, by the name of a layout."""
    kind, world, degree, ulysses = layout
    if kind == "adaptive":
        degrees = tuple(
            DegreeCost(degree=d, ulysses=u, attention_s=1e-4 / d, linear_s=1e-3 / d) for d, u in ((1, 1), (2, 1), (4, 2)) if d <= world
        )
        return solve_greedy(lengths, CostModel(world_size=world, tokens_per_rank=80 // world, degrees=degrees, beta_s=1e-3))
    if kind == "idle":
        return StepPlan(world, tuple(lengths), (MicroBatch((Group(0, degree, ulysses, tuple(range(len(lengths)))),)),))
    return solve_static(lengths, world_size=world, degree=degree, ulysses=ulysses, tokens_per_rank=LONGEST, linear_cost_tokens=100)


def build(case, weights):
    """The sharded model of a case, as far as an evaluation looks at a session."""
    torch.set_num_threads(1)
    lift_to_float64()
    topology = build_topology(replicate=case.get("replicate", 1), device="cpu", stages=case.get("stages", 1), experts=case.get("ep", 1))
    device = torch.device("cpu")
    config, virtual = hf_config(case["family"]), case.get("virtual", 1)
    model = build_model(
        config, POLICIES[case.get("policy", "recompute")], topology.mesh, device=device, compute_dtype=torch.float64,
        seed=0, loss_chunk_tokens=7, expert_mesh=topology.experts,
        routers=RouterSettings(*case.get("router", (0.0, 0.0)), capacity_factor=case.get("capacity")),
        place=stage_place(topology, config.num_hidden_layers, virtual),
    )  # fmt: skip
    for name, parameter in model.named_parameters():
        write_shard(parameter, torch.from_numpy(weights[name]))
    setup = StepSetup(
        model=model, topology=topology, kernel=CpuKernel(), device=device, reduce_each=False,
        barrier_free=case.get("barrier_free", False), order=case.get("order", PipelineOrder.ONE_F_ONE_B), gpipe_in_flight=2,
    )  # fmt: skip
    return SimpleNamespace(device=device, topology=topology, model=model, step_setup=setup)


def evaluator(judged, layout):
    return Evaluator(
        judged, lambda lengths: plan_for(layout, lengths), batch_tokens=100, vocab_size=BASE["vocab_size"], context_tokens=CONTEXT
    )


def opened(prefix):
    config = EvalConfig(name="t", corpora={"held": prefix}, lengths=list(LENGTHS), context_tokens=CONTEXT)
    return open_corpora(config, max_seq_len=LONGEST, vocab_size=BASE["vocab_size"], tokenizer=None)[0]


def evaluate(case, layout, weights, prefix):
    result = evaluator(build(case, weights), layout).corpus(opened(prefix), lambda done, total: True)
    return result.fields()


ANSWERS = (1, 3, 4, 2, 3)
"""Tokens of the answer that each of some texts ends with."""


def needle_texts(family):
    """Texts of random tokens, and answers: of every second one the model's own greedy continuation."""
    model, _ = reference(family)
    generator, texts = np.random.default_rng(11), []
    for number, (length, answer) in enumerate(zip((37, 20, 64, 9, 50), ANSWERS, strict=True)):
        row = generator.integers(0, BASE["vocab_size"], length).tolist()
        for place in range(length - answer, length) if number % 2 == 0 else ():
            with torch.no_grad():
                row[place] = int(model(input_ids=torch.tensor([row[:place]]), use_cache=False).logits[0, -1].argmax())
        texts.append(row)
    return texts


def needle_set(texts):
    cells = tuple(Cell(NeedleTask.ONE_KEY, len(row), 0.5) for row in texts)
    first = np.array([len(row) - answer - 1 for row, answer in zip(texts, ANSWERS, strict=True)], dtype=np.int64)
    return NeedleSet(TextCorpus("needles", [np.array(row, dtype=np.int64) for row in texts]), cells, first)


def find_needles(case, layout, weights, texts):
    result = evaluator(build(case, weights), layout).needles(needle_set(texts), lambda done, total: True)
    return result.fields()


def reference(family):
    lift_to_float64()
    model = reference_model(family, torch.float64).eval()
    return model, {name: parameter.detach().numpy().copy() for name, parameter in model.named_parameters()}


def train(case, layout, weights, prefix, evaluates):
    """Weights after three AdamW steps, with or without evaluations around them; and what the model counted of its experts."""
    judged = build(case, weights)
    source, judge = opened(prefix).source("whole", 100, BASE["vocab_size"]), evaluator(judged, layout)
    optimizer, losses, found = torch.optim.AdamW(judged.model.parameters(), lr=1e-2), [], []
    for step in (0, 1, 2):
        if evaluates:
            found.append(judge.corpus(opened(prefix), lambda done, total: True).whole.total.mean)
        plan = plan_for(layout, source.lengths(step))
        works = read_step(source, step, plan, judged.topology.stage_rank, shares_experts=judged.topology.shares_experts)
        count = count_targets(works, judged.topology, judged.device)
        losses.append(backward_step(judged.step_setup, works, LanguageModelling(count, judged.device)).sum().item())
        judged.model.forward.expert_load.clear()
        optimizer.step()
        optimizer.zero_grad()
    picked = {name: np.array(parameter.full_tensor().detach()) for name, parameter in judged.model.named_parameters()}
    picked = of_all_stages(picked, judged.topology)
    return losses, picked if dist.get_rank() == 0 else None, found


def stop_after(case, layout, weights, prefix, steps):
    """What an evaluation says that is told to stop after so many steps, and how often it was asked."""
    asked = []

    def go_on(done, total):
        asked.append((done, total))
        return len(asked) < steps

    return evaluator(build(case, weights), layout).corpus(opened(prefix), go_on) is None, asked
