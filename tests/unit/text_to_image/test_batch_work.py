"""Lists of prompts, what is set aside of them, how work is cut, and what is tried again."""

import io
import json
import sys
import tarfile
from dataclasses import replace

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
from batch_helpers import job_settings
from faults.models import write_models
from PIL import Image

from dalle_pytorch import load_dalle
from dalle_pytorch.errors import FileError, UsageError
from dalle_pytorch.sampling.settings import SamplingSettings
from text_to_image.batch import plan
from text_to_image.batch.driver import TRIES, Block
from text_to_image.batch.prompts import BadRow, Row, digest, list_files, read_rows
from text_to_image.batch.settings import BatchSettings
from text_to_image.batch.status import Moment, duration, moments, rates
from text_to_image.batch.tasks import Draw, Prompt, diffuse_blocks, sample_blocks, unit_size, units

SAMPLING = SamplingSettings(top_p=0.9)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write_models(folder)
    return folder


@pytest.fixture(scope="module")
def prior(models):
    return load_dalle(models / "dalle")


def rows(path, **columns):
    return list(read_rows(list_files(str(path)), columns))


def values(path, **columns):
    """The values of the rows, all of which can be used."""
    found = rows(path, **columns)
    assert not [row for row in found if isinstance(row, BadRow)]
    return [row.values for row in found]


def archive(path, files):
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


# Formats

TABLE = [{"key": "x", "prompt": "a red seven", "seed": 7}, {"key": "y", "prompt": 'a, "blue" star', "seed": None}]
FILLED = [TABLE[0], {"key": "y", "prompt": TABLE[1]["prompt"]}]


def test_text(tmp_path):
    (tmp_path / "p.txt").write_bytes("\ufeffa red seven\r\n\n  \nein Stern ★".encode())
    assert [(row.place, row.values["prompt"].strip()) for row in rows(tmp_path / "p.txt")] == \
        [("line 1", "a red seven"), ("line 4", "ein Stern ★")]  # fmt: skip
    (tmp_path / "q.txt").write_bytes("a red seven\na star ★".encode("utf-16"))
    assert [value["prompt"].strip() for value in values(tmp_path / "q.txt")] == ["a red seven", "a star ★"]
    (tmp_path / "r.txt").write_bytes(b"a red seven\n\xff\xfe\na blue star\n" + b"x" * 2**21 + b"\na pink two\n")
    assert [row.reason if isinstance(row, BadRow) else row.place for row in rows(tmp_path / "r.txt")] == \
        ["line 1", "prompt is not UTF-8", "line 3", "too long", "line 5"]  # fmt: skip


def test_csv(tmp_path):
    text = 'key,prompt,seed,more\nx,a red seven,7,\n\ny,"a, ""blue"" star",,z\n'
    (tmp_path / "p.csv").write_text(text)
    assert values(tmp_path / "p.csv") == [{**FILLED[0], "seed": "7"}, FILLED[1]]
    (tmp_path / "q.csv").write_text('title,id\n"a red\nseven",1\na,b,c\n' + "d" * 200_000 + ",2\na star,3\n")
    found = rows(tmp_path / "q.csv", prompt="title", key="id")
    assert [row.place for row in found] == ["line 2", "line 4", "line 5", "line 6"]
    assert found[0].values == {"prompt": "a red\nseven", "key": "1"}
    assert found[1].reason == "3 values, and there are 2 columns" and "broken CSV (field larger" in found[2].reason
    assert found[3].values == {"prompt": "a star", "key": "3"}
    with pytest.raises(UsageError, match="has no column prompt, only title, id; --columns prompt=NAME names it"):
        rows(tmp_path / "q.csv")
    (tmp_path / "r.csv").write_text("prompt,prompt\na,b\n")
    with pytest.raises(FileError, match="names a column twice"):
        rows(tmp_path / "r.csv")


