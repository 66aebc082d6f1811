rule report:
    """Tables, figures and the HTML page, from the rows alone."""
    input:
        config=ancient(rules.configuration.output.config),
        rows=rows_files(CONFIG),
    output:
        page=report(
            f"{REPORT}/index.html",
            caption="../report/page.rst",
            category="Report",
            labels={"page": "everything on one page"},
        ),
    log:
        f"{RUN}/logs/report.log",
    localrule: True
    conda:
        ENVIRONMENT
    resources:
        mem_mb=MEMORY_MB,
        runtime="30m",
    params:
        code=stage_fingerprint("report"),
        config=stage_hash(CONFIG, "report"),
        folder=subpath(output.page, parent=True),
    shell:
        "python -m ham report --rows {input.rows} --config {input.config}"
        " --out {params.folder} > {log} 2>&1"
