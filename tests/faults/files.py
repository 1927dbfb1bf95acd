"""Files that are not what their names say: weights, configurations, tokens, tokenizers, images and data sets."""

import copy
import gzip
import io
import json
import os
import shutil
import struct
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from PIL import Image, PngImagePlugin

from faults.harness import CANARY, Case
from faults.models import commands

GOLDEN = Path(__file__).resolve().parents[1] / "golden/data"
ODD_VALUES: tuple[Any, ...] = (
    10**9,
    10**30,
    -1,
    0,
    1.5,
    float("nan"),
    float("inf"),
    "x",
    "",
    None,
    [],
    [10**9],
    {},
    True,
)


def without(command: list[str], *options: str) -> list[str]:
    """The command line without these options and their values."""
    kept, skip = [], False
    for word in command:
        if word in options:
            skip = True
        elif skip and not word.startswith("--"):
            skip = False
        else:
            kept, skip = [*kept, word], False
    return kept


def writes(name: str, data: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(data)


# Weights

ODD_TENSORS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "scalar": lambda x: x.flatten()[0], "empty": lambda x: x.flatten()[:0], "flat": lambda x: x.flatten(),
    "NaN": lambda x: torch.full_like(x, float("nan")), "infinite": lambda x: torch.full_like(x, float("inf")),
    "complex": lambda x: x.to(torch.complex64), "integer": lambda x: x.to(torch.int64),
    "boolean": lambda x: x.to(torch.bool), "wider": lambda x: torch.cat([x, x], -1) if x.dim() else x[None],
    "more axes": lambda x: x[None, None], "expanded": lambda x: x.flatten()[:1].expand(2**40),
}  # fmt: skip


def published() -> list[Path]:
    return sorted(path for path in GOLDEN.rglob("*") if path.suffix in (".pt", ".ckpt") and "jit" not in path.name)


def changed_weights(rng: np.random.Generator) -> Iterator[Case]:
    """Published files with one tensor, name or recorded option changed."""
    for path in published():
        try:
            content = torch.load(path, weights_only=True)
        except Exception:  # carries classes of its own, as the published ones do
            continue
        place = next((key for key in ("weights", "state_dict") if key in content), None)
        weights = content[place] if place else content
        names = [name for name in weights if isinstance(weights[name], torch.Tensor)]
        for what, change in ODD_TENSORS.items():
            name = str(rng.choice(names))
            yield changed_file(
                f"{path.parent.name}: {name} {what}",
                path,
                {**weights, name: change(weights[name])},
                content,
                place,
                must_refuse=what in ("NaN", "infinite", "scalar", "complex"),
            )
        for added in ("resblocks.99999999.x", "visual.transformer.resblocks.99999999.attn.in_proj_weight",
                      "transformer.layers.layers.99999999.0.fn.fn.to_qkv.weight", "model.down.99999999.block.0.x",
                      "input_blocks.99999999.0.weight", "x" * 10**6):  # fmt: skip
            tensor = weights[names[0]]
            yield changed_file(
                f"{path.parent.name}: adds {added[:60]}", path, {**weights, added: tensor}, content, place
            )
        yield changed_file(f"{path.parent.name}: no weights", path, {}, content, place, must_refuse=True)
        options = content.get("hparams") if place else None
        for name in options or ():
            value = ODD_VALUES[int(rng.integers(len(ODD_VALUES)))]
            changed = content | {"hparams": {**options, name: value}}
            yield Case(f"{path.parent.name}: {name} = {value!r}", ["convert", path.name], saves(path, changed))


def changed_file(name: str, path: Path, weights: dict, content: dict, place: str | None, must_refuse=False) -> Case:
    whole = content | {place: weights} if place else weights
    return Case(name, ["convert", path.name], saves(path, whole), must_refuse)


