"A run that came from somebody else, hole by hole: each of these was open once. The part `strangers` of the harness tries them under every verb."

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from minsnr_nb.errors import ConfigError, MinsnrError, printable
from minsnr_nb.guard import entries_of, pickle_problem
from minsnr_nb.record import directory
from minsnr_nb.record.checks import check_run
from minsnr_nb.record.directory import open_run
from minsnr_nb.record.export import export_run
from minsnr_nb.settings import project_root
from tests.runs import ROOT, SMALL, environment, typed

SVG = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'


# --- the gate -------------------------------------------------------------------------------------


VERBS = ["resume", "eval", "sample", "export", "check", "repro", "ask|stop", "promote|m"]
VERBS += ["compare", "fork|train.steps=20", "continue|--steps|20"]


@pytest.mark.parametrize("verb", VERBS)
def test_strangers_every_verb_refuses_a_link(verb, copy, tmp_path, capsys):
    "`resume` appended to what a log was linked to, `export` published what a picture was"
    thesis = tmp_path / "thesis.txt"
    thesis.write_text("mine")
    (copy / "logs/stdout.log").unlink()
    (copy / "logs/stdout.log").symlink_to(thesis)
    first, *rest = verb.split("|")
    done = typed(capsys, first, copy, *rest)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert f"{copy}/logs/stdout.log: a link" in done.stderr and thesis.read_text() == "mine"


def test_strangers_a_list_names_what_it_does_not_read(copy, capsys):
    (copy / "metrics.json").rename(copy.parent / "away")
    (copy / "metrics.json").symlink_to(copy.parent / "away")
    (row,) = json.loads(typed(capsys, "runs", "--run-root", copy.parents[1], "--json").stdout)
    assert row["state"] == "unreadable" and "metrics.json: a link" in row["reason"]


def test_strangers_a_hard_link_that_leads_out_is_found(copy, tmp_path, capsys):
    os.link(copy / "logs/metrics.jsonl", tmp_path / "profile")
    done = typed(capsys, "eval", copy)
    assert done.returncode == 2 and "logs/metrics.jsonl: a hard link" in done.stderr


def test_strangers_a_file_that_is_being_claimed_has_two_names_for_a_moment(copy, monkeypatch):
    "Its other name is on the desk of its writer, which the first listing has passed already"
    (copy / ".desk-eval-0badcafe").mkdir()
    os.link(copy / "metrics.json", copy / ".desk-eval-0badcafe/.tmp-0badcafe0bad")
    listings, whole = [], directory.entries_of

    def listing(path):
        listings.append(path)
        return (e for e in whole(path) if len(listings) > 1 or ".desk-" not in e[0])

    monkeypatch.setattr(directory, "entries_of", listing)
    assert not list(directory.strange_entries(copy))
    os.link(copy / "metrics.json", copy.parent / "outside")
    assert len(list(directory.strange_entries(copy))) == 1


@pytest.mark.parametrize("name", [".git/config", "meta/.x", "settings.ini", "artifacts/.env"])
def test_strangers_nothing_hides_in_a_run(name, copy, capsys):
    (copy / name).parent.mkdir(exist_ok=True)
    (copy / name).write_text("[core]\n")
    assert typed(capsys, "resume", copy).returncode == 2
    assert "AB.names" in {c.id for c in check_run(copy) if not c.ok}


def test_strangers_a_directory_that_cannot_be_listed_is_no_empty_one(copy, monkeypatch):
    "`os.walk` skips it without a word, and a run was sealed over half a list"
    real = os.scandir

    def broken(path):
        if str(path).endswith("grids"):
            raise OSError(5, "Input/output error")
        return real(path)

    monkeypatch.setattr(os, "scandir", broken)
    with pytest.raises(MinsnrError, match="grids: cannot be listed: Input/output error"):
        list(entries_of(copy))
    with pytest.raises(MinsnrError, match="cannot be listed"):
        check_run(copy)


# --- a run is no project --------------------------------------------------------------------------


def test_strangers_a_run_is_never_a_project_root(copy, tmp_path):
    (copy / "settings.ini").write_text("[minsnr]\nruns = /etc\n")
    (copy / "pyproject.toml").write_text('name = "minsnr_nb"\n')
    assert project_root(copy / "meta") == copy.parent
    (tmp_path / "settings.ini").write_text("[minsnr]\n")
    assert project_root(copy / "meta") == tmp_path


