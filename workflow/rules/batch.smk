rule batch:
    """Several jobs in one process, which share imports and what is compiled (ham batch)."""

    # The results are not outputs: Snakemake removes those of a job that was cut off, and with
    # them what it had finished. The batch keeps its own books beside them.
    input:
        data=rules.prepare.output.summary,
        shards=rules.prepare.output.shards,
        earlier=lambda wildcards: batch_files(
            TASKS.earlier_batches(int(wildcards.number))
        ),
    output:
        done=f"{RUN}/batches/{{number}}.json",
    log:
        f"{RUN}/logs/batch{{number}}.log",
    # What the configuration names first is done first: GPU time may end in the middle.
    priority: lambda wildcards: len(PARTS) + len(TASKS.batches) - int(wildcards.number)
    retries: 2 if FULL else 0
    conda:
        ENVIRONMENT
    # Where timings are among the jobs: no other job beside them on a GPU, and cores enough.
    threads: batch_threads
    resources:
        gpu=batch_shares,
        mem_mb=MEMORY_MB,
        runtime="24h" if FULL else "60m",
    params:
        file=CONFIG_FILE,
        code=lambda wildcards: TASKS.batch_code(int(wildcards.number)),
        config=lambda wildcards: TASKS.batch_hash(int(wildcards.number)),
        data=subpath(input.data, parent=True),
    message:
        "Batch {wildcards.number} (progress: {log}, then the log of each job)"
    shell:
        "python -m ham batch {params.file} --number {wildcards.number} --data {params.data}"
        " --done {output.done} > {log} 2>&1"
