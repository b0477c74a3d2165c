"""Job files: what they say, and that their script starts a run again as long as it is of use."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from supra_cli.main import app

runner = CliRunner()
EXAMPLES = sorted((Path(__file__).resolve().parents[2] / "examples").glob("*.toml"))
HOSTILE = "a 'b\" $(touch owned) `touch owned` ;&| #{{c}} \\é.toml"

CONFIG = """\
 # The first line begins with a space.
model = "m"
data = "d: {x} # 'y'"
sequence_length = 32
batch_tokens = 1024

[[stages]]
kind = "uptrain"
share = 1
learning_rate = 1e-3
new_learning_rate = 1e-3
"""

# What the job file calls. It logs its arguments and does what the plan says next.
FAKE = f"""#!{sys.executable}
import json, os, pathlib, signal, subprocess, sys, time
name, arguments = os.path.basename(sys.argv[0]), sys.argv[1:]
with open("calls", "a") as log:
    log.write(json.dumps([name, *arguments]) + "\\n")
if name == "srun":
    command = arguments.index("torchrun")
    os.execvp("torchrun", arguments[command:])
if name == "scancel":
    os.kill(int(pathlib.Path("torchrun.pid").read_text()), signal.SIGTERM)
if name == "scontrol" and arguments[0] == "show":
    print("node7\\nnode8")
if name == "torchrun":
    run = pathlib.Path(arguments[arguments.index("--out") + 1])
    plan = pathlib.Path("plan").read_text().split()
    pathlib.Path("plan").write_text(" ".join(plan[1:]))
    def checkpoint():
        made = len(list(run.glob("checkpoints/*")))
        (run / "checkpoints" / f"step_{{made:08d}}").mkdir(parents=True)
    def told(*_):
        checkpoint()
        sys.exit(1)
    if plan[0] in ("train", "load"):
        if plan[0] == "train":
            signal.signal(signal.SIGTERM, told)
        pathlib.Path("torchrun.pid").write_text(str(os.getpid()))
        time.sleep(60)
    if plan[0] == "done":
        (run / "model").mkdir(parents=True)
        (run / "summary.json").write_text("{{}}")
        sys.exit(0)
    if plan[0] == "crash":
        checkpoint()
    sys.exit(1)
"""


def launched(*arguments: str | Path) -> str:
    done = runner.invoke(app, ["launch", *map(str, arguments)])
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(CONFIG)
    return path


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder to run a job in, with stand-ins for what it calls."""
    programs = tmp_path / "job" / "programs"
    programs.mkdir(parents=True)
    for name in ("srun", "torchrun", "scontrol", "scancel", "supra", "sleep", "pip"):
        (programs / name).write_text(FAKE)
        (programs / name).chmod(0o755)
    return programs.parent


def begin(script: str, place: Path, plan: str, **variables: str) -> subprocess.Popen[str]:
    (place / "plan").write_text(plan)
    (place / "script").write_text(script)
    path = f"{place / 'programs'}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "SLURM_JOB_ID": "12345", **variables}
    environment["SLURM_JOB_NODELIST"] = "node[7-8]"
    return subprocess.Popen(
        ["bash", "script"], cwd=place, env=environment, stderr=subprocess.PIPE, text=True
    )


def calls(place: Path, name: str) -> list[list[str]]:
    log = place / "calls"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return [arguments for called, *arguments in lines if called == name]


def requeued(place: Path) -> bool:
    return ["requeue", "12345"] in calls(place, "scontrol")


def tell(number: signal.Signals, process: subprocess.Popen[str], place: Path) -> None:
    """Send a signal once torchrun is under way."""
    deadline = time.monotonic() + 30
    while not (place / "torchrun.pid").is_file() or not (place / "torchrun.pid").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)


