"""Names that the rules share; what they mean is in ham/workflow.py, where tests reach it."""

import re
import shlex
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError

from ham.batch.studies import study_parts
from ham.batch.tasks import Tasks
from ham.errors import HamError
from ham.workflow import (
    CONFIG_COPY,
    SPLITS,
    checkpoint_folder,
    failed_arms,
    gpus_per_job,
    inspection_options,
    inspection_pages,
    limit_gpus,
    parse_workflow_config,
    report_folder,
    require_device,
    rows_files,
    run_folder,
    stage_fingerprint,
    stage_hash,
    timing_threads,
    tuned_file,
    tuning_rows_files,
    write_config,
)

try:
    CONFIG = parse_workflow_config(config)
    PARTS = {(part.study.name, part.name): part for part in study_parts(CONFIG)}
except HamError as error:
    raise WorkflowError(str(error)) from None

ENVIRONMENT = "../../environment.yml"
RUN = run_folder(CONFIG)
# Not an input: each rule declares the part of the configuration that it reads as a hash.
CONFIG_FILE = f"{RUN}/{CONFIG_COPY}"
REPORT = report_folder(CONFIG)
JOB = f"{RUN}/models/{{arm}}/seed{{seed}}"
LOG = f"{RUN}/logs/{{arm}}/seed{{seed}}"
CODE = {arm.name: arm.code for arm in CONFIG.arms}
TRAINED = "|".join(re.escape(arm.name) for arm in CONFIG.arms if arm.trained)
GPU = gpus_per_job(CONFIG)
FULL = CONFIG.scale == "full"
TASKS = Tasks(CONFIG, CONFIG_FILE)
BATCHED = CONFIG.workflow.jobs_per_process > 1
MEMORY_MB = 32000 if FULL else 3500

# Jobs run under the interpreter that runs Snakemake.
shell.prefix(f"export PATH={Path(sys.executable).parent}:$PATH; ")
SHARES = CONFIG.workflow.processes_per_gpu
GPUS = limit_gpus(workflow, SHARES) // SHARES if GPU else 0


def checkpoint_read(wildcards):
    """The checkpoint that a job of this arm and seed reads."""
    return checkpoint_folder(CONFIG, wildcards.arm, wildcards.seed)


def alone(wildcards):
    """Threads of a job with timings: one a GPU at a time, on a CPU one in all."""
    if not workflow.local_exec:
        return CONFIG.threads_per_job
    return timing_threads(workflow.cores, GPUS)


def batch_shares(wildcards):
    """Shares of a GPU that a batch takes: all where it times."""
    return GPU if TASKS.is_alone(int(wildcards.number)) else min(GPU, 1)


def batch_threads(wildcards):
    """Cores of a batch: those of its GPU, divided among those that share it."""
    shared = GPU and not TASKS.is_alone(int(wildcards.number))
    return max(1, alone(wildcards) // (SHARES if shared else 1))


def batch_files(numbers):
    """What batches write when all of their jobs are done."""
    return [f"{RUN}/batches/{number}.json" for number in numbers]


# What studies write when all of their runs are done.
STUDIED = [f"{part.rows}.done" for part in PARTS.values()]
# What the report waits for; the rows themselves are outputs only where each job has a rule.
ROWS = rows_files(CONFIG)
RESULTS = batch_files(range(len(TASKS.batches))) if BATCHED else ROWS
PAGES = inspection_pages(CONFIG)


wildcard_constraints:
    number="[0-9]+",
    study="|".join(sorted({re.escape(study) for study, _ in PARTS}) or ["none"]),
    part="|".join(sorted({re.escape(part) for _, part in PARTS}) or ["none"]),
    arm="|".join(re.escape(arm.name) for arm in CONFIG.arms),
    seed="|".join(str(seed) for seed in CONFIG.all_seeds),
    rate="[0-9.e+-]+",


onstart:
    if workflow.local_exec:
        require_device(CONFIG)
    write_config(CONFIG, CONFIG_FILE)


onsuccess:
    for line in failed_arms(CONFIG):
        print(line)


onerror:
    print(
        f"Logs of failed jobs: {RUN}/logs/. To go on where it stopped, repeat the command"
    )
    print("with --rerun-incomplete (`make reproduce` does).")
