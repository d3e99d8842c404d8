"""The scripts against a gcloud that records its arguments and plays two workers in folders.

The PATH holds links to named tools and nothing else, so that no test can reach a real gcloud.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "tpu_scripts"
ALL = ["create.sh", "setup.sh", "train.sh", "delete.sh"]
WHERE = ["--name=pod", "--zone=us-west4-a"]
TPUS = ["compute", "tpus"]
ZONE = "--zone=us-west4-a"
LIST = [*TPUS, "queued-resources", "list", "--filter=name.basename()=pod"]
LIST += ["--format=value(state.state)", ZONE]
PATIENCE = 300  # seconds, on a machine that is busy with other things
WORKER = "bash clip_jax/tpu_scripts/worker.sh"
TOOLS = ["bash", "dirname", "env", "git", "gzip", "mkdir", "mv", "pkill", "rm", "rmdir", "sed"]
TOOLS += ["tail", "tar", "timeout"]
HOSTILE = [
    "--config.data.train=gs://b/{00000..00099}.tfrecord",
    "two words  and two spaces",
    """quotes ' " ` and $HOME $(touch pwned) & ; | > x < y""",
    "back\\slash \\n \\' & * ? [a-z] ~ #no !!",
    "line\nbreak\ttab",
    "",
    "-n",
    "--",
    "--name=other",
    "é漢",
]

# Plays `states` one after the other (the last one for ever) and fails where `fail` says so.
GCLOUD = """
import contextlib, json, os, pathlib, shutil, signal, subprocess, sys
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it would pass on that it is ignored
fake, argv = pathlib.Path(os.environ["FAKE"]), sys.argv[1:]
with open(fake / "record", "a") as record:
    record.write(json.dumps(argv) + "\\n")
play = json.loads((fake / "play").read_text())
flags = dict(each.split("=", 1) for each in argv if each.startswith("--") and "=" in each)
if play["fail"] and play["fail"] in argv:
    sys.exit("ERROR: (gcloud) no permission")
if argv[3] == "list":
    print(*play["states"][:1])
    play["states"][:-1] = play["states"][1:-1]
    (fake / "play").write_text(json.dumps(play))
workers = [fake / "0", fake / "1"] if flags.get("--worker") == "all" else [fake / "0"]
if argv[3] == "scp":
    for worker in workers:
        shutil.copy(argv[4], worker / argv[5].removeprefix("pod:"))
if argv[3] == "ssh":
    command = " ".join(flags["--command"].split(" "))  # as gcloud does
    shell = ["bash", "-c", command]
    runs = [subprocess.Popen(shell, cwd=each, start_new_session=True) for each in workers]
    try:
        sys.exit(max([each.wait() for each in runs]))
    finally:  # the connection ends: whatever it started and left behind is hung up
        for each in runs:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(each.pid, signal.SIGHUP)
"""

# Records what it was called with. As train.py it ends with the number in `status`, or, where
# there is none, lives until SIGTERM and takes a while to save. As uv it makes the environment.
PYTHON = """
import json, pathlib, shutil, signal, sys, time
with open("python.record", "a") as record:
    record.write(json.dumps(sys.argv[1:]) + "\\n")
if "venv" in sys.argv:
    pathlib.Path(".venv/bin").mkdir(parents=True)
    for name in ("python", "pip"):
        shutil.copy(sys.argv[0], ".venv/bin/" + name)
if "train.py" in sys.argv:
    signals = []
    signal.signal(signal.SIGTERM, lambda *_: signals.append(1))
    print("training", flush=True)
    status = pathlib.Path("../status")
    deadline = time.time() + 300
    while not signals and not status.exists() and time.time() < deadline:
        time.sleep(0.02)
    time.sleep(0.5 if signals else 0)
    print("signals:", len(signals))
    sys.exit(int(status.read_text()) if status.exists() else 143)
"""

SUDO = """
import json, sys
with open("sudo.record", "a") as record:
    record.write(json.dumps(sys.argv[1:]) + "\\n")
"""

