"""Run by test_retrofit_distributed.py under torchrun: one backward pass of a retrofit, by itself or shared by two.

Usage: two_retrofits.py OUTPUT alone|ddp|fsdp2 float32|bfloat16
"""

import os
import sys

import torch
import torch.distributed as dist
import transformers as hf

from hf_variational import EVEConfig, posterior_noise, variationalize


def tiny(dtype: torch.dtype) -> hf.PreTrainedModel:
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        initializer_range=0.25, pad_token_id=0,
    )  # fmt: skip
    base = hf.LlamaForCausalLM(config).to(dtype)
    model = variationalize(base, eve=EVEConfig(prior="empirical"), layers=[1, 2], kl_weight=0.1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.train()


def noise(request):
    """By layer and position, the same for every row, so that it does not matter which process has one."""
    generator = torch.Generator().manual_seed(request.layer)
    table = torch.randn(32, request.shape[-1], generator=generator)
    return table[request.positions].repeat_interleave(request.num_samples, dim=0)


def main(output: str, how: str, dtype: str) -> None:
    rank, world = 0, 1
    if how != "alone":
        dist.init_process_group("gloo")
        rank, world = dist.get_rank(), dist.get_world_size()
    model = inner = tiny(getattr(torch, dtype))
    if how == "ddp":
        model = torch.nn.parallel.DistributedDataParallel(model)
    elif how == "fsdp2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (world,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    ids = torch.randint(3, 64, (4, 9), generator=torch.Generator().manual_seed(1))
    mine = ids.chunk(world)[rank]
    with posterior_noise(noise):
        # Both average gradients over processes, and the loss is a share of the whole batch's.
        out = model(mine, labels=mine, num_posterior_samples=2, num_items_in_batch=torch.tensor(ids[:, 1:].numel()))
        (world * out.loss).backward()
    grads = {}
    for name, parameter in inner.named_parameters():
        if parameter.grad is not None:
            grad = parameter.grad
            grads[name] = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
    loss = out.loss.detach()
    if world > 1:
        dist.all_reduce(loss)
    if rank == 0:
        torch.save({"loss": loss, "gradients": grads, "world": world}, output)
    if world > 1:
        dist.barrier()
    # gloo's threads now and then hang or abort an interpreter that shuts down; everything is on disk by now.
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
