"""`cluster/slurm.sbatch` on a real SLURM of two nodes: options, signals, a lost node, an array.

All jobs run once; the tests look at what they have left behind.
"""

import json
from pathlib import Path

import pytest
import torch
import yaml

SCRIPT = Path(__file__).parents[2] / "cluster" / "slurm.sbatch"
MACHINE = ("--gpus-per-node=0", "--ntasks-per-node=1", "--cpus-per-task=1")

pytestmark = pytest.mark.timeout(1200)


class Jobs:
    """Submits the launcher, each job with a folder of its own under `folder`."""

    def __init__(self, slurm, folder, recipe, options):
        self.slurm, self.folder, self.recipe, self.options = slurm, folder, recipe, options

    def submit(self, name, step, nodes, *arguments, array=()):
        (self.folder / name).mkdir()
        options = [*MACHINE, f"--nodes={nodes}", f"--output={self.folder / name / 'log%a.txt'}", *array]
        hold = ["--trainer.callbacks+", "probes.HoldAt", "--trainer.callbacks.step", step]
        hold += ["--trainer.callbacks.folder", self.folder / name]
        places = ["--trainer.default_root_dir", self.folder / name / "run"]
        places += ["--data.init_args.root", self.folder / "data"]
        line = ["--config", self.recipe, *self.options, *places, *hold, *arguments]
        return self.slurm.submit(options, SCRIPT, *line)

    def wait_to_hold(self, name, ranks):
        files = [self.folder / name / f"waiting_{rank}" for rank in range(ranks)]
        self.slurm.wait_for(lambda: all(file.exists() for file in files), 600, f"{name} to hold")

    def go(self, name):
        (self.folder / name / "go").touch()


def signals(jobs):
    """SIGUSR1 to two nodes with 0 and with 2 workers, SIGTERM to one node, and an array beside."""
    usr1 = {}
    for workers in (0, 2):
        options = ["--data.init_args.num_workers", workers, "--trainer.num_sanity_val_steps", 0]
        usr1[workers] = jobs.submit(f"usr1_{workers}", 3 + workers, 2, *options)
    array = jobs.submit("array", 100, 1, "--trainer.max_epochs", 1, array=["--array=3,8"])
    for workers, number in usr1.items():
        jobs.wait_to_hold(f"usr1_{workers}", 2)
        jobs.slurm.ask("scancel", "--signal=USR1", number)
        jobs.go(f"usr1_{workers}")
    term = jobs.submit("term", 2, 1)
    jobs.wait_to_hold("term", 1)
    jobs.slurm.ask("scancel", term)
    jobs.go("term")
    ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
    numbers = {f"usr1_{workers}": number for workers, number in usr1.items()} | {"term": term}
    numbers |= {f"array_{task}": f"{array}_{task}" for task in (3, 8)}
    return {name: jobs.slurm.wait_until(number, *ended) for name, number in numbers.items()}


def lost_node(jobs):
    """The node of a running job disappears."""
    number = jobs.submit("lost", 4, 1, "--checkpoint.every_n_train_steps", 1)
    jobs.wait_to_hold("lost", 1)
    node = jobs.slurm.lose_node_of(number)
    return {"lost": jobs.slurm.wait_until(number, "COMPLETED", "FAILED", "NODE_FAIL"), "node": {"name": node}}


@pytest.fixture(scope="session")
def outcome(shared, recipe, environment, slurm_module, options):
    """The folder of all jobs, and SLURM's last word on each."""
    problem = slurm_module.obstacle()
    if problem is not None:
        pytest.skip(problem)

    def make(folder):
        slurm = slurm_module.Slurm(folder / "slurm", environment)
        try:
            jobs = Jobs(slurm, folder, recipe, options)
            states = signals(jobs) | lost_node(jobs)
        finally:
            slurm.stop()
        (folder / "states.json").write_text(json.dumps(states))

    folder = shared("slurm_jobs", make)
    return folder, json.loads((folder / "states.json").read_text())


def last(folder):
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.mark.parametrize("workers", [0, 2])
def test_sigusr1_saves_requeues_and_ends_like_an_undisturbed_run(outcome, undisturbed, workers):
    folder, states = outcome
    job, log = states[f"usr1_{workers}"], (folder / f"usr1_{workers}" / "log4294967294.txt").read_text()
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), log[-3000:]
    assert f"last.ckpt' at step {4 + workers}, leaving" in log
    assert "DataLoader worker" not in log
    found, wanted = last(folder / f"usr1_{workers}" / "run"), last(undisturbed)
    assert found["global_step"] == wanted["global_step"] == 10
    for key, value in wanted["state_dict"].items():
        assert torch.equal(value, found["state_dict"][key]), key


def test_the_users_options_win(outcome):
    folder, _ = outcome
    config = yaml.safe_load((folder / "usr1_0" / "run" / "config_fit.yaml").read_text())["trainer"]
    assert (config["accelerator"], config["precision"]) == ("cpu", "32-true")
    assert (config["num_nodes"], config["devices"], config["strategy"]) == (2, 1, "ddp"), "the launcher's"


def test_sigterm_saves_and_does_not_requeue(outcome):
    folder, states = outcome
    log = (folder / "term" / "log4294967294.txt").read_text()
    assert "SIGTERM: saved" in log, log[-3000:]
    assert states["term"]["Restarts"] == "0"
    assert states["term"]["JobState"] == "CANCELLED"
    assert last(folder / "term" / "run")["global_step"] == 3


def test_a_lost_node_requeues(outcome):
    folder, states = outcome
    job = states["lost"]
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1")
    assert job["BatchHost"] != states["node"]["name"]
    assert last(folder / "lost" / "run")["global_step"] == 20
    log = (folder / "lost" / "log4294967294.txt").read_text()
    assert "ckpt_path auto: going on from" in log


def test_an_array_of_seeds_has_folders_of_its_own(outcome):
    folder, states = outcome
    weights = {}
    for seed in (3, 8):
        assert states[f"array_{seed}"]["JobState"] == "COMPLETED"
        run = folder / "array" / "run" / f"seed_{seed}"
        assert yaml.safe_load((run / "config_fit.yaml").read_text())["seed_everything"] == seed
        weights[seed] = torch.cat([value.flatten() for value in last(run)["state_dict"].values()])
    assert not torch.equal(weights[3], weights[8])
    assert not (folder / "array" / "run" / "checkpoints").exists()
