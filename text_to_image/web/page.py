"""The page itself: its parts, and what happens when they are used."""

from __future__ import annotations

import math
import random
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import astuple, fields, replace
from pathlib import Path
from typing import Any

import gradio as gr  # pyright: ignore[reportMissingImports]
from PIL import Image

from dalle_pytorch.errors import FileError, UserError
from dalle_pytorch.files.images import resize, tensor_to_image
from text_to_image.model import DEFAULT_MODEL
from text_to_image.results import Result
from text_to_image.web import html
from text_to_image.web.api import Api, accepted, running
from text_to_image.web.files import Folders, preview, read_picture, write_files
from text_to_image.web.forms import LONGEST_PROMPT, Diffusion, Generation, Limits, check_prompt, read_settings
from text_to_image.web.work import Drawn, Workers, diffuse, generate, own_steps, pick

STYLE = Path(__file__).with_name("page.css")
EXAMPLES = ("an avocado to the left of a chair on wood", "a penguin on white", "a star made of water",
            "a red seven on brick", "a cat and a rocket on a night sky")  # fmt: skip
OTHER_EXAMPLES = ("an armchair in the shape of an avocado", "a lighthouse in a storm")  # for models of anything
KEEP, HIDDEN = gr.skip(), gr.update(visible=False)  # leaves a part of the page as it is, or hides it


