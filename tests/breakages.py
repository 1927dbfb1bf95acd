"""Breaks the code in a copy of the checkout, one small fault at a time, and reports which faults no test notices.

    python tests/breakages.py                 # all, some ten minutes; `make breakages` does the same
    python tests/breakages.py --only ema      # those with "ema" in their name
    python tests/breakages.py --list

A breakage replaces a text, which must occur exactly once in its file, and names the tests that should fail then, as
`file::test`. The working tree is never changed. First all of these tests run on the unbroken copy and must pass. The
exit code is 1 if a breakage survives, or is stale: its text or one of its tests is gone.

When code or tests move, mend the entries that are reported as stale. When a fault slips through that a test should
have noticed, add it here together with the test.
"""

import argparse
import contextlib
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tests' models are tiny

# Imported once: every breakage is tried out in a fork of this process.
import accelerate  # noqa: F401
import diffusers  # noqa: F401
import pytest
import torch  # noqa: F401
import transformers  # noqa: F401

ROOT = Path(__file__).resolve().parents[1]
FORK = multiprocessing.get_context("fork")
TIMEOUT = 300  # seconds for the tests of a breakage


class Breakage(NamedTuple):
    name: str
    file: str  # from the root, or from DALLE-pytorch/
    old: str
    new: str
    tests: str  # file::test, between blanks


CLIP, DALLE = "dalle_pytorch/clip/trainable.py", "dalle_pytorch/priors/dalle.py"
WEIGHTS = "dalle_pytorch/nn/attention_weights.py"
MASKS, SHIFT, ROTARY = (f"dalle_pytorch/nn/{name}.py" for name in ("masks", "token_shift", "rotary"))
LINEAR = "dalle_pytorch/nn/linear.py"
FILTERS, LOOP = "dalle_pytorch/sampling/filters.py", "dalle_pytorch/sampling/loop.py"
DISCRETE, VQGAN_TASK = "dalle_pytorch/vae/discrete.py", "dalle_pytorch/training/tasks/vqgan.py"
CLIP_TASK, PRIOR_TASK = "dalle_pytorch/training/tasks/clip.py", "dalle_pytorch/training/tasks/prior.py"
OPTIMIZERS, TRAINING = "dalle_pytorch/training/optimizers.py", "dalle_pytorch/training/loop.py"
LR_SCHEDULE = "dalle_pytorch/training/lr_schedule.py"
LOADING, SAMPLES = "dalle_pytorch/data/loading.py", "dalle_pytorch/data/samples.py"
DENOISER, SAMPLERS, SCHEDULE = "diffusion/denoiser.py", "diffusion/samplers.py", "diffusion/schedule.py"
RAY = "text_to_image/batch/ray_executor.py"
MIN_DALLE, LATENTS = "dalle_pytorch/priors/min_dalle.py", "text_to_image/latents.py"
WORK = "text_to_image/web/work.py"
DRIVER = "text_to_image/batch/driver.py"
CACHED = "test_sampling::test_cached_logits_equal_the_plain_forward"

