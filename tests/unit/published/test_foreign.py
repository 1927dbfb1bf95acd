"""Files of other projects: tensors come out, nothing is run, damage is one line."""

import collections
import io
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from dalle_pytorch.errors import CheckpointError, FileError
from dalle_pytorch.files.tokens import load_tokens
from dalle_pytorch.published.unpickler import (
    LEGACY_MAGIC,
    ForeignObject,
    module_state,
    read_torch,
    read_yaml,
    tensor_dict,
)

# --------------------------------------------------------------------------------------------------
# What comes out


def same(left, right) -> bool:
    if torch.is_tensor(left):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    return left == right


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_every_kind_of_tensor(tmp_path, zipped):
    torch.manual_seed(0)
    base = torch.randn(6, 4)
    dtypes = [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
              torch.uint8, torch.bool, torch.complex64]  # fmt: skip
    saved = collections.OrderedDict(
        whole=base, view=base[2:4, 1:], turned=base.T, number=torch.tensor(3.5), none=torch.empty(0, 3),
        parameter=torch.nn.Parameter(torch.ones(2)), spread=torch.ones(1, 3).expand(5, 3),
        hparams={"depth": 2, "attn_types": ("full", "axial_row"), "scale": 0.5, "on": True, "name": "ä", "no": None},
        settings=[torch.float16, torch.Size([1, 2]), {1, 2}],
        **{str(dtype): torch.arange(5).to(dtype) for dtype in dtypes},
    )  # fmt: skip
    torch.save(saved, tmp_path / "file.pt", _use_new_zipfile_serialization=zipped)
    loaded = read_torch(tmp_path / "file.pt")
    assert list(loaded) == list(saved)
    saved["settings"][1] = tuple(saved["settings"][1])
    assert all(same(loaded[key], value.detach() if torch.is_tensor(value) else value) for key, value in saved.items())
    # Views share memory, as they did.
    loaded["whole"][2, 1] = 99
    assert loaded["view"][0, 0] == 99 and loaded["turned"][1, 2] == 99


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_modules_open_without_their_classes(tmp_path):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4), torch.nn.Sequential(torch.nn.ReLU()))
    torch.save(net, tmp_path / "whole.pkl")
    torch.jit.save(torch.jit.script(net), tmp_path / "script.pt")
    for name in ("whole.pkl", "script.pt"):
        module = read_torch(tmp_path / name)
        assert isinstance(module, ForeignObject) and module.name.endswith("Sequential")
        assert same(module_state(module), dict(net.state_dict()))


def test_lightning_checkpoint(parity):
    checkpoint = read_torch(parity("vqgan/gumbel_f8") / "last.ckpt")
    assert list(checkpoint["callbacks"]) == ["pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"]
    assert all(torch.is_tensor(tensor) for tensor in tensor_dict(checkpoint["state_dict"], "it").values())


def test_no_weights():
    for value in (None, {}, [torch.ones(1)], {"a": 1}, {1: torch.ones(1)}):
        with pytest.raises(CheckpointError, match=r"^file\.pt "):
            tensor_dict(value, "file.pt")


# --------------------------------------------------------------------------------------------------
# What is refused


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function, *args):
        self.reduced = (function, args)

    def __reduce__(self):
        return self.reduced


def stream(*parts: bytes) -> bytes:
    return b"\x80\x02" + b"".join(parts) + b"."


def as_zip(path: Path, pickled: bytes, **members: bytes) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in {"data.pkl": pickled, "version": b"3\n", **members}.items():
            archive.writestr(f"archive/{name}", data)


def as_legacy(path: Path, pickled: bytes) -> None:
    parts = [pickle.dumps(part, 2) for part in (LEGACY_MAGIC, 1001, {"little_endian": True})]
    path.write_bytes(b"".join([*parts, pickled, pickle.dumps([], 2)]))


def as_bare_pickle(path: Path, pickled: bytes) -> None:
    path.write_bytes(pickled)


