from snakemake.utils import min_version

min_version("9.27")


# A configuration file on the command line replaces the default; Snakemake would merge the two.
if not workflow.overwrite_configfiles:

    configfile: f"{workflow.basedir}/workflow/config/demo.yaml"


report: "workflow/report/workflow.rst"


include: "workflow/rules/common.smk"
include: "workflow/rules/prepare.smk"
include: "workflow/rules/tune.smk"
include: "workflow/rules/train.smk"
include: "workflow/rules/evaluate.smk"
include: "workflow/rules/measure.smk"
include: "workflow/rules/batch.smk"
include: "workflow/rules/mqar.smk"
include: "workflow/rules/inspect.smk"
include: "workflow/rules/report.smk"


rule all:
    default_target: True
    input:
        page=f"{REPORT}/index.html",
