"""The bench's problem in PyTorch: eager, compiled, under DDP or under Horovod.

    python scripts/peers/torch_peer.py PROBLEM_DIR --mode=compile --workdir=DIR ...
    torchrun --nproc_per_node=2 scripts/peers/torch_peer.py PROBLEM_DIR --mode=ddp ...
    horovodrun --gloo -np 2 python scripts/peers/torch_peer.py PROBLEM_DIR --mode=horovod ...

What PyTorch has that is fast is used: fused attention, RMS norm and AdamW. Several processes share
the batch; their loss is averaged when it is logged.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import problem
import torch
import torch.nn.functional as F
from torch import nn


def rope(x_BHTK, cos, sin):
    a, b = x_BHTK.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Layer(nn.Module):
    def __init__(self, model: dict[str, Any]) -> None:
        super().__init__()
        width, hidden = model["embed_dim"], model["mlp_dim"]
        self.num_heads = model["num_heads"]
        self.attention_norm = nn.RMSNorm(width, eps=model["norm_epsilon"])
        self.query, self.key, self.value, self.out = (
            nn.Linear(width, width, bias=False) for _ in range(4)
        )
        self.mlp_norm = nn.RMSNorm(width, eps=model["norm_epsilon"])
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x_BTD, cos, sin, mask_B1TT):
        h_BTD = self.attention_norm(x_BTD)
        q, k, v = (
            f(h_BTD).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for f in (self.query, self.key, self.value)
        )
        q, k = rope(q, cos, sin), rope(k, cos, sin)
        causal = mask_B1TT is None
        out_BHTK = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_B1TT, is_causal=causal)
        x_BTD = x_BTD + self.out(out_BHTK.transpose(1, 2).flatten(2))
        h_BTD = self.mlp_norm(x_BTD)
        return x_BTD + self.down(F.silu(self.gate(h_BTD)) * self.up(h_BTD))


class Transformer(nn.Module):
    def __init__(self, model: dict[str, Any], *, masked: bool) -> None:
        super().__init__()
        self.masked = masked
        self.embedding = nn.Embedding(model["vocab_size"], model["embed_dim"])
        self.layers = nn.ModuleList(Layer(model) for _ in range(model["num_layers"]))
        self.final_norm = nn.RMSNorm(model["embed_dim"], eps=model["norm_epsilon"])
        self.head = nn.Linear(model["embed_dim"], model["vocab_size"], bias=False)
        head_dim = model["embed_dim"] // model["num_heads"]
        frequency = model["rope"]["theta"] ** (-torch.arange(0, head_dim, 2) / head_dim)
        self.register_buffer("frequency", frequency, persistent=False)

    def forward(self, batch):
        """Mean cross-entropy over the batch's tokens, nats."""
        angles = batch["positions"][:, None, :, None] * self.frequency
        cos, sin, mask_B1TT = angles.cos(), angles.sin(), None
        if self.masked:
            segments_BT = batch["segment_ids"]
            same = segments_BT[:, None, :, None] == segments_BT[:, None, None, :]
            mask_B1TT = same & torch.ones(same.shape[-2:], dtype=torch.bool).tril()
        x_BTD = self.embedding(batch["tokens"])
        for layer in self.layers:
            x_BTD = layer(x_BTD, cos, sin, mask_B1TT)
        logits_BTV = self.head(self.final_norm(x_BTD))
        return F.cross_entropy(logits_BTV.flatten(0, 1), batch["targets"].flatten())