def test_strangers_the_environment_of_a_stranger_is_not_taken(tmp_path):
    "Nor may one's own `.env` set what makes other programs do something"
    (tmp_path / "settings.ini").write_text("[minsnr]\n")
    (tmp_path / ".env").write_text("LD_PRELOAD=/x.so\nGIT_CONFIG_COUNT=1\nMINSNR_VAR_A=1\n")
    code = "import os; from minsnr_nb.cli import main; main(['list', 'weightings']); "
    code += (
        "print([k for k in ('LD_PRELOAD', 'GIT_CONFIG_COUNT', 'MINSNR_VAR_A') if k in os.environ])"
    )
    env = environment(PYTHONPATH=str(ROOT))
    env.pop("GIT_CONFIG_COUNT", None)  # of whoever runs the tests
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "['MINSNR_VAR_A']", done.stdout + done.stderr
    (line,) = [x for x in done.stderr.splitlines() if ".env" in x]
    assert "GIT_CONFIG_COUNT, LD_PRELOAD: left out" in line


# --- what leaves ----------------------------------------------------------------------------------


SCRIPT = "document.title='owned'"
PICTURES = {
    "x.SVG": f"{SVG} onload=\"{SCRIPT}\"/>".encode(),
    "wide.svg": f"{SVG}><script>{SCRIPT}</script></svg>".encode("utf-16"),
    "prefixed.svg": f'<s:svg xmlns:s="http://www.w3.org/2000/svg"><s:script>{SCRIPT}</s:script></s:svg>'.encode(),
    "entity.svg": f'{SVG}><a><set attributeName="href" to="jav&#97;script:{SCRIPT}"/><rect width="900" height="900"/></a></svg>'.encode(),
    "page.png": f"<html><script>{SCRIPT}</script></html>".encode(),
    "page.html": f"<script>{SCRIPT}</script>".encode(),
}  # fmt: skip
NOTEBOOK = [
    f"[x](jav&#97;script:{SCRIPT}) <svg:script>{SCRIPT}</svg:script>",
    f"<script>{SCRIPT}</script> <img src=x onerror={SCRIPT}>",
    f"[y](javascript&colon;{SCRIPT}) ![z](x:y 'a\" onerror=\"{SCRIPT}')",
]


def planted(copy: Path) -> Path:
    for name, data in PICTURES.items():
        (copy / "artifacts/plots" / name).write_bytes(data)
    cells = [{"cell_type": "markdown", "source": text} for text in NOTEBOOK]
    (copy / "notebook").mkdir()
    (copy / "notebook/study.ipynb").write_text(json.dumps({"cells": cells}))
    return copy


def test_strangers_an_export_takes_pictures_by_their_content(copy, tmp_path):
    told: list[str] = []
    folder = export_run(planted(copy), tmp_path / "out", told.append)
    left = {line.partition(": left out: ")[0].rpartition("/")[2] for line in told}
    assert left == {*PICTURES} and not list((folder / "artifacts").glob("plots/*"))
    page = (folder / "report.html").read_text()
    assert page.index("Content-Security-Policy") < page.index("<title>") and "'none'" in page
    assert not re.search(r"(?i)<script|<svg|<img|href=", page.partition("</style>")[2])


def test_strangers_a_token_in_utf_16_stops_an_export(copy, tmp_path):
    data = ("x hf" + "_" + "a1" * 17).encode("utf-16")
    (copy / "artifacts/plots/a.svg").write_bytes(data)
    with pytest.raises(MinsnrError, match="a.svg: holds something that looks like a secret"):
        export_run(copy, tmp_path / "out", print)
    assert "AB.secrets" in {c.id for c in check_run(copy) if not c.ok}


def test_strangers_nothing_of_an_export_runs_in_a_browser(copy, tmp_path, monkeypatch):
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("no chromium here (Debian: apt-get install chromium chromium-driver)")
    folder = export_run(planted(copy), tmp_path / "out", lambda text: None)
    monkeypatch.setenv("SE_OFFLINE", "true")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    words = ("headless=new", "no-sandbox", "no-proxy-server", "disable-dev-shm-usage")
    for word in (*words, f"user-data-dir={tmp_path / 'chromium'}"):
        options.add_argument(f"--{word}")
    browser = webdriver.Chrome(options, webdriver.ChromeService(driver))
    try:
        control = tmp_path / "control.html"  # the scripts do run where nobody takes them out
        control.write_bytes(PICTURES["page.html"])
        browser.get(control.as_uri())
        assert browser.title == "owned"
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            browser.get(path.as_uri())
            for link in browser.find_elements("css selector", "a, svg *"):
                link.click()
            assert browser.title != "owned", path
    finally:
        browser.quit()


