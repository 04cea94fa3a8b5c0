"""Every Python snippet of docs/ runs, after the one of the index that makes a model to try them on."""

import re
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGES = sorted(path.name for path in DOCS.glob("*.md"))
FENCE = re.compile(r"^```(?P<language>\S*)\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE)
# What takes long and teaches the test nothing.
SHORTER = {"max_steps=1000": "max_steps=2"}
# Pages that use what is installed on request.
NEEDS = {"baselines.md": "laplace"}


def blocks(page: str) -> list[tuple[str, str, int]]:
    """Language, code and line of every fenced block."""
    text = (DOCS / page).read_text(encoding="utf-8")
    return [(m["language"], m["code"], text[: m.start("code")].count("\n")) for m in FENCE.finditer(text)]


def run(page: str, namespace: dict) -> None:
    for language, code, line in blocks(page):
        if language != "python":
            continue
        for long, short in SHORTER.items():
            code = code.replace(long, short)
        exec(compile("\n" * line + code, str(DOCS / page), "exec"), namespace)


@pytest.fixture(scope="module")
def prelude(tmp_path_factory):
    """The folder that the index's snippet has filled; making the tokenizer takes a while, so once is enough."""
    folder = tmp_path_factory.mktemp("docs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        torch.manual_seed(0)
        namespace: dict = {}
        run("index.md", namespace)
    return folder, namespace


@pytest.mark.parametrize("page", [page for page in PAGES if page != "index.md"])
def test_snippets_run(page, prelude, monkeypatch):
    if page in NEEDS:
        pytest.importorskip(NEEDS[page])
    folder, namespace = prelude
    monkeypatch.chdir(folder)
    torch.manual_seed(1)
    fresh = dict(namespace)
    fresh["model"] = namespace["AutoModelForCausalLM"].from_pretrained("my-model")
    run(page, fresh)


@pytest.mark.parametrize("page", PAGES)
def test_every_block_says_what_it_is(page):
    unknown = {language for language, _, _ in blocks(page)} - {"python", "text", "bash"}
    assert not unknown, f"{page}: mark a block that does not run as text, got {unknown}"


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", (DOCS / page).read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (DOCS / target).exists(), f"{page} links to {target}"


def test_the_index_names_every_page():
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    assert all(f"]({page})" in index for page in PAGES if page != "index.md")
