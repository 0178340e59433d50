"""Models by name or path: our configurations, published models, any config.json."""

import difflib
from pathlib import Path

from moe.config import CONFIG_DIR, Config, load_config, shipped
from moe.errors import ConfigError
from moe.plan.hf_shapes import load_hf
from moe.plan.shape import Shape, shape_of

PUBLISHED_DIR = CONFIG_DIR / "published"
Model = Shape | Config | str | Path


def published() -> list[str]:
    """Names of the published models whose config.json is shipped."""
    return sorted(path.stem for path in PUBLISHED_DIR.glob("*.json"))


def load_shape(model: Model) -> Shape:
    """The shape of a model given as a `Shape`, a `Config`, a shipped name, or the path of a TOML or config.json file.

    Raises:
        ConfigError: no such name or file, or one that cannot be read.
    """
    if isinstance(model, Shape):
        return model
    if isinstance(model, Config):
        return shape_of(model)
    path = Path(model)
    if str(model) in published():
        path = PUBLISHED_DIR / f"{model}.json"
    if path.suffix == ".json" or path.is_dir():
        return load_hf(path)
    if path.suffix != ".toml" and str(model) not in shipped():
        names = [*shipped(), *published()]
        close = difflib.get_close_matches(str(model), names, n=1, cutoff=0.5)
        raise ConfigError(
            f"model = {str(model)!r}: no shipped model is called so"
            f"{f'; did you mean {close[0]!r}?' if close else ''}; there are: {', '.join(names)}; "
            "or give a path to a .toml file or a config.json"
        )
    return shape_of(load_config(model))