def pod_script(text: str) -> str:
    script: str = next(iter(yaml.safe_load_all(text)))["data"]["uptrain.sh"]
    return script


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_is_one(example: Path) -> None:
    many = example.stem.startswith("mistral")
    for nodes, gpus in ((1, 1), (1, 4), *([(1, 8), (16, 8)] if many else [])):
        text = launched("slurm", example, "--nodes", str(nodes), "--gpus", str(gpus), "--json")
        assert json.loads(text)["settings"]["model"]
    assert len(EXAMPLES) >= 3


def test_what_slurm_is_told(config: Path) -> None:
    text = launched(
        "slurm", config, "--nodes", "2", "--gpus", "4", "--cpus", "6", "--time", "2-00:00:00",
        "--partition", "gpu", "--account", "lab", "--grace", "120", "--name", "try",
    )  # fmt: skip
    lines = [line.removeprefix("#SBATCH --") for line in text.splitlines() if "#SBATCH" in line]
    assert lines == [
        "job-name=try", "nodes=2", "ntasks-per-node=1", "gpus-per-node=4", "cpus-per-task=24",
        "time=2-00:00:00", "partition=gpu", "account=lab", "signal=B:USR1@120", "requeue",
        "open-mode=append", "output=%x-%j.out",
    ]  # fmt: skip
    assert text.startswith("#!/bin/bash\n")


def test_what_torchrun_is_told_on_two_nodes(config: Path, place: Path) -> None:
    text = launched("slurm", config, "--nodes", "2", "--gpus", "4", "--set", "seed=3")
    assert begin(text, place, "done").wait() == 0
    (srun,), (torchrun,) = calls(place, "srun"), calls(place, "torchrun")
    assert srun[:3] == ["--ntasks-per-node=1", "--cpus-per-task=32", "--wait=300"]
    assert torchrun == [
        "--nproc-per-node=4", "--shutdown-timeout=270", "--nnodes=2", "--rdzv-id=12345",
        "--rdzv-backend=c10d", "--rdzv-endpoint=node7:22345", "-m", "supra_cli", "uptrain",
        str(config), "--out", "runs/tiny", "--set", "seed=3",
    ]  # fmt: skip


@pytest.mark.parametrize("nodes", [1, 2])
def test_the_scripts_are_bash(config: Path, tmp_path: Path, nodes: int) -> None:
    shared = (config, "--nodes", nodes, "--set", "seed=1")
    pod = pod_script(launched("kubernetes", *shared, "--image", "a/b:c"))
    task = yaml.safe_load(launched("skypilot", *shared))
    for script in (
        launched("slurm", *shared),
        f"#!/bin/bash\n{pod}",
        f"#!/bin/bash\n{task['run']}",
    ):
        file = tmp_path / "script.sh"
        file.write_text(script)
        subprocess.run(["bash", "-n", str(file)], check=True)
        if shutil.which("shellcheck"):
            checked = subprocess.run(["shellcheck", str(file)], capture_output=True, text=True)
            assert checked.returncode == 0, checked.stdout


def test_what_kubernetes_is_told(config: Path) -> None:
    text = launched(
        "kubernetes", config, "--nodes", "2", "--gpus", "4", "--image", "registry/supra:1",
        "--volume", "lab-runs", "--grace", "200",
    )  # fmt: skip
    files, service, job = yaml.safe_load_all(text)
    assert files["data"]["config.toml"] == CONFIG
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": job["metadata"]["name"]}
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 2, 2)
    actions = [
        (rule["action"], rule.get("onExitCodes", {}).get("values"))
        for rule in spec["podFailurePolicy"]["rules"]
    ]
    assert actions == [("FailJob", [2]), ("Ignore", [75]), ("Ignore", None)]
    assert (pod["restartPolicy"], pod["subdomain"]) == ("Never", service["metadata"]["name"])
    assert pod["terminationGracePeriodSeconds"] == 200
    (container,) = pod["containers"]
    assert container["image"] == "registry/supra:1"
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 4}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
    assert mounts["/job"]["configMap"]["name"] == files["metadata"]["name"]
    assert mounts["/supra"]["persistentVolumeClaim"]["claimName"] == "lab-runs"
    assert mounts["/dev/shm"]["emptyDir"] == {"medium": "Memory"}
    assert container["workingDir"] == "/supra"