class Page:
    """Builds the page for `workers`."""

    def __init__(self, workers: Workers, limits: Limits, folders: Folders, batch_size: int = 4):
        self.workers, self.limits, self.folders, self.batch_size = workers, limits, folders, batch_size
        self.pipe = workers.pipes[0]

    # The parts

    def build(self) -> gr.Blocks:
        """The page, to be launched."""
        kept = 60 * self.limits.keep_minutes
        with gr.Blocks(title="Text to image", analytics_enabled=False, delete_cache=(min(kept, 300), kept)) as blocks:
            states = [gr.State(time_to_live=kept) for _ in range(3)]
            self.start, self.drawn, self.diffused = states  # a picture or its tokens; what `work` yields
            gr.HTML("<h1>Text to image</h1><p>A prompt becomes candidates, the best first. Pick some, and diffusion "
                    "redraws them larger and finer.</p>", elem_id="title")  # fmt: skip
            with gr.Row(elem_id="areas"):  # which the style sheet places
                with gr.Column(elem_id="request"):
                    self._request_parts()
                with gr.Column(elem_id="results"):
                    self._result_parts()
                with gr.Column(elem_id="options"):
                    self._option_parts()
            self._connect()
        blocks.queue(max_size=self.limits.max_waiting, api_open=False)
        return blocks

    def _request_parts(self) -> None:
        self.prompt = gr.Textbox(label="Prompt", placeholder=EXAMPLES[0], lines=2, max_lines=5, autofocus=True,
                                 max_length=LONGEST_PROMPT, elem_id="prompt")  # fmt: skip
        self.note = gr.HTML(elem_id="note")
        examples = EXAMPLES if self.pipe.model.folder == DEFAULT_MODEL else OTHER_EXAMPLES
        gr.Examples([[prompt] for prompt in examples], self.prompt, label="Examples", api_visibility="private")
        with gr.Row(equal_height=True):
            self.num_images = gr.Slider(1, self.limits.max_images, min(8, self.limits.max_images), step=1, buttons=[],
                                        label="Candidates", scale=5, min_width=160, elem_id="num-images")  # fmt: skip
            self.new_seed_button = gr.Button("New", render=False)
            self.seed = gr.Number(0, label="Seed", precision=0, buttons=[self.new_seed_button], scale=3, min_width=120,
                                  elem_id="seed")  # fmt: skip
        with gr.Row(elem_id="actions"):
            self.generate_button = gr.Button("Generate", variant="primary", scale=3, min_width=120, elem_id="generate")
            self.cancel_button = gr.Button("Cancel", scale=1, min_width=80, elem_id="cancel")

    def _option_parts(self) -> None:
        own, prior = self.pipe.sampling(), self.pipe.model.prior
        with gr.Accordion("Sampling", open=False, elem_id="sampling"):
            self.temperature = gr.Slider(0, 2, own.temperature, step=0.05, buttons=[], label="Temperature",
                                         info="Lower is likelier, higher more varied")  # fmt: skip
            self.top_p = gr.Slider(0.05, 1, own.top_p or 1, step=0.05, buttons=[], label="Top-p",
                                   info="Only the likeliest tokens of this share")  # fmt: skip
            self.cond_scale = gr.Slider(0, 8, own.cond_scale, step=0.25, buttons=[], label="Guidance",
                                        info="How strongly the prompt is followed; 1 is none")  # fmt: skip
        with gr.Accordion("Finish a picture, or load settings", open=False, elem_id="given"):
            self.picture = gr.File(label="A picture, of which the top rows are kept", height=130, elem_id="picture")
            self.picture_preview = gr.Image(show_label=False, interactive=False, visible=False, buttons=[], height=200,
                                            elem_id="picture-preview")  # fmt: skip
            self.rows = gr.Slider(1, prior.image_fmap_size - 1, prior.num_init_tokens(None) // prior.image_fmap_size,
                                  step=1, label=f"Rows kept, of {prior.image_fmap_size}", buttons=[],
                                  visible=False, elem_id="rows")  # fmt: skip
            self.settings = gr.File(label="settings.json of earlier images", height=130, elem_id="settings")
            self.settings_note = gr.HTML(elem_id="settings-note")

    def _result_parts(self) -> None:
        self.status = gr.HTML(html.status("Say what to draw."), elem_id="status")
        self.gallery = gr.Gallery(label="Candidates", show_label=False, columns=4, object_fit="contain",
                                  allow_preview=False, fit_columns=False, interactive=False, format="png", buttons=[],
                                  elem_id="candidates")  # fmt: skip
        self.pick_style = gr.HTML(elem_id="pick-style")
        with gr.Column(visible=False, elem_id="second-stage") as self.second_stage:
            self.picks = gr.Dropdown([], value=[], multiselect=True, label="Picked", elem_id="picks",
                                     info="Click on images to pick them, and again to put them back")  # fmt: skip
            with gr.Column(visible=self.workers.diffusion):
                self._diffusion_parts()
            self.files = gr.File(label="Download", file_count="multiple", interactive=False, visible=False,
                                 elem_id="files")  # fmt: skip

    def _diffusion_parts(self) -> None:
        most = self.limits.max_steps
        own = own_steps(self.pipe.model) if self.workers.diffusion else most
        with gr.Row(elem_id="diffusion"):
            self.clip_guidance = gr.Checkbox(False, label="CLIP guidance", info="Slower, nearer to the prompt",
                                             min_width=140, elem_id="clip-guidance")  # fmt: skip
            self.steps = gr.Slider(1, most, min(own, most), step=1, buttons=[], label="Steps", min_width=140,
                                   elem_id="steps")  # fmt: skip
            self.size = gr.Slider(64, self.limits.max_size, min(self._own_size(), self.limits.max_size), step=64,
                                  buttons=[], label="Pixels", min_width=140, elem_id="size")  # fmt: skip
        self.diffuse_button = gr.Button("Diffuse the picked images", variant="primary", elem_id="diffuse")
        self.slider = gr.ImageSlider(label="Before and after diffusion", interactive=False, format="png", visible=False,
                                     buttons=["fullscreen"], max_height=480, elem_id="before-after")  # fmt: skip
        self.after = gr.Gallery(label="After diffusion: click for the comparison", columns=4, object_fit="contain",
                                allow_preview=False, fit_columns=False, interactive=False, format="png", buttons=[],
                                visible=False, elem_id="after")  # fmt: skip

    def _own_size(self) -> int:
        """The side of the decoder's images."""
        if not self.workers.diffusion:
            return self.limits.max_size
        decoder = self.pipe.model.decoder
        return math.isqrt(self.pipe.model.prior.image_seq_len) * decoder.unet.image_size // decoder.image_fmap_size

    # What happens

    def _connect(self) -> None:
        device: dict[str, Any] = {"concurrency_id": "device", "concurrency_limit": len(self.workers.pipes)}
        shown: dict[str, Any] = {**device, "api_visibility": "private", "show_progress": "minimal",
                                 "show_progress_on": self.status}  # fmt: skip
        hidden: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        quick: dict[str, Any] = {**hidden, "queue": False}
        generation = [self.prompt, self.num_images, self.temperature, self.top_p, self.cond_scale, self.seed, self.rows]
        generating = gr.on(
            [self.generate_button.click, self.prompt.submit], self.on_generate, [*generation, self.start],
            [self.gallery, self.picks, self.status, self.drawn, self.diffused], validator=self.check_generation,
            **shown,
        )  # fmt: skip
        generating.then(self.on_end, self.drawn, self.status, **quick)
        running: list[Any] = [generating]
        diffusion, images = [self.clip_guidance, self.steps, self.size], [self.drawn, self.picks]
        if self.workers.diffusion:
            diffusing = self.diffuse_button.click(
                self.on_diffuse, [self.picks, *diffusion, self.drawn],
                [self.after, self.slider, self.status, self.diffused], validator=self.check_diffusion, **shown,
            )  # fmt: skip
            diffusing.then(self.on_end, self.diffused, self.status, **quick)
            diffusing.then(self.on_files, [*images, self.diffused], self.files, **hidden)
            self.after.select(self.on_compare, self.diffused, self.slider, **quick)
            running.append(diffusing)
        self.cancel_button.click(lambda: html.status("Cancelled."), None, self.status, cancels=running, **quick)
        self.gallery.select(self.on_select, images, [self.picks, self.gallery], **quick)
        self.gallery.change(self.on_candidates, [*images, self.diffused],
                            [self.second_stage, self.pick_style, self.slider, self.after], **quick)  # fmt: skip
        self.picks.change(lambda drawn, picks: html.pick_style(_places(drawn, picks)), images, self.pick_style, **quick)
        self.picks.change(self.on_files, [*images, self.diffused], self.files, **hidden)
        self.prompt.change(self.on_prompt, self.prompt, self.note, trigger_mode="always_last", **quick)
        self.new_seed_button.click(lambda: random.getrandbits(32), None, self.seed, **quick)
        picture = [self.start, self.picture_preview, self.rows, self.settings_note]
        self.picture.upload(self.on_picture, [self.picture, self.rows], picture, validator=self.check_picture, **hidden)
        gr.on([self.picture.clear, self.settings.clear], lambda: (None, HIDDEN, HIDDEN, ""), None, picture, **quick)
        self.rows.release(self.on_rows, [self.start, self.rows], self.picture_preview, **quick)
        self.settings.upload(
            self.on_settings, self.settings, [*generation, *diffusion, *picture, self.picture],
            validator=self.check_settings, **hidden,
        )  # fmt: skip
        Api(self.workers, self.limits, self.folders, self.batch_size).connect(**device)

    def check_generation(self, *values: Any) -> list[Any]:
        return _validation(Generation(*values[:-1]).refusals(self.limits), Generation, values)

    async def on_generate(self, *values: Any) -> AsyncIterator[tuple[Any, ...]]:
        """Draws candidates for a prompt; yields them, best first, whenever a batch of them is finished."""
        form = accepted(Generation(*values[:-1]), self.limits)
        shown = None
        async with running(generate(self.workers, form, values[-1], self.batch_size)) as work:
            async for drawn in work:
                shown, old = drawn.result, shown
                told = _progress(drawn, "candidate", "candidates")
                if shown is None:
                    yield [], gr.Dropdown(choices=[], value=[]), told, drawn, None
                elif shown is old and not drawn.finished:
                    yield KEEP, KEEP, told, drawn, KEEP
                else:
                    choices = [(f"#{index}", index) for index in sorted(image.index for image in shown)]
                    yield _candidates(shown), gr.Dropdown(choices=choices), told, drawn, None

    def check_diffusion(self, *values: Any) -> list[Any]:
        return _validation(Diffusion(*values[:-1]).refusals(self.limits), Diffusion, values)

    async def on_diffuse(self, *values: Any) -> AsyncIterator[tuple[Any, ...]]:
        """Redraws picked candidates of the session by diffusion; yields previews, and at last the images."""
        form, drawn = accepted(Diffusion(*values[:-1]), self.limits), values[-1]
        picked = pick(drawn and drawn.result, form.picks)
        if not picked:
            raise gr.Error("these images are not there any more; generate them again", print_exception=False)
        saved = replace(drawn.saved, diffusion=form)
        shown = None
        async with running(diffuse(self.workers, picked, saved)) as work:
            async for diffused in work:
                shown, old = diffused.result, shown
                images = [image for image in shown or () if image.upscaled_pixels]
                told = _progress(diffused, "image diffused", "images diffused")
                if not images:
                    yield HIDDEN, HIDDEN, told, diffused
                elif shown is old and not diffused.finished:
                    yield KEEP, KEEP, told, diffused
                else:
                    after = [(tensor_to_image(image.upscaled_pixels[0]), f"#{image.index}") for image in images]
                    yield (gr.Gallery(after, visible=len(picked) > 1),
                           gr.ImageSlider(_pair(images[0]), visible=True), told, diffused)  # fmt: skip

    def on_end(self, work: Drawn | None) -> Any:
        """The status of work that was cancelled or failed, over the progress that it said last."""
        return KEEP if work is None or work.finished else html.status(f"Stopped at {work.done / work.total:.0%}.")

    def on_compare(self, diffused: Drawn | None, event: gr.SelectData) -> Any:
        images = [image for image in (diffused and diffused.result) or () if image.upscaled_pixels]
        return _pair(images[event.index]) if event.index < len(images) else KEEP

    def on_candidates(self, drawn: Drawn | None, picks: Sequence[int], diffused: Drawn | None) -> tuple[Any, ...]:
        old = KEEP if diffused else HIDDEN  # images of candidates that are not shown any more
        return gr.Column(visible=bool(drawn and drawn.result)), html.pick_style(_places(drawn, picks)), old, old

    def on_select(self, drawn: Drawn | None, picks: Sequence[int], event: gr.SelectData) -> tuple[Any, Any]:
        """Picks the image that was clicked on, or puts it back; the gallery forgets it, so that it can be clicked on
        again."""
        result = (drawn and drawn.result) or Result([])
        if event.index >= len(result):
            return KEEP, gr.Gallery(selected_index=None)
        clicked = result[event.index].index
        changed = [index for index in picks if index != clicked] if clicked in picks else [*picks, clicked]
        return changed, gr.Gallery(selected_index=None)

    def on_files(self, drawn: Drawn | None, picks: Sequence[int], diffused: Drawn | None) -> Iterator[Any]:
        """The files of picked candidates: PNG, tokens, the diffused PNG where there is one, and the settings."""
        picked = pick(drawn and drawn.result, picks)
        if drawn is None or not picked:
            yield gr.File(None, visible=False)
            return
        last = diffused or drawn
        saved = last.saved if diffused else replace(last.saved, diffusion=Diffusion(list(picks)))
        with self.folders.writing() as folder:
            paths = write_files(folder, picked, diffused and diffused.result, saved)
            yield gr.File([str(path) for path in paths], visible=True)

    def on_prompt(self, prompt: str) -> str:
        """HTML of the prompt in which the words that the model has never seen are marked; empty without any."""
        try:
            prompt = check_prompt(prompt)
        except UserError:  # it is empty, or none
            return ""
        model = self.pipe.model
        return html.marked(prompt, model.unknown_words(prompt), model.prior.lost_text(prompt))

    def check_picture(self, path: str | None, rows: int) -> list[Any]:
        return [_file_validation(path, read_picture), gr.validate(True, "")]

    def on_picture(self, path: str, rows: int) -> tuple[Any, ...]:
        """A picture for the session, whose top rows every candidate begins with."""
        picture = _given(path, read_picture)
        return picture, gr.Image(self._preview(picture, rows), visible=True), gr.Slider(visible=True), ""

    def on_rows(self, start: Image.Image | list[int] | None, rows: int) -> Any:
        return self._preview(start, rows) if isinstance(start, Image.Image) else KEEP

    def _preview(self, picture: Image.Image, rows: int) -> Image.Image:
        return preview(picture, rows / self.pipe.model.prior.image_fmap_size)

    def _read_settings(self, path: str) -> Any:
        prior = self.pipe.model.prior
        return read_settings(path, prior.num_image_tokens, prior.image_seq_len)

    def check_settings(self, path: str | None) -> Any:
        return _file_validation(path, self._read_settings)  # gradio makes a list of it, of one field

    def on_settings(self, path: str) -> tuple[Any, ...]:
        """The values of a file of settings."""
        saved = _given(path, self._read_settings)
        said, first = ["The settings are loaded."], saved.init_image_tokens
        if first:
            rows = len(first) // self.pipe.model.prior.image_fmap_size
            said.append(f"The images will begin with the top {rows} rows of the picture that they began with.")
        if saved.models and dict(saved.models) != self.workers.models:
            said.append("They are of another model, with which the same settings draw other images.")
        diffusion = saved.diffusion
        return (
            *astuple(saved.generation), diffusion.clip_guidance, diffusion.steps, diffusion.size or self._own_size(),
            first, HIDDEN, HIDDEN, html.note(*said), None,
        )  # fmt: skip


