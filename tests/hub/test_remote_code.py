"""A saved folder is loaded in a fresh process, with the package and in an environment where there is none."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_variational import posterior_noise

ROOT = Path(__file__).parents[2]

WITHOUT_THE_PACKAGE = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_variational":
            raise ImportError(f"{name} is not here")

sys.meta_path.insert(0, Blocker())
try:
    import hf_variational
except ImportError:
    options = {"trust_remote_code": True}
else:
    raise SystemExit("the package is not blocked")
"""

WITH_THE_PACKAGE = "import hf_variational, sys; options = {}"

PROGRAM = """
import torch
from transformers import AutoConfig, AutoModelForCausalLM

folder, result = sys.argv[1:]
config = AutoConfig.from_pretrained(folder, **options)
model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
assert not model.training and not any(report.values()), report
ids = torch.tensor([[1, 5, 9, 20, 33]])
out = {"module": type(model).__module__, "eve": config.eve.to_dict(), "mean": model(ids).logits}
torch.manual_seed(7)
sampled = model(ids, num_posterior_samples=3, output_uncertainty=True, labels=ids)
out.update(samples=sampled.logits, measures=dict(sampled.uncertainty), loss=sampled.loss)
torch.manual_seed(7)
asked = {"num_posterior_samples": 3, "return_dict_in_generate": True, "output_uncertainty": True}
generated = model.generate(ids, max_new_tokens=4, do_sample=False, **asked)
out.update(sequences=generated.sequences, generated=dict(generated.uncertainty))
torch.manual_seed(7)
out.update(from_config=model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=True))
out.update(default=model.generation_config.num_posterior_samples)
model.save_pretrained(folder + "-again")
torch.save(out, result)
"""


def run(prelude: str, folder: Path, tmp_path: Path, *flags: str, **environment: str) -> dict:
    result = tmp_path / "result.pt"
    command = [sys.executable, *flags, "-c", prelude + PROGRAM, str(folder), str(result)]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={
            **os.environ,
            "HF_HOME": str(tmp_path / "home"),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(result, weights_only=True)


@pytest.fixture
def saved(model, tmp_path):
    model.generation_config.num_posterior_samples = 5
    model.generation_config._from_model_config = False
    folder = tmp_path / "my-model"
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def check(model, out: dict) -> None:
    ids = torch.tensor([[1, 5, 9, 20, 33]])
    same = {"rtol": 1e-5, "atol": 1e-6}
    assert out["eve"] == model.config.eve.to_dict() and out["default"] == 5
    torch.testing.assert_close(out["mean"], model(ids).logits, **same)
    torch.manual_seed(7)
    sampled = model(ids, num_posterior_samples=3, output_uncertainty=True, labels=ids)
    torch.testing.assert_close(out["samples"], sampled.logits, **same)
    torch.testing.assert_close(out["loss"], sampled.loss, **same)
    for name, value in sampled.uncertainty.items():
        torch.testing.assert_close(out["measures"][name], value, equal_nan=True, **same)
    assert (out["measures"]["mutual_information"] > 1e-3).all()
    torch.manual_seed(7)
    generated = model.generate(
        ids,
        max_new_tokens=4,
        do_sample=False,
        num_posterior_samples=3,
        return_dict_in_generate=True,
        output_uncertainty=True,
    )
    assert torch.equal(out["sequences"], generated.sequences)
    for name, value in generated.uncertainty.items():
        torch.testing.assert_close(out["generated"][name], value, **same)
    torch.manual_seed(7)
    expected = model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=True)
    assert torch.equal(out["from_config"], expected)


@pytest.mark.usefixtures("registered")
def test_trust_remote_code_where_there_is_no_package(model, saved, tmp_path):
    # -I keeps the checkout and PYTHONPATH out; the blocker covers a package that is installed
    out = run(WITHOUT_THE_PACKAGE, saved, tmp_path, "-I")
    assert out["module"].startswith("transformers_modules.")
    check(model, out)
    again = {path.name for path in Path(f"{saved}-again").iterdir()}
    assert again == {path.name for path in saved.iterdir()} - {"README.md"}


def test_a_fresh_process_with_the_package(model, saved, tmp_path):
    out = run(WITH_THE_PACKAGE, saved, tmp_path, PYTHONPATH=str(ROOT))
    assert out["module"] == "hf_variational.modeling.modeling_variational_gpt"
    check(model, out)
    assert (Path(f"{saved}-again") / "README.md").is_file()


def test_the_noise_of_the_check_is_real(model):
    """The equalities above compare nothing if the samples are the mean pass."""
    ids = torch.tensor([[1, 5, 9, 20, 33]])
    with torch.no_grad(), posterior_noise(lambda request: torch.zeros(request.shape)):
        still = model(ids, num_posterior_samples=3).logits
    torch.testing.assert_close(still, model(ids).logits.log_softmax(-1), rtol=1e-4, atol=1e-5)
    assert (model(ids, num_posterior_samples=3).logits - still).abs().max() > 0.05
