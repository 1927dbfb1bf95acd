"""Commands that are killed, terminated or interrupted at random moments, and given again."""

import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

from faults.harness import Outcome, broken_files, finish, results, start
from faults.models import commands

FRESH = 4  # every so many interruptions one is of a new interpreter, which spends START seconds on imports
START = 4.0
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


def longer(command: list[str]) -> list[str]:
    """The command with enough to do that there is something to interrupt."""
    more = {"generate": ["--num_images", "12", "--batch_size", "2", "--text", "a red seven|a blue star|a pink two"],
            "upscale": ["--steps", "12", "--num_batches", "3"], "batch": ["--steps", "6"]}  # fmt: skip
    return [*command, *more.get(command[0], ["--steps", "8", "--save_every", "2"] if "--steps" in command else [])]


def run(models: Path, folder: Path, count: int, rng: np.random.Generator) -> list[Outcome]:
    """Each outcome is one interruption: how the interrupted command ended, and whether the same command, given again,
    comes to what an undisturbed one does."""
    outcomes, whole, seconds = [], {}, {}
    all_commands = {name: longer(command) for name, command in commands(models).items()}
    for name, command in all_commands.items():
        undisturbed, began = folder / name, time.monotonic()
        undisturbed.mkdir(parents=True)
        outcomes.append(finish(f"{name} undisturbed", undisturbed, start(command, undisturbed, folder / "log"),
                               folder / "log"))  # fmt: skip
        whole[name], seconds[name] = results(undisturbed), time.monotonic() - began
    for number in tqdm(range(count), "interruptions", dynamic_ncols=True, disable=None):
        name = str(rng.choice([*all_commands]))
        sent, share = SIGNALS[number % len(SIGNALS)], float(rng.random())
        work, log = folder / str(number), folder / f"{number}-log"
        work.mkdir()
        fresh = number % FRESH == 0
        pid = start(all_commands[name], work, log, fresh)
        time.sleep(share * (seconds[name] + START * fresh))
        os.kill(pid, sent)
        outcome = finish(f"{name}, {sent.name} at {share:.2f}{', fresh' * fresh}", work, pid, log, ended=sent)
        if broken := broken_files(work):
            outcome.faults.append("file half-written")
            outcome.errors += "\n" + broken[0]
        again = finish(f"{outcome.case}, again", work, start(all_commands[name], work, log), log)
        # What had finished already may refuse to be done again.
        if results(work) != whole[name]:
            differing = sorted(path for path in {*results(work), *whole[name]}
                               if results(work).get(path) != whole[name].get(path))  # fmt: skip
            outcome.faults.append("work lost or done twice")
            outcome.errors += f"\n{again.errors[-200:]!r} {differing[:5]}"
        outcomes.append(outcome)
        shutil.rmtree(work, ignore_errors=True)
    return outcomes