def test_json_lines(tmp_path):
    lines = [*map(json.dumps, TABLE), '"a pink two"', "{", "[1]", "", '{"caption": 1}', "[" * 100_000, '{"x": 2}']
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    found = rows(tmp_path / "p.jsonl")
    assert [row.values for row in found if isinstance(row, Row)] == [*FILLED, {"prompt": "a pink two"}, {"prompt": 1}]
    bad = [(row.place, row.reason) for row in found if isinstance(row, BadRow)]
    assert [place for place, _ in bad] == ["line 4", "line 5", "line 8", "line 9"]
    assert bad[1][1] == "expected a JSON object" and "nested too deeply" in bad[2][1] and bad[3][1] == "no prompt"


def test_parquet(tmp_path):
    table = pyarrow.Table.from_pylist([{**row, "pixels": b"x" * 100} for row in TABLE])
    pyarrow.parquet.write_table(table, tmp_path / "p.parquet")
    assert values(tmp_path / "p.parquet") == FILLED
    with pytest.raises(UsageError, match="has no column title, only key, prompt, seed, pixels"):
        rows(tmp_path / "p.parquet", prompt="title")
    (tmp_path / "q.parquet").write_bytes(b"PAR1" + b"x" * 100 + b"PAR1")
    with pytest.raises(FileError, match=r"q\.parquet cannot be read"):
        rows(tmp_path / "q.parquet")


def test_shards_of_captions(tmp_path):
    path = archive(tmp_path / "p-0.tar", {"a/1.txt": b"a red seven\n", "a/1.jpg": b"?", "a/2.txt": b"a blue star",
                                          "a/2.json": b'{"seed": 3}', ".x.txt": b"hidden"})  # fmt: skip
    assert [{**row.values, "prompt": row.values["prompt"].strip()} for row in rows(path)] == \
        [{"key": "a/1", "prompt": "a red seven"}, {"key": "a/2", "prompt": "a blue star", "seed": 3}]  # fmt: skip
    archive(tmp_path / "p-1.tar", {"3.json": b'{"caption": "a pink two"}', "4.json": b"{", "5\x1b\xff.txt": b"x"})
    found = rows(tmp_path / "p-{0..1}.tar")
    assert [row.place for row in found[2:]][:2] == ["p-1.tar, 3", "p-1.tar, 4"] and "\x1b" not in found[4].place
    assert found[2].values["prompt"] == "a pink two" and found[3].reason.startswith("broken JSON")
    (tmp_path / "q.tar").write_bytes(path.read_bytes()[:700])
    with pytest.raises(FileError, match=r"q\.tar cannot be read"):
        rows(tmp_path / "q.tar")


def test_addresses(tmp_path):
    memory = fsspec.filesystem("memory")
    try:
        for number in range(2):
            memory.pipe(f"/lists/p-{number}.csv", f"prompt\na red seven\na star of {number}\n".encode())
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(TABLE), tmp_path / "p.parquet")
        memory.pipe("/lists/p.parquet", (tmp_path / "p.parquet").read_bytes())
        memory.pipe("/lists/p.tar", archive(tmp_path / "p.tar", {"1.txt": b"a red seven"}).read_bytes())
        expected = ["a red seven", "a star of 0", "a red seven", "a star of 1"]
        for name in ("memory://lists/p-*.csv", "memory://lists/p-{0..1}.csv"):
            assert [value["prompt"] for value in values(name)] == expected
        assert values("memory://lists/p.parquet") == FILLED
        assert values("memory://lists/p.tar") == [{"key": "1", "prompt": "a red seven"}]
        with pytest.raises(FileError, match=r"p-7\.csv"):
            rows("memory://lists/p-7.csv")
    finally:
        memory.store.clear()


def test_lists_that_are_not_there(tmp_path):
    (tmp_path / "p.docx").write_text("x")
    (tmp_path / "empty").mkdir()
    for name, message in (("none.txt", "there is no list of prompts"), ("*.csv", "there is no list of prompts"),
                          ("p.docx", "is no list of prompts; expected one of .txt"),
                          ("empty", "holds no list of prompts")):  # fmt: skip
        with pytest.raises(FileError, match=message):
            list_files(str(tmp_path / name))


