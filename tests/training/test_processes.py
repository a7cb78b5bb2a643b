"""One run on several processes: gloo on the CPU, as NCCL is on GPUs."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.utils import DistributedType
from processes import assert_same_run, final, finish_all, start_all, wait_for_step
from safetensors.torch import load_file
from torch import multiprocessing, nn

from danceopd.recipe import RecipeError, dump_recipe
from danceopd.runs import train
from danceopd.training import processes as processes_module
from danceopd.training.assemble import assemble
from danceopd.training.checkpoint import RunStateError, checkpoints, load_checkpoint_state
from danceopd.training.optimizer import make_optimizer
from danceopd.training.processes import Processes, SeveralProcesses
from danceopd.training.run_folder import RunFolder

CPU = torch.device("cpu")
NOTHING_TRAINED = [
    *(f"{part}={{}}" for part in ("query", "rollout", "routing")),
    "student={init: {t2i: 1.0, edit: 3.0}, init_mode: merged}",
    "train={steps: 0, precision: fp32}",
]


def shares_by_hand(recipe, updates):
    """A run of two processes, both computed here: the student's weights, and each update's loss."""
    of_run = [Processes(rank, 2) for rank in range(2)]
    assemblies = [assemble(recipe, device=CPU, processes=process) for process in of_run]
    generators = [process.generator(recipe.train.seed) for process in of_run]
    part = assemblies[0].recipe.train
    optimizers = [make_optimizer(list(a.student.parameters.values()), part) for a in assemblies]
    losses = []
    for _ in range(updates):
        routes = [None, None]
        if recipe.rollout.pool is None:
            routes = assemblies[0].method.draw_routes(recipe.train.batch_size, generators[0]).chunk(2)
        results = []
        for assembly, generator, drawn in zip(assemblies, generators, routes, strict=True):
            results += assembly.method.update(
                assembly.student.model,
                batch_size=part.batch_size,
                micro_batches=part.gradient_accumulation_steps,
                generator=generator,
                routes=drawn,
                backward=torch.Tensor.backward,
            )
        losses.append(sum(float(result.loss.detach()) for result in results) / len(results))
        for one, other in zip(*(a.student.parameters.values() for a in assemblies), strict=True):
            mean = (one.grad + other.grad) / 2
            one.grad, other.grad = mean, mean.clone()
        for assembly, optimizer in zip(assemblies, optimizers, strict=True):
            nn.utils.clip_grad_norm_(list(assembly.student.parameters.values()), recipe.train.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
    return dict(assemblies[0].student.parameters), losses


def assert_as_by_hand(recipe, folder):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        by_hand, losses = shares_by_hand(recipe, recipe.train.steps)
    finally:
        torch.set_num_threads(threads)
    state, tensors = final(folder)
    for name, weight in by_hand.items():
        assert torch.equal(tensors["student"][name], weight.detach()), name
    assert [line["loss"] for line in folder.metrics()] == losses
    samples = sum(line.get(f"samples/{route}", 0) for line in folder.metrics() for route in ("t2i", "edit"))
    assert samples == state.calls["train"] == recipe.train.steps * recipe.train.batch_size


def test_two_processes_under_a_launcher_train_the_mean_of_their_shares(tiny, tmp_path):
    parts = "train.batch_size=8", "train.gradient_accumulation_steps=4"
    recipe = tiny("train.lr_warmup_steps=0", "train.max_grad_norm=1e-2", *parts)
    path = tmp_path / "r.yaml"
    path.write_text(dump_recipe(recipe))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ended = subprocess.run([*launcher, "-m", "danceopd", "train", str(path)], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("trained; next:") == 1
    assert_as_by_hand(recipe, RunFolder(Path(recipe.output)))


def test_streaming_processes_go_on_exactly_after_a_kill(tiny, tmp_path):
    extra = ["rollout={mode: streaming, pool: 16}", "routes.0.data.size=6", "routes.1.data.size=5"]  # epochs end
    extra.append("train.lr_warmup_steps=0")
    whole = tiny(f"output={tmp_path / 'whole'}", *extra)
    codes, errors = finish_all(start_all(whole, tmp_path / "whole.yaml"))
    assert codes == [0, 0], errors
    assert_as_by_hand(whole, RunFolder(tmp_path / "whole"))

    cut = tiny(f"output={tmp_path / 'cut'}", *extra)
    running = start_all(cut, tmp_path / "cut.yaml")
    wait_for_step(RunFolder(tmp_path / "cut"), 3)
    for process in running:
        process.kill()
        process.communicate()
    assert load_checkpoint_state(checkpoints(tmp_path / "cut" / "checkpoints")[-1]).step < 6
    codes, errors = finish_all(start_all(cut, tmp_path / "cut.yaml", "--resume"))
    assert codes == [0, 0], errors
    assert_same_run(RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "cut"))
    last = [checkpoints(tmp_path / name / "checkpoints")[-1] for name in ("whole", "cut")]
    for name in ("method.safetensors", "method-1.safetensors"):
        one, other = (load_file(path / name) for path in last)
        assert all(torch.equal(one[key], other[key]) for key in one)

    with pytest.raises(RunStateError, match="was written by 2 processes, and this run has one process"):
        train(cut, resume=True)


def test_routes_and_what_a_router_goes_by_are_the_whole_updates(tiny, tmp_path):
    recipe = tiny("routing={per: step, stratified: false, by: gap, decay: 0}", "train.steps=8")
    codes, errors = finish_all(start_all(recipe, tmp_path / "r.yaml"))
    assert codes == [0, 0], errors
    folder, last_loss = RunFolder(Path(recipe.output)), {}
    for line in folder.metrics():
        counts = {name: line[f"samples/{name}"] for name in ("t2i", "edit") if f"samples/{name}" in line}
        assert list(counts.values()) == [4]
        last_loss |= {name: line[f"loss/{name}"] for name in counts}
    for end in ("", "-1"):
        carried = load_file(checkpoints(folder.checkpoints)[-1] / f"method{end}.safetensors")
        assert carried["loss_averages"].tolist() == pytest.approx([last_loss["t2i"], last_loss["edit"]])


def test_a_signal_to_one_process_stops_all_after_the_same_update(tiny, tmp_path):
    recipe = tiny(f"output={tmp_path / 'run'}", "train.steps=500", "train.checkpointing_steps=400")
    running = start_all(recipe, tmp_path / "r.yaml")
    folder = RunFolder(tmp_path / "run")
    wait_for_step(folder, 2)
    running[1].send_signal(signal.SIGTERM)
    codes, errors = finish_all(running)
    assert codes == [143, 2]
    assert "SIGTERM: stopped after update" in errors[0]
    assert not errors[1].strip()
    state, _ = final(folder)
    assert state.step == len(folder.metrics()) >= 2
    assert len(state.others) == 1


def test_what_all_processes_would_refuse_is_told_once(tiny, tmp_path):
    recipe = tiny(f"output={tmp_path / 'run'}", "routes.0.data.size=1")
    codes, errors = finish_all(start_all(recipe, tmp_path / "r.yaml"))
    assert codes == [2, 2]
    assert "routes.0.data: a route needs an example for each of 2 processes, found 1" in errors[0]
    assert not errors[1].strip()


def test_a_share_is_an_even_part_of_batch_and_pool(tiny):
    recipe = tiny("rollout={mode: streaming, pool: 24}", "train.batch_size=6")
    part = Processes(1, 3).share(recipe)
    assert (part.train.batch_size, part.rollout.pool) == (2, 8)
    assert Processes().share(recipe) is recipe
    for count, (batch, passes) in {2: (6, 2), 4: (3, 1), 12: (1, 1)}.items():  # micro-batches of 3 at most
        part = Processes(0, count).share(tiny("train.batch_size=12", "train.gradient_accumulation_steps=4")).train
        assert (part.batch_size, part.gradient_accumulation_steps) == (batch, passes)
    with pytest.raises(RecipeError, match=r"train.batch_size: 6 cannot be shared out evenly among 4 processes"):
        Processes(0, 4).share(recipe)
    groups = tiny("method=flow_opd", "query={}", "train.batch_size=12", "flow_opd.group_size=3")
    assert Processes(0, 2).share(groups).train.batch_size == 6
    sizes = "train.batch_size=40", "train.gradient_accumulation_steps=5", "flow_opd.group_size=4"
    parts = tiny("method=flow_opd", "query={}", *sizes)
    assert Processes(0, 2).share(parts).train.gradient_accumulation_steps == 5  # 4 of 5 would split the groups of 4
    with pytest.raises(RecipeError, match=r"the 4 samples of each of 3 processes do not divide .* multiples .* 3"):
        Processes(0, 3).share(groups)
    merged = tiny("method=weight_merge", *NOTHING_TRAINED)
    assert Processes(0, 3).share(merged) is merged
    with pytest.raises(RecipeError, match="gradient_cosine_steps compares whole gradients"):
        Processes(0, 2).share(tiny("train.gradient_cosine_steps=2"))


@pytest.mark.parametrize("engine", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_MEGATRON_LM"])
def test_a_launcher_that_cuts_networks_up_is_refused(monkeypatch, engine):
    class Launched:
        num_processes, process_index, distributed_type = 2, 0, DistributedType.MULTI_CPU

        def __init__(self, **options):
            pass

    monkeypatch.setattr("danceopd.training.processes.PartialState", Launched)
    monkeypatch.setenv(engine, "true")
    with pytest.raises(SeveralProcesses, match=f"asks for {engine}; every process holds all networks whole"):
        Processes.launched().__enter__()


def test_every_process_has_random_numbers_of_its_own():
    streams = [torch.rand(4, generator=Processes(rank, 3).generator(5)) for rank in range(3)]
    assert torch.equal(streams[0], torch.rand(4, generator=torch.Generator().manual_seed(5)))
    assert len({tuple(stream.tolist()) for stream in streams}) == 3


def _among_two(rank: int, store: str, out: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    processes_module.EXCHANGED = 3  # so that gradients go in several groups
    parameters = [nn.Parameter(torch.zeros(2)) for _ in range(4)]
    gradients = [[1.0, 2.0], [3.0, 5.0], None, None] if rank == 0 else [[5.0, 4.0], None, None, [2.0, 8.0]]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = None if gradient is None else torch.tensor(gradient)
    processes = Processes(rank, 2)
    processes.average_gradients(parameters)
    found = [None if parameter.grad is None else parameter.grad.tolist() for parameter in parameters]
    failures = []
    for at_fault in (0, 1):
        try:
            processes.together(lambda: 1 // (rank != at_fault))  # noqa: B023
        except Exception as error:
            failures.append(f"{type(error).__name__}: {error}")
    told = [processes.together(lambda: rank + 5), processes.first(rank), processes.gather_on_main(rank)]
    (out / f"{rank}.json").write_text(json.dumps([found, failures, told]))
    torch.distributed.destroy_process_group()  # or the interpreter may abort where the other has gone before


def test_what_goes_from_process_to_process(tmp_path):
    multiprocessing.spawn(_among_two, (str(tmp_path / "store"), tmp_path), nprocs=2)
    by_rank = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for rank, (gradients, failures, told) in enumerate(by_rank):
        assert gradients == [[3.0, 3.0], [1.5, 2.5], None, [1.0, 4.0]], "what none has stays away"
        expected = [f"FailedElsewhere: process {at_fault}: integer division" for at_fault in (0, 1)]
        expected[rank] = "ZeroDivisionError: integer division"
        assert [found[: len(start)] for found, start in zip(failures, expected, strict=True)] == expected
        assert told == [[5, 6], 0, [0, 1] if rank == 0 else []]
