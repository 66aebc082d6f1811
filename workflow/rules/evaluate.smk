rule evaluate:
    """Quality of one trained model: language modelling, lm-eval tasks, recall, the dial."""
    input:
        data=rules.prepare.output.summary,
        shards=rules.prepare.output.shards,
        checkpoint=checkpoint_read,
    output:
        rows=f"{JOB}/evaluate.rows.jsonl",
        manifest=f"{JOB}/evaluate.manifest.json",
        samples=f"{JOB}/evaluate.samples.jsonl",
        documents=f"{JOB}/evaluate.documents.jsonl",
    log:
        f"{LOG}/evaluate.log",
    # Models that are done are evaluated while others train.
    priority: 1
    conda:
        ENVIRONMENT
    threads: CONFIG.threads_per_job
    resources:
        gpu=GPU,
        mem_mb=MEMORY_MB,
        runtime="12h" if FULL else "30m",
    params:
        file=CONFIG_FILE,
        code=lambda wildcards: stage_fingerprint("evaluate", CODE[wildcards.arm]),
        config=lambda wildcards: stage_hash(CONFIG, "evaluate", wildcards.arm),
        data=subpath(input.data, parent=True),
    message:
        "Evaluate {wildcards.arm}, seed {wildcards.seed}"
    shell:
        "python -m ham evaluate {params.file} --arm {wildcards.arm} --seed {wildcards.seed}"
        " --data {params.data} --checkpoint {input.checkpoint} --rows {output.rows} --keep-going"
        " > {log} 2>&1"
