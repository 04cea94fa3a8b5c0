"""`hf-variational retrofit` on a tiny Llama, and what it leaves behind."""

import json
from types import SimpleNamespace

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from hf_variational.cli import app
from hf_variational.retrofit_program.texts import read_texts
from hf_variational.training.naming import is_variational
from hf_variational.training.recipe import DataRecipe

SAMPLES, LENGTH, SEQUENCES, TESTED, BATCH = 3, 16, 8, 10, 4
SIZES = ("--length", LENGTH, "--max-sequences", SEQUENCES, "--test-sequences", TESTED, "--batch-size", BATCH)
QUICK = (*SIZES, "--samples", SAMPLES)
STEP = ("arguments.max_steps=1", "arguments.warmup_steps=0")


def run(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def save_llama(folder, tokenizer, dtype=torch.float32):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    ids = torch.tensor(tokenizer(sentences(7))["input_ids"])
    ids = ids[: len(ids) // 16 * 16].view(-1, 16)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for step in range(60):
        rows = ids[step * 16 % (len(ids) - 16) :][:16]
        model(rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        model.lm_head.weight.mul_(3.0)  # too sure of itself, so that noise and a temperature have something to mend
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def sentences(seed, count=400):
    words = ["block", "with", "statement", "context", "manager", "for", "clause", "iterate", "the", "is"]
    generator = torch.Generator().manual_seed(seed)
    picked = torch.randint(0, len(words), (count, 5), generator=generator).tolist()
    return "\n".join(" ".join(words[index] for index in row) + "." for row in picked)


def retrofitted(place, name, *options):
    result = run("retrofit", place / "base", "--data", place / "text.txt", "--output", place / name, *QUICK, *options)
    assert result.exit_code == 0, result.output
    folder = place / name
    return SimpleNamespace(
        folder=folder,
        printed=result.stdout,
        results=json.loads((folder / "results.json").read_text()),
        card=(folder / "README.md").read_text(),
    )


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def ids_of(texts):
    return torch.tensor([row["input_ids"] for row in texts.test])


def tensors(folder):
    return load_file(folder / "model.safetensors")


def pretrained(folder):
    return {name: value for name, value in tensors(folder).items() if not is_variational(name)}


def changed(folder, base_folder):
    before, after = tensors(base_folder), pretrained(folder)
    assert set(before) == set(after)
    return {name for name in before if not torch.equal(before[name], after[name])}


@torch.no_grad()
def assert_mean_pass_is_the_base(folder, base_folder, ids):
    """The base's weights, and what the stock class makes of this very file: elsewhere in memory a kernel may round
    otherwise.
    """
    assert changed(folder, base_folder) == set()
    expected = LlamaForCausalLM.from_pretrained(folder).eval()(ids).logits
    assert torch.equal(loaded(folder)(ids).logits, expected)
    torch.testing.assert_close(expected, loaded(base_folder)(ids).logits)


def printed_row(printed, label):
    (line,) = [line for line in printed.splitlines() if line.startswith(label)]
    return line.removeprefix(label).split()


def texts_of(place, tokenizer):
    """What the command reads."""
    return read_texts(
        DataRecipe(str(place / "text.txt"), validation_fraction=0.2, block_size=LENGTH),
        tokenizer,
        calibration=SEQUENCES,
        test=TESTED,
        trains=False,
        others={"code": str(place / "other.txt")},
    )