def test_what_skypilot_is_told(config: Path) -> None:
    shared = (config, "--nodes", "2", "--gpus", "4", "--accelerator", "A100-80GB")
    task = yaml.safe_load(launched("skypilot", *shared, "--install", "supra-lm @ file:///w h.whl"))
    assert task["num_nodes"] == 2
    assert task["resources"] == {"accelerators": "A100-80GB:4", "use_spot": True}
    assert task["volumes"] == {"/supra": "supra"}
    assert task["file_mounts"] == {"~/config.toml": str(config)}
    assert task["setup"] == "pip install 'supra-lm @ file:///w h.whl'\n"
    task = yaml.safe_load(launched("skypilot", *shared, "--no-spot"))
    assert task["resources"]["use_spot"] is False


@pytest.mark.parametrize("node", [0, 1])
def test_what_torchrun_is_told_in_a_pod_and_by_skypilot(
    config: Path, place: Path, node: int
) -> None:
    shared = (config, "--nodes", "2", "--gpus", "4")
    pod = pod_script(launched("kubernetes", *shared, "--image", "a"))
    assert begin(pod, place, "done", JOB_COMPLETION_INDEX=str(node)).wait() == 0
    shutil.rmtree(place / "runs")
    task: str = yaml.safe_load(launched("skypilot", *shared))["run"].replace("/supra", ".")
    variables = {"SKYPILOT_NODE_RANK": str(node), "SKYPILOT_NODE_IPS": "10.0.0.7\n10.0.0.8"}
    assert begin(task, place, "done", **variables).wait() == 0
    in_pod, by_sky = calls(place, "torchrun")
    for told, first, own in (
        (in_pod, "tiny-0.tiny:29500", f"tiny-{node}.tiny"),
        (by_sky, "10.0.0.7:29500", f"10.0.0.{7 + node}"),
    ):
        assert f"--rdzv-endpoint={first}" in told
        assert f"--local-addr={own}" in told
        assert f"--rdzv-conf=is_host={int(node == 0)},join_timeout=86400" in told
        assert {"--nnodes=2", "--nproc-per-node=4", "--rdzv-id=tiny"} < set(told)


@pytest.mark.parametrize(
    ("plan", "starts", "code"),
    [
        ("done", 1, 0),
        ("fail fail done", 2, 2),
        ("crash crash crash done", 4, 0),
        ("crash fail crash fail fail done", 5, 2),
    ],
)
def test_it_starts_again_as_long_as_that_is_of_use(
    config: Path, place: Path, plan: str, starts: int, code: int
) -> None:
    process = begin(launched("slurm", config), place, plan)
    _, errors = process.communicate()
    assert process.returncode == code
    assert len(calls(place, "torchrun")) == starts
    assert ("two starts in a row" in errors) == (code == 2)
    assert not requeued(place)


def test_slurm_queues_a_job_again_whose_time_is_over(config: Path, place: Path) -> None:
    process = begin(launched("slurm", config), place, "train done")
    tell(signal.SIGUSR1, process, place)
    assert process.wait() == 75
    assert requeued(place)
    assert calls(place, "scancel") == [["--signal=TERM", "12345"]]
    assert len(list((place / "runs/tiny/checkpoints").iterdir())) == 1
    assert len(calls(place, "torchrun")) == 1
    # As Slurm starts it again, and once more when it is done.
    assert begin(launched("slurm", config), place, "done").wait() == 0
    assert begin(launched("slurm", config), place, "").wait() == 0
    assert calls(place, "supra") == [["uptrain", str(config), "--out", "runs/tiny"]]
    assert len(calls(place, "torchrun")) == 2


