"""What two processes run together: started by torchrun in `test_train_processes.py`."""

import json
import sys
from pathlib import Path

import torch
from torch import distributed

from lexigraft import train
from lexigraft.models.adapter_files import lora_config, make_trainable, require_saved, write_trained
from lexigraft.models.load import load_model
from lexigraft.models.new_rows import whole
from lexigraft.models.objectives import NextToken
from lexigraft.models.packing import collate
from lexigraft.models.preparation import prepare, read_texts
from lexigraft.models.training import Schedule, parameter_groups
from lexigraft.models.whole_model import make_all_trainable

STEPS, CLIP = 4, 0.05


def together(folder: Path, cases: list) -> None:
    """`train`, as `accelerate launch -m lexigraft train` calls it, once per case."""
    for source, output, options in cases:
        train(source, corpus=[folder / "corpus.txt"], output=output, **options)


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
        written = Path(output) / str(distributed.get_rank())
        write_trained(written, shared.model, shared.rows)
        require_saved(written, shared.model, shared.rows)
        write_trained(written / "alone", alone.model, alone.rows)
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
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
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
    {"together": together, "sharded": sharded}[what](
        place, json.loads((place / f"{what}.json").read_text())
    )
