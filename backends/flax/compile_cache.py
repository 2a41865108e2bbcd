"""What XLA has compiled, kept on disk, so that another process need not compile it again."""

import os
from pathlib import Path

import jax


def folder() -> Path:
    """Where it is kept where nothing else is said: `kvtwin/jax` in the user's folder for caches."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification has relative paths ignored.
    return (Path(home) if os.path.isabs(home) else Path.home() / ".cache") / "kvtwin" / "jax"


def keep_what_is_compiled() -> None:
    """Switches jax's cache on disk on for this process, unless jax was told where to keep one, or to keep none.

    Called where a model is built, not where a package is imported: the setting is one of the whole process. A folder
    that cannot be made leaves it off.
    """
    if jax.config.jax_compilation_cache_dir is not None or not jax.config.jax_enable_compilation_cache:
        return
    place = folder()
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if os.access(place, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", str(place))
