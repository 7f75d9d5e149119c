"""Train RubiksNet; python train.py --help lists all settings."""

from rubiks.cli.entry import launch
from rubiks.cli.train import train
from rubiks.experiment import Training

if __name__ == "__main__":
    launch(train, Training)
