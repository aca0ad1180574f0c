"The figures behind the promises of a run directory: `python -m tests.harness [PART …] [--short]`."

from tests import hostile, property_loaders

from . import (
    after,
    costs,
    damage,
    ends,
    faults,
    history,
    identity,
    notebook,
    power,
    queue,
    races,
    strangers,
    syscalls,
)

# name: (part, its full size, its size in pytest)
PARTS = {
    "kills": (faults.kills, {"n": 1000}, {"n": 15}),
    "inventory": (faults.inventory, {}, {"most": 16}),
    "twice": (faults.twice, {"n": 600}, {"n": 10}),
    "until_done": (faults.until_done, {"n": 200}, {"n": 3}),
    "afterwards": (after.afterwards, {}, {"most": 12}),
    "power": (power.power, {"n": 20_000}, {"n": 2000}),
    "errors": (faults.errors, {}, {"most": 30}),
    "corruption": (damage.corruption, {"n": 500}, {"n": 3}),
    "creations": (races.creations, {"processes": 64, "each": 20}, {"processes": 8, "each": 5}),
    "leases": (races.leases, {"n": 1000}, {"n": 5}),
    "history": (history.history, {"n": 10_000}, {"n": 25}),
    "writers": (races.writers, {"n": 100}, {"n": 2}),
    "loaders": (property_loaders.part, {"n": 10_000}, {"n": 100}),
    "hostile": (hostile.part, {}, {}),
    "identity": (identity.identity, {"n": 250}, {"n": 10}),
    "syscalls": (syscalls.syscalls, {"most": 700, "papermill": 16}, {"most": 14, "papermill": 0}),
    "ends": (ends.ends, {"n": 300, "kernels": 5}, {"n": 5, "kernels": 1}),
    "strangers": (strangers.strangers, {}, {"most": 24}),
    "notebook": (notebook.notebook, {"n": 300, "real": 10}, {"n": 20, "real": 1}),
    "costs": (costs.costs, {"n": 5000}, {"n": 500}),
    "queue": (queue.queue_kills, {"n": 1000}, {"n": 12}),
    "queue_races": (queue.queue_races, {"n": 1000}, {"n": 20}),
    "index": (costs.index, {"n": 10_000}, {"n": 300}),
}