BREAKAGES = [
    # Sampling
    Breakage("top-p stops a token early", FILTERS, "probabilities.cumsum(dim=-1) - probabilities",
             "probabilities.cumsum(dim=-1)", "test_sampling::test_top_p_keeps_the_fewest_that_reach_it"),
    Breakage("top-k does not count over all tokens", FILTERS, "(1 - top_k) * num_total", "(1 - top_k) * 8",
             "test_sampling::test_top_k_counts_over_all_tokens"),
    Breakage("equals of the last token looked at are forgotten", FILTERS, "least > values[:, -1:]",
             "least >= values[:, -1:]", "test_sampling::test_draw_is_filter_and_sample"),
    Breakage("top-p of the likeliest tokens alone", FILTERS, "top_p, logits.logsumexp(dim=-1, keepdim=True))", "top_p)",
             "test_sampling::test_draw_is_filter_and_sample"),
    Breakage("temperature without effect", FILTERS, "logits.to(dtype) / temperature", "logits.to(dtype)",
             "test_sampling::test_draws_follow_the_filtered_distribution"),
    Breakage("a uniform of 0 draws a removed token", FILTERS, "right=True", "right=False",
             "test_sampling::test_draws_at_the_ends_of_the_interval"),
    Breakage("uniforms do not depend on the prompt", "dalle_pytorch/sampling/uniforms.py",
             'f"{seed}:".encode() + tokens.tobytes()', 'f"{seed}:".encode()',
             "test_sampling::test_uniforms_belong_to_seed_prompt_candidate_and_place"),
    Breakage("uniforms of neighbouring candidates overlap", "dalle_pytorch/sampling/uniforms.py",
             "int(candidate) << 64", "int(candidate)",
             "test_sampling::test_uniforms_belong_to_seed_prompt_candidate_and_place"),
    Breakage("classifier-free guidance starts from the condition", LOOP, "return unconditional + (",
             "return conditional + (", "test_sampling::test_guidance_is_null_plus_scaled_difference"),
    Breakage("guided by the same text", DALLE, "return torch.zeros_like(text)", "return text",
             "test_sampling::test_guidance_is_null_plus_scaled_difference"),
    Breakage("shared prompts count for nothing", "dalle_pytorch/nn/attention_weights.py",
             "(sum_of_prompt.transpose(1, 2).reshape(sum_of_own.shape) - sum_of_own).sigmoid()",
             "torch.zeros_like(sum_of_own)", "test_sampling::test_prompts_are_shared_by_their_candidates"),
    Breakage("packed weights stay when weights change", "dalle_pytorch/sampling/steps.py",
             "kept is None or kept[0] != weights", "kept is None", "test_steps::test_changed_weights_are_packed_anew"),
    Breakage("rows in int8 share a scale", LINEAR, "x.abs().amax(dim=-1, keepdim=True)", "x.abs().amax()",
             "test_int8::test_a_row_is_the_same_bits_alone_and_among_others"),
    Breakage("sums in int8 are cut off", LINEAR, "neighbours.amax(dim=1, keepdim=True)",
             "weight.abs().amax(dim=1, keepdim=True)",
             "test_int8::test_sums_are_exact_where_16_bits_would_be_too_few"),
    Breakage("prompts are shared in int8", LOOP, "share=not prior.is_int8", "share=True",
             "test_dtypes::test_int8_candidates_are_the_same_alone_and_in_any_batch"),
    Breakage("models in int8 are other models", "text_to_image/model.py",
             'self._fingerprints["prior"] = prior.fingerprint()', "pass", "test_model::test_dtypes"),
    Breakage("results do not tell int8", "text_to_image/model.py", '{"dtype": dtype}', "{}", "test_model::test_dtypes"),
    Breakage("cached steps are a position late", LOOP, "tokens.shape[1] - 1, cache", "tokens.shape[1], cache",
             "test_sampling::test_learned_positions_of_cached_tokens"),
    Breakage("the key-value cache is written at its start", "dalle_pytorch/nn/cache.py",
             "self.keys[:, :, filled:stop] = keys", "self.keys[:, :, : keys.shape[2]] = keys", CACHED),
    Breakage("of equal scores the later candidate is kept", "dalle_pytorch/sampling/candidates.py",
             "heapq.nlargest(keep, best + batch, key=lambda candidate: candidate.score or 0.0)",
             "sorted(best + batch, key=lambda candidate: candidate.score or 0.0)[::-1][:keep]",
             "test_generation::test_best_first_and_earlier_of_equals_first"),
    Breakage("each batch replaces those before", "dalle_pytorch/sampling/candidates.py", "best + batch", "batch",
             "test_pipeline::test_candidates_come_in_batches_best_first"),
    Breakage("threads that wait for a busy core are kept", "dalle_pytorch/sampling/threads.py",
             "STEPS * GAIN * self._usual", "0.0",
             "test_threads::test_one_beside_a_busy_core_and_all_again"),
    Breakage("threads stay few when the core is idle again", "dalle_pytorch/sampling/threads.py",
             "min(self.most, self.threads * 2)", "self.threads",
             "test_threads::test_one_beside_a_busy_core_and_all_again"),
    Breakage("the rest of the process has the threads of sampling", "dalle_pytorch/sampling/threads.py",
             "            torch.set_num_threads(self.most)\n", "            pass\n",
             "test_threads::test_a_batch_that_fails_gives_the_threads_back"),
    # Latents moved by CLIP
    Breakage("no gradient goes straight through the codes", LATENTS,
             "return rows + (self.vae.embed(self.tokens(value)[None]) - rows).detach()",
             "return self.vae.embed(self.tokens(value)[None]) + 0 * rows",
             "test_latents::test_codes_are_the_nearest_with_a_gradient_that_goes_straight_through"),
    Breakage("negative prompts attract", LATENTS, "torch.tensor(weights, device=self.features.device) / total",
             "torch.tensor(weights, device=self.features.device).abs() / total",
             "test_latents::test_weights_and_negative_weights"),
    Breakage("the image is of the last latents", LATENTS, "1 - decay if settings.ema_decay else 1.0", "1.0",
             "test_latents::test_the_average_of_the_latents"),
    Breakage("the last image is kept, not the best", LATENTS, "if score > state.best_score:", "if score > -1:",
             "test_latents::test_the_best_image_is_kept"),
    Breakage("latents leave the range of the codebook", LATENTS, "value.clamp_(self.low, self.high)", "pass",
             "test_latents::test_latents_stay_in_the_range_of_the_codebook"),
    Breakage("every part of a story begins anew", LATENTS, "self._begin(state.best)",
             "self._begin(self.latents.encode(self.start_tokens))",
             "test_latents::test_a_story_goes_on_from_image_to_image"),
    Breakage("the optimizer's moments are not resumed", LATENTS, "        if moments:", "        if not moments:",
             "test_latents::test_a_resumed_run_is_the_uninterrupted_one"),
    Breakage("a stalled run goes on", LATENTS, "stalled = settings.patience and", "stalled = None and",
             "test_latents::test_a_run_ends_where_the_score_stalls"),
    Breakage("all iterations have the same cutouts", LATENTS, "state.chapter, state.iteration) for", "0) for",
             "test_latents::test_every_iteration_has_its_own_cutouts"),
    Breakage("the size of cutouts has no effect", "diffusion/guidance.py", "in sides or (size,", "in (size,",
             "test_latents::test_cutouts_of_a_run"),
    Breakage("the image is cut without its margin", LATENTS, "make_cutouts(padded,", "make_cutouts(image,",
             "test_latents::test_cutouts_of_a_run"),
    Breakage("only the first CLIP is followed", LATENTS, "for target, random in pairs]).mean()",
             "for target, random in pairs])[0]", "test_latents::test_several_clips_are_followed_together"),
    Breakage("weights of networks count as memory of a step", LATENTS,
             "kept.pop(value.untyped_storage()._cdata, None)", "pass",
             "test_latents::test_memory_is_told_without_taking_it"),
    Breakage("texts to remove are added", "text_to_image/pipeline.py", "(text, -weight) for", "(text, weight) for",
             "test_latents::test_prompts_of_the_pipeline"),
    Breakage("previews after the state stay when a run is resumed", "text_to_image/commands/optimize.py",
             "if not settings.resume or path.stem >", "if not settings.resume or path.stem <",
             "test_optimize::test_a_resumed_run_writes_what_an_uninterrupted_one_does"),
    Breakage("a notebook shows the traceback of a mistake", "dalle_pytorch/errors.py", "def _render_traceback_(",
             "def _render(", "test_notebooks::test_a_mistake_is_told_in_one_line"),
    Breakage("a page shows every state of a bar", "notebooks/render.py", '.rpartition("\\r")[2]', "",
             "test_notebooks::test_a_page"),
    Breakage("bars appear everywhere", "text_to_image/progress.py", "progress = in_notebook() if", "progress = True if",
             "test_progress::test_a_bar_where_it_is_asked_for"),
    Breakage("a finished bar stays open", "text_to_image/progress.py", "        if done >= total:", "        if False:",
             "test_progress::test_a_bar_counts_and_ends_by_itself"),
    Breakage("a list of ranks is one of numbers", "text_to_image/results.py",
             "[self.images[i] for i in index]", "self.images[: len(index)]",
             "test_pipeline::test_a_notebook_shows_a_result"),
    # The page
    Breakage("cancelled work goes on", WORK, "if closed.is_set():", "if False:",
             "test_work::test_work_ends_at_its_next_update"),
    Breakage("the last value of work is lost", WORK, "raise error[0]\n        yield latest[0]", "raise error[0]",
             "test_work::test_the_last_value_always_comes"),
    Breakage("a device whose request fails is lost", WORK, "        finally:\n            self._free.put(pipe)",
             "        finally:\n            pass", "test_work::test_one_request_at_a_time"),
    Breakage("a page without limits", "text_to_image/web/forms.py", "amount > most:", "False:",
             "test_forms::test_candidates_that_are_refused test_forms::test_diffusion_that_is_refused"),
    Breakage("a page that is open to all without a password", "text_to_image/web/server.py",
             "(share or host not in LOCAL)", "share", "test_web_files::test_a_page_for_others_needs_accounts"),
    Breakage("uploads keep their names", "text_to_image/web/uploads.py",
             "_FILE_NAME.sub(f'filename=\"{NAME}\"'.encode(), head)", "head",
             "test_web_files::test_uploaded_files_get_another_name"),
    Breakage("text of visitors is markup", "text_to_image/web/html.py", "<mark>{escape(word)}</mark>",
             "<mark>{word}</mark>", "test_web_files::test_text_of_visitors_is_escaped"),
    # The transformer
    Breakage("recorded attention weights are not causal", WEIGHTS, "        mask = torch.ones(",
             "        torch.ones(", "test_attention_weights::test_the_output_is_made_of_these_weights"),
    Breakage("recorded attention weights know no mask", WEIGHTS, "~mask, -torch.inf", "~mask, 0",
             "test_attention_weights::test_the_output_is_made_of_these_weights"),
    Breakage("attention is recorded for ever", WEIGHTS, "layer.recorded = None", "layer.recorded = recorded",
             "test_attention_weights::test_layers_are_recorded_in_the_order_of_their_calls_and_no_longer_than_asked"),
    Breakage("attention is not causal", "dalle_pytorch/nn/attention.py", "is_causal = self.causal and",
             "is_causal = False and", "test_dalle::test_no_position_sees_what_follows"),
    Breakage("no norm of queries and keys", "dalle_pytorch/nn/attention.py",
             "self.q_norm(q), self.k_norm(k), v", "q, k, v", "test_layers::test_attention"),
    Breakage("axial_row without its row", MASKS, "visible = rows_above == 0", "visible = columns_left == 0",
             "test_dalle::test_patterns"),
    Breakage("axial_col sees the column before", MASKS, "visible = columns_left == 0", "visible = columns_left == 1",
             "test_dalle::test_patterns"),
    Breakage("conv_like of 6 columns", MASKS, "(distance < CONV_KERNEL_SIZE)", "(distance <= CONV_KERNEL_SIZE)",
             "test_dalle::test_patterns"),
    Breakage("sparse attention does not see the text", MASKS, " | (key < self.text_len)", "",
             "test_dalle::test_sparse_pattern"),
    Breakage("sparse attention without random blocks", MASKS, "[:num_random]] = True", "[:num_random]] = False",
             "test_dalle::test_sparse_pattern"),
    Breakage("rotary rows and columns exchanged", ROTARY, "grid.repeat_interleave(side)", "grid.repeat(side)",
             "test_layers::test_rotary_angles"),
    Breakage("rotary angles of image tokens in the text", ROTARY, "8192.0", "0.0", "test_layers::test_rotary_angles"),
    Breakage("values are not rotated", "dalle_pytorch/nn/attention.py",
             "qkv = apply_rotary(qkv.flatten(2, 3), rotary).view_as(qkv)",
             "qkv = torch.cat((apply_rotary(qkv[:, :, :2].flatten(2, 3), rotary).view_as(qkv[:, :, :2]), "
             "qkv[:, :, 2:]), 2)", "test_layers::test_attention"),
    Breakage("token shift at the first column", SHIFT, "left = left.masked_fill(first_column[:, None], 0)", "pass",
             "test_layers::test_token_shift"),
    Breakage("token shift takes the token before for that above", SHIFT, "(0, 0, side, 0)", "(0, 0, 1, 0)",
             "test_layers::test_token_shift"),
    Breakage("token shift of the text", SHIFT, "F.pad(before, (0, 0, 1, -1))", "before",
             "test_layers::test_token_shift"),
    Breakage("reversible: the input is not recovered", "dalle_pytorch/nn/reversible.py",
             "return changed - out.detach(), grad_kept", "return changed, grad_kept",
             "test_dalle::test_reversible_gradients_equal_the_plain_ones"),
    Breakage("reversible: a gradient is dropped", "dalle_pytorch/nn/reversible.py", "grad1 = grad1 + grad",
             "grad1 = grad", "test_dalle::test_reversible_gradients_equal_the_plain_ones"),
    Breakage("reversible: dropout is drawn anew", "dalle_pytorch/nn/reversible.py",
             "_set_random_state(ctx.devices, random_state)", "pass",
             "test_dalle::test_reversible_dropout_is_drawn_once"),
    Breakage("layer scale does not fall with depth", "dalle_pytorch/nn/transformer.py", "else 1e-5 if layer < 24",
             "else 0.1 if layer < 24", "test_dalle::test_layer_scale_falls_with_depth"),
    # The prior
    Breakage("the image weighs like the text", DALLE, "(loss_text + self.loss_img_weight * loss_image)",
             "(loss_text + loss_image)", "test_dalle::test_loss_is_that_of_the_masked_logits"),
    Breakage("all padding is one token", DALLE, "torch.where(text == 0, padding, text)",
             "torch.where(text == 0, padding[:1], text)", "test_dalle::test_padding_at_each_position_is_a_token"),
    Breakage("stable leaves the gradient as it is", DALLE, "emb * 0.1 + emb.detach() * 0.9", "emb",
             "test_dalle::test_stable_scales_the_gradient_and_the_output"),
    Breakage("the prior ignores null_cond_prob", DALLE, "if null_cond_prob > 0:", "if False:",
             "test_prior_task::test_dropped_captions_are_empty_ones"),
    Breakage("training ignores null_cond_prob", PRIOR_TASK, "null_cond_prob=self.null_cond_prob", "null_cond_prob=0",
             "test_prior_task::test_dropped_captions_are_empty_ones"),
    Breakage("all captions are dropped or none", DALLE, "torch.rand(len(text), 1, device=text.device) < null",
             "torch.rand(1, 1, device=text.device) < null", "test_prior_task::test_share_of_captions_is_dropped_whole"),
    Breakage("training ignores image_noise", PRIOR_TASK, "image_noise=self.image_noise", "image_noise=0",
             "test_prior_task::test_image_noise_replaces_a_share_of_the_tokens_shown_and_none_of_those_predicted"),
    Breakage("image_noise is the whole share", DALLE, "image_noise * torch.rand(len(image), 1, device=image.device)",
             "image_noise",
             "test_prior_task::test_image_noise_replaces_a_share_of_the_tokens_shown_and_none_of_those_predicted"),
    Breakage("the subject weighs like the rest", PRIOR_TASK, "weights = 1 + (", "weights = 1 + 0 * (",
             "test_tasks::test_subject_weighs_more"),
    # DiscreteVAE
    Breakage("dVAE: the sign of the divergence", DISCRETE, "loss + self.kl_div_loss_weight * divergence",
             "loss - self.kl_div_loss_weight * divergence", "test_dalle::test_discrete_vae_losses"),
    Breakage("dVAE: straight-through is soft", DISCRETE, "hard=self.straight_through", "hard=False",
             "test_discrete::test_straight_through_decodes_one_code_and_has_the_gradient_of_the_mixture"),
    Breakage("dVAE: no ReinMax", DISCRETE, "2 * middle - plain / 2", "plain",
             "test_discrete::test_reinmax_gradient_is_exact_for_a_quadratic_function"),
    Breakage("dVAE: decoded without its normalization", DISCRETE, "(self.decode(tokens) * self.std + self.mean)",
             "self.decode(tokens)", "test_discrete::test_decoded_images_are_in_0_1"),
    Breakage("dVAE: temperature stays", "dalle_pytorch/training/tasks/discrete.py", "math.exp(-exponent)", "1.0",
             "test_vae_training::test_temperature_falls_as_upstream"),
    # VQGAN
    Breakage("VQGAN: no gradient straight through", VQGAN_TASK, "z + (codes - z).detach()", "codes",
             "test_vqgan_task::test_gradient_goes_straight_through_the_codes"),
    Breakage("VQGAN: codes do not follow the encodings", VQGAN_TASK, "self.sums.lerp_(sums, 1 - self.codebook_decay)",
             "pass",
             "test_vqgan_task::test_codebook_is_the_running_mean_of_the_encodings_that_chose_each_code"),
    Breakage("VQGAN: dead codes are not revived", VQGAN_TASK, "if dead.any() and", "if False and",
             "test_vqgan_task::test_code_that_nobody_chooses_is_moved_to_an_encoding_every_20_steps"),
    Breakage("VQGAN: no commitment", VQGAN_TASK, "self.commitment_weight * commitment", "0 * commitment",
             "test_vqgan_task::test_loss_is_the_reconstruction_and_the_commitment_by_their_weights"),
    Breakage("VQGAN: no gradient loss", VQGAN_TASK, "self.gradient_weight * _gradient_error", "0 * _gradient_error",
             "test_vqgan_task::test_warm_up_trains_a_plain_autoencoder"),
    Breakage("VQGAN: temperature stays", VQGAN_TASK, "self.starting_temp * (1 - min(1.0, done))", "self.starting_temp",
             "test_vqgan_task::test_temperature_falls_to_zero_over_70_percent_of_the_steps"),
    Breakage("VQGAN: the adversary deceives itself", "dalle_pytorch/training/losses.py", "F.relu(1 + drawn)",
             "F.relu(1 - drawn)", "test_vae_training::test_adversary_trains_both_sides_in_one_pass"),
    Breakage("VQGAN: nearest code by the dot product", "dalle_pytorch/vae/vqgan.py",
             "bias.copy_(-codes.square().sum(1))", "bias.zero_()",
             "test_vqgan::test_gumbel_projection_tied_to_codebook_finds_the_nearest_code"),
    # CLIP
    Breakage("CLIP: the scale is no exponential", CLIP, "scale = self.temperature.exp()", "scale = self.temperature",
             "test_clip::test_loss_with_and_without_negatives"),
    Breakage("CLIP: the loss is of texts alone", CLIP,
             "(F.cross_entropy(self.by_text, self.labels) + F.cross_entropy(self.by_image, self.labels)) / 2",
             "F.cross_entropy(self.by_text, self.labels)", "test_clip::test_loss_with_and_without_negatives"),
    Breakage("CLIP: negatives are left out", CLIP, "by_image = torch.cat((by_image, others), dim=1)", "pass",
             "test_clip::test_loss_with_and_without_negatives"),
    Breakage("CLIP: negatives count fourfold", CLIP_TASK, "others.unflatten(0, (len(images), -1)) if",
             "others.unflatten(0, (len(images), -1)).repeat(1, 4, 1) if",
             "test_clip_task::test_loss_counts_every_caption_of_the_batch_and_every_negative_once"),
    Breakage("CLIP: attributes are read from captions alone", CLIP_TASK,
             "(contrast.text_latents, contrast.image_latents)", "(contrast.text_latents, contrast.text_latents)",
             "test_clip_task::test_attributes_are_read_from_images_and_captions_by_one_map"),
    Breakage("CLIP: attributes of the second pair are left out", CLIP_TASK, '(name, f"second_{name}") if',
             '(name, name) if', "test_clip_task::test_attributes_of_the_second_pair_count_too"),
    Breakage("CLIP: no augmentation", CLIP_TASK, "self._augment(resize(", "(resize(",
             "test_clip_task::test_images_are_changed_unless_told_otherwise"),
    Breakage("CLIP: no noise", CLIP_TASK, "spread = self.noise *", "spread = 0 *",
             "test_clip_task::test_images_are_noisy_by_up_to_the_noise"),
    Breakage("CLIP: no crops", CLIP_TASK, "uniform_(self.smallest_crop, 1)", "fill_(1.0)",
             "test_clip_task::test_images_are_scaled_and_shifted"),
    Breakage("CLIP: no blur", CLIP_TASK, "torch.rand(()) < 0.5", "torch.rand(()) < 0",
             "test_clip_task::test_half_of_the_images_are_blurred"),
    Breakage("CLIP: no image is redrawn", CLIP_TASK, "< REDRAWN_SHARE", "< 0",
             "test_clip_task::test_half_of_the_images_are_redrawn_by_the_prior"),
    Breakage("CLIP: every image is redrawn", CLIP_TASK, "< REDRAWN_SHARE", "< 2",
             "test_clip_task::test_half_of_the_images_are_redrawn_by_the_prior"),
    Breakage("CLIP: images are redrawn with captions of others", CLIP_TASK, "captions[i] for i in chosen",
             "captions[-1 - i] for i in chosen", "test_clip_task::test_half_of_the_images_are_redrawn_by_the_prior"),
    Breakage("CLIP: images are redrawn at one temperature", CLIP_TASK, "uniform_(*TEMPERATURES)", "fill_(1.0)",
             "test_clip_task::test_an_image_is_redrawn_hotter_or_colder_from_step_to_step"),
    Breakage("CLIP: the prior is trained", CLIP_TASK, "prior.requires_grad_(False).eval()", "prior.eval()",
             "test_clip_task::test_the_prior_is_fixed_and_of_opaque_images"),
    Breakage("CLIP: patches are not dropped", CLIP, "if self.training and self.patch_dropout > 0", "if False",
             "test_clip::test_patch_dropout_is_for_training_only"),
    Breakage("CLIP: patches are dropped when it scores", CLIP, "if self.training and self.patch", "if self.patch",
             "test_clip::test_patch_dropout_is_for_training_only"),
    Breakage("CLIP: AttentionPool without its norm", CLIP, "self.to_kv(self.norm(x))", "self.to_kv(x)",
             "test_attention_pool::test_pool_is_the_attention_of_a_query_over_normalised_tokens"),
    Breakage("CLIP: padding counts", CLIP, "(out * kept).sum(dim=1) / kept.sum(dim=1)", "out.mean(dim=1)",
             "test_clip::test_padding_does_not_count"),
    Breakage("CLIP: processes do not share gradients", CLIP, "torch.cat(all_gather(latents))",
             "torch.cat(all_gather(latents)).detach()",
             "test_tasks::test_clip_sees_the_batch_of_all_processes"),
    # Diffusion
    Breakage("posterior variance of step 0 is zero", SCHEDULE,
             "torch.cat([self.posterior_variance[1:2], self.posterior_variance[1:]]).log()",
             "self.posterior_variance.clamp(min=1e-20).log()", "test_diffusion::test_posterior_is_bayes_rule"),
    Breakage("respacing keeps the betas", SCHEDULE, "Schedule(1 - visited / before,", "Schedule(self.betas[steps],",
             "test_diffusion::test_respacing_keeps_the_noise_at_the_steps_it_visits"),
    Breakage("respaced steps are told by their new number", SCHEDULE, "self.timestep_map[steps]",
             "torch.arange(len(steps))", "test_denoiser_losses::test_timesteps_are_told_in_thousandths_where_asked"),
    Breakage("timesteps are not rescaled", DENOISER, "1000 / self.schedule.num_training_steps", "1",
             "test_denoiser_losses::test_timesteps_are_told_in_thousandths_where_asked"),
    Breakage("x_0 from eps", DENOISER, "at((1 / alpha_bar - 1).sqrt(), step, x) * eps",
             "at((1 - alpha_bar).sqrt(), step, x) * eps", "test_diffusion::test_eps_and_x_0_networks_mean_the_same"),
    Breakage("x_0 is not clipped", DENOISER, "prediction.x_0.clamp(-1, 1)", "prediction.x_0",
             "test_guidance::test_gradient_is_that_of_the_loss_through_the_network"),
    Breakage("posterior mean", DENOISER, "of_x_0 = s.betas * s.alphas_cumprod_prev.sqrt()", "of_x_0 = s.betas",
             "test_diffusion::test_posterior_is_bayes_rule"),
    Breakage("the residual's mean is too large", DENOISER, "(std / total) ** 2", "std / total",
             "test_diffusion::test_network_of_residuals_has_the_best_linear_guess_before_it_has_learned"),
    Breakage("the residual's loss has another scale", DENOISER, "residual.std.flatten() ** 2", "residual.std.flatten()",
             "test_denoiser_losses::test_loss_of_residuals_is_in_units_of_their_spread"),
    Breakage("the gate is open", DENOISER, "residual.low_res + gate * residual.mean",
             "residual.low_res + residual.mean",
             "test_diffusion::test_network_of_residuals_has_the_best_linear_guess_before_it_has_learned"),
    Breakage("hybrid loss: the scale of the bound", DENOISER, "(self.num_steps / 1000)", "self.num_steps",
             "test_denoiser_losses::test_hybrid_loss_is_the_error_and_the_bound_over_all_steps_by_a_thousandth"),
    Breakage("hybrid loss: the bound moves the mean", DENOISER, "output.detach()", "output",
             "test_diffusion::test_variance_is_learned_by_the_bound_and_not_by_way_of_the_mean"),
    Breakage("the bound is that of one step", DENOISER, "output), log_variance) * self.num_steps",
             "output), log_variance)",
             "test_denoiser_losses::test_bound_alone_is_that_over_all_steps"),
    Breakage("timestep weights are left out", "diffusion/tasks.py", "(loss * weights).mean()", "loss.mean()",
             "test_diffusion_task::test_loss_is_the_mean_weighted_by_how_seldom_each_step_is_drawn"),
    Breakage("importance weights are 1", "diffusion/tasks.py", "1 / (self.num_steps * probabilities[steps])",
             "probabilities[steps] * 0 + 1",
             "test_diffusion_task::test_importance_weights_are_inverse_to_the_probabilities"),
    Breakage("DDIM: eta counts by its root", SAMPLERS, "variance = eta**2 *", "variance = eta *",
             "test_samplers::test_ddim_adds_eta_times_the_posteriors_deviation"),
    Breakage("DDIM: eps keeps its share under noise", SAMPLERS, "(1 - alpha_bar_prev - variance).sqrt()",
             "(1 - alpha_bar_prev).sqrt()", "test_samplers::test_ddim_adds_eta_times_the_posteriors_deviation"),
    Breakage("ancestral sampling ends with noise", SAMPLERS, "        if step > 0:\n", "        if True:\n",
             "test_samplers::test_last_step_has_no_noise"),
    Breakage("guidance leads away", SAMPLERS, "eps = prediction.eps - at(", "eps = prediction.eps + at(",
             "test_diffusion::test_guidance_moves_samples_where_the_gradient_points"),
    Breakage("guidance leads away in ancestral sampling", SAMPLERS, "x + prediction.log_variance.exp() * gradient",
             "x - prediction.log_variance.exp() * gradient",
             "test_diffusion::test_guidance_moves_samples_where_the_gradient_points"),
    Breakage("pure noise is guided", "diffusion/guidance.py", "< PURE_NOISE", "< 0",
             "test_guidance::test_pure_noise_is_not_guided"),
    Breakage("a held gradient is held, not its effect", "diffusion/guidance.py", "last[1] / shift", "last[1]",
             "test_guidance::test_between_gradients_the_prediction_moves_as_it_did"),
    Breakage("every step has a gradient", "diffusion/guidance.py", "0 < last[0] - step <", "0 >",
             "test_guidance::test_passes_of_clip_and_of_the_network"),
    Breakage("a linear network has no slope", "diffusion/denoiser.py", "alpha_bar.rsqrt() * variance /",
             "0 * variance /", "test_guidance::test_without_the_network_the_gradient_is_that_of_a_linear_one"),
    Breakage("a student aims at the teacher's end, not at the x_0 that leads there", "diffusion/tasks.py",
             "(result - ratio * x) / (math.sqrt(after) - ratio * math.sqrt(before))", "result",
             "test_diffusion_task::test_students_target_leads_where_the_teacher_ends"),
    Breakage("the model's own steps are ignored", "text_to_image/model.py",
             'self._recorded_with("num_inference_steps", self.parts.decoder) or NUM', "NUM",
             "test_model::test_the_models_own_steps_are_those_that_are_visited"),
    Breakage("how the model guides is ignored", "text_to_image/pipeline.py", "options = self.model.guidance | {",
             "options = {} | {", "test_model::test_how_the_model_guides_is_the_default"),
    Breakage("DPM-Solver++ does not extrapolate", SAMPLERS, "previous is not None and step > 0", "False",
             "test_samplers::test_dpm_solver_steps_as_the_scheduler_of_diffusers_does"),
    Breakage("cutouts ignore the step", "diffusion/guidance.py", '"cutouts", step)', '"cutouts")',
             "test_guidance::test_cutouts_are_new_at_every_step_and_an_images_own"),
    Breakage("cutouts ignore the image", "diffusion/guidance.py", 'generator(*identity, "cutouts", step)',
             'generator("cutouts", step)', "test_guidance::test_gradient_of_a_picture_does_not_depend_on_the_batch"),
    Breakage("skipped steps are the clear ones", SCHEDULE, "len(steps) - skipped", "skipped",
             "test_start::test_skipped_steps"),
    Breakage("sampling begins with noise alone", "diffusion/decoder.py", "images = denoiser.q_sample(",
             "denoiser.q_sample(",
             "test_start::test_the_first_step_is_the_vaes_image_under_its_noise"),
    Breakage("init_scale has no effect", "diffusion/guidance.py", "loss + init_scale * to_init(blended)", "loss",
             "test_start::test_init_scale_weighs_the_loss"),
    Breakage("images of a batch share their noise", "diffusion/decoder.py", "[generator(*identity) for",
             "[generator(seed) for", "test_diffusion::test_a_picture_does_not_depend_on_the_others_of_its_batch"),
    # Training
    Breakage("EMA: another decay", "dalle_pytorch/training/ema.py", "get_ema_multi_avg_fn(decay)",
             "get_ema_multi_avg_fn(0.9)", "test_training::test_average_is_the_exponential_one"),
    Breakage("EMA: starts from the weights before training", "dalle_pytorch/training/ema.py",
             "if self.updates == 0:", "if False:", "test_training::test_average_is_the_exponential_one"),
    Breakage("EMA: not in the native folder", TRAINING, "            self.ema.apply()\n", "            pass\n",
             "test_training::test_average_is_the_exponential_one"),
    Breakage("learning rate: warm-up starts at 0", LR_SCHEDULE, "(step + 1) / settings.warmup_steps",
             "step / settings.warmup_steps", "test_training::test_cosine"),
    Breakage("learning rate: the cosine ends at 0", LR_SCHEDULE, "(0.01 + 0.99 * 0.5 *", "(0.5 *",
             "test_training::test_cosine"),
    Breakage("learning rate: exponential every step", LR_SCHEDULE, "(since // 100)", "since",
             "test_training::test_constant_and_exponential"),
    Breakage("learning rate: the plateau falls to a tenth", LR_SCHEDULE, "factor=0.5", "factor=0.1",
             "test_training::test_plateau_halves_when_the_loss_no_longer_falls"),
    Breakage("learning rate: constant falls", LR_SCHEDULE,
             "return settings.learning_rate * self.factor.param_groups[0][\"lr\"]",
             "return settings.learning_rate / (1 + since)", "test_training::test_constant_and_exponential"),
    Breakage("learning rate: not set", TRAINING, 'group["lr"] = step.lr', "pass",
             "test_training::test_each_step_has_the_schedules_learning_rate"),
    Breakage("gradients are not clipped", TRAINING, "parameters(), self.settings.clip_grad_norm)",
             "parameters(), 1e9)", "test_training::test_long_gradients_are_clipped"),
    Breakage("bad steps are made", TRAINING, "return self.norm is None or math.isfinite(self.norm)", "return True",
             "test_training::test_bad_step_changes_nothing"),
    Breakage("bad steps are averaged", TRAINING, "if self.ema and step.applied", "if self.ema",
             "test_training::test_average_leaves_bad_steps_out"),
    Breakage("weight decay on vectors", OPTIMIZERS, '"params": plain, "weight_decay": 0.0',
             '"params": plain, "weight_decay": settings.weight_decay',
             "test_optimizers::test_vectors_and_numbers_have_no_weight_decay"),
    Breakage("shared rows move like AdamW's first step for ever", OPTIMIZERS, "1 - beta2**steps", "1 - beta2",
             "test_optimizers::test_rows_of_like_features_move_as_if_a_matrix_of_features_were_trained"),
    Breakage("words learn together too", PRIOR_TASK, "tables = self.dalle.to_logits, self.dalle.image_emb",
             "tables = self.dalle.to_logits, self.dalle.text_emb",
             "test_prior_task::test_rows_of_image_tokens_are_shared_and_none_of_words"),
    Breakage("Muon without Nesterov's momentum", OPTIMIZERS, 'p.grad.lerp(momentum, group["momentum"])', "momentum",
             "test_optimizers::test_muon_on_a_cpu_takes_torchs_steps_without_bfloat16"),
    Breakage("Muon's steps of a wide matrix", OPTIMIZERS, "max(p.shape) ** 0.5", "p.shape[0] ** 0.5",
             "test_optimizers::test_muon_on_a_cpu_takes_torchs_steps_without_bfloat16"),
    Breakage("AdamW's betas", OPTIMIZERS, ", betas=(0.9, 0.98)", "", "test_optimizers::test_constants_of_adamw"),
    Breakage("Muon on embeddings", OPTIMIZERS, "not in embeddings | heads", "not in heads",
             "test_optimizers::test_muon_has_the_transformers_matrices_and_nothing_else"),
    Breakage("Muon on the output layer", OPTIMIZERS, "not in embeddings | heads", "not in embeddings",
             "test_optimizers::test_muon_has_the_transformers_matrices_and_nothing_else"),
    Breakage("a resumed run starts the data anew", TRAINING, "first_step=first,", "first_step=0,",
             "test_resume::test_another_batch_size_goes_on_with_the_samples_that_are_left"),
    Breakage("a resumed run has new random numbers", "dalle_pytorch/training/state.py",
             'set_random_state(own["random"], accelerator.device)', "pass",
             "test_resume::test_random_numbers_of_every_kind_go_on"),
    # Data
    Breakage("every epoch has the same order", LOADING, "default_rng([self.seed, epoch]).permutation",
             "default_rng([self.seed]).permutation", "test_data::test_every_epoch_is_a_permutation_and_differs"),
    Breakage("processes read the same samples", LOADING, "range(step * self.batch_size + self.rank,",
             "range(step * self.batch_size,", "test_data::test_samples_of_a_step_do_not_depend_on_how_it_is_shared"),
    Breakage("always the first caption", SAMPLES, "else int(generator.integers(len(captions)))", "else 0",
             "test_data::test_caption_of_several_is_drawn_by_epoch"),
    Breakage("keys end at their first dot", "dalle_pytorch/data/shards.py", "return key, suffix",
             "return key.split('.')[0], suffix", "test_shards::test_keys_with_dots"),
    Breakage("shards are read as if sorted", "dalle_pytorch/data/shards.py", "while held > LARGEST_WAIT",
             "while held > 0", "test_shards::test_shards_that_are_not_sorted"),
    Breakage("crops are of the centre", SAMPLES, "left, top = left + across, top + down",
             "left, top = left + (whole - side) // 2, top + (whole - side) // 2",
             "test_data::test_random_crops_reach_all_edges"),
    Breakage("crops keep a smaller share", SAMPLES, "math.sqrt(generator.uniform(crop_ratio, 1))",
             "generator.uniform(crop_ratio, 1)", "test_data::test_random_crop_is_drawn_by_epoch_and_keeps_its_share"),
    Breakage("training crops stay at the left", LOADING, "slice(x * cell, (x + cells) * cell)",
             "slice(0, cells * cell)", "test_diffusion::test_training_crops_cut_pictures_and_conditions_alike"),
    # Files
    Breakage("written without fsync", "dalle_pytorch/files/atomic.py", "os.fsync(file.fileno())", "pass",
             "test_files::test_failed_write_leaves_the_old_file"),
    Breakage("written in place", "dalle_pytorch/files/atomic.py", "    temporary.unlink()\n    try:",
             "    temporary.unlink()\n    temporary = path\n    try:",
             "test_files::test_failed_write_leaves_the_old_file"),
    Breakage("open_clip's CLIPs have QuickGELU", "dalle_pytorch/published/clip_config.py",
             '"quick_gelu" if model.get("quick_gelu") else "gelu"', '"quick_gelu"',
             "test_open_clip::test_open_clip_folder"),
    Breakage("heads of 64 are guessed", "dalle_pytorch/published/clip_config.py",
             "return heads if heads > 0 else width // -heads", "return width // 64",
             "test_open_clip::test_open_clip_folder"),
    Breakage("the unpickler opens any class", "dalle_pytorch/published/unpickler.py", "raise _Refusal(full[:200])",
             "return super().find_class(module, name)", "test_foreign::test_nothing_is_run"),
    Breakage("tokens beyond the codebook", "dalle_pytorch/files/tokens.py", "array.max() >= num_tokens:",
             "array.max() > num_tokens:", "test_files::test_bad_tokens_are_refused"),
    Breakage("photos stay sideways", "dalle_pytorch/files/images.py", "else image.transpose(turn)", "else image",
             "test_images::test_orientation"),
    Breakage("every format is opened", "dalle_pytorch/files/images.py", ", formats=sorted(set(FORMATS.values()))", "",
             "test_images::test_formats_that_are_not_read"),
    Breakage("damaged metadata spoil an image", "dalle_pytorch/files/images.py", "if bare == data:", "if True:",
             "test_images::test_metadata_that_cannot_be_read_is_ignored"),
    Breakage("byte order marks become text", "dalle_pytorch/files/text.py", '"utf-8-sig")', '"utf-8")',
             "test_text::test_a_byte_order_mark_is_no_part_of_a_text"),
    Breakage("a tokenizer.json pads", "dalle_pytorch/tokenizers/hug.py", "self.tokenizer.no_padding()", "pass",
             "test_tokenizers::test_padding_and_truncation_kept_in_a_file_are_off"),
    Breakage("the score is not in the file name", "text_to_image/results.py", 'f"-{image.score:.4f}"', '"-0.0000"',
             "test_generate::test_scores_are_the_cosine_of_clip"),
    Breakage("sampling.json is ignored", "text_to_image/model.py", "own = {} if self.parts.prior else",
             "own = {} if True else",
             "test_generate::test_sampling_json_of_the_model_is_the_default"),
    Breakage("a decoder of one's own is guided by the default CLIP", "text_to_image/model.py",
             "if given.prior is None and given.decoder is None else None", "if given.prior is None else None",
             "test_model::test_a_decoder_of_ones_own_is_not_mixed_with_the_default_model"),
    Breakage("other parts go on", "dalle_pytorch/training/state.py", "if given != recorded:", "if False:",
             "test_resume::test_other_parts_are_refused_on_resuming"),
    Breakage("folders of others are written", "dalle_pytorch/training/native.py", "if not _is_ours(", "if False and (",
             "test_resume::test_folder_of_another_is_refused"),
    Breakage("token caches go by sizes", "dalle_pytorch/data/token_cache.py", "elif contents:", "elif False:",
             "test_token_cache::test_cache_of_something_else_is_refused"),
    Breakage("finished whatever it was made with", "text_to_image/results.py", "return found == made_with and",
             "return", "test_generate::test_prompts_go_on_where_they_were"),
    Breakage("tokens of other images stay", "text_to_image/results.py", "and found[1] not in same:", "and False:",
             "test_generate::test_a_second_result_leaves_no_mixture"),
    Breakage("a training that waits does not save", TRAINING,
             "if waiting and self.between_steps", "if False and self.between_steps",
             "test_resume::test_signal_while_data_do_not_come"),
    Breakage("names in a folder are addresses", "dalle_pytorch/data/shards.py", "os.path.abspath(path) for",
             "str(path) for",
             "test_shards::test_names_in_a_folder_are_paths"),
    Breakage("steps that are not finite go on", "diffusion/samplers.py", "if not bool(x.isfinite()",
             "if False and bool(x.isfinite()",
             "test_upscale::test_steps_that_are_not_finite_write_nothing"),
    Breakage("min-dalle begins with the last code", MIN_DALLE, "names = {None: self.num_image_tokens, ",
             "names = {None: self.num_image_tokens - 1, ", "test_published_priors::test_only_codes_are_drawn"),
    Breakage("min-dalle looks at padding", MIN_DALLE, "mask = self.encode_text(text), (text != PAD)",
             "mask = self.encode_text(text), (text != -1)",
             "test_published_priors::test_padding_is_masked_in_one_and_looked_at_in_the_other"),
    Breakage("min-dalle draws other tokens than codes", MIN_DALLE, "lm_head.weight[: self.num_image_tokens]",
             "lm_head.weight", "test_published_priors::test_only_codes_are_drawn"),
    Breakage("min-dalle has the prompt once for each candidate", MIN_DALLE, "if len(counts.unique()) > 1:", "if True:",
             "test_published_priors::test_candidates_share_the_prompt"),
    Breakage("min-dalle keeps its text encoder", MIN_DALLE, 'self.encoder.to("meta")', "pass",
             "test_published_priors::test_the_text_encoder_is_released"),
    Breakage("min-dalle's pixels are in [-1, 1]", "dalle_pytorch/published/priors.py", '"unit_range": True',
             '"unit_range": False', "test_published_priors::test_detokenizer"),
    Breakage("minDALL-E's first token is predicted one late", "dalle_pytorch/priors/mindalle.py",
             "[:, self.text_seq_len - 1 :]", "[:, self.text_seq_len :]",
             "test_published_priors::test_mindalle_as_recorded"),
    Breakage("the hub's hash is not checked", "dalle_pytorch/files/downloads.py", "file.sha256 or redirects.sha256",
             "file.sha256", "test_downloads::test_hash_of_the_hub"),
    Breakage("a panic of Rust goes through the boundary", "dalle_pytorch/files/boundary.py",
             'and type(error).__name__ != "PanicException"', "",
             "test_boundary::test_whatever_fails_is_a_refusal_with_its_cause"),
    Breakage("the size of a network is not compared with its weights", "dalle_pytorch/pretrained.py",
             "if min(left) < 0:", "if False:",
             "test_boundary::test_a_network_far_larger_than_its_weights_is_not_made"),
    Breakage("weights that are not finite are loaded", "dalle_pytorch/pretrained.py",
             "if not _is_finite(state[key])", "if False",
             "test_boundary::test_weights_are_finite_numbers_of_their_kind"),
    Breakage("the unpickler's copies are not counted", "dalle_pytorch/published/unpickler.py",
             "self.left -= sum(", "_ = sum(", "test_foreign::test_work_beyond_the_size_of_a_file_is_refused"),
    Breakage("aliases of YAML are not counted", "dalle_pytorch/files/documents.py",
             "and _values(node, {}) > MAX_YAML_VALUES", "and False",
             "test_boundary::test_aliases_of_aliases_are_refused"),
    Breakage("a thing recoloured to its natural colour", "dalle_pytorch/scenes/world.py",
             "colour not in NATURAL_COLOURS.get(kind, ())", "True", "test_things::test_captions_of_things_are_true"),
    Breakage("a recoloured thing keeps no shadows", "dalle_pytorch/scenes/sprites.py", "1 - 0.72 * darker",
             "1 - 0 * darker", "test_things::test_a_recoloured_thing_keeps_its_shading"),
    Breakage("a material that moves with the place", "dalle_pytorch/scenes/drawing.py",
             "[:side, :side]\n    return np", "[-side:, -side:]\n    return np",
             "test_things::test_what_is_made_of_a_material_shows_it_within_its_outline"),

    # Jobs on Ray
    Breakage("tasks that waited at a dead actor are lost", RAY, "self.held.extend(task for task, _ in actor.tasks)",
             "pass", "test_ray_executor::test_of_an_actor_that_dies_the_task_it_ran_is_failed_alone"),
    Breakage("actors are given tasks before they have models", RAY, " and actor.opening is None]", "]",
             "test_ray_executor::test_tasks_go_to_open_actors_with_the_fewest"),
    Breakage("nodes that join are not used", RAY, "max(1, room)", "1",
             "test_ray_executor::test_workers_are_as_many_as_there_is_room_for"),
    Breakage("an actor takes the whole GPU", RAY, 'share * self.bundle.get("GPU", 0)', 'self.bundle.get("GPU", 0)',
             "test_ray_executor::test_stages_on_a_gpu_are_actors_with_fractions_of_it"),

    # Jobs
    Breakage("a block that fails takes all its prompts with it", DRIVER, "if len(prompts) == 1:", "if prompts:",
             "test_batch_work::test_a_block_is_tried_then_narrowed"),
    Breakage("a block that failed by chance is drawn prompt by prompt", DRIVER, "self.probed = True\n",
             "self.narrowed = True\n", "test_batch_work::test_a_block_that_failed_by_chance_is_computed_whole"),
    Breakage("tokens of unfinished units are sampled again", DRIVER,
             "self.folder.kept_tokens(self.unit, block.number, block.items)", "None",
             "test_batch::test_what_is_done_is_not_done_again"),
    Breakage("what had no room is given to no worker that begins later", DRIVER,
             "            self._submit()  # also what", "            # also what",
             "test_batch::test_the_last_task_waits_for_a_worker_to_begin"),
    Breakage("a job goes on with other settings", "text_to_image/batch/folder.py",
             "in sorted(self.settings.keys() | asked.settings.keys()):", "in ():",
             "test_batch::test_another_setting_is_refused_by_name"),
    Breakage("images of a list may be anywhere", "text_to_image/batch/plan.py", "if not inside:", "if False:",
             "test_batch_work::test_bad_rows_are_set_aside_with_place_and_reason"),
    Breakage("the last block of a unit is lost", "text_to_image/batch/tasks.py", "        if block:\n",
             "        if 0:\n",
             "test_batch_work::test_blocks_are_filled_by_several_prompts_and_a_prompt_fills_several"),
]  # fmt: skip


