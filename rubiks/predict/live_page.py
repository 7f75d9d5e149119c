"""A page on this computer that shows a live picture, as motion JPEG, which every browser plays in an <img>."""

from __future__ import annotations

import contextlib
import html
import io
import secrets
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from PIL import Image

_PAGE = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<title>{title}</title>
<style>
body {{ margin: 0; background: #111 }}
img {{ display: block; width: 100vw; height: 100vh; object-fit: contain }}
</style>
<img src="live.mjpeg" alt="live picture">
</html>
"""
_BOUNDARY = "frame"


class LivePage:
    """Serves the page on 127.0.0.1, at a free port.

    Args:
        title: of the page.

    Attributes:
        address: of the page. It contains a random key, so that other users of the computer and pages of other sites
            cannot see the picture.
    """

    def __init__(self, title: str) -> None:
        self._image: np.ndarray | None = None
        self._number = 0
        self._closed = False
        self._changed = threading.Condition()
        root = f"/{secrets.token_urlsafe(12)}/"
        page = _PAGE.format(title=html.escape(title)).encode()
        live = self

        class Handler(BaseHTTPRequestHandler):
            timeout = 30  # seconds; a browser that takes no pictures is left alone

            def do_GET(self) -> None:
                with contextlib.suppress(OSError):  # the browser has gone
                    if self.path == root:
                        self._begin("text/html; charset=utf-8")
                        self.wfile.write(page)
                    elif self.path == f"{root}live.mjpeg":
                        self._begin(f"multipart/x-mixed-replace; boundary={_BOUNDARY}")
                        live._send(self.wfile)
                    else:
                        self.send_error(404)

            def _begin(self, media_type: str) -> None:
                self.send_response(200)
                self.send_header("Content-Type", media_type)
                self.send_header("Cache-Control", "no-store")
                self.end_headers()

            def log_message(self, format: str, *values: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_port}{root}"
        threading.Thread(target=self._server.serve_forever, name="page", daemon=True).start()

    def show(self, image: np.ndarray) -> None:
        """Show an image, uint8 (H, W, 3), until the next one."""
        with self._changed:
            self._image = image
            self._number += 1
            self._changed.notify_all()

    def close(self) -> None:
        """Stop serving; the last image stays in the browser."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._server.shutdown()
        self._server.server_close()

    def _send(self, out: io.BufferedIOBase) -> None:
        """Write each newest image as a part of a multipart message, until the page is closed."""
        sent = 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._number > sent)  # noqa: B023  used at once
                if self._closed or self._image is None:
                    return
                image, sent = self._image, self._number
            content = io.BytesIO()
            Image.fromarray(image).save(content, "JPEG", quality=85)
            size = content.tell()
            head = f"--{_BOUNDARY}\r\nContent-Type: image/jpeg\r\nContent-Length: {size}\r\n\r\n"
            out.write(head.encode() + content.getvalue() + b"\r\n")
