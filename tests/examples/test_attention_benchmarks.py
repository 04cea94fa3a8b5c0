"""The benchmarks of variational attention run at toy size, and the fitted coefficients are those in the package."""

import numpy as np
from transformers import LlamaConfig, LlamaForCausalLM

from hf_variational.modeling import dirichlet, gamma
from hf_variational.training.data import load_text, train_tokenizer


def test_weights(load, capsys):
    result = load("attention_weights").main(["--tiny", "--rounds", "1"])
    assert "softmax attention" in capsys.readouterr().out
    assert {"gaussian; full, head width 64", "dirichlet; causal, head width 32"} < set(result["rows"])
    assert all(row["cpu"]["wall_ratio"] > 0 for row in result["rows"].values())


def test_step(load, capsys):
    script = load("attention_step")
    result = script.main(["--tiny", "--rounds", "1"])
    assert "deterministic twin" in capsys.readouterr().out
    rows = result["rows"]
    assert set(rows) == {"baseline", script.EAGER, *script.VARIANTS}
    assert all(row["cpu"]["peak_bytes"] > 0 for row in rows.values())
    assert rows[script.EAGER]["cpu"]["parameters"] == 1.0 < rows["Dirichlet"]["cpu"]["parameters"]


def test_on_pretrained(load, tmp_path, capsys):
    tokenizer = train_tokenizer(load_text("pydoc_data.topics"), vocab_size=300)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    text = tmp_path / "text.txt"
    text.write_text("The with statement is used to wrap the execution of a block. " * 20)
    options = [
        "--text",
        str(text),
        "--windows",
        "2",
        "--length",
        "16",
        "--samples",
        "2",
        "--only",
        "dirichlet, a = 10",
    ]
    result = load("attention_on_pretrained").main([str(tmp_path), *options])
    assert "the model as it is" in capsys.readouterr().out
    rows = result["rows"]
    assert rows["the model as it is"]["mutual_information"] is None
    assert rows["dirichlet, a = 10"]["mutual_information"] > 0


def test_approximate(load, capsys):
    load("approximate_dirichlet").main(["--tiny"])
    assert "Var[w]" in capsys.readouterr().out


def test_the_sensitivity_is_the_one_that_the_script_fits(load):
    script = load("fit_gamma_sensitivity")
    coefficients, error = script.fit(*script.grid())
    assert error < 1.3e-4
    assert np.allclose(coefficients, gamma._SENSITIVITY, atol=1e-3)


def test_the_remainder_is_the_one_that_the_script_fits(load):
    script = load("fit_stirling_remainder")
    script.mpmath.mp.dps = 40
    u = ((1 - np.cos(np.linspace(0, np.pi, 400))) / 2)[1:]
    coefficients, error = script.fit(u, np.array([script.remainder(each) for each in u]))
    assert error < 3e-9
    assert np.allclose(coefficients, dirichlet._STIRLING, atol=1e-6)
