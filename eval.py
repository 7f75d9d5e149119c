"""Evaluate RubiksNet under a named protocol.

python eval.py                                          the newest run on the built-in data set
python eval.py protocol=two_clip data=ssv2 data.root=/data/ssv2 ckpt=ssv2_large.pth.tar
python eval.py --help                                   everything that can be set
"""

from pathlib import Path

from rubiks.cli.entry import launch
from rubiks.cli.evaluate import evaluate
from rubiks.experiment import Evaluation

if __name__ == "__main__":
    launch(evaluate, Evaluation, Path(__file__).parent / "conf", "eval")
