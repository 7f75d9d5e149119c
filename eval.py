"""Evaluate RubiksNet; python eval.py --help lists all settings."""

from rubiks.cli.entry import launch
from rubiks.cli.evaluate import evaluate
from rubiks.experiment import Evaluation

if __name__ == "__main__":
    launch(evaluate, Evaluation)
