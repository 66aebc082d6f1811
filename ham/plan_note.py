"""The estimate of an experiment that was not run, as comments in its configuration file.

`ham plan FILE --note` writes it between two markers; a test compares it with what the cost model
says today.
"""

from __future__ import annotations

from pathlib import Path

from ham.errors import ConfigError
from ham.files import write_text
from ham.plan import Plan, readable_bytes

BEGIN = "# estimate: begin (`ham plan FILE --note` writes these lines)"
END = "# estimate: end"
MINUTES_PER_HOUR = 60


def note_lines(plan: Plan) -> list[str]:
    """Parameters, memory and GPU hours by arm, as YAML comments.

    Raises:
        ConfigError: If the configuration is not for a GPU.
    """
    if plan.gpu is None:
        raise ConfigError(
            f"configuration {plan.config.name!r} has device {plan.config.device!r}; the note "
            "estimates GPU hours (legal: cuda)"
        )
    width = max(len(arm.name) for arm in plan.arms)
    lines = [
        f"# {plan.config.status.capitalize()}. One H100, per run of an arm; memory and speed are "
        "estimates.",
        f"# {'arm':<{width}} {'parameters':>12} {'training memory':>16} {'decoding memory':>16} "
        f"{'training FLOPs':>15} {'GPU-hours':>10}",
    ]
    for arm in plan.arms:
        hours = f"{plan.gpu.arm_minutes(arm.name) / MINUTES_PER_HOUR:,.0f}"
        lines.append(
            f"# {arm.name:<{width}} {arm.parameters:>12,} {readable_bytes(arm.memory_bytes):>16} "
            f"{readable_bytes(arm.cache_bytes):>16} {arm.train_flops:>15.2e} {hours:>10}"
        )
    total = plan.gpu_minutes / MINUTES_PER_HOUR
    disk = plan.token_bytes + plan.checkpoint_bytes + plan.state_bytes
    lines.append(
        f"# In all {total:,.0f} GPU-hours for {plan.runs} runs and {readable_bytes(disk)} of disk. "
        "Decoding memory: one"
    )
    lines.append(f"# sequence of {plan.config.data.context:,} tokens.")
    return lines


def with_note(text: str, lines: list[str]) -> str:
    """The text of a configuration file with its note replaced.

    Raises:
        ConfigError: If the markers are not there.
    """
    before, begin, rest = text.partition(f"{BEGIN}\n")
    _, end, after = rest.partition(f"{END}\n")
    if not begin or not end:
        raise ConfigError(f"the file has no lines {BEGIN!r} and {END!r} to write between")
    return f"{before}{begin}" + "".join(f"{line}\n" for line in lines) + f"{end}{after}"


def write_note(path: Path, plan: Plan) -> None:
    """Write the note of a plan into its configuration file."""
    write_text(path, with_note(path.read_text(encoding="utf-8"), note_lines(plan)))
