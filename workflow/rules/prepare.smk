rule prepare:
    """Split the corpus by documents, fit the tokenizer, write token shards."""
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
        file=CONFIG_FILE,
        code=stage_fingerprint("prepare"),
        config=stage_hash(CONFIG, "prepare"),
        folder=subpath(output.summary, parent=True),
    message:
        "Tokenise the corpus and fit the tokenizer"
    shell:
        "python -m ham prepare {params.file} --out {params.folder} > {log} 2>&1"