def saves(path: Path, content: object) -> Callable[[Path], object]:
    def prepare(folder: Path) -> None:
        for other in path.parent.iterdir():
            if other.suffix in (".yaml", ".pkl"):
                shutil.copy(other, folder)
        torch.save(content, folder / path.name)

    return prepare


def changed_folders(models: Path, rng: np.random.Generator) -> Iterator[Case]:
    """Native folders with one number of config.json, or the header of the weights, changed."""
    for part in ("vae", "dalle", "clip", "decoder"):
        config = json.loads((models / part / "config.json").read_text())
        flat = [(key,) for key in config] + [(key, inner) for key in config if isinstance(config[key], dict)
                                             for inner in config[key]]  # fmt: skip
        for keys in flat:
            for value in rng.choice(len(ODD_VALUES), 4, replace=False):
                changed = copy.deepcopy(config)
                (changed if len(keys) == 1 else changed[keys[0]])[keys[-1]] = ODD_VALUES[value]
                yield native(f"{part}: {'.'.join(keys)} = {ODD_VALUES[value]!r}", models / part, json.dumps(changed))
        for name, text in ODD_JSON.items():
            yield native(f"{part}: config.json {name}", models / part, text, must_refuse=True)
        weights = (models / part / "model.safetensors").read_bytes()
        for name, data in odd_safetensors(weights).items():
            yield native(f"{part}: weights {name}", models / part, None, data, must_refuse=True)
    for part, other in (("dalle", "clip"), ("clip", "vae"), ("vae", "decoder"), ("decoder", "dalle")):
        command = {"dalle": ["generate", "--text", "a", "--dalle_path"], "clip": ["generate", "--text", "a",
                   "--clip_sort", "--clip_path"], "vae": ["upscale", "--input", f"{models}/tokens.npy", "--vae_path"],
                   "decoder": ["upscale", "--input", f"{models}/tokens.npy", "--model_path"]}[part]  # fmt: skip
        yield Case(f"a {other} as {part}", [*command, f"{models}/{other}"], must_refuse=True)


ODD_JSON = {
    "deep": "[" * 100_000, "deep object": '{"a":' * 100_000, "long number": '{"class": 1' + "0" * 500_000 + "}",
    "not an object": "[]", "cut": '{"class": "CLIP"', "zeros": "\0" * 1000, "empty": "", "number": "1",
    "no class": "{}", "unknown class": '{"class": "os.system"}', "class of another kind": '{"class": ["CLIP"]}',
    "control characters": '{"class": "\\u001b[2J\\u0007"}', "long name": json.dumps({"class": "x" * 10**6}),
}  # fmt: skip


