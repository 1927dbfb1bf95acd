"""A small model of every kind, untrained, and a few pictures: what cases are run with."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

CAPTIONS = ["a red seven on brick", "a blue star on wood", "a green heart on sand", "a pink two on water"]


def write_models(folder: Path) -> None:
    """Writes tokenizer.json, vae, dalle, clip and decoder, `tokens.npy`, `prompts.txt`, `picture.png` and the folder
    `pictures`."""
    from dalle_pytorch import CLIP, DALLE, VQGanVAE
    from dalle_pytorch.tokenizers.hug import HugTokenizer, train_bpe
    from diffusion import DiffusionDecoder, UNet

    torch.manual_seed(0)
    train_bpe(CAPTIONS * 4, 60).save(str(folder / "tokenizer.json"))
    vocab_size = HugTokenizer(folder / "tokenizer.json").vocab_size
    vae = VQGanVAE(image_size=32, num_tokens=16, embed_dim=8, z_channels=8, ch=8, ch_mult=(1, 2), num_res_blocks=1,
                   patch_size=4, mid_attention=False, local_encoder=True)  # fmt: skip
    vae.save_pretrained(folder / "vae")
    dalle = DALLE(dim=16, vae=vae, num_text_tokens=vocab_size, text_seq_len=24, depth=1, heads=1, dim_head=16)
    dalle.save_pretrained(folder / "dalle")
    clip = CLIP(dim_text=16, dim_image=16, dim_latent=8, num_text_tokens=vocab_size, text_seq_len=24, text_enc_depth=1,
                text_heads=1, visual_enc_depth=1, visual_heads=1, visual_image_size=32,
                visual_patch_size=8)  # fmt: skip
    clip.save_pretrained(folder / "clip")
    unet = UNet(
        image_size=64,
        num_channels=32,
        num_res_blocks=1,
        channel_mult=(1, 1, 1),
        patch_size=4,
        emb_condition=True,
        emb_input_dims=8,
        emb_output_dims=32,
        emb_stride=1,
        low_res_condition=True,
    )
    DiffusionDecoder(unet, vae, predict_xstart=True, rescale_timesteps=True).save_pretrained(folder / "decoder")
    for name in ("dalle", "clip"):
        (folder / name / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    np.save(folder / "tokens.npy", np.arange(16))
    (folder / "prompts.txt").write_text("".join(f"{caption}\n" for caption in CAPTIONS[:3]))
    generator = np.random.default_rng(0)
    (folder / "pictures").mkdir()
    for number, caption in enumerate(CAPTIONS):
        picture = Image.fromarray(generator.integers(0, 256, (48, 40, 3), np.uint8))
        picture.save(folder / "pictures" / f"{number}.png")
        (folder / "pictures" / f"{number}.txt").write_text(caption + "\n")
    picture.save(folder / "picture.png")


def commands(models: Path) -> dict[str, list[str]]:
    """A short command line of every command, which succeeds, on the models in a folder."""
    training = ["--image_text_folder", f"{models}/pictures", "--steps", "2", "--batch_size", "2", "--num_workers", "0",
                "--warmup_steps", "1", "--output_dir", "out"]  # fmt: skip
    tokenizer = ["--bpe_path", f"{models}/tokenizer.json", "--hug"]
    return {
        "generate": ["generate", "--text", CAPTIONS[0], "--num_images", "3", "--clip_sort", "--output_npy",
                     "--outputs_dir", "out", "--dalle_path", f"{models}/dalle", "--clip_path", f"{models}/clip"],
        "batch": ["batch", "--prompts", f"{models}/prompts.txt", "--num_images", "3", "--batch_size", "4", "--keep",
                  "2", "--diffuse", "1", "--steps", "2", "--unit_prompts", "1", "--output_format", "folders",
                  "--num_workers", "1", "--outputs_dir", "out", "--dalle_path", f"{models}/dalle", "--clip_path",
                  f"{models}/clip", "--decoder_path", f"{models}/decoder"],
        "upscale": ["upscale", "--input", f"{models}/tokens.npy", "--outputs_dir", "out", "--steps", "3",
                    "--model_path", f"{models}/decoder"],
        "optimize": ["optimize", "--prompts", CAPTIONS[0], "--iterations", "2", "--outputs_dir", "out", "--vae_path",
                     f"{models}/vae", "--clip_path", f"{models}/clip"],
        "convert": ["convert", f"{models}/dalle", "out"],
        "train_tokenizer": ["train_tokenizer", "--image_text_folder", f"{models}/pictures", "--vocab_size", "50",
                            "--output", "out/tokenizer.json"],
        "train_vae": ["train_vae", *training, "--image_size", "32", "--num_tokens", "8", "--num_layers", "2",
                      "--emb_dim", "8", "--hidden_dim", "8"],
        "train_vqgan": ["train_vqgan", *training, "--image_size", "32", "--num_tokens", "8", "--embed_dim", "8",
                        "--ch", "8", "--ch_mult", "1", "--crop_size", "32"],
        "train_dalle": ["train_dalle", *training, *tokenizer, "--vae_path", f"{models}/vae", "--dim", "16",
                        "--depth", "1", "--heads", "1", "--dim_head", "16"],
        "train_clip": ["train_clip", *training, *tokenizer, "--dim_text", "16", "--dim_image", "16", "--dim_latent",
                       "8", "--text_enc_depth", "1", "--visual_enc_depth", "1", "--text_heads", "1",
                       "--visual_heads", "1", "--visual_image_size", "32", "--visual_patch_size", "8"],
        "train_decoder": ["train_decoder", *training, "--vae_path", f"{models}/vae", "--image_size", "64",
                          "--num_channels", "32", "--num_res_blocks", "1", "--channel_mult", "1,1,1"],
    }  # fmt: skip
