"""Causal language models of other libraries, in the place of a decoder of this project.

`configuration` builds one from a model type and its configuration, `folder` reads one from a
Hugging Face folder, `model.ExternalLM` makes it answer `ham.model.language_model.LanguageModel`,
`memory` counts its real cache. Nothing is imported from the libraries before a model is asked for.

The rest of the project reaches this package through `ham.model.foreign` alone, so that its code
counts only in the fingerprints of the arms that use it.
"""

from ham.external.configuration import (
    ExternalModelConfig,
    check_external,
    external_config,
    matched_config,
)
from ham.external.folder import (
    check_checkpoint,
    load_foreign,
    load_trained,
    outline_foreign,
)

__all__ = [
    "ExternalModelConfig",
    "check_checkpoint",
    "check_external",
    "external_config",
    "load_foreign",
    "load_trained",
    "matched_config",
    "outline_foreign",
]
