rule mqar:
    """Every study that the configuration names; mqar.yaml where it names none (ham mqar)."""
    input:
        STUDIED,
    localrule: True


rule study:
    """The runs of a study that share learning rates and width, in one process."""

    # Reads no data; while they are prepared, a study must not take the GPUs of the batches.
    input:
        ancient(rules.prepare.output.summary) if CONFIG.workflow.studies else [],
    # As in a batch, rows are no outputs: runs that are finished stay finished.
    output:
        done=touch(f"{RUN}/studies/{{study}}/{{part}}.done"),
    log:
        f"{RUN}/logs/studies/{{study}}/{{part}}.log",
    # After the batches, each in its turn.
    priority: lambda wildcards: len(PARTS) - list(PARTS).index((wildcards.study, wildcards.part))
    retries: 2 if FULL else 0
    conda:
        ENVIRONMENT
    threads: alone
    resources:
        gpu=GPU,
        mem_mb=MEMORY_MB,
        runtime="24h" if FULL else "60m",
    params:
        command=lambda wildcards: shlex.join(
            PARTS[wildcards.study, wildcards.part].command
        ),
        code=lambda wildcards: PARTS[wildcards.study, wildcards.part].code,
        config=lambda wildcards: PARTS[wildcards.study, wildcards.part].hash,
    message:
        "Study {wildcards.study}: {wildcards.part} (progress: {log})"
    shell:
        "python -m ham {params.command} > {log} 2>&1"