def test_packages_that_are_missing_are_told(tmp_path, monkeypatch):
    (tmp_path / "p.parquet").write_bytes(b"x")
    for package, name in (("pyarrow.parquet", str(tmp_path / "p.parquet")), ("fsspec", "memory://p.txt")):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            with pytest.raises((UsageError, FileError), match=r"pip install 'dalle-diffusion\[batch\]'"):
                rows(name)


def test_a_list_has_a_digest_of_its_content(tmp_path):
    for name, text in (("a.txt", "x"), ("b.txt", "x"), ("c.txt", "y")):
        (tmp_path / name).write_text(text)
    first, second, third = (digest([str(tmp_path / name)]) for name in ("a.txt", "b.txt", "c.txt"))
    assert first == second != third


# What is set aside


def planned(tmp_path, prior, content, **defaults):
    """The prompts and the rejected rows of JSON lines."""
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in content))
    usual = plan.Defaults(**{"seed": 3, "num_images": 16, "sampling": SAMPLING, "images": str(tmp_path), **defaults})
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    counts = plan.write_plan(read_rows([str(tmp_path / "p.jsonl")], {}), prior, usual, good, bad)
    prompts = list(plan.read_plan(good, SAMPLING))
    rejected = [json.loads(line) for line in bad.read_text().splitlines()]
    assert (counts.prompts, counts.rejected) == (len(prompts), len(rejected))
    assert counts.candidates == sum(prompt.num_images for prompt in prompts)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []
    return prompts, [(row["place"], row["reason"]) for row in rejected]


def test_rows_with_everything(tmp_path, prior):
    line = {"key": "k", "prompt": " A  red\nSeven ", "seed": "18446744073709551615", "num_images": 4.0, "top_k": 3,
            "temperature": "0.5", "cond_scale": 2}  # fmt: skip
    ((prompt, plain), rejected) = planned(tmp_path, prior, [line, {"prompt": "a star"}])
    assert prompt == Prompt(0, "k", "line 1", "a red seven", 2**64 - 1, 4, SamplingSettings(3, 0.9, 0.5, 2.0))
    assert plain == Prompt(1, "1", "line 2", "a star", 3, 16, SAMPLING) and not rejected


BAD = [
    ({"prompt": "  "}, "empty"), ({"prompt": ["a"]}, "the prompt is no text but"), ({"prompt": None}, "empty"),
    ({"prompt": "x" * 20_000}, "too long: 20000 characters"),
    ({"prompt": "a red seven on brick " * 20}, "too long: this model reads 24 tokens, and would leave out"),
    ({"prompt": "a", "seed": -1}, "seed is '-1', expected a whole number from 0 to 18446744073709551615"),
    ({"prompt": "a", "seed": 1.5}, "seed is '1.5', expected a whole number"),
    ({"prompt": "a", "seed": "x"}, "seed is 'x'"), ({"prompt": "a", "seed": True}, "seed is 'True'"),
    ({"prompt": "a", "num_images": 0}, "num_images is '0', expected a whole number from 1 to"),
    ({"prompt": "a", "temperature": "hot"}, "temperature is 'hot', expected a number"),
    ({"prompt": "a", "temperature": "nan"}, "temperature is 'nan', expected a number"),
    ({"prompt": "a", "temperature": -1}, "temperature must be 0"), ({"prompt": "a", "top_p": 2}, "top_p must be"),
    ({"prompt": "a", "key": "k" * 300}, "its key has more than 200 characters"),
    ({"prompt": "a", "image": "none.png"}, "there is no image none.png"),
    ({"prompt": "a", "image": "broken.png"}, "image broken.png cannot be read: "),
    ({"prompt": "a", "image": "/etc/passwd"}, "is no path below the folder of the list; --images_dir names another"),
    ({"prompt": "a", "image": "../x.png"}, "is no path below"), ({"prompt": "a", "image": "http://h/x"}, "is no path"),
    ({"prompt": "a", "image": "a::b"}, "is no path below"), ({"prompt": "a", "image": 7}, "expected the path of a"),
]  # fmt: skip


