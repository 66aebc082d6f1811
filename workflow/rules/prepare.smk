rule configuration:
    """The merged and validated configuration, as every job reads it."""
    output:
        config=f"{RUN}/config.yaml",
    log:
        f"{RUN}/logs/configuration.log",
    localrule: True
    params:
        values=CONFIG.model_dump(mode="json"),
    run:
        write_config(params.values, output.config, log[0])


rule prepare:
    """Split the corpus by documents, fit the tokenizer, write token shards."""
    input:
        config=ancient(f"{RUN}/config.yaml"),
    output:
        summary=f"{RUN}/data/data.json",
        shards=expand(f"{RUN}/data/{{split}}.tokens", split=SPLITS),
    log:
        f"{RUN}/logs/prepare.log",
    retries: 2 if FULL else 0
    conda:
        ENVIRONMENT
    threads: CONFIG.threads_per_job
    resources:
        mem_mb=MEMORY_MB,
        runtime="12h" if FULL else "30m",
    params:
        code=stage_fingerprint("prepare"),
        config=stage_hash(CONFIG, "prepare"),
        folder=subpath(output.summary, parent=True),
    shell:
        "python -m ham prepare {input.config} --out {params.folder} > {log} 2>&1"
