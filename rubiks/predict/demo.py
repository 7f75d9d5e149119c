"""A page, made with gradio, on which people give a network videos and see what it makes of them."""

from __future__ import annotations

import importlib.metadata
import io
import logging
import os
import socket
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from rubiks.data import builtin
from rubiks.data.builtin_clips import VIDEO_FOLDER
from rubiks.errors import InputError, VideoError
from rubiks.models.tiers import VARIANTS
from rubiks.pages import page, previews
from rubiks.predict.explanation import class_maps, explainable
from rubiks.predict.predictor import Predictor

OLDEST = (6, 20)  # as in pyproject.toml; pages of older releases load a script from the internet
LARGEST_UPLOAD = "1gb"
POLICY = "default-src 'self' blob: data: 'unsafe-inline' 'unsafe-eval'"  # browsers load nothing from elsewhere


def check_installed() -> None:
    """Raise InputError unless gradio is installed, in a version that has what is used here."""
    try:
        found = importlib.metadata.version("gradio")
    except importlib.metadata.PackageNotFoundError:
        found = ""
    if not found or tuple(map(int, found.split(".")[:2])) < OLDEST:
        what = f"version {found} is installed" if found else "it is not installed"
        raise InputError(
            f"rubiks demo needs gradio {'.'.join(map(str, OLDEST))} or later, and {what}; "
            "install with: pip install 'rubiks[demo]'"
        )


def make_app(predictor: Predictor, folder: str) -> Any:
    """The page as an ASGI application. Neither it nor the page fetches anything from elsewhere.

    Args:
        predictor: of the network to try.
        folder: for uploaded videos and other temporary files.

    Raises:
        InputError: the network is an exported file's.
    """
    # gradio and what it is built on read these when they are imported.
    os.environ |= {
        "GRADIO_ANALYTICS_ENABLED": "False",
        "GRADIO_RUN_HISTORY": "False",
        "GRADIO_TEMP_DIR": folder,
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "1",
    }
    import gradio
    from fastapi import FastAPI

    return gradio.mount_gradio_app(
        FastAPI(openapi_url=None),
        _blocks(predictor, examples(predictor, folder)),
        path="/",
        app_kwargs={"openapi_url": None},
        footer_links=[],
        max_file_size=LARGEST_UPLOAD,
        ssr_mode=False,
        enable_monitoring=False,
        mcp_server=False,
        theme=gradio.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        head=f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        css_paths=page.HERE / "demo.css",
    )


def serve(app: Any, listener: socket.socket) -> None:
    """Serve the application at a socket until a signal comes, which is then raised again."""
    import uvicorn

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            # Pages keep connections open; that these are cut off after a second is no error.
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
            await super().shutdown(sockets)

    Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)).run([listener])


def _blocks(predictor: Predictor, videos: list[str]) -> Any:
    """The page's components: its head, a video, videos to choose from, and what the network sees."""
    import gradio as gr

    title = f"RubiksNet {predictor.net.tier}"
    # Every ten minutes what is older than an hour is deleted.
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(600, 3600)) as blocks:
        gr.HTML(about(predictor))
        with gr.Row():
            with gr.Column(scale=2):
                # Sound is of no use; without it the browser does not ask for the microphone.
                camera = gr.WebcamOptions(constraints={"audio": False})
                video = gr.Video(label="Video", sources=["upload", "webcam"], webcam_options=camera, elem_id="video")
                if videos:
                    gr.Examples([[one] for one in videos], video, cache_examples=False, examples_per_page=len(videos))
            with gr.Column(scale=3):
                answer = gr.HTML(answer_to(predictor, None))
        video.change(partial(answer_to, predictor), video, answer, api_visibility="private")
    return blocks


def examples(predictor: Predictor, folder: str) -> list[str]:
    """Paths of new videos, if the network was trained on the built-in data set, which can be drawn; else none."""
    source = explainable(predictor).source
    level = source.get("data", "").removeprefix("builtin-")
    if source.get("format") != "builtin" or level not in builtin.LEVELS:
        return []
    count = len(builtin.class_names(level))
    made = builtin.generate(folder, level, count, count, workers=1, progress=False) / VIDEO_FOLDER
    return [str(made / f"{count + number}.webm") for number in range(1, count + 1)]  # those of validation


def about(predictor: Predictor) -> str:
    """The head of the page, HTML: what the network is, what it was trained on, and its classes."""
    net = explainable(predictor)
    return page.render(
        "demo_about.html",
        net=net,
        about=VARIANTS[net.variant].about,
        file=net.source.get("file") or Path(predictor.path).name,
        source=net.source,
        protocol=predictor.protocol,
    )


def answer_to(predictor: Predictor, video: str | None) -> str:
    """HTML: classes, frames and activation map of a video; why it cannot be read; or what to do if there is none."""
    if video is None:
        return page.render("demo_answer.html", error=None, ranked=[])
    try:
        views = predictor.views(video)
    except VideoError as error:
        return page.render("demo_answer.html", error=f"{Path(error.path).name}: {error.reason}", ranked=[])
    ranked = predictor.ranked(predictor.score(views[None])[0])
    frames = views[predictor.protocol.central_view].contiguous()
    over = previews.with_map(frames, class_maps(explainable(predictor), frames, ranked[0].index))
    return page.render("demo_answer.html", error=None, ranked=ranked, frames=_urls(frames), over=_urls(over))


def _urls(frames: Tensor) -> list[str]:
    """Frames, uint8 (T, 3, H, W), as addresses of images that hold their content."""
    urls = []
    for frame in frames.movedim(1, -1).contiguous().numpy():
        content = io.BytesIO()
        Image.fromarray(frame).save(content, "PNG")
        urls.append(page.data_url(content.getvalue(), "image/png"))
    return urls