SLEEP = """
import os, pathlib, sys
with open(pathlib.Path(os.environ["FAKE"]) / "slept", "a") as slept:
    print(sys.argv[1], file=slept)
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="worker.sh is for Linux")


class Cloud:
    """A checkout with the scripts, the fake gcloud, and two workers' home folders."""

    def __init__(self, root: Path) -> None:
        self.root, self.checkout, self.bin = root, root / "check out", root / "bin"
        self.workers = [root / "0", root / "1"]
        for folder in (self.checkout, self.bin, *self.workers):
            folder.mkdir()
        for tool in TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool))
        self.program("gcloud", GCLOUD)
        self.program("python3", PYTHON)
        self.program("sudo", SUDO)
        self.program("sleep", SLEEP)
        self.env = {
            "PATH": str(self.bin),
            "LC_ALL": "C.UTF-8",
            **dict.fromkeys(("HOME", "FAKE"), str(root)),
            **dict.fromkeys(("GIT_CONFIG_GLOBAL", "GIT_CONFIG_SYSTEM"), os.devnull),
        }
        self.play()
        shutil.copytree(SCRIPTS, self.checkout / "tpu_scripts")
        (self.checkout / "train.py").touch()
        self.git("init", "-q")
        self.commit()

    def program(self, name: str, code: str) -> None:
        (self.bin / name).write_text(f"#!{sys.executable} -SE\n{code}")
        (self.bin / name).chmod(0o755)

    def play(self, *states: str, fail: str = "") -> None:
        (self.root / "play").write_text(json.dumps({"states": states, "fail": fail}))

    def git(self, *arguments: str) -> None:
        subprocess.run(["git", *arguments], cwd=self.checkout, env=self.env, check=True)

    def commit(self) -> None:
        self.git("add", "-A")
        self.git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "one")

    def popen(self, script: str, *arguments: str, **options) -> subprocess.Popen:
        command = [str(self.checkout / "tpu_scripts" / script), *arguments]
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        return subprocess.Popen(command, env=self.env, cwd=self.root, text=True, **pipes, **options)

    def run(self, script: str, *arguments: str, answer: str = "") -> tuple[int, str, str]:
        return self.end(self.popen(script, *arguments), answer)

    def end(self, process: subprocess.Popen, answer: str = "") -> tuple[int, str, str]:
        out, err = process.communicate(answer, PATIENCE)
        return process.returncode, out, err

    def lines(self, path: str) -> list:
        file = self.root / path
        return [json.loads(each) for each in file.read_text().splitlines()] if file.exists() else []

    def calls(self) -> list[list[str]]:
        """The gcloud calls since the last time this was asked."""
        calls = self.lines("record")
        (self.root / "record").unlink(missing_ok=True)
        return calls

    def set_up(self) -> None:
        assert self.run("setup.sh", *WHERE)[0] == 0
        self.calls()

    def will_end_with(self, status: int) -> None:
        for worker in self.workers:
            (worker / "status").write_text(str(status))


@pytest.fixture
def cloud(tmp_path):
    return Cloud(tmp_path)


def create_call(accelerator: str, runtime: str, *more: str) -> list[str]:
    call = [*TPUS, "queued-resources", "create", "pod", "--node-id=pod"]
    return [*call, f"--accelerator-type={accelerator}", f"--runtime-version={runtime}", *more, ZONE]


def ssh_call(worker: str, command: str) -> list[str]:
    return [*TPUS, "tpu-vm", "ssh", "pod", f"--worker={worker}", f"--command={command}", ZONE]


