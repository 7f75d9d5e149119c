"""The commands in the documents are accepted exactly as shown."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

from rubiks.cli.entry import compose, plain
from rubiks.cli.main import make_parser
from rubiks.experiment import Evaluation, Training

DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "data/README.md"])
STARTS = ("python train.py", "python eval.py", "rubiks ", "torchrun ", "srun ", "sbatch ")
PLACEHOLDER = re.compile(r"\b(FOLDER|NAME|FILE|CKPT|KEY=VALUE)\b|\.\.\.")


def commands(document: Path) -> Iterator[str]:
    """The commands in code blocks, without comments and with continuation lines joined."""
    text = re.sub(r"\\\n\s*", "", document.read_text(encoding="utf-8"))
    fenced = False
    for line in text.splitlines():
        if line.startswith("```"):
            fenced = not fenced
        elif (fenced or line.startswith("    ")) and line.strip().startswith(STARTS):
            yield line.strip()


SHOWN = [(path.relative_to(ROOT).as_posix(), line) for path in DOCUMENTS for line in commands(path)]


def test_commands_are_found():
    found = {document for document, _ in SHOWN}
    assert {"README.md", "data/README.md", "docs/training.md", "docs/evaluation.md"} <= found
    assert len(SHOWN) > 30


@pytest.mark.parametrize(("document", "line"), sorted(set(SHOWN)))
def test_a_command_is_understood(document, line):
    words = shlex.split(PLACEHOLDER.sub("x", line), comments=True)
    if words[0] in ("torchrun", "srun", "sbatch"):
        (script,) = [place for place, word in enumerate(words) if word.endswith(("train.py", "train.sbatch", "rubiks"))]
        words = words[script:] if words[script] == "rubiks" else ["python", "train.py", *words[script + 1 :]]
    program = words[1].removesuffix(".py") if words[0] == "python" else words[1]
    rest = words[2:]
    if "--help" in rest:
        return
    if program in ("train", "eval", "check-cluster"):
        program, model = ("eval", Evaluation) if program == "eval" else ("train", Training)
        # The first of several runs; `latest` and the like need not exist.
        choices = [re.sub(r"^((?:seed|data\.split)=\d),.*", r"\1", word) for word in rest if not word.startswith("-")]
        model(**plain(compose(choices, program)))
    else:
        arguments = make_parser().parse_args([program, *rest])
        choices = getattr(arguments, "data", None) or getattr(arguments, "choices", None) or []
        Training(**plain(compose(choices)))
