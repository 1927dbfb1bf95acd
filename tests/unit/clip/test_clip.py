"""The trainable CLIP: the same numbers as DALLE-pytorch, masks, negatives, and its use as a scorer."""

import pytest
import torch
import torch.nn.functional as F
from factories import Letters, clip_batch, make_clip
from safetensors.torch import load_file

from dalle_pytorch.clip.trainable import CLIP
from dalle_pytorch.errors import CheckpointError, SamplingDiverged
from dalle_pytorch.published.clip import load_clip


def test_same_numbers_as_upstream(parity):
    folder = parity("dalle/clip_trainable")
    golden = load_file(folder / "golden.safetensors")
    clip = load_clip(folder / "clip.pt")
    batch = golden["text"], golden["image"], golden["text_mask"].bool()
    with torch.no_grad():
        for actual, reference in ((clip(*batch), "scores"), (clip(*batch, return_loss=True), "loss")):
            assert (actual - golden[reference]).abs().max() <= 1e-4 * golden[reference].abs().max()


def test_padding_does_not_count():
    clip, (text, image) = make_clip().eval(), clip_batch()
    features = clip.encode_text(text)
    torch.testing.assert_close(features, clip.encode_text(text[:, :4]))
    torch.testing.assert_close(
        clip(text, image, text_mask=text != 0), F.cosine_similarity(features, clip.encode_image(image)) * torch.e
    )
    assert not torch.allclose(clip(text, image), clip(text, image, text_mask=text != 0))
    assert torch.isfinite(clip.encode_text(torch.zeros_like(text))).all()


def test_scores_that_are_not_finite_are_no_scores():
    clip, (_, image) = make_clip().eval(), clip_batch()
    clip.tokenizer = Letters()
    assert clip.score("ab", image).isfinite().all()
    clip.to_visual_latent.weight.data.fill_(float("nan"))
    with pytest.raises(SamplingDiverged, match="this CLIP scores images with numbers that are not finite"):
        clip.score("ab", image)


def test_a_small_thing_counts_more_when_patches_are_pooled_by_attention():
    """Of 16 patches one is different: the mean hears a sixteenth of it, a query that it answers nearly all."""
    clip = make_clip(visual_attention_pool=True)
    pool, patches = clip.visual_pool, torch.zeros(1, 16, 24)
    patches[0, 5, :12], patches[0, 5, 12:] = 1, -1
    torch.nn.init.eye_(pool.to_kv.weight[:24].detach())
    pool.to_kv.weight.data[24:] = torch.eye(24)
    pool.query.data = 20 * pool.norm(patches[0, 5]).detach().view(pool.query.shape)
    pooled = pool(patches)
    assert torch.allclose(pooled[0], pool.norm(patches)[0, 5], atol=1e-3)
    with pytest.raises(ValueError, match="dim_image must be a multiple of 4 pooling heads, got 26"):
        make_clip(dim_image=26, visual_attention_pool=True)


def test_convolutions_in_place_of_patches(tmp_path):
    clip, (text, image) = make_clip(visual_conv_stem=True, visual_attention_pool=True), clip_batch()
    features = clip.encode_image(image)
    assert features.shape == (3, 16)
    # Row by row, as positions are numbered: a change at the upper right is seen by the patches there alone.
    other = image.clone()
    other[:, :, :2, -2:] = 0
    changed = (clip._embed_patches(image) - clip._embed_patches(other)).detach().norm(dim=2).mean(0)
    assert changed[3] > changed[12]
    clip(text, image, return_loss=True).backward()
    assert all(p.grad is not None and p.grad.any() for p in clip.patch_emb.parameters())
    clip.save_pretrained(tmp_path / "clip")
    torch.testing.assert_close(CLIP.from_pretrained(tmp_path / "clip").encode_image(image), features)
    with pytest.raises(ValueError, match="visual_patch_size of 2, 4, 8"):
        make_clip(visual_conv_stem=True, visual_image_size=18, visual_patch_size=6)


def test_layer_scale_of_every_branch():
    clip = make_clip(text_enc_depth=2)
    clip.text_transformer.set_layer_scale(0.7)
    scales = [p for name, p in clip.text_transformer.named_parameters() if name.endswith("scale")]
    assert len(scales) == 4 and all(torch.all(scale == 0.7) for scale in scales)


def test_loss_with_and_without_negatives():
    clip, (text, image) = make_clip(), clip_batch()
    negatives = torch.randint(1, 27, (3, 2, 6))
    texts, images, others = (
        F.normalize(features, dim=-1)
        for features in (clip.encode_text(text), clip.encode_image(image), clip.encode_text(negatives.flatten(0, 1)))
    )
    by_text, labels = texts @ images.T * torch.e, torch.arange(3)
    more = torch.stack([images[i] @ others[2 * i : 2 * i + 2].T for i in range(3)]) * torch.e
    for by_image, given in ((by_text.T, None), (torch.cat((by_text.T, more), dim=1), negatives)):
        expected = (F.cross_entropy(by_text, labels) + F.cross_entropy(by_image, labels)) / 2
        loss = clip(text, image, text_mask=text != 0, return_loss=True, negatives=given)
        torch.testing.assert_close(loss, expected)


def test_pictures_of_any_size():
    clip, (_, image) = make_clip().eval(), clip_batch()
    torch.testing.assert_close(clip.encode_image(image.repeat_interleave(2, 2).repeat_interleave(2, 3)).shape, (3, 16))
    flat = torch.full((1, 3, 16, 16), 0.4)
    torch.testing.assert_close(clip.encode_image(F.interpolate(flat, 50)), clip.encode_image(flat))


def test_patch_dropout_is_for_training_only():
    clip, (_, image) = make_clip(visual_patch_dropout=0.5), clip_batch()
    lengths = []
    clip.visual_transformer.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    clip.encode_image(image)
    clip.eval()
    clip.encode_image(image)
    assert lengths == [8, 16]


def test_scores_are_cosines(tmp_path):
    clip, (_, image) = make_clip().eval(), clip_batch()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        clip.score("abc", image)
    clip.tokenizer = Letters()
    scores = clip.score("abc", image)
    text = clip.encode_text(torch.tensor([[1, 2, 3, 0, 0, 0]]))
    torch.testing.assert_close(scores, F.cosine_similarity(text, clip.encode_image(image)))
    assert not scores.requires_grad
    # Guidance wants the gradient at the picture.
    image.requires_grad_()
    F.cosine_similarity(text, clip.encode_image(image)).sum().backward()
    assert image.grad.abs().sum() > 0


def test_round_trip(tmp_path):
    clip, (text, image) = make_clip().eval(), clip_batch()
    clip.save_pretrained(tmp_path / "clip")
    again = CLIP.from_pretrained(tmp_path / "clip")
    assert again.tokenizer is None and torch.equal(again(text, image), clip(text, image))


def test_it_learns_to_match():
    clip = make_clip()
    optimizer = torch.optim.Adam(clip.parameters(), 3e-3)
    colours = torch.eye(3)[:, :, None, None].expand(3, 3, 16, 16)
    text = torch.tensor([[1, 5, 0, 0, 0, 0], [2, 5, 0, 0, 0, 0], [3, 5, 0, 0, 0, 0]])
    for _ in range(30):
        optimizer.zero_grad()
        clip(text, colours, text_mask=text != 0, return_loss=True).backward()
        optimizer.step()
    clip.tokenizer = Letters()
    for i, prompt in enumerate(("ae", "be", "ce")):
        assert clip.score(prompt, colours).argmax() == i
