rule tune:
    """The learning rate of one arm: the one with the lowest validation loss."""
    input:
        rows=lambda wildcards: tuning_rows_files(CONFIG, wildcards.arm),
    output:
        chosen=f"{RUN}/tuning/{{arm}}/chosen.json",
    log:
        f"{RUN}/logs/{{arm}}/tune.log",
    localrule: True
    conda:
        ENVIRONMENT
    resources:
        mem_mb=MEMORY_MB,
        runtime="30m",
    params:
        file=CONFIG_FILE,
        code=stage_fingerprint("tune"),
        config=lambda wildcards: stage_hash(CONFIG, "tune", wildcards.arm),
    message:
        "Choose the learning rate of {wildcards.arm}"
    shell:
        "python -m ham tune {params.file} --arm {wildcards.arm} --rows {input.rows}"
        " --out {output.chosen} --keep-going > {log} 2>&1"