def make_model(config: dict[str, Any], params: dict[str, Any], *, masked: bool) -> Transformer:
    """The model with the problem's weights; torch keeps matrices as [out, in]."""
    model = Transformer(config["model"], masked=masked)
    named = {f"{name}.weight": params[name] for name in ("embedding", "final_norm", "head")}
    for i, layer in enumerate(params["layers"]):
        named |= {f"layers.{i}.{name}.weight": w for name, w in layer.items()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            w = torch.from_numpy(named.pop(name))
            parameter.copy_(w.T if w.ndim == 2 and "embedding" not in name else w)
    assert not named
    return model


def make_optimizer(config: dict[str, Any], model: nn.Module) -> torch.optim.AdamW:
    """AdamW with decay on the matrices alone."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        groups[name.split(".")[-2] not in problem.NOT_DECAYED].append(parameter)
    return torch.optim.AdamW(
        [
            {"params": groups[True], "weight_decay": config["weight_decay"]},
            {"params": groups[False], "weight_decay": 0.0},
        ],
        lr=config["learning_rate"],
        betas=(config["b1"], config["b2"]),
        eps=config["epsilon"],
        fused=True,
    )


def train(
    config: dict[str, Any],
    batches: dict[str, np.ndarray],
    *,
    loss_of: Callable[[Any], torch.Tensor],
    optimizer: Any,
    parameters: list[nn.Parameter],
    num_steps: int,
    log_every: int,
    log: Callable[[int, torch.Tensor], None],
    before_clip: Callable[[], None] = lambda: None,
) -> None:
    """Trains; calls `log(step, loss)` for step 1 and every `log_every`-th."""
    for step in range(1, num_steps + 1):
        batch = {name: torch.from_numpy(array[step - 1]) for name, array in batches.items()}
        loss = loss_of(batch)
        loss.backward()
        before_clip()
        nn.utils.clip_grad_norm_(parameters, config["optimizer"]["clip_norm"])
        optimizer.step()
        optimizer.zero_grad()
        if problem.is_logged(step, log_every):
            log(step, loss.detach())


def main() -> None:
    args = problem.parse_arguments(__doc__, mode=["eager", "compile", "ddp", "horovod"])
    config, batches = problem.read_config(args.problem), problem.read_batches(args.problem)
    assert (batches["weights"] == 1).all(), "the mean is over all tokens"
    masked = not problem.one_segment(batches)
    batches = {
        "tokens": batches["tokens"],
        "targets": batches["targets"].astype(np.int64),
        "positions": batches["positions"],
        "segment_ids": batches["segment_ids"],
    }
    model = make_model(config, problem.read_params(args.problem), masked=masked)
    parameters = list(model.parameters())
    optimizer: Any = make_optimizer(config["optimizer"], model)
    loss_of: Callable[[Any], torch.Tensor] = model
    rank, num_ranks, before_clip = 0, 1, lambda: None
    average: Callable[[torch.Tensor], torch.Tensor] = torch.clone

    if args.mode == "compile":
        loss_of = torch.compile(model)
    elif args.mode == "ddp":
        import torch.distributed as dist

        dist.init_process_group("gloo")
        rank, num_ranks = dist.get_rank(), dist.get_world_size()
        loss_of = nn.parallel.DistributedDataParallel(model)

        def average(loss: torch.Tensor) -> torch.Tensor:
            dist.all_reduce(loss)
            return loss / num_ranks
    elif args.mode == "horovod":
        import horovod.torch as hvd

        hvd.init()
        rank, num_ranks, average = hvd.rank(), hvd.size(), hvd.allreduce
        torch.set_num_threads(1)
        optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())
        step = optimizer.step

        def step_synchronized() -> None:
            with optimizer.skip_synchronize():
                step()

        before_clip, optimizer.step = optimizer.synchronize, step_synchronized

    share = batches["tokens"].shape[1] // num_ranks
    batches = {name: a[:, rank * share : (rank + 1) * share] for name, a in batches.items()}
    write = problem.Log(args.workdir) if rank == 0 else None

    def log(step: int, loss: torch.Tensor) -> None:
        mean = average(loss).item()
        if write is not None:
            write(step, mean)

    train(
        config,
        batches,
        loss_of=loss_of,
        optimizer=optimizer,
        parameters=parameters,
        num_steps=args.num_steps,
        log_every=args.log_every,
        log=log,
        before_clip=before_clip,
    )


if __name__ == "__main__":
    main()