def odd_safetensors(weights: bytes) -> dict[str, bytes]:
    (length,) = struct.unpack("<Q", weights[:8])
    header = json.loads(weights[8 : 8 + length])
    name = next(key for key in header if key != "__metadata__")

    def rebuilt(**changes: object) -> bytes:
        text = json.dumps(header | {name: header[name] | changes}).encode()
        return struct.pack("<Q", len(text)) + text + weights[8 + length :]

    return {
        "false header length": struct.pack("<Q", 2**62) + weights[8:], "short": weights[: len(weights) // 2],
        "no header": b"", "false shape": rebuilt(shape=[10**9, 10**9]), "negative": rebuilt(shape=[-1]),
        "offsets beyond": rebuilt(data_offsets=[0, 2**40]), "unknown type": rebuilt(dtype="Z8"),
        "zeros": bytes(10_000), "deep header": struct.pack("<Q", 100_000) + b"[" * 100_000,
    }  # fmt: skip


def native(name: str, folder: Path, config: str | None, weights: bytes | None = None, must_refuse=False) -> Case:
    def prepare(target: Path) -> None:
        shutil.copytree(folder, target / "model")
        if config is not None:
            (target / "model/config.json").write_text(config)
        if weights is not None:
            (target / "model/model.safetensors").write_bytes(weights)

    return Case(name, ["convert", "model"], prepare, must_refuse)


# Tokens


def odd_npy(header: str, data: bytes = b"", version: int = 1) -> bytes:
    text = header.encode("latin1")
    return b"\x93NUMPY" + bytes((version, 0)) + struct.pack("<H" if version == 1 else "<I", len(text)) + text + data


def token_files(models: Path) -> Iterator[Case]:
    def saved(array: object) -> bytes:
        buffer = io.BytesIO()
        np.save(buffer, array, allow_pickle=True)
        return buffer.getvalue()

    tokens = np.arange(16)
    odd = {
        "objects": saved(np.array([{}], object)), "floats": saved(tokens + 0.5), "NaN": saved(tokens * np.nan),
        "negative": saved(tokens - 5), "too large": saved(tokens + 10**6), "text": saved(np.array(["a"])),
        "complex": saved(tokens * 1j), "empty": saved(tokens[:0]), "scalar": saved(np.int64(3)), "no bytes": b"",
        "many axes": saved(np.zeros((1,) * 30, int)), "structured": saved(np.zeros(16, "i4,f4")),
        "cut": saved(tokens)[:-5], "archive": b"PK\x03\x04" + bytes(100), "version 9": odd_npy("{}", version=9),
        "huge": odd_npy("{'descr': '<i8', 'fortran_order': False, 'shape': (10**12,), }\n"),
        "huge shape": odd_npy("{'descr': '<i8', 'fortran_order': False, 'shape': (1000000000000,), }\n"),
        "negative shape": odd_npy("{'descr': '<i8', 'fortran_order': False, 'shape': (-1,), }\n", bytes(128)),
        "deep header": odd_npy("(" * 60_000), "code": odd_npy(f"open({CANARY!r}, 'w')"),
        "other keys": odd_npy("{'descr': '<i8'}\n"), "type of types": odd_npy("{'descr': [('a', '<i8')] * 9}\n"),
        "dates": saved(np.zeros(16, "M8[s]")), "other length": saved(np.arange(15)),
    }  # fmt: skip
    command = ["upscale", "--input", "tokens.npy", "--outputs_dir", "out", "--model_path", f"{models}/decoder"]
    for name, data in odd.items():
        yield Case(f"tokens: {name}", command, writes("tokens.npy", data), must_refuse=True)


# Tokenizers


def tokenizer_files(models: Path, rng: np.random.Generator) -> Iterator[Case]:
    text = (models / "tokenizer.json").read_text()
    command = without(commands(models)["generate"], "--clip_path", "--clip_sort")
    hug = [*command, "--bpe_path", "tokenizer.json", "--hug"]
    for name, odd in ODD_JSON.items():
        yield Case(f"tokenizer.json: {name}", hug, writes("tokenizer.json", odd.encode()), must_refuse=True)
    content = json.loads(text)
    for keys in [(key,) for key in content] + [("model", key) for key in content["model"]]:
        for value in rng.choice(len(ODD_VALUES), 3, replace=False):
            changed = copy.deepcopy(content)
            (changed if len(keys) == 1 else changed["model"])[keys[-1]] = ODD_VALUES[value]
            yield Case(f"tokenizer.json: {'.'.join(keys)} = {ODD_VALUES[value]!r}", hug,
                       writes("tokenizer.json", json.dumps(changed).encode()))  # fmt: skip
    for name, change in {
        "padding": {"padding": {"strategy": {"Fixed": 10**9}, "direction": "Right", "pad_to_multiple_of": None,
                                "pad_id": 0, "pad_type_id": 0, "pad_token": "x"}},
        "large id": {"added_tokens": [{"id": 2**32 - 1, "content": "x", "single_word": False, "lstrip": False,
                                       "rstrip": False, "normalized": False, "special": True}]},
        "slow pattern": {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated",
                                           "invert": False}},
        "no pattern": {"normalizer": {"type": "Replace", "pattern": {"Regex": "("}, "content": ""}},
        "charsmap": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    }.items():  # fmt: skip
        yield Case(f"tokenizer.json: {name}", hug, writes("tokenizer.json", json.dumps(content | change).encode()))
    yttm = [*command, "--bpe_path", "bpe.model"]
    rules = "\n".join(f"{i + 4} {i + 4} {i + 5}" for i in range(60))
    for name, data in {
        "doubling": f"5 60\n{chr(0x2581)} 4\n" + rules,
        "doubling ids": f"2 60\n9601 4\n97 5\n{rules}\n0 1 2 3\n",
        "false count": "1000000000 1000000000\n97 4\n",
        "negative": "-1 -1\n",
        "empty": "",
        "letters": "a b\nc d\n",
    }.items():
        yield Case(f"bpe.model: {name}", yttm, writes("bpe.model", data.encode()), must_refuse=True)
    yield Case("bpe.model: an empty folder", [*command, "--bpe_path", "empty"], lambda f: (f / "empty").mkdir(), True)
    yield Case("vocabulary: gz of zeros", [*command, "--bpe_path", "bpe_simple_vocab_16e6.txt.gz"],
               writes("bpe_simple_vocab_16e6.txt.gz", gzip.compress(bytes(1 << 30), 1)), True)  # fmt: skip


