"""The arguments that all training scripts share: names, the YAML file, what a mistake says, and the progress bar."""

import logging
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from helpers import ROOT, run_python

from dalle_pytorch.cli import run
from dalle_pytorch.errors import UsageError
from dalle_pytorch.settings import again, option
from dalle_pytorch.training import TrainingSettings
from dalle_pytorch.training.commands.progress import run_training
from dalle_pytorch.training.interruption import Interrupted
from dalle_pytorch.training.settings import ImageSettings

SCRIPTS = ["DALLE-pytorch/train_vae.py", "DALLE-pytorch/train_vqgan.py", "DALLE-pytorch/train_dalle.py",
           "DALLE-pytorch/train_clip.py", "DALLE-pytorch/train_tokenizer.py", "diffusion/train.py"]  # fmt: skip


@dataclass
class TrainSettings(ImageSettings, TrainingSettings):
    output_dir: Path = again(TrainingSettings, "output_dir", Path("run"))
    steps: int | None = again(TrainingSettings, "steps", 100)
    batch_size: int = again(TrainingSettings, "batch_size", 4)
    ch_mult: list[int] = option([1, 2], nargs="+")
    attn_types: list[str] = option(["full"])
    emb_condition: bool = option(True)
    reversible: bool = option(False)
    vae_path: str | None = option(None)


def parse(*argv):
    return TrainSettings.parse(["--image_text_folder", "pictures", *argv], prog="train.py")


def config(tmp_path, text):
    path = tmp_path / "settings.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


# --------------------------------------------------------------------------------------------------
# Names


def test_names_of_dalle_pytorch_mean_what_ours_do():
    old = parse("--save_every_n_steps", "7", "--fp16", "--deepspeed", "--local_rank=3", "--ga_steps", "2", "--lr_decay")
    new = parse("--save_every", "7", "--mixed_precision", "fp16", "--distributed_backend", "deepspeed", "--ga_steps",
                "2", "--lr_decay", "plateau")  # fmt: skip
    assert old.as_dict() == new.as_dict()


@pytest.mark.parametrize(("flag", "precision"), [("--fp16", "fp16"), ("--amp", "fp16"), ("--bf16", "bf16")])
def test_precision_flags(flag, precision):
    assert parse(flag).mixed_precision == precision
    assert parse().mixed_precision == "no"


def test_last_of_steps_and_epochs_counts(tmp_path):
    path = config(tmp_path, "epochs: 3\n")
    for argv, expected in [
        ((), (100, None)),
        (("--epochs", "2"), (None, 2)),
        (("--config", path), (None, 3)),
        (("--config", path, "--steps", "9"), (9, None)),
    ]:
        arguments = parse(*argv)
        assert (arguments.steps, arguments.epochs) == expected


# --------------------------------------------------------------------------------------------------
# --config


def test_file_stands_for_arguments_and_the_command_line_counts(tmp_path):
    path = config(
        tmp_path,
        "batch_size: 16\nlearning_rate: 3e-4\nreversible: true\nresume: false\nmuon: false\nch_mult: [1, 1, 2]\n"
        "attn_types: [full, conv_like]\nemb_condition: false\nlr_decay: true\nbf16: true\nsave_every_n_steps: 9\n"
        "seed: 3\nvae_path:\n",
    )
    arguments = parse("--batch_size", "2", "--config", path)
    assert arguments.batch_size == 2
    assert arguments.learning_rate == 3e-4
    assert (arguments.reversible, arguments.resume, arguments.muon) == (True, False, False)
    assert arguments.ch_mult == [1, 1, 2]
    assert arguments.attn_types == ["full", "conv_like"]
    assert arguments.emb_condition is False
    assert (arguments.lr_decay, arguments.mixed_precision, arguments.save_every) == ("plateau", "bf16", 9)
    assert (arguments.seed, arguments.vae_path) == (3, None)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("batchsize: 4", "batchsize: there is no such option"),
        ("batch_size: many", "batch_size: expected a whole number, 1 or more, got 'many'"),
        ("batch_size: [1, 2]", "batch_size: expected a whole number, 1 or more, got '[1, 2]'"),
        ("batch_size: {a: 1}", "batch_size: expected a whole number, 1 or more, got"),
        ("reversible: 3", "reversible: expected True or False, got '3'"),
        ("vae_path: true", "vae_path: expected a value, got True"),
        ("lr_decay: linear", "lr_decay: expected one of cosine, constant, plateau, exponential, got 'linear'"),
        ("ch_mult: [1, x]", "ch_mult: expected a whole number, got 'x'"),
        ("config: other.yaml", "config: there is no such option"),
        ("- batch_size", "holds no settings"),
        ("batch_size: [", "is not YAML"),
    ],
)
def test_mistakes_in_the_file_are_one_line_that_names_file_and_key(tmp_path, capsys, text, says):
    with pytest.raises(SystemExit) as exit_:
        parse("--config", config(tmp_path, text))
    error = capsys.readouterr().err
    assert exit_.value.code == 2
    assert "settings.yaml" in error
    assert says in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("argv", [["--config"], ["--config", "nowhere.yaml"], ["--conf", "settings.yaml"]])