def test_slurm_queues_no_job_again_that_its_time_is_of_no_use_to(config: Path, place: Path) -> None:
    """Bad input must not come back for ever where two starts take longer than an allocation."""
    process = begin(launched("slurm", config), place, "fail load done")
    tell(signal.SIGUSR1, process, place)
    assert process.wait() == 75
    assert len(calls(place, "torchrun")) == 2
    assert not requeued(place)


def test_slurm_queues_a_job_again_that_was_still_loading(config: Path, place: Path) -> None:
    process = begin(launched("slurm", config), place, "load done")
    tell(signal.SIGUSR1, process, place)
    assert process.wait() == 75
    assert requeued(place)


def test_a_cancelled_job_does_not_come_back(config: Path, place: Path) -> None:
    process = begin(launched("slurm", config), place, "train")
    tell(signal.SIGTERM, process, place)
    # Slurm tells the steps too.
    os.kill(int((place / "torchrun.pid").read_text()), signal.SIGTERM)
    assert process.wait() == 75
    assert not requeued(place)


def test_a_pod_that_is_told_to_end_says_start_again(config: Path, place: Path) -> None:
    script = pod_script(launched("kubernetes", config, "--image", "a"))
    process = begin(script, place, "train", JOB_COMPLETION_INDEX="0")
    tell(signal.SIGTERM, process, place)
    assert process.wait() == 75
    assert len(list((place / "runs/tiny/checkpoints").iterdir())) == 1


def test_the_first_pod_decides_when_to_give_up(config: Path, place: Path) -> None:
    script = pod_script(launched("kubernetes", config, "--nodes", "2", "--image", "a"))
    assert begin(script, place, "fail fail fail done", JOB_COMPLETION_INDEX="1").wait() == 0
    assert len(calls(place, "torchrun")) == 4
    shutil.rmtree(place / "runs")
    assert begin(script, place, "fail fail done", JOB_COMPLETION_INDEX="0").wait() == 2


def test_hostile_names_stay_what_they_are(tmp_path: Path, place: Path) -> None:
    config = tmp_path / HOSTILE
    config.write_text(CONFIG)
    run, setting = f"-run {HOSTILE}", f"teacher={HOSTILE}"
    more = ("--run", run, "--set", setting)
    assert begin(launched("slurm", config, *more), place, "crash done").wait() == 0
    assert calls(place, "torchrun")[0][-6:] == [
        "uptrain", str(config), "--out", f"./{run}", "--set", setting
    ]  # fmt: skip
    pod = pod_script(launched("kubernetes", config, *more, "--image", "a"))
    shutil.rmtree(place / run)
    assert begin(pod, place, "done", JOB_COMPLETION_INDEX="0").wait() == 0
    assert calls(place, "torchrun")[-1][-4:] == ["--out", f"./{run}", "--set", setting]
    task = yaml.safe_load(launched("skypilot", config, *more, "--install", "x; touch owned"))
    assert task["file_mounts"] == {"~/config.toml": str(config)}
    script = task["setup"] + task["run"].replace("/supra", ".")
    shutil.rmtree(place / run)
    assert begin(script, place, "done", SKYPILOT_NODE_RANK="0").wait() == 0
    assert calls(place, "pip") == [["install", "x; touch owned"]]
    assert calls(place, "torchrun")[-1][-4:] == ["--out", f"./{run}", "--set", setting]
    assert not list(tmp_path.rglob("owned"))


@pytest.mark.parametrize(
    "ending", ["", "\n", "\n\n", "\n \n", "# \u2028 \x85 é \U0001f600\n", "\r\n"]
)
def test_a_config_arrives_as_it_is(config: Path, ending: str) -> None:
    config.write_bytes((CONFIG.rstrip("\n") + ending).encode())
    files = next(iter(yaml.safe_load_all(launched("kubernetes", config, "--image", "a"))))
    assert files["data"]["config.toml"] == config.read_text("utf-8")


