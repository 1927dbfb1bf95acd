"""`python -m faults`: see the package's docstring."""

import argparse
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from faults import commands, files, interruptions, kills, pickles, surroundings
from faults.harness import FAULTS, Case, Outcome, import_all, run_case
from faults.models import write_models


def groups(models: Path, rng: np.random.Generator) -> dict[str, Callable[[], Iterable[Case]]]:
    return {"pickles": pickles.cases, **files.cases(models, rng), "commands": lambda: commands.cases(models)}


def table(outcomes: dict[str, list[Outcome]]) -> str:
    counts = {group: Counter(outcome.kind for outcome in found) for group, found in outcomes.items()}
    lines = [f"{'':24}" + "".join(f"{group:>{len(group) + 2}}" for group in counts)]
    for kind in ("tried", "refused in one line", "accepted", "ended by the signal", *FAULTS):
        numbers = ((group, len(outcomes[group]) if kind == "tried" else counts[group][kind]) for group in counts)
        lines.append(f"{kind:24}" + "".join(f"{number:{len(group) + 2}}" for group, number in numbers))
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="faults", description="Tries hostile inputs; exit code 1 if there is a fault."
    )
    parser.add_argument("--only", nargs="+", metavar="GROUP", help="these groups alone")
    parser.add_argument("--count", type=int, default=300, help="the most cases of a group, drawn by --seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", action="store_true", help="keep the folders of the cases")
    arguments = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="faults-"))
    models = work / "models"
    models.mkdir()
    write_models(models)
    import_all(models, ["batch"] if arguments.only == ["kills"] else [])
    rng = np.random.default_rng(arguments.seed)
    of_cases = groups(models, rng)
    of_scenarios = {"interruptions": interruptions.run, "surroundings": surroundings.run, "kills": kills.run}
    names = arguments.only or [name for name in (*of_cases, *of_scenarios) if name != "kills"]  # which takes long
    if unknown := {*names} - {*of_cases, *of_scenarios}:
        parser.error(f"no group {', '.join(sorted(unknown))}; there are {', '.join([*of_cases, *of_scenarios])}")
    outcomes: dict[str, list[Outcome]] = {}
    for name in names:
        folder = work / name
        if name in of_scenarios:
            outcomes[name] = of_scenarios[name](models, folder, arguments.count, rng)
            continue
        cases = [*of_cases[name]()]
        chosen = sorted(rng.permutation(len(cases))[: arguments.count])
        outcomes[name] = []
        for number in tqdm(chosen, name, dynamic_ncols=True, disable=None):
            outcomes[name].append(run_case(cases[number], folder / str(number)))
            if not arguments.keep:
                shutil.rmtree(folder / str(number), ignore_errors=True)
    print(table(outcomes))
    faults = [(name, outcome) for name, found in outcomes.items() for outcome in found if outcome.faults]
    for name, outcome in islice(faults, 200):
        last = outcome.errors.strip().splitlines()[-1:] or [""]
        print(f"{name}: {outcome.case}: {', '.join(outcome.faults)} (exit code {outcome.code}, {outcome.seconds:.1f} s,"
              f" {outcome.memory >> 20} MiB) {last[0][:200]!r}")  # fmt: skip
    if not arguments.keep:
        shutil.rmtree(work, ignore_errors=True)
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
