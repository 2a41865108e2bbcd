"""Workers of a sweep as actors of a Ray cluster, or of a Ray of this machine where no cluster is named."""

import os
import socket
from collections.abc import Sequence
from typing import Any

from experiments.result import Result
from experiments.sweeps.asking import Job
from experiments.sweeps.local_workers import THREADS, importable
from experiments.sweeps.workers import Died, Engine, Worker
from framework.errors import KvtwinError

REACH = 10.0  # seconds that a cluster has to answer


class RayWorker(Worker):
    """An actor with one core; `answer` is the reference to what it is asked for."""

    def __init__(self, ray: Any, actor: Any):
        self.ray, self.actor, self.answer = ray, actor, None

    def give(self, job: Job) -> None:
        self.answer = self.actor.ask.remote(job)

    def take(self) -> list[Result]:
        try:
            return self.ray.get(self.answer)
        except self.ray.exceptions.RayError as error:
            raise Died(" ".join(str(error).split())[:300]) from None

    def close(self) -> None:
        self.ray.kill(self.actor)


class Cluster(Engine):
    """The cluster that RAY_ADDRESS names, or a new one of this machine with `count` cores, ended by `close`."""

    def __init__(self, count: int):
        try:
            import ray
        except ImportError as error:
            raise KvtwinError(
                "engine ray needs the package ray, which is not installed: run `pip install kvtwin[ray]`, or "
                "leave out --engine ray; --jobs spreads a sweep over the cores of this machine"
            ) from error
        address = os.environ.get("RAY_ADDRESS")
        local: dict[str, Any] = {} if address else {"num_cpus": count, "include_dashboard": False}
        self.ray, self.own = ray, not ray.is_initialized()
        if self.own:
            try:
                _reached(address)
                ray.init(address=address or "local", log_to_driver=False, logging_level="ERROR", **local)
            except (OSError, ValueError, RuntimeError) as error:
                raise KvtwinError(
                    f"no Ray at {address or 'this machine'}: {str(error).strip().splitlines()[0]}\n"
                    "expected RAY_ADDRESS to name a cluster that runs, or to be unset for one of this machine"
                ) from error
        variables = {name: os.environ.get(name, "1") for name in THREADS} | {"PYTHONPATH": importable()}
        self.kind = ray.remote(Asking).options(num_cpus=1, runtime_env={"env_vars": variables})

    def start(self) -> RayWorker:
        return RayWorker(self.ray, self.kind.remote(os.getcwd()))

    def ready(self, workers: Sequence[Worker]) -> list[Worker]:
        answers = {each.answer: each for each in workers if isinstance(each, RayWorker)}
        done, _ = self.ray.wait(list(answers), num_returns=1)
        return [answers[each] for each in done]

    def close(self) -> None:
        """End a Ray that was started or connected to here."""
        if self.own:
            self.ray.shutdown()


def _reached(address: str | None) -> None:
    """Raises OSError where nothing answers at host:port, which Ray itself would try for minutes."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=REACH).close()


class Asking:
    """What runs in the cluster: cells are asked where the sweep was started, since spellings may name files there."""

    def __init__(self, place: str):
        from experiments.sweeps.asking import Asker

        if os.path.isdir(place):
            os.chdir(place)
        self.asker = Asker()

    def ask(self, job: Job) -> list[Result]:
        """A result for each seed."""
        return self.asker.ask(job)