# Configurations

LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(12))  # fmt: skip
ODD_YAML = {
    "laughs": LAUGHS, "laughs as a value": LAUGHS + "steps: *m\n", "deep": "a: " + "[" * 100_000,
    "code": f"steps: !!python/object/apply:os.system ['touch {CANARY}']\n", "recursive": "steps: &a [*a]\n",
    "list": "- 1\n", "text": "hello", "bytes": "\0\1\2", "tab": "a:\n\t- b", "long number": "steps: 1" + "0" * 400_000,
    "date": "steps: 2020-01-01\n", "binary": "steps: !!binary aGVsbG8=\n", "set": "steps: !!set {a}\n",
    "unknown": "no_such_option: 3\n", "pipe": f"image_text_folder: 'pipe:touch {CANARY}; echo .tar'\nwds: png,txt\n",
    "merge": "a: &a {b: 1}\nsteps:\n  <<: *a\n", "infinite": "learning_rate: .inf\n", "NaN": "learning_rate: .nan\n",
}  # fmt: skip


def configurations(models: Path) -> Iterator[Case]:
    training = [*without(commands(models)["train_clip"], "--steps", "--image_text_folder"), "--config", "c.yaml"]
    for name, text in ODD_YAML.items():
        yield Case(f"YAML: {name}", training, writes("c.yaml", text.encode()), must_refuse=True)
    ckpt = next(path for path in published() if path.name == "last.ckpt")
    for name, text in ODD_YAML.items():

        def prepare(folder: Path, text: str = text) -> None:
            shutil.copy(ckpt, folder / "last.ckpt")
            (folder / "model.yaml").write_text(text)

        yield Case(f"model.yaml: {name}", ["convert", "last.ckpt", "--vqgan_config_path", "model.yaml"], prepare, True)


# Images


