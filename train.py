"""Train RubiksNet.

python train.py                                         tier tiny, on the built-in data set
python train.py tier=large variant=rubiks3d-aq data=ssv2 data.root=/data/ssv2
python train.py --help                                  everything that can be set
"""

from pathlib import Path

from rubiks.cli.entry import launch
from rubiks.cli.train import train
from rubiks.experiment import Training

if __name__ == "__main__":
    launch(train, Training, Path(__file__).parent / "conf", "train")