@pytest.mark.parametrize(
    ("accelerator", "runtime"),
    [
        ("v6e-64", "v2-alpha-tpuv6e"),
        ("v5p-128", "v2-alpha-tpuv5"),
        ("v5litepod-256", "v2-alpha-tpuv5-lite"),
        ("v4-32", "tpu-ubuntu2204-base"),
        ("v3-8", "tpu-ubuntu2204-base"),
    ],
)
def test_create_asks_once_and_waits_until_active(cloud, accelerator, runtime):
    cloud.play("", "CREATING", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")
    status, _, err = cloud.run("create.sh", *WHERE, f"--accelerator_type={accelerator}")
    assert (status, cloud.lines("slept")) == (0, [30] * 3)
    assert cloud.calls() == [LIST, create_call(accelerator, runtime), *[LIST] * 4]
    assert "pod is PROVISIONING" in err
    assert "pod is ACTIVE" in err


def test_create_passes_spot_runtime_version_and_project_on(cloud):
    cloud.play("", "ACTIVE")
    options = ["--accelerator_type", "v9-1", "--spot", "--runtime_version", "new", "--project", "p"]
    assert cloud.run("create.sh", *WHERE, *options)[0] == 0
    project = "--project=p"
    create = [*create_call("v9-1", "new", "--spot"), project]
    assert cloud.calls() == [[*LIST, project], create, [*LIST, project]]


def test_create_is_idempotent(cloud):
    cloud.play("ACTIVE")
    status, _, err = cloud.run("create.sh", *WHERE, "--accelerator_type=v4-8")
    assert (status, err, cloud.calls()) == (0, "pod is ACTIVE\n", [LIST])
    cloud.play("PROVISIONING", "ACTIVE")
    assert cloud.run("create.sh", *WHERE, "--accelerator_type=v4-8")[0] == 0
    assert cloud.calls() == [LIST, LIST]


@pytest.mark.parametrize("state", ["FAILED", "SUSPENDING", "SUSPENDED", "DELETING", ""])
def test_create_gives_up_on_a_state_that_leads_nowhere(cloud, state):
    cloud.play("", "CREATING", state)
    status, _, err = cloud.run("create.sh", *WHERE, "--accelerator_type=v4-8")
    assert status == 1
    assert f"pod is {state or 'gone'}\n" in err
    assert "delete.sh" in err
    assert len(cloud.calls()) == 4


def test_create_waits_no_longer_than_the_timeout(cloud):
    cloud.play("WAITING_FOR_RESOURCES")
    status, _, err = cloud.run("create.sh", *WHERE, "--accelerator_type=v4-8", "--timeout=2")
    assert (status, cloud.lines("slept")) == (1, [30] * 4)
    assert "not ACTIVE after 2 minutes and stays in the queue" in err


def test_setup_installs_the_commit_on_all_workers(cloud):
    package = cloud.checkout / "clip_jax"
    package.mkdir()
    (package / "old.py").touch()
    cloud.commit()
    for _ in range(2):
        status, _, err = cloud.run("setup.sh", *WHERE)
        assert (status, "warning" in err) == (0, False), err
    archive = ".git/clip_jax.tar.gz"
    scp = [*TPUS, "tpu-vm", "scp", archive, "pod:clip_jax.tar.gz", "--worker=all", ZONE]
    unpack = "mkdir -p clip_jax && tar -xzf clip_jax.tar.gz -C clip_jax tpu_scripts"
    assert cloud.calls() == [scp, ssh_call("all", f"{unpack} && {WORKER} setup")] * 2

    (package / "old.py").rename(package / "new.py")
    cloud.commit()
    (package / "uncommitted.py").touch()
    status, _, err = cloud.run("setup.sh", *WHERE)
    assert (status, "warning: uncommitted changes are not sent" in err) == (0, True)
    install = ["install", "--quiet", "-e", ".[tpu]"]
    for worker in cloud.workers:
        assert [each.name for each in (worker / "clip_jax" / "clip_jax").iterdir()] == ["new.py"]
        assert cloud.lines(f"{worker.name}/clip_jax/python.record") == [
            ["-m", "pip", "install", "--quiet", "--user", "uv"],
            ["-m", "uv", "venv", "--quiet", "--seed", "--python", "3.12", ".venv"],
            *[install] * 3,
        ]


def test_train_hands_its_arguments_over_unchanged(cloud):
    cloud.set_up()
    cloud.will_end_with(0)
    status, out, err = cloud.run("train.sh", *WHERE, "--", *HOSTILE)
    assert (status, out) == (0, "training\nsignals: 0\n"), err
    for worker in cloud.workers:
        recorded = cloud.lines(f"{worker.name}/clip_jax/python.record")
        assert recorded[-1] == ["-u", "train.py", *HOSTILE]
    assert not list(cloud.root.rglob("pwned"))


def test_train_calls_gcloud_twice_and_returns_the_status_of_train_py(cloud):
    cloud.set_up()
    cloud.will_end_with(3)
    plain = ["--config=configs/vitb16.py", "--workdir=gs://b/run"]
    for _ in range(2):
        status, _, err = cloud.run("train.sh", *WHERE, "--", *plain)
        assert status == 3
        assert "train.py ended with status 3" in err
        start = ssh_call("all", f"{WORKER} start --config=configs/vitb16.py --workdir=gs://b/run")
        assert cloud.calls() == [start, ssh_call("0", f"{WORKER} watch")]
    for worker in cloud.workers:
        logs = [worker / "clip_jax" / name for name in ("train.log", "train.log.1")]
        assert [each.read_text() for each in logs] == ["training\nsignals: 0\n"] * 2


def test_a_run_outlives_its_connection_until_it_is_stopped(cloud):
    cloud.set_up()
    for _ in range(2):  # what one run leaves behind must not disturb the next
        process = cloud.popen("train.sh", *WHERE, "--", "--config=c.py", start_new_session=True)
        assert process.stdout.readline() == "training\n"
        os.killpg(process.pid, signal.SIGINT)  # Ctrl-C
        status, _, err = cloud.end(process)
        assert (status, "detached; the run goes on" in err) == (130, True)

        logs = [each / "clip_jax" / "train.log" for each in cloud.workers]
        assert cloud.run("train.sh", *WHERE, "--", "--config=c.py")[0] == 1
        assert cloud.run("setup.sh", *WHERE)[0] == 1
        assert [each.read_text() for each in logs] == ["training\n"] * 2

        cloud.calls()
        watching = cloud.popen("train.sh", *WHERE, "--watch")
        assert watching.stdout.readline() == "training\n"
        stops = [cloud.popen("train.sh", *WHERE, "--stop") for _ in range(2)]
        assert [cloud.end(each)[0] for each in stops] == [0, 0]
        assert all(each.with_name("train.status").exists() for each in logs)
        assert cloud.end(watching)[0] == 143
        assert [each.read_text() for each in logs] == ["training\nsignals: 1\n"] * 2
        stop = ssh_call("all", f"{WORKER} stop")
        assert cloud.calls() == [ssh_call("0", f"{WORKER} watch"), stop, stop]
    status, out, _ = cloud.run("train.sh", *WHERE, "--stop")
    assert (status, out.count("nothing runs")) == (0, 2)


@pytest.mark.parametrize("allowed", [True, False])
def test_train_asks_for_huge_pages_and_goes_on_without(cloud, allowed):
    cloud.set_up()
    cloud.will_end_with(0)
    if not allowed:
        cloud.program("sudo", "raise SystemExit(1)")
    status, _, err = cloud.run("train.sh", *WHERE, "--", "--config=c.py")
    assert (status, err.count("no huge pages")) == (0, 0 if allowed else 2), err
    ask = ["-n", "sh", "-c", "echo always >/sys/kernel/mm/transparent_hugepage/enabled"]
    for worker in cloud.workers:
        recorded = cloud.lines(f"{worker.name}/clip_jax/sudo.record")
        assert recorded == ([ask] if allowed else [])


def test_train_needs_setup_on_every_worker(cloud):
    cloud.set_up()
    shutil.rmtree(cloud.workers[1] / "clip_jax" / ".venv")
    cloud.will_end_with(0)
    status, _, err = cloud.run("train.sh", *WHERE, "--", "--config=c.py")
    assert (status, len(cloud.calls())) == (1, 1)
    assert "run setup.sh first" in err
    assert "not all workers started" in err


def test_watch_before_any_run(cloud):
    cloud.set_up()
    status, _, err = cloud.run("train.sh", *WHERE, "--watch")
    assert (status, "no run was started here" in err) == (1, True)


@pytest.mark.parametrize(
    ("options", "answer", "deleted"),
    [(["--yes"], "", True), ([], "y\n", True), ([], "n\n", False), ([], "", False)],
)
def test_delete_asks_unless_told_not_to(cloud, options, answer, deleted):
    cloud.play("SUSPENDED")
    status, _, err = cloud.run("delete.sh", *WHERE, *options, answer=answer)
    delete = [*TPUS, "queued-resources", "delete", "pod", "--force", "--quiet", ZONE]
    assert (status, cloud.calls()) == ((0, [LIST, delete]) if deleted else (1, [LIST]))
    assert ("delete pod (SUSPENDED)" in err) == (not options)


def test_delete_of_what_does_not_exist(cloud):
    status, _, err = cloud.run("delete.sh", *WHERE)
    assert (status, err, cloud.calls()) == (0, "pod does not exist in us-west4-a\n", [LIST])


DRY = {
    "create.sh": (["--accelerator_type=v4-8", "--spot", "--project=a b"], ("", "ACTIVE")),
    "setup.sh": ([], ()),
    "train.sh": (["--", *HOSTILE], ()),
    "delete.sh": (["--yes"], ("ACTIVE",)),
}


@pytest.mark.parametrize("script", ALL)
def test_dry_run_prints_what_the_real_run_does(cloud, script):
    options, states = DRY[script]
    if script == "train.sh":
        cloud.set_up()
        cloud.will_end_with(0)
    before = set(cloud.root.rglob("*"))
    status, commands, _ = cloud.run(script, *WHERE, "--dry_run", *options)
    assert (status, set(cloud.root.rglob("*"))) == (0, before)

    cloud.play(*states)
    assert cloud.run(script, *WHERE, *options)[0] == 0
    real = cloud.calls()
    cloud.play(*states)
    pasted = {"input": commands, "text": True, "env": cloud.env, "cwd": cloud.root}
    subprocess.run(["bash", "-e"], **pasted, check=True)
    assert real
    assert cloud.calls() == real


def test_dry_run_of_watch_and_stop(cloud):
    for option, worker in (("watch", "0"), ("stop", "all")):
        status, out, _ = cloud.run("train.sh", *WHERE, "--dry_run", f"--{option}")
        ssh = f"gcloud compute tpus tpu-vm ssh pod --worker={worker}"
        assert (status, out) == (0, f"{ssh} '--command={WORKER} {option}' {ZONE}\n")
    assert cloud.calls() == []


@pytest.mark.parametrize(
    ("script", "options", "fail", "calls"),
    [
        ("create.sh", ["--accelerator_type=v4-8"], "list", 1),
        ("create.sh", ["--accelerator_type=v4-8"], "create", 2),
        ("setup.sh", [], "scp", 1),
        ("setup.sh", [], "ssh", 2),
        ("train.sh", ["--", "--config=c.py"], "ssh", 1),
        ("train.sh", ["--watch"], "ssh", 1),
        ("train.sh", ["--stop"], "ssh", 1),
        ("delete.sh", ["--yes"], "list", 1),
        ("delete.sh", ["--yes"], "delete", 2),
    ],
)
def test_a_gcloud_that_fails_ends_the_script(cloud, script, options, fail, calls):
    cloud.play("ACTIVE" if fail == "delete" else "", fail=fail)
    status, _, err = cloud.run(script, *WHERE, *options)
    assert status != 0
    assert "no permission" in err
    assert len(cloud.calls()) == calls


WRONG = [
    (["--zone=z"], "--name=NAME is missing"),
    (["--name=n"], "--zone=ZONE is missing"),
    ([*WHERE, "--nmae=n"], "unknown option '--nmae'"),
    ([*WHERE, "pod"], "unexpected argument 'pod'"),
    ([*WHERE, "--project"], "--project needs a value"),
    ([*WHERE, "--project="], "--project needs a value"),
    ([*WHERE, "--project", "--dry_run"], "--project needs a value"),
    ([*WHERE, "--dry_run=no"], "unknown option '--dry_run'"),
]
WRONG_FOR_ONE = [
    ("create.sh", WHERE, "--accelerator_type=TYPE is missing"),
    ("create.sh", [*WHERE, "--accelerator_type=h100"], "no runtime version is known for 'h100'"),
    ("create.sh", [*WHERE, "--accelerator_type=v4-8", "--timeout=1h"], "whole minutes, not '1h'"),
    ("setup.sh", [*WHERE, "--", "x"], "nothing may follow '--'"),
    ("train.sh", WHERE, "train.py's arguments are missing"),
    ("train.sh", [*WHERE, "--stop", "--", "x"], "--watch and --stop take no arguments"),
    ("delete.sh", [*WHERE, "--spot"], "unknown option '--spot'"),
]
USAGE = [(script, *wrong) for script in ALL for wrong in WRONG] + WRONG_FOR_ONE


@pytest.mark.parametrize(("script", "arguments", "message"), USAGE)
def test_a_wrong_call_says_what_to_do(cloud, script, arguments, message):
    status, out, err = cloud.run(script, *arguments)
    assert (status, out, cloud.calls()) == (2, "", [])
    assert message in err
    assert f"{script} --help" in err


@pytest.mark.parametrize("script", ALL)
def test_without_gcloud(cloud, script):
    (cloud.bin / "gcloud").unlink()
    status, _, err = cloud.run(script, *WHERE, *DRY[script][0])
    assert status == 2
    assert "gcloud is not on the PATH: install" in err
    assert cloud.run(script, *WHERE, "--dry_run", *DRY[script][0])[0] == 0


@pytest.mark.parametrize("script", ALL)
def test_help_names_every_option(cloud, script):
    status, out, err = cloud.run(script, "--help")
    assert (status, err, cloud.calls()) == (0, "", [])
    own = re.search('^parse_options "(.*?)" "(.*?)"', (SCRIPTS / script).read_text(), re.M)
    for option in ("name", "zone", "project", "dry_run", *" ".join(own.groups()).split()):
        assert f"\n  --{option}".replace("----", "--") in out
    assert "shellcheck" not in out


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="needs shellcheck")
def test_shellcheck_finds_nothing():
    scripts = sorted(str(each.relative_to(SCRIPTS.parent)) for each in SCRIPTS.glob("*.sh"))
    subprocess.run(["shellcheck", *scripts], cwd=SCRIPTS.parent, check=True)
