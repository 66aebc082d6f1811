rule measure:
    """Speed and memory of one trained model, alone on the machine so that timings hold."""
    input:
        data=rules.prepare.output.summary,
        shards=rules.prepare.output.shards,
        checkpoint=checkpoint_read,
    output:
        rows=f"{JOB}/measure.rows.jsonl",
        manifest=f"{JOB}/measure.manifest.json",
    log:
        f"{LOG}/measure.log",
    conda:
        ENVIRONMENT
    threads: alone
    resources:
        gpu=GPU,
        mem_mb=MEMORY_MB,
        runtime="4h" if FULL else "30m",
    params:
        file=CONFIG_FILE,
        code=lambda wildcards: stage_fingerprint("measure", CODE[wildcards.arm]),
        config=lambda wildcards: stage_hash(CONFIG, "measure", wildcards.arm),
        data=subpath(input.data, parent=True),
    message:
        "Measure {wildcards.arm}: speed and memory"
    shell:
        "python -m ham measure {params.file} --arm {wildcards.arm} --seed {wildcards.seed}"
        " --data {params.data} --checkpoint {input.checkpoint} --rows {output.rows} --keep-going"
        " > {log} 2>&1"
