"""One forward shared out among processes: the numbers of a single one, and what travels between them."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open

from comfyui_helios.helios_core.config import CHUNK_LATENTS, PATCH
from comfyui_helios.helios_core.history import Memory
from comfyui_helios.helios_core.modulation import Modulation
from comfyui_helios.helios_core.parallel import share_out
from harness.errors import difference
from support import shared_out
from support.shared_out import DEGREES, DEGREES_OF_RUNS, FORWARDS, SCHEDULES, TASKS, WORKERS, forward, network, video

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Of each process: its results by name, and messages and bytes of its forwards."""
    folder = tmp_path_factory.mktemp("shared_out")
    paths = os.pathsep.join(str(ROOT / path) for path in (".", "tests", "scripts"))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    program = [sys.executable, shared_out.__file__, str(folder)]
    logs = [folder / f"{rank}.log" for rank in range(WORKERS)]
    workers = []
    try:
        for rank, log in enumerate(logs):
            with open(log, "wb") as file:
                workers.append(subprocess.Popen([*program, str(rank)], env=environment, stderr=file))
        while None in (codes := [worker.poll() for worker in workers]) and not any(codes):
            time.sleep(0.1)
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    assert codes == [0] * WORKERS, "\n".join(log.read_text() for log in logs)
    results = []
    for rank in range(WORKERS):
        with safe_open(folder / f"{rank}.safetensors", "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            results.append((tensors, json.loads(file.metadata()["counts"])))
    return results


@pytest.fixture
def several_cards(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import several_cards

    return several_cards


@pytest.mark.parametrize("name", [name for name, case in FORWARDS.items() if case.dtype == torch.float32])
def test_a_forward_is_that_of_one_process(ranks, name):
    expected = forward(FORWARDS[name])
    for degree in DEGREES:
        assert difference(ranks[0][0][f"{degree} {name}"], expected) <= 1e-5


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("variant", SCHEDULES)
def test_a_whole_run_is_that_of_one_process(ranks, variant, task):
    expected = video(variant, task)
    for degree in DEGREES_OF_RUNS:
        assert difference(ranks[0][0][f"{degree} {variant} {task}"], expected) <= 2e-5


def test_all_processes_have_the_same_result(ranks):
    """To the last bit: else their loops would drift apart."""
    for rank, (tensors, _) in enumerate(ranks):
        forwards = len(FORWARDS) * sum(rank < degree for degree in DEGREES)
        runs = len(SCHEDULES) * len(TASKS) * sum(rank < degree for degree in DEGREES_OF_RUNS)
        assert len(tensors) == forwards + runs
        for name, tensor in tensors.items():
            assert torch.equal(tensor, ranks[0][0][name])


def test_bf16_is_no_worse_than_in_one_process(ranks):
    case = FORWARDS["bf16"]
    exact = forward(replace(case, dtype=torch.float32))
    alone = (forward(case).float() - exact).square().mean().sqrt()
    for degree in DEGREES:
        together = ranks[0][0][f"{degree} bf16"]
        assert together.dtype == torch.bfloat16
        assert 0 < (together.float() - exact).square().mean().sqrt() <= 1.1 * alone


@pytest.mark.parametrize("name", FORWARDS)
def test_what_travels_is_what_theory_says(ranks, several_cards, name):
    """To the byte and the message, in every process."""
    case = FORWARDS[name]
    model = network(**case.config)
    noisy = CHUNK_LATENTS * case.noisy[0] * case.noisy[1] // PATCH**2
    past = Memory.empty(1, *case.size, case.layout).history()
    history = model.prepare_history(past).tokens.shape[1]
    for rank, (_, counts) in enumerate(ranks):
        for degree in filter(lambda degree: rank < degree, DEGREES):
            sent = several_cards.sent(model.config, history, noisy, degree, rank, case.batch, case.dtype.itemsize)
            assert counts[f"{degree} {name}"] == [several_cards.messages(model.config), sent]


def test_the_documents_tables_are_those_of_the_program(several_cards):
    document = several_cards.FILE.read_text(encoding="utf-8")
    assert several_cards.with_tables(document) == document


@pytest.mark.parametrize(
    ("tokens", "heads", "message"),
    [(2, 4, "2 tokens of a chunk are too few for 3 devices"), (9, 2, "2 attention heads cannot be shared out among 3")],
)
def test_more_devices_than_there_is_to_share_are_refused(monkeypatch, tokens, heads, message):
    monkeypatch.setattr(dist, "get_world_size", lambda group: 3)
    monkeypatch.setattr(dist, "get_rank", lambda group: 0)
    block, row = network(num_attention_heads=heads).blocks[0], torch.zeros(1, 6, 1)
    time, rope = Modulation(row, row, history_tokens=7), torch.zeros(2, 7 + tokens, 12)
    with pytest.raises(ValueError, match=message):
        share_out(None)(0, block, torch.zeros(1, 7 + tokens, 24 * heads), None, time, rope, False)
