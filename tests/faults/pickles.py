"""Pickles that would run code, or that cost more than they are long, in every container that torch has had."""

import io
import pickle
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path

from faults.harness import CANARY, Case

TOUCH = f"touch {CANARY}"
WRITE = f"open({CANARY!r}, 'w')"
# Callables and arguments that run code, by module and qualified name.
CALLS: dict[str, tuple[str, str, tuple]] = {
    "os.system": ("os", "system", (TOUCH,)), "posix.system": ("posix", "system", (TOUCH,)),
    "os.popen": ("os", "popen", (TOUCH,)), "os.execlp": ("os", "execlp", ("touch", "touch", CANARY)),
    "os.spawnlp": ("os", "spawnlp", (0, "touch", "touch", CANARY)), "os.mkdir": ("os", "mkdir", (CANARY,)),
    "os.rename": ("os", "rename", ("x", CANARY)), "subprocess.Popen": ("subprocess", "Popen", (["touch", CANARY],)),
    "subprocess.run": ("subprocess", "run", (["touch", CANARY],)),
    "subprocess.getoutput": ("subprocess", "getoutput", (TOUCH,)), "pty.spawn": ("pty", "spawn", (["touch", CANARY],)),
    "eval": ("builtins", "eval", (WRITE,)), "exec": ("builtins", "exec", (WRITE,)),
    "py2 eval": ("__builtin__", "eval", (WRITE,)), "open": ("builtins", "open", (CANARY, "w")),
    "io.open": ("io", "open", (CANARY, "w")), "io.FileIO": ("io", "FileIO", (CANARY, "w")),
    "codecs.open": ("codecs", "open", (CANARY, "w")), "__import__": ("builtins", "__import__", ("antigravity",)),
    "importlib": ("importlib", "import_module", ("antigravity",)), "getattr": ("builtins", "getattr", ("", "format")),
    "shutil.copy": ("shutil", "copy", ("/etc/hostname", CANARY)), "pathlib": ("pathlib", "Path", (CANARY,)),
    "timeit": ("timeit", "timeit", (WRITE, WRITE, 0, 1)), "cProfile": ("cProfile", "run", (WRITE,)),
    "pdb": ("pdb", "run", (WRITE,)), "bdb": ("bdb", "Bdb.run", (WRITE,)), "runpy": ("runpy", "run_path", (CANARY,)),
    "code": ("code", "interact", ()), "webbrowser": ("webbrowser", "open", (CANARY,)),
    "pickle.loads": ("pickle", "loads", (b"cos\nsystem\n(S'" + TOUCH.encode() + b"'\ntR.",)),
    "_pickle.loads": ("_pickle", "loads", (b"cos\nsystem\n(S'" + TOUCH.encode() + b"'\ntR.",)),
    "torch.load": ("torch", "load", ("model.pt",)), "torch.hub": ("torch.hub", "load", ("x/y", "z")),
    "load_from_bytes": ("torch.storage", "_load_from_bytes",
                        (b"cos\nsystem\n(S'" + TOUCH.encode() + b"'\ntR.",)),
    "torch.jit": ("torch.jit", "load", ("model.pt",)),
    "collect_env": ("torch.utils.collect_env", "run", (TOUCH,)),
    "numpy.save": ("numpy", "save", (CANARY, 1)), "numpy.f2py": ("numpy.f2py.crackfortran", "myeval", (WRITE,)),
    "numpy.load": ("numpy", "load", ("x.npy",)), "partial": ("functools", "partial", ()),
    "methodcaller": ("operator", "methodcaller", ("system", TOUCH)), "attrgetter": ("operator", "attrgetter", ("x",)),
    "types.FunctionType": ("types", "FunctionType", ()), "types.CodeType": ("types", "CodeType", ()),
    "ctypes": ("ctypes", "CDLL", ("libc.so.6",)), "socket": ("socket", "create_connection", (("127.0.0.1", 9),)),
    "smtplib": ("smtplib", "SMTP", ("127.0.0.1",)), "dotted os": ("torch.serialization", "os.system", (TOUCH,)),
    "dotted sys": ("collections", "_sys.modules.get", ("os",)), "logging": ("logging.config", "listen", ()),
    "multiprocessing": ("multiprocessing.util", "spawnv_passfds", (b"/bin/touch", [CANARY], [])),
    "omegaconf": ("omegaconf.dictconfig", "DictConfig", ()), "lightning": ("pytorch_lightning.callbacks", "X", ()),
}  # fmt: skip


class _Writer:
    """Writes pickle opcodes by hand, so that nothing needs to be importable here."""

    def __init__(self, protocol: int):
        self.protocol, self.bytes = protocol, b"" if protocol < 2 else bytes((0x80, protocol))

    def text(self, text: str) -> None:
        if self.protocol >= 4:
            encoded = text.encode()
            self.bytes += b"X" + struct.pack("<I", len(encoded)) + encoded
        else:
            self.bytes += b"V" + text.encode("unicode_escape") + b"\n"

    def function(self, module: str, name: str) -> None:
        if self.protocol >= 4:
            self.text(module)
            self.text(name)
            self.bytes += b"\x93"  # STACK_GLOBAL
        else:
            self.bytes += b"c" + f"{module}\n{name}\n".encode()

    def value(self, value: object) -> None:
        plain = pickle.dumps(value, min(self.protocol, 3))
        self.bytes += plain[2 if self.protocol >= 2 else 0 : -1]


