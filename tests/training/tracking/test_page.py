"""A real run of all stages through the launcher, as a person sees it: on MLflow's page in a real browser."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from dali_pipelines.shards import find_shards
from megatron_elva.config.build import load
from megatron_elva.training.tracking.store import PARENT
from tests.training.tracking.mlflow_server import Server
from tests.training.tracking.test_tracker import ROOT, check_curves, clean, state

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--window-size=1500,1300",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--disable-dev-shm-usage")  # fmt: skip
pytestmark = pytest.mark.slow


def python(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=clean(), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder of runs with one of three stages of a few steps each."""
    folder = tmp_path_factory.mktemp("page")
    corpus = folder / "corpus"
    counts = ("--images=40", "--videos=40", "--heldout=2", "--workers=1")
    python("-m", "dali_pipelines.demo_corpus", f"--out={corpus}", *counts)
    shards = [str(corpus / part / "train-*.tar") for part in ("images", "videos")]
    assert find_shards(shards, "test")
    python("-m", "dali_pipelines.tokenizer", "--shards", *shards, "--vocab=300", f"--out={corpus / 'tokenizer'}")
    python(
        str(ROOT / "launchers" / "submit.py"), "stage=all", "cluster=debug", f"data.root={corpus}", "merging=paper",
        "tasks_per_node=1", "parallel.tensor=1", "parallel.pipeline=1", f"run_dir={folder}/runs/small",
        "train.steps=6", "train.warmup_steps=1", "train.global_batch=8", "train.accumulate=1", "train.log_every=2",
        "train.checkpoint_every=6", "tracking.system_every_s=0.5", "tracking.flush_s=240",
        "stage_3.tracking.answers_every=6", "stage_3.tracking.answers=3", "cluster.snapshot=false",
    )  # fmt: skip
    return folder / "runs"


def test_the_store_has_everything_of_the_run(runs):
    client = MlflowClient(f"sqlite:///{runs}/mlflow.db")
    parent = client.get_run(state(runs / "small")["run_id"])
    assert parent.info.status == "FINISHED" and parent.info.run_name == "small"
    for number in (1, 2, 3):
        run = runs / "small" / f"stage_{number}"
        check_curves(client, run)
        found = client.get_run(state(run)["run_id"])
        assert found.info.status == "FINISHED" and found.data.tags[PARENT] == parent.info.run_id
        assert found.data.params["train.steps"] == "6" and found.data.params["stage.id"] == str(number)
        assert found.data.tags["hosts"] and found.data.tags["gpus"] and found.data.tags["version.torch"]
        assert (Path(ROOT, ".git").exists() and "git.commit" in found.data.tags) or not Path(ROOT, ".git").exists()
        assert client.get_metric_history(found.info.run_id, "system/node_0/system_memory_usage_percentage")
        names = {file.path for file in client.list_artifacts(found.info.run_id)}
        assert {"config.yaml", "loss.png"} <= names
    answers = {file.path for file in client.list_artifacts(found.info.run_id, "answers")}
    assert answers == {"answers/step_6.jsonl", "answers/step_6.png"}


def test_sample_answers_are_those_of_training_samples(runs):
    run = runs / "small" / "stage_3"
    lines = [json.loads(line) for line in (run / "answers" / "step_6.jsonl").read_text().splitlines()]
    assert len(lines) == 3 and {line["source"] for line in lines} == set(load(run / "config.yaml").stage.blend)
    assert all(line["question"] and line["expected"] and line["key"] for line in lines)
    picture = (run / "answers" / "step_6.png").read_bytes()
    before = (run / "answers" / "step_6.jsonl").read_text()
    python("-m", "megatron_elva.training.tracking.answers", str(run))
    assert (run / "answers" / "step_6.jsonl").read_text() == before
    assert (run / "answers" / "step_6.png").read_bytes() == picture


@pytest.fixture(scope="module")
def page(runs):
    """MLflow's server over the local store, as `make ui` starts it."""
    server = Server(runs.parent / "ui", backend=f"sqlite:///{runs}/mlflow.db")
    server.start()
    yield server.uri
    server.kill()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("needs chromium and chromedriver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def seen(browser, *texts: str, seconds: float = 60.0) -> str:
    """The text of the page, once it shows all of these."""
    until = time.monotonic() + seconds
    while True:
        shown = browser.find_element("tag name", "body").text
        if all(text in shown for text in texts):
            return shown
        assert time.monotonic() < until, f"not on the page: {[t for t in texts if t not in shown]}\n{shown}"
        time.sleep(0.3)


def found(browser, script: str, seconds: float = 60.0):
    """What a script finds on the page, once it finds something."""
    until = time.monotonic() + seconds
    while not (result := browser.execute_script(f"return {script}")):
        assert time.monotonic() < until, script
        time.sleep(0.3)
    return result


def picture(browser, name: str) -> None:
    """Keep what the browser shows, where ELVA_SCREENSHOTS names a folder."""
    if folder := os.environ.get("ELVA_SCREENSHOTS"):
        browser.save_screenshot(str(Path(folder, f"{name}.png")))


def test_the_page_shows_runs_parameters_curves_and_artifacts(runs, page, browser):
    stage = state(runs / "small" / "stage_3")
    client = MlflowClient(f"sqlite:///{runs}/mlflow.db")
    experiment = client.get_run(stage["run_id"]).info.experiment_id
    address = f"{page}/#/experiments/{experiment}/runs"

    browser.get(address)
    seen(browser, "small")
    found(browser, "document.querySelector('.ag-row [class*=expander], .ag-row button') !== null")
    browser.execute_script("document.querySelector('.ag-row [class*=expander], .ag-row button').click()")
    seen(browser, "stage_1", "stage_2", "stage_3", "4 matching runs")
    picture(browser, "runs")

    browser.get(f"{address}/{stage['run_id']}")
    seen(browser, "stage_3", "Finished", "train.steps", "grad_norm", "Parameters (")
    picture(browser, "run")

    browser.get(f"{address}/{stage['run_id']}/model-metrics")
    seen(browser, "loss", "by_samples")
    drawn = "Array.from(document.querySelectorAll('.js-plotly-plot .scatterlayer path.js-line'))"
    lines = found(browser, f"{drawn}.map(path => path.getAttribute('d')).filter(d => d && d.length > 40)")
    assert len(lines) >= 4 and all(line.count("L") + line.count("C") >= 1 for line in lines)
    picture(browser, "curves")

    browser.get(f"{address}/{stage['run_id']}/artifacts/loss.png")
    seen(browser, "answers", "config.yaml", "loss.png")
    width, height = found(
        browser,
        "Array.from(document.querySelectorAll('img')).map(i => [i.naturalWidth, i.naturalHeight])"
        ".find(size => size[0] > 600)",
    )
    assert height > width
    picture(browser, "loss")

    browser.find_element("xpath", "//*[text()='config.yaml']").click()
    seen(browser, "global_batch: 8", "checkpoint_every: 6")
