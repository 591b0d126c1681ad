"""Remove objects from photos in a browser or over HTTP: `rorem app`, and a Hub Space's `app.py`.

One file is both. In a Space its options come from environment variables (`OPTIONS`), and where
`spaces` is installed ZeroGPU lends its GPU to every removal. `papers/app.md` shows the HTTP API.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

import cv2
import gradio as gr
import numpy as np
from PIL import Image

from rorem_lib.app.marks import (
    COLOUR,
    OPACITY,
    enlarge,
    make_canvas,
    read_marks,
    show_marks,
    shrink,
)
from rorem_lib.app.service import (
    Service,
    describe_removal,
    explain_errors,
    refuse,
    save_removal,
)
from rorem_lib.data import masks
from rorem_lib.data.pictures import load_image, load_mask
from rorem_lib.models import advice
from rorem_lib.models.inpainting import MODES, ObjectRemover

MAX_VARIANTS = 4
KEPT = 3600  # s that uploads and results stay on the server
TOOLS = {"Brush": "brush", "Box": "box", "Click on the object": "click"}
MODE_NAMES = {
    "The object with its shadow": "effect",
    "Only what is marked": "exact",
    "All that the model paints": "full",
}
TEXT = (
    "# Remove an object from a photo\n"
    "Upload a photo, mark the object, press **Remove**. You get the photo back in its own size."
)
PRIVATE = {"api_visibility": "private"}  # the API has one endpoint
MODEL = {"concurrency_id": "model", "concurrency_limit": 1}  # one removal at a time
CSS = """
.gradio-container { max-width: 1280px !important; width: 100%; margin: auto; }
#editor button[aria-label=Color] { display: none; }
#about p { margin: 0; }
.divider { display: none !important; }
#variants, #variants .grid-wrap { min-height: 0; }
@media (max-width: 640px) { footer { display: none !important; } }
"""


class Page:
    """The page's events. What belongs to one visitor is in `session`, a dict."""

    def __init__(self, service: Service):
        self.service = service
        released = service.remover.settings  # 4 steps with a LoRA for few steps
        self.steps, self.guidance = released.num_inference_steps, released.guidance_scale

    def open_photo(self, path: str | None, session: dict | None):
        """A new photo on the canvas; everything of the last one is put away."""
        forget(session)
        hidden = gr.update(visible=False)
        if not path:
            return None, hidden, None, gr.update(interactive=False), hidden
        size = self.service.check(path)
        with explain_errors(path):
            preview = shrink(load_image(path))
        session = {
            "path": path,
            "size": size,
            "folder": tempfile.mkdtemp(prefix="rorem-app-"),
            "preview": preview,
            "marks": np.zeros(preview.shape[:2], np.uint8),
            "tool": "brush",
            "corner": None,
            "made": [],
        }
        brush = make_brush(max(2, min(preview.shape[:2]) // 30))
        canvas = gr.update(value=make_canvas(preview), brush=brush)
        return session, gr.update(visible=True), canvas, gr.update(interactive=True), hidden

    def switch_tool(self, name: str, editor: dict | None, session: dict | None):
        """Take the marks from the brush's canvas to the clicks' or back."""
        require_photo(session)
        self._keep_marks(editor, session)
        session["tool"], session["corner"] = TOOLS[name], None
        brush = session["tool"] == "brush"
        canvas = make_canvas(session["preview"], session["marks"])
        clicks = show_marks(session["preview"], session["marks"])
        return (
            session,
            gr.update(value=canvas, visible=True) if brush else gr.update(visible=False),
            gr.update(value=clicks, visible=not brush, label=self._hint(session)),
            gr.update(visible=session["tool"] == "box"),
            gr.update(visible=not brush),
        )

    def _keep_marks(self, editor: dict | None, session: dict) -> None:
        if session["tool"] == "brush":
            session["marks"] = read_marks(editor, session["preview"].shape[:2])

    def _hint(self, session: dict) -> str:
        if session["tool"] == "click":
            return "Click on the object"
        return "Click on the opposite corner" if session["corner"] else "Click on two corners"

    def click(self, session: dict | None, event: gr.SelectData):
        """A corner of a box, or a point of the object to be found."""
        require_photo(session)
        preview, marks = session["preview"], session["marks"]
        x, y = (int(value) for value in event.index)
        if session["tool"] == "click":
            with explain_errors():
                marks |= self.service.segmenter(preview, (x, y))
        elif session["corner"] is None:
            session["corner"] = (x, y)
        else:
            (x0, x1), (y0, y1) = (sorted(pair) for pair in zip(session["corner"], (x, y)))
            marks |= masks.draw_box_mask(*marks.shape, (x0, y0, x1 + 1, y1 + 1))
            session["corner"] = None
        return self._show_clicks(session)

    def _show_clicks(self, session: dict):
        shown = show_marks(session["preview"], session["marks"])
        if session["corner"]:
            cv2.drawMarker(shown, session["corner"], COLOUR, cv2.MARKER_CROSS, 24, 2)
        return session, gr.update(value=shown, label=self._hint(session))

    def mark_box(self, text: str, session: dict | None):
        """A box typed in px of the photo."""
        require_photo(session)
        (height, width), marks = session["size"], session["marks"]
        try:
            numbers = [float(word) for word in text.replace(",", " ").split()]
            box = masks.draw_box_mask(height, width, numbers)
        except ValueError as error:
            raise refuse(
                f"{error}. Give left, top, right, bottom in px of the photo ({width}x{height}), "
                "for example 10, 20, 200, 180."
            ) from None
        marks |= masks.fit_mask(box, *marks.shape)
        return self._show_clicks(session)

    def clear(self, session: dict | None):
        """Nothing is marked any more."""
        require_photo(session)
        session["marks"][:], session["corner"] = 0, None
        return self._show_clicks(session)

    def make(self, editor, session, mode, variants, steps, guidance, seed, dilate):
        """Make the variants and show the first."""
        require_photo(session)
        self._keep_marks(editor, session)
        removals = self.service.remove(
            session["path"],
            enlarge(session["marks"], session["size"]),
            variants=int(variants),
            mode=MODE_NAMES[mode],
            num_inference_steps=int(steps),
            guidance_scale=float(guidance),
            seed=int(seed),
            dilate=int(dilate),
        )
        forget(session)
        session["made"], thumbnails = [], []
        for number, removal in enumerate(removals):
            folder = Path(session["folder"]) / str(number)
            png = save_removal(removal.image, session["path"], folder)
            text = describe_removal(removal, MODE_NAMES[mode])
            session["made"].append({"png": png, "text": text})
            thumbnails.append((shrink(load_image(png)), f"Variant {number + 1}"))
        several = len(removals) > 1
        gallery = gr.update(value=thumbnails if several else None, visible=several)
        return gr.update(visible=True), gallery, *self._show(session, 0)

    def pick(self, session: dict | None, event: gr.SelectData):
        """Show another variant and offer it for download."""
        require_photo(session)
        return self._show(session, event.index)

    def _show(self, session: dict, number: int):
        made = session["made"][number]
        after, folder = load_image(made["png"]), Path(made["png"]).parent
        if "jpg" not in made:
            made["jpg"] = save_removal(Image.fromarray(after), session["path"], folder, "jpg")
        return session, (session["preview"], shrink(after)), made["png"], made["jpg"], made["text"]


def make_brush(size: int) -> gr.Brush:
    """The one brush, `size` px of the canvas wide."""
    colour = ("rgb({}, {}, {})".format(*COLOUR), OPACITY)
    return gr.Brush(size, colors=[colour], default_color=colour, color_mode="fixed")


def require_photo(session: dict | None) -> None:
    """Refuse where the photo is gone: both it and the session end after `KEPT`."""
    if session is None or not Path(session["path"]).is_file():
        raise refuse(
            f"There is no photo: upload it first, or again ({KEPT // 60} minutes after an upload "
            "it is deleted)."
        )


def forget(session: dict | None) -> None:
    """Delete a visitor's results; Gradio's cache deletes the uploads."""
    if session:
        shutil.rmtree(session["folder"], ignore_errors=True)


def build(service: Service) -> gr.Blocks:
    """The page with its queue, and the endpoint `/remove`."""
    page = Page(service)
    cleaning = {"analytics_enabled": False, "delete_cache": (600, KEPT)}  # how often, how old
    with gr.Blocks(title="Remove an object", **cleaning) as ui:
        session = gr.State(None, time_to_live=KEPT, delete_callback=forget)
        gr.Markdown(TEXT)
        with gr.Row():
            with gr.Column(min_width=320):
                photo = gr.File(
                    label="1. Your photo",
                    file_types=["image", ".heic", ".heif", ".avif", ".tif", ".tiff"],
                    height=130,
                    elem_id="photo",
                )
                with gr.Column(visible=False) as marking:
                    names = [n for n, tool in TOOLS.items() if tool != "click" or service.segmenter]
                    tool = gr.Radio(
                        names,
                        label="2. Mark the object with",
                        info="Cover all of it, a little beyond its edge. Its shadow goes along.",
                        elem_id="tool",
                    )
                    editor = gr.ImageEditor(
                        label="Paint on it",
                        format="png",
                        sources=(),
                        transforms=(),
                        layers=False,
                        brush=make_brush(20),
                        height="min(460px, 90vw)",
                        elem_id="editor",
                    )
                    target = gr.Image(
                        visible=False, interactive=False, format="png", buttons=[], elem_id="target"
                    )
                    with gr.Row(visible=False, equal_height=True) as box:
                        numbers = gr.Textbox(
                            label="Or type left, top, right, bottom in px of the photo",
                            placeholder="10, 20, 200, 180",
                            scale=3,
                            elem_id="numbers",
                        )
                        mark = gr.Button("Mark the box", scale=1, min_width=130)
                    clear = gr.Button("Clear the marks", visible=False, size="sm")
            with gr.Column(min_width=320):
                go = gr.Button("3. Remove", variant="primary", interactive=False, elem_id="go")
                with gr.Accordion("More settings", open=False, elem_id="more"):
                    mode = gr.Radio(list(MODE_NAMES), value=list(MODE_NAMES)[0], label="Remove")
                    variants = gr.Slider(
                        1,
                        MAX_VARIANTS,
                        1,
                        step=1,
                        label="Variants, to pick the best",
                        elem_id="count",
                    )
                    steps = gr.Slider(1, 100, page.steps, step=1, label="Steps", elem_id="steps")
                    guidance = gr.Slider(1, 10, page.guidance, step=0.1, label="Guidance")
                    dilate = gr.Slider(
                        0, 100, 0, step=1, label="Widen the mark by (px, half on each side)"
                    )
                    seed = gr.Number(0, precision=0, minimum=0, label="Seed", elem_id="seed")
                with gr.Column(visible=False, elem_id="result") as result:
                    gallery = gr.Gallery(
                        label="Click on the best variant",
                        visible=False,
                        columns=MAX_VARIANTS,
                        height="auto",
                        allow_preview=False,
                        format="png",
                        buttons=[],
                        elem_id="variants",
                    )
                    slider = gr.ImageSlider(
                        label="Before and after: drag the line",
                        format="png",
                        buttons=["fullscreen"],
                        elem_id="slider",
                    )
                    with gr.Row():
                        png = gr.DownloadButton("Download PNG (exact)", elem_id="png")
                        jpg = gr.DownloadButton("Download JPEG (smaller)", elem_id="jpg")
                    text = gr.Markdown(elem_id="text")
                    gr.Markdown(service.note, elem_id="about")
        shown = [session, slider, png, jpg, text]
        opened = [session, marking, editor, go, result]
        switched = [session, editor, target, box, clear]
        asked = [editor, session, mode, variants, steps, guidance, seed, dilate]
        clicked = [session, target]
        photo.change(lambda: "Brush", None, tool, **PRIVATE).then(
            lambda: (gr.update(visible=True), *[gr.update(visible=False)] * 3),
            None,
            [editor, target, box, clear],
            **PRIVATE,
        ).then(page.open_photo, [photo, session], opened, **PRIVATE)
        tool.input(page.switch_tool, [tool, editor, session], switched, **PRIVATE)
        target.select(page.click, session, clicked, **MODEL, **PRIVATE)
        typed = [mark.click, numbers.submit]
        gr.on(typed, page.mark_box, [numbers, session], clicked, **PRIVATE)
        clear.click(page.clear, session, clicked, **PRIVATE)
        made = [result, gallery, *shown]
        go.click(page.make, asked, made, scroll_to_output=True, **MODEL, **PRIVATE)
        gallery.select(page.pick, session, shown, **PRIVATE)
        add_endpoint(service, page)
    return ui.queue(max_size=32, default_concurrency_limit=4)


def add_endpoint(service: Service, page: Page) -> None:
    """`/remove` over HTTP: files in, a file out, at their own size."""

    def remove(image, mask, mode, steps, guidance, seed, dilate, invert_mask):
        """Remove what a mask covers from an image. The answer is a PNG of the image's size, with
        its colour profile and EXIF.

        Args:
            image: image file.
            mask: image file of the image's aspect, white where something is to be removed.
            mode: "effect" (the object with its shadow), "exact" (the mask alone) or "full".
            steps: denoising steps.
            guidance: classifier-free guidance, 1 is off.
            seed: fixes the noise.
            dilate: widens the mask by so many px.
            invert_mask: black is to be removed, not white.
        """
        size = service.check(image)
        if not (0 <= steps <= 100 and 0 <= dilate <= 1000 and 1 <= guidance <= 20):
            raise refuse("Take 1 to 100 steps, 0 to 1000 px of dilate and a guidance of 1 to 20.")
        if not mask:
            raise refuse("There is no mask: send an image that is white where the object is.")
        with explain_errors(mask):
            hole = masks.binarise_mask(load_mask(mask, size, invert=invert_mask))
        (removal,) = service.remove(
            image,
            hole,
            mode=mode,
            num_inference_steps=int(steps),
            guidance_scale=float(guidance),
            seed=int(seed),
            dilate=int(dilate),
        )
        with tempfile.TemporaryDirectory(prefix="rorem-app-") as folder:
            yield save_removal(removal.image, image, Path(folder))  # Gradio copies it

    with gr.Column(visible=False):
        inputs = [
            gr.File(label="image"),
            gr.File(label="mask"),
            gr.Dropdown(list(MODES), value="effect", label="mode"),
            gr.Number(page.steps, precision=0, label="steps"),
            gr.Number(page.guidance, label="guidance"),
            gr.Number(0, precision=0, label="seed"),
            gr.Number(0, precision=0, label="dilate"),
            gr.Checkbox(False, label="invert_mask"),
        ]
        gr.Button().click(remove, inputs, gr.File(label="removal"), api_name="remove", **MODEL)


OPTIONS = (  # flag, environment variable, default, type, help
    (
        "--model",
        "ROREM_MODEL",
        "",
        str,
        "folder or Hub id of a remover (default: the authors' if it is on this machine, else "
        "builtin:remover, a miniature)",
    ),
    ("--lora", "ROREM_LORA", "", str, "folder or Hub id of a LoRA laid over it"),
    ("--revision", "ROREM_REVISION", None, str, "the model's Hub commit, tag or branch"),
    ("--device", "ROREM_DEVICE", "auto", str, "cpu, cuda, mps, or auto for the best there is"),
    ("--sam", "ROREM_SAM", "", str, "folder or Hub id of a SAM model: a click marks an object"),
    ("--max-megapixels", "ROREM_APP_MEGAPIXELS", 50, float, "the largest photo taken"),
    ("--max-file-mb", "ROREM_APP_FILE_MB", 60, int, "the largest file taken, MB"),
)


def build_parser() -> argparse.ArgumentParser:
    """The options; what is not given comes from the environment."""
    parser = argparse.ArgumentParser(
        prog="rorem app",
        description="Remove objects from photos on a page in your browser, or over its HTTP API.",
        epilog="Environment variables stand for options that are not given: "
        + ", ".join(f"{name} ({flag})" for flag, name, *_ in OPTIONS),
    )
    for flag, name, default, kind, text in OPTIONS:
        text += f" (default: {default})" if default else ""
        given = os.environ.get(name) or default
        word = flag.strip("-").replace("max-", "").upper()
        parser.add_argument(flag, type=kind, default=given, metavar=word, help=text)
    parser.add_argument("--port", type=int, help="default: the first free one from 7860")
    parser.add_argument("--host", help="address to listen on (default: this machine alone)")
    parser.add_argument(
        "--share", action="store_true", help="open a public address too, by Gradio's tunnel"
    )
    parser.add_argument("--open", action="store_true", help="open the page in a browser")
    return parser


def open_service(options) -> Service:
    """The models that the options name."""
    model = options.model or advice.choose_remover()
    remover = ObjectRemover.from_pretrained(
        model, lora=options.lora, revision=options.revision, device=options.device
    )
    segmenter = None
    if options.sam:
        from rorem_lib.models.segmenter import Segmenter

        segmenter = Segmenter(options.sam, device=remover.pipe.device)
    name = model + (f" with the LoRA {options.lora}" if options.lora else "")
    return Service(remover, name=name, segmenter=segmenter, megapixels=options.max_megapixels)


def launch(ui: gr.Blocks, **options):
    """Start the server. Nothing on the page comes from another machine, and nothing is reported."""
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    return ui.launch(
        css=CSS,
        theme=theme.set(block_info_text_color="*neutral_600"),
        footer_links=["api"],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        pwa=False,
        _frontend=False,  # it would ask for the page, and give up where that takes 3 s
        **options,
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the app until it is stopped; returns the exit code."""
    options = build_parser().parse_args(arguments)
    try:
        service = open_service(options)
    except (OSError, ValueError) as error:
        print(f"rorem app: {error}", file=sys.stderr)
        return 2
    ui = build(service)
    try:
        _, address, _ = launch(
            ui,
            prevent_thread_lock=True,
            quiet=True,
            server_name=options.host or os.environ.get("GRADIO_SERVER_NAME") or "127.0.0.1",
            server_port=options.port,
            share=options.share,
            inbrowser=options.open,
            max_file_size=options.max_file_mb * 2**20,
        )
    except OSError as error:  # the port is taken
        print(f"rorem app: {error}", file=sys.stderr)
        return 1
    print(f"The page: {address} (stop with Ctrl-C)", flush=True)
    ui.block_thread()
    return 0


if __name__ == "__main__":
    sys.exit(main())
