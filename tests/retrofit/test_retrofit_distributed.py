"""A retrofit under DDP and FSDP2, two processes on the CPU, and where its parts are put."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as hf
from eve_families import stock

import hf_variational
from hf_variational import EVEConfig, variationalize
from hf_variational.training.checkpoints import refuse_mixed_dtypes

HERE = Path(__file__).parent
ROOT = Path(hf_variational.__file__).parents[1]


def run(folder: Path, how: str, dtype: str) -> dict:
    command = [sys.executable]
    if how != "alone":
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(HERE / "two_retrofits.py"), str(folder / how), how, dtype]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(folder / how, weights_only=True)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return {dtype: run(tmp_path_factory.mktemp(dtype), "alone", dtype) for dtype in ("float32", "bfloat16")}


@pytest.mark.parametrize(("how", "dtype"), [("ddp", "float32"), ("fsdp2", "float32"), ("fsdp2", "bfloat16")])
def test_two_processes_have_the_loss_and_gradients_of_one(how, dtype, alone, tmp_path):
    one, both = alone[dtype], run(tmp_path, how, dtype)
    assert (one["world"], both["world"]) == (1, 2)
    # What the base computes in bfloat16 it rounds by the shape of the batch.
    rtol, atol = (1e-4, 1e-6) if dtype == "float32" else (5e-2, 1e-3)
    torch.testing.assert_close(both["loss"], one["loss"], rtol=rtol, atol=atol)
    assert both["gradients"].keys() == one["gradients"].keys() and one["gradients"]
    assert all(".eve." in name for name in one["gradients"]), "the base is frozen"
    for name, expected in one["gradients"].items():
        assert expected.dtype == torch.float32 and expected.abs().max() > 0
        torch.testing.assert_close(both["gradients"][name], expected, rtol=rtol, atol=atol, msg=name)


def test_fsdp2_trains_what_was_added_to_a_bfloat16_base_and_refuses_the_base_beside_it():
    refuse_mixed_dtypes(variationalize(stock("llama").bfloat16(), layers="last"))
    model = variationalize(stock("llama").bfloat16(), layers="last", train="all")
    with pytest.raises(ValueError, match=r"one dtype.*bfloat16.*float32.*model.layers.2.mlp.eve.log_scale"):
        refuse_mixed_dtypes(model)


@torch.no_grad()
@pytest.mark.parametrize("device_map", ["auto", "cpu", "split"])
def test_device_map(device_map, tmp_path):
    model = variationalize(stock("llama"), eve=EVEConfig(), layers=[1, 2]).eval()
    model.save_pretrained(tmp_path)
    if device_map == "split":  # the last layer comes from the disk when it is needed
        device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
        device_map |= {"model.layers.0": "cpu", "model.layers.1": "cpu", "model.layers.2": "disk"}
    again = hf.AutoModelForCausalLM.from_pretrained(
        tmp_path, device_map=device_map, offload_folder=str(tmp_path / "offload")
    )
    ids = torch.tensor([[5, 6, 7, 8]])
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    torch.manual_seed(0)
    expected = model(ids, num_posterior_samples=3).logits
    torch.manual_seed(0)
    torch.testing.assert_close(again(ids, num_posterior_samples=3).logits, expected, rtol=1e-5, atol=1e-5)


def test_four_bit_base():
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    import bitsandbytes as bnb

    try:
        probe = bnb.nn.Linear4bit(64, 64, compute_dtype=torch.float32).to(
            "cuda" if torch.cuda.is_available() else "cpu"
        )
        probe(torch.randn(1, 64, device=probe.weight.device))
    except Exception as error:
        pytest.skip(f"bitsandbytes cannot run here: {error}")
    model = stock("llama")
    for layer in model.model.layers:
        old = layer.mlp.down_proj
        new = bnb.nn.Linear4bit(old.in_features, old.out_features, bias=False, compute_dtype=torch.float32)
        new.weight = bnb.nn.Params4bit(old.weight.data, requires_grad=False)
        layer.mlp.down_proj = new.to(probe.weight.device)
    model = model.to(probe.weight.device)
    ids = torch.tensor([[5, 6, 7, 8]], device=probe.weight.device)
    expected = model(ids).logits
    model = variationalize(model, layers="last")
    assert torch.equal(model(ids).logits, expected)
    assert model(ids, num_posterior_samples=2).logits.isfinite().all()
