"""The scripts, one verb per file, and how the step's script is put together from them."""

from importlib.resources import files

STEP_PARTS = (
    "fence",
    "prelude",
    "append",
    "publish",
    "copied",
    "swapped_out",
    "swapped_in",
    "fork",
    "release",
    "describe",
    "computed",
    "reserve",
    "swap_out",
    "swap_in",
    "pin",
    "close",
    "forget",
    "finish",
)


def load_script(name: str) -> str:
    """The text of one script; those that are numbered are assembled from their parts."""
    parts = {"step": STEP_PARTS, "reclaim": ("fence", "reclaim")}.get(name, (name,))
    return "\n".join(files(__package__).joinpath(f"{part}.lua").read_text("utf-8") for part in parts)
