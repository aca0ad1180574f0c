"Many processes that want the same thing at once."

import json
import os
import time
from datetime import datetime, timezone
from unittest.mock import patch

from minsnr_nb import api
from minsnr_nb.errors import ConfigError
from minsnr_nb.record.directory import list_runs
from minsnr_nb.record.evaluations import list_evaluations
from minsnr_nb.record.state import start_attempt

from .lab import Lab, fork, forked, invalid, scratch, status_of


class Gate:
    "Children wait here until the parent lets all of them go at once"

    def __init__(self):
        self.read, self.write = os.pipe()

    def wait(self):
        os.close(self.write)
        os.read(self.read, 1)

    def open(self):
        os.close(self.write)
        os.close(self.read)


def creations(lab: Lab, processes: int, each: int) -> tuple[bool, str]:
    "Runs made in the same second have names of their own, and every one is whole"
    with scratch() as root:
        gate, moment = Gate(), datetime(2026, 11, 20, 9, 30, tzinfo=timezone.utc)

        def action():
            gate.wait()
            for _ in range(each):
                lab.create(root, moment)

        pids = [fork(action) for _ in range(processes)]
        start = time.perf_counter()
        gate.open()
        failed = sum(status_of(pid) != 0 for pid in pids)
        took = time.perf_counter() - start
        runs = list_runs(root)
        bad = [p for r in runs for p in invalid(r, "L2")]
        names = {(r.id, r.provenance()["run_id"]) for r in runs}
    good = not failed and not bad and len(names) == len(runs) == processes * each
    return (
        good,
        f"{processes} processes x {each}: {len(names)} runs with names of their own in {took:.1f} s, {failed} failed, {len(bad)} invalid {bad[:1] or ''}",
    )


def leases(lab: Lab, n: int, rivals: int = 8) -> tuple[bool, str]:
    "Of many processes that resume a run, one wins; the others are told who"
    wrong = []
    with scratch() as root:
        for i in range(n):
            run, gate, over = lab.create(root / str(i)), Gate(), Gate()
            forked(lambda run=run: start_attempt(run))  # an owner that is gone

            def action(run=run, gate=gate, over=over):
                gate.wait()
                try:
                    start_attempt(run)
                    over.wait()  # the winner lives on until the others have asked
                except ConfigError as e:
                    text = str(e)
                    os._exit(7 if "written by process" in text or "just claimed" in text else 8)

            pids = [fork(action) for _ in range(rivals)]
            gate.open()
            ended, until = {}, time.monotonic() + 60
            while len(ended) < rivals - 1 and time.monotonic() < until:
                for pid in [p for p in pids if p not in ended]:
                    done, status = os.waitpid(pid, os.WNOHANG)
                    ended |= {pid: os.waitstatus_to_exitcode(status)} if done else {}
                time.sleep(0.001)
            over.open()
            codes = sorted(ended[p] if p in ended else status_of(p) for p in pids)
            if codes != [0] + [7] * (rivals - 1):
                attempts = [
                    json.loads(p.read_text())["attempt"] for p in sorted(run.attempts.iterdir())
                ]
                wrong.append((codes, attempts))
    return (
        not wrong,
        f"{n} races of {rivals}, {n - len(wrong)} with exactly one winner {wrong[:1] or ''}",
    )


def writers(lab: Lab, n: int, rivals: int = 4, each: int = 4) -> tuple[bool, str]:
    "A finished run that is evaluated and sampled by several at once stays sealed and sound"
    wrong = []
    with scratch() as root:
        _, values = api.eval_run(lab.whole(root / "evaluated").path)
        for i in range(n):
            run, gate = lab.whole(root / str(i)), Gate()

            def action(k, run=run, gate=gate):
                gate.wait()
                for seed in range(each):
                    if k % 2:
                        api.eval_run(run.path, overrides=(f"eval.samples={20 + k * each + seed}",))
                    else:
                        api.sample_run(run.path, n=1, seed=k * each + seed)

            with patch.object(api, "report", lambda *_: values):  # worked out once
                pids = [fork(lambda k=k: action(k)) for k in range(rivals)]
            gate.open()
            codes = [status_of(pid) for pid in pids]
            wrong += [*(["a writer failed"] if any(codes) else []), *invalid(run, "L3")][:1]
            made = [r["kind"] for r in list_evaluations(run.evaluations)]
            made = [made.count(kind) for kind in ("eval", "sample")]
            wrong += [] if made == [rivals // 2 * each] * 2 else [f"{made} evaluations"]
    return (
        not wrong,
        f"{n} runs, {rivals} writers of {each} each, {len(wrong)} wrong {wrong[:1] or ''}",
    )