# --- words and numbers ----------------------------------------------------------------------------


def test_strangers_control_characters_are_printed_and_not_obeyed(copy, capsys):
    status = copy / "meta/status.json"
    facts = json.loads(status.read_text()) | {"state": "\x1b]0;owned\x07\u202e"}
    status.write_text(json.dumps(facts))
    for words in (["runs", "--run-root", copy.parents[1]], ["check", copy], ["ask", copy, "stop"]):
        done = typed(capsys, *words)
        said = done.stdout + done.stderr
        assert "\x1b" not in said and "\u202e" not in said, said
    assert printable("é\x1b[2J\u202e\n") == "é\\x1b[2J\\u202e\\n"


@pytest.mark.parametrize("n", [1_000_000, -1, 0, "8", None])
def test_strangers_a_number_of_threads_is_a_number_of_threads(n, copy, capsys):
    "A million crashed, a text was a traceback"
    stamp = copy / "meta/provenance.json"
    facts = json.loads(stamp.read_text())
    facts["determinism"]["num_threads"] = n
    stamp.write_text(json.dumps(facts))
    for verb in ("resume", "eval", "sample"):
        done = typed(capsys, verb, copy)
        assert done.returncode == 2 and f"num_threads: {n!r} is not a whole" in done.stderr
    assert ("A.provenance", False) in {(c.id, c.ok) for c in check_run(copy)}


@pytest.mark.parametrize("path", ["/etc", "../../../../etc", "~/x"])
def test_strangers_a_place_in_a_config_is_followed_only_when_named(path, copy, tmp_path, capsys):
    from minsnr_nb.durable import sha256

    for name in ("config.resolved.yaml", "config_resolved.yaml"):
        (copy / name).chmod(0o644)
        text = re.sub(r"data:\n(  .*\n)+", f"data: {{name: image_folder, path: '{path}'}}\n", (copy / name).read_text())  # fmt: skip
        (copy / name).write_text(text)
    stamp = copy / "meta/provenance.json"
    facts = json.loads(stamp.read_text())
    facts["config"]["resolved_sha256"] = sha256(copy / "config.resolved.yaml")
    stamp.write_text(json.dumps(facts))
    for verb in ("resume", "eval", "sample"):
        done = typed(capsys, verb, copy)
        assert done.returncode == 2 and "leads out of the data directory" in done.stderr
        assert "MINSNR_DATA=" in done.stderr


class Harm:
    def __reduce__(self):
        return os.system, ("true",)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_strangers_a_pickle_behind_a_long_text_is_found(protocol, tmp_path):
    "Only the first 64 KiB were read"
    harm = pickle.dumps(Harm(), protocol)
    for name, before in {"a.txt": b"step,loss\n" * 7000, "b.json": b"S'" + b"a" * 70_000 + b"'\n0"}.items():  # fmt: skip
        (tmp_path / name).write_bytes(before + harm)
        assert pickle_problem(tmp_path / name) == "a pickle"
    (tmp_path / "c.log").write_bytes(zlib.compress(os.urandom(9))[2:] + b"a text\n" * 9000)
    assert pickle_problem(tmp_path / "c.log") is None


def test_strangers_an_exit_of_somebody_elses_code_is_one_line(copy, capsys, monkeypatch, tmp_path):
    "A callback that calls `sys.exit(0)` ended the command with success and without a word"
    from minsnr_nb import callbacks

    monkeypatch.setattr(callbacks.LogEvents, "after_step", lambda *_: sys.exit(0))
    (tmp_path / "c.yaml").write_text(SMALL)
    done = typed(capsys, "train", tmp_path / "c.yaml", "--run-root", tmp_path / "new")
    assert done.returncode == 1 and "SystemExit" in done.stderr.splitlines()[-1]
    (run,) = (tmp_path / "new").glob("tests/*")
    status = json.loads((run / "meta/status.json").read_text())
    assert status["state"] == "failed" and "SystemExit" in status["reason"]


def test_strangers_trust_is_not_given_to_what_the_gate_refuses(copy, capsys):
    (copy / "artifacts/x").symlink_to("/etc")
    done = typed(capsys, "eval", copy, "--trust-code", "0" * 64)
    assert done.returncode == 2 and "artifacts/x: a link" in done.stderr
    with pytest.raises(ConfigError, match="a link"):
        open_run(copy)