def png(width: int, height: int) -> bytes:
    """A PNG that says so much of its size, and holds next to nothing."""
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    )


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def bad_images() -> dict[str, bytes]:
    eps = (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n("
        + CANARY.encode()
        + b") (w) file\nshowpage\n"
    )
    whole = encoded(Image.new("RGB", (64, 64), "red"), "PNG")
    return {
        "EPS": eps, "PostScript": b"%!PS\n" + eps, "PDF": b"%PDF-1.4\n" + bytes(100), "text": b"hello", "empty": b"",
        "WMF": b"\xd7\xcd\xc6\x9a" + bytes(200), "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "PNG of 10^10 pixels": png(100_000, 100_000), "PNG of 10^18": png(2**30, 2**30), "PNG 0 × 0": png(0, 0),
        "PNG of 10^9 × 1": png(10**9, 1),
        "GIF of 65535²": b"GIF89a\xff\xff\xff\xff\x80\0\0" + bytes(6) + b"," + bytes(20),
        "BMP of 10^9": b"BM" + struct.pack("<IIIIiiHHII", 100, 0, 54, 40, 30_000, 30_000, 1, 24, 0, 0) + bytes(16),
        "TIFF of 10^9": b"II*\0\x08\0\0\0\x03\0" + b"".join(
            struct.pack("<HHII", tag, 4, 1, value) for tag, value in ((256, 10**9), (257, 10**9), (273, 8))) + bytes(4),
        "cut after the header": whole[:40], "FITS": b"SIMPLE  =                    T" + bytes(3000),
        "ICO": b"\0\0\1\0\1\0\0\0\0\0\1\0 \0\xff\xff\xff\x7f\x16\0\0\0", "PSD": b"8BPS\0\1" + bytes(100),
        "MPO": b"\xff\xd8\xff\xe0" + bytes(50), "ICNS": b"icns\0\0\0\x10ic10\0\0\0\x08",
    }  # fmt: skip


def good_images() -> dict[str, bytes]:
    """Images that are odd but whole: these must open."""
    red = Image.new("RGB", (64, 48), "red")
    exif = Image.Exif()
    exif[0x112] = 6
    text = PngImagePlugin.PngInfo()
    text.add_text("x", "y" * 2_000_000, zip=True)
    # The orientation as a text.
    wrong = b"Exif\0\0II*\0\x08\0\0\0\x01\0" + struct.pack("<HHI4s", 0x112, 2, 4, b"six\0") + bytes(4)
    deep = Image.fromarray(np.full((32, 32), 40_000, np.uint16))
    return {
        "turned": encoded(red, "JPEG", exif=exif), "wrong EXIF": encoded(red, "JPEG", exif=wrong),
        "EXIF of garbage": encoded(red, "JPEG", exif=b"Exif\0\0" + os.urandom(500)),
        "long text": encoded(red, "PNG", pnginfo=text), "16 bits": encoded(deep, "PNG"),
        "2 MB profile": encoded(red, "PNG", icc_profile=bytes(2_000_000)), "palette": encoded(red.convert("P"), "PNG"),
        "one bit": encoded(red.convert("1"), "PNG"), "grey with alpha": encoded(red.convert("LA"), "PNG"),
        "CMYK": encoded(red.convert("CMYK"), "JPEG"), "animated": encoded(red, "GIF", save_all=True,
                                                                          append_images=[red.rotate(9)] * 20),
        "WebP": encoded(red, "WEBP"), "BMP": encoded(red, "BMP"), "TIFF": encoded(red, "TIFF"),
        "floats": encoded(Image.fromarray(np.full((32, 32), 0.5, np.float32)), "TIFF"),
    }  # fmt: skip


def image_files(models: Path) -> Iterator[Case]:
    decoder, dalle = ["--model_path", f"{models}/decoder"], ["--dalle_path", f"{models}/dalle"]
    doors = {
        "--input": ["upscale", "--input", "x.png", "--outputs_dir", "out", "--steps", "2", *decoder],
        "--image": ["generate", "--text", "a red seven", "--num_images", "1", "--image", "x.png", "--outputs_dir",
                    "out", "--num_init_img_tokens", "4", *dalle],
        "--image_prompts": ["upscale", "--input", f"{models}/tokens.npy", "--clip_guidance", "--image_prompts", "x.png",
                            "--outputs_dir", "out", "--steps", "2", "--clip_path", f"{models}/clip", *decoder],
    }  # fmt: skip
    for door, command in doors.items():
        for name, data in bad_images().items():
            yield Case(f"image {door}: {name}", command, writes("x.png", data), must_refuse=True)
        for name, data in good_images().items():
            yield Case(f"image {door}: {name}", command, writes("x.png", data))


# Data sets


def tar(*members: tuple[str, bytes | tarfile.TarInfo], mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, data in members:
            info = data if isinstance(data, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(data) if isinstance(data, bytes) else 0
            archive.addfile(info, io.BytesIO(data) if isinstance(data, bytes) else None)
    return buffer.getvalue()


def data_sets(models: Path) -> Iterator[Case]:
    picture = (models / "picture.png").read_bytes()
    folder = [*without(commands(models)["train_clip"], "--image_text_folder"), "--image_text_folder", "."]
    shards = [*folder, "--wds", "png,txt"]

    def link(name: str, target: str, kind: bytes) -> tarfile.TarInfo:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, target
        return info

    pair = [("a.png", picture), ("a.txt", b"a red seven")]
    archives = {
        "empty tar": tar(), "no bytes": b"", "zeros": bytes(20_480), "text": b"hello", "cut": tar(*pair)[:3000],
        "outside": tar((f"../{CANARY}.png", picture), (f"../{CANARY}.txt", b"x")),
        "absolute": tar((f"/tmp/{CANARY}.png", picture), (f"/tmp/{CANARY}.txt", b"x")),
        "dotted keys": tar(("a.b.png", picture), ("a.b.txt", b"a red seven")),
        "unsorted": tar(("a.png", picture), ("b.png", picture), ("a.txt", b"x"), ("b.txt", b"y")),
        "links": tar(("a.png", link("a.png", "/etc/passwd", tarfile.SYMTYPE)), ("a.txt", b"x")),
        "device": tar(("a.png", link("a.png", "", tarfile.CHRTYPE)), ("a.txt", b"x")),
        "long name": tar(("x" * 100_000 + ".png", picture)),
        "not text": tar(("a.png", picture), ("a.txt", b"\xff\xfe\xfd")),
        "long caption": tar(("a.png", picture), ("a.txt", b"red " * 500_000)),
        "bad pictures": tar(*((f"{name}.png", data) for name, data in enumerate(bad_images().values()))),
    }  # fmt: skip
    for name, data in archives.items():
        yield Case(f"shards: {name}", shards, writes("0.tar", data))
    for name in (f"pipe:touch {CANARY}; echo .tar", "http:127.0.0.1:9;.tar", f"pipe:touch {CANARY}|.tar", "-rf.tar",
                 "file:x.tar", "{0..999999999}.tar", "a\nb.tar", "gs:x.tar", "@x.tar"):  # fmt: skip
        yield Case(f"shards named {name!r}", shards, writes(name, tar(*pair)))
        yield Case(f"shards named {name!r}, given", [*without(shards, "--image_text_folder"), "--image_text_folder",
                                                     f"./{name}"], writes(name, tar(*pair)))  # fmt: skip

    def pictures(change: Callable[[Path], object]) -> Callable[[Path], None]:
        def prepare(target: Path) -> None:
            shutil.copytree(models / "pictures", target, dirs_exist_ok=True)
            change(target)

        return prepare

    for name, change in {
        "endless links": lambda f: (f / "loop").symlink_to("."), "pipe": lambda f: os.mkfifo(f / "pipe.png"),
        "a folder as picture": lambda f: (f / "x.png").mkdir(),
        "link to nothing": lambda f: (f / "x.png").symlink_to("y"),
        "device": lambda f: (f / "x.png").symlink_to("/dev/zero"), "bad text": writes("0.txt", b"\xff\xfe\xfd\xfc"),
        "long text": writes("0.txt", b"red " * 25_000), "empty text": writes("0.txt", b""),
        "zeros": writes("0.txt", bytes(1000)), "escapes": writes("0.txt", b"\x1b[2J\x07" * 100),
        "bad picture": writes("0.png", b"x"), "odd name": writes("\udcff.png", b"x"),
        "metadata": writes("metadata.jsonl", b'{"file_name": "../../x.png", "text": "x"}\n{"file_name": 3}\n['),
        "no captions": lambda f: [path.unlink() for path in f.glob("*.txt")],
    }.items():  # fmt: skip
        yield Case(f"folder: {name}", folder, pictures(change))
    prompts = [*without(commands(models)["generate"], "--text"), "--prompts", "p.txt"]
    for name, data in {
        "byte order mark": b"\xef\xbb\xbfa red seven", "UTF-16": "a red seven".encode("utf-16"), "empty": b"",
        "zeros": bytes(100), "not text": b"\xff\xfe\xfd", "long line": b"a" * 300_000, "escapes": b"\x1b[2J a",
        "odd names": b"..\n/\n.\n-rf\ncon\nnul.txt\n" + b"x" * 300 + b"\n\xe2\x80\xae\n", "same": b"a\na\na\n",
    }.items():  # fmt: skip
        yield Case(f"prompts: {name}", prompts, writes("p.txt", data))


# Lists of prompts of a job


def lists(models: Path) -> Iterator[Case]:
    """Lists without a row that can be used: nothing is drawn."""
    command = [*without(commands(models)["batch"], "--prompts"), "--prompts"]
    deep, text = b"[" * 200_000, b"\x1b[2J\x07\xff"
    table = parquet([{"prompt": " ", "seed": 1}])
    odd = [{"prompt": value} for value in ODD_VALUES if not isinstance(value, str) or not value]
    odd += [
        {"prompt": "a", name: value}
        for name in ("seed", "num_images", "temperature", "top_p")
        for value in (-5, 1e300, "x", [], {}, True)
    ]
    odd += [
        {"prompt": "a", "image": name}
        for name in ("/etc/passwd", "../../x", "pipe:id", "file:///etc/passwd", "a\0b", "fifo", ".", 3, "x" * 5000)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in odd).encode()
    for name, data in {
        "p.txt": bytes(1000), "q.txt": text * 10, "r.txt": b"a" * 3_000_000, "p.csv": b"",
        "q.csv": b"prompt\n\"" + deep, "r.csv": b"prompt\n" + b"," * 100_000, "s.csv": text,
        "t.csv": b"a" * 3_000_000, "p.jsonl": deep, "q.jsonl": lines, "r.jsonl": b"{" * 1000,
        "s.jsonl": b'{"prompt": "\\ud800"}\n' + b'{"a":' * 50_000,
        "p.parquet": table, "q.parquet": table[:-100], "r.parquet": table[:40] + bytes(40) + table[80:],
        "s.parquet": b"PAR1" + b"\xff" * 100 + b"PAR1", "p.tar": bytes(10_240), "q.tar": text * 1000,
        "r.tar": tar(("a.txt", b"x" * 2**21), ("../b.json", deep), (".txt", b"a"), ("c.txt", b"\xff")),
        "p.tar.gz": gzip.compress(tar(("a.txt", bytes(2**28)))), "q.tar.gz": gzip.compress(bytes(2**28)),
    }.items():  # fmt: skip
        yield Case(f"list: {name}", [*command, name], writes_beside_a_pipe(name, data), must_refuse=True)
    for name in ("http://localhost:9/p.csv", "nothing://p.csv", "s3://", "memory://p.tar", "{0..", "[", "*", "p\0.txt"):
        yield Case(f"list at {name!r}", [*command, name], must_refuse=True)


def parquet(rows: list[dict[str, Any]]) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def writes_beside_a_pipe(name: str, data: bytes) -> Callable[[Path], object]:
    def prepare(folder: Path) -> None:
        os.mkfifo(folder / "fifo")
        (folder / name).write_bytes(data)

    return prepare


def cases(models: Path, rng: np.random.Generator) -> dict[str, Callable[[], Iterator[Case]]]:
    return {
        "weights": lambda: changed_weights(rng), "folders": lambda: changed_folders(models, rng),
        "tokens": lambda: token_files(models), "tokenizers": lambda: tokenizer_files(models, rng),
        "configurations": lambda: configurations(models), "images": lambda: image_files(models),
        "data": lambda: data_sets(models), "lists": lambda: lists(models),
    }  # fmt: skip
