"""Runtime type checks: every annotation of mmdjax is checked by beartype while the tests run."""

from jaxtyping import install_import_hook

install_import_hook("mmdjax", "beartype.beartype")
