rule train:
    """Train one arm with one seed; a killed job goes on from results/.state."""
    input:
        data=rules.prepare.output.summary,
        shards=rules.prepare.output.shards,
        tuned=lambda wildcards: tuned_file(CONFIG, wildcards.arm),
    output:
        checkpoint=directory(f"{JOB}/checkpoint"),
        rows=f"{JOB}/train.rows.jsonl",
        manifest=f"{JOB}/train.manifest.json",
    log:
        f"{LOG}/train.log",
    wildcard_constraints:
        arm=TRAINED,
    retries: 2 if FULL else 0
    conda:
        ENVIRONMENT
    threads: CONFIG.threads_per_job
    resources:
        gpu=GPU,
        mem_mb=MEMORY_MB,
        runtime="24h" if FULL else "30m",
    params:
        file=CONFIG_FILE,
        code=lambda wildcards: stage_fingerprint("train", CODE[wildcards.arm]),
        config=lambda wildcards: stage_hash(CONFIG, "train", wildcards.arm),
        data=subpath(input.data, parent=True),
        folder=subpath(output.checkpoint, parent=True),
        tuned=lambda wildcards, input: f"--tuned {input.tuned}" if input.tuned else "",
    message:
        "Train {wildcards.arm}, seed {wildcards.seed} (progress: {log})"
    shell:
        "python -m ham train {params.file} --arm {wildcards.arm} --seed {wildcards.seed}"
        " --data {params.data} --out {params.folder} {params.tuned} --keep-going"
        " > {log} 2>&1"


rule tuning_run:
    """Train one arm at one learning rate on the tuning seed, which is never reported."""
    input:
        data=rules.prepare.output.summary,
        shards=rules.prepare.output.shards,
    output:
        rows=f"{RUN}/tuning/{{arm}}/lr{{rate}}/tuning.rows.jsonl",
        manifest=f"{RUN}/tuning/{{arm}}/lr{{rate}}/tuning.manifest.json",
    log:
        f"{RUN}/logs/{{arm}}/tuning-lr{{rate}}.log",
    wildcard_constraints:
        arm=TRAINED,
    # Every seed of an arm waits for these.
    priority: 2
    retries: 2 if FULL else 0
    conda:
        ENVIRONMENT
    threads: CONFIG.threads_per_job
    resources:
        gpu=GPU,
        mem_mb=MEMORY_MB,
        runtime="24h" if FULL else "30m",
    params:
        file=CONFIG_FILE,
        code=lambda wildcards: stage_fingerprint("train", CODE[wildcards.arm]),
        config=lambda wildcards: stage_hash(CONFIG, "train", wildcards.arm),
        data=subpath(input.data, parent=True),
        folder=subpath(output.rows, parent=True),
        seed=CONFIG.tuning.seed if CONFIG.tuning else "",
    message:
        "Tune {wildcards.arm}: learning rate {wildcards.rate}"
    shell:
        "python -m ham train {params.file} --arm {wildcards.arm} --seed {params.seed}"
        " --learning-rate {wildcards.rate} --data {params.data} --out {params.folder}"
        " --keep-going > {log} 2>&1"