def test_names_become_names_of_jobs(tmp_path: Path) -> None:
    for stem, expected in (
        ("My Run_7B", "my-run-7b"), ("7b", "supra-7b"), ("é", "supra"), ("x" * 80, "x" * 50),
    ):  # fmt: skip
        config = tmp_path / f"{stem}.toml"
        config.write_text(CONFIG)
        assert json.loads(launched("slurm", config, "--json"))["name"] == expected


def test_json_has_text_and_settings(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "jobs" / "a.sbatch"
    done = json.loads(launched("slurm", config, "--set", "seed=7", "--out", out, "--json"))
    assert done["text"] == out.read_text() == launched("slurm", config, "--set", "seed=7")
    assert (done["scheduler"], done["out"], done["run"]) == ("slurm", str(out), "runs/tiny")
    assert (done["nodes"], done["gpus"], done["set"]) == (1, 8, {"seed": "7"})
    assert done["settings"]["seed"] == 7


def test_an_existing_file_is_kept(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.sbatch"
    out.write_text("mine")
    refused = runner.invoke(app, ["launch", "slurm", str(config), "--out", str(out)])
    assert (refused.exit_code, out.read_text()) == (2, "mine")
    launched("slurm", config, "--out", out, "--force")
    assert out.read_text().startswith("#!")


REFUSED: dict[str, tuple[list[str], str]] = {
    "uneven batch": (["slurm", "--gpus", "5"], "which 5 processes cannot share evenly"),
    "uneven groups": (["slurm", "--set", "devices_together=3"], "devices_together 3"),
    "no nodes": (["slurm", "--nodes", "0"], "--nodes 0"),
    "unknown setting": (["slurm", "--set", "tokns=1"], "field tokns"),
    "no setting": (["slurm", "--set", "tokens"], "write key=value"),
    "line break": (["slurm", "--run", "a\nb"], "line break"),
    "name": (["slurm", "--name", "My job"], "--name My job"),
    "time": (["slurm", "--time", "2 days"], "--time '2 days'"),
    "time in two lines": (["slurm", "--time", "1\n2"], "--time"),
    "partition": (["slurm", "--partition", "a b"], "--partition 'a b'"),
    "account": (["slurm", "--account", ""], "--account ''"),
    "grace": (["slurm", "--grace", "10"], "--grace 10"),
    "image": (["kubernetes", "--image", "a b"], "--image 'a b'"),
    "volume": (["kubernetes", "--image", "a", "--volume", "A/b"], "--volume 'A/b'"),
    "accelerator": (["skypilot", "--accelerator", "H100:8"], "--accelerator 'H100:8'"),
    "install": (["skypilot", "--install", ""], "--install ''"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused(config: Path, case: str) -> None:
    (scheduler, *options), message = REFUSED[case]
    done = runner.invoke(app, ["launch", scheduler, str(config), *options])
    assert (done.exit_code, done.stdout) == (2, "")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("scheduler", ["kubernetes", "skypilot"])
def test_a_recipe_in_a_file_does_not_travel(config: Path, scheduler: str, tmp_path: Path) -> None:
    recipe = tmp_path / "own.toml"
    recipe.write_text("[linearize]\npreset = 'pure'\n")
    more: list[Any] = ["--image", "a"] if scheduler == "kubernetes" else []
    arguments = ["launch", scheduler, str(config), "--set", f"recipe={recipe}", *more]
    done = runner.invoke(app, arguments)
    assert done.exit_code == 2
    assert "is a file, which the job's nodes do not have" in done.stderr


def test_a_missing_config_is_refused(tmp_path: Path) -> None:
    for name in ("absent.toml", "model"):
        done = runner.invoke(app, ["launch", "slurm", str(tmp_path / name)])
        assert done.exit_code == 2
        assert name in done.stderr
