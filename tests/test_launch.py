"""templates/launch: each file is in order, and what it starts is a train-expert that there is.

Scripts run for real, with stand-ins for torchrun and Slurm's commands that write down what they are told.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from flexctl import InitAnchorConfig, TrainExpertConfig, shipped
from flexctl.cli.parsing import Call, make_app
from flexctl.commands import COMMANDS
from flexctl.config import resolve

pytestmark = [
    pytest.mark.usefixtures("in_empty_folder"),
    pytest.mark.skipif(shutil.which("bash") is None, reason="runs shell scripts"),
]

FILES = ("pytorchjob.yaml", "single-node.sh", "skypilot.yaml", "slurm.sbatch")
SLURM = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "n[1-2]"}
SKYPILOT = {
    "SKYPILOT_NUM_NODES": "2",
    "SKYPILOT_NUM_GPUS_PER_NODE": "4",
    "SKYPILOT_NODE_RANK": "1",
    "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
}


def launch(name: str) -> str:
    return shipped.template(f"launch/{name}")


def started(script: str, environment: dict[str, str], commands: dict[str, str]) -> tuple[int, list[list[str]]]:
    """Run a script whose commands do what is given; return its exit code and the arguments of each of them in turn."""
    folder = Path("bin").absolute()
    folder.mkdir(exist_ok=True)
    said = folder / "said"
    said.unlink(missing_ok=True)
    for name, body in commands.items():
        note = f'printf "%s\\0" {name} "$@" >> {said}; printf "\\n" >> {said}'
        (folder / name).write_text(f"#!/usr/bin/env bash\n{note}\n{body}\n")
        (folder / name).chmod(0o755)
    where = {**os.environ, **environment, "PATH": f"{folder}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], env=where, capture_output=True, text=True, check=False)
    lines = said.read_text().split("\n")[:-1] if said.exists() else []
    return done.returncode, [line.split("\0")[:-1] for line in lines]


def config_of(torchrun: list[str]) -> tuple[Any, TrainExpertConfig]:
    """Return torchrun's own settings and the Config of the command that it is told to start."""
    from torch.distributed.run import get_args_parser

    settings = get_args_parser().parse_args(torchrun)
    assert (settings.module, settings.training_script) == (True, "flexctl")
    arguments = settings.training_script_args
    call = make_app(COMMANDS, arguments)(args=arguments, prog_name="flexctl", standalone_mode=False)
    assert isinstance(call, Call)
    config = resolve(TrainExpertConfig, call.command, call.given)
    assert isinstance(config, TrainExpertConfig)
    assert config.resume, "what stops it starts it again"
    assert config.output is not None
    assert config.name is not None
    return settings, config


def test_these_are_all() -> None:
    folder = Path(shipped.__file__).parent.parent / "templates" / "launch"
    assert tuple(sorted(file.name for file in folder.iterdir())) == FILES


@pytest.mark.parametrize("name", FILES)
def test_each_says_what_to_fill_in_and_holds_no_tab(name: str) -> None:
    text = launch(name)
    assert "fill in" in text
    assert text.isascii()
    assert "\t" not in text
    assert max(map(len, text.splitlines())) <= 120 + 10


@pytest.mark.parametrize("name", FILES)
def test_each_says_how_an_anchor_is_trained(name: str) -> None:
    [line] = [line for line in launch(name).splitlines() if "-m flexctl init-anchor" in line]
    comment, said = line.strip().split(" ", 1)
    arguments = said.split()[2:]
    call = make_app(COMMANDS, arguments)(args=arguments, prog_name="flexctl", standalone_mode=False)
    config = resolve(InitAnchorConfig, call.command, call.given)
    assert (comment, config.anneal_tokens, config.resume) == ("#", 100_000_000, True)


def shell_parts(name: str) -> list[str]:
    if name.endswith(".yaml"):
        found = yaml.safe_load(launch(name))
        return [found["setup"], found["run"]]
    return [launch(name)]


@pytest.mark.parametrize("name", ["single-node.sh", "skypilot.yaml", "slurm.sbatch"])
def test_shell_is_in_order(name: str) -> None:
    for script in shell_parts(name):
        done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")


def test_one_node() -> None:
    code, [[program, *arguments]] = started(launch("single-node.sh"), {}, {"torchrun": ""})
    settings, config = config_of(arguments)
    assert (code, program, settings.standalone) == (0, "torchrun", True)
    assert int(settings.nproc_per_node) == config.micro_batch == 4