def copy_checkout(folder: Path) -> None:
    """Copies what git tracks, and what is new and not ignored, as it is now."""
    listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT,
                            capture_output=True, check=True, text=True).stdout  # fmt: skip
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)


def node_ids(root: Path, breakage: Breakage) -> list[str]:
    """pytest's names of the breakage's tests. Raises `LookupError` for a file that is not there."""
    ids = []
    for test in breakage.tests.split():
        stem, name = test.split("::")
        found = list(root.glob(f"tests/**/{stem}.py"))
        if len(found) != 1 or f"def {name}(" not in found[0].read_text("utf-8"):
            raise LookupError(f"no test {test}")
        ids.append(f"{found[0].relative_to(root)}::{name}")
    return ids


def run_tests(root: Path, ids: list[str], timeout: float | None = None) -> int:
    """pytest's exit code, 124 after `timeout` seconds. Its output goes to `root`/pytest.log."""
    process = FORK.Process(target=_run_in_child, args=(root, ids))
    process.start()
    process.join(timeout)
    if process.is_alive():
        process.kill()
        process.join()
        return 124
    return process.exitcode


def _run_in_child(root: Path, ids: list[str]) -> None:
    log = os.open(root / "pytest.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    # The copy's packages in place of those of this checkout, here and in what the tests start.
    sys.path[:1] = paths = [str(root / "DALLE-pytorch"), str(root)]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    # Compiled files are told apart by whole seconds and sizes, which a breakage may leave as they were.
    sys.dont_write_bytecode, os.environ["PYTHONDONTWRITEBYTECODE"] = True, "1"
    os.chdir(root)
    code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *ids])
    sys.stdout.flush()
    os._exit(code)


