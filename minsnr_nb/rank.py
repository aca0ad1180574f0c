"What the other processes of a run do: they take its steps beside the first one. Started by `runner.sharing`."

import json
from contextlib import suppress

import torch._dynamo  # noqa: F401  an optimiser imports it; the forks shall not wait for it one by one

from .api import config_of
from .checkpoint import take_up
from .lab import build
from .processes.team import Answer, Linked, Place, gate, receive_files
from .record.directory import open_run
from .runner import switches, threads
from .train_loop import Loop, NonFiniteLoss, train

__all__ = ["take_part", "take_steps"]

with suppress(ImportError):
    import sklearn.datasets  # noqa: F401  as do the digits


def take_steps(place: Place, order: dict, answer: Answer) -> None:
    "Take the steps of the run that `order` names, from the state that the first process sends"
    run = open_run(order["run"])
    cfg = config_of(run)
    lab = build(cfg, order["device"])
    with threads(run.threads()), switches(cfg.train):
        loop = Loop(cfg, lab.state(), lab.objective, lab.source, device=lab.device)
        answer(ready=True)
        loop.team = team = Linked(place)
        files = receive_files(team)
        take_up(loop, files, json.loads(files.pop("state.json")))
        with suppress(NonFiniteLoss):  # the first one has seen the same
            train(loop)


def take_part() -> None:
    "Be the other processes of a run"
    gate(take_steps)
