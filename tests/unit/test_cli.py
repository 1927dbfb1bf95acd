"""What scripts share: mistakes are one line and exit code 2, bugs keep their traceback."""

import errno
import io
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from helpers import run_python

from dalle_pytorch.cli import run
from dalle_pytorch.devices import pick_device
from dalle_pytorch.errors import CheckpointError, TrainingDiverged, UsageError
from dalle_pytorch.files.boundary import opening
from dalle_pytorch.settings import Settings, option


def outcome(error, capsys):
    """Exit code and stderr of a script that fails with `error`."""

    def main(argv):
        raise error

    with pytest.raises(SystemExit) as exit:
        run(main, [])
    return exit.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (UsageError("--this and --that"), "--this and --that"),
        (CheckpointError("two\nlines"), "two lines"),
        (TrainingDiverged("the loss is nan"), "the loss is nan"),
        (OSError(errno.ENOSPC, "No space left on device"), "disk is full"),
        (PermissionError(errno.EACCES, "Permission denied", "/closed"), "/closed may not be written"),
        (FileExistsError(errno.EEXIST, "File exists", "/there"), "/there cannot be a folder"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "/gone"), "/gone: No such file"),
        (MemoryError(), "--batch_size"),
        (torch.OutOfMemoryError("CUDA out of memory"), "--batch_size"),
        (UsageError("no " + "x" * 900 + " in y"), "error: no " + "x" * 159 + "…" + "x" * 80 + " in y\n"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "z" * 900), "z" * 159 + "…" + "z" * 79 + ": File name"),
    ],
)
def test_mistakes_are_one_line(error, said, capsys):
    code, err = outcome(error, capsys)
    assert code == 2 and said in err and err.startswith("error: ") and err.count("\n") == 1


def test_file_in_the_way_of_a_folder_is_named(tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError) as raised:
        (tmp_path / "file" / "deep" / "run").mkdir()
    assert f"error: {tmp_path / 'file'} cannot be a folder" in outcome(raised.value, capsys)[1]


def test_a_terminal_that_is_not_utf8(monkeypatch):
    for encoding, shown in (("ascii", b"\\u732b"), ("latin-1", b"\\u732b"), ("utf-8", "猫".encode())):
        terminal = io.TextIOWrapper(io.BytesIO(), encoding)
        monkeypatch.setattr("sys.stdout", terminal)
        run(lambda argv: print("猫"), [])
        terminal.flush()
        assert terminal.buffer.getvalue() == shown + b"\n"


def test_interrupting_is_no_mistake(capsys):
    assert outcome(KeyboardInterrupt(), capsys) == (130, "interrupted\n")


@pytest.mark.parametrize(
    "error",
    [
        ValueError("a bug"),
        RuntimeError("a bug"),
        KeyError("a bug"),
        AssertionError("a bug"),
        FloatingPointError("a bug"),
    ],
)
def test_bugs_keep_their_traceback(error):
    def main(argv):
        raise error

    with pytest.raises(type(error)):
        run(main, [])


def test_done_is_done():
    run(lambda argv: None, [])


@dataclass
class Amounts(Settings):
    count: int = option(1, low=1)
    share: float = option(0.5, low=0, high=1, above=True)
    weight: float = option(1.0)


def test_numbers_and_their_bounds(capsys):
    assert Amounts.parse(["--count", "3", "--share", "1"]) == Amounts(3, 1.0)
    assert Amounts.parse(["--weight=-1e12"]).weight == -1e12 and Amounts.parse(["--weight", "0"]).weight == 0
    for options in ("--count 0", "--count 1.5", "--count x", "--share 0", "--share 1.01", "--share nan", "--share inf",
                    "--count 99999999999", "--weight 1e30", "--weight inf", "--weight 1e-30"):  # fmt: skip
        with pytest.raises(SystemExit) as exit:
            Amounts.parse(options.split())
        err = capsys.readouterr().err
        assert exit.value.code == 2 and options.split()[0] in err and err.count("\n") == 1


def test_what_is_empty_or_no_text_is_refused(tmp_path, capsys):
    @dataclass
    class Paths(Settings):
        takes_config = True
        clip_path: str | None = option(None)
        outputs_dir: Path = option(Path("outputs"))
        wds: str = option("")

    (tmp_path / "config.yaml").write_text("clip_path: ''")
    for options in (["--clip_path", ""], ["--clip_path= "], ["--outputs_dir", ""],
                    ["--config", str(tmp_path / "config.yaml")]):  # fmt: skip
        with pytest.raises(SystemExit) as exit:
            Paths.parse(options)
        assert exit.value.code == 2 and "it is empty" in capsys.readouterr().err
    assert Paths.parse(["--wds", ""]).wds == ""
    with pytest.raises(SystemExit) as exit:
        run(Paths.parse, ["--clip_path", "caf\udce9"])
    assert exit.value.code == 2
    assert capsys.readouterr().err == "error: an argument is not text in UTF-8: caf\\udce9\n"


def test_debug_shows_the_cause(capsys):
    def main(argv):
        assert Amounts.parse(argv) == Amounts()
        with opening("model.pt"):
            raise IndexError("the cause")

    for options, shown in (([], False), (["--debug"], True)):
        with pytest.raises(SystemExit) as exit:
            run(main, options)
        err = capsys.readouterr().err
        assert exit.value.code == 2 and err.endswith("error: model.pt cannot be opened: the cause\n")
        assert ("IndexError: the cause" in err) == shown and (err.count("\n") == 1) != shown


def test_devices():
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device().type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("warp", "cuda:99", "cpu:x"):
        with pytest.raises(UsageError, match=name):
            pick_device(name)


IMPORTING = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a test run in the background ignores
import dalle_pytorch.cli
sys.path.insert(0, {folder!r})
try:
    import slow
except BaseException:
    os._exit(1)
"""


def test_interrupt_during_an_import_ends_at_once(tmp_path):
    """Libraries turn the exception into another one, or drop it."""
    (tmp_path / "slow.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nimport time\n")
    done, _ = run_python("-c", IMPORTING.format(folder=str(tmp_path)))
    assert (done.returncode, done.stderr) == (130, "interrupted\n")