WRAPPINGS = {"model.pt": as_zip, "last.ckpt": as_zip, "old.pt": as_legacy, "encoder.pkl": as_bare_pickle}


def programs(touched: Path) -> dict[str, bytes]:
    """Pickles that would leave the file `touched`, or would at least reach something that could."""
    import os

    command = f"touch {touched}"
    name = str(touched).encode()
    text = b"X" + struct.pack("<I", len(name)) + name
    return {
        "system": pickle.dumps(Call(os.system, command), 2),
        "protocol 4": pickle.dumps({"state_dict": {"w": Call(os.system, command)}}, 4),
        "protocol 0": pickle.dumps(Call(os.system, command), 0),
        "open": pickle.dumps(Call(open, str(touched), "w"), 2),
        "eval": pickle.dumps(Call(eval, f"open({str(touched)!r}, 'w')"), 2),
        "getattr": pickle.dumps(Call(getattr, Path, "touch"), 2),
        "method": pickle.dumps(Call(Path.touch, touched), 4),
        "INST": stream(b"(", text, b"ipathlib\nPath.touch\n"),
        "OBJ": stream(b"(", b"cbuiltins\nopen\n", text, b"X\x01\x00\x00\x00w", b"o"),
        "key": stream(b"}", b"cos\nsystem\n", text, b"\x85R", b"K\x01s"),
        "persistent id": stream(b"cos\nsystem\n", text, b"\x85R", b"Q"),
        "dotted": b"\x80\x04\x8c\x17torch.nn.modules.module\x8c\x12Module.__setattr__\x93.",
        "dotted inert": b"\x80\x04\x8c\x09omegaconf\x8c\x0aA.__dict__\x93.",
        "torch.load": stream(b"ctorch\nload\n", text, b"\x85R"),
        "hub": stream(b"ctorch.hub\nload\n", text, b"\x85R"),
        "jit": stream(b"ctorch.jit\nload\n", text, b"\x85R"),
        "numpy": stream(b"cnumpy\nload\n", text, b"\x85R"),
        "lightning": stream(b"cpytorch_lightning.utilities.cloud_io\nload\n", text, b"\x85R"),
        "our own": stream(b"cdalle_pytorch.files.atomic\nwrite_text\n", text, text, b"\x86R"),
    }


@pytest.mark.parametrize("file", WRAPPINGS)
@pytest.mark.parametrize("program", programs(Path("touched")))
def test_nothing_is_run(tmp_path, program, file):
    touched = tmp_path / "touched"
    WRAPPINGS[file](tmp_path / file, programs(touched)[program])
    with pytest.raises(CheckpointError) as error:
        read_torch(tmp_path / file)
    message = str(error.value)
    assert str(tmp_path / file) in message and "\n" not in message and not touched.exists()
    assert "more than tensors and settings (" in message


def test_the_test_is_dangerous(tmp_path):
    pickle.loads(programs(tmp_path / "touched")["system"])
    assert (tmp_path / "touched").exists()


HARMLESS = {
    # A function may be called, but neither kept as a value nor changed.
    "function as value": stream(b"ctorch._utils\n_rebuild_tensor_v2\n"),
    "function changed": stream(b"ctorch._utils\n_rebuild_tensor_v2\n", b"}", b"X\x05\x00\x00\x00_callK\x01s", b"b"),
    "slots changed": stream(b"ctorch._utils\n_rebuild_tensor_v2\n", b"N}", b"X\x05\x00\x00\x00_callK\x01s", b"\x86b"),
    "class changed": stream(b"comegaconf\nA\n", b"}", b"X\x05\x00\x00\x00stateK\x01s", b"b"),
    "type changed": stream(b"ccollections\nOrderedDict\n", b"}", b"X\x04\x00\x00\x00itemK\x01s", b"b"),
    "no storage": stream(b"K\x05Q"),
    "short string": b"\x80\x02\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",
    "deep": stream(b"]" * 100_000 + b"a" * 99_999),
    "empty stack": stream(b"R"),
}


