rule inspect:
    """Which tokens of a held-out text and of a needle document a trained model keeps."""
    input:
        data=rules.prepare.output.summary,
        shards=rules.prepare.output.shards,
        checkpoint=checkpoint_read,
    output:
        page=report(
            f"{REPORT}/inspect/{{arm}}-seed{{seed}}.html",
            caption="../report/inspect.rst",
            category="Kept tokens",
            labels={"model": "{arm}", "seed": "{seed}"},
        ),
    log:
        f"{LOG}/inspect.log",
    conda:
        ENVIRONMENT
    threads: CONFIG.threads_per_job
    resources:
        gpu=GPU,
        mem_mb=MEMORY_MB,
        runtime="30m",
    params:
        file=CONFIG_FILE,
        code=lambda wildcards: stage_fingerprint("inspect", CODE[wildcards.arm]),
        config=lambda wildcards: stage_hash(CONFIG, "inspect", wildcards.arm),
        data=subpath(input.data, parent=True),
        device=CONFIG.device,
        # Rows are no output: an arm that failed has the page alone.
        options=shlex.join(inspection_options(CONFIG)),
    message:
        "Inspect {wildcards.arm}, seed {wildcards.seed}: which tokens it keeps"
    shell:
        "python -m ham inspect {input.checkpoint} --sample {params.data}/test.tokens"
        " --config {params.file} --arm {wildcards.arm}"
        " --device {params.device} --out {output.page} {params.options} --keep-going"
        " > {log} 2>&1"