def test_bad_rows_are_set_aside_with_place_and_reason(tmp_path, prior):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "whole.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "whole.png").read_bytes()[:80])
    prompts, rejected = planned(tmp_path, prior, [line for line, _ in BAD] + [{"prompt": "a", "image": "whole.png"}])
    assert [prompt.place for prompt in prompts] == [f"line {len(BAD) + 1}"] and prompts[0].number == 0
    assert [place for place, _ in rejected] == [f"line {number}" for number in range(1, len(BAD) + 1)]
    for (_, told), (line, reason) in zip(rejected, BAD, strict=True):
        assert reason in told, line


def test_duplicates(tmp_path, prior):
    lines = [{"key": "x", "prompt": "a"}, {"key": "y", "prompt": "a"}, {"key": "x", "prompt": "b"}, {"prompt": "a b"},
             {"prompt": "A  b"}, {"prompt": "a b", "seed": 9}, {"prompt": "a b", "seed": 3}]  # fmt: skip
    prompts, rejected = planned(tmp_path, prior, lines)
    assert [prompt.place for prompt in prompts] == ["line 1", "line 2", "line 4", "line 6"]
    assert rejected == [("line 3", "duplicate key 'x', as at line 1"), ("line 5", "duplicate of line 4"),
                        ("line 7", "duplicate of line 4")]  # fmt: skip


def test_long_prompts_may_be_cut_off(tmp_path, prior):
    prompts, rejected = planned(tmp_path, prior, [{"prompt": "a red seven " * 20}], truncate_text=True)
    assert len(prompts) == 1 and not rejected


# How work is cut


def prompt(number, count=4, sampling=SAMPLING, image=None):
    return Prompt(number, str(number), f"line {number}", f"prompt {number}", 0, count, sampling, image)


def spans(blocks):
    return [[(item.prompt.number, item.first, item.count) for item in block] for block in blocks]


def test_blocks_are_filled_by_several_prompts_and_a_prompt_fills_several():
    blocks = sample_blocks([prompt(0, 3), prompt(1, 6), prompt(2, 1)], 4)
    assert spans(blocks) == [[(0, 0, 3), (1, 0, 1)], [(1, 1, 4)], [(1, 5, 1), (2, 0, 1)]]
    other = replace(SAMPLING, temperature=0.5)
    blocks = sample_blocks([prompt(0, 2), prompt(1, 2, other), prompt(2, 2), prompt(3, 2, image="x")], 8)
    assert sorted(spans(blocks)) == [[(0, 0, 2), (2, 0, 2)], [(1, 0, 2)], [(3, 0, 2)]]


def test_guided_blocks_are_of_one_prompt():
    chosen = [Draw(prompt(number), rank, 1) for number in range(2) for rank in range(3)]
    assert [len(block) for block in diffuse_blocks(chosen, 4, by_prompt=False)] == [4, 2]
    assert spans(diffuse_blocks(chosen, 2, by_prompt=True)) == \
        [[(0, 0, 1), (0, 1, 1)], [(0, 2, 1)], [(1, 0, 1), (1, 1, 1)], [(1, 2, 1)]]  # fmt: skip


def test_units():
    assert [[p.number for p in unit.prompts] for unit in units(map(prompt, range(5)), 2)] == [[0, 1], [2, 3], [4]]
    assert unit_size(7, 100, 16, 32, 5) == 7
    assert unit_size(None, 10, 16, 32, 4) == 8  # fills four batches
    assert unit_size(None, 10, 256, 32, 10) == 1
    assert unit_size(None, 1_000_000, 256, 32, 10) == 102  # as many as memory is there for
    assert unit_size(None, 100_000, 256, 32, 10) == 25  # not more shards than that


# What is tried again


