"""The arguments that all training scripts share: names, the YAML file, what a mistake says, and the progress bar."""

import signal
import subprocess
import sys
import time

import pytest
import yaml
from helpers import ROOT

from dalle_pytorch.cli import ArgumentParser, boolean, listed, run
from dalle_pytorch.training.cli import add_training_arguments, run_training, training_options
from dalle_pytorch.training.interruption import Interrupted

SCRIPTS = ["DALLE-pytorch/train_vae.py", "DALLE-pytorch/train_vqgan.py", "DALLE-pytorch/train_dalle.py",
           "DALLE-pytorch/train_clip.py", "diffusion/train.py"]  # fmt: skip


def make_parser():
    parser = ArgumentParser(prog="train.py")
    add_training_arguments(parser, steps=100, batch_size=4, learning_rate=1e-3, output_dir="run")
    parser.add_argument("--ch_mult", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--attn_types", type=listed(str), default=["full"])
    parser.add_argument("--emb_condition", nargs="?", const=True, default=True, type=boolean)
    parser.add_argument("--reversible", action="store_true")
    parser.add_argument("--vae_path")
    return parser


def parse(*argv):
    return make_parser().parse_args(argv)


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
    old.local_rank = None
    assert old == new


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
        "seed: -3\nvae_path:\n",
    )
    arguments = parse("--batch_size", "2", "--config", path)
    assert arguments.batch_size == 2
    assert arguments.learning_rate == 3e-4
    assert (arguments.reversible, arguments.resume, arguments.muon) == (True, False, False)
    assert arguments.ch_mult == [1, 1, 2]
    assert arguments.attn_types == ["full", "conv_like"]
    assert arguments.emb_condition is False
    assert (arguments.lr_decay, arguments.mixed_precision, arguments.save_every) == ("plateau", "bf16", 9)
    assert (arguments.seed, arguments.vae_path) == (-3, None)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("batchsize: 4", "batchsize: there is no such option"),
        ("batch_size: many", "batch_size: a whole number, 1 or more, is wanted, not 'many'"),
        ("batch_size: [1, 2]", "batch_size: a whole number, 1 or more, is wanted, not '1,2'"),
        ("batch_size: {a: 1}", "batch_size: a value is wanted, not a table"),
        ("reversible: 3", "reversible: true or false is wanted, not 3"),
        ("vae_path: true", "vae_path: a value is wanted, not true"),
        ("lr_decay: linear", "lr_decay: invalid choice: 'linear'"),
        ("ch_mult: [1, x]", "ch_mult: invalid int value: 'x'"),
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
    settings = training_options(first).settings
    assert settings["epochs"] == 3
    written = tmp_path / "config.yaml"
    written.write_text(yaml.safe_dump(settings))
    again = parse("--config", str(written))
    again.config = None
    assert again == first


# --------------------------------------------------------------------------------------------------
# Options


def test_arguments_become_options_of_the_same_names(tmp_path):
    options = training_options(parse("--output_dir", str(tmp_path), "--ga_steps", "3", "--zero_stage", "1", "--fsdp"))
    assert (options.steps, options.batch_size, options.ga_steps) == (100, 4, 3)
    assert (options.zero_stage, options.fsdp, options.report_to) == (1, True, "none")


def test_name_at_wandb_asks_for_reports_there(tmp_path):
    options = training_options(parse("--output_dir", str(tmp_path), "--wandb_name", "lego"))
    assert (options.report_to, options.wandb_name) == ("wandb", "lego")


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
    options = training_options(parse("--output_dir", str(tmp_path)))
    with pytest.raises(SystemExit) as exit_:
        run(lambda argv: run_training("tiny", None, None, options))
    assert exit_.value.code == 143
    assert "saved after step 7" in capsys.readouterr().err.splitlines()[-1]


def test_training_that_cannot_begin_shows_the_error_alone(tmp_path, monkeypatch, capsys):
    from dalle_pytorch.training import loop

    def refused(*_):
        raise ValueError("this cannot be")

    monkeypatch.setattr(loop, "train", refused)
    options = training_options(parse("--output_dir", str(tmp_path / "run")))
    with pytest.raises(SystemExit) as exit_:
        run(lambda argv: run_training("tiny", None, None, options))
    assert exit_.value.code == 2
    # A terminal shows what follows the last carriage return of each line.
    shown = [line.split("\r")[-1] for line in capsys.readouterr().err.split("\n")]
    assert [line for line in shown if line.strip()] == ["error: this cannot be"]
    assert not (tmp_path / "run").exists()


def test_bar_shows_the_loss_in_the_main_process_alone(tmp_path, monkeypatch, capsys):
    from dalle_pytorch.training import loop

    def train(task, dataset, options, report):
        for step in (60, 80, 100):  # a resumed run
            report(step, {"loss": 0.125, "seconds": 1.0})
        options.notice("3 of 9 pictures were skipped")

    monkeypatch.setattr(loop, "train", train)
    options = training_options(parse("--output_dir", str(tmp_path)))
    run_training("tiny", None, None, options)
    shown = capsys.readouterr()
    assert "loss=0.125" in shown.err
    assert "100/100" in shown.err
    assert "3 of 9 pictures were skipped" in shown.out + shown.err
    monkeypatch.setenv("RANK", "1")
    run_training("tiny", None, None, options)
    assert "loss" not in capsys.readouterr().err


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
    started = time.monotonic()
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert process.returncode == 0, process.stderr
    assert "--config" in process.stdout
    assert time.monotonic() - started < 5
