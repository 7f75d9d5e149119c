"""`rubiks demo`: a page in the browser on which a trained network classifies videos."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import tempfile

from rubiks.errors import InputError
from rubiks.stopping import heeded


def add_to(commands) -> None:
    """Add the subcommand to the parser."""
    about = "try a trained network on a page in the browser, with videos or the camera"
    parser = commands.add_parser("demo", help=about, description=about[0].upper() + about[1:] + ".")
    parser.add_argument("ckpt", metavar="CKPT", help="a checkpoint, ours or official, a run's or a saved folder")
    parser.add_argument("--port", type=int, default=7860, metavar="N", help="0: any free one; default: %(default)s")
    parser.add_argument("--device", choices=("auto", "cpu", "gpu"), default="auto")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Serve the page, to this machine alone, until Ctrl-C."""
    from rubiks.predict import demo  # imports PyTorch, which takes seconds
    from rubiks.predict.predictor import Predictor

    demo.check_installed()
    with _listen(arguments.port) as listener:
        predictor = Predictor(arguments.ckpt, device=arguments.device)
        # After these too the temporary files are removed; the server itself handles SIGTERM, but not SIGHUP.
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        if signal.SIGHUP in heeded():
            signal.signal(signal.SIGHUP, lambda number, frame: signal.raise_signal(signal.SIGTERM))
        with tempfile.TemporaryDirectory(prefix="rubiks-demo-") as folder:
            app = demo.make_app(predictor, folder)
            address = f"http://127.0.0.1:{listener.getsockname()[1]}"
            print(f"Open {address} in a browser; Ctrl-C ends the server", flush=True)
            demo.serve(app, listener)


def _listen(port: int) -> socket.socket:
    if not 0 <= port < 1 << 16:
        raise InputError(f"--port must be a number from 0 to 65535, got {port}")
    try:
        return socket.create_server(("127.0.0.1", port))
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise InputError(f"--port {port} cannot be used: {reason}; choose another, or 0 for any free one") from None
