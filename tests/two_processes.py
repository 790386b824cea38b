"""What two processes run together: started by torchrun in `test_train_processes.py`."""

import json
import os
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import distributed

from lexigraft import train
from lexigraft.errors import StoppedError
from lexigraft.models import training
from lexigraft.models.adapter_files import lora_config, make_trainable, require_saved, write_trained
from lexigraft.models.load import load_model
from lexigraft.models.objectives import NextToken
from lexigraft.models.packing import collate
from lexigraft.models.preparation import prepare, read_texts
from lexigraft.models.row_optimizer import RowAdamW
from lexigraft.models.shards import whole
from lexigraft.models.training import Monitor, Schedule, parameter_groups
from lexigraft.models.whole_model import make_all_trainable

STEPS, CLIP = 4, 0.05


def copied(folder: Path, cases: list) -> None:
    """`train`, as `accelerate launch -m lexigraft train` calls it, once per case.

    With `stop_at`, a signal ends it after so many steps, and the same command resumes it. `clip`
    is another norm to clip gradients to. `slow`: seconds that the second process takes longer to
    come to what was trained.
    """
    plain = training.CLIP_NORM
    for source, output, options in cases:
        slow_to_gather(options.pop("slow", 0))
        stop, training.CLIP_NORM = options.pop("stop_at", None), options.pop("clip", plain)
        arguments = {"corpus": [folder / "corpus.txt"], "output": output, **options}
        if stop is not None:
            with stopping_at(stop):
                train(source, **arguments)
            arguments["resume"] = True
        train(source, **arguments)


def slow_to_gather(seconds: float) -> None:
    step = sys.modules["lexigraft.steps.train"]
    plain = step._gathered

    def gathered(*arguments, **options):
        time.sleep(seconds * distributed.get_rank())
        return plain(*arguments, **options)

    if seconds:
        step._gathered = gathered


@contextmanager
def stopping_at(step: int):
    """SIGTERM for the first process, while a step is under way."""
    plain = Monitor.on_step_begin

    def on_step_begin(self, args, state, control, **more):
        plain(self, args, state, control, **more)
        if state.global_step == step and distributed.get_rank() == 0:
            os.kill(os.getpid(), signal.SIGTERM)

    Monitor.on_step_begin = on_step_begin
    try:
        yield
    except StoppedError:
        pass
    else:
        raise AssertionError("it was not stopped")
    finally:
        Monitor.on_step_begin = plain


def zero(folder: Path, cases: list) -> None:
    """`copied`, as `accelerate launch --use_deepspeed --zero_stage N` does it."""
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    os.environ["DS_ACCELERATOR"] = "cpu"
    copied(folder, cases)


def fsdp2(folder: Path, cases: list) -> None:
    """`copied`, as `accelerate launch --use_fsdp --fsdp_version 2` does it.

    Accelerate takes FSDP on accelerators alone; here it is let on a CPU. All the rest is its own.
    """
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    plain = AcceleratorState.__init__

    def on_a_cpu(self, *arguments, fsdp_plugin=None, **options):
        is_new = not AcceleratorState._shared_state
        plain(self, *arguments, fsdp_plugin=fsdp_plugin, **options)
        if is_new and fsdp_plugin is not None:
            assert self.distributed_type == DistributedType.MULTI_CPU
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = on_a_cpu
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    os.environ["FSDP_VERSION"] = "2"
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "true"  # what the launcher says by default
    os.environ["FSDP_AUTO_WRAP_POLICY"] = "TRANSFORMER_BASED_WRAP"
    copied(folder, cases)


def sharded(folder: Path, cases: list) -> None:
    """Each case under torch's `fully_shard`, beside the same steps in one process alone."""
    from test_train import settings

    distributed.init_process_group("gloo")
    for source, output, mode in cases:
        texts = read_texts([folder / "corpus.txt"], (), (), seed=0, measured_bytes=1000)
        job = prepare(Path(source), texts, settings(mode=mode, block_size=32, max_bytes=3000))
        alone, shared = Run(job, mode), Run(job, mode, shard=True)
        losses = [(alone.step(i), shared.step(i)) for i in range(STEPS)]
        for one, other in losses:
            assert abs(one - other) < 1e-4 * one, losses
        before = dict(load_model(job.folder).named_parameters())
        for (name, one), other in zip(
            alone.model.named_parameters(), shared.model.parameters(), strict=True
        ):
            if not one.requires_grad:
                plain = name.replace("base_model.model.", "").replace(".inner", "")
                plain = plain.replace(".base_layer", "")
                assert torch.equal(whole(other), before[plain]), name
            else:
                torch.testing.assert_close(whole(other), one, rtol=1e-3, atol=2e-4, msg=name)
        assert torch.equal(alone.rows.moved() > 0, shared.rows.moved() > 0)
        assert (alone.rows.moved() > 0).sum() > 10
        write_trained(Path(output), shared.model, shared.rows)
        require_saved(Path(output), shared.model, shared.rows)
        write_trained(Path(output) / "alone", alone.model, alone.rows)
    distributed.destroy_process_group()


class Run:
    """A loop of a few steps, by one process with the whole batch or by two with a half each."""

    def __init__(self, job, mode, *, shard=False):
        model = load_model(job.folder)
        if mode == "full":
            self.model, self.rows = model, make_all_trainable(model, job.ids, old_rows=False)
        else:
            lora = lora_config(4, 8.0) if mode == "lora" else None
            self.model, self.rows = make_trainable(model, job.ids, lora)
        if shard:
            from torch.distributed.fsdp import fully_shard

            for layer in model.model.layers:
                fully_shard(layer)
            fully_shard(self.model)
        self.model.train()
        schedule = Schedule(STEPS, 1, 1e-3, 3e-3, STEPS, frozenset(), 0, weight_decay=0.1)
        groups = parameter_groups(self.model, self.rows, schedule)
        self.optimizer = RowAdamW(groups, weight_decay=0.0)
        self.blocks, self.shard, self.objective = job.blocks, shard, NextToken()

    def step(self, number):
        world, rank = distributed.get_world_size(), distributed.get_rank()
        places = range(number * world, (number + 1) * world)
        count = sum(int((self.blocks.targets[i] >= 0).sum()) for i in places)
        mine = [places[rank]] if self.shard else places
        total, _ = self.objective.loss(self.model, collate([self.blocks[i] for i in mine]))
        self.optimizer.zero_grad()
        (total * (world if self.shard else 1) / count).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        found = total.detach().clone()
        if self.shard:
            distributed.all_reduce(found)
        return found.item() / count


if __name__ == "__main__":
    torch.set_num_threads(1)
    what, place = sys.argv[1], Path(sys.argv[2])
    ways = {"copied": copied, "fsdp2": fsdp2, "sharded": sharded}
    if what.startswith("zero"):
        os.environ["ACCELERATE_DEEPSPEED_ZERO_STAGE"] = what.removeprefix("zero")
    ways.get(what, zero)(place, json.loads((place / f"{what}.json").read_text()))