def call(module: str, name: str, arguments: tuple, protocol: int, way: str = "reduce") -> bytes:
    """A pickle that calls a function by REDUCE, INST, OBJ, NEWOBJ or a __setstate__ by BUILD."""
    writer = _Writer(protocol)
    if way == "inst":
        writer.bytes += b"("
        for argument in arguments:
            writer.value(argument)
        writer.bytes += b"i" + f"{module}\n{name}\n".encode()
    elif way == "obj":
        writer.bytes += b"("
        writer.function(module, name)
        for argument in arguments:
            writer.value(argument)
        writer.bytes += b"o"
    else:
        writer.function(module, name)
        writer.value(arguments)
        writer.bytes += {"reduce": b"R", "newobj": b"\x81", "build": b"b"}[way]
    return writer.bytes + b"."


def nested(levels: int, kind: str) -> bytes:
    """Containers in containers: a list or tuple `levels` deep; or tuples twice in the next, shared, as a dict's key."""
    if kind == "list":
        return b"\x80\x02" + b"]" * levels + b"a" * (levels - 1) + b"."
    if kind == "tuple":
        return b"\x80\x02)" + b"\x85" * levels + b"."
    doubling = b"\x80\x02)" + b"".join(b"2\x86" for _ in range(levels))
    return doubling + b"." if kind == "doubling" else b"\x80\x02}" + doubling[2:] + b"K\x01s."


BOMBS: dict[str, bytes] = {
    "deep list": nested(200_000, "list"), "deep tuple": nested(200_000, "tuple"), "doubling": nested(40, "doubling"),
    "doubling key": nested(40, "key"), "false length": b"\x80\x04B" + struct.pack("<I", 2**32 - 1) + b"x.",
    "false long length": b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"x.",
    "false text length": b"\x80\x04\x8d" + struct.pack("<Q", 2**50) + b"x.",
    "large integer": b"\x80\x02\x8b" + struct.pack("<i", 400_000) + b"\x7f" * 400_000 + b".",
    "long decimal": b"I" + b"9" * 900_000 + b"\n.", "false frame": b"\x80\x04\x95" + struct.pack("<Q", 2**40) + b"N.",
    "far memo": b"\x80\x02Nr\xff\xff\xff\x7fj\xff\xff\xff\x7f.", "no stop": b"\x80\x02N", "empty": b"",
    "zeros": bytes(5000), "bytearray": call("builtins", "bytearray", (2**40,), 2),
    "range": call("builtins", "list", (range(3),), 2), "unknown opcode": b"\x80\x02\xfe.",
    "protocol 99": b"\x80\x63N.", "not a dict": b"\x80\x02K\x01.", "text": b"hello\n",
    "recursive": b"\x80\x02]q\x00h\x00a.",
}  # fmt: skip


def zip_file(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def deflate_zeros(path: Path, size: int = 5 << 29) -> None:
    """An archive of torch's whose pickle is 2.5 GiB of zeros."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("archive/version", b"3\n")
        with archive.open("archive/data.pkl", "w", force_zip64=True) as member:
            for _ in range(size >> 24):
                member.write(bytes(1 << 24))


def in_containers(data: bytes) -> Iterator[tuple[str, bytes]]:
    """The pickle alone, in torch's archive, in a TorchScript archive, and in torch's format of before 1.6."""
    yield "plain", data
    yield "archive", zip_file({"archive/data.pkl": data, "archive/version": b"3\n", "archive/data/0": bytes(64)})
    yield "script", zip_file({"archive/data.pkl": data, "archive/constants.pkl": data, "archive/version": b"3\n",
                              "archive/code/__torch__.py": WRITE.encode()})  # fmt: skip
    yield (
        "legacy",
        b"".join((pickle.dumps(0x1950A86A20F9469CFC6C, 2), pickle.dumps(1001, 2), pickle.dumps({}, 2), data)),
    )


def cases() -> Iterator[Case]:
    def case(name: str, data: bytes, file: str) -> Case:
        return Case(name, ["convert", file], lambda folder: (folder / file).write_bytes(data), must_refuse=True)

    for name, (module, function, arguments) in CALLS.items():
        for protocol in (0, 2, 4):
            ways = ("reduce", "inst", "obj") if protocol == 0 else ("reduce", "newobj", "build")
            for way in ways:
                data = call(module, function, arguments, protocol, way)
                for container, whole in in_containers(data):
                    file = "encoder.pkl" if container == "plain" and protocol == 4 else "model.pt"
                    yield case(f"{name} {way} {protocol} {container}", whole, file)
    for name, data in BOMBS.items():
        for container, whole in in_containers(data):
            yield case(f"{name} {container}", whole, "last.ckpt")
    yield Case("deflated bomb", ["convert", "model.pt"], lambda folder: deflate_zeros(folder / "model.pt"), True)
