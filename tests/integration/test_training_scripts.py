"""All training scripts, one after the other, on a folder of a few pictures, and then the two stages with the result."""

import importlib.util
import json
import shlex
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
import yaml
from helpers import ROOT
from PIL import Image

import generate
import upscale
from dalle_pytorch.errors import FileError, UsageError, UserError
from dalle_pytorch.pretrained import PretrainedModel
from dalle_pytorch.scenes import write_folder
from dalle_pytorch.training.commands.train_dalle import TrainDalleSettings
from diffusion.settings import TrainDiffusionSettings


def script(path: str):
    """The module of a script, which is in no package."""
    name = Path(path).stem if "/" in path else path
    spec = importlib.util.spec_from_file_location(f"script_{name}", ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call(path: str, *arguments: object) -> None:
    script(path).main([str(argument) for argument in arguments])


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


LOOP = ("--steps", 3, "--batch_size", 4, "--num_workers", 0, "--log_every", 1, "--save_every", 2, "--warmup_steps", 1)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with 24 pictures, and what the six scripts make of them in a few steps each."""
    folder = tmp_path_factory.mktemp("training")
    pictures = folder / "pictures"
    write_folder(pictures, 24, resolution=64)
    (pictures / "broken.png").write_bytes(b"no picture")
    (pictures / "broken.txt").write_text("a red seven on brick\n")
    data = ("--image_text_folder", pictures, *LOOP)
    call("DALLE-pytorch/train_tokenizer.py", "--image_text_folder", pictures, "--vocab_size", 120,
         "--output", folder / "tokenizer.json")  # fmt: skip
    call("DALLE-pytorch/train_vqgan.py", *data, "--output_dir", folder / "vqgan", "--image_size", 64, "--num_tokens",
         32, "--embed_dim", 8, "--ch", 8, "--ch_mult", 1, "--crop_size", 64)  # fmt: skip
    call("DALLE-pytorch/train_vae.py", *data, "--output_dir", folder / "vae", "--image_size", 64, "--num_tokens", 16,
         "--num_layers", 2, "--num_resnet_blocks", 1, "--emb_dim", 8, "--hidden_dim", 8)  # fmt: skip
    call("DALLE-pytorch/train_dalle.py", *data, "--output_dir", folder / "dalle", "--vae_path", folder / "vqgan/vae",
         "--bpe_path", folder / "tokenizer.json", "--dim", 32, "--depth", 2, "--heads", 2, "--dim_head", 16,
         "--attn_types", "full,axial_row", "--ema_decay", 0.9, "--sample_every", 2, "--layer_scale", 1)  # fmt: skip
    call("DALLE-pytorch/train_clip.py", *data, "--output_dir", folder / "clip", "--bpe_path",
         folder / "tokenizer.json", "--dim_text", 16, "--dim_image", 16, "--dim_latent", 8, "--text_enc_depth", 1,
         "--text_heads", 1, "--visual_enc_depth", 1, "--visual_heads", 1, "--visual_image_size", 32,
         "--visual_patch_size", 8, "--visual_conv_stem", "--visual_attention_pool", "--layer_scale", 1, "--dalle_path",
         folder / "dalle/dalle")  # fmt: skip
    network = ("--image_size", 64, "--num_channels", 32, "--channel_mult", "1,1", "--crop_size", 32)
    call("diffusion/train.py", "--data_dir", pictures, *LOOP, *network, "--output_dir", folder / "decoder",
         "--vae_path", folder / "vqgan/vae", "--patch_size", 2, "--num_heads", 1, "--emb_output_dims", 32,
         "--sample_every", 2, "--microbatch", 2, "--attention_resolutions", "16", "--lr", 1e-3)  # fmt: skip
    call("diffusion/train.py", *data, *network, "--super_res", "--output_dir", folder / "super_res", "--num_heads", 1,
         "--schedule_sampler", "loss-second-moment", "--learn_sigma", "True", "--sample_every", 3)  # fmt: skip
    return folder


def test_the_trained_models_draw(runs, tmp_path):
    clip = ("--clip_path", str(runs / "clip/clip"))
    (folder,) = generate.main(["--dalle_path", str(runs / "dalle/dalle"), "--text", "a red seven on brick", *clip,
                               "--clip_sort", "--num_images", "3", "--output_npy",
                               "--outputs_dir", str(tmp_path)])  # fmt: skip
    assert len(list(folder.glob("?-*.png"))) == 3
    upscale.main(["--model_path", str(runs / "decoder/decoder"), "--input", str(folder), "--keep", "1", "--steps", "2",
                  "--super_res_path", str(runs / "super_res/super_res"), "--clip_guidance", *clip, "--cutn", "2",
                  "--text", "a red seven on brick"])  # fmt: skip
    assert Image.open(folder / "0-upscaled.png").size == (256, 256)


def test_each_run_says_what_it_did(runs):
    for name in ("vae", "vqgan", "dalle", "clip", "decoder", "super_res"):
        rows = metrics(runs / name)
        assert [row["step"] for row in rows] == [1, 2, 3], name
        assert all(torch.isfinite(torch.tensor(row["loss"])) for row in rows)
    assert all("accuracy" in row for row in metrics(runs / "clip"))
    previews = {path.relative_to(runs).as_posix() for path in runs.glob("*/samples/*")}
    assert previews >= {
        "dalle/samples/drawn-00000002.png", "dalle/samples/captions-00000002.txt",
        "decoder/samples/decoded-00000002.png", "super_res/samples/enlarged-00000003.png",
    }  # fmt: skip


def test_parts_are_whole_and_small(runs):
    for part in ("dalle/dalle", "dalle/dalle/vae", "decoder/decoder", "decoder/decoder/vae", "clip/clip"):
        model = PretrainedModel.from_pretrained(runs / part)
        assert all(parameter.isfinite().all() for parameter in model.parameters())
    tokenizer = (runs / "tokenizer.json").read_text()
    for part in ("dalle/dalle", "clip/clip"):
        assert json.loads((runs / part / "tokenizer.json").read_text())["model"] == json.loads(tokenizer)["model"]


def test_going_on_from_a_prior(runs, tmp_path):
    call("DALLE-pytorch/train_dalle.py", "--image_text_folder", runs / "pictures", *LOOP, "--output_dir", tmp_path,
         "--dalle_path", runs / "dalle/dalle", "--dalle_output_file_name", "tuned", "--learning_rate", 1e-9,
         "--wandb_name", "", "--report_to", "none")  # fmt: skip
    before, after = (PretrainedModel.from_pretrained(path) for path in (runs / "dalle/dalle", tmp_path / "tuned"))
    assert after.config == before.config
    for name, tensor in before.state_dict().items():
        torch.testing.assert_close(after.state_dict()[name], tensor, atol=1e-3, rtol=1e-3)


def test_going_on_from_a_published_prior(runs, tmp_path, parity):
    common = ("--image_text_folder", runs / "pictures", *LOOP, "--output_dir", tmp_path, "--dalle_path",
              parity("dalle/axial_conv") / "dalle.pt", "--bpe_path", runs / "tokenizer.json")  # fmt: skip
    call("DALLE-pytorch/train_dalle.py", *common, "--truncate_captions")
    dalle = PretrainedModel.from_pretrained(tmp_path / "dalle")
    assert "conv_like" in dalle.config["attn_types"] and dalle.image_fmap_size == 4 and dalle.text_seq_len == 12


def test_captions_that_are_too_long(runs, tmp_path):
    clip = ("DALLE-pytorch/train_clip.py", "--image_text_folder", runs / "pictures", *LOOP, "--bpe_path",
            runs / "tokenizer.json", "--text_seq_len", 4, "--visual_image_size", 32)  # fmt: skip
    with pytest.raises(FileError, match="caption of more than 4 tokens"):
        call(*clip, "--output_dir", tmp_path / "skipped")
    call(*clip, "--output_dir", tmp_path / "cut", "--truncate_captions")


def test_cached_tokens_give_the_same_losses(runs, tmp_path):
    whole = shutil.copytree(runs / "pictures", tmp_path / "pictures", ignore=shutil.ignore_patterns("broken*"))
    common = ("--image_text_folder", whole, *LOOP, "--vae_path", runs / "vqgan/vae", "--bpe_path",
              runs / "tokenizer.json", "--dim", 32, "--depth", 1, "--heads", 1)  # fmt: skip
    cached = ("--cache_tokens", tmp_path / "tokens")
    for name, flags in (("plain", ()), ("made", cached), ("found", cached)):
        call("DALLE-pytorch/train_dalle.py", *common, *flags, "--output_dir", tmp_path / name)
    losses = [[row["loss"] for row in metrics(tmp_path / name)] for name in ("plain", "made", "found")]
    assert losses[0] == losses[1] == losses[2] and len(losses[0]) == 3


def test_tokenizer_from_shards_and_texts(runs, tmp_path, capsys):
    pictures = sorted((runs / "pictures").glob("0*"))
    with tarfile.open(tmp_path / "data-0.tar", "w") as archive:
        for path in pictures:
            archive.add(path, path.name)
    (tmp_path / "captions.txt").write_text("".join(path.read_text() for path in pictures if path.suffix == ".txt"))
    sources = ([tmp_path / "data-0.tar", "--wds", "png,txt"], [tmp_path / "captions.txt"])
    for number, source in enumerate(sources):
        call("DALLE-pytorch/train_tokenizer.py", "--image_text_folder", *source, "--vocab_size", 120, "--output",
             tmp_path / f"{number}.json")  # fmt: skip
    assert (tmp_path / "0.json").read_bytes() == (tmp_path / "1.json").read_bytes()
    assert capsys.readouterr().out.count("120 tokens from 24 captions") == 2


def test_any_vae_will_do(runs, tmp_path):
    """A DiscreteVAE: 16 × 16 tokens of 4 pixels a side."""
    data = ("--image_text_folder", runs / "pictures", *LOOP, "--vae_path", runs / "vae/vae")
    call("DALLE-pytorch/train_dalle.py", *data, "--output_dir", tmp_path / "dalle", "--bpe_path",
         runs / "tokenizer.json", "--dim", 32, "--depth", 1, "--heads", 1)  # fmt: skip
    call("diffusion/train.py", *data, "--output_dir", tmp_path / "decoder", "--image_size", 64, "--num_channels", 32,
         "--channel_mult", 1, "--num_heads", 1, "--emb_output_dims", 32)  # fmt: skip
    for part in ("dalle/dalle/vae", "decoder/decoder/vae"):
        assert PretrainedModel.from_pretrained(tmp_path / part).num_tokens == 16


def test_going_on_from_a_decoder(runs, tmp_path):
    common = ("--image_text_folder", runs / "pictures", *LOOP, "--learning_rate", 1e-9)
    call("diffusion/train.py", *common, "--output_dir", tmp_path / "d", "--resume_checkpoint", runs / "decoder/decoder")
    call("diffusion/train.py", *common, "--output_dir", tmp_path / "s", "--super_res", "--resume_checkpoint",
         runs / "super_res/super_res")  # fmt: skip
    call("diffusion/train.py", *common, "--output_dir", tmp_path / "t", "--distill", 2, "--resume_checkpoint",
         runs / "decoder/decoder")  # fmt: skip
    for old, new in (("decoder/decoder", "d/decoder"), ("decoder/decoder", "t/decoder"),
                     ("super_res/super_res", "s/super_res")):  # fmt: skip
        before, after = (PretrainedModel.from_pretrained(path) for path in (runs / old, tmp_path / new))
        assert after.config == before.config
    before, after = (path / "super_res/diffusion.json" for path in (runs / "super_res", tmp_path / "s"))
    assert after.read_text() == before.read_text()


REFUSED = [
    ("diffusion/train.py --class_cond True", "class_cond is not supported"),
    ("diffusion/train.py --timestep_respacing ddim25", "upscale.py takes --steps"),
    ("diffusion/train.py --batch_size 6 --microbatch 4", "does not divide"),
    ("diffusion/train.py", "--vae_path is missing"),
    ("diffusion/train.py --distill 2", "--distill needs --resume_checkpoint, the native folder of a decoder"),
    ("diffusion/train.py --distill 2 --resume_checkpoint none", "native folder of a decoder, and none is none"),
    ("diffusion/train.py --super_res --distill 2 --resume_checkpoint .", "--distill needs --resume_checkpoint"),
    ("diffusion/train.py --super_res --image_text_folder glyphs?sky=2", "data set glyphs: no option sky=2"),
    ("diffusion/train.py --super_res --image_text_folder glyphs?twins=2", "data set glyphs: no option twins=2"),
    ("DALLE-pytorch/train_dalle.py --vqgan_config_path model.yaml", "needs the weights of its VQGAN"),
    ("DALLE-pytorch/train_dalle.py --vae_path nowhere", "nowhere"),
    ("DALLE-pytorch/train_dalle.py --cache_tokens DIR --random_resize_crop_lower_ratio 0.8", "--cache_tokens"),
    ("DALLE-pytorch/train_dalle.py --dalle_output_file_name models/mine", "is the name of a folder"),
    ("DALLE-pytorch/train_tokenizer.py --image_text_folder nowhere", "there is no folder or file"),
]


@pytest.mark.parametrize("line, message", REFUSED)
def test_refusals_are_one_line(line, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path, *arguments = line.split()
    if "--image_text_folder" not in arguments:
        arguments += ["--image_text_folder", "glyphs"]
    with pytest.raises(UserError, match=message) as error:
        call(path, *arguments)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.rglob("checkpoint*"))


def test_settings_of_a_run_are_settings_for_another(runs):
    """The config.yaml in a run's folder means the same arguments again."""
    for settings, run in ((TrainDalleSettings, "dalle"), (TrainDiffusionSettings, "decoder"),
                          (TrainDiffusionSettings, "super_res")):  # fmt: skip
        once = settings.parse(["--config", str(runs / run / "config.yaml")])
        assert once.as_dict() == yaml.safe_load((runs / run / "config.yaml").read_text())
    assert once.learn_sigma is True and once.super_res is True and once.emb_condition is True


def test_every_option_of_upstream_is_there():
    """The flags of lucidrains' train_dalle.py and of guided-diffusion's image_train.py."""
    dalle = TrainDalleSettings.parse(shlex.split(
        "--vae_path v --image_text_folder data-{000..009}.tar --wds jpg,txt --truncate_captions --hug --bpe_path b "
        "--random_resize_crop_lower_ratio 0.8 --dalle_output_file_name mine --fp16 --amp --wandb_name n "
        "--wandb_entity e --stable_softmax --epochs 2 --save_every_n_steps 10 --keep_n_checkpoints 3 --batch_size 4 "
        "--ga_steps 2 --learning_rate 3e-4 --clip_grad_norm 0.5 --lr_decay --dim 512 --text_seq_len 256 --depth 2 "
        "--heads 8 --dim_head 64 --ff_dropout 0.1 --attn_dropout 0.1 --reversible --loss_img_weight 7 "
        "--attn_types full,axial_row --shift_tokens --rotary_emb --shared_attn_ids 0,1,0,1 --shared_ff_ids 0,0,1,1 "
        "--share_input_output_emb --num_workers 4 --deepspeed --deepspeed_config d.json --distributed_backend "
        "deepspeed --flops_profiler --taming --chinese --vqgan_model_path m --vqgan_config_path c --bf16"
    ))  # fmt: skip
    assert dalle.attn_types == ["full", "axial_row"] and dalle.shared_attn_ids == [0, 1, 0, 1] and dalle.rotary_emb
    decoder = TrainDiffusionSettings.parse(shlex.split(
        "--data_dir d --image_size 128 --num_channels 128 --num_res_blocks 3 --num_heads 4 --num_head_channels 64 "
        "--attention_resolutions 32,16,8 --channel_mult 1,1,2,3,4 --dropout 0.1 --class_cond False --use_checkpoint "
        "True --use_scale_shift_norm True --resblock_updown True --use_fp16 True --learn_sigma True --diffusion_steps "
        "1000 --noise_schedule linear --use_kl False --predict_xstart False --rescale_timesteps True --lr 1e-4 "
        "--weight_decay 0.05 --lr_anneal_steps 500 --batch_size 8 --microbatch 2 --ema_rate 0.9999 --log_interval 10 "
        "--save_interval 1000 --schedule_sampler uniform --emb_condition True --lr_warmup_steps 20 --resume_checkpoint "
        "x.pt --use_new_attention_order False"
    ))  # fmt: skip
    assert decoder.attention_resolutions == [32, 16, 8] and decoder.channel_mult == [1, 1, 2, 3, 4]
    assert decoder.learn_sigma and not decoder.predict_xstart and decoder.mixed_precision == "fp16"
    assert decoder.predict == "eps" and decoder.residual_std is None and decoder.schedule_sampler == "uniform"
    assert (decoder.batch_size, decoder.ga_steps, decoder.steps) == (2, 4, 500)
    assert (decoder.learning_rate, decoder.ema_decay, decoder.warmup_steps) == (1e-4, 0.9999, 20)
    assert decoder.image_text_folder == "d" and decoder.activation_checkpointing


def test_decoder_predicts_residuals_where_it_is_told_a_picture():
    def settled(line):
        return TrainDiffusionSettings.parse(["--image_text_folder", "pictures", *shlex.split(line)])

    ours = settled("")
    assert (ours.predict, ours.residual_std, ours.schedule_sampler) == ("residual", 0.15, "quadratic")
    for line in ("--low_res_condition False", "--predict x_0", "--predict_xstart"):
        assert settled(line).predict_xstart and settled(line).residual_std is None
    assert settled("--super_res --low_res_condition False").predict == "residual"
    with pytest.raises(UsageError, match="--predict residual needs"):
        settled("--predict residual --low_res_condition False")