def broken(root: Path, breakage: Breakage) -> tuple[Path, str, str]:
    """The file, its text and its text with the breakage. Raises `LookupError` if the old text is not there once."""
    path = next((root / prefix / breakage.file for prefix in ("", "DALLE-pytorch")
                 if (root / prefix / breakage.file).is_file()), None)  # fmt: skip
    if path is None:
        raise LookupError(f"no file {breakage.file}")
    text = path.read_text("utf-8")
    if text.count(breakage.old) != 1:
        raise LookupError(f"old text found {text.count(breakage.old)} times in {breakage.file}")
    return path, text, text.replace(breakage.old, breakage.new)


def try_out(root: Path, breakage: Breakage) -> str:
    """`killed`, `survived`, `timed out` or `stale: why`."""
    try:
        path, text, changed = broken(root, breakage)
        ids = node_ids(root, breakage)
    except LookupError as error:
        return f"stale: {error}"
    path.write_text(changed, "utf-8")
    try:
        code = run_tests(root, ids, TIMEOUT)
    finally:
        path.write_text(text, "utf-8")
    # Anything but failed tests, such as a file that cannot be imported, says nothing about the tests.
    return {0: "survived", 1: "killed", 124: "timed out"}.get(code, f"stale: pytest ended with exit code {code}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="NAME", help="the breakages with this in their name")
    parser.add_argument("--list", action="store_true", help="name the breakages and run nothing")
    arguments = parser.parse_args()
    chosen = [breakage for breakage in BREAKAGES if (arguments.only or "").lower() in breakage.name.lower()]
    if arguments.list:
        print("\n".join(f"{breakage.name:<60} {breakage.file}" for breakage in chosen))
        return 0

    verdicts = []
    with tempfile.TemporaryDirectory(prefix="breakages-") as name:
        root = Path(name)
        copy_checkout(root)
        ids = set()
        for breakage in chosen:
            with contextlib.suppress(LookupError):  # reported below
                ids.update(node_ids(root, breakage))
        if run_tests(root, sorted(ids)):
            print((root / "pytest.log").read_text(), "these tests fail on the code as it is", file=sys.stderr)
            return 1
        for breakage in chosen:
            started = time.monotonic()
            verdicts.append(try_out(root, breakage))
            print(f"{breakage.name:<60} {verdicts[-1]:<10} {time.monotonic() - started:5.1f} s", flush=True)
    count, killed, survived = len(verdicts), verdicts.count("killed"), verdicts.count("survived")
    print(f"{killed} of {count} breakages killed, {survived} survived, {count - killed - survived} stale or timed out")
    return 0 if killed == count else 1


if __name__ == "__main__":
    sys.exit(main())
