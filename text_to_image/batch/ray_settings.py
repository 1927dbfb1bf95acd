"""Settings of a job on a Ray cluster. Neither torch nor Ray is imported."""

from dataclasses import dataclass
from typing import Any, ClassVar

from dalle_pytorch.errors import UsageError
from dalle_pytorch.settings import Settings, name_value, number, option

Actors = list[tuple[tuple[str, ...], float]]  # stages that are one actor's, and its share of the worker

# Any core can do any stage, so on CPUs one process with all models is never idle while there is work. On a GPU stages
# wait for each other's launches and copies: as processes of their own they use it at the same time.
ACTORS: dict[str, Actors] = {
    "cpu": [(("sample", "score", "diffuse", "pack"), 1.0)],
    "cuda": [(("sample",), 0.4), (("score",), 0.2), (("diffuse",), 0.3), (("pack",), 0.1)],
}
DEVICES = tuple(ACTORS)


def stages_share(text: Any) -> tuple[tuple[str, ...], float]:
    """STAGES=SHARE, such as `score+pack=0.2`."""
    if isinstance(text, tuple):  # parsed before
        return text
    stages, share = name_value(text)
    return tuple(stages.split("+")), number(float, 0, 1, above=True)(share)


@dataclass
class RayCluster(Settings):
    title: ClassVar[str] = "on a Ray cluster (docs/cluster.md)"
    ray: str | None = option(None, "run on the cluster at this address, HOST:PORT, or auto: the one that this machine "
                                   "is of", metavar="auto|ADDRESS")  # fmt: skip
    ray_actors: list = option([], "the processes of a worker: the stages (sample, score, diffuse, pack) of each, and "
                                  "its share of the worker's GPU and CPUs (default: sample=0.4 score=0.2 diffuse=0.3 "
                                  "pack=0.1 on GPUs, sample+score+diffuse+pack=1 on CPUs)", kind=stages_share,
                              nargs="+", metavar="STAGES=SHARE")  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.ray_actors:
            return
        if self.ray is None:
            raise UsageError("--ray_actors goes with --ray")
        given = sorted(stage for stages, _ in self.ray_actors for stage in stages)
        known = sorted(ACTORS["cpu"][0][0])
        if given != known:
            raise UsageError(f"--ray_actors: expected each of {', '.join(known)} once, got {', '.join(given)}")
        if (total := sum(share for _, share in self.ray_actors)) > 1.0001:
            raise UsageError(f"--ray_actors: the shares of a worker are {total:g} together, at most 1 is expected")