def fail_until_narrowed(block, bad, passing=0):
    """Runs a block whose prompts in `bad` always fail; the first `passing` whole tries do too. Returns the tasks."""
    waiting, ran = block.begin(), []
    while waiting:
        task = waiting.pop()
        ran.append(task)
        failing = {item.prompt.number for item in task.items} & bad
        if failing or (task.probe is None and len(ran) <= passing):
            waiting += block.failed(task, f"no {sorted(failing)}")
        else:
            waiting += block.succeeded(task, [item.prompt.number for item in task.items])
    return ran


def test_a_block_is_tried_then_narrowed():
    items = [Draw(prompt(number), first, 1) for number in range(3) for first in range(2)]
    block = Block("sample", 0, 0, items)
    ran = fail_until_narrowed(block, bad={1})
    assert [(p.number, reason) for p, reason in block.failures] == [(1, "no [1]")] and block.narrowed
    assert block.results == [0, 0, 2, 2] and [item.prompt.number for item in block.items] == [0, 0, 2, 2]
    whole, alone = [task for task in ran if task.probe is None], [task for task in ran if task.probe is not None]
    assert len(whole) == TRIES + 1 and len(alone) == 2 + TRIES
    assert len(whole[-1].items) == 4  # together, as the others of an undisturbed batch


def test_a_block_that_failed_by_chance_is_computed_whole():
    block = Block("sample", 0, 0, [Draw(prompt(number), 0, 1) for number in range(2)])
    ran = fail_until_narrowed(block, bad=set(), passing=TRIES)
    assert not block.failures and not block.narrowed and block.results == [0, 1] and len(ran[-1].items) == 2
    # All prompts of it fail, or its only one.
    for numbers in (range(2), range(1)):
        block = Block("score", 0, 0, [Draw(prompt(number), 0, 1) for number in numbers])
        fail_until_narrowed(block, bad=set(numbers))
        assert len(block.failures) == len(numbers) and block.finished and block.results == []


# Settings, and what is seen


def test_settings_that_do_not_go_together(models, tmp_path):
    for options, message in (({"keep": 2, "diffuse": 3}, "--diffuse 3 is more than --keep 2"),
                             ({"columns": [("pixels", "x")]}, "--columns: expected one of key, prompt"),
                             ({"output_format": "folders", "image_format": "webp"}, "--image_format webp goes with"),
                             ({"sampler": "euler"}, "--sampler"),
                             ({"clip_config": "x", "clip_path": None}, "--clip_path"),
                             ({"vqgan_config_path": "x"}, "--vqgan_model_path")):  # fmt: skip
        with pytest.raises(UsageError, match=message):
            job_settings(models, tmp_path, tmp_path / "p.txt", **options)


def test_the_command_line_of_a_job():
    settings = BatchSettings.parse(["--prompts", "p.csv", "--outputs_dir", "job", "--columns", "prompt=t", "key=id"])
    assert dict(settings.columns) == {"prompt": "t", "key": "id"} and settings.clip_sort and settings.keep is None
    recorded = settings.recorded()
    assert recorded["columns"] == {"prompt": "t", "key": "id"} and recorded["threads"] == 1
    assert not recorded.keys() & {"prompts", "outputs_dir", "num_workers", "device", "dalle_path", "retry_failed"}


def test_the_course_of_a_job_leaves_out_the_time_between_runs():
    log = [{"time": 100, "event": "start"}, {"time": 110, "event": "unit", "candidates": 20, "prompts": 2},
           {"time": 112, "event": "failure"}, {"time": 500, "event": "start"},
           {"time": 510, "event": "unit", "candidates": 20, "prompts": 1}]  # fmt: skip
    course = moments(log)
    assert course == [Moment(0, 0, 0), Moment(10, 20, 2), Moment(22, 40, 3)]
    assert rates(course) == (40 / 22, 3 / 22) and rates(course[:1]) is None
    assert [duration(seconds) for seconds in (0.4, 59.6, 3661, 90_000, 7200)] == \
        ["0 s", "1 min", "1 h 1 min", "1 d 1 h", "2 h"]  # fmt: skip
