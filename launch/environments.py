"""Environments of the foreign programs that this package starts, as pure functions of the environment around them.

A program receives what the user means: modules, proxies, credentials, search paths, SLURM_CONF. It does not receive
variables of a job, step or launcher around this process, and none that override an option which this package sets.
"""

import os
from collections.abc import Collection, Mapping

# Variables that describe a job, a step, or a process of a launcher. A program started from there is not part of it.
LAUNCHER_PREFIXES = (
    "SLURM_",
    "SLURMD_",
    "SRUN_",
    "SALLOC_",
    "PMI_",
    "PMI2_",
    "PMIX_",
    "PRTE_",
    "HYDRA_",
    "MPI_LOCAL",
    "OMPI_COMM_WORLD_",
    "OMPI_UNIVERSE_",
    "OMPI_APP_",
    "MV2_COMM_WORLD_",
    "TORCHELASTIC_",
    "SUBMITIT_",
)
LAUNCHER_VARIABLES = frozenset(
    {
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "GROUP_RANK",
        "GROUP_WORLD_SIZE",
        "ROLE_RANK",
        "ROLE_NAME",
        "ROLE_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
    }
)
KEPT_OF_SLURM = frozenset({"SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SLURM_JWT"})  # select a SLURM
CLIENT_PREFIXES = ("SBATCH_", "SQUEUE_", "SACCT_", "SCANCEL_", "SCONTROL_", "SINFO_")  # options of SLURM's programs
# Options that people set for all of their jobs in the profile of their shell.
KEPT_OF_SBATCH = {
    f"SBATCH_{name.upper()}": name for name in ("account", "partition", "qos", "constraint", "reservation")
}
DEVICES = frozenset(["CUDA_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL", "ROCR_VISIBLE_DEVICES", "ZE_AFFINITY_MASK"])
INTERPRETER_VARIABLES = frozenset({"PYTHONINSPECT"})  # a rank would wait at a prompt after its end
WORKING_FOLDER = ("", ".")  # as an entry of PYTHONPATH


def without_launcher(outer: Mapping[str, str]) -> dict[str, str]:
    """Return the environment without the variables of a job, step or launcher around this process."""
    return {
        name: value
        for name, value in outer.items()
        if name in KEPT_OF_SLURM or not (name.startswith(LAUNCHER_PREFIXES) or name in LAUNCHER_VARIABLES)
    }


def slurm_client_environment(outer: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of squeue, sacct, scancel and scontrol: without further options and filters."""
    return {name: value for name, value in without_launcher(outer).items() if not name.startswith(CLIENT_PREFIXES)}


def sbatch_environment(outer: Mapping[str, str], options: Collection[str]) -> dict[str, str]:
    """Return the environment of sbatch, which SLURM also gives to the job.

    `options`: the names of the options in the script, such as `partition`; a variable of sbatch overrides a line of
    the script. SBATCH_ACCOUNT, _PARTITION, _QOS, _CONSTRAINT and _RESERVATION stay where the script leaves them open.
    Devices that a job around this process was given are not those of the new job.
    """
    kept = {name: outer[name] for name, option in KEPT_OF_SBATCH.items() if name in outer and option not in options}
    removed = INTERPRETER_VARIABLES | (DEVICES if "SLURM_JOB_ID" in outer else frozenset())
    return {name: value for name, value in slurm_client_environment(outer).items() if name not in removed} | kept


def own_environment(outer: Mapping[str, str], *, root: str | None = None) -> dict[str, str]:
    """Return the environment of this package's own processes: ranks, workers, and the server that they are forked from.

    No module of the working folder is importable by accident, and no warning of a library is an error. `root`: a
    folder to import from all the same, that of a checkout which is not installed.
    """
    path = [root or "", *outer.get("PYTHONPATH", "").split(os.pathsep)]
    names = INTERPRETER_VARIABLES | ({"PYTHONWARNINGS"} if "error" in outer.get("PYTHONWARNINGS", "") else frozenset())
    kept = {name: value for name, value in outer.items() if name not in names and name != "PYTHONPATH"}
    entries = dict.fromkeys(entry for entry in path if entry not in WORKING_FOLDER)
    return kept | {"PYTHONSAFEPATH": "1"} | ({"PYTHONPATH": os.pathsep.join(entries)} if entries else {})
