rule report:
    """Tables, figures and the HTML page, from the rows alone."""
    input:
        results=RESULTS,
        studied=STUDIED if CONFIG.workflow.studies else [],
        inspection=[] if BATCHED else PAGES,
        claims=f"{workflow.basedir}/workflow/config/claims.yaml",
    output:
        page=report(
            f"{REPORT}/index.html",
            caption="../report/page.rst",
            category="Report",
            labels={"content": "everything on one page"},
        ),
        listing=f"{REPORT}/report.json",
        figures=report(
            directory(f"{REPORT}/figures"),
            patterns=["{figure}.svg"],
            caption="../report/figure.rst",
            category="Figures",
            labels={"figure": "{figure}"},
        ),
        tables=report(
            directory(f"{REPORT}/tables"),
            patterns=["{table}.csv"],
            caption="../report/table.rst",
            category="Tables",
            labels={"table": "{table}"},
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
        file=CONFIG_FILE,
        code=stage_fingerprint("report"),
        config=stage_hash(CONFIG, "report"),
        folder=subpath(output.page, parent=True),
        rows=ROWS,
        inspection=f"--inspection {PAGES[0]}" if PAGES else "",
        evidence=f"--evidence {RUN}/studies" if CONFIG.workflow.studies else "",
    message:
        "Write tables, figures and the page: {output.page}"
    shell:
        "python -m ham report --rows {params.rows} --config {params.file}"
        " --claims {input.claims} --out {params.folder} {params.inspection} {params.evidence}"
        " > {log} 2>&1"
