"""Which transformers this package works with, checked without importing it."""

from __future__ import annotations

from ham.errors import ConfigError

OLDEST_TRANSFORMERS = (5, 24)
"""The first release whose models call their decoding memory `cache`."""


def transformers_fault() -> str | None:
    """What is wrong with the installed transformers; None where it will do."""
    # Here, because every `import ham` reads this module.
    import importlib.metadata

    needed = ".".join(map(str, OLDEST_TRANSFORMERS))
    try:
        found = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        return f"transformers is not installed; {needed} or newer is needed"
    major, minor = (int(part) for part in found.split(".")[:2])
    if (major, minor) < OLDEST_TRANSFORMERS:
        return f"transformers {found} is installed; {needed} or newer is needed"
    return None


def require_transformers() -> None:
    """Check that transformers can be used.

    Raises:
        ConfigError: If it is missing or too old; the message says what to install.
    """
    fault = transformers_fault()
    if fault is not None:
        needed = ".".join(map(str, OLDEST_TRANSFORMERS))
        raise ConfigError(f"{fault}: pip install 'transformers>={needed},<6' 'accelerate>=1.15'")
