"""One run on several processes: gloo on the CPU, as NCCL is on GPUs."""

import signal
from pathlib import Path

import pytest
import torch
from processes import assert_same_run, final, finish, finish_all, start, start_all, wait_for_step
from safetensors.torch import load_file
from torch import multiprocessing, nn

from danceopd.recipe import RecipeError
from danceopd.training import processes as processes_module
from danceopd.training.assemble import assemble
from danceopd.training.checkpoint import checkpoints, load_checkpoint_state
from danceopd.training.optimizer import make_optimizer
from danceopd.training.processes import Processes
from danceopd.training.run_folder import RunFolder

CPU = torch.device("cpu")
STREAMING = "rollout={mode: streaming, pool: 16}"


def shares_by_hand(recipe, updates):
    """The student's weights after a run of two processes, both computed here."""
    of_run = [Processes(rank, 2) for rank in range(2)]
    assemblies = [assemble(recipe, device=CPU, processes=process) for process in of_run]
    generators = [process.generator(recipe.train.seed) for process in of_run]
    optimizers = [make_optimizer(list(a.student.parameters.values()), recipe.train) for a in assemblies]
    for _ in range(updates):
        for assembly, generator in zip(assemblies, generators, strict=True):
            assembly.method.update(
                assembly.student.model,
                batch_size=2,
                micro_batches=1,
                generator=generator,
                backward=torch.Tensor.backward,
            )
        for one, other in zip(*(a.student.parameters.values() for a in assemblies), strict=True):
            mean = (one.grad + other.grad) / 2
            one.grad, other.grad = mean, mean.clone()
        for assembly, optimizer in zip(assemblies, optimizers, strict=True):
            nn.utils.clip_grad_norm_(list(assembly.student.parameters.values()), recipe.train.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
    return dict(assemblies[0].student.parameters)


@pytest.mark.parametrize("mode", ["rollout.mode=fresh", STREAMING])
def test_two_processes_train_the_mean_of_their_shares_and_go_on_exactly_after_a_kill(tiny, tmp_path, mode):
    extra = [mode, "train.lr_warmup_steps=0", "routes.0.data.size=6", "routes.1.data.size=5"]  # epochs end
    whole = tiny(f"output={tmp_path / 'whole'}", *extra)
    codes, errors = finish_all(start_all(whole, tmp_path / "whole.yaml"))
    assert codes == [0, 0], errors
    folder, threads = RunFolder(tmp_path / "whole"), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        by_hand = shares_by_hand(whole, whole.train.steps)
    finally:
        torch.set_num_threads(threads)
    state, tensors = final(folder)
    for name, weight in by_hand.items():
        assert torch.equal(tensors["student"][name], weight.detach()), name
    assert sum(line[f"samples/{route}"] for line in folder.metrics() for route in ("t2i", "edit")) == 6 * 4
    assert state.calls["train"] == 6 * 4

    if mode != STREAMING:  # which carries all that fresh rollouts do, and its pool
        return
    cut = tiny(f"output={tmp_path / 'cut'}", *extra)
    running = start_all(cut, tmp_path / "cut.yaml")
    wait_for_step(RunFolder(tmp_path / "cut"), 3)
    for process in running:
        process.kill()
        process.communicate()
    assert load_checkpoint_state(checkpoints(tmp_path / "cut" / "checkpoints")[-1]).step < 6
    codes, errors = finish_all(start_all(cut, tmp_path / "cut.yaml", "--resume"))
    assert codes == [0, 0], errors
    assert_same_run(folder, RunFolder(tmp_path / "cut"))
    last = [checkpoints(tmp_path / name / "checkpoints")[-1] for name in ("whole", "cut")]
    for name in ("method.safetensors", "method-1.safetensors"):
        one, other = (load_file(path / name) for path in last)
        assert all(torch.equal(one[key], other[key]) for key in one)

    code, _, error = finish(start(cut, tmp_path / "cut.yaml", "--resume", "--set", "train.steps=8"))
    assert code == 2
    assert "was written by 2 processes, and this run has one process" in error


def test_routing_per_step_and_by_gap_is_the_whole_updates(tiny, tmp_path):
    recipe = tiny(f"output={tmp_path / 'run'}", "routing={per: step, stratified: false, by: gap}", "train.steps=8")
    codes, errors = finish_all(start_all(recipe, tmp_path / "r.yaml"))
    assert codes == [0, 0], errors
    folder = RunFolder(tmp_path / "run")
    counts = [[line.get(f"samples/{route}", 0) for route in ("t2i", "edit")] for line in folder.metrics()]
    assert all(sorted(count) == [0, 4] for count in counts)
    assert len({tuple(count) for count in counts}) == 2, "both routes had an update"
    last = checkpoints(folder.checkpoints)[-1]
    one, other = (load_file(last / f"method{end}.safetensors") for end in ("", "-1"))
    assert torch.equal(one["loss_averages"], other["loss_averages"])


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
    with pytest.raises(RecipeError, match=r"train.batch_size: 6 cannot be shared out evenly among 4 processes"):
        Processes(0, 4).share(recipe)
    with pytest.raises(RecipeError, match=r"on 6 processes.*batch_size 1 is not a multiple of gradient_accumulation"):
        Processes(0, 6).share(tiny("train.batch_size=6", "train.gradient_accumulation_steps=3"))


def test_every_process_has_random_numbers_of_its_own():
    streams = [torch.rand(4, generator=Processes(rank, 3).generator(5)) for rank in range(3)]
    assert torch.equal(streams[0], torch.rand(4, generator=torch.Generator().manual_seed(5)))
    assert len({tuple(stream.tolist()) for stream in streams}) == 3


def _average(rank: int, store: str, out: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    processes_module.EXCHANGED = 3  # so that gradients go in several groups
    parameters = [nn.Parameter(torch.zeros(2)) for _ in range(4)]
    gradients = [[1.0, 2.0], [3.0, 5.0], None, None] if rank == 0 else [[5.0, 4.0], None, None, [2.0, 8.0]]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = None if gradient is None else torch.tensor(gradient)
    Processes(rank, 2).average_gradients(parameters)
    torch.save([parameter.grad for parameter in parameters], out / f"{rank}.pt")


def test_gradients_are_averaged_and_those_that_none_has_stay_away(tmp_path):
    multiprocessing.spawn(_average, (str(tmp_path / "store"), tmp_path), nprocs=2)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert found[2] is None
        assert [found[i].tolist() for i in (0, 1, 3)] == [[3.0, 3.0], [1.5, 2.5], [1.0, 4.0]]