def directives(text: str) -> dict[str, str]:
    """Return what Slurm reads of a script: it stops at the first line that is neither empty nor a comment."""
    head = text.splitlines()
    end = next(number for number, line in enumerate(head) if line and not line.startswith("#"))
    assert not [line for line in head[end:] if line.startswith("#SBATCH")], "Slurm would not see it"
    found = [line.removeprefix("#SBATCH ") for line in head[:end] if line.startswith("#SBATCH")]
    assert all(re.fullmatch(r"--[a-z][a-z-]*(=\S+)?", line) for line in found)
    return {name: value for name, _, value in (line.partition("=") for line in found)}


def test_slurm_s_directives() -> None:
    found = directives(launch("slurm.sbatch"))
    known = {"job-name", "nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "time", "signal", "requeue"}
    assert {name.removeprefix("--") for name in found} <= known | {"open-mode", "output"}
    assert (found["--signal"], found["--requeue"], found["--ntasks-per-node"]) == ("TERM@120", "", "1")
    assert re.fullmatch(r"\d\d:\d\d:\d\d", found["--time"])
    assert f"GPUS={found['--gpus-per-node']} " in launch("slurm.sbatch")


def slurm(outcome: int, left: str) -> tuple[int, list[list[str]]]:
    """Run the script where the run ends with an exit code and so much time is left."""
    commands = {
        "srun": '"$@"',
        "torchrun": f"exit {outcome}",
        "scontrol": '[ "$1" = show ] && printf "n1\\nn2\\n"; true',
        "squeue": f"echo {left}",
    }
    return started(launch("slurm.sbatch"), SLURM, commands)


def test_slurm() -> None:
    code, said = slurm(0, "2:00:00")
    assert code == 0
    assert [call[0] for call in said] == ["scontrol", "srun", "torchrun"]
    settings, config = config_of(said[2][1:])
    assert (settings.nnodes, settings.nproc_per_node, settings.rdzv_endpoint) == ("2", "4", "n1:29500")
    assert config.micro_batch == 8


@pytest.mark.parametrize(
    ("left", "again"), [("1:58", True), ("0:07", True), ("3:00:00", False), ("1:58:00", False), ("1-01:58:00", False)]
)
def test_slurm_queues_what_ran_out_of_time_again_and_nothing_else(left: str, again: bool) -> None:
    code, said = slurm(1, left)
    assert (["scontrol", "requeue", "7"] in said) is again
    assert (code == 0) is again


def test_kubernetes() -> None:
    found = yaml.safe_load(launch("pytorchjob.yaml"))
    assert (found["apiVersion"], found["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert set(found) == {"apiVersion", "kind", "metadata", "spec"}
    assert set(found["spec"]) == {"nprocPerNode", "runPolicy", "pytorchReplicaSpecs"}
    assert set(found["spec"]["runPolicy"]) <= {"backoffLimit", "cleanPodPolicy", "ttlSecondsAfterFinished", "suspend"}
    replicas = found["spec"]["pytorchReplicaSpecs"]
    assert set(replicas) <= {"Master", "Worker"}
    master = replicas["Master"]
    assert set(master) == {"replicas", "restartPolicy", "template"}
    assert (master["replicas"], master["restartPolicy"]) == (1, "OnFailure")
    pod = master["template"]["spec"]
    assert set(pod) == {"terminationGracePeriodSeconds", "containers", "volumes"}
    [container] = pod["containers"]
    assert set(container) == {"name", "image", "command", "args", "resources", "volumeMounts"}
    assert container["name"] == "pytorch", "the operator looks for it"
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert container["command"] == ["torchrun"]
    settings, config = config_of(container["args"])
    cards = container["resources"]["limits"]["nvidia.com/gpu"]
    assert str(cards) == found["spec"]["nprocPerNode"], "a string, by the operator's schema"
    assert config.micro_batch == cards
    assert settings.nnodes == "1:1", "torchrun's own default: the operator's PET_NNODES comes instead"


def test_skypilot() -> None:
    found = yaml.safe_load(launch("skypilot.yaml"))
    assert set(found) == {"name", "resources", "num_nodes", "file_mounts", "setup", "run"}
    assert set(found["resources"]) <= {"accelerators", "use_spot", "cloud", "region", "disk_size", "image_id"}
    assert found["file_mounts"]["/work"]["mode"] == "MOUNT_CACHED"
    code, [[_, *arguments]] = started(found["run"], SKYPILOT, {"torchrun": ""})
    settings, config = config_of(arguments)
    assert (code, settings.nnodes, settings.node_rank, settings.master_addr) == (0, "2", 1, "10.0.0.1")
    assert config.micro_batch == 8