@pytest.mark.parametrize("wrap", [as_zip, as_legacy], ids=["zip", "legacy"])
@pytest.mark.parametrize("program", HARMLESS)
def test_odd_programs_are_one_line(tmp_path, program, wrap):
    wrap(tmp_path / "file.pt", HARMLESS[program])
    with pytest.raises(CheckpointError, match=r"^[^\n]*file\.pt is damaged[^\n]*$"):
        read_torch(tmp_path / "file.pt")
    # The next file is read as if nothing had been.
    torch.save({"w": torch.ones(2)}, tmp_path / "good.pt")
    assert read_torch(tmp_path / "good.pt")["w"].sum() == 2


def test_attributes_of_known_classes_do_not_reach_us(tmp_path):
    state = collections.OrderedDict(w=torch.ones(1))
    state.values = "no function"
    torch.save(state, tmp_path / "file.pt")
    assert list(read_torch(tmp_path / "file.pt").values()) == [torch.ones(1)]


def rewritten(source: Path, target: Path, change, compression: int = zipfile.ZIP_STORED) -> None:
    """A zip file with each member through `change(name, data)`; None leaves it out."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for name in old.namelist():
            data = change(name, old.read(name))
            if data is not None:
                new.writestr(name, data)


@pytest.fixture
def saved(tmp_path) -> Path:
    torch.manual_seed(0)
    torch.save({"w": torch.randn(1000), "b": torch.zeros(3)}, tmp_path / "model.pt")
    return tmp_path / "model.pt"


def test_damage_is_one_line(tmp_path, saved):
    data = saved.read_bytes()
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 1
    legacy = io.BytesIO()
    torch.save({"w": torch.randn(1000)}, legacy, _use_new_zipfile_serialization=False)
    damaged = {
        "empty": b"", "text": b"no checkpoint", "zip of nothing": b"PK\x05\x06" + bytes(18), "flipped": bytes(flipped),
        **{f"cut to {n}": data[:n] for n in (3, 4, 100, len(data) // 2, len(data) - 1)},
        **{f"legacy cut to {n}": legacy.getvalue()[:n] for n in (20, 60, 200, 500, len(legacy.getvalue()) - 1)},
    }  # fmt: skip
    for name, content in damaged.items():
        path = tmp_path / "damaged.pt"
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"^[^\n]*damaged\.pt is damaged or not a PyTorch file[^\n]*$"):
            read_torch(path)
            pytest.fail(name)
    with pytest.raises(CheckpointError, match="is missing"):
        read_torch(tmp_path / "nothing.pt")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_torch(tmp_path)


def test_storages_are_checked(tmp_path, saved):
    path = tmp_path / "other.pt"
    rewritten(saved, path, lambda name, data: None if name.endswith("data/0") else data)
    with pytest.raises(CheckpointError, match="lacks data/0"):
        read_torch(path)
    rewritten(saved, path, lambda name, data: data[:-4] if name.endswith("data/0") else data)
    with pytest.raises(CheckpointError, match="storage 0 is cut short"):
        read_torch(path)
    rewritten(saved, path, lambda name, data: b"big" if name.endswith("byteorder") else data)
    with pytest.raises(CheckpointError, match="big-endian"):
        read_torch(path)


def test_bombs(tmp_path, saved):
    path = tmp_path / "bomb.pt"
    rewritten(saved, path, lambda name, data: bytes(2**24) if name.endswith("data/0") else data, zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="unpacks to more than the size"):
        read_torch(path)
    # One stored number, seen as 2^40.
    torch.save({"w": torch.ones(1).expand(2**20, 2**20)}, path)
    with pytest.raises(CheckpointError, match="does not fit its storage of 1 elements"):
        read_torch(path)
    torch.save({"w": torch.as_strided(torch.ones(4), (2, 2), (2, 1))}, path)
    rewritten(path, tmp_path / "out.pt", lambda name, data: data.replace(b"K\x02K\x02\x86", b"K\x02K\x09\x86"))
    with pytest.raises(CheckpointError, match="does not fit its storage of 4 elements"):
        read_torch(tmp_path / "out.pt")


def doubled_key(depth: int = 60) -> bytes:
    """A dictionary whose key is a tuple of two tuples of two tuples …, which takes 2^depth steps to hash."""
    return stream(b"}", b"N" + b"\x85" + b"2\x86" * depth, b"K\x01s")


WORK = {
    "key": doubled_key(),
    "key of a set": stream(b"cbuiltins\nset\n]N\x85", b"2\x86" * 60, b"a\x85R"),
    "key of an ordered dict": stream(b"ccollections\nOrderedDict\n]N\x85", b"2\x86" * 60, b"K\x01\x86a\x85R"),
    "frozen sets": stream(b"cbuiltins\nfrozenset\n]cbuiltins\nfrozenset\n]Na\x85Ra\x85R"),
    "keys of one hash": stream(
        b"}(", *(pickle.dumps((2**61 - 1) * i, 2)[2:-1] + b"N" for i in range(1, 2000)), b"u"
    ),
    # A list of 20,000 items, copied 500 times.
    "copies": stream(b"](" + b"N" * 20_000 + b"eq\x000", b"ctorch.jit._pickle\nbuild_intlist\nq\x010",
                     b"(" + b"h\x01h\x00\x85R" * 500 + b"l"),
    "arguments": stream(b"(" + b"N" * 20_000 + b"tq\x000", b"comegaconf\nA\nq\x010",
                        b"(" + b"h\x01h\x00\x81" * 500 + b"l"),
}  # fmt: skip


@pytest.mark.parametrize("program", WORK)
def test_work_beyond_the_size_of_a_file_is_refused(tmp_path, program):
    as_zip(tmp_path / "file.pt", WORK[program])
    with pytest.raises(CheckpointError, match=r"file\.pt is damaged.*(a key that|copies more)"):
        read_torch(tmp_path / "file.pt")


def test_ordinary_keys_are_read(tmp_path):
    content = {("exp_avg", 0): 1, 0: 2, "a": {1, 2}, "b": frozenset("c"), None: 3, 2.5: 4}
    torch.save(content, tmp_path / "file.pt")
    assert read_torch(tmp_path / "file.pt") == content


def test_many_tensors_of_one_number(tmp_path):
    torch.save({str(i): torch.ones(1).expand(2**22) for i in range(40)}, tmp_path / "file.pt")
    with pytest.raises(CheckpointError, match="does not fit its storage"):
        read_torch(tmp_path / "file.pt")


# --------------------------------------------------------------------------------------------------
# Other kinds of files


def test_token_files_are_not_unpickled(tmp_path):
    class Touch:
        def __reduce__(self):
            return Path.touch, (tmp_path / "touched",)

    np.save(tmp_path / "0.npy", np.array([Touch()], dtype=object), allow_pickle=True)
    (tmp_path / "1.npy").write_bytes(pickle.dumps(Touch()))
    with open(tmp_path / "2.npy", "wb") as file:
        np.savez(file, tokens=np.array([Touch()], dtype=object))
    for name in ("0.npy", "1.npy", "2.npy"):
        with pytest.raises(FileError, match=rf"^[^\n]*{name}[^\n]*$"):
            load_tokens(tmp_path / name, 16)
    assert not (tmp_path / "touched").exists()


def test_yaml(tmp_path):
    path = tmp_path / "model.yaml"
    path.write_text(f"model: !!python/object/apply:os.system ['touch {tmp_path}/touched']")
    with pytest.raises(CheckpointError, match=r"^[^\n]*model\.yaml cannot be read as YAML[^\n]*$"):
        read_yaml(path)
    assert not (tmp_path / "touched").exists()
    path.write_text("- 1")
    with pytest.raises(CheckpointError, match="expected a mapping of settings, got a list"):
        read_yaml(path)
    path.write_text("model: {params: {n_embed: 8}}")
    assert read_yaml(path) == {"model": {"params": {"n_embed": 8}}}
    with pytest.raises(CheckpointError, match="is missing"):
        read_yaml(tmp_path / "none.yaml")
