"""The scripts, one verb per file, and how the step's script is put together from them."""

from importlib.resources import files

STEP_PARTS = (
    "prelude",
    "append",
    "computed",
    "publish",
    "copied",
    "fork",
    "release",
    "describe",
    "reserve",
    "close",
    "forget",
    "finish",
)


def load_script(name: str) -> str:
    """The text of one script; "step" is assembled from its parts."""
    parts = STEP_PARTS if name == "step" else (name,)
    return "\n".join(files(__package__).joinpath(f"{part}.lua").read_text("utf-8") for part in parts)