def test_config_that_is_no_file(tmp_path, monkeypatch, capsys, argv):
    monkeypatch.chdir(tmp_path)
    config(tmp_path, "batch_size: 3")
    with pytest.raises(SystemExit) as exit_:
        parse(*argv)
    assert exit_.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_settings_of_a_run_can_be_given_again(tmp_path):
    first = parse("--output_dir", str(tmp_path / "run"), "--epochs", "3", "--bf16", "--ch_mult", "1", "2", "4",
                  "--attn_types", "full,axial_row", "--deepspeed", "--no-resume", "--emb_condition", "no")  # fmt: skip
    recorded = first.as_dict()
    assert recorded["epochs"] == 3
    written = tmp_path / "config.yaml"
    written.write_text(yaml.safe_dump(recorded))
    assert TrainSettings.parse(["--config", str(written)]) == first


# --------------------------------------------------------------------------------------------------
# Values


def test_name_at_wandb_asks_for_reports_there():
    assert parse("--wandb_name", "lego").tracker == "wandb"
    assert parse("--wandb_name", "lego", "--report_to", "none").tracker is None
    assert parse().tracker is None


@pytest.mark.parametrize("argv", [["--batch_size", "0"], ["--learning_rate", "nan"], ["--zero_stage", "4"]])
def test_values_that_cannot_be_are_one_line(capsys, argv):
    with pytest.raises(SystemExit) as exit_:
        parse(*argv)
    assert exit_.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


# --------------------------------------------------------------------------------------------------
# Running


def test_interrupted_training_ends_with_one_line_and_its_own_code(tmp_path, monkeypatch, capsys):
    from dalle_pytorch.training import loop

    def stopped(*_):
        raise Interrupted(signal.SIGTERM, 7)

    monkeypatch.setattr(loop, "train", stopped)
    settings = parse("--output_dir", str(tmp_path))
    with pytest.raises(SystemExit) as exit_:
        run(lambda argv: run_training("tiny", None, None, settings))
    assert exit_.value.code == 143
    assert "saved after step 7" in capsys.readouterr().err.splitlines()[-1]


def test_training_that_cannot_begin_shows_the_error_alone(tmp_path, monkeypatch, capsys):
    from dalle_pytorch.training import loop

    def refused(*_):
        raise UsageError("this cannot be")

    monkeypatch.setattr(loop, "train", refused)
    settings = parse("--output_dir", str(tmp_path / "run"))
    with pytest.raises(SystemExit) as exit_:
        run(lambda argv: run_training("tiny", None, None, settings))
    assert exit_.value.code == 2
    # A terminal shows what follows the last carriage return of each line.
    shown = [line.split("\r")[-1] for line in capsys.readouterr().err.split("\n")]
    assert [line for line in shown if line.strip()] == ["error: this cannot be"]
    assert not (tmp_path / "run").exists()


def test_bar_shows_the_loss_in_the_main_process_alone(tmp_path, monkeypatch, capsys):
    from dalle_pytorch.training import loop

    def train(task, dataset, settings, report, leave):
        for step in (60, 80, 100):  # a resumed run
            report(step, {"loss": 0.125, "seconds": 1.0})
        logging.getLogger("dalle_pytorch.training.loop").info("3 of 9 images were skipped")

    monkeypatch.setattr(loop, "train", train)
    settings = parse("--output_dir", str(tmp_path))
    run_training("tiny", None, None, settings)
    shown = capsys.readouterr()
    assert "loss=0.125" in shown.err
    assert "100/100" in shown.err
    assert "3 of 9 images were skipped" in shown.out + shown.err
    level = logging.getLogger("dalle_pytorch").level
    monkeypatch.setenv("RANK", "1")
    run_training("tiny", None, None, settings)
    assert "loss" not in capsys.readouterr().err
    assert logging.getLogger("dalle_pytorch").level == level


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_answers_without_torch(script):
    """`--help` imports no torch, which takes seconds."""
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['x', '--help']\n"
        f"try:\n    runpy.run_path({str(ROOT / script)!r}, run_name='__main__')\n"
        "except SystemExit as e:\n    assert e.code == 0\n"
        "assert 'torch' not in sys.modules\n"
    )
    process, seconds = run_python("-c", code)
    assert process.returncode == 0, process.stderr
    assert "--config" in process.stdout
    assert seconds < 2
