"""The benchmark of adaptive sampling runs at toy size and says what it promises to say."""

import pytest
import torch

from hf_variational import EVEConfig, VariationalGPTConfig, VariationalGPTForCausalLM
from hf_variational.training.data import load_text, train_tokenizer


def test_adaptive_sampling(load, tmp_path, capsys):
    tokenizer = train_tokenizer(load_text("pydoc_data.topics"), vocab_size=300)
    config = VariationalGPTConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        pad_token_id=tokenizer.pad_token_id,
        eve=EVEConfig(initial_scale=0.3),
    )
    sentence = "The with statement is used to wrap the execution of a block. "
    torch.manual_seed(0)
    model = VariationalGPTForCausalLM(config)
    ids = tokenizer(sentence * 4, return_tensors="pt")["input_ids"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(15):  # until some tokens are right and some wrong: a controller learns from both
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    text = tmp_path / "text.txt"
    text.write_text(sentence * 60)
    sizes = {"windows": 8, "length": 16, "prompts": 2, "new-tokens": 4, "resamples": 3, "reversals": 0.05}
    options = [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
    result = load("adaptive_sampling").main([str(tmp_path), "--text", str(text), "--coverage", "1", *options])
    printed = capsys.readouterr().out
    for title in ("Adaptive sampling", "Mutual information", "Controllers that answer 100%", "Greedy decoding"):
        assert title in printed
    rows = result["rows"]
    assert [row["samples"] for name, row in rows.items() if name.isdigit()] == [1, 2, 4, 8, 16, 32]
    assert rows["2"]["flops"] < rows["32"]["flops"]
    assert 2 <= rows["adaptive, entropy"]["samples"] <= 32 and "seconds" in rows["entropy, drawn anew"]
    information = result["mutual_information"]
    # of two samples the corrected value is twice the raw one
    assert information["2"]["corrected"] == pytest.approx(2 * information["2"]["raw"], rel=1e-3)
    assert all(row["coverage"] == 1 and row["abstained"] == 0 for row in result["controlled"].values())
