"""The page itself: its parts, and what happens when they are used."""

from __future__ import annotations

import math
import random
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from dataclasses import astuple, fields, replace
from pathlib import Path
from typing import Any

import gradio as gr  # pyright: ignore[reportMissingImports]
from PIL import Image
from torch import Tensor

from dalle_pytorch.errors import UserError
from dalle_pytorch.files.images import tensor_to_image
from text_to_image.model import DEFAULT_MODEL
from text_to_image.results import Result
from text_to_image.web import html
from text_to_image.web.answers import candidates, file_validation, given, pair, progress, validation
from text_to_image.web.api import Api, accepted, running
from text_to_image.web.files import Folders, preview, read_picture, read_tokens, write_files
from text_to_image.web.forms import LONGEST_PROMPT, Diffusion, Generation, Limits, check_prompt, read_settings
from text_to_image.web.work import Drawn, Workers, diffuse, generate, load, own_steps, pick

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
        self.prompt = gr.Textbox(label="Prompt", placeholder=EXAMPLES[0], lines=1, max_lines=5, autofocus=True,
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
        self.refused = gr.HTML(elem_id="refused", elem_classes="refusal")

    def _option_parts(self) -> None:
        own, prior = self.pipe.sampling(), self.pipe.model.prior
        with gr.Accordion("Sampling", open=False, elem_id="sampling"):
            self.temperature = gr.Slider(0, 2, own.temperature, step=0.05, buttons=[], label="Temperature",
                                         info="Lower is likelier, higher more varied")  # fmt: skip
            self.top_p = gr.Slider(0.05, 1, own.top_p or 1, step=0.05, buttons=[], label="Top-p",
                                   info="Only the likeliest tokens, as many as reach this probability")  # fmt: skip
            self.cond_scale = gr.Slider(0, 8, own.cond_scale, step=0.25, buttons=[], label="Guidance",
                                        info="How strongly the prompt is followed; 1 is none")  # fmt: skip
        with gr.Accordion("Finish a picture, or load earlier images", open=False, elem_id="given"):
            self.picture = gr.File(label="A picture, of which the top rows are kept", height=130, elem_id="picture")
            self.picture_preview = gr.Image(show_label=False, interactive=False, visible=False, buttons=[], height=200,
                                            elem_id="picture-preview")  # fmt: skip
            self.rows = gr.Slider(1, prior.image_fmap_size - 1, prior.num_init_tokens(None) // prior.image_fmap_size,
                                  step=1, label=f"Rows kept, of {prior.image_fmap_size}", buttons=[],
                                  visible=False, elem_id="rows")  # fmt: skip
            self.settings = gr.File(label="settings.json of earlier images", height=130, elem_id="settings")
            self.settings_note = gr.HTML(elem_id="settings-note")
            self.tokens = gr.File(label=".npy of earlier images, to diffuse them", height=130, file_count="multiple",
                                  visible=self.workers.diffusion, elem_id="tokens")  # fmt: skip

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
        self.diffusion_refused = gr.HTML(elem_id="diffusion-refused", elem_classes="refusal")
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
        results = [self.gallery, self.picks, self.status, self.drawn, self.diffused]
        generating = gr.on(
            [self.generate_button.click, self.prompt.submit], self._refused(Generation, generation), generation,
            self.refused, **quick,
        ).then(self.on_generate, [*generation, self.start], results,
               validator=self.check_generation, **shown)  # fmt: skip
        loading = self.tokens.upload(self.on_tokens, [self.tokens, self.prompt, self.seed], results,
                                     validator=self.check_tokens, **shown)  # fmt: skip
        running: list[Any] = [generating, loading]
        diffusion, images = [self.clip_guidance, self.steps, self.size], [self.drawn, self.picks]
        if self.workers.diffusion:
            redrawn = [self.picks, *diffusion]
            diffusing = self.diffuse_button.click(
                self._refused(Diffusion, redrawn), redrawn, self.diffusion_refused, **quick
            ).then(self.on_diffuse, [*redrawn, self.drawn], [self.after, self.slider, self.status, self.diffused],
                   validator=self.check_diffusion, **shown)  # fmt: skip
            diffusing.then(self.on_files, [*images, self.diffused], self.files, **hidden)
            self.after.select(self.on_compare, self.diffused, self.slider, **quick)
            running.append(diffusing)
        for event in running:
            event.then(self.on_end, self.status, self.status, **quick)
            event.failure(self.on_end, self.status, self.status, **quick)  # which gradio's `then` leaves out
        self.cancel_button.click(self.on_cancel, self.status, self.status, cancels=running, **quick)
        self.gallery.select(self.on_select, images, [self.picks, self.gallery], **quick)
        # Without the picks: gradio refuses those that the browser may still have of the candidates before.
        self.gallery.change(self.on_candidates, [self.drawn, self.diffused],
                            [self.second_stage, self.slider, self.after], **quick)  # fmt: skip
        self.picks.change(html.pick_style, self.picks, self.pick_style, **quick)
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

    def _refused(self, form: type[Generation | Diffusion], parts: Sequence[Any]) -> Callable[..., str]:
        """A function of the values of the form's parts: HTML that says what of them is refused, and stays.

        gradio marks the parts themselves, but takes its marks away when any event ends, be it one that was under way.
        """

        def refused(*values: Any) -> str:
            refusals = form(*values).refusals(self.limits)
            labels = {field.name: part.label for field, part in zip(fields(form), parts, strict=True)}
            return html.note(*(f"{labels[name]}: {said}" for name, said in refusals.items())) if refusals else ""

        return refused

    def check_generation(self, *values: Any) -> list[Any]:
        return validation(Generation(*values[:-1]).refusals(self.limits), Generation, values)

    async def on_generate(self, *values: Any) -> AsyncIterator[tuple[Any, ...]]:
        """Draws candidates for a prompt; yields them, best first, whenever a batch of them is finished."""
        form = accepted(Generation(*values[:-1]), self.limits)
        async for answer in self._candidates(
            generate(self.workers, form, values[-1], self.batch_size), "candidate", "candidates"
        ):
            yield answer

    async def _candidates(self, work: AsyncGenerator[Drawn], one: str, many: str) -> AsyncIterator[tuple[Any, ...]]:
        """What the page shows of work that makes candidates."""
        shown = None
        async with running(work):
            async for drawn in work:
                shown, old = drawn.result, shown
                told = progress(drawn, one, many)
                if shown is None:
                    yield [], gr.Dropdown(choices=[], value=[]), told, drawn, None
                elif shown is old and not drawn.finished:
                    yield KEEP, KEEP, told, drawn, KEEP
                else:
                    choices = [(f"#{index}", index) for index in sorted(image.index for image in shown)]
                    yield candidates(shown), gr.Dropdown(choices=choices), told, drawn, None

    def check_diffusion(self, *values: Any) -> list[Any]:
        return validation(Diffusion(*values[:-1]).refusals(self.limits), Diffusion, values)

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
                told = progress(diffused, "image diffused", "images diffused")
                if not images:
                    yield HIDDEN, HIDDEN, told, diffused
                elif shown is old and not diffused.finished:
                    yield KEEP, KEEP, told, diffused
                else:
                    after = [(tensor_to_image(image.upscaled_pixels[0]), f"#{image.index}") for image in images]
                    yield (gr.Gallery(after, visible=len(picked) > 1),
                           gr.ImageSlider(pair(images[0]), visible=True), told, diffused)  # fmt: skip

    def on_cancel(self, status: str | None) -> str:
        return html.stopped(status) or html.status("Cancelled.")

    def on_end(self, status: str | None) -> Any:
        """The status of work that was cancelled or failed, over the progress that it said last.

        It goes by what the page shows, not by the state of the session: work that was cancelled while it waited leaves
        that of the work before.
        """
        return html.stopped(status) or KEEP

    def on_compare(self, diffused: Drawn | None, event: gr.SelectData) -> Any:
        images = [image for image in (diffused and diffused.result) or () if image.upscaled_pixels]
        return pair(images[event.index]) if event.index < len(images) else KEEP

    def on_candidates(self, drawn: Drawn | None, diffused: Drawn | None) -> tuple[Any, ...]:
        old = KEEP if diffused else HIDDEN  # images of candidates that are not shown any more
        return gr.Column(visible=bool(drawn and drawn.result)), old, old

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
        if diffused is not None and diffused.finished:
            result, saved = diffused.result, diffused.saved
        else:  # the previews of diffusion that was cancelled are no images
            result, saved = None, replace(drawn.saved, diffusion=Diffusion(list(picks)))
        with self.folders.writing() as folder:
            paths = write_files(folder, picked, result, saved)
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
        return [file_validation(path, read_picture), gr.validate(True, "")]

    def on_picture(self, path: str, rows: int) -> tuple[Any, ...]:
        """A picture for the session, whose top rows every candidate begins with."""
        picture = given(path, read_picture)
        return picture, gr.Image(self._preview(picture, rows), visible=True), gr.Slider(visible=True), ""

    def on_rows(self, start: Image.Image | list[int] | None, rows: int) -> Any:
        return self._preview(start, rows) if isinstance(start, Image.Image) else KEEP

    def _preview(self, picture: Image.Image, rows: int) -> Image.Image:
        return preview(picture, rows / self.pipe.model.prior.image_fmap_size)

    def _read_settings(self, path: str) -> Any:
        prior = self.pipe.model.prior
        return read_settings(path, prior.num_image_tokens, prior.image_seq_len)

    def check_settings(self, path: str | None) -> Any:
        return file_validation(path, self._read_settings)  # gradio makes a list of it, of one field

    def on_settings(self, path: str) -> tuple[Any, ...]:
        """The values of a file of settings."""
        saved = given(path, self._read_settings)
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

    def _read_tokens(self, path: str) -> Tensor:
        prior = self.pipe.model.prior
        return read_tokens(path, prior.num_image_tokens, prior.image_seq_len)

    def check_tokens(self, paths: Sequence[str] | None, prompt: str, seed: int) -> list[Any]:
        said = [file_validation(path, self._read_tokens) for path in paths or ()]
        refused = next((answer for answer in said if not answer["is_valid"]), gr.validate(True, ""))
        if len(said) > self.limits.max_images:
            refused = gr.validate(False, f"this page allows at most {self.limits.max_images}, got {len(said)}")
        refusals = Generation(prompt, seed=seed).refusals(self.limits)
        return [refused, *(gr.validate(name not in refusals, refusals.get(name, "")) for name in ("prompt", "seed"))]

    async def on_tokens(self, paths: Sequence[str], prompt: str, seed: int) -> AsyncIterator[tuple[Any, ...]]:
        """The images of earlier tokens as candidates, the best first by the prompt."""
        form = accepted(Generation(prompt, len(paths), seed=seed), self.limits)
        tokens = [given(path, self._read_tokens) for path in paths]
        async for answer in self._candidates(load(self.workers, tokens, form), "image", "images"):
            yield answer