def _validation(refusals: dict[str, str], form: type[Any], values: Sequence[Any]) -> list[Any]:
    """gradio's answer for each of the values, of which the first are those of the form."""
    said = [refusals.get(field.name) for field in fields(form)]
    return [gr.validate(not text, text or "") for text in [*said, *[None] * (len(values) - len(said))]]


def _file_validation(path: str | None, read: Callable[[str], Any]) -> Any:
    try:
        if path is not None:
            read(path)
    except FileError as error:
        Path(path or "").unlink(missing_ok=True)
        return gr.validate(False, str(error))
    return gr.validate(True, "")


def _given(path: str, read: Callable[[str], Any]) -> Any:
    """What is read of an uploaded file, which is deleted: nothing of it is served."""
    if not Path(path).is_file():
        raise gr.Error("the file is not there any more; upload it again", print_exception=False)
    try:
        return read(path)
    except FileError as error:
        raise gr.Error(str(error), print_exception=False) from error
    finally:
        Path(path).unlink(missing_ok=True)


def _progress(drawn: Drawn, one: str, many: str) -> str:
    """The status of a request."""
    count = len(drawn.result or ())
    if drawn.finished:
        return html.status(f"{count} {one if count == 1 else many}. Done.")
    return html.status(f"{drawn.done / drawn.total:.0%}", drawn.done, drawn.total)


def _candidates(result: Result) -> list[tuple[Image.Image, str]]:
    return [(image.image, f"#{image.index} · {image.score:.3f}") for image in result]


def _places(drawn: Drawn | None, picks: Sequence[int]) -> list[int]:
    """Where the picked candidates are in the gallery."""
    return [place for place, image in enumerate((drawn and drawn.result) or ()) if image.index in picks]


def _pair(image: Any) -> tuple[Image.Image, Image.Image]:
    """A candidate and what the diffusion made of it, of the same size."""
    after = image.upscaled_pixels[0]
    return tensor_to_image(resize(image.pixels[None], after.shape[-1])[0]), tensor_to_image(after)
